"""Vectors recorded from five more peers, through the drop-ins: rollout, replay and gradients.

Bounds are those of tests/golden/peers/README.md, relative to the norm of the tensor.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from flowgrpo_kernels.compat import (
    dance_grpo,
    flow_factory,
    flow_grpo,
    miles,
    mixgrpo,
    precise,
    steps,
    unirl,
    verl_omni,
)

GOLDEN = Path(__file__).parents[2] / "golden" / "peers"
CASES = json.loads((GOLDEN / "cases.json").read_text())
# (x', mean, log_prob, gradient)
FLOAT32 = (1e-6, 2.5e-5, 1e-5, 5e-5)
STORED = (2e-5, 2.5e-5, 5e-5, 5e-5)
BFLOAT16_PRODUCTS = (6e-3,) * 4


@cache
def vectors() -> dict[str, torch.Tensor]:
    return load_file(GOLDEN / "vectors.safetensors")


def tensors(case: dict) -> SimpleNamespace:
    prefix = case["name"] + "."
    found = {k.removeprefix(prefix): v for k, v in vectors().items() if k.startswith(prefix)}
    name = case["schedule"]
    return SimpleNamespace(
        **found, sigmas=vectors()[f"sigmas.{name}"], timesteps=vectors()[f"timesteps.{name}"]
    )


def of(peer: str):
    cases = [c for c in CASES if c["peer"] == peer]
    assert len(cases) == 12
    return pytest.mark.parametrize("case", cases, ids=lambda c: c["name"])


def bounds(case: dict) -> tuple[float, ...]:
    if case["peer"] == "MixGRPO" and case["velocity_dtype"] == "bfloat16":
        return BFLOAT16_PRODUCTS
    dtypes = {case.get("sample_dtype"), case.get("velocity_dtype")}
    return STORED if dtypes & {"bfloat16", "float16"} else FLOAT32


def close(got: torch.Tensor, want: torch.Tensor, bound: float) -> None:
    got, want = got.detach().double(), want.double()
    assert got.shape == want.shape
    scale = want.norm().clamp_min(1e-3)
    assert float((got - want).norm() / scale) < bound, (got.flatten()[:4], want.flatten()[:4])


def level(case: dict) -> float | torch.Tensor:
    noise = case["noise_level"]
    return torch.tensor(noise) if isinstance(noise, list) else noise


@pytest.fixture
def recorded_noise(monkeypatch):
    """Lets the drop-ins draw what the peer's generator drew."""

    def use(noise: torch.Tensor | None) -> None:
        def draw(like, generator, dtype=torch.float32):
            assert noise is not None, "a step without noise draws some"
            assert like.shape == noise.shape and dtype == noise.dtype
            return noise

        for module in (dance_grpo, flow_factory, flow_grpo, mixgrpo, precise, unirl, verl_omni):
            monkeypatch.setattr(module, "draw", draw)

    assert steps.draw
    return use


def replay(call, t: SimpleNamespace, case: dict, log_prob_at=1) -> None:
    """Scores the recorded x' under the other velocity, and differentiates."""
    v = t.other_velocity.clone().requires_grad_()
    log_prob = call(v)[log_prob_at]
    _, _, score, gradient = bounds(case)
    close(log_prob, t.other_log_prob, score)
    (grad,) = torch.autograd.grad(log_prob.sum(), v)
    assert grad.dtype == t.grad_log_prob.dtype
    # Its own rounding to 16 bits may fall to the other side.
    close(grad, t.grad_log_prob, gradient if grad.dtype == torch.float32 else max(gradient, 4e-3))


def scheduler(t: SimpleNamespace, case: dict, **more) -> SimpleNamespace:
    return SimpleNamespace(sigmas=t.sigmas, timesteps=t.timesteps, **more)


class UniPCMultistepSDEScheduler(SimpleNamespace):
    """Named as theirs."""


@of("Flow-Factory")
def test_flow_factory(backend, case, recorded_noise):
    t = tensors(case)
    unipc = case.get("scheduler") == "UniPCMultistepSDEScheduler"
    make = UniPCMultistepSDEScheduler if unipc else SimpleNamespace
    own = make(sigmas=t.sigmas, timesteps=t.timesteps, is_eval=False, dynamics_type=case["kind"])
    recorded_noise(getattr(t, "noise", None))
    timestep = t.timestep.reshape(-1)[0] if case["timestep"] == "scalar" else t.timestep
    options = {"noise_level": level(case), "timestep_next": getattr(t, "timestep_next", None)}
    out = flow_factory.step(own, t.velocity, timestep, t.sample, **options)
    x, mean, score, _ = bounds(case)
    close(out.next_latents, t.prev_sample, x)
    close(out.next_latents_mean, t.mean, mean)
    close(out.log_prob, t.log_prob, score)
    close(out.std_dev_t, t.std_dev_t, 1e-6)
    close(out.dt, t.dt, 1e-6)
    if case["kind"] == "ODE":
        return
    where = 1 if unipc else 3

    def call(v):
        return flow_factory.step(
            own, v, timestep, t.sample, t.prev_sample, return_dict=False, **options
        )

    replay(call, t, case, where)


@of("verl-omni")
def test_verl_omni(backend, case, recorded_noise):
    t = tensors(case)
    own = scheduler(t, case, step_index=case["steps"])
    recorded_noise(getattr(t, "noise", None))
    options = {
        "timestep": None if case["timestep"] == "step_index" else t.timestep,
        "noise_level": level(case), "sde_type": case["kind"], "return_sqrt_dt": True,
        "include_logprob_normalizer": case["include_logprob_normalizer"],
    }  # fmt: skip
    x, log_prob, mean, std_dev, sqrt_dt = verl_omni.sample_previous_step(
        own, t.sample, t.velocity, **options
    )
    for got, want, bound in zip(
        (x, mean, log_prob), (t.prev_sample, t.mean, t.log_prob), bounds(case), strict=False
    ):
        close(got, want, bound)
    close(std_dev, t.std_dev_t, 1e-6)
    close(sqrt_dt, t.sqrt_dt, 1e-6)

    def call(v):
        return verl_omni.sample_previous_step(
            own, t.sample, v, prev_sample=t.prev_sample, **options
        )

    replay(call, t, case)


@of("UniRL")
def test_unirl(backend, case, recorded_noise):
    t = tensors(case)
    own = SimpleNamespace(canonical_name=case["kind"])
    recorded_noise(getattr(t, "noise", None))
    options = {"eta": case["noise_level"], "sigma_max": case.get("sigma_max", t.sigmas[1])}
    x, log_prob, mean = unirl.denoise(own, t.velocity, t.sample, t.sigma, t.sigma_next, **options)
    for got, want, bound in zip(
        (x, mean, log_prob), (t.prev_sample, t.mean, t.log_prob), bounds(case), strict=False
    ):
        close(got, want, bound)
    replay(
        lambda v: unirl.denoise(
            own, v, t.sample, t.sigma, t.sigma_next, prev_sample=t.prev_sample, **options
        ),
        t, case,
    )  # fmt: skip


@of("MixGRPO")
def test_mixgrpo(backend, case, recorded_noise):
    t = tensors(case)
    recorded_noise(getattr(t, "noise", None))
    given = (t.sample, case["noise_level"], t.sigmas, int(t.step))
    quiet = case.get("deterministic", False)
    if case["kind"] == "flow":
        results = mixgrpo.flow_grpo_step(t.velocity, *given, None, determistic=quiet)
        x, x0, log_prob, mean, std_dev = results
        close(std_dev.reshape(-1), t.std_dev_t, 2e-6)
        at = 2

        def call(v):
            return mixgrpo.flow_grpo_step(v, *given, t.prev_sample, determistic=quiet)

    else:
        x, x0, log_prob = mixgrpo.dance_grpo_step(t.velocity, *given, None, True, not quiet)
        mean, _ = mixgrpo.dance_grpo_step(t.velocity, *given, None, False, not quiet)
        at = 2

        def call(v):
            return mixgrpo.dance_grpo_step(v, *given, t.prev_sample, True, not quiet)

    bound = bounds(case)
    close(x, t.prev_sample, bound[0])
    close(mean, t.mean, bound[1])
    close(x0, t.pred_original, max(bound[0], 2e-6))
    if quiet:
        return
    close(log_prob, t.log_prob, bound[2])
    replay(call, t, case, at)


@of("Precise")
def test_precise(backend, case, recorded_noise):
    t = tensors(case)
    own = scheduler(t, case)
    recorded_noise(getattr(t, "noise", None))
    options = {"noise_level": case["noise_level"], "sde_type": case["kind"]}
    results = precise.sde_step_with_logprob(own, t.velocity, t.timestep, t.sample, **options)
    for got, want, bound in zip(
        results, (t.prev_sample, t.log_prob, t.mean), (FLOAT32[i] for i in (0, 2, 1)), strict=True
    ):
        close(got, want, bound)

    def call(v):
        return precise.sde_step_with_logprob(
            own, v, t.timestep, t.sample, prev_sample=t.prev_sample, **options
        )

    replay(call, t, case)
    if case["kind"] == "precise":
        ours = flow_grpo.sde_step_with_logprob(
            own, t.velocity, t.timestep, t.sample, prev_sample=t.prev_sample, **options
        )
        close(ours[1], t.log_prob, FLOAT32[2])


@pytest.mark.parametrize(
    "case",
    [c for c in CASES if c["peer"] == "UniRL" and c["kind"] != "dance"],
    ids=lambda c: c["name"],
)
def test_miles(backend, case):
    """Its two laws are UniRL's; the sigmas come with the transition."""
    t = tensors(case)
    own = miles.FlowSdeStepBackend() if case["kind"] == "flow" else miles.CpsSdeStepBackend()
    batch = len(t.sample)
    sigma_max = torch.as_tensor(case.get("sigma_max", t.sigmas[1])).expand(batch)
    options = {
        "prev_sample": t.prev_sample, "noise_level": case["noise_level"],
        "sigmas": t.sigma.expand(batch), "next_sigmas": t.sigma_next.expand(batch),
        "sigma_max": sigma_max,
    }  # fmt: skip
    replay(lambda v: own.sde_step_logprob(v, t.sample, **options), t, case)
    x, log_prob, mean, std_dev = own.sde_step_logprob(t.velocity, t.sample, **options)
    assert torch.equal(x, t.prev_sample) and std_dev.shape == (batch, *[1] * (x.ndim - 1))
    close(mean, t.mean, FLOAT32[1])
    close(log_prob, t.log_prob, bounds(case)[2])
