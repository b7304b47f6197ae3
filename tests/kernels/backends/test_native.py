"""The native library gives the bits of reference.py: dtypes, sizes, threads, instruction sets."""

from __future__ import annotations

import itertools

import pytest
import torch

from flowgrpo_kernels import cps, dance_sde, flow_sde, ode, reference
from flowgrpo_kernels.backends import native
from flowgrpo_kernels.backends.native_library import ISAS
from flowgrpo_kernels.transitions import Transitions

needs_native = pytest.mark.skipif(
    not native.available(), reason=f"no native library: {native.why_not()}"
)
pytestmark = needs_native

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SIGMAS = torch.linspace(1, 0, 6, dtype=torch.float64)
# Row r of each part is step r; together: SDE, constant SDE, CPS (k = 1) and quiet ODE rows.
TABLE = Transitions.cat(flow_sde(SIGMAS), dance_sde(SIGMAS), cps(SIGMAS), ode(SIGMAS)).table
# Elements a sample: below a vector, around a group of 64, around a block of 4096, several blocks.
SIZES = (1, 3, 17, 63, 64, 65, 1000, 1025, 4095, 4096, 4097, 9001)


@pytest.fixture(autouse=True)
def restore():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    native.select_isa("auto")


@pytest.fixture(params=ISAS)
def isa(request):
    """Runs a test on each instruction set that this CPU has."""
    if ISAS.index(request.param) > native.library().flowgrpo_native_isa_best():
        pytest.skip(f"this CPU has no {request.param}")
    return native.select_isa(request.param)


def latents(rows: int, size: int, velocity_dtype, sample_dtype, seed: int = 0) -> dict:
    """Everything the ops read, with a different step in every row."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape, dtype=torch.float32):
        return torch.randn(*shape, generator=g).to(dtype)

    x = {k: normal(rows, size, dtype=velocity_dtype) for k in ("v", "u", "ref", "ref_u", "old")}
    x["sample"] = normal(rows, size, dtype=sample_dtype)
    x["step"] = torch.arange(rows) * 7 % TABLE.shape[0]
    x["seeds"] = torch.randint(-(2**63), 2**63 - 1, (rows,), generator=g)
    x["old_lp"], x["adv"] = normal(rows), 3 * normal(rows)
    return x


def step(module, x, uncond=True, noise=None, scale=4.5):
    out = torch.full_like(x["sample"], float("nan"))
    lp = torch.full((len(x["step"]),), float("nan"))
    seeds = x["seeds"] if noise is None else None
    u = x["u"] if uncond else None
    module.sde_step(
        x["v"], u, scale if uncond else 1.0, x["sample"], TABLE, x["step"], seeds, noise, out, lp
    )
    return out, lp


def same(a: torch.Tensor, b: torch.Tensor) -> None:
    """Equal values; the sign of a zero is not part of the contract."""
    assert a.dtype == b.dtype and a.shape == b.shape
    torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("size", SIZES)
def test_step_equals_reference(size, isa):
    for velocity_dtype, sample_dtype in itertools.product(DTYPES, DTYPES):
        x = latents(20, size, velocity_dtype, sample_dtype)
        for uncond in (False, True):
            for a, b in zip(step(native, x, uncond), step(reference, x, uncond), strict=True):
                same(a, b)


@pytest.mark.parametrize("dtype", DTYPES)
def test_step_with_given_noise(dtype, isa):
    x = latents(20, 5000, torch.float16, torch.bfloat16)
    noise = torch.randn(20, 5000).to(dtype)
    for a, b in zip(step(native, x, noise=noise), step(reference, x, noise=noise), strict=True):
        same(a, b)


def loss_args(x, guided, ref, ref_uncond, guard, weights, clip=0.1):
    prev = step(reference, x, guided)[0]
    lp = reference.log_prob(x["v"], x["u"] if guided else None, 4.5 if guided else 1.0,
                            x["sample"], prev, TABLE, x["step"])  # fmt: skip
    rows = len(x["step"])
    weight = torch.arange(rows).remainder(3).float() if weights else None
    return (
        x["v"], x["u"] if guided else None, 4.5 if guided else 1.0, x["sample"], prev,
        lp + 0.2 * x["old_lp"], x["adv"], TABLE, x["step"], x["ref"] if ref else None,
        x["ref_u"] if ref_uncond else None, x["old"] if guard else None, weight,
        None if weight is None else 2 * weight, 0.04 if ref else 0.0, clip, 2 * clip, 1.5,
    )  # fmt: skip


VARIANTS = [
    dict(guided=False, ref=False, ref_uncond=False, guard=False, weights=False),
    dict(guided=True, ref=True, ref_uncond=True, guard=False, weights=True),
    dict(guided=True, ref=True, ref_uncond=False, guard=True, weights=True),
    dict(guided=False, ref=False, ref_uncond=False, guard=True, weights=False),
]


@pytest.mark.parametrize("variant", VARIANTS)
def test_loss_and_gradient_equal_reference(variant, isa):
    for size, (velocity_dtype, sample_dtype) in zip(
        SIZES[1:], itertools.cycle(itertools.product(DTYPES, DTYPES)), strict=False
    ):
        x = latents(20, size, velocity_dtype, sample_dtype)
        args = loss_args(x, **variant)
        got, want = native.grpo_loss_forward(*args), reference.grpo_loss_forward(*args)
        for a, b in zip(got, want, strict=True):
            same(a, b)
        coefs, grad = want[6], torch.tensor(1.7)
        back = (grad, coefs, *args[:5], *args[7:12], variant["guided"])
        for a, b in zip(
            native.grpo_loss_backward(*back), reference.grpo_loss_backward(*back), strict=True
        ):
            same(a, b)


def nft_args(x, guided: bool, ref: bool, weights: bool, beta=0.7, floor=1e-5):
    """NftArguments of the same latents: x0 in the velocity's dtype, sigma and r over [0, 1]."""
    rows = len(x["step"])
    unit = torch.linspace(0, 1, rows)
    weight = torch.arange(rows).remainder(3).float() if weights else None
    return (
        x["v"], x["u"] if guided else None, 4.5 if guided else 1.0, x["sample"], x["ref_u"],
        x["old"], unit.flip(0), unit, x["ref"] if ref else None,
        x["ref_u"] if ref and guided else None, weight, None if weight is None else 2 * weight,
        beta, floor, 0.04 if ref else 0.0,
    )  # fmt: skip


NFT_VARIANTS = [
    dict(guided=False, ref=False, weights=False),
    dict(guided=False, ref=True, weights=True),
    dict(guided=True, ref=True, weights=False, beta=1.0, floor=0.9),
]


@pytest.mark.parametrize("variant", NFT_VARIANTS)
def test_nft_loss_and_gradient_equal_reference(variant, isa):
    """All of it, bit for bit: there is no exp in it."""
    pairs = itertools.cycle(itertools.product(DTYPES, DTYPES))
    for size, (velocity_dtype, sample_dtype) in zip(SIZES, pairs, strict=False):
        args = nft_args(latents(20, size, velocity_dtype, sample_dtype), **variant)
        got = native.nft_loss_gradient(*args, 1.7, variant["guided"])
        want = reference.nft_loss_gradient(*args, 1.7, variant["guided"])
        for a, b in zip(got, want, strict=True):
            same(a, b)
        shared = reference.NftArguments(*args).of_backward()
        back = (torch.tensor(1.7), want[7], *shared, variant["guided"])
        for a, b in zip(native.nft_loss_backward(*back), want[8:], strict=True):
            same(a, b)


def test_log_prob_and_gradient_equal_reference(isa):
    for size in SIZES:
        x = latents(20, size, torch.bfloat16, torch.float32)
        prev = step(reference, x)[0]
        args = (x["v"], x["u"], 4.5, x["sample"], prev, TABLE, x["step"])
        same(native.log_prob(*args), reference.log_prob(*args))
        cotangent = x["adv"]
        got = native.log_prob_backward(cotangent, *args, True)
        want = reference.log_prob_backward(cotangent, *args, True)
        for a, b in zip(got, want, strict=True):
            same(a, b)


@pytest.mark.parametrize("dtype", DTYPES)
def test_initial_noise_equals_reference(dtype, isa):
    seeds = torch.tensor([0, -1, 2**63 - 1, -(2**63), 1 << 32])
    for shape in ([5], [3, 64, 65], [0]):
        same(
            native.initial_noise(seeds, shape, dtype),
            reference.initial_noise(seeds, shape, dtype),
        )


@pytest.mark.slow
def test_threads_do_not_change_a_bit():
    for rows, size in ((1, 300_001), (5, 65536), (37, 4097)):
        x = latents(rows, size, torch.bfloat16, torch.float32)
        args = loss_args(x, **VARIANTS[2])
        results = []
        for threads in (1, 2, 3, 8):
            torch.set_num_threads(threads)
            forward = native.grpo_loss_forward(*args)
            back = (torch.tensor(1.0), forward[6], *args[:5], *args[7:12], True)
            nft = native.nft_loss_gradient(*nft_args(x, True, True, True), 1.0, True)
            results.append([*step(native, x), *forward, *native.grpo_loss_backward(*back), *nft])
        for other in results[1:]:
            for a, b in zip(results[0], other, strict=True):
                assert torch.equal(a, b)


def test_a_row_does_not_depend_on_its_batch():
    x = latents(9, 5003, torch.float16, torch.float16)
    out, lp = step(native, x)
    alone = {k: t[4:5] for k, t in x.items()}
    one, one_lp = step(native, alone)
    assert torch.equal(one[0], out[4]) and torch.equal(one_lp[0], lp[4])


def test_ops_agree_bit_for_bit_and_the_ratio_is_one():
    for dtype in DTYPES:
        x = latents(20, 7777, torch.bfloat16, dtype)
        prev, lp = step(native, x)
        again = native.log_prob(x["v"], x["u"], 4.5, x["sample"], prev, TABLE, x["step"])
        args = (x["v"], x["u"], 4.5, x["sample"], prev, lp, x["adv"], TABLE, x["step"])
        loss = native.grpo_loss_forward(*args, *[None] * 5, 0.0, 1e-4, 1e-4, 5.0)
        assert torch.equal(lp, again) and torch.equal(lp, loss[4])
        assert torch.equal(loss[5], torch.ones(20))
