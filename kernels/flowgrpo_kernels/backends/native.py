"""Native backend: the ops of the compiled CPU library, with the signatures of reference.py.

Results are the bits of reference.py, whatever the number of threads and the instruction set:
AVX-512, AVX2 or baseline, chosen by the CPU, or by FLOWGRPO_NATIVE_ISA=baseline|avx2|avx512.
Threads are torch's (torch.set_num_threads).
Under torch.set_flush_denormal every thread does as the calling one: float16 is not concerned, and
bfloat16 and float32 subnormals are taken for 0, as the reference of one thread takes them.
How the library is found and checked is in native_library.py.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..philox import INITIAL_STEP
from ..reference import NftArguments
from ..transitions import NUM_COLUMNS
from .native_library import NativeArgs, NativeRows, NativeTensor, library, select, state

OPS = (
    "sde_step",
    "log_prob",
    "log_prob_backward",
    "log_prob_mean",
    "log_prob_mean_backward",
    "grpo_loss_forward",
    "grpo_loss_gradient",
    "grpo_loss_backward",
    "nft_loss_forward",
    "nft_loss_gradient",
    "nft_loss_backward",
    "initial_noise",
    "transition_rows",
)
"""The ops that this file has a function for, by their names."""

# The dtypes of latents in kernels/csrc/abi.h.
_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def find(op: str, device_type: str) -> tuple[Callable | None, str]:
    """(function, "") when the library runs the op on this type of device, else (None, why not)."""
    if device_type != "cpu":
        return None, f"the native library runs on cpu tensors, got {device_type}"
    if not available():
        return None, why_not()
    if op not in OPS:
        return None, f"the native library has no {op}"
    return globals()[op], ""


def status() -> tuple[bool, str]:
    """(whether the library is loaded, one line that says which, or why none is)."""
    return available(), describe()


def available() -> bool:
    """Returns whether the library is loaded and fits this package."""
    return state()[0] is not None


def why_not() -> str:
    """Says why the library is not available; an empty string when it is."""
    return state()[2]


def describe() -> str:
    """Says in one line what is loaded, or why nothing is."""
    loaded, facts, why = state()
    if loaded is None:
        return why
    threads = "OpenMP" if loaded.flowgrpo_native_openmp() else "one thread (built without OpenMP)"
    return f"{facts['library']} {facts['version']}, {facts['isa']}, {threads}, {facts['compiler']}"


def info() -> dict[str, Any]:
    """Build facts and the instruction set in use, or {"built": False, "reason": ...}."""
    loaded, facts, why = state()
    return dict(facts) if loaded is not None else {"built": False, "reason": why}


def select_isa(isa: str) -> str:
    """Switches the instruction set of this process ("auto": the best); returns the one in use."""
    chosen = select(library(), isa)
    state()[1]["isa"] = chosen
    return chosen


class _Call:
    """Argument struct of one call, and the tensors that must outlive it."""

    def __init__(self, like: Tensor) -> None:
        self.args = NativeArgs()
        self.alive: list[Tensor] = []
        self.rows = like.shape[0]
        self.args.rows = self.rows
        self.args.elements = self.elements = like.shape[1:].numel()
        self.args.threads = torch.get_num_threads()

    def latents(self, **tensors: Tensor | None) -> None:
        """Sets [B, ...] tensors to read: any row stride, copied if rows are not contiguous."""
        for name, x in tensors.items():
            if x is None:
                continue
            if x.is_contiguous():
                stride = self.elements
            else:
                x = x.reshape(self.rows, self.elements)
                x = x if x.stride(1) == 1 else x.contiguous()
                stride = x.stride(0)
            self.alive.append(x)
            # An empty tensor has no address, but it is not an absent one.
            setattr(self.args, name, NativeTensor(x.data_ptr() or 1, stride, _CODES[x.dtype]))

    def vectors(self, **tensors: Tensor | None) -> None:
        """Sets [B] tensors to read, as float32."""
        for name, x in tensors.items():
            if x is not None:
                x = x.to(torch.float32).contiguous()
                self.alive.append(x)
                setattr(self.args, name, x.data_ptr())

    def outputs(self, **tensors: Tensor) -> None:
        """Sets contiguous tensors to write."""
        for name, x in tensors.items():
            setattr(self.args, name, x.data_ptr())

    def integers(self, **tensors: Tensor | None) -> None:
        """Sets int64 [B] tensors to read."""
        for name, x in tensors.items():
            if x is not None:
                x = x.contiguous()
                self.alive.append(x)
                setattr(self.args, name, x.data_ptr())

    def guidance(self, guidance_scale: float) -> None:
        """Sets the scale of guidance."""
        self.args.guidance_scale = guidance_scale
        self.args.uncond_scale = 1.0 - guidance_scale

    def transitions(self, table: Tensor, step: Tensor, guidance_scale: float) -> None:
        """Sets the transition table, the row of each sample, and the scale of guidance."""
        table = table.contiguous()
        self.alive.append(table)
        self.args.table = table.data_ptr()
        self.args.table_rows, self.args.table_columns = table.shape
        self.integers(step=step)
        self.guidance(guidance_scale)

    def run(self, name: str, *more: int) -> None:
        """Calls the library's function of this name; `more`: arguments beside the struct."""
        function = getattr(library(), f"flowgrpo_native_{name}")
        if function(ctypes.byref(self.args), *more):
            raise MemoryError(f"{name}: no memory for the partial sums of {self.rows} rows")


def sde_step(
    velocity: Tensor,
    uncond_velocity: Tensor | None,
    guidance_scale: float,
    sample: Tensor,
    table: Tensor,
    step: Tensor,
    seeds: Tensor | None,
    noise: Tensor | None,
    prev_sample: Tensor,
    log_prob: Tensor,
    mean: Tensor | None = None,
    x0: Tensor | None = None,
) -> None:
    """Writes x' into prev_sample, its log_prob into log_prob (float32 [B]), mu and x0."""
    call = _Call(sample)
    out, score = _contiguous(prev_sample), _contiguous(log_prob)
    call.latents(velocity=velocity, uncond_velocity=uncond_velocity, sample=sample)
    call.latents(noise=noise, prev_sample=out)
    more = [(x, _contiguous(x)) for x in (mean, x0)]
    call.latents(mean=more[0][1], x0=more[1][1])
    call.transitions(table, step, guidance_scale)
    call.integers(seeds=seeds)
    call.outputs(log_prob=score)
    call.run("sde_step")
    for buffer, result in ((prev_sample, out), (log_prob, score), *more):
        if result is not buffer:
            buffer.copy_(result)


def _contiguous(buffer: Tensor | None) -> Tensor | None:
    """Returns a buffer that the library can write: itself, or one to be copied from."""
    if buffer is None or buffer.is_contiguous():
        return buffer
    return torch.empty_like(buffer, memory_format=torch.contiguous_format)


def log_prob(
    velocity: Tensor,
    uncond_velocity: Tensor | None,
    guidance_scale: float,
    sample: Tensor,
    prev_sample: Tensor,
    table: Tensor,
    step: Tensor,
) -> Tensor:
    """Computes log_prob of a stored x': float32 [B]."""
    call = _Call(sample)
    call.latents(velocity=velocity, uncond_velocity=uncond_velocity)
    call.latents(sample=sample, prev_sample=prev_sample)
    call.transitions(table, step, guidance_scale)
    result = torch.empty(call.rows, dtype=torch.float32)
    call.outputs(log_prob=result)
    call.run("log_prob")
    return result


def _gradients(
    call: _Call, velocity: Tensor, uncond: Tensor | None, uncond_grad: bool
) -> tuple[Tensor, Tensor]:
    """Allocates what a backward op writes; the second is empty unless asked for."""
    dv = torch.empty(velocity.shape, dtype=velocity.dtype)
    call.latents(grad_velocity=dv)
    if uncond is None or not uncond_grad:
        return dv, torch.empty(0, dtype=(velocity if uncond is None else uncond).dtype)
    du = torch.empty(uncond.shape, dtype=uncond.dtype)
    call.latents(grad_uncond_velocity=du)
    return dv, du


def log_prob_backward(
    grad: Tensor,
    velocity: Tensor,
    uncond_velocity: Tensor | None,
    guidance_scale: float,
    sample: Tensor,
    prev_sample: Tensor,
    table: Tensor,
    step: Tensor,
    uncond_grad: bool,
) -> tuple[Tensor, Tensor]:
    """Computes the gradients of sum(grad * log_prob), grad [B], in velocity and uncond_velocity."""
    call = _Call(sample)
    call.latents(velocity=velocity, uncond_velocity=uncond_velocity)
    call.latents(sample=sample, prev_sample=prev_sample)
    call.transitions(table, step, guidance_scale)
    call.vectors(grad=grad)
    gradients = _gradients(call, velocity, uncond_velocity, uncond_grad)
    call.run("log_prob_backward")
    return gradients


def log_prob_mean(
    velocity: Tensor,
    uncond_velocity: Tensor | None,
    guidance_scale: float,
    sample: Tensor,
    prev_sample: Tensor,
    table: Tensor,
    step: Tensor,
    with_x0: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Computes (log_prob [B], mu, x0) of a stored x', float32; x0 is empty unless asked for."""
    call = _Call(sample)
    call.latents(velocity=velocity, uncond_velocity=uncond_velocity)
    call.latents(sample=sample, prev_sample=prev_sample)
    call.transitions(table, step, guidance_scale)
    result = torch.empty(call.rows, dtype=torch.float32)
    mean = torch.empty(sample.shape, dtype=torch.float32)
    x0 = torch.empty(sample.shape if with_x0 else 0, dtype=torch.float32)
    call.latents(mean=mean, x0=x0 if with_x0 else None)
    call.outputs(log_prob=result)
    call.run("log_prob_mean")
    return result, mean, x0


def log_prob_mean_backward(
    grad: Tensor,
    grad_mean: Tensor | None,
    grad_x0: Tensor | None,
    velocity: Tensor,
    uncond_velocity: Tensor | None,
    guidance_scale: float,
    sample: Tensor,
    prev_sample: Tensor,
    table: Tensor,
    step: Tensor,
    uncond_grad: bool,
) -> tuple[Tensor, Tensor]:
    """Computes the gradients of log_prob_mean in velocity and uncond_velocity."""
    call = _Call(sample)
    call.latents(velocity=velocity, uncond_velocity=uncond_velocity)
    call.latents(sample=sample, prev_sample=prev_sample, grad_mean=grad_mean, grad_x0=grad_x0)
    call.transitions(table, step, guidance_scale)
    call.vectors(grad=grad)
    gradients = _gradients(call, velocity, uncond_velocity, uncond_grad)
    call.run("log_prob_mean_backward")
    return gradients


def _loss_outputs(call: _Call) -> tuple[Tensor, ...]:
    """Allocates the results of grpo_loss_forward."""
    loss, policy_loss, kl, clip_fraction = (torch.empty((), dtype=torch.float32) for _ in range(4))
    score = torch.empty(call.rows, dtype=torch.float32)
    ratio = torch.empty(call.rows, dtype=torch.float32)
    coefs = torch.empty((call.rows, 3), dtype=torch.float32)
    call.outputs(loss=loss, policy_loss=policy_loss, kl=kl, clip_fraction=clip_fraction)
    call.outputs(log_prob=score, ratio=ratio, coefs=coefs)
    return loss, policy_loss, kl, clip_fraction, score, ratio, coefs


def _loss_call(
    velocity: Tensor,
    uncond_velocity: Tensor | None,
    guidance_scale: float,
    sample: Tensor,
    prev_sample: Tensor,
    old_log_prob: Tensor,
    advantages: Tensor,
    table: Tensor,
    step: Tensor,
    ref_velocity: Tensor | None,
    ref_uncond_velocity: Tensor | None,
    old_velocity: Tensor | None,
    row_weight: Tensor | None,
    kl_row_weight: Tensor | None,
    kl_weight: float,
    clip_low: float,
    clip_high: float,
    adv_clip: float,
) -> _Call:
    """Sets the arguments that grpo_loss_forward and grpo_loss_gradient share."""
    call = _Call(sample)
    call.latents(velocity=velocity, uncond_velocity=uncond_velocity, sample=sample)
    call.latents(prev_sample=prev_sample, ref_velocity=ref_velocity)
    call.latents(ref_uncond_velocity=ref_uncond_velocity, old_velocity=old_velocity)
    call.vectors(old_log_prob=old_log_prob, advantages=advantages)
    call.vectors(row_weight=row_weight, kl_row_weight=kl_row_weight)
    call.transitions(table, step, guidance_scale)
    call.args.kl_weight, call.args.adv_clip = kl_weight, adv_clip
    call.args.ratio_low, call.args.ratio_high = 1.0 - clip_low, 1.0 + clip_high
    return call


def grpo_loss_forward(*args) -> tuple[Tensor, ...]:
    """Computes (loss, policy_loss, kl, clip_fraction, log_prob [B], ratio [B], coefs [B, 3])."""
    call = _loss_call(*args)
    outputs = _loss_outputs(call)
    call.run("grpo_loss_forward")
    return outputs


def grpo_loss_gradient(*args) -> tuple[Tensor, ...]:
    """Computes loss and gradients in one pass over memory, as reference.grpo_loss_gradient."""
    *args, grad_loss, uncond_grad = args
    call = _loss_call(*args)
    grad = ctypes.c_float(grad_loss)
    call.args.grad = ctypes.addressof(grad)
    outputs = _loss_outputs(call)
    gradients = _gradients(call, args[0], args[1], uncond_grad)
    call.run("grpo_loss_gradient")
    return *outputs, *gradients


def grpo_loss_backward(
    grad_loss: Tensor,
    coefs: Tensor,
    velocity: Tensor,
    uncond_velocity: Tensor | None,
    guidance_scale: float,
    sample: Tensor,
    prev_sample: Tensor,
    table: Tensor,
    step: Tensor,
    ref_velocity: Tensor | None,
    ref_uncond_velocity: Tensor | None,
    old_velocity: Tensor | None,
    uncond_grad: bool,
) -> tuple[Tensor, Tensor]:
    """Computes the gradients of grad_loss * loss in the velocities; coefs from the forward pass."""
    call = _Call(sample)
    call.latents(velocity=velocity, uncond_velocity=uncond_velocity, sample=sample)
    call.latents(prev_sample=prev_sample, ref_velocity=ref_velocity)
    call.latents(ref_uncond_velocity=ref_uncond_velocity, old_velocity=old_velocity)
    call.transitions(table, step, guidance_scale)
    call.vectors(grad=grad_loss, coefs=coefs)
    gradients = _gradients(call, velocity, uncond_velocity, uncond_grad)
    call.run("grpo_loss_backward")
    return gradients


def _nft_call(a: NftArguments) -> _Call:
    """Sets the arguments that nft_loss_forward and nft_loss_gradient share."""
    call = _Call(a.sample)
    call.latents(velocity=a.velocity, uncond_velocity=a.uncond_velocity, sample=a.sample)
    call.latents(x0=a.x0, old_velocity=a.old_velocity, ref_velocity=a.ref_velocity)
    call.latents(ref_uncond_velocity=a.ref_uncond_velocity)
    call.vectors(sigma=a.sigma, optimality=a.optimality)
    call.vectors(row_weight=a.row_weight, kl_row_weight=a.kl_row_weight)
    call.guidance(a.guidance_scale)
    call.args.beta, call.args.floor, call.args.kl_weight = a.beta, a.floor, a.kl_weight
    return call


def _nft_outputs(call: _Call) -> tuple[Tensor, ...]:
    """Allocates the results of nft_loss_forward."""
    names = ("loss", "positive_loss", "negative_loss", "kl")
    totals = {name: torch.empty((), dtype=torch.float32) for name in names}
    names = ("positive_error", "negative_error", "old_deviation")
    per_row = {name: torch.empty(call.rows, dtype=torch.float32) for name in names}
    coefs = torch.empty((call.rows, 3), dtype=torch.float32)
    call.outputs(**totals, **per_row, coefs=coefs)
    return *totals.values(), *per_row.values(), coefs


def nft_loss_forward(*args) -> tuple[Tensor, ...]:
    """Computes DiffusionNFT's loss, with the results of reference.nft_loss_forward."""
    call = _nft_call(NftArguments(*args))
    outputs = _nft_outputs(call)
    call.run("nft_loss_forward")
    return outputs


def nft_loss_gradient(*args) -> tuple[Tensor, ...]:
    """Computes loss and gradients in one pass over memory, as reference.nft_loss_gradient."""
    *args, grad_loss, uncond_grad = args
    call = _nft_call(NftArguments(*args))
    grad = ctypes.c_float(grad_loss)
    call.args.grad = ctypes.addressof(grad)
    outputs = _nft_outputs(call)
    gradients = _gradients(call, args[0], args[1], uncond_grad)
    call.run("nft_loss_gradient")
    return *outputs, *gradients


def nft_loss_backward(
    grad_loss: Tensor,
    coefs: Tensor,
    velocity: Tensor,
    uncond_velocity: Tensor | None,
    guidance_scale: float,
    sample: Tensor,
    x0: Tensor,
    old_velocity: Tensor,
    sigma: Tensor,
    ref_velocity: Tensor | None,
    ref_uncond_velocity: Tensor | None,
    beta: float,
    uncond_grad: bool,
) -> tuple[Tensor, Tensor]:
    """Computes the gradients of grad_loss * loss in the velocities; coefs from the forward pass."""
    call = _Call(sample)
    call.latents(velocity=velocity, uncond_velocity=uncond_velocity, sample=sample)
    call.latents(x0=x0, old_velocity=old_velocity, ref_velocity=ref_velocity)
    call.latents(ref_uncond_velocity=ref_uncond_velocity)
    call.vectors(sigma=sigma, grad=grad_loss, coefs=coefs)
    call.guidance(guidance_scale)
    call.args.beta = beta
    gradients = _gradients(call, velocity, uncond_velocity, uncond_grad)
    call.run("nft_loss_backward")
    return gradients


def initial_noise(seeds: Tensor, shape: list[int], dtype: torch.dtype) -> Tensor:
    """Draws standard normals [B, *shape] of the reserved step counter, rounded to dtype."""
    result = torch.empty((seeds.shape[0], *shape), dtype=dtype)
    call = _Call(result)
    call.latents(prev_sample=result)
    call.integers(seeds=seeds)
    call.run("normals", INITIAL_STEP)
    return result


def transition_rows(
    sigma: Tensor,
    sigma_next: Tensor,
    noise_level: Tensor,
    sigma_max: Tensor,
    noise_step: Tensor | None,
    rows: int,
    law: int,
    flags: int,
    near_one: float,
) -> Tensor:
    """Computes rows of a transition table: float32 [rows, 10]."""
    table = torch.empty((rows, NUM_COLUMNS), dtype=torch.float32)
    inputs = [sigma, sigma_next, noise_level, sigma_max]
    wide = 0
    for i, x in enumerate(inputs):
        if x.dtype != torch.float32:
            inputs[i] = x.to(torch.float64)
            wide |= 1 << i
    # By position: half the time of one assignment a field.
    args = NativeRows(
        rows, law, flags, wide, *(x.data_ptr() for x in inputs),
        None if noise_step is None else noise_step.data_ptr(),
        *(_row_stride(x) for x in inputs), 0 if noise_step is None else _row_stride(noise_step),
        near_one, table.data_ptr(),
    )  # fmt: skip
    library().flowgrpo_native_transition_rows(ctypes.byref(args))
    return table


def _row_stride(x: Tensor) -> int:
    """Elements between the values of two rows; 0 where one value serves all."""
    return x.stride(0) if x.ndim and x.shape[0] > 1 else 0
