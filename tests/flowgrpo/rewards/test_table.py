"""Names, options, environment variables, lazy loading, and errors of one sentence."""

import pytest
import torch

from flowgrpo.rewards import REWARDS, RewardError, load
from flowgrpo.rewards.images import check_images, from_pil, from_png, to_pil, to_png
from flowgrpo.rewards.options import ConfigurableReward, configurable, library
from support import torch_fork

IMAGES = torch.zeros(2, 3, 8, 8, dtype=torch.uint8)


@pytest.mark.parametrize("name", sorted(REWARDS))
def test_every_name_loads_without_its_libraries(name):
    assert callable(load(name))


def test_naming_rewards_imports_nothing_heavy():
    names = [name for name in REWARDS if not name.startswith("nano")]
    code = (
        "import sys; from flowgrpo.rewards import load\n"
        f"for name in {names!r}: load(name)\n"
        "heavy = ('transformers', 'rapidocr', 'onnxruntime', 'httpx', 'fastapi', 'rapidfuzz')\n"
        "sys.exit(', '.join(m for m in heavy if m in sys.modules) or 0)"
    )
    done = torch_fork.run(code)
    assert done.returncode == 0, done.stderr


def counted():
    built = []

    @configurable("counted")
    def score(
        *, model: str = "there", batch_size: int = 4, rate: float = 0.5, token: str | None = None
    ):
        """Its words."""
        built.append((model, batch_size, rate, token))
        return lambda images, prompts, metadata: [1.0] * len(images)

    return score, built


def test_options_come_from_arguments_then_environment_then_defaults(monkeypatch):
    score, built = counted()
    monkeypatch.setenv("FLOWGRPO_REWARD_COUNTED_BATCH_SIZE", "7")
    monkeypatch.setenv("FLOWGRPO_REWARD_COUNTED_MODEL", "from the environment")
    monkeypatch.setenv("FLOWGRPO_REWARD_COUNTED_TOKEN", "secret")
    other = score.configured(model="given")
    assert built == []
    assert other(IMAGES, ["", ""], [{}, {}]) == [1.0, 1.0]
    other(IMAGES, ["", ""], [{}, {}])
    assert built == [("given", 7, 0.5, "secret")]
    assert score.options["model"] == "from the environment"
    assert score.defaults == {"model": "there", "batch_size": 4, "rate": 0.5, "token": None}
    assert score.__doc__ == "Its words."


def test_option_errors(monkeypatch):
    score, _ = counted()
    with pytest.raises(RewardError, match=r"no option 'modle'"):
        score.configured(modle="x")
    for options, problem in (
        ({"batch_size": "some"}, "batch_size of reward 'counted' is 'some'"),
        ({"batch_size": 2.5}, "is 2.5, but a value of type int"),
        ({"rate": True}, "is True, but a value of type float"),
        ({"model": 3}, "is 3, but a value of type str"),
    ):
        with pytest.raises(RewardError, match=problem):
            score.configured(**options)
    typed = score.configured(batch_size="3", rate=2, token="t").options
    assert typed == {"model": "there", "batch_size": 3, "rate": 2, "token": "t"}
    monkeypatch.setenv("FLOWGRPO_REWARD_COUNTED_BATCH_SIZE", "many")
    with pytest.raises(RewardError, match="COUNTED_BATCH_SIZE is 'many'"):
        score(IMAGES, ["", ""], [{}, {}])


@pytest.mark.parametrize(
    ("images", "prompts", "problem"),
    [
        (IMAGES.float(), ["", ""], "uint8"),
        ([1, 2], ["", ""], "uint8"),
        (IMAGES[0], ["", "", ""], "has shape"),
        (IMAGES, [""], "2 images, 1 prompts"),
    ],
)
def test_images_are_checked(images, prompts, problem):
    score, built = counted()
    with pytest.raises((TypeError, ValueError), match=problem):
        score(images, prompts, [{}, {}])
    assert not built


def test_a_missing_library_says_what_to_install():
    with pytest.raises(RewardError, match=r"pip install 'flowgrpo\[rewards\]'"):
        library("no_such_library", "ocr")


@pytest.mark.parametrize("name", ["pickscore", "clipscore", "geneval", "imagereward", "aesthetic"])
def test_a_missing_model_is_one_sentence(name, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    reward = load(name).configured(model=str(tmp_path / "nothing"), device="cpu")
    metadata = [{"tag": "single_object", "include": [{"class": "dog", "count": 1}]}] * 2
    with pytest.raises(RewardError, match=r"nothing cannot be loaded .*is expected; check") as info:
        reward(IMAGES, ["a", "b"], metadata)
    assert "\n" not in str(info.value)


def test_a_wrong_device_is_one_sentence():
    with pytest.raises(RewardError, match="device of a reward is 'gpu'"):
        load("clipscore").configured(device="gpu")(IMAGES, ["", ""], [{}, {}])


def test_png_keeps_every_bit():
    image = torch.randint(0, 256, (3, 13, 7), dtype=torch.uint8)
    assert torch.equal(from_png(to_png(image)), image)
    assert torch.equal(from_pil(to_pil(image)), image)
    with pytest.raises(ValueError, match="7 x 13 pixels"):
        from_png(to_png(image), max_pixels=90)
    for bad in ("???", "aGVsbG8=", to_png(image)[:40]):
        with pytest.raises(ValueError, match="not base64 of a PNG"):
            from_png(bad)


def test_jpeg_sizes_are_those_of_the_files(tmp_path):
    noise = torch.randint(0, 256, (3, 64, 64), dtype=torch.uint8)
    images = torch.stack([noise, torch.full_like(noise, 128)])
    expected = []
    for image in images:
        to_pil(image).save(tmp_path / "a.jpg", quality=95)
        expected.append((tmp_path / "a.jpg").stat().st_size / 1000)
    assert load("jpeg_incompressibility")(images, ["", ""], [{}, {}]) == expected
    found = load("jpeg_compressibility")(images, ["", ""], [{}, {}])
    assert found == [-size / 500 for size in expected]
    assert found[0] < found[1] < 0


def test_configured_rewards_are_what_the_scorer_takes():
    assert isinstance(load("ocr"), ConfigurableReward)
    check_images(IMAGES, ["", ""], [{}, {}])
