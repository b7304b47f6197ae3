"""Qwen-Image's blocks by fused kernels: the forward of diffusers' QwenImageTransformerBlock."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..blocks import gated_residual, norm_modulate
from . import parts
from .parts import AS_THEY_ARE, IMAGE_LAYERS, TEXT_LAYERS, AttentionCalls

PROCESSORS = ("QwenDoubleStreamAttnProcessor2_0",)


def joint_block(
    self: nn.Module,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    encoder_hidden_states_mask: Tensor | None,
    temb: Tensor,
    image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    joint_attention_kwargs: dict[str, Any] | None = None,
    modulate_index: Tensor | None = None,
    *,
    calls: AttentionCalls = AS_THEY_ARE,
) -> tuple[Tensor, Tensor]:
    """Forward of a QwenImageTransformerBlock: (text, image).

    Args:
        encoder_hidden_states_mask: bool [B, L], False for the padding of a text; None: there is
            none, or `joint_attention_kwargs` has an attention_mask for all tokens.
        image_rotary_emb: rotations of the image's and of the text's tokens, complex [N, d / 2] and
            [L, d / 2], as the transformer makes them; or the pair of `real_tables`.
        modulate_index: must be None.
    """
    arguments = dict(joint_attention_kwargs or {})
    mask = arguments.pop("attention_mask", None)
    parts.check_arguments(arguments)
    if modulate_index is not None:
        raise ValueError("modulate_index: fused blocks modulate all tokens alike; pass None")
    image, text, attn = hidden_states, encoder_hidden_states, self.attn
    if mask is None and encoder_hidden_states_mask is not None:
        valid = encoder_hidden_states_mask.bool()
        mask = torch.cat([valid, valid.new_ones(len(valid), image.shape[1])], dim=1)[:, None, None]
    rotary = image_rotary_emb
    if rotary is not None and rotary[0].is_complex():
        rotary = real_tables(rotary)
    shift, scale, gate, *rows = self.img_mod(temb).chunk(6, dim=-1)
    text_shift, text_scale, text_gate, *text_rows = self.txt_mod(temb).chunk(6, dim=-1)
    normed = norm_modulate(image, scale, shift, eps=self.img_norm1.eps)
    text_normed = norm_modulate(text, text_scale, text_shift, eps=self.txt_norm1.eps)
    projected = [
        calls.project(attn, TEXT_LAYERS, text_normed),
        calls.project(attn, IMAGE_LAYERS, normed),
    ]
    norms = [[attn.norm_added_q, attn.norm_q], [attn.norm_added_k, attn.norm_k], [None, None]]
    out = parts.joint_attention(attn, projected, norms, rotary, mask, calls)
    text_attended, attended = out.split([text.shape[1], image.shape[1]], dim=1)
    image = gated_residual(image, gate, attn.to_out[1](attn.to_out[0](attended.contiguous())))
    image = parts.feed_forward(self.img_norm2, self.img_mlp, image, *rows)
    text = gated_residual(text, text_gate, attn.to_add_out(text_attended.contiguous()))
    text = parts.feed_forward(self.txt_norm2, self.txt_mlp, text, *text_rows)
    return parts.in_range(text), parts.in_range(image)


def real_tables(rotary: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Make cosines and sines [L + N, d], each number twice in a row, of the text's tokens and then
    the image's, from complex rotations (image [N, d / 2], text [L, d / 2])."""
    image, text = rotary
    angles = torch.view_as_real(torch.cat([text, image])).repeat_interleave(2, dim=1)
    return angles[..., 0].contiguous(), angles[..., 1].contiguous()


def check_joint_block(name: str, block: nn.Module, processors: Sequence[str] = PROCESSORS) -> None:
    """Raise UnknownModule unless all modules of the block are those that `joint_block` computes.

    processors: names of the classes of attention processors that may be there.
    """
    if getattr(block, "zero_cond_t", False):
        raise parts.UnknownModule(name, block)
    for suffix in ("img_norm1", "img_norm2", "txt_norm1", "txt_norm2"):
        parts.check_layer_norm(f"{name}.{suffix}", getattr(block, suffix))
    parts.check_attention(f"{name}.attn", block.attn, "Attention", processors, "RMSNorm")
