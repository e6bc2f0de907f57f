"""Rotation prediction (Gidaris et al. 2018, https://arxiv.org/abs/1803.07728).

All four exact quarter turns of each image are in one batch, and the network says which is which. The head has
a residual block of its own that is thrown away: the last layers of a pretext network specialise in the pretext
task, and this way they are less the backbone's. How far that goes differs from run to run: the probe chooses a stage.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from timm.models.resnet import BasicBlock, Bottleneck
from torch import Tensor, nn

from pretext.task import Batch, PretextTask, Recipe
from unlabel.augment import colour_jitter, four_rotations
from unlabel.backbone import Backbone
from unlabel.batchnorm import has_batchnorm
from unlabel.errors import UserError

__all__ = ["Rotation"]

WIDE = 512  # channels


@dataclass(frozen=True)
class Config:
    blocks: int = 1
    """Residual blocks in the head, which are thrown away after pretraining."""
    jitter: float = 0.3
    """Brightness, contrast and saturation vary by this factor; the same for all four views of an image."""
    grey: float = 0.1
    """Share of images that are turned grey."""


def residual_block(backbone: Backbone) -> BasicBlock | Bottleneck:
    """A block of stride 2: what would be the network's next stage, at a quarter of its cost. Of wide networks a
    bottleneck: for a ResNet-50, two 3×3 convolutions of 2,048 channels would be three times the network's weights.

    With BatchNorm where the network has it. One without knows no batch, so that two processes equal one: so here.
    """
    channels = backbone.channels
    norm: Any = nn.BatchNorm2d if has_batchnorm(backbone) else _group_norm
    shortcut = nn.Sequential(nn.Conv2d(channels, channels, 1, stride=2, bias=False), norm(channels))
    if channels > WIDE:
        return Bottleneck(channels, channels // 4, stride=2, downsample=shortcut, norm_layer=norm)
    return BasicBlock(channels, channels, stride=2, downsample=shortcut, norm_layer=norm)


def _group_norm(channels: int, **options: Any) -> nn.GroupNorm:
    return nn.GroupNorm(math.gcd(8, channels), channels, **options)


class Rotation(PretextTask):
    Config = Config
    metrics = {"accuracy": "max", "half_turn_accuracy": "max", "quarter_turn_accuracy": "max"}  # noqa: RUF012
    recipe = Recipe(optimizer="adamw", lr=3e-3, weight_decay=0.05, batch_size=32, progressive=True)
    config: Config

    def __init__(self, backbone: Backbone, config: Config) -> None:
        super().__init__(backbone, config)
        if config.blocks < 0 or not 0 <= config.jitter <= 1 or not 0 <= config.grey <= 1:
            raise UserError("--rotation.blocks is from 0, --rotation.jitter and .grey are from 0 to 1")
        self.blocks = nn.Sequential(*(residual_block(backbone) for _ in range(config.blocks)))
        self.classifier = nn.Linear(backbone.channels, 4)

    def _views(self, batch: Batch) -> tuple[Tensor, Tensor]:
        images = colour_jitter(batch.images, batch.draws.stream("rotation"), self.config.jitter, self.config.grey)
        return four_rotations(images)

    def logits(self, views: Tensor) -> Tensor:
        """(M, 3, S, S) to (M, 4)."""
        return self.classifier(self.blocks(self.backbone(views).last).mean((2, 3)))

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        views, labels = self._views(batch)
        logits = self.logits(views.contiguous(memory_format=torch.channels_last)).float()
        loss = F.cross_entropy(logits, labels)
        with torch.no_grad():
            hit = (logits.argmax(1) == labels).float().mean()
            # A squeezed photo tells 0/180 from 90/270 by its proportions: each question on its own.
            half, quarter = pairwise_accuracy(logits, labels)
        return {"loss": loss, "accuracy": hit, "half_turn_accuracy": half, "quarter_turn_accuracy": quarter}

    @torch.no_grad()
    def surprise(self, batch: Batch) -> Tensor:
        """Mean over the four turns of - log p(the turn).

        After Golan & El-Yaniv 2018 (https://arxiv.org/abs/1805.10917), who take p itself or fit a Dirichlet to it.
        """
        views, labels = four_rotations(batch.images)
        logits = self.logits(views.contiguous(memory_format=torch.channels_last)).float()
        loss = F.cross_entropy(logits, labels, reduction="none")
        return loss.view(4, -1).mean(0)

    def trivial(self, batch: Batch) -> dict[str, float]:
        return {"accuracy": 0.25, "half_turn_accuracy": 0.5, "quarter_turn_accuracy": 0.5}

    @torch.no_grad()
    def show(self, batch: Batch) -> dict[str, Tensor]:
        """Each image at one of the turns; the prediction is the input turned back by what was predicted."""
        n = len(batch.images)
        turns = torch.arange(n, device=batch.images.device) % 4
        turned = torch.stack([torch.rot90(im, int(k), (1, 2)) for im, k in zip(batch.images, turns, strict=True)])
        guess = self.logits(turned).argmax(1)
        back = torch.stack([torch.rot90(im, -int(k), (1, 2)) for im, k in zip(turned, guess, strict=True)])
        return {"input": turned, "target": batch.images, "prediction": back}


def pairwise_accuracy(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Upright or upside down among the right axis's two answers; and which axis (0/180 against 90/270).

    logits (M, 4), labels (M,). Chance is 0.5 for both.
    """
    axis = labels % 2  # 0: upright or upside down, 1: a quarter turn either way
    pair = torch.stack([logits.gather(1, (axis + 2 * k)[:, None])[:, 0] for k in range(2)], 1)
    half = (pair.argmax(1) == labels // 2).float().mean()
    axes = torch.stack([logits[:, [0, 2]].logsumexp(1), logits[:, [1, 3]].logsumexp(1)], 1)
    quarter = (axes.argmax(1) == axis).float().mean()
    return half, quarter
