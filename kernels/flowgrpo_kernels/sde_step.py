"""One rollout step: guidance, mean, noise, next sample and its log-probability in one pass.

    v    = u + w (velocity - u)                   under guidance, else velocity
    x'   = round(A x + B v + C eps)               round: to the dtype of sample
    lp   = -k mean[(x' - A x - B v)^2] - c0       of the rounded x'; 0 where C = k = 0
    mean = A x + B v,  x0 = x - sigma v           float32, where they are asked for

velocity, uncond_velocity, sample, x': [B, ...] float32, bfloat16 or float16 in any mix; arithmetic
and log_prob are float32. Bytes moved per element: velocity (twice under guidance) + sample + x',
and 4 for each of mean and x0.
The float32 sequence and the order of the sum are in reference.py. For sampling only: no gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import checks, reference
from .autograd import check_transforms
from .backends import dispatch, triton
from .backends.triton import (
    BLOCK_C,
    CHUNKS_C,
    COL_A,
    COL_B,
    COL_C,
    COL_C0,
    COL_K,
    COL_NOISE_STEP,
    COL_SIGMA,
    LANES_C,
    PARTS_C,
    chunk_lanes,
    coefficient,
    guided,
    jit,
    load,
    narrow,
    normals,
    pair_tree,
    position,
    quarter_lanes,
    quarter_sum,
    score,
    store,
    store_moments,
    store_quarters,
    tl,
)
from .reference import BLOCK
from .transitions import Transitions

sde_step_op = dispatch.define(
    "sde_step",
    "(Tensor velocity, Tensor? uncond_velocity, float guidance_scale, Tensor sample, Tensor table, "
    "Tensor step, Tensor? seeds, Tensor? noise, Tensor(a!) prev_sample, Tensor(b!) log_prob, "
    "Tensor(c!)? mean=None, Tensor(d!)? x0=None) -> ()",
    reference.sde_step,
    fake=lambda *args: None,
)


FEW_BLOCKS = 4 * 132
"""Below it PARTS programs share a block: four for each multiprocessor of an H100 or H200. What a
program does once costs as much as a fifth of the rest of it then. The bits are the same."""


@jit
def sde_step_kernel(
    v_ptr,  # [B, D]
    u_ptr,  # [B, D] if GUIDED
    x_ptr,  # [B, D]
    noise_ptr,  # [B, D] if NOISE == "tensor"
    out_ptr,  # [B, D]
    sums_ptr,  # [B, blocks, PARTS], or log_prob [B] if SINGLE
    table_ptr,  # [R, columns]
    step_ptr,  # [B]
    seeds_ptr,  # [B] if NOISE == "seeds"
    mean_ptr,  # [B, D] if MEAN
    x0_out_ptr,  # [B, D] if X0
    scale,
    elements,
    num_steps,
    step_stride,
    num_blocks,
    ALIGN: tl.constexpr,
    GUIDED: tl.constexpr,
    NOISE: tl.constexpr,  # "none", "seeds" or "tensor"
    SINGLE: tl.constexpr,
    SPLIT: tl.constexpr,  # PARTS programs per block, and every block is full
    MEAN: tl.constexpr,
    X0: tl.constexpr,
):
    """Writes x' and sums of squares, or the row's log_prob; one program per block unless SPLIT."""
    parts: tl.constexpr = PARTS_C if SPLIT else 1
    row, part, start, base, remaining = position(parts, elements, num_blocks, ALIGN)
    step = tl.load(step_ptr + row * step_stride)
    a = coefficient(table_ptr, step, num_steps, COL_A)
    b = coefficient(table_ptr, step, num_steps, COL_B)
    c = coefficient(table_ptr, step, num_steps, COL_C)
    sigma = 0.0
    if X0:
        sigma = coefficient(table_ptr, step, num_steps, COL_SIGMA)
    if NOISE == "seeds":
        seed = tl.load(seeds_ptr + row)
        noise_step = coefficient(table_ptr, step, num_steps, COL_NOISE_STEP)
        noise_step = noise_step.to(tl.int32).to(tl.uint32)

    # Four a thread, as normals makes and float32 stores them: else a 16-bit velocity would be
    # loaded eight a thread, and each chunk change its layout behind barriers.
    four: tl.constexpr = (out_ptr.dtype.element_ty == tl.float32) or MEAN or X0
    b_sum = tl.zeros([LANES_C], dtype=tl.float32)
    for chunk in range(1 if SPLIT else CHUNKS_C):
        if SPLIT:
            o_lane, o_quad, end = quarter_lanes(part, 1, four), quarter_lanes(part, 4), BLOCK_C
        else:
            o_lane, o_quad, end = chunk_lanes(chunk, 1, four), chunk_lanes(chunk, 4), remaining
        b_v = guided(v_ptr, u_ptr, base, o_lane, end, scale, ALIGN, GUIDED)
        b_from = load(x_ptr + base, o_lane, end, ALIGN)
        if NOISE == "tensor":
            b_noise = load(noise_ptr + base, o_lane, end, ALIGN)
        b_mu = a * b_from + b * b_v
        store_moments(
            mean_ptr, x0_out_ptr, base, o_lane, end, b_v, b_from, b_mu, sigma, ALIGN, MEAN, X0
        )
        if NOISE == "seeds":
            b_x = b_mu + c * normals(start, o_quad, seed, noise_step)
        elif NOISE == "tensor":
            # A quiet row takes nothing from noise, which may be infinite or NaN there.
            b_x = b_mu + tl.where(c == 0.0, 0.0, c * b_noise)
        else:
            b_x = b_mu
        b_out = narrow(b_x, out_ptr.dtype.element_ty)
        store(out_ptr + base, o_lane, end, b_out, ALIGN)
        b_d = b_out.to(tl.float32) - b_mu
        # Beyond the row's end x' is noise; its square must not enter the sum.
        b_sum += tl.where(o_lane < end, b_d * b_d, 0.0)
    if SINGLE:
        total = pair_tree(b_sum, LANES_C)
        k = coefficient(table_ptr, step, num_steps, COL_K)
        c0 = coefficient(table_ptr, step, num_steps, COL_C0)
        tl.store(sums_ptr + row, score(total, elements, k, c0, c))
    elif SPLIT:
        tl.store(sums_ptr + tl.program_id(0), quarter_sum(b_sum))
    else:
        store_quarters(sums_ptr + tl.program_id(0).to(tl.int64) * PARTS_C, b_sum)


@triton.launcher("sde_step")
def _launch(
    launch, velocity, uncond, scale, sample, table, step, seeds, noise, prev_sample, log_prob,
    mean=None, x0=None,
):  # fmt: skip
    """One launch, and a second one for rows of more than one block."""
    rows, elements = sample.shape[0], sample.shape[1:].numel()
    if rows == 0:
        return
    source = "none"
    if noise is not None:
        source = "tensor"
    elif seeds is not None:
        source = "seeds"
    blocks = triton.num_blocks(elements)
    sums = log_prob if blocks == 1 else triton.partial_sums(log_prob, rows, blocks)
    split = blocks > 1 and rows * blocks < FEW_BLOCKS and elements % BLOCK == 0
    sizes = (elements, table.shape[0], step.stride(0), blocks)
    with triton.on(sample.device):
        launch(
            sde_step_kernel, rows * blocks * (triton.PARTS if split else 1),
            (velocity, uncond, sample, noise, prev_sample, sums, table, step, seeds, mean, x0),
            (scale, *sizes),
            ALIGN=triton.alignment(rows, elements),
            GUIDED=uncond is not None,
            NOISE=source,
            SINGLE=blocks == 1,
            SPLIT=split,
            MEAN=mean is not None,
            X0=x0 is not None,
            **triton.LAUNCH,
        )  # fmt: skip
        if blocks > 1:
            launch(
                triton.finish_kernel, rows, (sums, log_prob, table, step), sizes,
                **triton.second_pass(blocks),
            )  # fmt: skip


def sde_step(
    velocity: Tensor,
    sample: Tensor,
    transitions: Transitions,
    step: int | Tensor,
    *,
    seeds: Tensor | None = None,
    noise: Tensor | None = None,
    uncond_velocity: Tensor | None = None,
    guidance_scale: float = 1.0,
    out: Tensor | None = None,
    log_prob_out: Tensor | None = None,
    mean_out: Tensor | None = None,
    x0_out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Steps to (prev_sample, log_prob): [B, ...] in the dtype of sample, float32 [B].

    Args:
        velocity, uncond_velocity, sample: [B, ...], one shape and device, any mix of float dtypes.
        transitions: table on the same device.
        step: row of the table: int, 0-dim or [B] int64. Tensors keep torch.compile from
            recompiling.
        seeds: int64 [B], the key of each sample's noise. Or noise: [B, ...] standard normals.
            Neither is needed when every row of the table is an ODE step.
        out, log_prob_out: contiguous buffers to write into, for example rows of a trajectory.
        mean_out, x0_out: contiguous buffers [B, ...] of the dtype of log_prob, for the mean and for
            the result that the velocity points to, sample - sigma v. Written in the same pass.

    Raises TypeError or ValueError naming the argument; RuntimeError when a gradient is asked for.
    """
    checks.check_latents(
        sample, velocity=velocity, uncond_velocity=uncond_velocity, noise=noise, out=out,
        mean_out=mean_out, x0_out=x0_out,
    )  # fmt: skip
    scale = checks.guidance(uncond_velocity, guidance_scale)
    checks.check_transitions(transitions, sample)
    rows = checks.resolve_step(step, transitions, sample)
    if seeds is not None and noise is not None:
        raise ValueError("seeds and noise were both given; give one of them")
    if seeds is not None:
        checks.check_seeds(seeds, sample)
    elif noise is None and not transitions.deterministic:
        raise ValueError("seeds or noise must be given: the transitions are stochastic")
    inputs = {
        "velocity": velocity, "uncond_velocity": uncond_velocity, "sample": sample, "noise": noise,
        "seeds": seeds, "step": rows, "transitions": transitions.table,
    }  # fmt: skip
    moments = {"mean_out": mean_out, "x0_out": x0_out}
    out, log_prob_out = _outputs(sample, out, log_prob_out, moments, inputs)
    _no_gradient(
        velocity=velocity, uncond_velocity=uncond_velocity, sample=sample, noise=noise,
        out=out, log_prob_out=log_prob_out, **moments,
    )  # fmt: skip
    sde_step_op(
        velocity,
        uncond_velocity,
        scale,
        sample,
        transitions.table,
        rows,
        seeds,
        noise,
        out,
        log_prob_out,
        mean_out,
        x0_out,
    )
    return out, log_prob_out


def _outputs(
    sample: Tensor,
    out: Tensor | None,
    log_prob: Tensor | None,
    moments: dict[str, Tensor | None],
    inputs: dict[str, Tensor | None],
) -> tuple[Tensor, Tensor]:
    """Checks the buffers to write into; allocates the first two where they are not given."""
    buffers = {"out": out, "log_prob_out": log_prob, **moments}
    dtype = reference.compute_dtype(sample)
    for name, buffer in moments.items():
        if buffer is not None and (buffer.dtype != dtype or not buffer.is_contiguous()):
            raise ValueError(f"{name} must be contiguous and {dtype}, got {buffer.dtype}")
    if out is None:
        out = torch.empty(sample.shape, dtype=sample.dtype, device=sample.device)
    elif out.dtype != sample.dtype or not out.is_contiguous():
        raise ValueError(f"out must be contiguous and {sample.dtype} like sample, got {out.dtype}")
    if log_prob is None:
        log_prob = torch.empty(sample.shape[0], dtype=dtype, device=sample.device)
    else:
        checks.check_rows("log_prob_out", log_prob, sample)
        if log_prob.dtype != dtype or not log_prob.is_contiguous():
            raise ValueError(f"log_prob_out must be contiguous and {dtype}, got {log_prob.dtype}")
    buffers = {name: buffer for name, buffer in buffers.items() if buffer is not None}
    if buffers and not torch.compiler.is_compiling():
        _check_overlap(buffers, inputs)
    return out, log_prob


def _check_overlap(buffers: dict[str, Tensor], inputs: dict[str, Tensor | None]) -> None:
    """Checks that nothing is written where something is read, or written twice.

    Backends read a contiguous input block by block while they write. One that is not contiguous
    they copy first, so a buffer may lie between its rows.
    """
    spans = {name: _span(x) for name, x in (inputs | buffers).items() if x is not None}
    for buffer in buffers:
        start, end = spans[buffer]
        for name, (first, last) in spans.items():
            # True of few, so it is asked first: these checks are a visible share of a call's time.
            if first >= end or start >= last or name == buffer:
                continue
            if name in buffers or start == first or inputs[name].is_contiguous():
                raise ValueError(f"{buffer} must not be the memory of {name}, nor overlap it")


def _span(x: Tensor) -> tuple[int, int]:
    """Addresses of the first byte of x and of the one behind its last; 0 and 0 without memory."""
    try:
        start = x.data_ptr()
    # In a tracer or under a transform a tensor has no address.
    except RuntimeError:
        return 0, 0
    count = x.numel()
    if start == 0 or count == 0:
        return 0, 0
    if not x.is_contiguous():
        steps = zip(x.shape, x.stride(), strict=True)
        count = 1 + sum((size - 1) * stride for size, stride in steps)
    return start, start + count * x.element_size()


def _no_gradient(**tensors: Tensor | None) -> None:
    """Checks that no gradient is asked for."""
    check_transforms("sde_step", *tensors.values())
    if not torch.is_grad_enabled():
        return
    for name, value in tensors.items():
        if value is not None and value.requires_grad:
            raise RuntimeError(
                f"sde_step has no gradient but {name} requires one: call it under "
                "torch.no_grad() and use log_prob or grpo_loss for the differentiable score"
            )
