"""What is shipped compiled is what the ops launch, of the sources as they are."""

from __future__ import annotations

import json
import os
import re
import struct

import pytest
import torch

from flowgrpo_kernels import sde_step
from flowgrpo_kernels.aot import elf, table
from flowgrpo_kernels.backends import images
from flowgrpo_kernels.backends.images import FOLDER, Manifest
from support import torch_fork

TARGETS = ("sm_80", "sm_90a", "sm_100a", "sm_120a", "ptx_80")
AGAIN = "the packs are stale: run python -m flowgrpo_kernels.aot"


@pytest.fixture(scope="module")
def manifest() -> Manifest:
    return Manifest()


def test_packs_are_of_these_sources():
    """After a change of comments alone: python -m flowgrpo_kernels.aot --refresh."""
    sources = json.loads((FOLDER / images.MANIFEST).read_text())["sources"]
    assert sources["code"] == images.code_digest(), AGAIN
    assert sources["text"] == images.text_digest(), f"{AGAIN} --refresh"


@pytest.mark.slow
def test_the_table_is_what_the_ops_launch(manifest):
    """Recorded anew, over every option: nothing is missing, and nothing is shipped in vain."""
    recorded = table.shipped()
    assert set(recorded) == set(manifest.kernels), AGAIN
    assert len(recorded) > 300
    kernels = {key.split()[0] for key in recorded}
    assert kernels == launched()


def launched() -> set[str]:
    """Names of the kernels that the launchers name."""
    sources = [(images.PACKAGE / name).read_text() for name in images.SOURCES]
    pattern = r"(?<!def )\blaunch\(\s*(?:triton\.)?(\w+),"
    return {name for text in sources for name in re.findall(pattern, text)}


def test_a_new_option_is_found_in_the_table():
    """A launch that the grid does not have is another key."""
    x, seeds = torch.zeros(2, 16, dtype=torch.float16), torch.zeros(2, dtype=torch.int64)
    v = torch.zeros(2, 16, dtype=torch.bfloat16)
    transitions = table.flow_sde([1.0, 0.5, 0.0])
    (key,) = table.recorded([lambda: sde_step(v, x, transitions, 0, seeds=seeds)])
    assert key not in Manifest().kernels and key.startswith("sde_step_kernel bf16 - fp16 ")


def test_size(manifest):
    """Every target, in less than the wheel has room for."""
    assert tuple(sorted(manifest.targets)) == tuple(sorted(TARGETS))
    files = {path.name for path in FOLDER.iterdir()}
    assert files == {images.MANIFEST, *(f"{target}.pack" for target in TARGETS)}
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) < 4.6e6


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_every_image(manifest, target):
    """A binary with the parameters that the launch lays out, or PTX with the entry."""
    pack = manifest.pack(target)
    for key in manifest.kernels:
        image = pack.image(key)
        assert image.shared <= 48 << 10 and image.warps in (1, 2, 4, 8, 16)
        if target.startswith("ptx"):
            text = image.binary.decode()
            assert ".target sm_80\n" in text and f".entry {image.entry}(" in text
            assert text.endswith("\0")
        else:
            parameters, size = elf.parameters(image.binary, image.entry)
            assert struct.calcsize("<" + image.layout) == size
            assert places(image.layout) == parameters[:-2], key


def places(layout: str) -> list[tuple[int, int]]:
    """(offset, bytes) of the values of a format, without its padding."""
    sizes, found, at = {"Q": 8, "i": 4, "f": 4, "x": 1}, [], 0
    for letter in layout:
        if letter != "x":
            found.append((at, sizes[letter]))
        at += sizes[letter]
    return found


COMPILE = """
import json, sys
from flowgrpo_kernels.aot import pack, table
from flowgrpo_kernels.backends.images import Manifest
manifest, variants = Manifest(), table.shipped()
print(pack.triton.__version__ == manifest.versions["triton"])
for key in json.loads(sys.argv[1]):
    binary = pack.compiled(variants[key], 90)
    print(binary.cubin == manifest.pack("sm_90a").image(key).binary)
"""


@pytest.mark.slow
def test_compiled_again_they_are_the_same_bytes(manifest):
    """A kernel with noise and one that sums rows; by another Triton they may differ."""
    pytest.importorskip("triton")
    keys = [key for key in manifest.kernels if "sde_step" in key and "GUIDED=1 NOISE=seeds" in key]
    keys = [keys[0], next(key for key in manifest.kernels if key.startswith("finish_kernel"))]
    env = {**os.environ, "TRITON_INTERPRET": "0"}
    done = torch_fork.run(COMPILE, json.dumps(keys), env=env)
    assert done.returncode == 0, done.stderr[-2000:]
    same_version, *same = done.stdout.split()
    if same_version != "True":
        pytest.skip("the packs were compiled by another Triton")
    assert same == ["True", "True"]
