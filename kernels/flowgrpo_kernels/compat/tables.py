"""Tables for a peer's schedule, kept for as long as its tensor lives, and the rows of timesteps.

A replay streams its latents through the caches, so that each call finds Python's objects outside
of them: what is looked up here costs less than what is computed, and little code costs less than
much (a call of `transition_rows` 130 us then, and 19 us in a loop of its own).
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Hashable, Sequence
from itertools import repeat

import torch
from torch import Tensor

from ..arguments import check_tensor
from ..autograd import readable
from ..transition_rows import float32, transition_rows
from ..transitions import COLUMNS, Transitions

# By the id of a tensor: itself, the version that its entries were made of, entries.
kept_tables: dict[int, tuple[weakref.ref, int, dict]] = {}


def cached(sigmas: Tensor | Sequence[float], key: Hashable, make: Callable):
    """Returns make() of these sigmas and this key, cached until the tensor is written in place.

    At every call where they are inference tensors, whose changes nothing counts, or no tensor.
    """
    if not isinstance(sigmas, Tensor) or sigmas.is_inference():
        return make()
    owner = id(sigmas)
    known = kept_tables.get(owner)
    if known is None or known[0]() is not sigmas or known[1] != sigmas._version:
        ends = weakref.ref(sigmas, lambda ended: _forget(owner, ended))
        known = kept_tables[owner] = (ends, sigmas._version, {})
    entries = known[2]
    if key not in entries:
        # A rollout under inference_mode may be what makes it, and a backward what uses it next.
        with torch.inference_mode(False), torch.no_grad():
            entries[key] = make()
    return entries[key]


def _forget(owner: int, ended: weakref.ref) -> None:
    """Drops the entries of a tensor that is gone, unless another one has its id already."""
    if owner in kept_tables and kept_tables[owner][0] is ended:
        del kept_tables[owner]


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


class SeenRows:
    """Rows of one law for sigma pairs that the host has read: each is computed once.

    A row depends on its own inputs alone, so any batch of them has its bits.
    """

    most = 4096
    """Rows at most, and batches; beyond them it begins anew."""

    def __init__(self) -> None:
        # One object for each state, as another thread may be reading it: number of each row, the
        # rows, and batches of them.
        self.state: tuple[dict, Tensor | None, dict] = ({}, None, {})

    def find(self, values: tuple, compute: Callable[[], Tensor]) -> tuple[Tensor, Tensor]:
        """(table, row of each sample of a batch, int64 [N]).

        values: sigma, the next one, noise level and sigma_max; a number, or a tuple of N numbers.
        compute: makes the batch's rows [N, 10], for those that are new.
        """
        numbers, table, batches = self.state
        step = batches.get(values)
        if step is not None:
            return table, step
        count = max(len(x) if type(x) is tuple else 1 for x in values)
        columns = [x if type(x) is tuple else repeat(x, count) for x in values]
        keys = list(zip(*columns, strict=True))
        if any(key not in numbers for key in keys):
            numbers, table = self._with_rows(numbers, table, keys, compute)
            batches = {}
        elif len(batches) >= self.most:
            batches = {}
        step = index_tensor(tuple(numbers[key] for key in keys), table.device)
        batches[values] = step
        self.state = numbers, table, batches
        return table, step

    def _with_rows(
        self, numbers: dict, table: Tensor | None, keys: list[tuple], compute: Callable
    ) -> tuple[dict, Tensor]:
        """Adds the rows that are new: (number of each row, the rows)."""
        # Not in inference mode: a backward may be what uses it next.
        with torch.inference_mode(False), torch.no_grad():
            rows = compute()
            if table is None or len(table) + len(keys) > self.most:
                numbers, table = {}, rows[:0]
            new = {key: i for i, key in enumerate(keys) if key not in numbers}
            start = len(table)
            table = torch.cat([table, rows[list(new.values())]])
        return {**numbers, **{key: start + i for i, key in enumerate(new)}}, table


seen_rows: dict[tuple, SeenRows] = {}


def index_tensor(numbers: tuple[int, ...], device: torch.device) -> Tensor:
    """Makes an int64 tensor of numbers; on the CPU one for all calls, which must not be written."""
    if device.type == "cpu" and not torch.compiler.is_compiling():
        return _kept_index(numbers)
    return torch.tensor(numbers, dtype=torch.int64, device=device)


@functools.lru_cache(maxsize=1024)
def _kept_index(numbers: tuple[int, ...]) -> Tensor:
    with torch.inference_mode(False):
        return torch.tensor(numbers, dtype=torch.int64, device="cpu")


def rows_of_pairs(
    names: str,
    law: str,
    sigma: Tensor,
    sigma_next: Tensor,
    noise_level: float | Tensor,
    sigma_max: float | Tensor | None,
    batch: int,
    **options,
) -> tuple[Tensor, Tensor]:
    """Takes rows of `transition_rows` for `batch` samples: (table, row of each, int64 [B]).

    names: what the caller calls the arguments that may hold other than 1 or `batch` values.
    sigma, sigma_next, noise_level, sigma_max: as for `transition_rows`.
    options: the others of `transition_rows`, numbers and strings.

    Pairs on the CPU are looked up among those that were there before. Both results are shared: hand
    out copies.
    """
    values = _values(sigma, sigma_next, noise_level, sigma_max)

    def compute() -> Transitions:
        return transition_rows(law, sigma, sigma_next, noise_level, sigma_max=sigma_max, **options)

    if values is None:
        transitions = compute()
        table, step = transitions.table, transitions.row_numbers
    else:
        group = (law, *options.items())
        if group not in seen_rows:
            seen_rows[group] = SeenRows()
        table, step = seen_rows[group].find(values, lambda: compute().table)
    if len(step) == batch:
        return table, step
    if len(step) != 1:
        raise ValueError(f"{names} must hold 1 or {batch} values, got {len(step)}")
    return table, step.expand(batch)


def _values(*inputs: float | Tensor | None) -> tuple | None:
    """Reads inputs of rows: a number or a tuple of numbers each; None where the host would wait for
    them, or where `transition_rows` has something to say about them."""
    if torch.compiler.is_compiling():
        return None
    count, values = 1, []
    for x in inputs:
        if x is None or type(x) is float:
            values.append(x)
            continue
        if not isinstance(x, Tensor) or x.device.type != "cpu" or not x.is_floating_point():
            return None
        if not readable(x) or x.ndim > 1 or x.numel() == 0:
            return None
        numbers = x.tolist()
        if x.ndim == 1 and len(numbers) != 1:
            if count not in (1, len(numbers)):
                return None
            count, numbers = len(numbers), tuple(numbers)
        values.append(numbers[0] if type(numbers) is list else numbers)
    return tuple(values)


def pairs(sigmas: Tensor, device: torch.device) -> Tensor:
    """Returns sigma and the next one of each step, [T + 1, 2], with a row of NaN at the end."""

    def make() -> Tensor:
        moved = sigmas.detach().to(device)
        steps = torch.stack([moved[:-1], moved[1:]], 1)
        return torch.cat([steps, torch.full_like(steps[:1], float("nan"))])

    return cached(sigmas, ("pairs", device), make)


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
    return steps[0] if len(steps) == 1 else index_tensor(tuple(steps), device)


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
    if isinstance(timestep, Tensor) and timestep.dtype == known.dtype:
        return timestep.tolist() if timestep.ndim == 1 else timestep.reshape(-1).tolist()
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
        known = cached(host, device, lambda: host.to(device))
    values = torch.as_tensor(timestep, device=device).reshape(-1)
    if known.is_floating_point():
        values = values.to(known.dtype)
    equal = values[:, None] == known
    return torch.where(equal.any(1), equal.to(torch.int64).argmax(1), len(known))


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
