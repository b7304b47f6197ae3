"""CLIP-based rewards on real CLIPModel folders, against transformers and Pillow used directly."""

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from flowgrpo.rewards import RewardError, clip, load, models
from flowgrpo.rewards.images import to_pil

PROMPTS = ["a red car", "a photo of a dog", "a red car", "blue", "a green object"]
NOTHING = [{} for _ in PROMPTS]


def prepared(image: Image.Image, size: int, fit: str = "crop") -> torch.Tensor:
    """CLIP's preparation by Pillow, [3, size, size]."""
    width, height = image.size
    edge = min(width, height) if fit == "crop" else max(width, height)
    whole = int if fit == "crop" else round
    image = image.resize(
        (whole(width * size / edge), whole(height * size / edge)), Image.Resampling.BICUBIC
    )
    if fit == "crop":
        left, top = round((image.width - size) / 2), round((image.height - size) / 2)
        image = image.crop((left, top, left + size, top + size))
    else:
        square = Image.new("RGB", (size, size))
        square.paste(image, ((size - image.width) // 2, (size - image.height) // 2))
        image = square
    values = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255
    return clip.normalise(values[None])[0]


def logits(folder, images, prompts, fit="crop"):
    """(logits [B], cosines [B]) by the model's own forward."""
    from transformers import AutoTokenizer, CLIPModel

    model = CLIPModel.from_pretrained(folder).eval()
    tokens = AutoTokenizer.from_pretrained(folder)(prompts, padding=True, return_tensors="pt")
    pixels = torch.stack([prepared(to_pil(image), 32, fit) for image in images])
    with torch.no_grad():
        out = model(
            input_ids=tokens.input_ids, attention_mask=tokens.attention_mask, pixel_values=pixels
        )
    found = out.logits_per_image.diagonal()
    return found, found / model.logit_scale.exp().detach()


@pytest.mark.parametrize(("name", "divisor"), [("pickscore", 26), ("clipscore", 30)])
def test_scaled_logits(name, divisor, clip_folder, pictures):
    options = {"model": str(clip_folder), "device": "cpu", "batch_size": 2}
    if name == "pickscore":
        options["tokenizer"] = str(clip_folder)
    scores = load(name).configured(**options)(pictures, PROMPTS, NOTHING)
    expected = logits(clip_folder, pictures, PROMPTS)[0] / divisor
    # Pillow and torch may round a pixel differently by one of 255.
    torch.testing.assert_close(scores, expected, rtol=0, atol=0.05)
    assert expected.std() > 0.5
    # Neither the batch nor the company of a row matters.
    alone = load(name).configured(**options)(pictures[2:3], PROMPTS[2:3], [{}])
    torch.testing.assert_close(alone, scores[2:3], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["pickscore", "clipscore"])
def test_gradient_in_the_pixels(name, clip_folder, pictures):
    """`of_pixels` scores as the reward does, but for roundings, and has its slope."""
    options = {"model": str(clip_folder), "device": "cpu"}
    if name == "pickscore":
        options["tokenizer"] = str(clip_folder)
    reward = load(name).configured(**options).build()
    scores = reward.of_pixels(pictures.float(), PROMPTS, NOTHING)
    expected = reward(pictures, PROMPTS, NOTHING)
    torch.testing.assert_close(scores, expected, rtol=0, atol=0.05)
    # Away from black and white, beyond which a resized picture does not go.
    pixels = (0.8 * pictures + 25).requires_grad_()
    scores = reward.of_pixels(pixels, PROMPTS, NOTHING)
    (gradient,) = torch.autograd.grad(scores.sum(), pixels)
    direction = gradient.sign()
    with torch.no_grad():
        ends = [reward.of_pixels(pixels + h * direction, PROMPTS, NOTHING) for h in (0.01, -0.01)]
    slope = ((ends[0] - ends[1]) / 0.02).sum()
    torch.testing.assert_close(slope, (gradient * direction).sum(), rtol=0.05, atol=0)


def test_models_in_the_home_directory(clip_folder, pictures, monkeypatch):
    monkeypatch.setenv("HOME", str(clip_folder.parent))
    scores = [
        load("clipscore").configured(model=model, device="cpu")(pictures, PROMPTS, NOTHING)
        for model in (clip_folder, f"~/{clip_folder.name}")
    ]
    assert torch.equal(*scores)
    weights = models.tensors(f"~/{clip_folder.name}")
    assert weights.keys() == models.tensors(str(clip_folder)).keys()


def test_hpsv2_is_the_cosine_of_padded_images(clip_folder, pictures):
    wide = torch.cat([pictures, pictures.flip(-1)[..., :17]], dim=-1)
    options = {"model": str(clip_folder), "tokenizer": str(clip_folder), "device": "cpu"}
    scores = load("hpsv2").configured(**options)(wide, PROMPTS, NOTHING)
    expected = logits(clip_folder, wide, PROMPTS, "pad")[1]
    torch.testing.assert_close(scores, expected, rtol=0, atol=6e-3)


@pytest.mark.parametrize("size", [(48, 48), (40, 61), (75, 33), (32, 32), (20, 20)])
@pytest.mark.parametrize("fit", ["crop", "pad"])
def test_preparation_is_pillows_to_a_grey_level(size, fit):
    draw = torch.Generator().manual_seed(0)
    coarse = torch.rand(1, 3, 5, 7, generator=draw)
    smooth = torch.nn.functional.interpolate(coarse, size=size, mode="bilinear")[0]
    image = (smooth * 255).to(torch.uint8)
    found = clip.pixels(image[None], 32, fit)[0]
    levels = torch.tensor(clip.STD).view(3, 1, 1) * 255
    assert ((found - prepared(to_pil(image), 32, fit)) * levels).abs().max() < 1.01


def test_aesthetic_is_five_linear_layers(clip_folder, pictures, tmp_path):
    draw = torch.Generator().manual_seed(1)
    sizes = {0: (24, 16), 2: (16, 8), 4: (8, 6), 6: (6, 4), 7: (4, 1)}
    head = {}
    for place, (inside, out) in sizes.items():
        head[f"layers.{place}.weight"] = torch.randn(out, inside, generator=draw)
        head[f"layers.{place}.bias"] = torch.randn(out, generator=draw)
    # A full predictor holds its CLIP too; names that only look alike are left alone.
    extra = {"vision_model.encoder.layers.0.mlp.fc1.weight": torch.zeros(2, 2)}
    save_file({**head, **extra}, tmp_path / "model.safetensors")
    options = {"model": str(clip_folder), "head": str(tmp_path), "device": "cpu"}
    scores = load("aesthetic").configured(**options)(pictures, PROMPTS, NOTHING)

    vector = clip.load(str(clip_folder), device="cpu").images(pictures).double()
    torch.testing.assert_close(vector.norm(dim=-1), torch.ones(5).double())
    for place in sizes:
        weight, bias = head[f"layers.{place}.weight"], head[f"layers.{place}.bias"]
        vector = vector @ weight.double().T + bias.double()
    torch.testing.assert_close(scores.double(), vector[:, 0], rtol=1e-5, atol=1e-5)
    assert scores.shape == (5,)


def test_aesthetic_errors(clip_folder, pictures, tmp_path):
    aesthetic = load("aesthetic").configured(model=str(clip_folder), device="cpu")
    save_file({"layers.0.weight": torch.zeros(1, 24)}, tmp_path / "model.safetensors")
    with pytest.raises(RewardError, match=r"layers\.N\.bias"):
        aesthetic.configured(head=str(tmp_path))(pictures, PROMPTS, NOTHING)
    layer = {"layers.0.weight": torch.zeros(1, 99), "layers.0.bias": torch.zeros(1)}
    save_file(layer, tmp_path / "model.safetensors")
    with pytest.raises(RewardError, match="vectors of 99 numbers"):
        aesthetic.configured(head=str(tmp_path))(pictures, PROMPTS, NOTHING)
    (tmp_path / "bad.safetensors").write_bytes(b"not tensors")
    with pytest.raises(RewardError, match=r"a \.safetensors file is expected|cannot be loaded"):
        aesthetic.configured(head=str(tmp_path / "bad.safetensors"))(pictures, PROMPTS, NOTHING)


def test_a_pickled_model_is_refused(clip_folder, pictures, tmp_path):
    for file in clip_folder.iterdir():
        if file.suffix == ".json":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    torch.save({}, tmp_path / "pytorch_model.bin")
    reward = load("clipscore").configured(model=str(tmp_path), device="cpu")
    with pytest.raises(RewardError, match="safetensors"):
        reward(pictures, PROMPTS, NOTHING)


def test_long_prompts_are_cut(clip_folder, pictures):
    reward = load("clipscore").configured(model=str(clip_folder), device="cpu")
    long = ["a red car " * 40] * 5
    assert torch.isfinite(reward(pictures, long, NOTHING)).all()
