"""Transition tables against the peers' formulas; windows, concatenation, bad schedules."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from flowgrpo_kernels import (
    Transitions,
    cps,
    dance_sde,
    flow_sde,
    grpo_loss,
    log_prob,
    matching,
    ode,
    window,
)
from support.kernels import oracle


@pytest.mark.parametrize("noise_level", [0.3, 0.7, 1.0])
@pytest.mark.parametrize("kind", ["flow_sde", "dance_sde", "cps"])
def test_coefficients(kind, noise_level):
    transitions = oracle.MAKERS[kind](oracle.SIGMAS, noise_level)
    for i in range(transitions.num_steps):
        a, b, c, std, dt = oracle.gaussian(kind, noise_level, i)
        row = dict(zip(["A", "B", "C", "std_dev", "abs_dt"], [a, b, c, std, -dt], strict=True))
        for name, value in row.items():
            assert transitions.column(name)[i].item() == pytest.approx(value, rel=2e-7, abs=1e-30)
        assert transitions.column("sigma")[i].item() == pytest.approx(oracle.SIGMAS[i])
        assert transitions.column("noise_step")[i].item() == i
        if c == 0:
            continue
        k, c0 = (1, 0) if kind == "cps" else (0.5 / c**2, math.log(c * math.sqrt(2 * math.pi)))
        assert transitions.column("k")[i].item() == pytest.approx(k, rel=2e-7)
        assert transitions.column("c0")[i].item() == pytest.approx(c0, rel=2e-6, abs=1e-7)
        assert transitions.column("K")[i].item() == pytest.approx(0.5 / std**2, rel=2e-7)


def test_gaussian_kl_divides_by_the_step():
    std, gauss = flow_sde(oracle.SIGMAS), flow_sde(oracle.SIGMAS, kl="gaussian")
    expected = std.column("K") / std.column("abs_dt")
    torch.testing.assert_close(gauss.column("K"), expected, rtol=1e-6, atol=0)
    assert torch.equal(cps(oracle.SIGMAS).table, cps(oracle.SIGMAS, kl="gaussian").table)


def test_first_step_uses_the_second_sigma():
    """At sigma = 1 flow_grpo puts sigma_1 inside 1 - sigma; elsewhere nothing changes."""
    whole, tail = flow_sde(oracle.SIGMAS), flow_sde(oracle.SIGMAS[1:])
    assert torch.equal(whole.table[1:, :7], tail.table[:, :7])
    assert whole.column("std_dev")[0].item() == pytest.approx(0.7 * math.sqrt(1 / 0.04), rel=1e-6)


@pytest.mark.parametrize("make", [flow_sde, dance_sde, cps])
def test_noiseless_rows_are_quiet(make):
    table = make(oracle.SIGMAS, 0.0)
    for name in ("C", "k", "c0", "K"):
        assert not table.column(name).any()
    if make is not cps:
        torch.testing.assert_close(table.table[:, :2], ode(oracle.SIGMAS).table[:, :2])
    # The last step of cps ends at sigma 0, where it has no noise at any level.
    assert cps(oracle.SIGMAS, 0.8).table[-1, 2:6].eq(0).all()


def test_cps_preserves_coefficients():
    """x = (1 - s) data + s noise steps to (1 - s') data plus noise of total size s'."""
    for a in (0.2, 0.8):
        table = cps(oracle.SIGMAS, a).table.double()
        s = torch.tensor(oracle.SIGMAS, dtype=torch.float64)
        data = table[:, 0] * (1 - s[:-1]) - table[:, 1]
        noise = torch.hypot(table[:, 0] * s[:-1] + table[:, 1], table[:, 2])
        torch.testing.assert_close(data, 1 - s[1:], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(noise, s[1:], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "sigmas",
    [
        list(oracle.SIGMAS),
        np.array(oracle.SIGMAS),
        torch.tensor(oracle.SIGMAS, dtype=torch.float64),
    ],
)
def test_any_sequence(sigmas):
    transitions = flow_sde(sigmas)
    assert torch.equal(transitions.table, flow_sde(oracle.SIGMAS).table)
    assert transitions.sigmas.dtype == torch.float64 and transitions.num_steps == 9
    assert transitions.to("cpu") is transitions


def test_window_takes_rows_from_both():
    inside, outside = flow_sde(oracle.SIGMAS), ode(oracle.SIGMAS)
    mixed = window(inside, outside, steps=range(2, 5))
    for i in range(9):
        source = inside if 2 <= i < 5 else outside
        assert torch.equal(mixed.table[i], source.table[i]) and mixed.kinds[i] == source.kinds[i]
    assert torch.equal(window(inside, outside, []).table, outside.table)


def test_cat_keeps_the_noise_step():
    a, b = flow_sde(oracle.SIGMAS), ode(oracle.SIGMAS)
    both = Transitions.cat(a, b)
    assert both.num_steps == 18 and both.sigmas is None
    assert torch.equal(both.table, torch.cat([a.table, b.table]))
    assert both.column("noise_step").tolist() == [*range(9), *range(9)]
    assert both.kinds == ("flow_sde",) * 9 + ("ode",) * 9


@pytest.mark.parametrize(
    ("sigmas", "message"),
    [
        ([1.0], "T >= 1"),
        ([[1.0, 0.0]], "T >= 1"),
        ([1.0, 0.5, 0.5], "descending"),
        ([0.0, 1.0], "descending"),
        ([1000.0, 0.0], "inside"),
        ([1.0, float("nan")], "finite"),
        ([1.0, -0.1], "inside"),
    ],
)
@pytest.mark.parametrize("make", [flow_sde, dance_sde, cps, ode])
def test_bad_sigmas(make, sigmas, message):
    with pytest.raises(ValueError, match=f"sigmas.*{message}"):
        make(sigmas)


@pytest.mark.parametrize("make", [flow_sde, dance_sde, cps])
def test_bad_options(make):
    for level in (float("nan"), float("inf"), -0.1):
        with pytest.raises(ValueError, match="noise_level"):
            make(oracle.SIGMAS, level)
    with pytest.raises(TypeError, match="noise_level"):
        make(oracle.SIGMAS, "0.7")
    with pytest.raises(ValueError, match="kl"):
        make(oracle.SIGMAS, 0.7, "reverse")


def test_bad_windows_and_tables():
    a, b = flow_sde(oracle.SIGMAS), ode(oracle.SIGMAS)
    for steps, error in (([9], ValueError), ([-1], ValueError), ([1.5], TypeError)):
        with pytest.raises(error, match="steps"):
            window(a, b, steps)
    # Both count as an Iterable.
    for steps in (torch.tensor(1), np.array(1), 3):
        with pytest.raises(TypeError, match="steps must be integers, got"):
            window(a, b, steps)
    with pytest.raises(ValueError, match="inside and outside"):
        window(a, ode(oracle.SIGMAS[1:]), [0])
    with pytest.raises(ValueError, match="same sigmas"):
        window(a, ode([*oracle.SIGMAS[:-1], 0.1]), [0])
    with pytest.raises(ValueError, match="single schedules"):
        window(Transitions.cat(a, b), Transitions.cat(a, b), [0])
    bad = a.table.clone()
    bad[3, 1] = float("nan")
    with pytest.raises(ValueError, match="finite"):
        Transitions.from_table(bad, None, a.kinds)
    with pytest.raises(ValueError, match="columns"):
        Transitions.from_table(a.table[:, :6], None, a.kinds)


@pytest.mark.parametrize("make", [flow_sde, dance_sde, cps, ode])
def test_made_on_the_host_whatever_the_default_device(make):
    """Also where a model is being set up without memory."""
    expected = window(make(oracle.SIGMAS), ode(oracle.SIGMAS), [1, 4])
    with torch.device("meta"):
        for sigmas in (oracle.SIGMAS, torch.tensor(oracle.SIGMAS, device="cpu").double()):
            made = make(sigmas)
            assert {made.table.device.type, made.sigmas.device.type} == {"cpu"}
        made = window(make(oracle.SIGMAS), ode(oracle.SIGMAS), [1, 4])
    assert torch.equal(made.table, expected.table) and torch.equal(made.sigmas, expected.sigmas)


NEAR_ONE = [0.9999, 0.999, 1 - 1e-6, 1 - 2**-21]


@pytest.mark.parametrize("sigma", NEAR_ONE)
@pytest.mark.parametrize("position", [0, 1])
def test_a_pole_just_below_one_is_refused(sigma, position):
    """The error has sigma, its index, what C would be and what to do."""
    sigmas = [sigma, 0.5, 0.0] if position == 0 else [1.0, sigma, 0.5, 0.0]
    c = 0.7 * math.sqrt(sigma * (sigma - 0.5) / (1 - sigma))
    with pytest.raises(ValueError) as error:
        flow_sde(sigmas)
    text = str(error.value)
    assert text.startswith(f"sigmas[{position}] = {sigma:.9g} with the next sigma 0.5 gives")
    assert f"C = {c:.4g}" in text and "C <= 5" in text and "lower noise_level" in text
    assert ("begin at sigma = 1" in text) == (position == 0)
    # Neither a constant S nor cps has the pole.
    for make in (dance_sde, cps, ode):
        assert make(sigmas).column("C").max() < 1


def test_bounds_of_c_and_a():
    """C of the first step is noise_level; A of the last one of dance_sde 1 - noise_level^2 / 2."""
    assert flow_sde([1.0, 0.5, 0.0], 5.0).column("C")[0] == 5
    with pytest.raises(ValueError, match=r"sigmas\[0\] = 1 .*C = 5.01 .*; lower noise_level$"):
        flow_sde([1.0, 0.5, 0.0], 5.01)
    with pytest.raises(ValueError, match=r"sigmas\[0\] = 1 .*dance_sde C = 7.07.*shorten"):
        dance_sde([1.0, 0.5, 0.0], 10.0)
    assert dance_sde([0.01, 0.0], 5.0).column("A")[0] == -11.5
    with pytest.raises(ValueError, match=r"sigmas\[0\] = 0.01 .*A = -17"):
        dance_sde([0.01, 0.0], 6.0)


@pytest.mark.parametrize("ulp", [-4, -2, -1, 0, 2, 4])
@pytest.mark.parametrize("make", [flow_sde, dance_sde, cps, ode])
def test_a_first_sigma_within_rounding_of_one_is_one(make, ulp):
    exact, rounded = make([1.0, 0.5, 0.0]), make([1.0 + ulp * 2.0**-24, 0.5, 0.0])
    assert torch.equal(exact.table, rounded.table) and torch.equal(exact.sigmas, rounded.sigmas)
    if ulp < 0:
        assert torch.equal(make([1.0 - 6e-8, 0.5, 0.0]).table, exact.table)
    # Only the first: further down it is a pole, or no step.
    if make is flow_sde:
        with pytest.raises(ValueError, match=r"sigmas\[1\]"):
            make([1.0, 1.0 - 2.0**-24, 0.5])
    with pytest.raises(ValueError, match="inside"):
        make([1.0 + 2.0**-21, 0.5, 0.0])


@pytest.mark.slow
def test_float32_schedules_of_dance_grpo():
    """shift t / (1 + (shift - 1) t) in float32: no shift begins a schedule with a pole."""
    time, starts = torch.linspace(1, 0, 17), set()
    for shift in np.arange(1.01, 12.0, 0.01).round(2).tolist():
        sigmas = shift * time / (1 + (shift - 1) * time)
        starts.add((float(sigmas[0]) - 1) * 2**24)
        transitions = flow_sde(sigmas)
        assert transitions.sigmas[0] == 1
        assert transitions.column("C")[0].item() == pytest.approx(0.7, rel=1e-6)
    # These are the ones that the tolerance is there for.
    assert starts == {-2, -1, 0, 2}


SPACINGS = {
    "plain": {},
    "karras": {"use_karras_sigmas": True},
    "exponential": {"use_exponential_sigmas": True},
    "beta": {"use_beta_sigmas": True},
}


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("shift", [1.0, 1.5, 3.0, 3.1, 5.0, 12.0, "dynamic"])
def test_schedules_of_sd3_and_flux_stay_within_the_bounds(spacing, shift):
    """With room: the largest C is 3.4 at a noise level of 1, of 2 or 3 steps with a shift of 12."""
    options = SPACINGS[spacing]
    for steps in (1, 2, 3, 4, 5, 8, 10, 20, 28, 40, 50, 100, 1000):
        if shift == "dynamic":
            scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, **options)
            scheduler.set_timesteps(sigmas=np.linspace(1, 1 / steps, steps), mu=math.log(12))
        else:
            scheduler = FlowMatchEulerDiscreteScheduler(shift=shift, **options)
            scheduler.set_timesteps(steps)
        transitions = flow_sde(scheduler.sigmas, 1.0)
        assert transitions.column("C").max() < 3.4
        assert transitions.column("A").abs().max() < 5.1


@pytest.mark.parametrize("make", [flow_sde, dance_sde, cps])
def test_numbers_of_numpy(make):
    expected = make(oracle.SIGMAS, 0.5).table
    for level in (np.float32(0.5), np.float64(0.5), np.float16(0.5), Fraction(1, 2)):
        assert torch.equal(make(oracle.SIGMAS, level).table, expected)
    assert torch.equal(make(oracle.SIGMAS, np.int64(1)).table, make(oracle.SIGMAS, 1).table)
    assert torch.equal(
        make(np.float32(oracle.SIGMAS)).table, make(torch.tensor(oracle.SIGMAS)).table
    )
    for level in (True, np.bool_(True), torch.tensor(0.5), np.array(0.5), None, 0.5j):
        with pytest.raises(TypeError, match="noise_level must be a number"):
            make(oracle.SIGMAS, level)


def test_window_at_numbers_of_numpy():
    inside, outside = flow_sde(oracle.SIGMAS), ode(oracle.SIGMAS)
    expected = window(inside, outside, [2, 5])
    for steps in (np.array([2, 5]), [np.int64(5), np.uint8(2)]):
        assert torch.equal(window(inside, outside, steps).table, expected.table)
    for steps in ([np.float64(2.0)], [True], [torch.tensor(2)], 3):
        with pytest.raises(TypeError, match="steps must be"):
            window(inside, outside, steps)


@pytest.mark.parametrize(
    "sigmas",
    [None, "1, 0", ["1", "0"], [None], 0.5j, {1.0: 0.0}, [[1], [1, 2]], [10**400, 0],
     torch.tensor([1.0, 0.0], dtype=torch.complex64)],
    ids=lambda value: f"{value!s:.20}",
)  # fmt: skip
@pytest.mark.parametrize("make", [flow_sde, dance_sde, cps, ode])
def test_sigmas_that_are_no_numbers(make, sigmas):
    with pytest.raises(TypeError, match="sigmas must be"):
        make(sigmas)


def test_bad_kinds_and_sigmas_of_a_table():
    a = flow_sde(oracle.SIGMAS)
    for table, sigmas, kinds, error, name in (
        (a.table.tolist(), None, a.kinds, TypeError, "table"),
        (a.table, None, None, TypeError, "kinds"),
        (a.table, None, [0] * 9, TypeError, "kinds"),
        (a.table, None, ["ode"] * 8, ValueError, "kinds"),
        (a.table, list(oracle.SIGMAS), a.kinds, TypeError, "sigmas"),
        (a.table, a.sigmas[1:], a.kinds, ValueError, "sigmas"),
    ):
        with pytest.raises(error, match=f"{name} must"):
            Transitions.from_table(table, sigmas, kinds)


def test_a_table_without_memory():
    a, b = flow_sde(oracle.SIGMAS).to("meta"), ode(oracle.SIGMAS).to("meta")
    for transitions, rows in ((Transitions.cat(a, b), 18), (window(a, b, [1]), 9)):
        assert transitions.device.type == "meta" and transitions.num_steps == rows
    with pytest.raises(ValueError, match="sigmas must hold values"):
        flow_sde(torch.empty(5, device="meta"))


class OnGpu(torch.Tensor):
    """A tensor that says it is on the second GPU."""

    device = property(lambda self: torch.device("cuda", 1))


@pytest.fixture
def on_gpu(monkeypatch):
    """Transitions that say they are on the second GPU, which is the current one."""
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    host = flow_sde(oracle.SIGMAS)
    table = host.table.as_subclass(OnGpu)
    return Transitions(table, host.sigmas, host.kinds, host.row_numbers.as_subclass(OnGpu))


def test_to_is_nothing_where_the_table_is(on_gpu, monkeypatch):
    """`cuda` is the current device, also without its index."""
    assert on_gpu.to("cuda") is on_gpu and on_gpu.to("cuda:1") is on_gpu
    assert on_gpu.to(torch.device("cuda", 1)) is on_gpu
    assert on_gpu.to("cpu") is not on_gpu
    host = flow_sde(oracle.SIGMAS)
    assert host.to("cpu") is host and host.to("cpu:0") is host
    on_meta = host.to("meta")
    assert on_meta.to("meta") is on_meta
    moves = []
    monkeypatch.setattr(torch.Tensor, "to", lambda x, device: moves.append(str(device)) or x)
    assert on_gpu.to("cuda:0") is not on_gpu
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    assert on_gpu.to("cuda") is not on_gpu
    assert moves == ["cuda:0", "cuda:0", "cuda", "cuda"]


@pytest.mark.parametrize(
    "action", ["Transitions.to", "Transitions.from_table", "Transitions.cat", "window"]
)
def test_a_capture_is_named(on_gpu, monkeypatch, action):
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    calls = {
        "Transitions.to": lambda: flow_sde(oracle.SIGMAS).to("cuda:1"),
        "Transitions.from_table": lambda: Transitions.from_table(
            on_gpu.table, on_gpu.sigmas, on_gpu.kinds
        ),
        "Transitions.cat": lambda: Transitions.cat(on_gpu, on_gpu),
        "window": lambda: window(on_gpu, on_gpu, [1]),
    }
    with pytest.raises(RuntimeError, match=f"{action} waits for the GPU.*before the capture"):
        calls[action]()
    # What stays on the host, and what is there already, may be made at any time.
    assert Transitions.cat(flow_sde(oracle.SIGMAS)).num_steps == 9
    assert on_gpu.to("cuda:1") is on_gpu


@pytest.mark.skipif(torch.cuda.is_available(), reason="a build without CUDA says so")
def test_without_cuda_the_error_is_that_of_torch():
    with pytest.raises((AssertionError, RuntimeError), match=r"CUDA|NVIDIA"):
        flow_sde(oracle.SIGMAS).to("cuda")


def test_matching_scores_the_distance_of_a_velocity_to_a_target():
    """-weight mean (v - v*)^2 in any order of levels, whatever the sample, and its gradient; the
    KL has no weight."""
    generator = torch.Generator().manual_seed(0)
    v, target, reference, sample = (torch.randn(3, 5, generator=generator) for _ in range(4))
    v.requires_grad_()
    transitions, step = matching([0.2, 0.9, 0.5], weight=[1.0, 0.0, 2.5]), torch.arange(3)
    weight = torch.tensor([1.0, 0.0, 2.5], dtype=torch.float64)
    score = log_prob(v, sample, target, transitions, step)
    distance = (v.double() - target.double()).square().mean(1)
    torch.testing.assert_close(score.double(), -weight * distance, rtol=1e-6, atol=1e-7)
    (gradient,) = torch.autograd.grad(score.sum(), v)
    expected = -2 * weight[:, None] * (v.detach().double() - target.double()) / 5
    torch.testing.assert_close(gradient.double(), expected, rtol=1e-6, atol=1e-7)
    out = grpo_loss(
        v, sample, target, score.detach(), torch.zeros(3), transitions, step,
        ref_velocity=reference, kl_weight=1.0,
    )  # fmt: skip
    assert torch.equal(out.ratio, torch.ones(3)) and out.policy_loss == 0
    distance = (v.double() - reference.double()).square().mean()
    assert out.kl.item() == pytest.approx(distance.item(), rel=1e-6)
    assert transitions.column("sigma").tolist() == pytest.approx([0.2, 0.9, 0.5])
    assert set(transitions.kinds) == {"matching"} and not transitions.deterministic


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([0.5, 1.5],), ValueError, "sigmas must be inside"),
        (([],), ValueError, "sigmas must be .R. with 1 <= R"),
        ((0.5,), ValueError, "sigmas must be .R."),
        (([0.5, math.nan],), ValueError, "sigmas must be finite"),
        (("half",), TypeError, "sigmas must be numbers, got str"),
        ((torch.ones(2) * 1j,), TypeError, "sigmas must be real numbers, got torch.complex64"),
        (([0.5], -1.0), ValueError, "weight must be at least 0, got -1"),
        (([0.5, 0.4], [1.0, 1.0, 1.0]), ValueError, "weight must be one number or 2, got 3"),
        (([0.5], math.inf), ValueError, "weight must be finite"),
        (([0.5], 1e300), ValueError, "weight must be within the range of float32"),
    ],
)
def test_bad_matching_rows(arguments, error, message):
    with pytest.raises(error, match=message):
        matching(*arguments)


def test_guard_has_no_use_for_matching_rows():
    x = torch.zeros(1, 2)
    with pytest.raises(ValueError, match=r"old_velocity .Guard. needs .* matching rows"):
        grpo_loss(x, x, x, x[:, 0], x[:, 0], matching([0.5]), 0, old_velocity=x)
