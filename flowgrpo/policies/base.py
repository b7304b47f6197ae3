"""`Policy`: the interface between the trainer and a model.

A policy is a diffusers pipeline seen as three functions: `encode` texts, `velocity` of a sample at
a noise level, `decode` latents to images. Rollout, update, reference and evaluation all call the
same `velocity`, with the same weights and dtype, and no autocast: on the same rows in the same
batch geometry it returns the same bits with and without autograd, so the first ratio of an update
is 1.
"""

from __future__ import annotations

import copy
import operator
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flowgrpo.config import ConfigError, PolicyConfig
from flowgrpo.config.validation import path_text
from flowgrpo.distributed.world import World
from flowgrpo.policies import lora, modulation, pipelines, split_forward, surgery, vae
from flowgrpo.policies.compiled import as_training_forward
from flowgrpo.policies.decoded import Decoded
from flowgrpo.policies.device import choose_device
from flowgrpo.policies.family import Family, import_hook
from flowgrpo.policies.text_cache import TextEncoder
from flowgrpo.records import Conditioning


class Policy(ABC):
    """A flow-matching text-to-image model. Subclasses are final.

    A subclass is made of (pipelines.Pipeline, device, PolicyConfig, encode or None). It places the
    pipeline's models and sets all fields below from `name` to `latent_shape` but `attention`. With
    run.eval_resolution a second one is made of the same pipeline, for images of another size.
    """

    family: Family
    """Record of the pipeline's class."""
    name: str
    """Folder, Hub id or name by which the user called the model."""
    pipeline: object
    """The diffusers pipeline that it is made of."""
    transformer: nn.Module
    """The network that is trained; adapters are injected into it."""
    scheduler: object
    """The pipeline's FlowMatchEulerDiscreteScheduler."""
    device: torch.device
    dtype: torch.dtype
    """Type of the frozen weights and of the velocity."""
    attention: str
    """Name of the kernel that computes attention, see policies/attention.py."""
    resolution: int
    """Pixels on each side of an image, on the longer one where they differ."""
    height: int = 0
    """Pixels of an image from top to bottom; `load` sets it to `resolution` where it is 0."""
    width: int = 0
    """Pixels of an image from left to right; `load` sets it to `resolution` where it is 0."""
    frames: int = 0
    """Frames of a video; 0: a sample is an image."""
    latent_shape: tuple[int, ...]
    """Shape of one sample: C, H, W, or N, C where the model works on packed tokens; of a video
    C, frames, H, W."""
    compiled: bool = False
    """True: the transformer's blocks go through torch.compile, see policies/compiled.py."""
    fused: bool = False
    """True: the blocks run with the kernels of policies/blocks.py."""
    quantizer: str = ""
    """Quantizer of the transformer's weights, such as "nf4 (bitsandbytes 0.50.2)", see
    policies/quantized.py; empty: none."""
    text_quantizer: str = ""
    """Quantizer of the text encoders' weights."""
    graphs: Any = None
    """cuda_graphs.Graphs that replay rollouts and evaluations; None: they are not captured."""
    custom_encode: bool = False
    """True: a function of the caller's embeds the texts."""
    distilled: bool = False
    """True: the model is distilled to a few steps without guidance, and is given none."""
    decoded: Decoded
    """Figures of the latents and pixels that `decode` has seen."""
    sharded: bool = False
    """True: this process has a piece of the transformer's weights (`shard`), so that a forward is
    one of all processes."""
    parts: split_forward.Parts | None = None
    """How forwards of several steps are split (`split`); None: they are not."""
    _texts: Callable[[Sequence[str]], Conditioning] | None = None
    """Function that embeds the texts; None: `encode` itself does."""
    _source: pipelines.Pipeline
    _encode: Callable[[Sequence[str]], Conditioning] | None = None
    _other_size: Policy | None = None
    _frozen: nn.Module | None = None
    _teacher: nn.Module | None = None

    @staticmethod
    def load(
        model: str | Path | object,
        *,
        device: str | torch.device = "auto",
        dtype: str | torch.dtype = "auto",
        config: PolicyConfig | None = None,
        encode: Callable[[Sequence[str]], Conditioning] | None = None,
        masters: bool = False,
        on_host: bool = False,
    ) -> Policy:
        """Load the diffusers pipeline in the folder or Hub repository `model` as a policy.

        "nano" and "nano_text" are embedded models. Device "auto" is cuda where there is one; dtype
        "auto" is bfloat16 where the device multiplies it in hardware, else float32; bf16, fp16 and
        fp32 are short names. Of `config`, all but the adapter is used.

        `model` may also be a pipeline that is loaded already. It is taken over: its models are
        frozen, cast to `dtype` ("auto": the transformer's), moved to the device, and trained in
        place. Its text embeddings are not cached on disk, since their files are not known.

        `encode` takes the place of the text encoders, which the pipeline then need not have: texts
        -> Conditioning of as many rows, on the device and in the dtype of the policy.

        `masters` and `on_host` are for a transformer that `shard` comes to: its weights are float32
        whatever `dtype` is, and stay in host memory till then.
        """
        device, config, model = choose_device(device), config or PolicyConfig(), path_text(model)
        if isinstance(model, str):
            source = pipelines.load(model, dtype, device, config.variant, masters)
        else:
            source = pipelines.adopt(model, dtype, device, masters)
        source = replace(source, on_host=on_host)
        _check_limits(source, config)
        source = surgery.quantize(source, config, device)
        encode = None if encode is None else _checked(encode, source)
        policy = Policy._of(source, device, config, encode)
        policy.attention = surgery.rewrite(
            policy.transformer, policy.family, config, policy.latent_shape, device, policy.dtype
        )
        return policy

    @staticmethod
    def _of(
        source: pipelines.Pipeline,
        device: torch.device,
        config: PolicyConfig,
        encode: Callable[[Sequence[str]], Conditioning] | None,
    ) -> Policy:
        """Make a policy of a loaded pipeline, whose transformer is as it was loaded."""
        policy = import_hook(source.family.policy)(source, device, config, encode)
        policy._source, policy._encode = source, encode
        policy.family, policy.compiled = source.family, config.compile
        # Families may share a class of transformers.
        policy.transformer._flowgrpo_family = source.family.pipeline
        policy.fused, policy.decoded = config.fused, Decoded()
        policy.quantizer, policy.text_quantizer = source.quantizer, source.text_quantizer
        policy.custom_encode = encode is not None
        policy.height = policy.height or policy.resolution
        policy.width = policy.width or policy.resolution
        for side in ("height", "width"):
            asked, pixels = getattr(config, side), getattr(policy, side)
            if asked not in (0, pixels):
                raise ConfigError(
                    f"policy.{side} is {asked}, but {policy.name} makes images of {policy.width} x "
                    f"{policy.height} pixels alone; leave policy.{side} at 0."
                )
        if config.frames and not policy.family.frame_rate:
            raise ConfigError(
                f"policy.frames is {config.frames}, but {policy.name} makes images, not videos; "
                "leave policy.frames at 0."
            )
        return policy

    def add_evaluated_size(self, config: PolicyConfig) -> None:
        """Prepare `evaluated`, of the size that `config` states. To be called before there are
        adapters.

        Raises:
            ConfigError: the model makes no images of that size.
        """
        try:
            other = self._of(self._source, self.device, config, self._encode)
        except ConfigError as error:
            # The size is all that is new.
            text = str(error).replace("policy.resolution", "run.eval_resolution")
            raise ConfigError(text) from error
        if other.resolution != config.resolution:
            raise ConfigError(
                f"run.eval_resolution is {config.resolution}, but {self.name} makes images of "
                f"{self.width} x {self.height} pixels alone; leave it at 0."
            )
        other.attention = self.attention
        if (other.height, other.width) != (self.height, self.width):
            self._other_size = other

    @property
    def evaluated(self) -> Policy:
        """The policy that evaluations sample with: this one, or one of the same weights for images
        of run.eval_resolution. What is done to its modules is done to this one's."""
        other = self._other_size
        if other is None:
            return self
        # What has come since it was made.
        other._frozen, other.parts, other.sharded = self._frozen, self.parts, self.sharded
        return other

    def encode(
        self, texts: Sequence[str], *, images: Sequence[str | None] | None = None
    ) -> Conditioning:
        """Embeddings of the texts and, of a model that edits, reference latents of the images, on
        the policy's device.

        Args:
            texts: K texts; TypeError for a text alone.
            images: paths of K images, for a model that edits.

        Raises:
            ConfigError: the model edits and an image is absent or cannot be read, or it does not
                edit and there is one.
        """
        self.check_images(images)
        conditioning = self.encode_texts(texts)
        if not self.family.edits:
            return conditioning
        if len(images) != len(conditioning):
            raise ValueError(
                f"images has {len(images)} paths for {len(conditioning)} texts, but one for each "
                "text is expected"
            )
        # Each by itself, as texts are, and equal ones once.
        unique = {path: self._reference_latents(path) for path in dict.fromkeys(images)}
        return replace(conditioning, reference=torch.cat([unique[path] for path in images]))

    @abstractmethod
    def encode_texts(self, texts: Sequence[str]) -> Conditioning:
        """Embeddings of the texts, on the policy's device; TypeError for a text alone."""

    def check_images(self, images: Sequence[str | None] | None) -> None:
        """Raise ConfigError unless prompts with these images are such as the model takes."""
        absent = [number for number, path in enumerate(images or [None]) if path is None]
        if self.family.edits and absent:
            raise ConfigError(
                f"{self.name} edits images, but prompt {absent[0] + 1} comes without one; give its "
                'line in the JSONL file an "image" (a path relative to the file), or flowgrpo '
                "sample an --image."
            )
        paths = [path for path in images or () if path is not None]
        if paths and not self.family.edits:
            raise ConfigError(
                f"a prompt comes with the image {paths[0]!r}, but {self.name} makes images of "
                "texts alone; leave the images out, or choose a model that edits."
            )

    def _reference_latents(self, path: str) -> Tensor:
        """[1, R, C]: packed latents of the image in the file `path`, in the policy's dtype. A
        family that `edits` implements it."""
        raise NotImplementedError(f"{type(self).__name__}: its family edits images")

    def encode_empty(self, guidance_scale: float) -> Conditioning | None:
        """Embed the empty prompt, for guidance of this scale; None at 1, which is none.

        Raises:
            ConfigError: the model takes no guidance.
        """
        if guidance_scale == 1:
            return None
        if self.distilled:
            raise ConfigError(
                f"the guidance scale is {guidance_scale:g}, but {self.name} is distilled and takes "
                "no guidance; set it to 1 (sample.guidance_scale, run.eval_guidance, --cfg, "
                "--guidance), or choose the model that it was distilled from."
            )
        return self.encode_texts([""])

    def encode_shares(
        self, texts: Sequence[str], world: World, images: Sequence[str | None] | None = None
    ) -> Conditioning:
        """Embeddings of the texts and reference latents of the images, of which each process
        encodes a share and gets the others': the bits of `encode`. A collective.

        Where a row could depend on the texts beside it, each process encodes all."""
        if world.size == 1 or not isinstance(self._texts, TextEncoder):
            return self.encode(texts, images=images)
        count = -(-len(texts) // world.size)
        share = slice(count * world.rank, count * (world.rank + 1))
        own_rows = len(texts[share])
        # A process without a text encodes the first, for its shape, and drops it.
        share = share if own_rows else slice(1)
        rows = self.encode(texts[share], images=None if images is None else images[share])
        tensors = {"embeds": rows.embeds, "pooled": rows.pooled, "reference": rows.reference}
        return Conditioning(
            **{
                name: torch.cat(world.all_rows(tensor[:own_rows]))
                for name, tensor in tensors.items()
                if tensor is not None
            }
        )

    @abstractmethod
    def check_texts(self, texts: Sequence[str]) -> None:
        """Raise ConfigError for a text that the model cannot be given."""

    def token_limits(self) -> list[tuple[Any, int]]:
        """List the tokenizers that texts go through, each with the tokens after which it cuts."""
        return []

    def velocity(
        self, sample: Tensor, sigma: Tensor, conditioning: Conditioning, halves: int = 1
    ) -> Tensor:
        """Velocity [B, *latent_shape] in the policy's dtype, for float32 samples of that shape at
        float32 sigma [B]: the same bits with gradients and without.

        halves: 2 for rows that are twice those of a step, as under guidance; see `in_parts`.
        """
        with split_forward.rows(self.parts, len(sample), halves):
            return self._velocity_of(sample, sigma, conditioning)

    def _velocity_of(self, sample: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        if not self.compiled or torch.is_grad_enabled():
            return self._velocity(sample, sigma, conditioning)
        with as_training_forward():
            return self._velocity(sample, sigma, conditioning).detach()

    @abstractmethod
    def _velocity(self, sample: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor: ...

    def why_not_precomputed(self) -> str | None:
        """Reason why each forward computes what `prepare` would; None: it does not."""
        if self.compiled:
            return "policy.compile is on"
        if self.sharded:
            return "run.parallel is fsdp"
        return modulation.why_not(self.transformer, self.family)

    def describe(self) -> str:
        """Say how the forward is computed, for the reader of a run."""
        blocks = "compiled" if self.compiled else "fused" if self.fused else "diffusers'"
        why = self.why_not_precomputed()
        times = "once a rollout" if why is None else f"in every forward ({why})"
        packed = f", weights {self.quantizer}" if self.quantizer else ""
        return f"attention {self.attention}, blocks {blocks}, modulation {times}{packed}"

    @torch.no_grad()
    def prepare(self, conditioning: Conditioning, sigmas: Tensor) -> Conditioning:
        """Add to `conditioning` all that the transformer makes of it and of the times `sigmas`
        float32 [T+1] (the last of which no step starts from) alone: modulations and projected text.

        It is returned as it was if it has them already, or if they depend on trained weights.
        """
        if conditioning.prepared or self.why_not_precomputed():
            return conditioning
        names, (steps, rows) = self.family.modulation, (len(sigmas) - 1, len(conditioning))
        # One row for all prompts, where theirs would be equal.
        prompts = rows if names.pooled else 1
        sigma, pooled = sigmas[:-1].repeat_interleave(prompts), conditioning.pooled[:prompts]
        embedded = self._embed_time(sigma, pooled.repeat(steps, 1))
        table = modulation.precompute(self.transformer, names, embedded).view(steps, prompts, -1)
        embeds = conditioning.embeds
        for name in filter(None, (names.text_norm, names.text)):
            embeds = getattr(self.transformer, name)(embeds)
        return replace(conditioning, embeds=embeds, table=table.expand(-1, rows, -1))

    def _embed_time(self, sigma: Tensor, pooled: Tensor) -> Tensor:
        """[R, D]: the transformer's embedding of the time [R] and the pooled text [R, P], which
        modulates its blocks. A family with `modulation` implements it."""
        raise NotImplementedError(f"{type(self).__name__}: its family has a modulation")

    def _with_precomputed(self, conditioning: Conditioning) -> AbstractContextManager[None]:
        """Let the transformer take, inside, the values of `conditioning` that `prepare` made."""
        if conditioning.table is not None:
            raise ValueError("conditioning: of all steps; take one by its at or rows_at")
        if conditioning.modulation is None:
            return nullcontext()
        names = self.family.modulation
        values = {names.time: conditioning.modulation, names.text: conditioning.embeds}
        if names.text_norm:
            values[names.text_norm] = conditioning.embeds
        return modulation.using(self.transformer, **values)

    def own_guide(self, sigma: Tensor) -> Callable[[Tensor, Tensor, float], Tensor] | None:
        """Function of conditional and unconditional velocity [B, *latent_shape] and the scale that
        guides at the noise levels sigma [B] in a way of the model's own, in float32; None: the
        kernels do."""
        return import_hook(self.family.guide) if self.family.guide else None

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """uint8 images [B, 3, height, width], or videos [B, frames, 3, height, width], of latents
        [B, *latent_shape]; figures of both go to `decoded`."""
        pixels = self.pixels(latents)
        self.decoded.add(latents, pixels)
        return vae.to_images(pixels)

    @abstractmethod
    def pixels(self, latents: Tensor) -> Tensor:
        """float32 pixels [B, 3, height, width], about [-1, 1], of latents
        [B, *latent_shape]; of videos [B, frames, 3, height, width]."""

    @torch.no_grad()
    def encode_images(self, images: Tensor) -> Tensor:
        """float32 latents [B, *latent_shape] of uint8 images [B, 3, height, width], or of videos
        [B, frames, 3, height, width], on the policy's device: what `decode` makes these of."""
        return self.latents(vae.to_pixels(images.to(self.device)))

    @abstractmethod
    def latents(self, pixels: Tensor) -> Tensor:
        """float32 latents [B, *latent_shape] of float32 pixels [B, 3, height, width] in [-1, 1]; of
        videos [B, frames, 3, height, width]."""

    @property
    def image_shape(self) -> tuple[int, ...]:
        """Shape of what `decode` makes of one sample: 3, H, W, or of a video frames, 3, H, W."""
        frames = (self.frames,) if self.family.frame_rate else ()
        return (*frames, 3, self.height, self.width)

    def blank_image(self) -> Tensor:
        """Make a black image, or a black video, as `decode` returns them, uint8."""
        return torch.zeros(self.image_shape, dtype=torch.uint8, device=self.device)

    @abstractmethod
    def sigmas(self, num_steps: int) -> Tensor:
        """float64 [num_steps + 1] from 1 to 0: the scheduler's own float32 values."""

    def keep_reference(self) -> None:
        """Keep a copy of the present weights as the reference, for training without adapters."""
        self._frozen = copy.deepcopy(self.transformer).requires_grad_(False)

    @contextmanager
    def reference(self) -> Iterator[None]:
        """Let `velocity`, inside, be that of the model before training: with the adapter that
        training started from, if it did (policy.init_adapter), and else without."""
        if self._frozen is not None:
            trained, self.transformer = self.transformer, self._frozen
            try:
                yield
            finally:
                self.transformer = trained
            return
        layers = lora.lora_layers(self.transformer)
        if not layers:
            raise RuntimeError(
                "the policy has neither adapters nor a kept reference; add adapters, or call "
                "keep_reference() before training."
            )
        initial = lora.has_initial(layers)
        with lora.initial_adapters(layers) if initial else lora.disable_adapters(layers):
            yield

    def keep_teacher(self, transformer: nn.Module) -> None:
        """Keep a transformer of this model's shapes, for `teacher`."""
        self._teacher = transformer.requires_grad_(False)

    @contextmanager
    def teacher(self) -> Iterator[None]:
        """Let `velocity`, inside, be that of the transformer of `keep_teacher`."""
        if self._teacher is None:
            raise RuntimeError("the policy has no teacher; call keep_teacher() first.")
        trained, self.transformer = self.transformer, self._teacher
        try:
            yield
        finally:
            self.transformer = trained

    def shard(self, mesh: Any, offload: bool = False) -> None:
        """Leave this process a piece of the weights of the transformer, and of the copy that is the
        reference, see distributed/sharding.py. With adapters these stay whole everywhere.

        Args:
            mesh: of `sharding.make_mesh`.
            offload: keep the pieces in host memory.
        """
        for model in filter(None, (self.transformer, self._frozen)):
            surgery.shard(model, self.family, mesh, self.device, self.dtype, offload)
        self.sharded = True

    def split(self) -> None:
        """Prepare the transformer, and the copy that is the reference, for `in_parts`."""
        self.parts = split_forward.Parts()
        for model in filter(None, (self.transformer, self._frozen)):
            surgery.split(model, self.family, self.parts)

    def in_parts(self, count: int) -> AbstractContextManager[None]:
        """Compute velocities of `count` steps, inside, as `count` velocities of one step each, to
        their bits, if `split` has been called: each module runs once for each step."""
        return nullcontext() if self.parts is None else self.parts.of(count)

    def frozen_weights(self, fixed: bool = False) -> AbstractContextManager[None]:
        """Merge the adapters' matrices once for all velocities inside: no parameter may change.

        With `graphs`, or if `fixed`, they lie in the same memory every time, and graphs recorded
        inside read them there. Graphs that enter `frozen_weights` themselves merge them anew in
        each replay.
        """
        if self.sharded:
            # They would be a copy of all weights; blocks merge while they have theirs.
            return nullcontext()
        layers = lora.lora_layers(self.transformer)
        return lora.merged_matrices(layers, fixed or self.graphs is not None)

    def parameters(self) -> Iterator[nn.Parameter]:
        """The trained parameters."""
        return (p for p in self.transformer.parameters() if p.requires_grad)


def _check_limits(source: pipelines.Pipeline, config: PolicyConfig) -> None:
    """Raise ConfigError for limits of guidance that the model's pipeline does not know."""
    limits = {"cfg_normalization": 0, "cfg_truncation": 1}
    for name, none in limits.items():
        if getattr(config, name) != none and not source.family.limited_guidance:
            raise ConfigError(
                f"policy.{name} is {getattr(config, name):g}, but the guidance of a "
                f"{source.family.pipeline} has no such limit; leave it at {none}."
            )


def check_list(texts: Sequence[str]) -> list[str]:
    """List the texts that `encode` or `check_texts` was called with.

    Raises:
        TypeError: a text stands alone, which would be taken letter by letter, or one is no text.
        ValueError: there are none.
    """
    if isinstance(texts, str | bytes) or not isinstance(texts, Iterable):
        raise TypeError(
            f"texts is a {type(texts).__name__}, but a list of texts is expected; write, for "
            "example, ['a red cat']"
        )
    texts = list(texts)
    for text in texts:
        if not isinstance(text, str):
            raise TypeError(f"texts has a {type(text).__name__} in it, but texts are expected")
    if not texts:
        raise ValueError("texts is empty, but one text or more are expected")
    return texts


def _checked(
    encode: Callable[[Sequence[str]], Conditioning], source: pipelines.Pipeline
) -> Callable:
    """Wrap a caller's `encode` so that its results are checked: they come from outside."""
    sizes = source.pipeline.transformer.config
    widths = {
        "embeds": getattr(sizes, "joint_attention_dim", None),
        "pooled": getattr(sizes, "pooled_projection_dim", None),
    }

    def call(texts: Sequence[str]) -> Conditioning:
        conditioning = encode(texts)
        if not isinstance(conditioning, Conditioning):
            raise ConfigError(
                f"encode= returned a {type(conditioning).__name__}, but a Conditioning is expected."
            )
        if len(conditioning) != len(texts):
            raise ConfigError(
                f"encode= returned {len(conditioning)} rows for {len(texts)} texts, but one row "
                "for each text is expected."
            )
        for name, width in widths.items():
            tensor = getattr(conditioning, name)
            if tensor.dtype != source.dtype or tensor.shape[-1] != (width or tensor.shape[-1]):
                raise ConfigError(
                    f"encode= returned {name} {list(tensor.shape)} of {tensor.dtype}, but rows of "
                    f"{width} numbers of {source.dtype} are expected; encode as the model's own "
                    "text encoders do."
                )
        return conditioning

    return call


def dynamic_shift(
    calculate: Callable[..., float], config: Mapping[str, Any], tokens: int, largest: float
) -> float:
    """Compute mu, the shift of sigmas that grows with the number of image tokens.

    Args:
        calculate: the pipeline's own `calculate_shift`.
        config: of the scheduler.
        largest: its max_shift where the configuration has none.

    Raises:
        ConfigError: the numbers of tokens between which it grows are equal.
    """
    low, high = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    try:
        shifts = config.get("base_shift", 0.5), config.get("max_shift", largest)
        return calculate(tokens, low, high, *shifts)
    except ZeroDivisionError as error:
        raise ConfigError(
            f"the model's scheduler has {low} as its base_image_seq_len and {high} as its "
            "max_image_seq_len, but two different numbers are expected; correct its configuration "
            "in scheduler/scheduler_config.json."
        ) from error


def check_steps(num_steps: int) -> int:
    """Return the number of a sampler's steps as an int.

    Raises:
        ConfigError: it is no whole number above 0.
    """
    try:
        steps = operator.index(num_steps)
    except TypeError:
        steps = 0
    if steps < 1:
        raise ConfigError(
            f"num_steps is {num_steps!r}, but a whole number of at least 1 is expected; raise it."
        )
    return steps


def scheduler_sigmas(scheduler: object, num_steps: int, **arguments: object) -> Tensor:
    """float64 [num_steps + 1]: sigmas after `scheduler.set_timesteps(num_steps, **arguments)`.

    Raises:
        ConfigError: they do not fall from at most 1 to 0.
    """
    num_steps = check_steps(num_steps)
    # A copy, because set_timesteps writes into the scheduler; the values stay on the host.
    scheduler = copy.deepcopy(scheduler)
    if "sigmas" in arguments:
        scheduler.set_timesteps(**arguments)
    else:
        scheduler.set_timesteps(num_steps, **arguments)
    sigmas = scheduler.sigmas.to("cpu", torch.float64)
    # Rounding may put the first a little above 1. Written so that NaN fails it as well.
    falling = bool((sigmas.diff() < 0).all()) and sigmas[0] <= 1 + 1e-6 and sigmas[-1] == 0
    if len(sigmas) != num_steps + 1 or not falling:
        raise ConfigError(
            f"the model's {type(scheduler).__name__} gives {len(sigmas)} sigmas for {num_steps} "
            f"steps, {_first(sigmas)}, but {num_steps + 1} that fall from at most 1 to 0 are "
            "expected; choose another number of steps, or correct its configuration in "
            "scheduler/scheduler_config.json."
        )
    return sigmas


def _first(values: Tensor, count: int = 4) -> str:
    """Write the first values and, if they are not all, the last."""
    texts = [f"{value:g}" for value in values.tolist()]
    return ", ".join(texts if len(texts) <= count + 1 else [*texts[:count], "...", texts[-1]])
