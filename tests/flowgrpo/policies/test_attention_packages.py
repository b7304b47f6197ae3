"""Kernels of flash-attn, xformers and the Hub: how they are called, and what is refused.

No package is needed: functions with the signatures of flash-attn 2.8 and 3 and xformers 0.0.35
stand where diffusers keeps theirs, compute what they should and record how they were called. On a
GPU the installed ones run.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from diffusers import SD3Transformer2DModel
from diffusers.models import attention_dispatch

from flowgrpo.cli import doctor
from flowgrpo.config import ConfigError
from flowgrpo.policies import attention, attention_packages, deterministic
from flowgrpo.policies.families import family_of

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
FLASHES = ("flash", "flash_hub", "flash_3", "flash_3_hub")
BF16 = torch.bfloat16


@pytest.fixture(params=[True, False], ids=["deterministic", "any order"])
def repeatable(request):
    """Whether PyTorch is set as a run on a GPU sets it."""
    torch.use_deterministic_algorithms(request.param, warn_only=True)
    yield request.param
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def packages(monkeypatch):
    """All packages, at hand; their calls are recorded here."""
    record = []

    def attend(query, key, value, scale, mask=None):
        heads_first = (x.transpose(1, 2) for x in (query, key, value))
        out = F.scaled_dot_product_attention(*heads_first, attn_mask=mask, scale=scale)
        return out.transpose(1, 2)

    def flash_attn_func(
        q,
        k,
        v,
        dropout_p=0.0,
        softmax_scale=None,
        causal=False,
        window_size=(-1, -1),
        softcap=0.0,
        alibi_slopes=None,
        deterministic=False,
        return_attn_probs=False,
    ):
        assert (dropout_p, causal, window_size, softcap) == (0.0, False, (-1, -1), 0.0)
        record.append(deterministic)
        return attend(q, k, v, softmax_scale)

    def flash_attn_3_func(
        q,
        k,
        v,
        softmax_scale=None,
        causal=False,
        qv=None,
        q_descale=None,
        k_descale=None,
        v_descale=None,
        window_size=(-1, -1),
        attention_chunk=0,
        softcap=0.0,
        num_splits=1,
        pack_gqa=None,
        deterministic=False,
        sm_margin=0,
        return_attn_probs=False,
    ):
        assert not causal and num_splits == 1
        record.append(deterministic)
        return attend(q, k, v, softmax_scale), torch.zeros(())

    def memory_efficient_attention(
        query, key, value, attn_bias=None, p=0.0, scale=None, *, op=None, output_dtype=None
    ):
        assert p == 0.0 and output_dtype is None
        if attn_bias is not None:
            batch, length, heads, _ = query.shape
            assert attn_bias.shape == (batch, heads, length, key.shape[1])
            assert attn_bias.stride(0) % 16 == 0 and attn_bias.stride(-1) == 1
        record.append(op)
        return attend(query, key, value, scale, attn_bias)

    backward = SimpleNamespace()
    forward = SimpleNamespace(CUDA_MAXIMUM_COMPUTE_CAPABILITY=(9, 0))
    xops = SimpleNamespace(
        memory_efficient_attention=memory_efficient_attention,
        MemoryEfficientAttentionCutlassOp=(forward, backward),
    )
    monkeypatch.setattr(attention_dispatch, "flash_attn_func", flash_attn_func)
    monkeypatch.setattr(attention_dispatch, "flash_attn_3_func", flash_attn_3_func)
    monkeypatch.setattr(attention_dispatch, "xops", xops)
    for flag in ("FLASH_ATTN", "FLASH_ATTN_3", "XFORMERS_ATTN"):
        monkeypatch.setattr(attention_dispatch, f"_CAN_USE_{flag}", True)
    monkeypatch.setattr(attention_dispatch, "is_kernels_available", lambda: True)
    monkeypatch.setattr(attention_dispatch, "is_kernels_version", lambda *_: True)
    for name, function in (("flash_hub", flash_attn_func), ("flash_3_hub", flash_attn_3_func)):
        config = attention_dispatch._HUB_KERNELS_REGISTRY[attention._backend(name)]
        for attribute in ("kernel_fn", "wrapped_forward_fn", "wrapped_backward_fn"):
            monkeypatch.setattr(config, attribute, function)
    calls = dict(attention_dispatch._AttentionBackendRegistry._backends)
    monkeypatch.setattr(attention_dispatch._AttentionBackendRegistry, "_backends", calls)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    return SimpleNamespace(calls=record, cutlass=xops.MemoryEfficientAttentionCutlassOp)


@pytest.mark.parametrize("name", [*FLASHES, "xformers"])
def test_each_layer_calls_the_package(packages, monkeypatch, repeatable, name):
    """In the model, forwards and backwards, with the bits of the same kernel called directly."""
    torch.manual_seed(0)
    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=24,
        caption_projection_dim=32,
        pooled_projection_dim=20,
        pos_embed_max_size=8,
        dual_attention_layers=(0,),
    )
    inputs = torch.randn(2, 4, 8, 8), torch.randn(2, 5, 24), torch.randn(2, 20), torch.ones(2)
    family = family_of(transformer)
    attention.pin(transformer, family, "native", CPU, torch.float32)
    expected = transformer(*inputs).sample
    # All that is missing here is the GPU.
    monkeypatch.setattr(attention_packages, "refuse", lambda *arguments: None)
    assert attention.pin(transformer, family, name, CPU, torch.float32) == name
    packages.calls.clear()
    out = transformer(*inputs).sample
    out.sum().backward()
    assert torch.allclose(out, expected, rtol=1e-4, atol=1e-6)
    assert packages.calls == [packages.cutlass if name == "xformers" else repeatable] * 3


def test_xformers_masks(packages):
    backend = attention._backend("xformers")
    attention_packages.replace_call(backend)
    parts = torch.randn(3, 2, 21, 3, 8)
    mask = torch.zeros(2, 1, 1, 21)
    mask[0, ..., 15:] = mask[1, ..., 3:] = -torch.inf
    expected = attention.attend(*parts, None, mask)
    assert torch.allclose(attention.attend(*parts, backend, mask), expected, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "asked", "said"),
    [
        ("flash_3_hub", {"attn_mask": torch.zeros(1, 1, 1, 4)}, "attn_mask"),
        ("flash_hub", {"dropout_p": 0.1}, "dropout_p"),
        ("xformers", {"is_causal": True}, "is_causal"),
        ("xformers", {"attn_mask": torch.ones(1, 1, 1, 4, dtype=torch.bool)}, "attn_mask"),
    ],
)
def test_a_call_that_is_not_known_is_not_made_otherwise(packages, name, asked, said):
    backend = attention._backend(name)
    attention_packages.replace_call(backend)
    with pytest.raises(NotImplementedError, match=f"attention is {name}, but .* with {said}, for"):
        attention_dispatch.dispatch_attention_fn(
            *torch.zeros(3, 1, 4, 1, 8), backend=backend, **asked
        )
    assert packages.calls == []


def refusal(name, device=GPU, dtype=BF16, head=64, masked=False) -> str:
    """What is said against a kernel; empty: nothing."""
    try:
        attention_packages.refuse(attention._backend(name), device, dtype, head, masked)
    except ConfigError as error:
        assert str(error).startswith(f"policy.attention is {name}, but ")
        return str(error).partition(", but ")[2]
    return ""


@pytest.mark.parametrize("name", [*FLASHES, "xformers"])
def test_what_can_be_had_is_not_refused(packages, repeatable, name):
    assert refusal(name) == refusal(name, head=128) == ""
    assert refusal(name, dtype=torch.float16) == ""


def test_masks_device_dtype_heads_and_age_are_refused(packages, monkeypatch):
    for name in FLASHES:
        assert refusal(name, masked=True) == (
            "it takes no mask, and the model masks the padding of its texts; choose auto."
        )
        assert "in float16 or bfloat16, and policy.dtype is float32;" in refusal(
            name, dtype=torch.float32
        )
        assert "heads of up to 256" in refusal(name, head=264)
    assert refusal("xformers", masked=True, dtype=torch.float32) == ""
    assert refusal("xformers", device=CPU) == (
        "it runs on a GPU, and the device is cpu; choose auto."
    )
    assert refusal("flash", head=36) == "" and "in steps of 8, and" in refusal("flash_3", head=36)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))
    assert refusal("flash") == (
        "it needs compute capability 8.0 or more, and cuda:0 has 7.5; choose auto."
    )
    assert refusal("xformers") == ""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (10, 0))
    assert "5.0 to 9.0, and cuda:0 has 10.0;" in refusal("xformers")


def test_gradients_that_cannot_repeat_are_refused(packages, repeatable):
    for name in ("flash_4_hub", "flash_varlen", "flash_3_varlen_hub"):
        assert ("equal seeds might not give equal runs" in refusal(name)) is repeatable
    for name in ("flash_3", "flash_3_hub"):
        said = refusal(name, head=256)
        assert ("up to 192, in steps of 8 where gradients have to repeat" in said) is repeatable
        assert bool(said) is repeatable
    assert refusal("flash", head=256) == ""
    assert refusal("sage") == "it has no backward pass; choose auto."


@pytest.mark.skipif(
    any(map(attention_packages.version, ("flash-attn", "kernels", "xformers"))),
    reason="here they are installed",
)
def test_an_absent_package_is_named_with_its_extra():
    for name, extra in (("flash", "flash"), ("xformers", "xformers")):
        said = refusal(name)
        assert "is not installed; pip install " in said and f"'flowgrpo[{extra}]'." in said
    assert refusal("flash_3_hub") == "kernels is not installed; pip install 'flowgrpo[hub]'."
    assert "no flash_attn_interface that it can import; build" in refusal("flash_3")
    found = doctor.attention()
    assert list(found) == ["flash-attn", "kernels", "flash-attn 3", "xformers"]
    assert found["xformers"] == (
        "absent; policy.attention xformers: off, xformers is not installed; "
        "pip install 'flowgrpo[xformers]'"
    )


def test_a_package_that_diffusers_cannot_use_is_not_called_absent(packages, monkeypatch):
    monkeypatch.setattr(attention_dispatch, "_CAN_USE_FLASH_ATTN", False)
    monkeypatch.setattr(attention_packages, "version", lambda name: "2.5.0")
    assert "diffusers cannot use flash-attn 2.5.0 (Flash" in refusal("flash")
    found = attention_packages.states(GPU)
    assert found["xformers"] == "2.5.0; policy.attention xformers: can be chosen"
    assert found["kernels"].count("can be chosen") == 2


class AnyOrder(torch.autograd.Function):
    """Adds `noise` units in the last place to the gradients, one more in each pass."""

    noise = 0

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        AnyOrder.noise += 1
        return grad * (1 + AnyOrder.noise * torch.finfo(grad.dtype).eps)


@pytest.mark.slow
def test_gradients_that_differ_are_found(packages, monkeypatch):
    backend = attention._backend("flash")
    attention_packages.replace_call(backend)
    check = ("flash", backend, CPU, torch.float32, 8)
    state = torch.get_rng_state()
    attention._check_repeats(*check)
    assert torch.equal(torch.get_rng_state(), state)
    exact = attention_dispatch.flash_attn_func
    monkeypatch.setattr(
        attention_dispatch,
        "flash_attn_func",
        lambda q, k, v, **more: exact(AnyOrder.apply(q), k, v, **more),
    )
    with pytest.raises(ConfigError, match="gradients of equal inputs differed in two backward"):
        attention._check_repeats(*check)


@pytest.mark.gpu
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", [*FLASHES, "xformers"])
def test_installed_kernels_repeat_and_agree_with_plain(name, masked):
    """Skipped: what is not installed, does not fit the GPU, or takes no mask."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        if said := refusal(name, masked=masked):
            pytest.skip(said)
        if masked:
            attention_packages.replace_call(attention._backend(name))
        else:
            transformer = SD3Transformer2DModel(num_layers=1, num_attention_heads=1)
            attention.pin(transformer, family_of(transformer), name, GPU, BF16)
        parts = torch.randn(4, 2, 1357, 6, 64, device=GPU).to(BF16)
        weights, parts = parts[3], [part.requires_grad_() for part in parts[:3].clone().unbind()]
        mask = torch.zeros(2, 1, 1, 1357, device=GPU, dtype=BF16)
        mask[0, ..., 1000:] = -torch.inf
        mask = mask if masked else None
        backend = attention._backend(name)
        out = attention.attend(*parts, backend, mask)
        with torch.no_grad():
            assert torch.equal(out, attention.attend(*parts, backend, mask))
        with deterministic.deterministic_backward():
            passes = [
                torch.autograd.grad(out, parts, weights, retain_graph=True) for _ in range(10)
            ]
        for other in passes[1:]:
            assert all(map(torch.equal, passes[0], other))
    finally:
        torch.use_deterministic_algorithms(False)
    exact = [part.detach().float().requires_grad_() for part in parts]
    expected = attention.attend(*exact, None, None if mask is None else mask.float())
    assert torch.allclose(out.float(), expected, rtol=0.02, atol=0.005)
    gradients = torch.autograd.grad(expected, exact, weights.float())
    for found, reference in zip(passes[0], gradients, strict=True):
        assert (found.float() - reference).norm() < 0.01 * reference.norm()
