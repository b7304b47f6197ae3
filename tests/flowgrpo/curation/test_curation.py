"""Curation from folders to files: thresholds, shares, pairs and drops by values of the hand; what
is stopped goes on to the same bytes."""

from __future__ import annotations

import json
import shutil
import signal
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image

from flowgrpo import files
from flowgrpo.config import ConfigError
from flowgrpo.curation import curate as module
from flowgrpo.curation import pictures, report, store
from flowgrpo.curation.curate import curate
from flowgrpo.curation.dataset import SPLITS, CuratedSet, load_pairs
from flowgrpo.curation.options import CurateOptions
from flowgrpo.curation.splits import prompt_key, split_of
from flowgrpo.nano import draw, prompts
from flowgrpo.rewards import RewardError
from support import processes
from support.grey_pictures import captioned, grey, tree

ALL_TRAIN = (1.0, 0.0, 0.0)


def options(folder, out, **changes) -> CurateOptions:
    defaults = {"resolution": 8, "shares": ALL_TRAIN, "batch_size": 4, "workers": 1}
    sources = (str(folder),) if not isinstance(folder, tuple) else folder
    return CurateOptions(sources, str(out), **{**defaults, **changes})


@pytest.fixture
def quick(monkeypatch):
    """Without what takes most of the time: histograms, which test_report.py looks at, and waiting
    for the disk, which matters when a machine loses power."""
    monkeypatch.setattr(report, "histograms", lambda *_: b"histograms")
    monkeypatch.setattr(files, "sync", lambda descriptor: None)
    monkeypatch.setattr(store, "SYNCHRONOUS", "OFF")


@pytest.fixture
def photos(tmp_path):
    """Ten pictures with the greys 0, 10, ... 90, two of each prompt."""
    pairs = {f"{i}.png": (10 * i, f"prompt {i // 2}") for i in range(10)}
    return captioned(tmp_path / "photos", pairs)


def greys(out, split="train") -> list[int]:
    return (
        CuratedSet.load(out, split)
        .images(range(len(CuratedSet.load(out, split))))[:, 0, 0, 0]
        .tolist()
    )


pytestmark = pytest.mark.usefixtures("quick")


def test_thresholds(photos, tmp_path, rewards):
    """Scores at a bound stay."""
    name = rewards["brightness"]
    about = curate(
        options(photos, tmp_path / "out", rewards={name: 1.0}, min={name: 20.0}, max={name: 70.0})
    )
    assert greys(tmp_path / "out") == [20, 30, 40, 50, 60, 70]
    assert about["counts"] == {
        "read": 10,
        "images": 6,
        "train": 6,
        "validation": 0,
        "test": 0,
        "dropped": {f"min {name}": 2, f"max {name}": 2},
    }
    assert about["thresholds"] == {name: {"min": 20.0, "max": 70.0}}
    records = CuratedSet.load(tmp_path / "out")
    assert records.texts[:3] == ("prompt 1", "prompt 1", "prompt 2")
    assert records.scores[0] == {name: 20.0}
    assert records.sources[0] == f"{photos}/2.png" and records.sizes[0] == (8, 8)
    assert not (tmp_path / "out" / "pairs.jsonl").exists()


@pytest.mark.parametrize(
    ("share", "expected"),
    [
        (0.5, [50, 60, 70, 80, 90]),
        (0.3, [70, 80, 90]),
        (0.01, [90]),
        (1.0, list(range(0, 100, 10))),
    ],
)
def test_top_share(photos, tmp_path, rewards, share, expected):
    name = rewards["brightness"]
    about = curate(options(photos, tmp_path / "out", rewards={name: 1.0}, top={name: share}))
    assert greys(tmp_path / "out") == expected
    assert about["thresholds"][name] == {"top": share, "cut": float(expected[0])}


def test_top_is_of_those_that_pass_and_of_each_reward(photos, tmp_path, rewards):
    """Of 0 ... 50 the best half by brightness is 30, 40, 50; all prompts are as long, so the
    first half by length is 0, 10, 20; of equal scores the first ones stay."""
    bright, length = rewards["brightness"], rewards["length"]
    common = {"rewards": {bright: 1.0, length: 0.0}, "max": {bright: 50.0}}
    curate(options(photos, tmp_path / "a", top={bright: 0.5}, **common))
    assert greys(tmp_path / "a") == [30, 40, 50]
    curate(options(photos, tmp_path / "b", top={length: 0.5}, **common))
    assert greys(tmp_path / "b") == [0, 10, 20]
    curate(options(photos, tmp_path / "c", top={bright: 0.5, length: 0.7}, **common))
    assert greys(tmp_path / "c") == [30, 40]
    with pytest.raises(ConfigError, match="no image is among the best shares of all"):
        curate(options(photos, tmp_path / "d", top={bright: 0.5, length: 0.5}, **common))


def test_pairs(tmp_path, rewards):
    """The best that is in the set, the worst of all; by the weighted sum, with a gap."""
    source = captioned(
        tmp_path / "photos",
        {
            "0.png": (10, "a red dog"),
            "1.png": (200, "A red dog."),  # above the maximum: in no pair
            "2.png": (60, "a red dog"),
            "3.png": (40, "two cats"),
            "4.png": (44, "two cats"),
            "5.png": (5, "alone"),
            "6.png": (30, "far"),
            "7.png": (90, "far"),
            "8.png": (2, "below"),
            "9.png": (3, "below"),
        },
    )
    name, length = rewards["brightness"], rewards["length"]
    common = {
        "rewards": {name: 2.0, length: 100.0},
        "min": {name: 20.0},
        "max": {name: 150.0},
        "pairs": True,
    }
    about = curate(options(source, tmp_path / "out", pair_gap=10.0, **common))
    pairs = load_pairs(tmp_path / "out")
    assert pairs.texts == ("a red dog", "far")
    chosen, rejected = (images[:, 0, 0, 0].tolist() for images in pairs.images([0, 1]))
    assert chosen == [60, 90] and rejected == [10, 30]
    assert pairs.scores[0] == {
        "chosen": {name: 60.0, length: 9.0},
        "rejected": {name: 10.0, length: 9.0},
    }
    assert about["counts"]["pairs"] == 2 and about["counts"]["train"] == 5
    curate(options(source, tmp_path / "all", **common))
    assert load_pairs(tmp_path / "all").texts == ("a red dog", "two cats", "far")
    # A picture that is in neither the set nor a pair is gone: 5, 2, 3 and 200.
    images = list((tmp_path / "out" / "images").glob("*/*"))
    assert len(images) == 6 and not [
        f for f in images[0].parent.parent.iterdir() if not any(f.iterdir())
    ]
    flipped = {**common, "rewards": {name: -1.0, length: 0.0}}
    curate(options(source, tmp_path / "flipped", **flipped))
    chosen, rejected = load_pairs(tmp_path / "flipped").images([0])
    assert chosen[0, 0, 0, 0] == 60 and rejected[0, 0, 0, 0] == 200


def test_pairs_without_a_difference(tmp_path, rewards):
    source = captioned(tmp_path / "photos", {"0.png": (10, "a"), "1.png": (20, "a")})
    common = {"rewards": {rewards["length"]: 1.0}, "pairs": True}
    about = curate(options(source, tmp_path / "out", **common))
    assert about["counts"]["pairs"] == 0
    with pytest.raises(ConfigError, match=r"has an empty pairs\.jsonl"):
        load_pairs(tmp_path / "out")


def test_drops_are_counted(photos, tmp_path, rewards):
    """Too small, read before in another file format and under another prompt, no caption, no
    picture, no number."""
    grey(photos / "a.png", 255, (7, 20)).with_suffix(".txt").write_text("small")
    Image.new("RGB", (16, 16), (20, 20, 20)).save(photos / "b.bmp")
    (photos / "b.txt").write_text("another prompt")
    grey(photos / "c.png", 99)
    (photos / "d.jpg").write_bytes(b"no picture")
    (photos / "d.txt").write_text("damaged")
    (tmp_path / "nan_reward.py").write_text(
        "def score(images, prompts, metadata):\n"
        "    means = images.double().mean(dim=(1, 2, 3)).tolist()\n"
        "    return [float('nan') if mean == 30 else mean for mean in means]\n"
    )
    name = f"{tmp_path}/nan_reward.py:score"
    skips = {"skip_unreadable": True, "skip_uncaptioned": True}
    about = curate(options(photos, tmp_path / "out", rewards={name: 1.0}, **skips))
    assert about["counts"]["dropped"] == {
        "no score": 1,
        "too small": 1,
        "duplicate": 1,
        "no caption": 1,
        "unreadable": 1,
    }
    assert greys(tmp_path / "out") == [0, 10, 20, 40, 50, 60, 70, 80, 90]
    assert [label for label, _ in report.count_lines(about)][1:3] == [
        "dropped: a reward gave no number",
        "dropped: smaller than the set's images",
    ]
    page = (tmp_path / "out" / "report.html").read_text()
    assert f"{photos}/d.jpg" in page and "cannot identify image file" in page
    curate(options(photos, tmp_path / "larger", upscale=True, **skips))
    assert 255 in greys(tmp_path / "larger")


def test_a_prompt_and_a_picture_are_in_one_split(tmp_path):
    pairs = {f"{i:03d}.png": (i, f"Prompt {i // 3}" + (".", "", " ")[i % 3]) for i in range(48)}
    source = captioned(tmp_path / "photos", pairs)
    shares = (0.5, 0.3, 0.2)
    about = curate(options(source, tmp_path / "out", shares=shares, batch_size=64))
    records = [CuratedSet.load(tmp_path / "out", split) for split in SPLITS]
    keys = [set(map(prompt_key, split.texts)) for split in records]
    assert sum(map(len, keys)) == len(set.union(*keys)) == 16
    assert sum(map(len, records)) == 48 == about["counts"]["images"]
    names = [path for split in records for path in split.paths]
    assert len(set(names)) == 48
    for split in records:
        assert {split_of(text, shares) for text in split.texts} == {split.split}


def test_metadata_reaches_rewards_and_lines(tmp_path, rewards):
    grey(tmp_path / "photos" / "a.png", 1), grey(tmp_path / "photos" / "b.png", 2)
    lines = [
        {"file_name": "b.png", "text": "two", "rating": 7, "absent": None},
        {"file_name": "a.png", "text": "one", "rating": 3.5},
    ]
    (tmp_path / "photos" / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    name = rewards["tagged"]
    curate(options(tmp_path / "photos", tmp_path / "out", rewards={name: 1.0}))
    records = CuratedSet.load(tmp_path / "out")
    assert records.texts == ("two", "one") and records.metadata == ({"rating": 7}, {"rating": 3.5})
    assert records.scores == ({name: 7.0}, {name: 3.5})


@pytest.mark.slow
def test_the_verifier_of_nano_accepts_what_its_prompts_show(tmp_path):
    """Drawn scenes, with the metadata of their prompts; two of twelve have another's caption."""
    records = prompts.balanced("tune", 12)
    scenes = draw.draw(records, np.random.default_rng(0))
    folder = tmp_path / "scenes"
    folder.mkdir()
    for number, scene in enumerate(scenes):
        Image.fromarray(scene.transpose(1, 2, 0)).save(folder / f"{number:02d}.png")
    shown = [records[3], records[1], records[2], records[0], *records[4:]]
    lines = [{"file_name": f"{n:02d}.png", **record} for n, record in enumerate(shown)]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    name = {"nano_strict": 1.0}
    about = curate(
        options(folder, tmp_path / "out", resolution=scenes.shape[-1], rewards=name, min=name)
    )
    assert about["counts"]["dropped"] == {"min nano_strict": 2}
    chosen = CuratedSet.load(tmp_path / "out")
    assert chosen.texts == tuple(r["prompt"] for r in (*records[1:3], *records[4:]))
    assert torch.equal(chosen.images([0])[0], torch.from_numpy(scenes[1]))
    assert chosen.prompts.metadata[0]["include"] == records[1]["include"]


def test_several_sources_and_a_limit(photos, tmp_path):
    other = captioned(tmp_path / "other", {"x.png": (101, "x"), "y.png": (102, "y")})
    about = curate(options((str(other), str(photos)), tmp_path / "out", limit=5))
    assert greys(tmp_path / "out") == [101, 102, 0, 10, 20]
    assert about["sources"] == [
        {"name": str(other), "read": 2, "images": 2},
        {"name": str(photos), "read": 3, "images": 3},
    ]


def test_a_curated_set_is_a_source_whose_scores_are_taken_over(
    photos, tmp_path, rewards, monkeypatch
):
    name, length = rewards["brightness"], rewards["length"]
    curate(options(photos, tmp_path / "all", rewards={name: 1.0}, shares=(0.5, 0.3, 0.2)))
    seen = []

    def count_calls(self, images, prompts, group_size):
        seen.extend(self.weights)
        return score_each(self, images, prompts, group_size)

    score_each = module.Scorer.score_each
    monkeypatch.setattr(module.Scorer, "score_each", count_calls)
    again = {"rewards": {name: 1.0, length: 1.0}, "min": {name: 40.0}}
    curate(options(tmp_path / "all", tmp_path / "best", **again))
    assert set(seen) == {length}
    records = CuratedSet.load(tmp_path / "best")
    assert sorted(greys(tmp_path / "best")) == [40, 50, 60, 70, 80, 90]
    by_source = dict(zip(records.sources, records.scores, strict=True))
    assert by_source[f"{photos}/4.png"] == {name: 40.0, length: 8.0}
    # At another size they are other images.
    curate(options(tmp_path / "all", tmp_path / "small", resolution=4, **again))
    assert set(seen) == {name, length}


# Stopped and continued


def everything(folder, out, rewards) -> CurateOptions:
    name, length = rewards["brightness"], rewards["length"]
    return options(
        folder,
        out,
        rewards={name: 1.0, length: 0.5},
        min={name: 15.0},
        top={name: 0.75},
        shares=(0.8, 0.1, 0.1),
        pairs=True,
        batch_size=3,
    )


class Stopped(Exception):
    """The process ends here."""


def stop_at(monkeypatch, number: int) -> list[int]:
    """Raise in the writing of file number `number`, before it is there; the list counts."""
    count = [0]
    replacing = files.replacing

    def stopping(path):
        count[0] += 1
        if count[0] == number:
            raise Stopped(str(path))
        return replacing(path)

    monkeypatch.setattr(files, "replacing", stopping)
    return count


FILES = 15
"""That a command of `everything` writes, one after the other."""


@pytest.mark.parametrize("number", [1, 5, FILES - 6, FILES - 2, FILES])
def test_a_stopped_command_goes_on_to_the_same_bytes(
    photos, tmp_path, rewards, monkeypatch, number
):
    """Nine pictures of four batches, three splits, pairs, histograms, report and dataset.json."""
    with monkeypatch.context() as patch:
        count = stop_at(patch, 0)
        curate(everything(photos, tmp_path / "whole", rewards))
        assert count == [FILES]
        stop_at(patch, number)
        with pytest.raises(Stopped):
            curate(everything(photos, tmp_path / "out", rewards))
    assert not (tmp_path / "out" / "dataset.json").exists()
    curate(everything(photos, tmp_path / "out", rewards))
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")


@pytest.mark.slow
def test_stopped_at_any_file_again_and_again(photos, tmp_path, rewards, monkeypatch):
    """One more file each time until it is finished; batches of another size do not matter."""
    curate(everything(photos, tmp_path / "whole", rewards))
    stops = 0
    for number in range(1, 40):
        with monkeypatch.context() as patch:
            stop_at(patch, number)
            try:
                curate(everything(photos, tmp_path / "out", rewards))
                break
            except Stopped:
                stops += 1
    assert stops > 5
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")


def test_stopped_before_the_last_pictures_are_removed(photos, tmp_path, rewards, monkeypatch):
    curate(everything(photos, tmp_path / "whole", rewards))

    def stop(folder, database):
        raise Stopped

    with monkeypatch.context() as patch:
        patch.setattr(module, "_tidy", stop)
        with pytest.raises(Stopped):
            curate(everything(photos, tmp_path / "out", rewards))
    assert (tmp_path / "out" / store.FILE).exists()
    curate(everything(photos, tmp_path / "out", rewards))
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")


def test_a_finished_set_is_left_alone(photos, tmp_path, rewards):
    about = curate(everything(photos, tmp_path / "out", rewards))
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    shutil.rmtree(photos)
    photos.mkdir()
    again = curate(everything(photos, tmp_path / "out", rewards))
    assert again == json.loads(json.dumps(about))
    assert times == {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}


def test_what_was_scored_is_not_scored_again(photos, tmp_path, rewards, monkeypatch):
    with monkeypatch.context() as patch:
        stop_at(patch, 7)
        with pytest.raises(Stopped):
            curate(everything(photos, tmp_path / "out", rewards))
    seen = []
    real = pictures.read

    def count_reads(open_picture, size, upscale):
        seen.append(open_picture)
        return real(open_picture, size, upscale)

    monkeypatch.setattr(pictures, "read", count_reads)
    curate(everything(photos, tmp_path / "out", rewards))
    # Six of ten pictures were in batches that were committed.
    assert len(seen) == 4


def test_another_configuration_is_refused(photos, tmp_path, rewards, monkeypatch):
    name = rewards["brightness"]
    with monkeypatch.context() as patch:
        stop_at(patch, 7)
        with pytest.raises(Stopped):
            curate(options(photos, tmp_path / "out", rewards={name: 1.0}))
    for state in ("was begun", "is finished"):
        for changes, words in (
            ({"min": {name: 3.0}}, "--min {} then and {'"),
            ({"resolution": 4}, r"--resolution \[8, 8\] then and \[4, 4\] now"),
            ({"shares": (0.5, 0.5, 0.0)}, "--shares"),
            ({"reward_options": {}, "rewards": {name: 2.0}}, "--rewards"),
        ):
            changed = options(photos, tmp_path / "out", **{"rewards": {name: 1.0}, **changes})
            with pytest.raises(ConfigError, match=f"{state} with other options.*{words}"):
                curate(changed)
        # How fast it goes does not count.
        curate(options(photos, tmp_path / "out", rewards={name: 1.0}, batch_size=2, workers=2))


def test_a_source_that_changed_is_refused(photos, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        stop_at(patch, 7)
        with pytest.raises(Stopped):
            curate(options(photos, tmp_path / "out"))
    grey(photos / "00.png", 200).with_suffix(".txt").write_text("new")
    with pytest.raises(ConfigError, match=r"has '.*2.png' where '.*3.png' was read before"):
        curate(options(photos, tmp_path / "out"))


def test_two_processes_do_not_write_one_set(photos, tmp_path):
    (tmp_path / "out").mkdir()
    first = store.Store(tmp_path / "out", ())
    with first.transaction():
        first.put("a", 1)
    with pytest.raises(ConfigError, match="in use by another process"):
        curate(options(photos, tmp_path / "out"))
    first.close()


def curate_slowly(*words):
    """The command line, with time to be killed in."""
    from flowgrpo.cli import main

    write = pictures.write

    def slow(path, image):
        time.sleep(0.05)
        write(path, image)

    pictures.write = slow
    sys.exit(main.main(list(words)))


@pytest.mark.slow
def test_kill_9_in_the_middle(tmp_path, rewards):
    """A process of its own, killed twice; what the third one writes is what one run writes."""
    pairs = {f"{i:02d}.png": (9 * i, f"prompt {i // 2}") for i in range(26)}
    source = captioned(tmp_path / "photos", pairs)
    name = rewards["brightness"]

    def start(out, log):
        words = f"curate {source} --out {out} --resolution 8 --batch-size 4 --pairs"
        thresholds = ["--rewards", name, "1", "--min", name, "20", "--top", name, "0.8"]
        return processes.Fork(tmp_path / log, curate_slowly, *words.split(), *thresholds)

    for images in (6, 15):
        process = start(tmp_path / "out", f"log{images}")
        while len(list((tmp_path / "out" / "images").glob("*/*.png"))) < images:
            assert process.process.is_alive(), process.log.read_text()
            time.sleep(0.005)
        process.kill(signal.SIGKILL)
        process.wait(code=-signal.SIGKILL)
    assert not (tmp_path / "out" / "dataset.json").exists()
    running = [start(tmp_path / out, f"{out}.log") for out in ("out", "whole")]
    for process in running:
        process.wait()
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")
    assert len(load_pairs(tmp_path / "out")) > 5


# Mistakes


def refused(message, *arguments, **changes):
    with pytest.raises(ConfigError, match=message) as error:
        curate(options(*arguments, **changes))
    text = str(error.value)
    assert "\n" not in text and text.endswith(".")


def test_thresholds_that_leave_nothing(photos, tmp_path, rewards):
    name = rewards["brightness"]
    changes = {"rewards": {name: 1.0}, "min": {name: 95.0}}
    refused(
        r"none of 10 images is left \(dropped: 10 min .*; scores: .* from 0 to 90\)",
        photos,
        tmp_path / "out",
        **changes,
    )
    assert not (tmp_path / "out" / "dataset.json").exists()
    refused(r"is left \(dropped: 10 too small\)", photos, tmp_path / "b", resolution=64)


def test_a_picture_that_cannot_be_read(photos, tmp_path):
    (photos / "4.png").write_bytes((photos / "4.png").read_bytes()[:30])
    message = r"the picture .*photos/4.png cannot be read \(.*\), but .* --skip-unreadable"
    refused(message, photos, tmp_path / "out")
    # What came before it is kept, and the same command with the option goes on.
    about = curate(options(photos, tmp_path / "out", skip_unreadable=True))
    assert about["counts"]["dropped"] == {"unreadable": 1} and 40 not in greys(tmp_path / "out")


def test_a_picture_without_a_caption(photos, tmp_path):
    (photos / "4.txt").write_text(" \n")
    refused("the picture .*4.png has no caption, .* --skip-uncaptioned", photos, tmp_path / "out")
    about = curate(options(photos, tmp_path / "out", skip_uncaptioned=True))
    assert about["counts"]["dropped"] == {"no caption": 1}


def test_a_source_without_pictures_leaves_no_folder(tmp_path):
    (tmp_path / "empty").mkdir()
    refused("has no pictures, but at least one", tmp_path / "empty", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_folders_that_are_refused(photos, tmp_path):
    refused("lies in the source", photos, photos / "out")
    refused("lies in the source", photos, photos)
    other = tmp_path / "other"
    other.mkdir()
    (other / "letter.txt").write_text("dear")
    refused("which holds other files", photos, other)
    refused("which is a file", photos, other / "letter.txt")
    refused("neither a folder nor a shard", tmp_path / "absent", tmp_path / "out")
    assert (other / "letter.txt").read_text() == "dear"


def test_rewards_that_fail(photos, tmp_path):
    refused("reward 'aesthetics' is unknown", photos, tmp_path / "a", rewards={"aesthetics": 1.0})
    assert not (tmp_path / "a").exists()
    file = tmp_path / "broken_reward.py"
    file.write_text("def score(images, prompts, metadata):\n    raise OSError('server gone')\n")
    name = f"{file}:score"
    with pytest.raises(RewardError, match=r"failed for all 4 images of a batch .*server gone"):
        curate(options(photos, tmp_path / "out", rewards={name: 1.0}))
    refused("without a list 'include'", photos, tmp_path / "n", rewards={"nano_strict": 1.0})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shares": (0.9, 0.2, 0.1)}, r"--shares is 0.9 0.2 0.1, which sums to 1.2"),
        ({"shares": (1.5, -0.5, 0.0)}, r"--shares is 1.5 -0.5 0"),
        ({"shares": (float("nan"), 0.5, 0.5)}, "--shares is nan"),
        ({"min": {"clipscore": 1.0}}, r"--min has 'clipscore', .*--rewards \(jpeg"),
        ({"top": {"jpeg_incompressibility": 0.0}}, r"a share in \(0, 1\] is expected"),
        ({"top": {"jpeg_incompressibility": 30.0}}, r"a share in \(0, 1\] is expected"),
        ({"min": {"jpeg_incompressibility": float("nan")}}, "a finite number is expected"),
        (
            {"min": {"jpeg_incompressibility": 2.0}, "max": {"jpeg_incompressibility": 1.0}},
            "leave no score between them",
        ),
        ({"pairs": True, "rewards": {}}, "no reward has a weight other than 0"),
        ({"pair_gap": 1.0}, "without --pairs"),
        ({"pairs": True, "pair_gap": -1.0}, "--pair-gap is -1.0"),
        ({"pairs": True, "shares": (0.0, 0.5, 0.5)}, "the share of train is 0"),
        ({"resolution": 0}, "--resolution is 0"),
        ({"batch_size": -1}, "--batch-size is -1"),
        ({"limit": 0}, "--limit is 0"),
        ({"workers": -1}, "--workers is -1"),
    ],
)
def test_options_that_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        options("photos", "out", **{"rewards": {"jpeg_incompressibility": 1.0}, **changes})


def test_sources_that_are_refused():
    with pytest.raises(ConfigError, match="no source was given"):
        options((), "out")
    with pytest.raises(ConfigError, match="'a' is named twice"):
        options(("a", "b", "a"), "out")


def test_tokens_are_not_written(photos, tmp_path, rewards):
    name = rewards["brightness"]
    changes = {"reward_options": {"deqa.token": "secret", "deqa.url": "http://host"}}
    changed = options(photos, tmp_path / "out", rewards={name: 1.0, "deqa": 0.0}, **changes)
    assert changed.identity()["reward_options"] == {}


def test_a_full_disk_is_one_sentence(photos, tmp_path, monkeypatch):
    def write(path, image):
        raise OSError(28, "No space left on device", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(pictures, "write", write)
        refused("cannot be written .*its disk is full.* goes on", photos, tmp_path / "out")
    curate(options(photos, tmp_path / "out"))
    assert torch.equal(
        CuratedSet.load(tmp_path / "out").images([1])[0],
        torch.full((3, 8, 8), 10, dtype=torch.uint8),
    )
