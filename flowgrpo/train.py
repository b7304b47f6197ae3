"""Flow-GRPO (arXiv 2505.05470): online reinforcement learning of a flow-matching model. Start here.

One iteration, for K prompts with G samples each (B = K G rows), T steps of the sampler:

    rollout     x_0 ~ N(0, I);  x_{i+1} = A_i x_i + B_i v(x_i, sigma_i) + C_i eps
    rewards     R_b = sum_n weight_n reward_n(image_b, prompt_b)
    advantages  A_b = (R_b - mean of its group) / (std + 1e-4)
    losses      minimise the mean over rows and trained steps of
                max(-A r, -A clip(r, 1 - c, 1 + c)) + beta KL(policy || reference),
                r = exp(log p(x_{i+1} | x_i) - its value at the rollout),
                log p averaged over the elements of a sample

in `optim.updates_per_iteration` optimizer steps, each on its own part of the rows. Evaluation
samples with the deterministic sampler and the averaged weights.

Deliberate departures from the paper and from flow_grpo (losses.py and advantages.py have their
own):

1. A window of stochastic steps, if any, is drawn once per group (flow_grpo: per process). Rows with
   different windows share a batch: which transition a row takes is an index into a table.
2. The update goes over the same chunks of rows in the same order as the rollout, unshuffled, so
   each forward repeats the rollout's bits and the ratios of the first update are exactly 1.0. The
   largest deviation is measured in every iteration and stops the run past `optim.ratio_tolerance`.
   With `optim.anchor` "replay" the update's own forward computes the old log p anew.
3. Groups whose rewards are all equal stay in the batch with advantage 0 (flow_grpo drops the rows).
   A group whose reward failed stays with weight 0.
4. Frozen weights may be 16-bit, adapters are float32, and there is no autocast. With float16 the
   loss is scaled for the backward pass by a fixed power of two (`loss_scale`), not by a GradScaler,
   which has a state and skips updates.
5. Every random number is a hash of (seed, purpose, iteration, index): no generator has a state, so
   a resumed run goes on with the same numbers.
6. Images of a chunk are decoded and scored while the next chunk is sampled (scoring.py).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from flowgrpo import cuda_graphs, losses, rewards, seeds
from flowgrpo.advantages import advantages
from flowgrpo.config import Config, ConfigError
from flowgrpo.policies import Conditioning, Policy, deterministic
from flowgrpo.prompts import load
from flowgrpo.records import Batch, Experience, Prompts, Scores, Trajectory
from flowgrpo.rewards.background import Scoring, Worker
from flowgrpo.runs import directory
from flowgrpo.runs.monitor import DivergedError, Reports
from flowgrpo.sampling import shared_prefix
from flowgrpo.sampling.rollout import Schedule, chunks, rollout, schedule, table_rows, windows

OBJECTIVES: dict[str, Callable[..., losses.Loss]] = {"grpo": losses.grpo}
"""What an update can minimise: f(policy, batch, config) -> Loss."""


class RatioError(RuntimeError):
    """The first ratios of an update were not 1: rollout and update disagree on the velocity."""


@dataclass(frozen=True)
class Parts:
    """What a run works with, made once by `setup`."""

    policy: Policy
    plan: Schedule
    state: directory.State
    prompts: Prompts
    scorer: rewards.Scorer
    uncond: Conditioning | None
    """Of the empty prompt; None without guidance."""
    worker: Worker | None
    """Computes rewards beside the rollout; None: afterwards."""
    micro_step: MicroStep


def setup(config: Config, **given: Any) -> Parts:
    """Load the model, make it trainable, and check what can be checked before the first image.
    `given`: as for `load_policy`."""
    directory.prepare_process(config)
    prompt_set = load.load(config.sample.prompts, "train")
    load.check(prompt_set, config.sample.prompts_per_iteration)
    scorer = rewards.Scorer.of(config.reward)
    scorer.prepare(prompt_set)
    policy = load_policy(config, **given)
    cuda_graphs.prepare(policy, config)
    for start in range(0, len(prompt_set), 256):
        # Words that the model does not know raise here, not in the middle of the run.
        policy.check_texts(prompt_set.texts[start : start + 256])
    state = directory.State.create(policy.transformer, config.optim)
    plan = schedule(policy, config.sample, config.optim.kl)
    uncond = policy.encode([""]) if config.sample.guidance_scale != 1 else None
    worker = Worker(policy.device, config.sample.overlap) if config.sample.overlap else None
    graphs = None
    if config.optim.capture == "on":
        graphs = policy.graphs or cuda_graphs.Graphs(
            policy, cuda_graphs.CudaRecorder(policy.device)
        )
    micro = MicroStep(policy, graphs)
    return Parts(policy, plan, state, prompt_set, scorer, uncond, worker, micro)


def load_policy(
    config: Config,
    pipeline: object | None = None,
    encode: Callable[[Sequence[str]], Conditioning] | None = None,
) -> Policy:
    """The model of a run with its adapters, or with all of its weights made trainable.

    pipeline: one that is loaded already, in place of policy.model; encode: in place of its text
    encoders. See `Policy.load`.
    """
    whole = config.policy.adapter == "full"
    if whole and config.policy.dtype not in ("auto", "float32"):
        raise ConfigError(
            f"policy.dtype is {config.policy.dtype} with policy.adapter full, but weights that are "
            "trained are float32; set policy.dtype to auto, or policy.adapter to lora."
        )
    dtype = "float32" if whole else config.policy.dtype
    policy = Policy.load(
        config.policy.model if pipeline is None else pipeline,
        device=config.policy.device,
        dtype=dtype,
        config=config.policy,
        encode=encode,
    )
    if whole and config.optim.beta > 0:
        policy.keep_reference()
    seed = int(seeds.sample_seeds(config.run.seed, seeds.ADAPTER)[0])
    directory.add_adapter(policy.transformer, config.policy, seed)
    if config.policy.gradient_checkpointing:
        recompute(policy.transformer)
    return policy


def recompute(transformer: nn.Module) -> None:
    """Keep only the inputs of the transformer's blocks for the backward pass."""
    # Nothing in a block is random; and the state of a generator is read by waiting for the device.
    again = partial(
        checkpoint,
        use_reentrant=False,
        preserve_rng_state=False,
        context_fn=deterministic.as_in_the_forward,
    )
    try:
        transformer.enable_gradient_checkpointing(lambda module, *args: again(module, *args))
    except ValueError as error:
        raise ConfigError(
            f"policy.gradient_checkpointing is on, but {type(transformer).__name__} has none; "
            "turn it off."
        ) from error


def run(config: Config, **given: Any) -> dict[str, Any]:
    """Train as `config` says; returns what summary.json of the run directory holds. `given`: as for
    `load_policy`."""
    parts = setup(config, **given)
    policy, state, group_size = parts.policy, parts.state, config.sample.group_size
    with directory.stoppable() as stop, Reports.open(config, policy, state) as reports:
        while state.iteration < config.run.steps and not stop.requested:
            clock = Clock(policy.device)
            with clock("rollout"):
                batch = load.batch(parts.prompts, config, state.iteration)
                conditioning = policy.encode(batch.texts)
                scoring = Scoring(parts.scorer, batch, group_size, parts.worker)
                trajectory = collect(parts, conditioning, config, scoring)
            with clock("reward"):
                scores = scoring.finish()
                gains, weights = advantages(scores.total.view(-1, group_size), config.optim)
            with clock("update"):
                experience = Experience(trajectory, conditioning, parts.uncond, gains, weights).to(
                    policy.device
                )
                metrics = update(parts, experience, config)
            state.iteration += 1
            reports.iteration({**describe(scores, gains), **metrics}, clock.seconds)
        return reports.finish(interrupted=stop.requested)


def collect(
    parts: Parts, conditioning: Conditioning, config: Config, scoring: Scoring | None = None
) -> Trajectory:
    """The rollout of one iteration: K x G rows, each with its seeds and its window. The images of
    each chunk go to `scoring` as soon as they are there."""
    count, iteration, sample = len(conditioning), parts.state.iteration, config.sample
    policy = parts.policy

    def done(latents: Tensor) -> None:
        if scoring is not None:
            scoring.add(policy.decode(latents))

    positions = windows(count, config, iteration)
    own, initial = load.row_seeds(count, config, iteration)
    # Without noise in common, or with all windows at the first step, there is nothing to share.
    shared = sample.share_prefix and sample.shared_noise and sample.last_start > 0
    return (shared_prefix.rollout if shared else rollout)(
        policy,
        conditioning,
        parts.plan,
        table_rows(positions, sample.steps),
        groups=torch.arange(count).repeat_interleave(sample.group_size),
        seeds=own,
        noise_seeds=initial,
        batch_size=sample.batch_size,
        uncond=parts.uncond,
        guidance_scale=sample.guidance_scale,
        positions=positions,
        keep_velocities=config.optim.guard,
        done=done,
    )


def update(parts: Parts, experience: Experience, config: Config) -> dict[str, Any]:
    """The optimizer steps of one iteration, each over its own part of the chunks.

    Returns the means of the objective's metrics over all micro-steps (one chunk at one of its
    trained steps, or at `optim.steps_per_forward` of them), the gradient norm of each optimizer
    step before clipping, and the largest |ratio - 1| before the first one.
    """
    policy, sample, optim, micro = parts.policy, config.sample, config.optim, parts.micro_step
    turns = range(sample.trained_steps)
    turns = [turns[i : i + optim.steps_per_forward] for i in turns[:: optim.steps_per_forward]]
    every = [(rows, some) for rows in chunks(sample.rows, sample.batch_size) for some in turns]
    experience = losses.as_rolled_out(policy, parts.plan, experience)
    if optim.anchor == "replay":
        with policy.steady():
            experience = losses.replay(policy, parts.plan, experience, every, config)
    share = len(every) // optim.updates_per_iteration
    scale = loss_scale(policy, sample.batch_size * optim.steps_per_forward, share)
    sums: dict[str, Tensor] = {}
    error, norms = torch.zeros((), device=policy.device), []
    for number in range(optim.updates_per_iteration):
        with micro.accumulating(scale):
            for rows, some in every[number * share : (number + 1) * share]:
                batch = losses.gather(parts.plan, experience, rows, some)
                metrics, deviation = micro(policy, OBJECTIVES["grpo"], batch, config, share)
                # Sums are new tensors: what a graph returned is overwritten by its next replay.
                for name, value in metrics.items():
                    sums[name] = sums.get(name, 0) + value
                if number == 0:
                    error = torch.maximum(error, deviation)
        norms.append(parts.state.step())
    # All that is read from the device since the rewards, at once.
    found = torch.stack([error, *sums.values(), *norms]).tolist()
    check_ratio(found[0], optim.ratio_tolerance)
    means = {name: value / len(every) for name, value in zip(sums, found[1:], strict=False)}
    return {**means, "grad_norm": found[1 + len(sums) :], "max_ratio_error": found[0]}


def micro_step(
    policy: Policy, objective: Callable[..., losses.Loss], batch: Batch, config: Config, share: int
) -> tuple[dict[str, Tensor], Tensor]:
    """Forward and backward of one of the `share` micro-steps of an optimizer step.

    The gradients are those of the loss times `loss_scale`. Returns the objective's metrics and the
    largest |ratio - 1|, all on the device.
    """
    out = objective(policy, batch, config)
    scale = loss_scale(policy, len(batch.sample), share)
    # Not the forward too: torch.compile would compile it again for another setting.
    with deterministic.repeatable():
        (out.loss / (share / scale)).backward()
    return out.metrics, (out.ratio - 1).abs().amax()


def loss_scale(policy: Policy, rows: int, share: int) -> float:
    """What the loss of a micro-step of `rows` rows, one of `share`, is multiplied by.

    A mean over rows, elements and micro-steps has gradients of about 1 / (rows x elements x share)
    in a velocity, 1e-8 for SD3.5-medium, and float16 has nothing below 6e-8. Scaled they are about
    1/16, which leaves room for sums over the tokens below 65504. A power of two, which is divided
    out of the float32 gradients without a rounding. 1 for other types, whose range is float32's.
    """
    if policy.dtype != torch.float16:
        return 1.0
    return 2.0 ** math.floor(math.log2(rows * math.prod(policy.latent_shape) * share / 16))


class MicroStep:
    """`micro_step`, or with graphs its replayed form, whose gradients stay at their addresses."""

    def __init__(self, policy: Policy, graphs: cuda_graphs.Graphs | None) -> None:
        self.policy, self.graphs = policy, graphs
        self.parameters = list(policy.parameters()) if graphs else []
        self.gradients = [torch.zeros_like(p) for p in self.parameters]

    @contextmanager
    def accumulating(self, scale: float = 1.0) -> Iterator[None]:
        """Inside, gradients add up from 0, and no parameter changes; afterwards they are divided by
        `scale`."""
        for parameter, gradient in zip(self.parameters, self.gradients, strict=True):
            parameter.grad = gradient.zero_()
        with self.policy.steady(fixed=self.graphs is not None):
            yield
        if scale != 1:
            found = [p.grad for p in self.policy.parameters() if p.grad is not None]
            torch._foreach_mul_(found, 1 / scale)

    def __call__(self, *arguments: Any) -> tuple[dict[str, Tensor], Tensor]:
        if self.graphs is None:
            return micro_step(*arguments)
        return self.graphs(micro_step, *arguments, changes=self.gradients, option="optim.capture")


def check_ratio(error: float, tolerance: float) -> None:
    """Raise unless the largest |ratio - 1| of the first update, `error`, is within `tolerance`."""
    if math.isnan(error):
        raise DivergedError(
            "the ratios of the first update after a rollout are NaN, but finite numbers are "
            "expected; start again with a lower optim.lr."
        )
    if error > tolerance:
        raise RatioError(
            f"the first update after a rollout saw |ratio - 1| up to {error:.3g}, but at most "
            f"{tolerance:g} is allowed (optim.ratio_tolerance), because rollout and update must "
            "compute the same velocities; use the same kernels, dtype and batch size in both, or "
            "raise the tolerance."
        )


def describe(scores: Scores, gains: Tensor) -> dict[str, Any]:
    """What is logged of the rewards of one iteration."""
    kept = scores.total.isfinite()
    equal = (gains.view(len(scores.dropped), -1) == 0).all(dim=1) & ~scores.dropped
    return {
        "reward": float(scores.total[kept].mean()),
        "reward_std": float(scores.total[kept].std(correction=0)),
        "rewards": {name: float(part[kept].mean()) for name, part in scores.parts.items()},
        "equal_groups": int(equal.sum()),
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
