"""Trained weights out of a run: for diffusers, and into a policy."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from flowgrpo import files
from flowgrpo.config import Config, OptimConfig, PolicyConfig
from flowgrpo.distributed import sharding
from flowgrpo.distributed.world import ALONE, World
from flowgrpo.policies import Policy
from flowgrpo.policies.adapters import (
    ADAPTER,
    INITIAL,
    LORA_FILE,
    add_adapter,
    start_from,
    trained_parameters,
)
from flowgrpo.policies.families import family_of
from flowgrpo.runs import checkpoints
from flowgrpo.runs.state import EMA, shown_weights


def export(
    transformer: nn.Module, ema: EMA, config: PolicyConfig, folder: Path, world: World = ALONE
) -> None:
    """Write the weights that `ema` shows for diffusers.

    A file for `pipe.load_lora_weights(folder)`, or for full fine-tuning a folder for
    `from_pretrained(folder)` of the transformer's class.

    Args:
        world: the processes that have pieces of the weights, if they do: all call this, and rank 0
            gets them together in host memory and writes.
    """
    with ema.swapped():
        if config.adapter == "full":
            if any(map(sharding.is_sharded, transformer.parameters())):
                _export_pieces(transformer, folder, world)
            else:
                transformer.save_pretrained(folder)
            return
        from peft.utils import get_peft_model_state_dict

        metadata = transformer.peft_config[ADAPTER].to_dict()
        # PEFT keeps names of layers in sets, whose order changes from process to process.
        metadata = {k: sorted(v) if isinstance(v, set) else v for k, v in metadata.items()}
        family = family_of(transformer)
        family.load_class(family.pipeline).save_lora_weights(
            save_directory=folder,
            transformer_lora_layers=get_peft_model_state_dict(transformer, adapter_name=ADAPTER),
            transformer_lora_adapter_metadata=metadata,
        )
        files.order_metadata(folder / LORA_FILE)


def _export_pieces(transformer: nn.Module, folder: Path, world: World) -> None:
    """Write a sharded transformer as its class would write it whole."""
    state = sharding.gather(transformer, world)
    if state is None:
        return
    with torch.device("meta"):
        whole = sharding.original_class(transformer).from_config(transformer.config)
    whole.load_state_dict(state, assign=True)
    whole.save_pretrained(folder)


def load_trained(transformer: nn.Module, optim: OptimConfig, checkpoint: Path) -> None:
    """Put the weights of `checkpoint` into a transformer that `add_adapter` prepared.

    They are those that its run, with this `optim`, evaluated and exported.
    """
    updates = checkpoints.read_state(checkpoint)["record"]["ema_updates"]
    weights = shown_weights(optim.ema_decay, optim.ema_every, updates)
    stem = {"average": "ema", "live": "weights"}[weights]
    values = checkpoints.load(checkpoint, stem)
    parameters = {n: p.detach() for n, p in trained_parameters(transformer).items()}
    checkpoints.check(parameters, values, checkpoint / f"{stem}.safetensors")
    checkpoints.restore(parameters, values)


def add_initial(policy: Policy, config: Config) -> bool:
    """Make the policy of the run that `config` goes on with trainable, with the weights that the
    run started from.

    Returns:
        True: these are an adapter's (policy.init_adapter); False: the policy is its base model.
    """
    add_adapter(policy.transformer, config.policy)
    initial = Path(config.run.resume or "") / INITIAL
    if not (config.policy.init_adapter and initial.is_dir()):
        return False
    start_from(policy, config.policy, str(initial))
    return True
