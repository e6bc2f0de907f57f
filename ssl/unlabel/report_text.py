"""Results as words: the order of the arms, the answer in one sentence, the plain-text table.

Everything here reads the dictionary of `results.json` (schema 1) and tolerates missing fields: what is not
there is left out. Accuracies and differences are fractions in the file and per cent or points in the text.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

Row = dict[str, Any]

PROTOCOLS = {
    "linear": "linear probe",
    "knn": "k-NN",
    "finetune": "fine-tuning",
    "self-training": "self-training",
    "s4l": "S4L",
}
CONTROLS = {
    "scratch": "training from scratch",
    "random": "a random backbone",
    "patches": "k-means on patches",
    "pixels": "PCA on pixels",
}
ACCURACY_OF = {
    "linear": "linear-probe accuracy",
    "knn": "k-NN accuracy",
    "finetune": "fine-tuned accuracy",
    "self-training": "self-trained accuracy",
    "s4l": "S4L accuracy",
}


def rows_of(results: dict[str, Any], key: str) -> list[Row]:
    """The list of rows under `key`, or an empty one."""
    rows = results.get(key)
    return [row for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []


def section(results: Any, *keys: str) -> dict[str, Any]:
    """The dictionary at a nested path, such as `provenance, data, test`, or an empty one."""
    for key in keys:
        results = results.get(key) if isinstance(results, dict) else None
    return results if isinstance(results, dict) else {}


def number(value: Any) -> float | None:
    """A finite number, or None for what is missing, not a number, or not finite."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return None
    return float(value)


def unique(values: Iterable[Any]) -> list[Any]:
    """The distinct values in order of first appearance."""
    return list(dict.fromkeys(values))


def arms_of(rows: Iterable[Row]) -> list[str]:
    """Arms in order of first appearance, the controls last."""
    names = [str(name) for name in unique(row.get("arm") for row in rows) if name is not None]
    return [n for n in names if n not in CONTROLS] + [n for n in CONTROLS if n in names]


def protocols_of(rows: Iterable[Row]) -> list[str]:
    """Protocols in the order of PROTOCOLS, then any other."""
    names = [str(name) for name in unique(row.get("protocol") for row in rows) if name is not None]
    return [n for n in PROTOCOLS if n in names] + [n for n in names if n not in PROTOCOLS]


def labels_of(rows: Iterable[Row]) -> list[int | str]:
    """Label counts per class, ascending, "all" last."""
    counts = unique(row.get("labels_per_class") for row in rows)
    return sorted((n for n in counts if isinstance(n, int)), key=int) + (["all"] if "all" in counts else [])


def protocol_name(protocol: Any) -> str:
    """`knn` -> "k-NN"; an unknown one by its own name."""
    return PROTOCOLS.get(str(protocol), str(protocol))


def labels_phrase(labels: Any) -> str:
    """`10` -> "10 labels per class"; "all" -> "all labels"."""
    return "all labels" if labels == "all" else f"{labels} label{'' if labels == 1 else 's'} per class"


def cell(row: Row | None) -> str:
    """Mean and interval in per cent: "71.9 [69.0, 74.8]"; "-" where there is none."""
    mean = number(row.get("mean")) if row else None
    if row is None or mean is None:
        return "-"
    low, high = number(row.get("ci_low")), number(row.get("ci_high"))
    interval = f" [{100 * low:.1f}, {100 * high:.1f}]" if low is not None and high is not None else ""
    return f"{100 * mean:.1f}{interval}"


def find(rows: Iterable[Row], **columns: Any) -> Row | None:
    """The first row with these values, or None."""
    return next((row for row in rows if all(row.get(k) == v for k, v in columns.items())), None)


def comparisons(results: dict[str, Any]) -> list[Row]:
    """The paired rows that say what was compared and hold a difference."""
    keys = ("arm", "versus", "protocol", "labels_per_class")
    rows = rows_of(results, "paired")
    return [r for r in rows if number(r.get("difference")) is not None and all(r.get(k) is not None for k in keys)]


def sign(row: Row) -> int:
    """1 where the interval of a paired difference lies above zero, -1 below, 0 where it cannot be told."""
    low, high = number(row.get("ci_low")), number(row.get("ci_high"))
    if low is None or high is None:
        return 0
    return 1 if low > 0 else -1 if high < 0 else 0


def verdict(row: Row) -> str:
    """The stored verdict of a paired row, else the one its interval gives."""
    words = {1: "helps", -1: "does not help", 0: "cannot tell with these labels"}
    return str(row.get("verdict") or words[sign(row)])


def test_images(results: dict[str, Any]) -> float | None:
    """How many images the test set holds."""
    return number(section(results, "provenance", "data", "test").get("images"))


def seeds_of(results: dict[str, Any], row: Row) -> float | None:
    """How many pretraining seeds the arm of a row has."""
    same = {key: row.get(key) for key in ("arm", "protocol", "labels_per_class")}
    return number((find(rows_of(results, "summary"), **same) or {}).get("n_seeds"))


def basis(results: dict[str, Any], row: Row) -> str:
    """What an interval is over: "for this backbone (10 draws of labels, 5,000 test images)"."""
    same = {key: row.get(key) for key in ("arm", "protocol", "labels_per_class")}
    source = row if "unit" in row else find(rows_of(results, "summary"), **same) or {}
    draws, seeds, tests = number(source.get("n_draws")), number(source.get("n_seeds")), test_images(results)
    one_run = seeds_of(results, row) == 1  # then the seeds are those of what it is compared with
    kind = f"seeds of {row['versus']}" if one_run and row.get("versus") else "pretraining seeds"
    parts = []
    if seeds and seeds > 1:
        parts.append(f"{seeds:.0f} {kind}")
    if draws:
        parts.append("one draw of labels, whose luck is not in it" if draws == 1 else f"{draws:.0f} draws of labels")
    if tests:
        parts.append(f"{tests:,.0f} test images")
    if source.get("unit") == "seed" and not one_run:
        scope = "over repeated pretraining"
    else:
        scope = "for these backbones" if seeds and seeds > 1 and not one_run else "for this backbone"
    return f"{scope} ({', '.join(parts)})" if parts else scope


def _middle(rows: list[Row]) -> Row | None:
    """Of the first arm's rows, the one at the middle label count."""
    arms = arms_of(rows)
    own = [row for row in rows if arms and row.get("arm") == arms[0]]
    counts = labels_of(own)
    return find(own, labels_per_class=counts[(len(counts) - 1) // 2]) if counts else None


def primary_row(results: dict[str, Any]) -> Row | None:
    """The comparison that the answer is about.

    The one marked primary; else the first of fine-tuning, self-training and S4L against `scratch`, else the linear
    probe against `random`, else any other against a control, each for the first arm at its middle label count. Two
    pretrained arms, or two ways to train one, say nothing of pretraining: None where there are only those.
    """
    paired = comparisons(results)
    named = next((row for row in paired if row.get("primary") is True), None)
    if named is not None:
        return named
    paired = [r for r in paired if str(r["versus"]) in CONTROLS and r.get("versus_protocol") is None]
    trained = ("finetune", "self-training", "s4l")
    for protocol, versus in (*((p, "scratch") for p in trained), ("linear", "random")):
        row = _middle([r for r in paired if r.get("protocol") == protocol and r.get("versus") == versus])
        if row is not None:
            return row
    return _middle(paired)


def title(results: dict[str, Any]) -> str:
    """The answer as a headline of one short line."""
    row = primary_row(results)
    if row is None:
        alone = rows_of(results, "label_free") and not rows_of(results, "summary")
        return "Scores without labels" if alone else "What the labels bought"
    subject, points = f"{row.get('arm')} pretraining", 100 * float(row["difference"])
    if sign(row) == 0:
        return f"These labels cannot tell whether {subject} helps"
    verb = "helps" if sign(row) > 0 else "does not help"
    return f"{subject} {verb}: {points:+.1f} points with {labels_phrase(row.get('labels_per_class'))}"


def answer(results: dict[str, Any]) -> str:
    """The answer in one sentence, with its 95 % interval and what the interval is over."""
    row = primary_row(results)
    if row is None:
        return _answer_without_control(results)
    low, high, points = number(row.get("ci_low")), number(row.get("ci_high")), 100 * float(row["difference"])
    what = ACCURACY_OF.get(str(row.get("protocol")), "accuracy")
    versus = CONTROLS.get(str(row.get("versus")), str(row.get("versus")))
    start, subject = f"With {labels_phrase(row.get('labels_per_class'))}", f"{row.get('arm')} pretraining"
    end = f"{basis(results, row)}."
    if low is None or high is None:
        change = f"changes {what} by {points:+.1f} points against {versus}"
        return f"{start}, {subject} {change}, without an interval, {end}"
    low, high = 100 * low, 100 * high
    if sign(row) > 0:
        change = f"raises {what} by {points:.1f} points over {versus}"
        return f"{start}, {subject} {change}, 95 % interval {low:.1f} to {high:.1f}, {end}"
    if sign(row) < 0:
        change = f"does not help: it lowers {what} by {-points:.1f} points against {versus}"
        return f"{start}, {subject} {change}, 95 % interval {-high:.1f} to {-low:.1f}, {end}"
    change = f"{what} differs by {points:+.1f} points from {versus}"
    interval = f"95 % interval {low:+.1f} to {high:+.1f}"
    return f"{start}, it cannot be told whether {subject} helps: {change}, {interval}, {end}"


def _answer_without_control(results: dict[str, Any]) -> str:
    row = _middle([row for row in rows_of(results, "summary") if number(row.get("mean")) is not None])
    if row is None:
        if rows_of(results, "label_free"):
            return "No accuracy was measured, only what needs no labels."
        return "There is no accuracy to report yet."
    what = ACCURACY_OF.get(str(row.get("protocol")), "accuracy")
    start = f"With {labels_phrase(row.get('labels_per_class'))}, {row.get('arm')}"
    end = f"{basis(results, row)}; there is no control to compare it with."
    return f"{start} reaches a {what} of {cell(row)} %, {end}"


def _blocks(columns: list[tuple[str, int | str]], room: int) -> list[list[tuple[str, int | str]]]:
    """Columns in blocks of at most `room`; a protocol is not split where it fits into a block of its own."""
    blocks: list[list[tuple[str, int | str]]] = [[]]
    for protocol in unique(protocol for protocol, _ in columns):
        group = [column for column in columns if column[0] == protocol]
        if len(blocks[-1]) + len(group) > room and blocks[-1]:
            blocks.append([])
        for column in group:
            if len(blocks[-1]) == room:
                blocks.append([])
            blocks[-1].append(column)
    return [block for block in blocks if block]


def format_table(results: dict[str, Any], width: int = 110) -> str:
    """The summary as plain text for a terminal or a log: arms as rows, protocol x labels as columns.

    Cells are "71.9 [69.0, 74.8]" in per cent. Columns that do not fit into `width` characters go into a
    further block below. ASCII but for the names, so that it prints on any terminal.
    """
    summary = rows_of(results, "summary")
    cells = {(str(r.get("arm")), str(r.get("protocol")), r.get("labels_per_class")): cell(r) for r in summary}
    arms = arms_of(summary)
    columns = [
        (protocol, labels)
        for protocol in protocols_of(summary)
        for labels in labels_of(r for r in summary if r.get("protocol") == protocol)
    ]
    if not columns:
        return "no results"
    first = min(max(map(len, ["labels per class", *arms])), 32)
    wide = max(len(text) for text in cells.values()) + 2
    lines = ["% right on the test images [95 % interval]"]
    for block in _blocks(columns, max(1, (width - first) // wide)):
        head, under = "", ""
        for protocol in unique(protocol for protocol, _ in block):
            span = wide * sum(p == protocol for p, _ in block) - 2
            head += "  " + protocol_name(protocol)[:span].center(span)
            under += "  " + "-" * span
        counts = "".join(str(labels).rjust(wide) for _, labels in block)
        lines += ["", " " * first + head.rstrip(), " " * first + under]
        lines.append("labels per class".ljust(first) + counts)
        for arm in arms:
            texts = [cells.get((arm, protocol, labels), "-") for protocol, labels in block]
            if any(text != "-" for text in texts):
                name = arm if len(arm) <= first else arm[: first - 2] + ".."
                lines.append(name.ljust(first) + "".join(text.rjust(wide) for text in texts))
    scopes = unique(basis(results, row) for row in summary)
    lines += ["", f"Intervals: {scopes[0]}{', as far as drawn' if len(scopes) > 1 else ''}."]
    return "\n".join(lines)
