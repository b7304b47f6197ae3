"""Checks of a pipeline's components: what they are, and whether they fit each other.

A pipeline takes whatever it is given: a folder may name another class, and in memory a component is
one assignment away from another's. What does not fit would end in a traceback of torch after
minutes, or in images of another size.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from flowgrpo.config.validation import require
from flowgrpo.policies.quantized import is_quantized


def check_weights(pipeline: Any, device: torch.device) -> None:
    """Raise ConfigError unless the transformer has plain floating-point weights that a gradient can
    go through and that can be moved to `device`, and no component is quantized or under hooks of
    diffusers."""
    for role, component in pipeline.components.items():
        if isinstance(component, nn.Module):
            _check_hooks(role, component)
            require(
                getattr(component, "hf_quantizer", None) is None,
                f"the pipeline's {role} has quantized weights, but floating-point ones are "
                "expected; load the pipeline without a quantization_config, and set "
                "policy.quantize or policy.quantize_text.",
            )
            require(
                not is_quantized(component),
                f"the pipeline's {role} has weights that an earlier policy packed "
                "(policy.quantize), but floating-point ones are expected; load the pipeline anew.",
            )
    for name, module in pipeline.transformer.named_modules():
        require(
            not callable(getattr(module, "weight", None)),
            f"the pipeline's transformer.{name} is a {type(module).__name__}, whose weights are "
            "quantized, but floating-point ones are expected; load the pipeline anew.",
        )
    for name, parameter in pipeline.transformer.named_parameters():
        kind = _strange(parameter, device)
        require(
            not kind,
            f"the pipeline's transformer.{name} is {kind}, but a plain floating-point tensor in "
            "memory is expected; load the pipeline anew, without quantization or device_map, and "
            "outside of torch.inference_mode().",
        )


def _check_hooks(role: str, module: nn.Module) -> None:
    registries = [getattr(m, "_diffusers_hook", None) for m in module.modules()]
    hooks = sorted({hook for registry in registries if registry for hook in registry.hooks})
    require(
        not hooks,
        f"the pipeline's {role} has the hooks {', '.join(hooks)} of diffusers, but one without "
        "hooks is expected; load the pipeline anew (disable_cache() takes those of a cache off).",
    )


def _strange(parameter: nn.Parameter, device: torch.device) -> str:
    """Say what keeps a parameter from being trained on `device`; "" if nothing does."""
    tensor = parameter.data
    if type(tensor) is not torch.Tensor:
        return f"a {type(tensor).__name__}"
    if not tensor.is_floating_point():
        return f"of {tensor.dtype}"
    if tensor.is_meta and device.type != "meta":
        return "on the device meta, without values"
    return "a tensor of inference mode" if parameter.is_inference() else ""


def check_parts(pipeline: Any, names: Iterable[str], model: str) -> None:
    """Raise ConfigError unless `pipeline`, which the user called `model`, has all these parts."""
    lacking = [name for name in names if getattr(pipeline, name) is None]
    require(
        not lacking,
        f"policy.model {model!r} lacks {', '.join(lacking)}, but all of a "
        f"{type(pipeline).__name__}'s parts are expected; restore them.",
    )


def check_vae(
    vae: Any,
    channels: int,
    factor: int,
    model: str,
    scale: Sequence[str] = ("scaling_factor", "shift_factor"),
) -> None:
    """Raise ConfigError unless `vae` decodes latents of `channels` channels to `factor` times their
    size.

    Args:
        factor: of the pipeline, which computed it from the VAE that it was made with.
        model: what the user called the pipeline.
        scale: fields of its configuration that have to be finite numbers.
    """
    config = getattr(vae, "config", None)
    for name in scale:
        value = getattr(config, name, None)
        require(
            isinstance(value, int | float) and math.isfinite(value),
            f"the vae of policy.model {model!r} is a {type(vae).__name__} with {name} {value!r}, "
            "but a number is expected; put back the one that the model was published with.",
        )
    blocks = getattr(config, "block_out_channels", ())
    _check_number(model, "vae", vae, "latent_channels", channels)
    require(
        not blocks or 2 ** (len(blocks) - 1) == factor,
        f"the vae of policy.model {model!r} is a {type(vae).__name__} that enlarges latents "
        f"{2 ** max(len(blocks) - 1, 0)} times, but the pipeline was made for {factor} times; make "
        "the pipeline with it, or put back the one that the model was published with.",
    )


def check_text_encoder(
    pipeline: Any, encoder: str, tokenizer: str, numbers: Sequence[tuple[str, int]], model: str
) -> None:
    """Raise ConfigError unless a text encoder has the sizes that the transformer is made for, and a
    tokenizer whose tokens it knows.

    Args:
        encoder, tokenizer: their names in the pipeline.
        numbers: fields of the encoder's configuration, each with its value.
        model: what the user called the pipeline.
    """
    module, words = getattr(pipeline, encoder), getattr(pipeline, tokenizer)
    for name, number in numbers:
        _check_number(model, encoder, module, name, number)
    config = module.config
    require(
        words is not None,
        f"policy.model {model!r} has a {encoder} and no {tokenizer}, but both are expected; "
        "restore the missing one.",
    )
    size, known = len(words), getattr(config, "vocab_size", math.inf)
    require(
        size <= known,
        f"the {tokenizer} of policy.model {model!r} has {size} tokens, but its {encoder} knows "
        f"{known}; put back the one that the model was published with.",
    )
    # CLIP's texts have as many tokens as its tokenizer says; T5 has no positions.
    length = words.model_max_length
    positions = getattr(config, "max_position_embeddings", math.inf)
    require(
        length <= positions,
        f"the {tokenizer} of policy.model {model!r} has model_max_length {length}, but its "
        f"{encoder} has positions for {positions} tokens; put back the one that the model was "
        "published with.",
    )


def _check_number(model: str, role: str, component: Any, name: str, number: int) -> None:
    """Raise ConfigError unless the field `name` of a component's configuration is `number`."""
    value = getattr(getattr(component, "config", None), name, None)
    require(
        value == number,
        f"the {role} of policy.model {model!r} is a {type(component).__name__} with {name} "
        f"{value}, but its transformer is made for {number}; put back the one that the model was "
        "published with.",
    )
