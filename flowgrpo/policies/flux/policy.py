"""FLUX.1: FluxPipeline, whose transformer works on packed latents.

A sample is [N, 64]: N = height / 16 x width / 16 tokens, each a 2 x 2 patch of 16 latent channels.
It stays packed from the initial noise to the last step, as in the pipeline itself, and is unpacked
for the VAE alone. Embeddings are those of diffusers' `encode_prompt`: T5's tokens and CLIP's pooled
vector.

FLUX.1-dev is guidance-distilled: it is told a guidance value beside the time. policy.
embedded_guidance is that value, 3.5 by default as in FluxPipeline and in flow_grpo's pickscore_flux
recipes. It is not classifier-free guidance, which sample.guidance_scale turns on here as well (the
pipeline's `true_cfg_scale`), at the price of a second forward. FLUX.1-schnell has no such input.

Deliberate departures from flow_grpo's FLUX scripts:

1. Latents stay float32 between the steps (flow_grpo rounds them to bfloat16 after it has computed
   their log-probability, so its first ratios differ from 1).
2. The time is handed over in float32 in rollout and update alike (flow_grpo's rollout rounds it to
   bfloat16 first, its update does not). In a 16-bit model the transformer rounds it to its dtype
   all the same, once; the pipeline rounds t before the division by 1000 as well.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flowgrpo.config import ConfigError, PolicyConfig
from flowgrpo.policies import components, pipelines, text_cache, vae
from flowgrpo.policies.base import (
    Policy,
    check_list,
    check_steps,
    dynamic_shift,
    scheduler_sigmas,
)
from flowgrpo.policies.flux.family import MAX_SEQUENCE_LENGTH
from flowgrpo.policies.pipelines import Pipeline
from flowgrpo.policies.rotary import Rotary
from flowgrpo.records import Conditioning

TEXT_COMPONENTS = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
"""Components of the pipeline that a text's embeddings depend on."""
PATCH = 2
"""Latent pixels on each side of a token."""


class FluxPolicy(Policy):
    """`Policy` of a FluxPipeline; that of a FluxKontextPipeline inherits from it."""

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
        encoders = [self.pipeline.text_encoder, self.pipeline.text_encoder_2]
        offload = config.offload_text_encoders
        pipelines.place(source, device, encoders if offload else ())
        vae.prepare(self.pipeline.vae, device, config.vae_slicing)
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
        self._guidance = None
        if self.transformer.config.guidance_embeds:
            self._guidance = torch.full([1], config.embedded_guidance, device=device)
        self._texts = encode or text_cache.make_encoder(
            self._encode_one, encoders, source, TEXT_COMPONENTS, self._length, device, config
        )

    def _check_components(self, *needed: str) -> None:
        components.check_parts(self.pipeline, needed, self.name)
        pipeline, config = self.pipeline, self.pipeline.transformer.config
        channels, factor = config.in_channels // PATCH**2, pipeline.vae_scale_factor
        components.check_vae(pipeline.vae, channels, factor, self.name)
        widths = (
            ("hidden_size", config.pooled_projection_dim),
            ("d_model", config.joint_attention_dim),
        )
        for number, width in enumerate(widths):
            if set(TEXT_COMPONENTS) <= set(needed):
                names = TEXT_COMPONENTS[number], TEXT_COMPONENTS[number + 2]
                components.check_text_encoder(pipeline, *names, [width], self.name)

    def _set_positions(self, factor: int) -> None:
        rows, columns = (side // (PATCH * factor) for side in (self.height, self.width))
        self.latent_shape = (rows * columns, self.transformer.config.in_channels)
        # In float32 and not, as in the pipeline, in the embeddings' dtype: bfloat16 has no 257.
        self._image_ids = self._positions_of(
            self.pipeline._prepare_latent_image_ids(1, rows, columns, self.device, torch.float32)
        )
        self._text_ids = torch.zeros(self._length, 3, device=self.device)
        # The rotary tables depend on the ids alone. The transformer would make them anew, by some
        # forty small kernels, in every forward.
        ids = torch.cat([self._text_ids, self._image_ids])
        self._rotary = Rotary(self.transformer.pos_embed(ids))

    def _positions_of(self, sample: Tensor) -> Tensor:
        """float32 [N, 3]: positions of all image tokens, given those of the sample's."""
        return sample

    def encode_texts(self, texts: Sequence[str]) -> Conditioning:
        conditioning = self._texts(check_list(texts))
        # The positions of the text are made once, for all prompts.
        tokens = conditioning.embeds.shape[1]
        if tokens != self._length:
            raise ConfigError(
                f"encode= returned embeds of {tokens} tokens, but {self._length} are expected "
                "(policy.max_sequence_length); encode with that length."
            )
        return conditioning

    def check_texts(self, texts: Sequence[str]) -> None:
        """Both tokenizers know every text."""
        check_list(texts)

    def token_limits(self) -> list[tuple[Any, int]]:
        if not isinstance(self._texts, text_cache.TextEncoder):
            # The caller's own encoder, which the pipeline's tokenizers take no part in.
            return []
        clip = self.pipeline.tokenizer
        return [(clip, clip.model_max_length), (self.pipeline.tokenizer_2, self._length)]

    def _encode_one(self, text: str) -> Conditioning:
        embeds, pooled, _ = self.pipeline.encode_prompt(
            prompt=[text],
            prompt_2=None,
            device=self.device,
            max_sequence_length=self._length,
        )
        return Conditioning(embeds.to(self.dtype), pooled.to(self.dtype))

    def _velocity(self, sample: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        guidance = self._guidance
        with self._rotary.put_into(self.transformer), self._with_precomputed(conditioning):
            return self.transformer(
                hidden_states=sample.to(self.dtype),
                timestep=self._timestep(sigma),
                guidance=None if guidance is None else guidance.expand(len(sample)),
                encoder_hidden_states=conditioning.embeds,
                pooled_projections=conditioning.pooled,
                txt_ids=self._text_ids,
                img_ids=self._image_ids,
                return_dict=False,
            )[0]

    def _embed_time(self, sigma: Tensor, pooled: Tensor) -> Tensor:
        # The transformer's own first lines.
        times = [self._timestep(sigma).to(self.dtype) * 1000]
        if self._guidance is not None:
            times.append(self._guidance.expand(len(sigma)).to(self.dtype) * 1000)
        return self.transformer.time_text_embed(*times, pooled)

    def _timestep(self, sigma: Tensor) -> Tensor:
        """The scheduler's timestep over 1000, which the transformer multiplies by 1000."""
        return sigma * self.scheduler.config.num_train_timesteps / 1000

    def pixels(self, latents: Tensor) -> Tensor:
        factor = self.pipeline.vae_scale_factor
        unpacked = self.pipeline._unpack_latents(latents, self.height, self.width, factor)
        return vae.decode(self.pipeline.vae, unpacked)

    def latents(self, pixels: Tensor) -> Tensor:
        unpacked = vae.encode(self.pipeline.vae, pixels)
        return self.pipeline._pack_latents(unpacked, *unpacked.shape)

    def sigmas(self, num_steps: int) -> Tensor:
        from diffusers.pipelines.flux.pipeline_flux import calculate_shift

        config = self.scheduler.config
        num_steps = check_steps(num_steps)
        arguments: dict[str, Any] = {
            "mu": dynamic_shift(calculate_shift, config, self.latent_shape[0], 1.15)
        }
        if not config.get("use_flow_sigmas", False):
            arguments["sigmas"] = np.linspace(1.0, 1 / num_steps, num_steps)
        return scheduler_sigmas(self.scheduler, num_steps, **arguments)
