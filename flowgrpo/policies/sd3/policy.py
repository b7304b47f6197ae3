"""Stable Diffusion 3 and 3.5, and pipelines of their class without VAE or with one text encoder.

With two CLIP encoders, and T5 or none, the embeddings are those of diffusers' own `encode_prompt`;
without T5 the places of its tokens hold zeros there. With one CLIP encoder alone, a prompt's
embeddings are its last hidden states, and its pooled vector the projected one. Without a VAE the
latents are the pixels, in [-1, 1].

T5 sees the first 128 tokens of a prompt unless policy.max_sequence_length says otherwise, as in
flow_grpo's train_sd3.py; diffusers' own default is 256. The model attends to padding, so another
length is another function.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, final

import torch
from torch import Tensor, nn

from flowgrpo.config import ConfigError, PolicyConfig
from flowgrpo.policies import components, pipelines, text_cache, vae
from flowgrpo.policies.base import Policy, check_list, dynamic_shift, scheduler_sigmas
from flowgrpo.policies.pipelines import Pipeline
from flowgrpo.policies.sd3.family import MAX_SEQUENCE_LENGTH
from flowgrpo.records import Conditioning

TEXT_ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")
TOKENIZERS = ("tokenizer", "tokenizer_2", "tokenizer_3")
TEXT_COMPONENTS = (*TEXT_ENCODERS, *TOKENIZERS)
"""Components of the pipeline that a text's embeddings depend on."""


@final
class SD3Policy(Policy):
    """`Policy` of a StableDiffusion3Pipeline."""

    def __init__(
        self,
        source: Pipeline,
        device: torch.device,
        config: PolicyConfig,
        encode: Callable[[Sequence[str]], Conditioning] | None,
    ) -> None:
        self.pipeline, self.name, self.dtype = source.pipeline, source.name, source.dtype
        self.device = device
        encoders = self._find_encoders(needed=encode is None)
        self._check_components(needed=encode is None)
        offload = config.offload_text_encoders and not self._one_encoder
        pipelines.place(source, device, encoders if offload else ())
        vae.prepare(self.pipeline.vae, device, config.vae_slicing)
        self.transformer = self.pipeline.transformer
        self.scheduler = self.pipeline.scheduler
        self._set_size(config)
        if self._one_encoder:
            # The small encoder of a small model: computed sooner than read, and in one batch.
            return
        self._length = config.max_sequence_length or MAX_SEQUENCE_LENGTH
        self._texts = encode or text_cache.make_encoder(
            self._encode_one, encoders, source, TEXT_COMPONENTS, self._length, device, config
        )

    def _set_size(self, policy_config: PolicyConfig) -> None:
        config, factor = self.transformer.config, 1
        default = config.sample_size
        if self.pipeline.vae is not None:
            factor = self.pipeline.vae_scale_factor
            # A VAE may state the height and width of what it was trained on; a transformer cannot.
            stated = self.pipeline.vae.config.sample_size
            default = config.sample_size * factor if isinstance(stated, int) else stated
        multiple = factor * config.patch_size
        self.height, self.width = pipelines.check_size(
            policy_config,
            default,
            multiple,
            multiple * config.pos_embed_max_size,
            self.name,
        )
        self.resolution = max(self.height, self.width)
        self.latent_shape = (config.in_channels, self.height // factor, self.width // factor)

    def _find_encoders(self, needed: bool) -> list[nn.Module]:
        """The text encoders that the pipeline has; `needed`: those that texts are encoded by."""
        encoders = {name: getattr(self.pipeline, name) for name in TEXT_ENCODERS}
        encoders = {name: encoder for name, encoder in encoders.items() if encoder is not None}
        names = list(encoders)
        self._one_encoder = needed and names == ["text_encoder"]
        if needed and not self._one_encoder and names[:2] != ["text_encoder", "text_encoder_2"]:
            raise ConfigError(
                f"policy.model {self.name!r} has the text encoders {', '.join(names) or 'none'}, "
                "but text_encoder and text_encoder_2, with text_encoder_3 or without, are expected "
                "(or text_encoder alone); restore the missing one."
            )
        return list(encoders.values())

    def _check_components(self, needed: bool) -> None:
        """Raise ConfigError unless the VAE, and if they are `needed` the text encoders, fit the
        transformer."""
        pipeline, config = self.pipeline, self.pipeline.transformer.config
        if pipeline.vae is not None:
            factor = pipeline.vae_scale_factor
            components.check_vae(pipeline.vae, config.in_channels, factor, self.name)
        # The pooled vectors of two CLIP encoders stand side by side.
        second = getattr(getattr(pipeline.text_encoder_2, "config", None), "projection_dim", 0)
        first = [("projection_dim", config.pooled_projection_dim - second)]
        if self._one_encoder:
            first.append(("hidden_size", config.joint_attention_dim))
        numbers = (first, [], [("d_model", config.joint_attention_dim)])
        for encoder, tokenizer, sizes in zip(TEXT_ENCODERS, TOKENIZERS, numbers, strict=True):
            if needed and getattr(pipeline, encoder) is not None:
                components.check_text_encoder(pipeline, encoder, tokenizer, sizes, self.name)

    def encode_texts(self, texts: Sequence[str]) -> Conditioning:
        texts = check_list(texts)
        return self._encode_with_one(texts) if self._one_encoder else self._texts(texts)

    def check_texts(self, texts: Sequence[str]) -> None:
        texts = check_list(texts)
        if self._one_encoder:
            self._tokens(texts)

    def token_limits(self) -> list[tuple[Any, int]]:
        if not (self._one_encoder or isinstance(self._texts, text_cache.TextEncoder)):
            # The caller's own encoder, which the pipeline's tokenizers take no part in.
            return []
        clip = [getattr(self.pipeline, name) for name in TOKENIZERS[:2]]
        limits = [
            (tokenizer, tokenizer.model_max_length) for tokenizer in clip if tokenizer is not None
        ]
        if not self._one_encoder and self.pipeline.text_encoder_3 is not None:
            limits.append((self.pipeline.tokenizer_3, self._length))
        return limits

    def _encode_one(self, text: str) -> Conditioning:
        embeds, _, pooled, _ = self.pipeline.encode_prompt(
            prompt=[text],
            prompt_2=None,
            prompt_3=None,
            device=self.device,
            do_classifier_free_guidance=False,
            max_sequence_length=self._length,
        )
        return Conditioning(embeds.to(self.dtype), pooled.to(self.dtype))

    @torch.no_grad()
    def _encode_with_one(self, texts: list[str]) -> Conditioning:
        out = self.pipeline.text_encoder(self._tokens(texts).to(self.device))
        return Conditioning(out.last_hidden_state.to(self.dtype), out.text_embeds.to(self.dtype))

    def _tokens(self, texts: list[str]) -> Tensor:
        """int64 [N, L]; raises for a word that the tokenizer maps to its unknown token."""
        tokenizer = self.pipeline.tokenizer
        ids = tokenizer(
            texts,
            padding="max_length",
            max_length=tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        ).input_ids
        # A byte-pair tokenizer knows every word; its unknown token is another name of the last one.
        if tokenizer.unk_token_id in (None, tokenizer.eos_token_id, tokenizer.pad_token_id):
            return ids
        for text, unknown in zip(texts, (ids == tokenizer.unk_token_id).any(dim=1), strict=True):
            if unknown:
                words = sorted(set(tokenizer.get_vocab()) - set(tokenizer.all_special_tokens))
                raise ConfigError(
                    f"the prompt {text!r} has a word that {self.name} does not know, but only "
                    f"{', '.join(words)} are expected; use these words."
                )
        return ids

    def _velocity(self, sample: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        with self._with_precomputed(conditioning):
            return self.transformer(
                hidden_states=sample.to(self.dtype),
                timestep=self._timestep(sigma),
                encoder_hidden_states=conditioning.embeds,
                pooled_projections=conditioning.pooled,
                return_dict=False,
            )[0]

    def _embed_time(self, sigma: Tensor, pooled: Tensor) -> Tensor:
        return self.transformer.time_text_embed(self._timestep(sigma), pooled)

    def _timestep(self, sigma: Tensor) -> Tensor:
        # As diffusers: timesteps stay in float32 and are embedded before any cast.
        return sigma * self.scheduler.config.num_train_timesteps

    def pixels(self, latents: Tensor) -> Tensor:
        return vae.decode(self.pipeline.vae, latents)

    def latents(self, pixels: Tensor) -> Tensor:
        return vae.encode(self.pipeline.vae, pixels)

    def sigmas(self, num_steps: int) -> Tensor:
        if self.scheduler.config.use_dynamic_shifting:
            return scheduler_sigmas(self.scheduler, num_steps, mu=self._mu())
        return scheduler_sigmas(self.scheduler, num_steps)

    def _mu(self) -> float:
        """The resolution-dependent shift, as StableDiffusion3Pipeline computes it."""
        from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import (
            calculate_shift,
        )

        patch = self.transformer.config.patch_size
        tokens = (self.latent_shape[1] // patch) * (self.latent_shape[2] // patch)
        return dynamic_shift(calculate_shift, self.scheduler.config, tokens, 1.16)
