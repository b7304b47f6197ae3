"""What ``flowgrpo evaluate`` and ``flowgrpo sample`` do."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console

from flowgrpo import cuda_graphs, files, rewards, seeds
from flowgrpo.config import Config, ConfigError, replace
from flowgrpo.config.validation import require
from flowgrpo.evaluation import evaluate, pictures
from flowgrpo.evaluation.evaluate import HeldOut, Report
from flowgrpo.policies import Policy, lora
from flowgrpo.recipes import RECIPES, recipe
from flowgrpo.runs import checkpoints, directory, state
from flowgrpo.runs.display import Terminal, Watch, comparison, mode_of, show

if TYPE_CHECKING:
    from flowgrpo.cli.main import Evaluate, Sample


def evaluate_run(options: Evaluate, console: Console | None = None) -> dict[str, Any]:
    """Evaluate base and trained model on the same prompts and seeds; print, draw and write.

    Returns:
        What report.json holds.
    """
    console = console or Terminal(highlight=False)
    _check(options, "samples", "steps", "cfg", "guidance", "batch_size")
    _check(options, "prompts", "resolution", zero=True)
    config, checkpoint = _target(options.target, options.checkpoint == "best")
    config = _asked(config, options)
    require(
        checkpoint is None or options.adapter is None,
        f"{options.target!r} has a trained model of its own, but --adapter {options.adapter} was "
        "given too; leave one out, or name the model itself.",
    )
    out = Path(options.out or Path(config.run.resume or f"runs/{config.recipe}") / "evaluation")
    held = evaluate.held_out(config, options.split)
    scorer = rewards.Scorer.of(config.reward, config.reported)
    scorer.prepare(held.prompts)
    policy = load_policy(config)
    if options.adapter is not None:
        check_adapter(policy, options.adapter)
    _writable(out)

    def measure(label: str, guidance: float) -> None:
        images = f"{len(held.seeds)} images in {config.sample.eval_steps} steps"
        console.print(f"Evaluating {label}: {images}.", soft_wrap=True, markup=False)
        mode, names = mode_of(config, console), list(scorer.weights)
        with Watch(console, mode, label, len(held.seeds), names) as watch:
            reports[label] = evaluate.evaluate(
                policy,
                held,
                scorer,
                steps=config.sample.eval_steps,
                batch_size=config.sample.batch_size,
                guidance_scale=guidance,
                quality=evaluate.quality_of(config.sample.prompts),
                watch=watch,
            )

    reports: dict[str, Report] = {}
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
    found = _found(options, config, checkpoint, held, reports)
    evaluate.picture(reports, held, out / "grid.png")
    files.write_json(out / "report.json", found)
    show(console, comparison(reports, evaluate.tolerances_of(config.sample.prompts)))
    if found["change"] is not None:
        _tell(found["change"], reports["base"].label == "accuracy", console)
    console.print(f"Written to {out}: report.json, grid.png.", soft_wrap=True, markup=False)
    return found


def _found(
    options: Evaluate,
    config: Config,
    checkpoint: Path | None,
    held: HeldOut,
    reports: dict[str, Report],
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
        "versions": directory.versions(),
    }


def _asked(config: Config, options: Evaluate) -> Config:
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


def _changes(reports: list[Report], held: HeldOut) -> dict[str, Any]:
    """Change of the accuracy, and of every reward, from the first report to the last, with its
    paired 95 % interval."""
    shape = (len(held.prompts), held.samples)
    found = {}
    for name in reports[0].parts:
        first, last = (
            r.parts[name].view(shape).mean(dim=1).numpy() for r in (reports[0], reports[-1])
        )
        change = evaluate.balanced_mean(last - first, held.tags)
        found[name] = {"change": change, "interval": list(evaluate.bootstrap(last - first, held))}
    first = next(iter(found.values()))
    return {"accuracy": first["change"], "interval": first["interval"], "scores": found}


def _tell(changes: dict[str, Any], share: bool, console: Console) -> None:
    """Print the changes; of an accuracy in percentage points."""
    text = "change on the same prompts and seeds, with its 95 % interval:"
    console.print(text, soft_wrap=True)
    for place, (name, found) in enumerate(changes["scores"].items()):
        scale, digits = (100, 1) if share and place == 0 else (1, 3)
        low, high = (f"{scale * bound:+.{digits}f}" for bound in found["interval"])
        text = f"  {name}: {scale * found['change']:+.{digits}f} ({low} to {high})"
        console.print(text, soft_wrap=True, markup=False)


def sample_pictures(options: Sample, console: Console | None = None) -> Path:
    """Write one picture with `count` images of each prompt; with a run, base above trained."""
    console = console or Terminal(highlight=False)
    _check_sample(options)
    config, checkpoint = _bare(options.model), None
    if options.run is not None:
        config, checkpoint = _target(options.run, best=False)
    given = {
        "policy.device": options.device,
        "policy.resolution": options.resolution,
        "sample.eval_steps": options.steps,
        "sample.guidance_scale": options.guidance,
    }
    config = replace(config, **{name: v for name, v in given.items() if v is not None})
    policy, out = load_policy(config), Path(options.out)
    texts = list(options.prompts)
    # All of these before the base model's images, which may take minutes.
    policy.check_texts(texts)
    if options.adapter is not None:
        check_adapter(policy, options.adapter)
    _writable(out.parent)
    number = torch.arange(len(texts)).repeat_interleave(options.count)
    each = torch.arange(options.count).repeat(len(texts))
    drawn = seeds.sample_seeds(options.seed, seeds.EVALUATION, number.numpy(), each.numpy())

    def images() -> torch.Tensor:
        return evaluate.sample_images(
            policy,
            texts,
            torch.from_numpy(drawn),
            options.count,
            steps=config.sample.eval_steps,
            batch_size=config.sample.batch_size,
            guidance_scale=config.sample.guidance_scale,
        ).cpu()

    rows = {"base": images()}
    if checkpoint is not None:
        add_trained(policy, config, checkpoint)
        rows["trained"] = images()
    if options.adapter is not None:
        load_adapter(policy, options.adapter)
        rows["trained"] = images()
    captions = [text for text in texts for _ in range(options.count)]
    pictures.save(pictures.grid(rows, captions, columns=min(max(options.count, 4), 8)), out)
    console.print(f"Written: {out}", soft_wrap=True, markup=False)
    return out


def _check_sample(options: Sample) -> None:
    """Raise ConfigError for options that no model is needed to find wrong."""
    require(
        bool(options.prompts),
        "no prompt was given, but at least one in quotation marks is expected; write, for example, "
        'flowgrpo sample "three red circles".',
    )
    require(
        options.count > 0,
        f"--count is {options.count}, but at least one image is expected; raise it.",
    )
    _check(options, "steps", "guidance")
    _check(options, "seed", "resolution", zero=True)
    require(
        options.seed < 2**63,
        f"--seed is {options.seed}, but it must be below 2^63; lower it.",
    )
    require(
        options.run is None or options.adapter is None,
        f"--run {options.run} has a trained model of its own, but --adapter {options.adapter} was "
        "given too; leave one out.",
    )
    require(
        not Path(options.out).is_dir(),
        f"--out is {options.out!r}, which is a folder, but the file of a picture is expected; name "
        f"one, for example {Path(options.out) / 'sample.png'}.",
    )


def load_policy(config: Config) -> Policy:
    """The model of `config` without adapters."""
    directory.prepare_process(config)
    dtype = "float32" if config.policy.adapter == "full" else config.policy.dtype
    policy = Policy.load(
        config.policy.model, device=config.policy.device, dtype=dtype, config=config.policy
    )
    cuda_graphs.prepare(policy, config)
    return policy


def add_trained(policy: Policy, config: Config, checkpoint: Path) -> None:
    """Put the averaged weights of `checkpoint` into the policy."""
    directory.add_adapter(policy.transformer, config.policy)
    state.load_trained(policy.transformer, checkpoint)


def load_adapter(policy: Policy, adapter: str) -> None:
    """Put LoRA weights in diffusers' format, a folder, a file or a Hub id, into the policy.

    Raises:
        ConfigError: there are none, or they are those of another model.
    """
    from diffusers.utils import logging

    level = logging.get_verbosity()
    # diffusers would also print a line for each tensor that does not fit.
    logging.set_verbosity(logging.CRITICAL)
    try:
        # No pickle is read, whatever lies in the folder.
        policy.pipeline.load_lora_weights(adapter, use_safetensors=True)
    # diffusers and PEFT raise what the step that fails raises.
    except Exception as error:
        # The first tensor that does not fit is named in the second line.
        reason = " ".join(line.strip() for line in str(error).strip().splitlines()[:2]).rstrip(".")
        raise ConfigError(
            f"the adapter {adapter!r} cannot be loaded into {policy.name} ({type(error).__name__}: "
            f"{reason}), but LoRA weights of this model in diffusers' format are expected; name "
            "the folder that holds pytorch_lora_weights.safetensors."
        ) from error
    finally:
        logging.set_verbosity(level)
    require(
        bool(lora.layers(policy.transformer)),
        f"the adapter {adapter!r} has no weights for the transformer of {policy.name}, but LoRA "
        "weights of this model are expected; name another.",
    )


def check_adapter(policy: Policy, adapter: str) -> None:
    """Raise as `load_adapter` does, and leave the policy as it was: an adapter that does not fit is
    found before the base model's images cost anything."""
    load_adapter(policy, adapter)
    policy.pipeline.unload_lora_weights()


def _check(options: Evaluate | Sample, *names: str, zero: bool = False) -> None:
    """Raise unless the named options, where given, are finite and > 0 (>= 0 with `zero`)."""
    for name in names:
        value, rule = getattr(options, name), "at least 0" if zero else "greater than 0"
        # Written so that NaN fails it as well.
        good = value is None or (0 <= value < float("inf") and (zero or value != 0))
        require(good, f"--{name.replace('_', '-')} is {value}, but it must be {rule}; change it.")


def _bare(model: str) -> Config:
    """The configuration for a model without a run."""
    base = Config(recipe=Path(model).name)
    # The embedded model is small, whatever else there is may be large.
    rows = base.sample.batch_size if model == "nano" else 8
    return replace(base, **{"policy.model": model, "sample.batch_size": rows})


def _target(target: str, best: bool) -> tuple[Config, Path | None]:
    """(configuration, checkpoint) of a run directory or checkpoint folder; (configuration, None) of
    a recipe's name or a model."""
    folder = Path(target)
    if not folder.exists() and target in RECIPES:
        return recipe(target), None
    hub = not folder.exists() and not target.startswith(("/", ".")) and target.count("/") == 1
    if hub or (folder / "model_index.json").is_file():
        return _bare(target), None
    require(
        folder.is_dir(),
        f"{target!r} is neither a run directory nor a recipe ({', '.join(RECIPES)}) nor a model, "
        "but one of these is expected; name a directory that `flowgrpo train` wrote.",
    )
    checkpoint = checkpoints.best(folder) if best else checkpoints.latest(folder)
    checkpoints.verify(checkpoint)
    # checkpoints/step-* lies two folders below the run.
    run = folder if checkpoint != folder else folder.resolve().parents[1]
    return directory.resume_config(run), checkpoint


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
