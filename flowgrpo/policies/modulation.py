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
numbers, whatever rows their forwards have.

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

    def forward(self, *inputs: object) -> object:
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


def norms(transformer: nn.Module, modulation: Modulation) -> list[nn.Module]:
    """The norms with a modulation, in the order of their columns in the table."""
    return [m for m in transformer.modules() if type(m).__name__ in modulation.norms]


def install(transformer: nn.Module, modulation: Modulation) -> None:
    """Let the norms take a row of the table in place of c. Before adapters are added.

    Adds to each norm's `silu` and `linear`: `_flowgrpo` (`Columns`) and `forward`.
    """
    modulated = norms(transformer, modulation)
    width, start = sum(norm.linear.out_features for norm in modulated), 0
    for norm in modulated:
        end = start + norm.linear.out_features
        # On the instances, as in lora.py, so that they stay of their classes for all else.
        norm.silu._flowgrpo = Columns(width, slice(None))
        norm.silu.forward = MethodType(_silu, norm.silu)
        norm.linear._flowgrpo = Columns(width, slice(start, end))
        norm.linear.forward = MethodType(_linear, norm.linear)
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
    roots = {name: getattr(transformer, name) for name in (modulation.time, modulation.text)}
    for name, module in transformer.named_modules():
        if type(module).__name__ in modulation.norms:
            roots[f"{name}.linear"] = module.linear
    for name, root in roots.items():
        if any(isinstance(module, BaseTunerLayer) for module in root.modules()):
            return f"{name} has an adapter"
        if any(p.requires_grad for p in root.parameters()):
            return f"{name} is trained"
    for norm in norms(transformer, modulation):
        if not isinstance(vars(norm.linear).get("_flowgrpo"), Columns):
            # It took the pipeline over, and what `install` had added to its layers off.
            return "a later policy of the same pipeline computes them in each block"
    return None


def precompute(transformer: nn.Module, modulation: Modulation, c: Tensor) -> Tensor:
    """[R, M]: the modulations of all norms for c [R, D]."""
    modulated = norms(transformer, modulation)
    table = c.new_empty(len(c), modulated[0].linear._flowgrpo.width)
    active = F.silu(c)
    for norm in modulated:
        table[:, norm.linear._flowgrpo.columns] = norm.linear(active)
    return table
