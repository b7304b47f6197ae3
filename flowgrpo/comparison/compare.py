"""A comparison from its study to its tables: train what is not finished, read, write, show."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rich.console import Console

from flowgrpo import files, plan
from flowgrpo.comparison import picture, record, table
from flowgrpo.comparison.folder import Folder, Run, attempts, plan_runs
from flowgrpo.comparison.progress import Display
from flowgrpo.comparison.report import Report, make_report
from flowgrpo.comparison.running import Launch, Runner, Slots, share_machine
from flowgrpo.comparison.studies import Study
from flowgrpo.config import Config, ConfigError
from flowgrpo.evaluation.table import print_whole
from flowgrpo.objectives import objective_of
from flowgrpo.rewards.differentiable import differentiable_rewards
from flowgrpo.runs.display import Terminal
from flowgrpo.runs.process import stoppable


@dataclass(frozen=True)
class Comparison:
    """One call of ``flowgrpo compare``."""

    study: Study
    """With its budget."""
    configs: Mapping[str, Config]
    """Label -> configuration of all arms, of `Study.configs`."""
    arms: tuple[str, ...]
    """Labels of those that are compared."""
    seeds: tuple[int, ...]
    out: Path
    jobs: int | Literal["auto"]
    command: str
    """Command line, for comparison.json and for who goes on."""
    report_only: bool = False
    """Train nothing."""


def run(
    comparison: Comparison, console: Console | None = None, launch: Launch | None = None
) -> int:
    """Train the runs of a comparison that are not finished; write and show what there is.

    Args:
        launch: starts a process, see `Runner`.

    Returns:
        0 if all runs are finished, 1 if one failed or is missing, 130 if they were stopped.
    """
    console = console or Terminal(highlight=False)
    study, out, seeds = comparison.study, comparison.out, comparison.seeds
    configs = {arm: comparison.configs[arm] for arm in comparison.arms}
    if not comparison.report_only:
        _check_objectives(study, configs)
    first, code = configs[comparison.arms[0]], 0
    slots = share_machine(comparison.jobs, len(configs) * len(seeds), first)
    runs = plan_runs(study, configs, seeds, out, slots.threads)
    with Folder.open(out, study, comparison.configs) as folder:
        if not comparison.report_only:
            code = _train(folder, runs, slots, comparison.command, console, launch)
        report = make_report(study, comparison.arms, seeds, runs, out)
        write(report, out, comparison.command)
    show(report, out, console)
    return code or (0 if report.complete else 1)


def _check_objectives(study: Study, configs: Mapping[str, Config]) -> None:
    """Raise ConfigError if an arm has an objective that is not there, or one that needs rewards
    with a gradient, and others."""
    for arm, config in configs.items():
        try:
            if objective_of(config).differentiable:
                differentiable_rewards(config.reward)
        except ConfigError as error:
            raise ConfigError(
                f"arm {arm!r} of the study {study.name} cannot be trained: {error} Name the others "
                "by --arms to compare them without it."
            ) from error


def expected_bytes(config: Config) -> int:
    """Expect the bytes that a run takes, by the sizes of its model; 0 where they are not known."""
    sizes = plan.sizes_of(config.policy.model, config.policy.variant)
    if sizes is None or config.policy.adapter == "full":
        return 0
    return int(plan.expected_memory(config, sizes)["total"] * plan.GIB)


def _train(
    folder: Folder,
    runs: Sequence[Run],
    slots: Slots,
    command: str,
    console: Console,
    launch: Launch | None,
) -> int:
    """Run what is not finished. Returns 1 if a run failed, 130 if they were stopped."""
    before = [attempt for entries in attempts(folder.path).values() for attempt in entries]
    measured = max((attempt.peak_bytes for attempt in before), default=0)
    stopped, failed = False, False
    with Display(console, runs, folder) as display, stoppable() as stop:
        need = measured or expected_bytes(runs[0].config)
        runner = Runner(folder, runs, slots, need, display.change, launch)
        display.runner = runner
        if runner.waiting:
            display.note(_plan_line(runs, runner, slots))
        try:
            runner.loop(stop, display.tick)
        except KeyboardInterrupt:
            stopped = True
        stopped, failed = stopped or stop.requested, bool(runner.failed)
    if stopped:
        console.print(f"Stopped; go on with: {command}", soft_wrap=True, markup=False)
        return 130
    return 1 if failed else 0


def _plan_line(runs: Sequence[Run], runner: Runner, slots: Slots) -> str:
    """Say what is going to be run, and on what."""
    where = f"GPUs {', '.join(slots.gpus)}" if slots.gpus else "the CPU"
    threads = "thread" if slots.threads == 1 else "threads"
    memory = ", as memory allows" if slots.by_memory and slots.count > 1 else ""
    return (
        f"{len(runs)} runs, {len(runs) - len(runner.waiting)} of them finished; up to "
        f"{slots.count} at once on {where}, with {slots.threads} {threads} each{memory}."
    )


def write(report: Report, out: Path, command: str) -> None:
    """Write table.md, comparison.json and, once a run is finished, comparison.png."""
    files.write_text(out / "table.md", table.markdown(report))
    record.write(report, command, out / "comparison.json")
    if report.base is not None:
        picture.draw(report, out / "comparison.png")


def show(report: Report, out: Path, console: Console) -> None:
    """Print the tables, and what stands below them."""
    if report.study.question:
        console.print(report.study.question, soft_wrap=True, markup=False)
    for axis in table.AXES:
        print_whole(console, table.rich_table(table.cells(report, axis)))
        console.print()
    for line in table.lines_below(report):
        console.print(line, soft_wrap=True, markup=False)
    names = ["table.md", "comparison.json", *(["comparison.png"] if report.base else [])]
    console.print(f"Written to {out}: {', '.join(names)}.", soft_wrap=True, markup=False)
    if report.base is None:
        print("No run is finished, so there is nothing to compare yet.", file=sys.stderr)
