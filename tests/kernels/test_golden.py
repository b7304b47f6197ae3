"""Vectors recorded from flow_grpo and DanceGRPO, through the ops and through the drop-ins.

The vectors are float32 and carry their own rounding: 2e-5 relative (tests/golden/README.md).
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from flowgrpo_kernels import cps, dance_sde, flow_sde, grpo_loss, log_prob, sde_step
from flowgrpo_kernels.compat.dance_grpo import flux_step
from flowgrpo_kernels.compat.flow_grpo import sde_step_with_logprob

GOLDEN = Path(__file__).parent.parent / "golden"
CASES = json.loads((GOLDEN / "cases.json").read_text())
FLOW = [c for c in CASES if c["peer"] == "flow_grpo"]
DANCE = [c for c in CASES if c["peer"] == "DanceGRPO"]


@cache
def vectors() -> dict[str, torch.Tensor]:
    return load_file(GOLDEN / "vectors.safetensors")


def case_tensors(case) -> SimpleNamespace:
    prefix = case["name"] + "."
    found = {k.removeprefix(prefix): v for k, v in vectors().items() if k.startswith(prefix)}
    kind = "dance_sigmas" if case["peer"] == "DanceGRPO" else "sigmas"
    return SimpleNamespace(**found, sigmas=vectors()[f"{kind}.{case['shift']}.{case['num_steps']}"])


def close(got, expected, atol=None):
    """2e-5 relative to the tensor's own scale."""
    scale = expected.abs().max().item() if atol is None else atol
    torch.testing.assert_close(got, expected, rtol=2e-5, atol=2e-5 * scale)


def scheduler(sigmas):
    return SimpleNamespace(sigmas=sigmas, timesteps=sigmas[:-1] * 1000)


def ids(case):
    return case["name"]


def test_every_case_is_used():
    assert len(FLOW) + len(DANCE) == len(CASES) == 26 and len(vectors()) > 300


@pytest.mark.parametrize("case", FLOW, ids=ids)
def test_flow_grpo_ops(backend, case):
    t = case_tensors(case)
    make = flow_sde if case["kind"] == "sde" else cps
    transitions = make(t.sigmas, case["noise_level"])

    old = log_prob(t.old_velocity, t.sample, t.prev_sample, transitions, t.step)
    close(old, t.old_log_prob, atol=1.0)

    v = t.velocity.clone().requires_grad_()
    lp = log_prob(v, t.sample, t.prev_sample, transitions, t.step)
    close(lp, t.log_prob, atol=1.0)
    lp.sum().backward()
    close(v.grad, t.grad_log_prob)

    v.grad = None
    result = grpo_loss(
        v, t.sample, t.prev_sample, t.old_log_prob, t.advantages, transitions, t.step,
        ref_velocity=t.ref_velocity, kl_weight=case["kl_weight"],
        clip_range=case["clip_range"], adv_clip=case["adv_clip"],
    )  # fmt: skip
    for name in ("loss", "policy_loss", "kl"):
        close(getattr(result, name).detach(), getattr(t, name))
    close(result.ratio, t.ratio)
    result.loss.backward()
    # The peer's own ratio carries float32 noise of about 1e-7 absolute in the log_prob.
    close(v.grad, t.grad_velocity)

    noise = (t.prev_sample - t.mean) / transitions.column("C")[t.step].view(-1, *[1] * (v.ndim - 1))
    moved, _ = sde_step(t.velocity, t.sample, transitions, t.step, noise=noise)
    close(moved, t.prev_sample)


@pytest.mark.parametrize("case", FLOW, ids=ids)
def test_flow_grpo_drop_in(backend, case):
    t = case_tensors(case)
    v = t.velocity.clone().requires_grad_()
    options = {"noise_level": case["noise_level"], "sde_type": case["kind"]}
    x, lp, mean, std, sqrt_dt = sde_step_with_logprob(
        scheduler(t.sigmas), v, t.timestep, t.sample,
        prev_sample=t.prev_sample, return_sqrt_dt=True, **options,
    )  # fmt: skip
    assert torch.equal(x, t.prev_sample) and std.shape == (len(t.step), *[1] * (v.ndim - 1))
    close(lp, t.log_prob, atol=1.0)
    close(mean, t.mean)
    close(std.flatten(), t.std_dev_t)
    dt = t.sigmas[t.step] - t.sigmas[t.step + 1]
    close(sqrt_dt.flatten(), dt.sqrt())
    lp.sum().backward()
    close(v.grad, t.grad_log_prob)


@pytest.mark.parametrize("case", DANCE, ids=ids)
def test_dance_grpo(backend, case):
    t = case_tensors(case)
    transitions = dance_sde(t.sigmas, case["eta"])
    step = int(t.step)
    out, _ = sde_step(t.velocity, t.sample, transitions, step, noise=t.noise)
    close(out, t.prev_sample)
    v = t.velocity.clone().requires_grad_()
    lp = log_prob(v, t.sample, t.prev_sample, transitions, step)
    close(lp, t.log_prob, atol=1.0)
    lp.sum().backward()
    close(v.grad, t.grad_log_prob)

    v.grad = None
    x, _, lp = flux_step(v, t.sample, case["eta"], t.sigmas, step, t.prev_sample, True, True)
    assert torch.equal(x, t.prev_sample)
    close(lp, t.log_prob, atol=1.0)
    lp.sum().backward()
    close(v.grad, t.grad_log_prob)
    mean, _ = flux_step(t.velocity, t.sample, case["eta"], t.sigmas, step, None, False, True)
    close(mean, t.mean)
