"""The papers' tasks: prompts, reward, what is reported beside it, the KL's weight, the length.

Where numbers come from: P the paper (arXiv 2505.05470), C config/grpo.py of flow_grpo in November
2025. Numbers without a letter are ours.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from flowgrpo.config import RewardConfig, RunConfig

Kl = Literal["std_dev", "gaussian"]


@dataclass(frozen=True)
class Task:
    """One reward that the papers train for."""

    prompts: str
    """Prompt set."""
    reported: tuple[str, ...]
    """Rewards of the task that evaluation reports, the accuracy first."""
    beta: dict[Kl, float]
    """Convention of the KL (optim.kl) -> its weight."""


# beta: C (std_dev), and P (gaussian): C^2 = -S^2 dt and dt is about 1 / T = 0.1, so one is about
# ten times the other.
TASKS = {
    "geneval": Task(
        prompts="geneval",
        reported=("geneval_strict", "geneval"),
        beta={"std_dev": 0.04, "gaussian": 0.004},
    ),
    "ocr": Task(
        prompts="ocr",
        reported=("ocr",),
        beta={"std_dev": 0.04, "gaussian": 0.004},
    ),
    "pickscore": Task(
        prompts="general",
        reported=("pickscore",),
        beta={"std_dev": 0.01, "gaussian": 0.001},
    ),
}
"""Name of a task, which is that of its reward -> the task."""

# P reports aesthetic, DeQA, ImageReward, PickScore and UnifiedReward on top of the task. The two
# judges need an endpoint; add them by reward.report once there is one.
GUARDS = ("pickscore", "aesthetic", "imagereward")
# With GenEval's own CLIP, which is the same: no further model.
SMALL_GUARDS = ("aesthetic",)

RUN = RunConfig(steps=2500, eval_every=50, eval_prompts=120, eval_samples=2, checkpoint_every=50)


def reward_config(task: str, guards: tuple[str, ...] = GUARDS) -> RewardConfig:
    """Reward the task alone (C); the guards are only reported."""
    report = dict.fromkeys((*TASKS[task].reported, *guards))
    return RewardConfig(weights={task: 1.0}, report=tuple(report))
