"""The main job: pretrain with each task, evaluate all of them beside the controls, report.

This file and cli.py alone know all three parts: unlabel, pretext, downstream.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch

from downstream import evaluate as ev
from downstream import finetune as ft
from downstream import stats
from unlabel import report
from unlabel.backbone import build_backbone, channels_last, load_backbone
from unlabel.cache import ImageCache, load_cache
from unlabel.checkpoint import write_atomic
from unlabel.config import CompareConfig, EvaluateConfig, FewLabels, PretrainConfig, plain
from unlabel.distributed import pick_device
from unlabel.duplicates import clusters, content_split
from unlabel.errors import UserError
from unlabel.pretrain import pretrain
from unlabel.runfolder import RunFolder, hardware, versions
from unlabel.sources import open_source, own_test_split

__all__ = ["compare", "evaluate"]

DEFAULT_COUNTS = (1, 10, 50)


# ---- Data: pool, test and pretraining images, with no near-duplicate on two sides


@dataclass(frozen=True)
class Split:
    pool: ev.Images
    test: ev.Images
    classes: list[str]
    pretraining: ImageCache | None
    pretraining_leaks: frozenset[str]  # content hashes of pretraining images that are near-duplicates of test images
    about: dict[str, Any]
    warnings: list[str]


def split_data(config: FewLabels, image_size: int, pretraining: ImageCache | None) -> Split:
    """Cluster near-duplicates over everything, then split by cluster. No seed takes part."""
    warnings: list[str] = []
    train = _labelled(config.train, config, image_size)
    test_spec = config.test or own_test_split(config.train)
    held = _labelled(test_spec, config, image_size) if test_spec else None
    caches = [c for c in (train, held, pretraining) if c is not None]
    ids = dict(zip(map(id, caches), clusters(caches), strict=True))
    train_ids = ids[id(train)]
    classes = sorted(set(train.labels or ()))
    if held is None:
        in_test = content_split(train, train_ids)
        test_cache, test_ids = train.subset(np.flatnonzero(in_test)), train_ids[in_test]
        in_pool = ~in_test
    else:
        test_cache, test_ids = held, ids[id(held)]
        in_pool = ~np.isin(train_ids, test_ids)
        dropped = int((~in_pool).sum())
        if dropped:
            warnings.append(f"{dropped} training images are near-duplicates of test images and were left out")
    other = sorted(set(test_cache.labels or ()) ^ set(classes))
    if other:
        raise UserError(f"--train and --test have different classes: {', '.join(other[:5])} is only in one of them")
    number = {c: k for k, c in enumerate(classes)}

    def images(cache: ImageCache, cluster_ids: np.ndarray) -> ev.Images:
        y = np.array([number[c] for c in cache.labels or ()], np.int64)
        return ev.Images(cache.images, y, cache.names, cache.hashes, cluster_ids)

    pool_rows = np.flatnonzero(in_pool)
    leaks: frozenset[str] = frozenset()
    if pretraining is not None:
        leaking = np.isin(ids[id(pretraining)], test_ids)
        leaks = frozenset(h for h, leak in zip(pretraining.hashes, leaking, strict=True) if leak)
    about = {
        "train": {"spec": config.train, "images": len(pool_rows), "classes": classes, "skipped": len(train.skipped)},
        "test": {
            "spec": test_spec or f"20 % of {config.train} by content hash",
            "images": len(test_cache),
            "clusters": len(np.unique(test_ids)),
        },
    }
    pool = images(train.subset(pool_rows), train_ids[pool_rows])
    return Split(pool, images(test_cache, test_ids), classes, pretraining, leaks, about, warnings)


def _labelled(spec: str, config: FewLabels, image_size: int) -> ImageCache:
    source = open_source(spec, config.labels)
    source.require_labels()
    return load_cache(source, image_size, max_skipped=config.max_skipped)


def label_counts(config: FewLabels, y: np.ndarray) -> tuple[ev.Count, ...]:
    """The label counts asked for, in rising order; without any, those of 1, 10, 50 that the pool has."""
    smallest = int(np.bincount(y).min())
    if config.labels_per_class is None:
        return tuple(c for c in DEFAULT_COUNTS if c <= smallest) or (smallest,)
    counts: list[ev.Count] = []
    for text in dict.fromkeys(config.labels_per_class):
        if text == "all":
            continue
        if not text.isdigit() or int(text) < 1:
            raise UserError(f"--labels-per-class {text}: give whole numbers above zero, or `all`")
        counts.append(int(text))
    numbers = sorted(c for c in counts if c != "all")
    return (*numbers, *(["all"] if "all" in config.labels_per_class else []))  # type: ignore[return-value]


# ---- The two commands


def evaluate(config: EvaluateConfig) -> Path:
    """`unlabel evaluate`: one run beside the controls. Returns the folder with results.json."""
    run = RunFolder(config.run)
    about = run.read() or {}
    spec = load_backbone(config.run).spec
    out = config.out or config.run / "evaluation"
    pretraining, note = pretraining_images(config.run, about, spec.image_size)
    split = split_data(config, spec.image_size, pretraining)
    if note:
        split.warnings.append(note)
    if split.pretraining_leaks:
        n = len(split.pretraining_leaks)
        split.warnings.append(f"{n} pretraining images are near-duplicates of test images: the run has seen them")
    arm = ev.Arm(
        _arm_name(config.run, about), "backbone", (int(about.get("settings", {}).get("seed", 0)),), (config.run,)
    )
    stem = spec.stem if spec.stem in ("small", "timm") else "auto"
    backbone = (about.get("settings", {}).get("backbone", spec.name), stem)
    return _fill_and_report(config, split, [arm], 1, backbone, spec.image_size, out, plain(config))


def compare(config: CompareConfig) -> Path:
    """`unlabel compare`: pretrain × tasks, evaluate, report. Finished runs and cells are not done again."""
    source = open_source(config.data)
    image_size = config.image_size or min(224, max(32, source.median_short_side()))
    pretraining = load_cache(source, image_size, max_skipped=config.max_skipped)
    split = split_data(config, image_size, pretraining)
    label_counts_checked = label_counts(config, split.pool.y)
    _check_before_spending(config, split, label_counts_checked)
    seeds = tuple(range(config.seed, config.seed + config.seeds))
    arms = []
    for name in config.tasks:
        runs = tuple(config.out / "runs" / f"{name}-seed{seed}" for seed in seeds)
        for seed, folder in zip(seeds, runs, strict=True):
            print(f"\n== {name}, seed {seed}")
            pretrain(_pretrain_config(config, name, seed, folder, image_size), exclude=split.pretraining_leaks)
        arms.append(ev.Arm(name, "backbone", seeds, runs))
    for folder in config.also:
        load_backbone(folder)  # an error here, and not after an hour
        arms.append(ev.Arm(folder.name, "backbone", (0,), (folder,)))
    return _fill_and_report(
        config, split, arms, config.seeds, (config.backbone, "auto"), image_size, config.out, plain(config)
    )


def _pretrain_config(config: CompareConfig, name: str, seed: int, out: Path, image_size: int) -> PretrainConfig:
    tasks = tuple(name.split("+"))
    return PretrainConfig(
        tasks=tasks, data=config.data, out=out, backbone=config.backbone, image_size=image_size,
        epochs=config.epochs, minutes=config.minutes, batch_size=config.batch_size, seed=seed, device=config.device,
        precision=config.precision, max_skipped=config.max_skipped,
        task_settings={t: config.task_settings[t] for t in tasks if t in config.task_settings},
    )  # fmt: skip


def _check_before_spending(config: CompareConfig, split: Split, counts: Sequence[ev.Count]) -> None:
    if config.seeds < 1 or config.draws < 1:
        raise UserError("--seeds and --draws must be at least 1")
    if len(set(config.tasks)) != len(config.tasks):
        raise UserError(f"--tasks names an arm twice: {' '.join(config.tasks)}")
    ev.LabelDraws(split.pool.y, max((c for c in counts if c != "all"), default=1), config.draws, 0, split.classes)


def pretraining_images(run: Path, about: dict[str, Any], image_size: int) -> tuple[ImageCache | None, str | None]:
    """What a run was trained on, if it is still where it was; else a note that says so."""
    spec = about.get("data", {}).get("spec")
    try:
        if not spec:
            raise UserError("the run does not name its data")
        source = open_source(spec)
        cache = load_cache(source, image_size, max_skipped=1.0)
    except UserError as error:
        return (
            None,
            f"the pretraining images are not at hand, so overlap with the test set was not looked for ({error})",
        )
    excluded = RunFolder(run).excluded
    gone = set(excluded.read_text().split()) if excluded.exists() else set()
    return cache.subset(np.flatnonzero([h not in gone for h in cache.hashes])), None


def _arm_name(run: Path, about: dict[str, Any]) -> str:
    tasks = about.get("settings", {}).get("tasks")
    return "+".join(tasks) if tasks else run.resolve().name


# ---- Filling the table and writing it down


def _fill_and_report(
    config: FewLabels, split: Split, arms: list[ev.Arm], n_seeds: int, backbone: tuple[str, str], image_size: int,
    out: Path, settings: dict[str, Any],
) -> Path:  # fmt: skip
    counts = label_counts(config, split.pool.y)
    if config.draws < 10:
        split.warnings.append(f"{config.draws} draws of labels instead of 10: intervals are wide and rough")
    unlabelled = split.pool.pixels if split.pretraining is None else _spread(split.pretraining)
    table = ev.Table(
        split.pool, split.test, unlabelled, split.classes, counts, config.draws, tuple(config.protocol), backbone,
        image_size, pick_device(config.device), out, config.top_layers,
    )  # fmt: skip
    if not table.draws.disjoint:
        split.warnings.append("the pool is too small for draws that share no image: intervals are somewhat too narrow")
    for warning in split.warnings:
        print(f"note: {warning}")
    tasks = list(arms)
    if config.controls:
        arms = arms + ev.control_arms(config.protocol, arms[0].seeds if n_seeds > 1 else (arms[0].seeds[0],))
    _print_cost(table, arms)
    out.mkdir(parents=True, exist_ok=True)
    rows, predictions = ev.fill(table, arms, tasks[0].name)
    results = summarise(table, tasks, arms, rows, predictions)
    results["provenance"] = _provenance(out, tasks, split, settings)
    _write(out, table, results, predictions)
    page = report.write_report(out)
    print(f"\n{report.format_table(results)}\n\n{report.answer(results)}\n\nopen {page}")
    return out


def _spread(cache: ImageCache, at_most: int = 8192) -> Any:
    """Evenly spaced images: sources are sorted, so the first ones are not a sample."""
    rows = np.unique(np.linspace(0, len(cache) - 1, min(at_most, len(cache))).round().astype(int))
    return cache.subset(np.random.default_rng(0).permutation(rows)).images


def _print_cost(table: ev.Table, arms: Sequence[ev.Arm]) -> None:
    """Fine-tuning is what takes the time: count its image passes, and measure the speed of one step."""
    passes = 0
    for arm in arms:
        if "finetune" not in arm.protocols(table.protocols):
            continue
        for count, _ in table.plan():
            per_class = int(np.bincount(table.pool.y).min()) if count == "all" else count
            presets = ft.presets_for(per_class, arm.kind == "scratch", table.top_layers)
            runs = [*presets, presets[-1]] if len(presets) > 1 else presets
            n = len(table.pool) if count == "all" else count * len(table.classes)
            passes += len(arm.seeds) * sum(p.steps * min(p.batch_size, n) for p in runs)
    if not passes:
        return
    model = ft.Classifier(build_backbone(table.backbone[0], table.image_size, table.backbone[1]), 2)
    model = channels_last(model.to(table.device))
    x = torch.rand(32, 3, table.image_size, table.image_size, device=table.device)
    times = []
    for _ in range(4):
        begun = time.perf_counter()
        model(x).sum().backward()
        times.append(time.perf_counter() - begun)
    minutes = passes / 32 * float(np.median(times[1:])) / 60
    known = f"; what is already in {table.out / 'cells'} is not done again" if (table.out / "cells").exists() else ""
    print(f"cost: fine-tuning passes {passes:,} images, about {minutes:.1f} minutes{known}")


def summarise(
    table: ev.Table,
    tasks: Sequence[ev.Arm],
    arms: Sequence[ev.Arm],
    rows: list[dict[str, Any]],
    predictions: ev.Predictions,
) -> dict[str, Any]:
    """The only place that reads the test labels: predictions to accuracies, intervals, differences."""
    clusters_ = table.test.clusters
    correct = {key: p == table.test.y for key, p in predictions.items()}  # (seeds, draws, T)
    seed_at = {arm.name: {seed: k for k, seed in enumerate(arm.seeds)} for arm in arms}
    for row in rows:
        hits = correct[row["arm"], row["protocol"], row["labels_per_class"], None]
        row["accuracy"] = float(hits[seed_at[row["arm"]][row["seed"]], row["draw"]].mean())
    summary, stages = [], []
    for (arm, protocol, count, stage), hits in correct.items():
        e = stats.summarise(hits, clusters_)
        line = {
            "arm": arm, "protocol": protocol, "labels_per_class": count, "mean": e.mean, "ci_low": e.ci_low,
            "ci_high": e.ci_high, "n_draws": e.n_draws, "n_seeds": e.n_seeds, "unit": e.unit, "note": e.note,
        }  # fmt: skip
        (summary.append(line) if stage is None else stages.append({**line, "stage": stage}))
    present = {arm.name for arm in arms}
    pairs = [(a.name, v, p) for a in tasks for v, p in _VERSUS if v in present]
    pairs += [(a.name, tasks[0].name, p) for a in tasks[1:] for p in table.protocols]
    primary = _primary(tasks[0].name, present, table)
    paired = []
    for arm, versus, protocol in pairs:
        for count in table.counts:
            if (arm, protocol, count, None) not in correct:
                continue
            a, b = np.broadcast_arrays(correct[arm, protocol, count, None], correct[versus, protocol, count, None])
            e = stats.paired(a, b, clusters_)
            paired.append({
                "arm": arm, "versus": versus, "protocol": protocol, "labels_per_class": count, "difference": e.mean,
                "ci_low": e.ci_low, "ci_high": e.ci_high, "verdict": stats.verdict(e.ci_low, e.ci_high),
                "primary": (arm, versus, protocol, count) == primary, "n_draws": e.n_draws, "n_seeds": e.n_seeds,
                "unit": e.unit, "note": e.note,
            })  # fmt: skip
    return {"schema": 1, "rows": rows, "summary": summary, "stages": stages, "paired": paired}


_VERSUS = [
    ("scratch", "finetune"), ("random", "linear"), ("random", "knn"),
    ("patches", "linear"), ("patches", "knn"), ("pixels", "linear"), ("pixels", "knn"),
]  # fmt: skip


def _primary(first: str, present: Iterable[str], table: ev.Table) -> tuple[Any, ...] | None:
    """The one comparison that is named before the test labels are read."""
    middle = table.counts[len(table.counts) // 2]
    if "finetune" in table.protocols and "scratch" in present:
        return first, "scratch", "finetune", middle
    if "linear" in table.protocols and "random" in present:
        return first, "random", "linear", middle
    return None


def _provenance(out: Path, tasks: Sequence[ev.Arm], split: Split, settings: dict[str, Any]) -> dict[str, Any]:
    runs: dict[str, list[dict[str, Any]]] = {}
    data = dict(split.about)
    for arm in tasks:
        for folder, seed in zip(arm.runs, arm.seeds, strict=True):
            about = RunFolder(folder).read() or {}
            done, asked = about.get("finished", {}), about.get("settings", {})
            seconds = done.get("seconds")
            runs.setdefault(arm.name, []).append({
                "path": _relative(folder, out), "seed": asked.get("seed", seed), "tasks": asked.get("tasks"),
                "backbone": asked.get("backbone"), "image_size": about.get("resolved", {}).get("image_size"),
                "steps": done.get("steps"), "images_seen": done.get("images_seen"),
                "minutes": None if seconds is None else round(seconds / 60, 2),
                "images_per_second": round(done["images_seen"] / seconds, 1) if seconds else None,
            })  # fmt: skip
            data.setdefault("pretrain", about.get("data", {}))
    seen = len(split.pretraining_leaks) if "data" not in settings else 0  # compare leaves them out
    return {
        "runs": runs,
        "images_seen_in_pretraining": {a: [r["images_seen"] for r in rs] for a, rs in runs.items()},
        "minutes": {a: [r["minutes"] for r in rs] for a, rs in runs.items()},
        "hardware": hardware(),
        "versions": versions(),
        "data": data,
        "settings": settings,
        "overlap": {"test_in_pretraining": seen if split.pretraining is not None else None},
        "left_out_of_pretraining": len(split.pretraining_leaks) if "data" in settings else 0,
        "warnings": split.warnings,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _relative(folder: Path, out: Path) -> str:
    import os

    return Path(os.path.relpath(folder, out)).as_posix()


def _write(out: Path, table: ev.Table, results: dict[str, Any], predictions: ev.Predictions) -> None:
    """results.json, predictions.npz and splits.json."""
    arrays: dict[str, Any] = {
        f"{arm}|{protocol}|{count}": p == table.test.y
        for (arm, protocol, count, stage), p in predictions.items()
        if stage is None
    }
    names = np.array([n.encode("utf-8", "surrogateescape") for n in table.test.names])
    np.savez_compressed(out / "predictions.npz", test_names=names, test_clusters=table.test.clusters, **arrays)
    draws = table.draws

    def listing(images: ev.Images) -> dict[str, Any]:
        labels = [table.classes[k] for k in images.y]
        return {"names": images.names, "labels": labels, "clusters": images.clusters.tolist(), "hashes": images.hashes}

    split = {
        "classes": table.classes,
        "test": listing(table.test),
        "pool": listing(table.pool),
        "draws": {str(c): [draws.indices(d, c).tolist() for cc, d in table.plan() if cc == c] for c in table.counts},
    }
    write_atomic(out / "splits.json", json.dumps(split).encode())
    write_atomic(out / "results.json", (json.dumps(results, indent=1) + "\n").encode())
