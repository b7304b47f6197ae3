"""Videos and rewards: who gets frames, which, and what becomes of their scores; motion."""

from __future__ import annotations

import pytest
import torch

from flowgrpo.config import ConfigError, RewardConfig
from flowgrpo.records import Prompts
from flowgrpo.rewards import RewardError, Scorer
from flowgrpo.rewards.differentiable import differentiable_rewards
from flowgrpo.rewards.frames import as_asked, positions, spread, takes_videos
from flowgrpo.rewards.motion import smoothness
from flowgrpo.rewards.options import configurable

PROMPTS = Prompts.of(["a", "b"], [{"n": 1}, {"n": 2}])
SEEN: list[tuple] = []


def first_number(images, prompts, metadata):
    """The first value of a picture, and what it was called with."""
    SEEN.append((tuple(images.shape), list(prompts), [entry["n"] for entry in metadata]))
    return images[:, 0, 0, 0].double()


first_number.of_pixels = lambda pixels, prompts, metadata: pixels[:, 0, 0, 0]


def whole(videos, prompts, metadata):
    """A reward of videos: the sum of the first value of each frame."""
    SEEN.append((tuple(videos.shape), list(prompts), [entry["n"] for entry in metadata]))
    return videos[:, :, 0, 0, 0].double().sum(dim=1)


whole.frames = True


def numbered(rows: int, frames: int) -> torch.Tensor:
    """Videos whose frame t of row b is 10 b + t everywhere."""
    values = 10 * torch.arange(rows)[:, None] + torch.arange(frames)
    return values.view(rows, frames, 1, 1, 1).expand(-1, -1, 3, 4, 6).to(torch.uint8)


@pytest.mark.parametrize("total", [1, 2, 5, 81])
@pytest.mark.parametrize("count", [1, 2, 4, 100])
def test_frames_are_spread_evenly_about_the_middle(total, count):
    chosen = positions(total, count)
    assert len(chosen) == min(count, total) and chosen == sorted(set(chosen))
    assert chosen[0] >= 0 and chosen[-1] < total
    if count == 1:
        assert chosen == [total // 2]
    # Each is in the middle of its share of the video.
    for i, t in enumerate(chosen):
        assert abs(t + 0.5 - (i + 0.5) * total / len(chosen)) <= 0.5
    assert torch.equal(spread(numbered(2, total), count), numbered(2, total)[:, chosen])


def test_what_a_reward_is_given():
    videos = numbered(2, 9)
    images = videos[:, 0]
    assert as_asked(first_number, images, 3) == (images, 1)
    found, frames = as_asked(first_number, videos, 3)
    assert frames == 3 and torch.equal(found, videos[:, [1, 4, 7]].flatten(0, 1))
    assert as_asked(whole, videos, 3)[0] is videos
    assert torch.equal(as_asked(whole, images, 3)[0], images[:, None])


@pytest.mark.parametrize("count", [1, 2])
def test_scores_of_images_are_means_over_frames(count):
    """Rows, prompts and metadata of both kinds; and retries take whole videos."""
    scorer = Scorer({"test_frames:first_number": 1.0, "test_frames:whole": 2.0}, frames=count)
    SEEN.clear()
    found = scorer(numbered(4, 4), PROMPTS, 2)
    picked = [2] if count == 1 else [1, 3]
    expected = 10.0 * torch.arange(4) + sum(picked) / count
    assert torch.equal(found.rewards["test_frames:first_number"], expected.double())
    sums = 4 * 10.0 * torch.arange(4) + 6
    assert torch.equal(found.rewards["test_frames:whole"], sums.double())
    assert torch.equal(found.total, (expected + 2 * sums).double())
    texts, numbers = ["a"] * 2 + ["b"] * 2, [1, 1, 2, 2]
    assert [
        (
            (4 * count, 3, 4, 6),
            [t for t in texts for _ in range(count)],
            [n for n in numbers for _ in range(count)],
        ),
        ((4, 4, 3, 4, 6), texts, numbers),
    ] == SEEN
    # As images have them: one number each, and videos of one frame.
    images = scorer.score_each(numbered(4, 4)[:, 1], PROMPTS, [1, 3])
    assert images["test_frames:first_number"].tolist() == [1, 11, 21, 31]
    assert images["test_frames:whole"].tolist() == [1, 11, 21, 31]


def test_a_group_that_fails_is_asked_again_by_its_own_frames(monkeypatch):
    calls = []

    def failing(images, prompts, metadata):
        calls.append((images[:, 0, 0, 0].tolist(), list(prompts)))
        return [float("nan") if p == "b" else 1.0 for p in prompts]

    scorer = Scorer({"test_frames:first_number": 1.0}, retries=1, frames=2)
    scorer.rewards["test_frames:first_number"] = failing
    scores = scorer.score_each(numbered(3, 4), PROMPTS, [1, 2])["test_frames:first_number"]
    assert scores[0] == 1 and scores[1:].isnan().all()
    assert calls[1] == ([11, 13, 21, 23], ["b"] * 4)


def test_rewards_are_tried_on_a_blank_video(caplog):
    scorer = Scorer({"test_frames:first_number": 1.0, "test_frames:whole": 1.0}, frames=3)
    SEEN.clear()
    scorer.try_out(PROMPTS, torch.zeros(9, 3, 4, 6, dtype=torch.uint8))
    assert [shape for shape, *_ in SEEN] == [(6, 3, 4, 6), (2, 9, 3, 4, 6)]
    assert not caplog.records
    scorer = Scorer({"motion_smoothness": 1.0})
    with pytest.raises(
        RewardError, match="was given 1 frames, but it compares three or more; make"
    ):
        scorer.try_out(PROMPTS, torch.zeros(3, 4, 6, dtype=torch.uint8))


def test_a_reward_with_options_says_what_it_takes():
    @configurable("clip", frames=True)
    def clip(*, scale: float = 1.0):
        return lambda videos, prompts, metadata: [scale] * len(videos)

    @configurable("either", frames="videos")
    def either(*, videos: bool = False):
        return lambda images, prompts, metadata: [float(images.ndim)] * len(images)

    video, texts = numbered(1, 3), (["a"], [{}])
    assert takes_videos(clip) and takes_videos(clip.configured(scale=2.0))
    assert clip.configured(scale=2.0)(video, *texts) == [2.0]
    with pytest.raises(ValueError, match=r"videos has shape \(1, 3, 4, 6\), but \[B, F, 3, H, W\]"):
        clip(video[:, 0], *texts)
    with pytest.raises(TypeError, match=r"videos is torch\.float32, but a uint8 tensor"):
        clip(video.float(), *texts)
    assert not takes_videos(either) and takes_videos(either.configured(videos="yes"))
    assert either.configured(videos=True)(video, *texts) == [5.0]
    with pytest.raises(ValueError, match=r"images has shape \(1, 3, 3, 4, 6\)"):
        either(video, *texts)


def test_smoothness_is_the_formula():
    generator = torch.Generator().manual_seed(0)
    videos = torch.randint(0, 256, (3, 6, 3, 5, 7), dtype=torch.uint8, generator=generator)
    x = videos.double()
    expected = 1 - (x[:, 1:-1] - (x[:, :-2] + x[:, 2:]) / 2).abs().flatten(1).mean(dim=1) / 255
    found = smoothness(videos, ["a"] * 3, [{}] * 3)
    torch.testing.assert_close(
        torch.tensor(found, dtype=torch.float64), expected, rtol=0, atol=1e-12
    )
    # Even change and none are smooth; black and white in turn is not at all.
    even = numbered(1, 7)
    flicker = (
        torch.tensor([0, 255] * 3, dtype=torch.uint8).view(1, 6, 1, 1, 1).expand_as(videos[:1])
    )
    assert smoothness(even, ["a"], [{}]) == [1.0]
    assert smoothness(flicker, ["a"], [{}]) == [0.0]
    with pytest.raises(RewardError, match="was given 2 frames"):
        smoothness(videos[:, :2], ["a"] * 3, [{}] * 3)


def test_gradients_reach_the_frames_that_are_judged():
    config = RewardConfig(weights={"test_frames:first_number": 0.5}, frames=2)
    [(weight, of_pixels)] = differentiable_rewards(config)
    pixels = numbered(2, 4).float().requires_grad_()
    scores = of_pixels(pixels, ["a", "b"], [{}, {}])
    assert weight == 0.5 and scores.tolist() == [2.0, 12.0]
    (grad,) = torch.autograd.grad(scores.sum(), pixels)
    assert grad[:, :, 0, 0, 0].tolist() == [[0, 0.5, 0, 0.5]] * 2 and grad.sum() == 2


def test_the_number_of_frames_is_positive():
    with pytest.raises(ConfigError, match=r"reward\.frames is 0, but it must be greater than 0"):
        RewardConfig(frames=0)
