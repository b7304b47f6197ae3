"""Transition tables against the peers' formulas; windows, concatenation, bad schedules."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from flowgrpo_kernels import Transitions, cps, dance_sde, flow_sde, ode, window
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
