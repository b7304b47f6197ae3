"""Z-Image's transformer on a batch of one shape, in place of its forward on lists.

diffusers' forward takes a list of pictures and a list of texts, each of its own length, fills each
up to a multiple of 32 tokens with a learned vector that attention sees, and the shorter ones of a
batch up to the longest with zeros that it does not see. It finds the lengths on the host, so that
a text's length would choose the shapes of a captured forward, and the longest text of a batch the
number of rows of all products.

Here a text is [L, D] with L one multiple of 32 for a run, and the number of its tokens is data:

    tokens of the text              as they are
    up to the next multiple of 32   the learned vector, seen
    the rest up to L                the learned vector, not seen

A picture's positions on the first axis follow those of its text, so rows have rotary tables of
their own, chosen by the text's length out of L / 32. Everything else is the transformer's own
modules and diffusers' arithmetic, in its order: pictures patched, embedded and refined, texts
embedded and refined, both together through the layers, [picture, text].
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from diffusers.models.transformers.transformer_z_image import SEQ_MULTI_OF
from torch import Tensor, nn

from flowgrpo.policies.rotary import RowTables
from flowgrpo.policies.zimage.attention import additive_mask, real_tables

MULTIPLE = SEQ_MULTI_OF
"""Tokens that a picture's and a text's number is a multiple of: 32."""
PATCH = 2
"""Latent pixels on each side of a token."""
KEY = f"{PATCH}-1"
"""Name of the embedding and of the last layer of patches of that size and one frame."""


def whole(tokens: int) -> int:
    """Round a number of tokens up to a multiple of `MULTIPLE`."""
    return -(-tokens // MULTIPLE) * MULTIPLE


class BatchForward:
    """Forward of pictures of `rows` x `columns` tokens beside texts of `length` tokens, a multiple
    of `MULTIPLE`."""

    def __init__(
        self, transformer: nn.Module, rows: int, columns: int, length: int, device: torch.device
    ) -> None:
        self.rows, self.columns, self.length = rows, columns, length
        self.image_tokens = whole(rows * columns)
        """Of a picture, with those that it is filled up with."""
        embedder, grid = transformer.rope_embedder, transformer.create_coordinate_grid
        texts = grid((length, 1, 1), (1, 0, 0)).flatten(0, 2)
        kinds = []
        for seen in range(MULTIPLE, length + 1, MULTIPLE):
            image = grid((1, rows, columns), (seen + 1, 0, 0)).flatten(0, 2)
            filled = image.new_zeros(self.image_tokens - len(image), 3)
            kinds.append(embedder(torch.cat([image, filled, texts])))
        tables = real_tables(torch.stack(kinds))
        # [L / 32, N + L, D]: one table for each number of tokens that a text may be filled up to.
        self.tables = RowTables(*(table.to(device) for table in tables))
        self.numbers = torch.arange(length, device=device)
        self.filling = torch.arange(self.image_tokens, device=device) >= rows * columns

    @contextmanager
    def put_into(self, transformer: nn.Module) -> Iterator[None]:
        """Let `transformer` be called as `run` inside; the forward on lists comes back, for the
        pipeline. Hooks of the module, those of FSDP among them, run as ever."""
        transformer.forward = partial(self.run, transformer)
        try:
            yield
        finally:
            del transformer.forward

    def run(
        self, transformer: Any, sample: Tensor, time: Tensor, embeds: Tensor, valid: Tensor
    ) -> Tensor:
        """Output [B, C, H, W] of the transformer, the negative of a velocity.

        Args:
            sample: [B, C, H, W], in the transformer's dtype.
            time: float32 [B], 1 - sigma.
            embeds: [B, L, D], the texts.
            valid: [B, L], 1 for each token of a text, from its first on, and 0 behind the last.
        """
        count = valid.ne(0).sum(1)
        # Numbers of the tables: the multiples of 32 that texts are filled up to, less one.
        kind = (count - 1).clamp(min=0) // MULTIPLE
        seen = self.numbers < (kind[:, None] + 1) * MULTIPLE
        tables = RowTables(*(table.index_select(0, kind) for table in self.tables))
        # Copied, since the fused blocks of a refiner look at them as one row.
        image_tables, text_tables = (
            RowTables(*(table[:, part].contiguous() for table in tables))
            for part in (slice(self.image_tokens), slice(self.image_tokens, None))
        )
        adaln = transformer.t_embedder(time * transformer.t_scale).type_as(sample)

        def block(module: nn.Module, *arguments: Any) -> Tensor:
            if torch.is_grad_enabled() and transformer.gradient_checkpointing:
                return transformer._gradient_checkpointing_func(module, *arguments)
            return module(*arguments)

        x = transformer.all_x_embedder[KEY](self._patches(sample))
        if self.image_tokens > self.rows * self.columns:
            x = torch.where(self.filling[:, None], transformer.x_pad_token, x)
        for layer in transformer.noise_refiner:
            x = block(layer, x, None, image_tables, adaln)
        text = transformer.cap_embedder(embeds)
        of_text = self.numbers < count[:, None]
        text = torch.where(of_text[..., None], text, transformer.cap_pad_token)
        text_mask = additive_mask(seen, x.dtype)
        for layer in transformer.context_refiner:
            text = block(layer, text, text_mask, text_tables)
        x = torch.cat([x, text], dim=1)
        image_seen = seen.new_ones(len(seen), self.image_tokens)
        mask = additive_mask(torch.cat([image_seen, seen], dim=1), x.dtype)
        for layer in transformer.layers:
            x = block(layer, x, mask, tables, adaln)
        x = transformer.all_final_layer[KEY](x, c=adaln)
        return self._picture(x[:, : self.rows * self.columns])

    def _patches(self, sample: Tensor) -> Tensor:
        """[B, N, 4 C]: the pixels of a patch, row by row, with their channels together; filled up
        with the last patch, which the learned vector takes the place of."""
        patches = sample.unflatten(3, (-1, PATCH)).unflatten(2, (-1, PATCH))
        patches = patches.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)
        missing = self.image_tokens - patches.shape[1]
        if not missing:
            return patches
        return torch.cat([patches, patches[:, -1:].expand(-1, missing, -1)], dim=1)

    def _picture(self, patches: Tensor) -> Tensor:
        """[B, C, H, W]: `_patches` undone."""
        picture = patches.unflatten(1, (self.rows, self.columns)).unflatten(-1, (PATCH, PATCH, -1))
        return picture.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)
