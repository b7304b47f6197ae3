"""transition_rows: the laws against float64 formulas, the same bits everywhere, poisoned rows."""

from __future__ import annotations

import math
import sys

import pytest
import torch

from flowgrpo_kernels import (
    Transitions,
    cps,
    dance_sde,
    flow_sde,
    grpo_loss,
    log_prob,
    ode,
    sde_step,
)
from flowgrpo_kernels import transition_rows as rows_of
from flowgrpo_kernels.backends import dispatch
from flowgrpo_kernels.row_laws import LAWS, exp_of, log_of, sin_of
from flowgrpo_kernels.transitions import COLUMNS
from support.kernels import oracle

SIGMAS = torch.tensor(oracle.SIGMAS, dtype=torch.float64)
PAIR = SIGMAS[:-1], SIGMAS[1:]
MAKERS = {"flow_sde": flow_sde, "dance_sde": dance_sde, "cps": cps}


def inputs(law: str, rows: int = 97):
    """Random pairs, some at the ends of the range, a noise level a row."""
    g = torch.Generator().manual_seed(len(law))
    pair = torch.rand(rows, 2, generator=g, dtype=torch.float64).sort(1, descending=True).values
    pair[0], pair[1, 1], pair[2] = torch.tensor([1.0, 0.5]), 0.0, torch.tensor([1.0, 0.0])
    level = 2 * torch.rand(rows, generator=g, dtype=torch.float64)
    level[3:6] = torch.tensor([0.0, 1.0, 2.0])
    return pair[:, 0], pair[:, 1], level


def exact(law: str, s: float, p: float, a: float, m: float) -> tuple[float, float, float, float]:
    """(A, B, C, S) by the formulas of the peers, with Python's own functions."""
    if law in ("flow_sde", "dance_sde", "sigma_linear", "ode"):
        std = {
            "flow_sde": lambda: a * math.sqrt(s / (1 - (m if s == 1 else s))),
            "dance_sde": lambda: a,
            "sigma_linear": lambda: a + (m - a) * s,
            "ode": lambda: 0.0,
        }[law]()
        dt = p - s
        x = 1 + std**2 * dt / (2 * s)
        return x, (1 + std**2 * (1 - s) / (2 * s)) * dt, std * math.sqrt(-dt), std
    if law == "cps":
        std = p * math.sin(a * math.pi / 2)
    elif law == "precise":
        std = p * math.sqrt(1 - (p * (1 - s) / (s * (1 - p))) ** (a * a))
    else:
        std = p * math.sqrt(1 - math.exp(-a * a * (1 / p - 1 / s))) if p > 0 else 0.0
    q = math.sqrt(max(p * p - std * std, 0.0))
    return (1 - p) + q, -s * (1 - p) + (1 - s) * q, std, std


@pytest.mark.parametrize("law", LAWS)
def test_against_the_formulas(backend, law):
    s, p, a = inputs(law)
    made = rows_of(law, s, p, a, sigma_max=0.96)
    want = torch.tensor(
        [exact(law, *row, 0.96) for row in zip(*(x.tolist() for x in (s, p, a)), strict=True)],
        dtype=torch.float64,
    )
    got = torch.stack([made.column(n).double() for n in ("A", "B", "C", "std_dev")], 1)
    torch.testing.assert_close(got, want, rtol=3e-7, atol=2e-8)
    c, k, c0 = (made.column(name).double() for name in ("C", "k", "c0"))
    noisy = c > 0
    if law != "cps":
        torch.testing.assert_close(k[noisy], 0.5 / c[noisy] ** 2, rtol=1e-6, atol=0)
        log = c[noisy].log() + 0.5 * math.log(2 * math.pi)
        torch.testing.assert_close(c0[noisy], log, rtol=1e-6, atol=1e-6)
    assert made.column("k")[~noisy].eq(0).all() and c0[~noisy].eq(0).all()
    assert torch.equal(made.column("sigma"), s.float())
    assert torch.equal(made.column("abs_dt"), (s - p).float())
    assert torch.equal(made.column("noise_step").double(), (s * 2**23).floor())


@pytest.mark.parametrize("law", MAKERS)
@pytest.mark.parametrize("kl", ["std_dev", "gaussian"])
def test_the_rows_of_the_host(backend, law, kl):
    """A schedule's rows are those of transitions.py; an ulp of float32 may be between them."""
    host = MAKERS[law](oracle.SIGMAS, 0.7, kl).table
    steps = torch.arange(9)
    made = rows_of(law, *PAIR, 0.7, sigma_max=SIGMAS[1], noise_step=steps, kl=kl).table
    assert (made == host).float().mean() > 0.95
    torch.testing.assert_close(made, host, rtol=1.2e-7, atol=1e-8)


def test_backends_give_the_same_bits(backend):
    if backend == "reference":
        pytest.skip("the others are compared with it")
    for law in LAWS:
        for dtype in (torch.float64, torch.float32, torch.bfloat16):
            s, p, a = (x.to(dtype) for x in inputs(law))
            # What bfloat16 makes equal is no step.
            keep = s > p
            args = (law, s[keep], p[keep], a[keep])
            for more in ({}, {"kl": "gaussian", "normalizer": False, "score_quiet": True}):
                got = rows_of(*args, sigma_max=0.96, gaussian=bool(more), **more).table
                with dispatch.use_backend("reference"):
                    want = rows_of(*args, sigma_max=0.96, gaussian=bool(more), **more).table
                assert torch.equal(got, want), law


def test_functions_of_one_argument():
    """log, exp and sin to the last two bits of float64."""
    x = torch.cat([torch.logspace(-300, 300, 4001, dtype=torch.float64), torch.ones(1)])
    torch.testing.assert_close(log_of(x), x.log(), rtol=4e-16, atol=2e-16)
    y = -torch.logspace(-20, math.log10(690), 4001, dtype=torch.float64)
    torch.testing.assert_close(exp_of(y), y.exp(), rtol=6e-16, atol=0)
    assert exp_of(torch.tensor([0.0, -701, -math.inf], dtype=torch.float64)).tolist() == [1, 0, 0]
    u = torch.linspace(0, 1, 4001, dtype=torch.float64)
    want = (u * (math.pi / 2)).sin()
    torch.testing.assert_close(sin_of(u), want, rtol=4e-16, atol=0)


def test_options(backend):
    """The normaliser, Gaussian k for cps, k without noise, and a sigma just below 1."""
    made = rows_of("flow_sde", *PAIR, 0.7, sigma_max=SIGMAS[1], normalizer=False)
    full = rows_of("flow_sde", *PAIR, 0.7, sigma_max=SIGMAS[1])
    assert made.column("c0").eq(0).all() and full.column("c0").ne(0).all()
    rest = [i for i, name in enumerate(COLUMNS) if name != "c0"]
    assert torch.equal(made.table[:, rest], full.table[:, rest])
    plain, gaussian = (rows_of("cps", *PAIR, 0.8, gaussian=g) for g in (False, True))
    assert plain.kinds[0] == "cps" and gaussian.kinds[0] == "cps_gaussian"
    c = gaussian.column("C")[:-1].double()
    assert plain.column("k")[:-1].eq(1).all() and plain.column("k")[-1] == 0
    torch.testing.assert_close(gaussian.column("k")[:-1].double(), 0.5 / c**2, rtol=1e-6, atol=0)
    near = torch.tensor([0.999993], dtype=torch.float64)
    args = ("flow_sde", near, torch.tensor([0.990818]), 0.7)
    far = rows_of(*args, sigma_max=0.990818).column("std_dev")
    close = rows_of(*args, sigma_max=0.990818, near_one=1.001e-5).column("std_dev")
    assert far > 200 and close.item() == pytest.approx(
        0.7 * math.sqrt(0.999993 / 0.009182), rel=1e-6
    )


def test_a_score_without_noise(backend):
    """C = 0 and k = 1: x' is the mean, log_prob minus the squared distance, with its gradient."""
    b = oracle.batch(4, (3, 5, 7))
    quiet = rows_of("ode", *PAIR, score_quiet=True)
    assert quiet.deterministic
    x, lp = sde_step(b.velocity, b.sample, quiet, b.step)
    plain, zero = sde_step(b.velocity, b.sample, ode(oracle.SIGMAS), b.step)
    torch.testing.assert_close(x, plain, rtol=0, atol=1e-6)
    assert lp.eq(0).all() and zero.eq(0).all()
    v = b.velocity.clone().requires_grad_()
    score = log_prob(v, b.sample, b.old, quiet, b.step)
    dt = -quiet.column("abs_dt").double()[b.step].view(-1, 1, 1, 1)
    d = b.old.double() - b.sample.double() - dt * b.velocity.double()
    assert oracle.error(score, -d.square().flatten(1).mean(1)) < 1e-6
    (score * b.weight).sum().backward()
    want = b.weight.view(-1, 1, 1, 1) * 2 * dt * d / 105
    torch.testing.assert_close(v.grad.double(), want, rtol=1e-5, atol=1e-7)


def test_the_loss_of_a_score_without_noise(backend):
    """Ratio, clip and gradient as of any other row; rows that are not scored stay silent."""
    b = oracle.batch(4, (3, 5, 7))
    scored, silent = (rows_of("ode", *PAIR, score_quiet=on) for on in (True, False))
    both, step = Transitions.cat(scored, silent), b.step + torch.tensor([0, 9, 0, 9])
    v = b.velocity.clone().requires_grad_()
    lp = log_prob(v, b.sample, b.old, both, step)
    old = lp.detach() - 0.001
    out = grpo_loss(v, b.sample, b.old, old, b.advantages, both, step, clip_range=0.5)
    (got,) = torch.autograd.grad(out.loss, v)
    assert torch.equal(out.log_prob, lp.detach()) and lp[1::2].eq(0).all()
    (want,) = torch.autograd.grad((-(lp - old).exp() * b.advantages).mean(), v)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-9)
    assert got[1::2].eq(0).all() and got[::2].ne(0).any(1).any()


BAD = {
    "ascending": (0.4, 0.7, 0.5, r"sigma_next must be below sigma.* got sigma 0.4 and .* in row 1"),
    "equal": (0.4, 0.4, 0.5, "sigma_next must be below sigma"),
    "timesteps": (700.0, 400.0, 0.5, r"inside \[0, 1\], got 700 and 400 in row 1; divide"),
    "NaN sigma": (math.nan, 0.4, 0.5, r"inside \[0, 1\], got nan"),
    "NaN level": (
        0.7,
        0.4,
        math.nan,
        "noise_level of flow_sde must be finite and >= 0, got nan in",
    ),
    "negative level": (0.7, 0.4, -0.5, "noise_level of flow_sde must be finite and >= 0, got -0.5"),
    "a level beyond float32": (0.7, 0.4, 1e30, "give no flow_sde coefficients within float32"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_rows(backend, case, monkeypatch):
    """The CPU raises; a GPU, which is not asked, has NaN in that row alone."""
    s, p, a, message = BAD[case]
    pairs = torch.tensor([[0.9, 0.8, 0.5], [s, p, a], [0.5, 0.2, 0.5]]).T
    with pytest.raises(ValueError, match=message):
        rows_of("flow_sde", *pairs, sigma_max=0.95)
    module = sys.modules["flowgrpo_kernels.transition_rows"]
    monkeypatch.setattr(module, "readable", lambda x: False)
    made = rows_of("flow_sde", *pairs, sigma_max=0.95)
    x = torch.ones(3, 4)
    out, lp = sde_step(x, x, made, torch.arange(3), seeds=torch.arange(3))
    assert lp.isnan().tolist() == [False, True, False]
    assert out.isnan().all(1).tolist() == [False, True, False]
    assert out[[0, 2]].isfinite().all()


def test_bad_arguments():
    s, p = torch.tensor([0.9, 0.5]), torch.tensor([0.5, 0.2])
    for call, error, message in (
        (lambda: rows_of("sde", s, p), ValueError, "law must be one of"),
        (
            lambda: rows_of("flow_sde", s, p, 0.7),
            ValueError,
            "sigma_max must be given for flow_sde",
        ),
        (lambda: rows_of("cps", s, p, 2.5), ValueError, r"noise_level of cps must be in \[0, 2\]"),
        (lambda: rows_of("cps", 0.9, p), TypeError, "sigma must be a torch.Tensor"),
        (lambda: rows_of("cps", s, p, "0.7"), TypeError, "noise_level must be a number"),
        (lambda: rows_of("cps", s, p[:, None]), ValueError, r"sigma_next must be .*, got \[2, 1\]"),
        (lambda: rows_of("cps", s, torch.zeros(3)), ValueError, r"sigma_next must be 0-dim, \[1\]"),
        (lambda: rows_of("cps", s.long(), p), TypeError, "sigma must be floating point"),
        (lambda: rows_of("cps", s, p, noise_step=s), TypeError, "noise_step must be int64"),
        (lambda: rows_of("cps", s, p, kl="js"), ValueError, "kl must be"),
        (
            lambda: rows_of("cps", s, p.to("meta")),
            ValueError,
            "sigma_next must be on cpu like sigma",
        ),
    ):
        with pytest.raises(error, match=message):
            call()


def test_kinds_are_open():
    """A table of one's own may be named anything; the name decides nothing but Guard and noise."""
    table = flow_sde(oracle.SIGMAS).table
    made = Transitions.from_table(table, None, ["my law"] * 9)
    assert made.kinds[0] == "my law" and not made.deterministic
    with pytest.raises(ValueError, match="kinds must hold a name for each of 9 rows"):
        Transitions.from_table(table, None, ["my law"] * 8 + [""])


def test_one_row_serves_the_batch():
    """0-dim inputs give one row, whose constants are made once; nothing is read on the device."""
    made = rows_of("flow_sde", SIGMAS[2], SIGMAS[3], 0.7, sigma_max=SIGMAS[1])
    assert made.num_steps == 1
    b = oracle.batch(3)
    want = sde_step(b.velocity, b.sample, flow_sde(oracle.SIGMAS), 2, noise=b.old)
    got = sde_step(b.velocity, b.sample, made, 0, noise=b.old)
    torch.testing.assert_close(got[0], want[0], rtol=1e-6, atol=1e-6)
