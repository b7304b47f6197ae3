"""Random calls of every public function of flowgrpo_kernels, drawn by hypothesis.

A call is drawn valid, then up to two of its arguments may be replaced by something else. Then

    nothing replaced    it must succeed
    it fails            with an exception that the package documents, raised by its own check and
                        naming one of the arguments, never from inside torch
    it succeeds         with the dtypes, shapes and devices of a valid call, and, where there are
                        values, those of the reference, also in the gradients

`python -m support.kernels.fuzz --examples 10000 --out FILE` from tests/ runs many and writes a
record; tests/kernels/test_fuzz.py runs a few.
"""

from __future__ import annotations

import argparse
import collections
import datetime
import inspect
import itertools
import json
import math
import platform
import re
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from torch import Tensor

import flowgrpo_kernels as fk
from flowgrpo_kernels import Transitions, blocks
from flowgrpo_kernels.backends import dispatch
from flowgrpo_kernels.compat import dance_grpo, flow_grpo
from flowgrpo_kernels.row_laws import LAWS
from flowgrpo_kernels.transitions import COLUMNS, KINDS

PACKAGE = str(Path(fk.__file__).parent)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = ((1,), (5,), (3, 7), (2, 3, 4), (64,), (65,), (1, 1, 1, 1), (0,), (2, 0), (1025,), (4097,))
counts: collections.Counter = collections.Counter()
"""Outcomes: (function, "valid", "replaced" or the name of an exception)."""


# ---- values ----


def normal(shape, seed_: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed_))


VALUES: dict[str, Callable[[Tensor], Tensor]] = {
    "normal": lambda x: x,
    "zero": lambda x: x * 0,
    "small": lambda x: x * 1e-30,
    "subnormal": lambda x: x * 1e-41,
    "large": lambda x: x * 1e18,
    "huge": lambda x: x * 1e38,
    "nan": lambda x: torch.where(x > 1, float("nan"), x),
    "infinite": lambda x: torch.where(x > 1, float("inf"), x),
}
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "rows apart": lambda x: torch.stack([x, x], 1)[:, 1] if x.ndim > 1 else x,
    "every other": lambda x: torch.stack([x, x], -1)[..., 0],
    "transposed": lambda x: x.transpose(-1, -2).contiguous().transpose(-1, -2) if x.ndim > 1 else x,
    "batch last": lambda x: x.movedim(0, -1).contiguous().movedim(-1, 0),
    "one row": lambda x: x[:1].expand(x.shape),
    "unaligned": lambda x: torch.cat([x.new_zeros(1), x.reshape(-1)])[1:].view(x.shape),
    "negative": lambda x: torch._neg_view(x.neg()),
}


class Draw:
    """Draws of one example."""

    def __init__(self, data: st.DataObject) -> None:
        self.data = data
        # Sizes that the arguments of a call share.
        self.batch = self.one_of((1, 2, 3, 5, 0))
        self.shape = self.one_of(SHAPES)
        self.device = "meta" if self.chance(8) else "cpu"
        double = self.chance(12)
        self.dtypes = (torch.float64,) if double else DTYPES

    def one_of(self, options):
        return self.data.draw(st.sampled_from(list(options)))

    def chance(self, one_in: int) -> bool:
        return self.data.draw(st.integers(0, one_in - 1)) == one_in - 1

    def number(self, low: float, high: float) -> float:
        value = self.data.draw(st.floats(low, high, width=32))
        return self.one_of((value, value, np.float32(value), np.float64(value)))

    def tensor(self, shape, dtype=None, values=None) -> Tensor:
        """A tensor of some values and some layout."""
        dtype = dtype or self.one_of(self.dtypes)
        x = normal(shape, self.data.draw(st.integers(0, 1 << 30)))
        plain = self.chance(3)
        x = VALUES[values or ("normal" if not plain else self.one_of(VALUES))](x).to(dtype)
        if self.chance(3) and x.numel():
            x = LAYOUTS[self.one_of(LAYOUTS)](x)
        return x.to(self.device)

    def latent(self) -> Tensor:
        return self.tensor((self.batch, *self.shape))

    def seeds(self) -> Tensor:
        ends = st.one_of(st.integers(-(2**63), 2**63 - 1), st.integers(-2, 2))
        values = self.data.draw(st.lists(ends, min_size=self.batch, max_size=self.batch))
        return torch.tensor(values, dtype=torch.int64, device=self.device)

    def sigmas(self) -> list[float]:
        """A schedule: of a scheduler, or random and descending."""
        steps = self.data.draw(st.integers(1, 12))
        if self.chance(2):
            values = self.data.draw(
                st.lists(st.floats(0, 1), min_size=2, max_size=steps + 1, unique=True)
            )
            return sorted(values, reverse=True)
        shift = self.data.draw(st.floats(0.5, 12))
        time_ = [1 - i / steps for i in range(steps + 1)]
        return [shift * t / (1 + (shift - 1) * t) for t in time_]

    def transitions(self) -> Transitions:
        """Any of the builders, on a schedule within their bounds, or random coefficients."""
        sigmas = [1 - i / 4 for i in range(5)]
        kind = self.one_of((*KINDS, "flow_sde", "flow_sde", "cat", "window", "random"))
        level = self.one_of((0.0, 0.3, 0.7, 1.0))
        sde = fk.flow_sde(sigmas, level, self.one_of(("std_dev", "gaussian")))
        if kind == "random":
            table = normal((4, len(COLUMNS)), self.data.draw(st.integers(0, 1 << 30)))
            table = table * self.one_of((1.0, 1e10, 1e37, 1e-30))
            table[:, 7] = torch.arange(4)
            result = Transitions.from_table(table, None, ["flow_sde"] * 4)
        elif kind == "cat":
            result = Transitions.cat(sde, fk.dance_sde(sigmas), fk.cps(sigmas), fk.ode(sigmas))
        elif kind == "window":
            result = fk.window(sde, fk.ode(sigmas), [0, 2])
        elif kind == "ode":
            result = fk.ode(sigmas)
        else:
            result = getattr(fk, kind)(sigmas, level)
        return result.to(self.device)

    def step(self, transitions: Transitions):
        rows = transitions.num_steps
        row = self.data.draw(st.integers(0, rows - 1))
        kind = self.one_of(("int", "numpy", "0-dim", "rows", "strided"))
        if kind == "int":
            return row
        if kind == "numpy":
            return np.int64(row)
        if kind == "0-dim":
            return torch.tensor(row, device=self.device)
        steps = (torch.arange(self.batch) + row) % rows
        if kind == "strided":
            steps = torch.stack([steps, steps], 1)[:, 1]
        return steps.to(self.device)

    def guidance(self) -> dict:
        if self.chance(2):
            return {}
        return {"uncond_velocity": self.latent(), "guidance_scale": self.number(-2, 9)}

    def per_row(self, values=None) -> Tensor:
        return self.tensor((self.batch,), self.one_of(self.dtypes), values)


# ---- calls ----


def schedule(draw: Draw, names=("noise_level", "kl")) -> dict:
    sigmas = draw.sigmas()
    kind = draw.one_of(("list", "tuple", "numpy", "float32", "float64", "gradient"))
    if kind == "tuple":
        sigmas = tuple(sigmas)
    elif kind == "numpy":
        sigmas = np.array(sigmas)
    elif kind != "list":
        sigmas = torch.tensor(sigmas, dtype=torch.float64).requires_grad_(kind == "gradient")
        sigmas = sigmas.float() if kind == "float32" else sigmas
    call = {"sigmas": sigmas}
    if "noise_level" in names and draw.chance(2):
        call["noise_level"] = draw.number(0, 2)
    if "kl" in names and draw.chance(2):
        call["kl"] = draw.one_of(("std_dev", "gaussian"))
    return call


def matching_call(draw: Draw) -> dict:
    call = schedule(draw, ())
    if draw.chance(2):
        call["weight"] = draw.number(0, 2)
    elif draw.chance(2):
        call["weight"] = torch.rand(len(call["sigmas"]))
    return call


def rows_call(draw: Draw) -> dict:
    """A pair or several, on the device of the call."""
    count = draw.data.draw(st.integers(1, 5))
    sigma = (
        torch.rand(
            count, generator=torch.Generator().manual_seed(draw.data.draw(st.integers()) & 0xFFFF)
        )
        / 2
        + 0.4
    )
    call = {"law": draw.one_of(LAWS), "sigma": sigma.to(draw.device)}
    call["sigma_next"] = (sigma * draw.one_of((0.0, 0.3, 0.9))).to(draw.device)
    call["noise_level"] = draw.one_of((0.0, 0.7, 1, np.float32(0.3), sigma.to(draw.device)))
    call["sigma_max"] = draw.one_of((0.9, sigma[0].to(draw.device)))
    call["kl"] = draw.one_of(("std_dev", "gaussian"))
    for name in ("gaussian", "normalizer", "score_quiet"):
        if draw.chance(2):
            call[name] = draw.chance(2)
    if draw.chance(2):
        call["noise_step"] = draw.one_of((3, np.int64(2), torch.arange(count).to(draw.device)))
    return call


def window_call(draw: Draw) -> dict:
    inside = fk.flow_sde([1, 0.7, 0.4, 0]).to(draw.device)
    steps = draw.data.draw(st.lists(st.integers(0, 2)))
    steps = draw.one_of((steps, tuple(steps), np.array(steps, dtype=np.int32), iter(steps)))
    return {"inside": inside, "outside": fk.ode([1, 0.7, 0.4, 0]).to(draw.device), "steps": steps}


def table_call(draw: Draw) -> dict:
    rows = draw.data.draw(st.integers(1, 5))
    table = draw.tensor((rows, len(COLUMNS)), torch.float32, "normal")
    kinds = [draw.one_of(KINDS) for _ in range(rows)]
    sigmas = draw.one_of((None, torch.linspace(1, 0, rows + 1, dtype=torch.float64)))
    return {"table": table, "sigmas": sigmas, "kinds": draw.one_of((kinds, tuple(kinds)))}


def cat_call(draw: Draw) -> dict:
    count = draw.data.draw(st.integers(1, 3))
    return {f"schedules{i}": draw.transitions() for i in range(count)}


def column_call(draw: Draw) -> dict:
    return {"transitions": draw.transitions(), "name": draw.one_of(COLUMNS)}


def to_call(draw: Draw) -> dict:
    devices = ("cpu", "meta", torch.device("meta"))
    # What has no memory has nothing to copy.
    devices = devices[1:] if draw.device == "meta" else devices
    return {"transitions": draw.transitions(), "device": draw.one_of(devices)}


def noise_call(draw: Draw) -> dict:
    shape = draw.one_of((list, tuple, torch.Size))(draw.one_of((*SHAPES, ())))
    call = {"seeds": draw.seeds(), "shape": shape}
    return call | ({"dtype": draw.one_of(DTYPES)} if draw.chance(2) else {})


def step_call(draw: Draw) -> dict:
    transitions = draw.transitions()
    call = {"velocity": draw.latent(), "sample": draw.latent(), "transitions": transitions}
    call |= {"step": draw.step(transitions)} | draw.guidance()
    if draw.chance(2):
        call["noise"] = draw.latent()
    else:
        call["seeds"] = draw.seeds()
    if draw.chance(3):
        call["out"] = torch.empty_like(call["sample"], memory_format=torch.contiguous_format)
    dtype = torch.float64 if call["sample"].dtype == torch.float64 else torch.float32
    if draw.chance(3):
        call["log_prob_out"] = torch.empty(draw.batch, dtype=dtype, device=draw.device)
    for name in ("mean_out", "x0_out"):
        if draw.chance(4):
            shape = call["sample"].shape
            call[name] = torch.empty(shape, dtype=dtype, device=draw.device)
    return call


def score_call(draw: Draw) -> dict:
    transitions = draw.transitions()
    call = {name: draw.latent() for name in ("velocity", "sample", "prev_sample")}
    call |= {"transitions": transitions, "step": draw.step(transitions)} | draw.guidance()
    return differentiated(draw, call)


def moments_call(draw: Draw) -> dict:
    return score_call(draw) | {"return_mean": True, "return_x0": draw.chance(2)}


def differentiated(draw: Draw, call: dict) -> dict:
    if draw.chance(2):
        call["velocity"] = call["velocity"].requires_grad_()
        if "uncond_velocity" in call and draw.chance(2):
            call["uncond_velocity"] = call["uncond_velocity"].requires_grad_()
            call["uncond_grad"] = True
    return call


def loss_call(draw: Draw) -> dict:
    call = score_call(draw)
    call |= {"old_log_prob": draw.per_row(), "advantages": draw.per_row()}
    if draw.chance(2):
        call |= {"ref_velocity": draw.latent(), "kl_weight": draw.number(0, 3)}
        if "uncond_velocity" in call and draw.chance(2):
            call["ref_uncond_velocity"] = draw.latent()
    for name in ("row_weight", "kl_row_weight"):
        if draw.chance(3):
            call[name] = draw.per_row()
    if draw.chance(3) and not {"cps", "matching"} & set(call["transitions"].kinds):
        call["old_velocity"] = draw.latent()
    if draw.chance(2):
        call["clip_range"] = draw.one_of(
            (0.1, (0.2, 0.3), [0.5, math.inf], (1, 0), np.float32(0.5))
        )
    if draw.chance(2):
        call["adv_clip"] = draw.one_of((0.5, 5, math.inf, np.float64(2)))
    return call


def nft_call(draw: Draw) -> dict:
    call = {name: draw.latent() for name in ("velocity", "sample", "x0", "old_velocity")}
    for name in ("sigma", "optimality"):
        value = draw.tensor((draw.batch,), values="normal").detach()
        call[name] = value.sigmoid() if draw.chance(2) else (value > 0).to(value.dtype)
    call |= draw.guidance()
    if draw.chance(2):
        call |= {"ref_velocity": draw.latent(), "kl_weight": draw.number(0, 3)}
        if "uncond_velocity" in call and draw.chance(2):
            call["ref_uncond_velocity"] = draw.latent()
    for name in ("row_weight", "kl_row_weight"):
        if draw.chance(3):
            call[name] = draw.per_row()
    for name, values in (("beta", (0.1, 1, np.float32(2))), ("floor", (1e-5, 1, np.float64(0.1)))):
        if draw.chance(2):
            call[name] = draw.one_of(values)
    return differentiated(draw, call)


def tokens(draw: Draw) -> tuple[int, int, int]:
    return draw.batch, draw.one_of((0, 1, 4)), draw.one_of((1, 6, 64, 100))


def leaves(draw: Draw, call: dict, *names: str) -> dict:
    """Some tensors require a gradient."""
    if draw.chance(2):
        for name in names:
            call[name] = call[name].requires_grad_()
    return call


def norm_call(draw: Draw) -> dict:
    batch, count, width = tokens(draw)
    call = {"x": draw.tensor((batch, count, width))}
    call |= {name: draw.tensor((batch, width)) for name in ("scale", "shift")}
    if draw.chance(2):
        call["second"] = draw.tensor((batch, width)), draw.tensor((batch, width))
    if draw.chance(2):
        call["eps"] = draw.one_of((1e-6, 0.5, np.float32(1e-5), 1))
    return leaves(draw, call, "x", "scale")


def residual_call(draw: Draw) -> dict:
    batch, count, width = tokens(draw)
    call = {"x": draw.tensor((batch, count, width)), "gate": draw.tensor((batch, width))}
    call["y"] = draw.tensor((batch, count, width))
    if draw.chance(2):
        y2 = draw.tensor((batch, count, width), call["y"].dtype)
        call["second"] = draw.tensor((batch, width)), y2
    return leaves(draw, call, "x", "y")


def heads_call(draw: Draw) -> dict:
    heads, size = draw.one_of((1, 2, 3)), draw.one_of((2, 8, 64))
    lengths = [draw.one_of((0, 1, 4)) for _ in range(draw.one_of((1, 2)))]
    dtype = draw.one_of(draw.dtypes)
    streams = [draw.tensor((draw.batch, n, heads * size), dtype) for n in lengths]
    weights = [draw.one_of((None, draw.tensor((size,)))) for _ in lengths]
    call = {"streams": streams, "weights": weights, "heads": heads}
    if draw.chance(2):
        table = (sum(lengths), size)
        call["rotary"] = tuple(draw.tensor(table, torch.float32, "normal") for _ in "cs")
    if draw.chance(2):
        for x in streams:
            x.requires_grad_()
    return call


def flux_call(draw: Draw) -> dict:
    sigmas = [1 - i / 4 for i in range(5)]
    sigmas = draw.one_of((torch.tensor(sigmas), sigmas, tuple(sigmas), np.array(sigmas)))
    call = {"model_output": draw.latent(), "latents": draw.latent(), "eta": draw.number(0, 1)}
    call |= {"sigmas": sigmas, "index": draw.data.draw(st.integers(0, 3))}
    call["prev_sample"] = draw.latent() if draw.chance(2) else None
    call |= {"grpo": draw.chance(2), "sde_solver": draw.chance(2), "seeds": draw.seeds()}
    return call


def peer_call(draw: Draw) -> dict:
    sigmas = torch.tensor([1 - i / 4 for i in range(5)])
    scheduler = SimpleNamespace(sigmas=sigmas, timesteps=sigmas[:-1] * 1000)
    timestep = draw.one_of((500.0, 1000, torch.tensor(250.0), torch.tensor([750.0])))
    call = {"self": scheduler, "model_output": draw.latent(), "timestep": timestep}
    call |= {"sample": draw.latent(), "noise_level": draw.number(0, 1), "seeds": draw.seeds()}
    call["prev_sample"] = draw.latent() if draw.chance(2) else None
    call["sde_type"] = draw.one_of(("sde", "cps"))
    return call | {"return_sqrt_dt": draw.chance(2), "peer_log_prob": draw.chance(3)}


def patch_call(draw: Draw) -> dict:
    module = ModuleType("theirs")
    module.flux_step = lambda model_output, latents, eta, sigmas, index, prev_sample, grpo, \
        sde_solver: None  # fmt: skip
    module.sde_step_with_logprob = lambda self, model_output, timestep, sample: None
    return {"modules": module} | ({"seeds": None} if draw.chance(2) else {})


def patched(module) -> Callable:
    def run(modules, **options):
        with module.patch(modules, **options):
            return ()

    return run


def concatenated(**schedules) -> Transitions:
    return Transitions.cat(*schedules.values())


# ---- what results have to be ----


def tensors(result) -> list[Tensor]:
    """Tensors of a result, in order."""
    if isinstance(result, Transitions):
        return [result.table]
    if isinstance(result, Tensor):
        return [result]
    return [x for x in result if isinstance(x, Tensor)] if isinstance(result, tuple) else []


def check_table(call: dict, result: Transitions) -> None:
    """Coefficients within their bounds, of the sigmas that were asked for."""
    table, sigmas = result.table.double(), torch.as_tensor(call["sigmas"], dtype=torch.float64)
    c, a = table[:, 2], table[:, 0]
    assert result.table.dtype == torch.float32 and table.shape == (len(sigmas) - 1, len(COLUMNS))
    assert torch.isfinite(table).all() and c.min() >= 0 and c.max() <= 5.001
    assert a.abs().max() <= 12.501
    assert (c > 0).logical_or((table[:, 2:6] == 0).all(1)).all()
    torch.testing.assert_close(
        table[:, 6], sigmas[:-1] - sigmas[1:], rtol=1e-6, atol=3e-7, check_device=False
    )
    assert result.sigmas.dtype == torch.float64 and result.num_steps == len(result.kinds)


def check_matching(call: dict, result: Transitions) -> None:
    """Rows that say v for every velocity v, with the weights that were asked for."""
    table, sigmas = result.table, torch.as_tensor(call["sigmas"], dtype=torch.float32)
    assert table.dtype == torch.float32 and table.shape == (len(sigmas), len(COLUMNS))
    assert torch.equal(table[:, COLUMNS.index("sigma")], sigmas)
    weight = torch.as_tensor(call.get("weight", 1.0), dtype=torch.float32)
    assert torch.equal(table[:, COLUMNS.index("k")], weight.expand(len(sigmas)))
    assert (table[:, 0] == 0).all() and (table[:, [1, 2, 5]] == 1).all()
    assert result.sigmas is None and set(result.kinds) == {"matching"}


def check_step(call: dict, result) -> None:
    out, lp = result
    assert_like(out, call["sample"].shape, call["sample"].dtype, call["sample"].device)
    assert_like(lp, out.shape[:1], score_dtype(call["sample"]), out.device)
    assert call.get("out") is None or out is call["out"]
    assert call.get("log_prob_out") is None or lp is call["log_prob_out"]


def check_score(call: dict, result) -> None:
    sample = call["sample"]
    assert_like(result, sample.shape[:1], score_dtype(sample), sample.device)


def check_loss(call: dict, result) -> None:
    sample = call["sample"]
    for name, value in result._asdict().items():
        shape = sample.shape[:1] if name in ("log_prob", "ratio") else ()
        assert_like(value, shape, score_dtype(sample), sample.device)


def check_nft(call: dict, result) -> None:
    sample = call["sample"]
    for name, value in result._asdict().items():
        per_row = name in ("positive_error", "negative_error", "old_deviation")
        shape = sample.shape[:1] if per_row else ()
        assert_like(value, shape, score_dtype(sample), sample.device)


def check_noise(call: dict, result) -> None:
    shape = (call["seeds"].shape[0], *call["shape"])
    assert_like(result, shape, call.get("dtype", torch.float32), call["seeds"].device)


def check_first(name: str) -> Callable:
    """Results are like one of the arguments."""

    def check(call: dict, result) -> None:
        for x in tensors(result):
            assert_like(x, call[name].shape, call[name].dtype, call[name].device)

    return check


def check_heads(call: dict, result) -> None:
    streams, heads = call["streams"], int(call["heads"])
    batch, width = streams[0].shape[0], streams[0].shape[2]
    shape = (batch, sum(x.shape[1] for x in streams), heads, width // heads)
    assert_like(result, shape, streams[0].dtype, streams[0].device)
    assert result.is_contiguous()


def check_peer(call: dict, result) -> None:
    """float32; flux_step keeps the dtype of latents, or of the prev_sample that it returns."""
    sample = call["sample"] if "sample" in call else call["latents"]
    dtypes = {torch.float32}
    if "latents" in call:
        dtypes |= {x.dtype for x in (sample, call["prev_sample"]) if x is not None}
    for x in result:
        assert x.device == sample.device and x.dtype in dtypes - {torch.float64}
    assert result[0].shape == sample.shape


def assert_like(x: Tensor, shape, dtype, device) -> None:
    assert isinstance(x, Tensor) and tuple(x.shape) == tuple(shape), (x.shape, shape)
    assert x.dtype == dtype and x.device == torch.device(device), (x.dtype, dtype, x.device)


def score_dtype(sample: Tensor) -> torch.dtype:
    return torch.float64 if sample.dtype == torch.float64 else torch.float32


def nothing(call: dict, result) -> None:
    """Nothing beyond equality."""


def bits(a: Tensor, b: Tensor) -> None:
    """Equal values; the sign of a zero is not part of the contract."""
    assert a.dtype == b.dtype and a.shape == b.shape and a.device == b.device
    if a.device.type == "cpu":
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


class Target:
    """A public function: how calls of it are drawn, and what their results have to be."""

    def __init__(self, function, call, check=nothing, differentiable=False, share=1.0, kept=()):
        self.function, self.call, self.check = function, call, check
        self.differentiable, self.share = differentiable, share
        # What a method is called on.
        self.kept = kept


TARGETS = {
    "flow_sde": Target(fk.flow_sde, schedule, check_table),
    "dance_sde": Target(fk.dance_sde, schedule, check_table),
    "cps": Target(fk.cps, schedule, check_table),
    "ode": Target(fk.ode, lambda draw: schedule(draw, ()), check_table, share=0.5),
    "matching": Target(fk.matching, matching_call, check_matching, share=0.5),
    "window": Target(fk.window, window_call, share=0.5),
    "transition_rows": Target(fk.transition_rows, rows_call, share=0.5),
    "Transitions.from_table": Target(Transitions.from_table, table_call, share=0.5),
    "Transitions.cat": Target(concatenated, cat_call, share=0.5),
    "Transitions.column": Target(
        lambda transitions, name: transitions.column(name),
        column_call,
        share=0.25,
        kept=("transitions",),
    ),
    "Transitions.to": Target(
        lambda transitions, device: transitions.to(device),
        to_call,
        share=0.25,
        kept=("transitions",),
    ),
    "initial_noise": Target(fk.initial_noise, noise_call, check_noise),
    "sde_step": Target(fk.sde_step, step_call, check_step, share=3),
    "log_prob": Target(fk.log_prob, score_call, check_score, differentiable=True, share=2),
    "log_prob.mean": Target(fk.log_prob, moments_call, differentiable=True),
    "grpo_loss": Target(fk.grpo_loss, loss_call, check_loss, differentiable=True, share=3),
    "nft_loss": Target(fk.nft_loss, nft_call, check_nft, differentiable=True, share=3),
    "norm_modulate": Target(blocks.norm_modulate, norm_call, check_first("x"), differentiable=True),
    "gated_residual": Target(
        blocks.gated_residual, residual_call, check_first("x"), differentiable=True
    ),
    "joint_heads": Target(blocks.joint_heads, heads_call, check_heads, differentiable=True),
    "flux_step": Target(dance_grpo.flux_step, flux_call, check_peer),
    "sde_step_with_logprob": Target(flow_grpo.sde_step_with_logprob, peer_call, check_peer),
    "dance_grpo.patch": Target(patched(dance_grpo), patch_call, share=0.1),
    "flow_grpo.patch": Target(patched(flow_grpo), patch_call, share=0.1),
}


# ---- what is put in place of an argument ----


def replacement(draw: Draw, value):
    """Something else than a value: of another type, or a tensor of another shape, dtype, device."""
    other: list[Any] = [
        None, "0.5", "", b"1", -1, 0, 3, 2**31, 2**63, 10**400, 0.5, -0.5, 1e39, 1e-320,
        float("nan"), float("inf"), -0.0, True, 0.5j, [], [1.0], [[1.0], [2.0, 3.0]], (0.1,),
        (0.1, "0.2"), {}, object(), np.float32(0.5), np.int64(1), np.bool_(True), np.ones(2),
        torch.tensor(1.0), torch.tensor(1), torch.tensor([1, 2]), torch.ones(2, 3, device="meta"),
        torch.float64, torch.float16, torch.int32, torch.device("meta"), math.sqrt, Tensor,
    ]  # fmt: skip
    if isinstance(value, Tensor) and value.layout is torch.strided:
        value = value.detach()
        on_host = value.device.type == "cpu"
        other += [
            value.to("meta"), value.double(), value.to(torch.int32), value.to(torch.complex64),
            value.bool(), value.half(), value[None], value[..., None], value.reshape(-1),
            torch.nn.Parameter(value, requires_grad=False),
        ]  # fmt: skip
        if on_host:
            other += [value.tolist(), value.to_sparse()]
        if value.ndim:
            other += [value[..., :-1], value[:0], value[1:], torch.cat([value, value])]
            other.append(value.expand(2, *value.shape))
        if value.is_floating_point():
            other += [value * float("nan"), value.clone().requires_grad_()]
        elif value.dtype != torch.bool:
            other += [value + 100, value - 100]
        # Half of what replaces a tensor is a tensor.
        if draw.chance(2):
            other = [x for x in other if isinstance(x, Tensor)]
    elif isinstance(value, (list, tuple)) and len(value):
        one = replacement(draw, value[0])
        other += [
            [one, *value[1:]],
            [*value, one],
            list(value[1:]),
            value * 2,
            *([tuple(value)] * 2),
        ]
    elif isinstance(value, Transitions):
        other += [value.to("meta"), value.table, [value]]
    return draw.one_of(other)


def outcome(function: Callable, call: dict) -> tuple[Any, BaseException | None]:
    try:
        return function(**call), None
    except Exception as error:
        return None, error


def check_error(name: str, call: dict, error: BaseException) -> None:
    """The package's own check raised it, and says which argument is wrong."""
    frames = traceback.extract_tb(error.__traceback__)
    place = f"{type(error).__name__} at {frames[-1].filename}:{frames[-1].lineno}: {error}"
    if isinstance(error, RuntimeError):
        assert name == "sde_step" and "has no gradient" in str(error), place
        return
    assert isinstance(error, (TypeError, ValueError)), place
    assert frames[-1].filename.startswith(PACKAGE), place
    names = {re.sub(r"\d", "", n) for n in call} | {"weights", "cos", "sin", "index", "step"}
    if "second" in call:
        names |= {"scale2", "shift2", "gate2", "y2"}
    if "sigmas" in call or name.startswith("Transitions"):
        names |= {"sigmas", "noise_level", "table"}
    names |= set(inspect.signature(TARGETS[name].function).parameters)
    assert any(n in str(error) for n in names), place


def gradients(target: Target, call: dict, result, cotangents: int) -> list[Tensor | None]:
    """Gradients of the result in all that requires one, of a random cotangent."""
    values = itertools.chain(*(v if isinstance(v, (list, tuple)) else [v] for v in call.values()))
    inputs = [x for x in values if isinstance(x, Tensor) and x.requires_grad]
    outputs = [x for x in tensors(result) if x.requires_grad]
    if not inputs or not outputs or not target.differentiable:
        return []
    weights = [
        normal(x.shape, cotangents + i).to(x) if x.device.type == "cpu" else torch.ones_like(x)
        for i, x in enumerate(outputs)
    ]
    return list(torch.autograd.grad(outputs, inputs, weights, allow_unused=True))


def clone(value):
    """A copy with memory of its own, of the same layout, for what a call may write."""
    return torch.empty_like(value) if isinstance(value, Tensor) else value


def check(name: str, data: st.DataObject) -> None:
    """Draws a call of a function and checks what comes of it."""
    target, draw = TARGETS[name], Draw(data)
    call = target.call(draw)
    replaced = []
    if draw.chance(2):
        for _ in range(draw.one_of((1, 1, 2))):
            argument = draw.one_of([name for name in call if name not in target.kept])
            call[argument] = replacement(draw, call[argument])
            replaced.append(argument)
    if "out" in call and draw.chance(6):
        argument = draw.one_of([n for n in ("velocity", "sample", "noise") if n in call])
        call["out"] = call[argument]
        replaced.append("out")
    # An iterator is used up by a call.
    call = {n: list(v) if hasattr(v, "__next__") else v for n, v in call.items()}
    buffers = ("out", "log_prob_out", "mean_out", "x0_out")
    second = call | {n: clone(call[n]) for n in buffers if n in call}
    result, error = outcome(target.function, call)
    if error is not None:
        counts[name, type(error).__name__] += 1
        # Of random sigmas and noise levels; float32 makes some sigmas equal.
        bound = re.search(r"beyond (C <=|float32)|strictly descending", str(error))
        assert replaced or bound, repr(error)
        check_error(name, call, error)
        return
    counts[name, "replaced" if replaced else "valid"] += 1
    target.check(call, result)
    with dispatch.use_backend("reference"):
        expected = target.function(**second)
    for x, y in zip(tensors(result), tensors(expected), strict=True):
        bits(x, y)
    cotangents = draw.data.draw(st.integers(0, 1 << 20))
    got = gradients(target, call, result, cotangents)
    for x, y in zip(got, gradients(target, second, expected, cotangents), strict=True):
        if x is None or y is None:
            assert x is y
        else:
            bits(x, y)


def fuzz(name: str, examples: int, seed_: int | None = None, shrink: bool = True) -> None:
    """Runs that many examples of a function: always the same ones, or those of a seed."""
    options = settings(
        max_examples=examples,
        derandomize=seed_ is None,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        report_multiple_bugs=False,
        phases=[Phase.generate, Phase.shrink] if shrink else [Phase.generate],
    )

    def example(data):
        check(name, data)

    example.__name__ = example.__qualname__ = "fuzz_" + name.replace(".", "_")
    run = options(given(st.data())(example))
    (seed(seed_)(run) if seed_ is not None else run)()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--examples", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="*", default=list(TARGETS))
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    total = sum(TARGETS[name].share for name in args.only)
    start, failures = time.perf_counter(), []
    for name in args.only:
        try:
            fuzz(name, math.ceil(args.examples * TARGETS[name].share / total), args.seed)
        except BaseException as error:
            failures.append(name)
            traceback.print_exception(error)
    outcomes: dict[str, dict[str, int]] = {name: {} for name in args.only}
    for (name, kind), count in sorted(counts.items()):
        outcomes[name][kind] = count
    record = {
        "device": f"{platform.processor() or platform.machine()}, {cpu_name()}",
        "versions": {
            "python": platform.python_version(), "torch": torch.__version__,
            "hypothesis": __import__("hypothesis").__version__,
        },
        "backend": dispatch.backend_of("sde_step", "cpu"),
        "commit": commit(),
        "command": f"cd tests && python -m support.kernels.fuzz {' '.join(sys.argv[1:])}",
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "seconds": round(time.perf_counter() - start, 1),
        "examples": sum(counts.values()),
        "failures": failures,
        "outcomes": outcomes,
    }  # fmt: skip
    text = json.dumps(record, indent=1) + "\n"
    print(text)
    if args.out:
        args.out.write_text(text)
    return bool(failures)


def cpu_name() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return "unknown CPU"
    return match.group(1) if (match := re.search(r"^model name\s*: (.*)$", text, re.M)) else ""


def commit() -> str:
    """Commit of the tree, with + where files differ from it."""
    command = ["git", "describe", "--always", "--abbrev=12", "--dirty=+", "--exclude=*"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent)
    return done.stdout.strip() or "unknown"


if __name__ == "__main__":
    raise SystemExit(main())
