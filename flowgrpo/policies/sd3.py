"""Stable Diffusion 3 and 3.5, and pipelines of their class without VAE or with one text encoder.

With three text encoders the embeddings are those of diffusers' own `encode_prompt`. With one
(CLIPTextModelWithProjection), a prompt's embeddings are its last hidden states, and its pooled
vector the projected one. Without a VAE the latents are the pixels, in [-1, 1].
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import final

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from flowgrpo.config import ConfigError
from flowgrpo.policies import lora
from flowgrpo.policies.base import Conditioning, Policy


@final
class SD3Policy(Policy):
    """`Policy` of a StableDiffusion3Pipeline."""

    def __init__(self, source: str, name: str, device: torch.device, dtype: torch.dtype) -> None:
        self.name, self.device, self.dtype = name, device, dtype
        self.pipeline = _load(source, name, dtype).to(device)
        self.transformer = self.pipeline.transformer.requires_grad_(False).eval()
        self.scheduler = self.pipeline.scheduler
        config = self.transformer.config
        self.latent_shape = (config.in_channels, config.sample_size, config.sample_size)
        self._frozen: torch.nn.Module | None = None
        for part in (self.pipeline.vae, *self._text_encoders()):
            if part is not None:
                part.requires_grad_(False).eval()

    def _text_encoders(self) -> tuple[torch.nn.Module | None, ...]:
        pipeline = self.pipeline
        return pipeline.text_encoder, pipeline.text_encoder_2, pipeline.text_encoder_3

    @torch.no_grad()
    def encode(self, texts: Sequence[str]) -> Conditioning:
        texts = list(texts)
        if self.pipeline.text_encoder_2 is None:
            return self._encode_with_one(texts)
        embeds, _, pooled, _ = self.pipeline.encode_prompt(
            prompt=texts,
            prompt_2=None,
            prompt_3=None,
            device=self.device,
            do_classifier_free_guidance=False,
        )
        return Conditioning(embeds.to(self.dtype), pooled.to(self.dtype))

    def check_texts(self, texts: Sequence[str]) -> None:
        if self.pipeline.text_encoder_2 is None:
            self._tokens(list(texts))

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

    def velocity(self, sample: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        with self._attention():
            return self.transformer(
                hidden_states=sample.to(self.dtype),
                # As diffusers: timesteps stay in float32 and are embedded before any cast.
                timestep=sigma * self.scheduler.config.num_train_timesteps,
                encoder_hidden_states=conditioning.embeds,
                pooled_projections=conditioning.pooled,
                return_dict=False,
            )[0]

    def _attention(self) -> AbstractContextManager[None]:
        """The kernel of scaled_dot_product_attention, the same with and without gradients."""
        if self.device.type == "cpu" and self.dtype != torch.float32:
            # The backward pass of the CPU's flash kernel takes ten times its forward in 16 bits
            # (32 against 7 ms at 192 x 45 x 32, one thread).
            return sdpa_kernel(SDPBackend.MATH)
        return nullcontext()

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        vae = self.pipeline.vae
        if vae is not None:
            latents = latents / vae.config.scaling_factor + vae.config.shift_factor
            latents = vae.decode(latents.to(vae.dtype), return_dict=False)[0].float()
        return ((latents / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)

    def sigmas(self, num_steps: int) -> Tensor:
        # A copy, because set_timesteps writes into the scheduler; the values stay on the host.
        scheduler = copy.deepcopy(self.scheduler)
        if scheduler.config.use_dynamic_shifting:
            scheduler.set_timesteps(num_steps, mu=self._mu())
        else:
            scheduler.set_timesteps(num_steps)
        return scheduler.sigmas.to("cpu", torch.float64)

    def _mu(self) -> float:
        """The resolution-dependent shift, as StableDiffusion3Pipeline computes it."""
        from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import (
            calculate_shift,
        )

        config = self.scheduler.config
        tokens = (self.latent_shape[1] // self.transformer.config.patch_size) ** 2
        return calculate_shift(
            tokens,
            config.get("base_image_seq_len", 256),
            config.get("max_image_seq_len", 4096),
            config.get("base_shift", 0.5),
            config.get("max_shift", 1.16),
        )

    def keep_reference(self) -> None:
        self._frozen = copy.deepcopy(self.transformer).requires_grad_(False)

    @contextmanager
    def reference(self) -> Iterator[None]:
        if self._frozen is not None:
            trained, self.transformer = self.transformer, self._frozen
            try:
                yield
            finally:
                self.transformer = trained
            return
        layers = lora.layers(self.transformer)
        if not layers:
            raise RuntimeError(
                "the policy has neither adapters nor a kept reference; add adapters, or call "
                "keep_reference() before training."
            )
        with lora.switched_off(layers):
            yield


def _load(source: str, name: str, dtype: torch.dtype):
    """The pipeline, with None for the components that model_index.json has as null."""
    from diffusers import StableDiffusion3Pipeline

    try:
        index = StableDiffusion3Pipeline.load_config(source)
        absent = {
            part: None
            for part, value in index.items()
            if isinstance(value, list) and value[0] is None
        }
        with warnings.catch_warnings():
            # Its new name, `dtype`, is ignored without a word by older versions of diffusers.
            warnings.simplefilter("ignore", FutureWarning)
            return StableDiffusion3Pipeline.from_pretrained(source, torch_dtype=dtype, **absent)
    # Loading corrupt or foreign files raises whatever the reader of that file raises.
    except Exception as error:
        raise ConfigError(
            f"policy.model {name!r} could not be loaded as a StableDiffusion3Pipeline "
            f"({type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}); "
            "restore its files."
        ) from error
