"""log-probability of a stored step, differentiable in the velocities.

    d        = x' - (A x + B v)            v = u + w (velocity - u) under guidance
    log_prob = -k mean[d^2] - c0           0 where C = 0
    d log_prob / dv = 2 k B d / D

Shapes and dtypes as in sde_step.py; the float32 sequence and the order of the sum are the same, so
the log_prob of what sde_step stored is the same bits. Bytes per element: velocity (twice under
guidance) + sample + x' forward; the same plus the gradients backward. Nothing of the size of a
latent is kept but the inputs. sample and prev_sample are constants for the gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import _checks, _ops
from ._autograd import once_differentiable
from .transitions import Transitions

_log_prob = _ops.op("log_prob")
_log_prob_backward = _ops.op("log_prob_backward")


class _LogProb(torch.autograd.Function):
    @staticmethod
    def forward(ctx, velocity, uncond, scale, sample, prev_sample, table, step, uncond_grad):
        ctx.save_for_backward(velocity, uncond, sample, prev_sample, table, step)
        ctx.scale, ctx.uncond_grad = scale, uncond_grad
        return _log_prob(velocity, uncond, scale, sample, prev_sample, table, step)

    @staticmethod
    @once_differentiable("log_prob")
    def backward(ctx, grad):
        velocity, uncond, sample, prev_sample, table, step = ctx.saved_tensors
        dv, du = _log_prob_backward(
            grad, velocity, uncond, ctx.scale, sample, prev_sample, table, step, ctx.uncond_grad
        )
        return dv, (du if ctx.uncond_grad else None), *[None] * 6


def log_prob(
    velocity: Tensor,
    sample: Tensor,
    prev_sample: Tensor,
    transitions: Transitions,
    step: int | Tensor,
    *,
    uncond_velocity: Tensor | None = None,
    guidance_scale: float = 1.0,
    uncond_grad: bool = False,
) -> Tensor:
    """float32 [B] log-probability of prev_sample, differentiable once in velocity.

    Args:
        velocity, sample, prev_sample, uncond_velocity: [B, ...], one shape and device.
        transitions, step: as for sde_step.
        uncond_grad: also differentiate in uncond_velocity (by default a constant, as in flow_grpo).
    """
    _checks.check_latents(
        sample, velocity=velocity, prev_sample=prev_sample, uncond_velocity=uncond_velocity
    )
    _checks.check_guidance(uncond_velocity, guidance_scale)
    _checks.check_transitions(transitions, sample)
    _checks.check_constants(sample=sample, prev_sample=prev_sample)
    rows = _checks.resolve_step(step, transitions, sample)
    uncond, uncond_grad = _checks.uncond_half(uncond_velocity, uncond_grad)
    args = (velocity, uncond, float(guidance_scale), sample, prev_sample, transitions.table, rows)
    if torch.is_grad_enabled() and (velocity.requires_grad or uncond_grad):
        return _LogProb.apply(*args, uncond_grad)
    return _log_prob(velocity.detach(), *args[1:])
