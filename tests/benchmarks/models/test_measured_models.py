"""The measured models are the real ones: parameters, operations, schedules, buffers, finite."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from models import configurations, random_weights

MODELS = {
    m.name: m
    for m in (configurations.TINY_SD3, configurations.TINY_FLUX, configurations.SD35_MEDIUM)
}
MODELS[configurations.FLUX_DEV.name] = configurations.FLUX_DEV
MODELS[configurations.FLUX2_KLEIN_4B.name] = configurations.FLUX2_KLEIN_4B
MODELS[configurations.WAN22_TI2V_5B.name] = configurations.WAN22_TI2V_5B


def network(model):
    from diffusers import (
        Flux2Transformer2DModel,
        FluxTransformer2DModel,
        SD3Transformer2DModel,
        WanTransformer3DModel,
    )

    kinds = {
        "sd3": SD3Transformer2DModel,
        "flux": FluxTransformer2DModel,
        "flux2": Flux2Transformer2DModel,
        "wan": WanTransformer3DModel,
    }
    return kinds[model.family](**model.transformer)


def inputs(model, rows, **like):
    c, h, w = model.latent
    width, pooled = model.text_width
    text = {
        "encoder_hidden_states": torch.randn(rows, model.text_tokens, width, **like),
        "pooled_projections": torch.randn(rows, pooled, **like),
        "timestep": torch.rand(rows, **like),
    }
    if model.family == "sd3":
        return {"hidden_states": torch.randn(rows, c, h, w, **like), **text}
    if model.family == "wan":
        del text["pooled_projections"]
        frames = (model.frames - 1) // 4 + 1
        return {"hidden_states": torch.randn(rows, c, frames, h, w, **like), **text}
    tokens = h * w // 4
    axes = len(model.transformer["axes_dims_rope"])
    ids = {"img_ids": torch.zeros(tokens, axes, **like)}
    ids["txt_ids"] = torch.zeros(model.text_tokens, axes, **like)
    packed = torch.randn(rows, tokens, 4 * c, **like)
    if model.family == "flux2":
        del text["pooled_projections"]
        return {"hidden_states": packed, **ids, **text}
    return {"hidden_states": packed, "guidance": torch.ones(rows, **like), **ids, **text}


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_parameters_and_operations(name):
    """On the meta device, so also at full size; some seconds for 12 billion parameters."""
    model = MODELS[name]
    with torch.device("meta"):
        made = network(model)
        assert all(p.is_meta for p in made.parameters())
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            made(**inputs(model, 3))
    assert sum(p.numel() for p in made.parameters()) == model.parameters
    assert counter.get_total_flops() == 3 * model.forward.total


def test_operations_of_z_image():
    """Three layers of it at full width, by the forward on lists, with a picture and a text that
    need no filling up."""
    from diffusers import ZImageTransformer2DModel

    model = configurations.Z_IMAGE
    model = replace(model, transformer={**model.transformer, "n_layers": 3})
    with torch.device("meta"):
        made = ZImageTransformer2DModel(**model.transformer)
        picture = torch.randn(model.latent[0], 1, *model.latent[1:])
        text = torch.randn(model.text_tokens, model.text_width[0])
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            made([picture] * 2, torch.rand(2), [text] * 2)
    assert counter.get_total_flops() == 2 * model.forward.total


def test_the_figures_of_the_documentation():
    sd3, flux = configurations.SD35_MEDIUM, configurations.FLUX_DEV
    assert round(sd3.parameters / 1e9, 3) == 2.243 and round(flux.parameters / 1e9, 3) == 11.901
    assert round(sd3.forward.total / 1e12, 3) == 2.443
    assert round(flux.forward.total / 1e12, 2) == 21.50
    assert sd3.text_tokens == 333 and flux.text_tokens == 512


def test_operations_of_the_backward_pass():
    """The gradients of all inputs of a frozen model, scores not computed a second time."""
    model = configurations.TINY_SD3
    made = random_weights.transformer(model, "cpu", torch.float32)
    given = inputs(model, 2)
    for name in ("hidden_states", "encoder_hidden_states", "pooled_projections"):
        given[name].requires_grad_()
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        made(**given, return_dict=False)[0].sum().backward()
    d = model.transformer["num_attention_heads"] * model.transformer["attention_head_dim"]
    # Nothing wants the gradient of the time, which went through two layers.
    clock = 2 * d * (256 + d)
    expected = model.forward.total + model.forward.backward - clock
    assert counter.get_total_flops() == 2 * expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "model", [configurations.TINY_SD3, configurations.TINY_FLUX], ids=lambda m: m.name
)
def test_random_weights_keep_activations_finite(model, dtype):
    made = random_weights.transformer(model, "cpu", dtype)
    given = {n: t.to(dtype) for n, t in inputs(model, 2).items()}
    with torch.no_grad():
        out = made(**given, return_dict=False)[0].float()
    assert out.isfinite().all() and 0.1 < out.std() < 10
    again = random_weights.transformer(model, "cpu", dtype)
    for a, b in zip(made.parameters(), again.parameters(), strict=True):
        assert a.dtype == dtype and torch.equal(a, b) and not a.requires_grad


def test_buffers_are_those_of_the_constructor():
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    model = configurations.TINY_SD3
    real = dict(network(model).named_buffers())
    made = dict(random_weights.transformer(model, "cpu", torch.float32).named_buffers())
    assert real.keys() == made.keys() and len(real) == 1
    for name, buffer in real.items():
        torch.testing.assert_close(made[name], buffer, rtol=0, atol=1e-6)
    clip = CLIPTextModelWithProjection(CLIPTextConfig(**model.encoders[0][1]))
    encoders = random_weights.text_encoders(model, "cpu", torch.float32)
    found = dict(encoders[0].named_buffers())
    for name, buffer in clip.named_buffers():
        assert torch.equal(found[name], buffer)
    tokens = torch.tensor([[1, 5, 2]])
    assert all(e(input_ids=tokens).last_hidden_state.isfinite().all() for e in encoders)


def test_an_unknown_buffer_is_an_error():
    class Odd(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("table", torch.ones(3))

    with pytest.raises(NotImplementedError, match="Odd has the unknown buffer table"):
        random_weights.random_module(Odd, "cpu", torch.float32, 0)


def test_schedules():
    """Known values of both pipelines' schedules: shift 3, and the shift by resolution."""
    sd3 = [1, 0.9601, 0.9133, 0.8577, 0.7904, 0.7073, 0.6022, 0.4649, 0.2780, 0.0089, 0]
    flux = [1, 0.9037, 0.7897, 0.6525, 0.4842, 0.2730, 0]
    for model, expected in ((configurations.SD35_MEDIUM, sd3), (configurations.FLUX_DEV, flux)):
        found = random_weights.sigmas(model, len(expected) - 1)
        torch.testing.assert_close(found, torch.tensor(expected), rtol=0, atol=6e-5)
