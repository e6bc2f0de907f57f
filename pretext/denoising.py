"""Denoising autoencoder (Vincent et al. 2008, https://doi.org/10.1145/1390156.1390294; 2010, JMLR 11).

Noise is drawn afresh at every step, and the network recovers the clean augmented view through the backbone's
last stage alone. The noise is strong by default: little noise is removed by a slight blur, which needs no
understanding of the image.

Beside noise there is damage as photos and papers suffer it (``pretext/damage.py``): a watermark, age, something in the
way. To repair pictures rather than to pretrain, ``skips`` lets every stage take part: detail survives, and less is left
for the deep stages to learn.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from pretext.damage import DAMAGES
from pretext.decoder import Decoder, Pyramid, denormalise, feature_side, is_grey, squared_error, weighted_error
from pretext.task import Batch, PretextTask, Recipe
from unlabel.backbone import Backbone
from unlabel.draws import Draws
from unlabel.errors import UserError
from unlabel.mlp import Mlp

__all__ = ["Denoising", "corrupt"]

# kind -> the levels between which each image's own is drawn by default
LEVELS = {"gaussian": (0.3, 0.5), "masking": (0.5, 0.8), "salt-and-pepper": (0.3, 0.6), "speckle": (0.5, 1.0)}
LEVELS |= {"watermark": (0.3, 0.8), "document": (0.5, 1.0), "occlusion": (0.1, 0.3)}
PER_PIXEL = ("masking", "salt-and-pepper")
SKIP_WIDTH = 32
LOCAL = (*PER_PIXEL, "watermark", "occlusion")  # these leave the other pixels as they are


@dataclass(frozen=True)
class Config:
    noise: Literal["gaussian", "masking", "salt-and-pepper", "speckle", "watermark", "document", "occlusion"] = (
        "gaussian"
    )
    """Added to each value; pixels set to black; to black or white; each value times 1 + noise; or kinds of damage."""
    level: tuple[float, ...] | None = None
    """Fixed, or two numbers to draw each image's from: standard deviation, share of the pixels, opacity, or age."""
    alpha: float = 1.0
    """Weight of an error where the image was corrupted (what leaves other pixels as they are; Vincent 2010)."""
    beta: float = 1.0
    """Weight of an error where it was not; 0 looks at the corrupted pixels alone."""
    skips: bool = False
    """Every stage helps to paint, and what is painted is added to the input: for repairing rather than pretraining."""


def corrupt(images: Tensor, kind: str, level: Tensor, draws: Draws) -> tuple[Tensor, Tensor]:
    """The noisy images (N, 3, H, W) and which pixels were touched, (N, 1, H, W) bool.

    images in [0, 1]; ``level`` (N,), where 0 leaves its image as it is, bit for bit. Gaussian and speckle
    noise is not clipped to [0, 1]: clipping would make it depend on the image and shift its mean.
    """
    if kind in DAMAGES:
        return DAMAGES[kind](images, level, draws.stream(kind))
    n, channels, height, width = images.shape
    level = level.view(n, 1, 1, 1)
    if kind in PER_PIXEL:  # one draw per pixel: all channels fall together
        u = draws.stream("where").uniform(1, height, width)
        touched = u < level
        # u is uniform below `level` there: its lower half is a fair coin.
        value = ((u < level / 2) & (kind == "salt-and-pepper")).to(images.dtype)
        return torch.where(touched, value, images), touched
    noise = draws.stream("noise").normal(channels, height, width) * level
    noisy = images + noise if kind == "gaussian" else images + images * noise
    return noisy, (level > 0).expand(n, 1, height, width)


class Denoising(PretextTask):
    """``error``: mean squared error over all pixels, in [0, 1] colours."""

    Config = Config
    metrics = {"error": "min"}  # noqa: RUF012
    recipe = Recipe(optimizer="adamw", lr=2e-3, weight_decay=0.05, batch_size=128)
    config: Config

    def __init__(self, backbone: Backbone, config: Config) -> None:
        super().__init__(backbone, config)
        if config.noise not in LEVELS:
            raise UserError(f"unknown noise {config.noise!r}: choose from {', '.join(LEVELS)}")
        levels = LEVELS[config.noise] if config.level is None else tuple(config.level)
        top = 1.0 if config.noise in PER_PIXEL or config.noise in DAMAGES else float("inf")
        if len(levels) not in (1, 2) or not 0 <= levels[0] <= levels[-1] <= top:
            most = " up to 1" if top == 1 else ""
            raise UserError(f"--denoising.level {levels}: give one number, or two in rising order, from 0{most}")
        if min(config.alpha, config.beta) < 0 or config.alpha + config.beta == 0:
            raise UserError("--denoising.alpha and --denoising.beta must not be negative, nor both 0")
        if config.alpha != config.beta and config.noise not in LOCAL:
            raise UserError(
                f"{config.noise} noise touches every pixel: --denoising.alpha and --denoising.beta "
                f"tell corrupted from clean pixels for {', '.join(LOCAL)} only"
            )
        self.low, self.high = float(levels[0]), float(levels[-1])
        self.decoder: nn.Module
        if config.skips and isinstance(backbone.model, Mlp):
            raise UserError("--denoising.skips needs a ConvNet: dense layers keep no places")
        if config.skips:
            self.decoder = Pyramid(backbone, SKIP_WIDTH)
        else:
            self.decoder = Decoder(backbone.channels, feature_side(backbone), backbone.spec.image_size)

    def noisy(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """``corrupt`` at this batch's draws.

        Grey images stay grey: the mean of three channels, each with noise of its own, would have little of it. What is
        to be repaired (``skips``) is a file, which holds nothing below 0 or above 1.
        """
        draws = batch.draws.stream("denoising")
        level = self.low + (self.high - self.low) * draws.stream("level").uniform()
        noisy, touched = corrupt(batch.images, self.config.noise, level, draws)
        if self.config.noise in ("gaussian", "speckle"):
            noisy = torch.where(is_grey(batch.images), noisy[:, :1], noisy)
        return (noisy.clamp(0, 1) if self.config.skips else noisy), touched

    def predict(self, noisy: Tensor) -> Tensor:
        """The recovered image (N, 3, H, W), in normalised colours."""
        features = self.backbone(noisy.contiguous(memory_format=torch.channels_last))
        if self.config.skips:
            return self.backbone.normalise(noisy) + self.decoder(features.stages.values(), noisy.shape[-1])
        return self.decoder(features.last, noisy.shape[-1])

    @torch.no_grad()
    def restore(self, images: Tensor, hidden: Tensor | None) -> Tensor:
        return denormalise(self.backbone, self.predict(images))

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        noisy, touched = self.noisy(batch)
        prediction = self.predict(noisy)
        weight = torch.where(touched, self.config.alpha, self.config.beta)
        loss = weighted_error(prediction, self.backbone.normalise(batch.images), weight)
        error = squared_error(self.backbone, prediction.detach(), batch.images, torch.ones_like(weight))
        return {"loss": loss, "error": error}

    def trivial(self, batch: Batch) -> dict[str, float]:
        """The better of: the noisy image itself (clipped to [0, 1]), and each clean image's mean colour."""
        images = batch.images
        identity = self.noisy(batch)[0].clamp(0, 1)
        flat = images.mean((2, 3), keepdim=True).expand_as(images)
        everywhere = torch.ones_like(images[:, :1])
        return {"error": min(float(weighted_error(guess, images, everywhere)) for guess in (identity, flat))}

    @torch.no_grad()
    def show(self, batch: Batch) -> dict[str, Tensor]:
        noisy, _ = self.noisy(batch)
        prediction = denormalise(self.backbone, self.predict(noisy))
        return {"input": noisy.clamp(0, 1), "target": batch.images, "prediction": prediction}
