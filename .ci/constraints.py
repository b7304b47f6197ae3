"""Writes constraints.txt: the installed version of all that flowgrpo and its extras require, but
for extras that need CUDA.

Run in a fresh virtual environment, as the head of constraints.txt says. What the environment holds
beyond the requirements, pip for one, is left out.
"""

from __future__ import annotations

import importlib.metadata
import platform
import sys
from importlib.metadata import Distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

PROJECT = "flowgrpo"
FILE = Path(__file__).resolve().parents[1] / "constraints.txt"
# Extras whose packages are compiled for CUDA: where constraints.txt is written, there is none.
CUDA = ("flash", "xformers")
HEAD = """\
# Versions that were tested together: all that the extras in pyproject.toml require, directly or
# not, on {environment}.
# Written in a fresh virtual environment by
#   pip install -c constraints.txt '.[{extras}]' && python .ci/constraints.py
# Behind each version stands what requires it: extras, in brackets, and packages. Pins are marked
# where the release does not install on Python {oldest}, and with it all that it requires, which an
# older release may want otherwise. There pip chooses by range.
# Left out are the extras whose packages need CUDA: {cuda}.
"""


def installed(name: str) -> Distribution | None:
    return next(iter(importlib.metadata.distributions(name=name)), None)


def requirements(distribution: Distribution, extra: str) -> list[Requirement]:
    """Requirements that apply here: those of one extra alone, or, for ``""``, those of none."""
    markers = [(r, r.marker) for r in map(Requirement, distribution.requires or [])]
    plain = [r for r, marker in markers if marker is None or marker.evaluate({"extra": ""})]
    if not extra:
        return plain
    return [
        r
        for r, marker in markers
        if r not in plain and marker and marker.evaluate({"extra": extra})
    ]


def environment() -> str:
    """What the requirements of a release depend on; torch's builds for GPUs require more."""
    python = ".".join(platform.python_version_tuple()[:2])
    torch = importlib.metadata.version("torch")
    return f"{platform.system()} {platform.machine()} with Python {python} and torch {torch}"


def closure(project: Distribution) -> dict[str, set[str]]:
    """Canonical name of each package that ``project`` and its extras reach -> what requires it.

    A package that is not installed is in the result, and what it requires is not.
    """
    name = canonicalize_name(project.metadata["Name"])
    nodes = [(name, extra) for extra in ("", *extras(project))]
    requirers: dict[str, set[str]] = {}
    # The list grows while it is read: a queue that also remembers what has been visited.
    for package, extra in nodes:
        distribution = project if package == name else installed(package)
        if distribution is None:
            continue
        requirer = f"[{extra}]" if package == name and extra else package
        for requirement in requirements(distribution, extra):
            required = canonicalize_name(requirement.name)
            if required == name:
                continue
            requirers.setdefault(required, set()).add(requirer)
            for node in [(required, e) for e in ("", *sorted(requirement.extras))]:
                if node not in nodes:
                    nodes.append(node)
    return requirers


def extras(project: Distribution) -> list[str]:
    """The extras whose requirements are pinned."""
    return [e for e in project.metadata.get_all("Provides-Extra") or [] if e not in CUDA]


def oldest_python(distribution: Distribution) -> int:
    """The smallest N for which Python 3.N meets ``Requires-Python``."""
    specifiers = SpecifierSet(distribution.metadata["Requires-Python"] or "")
    # The last of a minor version's releases: >=3.9.2 is met by a Python 3.9.
    return next(n for n in range(100) if specifiers.contains(f"3.{n}.99"))


def inherit(pythons: dict[str, int], requirers: dict[str, set[str]]) -> dict[str, int]:
    """The smallest N for which a package and all that lead to it have their pins on Python 3.N.

    On an older Python another release of a requirer is installed, whose requirements, and theirs,
    the pins do not have to meet. A requirer without an entry, such as an extra, asks for nothing.
    """
    pythons = dict(pythons)
    for start, python in sorted(pythons.items(), key=lambda item: item[1]):
        reached, front = {start}, {start}
        while front:
            front = {name for name, by in requirers.items() if by & front} - reached
            reached |= front
        pythons |= {name: python for name in reached if pythons[name] < python}
    return pythons


def pin(name: str, version: str, python: int, oldest: int, requirers: set[str]) -> str:
    """One line: ``name==version``, from which Python 3.``python`` on, and what requires it."""
    marker = f'; python_version >= "3.{python}"' if python > oldest else ""
    # torch's local version names the build, and any build of the version will do.
    return f"{name}=={Version(version).public}{marker}  # {', '.join(sorted(requirers))}\n"


def constraints(project: Distribution) -> str:
    """The text of constraints.txt; LookupError names what is not installed."""
    requirers = closure(project)
    packages: dict[str, Distribution] = {}
    for name, by in sorted(requirers.items()):
        if (distribution := installed(name)) is None:
            raise LookupError(f"{name}, required by {min(by)}, is not installed")
        packages[name] = distribution
    oldest = oldest_python(project)
    pythons = inherit({name: oldest_python(d) for name, d in packages.items()}, requirers)
    head = HEAD.format(
        environment=environment(),
        extras=",".join(extras(project)),
        oldest=f"3.{oldest}",
        cuda=", ".join(CUDA),
    )
    return head + "".join(
        pin(name, distribution.version, pythons[name], oldest, requirers[name])
        for name, distribution in packages.items()
    )


def main() -> int:
    try:
        text = constraints(importlib.metadata.distribution(PROJECT))
    except LookupError as error:
        print(f"{error}; the head of {FILE} has the command.", file=sys.stderr)
        return 2
    FILE.write_text(text)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
