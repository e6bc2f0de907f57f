"""S4L: rotation prediction goes on while the network is fine-tuned (Zhai et al. 2019, https://arxiv.org/abs/1905.03670).

Each step sees, beside its labelled images, unlabelled ones at all four quarter turns, and the loss that names the
turns is added to that of the labels. So the backbone cannot forget what the unlabelled images say while it learns from
a few labelled ones; a network from random weights learns from both at once, which is the paper's own setting.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unlabel.augment import colour_jitter, four_rotations, random_view
from unlabel.batchnorm import unmoved_statistics
from unlabel.cache import Pixels
from unlabel.draws import Draws, mix
from unlabel.order import batch_at

__all__ = ["SETTING", "UNLABELLED", "Turns"]

UNLABELLED = 16  # images per step, each at four turns
WEIGHT = 1.0  # of the loss of the turns, beside that of the labels
SETTING = f"{UNLABELLED} unlabelled images per step, weight {WEIGHT:g}"


class Turns(nn.Module):
    """The unlabelled part of each step, and the linear layer that names the turns.

    Args:
        images: unlabelled, (N, R, R, 3) uint8.
        channels: of the backbone's last stage.
        seed: of order and augmentation; the same draws for every arm.
        area, flip: as for the labelled images.
    """

    def __init__(self, images: Pixels, channels: int, seed: int, area: tuple[float, float], flip: bool) -> None:
        super().__init__()
        self.images, self.seed, self.area, self.flip = images, mix(seed, "s4l"), area, flip
        self.classifier = nn.Linear(channels, 4)
        self.batch = min(UNLABELLED, len(images))
        self.seen = 4 * self.batch  # views per step

    def views(self, step: int, size: int) -> tuple[Tensor, Tensor]:
        """(4B, 3, size, size) in [0, 1] and their turns (4B,), on the device of the linear layer."""
        device = self.classifier.weight.device
        epochs, indices = batch_at(self.seed, step, self.batch, len(self.images))
        draws = Draws(self.seed, epochs.tolist(), indices.tolist(), device=device)
        source = torch.from_numpy(np.array(self.images[indices])).to(device)
        views = random_view(source, size, draws, area=self.area, ratio=1.0, flip=self.flip)
        return four_rotations(colour_jitter(views, draws, 0.2))

    def loss(self, backbone: nn.Module, step: int, size: int) -> Tensor:
        """Weighted cross-entropy of the turns of this step's images at ``size`` px."""
        views, turns = self.views(step, size)
        with unmoved_statistics(backbone):  # those that it will classify with are of upright images
            features = backbone(views.contiguous(memory_format=torch.channels_last)).pooled
        return WEIGHT * F.cross_entropy(self.classifier(features).float(), turns)
