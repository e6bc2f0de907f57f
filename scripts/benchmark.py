"""Pretraining against its limit, in one run on one machine.

    python scripts/benchmark.py FOLDER_OF_PHOTOS          about a minute for each task, on two cores

Prints, for each task, the images/s of the real loop (reading, augmenting, drawing, training) and of the same model's
forward, backward and optimiser step on a batch that is already in memory, and their ratio.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from pathlib import Path

import torch

from pretext import TASKS, load_task
from unlabel import optim
from unlabel.backbone import build_backbone, channels_last
from unlabel.batches import Batches
from unlabel.cache import load_cache
from unlabel.config import PretrainConfig
from unlabel.plan import Plan
from unlabel.precision import autocast, pick_precision
from unlabel.pretrain import Together
from unlabel.runfolder import hardware
from unlabel.sources import open_source

STEPS, REPEATS, IMAGE_SIZE = 6, 5, 64


def measure(name: str, folder: str) -> dict[str, object]:
    torch.manual_seed(0)
    cls, device = load_task(name), torch.device("cpu")
    recipe = cls.recipe
    backbone = build_backbone("small", IMAGE_SIZE)
    task = cls(backbone, cls.Config())
    model = channels_last(Together(backbone, {name: task}, (1.0,))).train()
    optimizers = optim.make_optimizers(backbone, task.param_groups(), recipe.optimizer, recipe.lr, recipe.weight_decay)
    batches = Batches(
        load_cache(open_source(folder), IMAGE_SIZE), PretrainConfig((name,), (folder,), Path()), True, device
    )
    precision = pick_precision("auto", device)
    batches.plan = Plan(
        IMAGE_SIZE, recipe.batch_size, 10_000, recipe.lr, recipe.weight_decay, recipe.optimizer, recipe.schedule,
        recipe.crop, False, precision,
    )  # fmt: skip

    def train(batch) -> None:
        with autocast(device, precision):
            loss, _ = model(batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    held = batches(0, 0.5)
    speeds: dict[str, list[float]] = {"limit": [], "loop": []}
    for repeat in range(REPEATS + 1):
        for kind in speeds:
            begun = time.perf_counter()
            for step in range(STEPS):
                train(held if kind == "limit" else batches(1 + repeat * STEPS + step, 0.5))
            if repeat:  # the first is the warm-up
                speeds[kind].append(STEPS * recipe.batch_size / (time.perf_counter() - begun))
    ratios = [a / b for a, b in zip(speeds["loop"], speeds["limit"], strict=True)]
    return {
        "task": name,
        "limit_images_per_second": [round(v, 1) for v in speeds["limit"]],
        "loop_images_per_second": [round(v, 1) for v in speeds["loop"]],
        "ratio": round(statistics.median(ratios), 3),
        "ratio_range": [round(min(ratios), 3), round(max(ratios), 3)],
    }


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    rows = []
    for name in TASKS:
        row = measure(name, sys.argv[1])
        rows.append(row)
        limit, loop = (statistics.median(row[f"{k}_images_per_second"]) for k in ("limit", "loop"))  # type: ignore[arg-type]
        low, high = row["ratio_range"]  # type: ignore[misc]
        print(f"{name:<12} limit {limit:7.1f}  loop {loop:7.1f} images/s  ratio {row['ratio']} [{low}, {high}]")
    out = Path("results/benchmark.json")
    out.parent.mkdir(exist_ok=True)
    out.write_text(json.dumps({"hardware": hardware(), "image_size": IMAGE_SIZE, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
