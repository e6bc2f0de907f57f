"""Scores that need no labels, from the rows under `label_free` in results.json: as text, and as a part of the page."""

from __future__ import annotations

from html import escape
from typing import Any

from unlabel.report_html import html_table, show, typeset
from unlabel.report_text import CONTROLS, Row, arms_of, number, rows_of, unique

# score: (its name, short name for the text table, digits, how to read it)
SCORES: dict[str, tuple[str, str, int, str]] = {
    "effective_rank": (
        "effective rank", "eff.rank", 1,
        "In how many directions the features vary, weighed by variance (Roy & Vetterli 2007): 1 is a line, and a "
        "network that has collapsed; higher is thought to be better, up to the number of features.",
    ),
    "rankme": (
        "RankMe", "RankMe", 1,
        "The same by singular values, of features that are not centred (Garrido et al. 2023), which lets weak "
        "directions count for more. Higher is thought to be better.",
    ),
    "alpha_req": (
        "α-ReQ", "alpha-ReQ", 2,
        "How fast variance falls from one direction to the next (Agrawal et al. 2022). Thought to be best near 1: well "
        "above, few directions hold everything; well below, there is much noise.",
    ),
    "lidar": (
        "LiDAR", "LiDAR", 1,
        "In how many directions images differ by more than altered copies of one image do (Thilak et al. 2024). Higher "
        "is thought to be better.",
    ),
    "alignment": (
        "alignment", "alignment", 3,
        "How far altered copies of one image are apart (Wang & Isola 2020): 0 where they are one, about 2 where they "
        "have nothing in common. Lower is thought to be better, but a collapsed network has 0, too.",
    ),
    "uniformity": (
        "uniformity", "uniformity", 3,
        "How evenly images spread over all directions (Wang & Isola 2020): 0 where all are one, about -4 at best. "
        "Lower is thought to be better, together with a low alignment.",
    ),
    "rotation_probe": (
        "rotation probe, %", "rotation", 1,
        "How often a linear classifier on the frozen features names the turn of an image that it was not fitted on "
        "(Reed et al. 2021); chance is 25 %. Higher is thought to be better.",
    ),
    "jigsaw_probe": (
        "jigsaw probe, %", "jigsaw", 1,
        "How often it puts all four quarters of an image in their places; chance is 4.2 %. For backbones that "
        "were trained to tell turns, whose rotation probe would say little and is left out.",
    ),
}  # fmt: skip
_PERCENT = ("rotation_probe", "jigsaw_probe")
_PRETEXT = (
    "What the pretext task's own metrics were at the end of pretraining; in brackets what a network that learned "
    "nothing scores. It says how well that task was learned, and compares runs of one task only."
)

# What a choice by the jigsaw probe was worth in the two studies of docs/label-free.md.
_STUDY = (
    "in two studies of 48 short runs each (cats vs dogs, CIFAR-10) it went with the accuracy across tasks (Spearman's "
    "rho 0.80 and 0.78), and its pick was 1.9 and 0.4 points below the best run, a random one 4.7 and 6.0. That was "
    "seen afterwards; the rotation probe, which the plan named after the first study, failed in the second. Among runs "
    "of one task it went with the accuracy at 10 labels per class in both, at 50 in the first only."
)


def _mean(rows: list[Row], arm: str, score: str) -> float | None:
    """Over the seeds of an arm, in the unit that is shown."""
    own = [row for row in rows if str(row.get("arm")) == arm and row.get("score") == score]
    values = [value for row in own if (value := number(row.get("value"))) is not None]
    scale = 100 if score in _PERCENT else 1
    return scale * sum(values) / len(values) if values else None


def _pretext(rows: list[Row], arm: str) -> list[str]:
    """ "rotation/accuracy 0.948 (0.25)" for each metric of an arm's tasks, its mean over the seeds."""
    own = [row for row in rows if str(row.get("arm")) == arm and row.get("score") == "pretext"]
    texts = []
    for metric in unique(str(row.get("metric")) for row in own):
        pairs = [(number(r.get("value")), number(r.get("trivial"))) for r in own if str(r.get("metric")) == metric]
        known = [(v, t) for v, t in pairs if v is not None and t is not None]
        if known:
            value, trivial = (sum(column) / len(known) for column in zip(*known, strict=True))
            texts.append(f"{metric} {value:.3g} ({trivial:.3g})")
    return texts


def choice(results: dict[str, Any]) -> str:
    """Which arm would be chosen without labels, and how far to trust that; "" where there are not two to choose from.
    ASCII but for the names. By the jigsaw probe, of which runs that were trained for it have none."""
    rows = rows_of(results, "label_free")
    arms = [arm for arm in arms_of(rows) if arm not in CONTROLS]
    values = {arm: value for arm in arms if (value := _mean(rows, arm, "jigsaw_probe")) is not None}
    if len(values) < 2:
        return ""
    (first, best), (_, second), *_ = sorted(values.items(), key=lambda pair: -pair[1])
    random = _mean(rows, "random", "jigsaw_probe")
    missing = [arm for arm in arms if arm not in values]
    left_out = f" Without a jigsaw probe, and so left out: {', '.join(missing)}." if missing else ""
    if random is not None and random >= best:
        return f"Without labels, none would be chosen: by the jigsaw probe, random weights are as good.{left_out}"
    over = f"{best:.1f} % (the next {second:.1f}{'' if random is None else f', random weights {random:.1f}'})"
    return f"Without labels, {first} would be chosen: jigsaw probe {over}.{left_out} How far to trust it: {_STUDY}"


def format_label_free(results: dict[str, Any]) -> str:
    """The scores as plain text, a line per arm, each arm's own metrics, the choice; "" where there are none. ASCII
    but for the names."""
    rows = rows_of(results, "label_free")
    if not rows:
        return ""
    arms = arms_of(rows)
    columns = [score for score in SCORES if any(row.get("score") == score for row in rows)]
    first, wide = min(max(map(len, ["arm", *arms])), 32), 12
    lines = ["scores that need no labels (probes: % right, chance 25 and 4.2)", ""] if columns else []
    lines += ["arm".ljust(first) + "".join(SCORES[score][1].rjust(wide) for score in columns)] if columns else []
    for arm in arms if columns else []:
        values = [(_mean(rows, arm, score), SCORES[score][2]) for score in columns]
        texts = ["-" if value is None else f"{value:.{digits}f}" for value, digits in values]
        name = arm if len(arm) <= first else arm[: first - 2] + ".."
        lines.append(name.ljust(first) + "".join(text.rjust(wide) for text in texts))
    own = [f"{arm}: {', '.join(texts)}" for arm in arms if (texts := _pretext(rows, arm))]
    lines += ["", "at the end of pretraining (learned nothing)", *own] if own else []
    return "\n".join([*lines, *(["", said] if (said := choice(results)) else [])])


def label_free(results: dict[str, Any]) -> str:
    """A table with one line per arm, and how to read each of its columns."""
    rows = rows_of(results, "label_free")
    if not rows:
        return ""
    arms = arms_of(rows)
    columns = [score for score in SCORES if any(row.get("score") == score for row in rows)]
    own = {arm: _pretext(rows, arm) for arm in arms}
    lines = []
    for arm in arms:
        cells = [show(_mean(rows, arm, score), SCORES[score][2]) for score in columns]
        lines.append([escape(arm), *cells, "<br>".join(map(typeset, own[arm])) or show(None)])
    head = [*(typeset(SCORES[score][0]) for score in columns), "own metrics (learned nothing)"]
    table = html_table(["arm", *head], lines, wide=len(head), right=frozenset(range(1, len(head))))
    items = [(SCORES[score][0], SCORES[score][3]) for score in columns]
    items += [("own metrics", _PRETEXT)] if any(own.values()) else []
    body = "".join(f"<dt>{typeset(term)}</dt><dd>{typeset(text)}</dd>" for term, text in items)
    counts = [n for row in rows if (n := number(row.get("n_images"))) is not None]
    on = f"on up to {max(counts):,.0f} images of the pool, none of them a test image" if counts else ""
    about = (
        f"<p>Computed from the frozen backbone without any label{', ' if on else ''}{on}. Each is a guess at what the "
        "accuracies would say; where there are accuracies, believe those.</p>"
    )
    said = f"<p>{typeset(text)}</p>\n" if (text := choice(results)) else ""
    return f"<h2>Without labels</h2>\n{about}\n{said}{table}\n<dl>{body}</dl>"
