"""Shared by every test: one torch thread, the Triton interpreter without a GPU, NaN buffers; the
whole suite in a process a core."""

from __future__ import annotations

import gc
import os
import runpy
import sys
from pathlib import Path

import pytest

# Until all tests are imported nothing is thrown away: without looking for garbage among half a
# million new objects, again and again, it takes a third less.
gc.disable()

# The tables of lines in code that torch.compile makes take a sixth of the C++ compiler's time.
os.environ.setdefault("AOT_INDUCTOR_ENABLE_LINE_TABLES", "0")

# Another kind of CPU is rehearsed from before torch is loaded: it reads its limits once.
ANOTHER_CPU = os.environ.get("FLOWGRPO_TEST_CPU", "")
if ANOTHER_CPU:
    folder = Path(__file__).parent / "support" / "another_cpu"
    if ANOTHER_CPU not in runpy.run_path(str(folder / "sitecustomize.py"))["KINDS"]:
        raise pytest.UsageError(f"FLOWGRPO_TEST_CPU is {ANOTHER_CPU!r}: avx2 or bf16 is expected")
    if "torch" in sys.modules:
        raise pytest.UsageError("FLOWGRPO_TEST_CPU: a plugin of pytest has loaded torch already")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])

import torch  # noqa: E402

from support import fork_server  # noqa: E402
from support.poison import poisoned_empty as poisoned_empty  # noqa: E402

# Triton reads this when its own library functions are decorated, so it comes before any test
# imports triton. Tests that need the compiler run in a subprocess without it.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


PROCESSES = 4
"""At most."""
LONG = (
    *("test_same_run", "test_sharding", "test_on_device_memory", "test_compare", "test_run_all"),
    *("test_process", "test_families_train", "test_on_device", "test_every_objective"),
    *("test_packaging", "test_compile", "test_faults", "test_crash_drill", "test_fused_blocks"),
    *("test_text_model", "test_monitor", "test_imports", "test_shared_prefix_graphs"),
    *("test_triton", "test_init_adapter", "test_modulation", "test_compile_blocks", "test_ops"),
    *("test_pretrain", "test_content", "test_seconds", "test_learning", "test_launches"),
)
"""Files of tests that take more than five seconds, the longest first, roughly."""


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config):
    """The whole suite, or all of it that is not slow, runs in a process a core, file by file, where
    pytest-xdist is installed; -n says otherwise. Chosen tests run in this process, where they begin
    at once; so does everything on a GPU, of which there may be one."""
    options = config.option
    whole = config.args_source is config.ArgsSource.TESTPATHS and not (
        options.keyword or options.markexpr not in ("", "not slow") or getattr(options, "lf", False)
    )
    shown = options.usepdb or options.trace or options.capture == "no"
    # Which only pytest-xdist has, and its own processes are given.
    undecided = getattr(options, "numprocesses", 0) is None and not hasattr(config, "workerinput")
    if whole and undecided and not shown and not torch.cuda.is_available():
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        # A process takes up to 2 GB.
        count = min(PROCESSES, len(os.sched_getaffinity(0)), memory >> 32)
        if count > 1:
            options.numprocesses, options.dist = count, "loadfile"
            options.loadscopereorder = False


def pytest_report_header():
    return f"rehearsing a CPU of the kind {ANOTHER_CPU}" if ANOTHER_CPU else None


def pytest_configure(config):
    torch.set_num_threads(1)


def pytest_collection_modifyitems(config, items):
    # Files that take long begin first, so that no process is left with one at the end.
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    turns = {name: turn for turn, name in enumerate(LONG)}
    items.sort(key=lambda item: (turns.get(item.path.stem, len(LONG)), item.path not in slow))
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a GPU")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop():
    """Objects of imported modules take no time in each collection of garbage from here."""
    gc.collect()
    gc.freeze()
    # Nor do tests leave so much that a look at every 700 new objects would find any.
    gc.set_threshold(20_000, 50, 100)
    gc.enable()
    fork_server.start()


def pytest_terminal_summary(terminalreporter):
    def gpu(outcome):
        reports = terminalreporter.stats.get(outcome, [])
        return sum("gpu" in getattr(report, "keywords", ()) for report in reports)

    ran, skipped = gpu("passed") + gpu("failed"), gpu("skipped")
    terminalreporter.write_line(f"GPU tests: {ran} ran, {skipped} skipped")
