"""The drop-ins beyond the vectors: shapes, generators, storage dtypes, switches, patch."""

from __future__ import annotations

import math
from types import ModuleType

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch.utils._python_dispatch import TorchDispatchMode

from flowgrpo_kernels import dance_sde, log_prob
from flowgrpo_kernels.compat import dance_grpo, flow_grpo
from flowgrpo_kernels.compat.dance_grpo import flux_step
from flowgrpo_kernels.compat.flow_grpo import sde_step_with_logprob
from support.kernels import oracle


@pytest.fixture
def scheduler():
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(10)
    return scheduler


def eager(scheduler, v, t, x, noise_level, x_prev, sde_type):
    """The peer's algebra in float64: (mean, log_prob, std_dev_t)."""
    i = (scheduler.timesteps[None] == t.reshape(-1, 1)).int().argmax(1)
    s, p = (scheduler.sigmas.double()[j].view(-1, *[1] * (x.ndim - 1)) for j in (i, i + 1))
    dt = p - s
    if sde_type == "cps":
        std = p * math.sin(noise_level * math.pi / 2)
        x0, x1 = x.double() - s * v, x.double() + (1 - s) * v
        mean = x0 * (1 - p) + x1 * (p**2 - std**2).clamp_min(0).sqrt()
        lp = -((x_prev.double() - mean) ** 2)
    else:
        inside = torch.where(s == 1, scheduler.sigmas[1].double(), s)
        std = (s / (1 - inside)).sqrt() * noise_level
        mean = x.double() * (1 + std**2 / (2 * s) * dt)
        mean = mean + v.double() * (1 + std**2 * (1 - s) / (2 * s)) * dt
        c = std * (-dt).sqrt()
        lp = -((x_prev.double() - mean) ** 2) / (2 * c**2) - c.log() - 0.5 * math.log(2 * math.pi)
    return mean, lp.flatten(1).mean(1), std


@pytest.mark.parametrize("sde_type", ["sde", "cps"])
@pytest.mark.parametrize("shape", [(3, 24, 24), (64, 16), (4, 3, 6, 10)], ids=str)
def test_sampling(scheduler, sde_type, shape):
    """Same noise from the same generator; per-row, single and plain-number timesteps."""
    b = oracle.batch(4, shape)
    rows = scheduler.timesteps[torch.tensor([0, 3, 5, 8])]
    for t in (rows, rows[1:2], rows[2], float(rows[2])):
        g = torch.Generator().manual_seed(3)
        x, lp, mean, std = sde_step_with_logprob(
            scheduler, b.velocity, t, b.sample, 0.7, generator=g, sde_type=sde_type
        )
        full = torch.as_tensor(t).reshape(-1)
        exact = eager(scheduler, b.velocity.double(), full, b.sample, 0.7, x, sde_type)
        noise = torch.randn(b.sample.shape, generator=torch.Generator().manual_seed(3)).double()
        i = (scheduler.timesteps[None] == full[:, None]).int().argmax(1)
        dt = (scheduler.sigmas[i] - scheduler.sigmas[i + 1]).double().view(-1, *[1] * len(shape))
        c = exact[2] * (1 if sde_type == "cps" else dt.sqrt())
        assert oracle.error(mean, exact[0]) < 1e-6
        assert oracle.error(x, exact[0] + c * noise) < 2e-6
        assert oracle.error(lp, exact[1]) < 1e-5 and std.shape[0] == full.shape[0]


def test_storage_dtype(scheduler):
    """A bfloat16 sample: x' is representable in bfloat16 and its replay gives the same log_prob."""
    b = oracle.batch(4, dtype=torch.bfloat16)
    t = scheduler.timesteps[b.step]
    x, lp, _, _ = sde_step_with_logprob(scheduler, b.velocity, t, b.sample)
    assert x.dtype == torch.float32 and torch.equal(x.bfloat16().float(), x)
    stored = x.bfloat16()
    replay = sde_step_with_logprob(scheduler, b.velocity, t, b.sample, prev_sample=stored)[1]
    assert torch.equal(lp, replay)
    args = (scheduler, b.velocity, t, b.sample)
    seeded = [sde_step_with_logprob(*args, seeds=b.seeds) for _ in range(2)]
    assert torch.equal(seeded[0][0], seeded[1][0]) and not torch.equal(seeded[0][0], x)
    peer = sde_step_with_logprob(
        scheduler, b.velocity, t, b.sample, seeds=b.seeds, peer_log_prob=True
    )
    assert not torch.equal(peer[0].bfloat16().float(), peer[0])
    assert torch.equal(peer[0].bfloat16().float(), seeded[0][0])


def test_float64_is_computed_in_float32(scheduler):
    """As theirs does: latents that a float64 pipeline stored."""
    b, t = oracle.batch(3), scheduler.timesteps[[0, 3, 5]]
    first = sde_step_with_logprob(
        scheduler, b.velocity.double(), t, b.sample.double(), seeds=b.seeds
    )
    again = sde_step_with_logprob(
        scheduler, b.velocity.double(), t, b.sample.double(), prev_sample=first[0].double()
    )
    expected = sde_step_with_logprob(scheduler, b.velocity, t, b.sample, seeds=b.seeds)
    for one, two, three in zip(first, again, expected, strict=True):
        assert one.dtype == torch.float32
        assert torch.equal(one, three) and torch.equal(two, three)


def test_peer_switch(scheduler):
    """peer_log_prob is the peer's value everywhere, also in the last cps step and its gradient."""
    b = oracle.batch(3)
    t = scheduler.timesteps[-1:]
    rest = {"prev_sample": b.old, "sde_type": "cps"}
    quiet = sde_step_with_logprob(scheduler, b.velocity, t, b.sample, 0.8, **rest)[1]
    v = b.velocity.double().float().requires_grad_()
    peer = sde_step_with_logprob(scheduler, v, t, b.sample, 0.8, peer_log_prob=True, **rest)[1]
    exact = eager(scheduler, b.velocity.double(), t, b.sample, 0.8, b.old, "cps")[1]
    assert quiet.eq(0).all() and oracle.error(peer, exact) < 1e-6
    peer.sum().backward()
    assert v.grad.abs().sum() > 0
    nan = sde_step_with_logprob(
        scheduler, b.velocity, t, b.sample, 0.0, prev_sample=b.old, peer_log_prob=True
    )
    assert not torch.isfinite(nan[1]).any()


def test_gradients(scheduler):
    """Also without prev_sample, where flow_grpo's log_prob is differentiable; mean always is."""
    b = oracle.batch(3)
    t = scheduler.timesteps[b.step]
    v = b.velocity.clone().requires_grad_()
    x, lp, mean, _ = sde_step_with_logprob(scheduler, v, t, b.sample, seeds=b.seeds)
    (lp.sum() + (mean**2).sum()).backward()
    w = b.velocity.clone().requires_grad_()
    _, lp2, mean2, _ = sde_step_with_logprob(scheduler, w, t, b.sample, prev_sample=x)
    assert torch.equal(lp, lp2)
    (lp2.sum() + (mean2**2).sum()).backward()
    assert torch.equal(v.grad, w.grad) and not x.requires_grad


class CountOps(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.__name__)
        return func(*args, **(kwargs or {}))


def test_cost_does_not_grow_with_the_batch(scheduler):
    """No op per row: the same calls for 1 row and for 32. The table is made once per schedule."""
    counts = []
    for rows in (1, 32, 32, 32):
        b = oracle.batch(rows)
        with CountOps() as mode:
            sde_step_with_logprob(scheduler, b.velocity, scheduler.timesteps[b.step], b.sample)
        counts.append(len(mode.names))
        assert "nonzero.default" not in mode.names
    # The first time that these steps come together, a tensor of their numbers is made.
    assert counts[3] == counts[2] <= counts[1] <= counts[0]
    scheduler.set_timesteps(4)
    t = scheduler.timesteps[:1]
    x, _, mean, _ = sde_step_with_logprob(scheduler, b.velocity, t, b.sample)
    exact = eager(scheduler, b.velocity.double(), t, b.sample, 0.7, x, "sde")[0]
    assert oracle.error(mean, exact) < 1e-6


def test_a_schedule_written_in_place_is_noticed():
    sigmas = torch.tensor(oracle.SIGMAS)
    v = x = torch.ones(1, 4)
    first = flux_step(v, x, 0.3, sigmas, 4, None, False, True)[0]
    sigmas[5] = 0.65
    assert not torch.equal(first, flux_step(v, x, 0.3, sigmas, 4, None, False, True)[0])


def test_flux_step_without_sde_solver():
    b = oracle.batch(3)
    sigmas = torch.tensor(oracle.SIGMAS)
    args = (b.velocity, b.sample, 0.3, sigmas, 4)
    x, x0, lp = flux_step(*args, None, True, False, seeds=b.seeds)
    s, p = oracle.SIGMAS[4:6]
    c = 0.3 * math.sqrt(s - p)
    mean = b.sample.double() + (p - s) * b.velocity.double()
    square = (x.double() - mean) ** 2 / (2 * c**2)
    exact = (-square - math.log(c) - 0.5 * math.log(2 * math.pi)).flatten(1).mean(1)
    assert oracle.error(lp, exact) < 4e-6
    assert oracle.error(x0, b.sample.double() - s * b.velocity.double()) < 1e-6
    v = b.velocity.requires_grad_()
    assert torch.equal(flux_step(v, b.sample, 0.3, sigmas, 4, x, True, False)[2], lp)
    replay = flux_step(v, b.sample, 0.3, sigmas, 4, x, True, True)[2]
    assert torch.equal(replay, log_prob(v, b.sample, x, dance_sde(sigmas, 0.3), 4))


def flow_grpo_step(self, model_output, timestep, sample, noise_level=0.7, prev_sample=None):
    """As flow_grpo had it in its first months."""


def dance_grpo_step(model_output, latents, eta, sigmas, index, prev_sample, grpo, sde_solver):
    """As DanceGRPO has it."""


THEIRS = {"sde_step_with_logprob": flow_grpo_step, "flux_step": dance_grpo_step}


@pytest.mark.parametrize("compat", [flow_grpo, dance_grpo])
def test_patch_and_revert(compat):
    name = "sde_step_with_logprob" if compat is flow_grpo else "flux_step"
    theirs, modules = THEIRS[name], [ModuleType("a"), ModuleType("b")]
    for module in modules:
        setattr(module, name, theirs)
    with compat.patch(*modules):
        assert all(getattr(m, name) is getattr(compat, name) for m in modules)
    assert all(getattr(m, name) is theirs for m in modules)
    with pytest.raises(KeyError), compat.patch(modules[0]):
        raise KeyError
    assert getattr(modules[0], name) is theirs
    outer = compat.patch(modules[0], seeds=torch.arange(2))
    inner = compat.patch(modules[0])
    with pytest.raises(RuntimeError, match="revert the later"):
        outer.revert()
    inner.revert()
    outer.revert()
    outer.revert()
    assert getattr(modules[0], name) is theirs
    with pytest.raises(ValueError, match=name):
        compat.patch(ModuleType("empty"))
    with pytest.raises(ValueError, match="modules"):
        compat.patch()


def test_bad_input(scheduler):
    b = oracle.batch(3)
    with pytest.raises(ValueError, match="timestep must be among"):
        sde_step_with_logprob(scheduler, b.velocity, torch.tensor([3.25]), b.sample)
    with pytest.raises(ValueError, match="timestep must hold"):
        sde_step_with_logprob(scheduler, b.velocity, scheduler.timesteps[:2], b.sample)
    with pytest.raises(ValueError, match="sde_type"):
        sde_step_with_logprob(scheduler, b.velocity, 1.0, b.sample, sde_type="ode")
    with pytest.raises(ValueError, match="generator"):
        sde_step_with_logprob(
            scheduler,
            b.velocity,
            scheduler.timesteps[0],
            b.sample,
            generator=[torch.Generator()] * 2,
        )
