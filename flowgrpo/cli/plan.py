"""flowgrpo plan: the arithmetic of a run before anything is loaded, on one GPU or many."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table
from rich.text import Text

from flowgrpo import plan
from flowgrpo.cli.options import option_value
from flowgrpo.cli.train import parse_train
from flowgrpo.config import ConfigError
from flowgrpo.runs.display import Terminal

USAGE = """usage: flowgrpo plan [RECIPE] [--gpus N] [--memory GIB] [--section.field value ...]

Print how an iteration is dealt to N GPUs, which share of their time is idle, what each sends, and
the memory that it needs. No model is loaded.

  --gpus N      processes, one a GPU; default 1
  --memory GIB  memory of a GPU; default: what this machine's has

Other options are those of flowgrpo train.
"""


def show_plan(argv: list[str], console: Console | None = None) -> dict[str, str]:
    """Print the plan of a `train` command line with --gpus and --memory, and return it."""
    console = console or Terminal(highlight=False)
    if set(argv) & {"-h", "--help"}:
        print(USAGE, end="")
        return {}
    if argv and not argv[0].startswith("-") and len(argv) > 1 and not argv[1].startswith("-"):
        raise ConfigError(f"plan takes one recipe, but {argv[1]!r} was given too; leave it out.")
    gpus, argv = _number(argv, "--gpus", 1)
    memory, argv = _number(argv, "--memory", 0)
    config = parse_train(argv)
    lines = plan.plan_lines(config, memory or plan.gpu_memory(), gpus)
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", no_wrap=True)
    table.add_column()
    for name, text in lines.items():
        table.add_row(name, Text(text))
    console.print(Text(f"flowgrpo {config.recipe}", style="bold"))
    console.print(table)
    return lines


def _number(argv: list[str], name: str, default: int) -> tuple[int, list[str]]:
    """Take the option `name`, a whole number above 0, out of `argv`."""
    text = option_value(argv, name)
    if text is None:
        if name in argv:
            raise ConfigError(f"{name} has no value, but a number is expected; write {name} 8.")
        return default, argv
    if not text.isdecimal() or int(text) < 1:
        raise ConfigError(
            f"{name} is {text!r}, but a whole number above 0 is expected; write, for example, "
            f"{name} 8."
        )
    joined = f"{name}={text}"
    if joined in argv:
        return int(text), [word for word in argv if word != joined]
    place = argv.index(name)
    return int(text), argv[:place] + argv[place + 2 :]
