"""constraints.txt: each line is required by something, and all that is required has a line."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[1]
TOOL = ROOT / ".ci" / "constraints.py"

pytestmark = pytest.mark.skipif(
    not TOOL.exists(), reason="needs the source tree, not an installed copy"
)


@dataclass(frozen=True)
class Pin:
    version: str
    python: int
    requirers: frozenset[str]


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("constraints_tool", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def flowgrpo(tmp_path_factory):
    """The metadata of this tree; what is installed may be older."""
    folder = tmp_path_factory.mktemp("egg")
    command = [sys.executable, "setup.py", "-q", "egg_info", "--egg-base", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    return importlib.metadata.Distribution.at(folder / "flowgrpo.egg-info")


@pytest.fixture(scope="module")
def pins():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pattern = re.compile(r'([a-z0-9-]+)==([\w.]+)(?:; python_version >= "3\.(\d+)")?  # (\S.*)')
    table = {}
    for line in lines:
        if not line.startswith("#"):
            name, version, python, requirers = pattern.fullmatch(line).groups()
            assert name not in table
            table[name] = Pin(version, int(python or 0), frozenset(requirers.split(", ")))
    assert list(table) == sorted(table)
    return table


@pytest.fixture
def pinned_environment(tool, pins):
    """Skips in another environment: there the packages may require something else."""
    if f"# not, on {tool.environment()}.\n" not in (ROOT / "constraints.txt").read_text():
        pytest.skip(f"constraints.txt is not for {tool.environment()}")
    for name, pin in pins.items():
        if distribution := tool.installed(name):
            version = Version(distribution.version).public
            if version != pin.version:
                pytest.skip(f"not installed by constraints.txt: {name} is {version}")


def test_the_head_has_the_command(flowgrpo):
    head = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line[0] == "#"]
    extras = ",".join(flowgrpo.metadata.get_all("Provides-Extra"))
    command = f"pip install -c constraints.txt '.[{extras}]' && python .ci/constraints.py"
    assert f"#   {command}" in head


def test_direct_requirements_are_pinned_within_their_ranges(flowgrpo, pins):
    """Of extras that are not installed too."""
    for requirement in map(Requirement, flowgrpo.requires):
        if requirement.name != "flowgrpo":
            pin = pins[canonicalize_name(requirement.name)]
            assert requirement.specifier.contains(pin.version, prereleases=True), requirement
            extra = re.search(r'extra == "(\w+)"', str(requirement.marker))
            assert (f"[{extra[1]}]" if extra else "flowgrpo") in pin.requirers


@pytest.mark.slow
def test_each_line_is_required_and_each_requirement_has_a_line(
    tool, flowgrpo, pins, pinned_environment
):
    requirers = tool.closure(flowgrpo)
    assert set(requirers) <= set(pins)
    # The tests do not install wandb and datasets: of what is not here, only the comments tell what
    # it requires. They have to agree with the metadata of all that is.
    absent = {name for name in pins if tool.installed(name) is None}
    for name, pin in pins.items():
        here = requirers.get(name, set())
        # An absent package may ask for an extra of one that is here, and so for another absent one.
        assert here <= pin.requirers and (name in absent or pin.requirers - absent == here), name
        assert pin.requirers <= {"flowgrpo", *pins, *(f"[{e}]" for e in tool.extras(flowgrpo))}
    # From the extras, along the comments, each line is reached.
    reached = {name for name, pin in pins.items() if pin.requirers - set(pins)}
    while more := {name for name, pin in pins.items() if pin.requirers & reached} - reached:
        reached |= more
    assert reached == set(pins)


def test_markers_are_what_the_releases_say(tool, flowgrpo, pins, pinned_environment):
    oldest = tool.oldest_python(flowgrpo)
    releases = {
        name: tool.oldest_python(distribution)
        if (distribution := tool.installed(name))
        else pin.python
        for name, pin in pins.items()
    }
    pythons = tool.inherit(releases, {name: set(pin.requirers) for name, pin in pins.items()})
    for name, pin in pins.items():
        assert pin.python == (pythons[name] if pythons[name] > oldest else 0), name


@pytest.mark.slow
def test_the_file_is_what_the_tool_writes(tool, flowgrpo, pinned_environment):
    try:
        text = tool.constraints(flowgrpo)
    except LookupError as error:
        pytest.skip(f"needs all extras: {error}")
    assert text == (ROOT / "constraints.txt").read_text()


def write_distribution(folder: Path, name: str, version: str, *lines: str) -> None:
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir()
    metadata = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}", *lines]
    (info / "METADATA").write_text("\n".join(metadata) + "\n")


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """A toy project and what is installed beside it."""
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    project = ("Requires-Python: >=3.10", "Provides-Extra: train", "Provides-Extra: all")
    requires = (
        "torch>=2",
        'Old.Name; extra == "train"',
        'nowhere; extra == "train" and sys_platform == "beos"',
        'toy[train]; extra == "all"',
        'server[fast]>=1; extra == "all"',
    )
    write_distribution(
        tmp_path, "toy", "1.0", *project, *(f"Requires-Dist: {text}" for text in requires)
    )
    write_distribution(tmp_path, "torch", "2.3+cpu", "Requires-Dist: shared")
    write_distribution(tmp_path, "old-name", "4", "Requires-Python: >=3.9.2, !=3.10.1")
    write_distribution(
        tmp_path,
        "server",
        "1.5",
        "Requires-Python: >=3.12",
        "Provides-Extra: fast",
        "Provides-Extra: slow",
        "Requires-Dist: shared",
        'Requires-Dist: loop; extra == "fast"',
        'Requires-Dist: snail; extra == "slow"',
    )
    write_distribution(tmp_path, "loop", "3", "Requires-Python: >=3.11", "Requires-Dist: server")
    write_distribution(tmp_path, "shared", "7")
    write_distribution(tmp_path, "unrelated", "1")
    return tmp_path


def test_the_tool_on_a_toy_project(tool, packages):
    text = tool.constraints(importlib.metadata.distribution("toy"))
    assert "'.[train,all]'" in text
    assert [line for line in text.splitlines() if not line.startswith("#")] == [
        'loop==3; python_version >= "3.12"  # server',
        "old-name==4  # [train]",
        'server==1.5; python_version >= "3.12"  # [all], loop',
        'shared==7; python_version >= "3.12"  # server, torch',
        "torch==2.3  # toy",
    ]


def test_the_tool_names_what_is_not_installed(tool, packages):
    next(packages.glob("loop-*")).rename(packages / "gone")
    with pytest.raises(LookupError, match="loop, required by server, is not installed"):
        tool.constraints(importlib.metadata.distribution("toy"))
