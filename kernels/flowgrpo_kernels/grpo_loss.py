"""The clipped GRPO loss of a stored step, forward and backward straight to the velocities.

    log_prob = as in log_prob.py
    ratio    = exp(log_prob - old_log_prob)
    policy   = max(-adv ratio, -adv clamp(ratio, 1 - clip_low, 1 + clip_high))
    KL       = K B^2 mean[(v - v_ref)^2]                                with ref_velocity
    loss     = 1/B sum_rows[row_weight policy] + kl_weight 1/B sum_rows[kl_row_weight KL]

adv is the advantage clamped to +-adv_clip. Guard (GRPO-Guard), with old_velocity, the velocity of
the rollout: ratio = exp((log_prob - old_log_prob + k B^2 mean[(v - v_old)^2]) C), policy divided
by |dt|. Ties at the clip boundary follow torch.maximum and torch.clamp: the boundary itself has a
gradient.

Shapes and dtypes as in sde_step.py. K is picked where the transitions are made (kl="std_dev" or
"gaussian"), and kl_weight with it. Bytes per element: every latent given is read once forward and
once backward, and the gradients are written; nothing of the size of a latent is stored between the
two. The native backend reads every latent once in all: it computes the gradient together with the
loss, for the grad_loss of the last backward (1, or 1/4 of loss / 4), and keeps it until backward.
When grad_loss turns out to be another value, backward reads everything again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

# _grpo_kernels registers the Triton launchers.
from . import _checks, _grpo_kernels, _ops  # noqa: F401
from ._autograd import once_differentiable
from .transitions import Transitions

_forward = _ops.op("grpo_loss_forward")
_backward = _ops.op("grpo_loss_backward")
_gradient = _ops.op("grpo_loss_gradient")


class GrpoLoss(NamedTuple):
    """Everything stays on the device. Only `loss` carries a gradient."""

    loss: Tensor  # 0-dim: policy_loss + kl_weight * kl
    policy_loss: Tensor  # 0-dim: mean over rows of row_weight * policy
    kl: Tensor  # 0-dim: mean over rows of kl_row_weight * KL; 0 without ref_velocity
    log_prob: Tensor  # [B]
    ratio: Tensor  # [B]
    clip_fraction: Tensor  # 0-dim: share of rows whose ratio is outside the clip range


class _GrpoLoss(torch.autograd.Function):
    """Backward reads the latents once more."""

    @staticmethod
    def forward(ctx, uncond_grad, *args):
        outputs = _forward(*args)
        _keep(ctx, uncond_grad, args, outputs)
        return tuple(outputs[:6])

    @staticmethod
    @once_differentiable("grpo_loss")
    def backward(ctx, grad_loss, *unused):
        if grad_loss is None:
            return (None,) * 19
        return None, *_gradients(ctx, ctx.saved_tensors, grad_loss), *[None] * 16


class _GrpoLossInOnePass(torch.autograd.Function):
    """Forward writes the gradient too. What needs none comes in one tuple: autograd spends time on
    each argument of its own."""

    # grad_loss of the last backward: a guess at the next one, which changes no result.
    expected = 1.0

    @staticmethod
    def forward(ctx, velocity, uncond, uncond_grad, constants):
        args = velocity, uncond, *constants
        expected = _GrpoLossInOnePass.expected
        *outputs, dv, du = _gradient(*args, expected, uncond_grad)
        ctx.ready = expected, dv, du
        _keep(ctx, uncond_grad, args, outputs)
        return tuple(outputs[:6])

    @staticmethod
    @once_differentiable("grpo_loss")
    def backward(ctx, grad_loss, *unused):
        if grad_loss is None:
            return (None,) * 4
        # Read even if not needed: autograd then refuses what was changed in place meanwhile.
        saved = ctx.saved_tensors
        # Handed out once: whoever gets the gradient may change it in place.
        ready, ctx.ready = ctx.ready, None
        asked = None
        if ready is not None and _readable(grad_loss):
            # Not compared through the class, where another thread may write, too.
            asked = _GrpoLossInOnePass.expected = grad_loss.item()
        if ready is not None and ready[0] == asked:
            dv, du = ready[1], (ready[2] if ctx.uncond_grad else None)
        else:
            dv, du = _gradients(ctx, saved, grad_loss)
        return dv, du, None, None


def _readable(x: Tensor) -> bool:
    """Whether x has one value: not under vmap or tracing, which may be of the backward alone."""
    # autograd.grad(is_grads_batched=True) has a vmap of its own.
    kinds = torch._C._functorch
    batched = kinds.is_functorch_wrapped_tensor(x) or kinds.is_legacy_batchedtensor(x)
    return type(x) is Tensor and not batched


def _keep(ctx, uncond_grad: bool, args: tuple, outputs: Sequence[Tensor]) -> None:
    """What `_gradients` needs. args and outputs are those of the op grpo_loss_forward."""
    velocity, uncond, scale, sample, prev_sample, _, _, table, step, ref, ref_u, old = args[:12]
    ctx.save_for_backward(
        outputs[6], velocity, uncond, sample, prev_sample, table, step, ref, ref_u, old
    )
    ctx.scale, ctx.uncond_grad = scale, uncond_grad
    ctx.mark_non_differentiable(*outputs[1:6])
    # The gradients of the other outputs are never used: no zeros are made for them.
    ctx.set_materialize_grads(False)


def _gradients(ctx, saved: tuple, grad_loss: Tensor) -> tuple[Tensor, Tensor | None]:
    """Of velocity and uncond_velocity, from what `_keep` saved."""
    coefs, velocity, uncond, sample, prev_sample, table, step, ref, ref_u, old = saved
    dv, du = _backward(
        grad_loss, coefs, velocity, uncond, ctx.scale, sample, prev_sample, table, step,
        ref, ref_u, old, ctx.uncond_grad,
    )  # fmt: skip
    return dv, (du if ctx.uncond_grad else None)


def _in_one_pass(velocity: Tensor, sample: Tensor) -> bool:
    """Whether forward also computes the gradient that backward is expected to be asked for.

    On the native backend: there a row is still in the cache when its ratio is known. Not under
    tracing, where backward could not ask for the value of grad_loss.
    """
    return (
        sample.device.type == "cpu"
        and type(velocity) in (Tensor, torch.nn.Parameter)
        and not torch.compiler.is_compiling()
        and _ops.backend_of("grpo_loss_gradient", "cpu", sample.dtype) == "native"
    )


def grpo_loss(
    velocity: Tensor,
    sample: Tensor,
    prev_sample: Tensor,
    old_log_prob: Tensor,
    advantages: Tensor,
    transitions: Transitions,
    step: int | Tensor,
    *,
    ref_velocity: Tensor | None = None,
    kl_weight: float = 0.0,
    clip_range: float | tuple[float, float] = 1e-4,
    adv_clip: float = 5.0,
    row_weight: Tensor | None = None,
    kl_row_weight: Tensor | None = None,
    old_velocity: Tensor | None = None,
    uncond_velocity: Tensor | None = None,
    guidance_scale: float = 1.0,
    ref_uncond_velocity: Tensor | None = None,
    uncond_grad: bool = False,
) -> GrpoLoss:
    """The loss of one batch of stored steps, differentiable once in velocity.

    Args:
        velocity, sample, prev_sample: [B, ...], one shape and device, any mix of float dtypes.
        old_log_prob, advantages: [B] float.
        transitions, step: as for sde_step; rows may be at different steps.
        ref_velocity: the reference model's velocity. Under guidance it is combined already, unless
            ref_uncond_velocity is given too: then both are combined here with guidance_scale.
        kl_weight: beta. The value is tied to the convention of K (see transitions.py).
        clip_range: one number, or (clip_low, clip_high).
        adv_clip: the bound on |advantage|; float("inf") for none.
        row_weight: [B], weight of each row's policy term; sums are divided by B, not by the
            weights.
        kl_row_weight: [B], weight of each row's KL term; row_weight when None. To reweight the
            policy term alone, pass ones, or the rows' keep mask.
        old_velocity: the rollout's (combined) velocity; switches Guard on. Only for SDE and ODE
            rows.
        uncond_velocity, guidance_scale, uncond_grad: as for log_prob.

    A row of weight 0 adds 0 to the loss even where its advantage is NaN. An ODE row has ratio
    exp(-old_log_prob) and KL 0. Neither has a gradient, whatever its latents hold.
    """
    low, high = _clip_bounds(clip_range)
    latents = {
        "velocity": velocity,
        "prev_sample": prev_sample,
        "uncond_velocity": uncond_velocity,
        "ref_velocity": ref_velocity,
        "ref_uncond_velocity": ref_uncond_velocity,
        "old_velocity": old_velocity,
    }
    per_row = {
        "old_log_prob": old_log_prob,
        "advantages": advantages,
        "row_weight": row_weight,
        "kl_row_weight": kl_row_weight,
    }
    _check(sample, latents, per_row, transitions, guidance_scale, kl_weight, adv_clip)
    rows = _checks.resolve_step(step, transitions, sample)
    uncond, uncond_grad = _checks.uncond_half(uncond_velocity, uncond_grad)
    args = (
        velocity, uncond, float(guidance_scale), sample, prev_sample, old_log_prob, advantages,
        transitions.table, rows, ref_velocity, ref_uncond_velocity, old_velocity,
        row_weight, row_weight if kl_row_weight is None else kl_row_weight,
        float(kl_weight), low, high, float(adv_clip),
    )  # fmt: skip
    if not (torch.is_grad_enabled() and (velocity.requires_grad or uncond_grad)):
        outputs = _forward(velocity.detach(), *args[1:])
    elif _in_one_pass(velocity, sample):
        outputs = _GrpoLossInOnePass.apply(velocity, uncond, uncond_grad, args[2:])
    else:
        outputs = _GrpoLoss.apply(uncond_grad, *args)
    loss, policy, kl, fraction, lp, ratio = outputs[:6]
    return GrpoLoss(loss, policy, kl, lp, ratio, fraction)


def _clip_bounds(clip_range: float | tuple[float, float]) -> tuple[float, float]:
    if isinstance(clip_range, (tuple, list)):
        if len(clip_range) != 2:
            raise ValueError(f"clip_range must be a number or (low, high), got {clip_range!r}")
        low, high = clip_range
    else:
        low = high = clip_range
    for value in (low, high):
        _checks.check_numbers(clip_range=value)
    if not (0.0 <= low <= 1.0 and high >= 0.0):
        raise ValueError(f"clip_range must be low in [0, 1] and high >= 0, got {clip_range!r}")
    return float(low), float(high)


def _check(
    sample: Tensor,
    latents: dict[str, Tensor | None],
    per_row: dict[str, Tensor | None],
    transitions: Transitions,
    guidance_scale: float,
    kl_weight: float,
    adv_clip: float,
) -> None:
    """Everything but step and clip_range."""
    _checks.check_latents(sample, **latents)
    _checks.check_guidance(latents["uncond_velocity"], guidance_scale)
    _checks.check_transitions(transitions, sample)
    for name, value in per_row.items():
        if value is not None or name in ("old_log_prob", "advantages"):
            _checks.check_rows(name, value, sample)
    halves = ("velocity", "uncond_velocity")
    constants = {name: value for name, value in latents.items() if name not in halves}
    _checks.check_constants(sample=sample, **constants, **per_row)
    _checks.check_numbers(kl_weight=kl_weight, adv_clip=adv_clip)
    if not kl_weight >= 0.0:
        raise ValueError(f"kl_weight must be >= 0, got {kl_weight}")
    if not adv_clip > 0:
        raise ValueError(f"adv_clip must be > 0, got {adv_clip}")
    if kl_weight > 0.0 and latents["ref_velocity"] is None:
        raise ValueError(f"kl_weight={kl_weight} needs ref_velocity")
    if latents["ref_uncond_velocity"] is not None and (
        latents["ref_velocity"] is None or latents["uncond_velocity"] is None
    ):
        raise ValueError("ref_uncond_velocity needs ref_velocity and uncond_velocity")
    if latents["old_velocity"] is not None and "cps" in transitions.kinds:
        raise ValueError("old_velocity (Guard) needs k = 1 / 2C^2, but transitions has cps rows")
