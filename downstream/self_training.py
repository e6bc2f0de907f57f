"""Self-training: unlabelled images, under the names that a fine-tuned network gives them, train a second network.

The first network names whole images, the second learns from augmented ones (pseudo-labels, Lee 2013; Xie et al. 2020,
https://arxiv.org/abs/1911.04252). Names are probabilities, and they are balanced: a network that knows few labels
prefers some classes, so that each class is given the share of the unlabelled images that it has of the labelled ones.
Draws have as many labels of each class, so this takes the classes to be equally common among the unlabelled images,
too: where they are far from it, self-training is not for them. The second network begins where the first did, and
nothing about it is chosen. No label of an unlabelled image, and no test image, takes part.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from downstream.finetune import GROWTH, SCRATCH_GROWTH, Preset
from unlabel.augment import clean
from unlabel.cache import Pixels
from unlabel.pictures import to_uint8

__all__ = ["SCRATCH_STUDENT", "STUDENT", "Joined", "balanced", "joined_names", "student_for"]

# Set on development photos of cats and dogs with 10 and 50 labels per class: docs/recipes.md has what else was tried.
# That of `scratch` was not tuned: its own preset, on larger batches.
STUDENT = Preset("student", 400, 2e-3, layer_decay=0.35, batch_size=64)
SCRATCH_STUDENT = Preset("scratch-student", 800, 1e-3, batchnorm="train", batch_size=64, larger=False)
ROUNDS = 20  # of scaling the classes and normalising the images in turn


def student_for(labels: int, scratch: bool, top_layers: int | None = None) -> Preset:
    """How the second network is trained; with many ``labels`` (all classes together) for as many of their passes as
    fine-tuning is, at least, counted in images seen."""
    preset, growth = (SCRATCH_STUDENT, SCRATCH_GROWTH) if scratch else (STUDENT, GROWTH)
    seen = growth.steps_for(labels, Preset.batch_size) * Preset.batch_size
    steps = max(preset.steps, math.ceil(seen / preset.batch_size))
    return replace(preset, steps=steps, top_layers=None if scratch else top_layers)


def balanced(log_p: np.ndarray, share: np.ndarray) -> np.ndarray:
    """(N, K) log-probabilities to probabilities whose columns' means are ``share`` (K,): each class is scaled, then
    each image normalised, in turn (Sinkhorn & Knopp 1967)."""
    log_p = log_p.astype(np.float64)
    p = np.exp(log_p - log_p.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    for _ in range(ROUNDS):
        p *= share / np.maximum(p.mean(0), 1e-12)
        p /= p.sum(1, keepdims=True)
    return p


def joined_names(y: np.ndarray, log_p: np.ndarray) -> np.ndarray:
    """(n + N, K) float32: the labels y (n,) as they are, then what a network says of N further images, balanced."""
    known = np.eye(log_p.shape[1])[y]
    return np.concatenate([known, balanced(log_p, known.mean(0))]).astype(np.float32)


class Joined:
    """Images of two sources as one, (n + N, R, R, 3) uint8; the second's are resized to the first's where they differ.

    Args:
        first: (n, R, R, 3).
        second: (N, S, S, 3).
    """

    def __init__(self, first: Pixels, second: Pixels) -> None:
        self.first, self.second = first, second

    def __len__(self) -> int:
        return len(self.first) + len(self.second)

    def __getitem__(self, rows: Any) -> np.ndarray:
        rows = np.asarray(rows)
        early, side = rows < len(self.first), self.first.shape[1]
        out = np.empty((len(rows), side, side, 3), np.uint8)
        if early.any():
            out[early] = self.first[rows[early]]
        if not early.all():
            late = np.array(self.second[rows[~early] - len(self.first)])
            out[~early] = late if late.shape[1] == side else to_uint8(clean(torch.from_numpy(late), side))
        return out
