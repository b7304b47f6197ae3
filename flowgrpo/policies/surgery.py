"""Model surgery: all that is rewritten on the modules of diffusers and PEFT, in its order.

A module is rewritten on the instance: it stays of its class, keeps its parameters and their names,
and is saved as before. What a rewrite has to remember lies in one attribute, `_flowgrpo`. The
transformer itself keeps the class of its pipeline, `_flowgrpo_family`, since families may share a
class of transformers.

    rewrite             where                    modules                    attributes added
    0  packed weights   quantize                 linear layers              their class
    1  positions        Family.positions         the position embedding     the family's
    2  attention        attention.pin            attention layers           processor, _flowgrpo
    3  compiled blocks  compiled.compile_blocks  blocks                     _compiled_call_impl
    4  modulation       modulation.install       silus, linears of norms    forward, _flowgrpo
    5  fused blocks     blocks.fuse              blocks and the last norm   forward
                                                 their attention layers     _flowgrpo
    6  LoRA products    lora.install             PEFT's linear layers       forward, _flowgrpo
    7  recomputation    recompute                transformer and blocks     diffusers' own
    8  parts of rows    split_forward.install    blocks, and what is        forward, _flowgrpo
                                                 beside them
    9  pieces           sharding.shard           blocks and transformer     their class, torch's own

`quantize` does 0 to a pipeline that was just loaded, and to its text encoders; what comes later
finds its layers as they are then. `rewrite` does 1 to 5 to the transformer. 6 belongs to the
adapters and comes with them (`adapters.add_adapter`), 7 to 9 to training (`load.load_policy`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import replace
from functools import partial

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from flowgrpo.config import ConfigError, PolicyConfig
from flowgrpo.distributed import sharding
from flowgrpo.policies import (
    attention,
    blocks,
    compiled,
    deterministic,
    lora,
    modulation,
    quantized,
    split_forward,
)
from flowgrpo.policies.family import Family, import_hook
from flowgrpo.policies.pipelines import Pipeline


def quantize(source: Pipeline, config: PolicyConfig, device: torch.device) -> Pipeline:
    """Pack the weights of a loaded pipeline as `config` says, on `device`, before it is placed.

    In the transformer these are the linear layers of its blocks. Those that scale and shift norms
    by the time get eight bits with nf4 too: they are computed once a rollout, and their error is in
    every token. In the text encoders these are all linear layers but one that would
    predict tokens.

    Returns:
        `source` with the quantizers' names and versions.
    """
    transformer, family = source.pipeline.transformer, source.family
    if config.quantize != "none":
        layers = {m for block in family.blocks_of(transformer) for m in block.modules()}
        by_time: set[nn.Module] = set()
        if family.modulation is not None:
            by_time |= {linear for _, linear in modulation.layers(transformer, family.modulation)}
        for chosen, quantizer in (
            (layers - by_time, config.quantize),
            (layers & by_time, quantized.MODULATION.get(config.quantize, config.quantize)),
        ):
            quantized.quantize_layers(transformer, chosen, quantizer, device, "policy.quantize")
        source = replace(source, quantizer=quantized.describe(config.quantize))
    if config.quantize_text != "none":
        for name, module in source.pipeline.components.items():
            if name.startswith("text_encoder") and isinstance(module, nn.Module):
                # Nobody asks for a next token.
                head = getattr(module, "get_output_embeddings", lambda: None)()
                layers = set(module.modules()) - {head}
                quantized.quantize_layers(
                    module, layers, config.quantize_text, device, "policy.quantize_text"
                )
        source = replace(source, text_quantizer=quantized.describe(config.quantize_text))
    return source


def rewrite(
    transformer: nn.Module,
    family: Family,
    config: PolicyConfig,
    latent_shape: tuple[int, ...],
    device: torch.device,
    dtype: torch.dtype,
) -> str:
    """Rewrite a loaded transformer for one image size, in place, before it has adapters.

    Returns:
        The name of the kernel that computes attention.
    """
    # 1. Position embeddings are cropped once, not copied out of their grid in each forward.
    if family.positions:
        import_hook(family.positions)(transformer, latent_shape)
    # 2. One kernel computes attention, with gradients and without. Before the fused blocks, which
    #    ask the layers' processors for it.
    kernel = attention.pin(transformer, family, config.attention, device, dtype)
    if config.compile:
        # 3. Each block is compiled, on its first call, with the adapters that it has by then.
        compiled.compile_blocks(family.blocks_of(transformer))
    elif family.modulation is not None:
        # 4. Norms take a row of a table in place of the time's embedding. Not in compiled blocks:
        #    each would have other columns of it, and so its own compilation.
        modulation.install(transformer, family.modulation)
    if config.fused:
        # 5. Blocks run by fused kernels; they call the norms' layers of 4. Never after 3:
        #    `PolicyConfig` refuses both.
        blocks.fuse(transformer, family)
    return kernel


def recompute(transformer: nn.Module, parts: split_forward.Parts | None = None) -> None:
    """Keep only the inputs of the transformer's blocks for the backward pass.

    parts: of `split`, if forwards may be split.
    """
    contexts = deterministic.checkpoint_contexts
    if parts is not None:
        contexts = partial(_both_contexts, contexts, parts.contexts)
    # Nothing in a block is random; and the state of a generator is read by waiting for the device.
    again = partial(
        checkpoint,
        use_reentrant=False,
        preserve_rng_state=False,
        context_fn=contexts,
    )
    try:
        transformer.enable_gradient_checkpointing(lambda module, *args: again(module, *args))
    except ValueError as error:
        raise ConfigError(
            f"policy.gradient_checkpointing is on, but {type(transformer).__name__} has none; "
            "turn it off."
        ) from error


Contexts = tuple[AbstractContextManager[None], AbstractContextManager[None]]


def _both_contexts(first: Callable[[], Contexts], second: Callable[[], Contexts]) -> Contexts:
    """Enter the contexts of both, for a forward and for its second run."""
    return tuple(_joined(*pair) for pair in zip(first(), second(), strict=True))


@contextmanager
def _joined(*contexts: AbstractContextManager[None]) -> Iterator[None]:
    with ExitStack() as stack:
        for context in contexts:
            stack.enter_context(context)
        yield


def split(transformer: nn.Module, family: Family, parts: split_forward.Parts) -> None:
    """Let the transformer's modules run in parts of a step's rows. After 5 and 6, whose forwards
    they call, and before 9."""
    rows = family.blocks_of(transformer)
    lists = {getattr(transformer, name) for name in family.blocks}
    others = []
    for child in transformer.children():
        if child not in lists:
            # What runs of a dictionary of modules are those in it.
            others += child.values() if isinstance(child, nn.ModuleDict) else [child]
    # What has no weights has nothing to say about a row that the number of rows could change.
    others = [m for m in others if any(True for _ in m.parameters())]
    split_forward.install([*rows, *others], parts)


def shard(
    transformer: nn.Module,
    family: Family,
    mesh: sharding.DeviceMesh,
    device: torch.device,
    dtype: torch.dtype,
    offload: bool,
) -> None:
    """Leave this process its pieces of the transformer's weights. The last rewrite: modules are of
    other classes then, and weights are whole only while their block runs.

    Args:
        device: of the computation.
        dtype: of the computation.
        offload: keep the pieces in host memory.
    """
    layers = lora.lora_layers(transformer)
    adapters = [p for p in transformer.parameters() if p.requires_grad] if layers else []
    for parameter in adapters:
        parameter.data = parameter.data.to(device)
    lora.merge_again(layers)
    compute = None if all(p.dtype == dtype for p in transformer.parameters()) else dtype
    if layers:
        # Frozen weights are of that type already.
        compute = None
    elif compute is not None and not any(p.requires_grad for p in transformer.parameters()):
        # A copy that is never trained needs no master.
        for parameter in transformer.parameters():
            parameter.data = parameter.data.to(compute)
        compute = None
    sharding.shard(
        transformer,
        family.blocks_of(transformer),
        mesh,
        compute=compute,
        offload=offload,
        replicated=adapters,
    )
