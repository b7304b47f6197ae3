"""A recipe's last step: the user's own values, and the rows of a forward."""

from __future__ import annotations

from typing import Any

from flowgrpo import plan
from flowgrpo.config import Config, replace


def fit(config: Config, memory: float | None, overrides: dict[str, Any]) -> Config:
    """Apply `overrides`, and choose the rows of a forward unless they are among them.

    Args:
        config: the recipe's own numbers.
        memory: GiB of the GPU, from which the rows of a forward follow; None: what is there.
        overrides: fields of `run` by their names, or any by its dotted name.
    """
    changes = {name if "." in name else f"run.{name}": value for name, value in overrides.items()}
    rows = changes.pop("sample.batch_size", None)
    config = replace(config, **changes)
    if rows is not None:
        return replace(config, **{"sample.batch_size": rows})
    return plan.fit_batch_size(config, memory)
