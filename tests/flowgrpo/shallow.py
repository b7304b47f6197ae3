"""The real models with few blocks: every kind of block in its place, all other sizes as they are.

What a block does, waits for and keeps is the same in each of its kind; a tenth of the blocks take a
tenth of the time on the meta device.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
try:
    import models
finally:
    sys.path.remove(str(BENCHMARKS))


def of(model: models.Model, parameters: int, **blocks) -> models.Model:
    """`model` with `blocks` in place of its own numbers of them, and `parameters` in all."""
    return replace(model, transformer={**model.transformer, **blocks}, parameters=parameters)


# Two blocks with a second attention, one without, and the last one.
SD3 = of(models.SD35_MEDIUM, 361_766_208, num_layers=4, dual_attention_layers=(0, 1))
FLUX = of(models.FLUX_DEV, 1_168_563_008, num_layers=2, num_single_layers=3)
