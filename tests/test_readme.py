"""README.md: its Python runs, its command lines parse, its links and its tree are true."""

from __future__ import annotations

import re
import shlex
import sys
import types
from pathlib import Path

import pytest
import torch

from flowgrpo import nano, rewards, train
from flowgrpo.cli import options
from flowgrpo.cli.train import parse_train
from flowgrpo.records import Prompts

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PYTHON = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
LINES = [
    line.partition("  #")[0]
    for block in re.findall(r"```sh\n(.*?)```", README, re.DOTALL)
    for line in block.splitlines()
] + re.findall(r"`(flowgrpo [^`]+)`", README)


def block(words: str) -> str:
    [found] = [text for text in PYTHON if words in text]
    return found


def test_the_kernels_of_the_readme():
    """Under the names that the text leaves to the reader; on policy the ratio is exactly 1."""
    net = torch.nn.Conv2d(16, 16, 1)
    seeds, states = torch.arange(3), []

    def model(x, step):
        states.append(x.detach())
        return net(x.detach())

    names = {
        "sigmas": torch.linspace(1, 0, 5),
        "seeds": seeds,
        "device": "cpu",
        "model": model,
        "reference": lambda x, step: torch.zeros_like(x),
        "advantages": torch.tensor([1.0, -1.0, 0.5]),
        "step": 1,
    }
    rollout, update = block("initial_noise(seeds").split("out = grpo_loss(")
    with torch.no_grad():
        exec(rollout, names)
    names |= {"x_t": states[1], "x_next": states[2]}
    with torch.no_grad():
        args = (net(states[1]), states[1], names["transitions"], 1)
        _, names["old_log_prob"] = names["sde_step"](*args, seeds=seeds)
    exec("out = grpo_loss(" + update, names)
    assert names["x"].shape == (3, 16, 64, 64)
    assert torch.equal(names["out"].ratio, torch.ones(3)) and names["out"].kl > 0
    assert net.weight.grad.abs().sum() > 0


def test_the_reward_of_the_readme(monkeypatch):
    module = types.ModuleType("my_rewards")
    exec(block("@configurable"), module.__dict__)
    monkeypatch.setitem(sys.modules, "my_rewards", module)
    [line] = [line for line in LINES if "my_rewards:score.weight" in line]
    config = parse_train(shlex.split(line)[2:])
    images = torch.zeros(2, 3, 4, 4, dtype=torch.uint8)
    images[1, 2] = 255
    assert config.reported == ("nano_strict", "nano_partial", "my_rewards:score")
    for reported in ((), config.reported[2:]):
        scorer = rewards.Scorer.of(config.reward, reported)
        assert list(scorer.weights) == ["my_rewards:score"]
        assert scorer(images, Prompts.of(["a"]), 2).total.tolist() == [0.0, 2.0]


def test_the_run_of_the_readme(monkeypatch, capsys):
    seen = []
    summary = {"before": {"accuracy": 0.25}, "after": {"accuracy": 0.5}}
    monkeypatch.setattr(train, "run", lambda config: seen.append(config) or summary)
    exec(block("nano.recipe("), {})
    assert capsys.readouterr().out == "0.25 0.5\n"
    assert (seen[0].run.steps, seen[0].sample.noise_level) == (200, 0.8)
    assert nano.recipe().run.steps != 200


@pytest.mark.parametrize("line", [line for line in LINES if "flowgrpo train" in line])
def test_training_commands_parse(line, tmp_path, monkeypatch):
    words = shlex.split(line[line.index("flowgrpo train") :])[2:]
    if "--run.resume" in words:
        monkeypatch.setattr("flowgrpo.runs.directory.resume_config", lambda folder: nano.recipe())
    assert parse_train(words).run.steps > 0


def test_other_commands_are_there():
    for line in LINES:
        if line.startswith("flowgrpo ") and not line.startswith("flowgrpo train"):
            words = shlex.split(line)
            assert words[1] in ("evaluate", "sample", "doctor", "serve-reward"), line
            known = {"evaluate": options.EvaluateOptions, "sample": options.SampleOptions}.get(
                words[1]
            )
            if known is not None:
                assert options.parse(known, words[2:], line)


def test_links_resolve():
    for target in re.findall(r"\]\(([^)#]+)", README):
        assert target.startswith("https://") or (ROOT / target).exists(), target


def test_the_tree_says_where_each_thing_is():
    [tree] = re.findall(r"## The tree\n\n```\n(.*?)```", README, re.DOTALL)
    named, folder = set(), ROOT
    for line in tree.splitlines():
        words = [word.strip(",;:") for word in line.split()]
        if not line.startswith(" "):
            folder = ROOT / words.pop(0)
            assert folder.is_dir(), folder
        for word in words:
            if re.fullmatch(r"\w+(\.py|/)", word):
                assert any(folder.rglob(word.rstrip("/"))) or (ROOT / word).exists(), word
                named.add(word.rstrip("/"))
    for path in (ROOT / "flowgrpo").glob("[!_]*"):
        if path.suffix == ".py" or (path / "__init__.py").is_file():
            assert path.name in named, f"the tree leaves out {path.name}"
