"""The drop-ins where their callers differ: an index on the device, a rollout in inference mode."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from test_compat import CountOps

from flowgrpo_kernels.compat.dance_grpo import flux_step
from flowgrpo_kernels.compat.flow_grpo import sde_step_with_logprob
from support.kernels import oracle


def test_flux_step_with_an_index_on_the_device():
    """A 0-dim index, as DanceGRPO's training loop hands over, is not read; also one a row."""
    b, sigmas = oracle.batch(3), torch.tensor(oracle.SIGMAS)
    mixed = torch.tensor([4, 0, 7])
    for grpo in (True, False):
        args = (b.velocity, b.sample, 0.3, sigmas)
        flux_step(*args, 4, b.old, grpo, True)
        index = torch.tensor(4)
        with CountOps() as mode:
            got = flux_step(*args, index, b.old, grpo, True)
        assert "_local_scalar_dense.default" not in mode.names
        expected = flux_step(*args, 4, b.old, grpo, True)
        assert all(torch.equal(x, y) for x, y in zip(got, expected, strict=True))
        rows = flux_step(*args, mixed, b.old, grpo, True)
        for i, step in enumerate(mixed.tolist()):
            row = (b.velocity[i : i + 1], b.sample[i : i + 1], 0.3, sigmas, step, b.old[i : i + 1])
            for x, y in zip(rows, flux_step(*row, grpo, True), strict=True):
                assert torch.equal(x[i : i + 1], y)
        for wrong in (9, -1, torch.tensor(9), mixed[:2]):
            with pytest.raises(ValueError, match="index must be"):
                flux_step(*args, wrong, b.old, grpo, True)


def test_rollout_under_inference_mode():
    """Tables that a rollout under inference_mode makes first serve the update's gradient."""
    b, sigmas = oracle.batch(3), torch.tensor(oracle.SIGMAS)
    scheduler = SimpleNamespace(sigmas=sigmas.clone(), timesteps=sigmas[:-1] * 1000)
    t, v = scheduler.timesteps[:1], b.velocity.clone().requires_grad_()
    calls = (
        lambda v, x: sde_step_with_logprob(scheduler, v, t, b.sample, prev_sample=x),
        lambda v, x: flux_step(v, b.sample, 0.3, sigmas, 4, x, True, True),
    )
    for call, log_prob_at in zip(calls, (1, 2), strict=True):
        with torch.inference_mode():
            old = call(b.velocity, b.old)[log_prob_at]
        new = call(v, b.old)[log_prob_at]
        assert torch.equal(new, old)
        (grad,) = torch.autograd.grad(new.sum(), v)
        assert grad.abs().sum() > 0
