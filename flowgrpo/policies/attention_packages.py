"""Attention kernels of other packages: flash-attn, xformers, and those of Hugging Face's kernels.

diffusers calls them as inference needs them. Here they are called as training does, under the names
of diffusers' dispatcher (`replace_call`):

- flash-attn 2 and 3 add gradients up by atomics unless they are told not to, which diffusers does
  not pass on. `deterministic` is what PyTorch is set to, and in a run on a GPU that is True.
- diffusers' own call of an installed flash-attn 3 has no gradients at all.
- xformers chooses among its operators by whether gradients are needed and by its version. Named are
  those of CUTLASS, forward and backward: the ones that add up in one order where PyTorch asks for
  that (deterministic.py), and that take masks and float32.

`refuse` says in a sentence what a kernel cannot do, before anything is loaded.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.models import attention_dispatch
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry
from torch import Tensor

from flowgrpo.config import ConfigError

HALVES = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Package:
    """Needs of a kernel, by its package's own checks."""

    distribution: str
    """Name at the package index; empty: flash-attn 3, which is to be had as source alone."""
    install: str
    dtypes: tuple[torch.dtype, ...] = HALVES
    capability: tuple[int, int] = (8, 0)
    """Oldest compute capability of an NVIDIA GPU."""
    largest_head: int = 256
    largest_repeatable_head: int = 256
    """Largest head whose gradients can be added up in one order."""
    head_step: int = 1
    masks: bool = False


FLASH = Package("flash-attn", "pip install --no-build-isolation 'flowgrpo[flash]'")
"""flash-attn 2: csrc/flash_attn/flash_api.cpp. It pads heads to a multiple of eight."""
FLASH_3 = Package(
    "",
    "build the folder hopper of flash-attention's sources, or choose flash_3_hub",
    largest_repeatable_head=192,
    head_step=8,
)
"""flash-attn 3: hopper/flash_api.cpp, which refuses deterministic gradients of heads of 256."""
HUB = "pip install 'flowgrpo[hub]'"
XFORMERS = Package(
    "xformers",
    "pip install 'flowgrpo[xformers]'",
    dtypes=(torch.float32, *HALVES),
    capability=(5, 0),
    largest_head=65536,
    largest_repeatable_head=65536,
    masks=True,
)
"""xformers: ops/fmha/cutlass.py."""
PACKAGES = {
    "flash": FLASH,
    "flash_hub": Package("kernels", HUB),
    "flash_3": FLASH_3,
    "flash_3_hub": Package("kernels", HUB, largest_repeatable_head=192, head_step=8),
    "xformers": XFORMERS,
}
"""By the names of policy.attention."""
NOT_REPEATABLE = {
    *("aiter_fa2_hub", "flash_4_hub", "flash_varlen", "flash_varlen_hub"),
    *("flash_varlen_3", "flash_3_varlen_hub"),
}
"""Kernels that diffusers calls without asking for one order of sums, and nothing here calls."""


def name_of(backend: AttentionBackendName) -> str:
    """The name of a kernel in policy.attention."""
    return backend.value.lstrip("_")


def refuse(
    backend: AttentionBackendName,
    device: torch.device,
    dtype: torch.dtype,
    head: int,
    masked: bool,
) -> None:
    """Raise ConfigError where the kernel cannot do what the run needs of it.

    head: numbers of a head; masked: attention leaves padding out by a mask.
    """
    if obstacle := _obstacle(backend, device, dtype, head, masked):
        what, advice = obstacle
        raise ConfigError(f"policy.attention is {name_of(backend)}, but {what}; {advice}.")


def _obstacle(
    backend: AttentionBackendName,
    device: torch.device,
    dtype: torch.dtype,
    head: int,
    masked: bool,
) -> tuple[str, str] | None:
    """Why a kernel cannot be used, and what to do; None if nothing is known against it."""
    name = name_of(backend)
    repeatable = torch.are_deterministic_algorithms_enabled()
    other = "choose auto"
    if name.startswith("sage"):
        return "it has no backward pass", other
    if name in NOT_REPEATABLE and repeatable:
        return (
            "diffusers cannot ask it to sum gradients in one order, and equal seeds might not give "
            "equal runs",
            other,
        )
    if name not in PACKAGES:
        return None
    package = PACKAGES[name]
    if masked and not package.masks:
        return "it takes no mask, and the model masks the padding of its texts", other
    if missing := _missing(backend, package):
        return missing, package.install
    if device.type != "cuda":
        return f"it runs on a GPU, and the device is {device}", other
    if dtype not in package.dtypes:
        kinds = " or ".join(str(kind).removeprefix("torch.") for kind in package.dtypes)
        chosen = str(dtype).removeprefix("torch.")
        return f"it computes in {kinds}, and policy.dtype is {chosen}", other
    largest = package.largest_repeatable_head if repeatable else package.largest_head
    if head > largest or head % package.head_step:
        steps = f", in steps of {package.head_step}" if package.head_step > 1 else ""
        scope = " where gradients have to repeat" if largest < package.largest_head else ""
        return (
            f"it takes heads of up to {largest}{steps}{scope}, and the model's have {head}",
            other,
        )
    if torch.version.hip is not None:
        return None
    have, newest = torch.cuda.get_device_capability(device), None
    if name == "xformers":
        operator = attention_dispatch.xops.MemoryEfficientAttentionCutlassOp[0]
        newest = operator.CUDA_MAXIMUM_COMPUTE_CAPABILITY
    if have < package.capability or (newest and have > newest):
        upper = f" to {newest[0]}.{newest[1]}" if newest else " or more"
        needed = f"{package.capability[0]}.{package.capability[1]}{upper}"
        return f"it needs compute capability {needed}, and {device} has {have[0]}.{have[1]}", other
    return None


def _missing(backend: AttentionBackendName, package: Package) -> str:
    """What diffusers lacks for a kernel; empty: nothing."""
    try:
        attention_dispatch._check_attention_backend_requirements(backend)
    except RuntimeError as error:
        if not package.distribution:
            return "diffusers finds no flash_attn_interface that it can import"
        release = version(package.distribution)
        if release is None:
            return f"{package.distribution} is not installed"
        reason = str(error).strip().rstrip(".")
        return f"diffusers cannot use {package.distribution} {release} ({reason})"
    return ""


def version(distribution: str) -> str | None:
    """Read the installed version of a package; None: it is not installed."""
    try:
        return importlib.metadata.version(distribution) if distribution else None
    except importlib.metadata.PackageNotFoundError:
        return None


def states(device: torch.device) -> dict[str, str]:
    """Describe each package: its version, and whether policy.attention can choose its kernels on
    `device`, or why not."""
    lines: dict[str, str] = {}
    for backend in AttentionBackendName:
        name = name_of(backend)
        if name not in PACKAGES:
            continue
        package = PACKAGES[name]
        title = package.distribution or "flash-attn 3"
        obstacle = _obstacle(backend, device, package.dtypes[-1], 64, masked=False)
        text = f"policy.attention {name}: "
        text += f"off, {obstacle[0]}" if obstacle else "can be chosen"
        if obstacle and obstacle[1] == package.install:
            text += f"; {package.install}"
        before = lines.get(title) or version(title.replace(" ", "-")) or "absent"
        lines[title] = f"{before}; {text}"
    return lines


def replace_call(backend: AttentionBackendName) -> None:
    """Let diffusers' dispatcher call a kernel of `PACKAGES` as training needs it."""
    by_diffusers = _AttentionBackendRegistry._backends[backend]
    if not getattr(by_diffusers, "_flowgrpo", False):
        call = _xformers() if name_of(backend) == "xformers" else _flash(backend)
        call._flowgrpo = True
        _AttentionBackendRegistry._backends[backend] = call


def _flash(backend: AttentionBackendName) -> Callable[..., Tensor]:
    def call(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        **more: Any,
    ) -> Tensor:
        _only_known(backend, more, attn_mask=attn_mask is not None, dropout_p=dropout_p)
        out = _function(backend)(
            query,
            key,
            value,
            softmax_scale=scale,
            causal=is_causal,
            deterministic=torch.are_deterministic_algorithms_enabled(),
        )
        # Some builds of flash-attn 3 return the logarithms of the sums too.
        return out[0] if isinstance(out, tuple) else out

    return call


def _function(backend: AttentionBackendName) -> Callable[..., Any]:
    """The package's function, where diffusers keeps it: those of the Hub come when one is set."""
    name = name_of(backend)
    if name == "flash":
        return attention_dispatch.flash_attn_func
    if name == "flash_3":
        return attention_dispatch.flash_attn_3_func
    return attention_dispatch._HUB_KERNELS_REGISTRY[backend].kernel_fn


def _xformers() -> Callable[..., Tensor]:
    def call(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        **more: Any,
    ) -> Tensor:
        odd = attn_mask is not None and (attn_mask.ndim != 4 or attn_mask.dtype != query.dtype)
        asked = {"attn_mask": odd, "dropout_p": dropout_p, "is_causal": is_causal}
        _only_known(AttentionBackendName.XFORMERS, more, **asked)
        if attn_mask is not None:
            batch, length, heads, _ = query.shape
            attn_mask = aligned(attn_mask).expand(batch, heads, length, -1)
        operators = attention_dispatch.xops
        return operators.memory_efficient_attention(
            query,
            key,
            value,
            attn_mask,
            scale=scale,
            op=operators.MemoryEfficientAttentionCutlassOp,
        )

    return call


def aligned(mask: Tensor) -> Tensor:
    """Copy the mask [..., S] so that its rows begin at addresses that CUTLASS can read from: a
    multiple of 16 numbers apart, as scaled_dot_product_attention makes it."""
    length = mask.shape[-1]
    return torch.nn.functional.pad(mask, (0, -length % 16))[..., :length]


def _only_known(backend: AttentionBackendName, more: dict[str, Any], **asked: Any) -> None:
    """Refuse what no transformer here asks for: diffusers' own call would do it, but with gradients
    whose order of sums is any."""
    unknown = [name for name, value in (more | asked).items() if value]
    if unknown:
        raise NotImplementedError(
            f"policy.attention is {name_of(backend)}, but the model calls it with "
            f"{', '.join(unknown)}, for which there is no call here; choose auto."
        )
