"""The main job: pretrain with each task, evaluate all of them beside the controls, report.

This file and cli.py alone know all three parts: unlabel, pretext, downstream.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch

from downstream import evaluate as ev
from downstream import finetune as ft
from downstream import stats
from pretext import load_task
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
from unlabel.start import with_excluded

__all__ = ["compare", "evaluate"]

DEFAULT_COUNTS = (1, 10, 50)


# ---- Data: pool, test and pretraining images, with no near-duplicate on two sides


@dataclass(frozen=True)
class Split:
    pool: ev.Images
    test: ev.Images
    classes: list[str]
    unlabelled: ImageCache  # a sample of the pretraining images (else of the pool), no test image among them
    pretraining_leaks: frozenset[str]  # content hashes of pretraining images that are near-duplicates of test images
    seen: int | None  # test images of which a near-duplicate is among the pretraining images; None: not known
    about: dict[str, Any]
    warnings: list[str]


def split_data(
    config: FewLabels, image_size: int, pretraining: ImageCache | None, others: Mapping[str, ImageCache] | None = None
) -> Split:
    """Cluster near-duplicates over everything, then split by cluster. No seed takes part.

    ``others``: what further runs were trained on, by name; a warning says which of them saw test images.
    """
    warnings: list[str] = []
    others = others or {}
    train, held, test_spec = _labelled(config, image_size)
    caches = list({id(c): c for c in (train, held, pretraining, *others.values()) if c is not None}.values())
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
    _same_classes(classes, test_cache.labels or [], held is None)
    number = {c: k for k, c in enumerate(classes)}

    def images(cache: ImageCache, cluster_ids: np.ndarray) -> ev.Images:
        y = np.array([number[c] for c in cache.labels or ()], np.int64)
        return ev.Images(cache.images, y, cache.names, cache.hashes, cluster_ids)

    pool_rows = np.flatnonzero(in_pool)
    left = {(train.labels or [])[k] for k in pool_rows}
    for c in classes:
        if c not in left:
            raise UserError(
                f"class {c!r}: each of its --train images is a near-duplicate of a --test image; give other ones"
            )
    pool_cache = train.subset(pool_rows)
    leaks: frozenset[str] = frozenset()
    seen, usable = None, pool_cache
    if pretraining is not None:
        leaking = np.isin(ids[id(pretraining)], test_ids)
        leaks = frozenset(h for h, leak in zip(pretraining.hashes, leaking, strict=True) if leak)
        seen = int(np.isin(test_ids, ids[id(pretraining)]).sum())
        usable = pretraining.subset(~leaking) if not leaking.all() else pool_cache
    for name, cache in others.items():
        n = int(np.isin(test_ids, ids[id(cache)]).sum())
        if n:
            warnings.append(f"{n} test images have a near-duplicate among those that {name} was pretrained on")
    about = {
        "train": {"spec": config.train, "images": len(pool_rows), "classes": classes, "skipped": len(train.skipped)},
        "test": {
            "spec": test_spec or f"20 % of {config.train} by content hash",
            "images": len(test_cache),
            "clusters": len(np.unique(test_ids)),
        },
    }
    pool, test = images(pool_cache, train_ids[pool_rows]), images(test_cache, test_ids)
    return Split(pool, test, classes, _spread(usable), leaks, seen, about, warnings)


def _labelled(config: FewLabels, image_size: int) -> tuple[ImageCache, ImageCache | None, str | None]:
    """Images of --train and, where they are a source of their own, of the test set; and what that source is.

    The labels of --labels are for both, but for a test source that has class folders: those count there.
    """
    spec = config.test or own_test_split(config.train)
    test = open_source(spec) if spec else None
    if test is None or config.labels is None:
        train = open_source(config.train, config.labels)
    elif len(set(test.labels or ())) > 1:
        train = open_source(config.train, config.labels, elsewhere=test.names)
    else:
        names = open_source(config.train).names
        train = open_source(config.train, config.labels, elsewhere=test.names)
        test = open_source(spec or "", config.labels, elsewhere=names)
        both = sorted(set(train.names) & set(test.names))
        if both:
            raise UserError(
                f"{both[0]!r} in {config.labels} is the name of a --train and of a --test image: put the test images "
                "into class folders, or give them other names"
            )
    found = []
    for source in (train, test):
        if source is not None:
            source.require_labels()
        found.append(load_cache(source, image_size, max_skipped=config.max_skipped) if source is not None else None)
    return found[0], found[1], spec


def _same_classes(train: Sequence[str], test: Sequence[str], split_off: bool) -> None:
    only_train, only_test = sorted(set(train) - set(test)), sorted(set(test) - set(train))
    if only_train and split_off:
        raise UserError(
            f"class {only_train[0]!r} has too few different images to split off a test set: add some, leave the class "
            "out, or give --test"
        )
    if only_train or only_test:
        missing = [f"{', '.join(c[:5])} only in {where}" for c, where in ((only_train, "--train"), (only_test, "--test")) if c]  # noqa: E501  # fmt: skip
        raise UserError(f"--train and --test have different classes: {'; '.join(missing)}")


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
    numbers = sorted({c for c in counts if c != "all"})
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
    arm = ev.Arm(_arm_name(config.run, about), "backbone", (_seed(about),), (config.run,))
    stem = spec.stem if spec.stem in ("small", "timm") else "auto"
    backbone = (about.get("settings", {}).get("backbone", spec.name), stem)
    arms = _with_controls([arm], config)
    table = _table(config, split, backbone, spec.image_size, out)
    _print_cost(table, arms)
    return _fill_and_report(table, split, arms, 1, plain(config))


def compare(config: CompareConfig) -> Path:
    """`unlabel compare`: pretrain × tasks, evaluate, report. Finished runs and cells are not done again."""
    _check_before_spending(config)
    source = open_source(config.data)
    image_size = config.image_size or min(224, max(32, source.median_short_side()))
    pretraining = load_cache(source, image_size, max_skipped=config.max_skipped)
    seeds = tuple(range(config.seed, config.seed + config.seeds))
    tasks = [
        ev.Arm(name, "backbone", seeds, tuple(config.out / "runs" / f"{name}-seed{seed}" for seed in seeds))
        for name in config.tasks
    ]
    also, others, notes = _finished_runs(config.also, image_size, pretraining)
    arms = _with_controls([*tasks, *also], config)
    split = split_data(config, image_size, pretraining, others)
    split.warnings.extend(notes)
    table = _table(config, split, (config.backbone, "auto"), image_size, config.out)
    if config.minutes is not None:
        n = len(tasks) * len(seeds)
        print(f"cost: pretraining {n} × {config.minutes:g} minutes, as far as it is not done")
    _print_cost(table, arms)
    for arm in tasks:
        for seed, folder in zip(seeds, arm.runs, strict=True):
            print(f"\n== {arm.name}, seed {seed}")
            pretrain(_pretrain_config(config, arm.name, seed, folder, image_size), exclude=split.pretraining_leaks)
    return _fill_and_report(table, split, arms, len(tasks) + len(also), plain(config))


def _finished_runs(
    folders: Sequence[Path], image_size: int, pretraining: ImageCache
) -> tuple[list[ev.Arm], dict[str, ImageCache], list[str]]:
    """Arms of runs that are finished elsewhere; the images that they were trained on, where those are others; notes."""
    arms, others, notes = [], {}, []
    for folder in folders:
        load_backbone(folder)
        about = RunFolder(folder).read() or {}
        arms.append(ev.Arm(folder.resolve().name, "backbone", (_seed(about),), (folder,)))
        images, note = pretraining_images(folder, about, image_size)
        if note:
            notes.append(f"{folder.name}: {note}")
        if images is not None:  # the same images need no second look
            known = next((c for c in (pretraining, *others.values()) if c.hashes == images.hashes), images)
            others[folder.resolve().name] = known
    return arms, others, notes


def _seed(about: Mapping[str, Any]) -> int:
    return int(about.get("settings", {}).get("seed", 0))


def _pretrain_config(config: CompareConfig, name: str, seed: int, out: Path, image_size: int) -> PretrainConfig:
    tasks = tuple(name.split("+"))
    return PretrainConfig(
        tasks=tasks, data=config.data, out=out, backbone=config.backbone, image_size=image_size,
        epochs=config.epochs, minutes=config.minutes, batch_size=config.batch_size, seed=seed, device=config.device,
        precision=config.precision, max_skipped=config.max_skipped,
        task_settings={t: config.task_settings[t] for t in tasks if t in config.task_settings},
    )  # fmt: skip


def _check_before_spending(config: CompareConfig) -> None:
    """Mistakes that would otherwise show after an hour of pretraining."""
    if config.seeds < 1 or config.draws < 1:
        raise UserError("--seeds and --draws must be at least 1")
    if config.image_size is not None and not 16 <= config.image_size <= 1024:
        raise UserError(f"--image-size must lie between 16 and 1024, not {config.image_size}")
    for name in config.tasks:
        parts = name.split("+")
        if len(parts) > 1 and any(load_task(part).phases > 1 for part in parts):
            raise UserError(f"{name}: a task in several phases cannot be summed with other tasks")


def _with_controls(arms: list[ev.Arm], config: FewLabels) -> list[ev.Arm]:
    """The arms and, beside them, the controls. No two may have one name: it is what they are known by."""
    most = max(arms, key=lambda arm: len(arm.seeds))
    if config.controls:
        arms = arms + ev.control_arms(config.protocol, most.seeds)
    names = [arm.name for arm in arms]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise UserError(f"two arms are called {twice[0]!r} (tasks, --also folders and controls): rename a folder")
    return arms


def pretraining_images(run: Path, about: dict[str, Any], image_size: int) -> tuple[ImageCache | None, str | None]:
    """What a run was trained on, if it is still where it was; else a note that says so."""
    spec = about.get("data", {}).get("spec")
    try:
        if not spec:
            raise UserError("the run does not name its data")
        source = open_source(spec)
        excluded = RunFolder(run).excluded
        gone = frozenset(excluded.read_text().split()) if excluded.exists() else frozenset()
        if with_excluded(source.fingerprint, gone) != about.get("fingerprint"):
            raise UserError(f"{source.spec} has changed since")
        cache = load_cache(source, image_size, max_skipped=1.0)
    except UserError as error:
        return (
            None,
            f"the pretraining images are not at hand, so overlap with the test set was not looked for ({error})",
        )
    return cache.subset(np.flatnonzero([h not in gone for h in cache.hashes])), None


def _arm_name(run: Path, about: dict[str, Any]) -> str:
    tasks = about.get("settings", {}).get("tasks")
    return "+".join(tasks) if tasks else run.resolve().name


# ---- Filling the table and writing it down


def _table(config: FewLabels, split: Split, backbone: tuple[str, str], image_size: int, out: Path) -> ev.Table:
    counts = label_counts(config, split.pool.y)
    numbers = [c for c in counts if c != "all"]
    if config.draws < 10 and numbers:
        split.warnings.append(f"{config.draws} draws of labels instead of 10: intervals are wide and rough")
    table = ev.Table(
        split.pool, split.test, split.unlabelled.images, split.classes, counts, config.draws,
        tuple(dict.fromkeys(config.protocol)), backbone, image_size, pick_device(config.device), out, config.top_layers,
        hashlib.sha256("".join(split.unlabelled.hashes).encode()).hexdigest(),
    )  # fmt: skip
    shared = [str(c) for c in numbers if not table.draws.disjoint_at(c)]
    if shared:
        split.warnings.append(
            f"the pool is too small for draws of {', '.join(shared)} labels per class that share no image: their "
            "intervals are somewhat too narrow"
        )
    for warning in split.warnings:
        print(f"note: {warning}")
    out.mkdir(parents=True, exist_ok=True)
    return table


def _fill_and_report(
    table: ev.Table, split: Split, arms: Sequence[ev.Arm], n_tasks: int, settings: dict[str, Any]
) -> Path:
    """``arms``: the tasks (and runs) first, ``n_tasks`` of them, then the controls."""
    out, tasks = table.out, arms[:n_tasks]
    rows, predictions = ev.fill(table, arms, tasks[0].name)
    results = summarise(table, tasks, arms, rows, predictions)
    results["provenance"] = _provenance(out, tasks, split, settings)
    _write(out, table, results, predictions)
    page = report.write_report(out)
    print(f"\n{report.format_table(results)}\n\n{report.answer(results)}\n\nopen {page}")
    return out


def _spread(cache: ImageCache, at_most: int = 8192) -> ImageCache:
    """Evenly spaced images, shuffled: sources are sorted, so the first ones are not a sample."""
    rows = np.unique(np.linspace(0, len(cache) - 1, min(at_most, len(cache))).round().astype(int))
    return cache.subset(np.random.default_rng(0).permutation(rows))


def _print_cost(table: ev.Table, arms: Sequence[ev.Arm]) -> None:
    """Fine-tuning is what takes the time: count its image passes, and measure the speed of one step."""
    passes = 0
    for arm in arms:
        if "finetune" not in arm.protocols(table.protocols):
            continue
        for count, _ in table.plan():
            per_class = int(np.bincount(table.pool.y).min()) if count == "all" else count
            n = table.labels(count)
            presets = ft.presets_for(per_class, arm.kind == "scratch", table.top_layers, n)
            runs = [*presets, presets[-1]] if len(presets) > 1 else presets
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
        if table.device.type == "cuda":
            torch.cuda.synchronize()
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
            a, b = correct[arm, protocol, count, None], correct[versus, protocol, count, None]
            if len(a) < len(b):  # fewer seeds than what it is compared with: over those nothing can be said
                b = b.mean(axis=0, keepdims=True)
            a, b = np.broadcast_arrays(a, b)
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
    seen = split.seen if "data" not in settings else 0  # compare leaves them out
    return {
        "runs": runs,
        "images_seen_in_pretraining": {a: [r["images_seen"] for r in rs] for a, rs in runs.items()},
        "minutes": {a: [r["minutes"] for r in rs] for a, rs in runs.items()},
        "hardware": hardware(),
        "versions": versions(),
        "data": data,
        "settings": settings,
        "overlap": {"test_in_pretraining": seen},
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
