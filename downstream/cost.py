"""What a table will cost, said before it is spent: measured here and now, for this network."""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
import torch

from downstream import choosing
from downstream import finetune as ft
from downstream import label_free as lf
from downstream.s4l import UNLABELLED
from downstream.table import STATISTICS_IMAGES, TRAINED, Arm, Table
from unlabel.backbone import build_backbone, channels_last
from unlabel.precision import autocast, pick_precision

__all__ = ["print_cost"]


def print_cost(table: Table, arms: Sequence[Arm], label_free: bool = False) -> None:
    """Image passes for features and for fine-tuning, at a speed that is measured here; fits of probes, counted.

    ``label_free``: also those for the scores that need no labels.
    """
    known = f"; what is already in {table.out / 'cells'} is not done again" if (table.out / "cells").exists() else ""
    plan, networks, fits, named, by_stage = list(table.plan()), 0, 0, 0, 0
    passes = {False: 0, True: 0}  # of views as large as in pretraining, and of larger ones
    for arm in arms:
        protocols = arm.protocols(table.protocols)
        fits += len(arm.seeds) * len(plan) * sum(p not in TRAINED for p in protocols)
        if arm.kind == "backbone" and "linear" in protocols:
            fits += len(arm.seeds) * len(table.parts) * table.n_draws
        if arm.kind in ("backbone", "random") and "linear" in protocols:  # of each stage, to choose one
            by_stage += len(arm.seeds) * len(plan)
        networks += len(arm.seeds) * (arm.kind in ("backbone", "random"))
        for count, _ in plan if set(TRAINED) & set(protocols) else []:
            n, presets = table.labels(count), table.presets(count, arm)
            tuned = [presets[-1]]  # the best one, on all labels, and what it is chosen from
            if len(presets) > 1:
                y = table.pool.y if count == "all" else np.repeat(np.arange(len(table.classes)), count)
                tuned += [ft.on_trial(p, len(choosing.subsample(y, 0)), n) for p in presets]
            runs = [(p, min(p.batch_size, n)) for p in tuned] if {"finetune", "self-training"} & set(protocols) else []
            if "self-training" in protocols:
                student = table.student(count, arm.kind == "scratch")
                runs.append((student, min(student.batch_size, n + len(table.unlabelled))))
                named += len(arm.seeds) * len(table.unlabelled)
            if "s4l" in protocols:
                runs += [(p, min(p.batch_size, n) + 4 * min(UNLABELLED, len(table.unlabelled))) for p in tuned]
            for p, images in runs:
                passes[p.larger] += len(arm.seeds) * p.steps * images
    there, back, width, stages = _measured(table)
    fits += by_stage * stages
    if fits:
        drawn = len(np.unique(np.concatenate([table.draws.indices(d, c) for c, d in plan])))
        images = networks * (drawn + len(table.test) + STATISTICS_IMAGES)
        minutes = images * there / 60
        print(f"cost: features of {images:,} images, about {minutes:.1f} minutes, then {fits:,} fits{known}")
    if label_free:
        images = networks * lf.passes(len(table.pool), width)
        print(f"cost: label-free scores, {images:,} images, about {images * there / 60:.1f} minutes{known}")
    if any(passes.values()):
        naming = (1 + table.flip) * named * there * back[True] / back[False]  # as seen and mirrored, the larger views
        minutes = (sum(passes[larger] * back[larger] for larger in back) + naming) / 60
        print(f"cost: fine-tuning passes {sum(passes.values()):,} images, about {minutes:.1f} minutes{known}")


def _measured(table: Table) -> tuple[float, dict[bool, float], int, int]:
    """Seconds per image of a forward pass for features, and of a step of fine-tuning on views of that size (False) and
    larger ones (True), each at its own precision; how many features there are, and how many stages."""
    model = ft.Classifier(build_backbone(table.backbone[0], table.image_size, table.backbone[1]), 2)
    model = channels_last(model.to(table.device))

    def images(size: int) -> torch.Tensor:
        return torch.rand(32, 3, size, size, device=table.device).contiguous(memory_format=torch.channels_last)

    small, large = images(table.image_size), images(ft.view_size(table.image_size))
    precision = pick_precision("auto", table.device)

    def forward(views: torch.Tensor) -> None:
        with torch.inference_mode():
            model(views)

    def both(views: torch.Tensor) -> None:
        with autocast(table.device, precision):
            logits = model(views)
        logits.float().sum().backward()

    seconds = []
    for work, views in ((forward, small), (both, small), (both, large)):
        times = []
        for _ in range(4):
            begun = time.perf_counter()
            work(views)
            if table.device.type == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - begun)
        seconds.append(float(np.median(times[1:])) / len(views))
    return seconds[0], {False: seconds[1], True: seconds[2]}, model.backbone.channels, len(model.backbone.stage_names)
