"""Several LoRA layers of one input in one product, against the layers one by one."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn

from flowgrpo.policies import lora
from support import setups

NAMES = ("to_q", "to_k", "to_v")


class Heads(nn.Module):
    """Query, key and value of one input, of different widths, in one `joint_projection`."""

    def __init__(self, bias: tuple[bool, bool, bool] = (True, True, True)) -> None:
        super().__init__()
        for name, width, has in zip(NAMES, (8, 8, 5), bias, strict=True):
            self.add_module(name, nn.Linear(12, width, bias=has))

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        return lora.joint_projection([getattr(self, name) for name in NAMES], x)


def model(dtype=torch.float32, joint=True, targets=NAMES, short=True, **options) -> nn.Module:
    torch.manual_seed(0)
    net = Heads(**options).to(dtype).requires_grad_(False)
    if joint:
        lora.share_input(net, NAMES)
    pattern = {name: rank for name, rank in zip(NAMES, (3, 2, 4), strict=True) if name in targets}
    config = LoraConfig(r=3, lora_alpha=7, target_modules=list(targets), rank_pattern=pattern)
    net = inject_adapter_in_model(config, net)
    for name, parameter in net.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape) * 0.3
    if short:
        lora.install(net)
    return net


def products(monkeypatch) -> list[int]:
    """How many layers each product is of, as they come."""
    counts, product = [], lora._multiply
    monkeypatch.setattr(lora, "_multiply", lambda g, *a: counts.append(len(g)) or product(g, *a))
    return counts


def results(net: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    """Outputs, the gradient of x and those of all A and B, in float64."""
    x = x.detach().clone().requires_grad_()
    net.zero_grad()
    outputs = net(x)
    torch.manual_seed(5)
    sum((y * torch.randn(y.shape).to(y.dtype)).sum() for y in outputs).backward()
    grads = [p.grad for p in net.parameters() if p.requires_grad]
    assert len(grads) == 6
    return [t.detach().double() for t in (*outputs, x.grad, *grads)]


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("shape", [(6, 12), (2, 3, 12), (0, 12)])
def test_one_product_is_as_exact_as_three(monkeypatch, dtype, bound, shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    # PEFT's own forward in float64, on the same values.
    exact = results(model(dtype, short=False).double(), x.double())
    counts = products(monkeypatch)
    ours = results(model(dtype), x)
    assert counts == [3]
    apart = results(model(dtype, joint=False), x)
    assert counts == [3, 1, 1, 1]
    for truth, joint, single in zip(exact, ours, apart, strict=True):
        assert joint.shape == truth.shape
        scale = truth.norm().clamp(min=1e-9)
        error = (joint - truth).norm() / scale
        assert error < bound and error < 2 * (single - truth).norm() / scale + 1e-6


def test_bits_do_not_depend_on_gradients_or_held_matrices():
    net = model(torch.bfloat16)
    x = torch.randn(50, 12).bfloat16()
    expected = net(x)
    with torch.no_grad():
        assert all(map(torch.equal, net(x), expected))
    for fixed in (False, True):
        with lora.merged_matrices(lora.lora_layers(net), fixed):
            assert all(map(torch.equal, net(x), expected))


def test_held_matrices_are_made_once_and_can_stay_in_place():
    net = model(torch.bfloat16)
    leader, *others = (getattr(net, name) for name in NAMES)
    x = torch.randn(4, 12).bfloat16()
    addresses = set()
    for _ in range(2):
        with lora.merged_matrices(lora.lora_layers(net), fixed=True):
            assert all(layer._flowgrpo.matrices is None for layer in others)
            addresses.add(tuple(t.data_ptr() for t in leader._flowgrpo.matrices))
            before = net(x)
            with torch.no_grad():
                for layer in (leader, *others):
                    layer.lora_B["default"].weight.add_(1.0)
            assert all(map(torch.equal, net(x), before)), "inside, those of the start"
        after = net(x)
        assert not any(map(torch.equal, after, before))
    assert len(addresses) == 1
    with lora.merged_matrices(lora.lora_layers(net), fixed=True):
        assert all(map(torch.equal, net(x), after))


def test_a_layer_by_itself_is_itself():
    net, apart = model(), model(joint=False)
    x = torch.randn(4, 12)
    for within in (False, True):
        with lora.merged_matrices(lora.lora_layers(net) if within else []):
            for name in NAMES:
                assert torch.equal(getattr(net, name)(x), getattr(apart, name)(x))


def test_switched_off_it_is_the_base():
    net = model()
    x = torch.randn(4, 12)
    with lora.disable_adapters(lora.lora_layers(net)):
        for y, name in zip(net(x), NAMES, strict=True):
            assert torch.equal(y, getattr(net, name).base_layer(x))
    on = net(x)
    net.to_k.merge()
    for y, expected in zip(net(x), on, strict=True):
        torch.testing.assert_close(y, expected)


@pytest.mark.parametrize(
    "options",
    [{"targets": ("to_q", "to_v")}, {"bias": (True, False, True)}, {"joint": False}],
)
def test_what_cannot_be_joined_is_not(monkeypatch, options):
    """A layer without adapter, biases of which one is missing, a module that has not said so."""
    net = model(**options)
    counts = products(monkeypatch)
    x = torch.randn(4, 12)
    for y, name in zip(net(x), NAMES, strict=True):
        assert torch.equal(y, getattr(net, name)(x))
    assert set(counts) == {1}


def test_without_bias():
    net = model(bias=(False, False, False))
    x = torch.randn(4, 12)
    for y, name in zip(net(x), NAMES, strict=True):
        torch.testing.assert_close(y, getattr(net, name)(x))


def test_saved_names_stay():
    joint, apart = model(), model(joint=False)
    assert list(joint.state_dict()) == list(apart.state_dict())
    again = copy.deepcopy(apart)
    again.load_state_dict(joint.state_dict())
    x = torch.randn(4, 12)
    for y, expected in zip(again(x), joint(x), strict=True):
        torch.testing.assert_close(y, expected)


@pytest.mark.parametrize(
    ("kind", "fused", "joined"),
    # Image and text; the second attention of a dual block has no adapters by default.
    [("sd3.5-medium", False, 2), ("sd3.5-medium", True, 2), ("flux", True, 2), ("flux", False, 0)],
)
def test_the_models_join_query_key_and_value(kinds, tmp_path, monkeypatch, kind, fused, joined):
    folder, own = kinds[kind]
    changes = {"policy.fused": fused, "policy.lora_targets": None}
    config = setups.config(folder, tmp_path, **own, **changes)
    policy = setups.parts(config).policy
    blocks = policy.transformer.transformer_blocks
    singles = getattr(policy.transformer, "single_transformer_blocks", ())
    attentions = joined * len(blocks) + (len(singles) if joined else 0)
    counts = products(monkeypatch)
    sample = torch.randn(2, *policy.latent_shape)
    policy.velocity(sample, torch.tensor([1.0, 0.5]), policy.encode(setups.TEXTS[:2]))
    assert counts.count(3) == attentions and set(counts) <= {1, 3}
    assert sum(counts) == len(list(policy.parameters())) // 2
