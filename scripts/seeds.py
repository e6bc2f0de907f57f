"""Runs that were evaluated one by one, as the seeds of arms: each arm's accuracy, and one arm less another, paired.

    python scripts/seeds.py both=runs/ev/both-0,runs/ev/both-1,runs/ev/both-2 rotation=... instance=... \
        --protocol linear --out results/combination.json

For each arm the folders that `unlabel evaluate` wrote, one per pretraining seed and as many for each arm; they must
have the same images, labels and draws, as their splits.json says. The first arm is compared with each other one: draw
by draw and image by image, the interval that of `downstream/stats.py`, over pretraining seeds where there are three or
more. `unlabel compare --seeds 3` does all of this by itself; this is for runs that were made elsewhere, on another
machine or side by side.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from downstream.stats import paired, summarise
from unlabel.errors import UserError
from unlabel.report_text import CONTROLS
from unlabel.runfolder import commit, versions


def read(folder: Path, protocol: str) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Labels per class to (draws, test images), right or wrong; the test images' clusters."""
    with np.load(folder / "predictions.npz") as saved:
        measured = [key.split("|") for key in saved.files if "|" in key]
        own = [words for words in measured if words[0] not in CONTROLS and words[1] == protocol]
        if len({arm for arm, *_ in own}) != 1:
            raise UserError(f"{folder}: one arm, measured by {protocol}, is wanted, not {sorted({w[0] for w in own})}")
        found = {words[2]: saved["|".join(words)] for words in own}
        if any(len(right) != 1 for right in found.values()):
            raise UserError(f"{folder} holds several seeds already")
        return {count: right[0] for count, right in found.items()}, saved["test_clusters"]


def joined(arms: dict[str, list[Path]], protocol: str) -> tuple[dict[str, dict[str, np.ndarray]], np.ndarray]:
    """Arm and labels per class to (seeds, draws, test images); the test images' clusters."""
    if len({len(folders) for folders in arms.values()}) != 1:
        raise UserError("each arm needs as many folders as the others")
    every = [folder for folders in arms.values() for folder in folders]
    splits = {folder: (folder / "splits.json").read_bytes() for folder in every}
    if other := [f for f in every if splits[f] != splits[every[0]]]:
        raise UserError(f"{other[0]} has other images, labels or draws than {every[0]}")
    tables = {folder: read(folder, protocol) for folder in every}
    counts = [*tables[every[0]][0]]
    if other := [f for f in every if [*tables[f][0]] != counts]:
        raise UserError(f"{other[0]} was measured with other numbers of labels than {every[0]}")
    found = {arm: {c: np.stack([tables[f][0][c] for f in of]) for c in counts} for arm, of in arms.items()}
    return found, tables[every[0]][1]


def compare(arms: dict[str, list[Path]], protocol: str) -> list[dict[str, Any]]:
    """A row for each arm and number of labels, and for each other arm the first one's difference to it."""
    tables, clusters = joined(arms, protocol)
    first, rows = next(iter(tables)), []
    for arm, table in tables.items():
        for count, right in table.items():
            row = {"arm": arm, "labels_per_class": int(count) if count.isdecimal() else count}
            row |= {"folders": [str(f) for f in arms[arm]], **asdict(summarise(right, clusters))}
            if arm != first:
                own = tables[first][count]
                row["first_less_this"] = asdict(paired(own, right, clusters))
                row["draws_in_which_first_is_better"] = float((own.mean(-1) > right.mean(-1)).mean())
            rows.append(row)
    return rows


def show(rows: list[dict[str, Any]]) -> str:
    lines = []
    for row in rows:
        text = f"{row['arm']:<20} {row['labels_per_class']:>4} labels per class  {interval(row, 1)} %"
        if other := row.get("first_less_this"):
            share = 100 * row["draws_in_which_first_is_better"]
            text += f"   {rows[0]['arm']} less it {interval(other, 2, '+')}, better in {share:.0f} % of the draws"
        lines.append(text)
    return "\n".join([*lines, rows[0]["note"]])


def interval(of: dict[str, Any], digits: int, sign: str = "") -> str:
    mean, low, high = (f"{100 * of[k]:{sign}.{digits}f}" for k in ("mean", "ci_low", "ci_high"))
    return f"{mean} [{low}, {high}]"


def named(text: str) -> tuple[str, list[Path]]:
    arm, _, folders = text.partition("=")
    if not folders:
        raise argparse.ArgumentTypeError(f"{text!r}: ARM=FOLDER,FOLDER")
    return arm, [Path(f) for f in folders.split(",")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("arms", nargs="+", type=named, metavar="ARM=FOLDER,FOLDER")
    parser.add_argument("--protocol", default="linear")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    try:
        if len(dict(args.arms)) < len(args.arms):
            raise UserError("an arm is named twice")
        rows = compare(dict(args.arms), args.protocol)
    except (UserError, OSError) as error:
        raise SystemExit(f"seeds.py: {error}") from None
    print(show(rows))
    if args.out:
        about = {"protocol": args.protocol, "rows": rows, "versions": versions(), "commit": commit()}
        args.out.write_text(json.dumps(about, indent=1) + "\n")


if __name__ == "__main__":
    main()
