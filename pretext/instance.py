"""Instance discrimination: which of all the images in the batch is this another view of?

Two random views of each image; an image's own other view is told from all other images' views by the cosine between
their codes, divided by a temperature: NT-Xent, equation 1 of Chen et al. 2020 (https://arxiv.org/abs/2002.05709). Alone
it wants large batches; here it is for a sum with rotation, whose features it makes tell images apart and not only their
turns (Feng et al. 2019, "Self-supervised representation learning by rotation feature decoupling").
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretext.task import Batch, PretextTask, Recipe
from unlabel import distributed
from unlabel.augment import colour_jitter, random_crop
from unlabel.backbone import Backbone
from unlabel.batchnorm import has_batchnorm
from unlabel.errors import UserError

__all__ = ["Instance", "nt_xent"]


@dataclass(frozen=True)
class Config:
    temperature: float = 0.2
    """Divides the cosines: the lower, the more the nearest other images count."""
    width: int = 128
    """Numbers of the code that is compared; thrown away after pretraining, with the layer before it."""
    area: float = 0.25
    """Each view shows at least this share of what the loop has cropped already."""
    jitter: float = 0.4
    """Brightness, contrast and saturation of each view vary by this factor."""
    grey: float = 0.2
    """Share of views that are turned grey."""


def nt_xent(ours: Tensor, all_first: Tensor, all_second: Tensor, at: int, temperature: float) -> tuple[Tensor, Tensor]:
    """Losses (2N,) and whether each view's nearest is its own other view (2N,).

    ``ours`` (2N, D): first views of N images, then their second views, of length 1; ``all_first``, ``all_second``
    (M, D): those of all M images, ours from row ``at`` on. Each of our views is compared with 2M - 1 others.
    """
    n, m = len(ours) // 2, len(all_first)
    with torch.autocast(ours.device.type, enabled=False):  # bf16 has steps of 1/32 where cosines ÷ temperature are
        cosines = ours @ torch.cat([all_first, all_second]).t() / temperature
    own = torch.arange(at, at + n, device=ours.device)
    itself, other = torch.cat([own, own + m]), torch.cat([own + m, own])
    cosines = cosines.scatter(1, itself[:, None], float("-inf"))
    return F.cross_entropy(cosines, other, reduction="none"), cosines.argmax(1) == other


class Instance(PretextTask):
    """``accuracy``: share of views whose nearest in the batch is the other view of the same image."""

    Config = Config
    metrics = {"accuracy": "max"}  # noqa: RUF012
    recipe = Recipe(optimizer="adamw", lr=3e-3, weight_decay=0.05, batch_size=64, progressive=True)
    across = True
    config: Config

    def __init__(self, backbone: Backbone, config: Config) -> None:
        super().__init__(backbone, config)
        if config.temperature <= 0 or config.width < 1 or not 0 < config.area <= 1:
            raise UserError("--instance.temperature and .width are above 0, --instance.area above 0 and up to 1")
        if not 0 <= config.jitter <= 1 or not 0 <= config.grey <= 1:
            raise UserError("--instance.jitter and .grey are from 0 to 1")
        channels = backbone.channels
        # With BatchNorm where the network has it, without which the codes of a new network come apart slowly.
        norm = nn.BatchNorm1d(channels) if has_batchnorm(backbone) else nn.Identity()
        self.project = nn.Sequential(nn.Linear(channels, channels), norm, nn.ReLU(), nn.Linear(channels, config.width))

    def views(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Two of each image, each (N, 3, S, S) in [0, 1]."""
        found, size = [], batch.images.shape[-1]
        for name in ("instance/first", "instance/second"):
            draws = batch.draws.stream(name)
            view = random_crop(batch.images, size, draws, (self.config.area, 1.0), flip=self.backbone.spec.flip)
            found.append(colour_jitter(view, draws, self.config.jitter, self.config.grey))
        return found[0], found[1]

    def codes(self, views: tuple[Tensor, Tensor]) -> Tensor:
        """(2N, width), of length 1: first views, then second ones."""
        images = torch.cat(views).contiguous(memory_format=torch.channels_last)
        return F.normalize(self.project(self.backbone(images).pooled).float(), dim=1)

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        ours, n = self.codes(self.views(batch)), len(batch.images)
        everyones = distributed.gathered(ours.view(2, n, -1).transpose(0, 1))  # (M, 2, width): of all processes
        losses, hits = nt_xent(ours, everyones[:, 0], everyones[:, 1], distributed.rank() * n, self.config.temperature)
        return {"loss": losses.mean(), "accuracy": hits.float().mean()}

    @torch.no_grad()
    def surprise(self, batch: Batch) -> Tensor:
        """1 - the cosine between the codes of two views."""
        first, second = self.codes(self.views(batch)).chunk(2)
        return 1 - (first * second).sum(1)

    def trivial(self, batch: Batch) -> dict[str, float]:
        return {"accuracy": 1 / max(1, 2 * len(batch.images) * distributed.world_size() - 1)}

    @torch.no_grad()
    def show(self, batch: Batch) -> dict[str, Tensor]:
        """A view of each image, its other view, and the second view that it is nearest to."""
        first, second = self.views(batch)
        ours, theirs = self.codes((first, second)).chunk(2)
        return {"input": first, "target": second, "prediction": second[(ours @ theirs.t()).argmax(1)]}
