"""Position embeddings of SD3's image tokens, cropped to one image size."""

from __future__ import annotations

from dataclasses import dataclass
from types import MethodType

from torch import Tensor, nn


def crop_once(transformer: nn.Module, latent_shape: tuple[int, ...]) -> None:
    """Crop the position embeddings of latents [C, H, W] out of their grid once, not by a copy in
    each forward.

    Adds to the transformer's PatchEmbed: `cropped_pos_embed` and a buffer `_cropped`
    [1, tokens, width].
    """
    patches, (height, width) = transformer.pos_embed, latent_shape[1:]
    cropped = type(patches).cropped_pos_embed(patches, height, width).clone()
    # A buffer, so that a captured graph notices when it moves; not one that is saved.
    patches.register_buffer("_cropped", cropped, persistent=False)
    patches.cropped_pos_embed = MethodType(CroppedPosEmbed(height, width), patches)


@dataclass(frozen=True)
class CroppedPosEmbed:
    """PatchEmbed's method for latents of one size, of which `_cropped` holds the result."""

    height: int
    width: int

    def __call__(self, patches: nn.Module, height: int, width: int) -> Tensor:
        """[1, tokens, width]: the embeddings of latents [C, height, width]."""
        if (height, width) == (self.height, self.width):
            return patches._cropped
        # The pipeline itself may be asked for images of another size.
        return type(patches).cropped_pos_embed(patches, height, width)
