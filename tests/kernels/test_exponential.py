"""exp of the ratio: its accuracy against float64, and the same bits from every backend."""

from __future__ import annotations

import math

import pytest
import torch

from flowgrpo_kernels import grpo_loss, ode, reference
from flowgrpo_kernels.backends import dispatch, native, triton
from flowgrpo_kernels.backends.triton import exponential, jit, tl

TINY = 2.0**-149
INF, NAN = math.inf, math.nan
# (x, exp(x) rounded to float32)
SPECIAL = [
    (0.0, 1.0), (-0.0, 1.0), (TINY, 1.0), (-TINY, 1.0), (INF, INF), (-INF, 0.0), (1e38, INF),
    (-1e38, 0.0), (88.72284, 3.4028235677973366e38), (89.0, INF), (-103.5, TINY), (-104.0, 0.0),
    (2.0**-25, 1.0), (-(2.0**-26), 1.0),
]  # fmt: skip


def dense() -> torch.Tensor:
    """Each range by itself: trained ratios, one octave, all that is finite, subnormal results."""
    ranges = [(-1e-3, 1e-3), (-0.36, 0.36), (-20, 20), (-87.3, 88.72), (-104, -87.3)]
    draw = torch.Generator().manual_seed(0)
    parts = [torch.empty(40_000).uniform_(low, high, generator=draw) for low, high in ranges]
    # Halfway between two powers, where the argument of the polynomial is largest.
    halves = (torch.arange(-149, 128) + 0.5) * math.log(2)
    return torch.cat([*parts, halves, halves.nextafter(torch.tensor(INF)), special()])


def special() -> torch.Tensor:
    return torch.tensor([x for x, _ in SPECIAL] + [NAN])


def same(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


def test_error_in_ulp():
    """Below 1 of a float32 everywhere, and 0.51 where a policy has hardly moved."""
    x = dense()
    got, exact = reference.exp(x).double(), x.double().exp()
    finite = exact.isfinite() & (exact < 3.4028235e38)
    exponent = torch.frexp(exact[finite]).exponent.clamp(min=-125)
    error = (got - exact)[finite].abs() / torch.ldexp(torch.ones_like(exact[finite]), exponent - 24)
    assert error.max() < 1.0
    assert error[x[finite].abs() < 1e-3].max() < 0.51
    # Nothing is right by being coarse: nine in ten are the rounded value.
    assert (got[finite] == exact[finite].float()).double().mean() > 0.85


def test_special_values():
    x, want = special(), torch.tensor([y for _, y in SPECIAL] + [NAN])
    same(reference.exp(x), want)
    # Float64 is the oracle, and is torch's.
    same(reference.exp(x.double()), x.double().exp())


def test_monotonic_through_one():
    """Neighbours of 0, among which an unclipped ratio lies, never change places."""
    x = torch.arange(-3000, 3000).float() * 2.0**-26
    assert (reference.exp(x).diff() >= 0).all()


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_ratios_are_the_bits_of_it(backend):
    """A row without noise has log_prob 0, so its ratio is exp(-old_log_prob)."""
    if backend == "native" and not native.available():
        pytest.skip(native.why_not())
    x = dense()
    latent = torch.zeros(len(x), 1)
    with dispatch.use_backend(backend):
        ratio = grpo_loss(latent, latent, latent, -x, -x, ode([1.0, 0.0]), 0).ratio
    same(ratio, reference.exp(x))


@jit
def exponential_kernel(x_ptr, y_ptr, COUNT: tl.constexpr):
    lanes = tl.arange(0, COUNT)
    tl.store(y_ptr + lanes, exponential(tl.load(x_ptr + lanes)))


@pytest.mark.skipif(not triton.AVAILABLE, reason=triton.WHY_NOT)
@pytest.mark.skipif(not triton.interpreting(), reason="not in Triton's interpreter")
def test_triton_has_the_bits_of_it():
    x = torch.zeros(1 << 18)
    x[: len(dense())] = dense()
    y = torch.empty_like(x)
    exponential_kernel[(1,)](x, y, COUNT=len(x))
    same(y, reference.exp(x))
