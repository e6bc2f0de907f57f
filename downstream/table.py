"""What a few-label table is: its arms, its images, its label counts and protocols. `evaluate.py` fills it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import torch

from downstream import finetune as ft
from downstream import self_training as st
from downstream.label_draws import LabelDraws
from unlabel.backbone import read_spec
from unlabel.cache import cache_side
from unlabel.mlp import is_mlp

__all__ = ["STATISTICS_IMAGES", "TRAINED", "Arm", "Count", "Images", "Table", "control_arms"]

Count: TypeAlias = int | Literal["all"]
TRAINED = ("finetune", "self-training", "s4l")  # protocols that train the network itself
STATISTICS_IMAGES = 2048  # unlabelled images for standardising and for a random backbone's BatchNorm


@dataclass(frozen=True)
class Arm:
    """``kind``: backbone, random, scratch, pixels or patches. ``runs``: one run folder per seed, for backbones."""

    name: str
    kind: str
    seeds: tuple[int, ...] = (0,)
    runs: tuple[Path, ...] = ()

    def protocols(self, wanted: Sequence[str]) -> list[str]:
        """Where the arm means something: scratch is trained, the other controls are probed."""
        if self.kind == "scratch":
            return [p for p in wanted if p in TRAINED]
        if self.kind in ("random", "pixels", "patches"):
            return [p for p in wanted if p not in TRAINED]
        return list(wanted)


@dataclass(frozen=True)
class Images:
    """Labelled images: ``pixels`` (N, R, R, 3) uint8 (or rows of a cache), ``y`` (N,) in 0 … K - 1."""

    pixels: Any
    y: np.ndarray
    names: list[str]
    hashes: list[str]
    clusters: np.ndarray

    def __len__(self) -> int:
        return len(self.y)


@dataclass(frozen=True)
class Table:
    """What to fill. ``unlabelled``: pixels (N, R, R, 3) for statistics, without labels; ``unlabelled_id``: which."""

    pool: Images
    test: Images
    unlabelled: Any
    classes: list[str]
    counts: tuple[Count, ...]
    n_draws: int
    protocols: tuple[str, ...]
    backbone: tuple[str, str]  # name and stem of the random and scratch networks
    image_size: int
    device: torch.device
    out: Path
    top_layers: int | None = None
    unlabelled_id: str = ""
    flip: bool = True  # of the random and scratch networks' images
    augment: bool = True  # of labelled images

    @property
    def draws(self) -> LabelDraws:
        block = max((c for c in self.counts if c != "all"), default=1)
        return LabelDraws(self.pool.y, block, self.n_draws, 0, self.classes)

    @property
    def statistics_images(self) -> np.ndarray:
        """The unlabelled images (N, R, R, 3) that statistics are taken from."""
        return np.array(self.unlabelled[:STATISTICS_IMAGES])

    def plan(self) -> Iterator[tuple[Count, int]]:
        """(labels per class, draw); `all` has one draw."""
        for count in self.counts:
            for draw in range(1 if count == "all" else self.n_draws):
                yield count, draw

    @property
    def parts(self) -> tuple[int, ...]:
        """A quarter of the largest label count, where it was not asked for: what a forecast looks back to."""
        largest = max((c for c in self.counts if c != "all"), default=0)
        return (largest // 4,) if largest >= 4 and largest // 4 not in self.counts else ()

    def student(self, count: Count, scratch: bool) -> ft.Preset:
        """How the second network of self-training is trained."""
        return st.student_for(self.labels(count), scratch, self.top_layers)

    def labels(self, count: Count) -> int:
        """How many labelled images a fit sees, all classes together."""
        return len(self.pool) if count == "all" else count * len(self.classes)

    @property
    def product(self) -> str:
        """The protocol whose classifier is kept: of those that are asked for, the first that trains the network."""
        return next((p for p in TRAINED if p in self.protocols), "finetune")

    def presets(self, count: Count, arm: Arm) -> tuple[ft.Preset, ...]:
        """How the arm is fine-tuned with this many labels per class."""
        smallest = int(np.bincount(self.pool.y).min()) if count == "all" else count
        done = arm.runs and (arm.runs[0] / "backbone.json").exists()  # runs that are still to come have the table's
        dense = is_mlp(read_spec(arm.runs[0])["name"] if done else self.backbone[0])
        return ft.presets_for(smallest, arm.kind == "scratch", self.top_layers, self.labels(count), dense)

    def fingerprint(self) -> str:
        parts = [*self.pool.hashes, "|", *self.test.hashes, *map(str, self.pool.y), *map(str, self.test.y)]
        parts += [str(self.image_size)]
        sides = {self.pool.pixels.shape[1], self.test.pixels.shape[1]}
        parts += sorted(map(str, sides - {cache_side(self.image_size)}))  # small images are packed as they are
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def control_arms(protocols: Sequence[str], seeds: Sequence[int]) -> list[Arm]:
    """The controls that mean something under these protocols."""
    arms = [Arm("random", "random", tuple(seeds)), Arm("pixels", "pixels"), Arm("patches", "patches")]
    arms += [Arm("scratch", "scratch", tuple(seeds))]
    return [a for a in arms if a.protocols(protocols)]
