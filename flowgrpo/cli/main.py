"""The command line: flowgrpo train, compare, evaluate, sample, curate, plan, doctor, ...

A mistake of the user's is one sentence on stderr and exit code 2; a model whose numbers are none,
or a run that cannot go on, is one sentence and code 1. A run that was stopped by Ctrl-C and saved
exits with 130, one whose output nobody reads any more with 141.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import textwrap
import warnings
from collections.abc import Callable
from typing import Any

from flowgrpo import __version__
from flowgrpo.cli.options import EvaluateOptions, SampleOptions, ServeOptions, gather, parse
from flowgrpo.cli.train import train
from flowgrpo.config import ConfigError
from flowgrpo.curation.options import CurateOptions
from flowgrpo.recipes import RECIPES

USAGE = f"""flowgrpo {__version__}: Flow-GRPO, online RL for flow-matching text-to-image models

usage: flowgrpo train [RECIPE] [--section.field value ...]   train
       flowgrpo compare STUDY [options]                      train several ways, on equal budgets
       flowgrpo evaluate RUN_DIR [options]                   score a run against its base model
       flowgrpo evaluate MODEL --adapter DIR [options]       the same for any LoRA adapter
       flowgrpo evaluate --images DIR ... [options]          score pictures of other systems
       flowgrpo evaluate --table DIR DIR ...                 evaluations in one table
       flowgrpo sample PROMPT ... [options]                  write pictures
       flowgrpo curate SOURCE ... --out DIR [options]        choose image-text pairs by rewards
       flowgrpo serve-reward NAME [options]                  serve a reward by HTTP
       flowgrpo plan [RECIPE] [--gpus N]                     show a run's arithmetic and memory
       flowgrpo doctor                                       show what this machine offers

RECIPE is nano, module:function or file.py:function of your own, or one of
{textwrap.fill(", ".join(sorted(set(RECIPES) - {"nano"})), 96, break_on_hyphens=False)}

flowgrpo COMMAND --help lists the options of a command.
"""


def main(argv: list[str] | None = None) -> int:
    """Run one command and return the exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    # PEFT imports it where it is installed, and it warns of CPU kernels that nothing here calls.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    commands: dict[str, Callable[[list[str]], int]] = {
        "train": train,
        "compare": compare,
        "evaluate": evaluate,
        "sample": sample,
        "curate": curate,
        "serve-reward": serve_reward,
        "plan": plan,
        "doctor": doctor,
    }
    try:
        if not argv or argv[0] in ("-h", "--help"):
            print(USAGE, end="")
            return 0 if argv else 2
        if argv[0] == "--version":
            print(__version__)
            return 0
        if argv[0] not in commands:
            raise ConfigError(
                f"{argv[0]!r} is no command, but one of {', '.join(commands)} is expected; see "
                "flowgrpo --help."
            )
        _quiet()
        _print_everything()
        # So that my_rewards.py in the working directory is found; last, so that it shadows nothing.
        # There is none where the directory was removed.
        with contextlib.suppress(OSError):
            if os.getcwd() not in sys.path:
                sys.path.append(os.getcwd())
        return commands[argv[0]](argv[1:])
    except ConfigError as error:
        if not _is_said_elsewhere(error):
            print(f"error: {_on_one_line(str(error))}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        # The reader of the output, such as `| head`, has enough. Python writes the rest of it when
        # it ends, which would fail once more.
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except KeyboardInterrupt:
        if os.environ.get("RANK", "0") == "0":
            print("aborted", file=sys.stderr)
        return 130


# A command's own file is imported once its options are read: torch takes seconds, `--help` none.
def evaluate(argv: list[str]) -> int:
    """Run ``flowgrpo evaluate RUN_DIR | --images DIR ... | --table DIR ...``."""
    argv = gather(argv, "--images", "--quality-images", "--label", "--table")
    options = parse(EvaluateOptions, argv, "flowgrpo evaluate")
    if options.images or options.quality_images or options.table:
        from flowgrpo.cli.evaluate_images import evaluate_images, merge_tables

        _one_process("flowgrpo evaluate of pictures and tables")
        (merge_tables if options.table else evaluate_images)(options)
        return 0
    from flowgrpo.cli.evaluate import evaluate_run

    return _run(evaluate_run, options)


def compare(argv: list[str]) -> int:
    """Run ``flowgrpo compare STUDY [--section.field value ...]``."""
    from flowgrpo.cli.compare import compare as compare_study

    return compare_study(argv)


def sample(argv: list[str]) -> int:
    """Run ``flowgrpo sample PROMPT ...``."""
    options = parse(SampleOptions, argv, "flowgrpo sample")
    from flowgrpo.cli.sample import sample_pictures

    return _run(sample_pictures, options)


def curate(argv: list[str]) -> int:
    """Run ``flowgrpo curate SOURCE ... --out DIR``."""
    options = parse(CurateOptions, argv, "flowgrpo curate")
    _one_process("flowgrpo curate")
    from flowgrpo.cli.curate import curate_sources

    curate_sources(options)
    return 0


def serve_reward(argv: list[str]) -> int:
    """Run ``flowgrpo serve-reward NAME [--host --port --token]``."""
    options = parse(ServeOptions, argv, "flowgrpo serve-reward")
    _one_process("flowgrpo serve-reward")
    from flowgrpo.rewards.remote.serve import serve

    serve(options.name, options.host, options.port, options.token)
    return 0


def plan(argv: list[str]) -> int:
    """Run ``flowgrpo plan [RECIPE] [--gpus N]``."""
    from flowgrpo.cli.plan import show_plan

    show_plan(argv)
    return 0


def doctor(argv: list[str]) -> int:
    """Run ``flowgrpo doctor``."""
    if argv and argv[0] not in ("-h", "--help"):
        raise ConfigError(f"doctor takes no options, but {argv[0]!r} was given; leave it out.")
    if argv:
        print(
            "usage: flowgrpo doctor\n\nShow versions, devices, backends, and what is off and why."
        )
        return 0
    _one_process("flowgrpo doctor")
    from flowgrpo.cli.doctor import doctor as examine

    examine()
    return 0


def _run(command: Callable[[Any], object], options: Any) -> int:
    """Run a command that samples images; 1 if they are no numbers, or another process failed."""
    from flowgrpo.distributed.world import PeerError, reporting
    from flowgrpo.sampling.finite import NotFiniteError

    try:
        with reporting():
            command(options)
    except (NotFiniteError, PeerError) as error:
        if not _is_said_elsewhere(error):
            print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _one_process(command: str) -> None:
    """Raise ConfigError if a launcher started several of a command that is one process."""
    from flowgrpo.runs.process import check_one_process

    check_one_process(command, "start it by itself")


def _is_said_elsewhere(error: BaseException) -> bool:
    """Tell if another process of the run says this."""
    if "RANK" not in os.environ:
        return False
    from flowgrpo.distributed.world import is_said_elsewhere

    return is_said_elsewhere(error)


def _on_one_line(text: str) -> str:
    """Write line breaks and control characters, as of a path or a file, as Python does."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def _print_everything() -> None:
    """Let a terminal or file that cannot encode a character show its number."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def _quiet() -> None:
    """Keep the libraries' notices and loading bars out of the output; downloads still show."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    warnings.filterwarnings("ignore", category=FutureWarning, module="diffusers")
