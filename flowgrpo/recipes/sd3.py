"""SD3.5-medium: the paper's recipe, Flow-GRPO-Fast and GRPO-Guard.

Where numbers come from: P the paper (arXiv 2505.05470), C config/grpo.py of flow_grpo in November
2025 (general_ocr_sd3, geneval_sd3, pickscore_sd3; geneval_sd3_fast_nocfg and
pickscore_sd3_fast_nocfg), G its config/grpo_guard.py. Numbers without a letter are ours.
"""

from __future__ import annotations

from typing import Any

from flowgrpo.config import Config, OptimConfig, PolicyConfig, SampleConfig
from flowgrpo.recipes.fit import fit
from flowgrpo.recipes.tasks import FEW_PARTS, GUARDS, RUN, SMALL_GUARDS, TASKS, Kl, reward_config

MODEL = "stabilityai/stable-diffusion-3.5-medium"


PACKED = {24: ("int8", "int8"), 12: ("int8", "nf4")}
"""GiB of a card -> policy.quantize and policy.quantize_text on it; docs/small-cards.md says why."""


def policy_config(*, offload: bool = False, card: int = 0) -> PolicyConfig:
    """Describe SD3.5-M at 512 pixels with LoRA 32/64 (P, C).

    Args:
        offload: keep the text encoders off the GPU.
        card: GiB of a small GPU: weights are packed, blocks recomputed in the backward pass and
            images decoded one at a time; 0: nothing of that.
    """
    weights, text = PACKED[card] if card else ("none", "none")
    return PolicyConfig(
        model=MODEL,
        resolution=512,
        lora_rank=32,
        lora_alpha=64,
        offload_text_encoders=offload,
        quantize=weights,
        quantize_text=text,
        gradient_checkpointing=card > 0,
        vae_slicing=card > 0,
    )


def paper(
    task: str,
    *,
    groups: int = 48,
    kl: Kl = "std_dev",
    card: int = 0,
    memory: float | None = None,
    **overrides: Any,
) -> Config:
    """Configure Flow-GRPO on SD3.5-M as in the paper.

    Args:
        task: geneval, ocr or pickscore.
        groups: K; 48 with G = 24 are the paper's 1152 images. Fewer are the single-GPU form, whose
            text encoders leave the GPU.
        kl: the convention that beta is stated in.
        card: GiB of a small GPU, a key of `PACKED`, for the form that fits on it; 0: none.
        memory: GiB of the GPU, from which the rows of a forward follow; default: those of `card`,
            or what is there.
        overrides: fields of `run` by their names (steps=200), or any by its dotted name.
    """
    small = groups < 48
    form = f"_{card}gb" if card else "_1gpu" if small else ""
    guards = SMALL_GUARDS if small else GUARDS
    config = Config(
        recipe=f"sd35m_{task}{form}",
        policy=policy_config(offload=small, card=card),
        sample=SampleConfig(
            prompts=TASKS[task].prompts,
            prompts_per_iteration=groups,
            group_size=24,  # P, C
            batch_size=1,
            steps=10,  # P, C
            eval_steps=40,  # P, C
            transition="flow_sde",
            noise_level=0.7,  # P, C
            guidance_scale=4.5,  # C, in rollout and update alike
        ),
        # There is no room for a reward model that is only reported on less than 24 GiB.
        reward=reward_config(task, () if 0 < card < 24 else guards),
        optim=OptimConfig(
            lr=3e-4,  # C
            weight_decay=1e-4,  # C
            clip_range=1e-4,  # C
            adv_clip=5.0,  # C
            beta=TASKS[task].beta[kl],
            kl=kl,
            advantage_std="global",  # C (global_std); P, equation 4, has the group's
            updates_per_iteration=2,  # C
            ema_decay=0.9,  # C
            ema_every=8,  # C
        ),
        run=FEW_PARTS if small else RUN,
    )
    return fit(config, memory or card or None, overrides)


def window(task: str, *, groups: int = 0, memory: float | None = None, **overrides: Any) -> Config:
    """Configure Flow-GRPO-Fast on SD3.5-M: CPS, three steps of 0 to 5, no guidance, no KL.

    Arguments as `paper`; groups 0: as flow_grpo has them, 48 x 24, for pickscore 64 x 18. flow_grpo
    has no such recipe for ocr; ours takes geneval's numbers.
    """
    group_size = 18 if task == "pickscore" else 24  # C
    full = 64 if task == "pickscore" else 48  # C
    small = 0 < groups < full
    config = Config(
        recipe=f"sd35m_{task}_window" + ("_1gpu" if small else ""),
        policy=policy_config(offload=small),
        sample=SampleConfig(
            prompts=TASKS[task].prompts,
            prompts_per_iteration=groups or full,
            group_size=group_size,
            batch_size=1,
            steps=10,  # C
            eval_steps=40,  # C
            transition="cps",  # C
            noise_level=0.8,  # C
            guidance_scale=1.0,  # C
            window_size=3,  # C
            window_range=(0, 5),  # C
        ),
        reward=reward_config(task, SMALL_GUARDS if small else GUARDS),
        optim=OptimConfig(
            lr=3e-4,  # C
            weight_decay=1e-4,  # C
            clip_range=1e-5,  # C
            adv_clip=5.0,  # C
            beta=0.0,  # C
            advantage_std="global",  # C
            updates_per_iteration=2,  # C
            ema_decay=0.9,  # C
            ema_every=8,  # C
        ),
        run=FEW_PARTS if small else RUN,
    )
    return fit(config, memory, overrides)


def guard(task: str, *, memory: float | None = None, **overrides: Any) -> Config:
    """Configure GRPO-Guard on SD3.5-M (G). Arguments as `paper`."""
    config = Config(
        recipe=f"sd35m_{task}_guard",
        policy=policy_config(),
        sample=SampleConfig(
            prompts=TASKS[task].prompts,
            prompts_per_iteration=48,  # G
            group_size=24,  # G
            batch_size=1,
            steps=10,  # G
            eval_steps=40,  # G
            transition="flow_sde",
            noise_level=0.7,  # C
            guidance_scale=4.5,  # G
        ),
        reward=reward_config(task),
        optim=OptimConfig(
            lr=1e-4,  # G
            weight_decay=1e-4,  # C
            clip_range=4e-6 if task == "pickscore" else 2e-6,  # G
            adv_clip=5.0,  # C
            beta=0.0,  # G
            advantage_std="group",  # G
            updates_per_iteration=2,  # G
            guard=True,
            ema_decay=0.9,  # C
            ema_every=8,  # C
        ),
        run=RUN,
    )
    return fit(config, memory, overrides)
