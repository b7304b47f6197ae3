"""Adapters: LoRA matrices put into a transformer, drawn or loaded; or the whole of it trained."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
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
    PEFT_FILE,
    AdapterFile,
    first_key,
    read_adapter,
)
from flowgrpo.policies.base import Policy
from flowgrpo.policies.families import family_of

ADAPTER = "default"
INITIAL = "initial"
"""Folder in a run directory: the adapter that the run started from, in diffusers' format."""


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
        "base, fuse_lora() and then that to train on what it computes now, or that and set "
        "policy.init_adapter to its folder to train it further.",
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
        init_lora_weights=False,
    )
    with _without_first_values():
        transformer.add_adapter(lora_config, adapter_name=ADAPTER)
    # Files of the adapter say how it began: A drawn and B 0.
    lora_config.init_lora_weights = True
    _draw_lora(transformer, config, seed)
    lora.install(transformer)
    return list(trained_parameters(transformer).values())


@contextmanager
def _without_first_values() -> Iterator[None]:
    """Leave the weights of linear layers that are made inside undrawn. PEFT would draw A twice and
    B once before `_draw_lora` does, which took half of the time of putting them in."""
    draw, nn.Linear.reset_parameters = nn.Linear.reset_parameters, lambda layer: None
    try:
        yield
    finally:
        nn.Linear.reset_parameters = draw


def _adapter_names(transformer: nn.Module) -> list[str]:
    """Names of the adapters that PEFT has put into a transformer."""
    return list(getattr(transformer, "peft_config", {}))


def _endings(names: list[str]) -> str:
    return ", ".join(sorted({_ending(name) for name in names})[:6])


def _ending(name: str) -> str:
    """Name of a layer inside its block: attn.to_q of transformer_blocks.3.attn.to_q."""
    return ".".join(name.split(".")[2:]) or name


def _draw_lora(transformer: nn.Module, config: PolicyConfig, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in trained_parameters(transformer).items():
        if parameter.is_meta:
            # Where nothing has values, as for counts of memory.
            parameter.data = torch.empty_like(parameter, dtype=torch.float32)
            continue
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


def start_from(policy: Policy, config: PolicyConfig, adapter: str) -> None:
    """Copy the LoRA weights of `adapter` into the policy's adapter, and keep them as the reference.

    Raises:
        ConfigError: there are none, or they have other layers, ranks or scales than `config` says.
    """
    file, layers = read_adapter(adapter), _layers_by_name(policy.transformer)
    name = f"policy.init_adapter {adapter!r}"
    if file is None:
        raise ConfigError(
            f"{name} could not be read, but LoRA weights in diffusers' or PEFT's format are "
            f"expected; name a Hub repository or the folder that holds {LORA_FILE} or {PEFT_FILE}."
        )
    _check_file(policy, name, file)
    _check_same_adapter(name, file, policy.transformer, config)
    for layer_name, layer in layers.items():
        require(
            lora.product_of(layer) is not None,
            f"{name} has matrices for {layer_name}, which is a {type(layer.base_layer).__name__}, "
            "but training can start from matrices of plain linear layers only; leave it out of "
            "policy.lora_targets.",
        )
        for matrix, module in (("A", layer.lora_A), ("B", layer.lora_B)):
            key, parameter = f"{layer_name}.lora_{matrix}.weight", module[ADAPTER].weight
            tensor = file.tensors[key]
            require(
                tensor.shape == parameter.shape,
                f"{name} has {key} {list(tensor.shape)}, but the shape {list(parameter.shape)} is "
                f"expected; name an adapter of {policy.name}.",
            )
            parameter.data.copy_(tensor)
    lora.keep_initial(list(layers.values()))


def add_teacher(policy: Policy, adapter: str, shared: bool) -> None:
    """Give `policy`, which has no adapter yet, a teacher: its model with the LoRA weights of
    `adapter`, in any format and of any rank, as `load_adapter` takes them.

    To be called before `add_adapter`.

    Args:
        shared: the teacher reads the weights of the policy's transformer, which then must stay as
            they are, and costs the memory of its adapter; else it has a copy of them.

    Raises:
        ConfigError: there are none, or they are those of another model.
    """
    student = policy.transformer
    tensors = (*student.parameters(), *student.buffers()) if shared else ()
    teacher = copy.deepcopy(student, {id(tensor): tensor for tensor in tensors})
    policy.transformer = policy.pipeline.transformer = teacher
    try:
        load_adapter(policy, adapter)
    except ConfigError as error:
        raise ConfigError(f"optim.teacher: {error}") from error
    finally:
        policy.transformer = policy.pipeline.transformer = student
    lora.install(teacher)
    lora.keep_merged(lora.lora_layers(teacher))
    policy.keep_teacher(teacher)


def _layers_by_name(transformer: nn.Module) -> dict[str, nn.Module]:
    """The layers with LoRA matrices, by their names in the model."""
    layers = set(lora.lora_layers(transformer))
    return {name: module for name, module in transformer.named_modules() if module in layers}


def _check_same_adapter(
    name: str, file: AdapterFile, transformer: nn.Module, config: PolicyConfig
) -> None:
    """Raise unless `file` has the layers, the rank and the scale of the adapter to be trained."""
    special = [key for key in ("alpha_pattern", "use_rslora", "use_dora") if file.settings.get(key)]
    other = file.others()
    require(
        not special and not other and len(set(file.ranks.values())) == 1,
        f"{name} has {', '.join(special) or ', '.join(other[:1]) or 'layers of several ranks'}, "
        "but matrices of one rank and one alpha are expected; merge it into the model, or name "
        "another.",
    )
    layers = _layers_by_name(transformer)
    same = (config.lora_rank, config.lora_alpha) == (file.rank, file.alpha)
    targets = " ".join(_targets(list(file.ranks), transformer))
    require(
        same and file.ranks.keys() == layers.keys(),
        f"{name} has rank {file.rank}, alpha {file.alpha:g} and matrices for {len(file.ranks)} "
        f"layers, but policy.lora_rank {config.lora_rank}, lora_alpha {config.lora_alpha} and "
        f"lora_targets with {len(layers)} layers are set; set --policy.lora-rank {file.rank} "
        f"--policy.lora-alpha {file.alpha:g} --policy.lora-targets {targets}.",
    )


def _targets(modules: list[str], transformer: nn.Module) -> list[str]:
    """Find the name endings, or else the names, that choose exactly `modules` of the model's linear
    layers."""
    endings = sorted({_ending(module) for module in modules})
    chosen = {
        name
        for name, module in transformer.named_modules()
        if isinstance(module, nn.Linear) or hasattr(module, "base_layer")
        if any(name == ending or name.endswith(f".{ending}") for ending in endings)
    }
    return endings if chosen == set(modules) else modules


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
    by_diffusers = file is None or (file.prefix == DIFFUSERS and not file.alphas)
    if file is not None:
        _check_file(policy, f"the adapter {adapter!r}", file)
        _check_others(f"the adapter {adapter!r}", file, by_diffusers)
    level = logging.get_verbosity()
    # diffusers would also print a line for each tensor that does not fit.
    logging.set_verbosity(logging.CRITICAL)
    try:
        if by_diffusers:
            # No pickle is read, whatever lies in the folder.
            source = adapter if file is None else str(file.path)
            policy.pipeline.load_lora_weights(source, use_safetensors=True)
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
    if not lora.lora_layers(policy.transformer):
        key = first_key(adapter)
        raise ConfigError(
            f"the adapter {adapter!r} has no weights for the transformer of {policy.name}"
            f"{f' (its first key is {key})' if key else ''}, but LoRA weights of this model are "
            "expected; name another."
        )
    for component in policy.pipeline.components.values():
        if isinstance(component, nn.Module):
            # An adapter's dropout comes in training mode, and would draw other images each time.
            component.eval()
    return "diffusers' conversion of its keys" if file is None else file.describe()


def _check_file(policy: Policy, name: str, file: AdapterFile) -> None:
    """Raise unless the transformer has all modules of `file`, the adapter that `name` stands for in
    a sentence, and its matrices are whole."""
    file.check(name)
    modules = dict(policy.transformer.named_modules())
    foreign = [module for module in file.ranks if module not in modules]
    require(
        not foreign,
        f"{name} has matrices for {foreign[0] if foreign else ''} ({len(foreign)} such of "
        f"{len(file.ranks)} layers), which {policy.name} does not have, but LoRA weights of this "
        "model are expected; name another.",
    )


def _check_others(name: str, file: AdapterFile, by_diffusers: bool) -> None:
    """Raise if `file` holds what would not be loaded beside its matrices.

    by_diffusers: magnitudes and biases are.
    """
    other = file.extras() if by_diffusers else file.others()
    require(
        not other,
        f"{name} holds {other[0] if other else ''} beside its matrices, but plain LoRA weights are "
        "expected; merge it into the model, or name another.",
    )
    magnitudes = [key for key in file.others() if "lora_magnitude_vector" in key]
    require(
        not file.settings.get("use_dora") or len(magnitudes) == len(file.ranks),
        f"{name} says use_dora and has magnitudes for {len(magnitudes)} of its {len(file.ranks)} "
        "layers, but one for each is expected; restore the file.",
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
