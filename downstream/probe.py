"""Linear probe: logistic regression on frozen features, everything that is chosen chosen inside the labels."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from scipy.linalg import solve_triangular
from scipy.special import log_softmax

from downstream import choosing
from downstream.features import Block, BlockStats, StageFeatures, standardised
from downstream.logistic import logistic_path, one_thread

# Set once, on cats and dogs, with features of length about 1: the best C lies between 0.3 (weak features, 250
# labels per class) and 30 (10 labels), on the easy ten classes of digits above 100; with 1-4 labels hardly
# anything depends on it.
FIXED_C = 10.0  # for 1-4 labels per class, where nothing is chosen
GRID_C = (0.5, 2.0, 8.0, 32.0, 128.0, 512.0)  # strongest regularisation first
CHUNK = 4096  # images judged at a time
WEIGHTS_AT_ONCE = 1 << 25  # numbers that the folds which are fitted at once may need, a few times over

Stats = dict[Block, BlockStats]


@dataclass(frozen=True)
class ProbeResult:
    """A fitted probe for K classes. Its weights act on raw features: the standardising is folded in."""

    blocks: tuple[Block, ...]
    coef: tuple[np.ndarray, ...]  # (K, D) for each block
    intercept: np.ndarray  # (K,)
    chosen: dict[str, Any]
    on_grid_edge: bool

    def logits(self, features: StageFeatures, idx: np.ndarray | None = None) -> np.ndarray:
        """(n, K) of the rows `idx` (all rows where None); softmax of it is the class probabilities."""
        idx = np.arange(len(features)) if idx is None else np.asarray(idx)
        out = np.tile(self.intercept, (len(idx), 1))
        for start in range(0, len(idx), CHUNK):
            for block, weights in zip(self.blocks, self.coef, strict=True):
                out[start : start + CHUNK] += features.block(block)[idx[start : start + CHUNK]] @ weights.T
        return out

    def predict(self, features: StageFeatures, idx: np.ndarray | None = None) -> np.ndarray:
        """(n,) classes."""
        return self.logits(features, idx).argmax(axis=1)


def fit_probe(
    features: StageFeatures,
    train_idx: np.ndarray,
    y: np.ndarray,
    unlabelled_stats: Stats,
    per_class: int | Literal["all"],
    seed: int = 0,
    *,
    stage: str | None = None,
    judged: choosing.Judged | None = None,
    clusters: np.ndarray | None = None,
) -> ProbeResult:
    """Fit by the few-label protocol (see `downstream.choosing`).

    Args:
        features: of all images.
        train_idx: (n,) rows of `features` whose labels may be used.
        y: (n,) their classes, 0 to K-1, each present.
        unlabelled_stats: `feature_stats` of unlabelled images.
        per_class: labels per class; decides what is chosen.
        seed: of the folds.
        stage: confine the probe to one stage, for the table of stages.
        judged: of the same labels, for several stages: feature sets are judged once.
        clusters: (n,) of near-duplicates, whose labels are held out together; None: there are none.
    """
    count = choosing.labels_per_class(y, per_class)
    sets = choosing.feature_sets(features, count, stage)
    name, c, edge = next(iter(sets)), FIXED_C, False
    if count >= choosing.FEW:
        name, c, edge = _choose(features, train_idx, y, unlabelled_stats, sets, count, seed, judged, clusters)
    blocks = sets[name]
    coef, intercept = _fit(standardised(features, blocks, unlabelled_stats, train_idx), y, c)
    mean = np.concatenate([unlabelled_stats[b].mean for b in blocks])
    scale = np.concatenate([unlabelled_stats[b].scale for b in blocks])
    coef = coef * scale
    cuts = np.cumsum([len(unlabelled_stats[b].mean) for b in blocks])[:-1]
    chosen = {"C": c, "features": name}
    return ProbeResult(blocks, tuple(np.split(coef, cuts, axis=1)), intercept - coef @ mean, chosen, edge)


def fit_head(x: np.ndarray, y: np.ndarray, stats: BlockStats, c: float = FIXED_C) -> tuple[np.ndarray, np.ndarray]:
    """Weights (K, D) and bias (K,) of a linear layer on raw features x (n, D): where fine-tuning starts."""
    coef, intercept = _fit((x - stats.mean) * stats.scale, y, c)
    coef = coef * stats.scale
    return coef, intercept - coef @ stats.mean


def _choose(
    features: StageFeatures,
    train_idx: np.ndarray,
    y: np.ndarray,
    stats: Stats,
    sets: choosing.FeatureSets,
    count: int,
    seed: int,
    judged: choosing.Judged | None,
    clusters: np.ndarray | None,
) -> tuple[str, float, bool]:
    """(feature set, C, whether that C is the first or last of the grid) by cross-validated log-loss."""
    keep = choosing.subsample(y, seed)
    few = y[keep]
    folds = choosing.splits(few, count, seed, None if clusters is None else clusters[keep])
    fitted = np.zeros((len(folds), len(few)), bool)
    for mine, (fit, _) in zip(fitted, folds, strict=True):
        mine[fit] = True
    times = (~fitted).sum(axis=0)  # that a label is held out

    def log_losses(blocks: tuple[Block, ...]) -> np.ndarray:
        z = _same_products(standardised(features, blocks, stats, train_idx[keep]))
        at_once = max(1, WEIGHTS_AT_ONCE // ((int(y.max()) + 1) * max(len(few), 25 * z.shape[1])))
        parts = [fitted[start : start + at_once] for start in range(0, len(fitted), at_once)]
        paths = zip(*(logistic_path(z, few, GRID_C, some) for some in parts), strict=True)
        losses = np.full((len(GRID_C), len(few)), np.inf)
        for row, fits in zip(losses, paths, strict=True):
            row[:] = 0
            for some, (coef, intercept) in zip(parts, fits, strict=True):
                log_p = log_softmax(np.einsum("nd,fkd->fnk", z, coef, optimize=True) + intercept[:, None], axis=2)
                row -= np.where(some, 0, log_p[:, np.arange(len(few)), few]).sum(axis=0)
            row /= times
            if choosing.rising(losses):
                break
        return losses

    with one_thread(len(few)):
        name, k = choosing.choose(sets, log_losses, judged)
    return name, GRID_C[k], k in (0, len(GRID_C) - 1)


def _fit(z: np.ndarray, y: np.ndarray, c: float) -> tuple[np.ndarray, np.ndarray]:
    """Weights (K, D) and bias (K,) of multinomial logistic regression on standardised features."""
    with one_thread(len(y)):
        same = _same_products(z)
        coef, intercept = next(logistic_path(same, y, (c,), tol=1e-8))
        if same is z:
            return coef[0], intercept[0]
        return solve_triangular(same, coef[0].T, lower=True, trans=1).T @ z, intercept[0]


def _same_products(z: np.ndarray) -> np.ndarray:
    """z (n, d), or where n < d the triangle (n, n) whose rows have the inner products of z's.

    With fewer labels than features the solution lies in the span of the examples (the gradient of the loss does, and
    the penalty pulls to zero everything outside), so that only their inner products count: the fit is the same, and
    smaller.
    """
    if len(z) < z.shape[1]:
        with contextlib.suppress(np.linalg.LinAlgError):  # of two equal images
            return np.linalg.cholesky(z @ z.T)
    return z
