"""README.md beside the saved weights: a model card of the Hugging Face Hub.

The front matter is what the Hub reads (base model, library, tags, task); below it stand what was
trained on what, the arithmetic of a group, the numbers before and after where they are known, and
the lines that load the weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from flowgrpo import files
from flowgrpo.config import Config
from flowgrpo.evaluation import card
from flowgrpo.nano import MODELS
from flowgrpo.objectives import objective_of
from flowgrpo.objectives.describe import sampled_by, scouted_by
from flowgrpo.policies.families import family_of
from flowgrpo.policies.family import Family
from flowgrpo.prompts.load import has_splits
from flowgrpo.runs.state import Weights

FILE = "README.md"


def write(
    folder: Path,
    config: Config,
    transformer: nn.Module,
    iteration: int,
    summary: Mapping[str, Any] | None = None,
    *,
    weights: Weights = "average",
) -> Path:
    """Write the card of the weights in `folder`, trained for `iteration` iterations.

    Args:
        summary: the content of summary.json, for the numbers before and after.
        weights: the kind of weights in `folder`, as `EMA.weights` says.
    """
    from huggingface_hub import ModelCardData

    lora, optim = config.policy.adapter == "lora", config.optim
    method, source, tag = f"the objective {optim.objective} of flowgrpo", "", "flowgrpo"
    if optim.objective == "grpo":
        method, tag = "Flow-GRPO", "flow-grpo"
        source = " (online reinforcement learning, arXiv 2505.05470)"
    data = ModelCardData(
        # The Hub knows repositories; a folder's name says nothing there.
        base_model=config.policy.model if _on_hub(config.policy.model) else None,
        library_name="diffusers",
        pipeline_tag=_task(family_of(transformer)),
        tags=[*(["lora"] if lora else []), tag, "reinforcement-learning"],
        model_name=None if summary is None else config.recipe,
        eval_results=None if summary is None else _results(config, summary),
    )
    average = f"; the weights' average of decay {optim.ema_decay:g}" if optim.ema_decay else ""
    if optim.ema_decay and weights == "live":
        average = "; the weights as the last update left them"
    kind = "LoRA adapter" if lora else "Transformer"
    paragraphs = [
        f"---\n{data.to_yaml()}\n---",
        f"# {config.recipe}: {_base(config)} after {method}",
        f"{kind} of {_base(config)}, trained by {method}{source} for {iteration} "
        f"iterations{average}.",
        _table(("", ""), _settings(config, transformer)),
    ]
    if summary is not None:
        paragraphs += ["## Before and after", _numbers(summary)]
    paragraphs += ["## Load it", f"```python\n{load_lines(config, transformer)}\n```"]
    path = folder / FILE
    files.write_text(path, "\n\n".join(paragraphs) + "\n")
    return path


def load_lines(config: Config, transformer: nn.Module, folder: str = "THIS_FOLDER") -> str:
    """Python that makes an image, or a video, with the weights in `folder`."""
    policy, family = config.policy, family_of(transformer)
    if policy.model in MODELS:
        return (
            "from flowgrpo.policies import Policy\n\n"
            f'policy = Policy.load("{policy.model}")'
            "  # its one text encoder is not what diffusers expects\n"
            f'policy.pipeline.load_lora_weights("{folder}")'
        )
    library, pipeline, cls = family.library, family.pipeline, family.transformer
    base = f'"{policy.model}", torch_dtype=torch.bfloat16'
    if policy.variant:
        base += f', variant="{policy.variant}"'
    result, attribute = ("video", "frames") if family.frame_rate else ("image", "images")
    call = f'{result} = pipe(prompt="a prompt", {_arguments(config, family)}).{attribute}[0]'
    call = "\n".join((*family.card_lines, call))
    if policy.adapter == "lora":
        return (
            f"import torch\nfrom {library} import {pipeline}\n\n"
            f'pipe = {pipeline}.from_pretrained({base}).to("cuda")\n'
            f'pipe.load_lora_weights("{folder}")\n{call}'
        )
    return (
        f"import torch\nfrom {library} import {cls}, {pipeline}\n\n"
        f'transformer = {cls}.from_pretrained("{folder}", torch_dtype=torch.bfloat16)\n'
        f"pipe = {pipeline}.from_pretrained({base}, transformer=transformer)"
        f'.to("cuda")\n{call}'
    )


def _arguments(config: Config, family: Family) -> str:
    """The pipeline's arguments that make it sample as evaluation did."""
    policy = config.evaluated_policy
    sides = {"height": policy.height, "width": policy.width}
    arguments: dict[str, Any] = {
        name: pixels or policy.resolution
        for name, pixels in sides.items()
        if pixels or policy.resolution
    }
    arguments["num_inference_steps"] = config.sample.eval_steps
    if family.call_arguments is not None:
        arguments |= family.call_arguments(config)
    return ", ".join(f"{name}={value!r}" for name, value in arguments.items())


def _task(family: Family) -> str:
    """Name the task as the Hub does."""
    if family.frame_rate:
        return "text-to-video"
    return "image-to-image" if family.edits else "text-to-image"


def _on_hub(model: str) -> bool:
    return model not in MODELS and not Path(model).exists()


def _base(config: Config) -> str:
    model = config.policy.model
    return model if model in MODELS or _on_hub(model) else Path(model).name


def _settings(config: Config, transformer: nn.Module) -> list[tuple[str, str]]:
    policy, sample, optim = config.policy, config.sample, config.optim
    rewards = ", ".join(f"{weight:g} x {name}" for name, weight in config.reward.weights.items())
    sampler = sampled_by(config)
    if objective_of(config).rollout == "stochastic":
        sampler += f", noise level {sample.noise_level:g},"
    trained = "all weights of the transformer"
    if policy.adapter == "lora":
        targets = policy.lora_targets or family_of(transformer).lora_targets
        trained = f"rank {policy.lora_rank}, alpha {policy.lora_alpha}, on {', '.join(targets)}"
        if policy.init_adapter:
            trained += f", from the adapter {Path(policy.init_adapter).name}"
    return [
        ("Recipe", config.recipe),
        ("Objective", optim.objective),
        ("Rewards", rewards),
        ("Prompts", Path(sample.prompts).name),
        (
            "Group arithmetic",
            f"{sample.prompts_per_iteration} prompts x {sample.group_size} images = {sample.rows} "
            f"images an iteration, {optim.updates_per_iteration} updates of "
            f"{config.chunks_per_update} chunks of {sample.batch_size} images",
        ),
        *([("Scouts", scouted_by(config))] if sample.scouts else []),
        (
            "Sampler",
            f"{sampler} in training, {sample.eval_steps} steps of the ODE in evaluation",
        ),
        ("Guidance", _guidance(config, family_of(transformer))),
        ("Trained", trained),
        (
            "Optimizer",
            f"AdamW, learning rate {optim.lr:g}, clip range {optim.clip_range:g}, "
            f"KL weight {optim.beta:g} ({optim.kl})",
        ),
        ("Seed", str(config.run.seed)),
    ]


def _guidance(config: Config, family: Family) -> str:
    scale = config.sample.guidance_scale
    kinds = f"classifier-free, {scale:g}" if scale != 1 else "none"
    if family.embedded_guidance:
        kinds += f"; embedded, {config.policy.embedded_guidance:g}"
    return kinds


def _numbers(summary: Mapping[str, Any]) -> str:
    """Scores, tasks and quality of both reports, and how many images they stand for."""
    before, after = summary["before"], summary["after"]
    rows = []
    for group, prefix in (("scores", ""), ("tasks", "task "), ("quality", "quality ")):
        for name, value in before[group].items():
            rows.append((f"{prefix}{name}", _number(value), _number(after[group].get(name))))
    low, high = after["interval"]
    note = (
        f"{after['images']} images of {after['prompts']} held-out prompts, deterministic sampler, "
        f"{after['steps']} steps, guidance {after['guidance_scale']:g}; 95 % interval of the first "
        f"score over prompts after training: {_number(low)} to {_number(high)}."
    )
    return _table(("", "before", f"iteration {after['iteration']}"), rows) + "\n\n" + note


def _results(config: Config, summary: Mapping[str, Any]) -> list[Any]:
    """List the scores after training as the Hub reads them."""
    prompts = config.sample.prompts
    # Of one file they are among those of training.
    split = "heldout" if has_splits(prompts) else "train"
    return card.results(prompts, split, summary["after"])


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join("| " + " | ".join(map(_cell, line)) + " |" for line in lines)


def _cell(text: str) -> str:
    """Write a text, such as a tag or a path, so that it ends no cell."""
    return " ".join(text.split()).replace("|", "\\|")
