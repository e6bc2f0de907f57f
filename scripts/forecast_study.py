"""From m labels per class: what would 2 m and 4 m give? Curves to fit `downstream.forecast` to, and to judge it by.

    python scripts/forecast_study.py gather --set cifar10=TRAIN,TEST --runs RUN… --out curves/cifar10.json
    python scripts/forecast_study.py judge curves/*.json                                  # results/forecast.json

`gather` draws a pool of m labels per class, probes (linear, by the few-label protocol) with a quarter of it, the mean
of five draws, and with twice and four times as many labels, all on one set of test images. ``--classes cat+dog
deer+horse`` takes these classes of the set only, and makes a problem of each. `random` is a run, too. `judge` prints
how the forecasts do on each problem with constants fitted to the others, and the constants fitted to all, each problem
counting alike.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.optimize import nnls
from scipy.stats import norm

from downstream.features import extract, feature_stats
from downstream.forecast import LEVEL, VARIANCE, WEIGHTS, fall, forecast, scaled, spread
from downstream.probe import fit_probe
from downstream.table import STATISTICS_IMAGES
from unlabel.augment import clean
from unlabel.backbone import Backbone, build_backbone, load_backbone
from unlabel.batchnorm import estimate_statistics
from unlabel.cache import load_cache
from unlabel.checkpoint import write_atomic
from unlabel.runfolder import commit
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
    for chosen in args.classes or [""]:
        classes = sorted(chosen.split("+") if chosen else np.unique(labels).tolist())
        rng = np.random.default_rng(0)
        images, y = [], []
        for cache, its, most in ((pool, labels, args.per_class), (tested, labels_t, TEST // len(classes))):
            rows = np.sort(np.concatenate([rng.permutation(np.flatnonzero(its == c))[:most] for c in classes]))
            images.append(np.array(cache.images[rows]))
            y.append(np.searchsorted(classes, its[rows]))
        for run in args.runs:
            # Statistics from images without regard to their labels.
            some = np.random.default_rng(1).permutation(len(y[0]))[:STATISTICS_IMAGES]
            backbone = network(run, args.image_size, images[0][some])
            features = [extract(backbone, i, backbone.spec.image_size) for i in images]
            stats = feature_stats(extract(backbone, images[0][some], backbone.spec.image_size))
            problem = name if not args.classes else f"{name}:{chosen}"
            yield {"problem": problem, "run": run, "pool": features[0], "test": features[1],
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
        parts = [np.concatenate([rng.permutation(o[:m])[: m // 4] for o in order]) for _ in range(SUBSETS)]
        found[str(m // 4)] = [hits(np.sort(rows), m // 4, k) for k, rows in enumerate(parts)]
        packed = {count: [np.packbits(h).tobytes().hex() for h in each] for count, each in found.items()}
        yield {
            "problem": p["problem"], "run": p["run"], "classes": p["classes"], "m": m, "draw": draw,
            "test": len(p["y_test"]), "hits": packed,
        }  # fmt: skip


def gather(args: argparse.Namespace) -> None:
    torch.set_num_threads(args.threads)
    rows = json.loads(args.out.read_text()) if args.out.exists() else []
    done = {(r["problem"], r["run"], r["m"]) for r in rows if r["draw"] + 1 >= args.draws}
    for p in problems(args):
        for m in args.labels:
            if (p["problem"], p["run"], m) in done:
                continue
            begun = time.monotonic()
            rows = [
                r for r in rows if (r["problem"], r["run"], r["m"]) != (p["problem"], p["run"], m)
            ]  # of fewer draws
            rows += curves(p, m, args.draws)
            args.out.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(args.out, json.dumps(rows).encode())
            print(f"{p['problem']} {p['run']} {m}: {time.monotonic() - begun:.1f} s", flush=True)


FEW = 200  # test images that a second look is confined to: a user may have no more


def looks(files: list[Path]) -> list[dict[str, Any]]:
    """What each stored pool tells, on all test images and on a few of them, and what came true on all."""
    found = []
    for row in (row for path in files for row in json.loads(path.read_text())):
        m, n = row["m"], row["test"]
        hits = {
            int(count): np.array([np.unpackbits(np.frombuffer(bytes.fromhex(h), np.uint8))[:n] for h in each])
            for count, each in row["hits"].items()
        }
        truth = {times: 1 - hits[times * m].mean() for times in WEIGHTS}
        some = np.random.default_rng([row["draw"], m]).permutation(n)[:FEW]
        for look, images in (("one pool", np.arange(n)), (f"one pool, {FEW} test images", some)):
            error, earlier = (1 - hits[c][:, images].mean() for c in (m, m // 4))
            found.append({
                "problem": row["problem"], "run": row["run"], "classes": row["classes"], "m": m, "look": look,
                "images": len(images), "error": error, "earlier": earlier, "truth": truth,
            })  # fmt: skip
    return found


def averaged(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The mean over the pools of one problem, run and m: what a report has whose draws share no label."""
    groups: dict[tuple[str, str, int], list[dict[str, Any]]] = {}
    for r in rows:
        if r["look"] == "one pool":
            groups.setdefault((r["problem"], r["run"], r["m"]), []).append(r)

    def mean(values: Iterable[float]) -> float:
        return float(np.mean(list(values)))

    return [
        {
            **own[0], "look": "mean of pools", "error": mean(r["error"] for r in own),
            "earlier": mean(r["earlier"] for r in own),
            "truth": {times: mean(r["truth"][times] for r in own) for times in WEIGHTS},
        }
        for own in groups.values()
    ]  # fmt: skip


def fitted(rows: list[dict[str, Any]]) -> tuple[dict[int, tuple[float, ...]], dict[int, tuple[float, ...]]]:
    """Weights by least squares; variance by non-negative least squares, then as wide as 80 % of these need it."""
    weights, variance = {}, {}
    sizes = Counter(r["problem"] for r in rows)
    each = np.array([1 / sizes[r["problem"]] for r in rows])
    x = np.array([[1, fall(r["error"], r["earlier"], r["m"] / (r["m"] // 4), r["classes"])] for r in rows])
    of = np.array([spread(r["error"], r["m"] * r["classes"], r["images"]) for r in rows])
    for times in WEIGHTS:
        y = np.array([scaled(r["error"], r["classes"]) - scaled(r["truth"][times], r["classes"]) for r in rows])
        w = np.linalg.lstsq(x * np.sqrt(each)[:, None], y * np.sqrt(each), rcond=None)[0]
        rest = np.abs(y - x @ w)
        v = nnls(of * np.sqrt(each)[:, None], rest**2 * np.sqrt(each))[0]
        wide = rest / np.sqrt(of @ v)
        order = np.argsort(wide)
        share = np.cumsum(each[order]) / each.sum()
        v *= (np.interp(LEVEL, share, wide[order]) / norm.ppf(0.5 + LEVEL / 2)) ** 2
        weights[times], variance[times] = tuple(w.round(3).tolist()), tuple(float(f"{a:.3g}") for a in v)
    return weights, variance


def judge(args: argparse.Namespace) -> None:
    rows = looks(args.files)
    groups: dict[tuple[str, str, int], list[tuple[bool, float, float]]] = {}
    for problem in sorted({r["problem"] for r in rows}):
        weights, variance = fitted([r for r in rows if r["problem"] != problem])
        WEIGHTS.update(weights)
        VARIANCE.update(variance)
        own = [r for r in rows if r["problem"] == problem]
        for r in [*own, *averaged(own)]:
            told = forecast(1 - r["error"], 1 - r["earlier"], (r["m"], r["m"] // 4), r["classes"], r["images"])
            for times, found in told.items():
                true = 1 - r["truth"][times]
                line = (found.low <= true <= found.high, 100 * abs(found.mean - true), 100 * (found.high - found.low))
                for name in (problem, "all"):
                    groups.setdefault((name, r["look"], times), []).append(line)
    weights, variance = fitted(rows)
    result: dict[str, Any] = {"commit": commit(), "weights": weights, "variance": variance, "left_out": []}
    for (problem, look, times), lines in groups.items():
        inside, error, width = np.array(lines, float).T
        row = {
            "problem": problem, "look": look, "times": times, "n": len(lines), "inside": round(float(inside.mean()), 3),
            "median_error": round(float(np.median(error)), 2), "median_width": round(float(np.median(width)), 1),
        }  # fmt: skip
        result["left_out"].append(row)
        print("  ".join(map(str, row.values())))
    print("WEIGHTS =", weights, "\nVARIANCE =", variance)
    args.out.write_text(json.dumps(result, indent=1) + "\n")


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
    j = commands.add_parser("judge")
    j.add_argument("files", nargs="+", type=Path)
    j.add_argument("--out", type=Path, default=Path("results/forecast.json"))
    args = parser.parse_args()
    gather(args) if args.command == "gather" else judge(args)


if __name__ == "__main__":
    main()
