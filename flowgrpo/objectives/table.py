"""The objectives by name; a new one is a line here."""

from __future__ import annotations

import dataclasses

from flowgrpo.config import Config, ConfigError
from flowgrpo.config.validation import require, similar
from flowgrpo.objectives import awm, dpo, grpo, nft, opd, orw, refl, sft
from flowgrpo.objectives.interface import Objective

OBJECTIVES: dict[str, Objective] = {
    "grpo": grpo.OBJECTIVE,
    "awm": awm.OBJECTIVE,
    "nft": nft.OBJECTIVE,
    "sft": sft.OBJECTIVE,
    "orw": orw.OBJECTIVE,
    "dpo": dpo.OBJECTIVE,
    "opd": opd.OBJECTIVE,
    "refl": refl.OBJECTIVE,
}
"""`optim.objective` -> its row."""


def objective_of(config: Config) -> Objective:
    """Look up the row that `optim.objective` names.

    Raises:
        ConfigError: there is no row of that name, or the configuration does not fit the objective.
    """
    name = config.optim.objective
    if name not in OBJECTIVES:
        raise ConfigError(
            f"optim.objective is {name!r}{similar(name, OBJECTIVES)}, but one of "
            f"{', '.join(OBJECTIVES)} is expected; choose one."
        )
    objective = OBJECTIVES[name]
    if config.sample.curated and objective.offline is not None:
        objective = objective.offline
    check_options(name, objective, config)
    check_rollout(name, objective, config)
    check_shares(name, objective, config)
    check_mixture(name, objective, config)
    check_teacher(name, objective, config)
    check_rewards(name, objective, config)
    return objective


def check_options(name: str, objective: Objective, config: Config) -> None:
    """Raise for a field with another value than its default that `objective` does not read."""
    special = {field for row in OBJECTIVES.values() for field in fields_of(row)}
    for path in sorted(special - set(objective.options)):
        section, field = path.split(".")
        values = getattr(config, section)
        [default] = [f.default for f in dataclasses.fields(values) if f.name == field]
        value = getattr(values, field)
        readers = ", ".join(key for key, row in OBJECTIVES.items() if path in fields_of(row))
        require(
            value == default,
            f"{path} is {value!r} with optim.objective {name}, which does not read it; leave it at "
            f"{default!r}, or choose one of {readers}.",
        )


def fields_of(objective: Objective) -> tuple[str, ...]:
    """List the fields that an objective reads, also in its form for a curated set."""
    offline = objective.offline
    return objective.options if offline is None else (*objective.options, *offline.options)


def check_mixture(name: str, objective: Objective, config: Config) -> None:
    """Raise for a curated set without a use, or a weight without a set."""
    curated, weight = config.sample.curated, config.optim.sft_weight
    require(
        bool(curated) or not weight,
        f"optim.sft_weight is {weight:g}, but sample.curated names no set to learn from; name the "
        "folder of one that `flowgrpo curate` wrote, or set the weight to 0.",
    )
    require(
        not curated or objective.rollout == "none" or weight > 0,
        f"sample.curated is {curated!r} with optim.objective {name} and optim.sft_weight 0, so "
        "nothing would be learnt from it; set a weight, or leave sample.curated empty.",
    )


def check_teacher(name: str, objective: Objective, config: Config) -> None:
    """Raise for an objective that needs a teacher, without one."""
    require(
        "optim.teacher" not in objective.options or bool(config.optim.teacher),
        f"optim.teacher is empty with optim.objective {name}, but the adapter to learn from is "
        "expected; name its folder, file or Hub repository.",
    )


def check_rewards(name: str, objective: Objective, config: Config) -> None:
    """Raise for what a loss that asks the rewards itself cannot have."""
    if not objective.differentiable:
        return
    require(
        config.optim.capture == "off",
        f"optim.capture is on with optim.objective {name}, whose loss asks the rewards and cannot "
        "be captured; set it to off.",
    )
    require(
        config.reward.normalize == "none",
        f"reward.normalize is {config.reward.normalize!r} with optim.objective {name}, which "
        "learns by the gradient of the plain weighted sum; set it to none.",
    )


def check_rollout(name: str, objective: Objective, config: Config) -> None:
    """Raise for groups whose images would all be equal."""
    require(
        objective.rollout != "deterministic" or not config.sample.shared_noise,
        f"sample.shared_noise is on with optim.objective {name}, whose rollout is deterministic: "
        "the images of a group would all be the same; turn it off.",
    )


def check_shares(name: str, objective: Objective, config: Config) -> None:
    """Raise unless every optimizer step gets the same number of micro-steps."""
    count, updates = (
        len(objective.micro_steps(config, config.sample.rows)),
        config.optim.updates_per_iteration,
    )
    require(
        count % updates == 0,
        f"optim.updates_per_iteration is {updates} with optim.objective {name}, but it must divide "
        f"the {count} micro-steps of an iteration (sample.prompts_per_iteration "
        f"{config.sample.prompts_per_iteration}); change one.",
    )
