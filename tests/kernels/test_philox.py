"""Philox words against Random123's published vectors; Box-Muller against float64."""

from __future__ import annotations

import math

import pytest
import torch

from flowgrpo_kernels import philox

# Random123, tests/kat_vectors, "philox4x32 10": counter, key, result.
KNOWN_ANSWERS = (
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    (
        (0xFFFFFFFF,) * 4,
        (0xFFFFFFFF,) * 2,
        (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
    ),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
)


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_known_answers(counter, key, expected):
    seed = key[0] | key[1] << 32
    seed = torch.tensor([seed - (1 << 64) if seed >> 63 else seed])
    words = philox.philox4x32(*(torch.tensor([c]) for c in counter), seed)
    assert tuple(int(w) for w in words) == expected


def test_counter_layout():
    """Block q of step s under a seed is the generator at (q low, q high, s, 0)."""
    seeds, steps = torch.tensor([5, -7]), torch.tensor([3, philox.INITIAL_STEP])
    words = philox.philox_words(seeds, steps, 6)
    for b in range(2):
        q = torch.arange(6)
        zero = torch.zeros_like(q)
        single = philox.philox4x32(q, zero, steps[b].expand(6), zero, seeds[b].expand(6))
        for got, expected in zip(words, single, strict=True):
            assert torch.equal(got[b], expected)


def exact_normals(radius: torch.Tensor, angle: torch.Tensor):
    """Box-Muller on the same words in float64."""
    u = (radius.double() * 2.0**-32 + 2.0**-33).clamp(max=1.0)
    r = (-2 * u.log()).sqrt()
    fraction = ((angle << 2) & 0xFFFFFFFF).double()
    fraction = torch.where(fraction >= 2**31, fraction - 2**32, fraction) * 2.0**-32
    c, s = (math.pi / 2 * fraction).cos(), (math.pi / 2 * fraction).sin()
    c = torch.where((angle >> 31) == 1, -c, c)
    swap = ((angle >> 30) & 1) == 1
    return r * torch.where(swap, s, c), r * torch.where(swap, c, s)


def test_box_muller_accuracy():
    g = torch.Generator().manual_seed(1)
    radius = torch.randint(0, 1 << 32, (200_000,), generator=g)
    angle = torch.randint(0, 1 << 32, (200_000,), generator=g)
    for got, exact in zip(
        philox.box_muller(radius, angle), exact_normals(radius, angle), strict=True
    ):
        assert got.dtype == torch.float32
        # The rounding of u to float32 is part of the definition; near u = 1 it shows in r.
        close = radius < (1 << 32) - (1 << 20)
        assert (got.double() - exact)[close].abs().max() < 1.5e-6


def test_box_muller_edges():
    edge = torch.tensor([0, 1, 0x7FFFFFFF, 0x80000000, 0xFFFFFF7F, 0xFFFFFFFF])
    radius, angle = (x.flatten() for x in torch.meshgrid(edge, edge, indexing="ij"))
    for z in philox.box_muller(radius, angle):
        assert torch.isfinite(z).all() and z.abs().max() <= 6.77
    z0, z1 = philox.box_muller(torch.tensor([0]), torch.tensor([0]))
    assert z0.item() == pytest.approx(math.sqrt(66 * math.log(2)), rel=1e-6) and z1.item() == 0


def test_four_quadrants():
    """The top two bits of the angle word turn by quarter turns and reflections: all signs occur."""
    angle = (torch.arange(4) << 30) + 12345
    z0, z1 = philox.box_muller(torch.full((4,), 1 << 28), angle)
    assert {(a > 0, abs(a) > abs(b)) for a, b in zip(z0.tolist(), z1.tolist(), strict=True)} == {
        (True, True), (False, True), (True, False)
    }  # fmt: skip
    assert {b > 0 for b in z1.tolist()} == {True, False}


def test_elements_follow_words():
    """Elements 4q .. 4q + 3 come from block q, and a shorter row is a prefix of a longer one."""
    seeds, steps = torch.tensor([11]), torch.tensor([2])
    words = philox.philox_words(seeds, steps, 3)
    z = philox.normals(seeds, steps, 12)
    pairs = [*philox.box_muller(*words[:2]), *philox.box_muller(*words[2:])]
    assert torch.equal(z.view(3, 4), torch.stack([p[0] for p in pairs], dim=1))
    for n in range(12):
        assert torch.equal(philox.normals(seeds, steps, n), z[:, :n])


def test_block_counter_is_64_bit():
    """A block number past 2^32 enters both counter words (samples beyond 2^34 elements)."""
    q = (1 << 32) + 5
    seed, step, zero = torch.tensor([9]), torch.tensor([1]), torch.tensor([0])
    low = philox.philox4x32(torch.tensor([5]), zero, step, zero, seed)
    high = philox.philox4x32(
        torch.tensor([q & 0xFFFFFFFF]), torch.tensor([q >> 32]), step, zero, seed
    )
    assert all(int(a) != int(b) for a, b in zip(low, high, strict=True))
