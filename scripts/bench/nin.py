"""RotNet's network for CIFAR-10, four blocks of network in network, and how its features are judged there.

Gidaris et al. 2018 (https://arxiv.org/abs/1803.07728), section 4.1: rotation is predicted from the fourth block, and a
classifier of three dense layers is trained with all labels on the second one, which stays as it is: 89.06 %.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from timm.models import register_model
from torch import Tensor, nn

from unlabel.augment import to_float
from unlabel.backbone import Backbone
from unlabel.precision import autocast, pick_precision

__all__ = ["NIN", "accuracy_on_block_two"]

BATCH = 256
PAD = 4  # px, of the shifts of the classifier's training


def block(channels: int, widths: tuple[int, int, int], kernel: int) -> list[nn.Module]:
    """A convolution, and two of one pixel behind it."""
    layers: list[nn.Module] = []
    for width, side in zip(widths, (kernel, 1, 1), strict=True):
        layers += [nn.Conv2d(channels, width, side, padding=side // 2, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
        channels = width
    return layers


class NIN(nn.Module):
    """(N, 3, 32, 32) to blocks of (N, 96, 16, 16), (N, 192, 8, 8) three times."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(*layers)
            for layers in (
                [*block(3, (192, 160, 96), 5), nn.MaxPool2d(3, 2, 1)],
                [*block(96, (192, 192, 192), 5), nn.AvgPool2d(3, 2, 1)],
                block(192, (192, 192, 192), 3),
                block(192, (192, 192, 192), 3),
            )
        )

    def forward_intermediates(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        maps: list[Tensor] = []
        for each in self.blocks:
            x = each(x)
            maps.append(x)
        return x, maps


@register_model
def nin4(**_: object) -> NIN:  # so that `--backbone nin4` is known wherever this file is imported
    return NIN()


def shifted(images: Tensor, generator: torch.Generator) -> Tensor:
    """Random shifts of up to PAD pixels, zeros at the border, and random left-right flips. (N, 3, S, S)."""
    n, side = len(images), images.shape[-1]
    at = torch.randint(0, 2 * PAD + 1, (2, n, 1), generator=generator).to(images.device)
    mirror = (torch.rand(n, 1, generator=generator) < 0.5).to(images.device)
    pixels = torch.arange(side, device=images.device)
    rows, columns = at[0] + pixels, at[1] + torch.where(mirror, pixels.flip(0), pixels)
    padded = F.pad(images, (PAD,) * 4)
    each = torch.arange(n, device=images.device)[:, None, None]
    return padded.permute(0, 2, 3, 1)[each, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def accuracy_on_block_two(
    backbone: Backbone, train: tuple[np.ndarray, np.ndarray], test: tuple[np.ndarray, np.ndarray], epochs: int
) -> float:
    """Share of test images that are named right. Each set: uint8 (N, S, S, 3) and its classes (N,)."""
    device = next(backbone.parameters()).device
    precision = pick_precision("auto", device)
    first = nn.Sequential(*backbone.model.blocks[:2]).eval()
    classes, side = int(train[1].max()) + 1, train[0].shape[1] // 4
    hidden = 20 * classes
    torch.manual_seed(0)
    layers: list[nn.Module] = [nn.Flatten()]
    for width in (192 * side * side, hidden):
        layers += [nn.Linear(width, hidden, bias=False), nn.BatchNorm1d(hidden), nn.ReLU()]
    classifier = nn.Sequential(*layers, nn.Linear(hidden, classes)).to(device)

    def logits(images: Tensor) -> Tensor:
        with autocast(device, precision):
            with torch.no_grad():
                x = backbone.normalise(images).contiguous(memory_format=torch.channels_last)
                found = first(x)
            return classifier(found.float()).float()

    steps = epochs * (len(train[0]) // BATCH)
    sgd = torch.optim.SGD(classifier.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4)
    rate = torch.optim.lr_scheduler.CosineAnnealingLR(sgd, max(1, steps))
    pixels, labels = (torch.from_numpy(a).to(device) for a in train)
    generator = torch.Generator().manual_seed(0)
    for rows in batches(len(pixels), epochs, generator):
        rows = rows.to(device)
        F.cross_entropy(logits(shifted(to_float(pixels[rows]), generator)), labels[rows]).backward()
        sgd.step()
        sgd.zero_grad()
        rate.step()
    classifier.eval()
    with torch.no_grad():
        parts = np.array_split(np.arange(len(test[0])), max(1, len(test[0]) // BATCH))
        guesses = [logits(to_float(torch.from_numpy(test[0][p]).to(device))).argmax(1).cpu() for p in parts]
    return float((torch.cat(guesses).numpy() == test[1]).mean())


def batches(n: int, epochs: int, generator: torch.Generator) -> Iterator[Tensor]:
    for _ in range(epochs):
        yield from torch.randperm(n, generator=generator)[: n // BATCH * BATCH].split(BATCH)
