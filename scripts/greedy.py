"""Is a deep autoencoder better trained stage after stage and then as a whole, or as a whole from the start?

    export OMP_NUM_THREADS=1      # on two cores, a process each: half an hour
    MNIST="python scripts/greedy.py mnist --out runs/greedy"
    $MNIST --ways greedy & $MNIST --ways joint longer; wait
    $MNIST                        # results/stacked_greedy_relu.json and a table

`stacked` without noise, nine layers of 500 and a code of 30 numbers. Both ways have the same minutes for all of their
phases together, and the one of four learning rates with which they do best on a sixth of the training images, held
out. Then three seeds each with all of them, scored on the test images; ``longer`` is the whole from the start in four
times the minutes, one seed. The error is the squared error of an image in [0, 1], summed over its pixels; principal
components leave what stands below. Finished runs are not done again; other images or minutes want another --out.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import t as student

from downstream.compress import Principal, squared_error
from downstream.features import pixels_of
from pretext.trained import load_trained
from unlabel.cache import ImageCache, load_cache
from unlabel.config import PretrainConfig
from unlabel.pretrain import pretrain
from unlabel.runfolder import RunFolder, commit, hardware, versions
from unlabel.sources import open_source, own_test_split

SIZE, CODE = 28, 30
WIDTHS = f"{'500-' * 9}{CODE}"
WAYS = {"greedy": {"noise": "none"}, "joint": {"noise": "none", "greedy": False}}
LONGER = 4
RATES = (3e-4, 1e-3, 3e-3, 1e-2)
SEEDS = 3


def error_of(run: Path, images: ImageCache) -> float:
    """Of clean images through the last layer and all decoders."""
    task = load_trained(run)
    shown = [task.show(batch) for batch in task.batches(images.images, images.hashes)]
    errors = [len(s["target"]) * squared_error(s["prediction"].numpy(), s["target"].numpy()) for s in shown]
    return sum(errors) / len(images)


def trained(config: PretrainConfig, images: ImageCache, held: frozenset[str] = frozenset()) -> dict[str, Any]:
    """A run, which `pretrain` does not do again, and what it leaves of ``images``."""
    pretrain(config, exclude=held)
    about = RunFolder(config.out).read() or {}
    return {"error": error_of(config.out, images), "lr": config.lr, "seed": config.seed, **about["finished"]}


def one_way(args: argparse.Namespace, way: str, train: ImageCache, test: ImageCache) -> dict[str, Any]:
    """The rates on held-out training images, then the best of them on test images."""
    start = "joint" if way == "longer" else way
    held = train.subset(np.arange(len(train)) % 6 == 5)  # sources are sorted by class: a sixth of each

    def run(name: str, lr: float, seed: int, minutes: float, development: bool) -> dict[str, Any]:
        config = PretrainConfig(
            ("stacked",), (args.train,), args.out / name, backbone=f"mlp:{WIDTHS}:{args.activation}", image_size=SIZE,
            minutes=minutes, lr=lr, crop=(1.0, 1.0), flip=False, seed=seed, task_settings={"stacked": WAYS[start]},
        )  # fmt: skip
        return trained(config, held, frozenset(held.hashes)) if development else trained(config, test)

    rates = [run(f"{start}-{rate:g}", rate, 0, args.minutes / 2, True) for rate in RATES]
    best = min(rates, key=lambda r: r["error"])["lr"]
    minutes, seeds = (LONGER * args.minutes, 1) if way == "longer" else (args.minutes, SEEDS)
    return {"rates": rates, "runs": [run(f"{way}-seed{s}", best, s, minutes, False) for s in range(seeds)]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("train", help="mnist, or another source of grey images")
    parser.add_argument("--test", help="a source (a named set has its own)")
    parser.add_argument("--ways", nargs="+", choices=[*WAYS, "longer"], help="these alone, and no table")
    parser.add_argument("--minutes", type=float, default=3.0, help="of the scored runs; half of it for each rate")
    parser.add_argument("--activation", default="relu")
    parser.add_argument("--out", type=Path, default=Path("runs/greedy"))
    args = parser.parse_args()
    args.out = args.out / args.activation
    spec = args.test or own_test_split(args.train) or parser.error("--test is needed")
    sources = [open_source(name) for name in (args.train, spec)]
    train, test = (load_cache(source, SIZE) for source in sources)
    found = {way: one_way(args, way, train, test) for way in args.ways or [*WAYS, "longer"]}
    if args.ways:
        return
    pixels = [pixels_of(cache, SIZE, 1) for cache in (train, test)]
    components = Principal(pixels[0], CODE)
    linear = squared_error(components.from_code(components.to_code(pixels[1], CODE)), pixels[1])
    each = {way: np.array([r["error"] for r in part["runs"]]) for way, part in found.items()}
    less = each["joint"] - each["greedy"]
    half = float(student.ppf(0.975, SEEDS - 1) * less.std(ddof=1) / np.sqrt(SEEDS))
    about = {
        "images": [source.fingerprint for source in sources],
        "widths": WIDTHS, "activation": args.activation, "minutes": args.minutes, "principal_components": linear,
        "ways": found, "joint_less_greedy": {"mean": float(less.mean()), "half_width": half},
        "hardware": hardware(), "versions": versions(), "commit": commit(),
    }  # fmt: skip
    Path("results").mkdir(exist_ok=True)
    Path(f"results/stacked_greedy_{args.activation}.json").write_text(json.dumps(about, indent=1) + "\n")
    for way, part in found.items():
        scores = ", ".join(f"{e:.2f}" for e in each[way])
        rates = ", ".join(f"{r['lr']:g}: {r['error']:.2f}" for r in part["rates"])
        print(f"{way:<8} {scores}   at {part['runs'][0]['images_seen']:,} images seen; held out, by rate {rates}")
    print(f"joint - greedy {less.mean():+.2f} [{less.mean() - half:+.2f}, {less.mean() + half:+.2f}]")
    print(f"{CODE} principal components {linear:.2f}")


if __name__ == "__main__":
    main()
