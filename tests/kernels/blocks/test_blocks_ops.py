"""The block ops as torch ops: opcheck, fullgraph without recompiling, bad arguments, backends."""

from __future__ import annotations

import logging
import re

import pytest
import torch
import torch._dynamo
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode

from flowgrpo_kernels import backend_info
from flowgrpo_kernels.backends import dispatch, triton
from flowgrpo_kernels.blocks import gated_residual, joint_heads, norm_modulate
from support.kernels import block_cases as cases

NAMES = ("norm_modulate", "gated_residual", "joint_heads")


def arguments(dtype=torch.float32) -> dict[str, tuple]:
    """Positional arguments of each op."""
    n, g, h = (cases.inputs(op, dtype, width=12) for op in ("norm second", "gate second", "heads"))
    t = cases.inputs("heads rotary", dtype, width=12)
    stats = torch.randn(2, 3), torch.rand(2, 3)
    joint = torch.randn(2, 5, cases.HEADS, 4).to(dtype).transpose(2, 3).contiguous()
    parts, turned = [tuple(v.values()) for v in (h, t)]
    return {
        "norm_modulate": (n["x"], n["scale"], n["shift"], None, None, 1e-6),
        "norm_modulate second": (*n.values(), 1e-6),
        "norm_modulate_alone": (n["x"], n["scale"], n["shift"], None, None, 1e-6),
        "norm_modulate_alone second": (*n.values(), 1e-6),
        "norm_modulate_backward": (g["y"], None, n["x"], n["scale"], None, *stats),
        "norm_modulate_backward second": (
            g["y"], g["y2"], n["x"], n["scale"], n["scale2"], *stats,
        ),
        "gated_residual": (g["x"], g["gate"], g["y"], None, None),
        "gated_residual second": tuple(g.values()),
        "gated_residual_backward": (g["x"], g["gate"], None, torch.bfloat16),
        "gated_residual_backward second": (g["x"], g["gate"], g["gate2"], dtype),
        "joint_heads": (h["second"], None, None, None, None, None, cases.HEADS, 1e-6),
        "joint_heads parts": (*parts, None, None, cases.HEADS, 1e-6),
        "joint_heads rotary": (*turned, cases.HEADS, 1e-6),
        "joint_heads_backward": (
            joint.transpose(2, 3)[:, :2], h["second"], None, h["weight"], None, None, None, 1e-6,
        ),
        "joint_heads_backward rotary": (joint.transpose(2, 3), *turned, 1e-6),
    }  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("case", list(arguments()))
def test_opcheck(case):
    result = torch.library.opcheck(dispatch.op(case.split()[0]), arguments(torch.bfloat16)[case])
    assert set(result.values()) == {"SUCCESS"} and len(result) == 4


def block(x, text, rows, weight, tables):
    """What a block does with its tokens, without the products."""
    y, y2 = norm_modulate(x, rows[0], rows[1], second=(rows[2], rows[3]))
    q = joint_heads((y, text), (weight, None), heads=cases.HEADS, rotary=tables)
    x = gated_residual(x, rows[2], q.flatten(2)[:, : x.shape[1]], second=(rows[3], y2))
    return norm_modulate(x * 1.5, rows[0], rows[1])


@pytest.mark.slow
def test_compiles_into_one_graph_once():
    """fullgraph, forward and backward; new values compile nothing and give the eager bits."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(block, backend=counter, fullgraph=True, dynamic=False)
    for seed in range(3):
        v = cases.inputs("heads rotary", torch.float32, width=48, seed=seed)
        rows = torch.randn(4, 2, 48, generator=torch.Generator().manual_seed(seed)).unbind(0)
        tables = (v["cos"], v["sin"])
        found = []
        for function in (compiled, block):
            leaves = [v[name].clone().requires_grad_() for name in ("first", "second", "weight")]
            gains = [row.clone().requires_grad_() for row in rows]
            out = function(leaves[0], leaves[1], gains, leaves[2], tables)
            grads = torch.autograd.grad(out.square().sum(), [*leaves, *gains])
            with torch.no_grad():
                assert torch.equal(block(leaves[0], leaves[1], gains, leaves[2], tables), out)
            found.append([out.detach(), *grads])
        assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert counter.frame_count == 1


X, ROW = torch.zeros(2, 3, 8), torch.zeros(2, 8)
BAD = {
    "x must be a torch.Tensor, got list": lambda: norm_modulate([1.0], ROW, ROW),
    "x must be [B, N, D] with D > 0, got [2, 8]": lambda: norm_modulate(ROW, ROW, ROW),
    "x must be float32, bfloat16 or float16, got torch.int64": lambda: norm_modulate(
        X.long(), ROW, ROW
    ),
    "scale must be [B, D] = [2, 8], got [2, 3, 8]": lambda: norm_modulate(X, X, ROW),
    "shift must be [B, D] = [2, 8], got [1, 8]": lambda: norm_modulate(X, ROW, ROW[:1]),
    "shift is torch.float64 but x is torch.float32": lambda: norm_modulate(X, ROW, ROW.double()),
    "second must be None or (scale2, shift2), got Tensor": lambda: norm_modulate(
        X, ROW, ROW, second=ROW
    ),
    "scale2 must be a torch.Tensor, got NoneType": lambda: norm_modulate(
        X, ROW, ROW, second=(None, ROW)
    ),
    "scale must be on cpu like x, got meta": lambda: norm_modulate(X, ROW.to("meta"), ROW),
    "eps must be positive, got 0": lambda: norm_modulate(X, ROW, ROW, eps=0),
    "eps must be a number, got Tensor": lambda: norm_modulate(X, ROW, ROW, eps=torch.ones(())),
    "y must have the shape of x [2, 3, 8], got [2, 2, 8]": lambda: gated_residual(X, ROW, X[:, 1:]),
    "gate must be [B, D] = [2, 8]": lambda: gated_residual(X, X[0], X),
    "y2 must have the dtype of y torch.float32": lambda: gated_residual(
        X, ROW, X, second=(ROW, X.half())
    ),
    "streams must be a sequence, got Tensor": lambda: joint_heads(X, (None,), heads=2),
    "got 3 streams and 3 weights": lambda: joint_heads([X] * 3, [None] * 3, heads=2),
    "got 2 streams and 1 weights": lambda: joint_heads([X] * 2, [None], heads=2),
    "heads must divide the width 8 of streams[0], got 3": lambda: joint_heads([X], [None], heads=3),
    "heads must be an int, got float": lambda: joint_heads([X], [None], heads=2.0),
    "streams[1] must be torch.float32 like streams[0]": lambda: joint_heads(
        [X, X.half()], [None, None], heads=2
    ),
    "streams[1] must be [2, N, 8] like streams[0], got [1, 3, 8]": lambda: joint_heads(
        [X, X[:1]], [None, None], heads=2
    ),
    "weights[0] must be [4], got [8]": lambda: joint_heads([X], [ROW[0]], heads=2),
    "cos must be [S, d] = [3, 4], got [3, 8]": lambda: joint_heads(
        [X], [None], heads=2, rotary=(X[0], X[0])
    ),
    "sin must be float32, got torch.bfloat16": lambda: joint_heads(
        [X], [None], heads=2, rotary=(X[0, :, :4], X[0, :, :4].bfloat16())
    ),
    "cos is a constant for this op but requires a gradient": lambda: joint_heads(
        [X], [None], heads=2, rotary=(X[0, :, :4].clone().requires_grad_(), X[0, :, :4])
    ),
    "rotary needs an even head size, got 1": lambda: joint_heads(
        [X], [None], heads=8, rotary=(X[0, :, :1], X[0, :, :1])
    ),
}


@pytest.mark.parametrize("message", list(BAD))
def test_bad_arguments(message):
    with pytest.raises((TypeError, ValueError), match=re.escape(message)):
        BAD[message]()


class Allocations(TorchDispatchMode):
    """Counts the tensors that are allocated."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += "empty" in str(function)
        return function(*args, **(kwargs or {}))


def test_without_a_gradient_only_the_outputs_are_allocated():
    launched = []

    def launch(kernel, programs, tensors, numbers, **constants):
        launched.append(tensors)

    run = triton.launchers["norm_modulate_alone"]
    with Allocations() as made:
        assert len(run(launch, X, ROW, ROW, None, None, 1e-6)) == made.count == 1
        assert len(run(launch, X, ROW, ROW, ROW, ROW, 1e-6)) == made.count - 1 == 2
    assert [sum(x is None for x in tensors) for tensors in launched] == [5, 2]


def test_backends(caplog, monkeypatch):
    """CPU tensors go to the reference without a warning; the native library has no such op."""
    dispatch.log_once.cache_clear()
    with dispatch.use_backend("auto"), caplog.at_level(logging.INFO, "flowgrpo_kernels"):
        norm_modulate(X, ROW, ROW)
        assert all(backend_info()["ops"]["cpu"][name] == "reference" for name in NAMES)
    said = caplog.records[0]
    assert (said.levelname, said.message) == ("INFO", "cpu tensors run on reference")
    with (
        dispatch.use_backend("native"),
        pytest.raises(RuntimeError, match="cannot run gated_residual"),
    ):
        gated_residual(X, ROW, X)
