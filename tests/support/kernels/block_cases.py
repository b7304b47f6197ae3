"""Inputs for the block ops and independent versions of them, from PyTorch's own functions.

An op's inputs are a dict of leaves; `ours` and `theirs` take it and return a tuple of outputs.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from flowgrpo_kernels.blocks import gated_residual, joint_heads, norm_modulate

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
OPS = ("norm", "norm second", "gate", "gate second", "heads", "heads rotary", "heads plain")
HEADS = 3
# What one rounding may add, relative to the value: half the distance of its neighbours.
ROUNDING = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
TABLES = ("cos", "sin")


def inputs(op: str, dtype: torch.dtype, batch=2, tokens=3, width=96, seed=0) -> dict[str, Tensor]:
    """Leaves of an op; `width` is a multiple of 2 HEADS, rows are views of one wide tensor."""
    g = torch.Generator().manual_seed(seed + 7 * width + tokens)

    def normal(*shape: int, kind=dtype) -> Tensor:
        return torch.randn(*shape, generator=g).to(kind)

    table = torch.float64 if dtype == torch.float64 else torch.float32
    shape = (batch, tokens, width)
    rows = normal(batch, 4 * width).chunk(4, dim=1)
    if op.startswith("norm"):
        # Far from 0 on average: a variance computed as E[x^2] - E[x]^2 would show.
        leaves = {"x": (normal(*shape, kind=table) * 2 + 5).to(dtype), "scale": rows[0]}
        leaves |= {"shift": rows[1]}
        return leaves | ({"scale2": rows[2], "shift2": rows[3]} if "second" in op else {})
    if op.startswith("gate"):
        leaves = {"x": normal(*shape), "gate": rows[0], "y": normal(*shape)}
        return leaves | ({"gate2": rows[1], "y2": normal(*shape)} if "second" in op else {})
    size = width // HEADS
    # The first part is a slice of a product of three.
    first = normal(batch, tokens, 3 * width)[..., width : 2 * width]
    leaves = {"first": first, "second": normal(batch, tokens - 1, width)}
    if "plain" not in op:
        leaves |= {"weight": normal(size), "weight2": normal(size)}
    if "rotary" in op:
        angle = normal(2 * tokens - 1, size // 2, kind=table).repeat_interleave(2, 1)
        leaves |= {"cos": angle.cos(), "sin": angle.sin()}
    return leaves


def ours(op: str, v: dict[str, Tensor]) -> tuple[Tensor, ...]:
    if op.startswith("norm"):
        second = (v["scale2"], v["shift2"]) if "second" in op else None
        out = norm_modulate(v["x"], v["scale"], v["shift"], second=second)
    elif op.startswith("gate"):
        second = (v["gate2"], v["y2"]) if "second" in op else None
        out = gated_residual(v["x"], v["gate"], v["y"], second=second)
    else:
        out = joint_heads(
            (v["first"], v["second"]), (v.get("weight"), v.get("weight2")), heads=HEADS,
            rotary=(v["cos"], v["sin"]) if "rotary" in op else None,
        )  # fmt: skip
    return out if isinstance(out, tuple) else (out,)


def theirs(op: str, v: dict[str, Tensor]) -> tuple[Tensor, ...]:
    if op.startswith("norm"):
        h = F.layer_norm(v["x"], v["x"].shape[-1:], eps=1e-6)
        names = [("scale", "shift"), ("scale2", "shift2")][: 1 + ("second" in op)]
        return tuple(h * (1 + v[scale][:, None]) + v[shift][:, None] for scale, shift in names)
    if op.startswith("gate"):
        out = v["x"] + v["gate"][:, None] * v["y"]
        return (out + v["gate2"][:, None] * v["y2"] if "second" in op else out,)
    parts = [v[name].unflatten(-1, (HEADS, -1)) for name in ("first", "second")]
    if "weight" in v:
        weights = (v["weight"], v["weight2"])
        parts = [F.rms_norm(p, w.shape, w, 1e-6) for p, w in zip(parts, weights, strict=True)]
    out = torch.cat(parts, 1)
    if "rotary" in op:
        turn = torch.view_as_complex(torch.stack((v["cos"], v["sin"]), -1)[:, ::2].contiguous())
        pairs = torch.view_as_complex(out.unflatten(-1, (-1, 2)).contiguous())
        out = torch.view_as_real(pairs * turn[:, None]).flatten(-2)
    return (out,)


def leaves(v: dict[str, Tensor], dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """Leaves with gradients, all but the tables; views of wider tensors without a dtype."""
    found = {}
    for name, x in v.items():
        x = x.detach() if dtype is None else x.detach().to(dtype)
        if dtype is None and name not in TABLES:
            wide = x.new_zeros(*x.shape[:-1], 3 * x.shape[-1])
            wide[..., x.shape[-1] : 2 * x.shape[-1]] = x
            x = wide[..., x.shape[-1] : 2 * x.shape[-1]]
        found[name] = x if name in TABLES else x.requires_grad_()
    return found


def cotangents(outputs, dtype: torch.dtype) -> list[Tensor]:
    """Fixed random numbers of `dtype`, in the dtypes and on the devices of the outputs."""
    g = torch.Generator().manual_seed(5)
    return [torch.randn(o.shape, generator=g).to(dtype).to(o) for o in outputs]


def gradients(
    function, op: str, v: dict[str, Tensor], dtype: torch.dtype = torch.float32
) -> tuple[list[Tensor], dict[str, Tensor]]:
    """(outputs, gradients by name) for fixed random cotangents of `dtype`."""
    outputs = function(op, v)
    names = [name for name, x in v.items() if x.requires_grad]
    given = cotangents(outputs, dtype)
    found = torch.autograd.grad(outputs, [v[name] for name in names], given)
    return [o.detach() for o in outputs], dict(zip(names, found, strict=True))


def within(got: Tensor, exact: Tensor, slack: float = 4e-6) -> bool:
    """One rounding to the dtype of `got`, and float32 arithmetic relative to the largest value."""
    bound = ROUNDING[got.dtype] * exact.abs() + slack * exact.abs().max()
    return bool(((got.double() - exact).abs() <= bound * 1.001).all())
