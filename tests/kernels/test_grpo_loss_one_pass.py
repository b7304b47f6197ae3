"""The loss and its gradient from one pass over the latents: the bits of two passes, always."""

from __future__ import annotations

import importlib

import pytest
import torch

from flowgrpo_kernels import flow_sde, grpo_loss, reference
from flowgrpo_kernels.backends import dispatch, native, triton
from support.kernels import oracle

TRANSITIONS = flow_sde(oracle.SIGMAS)
# The package's attribute of this name is the function.
MODULE = importlib.import_module("flowgrpo_kernels.grpo_loss")
needs_native = pytest.mark.skipif(
    not native.available(), reason=f"no native library: {native.why_not()}"
)


def arguments(b: oracle.Batch, guided: bool, guard: bool) -> tuple:
    """What grpo_loss_forward takes; ratios on both sides of the clip range."""
    uncond = (b.uncond, 3.0) if guided else (None, 1.0)
    return (
        b.velocity, *uncond, b.sample, b.sample + 0.1 * b.ref, -b.weight, b.advantages,
        TRANSITIONS.table, b.step, b.ref, b.old if guided else None, b.old if guard else None,
        b.weight if guard else None, None, 0.2, 0.1, 0.3, 5.0,
    )  # fmt: skip


def two_passes(args: tuple, grad_loss: float, uncond_grad: bool) -> tuple:
    forward = dispatch.op("grpo_loss_forward")(*args)
    *_, coefs = forward
    latents = reference.LossArguments(*args).of_backward()
    back = (torch.tensor(grad_loss), coefs, *latents, uncond_grad)
    return *forward, *dispatch.op("grpo_loss_backward")(*back)


def assert_same_bits(got, expected):
    for one, two in zip(got, expected, strict=True):
        assert one.dtype == two.dtype
        torch.testing.assert_close(one, two, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(("guided", "guard"), [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize("shape", [(5,), (3, 24, 24), (4097,)], ids=str)
@pytest.mark.parametrize("dtype", oracle.DTYPES, ids=str)
def test_op_gives_the_bits_of_two(backend, dtype, shape, guided, guard):
    for grad_loss in (1.0, 0.3, float("nan")):
        args = arguments(oracle.batch(5, shape, dtype), guided, guard)
        got = dispatch.op("grpo_loss_gradient")(*args, grad_loss, guided)
        assert_same_bits(got, two_passes(args, grad_loss, guided))


@needs_native
@pytest.mark.parametrize("rows", [1, 2, 5])
def test_threads_share_what_rows_are_left(rows):
    """Rows that do not go round are split among the threads, block by block."""
    args = arguments(oracle.batch(rows, (40_001,), torch.bfloat16), True, True)
    expected = two_passes(args, 0.3, True)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3, 7):
            torch.set_num_threads(count)
            assert_same_bits(native.grpo_loss_gradient(*args, 0.3, True), expected)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.slow
def test_triton_gives_the_bits_of_two():
    if not (triton.interpreting() and dispatch.backends()["triton"]["available"]):
        pytest.skip("needs Triton and TRITON_INTERPRET=1")
    args = arguments(oracle.batch(2, (3, 5)), True, True)
    with dispatch.use_backend("triton"):
        got = dispatch.op("grpo_loss_gradient")(*args, 0.3, True)
        assert_same_bits(got, two_passes(args, 0.3, True))


@pytest.fixture
def second_passes(monkeypatch):
    """The upstream gradients for which backward had to read everything again."""
    seen = []
    backward = native.grpo_loss_backward

    def counting(grad_loss, *args):
        seen.append(grad_loss.item())
        return backward(grad_loss, *args)

    monkeypatch.setattr(native, "grpo_loss_backward", counting)
    monkeypatch.setattr(MODULE.LossFunction, "expected", 1.0)
    return seen


def loss(b: oracle.Batch, v: torch.Tensor) -> torch.Tensor:
    return grpo_loss(
        v, b.sample, b.sample + 0.1 * b.ref, -b.weight, b.advantages, TRANSITIONS, b.step,
        ref_velocity=b.ref, kl_weight=0.2, clip_range=0.2,
    ).loss  # fmt: skip


def gradient(b: oracle.Batch, factor: float) -> torch.Tensor:
    v = b.velocity.clone().requires_grad_()
    (factor * loss(b, v)).backward()
    return v.grad


@needs_native
def test_upstream_gradient_is_the_last_one_until_it_is_not(second_passes):
    b = oracle.batch(4, (3, 7, 9), torch.bfloat16)
    factors = (1.0, 0.25, 0.25, 0.25, 1 / 3, 1.0, 1.0)
    with dispatch.use_backend("native"):
        got = [gradient(b, factor) for factor in factors]
    assert second_passes == [0.25, pytest.approx(1 / 3), 1.0]
    with dispatch.use_backend("reference"):
        for one, factor in zip(got, factors, strict=True):
            torch.testing.assert_close(one, gradient(b, factor), rtol=1e-2, atol=1e-6)
    # A guess that was right and one that was wrong give the same bits.
    assert torch.equal(got[1], got[2]) and torch.equal(got[0], got[5])


@needs_native
def test_a_second_backward_is_not_handed_the_first_ones_tensor(second_passes):
    b = oracle.batch(4, (3, 7, 9))
    v = b.velocity.clone().requires_grad_()
    with dispatch.use_backend("native"):
        value = loss(b, v)
        (first,) = torch.autograd.grad(value, v, retain_graph=True)
        kept = first.clone()
        first.zero_()
        (second,) = torch.autograd.grad(value, v, retain_graph=True)
        assert second_passes == [1.0] and torch.equal(second, kept)
        value.backward()
        with pytest.raises(RuntimeError, match="second time"):
            value.backward()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            middle = v * 1
            value = loss(b, middle)
            middle.add_(1)
            value.backward()
        # So it does for what autograd gets inside a tuple.
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            value = loss(b, v)
            b.sample.add_(1)
            value.backward()


@pytest.mark.parametrize("name", ["native", "reference"])
def test_second_derivatives_and_batches_of_gradients(name):
    """The former say no, however they are asked for; the latter are each the gradient of one."""
    if name == "native" and not native.available():
        pytest.skip(native.why_not())
    b = oracle.batch(4, (3, 7, 9))
    v = b.velocity.clone().requires_grad_()
    with dispatch.use_backend(name):
        factors = torch.tensor([1.0, -0.5])
        (both,) = torch.autograd.grad(loss(b, v), v, factors, is_grads_batched=True)
        for grad, factor in zip(both, factors.tolist(), strict=True):
            torch.testing.assert_close(grad, gradient(b, factor))
        (grad,) = torch.autograd.grad(loss(b, v), v, create_graph=True)
        for allow_unused in (False, True):
            with pytest.raises(RuntimeError, match="grpo_loss can be differentiated once"):
                torch.autograd.grad(grad.sum(), v, allow_unused=allow_unused, retain_graph=True)


@needs_native
def test_tracing_takes_two_passes():
    """A subclass (fake tensors among them) cannot be asked for the value of grad_loss."""
    v = oracle.batch(2, (4,)).velocity
    with dispatch.use_backend("native"):
        assert dispatch.in_one_pass("grpo_loss_gradient", v, v) and not dispatch.in_one_pass(
            "grpo_loss_gradient", v.double(), v.double()
        )
        with torch._subclasses.FakeTensorMode() as mode:
            assert not dispatch.in_one_pass("grpo_loss_gradient", mode.from_tensor(v), v)
    with dispatch.use_backend("reference"):
        assert not dispatch.in_one_pass("grpo_loss_gradient", v, v)
