"""Error bars for few-label accuracies: what would another draw, other test photos, another seed have given?

A result is a crossed table: right or wrong, for each draw of labels (and each pretraining seed) and each test
image. Both the draws and the images are a sample, and near-duplicate images count as one (a cluster), so
neither a binomial interval nor the spread over draws alone is honest.

*One pretraining seed*: the two-way bootstrap (Owen 2007, "The pigeonhole bootstrap") over draws and clusters
of test images. By itself it is wrong in two ways that matter with ten draws or fewer: it counts the
draw x image interaction three times, and it takes the spread of D draws for known (it is low by (D-1)/D, and
a normal quantile stands where a t quantile belongs). So the bootstrap gives the shape of the interval and the
crossed analysis of variance its width: with A, B the variance of the mean as the draws' means and the
clusters' means tell it and C the interaction's part, which both contain,

    V = max(A - C, 0) + max(B - C, 0) + C,      df = V^2 / sum(part^2 / part's df)      (Satterthwaite 1946)

and the resamples' percentiles are stretched about the mean until they are 2 t(df) sqrt(V) apart. In a
simulation with 3 to 20 draws this covers 93 to 97 % where the plain percentiles cover 80 to 100 % (with 3
draws and the least kind shares of variance, down to 90 %). An accuracy that fewer than ten images keep from 0 or
100 % gets at least Clopper and Pearson's interval (1934) for as many of the clusters, which covers more than 95 %.

*Three seeds or more*: t interval on the seeds' means, widened by what the seeds have in common and their
spread cannot show: the test images and the draws.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
from scipy.stats import beta
from scipy.stats import t as student

from unlabel.errors import UserError

RARE = 10  # images (clusters) that are wrong, or right: with fewer, the exact binomial bound counts, too

Verdict = Literal["helps", "does not help", "cannot tell with these labels"]


@dataclass(frozen=True)
class Estimate:
    """A mean accuracy, or mean difference of two, as a fraction, with its 95 % interval."""

    mean: float
    ci_low: float
    ci_high: float
    n_draws: int
    n_seeds: int
    unit: Literal["draw", "seed"]  # what the interval generalises over, beside the test images
    note: str  # the same in words, for the report


def verdict(ci_low: float, ci_high: float) -> Verdict:
    """What an interval of a paired difference says; an interval that reaches zero says nothing."""
    if ci_low > 0:
        return "helps"
    return "does not help" if ci_high < 0 else "cannot tell with these labels"


def summarise(correct: np.ndarray, clusters: np.ndarray, *, n_resamples: int = 2000, seed: int = 0) -> Estimate:
    """Mean accuracy with its interval.

    Args:
        correct: (draws, test images) or (seeds, draws, test images), right or wrong; the same draws and
            images for each seed.
        clusters: (test images,) cluster of near-duplicates that each test image belongs to; any labels.

    Raises:
        UserError: fewer than two clusters of test images.
    """
    return _estimate(np.asarray(correct, np.float64), clusters, 0.0, n_resamples, seed)


def paired(
    correct: np.ndarray, versus: np.ndarray, clusters: np.ndarray, *, n_resamples: int = 2000, seed: int = 0
) -> Estimate:
    """Mean of `correct - versus` with its interval; the difference is taken inside each resample.

    Shapes as in `summarise`; row d of both must come from the same draw d.
    """
    if np.shape(correct) != np.shape(versus):
        raise ValueError(f"paired results differ in shape: {np.shape(correct)} and {np.shape(versus)}")
    # The mean is linear: resampling the difference is resampling both with the same weights.
    difference = np.asarray(correct, np.float64) - np.asarray(versus, np.float64)
    return _estimate(difference, clusters, -1.0, n_resamples, seed)


def alike(correct: np.ndarray, versus: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Two results (seeds, draws, test images) in one shape, to be compared.

    A single seed stands beside each seed of the other, whose spread the interval then counts, whichever of the two it
    is; a single draw (that of all labels) stands beside each draw.
    """
    a, b = np.broadcast_arrays(correct, versus)
    return a, b


def _estimate(values: np.ndarray, clusters: np.ndarray, lowest: float, n_resamples: int, seed: int) -> Estimate:
    values = values[None] if values.ndim == 2 else values
    n_seeds, n_draws, n_test = values.shape
    _, member = np.unique(clusters, return_inverse=True)
    if member.shape != (n_test,):
        raise ValueError(f"{n_test} test images, {member.shape} clusters")
    sizes = np.bincount(member).astype(np.float64)  # (clusters,)
    if len(sizes) < 2:
        raise UserError("an interval needs at least two clusters of test images; give a larger --test source")
    sums = np.stack([np.bincount(member, row) for row in values.reshape(-1, n_test)])
    sums = sums.reshape(n_seeds, n_draws, len(sizes))
    mean = float(values.mean())
    # Clusters differ in size, so the mean is a ratio; its linearisation has one residual per cell.
    residuals = (sums - mean * sizes) * (len(sizes) / n_test)
    if n_seeds >= 3:
        half = _seeds_half_width(residuals)
        low, high = mean - half, mean + half
        unit, over = "seed", f"pretraining seeds{', draws of labels' if n_draws > 1 else ''} and test images"
        over += "" if n_draws > 1 else ", for this one draw of labels"
    else:
        half = _half_width(*_crossed(residuals.mean(axis=0)))
        resampled = _resample(sums.mean(axis=0), sizes, n_resamples, seed)
        q_low, q_high = np.quantile(resampled, [0.025, 0.975])
        stretch = 2 * half / (q_high - q_low) if q_high > q_low else 0.0
        low, high = mean + stretch * (q_low - mean), mean + stretch * (q_high - mean)
        if lowest < 0 and abs(mean) <= half and low * high > 0:
            # Where all images that differ favour one side, no resample crosses zero; the width says that it may be.
            low, high = mean - half, mean + half
        unit = "draw"
        over = "test images only, for this one draw of labels" if n_draws == 1 else "draws of labels and test images"
        over += ", for this backbone" if n_seeds == 1 else f", for these {n_seeds} backbones"
    note = f"95 % interval over {over}"
    if half == 0:  # no spread to go by: what so many images without an exception leave open (Clopper & Pearson)
        open_ = 1 - 0.025 ** (1 / len(sizes))
        low, high = mean - open_, mean + open_
        note += "; the results do not vary, so its width is the exact bound for that many images"
    elif lowest == 0 and min(mean, 1 - mean) * len(sizes) < RARE:
        # So few exceptions tell little of their own spread: not narrower than what they leave open by themselves.
        right, wrong = mean * len(sizes), (1 - mean) * len(sizes)
        low = min(low, beta.ppf(0.025, right, wrong + 1) if right > 0 else 0.0)
        high = max(high, beta.ppf(0.975, right + 1, wrong) if wrong > 0 else 1.0)
    low, high = max(float(low), lowest), min(float(high), 1.0)
    return Estimate(mean, low, high, n_draws, n_seeds, unit, note)


def _crossed(table: np.ndarray) -> tuple[float, list[tuple[float, float]]]:
    """Variance of the mean of a (draws, clusters) table of random effects, and its (part, df) terms."""
    n_draws, n_clusters = table.shape
    columns = table.mean(axis=0)
    b = columns.var(ddof=1) / n_clusters
    if n_draws == 1:
        return float(b), [(float(b), n_clusters - 1.0)]
    rows = table.mean(axis=1)
    a = rows.var(ddof=1) / n_draws
    df_c = (n_draws - 1.0) * (n_clusters - 1.0)
    c = np.square(table - rows[:, None] - columns + table.mean()).sum() / df_c / table.size
    variance = max(a - c, 0.0) + max(b - c, 0.0) + c
    terms = [(b if b > c else 0.0, n_clusters - 1.0), (c, df_c), (a if a > c else 0.0, n_draws - 1.0)]
    return float(variance), [(float(part), df) for part, df in terms]


def _half_width(variance: float, terms: list[tuple[float, float]]) -> float:
    if variance <= 0:
        return 0.0
    df = variance**2 / sum(part**2 / df for part, df in terms)
    return float(student.ppf(0.975, max(df, 1.0)) * np.sqrt(variance))


def _seeds_half_width(table: np.ndarray) -> float:
    """Half the t interval for a (seeds, draws, clusters) table."""
    n_seeds = len(table)
    between = float(table.mean(axis=(1, 2)).var(ddof=1) / n_seeds)
    average = table.mean(axis=0)
    shared, terms = _crossed(average)
    # The average over seeds still holds 1/n of each seed's own interactions, which `between` has already.
    own = sum(_crossed(one - average)[0] for one in table) / (n_seeds * (n_seeds - 1))
    widened = max(shared - own, 0.0)
    if widened > 0:
        terms = [(part * widened / shared, df) for part, df in terms]
    else:
        terms = []
    return _half_width(between + widened, [(between, n_seeds - 1.0), *terms])


def _resample(sums: np.ndarray, sizes: np.ndarray, n_resamples: int, seed: int) -> np.ndarray:
    """(resamples,) means of the two-way bootstrap over the rows and columns of (draws, clusters) sums."""
    clusters = _weights(len(sizes), n_resamples, seed)
    draws = _weights(len(sums), n_resamples, seed + 1)
    per_draw = clusters @ sums.T.astype(np.float32)  # (resamples, draws)
    return (draws * per_draw).sum(axis=1) / (clusters @ sizes.astype(np.float32)) / len(sums)


@lru_cache(maxsize=8)
def _weights(n: int, n_resamples: int, seed: int) -> np.ndarray:
    """(resamples, n) how often each of n items is in each resample; kept, for a table asks for it often."""
    rng = np.random.default_rng([seed, n])
    weights = np.empty((n_resamples, n), np.float32)
    for row in weights:
        row[:] = np.bincount(rng.integers(0, n, n), minlength=n)
    weights.setflags(write=False)
    return weights
