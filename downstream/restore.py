"""`unlabel restore`: a trained task repairs images. The output has the size that the run was trained at, square."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from downstream.trained import Load, Trained
from unlabel.augment import clean
from unlabel.cache import ImageCache, load_cache, printable
from unlabel.checkpoint import write_atomic
from unlabel.config import RestoreConfig
from unlabel.distributed import pick_device
from unlabel.errors import UserError
from unlabel.pictures import sheet, to_uint8, write_png
from unlabel.quality import psnr, ssim
from unlabel.sources import open_source

__all__ = ["restore"]

SHOWN = 12
TOUCHED = 0.03  # mean of a mask over a pixel of the small image, from which on it is hidden
REPAIR = ("denoising", "inpainting", "colorization", "superresolution")


def restore(config: RestoreConfig, load: Load) -> Path:
    """Writes DIR/restored/NAME.png, DIR/before-after.png (rows: before, after, original) and DIR/restored.json."""
    task = load(config.run, config.task, pick_device(config.device))
    kind = task.name
    if not task.can("restore"):
        raise UserError(f"{kind} repairs nothing: name another --task of the run, or train one of {', '.join(REPAIR)}")
    if config.hidden and kind != "inpainting":
        raise UserError(f"--hidden is for inpainting; {kind} looks at the whole image")
    if kind == "inpainting" and not (config.damage or config.hidden):
        raise UserError("inpainting must know what is hidden: give masks by --hidden, or --damage to hide parts")
    if config.damage and (config.clean or config.hidden):
        raise UserError("--damage makes its own damage, and its images are the originals: no --clean, no --hidden")
    size = task.backbone.spec.image_size
    _refuse_overwriting(config)
    cache = load_cache(open_source(config.data), size, max_skipped=config.max_skipped)
    _by_stem(cache, "--data")
    originals = _like(cache, config.clean, size, "--clean") if config.clean else None
    masks = _like(cache, config.hidden, size, "--hidden") if config.hidden else None
    if masks is not None and not any(_hidden(masks, rows, size).any() for rows in _parts(len(masks))):
        raise UserError(f"no mask of {config.hidden} hides anything: what is hidden has to be bright, up to white")

    rows: list[list[np.ndarray]] = [[], [], []]
    scores: dict[str, list[Tensor]] = {}
    bar = tqdm(total=len(cache), desc="restore", unit="img")
    done = 0
    for batch in task.batches(cache.images, cache.hashes):
        at = slice(done, done + len(batch.images))
        hidden = None if masks is None else _hidden(masks, at, size).to(batch.images.device)
        before, after = _repaired(task, batch, hidden, config.damage)
        original = batch.images if config.damage else None if originals is None else _view(originals, at, size)
        for name, image in zip(cache.names[at], to_uint8(after), strict=True):
            write_png(_inside(config.out / "restored", name), image)
        if original is not None:
            original = original.to(after.device)
            for key, image in (("before", before), ("after", after)):
                scores.setdefault(f"psnr_{key}", []).append(psnr(image, original).cpu())
                scores.setdefault(f"ssim_{key}", []).append(ssim(image.clamp(0, 1), original))
        for row, images in zip(rows, (before, after, original), strict=True):
            if images is not None and done < SHOWN:
                row.extend(to_uint8(images)[: SHOWN - done])
        done += len(batch.images)
        bar.update(len(batch.images))
    bar.close()
    found = {k: float(torch.cat(v).mean()) for k, v in scores.items()}
    about = {"run": config.run.resolve().name, "task": kind, "images": len(cache), **found}
    write_atomic(config.out / "restored.json", (json.dumps(about, indent=1) + "\n").encode())
    picture = write_png(config.out / "before-after.png", sheet([np.stack(r) for r in rows if r]))
    for name, reason in cache.skipped:
        print(f"skipped {printable(name)}: {reason}")
    for measure, unit in (("psnr", " dB"), ("ssim", "")):
        if f"{measure}_after" in found:
            before, after = found[f"{measure}_before"], found[f"{measure}_after"]
            print(
                f"{measure.upper()} {before:.3f}{unit} before, {after:.3f}{unit} after (mean of {len(cache):,} images)"
            )
    print(f"{config.out / 'restored'}: {len(cache):,} images of {size} × {size} px; open {picture}")
    return config.out


@torch.no_grad()
def _repaired(task: Trained, batch: Any, hidden: Tensor | None, damage: bool) -> tuple[Tensor, Tensor]:
    """Before and after, (N, 3, H, W) in [0, 1] each."""
    if damage:
        shown = task.show(batch)
        if task.name == "denoising":  # its noise may leave [0, 1], which no picture can
            return shown["input"], task.restore(shown["input"], None)
        return shown["input"], shown["prediction"]
    after = task.restore(batch.images, hidden)
    before = batch.images
    return (before if hidden is None else before.masked_fill(hidden, 0.5)), after


def _refuse_overwriting(config: RestoreConfig) -> None:
    """Repaired images must not land among those that they are made of."""
    out = (config.out / "restored").resolve()
    for spec in config.data:
        data = Path(spec).resolve()
        if data.is_dir() and (out.is_relative_to(data) or data.is_relative_to(out)):
            raise UserError(f"--out {config.out} would write into --data {spec}: choose another folder")


def _by_stem(cache: ImageCache, option: str) -> dict[str, int]:
    """Name without its suffix to row; two images of one such name would be written over each other."""
    rows: dict[str, int] = {}
    for k, name in enumerate(cache.names):
        if rows.setdefault(_stem(name), k) != k:
            raise UserError(f"{option}: {cache.names[rows[_stem(name)]]!r} and {name!r} differ in their suffix at most")
    return rows


def _like(cache: ImageCache, spec: str, size: int, option: str) -> ImageCache:
    """The images of ``spec`` that have the names of ``cache``'s, suffix aside, in its order."""
    other = load_cache(open_source(spec), size, max_skipped=1.0)
    at = _by_stem(other, option)
    missing = [name for name in cache.names if _stem(name) not in at]
    if missing:
        raise UserError(
            f"{option} {spec} has no image for {missing[0]!r}; {len(missing):,} of {len(cache):,} are missing"
        )
    return other.subset([at[_stem(name)] for name in cache.names])


def _stem(name: str) -> str:
    return PurePosixPath(name).with_suffix("").as_posix()


def _view(cache: ImageCache, at: slice, size: int) -> Tensor:
    rows = np.arange(len(cache))[at]
    return clean(torch.from_numpy(np.array(cache.images[rows])), size)


def _hidden(masks: ImageCache, at: slice, size: int) -> Tensor:
    """(N, 1, size, size) bool: whatever a mask touches, also where it is thinner than a pixel of the small image."""
    return _view(masks, at, size).mean(1, keepdim=True) > TOUCHED


def _parts(n: int, size: int = 256) -> Iterator[slice]:
    return (slice(k, k + size) for k in range(0, n, size))


def _inside(folder: Path, name: str) -> Path:
    """Where the image of this name goes; never outside of ``folder``."""
    path = folder / f"{_stem(printable(name))}.png"
    if not path.resolve().is_relative_to(folder.resolve()):
        raise UserError(f"{name!r} would be written outside of {folder}")
    return path
