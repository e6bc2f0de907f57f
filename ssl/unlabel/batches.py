"""Step -> Batch: the cache, the order, the draws and the augmentation put together."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from unlabel import distributed, optim
from unlabel.augment import clean, random_view
from unlabel.cache import ImageCache, Rows, evenly_spaced
from unlabel.config import PretrainConfig
from unlabel.draws import Draws, mix
from unlabel.order import batch_at
from unlabel.plan import Plan
from unlabel.streaming import Streamed

__all__ = ["Batches"]

CLEAN_IMAGES = 8192  # for the BatchNorm statistics


class Batches:
    """Step -> Batch: this rank's share of the step's images, as the tasks get them."""

    plan: Plan

    def __init__(self, cache: ImageCache, config: PretrainConfig, flip: bool, device: torch.device) -> None:
        self.cache, self.seed, self.flip, self.device = cache, config.seed, flip, device
        self.parts = config.accumulate

    def _images(self, indices: np.ndarray) -> Tensor:
        return torch.from_numpy(np.array(self.cache.images[indices])).to(self.device, non_blocking=True)

    def _share(self, step: int, part: int) -> tuple[np.ndarray, np.ndarray]:
        """Epochs and indices of what this rank is shown in one of the ``parts`` of a step."""
        epochs, indices = batch_at(self.seed, step, self.plan.batch_size, len(self.cache.names))
        share = self.plan.batch_size // (distributed.world_size() * self.parts)
        at = (distributed.rank() * self.parts + part) * share
        return epochs[at : at + share], indices[at : at + share]

    def __call__(self, step: int, progress: float, part: int = 0) -> Any:
        from pretext.task import Batch

        plan = self.plan
        epochs, indices = self._share(step, part)
        draws = Draws(self.seed, epochs.tolist(), indices.tolist(), device=self.device)
        size = optim.size_at(step / plan.steps, plan.image_size, plan.progressive)
        pixels = self._images(indices)
        then, part = (step, part + 1) if part + 1 < self.parts else (step + 1, 0)
        if isinstance(self.cache.images, Rows | Streamed) and then < plan.steps:
            self.cache.images.prefetch(self._share(then, part)[1])
        images = random_view(pixels, size, draws, plan.crop, flip=self.flip)
        return Batch(images, draws, progress)

    def fixed(self, n: int = 8) -> Any:
        """Some images, evenly spaced and whole: for previews."""
        from pretext.task import Batch

        indices = evenly_spaced(len(self.cache.names), n)
        draws = Draws(self.seed, [0] * len(indices), indices.tolist(), device=self.device)
        return Batch(clean(self._images(indices), self.plan.image_size), draws, 1.0)

    def clean(self) -> Iterator[Tensor]:
        """Up to CLEAN_IMAGES images, whole and upright, in batches of about equal size (smaller of large images)."""
        batch_size = max(16, min(512, 512 * 96**2 // self.plan.image_size**2))
        order = np.random.Generator(np.random.PCG64(mix(self.seed, "clean"))).permutation(len(self.cache.names))
        order = order[:CLEAN_IMAGES]
        for part in np.array_split(order, math.ceil(len(order) / batch_size)):
            yield clean(self._images(part), self.plan.image_size)
