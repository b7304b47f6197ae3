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
    configurations.SD35_MEDIUM, 361_766_208, num_layers=4, dual_attention_layers=(0, 1)
)
"""4 of 24 blocks, 2 of the 13 with two attentions."""
FLUX_DEV = shorter(configurations.FLUX_DEV, 1_026_971_200, num_layers=2, num_single_layers=2)
"""2 of 19 double blocks and 2 of 38 single ones."""
FLUX2_KLEIN_4B = shorter(
    configurations.FLUX2_KLEIN_4B, 685_769_728, num_layers=1, num_single_layers=2
)
"""1 of 5 double blocks and 2 of 20 single ones."""
QWEN_IMAGE = shorter(configurations.QWEN_IMAGE, 1_060_017_216, num_layers=3)
"""3 of 60 blocks."""
WAN22_TI2V_5B = shorter(configurations.WAN22_TI2V_5B, 581_056_704, num_layers=3)
"""3 of 30 blocks."""
Z_IMAGE = shorter(configurations.Z_IMAGE, 1_089_419_328, n_layers=2)
"""2 of 30 blocks."""
