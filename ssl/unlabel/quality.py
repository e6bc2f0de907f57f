"""How close a repaired image is to the original: signal-to-noise ratio, structural similarity."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["psnr", "ssim"]

WINDOW, SIGMA = 11, 1.5
K1, K2 = 0.01, 0.03


def psnr(guess: Tensor, images: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each image, (N,) in dB, over all pixels and the three RGB channels, peak 1."""
    error = (guess.float().clamp(0, 1) - images.float()).square().mean((1, 2, 3))
    return -10 * error.clamp(min=1e-10).log10()


def ssim(a: Tensor, b: Tensor) -> Tensor:
    """Structural similarity of images (N, C, H, W) in [0, 1], H and W from 11: (N,), 1 for equal images.

    Wang et al. 2004 (https://doi.org/10.1109/TIP.2003.819861), equation 13, with their Gaussian window, averaged over
    the places where it fits and over the channels.
    """
    a, b = a.cpu().double(), b.cpu().double()  # differences of squares: single precision is not enough
    at = torch.arange(WINDOW, dtype=a.dtype) - WINDOW // 2
    bell = torch.exp(-(at**2) / (2 * SIGMA**2))
    bell = bell / bell.sum()
    channels = a.shape[1]
    window = (bell[:, None] * bell[None, :]).expand(channels, 1, WINDOW, WINDOW)

    def mean(x: Tensor) -> Tensor:
        return F.conv2d(x, window, groups=channels)

    mean_a, mean_b = mean(a), mean(b)
    var_a, var_b = mean(a * a) - mean_a**2, mean(b * b) - mean_b**2
    both = mean(a * b) - mean_a * mean_b
    c1, c2 = K1**2, K2**2
    score = (2 * mean_a * mean_b + c1) * (2 * both + c2) / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))
    return score.mean((1, 2, 3))
