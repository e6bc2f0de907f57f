"""Pictures of many images: sheets in rows, and maps of thumbnails. Everything is uint8 (N, H, W, 3)."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

from unlabel.checkpoint import write_atomic
from unlabel.colours import COLOURS

__all__ = ["scatter", "sheet", "to_uint8", "write_png"]

GAP = 2


def to_uint8(images: Tensor) -> np.ndarray:
    """(N, 3, H, W) in [0, 1] to uint8 (N, H, W, 3)."""
    return (images.float().clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()


def write_png(path: Path, picture: np.ndarray) -> Path:
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "PNG", optimize=True)
    write_atomic(path, buffer.getvalue())
    return path


def enlarged(images: np.ndarray, least: int) -> np.ndarray:
    """By a whole factor, so that each side has at least about ``least`` pixels; never smaller."""
    factor = max(1, round(least / images.shape[1]))
    return images.repeat(factor, 1).repeat(factor, 2)


def sheet(rows: Sequence[np.ndarray], least: int = 64) -> np.ndarray:
    """(H, W, 3): each of ``rows`` (N, h, w, 3) on a line of its own, on white; all of the same size."""
    rows = [enlarged(r, least) for r in rows]
    height, width = rows[0].shape[1:3]
    columns = max(len(r) for r in rows)
    out = np.full((len(rows) * (height + GAP) - GAP, columns * (width + GAP) - GAP, 3), 255, np.uint8)
    for y, row in enumerate(rows):
        for x, image in enumerate(row):
            top, left = y * (height + GAP), x * (width + GAP)
            out[top : top + height, left : left + width] = image
    return out


def scatter(at: np.ndarray, images: np.ndarray, groups: np.ndarray | None, side: int = 1000) -> np.ndarray:
    """(side, side, 3): images (N, h, w, 3) as thumbnails at their places ``at`` (N, 2), framed by group.

    Where two would overlap, the later one is left out, so that each that is shown can be seen; ``groups`` (N,) of
    whole numbers choose the frames' colours.
    """
    least, most = at.min(0), at.max(0)
    unit = (at - least) / np.where(most > least, most - least, 1)
    thumb = max(16, min(48, round(side / math.sqrt(max(1, len(at))) * 0.9)))
    out = np.full((side, side, 3), 255, np.uint8)
    taken = np.zeros((side, side), bool)
    for k, (x, y) in enumerate(unit):
        left, top = (round(float(v) * (side - thumb)) for v in (x, 1 - y))
        box = (slice(top, top + thumb), slice(left, left + thumb))
        if taken[box].any():
            continue
        taken[box] = True
        if groups is not None:
            out[box] = np.frombuffer(COLOURS[int(groups[k]) % len(COLOURS)], np.uint8)
        frame = 0 if groups is None else 2
        inner = thumb - 2 * frame
        small = Image.fromarray(images[k]).resize((inner, inner), Image.Resampling.BICUBIC)
        out[top + frame : top + frame + inner, left + frame : left + frame + inner] = np.asarray(small)
    return out
