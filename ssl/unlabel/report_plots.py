"""Charts as small SVG panels whose text is text and whose colours come from the page.

A panel is 340 units wide, near one phone column, so its letters keep their size: the page puts several side
by side on a wide screen and one under the other on a narrow one. Arms are told apart by colour, marker and
dash, so that they survive colour blindness and a grey printer. Colours are the classes `a0` to `a6` and
`control`, set in report.css.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape

from unlabel.report_text import CONTROLS

WIDTH, HEIGHT = 340, 236
_LEFT, _RIGHT, _TOP, _BOTTOM = 40, 12, 28, 40
_COLOURS = 7
_DASHES = {"scratch": "7 3", "random": "2 3", "patches": "8 3 2 3", "pixels": "4 4"}
_MARKERS = ("circle", "square", "diamond", "triangle", "down")


@dataclass(frozen=True)
class Style:
    """How an arm is drawn everywhere: CSS class of its colour, dash pattern and marker."""

    colour: str
    dash: str = ""
    marker: str = "circle"


@dataclass(frozen=True)
class Point:
    """A value with an optional interval, in the units of the axes."""

    x: float
    y: float
    low: float | None = None
    high: float | None = None
    tip: str = ""  # for the tooltip, instead of the value


@dataclass(frozen=True)
class Line:
    """Points in order of x; where they are not `joined`, the intervals are bars instead of a band."""

    name: str
    style: Style
    points: Sequence[Point]
    joined: bool = True
    marked: bool = True
    percent: bool = True  # in the tooltips


@dataclass(frozen=True)
class Axis:
    """A linear axis: its ends, its ticks as (value, text), and what it shows."""

    low: float
    high: float
    ticks: Sequence[tuple[float, str]]
    label: str = ""


@dataclass(frozen=True)
class Panel:
    """One chart. `reference` holds horizontal lines as (y, text)."""

    title: str
    lines: Sequence[Line]
    x: Axis
    y: Axis
    reference: Sequence[tuple[float, str]] = field(default=())


def styles(arms: Sequence[str]) -> dict[str, Style]:
    """One style per arm: colours for pretrained arms, dashed greys for the controls."""
    own = [arm for arm in arms if arm not in CONTROLS]
    made = {}
    for i, arm in enumerate(own):
        dash = "" if i < _COLOURS else "5 2"  # the eighth arm repeats the first colour, dashed
        made[arm] = Style(f"a{i % _COLOURS}", dash, _MARKERS[i % len(_MARKERS)])
    for i, arm in enumerate(arm for arm in CONTROLS if arm in arms):
        made[arm] = Style("control", _DASHES[arm], _MARKERS[i % len(_MARKERS)])
    return made


def nice_axis(low: float, high: float, label: str = "", percent: bool = False, count: int = 5) -> Axis:
    """An axis a little wider than [low, high], with about `count` ticks at 1, 2 or 5 times a power of ten."""
    if high <= low:
        low, high = low - max(abs(low) * 0.1, 0.01), high + max(abs(high) * 0.1, 0.01)
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw * 0.999)
    low, high = low - 0.04 * (high - low), high + 0.04 * (high - low)
    values = [i * step for i in range(math.ceil(low / step), math.floor(high / step) + 1)]
    if percent:  # an accuracy has no tick outside 0 … 100 %
        values = [value for value in values if -1e-9 < value < 1 + 1e-9]
    digits = max(0, -math.floor(math.log10(step * (100 if percent else 1)) + 1e-9))
    texts = [f"{v * 100:.{digits}f}" if percent else short(v, digits) for v in values]
    return Axis(low, high, list(zip(values, texts, strict=True)), label)


def short(value: float, digits: int = 0) -> str:
    """12000 -> "12k", 1500000 -> "1.5M", else fixed decimals."""
    for size, unit in ((1e6, "M"), (1e3, "k")):
        if abs(value) >= 10 * size or (abs(value) >= size and value % (size / 10) == 0):
            return f"{value / size:g}{unit}"
    return f"{value:.{digits}f}"


def _marker(kind: str, x: float, y: float, r: float = 3.2) -> str:
    if kind == "circle":
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{r}" fill="currentColor"/>'
    corners = {
        "square": ((-1, -1), (1, -1), (1, 1), (-1, 1)),
        "diamond": ((0, -1.3), (1.3, 0), (0, 1.3), (-1.3, 0)),
        "triangle": ((0, -1.2), (1.15, 0.9), (-1.15, 0.9)),
        "down": ((0, 1.2), (1.15, -0.9), (-1.15, -0.9)),
    }[kind]
    points = " ".join(f"{x + r * dx:.1f},{y + r * dy:.1f}" for dx, dy in corners)
    return f'<polygon points="{points}" fill="currentColor"/>'


def _line(line: Line, sx, sy) -> list[str]:
    """One arm: band or bars, stroke, markers with the value as tooltip."""
    style, points = line.style, line.points
    banded = [p for p in points if p.low is not None and p.high is not None]
    parts = [f'<g class="{style.colour}">']
    if line.joined and len(banded) > 1:
        upper = [f"{sx(p.x):.1f},{sy(p.high):.1f}" for p in banded]
        lower = [f"{sx(p.x):.1f},{sy(p.low):.1f}" for p in reversed(banded)]
        parts.append(f'<polygon class="band" points="{" ".join(upper + lower)}"/>')
    else:
        parts += [f'<path class="bar" d="M{sx(p.x):.1f} {sy(p.low):.1f}V{sy(p.high):.1f}"/>' for p in banded]
    if line.joined and len(points) > 1:
        path = " ".join(f"{sx(p.x):.1f},{sy(p.y):.1f}" for p in points)
        dash = f' stroke-dasharray="{style.dash}"' if style.dash else ""
        parts.append(f'<polyline class="line" points="{path}"{dash}/>')
    if line.marked:
        for p in points:
            tip = f"{line.name}: {100 * p.y:.1f} %" if line.percent else f"{line.name}: {p.y:.4g}"
            if p.low is not None and p.high is not None:
                tip += f" [{100 * p.low:.1f}, {100 * p.high:.1f}]"
            tip = p.tip or tip
            parts.append(f"<g><title>{escape(tip)}</title>{_marker(style.marker, sx(p.x), sy(p.y))}</g>")
    parts.append("</g>")
    return parts


def _fit(text: str, most: int = 42) -> str:
    """Text that fits into the width of a panel; the whole is in its label for screen readers."""
    return text if len(text) <= most else text[: most - 1] + "…"


def draw(panel: Panel, at: str = "") -> str:
    """A panel as an `<svg>` element; `at` holds extra attributes such as a position inside another SVG."""
    x, y = panel.x, panel.y
    right, bottom = WIDTH - _RIGHT, HEIGHT - _BOTTOM

    def sx(value: float) -> float:
        return _LEFT + (value - x.low) / (x.high - x.low) * (right - _LEFT)

    def sy(value: float) -> float:  # values beyond the axis, such as a first loss, stop at its edge
        return bottom - (min(max(value, y.low), y.high) - y.low) / (y.high - y.low) * (bottom - _TOP)

    names = escape(", ".join(line.name for line in panel.lines), quote=True)
    label = f"{escape(panel.title, quote=True)}: {names}"
    parts = [f'<svg {at} class="panel" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">']
    parts.append(f'<text class="title" x="4" y="14">{escape(_fit(panel.title))}</text>')
    for value, text in y.ticks:
        parts.append(f'<path class="grid" d="M{_LEFT} {sy(value):.1f}H{right}"/>')
        parts.append(f'<text class="end" x="{_LEFT - 6}" y="{sy(value) + 4:.1f}">{escape(text)}</text>')
    for value, text in x.ticks:
        parts.append(f'<path class="tick" d="M{sx(value):.1f} {bottom}v4"/>')
        parts.append(f'<text class="mid" x="{sx(value):.1f}" y="{bottom + 16}">{escape(_fit(text, 12))}</text>')
    parts.append(f'<path class="tick" d="M{_LEFT} {bottom}H{right}"/>')
    parts.append(f'<text class="mid" x="{(_LEFT + right) / 2}" y="{HEIGHT - 6}">{escape(x.label)}</text>')
    for line in panel.lines:
        parts += _line(line, sx, sy)
    for value, text in panel.reference:
        beside = sy(value) + 13 if sy(value) < bottom - 16 else sy(value) - 5
        parts.append(f'<path class="trivial" d="M{_LEFT} {sy(value):.1f}H{right}"/>')
        parts.append(f'<text class="end note" x="{right}" y="{beside:.1f}">{escape(text)}</text>')
    parts.append("</svg>")
    return "".join(parts)


def swatch(style: Style, at: str = "") -> str:
    """A short piece of an arm's line with its marker, for the legend."""
    dash = f' stroke-dasharray="{style.dash}"' if style.dash else ""
    size = 'viewBox="0 0 30 12" width="30" height="12"'
    return (
        f'<svg {at} class="swatch {style.colour}" {size} aria-hidden="true">'
        f'<path class="line" d="M1 6H29"{dash}/>{_marker(style.marker, 15, 6)}</svg>'
    )


def strip(middle: float, low: float, high: float, ends: tuple[float, float], colour: str) -> str:
    """A difference with its interval beside a line at zero; `ends` are the scale's, around zero."""
    left, right = ends

    def sx(value: float) -> float:
        return 6 + 148 * (value - left) / (right - left)

    return (
        '<svg class="strip" viewBox="0 0 160 16" width="160" height="16" aria-hidden="true">'
        f'<path class="tick" d="M{sx(0):.1f} 0V16"/><g class="{colour}">'
        f'<path class="bar" d="M{sx(low):.1f} 8H{sx(high):.1f}"/>{_marker("circle", sx(middle), 8)}</g></svg>'
    )


def thin(points: Sequence[tuple[float, float]], most: int = 160) -> list[Point]:
    """At most about `most` points, each the mean of a stretch of neighbours."""
    size = max(1, math.ceil(len(points) / most))
    parts = [points[i : i + size] for i in range(0, len(points), size)]
    return [Point(sum(x for x, _ in p) / len(p), sum(y for _, y in p) / len(p)) for p in parts]
