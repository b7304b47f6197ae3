"""A pipeline that was in use: what its user, or an earlier run, has put on it is taken off again.

    torch.compile of the transformer or its blocks   policy.compile decides about it
    fused query, key and value projections           adapters go into to_q, to_k and to_v, which a
                                                     fused layer does not call
    offloading hooks of accelerate                   the policy places its modules itself
    gradient checkpointing                           policy.gradient_checkpointing decides about it
    the rewrites of an earlier run (surgery.py)      other settings may want others

What changes the numbers, or cannot be taken off, is refused with its name: a wrapper such as
PEFT's, diffusers' hooks (caches of steps, weights in 8 bits, offloaded groups), quantized weights.
A LoRA adapter stays: whether it is to be dropped, merged or trained on, its user has to say
(`adapters.add_adapter` refuses it).
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import nn

from flowgrpo.config.validation import require
from flowgrpo.policies import components
from flowgrpo.policies.attention import IMAGE_LAYERS, TEXT_LAYERS

log = logging.getLogger("flowgrpo")
FUSED = {"to_qkv": IMAGE_LAYERS, "to_kv": IMAGE_LAYERS[1:], "to_added_qkv": TEXT_LAYERS}
"""A fused layer of diffusers' attention -> the layers that it stands for."""


def restore(pipeline: Any, name: str, device: torch.device) -> None:
    """Make the transformer of `pipeline` the plain module of its class, called `name`, in place, to
    be moved to `device`.

    Raises:
        ConfigError: it is of another class, its weights or hooks are refused
            (components.check_weights), or a fused layer has other weights than those that it
            stands for.
    """
    if any(hasattr(component, "_hf_hook") for component in pipeline.components.values()):
        pipeline.remove_all_hooks()
    compiled = hasattr(pipeline.transformer, "_orig_mod")
    if compiled:
        pipeline.transformer = pipeline.transformer._orig_mod
    transformer = pipeline.transformer
    _check_class(transformer, name)
    components.check_weights(pipeline, device)
    for module in transformer.modules():
        compiled |= module._compiled_call_impl is not None
        module._compiled_call_impl = None
        _undo_rewrites(module)
    if compiled:
        log.warning(
            "the pipeline's transformer was compiled by torch.compile; it runs as it is unless "
            "policy.compile is on"
        )
    if getattr(transformer, "is_gradient_checkpointing", False):
        transformer.disable_gradient_checkpointing()
    _unfuse(transformer)


def _check_class(transformer: Any, name: str) -> None:
    """Raise ConfigError unless it is a `name`."""
    require(
        name in {cls.__name__ for cls in type(transformer).__mro__},
        f"the pipeline's transformer is a {type(transformer).__name__}, but a {name} is expected; "
        "put the module itself in its place (of PEFT's model: merge_and_unload()).",
    )


def _undo_rewrites(module: nn.Module) -> None:
    """Drop the attributes that surgery.py's rewrites of an earlier policy have added."""
    attributes = vars(module)
    attributes.pop("_flowgrpo", None)
    attributes.pop("_flowgrpo_family", None)
    for name in ("forward", "cropped_pos_embed"):
        function = getattr(attributes.get(name), "__func__", None)
        # Of the trainer, or a fused forward of the kernels' layers, perhaps as a partial.
        function = getattr(function, "func", function)
        if getattr(function, "__module__", "").startswith(("flowgrpo.", "flowgrpo_kernels.")):
            del attributes[name]


def _unfuse(transformer: nn.Module) -> None:
    """Give attention layers their separate projections back."""
    fused = {
        name: layer
        for name, layer in transformer.named_modules()
        if any(hasattr(layer, joint) for joint in FUSED)
    }
    if not fused:
        return
    for name, layer in fused.items():
        for joint, names in FUSED.items():
            if hasattr(layer, joint):
                _check_fused(f"{name}.{joint}", layer, joint, names)
    transformer.unfuse_qkv_projections()
    for layer in fused.values():
        # diffusers leaves them where the attention is of its older class.
        for joint in FUSED:
            if hasattr(layer, joint):
                delattr(layer, joint)
        layer.fused_projections = False


def _check_fused(name: str, layer: nn.Module, joint: str, names: tuple[str, ...]) -> None:
    weights = torch.cat([getattr(layer, part).weight for part in names])
    require(
        torch.equal(weights, getattr(layer, joint).weight),
        f"the pipeline's {name} has other weights than {', '.join(names)} beside it, but equal "
        "ones are expected, as after fuse_qkv_projections(); load the pipeline anew.",
    )
