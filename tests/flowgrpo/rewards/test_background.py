"""Rewards beside the rollout: the scores of the serial form, in order, with a bounded queue."""

from __future__ import annotations

import json
import threading
import time
import weakref

import pytest
import torch

from flowgrpo import rewards, train
from flowgrpo.records import Prompts
from flowgrpo.rewards.background import BackgroundScoring, RewardThread
from support import processes, setups

CPU = torch.device("cpu")
PROMPTS = Prompts.of([f"prompt {k}" for k in range(4)], [{"place": k} for k in range(4)])
IMAGES = torch.randint(0, 256, (24, 3, 4, 4), dtype=torch.uint8)


@pytest.fixture
def scorer(monkeypatch):
    """Makes a Scorer of one reward, the function that is given."""

    def make(function, retries=0):
        monkeypatch.setattr(setups, "given", function, raising=False)
        return rewards.Scorer({"support.setups:given": 2.0}, retries)

    return make


def score(scorer, waiting, chunk=5):
    worker = RewardThread(CPU, waiting) if waiting else None
    scoring = BackgroundScoring(scorer, PROMPTS, 6, worker)
    for start in range(0, 24, chunk):
        scoring.add(IMAGES[start : start + chunk])
    return scoring.finish()


@pytest.mark.parametrize("chunk", [1, 5, 6, 13, 24])
def test_order_and_bits_are_those_of_the_serial_form(scorer, chunk):
    """For a reward whose scores depend on how many images it is given at once."""

    def reward(images, prompts, metadata):
        assert prompts == [f"prompt {entry['place']}" for entry in metadata]
        places = torch.tensor([float(entry["place"]) for entry in metadata])
        return images.float().mean((1, 2, 3)) + 1000 * places + images.float().mean()

    found = [score(scorer(reward), waiting, chunk) for waiting in (0, 1, 3)]
    for other in found[1:]:
        assert torch.equal(found[0].total, other.total)
    alone = IMAGES.float().mean((1, 2, 3)) + 1000 * torch.arange(4).repeat_interleave(6)
    assert ((found[0].total / 2 - alone - 127).abs() < 60).all()
    whole = scorer(lambda i, p, m: i.float().mean((1, 2, 3)))
    assert torch.equal(score(whole, 2, chunk).total, whole(IMAGES, PROMPTS, 6).total)


def test_groups_are_dropped_one_by_one(scorer):
    """A portion whose only group failed is no reason to stop, and all groups are."""

    def choosy(images, prompts, metadata):
        return [float("nan") if e["place"] in bad else 1.0 for e in metadata]

    bad = {1, 2}
    for waiting in (0, 2):
        found = score(scorer(choosy), waiting)
        assert found.dropped.tolist() == [False, True, True, False]
    bad = {0, 1, 2, 3}
    for waiting in (0, 2):
        with pytest.raises(rewards.RewardError, match="failed for all 4 groups"):
            score(scorer(choosy), waiting)


@pytest.mark.parametrize("waiting", [0, 1, 2])
def test_what_a_reward_raises_arrives(scorer, waiting):
    short = scorer(lambda images, prompts, metadata: [1.0])
    with pytest.raises(rewards.RewardError, match="one score an image"):
        score(short, waiting)
    # The worker is free again.
    assert score(scorer(lambda i, p, m: [1.0] * len(i)), waiting).total.tolist() == [2.0] * 24


def test_the_queue_is_bounded_and_a_slow_reward_does_not_hold_up(scorer):
    """Two portions are taken while the reward has not answered once; the third has to wait."""
    started, go, added = threading.Event(), threading.Event(), []

    def slow(images, prompts, metadata):
        started.set()
        assert go.wait(10)
        return [1.0] * len(images)

    scoring = BackgroundScoring(scorer(slow), PROMPTS, 6, RewardThread(CPU, 2))

    def sampling():
        for k in range(4):
            scoring.add(IMAGES[6 * k : 6 * k + 6])
            added.append(k)

    thread = threading.Thread(target=sampling)
    thread.start()
    assert started.wait(10)
    thread.join(0.3)
    assert thread.is_alive() and added == [0, 1]
    go.set()
    thread.join(10)
    assert added == [0, 1, 2, 3] and scoring.finish().total.tolist() == [2.0] * 24


def aborted(seconds):
    """A run that is given up while one reward is being computed and another waits."""
    worker, started = RewardThread(CPU, 2), threading.Event()
    for _ in range(2):
        worker.submit(lambda images: (started.set(), time.sleep(seconds)), IMAGES)
    assert started.wait(10)
    raise KeyboardInterrupt


@pytest.mark.slow
def test_a_process_does_not_wait_for_rewards_that_nobody_wants(tmp_path):
    start = time.perf_counter()
    processes.Fork(tmp_path / "log", aborted, 60).wait(code=1)
    assert time.perf_counter() - start < 30


def test_the_thread_ends_with_its_worker():
    worker = RewardThread(CPU, 1)
    thread, gone = worker.thread, weakref.ref(worker)
    assert worker.submit(lambda images: len(images), IMAGES).result(10) == 24
    del worker
    thread.join(10)
    assert gone() is None and not thread.is_alive()


@pytest.mark.parametrize("late", [False, True])
def test_an_error_waits_where_it_is_asked_to(scorer, late):
    """A process whose forwards the others need samples to the end of its rollout."""
    thread = RewardThread(CPU, 2)
    scoring = BackgroundScoring(scorer(lambda i, p, m: [1.0]), PROMPTS, 6, thread, late=late)
    scoring.add(IMAGES[:6])
    (future,) = scoring._running
    assert isinstance(future.exception(10), rewards.RewardError)
    if not late:
        with pytest.raises(rewards.RewardError, match="one score an image"):
            scoring.add(IMAGES[6:12])
        return
    for start in (6, 12, 18):
        scoring.add(IMAGES[start : start + 6])
    with pytest.raises(rewards.RewardError, match="one score an image"):
        scoring.rewards()


def test_missing_images_are_noticed(scorer):
    scoring = BackgroundScoring(scorer(lambda i, p, m: [1.0] * len(i)), PROMPTS, 6)
    scoring.add(IMAGES[:15])
    with pytest.raises(ValueError, match="15 images were added, but 24 are expected"):
        scoring.finish()


@pytest.mark.slow
def test_a_run_has_the_same_numbers_with_and_without(pixel_model, tmp_path):
    """metrics.jsonl, whose groups of 6 lie across chunks of 4."""
    found = []
    for overlap in (0, 2):
        folder = tmp_path / str(overlap)
        folder.mkdir()
        changes = {
            "sample.overlap": overlap,
            "sample.batch_size": 4,
            "optim.updates_per_iteration": 1,
            "run.steps": 2,
            "run.eval_every": 0,
            "run.eval_prompts": 2,
            "sample.eval_steps": 2,
        }
        train.run(setups.config(pixel_model, folder, **changes))
        lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()
        found.append([{**json.loads(line), "seconds": None} for line in lines])
    assert found[0] == found[1]
