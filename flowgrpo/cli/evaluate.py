"""flowgrpo evaluate: a trained model against its base, on the same prompts and seeds."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from flowgrpo import files, rewards
from flowgrpo.cli.options import EvaluateOptions
from flowgrpo.cli.targets import (
    check_numbers,
    check_writable,
    image_size,
    load_base,
    resolve_target,
)
from flowgrpo.config import Config, replace
from flowgrpo.config.validation import require
from flowgrpo.evaluation import evaluate, pictures
from flowgrpo.evaluation.evaluate import Evaluation
from flowgrpo.evaluation.evaluation_set import EvaluationSet, load_evaluation_set
from flowgrpo.evaluation.quality import quality_of, tolerances_of
from flowgrpo.evaluation.statistics import balanced_mean, bootstrap
from flowgrpo.evaluation.table import comparison, print_whole
from flowgrpo.policies import Policy
from flowgrpo.policies.adapters import check_adapter, load_adapter
from flowgrpo.policies.tokens import warn_of_cut
from flowgrpo.recipes import RECIPES
from flowgrpo.runs import checkpoints, content
from flowgrpo.runs.display import EvaluationProgress, Terminal, mode_of
from flowgrpo.runs.export import add_initial, load_trained
from flowgrpo.runs.process import versions


@dataclass(frozen=True)
class Evaluator:
    """Evaluates the present weights of one policy, with the progress on a console."""

    config: Config
    policy: Policy
    evaluation_set: EvaluationSet
    scorer: rewards.Scorer
    console: Console

    def __call__(self, label: str, guidance_scale: float) -> Evaluation:
        """Sample and score all images; `label` names the weights on the console."""
        sample, console, count = self.config.sample, self.console, len(self.evaluation_set.seeds)
        text = f"Evaluating {label}: {count} images in {sample.eval_steps} steps."
        console.print(text, soft_wrap=True, markup=False)
        mode = mode_of(self.config.run.progress, console)
        names = list(self.scorer.weights)
        with EvaluationProgress(console, mode, label, count, names) as progress:
            return evaluate.evaluate(
                self.policy,
                self.evaluation_set,
                self.scorer,
                steps=sample.eval_steps,
                batch_size=sample.batch_size,
                guidance_scale=guidance_scale,
                quality=quality_of(sample.prompts),
                on_progress=progress,
            )


def evaluate_run(options: EvaluateOptions, console: Console | None = None) -> dict[str, Any]:
    """Evaluate base and trained model on the same prompts and seeds; print, draw and write.

    Returns:
        The content of report.json.
    """
    console = console or Terminal(highlight=False)
    check_numbers(options, "samples", "steps", "cfg", "guidance", "batch_size")
    check_numbers(options, "prompts", "resolution", "height", "width", zero=True)
    config, checkpoint = resolve_target(options.target, options.checkpoint == "best")
    require(
        options.model is None or checkpoint is not None or options.target in RECIPES,
        f"{options.target!r} is a model, but --model {options.model} was given too; leave one out.",
    )
    config = _with_options(config, options)
    require(
        checkpoint is None or options.adapter is None,
        f"{options.target!r} has a trained model of its own, but --adapter {options.adapter} was "
        "given too; leave one out, or name the model itself.",
    )
    out = Path(options.out or Path(config.run.resume or f"runs/{config.recipe}") / "evaluation")
    evaluation_set = load_evaluation_set(config, options.split)
    scorer = rewards.Scorer.of(config.reward, config.reported)
    scorer.prepare(evaluation_set.prompts)
    policy = load_base(config)
    if config.run.resume:
        content.warn_of_another_model(config.out_dir, policy)
    warn_of_cut(policy, evaluation_set.prompts.texts)
    scorer.try_out(evaluation_set.prompts, policy.blank_image())
    if options.adapter is not None:
        description = check_adapter(policy, options.adapter)
        console.print(f"Adapter {description}.", soft_wrap=True, markup=False)
    check_writable(out)
    evaluator = Evaluator(config, policy, evaluation_set, scorer, console)
    evaluations = _evaluate_all(evaluator, options, checkpoint)
    report = _report(options, config, checkpoint, evaluation_set, evaluations)
    pictures.save(pictures.evaluation_grid(evaluations, evaluation_set), out / "grid.png")
    files.write_json(out / "report.json", report)
    print_whole(console, comparison(evaluations, tolerances_of(config.sample.prompts)))
    if report["change"] is not None:
        _print_changes(report["change"], evaluations["base"].label == "accuracy", console)
    console.print(f"Written to {out}: report.json, grid.png.", soft_wrap=True, markup=False)
    return report


def _evaluate_all(
    evaluator: Evaluator, options: EvaluateOptions, checkpoint: Path | None
) -> dict[str, Evaluation]:
    """Evaluate the base model, with other guidance if asked for, then the trained one, by label."""
    config, policy = evaluator.config, evaluator.policy
    scale = config.sample.guidance_scale
    evaluations = {"base": evaluator("base", scale)}
    if options.guidance != 1:
        label = f"base, CFG {options.guidance:g}"
        evaluations[label] = evaluator(label, options.guidance)
    if checkpoint is not None:
        if add_initial(policy, config):
            evaluations["start"] = evaluator("the adapter that training started from", scale)
        load_trained(policy.transformer, config.optim, checkpoint)
        label = f"iteration {checkpoints.read_state(checkpoint)['iteration']}"
        evaluations[label] = evaluator(label, scale)
    if options.adapter is not None:
        load_adapter(policy, options.adapter)
        evaluations["adapter"] = evaluator("adapter", scale)
    return evaluations


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
        "prompt_set": config.sample.prompts,
        "split": options.split,
        "reports": {label: evaluation.to_dict() for label, evaluation in evaluations.items()},
        "change": _changes(list(evaluations.values()), evaluation_set) if trained else None,
        "versions": versions(),
    }


def _with_options(config: Config, options: EvaluateOptions) -> Config:
    """Apply the options of the command line to `config`."""
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
        **image_size(options),
        "reward.options": {**reward_options, **options.reward_options},
    }
    if options.rewards:
        changes["reward.report"] = options.rewards
        changes["reward.weights"] = dict.fromkeys(options.rewards, 1.0)
    if options.batch_size is not None:
        # Of one prompt, so that any number is allowed: training's group has no part in this.
        changes["sample.batch_size"] = options.batch_size
        changes["sample.group_size"] = max(2, options.batch_size)
        changes["sample.prompts_per_iteration"] = 2 * options.batch_size
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
