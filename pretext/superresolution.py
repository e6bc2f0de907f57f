"""Super-resolution: recover the image from its reduction to a half or a quarter.

The network sees the reduction, enlarged again to full size by bicubic interpolation, and predicts what is missing to
the original (VDSR, Kim et al. 2016, https://arxiv.org/abs/1511.04587): an untrained head is as good as bicubic.
What is missing is fine detail, so every stage of the backbone feeds the decoder (a feature pyramid, Lin et al. 2017,
https://arxiv.org/abs/1612.03144): unlike in inpainting and denoising nothing can leak through a shallow stage, since
the detail is in no stage's input.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from pretext.decoder import GROUPS, Pyramid
from pretext.task import Batch, PretextTask, Recipe
from unlabel.backbone import Backbone
from unlabel.errors import UserError
from unlabel.mlp import Mlp
from unlabel.quality import psnr

__all__ = ["SuperResolution", "reduce"]


@dataclass(frozen=True)
class Config:
    scale: Literal[2, 4] = 4
    """Factor by which height and width are reduced."""
    width: int = 32
    """Channels of the decoder."""


def reduce(images: Tensor, scale: int) -> Tensor:
    """(N, C, H, W) in [0, 1] to (N, C, H / scale, W / scale): bicubic, antialiased, clipped to [0, 1]."""
    size = [max(1, round(side / scale)) for side in images.shape[-2:]]
    return F.interpolate(images, size=size, mode="bicubic", antialias=True, align_corners=False).clamp(0, 1)


def enlarge(images: Tensor, size: int) -> Tensor:
    """(N, C, h, w) to (N, C, size, size): bicubic, clipped to [0, 1]."""
    return F.interpolate(images, size=(size, size), mode="bicubic", align_corners=False).clamp(0, 1)


class SuperResolution(PretextTask):
    """``psnr_rgb``: mean over images of the peak signal-to-noise ratio in dB; the trivial score is bicubic's."""

    Config = Config
    metrics = {"psnr_rgb": "max"}  # noqa: RUF012
    recipe = Recipe(optimizer="adamw", lr=2e-3, weight_decay=0.05, batch_size=128)
    config: Config

    def __init__(self, backbone: Backbone, config: Config) -> None:
        super().__init__(backbone, config)
        if config.scale not in (2, 4):
            raise UserError(f"--superresolution.scale {config.scale}: 2 or 4")
        if config.width < GROUPS or config.width % GROUPS:
            raise UserError(f"--superresolution.width {config.width}: a multiple of {GROUPS}")
        if isinstance(backbone.model, Mlp):
            raise UserError("superresolution needs a ConvNet: dense layers keep no places")
        self.pyramid = Pyramid(backbone, config.width)  # begins as bicubic

    def blurred(self, batch: Batch) -> Tensor:
        """(N, 3, H, W): the reduction, enlarged again."""
        return enlarge(reduce(batch.images, self.config.scale), batch.images.shape[-1])

    def predict(self, blurred: Tensor) -> Tensor:
        """(N, 3, H, W) float32, in [0, 1] colours but not clipped: what training needs to see."""
        stages = self.backbone(blurred.contiguous(memory_format=torch.channels_last)).stages.values()
        # Detail is small: a tenth keeps the head's numbers near one.
        return blurred + 0.1 * self.pyramid(stages, blurred.shape[-1])

    @torch.no_grad()
    def restore(self, images: Tensor, hidden: Tensor | None) -> Tensor:
        """Images that were enlarged, or are blurred, as if by ``scale``."""
        return self.predict(images).clamp(0, 1)

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        prediction = self.predict(self.blurred(batch))
        # L1 is sharper than the squared error (Zhao et al. 2017); 4 brings it to the size of other tasks' losses.
        loss = 4 * (prediction - batch.images).abs().mean((1, 2, 3)).mean()
        return {"loss": loss, "psnr_rgb": psnr(prediction.detach(), batch.images).mean()}

    def trivial(self, batch: Batch) -> dict[str, float]:
        """Bicubic interpolation of the same reduction."""
        return {"psnr_rgb": float(psnr(self.blurred(batch), batch.images).mean())}

    @torch.no_grad()
    def show(self, batch: Batch) -> dict[str, Tensor]:
        blurred = self.blurred(batch)
        return {"input": blurred, "target": batch.images, "prediction": self.predict(blurred).clamp(0, 1)}
