"""The family of FLUX.1-Kontext, which edits an image: its record, and its sizes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from flowgrpo.config import Config
from flowgrpo.policies.family import Architecture, Json, Sizes
from flowgrpo.policies.flux import family as flux
from flowgrpo.policies.flux import sizes


class _Code(str):
    """Python for the model card, which `repr` writes as it is."""

    __slots__ = ()
    __repr__ = str.__str__


def call_arguments(config: Config) -> dict[str, Any]:
    """Arguments of the pipeline's call: those of FLUX.1, and an image of the sample's size, which
    the pipeline then keeps."""
    policy = config.evaluated_policy
    height, width = (side or policy.resolution or 1024 for side in (policy.height, policy.width))
    # Resampled by Lanczos, as the policy does.
    image = _Code(f'load_image("IMAGE").resize(({width}, {height}), 1)')
    size = {"max_area": height * width, "_auto_resize": False}
    return {"image": image, **size, **flux.call_arguments(config)}


def read(
    config: Json, vae_config: Json, parameters: int, encoders: int, vae: int
) -> Architecture | None:
    """Sizes of the model of these config.json; None without a VAE."""
    plain = sizes.read(config, vae_config, parameters, encoders, vae)
    return plain and replace(plain, references=1)


KNOWN = {
    "black-forest-labs/FLUX.1-Kontext-dev": replace(
        sizes.KNOWN["black-forest-labs/FLUX.1-dev"], references=1
    )
}
KONTEXT = replace(
    flux.FLUX,
    pipeline="FluxKontextPipeline",
    policy="flowgrpo.policies.flux.kontext_policy:KontextPolicy",
    sizes=Sizes(read, KNOWN),
    call_arguments=call_arguments,
    edits=True,
    card_lines=("from diffusers.utils import load_image",),
)
"""FLUX.1-Kontext: FluxKontextPipeline, with the transformer of FLUX.1.

Packed latents of the image that is edited stand behind the sample's tokens in every forward, at
positions whose first number is 1 where the sample's have 0. The velocity is that of the sample's
tokens. Time, guidance, text and the shift of the sigmas, which counts the sample's tokens alone,
are FLUX.1's.

A deliberate departure from the pipeline's default: the image is resized to the size of the sample
(policy.resolution, or height and width), and not to the one of seventeen sizes of a megapixel that
is nearest to its own shape. All rows of a forward then have as many tokens, and one captured graph
serves all prompts. It is what the pipeline does with _auto_resize=False and an image of that size.
"""
