"""Flow-GRPO (arXiv 2505.05470): online reinforcement learning of a flow-matching model. Start here.

One iteration, for K prompts with G samples each (B = K G rows), T steps of the sampler:

    x_0 ~ N(0, I);  x_{i+1} = A_i x_i + B_i v(x_i, sigma_i) + C_i eps        rollout.py, flowgrpo_kernels
    r_b = sum_n weight_n reward_n(image_b, prompt_b)                         rewards/
    A_b = (r_b - mean of its group) / (std + 1e-4)                           advantages.py
    minimise mean over rows and trained steps of
        max(-A r, -A clip(r, 1 - c, 1 + c)) + beta KL(policy || reference)   losses.py
    r = exp(log p(x_{i+1} | x_i) - the same at the rollout), log p averaged over the elements

in `optim.updates_per_iteration` optimizer steps, each on its own part of the rows. Evaluation samples
with the deterministic sampler and the averaged weights.

Deliberate departures from the paper and from flow_grpo (losses.py and advantages.py have their own):

1. A window of stochastic steps, if any, is drawn once per group (flow_grpo: per process). Rows with
   different windows share a batch: which transition a row takes is an index into a table.
2. The update goes over the same chunks of rows in the same order as the rollout, unshuffled, so each
   forward repeats the rollout's bits and the ratios of the first update are exactly 1.0. The largest
   deviation is measured in every iteration and stops the run past `optim.ratio_tolerance`.
3. Groups whose rewards are all equal stay in the batch with advantage 0 (flow_grpo drops the rows).
   A group whose reward failed stays with weight 0.
4. Frozen weights may be 16-bit, adapters are float32, and there is no autocast.
5. Every random number is a hash of (seed, purpose, iteration, index): no generator has a state, so a
   resumed run goes on with the same numbers.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from flowgrpo import losses, prompts, rewards, runs, seeds
from flowgrpo.advantages import advantages
from flowgrpo.config import Config, ConfigError
from flowgrpo.policies import Conditioning, Policy
from flowgrpo.records import Experience, Prompts, Scores, Trajectory
from flowgrpo.rollout import Schedule, chunks, decode, rollout, schedule, table_rows, windows

OBJECTIVES: dict[str, Callable[..., losses.Loss]] = {"grpo": losses.grpo}
"""What an update can minimise: f(policy, plan, experience, rows, turn, config) -> Loss."""


class RatioError(RuntimeError):
    """The first ratios of an update were not 1: rollout and update computed different velocities."""


@dataclass(frozen=True)
class Parts:
    """What a run works with, made once by `setup`."""

    policy: Policy
    plan: Schedule
    state: runs.State
    prompts: Prompts
    scorer: rewards.Scorer
    uncond: Conditioning | None


def setup(config: Config) -> Parts:
    """Load the model, make it trainable, and check all that can be checked before the first image."""
    runs.prepare_process(config)
    scorer = rewards.Scorer(config.reward.weights, config.reward.retries)
    prompt_set = prompts.load(config.sample.prompts, "train")
    prompts.batch(prompt_set, config.sample.prompts_per_iteration, seed=0, iteration=0)
    policy = _load_policy(config)
    state = runs.State.create(policy.transformer, config.optim)
    plan = schedule(policy, config.sample, config.optim.kl)
    uncond = policy.encode([""]) if config.sample.guidance_scale != 1 else None
    return Parts(policy, plan, state, prompt_set, scorer, uncond)


def _load_policy(config: Config) -> Policy:
    whole = config.policy.adapter == "full"
    if whole and config.policy.dtype not in ("auto", "float32"):
        raise ConfigError(
            f"policy.dtype is {config.policy.dtype} with policy.adapter full, but weights that are "
            "trained are float32; set policy.dtype to auto, or policy.adapter to lora."
        )
    dtype = "float32" if whole else config.policy.dtype
    policy = Policy.load(config.policy.model, device=config.policy.device, dtype=dtype)
    if whole and config.optim.beta > 0:
        policy.keep_reference()
    seed = int(seeds.sample_seeds(config.run.seed, seeds.ADAPTER)[0])
    runs.add_adapter(policy.transformer, config.policy, seed)
    return policy


def run(config: Config) -> dict[str, Any]:
    """Train as `config` says; returns what the run directory's summary.json holds."""
    parts = setup(config)
    policy, state = parts.policy, parts.state
    for _ in range(state.iteration, config.run.steps):
        clock = Clock(policy.device)
        batch = prompts.batch(
            parts.prompts,
            config.sample.prompts_per_iteration,
            seed=config.run.seed,
            iteration=state.iteration,
        )
        with clock("rollout"):
            conditioning, groups, trajectory = collect(parts, batch, config)
            images = decode(policy, trajectory.latents[-1], config.sample.batch_size)
        with clock("reward"):
            scores = parts.scorer(images, batch, config.sample.group_size)
        experience = Experience(
            trajectory, conditioning, parts.uncond, groups, *weigh(scores, parts, config)
        )
        with clock("update"):
            metrics = update(parts, experience, config)
        state.iteration += 1
        print(state.iteration, metrics | summarise(scores, experience, config), clock.seconds)
    return {}


def collect(
    parts: Parts, batch: Prompts, config: Config
) -> tuple[Conditioning, Tensor, Trajectory]:
    """The rollout of one iteration: embeddings of its prompts, the prompt of each row, the states."""
    sample, place = config.sample, {"seed": config.run.seed, "iteration": parts.state.iteration}
    conditioning = parts.policy.encode(batch.texts)
    groups = torch.arange(len(batch), device=parts.policy.device)
    groups = groups.repeat_interleave(sample.group_size)
    row_seeds, noise_seeds = prompts.row_seeds(
        len(batch), sample.group_size, shared_noise=sample.shared_noise, **place
    )
    positions = windows(len(batch), sample.group_size, sample, **place)
    trajectory = rollout(
        parts.policy,
        conditioning,
        parts.plan,
        table_rows(positions, sample.steps),
        groups=groups,
        seeds=row_seeds,
        noise_seeds=noise_seeds,
        batch_size=sample.batch_size,
        uncond=parts.uncond,
        guidance_scale=sample.guidance_scale,
        positions=positions,
        keep_velocities=config.optim.guard,
    )
    return conditioning, groups, trajectory


def weigh(scores: Scores, parts: Parts, config: Config) -> tuple[Tensor, Tensor]:
    """Advantages and weights of the rows, on the device."""
    rewards_kg = scores.total.view(-1, config.sample.group_size)
    found = advantages(rewards_kg, config.optim.advantage_std)
    return tuple(x.to(parts.policy.device) for x in found)


def update(parts: Parts, experience: Experience, config: Config) -> dict[str, Any]:
    """The optimizer steps of one iteration; returns means over its micro-steps."""
    objective = OBJECTIVES["grpo"]
    turns = experience.trajectory.positions.shape[0]
    every = chunks(config.sample.rows, config.sample.batch_size)
    share = config.chunks_per_update
    sums: dict[str, Tensor] = {}
    norms, deviations = [], []
    for number in range(config.optim.updates_per_iteration):
        for rows in every[number * share : (number + 1) * share]:
            for turn in range(turns):
                out = objective(parts.policy, parts.plan, experience, rows, turn, config)
                (out.loss / (share * turns)).backward()
                for name, value in out.metrics.items():
                    sums[name] = sums.get(name, 0) + value
                if number == 0:
                    deviations.append((out.ratio - 1).abs().amax())
        norms.append(parts.state.step())
    # Read only here: until now nothing has waited for the device.
    error = float(torch.stack(deviations).amax())
    check_ratio(error, config)
    means = {name: float(value) / (len(every) * turns) for name, value in sums.items()}
    return means | {"grad_norm": [float(norm) for norm in norms], "max_ratio_error": error}


def check_ratio(error: float, config: Config) -> None:
    """Raise if the ratios of the first update were not 1."""
    if not error <= config.optim.ratio_tolerance:
        raise RatioError(
            f"the first update after a rollout saw |ratio - 1| up to {error:.3g}, but at most "
            f"{config.optim.ratio_tolerance:g} is allowed (optim.ratio_tolerance), because rollout "
            "and update must compute the same velocities; use the same kernels, dtype and "
            "batch_size in both, or raise the tolerance."
        )


def summarise(scores: Scores, experience: Experience, config: Config) -> dict[str, Any]:
    """What is logged of the rewards of one iteration."""
    kept = scores.total.isfinite()
    equal = (experience.advantages.view(-1, config.sample.group_size) == 0).all(dim=1)
    return {
        "reward": float(scores.total[kept].mean()),
        "reward_std": float(scores.total[kept].std(correction=0)),
        "rewards": {name: float(part[kept].mean()) for name, part in scores.parts.items()},
        "equal_groups": float(equal.float().mean()),
        "dropped_groups": int(scores.dropped.sum()),
    }


@dataclass
class Clock:
    """Seconds of the stages of one iteration: ``with clock("rollout"): ...``."""

    device: torch.device
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - start
