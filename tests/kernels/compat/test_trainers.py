"""The drop-ins in other trainers: patching, storage, laws without vectors, bad input."""

from __future__ import annotations

import inspect
import math
import sys
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace

import pytest
import torch
from test_compat import CountOps

from flowgrpo_kernels import flow_sde, log_prob, transition_rows
from flowgrpo_kernels.compat import (
    flow_factory,
    flow_grpo,
    miles,
    mixgrpo,
    precise,
    steps,
    tables,
    unirl,
    verl_omni,
)
from support.kernels import oracle

SIGMAS = torch.tensor(oracle.SIGMAS)
TIMESTEPS = SIGMAS[:-1] * 1000


@dataclass
class SDESchedulerOutput:
    """As Flow-Factory's."""

    next_latents: torch.Tensor | None = None
    log_prob: torch.Tensor | None = None
    std_dev_t: torch.Tensor | None = None


class FlowMatchEulerDiscreteSDEScheduler:
    """As much of Flow-Factory's scheduler as a step reads."""

    sigmas, timesteps = SIGMAS, TIMESTEPS
    is_eval, dynamics_type, noise_level = False, "Flow-SDE", 0.7
    current_sde_steps = torch.tensor([1, 3])

    def step(self, noise_pred, timestep, latents, next_latents=None, timestep_next=None,
             generator=None, noise_level=None, compute_log_prob=True, return_dict=True,
             return_kwargs=(), dynamics_type=None, sigma_max=None):  # fmt: skip
        return "theirs"


class UniPCMultistepSDEScheduler(FlowMatchEulerDiscreteSDEScheduler):
    pass


class FlowMatchSDEDiscreteScheduler:
    sigmas, timesteps, step_index = SIGMAS, TIMESTEPS, 3

    def sample_previous_step(
        self, sample, model_output, timestep=None, generator=None, per_token_timesteps=None,
        noise_level=0.7, prev_sample=None, sde_type="sde", return_logprobs=True,
        return_sqrt_dt=False,
    ):  # fmt: skip
        return "theirs"


class StepStrategy:
    def denoise(self, noise_pred, sample, sigma, sigma_next, *, eta=1.0, prev_sample=None,
                generator=None, sigma_max=0.99, step_index=0):  # fmt: skip
        return "theirs"


class FlowSDEStrategy(StepStrategy):
    canonical_name = "flow"


class DanceSDEStrategy(StepStrategy):
    canonical_name = "dance"


def flow_grpo_step(v, t, x, x_prev=None, **options):
    own = SimpleNamespace(sigmas=SIGMAS, timesteps=TIMESTEPS)
    return flow_grpo.sde_step_with_logprob(own, v, t, x, prev_sample=x_prev, **options)


def test_storage_of_pipelines_that_cast_afterwards():
    """float32 in, bfloat16 stored: with storage= the first ratio is 1, without it is not."""
    b = oracle.batch(4)
    t, x = TIMESTEPS[b.step], b.sample.bfloat16().float()
    for storage, exact in ((torch.bfloat16, True), (None, False)):
        out, lp, _, _ = flow_grpo_step(b.velocity, t, x, storage=storage)
        assert out.dtype == torch.float32
        stored = out.bfloat16().float()
        replay = flow_grpo_step(b.velocity, t, x, stored)[1]
        assert torch.equal(replay, lp) == exact
    with pytest.raises(TypeError, match="storage must be float32, bfloat16, float16 or None"):
        flow_grpo_step(b.velocity, t, x, storage=torch.float64)
    module = ModuleType("flux_pipeline_with_logprob")
    module.sde_step_with_logprob = lambda self, model_output, timestep, sample: None
    own = SimpleNamespace(sigmas=SIGMAS, timesteps=TIMESTEPS)
    with flow_grpo.patch(module, storage=torch.bfloat16):
        out, lp, *_ = module.sde_step_with_logprob(own, b.velocity, t, x)
        assert torch.equal(out.bfloat16().float(), out)
    with pytest.raises(TypeError, match=r"patch has the options .*storage.* got dtype"):
        flow_grpo.patch(module, dtype=torch.bfloat16)


def test_ode_step():
    """x + dt v, scored around x + dt v_mean, and differentiable in v_mean alone."""
    b, own = oracle.batch(4), SimpleNamespace(sigmas=SIGMAS, timesteps=TIMESTEPS)
    v_mean = b.old.clone().requires_grad_()
    x, lp, mean, std, sqrt_dt = flow_grpo.ode_step_with_logprob(
        own, b.velocity, v_mean, TIMESTEPS[b.step], b.sample, 0.7, return_sqrt_dt=True
    )
    s, p = (SIGMAS.double()[i].view(-1, 1, 1, 1) for i in (b.step, b.step + 1))
    dt, wide = p - s, [y.double() for y in (b.sample, b.velocity, v_mean)]
    assert oracle.error(x, wide[0] + dt * wide[1]) < 1e-6
    assert oracle.error(mean, wide[0] + dt * wide[2]) < 1e-6
    want = -((x.double() - wide[0] - dt * wide[2]) ** 2).flatten(1).mean(1)
    assert oracle.error(lp, want) < 1e-6
    assert oracle.error(sqrt_dt, (-dt).sqrt()) < 1e-6
    assert torch.equal(std, flow_grpo_step(b.velocity, TIMESTEPS[b.step], b.sample, x)[3])
    (got,) = torch.autograd.grad(lp.sum(), v_mean, retain_graph=True)
    (exact,) = torch.autograd.grad(want.sum(), v_mean)
    torch.testing.assert_close(got, exact, rtol=1e-4, atol=1e-8)
    again = flow_grpo.ode_step_with_logprob(
        own, b.velocity, v_mean, TIMESTEPS[b.step], b.sample, prev_sample=x
    )
    assert torch.equal(again[1], lp) and torch.equal(again[0], x)


def test_wan_step():
    """S = s_min + (s_max - s_min) sigma; determistic scores the ODE step under the SDE."""
    b = oracle.batch(4, (2, 3, 4, 5))
    own = SimpleNamespace(sigmas=SIGMAS, timesteps=(SIGMAS[:-1] * 1000).long())
    t = own.timesteps[b.step]
    noise = torch.randn(b.sample.shape, generator=torch.Generator().manual_seed(5)).double()
    s, p = (SIGMAS.double()[i].view(-1, 1, 1, 1, 1) for i in (b.step, b.step + 1))
    std, dt = SIGMAS.double()[1] * s, p - s
    x, v = b.sample.double(), b.velocity.double()
    mean = x * (1 + std**2 / (2 * s) * dt) + v * (1 + std**2 * (1 - s) / (2 * s)) * dt
    c = std * (-dt).sqrt()

    def exact(x_prev):
        square = (x_prev.double() - mean) ** 2 / (2 * c**2)
        return (-square - c.log() - 0.5 * math.log(2 * math.pi)).flatten(1).mean(1)

    generator = torch.Generator().manual_seed(5)
    call = flow_grpo.wan_step_with_logprob
    out = call(own, b.velocity, t, b.sample, generator=generator, return_dt_and_std_dev_t=True)
    for got, want, bound in zip(
        out, (mean + c * noise, exact(out[0]), mean, std, (-dt).sqrt()),
        (2e-6, 1e-5, 1e-6, 1e-6, 1e-6), strict=True,
    ):  # fmt: skip
        assert oracle.error(got, want) < bound
    quiet = call(own, b.velocity, t, b.sample, out[0], determistic=True)
    assert oracle.error(quiet[0], x + dt * v) < 1e-6
    assert oracle.error(quiet[1], exact(quiet[0])) < 1e-4
    assert oracle.error(quiet[3], c) < 1e-6


def test_a_patch_compares_signatures():
    """Wan's function gets Wan's law; one that is neither is refused before the first call."""
    wan, plain, other, ode = (ModuleType(name) for name in ("wan", "plain", "other", "ode"))
    wan.sde_step_with_logprob = lambda self, model_output, timestep, sample, prev_sample=None, \
        generator=None, determistic=False, return_pixel_log_prob=False: None  # fmt: skip
    plain.sde_step_with_logprob = lambda self, model_output, timestep, sample: None
    other.sde_step_with_logprob = lambda self, latents, t: None
    ode.sde_step_with_logprob = plain.sde_step_with_logprob
    ode.ode_step_with_logprob = lambda self, model_output, mean_model_output, timestep, sample: None
    with flow_grpo.patch(wan, plain, ode):
        assert wan.sde_step_with_logprob is flow_grpo.wan_step_with_logprob
        assert plain.sde_step_with_logprob is flow_grpo.sde_step_with_logprob
        assert ode.ode_step_with_logprob is flow_grpo.ode_step_with_logprob
    before = other.sde_step_with_logprob
    with pytest.raises(
        ValueError, match=r"sde_step_with_logprob of other is not the one .*: its argument latents"
    ):
        flow_grpo.patch(plain, other)
    # All or nothing.
    assert other.sde_step_with_logprob is before
    assert plain.sde_step_with_logprob is ode.sde_step_with_logprob
    for theirs, message in (
        (lambda self, model_output: None, "it has no argument timestep"),
        (lambda model_output, self, timestep, sample: None, "argument 1 is model_output, expected"),
        (lambda *args: None, r"it takes \*args"),
        (len, "its argument obj"),
    ):
        other.sde_step_with_logprob = theirs
        with pytest.raises(ValueError, match=message):
            flow_grpo.patch(other)
    for compat in (mixgrpo, flow_factory, verl_omni, unirl, precise):
        with pytest.raises(ValueError, match=r"empty|CLASS|has n"):
            compat.patch(ModuleType("empty"))
        with pytest.raises(ValueError, match="give the modules whose"):
            compat.patch()


def test_classes_are_patched_and_put_back():
    theirs = FlowMatchEulerDiscreteSDEScheduler.step
    module = ModuleType("flow_factory.scheduler")
    module.FlowMatchEulerDiscreteSDEScheduler = FlowMatchEulerDiscreteSDEScheduler
    module.UniPCMultistepSDEScheduler = UniPCMultistepSDEScheduler
    with flow_factory.patch(module):
        assert FlowMatchEulerDiscreteSDEScheduler.step is flow_factory.step
        unipc = UniPCMultistepSDEScheduler()
        unipc.is_eval = True
        assert unipc.step(None, None, None) == "theirs"
    assert FlowMatchEulerDiscreteSDEScheduler.step is theirs
    assert "step" not in vars(UniPCMultistepSDEScheduler)
    strategies = ModuleType("kernels")
    strategies.FlowSDEStrategy, strategies.DanceSDEStrategy = FlowSDEStrategy, DanceSDEStrategy
    with unirl.patch(strategies):
        assert (
            FlowSDEStrategy.denoise is unirl.denoise and StepStrategy.denoise is not unirl.denoise
        )
    assert "denoise" not in vars(FlowSDEStrategy)
    with pytest.raises(ValueError, match="StepStrategy must be one of"):
        unirl.patch(StepStrategy)
    b = oracle.batch(2)
    with verl_omni.patch(FlowMatchSDEDiscreteScheduler, seeds=b.seeds):
        own = FlowMatchSDEDiscreteScheduler()
        x, lp, _, std = own.sample_previous_step(b.sample, b.velocity)
        again = own.sample_previous_step(b.sample, b.velocity)
        assert torch.equal(x, again[0]) and std.ndim == 0
    want = log_prob(b.velocity, b.sample, x, flow_sde(oracle.SIGMAS), 3)
    torch.testing.assert_close(lp, want, rtol=1e-6, atol=1e-6)
    assert own.sample_previous_step(None, None) == "theirs"


def test_flow_factory_infers_the_noise_level_and_returns_its_own_class():
    b, own = oracle.batch(3), FlowMatchEulerDiscreteSDEScheduler()
    t = TIMESTEPS[[1, 2, 3]]
    keywords = ["next_latents", "log_prob", "std_dev_t"]
    out = flow_factory.step(own, b.velocity, t, b.sample, seeds=b.seeds, return_kwargs=keywords)
    assert type(out) is SDESchedulerOutput
    assert out.std_dev_t.flatten().gt(0).tolist() == [True, False, True]
    assert out.log_prob.ne(0).tolist() == [True, False, True]
    levels = torch.tensor([0.7, 0.0, 0.7])
    same = flow_factory.step(
        own, b.velocity, t, b.sample, out.next_latents, noise_level=levels, return_kwargs=keywords
    )
    torch.testing.assert_close(same.log_prob, out.log_prob, rtol=1e-6, atol=1e-6)
    pair = flow_factory.step(
        own, b.velocity, t, b.sample, out.next_latents, SIGMAS[[2, 3, 4]] * 1000,
        return_kwargs=keywords,
    )  # fmt: skip
    torch.testing.assert_close(pair.log_prob, out.log_prob, rtol=2e-4, atol=1e-5)
    assert sys.modules[__name__].SDESchedulerOutput is SDESchedulerOutput
    own.is_eval = True
    quiet = flow_factory.step(own, b.velocity, t, b.sample, return_dict=False)
    assert quiet[4].eq(0).all() and torch.equal(quiet[0], quiet[1]) and quiet[3].eq(0).all()


def test_the_noise_is_the_generator_of_the_peer():
    """One for all, one a sample, and the dtype that theirs draws in."""
    b = oracle.batch(3, (2, 5))
    g = torch.Generator
    want = torch.randn(3, 2, 5, generator=g().manual_seed(1))
    assert torch.equal(steps.draw(b.sample, g().manual_seed(1)), want)
    assert torch.equal(steps.draw(b.sample, [g().manual_seed(1)]), want)
    rows = [torch.randn(1, 2, 5, generator=g().manual_seed(i)) for i in range(3)]
    each = steps.draw(b.sample, [g().manual_seed(i) for i in range(3)])
    assert torch.equal(each, torch.cat(rows))
    low = steps.draw(b.sample, g().manual_seed(1), torch.bfloat16)
    assert low.dtype == torch.bfloat16


def flow_factory_step(v, t, x, level):
    own = FlowMatchEulerDiscreteSDEScheduler()
    results = flow_factory.step(own, v, t, x, x, noise_level=level, return_dict=False)
    return results[3], results[1]


# (log_prob, mean) of a replay.
CALLS = {
    "flow_grpo": lambda v, t, x, level: flow_grpo_step(v, t, x, x)[1:3],
    "flow_factory": flow_factory_step,
    "verl_omni": lambda v, t, x, level: verl_omni.sample_previous_step(
        FlowMatchSDEDiscreteScheduler(), x, v, t, noise_level=level, prev_sample=x
    )[1:3],
    "miles": lambda v, t, x, level: miles.FlowSdeStepBackend(
        SimpleNamespace(sigmas=SIGMAS, timesteps=TIMESTEPS)
    ).sde_step_logprob(v, t, t, x, prev_sample=x, noise_level=level)[1:3],
}


@pytest.mark.parametrize("name", CALLS)
def test_timesteps_on_a_device_that_is_not_read(backend, name, monkeypatch):
    """As on a GPU: no value comes back, and an unknown timestep or NaN level poisons its row."""
    b, call = oracle.batch(3), CALLS[name]
    levels = 0.7 if name == "flow_grpo" else torch.tensor([0.7, 0.7, 0.7])
    t = TIMESTEPS[[1, 4, 6]]
    want = call(b.velocity, t, b.sample, levels)
    unknown = t.clone()
    unknown[1] = 3.25
    with pytest.raises(ValueError, match="timestep must be among the scheduler's timesteps, got"):
        call(b.velocity, unknown, b.sample, levels)
    for module in (tables, sys.modules["flowgrpo_kernels.transition_rows"]):
        monkeypatch.setattr(module, "readable", lambda x: False)
    with CountOps() as mode:
        got = call(b.velocity, t, b.sample, levels)
    assert "_local_scalar_dense.default" not in mode.names
    for x, y in zip(got, want, strict=True):
        assert torch.equal(x, y)
    one = [False, True, False]
    bad = [call(b.velocity, unknown, b.sample, levels)]
    if name != "flow_grpo":
        levels = torch.tensor([0.7, math.nan, 0.7])
        bad.append(call(b.velocity, t, b.sample, levels))
    for score, mean in bad:
        assert score.isnan().tolist() == one and mean.isnan().flatten(1).all(1).tolist() == one
        assert torch.equal(score[::2], want[0][::2])


def test_sigma_pairs_that_ascend():
    b = oracle.batch(2)
    s, p = torch.tensor([0.9, 0.4]), torch.tensor([0.8, 0.7])
    own = FlowSDEStrategy()
    backend = miles.CpsSdeStepBackend(sde_timestep_divisor=1000.0)
    for call in (
        lambda: unirl.denoise(own, b.velocity, b.sample, s, p, eta=0.7, prev_sample=b.old),
        lambda: backend.sde_step_logprob(
            b.velocity, s * 1000, p * 1000, b.sample, prev_sample=b.old, noise_level=0.7
        ),
        lambda: flow_factory.step(
            FlowMatchEulerDiscreteSDEScheduler(), b.velocity, s * 1000, b.sample, b.old, p * 1000,
            noise_level=0.7,
        ),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=r"sigma_next must be below sigma.* in row 1$"):
            call()
    with pytest.raises(ValueError, match=r"noise_level of flow_sde must be finite .* got nan"):
        unirl.denoise(own, b.velocity, b.sample, s, s / 2, eta=math.nan, prev_sample=b.old)


def test_miles_takes_both_forms():
    """By the carried sigmas and by timesteps, with the second sigma where a first one is near 1."""
    b = oracle.batch(3)
    scheduler = SimpleNamespace(sigmas=SIGMAS, timesteps=TIMESTEPS)
    options = {"prev_sample": b.old, "noise_level": 0.7}
    s, p = SIGMAS[b.step], SIGMAS[b.step + 1]
    by_sigma = miles.FlowSdeStepBackend().sde_step_logprob(
        b.velocity, b.sample, sigmas=s, next_sigmas=p, sigma_max=SIGMAS[1].expand(3), **options
    )
    t = TIMESTEPS[b.step]
    by_time = miles.FlowSdeStepBackend(scheduler).sde_step_logprob(
        b.velocity, t, t, b.sample, **options
    )
    for x, y in zip(by_sigma, by_time, strict=True):
        assert torch.equal(x, y)
    cps = miles.CpsSdeStepBackend(None, sde_timestep_divisor=1000.0)
    one = cps.sde_step_logprob(b.velocity, s * 1000, p * 1000, b.sample, **options)
    two = cps.sde_step_logprob(
        b.velocity, b.sample, sigmas=s, next_sigmas=p, sigma_max=torch.full((3,), math.nan),
        **options,
    )  # fmt: skip
    torch.testing.assert_close(one[1], two[1], rtol=1e-5, atol=1e-6)
    near = torch.tensor([0.999993])
    _, _, _, std = miles.FlowSdeStepBackend().sde_step_logprob(
        b.velocity[:1], b.sample[:1], prev_sample=b.old[:1], noise_level=0.7, sigmas=near,
        next_sigmas=torch.tensor([0.990818]), sigma_max=torch.tensor([0.990818]),
    )  # fmt: skip
    assert std.item() == pytest.approx(0.7 * math.sqrt(0.999993 / (1 - 0.990818)), rel=1e-5)
    with pytest.raises(TypeError, match="takes model_output and then sample, got 3 tensors"):
        miles.FlowSdeStepBackend().sde_step_logprob(
            b.velocity, t, t, b.sample, sigmas=s, next_sigmas=p, sigma_max=p, **options
        )
    with pytest.raises(TypeError, match="scheduler must have the tensors sigmas and timesteps"):
        miles.FlowSdeStepBackend().sde_step_logprob(b.velocity, t, t, b.sample, **options)


@pytest.mark.parametrize("law", ["flow_sde", "cps"])
def test_miles_layers(law):
    """Mean and deviations by their formulas in float64; together they are the one pass."""
    b = oracle.batch(3)
    backend = {"flow_sde": miles.FlowSdeStepBackend, "cps": miles.CpsSdeStepBackend}[law]()
    s, p = SIGMAS[[0, 3, 5]], SIGMAS[[1, 4, 6]]
    pair = {"sigmas": s, "next_sigmas": p, "sigma_max": SIGMAS[1].expand(3)}
    view = (3, *[1] * (b.sample.ndim - 1))
    mean, std, std_dev = backend.prev_sample_mean_and_std(
        b.velocity, b.sample, s.view(view), p.view(view), noise_level=0.7,
        sigma_max=SIGMAS[1].view([1] * b.sample.ndim),
    )  # fmt: skip
    sd, pd = (x.double().view(view) for x in (s, p))
    x, v = b.sample.double(), b.velocity.double()
    if law == "flow_sde":
        spread = 0.7 * (sd / (1 - torch.where(sd == 1, SIGMAS[1].double(), sd))).sqrt()
        want = x * (1 + spread**2 / (2 * sd) * (pd - sd))
        want = want + v * (1 + spread**2 * (1 - sd) / (2 * sd)) * (pd - sd)
        noise = spread * (sd - pd).sqrt()
    else:
        spread = noise = pd * math.sin(0.35 * math.pi)
        want = (x - sd * v) * (1 - pd) + (x + v * (1 - sd)) * (pd**2 - spread**2).sqrt()
    for ours, exact in ((mean, want), (std, noise), (std_dev, spread)):
        assert ours.dtype == torch.float32 and ours.shape == exact.shape
        torch.testing.assert_close(ours.double(), exact, rtol=1e-5, atol=1e-5)
    velocity = b.velocity.clone().requires_grad_()
    _, score, one_pass, _ = backend.sde_step_logprob(
        velocity, b.sample, prev_sample=b.old, noise_level=0.7, **pair
    )
    assert torch.equal(one_pass, mean)
    mean = mean.detach().requires_grad_()
    by_layer = backend.log_prob(b.old, mean, std)
    torch.testing.assert_close(by_layer, score, rtol=1e-5, atol=1e-5)
    weight = torch.tensor([1.0, -2.0, 0.5])
    (grad,) = torch.autograd.grad((by_layer * weight).sum(), mean)
    elements = b.sample[0].numel()
    k = 1 / noise**2 if law == "flow_sde" else 2.0
    exact = k * (b.old.double() - want) * weight.double().view(view) / elements
    torch.testing.assert_close(grad.double(), exact, rtol=1e-4, atol=1e-4 * exact.abs().max())
    assert torch.equal(backend.log_prob(b.old, mean, torch.zeros(1)), torch.zeros(3))
    if law == "flow_sde":
        assert backend.log_prob(b.old, mean, std * torch.tensor(math.nan)).isnan().all()


def test_miles_layers_that_are_overridden():
    b = oracle.batch(3)
    scheduler = SimpleNamespace(sigmas=SIGMAS, timesteps=TIMESTEPS)
    t, options = TIMESTEPS[b.step], {"prev_sample": b.old, "noise_level": 0.7}
    s, p = (SIGMAS[b.step + i].view(3, *[1] * (b.sample.ndim - 1)) for i in range(2))

    class Halved(miles.FlowSdeStepBackend):
        def log_prob(self, prev_sample, prev_mean, noise_std):
            return super().log_prob(prev_sample, prev_mean, noise_std) / 2

    class Still(miles.FlowSdeStepBackend):
        # The earlier form, which knows no sigma_max.
        def prev_sample_mean_and_std(self, model_output, sample, sigma, sigma_prev, *, noise_level):
            assert torch.equal(sigma, s) and torch.equal(sigma_prev, p)
            return sample, torch.ones_like(sigma), torch.ones_like(sigma)

    own = miles.FlowSdeStepBackend(scheduler)
    theirs = own.sde_step_logprob(b.velocity, t, t, b.sample, **options)
    pair = {"sigmas": s.flatten(), "next_sigmas": p.flatten(), "sigma_max": SIGMAS[1]}
    for halved in (
        Halved(scheduler).sde_step_logprob(b.velocity, t, t, b.sample, **options),
        Halved().sde_step_logprob(b.velocity, b.sample, **pair, **options),
    ):
        torch.testing.assert_close(halved[1], theirs[1] / 2, rtol=1e-5, atol=1e-5)
        assert torch.equal(halved[2], theirs[2]) and torch.equal(halved[3], theirs[3])
    still = Still(scheduler).sde_step_logprob(b.velocity, t, t, b.sample, **options)
    square = (b.old - b.sample).double().square().flatten(1).mean(1)
    exact = -square / 2 - 0.5 * math.log(2 * math.pi)
    torch.testing.assert_close(still[1].double(), exact, rtol=1e-5, atol=1e-5)
    with pytest.raises(TypeError, match="scheduler must have the tensors sigmas and timesteps"):
        Halved().sde_step_logprob(b.velocity, t, t, b.sample, **options)


def test_rows_of_pairs_that_were_seen_before(monkeypatch):
    """Looked up, in any order and among new ones, they are the rows of transition_rows, bit for
    bit; what is no sigma pair is refused each time."""
    monkeypatch.setattr(tables, "seen_rows", {})
    calls = []
    monkeypatch.setattr(
        tables, "transition_rows", lambda *a, **o: calls.append(a) or transition_rows(*a, **o)
    )
    s, p = SIGMAS[:-1], SIGMAS[1:]
    levels = torch.tensor([0.6, 0.7], dtype=torch.float64)

    def taken(index, level, second=SIGMAS[1], **options):
        index = torch.tensor(index, dtype=torch.int64)
        table, step = tables.rows_of_pairs(
            "sigma", "flow_sde", s[index], p[index], level, second, index.numel(), **options
        )
        made = transition_rows("flow_sde", s[index], p[index], level, sigma_max=second, **options)
        assert torch.equal(table[step], made.table)
        return len(calls)

    assert taken([0, 3, 3, 5], 0.7) == 1 and taken([5, 0, 3], 0.7) == 1
    assert taken([3, 4], 0.7) == 2 and taken([4, 0], 0.7) == 2 and taken([2], 0.7) == 3
    assert taken([4, 0], 0.6) == 4 and taken([4, 0], levels) == 4
    assert taken([4, 0], 0.7, SIGMAS[2]) == 5 and taken([4, 0], 0.7, near_one=1e-5) == 6
    assert taken([0, 1], 0.7, noise_step=3) == 7 and taken([1, 0], 0.7, noise_step=3) == 7
    with torch.inference_mode():
        assert taken([1, 6], 0.7) == 8
    table, step = tables.rows_of_pairs("s", "flow_sde", s[1], p[1], 0.7, SIGMAS[1], 2)
    assert not table.is_inference() and not step.is_inference() and step.shape == (2,)
    assert taken([], 0.7) == 9
    # Beyond its bound it begins anew.
    monkeypatch.setattr(tables.SeenRows, "most", 3)
    assert taken([0, 1, 2], 0.7, SIGMAS[3]) == 10 and taken([2, 1], 0.7, SIGMAS[3]) == 10
    assert taken([6], 0.7, SIGMAS[3]) == 11 and taken([0], 0.7, SIGMAS[3]) == 12
    for _ in range(2):
        with pytest.raises(ValueError, match="sigma_next must be below sigma"):
            tables.rows_of_pairs("s", "flow_sde", p[:1], s[:1], 0.7, SIGMAS[1], 1)
        with pytest.raises(TypeError, match=r"sigma must be floating point, got torch\.int64"):
            tables.rows_of_pairs("s", "flow_sde", s[:1].long(), p[:1], 0.7, SIGMAS[1], 1)
        with pytest.raises(ValueError, match="s must hold 1 or 3 values, got 2"):
            tables.rows_of_pairs("s", "flow_sde", s[:2], p[:2], 0.7, SIGMAS[1], 3)
        with pytest.raises(
            ValueError, match=r"sigma_next must be 0-dim, \[1\] or \[2\], got \[3\]"
        ):
            tables.rows_of_pairs("s", "flow_sde", s[:2], p[:3], 0.7, SIGMAS[1], 2)


def test_a_table_goes_with_its_tensor():
    sigmas = SIGMAS.clone()
    assert tables.cached(sigmas, "key", lambda: [1]) is tables.cached(sigmas, "key", list)
    sigmas[-1] = 0.001
    assert tables.cached(sigmas, "key", lambda: [2]) == [2]
    owner = id(sigmas)
    assert owner in tables.kept_tables
    del sigmas
    assert owner not in tables.kept_tables


def test_mixgrpo_in_a_window():
    """cps, an index on the device, seeds, and no noise without the SDE solver."""
    b = oracle.batch(3)
    for sde_type in ("sde", "cps"):
        given = (b.velocity, b.sample, 0.7, SIGMAS)
        one = mixgrpo.flow_grpo_step(*given, 4, None, sde_type=sde_type, seeds=b.seeds)
        rows = mixgrpo.flow_grpo_step(
            *given, torch.tensor([4, 4, 4]), None, sde_type=sde_type, seeds=b.seeds
        )
        for x, y in zip(one[:4], rows[:4], strict=True):
            assert torch.equal(x, y)
        assert one[4].ndim == 0 and torch.equal(rows[4].flatten(), one[4].expand(3))
        quiet = mixgrpo.dance_grpo_step(*given, 4, None, True, False, sde_type=sde_type)
        mean, clean = mixgrpo.dance_grpo_step(*given, 4, None, False, False, sde_type=sde_type)
        assert torch.equal(quiet[0], mean) and torch.equal(quiet[1], clean)
    with pytest.raises(ValueError, match="sde_type must be one of"):
        mixgrpo.flow_grpo_step(*given, 4, None, sde_type="ode")
    with pytest.raises(ValueError, match="generator and prev_sample were both given"):
        mixgrpo.flow_grpo_step(*given, 4, b.old, torch.Generator())


def test_what_is_returned_may_be_written_to():
    """No result is a view of a table that serves the next step."""
    b, own = oracle.batch(2), FlowMatchSDEDiscreteScheduler()
    pair = {"sigmas": SIGMAS[:2], "next_sigmas": SIGMAS[1:3], "sigma_max": SIGMAS[1]}
    calls = (
        lambda: flow_grpo_step(b.velocity, TIMESTEPS[3], b.sample, b.old, return_sqrt_dt=True)[3:],
        lambda: verl_omni.sample_previous_step(own, b.sample, b.velocity, prev_sample=b.old)[3:],
        lambda: mixgrpo.flow_grpo_step(b.velocity, b.sample, 0.7, SIGMAS, 3, b.old)[4:],
        lambda: miles.FlowSdeStepBackend().sde_step_logprob(
            b.velocity, b.sample, prev_sample=b.old, noise_level=0.7, **pair
        )[3:],
        lambda: flow_factory.step(
            FlowMatchEulerDiscreteSDEScheduler(), b.velocity, TIMESTEPS[:2], b.sample, b.old,
            TIMESTEPS[1:3], noise_level=0.7, return_dict=False,
        )[4:],
    )  # fmt: skip
    for call in calls:
        before = [x.clone() for x in call()]
        for x in call():
            x.zero_()
        assert all(torch.equal(x, y) for x, y in zip(call(), before, strict=True))


def test_every_drop_in_says_what_differs():
    for compat in (flow_grpo, flow_factory, verl_omni, unirl, mixgrpo, miles, precise):
        assert "differs" in compat.__doc__ and "\n1. " in compat.__doc__
        if compat is not miles:
            assert "options:" in inspect.getdoc(compat.patch)
