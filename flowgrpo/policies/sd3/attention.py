"""Attention of SD3's layers, by a kernel of one's choice."""

from __future__ import annotations

import torch
from diffusers.models.attention_dispatch import AttentionBackendName
from diffusers.models.attention_processor import Attention, JointAttnProcessor2_0
from torch import Tensor, nn

from flowgrpo.policies import lora
from flowgrpo.policies.attention import IMAGE_LAYERS, TEXT_LAYERS, attend, projections


def set_processors(transformer: nn.Module) -> list[nn.Module]:
    """Give SD3's attention layers the processor `JointAttention`; returns these layers.

    diffusers' own calls PyTorch directly and ignores `set_attention_backend`. Query, key and value
    become one product where all three have adapters.
    """
    processors = (JointAttnProcessor2_0, JointAttention)
    layers = [m for m in transformer.modules() if isinstance(m, Attention)]
    layers = [layer for layer in layers if isinstance(layer.processor, processors)]
    for layer in layers:
        layer.set_processor(JointAttention())
        lora.share_input(layer, IMAGE_LAYERS, TEXT_LAYERS)
    return layers


class JointAttention:
    """SD3's attention over the tokens of image and text together, by a kernel of one's choice.

    The arithmetic of diffusers' JointAttnProcessor2_0. A layer without text tokens (`attn2` of
    SD3.5-medium's dual blocks) attends over the image's alone.
    """

    _attention_backend: AttentionBackendName | None = None
    """None: plain. diffusers' `set_attention_backend` writes here."""

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Image [B, N, C] and text tokens [B, M, C] -> the same shapes; without text, one."""
        if attention_mask is not None:
            raise ValueError("attention_mask: SD3's layers attend everywhere; pass None")
        norms = attn.norm_q, attn.norm_k
        query, key, value = _heads(attn, IMAGE_LAYERS, norms, hidden_states)
        if encoder_hidden_states is None:
            out = attend(query, key, value, self._attention_backend).flatten(2)
            return attn.to_out[1](attn.to_out[0](out))
        norms = attn.norm_added_q, attn.norm_added_k
        text_query, text_key, text_value = _heads(attn, TEXT_LAYERS, norms, encoder_hidden_states)
        out = attend(
            torch.cat([query, text_query], dim=1),
            torch.cat([key, text_key], dim=1),
            torch.cat([value, text_value], dim=1),
            self._attention_backend,
        ).flatten(2)
        image, text = out.split([hidden_states.shape[1], encoder_hidden_states.shape[1]], dim=1)
        if not attn.context_pre_only:
            text = attn.to_add_out(text)
        return attn.to_out[1](attn.to_out[0](image)), text


def _heads(
    attn: Attention,
    layers: tuple[str, ...],
    norms: tuple[nn.Module | None, nn.Module | None],
    x: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Query and key, normalised if the model does that, and value [B, N, H, D] of tokens x."""
    query, key, value = (y.unflatten(-1, (attn.heads, -1)) for y in projections(attn, layers, x))
    norm_q, norm_k = norms
    if norm_q is not None:
        query = norm_q(query)
    if norm_k is not None:
        key = norm_k(key)
    return query, key, value
