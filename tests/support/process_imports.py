"""What the server that `processes.Fork` forks from has imported and prepared: all that a run needs
and would make anew in each process."""

import tempfile
from pathlib import Path

import matplotlib.figure
import peft
import torch.utils.tensorboard
from diffusers import StableDiffusion3Pipeline
from transformers import CLIPTextModelWithProjection

import flowgrpo.cli.main
import flowgrpo.train
from flowgrpo.nano import prompts
from flowgrpo.policies import Policy
from support import pipelines

__all__ = ["CLIPTextModelWithProjection", "StableDiffusion3Pipeline", "flowgrpo"]
__all__ += ["matplotlib", "peft", "torch"]


def prepare() -> None:
    """Load a pipeline, split nano's prompts, draw a figure: tables, patterns and fonts are kept."""
    with tempfile.TemporaryDirectory() as folder:
        pipelines.save_pixel_pipeline(Path(folder))
        Policy.load(folder, device="cpu", dtype="float32")
        figure = matplotlib.figure.Figure(layout="constrained")
        figure.subplots().plot([0, 1])
        figure.savefig(Path(folder) / "figure.png")
    prompts.split("heldout")


prepare()
