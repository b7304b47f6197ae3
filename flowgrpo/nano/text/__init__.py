"""nano_text: an embedded model that writes, for the paper's second task, text rendering.

glyphs.py    the characters, as bitmaps in glyphs.safetensors
scenes.py    the world: a word on a sign or a card; painting
prompts.py   prompts, splits by word, the parser
verify.py    quality figures beside the word
model.py     the networks, of SD3.5's classes; model/ holds the weights
pretrain.py  the training of the weights
recipes.py   the run of `flowgrpo train nano_text`

The word is read by RapidOCR (flowgrpo/rewards/ocr.py), recognition alone.
"""

from __future__ import annotations

from typing import Any


def recipe(**overrides: Any):
    """Build the Config of `flowgrpo train nano_text`; see `flowgrpo.nano.text.recipes.recipe`."""
    from flowgrpo.nano.text.recipes import recipe as make

    return make(**overrides)
