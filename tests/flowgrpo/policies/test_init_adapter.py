"""policy.init_adapter: training starts from LoRA weights, and they are its reference."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from peft import LoraConfig, get_peft_model
from PIL import Image
from safetensors.torch import load_file, save_file

from flowgrpo import cuda_graphs, seeds, train, update
from flowgrpo.cli import main
from flowgrpo.config import ConfigError, PolicyConfig, replace
from flowgrpo.evaluation import pictures
from flowgrpo.evaluation.evaluate import generate_images
from flowgrpo.policies import Policy, lora
from flowgrpo.policies.adapters import add_adapter, load_adapter, start_from, trained_parameters
from support import pipelines, setups
from support.cpu_graphs import Recorder, evaluate

TARGETS = ("attn.to_q", "attn.to_v", "ff.net.2")
KINDS = {"pixel_model": 0, "flux_model": 16}
SIZES = {"policy.lora_rank": 4, "policy.lora_alpha": 12, "policy.lora_targets": TARGETS}


def config_of(kind, **fields) -> PolicyConfig:
    sizes = {"resolution": KINDS[kind], "max_sequence_length": 4, "text_cache": ""}
    rest = {"lora_rank": 4, "lora_alpha": 12, "lora_targets": TARGETS}
    return PolicyConfig(**{**sizes, **rest, **fields})


def load(folder, kind, **fields) -> Policy:
    config = config_of(kind, **fields)
    return Policy.load(str(folder), device="cpu", dtype="float32", config=config)


@pytest.fixture(scope="module")
def adapters(request, tmp_path_factory):
    """Kind of model -> an adapter of it in PEFT's format, its matrices random."""
    return {
        kind: save_adapter(
            request.getfixturevalue(kind), kind, tmp_path_factory.mktemp(f"{kind}_adapter")
        )
        for kind in KINDS
    }


def save_adapter(model, kind, folder):
    """Save a random adapter of `model` in PEFT's format."""
    config = LoraConfig(r=4, lora_alpha=12, target_modules=list(TARGETS), init_lora_weights=False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        get_peft_model(load(model, kind).transformer, config).save_pretrained(folder)
    return folder


def velocity(policy) -> torch.Tensor:
    x = torch.randn(2, *policy.latent_shape, generator=torch.Generator().manual_seed(0))
    texts = policy.encode(["a red circle", "two square"])
    with torch.no_grad():
        return policy.velocity(x, torch.tensor([0.9, 0.2]), texts)


def shift(policy, amount=0.1):
    """Move the trained weights, as updates would."""
    with torch.no_grad():
        for parameter in trained_parameters(policy.transformer).values():
            parameter.add_(amount)


def started(folder, kind, adapter, **fields) -> Policy:
    policy = load(folder, kind, **fields)
    config = config_of(kind, **fields)
    add_adapter(policy.transformer, config, seed=3)
    start_from(policy, config, str(adapter))
    return policy


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_the_start_is_the_model_with_the_adapter(request, adapters, kind, fused):
    folder = request.getfixturevalue(kind)
    other = load(folder, kind)
    base = velocity(other)
    load_adapter(other, str(adapters[kind]))
    policy = started(folder, kind, adapters[kind], fused=fused)
    torch.testing.assert_close(velocity(policy), velocity(other), rtol=1e-4, atol=1e-5)
    assert (velocity(policy) - base).abs().max() > 1e-3
    assert {p.dtype for p in trained_parameters(policy.transformer).values()} == {torch.float32}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_the_reference_stays_the_start(request, adapters, kind):
    """The same bits in all ways that a run calls it, whatever has become of the trained weights."""
    policy = started(request.getfixturevalue(kind), kind, adapters[kind])
    start = velocity(policy)
    with policy.reference():
        assert torch.equal(velocity(policy), start)
    shift(policy)
    trained = velocity(policy)
    assert not torch.equal(trained, start)
    for fixed in (False, True, True):
        with policy.frozen_weights(fixed):
            # As in an update: the reference inside of the trained matrices, which stay.
            with policy.reference():
                assert torch.equal(velocity(policy), start)
                with policy.frozen_weights(fixed):
                    assert torch.equal(velocity(policy), start)
            assert torch.equal(velocity(policy), trained)
        with policy.reference(), policy.frozen_weights(fixed):
            # As in the evaluation before training.
            assert torch.equal(velocity(policy), start)
        assert torch.equal(velocity(policy), trained)
    names = policy.transformer.state_dict()
    assert not any("initial" in name for name in names)
    assert len(list(policy.parameters())) == 2 * len(lora.lora_layers(policy.transformer))


@pytest.mark.slow
def test_compiled_blocks_give_the_reference_the_bits_of_the_start(tmp_path):
    """Of one block, the last, since each kind of block takes the C++ compiler ten seconds."""
    model = pipelines.save_pixel_pipeline(tmp_path / "model", layers=1)
    adapter = save_adapter(model, "pixel_model", tmp_path / "adapter")
    policy = started(model, "pixel_model", adapter, compile=True)
    start = velocity(policy)
    shift(policy)
    with policy.frozen_weights():
        trained = velocity(policy)
        with policy.reference():
            assert torch.equal(velocity(policy), start)
    assert not torch.equal(trained, start)


def test_without_one_the_reference_is_the_base(pixel_model):
    policy = load(pixel_model, "pixel_model")
    base = velocity(policy)
    add_adapter(policy.transformer, config_of("pixel_model"))
    shift(policy)
    with policy.reference():
        assert torch.equal(velocity(policy), base)


def run(folder, kind, out, **changes):
    """Two iterations of one update each, so that all of the first are at the start."""
    out.mkdir(exist_ok=True)
    fixed = {"policy.resolution": KINDS[kind], "policy.max_sequence_length": 4, "run.steps": 2}
    fixed |= {"policy.text_cache": "", "run.eval_prompts": 1, "sample.eval_steps": 2, **SIZES}
    fixed |= {"optim.updates_per_iteration": 1, "optim.ema_decay": 0.0, "run.eval_every": 0}
    fixed |= {"optim.beta": 1.0, "run.checkpoint_every": 1}
    fixed |= {"sample.group_size": 3, "sample.steps": 4}
    config = setups.config(folder, out, **{**fixed, **changes})
    return config, train.run(config)


def lines(out):
    text = (out / "run" / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in text]


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_run(request, adapters, kind, tmp_path, monkeypatch):
    """KL 0 and ratio 1 at the start; what is evaluated before training is the start; a resumed run
    needs the adapter's files no more, and has the same numbers; evaluate and sample show all three.
    """
    folder = request.getfixturevalue(kind)
    adapter = shutil.copytree(adapters[kind], tmp_path / "adapter")
    changes = {"policy.init_adapter": str(adapter)}
    config, summary = run(folder, kind, tmp_path / "whole", **changes)
    assert summary["max_ratio_error"] == 0.0
    first, second = (line for line in lines(tmp_path / "whole") if line["kind"] == "train")
    assert first["kl"] == 0.0 < second["kl"]
    _, plain = run(folder, kind, tmp_path / "plain", **{"run.steps": 1})
    assert summary["before"]["scores"] != plain["before"]["scores"]
    own = load_file(tmp_path / "whole" / "run" / "initial" / "pytorch_lora_weights.safetensors")
    theirs = load_file(adapter / "adapter_model.safetensors")
    assert len(own) == len(theirs)
    for name, tensor in theirs.items():
        assert torch.equal(own[name.replace("base_model.model.", "transformer.")], tensor)
    card = (tmp_path / "whole" / "run" / "adapter" / "README.md").read_text()
    assert "rank 4, alpha 12, on attn.to_q, attn.to_v, ff.net.2, from the adapter adapter" in card

    _, _ = run(folder, kind, tmp_path / "cut", **{**changes, "run.steps": 1})
    shutil.rmtree(adapter)
    resumed = replace(
        config,
        **{"run.out": str(tmp_path / "cut" / "run"), "run.resume": str(tmp_path / "cut" / "run")},
        **{"sample.prompts": str(tmp_path / "cut" / "prompts.txt")},
    )
    train.run(resumed)
    assert lines(tmp_path / "cut") == lines(tmp_path / "whole")
    weights = [
        load_file(tmp_path / name / "run" / "adapter" / "pytorch_lora_weights.safetensors")
        for name in ("cut", "whole")
    ]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[1])

    target = [str(tmp_path / "whole" / "run"), "--device", "cpu", "--out", str(tmp_path / "e")]
    assert main.main(["evaluate", *target]) == 0
    reports = json.loads((tmp_path / "e" / "report.json").read_text())["reports"]
    assert list(reports) == ["base", "start", "iteration 2"]
    assert reports["base"]["scores"] == plain["before"]["scores"]
    assert reports["start"]["scores"] == summary["before"]["scores"]
    assert reports["iteration 2"]["scores"] == summary["after"]["scores"]

    drawn, blank = [], Image.new("RGB", (4, 4))
    monkeypatch.setattr(pictures, "grid", lambda rows, *_, **__: drawn.append(rows) or blank)
    line = ["sample", "a red circle", "--run", str(tmp_path / "whole" / "run"), "--count", "1"]
    line += ["--steps", "2", "--device", "cpu", "--out", str(tmp_path / "x.png")]
    assert main.main(line) == 0
    assert list(drawn[0]) == ["base", "start", "trained"]
    texts, policy = ["a red circle"], started(folder, kind, tmp_path / "whole" / "run" / "initial")
    noise = torch.from_numpy(seeds.sample_seeds(0, seeds.EVALUATION, [0], [0]))
    expected = generate_images(policy, texts, noise, 1, steps=2, batch_size=3)
    assert torch.equal(drawn[0]["start"], expected)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"lora_rank": 8},
            "rank 4, alpha 12 and .*lora_rank 8, lora_alpha 12 .* set --policy.lora-rank 4 "
            r"--policy.lora-alpha 12 --policy.lora-targets attn.to_q attn.to_v ff.net.2\.$",
        ),
        ({"lora_alpha": 24}, "rank 4, alpha 12 .* lora_alpha 24"),
        ({"lora_targets": ("attn.to_q",)}, "for 6 layers, but .* lora_targets with 2 layers"),
        ({"lora_targets": (*TARGETS, "attn.to_k")}, "for 6 layers, but .* with 8 layers"),
    ],
)
def test_another_shape_is_one_sentence_with_the_options(pixel_model, adapters, fields, message):
    with pytest.raises(ConfigError, match=f"policy.init_adapter '.*'.* {message}"):
        started(pixel_model, "pixel_model", adapters["pixel_model"], **fields)


def test_an_adapter_of_some_blocks_is_named_by_its_layers(pixel_model, adapters, tmp_path):
    folder = shutil.copytree(adapters["pixel_model"], tmp_path / "some")
    tensors = load_file(folder / "adapter_model.safetensors")
    some = {name: tensor for name, tensor in tensors.items() if "blocks.1.attn.to_q" in name}
    save_file(some, folder / "adapter_model.safetensors")
    name = "transformer_blocks.1.attn.to_q"
    with pytest.raises(ConfigError, match=f"for 1 layers, .* --policy.lora-targets {name}\\.$"):
        started(pixel_model, "pixel_model", folder)
    policy = started(pixel_model, "pixel_model", folder, lora_targets=(name,))
    assert len(lora.lora_layers(policy.transformer)) == 1


@pytest.mark.slow
def test_captured_updates_and_evaluations_have_the_eager_bits(pixel_model, adapters, tmp_path):
    """The reference inside of a graph of an update, and of its own in the first evaluation."""
    changes = {**SIZES, "policy.init_adapter": str(adapters["pixel_model"]), "optim.beta": 1.0}
    changes |= {"sample.share_prefix": False, "sample.group_size": 3, "sample.steps": 4}
    config = setups.config(pixel_model, tmp_path, **changes)
    results = []
    for record in (False, True):
        parts = setups.parts(config)
        policy = parts.policy
        if record:
            policy.graphs = cuda_graphs.Graphs(policy, Recorder())
            micro_step = update.MicroStep(policy, parts.objective, policy.graphs)
            parts = train.Components(**{**vars(parts), "micro_step": micro_step})
        figures = []
        for parts.state.iteration in range(2):
            with policy.reference():
                figures.append(evaluate(policy).tolist())
            figures.append(evaluate(policy).tolist())
            figures.append(setups.update(parts, setups.experience(parts, config), config))
        assert figures[0] == figures[3] != figures[1] != figures[4]
        results.append((figures, [p.tolist() for p in parts.state.parameters.values()]))
    assert results[0] == results[1]
    # The rollout's chunks, the micro-steps, and the evaluations of the start and of the trained.
    assert policy.graphs.recorder.captures == 4


@pytest.mark.slow
def test_weights_that_are_none(pixel_model, adapters, tmp_path):
    def start(folder):
        return started(pixel_model, "pixel_model", folder)

    with pytest.raises(ConfigError, match=r"absent' could not be read, but LoRA weights"):
        start(tmp_path / "absent")
    source = adapters["pixel_model"]
    tensors = load_file(source / "adapter_model.safetensors")
    first = "base_model.model.transformer_blocks.0.attn.to_q.lora_B.weight"

    def write(name, changed):
        folder = shutil.copytree(source, tmp_path / name)
        save_file(changed, folder / "adapter_model.safetensors")
        return folder

    broken = {**tensors, first: tensors[first] * torch.nan}
    with pytest.raises(ConfigError, match=r"NaN or infinity in .*to_q\.lora_B\.weight, but finite"):
        start(write("nan", broken))
    half = {name: tensor for name, tensor in tensors.items() if name != first}
    with pytest.raises(ConfigError, match=r"has no .*to_q\.lora_B\.weight, but both matrices"):
        start(write("half", half))
    wide = {**tensors, first: torch.zeros(17, 4)}
    with pytest.raises(ConfigError, match=r"\[17, 4\], but .* shape \[16, 4\]"):
        start(write("wide", wide))
    foreign = {name.replace("blocks.0", "blocks.9"): tensor for name, tensor in tensors.items()}
    with pytest.raises(
        ConfigError, match=r"blocks\.9\..* \(3 such of 6 layers\), which .* not have"
    ):
        start(write("foreign", {**foreign}))
    scaled = write("rslora", tensors)
    settings = json.loads((scaled / "adapter_config.json").read_text())
    (scaled / "adapter_config.json").write_text(json.dumps({**settings, "use_rslora": True}))
    with pytest.raises(ConfigError, match="has use_rslora, but matrices of one rank and one alpha"):
        start(scaled)
    with pytest.raises(ConfigError, match=r"policy\.adapter full, but only LoRA starts from"):
        PolicyConfig(adapter="full", init_adapter="x")
