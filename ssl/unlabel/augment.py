"""Batched augmentation on the device. Every random number comes from Draws, so it belongs to an image."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from unlabel.draws import Draws

__all__ = ["clean", "colour_jitter", "four_rotations", "random_crop", "random_view", "to_float", "works_on"]


def to_float(images: Tensor) -> Tensor:
    """uint8 (N, R, R, 3) to float32 (N, 3, R, R) in [0, 1], in channels-last memory (no copy of the layout)."""
    return images.permute(0, 3, 1, 2).to(torch.float32).div_(255)


def clean(images: Tensor, size: int) -> Tensor:
    """The upright, whole, unaugmented view that the backbone sees downstream.

    uint8 (N, R, R, 3) to float32 (N, 3, size, size) in [0, 1], antialiased bilinear.
    """
    out = to_float(images)
    if out.shape[-1] != size:
        out = F.interpolate(out, size=(size, size), mode="bilinear", antialias=True, align_corners=False)
    return out.clamp_(0, 1)


def random_view(
    images: Tensor, size: int, draws: Draws, area: tuple[float, float] = (0.5, 1.0), ratio: float = 1.0,
    flip: bool = True,
) -> Tensor:  # fmt: skip
    """Random square crop, resized, and random left-right flip: uint8 (N, R, R, 3) to (N, 3, size, size).

    The crop takes ``area`` of the image and lies inside it: there is no padding whose border could tell a
    rotation. ``ratio`` > 1 stretches the crop by up to that factor. Never a vertical flip: it equals a
    half turn of the mirror image, which gives the rotation task contradictory labels.
    """
    return random_crop(to_float(images), size, draws, area, ratio, flip)


def random_crop(
    source: Tensor, size: int, draws: Draws, area: tuple[float, float], ratio: float = 1.0, flip: bool = True
) -> Tensor:
    """``random_view`` of images that are floats already: (N, 3, R, R) in [0, 1] to (N, 3, size, size)."""
    n = len(source)
    u = draws.stream("crop").uniform(5)
    share = area[0] + (area[1] - area[0]) * u[:, 0]
    side = share.sqrt()
    stretch = ratio ** (2 * u[:, 4] - 1)
    width, height = (side * stretch.sqrt()).clamp_(max=1), (side / stretch.sqrt()).clamp_(max=1)
    mirror = torch.where(u[:, 3] < 0.5, -1.0, 1.0) if flip else 1.0
    # Centre of the crop in grid coordinates (-1 … 1), such that the crop stays inside.
    x, y = (2 * u[:, 1] - 1) * (1 - width), (2 * u[:, 2] - 1) * (1 - height)
    pixels = (2 * torch.arange(size, device=source.device) + 1) / size - 1
    grid = torch.empty(n, size, size, 2, device=source.device)  # five times as quick as F.affine_grid
    grid[..., 0] = (x[:, None] + (width * mirror)[:, None] * pixels)[:, None, :]
    grid[..., 1] = (y[:, None] + height[:, None] * pixels)[:, :, None]
    scale = math.sqrt(area[0]) * source.shape[-1] / size
    if scale > 1.5:  # bilinear sampling alone would alias
        shorter = max(size, round(source.shape[-1] / scale))
        source = F.interpolate(source, size=(shorter, shorter), mode="bilinear", antialias=True)
    out = F.grid_sample(source, grid, mode="bilinear", padding_mode="border", align_corners=False)
    return out.clamp_(0, 1)


def works_on(device: str) -> bool:
    """Whether views come out there as on the CPU: Apple's devices lack some operations in some versions of torch."""
    images = (torch.arange(2 * 24 * 24 * 3) ** 2 % 251).to(torch.uint8).view(2, 24, 24, 3)
    grid = torch.linspace(-1, 1, 2 * 16 * 16 * 2).sin().view(2, 16, 16, 2)

    def views(place: str) -> list[Tensor]:
        here = images.to(place)
        crop = F.grid_sample(to_float(here), grid.to(place), padding_mode="border", align_corners=False)
        return [clean(here, 16).cpu(), crop.cpu()]

    try:
        return all(torch.allclose(a, b, atol=1e-3) for a, b in zip(views("cpu"), views(device), strict=True))
    except (RuntimeError, NotImplementedError):
        return False


def four_rotations(images: Tensor) -> tuple[Tensor, Tensor]:
    """(N, C, S, S) to (4N, C, S, S) and labels (4N,): N upright, then N turned by 90, 180, 270 degrees.

    ``rot90`` moves pixels and computes nothing: no interpolation, no border, nothing to read the angle from.
    """
    views = torch.cat([torch.rot90(images, k, (2, 3)) for k in range(4)])
    labels = torch.arange(4, device=images.device).repeat_interleave(len(images))
    return views, labels


def colour_jitter(images: Tensor, draws: Draws, strength: float, grey: float = 0.0) -> Tensor:
    """Brightness, contrast and saturation, each by a factor in 1 ± ``strength``; grey with probability ``grey``.

    One set of parameters per image of ``images`` (N, 3, H, W) in [0, 1].
    """
    if strength == 0 and grey == 0:
        return images
    u = draws.stream("colour").uniform(4)
    factor = 1 + strength * (2 * u - 1)
    bright, contrast, saturation = (factor[:, k].view(-1, 1, 1, 1) for k in range(3))
    saturation = torch.where(u[:, 3].view(-1, 1, 1, 1) < grey, torch.zeros_like(saturation), saturation)
    # x b, then m + (x - m) c with the mean m of all of it, then l + (x - l) s with the luma l: linear in x, and the
    # luma of a grey is itself, so that all of it is x s c b + luma(x) (1 - s) c b + mean(x) (1 - c) b.
    gain = contrast * bright
    luma = 0.299 * images[:, 0:1] + 0.587 * images[:, 1:2] + 0.114 * images[:, 2:3]
    mean = images.mean((1, 2, 3), keepdim=True)
    grey_part = luma * ((1 - saturation) * gain) + mean * ((1 - contrast) * bright)
    return torch.addcmul(grey_part, images, saturation * gain).clamp_(0, 1)
