"""Words for what an objective looks at, for the screen, the memory plan and the model card."""

from __future__ import annotations

from pathlib import Path

from flowgrpo.config import Config
from flowgrpo.objectives.table import objective_of


def sampled_by(config: Config) -> str:
    """Describe the rollout's sampler and which of its steps are trained."""
    sample = config.sample
    rollout = objective_of(config).rollout
    if rollout == "none":
        return f"no rollout, results are those of {Path(sample.curated).name}"
    if rollout == "deterministic":
        return f"{sample.steps} steps of the ODE, whose results are noised again"
    low, high = sample.window_bounds
    text = (
        f"{sample.steps} steps of {sample.transition}, trained: {sample.trained_steps} of the "
        f"steps {low} to {high - 1}"
    )
    if sample.window_schedule == "progressive":
        often = "about " if sample.window_decay else ""
        text += f", on by {sample.window_stride} every {often}{sample.window_interval} iterations"
    return text


def scouted_by(config: Config) -> str:
    """Describe the scouts of an iteration, and what they cost beside its rollout; "" without."""
    sample = config.sample
    if not sample.scouts:
        return ""
    number, worst = sample.forwards_of_a_scout, sample.group_size // 2
    share = sample.candidates * number / (sample.rows * sample.steps)
    return (
        f"{sample.prompts_per_iteration} prompts x {sample.scouts} = {sample.candidates} an "
        f"iteration, by {number} forward{'s' if number > 1 else ''} each, {share:.2g} x those of "
        f"the rollout; of a prompt the best {sample.group_size - worst} and the worst {worst} are "
        "sampled in full"
    )


def looked_at(config: Config) -> str:
    """Describe how often an update looks at a row: "5 steps", or "1 noise level"."""
    if objective_of(config).rollout == "stochastic":
        number, unit = config.sample.trained_steps, "step"
    else:
        number, unit = config.optim.levels, "noise level"
    return f"{number} {unit}{'s' if number > 1 else ''}"
