"""Small pieces of HTML for the report. Text is escaped here; cells and captions are HTML already."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

from unlabel.colours import COLOURS
from unlabel.report_charts import legend
from unlabel.report_plots import Panel, draw, swatch
from unlabel.report_text import number


def typeset(text: str) -> str:
    """Escape, with real minus signs before numbers and no line break before "%"."""
    text = re.sub(r"(?<![\w.])-(?=\d)", "\u2212", text)
    return escape(text).replace(" %", "\u00a0%")


def show(value: Any, digits: int = 0) -> str:
    """A number with thousands separators, any other value as text; a dash where it is missing."""
    if value is None or value == "":
        return "\u2013"
    n = number(value)
    return typeset(f"{n:,.{digits}f}" if n is not None else str(value))


def html_table(
    head: Sequence[str],
    rows: Iterable[Sequence[str]],
    caption: str = "",
    wide: int | None = None,
    right: frozenset[int] = frozenset(),
) -> str:
    """A table in a box that scrolls by itself; the first cell of each row heads it.

    Column `wide` may break its lines, those in `right` are set flush right.
    """

    def kind(i: int) -> str:
        return ' class="wide"' if i == wide else ' class="n"' if i in right else ""

    top = "".join(f'<th scope="col"{kind(i)}>{text}</th>' for i, text in enumerate(head))
    body = ""
    for first, *rest in rows:
        cells = "".join(f"<td{kind(i)}>{text}</td>" for i, text in enumerate(rest, 1))
        body += f'<tr><th scope="row">{first}</th>{cells}</tr>'
    about = f"<caption>{caption}</caption>" if caption else ""
    return scroll(f"<table>{about}<thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>")


def scroll(table: str) -> str:
    """A box that scrolls sideways, also by keyboard, so that the page does not."""
    return f'<div class="scroll" tabindex="0" role="group" aria-label="table">{table}</div>'


def html_figure(panels: Sequence[Panel], caption: str = "", keyed: bool = True) -> str:
    """Panels side by side where there is room, with one legend above."""
    names = [f"<li>{swatch(style)}{escape(name)}</li>" for name, style in legend(panels)] if keyed else []
    key = f'<ul class="legend">{"".join(names)}</ul>' if names else ""
    charts = "".join(f"<div>{draw(panel)}</div>" for panel in panels)
    about = f"<figcaption>{caption}</figcaption>" if caption else ""
    return f'<figure>{key}<div class="panels">{charts}</div>{about}</figure>'


def colour_key(names: Sequence[str]) -> str:
    """Which class has which frame on a map of thumbnails."""
    square = '<svg width="12" height="12" aria-hidden="true"><rect width="12" height="12" fill="#{}"/></svg>'
    colours = (COLOURS[k % len(COLOURS)].hex() for k in range(len(names)))
    items = (f"<li>{square.format(c)}{escape(name)}</li>" for c, name in zip(colours, names, strict=True))
    return f'<ul class="legend">{"".join(items)}</ul>'
