"""A tiny run for the tests of the shell: pipeline, prompts, reward, configuration."""

from __future__ import annotations

import json
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
from pathlib import Path

from safetensors.torch import load_file

import flowgrpo_kernels
from flowgrpo.config import Config, replace
from flowgrpo.evaluation import pictures
from support import pipelines

ROOT = Path(__file__).resolve().parents[2]
PROMPTS = {
    "a red circle": "colors",
    "a blue square": "colors",
    "a green triangle": "colors",
    "two circle": "counting",
    "three square": "counting",
    "a dark circle": "single_object",
}


def red(images, prompts, metadata):
    """Redder images are better."""
    pixels = images.float()
    return (pixels[:, 0] - pixels[:, 2]).mean((1, 2)) / 255


def red_until_killed(images, prompts, metadata):
    """`red`, but where $FLOWGRPO_TEST_KILL names a run directory that has two iterations behind it,
    the process dies, once."""
    folder = Path(os.environ.get("FLOWGRPO_TEST_KILL", "/none"))
    lines, done = folder / "metrics.jsonl", folder / "killed"
    mine = f"--run.resume {folder}" in " ".join(sys.argv)
    begun = mine and lines.exists() and not done.exists()
    if begun and '"iteration": 2, "kind": "train"' in lines.read_text():
        done.write_text("")
        os.kill(os.getpid(), signal.SIGKILL)
    return red(images, prompts, metadata)


SMALL = {
    "recipe": "tiny",
    "policy.device": "cpu",
    "policy.lora_rank": 4,
    "sample.prompts_per_iteration": 2,
    "sample.group_size": 4,
    "sample.batch_size": 4,
    "sample.steps": 4,
    "sample.eval_steps": 3,
    "sample.window_size": 2,
    "reward.weights": {"support.processes:red": 1.0},
    "optim.lr": 1e-2,
    "optim.warmup": 3,
    "optim.ema_every": 1,
    "run.steps": 6,
    "run.eval_every": 2,
    "run.eval_prompts": 3,
    "run.checkpoint_every": 2,
    "run.threads": 1,
}
"""Fields of a run of a second or two."""


def small() -> Config:
    """A recipe without model and prompts."""
    return replace(Config(), **SMALL)


def save_inputs(folder: Path) -> dict[str, str]:
    """Write a pipeline and prompts under `folder`, and return the fields that name them."""
    model = folder / "model"
    if not model.exists():
        pipelines.save_pixel_pipeline(model)
    prompts = folder / "prompts.jsonl"
    if not prompts.exists():
        # At once: another process may be reading.
        lines = [json.dumps({"prompt": p, "tag": t}) for p, t in PROMPTS.items()]
        whole = folder / f"prompts-{os.getpid()}"
        whole.write_text("\n".join(lines))
        whole.replace(prompts)
    return {"policy.model": str(model), "sample.prompts": str(prompts)}


def make(folder: Path, **changes) -> Config:
    """A pipeline and prompts under `folder`, and the configuration of a run of a second or two."""
    return replace(small(), **{"run.out": str(folder / "run"), **save_inputs(folder), **changes})


def environment() -> dict[str, str]:
    """Of a subprocess that finds the packages and this file."""
    # The kernels that the tests import: those of an installed package have the compiled library.
    kernels = Path(flowgrpo_kernels.__file__).resolve().parents[1]
    paths = (ROOT, kernels, ROOT / "tests")
    paths = os.pathsep.join([*map(str, paths), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def command(*words: str, **options) -> subprocess.CompletedProcess:
    """`flowgrpo WORDS` in a process of its own."""
    call = [sys.executable, "-m", "flowgrpo", *map(str, words)]
    options = {"capture_output": True, "text": True, "timeout": 120, **options}
    return subprocess.run(call, env=environment(), check=False, **options)


def untimed(metrics: Path) -> list[dict]:
    """The lines of metrics.jsonl without the key that holds times."""
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "seconds"} for line in lines]


def bits_of(folder: Path) -> dict[str, bytes]:
    """Every tensor of the safetensors in a folder; the files have no fixed order of bytes."""
    return {
        f"{path.name}|{name}": tensor.numpy().tobytes()
        for path in folder.glob("*.safetensors")
        for name, tensor in load_file(path).items()
    }


class Fork:
    """A process that starts with everything imported: `function(*arguments)` with its output in a
    file. A signal sent to it is a real one. Runs draw curves in it if they do in this process, or
    `draws`."""

    _context = multiprocessing.get_context("forkserver")

    def __init__(self, log: Path, function, *arguments, draws: bool = False) -> None:
        # Where the server is not forked from pytest's process, it looks there for what it imports.
        os.environ["PYTHONPATH"] = environment()["PYTHONPATH"]
        self._context.set_forkserver_preload(["support.process_imports"])
        self.log = log
        draws = draws or pictures.curve is not no_curve
        self.process = self._context.Process(target=_child, args=(log, draws, function, *arguments))
        self.process.start()

    def kill(self, number: int) -> None:
        os.kill(self.process.pid, number)

    def wait(self, code: int = 0) -> str:
        """Wait for the end, check the exit code, and return the output."""
        self.process.join(120)
        output = self.log.read_text()
        assert self.process.exitcode == code, output
        return output


def no_curve(path: Path, *_) -> Path:
    """Stand in for `pictures.curve`: nothing is drawn."""
    return path


def _child(log: Path, draws: bool, function, *arguments) -> None:
    os.setsid()
    if not draws:
        pictures.curve = no_curve
    # As in the tests' own process: what is written outlives a kill without it.
    os.fsync = lambda descriptor: None
    file = open(log, "w")  # noqa: SIM115
    os.dup2(file.fileno(), 1)
    os.dup2(file.fileno(), 2)
    sys.stdout = sys.stderr = file
    try:
        function(*arguments)
    finally:
        file.flush()


def launch(command: list[str], log, env: dict[str, str]) -> subprocess.Popen:
    """Start a `python -m flowgrpo WORDS` in a process that has everything imported; for
    `comparison.running.Runner`."""
    return _Popen(Fork(Path(log.name), _flowgrpo, command[3:], env))


class _Popen:
    """A `Fork` with the face of a `subprocess.Popen`."""

    def __init__(self, fork: Fork) -> None:
        self.process, self.pid = fork.process, fork.process.pid

    @property
    def returncode(self) -> int | None:
        return self.process.exitcode

    def poll(self) -> int | None:
        return self.process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self.process.join(timeout)
        return self.process.exitcode

    def kill(self) -> None:
        self.process.kill()


def _flowgrpo(words: list[str], env: dict[str, str]) -> None:
    from flowgrpo.cli import main

    os.environ.update(env)
    sys.argv = ["flowgrpo", *words]
    sys.exit(main.main(words))


def run_script(path: Path, folder: Path, *words: str) -> None:
    """An installed command, called in `folder`."""
    os.chdir(folder)
    sys.argv = [str(path), *words]
    sys.path.insert(0, str(path.parent))
    runpy.run_path(str(path), run_name="__main__")


def run_module(name: str, *words: str) -> None:
    """`python -m NAME WORDS`."""
    sys.argv = [name, *words]
    runpy.run_module(name, run_name="__main__", alter_sys=True)


def run(config: Config) -> None:
    """A whole training run."""
    from flowgrpo import train

    train.run(config)


def run_unread(config: Config) -> None:
    """The same with a pipe for its output whose reader has gone."""
    read, write = os.pipe()
    os.close(read)
    os.dup2(write, 1)
    sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
    run(config)


def resume(folder: Path, *options: str) -> None:
    """`flowgrpo train --run.resume FOLDER OPTIONS`."""
    from flowgrpo.cli import main

    sys.exit(main.main(["train", "--run.resume", str(folder), *options]))
