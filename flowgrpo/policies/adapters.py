"""Adapters: LoRA matrices put into a transformer, drawn or loaded; or the whole of it trained."""

from __future__ import annotations

import math

import torch
from torch import nn

from flowgrpo.config import ConfigError, PolicyConfig
from flowgrpo.config.validation import require
from flowgrpo.policies import lora
from flowgrpo.policies.base import Policy
from flowgrpo.policies.families import family_of

ADAPTER = "default"

LORA_FILE = "pytorch_lora_weights.safetensors"


def add_adapter(transformer: nn.Module, config: PolicyConfig, seed: int = 0) -> list[nn.Parameter]:
    """Make `transformer` trainable and return its trained parameters, float32.

    With `config.adapter` "lora", LoRA matrices go into the linear layers named by
    `config.lora_targets` (by default those of the model's family) through diffusers and PEFT;
    everything else is frozen. A is drawn on the CPU from `seed`, so it is the same on every device;
    B is 0, so the model starts as its base. With "full" the whole transformer is trained.

    Raises:
        ConfigError: an ending of `config.lora_targets` matches no layer of the model, or a model
            to be trained whole is not float32.
    """
    if config.adapter == "full":
        dtypes = {str(p.dtype) for p in transformer.parameters()} - {"torch.float32"}
        require(
            not dtypes,
            f"policy.adapter is full and the model's weights are {', '.join(sorted(dtypes))}, but "
            "weights that are trained must be float32; set policy.dtype to float32.",
        )
        transformer.requires_grad_(True)
        return list(transformer.parameters())
    from peft import LoraConfig

    transformer.requires_grad_(False)
    names = [name for name, module in transformer.named_modules() if isinstance(module, nn.Linear)]
    targets = config.lora_targets
    if targets is None:
        targets = family_of(transformer).lora_targets
    for target in targets:
        require(
            any(name == target or name.endswith(f".{target}") for name in names),
            f"policy.lora_targets names {target!r}, but endings of the model's linear layers are "
            f"expected, for example {_endings(names)}; correct it.",
        )
    lora_config = LoraConfig(
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,
        target_modules=list(targets),
    )
    transformer.add_adapter(lora_config, adapter_name=ADAPTER)
    _draw_lora(transformer, config, seed)
    lora.install(transformer)
    return list(trained_parameters(transformer).values())


def _endings(names: list[str]) -> str:
    return ", ".join(sorted({".".join(name.split(".")[2:]) or name for name in names})[:6])


def _draw_lora(transformer: nn.Module, config: PolicyConfig, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in trained_parameters(transformer).items():
        values = torch.zeros(parameter.shape, dtype=torch.float32)
        if ".lora_A." in name and config.lora_init == "gaussian":
            values.normal_(0.0, 1.0 / config.lora_rank, generator=generator)
        elif ".lora_A." in name:
            # kaiming_uniform_ with a = sqrt(5), PEFT's and nn.Linear's default.
            bound = 1.0 / math.sqrt(parameter.shape[1])
            values.uniform_(-bound, bound, generator=generator)
        # PEFT makes the matrices in the layer's dtype. A 16-bit adapter would lose updates of the
        # size that a learning rate of 1e-4 makes.
        parameter.data = values.to(parameter.device)


def trained_parameters(transformer: nn.Module) -> dict[str, nn.Parameter]:
    """The trained parameters by name, in the model's order."""
    return {name: p for name, p in transformer.named_parameters() if p.requires_grad}


def load_adapter(policy: Policy, adapter: str) -> None:
    """Put LoRA weights in diffusers' format, a folder, a file or a Hub id, into the policy.

    Raises:
        ConfigError: there are none, or they are those of another model.
    """
    from diffusers.utils import logging

    level = logging.get_verbosity()
    # diffusers would also print a line for each tensor that does not fit.
    logging.set_verbosity(logging.CRITICAL)
    try:
        # No pickle is read, whatever lies in the folder.
        policy.pipeline.load_lora_weights(adapter, use_safetensors=True)
    # diffusers and PEFT raise what the step that fails raises.
    except Exception as error:
        # The first tensor that does not fit is named in the second line.
        reason = " ".join(line.strip() for line in str(error).strip().splitlines()[:2]).rstrip(".")
        raise ConfigError(
            f"the adapter {adapter!r} cannot be loaded into {policy.name} ({type(error).__name__}: "
            f"{reason}), but LoRA weights of this model in diffusers' format are expected; name "
            "the folder that holds pytorch_lora_weights.safetensors."
        ) from error
    finally:
        logging.set_verbosity(level)
    require(
        bool(lora.lora_layers(policy.transformer)),
        f"the adapter {adapter!r} has no weights for the transformer of {policy.name}, but LoRA "
        "weights of this model are expected; name another.",
    )


def check_adapter(policy: Policy, adapter: str) -> None:
    """Raise as `load_adapter` does, and leave the policy as it was: an adapter that does not fit is
    found before the base model's images cost anything."""
    load_adapter(policy, adapter)
    policy.pipeline.unload_lora_weights()
