"""Augmentation on the batch against the plain way to do it, one operation after the other."""

import math

import pytest
import torch
import torch.nn.functional as F

from unlabel.augment import colour_jitter, random_view, to_float
from unlabel.draws import Draws


def some(n: int = 6, side: int = 20) -> torch.Tensor:
    return torch.randint(0, 256, (n, side, side, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("grey", [0.0, 0.5])
def test_colour_jitter_is_brightness_then_contrast_then_saturation(grey: float) -> None:
    images, draws = to_float(some(64)), Draws(0, [0] * 64, range(64))
    u = draws.stream("colour").uniform(4)
    want = []
    for image, (b, c, s, g) in zip(images, u.tolist(), strict=True):
        out = image * (1 + 0.4 * (2 * b - 1))
        mean = out.mean()
        out = mean + (out - mean) * (1 + 0.4 * (2 * c - 1))
        luma = (out * torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(0, keepdim=True)
        out = luma + (out - luma) * (0 if g < grey else 1 + 0.4 * (2 * s - 1))
        want.append(out.clamp(0, 1))
    torch.testing.assert_close(colour_jitter(images, draws, 0.4, grey), torch.stack(want), atol=1e-5, rtol=0)
    grey_ones = (u[:, 3] < grey).nonzero().flatten()
    assert len(grey_ones) == (0 if grey == 0 else pytest.approx(32, abs=12))
    found = colour_jitter(images, draws, 0.4, grey)[grey_ones]
    torch.testing.assert_close(found[:, 0], found[:, 2], atol=1e-5, rtol=0)


@pytest.mark.parametrize("flip", [True, False])
def test_a_random_view_is_an_affine_crop(flip: bool) -> None:
    images, draws = some(), Draws(3, [1] * 6, range(6))
    u = draws.stream("crop").uniform(5)
    theta = torch.zeros(6, 2, 3)
    for k, (area, x, y, mirror, stretch) in enumerate(u.tolist()):
        side, ratio = math.sqrt(0.5 + 0.5 * area), 1.2 ** (2 * stretch - 1)
        width, height = min(1, side * math.sqrt(ratio)), min(1, side / math.sqrt(ratio))
        sign = -1 if flip and mirror < 0.5 else 1
        theta[k] = torch.tensor([[width * sign, 0, (2 * x - 1) * (1 - width)], [0, height, (2 * y - 1) * (1 - height)]])
    grid = F.affine_grid(theta, [6, 3, 16, 16], align_corners=False)
    want = F.grid_sample(to_float(images), grid, padding_mode="border", align_corners=False)
    found = random_view(images, 16, draws, ratio=1.2, flip=flip)
    torch.testing.assert_close(found, want, atol=1e-4, rtol=0)
    assert found.min() >= 0
    assert found.max() <= 1
