"""Suite `ranks`: training of nano by 1, 2, 4 processes of one machine, started by torchrun.

    python benchmarks/bench_ranks.py
    python benchmarks/bench_ranks.py --processes 1 2 --iterations 4 --rounds 1

Every run has the same configuration, so all are to write the same numbers: a run whose
metrics.jsonl differs from the first's but for "seconds" ends the suite with an error. Rows of
`nano, N processes`: `rate` (images of training a second: rollout, rewards, update, without the
first iteration), `collectives` (share of these seconds in exchanges, waiting for the others among
it), `sent` (bytes that a process sends in an iteration, the mean of all) and `oversubscribed` (1:
more processes than cores). Processes have one thread each. Rounds of all numbers of processes take
turns; figures are medians of the rounds.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from reporting import records

SECONDS = ("rollout", "reward", "update")
LIMIT = 1800.0
"""Seconds after which a run counts as hung."""


def config_of(out: Path, iterations: int) -> Any:
    """nano's default run in eight chunks an update, so that up to eight processes share it."""
    from flowgrpo.recipes import recipe

    fields = {
        "sample.batch_size": 18,
        "run.steps": iterations,
        "run.out": str(out),
        "run.eval_every": 0,
        "run.eval_prompts": 6,
        "run.eval_guidance": 1.0,
        "run.checkpoint_every": 0,
        "run.progress": "none",
        "run.threads": 1,
    }
    return recipe("nano", **fields)


def work(out: Path, iterations: int) -> None:
    """Train as one of the processes, and write what it has spent on the others."""
    from flowgrpo import train
    from flowgrpo.distributed import world
    from flowgrpo.runs.monitor import Monitor

    marks: list[tuple[float, float]] = []
    plain = Monitor.iteration

    def iteration(monitor: Monitor, *arguments: Any) -> None:
        spent = monitor.world.spent
        marks.append((spent.seconds, spent.bytes))
        plain(monitor, *arguments)
        # What monitors say to each other is no part of the next iteration.
        marks.append((spent.seconds, spent.bytes))

    Monitor.iteration = iteration
    train.run(config_of(out, iterations))
    me = world.join()
    # Ends of the first iteration and of those after it, each with its begin.
    pairs = list(zip(marks[1::2], marks[2::2], strict=False))
    totals = [sum(end[i] - begin[i] for begin, end in pairs) for i in (0, 1)]
    values = {"seconds": totals[0], "bytes": totals[1], "iterations": len(pairs)}
    (out.parent / f"spent-{me.rank}.json").write_text(json.dumps(values))


def run(count: int, iterations: int, folder: Path) -> tuple[dict[str, float], list[dict]]:
    """Train by `count` processes; figures, and the lines of metrics.jsonl without seconds."""
    folder.mkdir(parents=True)
    script = [str(Path(__file__).resolve()), "--work", str(folder / "run")]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command = [*launcher, f"--nproc-per-node={count}", *script, "--iterations", str(iterations)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=LIMIT, check=False
    )
    if done.returncode:
        raise RuntimeError(f"{count} processes ended with {done.returncode}: {done.stderr[-2000:]}")
    lines = [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()]
    timed = [line["seconds"] for line in lines if line["kind"] == "train"][1:]
    seconds = sum(line[name] for line in timed for name in SECONDS)
    spent = [json.loads(path.read_text()) for path in folder.glob("spent-*.json")]
    assert len(spent) == count
    images = len(timed) * config_of(folder, iterations).sample.rows
    figures = {
        "rate": images / seconds,
        "collectives": statistics.mean(s["seconds"] for s in spent) / seconds,
        "sent": statistics.mean(s["bytes"] / s["iterations"] for s in spent),
    }
    return figures, [{k: v for k, v in line.items() if k != "seconds"} for line in lines]


def measure(processes: list[int], iterations: int, rounds: int) -> list[dict]:
    """Rows of the record."""
    figures: dict[int, list[dict[str, float]]] = {count: [] for count in processes}
    first = None
    with tempfile.TemporaryDirectory() as temporary:
        for turn in range(rounds):
            for count in processes:
                folder = Path(temporary) / f"{count}-{turn}"
                values, lines = run(count, iterations, folder)
                first = first or lines
                if lines != first:
                    raise RuntimeError(f"{count} processes wrote other numbers than {processes[0]}")
                figures[count].append(values)
                print(f"{count} processes, round {turn + 1}: {values['rate']:.1f} images/s")
    units = {"rate": "images/s", "collectives": "1", "sent": "B"}
    cores, rows = len(os.sched_getaffinity(0)), []
    for count, values in figures.items():
        case = f"nano, {count} process{'es' if count > 1 else ''}"
        for name, unit in units.items():
            median = statistics.median(v[name] for v in values)
            rows.append(records.row("ranks", case, "ours", name, median, unit))
        rows.append(records.row("ranks", case, "ours", "oversubscribed", count > cores, "1"))
    return rows


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--iterations", type=int, default=8, help="default: 8")
    parser.add_argument("--rounds", type=int, default=3, help="default: 3")
    parser.add_argument("--out", type=Path, default=records.RESULTS / "ranks-cpu.json")
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.work is not None:
        torch.set_num_threads(1)
        work(args.work, args.iterations)
        return 0
    records.commit()
    rows = measure(args.processes, args.iterations, args.rounds)
    records.write(records.record(rows, "cpu"), args.out)
    for row in rows:
        print(f"{row['case']:20} {row['metric']:16} {row['value']:.6g} {row['unit']}")
    print(f"wrote {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
