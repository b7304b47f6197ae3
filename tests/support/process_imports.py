"""What the process that `processes.Fork` forks from has imported: all that a run needs."""

import matplotlib.figure
import peft
import torch.utils.tensorboard
from diffusers import StableDiffusion3Pipeline
from transformers import CLIPTextModelWithProjection

import flowgrpo.cli.main
import flowgrpo.train

__all__ = ["CLIPTextModelWithProjection", "StableDiffusion3Pipeline", "flowgrpo"]
__all__ += ["matplotlib", "peft", "torch"]
