"""mean and x0 from the pass that steps or scores: values, bits, gradients, buffers."""

from __future__ import annotations

import pytest
import torch

from flowgrpo_kernels import cps, flow_sde, log_prob, sde_step
from flowgrpo_kernels.backends import dispatch
from support.kernels import oracle

TRANSITIONS = flow_sde(oracle.SIGMAS)


def column(name: str, step: torch.Tensor, ndim: int, transitions=TRANSITIONS) -> torch.Tensor:
    return transitions.column(name)[step].view(-1, *[1] * (ndim - 1))


def eager(b, v):
    """(mean, x0) of float32 by two products and a sum or difference, each rounded."""
    a, drift, sigma = (column(name, b.step, v.ndim) for name in ("A", "B", "sigma"))
    x = b.sample.float()
    return a * x + drift * v.float(), x - sigma * v.float()


def scored(b, x_prev, **options):
    return log_prob(
        b.velocity, b.sample, x_prev, TRANSITIONS, b.step,
        return_mean=True, return_x0=True, **options,
    )  # fmt: skip


@pytest.mark.parametrize("dtype", oracle.DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(3, 24, 24), (3, 5, 7), (2, 5000), (1,)], ids=str)
def test_the_same_bits_as_the_formula(backend, dtype, shape):
    """And of both ops, which leave x' and log_prob as they were."""
    b = oracle.batch(4, shape, dtype, torch.float32)
    mean, x0 = torch.empty_like(b.sample), torch.empty_like(b.sample)
    args = (b.velocity, b.sample, TRANSITIONS, b.step)
    out, lp = sde_step(*args, seeds=b.seeds, mean_out=mean, x0_out=x0)
    plain = sde_step(*args, seeds=b.seeds)
    assert torch.equal(out, plain[0]) and torch.equal(lp, plain[1])
    for got, want in zip((mean, x0), eager(b, b.velocity), strict=True):
        assert torch.equal(got, want)
    replay = scored(b, out)
    for got, want in zip(replay, (lp, mean, x0), strict=True):
        assert got.dtype == torch.float32 and torch.equal(got, want)


def test_large_latents_are_streamed_to_the_same_bits():
    """From half a million elements on, the native backend writes past the caches."""
    b = oracle.batch(9, (16, 64, 64))
    few = slice(0, 2)
    whole = scored(b, b.old)
    for got, want in zip(whole[1:], eager(b, b.velocity), strict=True):
        assert torch.equal(got, want)
    rows = [x[few] for x in (b.velocity, b.sample, b.old)]
    part = log_prob(*rows, TRANSITIONS, b.step[few], return_mean=True, return_x0=True)
    for got, want in zip(whole, part, strict=True):
        assert torch.equal(got[few], want)


def test_guidance(backend):
    b = oracle.batch(3)
    guided = {"uncond_velocity": b.uncond, "guidance_scale": 4.5}
    combined = b.uncond + (b.velocity - b.uncond) * 4.5
    mean, x0 = torch.empty_like(b.sample), torch.empty_like(b.sample)
    args = (b.velocity, b.sample, TRANSITIONS, b.step)
    out, _ = sde_step(*args, seeds=b.seeds, mean_out=mean, x0_out=x0, **guided)
    for got, want in zip((mean, x0), eager(b, combined), strict=True):
        assert torch.equal(got, want)
    _, again, clean = scored(b, out, **guided)
    assert torch.equal(again, mean) and torch.equal(clean, x0)


def test_what_is_returned(backend):
    b = oracle.batch(2)
    args = (b.velocity, b.sample, b.old, TRANSITIONS, b.step)
    lp, mean, x0 = log_prob(*args, return_mean=True, return_x0=True)
    for options, want in (
        ({"return_mean": True}, (lp, mean)),
        ({"return_x0": True}, (lp, x0)),
        ({"return_mean": False}, (lp,)),
    ):
        got = log_prob(*args, **options)
        got = got if isinstance(got, tuple) else (got,)
        assert len(got) == len(want)
        assert all(torch.equal(x, y) for x, y in zip(got, want, strict=True))
    with pytest.raises(TypeError, match="return_mean must be a bool"):
        log_prob(*args, return_mean="yes")


@pytest.mark.parametrize("used", ["all", "mean", "x0", "log_prob", "log_prob and x0"])
def test_gradients(backend, used):
    """Of any of the three, against float64 autograd of the formulas."""
    b, g = oracle.batch(3, (3, 5, 7)), torch.Generator().manual_seed(1)
    weights = [torch.randn(3, generator=g), *(torch.randn(3, 3, 5, 7, generator=g) for _ in "mx")]
    names = ("log_prob", "mean", "x0")
    chosen = [used == "all" or name in used.split(" and ") for name in names]

    def total(results):
        pairs = zip(results, weights, chosen, strict=True)
        return sum((r * w.to(r.dtype)).sum() for r, w, on in pairs if on)

    def gradient(dtype):
        v, u = (x.to(dtype).requires_grad_() for x in (b.velocity, b.uncond))
        results = log_prob(
            v, b.sample.to(dtype), b.old.to(dtype), TRANSITIONS, b.step, uncond_velocity=u,
            guidance_scale=2.5, uncond_grad=True, return_mean=True, return_x0=True,
        )  # fmt: skip
        return torch.autograd.grad(total(results), (v, u))

    for got, want in zip(gradient(torch.float32), gradient(torch.float64), strict=True):
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-6 * want.abs().max())
    v = b.velocity.double().requires_grad_()
    a, drift, _, _, _ = oracle.rows("flow_sde", 0.7, b.step, 4)
    sigma = column("sigma", b.step, 4).double()
    formula = (
        oracle.log_prob("flow_sde", 0.7, b.step, v, b.sample, b.old),
        a * b.sample.double() + drift * v,
        b.sample.double() - sigma * v,
    )
    (want,) = torch.autograd.grad(total(formula), v)
    w = b.velocity.clone().requires_grad_()
    results = log_prob(w, b.sample, b.old, TRANSITIONS, b.step, return_mean=True, return_x0=True)
    (got,) = torch.autograd.grad(total(results), w)
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=2e-6 * want.abs().max())


def test_gradcheck():
    b = oracle.batch(2, (2, 3)).to(torch.float64)

    def f(v):
        return log_prob(v, b.sample, b.old, TRANSITIONS, b.step, return_mean=True, return_x0=True)

    assert torch.autograd.gradcheck(f, b.velocity.requires_grad_())


def test_backends_agree(backend):
    """Bits of the gradient too, of strided and 16-bit inputs."""
    if backend == "reference":
        pytest.skip("the others are compared with it")
    b = oracle.batch(3, (4, 6, 10), torch.bfloat16, torch.float16)
    transitions = cps(oracle.SIGMAS)
    grad = torch.randn(3, 10, 4, 6).permute(0, 2, 3, 1)

    def run():
        v = b.velocity.to(memory_format=torch.channels_last).detach().requires_grad_()
        results = log_prob(
            v, b.sample, b.old, transitions, b.step, return_mean=True, return_x0=True
        )
        (dv,) = torch.autograd.grad(results, v, (b.weight, grad, grad.flip(0)))
        return (*results, dv)

    with dispatch.use_backend("reference"):
        want = run()
    for x, y in zip(run(), want, strict=True):
        assert x.dtype == y.dtype and torch.equal(x, y)


def test_bad_buffers(backend):
    b = oracle.batch(2)
    args = (b.velocity, b.sample, TRANSITIONS, b.step)
    for name in ("mean_out", "x0_out"):
        for buffer, message in (
            (torch.empty(2, 3, 24, 25)[..., :24], f"{name} must be contiguous and torch.float32"),
            (b.sample.bfloat16(), f"{name} must be contiguous and torch.float32, got torch.bfloat"),
            (b.sample[:1], f"{name} must have the shape of sample"),
            (b.velocity, f"{name} must not be the memory of velocity"),
            (b.sample.view(2, 3, 24, 24), f"{name} must not be the memory of sample"),
        ):
            with pytest.raises(ValueError, match=message):
                sde_step(*args, seeds=b.seeds, **{name: buffer})
    buffer = torch.empty_like(b.sample)
    with pytest.raises(ValueError, match="mean_out must not be the memory of x0_out"):
        sde_step(*args, seeds=b.seeds, mean_out=buffer, x0_out=buffer)
    with pytest.raises(ValueError, match="out must not be the memory of mean_out"):
        sde_step(*args, seeds=b.seeds, out=buffer, mean_out=buffer)
