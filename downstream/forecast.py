"""What twice and four times as many labels would give, from how accuracy rose up to those that there are.

On the scale of the square root of the error over that of guessing, falls from one doubling to the next are about as
steep, and luck about as large, whatever the error. There the fall to come is a constant and a share of the fall per
doubling from a quarter of the labels to all of them. Constants, shares and the width of the intervals were fitted to
the curves of `scripts/forecast_study.py`; nothing is chosen on the data at hand. docs/labels.md says how well it does.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from scipy.stats import norm

__all__ = ["LEVEL", "Forecast", "fall", "forecast", "scaled", "spread"]

LEVEL = 0.8  # of the intervals
# times as many labels: the constant and the share; and the weights of `spread` in the variance
WEIGHTS: dict[int, tuple[float, ...]] = {2: (0.045, 0.058), 4: (0.079, 0.187)}
VARIANCE: dict[int, tuple[float, ...]] = {2: (0.000305, 0.0585, 0.577), 4: (0.000994, 0.101, 0.625)}


@dataclass(frozen=True)
class Forecast:
    """An accuracy as a fraction, with an interval meant to hold it in four cases of five."""

    mean: float
    low: float
    high: float


def scaled(error: float, classes: int) -> float:
    """The square root of an error over that of guessing."""
    return math.sqrt(error / (1 - 1 / classes))


def fall(error: float, earlier: float, times: float, classes: int) -> float:
    """How far the scaled error fell per doubling, from ``earlier`` to ``error`` with ``times`` as many labels."""
    return (scaled(earlier, classes) - scaled(error, classes)) / math.log2(times)


def spread(error: float, labels: int, images: int) -> np.ndarray:
    """(3,): what the variance of a fall is made of: any curve's, so few labels', and so few test images'."""
    return np.array([1.0, 1 / labels, (1 - error) / images])


def forecast(
    accuracy: float, earlier: float, counts: tuple[int, int], classes: int, images: int
) -> dict[int, Forecast]:
    """The accuracy with two and four times as many labels.

    Args:
        accuracy: with the larger of the ``counts`` of labels per class, a fraction.
        earlier: with the smaller, about a quarter of it.
        classes: how many there are.
        images: test images (clusters of near-duplicates) that they were measured on.
    """
    most, fewer = max(counts), min(counts)
    error = 1 - accuracy
    slope, last = fall(error, 1 - earlier, most / fewer, classes), scaled(error, classes)
    of, found = spread(error, most * classes, images), {}
    for times, (constant, share) in WEIGHTS.items():
        middle = constant + share * slope
        half = float(norm.ppf(0.5 + LEVEL / 2)) * math.sqrt(of @ VARIANCE[times])
        ends = [max(last - f, 0.0) ** 2 * (1 - 1 / classes) for f in (middle, middle - half, middle + half)]
        found[times] = Forecast(*(max(0.0, 1 - error) for error in ends))
    return found
