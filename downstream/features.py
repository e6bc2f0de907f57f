"""Features of a frozen backbone, extracted once: every stage, pooled over the whole image and over its quadrants."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from unlabel import augment
from unlabel.backbone import Backbone
from unlabel.cache import ImageCache, Pixels

Block = tuple[str, str]  # a stage and how it is pooled: "1x1" or "2x2"


@dataclass(frozen=True)
class StageFeatures:
    """Pooled features of N images, stages from shallow to deep.

    A control has one pseudo-stage and no 1x1 pooling of it.
    """

    one: dict[str, np.ndarray]  # stage -> (N, C) float32
    two: dict[str, np.ndarray]  # stage -> (N, 4C) float32

    @property
    def stages(self) -> tuple[str, ...]:
        return tuple(self.two)

    def __len__(self) -> int:
        return len(next(iter(self.two.values())))

    def block(self, block: Block) -> np.ndarray:
        """(N, D) features of one stage, pooled one way."""
        stage, pooling = block
        return (self.one if pooling == "1x1" else self.two)[stage]

    def blocks(self, stage: str) -> list[Block]:
        """What there is of a stage, 1x1 first."""
        return ([(stage, "1x1")] if stage in self.one else []) + [(stage, "2x2")]


@dataclass(frozen=True)
class BlockStats:
    """How to standardise a block: z = (x - mean) * scale, with scale = 1 / (std * sqrt(D)).

    The root of the dimension makes the squared length of z about 1 whatever the block, so that blocks weigh
    the same when they are concatenated and one C means the same for each.
    """

    mean: np.ndarray  # (D,) float64
    scale: np.ndarray  # (D,) float64, 0 for a feature that never varies


def joined(parts: Sequence[StageFeatures]) -> StageFeatures:
    """Features of several sets of images, one after the other."""
    one = {stage: np.concatenate([p.one[stage] for p in parts]) for stage in parts[0].one}
    return StageFeatures(one, {stage: np.concatenate([p.two[stage] for p in parts]) for stage in parts[0].two})


def block_stats(x: np.ndarray) -> BlockStats:
    """Statistics of (N, D) features of unlabelled images."""
    mean, std = x.mean(axis=0, dtype=np.float64), x.std(axis=0, dtype=np.float64)
    # A channel that is all but dead here would be blown up by the few images that do wake it.
    floor = 0.01 * np.median(std)
    scale = np.divide(1.0, np.maximum(std, floor), out=np.zeros_like(std), where=std > 1e-9 * (1 + np.abs(mean)))
    return BlockStats(mean, scale / np.sqrt(x.shape[1]))


def feature_stats(unlabelled: StageFeatures) -> dict[Block, BlockStats]:
    """Statistics of every block. Labels are too few to estimate them, so they come from unlabelled images."""
    return {b: block_stats(unlabelled.block(b)) for s in unlabelled.stages for b in unlabelled.blocks(s)}


def standardised(
    features: StageFeatures, blocks: Sequence[Block], stats: dict[Block, BlockStats], idx: np.ndarray
) -> np.ndarray:
    """(n, sum of D) float64: the rows `idx` of several blocks, each standardised, side by side."""
    return np.concatenate([(features.block(b)[idx] - stats[b].mean) * stats[b].scale for b in blocks], axis=1)


def extract(
    backbone: Backbone,
    images: Pixels,
    size: int,
    *,
    device: str | torch.device = "cpu",
    batch_size: int = 256,
    progress: str | None = None,
) -> StageFeatures:
    """Features of uint8 images (N, R, R, 3) as the frozen backbone sees their clean view at `size` px.

    The deepest stage is what the network hands on (`Features.last`, after a final normalisation where the
    family has one), so its 1x1 pooling is the `pooled` that a classifier sits on. Frozen means that BatchNorm
    is in eval mode and nothing of the backbone changes; its mode is put back afterwards. `progress` names the bar.
    """
    was_training = backbone.training
    backbone.to(device).eval()
    one: dict[str, list[np.ndarray]] = {}
    two: dict[str, list[np.ndarray]] = {}
    bar = tqdm(total=len(images), desc=progress, unit="img", disable=progress is None)
    with torch.inference_mode(), bar:
        for start in range(0, len(images), batch_size):
            raw = torch.from_numpy(np.array(images[start : start + batch_size])).to(device)
            features = backbone(augment.clean(raw, size))
            for stage, maps in {**features.stages, backbone.stage_names[-1]: features.last}.items():
                one.setdefault(stage, []).append(maps.mean((2, 3)).float().cpu().numpy())
                two.setdefault(stage, []).append(F.adaptive_avg_pool2d(maps, 2).flatten(1).float().cpu().numpy())
            bar.update(len(raw))
    backbone.train(was_training)
    return StageFeatures(
        {stage: np.concatenate(parts) for stage, parts in one.items()},
        {stage: np.concatenate(parts) for stage, parts in two.items()},
    )


def is_grey(images: Pixels) -> bool:
    """Whether the three channels are the same in all images (N, R, R, 3)."""
    parts = (images[at : at + 1024] for at in range(0, len(images), 1024))
    return all(bool((p[..., :1] == p[..., 1:]).all()) for p in parts)


def pixels_of(cache: ImageCache, size: int, channels: int) -> np.ndarray:
    """The images as a backbone at ``size`` px sees them: (N, channels, size, size) float32 in [0, 1]."""
    parts = np.array_split(np.arange(len(cache)), max(1, len(cache) // 1024))
    views = (augment.clean(torch.from_numpy(np.array(cache.images[p])), size)[:, :channels].numpy() for p in parts)
    return np.concatenate(list(views))
