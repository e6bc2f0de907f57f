"""Variational autoencoder (Kingma & Welling 2014, https://arxiv.org/abs/1312.6114).

The backbone gives each image a normal distribution over codes, of diagonal variance; a code drawn from it is painted.
The loss is the negative evidence lower bound: what the painting misses, summed over pixels, and the divergence of the
distribution from the standard normal one, summed over the code, then averaged over images (equation 10, one draw).
β weighs the divergence (Higgins et al. 2017) and rises from 0 at the start: at full weight from the beginning, codes
collapse to the prior before the decoder has learned to read them (Bowman et al. 2016, https://arxiv.org/abs/1511.06349).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from pretext.code import Code, bernoulli_divergence
from pretext.decoder import mean_image_error, mean_of_others, plain_error
from pretext.task import Batch, PretextTask, Recipe
from unlabel.backbone import Backbone
from unlabel.errors import UserError

__all__ = ["VAE", "divergence"]

DEAD = 0.01  # nats: a number of the code whose mean divergence is below carries nothing


@dataclass(frozen=True)
class Config:
    code: int = 128
    """Numbers in the code."""
    likelihood: Literal["bernoulli", "gaussian"] = "bernoulli"
    """Of a pixel, given what was painted."""
    deviation: float = 0.1
    """Standard deviation of a pixel (gaussian), in [0, 1] colours."""
    grey: bool = False
    """For grey images: a pixel is one number and not three alike, so that the bound is that of a grey image."""
    beta: float = 1.0
    """Weight of the divergence from the prior."""
    warmup: float = 0.2
    """Share of training in which beta rises from 0."""


def divergence(mean: Tensor, log_variance: Tensor) -> Tensor:
    """KL(N(mean, variance) ‖ N(0, 1)) of each number, in nats; the shape of ``mean`` (appendix B)."""
    return 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance)


class VAE(PretextTask):
    """``bound``: the loss at β = 1, in nats per image. ``error``: mean squared error, painted from the mean code.

    ``information``: divergence from the prior in nats per image; 0 is a code that has collapsed. ``alive``: the share
    of the code's numbers that carry more than 0.01 nat, over this batch.
    """

    Config = Config
    metrics = {"bound": "min", "error": "min", "information": "max", "alive": "max"}  # noqa: RUF012
    recipe = Recipe(optimizer="adamw", lr=1e-3, weight_decay=0.05, batch_size=128)
    loss_weight = 1e-4  # nats per image are thousands, other tasks' losses are about one
    prior = True
    config: Config

    def __init__(self, backbone: Backbone, config: Config) -> None:
        super().__init__(backbone, config)
        if config.code < 1:
            raise UserError(f"--vae.code {config.code}: at least one number")
        if config.likelihood not in ("bernoulli", "gaussian"):
            raise UserError(f"unknown --vae.likelihood {config.likelihood!r}: bernoulli or gaussian")
        if not (config.deviation > 0 and config.beta >= 0 and 0 <= config.warmup <= 1):
            raise UserError("--vae.deviation must be above 0, --vae.beta from 0, --vae.warmup from 0 to 1")
        self.code = Code(backbone, config.code, numbers=2)

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance of each image's codes, (N, code) each."""
        last = self.backbone(images.contiguous(memory_format=torch.channels_last)).last
        mean, log_variance = self.code.encode(last).chunk(2, dim=1)
        return mean, log_variance.clamp(-20, 10)

    @torch.no_grad()
    def to_code(self, images: Tensor) -> Tensor:
        """The mean of each image's distribution."""
        return self.encode(images)[0]

    @torch.no_grad()
    def from_code(self, code: Tensor, size: int) -> Tensor:
        return self.decode(code, size).sigmoid()

    def decode(self, code: Tensor, size: int) -> Tensor:
        """(N, code) to logits (N, 3, size, size)."""
        logits = self.code.decode(code, size)
        return logits.mean(1, keepdim=True).expand_as(logits) if self.config.grey else logits

    def sample(self, mean: Tensor, log_variance: Tensor, batch: Batch) -> Tensor:
        """A code of each distribution, through which gradients flow (reparameterisation, §2.4)."""
        return mean + (0.5 * log_variance).exp() * batch.draws.stream("vae").normal(self.config.code)

    def missed(self, painted: Tensor, images: Tensor) -> Tensor:
        """(N,) nats: - log p(image | code), summed over pixels; Bernoulli: less the image's own entropy."""
        if self.config.grey:
            painted, images = painted.mean(1, keepdim=True), images.mean(1, keepdim=True)
        if self.config.likelihood == "bernoulli":
            return bernoulli_divergence(painted, images).sum((1, 2, 3))
        deviation = self.config.deviation
        error = (painted.sigmoid() - images).square() / (2 * deviation**2)
        return (error + math.log(deviation) + 0.5 * math.log(2 * math.pi)).sum((1, 2, 3))

    def beta(self, progress: float) -> float:
        rise = 1.0 if self.config.warmup == 0 else min(1.0, progress / self.config.warmup)
        return self.config.beta * rise

    def parts(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """The bound's two parts, with one code drawn for each image: what is missed (N,), and the divergence of each
        number of the code (N, code), in nats. And the codes' means (N, code)."""
        mean, log_variance = self.encode(batch.images)
        painted = self.decode(self.sample(mean, log_variance, batch), batch.images.shape[-1])
        return self.missed(painted, batch.images), divergence(mean, log_variance), mean

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        missed, kl, mean = self.parts(batch)
        information = kl.sum(1)
        loss = (missed + self.beta(batch.progress) * information).mean()
        error = plain_error(self.from_code(mean.detach(), batch.images.shape[-1]), batch.images)
        return {
            "loss": loss,
            "bound": (missed + information).mean().detach(),
            "error": error,
            "information": information.mean().detach(),
            "alive": (kl.detach().mean(0) > DEAD).float().mean(),
        }

    def trivial(self, batch: Batch) -> dict[str, float]:
        """For each image the mean of the others in the batch, with a code that carries nothing."""
        images = batch.images
        bound = self.missed(mean_of_others(images).clamp(1e-6, 1 - 1e-6).logit(), images).mean()
        return {"bound": float(bound), "error": mean_image_error(images), "information": 0.0, "alive": 0.0}

    @torch.no_grad()
    def show(self, batch: Batch) -> dict[str, Tensor]:
        mean, _ = self.encode(batch.images)
        painted = self.from_code(mean, batch.images.shape[-1])
        return {"input": batch.images, "target": batch.images, "prediction": painted}
