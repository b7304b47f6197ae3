"""Position embeddings of SD3's image tokens, cropped to one image size."""

from __future__ import annotations

from types import MethodType

from torch import Tensor, nn


def crop_once(transformer: nn.Module, latent_shape: tuple[int, ...]) -> None:
    """Crop the position embeddings of latents [C, H, H] out of their grid once, not by a copy in
    each forward.

    Adds to the transformer's PatchEmbed: `cropped_pos_embed` and a buffer `_cropped`
    [1, tokens, width].
    """
    patches, side = transformer.pos_embed, latent_shape[1]
    cropped = type(patches).cropped_pos_embed(patches, side, side).clone()
    # A buffer, so that a captured graph notices when it moves; not one that is saved.
    patches.register_buffer("_cropped", cropped, persistent=False)
    patches.cropped_pos_embed = MethodType(_cropped_pos_embed, patches)


def _cropped_pos_embed(self: nn.Module, height: int, width: int) -> Tensor:
    tokens = self._cropped.shape[1]
    if height == width and (height // self.patch_size) ** 2 == tokens:
        return self._cropped
    # The pipeline itself may be asked for images of another size.
    return type(self).cropped_pos_embed(self, height, width)
