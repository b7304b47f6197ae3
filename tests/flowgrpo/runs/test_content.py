"""A run and the content of its places: moved it goes on, changed it is refused or recorded."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file

from flowgrpo import train
from flowgrpo.cli import main
from flowgrpo.cli.evaluate import evaluate_run
from flowgrpo.cli.options import EvaluateOptions
from flowgrpo.config import ConfigError, PolicyConfig, replace
from flowgrpo.policies.adapters import add_adapter
from flowgrpo.policies.weight_digests import BLOCK
from flowgrpo.prompts.load import fingerprint
from flowgrpo.records import Prompts
from flowgrpo.rewards import load
from flowgrpo.rewards.remote.serve import app
from flowgrpo.runs import content, directory
from support import processes
from support.servers import running

SHORT = {"run.steps": 2, "run.eval_every": 0, "run.checkpoint_every": 1, "run.progress": "none"}
WEIGHTS = Path("transformer") / "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A finished run of two iterations beside its model and prompts."""
    folder = tmp_path_factory.mktemp("trained")
    train.run(processes.make(folder, **SHORT))
    return folder


@pytest.fixture
def moved(trained, tmp_path) -> Path:
    """All of it in another folder; what config.json names is gone."""
    folder = shutil.copytree(trained, tmp_path / "moved")
    config = json.loads((folder / "run" / "config.json").read_text())
    config["policy"]["model"] = str(tmp_path / "gone" / "model")
    config["sample"]["prompts"] = str(tmp_path / "gone" / "prompts.jsonl")
    (folder / "run" / "config.json").write_text(json.dumps(config))
    return folder


def going_on(folder: Path, **changes):
    """The configuration of the run of `moved`, with its new places, for one more iteration."""
    places = {
        "policy.model": str(folder / "model"),
        "sample.prompts": str(folder / "prompts.jsonl"),
        "run.steps": 3,
    }
    return replace(directory.resume_config(folder / "run"), **{**places, **changes})


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def prompts_of(folder: Path) -> list[str]:
    return (folder / "prompts.jsonl").read_text().splitlines()


def change_weights(model: Path) -> None:
    """As a fine-tuning does: every value of the transformer a little."""
    tensors = {name: tensor * 1.01 for name, tensor in load_file(model / WEIGHTS).items()}
    save_file(tensors, model / WEIGHTS, metadata={"format": "pt"})


@pytest.mark.slow
def test_places_may_change(moved, trained, tmp_path):
    """By the command line; its numbers are those of a run that stayed where it was."""
    line = ["train", "--run.resume", str(moved / "run"), "--run.steps", "3"]
    line += ["--policy.model", str(moved / "model"), "--policy.device", "cpu"]
    line += ["--sample.prompts", str(moved / "prompts.jsonl"), "--reward.timeout", "5"]
    assert main.main([*line, "--reward.retries", "5"]) == 0
    stayed = shutil.copytree(trained / "run", tmp_path / "stayed")
    train.run(replace(directory.resume_config(stayed), **{"run.steps": 3}))
    one, other = moved / "run", stayed
    assert processes.untimed(one / "metrics.jsonl") == processes.untimed(other / "metrics.jsonl")
    assert processes.bits_of(one / "adapter") == processes.bits_of(other / "adapter") != {}
    assert json.loads((one / content.FILE).read_text())["changes"] == []


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda lines: lines[:-2], r"the prompts of training \(6 then, 4 now\); the prompts of ev"),
        (lambda lines: lines[::-1], r"the prompts of training \(6 then, 6 now\); the prompts of"),
        (lambda lines: [x.replace("counting", "count") for x in lines], r"\(6 then, 6 now\)"),
    ],
)
def test_other_prompts_are_refused(moved, change, words):
    (moved / "prompts.jsonl").write_text("\n".join(change(prompts_of(moved))))
    before = files_of(moved / "run")
    with pytest.raises(ConfigError, match=f"{words}.*--run.accept-changes, which content.json"):
        train.run(going_on(moved))
    assert files_of(moved / "run") == before


@pytest.mark.slow
def test_the_same_prompts_in_another_file_are_the_same(moved):
    """Spaces, the order of keys, a key that is null, and the end of a line."""
    lines = [json.loads(line) for line in prompts_of(moved)]
    text = "\r\n".join(json.dumps({"tag": x["tag"], "none": None, **x}, indent=None) for x in lines)
    (moved / "prompts.jsonl").write_bytes(text.encode() + b"\r\n\r\n")
    assert train.run(going_on(moved))["iterations"] == 3


def test_other_weights_are_refused(moved):
    change_weights(moved / "model")
    before = files_of(moved / "run")
    with pytest.raises(ConfigError, match=r"not what it was: the model's transformer; restore it"):
        train.run(going_on(moved))
    assert files_of(moved / "run") == before


def test_another_scheduler_is_refused(moved):
    path = moved / "model" / "scheduler" / "scheduler_config.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps({**values, "shift": values["shift"] + 1}))
    with pytest.raises(ConfigError, match=r"not what it was: the model's sigmas; restore it"):
        train.run(going_on(moved))


@pytest.mark.slow
@pytest.mark.parametrize("changed", ["prompts", "weights"])
def test_a_change_that_is_accepted_is_recorded_and_the_base_measured_again(
    moved, tmp_path, changed, caplog
):
    first = json.loads((moved / "run" / content.FILE).read_text())
    summary = json.loads((moved / "run" / "summary.json").read_text())
    if changed == "prompts":
        (moved / "prompts.jsonl").write_text("\n".join(prompts_of(moved)[:4]))
    else:
        change_weights(moved / "model")
    config = going_on(moved, **{"run.accept_changes": True})
    after = train.run(config)
    assert after["iterations"] == 3 and "goes on with other content" in caplog.text
    record = json.loads((moved / "run" / content.FILE).read_text())
    (change,) = record["changes"]
    names = {"prompts": {"training", "evaluation"}, "weights": {"model"}}[changed]
    assert set(change["changed"]) == names and change["iteration"] == 2
    assert change["before"] == {n: first[n] for n in ("prompts", "model", "rewards", "code")}
    assert record["prompts"]["training"]["count"] == (4 if changed == "prompts" else 6)
    # Before and after are of the same prompts and weights, and what was measured is kept.
    assert after["before"]["accuracy"] != summary["before"]["accuracy"]
    assert (moved / "run" / "evaluations-before-change-1" / "step-000000").is_dir()
    options = EvaluateOptions(
        str(moved / "run"),
        model=str(moved / "model"),
        prompt_set=str(moved / "prompts.jsonl"),
        out=str(tmp_path / "e"),
        device="cpu",
    )
    reports = evaluate_run(options, Console(quiet=True))["reports"]
    assert reports["base"]["accuracy"] == after["before"]["accuracy"]
    assert reports["iteration 3"]["accuracy"] == after["after"]["accuracy"]
    # It is accepted once: the next time it is what the run goes on with.
    assert train.run(going_on(moved, **{"run.steps": 4}))["iterations"] == 4


@pytest.mark.slow
def test_a_run_of_before_gets_its_fingerprints(moved):
    """Without them it resumes; a set of another size is at least evaluated anew."""
    (moved / "run" / content.FILE).unlink()
    # Without tasks, whose prompts would be repeated.
    texts = [json.dumps({"prompt": json.loads(line)["prompt"]}) for line in prompts_of(moved)]
    (moved / "prompts.jsonl").write_text("\n".join(texts[:2]))
    summary = train.run(going_on(moved))
    assert summary["before"]["images"] == summary["after"]["images"] == 4
    record = json.loads((moved / "run" / content.FILE).read_text())
    assert record["prompts"]["training"]["count"] == 2
    with pytest.raises(ConfigError, match="2 then, 3 now"):
        (moved / "prompts.jsonl").write_text("\n".join(texts[:3]))
        train.run(going_on(moved, **{"run.steps": 4}))


@pytest.mark.slow
def test_evaluate_and_sample_find_a_model_that_moved(moved, trained, tmp_path, capsys, caplog):
    run, model = str(moved / "run"), str(moved / "model")
    words = ["--prompt-set", str(moved / "prompts.jsonl"), "--out", str(tmp_path / "e")]
    assert main.main(["evaluate", run, *words]) == 2
    assert "gone/model" in capsys.readouterr().err
    assert main.main(["evaluate", run, *words, "--model", model]) == 0
    report = json.loads((tmp_path / "e" / "report.json").read_text())
    summary = json.loads((trained / "run" / "summary.json").read_text())
    assert report["reports"]["base"] == summary["before"]
    out = tmp_path / "x.png"
    line = ["sample", "a red circle", "--run", run, "--steps", "2", "--out", str(out)]
    assert main.main([*line, "--model", model]) == 0 and out.stat().st_size > 0
    assert not [r for r in caplog.records if r.name == "flowgrpo"]
    change_weights(moved / "model")
    assert main.main([*line, "--model", model]) == 0
    (message,) = [r.getMessage() for r in caplog.records if r.name == "flowgrpo"]
    assert f"{model} is not the model that the run in {run} was trained on" in message
    assert main.main(["evaluate", model, "--model", model]) == 2
    assert "is a model, but --model" in capsys.readouterr().err


@pytest.mark.slow
def test_the_address_of_a_reward_may_change(tmp_path):
    """Its scores are the same ones under another name, before and after."""
    pytest.importorskip("httpx")
    report = ("jpeg_compressibility",)
    changes = {**SHORT, "reward.report": report, "run.eval_every": 1}
    with running(app(processes.red, "red")) as old:
        config = processes.make(tmp_path, **changes, **{"reward.weights": {old: 1.0}})
        config = replace(config, **{"reward.options": {f"{old}.timeout": "30"}})
        first = train.run(config)
    with running(app(processes.red, "red", token="t")) as new:
        line = ["train", "--run.resume", str(tmp_path / "run"), "--run.steps", "3"]
        line += ["--reward.weights", new, "1.0", "--reward.options", f"{new}.token", "t"]
        assert main.main(line) == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert first["before"]["scores"].keys() == {*report, old}
    for evaluation in (summary["before"], summary["after"]):
        assert evaluation["scores"].keys() == evaluation["intervals"].keys() == {*report, new}
    assert summary["before"]["scores"][new] == first["before"]["scores"][old]
    assert summary["before"]["intervals"][new] == first["before"]["intervals"][old]
    lines = processes.untimed(tmp_path / "run" / "metrics.jsonl")
    trained = [line["rewards"] for line in lines if line["kind"] == "train"]
    assert [list(rewards) for rewards in trained] == [[old], [old], [new]]


@pytest.mark.slow
def test_full_fine_tuning_without_a_reference_accepts_no_other_base(tmp_path):
    changes = {**SHORT, "policy.adapter": "full", "optim.lr": 1e-3, "optim.beta": 0.0}
    config = processes.make(tmp_path, **changes)
    train.run(config)
    # Its trained weights are not what is compared: it goes on.
    config = replace(config, **{"run.resume": str(tmp_path / "run"), "run.steps": 3})
    assert train.run(config)["iterations"] == 3
    change_weights(tmp_path / "model")
    with pytest.raises(ConfigError, match=r"policy.adapter full and optim.beta 0; start a new run"):
        train.run(replace(config, **{"run.accept_changes": True, "run.steps": 4}))


def test_fingerprint_of_prompts():
    """Text, metadata and order count; keys' order and keys that are None do not."""
    base = Prompts.of(["a", "b"], [{"n": 1, "x": "y"}, {}])
    assert fingerprint(base) == fingerprint(
        Prompts.of(["a", "b"], [{"x": "y", "none": None, "n": 1}, {"z": None}])
    )
    others = [
        Prompts.of(["b", "a"], [{}, {"n": 1, "x": "y"}]),
        Prompts.of(["a", "b "], [{"n": 1, "x": "y"}, {}]),
        Prompts.of(["a", "b"], [{"n": 2, "x": "y"}, {}]),
        Prompts.of(["a"], [{"n": 1, "x": "y"}]),
        Prompts.of(["a\ud800", "b"], [{"n": 1, "x": {1, 2}}, {}]),
    ]
    assert len({fingerprint(prompts) for prompts in (base, *others)}) == 6


def test_digest_of_weights(pixel_model):
    """Equal in float32 and bfloat16, with an adapter and without; and of the values alone."""
    from diffusers import SD3Transformer2DModel

    def load(dtype=torch.float32):
        return SD3Transformer2DModel.from_pretrained(pixel_model / "transformer", dtype=dtype)

    model, digest = load(), content.weights_digest(load())
    assert digest.startswith("bfloat16:") and digest == content.weights_digest(model.bfloat16())
    add_adapter(model, PolicyConfig(lora_rank=2), seed=1)
    assert content.weights_digest(model) == digest
    assert content.weights_digest(load(torch.float16)).startswith("float16:")
    changed = load()
    with torch.no_grad():
        next(iter(changed.parameters())).flatten()[-1] += 1
    assert content.weights_digest(changed) != digest


@pytest.mark.parametrize("block", [0, 3, 7])
def test_a_large_tensor_counts_by_blocks(block):
    """They begin at even distances, and the last one ends with the tensor."""
    model = torch.nn.Linear(1000, 600, bias=False)
    digest, start = content.weights_digest(model), block * (600_000 - BLOCK) // 7
    with torch.no_grad():
        model.weight.view(-1)[start + BLOCK - 1] += 1
    assert content.weights_digest(model) != digest
    assert start + BLOCK == 600_000 or block < 7


def test_models_are_compared_where_they_can_be():
    def model(sigmas=(1.0, 0.5, 0.0), **weights):
        return {"weights": weights, "sigmas": list(sigmas)}

    base = model(transformer="bfloat16:1", vae="bfloat16:2")
    assert content.model_differences(base, base) == []
    # Another dtype, a component less, one more, and sigmas of another number of steps.
    for other in (
        model(transformer="float16:3", vae="bfloat16:2"),
        model(transformer="bfloat16:1"),
        model(transformer="bfloat16:1", vae="bfloat16:2", text_encoder="bfloat16:9"),
        model((1.0, 0.0), transformer="bfloat16:1"),
        model((1.0, 0.5 + 1e-7, 0.0), transformer="bfloat16:1"),
    ):
        assert content.model_differences(base, other) == []
    assert content.model_differences(base, model(vae="bfloat16:3")) == ["vae"]
    assert content.model_differences(base, model((1.0, 0.51, 0.0))) == ["sigmas"]


@pytest.mark.parametrize("text", ["{", "[]", '{"prompts": {}}', "null"])
def test_damaged_fingerprints_are_one_sentence(tmp_path, text):
    (tmp_path / content.FILE).write_text(text)
    with pytest.raises(ConfigError, match=r"content.json cannot be read .* remove it"):
        content.read(tmp_path)


REWARD = """
from flowgrpo.rewards.options import configurable
@configurable("mine")
def score(*, model: str = "acme/model", scale: float = 1.0):
    return lambda images, prompts, metadata: [scale] * len(images)
"""


@pytest.fixture
def reward(tmp_path, monkeypatch):
    """f(text, model=...) -> fingerprints of a reward in a file."""
    monkeypatch.setattr(sys, "path", list(sys.path))

    def fingerprints(text: str, folder: str = "one", **options):
        sys.modules.pop("users_content", None)
        file = tmp_path / folder / "users_content.py"
        file.parent.mkdir(exist_ok=True)
        file.write_text(text)
        name = f"{file}:score"
        rewards = {name: load(name, options)}
        return {
            "prompts": {},
            "model": {"weights": {}, "sigmas": [1.0, 0.0]},
            "rewards": content.files_of_rewards(rewards),
            "code": content.code_of_rewards(rewards),
        }

    yield fingerprints
    sys.modules.pop("users_content", None)


def test_code_of_a_reward_counts_wherever_it_lies(reward):
    first = reward(REWARD)
    assert list(first["code"]) == ["users_content.py:score"]
    assert content.code_differences(first, reward(REWARD, "two")) == {}
    other = reward(REWARD.replace("[scale]", "[2 * scale]"), "two")
    assert content.code_differences(first, other) == {"code": "The code of users_content.py:score"}
    assert content.differences(first, other) == {}
    # A run of before has no fingerprint of it, and rewards of the package have none.
    assert content.code_differences({}, other) == {}
    assert content.code_of_rewards({"jpeg_compressibility": load("jpeg_compressibility")}) == {}


def test_models_of_rewards_count_by_their_files(reward, tmp_path):
    folder = tmp_path / "weights"
    (folder / "sub").mkdir(parents=True)
    (folder / "sub" / "x.bin").write_bytes(bytes(3 << 20))
    (folder / ".cache").write_text("x")
    first = reward(REWARD, model=str(folder))
    [key] = first["rewards"]
    assert key == "users_content.py:score.model" and first["rewards"][key].startswith("files:")
    moved = shutil.copytree(folder, tmp_path / "moved")
    (moved / ".cache").write_text("y")
    assert content.differences(first, reward(REWARD, model=str(moved))) == {}
    data = bytearray(3 << 20)
    data[-1] = 1
    (moved / "sub" / "x.bin").write_bytes(data)
    changes = content.differences(first, reward(REWARD, model=str(moved)))
    assert changes == {"rewards": f"what the options of rewards name, {key}"}
    # Names on the Hub are compared as names; with a folder they are not.
    one, two = reward(REWARD), reward(REWARD, model="acme/other")
    assert one["rewards"] == {key: "name:acme/model"} and "rewards" in content.differences(one, two)
    assert content.differences(one, first) == content.differences(first, one) == {}


@pytest.mark.slow
def test_a_reward_whose_code_changed_is_said_and_recorded(tmp_path, monkeypatch, caplog):
    """It goes on: a reward that failed is mended so."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    text = "def score(i, p, m): return [float(x.float().mean()) for x in i]\n"
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "users_mended.py").write_text(text)
    name = f"{tmp_path}/one/users_mended.py:score"
    config = processes.make(tmp_path, **SHORT, **{"reward.weights": {name: 1.0}})
    first = train.run(config)
    sys.modules.pop("users_mended", None)
    caplog.clear()
    other = f"{tmp_path}/two/users_mended.py:score"
    places = {"reward.weights": {other: 1.0}, "run.steps": 3}
    # The same file in another place is the same, and the scores of before have its name.
    summary = train.run(replace(directory.resume_config(tmp_path / "run"), **places))
    assert "changed since the run began" not in caplog.text
    assert summary["before"]["scores"] == {other: first["before"]["scores"][name]}
    sys.modules.pop("users_mended", None)
    (tmp_path / "two" / "users_mended.py").write_text(text + "# mended\n")
    train.run(replace(directory.resume_config(tmp_path / "run"), **{**places, "run.steps": 4}))
    assert "The code of users_mended.py:score changed since the run began" in caplog.text
    record = json.loads((tmp_path / "run" / content.FILE).read_text())
    assert [change["changed"].keys() for change in record["changes"]] == [{"code"}]
    assert (tmp_path / "run" / "evaluations" / "step-000000").is_dir()
    sys.modules.pop("users_mended", None)
