"""`flowgrpo evaluate --images DIR --quality paper`: the five rewards' real classes on small random
weights and a real endpoint, from picture files to the paper's table."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file
from test_imagereward import authors_weights

from flowgrpo.cli import main
from flowgrpo.evaluation import systems
from flowgrpo.rewards import load
from flowgrpo.rewards.images import from_file, to_pil
from flowgrpo.rewards.scorer import BLANKS
from support.servers import Answers, running

SIZES = [(48, 48), (32, 64), (48, 48), (64, 40)]
TEXTS = ["a red car", "a dog", "a blue object", "a red car"]


def judgement() -> tuple[int, bytes]:
    """A chat completion that serves both judges: 4 of 5, and "good" three times as likely as
    "fair"."""
    top = [{"token": " good", "logprob": -0.28768207}, {"token": " fair", "logprob": -1.38629436}]
    choice = {
        "index": 0,
        "message": {"role": "assistant", "content": "Final Score: 4"},
        "logprobs": {"content": [{**top[0], "top_logprobs": top}]},
    }
    return 200, json.dumps({"choices": [choice]}).encode()


@pytest.fixture
def weights(clip_folder, tmp_path) -> dict[str, str]:
    """Options of the three rewards that have weights here."""
    draw = torch.Generator().manual_seed(1)
    layers = {0: (24, 16), 2: (16, 8), 4: (8, 6), 6: (6, 4), 7: (4, 1)}
    head = {}
    for number, (inside, out) in layers.items():
        head[f"layers.{number}.weight"] = torch.randn(out, inside, generator=draw)
        head[f"layers.{number}.bias"] = torch.randn(out, generator=draw)
    save_file(head, tmp_path / "head.safetensors")
    save_file(authors_weights(), tmp_path / "imagereward.safetensors")
    folder = str(clip_folder)
    return {
        "aesthetic.model": folder,
        "aesthetic.head": str(tmp_path / "head.safetensors"),
        "imagereward.model": str(tmp_path / "imagereward.safetensors"),
        "imagereward.tokenizer": folder,
        "pickscore.model": folder,
        "pickscore.tokenizer": folder,
    }


def save_pictures(folder) -> list:
    """Four pictures of three sizes, as PNG and lossless WebP, with their JSONL."""
    folder.mkdir()
    draw = torch.Generator().manual_seed(0)
    lines, files = [], []
    for number, (size, text) in enumerate(zip(SIZES, TEXTS, strict=True)):
        image = torch.randint(0, 256, (3, *size), dtype=torch.uint8, generator=draw)
        name = f"{number}.png" if number % 2 else f"{number}.webp"
        options = {} if number % 2 else {"lossless": True}
        to_pil(image).save(folder / name, **options)
        lines.append({"prompt": text, "image": name, "category": "Colors" if number else "Other"})
        files.append(folder / name)
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return files


@pytest.mark.slow
def test_the_papers_quality_table(weights, tmp_path, capsys):
    files, app = save_pictures(tmp_path / "gpt-4o"), Answers(judgement())
    line = ["evaluate", "--images", str(tmp_path / "gpt-4o"), "--quality", "paper"]
    line += ["--label", "GPT-4o", "--out", str(tmp_path / "out"), "--device", "cpu"]
    with running(app) as url:
        options = {**weights, "deqa.url": f"{url}/v1", "unifiedreward.url": f"{url}/v1"}
        line += ["--reward-options", *(word for pair in options.items() for word in pair)]
        assert main.main(line) == 0
    [row] = systems.load(tmp_path / "out")
    assert row.label == "GPT-4o" and row.task is None
    assert (row.quality.images, row.quality.prompts) == (4, 3)
    assert row.quality.sizes == {"48x48": 2, "64x32": 1, "40x64": 1}
    for name in ("aesthetic", "imagereward", "pickscore"):
        chosen = {k.partition(".")[2]: v for k, v in weights.items() if k.startswith(name)}
        reward = load(name).configured(**chosen, device="cpu")
        scores = [
            float(reward(from_file(path)[None], [text], [{}])[0])
            for path, text in zip(files, TEXTS, strict=True)
        ]
        assert len(set(scores)) == 4
        score = row.quality.scores[name]
        assert score.mean == pytest.approx(sum(scores) / 4, rel=1e-4, abs=1e-4)
        assert score.groups == pytest.approx(
            {"Other": scores[0], "Colors": sum(scores[1:]) / 3}, rel=1e-4, abs=1e-4
        )
        assert row.quality.settings[name].items() >= chosen.items()
    # Of each picture one question a judge, and of the blank ones before them.
    questions = [json.loads(body) for _, body in app.requests if body]
    assert len(questions) == 2 * (BLANKS + len(files))
    assert row.quality.scores["deqa"].mean == pytest.approx((4 * 0.75 + 3 * 0.25) / 5, rel=1e-6)
    assert row.quality.scores["unifiedreward"].mean == pytest.approx(0.8)
    shown = capsys.readouterr().out.splitlines()
    assert shown[0].split() == ["Model", "Aesthetic", "DeQA", "ImgRwd", "PickScore", "UniRwd"]
    assert "3.75 (3.75 to 3.75)" in shown[1] and "4.00 (4.00 to 4.00)" in shown[1]
    picks = row.quality.scores["pickscore"].mean * 26
    assert f" {picks:.2f} (" in shown[1]
    assert "url" not in (tmp_path / "out" / "evaluation.json").read_text()
