"""`flowgrpo evaluate` and `sample` on a model and an adapter that no run of ours has written."""

from __future__ import annotations

import json
import logging

import pytest
import torch
from PIL import Image

from flowgrpo.cli import main, sample
from flowgrpo.policies import Policy
from support import pipelines, processes


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """(model, adapter): an adapter as peft and diffusers write one, its matrices random."""
    from diffusers import StableDiffusion3Pipeline
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    folder = tmp_path_factory.mktemp("bare")
    model = pipelines.save_pixel_pipeline(folder / "model")
    policy = Policy.load(str(model), device="cpu", dtype="float32")
    targets = ["attn.to_q", "attn.to_v"]
    lora = LoraConfig(r=4, lora_alpha=8, target_modules=targets, init_lora_weights=False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        policy.transformer.add_adapter(lora)
    StableDiffusion3Pipeline.save_lora_weights(
        folder / "adapter", transformer_lora_layers=get_peft_model_state_dict(policy.transformer)
    )
    prompts = folder / "prompts.jsonl"
    lines = [json.dumps({"prompt": p, "tag": t}) for p, t in processes.PROMPTS.items()]
    prompts.write_text("\n".join(lines))
    return model, folder / "adapter", prompts


@pytest.mark.slow
def test_evaluate_a_model_against_an_adapter(folders, tmp_path, capsys):
    model, adapter, prompts = folders
    line = ["evaluate", str(model), "--adapter", str(adapter), "--prompt-set", str(prompts)]
    line += [
        "--rewards",
        "support.processes:red",
        "jpeg_compressibility",
        "--steps",
        "3",
        "--batch-size",
        "5",
    ]
    line += ["--cfg", "2", "--out", str(tmp_path / "e"), "--device", "cpu"]
    assert main.main(line) == 0
    shown = capsys.readouterr().out
    assert "base" in shown and "adapter" in shown and "quality: diversity" in shown
    assert "jpeg_compressibility: " in shown and shown.count("95 % interval") >= 3
    report = json.loads((tmp_path / "e" / "report.json").read_text())
    base, after = (report["reports"][name] for name in ("base", "adapter"))
    assert base["guidance_scale"] == after["guidance_scale"] == 2 and base["steps"] == 3
    assert base["scores"] != after["scores"]
    for name, found in report["change"]["scores"].items():
        assert found["change"] == pytest.approx(after["scores"][name] - base["scores"][name])
        low, high = found["interval"]
        assert low <= found["change"] <= high
        low, high = base["intervals"][name]
        assert low <= base["scores"][name] <= high
    assert report["adapter"] == str(adapter) and report["prompt_set"] == str(prompts)
    assert Image.open(tmp_path / "e" / "grid.png").size[1] > 200


@pytest.mark.slow
def test_the_base_is_the_same_with_and_without_an_adapter(folders, tmp_path, monkeypatch):
    """The adapter is loaded before the base is evaluated, to see that it fits; nothing stays."""
    model, adapter, prompts = folders
    line = [
        "evaluate",
        str(model),
        "--prompt-set",
        str(prompts),
        "--rewards",
        "support.processes:red",
    ]
    line += ["--steps", "3", "--device", "cpu", "--out", str(tmp_path)]
    found = []
    for more in ([], ["--adapter", str(adapter)]):
        assert main.main([*line, *more]) == 0
        found.append(json.loads((tmp_path / "report.json").read_text())["reports"]["base"])
    assert found[0] == found[1]
    monkeypatch.setattr(sample.evaluate, "generate_images", None)
    assert main.main([*line, "--adapter", str(model)]) == 2


def test_an_adapter_of_another_size_is_one_sentence(folders, tmp_path, capsys, monkeypatch):
    """diffusers would print a line for each of its tensors."""
    printed = []
    handler = logging.Handler()
    handler.emit = printed.append
    monkeypatch.setattr(logging.getLogger("diffusers"), "handlers", [handler])
    line = ["sample", "a red circle", "--model", "nano", "--adapter", str(folders[1])]
    assert main.main([*line, "--out", str(tmp_path / "x.png"), "--device", "cpu"]) == 2
    error = capsys.readouterr().err
    assert "size mismatch for transformer_blocks.0.attn.to_q.lora_A" in error
    assert error.count("\n") == 1 and printed == []


@pytest.mark.slow
def test_sample_shows_base_and_adapter_from_its_folder_or_file(folders, tmp_path):
    model, adapter, _ = folders
    line = ["sample", "a red circle", "--model", str(model), "--count", "2", "--steps", "2"]
    line += ["--device", "cpu", "--out"]
    assert main.main([*line, str(tmp_path / "base.png")]) == 0
    for place in (adapter, adapter / "pytorch_lora_weights.safetensors"):
        assert main.main([*line, str(tmp_path / "both.png"), "--adapter", str(place)]) == 0
        base, both = (Image.open(tmp_path / f"{name}.png") for name in ("base", "both"))
        assert both.size[1] > 1.5 * base.size[1]
        top = both.crop((0, 0, *base.size)).tobytes()
        assert top != both.crop((0, both.size[1] - base.size[1], *both.size)).tobytes()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--adapter", "{0}"], "cannot be loaded into"),
        (["--adapter", "{0}/absent"], "cannot be loaded into"),
        (["--rewards", "red"], "reward 'red' is unknown"),
        (["--rewards", "ocr"], "has no text in double quotes"),
        (["--prompt-set", "{0}/absent.txt"], "neither one of nano, nano_text, geneval"),
        (["--batch-size", "0"], "must be greater than 0"),
        (["--resolution", "9"], "multiples of"),
    ],
)
def test_mistakes_are_one_sentence(folders, tmp_path, capsys, words, message):
    model, _, prompts = folders
    line = [
        "evaluate",
        str(model),
        "--prompt-set",
        str(prompts),
        "--rewards",
        "support.processes:red",
    ]
    line += [*(word.format(model) for word in words), "--out", str(tmp_path / "e")]
    line += ["--steps", "2", "--prompts", "2", "--samples", "1", "--device", "cpu"]
    assert main.main(line) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "e" / "report.json").exists()
