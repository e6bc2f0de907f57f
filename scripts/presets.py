"""Presets of fine-tuning on the development photos: what `downstream/finetune.py` was set with. No test photo is read.

    python scripts/cats_vs_dogs.py split --photos FOLDER
    python scripts/presets.py scratch --per-class 50 --draws 3 "lr=1e-3 steps=400" "lr=1e-3 steps=800 weight_decay=0.3"
    python scripts/presets.py runs/cvd/rotation-60min --per-class 250 --draws 2 "lr=2e-3 layer_decay=0.35 steps=150"

Half of the development photos (by content hash) give the labels, disjoint from draw to draw; the other half is
classified. Each word is a field of `Preset`; what is not given stands as in the shipped preset of that many labels.
Cost: one fit per draw, a minute for 400 steps from scratch on one core with bf16. Fits are kept under OUT/presets, so
the same line goes on where it stopped.
"""

from __future__ import annotations

import argparse
import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from downstream.evaluate import fill
from downstream.finetune import Preset, presets_for
from downstream.table import Arm, Count, Images, Table
from unlabel.cache import ImageCache, Rows, load_cache
from unlabel.errors import UserError
from unlabel.sources import open_source

IMAGE_SIZE = 64


@dataclass(frozen=True)
class OnePreset(Table):
    """A table in which everything is fine-tuned one way."""

    preset: Preset | None = None

    def presets(self, count: Count, arm: Arm) -> tuple[Preset, ...]:
        return (self.preset,) if self.preset else super().presets(count, arm)


def changed(preset: Preset, words: str) -> Preset:
    """The preset with the fields of ``words``: "lr=1e-3 steps=400"."""
    kinds = {f.name: f.type for f in dataclasses.fields(Preset)}
    read = {"int": int, "float": float, "str": str, "int | None": int, "bool": "True".__eq__}
    fields: dict[str, Any] = {}
    for word in words.split():
        name, _, value = word.partition("=")
        if name not in kinds or not value:
            raise UserError(f"{word!r}: a field of Preset and its value, as lr=1e-3; fields: {', '.join(kinds)}")
        fields[name] = read[str(kinds[name])](value)
    return dataclasses.replace(preset, **fields)


def half(photos: ImageCache, which: int) -> Images:
    assert photos.labels is not None
    rows = np.sort(np.argsort(np.array(photos.hashes))[which::2])
    classes = sorted(set(photos.labels))
    y = np.array([classes.index(photos.labels[r]) for r in rows])
    names, hashes = [photos.names[int(r)] for r in rows], [photos.hashes[int(r)] for r in rows]
    return Images(Rows(photos.images, rows), y, names, hashes, np.arange(len(rows)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("arm", help="a finished run, or scratch")
    parser.add_argument("presets", nargs="+")
    parser.add_argument("--per-class", type=int, default=50)
    parser.add_argument("--draws", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("runs/cvd"))
    args = parser.parse_args()
    photos = load_cache(open_source(str(args.out / "split" / "development")), IMAGE_SIZE)
    unlabelled = load_cache(open_source(str(args.out / "split" / "pretrain")), IMAGE_SIZE)
    sample = Rows(unlabelled.images, np.arange(0, len(unlabelled), max(1, len(unlabelled) // 2048))[:2048])
    pool, held = half(photos, 0), half(photos, 1)
    scratch = args.arm == "scratch"
    arm = Arm("scratch", "scratch") if scratch else Arm(Path(args.arm).name, "backbone", (0,), (Path(args.arm),))
    shipped = presets_for(args.per_class, scratch, labels=2 * args.per_class)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for words in args.presets:
        table = OnePreset(
            pool, held, sample[:], ["cat", "dog"], (args.per_class,), args.draws, ("finetune",), ("small", "auto"),
            IMAGE_SIZE, device, args.out / "presets", None, "every so many",
            preset=changed(shipped[len(shipped) // 2], words),
        )  # fmt: skip
        _, predictions = fill(table, [arm], None)
        right = (predictions[arm.name, "finetune", args.per_class, None] == held.y).mean(-1)[0]
        each = " ".join(f"{100 * r:.1f}" for r in right)
        print(f"{arm.name}, {args.per_class} per class, {words}: {100 * right.mean():.1f} % ({each})", flush=True)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        raise SystemExit(f"presets.py: {error}") from None
