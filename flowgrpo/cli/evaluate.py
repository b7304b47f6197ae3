"""flowgrpo evaluate: a trained model against its base, on the same prompts and seeds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console

from flowgrpo import files, rewards
from flowgrpo.cli.options import EvaluateOptions
from flowgrpo.cli.targets import check_numbers, check_writable, load_base, resolve_target
from flowgrpo.config import (
    Config,
    replace,
)
from flowgrpo.config.validation import require
from flowgrpo.evaluation import evaluate
from flowgrpo.evaluation.evaluate import Evaluation, EvaluationSet
from flowgrpo.evaluation.statistics import balanced_mean, bootstrap
from flowgrpo.evaluation.table import comparison, show
from flowgrpo.policies.adapters import check_adapter, load_adapter
from flowgrpo.runs import checkpoints
from flowgrpo.runs.display import EvaluationProgress, Terminal, mode_of
from flowgrpo.runs.export import add_trained
from flowgrpo.runs.process import versions


def evaluate_run(options: EvaluateOptions, console: Console | None = None) -> dict[str, Any]:
    """Evaluate base and trained model on the same prompts and seeds; print, draw and write.

    Returns:
        What report.json holds.
    """
    console = console or Terminal(highlight=False)
    check_numbers(options, "samples", "steps", "cfg", "guidance", "batch_size")
    check_numbers(options, "prompts", "resolution", zero=True)
    config, checkpoint = resolve_target(options.target, options.checkpoint == "best")
    config = _with_options(config, options)
    require(
        checkpoint is None or options.adapter is None,
        f"{options.target!r} has a trained model of its own, but --adapter {options.adapter} was "
        "given too; leave one out, or name the model itself.",
    )
    out = Path(options.out or Path(config.run.resume or f"runs/{config.recipe}") / "evaluation")
    held = evaluate.evaluation_set(config, options.split)
    scorer = rewards.Scorer.of(config.reward, config.reported)
    scorer.prepare(held.prompts)
    policy = load_base(config)
    if options.adapter is not None:
        check_adapter(policy, options.adapter)
    check_writable(out)

    def measure(label: str, guidance: float) -> None:
        images = f"{len(held.seeds)} images in {config.sample.eval_steps} steps"
        console.print(f"Evaluating {label}: {images}.", soft_wrap=True, markup=False)
        mode, names = mode_of(config, console), list(scorer.weights)
        with EvaluationProgress(console, mode, label, len(held.seeds), names) as progress:
            reports[label] = evaluate.evaluate(
                policy,
                held,
                scorer,
                steps=config.sample.eval_steps,
                batch_size=config.sample.batch_size,
                guidance_scale=guidance,
                quality=evaluate.quality_of(config.sample.prompts),
                on_progress=progress,
            )

    reports: dict[str, Evaluation] = {}
    measure("base", config.sample.guidance_scale)
    if options.guidance != 1:
        measure(f"base, CFG {options.guidance:g}", options.guidance)
    if checkpoint is not None:
        add_trained(policy, config, checkpoint)
        iteration = checkpoints.read_state(checkpoint)["iteration"]
        measure(f"iteration {iteration}", config.sample.guidance_scale)
    if options.adapter is not None:
        load_adapter(policy, options.adapter)
        measure("adapter", config.sample.guidance_scale)
    found = _report(options, config, checkpoint, held, reports)
    evaluate.picture(reports, held, out / "grid.png")
    files.write_json(out / "report.json", found)
    show(console, comparison(reports, evaluate.tolerances_of(config.sample.prompts)))
    if found["change"] is not None:
        _print_changes(found["change"], reports["base"].label == "accuracy", console)
    console.print(f"Written to {out}: report.json, grid.png.", soft_wrap=True, markup=False)
    return found


def _report(
    options: EvaluateOptions,
    config: Config,
    checkpoint: Path | None,
    held: EvaluationSet,
    reports: dict[str, Evaluation],
) -> dict[str, Any]:
    """What report.json holds."""
    trained = checkpoint is not None or options.adapter is not None
    return {
        "target": options.target,
        "checkpoint": str(checkpoint) if checkpoint else None,
        "adapter": options.adapter,
        "prompt_set": config.sample.prompts,
        "split": options.split,
        "reports": {label: report.to_dict() for label, report in reports.items()},
        "change": _changes(list(reports.values()), held) if trained else None,
        "versions": versions(),
    }


def _with_options(config: Config, options: EvaluateOptions) -> Config:
    """`config` with what the command line says otherwise."""
    given = {
        "run.eval_prompts": options.prompts,
        "run.eval_samples": options.samples,
        "sample.eval_steps": options.steps,
        "sample.prompts": options.prompt_set,
        "sample.guidance_scale": options.cfg,
        "policy.device": options.device,
        "policy.resolution": options.resolution,
        "reward.report": options.rewards or None,
        "reward.options": {**config.reward.options, **options.reward_options} or None,
    }
    if options.rewards:
        # Only what is reported is loaded; training's own rewards may need what is not here.
        given["reward.weights"] = dict.fromkeys(options.rewards, 1.0)
        own = {
            name: value
            for name, value in config.reward.options.items()
            if name.rpartition(".")[0] in options.rewards
        }
        given["reward.options"] = {**own, **options.reward_options}
    if options.batch_size is not None:
        # Of one prompt, so that any number is allowed: training's group has no part in this.
        given["sample.batch_size"] = options.batch_size
        given["sample.group_size"] = max(2, options.batch_size)
        given["sample.prompts_per_iteration"] = 2 * options.batch_size
        given["optim.updates_per_iteration"] = 1
    return replace(config, **{name: v for name, v in given.items() if v is not None})


def _changes(reports: list[Evaluation], held: EvaluationSet) -> dict[str, Any]:
    """Change of the accuracy, and of every reward, from the first report to the last, with its
    paired 95 % interval."""
    shape = (len(held.prompts), held.samples)
    found = {}
    for name in reports[0].parts:
        first, last = (
            r.parts[name].view(shape).mean(dim=1).numpy() for r in (reports[0], reports[-1])
        )
        change = balanced_mean(last - first, held.tags)
        found[name] = {
            "change": change,
            "interval": list(bootstrap(last - first, held.tags, held.prompts.indices)),
        }
    first = next(iter(found.values()))
    return {"accuracy": first["change"], "interval": first["interval"], "scores": found}


def _print_changes(changes: dict[str, Any], share: bool, console: Console) -> None:
    """Print the changes; of an accuracy in percentage points."""
    text = "change on the same prompts and seeds, with its 95 % interval:"
    console.print(text, soft_wrap=True)
    for place, (name, found) in enumerate(changes["scores"].items()):
        scale, digits = (100, 1) if share and place == 0 else (1, 3)
        low, high = (f"{scale * bound:+.{digits}f}" for bound in found["interval"])
        text = f"  {name}: {scale * found['change']:+.{digits}f} ({low} to {high})"
        console.print(text, soft_wrap=True, markup=False)
