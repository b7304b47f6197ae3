"""nano: the embedded model, its task and its verifier; a first run without download or GPU.

scenes.py    the world: shapes, colours, positions; painting
prompts.py   the six GenEval tasks in miniature; splits; the parser
draw.py      prompts -> pictures that fulfil them, or that are mistaken
verify.py    pictures -> objects, scores and quality figures
cells.py     probabilities of what cells show -> that of a prompt, differentiable
classifier.py  a small network that gives them, for learning by the reward's gradient
model.py     the networks, of SD3.5's classes; model/ holds the weights
pretrain.py  the training of the weights
muon.py      its optimizer for matrices
recipes.py   the runs of `flowgrpo train`
text/        nano_text, a sibling that writes words
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

MODEL_DIR = Path(__file__).parent / "model"
"""The embedded model, a pipeline in diffusers' layout."""
MODELS = {"nano": MODEL_DIR, "nano_text": Path(__file__).parent / "text" / "model"}
"""Embedded models by the names that policy.model takes."""


def recipe(**overrides: Any):
    """Build the Config of `flowgrpo train`; see `flowgrpo.nano.recipes.recipe`."""
    from flowgrpo.nano.recipes import recipe as make

    return make(**overrides)
