"""Eager steps of the trainers that there are drop-ins for: the baselines of bench_dropins.py.

Written from the formulas of compat/ (none of the peers' code is here): the same intermediate
tensors, in float32, with autograd, and the look-ups of one timestep a row where the trainer has
them. flow_grpo's own step is flow_grpo_ops.py. Each function scores a stored x' (a replay) and
returns what the trainer's function returns.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from providers import flow_grpo_ops


def _shaped(x: Tensor, ndim: int) -> Tensor:
    return x.reshape(-1, *[1] * (ndim - 1))


def _gaussian(prev_sample: Tensor, mean: Tensor, c: Tensor) -> Tensor:
    """log_prob [B] with the constants."""
    log_prob = (
        -((prev_sample.detach() - mean) ** 2) / (2 * c**2)
        - torch.log(c)
        - torch.log(torch.sqrt(2 * torch.as_tensor(math.pi)))
    )
    return log_prob.mean(dim=tuple(range(1, log_prob.ndim)))


def _flow_mean(v, x, sigma, dt, std) -> Tensor:
    return x * (1 + std**2 / (2 * sigma) * dt) + v * (1 + std**2 * (1 - sigma) / (2 * sigma)) * dt


def _flow_std(sigma: Tensor, sigma_max, level) -> Tensor:
    return torch.sqrt(sigma / (1 - torch.where(sigma == 1, sigma_max, sigma))) * level


def flow_grpo(scheduler, v, timestep, x, prev_sample, level):
    """flow_grpo, and verl-omni with other names: look-up a row, mean, log_prob."""
    sigmas = scheduler.lookup(timestep, x.ndim)
    return flow_grpo_ops.arithmetic(sigmas, v, x, prev_sample, level)


def flow_factory(scheduler, v, timestep, x, prev_sample, level):
    """Flow-Factory by timesteps: look-up a row, then values broadcast to the batch."""
    sigma, sigma_next, second = scheduler.lookup(timestep, x.ndim)
    v, x, prev_sample = v.float(), x.float(), prev_sample.float()
    level = torch.tensor([level]).expand(len(x)).reshape(sigma.shape)
    dt = sigma_next - sigma
    std = _flow_std(sigma, torch.tensor([second]), level)
    mean = _flow_mean(v, x, sigma, dt, std)
    return prev_sample, mean, _gaussian(prev_sample, mean, std * torch.sqrt(-dt)), std, dt


def flow_factory_pair(v, timestep, timestep_next, x, prev_sample, level, second):
    """Flow-Factory with timestep_next: sigmas are timesteps / 1000."""
    sigma, sigma_next = (_shaped(t / 1000, x.ndim) for t in (timestep, timestep_next))
    v, x, prev_sample = v.float(), x.float(), prev_sample.float()
    level = torch.tensor([level]).expand(len(x)).reshape(sigma.shape)
    dt = sigma_next - sigma
    std = _flow_std(sigma, torch.tensor([second.item()]), level)
    mean = _flow_mean(v, x, sigma, dt, std)
    return prev_sample, mean, _gaussian(prev_sample, mean, std * torch.sqrt(-dt)), std, dt


def unirl(v, x, sigma, sigma_next, prev_sample, eta, sigma_max):
    """UniRL: sigmas are given, x' goes through the dtype of x."""
    dtype = x.dtype
    v, x, prev_sample = v.float(), x.float(), prev_sample.float()
    sigma, sigma_next = _shaped(sigma.float(), x.ndim), _shaped(sigma_next.float(), x.ndim)
    dt = sigma_next - sigma
    std = _flow_std(sigma, sigma_max, eta)
    mean = _flow_mean(v, x, sigma, dt, std)
    prev_sample = prev_sample.to(dtype=dtype).float()
    return prev_sample, _gaussian(prev_sample, mean, std * torch.sqrt(-dt)), mean


def miles(v, x, prev_sample, level, sigma, sigma_next, sigma_max):
    """miles-diffusion: sigmas are given."""
    v, x, prev_sample = v.float(), x.float(), prev_sample.float()
    sigma, sigma_next = _shaped(sigma, x.ndim), _shaped(sigma_next, x.ndim)
    sigma_max = _shaped(sigma_max, x.ndim)
    dt = sigma_next - sigma
    one = torch.isclose(sigma, sigma.new_tensor(1.0))
    std = torch.sqrt(sigma / (1 - torch.where(one, sigma_max, sigma))) * level
    mean = _flow_mean(v, x, sigma, dt, std)
    return prev_sample, _gaussian(prev_sample, mean, std * torch.sqrt(-dt)), mean, std


def mixgrpo_flow(v, x, eta, sigmas, index, prev_sample):
    """MixGRPO's flow step: also pred_original."""
    sigma, sigma_next, second = sigmas[index], sigmas[index + 1], sigmas[1].item()
    dt = sigma_next - sigma
    std = _flow_std(sigma, second, eta)
    clean = x - sigma * v
    mean = _flow_mean(v, x, sigma, dt, std)
    c = std * torch.sqrt(-dt)
    return prev_sample, clean, _gaussian(prev_sample, mean, c), mean, c


def dance_grpo(v, x, eta, sigmas, index, prev_sample, constants: bool):
    """DanceGRPO's step, and MixGRPO's of it, which has no constants."""
    sigma, sigma_next = sigmas[index], sigmas[index + 1]
    step = sigma_next - sigma
    mean = x + step * v
    clean = x - sigma * v
    c = eta * math.sqrt(sigma - sigma_next)
    score = -(x - clean * (1 - sigma)) / sigma**2
    mean = mean + (-0.5 * eta**2 * score) * step
    square = -((prev_sample.detach().float() - mean.float()) ** 2) / (2 * c**2)
    if constants:
        square = square - math.log(c) - torch.log(torch.sqrt(2 * torch.as_tensor(math.pi)))
    return prev_sample, clean, square.mean(dim=tuple(range(1, square.ndim)))


def precise(scheduler, v, timestep, x, prev_sample, level):
    """Precise: deviations of the whole schedule at each call, then a step that preserves."""
    v, x, prev_sample = v.float(), x.float(), prev_sample.float()
    index = torch.tensor([scheduler.index_for_timestep(t) for t in timestep])
    deviations = []
    for s, p in zip(scheduler.sigmas[:-1], scheduler.sigmas[1:], strict=True):
        ratio = (p * (1 - s)) / (s * (1 - p))
        deviations.append(p * torch.sqrt(1 - ratio ** (level**2)))
    std = _shaped(torch.stack(deviations).clamp(min=1e-6)[index], x.ndim)
    sigma = _shaped(scheduler.sigmas[index], x.ndim)
    sigma_next = _shaped(scheduler.sigmas[index + 1], x.ndim)
    clean, noise = x - sigma * v, x + v * (1 - sigma)
    mean = clean * (1 - sigma_next) + noise * torch.sqrt((sigma_next**2 - std**2).clamp(min=0))
    return prev_sample, _gaussian(prev_sample, mean, std), mean
