"""The plan's memory against the peak of iterations of the real models, counted on the meta device.

One geometry a test: the peak of an update does not depend on how many micro-steps it has.
"""

from __future__ import annotations

import pytest

import bench_counted
from flowgrpo import plan
from flowgrpo.config import replace
from models import configurations
from models.cases import Case

pytestmark = pytest.mark.slow
IDS = {
    "sd3.5-m": "stabilityai/stable-diffusion-3.5-medium",
    "flux.1-dev": "black-forest-labs/FLUX.1-dev",
    "flux.2-klein-4b": "black-forest-labs/FLUX.2-klein-base-4B",
    "flux.2-klein-9b": "black-forest-labs/FLUX.2-klein-9B",
    "qwen-image": "Qwen/Qwen-Image",
    "wan2.2-ti2v-5b": "Wan-AI/Wan2.2-TI2V-5B-Diffusers",
    "z-image": "Tongyi-MAI/Z-Image",
}
CASES = {
    "sd3 with guidance and KL": ("ours", Case(configurations.SD35_MEDIUM, 4, 2, 4.5, 1, 0.04)),
    "sd3 recomputed": ("ours-recomputed", Case(configurations.SD35_MEDIUM, 16, 2, window=1)),
    "sd3 int8": ("ours-int8", Case(configurations.SD35_MEDIUM, 12, 2, 4.5, 1, 0.04)),
    "sd3 fused": ("ours-fused", Case(configurations.SD35_MEDIUM, 9, 2, 4.5, 1, 0.04)),
    "flux": ("ours", Case(configurations.FLUX_DEV, 4, 2, window=1)),
    "flux2 4B fused": ("ours-fused", Case(configurations.FLUX2_KLEIN_4B, 4, 2, 4.0, 1, 0.04)),
    "flux2 9B": ("ours", Case(configurations.FLUX2_KLEIN_9B, 4, 2, window=1)),
    "qwen with guidance and KL": ("ours", Case(configurations.QWEN_IMAGE, 2, 2, 4.0, 1, 0.04)),
    "wan recomputed": ("ours-recomputed", Case(configurations.WAN22_TI2V_5B, 2, 2, window=1)),
    "z-image fused": ("ours-fused", Case(configurations.Z_IMAGE, 4, 2, window=1)),
    "flux fused": ("ours-fused", Case(configurations.FLUX_DEV, 4, 2, window=1)),
}


@pytest.mark.parametrize("name", CASES)
def test_the_plan_is_what_an_iteration_holds(name):
    provider, case = CASES[name]
    context, make = bench_counted.build(provider, case)
    with context as watch:
        counted = bench_counted.peak(make, watch)[2] / plan.GIB
    config = bench_counted.ours.config(case, "meta", **bench_counted.CHANGES[provider])
    sizes = plan.sizes_of(IDS[case.model.name])
    lengths = {"policy.max_sequence_length": case.model.text_tokens - sizes.fixed_tokens}
    found = plan.expected_memory(replace(config, **lengths), sizes)
    # The text encoders and the CUDA context are not counted.
    encoders = 2 * sizes.encoders / plan.GIB
    planned = found["total"] - encoders - found["overhead"]
    if found["rollout"] > found["update"]:
        # The decoder's fourth map is inside a kernel of the GPU, where nothing is counted.
        planned -= found["rollout"] / 4
    assert 0.97 < planned / counted < 1.07
