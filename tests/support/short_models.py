"""The real models with fewer blocks, for counts on the meta device: each kind of block is there, at
its real sizes, and an iteration takes a fraction of the time."""

from __future__ import annotations

from dataclasses import replace

from models import configurations
from models.configurations import Model


def shorter(model: Model, parameters: int, **transformer) -> Model:
    """`model` with these settings of its transformer, which then has so many parameters."""
    settings = {**model.transformer, **transformer}
    return replace(model, transformer=settings, parameters=parameters)


SD35_MEDIUM = shorter(
    configurations.SD35_MEDIUM,
    734_742_080,
    num_layers=8,
    dual_attention_layers=tuple(range(4)),
)
"""8 of 24 blocks, 4 of the 13 with two attentions."""
FLUX_DEV = shorter(configurations.FLUX_DEV, 2_556_184_640, num_layers=4, num_single_layers=8)
"""4 of 19 double blocks and 8 of 38 single ones."""
FLUX2_KLEIN_4B = shorter(
    configurations.FLUX2_KLEIN_4B, 1_421_871_616, num_layers=2, num_single_layers=6
)
"""2 of 5 double blocks and 6 of 20 single ones."""
FLUX2_KLEIN_9B = shorter(
    configurations.FLUX2_KLEIN_9B, 2_535_459_328, num_layers=2, num_single_layers=6
)
"""2 of 8 double blocks and 6 of 24 single ones."""
QWEN_IMAGE = shorter(configurations.QWEN_IMAGE, 2_759_173_696, num_layers=8)
"""8 of 60 blocks."""
WAN22_TI2V_5B = shorter(configurations.WAN22_TI2V_5B, 581_056_704, num_layers=3)
"""3 of 30 blocks."""
Z_IMAGE = shorter(configurations.Z_IMAGE, 1_451_240_000, n_layers=4)
"""4 of 30 blocks."""
