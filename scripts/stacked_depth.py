"""Greedy layer by layer and then all layers together, against all together from random weights, as many images seen.

    python scripts/stacked_depth.py mnist --backbone mlp:500-250-125-30 --out runs/stacked
    python scripts/stacked_depth.py FOLDER/train.tar.gz --test FOLDER/test.tar.gz --backbone … --out runs/stacked
    python scripts/stacked_depth.py mnist --backbone … --out runs/dev --development     # the test is not read

Result: results/stacked_depth.json, a row for each backbone, peak learning rate, arm and seed: squared error of a
held-out image in [0, 1], summed over its pixels, mean over the images; the difference of the arms, paired over the
seeds (95 % t interval). Both arms are the same task with the same decoders, optimiser and steps, without noise; with L
layers, the greedy arm spends 1 / (L + 1) of the steps on each of them and on all together. Beside it as many principal
components of the training images as the last layer is wide. ``--development``: five sixths of the training images
train, the others are held out. A finished row is not done again.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import t as student
from sklearn.decomposition import PCA

from pretext.task import PretextTask
from pretext.trained import load_trained
from unlabel.cache import ImageCache, load_cache
from unlabel.config import PretrainConfig
from unlabel.pretrain import pretrain
from unlabel.runfolder import commit, hardware, versions
from unlabel.sources import open_source, own_test_split

ARMS = {"greedy": True, "joint": False}
SIZE = 28


def squared_error(task: PretextTask, images: ImageCache) -> float:
    """Summed over the pixels of a grey image, mean over the images."""
    each = [task.surprise(batch).double() for batch in task.batches(images.images, images.hashes)]
    return float(np.concatenate([e.cpu().numpy() for e in each]).mean() * SIZE**2)


def components(train: ImageCache, held: ImageCache, numbers: int) -> float:
    """The squared error of so many principal components of the training images."""
    flat, new = (images.images[:][..., 0].reshape(len(images), -1) / np.float32(255) for images in (train, held))
    pca = PCA(numbers, svd_solver="covariance_eigh").fit(flat)
    return float(np.square(pca.inverse_transform(pca.transform(new)) - new).sum(1).mean())


def row(args: argparse.Namespace, backbone: str, rate: float, arm: str, seed: int, held: ImageCache) -> dict[str, Any]:
    name = f"{backbone.removeprefix('mlp:').replace(':', '-')}-{rate:g}-{arm}-{seed}"
    stored = args.out / f"{name}.json"
    if stored.exists():
        return json.loads(stored.read_text())
    config = PretrainConfig(
        ("stacked",), (args.train,), args.out / "runs" / name, backbone=backbone, image_size=SIZE, epochs=args.epochs,
        batch_size=args.batch_size, lr=rate, crop=(1.0, 1.0), flip=False, seed=seed,
        task_settings={"stacked": {"noise": "none", "greedy": ARMS[arm]}},
    )  # fmt: skip
    run = pretrain(config, frozenset(held.hashes))
    finished = json.loads((run / "config.json").read_text())["finished"]
    found = {
        "backbone": backbone, "rate": rate, "arm": arm, "seed": seed, "error": squared_error(load_trained(run), held),
        "images_seen": finished["images_seen"], "seconds": finished["seconds"],
    }  # fmt: skip
    stored.write_text(json.dumps(found) + "\n")
    print(found, flush=True)
    return found


def paired(rows: list[dict[str, Any]], backbone: str, rate: float) -> dict[str, Any]:
    """The greedy arm's error less the joint one's, with the same seed."""
    by_arm = {
        arm: [r["error"] for r in rows if (r["backbone"], r["rate"], r["arm"]) == (backbone, rate, arm)] for arm in ARMS
    }
    less = np.array(by_arm["greedy"]) - np.array(by_arm["joint"])
    half = student.ppf(0.975, len(less) - 1) * less.std(ddof=1) / np.sqrt(len(less)) if len(less) > 1 else None
    return {
        "backbone": backbone, "rate": rate, **{arm: float(np.mean(errors)) for arm, errors in by_arm.items()},
        "greedy_less_joint": float(less.mean()),
        "interval": None if half is None else [float(less.mean() - half), float(less.mean() + half)],
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("train", help="mnist, or another source of grey images")
    parser.add_argument("--test", help="a source (a named set has its own)")
    parser.add_argument("--backbone", nargs="+", required=True)
    parser.add_argument("--epochs", type=float, default=5)
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--lr", type=float, nargs="+", default=[1e-3])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--development", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("runs/stacked"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    train = load_cache(open_source(args.train), SIZE)
    if args.development:
        apart = np.arange(len(train)) % 6 == 5
        held = train.subset(apart)
    else:
        held = load_cache(
            open_source(args.test or own_test_split(args.train) or parser.error("--test is needed")), SIZE
        )
    rows = [
        row(args, backbone, rate, arm, seed, held)
        for backbone in args.backbone for rate in args.lr for seed in range(args.seeds) for arm in ARMS
    ]  # fmt: skip
    widths = sorted({int(b.split(":")[1].split("-")[-1]) for b in args.backbone})
    known = set(held.hashes)
    shown = train.subset(np.array([h not in known for h in train.hashes]))
    about = {
        "images": len(held), "epochs": args.epochs, "batch_size": args.batch_size, "rows": rows,
        "paired": [paired(rows, backbone, rate) for backbone in args.backbone for rate in args.lr],
        "components": {str(n): components(shown, held, n) for n in widths},
        "hardware": hardware(), "versions": versions(), "commit": commit(),
    }  # fmt: skip
    folder = args.out if args.development else Path("results")
    folder.mkdir(exist_ok=True)
    (folder / "stacked_depth.json").write_text(json.dumps(about, indent=1) + "\n")
    for found in about["paired"]:
        low, high = found["interval"] or (float("nan"), float("nan"))
        print(
            f"{found['backbone']}, rate {found['rate']:g}: greedy {found['greedy']:.2f}, joint {found['joint']:.2f}, "
            f"difference {found['greedy_less_joint']:+.2f} [{low:+.2f}, {high:+.2f}]"
        )
    print(f"principal components: {about['components']}")


if __name__ == "__main__":
    main()
