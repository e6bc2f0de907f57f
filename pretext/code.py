"""The bottleneck of the autoencoder family: the last feature map to a code, and a code to an image."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretext.decoder import Decoder, DenseDecoder, at_least_float32, feature_side, resize
from unlabel.backbone import Backbone
from unlabel.mlp import Mlp

__all__ = ["Code", "bernoulli_divergence"]


class Code(nn.Module):
    """``numbers`` · ``size`` numbers per image, from which (the first ``size`` of them) an image is painted again.

    Behind a ConvNet the decoder is convolutional; behind a dense network it is its mirror image.
    """

    def __init__(self, backbone: Backbone, size: int, numbers: int = 1, fine: int = 16) -> None:
        super().__init__()
        self.side = feature_side(backbone)
        self.into = nn.Linear(backbone.channels * self.side**2, numbers * size)
        self.decoder: nn.Module
        if isinstance(backbone.model, Mlp):
            self.decoder = DenseDecoder(size, backbone.model)
        else:
            self.decoder = FromCode(size, self.side, backbone.spec.image_size, fine)

    def encode(self, last: Tensor) -> Tensor:
        """``Features.last`` (N, C, h, w) to (N, numbers · size) float32."""
        # The layer's size is fixed; where images are smaller than the backbone was made for, stretch the map.
        return at_least_float32(self.into(resize(last, self.side).flatten(1)))

    def decode(self, code: Tensor, size: int) -> Tensor:
        """(N, size of the code) to (N, 3, size, size) float32."""
        return self.decoder(code, size)


class FromCode(nn.Module):
    """Codes (N, code) to images (N, 3, size, size): a linear layer to a small map, then ``Decoder``."""

    def __init__(self, code: int, side: int, size: int, fine: int) -> None:
        super().__init__()
        self.shape = (4 * fine, side, side)
        self.out = nn.Linear(code, 4 * fine * side**2)
        self.decoder = Decoder(4 * fine, side, size, fine)

    def forward(self, code: Tensor, size: int) -> Tensor:
        maps = self.out(code).view(len(code), *self.shape)
        return self.decoder(F.relu(maps), size)


def bernoulli_divergence(logits: Tensor, images: Tensor) -> Tensor:
    """(N, 3, H, W) each: binary cross-entropy in nats, less the images' own entropy, which is the least it can be.

    images in [0, 1]. The gradient is that of the cross-entropy; a perfect answer scores 0, whatever the image.
    """
    entropy = -(torch.xlogy(images, images) + torch.xlogy(1 - images, 1 - images))
    return F.binary_cross_entropy_with_logits(logits, images, reduction="none") - entropy
