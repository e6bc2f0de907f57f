"""Controls without a deep network: what the pixels give, and what one shallow layer of patches gives.

Each is fitted on unlabelled images and makes features with one pseudo-stage, so that the same probe and the
same k-NN run on it.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.cluster import MiniBatchKMeans
from sklearn.decomposition import PCA
from torch import Tensor
from tqdm import tqdm

from downstream.features import StageFeatures
from unlabel import augment
from unlabel.cache import Rows

SIDE = 32  # px that both work at, at most
CHUNK = 128  # images featurised at a time


def _shrunk(images: np.ndarray, size: int) -> Tensor:
    return augment.clean(torch.from_numpy(np.array(images)), min(size, SIDE))


def _sample(n: int, at_most: int, seed: int) -> np.ndarray:
    return np.sort(np.random.default_rng(seed).choice(n, min(n, at_most), replace=False))


class Pixels:
    """Principal components of the pixels.

    Args:
        unlabelled: (N, R, R, 3) uint8.
        size: px of the backbone's input; the control works at that, or at 32 px where it is larger.
        components: at most so many, of at most 5,000 images.
    """

    def __init__(self, unlabelled: np.ndarray, size: int, seed: int = 0, components: int = 128) -> None:
        self.size = size
        chosen = _sample(len(unlabelled), 5000, seed)
        starts = range(0, len(chosen), CHUNK)
        rows = np.concatenate([_shrunk(unlabelled[chosen[a : a + CHUNK]], size).flatten(1).numpy() for a in starts])
        self.pca = PCA(min(components, *rows.shape), svd_solver="randomized", random_state=seed).fit(rows)

    def features(self, images: np.ndarray | Rows, progress: str | None = None) -> StageFeatures:
        """Pseudo-stage "pixels": (N, components). `progress` names the bar."""
        parts = [
            self.pca.transform(_shrunk(part, self.size).flatten(1).numpy()).astype(np.float32)
            for part in _chunks(images, progress)
        ]
        return StageFeatures({}, {"pixels": np.concatenate(parts)})


class Patches:
    """k-means on whitened patches (Coates, Ng & Lee 2011, "An analysis of single-layer networks").

    6x6 patches, each brought to mean 0 and unit contrast, whitened (ZCA); their k-means centroids; for every
    patch of an image the "triangle" activation max(0, mean distance to the centroids - distance to this one),
    summed over each quadrant.

    Args:
        unlabelled: (N, R, R, 3) uint8.
        size: px of the backbone's input; the control works at that, or at 32 px where it is larger.
        centroids: the features are four times as many.
    """

    PATCH = 6
    PATCHES = 60_000  # for whitening and k-means

    def __init__(self, unlabelled: np.ndarray, size: int, seed: int = 0, centroids: int = 400) -> None:
        self.size = size
        rng = np.random.default_rng(seed)
        chosen = _sample(len(unlabelled), 6000, seed)
        each = -(-self.PATCHES // len(chosen))
        rows: list[np.ndarray] = []
        for start in range(0, len(chosen), CHUNK):
            patches = self._patches(_shrunk(unlabelled[chosen[start : start + CHUNK]], size)).numpy()
            picks = rng.integers(0, patches.shape[1], (len(patches), each))
            rows.append(np.take_along_axis(patches, picks[:, :, None], axis=1).reshape(-1, patches.shape[2]))
        sample = np.concatenate(rows).astype(np.float64)
        mean = sample.mean(axis=0)
        values, vectors = np.linalg.eigh(np.cov(sample, rowvar=False))
        # The patches have unit variance per pixel, so 0.1 damps the directions that hold noise only (paper, 2.1).
        whitener = (vectors / np.sqrt(np.maximum(values, 0) + 0.1)) @ vectors.T
        kmeans = MiniBatchKMeans(centroids, batch_size=4096, n_init=1, random_state=seed)  # type: ignore[arg-type]
        kmeans.fit(((sample - mean) @ whitener).astype(np.float32))
        self._mean = torch.from_numpy(mean.astype(np.float32))
        self._whitener = torch.from_numpy(whitener.astype(np.float32))
        self._centroids = torch.from_numpy(np.asarray(kmeans.cluster_centers_, np.float32))

    def _patches(self, images: Tensor) -> Tensor:
        """(N, 3, S, S) to (N, (S-5)^2, 108), each patch normalised as in the paper (its 10 / 255^2 included)."""
        patches = F.unfold(images, self.PATCH).transpose(1, 2)
        patches = patches - patches.mean(dim=2, keepdim=True)
        return patches / (patches.var(dim=2, keepdim=True) + 10 / 255**2).sqrt()

    def _triangle(self, images: Tensor) -> Tensor:
        """(N, 3, S, S) to (N, 4 x centroids): pooled activations, as averages so that S does not matter."""
        patches = self._patches(images)
        white = (patches - self._mean) @ self._whitener
        distance = torch.cdist(white.flatten(0, 1), self._centroids, compute_mode="use_mm_for_euclid_dist")
        near = F.relu(distance.mean(dim=1, keepdim=True) - distance)
        side = round(patches.shape[1] ** 0.5)
        maps = near.view(len(images), side, side, -1).permute(0, 3, 1, 2)
        return F.adaptive_avg_pool2d(maps, 2).flatten(1)

    def features(self, images: np.ndarray | Rows, progress: str | None = None) -> StageFeatures:
        """Pseudo-stage "patches": (N, 4 x centroids). `progress` names the bar."""
        with torch.inference_mode():
            parts = [self._triangle(_shrunk(part, self.size)).numpy() for part in _chunks(images, progress)]
        return StageFeatures({}, {"patches": np.concatenate(parts)})


def _chunks(images: np.ndarray | Rows, progress: str | None) -> Iterator[np.ndarray]:
    with tqdm(total=len(images), desc=progress, unit="img", disable=progress is None) as bar:
        for start in range(0, len(images), CHUNK):
            part = images[start : start + CHUNK]
            yield part
            bar.update(len(part))
