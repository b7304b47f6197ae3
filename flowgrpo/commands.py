"""What ``flowgrpo evaluate`` and ``flowgrpo sample`` do."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console

from flowgrpo import checkpoints, pictures, rewards, runs, seeds, weights
from flowgrpo import evaluate as evaluation
from flowgrpo.config import Config, ConfigError, replace
from flowgrpo.display import comparison
from flowgrpo.evaluate import HeldOut, Report
from flowgrpo.policies import Policy
from flowgrpo.recipes import RECIPES, recipe
from flowgrpo.validation import require

if TYPE_CHECKING:
    from flowgrpo.cli import Evaluate, Sample


def evaluate_run(options: Evaluate, console: Console | None = None) -> dict[str, Any]:
    """Evaluate base and trained model on the same prompts and seeds; print, draw and write.

    Returns:
        What report.json holds.
    """
    console = console or Console(highlight=False)
    config, checkpoint = _target(options.target, options.checkpoint == "best")
    given = {
        "run.eval_prompts": options.prompts,
        "run.eval_samples": options.samples,
        "sample.eval_steps": options.steps,
        "policy.device": options.device,
    }
    config = replace(config, **{name: v for name, v in given.items() if v is not None})
    out = Path(options.out or Path(config.run.resume or f"runs/{config.recipe}") / "evaluation")
    held = evaluation.held_out(config, options.split)
    scorer = rewards.Scorer.of(config.reward, config.reported)
    scorer.check(held.prompts)
    policy = load_policy(config)
    _writable(out)

    def measure(guidance: float) -> Report:
        return evaluation.evaluate(
            policy,
            held,
            scorer,
            steps=config.sample.eval_steps,
            batch_size=config.sample.batch_size,
            guidance_scale=guidance,
            quality=evaluation.quality_of(config.sample.prompts),
        )

    reports = {"base": measure(config.sample.guidance_scale)}
    if options.guidance != 1:
        reports[f"base, CFG {options.guidance:g}"] = measure(options.guidance)
    if checkpoint is not None:
        add_trained(policy, config, checkpoint)
        iteration = checkpoints.read_state(checkpoint)["iteration"]
        reports[f"iteration {iteration}"] = measure(config.sample.guidance_scale)
    console.print(comparison(reports, evaluation.tolerances_of(config.sample.prompts)))
    found = {
        "target": options.target,
        "checkpoint": str(checkpoint) if checkpoint else None,
        "split": options.split,
        "reports": {label: report.to_dict() for label, report in reports.items()},
        "change": _change(list(reports.values()), held) if checkpoint else None,
        "versions": runs.versions(),
    }
    if found["change"]:
        scale, digits = (100, 1) if reports["base"].label == "accuracy" else (1, 3)
        low, high = (scale * bound for bound in found["change"]["interval"])
        change = f"{scale * found['change']['accuracy']:+.{digits}f}"
        bounds = f"{low:+.{digits}f} to {high:+.{digits}f}"
        console.print(f"change on the same prompts and seeds: {change} ({bounds})")
    evaluation.picture(reports, held, out / "grid.png")
    checkpoints.write_json(out / "report.json", found)
    console.print(f"Written to {out}: report.json, grid.png.", soft_wrap=True, markup=False)
    return found


def _change(reports: list[Report], held: HeldOut) -> dict[str, Any]:
    """Change of the accuracy from the first report to the last, with its paired 95 % interval."""
    shape = (len(held.prompts), held.samples)
    first, last = (r.per_image.view(shape).mean(dim=1).numpy() for r in (reports[0], reports[-1]))
    change = evaluation.balanced_mean(last - first, held.tags)
    return {"accuracy": change, "interval": list(evaluation.bootstrap(last - first, held))}


def sample_pictures(options: Sample, console: Console | None = None) -> Path:
    """Write one picture with `count` images of each prompt; with a run, base above trained."""
    console = console or Console(highlight=False)
    require(
        bool(options.prompts),
        "no prompt was given, but at least one in quotation marks is expected; write, for example, "
        'flowgrpo sample "three red circles".',
    )
    require(
        options.count > 0 and options.steps > 0,
        f"--count is {options.count} and --steps {options.steps}, but both must be above 0.",
    )
    config, checkpoint = Config(), None
    if options.run is not None:
        config, checkpoint = _target(options.run, best=False)
    model = config.policy.model if options.run else options.model
    config = replace(config, **{"policy.device": options.device, "policy.model": model})
    policy, out = load_policy(config), Path(options.out)
    texts = list(options.prompts)
    number = torch.arange(len(texts)).repeat_interleave(options.count)
    each = torch.arange(options.count).repeat(len(texts))
    drawn = seeds.sample_seeds(options.seed, seeds.EVALUATION, number.numpy(), each.numpy())

    def images() -> torch.Tensor:
        return evaluation.sample_images(
            policy,
            texts,
            torch.from_numpy(drawn),
            options.count,
            steps=options.steps,
            batch_size=config.sample.batch_size,
            guidance_scale=options.guidance,
        ).cpu()

    # Unknown words raise here, before a folder is made.
    rows = {"base": images()}
    _writable(out.parent)
    if checkpoint is not None:
        add_trained(policy, config, checkpoint)
        rows["trained"] = images()
    captions = [text for text in texts for _ in range(options.count)]
    pictures.save(pictures.grid(rows, captions, columns=min(max(options.count, 4), 8)), out)
    console.print(f"Written: {out}", soft_wrap=True, markup=False)
    return out


def load_policy(config: Config) -> Policy:
    """The model of `config` without adapters."""
    runs.prepare_process(config)
    dtype = "float32" if config.policy.adapter == "full" else config.policy.dtype
    return Policy.load(
        config.policy.model, device=config.policy.device, dtype=dtype, config=config.policy
    )


def add_trained(policy: Policy, config: Config, checkpoint: Path) -> None:
    """Put the averaged weights of `checkpoint` into the policy."""
    runs.add_adapter(policy.transformer, config.policy)
    weights.load_trained(policy.transformer, checkpoint)


def _target(target: str, best: bool) -> tuple[Config, Path | None]:
    """(configuration, checkpoint) of a run directory or checkpoint folder; (recipe, None) of a
    recipe's name."""
    folder = Path(target)
    if not folder.exists() and target in RECIPES:
        return recipe(target), None
    require(
        folder.is_dir(),
        f"{target!r} is neither a run directory nor a recipe ({', '.join(RECIPES)}), but one of "
        "these is expected; name a directory that `flowgrpo train` wrote.",
    )
    checkpoint = checkpoints.best(folder) if best else checkpoints.latest(folder)
    checkpoints.verify(checkpoint)
    # checkpoints/step-* lies two folders below the run.
    run = folder if checkpoint != folder else folder.resolve().parents[1]
    return runs.resume_config(run), checkpoint


def _writable(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".flowgrpo-probe"
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        raise ConfigError(
            f"{folder} cannot be written ({error.strerror}), but a folder for the results is "
            "expected; choose another --out."
        ) from error
