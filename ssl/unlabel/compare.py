"""The main job: pretrain with each task, evaluate all of them beside the controls, report.

This file and cli.py alone know all three parts: unlabel, pretext, downstream.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from downstream import evaluate as ev
from downstream.arms import (
    about_given,
    arm_name,
    finished_runs,
    given_arms,
    most_seen,
    pretraining_images,
    seed_of,
    seen_by,
    started_elsewhere,
    unlike,
)  # fmt: skip
from downstream.cost import print_cost
from downstream.gallery import draw_gallery
from downstream.label_free_table import label_free_rows, tasks_of
from downstream.split import Split, has_labels, open_labelled, split_data, unlabelled_pool
from downstream.summary import summarise
from pretext import TASKS, load_task
from unlabel import report
from unlabel.backbone import build_backbone, load_backbone, name_of
from unlabel.cache import load_cache, write_skipped
from unlabel.checkpoint import write_atomic
from unlabel.config import CompareConfig, EvaluateConfig, FewLabels, PretrainConfig, plain
from unlabel.distributed import pick_device, refuse_several
from unlabel.errors import UserError
from unlabel.init import Start, fetch, load_start, start_beside, start_of, write_given
from unlabel.memory import keep_freed_memory
from unlabel.plan import EPOCHS, check_settings
from unlabel.pretrain import pretrain
from unlabel.report_text import CONTROLS
from unlabel.runfolder import RunFolder, commit, hardware, versions
from unlabel.sources import open_source
from unlabel.start import refuse_odd_out

__all__ = ["compare", "evaluate"]

DEFAULT_COUNTS = (1, 10, 50)


def label_counts(config: FewLabels, y: np.ndarray) -> tuple[ev.Count, ...]:
    """The label counts asked for, in rising order; without any, those of 1, 10, 50 that the pool has."""
    if config.labels_per_class is None:
        smallest = int(np.bincount(y).min())
        return tuple(c for c in DEFAULT_COUNTS if c <= smallest) or (smallest,)
    every: tuple[ev.Count, ...] = ("all",) if "all" in config.labels_per_class else ()
    return (*sorted({int(text) for text in config.labels_per_class if text != "all"}), *every)


def _refuse_nonsense(config: FewLabels) -> None:
    """What is wrong by itself is said before any image is looked at."""
    if not 1 <= config.draws <= MOST:
        raise UserError(f"--draws {config.draws}: from 1 to {MOST:,}")
    scores_alone = isinstance(config, EvaluateConfig) and config.label_free
    if (not config.protocol and not scores_alone) or config.labels_per_class == ():
        raise UserError("--protocol and --labels-per-class want a value, or leave them out")
    for text in config.labels_per_class or ():
        if text != "all" and not (text.isascii() and text.isdecimal() and len(text) < 10 and int(text) > 0):
            raise UserError(f"--labels-per-class {text[:40]}: give whole numbers above zero, or `all`")
    if config.top_layers is not None and config.top_layers < 1:
        raise UserError(f"--top-layers {config.top_layers}: train at least one stage")
    pick_device(config.device)
    refuse_several("evaluate and compare")


MOST = 10_000  # draws, or seeds


# ---- The two commands


def evaluate(config: EvaluateConfig) -> Path:
    """`unlabel evaluate`: one run beside the controls. Returns the folder with results.json."""
    _refuse_nonsense(config)
    if config.run.is_file():
        raise UserError(f"{config.run} is a file: give the run's folder")
    run = RunFolder(config.run)
    about = run.read() or {}
    spec = load_backbone(config.run).spec
    out = config.out or config.run / "evaluation"
    refuse_odd_out(out, (config.train, config.test))
    if about:
        run.finished()  # an error where the weights are not those that the run wrote
    backbone = (about.get("settings", {}).get("backbone") or name_of(spec), spec.stem)
    start = start_beside(config.init, *backbone)
    weights = write_given(start, spec.image_size, spec.flip, out / "given")
    pretraining, note = pretraining_images(config.run, about, spec.image_size)
    like = build_backbone(backbone[0], spec.image_size, backbone[1], flip=spec.flip).spec
    given, others, notes = given_arms(start, weights, like, pretraining)
    notes += [f"{config.run.name}: {text}" for text in unlike(spec, like)]
    if config.label_free and not has_labels(config):
        config = dataclasses.replace(config, protocol=())
        split = unlabelled_pool(config, spec.image_size, pretraining)
    else:
        split = split_data(config, spec.image_size, pretraining, others)
    if note is not None:
        note += "; unlabelled images are, wherever some are used, those of --train"
    split.warnings.extend(filter(None, [note, started_elsewhere(config.run), *notes]))
    if split.seen:
        split.warnings.append(f"{split.seen} test images have a near-duplicate among those that it was pretrained on")
    arm = ev.Arm(arm_name(config.run, about), "backbone", (seed_of(about),), (config.run,))
    arms = _with_controls([arm, *given], config, config.label_free)
    table = _table(config, split, backbone, spec.image_size, out, spec.flip)
    print_cost(table, arms, config.label_free)
    seen = most_seen(
        [seen_by(config.run, split.seen), *(seen_by(arm.runs[0], split.seen_by.get(arm.name)) for arm in given)]
    )
    origin = {"settings": plain(config), "overlap": {"test_in_pretraining": seen}, "left_out_of_pretraining": 0}
    origin |= about_given(start, weights)
    return _fill_and_report(table, split, arms, 1 + len(given), origin, config.label_free)


def compare(config: CompareConfig) -> Path:
    """`unlabel compare`: pretrain × tasks, evaluate, report. Finished runs and cells are not done again."""
    _refuse_nonsense(config)
    _check_settings(config)
    start = start_of(config.init, config.backbone, config.stem)
    config = dataclasses.replace(config, backbone=start.backbone)
    refuse_odd_out(config.out, (*config.data, config.train, config.test))
    source = open_source(config.data)
    image_size = config.image_size or source.usual_size()
    _check_tasks(config, start, image_size)
    seeds = tuple(range(config.seed, config.seed + config.seeds))
    tasks = [
        ev.Arm(name, "backbone", seeds, tuple(config.out / "runs" / f"{name}-seed{seed}" for seed in seeds))
        for name in config.tasks
    ]
    _check_given(config, start, tasks)
    weights = write_given(start, image_size, config.flip, config.out / "given")
    pretraining = load_cache(source, image_size, max_skipped=config.max_skipped)
    like = build_backbone(start.backbone, image_size, start.stem, flip=config.flip).spec
    also, others, notes = finished_runs(config.also, like, pretraining)
    given, more, more_notes = given_arms(start, weights, like, pretraining)
    finished = [*also, *given]
    arms = _with_controls([*tasks, *finished], config, label_free=True)
    split = split_data(config, image_size, pretraining, others | more)
    if split.pretraining_leaks.issuperset(pretraining.hashes):
        raise UserError("every image of --data is a test image or a near-duplicate of one: nothing to pretrain on")
    split.warnings.extend([*notes, *more_notes])
    table = _table(config, split, (start.backbone, start.stem), image_size, config.out, config.flip)
    each = f"{config.minutes:g} minutes" if config.minutes is not None else f"{config.epochs or EPOCHS:g} passes"
    print(f"cost: pretraining {len(tasks) * len(seeds)} × {each}, as far as it is not done")
    print_cost(table, arms, label_free=True)
    for arm in tasks:
        for seed, folder in zip(seeds, arm.runs, strict=True):
            print(f"\n== {arm.name}, seed {seed}")
            pretrain(_pretrain_config(config, arm.name, seed, folder, image_size), exclude=split.pretraining_leaks)
    # Own runs see no test image; those that were given may have.
    seen = most_seen([seen_by(arm.runs[0], split.seen_by.get(arm.name)) for arm in finished])
    origin = {"settings": plain(config), "overlap": {"test_in_pretraining": seen}} | about_given(start, weights)
    origin["left_out_of_pretraining"] = len(split.pretraining_leaks)
    return _fill_and_report(table, split, arms, len(tasks) + len(finished), origin, True)


def _pretrain_config(config: CompareConfig, name: str, seed: int, out: Path, image_size: int | None) -> PretrainConfig:
    tasks = tuple(name.split("+"))
    return PretrainConfig(
        tasks=tasks, data=config.data, out=out, backbone=config.backbone, stem=config.stem, image_size=image_size,
        epochs=config.epochs, minutes=config.minutes, batch_size=config.batch_size, seed=seed, device=config.device,
        precision=config.precision, flip=config.flip, max_skipped=config.max_skipped,
        init=config.init, task_settings={t: config.task_settings[t] for t in tasks if t in config.task_settings},
    )  # fmt: skip


def _check_settings(config: CompareConfig) -> None:
    """Mistakes that would otherwise show after an hour of pretraining."""
    if not 1 <= config.seeds <= MOST:
        raise UserError(f"--seeds {config.seeds}: from 1 to {MOST:,}")
    for name in config.tasks:
        one = _pretrain_config(config, name, config.seed, config.out, config.image_size)
        check_settings(one, {task: load_task(task) for task in one.tasks}, (1.0,) * len(one.tasks))


def _check_given(config: CompareConfig, start: Start, tasks: list[ev.Arm]) -> None:
    """What is wrong with the labelled images, the runs of --also and the names, before images are decoded."""
    open_labelled(config)
    for folder in config.also:
        load_backbone(folder)
    names = [folder.resolve().name for folder in config.also] + ([] if start.init is None else [start.arm])
    _with_controls([*tasks, *(ev.Arm(name, "backbone", (0,), ()) for name in names)], config, label_free=True)


def _check_tasks(config: CompareConfig, start: Start, image_size: int) -> None:
    """Build each task once: only that checks its own settings, against this backbone, its start and this size."""
    backbone = build_backbone(start.backbone, image_size, start.stem)
    load_start(start, backbone, fetch(start), lambda _: None)
    for name in dict.fromkeys(task for arm in config.tasks for task in arm.split("+")):
        task = load_task(name)
        task(backbone, task.Config(**config.task_settings.get(name, {})))


def _with_controls(arms: list[ev.Arm], config: FewLabels, label_free: bool) -> list[ev.Arm]:
    """The arms and, beside them, the controls. No two may have one name: it is what they are known by.

    ``label_free``: the random backbone is among them under any protocol, for its scores.
    """
    most = max(arms, key=lambda arm: len(arm.seeds))
    if config.controls:
        controls = ev.control_arms(config.protocol, most.seeds)
        if label_free and all(arm.kind != "random" for arm in controls):
            controls.append(ev.Arm("random", "random", tuple(most.seeds)))
        arms = arms + controls
    names = [arm.name for arm in arms]
    if taken := sorted({arm.name for arm in arms if arm.kind == "backbone"} & CONTROLS.keys()):
        raise UserError(f"an arm is called {taken[0]!r}, as a control is: rename its folder")
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise UserError(f"two arms are called {twice[0]!r} (tasks, --also folders and controls): rename a folder")
    return arms


# ---- Filling the table and writing it down


def _table(
    config: FewLabels, split: Split, backbone: tuple[str, str], image_size: int, out: Path, flip: bool = True
) -> ev.Table:
    scores_alone = not config.protocol  # by `evaluate --label-free`
    counts = (1,) if scores_alone else label_counts(config, split.pool.y)
    numbers = [c for c in counts if c != "all" and not scores_alone]
    if "all" in counts or (config.draws == 1 and numbers):
        split.warnings.append("of one draw of labels (all are one) intervals leave out the luck of that draw")
    if 1 < config.draws < 10 and numbers:
        split.warnings.append(f"{config.draws} draws of labels instead of 10: intervals are wide and rough")
    device = pick_device(config.device)
    if device.type == "cpu":
        keep_freed_memory()
    table = ev.Table(
        split.pool, split.test, split.unlabelled.images, split.classes, counts, config.draws,
        tuple(dict.fromkeys(config.protocol)), backbone, image_size, device, out, config.top_layers,
        hashlib.sha256("".join(split.unlabelled.hashes).encode()).hexdigest(), flip,
        config.augment,
    )  # fmt: skip
    shared = [str(c) for c in numbers if not table.draws.disjoint_at(c)]
    if shared:
        split.warnings.append(
            f"the pool is too small for draws of {', '.join(shared)} labels per class that share no image: their "
            "intervals are too narrow, and hold for this pool rather than for other labels"
        )
    for warning in split.warnings:
        print(f"note: {warning}")
    out.mkdir(parents=True, exist_ok=True)
    return table


def _fill_and_report(
    table: ev.Table, split: Split, arms: Sequence[ev.Arm], n_tasks: int, origin: dict[str, Any], label_free: bool
) -> Path:
    """``arms``: the tasks (and runs) first, ``n_tasks`` of them, then the controls. ``origin``: for the provenance."""
    out, tasks = table.out, arms[:n_tasks]
    if split.skipped or (out / "skipped.txt").exists():  # of before a repair, perhaps
        write_skipped(out / "skipped.txt", split.skipped)
    rows, predictions = ev.fill(table, arms, tasks[0].name)
    results = summarise(table, tasks, arms, rows, predictions, origin.get("given", {}).get("arm"))
    results["provenance"] = _provenance(out, tasks, split) | origin
    if label_free:
        results["label_free"] = label_free_rows(table, arms, _better(tasks))
    if table.protocols:
        _write(out, table, results, predictions)
        results["pictures"] = draw_gallery(table, tasks[0])  # after the results are safe
    else:  # of a table that was here, whose cells stay
        for name in ("predictions.npz", "splits.json"):
            (out / name).unlink(missing_ok=True)
    write_atomic(out / "results.json", (json.dumps(results, indent=1) + "\n").encode())
    page = report.write_report(out)
    said = [report.format_table(results), report.answer(results)] if table.protocols else []
    said += [report.format_efficiency(results), report.format_forecasts(results)]
    print("\n" + "\n\n".join(filter(None, [*said, report.format_label_free(results), f"open {page}"])))
    return out


def _better(arms: Sequence[ev.Arm]) -> dict[str, str]:
    """``max`` or ``min`` for each metric of the tasks that these arms were trained with, keyed ``task/metric``."""
    tasks = {task for arm in arms for run in arm.runs for task in tasks_of(run)} & set(TASKS)
    return {f"{task}/{metric}": best for task in sorted(tasks) for metric, best in load_task(task).metrics.items()}


def _provenance(out: Path, tasks: Sequence[ev.Arm], split: Split) -> dict[str, Any]:
    runs: dict[str, list[dict[str, Any]]] = {}
    data = dict(split.about)
    for arm in tasks:
        for folder, seed in zip(arm.runs, arm.seeds, strict=True):
            about = RunFolder(folder).read() or {}
            done, asked, free = about.get("finished", {}), about.get("settings", {}), about.get("free", {})
            seconds = done.get("seconds")
            runs.setdefault(arm.name, []).append({
                "path": _relative(folder, out), "seed": asked.get("seed", seed), "tasks": asked.get("tasks"),
                "backbone": asked.get("backbone"), "image_size": about.get("resolved", {}).get("image_size"),
                "shown_as": about.get("data", {}).get("shown_as", ["RGB"]), "init": free.get("init"),
                "steps": done.get("steps"), "images_seen": done.get("images_seen"),
                "minutes": None if seconds is None else round(seconds / 60, 2),
                "images_per_second": round(done["images_seen"] / seconds, 1) if seconds else None,
            })  # fmt: skip
            data.setdefault("pretrain", about.get("data", {}))
    return {
        "runs": runs,
        "images_seen_in_pretraining": {a: [r["images_seen"] for r in rs] for a, rs in runs.items()},
        "minutes": {a: [r["minutes"] for r in rs] for a, rs in runs.items()},
        "hardware": hardware(),
        "versions": versions(),
        "commit": commit(),
        "data": data,
        "warnings": split.warnings,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _relative(folder: Path, out: Path) -> str:
    try:
        return Path(os.path.relpath(folder, out)).as_posix()
    except ValueError:  # on another drive, where there are drives
        return folder.resolve().as_posix()


def _write(out: Path, table: ev.Table, results: dict[str, Any], predictions: ev.Predictions) -> None:
    """results.json, predictions.npz and splits.json."""
    arrays: dict[str, Any] = {
        f"{arm}|{protocol}|{count}": p == table.test.y
        for (arm, protocol, count, stage), p in predictions.items()
        if stage is None and count in table.counts
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
