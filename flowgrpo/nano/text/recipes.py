"""The run of `flowgrpo train nano_text`: the paper's text rendering (arXiv 2505.05470, section 4)
in miniature.

The reward is the paper's, 1 - edit distance / length of what RapidOCR reads; accuracy is the share
of words that are read exactly as asked. The numbers are nano's.
"""

from __future__ import annotations

from typing import Any

from flowgrpo.config import (
    Config,
    OptimConfig,
    PolicyConfig,
    RewardConfig,
    RunConfig,
    SampleConfig,
    replace,
)
from flowgrpo.nano.recipes import LORA_TARGETS


def recipe(**overrides: Any) -> Config:
    """Build the Config of nano_text.

    Args:
        overrides: fields of `run` by their names (steps=200), or any field by its dotted name
            (**{"optim.lr": 5e-4}).
    """
    config = Config(
        recipe="nano_text",
        policy=PolicyConfig(
            model="nano_text",
            lora_rank=16,
            lora_alpha=16,
            lora_init="kaiming",
            lora_targets=LORA_TARGETS,
        ),
        sample=SampleConfig(
            prompts="nano_text",
            prompts_per_iteration=24,
            group_size=12,
            batch_size=144,
            steps=6,
            shared_noise=True,
        ),
        reward=RewardConfig(
            weights={"ocr": 1.0},
            report=("ocr_strict", "ocr"),
            # A picture is one line: to look for it first would take ten times as long.
            options={"ocr.detect": "false", "ocr_strict.detect": "false"},
        ),
        optim=OptimConfig(
            lr=5e-3,
            betas=(0.9, 0.99),
            weight_decay=0.0,
            warmup=10,
            decay=240,
            clip_range=1e-3,
            beta=0.02,
            advantage_std="global",
            step_weighting="std",
            ema_decay=0.98,
            ema_every=1,
        ),
        run=RunConfig(
            steps=120, eval_every=40, checkpoint_every=40, eval_prompts=240, eval_guidance=2.0
        ),
    )
    names = {name if "." in name else f"run.{name}": v for name, v in overrides.items()}
    return replace(config, **names)
