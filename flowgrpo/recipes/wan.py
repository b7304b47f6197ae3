"""Wan 2.2 TI2V-5B, text to video: OCR at all steps, PickScore with a window.

Where numbers come from: C config/grpo.py of flow_grpo in November 2025 (general_ocr_wan2_1, for
Wan2.1-T2V-1.3B), F Flow-Factory's examples/grpo/lora/wan22/t2v.yaml of September 2026 (for the two
transformers of Wan2.2-T2V-A14B). Neither is for this model. Numbers without a letter are ours: C
has groups of four videos, 240 pixels of height, which 32 does not divide, and another reward, which
reads a frame of every four.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from flowgrpo.config import Config, OptimConfig, PolicyConfig, RewardConfig, RunConfig, SampleConfig
from flowgrpo.recipes.fit import fit
from flowgrpo.recipes.tasks import FEW_PARTS, SMALL_GUARDS, TASKS, reward_config

MODEL = "Wan-AI/Wan2.2-TI2V-5B-Diffusers"
GUARDS = ("motion_smoothness", *SMALL_GUARDS)


def policy_config(rank: int, *, small: bool = False) -> PolicyConfig:
    """Describe videos of 33 frames of 416 x 256 pixels, with LoRA `rank`/2 `rank`.

    Args:
        small: for one GPU: the text encoder off it, and blocks recomputed in the backward pass.
    """
    return PolicyConfig(
        model=MODEL,
        height=256,
        width=416,  # C
        frames=33,  # C
        lora_rank=rank,
        lora_alpha=2 * rank,
        offload_text_encoders=small,
        gradient_checkpointing=small,
        vae_slicing=True,
    )


def reward_of(task: str) -> RewardConfig:
    """Reward the task, as the mean over four frames."""
    return dataclasses.replace(reward_config(task, GUARDS), frames=4)


def run_config() -> RunConfig:
    """Evaluate few prompts: a video takes as long as a dozen images."""
    return dataclasses.replace(FEW_PARTS, steps=500, eval_prompts=32, eval_samples=1)


def paper(
    task: str = "ocr", *, groups: int = 32, memory: float | None = None, **overrides: Any
) -> Config:
    """Configure Flow-GRPO at all steps, with guidance and a KL.

    Args:
        task: ocr or pickscore.
        groups: K, of eight videos. Fewer than 32 are the single-GPU form.
        memory: GiB of the GPU, from which the rows of a forward follow; default: what is there.
        overrides: fields of `run` by their names (steps=200), or any by its dotted name.
    """
    small = groups < 32
    config = Config(
        recipe=f"wan22_ti2v_5b_{task}" + ("_1gpu" if small else ""),
        policy=policy_config(32, small=small),  # C
        sample=SampleConfig(
            prompts=TASKS[task].prompts,
            prompts_per_iteration=groups,
            group_size=8,
            batch_size=1,
            steps=20,  # C
            eval_steps=50,  # C
            transition="flow_sde",
            noise_level=0.7,
            guidance_scale=4.5,  # C
        ),
        reward=reward_of(task),
        optim=OptimConfig(
            lr=1e-4,  # C
            weight_decay=1e-4,  # C
            clip_range=1e-3,  # C
            adv_clip=5.0,  # C
            beta=0.004,  # C
            advantage_std="global",  # C
            updates_per_iteration=2,
            ema_decay=0.9,  # C
            ema_every=8,  # C
        ),
        run=run_config(),
    )
    return fit(config, memory, overrides)


def window(
    task: str = "pickscore", *, groups: int = 48, memory: float | None = None, **overrides: Any
) -> Config:
    """Configure one trained step of ten, drawn from the second to the fourth.

    Arguments as `paper`, but for 48 groups of sixteen videos.
    """
    small = groups < 48
    config = Config(
        recipe=f"wan22_ti2v_5b_{task}_window" + ("_1gpu" if small else ""),
        policy=policy_config(64, small=small),  # F
        sample=SampleConfig(
            prompts=TASKS[task].prompts,
            prompts_per_iteration=groups,  # F: 48
            group_size=16,  # F
            batch_size=1,
            steps=10,  # F
            eval_steps=28,  # F
            transition="flow_sde",  # F
            noise_level=0.9,  # F
            guidance_scale=4.0,  # F
            window_size=1,  # F
            window_range=(1, 4),  # F
        ),
        reward=reward_of(task),
        optim=OptimConfig(
            lr=1e-4,  # F
            weight_decay=1e-4,  # F
            clip_range=1e-4,  # F
            adv_clip=5.0,  # F
            beta=0.0,  # F
            advantage_std="group",  # F
            updates_per_iteration=2,  # F
            ema_decay=0.9,  # F
            ema_every=8,  # F: every four iterations
        ),
        run=run_config(),
    )
    return fit(config, memory, overrides)
