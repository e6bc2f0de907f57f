"""Contractive autoencoder (Rifai et al. 2011, https://icml.cc/2011/papers/455_icmlpaper.pdf): a code that hardly moves.

An autoencoder whose loss also has the squared Frobenius norm of the Jacobian of the code (equation 5 there): what can
change in an image without leaving the data should move the code, and nothing else. A smaller code and a larger decoder
would shrink that norm and change nothing; so each code is brought to mean 0 and variance 1 over its numbers first.

The norm is exact with one backward pass per number of the code, or estimated without bias by random projections:
the mean of |Jᵀv|² over standard normal v is the squared norm of J (Hutchinson 1990).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from pretext import autoencoder
from pretext.autoencoder import Autoencoder
from pretext.task import Batch
from unlabel.backbone import Backbone
from unlabel.batchnorm import frozen_statistics
from unlabel.draws import Draws
from unlabel.errors import UserError

__all__ = ["Contractive", "squared_jacobian"]


@dataclass(frozen=True)
class Config(autoencoder.Config):
    penalty: float = 0.1
    """Weight of the squared norm of the Jacobian, per number of the code."""
    projections: int = 1
    """Random projections that estimate it; 0: exact, one backward pass for each number of the code."""


def squared_jacobian(codes: Tensor, images: Tensor, draws: Draws | None, projections: int) -> Tensor:
    """(N,): ‖∂ code / ∂ image‖² of each image, with a graph behind it.

    codes (N, K) that were computed from images (N, C, H, W), row by row. ``projections`` 0: exact.
    """
    if projections == 0:
        ways = torch.eye(codes.shape[1], device=codes.device).unsqueeze(1).expand(-1, len(codes), -1)
    else:
        assert draws is not None
        ways = draws.normal(projections, codes.shape[1]).transpose(0, 1)
    total = codes.new_zeros(len(codes))
    for way in ways:
        (slope,) = torch.autograd.grad(codes, images, way, create_graph=True)
        total = total + slope.square().flatten(1).sum(1)
    return total / max(1, projections)


class TwiceDifferentiable(TorchFunctionMode):
    """Inside, the hard sigmoid (MobileNet's) is written as the clipped line that it is: torch has no second
    derivative of its own form of it."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.hardsigmoid:
            return F.relu6(args[0] + 3) / 6
        return func(*args, **(kwargs or {}))


class Contractive(Autoencoder):
    """``error``: as the autoencoder's. ``sensitivity``: squared norm of the Jacobian in normalised colours, per number
    of the code: how much of the code white noise of variance 1 would change, to first order."""

    Config = Config
    metrics = {"error": "min", "sensitivity": "min"}  # noqa: RUF012
    compiles = False
    config: Config

    def __init__(self, backbone: Backbone, config: Config) -> None:
        super().__init__(backbone, config)
        if config.code < 2:
            raise UserError(
                f"--contractive.code {config.code}: at least two numbers, of which the code's scale is taken"
            )
        if config.penalty < 0 or config.projections < 0:
            raise UserError("--contractive.penalty and --contractive.projections must not be negative")

    def encode(self, normalised: Tensor) -> Tensor:
        return F.layer_norm(super().encode(normalised), (self.config.code,))

    def sensitivity(self, batch: Batch) -> Tensor:
        """(N,): with BatchNorm's running statistics, so that an image's code is a function of that image alone."""
        images = self.backbone.normalise(batch.images).detach().requires_grad_(True)
        # Second derivatives in full precision; and what autocast has cached was made with a graph of its own.
        with torch.enable_grad(), torch.autocast(images.device.type, enabled=False), frozen_statistics(self.backbone):
            with TwiceDifferentiable():
                codes = self.encode(images)
            draws = batch.draws.stream("contractive")
            return squared_jacobian(codes, images, draws, self.config.projections) / self.config.code

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        out, sensitivity = super().forward(batch), self.sensitivity(batch).mean()
        loss = out["loss"] + self.config.penalty * sensitivity
        return {**out, "loss": loss, "sensitivity": sensitivity.detach()}

    def trivial(self, batch: Batch) -> dict[str, float]:
        """The mean image of the batch; and a random linear code, which noise moves as much as it moves the image."""
        size = self.backbone.normalise(batch.images).square().mean((1, 2, 3))
        return {**super().trivial(batch), "sensitivity": float((1 / size).mean())}
