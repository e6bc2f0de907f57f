"""The first half of the report: the answer, the accuracies, the differences, the stages."""

from __future__ import annotations

from html import escape
from pathlib import Path
from typing import Any

from unlabel.page import figure
from unlabel.report_charts import accuracy_panels, stage_panels
from unlabel.report_choice import answer, given_arm, title
from unlabel.report_html import colour_key, html_figure, html_table, scroll, show, typeset
from unlabel.report_plots import Style, strip, styles
from unlabel.report_text import (
    Row,
    arms_of,
    cell,
    comparisons,
    find,
    labels_of,
    labels_phrase,
    number,
    primary_row,
    protocol_name,
    protocols_of,
    rows_of,
    section,
    sign,
    unique,
    verdict,
)

_HOW_MANY = {1: "One comparison was", 3: "Three comparisons were"}
_VERDICT = {1: ("helps", "▲"), -1: ("not", "▼"), 0: ("open", "○")}  # class and symbol: colour is not enough


def head(results: dict[str, Any]) -> str:
    """The answer, the two accuracies behind it, and the warnings."""
    origin = section(results, "provenance")
    created = str(origin.get("created") or "")[:10]
    parts = [f'<p class="over">unlabel report{" · " + escape(created) if created else ""}</p>']
    parts.append(f"<h1>{typeset(title(results))}</h1>")
    parts.append(f'<p class="lead">{typeset(answer(results))}</p>')
    row = primary_row(results)
    if row is not None:
        same = {"protocol": row.get("protocol"), "labels_per_class": row.get("labels_per_class")}
        texts = []
        for name in filter(None, (row.get("arm"), given_arm(results), row.get("versus"))):
            found = find(rows_of(results, "summary"), arm=name, **same)
            texts += [f"{escape(str(name))} {_interval(found)}"] if found else []
        if texts:
            about = (
                f"{escape(protocol_name(row.get('protocol')))}, {escape(labels_phrase(row.get('labels_per_class')))}"
            )
            parts.append(f"<p>% right on the test images ({about}): {'; '.join(texts)}.</p>")
    warnings = origin.get("warnings")
    lines = [typeset(str(text)) for text in warnings] if isinstance(warnings, list) else []
    overlap = number(section(origin, "overlap").get("test_in_pretraining"))
    if overlap:
        lines.append(f"{overlap:,.0f} test images were also in pretraining: the accuracies may flatter.")
    if lines:
        items = "".join(f"<li>{line}</li>" for line in lines)
        parts.append(f'<div class="warn"><ul>{items}</ul></div>')
    return "<header>\n" + "\n".join(parts) + "\n</header>"


def _interval(row: Row | None) -> str:
    """Accuracy in per cent, its interval in a softer colour, as HTML."""
    value, _, interval = cell(row).partition(" ")
    return f'{value} <span class="ci">{interval}</span>' if interval else value.replace("-", "\u2013")


def accuracy(results: dict[str, Any]) -> str:
    """The main figure and its numbers."""
    panels = accuracy_panels(results)
    if not panels:
        return ""
    parts = ["<h2>Accuracy against labels</h2>"]
    parts.append(html_figure(panels, "Bands are 95&nbsp;% intervals. Grey, dashed lines are controls."))
    summary = rows_of(results, "summary")
    for protocol in protocols_of(summary):
        rows = [row for row in summary if row.get("protocol") == protocol]
        counts = labels_of(rows)
        lines = [
            [escape(arm), *(_interval(find(rows, arm=arm, labels_per_class=count)) for count in counts)]
            for arm in arms_of(rows)
        ]
        about = f"<b>{escape(protocol_name(protocol))}</b>, % right [95&nbsp;% interval]"
        parts.append(html_table(["labels per class", *map(str, counts)], lines, about))
    return "\n".join(parts)


def _difference(row: Row, ends: tuple[float, float], style: Style) -> str:
    """One paired comparison as a table row."""
    low, high, middle = number(row.get("ci_low")), number(row.get("ci_high")), float(row["difference"])
    kind, symbol = _VERDICT[sign(row)]
    bar = interval = ""
    if low is not None and high is not None:
        bar = strip(middle, low, high, ends, style.colour)
        interval = f' <span class="ci">{typeset(f"[{100 * low:+.1f}, {100 * high:+.1f}]")}</span>'
    return (
        f'<tr><th scope="row">{escape(str(row.get("arm")))}</th>'
        f'<td class="n">{show(row.get("labels_per_class"))}</td>'
        f'<td class="n">{typeset(f"{100 * middle:+.1f}")}{interval}</td>'
        f'<td class="{kind}">{symbol} {escape(verdict(row))}</td><td>{bar}</td></tr>'
    )


def differences(results: dict[str, Any]) -> str:
    """Every paired difference with its verdict, the primary comparison first and named."""
    paired = comparisons(results)
    if not paired:
        return ""
    keys = ("difference", "ci_low", "ci_high")
    values = [value for row in paired for key in keys if (value := number(row.get(key))) is not None]
    ends = min(0.0, *values), max(0.01, *values)
    look = styles(arms_of([*rows_of(results, "summary"), *paired]))
    named = [row for row in paired if row.get("primary") is True]
    groups = []
    for row in named:
        about = f"{protocol_name(row.get('protocol'))}, against {row.get('versus')}"
        groups.append((f"primary comparison: {about}", [row]))
    for protocol in protocols_of(paired):
        others = [row for row in paired if row.get("protocol") == protocol and row not in named]
        for versus in unique(_against(row) for row in others):
            rows = [row for row in others if _against(row) == versus]
            groups.append((f"{protocol_name(protocol)}, against {versus} (exploratory)", rows))
    body = ""
    for name, rows in groups:
        kind = "part first" if rows[0] in named else "part"
        body += f'<tr class="{kind}"><th scope="colgroup" colspan="5">{escape(name)}</th></tr>'
        body += "".join(_difference(row, ends, look[str(row.get("arm"))]) for row in rows)
    about = (
        f"{_HOW_MANY.get(len(named), 'Some comparisons were')} named before the test labels were read; all others are "
        "exploratory."
        if named
        else "No comparison was named beforehand, so all of them are exploratory."
    )
    top = (
        '<th scope="col">arm</th><th scope="col" class="n">labels</th>'
        '<th scope="col" class="n">points [95&nbsp;% interval]</th><th scope="col">verdict</th><td></td>'
    )
    table = f"<table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>"
    return (
        f"<h2>Differences</h2>\n<p>Each is taken on the same labels and the same test images. {about}</p>\n"
        + scroll(table)
    )


def _against(row: Row) -> str:
    """Another arm under the same protocol, or the same arm under another one."""
    other = row.get("versus_protocol")
    return f"{protocol_name(other)} of the same arm" if other else str(row.get("versus"))


def stages(results: dict[str, Any]) -> str:
    """Accuracy against the depth at which the features are taken."""
    panels = stage_panels(results)
    if not panels:
        return ""
    about = (
        "% right from each stage of the frozen backbone by itself, with 95&nbsp;% bands. A stage is named by its "
        "stride: s8 holds one vector for every 8 × 8 pixels."
    )
    return "<h2>Stage by stage</h2>\n" + html_figure(panels, about)


def pictures(folder: Path, results: dict[str, Any]) -> str:
    """The test images on a map of the features, and the classifier's surest hits and misses."""
    about = section(results, "pictures")
    where, arm = folder / "pictures", str(about.get("arm") or "")
    parts = []
    known = section(about, "map")
    names = [str(c) for c in known.get("classes") or []]
    drawn = figure(
        where / "map.png", f"{number(known.get('images')) or 0:,.0f} test images by {arm}'s frozen features (t-SNE)"
    )
    if names and drawn:
        parts += [colour_key(names), drawn]
    for key, words in (("hits", "surest and right"), ("misses", "surest and wrong")):
        rows = [r for r in about.get(key) or [] if isinstance(r, dict)]
        each = "; ".join(f"{r.get('said')} ({100 * (number(r.get('p')) or 0):.0f} %)" for r in rows)
        parts.append(figure(where / f"{key}.png", f"The fine-tuned classifier, {words}: {each}") if rows else "")
    inside = "\n".join(filter(None, parts))
    return f"<h2>The images</h2>\n{inside}" if inside else ""
