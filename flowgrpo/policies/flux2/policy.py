"""FLUX.2-klein and its undistilled base: Flux2KleinPipeline, on packed and normalised latents.

A sample is [N, 128]: N = height / 16 x width / 16 tokens, each a 2 x 2 patch of 32 latent channels.
The VAE normalises patches by the statistics of a batch norm, not by a scale and a shift; `pixels`
takes them off as the pipeline does, whose own latents stay normalised and packed till then.

A text stands in the chat template of its tokenizer, and its embedding is what three layers of Qwen3
give for each token, side by side. It is padded to policy.max_sequence_length tokens, 512 by
default, and the transformer attends to the padding: another length is another input, and another
picture. There is no vector of the whole prompt; `pooled` is one 0 for each.

The published models are distilled to four steps, without guidance (`is_distilled` in
model_index.json). The pipeline leaves guidance out of them without a word; here it is refused. The
base models take it as u + s (c - u), by a second forward for the empty prompt.

In a 16-bit model the transformer rounds the time to its dtype, once; the pipeline rounds t before
the division by 1000 as well.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, final

import numpy as np
import torch
from torch import Tensor

from flowgrpo.config import ConfigError, PolicyConfig
from flowgrpo.config.validation import require
from flowgrpo.policies import components, pipelines, text_cache, vae
from flowgrpo.policies.base import Policy, check_list, check_steps, scheduler_sigmas
from flowgrpo.policies.flux2.family import MAX_SEQUENCE_LENGTH
from flowgrpo.policies.pipelines import Pipeline
from flowgrpo.policies.rotary import Rotary
from flowgrpo.records import Conditioning

TEXT_COMPONENTS = ("text_encoder", "tokenizer")
"""Components of the pipeline that a text's embeddings depend on."""
PATCH = 2
"""Latent pixels on each side of a token."""
TEXT_LAYERS = (9, 18, 27)
"""Layers of Qwen3 whose hidden states the pipeline puts side by side."""


class TwoRotaries(Rotary):
    """Rotary tables of the text's tokens and of the image's, which the transformer asks for apart,
    each by the very tensor of positions [L, 4] or [N, 4] that is named here."""

    def __init__(
        self,
        text_ids: Tensor,
        image_ids: Tensor,
        embed: Callable[[Tensor], tuple[Tensor, Tensor]],
    ) -> None:
        super().__init__(embed(image_ids))
        self.text_ids, self.image_ids, self.text_tables = text_ids, image_ids, embed(text_ids)

    def forward(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Return the tables of `text_ids` or of `image_ids`.

        Raises:
            ValueError: positions are other ones.
        """
        if positions is self.text_ids:
            return self.text_tables
        if positions is not self.image_ids:
            raise ValueError("positions: tables are made for one text length and one image size")
        return self.tables


@final
class Flux2KleinPolicy(Policy):
    """`Policy` of a Flux2KleinPipeline."""

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
        vae.prepare(self.pipeline.vae, device, config.vae_slicing)
        self.transformer = self.pipeline.transformer
        self.scheduler = self.pipeline.scheduler
        self.distilled = bool(self.pipeline.config.get("is_distilled", False))
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
        require(
            not config.guidance_embeds,
            f"the transformer of policy.model {self.name!r} has guidance_embeds, for a guidance "
            "value that FLUX.2-klein is not told, but one without is expected; put back the one "
            "that the model was published with.",
        )
        channels, factor = config.in_channels // PATCH**2, self.pipeline.vae_scale_factor
        components.check_vae(self.pipeline.vae, channels, factor, self.name, ())
        self._check_statistics(config.in_channels)
        if set(TEXT_COMPONENTS) <= set(needed):
            self._check_text_encoder(config.joint_attention_dim)

    def _check_statistics(self, count: int) -> None:
        """Raise ConfigError unless the VAE has `count` finite means and variances above 0."""
        module = self.pipeline.vae
        norm, eps = getattr(module, "bn", None), getattr(module.config, "batch_norm_eps", None)
        subject = f"the vae of policy.model {self.name!r} is a {type(module).__name__}"
        back = "put back the one that the model was published with."
        for name in ("running_mean", "running_var"):
            values = getattr(norm, name, None)
            shape = None if values is None else list(values.shape)
            require(
                shape == [count] and eps is not None,
                f"{subject} with bn.{name} {shape}, but {count} numbers, which normalise a "
                f"token of its transformer, are expected; {back}",
            )
            good = values.isfinite() if name == "running_mean" else values.isfinite() & (values > 0)
            require(
                values.is_meta or bool(good.all()),
                f"{subject} whose bn.{name} has numbers that are not finite or, as a variance, "
                f"not above 0; {back}",
            )

    def _check_text_encoder(self, width: int) -> None:
        """Raise ConfigError unless the text encoder has the layers that embeddings are made of, in
        all of `width` numbers, and knows the tokenizer's tokens, which have a chat template."""
        encoder, words = self.pipeline.text_encoder, self.pipeline.tokenizer
        config, layers = encoder.config, len(TEXT_LAYERS)
        subject = f"the text_encoder of policy.model {self.name!r} is a {type(encoder).__name__}"
        back = "put back the one that the model was published with."
        require(
            layers * config.hidden_size == width,
            f"{subject} with hidden_size {config.hidden_size}, {layers} times which are "
            f"{layers * config.hidden_size}, but its transformer is made for {width}; {back}",
        )
        require(
            config.num_hidden_layers >= max(TEXT_LAYERS),
            f"{subject} of {config.num_hidden_layers} layers, but layers {TEXT_LAYERS} make an "
            f"embedding; {back}",
        )
        require(
            len(words) <= config.vocab_size,
            f"the tokenizer of policy.model {self.name!r} has {len(words)} tokens, but its "
            f"text_encoder knows {config.vocab_size}; {back}",
        )
        require(
            bool(words.chat_template),
            f"the tokenizer of policy.model {self.name!r} has no chat template, which every text "
            f"is put into; {back}",
        )

    def _set_positions(self, factor: int) -> None:
        rows, columns = (side // (PATCH * factor) for side in (self.height, self.width))
        channels = self.transformer.config.in_channels
        self._grid, self.latent_shape = (rows, columns), (rows * columns, channels)
        empty = torch.empty(1, 1, rows, columns)
        self._image_ids = self.pipeline._prepare_latent_ids(empty)[0].to(self.device)
        empty = torch.empty(1, self._length, 1)
        self._text_ids = self.pipeline._prepare_text_ids(empty)[0].to(self.device)
        # The transformer would make them anew, by some fifty small kernels, in every forward.
        self._rotary = TwoRotaries(self._text_ids, self._image_ids, self.transformer.pos_embed)

    def _set_latent_scale(self) -> None:
        norm, eps = self.pipeline.vae.bn, self.pipeline.vae.config.batch_norm_eps
        # In the VAE's dtype and then in float32, as the pipeline computes them.
        values = norm.running_mean, torch.sqrt(norm.running_var + eps)
        self._mean, self._std = (x.detach().float().view(1, -1, 1, 1) for x in values)

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
        """The tokenizer knows every text."""
        check_list(texts)

    def token_limits(self) -> list[tuple[Any, int]]:
        if not isinstance(self._texts, text_cache.TextEncoder):
            # The caller's own encoder, which the pipeline's tokenizer takes no part in.
            return []
        # A text is cut at the end of the template, whose beginning takes some tokens too.
        words, mark = self.pipeline.tokenizer, "\N{OBJECT REPLACEMENT CHARACTER}"
        messages = [{"role": "user", "content": mark}]
        template = words.apply_chat_template(messages, tokenize=False, enable_thinking=False)
        head = len(words(template.partition(mark)[0]).input_ids)
        return [(words, max(self._length - head, 0))]

    def _encode_one(self, text: str) -> Conditioning:
        embeds, _ = self.pipeline.encode_prompt(
            prompt=[text], device=self.device, max_sequence_length=self._length
        )
        embeds = embeds.to(self.dtype)
        return Conditioning(embeds, embeds.new_zeros(1, 1))

    def _velocity(self, sample: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        with self._rotary.put_into(self.transformer), self._with_precomputed(conditioning):
            return self.transformer(
                hidden_states=sample.to(self.dtype),
                timestep=self._timestep(sigma),
                encoder_hidden_states=conditioning.embeds,
                txt_ids=self._text_ids,
                img_ids=self._image_ids,
                return_dict=False,
            )[0]

    def _embed_time(self, sigma: Tensor, pooled: Tensor) -> Tensor:
        # The transformer's own first lines.
        timestep = self._timestep(sigma).to(self.dtype) * 1000
        return self.transformer.time_guidance_embed(timestep, None)

    def _timestep(self, sigma: Tensor) -> Tensor:
        """The scheduler's timestep over 1000, which the transformer multiplies by 1000."""
        return sigma * self.scheduler.config.num_train_timesteps / 1000

    def unpack(self, latents: Tensor) -> Tensor:
        """float32 latents [B, 32, height / 8, width / 8] of packed ones, as the VAE decodes them
        and as the pipeline returns them."""
        patches = latents.transpose(1, 2).unflatten(2, self._grid) * self._std + self._mean
        return self.pipeline._unpatchify_latents(patches)

    def pixels(self, latents: Tensor) -> Tensor:
        return vae.run_decoder(self.pipeline.vae, self.unpack(latents))

    def latents(self, pixels: Tensor) -> Tensor:
        patches = self.pipeline._patchify_latents(vae.run_encoder(self.pipeline.vae, pixels))
        return self.pipeline._pack_latents((patches - self._mean) / self._std).contiguous()

    def sigmas(self, num_steps: int) -> Tensor:
        from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu

        num_steps = check_steps(num_steps)
        # The shift grows with the tokens of the image, and falls with the number of steps.
        arguments: dict[str, Any] = {"mu": compute_empirical_mu(self.latent_shape[0], num_steps)}
        if not self.scheduler.config.get("use_flow_sigmas", False):
            arguments["sigmas"] = np.linspace(1.0, 1 / num_steps, num_steps)
        return scheduler_sigmas(self.scheduler, num_steps, **arguments)
