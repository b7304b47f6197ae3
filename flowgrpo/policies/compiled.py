"""torch.compile of the transformer's blocks, with the training graph's bits in the rollout.

Each block is compiled by itself: all blocks of a kind share their code, so a model of 24 blocks
takes the compilation of three. Inductor's own CUDA graphs stay off; the rollout captures all of its
steps in one. What is captured runs twice before that (cuda_graphs.py), on the stream of the
capture: there forward and backward are compiled, and the first launches load modules and choose
among variants of a kernel. In the capture itself nothing may be compiled (`no_recompile`). Compiled
code holds no addresses: blocks get their weights, and lora.py's merged matrices, as inputs.

Inductor fuses a forward that has a backward differently from one that has none, and the two differ
in the last bits, so a rollout without gradients would give first ratios other than 1. Hence
`as_training_forward`: the rollout, too, runs the forward that has a backward, and lets go of what
that would have kept. The price is the writing of those tensors, block by block; no memory stays
taken.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor, nn

# Kinds of blocks (SD3.5-medium: dual, plain, last; the first has an input without gradient) times
# forms (training, reference without adapters). torch's own limit is 8.
VARIANTS = 32


def compile_blocks(blocks: Sequence[nn.Module]) -> None:
    """Compile each block in place, on its first call with each kind of input.

    Adds to it torch's `_compiled_call_impl`.
    """
    import torch._dynamo

    config = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, VARIANTS)
    for block in blocks:
        # Off by default, but TORCHINDUCTOR_CUDAGRAPHS in the environment would turn them on.
        block.compile(fullgraph=True, dynamic=False, options={"triton.cudagraphs": False})


def no_recompile() -> AbstractContextManager[None]:
    """Forbid compilation inside: a block with an input of a new kind raises RuntimeError."""
    return torch.compiler.set_stance("fail_on_recompile")


@contextmanager
def as_training_forward() -> Iterator[None]:
    """Compute forwards inside as for training, but keep nothing for a backward."""
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(_forget, _refuse):
        yield


def _forget(tensor: Tensor) -> None:
    return None


def _refuse(nothing: None) -> Tensor:
    raise RuntimeError(
        "a forward in as_training_forward keeps nothing; run it with gradients instead"
    )
