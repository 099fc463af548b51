"""FP8 in numpy: e4m3 values, scales for a tensor or for each block, and the Hadamard rotation."""

from __future__ import annotations

import numpy as np

MOST, BITS, LEAST_EXPONENT = 448.0, 3, -6
"""e4m3: the largest value, bits of the significand behind its leading one, and the exponent of the least normal number."""


def e4m3(x: np.ndarray) -> np.ndarray:
    """Each value rounded to the nearest that e4m3 has, ties to even; beyond the largest, the largest."""
    exponent = np.maximum(np.floor(np.log2(np.maximum(np.abs(x), 2.0**-40))), LEAST_EXPONENT)
    step = 2.0 ** (exponent - BITS)
    return np.clip(np.round(x / step) * step, -MOST, MOST)


def quantised(x: np.ndarray, rows: int | None = None) -> np.ndarray:
    """A matrix through e4m3 and back, scaled so that the largest value of each `rows` rows (all: None) is e4m3's largest."""
    rows = len(x) if rows is None else rows
    out = np.empty_like(x)
    for start in range(0, len(x), rows):
        block = x[start : start + rows]
        scale = np.abs(block).max() / MOST
        out[start : start + rows] = e4m3(block / scale) * scale
    return out


def hadamard(n: int) -> np.ndarray:
    """The Hadamard matrix of a power of two, scaled to be orthogonal: its own inverse, and every entry of one size."""
    found = np.ones((1, 1))
    while len(found) < n:
        found = np.block([[found, found], [found, -found]])
    return found / np.sqrt(n)


def rotation(n: int, seed: int = 0) -> np.ndarray:
    """The same with the signs of its rows drawn at random, so that no regular pattern survives it."""
    return hadamard(n) * np.random.default_rng(seed).choice((-1.0, 1.0), n)[:, None]


def attention(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
    """softmax(Q K^T / sqrt(d)) V in double precision."""
    scores = q @ k.T / np.sqrt(q.shape[1])
    weights = np.exp(scores - scores.max(axis=1, keepdims=True))
    return weights / weights.sum(axis=1, keepdims=True) @ v


def error(found: np.ndarray, wanted: np.ndarray) -> float:
    """Root mean square of the difference."""
    return float(np.sqrt(np.mean((found - wanted) ** 2)))
