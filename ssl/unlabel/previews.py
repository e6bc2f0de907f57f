"""What a task sees, should say and says, as a picture."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from torchvision.utils import make_grid, save_image

__all__ = ["save_previews"]


@torch.no_grad()
def save_previews(
    tasks: Mapping[str, nn.Module], batches: Mapping[str, object], folder: Path | None, step: int
) -> list[Path]:
    """One PNG per task: rows input, target, prediction. No buffer changes: everything is in eval mode.

    Without a folder nothing is written: a rank that only takes part in what the tasks compute together.
    """
    paths = []
    for name, task in tasks.items():
        backbone: nn.Module = task.backbone  # type: ignore[assignment]
        modes = [(m, m.training) for root in (task, backbone) for m in root.modules()]
        task.eval()
        backbone.eval()
        shown: dict[str, Tensor] = task.show(batches[name])  # type: ignore[operator]
        for module, training in modes:
            module.training = training
        if folder is None:
            continue
        rows = [shown[k].float().clamp(0, 1).cpu() for k in ("input", "target", "prediction")]
        height = max(96, rows[0].shape[-1])
        rows = [torch.nn.functional.interpolate(r, size=height, mode="nearest") for r in rows]
        path = folder / f"{name}-{step:09d}.png"
        folder.mkdir(parents=True, exist_ok=True)
        save_image(make_grid(torch.cat(rows), nrow=len(rows[0]), padding=2, pad_value=1.0), path)
        paths.append(path)
    return paths
