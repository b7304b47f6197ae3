"""The short LoRA forward against PEFT's own."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn

from flowgrpo.config import PolicyConfig
from flowgrpo.policies import lora
from flowgrpo.policies.adapters import add_adapter, trained_parameters
from support import pipelines


def model(dtype: torch.dtype, **options) -> nn.Module:
    """Two linear layers, of which the first gets LoRA of rank 3 with float32 matrices."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(20, 24), nn.Linear(24, 5)).to(dtype).requires_grad_(False)
    config = LoraConfig(r=3, lora_alpha=7, target_modules=["0"], **options)
    net = inject_adapter_in_model(config, net)
    for name, parameter in net.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape) * 0.3
    return net


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("shape", [(6, 20), (2, 3, 20), (0, 20)])
def test_value_and_gradients(dtype, bound, shape):
    """As close to PEFT's forward in float64 as the dtype allows, and PEFT's own is no closer."""
    peft = model(dtype)
    short = copy.deepcopy(peft)
    lora.install(short)
    exact = copy.deepcopy(peft).double()
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    cotangent = torch.randn(*shape[:-1], 5, generator=torch.Generator().manual_seed(2))
    results = {}
    for name, net in (("peft", peft), ("short", short), ("exact", exact)):
        own = x.detach().clone().to(torch.float64 if name == "exact" else dtype).requires_grad_()
        y = net(own)
        assert y.dtype == own.dtype
        (y * cotangent.to(y.dtype)).sum().backward()
        grads = [p.grad for p in net.parameters() if p.requires_grad]
        results[name] = [t.detach().double() for t in (y, own.grad, *grads)]
    for exactly, ours, theirs in zip(
        results["exact"], results["short"], results["peft"], strict=True
    ):
        scale = exactly.norm().clamp(min=1e-9)
        error = (ours - exactly).norm() / scale
        assert error < bound and error < 4 * (theirs - exactly).norm() / scale + 1e-6


def test_switched_off_is_the_base():
    net = model(torch.float32)
    lora.install(net)
    (layer,) = lora.lora_layers(net)
    x = torch.randn(4, 20)
    on = net(x)
    base = net[1](layer.base_layer(x))
    with lora.disable_adapters([layer]):
        assert torch.equal(net(x), base)
    assert torch.equal(net(x), on) and all(p.requires_grad for p in layer.lora_A.parameters())
    # PEFT's own switch works too.
    layer.enable_adapters(False)
    assert torch.equal(net(x), base)
    layer.enable_adapters(True)
    assert torch.equal(net(x), on)
    layer.merge()
    torch.testing.assert_close(net(x), on)


@pytest.mark.parametrize(
    "options", [{"lora_dropout": 0.1}, {"use_dora": True}, {"lora_bias": True}]
)
def test_other_kinds_keep_pefts_forward(options):
    net = model(torch.float32, **options)
    lora.install(net)
    (layer,) = lora.lora_layers(net)
    assert "forward" not in vars(layer)


def test_bits_do_not_depend_on_gradients():
    net = model(torch.bfloat16)
    lora.install(net)
    x = torch.randn(50, 20).bfloat16()
    with torch.no_grad():
        expected = net(x)
    assert torch.equal(net(x), expected) and torch.equal(net(x.requires_grad_()), expected)


def test_a_frozen_input_gets_no_gradient_and_the_base_weight_never():
    net = model(torch.float32)
    lora.install(net)
    x = torch.randn(4, 20)
    net(x).sum().backward()
    (layer,) = lora.lora_layers(net)
    assert x.grad is None and layer.base_layer.weight.grad is None
    grads = [p.grad.clone() for p in net.parameters() if p.requires_grad]
    net.zero_grad()
    net(x.requires_grad_()).sum().backward()
    again = [p.grad for p in net.parameters() if p.requires_grad]
    for one, other in zip(grads, again, strict=True):
        torch.testing.assert_close(one, other)


def test_names_stay():
    net = model(torch.float32)
    before = list(net.state_dict())
    lora.install(net)
    assert list(net.state_dict()) == before


def test_held_matrices_give_the_same_bits_and_are_let_go():
    """Values and gradients as without; after the block a changed parameter counts again."""
    net = model(torch.bfloat16)
    lora.install(net)
    (layer,) = lora.lora_layers(net)
    x = torch.randn(6, 20, dtype=torch.bfloat16)

    def results() -> list[torch.Tensor]:
        net.zero_grad()
        y = net(x)
        y.float().square().sum().backward()
        return [y.detach(), *(p.grad.clone() for p in net.parameters() if p.requires_grad)]

    plain = results()
    with lora.merged_matrices([layer]):
        assert all(map(torch.equal, plain, results()))
        with torch.no_grad():
            layer.lora_B["default"].weight.add_(1.0)
        assert torch.equal(net(x), plain[0]), "inside, the matrices are those of the start"
    assert not torch.equal(net(x), plain[0])


def test_held_lets_go_after_an_error():
    net = model(torch.float32)
    lora.install(net)
    (layer,) = lora.lora_layers(net)
    with pytest.raises(RuntimeError, match="inside"), lora.merged_matrices([layer]):
        raise RuntimeError("inside")
    assert layer._flowgrpo.matrices is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merged_again_for_the_backward(dtype):
    """The bits of the gradients stay, and no copy of the weights is kept."""
    kept = model(dtype)
    lora.install(kept)
    again = copy.deepcopy(kept)
    lora.merge_again(lora.lora_layers(again))
    x, saved = torch.randn(6, 20).to(dtype), {}
    for name, net in (("kept", kept), ("again", again)):
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, sizes=sizes: sizes.append(t.numel()) or t, lambda t: t
        ):
            own = x.clone().requires_grad_()
            net(own).sum().backward()
        grads = [own.grad, *(p.grad for p in net.parameters() if p.requires_grad)]
        saved[name] = sum(sizes), grads
    assert all(map(torch.equal, saved["kept"][1], saved["again"][1]))
    # A [3, 20] and [W, s B] [24, 20 + 3].
    assert saved["kept"][0] - saved["again"][0] == 3 * 20 + 24 * 23


def test_matrices_are_drawn_once_and_by_their_seed_alone():
    """The global generator is left alone, and so are linear layers that are made later; files of
    the adapter say that it began as PEFT's do."""
    network = pipelines.transformer(
        size=8, channels=3, text=16, pooled=16, layers=1, heads=2, head_dim=8, patch=2
    )
    again, policy = copy.deepcopy(network), PolicyConfig(lora_targets=("to_q",))
    state = torch.get_rng_state()
    add_adapter(network, policy, seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    add_adapter(again, policy, seed=3)
    one, other = (trained_parameters(net) for net in (network, again))
    assert one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)
    assert all(p.any() == ("lora_A" in n) for n, p in one.items())
    assert network.peft_config["default"].init_lora_weights is True
    assert nn.Linear(4, 4).weight.any()
