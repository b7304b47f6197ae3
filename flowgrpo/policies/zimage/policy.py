"""Z-Image and Z-Image-Turbo: ZImagePipeline, whose transformer takes lists of pictures and texts.

A sample is [16, height / 8, width / 8]. The transformer's time is 1 - sigma, and its output is the
negative of a velocity. It runs on a batch of one shape (forward.py), in which a row is what the
list path makes of it whatever stands beside it.

A text stands in the chat template of the tokenizer and is encoded by itself, by the last hidden
state but one of Qwen3. Its vectors, at most policy.max_sequence_length, are filled up with zeros to
a multiple of 32, one for all texts of a run, and `pooled` [K, L] is 1 for a vector of the text and
0 for padding.

sample.guidance_scale is s in u + s (c - u), as in every family. The pipeline counts from c instead,
c + g (c - u): its guidance_scale is s - 1, and its 0 is 1 here. policy.cfg_normalization and
policy.cfg_truncation are the pipeline's own arguments; without them the kernels combine the
velocities. A step beyond the truncation costs its second forward all the same.

Z-Image-Turbo is distilled and takes no guidance. Nothing in a pipeline's files tells it from
Z-Image, which has another shift and other weights, so it is known by its name: the Hub's, or that
of a folder which is called Z-Image-Turbo.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, final

import torch
import torch.nn.functional as F
from torch import Tensor

from flowgrpo.config import ConfigError, PolicyConfig
from flowgrpo.config.validation import require
from flowgrpo.policies import components, pipelines, text_cache, vae
from flowgrpo.policies.base import (
    Policy,
    check_list,
    check_steps,
    dynamic_shift,
    scheduler_sigmas,
)
from flowgrpo.policies.pipelines import Pipeline
from flowgrpo.policies.zimage.family import MAX_SEQUENCE_LENGTH
from flowgrpo.policies.zimage.forward import PATCH, BatchForward, whole
from flowgrpo.policies.zimage.guidance import guide
from flowgrpo.records import Conditioning

TEXT_COMPONENTS = ("text_encoder", "tokenizer")
"""Components of the pipeline that a text's embeddings depend on."""
RESOLUTION = 1024
"""Pixels on each side of an image where none are asked for, as in the pipeline."""
TURBO = re.compile(r"(?:^|[/\\]|--)z-image-turbo(?:[/\\]|$)", re.IGNORECASE)
"""In the name of a model: the Hub's, its folder in the Hub's cache, or a folder of that name."""


@final
class ZImagePolicy(Policy):
    """`Policy` of a ZImagePipeline."""

    def __init__(
        self,
        source: Pipeline,
        device: torch.device,
        config: PolicyConfig,
        encode: Callable[[Sequence[str]], Conditioning] | None,
    ) -> None:
        self.pipeline, self.name, self.dtype = source.pipeline, source.name, source.dtype
        self.device = device
        self._check_components(*(TEXT_COMPONENTS if encode is None else ()), "vae")
        names = (self.name, str(self.pipeline.name_or_path or ""))
        self.distilled = any(TURBO.search(name) for name in names)
        encoders = [self.pipeline.text_encoder]
        offload = config.offload_text_encoders
        pipelines.place(source, device, encoders if offload else ())
        vae.prepare(self.pipeline.vae, device, config.vae_slicing)
        self.transformer = self.pipeline.transformer
        self.scheduler = self.pipeline.scheduler
        self._set_size(config)
        self._limits = (config.cfg_normalization, config.cfg_truncation)
        self._texts = encode or text_cache.make_encoder(
            self._encode_one, encoders, source, TEXT_COMPONENTS, self._tokens, device, config
        )

    def _check_components(self, *needed: str) -> None:
        components.check_parts(self.pipeline, needed, self.name)
        pipeline, config = self.pipeline, self.pipeline.transformer.config
        require(
            not config.siglip_feat_dim,
            f"the transformer of policy.model {self.name!r} has siglip_feat_dim "
            f"{config.siglip_feat_dim}, but one that makes a picture of noise, time and text alone "
            "is expected; choose Z-Image or Z-Image-Turbo.",
        )
        patches = list(zip(config.all_patch_size, config.all_f_patch_size, strict=True))
        require(
            (PATCH, 1) in patches,
            f"the transformer of policy.model {self.name!r} has patches of "
            f"{', '.join(f'{size} pixels and {frames} frames' for size, frames in patches)}, but "
            f"{PATCH} pixels and 1 frame are expected, which the pipeline asks for; put back the "
            "one that the model was published with.",
        )
        factor = pipeline.vae_scale_factor
        components.check_vae(pipeline.vae, config.in_channels, factor, self.name)
        if set(TEXT_COMPONENTS) <= set(needed):
            self._check_text_encoder(config.cap_feat_dim)

    def _check_text_encoder(self, width: int) -> None:
        """Raise ConfigError unless the text encoder gives vectors of `width` numbers and knows the
        tokenizer's tokens, and the tokenizer has a chat template."""
        encoder, tokenizer = self.pipeline.text_encoder, self.pipeline.tokenizer
        config, kind = encoder.config.get_text_config(), type(encoder).__name__
        back = "put back the one that the model was published with."
        require(
            config.hidden_size == width,
            f"the text_encoder of policy.model {self.name!r} is a {kind} with hidden_size "
            f"{config.hidden_size}, but its transformer is made for {width}; {back}",
        )
        require(
            len(tokenizer) <= config.vocab_size,
            f"the tokenizer of policy.model {self.name!r} has {len(tokenizer)} tokens, but its "
            f"text_encoder knows {config.vocab_size}; {back}",
        )
        require(
            bool(getattr(tokenizer, "chat_template", None)),
            f"the tokenizer of policy.model {self.name!r} has no chat template, but one is "
            f"expected, in which each prompt stands; {back}",
        )

    def _set_size(self, config: PolicyConfig) -> None:
        """Set the image's size, the tokens of a text, and the forward for both."""
        model, factor = self.transformer.config, self.pipeline.vae_scale_factor
        side = PATCH * factor
        # The tables of positions end there.
        largest = side * min(model.axes_lens[1:])
        self.height, self.width = pipelines.check_size(config, RESOLUTION, side, largest, self.name)
        self.resolution = max(self.height, self.width)
        self._tokens = config.max_sequence_length or MAX_SEQUENCE_LENGTH
        self._length = whole(self._tokens)
        # A text's tokens are counted from 1, and the picture stands behind them.
        most = (model.axes_lens[0] - 2) // whole(1) * whole(1)
        require(
            self._length <= most,
            f"policy.max_sequence_length is {self._tokens}, but {self.name} has positions for "
            f"{most} tokens of a text at most; lower it.",
        )
        rows, columns = self.height // side, self.width // side
        self.latent_shape = (model.in_channels, PATCH * rows, PATCH * columns)
        self._forward = BatchForward(self.transformer, rows, columns, self._length, self.device)

    def encode_texts(self, texts: Sequence[str]) -> Conditioning:
        conditioning = self._texts(check_list(texts))
        shape, mask = list(conditioning.embeds.shape[1:]), list(conditioning.pooled.shape[1:])
        expected = [self._length, self.transformer.config.cap_feat_dim]
        if shape != expected or mask != expected[:1]:
            raise ConfigError(
                f"encode= returned embeds {shape} and pooled {mask} for each text, but {expected} "
                f"and {expected[:1]} are expected: {self._length} tokens "
                f"(policy.max_sequence_length, up to a multiple of {whole(1)}), and 1 for one of "
                "the text or 0 for padding; encode so."
            )
        return conditioning

    def check_texts(self, texts: Sequence[str]) -> None:
        """The tokenizer knows every text."""
        check_list(texts)

    def token_limits(self) -> list[tuple[Any, int]]:
        if not isinstance(self._texts, text_cache.TextEncoder):
            # The caller's own encoder, which the pipeline's tokenizer takes no part in.
            return []
        # The template takes its tokens of the length too.
        template = self.pipeline.tokenizer.apply_chat_template(
            [{"role": "user", "content": ""}], tokenize=False, add_generation_prompt=True
        )
        around = len(self.pipeline.tokenizer(template).input_ids)
        return [(self.pipeline.tokenizer, max(self._tokens - around, 0))]

    def _encode_one(self, text: str) -> Conditioning:
        (embeds,), _ = self.pipeline.encode_prompt(
            prompt=[text],
            device=self.device,
            do_classifier_free_guidance=False,
            max_sequence_length=self._tokens,
        )
        embeds = embeds[None].to(self.dtype)
        padding = self._length - embeds.shape[1]
        valid = embeds.new_ones(1, embeds.shape[1])
        return Conditioning(F.pad(embeds, (0, 0, 0, padding)), F.pad(valid, (0, padding)))

    def own_guide(self, sigma: Tensor) -> Callable[[Tensor, Tensor, float], Tensor] | None:
        normalization, truncation = self._limits
        if not normalization and truncation >= 1:
            return None
        return partial(
            guide,
            times=self._time(sigma),
            normalization=normalization,
            truncation=truncation,
        )

    def _velocity(self, sample: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        with self._forward.put_into(self.transformer), self._with_precomputed(conditioning):
            return -self.transformer(
                sample.to(self.dtype),
                self._time(sigma),
                conditioning.embeds,
                conditioning.pooled,
            )

    def _embed_time(self, sigma: Tensor, pooled: Tensor) -> Tensor:
        # The transformer's own first line.
        return self.transformer.t_embedder(self._time(sigma) * self.transformer.t_scale)

    def _time(self, sigma: Tensor) -> Tensor:
        """float32 [B], 1 - sigma, computed as the pipeline does from the scheduler's timestep."""
        return (1000 - sigma * self.scheduler.config.num_train_timesteps) / 1000

    def pixels(self, latents: Tensor) -> Tensor:
        return vae.decode(self.pipeline.vae, latents)

    def latents(self, pixels: Tensor) -> Tensor:
        return vae.encode(self.pipeline.vae, pixels)

    def sigmas(self, num_steps: int) -> Tensor:
        from diffusers.pipelines.z_image import pipeline_z_image

        num_steps, (_, height, width) = check_steps(num_steps), self.latent_shape
        tokens = (height // PATCH) * (width // PATCH)
        calculate = pipeline_z_image.calculate_shift
        return scheduler_sigmas(
            self.scheduler,
            num_steps,
            sigmas=pipeline_z_image.get_default_z_image_sigmas(num_steps),
            mu=dynamic_shift(calculate, self.scheduler.config, tokens, 1.15),
        )
