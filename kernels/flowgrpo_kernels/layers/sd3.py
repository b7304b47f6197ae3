"""SD3's blocks by fused kernels: the forward of diffusers' JointTransformerBlock."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from ..blocks import gated_residual, norm_modulate
from . import parts
from .parts import AS_THEY_ARE, IMAGE_LAYERS, TEXT_LAYERS, AttentionCalls, modulation_rows

PROCESSORS = ("JointAttnProcessor2_0",)


def joint_block(
    self: nn.Module,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    joint_attention_kwargs: dict[str, Any] | None = None,
    *,
    calls: AttentionCalls = AS_THEY_ARE,
) -> tuple[Tensor | None, Tensor]:
    """Forward of a JointTransformerBlock: (text or, in the last block, None; image)."""
    parts.check_arguments(joint_attention_kwargs)
    image, text, eps = hidden_states, encoder_hidden_states, self.norm1.norm.eps
    if self.use_dual_attention:
        rows = modulation_rows(self.norm1, temb, 9)
        shift, scale, gate, shift_ff, scale_ff, gate_ff, shift2, scale2, gate2 = rows
        normed, normed2 = norm_modulate(image, scale, shift, second=(scale2, shift2), eps=eps)
        second = (gate2, attention(self.attn2, normed2, calls=calls))
    else:
        rows = modulation_rows(self.norm1, temb, 6)
        shift, scale, gate, shift_ff, scale_ff, gate_ff = rows
        normed, second = norm_modulate(image, scale, shift, eps=eps), None
    if self.context_pre_only:
        text_scale, text_shift = modulation_rows(self.norm1_context, temb, 2)
    else:
        text_shift, text_scale, *text_rows = modulation_rows(self.norm1_context, temb, 6)
    text_normed = norm_modulate(text, text_scale, text_shift, eps=self.norm1_context.norm.eps)
    attended, text_attended = attention(self.attn, normed, text_normed, calls=calls)
    image = gated_residual(image, gate, attended, second=second)
    image = parts.feed_forward(self.norm2, self.ff, image, shift_ff, scale_ff, gate_ff)
    if self.context_pre_only:
        return None, image
    text = gated_residual(text, text_rows[0], text_attended)
    text = parts.feed_forward(self.norm2_context, self.ff_context, text, *text_rows[1:])
    return text, image


def attention(
    attn: nn.Module, image: Tensor, text: Tensor | None = None, *, calls: AttentionCalls
) -> Any:
    """Compute the attention of image tokens [B, N, C], or of (image, text): their shapes."""
    norms = [[attn.norm_q], [attn.norm_k], [None]]
    projected = [calls.project(attn, IMAGE_LAYERS, image)]
    if text is not None:
        norms = [[attn.norm_q, attn.norm_added_q], [attn.norm_k, attn.norm_added_k], [None, None]]
        projected.append(calls.project(attn, TEXT_LAYERS, text))
    out = parts.joint_attention(attn, projected, norms, calls=calls)
    if text is None:
        return attn.to_out[1](attn.to_out[0](out))
    attended, text_attended = out.split([image.shape[1], text.shape[1]], dim=1)
    if not attn.context_pre_only:
        text_attended = attn.to_add_out(text_attended)
    return attn.to_out[1](attn.to_out[0](attended)), text_attended


def check_joint_block(name: str, block: nn.Module, processors: Sequence[str] = PROCESSORS) -> None:
    """Raise UnknownModule unless all modules of the block are those that `joint_block` computes.

    processors: names of the classes of attention processors that may be there.
    """
    kind = "SD35AdaLayerNormZeroX" if block.use_dual_attention else "AdaLayerNormZero"
    parts.check_norm(f"{name}.norm1", block.norm1, kind)
    kind = "AdaLayerNormContinuous" if block.context_pre_only else "AdaLayerNormZero"
    parts.check_norm(f"{name}.norm1_context", block.norm1_context, kind)
    parts.check_layer_norm(f"{name}.norm2", block.norm2)
    if not block.context_pre_only:
        parts.check_layer_norm(f"{name}.norm2_context", block.norm2_context)
    for suffix in ("attn", "attn2"):
        attn = getattr(block, suffix)
        if attn is not None:
            parts.check_attention(f"{name}.{suffix}", attn, "Attention", processors, "RMSNorm")
