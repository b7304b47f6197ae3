"""One rollout step: guidance, mean, noise, next sample and its log-probability in one pass.

    v    = u + w (velocity - u)                   under guidance, else velocity
    x'   = round(A x + B v + C eps)               round: to the dtype of sample
    lp   = -k mean[(x' - A x - B v)^2] - c0       of the rounded x'; 0 where C = 0

velocity, uncond_velocity, sample, x': [B, ...] float32, bfloat16 or float16 in any mix; arithmetic
and log_prob are float32. Bytes moved per element: velocity (twice under guidance) + sample + x'.
The float32 sequence and the order of the sum are in reference.py. For sampling only: no gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import _checks, _ops
from .transitions import Transitions

_sde_step = _ops.op("sde_step")


def sde_step(
    velocity: Tensor,
    sample: Tensor,
    transitions: Transitions,
    step: int | Tensor,
    *,
    seeds: Tensor | None = None,
    noise: Tensor | None = None,
    uncond_velocity: Tensor | None = None,
    guidance_scale: float = 1.0,
    out: Tensor | None = None,
    log_prob_out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(prev_sample, log_prob): the next sample [B, ...] in the dtype of sample, float32 [B].

    Args:
        velocity, uncond_velocity, sample: [B, ...], one shape and device, any mix of float dtypes.
        transitions: table on the same device.
        step: row of the table: int, 0-dim or [B] int64. Tensors keep torch.compile from
        recompiling. seeds: int64 [B], the key of each sample's noise. Or noise: [B, ...] standard
        normals.
            Neither is needed when every row of the table is an ODE step.
        out, log_prob_out: contiguous buffers to write into, for example rows of a trajectory.

    Raises TypeError or ValueError naming the argument; RuntimeError when a gradient is asked for.
    """
    _checks.check_latents(
        sample, velocity=velocity, uncond_velocity=uncond_velocity, noise=noise, out=out
    )
    _checks.check_guidance(uncond_velocity, guidance_scale)
    _checks.check_transitions(transitions, sample)
    rows = _checks.resolve_step(step, transitions, sample)
    if seeds is not None and noise is not None:
        raise ValueError("seeds and noise were both given; give one of them")
    if seeds is not None:
        _checks.check_seeds(seeds, sample)
    elif noise is None and not transitions.deterministic:
        raise ValueError("seeds or noise must be given: the transitions are stochastic")
    if torch.is_grad_enabled():
        for name, value in (("velocity", velocity), ("uncond_velocity", uncond_velocity)):
            if value is not None and value.requires_grad:
                raise RuntimeError(
                    f"sde_step has no gradient but {name} requires one: call it under "
                    "torch.no_grad() and use log_prob or grpo_loss for the differentiable score"
                )
    out, log_prob_out = _outputs(sample, out, log_prob_out)
    _sde_step(
        velocity.detach(),
        None if uncond_velocity is None else uncond_velocity.detach(),
        float(guidance_scale),
        sample.detach(),
        transitions.table,
        rows,
        seeds,
        noise,
        out,
        log_prob_out,
    )
    return out, log_prob_out


def _outputs(sample: Tensor, out: Tensor | None, log_prob: Tensor | None) -> tuple[Tensor, Tensor]:
    """The given buffers, checked, or new ones."""
    dtype = torch.float64 if sample.dtype == torch.float64 else torch.float32
    if out is None:
        out = torch.empty(sample.shape, dtype=sample.dtype, device=sample.device)
    elif out.dtype != sample.dtype or not out.is_contiguous():
        raise ValueError(f"out must be contiguous and {sample.dtype} like sample, got {out.dtype}")
    elif not torch.compiler.is_compiling() and out.data_ptr() == sample.data_ptr() != 0:
        raise ValueError("out must not be the memory of sample")
    if log_prob is None:
        log_prob = torch.empty(sample.shape[0], dtype=dtype, device=sample.device)
    else:
        _checks.check_rows("log_prob_out", log_prob, sample)
        if log_prob.dtype != dtype or not log_prob.is_contiguous():
            raise ValueError(f"log_prob_out must be contiguous and {dtype}, got {log_prob.dtype}")
    return out, log_prob
