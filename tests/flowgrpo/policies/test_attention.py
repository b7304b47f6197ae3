"""Attention kernels by name: the numbers of diffusers' own processors, and clear refusals."""

from __future__ import annotations

import copy
import logging
from functools import partial

import pytest
import torch
from diffusers import FluxTransformer2DModel, SD3Transformer2DModel
from torch.utils._python_dispatch import TorchDispatchMode

from flowgrpo.config import ConfigError
from flowgrpo.policies import attention
from flowgrpo.policies.families import family_of

CPU = torch.device("cpu")


def pin(transformer: torch.nn.Module, *arguments) -> str:
    return attention.pin(transformer, family_of(transformer), *arguments)


@pytest.fixture(scope="module")
def sd3() -> SD3Transformer2DModel:
    """Three blocks: dual attention and joint attention, and one whose text output is not used."""
    torch.manual_seed(0)
    return SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=3,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=24,
        caption_projection_dim=32,
        pooled_projection_dim=20,
        pos_embed_max_size=8,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    )


@pytest.fixture(scope="module")
def flux() -> FluxTransformer2DModel:
    torch.manual_seed(0)
    return FluxTransformer2DModel(
        in_channels=8,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=24,
        pooled_projection_dim=20,
        axes_dims_rope=(4, 6, 6),
    )


def run_sd3(model: torch.nn.Module) -> list[torch.Tensor]:
    """The output and the gradients of the input and of every parameter that has one."""
    draw = torch.Generator().manual_seed(1)
    x, context, pooled = (
        torch.randn(shape, generator=draw, dtype=torch.float32).to(model.dtype)
        for shape in ((2, 4, 8, 8), (2, 5, 24), (2, 20))
    )
    x.requires_grad_()
    model.zero_grad()
    out = model(x, context, pooled, torch.tensor([500.0, 900.0])).sample
    out.float().square().sum().backward()
    return [out.detach(), x.grad, *(p.grad for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize("name", ["plain", "native", "native_math", "native_flash"])
def test_sd3_as_diffusers_computes_it(sd3, name):
    ours = copy.deepcopy(sd3)
    assert pin(ours, name, CPU, torch.float32) == name
    for expected, found in zip(run_sd3(copy.deepcopy(sd3)), run_sd3(ours), strict=True):
        assert torch.allclose(found, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("dtype", "chosen"), [(torch.float32, "native"), (torch.bfloat16, "plain")]
)
def test_auto_gives_the_same_bits_with_and_without_gradients(sd3, dtype, chosen):
    model = copy.deepcopy(sd3).to(dtype)
    assert pin(model, "auto", CPU, dtype) == chosen
    with_gradients = run_sd3(model)[0]
    draw = torch.Generator().manual_seed(1)
    inputs = [torch.randn(s, generator=draw).to(dtype) for s in ((2, 4, 8, 8), (2, 5, 24), (2, 20))]
    with torch.no_grad():
        without = model(*inputs, torch.tensor([500.0, 900.0])).sample
    assert torch.equal(with_gradients, without)


def test_pin_may_be_called_again(sd3):
    model = copy.deepcopy(sd3)
    pin(model, "plain", CPU, torch.float32)
    pin(model, "native", CPU, torch.float32)
    assert torch.equal(run_sd3(model)[0], run_sd3(copy.deepcopy(sd3))[0])


@pytest.mark.parametrize("name", ["plain", "native", "native_flash"])
def test_pin_prints_nothing(sd3, caplog, monkeypatch, name):
    """diffusers would say at each call that its backends are experimental."""
    monkeypatch.setattr(logging.getLogger("diffusers"), "propagate", True)
    pin(copy.deepcopy(sd3), name, CPU, torch.float32)
    assert caplog.records == []
    copy.deepcopy(sd3).set_attention_backend("native")
    assert "experimental" in caplog.text


def test_flux_uses_the_named_kernel(flux, monkeypatch):
    used = []
    original = attention.dispatch_attention_fn
    module = __import__(FluxTransformer2DModel.__module__, fromlist=["dispatch_attention_fn"])
    monkeypatch.setattr(
        module,
        "dispatch_attention_fn",
        lambda *a, **k: used.append(k["backend"]) or original(*a, **k),
    )
    assert pin(flux, "auto", CPU, torch.bfloat16) == "native_math"
    ids = torch.zeros(4, 3)
    flux(
        hidden_states=torch.randn(1, 4, 8),
        encoder_hidden_states=torch.randn(1, 4, 24),
        pooled_projections=torch.randn(1, 20),
        timestep=torch.tensor([0.5]),
        img_ids=ids,
        txt_ids=ids,
    )
    assert [member.value for member in used] == ["_native_math"] * 2


class Switches(TorchDispatchMode):
    """Whether a thread beside would find the kernel that can do everything, at every operation."""

    def __init__(self) -> None:
        super().__init__()
        self.found = set()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        self.found.add(torch.backends.cuda.math_sdp_enabled())
        return operation(*args, **(kwargs or {}))


@pytest.mark.parametrize("model", ["sd3", "flux"])
def test_a_reward_beside_may_choose_another_kernel(request, model):
    model = request.getfixturevalue(model)
    pin(model, "native_flash", CPU, torch.float32)
    backend = attention._backend("native_flash")
    with Switches() as switches:
        attention.attend(*torch.randn(3, 1, 4, 2, 16), backend)
        layer = next(m for m in model.modules() if hasattr(m, "to_q"))
        layer(torch.randn(1, 4, 32), torch.randn(1, 3, 32))
    assert switches.found == {True}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bool])
def test_a_mask_of_bools_goes_the_way_of_diffusers(monkeypatch, dtype):
    """The operator takes a mask of the query's type alone; a plain pipeline hands over bools."""
    ways, backend = [], attention._backend("native_efficient")
    registry = attention._AttentionBackendRegistry._backends
    monkeypatch.setitem(registry, backend, lambda *a, **k: ways.append("switches") or a[0])
    operator = lambda *a, mask: ways.append(mask.dtype) or a[0]  # noqa: E731
    monkeypatch.setattr(attention, "_efficient", operator)
    monkeypatch.setitem(attention.KERNELS, backend, operator)
    attention._leave_switches_alone(backend)
    mask = torch.ones(2, 1, 1, 4).to(dtype)
    parts = torch.randn(3, 2, 4, 3, 16)
    assert torch.equal(registry[backend](*parts, attn_mask=mask), parts[0])
    assert ways == ["switches" if dtype == torch.bool else dtype]


def with_gradients(call, parts):
    parts = [part.detach().requires_grad_() for part in parts]
    out = call(*parts)
    out.float().square().sum().backward()
    return [out.detach(), *(part.grad for part in parts)]


def has_the_bits_of_pytorchs_choice(name, kind, device, dtype):
    """With gradients and without, where the operator is called by its name."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    parts = torch.randn(3, 2, 40, 3, 64, device=device, dtype=dtype)
    transformer = SD3Transformer2DModel(num_layers=1, attention_head_dim=64, num_attention_heads=1)
    pin(transformer, name, torch.device(device), dtype)
    ours = partial(attention.attend, backend=attention._backend(name))

    def theirs(*parts):
        # cuDNN's choice of a kernel depends on the layout, which diffusers makes contiguous.
        parts = [part.transpose(1, 2) for part in parts]
        parts = [part.contiguous() for part in parts] if "cudnn" in name else parts
        with sdpa_kernel(getattr(SDPBackend, kind)):
            out = torch.nn.functional.scaled_dot_product_attention(*parts)
        return out.transpose(1, 2)

    (out, *found), (same, *expected) = (with_gradients(f, parts) for f in (ours, theirs))
    assert torch.equal(out, same) and torch.equal(ours(*parts), theirs(*parts))
    for one, other in zip(found, expected, strict=True):
        # cuDNN adds gradients up in any order.
        assert (
            torch.allclose(one, other, rtol=0.02, atol=0.02)
            if "cudnn" in name
            else (torch.equal(one, other))
        )


def test_flash_has_the_bits_of_pytorchs_choice():
    has_the_bits_of_pytorchs_choice("native_flash", "FLASH_ATTENTION", "cpu", torch.float32)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["FLASH_ATTENTION", "EFFICIENT_ATTENTION", "CUDNN_ATTENTION"])
def test_kernels_have_the_bits_of_pytorchs_choice(kind):
    name = f"native_{kind.partition('_')[0].lower()}"
    torch.use_deterministic_algorithms("CUDNN" not in kind)
    try:
        has_the_bits_of_pytorchs_choice(name, kind, "cuda", torch.bfloat16)
    finally:
        torch.use_deterministic_algorithms(False)


def test_plain_attends_like_pytorch_in_float64():
    q, k, v = torch.randn(3, 2, 7, 3, 8, dtype=torch.float64)
    expected = torch.nn.functional.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in (q, k, v))
    ).transpose(1, 2)
    assert torch.allclose(attention.attend(q, k, v, None), expected, rtol=1e-12)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("quick", "one of auto, plain, .*native_flash.* is expected"),
        ("flex", "flex cannot compute heads of 16 in torch.float32 on cpu"),
        ("native_npu", r"native_npu, which could not be loaded \(RuntimeError: .*torch_npu"),
        ("native_cudnn", "native_cudnn cannot compute heads of 16 in torch.float32 on cpu"),
    ],
)
def test_what_cannot_be_had_is_refused(sd3, name, message):
    with pytest.raises(ConfigError, match=message):
        pin(copy.deepcopy(sd3), name, CPU, torch.float32)


def test_plain_is_for_sd3_alone(flux):
    with pytest.raises(ConfigError, match="layers of FluxTransformer2DModel cannot use it"):
        pin(flux, "plain", CPU, torch.float32)
