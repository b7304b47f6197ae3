"""Native ops through the public functions: layouts, alignment, empty batches, steps, rounding."""

from __future__ import annotations

import pytest
import torch

from flowgrpo_kernels import (
    flow_sde,
    grpo_loss,
    initial_noise,
    log_prob,
    nft_loss,
    reference,
    sde_step,
)
from flowgrpo_kernels.backends import native
from flowgrpo_kernels.backends.dispatch import backend_of, use_backend

pytestmark = pytest.mark.skipif(
    not native.available() or backend_of("sde_step", "cpu") != "native",
    reason=f"the native backend does not run here: {native.describe()}",
)

TRANSITIONS = flow_sde(torch.linspace(1, 0, 5, dtype=torch.float64))
SHAPE = (3, 4, 9, 17)


def tensors(dtype=torch.float32, shape=SHAPE):
    g = torch.Generator().manual_seed(3)
    return [torch.randn(shape, generator=g).to(dtype) for _ in range(3)]


def results(v, x, prev):
    """Every op on the same three tensors, and the gradient for random cotangents."""
    rows = torch.arange(v.shape[0])
    out, lp = sde_step(v, x, TRANSITIONS, rows, seeds=rows)
    leaf = v.detach().requires_grad_()
    score = log_prob(leaf, x, prev, TRANSITIONS, rows)
    (gradient,) = torch.autograd.grad(score, leaf, torch.linspace(-1, 2, len(rows)))
    leaf = v.detach().requires_grad_()
    adv = torch.linspace(2, -1, len(rows))
    loss = grpo_loss(leaf, x, prev, score.detach() + 0.01, adv, TRANSITIONS, rows, clip_range=0.1)
    loss.loss.backward()
    other = v.detach().requires_grad_()
    unit = torch.linspace(0, 1, len(rows))
    nft = nft_loss(other, x, prev, x, unit, unit, ref_velocity=prev, kl_weight=0.1)
    nft.loss.backward()
    nft_results = [*(t.detach() for t in nft), other.grad]
    values = [out, lp, score.detach(), gradient, loss.loss.detach(), loss.ratio, leaf.grad]
    return values + nft_results


def equal(a, b):
    for x, y in zip(a, b, strict=True):
        assert torch.equal(x, y)


def test_rows_of_a_trajectory_are_read_where_they_lie(monkeypatch):
    """flow_grpo keeps latents [B, T + 1, ...] and hands over latents[:, i]: no copy is made."""
    latents = torch.randn(3, 4, *SHAPE[1:])
    x, prev, v = latents[:, 1], latents[:, 2], torch.randn(SHAPE)
    want = log_prob(v, x.contiguous(), prev.contiguous(), TRANSITIONS, 1)
    seen, of_library = [], native.log_prob

    def spy(velocity, uncond, scale, sample, prev_sample, *rest):
        seen.extend((sample.data_ptr(), prev_sample.data_ptr()))
        return of_library(velocity, uncond, scale, sample, prev_sample, *rest)

    monkeypatch.setattr(native, "log_prob", spy)
    with use_backend("native"):
        assert torch.equal(log_prob(v, x, prev, TRANSITIONS, 1), want)
    assert seen == [x.data_ptr(), prev.data_ptr()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_layouts_give_the_same_bits(dtype):
    v, x, prev = tensors(dtype)
    want = results(v, x, prev)
    channels_last = [t.contiguous(memory_format=torch.channels_last) for t in (v, x, prev)]
    equal(results(*channels_last), want)
    # The rows of a bigger tensor: row stride larger than a row.
    bigger = [torch.cat([t, t], 1)[:, : t.shape[1]] for t in (v, x, prev)]
    assert not bigger[0].is_contiguous()
    equal(results(*bigger), want)
    # One element into its storage: aligned to the element and no more.
    shifted = []
    for t in (v, x, prev):
        storage = torch.empty(t.numel() + 1, dtype=dtype)
        shifted.append(storage[1:].view(t.shape).copy_(t))
    assert all(t.data_ptr() % 64 for t in shifted)
    equal(results(*shifted), want)


def test_row_strides_are_read_in_place():
    v, x, prev = (t.flatten(1) for t in tensors(shape=(4, 8, 10, 10)))
    wide = torch.full((4, 1000), float("nan"))
    wide[:, 100:900] = v
    table, step = TRANSITIONS.table, torch.arange(4)
    strided = native.log_prob(wide[:, 100:900], None, 1.0, x, prev, table, step)
    assert torch.equal(strided, native.log_prob(v, None, 1.0, x, prev, table, step))
    one = v[:1].expand(4, -1)
    repeated = native.log_prob(one, None, 1.0, x, prev, table, step)
    assert torch.equal(repeated, native.log_prob(one.contiguous(), None, 1.0, x, prev, table, step))


def test_expanded_and_strided_cotangents():
    v, x, prev = tensors()
    leaf = v.requires_grad_()
    score = log_prob(leaf, x, prev, TRANSITIONS, 1)
    (ones,) = torch.autograd.grad(score.sum(), leaf, retain_graph=True)
    (same,) = torch.autograd.grad(score, leaf, torch.ones(()).expand(3), retain_graph=True)
    (strided,) = torch.autograd.grad(score, leaf, torch.ones(6)[::2])
    assert torch.equal(ones, same) and torch.equal(ones, strided)


@pytest.mark.parametrize("shape", [(0, 4, 4), (3, 0), (0, 0), (1, 1)])
def test_empty_and_smallest(shape):
    v = torch.ones(shape)
    got = results(v, v, v)
    assert got[0].shape == shape and got[6].shape == shape
    assert torch.isfinite(got[4])
    rows = torch.arange(shape[0])
    wanted = reference.log_prob(v, None, 1.0, v, v, TRANSITIONS.table, rows)
    assert torch.equal(got[2], wanted)
    assert initial_noise(rows, shape[1:]).shape == shape


def test_outputs_are_written_in_place_and_completely():
    v, x, _ = tensors(torch.bfloat16)
    trajectory = torch.full((2, *SHAPE), float("nan"), dtype=torch.bfloat16)
    scores = torch.full((2, SHAPE[0]), float("nan"))
    out, lp = sde_step(
        v, x, TRANSITIONS, 1, seeds=torch.arange(3), out=trajectory[1], log_prob_out=scores[1]
    )
    assert out.data_ptr() == trajectory[1].data_ptr() and lp.data_ptr() == scores[1].data_ptr()
    assert trajectory[0].isnan().all() and not trajectory[1].isnan().any()
    assert scores[0].isnan().all() and not scores[1].isnan().any()


def test_step_outside_the_table_is_nan_and_reads_nothing_else():
    v, x, prev = (t.flatten(1) for t in tensors())
    step = torch.tensor([1, 4, -(2**62)])
    lp = native.log_prob(v, None, 1.0, x, prev, TRANSITIONS.table, step)
    assert torch.isfinite(lp[0]) and lp[1:].isnan().all()
    out, score = torch.zeros_like(x), torch.zeros(3)
    native.sde_step(v, None, 1.0, x, TRANSITIONS.table, step, torch.arange(3), None, out, score)
    assert torch.isfinite(out[0]).all() and out[1:].isnan().all() and score[1:].isnan().all()


def test_special_values_of_float16_and_bfloat16():
    """Every 16-bit pattern is read, and every rounding boundary written, as torch does."""
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    ones = torch.zeros(1, 2**16)
    table = torch.zeros(1, 10)
    table[0, 0] = 1.0
    step = torch.zeros(1, dtype=torch.int64)
    for dtype in (torch.float16, torch.bfloat16):
        sample = bits.view(dtype)[None].contiguous()
        exact = sample.float()
        # Halfway to the next value and a little to either side.
        for scale in (1.0, 1 + 2**-9, 1 + 2**-12, 1 + 2**-12 + 2**-23, 1 - 2**-13):
            source = exact * scale
            out, lp = torch.zeros(1, 2**16, dtype=dtype), torch.zeros(1)
            # x' = A x + C noise with x = 0 and C = 1 rounds the noise itself.
            table[0, 2] = 1.0
            native.sde_step(ones, None, 1.0, out * 0, table, step, None, source, out, lp)
            torch.testing.assert_close(
                out.float(), source.to(dtype).float(), rtol=0, atol=0, equal_nan=True
            )
