"""The recipes of the embedded model: what their numbers have to agree on."""

from __future__ import annotations

import pytest

from flowgrpo.config import from_json, to_json
from flowgrpo.nano import recipe as default
from flowgrpo.recipes import EMBEDDED, recipe


@pytest.mark.parametrize("name", sorted(EMBEDDED))
def test_a_recipe_is_whole(name):
    config = recipe(name)
    model = "nano_text" if name == "nano_text" else "nano"
    assert config.recipe == name and config.policy.model == config.sample.prompts == model
    assert from_json(to_json(config)) == config
    # The rate falls to the end of the run, not before and not after.
    optim = config.optim
    assert optim.decay == config.run.steps * optim.updates_per_iteration
    assert config.run.steps % config.run.eval_every == 0


def test_the_default_is_flow_grpo_and_overrides_reach_every_section():
    assert default().optim.objective == "grpo"
    changed = default(steps=7, **{"optim.lr": 1e-4, "sample.steps": 4})
    assert (changed.run.steps, changed.optim.lr, changed.sample.steps) == (7, 1e-4, 4)
