"""Flow-GRPO (arXiv 2505.05470): online reinforcement learning of a flow-matching model. Start here.

One iteration, for K prompts with G samples each (B = K G rows), T steps of the sampler:

    scouts      with sample.scouts: G of N candidates a prompt, by cheap previews and their rewards
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

Several processes (torchrun) share an iteration by chunks of rows, and add gradients in an order
that does not depend on their number, so that 1, 2, 4 or 8 of them write the same run
(flowgrpo/distributed).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from flowgrpo import cuda_graphs
from flowgrpo.config import Config, ConfigError
from flowgrpo.distributed import sharding
from flowgrpo.distributed.dealing import Dealing, deal, share_of
from flowgrpo.distributed.world import ALONE, World, join
from flowgrpo.objectives import Objective, objective_of
from flowgrpo.objectives.curated import Curated
from flowgrpo.objectives.curated import load as load_curated
from flowgrpo.objectives.curated import results as results_of
from flowgrpo.policies import Conditioning, Policy
from flowgrpo.policies.device import choose_device
from flowgrpo.policies.load import load_policy
from flowgrpo.policies.tokens import warn_of_cut
from flowgrpo.prompts.batches import check_count, prompt_batch, row_seeds
from flowgrpo.prompts.load import load_prompts
from flowgrpo.records import Experience, Prompts, Scores, Trajectory
from flowgrpo.rewards import Scorer
from flowgrpo.rewards.background import BackgroundScoring, RewardThread
from flowgrpo.rewards.differentiable import differentiable_rewards
from flowgrpo.runs.directory import fields_by_name, settle_resume
from flowgrpo.runs.monitor import Monitor
from flowgrpo.runs.process import Stop, prepare_process, stoppable, versions
from flowgrpo.runs.state import State
from flowgrpo.sampling import finite
from flowgrpo.sampling.rollout import rollout
from flowgrpo.sampling.schedule import Schedule, table_rows, training_schedule, windows
from flowgrpo.sampling.scouts import Scouted, check_previews, sample_scouts
from flowgrpo.sampling.shared_prefix import Leaders, rollout_shared_prefix
from flowgrpo.update import MicroStep, update

PATIENCE = 0.8
"""Share of `run.rank_timeout` that one of several processes waits for the rewards of a chunk."""
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
    world: World = ALONE
    """The processes of the run."""
    dealing: Dealing | None = None
    """Share of this process in an iteration."""


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
    config = settle_resume(config, join(config.run.rank_timeout))
    components = setup(config, pipeline=pipeline, encode=encode)
    policy, state, world = components.policy, components.state, components.world
    if components.objective.rollout == "none":
        return run_on_set(components, config)
    with running(components, config) as (monitor, stop):
        while monitor.unfinished and not stop.requested:
            clock = Clock(policy.device)
            with clock("rollout"), world.together(lockstep=policy.sharded):
                batch = prompt_batch(components.prompts, config, state.iteration)
                conditioning = policy.encode_shares(batch.texts, world, batch.images)
            scouted = send_scouts(components, batch, conditioning, config, clock)
            with clock("rollout"), world.together(lockstep=policy.sharded):
                scoring = background_scoring(components, batch, config)
                trajectory = collect(components, conditioning, config, scoring, scouted)
            with clock("reward"):
                scores = share_scores(components, scoring, trajectory, conditioning, config)
                rewards = scores.total.view(-1, config.sample.group_size)
                advantages, weights = components.objective.weigh(rewards, config.optim)
            with clock("update"):
                learned = (trajectory, conditioning, components.uncond, advantages, weights)
                experience = own_experience(components, *learned, batch)
                inputs = (components.schedule, state, components.micro_step, experience, config)
                metrics = update(*inputs, components.curated, world, components.dealing)
            state.iteration += 1
            monitor.iteration({**describe(scores, scouted), **metrics}, clock.seconds)
        return monitor.finish(interrupted=stop.requested)


@contextmanager
def running(components: Components, config: Config) -> Iterator[tuple[Monitor, Stop]]:
    """Open the run directory and take requests to stop."""
    policy, state, world = components.policy, components.state, components.world
    with (
        stoppable(not world.joined) as stop,
        Monitor.open(config, policy, state, stop, world) as monitor,
        # What fails in one process is told to the others, and none ends before the first is done.
        world.together(),
    ):
        yield monitor, stop


def run_on_set(components: Components, config: Config) -> dict[str, Any]:
    """Train on the images or pairs of a curated set, without rollouts and rewards.

    Returns:
        The content of summary.json in the run directory.
    """
    policy, state, world = components.policy, components.state, components.world
    # Pairs are encoded by every process, as are results of whole groups.
    rows = components.dealing.own_rows if components.objective.by_rows and world.size > 1 else None
    with running(components, config) as (monitor, stop):
        while monitor.unfinished and not stop.requested:
            clock = Clock(policy.device)
            with clock("rollout"), world.together():
                experience = components.curated.experience(config, state.iteration, rows)
            with clock("update"):
                inputs = (components.schedule, state, components.micro_step, experience, config)
                metrics = update(*inputs, world=world, dealing=components.dealing)
            state.iteration += 1
            monitor.iteration(metrics, clock.seconds)
        return monitor.finish(interrupted=stop.requested)


def setup(
    config: Config, *, pipeline: object | None = None, encode: Encode | None = None
) -> Components:
    """Load the model, make it trainable, and check what can be checked before the first image.

    `pipeline` and `encode` are those of `run`.
    """
    world = join(config.run.rank_timeout)
    check_processes(world, config)
    with world.together():
        return _setup(config, pipeline, encode, world)


def check_processes(world: World, config: Config) -> None:
    """Raise ConfigError unless all processes have the same configuration and versions."""
    installed = {f"the version of {name}": value for name, value in versions().items()}
    fields = {**fields_by_name(config), **installed}
    advice = "start all with the same command and the same environment"
    world.check_same("the configuration", fields, advice)


def _setup(
    config: Config, pipeline: object | None, encode: Encode | None, world: World
) -> Components:
    objective = objective_of(config)
    sample, updates = config.sample, config.optim.updates_per_iteration
    dealing = deal(
        objective.micro_steps(config, sample.rows),
        updates,
        sample.rows,
        sample.batch_size,
        world.size,
        world.rank,
        objective.by_rows,
        config.run.leaves,
    )
    mesh = None
    if config.run.parallel == "fsdp":
        # Before what may fail in one process alone: the mesh is made by all.
        sharding.check_even(world, dealing, sample.rows, updates, sample.batch_size)
        mesh = sharding.make_mesh(world, choose_device(config.policy.device), config.run.shard_size)
    prepare_process(config.run)
    prompts = load_prompts(config.sample.prompts, "train")
    check_count(prompts, config.sample.prompts_per_iteration)
    # Each process asks another of several servers first.
    scorer = Scorer.of(config.reward, offset=world.rank)
    scorer.prepare(prompts)
    if objective.differentiable:
        differentiable_rewards(config.reward)
    policy = load_policy(config, pipeline, encode, reference=objective.reference, mesh=mesh)
    cuda_graphs.prepare(policy, config)
    policy.check_images(prompts.images)
    if policy.family.edits and config.sample.curated:
        raise ConfigError(
            f"sample.curated is {config.sample.curated!r}, but {policy.name} edits images, which "
            "the prompts of a curated set come without; leave sample.curated empty."
        )
    for start in range(0, len(prompts), 256):
        # Words that the model does not know raise here, not in the middle of the run.
        policy.check_texts(prompts.texts[start : start + 256])
    warn_of_cut(policy, prompts.texts)
    overlap, graphs = config.sample.overlap, None
    if config.optim.capture == "on":
        recorder = cuda_graphs.CudaRecorder(policy.device)
        graphs = policy.graphs or cuda_graphs.Graphs(policy, recorder)
    uncond = policy.encode_empty(config.sample.guidance_scale)
    records = load_curated(config, objective.pairs) if config.sample.curated else None
    reward_thread = None
    if overlap:
        # Before the others give this process up.
        limit = PATIENCE * world.timeout if world.joined else None
        reward_thread = RewardThread(policy.device, overlap, limit)
    return Components(
        objective=objective,
        policy=policy,
        state=State.create(policy.transformer, config.optim, objective.old_policy, world),
        schedule=training_schedule(policy, config.sample, config.optim.kl),
        prompts=prompts,
        scorer=scorer,
        uncond=uncond,
        reward_thread=reward_thread,
        micro_step=MicroStep(policy, objective, graphs),
        curated=None if records is None else Curated(policy, records, uncond),
        world=world,
        dealing=dealing,
    )


def collect(
    components: Components,
    conditioning: Conditioning,
    config: Config,
    scoring: BackgroundScoring | None = None,
    scouted: Scouted | None = None,
) -> Trajectory:
    """Sample this process's rows of one iteration, each with its seeds and its window, if any.

    The images of each chunk go to `scoring` as soon as they are there. With `scouted` the rows are
    the candidates that were chosen.
    """
    policy, options = components.policy, config.sample
    policy.decoded.begin()

    def score(latents: Tensor) -> None:
        if scoring is not None:
            scoring.add(policy.decode(latents))

    trained_steps, seeds, noise_seeds = drawn(components, len(conditioning), config)
    if scouted is not None:
        chosen = scouted.rows
        trained_steps, seeds = trained_steps[:, chosen], seeds[chosen]
        noise_seeds = noise_seeds[chosen]
    table = table_rows(trained_steps, options.steps)
    rows = torch.arange(len(seeds)) if components.dealing is None else components.dealing.own_rows
    # Without noise in common, or with all windows at the first step, there is nothing to share.
    if options.share_prefix and options.shared_noise and options.last_start > 0:
        leaders = Leaders.of(table, trained_steps, seeds, noise_seeds, options.group_size)
        sampler = partial(rollout_shared_prefix, leaders=leaders)
    else:
        sampler = partial(rollout, noise_seeds=noise_seeds[rows])
    with components.state.rollout_weights():
        return sampler(
            policy,
            conditioning,
            components.schedule,
            table[:, rows],
            groups=rows // options.group_size,
            seeds=seeds[rows],
            batch_size=min(options.batch_size, len(seeds)),
            uncond=components.uncond,
            guidance_scale=options.guidance_scale,
            trained_steps=trained_steps[:, rows],
            keep_velocities=config.optim.keeps_velocities,
            on_chunk=score,
        )


def drawn(components: Components, count: int, config: Config) -> tuple[Tensor, Tensor, Tensor]:
    """Draw what `count` groups of this iteration are sampled with, of each row or candidate: its
    trained steps [W, B], seed of the steps' noise [B] and of the initial noise [B], all int64."""
    iteration = components.state.iteration
    trained_steps = windows(count, config, iteration)
    if components.objective.rollout == "deterministic":
        trained_steps = trained_steps[:0]
    return trained_steps, *row_seeds(count, config, iteration)


def send_scouts(
    components: Components,
    batch: Prompts,
    conditioning: Conditioning,
    config: Config,
    clock: Clock,
) -> Scouted | None:
    """Preview the candidates of one iteration, a share in each process, and choose those that are
    sampled in full (sampling/scouts.py). None without `sample.scouts`.

    Raises:
        NotFiniteError: previews are no finite numbers.
    """
    options, policy, world = config.sample, components.policy, components.world
    if not options.scouts:
        return None
    size, total = options.scouts, options.candidates
    share = torch.tensor(share_of(total, options.batch_size, world.size, world.rank))
    with clock("scout"):
        with world.together(lockstep=policy.sharded), components.state.rollout_weights():
            scoring = background_scoring(components, batch, config, size, share)
            trained_steps, seeds, noise_seeds = drawn(components, len(batch), config)
            policy.decoded.begin()
            sample_scouts(
                policy,
                conditioning,
                components.schedule,
                table_rows(trained_steps, options.steps)[:, share],
                forwards=options.forwards_of_a_scout,
                groups=share // size,
                seeds=seeds[share],
                noise_seeds=noise_seeds[share],
                batch_size=options.batch_size,
                uncond=components.uncond,
                guidance_scale=options.guidance_scale,
                # Forwards of a sharded model are those of all processes.
                chunk_count=-(-total // options.batch_size // world.size) if policy.sharded else 0,
                on_chunk=lambda latents: scoring.add(policy.decode(latents)),
            )
        with world.together():
            scores_here = scoring.rewards()
            check_previews(policy, f"iteration {components.state.iteration + 1}")
        rewards = gather_scores(components, scores_here)
        joined = {name: torch.cat(parts) for name, parts in rewards.items()}
        previews = components.scorer.combine(joined, size).total.view(-1, size)
        return Scouted.of(previews, options.group_size)


def background_scoring(
    components: Components,
    batch: Prompts,
    config: Config,
    size: int = 0,
    rows: Tensor | None = None,
) -> BackgroundScoring:
    """Make what scores this process's images of one iteration, while they come.

    Args:
        size: images of a prompt; 0: those of a group.
        rows: of this process; None: those that it is dealt.
    """
    thread = components.reward_thread
    rows = components.dealing.own_rows if rows is None else rows
    return BackgroundScoring(
        components.scorer,
        batch,
        size or config.sample.group_size,
        thread,
        rows,
        # The others' forwards need this process till the end of the rollout.
        late=components.policy.sharded,
    )


def share_scores(
    components: Components,
    scoring: BackgroundScoring,
    trajectory: Trajectory,
    conditioning: Conditioning,
    config: Config,
) -> Scores:
    """Wait for the scores, check that the images are of finite numbers, and put together the scores
    of all processes."""
    with components.world.together():
        scores_here = scoring.rewards()
        check_finite(components, trajectory, conditioning, config)
    parts, in_order = gather_scores(components, scores_here), components.dealing.in_order
    rewards = {name: in_order(scores) for name, scores in parts.items()}
    return components.scorer.combine(rewards, config.sample.group_size)


def gather_scores(
    components: Components, scores_here: dict[str, Tensor]
) -> dict[str, list[Tensor]]:
    """Collect the scores of all processes, by reward and rank, and what went wrong."""
    scorer = components.scorer
    shares = components.world.gather((scores_here, scorer.problems))
    for _, problems in shares:
        scorer.problems = {**problems, **scorer.problems}
    return {name: [share[name] for share, _ in shares] for name in scores_here}


def own_experience(
    components: Components,
    trajectory: Trajectory,
    conditioning: Conditioning,
    uncond: Conditioning | None,
    advantages: Tensor,
    weights: Tensor,
    prompts: Prompts,
) -> Experience:
    """Build what this process learns from: its own rows, or the results of all processes for an
    objective that looks at whole groups. `advantages` and `weights` are of all rows."""
    world, dealing, rows = components.world, components.dealing, None
    if world.size > 1 and components.objective.by_rows:
        rows = dealing.own_rows
        advantages, weights = advantages[rows], weights[rows]
    elif world.size > 1:
        results = dealing.in_order(world.all_rows(trajectory.latents[-1].contiguous()))
        groups = torch.arange(len(conditioning), device=results.device)
        trajectory = results_of(results, groups.repeat_interleave(len(results) // len(groups)))
    learned = (trajectory, conditioning, uncond, advantages, weights)
    experience = Experience(*learned, components.state.iteration, prompts, rows)
    return experience.to(components.policy.device)


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


def describe(scores: Scores, scouted: Scouted | None = None) -> dict[str, Any]:
    """Describe the rewards of one iteration, for metrics.jsonl, with those of its scouts if any."""
    scored = scores.total.isfinite()
    groups = scores.total.view(len(scores.dropped), -1)
    # A dropped group is NaN, which is not equal to itself.
    equal = groups.amax(dim=1) == groups.amin(dim=1)
    scouts = {} if scouted is None else {"scouts": scouted.describe(groups)}
    return {
        **scouts,
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
