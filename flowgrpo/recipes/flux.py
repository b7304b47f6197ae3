"""FLUX.1-dev: PickScore, in full and with a window.

Where numbers come from: C config/grpo.py of flow_grpo in November 2025 (pickscore_flux,
pickscore_flux_fast). Numbers without a letter are ours.
"""

from __future__ import annotations

from typing import Any

from flowgrpo.config import Config, OptimConfig, PolicyConfig, SampleConfig
from flowgrpo.recipes.fit import fit
from flowgrpo.recipes.tasks import FEW_PARTS, GUARDS, SMALL_GUARDS, TASKS, reward_config

MODEL = "black-forest-labs/FLUX.1-dev"
TASK = "pickscore"


def policy_config(*, small: bool = False, card: int = 0) -> PolicyConfig:
    """Describe FLUX.1-dev at 512 pixels with LoRA 64/128 and embedded guidance 3.5 (C).

    Args:
        small: for one GPU: text encoders off it, and blocks recomputed in the backward pass.
        card: GiB of a small GPU: weights in 4 bits, half the rank, images decoded one at a time; 0:
            nothing of that.
    """
    return PolicyConfig(
        model=MODEL,
        resolution=512,
        lora_rank=32 if card else 64,
        lora_alpha=64 if card else 128,
        embedded_guidance=3.5,
        offload_text_encoders=small,
        quantize="nf4" if card else "none",
        quantize_text="nf4" if card else "none",
        gradient_checkpointing=small,
        vae_slicing=card > 0,
    )


def paper(
    *, groups: int = 48, card: int = 0, memory: float | None = None, **overrides: Any
) -> Config:
    """Configure Flow-GRPO for PickScore on FLUX.1-dev.

    Arguments as `flowgrpo.recipes.sd3.paper`; card: 24 or 0.
    """
    small = groups < 48
    form = f"_{card}gb" if card else "_1gpu" if small else ""
    config = Config(
        recipe=f"flux_pickscore{form}",
        policy=policy_config(small=small, card=card),
        sample=SampleConfig(
            prompts=TASKS[TASK].prompts,
            prompts_per_iteration=groups,
            group_size=24,  # C
            batch_size=1,
            steps=6,  # C
            eval_steps=28,  # C
            transition="flow_sde",  # C
            noise_level=0.9,  # C
            guidance_scale=1.0,  # C: guidance is the model's own input
        ),
        # Beside 12 billion weights there is no room for a model that is only reported.
        reward=reward_config(TASK, () if card else SMALL_GUARDS if small else GUARDS),
        optim=OptimConfig(
            lr=3e-4,  # C
            weight_decay=1e-4,  # C
            clip_range=1e-4,  # C
            adv_clip=5.0,  # C
            beta=0.0,  # C
            advantage_std="global",  # C
            updates_per_iteration=2,  # C
            ema_decay=0.9,  # C
            ema_every=8,  # C
        ),
        run=FEW_PARTS,
    )
    return fit(config, memory or card or None, overrides)


def window(*, groups: int = 48, memory: float | None = None, **overrides: Any) -> Config:
    """Configure Flow-GRPO-Fast for PickScore on FLUX.1-dev: CPS, three trained steps of six.

    Arguments as `flowgrpo.recipes.sd3.paper`.
    """
    small = groups < 48
    config = Config(
        recipe="flux_pickscore_window" + ("_1gpu" if small else ""),
        policy=policy_config(small=small),
        sample=SampleConfig(
            prompts=TASKS[TASK].prompts,
            prompts_per_iteration=groups,
            group_size=24,  # C
            batch_size=1,
            steps=6,  # C
            eval_steps=28,  # C
            transition="cps",  # C
            noise_level=0.8,  # C
            guidance_scale=1.0,  # C: guidance is the model's own input
            # C: three steps in (0, T / 2), which is the whole range.
            window_size=3,
            window_range=(0, 3),
        ),
        reward=reward_config(TASK, SMALL_GUARDS if small else GUARDS),
        optim=OptimConfig(
            lr=3e-4,  # C
            weight_decay=1e-4,  # C
            clip_range=1e-5,  # C
            adv_clip=5.0,  # C
            beta=0.0,  # C
            advantage_std="group",  # C
            updates_per_iteration=2,  # C
            ema_decay=0.9,  # C
            ema_every=8,  # C
        ),
        run=FEW_PARTS,
    )
    return fit(config, memory, overrides)
