"""Parts of which the forwards of fused blocks are made, and the checks of what they replace.

They work on modules by their attributes and the names of their classes, which are diffusers': it is
not imported. What a block computes between its matrix products and its attention is three kernels:

    norm_modulate      LN(x) (1 + scale) + shift, for both attentions of a dual block in one pass
    joint_heads        queries, keys or values of image and text, normalised and rotated
    gated_residual     x + gate y, for both attentions of a dual block in one pass
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..blocks import gated_residual, joint_heads, norm_modulate

# Names of the layers that make query, key and value of the tokens of the image, and of the text.
IMAGE_LAYERS = ("to_q", "to_k", "to_v")
TEXT_LAYERS = ("add_q_proj", "add_k_proj", "add_v_proj")
KNOWN = "diffusers' SD3, FLUX.1 and Qwen-Image transformers"


class UnknownModule(ValueError):
    """Raised for a module that the fused forwards do not compute; `name` and `module` say which."""

    def __init__(self, name: str, module: nn.Module | None) -> None:
        super().__init__(
            f"{name} is a {module}, and the fused forwards know only the blocks and norms of "
            f"{KNOWN}; leave this model as it is."
        )
        self.name, self.module = name, module


@dataclass(frozen=True)
class AttentionCalls:
    """How a block calls the layers of its attention; `AS_THEY_ARE` unless a trainer knows better.

    A trainer may compute several products of one input as one, or choose the kernel of attention.
    """

    project: Callable[[nn.Module, Sequence[str], Tensor], list[Tensor]]
    """(attention layer, names of its linear layers, tokens [B, N, C]) -> results [B, N, H d]."""
    attend: Callable[[nn.Module, Tensor, Tensor, Tensor, Tensor | None], Tensor]
    """(attention layer, query, key, value [B, S, H, d], mask or None) -> [B, S, H, d]."""


def project(attn: nn.Module, names: Sequence[str], x: Tensor) -> list[Tensor]:
    """Call each of these linear layers by itself."""
    return [getattr(attn, name)(x) for name in names]


def attend(
    attn: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None
) -> Tensor:
    """Compute attention as the layer's own processor does: [B, S, H, d].

    By diffusers' dispatcher where the processor's module has it, so with the kernel that
    `set_attention_backend` has chosen, else by PyTorch's scaled_dot_product_attention.
    """
    processor = attn.processor
    dispatch = getattr(sys.modules[type(processor).__module__], "dispatch_attention_fn", None)
    if dispatch is None or not hasattr(processor, "_attention_backend"):
        heads_first = (x.transpose(1, 2) for x in (query, key, value))
        return F.scaled_dot_product_attention(*heads_first, attn_mask=mask).transpose(1, 2)
    options = {"backend": processor._attention_backend}
    if getattr(processor, "_parallel_config", None) is not None:
        options["parallel_config"] = processor._parallel_config
    return dispatch(query, key, value, attn_mask=mask, **options)


AS_THEY_ARE = AttentionCalls(project, attend)


def norm_out(self: nn.Module, x: Tensor, conditioning_embedding: Tensor) -> Tensor:
    """Forward of an AdaLayerNormContinuous: tokens [B, N, C] -> the same shape."""
    scale, shift = self.linear(self.silu(conditioning_embedding).to(x.dtype)).chunk(2, dim=1)
    return norm_modulate(x, scale, shift, eps=self.norm.eps)


def modulation_rows(norm: nn.Module, c: Tensor, count: int) -> tuple[Tensor, ...]:
    """Compute `count` rows [B, D] from the time's embedding c [B, D], in diffusers' order."""
    return norm.linear(norm.silu(c)).chunk(count, dim=1)


def feed_forward(
    norm: nn.Module, ff: nn.Module, x: Tensor, shift: Tensor, scale: Tensor, gate: Tensor
) -> Tensor:
    """Compute x + gate ff(LN(x) (1 + scale) + shift), for tokens x [B, N, C]."""
    return gated_residual(x, gate, ff(norm_modulate(x, scale, shift, eps=norm.eps)))


def head_tensors(
    attn: nn.Module,
    projected: list[list[Tensor]],
    norms: list[list[nn.Module | None]],
    rotary: tuple[Tensor, Tensor] | None = None,
) -> list[Tensor]:
    """Make query, key and value [B, S, H, d] over the tokens of all inputs.

    Args:
        projected: query, key and value [B, N_i, H d] of each input.
        norms: of each of the three, one for each input.
        rotary: cosines and sines [S, d], each number twice in a row.
    """
    heads = []
    rotations = (rotary, rotary, None)
    for *inputs, input_norms, rotation in zip(*projected, norms, rotations, strict=True):
        if len(inputs) == 1 and input_norms == [None] and rotation is None:
            # Nothing to do but to look at it as heads.
            heads.append(inputs[0].unflatten(-1, (attn.heads, -1)))
            continue
        weights = [None if norm is None else norm.weight for norm in input_norms]
        eps = next((norm.eps for norm in input_norms if norm is not None), 1e-6)
        heads.append(joint_heads(inputs, weights, heads=attn.heads, eps=eps, rotary=rotation))
    return heads


def joint_attention(
    attn: nn.Module,
    projected: list[list[Tensor]],
    norms: list[list[nn.Module | None]],
    rotary: tuple[Tensor, Tensor] | None = None,
    mask: Tensor | None = None,
    calls: AttentionCalls = AS_THEY_ARE,
) -> Tensor:
    """Compute attention over the tokens of all inputs, before the output layers: [B, S, H d].

    Arguments as for `head_tensors`; mask: as the attention's kernel takes it.
    """
    heads = head_tensors(attn, projected, norms, rotary)
    return calls.attend(attn, *heads, mask).flatten(2)


def in_range(x: Tensor) -> Tensor:
    """Clip to float16's range, as diffusers does with activations of 16 bits."""
    return x.clip(-65504, 65504) if x.dtype == torch.float16 else x


def check_arguments(joint_attention_kwargs: dict[str, Any] | None) -> None:
    """Raise ValueError for arguments that only diffusers' own forward knows."""
    if joint_attention_kwargs:
        raise ValueError(
            f"joint_attention_kwargs: fused blocks know none, got {list(joint_attention_kwargs)}"
        )


def is_of(module: nn.Module, kind: type | str) -> bool:
    """Tell if a module is of a class, or of one of that name."""
    return type(module).__name__ == kind if isinstance(kind, str) else type(module) is kind


def check_norm(name: str, norm: nn.Module, kind: type | str) -> None:
    """Raise unless it is a norm of class `kind` with a modulation, over a LayerNorm without
    weights."""
    if not is_of(norm, kind) or getattr(norm, "emb", None) is not None:
        raise UnknownModule(name, norm)
    check_layer_norm(f"{name}.norm", norm.norm)


def check_layer_norm(name: str, norm: nn.Module) -> None:
    """Raise unless it is a LayerNorm over one dimension without weights."""
    if type(norm) is not nn.LayerNorm or norm.weight is not None or len(norm.normalized_shape) != 1:
        raise UnknownModule(name, norm)


def check_attention(
    name: str, attn: nn.Module, kind: type | str, processors: Sequence[str], norm: type | str
) -> None:
    """Raise unless it is an attention layer of class `kind`, with a processor of one of these
    classes and head norms of class `norm`."""
    known = is_of(attn, kind) and type(attn.processor).__name__ in processors
    if not known or getattr(attn, "fused_projections", False):
        raise UnknownModule(name, attn)
    check_head_norms(name, attn, norm)


def check_head_norms(name: str, attn: nn.Module, kind: type | str) -> None:
    """Raise unless queries and keys have an RMSNorm of class `kind` over a head, with a weight, or
    none; the same eps for image and text."""
    for pair in (("norm_q", "norm_added_q"), ("norm_k", "norm_added_k")):
        norms = {suffix: getattr(attn, suffix, None) for suffix in pair}
        norms = {suffix: norm for suffix, norm in norms.items() if norm is not None}
        for suffix, norm in norms.items():
            known = is_of(norm, kind) and norm.weight is not None and norm.eps is not None
            plain = known and getattr(norm, "bias", None) is None and norm.weight.dim() == 1
            if not plain or norm.eps != next(iter(norms.values())).eps:
                raise UnknownModule(f"{name}.{suffix}", norm)
