"""The label-free scores of a table's arms, each backbone's stored like the cells of the few-label table."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from downstream import evaluate as ev
from downstream.choosing import grouping
from downstream.label_free import label_free
from unlabel.errors import UserError
from unlabel.runfolder import RunFolder

__all__ = ["label_free_rows", "tasks_of"]

SCORES = 1  # raise it when a change makes stored scores wrong
# A probe for what the run was trained to do says how well it was trained, not what else it has learned.
OWN = {"rotation": "rotation_probe", "transformations": "rotation_probe", "jigsaw": "jigsaw_probe"}


def tasks_of(run: Path) -> list[str]:
    """The tasks that a run was trained with; none where the folder does not say."""
    return list((RunFolder(run).read() or {}).get("settings", {}).get("tasks", []))


def tasks_before(run: Path) -> list[str]:
    """Those of the runs that it began from by --init, one behind the other, as far as they are still there."""
    found: list[list[str]] = []
    seen: set[Path] = set()
    while run.resolve() not in seen:
        seen.add(run.resolve())
        try:
            about = RunFolder(run).read() or {}
        except UserError:  # of a run that it began from: no longer one
            break
        found.append(about.get("settings", {}).get("tasks", []))
        free = about.get("free")
        init = free.get("init") if isinstance(free, dict) else None
        if not isinstance(init, str) or not init or not Path(init).is_dir():
            break
        run = Path(init)
    return [task for tasks in found[1:] for task in tasks]


def label_free_rows(table: ev.Table, arms: Sequence[ev.Arm], better: Mapping[str, str]) -> list[dict[str, Any]]:
    """Rows for results.json: one per backbone (arm and seed) and score, on the pool's images without their labels.

    Arms without a backbone of their own (``scratch``, ``pixels``, ``patches``) have none. ``better``: ``max`` or
    ``min`` of the tasks' own metrics, keyed ``task/metric``.
    """
    rows = []
    for arm in arms:
        for k, seed in enumerate(arm.seeds):
            if arm.kind not in ("backbone", "random"):
                continue
            where = {"arm": arm.name, "seed": seed}
            rows += [{**where, **score} for score in _scores(table, arm, k)]
            if arm.kind == "backbone":
                rows += [{**where, **score} for score in pretext_scores(arm.runs[k], better)]
    return rows


def _scores(table: ev.Table, arm: ev.Arm, k: int) -> list[dict[str, Any]]:
    store, pool = ev.Store(table), table.pool
    tasks = tasks_of(arm.runs[k]) + tasks_before(arm.runs[k]) if arm.kind == "backbone" else []
    leave_out = sorted({OWN[t] for t in tasks if t in OWN})
    key = [*ev.identity(arm, k, table), "label-free", SCORES, table.flip, leave_out]
    key += [table.unlabelled_id] if arm.kind == "random" else []
    key += grouping(pool.clusters)
    cell = store.get(key)
    if cell is None:
        backbone, bar = ev.network(arm, k, table), f"{arm.name} label-free"
        found = label_free(
            backbone, pool.pixels, pool.hashes, pool.clusters, flip=table.flip, leave_out=leave_out, progress=bar
        )
        cell = ev.Cell(np.zeros(0, np.int64), {"scores": found})
        store.put(key, cell)
    return cell.about["scores"]


def pretext_scores(run: Path, better: Mapping[str, str]) -> list[dict[str, Any]]:
    """What the run's tasks last logged on its own training images, each metric beside its trivial score."""
    last: dict[str, Any] = {}
    for text in _lines(run / "metrics.jsonl"):
        try:
            line = json.loads(text)
        except (ValueError, RecursionError):  # cut short by a kill
            continue
        if isinstance(line, dict) and isinstance(line.get("metrics"), dict) and isinstance(line.get("trivial"), dict):
            last = line
    return [
        {
            "score": "pretext", "metric": name, "value": last["metrics"][name], "trivial": trivial,
            "better": better.get(name), "n_images": None, "on": "the run's own training images, last logged",
        }
        for name, trivial in last.get("trivial", {}).items()
        if name in last["metrics"]
    ]  # fmt: skip


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []
