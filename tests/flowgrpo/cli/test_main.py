"""The command line: what is asked for, and mistakes in one sentence with exit code 2."""

from __future__ import annotations

import io
import json
import shutil
import sys
from pathlib import Path

import pytest
from PIL import Image

from flowgrpo import __version__, nano, train
from flowgrpo.cli import evaluate, main, sample
from flowgrpo.cli.train import parse_train
from flowgrpo.config import ConfigError, to_json
from flowgrpo.evaluation import systems
from support import processes


def test_options_are_fields_of_the_recipe():
    line = (
        "nano --sample.steps 8 --sample.window-range 0 5 --optim.betas 0.9 0.95 --optim.guard "
        "--reward.weights nano_strict 0.25 a:b 2 --run.out x --policy.lora_targets attn.to_q"
    )
    config = parse_train(line.split())
    base = nano.recipe()
    assert (config.sample.steps, config.sample.window_range) == (8, (0, 5))
    assert (config.optim.betas, config.optim.guard) == ((0.9, 0.95), True)
    assert config.reward.weights == {"nano_strict": 0.25, "a:b": 2.0}
    assert config.policy.lora_targets == ("attn.to_q",)
    assert config.run.out == "x" and config.recipe == "nano"
    assert (config.optim.lr, config.sample.group_size) == (base.optim.lr, base.sample.group_size)
    assert parse_train([]) == base


@pytest.mark.slow
def test_resume_takes_the_configuration_of_the_run(tmp_path):
    config = processes.make(tmp_path)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text(to_json(config))
    for words in (["--run.resume", str(tmp_path / "run")], [f"--run.resume={tmp_path / 'run'}"]):
        found = parse_train([*words, "--run.steps", "9"])
        assert found.sample == config.sample and found.recipe == "tiny"
        assert (found.run.steps, found.out_dir) == (9, tmp_path / "run")
    with pytest.raises(ConfigError, match="started with 'tiny'; leave the recipe out"):
        parse_train(["nano", "--run.resume", str(tmp_path / "run")])
    with pytest.raises(ConfigError, match=r"run\.out is 'x' with run\.resume .*; leave --run\.out"):
        parse_train(["--run.resume", str(tmp_path / "run"), "--run.out", "x"])


@pytest.mark.slow
def test_output_in_ascii_has_no_error(tmp_path, monkeypatch):
    """As LC_ALL=C or PYTHONIOENCODING=ascii make it, with a directory of another alphabet."""
    shown = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(shown, encoding="ascii"))
    changes = {"run.steps": 1, "run.eval_every": 0, "run.progress": "plain"}
    config = processes.make(tmp_path, **changes, **{"run.out": str(tmp_path / "прогон 猫")})
    train.run(config)
    main.main(["--version"])
    sys.stdout.flush()
    assert b"\\u043f\\u0440" in shown.getvalue() and b"summary.json" in shown.getvalue()
    assert sys.stdout.errors == "backslashreplace"
    assert (tmp_path / "прогон 猫" / "summary.json").exists()


def test_help_and_version(capsys):
    assert main.main(["--version"]) == 0 and capsys.readouterr().out.strip() == __version__
    assert main.main([]) == 2
    assert main.main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(f"flowgrpo {word}" in shown for word in ("train", "evaluate", "sample", "doctor"))
    for command in ("train", "evaluate", "sample"):
        with pytest.raises(SystemExit) as stop:
            main.main([command, "--help"])
        assert stop.value.code == 0
        assert "options" in capsys.readouterr().out
    assert main.main(["doctor", "--help"]) == 0


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A finished run of two iterations."""

    folder = tmp_path_factory.mktemp("trained")
    changes = {"run.steps": 2, "run.progress": "none", "run.eval_samples": 2, "run.eval_every": 1}
    train.run(processes.make(folder, **changes))
    return folder / "run"


@pytest.mark.slow
def test_evaluate_compares_base_and_trained(trained, tmp_path, capsys):
    words = ["--out", str(tmp_path / "e"), "--guidance", "3", "--prompts", "3", "--device", "cpu"]
    assert main.main(["evaluate", str(trained), *words]) == 0
    shown = capsys.readouterr().out
    assert (
        "base, CFG 3" in shown
        and "iteration 2" in shown
        and "on the same prompts and seeds" in shown
    )
    for label in ("base", "base, CFG 3", "iteration 2"):
        assert f"Evaluating {label}: 6 images in 3 steps." in shown
    report = json.loads((tmp_path / "e" / "report.json").read_text())
    assert list(report["reports"]) == ["base", "base, CFG 3", "iteration 2"]
    base, _, after = report["reports"].values()
    assert base["images"] == after["images"] == 6
    assert report["change"]["accuracy"] == pytest.approx(after["accuracy"] - base["accuracy"])
    low, high = report["change"]["interval"]
    assert low <= report["change"]["accuracy"] <= high
    assert Image.open(tmp_path / "e" / "grid.png").size[1] > 350


@pytest.mark.slow
def test_evaluate_on_quality_prompts(trained, tmp_path, capsys):
    """The task's metric on its prompts, quality rewards on theirs, in one table; a prompt that is
    there twice is one prompt with several images."""
    lines = [("a red circle", "Colors"), ("two square", "Counting"), ("a red circle", "Colors")]
    prompts = tmp_path / "drawbench.jsonl"
    prompts.write_text("\n".join(json.dumps({"prompt": p, "category": c}) for p, c in lines))
    line = ["evaluate", str(trained), "--out", str(tmp_path / "e"), "--prompts", "3"]
    line += ["--quality", "jpeg_compressibility", "support.processes:red", "--device", "cpu"]
    line += ["--quality-prompts", str(prompts), "--quality-samples", "2"]
    assert main.main(line) == 0
    shown = capsys.readouterr().out
    assert "Evaluating base on the quality prompts: 6 images in 3 steps." in shown
    base, after = systems.load(tmp_path / "e")
    assert (base.label, after.label) == ("model", "run, iteration 2")
    report = json.loads((tmp_path / "e" / "report.json").read_text())["reports"]
    for row, label in ((base, "base"), (after, "iteration 2")):
        [(name, score)] = row.task.scores.items()
        assert name == "support.processes:red" and report[label]["images"] == row.task.images == 6
        assert score.mean == pytest.approx(report[label]["accuracy"], rel=1e-12)
        assert score.groups == pytest.approx(report[label]["tasks"], rel=1e-12)
        assert score.interval == pytest.approx(tuple(report[label]["interval"]), rel=1e-9)
        assert (row.quality.prompts, row.quality.images) == (2, 6)
        assert row.task.source == row.quality.source == "3 steps, guidance scale 1"
        assert row.task.sizes == {"8x8": 6}
        quality = row.quality.scores["support.processes:red"]
        assert quality.mean == pytest.approx(
            (2 * quality.groups["Colors"] + quality.groups["Counting"]) / 3, rel=1e-12
        )
    head = (tmp_path / "e" / "table.md").read_text().splitlines()[0]
    assert head == (
        "| Model | support.processes:red (task) | jpeg_compressibility | support.processes:red |"
    )
    assert main.main(["evaluate", "--table", str(tmp_path / "e")]) == 0
    assert "run, iteration 2" in capsys.readouterr().out


def test_evaluate_loads_quality_rewards_before_the_model(trained, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(evaluate, "load_base", None)
    line = ["evaluate", str(trained), "--quality", "deqa", "--out", str(tmp_path / "e")]
    assert main.main(line) == 2
    assert "reward 'deqa'" in capsys.readouterr().err
    line += ["--quality-prompts", "absent.txt"]
    assert main.main(line) == 2
    assert "--quality-prompts is 'absent.txt', which is neither" in capsys.readouterr().err
    assert not (tmp_path / "e").exists()


@pytest.mark.slow
def test_evaluate_other_rewards_than_a_run_had_options_for(trained, tmp_path):
    run = shutil.copytree(trained, tmp_path / "run")
    config = json.loads((run / "config.json").read_text())
    config["reward"] |= {"options": {"ocr.language": "en"}, "weights": {"ocr": 1.0}}
    (run / "config.json").write_text(json.dumps(config))
    line = ["evaluate", str(run), "--rewards", "jpeg_compressibility", "--prompts", "2"]
    assert main.main(line) == 0
    report = json.loads((run / "evaluation" / "report.json").read_text())
    assert list(report["change"]["scores"]) == ["jpeg_compressibility"]


@pytest.mark.slow
def test_evaluate_repeats_what_the_run_reported(trained, tmp_path):
    """The adapter that was saved gives, bit for bit, the accuracy that training had found."""
    summary = json.loads((trained / "summary.json").read_text())
    for target in (trained, trained / "checkpoints" / "step-000002"):
        assert main.main(["evaluate", str(target), "--out", str(tmp_path / target.name)]) == 0
        report = json.loads((tmp_path / target.name / "report.json").read_text())
        assert report["reports"]["base"] == summary["before"]
        assert report["reports"]["iteration 2"] == {
            k: v for k, v in summary["after"].items() if k != "iteration"
        }


@pytest.mark.slow
def test_sample_writes_one_picture(trained, tmp_path, capsys):
    model = str(trained.parent / "model")
    out = tmp_path / "new" / "x.png"
    line = ["sample", "a red circle", "two square", "--model", model, "--out", str(out)]
    line += ["--count", "3", "--steps", "3"]
    assert main.main(line) == 0 and str(out) in capsys.readouterr().out
    first = out.read_bytes()
    assert main.main(line) == 0 and out.read_bytes() == first
    assert main.main([*line, "--seed", "1"]) == 0 and out.read_bytes() != first
    height = Image.open(out).size[1]
    assert main.main([*line, "--run", str(trained)]) == 0
    assert Image.open(out).size[1] > 1.5 * height


@pytest.mark.parametrize(
    ("name", "format"),
    [("x.jpg", "JPEG"), ("x.JPEG", "JPEG"), ("x.PNG", "PNG"), ("x", "PNG"), ("v1.2", "PNG")],
)
def test_a_picture_is_what_its_name_says(trained, tmp_path, name, format, monkeypatch):
    """In the home directory, which a shell leaves to the program in --out=~/x."""
    monkeypatch.setenv("HOME", str(tmp_path))
    line = ["sample", "a red circle", "--steps", "2", "--count", "1", f"--out=~/{name}"]
    assert main.main([*line, "--model", str(trained.parent / "model")]) == 0
    assert Image.open(tmp_path / name).format == format


@pytest.mark.parametrize("name", ["x.webp", "x.GIF", "x.pdf", "x.svg"])
def test_a_picture_that_cannot_be_what_its_name_says_is_refused(name, capsys, monkeypatch):
    monkeypatch.setattr(sample, "load_base", None)
    assert main.main(["sample", "a red circle", "--out", name]) == 2
    shown = capsys.readouterr().err
    assert f"'{name}' ends in {Path(name).suffix.lower()}, but one of .png, .jpg" in shown


@pytest.mark.slow
def test_targets_in_the_home_directory(trained, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(trained.parent))
    out = tmp_path / "e"
    line = ["evaluate", f"~/{trained.name}", "--prompts", "2", "--samples", "1"]
    assert main.main([*line, "--out", str(out), "--prompt-set", "~/prompts.jsonl"]) == 0
    assert json.loads((out / "report.json").read_text())["target"] == str(trained)
    found = parse_train([f"--run.resume=~/{trained.name}", "--run.steps", "9"])
    assert found.out_dir == trained and found.run.steps == 9
    assert parse_train(["nano", "--run.out=~/new"]).out_dir == trained.parent / "new"


def test_sample_refuses_words_that_the_model_does_not_know(trained, tmp_path, capsys):
    out = tmp_path / "new" / "x.png"
    model = str(trained.parent / "model")
    assert main.main(["sample", "a purple dog", "--model", model, "--out", str(out)]) == 2
    assert "purple dog" in capsys.readouterr().err
    assert not out.parent.exists()


def test_sample_finds_what_is_wrong_with_out_before_it_samples(
    trained, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(sample.evaluate, "generate_images", None)
    line = ["sample", "a red circle", "--model", str(trained.parent / "model"), "--out"]
    for out, words in (
        (tmp_path, "which is a folder, but the file of a picture"),
        ("/proc/x/y", "cannot be written"),
    ):
        assert main.main([*line, str(out)]) == 2
        assert words in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_checkpoint_is_refused(trained, tmp_path, capsys):
    run = shutil.copytree(trained, tmp_path / "run")
    (run / "checkpoints" / "step-000002" / "ema.safetensors").write_bytes(b"no")
    for line in (["evaluate", str(run)], ["train", "--run.resume", str(run), "--run.steps", "3"]):
        assert main.main(line) == 2
        assert "SHA-256" in capsys.readouterr().err
    assert not (run / "evaluation").exists()
