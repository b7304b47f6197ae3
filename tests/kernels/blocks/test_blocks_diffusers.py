"""The block ops beside the diffusers modules whose arithmetic they fuse."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from flowgrpo_kernels.blocks import gated_residual, joint_heads, norm_modulate

normalization = pytest.importorskip("diffusers.models.normalization")
WIDTH, HEADS = 64, 4
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def close(ours, theirs, exact):
    """float32: the same up to its rounding. 16 bits: no further from float64 than diffusers."""
    assert ours.dtype == theirs.dtype
    if ours.dtype == torch.float32:
        torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=2e-5)
    distance = [(x.double() - exact).abs().mean() for x in (ours, theirs)]
    assert distance[0] <= 1.01 * distance[1] + 1e-7


def module(cls, dtype, **options):
    torch.manual_seed(0)
    made = cls(WIDTH, **options).to(dtype)
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return made, torch.randn(2, 5, WIDTH).to(dtype) + 2, torch.randn(2, WIDTH).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_adaptive_norms(dtype):
    zero, x, emb = module(normalization.AdaLayerNormZero, dtype)
    rows = zero.linear(zero.silu(emb)).chunk(6, dim=1)
    theirs, gate, *_ = zero(x, emb=emb)
    ours = norm_modulate(x, rows[1], rows[0])
    exact = norm_modulate(x.double(), rows[1].double(), rows[0].double())
    close(ours, theirs, exact)
    residual = x + gate.unsqueeze(1) * theirs
    exact = gated_residual(x.double(), gate.double(), theirs.double())
    close(gated_residual(x, gate, theirs), residual, exact)

    dual, x, emb = module(normalization.SD35AdaLayerNormZeroX, dtype)
    rows = dual.linear(dual.silu(emb)).chunk(9, dim=1)
    theirs, *_, theirs2, _ = dual(x, emb=emb)
    given = (x, rows[1], rows[0], rows[7], rows[6])
    exact = [norm_modulate(*(g.double() for g in given[:3]))]
    exact.append(norm_modulate(*(given[i].double() for i in (0, 3, 4))))
    for mine, right, best in zip(
        norm_modulate(*given[:3], second=given[3:]), (theirs, theirs2), exact, strict=True
    ):
        close(mine, right, best)

    last, x, emb = module(
        normalization.AdaLayerNormContinuous, dtype, conditioning_embedding_dim=WIDTH,
        elementwise_affine=False, eps=1e-6,
    )  # fmt: skip
    scale, shift = last.linear(last.silu(emb)).chunk(2, dim=1)
    exact = norm_modulate(x.double(), scale.double(), shift.double())
    close(norm_modulate(x, scale, shift), last(x, emb), exact)


def randomise(attention: torch.nn.Module) -> None:
    for parameter in attention.parameters():
        torch.nn.init.normal_(parameter, std=0.3)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_queries_and_keys_of_flux(dtype, monkeypatch):
    """FluxAttnProcessor: text first, RMSNorm, concatenation, rotary."""
    from diffusers.models.transformers import transformer_flux as flux

    seen = {}

    def dispatch(query, key, value, **options):
        seen.update(query=query, key=key, value=value)
        return value

    monkeypatch.setattr(flux, "dispatch_attention_fn", dispatch)
    torch.manual_seed(0)
    attention = flux.FluxAttention(
        WIDTH, HEADS, WIDTH // HEADS, added_kv_proj_dim=WIDTH, context_pre_only=False, eps=1e-6
    )
    randomise(attention)
    attention.to(dtype)
    image, text = torch.randn(2, 6, WIDTH).to(dtype), torch.randn(2, 3, WIDTH).to(dtype)
    rotary = flux.FluxPosEmbed(10000, [4, 6, 6])(torch.randint(0, 9, (9, 3)).float())
    rotary = tuple(table.float() for table in rotary)
    with torch.no_grad():
        attention(image, text, image_rotary_emb=rotary)
        for name, own, added in (("query", "q", "q"), ("key", "k", "k"), ("value", "v", "v")):
            parts = [getattr(attention, f"add_{added}_proj")(text)]
            parts.append(getattr(attention, f"to_{own}")(image))
            weights, turned = (None, None), None
            if name != "value":
                norms = (getattr(attention, f"norm_added_{own}"), getattr(attention, f"norm_{own}"))
                weights, turned = tuple(norm.weight for norm in norms), rotary
            ours = joint_heads(parts, weights, heads=HEADS, rotary=turned)
            exact = joint_heads(
                [part.double() for part in parts],
                [weight if weight is None else weight.double() for weight in weights],
                heads=HEADS, rotary=turned,
            )  # fmt: skip
            close(ours, seen[name], exact)
            if name == "value":
                assert torch.equal(ours, seen[name])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_queries_and_keys_of_sd3(dtype, monkeypatch):
    """JointAttnProcessor2_0: image first, RMSNorm, concatenation."""
    from diffusers.models import attention_processor as processors

    seen = {}

    def attend(query, key, value, **options):
        seen.update(query=query, key=key, value=value)
        return value

    monkeypatch.setattr(F, "scaled_dot_product_attention", attend)
    torch.manual_seed(0)
    attention = processors.Attention(
        WIDTH, heads=HEADS, dim_head=WIDTH // HEADS, added_kv_proj_dim=WIDTH, bias=True,
        context_pre_only=False, qk_norm="rms_norm", eps=1e-6,
        processor=processors.JointAttnProcessor2_0(),
    )  # fmt: skip
    randomise(attention)
    attention.to(dtype)
    image, text = torch.randn(2, 6, WIDTH).to(dtype), torch.randn(2, 3, WIDTH).to(dtype)
    with torch.no_grad():
        attention(image, encoder_hidden_states=text)
        for name, letter in (("query", "q"), ("key", "k")):
            parts = [getattr(attention, f"to_{letter}")(image)]
            parts.append(getattr(attention, f"add_{letter}_proj")(text))
            norms = (
                getattr(attention, f"norm_{letter}"),
                getattr(attention, f"norm_added_{letter}"),
            )
            weights = [norm.weight for norm in norms]
            ours = joint_heads(parts, weights, heads=HEADS)
            exact = joint_heads(
                [p.double() for p in parts], [w.double() for w in weights], heads=HEADS
            )
            close(ours.transpose(1, 2), seen[name], exact.transpose(1, 2))
