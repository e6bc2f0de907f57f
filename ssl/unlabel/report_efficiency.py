"""What labels are worth: how many `scratch` needs to match an arm, and what more of them would give it.

From `label_efficiency` and `forecast` in results.json.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from html import escape
from typing import Any

from unlabel.report_charts import label_axis
from unlabel.report_html import html_figure, html_table, show
from unlabel.report_plots import Axis, Line, Panel, Point, Style, short, styles
from unlabel.report_text import Row, arms_of, cell, find, labels_of, number, protocol_name, protocols_of, rows_of

__all__ = ["efficiency", "forecasts", "format_efficiency", "format_forecasts"]


def _count(row: Row, key: str) -> str:
    """A number of labels per class as text: "140", "< 10" and "> 250" where it lies outside what was measured."""
    least, most = _ends(row)
    value = number(row.get(key))
    if value is None:
        return f"> {most:,.0f}"
    return f"{value:,.0f}" if value else f"< {least:,.0f}"


def _ends(row: Row) -> tuple[float, float]:
    """The least and the most labels per class that `scratch` was measured with."""
    least, most = row["measured"]
    return float(least), float(most)


def _cell(row: Row | None) -> str:
    """ "140 [90, > 250]"; the interval is left out where it would only say the same again."""
    if row is None:
        return "-"
    middle, low, high = (_count(row, key) for key in ("scratch_labels", "ci_low", "ci_high"))
    return middle if middle == low == high else f"{middle} [{low}, {high}]"


def _rows(results: dict[str, Any]) -> list[Row]:
    """The rows that are whole: of a stranger's file nothing is guessed."""

    def labels(value: Any) -> bool:
        return value is None or ((n := number(value)) is not None and n >= 0)

    found = []
    for row in rows_of(results, "label_efficiency"):
        ends, count = row.get("measured"), row.get("labels_per_class")
        known = [n for end in ends if (n := number(end))] if isinstance(ends, list) else []
        if (
            isinstance(row.get("arm"), str) and isinstance(row.get("protocol"), str)
            and (count == "all" or (type(count) is int and count > 0))
            and len(known) == 2 and 0 < known[0] <= known[1]
            and all(key in row and labels(row[key]) for key in ("scratch_labels", "ci_low", "ci_high"))
        ):  # fmt: skip
            found.append(row)
    return found


def _forecast_rows(results: dict[str, Any]) -> list[Row]:
    keys = {"arm": str, "protocol": str, "from": int, "labels_per_class": int}
    rows = rows_of(results, "forecast")
    return [r for r in rows if all(type(r.get(k)) is kind for k, kind in keys.items()) and number(r.get("mean"))]


def _by_arm(title: str, rows: list[Row], value: Callable[[Row], str]) -> str:
    """A line per arm as plain ASCII text, values behind their label counts; "" without rows."""
    lines = [title, ""] if rows else []
    for arm in arms_of(rows):
        own = [row for row in rows if row.get("arm") == arm]
        lines.append(f"{arm}: " + ", ".join(f"{row.get('labels_per_class')}: {value(row)}" for row in own))
    return "\n".join(lines)


def format_efficiency(results: dict[str, Any]) -> str:
    """The labels that `scratch` needs as plain text; "" without results."""
    title = "labels per class: those that scratch needs to match it [95 % interval]"
    return _by_arm(title, _rows(results), _cell)


def _panel(rows: list[Row], protocol: str, look: dict[str, Style]) -> Panel:
    place, x = label_axis(rows)
    least, most = math.log10(_ends(rows[0])[0]), math.log10(_ends(rows[0])[1])
    pad = 0.12 * (most - least) or 0.3
    low, high = least - pad, most + pad

    def height(value: float | None) -> float:
        """What is below or above all that was measured is drawn at the edge."""
        return high if value is None else math.log10(value) if value else low

    lines, arms = [], arms_of(rows)
    for i, arm in enumerate(arms):
        shift = (i - (len(arms) - 1) / 2) * 0.03 * (x.high - x.low) if len(place) == 1 else 0.0  # side by side
        own = sorted((r for r in rows if r["arm"] == arm), key=lambda r: place[r["labels_per_class"]])
        for joined in (True, False):  # `all` stands apart
            points = [
                Point(
                    place[row["labels_per_class"]] + shift,
                    height(row["scratch_labels"]),
                    height(row["ci_low"]),
                    height(row["ci_high"]),
                    f"{arm}, {row['labels_per_class']} labels per class: scratch needs {_cell(row)}",
                )
                for row in own
                if (row["labels_per_class"] != "all") == joined
            ]
            lines.append(Line(arm, look[arm], points, joined=joined and len(points) > 1))
    counts = [n for n in labels_of(rows) if isinstance(n, int)]
    same = [Point(place[n], math.log10(n)) for n in counts]
    lines.insert(0, Line("as many", Style("control", "1 6"), same, marked=False))
    ticks = [(low, f"< {short(10**least)}"), (high, f"> {short(10**most)}")]
    for n in counts:  # a tick needs room for its text
        if all(abs(math.log10(n) - at) > 0.07 * (high - low) for at, _ in ticks):
            ticks.append((math.log10(n), short(n)))
    lines = [line for line in lines if line.points]
    return Panel(f"{protocol_name(protocol)}, labels that scratch needs", lines, x, Axis(low, high, ticks))


def efficiency(results: dict[str, Any]) -> str:
    """The figure and its numbers."""
    rows = _rows(results)
    if not rows:
        return ""
    look = styles(arms_of([*rows_of(results, "summary"), *rows]))
    parts, panels = [], []
    for protocol in protocols_of(rows):
        own = [row for row in rows if row.get("protocol") == protocol]
        panels.append(_panel(own, protocol, look))
        counts = labels_of(own)
        lines = [
            [escape(arm), *(escape(_cell(find(own, arm=arm, labels_per_class=count))) for count in counts)]
            for arm in arms_of(own)
        ]
        about = f"<b>{escape(protocol_name(protocol))}</b>, labels per class that scratch needs [95&nbsp;% interval]"
        parts.append(html_table(["labels per class", *map(str, counts)], lines, about))
    about = (
        "Labels per class with which training from scratch is as good as the arm is with those below it. Between the "
        "counts that were measured, its accuracy is taken to rise evenly with the logarithm of the count; beyond them "
        "nothing is claimed."
    )
    return "<h2>Labels saved</h2>\n" + html_figure(panels, about) + "\n" + "\n".join(parts)


def _per_cent(row: Row) -> str:
    """ "77.2 [74.9, 79.4]" of a forecast."""
    return cell({"mean": row.get("mean"), "ci_low": row.get("low"), "ci_high": row.get("high")})


def format_forecasts(results: dict[str, Any]) -> str:
    """The forecasts as plain text; "" without results."""
    title = "forecast for more labels per class: % right by the linear probe [80 % interval]"
    return _by_arm(title, _forecast_rows(results), _per_cent)


def forecasts(results: dict[str, Any]) -> str:
    """What the linear probe would gain from more labels, as a table."""
    rows = _forecast_rows(results)
    if not rows:
        return ""
    counts = labels_of(rows)
    lines = []
    for arm in arms_of(rows):
        own = [row for row in rows if row.get("arm") == arm]
        known = find(
            rows_of(results, "summary"), arm=arm, protocol=own[0].get("protocol"), labels_per_class=own[0].get("from")
        )
        values = [_per_cent(row) if (row := find(own, labels_per_class=count)) else "-" for count in counts]
        lines.append([escape(arm), cell(known).partition(" ")[0], *values])
    head = ["labels per class", f"{show(rows[0].get('from'))} (measured)", *map(str, counts)]
    about = "<b>linear probe</b>, % right, forecast [80&nbsp;% interval]"
    return (
        "<h2>More labels?</h2>\n<p>How far accuracy would rise with twice and four times as many labels of the same "
        "kind, judged by how it rose from a quarter of them. The intervals are meant to hold in four cases of five; on "
        "problems that they were not fitted to, partly of the same images, they held in 76 to 90 %.</p>\n"
        + html_table(head, lines, about)
    )
