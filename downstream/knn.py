"""Nearest neighbours on frozen features: a probe that fits no weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from downstream import choosing
from downstream.features import Block, BlockStats, StageFeatures, standardised

GRID_K = (50, 20, 10, 5, 3, 1)  # smoothest first
CHUNK = 1024  # images compared with all labels at a time

Stats = dict[Block, BlockStats]


@dataclass(frozen=True)
class KnnResult:
    """The labelled examples, and the k and the features to compare by."""

    blocks: tuple[Block, ...]
    stats: Stats
    examples: np.ndarray  # (n, D) unit vectors
    y: np.ndarray  # (n,) their classes
    n_classes: int
    chosen: dict[str, Any]
    on_grid_edge: bool

    def predict(self, features: StageFeatures, idx: np.ndarray | None = None) -> np.ndarray:
        """(n,) classes of the rows `idx` (all rows where None)."""
        idx = np.arange(len(features)) if idx is None else np.asarray(idx)
        out = np.empty(len(idx), np.int64)
        for start in range(0, len(idx), CHUNK):
            part = idx[start : start + CHUNK]
            likeness = _unit(features, self.blocks, self.stats, part) @ self.examples.T
            out[start : start + CHUNK] = _vote(likeness, self.y, self.n_classes, [self.chosen["k"]])[0]
        return out


def fit_knn(
    features: StageFeatures,
    train_idx: np.ndarray,
    y: np.ndarray,
    unlabelled_stats: Stats,
    per_class: int | Literal["all"],
    seed: int = 0,
    *,
    stage: str | None = None,
    clusters: np.ndarray | None = None,
) -> KnnResult:
    """k-NN by cosine similarity of standardised features; arguments as in `fit_probe`.

    1-4 labels per class: k = 1. From 5, k (at most half the labels that a fold fits on) by cross-validated
    error with the one-standard-error rule towards larger k, on the very folds that the probe uses; from 25
    the features too. Error and not log-loss, because the votes of few neighbours are no probabilities.
    """
    count = choosing.labels_per_class(y, per_class)
    sets = choosing.feature_sets(features, count, stage)
    name, k, edge = next(iter(sets)), 1, False
    n_classes = int(y.max()) + 1
    if count >= choosing.FEW:
        keep = choosing.subsample(y, seed)
        few = y[keep]
        folds = choosing.splits(few, count, seed, None if clusters is None else clusters[keep])
        grid = [g for g in GRID_K if g <= min(len(fit) for fit, _ in folds) / 2]

        def errors(blocks: tuple[Block, ...]) -> np.ndarray:
            z = _unit(features, blocks, unlabelled_stats, train_idx[keep])
            likeness, total = z @ z.T, np.zeros((len(grid), len(few)))
            for fit, held_out in folds:
                said = _vote(likeness[np.ix_(held_out, fit)], few[fit], n_classes, grid)
                total[:, held_out] += said != few[held_out]
            return total * len(few) / sum(len(held_out) for _, held_out in folds)

        name, choice = choosing.choose(sets, errors)
        k, edge = grid[choice], choice == 0 and grid[0] == max(GRID_K)  # beyond 1, or half the labels, nothing is
    blocks = sets[name]
    examples = _unit(features, blocks, unlabelled_stats, train_idx)
    chosen = {"k": k, "features": name}
    return KnnResult(blocks, unlabelled_stats, examples, y, n_classes, chosen, edge)


def _unit(features: StageFeatures, blocks: Sequence[Block], stats: Stats, idx: np.ndarray) -> np.ndarray:
    z = standardised(features, blocks, stats, idx)
    return z / np.maximum(np.linalg.norm(z, axis=1, keepdims=True), 1e-12)


def _vote(likeness: np.ndarray, y: np.ndarray, n_classes: int, grid: Sequence[int]) -> np.ndarray:
    """(len(grid), m) classes by majority of the k nearest for each k; a tie goes to the nearer neighbours.

    likeness: (m, n) similarities to the n examples of classes y.
    """
    largest = max(grid)
    near = np.argpartition(-likeness, min(largest, likeness.shape[1]) - 1, axis=1)[:, :largest]
    near = np.take_along_axis(near, np.argsort(-np.take_along_axis(likeness, near, 1), axis=1, kind="stable"), 1)
    # Similarities are at most 1, so a vote of 1 + similarity / (4k) orders ties and overrules no majority.
    votes = np.eye(n_classes)[y[near]]  # (m, largest, K)
    close = np.take_along_axis(likeness, near, 1)[:, :, None]
    return np.stack([(votes[:, :k] * (1 + close[:, :k] / (4 * k))).sum(axis=1).argmax(axis=1) for k in grid])
