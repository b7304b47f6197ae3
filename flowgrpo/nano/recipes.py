"""The run of `flowgrpo train`: Flow-GRPO on the embedded model, with the reasons for its numbers.

The study behind them is in benchmarks/LOG.md, with an ablation.
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

# Attention and MLP matrices of both streams; the modulation and the output stay as they are, since
# training them roughens the background.
LORA_TARGETS = (
    "attn.to_q",
    "attn.to_k",
    "attn.to_v",
    "attn.to_out.0",
    "attn.add_q_proj",
    "attn.add_k_proj",
    "attn.add_v_proj",
    "attn.to_add_out",
    "ff.net.0.proj",
    "ff.net.2",
    "ff_context.net.0.proj",
    "ff_context.net.2",
)


def recipe(**overrides: Any) -> Config:
    """Build the Config of the embedded default.

    Args:
        overrides: fields of `run` by their names (steps=200), or any field by its dotted name
            (**{"optim.lr": 5e-4}).
    """
    config = Config(
        recipe="nano",
        policy=PolicyConfig(
            model="nano", lora_rank=8, lora_alpha=16, lora_init="kaiming", lora_targets=LORA_TARGETS
        ),
        sample=SampleConfig(
            prompts="nano",
            prompts_per_iteration=8,
            group_size=12,
            batch_size=48,
            steps=10,
            # No window: all steps but the last are stochastic and trained. A window of two makes an
            # iteration twice as fast, and learns less in equal time.
            shared_noise=True,
        ),
        reward=RewardConfig(
            weights={"nano_strict": 0.5, "nano_partial": 0.5},
            report=("nano_strict", "nano_partial"),
        ),
        optim=OptimConfig(
            lr=3e-3,
            betas=(0.9, 0.99),
            weight_decay=0.0,
            warmup=10,
            # To the end of the run: a rate that stays moves the colours, and gains little more.
            decay=340,
            clip_range=1e-3,
            beta=0.04,
            step_weighting="std",
            ema_decay=0.98,
            ema_every=1,
        ),
        run=RunConfig(steps=170, eval_every=85, checkpoint_every=85, eval_guidance=2.0),
    )
    return replace(
        config, **{name if "." in name else f"run.{name}": v for name, v in overrides.items()}
    )
