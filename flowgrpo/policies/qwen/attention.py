"""Attention of Qwen-Image's layers, by a kernel of one's choice, that leaves padding out."""

from __future__ import annotations

import torch
from diffusers.models.attention_dispatch import AttentionBackendName
from diffusers.models.attention_processor import Attention
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.transformers.transformer_qwenimage import QwenDoubleStreamAttnProcessor2_0
from torch import Tensor, nn

from flowgrpo.policies import lora
from flowgrpo.policies.attention import IMAGE_LAYERS, TEXT_LAYERS, attend, projections
from flowgrpo_kernels.layers.qwen import real_tables


def set_processors(transformer: nn.Module) -> list[nn.Module]:
    """Give Qwen-Image's attention layers the processor `MaskedAttention`; returns these layers.

    diffusers' own multiplies complex numbers, which torch.compile leaves out, and makes the mask
    anew in each block. Query, key and value become one product where all three have adapters.
    """
    processors = (QwenDoubleStreamAttnProcessor2_0, MaskedAttention)
    layers = [m for m in transformer.modules() if isinstance(m, Attention)]
    layers = [layer for layer in layers if isinstance(layer.processor, processors)]
    for layer in layers:
        layer.set_processor(MaskedAttention())
        lora.share_input(layer, IMAGE_LAYERS, TEXT_LAYERS)
    return layers


def additive_mask(valid: Tensor, image_tokens: int, dtype: torch.dtype) -> Tensor:
    """[B, 1, 1, L + N] of `dtype`: -inf for the tokens of a text where `valid` [B, L] is 0, else 0,
    for N image tokens too."""
    mask = valid.new_zeros(len(valid), valid.shape[1] + image_tokens, dtype=dtype)
    mask[:, : valid.shape[1]].masked_fill_(valid == 0, float("-inf"))
    return mask[:, None, None]


class MaskedAttention:
    """Qwen-Image's attention over the tokens of text and image together, by a kernel of one's
    choice: the arithmetic of diffusers' QwenDoubleStreamAttnProcessor2_0."""

    _attention_backend: AttentionBackendName | None = None
    """None: plain. diffusers' `set_attention_backend` writes here."""

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        encoder_hidden_states_mask: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Image [B, N, C] and text tokens [B, L, C] -> the same shapes.

        Args:
            encoder_hidden_states_mask: [B, L], as the pipeline itself gives it: 0 is padding.
            attention_mask: of `additive_mask`, in its place.
            image_rotary_emb: of `real_tables`, or complex, as the transformer itself makes them.
        """
        image_tokens, text_tokens = hidden_states.shape[1], encoder_hidden_states.shape[1]
        if encoder_hidden_states_mask is not None:
            attention_mask = additive_mask(
                encoder_hidden_states_mask, image_tokens, hidden_states.dtype
            )
        rotary = image_rotary_emb
        if rotary is not None and rotary[0].is_complex():
            rotary = real_tables(rotary)
        streams = (
            (TEXT_LAYERS, attn.norm_added_q, attn.norm_added_k, encoder_hidden_states),
            (IMAGE_LAYERS, attn.norm_q, attn.norm_k, hidden_states),
        )
        text, image = (_heads(attn, *stream) for stream in streams)
        query, key, value = (torch.cat(pair, dim=1) for pair in zip(text, image, strict=True))
        if rotary is not None:
            query, key = (apply_rotary_emb(x, rotary, sequence_dim=1) for x in (query, key))
        out = attend(query, key, value, self._attention_backend, attention_mask).flatten(2)
        text_out, image_out = out.split([text_tokens, image_tokens], dim=1)
        image_out = attn.to_out[1](attn.to_out[0](image_out.contiguous()))
        return image_out, attn.to_add_out(text_out.contiguous())


def _heads(
    attn: Attention,
    layers: tuple[str, ...],
    norm_q: nn.Module | None,
    norm_k: nn.Module | None,
    x: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Query and key, normalised if the model does that, and value [B, S, H, D] of tokens x."""
    query, key, value = (y.unflatten(-1, (attn.heads, -1)) for y in projections(attn, layers, x))
    if norm_q is not None:
        query = norm_q(query)
    if norm_k is not None:
        key = norm_k(key)
    return query, key, value
