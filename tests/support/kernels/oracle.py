"""Independent float64 versions of the ops, from the samplers' formulas, differentiated by autograd.

Not from the transition table: this file repeats the mathematics of the peers, so that a mistake in
the table or the reference shows. Also batches of random inputs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from flowgrpo_kernels import cps, dance_sde, flow_sde, ode

SIGMAS = (1.0, 0.96, 0.91, 0.85, 0.78, 0.7, 0.6, 0.45, 0.27, 0.0)
MAKERS = {"flow_sde": flow_sde, "dance_sde": dance_sde, "cps": cps}
SHAPES = ((3, 24, 24), (16, 12, 20), (1,), (3, 5, 7), (64, 65), (4, 3, 6, 10), (4097,), (2, 5000))
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Relative to max(1, |value|), the accuracy that design rule 5 states for float32.
LOG_PROB_TOLERANCE = 1e-6


def make(kind: str, noise_level: float = 0.7, kl: str = "std_dev"):
    return ode(SIGMAS) if kind == "ode" else MAKERS[kind](SIGMAS, noise_level, kl)


@dataclass
class Batch:
    velocity: Tensor
    sample: Tensor
    uncond: Tensor
    ref: Tensor
    old: Tensor
    seeds: Tensor
    step: Tensor
    advantages: Tensor
    weight: Tensor

    def to(self, dtype: torch.dtype) -> Batch:
        """Every floating tensor in dtype."""
        cast = (v.to(dtype) if v.is_floating_point() else v for v in vars(self).values())
        return Batch(*cast)


def batch(rows: int = 4, shape=(3, 24, 24), dtype=torch.float32, sample_dtype=None, last=8):
    """Random inputs; velocities of one model family (close to each other), steps in [0, last)."""
    g = torch.Generator().manual_seed(rows * 1000 + math.prod(shape))

    def normal(scale=1.0, base=0.0):
        return base + scale * torch.randn(rows, *shape, generator=g)

    v = normal()
    latents = [v, normal(), v + normal(0.1), v + normal(0.02), v + normal(0.01)]
    latents = [x.to(dtype) for x in latents]
    latents[1] = latents[1].to(sample_dtype or dtype)
    seeds = torch.randint(-(2**62), 2**62, (rows,), generator=g)
    step = torch.randint(0, last, (rows,), generator=g)
    advantages = torch.randn(rows, generator=g)
    weight = torch.rand(rows, generator=g) + 0.5
    return Batch(*latents, seeds, step, advantages, weight)


def gaussian(kind: str, a: float, i: int) -> tuple[float, float, float, float, float]:
    """(A, B, C, std_dev_t, dt) of one step, by the peers' expressions in Python floats."""
    s, p = SIGMAS[i], SIGMAS[i + 1]
    dt = p - s
    if kind == "cps":
        std = p * math.sin(a * math.pi / 2)
        q = math.sqrt(max(p**2 - std**2, 0.0))
        # x0 = x - s v, x1 = x + (1 - s) v, mean = (1 - p) x0 + q x1
        return (1 - p) + q, -s * (1 - p) + (1 - s) * q, std, std, dt
    std = a if kind == "dance_sde" else a * math.sqrt(s / (1 - (SIGMAS[1] if s == 1 else s)))
    mean_x = 1 + std**2 / (2 * s) * dt
    mean_v = (1 + std**2 * (1 - s) / (2 * s)) * dt
    return mean_x, mean_v, std * math.sqrt(-dt), std, dt


def rows(kind: str, a: float, step: Tensor, ndim: int) -> list[Tensor]:
    """The five numbers of `gaussian` for each row, float64 [B, 1, ...]."""
    values = [gaussian(kind, a, int(i)) for i in step]
    table = torch.tensor(values, dtype=torch.float64)
    return [c.view(-1, *[1] * (ndim - 1)) for c in table.unbind(1)]


def log_prob(kind: str, a: float, step: Tensor, velocity, sample, prev_sample) -> Tensor:
    """float64 [B], differentiable in velocity."""
    drift_x, drift_v, c, _, _ = rows(kind, a, step, sample.ndim)
    square = (prev_sample.double() - drift_x * sample.double() - drift_v * velocity.double()) ** 2
    if kind == "cps":
        result = -square
    else:
        result = -square / (2 * c**2) - c.log() - 0.5 * math.log(2 * math.pi)
    return result.flatten(1).mean(1)


def loss(
    kind, a, step, velocity, sample, prev_sample, old_log_prob, advantages, *, ref=None, beta=0.0,
    clip=(1e-4, 1e-4), adv_clip=5.0, weight=None, kl_weight=None, old=None, kl="std_dev",
) -> Tensor:  # fmt: skip
    """The GRPO loss in float64 by torch.maximum and torch.clamp, differentiable in velocity."""
    lp = log_prob(kind, a, step, velocity, sample, prev_sample)
    _, drift_v, c, std, dt = rows(kind, a, step, sample.ndim)
    delta = lp - old_log_prob.double()
    flat = lambda x: x.flatten(1).mean(1)  # noqa: E731
    if old is not None:
        bias = flat((drift_v * (velocity.double() - old.double())) ** 2 / (2 * c**2))
        delta = (delta + bias) * c.flatten()
    ratio = delta.exp()
    adv = advantages.double().clamp(-adv_clip, adv_clip)
    policy = torch.maximum(-adv * ratio, -adv * ratio.clamp(1 - clip[0], 1 + clip[1]))
    if old is not None:
        policy = policy / -dt.flatten()
    one = torch.ones_like(adv)
    total = policy * (one if weight is None else weight.double())
    if ref is not None:
        spread = c if kl == "gaussian" else std
        kl_row = flat((drift_v * (velocity.double() - ref.double())) ** 2 / (2 * spread**2))
        chosen = weight if kl_weight is None else kl_weight
        total = total + beta * kl_row * (one if chosen is None else chosen.double())
    return total.mean()


@dataclass
class NftBatch:
    velocity: Tensor
    uncond: Tensor
    sample: Tensor
    x0: Tensor
    old: Tensor
    ref: Tensor
    sigma: Tensor
    optimality: Tensor
    weight: Tensor

    def to(self, dtype: torch.dtype) -> NftBatch:
        """Every tensor in dtype."""
        return NftBatch(*(v.to(dtype) for v in vars(self).values()))

    def take(self, rows) -> NftBatch:
        """Some of the rows."""
        return NftBatch(*(v[rows] for v in vars(self).values()))

    @property
    def args(self) -> tuple:
        """Positional arguments of nft_loss."""
        return self.velocity, self.sample, self.x0, self.old, self.sigma, self.optimality


def nft_batch(rows: int = 4, shape=(3, 24, 24), dtype=torch.float32, sample_dtype=None):
    """Noised results, and velocities near eps - x0 as a trained model has them."""
    g = torch.Generator().manual_seed(rows * 1000 + math.prod(shape))

    def normal(scale=1.0):
        return scale * torch.randn(rows, *shape, generator=g)

    x0, eps = normal(), normal()
    sigma, optimality = torch.rand(2, rows, generator=g)
    weight = torch.rand(rows, generator=g) + 0.5
    s = sigma.view(-1, *[1] * len(shape))
    old = eps - x0 + normal(0.5)
    velocities = [old + normal(0.1), old + normal(0.1), old, old + normal(0.2)]
    v, u, old, ref = (x.to(dtype) for x in velocities)
    sample, x0 = (x.to(sample_dtype or dtype) for x in ((1 - s) * x0 + s * eps, x0))
    return NftBatch(v, u, sample, x0, old, ref, sigma, optimality, weight)


def nft_loss(
    velocity, sample, x0, old, sigma, r, *, beta=1.0, ref=None, kl_weight=0.0, weight=None,
    own_kl=None, floor=1e-5,
) -> Tensor:  # fmt: skip
    """DiffusionNFT's loss in float64 from v+ and v- themselves, differentiable in velocity."""
    v, x, x0, old, sigma, r = (t.double() for t in (velocity, sample, x0, old, sigma, r))
    flat = lambda t: t.flatten(1).mean(1)  # noqa: E731
    s = sigma.view(-1, *[1] * (x.ndim - 1))

    def error(implicit):
        residual = x - s * implicit - x0
        return flat(residual**2) / flat(residual.detach().abs()).clamp_min(floor)

    positive = error(beta * v + (1 - beta) * old)
    negative = error((1 + beta) * old - beta * v)
    one = torch.ones_like(r)
    total = (r * positive + (1 - r) * negative) * (one if weight is None else weight.double())
    if ref is not None:
        chosen = weight if own_kl is None else own_kl
        kl = flat((v - ref.double()) ** 2)
        total = total + kl_weight * kl * (one if chosen is None else chosen.double())
    return total.mean()


def error(value: Tensor, exact: Tensor) -> float:
    """Largest error relative to max(1, |exact|)."""
    exact = exact.detach().double()
    return float(((value.detach().double() - exact).abs() / exact.abs().clamp_min(1)).max())
