"""The model of a run, ready to be trained or sampled from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from torch import nn
from torch.utils.checkpoint import checkpoint

from flowgrpo import seeds
from flowgrpo.config import Config, ConfigError
from flowgrpo.policies import Conditioning, Policy, deterministic
from flowgrpo.policies.adapters import add_adapter


def load_policy(
    config: Config,
    pipeline: object | None = None,
    encode: Callable[[Sequence[str]], Conditioning] | None = None,
) -> Policy:
    """The model of a run with its adapters, or with all of its weights made trainable.

    pipeline: one that is loaded already, in place of policy.model; encode: in place of its text
    encoders. See `Policy.load`.
    """
    whole = config.policy.adapter == "full"
    if whole and config.policy.dtype not in ("auto", "float32"):
        raise ConfigError(
            f"policy.dtype is {config.policy.dtype} with policy.adapter full, but weights that are "
            "trained are float32; set policy.dtype to auto, or policy.adapter to lora."
        )
    dtype = "float32" if whole else config.policy.dtype
    policy = Policy.load(
        config.policy.model if pipeline is None else pipeline,
        device=config.policy.device,
        dtype=dtype,
        config=config.policy,
        encode=encode,
    )
    if whole and config.optim.beta > 0:
        policy.keep_reference()
    seed = int(seeds.sample_seeds(config.run.seed, seeds.ADAPTER)[0])
    add_adapter(policy.transformer, config.policy, seed)
    if config.policy.gradient_checkpointing:
        recompute(policy.transformer)
    return policy


def recompute(transformer: nn.Module) -> None:
    """Keep only the inputs of the transformer's blocks for the backward pass."""
    # Nothing in a block is random; and the state of a generator is read by waiting for the device.
    again = partial(
        checkpoint,
        use_reentrant=False,
        preserve_rng_state=False,
        context_fn=deterministic.checkpoint_contexts,
    )
    try:
        transformer.enable_gradient_checkpointing(lambda module, *args: again(module, *args))
    except ValueError as error:
        raise ConfigError(
            f"policy.gradient_checkpointing is on, but {type(transformer).__name__} has none; "
            "turn it off."
        ) from error
