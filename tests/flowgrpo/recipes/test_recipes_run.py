"""Each form of the recipes trains: on tiny pipelines of the real classes, all else as it is."""

from __future__ import annotations

import math

import pytest

from flowgrpo import train
from flowgrpo.recipes import recipe

# What does not fit a CPU in seconds: sizes, the reward's models, evaluation. Windows, transitions,
# guidance, KL, Guard, learning rates and clip ranges are the recipe's.
SMALL = {
    "policy.device": "cpu",
    "policy.dtype": "float32",
    "sample.prompts_per_iteration": 2,
    "sample.group_size": 2,
    "sample.batch_size": 2,
    "sample.eval_steps": 2,
    "reward.weights": {"jpeg_compressibility": 1.0},
    "reward.report": ("jpeg_compressibility",),
    "run.steps": 2,
    "run.eval_prompts": 1,
    "run.progress": "none",
    "run.threads": 1,
}
NAMES = (
    "sd35m_geneval_1gpu",
    "sd35m_ocr_window_1gpu",
    "sd35m_pickscore_guard",
    "flux_pickscore_1gpu",
    "flux_pickscore_window",
    "flux2_klein_ocr_1gpu",
)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_two_iterations(name, request, tmp_path):
    family = name.partition("_")[0]
    model, resolution, length = {
        "flux": ("flux_model", 32, 16),
        # Of 512 tokens most of the time would go into its texts.
        "flux2": ("flux2_model", 16, 24),
    }.get(family, ("latent_model", 16, 0))
    model = request.getfixturevalue(model)
    sizes = {"policy.model": str(model), "policy.resolution": resolution}
    sizes["policy.max_sequence_length"] = length
    config = recipe(name, out=str(tmp_path / "run"), **sizes, **SMALL)
    summary = train.run(config)
    assert summary["max_ratio_error"] == 0
    assert summary["recipe"] == name
    for report in (summary["before"], summary["after"]):
        assert math.isfinite(report["scores"]["jpeg_compressibility"])
        assert report["guidance_scale"] == config.sample.guidance_scale
        assert "diversity" in report["quality"]
    assert (tmp_path / "run" / "config.json").read_text().count(str(model)) == 1
