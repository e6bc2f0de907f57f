"""Which panels a report shows: accuracy against labels, per stage, and each run's loss and metrics."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from unlabel.report_plots import (
    HEIGHT,
    WIDTH,
    Axis,
    Line,
    Panel,
    Point,
    Style,
    draw,
    nice_axis,
    styles,
    swatch,
    thin,
)
from unlabel.report_text import (
    Row,
    arms_of,
    labels_of,
    labels_phrase,
    number,
    protocol_name,
    protocols_of,
    rows_of,
    section,
    unique,
)


@dataclass(frozen=True)
class Run:
    """One pretraining run as the report needs it; `lines` are those of metrics.jsonl."""

    name: str
    arm: str
    folder: Path
    config: dict[str, Any]
    lines: list[dict[str, Any]]


def _json(text: str) -> dict[str, Any]:
    """A JSON object, or an empty one where the text is none (such as the last line of a killed run)."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def read_runs(folder: Path, results: dict[str, Any]) -> list[Run]:
    """The runs named in the provenance, then any other under folder/runs, each once."""
    found: dict[Path, tuple[str, str]] = {}
    for arm, entries in section(results, "provenance", "runs").items():
        for entry in entries if isinstance(entries, list) else []:
            name = entry.get("path") if isinstance(entry, dict) else None
            path = folder / str(name)
            if name and os.path.isdir(path):  # False, too, for what cannot be a path
                found.setdefault(path.resolve(), (path.resolve().name, str(arm)))
    for path in sorted(p for p in folder.glob("runs/*") if p.is_dir()):
        found.setdefault(path.resolve(), (path.name, re.sub(r"-seed\d+$", "", path.name)))
    runs = []
    for path, (name, arm) in found.items():
        lines = [line for line in map(_json, _text(path / "metrics.jsonl").splitlines()) if line]
        runs.append(Run(name, arm, path, _json(_text(path / "config.json")), lines))
    return runs


def label_axis(rows: Sequence[Row]) -> tuple[dict[int | str, float], Axis]:
    """Where each label count stands on a logarithmic axis; "all" has a place of its own at the right."""
    counts = labels_of(rows)
    place: dict[int | str, float] = {n: math.log10(max(n, 1)) for n in counts if isinstance(n, int)}
    span = max(place.values(), default=0.0) - min(place.values(), default=0.0)
    if "all" in counts:
        place["all"] = max(place.values(), default=0.0) + max(0.15 * span, 0.3)
    low, high = min(place.values(), default=0.0), max(place.values(), default=0.0)
    pad = 0.05 * (high - low) if high > low else 1.0
    low, high = low - pad, high + pad
    ticks: list[tuple[float, str]] = []
    for count, x in place.items():  # a tick needs about 26 units of room for its text
        if not ticks or (x - ticks[-1][0]) / (high - low) * WIDTH > 26:
            ticks.append((x, str(count)))
    return place, Axis(low, high, ticks, "labels per class")


def _accuracy_axis(rows: Sequence[Row], chance: float | None) -> Axis:
    """One y axis for panels that are compared: all intervals, and chance where it is not far below."""
    values = [v for r in rows for k in ("mean", "ci_low", "ci_high") if (v := number(r.get(k))) is not None]
    low, high = min(values), max(values)
    if chance is not None and low - 0.25 * (high - low) <= chance < low:
        low = chance
    return nice_axis(max(low, 0.0), min(high, 1.0), percent=True)


def _chance(results: dict[str, Any]) -> float | None:
    """What guessing scores: one over the number of classes, where it is known."""
    classes = section(results, "provenance", "data", "train").get("classes")
    return 1 / len(classes) if isinstance(classes, list) and len(classes) > 1 else None


def _points(rows: Sequence[Row], place: dict[Any, float], column: str, shift: float = 0.0) -> list[Point]:
    points = []
    for row in rows:
        x, mean = place.get(row.get(column)), number(row.get("mean"))
        if x is not None and mean is not None:
            points.append(Point(x + shift, mean, number(row.get("ci_low")), number(row.get("ci_high"))))
    return sorted(points, key=lambda p: p.x)


def _measured(rows: Sequence[Row]) -> list[Row]:
    return [row for row in rows if number(row.get("mean")) is not None]


def accuracy_panels(results: dict[str, Any]) -> list[Panel]:
    """One panel per protocol: accuracy in per cent against labels per class, intervals as bands."""
    summary = _measured(rows_of(results, "summary"))
    if not summary:
        return []
    look, chance, panels = styles(arms_of(summary)), _chance(results), []
    y = _accuracy_axis(summary, chance)
    reference = [(chance, "chance")] if chance is not None and y.low <= chance <= y.high else []
    for protocol in protocols_of(summary):
        rows = [row for row in summary if row.get("protocol") == protocol]
        place, x = label_axis(rows)
        lines, arms = [], arms_of(rows)
        alone = len(place) == 1  # one label count: side by side, or the bars would hide each other
        for i, arm in enumerate(arms):
            shift = (i - (len(arms) - 1) / 2) * 0.03 * (x.high - x.low)
            own = [row for row in rows if row.get("arm") == arm]
            counted = [row for row in own if row.get("labels_per_class") != "all"]
            points = _points(counted, place, "labels_per_class", shift if alone else 0.0)
            lines.append(Line(arm, look[arm], points, joined=not alone))
            rest = [row for row in own if row.get("labels_per_class") == "all"]
            lines.append(Line(arm, look[arm], _points(rest, place, "labels_per_class", shift), joined=False))
        lines = [line for line in lines if line.points]
        lines.sort(key=lambda line: line.style.colour != "control")  # pretrained arms on top
        name = protocol_name(protocol)
        panels.append(Panel(f"{name}, % right", lines, x, y, reference))
    return panels


def _depth(stage: str) -> tuple[int, str]:
    """Sorts "s8" before "s16"."""
    return int(re.sub(r"\D", "", stage) or 0), stage


def stage_panels(results: dict[str, Any], most: int = 3) -> list[Panel]:
    """One panel per protocol and label count (the least, middle and most of many): accuracy against depth."""
    rows = [row for row in _measured(rows_of(results, "stages")) if row.get("stage")]
    if not rows:
        return []
    look = styles(arms_of([*rows_of(results, "summary"), *rows]))
    y, panels = _accuracy_axis(rows, None), []
    for protocol in protocols_of(rows):
        counts = labels_of(row for row in rows if row.get("protocol") == protocol)
        if len(counts) > most:
            counts = [counts[0], counts[(len(counts) - 1) // 2], counts[-1]]
        for count in counts:
            own = [r for r in rows if r.get("protocol") == protocol and r.get("labels_per_class") == count]
            names = sorted(unique(str(row["stage"]) for row in own), key=_depth)
            place = {name: float(i) for i, name in enumerate(names)}
            x = Axis(-0.3, len(names) - 0.7, [(v, k) for k, v in place.items()], "stage, shallow to deep")
            lines = []
            for arm in arms_of(own):
                rows_of_arm = [row for row in own if row.get("arm") == arm]
                lines.append(Line(arm, look[arm], _points(rows_of_arm, place, "stage")))
            lines.sort(key=lambda line: line.style.colour != "control")
            name = protocol_name(protocol)
            panels.append(Panel(f"{name}, {labels_phrase(count)}", lines, x, y))
    return panels


def _series(run: Run, group: str, key: str) -> list[tuple[float, float]]:
    """(epoch, value) of one metric; `group` is "" for the line's own fields, "metrics" or "trivial"."""
    found = []
    for line in run.lines:
        x = number(line.get("epoch", line.get("step")))
        value = number((section(line, group) if group else line).get(key))
        if x is not None and value is not None:
            found.append((x, value))
    return found


def run_panels(runs: Sequence[Run], style: Style) -> list[Panel]:
    """Loss, then each metric beside what a network that learned nothing scores; one line per seed."""
    panels, losses = [], {}
    keys = unique(key for run in runs for line in run.lines for key in section(line, "metrics"))
    for group, key in [("", "loss"), *(("metrics", key) for key in keys)]:
        curves = {run.name: _series(run, group, key) for run in runs}
        curves = {name: points for name, points in curves.items() if points}
        if not curves or (group and curves == losses):  # the only task's loss is the loss
            continue
        if not group:
            losses = curves
        trivial = [y for run in runs for _, y in _series(run, "trivial", key)]
        lines = [Line(n, style, thin(p), marked=len(p) == 1, percent=False) for n, p in curves.items()]
        # The first steps may tower over the rest; they stop at the edge of the chart.
        settled = [y for p in curves.values() for _, y in p[len(p) // 30 :]]
        level = [sum(trivial) / len(trivial)] if trivial else []
        y = nice_axis(min(settled + level), max(settled + level))
        xs = [x for p in curves.values() for x, _ in p]
        x = nice_axis(min(xs), max(xs), "passes over the images")
        panels.append(Panel(key, lines, x, y, [(v, "learned nothing") for v in level]))
    return panels


def legend(panels: Sequence[Panel]) -> list[tuple[str, Style]]:
    """Name and style of every arm in these panels, pretrained arms first."""
    shown = {line.name: line.style for panel in panels for line in panel.lines}
    return sorted(shown.items(), key=lambda item: item[1].colour == "control")


def figure(panels: Sequence[Panel], style_sheet: str, columns: int | None = None) -> str:
    """Panels with their legend as one SVG document that stands alone, for a README; "" without panels.

    `style_sheet` is the CSS text that colours them; all are in one row unless `columns` are given.
    """
    if not panels:
        return ""
    columns = columns or len(panels)
    width, rows = WIDTH * columns, -(-len(panels) // columns)
    x, y, entries = 0, HEIGHT * rows + 18, []
    for name, style in legend(panels):
        room = 44 + round(7 * len(name))
        if x + room > width and x:
            x, y = 0, y + 20
        entries.append(swatch(style, f'x="{x + 8}" y="{y - 10}"'))
        entries.append(f'<text x="{x + 44}" y="{y}">{escape(name)}</text>')
        x += room + 12
    size = f'viewBox="0 0 {width} {y + 12}" width="{width}" height="{y + 12}"'
    places = [(WIDTH * (i % columns), HEIGHT * (i // columns)) for i in range(len(panels))]
    charts = [
        draw(panel, f'x="{a}" y="{b}" width="{WIDTH}" height="{HEIGHT}"')
        for panel, (a, b) in zip(panels, places, strict=True)
    ]
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" class="figure" {size}><style>{style_sheet}</style>'
        f'<rect class="paper" width="100%" height="100%"/>{"".join(charts + entries)}</svg>\n'
    )
