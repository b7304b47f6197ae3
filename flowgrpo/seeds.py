"""Random numbers without state: a draw is a hash of (run seed, purpose, indices).

Nothing in a run reads or advances a global generator, so a draw depends only on its purpose: an
iteration can be repeated alone, a resumed run draws what the uninterrupted one would have drawn,
and a sample keeps its numbers whatever batch or process it is in.
"""

from __future__ import annotations

import numpy as np

# Purposes of draws. The values are part of all recorded runs, so they never change.
PROMPTS, WINDOW, ROW, GROUP, EVALUATION, ADAPTER, LEVEL, LEVEL_NOISE = range(1, 9)
CURATED, CURATED_LEVEL, CURATED_NOISE = range(9, 12)

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def _splitmix64(x: np.ndarray) -> np.ndarray:
    """The output function of SplitMix64 (Steele, Lea, Flood 2014), exact modulo 2^64."""
    x = x + _GOLDEN
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def draw(seed: int, purpose: int, *indices: int | np.ndarray) -> np.ndarray:
    """Hash seed, purpose and indices, one after the other, to uint64; arrays broadcast."""
    state = _splitmix64(np.asarray([seed], dtype=np.uint64))
    for word in (purpose, *indices):
        state = _splitmix64(state ^ np.asarray(word, dtype=np.uint64))
    return state


def below(bound: int, seed: int, purpose: int, *indices: int | np.ndarray) -> np.ndarray:
    """Draw integers in [0, bound), int64, bound < 2^32; the bias is below bound / 2^32."""
    # The high half of the hash times bound, without its low 32 bits: a fraction of bound.
    high = draw(seed, purpose, *indices) >> np.uint64(32)
    return ((high * np.uint64(bound)) >> np.uint64(32)).astype(np.int64)


def uniform(seed: int, purpose: int, *indices: int | np.ndarray) -> np.ndarray:
    """Draw numbers in [0, 1), float64: multiples of 2^-53."""
    return (draw(seed, purpose, *indices) >> np.uint64(11)) * 2.0**-53


def permutation(size: int, seed: int, purpose: int, *indices: int) -> np.ndarray:
    """Draw an order of range(size), int64 [size]."""
    # Stable, so that equal hashes have one order on all machines.
    return np.argsort(draw(seed, purpose, *indices, np.arange(size)), kind="stable")


def sample_seeds(seed: int, purpose: int, *indices: int | np.ndarray) -> np.ndarray:
    """Draw seeds for the noise of samples, int64 in [0, 2^63)."""
    return (draw(seed, purpose, *indices) >> np.uint64(1)).astype(np.int64)
