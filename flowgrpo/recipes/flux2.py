"""FLUX.2-klein: PickScore and OCR on the undistilled base, and PickScore on the distilled model.

Where numbers come from: C Flow-Factory's examples/grpo/lora/flux2_klein_base/default.yaml, D its
flux2_klein/default.yaml beside it, both at a0b2bc5 of May 2026, which train for PickScore. Numbers
without a letter are ours. Both name the 4B and the 9B model and choose the 9B one; here it is the
4B one, whose licence is Apache 2.0 (--policy.model black-forest-labs/FLUX.2-klein-base-9B for
theirs). For OCR, which they do not train for, reward and prompts alone are other ones.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from flowgrpo.config import Config, OptimConfig, PolicyConfig, SampleConfig
from flowgrpo.recipes.fit import fit
from flowgrpo.recipes.tasks import FEW_PARTS, GUARDS, SMALL_GUARDS, TASKS, reward_config

BASE = "black-forest-labs/FLUX.2-klein-base-4B"
DISTILLED = "black-forest-labs/FLUX.2-klein-4B"


def policy_config(model: str, *, small: bool = False, card: int = 0) -> PolicyConfig:
    """Describe a FLUX.2-klein model at 384 pixels with LoRA 64/128 (C, D).

    Args:
        small: for one GPU: text encoders off it, and blocks recomputed in the backward pass.
        card: GiB of a small GPU: weights in 8 bits, images decoded one at a time; 0: nothing of
            that.
    """
    return PolicyConfig(
        model=model,
        resolution=384,
        lora_rank=64,
        lora_alpha=128,
        offload_text_encoders=small,
        gradient_checkpointing=small,
        quantize="int8" if card else "none",
        quantize_text="int8" if card else "none",
        vae_slicing=card > 0,
    )


def base(
    task: str = "pickscore",
    *,
    groups: int = 48,
    card: int = 0,
    memory: float | None = None,
    **overrides: Any,
) -> Config:
    """Configure Flow-GRPO with guidance and one trained step of eight on FLUX.2-klein-base.

    Arguments as `flowgrpo.recipes.sd3.paper`; card: 24 or 0.
    """
    small = groups < 48
    config = Config(
        recipe=f"flux2_klein_{task}" + (f"_{card}gb" if card else "_1gpu" if small else ""),
        policy=policy_config(BASE, small=small, card=card),
        sample=SampleConfig(
            prompts=TASKS[task].prompts,
            prompts_per_iteration=groups,  # C: 48
            group_size=16,  # C
            batch_size=1,
            steps=8,  # C
            eval_steps=28,  # C
            transition="flow_sde",  # C
            noise_level=0.7,  # C
            guidance_scale=4.0,  # C, in rollout and update alike
            # C: one stochastic step, drawn from the second, third and fourth.
            window_size=1,
            window_range=(1, 4),
        ),
        reward=reward_config(task, () if card else SMALL_GUARDS if small else GUARDS),
        optim=OptimConfig(
            lr=3e-4,  # C
            weight_decay=1e-4,  # C
            clip_range=1e-4,  # C
            adv_clip=5.0,  # C
            beta=0.0,  # C
            advantage_std="group",  # C
            updates_per_iteration=2,  # C
            ema_decay=0.9,  # C
            ema_every=8,  # C: four iterations of two updates
        ),
        run=FEW_PARTS,
    )
    return fit(config, memory or card or None, overrides)


def distilled(*, groups: int = 48, memory: float | None = None, **overrides: Any) -> Config:
    """Configure Flow-GRPO for PickScore on the distilled FLUX.2-klein, which takes no guidance:
    four steps, one of them trained.

    Arguments as `flowgrpo.recipes.sd3.paper`.
    """
    config = base("pickscore", groups=groups, memory=memory)
    config = replace(
        config,
        recipe="flux2_klein_distilled_pickscore" + ("_1gpu" if groups < 48 else ""),
        policy=policy_config(DISTILLED, small=groups < 48),
        sample=replace(
            config.sample,
            steps=4,  # D
            eval_steps=10,  # D
            noise_level=0.5,  # D
            guidance_scale=1.0,  # D
            # D: the second or the third step.
            window_range=(1, 3),
        ),
    )
    return fit(config, memory, overrides)
