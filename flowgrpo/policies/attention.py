"""Which kernel computes attention: one, by name, for rollout and update alike.

Left to itself, scaled_dot_product_attention may choose one kernel without gradients and another
with them, and then the ratios of the first update are not exactly 1. `pin` names the kernel once
for the whole transformer. The names are those of diffusers' attention dispatcher, without their
leading underscore:

    native             what PyTorch chooses (its choice may depend on whether gradients are needed)
    native_flash, native_efficient, native_cudnn, native_math      one of PyTorch's kernels
    flash, flash_3, flash_3_hub, xformers, ...                     packages, if they are installed
    plain              softmax(q k^T) v in three calls, for small problems on a CPU
    auto               native_flash on CUDA in 16 bits, native_efficient there in 32, plain on a CPU
                       in 16 bits (native_math for models other than SD3), native otherwise

SD3's own processor calls PyTorch directly and ignores diffusers' `set_attention_backend`, so SD3
models get `JointAttention` first.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from diffusers import ModelMixin
from diffusers.models.attention_dispatch import (
    AttentionBackendName,
    _AttentionBackendRegistry,
    dispatch_attention_fn,
)
from diffusers.models.attention_processor import Attention, JointAttnProcessor2_0
from torch import Tensor, nn

from flowgrpo.config import ConfigError
from flowgrpo.policies import deterministic, lora

# Names of the layers that get the tokens of the image, and of the text.
OWN, ADDED = ("to_q", "to_k", "to_v"), ("add_q_proj", "add_k_proj", "add_v_proj")
PLAIN = "plain"
aten = torch.ops.aten


def pin(transformer: nn.Module, name: str, device: torch.device, dtype: torch.dtype) -> str:
    """Make every attention layer of `transformer` use the kernel `name`; returns what "auto" chose.

    Raises ConfigError for a kernel that is unknown, not installed, or that cannot run on the
    device, at the transformer's head size or in `dtype`: it is tried once, with a gradient.
    """
    joint = _sd3_layers(transformer)
    if name == "auto":
        name = _choose(device, dtype, bool(joint))
    if name == PLAIN and not joint:
        raise ConfigError(
            "policy.attention is plain, but only SD3's layers can use it; choose native_math."
        )
    for layer in joint:
        layer.set_processor(JointAttention())
        lora.share_input(layer, OWN, ADDED)
    backend = None if name == PLAIN else _backend(name)
    if backend in KERNELS:
        _leave_switches_alone(backend)
    head = transformer.config.attention_head_dim
    try:
        if backend is not None:
            # Checks that the package is there and fetches kernels from the Hub where asked for.
            with _without_notice():
                transformer.set_attention_backend(backend.value)
        # Once, forward and backward, so that what cannot run, or in an update's backward may not,
        # says so before the first image.
        parts = [torch.zeros(1, 16, 1, head, device=device, dtype=dtype).requires_grad_()] * 3
        out = attend(*parts, backend).sum()
        with deterministic.deterministic_backward():
            out.backward()
    except Exception as error:
        raise ConfigError(
            f"policy.attention {name} cannot compute heads of {head} in {dtype} on {device} "
            f"({type(error).__name__}: {str(error).strip().splitlines()[0]}); install what it "
            "needs, or choose another, for example native_efficient or native_math."
        ) from error
    return name


@contextmanager
def _without_notice() -> Iterator[None]:
    """Hold back diffusers' warning that its attention backends are experimental, and only that.

    It comes with every backend that is set, so with each policy on a GPU and each in float32, and
    says nothing that a user of ours could act on.
    """
    logger = logging.getLogger(ModelMixin.__module__)

    def other(record: logging.LogRecord) -> bool:
        return "experimental feature" not in record.getMessage()

    logger.addFilter(other)
    try:
        yield
    finally:
        logger.removeFilter(other)


def attend(
    query: Tensor, key: Tensor, value: Tensor, backend: AttentionBackendName | None
) -> Tensor:
    """softmax(q k^T / sqrt(D)) v of tensors [B, S, H, D]; `backend` None is `plain`."""
    if backend is not None:
        return dispatch_attention_fn(query, key, value, backend=backend)
    batch, length, heads, dim = query.shape
    q, k, v = (x.transpose(1, 2).reshape(batch * heads, -1, dim) for x in (query, key, value))
    scores = torch.baddbmm(q.new_empty(()), q, k.transpose(1, 2), beta=0, alpha=dim**-0.5)
    out = torch.bmm(scores.softmax(-1), v)
    return out.view(batch, heads, length, dim).transpose(1, 2)


def _flash(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    if query.device.type == "cpu":
        return aten._scaled_dot_product_flash_attention_for_cpu(query, key, value)[0]
    return aten._scaled_dot_product_flash_attention(query, key, value)[0]


def _efficient(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    kernel = aten._scaled_dot_product_efficient_attention
    return kernel(query, key, value, None, _has_backward(query, key, value))[0]


def _cudnn(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    query, key, value = (x.contiguous() for x in (query, key, value))
    kernel = aten._scaled_dot_product_cudnn_attention
    return kernel(query, key, value, None, _has_backward(query, key, value))[0]


def _has_backward(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)


KERNELS = {
    AttentionBackendName._NATIVE_FLASH: _flash,
    AttentionBackendName._NATIVE_EFFICIENT: _efficient,
    AttentionBackendName._NATIVE_CUDNN: _cudnn,
}
"""PyTorch's kernels [B, H, S, D], by the operators that scaled_dot_product_attention calls."""


def _leave_switches_alone(backend: AttentionBackendName) -> None:
    """Let diffusers call the operator of a kernel by its name.

    Its own function names it by turning all others off meanwhile, with switches of the whole
    process: a reward that attends in the thread beside (scoring.py), in float32 or with a mask,
    would find no kernel at all.
    """
    own, kernel = _AttentionBackendRegistry._backends[backend], KERNELS[backend]
    if getattr(own, "_of_flowgrpo", False):
        return

    def call(query: Tensor, key: Tensor, value: Tensor, **more: object) -> Tensor:
        if query.shape[-1] % 8 or any(isinstance(x, Tensor) or x for x in more.values()):
            # What the operator cannot do by itself, and no transformer here asks for.
            return own(query, key, value, **more)
        return kernel(*(x.permute(0, 2, 1, 3) for x in (query, key, value))).permute(0, 2, 1, 3)

    call._of_flowgrpo = True
    _AttentionBackendRegistry._backends[backend] = call


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
        split = lambda x: x.unflatten(-1, (attn.heads, -1))  # noqa: E731  [B, S, H, D]
        norm = lambda layer, x: x if layer is None else layer(x)  # noqa: E731
        query, key, value = map(split, projections(attn, OWN, hidden_states))
        query, key = norm(attn.norm_q, query), norm(attn.norm_k, key)
        if encoder_hidden_states is None:
            out = attend(query, key, value, self._attention_backend).flatten(2)
            return attn.to_out[1](attn.to_out[0](out))
        made = projections(attn, ADDED, encoder_hidden_states)
        text_query, text_key, text_value = map(split, made)
        text_query = norm(attn.norm_added_q, text_query)
        text_key = norm(attn.norm_added_k, text_key)
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


def projections(attn: nn.Module, names: tuple[str, ...], x: Tensor) -> list[Tensor]:
    """Query, key and value of the tokens x [B, N, C], by the layers of these names: [B, N, H D]."""
    return lora.joint_projection([getattr(attn, name) for name in names], x)


def _sd3_layers(transformer: nn.Module) -> list[Attention]:
    kinds = (JointAttnProcessor2_0, JointAttention)
    layers = (m for m in transformer.modules() if isinstance(m, Attention))
    return [layer for layer in layers if isinstance(layer.processor, kinds)]


def _choose(device: torch.device, dtype: torch.dtype, joint: bool) -> str:
    if device.type == "cuda":
        return "native_efficient" if dtype == torch.float32 else "native_flash"
    if device.type == "cpu" and dtype != torch.float32:
        # The backward pass of the CPU's flash kernel takes ten times its forward in 16 bits
        # (32 against 7 ms at 192 x 45 x 32, one thread).
        return PLAIN if joint else "native_math"
    return "native"


def _backend(name: str) -> AttentionBackendName:
    """diffusers' member for `name`."""
    names = {member.value.lstrip("_"): member for member in AttentionBackendName}
    if name not in names:
        raise ConfigError(
            f"policy.attention is {name!r}, but one of auto, {PLAIN}, {', '.join(sorted(names))} "
            "is expected; choose one."
        )
    return names[name]
