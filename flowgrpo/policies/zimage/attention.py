"""Attention of Z-Image's layers, by a kernel of one's choice, that leaves padding out."""

from __future__ import annotations

import torch
from diffusers.models.attention_dispatch import AttentionBackendName
from diffusers.models.attention_processor import Attention
from diffusers.models.transformers.transformer_z_image import ZSingleStreamAttnProcessor
from torch import Tensor, nn

from flowgrpo.policies import lora
from flowgrpo.policies.attention import IMAGE_LAYERS, attend, projections
from flowgrpo.policies.rotary import RowTables


def set_processors(transformer: nn.Module) -> list[nn.Module]:
    """Give Z-Image's attention layers the processor `SingleStreamAttention`; returns these layers.

    diffusers' own multiplies complex numbers, which torch.compile leaves out, and takes no `plain`
    kernel. Query, key and value become one product where all three have adapters.
    """
    processors = (ZSingleStreamAttnProcessor, SingleStreamAttention)
    layers = [m for m in transformer.modules() if isinstance(m, Attention)]
    layers = [layer for layer in layers if isinstance(layer.processor, processors)]
    for layer in layers:
        layer.set_processor(SingleStreamAttention())
        lora.share_input(layer, IMAGE_LAYERS)
    return layers


def real_tables(rotations: Tensor) -> RowTables:
    """Cosines and sines [..., D], each twice, of complex rotations [..., D / 2]."""
    parts = torch.view_as_real(rotations).repeat_interleave(2, dim=-2)
    return RowTables(parts[..., 0].contiguous(), parts[..., 1].contiguous())


def additive_mask(seen: Tensor, dtype: torch.dtype) -> Tensor:
    """[B, 1, 1, S] of `dtype`: 0 for the tokens where `seen` [B, S] is true, else -inf."""
    mask = seen.new_zeros(seen.shape, dtype=dtype)
    return mask.masked_fill_(~seen, float("-inf"))[:, None, None]


def rotate(x: Tensor, tables: RowTables) -> Tensor:
    """Turn each pair of numbers of queries or keys [B, S, H, D], in float32, as complex numbers are
    multiplied."""
    first, second = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack((-second, first), dim=-1).flatten(-2)
    cos, sin = (table[:, :, None] for table in tables)
    return (x.float() * cos + turned * sin).to(x.dtype)


class SingleStreamAttention:
    """Attention over the tokens of a block by a kernel of one's choice: the arithmetic of
    diffusers' ZSingleStreamAttnProcessor."""

    _attention_backend: AttentionBackendName | None = None
    """None: plain. diffusers' `set_attention_backend` writes here."""

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        freqs_cis: RowTables | Tensor | None = None,
    ) -> Tensor:
        """Tokens [B, S, C] -> the same shape.

        Args:
            attention_mask: of `additive_mask`, or boolean [B, S], as the transformer itself makes
                it.
            freqs_cis: of `real_tables`, or complex [B, S, D / 2], as the transformer itself makes
                them.
        """
        if attention_mask is not None and attention_mask.ndim == 2:
            attention_mask = additive_mask(attention_mask, hidden_states.dtype)
        query, key, value = (
            y.unflatten(-1, (attn.heads, -1))
            for y in projections(attn, IMAGE_LAYERS, hidden_states)
        )
        if attn.norm_q is not None:
            query = attn.norm_q(query)
        if attn.norm_k is not None:
            key = attn.norm_k(key)
        if freqs_cis is not None:
            tables = freqs_cis if isinstance(freqs_cis, RowTables) else real_tables(freqs_cis)
            query, key = rotate(query, tables), rotate(key, tables)
        out = attend(query, key, value, self._attention_backend, attention_mask).flatten(2)
        return attn.to_out[1](attn.to_out[0](out))


def widths(transformer: nn.Module) -> tuple[int, int]:
    """Numbers of a token, and of a head."""
    return transformer.dim, transformer.dim // transformer.n_heads
