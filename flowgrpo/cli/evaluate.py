"""flowgrpo evaluate: a trained model against its base, on the same prompts and seeds."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from flowgrpo import files, rewards
from flowgrpo.cli.options import EvaluateOptions
from flowgrpo.cli.targets import (
    check_numbers,
    check_same_command,
    check_writable,
    evaluated_rows,
    image_size,
    load_base,
    resolve_target,
)
from flowgrpo.config import Config, replace
from flowgrpo.config.validation import require
from flowgrpo.distributed.world import World, join
from flowgrpo.evaluation import card, evaluate, pictures, systems
from flowgrpo.evaluation.evaluate import Evaluation
from flowgrpo.evaluation.evaluation_set import EvaluationSet, load_evaluation_set, seeded
from flowgrpo.evaluation.picture_sets import one_index_a_text
from flowgrpo.evaluation.quality import quality_of, tolerances_of
from flowgrpo.evaluation.statistics import balanced_mean, bootstrap
from flowgrpo.evaluation.systems import Measurement, System, quality_rewards
from flowgrpo.evaluation.table import comparison, print_whole
from flowgrpo.nano import MODELS
from flowgrpo.policies import Policy
from flowgrpo.policies.adapter_files import origin
from flowgrpo.policies.adapters import check_adapter, load_adapter
from flowgrpo.policies.tokens import warn_of_cut
from flowgrpo.prompts.load import ANY, fingerprint, load_prompts
from flowgrpo.recipes import RECIPES
from flowgrpo.rewards.table import options_of
from flowgrpo.runs import checkpoints, content
from flowgrpo.runs.display import EvaluationProgress, Terminal, mode_of
from flowgrpo.runs.export import add_initial, load_trained
from flowgrpo.runs.process import versions

log = logging.getLogger("flowgrpo")


@dataclass(frozen=True)
class Benchmark:
    """Prompts with their seeds, and the rewards that score their images."""

    kind: str
    """systems.TASK or systems.QUALITY."""
    prompt_set: str
    evaluation_set: EvaluationSet
    scorer: rewards.Scorer


@dataclass(frozen=True)
class Evaluator:
    """Evaluates the present weights of one policy, with the progress on a console."""

    config: Config
    policy: Policy
    console: Console
    world: World

    def __call__(self, benchmark: Benchmark, label: str, guidance_scale: float) -> Evaluation:
        """Sample and score all images; `label` names the weights on the console."""
        sample, console = self.config.sample, self.console
        count = len(benchmark.evaluation_set.seeds)
        if benchmark.kind == systems.QUALITY:
            label += " on the quality prompts"
        text = f"Evaluating {label}: {count} images in {sample.eval_steps} steps."
        console.print(text, soft_wrap=True, markup=False)
        mode = mode_of(self.config.run.progress, console) if self.world.first else "none"
        names = list(benchmark.scorer.weights)
        with EvaluationProgress(console, mode, label, count, names) as progress:
            return evaluate.evaluate(
                self.policy,
                benchmark.evaluation_set,
                benchmark.scorer,
                steps=sample.eval_steps,
                batch_size=sample.batch_size,
                guidance_scale=guidance_scale,
                quality=quality_of(benchmark.prompt_set),
                on_progress=progress,
                world=self.world,
            )


def evaluate_run(options: EvaluateOptions, console: Console | None = None) -> dict[str, Any]:
    """Evaluate base and trained model on the same prompts and seeds; print, draw and write.

    Several processes sample and score a share each; the first prints and writes.

    Returns:
        The content of report.json.
    """
    _check_target(options)
    check_numbers(options, "samples", "quality_samples", "steps", "cfg", "guidance", "batch_size")
    check_numbers(options, "prompts", "resolution", "height", "width", "frames", zero=True)
    config, checkpoint = resolve_target(options.target, options.checkpoint == "best")
    require(
        options.model is None or checkpoint is not None or options.target in RECIPES,
        f"{options.target!r} is a model, but --model {options.model} was given too; leave one out.",
    )
    quality = quality_rewards(options.quality)
    quality_options = _quality_options(config, options, quality)
    config = _with_options(config, options, quality)
    world = join(config.run.rank_timeout)
    console = console or Terminal(highlight=False, quiet=not world.first)
    with world.together():
        check_same_command(world, config, options, checkpoint)
        return _evaluate(options, config, checkpoint, quality, quality_options, world, console)


def _evaluate(
    options: EvaluateOptions,
    config: Config,
    checkpoint: Path | None,
    quality: Sequence[str],
    quality_options: Mapping[str, Mapping[str, str]],
    world: World,
    console: Console,
) -> dict[str, Any]:
    require(
        checkpoint is None or options.adapter is None,
        f"{options.target!r} has a trained model of its own, but --adapter {options.adapter} was "
        "given too; leave one out, or name the model itself.",
    )
    out = Path(options.out or Path(config.run.resume or f"runs/{config.recipe}") / "evaluation")
    benchmarks = _benchmarks(config, options, quality_options)
    # The judges' addresses are tried before any weights are loaded.
    for benchmark in reversed(benchmarks):
        benchmark.scorer.prepare(benchmark.evaluation_set.prompts)
    policy = load_base(config)
    if config.run.resume:
        content.warn_of_another_model(config.out_dir, policy)
    for benchmark in benchmarks:
        prompts = benchmark.evaluation_set.prompts
        policy.check_texts(prompts.texts)
        policy.check_images(prompts.images)
        warn_of_cut(policy, prompts.texts)
        benchmark.scorer.try_out(prompts, policy.blank_image())
    description = ""
    if options.adapter is not None:
        description = check_adapter(policy, options.adapter)
        console.print(f"Adapter {description}.", soft_wrap=True, markup=False)
        warn_of_base(options.adapter, config.policy.model)
    if world.first:
        check_writable(out)
    _check_same_content(world, policy, benchmarks)
    evaluator = Evaluator(config, policy, console, world)
    results = _evaluate_all(evaluator, benchmarks, options, checkpoint)
    evaluations, evaluation_set = results[systems.TASK], benchmarks[0].evaluation_set
    report = _report(options, config, checkpoint, evaluation_set, evaluations)
    if not world.first:
        return report
    pictures.save(pictures.evaluation_grid(evaluations, evaluation_set), out / "grid.png")
    _save_videos(evaluations, policy, out)
    files.write_json(out / "report.json", report)
    rows = _rows(config, options, checkpoint, benchmarks, results)
    systems.write(out, rows, report["versions"])
    card.write(
        out,
        _subject(config, options, checkpoint, rows[-1].label, description),
        config.sample.prompts,
        options.split,
        report["reports"],
        {
            label: row.quality
            for label, row in zip(evaluations, rows, strict=True)
            if row.quality is not None
        },
        report["versions"],
    )
    print_whole(console, comparison(evaluations, tolerances_of(config.sample.prompts)))
    if report["change"] is not None:
        _print_changes(report["change"], evaluations["base"].label == "accuracy", console)
    if quality:
        console.print()
        systems.show(rows, console)
    names = f"report.json, grid.png, table.md, {systems.NAME}, {card.NAME}"
    console.print(f"Written to {out}: {names}.", soft_wrap=True, markup=False)
    return report


def _save_videos(evaluations: Mapping[str, Evaluation], policy: Policy, out: Path) -> None:
    """Write the videos of the evaluations that are whole, if any: LABEL-1.webp, ..."""
    for label, evaluation in evaluations.items():
        for number, video in enumerate(() if evaluation.videos is None else evaluation.videos):
            # "base, CFG 4.5" is base-CFG-4.5.
            name = re.sub(r"[^\w.]+", "-", label)
            file = out / f"{name}-{number + 1}.webp"
            pictures.save_video(video, file, policy.family.frame_rate)


def _check_same_content(world: World, policy: Policy, benchmarks: Sequence[Benchmark]) -> None:
    """Raise ConfigError unless all processes have the same prompts, weights and rewards."""
    if world.size == 1:
        return
    values: dict[str, Any] = {"weights": content.weights_of(policy)}
    for benchmark in benchmarks:
        used = benchmark.scorer.rewards
        values[f"the prompts of {benchmark.prompt_set}"] = fingerprint(
            benchmark.evaluation_set.prompts
        )
        values |= {**content.files_of_rewards(used), **content.code_of_rewards(used)}
    advice = "give all processes the same files"
    world.check_same("what is evaluated", values, advice)


def _check_target(options: EvaluateOptions) -> None:
    """Raise ConfigError without a target, or for an option of --images and --table."""
    require(
        bool(options.target),
        "no run, recipe or model was named, but one is required without --images and --table; "
        "write, for example, flowgrpo evaluate runs/nano-0.",
    )
    require(
        not options.label and not options.skip_unreadable,
        f"{'--label' if options.label else '--skip-unreadable'} was given with the target "
        f"{options.target!r}, but it belongs to --images"
        f"{' and --table' if options.label else ''}; leave it out.",
    )
    require(
        bool(options.quality) or options.quality_prompts == "general",
        f"--quality-prompts is {options.quality_prompts!r} without --quality, but the rewards that "
        "score their images are expected; add --quality paper.",
    )


def _quality_options(
    config: Config, options: EvaluateOptions, quality: Sequence[str]
) -> dict[str, dict[str, str]]:
    """Sort the options of the `quality` rewards, the run's and the command line's, by reward."""
    texts = {**config.reward.options, **options.reward_options}
    texts = {key: value for key, value in texts.items() if key.rpartition(".")[0] in quality}
    return options_of(texts, quality)


def _benchmarks(
    config: Config, options: EvaluateOptions, quality: Mapping[str, Mapping[str, str]]
) -> list[Benchmark]:
    """Load the task's prompts and rewards, and those of `quality`: reward -> its options."""
    names = list(config.reported)
    if quality and not options.rewards:
        # They have prompts of their own; the accuracy stays in any case.
        names = [names[0], *(name for name in names[1:] if name not in quality)]
    task = Benchmark(
        systems.TASK,
        config.sample.prompts,
        load_evaluation_set(config, options.split),
        rewards.Scorer.of(config.reward, names),
    )
    if not quality:
        return [task]
    prompts = load_prompts(options.quality_prompts, ANY, "--quality-prompts")
    scorer = rewards.Scorer(
        dict.fromkeys(quality, 1.0),
        config.reward.retries,
        options=quality,
        timeout=config.reward.timeout,
        devices=config.reward.devices,
        frames=config.reward.frames,
    )
    evaluation_set = seeded(one_index_a_text(prompts), options.quality_samples)
    return [task, Benchmark(systems.QUALITY, options.quality_prompts, evaluation_set, scorer)]


def _evaluate_all(
    evaluator: Evaluator,
    benchmarks: Sequence[Benchmark],
    options: EvaluateOptions,
    checkpoint: Path | None,
) -> dict[str, dict[str, Evaluation]]:
    """Evaluate the base model, with other guidance if asked for, then the trained one: by the kind
    of the benchmark, then by label."""
    config, policy = evaluator.config, evaluator.policy
    scale = config.sample.guidance_scale
    results: dict[str, dict[str, Evaluation]] = {benchmark.kind: {} for benchmark in benchmarks}

    def evaluate_as(label: str, guidance_scale: float, title: str = "") -> None:
        for benchmark in benchmarks:
            evaluation = evaluator(benchmark, title or label, guidance_scale)
            results[benchmark.kind][label] = evaluation

    evaluate_as("base", scale)
    if options.guidance != 1:
        evaluate_as(f"base, CFG {options.guidance:g}", options.guidance)
    if checkpoint is not None:
        if add_initial(policy, config):
            evaluate_as("start", scale, "the adapter that training started from")
        load_trained(policy.transformer, config.optim, checkpoint)
        evaluate_as(f"iteration {checkpoints.read_state(checkpoint)['iteration']}", scale)
    if options.adapter is not None:
        load_adapter(policy, options.adapter)
        evaluate_as("adapter", scale)
    return results


def _rows(
    config: Config,
    options: EvaluateOptions,
    checkpoint: Path | None,
    benchmarks: Sequence[Benchmark],
    results: Mapping[str, Mapping[str, Evaluation]],
) -> list[System]:
    """Assemble the rows of table.md, one a label, under names that tell models and runs apart."""
    model = Path(config.policy.model).name
    trained = Path(config.run.resume).name if checkpoint is not None else model
    rows = []
    for label in results[systems.TASK]:
        name = f"{trained}, {label}"
        if label.startswith("base"):
            name = model + label.removeprefix("base")
        elif options.adapter is not None:
            name = f"{model} + {Path(options.adapter).name}"
        measurements = {
            b.kind: _measurement(b, results[b.kind][label], config.policy.quantize)
            for b in benchmarks
        }
        rows.append(System(name, **measurements))
    return rows


def warn_of_base(adapter: str, model: str) -> None:
    """Warn if an adapter says that it was trained on a model of another name."""
    base = origin(adapter).get("base_model", "")
    if base and Path(base).name.lower() != Path(model).name.lower():
        log.warning(
            "the adapter %r says that its base model is %s, and is evaluated on %s; its matrices "
            "fit both.",
            adapter,
            base,
            model,
        )


def _subject(
    config: Config,
    options: EvaluateOptions,
    checkpoint: Path | None,
    label: str,
    description: str,
) -> card.Subject:
    """Describe what was evaluated, for its card; `label`: of the last row of the table."""
    model, lora = config.policy.model, options.adapter is not None
    # A Hub id, or else a folder or an embedded model.
    on_hub = model not in MODELS and not Path(model).exists()
    name, note = label, description
    if options.adapter is not None:
        name = options.adapter
        if Path(name).exists():
            name = Path(name).resolve().name
        if revision := origin(options.adapter).get("revision"):
            note += f", revision {revision}"
    elif checkpoint is not None:
        lora = config.policy.adapter == "lora"
    base = model if on_hub or model in MODELS else Path(model).name
    return card.Subject(name, base, lora, on_hub, note)


def _measurement(benchmark: Benchmark, evaluation: Evaluation, quantizer: str) -> Measurement:
    """Describe one evaluation, on weights that `quantizer` has packed or "none", as a system's
    figures."""
    evaluation_set = benchmark.evaluation_set
    height, width = evaluation.shown.shape[-2:]
    entries = range(len(evaluation_set.prompts))
    pictures_of = [entry for entry in entries for _ in range(evaluation_set.samples)]
    source = f"{evaluation.steps} steps, guidance scale {evaluation.guidance_scale:g}"
    if quantizer != "none":
        source += f", weights {quantizer}"
    return systems.measurement(
        benchmark.prompt_set,
        evaluation.per_reward,
        evaluation_set.prompts.take(pictures_of),
        benchmark.scorer,
        balanced=benchmark.kind == systems.TASK,
        source=source,
        sizes={f"{width}x{height}": evaluation.images},
    )


def _report(
    options: EvaluateOptions,
    config: Config,
    checkpoint: Path | None,
    evaluation_set: EvaluationSet,
    evaluations: dict[str, Evaluation],
) -> dict[str, Any]:
    """Assemble the content of report.json."""
    trained = checkpoint is not None or options.adapter is not None
    return {
        "target": options.target,
        "checkpoint": str(checkpoint) if checkpoint else None,
        "adapter": options.adapter,
        "adapter_origin": origin(options.adapter) if options.adapter else None,
        "prompt_set": config.sample.prompts,
        "split": options.split,
        "reports": {label: evaluation.to_dict() for label, evaluation in evaluations.items()},
        "change": _changes(list(evaluations.values()), evaluation_set) if trained else None,
        "versions": versions(),
    }


def _with_options(config: Config, options: EvaluateOptions, quality: Sequence[str] = ()) -> Config:
    """Apply the options of the command line to `config`; those of the `quality` rewards alone are
    left to `_quality_scorer`."""
    reward_options = config.reward.options
    if options.rewards:
        # Only rewards that are reported are loaded; training's may need packages that are not here.
        reward_options = {
            name: value
            for name, value in reward_options.items()
            if name.rpartition(".")[0] in options.rewards
        }
    changes = {
        "run.eval_prompts": options.prompts,
        "run.eval_samples": options.samples,
        "sample.eval_steps": options.steps,
        "policy.model": options.model,
        "sample.prompts": options.prompt_set,
        "sample.guidance_scale": options.cfg,
        "policy.device": options.device,
        "policy.variant": options.variant,
        "policy.quantize": options.quantize,
        **image_size(options, config),
        "reward.options": {**reward_options, **options.reward_options},
    }
    reported = options.rewards or (*config.reward.weights, *config.reward.report)
    alone = set(quality) - set(reported)
    changes["reward.options"] = {
        name: value
        for name, value in changes["reward.options"].items()
        if name.rpartition(".")[0] not in alone
    }
    if options.rewards:
        changes["reward.devices"] = {
            name: device
            for name, device in config.reward.devices.items()
            if name in ("all", *options.rewards)
        }
        changes["reward.report"] = options.rewards
        changes["reward.weights"] = dict.fromkeys(options.rewards, 1.0)
    if (rows := options.batch_size or evaluated_rows(options, config)) is not None:
        # Of one prompt, so that any number is allowed: training's group has no part in this.
        changes["sample.batch_size"] = rows
        changes["sample.group_size"] = max(2, rows)
        changes["sample.prompts_per_iteration"] = 2 * rows
        changes["sample.scouts"] = changes["sample.scout_forwards"] = 0
        changes["optim.updates_per_iteration"] = 1
    return replace(config, **{name: v for name, v in changes.items() if v is not None})


def _changes(evaluations: list[Evaluation], evaluation_set: EvaluationSet) -> dict[str, Any]:
    """Compute the change of the accuracy, and of every reward, from the first evaluation to the
    last, with its paired 95 % interval."""
    shape = (len(evaluation_set.prompts), evaluation_set.samples)
    tags, indices = evaluation_set.tags, evaluation_set.prompts.indices
    before, after = evaluations[0].per_reward, evaluations[-1].per_reward
    scores = {}
    for name in before:
        first, last = (images[name].view(shape).mean(dim=1).numpy() for images in (before, after))
        scores[name] = {
            "change": balanced_mean(last - first, tags),
            "interval": list(bootstrap(last - first, tags, indices)),
        }
    accuracy = next(iter(scores.values()))
    return {"accuracy": accuracy["change"], "interval": accuracy["interval"], "scores": scores}


def _print_changes(changes: dict[str, Any], percent: bool, console: Console) -> None:
    """Print the changes; with `percent` that of the accuracy in percentage points."""
    text = "change on the same prompts and seeds, with its 95 % interval:"
    console.print(text, soft_wrap=True)
    for number, (name, score) in enumerate(changes["scores"].items()):
        scale, digits = (100, 1) if percent and number == 0 else (1, 3)
        low, high = (f"{scale * bound:+.{digits}f}" for bound in score["interval"])
        text = f"  {name}: {scale * score['change']:+.{digits}f} ({low} to {high})"
        console.print(text, soft_wrap=True, markup=False)
