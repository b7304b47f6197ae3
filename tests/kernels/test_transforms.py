"""Derivatives by torch.func and forward mode: refused, where torch would drop them in silence."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import forward_ad

from flowgrpo_kernels import flow_sde, grpo_loss, log_prob, nft_loss, sde_step
from flowgrpo_kernels.blocks import gated_residual, joint_heads, norm_modulate
from support.kernels import oracle

TRANSITIONS = flow_sde(oracle.SIGMAS)
B = oracle.batch(3, (4, 6))
ROW = torch.ones(3, 6)


def score(v):
    return log_prob(v, B.sample, B.old, TRANSITIONS, 3).sum()


OPS = {
    "log_prob": score,
    "grpo_loss": lambda v: (
        grpo_loss(v, B.sample, B.old, torch.zeros(3), B.advantages, TRANSITIONS, 3).loss
    ),
    "nft_loss": lambda v: (
        nft_loss(v, B.sample, B.old, B.ref, torch.full((3,), 0.5), torch.ones(3)).loss
    ),
    "norm_modulate": lambda v: norm_modulate(v, ROW, ROW).sum(),
    "gated_residual": lambda v: gated_residual(B.sample, ROW, v).sum(),
    "joint_heads": lambda v: joint_heads([v], [None], heads=2).sum(),
}
REVERSE = (torch.func.grad, torch.func.jacrev, torch.func.grad_and_value)
FORWARD = (torch.func.jacfwd, torch.func.hessian)


@pytest.mark.parametrize("transform", REVERSE, ids=lambda f: f.__name__)
@pytest.mark.parametrize("name", OPS)
def test_reverse_mode_of_torch_func(name, transform):
    with pytest.raises(NotImplementedError, match=rf"{name} is not .*torch\.func.*backward\(\)"):
        transform(OPS[name])(B.velocity)


@pytest.mark.parametrize("name", [*OPS, "sde_step"])
def test_forward_mode(name):
    """The tangent was 0."""
    step = lambda v: sde_step(v, B.sample, TRANSITIONS, 3, seeds=B.seeds)[0].sum()  # noqa: E731
    function = {**OPS, "sde_step": step}[name]
    with pytest.raises(NotImplementedError, match=f"{name} has no forward-mode derivative"):
        torch.func.jvp(function, (B.velocity,), (B.velocity,))
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="forward-mode"):
        function(forward_ad.make_dual(B.velocity, B.velocity))
    # A level without a tangent of the op's own is none of its concern.
    with forward_ad.dual_level():
        assert torch.equal(function(B.velocity), function(B.velocity))


@pytest.mark.parametrize("transform", FORWARD, ids=lambda f: f.__name__)
def test_forward_mode_of_torch_func(transform):
    with pytest.raises(NotImplementedError, match="log_prob"):
        transform(score)(B.velocity)


def test_what_works_still_does():
    """Values under vmap, and both ways to ask for a gradient."""
    velocities = torch.stack([B.velocity, B.uncond])
    batched = torch.func.vmap(score)(velocities)
    assert torch.equal(batched, torch.stack([score(v) for v in velocities]))
    v = B.velocity.clone().requires_grad_()
    (grad,) = torch.autograd.grad(score(v), v)
    score(v).backward()
    assert torch.equal(v.grad, grad) and grad.abs().sum() > 0
    # A constant of the function that is differentiated.
    with torch.no_grad():
        assert (
            torch.func.grad(lambda x: x.sum() * score(B.velocity))(ROW).eq(score(B.velocity)).all()
        )
