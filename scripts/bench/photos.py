"""Photos for the benchmark: cut from scikit-learn's two sample photographs, so that everybody has the same ones."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_sample_images

__all__ = ["cut_photos", "many_files", "packed_in"]


@contextlib.contextmanager
def packed_in(folder: str | Path) -> Iterator[None]:
    """Packed images go into this folder, not to the user's."""
    kept = os.environ.get("UNLABEL_CACHE")
    os.environ["UNLABEL_CACHE"] = str(folder)
    try:
        yield
    finally:
        os.environ.pop("UNLABEL_CACHE")
        os.environ |= {} if kept is None else {"UNLABEL_CACHE": kept}


def cut_photos(folder: Path, count: int, size: tuple[int, int], seed: int = 0) -> Path:
    """``count`` JPEGs of ``size``, quality 90, in two class folders: random parts of the photographs, or their mirrors.

    A part is the whole width or less, shrunk to ``size``: small pictures show as much as large ones.
    """
    rng = np.random.default_rng(seed)
    photos = [Image.fromarray(image) for image in load_sample_images().images]
    for k in range(count):
        photo, path = photos[k % 2], folder / f"photo{k % 2}" / f"{k:06d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        share = rng.uniform(0.8, 1) * min(photo.width / size[0], photo.height / size[1])
        width, height = size[0] * share, size[1] * share
        left, top = rng.uniform(0, photo.width - width), rng.uniform(0, photo.height - height)
        part = photo.resize(size, Image.Resampling.BICUBIC, (left, top, left + width, top + height))
        if rng.random() < 0.5:
            part = part.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        part.save(path, quality=90)
    return folder


def many_files(folder: Path, count: int, per_folder: int = 1000) -> Path:
    """``count`` names for ``per_folder`` tiny JPEGs: a tree as large as one likes that takes no space."""
    firsts = []
    for at in range(0, count, per_folder):
        inner = folder / f"n{at // per_folder:05d}"
        inner.mkdir(parents=True)
        for k in range(min(per_folder, count - at)):
            path = inner / f"image_{at + k:08d}.jpg"
            if at:
                os.link(firsts[k], path)
            else:
                noise = np.random.default_rng(k).integers(0, 256, (8, 8, 3), dtype=np.uint8)
                Image.fromarray(noise).save(path, quality=90)
                firsts.append(path)
    return folder
