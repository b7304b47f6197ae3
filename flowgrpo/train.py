"""Flow-GRPO (arXiv 2505.05470): online reinforcement learning of a flow-matching model. Start here.

One iteration, for K prompts with G samples each (B = K G rows), T steps of the sampler:

    rollout     x_0 ~ N(0, I);  x_{i+1} = A_i x_i + B_i v(x_i, sigma_i) + C_i eps
    rewards     R_b = sum_n weight_n reward_n(image_b, prompt_b)
    advantages  A_b = (R_b - mean of its group) / (std + 1e-4)
    update      minimise the mean over rows and trained steps of
                max(-A r, -A clip(r, 1 - c, 1 + c)) + beta KL(policy || reference),
                r = exp(log p(x_{i+1} | x_i) - its value at the rollout),
                log p averaged over the elements of a sample

in `optim.updates_per_iteration` optimizer steps, each on its own part of the rows. Evaluation
samples with the deterministic sampler and the averaged weights.

Deliberate departures from the paper and from flow_grpo (each objective has its own):

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
6. Images of a chunk are decoded and scored while the next chunk is sampled (rewards/background.py).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from flowgrpo import cuda_graphs
from flowgrpo.config import Config
from flowgrpo.objectives import Objective, objective_of
from flowgrpo.objectives.curated import Curated
from flowgrpo.objectives.curated import load as load_curated
from flowgrpo.policies import Conditioning, Policy
from flowgrpo.policies.load import load_policy
from flowgrpo.policies.tokens import warn_of_cut
from flowgrpo.prompts.batches import check_count, prompt_batch, row_seeds
from flowgrpo.prompts.load import load_prompts
from flowgrpo.records import Experience, Prompts, Scores, Trajectory
from flowgrpo.rewards import Scorer
from flowgrpo.rewards.background import BackgroundScoring, RewardThread
from flowgrpo.rewards.differentiable import differentiable_rewards
from flowgrpo.runs.monitor import Monitor
from flowgrpo.runs.process import prepare_process, stoppable
from flowgrpo.runs.state import State
from flowgrpo.sampling import finite
from flowgrpo.sampling.rollout import rollout
from flowgrpo.sampling.schedule import Schedule, table_rows, training_schedule, windows
from flowgrpo.sampling.shared_prefix import rollout_shared_prefix
from flowgrpo.update import MicroStep, update

Encode = Callable[[Sequence[str]], Conditioning]
"""Texts -> embeddings, one row each; in place of a pipeline's text encoders."""


@dataclass(frozen=True)
class Components:
    """Model, data and rewards of a run, built once by `setup`."""

    objective: Objective
    policy: Policy
    schedule: Schedule
    state: State
    prompts: Prompts
    scorer: Scorer
    uncond: Conditioning | None
    """Embeddings of the empty prompt; None without guidance."""
    reward_thread: RewardThread | None
    """Computes rewards beside the rollout; None: they are computed after it."""
    micro_step: MicroStep
    curated: Curated | None = None
    """The curated set, in place of rollouts or beside them."""


def run(
    config: Config, *, pipeline: object | None = None, encode: Encode | None = None
) -> dict[str, Any]:
    """Train as `config` says.

    Args:
        config: the whole run, for example from a recipe.
        pipeline: a loaded diffusers pipeline for `policy.model`; it is trained in place.
        encode: texts -> `Conditioning`, in place of the pipeline's text encoders.

    Returns:
        The content of summary.json in the run directory.
    """
    components = setup(config, pipeline=pipeline, encode=encode)
    policy, state, group_size = components.policy, components.state, config.sample.group_size
    if components.objective.rollout == "none":
        return run_on_set(components, config)
    with stoppable() as stop, Monitor.open(config, policy, state, stop) as monitor:
        while monitor.unfinished and not stop.requested:
            clock = Clock(policy.device)
            with clock("rollout"):
                batch = prompt_batch(components.prompts, config, state.iteration)
                conditioning = policy.encode(batch.texts)
                scoring = BackgroundScoring(
                    components.scorer, batch, group_size, components.reward_thread
                )
                trajectory = collect(components, conditioning, config, scoring)
            with clock("reward"):
                scores = scoring.finish()
                check_finite(components, trajectory, conditioning, config)
                rewards = scores.total.view(-1, group_size)
                advantages, weights = components.objective.weigh(rewards, config.optim)
            with clock("update"):
                learned = (trajectory, conditioning, components.uncond, advantages, weights)
                experience = Experience(*learned, state.iteration, batch).to(policy.device)
                inputs = (components.schedule, state, components.micro_step, experience, config)
                metrics = update(*inputs, components.curated)
            state.iteration += 1
            monitor.iteration({**describe(scores), **metrics}, clock.seconds)
        return monitor.finish(interrupted=stop.requested)


def run_on_set(components: Components, config: Config) -> dict[str, Any]:
    """Train on the images or pairs of a curated set, without rollouts and rewards.

    Returns:
        The content of summary.json in the run directory.
    """
    policy, state = components.policy, components.state
    with stoppable() as stop, Monitor.open(config, policy, state, stop) as monitor:
        while monitor.unfinished and not stop.requested:
            clock = Clock(policy.device)
            with clock("rollout"):
                experience = components.curated.experience(config, state.iteration)
            with clock("update"):
                schedule, micro_step = components.schedule, components.micro_step
                metrics = update(schedule, state, micro_step, experience, config)
            state.iteration += 1
            monitor.iteration(metrics, clock.seconds)
        return monitor.finish(interrupted=stop.requested)


def setup(
    config: Config, *, pipeline: object | None = None, encode: Encode | None = None
) -> Components:
    """Load the model, make it trainable, and check what can be checked before the first image.

    `pipeline` and `encode` are those of `run`.
    """
    objective = objective_of(config)
    prepare_process(config.run)
    prompts = load_prompts(config.sample.prompts, "train")
    check_count(prompts, config.sample.prompts_per_iteration)
    scorer = Scorer.of(config.reward)
    scorer.prepare(prompts)
    if objective.differentiable:
        differentiable_rewards(config.reward)
    policy = load_policy(config, pipeline, encode, reference=objective.reference)
    cuda_graphs.prepare(policy, config)
    for start in range(0, len(prompts), 256):
        # Words that the model does not know raise here, not in the middle of the run.
        policy.check_texts(prompts.texts[start : start + 256])
    warn_of_cut(policy, prompts.texts)
    overlap, graphs = config.sample.overlap, None
    if config.optim.capture == "on":
        recorder = cuda_graphs.CudaRecorder(policy.device)
        graphs = policy.graphs or cuda_graphs.Graphs(policy, recorder)
    uncond = policy.encode([""]) if config.sample.guidance_scale != 1 else None
    records = load_curated(config, objective.pairs) if config.sample.curated else None
    return Components(
        objective=objective,
        policy=policy,
        state=State.create(policy.transformer, config.optim, objective.old_policy),
        schedule=training_schedule(policy, config.sample, config.optim.kl),
        prompts=prompts,
        scorer=scorer,
        uncond=uncond,
        reward_thread=RewardThread(policy.device, overlap) if overlap else None,
        micro_step=MicroStep(policy, objective, graphs),
        curated=None if records is None else Curated(policy, records, uncond),
    )


def collect(
    components: Components,
    conditioning: Conditioning,
    config: Config,
    scoring: BackgroundScoring | None = None,
) -> Trajectory:
    """Sample the K x G rows of one iteration, each with its seeds and its window, if any.

    The images of each chunk go to `scoring` as soon as they are there.
    """
    policy, iteration, options = components.policy, components.state.iteration, config.sample
    policy.decoded.begin()

    def score(latents: Tensor) -> None:
        if scoring is not None:
            scoring.add(policy.decode(latents))

    count = len(conditioning)
    trained_steps = windows(count, config, iteration)
    if components.objective.rollout == "deterministic":
        trained_steps = trained_steps[:0]
    seeds, noise_seeds = row_seeds(count, config, iteration)
    # Without noise in common, or with all windows at the first step, there is nothing to share.
    shared = options.share_prefix and options.shared_noise and options.last_start > 0
    sampler = rollout_shared_prefix if shared else rollout
    with components.state.rollout_weights():
        return sampler(
            policy,
            conditioning,
            components.schedule,
            table_rows(trained_steps, options.steps),
            groups=torch.arange(count).repeat_interleave(options.group_size),
            seeds=seeds,
            noise_seeds=noise_seeds,
            batch_size=options.batch_size,
            uncond=components.uncond,
            guidance_scale=options.guidance_scale,
            trained_steps=trained_steps,
            keep_velocities=config.optim.keeps_velocities,
            on_chunk=score,
        )


def check_finite(
    components: Components, trajectory: Trajectory, conditioning: Conditioning, config: Config
) -> None:
    """Raise NotFiniteError if a velocity, a state or an image of a rollout is no finite number.

    To be called once the images are scored: nothing is left to wait for then.
    """
    policy, name = components.policy, f"the rollout of iteration {components.state.iteration + 1}"

    def explain() -> str | None:
        return finite.explain(
            policy,
            trajectory.latents,
            conditioning,
            components.uncond,
            components.schedule,
            trajectory.groups,
            config.sample.guidance_scale,
            name,
        )

    finite.raise_if_unsound(policy.decoded.read(), explain, name)


def describe(scores: Scores) -> dict[str, Any]:
    """Describe the rewards of one iteration, for metrics.jsonl."""
    scored = scores.total.isfinite()
    groups = scores.total.view(len(scores.dropped), -1)
    # A dropped group is NaN, which is not equal to itself.
    equal = groups.amax(dim=1) == groups.amin(dim=1)
    return {
        "reward": float(scores.total[scored].mean()),
        "reward_std": float(scores.total[scored].std(correction=0)),
        "rewards": {name: float(score[scored].mean()) for name, score in scores.rewards.items()},
        "equal_groups": int(equal.sum()),
        "dropped_groups": int(scores.dropped.sum()),
    }


@dataclass
class Clock:
    """Measures the stages of one iteration in seconds: ``with clock("rollout"): ...``."""

    device: torch.device
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        # Launched kernels count to the stage that launched them.
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - start
