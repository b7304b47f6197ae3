"""ImageReward under the authors' tensor names, against their architecture in float64."""

import math

import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional

from flowgrpo.rewards import RewardError, clip, load

WIDTH, HIDDEN, WORDS, LAYERS = 64, 64, 24, 2
PROMPTS = ["a red car", "a dog", "blue object", "a red car", "car"]


def authors_weights():
    """Random tensors with the names and shapes of ImageReward.pt, much smaller."""
    draw = torch.Generator().manual_seed(0)
    shapes = {
        "visual_encoder.cls_token": (1, 1, WIDTH),
        "visual_encoder.pos_embed": (1, 5, WIDTH),
        "visual_encoder.patch_embed.proj.weight": (WIDTH, 3, 16, 16),
        "visual_encoder.patch_embed.proj.bias": (WIDTH,),
        "visual_encoder.norm.weight": (WIDTH,),
        "visual_encoder.norm.bias": (WIDTH,),
        "text_encoder.embeddings.word_embeddings.weight": (WORDS, HIDDEN),
        "text_encoder.embeddings.position_embeddings.weight": (40, HIDDEN),
        "text_encoder.embeddings.LayerNorm.weight": (HIDDEN,),
        "text_encoder.embeddings.LayerNorm.bias": (HIDDEN,),
    }

    def linear(name, out, inside):
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (out, inside), (out,)

    for i in range(LAYERS):
        block = f"visual_encoder.blocks.{i}"
        linear(f"{block}.attn.qkv", 3 * WIDTH, WIDTH)
        linear(f"{block}.attn.proj", WIDTH, WIDTH)
        linear(f"{block}.mlp.fc1", 96, WIDTH)
        linear(f"{block}.mlp.fc2", WIDTH, 96)
        layer = f"text_encoder.encoder.layer.{i}"
        for part, width in (("attention", HIDDEN), ("crossattention", WIDTH)):
            linear(f"{layer}.{part}.self.query", HIDDEN, HIDDEN)
            linear(f"{layer}.{part}.self.key", HIDDEN, width)
            linear(f"{layer}.{part}.self.value", HIDDEN, width)
            linear(f"{layer}.{part}.output.dense", HIDDEN, HIDDEN)
        linear(f"{layer}.intermediate.dense", 80, HIDDEN)
        linear(f"{layer}.output.dense", HIDDEN, 80)
        norms = [f"{block}.norm1", f"{block}.norm2", f"{layer}.output.LayerNorm"]
        norms += [f"{layer}.{p}.output.LayerNorm" for p in ("attention", "crossattention")]
        for norm in norms:
            shapes[f"{norm}.weight"] = shapes[f"{norm}.bias"] = (HIDDEN,)
    found = {
        f"blip.{name}": torch.randn(shape, generator=draw) * 0.2 + name.endswith("m1.weight")
        for name, shape in shapes.items()
    }
    for i, (inside, out) in {0: (HIDDEN, 12), 2: (12, 8), 4: (8, 6), 6: (6, 4), 7: (4, 1)}.items():
        found[f"mlp.layers.{i}.weight"] = torch.randn(out, inside, generator=draw)
        found[f"mlp.layers.{i}.bias"] = torch.randn(out, generator=draw)
    found["blip.vision_proj.weight"] = torch.zeros(3, 3)
    found["blip.text_encoder.embeddings.position_ids"] = torch.arange(40)[None].float()
    return found


def reference(weights, pixels, ids, mask):
    """The reward by the formulas of BLIP's vit.py and med.py."""
    w = {name: tensor.double() for name, tensor in weights.items()}

    def linear(x, name):
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def norm(x, name, eps):
        return functional.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], eps)

    def attend(q, k, v, hidden=None):
        scores = q @ k.transpose(-1, -2) / math.sqrt(64)
        if hidden is not None:
            scores = scores.masked_fill(hidden[:, None, :], -math.inf)
        return scores.softmax(dim=-1) @ v

    v = "blip.visual_encoder"
    kernel = w[f"{v}.patch_embed.proj.weight"], w[f"{v}.patch_embed.proj.bias"]
    x = functional.conv2d(pixels.double(), *kernel, stride=16).flatten(2).transpose(1, 2)
    x = torch.cat([w[f"{v}.cls_token"].expand(len(x), -1, -1), x], dim=1) + w[f"{v}.pos_embed"]
    for i in range(LAYERS):
        block = f"{v}.blocks.{i}"
        qkv = linear(norm(x, f"{block}.norm1", 1e-6), f"{block}.attn.qkv").chunk(3, dim=-1)
        x = x + linear(attend(*qkv), f"{block}.attn.proj")
        hidden = functional.gelu(linear(norm(x, f"{block}.norm2", 1e-6), f"{block}.mlp.fc1"))
        x = x + linear(hidden, f"{block}.mlp.fc2")
    x = norm(x, f"{v}.norm", 1e-6)

    t = "blip.text_encoder"
    y = w[f"{t}.embeddings.word_embeddings.weight"][ids]
    y = y + w[f"{t}.embeddings.position_embeddings.weight"][: ids.shape[1]]
    y = norm(y, f"{t}.embeddings.LayerNorm", 1e-12)
    for i in range(LAYERS):
        layer = f"{t}.encoder.layer.{i}"
        for part, source, hidden in (("attention", None, mask == 0), ("crossattention", x, None)):
            name = f"{layer}.{part}"
            other = y if source is None else source
            out = attend(
                linear(y, f"{name}.self.query"),
                linear(other, f"{name}.self.key"),
                linear(other, f"{name}.self.value"),
                hidden,
            )
            y = norm(linear(out, f"{name}.output.dense") + y, f"{name}.output.LayerNorm", 1e-12)
        out = linear(
            functional.gelu(linear(y, f"{layer}.intermediate.dense")), f"{layer}.output.dense"
        )
        y = norm(out + y, f"{layer}.output.LayerNorm", 1e-12)
    out = y[:, 0]
    for i in (0, 2, 4, 6, 7):
        out = linear(out, f"mlp.layers.{i}")
    return (out[:, 0] - 0.16717362830052426) / 1.0333394966054072


def test_scores_are_those_of_the_authors_architecture(clip_folder, pictures, tmp_path):
    from transformers import AutoTokenizer

    weights = authors_weights()
    save_file(weights, tmp_path / "model.safetensors")
    options = {"model": str(tmp_path), "tokenizer": str(clip_folder), "device": "cpu"}
    reward = load("imagereward").configured(**options, batch_size=2)
    scores = reward(pictures, PROMPTS, [{}] * 5)

    tokens = AutoTokenizer.from_pretrained(clip_folder)(
        PROMPTS, padding="max_length", max_length=35, return_tensors="pt"
    )
    pixels = clip.pixels(pictures, 32)
    expected = reference(weights, pixels, tokens.input_ids, tokens.attention_mask)
    assert expected.std() > 0.1
    torch.testing.assert_close(scores.double(), expected, rtol=1e-4, atol=1e-4)

    values = pictures.float().requires_grad_()
    smooth = reward.build().of_pixels(values, PROMPTS, [{}] * 5)
    torch.testing.assert_close(smooth.detach(), scores, rtol=1e-2, atol=0.05)
    (gradient,) = torch.autograd.grad(smooth.sum(), values)
    assert gradient.isfinite().all() and (gradient.flatten(1).norm(dim=1) > 0).all()


def test_other_weights_are_refused(clip_folder, pictures, tmp_path):
    weights = authors_weights()
    del weights["blip.text_encoder.encoder.layer.1.crossattention.self.key.bias"]
    save_file(weights, tmp_path / "model.safetensors")
    reward = load("imagereward").configured(
        model=str(tmp_path), tokenizer=str(clip_folder), device="cpu"
    )
    with pytest.raises(RewardError, match=r"do not fit .*crossattention\.self\.key\.bias"):
        reward(pictures, PROMPTS, [{}] * 5)
