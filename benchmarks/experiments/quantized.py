"""Errors of velocities under packed weights, relative to those of the model as it was.

    python benchmarks quantized [--model sd3.5-m] [--layers 4] [--out FILE]    # no GPU

Blocks of a real model's sizes with random weights run once with their weights as they are and once
for each quantizer of `policy.quantize`, in the same type and on the same inputs. Real weights are
not normal of one spread: here each output row has a spread of its own (log-normal, by a factor of
1.5 either way), and one weight in a thousand is four times as large. Rows, all of them
|v' - v| / |v| by the Euclidean norm over everything:

    bfloat16    the blocks in bfloat16 against float32: what the type itself costs
    nf4, ...    the blocks with packed weights, in float32, against float32
    layer       one feed-forward product alone, by the same names

The velocity is that of `--layers` blocks, and of a quarter as many of FLUX.1's, which are four
times as large; not of all of them: an error that grows with depth is larger in the whole. `nano` is
the package's own model, whole and with its own weights.
"""

from __future__ import annotations

import argparse
import copy
import sys
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from flowgrpo.config import PolicyConfig
from flowgrpo.policies import pipelines, surgery
from flowgrpo.policies.families import family_of
from flowgrpo.policies.quantized import QUANTIZERS, QuantizedLinear, describe
from models import configurations, random_weights
from models.configurations import Model
from reporting import records

SUITE = "quantized"
SPREAD, OUTLIERS, TIMES = 1.5, 1e-3, 4.0
OUT = records.RESULTS / "quantized" / "velocities-cpu.json"
IMAGE, TEXT = 64, 32
"""Tokens of image and text: errors of a product do not depend on how many there are."""


def shortened(model: Model, layers: int) -> Model:
    """`model` with `layers` blocks, of each kind."""
    if model.name == "nano":
        return model
    changes: dict[str, object] = {"num_layers": layers}
    if "num_single_layers" in model.transformer:
        changes["num_single_layers"] = layers
    if dual := model.transformer.get("dual_attention_layers"):
        changes["dual_attention_layers"] = dual[: layers // 2]
    return replace(model, transformer={**model.transformer, **changes})


def network(model: Model, seed: int = 0) -> nn.Module:
    """The transformer in float32, with weights of several spreads; nano's as it comes."""
    if model.name == "nano":
        return random_weights.transformer(model, "cpu", torch.float32)
    from diffusers import FluxTransformer2DModel, SD3Transformer2DModel

    cls = {"sd3": SD3Transformer2DModel, "flux": FluxTransformer2DModel}[model.family]
    transformer = random_weights.random_module(
        lambda: cls(**model.transformer), "cpu", torch.float32, seed
    )
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in transformer.parameters():
            if parameter.ndim == 2:
                rows = torch.randn(len(parameter), 1, generator=generator)
                parameter.mul_(SPREAD**rows)
                outside = torch.rand(parameter.shape, generator=generator) < OUTLIERS
                parameter[outside] *= TIMES
    return transformer.requires_grad_(False).eval()


def inputs(model: Model, seed: int = 1) -> dict[str, Tensor]:
    """Arguments of one forward of two rows."""
    generator = torch.Generator().manual_seed(seed)
    config, (width, pooled) = model.transformer, model.text_width

    def draw(*shape: int) -> Tensor:
        return torch.randn(2, *shape, generator=generator)

    text = {
        "encoder_hidden_states": draw(min(TEXT, model.text_tokens), width),
        "pooled_projections": draw(pooled),
    }
    # That a 16-bit model holds exactly, and a thousand times as much: FLUX.1 rounds its time.
    times = torch.tensor([0.5, 0.25])
    if model.family == "sd3":
        side = 2 * int(IMAGE**0.5) if model.name != "nano" else model.latent[1]
        image = draw(config["in_channels"], side, side)
        return {"hidden_states": image, "timestep": 1000 * times, **text}
    side = int(IMAGE**0.5)
    places = torch.stack(torch.meshgrid(*[torch.arange(float(side))] * 2, indexing="ij"), -1)
    places = torch.cat((torch.zeros(IMAGE, 1), places.flatten(0, 1)), dim=1)
    return {
        "hidden_states": draw(IMAGE, config["in_channels"]),
        "timestep": times,
        "img_ids": places,
        "txt_ids": torch.zeros(text["encoder_hidden_states"].shape[1], 3),
        "guidance": torch.full((2,), 2.0),
        **text,
    }


def quantize(transformer: nn.Module, name: str) -> nn.Module:
    """A copy of `transformer` with packed weights, as `policy.quantize` makes them."""
    parts = type("Parts", (), {"transformer": copy.deepcopy(transformer), "components": {}})
    family = family_of(transformer)
    source = pipelines.Pipeline(parts, family, torch.float32, family.transformer)
    surgery.quantize(source, PolicyConfig(quantize=name), torch.device("cpu"))
    return parts.transformer


def error(value: Tensor, exact: Tensor) -> float:
    """|value - exact| / |exact|."""
    return ((value.double() - exact.double()).norm() / exact.double().norm()).item()


@torch.no_grad()
def rows_of(model: Model, layers: int) -> list[dict]:
    """The record's rows of one model."""
    if model.family == "flux":
        layers = max(1, layers // 4)
    short = shortened(model, layers)
    transformer, arguments = network(short), inputs(short)
    depth = "1 block" if layers == 1 else f"{layers} blocks"
    case = model.name if model.name == "nano" else f"{model.name}, {depth}"
    exact = transformer(**arguments, return_dict=False)[0]
    half = copy.deepcopy(transformer).bfloat16()
    rounded = {n: t if n in ("img_ids", "txt_ids") else t.bfloat16() for n, t in arguments.items()}
    rounded["timestep"] = arguments["timestep"]
    errors = {"bfloat16": error(half(**rounded, return_dict=False)[0], exact)}
    layer = transformer.transformer_blocks[0].ff.net[0].proj
    x = torch.randn(IMAGE, layer.in_features, generator=torch.Generator().manual_seed(2))
    product = layer(x)
    alone = {"bfloat16": error(copy.deepcopy(layer).bfloat16()(x.bfloat16()), product)}
    for name in QUANTIZERS:
        packed = quantize(transformer, name)
        errors[name] = error(packed(**arguments, return_dict=False)[0], exact)
        alone[name] = error(QuantizedLinear(layer, name, torch.device("cpu"))(x), product)
    return [
        records.row(SUITE, case, name, metric, value, "|v' - v| / |v|")
        for metric, values in (("velocity", errors), ("layer", alone))
        for name, value in values.items()
    ]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "--model", default="sd3.5-m,flux.1-dev,nano", help="sd3.5-m, flux.1-dev, nano"
    )
    parser.add_argument("--layers", type=int, default=4, help="blocks of each kind, default 4")
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args(argv)
    models = {m.name: lambda m=m: m for m in (configurations.SD35_MEDIUM, configurations.FLUX_DEV)}
    models["nano"] = configurations.nano
    rows = []
    for name in args.model.split(","):
        rows += rows_of(models[name](), args.layers)
        for row in rows:
            print(f"{row['case']:24s} {row['metric']:10s} {row['provider']:10s} {row['value']:.4g}")
        packed_by = {name: describe(name) for name in QUANTIZERS}
        records.write(records.record(rows, "cpu", quantizers=packed_by), args.out)
    print(f"wrote {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
