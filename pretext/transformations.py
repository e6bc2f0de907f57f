"""Which transformation was it? (Golan & El-Yaniv 2018, https://arxiv.org/abs/1805.10917): for finding anomalies.

72 of them: mirrored or not, shifted by a quarter of the side to none or one of eight directions, turned by one of four
quarter turns. Each image comes in all four turns of one mirroring and shift, drawn anew at each step. What the network
says of all 72 is the score of ``unlabel anomalies``: on images unlike those that it was trained on it is less sure.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretext.rotation import residual_block
from pretext.task import Batch, PretextTask, Recipe
from unlabel.augment import four_rotations
from unlabel.backbone import Backbone
from unlabel.errors import UserError

__all__ = ["Transformations", "moved"]

PLACES = [(y, x) for y in (0, -1, 1) for x in (0, -1, 1)]  # quarters of the side; the first is to stay
KINDS = 2 * len(PLACES)  # mirroring and shift together


@dataclass(frozen=True)
class Config:
    blocks: int = 1
    """Residual blocks in the head, which are thrown away after pretraining."""


def moved(images: Tensor, kind: Tensor) -> Tensor:
    """(N, C, S, S): image i mirrored if ``kind`` (N,) is odd, then shifted by ``PLACES[kind // 2]``.

    What comes in at the border is the image's own reflection.
    """
    n, _, side, _ = images.shape
    quarter = side // 4
    mirrored = torch.where((kind % 2 == 1).view(n, 1, 1, 1), images.flip(3), images)
    padded = F.pad(mirrored, [quarter] * 4, mode="reflect")
    offset = quarter * (1 - torch.tensor(PLACES, device=images.device)[kind // 2])  # (N, 2) where the window begins
    at = torch.arange(side, device=images.device)
    rows, columns = offset[:, :1] + at, offset[:, 1:] + at  # (N, S)
    picked = padded.gather(2, rows[:, None, :, None].expand(-1, padded.shape[1], -1, padded.shape[3]))
    return picked.gather(3, columns[:, None, None, :].expand(-1, padded.shape[1], side, -1))


class Transformations(PretextTask):
    Config = Config
    metrics = {"accuracy": "max"}  # noqa: RUF012
    recipe = Recipe(optimizer="adamw", lr=3e-3, weight_decay=0.05, batch_size=32, crop=(0.9, 1.0))
    mirrors: ClassVar[bool] = False
    config: Config

    def __init__(self, backbone: Backbone, config: Config) -> None:
        super().__init__(backbone, config)
        if config.blocks < 0:
            raise UserError("--transformations.blocks is from 0")
        self.blocks = nn.Sequential(*(residual_block(backbone) for _ in range(config.blocks)))
        self.classifier = nn.Linear(backbone.channels, 4 * KINDS)

    def _views(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """(4N, C, S, S) and labels (4N,): four turns of one kind per image."""
        kind = batch.draws.stream("transformations").integers(KINDS)
        views, turns = four_rotations(moved(batch.images, kind))
        return views, 4 * kind.repeat(4) + turns

    def logits(self, views: Tensor) -> Tensor:
        """(M, 3, S, S) to (M, 72) float32."""
        maps = self.backbone(views.contiguous(memory_format=torch.channels_last)).last
        return self.classifier(self.blocks(maps).mean((2, 3))).float()

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        views, labels = self._views(batch)
        logits = self.logits(views)
        return {"loss": F.cross_entropy(logits, labels), "accuracy": (logits.argmax(1) == labels).float().mean()}

    def trivial(self, batch: Batch) -> dict[str, float]:
        return {"accuracy": 1 / (4 * KINDS)}

    @torch.no_grad()
    def surprise(self, batch: Batch) -> Tensor:
        """Minus the mean over the 72 transformations of how far the logit of the right one is above the mean logit.

        Not - log p: where the network is certain, p is 1 of all images, but logits still differ (Hendrycks et al. 2022,
        https://arxiv.org/abs/1911.11132, of the largest logit).
        """
        total = torch.zeros(len(batch.images), device=batch.images.device)
        for kind in range(KINDS):
            views, turns = four_rotations(
                moved(batch.images, torch.full((len(batch.images),), kind, device=total.device))
            )
            logits = self.logits(views)
            right = logits.gather(1, (4 * kind + turns)[:, None])[:, 0] - logits.mean(1)
            total -= right.view(4, -1).sum(0)
        return total / (4 * KINDS)

    @torch.no_grad()
    def show(self, batch: Batch) -> dict[str, Tensor]:
        """One view of each image; the image; the image as the predicted transformation would have shown it."""
        n = len(batch.images)
        views, _ = self._views(batch)
        turns = torch.arange(n, device=views.device) % 4
        seen = views.view(4, n, *views.shape[1:])[turns, torch.arange(n, device=views.device)]
        guess = self.logits(seen).argmax(1)
        again = moved(batch.images, guess // 4)
        turned = torch.stack([torch.rot90(im, int(k), (1, 2)) for im, k in zip(again, guess % 4, strict=True)])
        return {"input": batch.images, "target": seen, "prediction": turned}
