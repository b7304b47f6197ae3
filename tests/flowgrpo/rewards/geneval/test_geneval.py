"""GenEval's detector and colours on real Mask2Former and CLIP folders."""

import json

import pytest
import torch

from flowgrpo.cli import main
from flowgrpo.evaluation import systems
from flowgrpo.prompts.sets.geneval_prompts import CLASSES, COLORS
from flowgrpo.rewards import RewardError, clip, load
from flowgrpo.rewards.geneval import detector as geneval_detector
from flowgrpo.rewards.geneval.detector import ColorClassifier, Detector
from flowgrpo.rewards.geneval.reward import CachedDetector
from flowgrpo.rewards.geneval.rules import Detection
from flowgrpo.rewards.images import to_pil

DOG, CAR = CLASSES.index("dog"), CLASSES.index("car")


def tiny_detector(labels=80):
    """A Mask2Former with a Swin backbone, a few thousand weights, which sees dogs and cars."""
    from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, SwinConfig

    backbone = SwinConfig(
        image_size=64,
        embed_dim=8,
        depths=[1, 1, 1, 1],
        num_heads=[1, 1, 2, 2],
        window_size=2,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    config = Mask2FormerConfig(
        backbone_config=backbone,
        num_labels=labels,
        num_queries=6,
        hidden_dim=32,
        feature_size=32,
        mask_feature_size=32,
        encoder_feedforward_dim=16,
        dim_feedforward=16,
        encoder_layers=1,
        decoder_layers=2,
        num_attention_heads=2,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = Mask2FormerForUniversalSegmentation(config).eval()
        if labels == 80:
            model.class_predictor.bias.data[[DOG, CAR]] = torch.tensor([6.0, 5.6])
        # Masks that are sure of themselves.
        for name, weight in model.named_parameters():
            if "mask_embedder" in name and name.endswith("weight"):
                weight.data.mul_(12)
    return model


@pytest.fixture(scope="module")
def detector_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mask2former")
    tiny_detector().save_pretrained(folder)
    return folder


def mmdetection(logits, masks, size):
    """The instance results of mmdetection's fusion head, one candidate at a time, in float64."""
    masks = torch.nn.functional.interpolate(
        masks[None].double(), size=size, mode="bilinear", align_corners=False
    )[0]
    found = []
    for query in range(len(logits)):
        scores = logits[query].double().softmax(dim=-1)
        for name in range(80):
            inside = masks[query] > 0
            if inside.any():
                sure = masks[query].sigmoid()[inside].mean()
                y, x = inside.nonzero().T
                box = (x.min(), y.min(), x.max() + 1, y.max() + 1)
                found.append((float(scores[name] * sure), CLASSES[name], tuple(map(float, box))))
    return sorted(found, reverse=True)


@pytest.mark.slow
def test_detections_are_mmdetections(detector_folder, pictures):
    detector = Detector(tiny_detector(), batch_size=2, edge=64)
    found = detector(pictures)
    model = tiny_detector()
    with torch.no_grad():
        out = model(pixel_values=detector._prepare(pictures)[1])
    count = 0
    for row, detections in enumerate(found):
        # 48 x 48 becomes 64 x 64, which needs no padding, so one resize is the same as two.
        expected = mmdetection(
            out.class_queries_logits[row],
            torch.nn.functional.interpolate(
                out.masks_queries_logits[row][None], size=(64, 64), mode="bilinear"
            )[0],
            (48, 48),
        )
        kept = sorted(((d.score, d.name, d.box) for d in detections), reverse=True)
        strong = [one for one in expected if one[0] > 0.3]
        count += len(strong)
        assert len(kept) >= len(strong)
        for (score, name, box), (score_, name_, box_) in zip(kept, strong, strict=False):
            assert (name, box) == (name_, box_)
            assert score == pytest.approx(score_, abs=1e-4)
    assert count >= 5


def test_hand_made_masks_give_their_boxes_and_scores():
    masks = torch.full((3, 16, 24), -20.0)
    masks[0, 2:6, 4:12] = 20.0
    masks[1, 10:14, 16:22] = 20.0
    logits = torch.zeros(3, 81)
    logits[0, DOG] = logits[1, CAR] = 10.0
    # The third query has no mask and must not become an object.
    logits[2, DOG] = 10.0
    # 64 x 96 padded pixels of which 60 x 90 are the image of 120 x 180.
    found = geneval_detector._detections(logits, masks, (64, 96), (60, 90), (120, 180))
    assert [d.name for d in found] in (["dog", "car"], ["car", "dog"])
    probability = float(torch.tensor([10.0] + [0.0] * 80).softmax(0)[0])
    boxes = {"dog": (32, 16, 96, 48), "car": (128, 80, 176, 112)}
    for one in found:
        # Bilinear edges reach up to half a mask pixel of 8 further.
        assert all(abs(a - b) <= 4 for a, b in zip(one.box, boxes[one.name], strict=True))
        assert 0.9 * probability < one.score <= probability
        assert one.mask.shape == (120, 180)


def test_the_image_is_prepared_as_in_mmdetection():
    detector = Detector(tiny_detector(), batch_size=2, edge=800)
    inside, pixels = detector._prepare(torch.zeros(1, 3, 512, 512, dtype=torch.uint8))
    assert (inside, pixels.shape[-2:]) == ((800, 800), (800, 800))
    inside, pixels = detector._prepare(torch.full((1, 3, 300, 1000), 255, dtype=torch.uint8))
    assert (inside, pixels.shape[-2:]) == ((400, 1333), (416, 1344))
    white = (1 - torch.tensor(geneval_detector.MEAN)) / torch.tensor(geneval_detector.STD)
    torch.testing.assert_close(pixels[0, :, 0, 0], white)
    assert (pixels[..., 400:, :] == 0).all()
    assert (pixels[..., 1333:] == 0).all()


def test_colors_are_clips_choice_for_the_object_alone(clip_folder, pictures):
    model = clip.load(str(clip_folder), device="cpu")
    classifier = ColorClassifier(model)
    mask = torch.zeros(48, 48, dtype=torch.bool)
    mask[10:30, 5:45] = True
    box = (5.0, 10.0, 45.0, 30.0)
    objects = [(image, Detection("car", box, 0.9, mask)) for image in pictures]
    colors = [one.color for one in classifier(objects)]

    crop = geneval_detector._crop(pictures[0], objects[0][1])
    assert crop.shape == (3, 20, 40)
    assert torch.equal(crop, pictures[0][:, 10:30, 5:45])
    wide = geneval_detector._crop(pictures[0], Detection("car", (0.0, 0.0, 48.0, 48.0), 1, mask))
    assert (wide[:, ~mask] == 0x99).all()
    assert torch.equal(wide[:, mask], pictures[0][:, mask])

    # What is outside the mask does not matter.
    noisy = torch.where(mask, pictures, torch.randint(0, 256, pictures.shape).to(torch.uint8))
    again = classifier([(image, one) for image, (_, one) in zip(noisy, objects, strict=True)])
    assert [one.color for one in again] == colors

    sentences = ("a photo of a {} car", "a photo of a {}-colored car", "a photo of a {} object")
    texts = [model.texts([s.format(color) for s in sentences]).mean(0) for color in COLORS]
    table = torch.stack([t / t.norm() for t in texts])
    for image, color in zip(pictures, colors, strict=True):
        part = to_pil(image).crop((5, 10, 45, 30))
        vector = model.images(geneval_detector_input(part))[0]
        assert COLORS[int((table @ vector).argmax())] == color


def geneval_detector_input(part):
    from flowgrpo.rewards.images import from_pil

    return from_pil(part)[None]


def test_both_rewards_on_saved_models(detector_folder, clip_folder, pictures):
    metadata = [
        {"tag": "single_object", "include": [{"class": "dog", "count": 1}]},
        {"tag": "counting", "include": [{"class": "dog", "count": 2}]},
        {"tag": "colors", "include": [{"class": "dog", "count": 1, "color": "red"}]},
        {
            "tag": "position",
            "include": [
                {"class": "dog", "count": 1},
                {"class": "car", "count": 1, "position": ["above", 0]},
            ],
        },
        {"tag": "two_object", "include": [{"class": n, "count": 1} for n in ("dog", "zebra")]},
    ]
    options = {"model": str(detector_folder), "clip_model": str(clip_folder), "device": "cpu"}
    options |= {"edge": 64, "batch_size": 3}
    prompts = [""] * 5
    strict = load("geneval_strict").configured(**options)(pictures, prompts, metadata)
    partial = load("geneval").configured(**options)(pictures, prompts, metadata)
    assert set(strict) <= {0.0, 1.0}
    assert len(partial) == 5
    assert max(partial) <= 1
    # The rigged detector sees a dog everywhere, and never a zebra.
    assert strict[0] == 1.0
    assert strict[4] == 0.0
    with pytest.raises(RewardError, match="GenEval's is expected"):
        load("geneval").configured(**options)(pictures[:1], ["a dog"], [{}])


@pytest.mark.slow
def test_the_same_images_are_detected_once(clip_folder, pictures):
    class Counting(Detector):
        looks = 0

        def __call__(self, images):
            Counting.looks += 1
            return super().__call__(images)

    detector = CachedDetector(
        Counting(tiny_detector(), 8, 64), ColorClassifier(clip.load(str(clip_folder), device="cpu"))
    )
    wish = {"tag": "colors", "include": [{"class": "dog", "count": 1, "color": "red"}]}
    first = detector(pictures, [wish] * 5)
    assert detector(pictures, [dict(wish)] * 5) is first
    assert Counting.looks == 1
    assert all(d.color for objects in first for d in objects.get("dog", ()))
    # Other metadata, other images, and the same tensor with other pixels are looked at again.
    detector(pictures, [{**wish, "tag": "counting"}] * 5)
    detector(pictures.clone(), [wish] * 5)
    detector(pictures, [wish] * 5)
    pictures.fill_(0)
    detector(pictures, [wish] * 5)
    assert Counting.looks == 5
    # What is forgotten holds no masks.
    other = pictures.clone()
    detector(other, [wish] * 5)
    del other
    assert detector._last is None


def test_a_detector_for_other_classes_is_refused():
    with pytest.raises(RewardError, match="has 7 classes"):
        Detector(tiny_detector(7), batch_size=1)


@pytest.mark.slow
def test_a_folder_in_the_benchmarks_layout(detector_folder, clip_folder, tmp_path, capsys):
    """`flowgrpo evaluate --images DIR`, which takes geneval_strict by itself."""
    draw, entries = torch.Generator().manual_seed(5), []
    for number in range(6):
        name = ("dog", "car")[number % 2]
        tag, count = ("single_object", 1) if number < 3 else ("counting", 1 + number % 3)
        include = [{"class": name, "count": count}]
        exclude = [{"class": name, "count": count + 1}] if tag == "counting" else []
        entry = {"tag": tag, "include": include, "exclude": exclude, "prompt": f"{count} {name}"}
        folder = tmp_path / "emu3" / f"{number:05d}"
        (folder / "samples").mkdir(parents=True)
        (folder / "metadata.jsonl").write_text(json.dumps(entry))
        for sample in range(2):
            size = (3, 48, 48) if sample else (3, 32, 64)
            image = torch.randint(0, 256, size, dtype=torch.uint8, generator=draw)
            to_pil(image).save(folder / "samples" / f"{sample:04d}.png")
            entries.append((image, entry))
    options = {"model": str(detector_folder), "clip_model": str(clip_folder), "edge": "64"}
    line = ["evaluate", "--images", str(tmp_path / "emu3"), "--out", str(tmp_path / "out")]
    line += ["--device", "cpu", "--reward-options"]
    line += [word for key, value in options.items() for word in (f"geneval_strict.{key}", value)]
    assert main.main(line) == 0
    reward = load("geneval_strict").configured(**options, device="cpu")
    verdicts: dict[str, list[float]] = {}
    for image, entry in entries:
        [verdict] = reward(image[None], [entry["prompt"]], [entry])
        verdicts.setdefault(entry["tag"], []).append(verdict)
    means = {tag: sum(values) / len(values) for tag, values in verdicts.items()}
    [row] = systems.load(tmp_path / "out")
    score = row.task.scores["geneval_strict"]
    assert score.groups == means and score.mean == sum(means.values()) / 2
    assert 0 < score.mean < 1 and row.quality is None
    shown = capsys.readouterr().out.splitlines()
    assert shown[0].split() == ["Model", "GenEval"] and f" {score.mean:.3f} (" in shown[1]
    assert "differ in size (6 of 64x32, 6 of 48x48)" in shown[2]
