"""What the tasks that paint pixels share: a light decoder without skip connections, and its error.

No skips: a shallow feature map would carry the pixels past the deep stages, which would then have nothing to
learn. Light: on a CPU the decoder costs a fraction of the backbone, which is what gets pretrained.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unlabel.backbone import SMALL_IMAGE, Backbone
from unlabel.mlp import Mlp, dense_layer

__all__ = [
    "Decoder",
    "DenseDecoder",
    "Pyramid",
    "at_least_float32",
    "denormalise",
    "feature_side",
    "is_grey",
    "mean_image_error",
    "mean_of_others",
    "plain_error",
    "resize",
    "squared_error",
    "weighted_error",
]

GROUPS = 8  # of GroupNorm: unlike BatchNorm it knows no batch, so two processes equal one


def feature_side(backbone: Backbone) -> int:
    """Height = width of ``backbone(images).last`` at the image size that the backbone was made for."""
    size, mean = backbone.spec.image_size, backbone.get_buffer("mean")
    was_training = backbone.training
    backbone.eval()  # a forward in training mode would move BatchNorm's statistics
    with torch.no_grad():
        last = backbone(torch.zeros(1, 3, size, size, device=mean.device)).last
    backbone.train(was_training)
    return int(last.shape[-1])


def resize(x: Tensor, side: int) -> Tensor:
    """(N, C, h, w) to (N, C, side, side), bilinear; untouched where it already fits."""
    return x if x.shape[-2:] == (side, side) else F.interpolate(x, size=(side, side), mode="bilinear")


class Decoder(nn.Module):
    """Features (N, channels, h, w) to an image (N, out, size, size), float32; three numbers: normalised colours.

    Doubles ``side`` by nearest-neighbour upsampling + 3×3 convolution (no checkerboard: Odena et al. 2016),
    through the sides that halving ``size`` gives. ``full`` goes up to ``size``; else the last doubling is bilinear:
    without skips the last octave of a photo holds little. Small images, whose strokes are a pixel or two, go all the
    way by default.
    """

    def __init__(
        self, channels: int, side: int, size: int, fine: int = 16, out: int = 3, full: bool | None = None
    ) -> None:
        super().__init__()
        sides = [size]
        while math.ceil(sides[0] / 2) > side:
            sides.insert(0, math.ceil(sides[0] / 2))
        full = size < SMALL_IMAGE if full is None else full
        sides = sides if full else sides[:-1]
        # From the fine end: 16, 32, 64, 64 … channels, so that no level costs more than the coarse ones.
        widths = [fine * min(4, 1 << k) for k in reversed(range(len(sides) + 1))]
        layers: list[nn.Module] = [*_block(channels, widths[0], 1)]
        for larger, (before, after) in zip(sides, pairwise(widths), strict=True):
            layers += [nn.Upsample(size=larger, mode="nearest"), *_block(before, after, 3)]
        self.layers = nn.Sequential(*layers, nn.Conv2d(widths[-1], out, 3, padding=1))

    def forward(self, features: Tensor, size: int) -> Tensor:
        return resize(self.layers(features).float(), size)


class Pyramid(nn.Module):
    """Every stage of the backbone to an image (N, 3, size, size), float32 (a feature pyramid, Lin et al. 2017).

    Where detail has to be kept. It begins at almost zero: what it paints is to be added to the input.
    """

    def __init__(self, backbone: Backbone, width: int) -> None:
        super().__init__()
        self.laterals = nn.ModuleList(nn.Conv2d(c, width, 1) for c in backbone.stage_channels)
        self.smooth = nn.Sequential(nn.GroupNorm(GROUPS, width), nn.ReLU(), nn.Conv2d(width, width, 3, padding=1))
        last = nn.Conv2d(width, 3, 3, padding=1)
        nn.init.normal_(last.weight, std=1e-4)  # but for what a first gradient needs
        assert last.bias is not None
        nn.init.zeros_(last.bias)
        self.paint = nn.Sequential(nn.GroupNorm(GROUPS, width), nn.ReLU(), last)

    def forward(self, stages: Iterable[Tensor], size: int) -> Tensor:
        """``stages`` from shallow to deep."""
        top: Tensor | None = None
        for stage, lateral in reversed(list(zip(stages, self.laterals, strict=True))):
            here = lateral(stage)
            top = here if top is None else here + F.interpolate(top, size=here.shape[-2:], mode="nearest")
        assert top is not None
        return self.paint(resize(self.smooth(top), size)).float()


class DenseDecoder(nn.Module):
    """Codes (N, code) to images (N, 3, size, size): the layers of a dense network in reverse, without BatchNorm."""

    def __init__(self, code: int, mirrored: Mlp) -> None:
        super().__init__()
        widths = [code, *reversed(mirrored.widths)] if mirrored.activation != "linear" else [code]
        layers = [dense_layer(a, b, mirrored.activation, norm=False) for a, b in pairwise(widths)]
        self.side = mirrored.size
        self.layers = nn.Sequential(*layers, nn.Linear(widths[-1], 3 * self.side**2))

    def forward(self, code: Tensor, size: int) -> Tensor:
        return resize(at_least_float32(self.layers(code)).view(len(code), 3, self.side, self.side), size)


def _block(before: int, after: int, kernel: int) -> tuple[nn.Module, ...]:
    conv = nn.Conv2d(before, after, kernel, padding=kernel // 2, bias=False)
    return conv, nn.GroupNorm(GROUPS, after), nn.ReLU(inplace=True)


def at_least_float32(x: Tensor) -> Tensor:
    """In float32 where it was in less; float64 stays."""
    return x if x.dtype == torch.float64 else x.float()


def weighted_error(prediction: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """Mean over images of each image's weighted mean squared error; a scalar, float32.

    prediction, target (N, C, H, W); weight (N, 1, H, W) ≥ 0. Divided by the image's own sum of weights: the
    same constant error gives the same loss however much is weighted. An image without weight counts as 0.
    """
    error = (at_least_float32(prediction) - at_least_float32(target)).square().mean(1, keepdim=True)
    total = weight.sum((1, 2, 3))
    per_image = (error * weight).sum((1, 2, 3)) / torch.where(total > 0, total, 1.0)
    return per_image.mean()


def plain_error(painted: Tensor, images: Tensor) -> Tensor:
    """``weighted_error`` with the same weight everywhere."""
    return weighted_error(painted, images, torch.ones_like(images[:, :1]))


def mean_of_others(images: Tensor) -> Tensor:
    """(N, C, H, W): for each image the mean of the others in the batch, which tells nothing of it; of one alone, its
    mean colour."""
    if len(images) == 1:
        return images.mean((2, 3), keepdim=True).expand_as(images)
    return (images.sum(0, keepdim=True) - images) / (len(images) - 1)


def mean_image_error(images: Tensor) -> float:
    """``plain_error`` of ``mean_of_others``: what is left of a code that carries nothing."""
    return float(plain_error(mean_of_others(images), images))


def is_grey(images: Tensor) -> Tensor:
    """(N, 1, 1, 1) bool: whether the three channels of an image (N, 3, H, W) in [0, 1] are equal."""
    return (images - images[:, :1]).abs().amax((1, 2, 3), keepdim=True) < 1e-4


def squared_error(backbone: Backbone, prediction: Tensor, images: Tensor, weight: Tensor) -> Tensor:
    """``weighted_error`` in [0, 1] colours of a ``prediction`` in normalised ones: what a person would see."""
    return weighted_error(denormalise(backbone, prediction), images, weight)


def denormalise(backbone: Backbone, x: Tensor) -> Tensor:
    """Normalised colours back to [0, 1], (N, 3, H, W)."""
    return (x * backbone.get_buffer("std") + backbone.get_buffer("mean")).clamp(0, 1)
