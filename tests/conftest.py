"""Shared by all tests: a cache of their own, one small real data set, small real runs."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

# Before numpy and torch read it. Two workers of two threads each on two cores would wait for one another; a worker
# inherits what its parent has set.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"
else:
    os.environ.setdefault("OMP_NUM_THREADS", "2")

import numpy as np
import pytest
import torch
from PIL import Image


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory):
    """The packed images of the tests do not mix with the user's."""
    old = os.environ.get("UNLABEL_CACHE")
    os.environ["UNLABEL_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    yield
    if old is None:
        del os.environ["UNLABEL_CACHE"]
    else:
        os.environ["UNLABEL_CACHE"] = old


@pytest.fixture(scope="module")
def short_presets():
    """Fine-tuning's presets with a few steps each, where plumbing is tested; a module may shorten more by it."""
    from downstream import finetune as ft

    patch = pytest.MonkeyPatch()
    for name in ("_FEW", "_SOME", "_MANY", "_SCRATCH_FEW", "_SCRATCH_MANY", "_DENSE_MANY", "_DENSE_SCRATCH_MANY"):
        patch.setattr(ft, name, tuple(dataclasses.replace(p, steps=4, batch_size=16) for p in getattr(ft, name)))
    for name in ("GROWTH", "SCRATCH_GROWTH", "DENSE_GROWTH", "DENSE_SCRATCH_GROWTH"):
        patch.setattr(ft, name, ft.Growth(passes=0, steps=0, at_least=0))
    yield patch
    patch.undo()


@pytest.fixture(scope="session")
def digits_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """320 of scikit-learn's handwritten digits, classes 0 to 3, as PNG files of 32 px in class folders."""
    from sklearn.datasets import load_digits

    data, target = load_digits(return_X_y=True)
    images = np.asarray(data).reshape(-1, 8, 8)
    root = tmp_path_factory.mktemp("digits")
    for label in range(4):
        (root / str(label)).mkdir()
        for k in np.flatnonzero(target == label)[:80]:
            image = Image.fromarray((images[k] * 255 / 16).astype(np.uint8))
            image.resize((32, 32), Image.Resampling.BICUBIC).save(root / str(label) / f"{k:04d}.png")
    return root


@pytest.fixture(scope="session")
def colour_photos() -> torch.Tensor:
    """(64, 3, 32, 32) in [0, 1]: parts of scikit-learn's two sample photos, a temple and a flower, in turn."""
    from sklearn.datasets import load_sample_images

    parts = []
    for photo in load_sample_images().images:
        whole = Image.fromarray(photo)
        for row in range(4):
            for column in range(8):
                x, y = 76 * column, 106 * row
                part = whole.crop((x, y, x + 106, y + 106)).resize((32, 32), Image.Resampling.BICUBIC)
                parts.append(np.asarray(part))
    order = np.arange(64).reshape(2, 32).T.ravel()
    return torch.from_numpy(np.stack(parts)[order]).permute(0, 3, 1, 2).float() / 255
