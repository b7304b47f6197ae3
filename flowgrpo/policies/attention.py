"""The attention kernel: one, by name, for rollout and update alike.

Left to itself, scaled_dot_product_attention may choose one kernel without gradients and another
with them, and then the ratios of the first update are not exactly 1. `pin` names the kernel once
for the whole transformer. The names are those of diffusers' attention dispatcher, without their
leading underscore:

    native             what PyTorch chooses (its choice may depend on whether gradients are needed)
    native_flash, native_efficient, native_cudnn, native_math      one of PyTorch's kernels
    flash, flash_3, flash_3_hub, xformers, ...                     packages, if they are installed
    plain              softmax(q k^T) v in three calls, for small problems on a CPU
    auto               native_flash on CUDA in 16 bits, native_efficient there in 32 and for models
                       that mask padding, plain on a CPU in 16 bits (native_math for families
                       without `plain`), native otherwise

A processor of diffusers that calls PyTorch directly ignores `set_attention_backend`; a family with
such layers gives them another one (`Family.attention_processors`).
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from diffusers import ModelMixin
from diffusers.models.attention_dispatch import (
    AttentionBackendName,
    _AttentionBackendRegistry,
    dispatch_attention_fn,
)
from torch import Tensor, nn

from flowgrpo.config import ConfigError
from flowgrpo.policies import deterministic, lora
from flowgrpo.policies.family import Family, import_hook

# Names of the layers that make query, key and value of the tokens of the image, and of the text.
IMAGE_LAYERS = ("to_q", "to_k", "to_v")
TEXT_LAYERS = ("add_q_proj", "add_k_proj", "add_v_proj")
PLAIN = "plain"
FIXED = "the model's only"
"""Name of the kernel where a family's attention is a call of its own."""
aten = torch.ops.aten


def pin(
    transformer: nn.Module, family: Family, name: str, device: torch.device, dtype: torch.dtype
) -> str:
    """Make each attention layer of `transformer` use the kernel `name`; returns what "auto" chose.

    Raises:
        ConfigError: the kernel is unknown, not installed, or cannot run on the device, at the
            transformer's head size or in `dtype`: it is tried once, with a gradient.
    """
    if family.fixed_attention:
        if name != "auto":
            raise ConfigError(
                f"policy.attention is {name}, but the attention of {type(transformer).__name__} is "
                "a call of its own; set policy.attention to auto."
            )
        return FIXED
    layers = []
    if family.attention_processors:
        layers = import_hook(family.attention_processors)(transformer)
    if name == "auto":
        name = _choose(device, dtype, plain=bool(layers), masked=family.masked_attention)
    if name == PLAIN and not layers:
        raise ConfigError(
            f"policy.attention is plain, but the layers of {type(transformer).__name__} cannot use "
            "it; choose native_math."
        )
    backend = None if name == PLAIN else _backend(name)
    if backend in KERNELS:
        _leave_switches_alone(backend)
    _, head = family.widths_of(transformer)
    try:
        if backend is not None:
            # Checks that the package is there and fetches kernels from the Hub where asked for.
            with _without_notice():
                transformer.set_attention_backend(backend.value)
        # Once, forward and backward, so that what cannot run, or in an update's backward may not,
        # says so before the first image.
        inputs = [torch.zeros(1, 16, 1, head, device=device, dtype=dtype).requires_grad_()] * 3
        mask = inputs[0].new_zeros(1, 1, 1, 16) if family.masked_attention else None
        out = attend(*inputs, backend, mask).sum()
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
    query: Tensor,
    key: Tensor,
    value: Tensor,
    backend: AttentionBackendName | None,
    mask: Tensor | None = None,
) -> Tensor:
    """softmax(q k^T / sqrt(D) + mask) v of tensors [B, S, H, D]; `backend` None is `plain`.

    mask: [B, 1, 1, S] of the same type, 0 for tokens that are attended to and -inf for others.
    """
    if backend is not None:
        masked = {} if mask is None else {"attn_mask": mask}
        return dispatch_attention_fn(query, key, value, backend=backend, **masked)
    batch, length, heads, dim = query.shape
    q, k, v = (x.transpose(1, 2).reshape(batch * heads, -1, dim) for x in (query, key, value))
    scores = torch.baddbmm(q.new_empty(()), q, k.transpose(1, 2), beta=0, alpha=dim**-0.5)
    if mask is not None:
        scores = (scores.view(batch, heads, length, length) + mask).flatten(0, 1)
    out = torch.bmm(scores.softmax(-1), v)
    return out.view(batch, heads, length, dim).transpose(1, 2)


def _flash(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    if query.device.type == "cpu":
        return aten._scaled_dot_product_flash_attention_for_cpu(query, key, value)[0]
    return aten._scaled_dot_product_flash_attention(query, key, value)[0]


def _efficient(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
    if mask is not None:
        mask = _aligned(mask).expand(*query.shape[:3], -1)
    kernel = aten._scaled_dot_product_efficient_attention
    return kernel(query, key, value, mask, _has_backward(query, key, value))[0]


def _aligned(mask: Tensor) -> Tensor:
    """A copy of the mask whose rows begin at addresses that the kernel can read from, as
    scaled_dot_product_attention makes it: a multiple of 16 numbers apart."""
    length = mask.shape[-1]
    return F.pad(mask, (0, -length % 16))[..., :length]


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
    process: a reward that attends in the thread beside (rewards/background.py), in float32 or with
    a mask, would find no kernel at all.
    """
    by_switches, kernel = _AttentionBackendRegistry._backends[backend], KERNELS[backend]
    if getattr(by_switches, "_flowgrpo", False):
        return

    def call(query: Tensor, key: Tensor, value: Tensor, **more: object) -> Tensor:
        masked = {"mask": more["attn_mask"]} if more.get("attn_mask") is not None else {}
        others = [x for name, x in more.items() if name != "attn_mask"]
        if (
            query.shape[-1] % 8
            or (masked and kernel is not _efficient)
            or any(isinstance(x, Tensor) or x for x in others)
        ):
            # What the operator cannot do by itself, and no transformer here asks for.
            return by_switches(query, key, value, **more)
        heads_first = (x.permute(0, 2, 1, 3) for x in (query, key, value))
        return kernel(*heads_first, **masked).permute(0, 2, 1, 3)

    call._flowgrpo = True
    _AttentionBackendRegistry._backends[backend] = call


def projections(attn: nn.Module, names: tuple[str, ...], x: Tensor) -> list[Tensor]:
    """Query, key and value of the tokens x [B, N, C], by the layers of these names: [B, N, H D]."""
    return lora.joint_projection([getattr(attn, name) for name in names], x)


def _choose(device: torch.device, dtype: torch.dtype, plain: bool, masked: bool) -> str:
    if device.type == "cuda":
        return "native_efficient" if masked or dtype == torch.float32 else "native_flash"
    if device.type == "cpu" and dtype != torch.float32:
        # The backward pass of the CPU's flash kernel takes ten times its forward in 16 bits
        # (32 against 7 ms at 192 x 45 x 32, one thread).
        return PLAIN if plain else "native_math"
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
