"""The noise as random numbers: distribution, independence, and belonging to the sample."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats

from flowgrpo_kernels import initial_noise, sde_step
from support.kernels import oracle

SHAPE = (4, 32, 32)
N = 4096


@pytest.fixture(scope="module")
def rows() -> np.ndarray:
    """[64, 4096] initial noise of consecutive seeds, the worst seeds a user will pick."""
    from flowgrpo_kernels.backends import dispatch

    with dispatch.use_backend("reference"):
        return initial_noise(torch.arange(64), SHAPE).flatten(1).double().numpy()


def step_noise(seeds, step, shape=SHAPE) -> torch.Tensor:
    """The noise of a step, read back from x' with A = 1, v = 0 rows where C is known."""
    transitions = oracle.make("dance_sde", 1.0)
    zero = torch.zeros(len(seeds), *shape)
    out, _ = sde_step(zero, zero, transitions, step, seeds=seeds)
    return out / transitions.column("C")[step].view(-1, *[1] * len(shape))


def test_distribution(rows):
    assert stats.kstest(rows.ravel(), "norm").pvalue > 1e-3
    pvalues = [stats.kstest(row, "norm").pvalue for row in rows]
    assert stats.kstest(pvalues, "uniform").pvalue > 1e-3


def test_moments(rows):
    n = rows.size
    for power, mean, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96), (6, 15, 10170)):
        z = (np.mean(rows**power) - mean) / np.sqrt(variance / n)
        assert abs(z) < 4, (power, z)


def test_tails(rows):
    for bound in (3.0, 4.0):
        expected = rows.size * 2 * stats.norm.sf(bound)
        count = int((np.abs(rows) > bound).sum())
        assert abs(count - expected) < 4 * np.sqrt(expected) + 1


def test_no_autocorrelation(rows):
    flat = rows - rows.mean()
    for lag in (1, 2, 3, 4, 5, 8, 32, 1024):
        r = np.mean(flat[:, lag:] * flat[:, :-lag]) * np.sqrt(flat[:, lag:].size)
        assert abs(r) < 4, (lag, r)
    # Squares too: a pair shares its radius but its two normals are independent.
    square = rows**2 - 1
    r = np.mean(square[:, 0::2] * square[:, 1::2]) / 2 * np.sqrt(square[:, 0::2].size)
    assert abs(r) < 4


def test_rows_are_independent(rows):
    correlation = np.corrcoef(rows)[np.triu_indices(64, 1)] * np.sqrt(N)
    assert np.abs(correlation).max() < 4.8
    assert stats.kstest(correlation, "norm").pvalue > 1e-3


def test_steps_are_independent():
    seeds = torch.arange(8).repeat_interleave(8)
    step = torch.arange(8).repeat(8)
    noise = step_noise(seeds, step).flatten(1).double().numpy()
    correlation = np.corrcoef(noise)[np.triu_indices(64, 1)] * np.sqrt(N)
    assert np.abs(correlation).max() < 4.8
    assert stats.kstest(noise.ravel(), "norm").pvalue > 1e-3
    # The initial noise has its own counter: it is no step's noise.
    first = initial_noise(torch.zeros(1, dtype=torch.int64), SHAPE).flatten().double().numpy()
    assert np.abs(noise[:8] @ first).max() / np.sqrt(N) < 4.8


def test_high_seed_bits_matter():
    seeds = torch.tensor([1, 1 + (1 << 32), 1 - (1 << 63), -1])
    noise = initial_noise(seeds, (64,))
    assert len({tuple(row.tolist()) for row in noise}) == 4


def test_noise_belongs_to_the_sample(backend):
    """Any batch, any order, any backend: the same bits."""
    seeds = torch.randint(-(2**62), 2**62, (7,))
    for shape in ((3, 5, 7), (4096,), (4, 33, 32)):
        whole = initial_noise(seeds, shape)
        for rows in ([3], [6, 0, 3], [1, 1]):
            assert torch.equal(initial_noise(seeds[rows], shape), whole[rows])
        from flowgrpo_kernels.backends import dispatch

        with dispatch.use_backend("reference"):
            assert torch.equal(initial_noise(seeds, shape), whole)


def test_dtype_is_a_rounding(backend):
    seeds = torch.arange(3)
    exact = initial_noise(seeds, (100,))
    for dtype in (torch.bfloat16, torch.float16):
        assert torch.equal(initial_noise(seeds, (100,), dtype=dtype), exact.to(dtype))


def test_empty_and_bad_input():
    seeds = torch.arange(2)
    assert initial_noise(seeds[:0], (3, 4)).shape == (0, 3, 4)
    assert initial_noise(seeds, (3, 0)).shape == (2, 3, 0)
    assert initial_noise(seeds, ()).shape == (2,)
    for args, kwargs, error, name in (
        ((seeds.float(), (3,)), {}, TypeError, "seeds"),
        (([1, 2], (3,)), {}, TypeError, "seeds"),
        ((seeds[None], (3,)), {}, ValueError, "seeds"),
        ((seeds, (-1,)), {}, ValueError, "shape"),
        ((seeds, 3), {}, TypeError, "shape"),
        ((seeds, (3,)), {"dtype": torch.float64}, TypeError, "dtype"),
    ):
        with pytest.raises(error, match=name):
            initial_noise(*args, **kwargs)
