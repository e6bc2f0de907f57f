"""What may be chosen with how many labels, and how: inside the labels, never on the test set.

| labels per class | features | C of the probe, k of the k-NN |
| --- | --- | --- |
| 1-4 | the last two stages pooled 2x2 | fixed |
| 5-24 | the same | stratified 5-fold cross-validation, repeated three times |
| 25 and more | each stage 1x1, each stage 2x2, the last two 2x2 | stratified 5-fold cross-validation |

Among feature sets the lowest cross-validated loss wins. Within the winner, the one-standard-error rule
(Breiman et al. 1984): the simplest setting whose loss is within one standard error of the lowest.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Literal

import numpy as np
from sklearn.model_selection import RepeatedStratifiedKFold, StratifiedGroupKFold

from downstream.features import Block, StageFeatures

FEW, MANY = 5, 25  # labels per class from which the setting, and from which the features, are chosen
MAX_LABELS = 2000  # choices are made on at most so many labels, or MANY of each class, where that is more

FeatureSets = dict[str, tuple[Block, ...]]
Split = tuple[np.ndarray, np.ndarray]  # positions to fit on, positions held out
Judge = Callable[[tuple[Block, ...]], np.ndarray]  # cross-validated losses (settings, labels), simplest setting first
Judged = dict[tuple[Block, ...], np.ndarray]


def labels_per_class(y: np.ndarray, per_class: int | Literal["all"]) -> int:
    """The number that decides what may be chosen; for "all", that of the rarest class."""
    return int(np.bincount(y).min()) if per_class == "all" else per_class


def feature_sets(features: StageFeatures, per_class: int, stage: str | None = None) -> FeatureSets:
    """The candidates by name, all within `stage` where one is given. A control has one: its pseudo-stage."""
    if not features.one:
        return {name: ((name, "2x2"),) for name in features.stages}
    last = (stage,) if stage else features.stages[-2:]
    sets: FeatureSets = {"+".join(last) + " 2x2": tuple((s, "2x2") for s in last)}
    if per_class >= MANY:
        sets |= {" ".join(b): (b,) for s in ((stage,) if stage else features.stages) for b in features.blocks(s)}
    return sets


def splits(y: np.ndarray, per_class: int, seed: int, clusters: np.ndarray | None = None) -> list[Split]:
    """Stratified folds of the labels: at most five, and no more than labels per class, so that every part of
    every fold has every class. The same for every arm and every feature set.

    Near-duplicates, which have the same number in ``clusters`` (n,), are on one side of each fold: else what knows
    its labels by heart would be chosen. What is held out may lack a class then; where what is fitted on would, they
    are not held together.
    """
    smallest, repeats = int(np.bincount(y).min()), 1 if per_class >= MANY else 3
    if clusters is not None and repeats_any(clusters):
        different = min(len(np.unique(clusters[y == c])) for c in np.unique(y))
        found: list[Split] = []
        for k in range(repeats if different > 1 else 0):
            folder = StratifiedGroupKFold(min(5, different), shuffle=True, random_state=seed + k)
            found += folder.split(y, y, clusters)
        if found and all(len(held) and len(np.unique(y[fit])) == len(np.unique(y)) for fit, held in found):
            return found
    folder = RepeatedStratifiedKFold(n_splits=min(5, smallest), n_repeats=repeats, random_state=seed)
    return list(folder.split(y, y))


def repeats_any(clusters: np.ndarray) -> bool:
    """Whether some of the labelled images are near-duplicates of one another."""
    return len(np.unique(clusters)) < len(clusters)


def grouping(clusters: np.ndarray) -> list[str]:
    """What a stored cell's key says of it: nothing without near-duplicates, else which they are, as a digest,
    whatever the clusters are called."""
    if not repeats_any(clusters):
        return []
    _, first, which = np.unique(clusters, return_index=True, return_inverse=True)
    return ["near-duplicates together", hashlib.sha256(first[which].astype("<i8").tobytes()).hexdigest()]


def subsample(y: np.ndarray, seed: int) -> np.ndarray:
    """Sorted positions of the labels that choices are made on: all, or MAX_LABELS of them, stratified.

    A rare class keeps 25 of its labels, or what it has.
    """
    if len(y) <= MAX_LABELS:
        return np.arange(len(y))
    rng = np.random.default_rng(seed)
    members = [rng.permutation(np.flatnonzero(y == c)) for c in np.unique(y)]
    return np.sort(np.concatenate([m[: max(MANY, len(m) * MAX_LABELS // len(y))] for m in members]))


def choose(sets: FeatureSets, judge: Judge, judged: Judged | None = None) -> tuple[str, int]:
    """The best feature set and its setting.

    Args:
        sets: the candidates.
        judge: gives the losses of one, each label's averaged over the repeats.
        judged: losses found with these labels and folds before; it gains those found now.
    """
    best, lowest, judged = ("", 0), np.inf, {} if judged is None else judged
    for name, blocks in sets.items():
        if blocks not in judged:
            judged[blocks] = judge(blocks)
        losses = judged[blocks]
        if losses.mean(axis=1).min() < lowest:
            best, lowest = (name, one_standard_error(losses)), losses.mean(axis=1).min()
    return best


def rising(losses: np.ndarray) -> bool:
    """Whether the last known of the (settings, labels) losses is more than a standard error above the lowest: along a
    path of ever weaker regularisation they fall and then rise, and what follows (inf until it is known) is not asked
    for. It is the longest part of the fitting."""
    known = losses[np.isfinite(losses).all(axis=1)].mean(axis=1)
    best = int(known.argmin())
    error = losses[best].std(ddof=1) / np.sqrt(losses.shape[1])
    return bool(known[-1] > known[best] + error)


def one_standard_error(losses: np.ndarray) -> int:
    """Which of the settings, simplest first, to take from (settings, labels) cross-validated losses.

    Each loss is one label's, averaged over the repeats, so that the standard error is over labels.
    """
    mean = losses.mean(axis=1)
    best = int(mean.argmin())
    error = losses[best].std(ddof=1) / np.sqrt(losses.shape[1])
    return int(np.flatnonzero(mean <= mean[best] + error)[0])
