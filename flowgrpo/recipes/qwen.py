"""Qwen-Image-2512: Flow-GRPO with one noisy step of the first few, for PickScore or OCR.

Where numbers come from: F examples/grpo/lora/qwen_image/default.yaml of Flow-Factory at a0b2bc5 of
May 2026, which trains for CLIP's score and half of PickScore's; reward and prompts are other ones
here, the task's alone. Numbers without a letter are ours.

The transformer's 20 billion weights and the products of the adapters do not fit on a GPU of 80 GB
beside an update. So the whole form shards them over the processes (F), and is started by torchrun;
the form for one GPU packs them in 8 bits.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from flowgrpo.config import Config, OptimConfig, PolicyConfig, SampleConfig
from flowgrpo.recipes.fit import fit
from flowgrpo.recipes.tasks import FEW_PARTS, GUARDS, SMALL_GUARDS, TASKS, reward_config

MODEL = "Qwen/Qwen-Image-2512"  # F


def window(
    task: str = "pickscore", *, groups: int = 48, memory: float | None = None, **overrides: Any
) -> Config:
    """Configure Flow-GRPO on Qwen-Image: guidance, and one noisy step, the second to fourth of ten.

    Args:
        task: pickscore or ocr.
        groups: K; 48 with G = 16 (F). Fewer are the single-GPU form.
        memory: GiB of the GPU, from which the rows of a forward follow; default: what is there.
        overrides: fields of `run` by their names (steps=200), or any by its dotted name.
    """
    small = groups < 48
    config = Config(
        recipe=f"qwen_image_{task}" + ("_1gpu" if small else ""),
        policy=PolicyConfig(
            model=MODEL,
            resolution=512,  # F
            lora_rank=64,  # F
            lora_alpha=128,  # F
            offload_text_encoders=True,
            gradient_checkpointing=True,  # F
            quantize="int8" if small else "none",
        ),
        sample=SampleConfig(
            prompts=TASKS[task].prompts,
            prompts_per_iteration=groups,
            group_size=16,  # F
            batch_size=1,
            steps=10,  # F
            eval_steps=28,  # F
            transition="flow_sde",  # F
            noise_level=1.0,  # F
            guidance_scale=4.0,  # F
            window_size=1,  # F
            window_range=(1, 4),  # F
            share_prefix=False,
        ),
        reward=reward_config(task, SMALL_GUARDS if small else GUARDS),
        optim=OptimConfig(
            lr=3e-4,  # F
            weight_decay=1e-4,  # F
            clip_range=1e-4,  # F
            adv_clip=5.0,  # F
            beta=0.0,  # F
            advantage_std="group",  # F
            updates_per_iteration=2,  # F
            ema_decay=0.9,  # F
            ema_every=8,  # F: four iterations
        ),
        run=FEW_PARTS if small else replace(FEW_PARTS, parallel="fsdp"),
    )
    return fit(config, memory, overrides)
