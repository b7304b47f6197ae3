"""The runs of `flowgrpo train` on the embedded model, with the reasons for their numbers.

    nano       Flow-GRPO (arXiv 2505.05470), the paper's objective
    nano_awm   advantage weighted matching (arXiv 2509.25050), which looks at re-noised results

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
POLICY = PolicyConfig(
    model="nano", lora_rank=16, lora_alpha=16, lora_init="kaiming", lora_targets=LORA_TARGETS
)
REWARD = RewardConfig(
    weights={"nano_strict": 0.5, "nano_partial": 0.5}, report=("nano_strict", "nano_partial")
)


def recipe(**overrides: Any) -> Config:
    """Build the Config of the embedded default, Flow-GRPO.

    Args:
        overrides: fields of `run` by their names (steps=200), or any field by its dotted name
            (**{"optim.lr": 5e-4}).
    """
    config = Config(
        recipe="nano",
        policy=POLICY,
        sample=SampleConfig(
            prompts="nano",
            prompts_per_iteration=24,
            group_size=12,
            batch_size=144,
            # Six steps, all but the last stochastic and trained: each costs as much as an image.
            steps=6,
            shared_noise=True,
        ),
        reward=REWARD,
        optim=OptimConfig(
            lr=6e-3,
            betas=(0.9, 0.99),
            weight_decay=0.0,
            warmup=10,
            # To the end of the run: two updates an iteration.
            decay=240,
            clip_range=1e-3,
            beta=0.02,
            # A group in which nearly all is right counts less than one that has much to learn.
            advantage_std="global",
            step_weighting="std",
            ema_decay=0.98,
            ema_every=1,
        ),
        run=RunConfig(
            steps=120, eval_every=40, checkpoint_every=40, eval_prompts=240, eval_guidance=2.0
        ),
    )
    return _with(config, overrides)


def awm(**overrides: Any) -> Config:
    """Build the Config of `nano_awm`; overrides as for `recipe`."""
    config = Config(
        recipe="nano_awm",
        policy=POLICY,
        sample=SampleConfig(
            prompts="nano",
            prompts_per_iteration=24,
            group_size=12,
            batch_size=96,
            # The objective sees the results alone, and six steps of the ODE make them well enough.
            steps=6,
        ),
        reward=REWARD,
        optim=OptimConfig(
            objective="awm",
            # Draws cost less than images, of which each is looked at three times.
            levels=3,
            level_weight="normalized",
            lr=2e-3,
            betas=(0.9, 0.99),
            weight_decay=0.0,
            warmup=5,
            # A rate that stays drives the errors of bad images up without bound.
            decay=120,
            adv_clip=2.0,
            # The distance of velocities, not a KL of steps.
            beta=0.03,
            advantage_std="global",
            updates_per_iteration=1,
            ema_decay=0.97,
            ema_every=1,
        ),
        run=RunConfig(
            steps=120, eval_every=40, checkpoint_every=40, eval_prompts=240, eval_guidance=2.0
        ),
    )
    return _with(config, overrides)


def _with(config: Config, overrides: dict[str, Any]) -> Config:
    names = {name if "." in name else f"run.{name}": v for name, v in overrides.items()}
    return replace(config, **names)
