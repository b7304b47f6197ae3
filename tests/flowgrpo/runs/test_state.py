"""Adapters, optimizer and average: exact, in place, and readable by diffusers."""

from __future__ import annotations

import json
import math

import pytest
import torch
from safetensors import safe_open

from flowgrpo.config import ConfigError, OptimConfig, PolicyConfig
from flowgrpo.policies.adapters import add_adapter, trained_parameters
from flowgrpo.runs.export import export
from flowgrpo.runs.state import EMA, State, learning_rate, shown_weights, start_share
from support import pipelines

CONFIG = PolicyConfig(lora_rank=4, lora_alpha=8, lora_targets=("attn.to_q", "ff.net.2"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return pipelines.save_pixel_pipeline(tmp_path_factory.mktemp("model") / "m")


def transformer(folder, dtype=torch.bfloat16):
    from diffusers import SD3Transformer2DModel

    return SD3Transformer2DModel.from_pretrained(folder / "transformer", torch_dtype=dtype)


def pipeline(folder, dtype=torch.float32):
    from diffusers import StableDiffusion3Pipeline

    absent = ("vae", "text_encoder_2", "text_encoder_3", "tokenizer_2", "tokenizer_3")
    absent += ("image_encoder", "feature_extractor")
    return StableDiffusion3Pipeline.from_pretrained(
        folder, torch_dtype=dtype, **dict.fromkeys(absent)
    )


def forward(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    dtype = next(p.dtype for n, p in model.named_parameters() if "lora" not in n)
    shapes = ((3, 3, 8, 8), (3, 8, 16), (3, 16))
    sample, text, pooled = (torch.randn(s, generator=generator).to(dtype) for s in shapes)
    return model(
        hidden_states=sample,
        encoder_hidden_states=text,
        pooled_projections=pooled,
        timestep=torch.tensor([900.0, 500.0, 20.0]),
        return_dict=False,
    )[0]


def train(state, model, steps):
    for seed in range(steps):
        forward(model, seed).float().square().sum().backward()
        state.step()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_adapter_is_float32_on_the_named_layers_and_starts_as_the_base(folder, dtype):
    model = transformer(folder, dtype)
    before = forward(model)
    parameters = add_adapter(model, CONFIG, seed=1)
    names = trained_parameters(model)
    assert [id(p) for p in parameters] == [id(p) for p in names.values()]
    assert all(p.dtype == torch.float32 for p in parameters)
    assert all(".attn.to_q.lora_" in n or ".ff.net.2.lora_" in n for n in names)
    assert len(parameters) == 2 * 2 * 2  # layers x targets x (A, B)
    assert torch.equal(forward(model), before)


@pytest.mark.parametrize("init", ["gaussian", "kaiming"])
def test_adapter_is_drawn_from_its_seed_alone(folder, init):
    config = PolicyConfig(lora_rank=8, lora_init=init)
    drawn = []
    for seed in (5, 5, 6):
        torch.manual_seed(len(drawn))
        model = transformer(folder)
        add_adapter(model, config, seed)
        drawn.append(
            torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad])
        )
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    a = torch.cat([p.flatten() for n, p in trained_parameters(model).items() if "_A." in n])
    # The layers have 16 inputs: U(-1/4, 1/4) has std 1/4 / sqrt(3).
    expected = 1 / 8 if init == "gaussian" else 0.25 / math.sqrt(3)
    assert a.std().item() == pytest.approx(expected, rel=0.05)


def test_a_target_that_no_layer_has_is_refused(folder):
    with pytest.raises(ConfigError, match=r"names 'attn.to_x', .* attn.to_k"):
        add_adapter(transformer(folder), PolicyConfig(lora_targets=("attn.to_x",)))


def test_full_training_needs_float32(folder):
    config = PolicyConfig(adapter="full")
    with pytest.raises(ConfigError, match=r"torch.bfloat16.*set policy.dtype to float32"):
        add_adapter(transformer(folder), config)
    model = transformer(folder, torch.float32)
    assert len(add_adapter(model, config)) == len(list(model.parameters()))


@pytest.mark.parametrize("decay", [0.0, 0.9])
def test_exported_adapter_is_what_diffusers_loads(folder, tmp_path, decay):
    model = transformer(folder, torch.float32)
    add_adapter(model, CONFIG)
    state = State.create(model, OptimConfig(lr=1e-2, ema_decay=decay, ema_every=1))
    train(state, model, 3)
    kept = {n: p.detach().clone() for n, p in state.parameters.items()}
    export(model, state.ema, CONFIG, tmp_path / "adapter")
    assert all(torch.equal(kept[n], p) for n, p in state.parameters.items())
    with state.ema.swapped():
        expected = forward(model)
    pipe = pipeline(folder)
    assert not torch.equal(forward(pipe.transformer), expected)
    pipe.load_lora_weights(tmp_path / "adapter")
    # Rounded in another order than policies/lora.py, which forms x W^T + x A^T B^T in one product.
    torch.testing.assert_close(forward(pipe.transformer), expected, rtol=1e-5, atol=1e-5)
    lora = pipe.transformer.peft_config["default_0"]
    assert (lora.r, lora.lora_alpha) == (4, 8)


@pytest.mark.slow
def test_equal_adapters_are_equal_files(folder, tmp_path):
    """The order of a set, and of safetensors' metadata, is another each time."""
    contents = set()
    for number in range(8):
        model = transformer(folder, torch.float32)
        targets = CONFIG.lora_targets[:: 1 if number % 2 else -1]
        config = PolicyConfig(lora_rank=4, lora_alpha=8, lora_targets=targets)
        add_adapter(model, config, seed=1)
        state = State.create(model, OptimConfig())
        export(model, state.ema, config, tmp_path / str(number))
        path = tmp_path / str(number) / "pytorch_lora_weights.safetensors"
        contents.add(path.read_bytes())
    assert len(contents) == 1
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
        assert list(file.keys()) == sorted(file.keys()) and file.get_tensor(min(file.keys())).any()
    assert metadata["format"] == "pt"
    names = json.loads(metadata["lora_adapter_metadata"])["transformer.target_modules"]
    assert names == ["attn.to_q", "ff.net.2"]


def test_exported_full_model_is_what_diffusers_loads(folder, tmp_path):
    from diffusers import SD3Transformer2DModel

    config = PolicyConfig(adapter="full")
    model = transformer(folder, torch.float32)
    add_adapter(model, config)
    state = State.create(model, OptimConfig(lr=1e-3, ema_every=1))
    train(state, model, 2)
    export(model, state.ema, config, tmp_path / "model")
    with state.ema.swapped():
        expected = forward(model)
    again = SD3Transformer2DModel.from_pretrained(tmp_path / "model")
    assert torch.equal(forward(again), expected)


def test_warm_up_is_linear_and_ends_at_lr():
    config = OptimConfig(lr=0.4, warmup=4)
    rates = [learning_rate(config, n) for n in range(6)]
    assert rates == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.4, 0.4])
    assert learning_rate(OptimConfig(lr=0.4), 0) == 0.4


def test_learning_rate_falls_to_a_tenth_and_stays():
    config = OptimConfig(lr=1.0, warmup=2, decay=10)
    rates = [learning_rate(config, n) for n in (0, 1, 5, 10, 1000)]
    assert rates == pytest.approx([0.5, 0.91, 0.55, 0.1, 0.1])


def test_step_is_clipped_adamw_in_float64():
    """Against AdamW written out in float64 (Loshchilov and Hutter 2019, algorithm 2)."""
    torch.manual_seed(0)
    model = torch.nn.Linear(5, 3, bias=False)
    config = OptimConfig(lr=0.1, betas=(0.8, 0.95), weight_decay=0.3, warmup=2, max_grad_norm=0.5)
    state = State.create(model, config)
    p = model.weight.detach().double().clone()
    m, v = torch.zeros_like(p), torch.zeros_like(p)
    for n in range(5):
        gradient = torch.randn(3, 5) * 10**-n
        model.weight.grad = gradient.clone()
        norm = state.step()
        g = gradient.double()
        assert norm.item() == pytest.approx(g.norm().item(), rel=1e-6)
        g = g * min(1.0, 0.5 / (g.norm() + 1e-6))
        lr = 0.1 * min(1.0, (n + 1) / 2)
        m, v = 0.8 * m + 0.2 * g, 0.95 * v + 0.05 * g * g
        p = p * (1 - lr * 0.3)
        p = p - lr * (m / (1 - 0.8 ** (n + 1))) / ((v / (1 - 0.95 ** (n + 1))).sqrt() + 1e-8)
        assert model.weight.grad is None
    torch.testing.assert_close(model.weight.detach().double(), p, rtol=1e-5, atol=1e-6)


def test_average_follows_its_formula_and_swaps_the_bits_back():
    model = torch.nn.Linear(4, 4)
    named = trained_parameters(model)
    ema = EMA(named, decay=0.6, interval=2)
    shadow = model.weight.detach().double().clone()
    for n in range(1, 9):
        with torch.no_grad():
            model.weight.add_(torch.randn(4, 4))
        ema.update()
        if n % 2 == 0:
            decay = min(0.6, (1 + n) / (10 + n))
            shadow = decay * shadow + (1 - decay) * model.weight.detach().double()
    torch.testing.assert_close(ema.tensors()["weight"].double(), shadow, rtol=1e-6, atol=1e-6)
    kept, address = model.weight.detach().clone(), model.weight.data_ptr()
    with pytest.raises(RuntimeError, match="inside"), ema.swapped():
        assert torch.equal(model.weight, ema.tensors()["weight"])
        raise RuntimeError("inside")
    assert torch.equal(model.weight, kept) and model.weight.data_ptr() == address


def test_without_decay_the_average_is_the_parameters():
    model = torch.nn.Linear(2, 2)
    ema = EMA(trained_parameters(model), decay=0.0)
    with torch.no_grad():
        model.weight.add_(1)
    ema.update()
    assert torch.equal(ema.tensors()["weight"], model.weight)


@pytest.mark.parametrize(
    ("decay", "interval", "updates", "share", "weights"),
    [
        (0.9, 8, 0, 1.0, "live"),
        (0.9, 8, 7, 1.0, "live"),
        (0.9, 8, 8, 9 / 18, "average"),
        (0.9, 8, 16, 9 / 18 * 17 / 26, "average"),
        (0.98, 1, 1, 2 / 11, "average"),
        # It moves late, and by a tenth each time: half is reached with the seventh step.
        (0.9, 100, 600, 0.9**6, "live"),
        (0.9, 100, 700, 0.9**7, "average"),
        (0.0, 1, 5, 0.0, "live"),
    ],
)
def test_the_average_counts_once_half_of_it_is_trained(decay, interval, updates, share, weights):
    model = torch.nn.Linear(3, 3, bias=False)
    with torch.no_grad():
        model.weight.fill_(1.0)
        ema = EMA(trained_parameters(model), decay, interval)
        model.weight.zero_()
        for _ in range(updates):
            ema.update()
    assert start_share(decay, interval, updates) == pytest.approx(share)
    if decay:
        # Of the start 1 and weights that are 0 ever since, the average is the start's share.
        assert ema.shadow["weight"][0, 0].item() == pytest.approx(share)
    assert ema.weights == shown_weights(decay, interval, updates) == weights
    expected = share if weights == "average" else 0.0
    assert ema.tensors()["weight"][0, 0].item() == pytest.approx(expected)
    with ema.swapped():
        assert model.weight[0, 0].item() == pytest.approx(expected)
    assert torch.equal(model.weight, torch.zeros(3, 3))
