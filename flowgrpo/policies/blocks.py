"""The blocks of a transformer with fused element-wise kernels, over diffusers' modules.

Between its matrix products and its attention a block of SD3 or FLUX reads and writes its tokens a
dozen times: LayerNorm, scale and shift, RMSNorm of queries and keys, rotation, concatenation of
image and text, gates and residuals, each a kernel of its own with its own rounding. Here they are
three kernels (flowgrpo_kernels.blocks), which round once:

    norm_modulate      LN(x) (1 + scale) + shift, for both attentions of a dual block in one pass
    joint_heads        queries, keys or values of image and text, normalised and rotated
    gated_residual     x + gate y, for both attentions of a dual block in one pass

Like lora.py this replaces the forward of modules that are there: their parameters and names, PEFT's
layers in them, saving and gradient checkpointing stay. With gradients and without, on any number of
rows, the kernels give a token the same bits, so that rollout and update agree as they do without
them. Not to be joined with torch.compile, which fuses the same operations by itself.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from diffusers.models import attention as joint
from diffusers.models import attention_processor, normalization
from diffusers.models.transformers import transformer_flux as flux
from torch import Tensor, nn

from flowgrpo.config import ConfigError
from flowgrpo.policies import lora
from flowgrpo.policies.attention import ADDED, OWN, JointAttention, attend, projections
from flowgrpo.policies.compiled import transformer_blocks
from flowgrpo_kernels.blocks import gated_residual, joint_heads, norm_modulate


def fuse(transformer: nn.Module) -> None:
    """Give every block, and the norm behind the last one, the forward of this file.

    After `attention.pin`, whose choice of a kernel stays, and before adapters are added.

    Raises:
        ConfigError: a block or norm is none of those that the kernels were made for. Nothing is
            changed then.
    """
    _check_sizes(transformer)
    forwards, found = {}, set(transformer_blocks(transformer))
    for name, module in transformer.named_modules():
        if module in found:
            if type(module) not in BLOCKS:
                raise _unknown(name, module)
            check, forwards[module] = BLOCKS[type(module)]
            check(name, module)
    _check_norm("norm_out", transformer.norm_out, normalization.AdaLayerNormContinuous)
    forwards[transformer.norm_out] = _norm_out
    for module, forward in forwards.items():
        module.forward = MethodType(forward, module)
        if isinstance(getattr(module, "attn", None), flux.FluxAttention):
            lora.share_input(module.attn, OWN, ADDED)


def _norm_out(self: nn.Module, x: Tensor, conditioning_embedding: Tensor) -> Tensor:
    scale, shift = self.linear(self.silu(conditioning_embedding).to(x.dtype)).chunk(2, dim=1)
    return norm_modulate(x, scale, shift, eps=self.norm.eps)


def _modulation(norm: nn.Module, c: Tensor, count: int) -> tuple[Tensor, ...]:
    """`count` rows [B, D], in diffusers' order; c is the time, or a row of constants.table."""
    return norm.linear(norm.silu(c)).chunk(count, dim=1)


def _sd3_block(
    self: nn.Module,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    joint_attention_kwargs: dict[str, Any] | None = None,
) -> tuple[Tensor | None, Tensor]:
    """JointTransformerBlock: (text or, in the last block, None; image)."""
    _check_arguments(joint_attention_kwargs)
    image, text, eps = hidden_states, encoder_hidden_states, self.norm1.norm.eps
    if self.use_dual_attention:
        rows = _modulation(self.norm1, temb, 9)
        shift, scale, gate, shift_ff, scale_ff, gate_ff, shift2, scale2, gate2 = rows
        own, own2 = norm_modulate(image, scale, shift, second=(scale2, shift2), eps=eps)
        second = (gate2, _sd3_attention(self.attn2, own2))
    else:
        rows = _modulation(self.norm1, temb, 6)
        shift, scale, gate, shift_ff, scale_ff, gate_ff = rows
        own, second = norm_modulate(image, scale, shift, eps=eps), None
    if self.context_pre_only:
        text_scale, text_shift = _modulation(self.norm1_context, temb, 2)
    else:
        text_shift, text_scale, *text_rows = _modulation(self.norm1_context, temb, 6)
    text_own = norm_modulate(text, text_scale, text_shift, eps=self.norm1_context.norm.eps)
    seen, text_seen = _sd3_attention(self.attn, own, text_own)
    image = gated_residual(image, gate, seen, second=second)
    image = _feed_forward(self.norm2, self.ff, image, shift_ff, scale_ff, gate_ff)
    if self.context_pre_only:
        return None, image
    text = gated_residual(text, text_rows[0], text_seen)
    return _feed_forward(self.norm2_context, self.ff_context, text, *text_rows[1:]), image


def _feed_forward(
    norm: nn.Module, ff: nn.Module, x: Tensor, shift: Tensor, scale: Tensor, gate: Tensor
) -> Tensor:
    return gated_residual(x, gate, ff(norm_modulate(x, scale, shift, eps=norm.eps)))


def _sd3_attention(attn: nn.Module, image: Tensor, text: Tensor | None = None) -> Any:
    """What JointAttention computes: image [B, N, C], or (image, text)."""
    norms = [[attn.norm_q], [attn.norm_k], [None]]
    made = [projections(attn, OWN, image)]
    if text is not None:
        norms = [[attn.norm_q, attn.norm_added_q], [attn.norm_k, attn.norm_added_k], [None, None]]
        made.append(projections(attn, ADDED, text))
    out = _attention(attn, made, norms)
    if text is None:
        return attn.to_out[1](attn.to_out[0](out))
    seen, text_seen = out.split([image.shape[1], text.shape[1]], dim=1)
    if not attn.context_pre_only:
        text_seen = attn.to_add_out(text_seen)
    return attn.to_out[1](attn.to_out[0](seen)), text_seen


def _attention(
    attn: nn.Module,
    made: list[list[Tensor]],
    norms: list[list[nn.Module | None]],
    rotary: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """[B, S, heads * d]: attention over the tokens of all inputs, before the output layers.

    made: query, key and value [B, N_i, heads * d] of each input; norms: of each of the three, one
    for each input.
    """
    heads = []
    for *parts, own, turn in zip(*made, norms, (rotary, rotary, None), strict=True):
        if len(parts) == 1 and own == [None] and turn is None:
            # Nothing to do but to look at it as heads.
            heads.append(parts[0].unflatten(-1, (attn.heads, -1)))
            continue
        weights = [None if norm is None else norm.weight for norm in own]
        eps = next((norm.eps for norm in own if norm is not None), 1e-6)
        heads.append(joint_heads(parts, weights, heads=attn.heads, eps=eps, rotary=turn))
    return attend(*heads, attn.processor._attention_backend).flatten(2)


def _flux_block(
    self: nn.Module,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    joint_attention_kwargs: dict[str, Any] | None = None,
) -> tuple[Tensor, Tensor]:
    """FluxTransformerBlock: (text, image)."""
    _check_arguments(joint_attention_kwargs)
    image, text, attn = hidden_states, encoder_hidden_states, self.attn
    shift, scale, gate, *rows = _modulation(self.norm1, temb, 6)
    text_shift, text_scale, text_gate, *text_rows = _modulation(self.norm1_context, temb, 6)
    own = norm_modulate(image, scale, shift, eps=self.norm1.norm.eps)
    text_own = norm_modulate(text, text_scale, text_shift, eps=self.norm1_context.norm.eps)
    made = [projections(attn, ADDED, text_own), projections(attn, OWN, own)]
    norms = [[attn.norm_added_q, attn.norm_q], [attn.norm_added_k, attn.norm_k], [None, None]]
    out = _attention(attn, made, norms, image_rotary_emb)
    text_seen, seen = out.split([text.shape[1], image.shape[1]], dim=1)
    image = gated_residual(image, gate, attn.to_out[1](attn.to_out[0](seen.contiguous())))
    image = _feed_forward(self.norm2, self.ff, image, *rows)
    text = gated_residual(text, text_gate, attn.to_add_out(text_seen.contiguous()))
    text = _feed_forward(self.norm2_context, self.ff_context, text, *text_rows)
    return _in_range(text), image


def _flux_single_block(
    self: nn.Module,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    joint_attention_kwargs: dict[str, Any] | None = None,
) -> tuple[Tensor, Tensor]:
    """FluxSingleTransformerBlock: (text, image)."""
    _check_arguments(joint_attention_kwargs)
    attn, count = self.attn, encoder_hidden_states.shape[1]
    tokens = torch.cat([encoder_hidden_states, hidden_states], dim=1)
    shift, scale, gate = _modulation(self.norm, temb, 3)
    own = norm_modulate(tokens, scale, shift, eps=self.norm.norm.eps)
    norms = [[attn.norm_q], [attn.norm_k], [None]]
    seen = _attention(attn, [projections(attn, OWN, own)], norms, image_rotary_emb)
    wide = torch.cat([seen, self.act_mlp(self.proj_mlp(own))], dim=2)
    tokens = _in_range(gated_residual(tokens, gate, self.proj_out(wide)))
    # Not two slices, each of whose gradients would be a whole tensor of zeros and a part.
    return tokens.split([count, tokens.shape[1] - count], dim=1)


def _in_range(x: Tensor) -> Tensor:
    """As diffusers keeps FLUX's activations inside float16's range."""
    return x.clip(-65504, 65504) if x.dtype == torch.float16 else x


def _check_arguments(joint_attention_kwargs: dict[str, Any] | None) -> None:
    if joint_attention_kwargs:
        raise ValueError(
            f"joint_attention_kwargs: fused blocks know none, got {list(joint_attention_kwargs)}"
        )


def _check_sizes(transformer: nn.Module) -> None:
    """The kernels' limits on a GPU."""
    head, width = transformer.config.attention_head_dim, transformer.inner_dim
    if transformer.device.type == "cuda" and (head & (head - 1) or head > 256 or width > 8192):
        raise ConfigError(
            f"policy.fused is on, but {type(transformer).__name__} has heads of {head} and tokens "
            f"of {width} numbers, and the fused kernels need a power of two up to 256 and at most "
            "8192; set policy.fused to false."
        )


def _check_sd3_block(name: str, block: nn.Module) -> None:
    zero, last = normalization.AdaLayerNormZero, normalization.AdaLayerNormContinuous
    dual = normalization.SD35AdaLayerNormZeroX
    _check_norm(f"{name}.norm1", block.norm1, dual if block.use_dual_attention else zero)
    context = last if block.context_pre_only else zero
    _check_norm(f"{name}.norm1_context", block.norm1_context, context)
    _check_layer_norm(f"{name}.norm2", block.norm2)
    if not block.context_pre_only:
        _check_layer_norm(f"{name}.norm2_context", block.norm2_context)
    for part in ("attn", "attn2"):
        attn = getattr(block, part)
        if attn is None:
            continue
        if type(attn) is not attention_processor.Attention or not isinstance(
            attn.processor, JointAttention
        ):
            raise _unknown(f"{name}.{part}", attn)
        _check_head_norms(f"{name}.{part}", attn, normalization.RMSNorm)


def _check_flux_block(name: str, block: nn.Module) -> None:
    if type(block) is flux.FluxSingleTransformerBlock:
        _check_norm(f"{name}.norm", block.norm, normalization.AdaLayerNormZeroSingle)
    else:
        for part in ("norm1", "norm1_context"):
            _check_norm(f"{name}.{part}", getattr(block, part), normalization.AdaLayerNormZero)
        for part in ("norm2", "norm2_context"):
            _check_layer_norm(f"{name}.{part}", getattr(block, part))
    attn = block.attn
    plain = type(attn.processor) is flux.FluxAttnProcessor and not attn.fused_projections
    if type(attn) is not flux.FluxAttention or not plain:
        raise _unknown(f"{name}.attn", attn)
    _check_head_norms(f"{name}.attn", attn, nn.RMSNorm)


def _check_norm(name: str, norm: nn.Module, kind: type) -> None:
    """A norm with a modulation, over a LayerNorm without weights."""
    if type(norm) is not kind or getattr(norm, "emb", None) is not None:
        raise _unknown(name, norm)
    _check_layer_norm(f"{name}.norm", norm.norm)


def _check_layer_norm(name: str, norm: nn.Module) -> None:
    if type(norm) is not nn.LayerNorm or norm.weight is not None or len(norm.normalized_shape) != 1:
        raise _unknown(name, norm)


def _check_head_norms(name: str, attn: nn.Module, kind: type) -> None:
    """RMSNorm over a head, with a weight, or none; the same eps for image and text."""
    for pair in (("norm_q", "norm_added_q"), ("norm_k", "norm_added_k")):
        found = [(part, getattr(attn, part, None)) for part in pair]
        found = [(part, norm) for part, norm in found if norm is not None]
        for part, norm in found:
            known = type(norm) is kind and norm.weight is not None and norm.eps is not None
            whole = known and getattr(norm, "bias", None) is None
            if not whole or norm.eps != found[0][1].eps or norm.weight.dim() != 1:
                raise _unknown(f"{name}.{part}", norm)


def _unknown(name: str, module: nn.Module) -> ConfigError:
    return ConfigError(
        f"policy.fused is on, but {name} is a {module}, and the fused kernels know only the blocks "
        "and norms of diffusers' SD3 and FLUX.1 transformers; set policy.fused to false."
    )


BLOCKS = {
    joint.JointTransformerBlock: (_check_sd3_block, _sd3_block),
    flux.FluxTransformerBlock: (_check_flux_block, _flux_block),
    flux.FluxSingleTransformerBlock: (_check_flux_block, _flux_single_block),
}
"""Class of a block -> what checks its modules, and its forward."""
