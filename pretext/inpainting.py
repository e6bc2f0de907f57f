"""Inpainting: the context encoder (Pathak et al. 2016, https://arxiv.org/abs/1604.07379).

Part of each image is hidden, and the network paints it from what is left. Backbone, then a channel-wise fully
connected layer that carries information across the image, then a decoder without skip connections. The loss is
the squared error on the hidden part (§3.2 equation 1) and, weighted more, on a band of visible pixels around it, so
that the painted part joins its surroundings. With ``adversarial`` above 0 a discriminator, which sees the hidden part
alone, learns to tell what was painted from what was there, and the painter to deceive it (equations 2 and 3): of all
that the squared error cannot tell apart, which it answers with a blur, one is chosen.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretext.decoder import Decoder, denormalise, feature_side, resize, squared_error, weighted_error
from pretext.task import Batch, PretextTask, Recipe
from unlabel.backbone import Backbone
from unlabel.draws import Draws
from unlabel.errors import UserError

__all__ = ["ChannelWise", "Inpainting", "band_around", "draw_hidden", "smooth_field"]

MASKS = ("center", "blocks", "region", "half")
BLOCKS = 5  # squares per image of mask kind `blocks`
NODES = 9  # per axis, of the random field behind `region`
BLOB = 0.12  # its correlation length as a share of the image's side


@dataclass(frozen=True)
class Config:
    mask: Literal["center", "blocks", "region", "half"] = "region"
    """What is hidden: a central square, a few random squares, random smooth shapes, or one half of the image."""
    share: float = 0.25
    """Share of the image that is hidden (blocks: at most; half: always 0.5)."""
    overlap: float = 4.0
    """Width of the visible band that is painted too, in pixels at an image size of 64; 0 turns it off."""
    overlap_weight: float = 10.0
    """Weight of an error in that band; an error in the hidden part weighs 1."""
    adversarial: float = 0.0
    """Share of the adversarial loss; the squared error gets the rest. The paper has 0.001; 0 trains without."""


def draw_hidden(kind: str, share: float, size: int, draws: Draws) -> Tensor:
    """(N, 1, size, size) bool, True where hidden; fresh for every (seed, epoch, index), never all or nothing."""
    n = len(draws)
    at = torch.arange(size, device=draws.device)
    if kind == "center":
        side = _side(size, share)
        start = (size - side) // 2
        line = ((at >= start) & (at < start + side)).expand(n, size)
        hidden = line[:, :, None] & line[:, None, :]
    elif kind == "blocks":  # may overlap, so they cover up to `share`, as in the paper
        side = _side(size, share / BLOCKS)
        corner = draws.stream("blocks").integers(size - side + 1, BLOCKS, 2, 1)
        line = (at >= corner) & (at < corner + side)  # (N, BLOCKS, 2, size)
        hidden = (line[:, :, 0, :, None] & line[:, :, 1, None, :]).any(1)
    elif kind == "half":
        side = draws.stream("half").integers(4).view(n, 1, 1)
        first = at < size / 2
        rows, columns = first.view(1, -1, 1), first.view(1, 1, -1)
        hidden = torch.where(side < 2, rows, columns) ^ (side % 2 == 1)  # top, bottom, left, right
    else:
        field = smooth_field(size, draws.stream("region")).flatten(1)
        count = min(max(1, round(share * size**2)), size**2 - 1)
        threshold = field.sort(dim=1).values[:, count - 1, None]
        hidden = (field <= threshold).view(n, size, size)
    return hidden[:, None]


def _side(size: int, share: float) -> int:
    return min(max(1, round(size * math.sqrt(share))), size - 1)


def smooth_field(size: int, draws: Draws) -> Tensor:
    """(N, size, size), smooth, and standard normal at every pixel, so that none is hidden more than others."""
    centres = torch.linspace(-0.2, 1.2, NODES, device=draws.device)  # past the border: no edge effect
    at = (torch.arange(size, device=draws.device) + 0.5) / size
    basis = torch.exp(-((at[:, None] - centres) ** 2) / (2 * BLOB**2))
    basis = F.normalize(basis, dim=1)  # rows of unit length keep the variance at 1
    with torch.autocast(draws.device.type, enabled=False):  # bf16 would tie pixels at the threshold
        return basis @ draws.normal(NODES, NODES) @ basis.T


def band_around(hidden: Tensor, width: int) -> Tensor:
    """(N, 1, H, W) bool: the visible pixels at most ``width`` rows and columns away from a hidden one."""
    if width == 0:
        return torch.zeros_like(hidden)
    near = hidden.float()
    for kernel in ((2 * width + 1, 1), (1, 2 * width + 1)):  # a square is separable
        near = F.max_pool2d(near, kernel, stride=1, padding=(kernel[0] // 2, kernel[1] // 2))
    return (near > 0) & ~hidden


class ChannelWise(nn.Module):
    """The channel-wise fully connected layer (§3.1): each channel's map to itself, C·(HW)² weights.

    (N, C, side, side) to the same shape. Nothing crosses channels: the decoder's 1×1 convolution does that.
    """

    def __init__(self, channels: int, side: int) -> None:
        super().__init__()
        self.side = side
        self.weight = nn.Parameter(torch.randn(channels, side**2, side**2) / side)  # keeps the variance

    def forward(self, x: Tensor) -> Tensor:
        maps = x.flatten(2).transpose(0, 1)  # (C, N, HW): one matrix product per channel
        return torch.bmm(maps, self.weight.to(maps.dtype)).transpose(0, 1).reshape(x.shape)


class Discriminator(nn.Module):
    """Images (N, 3, H, W), zero but for what was hidden, to logits (N,): was it there (> 0), or painted?"""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        widths = [3, width, 2 * width, 4 * width]
        layers: list[nn.Module] = []
        for before, after in pairwise(widths):
            layers += [nn.Conv2d(before, after, 4, stride=2, padding=1), nn.GroupNorm(8, after), nn.LeakyReLU(0.2)]
        self.layers = nn.Sequential(*layers, nn.Conv2d(widths[-1], 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images).float().mean((1, 2, 3))


class Inpainting(PretextTask):
    """``error``: mean squared error on the hidden pixels only, in [0, 1] colours.

    ``told``: with a discriminator, the share of painted and true parts that it recognises; 0.5 is a perfect deception.
    """

    Config = Config
    metrics = {"error": "min"}  # noqa: RUF012
    recipe = Recipe(optimizer="adamw", lr=2e-3, weight_decay=0.05, batch_size=128)
    config: Config

    def __init__(self, backbone: Backbone, config: Config) -> None:
        super().__init__(backbone, config)
        if config.mask not in MASKS:
            raise UserError(f"unknown mask {config.mask!r}: choose from {', '.join(MASKS)}")
        if not 0 < config.share < 1:
            raise UserError(f"--inpainting.share is {config.share}: it must lie between 0 and 1")
        if config.overlap < 0 or config.overlap_weight < 0:
            raise UserError("--inpainting.overlap and --inpainting.overlap-weight must not be negative")
        side = feature_side(backbone)
        self.middle = ChannelWise(backbone.channels, side)
        self.decoder = Decoder(backbone.channels, side, backbone.spec.image_size)
        if not 0 <= config.adversarial < 1:
            raise UserError(f"--inpainting.adversarial {config.adversarial}: a share, from 0 to below 1")
        self.discriminator = Discriminator() if config.adversarial else None
        if self.discriminator is not None:
            self.__dict__["metrics"] = {**type(self).metrics, "told": "min"}  # this task has one more

    def param_groups(self) -> list[dict[str, Any]]:
        """The discriminator learns more slowly than the painter, as in the paper, and without weight decay."""
        if self.discriminator is None:
            return super().param_groups()
        judge = list(self.discriminator.parameters())
        ids = {id(p) for p in judge}
        own = [p for p in self.parameters() if id(p) not in ids]
        return [
            {"params": own},
            {"params": judge, "optimizer": "adamw", "lr_scale": 0.1, "betas": (0.5, 0.999), "weight_decay": 0.0},
        ]

    def hidden(self, batch: Batch) -> Tensor:
        """(N, 1, H, W) bool: what this batch's draws hide."""
        size = batch.images.shape[-1]
        return draw_hidden(self.config.mask, self.config.share, size, batch.draws.stream("inpainting"))

    def predict(self, images: Tensor, hidden: Tensor) -> Tensor:
        """The painted image (N, 3, H, W), in normalised colours; hidden pixels of ``images`` have no influence."""
        # Normalise, then fill: 0 is the mean colour. Filling first would make the hole a colour of its own.
        seen = self.backbone.normalise(images).masked_fill(hidden, 0)
        features = self.backbone.forward_normalised(seen.contiguous(memory_format=torch.channels_last)).last
        # The layer's size is fixed; where images are smaller than the backbone was made for, stretch the map.
        return self.decoder(self.middle(resize(features, self.middle.side)), images.shape[-1])

    @torch.no_grad()
    def restore(self, images: Tensor, hidden: Tensor | None) -> Tensor:
        """What is hidden is painted, the rest stays as it is."""
        assert hidden is not None
        return torch.where(hidden, denormalise(self.backbone, self.predict(images, hidden)), images)

    def weight(self, hidden: Tensor) -> Tensor:
        """(N, 1, H, W) float32: 1 where hidden, ``overlap_weight`` in the band, exactly 0 elsewhere."""
        width = round(self.config.overlap * hidden.shape[-1] / 64)
        return hidden.float() + self.config.overlap_weight * band_around(hidden, width).float()

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        hidden = self.hidden(batch)
        prediction = self.predict(batch.images, hidden)
        target = self.backbone.normalise(batch.images)
        loss = weighted_error(prediction, target, self.weight(hidden))
        error = squared_error(self.backbone, prediction.detach(), batch.images, hidden.float())
        if self.discriminator is None:
            return {"loss": loss, "error": error}
        deception, judgement, told = self.play(prediction.masked_fill(~hidden, 0), target.masked_fill(~hidden, 0))
        share = self.config.adversarial
        # The judgement's weight changes nothing for Adam; a small one keeps it out of the clipped gradient norm.
        return {"loss": (1 - share) * loss + share * (deception + judgement), "error": error, "told": told}

    def play(self, painted: Tensor, there: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The painter's loss, the discriminator's, and how often that is right. Neither moves the other's weights."""
        judge = self.discriminator
        assert judge is not None
        still = {k: p.detach() for k, p in judge.named_parameters()}
        deception = F.softplus(-torch.func.functional_call(judge, still, (painted,))).mean()
        false, true = judge(painted.detach()), judge(there)
        judgement = (F.softplus(false) + F.softplus(-true)).mean()
        told = ((false.detach() < 0).float() + (true.detach() > 0).float()).mean() / 2
        return deception, judgement, told

    def trivial(self, batch: Batch) -> dict[str, float]:
        """Paints every hidden pixel in the mean colour of its image's visible pixels."""
        hidden = self.hidden(batch)
        visible = (~hidden).float()
        colour = (batch.images * visible).sum((2, 3), keepdim=True) / visible.sum((2, 3), keepdim=True)
        error = weighted_error(colour.expand_as(batch.images), batch.images, hidden.float())
        return {"error": float(error)} | ({"told": 1.0} if self.discriminator is not None else {})

    @torch.no_grad()
    def show(self, batch: Batch) -> dict[str, Tensor]:
        """The input with its hidden part in the mean colour; the prediction pasted into the visible part."""
        hidden, images = self.hidden(batch), batch.images
        painted = denormalise(self.backbone, self.predict(images, hidden))
        grey = self.backbone.get_buffer("mean")
        return {
            "input": torch.where(hidden, grey, images),
            "target": images,
            "prediction": torch.where(hidden, painted, images),
        }
