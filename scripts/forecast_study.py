"""From m labels per class: what would 2 m and 4 m give? Curves to fit `downstream.forecast` on, and to judge it by.

    python scripts/forecast_study.py gather --set cifar10=TRAIN,TEST --runs RUN… --out curves/cifar10.json
    python scripts/forecast_study.py judge --fitted curves/cifar10*.json --held-out curves/photos.json

`gather` draws a pool of m labels per class, probes (linear, by the few-label protocol) with halves, quarters and
eighths of it, five draws of each, and with twice and four times as many labels, all on one set of test images.
``--classes cat+dog deer+horse`` takes these classes of the set only, and makes a problem of each. `random` is a run,
too. `judge` fits the constants on the first files, and prints how often the 80 % intervals hold on the others.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from downstream.evaluate import STATISTICS_IMAGES
from downstream.features import extract, feature_stats
from downstream.probe import fit_probe
from unlabel.augment import clean
from unlabel.backbone import Backbone, build_backbone, load_backbone
from unlabel.batchnorm import estimate_statistics
from unlabel.cache import load_cache
from unlabel.checkpoint import write_atomic
from unlabel.sources import open_source

TEST = 2000  # images
SUBSETS = 5  # draws of each part of a pool


def network(run: str, size: int, images: np.ndarray) -> Backbone:
    if run != "random":
        return load_backbone(Path(run))
    backbone = build_backbone("small", size)
    estimate_statistics(backbone, (clean(p, size) for p in torch.from_numpy(images).split(256)))
    return backbone.eval()


def problems(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One for each run and choice of classes: features of a pool and of test images."""
    name, _, sources = args.set.partition("=")
    train, test = sources.split(",")
    pool, tested = (load_cache(open_source(s), args.image_size) for s in (train, test))
    labels, labels_t = (np.array(c.labels) for c in (pool, tested))
    for chosen in args.classes or ["+".join(np.unique(labels))]:
        classes = sorted(chosen.split("+"))
        rng = np.random.default_rng(0)
        images, y = [], []
        for cache, its, most in ((pool, labels, args.per_class), (tested, labels_t, TEST // len(classes))):
            rows = np.sort(np.concatenate([rng.permutation(np.flatnonzero(its == c))[:most] for c in classes]))
            images.append(np.array(cache.images[rows]))
            y.append(np.searchsorted(classes, its[rows]))
        for run in args.runs:
            backbone = network(run, args.image_size, images[0][:STATISTICS_IMAGES])
            features = [extract(backbone, i, backbone.spec.image_size) for i in images]
            # Statistics from images without regard to their labels.
            some = np.random.default_rng(1).permutation(len(y[0]))[:STATISTICS_IMAGES]
            stats = feature_stats(extract(backbone, images[0][some], backbone.spec.image_size))
            problem = name if not args.classes else f"{name}:{chosen}"
            yield {"problem": problem, "run": Path(run).name, "pool": features[0], "test": features[1],
                   "y": y[0], "y_test": y[1], "stats": stats, "classes": len(classes)}  # fmt: skip


def curves(p: dict[str, Any], m: int, draws: int) -> Iterator[dict[str, Any]]:
    """For each draw of a pool of m labels per class: share right on the test images, at each number of labels."""
    members = [np.flatnonzero(p["y"] == k) for k in range(p["classes"])]

    def hits(rows: np.ndarray, count: int, seed: int) -> np.ndarray:
        model = fit_probe(p["pool"], rows, p["y"][rows], p["stats"], count, seed)
        return model.predict(p["test"]) == p["y_test"]

    for draw in range(draws):
        rng = np.random.default_rng([draw, m])
        order = [rng.permutation(own) for own in members]
        if min(map(len, order)) < 4 * m:
            return
        found: dict[str, list[np.ndarray]] = {}
        for count in (4 * m, 2 * m, m):
            found[str(count)] = [hits(np.sort(np.concatenate([o[:count] for o in order])), count, draw)]
        for part in (2, 4, 8):
            count = m // part
            if count and str(count) not in found:
                parts = [np.concatenate([rng.permutation(o[:m])[:count] for o in order]) for _ in range(SUBSETS)]
                found[str(count)] = [hits(np.sort(rows), count, k) for k, rows in enumerate(parts)]
        packed = {count: [np.packbits(h).tobytes().hex() for h in each] for count, each in found.items()}
        yield {
            "problem": p["problem"], "run": p["run"], "classes": p["classes"], "m": m, "draw": draw,
            "test": len(p["y_test"]), "hits": packed,
        }  # fmt: skip


def gather(args: argparse.Namespace) -> None:
    torch.set_num_threads(args.threads)
    rows = json.loads(args.out.read_text()) if args.out.exists() else []
    done = {(r["problem"], r["run"], r["m"]) for r in rows}
    for p in problems(args):
        for m in args.labels:
            if (p["problem"], p["run"], m) in done:
                continue
            begun = time.monotonic()
            rows += curves(p, m, args.draws)
            args.out.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(args.out, json.dumps(rows).encode())
            print(f"{p['problem']} {p['run']} {m}: {time.monotonic() - begun:.1f} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    g = commands.add_parser("gather")
    g.add_argument("--set", required=True, metavar="NAME=TRAIN,TEST")
    g.add_argument("--classes", nargs="+", metavar="A+B")
    g.add_argument("--runs", nargs="+", required=True, help="run folders, or `random`")
    g.add_argument("--labels", nargs="+", type=int, default=[5, 10, 25, 50, 100])
    g.add_argument("--draws", type=int, default=6)
    g.add_argument("--per-class", type=int, default=1500)
    g.add_argument("--image-size", type=int, default=64)
    g.add_argument("--threads", type=int, default=1)
    g.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    gather(args)


if __name__ == "__main__":
    main()
