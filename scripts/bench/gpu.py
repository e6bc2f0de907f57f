"""Speed on a GPU: `unlabel pretrain` beside what the card can do, in under ten minutes. Writes results/gpu.json.

    python scripts/bench/gpu.py
    python scripts/bench/gpu.py --device cpu --network small --size 64 --batch 32 --images 128    # does it run?

For rotation and inpainting, in turns in each of five rounds: a later epoch of the command; *limit*, the same module's
steps on a batch that is in memory; *timm*, a loop like timm's own training benchmark (benchmark.py, --bench train: one
random batch, a thousand classes, SGD) for that network on that card, with as many views in a batch. Precision
and layout are the same for all: bf16 where the card has it, channels-last. Photos are cut from scikit-learn's two.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from loops import Setting, blocks_of_steps, limit, unlabel_run
from photos import cut_photos

from unlabel.backbone import channels_last
from unlabel.config import BACKBONES
from unlabel.precision import autocast, pick_precision
from unlabel.runfolder import commit, hardware, versions

ROUNDS = 5
TASKS = {"rotation": 4, "inpainting": 1}  # views of an image
AT_LEAST = 0.95  # later epochs over the limit

Blocks = Callable[[], tuple[float, int]]  # a block's seconds and images


def timm_steps(setting: Setting, views: int) -> Callable[[Any], None]:
    """Forward, cross-entropy, backward and update of ``views`` random images at a time."""
    own = BACKBONES.get(setting.network)
    name, kwargs = (own.timm_name, dict(own.kwargs)) if own else (setting.network, {})
    model = channels_last(timm.create_model(name, num_classes=1000, **kwargs).to(setting.device)).train()
    side, device, precision = setting.size, setting.device, pick_precision("auto", setting.device)
    images = torch.randn(views, 3, side, side, device=device).contiguous(memory_format=torch.channels_last)
    labels = torch.randint(0, 1000, (views,), device=device)
    sgd = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)

    def step(_: Any) -> None:
        sgd.zero_grad()
        with torch.backends.cudnn.flags(enabled=True, benchmark=True):  # as timm's script sets it
            with autocast(device, precision):
                logits = model(images)
            F.cross_entropy(logits.float(), labels).backward()
        sgd.step()

    return step


def one_by_one(measure: Callable[..., None], images: int) -> Blocks:
    """A block each time it is called, of a loop that is measured in blocks; its first steps are not timed."""

    def block() -> tuple[float, int]:
        found: list[tuple[float, int]] = []
        measure(images, 1, lambda seconds, count: found.append((seconds, count)))
        return found[0]

    return block


def race(setting: Setting, views: int) -> dict[str, list[float]]:
    """Views per second of each contender in each round."""
    speeds: dict[str, list[float]] = {"later": [], "limit": [], "timm": []}
    others: dict[str, Blocks] = {}

    def on_epoch(seconds: float, images: int) -> None:
        if not others:  # the first epoch packs the images; what the others need is made behind it
            feed = iter(lambda: None, 0)
            one_step = timm_steps(setting, views * setting.batch_size)
            steps = partial(blocks_of_steps, one_step, feed, setting.batch_size, 0)
            others.update(limit=one_by_one(limit(setting, 0), setting.images), timm=one_by_one(steps, setting.images))
            return
        speeds["later"].append(views * images / seconds)
        for name, block in others.items():
            took, done = block()
            speeds[name].append(views * done / took)

    unlabel_run(setting, ROUNDS + 1, on_epoch)
    return {name: [round(v, 1) for v in values] for name, values in speeds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--network", default="resnet50")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--batch", type=int, default=64, help="images; rotation shows each of them four times")
    parser.add_argument("--images", type=int, default=2048, help="of an epoch")
    parser.add_argument("--out", type=Path, default=Path("results/gpu.json"))
    args = parser.parse_args()
    begun, device = time.perf_counter(), torch.device(args.device)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    about = {"hardware": hardware(), "versions": versions(), "commit": commit(), **vars(args), "out": str(args.out)}
    found: dict[str, Any] = {"about": about, "precision": pick_precision("auto", device), "views_per_second": {}}
    with tempfile.TemporaryDirectory() as folder:
        photos = cut_photos(Path(folder), args.images, (500, 375))
        for task, views in TASKS.items():
            setting = Setting(task, args.network, photos, args.images, args.size, device, args.batch)
            speeds = race(setting, views)
            found["views_per_second"][task] = speeds
            found["minutes"] = round((time.perf_counter() - begun) / 60, 2)
            args.out.write_text(json.dumps(found, indent=1) + "\n")
            median = {name: statistics.median(values) for name, values in speeds.items()}
            print(f"{task}: " + ", ".join(f"{name} {v:,.0f} views/s" for name, v in median.items()))
            for over in ("limit", "timm"):
                each = [a / b for a, b in zip(speeds["later"], speeds[over], strict=True)]
                wanted = f", wanted {AT_LEAST}" if over == "limit" else ""
                low, high = min(each), max(each)
                print(f"  later / {over}: {statistics.median(each):.3f} [{low:.3f}, {high:.3f}]{wanted}", flush=True)
    print(f"{found['minutes']} minutes; {args.out}")


if __name__ == "__main__":
    main()
