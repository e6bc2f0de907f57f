"""From predictions to accuracies, intervals and differences: the only place that reads the test labels."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from downstream import evaluate as ev
from downstream import stats
from downstream.efficiency import labels_to_match
from downstream.forecast import LEVEL, forecast

__all__ = ["summarise"]


def summarise(
    table: ev.Table,
    tasks: Sequence[ev.Arm],
    arms: Sequence[ev.Arm],
    rows: list[dict[str, Any]],
    predictions: ev.Predictions,
    given: str | None = None,
) -> dict[str, Any]:
    """The content of results.json, but for its provenance. ``rows`` gain their accuracies.

    ``given``: which of the ``tasks`` are weights of --init as they are; the others are compared with it, too.
    """
    clusters_ = table.test.clusters
    correct = {key: p == table.test.y for key, p in predictions.items()}  # (seeds, draws, T)
    seed_at = {arm.name: {seed: k for k, seed in enumerate(arm.seeds)} for arm in arms}
    for row in rows:
        hits = correct[row["arm"], row["protocol"], row["labels_per_class"], None]
        row["accuracy"] = float(hits[seed_at[row["arm"]][row["seed"]], row["draw"]].mean())
    summary, stages = [], []
    for (arm, protocol, count, stage), hits in correct.items():
        if count not in table.counts:
            continue
        e = stats.summarise(hits, clusters_)
        line = {
            "arm": arm, "protocol": protocol, "labels_per_class": count, "mean": e.mean, "ci_low": e.ci_low,
            "ci_high": e.ci_high, "n_draws": e.n_draws, "n_seeds": e.n_seeds, "unit": e.unit, "note": e.note,
        }  # fmt: skip
        (summary.append(line) if stage is None else stages.append({**line, "stage": stage}))
    present = {arm.name for arm in arms}
    pairs = [(a.name, v, p) for a in tasks for v, p in _VERSUS if v in present]
    pairs += [(a.name, tasks[0].name, p) for a in tasks[1:] if a.name != given for p in table.protocols]
    pairs += [(a.name, given, p) for a in tasks if given not in (None, a.name) for p in table.protocols]
    primary = _primary(tasks[0].name, given, present, table)
    paired = []
    for arm, versus, protocol in pairs:
        for count in table.counts:
            if (arm, protocol, count, None) not in correct:
                continue
            a, b = correct[arm, protocol, count, None], correct[versus, protocol, count, None]
            e = stats.paired(*stats.alike(a, b), clusters_)
            paired.append({
                "arm": arm, "versus": versus, "protocol": protocol, "labels_per_class": count, "difference": e.mean,
                "ci_low": e.ci_low, "ci_high": e.ci_high, "verdict": stats.verdict(e.ci_low, e.ci_high),
                "primary": (arm, versus, protocol, count) in primary, "n_draws": e.n_draws, "n_seeds": e.n_seeds,
                "unit": e.unit, "note": e.note,
            })  # fmt: skip
    paired += _over_finetuning(table, arms, correct)
    saved = list(_efficiency(table, tasks, correct)) if "scratch" in present else []
    return {
        "schema": 1, "rows": rows, "summary": summary, "stages": stages, "paired": paired, "label_efficiency": saved,
        "forecast": list(_forecasts(table, tasks, correct)),
    }  # fmt: skip


def _over_finetuning(table: ev.Table, arms: Sequence[ev.Arm], correct: ev.Predictions) -> Iterator[dict[str, Any]]:
    """What self-training and S4L add to the fine-tuning of the same arm, which ``versus_protocol`` names."""
    for arm, protocol in itertools.product(arms, ev.TRAINED[1:]):
        for count in table.counts:
            pair = [correct.get((arm.name, p, count, None)) for p in (protocol, "finetune")]
            if pair[0] is None or pair[1] is None:
                continue
            e = stats.paired(*stats.alike(pair[0], pair[1]), table.test.clusters)
            yield {
                "arm": arm.name, "versus": arm.name, "protocol": protocol, "versus_protocol": "finetune",
                "labels_per_class": count, "difference": e.mean, "ci_low": e.ci_low, "ci_high": e.ci_high,
                "verdict": stats.verdict(e.ci_low, e.ci_high), "primary": False, "n_draws": e.n_draws,
                "n_seeds": e.n_seeds, "unit": e.unit, "note": e.note,
            }  # fmt: skip


def _efficiency(table: ev.Table, tasks: Sequence[ev.Arm], correct: ev.Predictions) -> Iterator[dict[str, Any]]:
    """For each task and label count, the labels per class that `scratch` needs to match it.

    All labels of classes of which one has half as many images again as another are no number per class, and are left
    out.
    """
    sizes = np.bincount(table.pool.y, minlength=len(table.classes))
    counts: list[ev.Count] = [c for c in table.counts if c != "all" or sizes.max() <= 1.5 * sizes.min()]
    for protocol in table.protocols:
        control = {
            table.labels(count) / len(table.classes): correct["scratch", protocol, count, None]
            for count in counts
            if ("scratch", protocol, count, None) in correct
        }
        for arm in tasks if control else []:
            for count in table.counts:
                match = labels_to_match(correct[arm.name, protocol, count, None], control, table.test.clusters)
                yield {
                    "arm": arm.name, "protocol": protocol, "labels_per_class": count,
                    "scratch_labels": match.labels, "ci_low": match.low, "ci_high": match.high,
                    "measured": [min(control), max(control)],
                }  # fmt: skip


def _forecasts(table: ev.Table, tasks: Sequence[ev.Arm], correct: ev.Predictions) -> Iterator[dict[str, Any]]:
    """For each task: what twice and four times the largest number of labels would give the linear probe."""
    largest = max((c for c in table.counts if c != "all"), default=0)
    clusters = len(np.unique(table.test.clusters))
    for arm in tasks if largest >= 4 and "linear" in table.protocols else []:
        counts = largest, largest // 4
        accuracy, earlier = (float(correct[arm.name, "linear", count, None].mean()) for count in counts)
        for times, found in forecast(accuracy, earlier, counts, len(table.classes), clusters).items():
            yield {
                "arm": arm.name, "protocol": "linear", "from": largest, "labels_per_class": times * largest,
                "mean": found.mean, "low": found.low, "high": found.high, "level": LEVEL,
            }  # fmt: skip


_VERSUS = [
    ("scratch", "finetune"), ("scratch", "self-training"), ("scratch", "s4l"), ("random", "linear"),
    ("random", "knn"), ("patches", "linear"), ("patches", "knn"), ("pixels", "linear"), ("pixels", "knn"),
]  # fmt: skip


def _primary(first: str, given: str | None, present: Iterable[str], table: ev.Table) -> list[tuple[Any, ...]]:
    """What is named before the test labels are read: one comparison; with ``given`` weights, each two of the three."""
    middle = table.counts[len(table.counts) // 2]
    trained = next((p for p in ev.TRAINED if p in table.protocols), None)
    if trained and "scratch" in present:
        protocol, control = trained, "scratch"
    elif "linear" in table.protocols and "random" in present:
        protocol, control = "linear", "random"
    else:
        protocol, control = next((p for p in (*ev.TRAINED, "linear") if p in table.protocols), "knn"), None
    pairs = [(first, control), (first, given), (given, control)]
    return [(a, b, protocol, middle) for a, b in pairs if a is not None and b is not None]
