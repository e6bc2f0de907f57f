"""Which image at which step: a pure function of (seed, step)."""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np

from unlabel.draws import mix

__all__ = ["batch_at", "phase_at", "steps_for"]


def steps_for(epochs: float, n_images: int, batch_size: int) -> int:
    """Steps that show every image ``epochs`` times: ceil(epochs · N / B)."""
    # The small slack keeps 0.1 * 30 / 1 at 3 steps and not 4.
    return max(1, math.ceil(epochs * n_images / batch_size - 1e-9))


def phase_at(step: int, steps: int, phases: int) -> tuple[int, float]:
    """The phase of a step, 0 … phases - 1, and the progress in it, 0 … 1. All phases are as long, but for rounding."""
    phase = min(phases - 1, step * phases // steps)
    first, end = -(-phase * steps // phases), -(-(phase + 1) * steps // phases)
    return phase, (step - first) / max(1, end - first)


@lru_cache(maxsize=3)
def _permutation(seed: int, epoch: int, n_images: int) -> np.ndarray:
    return np.random.Generator(np.random.PCG64(mix(seed, epoch, "order"))).permutation(n_images)


def batch_at(seed: int, step: int, batch_size: int, n_images: int) -> tuple[np.ndarray, np.ndarray]:
    """Epochs and image indices, each (B,) int64, of one step.

    Step s takes positions s·B … (s+1)·B of the endless stream of per-epoch permutations, so no batch is
    partial, a batch may span two epochs, and resuming in the middle of an epoch is exact.
    """
    positions = np.arange(step * batch_size, (step + 1) * batch_size, dtype=np.int64)
    epochs, offsets = np.divmod(positions, n_images)
    indices = np.empty_like(offsets)
    for epoch in np.unique(epochs):
        here = epochs == epoch
        indices[here] = _permutation(seed, int(epoch), n_images)[offsets[here]]
    return epochs, indices
