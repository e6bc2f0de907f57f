"""What the uses of a trained task need of it. The tasks themselves, ``pretext.task.PretextTask``, are handed in."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from unlabel.backbone import Backbone
from unlabel.cache import Pixels

__all__ = ["Load", "Trained"]


class Trained(Protocol):
    """A task with its head, in eval mode, on a device; its methods are described there."""

    backbone: Backbone

    prior: ClassVar[bool]

    def can(self, use: str) -> bool: ...
    def batches(self, images: Pixels, batch_size: int = 128) -> Iterator[Any]: ...
    def show(self, batch: Any) -> dict[str, Tensor]: ...
    def surprise(self, batch: Any) -> Tensor: ...
    def to_code(self, images: Tensor) -> Tensor: ...
    def from_code(self, code: Tensor, size: int) -> Tensor: ...
    def restore(self, images: Tensor, hidden: Tensor | None) -> Tensor: ...


Load = Callable[[Path, str | None, torch.device | str], Any]  # run folder, which of its tasks, device -> Trained


def name_of(task: Trained) -> str:
    return type(task).__name__.lower()


def device_of(task: Trained) -> torch.device:
    return next(task.backbone.parameters()).device
