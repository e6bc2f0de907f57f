"""RotNet's CIFAR-10 experiment on a GPU: its own recipe, and this library's, on the same network and the same images.

    python scripts/rotnet.py cifar10/train cifar10/test --arms reference rotation --epochs 100
    python scripts/rotnet.py cifar10/train --hold-out 5000 --epochs 10 --judge-epochs 10    # to choose among ARMS
    python scripts/rotnet.py --table                                    # of what lies in results/rotnet/

Gidaris et al. 2018 (https://arxiv.org/abs/1803.07728), section 4.1: four blocks of network in network learn to tell
turns; a classifier of three dense layers learns all labels from the second block, which stays as it is: 89.06 % of the
original images. ``reference`` is the recipe of their code, written anew: shifts of up to 4 px and mirror images, SGD
with Nesterov's momentum at 0.1 with three drops by 5, decay 5e-4 on all weights, 128 images in four turns a step. There
it goes on for 200 passes (the drops at 60, 120 and 160) and the classifier for 100, of which the last 50 are at 0.0008;
here these are --epochs and --judge-epochs, with the drops at the same shares, of 50. Where the hardware has bf16, it is
used. The other arms are `unlabel pretrain`. --epochs counts passes in four views of each image, so that all arms see as
many views. What counts is the last pass. Nothing is chosen by test images: for that there is --hold-out, by which N
training images, drawn at random, give no labels (pretraining sees them) and are judged instead of the test images.
"""

from __future__ import annotations

import argparse
import json
import math
import shlex
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from timm.models import register_model
from torch import Tensor, nn

from downstream.stats import paired
from unlabel.augment import four_rotations, to_float
from unlabel.backbone import channels_last, load_backbone
from unlabel.cache import load_cache
from unlabel.cli import main as command_line
from unlabel.distributed import pick_device
from unlabel.errors import UserError
from unlabel.precision import autocast, pick_precision
from unlabel.runfolder import commit, hardware, versions
from unlabel.sources import open_source

BATCH = 128
PAD = 4  # px, of the shifts
DROPS = (0.3, 0.6, 0.8), (0.4, 0.8, 0.9)  # shares of pretraining and of the classifier's training
MEAN, STD = (0.4914, 0.4824, 0.4467), (0.2471, 0.2435, 0.2616)
MUON = "--optimizer muon --lr 3e-3 --batch-size 128"
# An arm: views of an image, and the words of `unlabel pretrain`.
ARMS = {
    "reference": (4, ""),
    "rotation-sgd": (4, "rotation --rotation.blocks 0 --optimizer sgd --lr 0.1 --weight-decay 5e-4 --batch-size 128"),
    "rotation": (4, f"rotation --rotation.blocks 0 {MUON}"),
    "transformations": (4, f"transformations --transformations.blocks 0 --crop 0.5 1 {MUON}"),
    "rotation+instance": (6, f"rotation instance --weights 1 0.5 --rotation.blocks 0 {MUON}"),
}
Labelled = tuple[np.ndarray, np.ndarray]  # uint8 (N, 32, 32, 3), classes (N,)


def block(channels: int, widths: tuple[int, int, int], kernel: int) -> list[nn.Module]:
    """A convolution, and two of one pixel behind it."""
    layers: list[nn.Module] = []
    for width, side in zip(widths, (kernel, 1, 1), strict=True):
        layers += [nn.Conv2d(channels, width, side, padding=side // 2, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
        channels = width
    return layers


class NIN(nn.Module):
    """(N, 3, 32, 32) to blocks of (N, 96, 16, 16), (N, 192, 8, 8) three times."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(*layers)
            for layers in (
                [*block(3, (192, 160, 96), 5), nn.MaxPool2d(3, 2, 1)],
                [*block(96, (192, 192, 192), 5), nn.AvgPool2d(3, 2, 1)],
                block(192, (192, 192, 192), 3),
                block(192, (192, 192, 192), 3),
            )
        )

    def forward_intermediates(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        maps: list[Tensor] = []
        for each in self.blocks:
            x = each(x)
            maps.append(x)
        return x, maps


@register_model
def nin4(**_: object) -> NIN:  # so that `--backbone nin4` is known wherever this file is imported
    return NIN()


def labelled(spec: str, classes: list[str] | None = None) -> tuple[Labelled, list[str]]:
    """The images, and the names of their classes in order, which have to be ``classes``."""
    source = open_source(spec)
    source.require_labels()
    cache = load_cache(source, 32)
    assert cache.labels is not None
    names, found = np.unique(cache.labels, return_inverse=True)
    if classes is not None and classes != names.tolist():
        raise UserError(f"{spec} has other classes than the training images")
    return (np.array(cache.images[:]), found), names.tolist()


def normalised(images: Tensor) -> Tensor:
    """uint8 (N, 32, 32, 3) to (N, 3, 32, 32)."""
    mean, std = (torch.tensor(v, device=images.device).view(1, 3, 1, 1) for v in (MEAN, STD))
    return (to_float(images) - mean) / std


def shifted(images: Tensor, generator: torch.Generator) -> Tensor:
    """Random shifts of up to PAD pixels, black at the border, and left-right flips: uint8 (N, S, S, 3)."""
    n, side = len(images), images.shape[1]
    at = torch.randint(0, 2 * PAD + 1, (2, n, 1), generator=generator)
    mirror = torch.rand(n, 1, generator=generator) < 0.5
    pixels = torch.arange(side)
    rows, columns = (at[0] + pixels).to(images.device), at[1] + torch.where(mirror, pixels.flip(0), pixels)
    padded = F.pad(images, (0, 0, PAD, PAD, PAD, PAD))
    each = torch.arange(n, device=images.device)[:, None, None]
    return padded[each, rows[:, :, None], columns.to(images.device)[:, None, :]]


def batches(n: int, epochs: float, generator: torch.Generator) -> Iterator[tuple[Tensor, float]]:
    """Rows of each step, and the share of the steps that is done."""
    each = n // BATCH
    if not each:
        raise UserError(f"{n} images; a step takes {BATCH}")
    steps = max(1, round(epochs * each))
    for step in range(steps):
        if step % each == 0:
            order = torch.randperm(n, generator=generator)
        at = step % each * BATCH
        yield order[at : at + BATCH], step / steps  # type: ignore[possibly-undefined]


def train(model: nn.Module, images: Labelled, epochs: float, drops: tuple[float, ...], seed: int) -> None:
    """SGD as in the published code. ``model(pixels, labels)`` is the loss of a batch, shifted and mirrored already."""
    weights = [p for p in model.parameters() if p.requires_grad]
    sgd = torch.optim.SGD(weights, lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4)
    device, generator = weights[0].device, torch.Generator().manual_seed(seed)
    pixels, labels = (torch.from_numpy(a).to(device) for a in images)
    for rows, progress in batches(len(pixels), epochs, generator):
        sgd.param_groups[0]["lr"] = 0.1 * 0.2 ** sum(progress >= at for at in drops)
        rows = rows.to(device)
        with autocast(device, pick_precision("auto", device)):
            loss = model(shifted(pixels[rows], generator), labels[rows])
        loss.backward()
        sgd.step()
        sgd.zero_grad()


class Turns(nn.Module):
    """The loss of the reference recipe."""

    def __init__(self) -> None:
        super().__init__()
        self.nin, self.classifier = NIN(), nn.Linear(192, 4)

    def forward(self, pixels: Tensor, _: Tensor) -> Tensor:
        views, turns = four_rotations(normalised(pixels))
        maps = self.nin.forward_intermediates(views.contiguous(memory_format=torch.channels_last))[0]
        return F.cross_entropy(self.classifier(maps.mean((2, 3))).float(), turns)


class Judge(nn.Module):
    """Three dense layers on two blocks, which stay as they are. ``normalise``: what the first block is given."""

    def __init__(self, blocks: nn.Module, normalise: Callable[[Tensor], Tensor], classes: int) -> None:
        super().__init__()
        self.blocks, self.normalise = blocks.eval().requires_grad_(False), normalise
        hidden = 20 * classes
        layers: list[nn.Module] = [nn.Flatten()]
        for width in (192 * 8 * 8, hidden):
            layers += [nn.Linear(width, hidden, bias=False), nn.BatchNorm1d(hidden), nn.ReLU()]
        self.classifier = nn.Sequential(*layers, nn.Linear(hidden, classes))
        for layer in self.classifier:
            if isinstance(layer, nn.Linear):
                nn.init.normal_(layer.weight, 0, math.sqrt(2 / layer.out_features))
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)

    def logits(self, pixels: Tensor) -> Tensor:
        maps = self.blocks(self.normalise(pixels).contiguous(memory_format=torch.channels_last))
        return self.classifier(maps).float()

    def forward(self, pixels: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(self.logits(pixels), labels)


def reference(images: Labelled, epochs: float, seed: int, device: torch.device) -> Judge:
    torch.manual_seed(seed)
    model = channels_last(Turns().to(device))
    train(model, images, epochs, DROPS[0], seed)
    return Judge(nn.Sequential(*model.nin.blocks[:2]), normalised, int(images[1].max()) + 1).to(device)


def ours(arm: str, classes: int, args: argparse.Namespace, device: torch.device) -> Judge:
    """``unlabel pretrain`` with the arm's words."""
    views, words = ARMS[arm]
    with tempfile.TemporaryDirectory() as folder:
        told = f"--backbone nin4 --stem timm --image-size 32 --seed {args.seed} --epochs {args.epochs * 4 / views}"
        told += f" --device {args.device}"
        words = ["pretrain", *words.split(), *told.split(), "--data", args.train, "--out", f"{folder}/run"]
        print(f"$ unlabel {shlex.join(words)}", flush=True)
        if code := command_line(words):
            raise SystemExit(code)
        backbone = load_backbone(Path(folder) / "run").to(device)
    torch.manual_seed(args.seed)
    blocks = nn.Sequential(*backbone.model.blocks[:2])
    return Judge(blocks, lambda p: backbone.normalise(to_float(p)), classes).to(device)


def measure(arm: str, known: Labelled, sets: tuple[Labelled, Labelled], args: argparse.Namespace) -> dict:
    """Pretraining on the images of ``known``, a classifier on ``sets[0]``, which is judged on ``sets[1]``."""
    device, begun = pick_device(args.device), time.perf_counter()
    if arm == "reference":
        judge = reference(known, args.epochs, args.seed, device)
    else:
        judge = ours(arm, int(known[1].max()) + 1, args, device)
    pretrained = time.perf_counter()
    train(judge, sets[0], args.judge_epochs, DROPS[1], args.seed)
    judge.classifier.eval()
    with torch.no_grad(), autocast(device, pick_precision("auto", device)):
        parts = torch.from_numpy(sets[1][0]).split(1000)
        guesses = torch.cat([judge.logits(p.to(device)).argmax(1).cpu() for p in parts]).numpy()
    right, ended = guesses == sets[1][1], time.perf_counter()
    return {
        "arm": arm, "words": ARMS[arm][1], "accuracy": float(right.mean()),
        "right": "".join(map(str, right.astype(int))), "seed": args.seed,
        "epochs": args.epochs, "judge_epochs": args.judge_epochs, "held_out": args.hold_out,
        "minutes": round((pretrained - begun) / 60, 2), "judge_minutes": round((ended - pretrained) / 60, 2),
        "hardware": hardware(), "versions": versions(), "commit": commit(),
    }  # fmt: skip


def table(folder: Path) -> None:
    """Each arm beside the reference of as many epochs, image by image, over the seeds that both have."""
    rows = [json.loads(p.read_text()) for p in sorted(folder.glob("*.json"))]
    for kind in sorted({setting(r) for r in rows}):
        print(f"{f'{kind[0]} held-out training images' if kind[0] else 'test images'}, {kind[1]:g} passes")
        right = {arm: {r["seed"]: [c == "1" for c in r["right"]] for r in rows if (r["arm"], setting(r)) == (arm, kind)}
                 for arm in ARMS}  # fmt: skip
        for arm, seeds in right.items():
            if not seeds:
                continue
            minutes = np.mean([r["minutes"] for r in rows if (r["arm"], setting(r)) == (arm, kind)])
            text = f"  {arm:<18} {100 * np.mean([*seeds.values()]):.2f} %, {len(seeds)} seed(s), {minutes:.1f} minutes"
            if arm != "reference" and (both := sorted({*seeds} & {*right["reference"]})):
                a, b = (np.array([of[k] for k in both])[:, None] for of in (seeds, right["reference"]))
                gain = paired(a, b, np.arange(a.shape[-1]))
                mean, low, high = (f"{100 * v:+.2f}" for v in (gain.mean, gain.ci_low, gain.ci_high))
                over = "seeds and images" if gain.unit == "seed" else "images only"
                text += f"  {mean} [{low}, {high}] ({over})"
            print(text)


def setting(row: dict) -> tuple[int, float, float]:
    return row["held_out"], row["epochs"], row["judge_epochs"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("train", nargs="?", help="folder or archive with a folder per class")
    parser.add_argument("test", nargs="?", help="not needed with --hold-out")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS), metavar="ARM", help=", ".join(ARMS))
    parser.add_argument("--epochs", type=float, default=100.0)
    parser.add_argument("--judge-epochs", type=float, default=50.0)
    parser.add_argument("--hold-out", type=int, default=0, metavar="N")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, default=Path("results/rotnet"))
    parser.add_argument("--table", action="store_true")
    args = parser.parse_args()
    if args.table:
        return table(args.out)
    if args.train is None or (args.test is None) == (args.hold_out == 0):
        parser.error("TRAIN and either TEST or --hold-out")
    try:
        known, classes = labelled(args.train)
        order = np.random.default_rng(0).permutation(len(known[0]))
        kept, held = ((known[0][rows], known[1][rows]) for rows in (order[args.hold_out :], order[: args.hold_out]))
        judged = held if args.hold_out else labelled(args.test, classes)[0]
        args.out.mkdir(parents=True, exist_ok=True)
        for arm in args.arms:
            row = measure(arm, known, (kept, judged), args)
            name = f"{arm}-{args.epochs:g}-{args.judge_epochs:g}-{args.seed}"
            name += f"-held{args.hold_out}" if args.hold_out else ""
            (args.out / f"{name}.json").write_text(json.dumps(row, indent=1) + "\n")
            print(f"{arm}: {100 * row['accuracy']:.2f} %", flush=True)
    except UserError as error:
        raise SystemExit(f"rotnet.py: {error}") from None


if __name__ == "__main__":
    main()
