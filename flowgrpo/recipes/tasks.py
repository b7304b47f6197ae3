"""The papers' tasks: prompts, reward, what is reported beside it, the KL's weight, the length.

    geneval      reward geneval: Mask2Former and CLIP ViT-L/14; the accuracy is geneval_strict
    ocr          reward ocr: RapidOCR, whose models its wheel contains; extra `rewards`
    pickscore    reward pickscore: PickScore v1

`Task.needs` says what each has to have, `describe` a recipe in full, as `flowgrpo train RECIPE
--help` shows it.

Where numbers come from: P the paper (arXiv 2505.05470), C config/grpo.py of flow_grpo in November
2025 (`CONFIGS`). Numbers without a letter are ours.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
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
    needs: str
    """Extra to install, and models to download, of the task's rewards."""
    published: str
    """Figures of SD3.5-M in the paper's abstract."""


# beta: C (std_dev), and P (gaussian): C^2 = -S^2 dt and dt is about 1 / T = 0.1, so one is about
# ten times the other.
TASKS = {
    "geneval": Task(
        prompts="geneval",
        reported=("geneval_strict", "geneval"),
        beta={"std_dev": 0.04, "gaussian": 0.004},
        needs="pip install 'flowgrpo[train]'; facebook/mask2former-swin-small-coco-instance and "
        "openai/clip-vit-large-patch14",
        published="GenEval accuracy 0.63 before and 0.95 after",
    ),
    "ocr": Task(
        prompts="ocr",
        reported=("ocr",),
        beta={"std_dev": 0.04, "gaussian": 0.004},
        needs="pip install 'flowgrpo[rewards]'; RapidOCR's models are in its wheel",
        published="text accuracy 0.59 before and 0.92 after",
    ),
    "pickscore": Task(
        prompts="general",
        reported=("pickscore",),
        beta={"std_dev": 0.01, "gaussian": 0.001},
        needs="pip install 'flowgrpo[train]'; yuvalkirstain/PickScore_v1 and the tokenizer of "
        "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
        published="",
    ),
}
"""Name of a task, which is that of its reward -> the task."""

CONFIGS = {
    ("sd3", "paper", "geneval"): "geneval_sd3",
    ("sd3", "paper", "ocr"): "general_ocr_sd3",
    ("sd3", "paper", "pickscore"): "pickscore_sd3",
    ("sd3", "window", "geneval"): "geneval_sd3_fast_nocfg",
    ("sd3", "window", "ocr"): "geneval_sd3_fast_nocfg",
    ("sd3", "window", "pickscore"): "pickscore_sd3_fast_nocfg",
    ("flux", "paper", "pickscore"): "pickscore_flux",
    ("flux", "window", "pickscore"): "pickscore_flux_fast",
    ("wan", "paper", "ocr"): "general_ocr_wan2_1",
}
"""(file here, function there, task) -> the function of flow_grpo's config/grpo.py, C."""
OTHERS = {
    ("flux2", "base"): "Flow-Factory's examples/grpo/lora/flux2_klein_base/default.yaml",
    ("flux2", "distilled"): "Flow-Factory's examples/grpo/lora/flux2_klein/default.yaml",
    ("wan", "window"): "Flow-Factory's examples/grpo/lora/wan22/t2v.yaml",
    ("qwen", "window"): "Flow-Factory's examples/grpo/lora/qwen_image/default.yaml",
    ("zimage", "window"): "Flow-Factory's examples/grpo/lora/z_image/default.yaml",
    ("zimage", "turbo"): "Flow-Factory's examples/grpo/lora/z_image_turbo/default.yaml",
}
"""(file here, function there) -> where its numbers come from, if it is not flow_grpo."""


def describe(family: str, method: str, task: str, reported: Sequence[str]) -> str:
    """Describe a recipe for its help: rewards, what they need, where the numbers come from.

    Args:
        family: name of the recipe's file, such as sd3; method: its function there.
        reported: rewards that its evaluation reports.
    """
    config = CONFIGS.get((family, method, task))
    source = "flow_grpo's config/" + (f"grpo.py:{config}" if config else "grpo_guard.py")
    source = OTHERS.get((family, method), source)
    published = ""
    if (family, method) == ("sd3", "paper"):
        source = f"the paper (arXiv 2505.05470, section 4) and {source}"
        figures = TASKS[task].published
        published = f" The paper's abstract has {figures}." if figures else ""
    return (
        f"Trains for the reward {task} ({TASKS[task].needs}); evaluations report "
        f"{', '.join(reported)}. Numbers are those of {source}, each marked in "
        f"flowgrpo/recipes/{family}.py.{published} Every option is a field of the configuration."
    )


# P reports aesthetic, DeQA, ImageReward, PickScore and UnifiedReward on DrawBench, as `flowgrpo
# evaluate RUN --quality paper` does. During a run these three are reported on the task's prompts;
# the two judges need an endpoint: add them by reward.report once there is one.
GUARDS = ("pickscore", "aesthetic", "imagereward")
# With GenEval's own CLIP, which is the same: no further model.
SMALL_GUARDS = ("aesthetic",)

RUN = RunConfig(steps=2500, eval_every=50, eval_prompts=120, eval_samples=2, checkpoint_every=50)
# Each doubling of the parts holds the adapters' gradients once more: for few GPUs, or for adapters
# of FLUX.1-dev, which have 179 million numbers.
FEW_PARTS = dataclasses.replace(RUN, leaves=8)


def reward_config(task: str, guards: tuple[str, ...] = GUARDS) -> RewardConfig:
    """Reward the task alone (C); the guards are only reported."""
    report = dict.fromkeys((*TASKS[task].reported, *guards))
    return RewardConfig(weights={task: 1.0}, report=tuple(report))
