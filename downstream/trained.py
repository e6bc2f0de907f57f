"""What the uses of a trained task need of it. The tasks themselves, ``pretext.task.PretextTask``, are handed in."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from unlabel.backbone import Backbone
from unlabel.cache import Pixels
from unlabel.errors import UserError
from unlabel.runfolder import RunFolder
from unlabel.start import refuse_addresses

__all__ = ["Code", "Load", "Trained", "data_of", "device_of"]


class Trained(Protocol):
    """A task with its head, in eval mode, on a device; its methods are described there."""

    name: str
    backbone: Backbone

    prior: ClassVar[bool]

    def can(self, use: str) -> bool: ...
    def batches(self, images: Pixels, hashes: Sequence[str] = ()) -> Iterator[Any]: ...
    def show(self, batch: Any) -> dict[str, Tensor]: ...
    def surprise(self, batch: Any) -> Tensor: ...
    def to_code(self, images: Tensor) -> Tensor: ...
    def from_code(self, code: Tensor, size: int) -> Tensor: ...
    def restore(self, images: Tensor, hidden: Tensor | None) -> Tensor: ...


Load = Callable[[Path, str | None, torch.device | str], Trained]  # run folder, which of its tasks, device


def device_of(task: Trained) -> torch.device:
    return next(task.backbone.parameters()).device


def data_of(run: Path) -> tuple[str, ...]:
    """The images that a run was trained on, as its user named them."""
    spec = (RunFolder(run).read() or {}).get("data", {}).get("spec")
    if not spec:
        raise UserError(f"{run} does not name its images: give them")
    refuse_addresses(spec)
    return tuple(spec)


class Code:
    """A task's code of uint8 images (N, R, R, 3), and images of codes, both as arrays."""

    def __init__(self, task: Trained) -> None:
        self.task = task

    @torch.inference_mode()
    def to_code(self, images: Pixels, progress: str | None = None) -> np.ndarray:
        """(N, K)."""
        bar = tqdm(total=len(images), desc=progress, unit="img", disable=progress is None)
        parts = []
        with bar:
            for batch in self.task.batches(images):
                parts.append(self.task.to_code(batch.images).float().cpu().numpy())
                bar.update(len(parts[-1]))
        return np.concatenate(parts)

    @torch.inference_mode()
    def from_code(self, code: np.ndarray) -> np.ndarray:
        """(N, K) to (N, 3, size, size) in [0, 1]."""
        size, device = self.task.backbone.spec.image_size, device_of(self.task)
        parts = torch.from_numpy(code.astype(np.float32)).split(256)
        return np.concatenate([self.task.from_code(p.to(device), size).float().cpu().numpy() for p in parts])
