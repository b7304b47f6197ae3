"""Packed weights: what they hold, the product, runs on them, and what is refused."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from diffusers import FluxPipeline, StableDiffusion3Pipeline
from peft import LoraConfig, inject_adapter_in_model
from rich.console import Console
from torch import nn

from flowgrpo import train
from flowgrpo.cli import targets
from flowgrpo.cli.evaluate import evaluate_run
from flowgrpo.cli.options import EvaluateOptions
from flowgrpo.config import Config, ConfigError, PolicyConfig, RunConfig, replace
from flowgrpo.policies import Policy, lora, quantized, text_cache
from flowgrpo.policies.adapters import add_adapter
from flowgrpo.policies.quantized import QUANTIZERS, QuantizedLinear
from flowgrpo.policies.weight_digests import digest_of
from flowgrpo.runs import content, directory
from flowgrpo.runs.export import load_trained
from support import processes, setups

CPU = torch.device("cpu")
# The 16 numbers of nf4, of QLoRA's appendix (arXiv 2305.14314), in four digits.
NF4 = (-1, -0.6962, -0.5251, -0.3949, -0.2844, -0.1848, -0.0911, 0)
NF4 += (0.0796, 0.1609, 0.2461, 0.3379, 0.4407, 0.5626, 0.7230, 1)


def weight_of(rows: int = 12, columns: int = 80, dtype=torch.float32) -> torch.Tensor:
    """Normal weights whose rows have spreads of their own, one of them 0."""
    generator = torch.Generator().manual_seed(rows)
    spread = torch.rand(rows, 1, generator=generator) * 0.1
    spread[rows // 2] = 0
    return (torch.randn(rows, columns, generator=generator) * spread).to(dtype)


def stored(name: str, weight: torch.Tensor) -> tuple[dict, torch.Tensor]:
    """What a weight is packed to, and what that is unpacked to."""
    packed = QUANTIZERS[name].pack(weight)
    return packed, QUANTIZERS[name].unpack(packed, weight.shape, weight.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_weight_is_the_nearest_that_can_be_stored(dtype):
    """By float64: no further off than half a step, and a half of the type that it is given in."""
    weight = weight_of(dtype=dtype)
    exact, own = weight.double(), torch.finfo(dtype).eps * weight.double().abs()
    largest = exact.abs().amax(1, keepdim=True)
    _, eight = stored("int8", weight)
    # Packed from float16, whose rounding comes first.
    half = largest / 254 + exact.abs() * 2**-11
    assert ((eight.double() - exact).abs() <= half + own + 1e-7).all()
    _, float8 = stored("fp8", weight)
    bound = exact.abs() / 16 + largest / 448 * 2**-10
    assert ((float8.double() - exact).abs() <= bound + own).all()
    packed, four = stored("nf4", weight)
    blocks, table = exact.view(-1, 64), torch.tensor(NF4, dtype=torch.float64)
    scales = blocks.abs().amax(1, keepdim=True)
    torch.testing.assert_close(packed["scales"].double(), scales.flatten(), rtol=1e-6, atol=0)
    nearest = (blocks[..., None] - scales[..., None] * table).abs().amin(-1)
    error = (four.double().view(-1, 64) - blocks).abs()
    assert (error <= nearest + 1e-4 * scales + own.view(-1, 64)).all()
    for whole in (eight, float8, four):
        assert whole.dtype == dtype and not whole[6].any() and whole.isfinite().all()
    sizes = [
        sum(t.numel() * t.element_size() for t in stored(q, weight)[0].values()) for q in QUANTIZERS
    ]
    assert sizes == [80 * 12 // 2 + 4 * 15, 80 * 12 + 48, 80 * 12 + 48]


@pytest.mark.parametrize("name", QUANTIZERS)
def test_the_product_is_that_of_the_unpacked_weight(name):
    """With gradients and without, on one row and on several, to the bit; nothing is kept of it."""
    linear = nn.Linear(80, 12)
    linear.weight.data = weight_of()
    model = nn.ModuleDict({"layer": linear, "other": nn.Linear(80, 12)})
    quantized.quantize_layers(model, [linear], name, CPU, "policy.quantize")
    layer = model["layer"]
    assert isinstance(layer, QuantizedLinear) and type(model["other"]) is nn.Linear
    assert layer.digest == digest_of(linear.weight.detach())
    _, whole = stored(name, linear.weight.data)
    assert torch.equal(layer.weight, whole)
    assert [*layer.state_dict()] == ["bias"] and not layer.bias.requires_grad
    assert {p.numel() for p in layer.parameters()} == {12}
    kept = []
    for rows in (1, 7):
        x = torch.randn(2, rows, 80, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(kept.append, lambda tensor: tensor):
            y = layer(x)
        with torch.no_grad():
            assert torch.equal(layer(x), y)
        assert torch.equal(y, F.linear(x, whole, linear.bias))
        cotangent = torch.randn(2, rows, 12)
        (found,) = torch.autograd.grad(y, x, cotangent)
        assert torch.equal(found, cotangent @ whole)
    assert kept == []


@pytest.mark.parametrize("name", ["nf4", "int8"])
def test_adapters_on_packed_weights(name):
    """The joined product against float64, and no merged copy that would be as large as before."""
    net = nn.Sequential(nn.Linear(80, 24), nn.Linear(24, 5)).requires_grad_(False)
    quantized.quantize_layers(net, [*net], name, CPU, "policy.quantize")
    net = inject_adapter_in_model(LoraConfig(r=3, lora_alpha=6, target_modules=["0"]), net)
    lora.install(net)
    (layer,) = lora.lora_layers(net)
    assert lora.product_of(layer).again
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    b.data.normal_(0, 0.2)
    x, cotangent = torch.randn(4, 80, requires_grad=True), torch.randn(4, 24)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = layer(x)
    assert all(tensor.numel() < 24 * 80 for tensor in saved)
    found = [y, *torch.autograd.grad(y, (x, a, b), cotangent)]
    leaves = [t.detach().double().requires_grad_() for t in (x, a, b)]
    weight, bias = layer.base_layer.weight.double(), layer.base_layer.bias.double()
    exact = F.linear(leaves[0], weight + 2 * leaves[2] @ leaves[1], bias)
    expected = [exact, *torch.autograd.grad(exact, leaves, cotangent.double())]
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-5)
    with torch.no_grad(), lora.merged_matrices([layer], fixed=True):
        assert lora.product_of(layer).matrices is None and torch.equal(layer(x), y)
    with lora.disable_adapters([layer]):
        assert torch.equal(layer(x), layer.base_layer(x))


RUNS = {
    "sd3": ("latent_model", StableDiffusion3Pipeline, "int8", {"sample.guidance_scale": 3.0}),
    "flux": ("flux_model", FluxPipeline, "nf4", {"policy.gradient_checkpointing": True}),
}
COMMON = {
    "policy.lora_targets": None,
    "policy.resolution": 16,
    "policy.max_sequence_length": 8,
    "sample.group_size": 3,
    "sample.steps": 4,
    "sample.eval_steps": 3,
    "optim.lr": 1e-2,
    "optim.ema_every": 1,
    "optim.beta": 0.04,
    "run.steps": 2,
    "run.eval_every": 0,
    "run.checkpoint_every": 1,
    "run.eval_prompts": 2,
    "run.eval_samples": 2,
}


@pytest.fixture(scope="module", params=RUNS)
def trained(request, tmp_path_factory) -> tuple[Config, Path, type]:
    """A run of two iterations on packed weights, the base's folder, and the pipeline's class."""
    model, pipeline, name, changes = RUNS[request.param]
    model, folder = request.getfixturevalue(model), tmp_path_factory.mktemp(request.param)
    changes = {**COMMON, **changes, "policy.quantize": name, "policy.quantize_text": name}
    config = setups.config(model, folder, **changes)
    train.run(config)
    return config, model, pipeline


def lines_of(config: Config) -> list[dict]:
    """The run's metrics, without times."""
    return processes.untimed(Path(config.run.out) / "metrics.jsonl")


@pytest.mark.slow
def test_two_iterations_with_ratio_one(trained):
    config, *_ = trained
    lines = [line for line in lines_of(config) if line["kind"] == "train"]
    assert len(lines) == 2 and all(line["max_ratio_error"] == 0.0 for line in lines)
    assert all(line["kl"] > 0 and min(line["grad_norm"]) > 0 for line in lines)
    name = config.policy.quantize
    entry = json.loads((Path(config.run.out) / content.FILE).read_text())["model"]["quantizers"]
    assert entry == dict.fromkeys(("transformer", "text encoders"), quantized.describe(name))


@pytest.mark.slow
def test_resumed_equals_uninterrupted(trained, tmp_path):
    config, *_ = trained
    first = replace(config, **{"run.out": str(tmp_path / "run"), "run.steps": 1})
    train.run(first)
    train.run(replace(directory.resume_config(tmp_path / "run"), **{"run.steps": 2}))
    assert lines_of(first) == lines_of(config)


@pytest.mark.slow
def test_another_version_of_the_library_is_not_the_run(trained):
    """What the run's weights were packed by counts as the weights do."""
    config, *_ = trained
    before = content.read(Path(config.run.out))
    later = {**before["model"], "quantizers": {"transformer": "int8 (bitsandbytes 9.9)"}}
    (words,) = content.model_differences(before["model"], later)
    assert words.startswith("quantizer of the transformer (") and words.endswith(" 9.9) now)")


@pytest.mark.slow
def test_the_adapter_on_the_plain_pipeline(trained, tmp_path):
    """Loaded by diffusers, and evaluated by us: matrices are the run's, whatever they stood on."""
    config, model, pipeline = trained
    packed = targets.load_base(config)
    assert packed.quantizer and packed.describe().endswith(f", weights {packed.quantizer}")
    layers = [m for m in packed.transformer.modules() if isinstance(m, QuantizedLinear)]
    # The layers that modulate by the time keep eight bits.
    assert {layer.quantizer for layer in layers} == {config.policy.quantize, "int8"}
    plain = targets.load_base(replace(config, **{"policy.quantize": "none"}))
    assert content.weights_of(packed) == content.weights_of(plain)
    add_adapter(packed.transformer, config.policy)
    checkpoint = Path(config.run.out) / "checkpoints" / "step-000002"
    load_trained(packed.transformer, config.optim, checkpoint)
    pipe = pipeline.from_pretrained(model)
    pipe.load_lora_weights(Path(config.run.out) / "adapter")
    theirs = {n: t for n, t in pipe.transformer.named_parameters() if ".lora_" in n}
    ours = {n: t for n, t in packed.transformer.named_parameters() if ".lora_" in n}
    assert len(ours) == len(theirs) > 0
    for mine, loaded in zip(ours.values(), theirs.values(), strict=True):
        torch.testing.assert_close(mine, loaded, rtol=0, atol=0)
    report = evaluate_run(
        EvaluateOptions(config.run.out, out=str(tmp_path / "o"), device="cpu", quantize="none"),
        Console(quiet=True),
    )["reports"]
    after = json.loads((Path(config.run.out) / "summary.json").read_text())["after"]
    # Another base, so another figure, and not by much.
    assert report["iteration 2"]["accuracy"] != after["accuracy"]
    assert report["iteration 2"]["accuracy"] == pytest.approx(after["accuracy"], abs=0.02)


@pytest.mark.slow
def test_texts_of_packed_encoders_are_cached_apart(trained, tmp_path):
    config, *_ = trained
    folders = []
    for name in ("none", config.policy.quantize_text):
        changes = {"policy.quantize_text": name, "policy.text_cache": str(tmp_path)}
        policy = targets.load_base(replace(config, **changes))
        embeds = policy.encode(["a red circle"]).embeds
        folders.append((embeds, len([*tmp_path.rglob("*.safetensors")])))
    (plain, one), (packed, two) = folders
    assert (one, two) == (1, 2) and not torch.equal(plain, packed)
    assert (packed - plain).norm() < 0.2 * plain.norm()
    assert isinstance(policy._texts, text_cache.TextEncoder)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "name"), [("qwen_model", "nf4"), ("flux2_model", "int8"), ("zimage_model", "fp8")]
)
def test_an_update_of_other_families(request, tmp_path, model, name):
    """The first ratios are 1, and every linear layer of their blocks is packed."""
    changes = {**COMMON, "policy.quantize": name, "sample.guidance_scale": 3.0}
    config = setups.config(request.getfixturevalue(model), tmp_path, **changes)
    parts = setups.parts(config)
    measured = setups.update(parts, setups.experience(parts, config), config)
    assert measured["max_ratio_error"] == 0.0 and min(measured["grad_norm"]) > 0
    blocks = parts.policy.family.blocks_of(parts.policy.transformer)
    linears = [m for block in blocks for m in block.modules() if isinstance(m, nn.Linear)]
    adapters = [m for block in blocks for n, m in block.named_modules() if ".lora_" in n]
    plain = {m for m in linears if not isinstance(m, QuantizedLinear)}
    assert plain <= set(adapters) and len(plain) < len(linears)


def config_error(**fields) -> str:
    """The sentence that these fields of policy and run are refused by."""
    run = RunConfig(**{name: fields.pop(name) for name in [*fields] if name == "parallel"})
    with pytest.raises(ConfigError) as caught:
        Config(policy=PolicyConfig(**fields), run=run)
    return str(caught.value)


def test_what_does_not_go_together_is_refused():
    assert "policy.adapter full" in config_error(quantize="nf4", adapter="full")
    assert "policy.compile" in config_error(quantize="int8", compile=True)
    assert "run.parallel fsdp" in config_error(quantize="fp8", parallel="fsdp")
    assert "policy.quantize" in config_error(quantize="int4")


def packing_error(name: str, weight: torch.Tensor) -> str:
    """The sentence that a layer of this weight is refused by."""
    model = nn.Sequential(nn.Linear(*weight.shape[::-1], bias=False))
    model[0].weight.data = weight
    with pytest.raises(ConfigError) as caught:
        quantized.quantize_layers(model, [model[0]], name, CPU, "policy.quantize")
    assert type(model[0]) is nn.Linear and "\n" not in str(caught.value)
    return str(caught.value)


def test_what_cannot_be_packed_is_one_sentence(monkeypatch, pixel_model):
    large, broken = torch.full((4, 64), 1e6), torch.full((4, 64), torch.nan)
    assert "the weights of 0 reach 1e+06, and at most 65504" in packing_error("int8", large)
    assert "the weights of 0 reach nan" in packing_error("nf4", broken)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "bitsandbytes", None)
        words = packing_error("nf4", weight_of())
        assert "needs the package bitsandbytes" in words and "'flowgrpo[quantize]'" in words
    with monkeypatch.context() as patch:

        def no_kernel(*arguments, **options):
            raise NotImplementedError("no kernel here\nand more")

        patch.setattr("bitsandbytes.functional.quantize_4bit", no_kernel)
        words = packing_error("nf4", weight_of())
        assert "cannot store weights of torch.float32 on cpu (NotImplementedError: no ke" in words
    policy = Policy.load(pixel_model, device="cpu", config=PolicyConfig(quantize="fp8"))
    assert policy.quantizer == f"fp8 (torch {torch.__version__})"
    with pytest.raises(ConfigError, match=r"transformer has weights that an earlier policy packed"):
        Policy.load(policy.pipeline, device="cpu")
