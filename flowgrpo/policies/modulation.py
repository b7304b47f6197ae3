"""Modulations and projected text, which depend on time and prompt alone: once for a rollout.

With c = time_text_embed(sigma, pooled text [, guidance]), every block modulates its tokens by

    shift, scale, gate, ... = linear(silu(c))          [rows, 2 to 9 D], one linear for each norm

and the text enters through context_embedder(tokens). Where adapters sit on attention and
feed-forward layers alone, nothing of this is trained: all of it is known before the first step.
These are products with few rows and many weights: a third of SD3.5-medium's weights are read for
them in every forward, and small products are those whose kernel, and so whose last bits, depend on
the number of rows.

`precompute` makes the modulations of all T steps of N prompts, one product of T N rows for each
norm (not one for all norms: their weights would have to be copied side by side, 1.5 GB for
SD3.5-medium, and T N rows fill the device as well). A row of this table is M = 325 x 1536 numbers
for SD3.5-medium, 1 MB in bfloat16, and 2 MB for FLUX.1-dev. Rollout and update look up the same
numbers, whatever rows their forwards have. Where c is made of the time alone, as in Qwen-Image and
Z-Image, the prompts of a step share one row, 4.4 and 1.0 MB there; and 0.1 MB in FLUX.2, all of
whose blocks of a kind share one modulation beside them. Blocks of Z-Image have no silu in front of
the linear layer.

The blocks stay diffusers': in place of c they are handed a row of the table, and the layers that
would compute from c take their columns of it. It is an argument like c, so a block that is run
again in the backward pass sees it again. A family names its blocks and norms (`Family.modulation`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import MethodType

import torch.nn.functional as F
from torch import Tensor, nn

from flowgrpo.policies.family import Family, Modulation


@dataclass(frozen=True)
class Columns:
    """The columns of the table that a layer reads; `_flowgrpo` of a norm's silu and linear."""

    width: int
    """Columns of the whole table: an input of that width is a row of it."""
    columns: slice


class Constant(nn.Module):
    """Stands in for a module whose result is known."""

    def __init__(self, value: object) -> None:
        super().__init__()
        self.value = value

    def forward(self, *inputs: object, **named: object) -> object:
        return self.value


@contextmanager
def using(model: nn.Module, **values: object) -> Iterator[None]:
    """Let the children of `model` by these names return these values inside."""
    children = {name: getattr(model, name) for name in values}
    try:
        for name, value in values.items():
            setattr(model, name, Constant(value))
        yield
    finally:
        for name, module in children.items():
            setattr(model, name, module)


def layers(
    transformer: nn.Module, modulation: Modulation
) -> list[tuple[nn.Module | None, nn.Module]]:
    """The silu, if there is one, and the linear layer of each modulation, in the order of their
    columns in the table."""
    pairs = []
    for module in transformer.modules():
        if type(module).__name__ in modulation.norms:
            # By its class, as the norms' silu has no name in common.
            silu = next(child for child in module.children() if isinstance(child, nn.SiLU))
            pairs.append((silu, module.linear))
        elif type(module).__name__ in (*modulation.blocks, *modulation.ends):
            sequences = [getattr(module, name, None) for name in modulation.layers]
            pairs += [_pair(*sequence) for sequence in sequences if sequence is not None]
    return pairs


def _pair(*modules: nn.Module) -> tuple[nn.Module | None, nn.Module]:
    """A silu, or None, and the linear layer behind it."""
    return (None, *modules) if len(modules) == 1 else modules


def install(transformer: nn.Module, modulation: Modulation) -> None:
    """Let the norms take a row of the table in place of c. Before adapters are added.

    Adds to the silu and the linear layer of each: `_flowgrpo` (`Columns`) and `forward`.
    """
    modulated = layers(transformer, modulation)
    width, start = sum(linear.out_features for _, linear in modulated), 0
    for silu, linear in modulated:
        end = start + linear.out_features
        # On the instances, as in lora.py, so that they stay of their classes for all else.
        if silu is not None:
            silu._flowgrpo = Columns(width, slice(None))
            silu.forward = MethodType(_silu, silu)
        linear._flowgrpo = Columns(width, slice(start, end))
        linear.forward = MethodType(_linear, linear)
        start = end


def _silu(self: nn.Module, c: Tensor) -> Tensor:
    return c if c.shape[-1] == self._flowgrpo.width else F.silu(c)


def _linear(self: nn.Module, c: Tensor) -> Tensor:
    if c.shape[-1] == self._flowgrpo.width:
        return c[..., self._flowgrpo.columns]
    return F.linear(c, self.weight, self.bias)


def why_not(transformer: nn.Module, family: Family) -> str | None:
    """The reason why modulations and text projection of this transformer are not known before the
    first step; None: they are."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    modulation = family.modulation
    if modulation is None:
        return f"{type(transformer).__name__} names no norms of the time alone"
    for block in family.blocks_of(transformer):
        if type(block).__name__ not in modulation.blocks:
            return f"{type(block).__name__} may use the time in other ways"
    names = filter(None, (modulation.time, modulation.text_norm, modulation.text))
    roots = {name: getattr(transformer, name) for name in names}
    linears = {linear for _, linear in layers(transformer, modulation)}
    roots |= {name: m for name, m in transformer.named_modules() if m in linears}
    for name, root in roots.items():
        if any(isinstance(module, BaseTunerLayer) for module in root.modules()):
            return f"{name} has an adapter"
        if any(p.requires_grad for p in root.parameters()):
            return f"{name} is trained"
    for linear in linears:
        if not isinstance(vars(linear).get("_flowgrpo"), Columns):
            # It took the pipeline over, and what `install` had added to its layers off.
            return "a later policy of the same pipeline computes them in each block"
    return None


def precompute(transformer: nn.Module, modulation: Modulation, c: Tensor) -> Tensor:
    """[R, M]: the modulations of all norms for c [R, D]."""
    modulated = layers(transformer, modulation)
    table = c.new_empty(len(c), modulated[0][1]._flowgrpo.width)
    active = F.silu(c)
    for silu, linear in modulated:
        table[:, linear._flowgrpo.columns] = linear(c if silu is None else active)
    return table
