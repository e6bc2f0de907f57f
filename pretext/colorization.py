"""Colorization (Zhang et al. 2016, https://arxiv.org/abs/1603.08511): predict the colour from the lightness.

The backbone sees the lightness L of CIE Lab as a grey image; a decoder predicts the colour, the two numbers a and b, at
a quarter of the image's side: photos store their colour at half size or less. As in the paper it is a choice among
313 colours, softly encoded and rebalanced, so that rare colours count: a mean of plausible colours would be grey.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from pretext.decoder import Decoder, feature_side
from pretext.task import Batch, PretextTask, Recipe
from unlabel import distributed
from unlabel.backbone import Backbone
from unlabel.errors import UserError

__all__ = ["Colorization", "ab_bins", "from_lab", "rebalancing", "soft_encoding", "to_lab"]

BINS, SPACING = 313, 10.0  # colours on a grid of a and b, as in the paper
NEIGHBOURS, SIGMA = 5, 5.0  # of the soft encoding
TEMPERATURE = 0.38  # of the annealed mean (paper, equation 5)
RANGE = 110.0  # regression predicts a and b in units of this
HUBER_SCALE, HUBER_DELTA = 10.0, 0.1

# Linear sRGB to CIE XYZ under D65 (IEC 61966-2-1). White is each row's sum, so that greys have a = b = 0.
_XYZ = ((0.4124564, 0.3575761, 0.1804375), (0.2126729, 0.7151522, 0.0721750), (0.0193339, 0.1191920, 0.9503041))
_DELTA = 6 / 29


@dataclass(frozen=True)
class Config:
    loss: Literal["classes", "regression"] = "classes"
    """313 colours with cross-entropy, or a and b with the Huber loss."""
    rebalance: float = 0.5
    """1 - λ of the paper's equation 4: 0 counts every pixel alike, 1 by the inverse frequency of its colour."""


def to_lab(rgb: Tensor) -> Tensor:
    """sRGB (…, 3, H, W) in [0, 1] to CIE Lab: L in [0, 100], a and b within about ± 110."""
    linear = torch.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055).clamp(min=0) ** 2.4)
    matrix = torch.tensor(_XYZ, dtype=rgb.dtype, device=rgb.device)
    xyz = torch.einsum("ij,...jhw->...ihw", matrix / matrix.sum(1, keepdim=True), linear)
    f = torch.where(xyz > _DELTA**3, xyz.clamp(min=1e-9) ** (1 / 3), xyz / (3 * _DELTA**2) + 4 / 29)
    x, y, z = f.unbind(-3)
    return torch.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], -3)


def from_lab(lab: Tensor) -> Tensor:
    """The inverse of ``to_lab``, clipped to [0, 1]: not every Lab triple is a colour of a screen."""
    lightness, a, b = lab.unbind(-3)
    y = (lightness + 16) / 116
    f = torch.stack([y + a / 500, y, y - b / 200], -3)
    xyz = torch.where(f > _DELTA, f**3, 3 * _DELTA**2 * (f - 4 / 29))
    matrix = torch.tensor(_XYZ, dtype=torch.float64)
    inverse = torch.linalg.inv(matrix / matrix.sum(1, keepdim=True)).to(lab)
    linear = torch.einsum("ij,...jhw->...ihw", inverse, xyz).clamp(0, 1)
    return torch.where(linear <= 0.0031308, linear * 12.92, 1.055 * linear.clamp(min=1e-9) ** (1 / 2.4) - 0.055)


@functools.lru_cache
def ab_bins() -> Tensor:
    """(313, 2) float32: the points of the grid of a and b that lie nearest to the colours of sRGB.

    The paper's 313 came with its code; this is the same number of points of the same grid around the same colours.
    """
    levels = torch.linspace(0, 1, 24, dtype=torch.float64)
    rgb = torch.cartesian_prod(levels, levels, levels).T.reshape(3, -1, 1)
    colours = to_lab(rgb)[1:, :, 0].T / SPACING
    side = torch.arange(-13, 14, dtype=torch.float64)
    grid = torch.cartesian_prod(side, side)
    distance = torch.cat([torch.cdist(part, colours).amin(1) for part in grid.split(128)])
    # Rounded, so that ties break by position and not by the last bit.
    nearest = torch.argsort((distance * 1e6).round(), stable=True)[:BINS]
    return (grid[nearest.sort().values] * SPACING).float()


def soft_encoding(ab: Tensor, bins: Tensor) -> tuple[Tensor, Tensor]:
    """ab (M, 2) to its five nearest bins (M, 5), and their weights (M, 5), Gaussian with σ = 5, summing to one."""
    distance, index = torch.cdist(ab, bins).topk(NEIGHBOURS, largest=False)
    weight = torch.exp(-(distance**2) / (2 * SIGMA**2))
    return index, weight / weight.sum(1, keepdim=True)


def rebalancing(frequency: Tensor, share: float) -> Tensor:
    """(Q,) weights ∝ 1 / (share · p + (1 - share) / Q), of mean one over the frequencies p (Q,) (equation 4)."""
    uniform = 1 / len(frequency)
    weight = 1 / (share * frequency + (1 - share) * uniform)
    return weight / (frequency * weight).sum()


class Colorization(PretextTask):
    """``colour_loss``: rebalanced cross-entropy in nats, or the Huber loss.

    ``ab_error``: root mean squared distance between the true colour and the annealed mean, in units of a and b.
    """

    Config = Config
    metrics = {"colour_loss": "min", "ab_error": "min"}  # noqa: RUF012
    recipe = Recipe(optimizer="adamw", lr=2e-3, weight_decay=0.05, batch_size=128)
    sees = "grey"
    config: Config

    def __init__(self, backbone: Backbone, config: Config) -> None:
        super().__init__(backbone, config)
        if config.loss not in ("classes", "regression"):
            raise UserError(f"unknown --colorization.loss {config.loss!r}: classes or regression")
        if not 0 <= config.rebalance < 1:
            raise UserError(f"--colorization.rebalance {config.rebalance}: from 0 to below 1")
        self.classes = config.loss == "classes"
        self.register_buffer("bins", ab_bins(), persistent=False)
        # How often each colour was there, over all steps so far; smooth, since the encoding is.
        self.register_buffer("frequency", torch.full((BINS,), 1 / BINS))
        self.register_buffer("steps", torch.zeros(()))
        side, size = feature_side(backbone), backbone.spec.image_size
        # The decoder stops at half of the size that it is told: here a quarter of the image's.
        self.decoder = Decoder(
            backbone.channels, side, max(2 * side, size // 2), out=BINS if self.classes else 2, full=False
        )

    def split(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Lightness (N, 1, H, W) in [0, 100] and colour (N, 2, h, w) at a quarter of the side."""
        side = max(1, images.shape[-1] // 4)
        with torch.autocast(images.device.type, enabled=False):  # bf16 has three digits: too few for colours
            lab = to_lab(images.float())
            return lab[:, :1], F.interpolate(lab[:, 1:], size=(side, side), mode="area")

    def scores(self, lightness: Tensor, side: int) -> Tensor:
        """(N, 313 or 2, side, side) float32, from the lightness as a grey image."""
        grey = (lightness / 100).expand(-1, 3, -1, -1).contiguous(memory_format=torch.channels_last)
        return self.decoder(self.backbone(grey).last, side)

    def colour(self, scores: Tensor) -> Tensor:
        """(N, 2, h, w): the annealed mean over the colours (equation 5), or what was regressed."""
        if not self.classes:
            return scores * RANGE
        return torch.einsum("nqhw,qc->nchw", (scores / TEMPERATURE).softmax(1), self.get_buffer("bins"))

    def _encode(self, ab: Tensor) -> tuple[Tensor, Tensor]:
        """ab (N, 2, h, w) to the nearest bins of each pixel and their shares, (N·h·w, 5) each."""
        return soft_encoding(ab.permute(0, 2, 3, 1).reshape(-1, 2), self.get_buffer("bins"))

    def _weight(self, index: Tensor, share: Tensor) -> Tensor:
        """(N·h·w,): by the frequency of each pixel's colours, by their shares: so that the mean is exactly one."""
        return (share * rebalancing(self.get_buffer("frequency"), self.config.rebalance)[index]).sum(1)

    @torch.no_grad()
    def _count(self, index: Tensor, share: Tensor) -> None:
        """Frequencies: the mean over the steps so far, later over the last thousand or so."""
        seen = torch.zeros(BINS, device=share.device).index_add_(0, index.flatten(), share.flatten()) / len(index)
        steps, frequency = self.get_buffer("steps"), self.get_buffer("frequency")
        steps += 1
        frequency.lerp_(distributed.mean(seen), float(1 / steps.clamp(max=1000)))

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        lightness, ab = self.split(batch.images)
        scores = self.scores(lightness, ab.shape[-1])
        with torch.autocast(scores.device.type, enabled=False):
            if self.classes:
                index, share = self._encode(ab)
                if self.training:
                    self._count(index, share)
                log_p = scores.log_softmax(1).permute(0, 2, 3, 1).reshape(-1, BINS)
                loss = -(self._weight(index, share) * (share * log_p.gather(1, index)).sum(1)).mean()
            else:
                loss = HUBER_SCALE * F.huber_loss(scores, ab / RANGE, delta=HUBER_DELTA)
            error = (self.colour(scores.detach()) - ab).square().sum(1).mean().sqrt()
        return {"loss": loss, "colour_loss": loss.detach(), "ab_error": error}

    def trivial(self, batch: Batch) -> dict[str, float]:
        """One colour, or one distribution of colours, for all pixels of all images: the best that there is."""
        _, ab = self.split(batch.images)
        mean = ab.mean((0, 2, 3), keepdim=True).expand_as(ab)
        if self.classes:
            index, share = self._encode(ab)
            weighted = share * self._weight(index, share)[:, None]
            mass = torch.zeros(BINS, device=ab.device).index_add_(0, index.flatten(), weighted.flatten())
            best = (mass / mass.sum()).clamp(min=1e-12).log()
            loss = -(weighted * best[index]).sum(1).mean()
        else:
            loss = HUBER_SCALE * F.huber_loss(mean / RANGE, ab / RANGE, delta=HUBER_DELTA)
        return {"colour_loss": float(loss), "ab_error": float((ab - mean).square().sum(1).mean().sqrt())}

    @torch.no_grad()
    def restore(self, images: Tensor, hidden: Tensor | None) -> Tensor:
        """Colours for the lightness of each image; whatever colour it had is not looked at."""
        lightness, ab = self.split(images)
        colour = self.colour(self.scores(lightness, ab.shape[-1]))
        return from_lab(torch.cat([lightness, F.interpolate(colour, size=images.shape[-2:], mode="bilinear")], 1))

    @torch.no_grad()
    def show(self, batch: Batch) -> dict[str, Tensor]:
        lightness = self.split(batch.images)[0]
        grey = (lightness / 100).expand(-1, 3, -1, -1)
        return {"input": grey, "target": batch.images, "prediction": self.restore(batch.images, None)}
