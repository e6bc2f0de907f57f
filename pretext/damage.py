"""What happens to photos and papers: a watermark over them, age, something in the way. Kinds of ``denoising.noise``.

Everything is (N, 3, H, W) in [0, 1] and drawn per image from ``Draws``; each function gives damaged images and where
they were touched, (N, 1, H, W) bool.
"""

from __future__ import annotations

import functools
import math

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from pretext.inpainting import smooth_field
from unlabel.draws import Draws

__all__ = ["DAMAGES", "document", "occlusion", "watermark"]

STAMPS, STAMP = 64, 96  # how many watermarks there are, and their side in pixels
SHAPES, FOLDS = 3, 2  # per image


@functools.lru_cache
def stamps(side: int) -> Tensor:
    """``drawn_stamps`` no larger than ``side`` px: sampled more coarsely, thin strokes would fall to pieces."""
    made = drawn_stamps()
    return made if side >= STAMP else F.interpolate(made, size=(side, side), mode="bilinear", antialias=True)


@functools.lru_cache
def drawn_stamps() -> Tensor:
    """(STAMPS, 1, STAMP, STAMP) in [0, 1]: words in one or two lines, and simple logos, in turn.

    Always the same, but for how Pillow's font looks in its version.
    """
    rng = np.random.default_rng(0)
    letters = list("ABCDEFGHIJKLMNOPRSTUVWXYZ")
    made = []
    for k in range(STAMPS):
        image = Image.new("L", (STAMP, STAMP))
        draw = ImageDraw.Draw(image)
        if k % 2 == 0:
            for line in range(1 + k // 2 % 2):
                word = "".join(rng.choice(letters, rng.integers(3, 8)))
                font = ImageFont.load_default(size=min(40, 2 * STAMP // (len(word) + 1)))
                draw.text((STAMP / 2, STAMP / 2 + 34 * line), word, 255, font, anchor="mm")
        else:
            a, b = 20 + int(rng.integers(12)), 76 - int(rng.integers(12))
            corners = [
                (48 + r * math.cos(t), 48 + r * math.sin(t))
                for t, r in ((math.pi * (j / 5 - 0.5), (34, 15)[j % 2]) for j in range(10))
            ]
            kind = k // 2 % 4
            if kind == 0:
                draw.ellipse((a, a, b, b), outline=255, width=5)
            elif kind == 1:
                draw.rectangle((a, a, b, b), outline=255, width=5)
            elif kind == 2:
                draw.polygon(corners, fill=255)
            else:
                draw.polygon([(48, a), (b, b), (a, b)], outline=255, width=5)
            word = "".join(rng.choice(letters, 3))
            draw.text((48, 48), word, 0 if kind == 2 else 255, ImageFont.load_default(size=18), anchor="mm")
        made.append(np.asarray(image))
    return torch.from_numpy(np.stack(made)[:, None]).float() / 255


def watermark(images: Tensor, level: Tensor, draws: Draws) -> tuple[Tensor, Tensor]:
    """A word or a logo, turned, scaled and placed at random, blended over the image. ``level`` (N,): its opacity."""
    n, _, height, width = images.shape
    which = draws.stream("which").integers(STAMPS)
    u = draws.stream("how").uniform(8)
    angle, zoom = (u[:, 0] - 0.5) * 1.2, 0.7 + 0.9 * u[:, 1]  # ± 34 degrees; above 1 is smaller
    cos, sin = angle.cos() * zoom, angle.sin() * zoom
    theta = torch.stack([cos, -sin, (u[:, 2] - 0.5) * 0.8, sin, cos, (u[:, 3] - 0.5) * 0.8], 1).view(n, 2, 3)
    with torch.autocast(images.device.type, enabled=False):
        grid = F.affine_grid(theta, [n, 1, height, width], align_corners=False)
        mask = F.grid_sample(stamps(width).to(images.device)[which], grid, align_corners=False)
    colour = torch.where(u[:, 4:5] < 0.7, (u[:, 4:5] < 0.45).float(), u[:, 5:8]).view(n, 3, 1, 1)  # white, black, any
    alpha = mask * level.view(n, 1, 1, 1)
    return images * (1 - alpha) + colour * alpha, alpha > 0.02


def document(images: Tensor, level: Tensor, draws: Draws) -> tuple[Tensor, Tensor]:
    """Old paper: faded in places, stained, folded. ``level`` (N,): how old, 0 to 1."""
    n, _, height, width = images.shape
    u = draws.stream("age").uniform(3 + 4 * FOLDS)
    age = level.view(n, 1, 1, 1)
    paper = torch.stack([0.85 + 0.1 * u[:, 0], 0.8 + 0.1 * u[:, 0], 0.6 + 0.25 * u[:, 0]], 1).view(n, 3, 1, 1)
    fading = torch.sigmoid(2 * smooth_field(height, draws.stream("fading")))[:, None]
    out = images + (paper - images) * (0.8 * age * fading)
    stains = torch.sigmoid(8 * (smooth_field(height, draws.stream("stains")) - 1.0))[:, None]
    brown = torch.tensor([0.55, 0.4, 0.2], device=images.device).view(1, 3, 1, 1)
    out = out * (1 - age * stains * (1 - brown))
    ys = (torch.arange(height, device=images.device) + 0.5).view(1, -1, 1) / height - 0.5
    xs = (torch.arange(width, device=images.device) + 0.5).view(1, 1, -1) / width - 0.5
    for k in range(FOLDS):  # a bright line with a dark one beside it
        angle, place, side = (u[:, 3 + 4 * k + j].view(n, 1, 1) for j in range(3))
        turn = torch.where(side < 0.5, 0.0, math.pi / 2) + 0.2 * (angle - 0.5)
        distance = xs * turn.cos() + ys * turn.sin() - 0.7 * (place - 0.5)
        ridge = torch.exp(-((distance / 0.012) ** 2)) - 0.7 * torch.exp(-(((distance - 0.03) / 0.02) ** 2))
        out = out + 0.4 * age * ridge[:, None]
    return out.clamp(0, 1), (age > 0).expand(n, 1, height, width)


def occlusion(images: Tensor, level: Tensor, draws: Draws) -> tuple[Tensor, Tensor]:
    """Striped ellipses and boxes in front of the picture. ``level`` (N,): the share that they cover at most."""
    n, _, height, width = images.shape
    u = draws.stream("shapes").uniform(SHAPES, 12)
    ys = (torch.arange(height, device=images.device) + 0.5).view(1, -1, 1) / height
    xs = (torch.arange(width, device=images.device) + 0.5).view(1, 1, -1) / width
    out, touched = images, torch.zeros(n, 1, height, width, dtype=torch.bool, device=images.device)
    for k in range(SHAPES):
        y, x, aspect, kind, wave, turn = (u[:, k, j].view(n, 1, 1) for j in range(6))
        half = (level.view(n, 1, 1) / SHAPES).sqrt() / 2
        stretch = torch.exp(aspect - 0.5)
        dy, dx = (ys - y).abs() / (half * stretch).clamp(min=1e-6), (xs - x).abs() / (half / stretch).clamp(min=1e-6)
        inside = torch.where(kind < 0.5, (dy**2 + dx**2) * (math.pi / 4) < 1, torch.maximum(dy, dx) < 1)
        inside = (inside & (level.view(n, 1, 1) > 0))[:, None]
        phase = (xs * (turn * math.pi).cos() + ys * (turn * math.pi).sin()) * (10 + 50 * wave)
        share = (0.5 + 0.5 * phase.sin())[:, None]
        one, other = (u[:, k, a : a + 3].view(n, 3, 1, 1) for a in (6, 9))
        out = torch.where(inside, one + (other - one) * share, out)
        touched = touched | inside
    return out, touched


DAMAGES = {"watermark": watermark, "document": document, "occlusion": occlusion}
