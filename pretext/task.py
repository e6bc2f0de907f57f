"""The contract of a pretext task. A new task is one file beside this one and one line in ``TASKS``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn

from unlabel.augment import clean
from unlabel.backbone import Backbone
from unlabel.cache import Pixels
from unlabel.draws import Draws

__all__ = ["Batch", "PretextTask", "Recipe"]

BATCH = 128  # images at a time, where a trained task is used


@dataclass(frozen=True)
class Batch:
    """What a task gets at each step."""

    images: Tensor  # (N, 3, H, W) float32 in [0, 1], cropped and flipped, on the device
    draws: Draws  # randomness; row i of it belongs to image i
    progress: float  # 0..1 within this phase: warm-ups, curricula


@dataclass(frozen=True)
class Recipe:
    """Settings of the loop that suit a task untuned. Where several tasks share a backbone, the first decides;
    but ``progressive`` is for those of which each has it."""

    optimizer: Literal["sgd", "adamw", "muon"] = "adamw"  # SGD is with Nesterov momentum 0.9
    lr: float = 1e-3  # peak
    weight_decay: float = 0.05  # not on biases, BatchNorm and other vectors
    batch_size: int = 64  # images per step, over all processes
    schedule: Literal["cosine", "step"] = "cosine"
    crop: tuple[float, float] = (0.5, 1.0)  # area of the random crop
    progressive: bool = False  # train small first: see unlabel.optim.size_at


class PretextTask(nn.Module):
    """Makes its own labels from unlabelled images and owns the head that predicts them.

    The backbone is borrowed. ``forward`` returns a dict with ``"loss"`` (a scalar: the mean over images of
    per-image terms, each normalised within its own image, so that two processes equal one) and the detached
    metrics that ``metrics`` names. A task that needs a batch statistic uses ``unlabel.distributed.mean``, one that
    compares the images of a batch ``unlabel.distributed.gathered`` (and says ``across``).
    """

    Config: ClassVar[type[Any]]  # frozen dataclass, free of torch; its fields are --TASK.setting on the command line
    metrics: ClassVar[dict[str, Literal["max", "min"]]]
    recipe: ClassVar[Recipe] = Recipe()
    loss_weight: ClassVar[float] = 1.0  # of the loss in a sum with other tasks', where --weights says nothing
    phases: int = 1  # > 1 is not summed with other tasks
    mirrors: ClassVar[bool] = True  # whether the loop may show mirror images; not where they have another answer
    across: ClassVar[bool] = False  # whether the loss compares images: through ``unlabel.distributed.gathered``
    compiles: ClassVar[bool] = True  # whether --compile works: not with second derivatives
    sees: ClassVar[Literal["RGB", "grey"]] = "RGB"  # what the backbone is shown in pretraining; downstream shows RGB

    def __init__(self, backbone: Backbone, config: Any) -> None:
        super().__init__()
        # A plain reference, not a submodule: the loop owns the backbone's weights and saves them once.
        object.__setattr__(self, "backbone", backbone)
        self.config = config

    backbone: Backbone
    name: str = ""  # in TASKS; set where a trained task is loaded
    prior: ClassVar[bool] = False  # whether codes are drawn from a standard normal distribution

    def begin(self, phase: int) -> None:
        """Freeze or grow for phase 0 … phases - 1; a continued run calls it for each phase again, in order."""

    def param_groups(self) -> list[dict[str, Any]]:
        """The head's parameters. A group may set ``lr_scale``, ``betas``, ``weight_decay``, ``optimizer``
        (adamw or sgd: muon is for the backbone)."""
        return [{"params": [p for p in self.parameters() if p.requires_grad]}]

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        raise NotImplementedError

    def trivial(self, batch: Batch) -> dict[str, float]:
        """What a network that learned nothing scores: the keys of ``metrics``."""
        raise NotImplementedError

    def show(self, batch: Batch) -> dict[str, Tensor]:
        """``"input"``, ``"target"``, ``"prediction"``: each (N, 3, H, W) in [0, 1], for previews."""
        raise NotImplementedError

    # ---- What a trained task can be used for; each may be left out

    @torch.no_grad()
    def surprise(self, batch: Batch) -> Tensor:
        """(N,): how badly the task does on each image, for ``unlabel anomalies``. By default the mean squared error."""
        shown = self.show(batch)
        return (shown["prediction"] - shown["target"]).square().mean((1, 2, 3))

    def to_code(self, images: Tensor) -> Tensor:
        """Images (N, 3, H, W) in [0, 1] to codes (N, K), for ``unlabel compress`` and ``map``."""
        raise NotImplementedError

    def from_code(self, code: Tensor, size: int) -> Tensor:
        """Codes (N, K) to images (N, 3, size, size) in [0, 1]."""
        raise NotImplementedError

    def restore(self, images: Tensor, hidden: Tensor | None) -> Tensor:
        """Damaged images (N, 3, H, W) in [0, 1], and where they are hidden (N, 1, H, W), to whole ones."""
        raise NotImplementedError

    def batches(self, images: Pixels, hashes: Sequence[str] = ()) -> Iterator[Batch]:
        """uint8 images (N, R, R, 3), whole and upright. Draws belong to their ``hashes``, or else to their places."""
        device, size = next(self.backbone.parameters()).device, self.backbone.spec.image_size
        numbers = [int(h[:12], 16) for h in hashes] or range(len(images))
        for at in range(0, len(images), BATCH):
            pixels = torch.from_numpy(np.array(images[at : at + BATCH])).to(device)
            draws = Draws(0, [0] * len(pixels), numbers[at : at + BATCH], device=device)
            yield Batch(clean(pixels, size), draws, 1.0)

    @classmethod
    def can(cls, use: str) -> bool:
        """Whether the task has one of the methods above: ``to_code``, ``from_code``, ``restore``."""
        return getattr(cls, use) is not getattr(PretextTask, use)
