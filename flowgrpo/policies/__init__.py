"""Models that can be trained: an abstract `Policy`, and a folder for each family of them.

The interface, and how a model gets there:

base.py          `Policy`: encode, velocity, decode
sd3/  flux/  flux2/  qwen/  zimage/
                 the families: policy.py encodes texts and calls the transformer
family.py        the record of a family; families.py lists them
pipelines.py     diffusers pipelines from a folder, the Hub or memory
load.py          the model of a run, with its adapters
text_cache.py    text embeddings, encoded once and kept on disk
vae.py           latents -> pictures
guidance.py      both velocities of classifier-free guidance from one forward
device.py        device and dtype
deterministic.py PyTorch's deterministic algorithms for the backward passes
shared_sizes.py  parameters of text encoders and VAE, for the memory plan

Rewrites of the transformer, whose order is in surgery.py:

attention.py     one attention kernel, by name
compiled.py      torch.compile of the blocks
modulation.py    modulations, computed once per rollout
blocks.py        blocks with fused element-wise kernels
adapters.py      LoRA matrices, drawn or loaded; lora.py: their matrix products
"""

from __future__ import annotations

from importlib import import_module

_HOME = {"Conditioning": "flowgrpo.records", "Policy": "flowgrpo.policies.base"}
__all__ = list(_HOME)


def __getattr__(name: str) -> object:
    """Import `Policy` or `Conditioning` when it is first asked for: the families' records, which
    the memory plan reads, come without torch."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)
