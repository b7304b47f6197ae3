"""The model of a run: with its adapters, ready to be trained, or without."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from flowgrpo import seeds
from flowgrpo.config import Config, ConfigError
from flowgrpo.policies import surgery
from flowgrpo.policies.adapters import INITIAL, add_adapter, add_teacher, start_from
from flowgrpo.policies.base import Policy
from flowgrpo.records import Conditioning


def load_policy(
    config: Config,
    pipeline: object | None = None,
    encode: Callable[[Sequence[str]], Conditioning] | None = None,
    *,
    trainable: bool = True,
    reference: bool = False,
    mesh: Any = None,
) -> Policy:
    """Load the model of a run and make its adapters, or all of its weights, trainable.

    Args:
        pipeline: one that is loaded already, in place of policy.model. See `Policy.load`.
        encode: texts -> embeddings, in place of its text encoders. See `Policy.load`.
        trainable: False: the base model as it is, without adapters.
        reference: keep the model before training whatever optim.beta is.
        mesh: of the processes that share the transformer, see `Policy.shard`; None: each has it.
    """
    full = config.policy.adapter == "full"
    # float32 masters of what is computed in another type.
    masters = full and config.run.parallel == "fsdp" and config.policy.dtype == "bfloat16"
    if full and not masters and config.policy.dtype not in ("auto", "float32"):
        raise ConfigError(
            f"policy.dtype is {config.policy.dtype} with policy.adapter full, but weights that are "
            "trained are float32; set policy.dtype to auto, or policy.adapter to lora."
        )
    policy = Policy.load(
        config.policy.model if pipeline is None else pipeline,
        device=config.policy.device,
        dtype="float32" if full and not (masters and mesh) else config.policy.dtype,
        config=config.policy,
        encode=encode,
        masters=masters and mesh is not None,
        on_host=mesh is not None,
    )
    if config.run.eval_resolution:
        policy.add_evaluated_size(config.evaluated_policy)
    if not trainable:
        return policy
    if full and (config.optim.beta > 0 or config.run.eval_kl > 0 or reference):
        policy.keep_reference()
    if config.optim.teacher:
        add_teacher(policy, config.optim.teacher, shared=not full)
    seed = int(seeds.sample_seeds(config.run.seed, seeds.ADAPTER)[0])
    add_adapter(policy.transformer, config.policy, seed)
    if config.policy.init_adapter:
        start_from(policy, config.policy, _initial_adapter(config))
    if config.optim.split_forward:
        policy.split()
    if config.policy.gradient_checkpointing:
        surgery.recompute(policy.transformer, policy.parts)
    if mesh is not None:
        policy.shard(mesh, config.run.cpu_offload)
    return policy


def _initial_adapter(config: Config) -> str:
    """Find the adapter that the run starts from: the run's copy once there is one, since the files
    of policy.init_adapter may have changed or moved."""
    copied = Path(config.run.resume or "") / INITIAL
    return str(copied) if config.run.resume and copied.is_dir() else config.policy.init_adapter
