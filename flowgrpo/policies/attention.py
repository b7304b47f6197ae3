"""The attention kernel: one, by name, for rollout and update alike.

Left to itself, scaled_dot_product_attention may choose one kernel without gradients and another
with them, and then the ratios of the first update are not exactly 1. `pin` names the kernel once
for the whole transformer. The names are those of diffusers' attention dispatcher, without their
leading underscore:

    native             what PyTorch chooses (its choice may depend on whether gradients are needed)
    native_flash, native_efficient, native_cudnn, native_math      one of PyTorch's kernels
    flash, flash_hub, flash_3, flash_3_hub, xformers      packages (attention_packages.py)
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
from diffusers import ModelMixin
from diffusers.models.attention_dispatch import (
    AttentionBackendName,
    _AttentionBackendRegistry,
    dispatch_attention_fn,
)
from torch import Tensor, nn

from flowgrpo.config import ConfigError
from flowgrpo.policies import attention_packages, deterministic, lora
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
            transformer's head size or in `dtype`: it is tried once, with a gradient. On a GPU that
            PyTorch is asked to be deterministic on, its gradients differ from pass to pass.
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
    if backend is not None:
        attention_packages.refuse(backend, device, dtype, head, family.masked_attention)
        if name in attention_packages.PACKAGES:
            attention_packages.replace_call(backend)
        try:
            # Checks that the package is there and fetches kernels from the Hub where asked for.
            with _without_notice():
                transformer.set_attention_backend(backend.value)
        except Exception as error:
            raise ConfigError(
                f"policy.attention is {name}, which could not be loaded ({_first_line(error)}); "
                "see to that, or choose auto."
            ) from error
    try:
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
            f"({_first_line(error)}); choose another, for example native_efficient or native_math."
        ) from error
    if device.type == "cuda" and torch.are_deterministic_algorithms_enabled():
        _check_repeats(name, backend, device, dtype, head)
    return name


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return ": ".join([type(error).__name__, *lines[:1]])


def _check_repeats(
    name: str,
    backend: AttentionBackendName | None,
    device: torch.device,
    dtype: torch.dtype,
    head: int,
) -> None:
    """Raise ConfigError if two backward passes differ, at a size whose sums have many parts."""
    draw = torch.Generator().manual_seed(0)
    shape = (2, 1024, 4, head)
    *inputs, weights = (torch.randn(shape, generator=draw).to(device, dtype) for _ in range(4))
    for tensor in inputs:
        tensor.requires_grad_()
    out = attend(*inputs, backend)
    with deterministic.deterministic_backward():
        first, second = (
            torch.autograd.grad(out, inputs, weights, retain_graph=True) for _ in range(2)
        )
    if not all(map(torch.equal, first, second)):
        raise ConfigError(
            f"policy.attention is {name}, whose gradients of equal inputs differed in two backward "
            f"passes on {device}, so that equal seeds would not give equal runs; choose auto."
        )


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
        mask = attention_packages.aligned(mask).expand(*query.shape[:3], -1)
    kernel = aten._scaled_dot_product_efficient_attention
    return kernel(query, key, value, mask, _has_backward(query, key, value))[0]


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
        mask = more.get("attn_mask")
        masked = {} if mask is None else {"mask": mask}
        others = [x for name, x in more.items() if name != "attn_mask"]
        if (
            query.shape[-1] % 8
            # Of bools in diffusers' own forwards, which may come here as well.
            or (masked and (kernel is not _efficient or mask.dtype != query.dtype))
            or any(isinstance(x, Tensor) or x for x in others)
        ):
            # What the operator cannot do by itself, and no policy here asks for.
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
