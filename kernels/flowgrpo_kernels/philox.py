"""Counter-based normal noise: a sample's noise is a function of its seed, the step and the element.

    words  = Philox4x32-10(counter, key)
    key    = (low 32 bits of seed, high 32 bits of seed)
    counter = (low 32 bits of q, high 32 bits of q, step, 0)       q = element // 4

The four words of block q give the normals of elements 4q .. 4q + 3: (w0, w1) the first two, (w2,
w3) the last two. The first word of a pair is the radius, the second the angle (Box-Muller):

    u     = float32(w) 2^-32 + 2^-33                      in [2^-33, 1], so |z| <= 6.77
    r     = sqrt(-2 ln u)
    angle = one of four quadrants (top two bits of the word) and a fraction (the low 30 bits)

ln, sin and cos are the short polynomials below, evaluated by Horner's rule with every product and
sum rounded to float32 on its own (no fma). sqrt is IEEE. So the normals are the same bits on every
backend and instruction set, not only the uniforms. Against exact Box-Muller on the same words the
error is below 1e-6.

Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011 (Random123).
"""

from __future__ import annotations

import torch
from torch import Tensor

PHILOX_M0, PHILOX_M1 = 0xD2511F53, 0xCD9E8D57
PHILOX_W0, PHILOX_W1 = 0x9E3779B9, 0xBB67AE85
PHILOX_ROUNDS = 10
# The step counter of the initial noise: no step of a table reaches it.
INITIAL_STEP = 0xFFFFFFFF

# -2 ln(1 + f) / f on [sqrt(1/2) - 1, sqrt(2) - 1], constant term first; relative error 3e-8.
LOG_POLY = (
    -2.0,
    0.999999762,
    -0.666683733,
    0.500041485,
    -0.399136662,
    0.331247866,
    -0.299045354,
    0.287336797,
    -0.174446985,
)
MINUS_2_LN2 = -1.38629436
# sin(pi/2 f) / f and (cos(pi/2 f) - 1) / f^2 in f^2, for |f| <= 1/2; errors 3e-9 and 4e-8.
SIN_POLY = (1.57079637, -0.64596349, 0.079680033, -0.00460165786)
COS_POLY = (-1.23369765, 0.25360322, -0.0204172824)

_MASK = 0xFFFFFFFF


def philox_words(seeds: Tensor, steps: Tensor, num_blocks: int) -> tuple[Tensor, ...]:
    """Computes the four words of blocks 0 .. num_blocks - 1 for each sample.

    seeds, steps: int64 [B]; returns four int64 [B, num_blocks] with values in [0, 2^32).
    """
    blocks = torch.arange(num_blocks, device=seeds.device)[None, :]
    c0, c1 = (blocks & _MASK).expand(seeds.shape[0], -1), blocks >> 32
    return philox4x32(c0, c1, (steps & _MASK)[:, None], torch.zeros_like(blocks), seeds[:, None])


def philox4x32(c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor, seeds: Tensor) -> tuple[Tensor, ...]:
    """Computes Philox4x32-10 of broadcastable int64 words in [0, 2^32), keyed by 64-bit seeds."""
    k0, k1 = seeds & _MASK, (seeds >> 32) & _MASK
    for _ in range(PHILOX_ROUNDS):
        # The product of two 32-bit words wraps into the sign of an int64: its bits are right, and
        # what an arithmetic shift smears above bit 31 is masked off before the next product.
        p0, p1 = c0 * PHILOX_M0, c2 * PHILOX_M1
        c0, c2 = ((p1 >> 32) ^ (c1 ^ k0)) & _MASK, ((p0 >> 32) ^ (c3 ^ k1)) & _MASK
        c1, c3 = p1, p0
        k0, k1 = (k0 + PHILOX_W0) & _MASK, (k1 + PHILOX_W1) & _MASK
    return c0, c1 & _MASK, c2, c3 & _MASK


def box_muller(radius: Tensor, angle: Tensor) -> tuple[Tensor, Tensor]:
    """Makes two float32 normals of two words (int64 in [0, 2^32))."""
    u = radius.to(torch.float32) * 2.0**-32 + 2.0**-33
    # u = (1 + f) 2^e with 1 + f in [sqrt(1/2), sqrt(2)); 0x3F3504F3 are the bits of sqrt(1/2).
    bits = u.view(torch.int32)
    e = (bits - 0x3F3504F3) >> 23
    f = (bits - (e << 23)).view(torch.float32) - 1.0
    square = e.to(torch.float32) * MINUS_2_LN2 + f * horner(LOG_POLY, f)
    # torch's float32 sqrt on the CPU (MKL) is not always correctly rounded; by float64 it is.
    r = torch.sqrt(square.to(torch.float64)).to(torch.float32)

    f = (angle << 2).to(torch.int32).to(torch.float32) * 2.0**-32
    z = f * f
    s = f * horner(SIN_POLY, z)
    c = z * horner(COS_POLY, z) + 1.0
    c = torch.where((angle >> 31) != 0, -c, c)
    swap = ((angle >> 30) & 1) != 0
    return r * torch.where(swap, s, c), r * torch.where(swap, c, s)


def normals(seeds: Tensor, steps: Tensor, numel: int) -> Tensor:
    """Draws float32 [B, numel] standard normals for int64 seeds [B] and steps [B]."""
    num_blocks = (numel + 3) // 4
    w0, w1, w2, w3 = philox_words(seeds, steps, num_blocks)
    z0, z1 = box_muller(w0, w1)
    z2, z3 = box_muller(w2, w3)
    z = torch.stack((z0, z1, z2, z3), dim=-1).view(seeds.shape[0], 4 * num_blocks)
    return z[:, :numel]


def horner(coefficients: tuple[float, ...], x: Tensor) -> Tensor:
    """Computes a polynomial, lowest coefficient first."""
    result = x * coefficients[-1] + coefficients[-2]
    for c in coefficients[-3::-1]:
        result = result * x + c
    return result
