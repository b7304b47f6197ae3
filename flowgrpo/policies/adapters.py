"""Adapters: LoRA matrices put into a transformer, drawn or loaded; or the whole of it trained."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from flowgrpo.config import ConfigError, PolicyConfig
from flowgrpo.config.validation import require
from flowgrpo.policies import lora
from flowgrpo.policies.adapter_files import (
    BARE,
    DIFFUSERS,
    LORA_FILE,
    MATRIX,
    PEFT_FILE,
    AdapterFile,
    read_adapter,
)
from flowgrpo.policies.base import Policy
from flowgrpo.policies.families import family_of

ADAPTER = "default"


def add_adapter(transformer: nn.Module, config: PolicyConfig, seed: int = 0) -> list[nn.Parameter]:
    """Make `transformer` trainable and return its trained parameters, float32.

    With `config.adapter` "lora", LoRA matrices go into the linear layers named by
    `config.lora_targets` (by default those of the model's family) through diffusers and PEFT;
    everything else is frozen. A is drawn on the CPU from `seed`, so it is the same on every device;
    B is 0, so the model starts as its base. With "full" the whole transformer is trained.

    Raises:
        ConfigError: an ending of `config.lora_targets` matches no layer of the model, a model to be
            trained whole is not float32, or one has an adapter already.
    """
    require(
        not lora.lora_layers(transformer),
        f"the transformer has LoRA layers already ({', '.join(_adapter_names(transformer))}), but "
        "a model without is expected; call unload_lora_weights() of its pipeline to train on the "
        "base, or fuse_lora() and then that to train on what it computes now.",
    )
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


def _adapter_names(transformer: nn.Module) -> list[str]:
    """Names of the adapters that PEFT has put into a transformer."""
    return list(getattr(transformer, "peft_config", {}))


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


def load_adapter(policy: Policy, adapter: str) -> str:
    """Put LoRA weights, in a folder, a file or a Hub repository, into the policy.

    They may be in diffusers' format, in PEFT's, or under bare module names (adapter_files.py).

    Returns:
        The format, size and scale of what was loaded, for the reader of a result.

    Raises:
        ConfigError: there are none, or they are those of another model.
    """
    from diffusers.utils import logging

    file = read_adapter(adapter)
    modules = dict(policy.transformer.named_modules())
    if file is not None and file.prefix == BARE and modules.keys().isdisjoint(file.ranks):
        # Of several models, or under another prefix, which diffusers may know.
        file = None
    if file is not None:
        _check_modules(policy, adapter, file)
    level = logging.get_verbosity()
    # diffusers would also print a line for each tensor that does not fit.
    logging.set_verbosity(logging.CRITICAL)
    try:
        if file is None or file.prefix == DIFFUSERS:
            # No pickle is read, whatever lies in the folder.
            policy.pipeline.load_lora_weights(adapter, use_safetensors=True)
        else:
            _load_plain(policy, file)
    # diffusers and PEFT raise what the step that fails raises.
    except Exception as error:
        # The first tensor that does not fit is named in the second line.
        reason = " ".join(line.strip() for line in str(error).strip().splitlines()[:2]).rstrip(".")
        raise ConfigError(
            f"the adapter {adapter!r} cannot be loaded into {policy.name} ({type(error).__name__}: "
            f"{reason}), but LoRA weights of this model in diffusers' or PEFT's format are "
            f"expected; name the folder that holds {LORA_FILE} or {PEFT_FILE}."
        ) from error
    finally:
        logging.set_verbosity(level)
    require(
        bool(lora.lora_layers(policy.transformer)),
        f"the adapter {adapter!r} has no weights for the transformer of {policy.name}, but LoRA "
        "weights of this model are expected; name another.",
    )
    return "diffusers' conversion of its keys" if file is None else file.describe()


def _check_modules(policy: Policy, adapter: str, file: AdapterFile) -> None:
    """Raise unless the transformer has all modules of `file`: PEFT leaves out, without a word, the
    matrices of those that it does not find."""
    modules = dict(policy.transformer.named_modules())
    foreign = [name for name in file.ranks if name not in modules]
    require(
        not foreign,
        f"the adapter {adapter!r} has matrices for {foreign[0] if foreign else ''} ({len(foreign)} "
        f"such of {len(file.ranks)} layers), which {policy.name} does not have, but LoRA weights "
        "of this model are expected; name another.",
    )
    other = [name for name in file.tensors if not MATRIX.fullmatch(name)]
    require(
        file.prefix == DIFFUSERS or not other,
        f"the adapter {adapter!r} holds {other[0] if other else ''} beside its matrices, but plain "
        "LoRA weights are expected; merge it into the model, or name another.",
    )


def _load_plain(policy: Policy, file: AdapterFile) -> None:
    """Put the matrices of `file` into the transformer, at its scale."""

    def prefixed(values: dict[str, Any]) -> dict[str, Any]:
        return {f"{DIFFUSERS}{name}": value for name, value in values.items()}

    policy.transformer.load_lora_adapter(
        prefixed(file.tensors), prefix="transformer", metadata=prefixed(file.lora_config())
    )


def check_adapter(policy: Policy, adapter: str) -> str:
    """Raise as `load_adapter` does, or describe the adapter, and leave the policy as it was: one
    that does not fit is found before the base model's images cost anything."""
    description = load_adapter(policy, adapter)
    policy.pipeline.unload_lora_weights()
    return description
