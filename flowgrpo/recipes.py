"""Recipes: functions that return a Config, and the one that finds them by name.

    sd35m_geneval, sd35m_ocr, sd35m_pickscore    the paper (arXiv 2505.05470) on SD3.5-M
    ..._window    Flow-GRPO-Fast: CPS, three trained steps, no guidance
    ..._guard     GRPO-Guard: balanced ratios, a smaller clip range, no KL
    ..._1gpu      eight groups in place of 48, text encoders off the GPU, fewer reward models
    flux_pickscore, flux_pickscore_window, flux_pickscore_1gpu    the same for FLUX.1-dev

Where numbers come from: P the paper, C config/grpo.py of flow_grpo in November 2025
(general_ocr_sd3, geneval_sd3, pickscore_sd3, geneval_sd3_fast_nocfg, pickscore_sd3_fast_nocfg,
pickscore_flux, pickscore_flux_fast), G its config/grpo_guard.py. None of these recipes has been run
to its end here; only the embedded model's has.

Ours, in all of them: the frozen weights are bfloat16 (C: float16 for SD3.5, under a GradScaler;
here policy.dtype float16 has a fixed loss scale). Rows of a forward follow from the memory of the
GPU (C: 9 of SD3.5-M, 3 of FLUX), which changes no number but the time. The prompts are this
package's; name a folder of flow_grpo's data sets by sample.prompts for the paper's own. Length and
evaluation are ours too: C trains until it is stopped.
"""

from __future__ import annotations

import importlib
from typing import Any, Literal

from flowgrpo import plan
from flowgrpo.config import (
    Config,
    ConfigError,
    OptimConfig,
    PolicyConfig,
    RewardConfig,
    RunConfig,
    SampleConfig,
    replace,
)
from flowgrpo.config.validation import require, similar

SD35_MEDIUM = "stabilityai/stable-diffusion-3.5-medium"
FLUX_DEV = "black-forest-labs/FLUX.1-dev"

Kl = Literal["std_dev", "gaussian"]
BETA: dict[str, dict[str, float]] = {
    # C, and P: C^2 = -S^2 dt and dt is about 1 / T = 0.1, so one is about ten times the other.
    "geneval": {"std_dev": 0.04, "gaussian": 0.004},
    "ocr": {"std_dev": 0.04, "gaussian": 0.004},
    "pickscore": {"std_dev": 0.01, "gaussian": 0.001},
}
"""Task -> convention of the KL (optim.kl) -> its weight."""

PROMPTS = {"geneval": "geneval", "ocr": "ocr", "pickscore": "general"}
"""Task -> prompt set."""

TASKS = {
    "geneval": ("geneval_strict", "geneval"),
    "ocr": ("ocr",),
    "pickscore": ("pickscore",),
}
"""Task -> what is reported of it, the accuracy first."""

# P reports aesthetic, DeQA, ImageReward, PickScore and UnifiedReward on top of the task. The two
# judges need an endpoint; add them by reward.report once there is one.
GUARDS = ("pickscore", "aesthetic", "imagereward")
# With GenEval's own CLIP, which is the same: no further model.
SMALL_GUARDS = ("aesthetic",)

RUN = RunConfig(steps=2500, eval_every=50, eval_prompts=120, eval_samples=2, checkpoint_every=50)


def _rewards(task: str, guards: tuple[str, ...] = GUARDS) -> RewardConfig:
    """The task's reward alone (C); the guards are only reported."""
    report = dict.fromkeys((*TASKS[task], *guards))
    return RewardConfig(weights={task: 1.0}, report=tuple(report))


def _sd35m(*, offload: bool = False) -> PolicyConfig:
    """SD3.5-M at 512 pixels with LoRA 32/64 (P, C)."""
    return PolicyConfig(
        model=SD35_MEDIUM,
        resolution=512,
        lora_rank=32,
        lora_alpha=64,
        offload_text_encoders=offload,
    )


def _flux(*, offload: bool = False, checkpointing: bool = False) -> PolicyConfig:
    """FLUX.1-dev at 512 pixels with LoRA 64/128 and embedded guidance 3.5 (C)."""
    return PolicyConfig(
        model=FLUX_DEV,
        resolution=512,
        lora_rank=64,
        lora_alpha=128,
        embedded_guidance=3.5,
        offload_text_encoders=offload,
        gradient_checkpointing=checkpointing,
    )


def _finished(config: Config, memory: float | None, overrides: dict[str, Any]) -> Config:
    """Overrides applied, and the rows of a forward chosen unless they are among them."""
    named = {name if "." in name else f"run.{name}": value for name, value in overrides.items()}
    rows = named.pop("sample.batch_size", None)
    config = replace(config, **named)
    if rows is not None:
        return replace(config, **{"sample.batch_size": rows})
    return plan.fit_batch_size(config, memory)


def paper(
    task: str,
    *,
    groups: int = 48,
    kl: Kl = "std_dev",
    memory: float | None = None,
    **overrides: Any,
) -> Config:
    """Flow-GRPO on SD3.5-M as in the paper.

    Args:
        task: geneval, ocr or pickscore.
        groups: K; 48 with G = 24 are the paper's 1152 images. Fewer are the single-GPU form, whose
            text encoders leave the GPU.
        kl: the convention that beta is stated in.
        memory: GiB of the GPU, from which the rows of a forward follow; default: what is there.
        overrides: fields of `run` by their names (steps=200), or any by its dotted name.
    """
    small = groups < 48
    config = Config(
        recipe=f"sd35m_{task}" + ("_1gpu" if small else ""),
        policy=_sd35m(offload=small),
        sample=SampleConfig(
            prompts=PROMPTS[task],
            prompts_per_iteration=groups,
            group_size=24,  # P, C
            batch_size=1,
            steps=10,  # P, C
            eval_steps=40,  # P, C
            transition="flow_sde",
            noise_level=0.7,  # P, C
            guidance_scale=4.5,  # C, in rollout and update alike
        ),
        reward=_rewards(task, SMALL_GUARDS if small else GUARDS),
        optim=OptimConfig(
            lr=3e-4,  # C
            weight_decay=1e-4,  # C
            clip_range=1e-4,  # C
            adv_clip=5.0,  # C
            beta=BETA[task][kl],
            kl=kl,
            advantage_std="global",  # C (global_std); P, equation 4, has the group's
            updates_per_iteration=2,  # C
            ema_decay=0.9,  # C
            ema_every=8,  # C
        ),
        run=RUN,
    )
    return _finished(config, memory, overrides)


def window(task: str, *, groups: int = 0, memory: float | None = None, **overrides: Any) -> Config:
    """Flow-GRPO-Fast on SD3.5-M: CPS, three steps between 0 and 5, neither guidance nor KL.

    Arguments as `paper`; groups 0: as flow_grpo has them, 48 x 24, for pickscore 64 x 18. flow_grpo
    has no such recipe for ocr; ours takes geneval's numbers.
    """
    group_size = 18 if task == "pickscore" else 24  # C
    whole = 64 if task == "pickscore" else 48  # C
    small = 0 < groups < whole
    config = Config(
        recipe=f"sd35m_{task}_window" + ("_1gpu" if small else ""),
        policy=_sd35m(offload=small),
        sample=SampleConfig(
            prompts=PROMPTS[task],
            prompts_per_iteration=groups or whole,
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
        reward=_rewards(task, SMALL_GUARDS if small else GUARDS),
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
        run=RUN,
    )
    return _finished(config, memory, overrides)


def guard(task: str, *, memory: float | None = None, **overrides: Any) -> Config:
    """GRPO-Guard on SD3.5-M (G). Arguments as `paper`."""
    config = Config(
        recipe=f"sd35m_{task}_guard",
        policy=_sd35m(),
        sample=SampleConfig(
            prompts=PROMPTS[task],
            prompts_per_iteration=48,  # G
            group_size=24,  # G
            batch_size=1,
            steps=10,  # G
            eval_steps=40,  # G
            transition="flow_sde",
            noise_level=0.7,  # C
            guidance_scale=4.5,  # G
        ),
        reward=_rewards(task),
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
    return _finished(config, memory, overrides)


def flux(
    form: Literal["paper", "window"] = "paper",
    *,
    groups: int = 48,
    memory: float | None = None,
    **overrides: Any,
) -> Config:
    """PickScore on FLUX.1-dev, in full or with a window. Arguments as `paper`."""
    small, fast = groups < 48, form == "window"
    config = Config(
        recipe="flux_pickscore" + ("_window" if fast else "") + ("_1gpu" if small else ""),
        policy=_flux(offload=small, checkpointing=small),
        sample=SampleConfig(
            prompts=PROMPTS["pickscore"],
            prompts_per_iteration=groups,
            group_size=24,  # C
            batch_size=1,
            steps=6,  # C
            eval_steps=28,  # C
            transition="cps" if fast else "flow_sde",  # C
            noise_level=0.8 if fast else 0.9,  # C
            guidance_scale=1.0,  # C: guidance is the model's own input
            # C: three steps in (0, T / 2), which is the whole range.
            window_size=3 if fast else 0,
            window_range=(0, 3) if fast else None,
        ),
        reward=_rewards("pickscore", SMALL_GUARDS if small else GUARDS),
        optim=OptimConfig(
            lr=3e-4,  # C
            weight_decay=1e-4,  # C
            clip_range=1e-5 if fast else 1e-4,  # C
            adv_clip=5.0,  # C
            beta=0.0,  # C
            advantage_std="group" if fast else "global",  # C
            updates_per_iteration=2,  # C
            ema_decay=0.9,  # C
            ema_every=8,  # C
        ),
        run=RUN,
    )
    return _finished(config, memory, overrides)


def _named() -> dict[str, tuple[str, dict[str, Any]]]:
    """Name -> ("module:function", its arguments)."""
    here, found = "flowgrpo.recipes", {"nano": ("flowgrpo.nano:recipe", {})}
    for task in BETA:
        for function, suffix in (("paper", ""), ("window", "_window")):
            name = f"sd35m_{task}{suffix}"
            found[name] = (f"{here}:{function}", {"task": task})
            found[f"{name}_1gpu"] = (f"{here}:{function}", {"task": task, "groups": 8})
        found[f"sd35m_{task}_guard"] = (f"{here}:guard", {"task": task})
    for form, suffix in (("paper", ""), ("window", "_window")):
        found[f"flux_pickscore{suffix}"] = (f"{here}:flux", {"form": form})
        found[f"flux_pickscore{suffix}_1gpu"] = (f"{here}:flux", {"form": form, "groups": 8})
    return found


RECIPES = _named()
"""Recipe name -> "module:function" and its arguments; the function takes keyword overrides too."""


def recipe(name: str, **overrides: Any) -> Config:
    """The Config of the recipe `name`: a key of RECIPES, or "package.module:function".

    Args:
        overrides: handed to the function.
    """
    target, arguments = RECIPES.get(name, (name, {}))
    module, _, function = target.partition(":")
    require(
        bool(module and function),
        f"recipe {name!r} is unknown, but one of {', '.join(RECIPES)} or "
        f"package.module:function is expected{similar(name, RECIPES)}; name one of these.",
    )
    try:
        made = getattr(importlib.import_module(module), function)
    # A module of the user's own may raise anything while it is imported.
    except Exception as error:
        raise ConfigError(
            f"recipe {name!r} cannot be loaded from {target} ({type(error).__name__}: {error}), "
            "but a function that returns a flowgrpo.config.Config is expected there; check the "
            "name and the install."
        ) from error
    made = made(**arguments, **overrides)
    require(
        isinstance(made, Config),
        f"recipe {name!r} returned {type(made).__name__}, but a flowgrpo.config.Config is "
        "expected; return one.",
    )
    return made
