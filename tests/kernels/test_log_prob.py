"""log_prob and its gradient against the float64 oracle; guidance; layouts of gradients."""

from __future__ import annotations

import pytest
import torch

from flowgrpo_kernels import flow_sde, log_prob, sde_step
from support.kernels import oracle


def stored(kind="flow_sde", shape=(3, 24, 24), dtype=torch.float32, rows=4):
    b = oracle.batch(rows, shape, dtype)
    transitions = oracle.make(kind)
    x_prev, _ = sde_step(b.old, b.sample, transitions, b.step, seeds=b.seeds)
    return b, transitions, x_prev


@pytest.mark.parametrize("kind", ["flow_sde", "dance_sde", "cps"])
@pytest.mark.parametrize("shape", oracle.SHAPES, ids=str)
def test_value_and_gradient(backend, kind, shape):
    b, transitions, x_prev = stored(kind, shape)
    v = b.velocity.clone().requires_grad_()
    lp = log_prob(v, b.sample, x_prev, transitions, b.step)
    cotangent = torch.randn(4)
    lp.backward(cotangent)
    exact_v = b.velocity.double().requires_grad_()
    exact = oracle.log_prob(kind, 0.7, b.step, exact_v, b.sample, x_prev)
    exact.backward(cotangent.double())
    # Coefficients rounded to float32 move large log_probs in the sixth digit.
    assert oracle.error(lp, exact) < 4e-6
    scale = exact_v.grad.flatten(1).abs().amax(1).view(-1, *[1] * len(shape))
    assert ((v.grad.double() - exact_v.grad).abs() / scale).max() < 2e-5


@pytest.mark.parametrize("kind", ["flow_sde", "dance_sde", "cps"])
def test_no_worse_than_eager(backend, kind):
    """On the same rounded table: log_prob within 1e-6, gradient no worse than eager float32."""
    b, transitions, x_prev = stored(kind, (16, 64, 64))
    d = b.to(torch.float64)
    leaves = [b.velocity.clone(), b.velocity.clone(), d.velocity.clone()]
    ours, eager, exact = (x.requires_grad_() for x in leaves)
    lp = log_prob(ours, b.sample, x_prev, transitions, b.step)
    exact_lp = log_prob(exact, d.sample, x_prev.double(), transitions, b.step)
    assert oracle.error(lp, exact_lp) < oracle.LOG_PROB_TOLERANCE
    a, drift, _, k, c0, *_ = transitions.table[b.step].unbind(1)
    mu = a.view(-1, 1, 1, 1) * b.sample + drift.view(-1, 1, 1, 1) * eager
    eager_lp = (-k.view(-1, 1, 1, 1) * (x_prev - mu) ** 2).mean((1, 2, 3)) - c0
    for value in (lp, eager_lp, exact_lp):
        value.sum().backward()
    worst = [(x.grad.double() - exact.grad).abs().flatten(1).amax(1) for x in (ours, eager)]
    assert (worst[0] <= 1.05 * worst[1] + 1e-12).all()


@pytest.mark.parametrize("dtype", oracle.DTYPES, ids=str)
@pytest.mark.parametrize("uncond_grad", [False, True])
def test_guidance(backend, dtype, uncond_grad):
    """w to the conditional half, 1 - w to the other if asked for; one rounding to their dtype."""
    b, transitions, x_prev = stored(shape=(3, 9, 11), dtype=dtype)
    v, u = b.velocity.clone().requires_grad_(), b.uncond.clone().requires_grad_()
    lp = log_prob(
        v, b.sample, x_prev, transitions, b.step,
        uncond_velocity=u, guidance_scale=3.5, uncond_grad=uncond_grad,
    )  # fmt: skip
    combined = (b.uncond.float() + (b.velocity.float() - b.uncond.float()) * 3.5).requires_grad_()
    direct = log_prob(combined, b.sample, x_prev, transitions, b.step)
    assert torch.equal(lp, direct)
    cotangent = torch.randn(4)
    lp.backward(cotangent)
    direct.backward(cotangent)
    assert torch.equal(v.grad, (combined.grad * 3.5).to(dtype))
    if uncond_grad:
        assert torch.equal(u.grad, (combined.grad * -2.5).to(dtype))
    else:
        assert u.grad is None


def test_gradient_layouts(backend):
    """Expanded, strided and absent upstream gradients; non-contiguous inputs."""
    b, transitions, x_prev = stored(shape=(4, 6, 10))

    def gradient(reduce, velocity=b.velocity):
        v = velocity.detach().clone(memory_format=torch.preserve_format).requires_grad_()
        reduce(log_prob(v, b.sample, x_prev, transitions, b.step)).backward()
        return v.grad

    plain = gradient(lambda lp: (lp * torch.ones(4)).sum())
    assert torch.equal(gradient(lambda lp: lp.sum()), plain)
    assert torch.equal(gradient(lambda lp: lp.expand(3, 4).sum(0).sum() / 3), plain)
    strided = torch.randn(4, 2)
    expected = gradient(lambda lp: (lp * strided[:, 0].clone()).sum())
    assert torch.equal(gradient(lambda lp: (lp * strided[:, 0]).sum()), expected)
    last = b.velocity.to(memory_format=torch.channels_last)
    assert torch.equal(gradient(lambda lp: lp.sum(), last), plain)


@pytest.mark.parametrize("guided", [False, True])
def test_gradcheck(guided):
    b, transitions, x_prev = stored(shape=(2, 3), rows=3)
    d, x_prev = b.to(torch.float64), x_prev.double()
    options = {"guidance_scale": 2.5, "uncond_grad": True} if guided else {}

    def function(v, u):
        extra = {"uncond_velocity": u, **options} if guided else {}
        return log_prob(v, d.sample, x_prev, transitions, b.step, **extra)

    inputs = (d.velocity.requires_grad_(), d.uncond.requires_grad_(guided))
    assert torch.autograd.gradcheck(function, inputs, fast_mode=False)


def test_double_backward_says_no(backend):
    b, transitions, x_prev = stored(shape=(2, 3))
    v = b.velocity.requires_grad_()
    lp = log_prob(v, b.sample, x_prev, transitions, b.step)
    (grad,) = torch.autograd.grad(lp.sum(), v, create_graph=True)
    once = pytest.raises(RuntimeError, match="log_prob can be differentiated once")
    with once:
        grad.sum().backward(retain_graph=True)
    with once:
        torch.autograd.grad(grad.sum(), v, allow_unused=True)
    with once:
        torch.autograd.functional.hessian(
            lambda v: log_prob(v, b.sample, x_prev, transitions, b.step).sum(), v.detach()
        )


def test_no_gradient_no_graph(backend):
    b, transitions, x_prev = stored(shape=(2, 3))
    v = b.velocity.requires_grad_()
    with torch.no_grad():
        assert not log_prob(v, b.sample, x_prev, transitions, b.step).requires_grad
    assert not log_prob(v.detach(), b.sample, x_prev, transitions, b.step).requires_grad


def test_accumulates_into_parameters(backend):
    """Through a model: two uses of one velocity add their gradients."""
    b, transitions, x_prev = stored(shape=(8,))
    model = torch.nn.Linear(8, 8)
    v = model(b.sample)
    total = log_prob(v, b.sample, x_prev, transitions, b.step).sum()
    (total + log_prob(v, b.sample, x_prev, flow_sde(oracle.SIGMAS, 0.5), 2).sum()).backward()
    assert model.weight.grad.abs().sum() > 0 and torch.isfinite(model.weight.grad).all()
