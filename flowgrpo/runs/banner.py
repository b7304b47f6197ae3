"""The lines that a run begins with: model, kernels, sizes of an iteration, length, evaluation."""

from __future__ import annotations

from collections.abc import Mapping

from flowgrpo.config import Config
from flowgrpo.distributed.sharding import original_class
from flowgrpo.evaluation.evaluation_set import EvaluationSet
from flowgrpo.objectives.describe import looked_at, sampled_by, scouted_by
from flowgrpo.policies import Policy
from flowgrpo.prompts.load import has_splits
from flowgrpo.rewards.table import is_address
from flowgrpo.runs.process import device_name, kernel_backends
from flowgrpo.runs.state import State


def banner(
    config: Config,
    policy: Policy,
    state: State,
    evaluation_set: EvaluationSet,
    servers: Mapping[str, str] | None = None,
) -> dict[str, str]:
    """Describe a run, as name -> one line; servers: of remote rewards, `Scorer.servers`."""
    sample, optim = config.sample, config.optim
    lora = config.policy.adapter == "lora"
    trained = sum(p.numel() for p in state.parameters.values())
    parameters = sum(p.numel() for p in policy.transformer.parameters())
    if lora:
        # Those of the model alone.
        parameters -= trained
    kind = original_class(policy.transformer)
    rank = f"LoRA of rank {config.policy.lora_rank}, " if lora else ""
    return {
        "model": f"{policy.name}, {kind.__name__}, {count(parameters)} parameters, "
        f"{str(policy.dtype).removeprefix('torch.')} on {device_name(policy.device)}, "
        f"{_size(policy)}",
        "trained": f"{rank}{count(trained)} parameters",
        "kernels": kernel_backends(policy.device),
        "forward": policy.describe(),
        "rollout": f"{sample.prompts_per_iteration} prompts x {sample.group_size} images = "
        f"{sample.rows} rows in {sample.chunks} chunks of {sample.batch_size}; "
        f"{sampled_by(config)}",
        **({"scouts": scouted_by(config)} if sample.scouts else {}),
        "update": f"{optim.objective}: {optim.updates_per_iteration} updates, each on "
        f"{config.chunks_per_update * sample.batch_size} rows x {looked_at(config)}",
        "length": length(config, state.iteration),
        "directory": str(config.out_dir),
        "evaluation": evaluated(config, evaluation_set),
        **servers_lines(servers or {}),
    }


def servers_lines(servers: Mapping[str, str]) -> dict[str, str]:
    """Describe the servers of remote rewards on one line, if there are any."""
    # A reward that is named by its addresses has them in its description.
    texts = [text if is_address(name) else f"{name}: {text}" for name, text in servers.items()]
    return {"servers": "; ".join(texts)} if texts else {}


def _size(policy: Policy) -> str:
    frames = f"{policy.frames} frames, " if policy.frames else ""
    if policy.height == policy.width:
        return f"{frames}{policy.resolution} pixels a side"
    return f"{frames}{policy.width} pixels wide and {policy.height} high"


def length(config: Config, iteration: int) -> str:
    """Describe how long a run goes that has `iteration` iterations behind it."""
    text = f"{config.run.steps} iterations = {config.updates} updates"
    if config.run.min_seconds:
        text += f", and on until {config.run.min_seconds:g} s of training"
    if iteration:
        text += f", resumed at {iteration}"
    if iteration >= config.run.steps and not config.run.min_seconds:
        text += "; nothing is left to train, see --run.steps"
    return text


def evaluated(config: Config, evaluation_set: EvaluationSet) -> str:
    """Describe the evaluation, and say if training sees its prompts."""
    prompts, samples = len(evaluation_set.prompts), evaluation_set.samples
    text = f"{prompts} prompts x {samples} images in {config.sample.eval_steps} steps"
    if config.run.eval_resolution:
        text += f" at {config.run.eval_resolution} pixels a side"
    if has_splits(config.sample.prompts):
        return f"{text}, prompts held out"
    return f"{text}, of the prompts of training: {config.sample.prompts} is one file, not a folder"


def slow_start(policy: Policy) -> str:
    """Say why the first evaluation and iteration take longer than the others; "" if they do not."""
    reasons = []
    if policy.compiled:
        reasons.append("blocks are compiled, which takes minutes")
    if policy.graphs is not None:
        reasons.append("CUDA graphs are recorded")
    return f"In the first evaluation and iteration {' and '.join(reasons)}." if reasons else ""


def count(number: int) -> str:
    """Write a number of parameters as 2.24 B, 1.35 M or 12.30 k."""
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.2f} {unit}"
    return str(number)
