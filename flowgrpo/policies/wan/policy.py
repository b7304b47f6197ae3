"""Wan 2.2 TI2V-5B, text to video: WanPipeline, whose transformer works on latents of a clip.

A sample is [C, f, h, w]: f = (frames - 1) / 4 + 1 latent frames, for the VAE makes one frame of the
first and four of each other, and h x w latent vectors of 16 x 16 pixels (8 x 8 in Wan2.1). A token
is 2 x 2 of these. What is decoded is a video [frames, 3, H, W].

TI2V-5B is also a model from an image to a video: its pipeline hands it a time for each token
(`expand_timesteps`), 0 where the first frame is given. Of a text alone all tokens have the one time
of the step, so here each row has one; the transformer's arithmetic is the same, without a
modulation [tokens, 6, D] in float32 for each row.

Texts are padded with zeros to policy.max_sequence_length vectors, 512 as in the pipeline, and the
model attends to all of them, padding too. sample.guidance_scale is classifier-free guidance by a
second forward, with the empty prompt, the pipeline's own default.

diffusers keeps the time's embedding, the norms and the modulation tables of this transformer in
float32 where it is loaded in 16 bits, and so do we. The scheduler is scheduler.py's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, final

import torch
from torch import Tensor

from flowgrpo.config import ConfigError, PolicyConfig
from flowgrpo.config.validation import require
from flowgrpo.policies import components, modulation, pipelines, text_cache
from flowgrpo.policies.base import Policy, check_list, scheduler_sigmas
from flowgrpo.policies.pipelines import Pipeline
from flowgrpo.policies.wan.family import MAX_SEQUENCE_LENGTH
from flowgrpo.policies.wan.sizes import FRAMES, HEIGHT, WIDTH
from flowgrpo.records import Conditioning

TEXT_COMPONENTS = ("text_encoder", "tokenizer")
"""Components of the pipeline that a text's embeddings depend on."""


@final
class WanPolicy(Policy):
    """`Policy` of a WanPipeline."""

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
        encoders = [self.pipeline.text_encoder]
        offload = config.offload_text_encoders
        pipelines.place(source, device, encoders if offload else ())
        if config.vae_slicing:
            self.pipeline.vae.enable_slicing()
        self.transformer = self.pipeline.transformer
        self.scheduler = self.pipeline.scheduler
        self._set_size(config)
        self._set_latent_scale()
        self._length = config.max_sequence_length or MAX_SEQUENCE_LENGTH
        self._texts = encode or text_cache.make_encoder(
            self._encode_one, encoders, source, TEXT_COMPONENTS, self._length, device, config
        )

    def _check_components(self, *needed: str) -> None:
        pipeline = self.pipeline
        components.check_parts(pipeline, needed, self.name)
        choose = "choose Wan2.2-TI2V-5B or Wan2.1-T2V."
        require(
            pipeline.transformer_2 is None and pipeline.config.boundary_ratio is None,
            f"policy.model {self.name!r} has two transformers, of which each denoises a part of "
            f"the steps (boundary_ratio {pipeline.config.boundary_ratio}), but one is expected; "
            f"{choose}",
        )
        config = pipeline.transformer.config
        require(
            config.image_dim is None and config.in_channels == config.out_channels,
            f"the transformer of policy.model {self.name!r} takes an image beside noise, time and "
            f"text (image_dim {config.image_dim}, in_channels {config.in_channels}, out_channels "
            f"{config.out_channels}), but one that makes a video of a text is expected; {choose}",
        )
        self._check_vae(pipeline.vae, config.in_channels)
        if set(TEXT_COMPONENTS) <= set(needed):
            widths = [("d_model", config.text_dim)]
            components.check_text_encoder(pipeline, *TEXT_COMPONENTS, widths, self.name)

    def _check_vae(self, vae: Any, channels: int) -> None:
        """Raise ConfigError unless `vae` decodes latents of `channels` channels to the size that
        the pipeline was made for."""
        config = getattr(vae, "config", None)
        subject = f"the vae of policy.model {self.name!r} is a {type(vae).__name__}"
        back = "put back the one that the model was published with."
        z_dim = getattr(config, "z_dim", None)
        require(
            z_dim == channels,
            f"{subject} with z_dim {z_dim}, but its transformer is made for {channels}; {back}",
        )
        for name in ("latents_mean", "latents_std"):
            values = list(getattr(config, name, None) or ())
            good = len(values) == channels and all(
                isinstance(x, int | float) and math.isfinite(x) for x in values
            )
            require(
                good and (name == "latents_mean" or min(values) > 0),
                f"{subject} with {name} {values}, but {channels} finite numbers"
                f"{' above 0' if name == 'latents_std' else ''} are expected; {back}",
            )
        spatial = 2 ** len(config.temperal_downsample) * (config.patch_size or 1)
        temporal = 2 ** sum(config.temperal_downsample)
        made_for = (
            self.pipeline.vae_scale_factor_spatial,
            self.pipeline.vae_scale_factor_temporal,
        )
        require(
            (spatial, temporal) == made_for,
            f"{subject} that enlarges latents {spatial} times in space and {temporal} times in "
            f"time, but the pipeline was made for {made_for[0]} and {made_for[1]} times; make the "
            f"pipeline with it, or {back}",
        )

    def _set_size(self, config: PolicyConfig) -> None:
        """Set frames, height, width and latent_shape, and the rotary tables of that size."""
        sizes, factor = self.transformer.config, self.pipeline.vae_scale_factor_spatial
        step = self.pipeline.vae_scale_factor_temporal
        _, patch, across = sizes.patch_size
        multiple = factor * math.lcm(patch, across)
        self.height, self.width = pipelines.check_size(
            config, (HEIGHT, WIDTH), multiple, sizes.rope_max_seq_len * multiple, self.name
        )
        self.resolution = max(self.height, self.width)
        self.frames = config.frames or FRAMES
        most = (sizes.rope_max_seq_len - 1) * step + 1
        near = min(max(round((self.frames - 1) / step), 0) * step + 1, most)
        require(
            self.frames == near,
            f"policy.frames is {self.frames}, but the VAE of {self.name} decodes {step}n + 1 "
            f"frames, and its transformer has positions for at most {most}; choose {near}, for "
            "example.",
        )
        self.latent_shape = (
            sizes.in_channels,
            (self.frames - 1) // step + 1,
            self.height // factor,
            self.width // factor,
        )
        # The transformer would put them together anew in every forward. Only the shape is read.
        tables = self.transformer.rope(torch.empty(1, *self.latent_shape, device="meta"))
        self._rotary = tuple(table.to(self.device) for table in tables)

    def _set_latent_scale(self) -> None:
        config, shape = self.pipeline.vae.config, (1, -1, 1, 1, 1)
        values = (config.latents_mean, config.latents_std)
        self._mean, self._std = (torch.tensor(x, device=self.device).view(shape) for x in values)

    def encode_texts(self, texts: Sequence[str]) -> Conditioning:
        conditioning = self._texts(check_list(texts))
        shape = list(conditioning.embeds.shape[1:])
        expected = [self._length, self.transformer.config.text_dim]
        if shape != expected:
            raise ConfigError(
                f"encode= returned embeds {shape} for each text, but {expected} are expected "
                "(policy.max_sequence_length vectors, filled up with zeros); encode so."
            )
        return conditioning

    def check_texts(self, texts: Sequence[str]) -> None:
        """The tokenizer knows every text."""
        check_list(texts)

    def token_limits(self) -> list[tuple[Any, int]]:
        if not isinstance(self._texts, text_cache.TextEncoder):
            # The caller's own encoder, which the pipeline's tokenizer takes no part in.
            return []
        return [(self.pipeline.tokenizer, self._length)]

    def _encode_one(self, text: str) -> Conditioning:
        embeds, _ = self.pipeline.encode_prompt(
            prompt=[text],
            do_classifier_free_guidance=False,
            max_sequence_length=self._length,
            device=self.device,
        )
        embeds = embeds.to(self.dtype)
        # The model has no use for a pooled text.
        return Conditioning(embeds, embeds.new_zeros(1, 1))

    def _velocity(self, sample: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        with modulation.using(self.transformer, rope=self._rotary):
            return self.transformer(
                hidden_states=sample.to(self.dtype),
                timestep=sigma * self.scheduler.config.num_train_timesteps,
                encoder_hidden_states=conditioning.embeds,
                return_dict=False,
            )[0]

    def pixels(self, latents: Tensor) -> Tensor:
        """float32 pixels [B, frames, 3, height, width], in [-1, 1]."""
        vae = self.pipeline.vae
        latents = (latents * self._std + self._mean).to(vae.dtype)
        return vae.decode(latents, return_dict=False)[0].transpose(1, 2).float()

    def latents(self, pixels: Tensor) -> Tensor:
        vae = self.pipeline.vae
        clips = pixels.transpose(1, 2).to(vae.dtype)
        latents = vae.encode(clips, return_dict=False)[0].mode().float()
        return ((latents - self._mean) / self._std).contiguous()

    def sigmas(self, num_steps: int) -> Tensor:
        return scheduler_sigmas(self.scheduler, num_steps)
