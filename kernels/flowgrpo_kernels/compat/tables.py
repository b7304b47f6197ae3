"""Tables for a peer's schedule, kept for as long as its tensor lives, and the rows of timesteps."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from ..arguments import check_tensor
from ..autograd import readable
from ..transition_rows import float32, transition_rows
from ..transitions import COLUMNS, Transitions

_tables: WeakIdKeyDictionary = WeakIdKeyDictionary()


def cached(sigmas: Tensor | Sequence[float], key: Hashable, make: Callable):
    """Returns make() of these sigmas and this key, cached until the tensor is written in place.

    At every call where they are inference tensors, whose changes nothing counts, or no tensor.
    """
    if not isinstance(sigmas, Tensor) or sigmas.is_inference():
        return make()
    version, entries = _tables.get(sigmas, (None, None))
    if version != sigmas._version:
        entries = {}
        _tables[sigmas] = (sigmas._version, entries)
    if key not in entries:
        # A rollout under inference_mode may be what makes it, and a backward what uses it next.
        with torch.inference_mode(False), torch.no_grad():
            entries[key] = make()
    return entries[key]


def with_poison(transitions: Transitions) -> Transitions:
    """Adds a row of NaN behind the last one, for timesteps that the schedule does not have."""
    table = transitions.table
    poison = torch.full_like(table[:1], float("nan"))
    # Noise is counted by integers.
    poison[:, COLUMNS.index("noise_step")] = 0.0
    rows = torch.arange(len(table) + 1, device=table.device)
    kinds = (*transitions.kinds, transitions.kinds[-1])
    return Transitions(torch.cat([table, poison]), transitions.sigmas, kinds, rows)


def schedule(
    sigmas: Tensor, law: str, noise_level: float | Tensor, device: torch.device, **options
) -> Transitions:
    """Makes the table of a schedule's steps by `transition_rows`, and a row of NaN behind them.

    sigmas: [T + 1] on any device. noise_level: a number, or a tensor [T]. Not cached.
    """
    sigmas = sigmas.detach().to(device)
    if isinstance(noise_level, Tensor):
        noise_level = noise_level.to(device)
    options.setdefault("sigma_max", sigmas[1])
    steps = torch.arange(len(sigmas) - 1, device=device)
    rows = transition_rows(law, sigmas[:-1], sigmas[1:], noise_level, noise_step=steps, **options)
    return with_poison(rows)


def pairs(sigmas: Tensor, device: torch.device) -> Tensor:
    """Returns sigma and the next one of each step, [T + 1, 2], with a row of NaN at the end."""

    def make() -> Tensor:
        moved = sigmas.detach().to(device)
        steps = torch.stack([moved[:-1], moved[1:]], 1)
        return torch.cat([steps, torch.full_like(steps[:1], float("nan"))])

    return cached(sigmas, ("pairs", str(device)), make)


def second(sigmas: Tensor, device: torch.device) -> Tensor:
    """Returns the second sigma, which stands for one of 1 in 1 - sigma: 0-dim on the device."""
    return pairs(sigmas, device)[0, 1]


def pair_at(sigmas: Tensor, step: int | Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """Takes (sigma, the next one) of steps: [1] for an int, else [N]; NaN where there is none."""
    known = pairs(sigmas, device)
    chosen = known[step : step + 1] if isinstance(step, int) else known.index_select(0, step)
    return chosen.unbind(1)


def per_row(name: str, value: Tensor, device: torch.device) -> Tensor:
    """Checks a tensor of one value or one a row, of any shape: 0-dim or [N] on the device."""
    check_tensor(name, value)
    if value.device != device:
        # As peers do; a copy from the host.
        value = value.to(device)
    return value if value.ndim < 2 else value.reshape(-1)


def find_step(timestep, known: Tensor, batch: int, device: torch.device) -> int | Tensor:
    """Finds timesteps among a scheduler's: an int for one, else int64 [B] on the device.

    timestep: a number, or a tensor of 1 or B values. Numbers and tensors on the CPU are looked up
    by the host, which reads `known` once. On another device nothing is read: a timestep that the
    scheduler does not have gets the number of the row of NaN behind the table.
    """
    if isinstance(timestep, Tensor):
        check_tensor("timestep", timestep)
        if timestep.device.type == "meta" != device.type:
            raise ValueError("timestep must hold values, got a tensor on meta")
        on_host = timestep.device.type == "cpu" and readable(timestep)
        count = timestep.numel()
        if count not in (1, batch):
            raise ValueError(f"timestep must hold 1 or {batch} values, got {count}")
    else:
        on_host, count = True, 1
    if not on_host or known.device.type == "meta" or torch.compiler.is_compiling():
        return _find_on_device(timestep, known, device)
    values = _host_values(timestep, known)
    if len(values) not in (1, batch):
        raise ValueError(f"timestep must hold 1 or {batch} values, got {len(values)}")
    index = cached(known, "index", lambda: _index(known))
    try:
        steps = [index[value] for value in values]
    except KeyError:
        raise ValueError(
            f"timestep must be among the scheduler's timesteps, got {values}"
        ) from None
    return steps[0] if len(steps) == 1 else torch.tensor(steps, device=device)


def _index(known: Tensor) -> dict[float, int]:
    """Maps each timestep to its step, the first where one is twice there."""
    values = known.tolist()
    return {value: len(values) - 1 - i for i, value in enumerate(reversed(values))}


def _host_values(timestep, known: Tensor) -> list[float]:
    """Lists timesteps as the scheduler's tensor would hold them."""
    if type(timestep) in (int, float) and known.dtype == torch.float32:
        try:
            return [float32(timestep)]
        except OverflowError:
            return [float(timestep)]
    dtype = known.dtype if known.is_floating_point() else None
    try:
        values = torch.as_tensor(timestep, dtype=dtype, device="cpu").reshape(-1)
    except (TypeError, ValueError, OverflowError, RuntimeError) as error:
        raise TypeError(
            f"timestep must be a number or a tensor, got {type(timestep).__name__}"
        ) from error
    return values.tolist()


def _find_on_device(timestep, known: Tensor, device: torch.device) -> Tensor:
    if known.device != device:
        host = known
        known = cached(host, str(device), lambda: host.to(device))
    values = torch.as_tensor(timestep, device=device).reshape(-1)
    if known.is_floating_point():
        values = values.to(known.dtype)
    equal = values[:, None] == known
    step = torch.where(equal.any(1), equal.to(torch.int64).argmax(1), len(known))
    return step


def rows_at(transitions: Transitions, step: int | Tensor, batch: int) -> tuple[Tensor, Tensor]:
    """Takes rows of a table: (step int64 [B], a copy of the rows [N, 10]), N = 1 for one step."""
    if not isinstance(step, Tensor):
        # What is handed out may be written to; the table serves the next step.
        rows = transitions.table[step : step + 1].clone()
        return transitions.row_numbers[step].expand(batch), rows
    return step.expand(batch), transitions.table.index_select(0, step)


def column(rows: Tensor, name: str, ndim: int) -> Tensor:
    """Takes a column of rows [N, 10], shaped to broadcast with latents: [N, 1, ...]."""
    return rows[:, COLUMNS.index(name)].view(-1, *[1] * (ndim - 1))
