"""Trained weights out of a run: for diffusers, and into a policy."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from flowgrpo.config import PolicyConfig
from flowgrpo.policies import Policy
from flowgrpo.policies.adapters import ADAPTER, add_adapter, trained_parameters
from flowgrpo.policies.families import family_of
from flowgrpo.runs import checkpoints
from flowgrpo.runs.state import EMA


def export(transformer: nn.Module, ema: EMA, config: PolicyConfig, folder: Path) -> None:
    """Write the averaged weights for diffusers: a file for `pipe.load_lora_weights(folder)`, or for
    full fine-tuning a folder for `from_pretrained(folder)` of the transformer's class."""
    with ema.swapped():
        if config.adapter == "full":
            transformer.save_pretrained(folder)
            return
        from peft.utils import get_peft_model_state_dict

        family = family_of(transformer)
        family.load_class(family.pipeline).save_lora_weights(
            save_directory=folder,
            transformer_lora_layers=get_peft_model_state_dict(transformer, adapter_name=ADAPTER),
            transformer_lora_adapter_metadata=transformer.peft_config[ADAPTER].to_dict(),
        )


def load_trained(transformer: nn.Module, checkpoint: Path) -> None:
    """Put the averaged weights of `checkpoint` into a transformer that `add_adapter` prepared."""
    stem = "ema" if checkpoints.load(checkpoint, "ema") else "weights"
    values = checkpoints.load(checkpoint, stem)
    parameters = {n: p.detach() for n, p in trained_parameters(transformer).items()}
    checkpoints.check(parameters, values, checkpoint / f"{stem}.safetensors")
    checkpoints.restore(parameters, values)


def add_trained(policy: Policy, config: PolicyConfig, checkpoint: Path) -> None:
    """Put the averaged weights of `checkpoint`, trained as `config` says, into the policy."""
    add_adapter(policy.transformer, config)
    load_trained(policy.transformer, checkpoint)
