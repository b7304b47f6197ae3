"""Adapters in the formats that people publish: each gives the velocity of diffusers' own file."""

from __future__ import annotations

import json
import shutil

import huggingface_hub
import pytest
import torch
from huggingface_hub import ModelCard, constants
from peft import LoraConfig, get_peft_model
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file

from flowgrpo.cli import main
from flowgrpo.config import ConfigError
from flowgrpo.policies import Policy
from flowgrpo.policies.adapter_files import origin, read_adapter
from flowgrpo.policies.adapters import check_adapter, load_adapter
from flowgrpo.policies.lora import lora_layers
from support import pipelines

TARGETS = ["attn.to_q", "attn.to_v"]


def load(model) -> Policy:
    return Policy.load(str(model), device="cpu", dtype="float32")


def velocity(policy: Policy) -> torch.Tensor:
    x = torch.randn(2, *policy.latent_shape, generator=torch.Generator().manual_seed(0))
    texts = policy.encode(["a red circle", "two square"])
    with torch.no_grad():
        return policy.velocity(x, torch.tensor([0.9, 0.2]), texts)


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    """(model, PEFT's folder, matrices by bare names, the velocity that PEFT computes)."""
    folder = tmp_path_factory.mktemp("adapters")
    model = pipelines.save_pixel_pipeline(folder / "model")
    policy = load(model)
    config = LoraConfig(r=4, lora_alpha=12, target_modules=TARGETS, init_lora_weights=False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        wrapped = get_peft_model(policy.transformer, config)
    wrapped.save_pretrained(folder / "peft")
    expected = velocity(policy)
    tensors = load_file(folder / "peft" / "adapter_model.safetensors")
    bare = {name.removeprefix("base_model.model."): t for name, t in tensors.items()}
    return model, folder / "peft", bare, expected


@pytest.mark.parametrize("whole", ["folder", "file"])
def test_peft_format_at_its_scale(adapters, whole):
    model, folder, _, expected = adapters
    policy = load(model)
    base = velocity(policy)
    path = folder if whole == "folder" else folder / "adapter_model.safetensors"
    text = load_adapter(policy, str(path))
    assert text == "adapter_model.safetensors in PEFT's format: 4 layers, rank 4, alpha 12"
    torch.testing.assert_close(velocity(policy), expected, rtol=1e-5, atol=1e-6)
    assert (velocity(policy) - base).abs().max() > 1e-3


def save(folder, tensors, name="lora.safetensors"):
    folder.mkdir()
    save_file({key: tensor.clone() for key, tensor in tensors.items()}, folder / name)
    return str(folder)


def test_bare_names_with_and_without_alpha(adapters, tmp_path):
    model, _, bare, expected = adapters
    alphas = {f"{name.split('.lora_')[0]}.alpha": torch.tensor(12.0) for name in bare}
    policy = load(model)
    assert "alpha 12" in load_adapter(policy, save(tmp_path / "alpha", {**bare, **alphas}))
    torch.testing.assert_close(velocity(policy), expected, rtol=1e-5, atol=1e-6)
    # Without one the scale is 1, so matrices that hold the scale themselves give the same.
    scaled = {name: t * (3 if "lora_B" in name else 1) for name, t in bare.items()}
    policy = load(model)
    text = load_adapter(policy, save(tmp_path / "none", scaled))
    assert text == "lora.safetensors in bare module names: 4 layers, rank 4, no alpha, so scale 1"
    torch.testing.assert_close(velocity(policy), expected, rtol=1e-5, atol=1e-6)


def test_ranks_of_their_own_and_the_name_of_the_adapter(adapters, tmp_path):
    """One layer of rank 2 among those of 4; keys as in the state of a PEFT model."""
    model, _, bare, expected = adapters
    scaled = {name: t * (3 if "lora_B" in name else 1) for name, t in bare.items()}
    layer = "transformer_blocks.1.attn.to_q"
    a, b = (scaled.pop(f"{layer}.lora_{m}.weight") for m in "AB")
    # The same product B A by other factors of rank 16, B A itself and the identity.
    scaled[f"{layer}.lora_A.weight"], scaled[f"{layer}.lora_B.weight"] = torch.eye(16), b @ a
    keys = {f"base_model.model.{n.replace('.weight', '.default.weight')}": n for n in scaled}
    folder = save(tmp_path / "ranks", {key: scaled[name] for key, name in keys.items()})
    assert read_adapter(folder).ranks[layer] == 16
    policy = load(model)
    load_adapter(policy, folder)
    torch.testing.assert_close(velocity(policy), expected, rtol=1e-5, atol=1e-6)


def test_check_adapter_leaves_the_policy_as_it_was(adapters):
    model, folder, _, _ = adapters
    policy = load(model)
    before = velocity(policy)
    assert check_adapter(policy, str(folder)).endswith("alpha 12")
    assert not lora_layers(policy.transformer) and torch.equal(velocity(policy), before)


@pytest.mark.parametrize("name", ["adapter_model", "pytorch_lora_weights"])
def test_a_hub_repository(adapters, tmp_path, monkeypatch, name):
    """Offline, from a cache folder laid out as the Hub's client does; PEFT's alpha comes along."""
    model, folder, bare, expected = adapters
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "hub" / "models--acme--adapter"
    snapshot = repository / "snapshots" / commit
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    shutil.copytree(folder, snapshot)
    if name == "pytorch_lora_weights":
        shutil.rmtree(snapshot)
        scaled = {f"transformer.{n}": t * (3 if "lora_B" in n else 1) for n, t in bare.items()}
        save(snapshot, scaled, f"{name}.safetensors")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    policy = load(model)
    assert load_adapter(policy, "acme/adapter").startswith(f"{name}.safetensors in ")
    torch.testing.assert_close(velocity(policy), expected, rtol=1e-5, atol=1e-6)
    with pytest.raises(ConfigError, match="'acme/other' cannot be loaded"):
        load_adapter(policy, "acme/other")


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """The cache of the Hub's client, offline: a function that puts a folder into it."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)

    def add(
        folder, repository, inside="", revision="main", commit="0123456789abcdef" * 2 + "01" * 4
    ):
        root = tmp_path / "hub" / f"models--{repository.replace('/', '--')}"
        (root / "refs").mkdir(parents=True, exist_ok=True)
        (root / "refs" / revision).write_text(commit)
        shutil.copytree(folder, root / "snapshots" / commit / inside, dirs_exist_ok=True)
        return commit

    return add


def test_folders_and_revisions_of_a_hub_repository(adapters, hub):
    """flow_grpo's checkpoints have PEFT's files in lora/."""
    model, folder, _, expected = adapters
    commit = hub(folder, "acme/checkpoint", "lora")
    hub(folder, "acme/many", "tasks/ocr", "v2")
    policy = load(model)
    for name in ("acme/checkpoint", "acme/many/tasks/ocr@v2"):
        assert check_adapter(policy, name).endswith("alpha 12")
        assert origin(name) == {"file": "adapter_model.safetensors", "revision": commit}
    load_adapter(policy, "acme/many/tasks/ocr@v2")
    torch.testing.assert_close(velocity(policy), expected, rtol=1e-5, atol=1e-6)
    # Neither the other folder nor the other revision.
    for name in ("acme/many/tasks@v2", "acme/many/tasks/ocr"):
        with pytest.raises(ConfigError, match=f"'{name}' cannot be loaded"):
            load_adapter(load(model), name)


def test_a_hub_repository_with_one_file_of_another_name(adapters, hub, tmp_path, monkeypatch):
    model, _, bare, _ = adapters
    scaled = {f"transformer.{n}": t for n, t in bare.items()}
    hub(save(tmp_path / "one", scaled, "flow_grpo_ocr.safetensors"), "acme/one")
    names = [".gitattributes", "flow_grpo_ocr.safetensors", "optimizer/state.safetensors"]
    monkeypatch.setattr(huggingface_hub, "list_repo_files", lambda *_, **__: names)
    assert check_adapter(load(model), "acme/one").startswith("flow_grpo_ocr.safetensors in diff")
    names.append("flow_grpo_geneval.safetensors")
    with pytest.raises(ConfigError, match=r"ocr\.safetensors, flow_grpo_geneval\.safetensors, but"):
        check_adapter(load(model), "acme/one")


def test_a_checkpoint_of_flow_grpo(adapters, tmp_path):
    model, folder, _, expected = adapters
    shutil.copytree(folder, tmp_path / "checkpoint-120" / "lora")
    policy = load(model)
    assert load_adapter(policy, str(tmp_path / "checkpoint-120")).endswith("alpha 12")
    torch.testing.assert_close(velocity(policy), expected, rtol=1e-5, atol=1e-6)


def test_a_diffusers_file_says_so(adapters, tmp_path):
    from diffusers import StableDiffusion3Pipeline

    model, _, _, _ = adapters
    policy = load(model)
    policy.transformer.add_adapter(LoraConfig(r=3, lora_alpha=6, target_modules=TARGETS))
    StableDiffusion3Pipeline.save_lora_weights(
        tmp_path,
        transformer_lora_layers=get_peft_model_state_dict(policy.transformer),
        transformer_lora_adapter_metadata=policy.transformer.peft_config["default"].to_dict(),
    )
    text = load_adapter(load(model), str(tmp_path))
    assert text.endswith("in diffusers' format: 4 layers, rank 3, alpha 6")


def test_a_file_of_several_models_goes_to_diffusers(adapters, tmp_path):
    model, _, bare, expected = adapters
    scaled = {f"transformer.{n}": t * (3 if "lora_B" in n else 1) for n, t in bare.items()}
    text = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora"
    width = load(model).pipeline.text_encoder.config.hidden_size
    scaled |= {f"{text}_A.weight": torch.ones(4, width), f"{text}_B.weight": torch.zeros(width, 4)}
    policy = load(model)
    folder = save(tmp_path / "both", scaled, "pytorch_lora_weights.safetensors")
    assert load_adapter(policy, folder) == "diffusers' conversion of its keys"
    torch.testing.assert_close(velocity(policy), expected, rtol=1e-5, atol=1e-6)


def test_what_does_not_fit_is_one_sentence(adapters, tmp_path):
    model, _, bare, _ = adapters
    pair = {name: tensor for name, tensor in bare.items() if name.startswith(FIRST)}
    larger = {**bare, **{name.replace("blocks.0", "blocks.7"): t for name, t in pair.items()}}
    with pytest.raises(ConfigError, match=r"transformer_blocks\.7\.attn\.to_q \(1 such of 5"):
        load_adapter(load(model), save(tmp_path / "larger", larger))
    dora = {**bare, "transformer_blocks.0.attn.to_q.lora_magnitude_vector": torch.ones(16)}
    with pytest.raises(ConfigError, match="lora_magnitude_vector beside its matrices"):
        load_adapter(load(model), save(tmp_path / "dora", dora))
    (tmp_path / "pickle").mkdir()
    (tmp_path / "pickle" / "adapter_model.bin").write_bytes(b"")
    with pytest.raises(ConfigError, match="which is a pickle"):
        load_adapter(load(model), str(tmp_path / "pickle"))
    other = save(tmp_path / "other", bare, "adapter_model.safetensors")
    (tmp_path / "other" / "adapter_config.json").write_text('{"peft_type": "LOHA"}')
    with pytest.raises(ConfigError, match="peft_type LOHA, but LORA is expected"):
        load_adapter(load(model), other)
    (tmp_path / "other" / "adapter_config.json").write_text("[1]")
    with pytest.raises(ConfigError, match=r"adapter_config\.json cannot be read"):
        load_adapter(load(model), other)


@pytest.mark.slow
def test_sample_and_evaluate_take_it_and_name_the_format(adapters, tmp_path, capsys):
    model, folder, _, _ = adapters
    line = ["sample", "a red circle", "--model", str(model), "--count", "1", "--steps", "2"]
    line += ["--device", "cpu", "--adapter", str(folder), "--out", str(tmp_path / "x.png")]
    assert main.main(line) == 0
    assert "adapter_model.safetensors in PEFT's format: 4 layers" in capsys.readouterr().out
    (tmp_path / "prompts.txt").write_text("a red circle\ntwo square\n")
    line = ["evaluate", str(model), "--adapter", str(folder), "--steps", "2", "--device", "cpu"]
    line += ["--prompt-set", str(tmp_path / "prompts.txt"), "--rewards", "jpeg_compressibility"]
    assert main.main([*line, "--out", str(tmp_path)]) == 0
    assert "in PEFT's format: 4 layers, rank 4, alpha 12" in capsys.readouterr().out
    reports = json.loads((tmp_path / "report.json").read_text())["reports"]
    assert reports["base"]["scores"] != reports["adapter"]["scores"]


@pytest.mark.slow
def test_evaluate_takes_a_hub_repository_and_writes_a_card(adapters, hub, tmp_path, capsys, caplog):
    """Metadata in the Hub's format, read back by its own library, of the figures in report.json."""
    model, folder, _, _ = adapters
    shutil.copytree(folder, tmp_path / "published")
    settings = json.loads((folder / "adapter_config.json").read_text())
    settings["base_model_name_or_path"] = "acme/other-base"
    (tmp_path / "published" / "adapter_config.json").write_text(json.dumps(settings))
    commit = hub(tmp_path / "published", "acme/flow-grpo")
    lines = [{"prompt": "a red circle", "tag": "one"}, {"prompt": "two square", "tag": "more"}]
    (tmp_path / "task.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (tmp_path / "README.md").write_text("mine")
    line = [
        "evaluate",
        str(model),
        "--adapter",
        "acme/flow-grpo",
        "--steps",
        "2",
        "--device",
        "cpu",
    ]
    line += ["--prompt-set", str(tmp_path / "task.jsonl"), "--rewards", "jpeg_compressibility"]
    line += ["--quality", "jpeg_incompressibility", "--quality-prompts", line[-3]]
    assert main.main([*line, "--out", str(tmp_path)]) == 0
    assert "card/README.md" in capsys.readouterr().out
    assert "its base model is acme/other-base, and is evaluated on" in caplog.text
    assert (tmp_path / "README.md").read_text() == "mine"
    report = json.loads((tmp_path / "report.json").read_text())
    known = {"file": "adapter_model.safetensors", "revision": commit}
    assert report["adapter_origin"] == {**known, "base_model": "acme/other-base"}
    values = report["reports"]["adapter"]
    card = ModelCard.load(tmp_path / "card" / "README.md")
    assert card.data.tags == ["lora", "flowgrpo"] and card.data.model_name == "acme/flow-grpo"
    # A folder is no model of the Hub.
    assert card.data.base_model is None
    measured = {
        (entry.dataset_name, entry.metric_type): entry.metric_value
        for entry in card.data.eval_results
    }
    name = "jpeg_compressibility"
    quality = json.loads((tmp_path / "evaluation.json").read_text())["systems"][-1]["quality"]
    assert measured == {
        ("task.jsonl", name): values["scores"][name],
        ("task.jsonl, one", name): values["tasks"]["one"],
        ("task.jsonl, more", name): values["tasks"]["more"],
        ("task.jsonl", "jpeg_incompressibility"): quality["scores"]["jpeg_incompressibility"][
            "mean"
        ],
    }
    first = card.data.eval_results[0]
    assert first.task_type == "text-to-image" and first.dataset_split == "heldout"
    assert first.metric_args["interval_95"] == values["intervals"][name]
    assert first.metric_args["steps"] == 2 and first.metric_args["size"] == values["size"]
    assert f"alpha 12, revision {commit}" in card.text
    base = report["reports"]["base"]["scores"][name]
    low, high = report["reports"]["base"]["intervals"][name]
    assert f"| {name} | {base:.4g} ({low:.4g} to {high:.4g}) | {values['scores'][name]:.4g} (" in (
        card.text
    )


FIRST = "transformer_blocks.0.attn.to_q"
LOW, HIGH = f"{FIRST}.lora_A.weight", f"{FIRST}.lora_B.weight"
NOT_WHOLE = [
    ({HIGH: None}, rf"has no {HIGH}, but both matrices"),
    ({LOW: None}, rf"has no {LOW}, but both matrices"),
    ({LOW: lambda t: t * torch.nan}, f"has NaN or infinity in {LOW}"),
    ({HIGH: lambda t: t / 0}, f"has NaN or infinity in {HIGH}"),
    ({LOW: lambda t: t.int()}, rf"has torch\.int32 in {LOW}"),
    ({LOW: lambda t: t[0, 0]}, rf"has {LOW} \[\] and lora_B\.weight \[16, 4\]"),
    ({HIGH: lambda t: t[:, :3]}, rf"has {LOW} \[4, 16\] and lora_B\.weight \[16, 3\]"),
    ({LOW: lambda t: t[:0], HIGH: lambda t: t[:, :0]}, rf"has {LOW} \[0, 16\]"),
]


@pytest.mark.parametrize("prefix", ["", "transformer.", "base_model.model."])
@pytest.mark.parametrize(("changes", "message"), NOT_WHOLE)
def test_matrices_that_are_not_whole(adapters, tmp_path, prefix, changes, message):
    """PEFT and diffusers would leave out half a pair, and round or multiply by the rest."""
    model, _, bare, _ = adapters
    changed = {name: changes.get(name, lambda t: t) for name in bare}
    tensors = {f"{prefix}{name}": f(bare[name]) for name, f in changed.items() if f is not None}
    with pytest.raises(ConfigError, match=rf"the adapter '.*' {message}"):
        check_adapter(load(model), save(tmp_path / "x", tensors))


@pytest.mark.parametrize("key", ["nobody.lora.weight", f"{FIRST}.lora_C.weight", "norm.bias"])
def test_a_key_that_diffusers_would_leave_out(adapters, tmp_path, key):
    model, _, bare, _ = adapters
    tensors = {f"transformer.{name}": tensor for name, tensor in {**bare, key: bare[LOW]}.items()}
    folder = save(tmp_path / "x", tensors, "pytorch_lora_weights.safetensors")
    with pytest.raises(ConfigError, match=f"holds {key} beside its matrices"):
        check_adapter(load(model), folder)


@pytest.mark.parametrize("prefix", ["", "transformer."])
def test_a_module_without_alpha_beside_others(adapters, tmp_path, prefix):
    """Its scale is 1: reference, the matrices multiplied by the scales."""
    model, _, bare, _ = adapters
    tensors = {**bare, f"{FIRST}.alpha": torch.tensor(12.0)}
    scaled = {name: t * (3 if name == HIGH else 1) for name, t in bare.items()}
    policies = [load(model), load(model)]
    for policy, values in zip(policies, (tensors, scaled), strict=True):
        values = {f"{prefix}{name}": tensor for name, tensor in values.items()}
        load_adapter(policy, save(tmp_path / f"{len(values)}", values))
    first, second = map(velocity, policies)
    torch.testing.assert_close(first, second, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("key", "alpha", "message"),
    [
        (FIRST, torch.ones(2), r"alpha \[1\.0, 1\.0\] in the shape \[2\], but one finite"),
        (FIRST, torch.tensor(torch.nan), r"alpha \[nan\] in the shape \[\], but one finite"),
        ("nobody", torch.tensor(1.0), r"has nobody\.alpha without matrices"),
    ],
)
def test_alphas_that_are_none(adapters, tmp_path, key, alpha, message):
    model, _, bare, _ = adapters
    with pytest.raises(ConfigError, match=message):
        check_adapter(load(model), save(tmp_path / "x", {**bare, f"{key}.alpha": alpha}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora_alpha": "12"}, "says lora_alpha '12'"),
        ({"lora_alpha": True}, "says lora_alpha True"),
        ({"lora_alpha": float("nan")}, "says lora_alpha nan"),
        ({"alpha_pattern": [1]}, r"says alpha_pattern \[1\]"),
        ({"alpha_pattern": {"(": 1}}, "says alpha_pattern"),
        ({"use_rslora": "no"}, "says use_rslora 'no'"),
        ({"use_dora": True}, "has magnitudes for 0 of its 4 layers"),
        ({"init_lora_weights": "pissa_niter_4"}, "from whose weights the first ones were taken"),
        ({"init_lora_weights": "olora"}, "from whose weights the first ones were taken"),
    ],
)
def test_settings_that_are_none(adapters, tmp_path, changes, message):
    model, folder, _, _ = adapters
    copy = shutil.copytree(folder, tmp_path / "x")
    settings = json.loads((copy / "adapter_config.json").read_text())
    (copy / "adapter_config.json").write_text(json.dumps({**settings, **changes}))
    with pytest.raises(ConfigError, match=message):
        check_adapter(load(model), str(copy))


def test_an_alpha_of_0_is_one(adapters, tmp_path):
    model, folder, _, _ = adapters
    copy = shutil.copytree(folder, tmp_path / "x")
    settings = json.loads((copy / "adapter_config.json").read_text())
    (copy / "adapter_config.json").write_text(json.dumps({**settings, "lora_alpha": 0}))
    policy = load(model)
    base = velocity(policy)
    assert load_adapter(policy, str(copy)).endswith("rank 4, alpha 0")
    assert torch.equal(velocity(policy), base)


def test_dropout_of_an_adapter_is_off(adapters, tmp_path):
    """Images of an evaluation are the same each time, whatever the adapter was trained with."""
    from diffusers import StableDiffusion3Pipeline

    model, _, bare, expected = adapters
    config = LoraConfig(r=4, lora_alpha=12, target_modules=TARGETS, lora_dropout=0.5).to_dict()
    config["target_modules"] = TARGETS
    StableDiffusion3Pipeline.save_lora_weights(
        tmp_path,
        transformer_lora_layers={name: tensor.clone() for name, tensor in bare.items()},
        transformer_lora_adapter_metadata=config,
    )
    policy = load(model)
    load_adapter(policy, str(tmp_path))
    torch.testing.assert_close(velocity(policy), expected, rtol=1e-5, atol=1e-6)


def test_a_folder_with_several_files_names_none(adapters, tmp_path):
    model, _, bare, _ = adapters
    folder = save(tmp_path / "x", bare, "a.safetensors")
    shutil.copy(tmp_path / "x" / "a.safetensors", tmp_path / "x" / "b.safetensors")
    with pytest.raises(ConfigError, match=r"a\.safetensors, b\.safetensors, but one file"):
        check_adapter(load(model), folder)
    assert check_adapter(load(model), f"{folder}/b.safetensors").startswith("b.safetensors in bare")


def test_keys_of_another_kind_are_shown(adapters, tmp_path):
    model, _, bare, _ = adapters
    tensors = {f"diffusion_model.{name}": tensor for name, tensor in bare.items()}
    key = min(tensors)
    with pytest.raises(ConfigError, match=rf"no weights for .* \(its first key is {key}\)"):
        check_adapter(load(model), save(tmp_path / "x", tensors))
