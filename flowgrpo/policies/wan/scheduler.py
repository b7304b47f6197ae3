"""The scheduler that Wan is sampled with: Euler steps on the sigmas of its shift.

A folder of Wan names a UniPCMultistepScheduler, a multistep solver: a step of it looks back at the
velocities of the steps before, so it has no transition from one state to the next, which a
stochastic step and its log-probability are made of. Its equation is the same flow, x' = v, and so
is its time, sigma = s t / (1 + (s - 1) t) with the shift s = `flow_shift`. In its place stands
diffusers' FlowMatchEulerDiscreteScheduler with that shift, as WanPipeline's own signature names it:
training, evaluation and the model card's lines sample with it, and the pipeline with it gives the
same videos. A published figure of T UniPC steps is not one of T Euler steps: UniPC is of second
order, and it spaces its T times t by 1 / T, where the Euler scheduler's reach down to 1 / 1000 and
leave the last step almost nothing.
"""

from __future__ import annotations

from typing import Any

from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler

from flowgrpo.config.validation import require

EXPECTED = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
"""Settings of a UniPCMultistepScheduler that solves a flow."""


def euler(scheduler: Any, model: str) -> FlowMatchEulerDiscreteScheduler:
    """Make the Euler scheduler of a pipeline's `scheduler`, which is returned if it is one.

    Raises:
        ConfigError: it is neither a UniPCMultistepScheduler of a flow nor an Euler scheduler of a
            fixed shift.
    """
    back = (
        "put back the one that the model was published with, or pipe.scheduler = "
        "FlowMatchEulerDiscreteScheduler(shift=...) with its shift."
    )
    if isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
        require(
            not scheduler.config.use_dynamic_shifting,
            f"the scheduler of policy.model {model!r} has use_dynamic_shifting true, but a fixed "
            f"shift is expected, since WanPipeline computes none; {back}",
        )
        return scheduler
    require(
        isinstance(scheduler, UniPCMultistepScheduler),
        f"policy.model {model!r} has a {type(scheduler).__name__} as its scheduler, but a "
        f"UniPCMultistepScheduler or a FlowMatchEulerDiscreteScheduler is expected; {back}",
    )
    config = scheduler.config
    for name, value in EXPECTED.items():
        require(
            config.get(name) == value,
            f"the scheduler of policy.model {model!r} is a UniPCMultistepScheduler with {name} "
            f"{config.get(name)!r}, but {value!r} is expected, which solves a flow; {back}",
        )
    return FlowMatchEulerDiscreteScheduler(
        num_train_timesteps=config.num_train_timesteps, shift=config.flow_shift
    )
