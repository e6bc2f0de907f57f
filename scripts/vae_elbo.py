"""The evidence lower bound of the variational autoencoder on binarised MNIST: results/vae_elbo.json.

    python scripts/vae_elbo.py mnist --out runs/vae
    python scripts/vae_elbo.py FOLDER/train.tar.gz --test FOLDER/test.tar.gz --out runs/vae
    python scripts/vae_elbo.py mnist --out runs/dev --development --epochs 20   # the test is not read

Each pixel is drawn once, white with probability pixel / 255, by a stored seed and the image alone, and never again:
OUT/train.tar and OUT/test.tar are then images like others, and `unlabel pretrain` trains on them. Scored in eval mode,
at β = 1, with one code drawn for each image. ``--development`` trains on five sixths of the training images and scores
the others: what settings are chosen by. Words that this script does not know go to `unlabel pretrain`.
"""

from __future__ import annotations

import argparse
import io
import json
import tarfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from pretext.task import PretextTask
from pretext.trained import load_trained
from pretext.vae import DEAD, VAE
from unlabel.cache import ImageCache, load_cache
from unlabel.cli import main as command_line
from unlabel.distributed import pick_device
from unlabel.draws import Draws
from unlabel.runfolder import commit, hardware, versions
from unlabel.sources import open_source, own_test_split

SIZE = 28
SETTINGS = "--vae.code 20 --backbone mlp:512-256 --epochs 40 --batch-size 256 --lr 2e-3".split()


def binarised(images: np.ndarray, hashes: Sequence[str], seed: int) -> np.ndarray:
    """uint8 (N, R, R, 3) grey to (N, R, R) of 0 and 255, drawn by the seed and each image's hash alone."""
    draws = Draws(seed, [0] * len(images), [int(h[:12], 16) for h in hashes], "binarise")
    white = draws.uniform(*images.shape[1:3]).numpy() * 255 < images[..., 0]
    return np.where(white, np.uint8(255), np.uint8(0))


def write_binarised(images: ImageCache, seed: int, path: Path) -> str:
    """A tar of PNGs under the same names. Written once."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        with tarfile.open(partial, "w") as tar:
            for name, pixels in zip(images.names, binarised(images.images[:], images.hashes, seed), strict=True):
                file = io.BytesIO()
                Image.fromarray(pixels).save(file, "png")
                entry = tarfile.TarInfo(str(Path(name).with_suffix(".png")))
                entry.size = file.tell()
                tar.addfile(entry, io.BytesIO(file.getvalue()))
        partial.rename(path)
    return str(path)


@torch.no_grad()
def bound(task: PretextTask, images: ImageCache) -> dict[str, Any]:
    """The negative bound of each image, in nats: mean, standard error, its two parts; the code's dead numbers."""
    assert isinstance(task, VAE)
    parts = [task.parts(batch)[:2] for batch in task.batches(images.images, images.hashes)]
    missed, kl = (torch.cat(part).double().cpu().numpy() for part in zip(*parts, strict=True))  # (N,), (N, code)
    each = missed + kl.sum(1)
    return {
        "images": len(each), "bound": each.mean(), "standard_error": each.std(ddof=1) / np.sqrt(len(each)),
        "missed": missed.mean(), "divergence": kl.sum(1).mean(), "divergence_of_each_number": kl.mean(0).tolist(),
        "dead": np.flatnonzero(kl.mean(0) <= DEAD).tolist(),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("train", help="mnist, or another source of grey images")
    parser.add_argument("--test", help="a source (a named set has its own)")
    parser.add_argument("--seed", type=int, default=0, help="of the binarisation")
    parser.add_argument("--development", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("runs/vae"))
    args, flags = parser.parse_known_args()
    given = load_cache(open_source(args.train), SIZE)
    if args.development:
        held = np.arange(len(given)) % 6 == 5  # sources are sorted by class, so that this is a sixth of each
        train = write_binarised(given.subset(~held), args.seed, args.out / "development-train.tar")
        test = write_binarised(given.subset(held), args.seed, args.out / "development-test.tar")
    else:
        spec = args.test or own_test_split(args.train) or parser.error("--test is needed")
        train = write_binarised(given, args.seed, args.out / "train.tar")
        test = write_binarised(load_cache(open_source(spec), SIZE), args.seed, args.out / "test.tar")
    run = args.out / "run"
    command = ["pretrain", "vae", "--data", train, "--out", str(run), "--image-size", str(SIZE), "--no-flip"]
    command += ["--crop", "1", "1", "--vae.grey", *SETTINGS, *flags]
    started, new = time.process_time(), not (run / "backbone.safetensors").exists()
    if code := command_line(command):
        raise SystemExit(code)
    minutes = (time.process_time() - started) / 60 if new else None
    task, config = load_trained(run, None, pick_device("auto")), json.loads((run / "config.json").read_text())
    found = {
        "train": bound(task, load_cache(open_source(train), SIZE)),
        "test": bound(task, load_cache(open_source(test), SIZE)),
    }
    about = {
        **found, "binarised_with_seed": args.seed, "settings": config["settings"], "resolved": config["resolved"],
        "images_seen": config["finished"]["images_seen"], "wall_minutes": config["finished"]["seconds"] / 60,
        "cpu_minutes": minutes, "hardware": hardware(), "versions": versions(), "commit": commit(),
    }  # fmt: skip
    folder = args.out if args.development else Path("results")
    folder.mkdir(exist_ok=True)
    (folder / "vae_elbo.json").write_text(json.dumps(about, indent=1) + "\n")
    for name, part in found.items():
        print(
            f"{name}, {part['images']:,} images: - ELBO {part['bound']:.2f} ± {part['standard_error']:.2f} nats, "
            f"{part['missed']:.2f} missed and {part['divergence']:.2f} of divergence; dead numbers: {part['dead']}"
        )


if __name__ == "__main__":
    main()
