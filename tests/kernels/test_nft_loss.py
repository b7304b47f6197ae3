"""nft_loss forward and backward: float64 oracle, values by hand, weights, guidance, one pass."""

from __future__ import annotations

import importlib

import pytest
import torch

from flowgrpo_kernels import nft_loss, reference
from flowgrpo_kernels.backends import dispatch, native, triton
from support.kernels import oracle

# The package's attribute of this name is the function.
MODULE = importlib.import_module("flowgrpo_kernels.nft_loss")
needs_native = pytest.mark.skipif(
    not native.available(), reason=f"no native library: {native.why_not()}"
)


def with_leaf(b: oracle.NftBatch, dtype=None) -> tuple[torch.Tensor, tuple]:
    """(velocity that requires a gradient, the positional arguments with it)."""
    v = b.velocity.to(dtype or b.velocity.dtype).clone().requires_grad_()
    return v, (v, *b.args[1:])


def compare(b: oracle.NftBatch, tolerance=2e-6, **options) -> None:
    """Loss and gradient against the oracle, relative to the largest of the gradient."""
    (v, args), (exact_v, exact_args) = with_leaf(b), with_leaf(b, torch.float64)
    result = nft_loss(*args, **options)
    names = {"ref_velocity": "ref", "row_weight": "weight", "kl_row_weight": "own_kl"}
    exact = oracle.nft_loss(*exact_args, **{names.get(k, k): x for k, x in options.items()})
    assert oracle.error(result.loss, exact) < tolerance
    result.loss.backward()
    exact.backward()
    scale = exact_v.grad.abs().max().clamp_min(1e-30)
    error = (v.grad.double() - exact_v.grad).abs().max() / scale
    rounding = 0.0 if v.dtype == torch.float32 else torch.finfo(v.dtype).eps
    assert error < 1e-5 + rounding


@pytest.mark.parametrize("beta", [1.0, 0.1, 2.0])
@pytest.mark.parametrize("kl_weight", [0.0, 0.3])
@pytest.mark.parametrize("floor", [1e-5, 0.4])
def test_against_float64(backend, beta, kl_weight, floor):
    b = oracle.nft_batch(5)
    ref = {"ref_velocity": b.ref, "kl_weight": kl_weight} if kl_weight else {}
    compare(b, beta=beta, floor=floor, row_weight=b.weight, **ref)


@pytest.mark.parametrize("shape", oracle.SHAPES, ids=str)
@pytest.mark.parametrize("dtype", oracle.DTYPES, ids=str)
def test_shapes_and_dtypes(backend, shape, dtype):
    b = oracle.nft_batch(4, shape, dtype, torch.float32)
    own = torch.tensor([1.0, 0.0, 2.0, 0.5])
    compare(b, ref_velocity=b.ref, kl_weight=0.2, row_weight=b.weight, kl_row_weight=own)


def test_values_by_hand(backend):
    """Two elements, numbers that can be followed on paper.

    x_t = (1, -1), x0 = (0, 0), sigma = 1/2, v_old = (1, -1), v = (2, -1), so beta = 1 gives
    v+ = (2, -1) and v- = (0, -1), hence x0+ = (0, -1/2) and x0- = (1, -1/2):
        error+ = (1/8) / (1/4) = 1/2          error- = (5/8) / (3/4) = 5/6
        d error+ / dv = (0, 1)                d error- / dv = (2/3, -1/3)
    With beta = 1/2, v+ = (3/2, -1), v- = (1/2, -1), x0+ = (1/4, -1/2), x0- = (3/4, -1/2):
        error+ = (5/32) / (3/8) = 5/12        error- = (13/32) / (5/8) = 13/20
        d error+ / dv = (-1/6, 1/3)           d error- / dv = (3/10, -1/5)
    The KL to v_ref = (0, -1) is ((2)^2 + 0) / 2 = 2, its gradient (2, 0).
    """
    row = lambda *x: torch.tensor([x])  # noqa: E731
    rest = (row(1.0, -1.0), row(0.0, 0.0), row(1.0, -1.0), torch.tensor([0.5]))
    r = torch.tensor([0.75])
    for beta, errors, slopes in (
        (1.0, (1 / 2, 5 / 6), ((0, 1), (2 / 3, -1 / 3))),
        (0.5, (5 / 12, 13 / 20), ((-1 / 6, 1 / 3), (3 / 10, -1 / 5))),
    ):
        v = row(2.0, -1.0).requires_grad_()
        out = nft_loss(v, *rest, r, beta=beta, ref_velocity=row(0.0, -1.0), kl_weight=0.1)
        out.loss.backward()
        positive, negative = 0.75 * errors[0], 0.25 * errors[1]
        gradient = [0.75 * p + 0.25 * q for p, q in zip(*slopes, strict=True)]
        gradient[0] += 0.1 * 2
        close = {"rtol": 1e-6, "atol": 1e-7}
        torch.testing.assert_close(out.positive_error, torch.tensor([errors[0]]), **close)
        torch.testing.assert_close(out.negative_error, torch.tensor([errors[1]]), **close)
        torch.testing.assert_close(out.positive_loss, torch.tensor(positive), **close)
        torch.testing.assert_close(out.negative_loss, torch.tensor(negative), **close)
        expected = torch.tensor(positive + negative + 0.1 * 2)
        torch.testing.assert_close(out.loss.detach(), expected, **close)
        assert out.kl == 2 and out.old_deviation.tolist() == [0.5]
        torch.testing.assert_close(v.grad, row(*gradient), **close)


def test_on_policy(backend):
    """v = v_old: both errors are the same bits, and r = 1/2 has no gradient at all."""
    b = oracle.nft_batch(3, (2, 2500))
    b.velocity, b.optimality = b.old, torch.tensor([0.5, 1.0, 0.0])
    v, args = with_leaf(b)
    out = nft_loss(*args)
    out.loss.backward()
    assert torch.equal(out.positive_error, out.negative_error) and out.old_deviation.eq(0).all()
    assert v.grad[0].eq(0).all()
    # The sure success is drawn to its x0, the sure failure driven away from it.
    v_star = (b.sample - b.x0) / b.sigma.view(-1, 1, 1)
    descent = -(v.grad * (v_star - b.old)).flatten(1).sum(1)
    assert descent[1] > 0 > descent[2]


def test_divisor(backend):
    """The mean magnitude has no gradient; below the floor the floor divides; 0 / floor is 0."""
    b = oracle.nft_batch(2, (40,))
    scaled = []
    for floor in (10.0, 20.0):
        v, args = with_leaf(b)
        out = nft_loss(*args, floor=floor)
        out.loss.backward()
        scaled.append((out.positive_error, out.negative_error, v.grad))
    for ten, twenty in zip(*scaled, strict=True):
        assert torch.equal(ten, 2 * twenty)
    exact = torch.zeros(2, 40)
    v = exact.clone().requires_grad_()
    one = torch.ones(2)
    out = nft_loss(v, exact, exact, exact, 0.5 * one, one)
    out.loss.backward()
    assert out.loss == 0 and v.grad.eq(0).all()


def test_gradcheck():
    """All terms in float64 where the divisor is the floor, which is a constant."""
    b = oracle.nft_batch(3, (2, 3)).to(torch.float64)

    def function(v, u):
        return nft_loss(
            v, *b.args[1:], uncond_velocity=u, guidance_scale=1.5, uncond_grad=True, beta=0.7,
            ref_velocity=b.ref, kl_weight=0.4, row_weight=b.weight, floor=100.0,
        ).loss  # fmt: skip

    inputs = (b.velocity.requires_grad_(), b.uncond.requires_grad_())
    assert torch.autograd.gradcheck(function, inputs, fast_mode=False)


def test_float64_is_the_oracle():
    """The reference in float64 agrees with autograd through v+ and v- to float64's rounding."""
    b = oracle.nft_batch(3, (5, 7)).to(torch.float64)
    options = {"beta": 0.3, "kl_weight": 0.2}
    (v, args), (w, exact_args) = with_leaf(b), with_leaf(b)
    ours = nft_loss(*args, ref_velocity=b.ref, row_weight=b.weight, **options).loss
    exact = oracle.nft_loss(*exact_args, ref=b.ref, weight=b.weight, **options)
    ours.backward()
    exact.backward()
    torch.testing.assert_close(ours, exact, rtol=1e-13, atol=0)
    torch.testing.assert_close(v.grad, w.grad, rtol=1e-11, atol=1e-15)


def test_weights(backend):
    """Weight 0 silences a row, even a NaN one; the KL has its own weight when given."""
    b = oracle.nft_batch(4, (3, 24))
    keep = torch.tensor([1.0, 0.0, 1.0, 0.0])
    silent = keep.view(-1, 1, 1) == 0
    b.sample = torch.where(silent, float("nan"), b.sample)
    b.optimality = torch.where(keep == 0, float("nan"), b.optimality)
    v, args = with_leaf(b)
    options = {"ref_velocity": b.ref, "kl_weight": 0.5}
    nft_loss(*args, row_weight=keep, **options).loss.backward()
    half = b.take(slice(None, None, 2))
    w, rows = with_leaf(half)
    alone = nft_loss(*rows, ref_velocity=half.ref, kl_weight=0.5)
    alone.loss.backward()
    # Two rows of four: the mean is over all four.
    torch.testing.assert_close(v.grad[::2] * 2, w.grad, rtol=1e-6, atol=0)
    assert v.grad[1::2].eq(0).all()

    b = oracle.nft_batch(4, (3, 24))
    split = nft_loss(*b.args, row_weight=b.weight, kl_row_weight=torch.ones(4), **options)
    plain, weighted = (
        nft_loss(*b.args, **options),
        nft_loss(*b.args, row_weight=b.weight, **options),
    )
    assert torch.equal(split.kl, plain.kl) and not torch.equal(weighted.kl, plain.kl)
    assert torch.equal(split.positive_loss, weighted.positive_loss)


@pytest.mark.parametrize("dtype", oracle.DTYPES, ids=str)
def test_guided_gradients(backend, dtype):
    b = oracle.nft_batch(4, (3, 5, 7), dtype)
    v, u = b.velocity.clone().requires_grad_(), b.uncond.clone().requires_grad_()
    guided = nft_loss(
        v, *b.args[1:], uncond_velocity=u, guidance_scale=4.0, uncond_grad=True,
        ref_velocity=b.ref, ref_uncond_velocity=b.uncond, kl_weight=0.2,
    )  # fmt: skip
    combine = lambda c, n: n.float() + (c.float() - n.float()) * 4.0  # noqa: E731
    c = combine(b.velocity, b.uncond).requires_grad_()
    plain = nft_loss(c, *b.args[1:], ref_velocity=combine(b.ref, b.uncond), kl_weight=0.2)
    assert torch.equal(guided.loss, plain.loss)
    assert torch.equal(guided.positive_error, plain.positive_error)
    guided.loss.backward()
    plain.loss.backward()
    assert torch.equal(v.grad, (c.grad * 4.0).to(dtype))
    assert torch.equal(u.grad, (c.grad * -3.0).to(dtype))


@pytest.mark.parametrize("shape", [(3, 24, 24), (3, 5, 7), (2, 5000), (1,)], ids=str)
@pytest.mark.parametrize("dtype", oracle.DTYPES, ids=str)
def test_rows_do_not_see_the_batch(backend, shape, dtype):
    """A row's errors and gradient are the same bits in any batch, at any place of it."""
    b = oracle.nft_batch(6, shape, dtype)

    def run(rows):
        taken = b.take(rows)
        v, args = with_leaf(taken)
        # The gradient is divided by the batch: a weight of the batch takes that out, exactly.
        count = torch.full((len(rows),), float(len(rows)))
        out = nft_loss(*args, ref_velocity=taken.ref, kl_weight=0.5, row_weight=count)
        out.loss.backward()
        return out.positive_error, out.negative_error, out.old_deviation, v.grad

    whole = run(list(range(6)))
    for rows in ([4], [5, 0, 4], [2, 2, 2, 2, 2, 2, 2, 4]):
        for got, expected in zip(run(rows), whole, strict=True):
            assert torch.equal(got, expected[rows])


def test_outputs(backend):
    b = oracle.nft_batch(6)
    v, args = with_leaf(b)
    out = nft_loss(*args)
    assert out.loss.requires_grad and not any(x.requires_grad for x in out[1:])
    assert out.kl.item() == 0 and out.loss.shape == () and out.old_deviation.shape == (6,)
    total = b.optimality * out.positive_error
    torch.testing.assert_close(out.positive_loss, total.mean(), rtol=1e-6, atol=0)
    assert torch.equal(out.loss.detach(), out.positive_loss + out.negative_loss)
    moved = ((b.velocity - b.old) ** 2).flatten(1).mean(1)
    torch.testing.assert_close(out.old_deviation, moved, rtol=1e-5, atol=0)
    (3 * out.loss).backward()
    tripled, v.grad = v.grad, None
    nft_loss(*args).loss.backward()
    # The terms of both sides cancel where r is near 1/2: an ulp is one of a term.
    scale = float(tripled.abs().max())
    torch.testing.assert_close(tripled, 3 * v.grad, rtol=1e-6, atol=1e-7 * scale)
    with torch.no_grad():
        quiet = nft_loss(*args)
    assert all(torch.equal(x, y) for x, y in zip(quiet, out, strict=True))


@pytest.mark.parametrize("shape", [(2, 3), (0,), (2, 4097)], ids=str)
def test_empty(backend, shape):
    """An empty batch has a loss of 0, and so has one of rows without elements."""
    for rows in (0, 3):
        b = oracle.nft_batch(rows, shape)
        v, args = with_leaf(b)
        out = nft_loss(*args, ref_velocity=b.ref, kl_weight=0.1)
        out.loss.backward()
        assert out.positive_error.shape == (rows,) and v.grad.shape == (rows, *shape)
        assert torch.isfinite(out.loss)
        assert out.loss.item() == 0 or (rows and 0 not in shape)


def test_a_weight_of_a_term_that_is_not_there(backend):
    """Without ref_velocity there is no KL, whatever its weight is."""
    b = oracle.nft_batch(2, (3,))
    out = nft_loss(*b.args, kl_row_weight=torch.tensor([float("nan"), 1.0]))
    assert out.kl == 0 and torch.isfinite(out.loss)


def test_not_a_number_gets_through(backend):
    b = oracle.nft_batch(3, (2, 3))
    b.x0[1, 0, 0] = float("nan")
    v, args = with_leaf(b)
    out = nft_loss(*args)
    out.loss.backward()
    assert out.loss.isnan() and out.positive_error.isnan().tolist() == [False, True, False]
    assert v.grad[1, 0, 0].isnan() and torch.isfinite(v.grad[::2]).all()


def test_outside_the_range_that_only_the_device_knows(backend):
    """The op, which reads no value on the host, gives a row of NaN."""
    b = oracle.nft_batch(5, (2, 3))
    b.sigma[1], b.sigma[2] = 1.0001, -1e-7
    b.optimality[3], b.optimality[4] = 5.0, -0.1
    constants = (1.0, *b.args[1:], None, None, None, None, 1.0, 1e-5, 0.0)
    out = dispatch.op("nft_loss_gradient")(b.velocity, None, *constants, 1.0, False)
    assert out[0].isnan() and out[-2].flatten(1).isnan().all(1).tolist() == [False] + [True] * 4
    for value in out[4:6]:
        assert value.isnan().tolist() == [False, True, True, False, False]


# ---- one pass over the latents ----


def arguments(b: oracle.NftBatch, guided: bool) -> tuple:
    """Positional arguments of the op nft_loss_forward."""
    uncond = (b.uncond, 3.0) if guided else (None, 1.0)
    return (
        b.velocity, *uncond, b.sample, b.x0, b.old, b.sigma, b.optimality, b.ref,
        b.uncond if guided else None, b.weight if guided else None, None, 0.7, 1e-5, 0.2,
    )  # fmt: skip


def two_passes(args: tuple, grad_loss: float, uncond_grad: bool) -> tuple:
    forward = dispatch.op("nft_loss_forward")(*args)
    *_, coefs = forward
    latents = reference.NftArguments(*args).of_backward()
    back = (torch.tensor(grad_loss), coefs, *latents, uncond_grad)
    return *forward, *dispatch.op("nft_loss_backward")(*back)


def assert_same_bits(got, expected) -> None:
    for one, two in zip(got, expected, strict=True):
        assert one.dtype == two.dtype
        torch.testing.assert_close(one, two, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("shape", [(5,), (3, 24, 24), (4097,)], ids=str)
@pytest.mark.parametrize("dtype", oracle.DTYPES, ids=str)
def test_one_pass_gives_the_bits_of_two(backend, dtype, shape, guided):
    for grad_loss in (1.0, 0.3, float("nan")):
        args = arguments(oracle.nft_batch(5, shape, dtype), guided)
        got = dispatch.op("nft_loss_gradient")(*args, grad_loss, guided)
        assert_same_bits(got, two_passes(args, grad_loss, guided))


@pytest.mark.parametrize("name", ["native", "reference"])
def test_second_derivatives_and_batches_of_gradients(name):
    """The former say no, however they are asked for; the latter are each the gradient of one."""
    if name == "native" and not native.available():
        pytest.skip(native.why_not())
    b = oracle.nft_batch(4, (3, 7, 9))
    v, args = with_leaf(b)
    with dispatch.use_backend(name):
        factors = torch.tensor([1.0, -0.5])
        (both,) = torch.autograd.grad(nft_loss(*args).loss, v, factors, is_grads_batched=True)
        (one,) = torch.autograd.grad(nft_loss(*args).loss, v, factors[0])
        assert torch.equal(both[0], one) and torch.equal(both[1], -0.5 * one)
        (grad,) = torch.autograd.grad(nft_loss(*args).loss, v, create_graph=True)
        with pytest.raises(RuntimeError, match="nft_loss can be differentiated once"):
            torch.autograd.grad(grad.sum(), v)


@needs_native
def test_upstream_gradient_is_the_last_one_until_it_is_not(monkeypatch):
    """backward reads everything again where grad_loss is not what forward took it for."""
    seen = []
    backward = native.nft_loss_backward

    def counting(grad_loss, *args):
        seen.append(grad_loss.item())
        return backward(grad_loss, *args)

    monkeypatch.setattr(native, "nft_loss_backward", counting)
    monkeypatch.setattr(MODULE.LossFunction, "expected", 1.0)
    b = oracle.nft_batch(4, (3, 7, 9), torch.bfloat16)

    def gradient(factor):
        v, args = with_leaf(b)
        (factor * nft_loss(*args).loss).backward()
        return v.grad

    with dispatch.use_backend("native"):
        grads = [gradient(factor) for factor in (1.0, 0.25, 0.25, 1.0, 1.0)]
        assert seen == [0.25, 1.0]
        # A guess that was right and one that was wrong give the same bits.
        assert torch.equal(grads[1], grads[2]) and torch.equal(grads[0], grads[3])
        v, args = with_leaf(b)
        value = nft_loss(*args).loss
        (first,) = torch.autograd.grad(value, v, retain_graph=True)
        kept = first.clone()
        first.zero_()
        (second,) = torch.autograd.grad(value, v, retain_graph=True)
        assert torch.equal(second, kept)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            b.sample.add_(1)
            value.backward()


@pytest.mark.slow
@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize(
    ("shape", "dtype"), [((3, 5, 7), torch.float32), ((4100,), torch.bfloat16)], ids=str
)
def test_triton_gives_the_bits_of_the_reference(guided, shape, dtype):
    """All outputs and gradients, in Triton's interpreter."""
    if not (triton.interpreting() and dispatch.backends()["triton"]["available"]):
        pytest.skip("needs Triton and TRITON_INTERPRET=1")
    args = arguments(oracle.nft_batch(2, shape, dtype, torch.float32), guided)
    with dispatch.use_backend("reference"):
        expected = two_passes(args, 0.3, guided)
    with dispatch.use_backend("triton"):
        assert_same_bits(dispatch.op("nft_loss_gradient")(*args, 0.3, guided), expected)


@pytest.mark.slow
@pytest.mark.parametrize(("rows", "shape"), [(0, (2, 3)), (2, (0,)), (5, (3,))], ids=str)
def test_triton_at_the_edges(rows, shape):
    """Empty batch, no elements; numbers outside their range, and silenced rows of NaN."""
    if not (triton.interpreting() and dispatch.backends()["triton"]["available"]):
        pytest.skip("needs Triton and TRITON_INTERPRET=1")
    b = oracle.nft_batch(rows, shape)
    if rows == 5:
        b.sigma[1], b.optimality[2], b.x0[3, 0] = 1.5, -0.1, float("nan")
        b.weight[3] = 0
    args = arguments(b, True)
    with dispatch.use_backend("reference"):
        expected = two_passes(args, 0.3, True)
    with dispatch.use_backend("triton"):
        assert_same_bits(dispatch.op("nft_loss_gradient")(*args, 0.3, True), expected)
    nan = expected[-2].flatten(1).isnan().any(1)
    assert nan.tolist() == ([False, True, True, False, False] if rows == 5 else [False] * rows)
