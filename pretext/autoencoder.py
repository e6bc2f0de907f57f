"""Autoencoder (Hinton & Salakhutdinov 2006, https://doi.org/10.1126/science.1127647): the image through a small code.

Undercomplete: the code has far fewer numbers than the image has pixels, so that copying is not possible.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from pretext.code import Code, bernoulli_divergence
from pretext.decoder import GROUPS, denormalise, mean_image_error, plain_error
from pretext.task import Batch, PretextTask, Recipe
from unlabel.backbone import Backbone
from unlabel.errors import UserError

__all__ = ["Autoencoder"]


@dataclass(frozen=True)
class Config:
    code: int = 128
    """Numbers in the code."""
    loss: Literal["bce", "mse"] = "bce"
    """Binary cross-entropy of colours in [0, 1], or squared error of normalised colours."""
    channels: int = 16
    """Of the decoder's finest maps behind a ConvNet; coarser ones have up to four times as many. A multiple of 8."""


class Autoencoder(PretextTask):
    """``error``: mean squared error over all pixels, in [0, 1] colours."""

    Config = Config
    metrics = {"error": "min"}  # noqa: RUF012
    recipe = Recipe(optimizer="adamw", lr=2e-3, weight_decay=0.05, batch_size=128)
    config: Config

    def __init__(self, backbone: Backbone, config: Config) -> None:
        super().__init__(backbone, config)
        name = type(self).__name__.lower()
        if config.code < 1:
            raise UserError(f"--{name}.code {config.code}: at least one number")
        if config.loss not in ("bce", "mse"):
            raise UserError(f"unknown --{name}.loss {config.loss!r}: bce or mse")
        if config.channels < GROUPS or config.channels % GROUPS:
            raise UserError(f"--{name}.channels {config.channels}: a multiple of {GROUPS}")
        self.code = Code(backbone, config.code, fine=config.channels)

    def encode(self, normalised: Tensor) -> Tensor:
        """Images (N, 3, H, W) in normalised colours to codes (N, code) float32."""
        features = self.backbone.forward_normalised(normalised.contiguous(memory_format=torch.channels_last))
        return self.code.encode(features.last)

    def predict(self, images: Tensor) -> Tensor:
        """(N, 3, H, W): logits of colours (bce), or normalised colours (mse)."""
        return self.code.decode(self.encode(self.backbone.normalise(images)), images.shape[-1])

    def paint(self, predicted: Tensor) -> Tensor:
        """What ``predict`` gives, as colours in [0, 1]."""
        return predicted.sigmoid() if self.config.loss == "bce" else denormalise(self.backbone, predicted)

    @torch.no_grad()
    def to_code(self, images: Tensor) -> Tensor:
        return self.encode(self.backbone.normalise(images))

    @torch.no_grad()
    def from_code(self, code: Tensor, size: int) -> Tensor:
        return self.paint(self.code.decode(code, size))

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        predicted = self.predict(batch.images)
        if self.config.loss == "bce":
            loss = bernoulli_divergence(predicted, batch.images).mean()
        else:
            loss = plain_error(predicted, self.backbone.normalise(batch.images))
        error = plain_error(self.paint(predicted.detach()), batch.images)
        return {"loss": loss, "error": error}

    def trivial(self, batch: Batch) -> dict[str, float]:
        """The mean image of the batch, for every image: what a code that carries nothing could at best be turned to."""
        return {"error": mean_image_error(batch.images)}

    @torch.no_grad()
    def show(self, batch: Batch) -> dict[str, Tensor]:
        prediction = self.paint(self.predict(batch.images))
        return {"input": batch.images, "target": batch.images, "prediction": prediction}
