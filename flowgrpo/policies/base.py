"""What the trainer asks of a model.

A policy is a diffusers pipeline seen as three functions: `encode` texts, `velocity` of a sample at
a noise level, `decode` latents to images. Rollout, update, reference and evaluation all call the
same `velocity`, with the same weights and dtype, and no autocast: on the same rows in the same
batch geometry it returns the same bits with and without autograd, so the first ratio of an update
is 1.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flowgrpo.config import ConfigError, PolicyConfig
from flowgrpo.policies import compiled as policies_compiled
from flowgrpo.policies import lora, modulation, pipelines
from flowgrpo.policies.conditioning import Conditioning as Conditioning


@dataclass(frozen=True)
class Family:
    """What belongs to one pipeline class of diffusers."""

    policy: str
    """ "module:class" of its Policy."""
    transformer: str
    """Class of its transformer."""
    lora_targets: tuple[str, ...]
    """Name endings of the linear layers that get a LoRA matrix by default: flow_grpo's lists."""


_ATTENTION = (
    *("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"),
    *("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out"),
)

FAMILIES = {
    "StableDiffusion3Pipeline": Family(
        "flowgrpo.policies.sd3.policy:SD3Policy", "SD3Transformer2DModel", _ATTENTION
    ),
    # The q, k, v of the single blocks end like those of the double blocks and are among them; their
    # proj_mlp and proj_out are not.
    "FluxPipeline": Family(
        "flowgrpo.policies.flux.policy:FluxPolicy",
        "FluxTransformer2DModel",
        (*_ATTENTION, "ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2"),
    ),
}
"""Pipeline class in model_index.json -> what belongs to it."""

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


class Policy(ABC):
    """A flow-matching text-to-image model. Subclasses are final."""

    name: str
    """What the user called the model."""
    pipeline: object
    """The diffusers pipeline that it is made of."""
    transformer: nn.Module
    """What is trained; adapters are injected into it."""
    scheduler: object
    """The pipeline's FlowMatchEulerDiscreteScheduler."""
    device: torch.device
    dtype: torch.dtype
    """Of the frozen weights and of the velocity."""
    attention: str
    """Name of the kernel that computes attention, see policies/attention.py."""
    resolution: int
    """Pixels on each side of an image."""
    latent_shape: tuple[int, ...]
    """Of one sample: C, H, W, or N, C where the model works on packed tokens."""
    compiled: bool = False
    """Whether the transformer's blocks go through torch.compile, see policies/compiled.py."""
    fused: bool = False
    """Whether the blocks run with the kernels of policies/fused.py."""
    graphs: Any = None
    """capture.Graphs that rollouts and evaluations are replayed by; None: they are not captured."""
    _frozen: nn.Module | None = None

    @staticmethod
    def load(
        model: str | object,
        *,
        device: str | torch.device = "auto",
        dtype: str | torch.dtype = "auto",
        config: PolicyConfig | None = None,
        encode: Callable[[Sequence[str]], Conditioning] | None = None,
    ) -> Policy:
        """The policy for the diffusers pipeline in the folder or Hub repository `model`.

        "nano" is the embedded model. Device "auto" is cuda where there is one; dtype "auto" is
        bfloat16 where the device multiplies it in hardware, else float32. Of `config`, all but the
        adapter is used.

        `model` may also be a pipeline that is loaded already. It is taken over: its models are
        frozen, cast to `dtype` ("auto": the transformer's), moved to the device, and trained in
        place. Its text embeddings are not cached on disk, since their files are not known.

        `encode` takes the place of the text encoders, which the pipeline then need not have: texts
        -> Conditioning of as many rows, on the device and in the dtype of the policy.
        """
        device, config = choose_device(device), config or PolicyConfig()
        if isinstance(model, str):
            dtype, name = choose_dtype(dtype, device), model
            family, pipeline, folder = _loaded(model, dtype)
        else:
            family, folder = _family(model), None
            dtype = model.transformer.dtype if dtype == "auto" else choose_dtype(dtype, device)
            pipeline, name = pipelines.cast(model, dtype), str(model.name_or_path or family)
        module, _, cls = FAMILIES[family].policy.partition(":")
        make = getattr(import_module(module), cls)
        encode = None if encode is None else _checked(encode)
        policy = make(pipeline, folder, name, device, dtype, config, encode)
        from flowgrpo.policies import attention

        policy.attention = attention.pin(policy.transformer, config.attention, device, dtype)
        if config.compile:
            policies_compiled.compile_blocks(policy.transformer)
            policy.compiled = True
        else:
            modulation.install(policy.transformer)
        if config.fused:
            from flowgrpo.policies import blocks as policies_blocks

            policies_blocks.fuse(policy.transformer)
            policy.fused = True
        return policy

    @abstractmethod
    def encode(self, texts: Sequence[str]) -> Conditioning:
        """Embeddings of the texts, on the policy's device."""

    @abstractmethod
    def check_texts(self, texts: Sequence[str]) -> None:
        """Raise ConfigError for a text that the model cannot be given."""

    def velocity(self, sample: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        """Velocity [B, *latent_shape] in the policy's dtype, for float32 samples of that shape at
        float32 sigma [B]: the same bits with gradients and without."""
        if not self.compiled or torch.is_grad_enabled():
            return self._velocity(sample, sigma, conditioning)
        with policies_compiled.as_training_forward():
            return self._velocity(sample, sigma, conditioning).detach()

    @abstractmethod
    def _velocity(self, sample: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor: ...

    def why_not_precomputed(self) -> str | None:
        """Why each forward has to compute what `prepare` would; None: it does not."""
        if self.compiled:
            # Each block would have its own place in the table, and so its own compilation.
            return "policy.compile is on"
        return modulation.why_not(self.transformer)

    def describe(self) -> str:
        """Say how the forward is computed, for the reader of a run."""
        blocks = "compiled" if self.compiled else "fused" if self.fused else "diffusers'"
        why = self.why_not_precomputed()
        times = "once a rollout" if why is None else f"in every forward ({why})"
        return f"attention {self.attention}, blocks {blocks}, modulation {times}"

    @torch.no_grad()
    def prepare(self, conditioning: Conditioning, sigmas: Tensor) -> Conditioning:
        """`conditioning` with all that the transformer makes of it and of the times `sigmas`
        float32 [T+1] (the last of which no step starts from) alone: modulations and projected text.

        As it was, if it has them already, or if trained weights or adapters have a part in them.
        """
        if conditioning.prepared or self.why_not_precomputed():
            return conditioning
        steps, rows = len(sigmas) - 1, len(conditioning)
        sigma = sigmas[:-1].repeat_interleave(rows)
        embedded = self._embed_time(sigma, conditioning.pooled.repeat(steps, 1))
        return Conditioning(
            self.transformer.context_embedder(conditioning.embeds),
            conditioning.pooled,
            modulation.precompute(self.transformer, embedded).view(steps, rows, -1),
        )

    @abstractmethod
    def _embed_time(self, sigma: Tensor, pooled: Tensor) -> Tensor:
        """[R, D]: what the transformer makes of the time [R] and the pooled text [R, P]."""

    def _with_precomputed(self, conditioning: Conditioning) -> AbstractContextManager[None]:
        """Inside, the transformer takes from `conditioning` what `prepare` has put there."""
        if conditioning.table is not None:
            raise ValueError("conditioning: of all steps; take one by its at or rows_at")
        if conditioning.modulation is None:
            return nullcontext()
        return modulation.using(
            self.transformer,
            time_text_embed=conditioning.modulation,
            context_embedder=conditioning.embeds,
        )

    @abstractmethod
    def decode(self, latents: Tensor) -> Tensor:
        """uint8 images [B, 3, resolution, resolution] of latents [B, *latent_shape]."""

    @abstractmethod
    def sigmas(self, num_steps: int) -> Tensor:
        """float64 [num_steps + 1] from 1 to 0: the scheduler's own float32 values."""

    def keep_reference(self) -> None:
        """Keep a copy of the present weights as the reference, for training without adapters."""
        self._frozen = copy.deepcopy(self.transformer).requires_grad_(False)

    @contextmanager
    def reference(self) -> Iterator[None]:
        """Inside, `velocity` is that of the model before training."""
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
        with lora.switched_off(layers):
            yield

    def frozen_weights(self, fixed: bool = False) -> AbstractContextManager[None]:
        """Inside, no parameter changes, so what `velocity` makes of them alone is made once.

        With `graphs`, or if `fixed`, it lies in the same memory every time, and graphs recorded
        inside read it there. Graphs that enter `frozen_weights` themselves make it anew in each
        replay.
        """
        return lora.merged(lora.lora_layers(self.transformer), fixed or self.graphs is not None)

    def parameters(self) -> Iterator[nn.Parameter]:
        """The trained parameters."""
        return (p for p in self.transformer.parameters() if p.requires_grad)


def _loaded(model: str, dtype: torch.dtype) -> tuple[str, object, Path]:
    """(name of its class, pipeline, folder that it is from) of what `policy.model` names."""
    import diffusers

    source = model
    if model == "nano":
        from flowgrpo.nano import MODEL_DIR

        source = str(MODEL_DIR)
    family = pipelines.pipeline_class(source, model)
    if family not in FAMILIES:
        raise ConfigError(
            f"policy.model {model!r} is a {family}, but one of {', '.join(FAMILIES)} is "
            "expected; name such a pipeline."
        )
    return family, *pipelines.load_pipeline(getattr(diffusers, family), source, model, dtype)


def _family(pipeline: object) -> str:
    """The name in FAMILIES of a pipeline's class or of one that it inherits from."""
    for cls in type(pipeline).__mro__:
        if cls.__name__ in FAMILIES:
            return cls.__name__
    raise ConfigError(
        f"the model is a {type(pipeline).__name__}, but a name or one of {', '.join(FAMILIES)} is "
        "expected; give such a pipeline."
    )


def _checked(encode: Callable[[Sequence[str]], Conditioning]) -> Callable:
    """`encode` of a caller, with its results looked at: they come from outside."""

    def call(texts: Sequence[str]) -> Conditioning:
        found = encode(texts)
        if not isinstance(found, Conditioning):
            raise ConfigError(
                f"encode= returned a {type(found).__name__}, but a Conditioning is expected."
            )
        if len(found) != len(texts):
            raise ConfigError(
                f"encode= returned {len(found)} rows for {len(texts)} texts, but one row for each "
                "text is expected."
            )
        return found

    return call


def choose_device(device: str | torch.device) -> torch.device:
    """The torch device that "auto" or a name stands for."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(device)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(
            f"policy.device is {str(device)!r}, which cannot be used "
            f"({str(error).splitlines()[0][:160]}), but a device that torch sees is expected; use "
            "auto, cpu or cuda."
        ) from error
    return device


def choose_dtype(dtype: str | torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype that "auto" or a name stands for on this device."""
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype != "auto":
        return DTYPES[dtype]
    if device.type == "cuda":
        return torch.bfloat16
    # torch only has private names for these questions; a version without them gets float32.
    checks = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    fast = any(getattr(torch.cpu, name, bool)() for name in checks)
    return torch.bfloat16 if device.type == "cpu" and fast else torch.float32


def family_of(transformer: nn.Module) -> tuple[str, Family]:
    """(name of the pipeline class, family) of a transformer."""
    for name, family in FAMILIES.items():
        if any(cls.__name__ == family.transformer for cls in type(transformer).__mro__):
            return name, family
    raise TypeError(
        f"transformer is a {type(transformer).__name__}, but one of "
        f"{', '.join(f.transformer for f in FAMILIES.values())} is expected"
    )


def scheduler_sigmas(scheduler: object, num_steps: int, **arguments: object) -> Tensor:
    """float64 [num_steps + 1]: what `scheduler.set_timesteps(num_steps, **arguments)` leads to."""
    # A copy, because set_timesteps writes into the scheduler; the values stay on the host.
    scheduler = copy.deepcopy(scheduler)
    if "sigmas" in arguments:
        scheduler.set_timesteps(**arguments)
    else:
        scheduler.set_timesteps(num_steps, **arguments)
    return scheduler.sigmas.to("cpu", torch.float64)
