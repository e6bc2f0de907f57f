"""Sparse autoencoder: an image as the sum of a few of many learned parts (Olshausen & Field 1996; Ng 2011, CS294A).

The code may have more numbers than it would take to copy the image; a penalty keeps most of them at zero.
``l1``: the sum of the activations of each image (ReLU). The parts have length 1, so that a smaller code with larger
parts, which would lower the penalty and change nothing, is not to be had.
``kl``: each unit's mean activation over the batch (sigmoid) is drawn to ``target``: the mean over units
of KL(target ‖ mean activation). The activation's mean is over all processes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretext.decoder import denormalise, feature_side, mean_image_error, plain_error, resize
from pretext.task import Batch, PretextTask, Recipe
from unlabel import distributed
from unlabel.backbone import Backbone
from unlabel.errors import UserError

__all__ = ["Sparse", "bernoulli_kl", "sparseness"]


@dataclass(frozen=True)
class Config:
    units: int = 512
    """Numbers in the code: parts that an image is made of."""
    penalty: Literal["l1", "kl"] = "l1"
    """On each image's activations, or on each unit's mean activation."""
    weight: float = 0.5
    """Of the penalty."""
    target: float = 0.05
    """Mean activation of a unit (kl)."""


def bernoulli_kl(target: float, mean: Tensor) -> Tensor:
    """KL(Bernoulli(target) ‖ Bernoulli(mean)) in nats, elementwise; ``mean`` in (0, 1)."""
    mean = mean.clamp(1e-6, 1 - 1e-6)
    rho = torch.as_tensor(target, dtype=mean.dtype, device=mean.device)
    return rho * (rho / mean).log() + (1 - rho) * ((1 - rho) / (1 - mean)).log()


def sparseness(activations: Tensor, dim: int) -> Tensor:
    """0 where all are alike, 1 where one is not zero (Vinje & Gallant 2000), along ``dim`` of activations ≥ 0.

    Along the units it is an image's population sparseness, along the images a unit's lifetime sparseness. All zero: 0.
    """
    n = activations.shape[dim]
    square = activations.square().mean(dim)
    ratio = activations.mean(dim).square() / torch.where(square > 0, square, 1.0)
    return torch.where(square > 0, (1 - ratio) / (1 - 1 / n), 0.0)


class Parts(nn.Module):
    """Codes (N, units) to images (N, 3, size, size): each number times its part, and a mean image."""

    def __init__(self, units: int, side: int, unit_length: bool) -> None:
        super().__init__()
        self.side, self.unit_length = side, unit_length
        self.weight = nn.Parameter(torch.randn(units, 3 * side**2) / side)
        self.mean = nn.Parameter(torch.zeros(3 * side**2))

    def forward(self, code: Tensor, size: int) -> Tensor:
        parts = F.normalize(self.weight, dim=1) if self.unit_length else self.weight
        return resize((code @ parts + self.mean).float().view(len(code), 3, self.side, self.side), size)


class Sparse(PretextTask):
    """``error``: mean squared error over all pixels, in [0, 1] colours. ``population``: mean sparseness of the images'
    codes; ``lifetime``: of the units' activations over the batch; both from 0 to 1."""

    Config = Config
    metrics = {"error": "min", "population": "max", "lifetime": "max"}  # noqa: RUF012
    recipe = Recipe(optimizer="adamw", lr=1e-3, weight_decay=0.0, batch_size=128)
    config: Config

    def __init__(self, backbone: Backbone, config: Config) -> None:
        super().__init__(backbone, config)
        if config.units < 2:
            raise UserError(f"--sparse.units {config.units}: at least two")
        if config.penalty not in ("l1", "kl"):
            raise UserError(f"unknown --sparse.penalty {config.penalty!r}: l1 or kl")
        if config.weight < 0 or not 0 < config.target < 1:
            raise UserError("--sparse.weight must not be negative, and --sparse.target lie between 0 and 1")
        self.side = feature_side(backbone)
        self.into = nn.Linear(backbone.channels * self.side**2, config.units)
        self.parts = Parts(config.units, backbone.spec.image_size, unit_length=config.penalty == "l1")

    def encode(self, images: Tensor) -> Tensor:
        """(N, units) float32 ≥ 0."""
        last = self.backbone(images.contiguous(memory_format=torch.channels_last)).last
        z = self.into(resize(last, self.side).flatten(1)).float()
        return z.relu() if self.config.penalty == "l1" else z.sigmoid()

    @torch.no_grad()
    def to_code(self, images: Tensor) -> Tensor:
        return self.encode(images)

    @torch.no_grad()
    def from_code(self, code: Tensor, size: int) -> Tensor:
        return denormalise(self.backbone, self.parts(code, size))

    def penalty(self, code: Tensor, values: int) -> Tensor:
        """l1: the mean over images of an image's sum, per number of the image (``values``), as the error is.

        kl: the mean over units.
        """
        if self.config.penalty == "l1":
            return code.sum(1).mean() / values
        return bernoulli_kl(self.config.target, distributed.mean(code.mean(0))).mean()

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        images = batch.images
        code = self.encode(images)
        painted = self.parts(code, images.shape[-1])
        loss = plain_error(painted, self.backbone.normalise(images))
        loss = loss + self.config.weight * self.penalty(code, images[0].numel())
        code = code.detach()
        return {
            "loss": loss,
            "error": plain_error(denormalise(self.backbone, painted.detach()), images),
            "population": sparseness(code, 1).mean(),
            "lifetime": sparseness(code, 0).mean() if len(code) > 1 else code.new_zeros(()),
        }

    def trivial(self, batch: Batch) -> dict[str, float]:
        """The mean image of the batch for every image, from a code that is the same everywhere."""
        return {"error": mean_image_error(batch.images), "population": 0.0, "lifetime": 0.0}

    @torch.no_grad()
    def show(self, batch: Batch) -> dict[str, Tensor]:
        painted = self.parts(self.encode(batch.images), batch.images.shape[-1])
        return {"input": batch.images, "target": batch.images, "prediction": denormalise(self.backbone, painted)}
