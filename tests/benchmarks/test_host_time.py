"""Host time of a compiled launch over the stub of the driver, in plain torch ops of the same run.

No absolute time holds on another machine, and none on a busy one. A ratio does: both sides take
turns, in short rounds, by the time that the thread itself had the processor, and of each the
shortest round counts, which is the one that nobody disturbed.
"""

from __future__ import annotations

import functools
import time

import pytest
import torch

import bench_launch
from flowgrpo_kernels import flow_sde, grpo_loss, sde_step
from flowgrpo_kernels.backends import compiled, dispatch, triton
from flowgrpo_kernels.sde_step import sde_step_kernel
from measuring import stub_driver
from measuring.timers import take_turns

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(stub_driver.missing()), reason=stub_driver.missing()),
    pytest.mark.skipif(torch.cuda.is_available(), reason="the driver itself is here"),
]
CALLS, ROUNDS = 10, 40
BOUNDS = {"launch": 12.0, "sde_step": 150.0, "micro-step": 400.0}
"""Plain ops that a call may take: two to three times what it does take."""


def seconds_of(call, calls: int = CALLS) -> float:
    """The processor's seconds of one of some calls."""
    start = time.thread_time()
    for _ in range(calls):
        call()
    return (time.thread_time() - start) / calls


@pytest.fixture
def calls(monkeypatch):
    """A launch of one kernel, a step of a rollout and a micro-step; the kernels compute nothing."""
    stub = stub_driver.install()
    stub.reset()
    monkeypatch.setattr(triton, "interpreting", lambda: False)
    x, transitions = torch.zeros(4, 16, 8, 8), flow_sde([1.0, 0.5, 0.0])
    v, out, rows = x.bfloat16(), x.clone(), torch.zeros(4)
    seeds, grad = torch.zeros(4, dtype=torch.int64), torch.ones(())
    trained = v.clone().requires_grad_()

    def step():
        sde_step(
            v, x, transitions, 0, seeds=seeds, uncond_velocity=v, guidance_scale=4.5, out=out,
            log_prob_out=rows,
        )  # fmt: skip

    def micro_step():
        loss = grpo_loss(
            trained, x, out, rows, rows, transitions, 0, ref_velocity=v, kl_weight=0.01
        ).loss
        torch.autograd.grad(loss, trained, grad)

    tensors, numbers, constants = bench_launch.kernel_arguments(bench_launch.inputs(), transitions)

    def launch():
        compiled.launch(sde_step_kernel, bench_launch.PROGRAMS, tensors, numbers, **constants)

    with stub.tensors_of("cpu"), dispatch.use_backend("compiled"):
        launch()
        step()
        micro_step()
        assert len({done.name for done in stub.launches()}) > 2
        stub.record(False)
        yield {"launch": launch, "sde_step": step, "micro-step": micro_step}
        stub.record(True)
    stub.reset()


def test_a_launch_takes_few_plain_ops_of_host_time(calls):
    small = torch.zeros(4)
    plain = functools.partial(torch.add, small, small, out=small.clone())
    timed = {name: functools.partial(seconds_of, call) for name, call in calls.items()}
    # As long a round as the others'.
    timed["plain"] = functools.partial(seconds_of, plain, 20 * CALLS)
    times = take_turns(timed, ROUNDS)
    shortest = {name: min(values) for name, values in times.items()}
    ratios = {name: shortest[name] / shortest["plain"] for name in BOUNDS}
    assert all(ratios[name] < bound for name, bound in BOUNDS.items()), ratios

    def planned_anew():
        compiled.forget_plans()
        calls["launch"]()

    # A launch that looks everything up again, which is what the plans are for, is found.
    slowest = min(seconds_of(planned_anew) for _ in range(ROUNDS))
    assert slowest > BOUNDS["launch"] * shortest["plain"]
