"""flowgrpo compare: ways to train beside each other, on equal images and on equal seconds."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

from flowgrpo.cli.options import CompareOptions, parse
from flowgrpo.comparison.studies import STUDIES, Study, check_seeds, find_study, select_arms
from flowgrpo.config import Config, ConfigError
from flowgrpo.recipes import recipe

HELP = f"""usage: flowgrpo compare STUDY [options] [--section.field value ...]

Train the arms of a study with several seeds, and compare them on equal images and equal seconds.
STUDY is a .yaml or .json file, or one of
{{studies}}

flowgrpo compare {next(iter(STUDIES))} --help lists the options.
"""


def compare(argv: list[str]) -> int:
    """Run ``flowgrpo compare STUDY ...``.

    Returns:
        0 if all runs are finished, 1 if one failed or is missing, 130 if it was stopped.
    """
    if argv and argv[0] in ("-h", "--help"):
        print(HELP.format(studies=_list_studies()), end="")
        return 0
    if not argv or argv[0].startswith("-"):
        raise ConfigError(
            f"no study was given, but one of {', '.join(STUDIES)} or a .yaml or .json file is "
            "expected first; write, for example, flowgrpo compare methods."
        )
    study = find_study(argv[0])
    options = _parse(argv, study)
    study = study.with_budget(options.images, options.seconds)
    check_seeds(options.seeds)
    configs = study.configs(_overrides(argv[1:], options, recipe(study.recipe)))
    arms = select_arms(study, options.arms)
    from flowgrpo.comparison.compare import Comparison, run
    from flowgrpo.runs import process

    process.check_one_process(
        "flowgrpo compare",
        "start it by itself, and give --jobs as many runs at once as this machine has room for",
    )
    return run(
        Comparison(
            study=study,
            configs=configs,
            arms=arms,
            seeds=options.seeds,
            out=Path(options.out or f"runs/compare-{study.name}"),
            jobs=options.jobs,
            command=shlex.join(["flowgrpo", "compare", *argv]),
            report_only=options.report,
        )
    )


def _list_studies() -> str:
    width = max(map(len, STUDIES))
    return "\n".join(f"  {name:{width}}  {study.question}" for name, study in STUDIES.items())


def _parse(argv: list[str], study: Study) -> CompareOptions:
    """Read the options; those of the configuration have the recipe's values as defaults."""
    base = recipe(study.recipe)
    default = CompareOptions(
        study=argv[0],
        policy=base.policy,
        sample=base.sample,
        reward=base.reward,
        optim=base.optim,
        run=base.run,
    )
    return parse(CompareOptions, argv, "flowgrpo compare", default)


def _overrides(argv: list[str], options: CompareOptions, base: Config) -> dict[str, Any]:
    """List the fields that the command line sets, by dotted name, also to the recipe's value."""
    words = {word.partition("=")[0].removeprefix("--").replace("-", "_") for word in argv}
    fields = {}
    for section in ("policy", "sample", "reward", "optim", "run"):
        for name, value in vars(getattr(options, section)).items():
            if f"{section}.{name}" in words or value != getattr(getattr(base, section), name):
                fields[f"{section}.{name}"] = value
    return fields
