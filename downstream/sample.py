"""`unlabel sample`: images that a variational autoencoder makes up, and walks from one image to another."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from downstream.trained import Load, Trained, data_of
from unlabel.augment import clean
from unlabel.cache import load_cache
from unlabel.config import SampleConfig
from unlabel.distributed import pick_device
from unlabel.draws import mix
from unlabel.errors import UserError
from unlabel.pictures import sheet, to_uint8, write_png
from unlabel.sources import open_source
from unlabel.start import refuse_odd_out

__all__ = ["sample", "walk"]

SIDE, WALKS = 10, 6  # images per row and column; pairs of images


def sample(config: SampleConfig, load: Load) -> Path:
    """samples.png: codes drawn from the prior. walk.png: in each row an image, steps on the straight line from its
    code to another's, and that other image."""
    out = config.out or config.run / "samples"
    refuse_odd_out(out, config.data or ())
    device = pick_device(config.device)
    task = load(config.run, None, device)
    if not task.prior:
        raise UserError(f"{task.name} has no distribution to draw codes from: train vae")
    size = task.backbone.spec.image_size
    generator = torch.Generator().manual_seed(mix(config.seed, "samples") >> 1)
    cache = load_cache(open_source(config.data or data_of(config.run)), size, max_skipped=1.0)
    if len(cache) < 2:
        raise UserError("a walk needs two images: give more by --data")
    rows = torch.randperm(len(cache), generator=generator)[: 2 * WALKS].numpy()
    images = clean(torch.from_numpy(np.array(cache.images[rows])), size).to(device)
    codes = torch.randn(SIDE * SIDE, task.to_code(images).shape[1], generator=generator)
    made = to_uint8(task.from_code(codes.to(device), size))
    first = write_png(out / "samples.png", sheet(list(made.reshape(SIDE, SIDE, *made.shape[1:]))))
    pairs = [walk(task, a, b) for a, b in zip(images[::2], images[1::2], strict=False)]
    second = write_png(out / "walk.png", sheet(pairs))
    print(f"open {first} and {second}")
    return out


def walk(task: Trained, a: torch.Tensor, b: torch.Tensor) -> np.ndarray:
    """(SIDE, H, W, 3) uint8: image ``a`` (3, H, W), what lies between, image ``b``."""
    start, end = task.to_code(torch.stack([a, b]))
    share = torch.linspace(0, 1, SIDE - 2, device=start.device)[:, None]
    between = task.from_code(start + share * (end - start), a.shape[-1])
    return to_uint8(torch.cat([a[None], between, b[None]]))
