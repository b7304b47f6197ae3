"""Calls of every op under launch_recorder.py; prints a line of JSON for each. Run by test_launches.

A case is the call that is first of its kind, and then the same with something changed.
"""

from __future__ import annotations

import dataclasses
import json
import math

import torch

from flowgrpo_kernels import (
    aot,
    flow_sde,
    grpo_loss,
    initial_noise,
    log_prob,
    nft_loss,
    sde_step,
)
from flowgrpo_kernels.backends import dispatch, triton
from flowgrpo_kernels.blocks.joint_heads import joint_heads_backward_kernel, launch_options
from flowgrpo_kernels.blocks.norm_modulate import norm_modulate_kernel
from flowgrpo_kernels.blocks.rows import options
from flowgrpo_kernels.row_laws import LAWS
from flowgrpo_kernels.transition_rows import transition_rows_op
from support.kernels import block_cases, oracle
from support.kernels import launch_recorder as recorder

# Four blocks a row, in the dtypes of a trainer.
SHAPE = (16, 32, 32)
ROWS = (1, 2, 3, 16, 17, 40, 130)
TRANSITIONS = flow_sde(oracle.SIGMAS)


def batch(rows=2, shape=SHAPE, dtype=torch.bfloat16):
    return oracle.batch(rows, shape, dtype, torch.float32)


def odd(x: torch.Tensor) -> torch.Tensor:
    """x at an address that is no multiple of 16."""
    wide = torch.empty(x.numel() + 3, dtype=x.dtype)
    shift = next(i for i in range(3) if wide[i:].data_ptr() % 16)
    return wide[shift : shift + x.numel()].view(x.shape).copy_(x)


def every_other(x: torch.Tensor) -> torch.Tensor:
    return x.repeat_interleave(2, 0)[::2]


def step_of(b=None, step=3, transitions=TRANSITIONS, scale=None, **given):
    """sde_step, with guidance where `scale` is given."""
    b = b or batch()
    given |= {} if scale is None else dict(uncond_velocity=b.uncond, guidance_scale=scale)
    given.setdefault("seeds", b.seeds)
    return lambda: sde_step(b.velocity, b.sample, transitions, step, **given)


def score(b=None, step=3, grad=True, moments=False):
    """log_prob with its gradient, or with mean and x0 and the gradient of all three."""
    b = b or batch()
    v, ones = b.velocity.requires_grad_(grad), torch.ones(len(b.seeds))
    options = {"return_mean": True, "return_x0": True} if moments else {}
    given = (ones, b.ref.float(), b.old.float()) if moments else ones

    def call():
        results = log_prob(v, b.sample, b.sample, TRANSITIONS, step, **options)
        if grad:
            torch.autograd.grad(results, v, given)

    return call


def table_rows(rows):
    """Rows of a table from a schedule in float32 and a noise level of the host."""
    sigma = torch.linspace(0.9, 0.5, rows)
    level, counter = torch.tensor(1.0, dtype=torch.float64), torch.arange(rows)
    args = (sigma, odd(sigma / 2), level, odd(sigma[:1]), counter, rows)
    return lambda: transition_rows_op(*args, LAWS.index("precise"), 3, 0.0)


def micro(b=None, step=3, scale=None, kl=None, guard=False, old=None, backward=1.0, **given):
    """grpo_loss forward and backward, with the options of a trainer; guidance with both halves."""
    b = b or batch()
    halves = (b.velocity.requires_grad_(),)
    if scale is not None:
        halves = (b.velocity, b.uncond.requires_grad_())
        given |= dict(uncond_velocity=b.uncond, guidance_scale=scale, uncond_grad=True)
    if kl is not None:
        given |= dict(ref_velocity=b.ref, kl_weight=kl)
        given |= {} if scale is None else dict(ref_uncond_velocity=b.old)
    if guard:
        given |= dict(old_velocity=b.old)
    old = torch.zeros(len(b.seeds)) if old is None else old
    given = dict(advantages=b.advantages) | given
    grad = torch.full((), backward)

    def call():
        loss = grpo_loss(
            b.velocity, b.sample, b.sample, old, transitions=TRANSITIONS, step=step, **given
        ).loss
        torch.autograd.grad(loss, halves, grad)

    return call


def forward_process(rows=2, scale=None, kl=None, weights=True, optimality=None, **given):
    """nft_loss forward and backward, in the dtypes of a trainer; guidance with both halves."""
    b = oracle.nft_batch(rows, SHAPE, torch.bfloat16, torch.float32)
    halves = (b.velocity.requires_grad_(),)
    if scale is not None:
        halves = (b.velocity, b.uncond.requires_grad_())
        given |= dict(uncond_velocity=b.uncond, guidance_scale=scale, uncond_grad=True)
    if kl is not None:
        given |= dict(ref_velocity=b.ref, kl_weight=kl)
        given |= {} if scale is None else dict(ref_uncond_velocity=b.old)
    given |= dict(row_weight=odd(b.weight)) if weights else {}
    grad, r = torch.ones(()), b.optimality if optimality is None else optimality

    def call():
        out = nft_loss(b.velocity, b.sample, b.x0, b.old, b.sigma, r, **given)
        torch.autograd.grad(out.loss, halves, grad)

    return call


def block(op, batch=2, tokens=3, attention=False):
    """A block's op forward and backward to its activations, the gradient as attention leaves it."""
    v = block_cases.inputs(op, torch.bfloat16, batch, tokens)
    inputs = [v[n].requires_grad_() for n in ("x", "y", "y2", "first", "second") if n in v]
    with dispatch.use_backend("reference"):
        given = [torch.ones_like(o) for o in block_cases.ours(op, v)]
    if attention:
        given = [g.transpose(1, 2).contiguous().transpose(1, 2) for g in given]
    return lambda: torch.autograd.grad(block_cases.ours(op, v), inputs, given)


def unallocated(rows, elements, launch=triton.launch):
    """The launcher of sde_step on rows that take no memory."""
    b = batch(rows)
    v, x = (z.flatten()[:1].expand(rows, elements) for z in (b.velocity, b.sample))
    step, lp = torch.zeros(rows, dtype=torch.int64), torch.empty(rows)
    launcher, table = triton.launchers["sde_step"], TRANSITIONS.table
    return lambda: launcher(launch, v, None, 1.0, x, table, step, b.seeds, None, x, lp)


def noise(seeds):
    return lambda: initial_noise(seeds, SHAPE)


def rollout_cases():
    """(name, call) of what samples and scores."""
    yield "sde_step", step_of()
    for rows in ROWS:
        yield f"sde_step, {rows} rows", step_of(batch(rows))
    steps = torch.tensor([4, 1])
    for name, step in (("0", 0), ("1", 1), ("0-dim", steps[0]), ("[B]", steps)):
        yield f"sde_step, step {name}", step_of(step=step)
    yield "sde_step, step strided", step_of(step=every_other(steps))
    yield "sde_step, step odd", step_of(step=odd(steps))
    yield "sde_step, seeds odd", step_of(seeds=odd(batch().seeds))
    yield "sde_step, other table", step_of(transitions=flow_sde(oracle.SIGMAS[5:], 0.2))
    yield "sde_step, 16 blocks", step_of(batch(3, (16, 64, 64)))
    given = dict(out=batch().ref.float(), log_prob_out=odd(torch.zeros(2)))
    yield "sde_step, given buffers", step_of(**given)
    yield "sde_step guided", step_of(scale=4.5)
    for scale in (1.0, 1, 0.0, 7):
        yield f"sde_step guided, {scale!r}", step_of(batch(3), scale=scale)
    yield "sde_step float32", step_of(batch(dtype=torch.float32))
    yield "sde_step odd", step_of(batch(shape=(3, 5, 7)))
    yield "sde_step odd, 16 rows", step_of(batch(16, (3, 5, 7)), step=1)
    yield "sde_step 64 blocks", step_of(batch(1, (16, 128, 128)))
    yield "sde_step 70000 blocks", unallocated(3, 70_000 * 4096)
    yield "sde_step 70000 blocks, 2 rows", unallocated(2, 70_000 * 4096)
    yield "sde_step past 2^31", unallocated(2, (1 << 31) + 4096)
    yield "log_prob", score(grad=False)
    yield "log_prob with backward", score()
    yield "log_prob with backward, 17 rows", score(batch(17), 0)
    x = batch().ref.float()
    yield "sde_step mean", step_of(mean_out=x.clone(), x0_out=x.clone())
    yield "log_prob mean", score(moments=True)
    yield "log_prob mean, 17 rows", score(batch(17), 0, moments=True)
    yield "transition_rows", table_rows(1)
    for rows in (2, 17, 130):
        yield f"transition_rows, {rows} rows", table_rows(rows)
    yield "initial_noise", noise(batch().seeds)
    yield "initial_noise, 17 rows", noise(odd(batch(17).seeds))


def loss_cases():
    """(name, call) of the loss, each its forward and backward."""
    yield "loss", micro()
    yield "loss KL", micro(kl=0.04, row_weight=batch().weight)
    for rows in ROWS:
        b = batch(rows)
        yield f"loss KL, {rows} rows", micro(b, kl=0.04, row_weight=b.weight)
    for name, change in {
        "kl_weight 0.01": dict(kl=0.01),
        "kl_weight 0": dict(kl=0),
        "clip_range": dict(kl=0.04, clip_range=(0.2, 1)),
        "adv_clip": dict(kl=0.04, adv_clip=math.inf),
        "step 1": dict(kl=0.04, step=1),
        "step strided": dict(kl=0.04, step=every_other(torch.tensor([5, 2]))),
        "over 4": dict(kl=0.04, backward=0.25),
        "old_log_prob odd": dict(kl=0.04, old=odd(torch.ones(2))),
        "advantages strided": dict(kl=0.04, advantages=every_other(torch.ones(2))),
    }.items():
        yield f"loss KL, {name}", micro(row_weight=odd(batch().weight), **change)
    b, b17 = batch(3), batch(17)
    yield "loss guided KL", micro(kl=0.04, scale=4.5, row_weight=batch().weight)
    for scale in (1, 1.0, 7.5):
        yield f"loss guided KL, {scale!r}", micro(b, kl=1, scale=scale, row_weight=b.weight)
    yield "loss Guard KL", micro(kl=0.04, guard=True, row_weight=batch().weight)
    yield "loss Guard KL, 17 rows", micro(b17, 0, kl=1, guard=True, row_weight=b17.weight)


def nft_cases():
    """(name, call) of DiffusionNFT's loss, each its forward and backward."""
    yield "nft", forward_process(weights=False)
    yield "nft KL", forward_process(kl=0.04)
    for rows in ROWS:
        yield f"nft KL, {rows} rows", forward_process(rows, kl=0.04)
    yield "nft KL, beta 0.1", forward_process(kl=0.04, beta=0.1)
    yield "nft KL, floor 1", forward_process(kl=0, floor=1)
    yield "nft KL, optimality odd", forward_process(kl=0.04, optimality=odd(torch.ones(2)))
    yield "nft guided KL", forward_process(scale=4.5, kl=0.04)
    for scale in (1, 7.5):
        yield f"nft guided KL, {scale!r}", forward_process(3, scale=scale, kl=1)


def block_ops():
    """(name, call) of the blocks' ops, each its forward and backward."""
    for op in ("norm second", "gate second", "heads rotary"):
        yield op, block(op)
        for size in ((1, 3), (17, 3), (2, 16), (2, 17), (1, 2)):
            yield f"{op}, {size[0]} x {size[1]}", block(op, *size)
    yield "heads rotary, after attention", block("heads rotary", 3, 5, attention=True)


def compiled_ahead():
    """(name, whether one that was launched is the same to the letter) of some variants."""
    names = (
        "sde_step split guided",
        "log_prob plain",
        "grpo_loss sums plain",
        "grpo_loss backward guided",
        "nft_loss sums plain",
        "nft_loss backward guided",
    )
    chosen = [
        v for v in aot.op_variants(("bf16", "fp32"))
        if (v.velocity, v.sample, v.name in names) == ("bf16", "fp32", True)
        or (v.velocity == "fp32" and (v.name == "initial_noise" or not v.vectorised))
    ]  # fmt: skip
    heads = launch_options(block_cases.HEADS, 32, [])
    for name, kernel, launch in (
        ("norm_modulate", norm_modulate_kernel, options(96)),
        ("joint_heads backward", joint_heads_backward_kernel, heads),
    ):
        chosen.append(aot.block_variant(name, kernel, "bf16", launch))
    for variant in chosen:
        ahead = aot.compile_variant(variant, aot.TARGETS["sm_90"]).assembly
        yield variant.name, ahead in recorder.launched(variant.kernel)


def main():
    recorder.install()
    torch.set_num_threads(1)
    for cases in (rollout_cases, loss_cases, nft_cases, block_ops):
        for name, call in cases():
            with recorder.recorded() as log:
                call()
            print(json.dumps({"case": name, **dataclasses.asdict(log)}), flush=True)
    print(json.dumps({"case": "ahead", "same": dict(compiled_ahead())}))


if __name__ == "__main__":
    main()
