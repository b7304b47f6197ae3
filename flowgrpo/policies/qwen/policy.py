"""Qwen-Image and Qwen-Image-2512: QwenImagePipeline, whose transformer works on packed latents.

A sample is [N, 64]: N = height / 16 x width / 16 tokens, each a 2 x 2 patch of 16 latent channels.
It stays packed from the initial noise to the last step, as in the pipeline itself, and is unpacked
for the VAE alone, which is one of videos and is given one frame.

A text stands in the pipeline's template and is encoded by itself; of its hidden states the
pipeline drops those of the template's head, 34 tokens. Here the rest, at most
policy.max_sequence_length vectors, is filled up with zeros to that length, and `pooled` [K, L] is 1
for a vector of the text and 0 for padding. Attention leaves the padding out, so that neither
length nor neighbours of a text change its velocity by more than rounding; and since the length is
one for all texts of a run, neighbours do not change a bit. The pipeline pads to the longest text of
its batch instead.

sample.guidance_scale is the pipeline's `true_cfg_scale`: guidance by a second forward, with each
token rescaled to the norm of the conditional velocity (guidance.py). The empty prompt is "", as in
the other families; the model's own example uses one space.

In a 16-bit model the transformer rounds the time to its dtype, once; the pipeline rounds t before
the division by 1000 as well.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, final

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from flowgrpo.config import ConfigError, PolicyConfig
from flowgrpo.config.validation import require
from flowgrpo.policies import components, pipelines, text_cache
from flowgrpo.policies.base import (
    Policy,
    check_list,
    check_steps,
    dynamic_shift,
    scheduler_sigmas,
)
from flowgrpo.policies.pipelines import Pipeline
from flowgrpo.policies.qwen.attention import additive_mask, real_tables
from flowgrpo.policies.qwen.family import MAX_SEQUENCE_LENGTH
from flowgrpo.policies.rotary import Rotary
from flowgrpo.records import Conditioning

TEXT_COMPONENTS = ("text_encoder", "tokenizer")
"""Components of the pipeline that a text's embeddings depend on."""
PATCH = 2
"""Latent pixels on each side of a token."""
FOREIGN = ("guidance_embeds", "zero_cond_t", "use_additional_t_cond", "use_layer3d_rope")
"""Flags of a transformer for guidance as an input, edited pictures or layers."""


@final
class QwenImagePolicy(Policy):
    """`Policy` of a QwenImagePipeline."""

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
        factor = self.pipeline.vae_scale_factor
        default = self.pipeline.default_sample_size * factor
        self.height, self.width = pipelines.check_size(
            config, default, PATCH * factor, None, self.name
        )
        self.resolution = max(self.height, self.width)
        self._length = config.max_sequence_length or MAX_SEQUENCE_LENGTH
        self._set_positions(factor)
        self._set_latent_scale()
        self._texts = encode or text_cache.make_encoder(
            self._encode_one, encoders, source, TEXT_COMPONENTS, self._length, device, config
        )

    def _check_components(self, *needed: str) -> None:
        components.check_parts(self.pipeline, needed, self.name)
        config = self.pipeline.transformer.config
        foreign = [name for name in FOREIGN if getattr(config, name, False)]
        require(
            not foreign,
            f"the transformer of policy.model {self.name!r} has {', '.join(foreign)}, but one that "
            "makes a picture of noise, time and text alone is expected; choose Qwen-Image or "
            "Qwen-Image-2512.",
        )
        self._check_vae(self.pipeline.vae, config.in_channels // PATCH**2)
        if set(TEXT_COMPONENTS) <= set(needed):
            self._check_text_encoder(config.joint_attention_dim)

    def _check_text_encoder(self, width: int) -> None:
        """Raise ConfigError unless the text encoder gives vectors of `width` numbers and knows the
        tokenizer's tokens."""
        encoder, tokens = self.pipeline.text_encoder, len(self.pipeline.tokenizer)
        # The sizes of the part that reads texts; the other one looks at pictures.
        config = encoder.config.get_text_config()
        back = "put back the one that the model was published with."
        require(
            config.hidden_size == width,
            f"the text_encoder of policy.model {self.name!r} is a {type(encoder).__name__} with "
            f"hidden_size {config.hidden_size}, but its transformer is made for {width}; {back}",
        )
        require(
            tokens <= config.vocab_size,
            f"the tokenizer of policy.model {self.name!r} has {tokens} tokens, but its "
            f"text_encoder knows {config.vocab_size}; {back}",
        )

    def _check_vae(self, vae: Any, channels: int) -> None:
        """Raise ConfigError unless `vae` decodes latents of `channels` channels to the size that
        the pipeline was made for."""
        config, factor = getattr(vae, "config", None), self.pipeline.vae_scale_factor
        subject = f"the vae of policy.model {self.name!r} is a {type(vae).__name__}"
        back = "put back the one that the model was published with."
        channels_found = getattr(config, "z_dim", None)
        require(
            channels_found == channels,
            f"{subject} with z_dim {channels_found}, but its transformer is made for {channels}; "
            f"{back}",
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
        enlarges = 2 ** len(config.temperal_downsample)
        require(
            enlarges == factor,
            f"{subject} that enlarges latents {enlarges} times, but the pipeline was made for "
            f"{factor} times; make the pipeline with it, or {back}",
        )

    def _set_positions(self, factor: int) -> None:
        rows, columns = (side // (PATCH * factor) for side in (self.height, self.width))
        self.latent_shape = (rows * columns, self.transformer.config.in_channels)
        self._image_sizes = [[(1, rows, columns)]]
        # The transformer would put them together anew in every forward.
        self._rotary = Rotary(
            real_tables(
                self.transformer.pos_embed(
                    self._image_sizes, max_txt_seq_len=self._length, device=self.device
                )
            )
        )

    def _set_latent_scale(self) -> None:
        config, shape = self.pipeline.vae.config, (1, -1, 1, 1, 1)
        values = (config.latents_mean, config.latents_std)
        self._mean, self._std = (torch.tensor(x, device=self.device).view(shape) for x in values)

    def encode_texts(self, texts: Sequence[str]) -> Conditioning:
        conditioning = self._texts(check_list(texts))
        tokens, mask = conditioning.embeds.shape[1], list(conditioning.pooled.shape[1:])
        if tokens != self._length or mask != [tokens]:
            raise ConfigError(
                f"encode= returned embeds of {tokens} tokens and pooled {mask} for each text, but "
                f"{self._length} tokens (policy.max_sequence_length) and {self._length} numbers "
                "are expected, 1 for a token of the text and 0 for padding; encode so."
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
        # No mask comes back: one text by itself has no padding.
        embeds, _ = self.pipeline.encode_prompt(
            prompt=[text], device=self.device, max_sequence_length=self._length
        )
        padding = self._length - embeds.shape[1]
        embeds = embeds.to(self.dtype)
        valid = embeds.new_ones(1, embeds.shape[1])
        return Conditioning(F.pad(embeds, (0, 0, 0, padding)), F.pad(valid, (0, padding)))

    def _velocity(self, sample: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        # Not as encoder_hidden_states_mask, from which the transformer computes lengths that it
        # has no use for, with numbers from host memory.
        mask = additive_mask(conditioning.pooled, sample.shape[1], self.dtype)
        with self._rotary.put_into(self.transformer), self._with_precomputed(conditioning):
            return self.transformer(
                hidden_states=sample.to(self.dtype),
                timestep=self._timestep(sigma),
                encoder_hidden_states=conditioning.embeds,
                img_shapes=self._image_sizes,
                attention_kwargs={"attention_mask": mask},
                return_dict=False,
            )[0]

    def _embed_time(self, sigma: Tensor, pooled: Tensor) -> Tensor:
        # The transformer's own first lines; of the second argument only the dtype is used.
        return self.transformer.time_text_embed(self._timestep(sigma).to(self.dtype), pooled)

    def _timestep(self, sigma: Tensor) -> Tensor:
        """The scheduler's timestep over 1000, which the transformer multiplies by 1000."""
        return sigma * self.scheduler.config.num_train_timesteps / 1000

    def pixels(self, latents: Tensor) -> Tensor:
        vae, factor = self.pipeline.vae, self.pipeline.vae_scale_factor
        unpacked = self.pipeline._unpack_latents(latents, self.height, self.width, factor)
        frames = vae.decode((unpacked * self._std + self._mean).to(vae.dtype), return_dict=False)[0]
        return frames[:, :, 0].float()

    def latents(self, pixels: Tensor) -> Tensor:
        vae = self.pipeline.vae
        frames = vae.encode(pixels[:, :, None].to(vae.dtype), return_dict=False)[0].mode().float()
        frames = (frames - self._mean) / self._std
        batch, channels, _, height, width = frames.shape
        return self.pipeline._pack_latents(frames.contiguous(), batch, channels, height, width)

    def sigmas(self, num_steps: int) -> Tensor:
        from diffusers.pipelines.qwenimage.pipeline_qwenimage import calculate_shift

        num_steps = check_steps(num_steps)
        mu = dynamic_shift(calculate_shift, self.scheduler.config, self.latent_shape[0], 1.15)
        sigmas = np.linspace(1.0, 1 / num_steps, num_steps)
        return scheduler_sigmas(self.scheduler, num_steps, sigmas=sigmas, mu=mu)
