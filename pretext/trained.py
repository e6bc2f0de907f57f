"""A trained task, head and all: from a run folder, for what a task can be used for beside pretraining."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from pretext import load_task
from pretext.task import Batch, PretextTask
from unlabel import checkpoint
from unlabel.augment import clean
from unlabel.backbone import load_backbone
from unlabel.cache import Pixels
from unlabel.draws import Draws
from unlabel.errors import UserError

__all__ = ["batches", "load_trained"]


def load_trained(run: Path, name: str | None = None) -> PretextTask:
    """The task ``name`` (default: the first) of a finished run with its backbone, in eval mode, as training left them.

    The exported backbone differs in its BatchNorm statistics, which are for clean, upright images alone. Raises
    UserError where the run is not finished or its checkpoints are gone.
    """
    backbone = load_backbone(run)
    try:
        settings = json.loads((run / "config.json").read_text())["settings"]
        names = list(settings["tasks"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{run / 'config.json'} is not a run's config ({error})") from None
    name = name or str(names[0])
    if name not in names:
        raise UserError(f"{run} was not trained with {name}: its tasks are {', '.join(names)}")
    state = checkpoint.load_newest(run / "checkpoints")
    if state is None:
        raise UserError(
            f"{run} has no checkpoint any more, and only those hold what a task has learned beside the backbone"
        )
    cls = load_task(name)
    own = settings.get("task_settings", {}).get(name, {})
    task = cls(backbone, cls.Config(**{k: tuple(v) if isinstance(v, list) else v for k, v in own.items()}))
    for phase in range(int(state["phase"]) + 1):
        task.begin(phase)
    parts = {"backbone": backbone, f"tasks.{name}": task}
    try:
        for prefix, module in parts.items():
            weights = {k.removeprefix(f"{prefix}."): v for k, v in state["model"].items() if k.startswith(f"{prefix}.")}
            module.load_state_dict(weights)
    except RuntimeError as error:
        raise UserError(f"the checkpoint in {run} does not fit ({str(error).splitlines()[-1].strip()})") from None
    backbone.eval()
    return task.eval()


def batches(task: PretextTask, images: Pixels, batch_size: int = 128, seed: int = 0) -> Iterator[Batch]:
    """uint8 images (N, R, R, 3) as a task gets them, whole and upright, with draws that belong to their places."""
    device, size = next(task.backbone.parameters()).device, task.backbone.spec.image_size
    for at in range(0, len(images), batch_size):
        pixels = torch.from_numpy(np.array(images[at : at + batch_size])).to(device)
        rows = range(at, at + len(pixels))
        yield Batch(clean(pixels, size), Draws(seed, [0] * len(pixels), rows, device=device), 1.0)
