"""`Family`: all that belongs to the models of one pipeline class, as one record of hooks.

A hook is a value that is light to import, or a "module:name" that is imported when it is first
needed: neither the command line's help nor a memory plan may wait for torch. A hook that a family
has no use for keeps its default, and that technique is off for its models.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Literal

Json = Mapping[str, Any]


@dataclass(frozen=True)
class BlockKind:
    """Memory of one kind of transformer block, in bytes a token: (times width, times LoRA rank)."""

    stored: tuple[float, float]
    """Kept by autograd for the backward pass, in 16 bits; counted on two rows or more, since with
    one, image and text are split without a copy. Where query, key and value are slices of one
    product, all three stay if one does."""
    stored_fused: tuple[float, float]
    """Bytes with policy.fused: norms keep their input and two numbers a token, not what lies
    between LayerNorm, scale and shift; a gate keeps neither its product nor its residual."""
    image_attention: bool = False
    """No block by itself, but a second attention, of the image's tokens only, inside a block of
    another kind."""
    text_attention: bool = False
    """No block by itself, but what an attention over the text keeps of the text's tokens, inside a
    block of another kind, that works on the image's alone."""
    only: Literal["", "image", "text"] = ""
    """Tokens that the block works on; empty: those of image and text."""


@dataclass(frozen=True)
class Architecture:
    """The sizes of one model that its memory follows from."""

    parameters: int
    """Parameters of the transformer."""
    encoders: int
    """Parameters of all text encoders."""
    vae: int
    """Parameters of the VAE; 0: the latents are the pixels."""
    width: int
    """Numbers of a token."""
    blocks: tuple[tuple[BlockKind, int], ...]
    """Kinds of blocks and how many there are of each."""
    passing: float
    """Bytes a token, times the width, that one block has alive beside what is stored."""
    adapted: tuple[tuple[int, int], ...]
    """(in, out) of each linear layer that gets LoRA matrices by default."""
    tables: int = 0
    """Numbers of a table of positions that is no parameter and stays beside them; 0 where
    `parameters` has them."""
    packed: int = 0
    """Weights that policy.quantize packs: of the linear layers of the blocks, without those that
    modulate norms by the time."""
    modulating: int = 0
    """Weights of those, of which nf4 makes int8."""
    packed_largest: int = 0
    """Weights of the largest of these layers."""
    encoders_packed: int = 0
    """Weights that policy.quantize_text packs: of all linear layers of the text encoders."""
    pixels: int = 16
    """Pixels on a side of the square that one image token stands for."""
    channels: int = 16
    """Channels of a latent."""
    latent_pixels: int = 8
    """Pixels on a side of the square that one latent vector stands for."""
    fixed_tokens: int = 0
    """Text tokens beside those that policy.max_sequence_length counts."""
    text_tokens: int = 128
    """Text tokens where policy.max_sequence_length is 0."""
    resolution: int = 1024
    """Pixels on a side of an image where policy.resolution is 0."""
    size: tuple[int, int] | None = None
    """Its height and width where they differ."""
    references: int = 0
    """Images of the sample's size whose tokens stand beside the sample's, of a model that edits."""
    frames: int = 0
    """Frames of a video where policy.frames is 0; 0: it makes images."""
    frame_step: int = 4
    """Frames of a video that one frame of latents stands for, after the first."""
    decoder_width: int = 256
    """Channels that the VAE's decoder works on at full resolution."""
    decoder_maps: float = 4.0
    """Its maps of that size that are alive at a time. The default is three, and a fourth that is
    the copy that a GPU's group norm makes of a channels-last one."""


@dataclass(frozen=True)
class Sizes:
    """Sizes of a family's models, for the memory plan."""

    read: Callable[[Json, Json, int, int, int], Architecture | None]
    """(config.json of transformer and VAE, parameters of transformer, text encoders and VAE) -> the
    sizes, or None for a model that the plan has no figures for."""
    known: Mapping[str, Architecture]
    """Hub id -> sizes, for models that are not on this machine yet."""


@dataclass(frozen=True)
class Modulation:
    """Norms that scale and shift tokens by linear(silu(c)), c made of the time and the pooled text
    alone, see policies/modulation.py. By name, as the classes come with diffusers."""

    blocks: tuple[str, ...]
    """Classes of blocks that use c for their norms alone."""
    norms: tuple[str, ...]
    """Classes of those norms, of the one behind the last block too."""
    ends: tuple[str, ...] = ()
    """Classes behind the last block that have `layers` as the blocks do."""
    layers: tuple[str, ...] = ()
    """Attributes of the blocks that are silu and linear layer in sequence, or a linear layer alone,
    beside these norms; a block that lacks one is not modulated there."""
    time: str = "time_text_embed"
    """The transformer's module that makes c."""
    text: str = "context_embedder"
    """The transformer's module that projects the text tokens."""
    text_norm: str = ""
    """The transformer's norm in front of it; empty: there is none."""
    pooled: bool = True
    """False: c is made of the time alone, so that all prompts have one."""


@dataclass(frozen=True)
class Family:
    """The hooks of one pipeline class of diffusers."""

    pipeline: str
    """Class of the pipeline, `_class_name` in model_index.json."""
    transformer: str
    """Class of its transformer."""
    policy: str
    """ "module:class" of its `Policy`."""
    lora_targets: tuple[str, ...]
    """Name endings of the linear layers that get LoRA matrices by default."""
    library: str = "diffusers"
    """Module that both classes are imported from."""
    blocks: tuple[str, ...] = ("transformer_blocks",)
    """Attributes of the transformer that list its blocks, in the order of the forward pass."""
    last_norm: str = "norm_out"
    """The transformer's module with the norm behind the last block, by its name."""
    widths: str = ""
    """ "module:function" of (transformer) that returns the numbers of a token and of a head; empty:
    its `inner_dim`, and `attention_head_dim` of its configuration."""
    positions: str = ""
    """ "module:function" of (transformer, latent_shape) that fixes position embeddings to one image
    size; empty: they stay as they are."""
    attention_processors: str = ""
    """ "module:function" of (transformer) that gives its attention layers processors which take
    each kernel of policies/attention.py, `plain` too, and returns these layers; empty: diffusers'
    processors take its kernels as they are, but not `plain`."""
    masked_attention: bool = False
    """True: attention leaves the padding of texts out by a mask, which no flash kernel takes."""
    fixed_attention: bool = False
    """True: the transformer computes attention by a call of its own, so that policy.attention can
    choose no kernel."""
    modulation: Modulation | None = None
    """Norms whose modulation is computed once per rollout; None: in each forward."""
    fused_blocks: str = ""
    """ "module:table" of class of a block -> `blocks.FusedForward`; empty: no policy.fused."""
    sizes: Sizes | None = None
    """Sizes for the memory plan; None: a run prints no plan of its memory."""
    call_arguments: Callable[[Any], dict[str, Any]] | None = None
    """Arguments of the pipeline's call beside size and steps, for a `Config`, so that it samples as
    the evaluation did: guidance, text length. The model card shows them."""
    guide: str = ""
    """ "module:function" of (conditional velocity, unconditional velocity, guidance_scale) that
    returns the guided velocity in float32; empty: u + scale (c - u), inside the kernels."""
    limited_guidance: bool = False
    """True: policy.cfg_normalization and policy.cfg_truncation are arguments of the pipeline."""
    embedded_guidance: bool = False
    """True: the model is told policy.embedded_guidance beside the time."""
    scheduler: str = ""
    """ "module:function" of (scheduler, name of the model) that returns the
    FlowMatchEulerDiscreteScheduler which takes the place of the pipeline's own; empty: the pipeline
    has to have one."""
    frame_rate: int = 0
    """Frames a second that its videos, of policy.frames frames, are shown with; 0: a sample is an
    image."""
    edits: bool = False
    """True: its models edit an image, which each prompt comes with."""
    card_lines: tuple[str, ...] = ()
    """Lines of Python for the model card, between loading the pipeline as `pipe` and its call."""

    def load_class(self, name: str) -> Any:
        """Import the class `name`, the pipeline's or the transformer's."""
        return getattr(import_module(self.library), name)

    def blocks_of(self, transformer: Any) -> list[Any]:
        """List the transformer's blocks, in the order of the forward pass."""
        return [block for name in self.blocks for block in getattr(transformer, name)]

    def widths_of(self, transformer: Any) -> tuple[int, int]:
        """Numbers of a token, and of a head."""
        if self.widths:
            return import_hook(self.widths)(transformer)
        return transformer.inner_dim, transformer.config.attention_head_dim


def import_hook(hook: str) -> Any:
    """Import what a "module:name" of a record names."""
    module, _, name = hook.partition(":")
    return getattr(import_module(module), name)
