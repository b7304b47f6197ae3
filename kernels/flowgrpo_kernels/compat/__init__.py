"""Other projects' functions by their own signatures, one module per project.

tables.py    a schedule's table, and the rows of timesteps, without a host read
steps.py     sampling and scoring with mean and x0, one pass each
patch.py     replacing and putting back, after a comparison of signatures
"""

import importlib

_PROJECTS = (
    "dance_grpo", "flow_factory", "flow_grpo", "miles", "mixgrpo", "precise", "unirl", "verl_omni",
)  # fmt: skip


def __getattr__(name: str):
    # Imported when first asked for, as the package's own rooms.
    if name in _PROJECTS:
        return importlib.import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
