"""Runs that were evaluated one by one, as the seeds of arms: each arm's accuracy, and one arm less another, paired.

    python scripts/seeds.py both=runs/ev/both-0,runs/ev/both-1,runs/ev/both-2 rotation=... instance=... \
        --protocol linear --out results/combination.json

For each arm the folders that `unlabel evaluate` wrote, one per pretraining seed, all with the same images, labels and
draws. The first arm is compared with each other one: draw by draw and image by image, the interval that of
`downstream/stats.py` over pretraining seeds, draws and test images. `unlabel compare --seeds 3` does all of this by
itself; this is for runs that were made elsewhere, on another machine or side by side.
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

CONTROLS = ("random", "pixels", "patches", "scratch")


def read(folders: list[Path], protocol: str) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray]:
    """Labels per class to (seeds, draws, test images), right or wrong; the test images' names and clusters."""
    found: dict[str, list[np.ndarray]] = {}
    names = clusters = None
    for folder in folders:
        with np.load(folder / "predictions.npz") as saved:
            if names is None:
                names, clusters = saved["test_names"], saved["test_clusters"]
            elif not np.array_equal(names, saved["test_names"]):
                raise UserError(f"{folder} was judged by other test images than {folders[0]}")
            measured = [key.split("|") for key in saved.files if "|" in key]
            own = [words for words in measured if words[0] not in CONTROLS and words[1] == protocol]
            if len({arm for arm, *_ in own}) != 1:
                raise UserError(
                    f"{folder}: one arm, measured by {protocol}, is wanted, not {sorted({w[0] for w in own})}"
                )
            for words in own:
                found.setdefault(words[2], []).append(saved["|".join(words)][0])
    assert names is not None
    assert clusters is not None
    return {count: np.stack(each) for count, each in found.items()}, names, clusters


def compare(arms: dict[str, list[Path]], protocol: str) -> list[dict[str, Any]]:
    """A row for each arm and number of labels, and for each other arm the first one's difference to it."""
    tables = {arm: read(folders, protocol) for arm, folders in arms.items()}
    first, (own, names, clusters) = next(iter(tables.items()))
    rows = []
    for arm, (table, others, _) in tables.items():
        if not np.array_equal(names, others):
            raise UserError(f"{arm} was judged by other test images than {first}")
        for count, right in table.items():
            row = {"arm": arm, "labels_per_class": count, **asdict(summarise(right, clusters))}
            if arm != first:
                row["first_less_this"] = asdict(paired(own[count], right, clusters))
                row["draws_in_which_first_is_better"] = float((own[count].mean(-1) > right.mean(-1)).mean())
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
    return "\n".join(lines)


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
        rows = compare(dict(args.arms), args.protocol)
    except UserError as error:
        raise SystemExit(f"seeds.py: {error}") from None
    print(show(rows))
    if args.out:
        args.out.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
