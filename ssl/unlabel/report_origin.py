"""The second half of the report: pretraining, its cost, the choices, how to read it, provenance."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from unlabel.page import data_uri
from unlabel.report_charts import Run, run_panels
from unlabel.report_choice import given_arm
from unlabel.report_html import html_figure, html_table, show, typeset
from unlabel.report_plots import Style, styles
from unlabel.report_text import (
    CONTROLS,
    arms_of,
    labels_of,
    number,
    protocol_name,
    protocols_of,
    rows_of,
    section,
    unique,
)

_ABOUT_PROTOCOLS = {
    "linear": "The backbone stays frozen; a logistic regression on its features learns from the labels.",
    "knn": "The backbone stays frozen; an image gets the class of the nearest labelled ones.",
    "finetune": "The backbone itself is trained further on the labels.",
    "self-training": "What the fine-tuned network says of the unlabelled images trains a second one, with the labels.",
    "s4l": "Fine-tuning, and each of its steps also names the turns of unlabelled images.",
}
_ABOUT_CONTROLS = {
    "scratch": "The network from random weights, without pretraining, trained as the others are, for no fewer steps.",
    "random": "The same network with random weights, frozen: what it is worth before it learned anything.",
    "patches": "k-means on small whitened patches: a shallow method that a deep one must beat.",
    "pixels": "Principal components of the raw pixels: how far one gets without a network.",
}
_ABOUT_GIVEN = (
    "Weights from elsewhere, frozen or fine-tuned like the others, without any pretraining here: pretraining has to "
    "beat them to be worth its minutes."
)


def pretraining(runs: Sequence[Run], results: dict[str, Any]) -> str:
    """Curves and previews of every arm; the previews are those of its first run."""
    look = styles(arms_of([*rows_of(results, "summary"), *({"arm": run.arm} for run in runs)]))
    parts = []
    for arm in unique(run.arm for run in runs):
        own = [run for run in runs if run.arm == arm]
        panels = run_panels(own, look.get(arm, Style("control")))
        pictures = next((found for run in own if (found := _previews(run))), "")
        if panels or pictures:
            count = f' <span class="small">({len(own)} runs)</span>' if len(own) > 1 else ""
            parts.append(f"<h3>{escape(arm)}{count}</h3>")
            parts.append(html_figure(panels, keyed=False) if panels else "")
            parts.append(pictures)
    if not parts:
        return ""
    about = (
        "<p>Each metric stands beside the score of a network that learned nothing (dashed). The points are "
        "means over short stretches. A good score says that the pretext task was learned; whether that is of "
        "use, only the accuracies above can say.</p>"
    )
    return "<h2>Pretraining</h2>\n" + about + "\n".join(filter(None, parts))


def _previews(run: Run) -> str:
    """The latest picture of each kind (names that differ only in their numbers are one kind)."""
    digits = re.compile(r"\d+")
    latest: dict[str, Path] = {}
    paths = (run.folder / "previews").glob("*.png")
    for path in sorted(paths, key=lambda p: ([int(n) for n in digits.findall(p.stem)], p.name)):
        latest[digits.sub("", path.stem)] = path
    parts = []
    for path in latest.values():
        picture = data_uri(path)
        if picture is None:
            continue
        source, width = picture
        name, _, step = path.stem.rpartition("-")
        when = f"{escape(name)} at step {int(step):,}" if name and step.isdecimal() else escape(path.stem)
        about = f"{when}; from the top: what the network sees, what it should answer, what it answers"
        size = f'style="max-width:{min(3 * width // 2, 768)}px"'  # small pictures grow, but not into mush
        image = f'<img src="{source}" alt="{about}" {size}>'
        parts.append(f'<figure class="picture">{image}<figcaption>{about}</figcaption></figure>')
    return "".join(parts)


def cost(results: dict[str, Any]) -> str:
    """Minutes, images and speed of every pretraining run, and the machine."""
    found = section(results, "provenance", "runs")
    lines, grey = [], ""
    for arm, entries in found.items():
        for entry in entries if isinstance(entries, list) else []:
            if not isinstance(entry, dict):
                continue
            side = f"{show(entry['image_size'])} px" if entry.get("image_size") else show(None)
            if "grey" in (entry.get("shown_as") or []):
                side += ", grey"
                grey = " Downstream every network is shown RGB."
            counts = [show(entry.get(key), d) for key, d in _COST.values()]
            lines.append([escape(str(arm)), *counts, show(entry.get("backbone")), side])
    if not lines:
        return ""
    hardware = section(results, "provenance", "hardware")
    machine = [str(hardware[key]) for key in ("gpu", "cpu") if hardware.get(key)]
    machine += [f"{hardware['threads']} threads"] if hardware.get("threads") else []
    memory = number(hardware.get("memory_gb"))
    machine += [f"{memory:.0f} GB of memory"] if memory else []
    said = (f"On {escape(', '.join(machine))}." if machine else "") + grey + _started_from(found)
    about = f'<p class="small">{said.strip()}</p>' if said else ""
    table = html_table(["arm", *_COST, "backbone", "image size"], lines, right=frozenset(range(1, 5)))
    return "<h2>What pretraining cost</h2>\n" + table + about


def _started_from(runs: dict[str, Any]) -> str:
    """Which arms began with which weights, as HTML."""
    entries = [
        (arm, e) for arm, es in runs.items() for e in (es if isinstance(es, list) else []) if isinstance(e, dict)
    ]
    pairs = unique(f"{escape(str(arm))} from {escape(str(e['init']))}" for arm, e in entries if e.get("init"))
    return f" Started from given weights: {'; '.join(pairs)}." if pairs else ""


# column: (key, digits)
_COST = {
    "seed": ("seed", 0),
    "minutes": ("minutes", 1),
    "images seen": ("images_seen", 0),
    "images/s": ("images_per_second", 0),
}


def chosen(results: dict[str, Any]) -> str:
    """What was chosen inside the labels, most frequent first, and where a choice met the edge of its grid."""
    rows = rows_of(results, "rows")
    picked = [row for row in rows if isinstance(row.get("chosen"), dict) and row["chosen"]]
    if not picked:
        return ""
    parts = ["<h2>What was chosen</h2>"]
    parts.append("<p>Every choice was made inside the labels; the test set was read once, at the end.</p>")
    total = Counter((str(row.get("arm")), str(row.get("protocol"))) for row in rows)
    edge = Counter((str(row.get("arm")), str(row.get("protocol"))) for row in rows if row.get("on_grid_edge"))
    if edge:
        items = "".join(
            f"<li>{escape(arm)}, {escape(protocol_name(protocol))}: {count} of {total[arm, protocol]}</li>"
            for (arm, protocol), count in edge.items()
        )
        about = "Choices at the edge of what was tried, where a wider search might have scored higher:"
        parts.append(f'<div class="warn"><p>{about}</p><ul>{items}</ul></div>')
    lines = []
    for protocol in protocols_of(picked):
        for arm in arms_of(row for row in picked if row.get("protocol") == protocol):
            own = [row for row in picked if row.get("protocol") == protocol and str(row.get("arm")) == arm]
            for count in labels_of(own):
                group = [row for row in own if row.get("labels_per_class") == count]
                texts = Counter("; ".join(f"{k} {_plain(v)}" for k, v in r["chosen"].items()) for r in group)
                common = [f"{escape(text)} ({n} of {len(group)})" for text, n in texts.most_common(3)]
                common += [f"and {len(texts) - 3} more"] if len(texts) > 3 else []
                lines.append([escape(arm), escape(protocol_name(protocol)), show(count), "<br>".join(common)])
    table = html_table(["arm", "protocol", "labels", "chosen"], lines, wide=3, right=frozenset({2}))
    parts.append(f"<details><summary>Choices by arm, protocol and labels</summary>{table}</details>")
    return "\n".join(parts)


def _plain(value: Any) -> str:
    """A setting as short text."""
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_plain, value))
    if isinstance(value, dict):
        return ", ".join(f"{k} {_plain(v)}" for k, v in value.items())
    return str(value)


def reading(results: dict[str, Any]) -> str:
    """In plain words: intervals, comparisons, protocols and the controls that are shown."""
    summary = rows_of(results, "summary")
    if not summary:
        return ""
    one = [number(row.get("n_draws")) == 1 for row in summary]
    over = "It covers other draws of labels and other test images of the same kind. "
    if all(one):
        over = "It covers other test images of the same kind, and not the luck of the one draw of labels. "
    elif any(one):
        over += "Where there is one draw only (all labels), it covers other test images, and not that draw's luck. "
    by_seed = [row.get("unit") == "seed" for row in summary]
    if any(by_seed):
        over += "It also covers pretraining again from another seed"
        over += ". " if all(by_seed) else ", where an arm has three seeds or more. "
        over += "It does not cover other data."
    else:
        over += (
            "It is for the backbone that was trained here: pretraining again from another seed gives another "
            "one. It does not cover other data either."
        )
    twins = "say little. A difference is taken on the same labels and the same test images, and is sharper."
    luck = (
        "means looked at without having been named beforehand. Of twenty comparisons between equals, about "
        "one will seem to differ by luck."
    )
    items = [("A 95 % interval", over), ("Two bands that overlap", twins), ("Exploratory", luck)]
    items += [(protocol_name(p), _ABOUT_PROTOCOLS[p]) for p in protocols_of(summary) if p in _ABOUT_PROTOCOLS]
    given = given_arm(results)
    items += [(f"{given} (as given)", _ABOUT_GIVEN)] if given in arms_of(summary) else []
    items += [(f"{arm} (a control)", _ABOUT_CONTROLS[arm]) for arm in arms_of(summary) if arm in CONTROLS]
    body = "".join(f"<dt>{typeset(term)}</dt><dd>{typeset(text)}</dd>" for term, text in items)
    return f"<h2>How to read this</h2>\n<dl>{body}</dl>"


def provenance(folder: Path, results: dict[str, Any], runs: Sequence[Run]) -> str:
    """Data, versions, every setting, and the files beside the page."""
    origin = section(results, "provenance")
    parts, lines = [], []
    for use, entry in section(origin, "data").items():
        if not isinstance(entry, dict):
            continue
        classes = entry.get("classes")
        names = [str(name) for name in classes] if isinstance(classes, list) else []
        more = f" and {len(names) - 20:,} more" if len(names) > 20 else ""
        spec = entry.get("spec")
        spec = ", ".join(map(str, spec)) if isinstance(spec, list) else spec
        counts = [show(entry.get(key)) for key in ("images", "clusters", "skipped")]
        lines.append([escape(str(use)), show(spec), *counts, show(", ".join(names[:20]) + more)])
    if lines:
        top = ["data", "source", "images", "clusters", "skipped", "classes"]
        parts.append(html_table(top, lines, wide=5, right=frozenset({2, 3, 4})))
    if number(section(origin, "overlap").get("test_in_pretraining")) == 0:
        parts.append('<p class="small">No test image was among the pretraining images.</p>')
    versions = section(origin, "versions")
    if versions:
        parts.append(f'<p class="small">{escape(", ".join(f"{k} {v}" for k, v in versions.items()))}</p>')
    for name, config in [
        ("Settings", section(origin, "settings")),
        *((run.name, run.config) for run in runs),
    ]:
        if config:
            text = escape(json.dumps(config, indent=1, ensure_ascii=False))
            shown = ' class="print"' if name == "Settings" else ""  # the rest is too long for paper
            parts.append(f"<details{shown}><summary>{escape(name)}</summary><pre>{text}</pre></details>")
    beside = {
        "results.json": "every number on this page",
        "predictions.npz": "right or wrong for each test image, for tests of one's own",
        "splits.json": "which images were used for what",
    }
    found = [f"{name} ({about})" for name, about in beside.items() if (folder / name).is_file()]
    parts.append(f'<p class="small">Beside this page: {"; ".join(found)}.</p>')
    return "<h2>Settings and provenance</h2>\n" + "\n".join(parts)
