"""Files and folders that are there whole or not at all."""

from __future__ import annotations

import errno
import logging
import os
import stat
import threading

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from flowgrpo import files
from flowgrpo.config import ConfigError


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("before", [None, "old"])
def test_a_file_appears_at_the_end(tmp_path, before):
    path = tmp_path / "config.json"
    if before is not None:
        path.write_text(before)
    with files.replacing(path) as temporary:
        temporary.write_text("new")
        assert temporary.parent == tmp_path and temporary.name.startswith(".config.json.")
        assert (path.read_text() if path.exists() else None) == before
    assert path.read_text() == "new" and names(tmp_path) == ["config.json"]


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_a_write_that_breaks_off_leaves_the_old_file(tmp_path, error):
    path = tmp_path / "config.json"
    files.write_text(path, "old")
    with pytest.raises(error), files.replacing(path) as temporary:
        temporary.write_text("ha")
        raise error
    assert path.read_text() == "old" and names(tmp_path) == ["config.json"]


def test_two_writers_do_not_meet(tmp_path):
    """Each has a name of its own, also in one process: the last to end is what is read."""
    path = tmp_path / "text"
    with files.replacing(path) as first:
        with files.replacing(path) as second:
            first.write_text("first"), second.write_text("second")
        assert path.read_text() == "second"
    assert path.read_text() == "first" and names(tmp_path) == ["text"]


def test_a_reader_never_sees_a_part(tmp_path):
    path, seen, done = tmp_path / "text", set(), threading.Event()
    files.write_text(path, "0" * 50_000)

    def read():
        while not done.is_set():
            seen.add(path.read_text())

    reader = threading.Thread(target=read)
    reader.start()
    for digit in "123456789":
        files.write_text(path, digit * 50_000)
    done.set()
    reader.join()
    assert seen and all(len(text) == 50_000 and len(set(text)) == 1 for text in seen)


@pytest.mark.parametrize("before", [False, True])
def test_a_folder_appears_at_the_end(tmp_path, before):
    path = tmp_path / "adapter"
    if before:
        path.mkdir()
        (path / "old").write_text("old")
    with files.replacing_folder(path) as temporary:
        (temporary / "new").write_text("new")
        assert path.exists() == before
    assert names(path) == ["new"] and names(tmp_path) == ["adapter"]


def test_a_folder_that_breaks_off_leaves_the_old_one(tmp_path):
    path = tmp_path / "adapter"
    path.mkdir()
    (path / "old").write_text("old")
    with pytest.raises(ZeroDivisionError), files.replacing_folder(path) as temporary:
        (temporary / "new").write_text("new")
        1 / 0  # noqa: B018
    assert names(path) == ["old"] and names(tmp_path) == ["adapter"]


def test_tensors_come_back(tmp_path):
    """Of any layout and dtype, bit for bit, and without their gradients."""
    leaf = torch.randn(4, 3, requires_grad=True)
    tensors = {"a": leaf.t(), "b": torch.arange(5).to(torch.bfloat16)}
    files.write_tensors(tmp_path / "t.safetensors", tensors)
    stored = files.read_tensors(tmp_path / "t.safetensors")
    assert all(torch.equal(stored[name], value) for name, value in tensors.items())
    assert stored["b"].dtype == torch.bfloat16 and names(tmp_path) == ["t.safetensors"]


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOSYS, errno.ENOTSUP])
@pytest.mark.parametrize("folders_only", [True, False])
def test_a_file_system_without_fsync_is_told_once(
    tmp_path, monkeypatch, caplog, number, folders_only
):
    fsync = os.fsync

    def refuse(descriptor):
        if not folders_only or stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(number, os.strerror(number))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", refuse)
    monkeypatch.setattr(files, "_without_fsync", set())
    with caplog.at_level(logging.WARNING):
        for text in ("one", "two"):
            with files.replacing_folder(tmp_path / "folder") as folder:
                files.write_text(folder / "text", text)
    assert (tmp_path / "folder" / "text").read_text() == "two"
    assert names(tmp_path) == ["folder"]
    (message,) = [record.getMessage() for record in caplog.records]
    assert os.strerror(number) in message and "refuses fsync" in message


def test_a_disk_that_fails_in_fsync_is_an_error(tmp_path, monkeypatch):
    def fail(descriptor):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        files.write_text(tmp_path / "text", "new")
    assert names(tmp_path) == []


def test_metadata_have_an_order(tmp_path):
    """Whatever stands in them, and the tensors are where they were."""
    metadata = {"b": "1", "ä": 'a "quote"\n\t\x01\x7f\u2028', "a": "\\ 🙂", "": ""}
    tensors, contents = {"x": torch.arange(3.0), "y": torch.arange(4, dtype=torch.int64)}, set()
    path = tmp_path / "t.safetensors"
    for _ in range(8):
        save_file(tensors, path, metadata=metadata)
        files.order_metadata(path)
        contents.add(path.read_bytes())
        with safe_open(path, "pt") as file:
            assert file.metadata() == metadata
            assert all(torch.equal(file.get_tensor(name), tensors[name]) for name in tensors)
    assert len(contents) == 1


def killed_while_replacing(folder, before, content):
    """Leave `folder` as a process leaves it that is killed before the new folder has its name."""
    folder.mkdir()
    (folder / "weights").write_text(before)
    rename = os.rename

    def rename_once(old, new):
        if old != folder:
            raise KeyboardInterrupt
        rename(old, new)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "rename", rename_once)
        with pytest.raises(KeyboardInterrupt), files.replacing_folder(folder) as temporary:
            (temporary / "weights").write_text(content)


def test_a_folder_that_was_set_aside_comes_back(tmp_path):
    """Between the two renames of `replacing_folder` there is none of its name."""
    killed_while_replacing(tmp_path / "adapter", "old", "new")
    assert not (tmp_path / "adapter").exists() and len(names(tmp_path)) == 2
    files.remove_leftovers(tmp_path)
    assert names(tmp_path) == ["adapter"]
    assert (tmp_path / "adapter" / "weights").read_text() == "old"


def test_a_folder_whose_removal_breaks_off_is_gone_all_the_same(tmp_path, monkeypatch):
    folder = tmp_path / "step-000001"
    folder.mkdir()
    for name in ("state.json", "weights"):
        (folder / name).write_text("x")

    def stop(path):
        (path / "state.json").unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(files.shutil, "rmtree", stop)
        with pytest.raises(KeyboardInterrupt):
            files.remove_folder(folder)
    assert not folder.exists() and len(names(tmp_path)) == 1
    files.remove_leftovers(tmp_path)
    assert names(tmp_path) == []


def test_a_leftover_that_cannot_be_removed_stays(tmp_path, monkeypatch):
    leftovers = [tmp_path / f".{name}.{'0a' * 16}" for name in ("a", "b")]
    for path in leftovers:
        path.write_text("x")

    def refuse(path):
        if path == leftovers[0]:
            raise OSError(errno.EBUSY, "Device or resource busy")
        os.unlink(path)

    monkeypatch.setattr(files.Path, "unlink", refuse)
    files.remove_leftovers(tmp_path)
    assert list(tmp_path.iterdir()) == leftovers[:1]


def test_leftovers_are_removed_and_nothing_else(tmp_path):
    for folder in (tmp_path, tmp_path / "samples"):
        folder.mkdir(exist_ok=True)
        for name in (
            ".hidden",
            ".config.json.part",
            ".notes.old",
            "step.png",
            ".a.0123456789abcdef",
        ):
            (folder / name).write_text("mine")
        (folder / f".step.png.{'0a' * 16}").write_text("half")
    aside = tmp_path / f".adapter.{'1b' * 16}.old"
    for name in ("adapter", f".adapter.{'1b' * 16}", aside.name):
        (tmp_path / name).mkdir()
        (tmp_path / name / "weights").write_text("new" if name == "adapter" else "half")
    leftovers = [path for path in tmp_path.rglob("*") if files.is_leftover(path)]
    assert len(leftovers) == 4
    kept = sorted(path for path in tmp_path.rglob("*") if not set(leftovers) & {path, path.parent})
    files.remove_leftovers(tmp_path)
    assert sorted(tmp_path.rglob("*")) == kept
    assert (tmp_path / "adapter" / "weights").read_text() == "new"


def test_what_is_no_file_is_not_replaced(tmp_path):
    """Root could replace /dev/null by a picture, and everybody would write into it."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    (tmp_path / "circle").symlink_to("circle")
    (tmp_path / "link").symlink_to("pipe")
    before = {path.name: path.lstat() for path in tmp_path.iterdir()}
    for name in ("pipe", "folder", "circle", "link"):
        with pytest.raises(ConfigError, match="but a file is to be written there"):
            files.write_text(tmp_path / name, "x")
    assert {path.name: path.lstat() for path in tmp_path.iterdir()} == before


def test_a_link_stays_and_leads_to_the_new_content(tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "old").write_text("old")
    for name, target in (("one", "there/old"), ("other", "there/new")):
        (tmp_path / name).symlink_to(target)
        files.write_text(tmp_path / name, name)
        assert (tmp_path / name).is_symlink() and (tmp_path / target).read_text() == name
    assert {p.name for p in (tmp_path / "there").iterdir()} == {"old", "new"}


def test_the_longest_names_can_be_written(tmp_path):
    for name in ("a" * 255, "\u732b" * 85):
        files.write_text(tmp_path / name, "x")
        assert (tmp_path / name).read_text() == "x"


def test_a_path_whose_bytes_are_no_utf8(tmp_path):
    folder = tmp_path / "a\udcffb"
    folder.mkdir()
    tensors = {"x": torch.arange(3.0)}
    files.write_tensors(folder / "t.safetensors", tensors)
    assert torch.equal(files.read_tensors(folder / "t.safetensors")["x"], tensors["x"])
    files.write_text(folder / "t.txt", f"in {folder.name}")
    assert (folder / "t.txt").read_text() == "in a\\udcffb"
    (folder / "t.safetensors").write_bytes(b"x")
    with pytest.raises(ConfigError, match="a safetensors file is expected"):
        files.read_tensors(folder / "t.safetensors")
