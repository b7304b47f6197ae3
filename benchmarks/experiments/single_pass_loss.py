"""Experiment: loss and gradient in one pass over the latents, beside the two passes of grpo_loss.

    python benchmarks single-pass-loss [--out FILE]   # GPU: time both, write a record
    python benchmarks single-pass-loss --compile      # no GPU: registers of the kernel on sm_90
    TRITON_INTERPRET=1 python benchmarks single-pass-loss --check     # no GPU: same bits

A program loads its block once, keeps x' - mu (and v - v_ref) in registers, posts its partial sums,
and waits until every block of its row has posted. Then it adds the row's partials in the fixed
order, computes the row's scalars as every other program of the row does, and writes the gradient
from its registers. Each latent is read once instead of twice:

    two passes    forward v + x + x', backward v + x + x' + dv
    one pass      v + x + x' + dv

What it costs, by construction:
1. The upstream gradient must be known in the forward pass (`loss_scale`). Autograd cannot promise
   that; scaling a stored 16-bit gradient afterwards would round it twice and move 2 dv more.
2. Waiting programs must all fit on the device at once. Logical block numbers are drawn from an
   atomic ticket, so blocks start in order and a row waits only for blocks that already run; a row
   of more blocks than the device holds (132 x 4 on an H200) would wait forever and is refused.
3. Four chunks of residuals stay in registers, so fewer programs share a multiprocessor.
4. Counters must be zero before each launch: one more (tiny) launch, or a clean-up by the last
   program.

It is not in the package. The second pass of grpo_loss re-reads what the first has just read: at the
sizes of a training micro-step (16 x 16 x 64 x 64: about 10 MB) that comes from the L2 cache.
Whether the one pass wins where it does not is for this script to say on a GPU.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

import torch
import triton
import triton.language as tl

from flowgrpo_kernels import flow_sde, grpo_loss, sde_step
from flowgrpo_kernels.backends import dispatch
from flowgrpo_kernels.backends.triton import (
    COL_A,
    COL_B,
    COL_BIG_K,
    COL_C,
    COL_C0,
    COL_K,
    LANES_C,
    LAUNCH,
    PARTS,
    PARTS_C,
    alignment,
    coefficient,
    count,
    exponential,
    jit,
    load,
    narrow,
    num_blocks,
    ordered_sum,
    residual,
    score,
    second_pass,
    store,
    store_quarters,
)
from flowgrpo_kernels.grpo_loss import clipped_policy
from measuring import timers
from reporting import records

# Programs that an H200 runs at once, at up to 128 registers a thread.
RESIDENT = 132 * 4
ROUNDS = 30


@jit
def _single_pass_kernel(
    counters_ptr,  # [1 + B] int32 zeros: the ticket, then arrivals of each row
    v_ptr, x_ptr, prev_ptr, ref_ptr, dv_ptr,  # [B, D]
    sums_ptr,  # [2, B * blocks * PARTS]
    old_log_prob_ptr, advantages_ptr, log_prob_ptr, ratio_ptr,  # [B]
    terms_ptr,  # [3, B]
    table_ptr, step_ptr,
    loss_scale, kl_weight, low, high, adv_clip,
    elements, rows, num_steps, step_stride, num_blocks,
    ALIGN: tl.constexpr, WIDTH: tl.constexpr, REF: tl.constexpr,
):  # fmt: skip
    ticket = tl.atomic_add(counters_ptr, 1, sem="relaxed")
    row = ticket // num_blocks
    start = (ticket % num_blocks).to(tl.int64) * (4 * LANES_C)
    size = tl.cast(elements, tl.int64)
    base = tl.multiple_of(row.to(tl.int64) * size, ALIGN) + start
    remaining = size - start
    step = tl.load(step_ptr + row * step_stride)
    a = coefficient(table_ptr, step, num_steps, COL_A)
    b = coefficient(table_ptr, step, num_steps, COL_B)
    c = coefficient(table_ptr, step, num_steps, COL_C)
    k = coefficient(table_ptr, step, num_steps, COL_K)
    c0 = coefficient(table_ptr, step, num_steps, COL_C0)
    o = tl.arange(0, LANES_C)

    # Written out: Triton has no array of register tiles, and each must outlive the wait below.
    v0, d0 = residual(v_ptr, None, x_ptr, prev_ptr, base, o, remaining, 1.0, a, b, False)
    o1, o2, o3 = o + LANES_C, o + 2 * LANES_C, o + 3 * LANES_C
    v1, d1 = residual(v_ptr, None, x_ptr, prev_ptr, base, o1, remaining, 1.0, a, b, False)
    v2, d2 = residual(v_ptr, None, x_ptr, prev_ptr, base, o2, remaining, 1.0, a, b, False)
    v3, d3 = residual(v_ptr, None, x_ptr, prev_ptr, base, o3, remaining, 1.0, a, b, False)
    stride = rows.to(tl.int64) * num_blocks * PARTS_C
    p_sum = sums_ptr + ticket * PARTS_C
    store_quarters(p_sum, d0 * d0 + d1 * d1 + d2 * d2 + d3 * d3)
    if REF:
        v0 -= load(ref_ptr + base, o, remaining)
        v1 -= load(ref_ptr + base, o1, remaining)
        v2 -= load(ref_ptr + base, o2, remaining)
        v3 -= load(ref_ptr + base, o3, remaining)
        store_quarters(p_sum + stride, v0 * v0 + v1 * v1 + v2 * v2 + v3 * v3)

    # Release: the partials above are visible to whoever sees the arrival.
    arrival = counters_ptr + 1 + row
    tl.atomic_add(arrival, 1, sem="release")
    while tl.atomic_add(arrival, 0, sem="acquire") < num_blocks:
        pass

    n = count(elements)
    p_sum = sums_ptr + row.to(tl.int64) * num_blocks * PARTS_C
    log_prob = score(ordered_sum(p_sum, num_blocks, WIDTH), elements, k, c0, c)
    ratio = exponential(log_prob - tl.load(old_log_prob_ptr + row))
    adv = tl.load(advantages_ptr + row)
    policy, slope, outside = clipped_policy(ratio, adv, low, high, adv_clip)
    weight = tl.div_rn(tl.zeros_like(adv) + 1.0, rows.to(tl.float32))
    c_d = loss_scale * tl.div_rn(((weight * slope) * ratio) * (2.0 * (k * b)), n)
    kl = tl.zeros_like(adv)
    g0, g1, g2, g3 = c_d * d0, c_d * d1, c_d * d2, c_d * d3
    if REF:
        big_k = coefficient(table_ptr, step, num_steps, COL_BIG_K) * (b * b)
        kl = big_k * tl.div_rn(ordered_sum(p_sum + stride, num_blocks, WIDTH), n)
        c_e = loss_scale * tl.div_rn((weight * kl_weight) * (2.0 * big_k), n)
        g0, g1, g2, g3 = g0 + c_e * v0, g1 + c_e * v1, g2 + c_e * v2, g3 + c_e * v3
    dtype: tl.constexpr = dv_ptr.dtype.element_ty
    store(dv_ptr + base, o, remaining, narrow(g0, dtype))
    store(dv_ptr + base, o1, remaining, narrow(g1, dtype))
    store(dv_ptr + base, o2, remaining, narrow(g2, dtype))
    store(dv_ptr + base, o3, remaining, narrow(g3, dtype))
    if start == 0:
        tl.store(log_prob_ptr + row, log_prob)
        tl.store(ratio_ptr + row, ratio)
        tl.store(terms_ptr + row, policy)
        tl.store(terms_ptr + rows + row, kl)
        tl.store(terms_ptr + 2 * rows + row, tl.where(outside, 1.0, 0.0))


def single_pass(v, x, x_prev, old, adv, transitions, step, ref, beta, clip, loss_scale=1.0):
    """(terms [3, B], log_prob, ratio, gradient in v); the totals over rows are left out."""
    rows, elements = x.shape[0], x.shape[1:].numel()
    blocks = num_blocks(elements)
    if blocks > RESIDENT:
        raise ValueError(f"a row of {blocks} blocks does not fit on the device at once")
    new = {"dtype": torch.float32, "device": x.device}
    counters = torch.zeros(1 + rows, dtype=torch.int32, device=x.device)
    sums, terms = torch.empty(2, rows * blocks * PARTS, **new), torch.empty(3, rows, **new)
    lp, ratio, dv = torch.empty(rows, **new), torch.empty(rows, **new), torch.empty_like(v)
    _single_pass_kernel[(rows * blocks,)](
        counters, v, x, x_prev, ref, dv, sums, old, adv, lp, ratio, terms, transitions.table, step,
        loss_scale, beta, 1.0 - clip, 1.0 + clip, 5.0, elements, rows, transitions.num_steps,
        step.stride(0), blocks, ALIGN=alignment(rows, elements),
        WIDTH=second_pass(blocks)["WIDTH"], REF=ref is not None, **LAUNCH,
    )  # fmt: skip
    return terms, lp, ratio, dv


def inputs(rows: int, shape: tuple[int, ...], dtype: torch.dtype, device: str):
    """Arguments of both forms of the loss: a rollout step and a velocity near its own."""
    torch.manual_seed(0)
    transitions = flow_sde([1 - i / 10 for i in range(11)]).to(device)
    v, x = (torch.randn(rows, *shape, device=device) for _ in range(2))
    v, ref = v.to(dtype), (v + 0.02 * torch.randn_like(v)).to(dtype)
    step = torch.arange(rows, device=device) % 9
    out, old = sde_step(ref, x, transitions, step, seeds=torch.arange(rows, device=device))
    return v, x, out, old, torch.randn(rows, device=device), transitions, step, ref


def two_passes(v, x, out, old, adv, transitions, step, ref, beta, clip):
    """(grpo_loss's result, gradient in v)."""
    leaf = v.detach().requires_grad_()
    result = grpo_loss(
        leaf, x, out, old, adv, transitions, step, ref_velocity=ref, kl_weight=beta, clip_range=clip
    )
    return result, *torch.autograd.grad(result.loss, leaf)


def check(rows: int, shape: tuple[int, ...], dtype: torch.dtype, device: str) -> None:
    """Compare log_probs, ratios and gradients of the one pass and of the two, bit for bit."""
    with dispatch.use_backend("triton"):
        args = (*inputs(rows, shape, dtype, device), 0.1, 1e-2)
        result, grad = two_passes(*args)
        _, lp, ratio, dv = single_pass(*args)
    same = [torch.equal(*p) for p in ((lp, result.log_prob), (ratio, result.ratio), (dv, grad))]
    print(f"{rows} x {shape} {dtype}: log_prob, ratio, gradient equal: {same}")


def compile_report() -> None:
    """Print the kernel's registers on sm_90 and what is wrong with its code."""
    from flowgrpo_kernels import aot

    flags = {"ALIGN": 16, "WIDTH": 16, "REF": True}
    variant = aot.op_variant(
        "single pass", _single_pass_kernel, "bf16", "fp32", flags, types={"counters_ptr": "*i32"}
    )
    report = aot.compile_variant(variant, aot.TARGETS["sm_90"])
    print(f"single pass on sm_90: {report.registers} registers, {aot.problems(report) or 'clean'}")


def measure(path: Path | None) -> None:
    """Time both as replayed graphs over rotating buffers: neither is timed by its launches."""
    rows = []
    for name, batch, shape in (
        ("sd3-512 b16", 16, (16, 64, 64)),
        ("sd3-512 b64", 64, (16, 64, 64)),
        ("large", 2752, (16, 64, 64)),
    ):
        # In bytes of an element: v, ref and dv 2, x and x' 4.
        moved = 14 * batch * torch.Size(shape).numel()
        sets = [
            (*inputs(batch, shape, torch.bfloat16, "cuda"), 0.1, 1e-2)
            for _ in range(timers.buffer_sets(moved, "cuda"))
        ]
        calls = {
            "ours": lambda args: two_passes(*args),
            "single-pass": lambda args: single_pass(*args),
        }
        timed = timers.rotating(calls, sets, "cuda", graphs=tuple(calls))
        times = timers.take_turns(timed, ROUNDS)
        for provider, values in times.items():
            case = f"loss-kl {name} bf16/fp32"
            median = statistics.median(values) * 1e6
            rows.append(records.row("single-pass", case, provider, "time", median, "us"))
            print(rows[-1])
    records.write(records.record(rows, "cuda"), path or records.RESULTS / "single-pass.json")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--out", type=Path, help="default: results/single-pass.json")
    options = parser.parse_args(argv)
    if options.compile:
        compile_report()
    elif torch.cuda.is_available():
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            check(16, (16, 64, 64), dtype, "cuda")
        measure(options.out)
    elif options.check and triton.knobs.runtime.interpret:
        # One block a row: the interpreter runs programs one after another, so none may wait.
        check(2, (3, 5, 7), torch.float32, "cpu")
        check(1, (4096,), torch.bfloat16, "cpu")
    else:
        parser.error("no GPU: use --compile, or --check under TRITON_INTERPRET=1")
    return 0
