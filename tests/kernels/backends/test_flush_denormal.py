"""Subnormals under torch.set_flush_denormal(True), which sets a register of the calling thread.

float16: conversions are exact and no float32 on the way is subnormal, so nothing changes. bfloat16
and float32: their subnormals are float32 subnormals, which products and sums of the calling thread
take for 0; the native threads do as it does. torch's own threads do not, so there the reference is
that of one thread.
"""

from __future__ import annotations

import pytest
import torch

from flowgrpo_kernels import flow_sde, ode, reference
from flowgrpo_kernels.backends import native
from flowgrpo_kernels.backends.native_library import ISAS
from flowgrpo_kernels.transitions import Transitions

pytestmark = pytest.mark.skipif(
    not native.available(), reason=f"no native library: {native.why_not()}"
)

SIGMAS = [1.0, 0.9, 0.8, 0.6, 0.3, 0.0]
TABLE = Transitions.cat(flow_sde(SIGMAS), ode(SIGMAS)).table
# Enough elements to wake the other threads, and a tail.
ROWS, SIZE = 3, 20_011
BITS = {torch.float16: 10, torch.bfloat16: 7, torch.float32: 23}


@pytest.fixture(autouse=True)
def restore():
    threads = torch.get_num_threads()
    yield
    torch.set_flush_denormal(False)
    torch.set_num_threads(threads)
    native.select_isa("auto")


@pytest.fixture(params=ISAS)
def isa(request):
    """Runs a test on each instruction set that this CPU has."""
    if ISAS.index(request.param) > native.library().flowgrpo_native_isa_best():
        pytest.skip(f"this CPU has no {request.param}")
    return native.select_isa(request.param)


def subnormal(dtype: torch.dtype, seed: int) -> torch.Tensor:
    """[ROWS, SIZE] subnormals of both signs, a few zeros among them."""
    g = torch.Generator().manual_seed(seed)
    width = torch.int32 if dtype == torch.float32 else torch.int16
    bits = torch.randint(0, 1 << BITS[dtype], (ROWS, SIZE), generator=g, dtype=width)
    return bits.view(dtype) * torch.where(torch.rand(ROWS, SIZE, generator=g) < 0.5, -1, 1).to(
        dtype
    )


def results(module, dtype, threads: int, flush: bool) -> list[torch.Tensor]:
    """Each op on subnormal latents: x' and its score, scores, the losses and their gradients."""
    v, x, noise, ref = (subnormal(dtype, seed) for seed in range(4))
    step = torch.tensor([2, 8, 4])
    grad, advantages = torch.tensor([1.0, -2.0, 0.5]), torch.tensor([0.5, -1.0, 2.0])
    torch.set_num_threads(threads)
    torch.set_flush_denormal(flush)
    try:
        out, lp = torch.zeros_like(x), torch.zeros(ROWS)
        module.sde_step(v, None, 1.0, x, TABLE, step, None, noise, out, lp)
        score = (v, None, 1.0, x, noise, TABLE, step)
        dv, _ = module.log_prob_backward(grad, *score, False)
        loss = (v, None, 1.0, x, noise, lp, advantages, TABLE, step, ref)
        *loss, dloss, _ = module.grpo_loss_gradient(
            *loss, None, None, None, None, 0.1, 0.1, 0.1, 5.0, 1.0, False
        )
        half = torch.full((ROWS,), 0.5)
        nft = (v, None, 1.0, x, noise, ref, half, half, v, None, None, None, 1.0, 1e-5, 0.1)
        *nft, dnft, _ = module.nft_loss_gradient(*nft, 1.0, False)
        return [out, lp, module.log_prob(*score), dv, dloss, *loss, dnft, *nft]
    finally:
        torch.set_flush_denormal(False)


def bits(x: torch.Tensor) -> torch.Tensor:
    """The bits of x without the sign of a zero, compared as integers: a flushed == takes subnormals
    for zeros."""
    integers = x.contiguous().view(torch.int32 if x.dtype == torch.float32 else torch.int16)
    return torch.where(integers << 1 == 0, 0, integers)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", BITS, ids=str)
def test_bits_do_not_depend_on_the_threads(dtype, isa):
    if not torch.set_flush_denormal(False):
        pytest.skip("this CPU flushes nothing")
    # Threads that are started now do not inherit the mode of the caller.
    results(native, dtype, 4, flush=False)
    expected = results(reference, dtype, 1, flush=True)
    for threads in (1, 2, 4):
        for got, want in zip(results(native, dtype, threads, flush=True), expected, strict=True):
            assert torch.equal(bits(got), bits(want)), threads
    # And afterwards they compute as before.
    exact = results(reference, dtype, 1, flush=False)
    for got, want in zip(results(native, dtype, 4, flush=False), exact, strict=True):
        assert torch.equal(bits(got), bits(want))
    step, flushed = bits(exact[0]), bits(expected[0])
    if dtype == torch.float16:
        assert torch.equal(step, flushed) and step.ne(0).any()
    else:
        assert step.ne(0).any() and not flushed.any()


def test_every_float16_becomes_its_float32(isa):
    """All 65,536, flushed or not: x' = velocity in a row with A = 0, B = 1, C = 0."""
    v = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.float16)[None]
    table = torch.zeros(1, TABLE.shape[1])
    table[0, 1] = 1
    for flush in (False, True):
        torch.set_flush_denormal(flush)
        for dtype in (torch.float32, torch.float16):
            x, lp, step = torch.zeros(v.shape, dtype=dtype), torch.zeros(1), torch.zeros(1).long()
            out = torch.zeros_like(x)
            native.sde_step(v, None, 1.0, x, table, step, None, None, out, lp)
            nan = v.isnan()
            assert torch.equal(out.isnan(), nan)
            assert torch.equal(bits(out)[~nan], bits(v.to(dtype))[~nan])
