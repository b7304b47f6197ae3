"""Packs of compiled kernels: the image for a device, and packs that are refused with a sentence."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from flowgrpo_kernels.backends import images
from flowgrpo_kernels.backends.images import FOLDER, MANIFEST, ImageError, Manifest

TARGET = "sm_90a"


@pytest.fixture(scope="module")
def manifest() -> Manifest:
    return Manifest()


@pytest.fixture
def folder(tmp_path) -> Path:
    """A copy of the manifest and of one pack."""
    for name in (MANIFEST, f"{TARGET}.pack"):
        shutil.copy(FOLDER / name, tmp_path)
    return tmp_path


def edit(folder: Path, **changes) -> None:
    facts = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps(facts | changes))


@pytest.mark.parametrize(
    ("capability", "driver", "target"),
    [
        ((8, 0), 12000, "sm_80"),
        ((8, 6), 12000, "sm_80"),
        ((8, 9), 13000, "sm_80"),
        ((9, 0), 12000, "sm_90a"),
        ((10, 0), 13000, "sm_100a"),
        # An "a" is for one device alone: its sisters take PTX, and so does an older driver.
        ((10, 3), 13000, "ptx_80"),
        ((12, 0), 13000, "sm_120a"),
        ((12, 1), 13000, "ptx_80"),
        ((15, 0), 14000, "ptx_80"),
    ],
)
def test_image_for_a_device(manifest, capability, driver, target):
    assert manifest.target_for(capability, driver) == (target, "")


def test_no_image_for_a_device(manifest):
    target, why = manifest.target_for((7, 5), 13000)
    assert target == "" and why.startswith("no compiled kernels are shipped for sm_75, only sm_80")
    target, why = manifest.target_for((9, 0), 11080)
    assert target == "" and "too old" in why and "supports CUDA 11.8" in why
    assert "sm_90a needs CUDA 12.0" in why and why.endswith("update the driver")


def test_a_driver_between_two_images(manifest):
    """PTX serves a device whose binary is too new for the driver."""
    needs = manifest.targets["ptx_80"]["driver"]
    assert manifest.targets["sm_100a"]["driver"] > needs
    assert manifest.target_for((10, 0), needs) == ("ptx_80", "")


def refused(folder: Path, match: str) -> None:
    with pytest.raises(ImageError, match=match) as caught:
        Manifest(folder).pack(TARGET)
    assert "\n" not in str(caught.value)


def test_whole(folder):
    pack = Manifest(folder).pack(TARGET)
    key = next(iter(pack.manifest.kernels))
    image = pack.image(key)
    assert key in pack and image.binary[:4] == b"\x7fELF" and image.entry == key.split()[0]
    with pytest.raises(KeyError):
        pack.image("no_such_kernel")


def test_unpacked_as_far_as_needed(manifest):
    """Kernels of a group in any order; the first one costs no more than itself."""
    pack = manifest.pack(TARGET)
    keys = [
        key for key, (group, *_) in zip(manifest.kernels, pack.facts["images"], strict=True)
        if group == 0
    ]  # fmt: skip
    first = pack.image(keys[0]).binary
    unpacked = len(pack._group(0)._raw)
    assert len(keys) > 4 and unpacked == len(first)
    last = pack.image(keys[-1]).binary
    other = manifest.pack(TARGET)
    assert other.image(keys[-1]).binary == last and other.image(keys[0]).binary == first
    assert len(pack._group(0)._raw) > 4 * unpacked
    with pytest.raises(ImageError, match="has less in it than its manifest says"):
        pack._group(0).read(10**9, 1)


def test_truncated(folder):
    path = folder / f"{TARGET}.pack"
    path.write_bytes(path.read_bytes()[:-7])
    refused(folder, r"sm_90a\.pack are truncated: \d+ bytes of \d+; install flowgrpo again")


def test_corrupt(folder):
    path = folder / f"{TARGET}.pack"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    refused(folder, r"sm_90a\.pack are corrupt or of another version")


def test_foreign(folder):
    """The pack of another target, or any longer file."""
    path = folder / f"{TARGET}.pack"
    path.write_bytes((FOLDER / "sm_100a.pack").read_bytes() + bytes(1 << 20))
    refused(folder, "are corrupt or of another version: their digest is not the manifest's")


def test_missing(folder):
    (folder / f"{TARGET}.pack").unlink()
    refused(folder, "are missing")
    (folder / MANIFEST).unlink()
    refused(folder, "no kernels are shipped compiled: there is no ")


@pytest.mark.parametrize("text", ["", "{", "[1]", '{"format": 0}'])
def test_manifest_of_another_version(folder, text):
    (folder / MANIFEST).write_text(text)
    refused(folder, "cannot be read|of another version of flowgrpo: format .*, expected 1")


def test_other_sources(folder):
    edit(folder, sources={"text": "0" * 64, "code": "0" * 64})
    refused(folder, "are of another version of the kernels' sources; install flowgrpo again")


def test_comments_and_hosts_change_no_kernel(tmp_path):
    """The digest of the code is that of the kernels' own tokens."""
    for name in images.SOURCES:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(images.PACKAGE / name, tmp_path / name)
    code, text = images.code_digest(tmp_path), images.text_digest(tmp_path)
    assert (code, text) == (images.code_digest(), images.text_digest())
    path = tmp_path / "sde_step.py"
    source = path.read_text()
    load = "        seed = tl.load(seeds_ptr + row)"
    for old, new, changes in (
        (load, "        # The key.\n" + load, False),
        ('"""Writes x\' and', '"""Stores x\' and', False),
        ("    source = \"none\"", "    source = str(\"none\")", False),
        ("tl.load(seeds_ptr + row)", "tl.load(seeds_ptr + row + 0)", True),
        ("    scale,\n    elements,", "    elements,\n    scale,", True),
    ):  # fmt: skip
        assert source.count(old) >= 1, old
        path.write_text(source.replace(old, new, 1))
        assert images.text_digest(tmp_path) != text
        assert (images.code_digest(tmp_path) != code) is changes, new
    path.write_text(source)
    (tmp_path / "grpo_loss.py").write_text(
        (tmp_path / "grpo_loss.py").read_text().replace("constant(0)", "constant(3)")
    )
    assert images.code_digest(tmp_path) != code
