"""A model in pieces: each rank holds a share of every weight, by PyTorch's FSDP2 (`fully_shard`).

    mesh = make_mesh(world, device, shard_size)
    shard(transformer, blocks, mesh, ...)       each block's weights are gathered while it runs

A weight is then a DTensor, of which a rank holds the first, second, ... part of the rows. Before a
block runs, forward or backward, its whole weights are gathered from the ranks, and let go behind
it, so a rank holds its pieces and one or two blocks. Gradients are summed over the ranks as they
come, each rank getting those of its pieces; a loss is divided by all micro-steps of all ranks, so
they are sums and no means.

Every forward is a collective: all ranks must run as many, in the same order (`check_even`). With
`shard_size` ranks of one group share a copy and the groups hold copies (HSDP): weights are then
gathered inside a machine, and only sums of gradients go between machines.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, distribute_tensor

from flowgrpo.config import ConfigError
from flowgrpo.distributed.dealing import Dealing
from flowgrpo.distributed.world import World


def check_even(world: World, dealing: Dealing, rows: int, updates: int, batch_size: int) -> None:
    """Raise ConfigError unless all ranks have as many forwards in each optimizer step.

    Args:
        rows: of an iteration.
        updates: optimizer steps of an iteration.
        batch_size: rows of a chunk.
    """
    if not world.joined:
        raise ConfigError(
            "run.parallel is fsdp in one process without a launcher, but FSDP shards over the "
            "processes of one; start with torchrun, as torchrun --nproc-per-node 1 -m flowgrpo."
        )
    forwards = {len(order) for order in dealing.order}, {len(rows) for rows in dealing.rows}
    if dealing.leaves % world.size == 0 and all(len(numbers) == 1 for numbers in forwards):
        return
    counts = [n for n in range(1, dealing.leaves + 1) if dealing.leaves % n == 0]
    below = max(n for n in counts if n < world.size)
    above = min((n for n in counts if n > world.size), default=below)
    processes = " or ".join(map(str, dict.fromkeys((below, above))))
    sizes = [
        size
        for size in range(1, rows + 1)
        if rows % size == 0
        and rows // size % updates == 0
        and rows // size // updates % world.size == 0
    ]
    nearest = min(sizes, key=lambda size: (abs(size - batch_size), size), default=None)
    other = "" if nearest is None else f", or set sample.batch_size to {nearest}"
    raise ConfigError(
        f"WORLD_SIZE is {world.size} with run.parallel fsdp, but each of the {updates} optimizer "
        f"steps of an iteration has {dealing.leaves} parts (sample.batch_size {batch_size}), and "
        f"all processes must run as many forwards; start {processes} processes{other}."
    )


def make_mesh(world: World, device: torch.device, shard_size: int = 0) -> DeviceMesh:
    """Make the mesh of the ranks: [ranks], or [copies, ranks of a copy] with `shard_size`.

    Raises:
        ConfigError: `shard_size` does not divide the number of ranks.
    """
    size = shard_size or world.size
    if world.size % size:
        raise ConfigError(
            f"run.shard_size is {shard_size}, but it must divide the {world.size} processes of "
            "WORLD_SIZE; choose, for example, the processes of a machine."
        )
    ranks = torch.arange(world.size)
    if size == world.size:
        return DeviceMesh(device.type, ranks, mesh_dim_names=("shard",))
    return DeviceMesh(device.type, ranks.view(-1, size), mesh_dim_names=("replicate", "shard"))


def shard(
    model: nn.Module,
    blocks: Sequence[nn.Module],
    mesh: DeviceMesh,
    *,
    compute: torch.dtype | None = None,
    offload: bool = False,
    replicated: Iterable[nn.Parameter] = (),
) -> None:
    """Shard the weights of `model`, in place: those of each block, then the rest.

    Their classes become FSDP's, with the names of parameters as they were.

    Args:
        blocks: modules whose weights are gathered together.
        compute: type that weights are gathered and computed with, beside which the pieces keep
            their own; None: that of the pieces. Gradients are summed in the type of the pieces.
        offload: keep the pieces in host memory.
        replicated: parameters that every rank keeps whole; their gradients are not summed here.
    """
    # Takes a second, which a run that shards nothing is spared.
    from torch.distributed.fsdp import (
        CPUOffloadPolicy,
        FSDPModule,
        MixedPrecisionPolicy,
        OffloadPolicy,
        fully_shard,
    )

    options = {
        "mesh": mesh,
        # Also of the model itself: a weight that stays gathered would miss what is written into
        # its pieces.
        "reshard_after_forward": True,
        "mp_policy": MixedPrecisionPolicy(
            # Times are float32 on the way to their embedding.
            param_dtype=compute,
            reduce_dtype=torch.float32,
            cast_forward_inputs=False,
        )
        if compute is not None
        else MixedPrecisionPolicy(cast_forward_inputs=False),
        "offload_policy": CPUOffloadPolicy(pin_memory=mesh.device_type == "cuda")
        if offload
        else OffloadPolicy(),
        "ignored_params": set(replicated),
    }
    # Nothing writes into what a transformer returns.
    warnings.filterwarnings("ignore", message=r"FSDP2-wrapped module .* returned a view tensor")
    for module in (*blocks, model):
        fully_shard(module, **options)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            # gloo has no sum that divides, and a factor of 1 needs none.
            module.set_force_sum_reduction_for_comms(True)


def is_sharded(tensor: Tensor) -> bool:
    """Tell if a rank holds a piece of `tensor`."""
    return isinstance(tensor, DTensor)


def piece(tensor: Tensor) -> Tensor:
    """Take this rank's piece, in the same memory; a plain tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """Put all pieces together, on all ranks; a plain tensor as it is. A collective."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def like(values: Tensor, tensor: Tensor) -> Tensor:
    """Cut `values`, which each rank has whole, as `tensor` is cut; nothing is sent."""
    if not isinstance(tensor, DTensor):
        return values
    values = values.to(tensor.device)
    return distribute_tensor(values, tensor.device_mesh, tensor.placements, src_data_rank=None)


def gather(model: nn.Module, world: World) -> dict[str, Tensor] | None:
    """Collect the whole state of a sharded model on the CPU of rank 0; None on the others."""
    state = {}
    for name, value in model.state_dict().items():
        # One after the other: a rank needs room for one weight.
        with world.exchanging(piece(value).nbytes if is_sharded(value) else 0):
            value = whole(value)
        if world.first:
            state[name] = value.cpu()
    return state if world.first else None


def original_class(model: nn.Module) -> type[nn.Module]:
    """Find the class that a model had before it was sharded."""
    bases = type(model).__bases__
    # FSDP makes a class of its own and the model's.
    return bases[1] if bases[0].__name__ == "FSDPModule" else type(model)


def largest(tensors: Iterable[Tensor]) -> Tensor:
    """Compute the largest |number| of this rank's pieces, 0-dim; NaN if one is."""
    pieces = [piece(t.detach()) for t in tensors]
    # A rank may have no row of a small weight.
    norms = torch._foreach_norm([p for p in pieces if p.numel()], float("inf"))
    return torch.stack(norms).amax() if norms else torch.zeros(())
