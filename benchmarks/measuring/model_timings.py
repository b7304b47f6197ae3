"""Timings of whole models: a provider is built, called once to warm up, and timed call by call."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

from measuring import timers
from measuring.timing import Options, Timing
from models.cases import Case
from providers.pool import COMPILED, GPU_ONLY, PROVIDERS, Pool

LARGEST = 4_000_000_000
"""Parameters of a transformer of which all providers fit into the memory of a GPU together."""


def of(
    cases: list[Case],
    name: Callable[[Case], str],
    options: Options,
    trained: bool,
    call: Callable[[Any, Case], Callable[[], Any]],
) -> list[Timing]:
    """Timings of the cases. call: what is timed of a provider; trained: it trains."""
    pool = Pool(options.device, trained)
    providers = tuple(
        provider
        for provider in PROVIDERS
        if (options.device == "cuda" or provider not in GPU_ONLY)
        and (options.compiled or provider not in COMPILED)
    )

    def ready(case: Case, names: Sequence[str]) -> dict[str, timers.Timed]:
        pool.forget()
        timed = {}
        for provider in names:
            once = call(pool.build(provider, case), case)
            once()
            timed[provider] = functools.partial(timers.seconds, once, options.device)
        return timed

    return [
        Timing(
            name(case), providers, functools.partial(ready, case),
            together=options.device == "cpu" or case.model.family == "sd3",
        )
        for case in cases
    ]  # fmt: skip
