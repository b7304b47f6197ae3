"""The block ops against float64; independence of tokens; layouts; gradients.

On the reference: test_blocks_triton.py shows that Triton gives its bits.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from flowgrpo_kernels.blocks import gated_residual, joint_heads, norm_modulate
from support.kernels import block_cases as cases


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
@pytest.mark.parametrize("op", cases.OPS)
def test_one_rounding_from_float64(op, dtype):
    """Outputs and gradients, at a width of several chunks with a tail and at a small one."""
    for width in (1728, 48):
        v = cases.inputs(op, dtype, tokens=4, width=width)
        got, grads = cases.gradients(cases.ours, op, cases.leaves(v), dtype)
        exact, expected = cases.gradients(cases.theirs, op, cases.leaves(v, torch.float64), dtype)
        for mine, right in zip(got, exact, strict=True):
            assert mine.dtype == dtype and mine.is_contiguous()
            assert cases.within(mine, right)
        assert grads.keys() == expected.keys()
        for name, mine in grads.items():
            assert mine.dtype == dtype and cases.within(mine, expected[name]), name


@pytest.mark.parametrize("op", cases.OPS)
def test_gradcheck(op):
    v = cases.leaves(cases.inputs(op, torch.float64, tokens=2, width=12))
    names = [name for name in v if v[name].requires_grad]

    def function(*leaves):
        return cases.ours(op, v | dict(zip(names, leaves, strict=True)))

    assert torch.autograd.gradcheck(function, [v[name] for name in names])


@pytest.mark.parametrize("op", cases.OPS)
def test_a_token_depends_on_itself_alone(op):
    """Bit for bit: alone in a batch of one, with and without a gradient, from any layout."""
    v = cases.inputs(op, torch.float32, width=48)
    outputs, grads = cases.gradients(cases.ours, op, cases.leaves(v))
    with torch.no_grad():
        assert all(torch.equal(a, b) for a, b in zip(outputs, cases.ours(op, v), strict=True))
    streams = [name for name in ("x", "y", "y2", "first", "second") if name in v]
    last = 2 if op.startswith("heads") else 3
    cotangents = cases.cotangents(outputs, torch.float32)
    for b, token in ((0, 0), (1, last - 1)):
        one = {name: x[b : b + 1, token : token + 1] for name, x in v.items() if name in streams}
        where = [token]
        if op.startswith("heads"):
            one |= {name: v[name] for name in ("weight", "weight2") if name in v}
            where = [token, v["first"].shape[1] + token]
            one |= {name: v[name][where] for name in cases.TABLES if name in v}
        else:
            one |= {name: x[b : b + 1] for name, x in v.items() if name not in streams}
        one = {name: x.clone().requires_grad_(name in streams) for name, x in one.items()}
        alone = cases.ours(op, one)
        for whole, part in zip(outputs, alone, strict=True):
            assert torch.equal(whole[b : b + 1, where], part)
        given = [c[b : b + 1, where] for c in cotangents]
        found = torch.autograd.grad(alone, [one[name] for name in streams], given)
        for name, grad in zip(streams, found, strict=True):
            assert torch.equal(grads[name][b : b + 1, token : token + 1], grad), name


def test_layouts_of_inputs_and_gradients():
    """Transposed, strided and expanded tensors give the bits of contiguous ones."""
    g = torch.Generator().manual_seed(0)
    x, y = (torch.randn(2, 3, 48, generator=g) for _ in range(2))
    rows = torch.randn(2, 48, generator=g)

    def results(view):
        a, b = (view(t).requires_grad_() for t in (x, y))
        out = norm_modulate(a, rows, rows) + gated_residual(a, rows, b)
        heads = joint_heads((a, b), (rows[0, :16], None), heads=3)
        grads = torch.autograd.grad((out.sum(), heads.transpose(1, 2).square().sum()), (a, b))
        return out.detach(), heads.detach(), *grads

    expected = results(torch.clone)
    swapped = results(lambda t: t.transpose(1, 2).contiguous().transpose(1, 2))
    tokens_first = results(lambda t: t.transpose(0, 1).contiguous().transpose(0, 1))
    odd = results(lambda t: torch.nn.functional.pad(t, (1, 2))[..., 1:-2])
    for found in (swapped, tokens_first, odd):
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    one = norm_modulate(x[:1].expand(2, 3, 48), rows, rows)
    assert torch.equal(one, norm_modulate(x[:1].repeat(2, 1, 1), rows, rows))


def test_only_what_is_asked_for():
    """Unused outputs, frozen inputs, one part, and adapters: no gradient but the one asked for."""
    v = cases.leaves(cases.inputs("norm second", torch.float32, width=48))
    _, y2 = cases.ours("norm second", v)
    alone = norm_modulate(v["x"], v["scale2"], v["shift2"])
    assert torch.equal(y2, alone)
    (got,), (expected,) = (torch.autograd.grad(o.square().sum(), v["x"]) for o in (y2, alone))
    assert torch.equal(got, expected)
    h = cases.inputs("heads", torch.float32, width=48)
    joint = cases.ours("heads", h)[0]
    for i, (part, weight) in enumerate((("first", "weight"), ("second", "weight2"))):
        one = joint_heads((h[part],), (h[weight],), heads=cases.HEADS)
        assert torch.equal(one, joint[:, :3] if i == 0 else joint[:, 3:])
    frozen = dict(h, second=h["second"].clone().requires_grad_())
    (grad,) = torch.autograd.grad(cases.ours("heads", frozen)[0].sum(), frozen["second"])
    assert grad.shape == h["second"].shape and not cases.ours("heads", h)[0].requires_grad


def test_double_backward_says_no():
    for op in ("norm", "gate", "heads"):
        v = cases.leaves(cases.inputs(op, torch.float32, width=48))
        x = v["y" if op == "gate" else "first" if op == "heads" else "x"]
        (grad,) = torch.autograd.grad(cases.ours(op, v)[0].square().sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="can be differentiated once"):
            grad.sum().backward()


def test_mixed_dtypes():
    """float32 modulation of bfloat16 tokens, and a float32 residual of a bfloat16 branch."""
    v = cases.inputs("norm", torch.float32, width=48)
    x = v["x"].bfloat16()
    y = norm_modulate(x, v["scale"], v["shift"])
    assert torch.equal(y, norm_modulate(x.float(), v["scale"], v["shift"]).bfloat16())
    g = cases.leaves(cases.inputs("gate", torch.float32, width=48))
    branch = g["y"].detach().bfloat16().requires_grad_()
    out = gated_residual(g["x"], g["gate"], branch)
    assert out.dtype == torch.float32
    out.sum().backward()
    expected = g["gate"].detach()[:, None].expand_as(branch).bfloat16()
    assert torch.equal(branch.grad, expected)
    assert F.l1_loss(out, g["x"] + g["gate"][:, None] * branch.float()) < 1e-6
