"""How many labels a control needs to match an arm: the labels that pretraining saved.

The control's accuracy between two measured label counts is taken to be linear in the logarithm of the count. Its hits
are interpolated, image by image and draw by draw, so that the paired interval of the difference can be asked for at any
count in between. The 95 % interval of the labels is the inversion of those (Fieller 1954): all counts at which the
difference to the arm may be zero.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from downstream import stats

__all__ = ["Match", "labels_to_match"]

STEPS = 8  # counts looked at between two that were measured


@dataclass(frozen=True)
class Match:
    """Labels per class. 0: fewer than the least that was measured; None: more than the most."""

    labels: float | None
    low: float | None
    high: float | None


def labels_to_match(correct: np.ndarray, control: Mapping[float, np.ndarray], clusters: np.ndarray) -> Match:
    """The control's labels per class at which it is as good as the arm.

    Args:
        correct: (seeds, draws, test images), the arm's, right or wrong.
        control: the same of the control, by labels per class.
        clusters: (test images,) as for `stats.paired`.
    """
    counts = sorted(control)
    steps = np.arange((len(counts) - 1) * STEPS + 1)
    x = np.interp(steps / STEPS, np.arange(len(counts)), np.log(counts))
    found = []
    for k, step in zip(*np.divmod(steps, STEPS), strict=True):
        low, high = control[counts[k]], control[counts[min(k + 1, len(counts) - 1)]]
        hits = low + step / STEPS * (high - low.astype(np.float64))
        found.append(stats.paired(*stats.alike(correct, hits), clusters))
    return Match(
        _first(x, np.array([e.mean for e in found])),
        _first(x, np.array([e.ci_low for e in found])),
        _last(x, np.array([e.ci_high for e in found])),
    )


def _first(x: np.ndarray, y: np.ndarray) -> float | None:
    """exp of where y, from above, first reaches zero; 0 where it is below from the beginning."""
    below = np.flatnonzero(y <= 0)
    if len(below) == 0:
        return None
    k = int(below[0])
    if k == 0:
        return 0.0 if y[0] < 0 else float(np.exp(x[0]))
    return float(np.exp(_zero(x, y, k - 1)))


def _last(x: np.ndarray, y: np.ndarray) -> float | None:
    """exp of where y falls below zero for good."""
    above = np.flatnonzero(y >= 0)
    if len(above) == 0:
        return 0.0
    k = int(above[-1])
    return float(np.exp(_zero(x, y, k))) if k + 1 < len(x) else None


def _zero(x: np.ndarray, y: np.ndarray, k: int) -> float:
    """Where the line from point k to the next is zero."""
    return float(x[k] + (x[k + 1] - x[k]) * y[k] / (y[k] - y[k + 1]))
