"""Z-Image and Z-Image-Turbo: Flow-GRPO with one noisy step of the first few, for PickScore or OCR.

Where numbers come from: F examples/grpo/lora/z_image/default.yaml and z_image_turbo/default.yaml of
Flow-Factory in May 2026 (PickScore alone; OCR takes its numbers), R UniRL's recipe for Z-Image,
examples/diffusion/z_image/z_image_trainside.yaml, U an observation of UniRL's authors (#347).
Numbers without a letter are ours.

Flow-Factory's guidance scale is the pipeline's, which counts from the conditional velocity: 4 there
is 5 here. R has no guidance, 12 steps, three noisy ones of the first half, and adapts the attention
alone.
"""

from __future__ import annotations

from typing import Any

from flowgrpo.config import Config, OptimConfig, PolicyConfig, SampleConfig
from flowgrpo.recipes.fit import fit
from flowgrpo.recipes.tasks import FEW_PARTS, GUARDS, SMALL_GUARDS, TASKS, reward_config

MODEL = "Tongyi-MAI/Z-Image"
TURBO = "Tongyi-MAI/Z-Image-Turbo"


def policy_config(model: str, *, small: bool, card: int = 0) -> PolicyConfig:
    """Describe a model at 512 pixels with LoRA 64/128 (F, R), with blocks recomputed in the
    backward pass (R), without which one row of a guided update takes half of 80 GB.

    Args:
        small: for one GPU: text encoder off it.
        card: GiB of a small GPU: weights in 8 bits, half the rank, images decoded one at a time; 0:
            nothing of that.
    """
    return PolicyConfig(
        model=model,
        resolution=512,
        lora_rank=32 if card else 64,
        lora_alpha=64 if card else 128,
        offload_text_encoders=small,
        gradient_checkpointing=True,
        quantize="int8" if card else "none",
        quantize_text="int8" if card else "none",
        vae_slicing=card > 0,
    )


def optim_config() -> OptimConfig:
    """Describe the update, the same for both models."""
    return OptimConfig(
        lr=3e-4,  # F
        weight_decay=1e-4,  # F
        clip_range=1e-4,  # F
        adv_clip=5.0,  # F
        beta=0.0,  # F
        advantage_std="group",  # F
        updates_per_iteration=2,  # F
        ema_decay=0.9,  # F
        ema_every=8,  # F: four iterations
    )


def window(
    task: str, *, groups: int = 48, card: int = 0, memory: float | None = None, **overrides: Any
) -> Config:
    """Configure Flow-GRPO on Z-Image: guidance, and one noisy step, the second to fourth of ten.

    Args:
        task: pickscore or ocr.
        groups: K; 48 with G = 16 (F). Fewer are the single-GPU form.
        card: GiB of a small GPU, 24, for the form that fits on it; 0: none.
        memory: GiB of the GPU, from which the rows of a forward follow; default: those of `card`,
            or what is there.
        overrides: fields of `run` by their names (steps=200), or any by its dotted name.
    """
    small = groups < 48
    config = Config(
        recipe=f"zimage_{task}" + (f"_{card}gb" if card else "_1gpu" if small else ""),
        policy=policy_config(MODEL, small=small, card=card),
        sample=SampleConfig(
            prompts=TASKS[task].prompts,
            prompts_per_iteration=groups,
            group_size=16,  # F
            batch_size=1,
            steps=10,  # F
            eval_steps=40,  # F
            transition="flow_sde",  # F
            noise_level=0.7,  # F
            guidance_scale=5.0,  # F: 4 of the pipeline
            window_size=1,  # F
            window_range=(1, 4),  # F
        ),
        reward=reward_config(task, () if card else SMALL_GUARDS if small else GUARDS),
        optim=optim_config(),
        run=FEW_PARTS,
    )
    return fit(config, memory or card or None, overrides)


def turbo(task: str, *, groups: int = 48, memory: float | None = None, **overrides: Any) -> Config:
    """Configure Flow-GRPO on Z-Image-Turbo: no guidance, and little noise in the second, third or
    fourth step of six.

    Arguments as `window`. A distilled model does not find back from states far off its path: 0.7
    destroys the pictures of guidance-distilled models and 0.2 works (U). F has 0.7 for Turbo too;
    --sample.noise-level 0.7 is that.
    """
    small = groups < 48
    config = Config(
        recipe=f"zimage_turbo_{task}" + ("_1gpu" if small else ""),
        policy=policy_config(TURBO, small=small),
        sample=SampleConfig(
            prompts=TASKS[task].prompts,
            prompts_per_iteration=groups,
            group_size=16,  # F
            batch_size=1,
            steps=6,  # F
            eval_steps=10,  # F
            transition="flow_sde",  # F
            noise_level=0.2,  # U
            guidance_scale=1.0,  # F: 0 of the pipeline
            window_size=1,  # F
            window_range=(1, 4),  # F
        ),
        reward=reward_config(task, SMALL_GUARDS if small else GUARDS),
        optim=optim_config(),
        run=FEW_PARTS,
    )
    return fit(config, memory, overrides)
