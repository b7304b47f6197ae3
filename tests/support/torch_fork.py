"""Processes that begin with torch imported and nothing else, for tests of what a start decides.

    done = torch_fork.run(code, "argument", env={...}, cwd=folder)     # as subprocess.run has it

One process of each session imports torch, which takes a second, and forks for each call. In the
fork `flowgrpo_kernels` is imported anew, with the environment of the call. What torch itself reads
from the environment at its import is that of the tests.
"""

from __future__ import annotations

import atexit
import functools
import json
import os
import subprocess
import sys
import sysconfig
import tempfile
import traceback
from pathlib import Path


def run(
    code: str, *arguments: str, env: dict[str, str] | None = None, cwd: Path | str = "."
) -> subprocess.CompletedProcess:
    """`python -c CODE ARGUMENTS`; `env` is the whole environment, by default that of the tests."""
    server = _server()
    job = {"code": code, "arguments": list(map(str, arguments)), "cwd": os.path.abspath(cwd)}
    job["env"] = dict(os.environ if env is None else env)
    with tempfile.TemporaryDirectory() as folder:
        files = {name: os.path.join(folder, name) for name in ("stdout", "stderr")}
        print(json.dumps({**job, **files}), file=server.stdin, flush=True)
        returncode = int(server.stdout.readline())
        output = {name: Path(file).read_text() for name, file in files.items()}
    return subprocess.CompletedProcess(["python", "-c", code, *arguments], returncode, **output)


@functools.cache
def _server() -> subprocess.Popen:
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    server = subprocess.Popen([sys.executable, __file__], **pipes)
    # It ends when its input does.
    atexit.register(server.communicate)
    return server


def _searched() -> list[str]:
    """The folders of PYTHONPATH."""
    return [os.path.abspath(p) for p in os.environ.get("PYTHONPATH", "").split(os.pathsep) if p]


def _become(job: dict, standard: list[str]) -> None:
    """Run the job's code in this process, as `python -c` does, and end it."""
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(job[name], os.O_WRONLY | os.O_CREAT), number)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.environ.clear()
    os.environ.update(job["env"])
    os.chdir(job["cwd"])
    sys.path = ["", *_searched(), *standard]
    sys.argv = ["-c", *job["arguments"]]
    code = 0
    try:
        exec(compile(job["code"], "<string>", "exec"), {"__name__": "__main__"})
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
        if isinstance(error.code, str):
            print(error.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _serve() -> None:
    import torch  # noqa: F401

    begun_with = {*_searched(), os.path.dirname(os.path.abspath(__file__))}
    # PYTHONPATH may name the libraries' folders too, which every process has.
    libraries = set(sysconfig.get_paths().values())
    standard = [path for path in sys.path if path in libraries or (path and path not in begun_with)]
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            _become(json.loads(line), standard)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


if __name__ == "__main__":
    _serve()
