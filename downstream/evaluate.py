"""The few-label table: arms × protocols × label counts × draws, each cell saved as soon as it is there.

An arm is a pretrained backbone (one run per seed) or a control. Every arm sees the same draws of labels and the
same test images; the test labels are read in one place, after everything has been chosen.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from downstream import finetune as ft
from downstream import self_training as st
from downstream.choosing import MAX_LABELS, Judged, grouping
from downstream.classifier import name_classes, save_classifier, stored_key
from downstream.controls import Patches, Pixels
from downstream.features import BlockStats, StageFeatures, block_stats, extract, feature_stats, joined
from downstream.knn import GRID_K, fit_knn
from downstream.probe import fit_head, fit_probe
from downstream.s4l import SETTING
from downstream.table import STATISTICS_IMAGES, TRAINED, Arm, Count, Images, Table, control_arms
from unlabel.augment import clean
from unlabel.backbone import Backbone, build_backbone, load_backbone, read_spec, stem_for
from unlabel.batchnorm import estimate_statistics
from unlabel.cache import Rows
from unlabel.checkpoint import file_sha256, write_atomic
from unlabel.draws import mix
from unlabel.errors import UserError

__all__ = ["STATISTICS_IMAGES", "TRAINED", "Arm", "Count", "Images", "Table", "control_arms", "fill"]

CELLS = 2  # raise it when a change of the protocol makes stored cells wrong


@dataclass
class Cell:
    """One fit: its predictions on the test images (T,), and what was chosen."""

    predicted: np.ndarray
    about: dict[str, Any]


class Store:
    """Cells on disk, so that an interrupted table goes on where it stopped."""

    def __init__(self, table: Table) -> None:
        self.folder, self.data = table.out / "cells", table.fingerprint()
        self.classes = len(table.classes)

    def digest(self, key: Sequence[Any]) -> str:
        return hashlib.sha256(json.dumps([CELLS, self.data, *key]).encode()).hexdigest()[:24]

    def _path(self, key: Sequence[Any]) -> Path:
        return self.folder / f"{self.digest(key)}.json"

    def get(self, key: Sequence[Any]) -> Cell | None:
        try:
            about = json.loads(self._path(key).read_text())
            return Cell(np.array(about.pop("predicted"), np.int64), about)
        except (FileNotFoundError, ValueError, KeyError):
            return None

    def put(self, key: Sequence[Any], cell: Cell) -> None:
        text = json.dumps({**cell.about, "predicted": cell.predicted.tolist()}, separators=(",", ":"))
        write_atomic(self._path(key), text.encode())


def identity(arm: Arm, k: int, table: Table) -> list[Any]:
    """What a cell of this arm depends on, beside the data."""
    if arm.kind == "backbone":
        return ["backbone", file_sha256(arm.runs[k] / "backbone.safetensors")]
    if arm.kind in ("random", "scratch"):
        name, stem = table.backbone
        return [arm.kind, name, stem_for(name, table.image_size, stem), arm.seeds[k]]
    return [arm.kind]


def network(arm: Arm, k: int, table: Table) -> Backbone:
    """The arm's backbone for its k-th seed, in eval mode."""
    if arm.kind == "backbone":
        return load_backbone(arm.runs[k]).to(table.device)
    name, stem = table.backbone
    backbone = build_backbone(name, table.image_size, stem, mix(arm.seeds[k], "random") >> 33, table.flip)
    backbone = backbone.to(table.device)
    if arm.kind == "random":
        clean_statistics(backbone, table, table.image_size)
    return backbone.eval()


def clean_statistics(backbone: Backbone, table: Table, size: int) -> None:
    """BatchNorm's statistics from unlabelled images as they are seen at ``size`` px."""
    sample = torch.from_numpy(table.statistics_images)
    parts = [p.to(table.device) for p in sample.split(256) if len(p) > 1]
    estimate_statistics(backbone, (clean(p, size) for p in parts))


@dataclass
class Featurised:
    """Features of the labelled images that are drawn, then the test images; and unlabelled statistics."""

    features: StageFeatures
    stats: Any
    row_of: np.ndarray  # pool index -> row
    test_rows: np.ndarray


def featurise(arm: Arm, k: int, table: Table, backbone: Backbone | None) -> Featurised:
    draws = table.draws
    used = np.unique(np.concatenate([draws.indices(d, c) for c, d in table.plan()]))
    both = Rows(table.pool.pixels, used), table.test.pixels
    sample = table.statistics_images
    bar = f"{arm.name} features"
    if backbone is not None:
        size = backbone.spec.image_size
        features = joined([extract(backbone, part, size, device=table.device, progress=bar) for part in both])
        stats = feature_stats(extract(backbone, sample, size, device=table.device))
    else:
        kind = Pixels if arm.kind == "pixels" else Patches
        control = kind(table.unlabelled, table.image_size)
        features = joined([control.features(part, bar) for part in both])
        stats = feature_stats(control.features(sample))
    if not all(np.isfinite(features.block(b)).all() for stage in features.stages for b in features.blocks(stage)):
        raise UserError(
            f"the features of {arm.name} are not all finite numbers: its weights are damaged; train it anew"
        )
    row_of = np.full(len(table.pool), -1)
    row_of[used] = np.arange(len(used))
    return Featurised(features, stats, row_of, np.arange(len(used), len(features)))


@dataclass(frozen=True)
class Teacher:
    """What a fine-tuned network says of the unlabelled images (N, K), and how it was made."""

    said: np.ndarray
    about: dict[str, Any]


class ArmFiller:
    """Fits the cells of one arm and one seed; features and network are made when the first cell needs them."""

    def __init__(self, arm: Arm, k: int, table: Table, store: Store) -> None:
        self.arm, self.k, self.table, self.store = arm, k, table, store
        self.identity, self._draws = identity(arm, k, table), table.draws
        self._network: Backbone | None = None
        self._featurised: Featurised | None = None
        self._teachers: dict[tuple[Count, int], Teacher] = {}  # of fine-tuned cells, for self-training
        self._judged: tuple[tuple[Count, int], Judged] | None = None  # of the last draw: its stages share feature sets

    @property
    def network(self) -> Backbone:
        if self._network is None:
            self._network = network(self.arm, self.k, self.table)
        return self._network

    @property
    def featurised(self) -> Featurised:
        if self._featurised is None:
            backbone = None if self.arm.kind in ("pixels", "patches") else self.network
            self._featurised = featurise(self.arm, self.k, self.table, backbone)
        return self._featurised

    @functools.cached_property
    def _flip(self) -> bool:
        return read_spec(self.arm.runs[self.k]).get("flip", True) if self.arm.kind == "backbone" else self.table.flip

    @functools.cached_property
    def _start(self) -> Backbone:
        """Where fine-tuning starts: the network with BatchNorm's statistics of images at the size it is tuned at."""
        size = ft.view_size(self.network.spec.image_size)
        if self.arm.kind == "scratch" or size == self.network.spec.image_size:
            return self.network
        start = copy.deepcopy(self.network)
        clean_statistics(start, self.table, size)
        return start

    def _head_inputs(self, images: np.ndarray | Rows) -> np.ndarray:
        """(N, C): what the linear layer of the network to be fine-tuned sits on."""
        size = ft.view_size(self._start.spec.image_size)
        return extract(self._start, images, size, device=self.table.device).one[self._start.stage_names[-1]]

    @functools.cached_property
    def _head_stats(self) -> BlockStats:
        return block_stats(self._head_inputs(self.table.statistics_images))

    def _key(self, protocol: str, count: Count, draw: int, stage: str | None = None) -> list[Any]:
        """What a cell is stored under: all that it depends on."""
        # The rows themselves: which they are depends on the largest count and the number of draws, too.
        rows = self._draws.indices(draw, count)
        labels = hashlib.sha256(rows.astype("<i8").tobytes()).hexdigest()
        key: list[Any] = [*self.identity, protocol, count, draw, stage, labels]
        key += grouping(self.table.pool.clusters[rows])
        scratch = self.arm.kind == "scratch"
        if not scratch or protocol in ("self-training", "s4l"):
            key += [self.table.unlabelled_id]
        if protocol in TRAINED:
            presets = [repr(p) for p in self.table.presets(count, self.arm)]
            presets += [f"chosen on {MAX_LABELS}"] if len(presets) > 1 and self.table.labels(count) > MAX_LABELS else []
            presets += [repr(self.table.student(count, scratch))] if protocol == "self-training" else []
            presets += [SETTING] if protocol == "s4l" else []
            key += [ft.view_size(self.table.image_size), self.table.top_layers, presets]
            key += [] if self._flip else ["no flip", ft.UNMIRRORED_CROP]
            key += [] if self.table.augment else ["no augmentation"]
        return key

    def cell(self, protocol: str, count: Count, draw: int, stage: str | None, on_step: Any, keep: Path | None) -> Cell:
        key, rows = self._key(protocol, count, draw, stage), self._draws.indices(draw, count)
        cell = self.store.get(key)
        wanted = keep is not None and stored_key(keep) != self.store.digest(key)
        if cell is None or wanted:
            begun = time.monotonic()
            predicted, about = self._fit(protocol, count, draw, rows, stage, on_step, keep, self.store.digest(key))
            cell = Cell(predicted, {**about, "seconds": round(time.monotonic() - begun, 3)})
            self.store.put(key, cell)
        elif protocol == "knn":  # what was stored by an earlier version called 1 an edge, too
            cell.about["on_grid_edge"] = cell.about["chosen"]["k"] == max(GRID_K)
        elif keep is not None:
            name_classes(keep, self.table.classes)
        return cell

    def _fit(
        self, protocol: str, count: Count, draw: int, rows: np.ndarray, stage: str | None, on_step: Any,
        keep: Path | None, key: str,
    ) -> tuple[np.ndarray, dict[str, Any]]:  # fmt: skip
        if protocol not in TRAINED:
            f = self.featurised
            given = f.features, f.row_of[rows], self.table.pool.y[rows], f.stats, count, draw
            if protocol == "linear":
                if self._judged is None or self._judged[0] != (count, draw):
                    self._judged = (count, draw), {}
                model = fit_probe(*given, stage=stage, judged=self._judged[1], clusters=self.table.pool.clusters[rows])
            else:
                model = fit_knn(*given, stage=stage, clusters=self.table.pool.clusters[rows])
            about = {"chosen": model.chosen, "on_grid_edge": bool(model.on_grid_edge), "steps": None}
            return model.predict(f.features, f.test_rows), about
        if protocol == "finetune":
            classifier, about = self._tuned(count, draw, rows, on_step)
            if "self-training" in self.table.protocols and not self.store.get(self._key("self-training", count, draw)):
                self._teachers[count, draw] = self._teacher(classifier, about)
        elif protocol == "s4l":
            classifier, about = self._tuned(count, draw, rows, on_step, self.table.unlabelled)
        else:
            classifier, about = self._self_trained(count, draw, rows, on_step)
        if keep is not None:
            save_classifier(classifier, self.table.classes, keep, key)
        return ft.predict_logits(classifier, self.table.test.pixels).argmax(1), about

    def _head(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
        """Where the linear layer starts: at the probe of these rows of the pool; of ``scratch``, nowhere."""
        if self.arm.kind == "scratch":
            return None
        pool = self.table.pool
        return fit_head(self._head_inputs(Rows(pool.pixels, rows)), pool.y[rows], self._head_stats)

    def _tuned(
        self, count: Count, draw: int, rows: np.ndarray, on_step: Any, unlabelled: Any = None
    ) -> tuple[ft.Classifier, dict[str, Any]]:
        """Fine-tuned; by S4L where ``unlabelled`` images are given."""
        table = self.table
        tuned = ft.finetune(
            self._start, Rows(table.pool.pixels, rows), table.pool.y[rows], len(table.classes),
            table.presets(count, self.arm), head=lambda local: self._head(rows[local]), seed=draw, device=table.device,
            on_step=on_step, augment=table.augment, unlabelled=unlabelled, clusters=table.pool.clusters[rows],
        )  # fmt: skip
        return tuned.model, {"chosen": tuned.chosen, "on_grid_edge": tuned.on_grid_edge, "steps": tuned.steps}

    def _teacher(self, classifier: ft.Classifier, about: dict[str, Any]) -> Teacher:
        return Teacher(ft.predict_logits(classifier, self.table.unlabelled), about)

    def _self_trained(
        self, count: Count, draw: int, rows: np.ndarray, on_step: Any
    ) -> tuple[ft.Classifier, dict[str, Any]]:
        table, preset = self.table, self.table.student(count, self.arm.kind == "scratch")
        teacher = self._teachers.pop((count, draw), None) or self._teacher(*self._tuned(count, draw, rows, on_step))
        images = st.Joined(Rows(table.pool.pixels, rows), table.unlabelled)
        student = ft.train(
            self._start, self._head(rows), images, st.joined_names(table.pool.y[rows], teacher.said),
            len(table.classes), preset, draw, table.device, on_step, table.augment,
        )  # fmt: skip
        chosen = {"preset": preset.name, "steps": preset.steps, "unlabelled": len(table.unlabelled)}
        chosen["teacher"] = teacher.about["chosen"]
        return student, {**teacher.about, "chosen": chosen, "steps": teacher.about["steps"] + preset.steps}


Predictions = dict[tuple[str, str, Count, str | None], np.ndarray]


def fill(table: Table, arms: Sequence[Arm], keep_classifier: str | None) -> tuple[list[dict[str, Any]], Predictions]:
    """Every cell of the table.

    Returns rows (without accuracy: nothing here has read a test label) and predictions, keyed
    (arm, protocol, count, stage or None): (seeds, draws, T) int64; linear probes of backbones also for
    ``table.parts``. ``keep_classifier`` names the arm whose classifier of the largest label count and draw 0, by
    ``table.product``, is saved into ``table.out``.
    """
    store, rows, predictions = Store(table), [], {}
    largest: Count = "all" if "all" in table.counts else max(table.counts)
    for arm in arms:
        fillers = [ArmFiller(arm, k, table, store) for k in range(len(arm.seeds))]
        for protocol in arm.protocols(table.protocols):
            cells: dict[tuple[Count, str | None], list[list[np.ndarray]]] = {}
            stages: list[str | None] = [None]
            if protocol == "linear" and arm.kind in ("backbone", "random"):
                stages += fillers[0].network.stage_names
            jobs: list[tuple[int, Count, int, str | None]] = [
                (k, c, d, s) for k in range(len(fillers)) for c, d in table.plan() for s in stages
            ]
            if protocol == "linear" and arm.kind == "backbone":
                jobs += [
                    (k, c, d, None) for k in range(len(fillers)) for c in table.parts for d in range(table.n_draws)
                ]
            bar = tqdm(jobs, desc=f"{arm.name} {protocol}", unit="fit", dynamic_ncols=True, mininterval=1.0)
            seen, begun = 0, time.monotonic()

            def on_step(n: int, bar: Any = bar, begun: float = begun) -> None:
                nonlocal seen
                seen += n
                bar.set_postfix_str(f"{seen / (time.monotonic() - begun):.0f} images/s", refresh=False)
                bar.update(0)

            for k, count, draw, stage in bar:
                product = (keep_classifier, largest, 0, 0, table.product)
                keep = table.out if (arm.name, count, draw, k, protocol) == product else None
                cell = fillers[k].cell(protocol, count, draw, stage, on_step, keep)
                cells.setdefault((count, stage), [[] for _ in fillers])[k].append(cell.predicted)
                if stage is None and count in table.counts:
                    where = {"arm": arm.name, "protocol": protocol, "labels_per_class": count}
                    rows.append({**where, "draw": draw, "seed": arm.seeds[k], **cell.about})
            for count, stage in sorted(cells, key=lambda key: stages.index(key[1])):
                predictions[arm.name, protocol, count, stage] = np.array(cells[count, stage])
    return rows, predictions
