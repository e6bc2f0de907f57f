"""A dense backbone, ``mlp:1000-500-250``: flattened pixels through layers of those widths, which are its stages."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from unlabel.errors import UserError

__all__ = ["ACTIVATIONS", "Mlp", "dense_layer", "is_mlp", "make_mlp"]

PREFIX = "mlp:"
ACTIVATIONS = {"relu": nn.ReLU, "gelu": nn.GELU, "tanh": nn.Tanh, "sigmoid": nn.Sigmoid, "linear": nn.Identity}


def is_mlp(name: str) -> bool:
    return name.startswith(PREFIX)


def dense_layer(before: int, after: int, activation: str, norm: bool) -> nn.Sequential:
    """A linear layer, BatchNorm if ``norm``, and the activation."""
    middle = [nn.BatchNorm1d(after)] if norm else []
    return nn.Sequential(nn.Linear(before, after, bias=not norm), *middle, ACTIVATIONS[activation]())


class Layer(nn.Module):
    """A dense layer on (N, C, 1, 1)."""

    def __init__(self, before: int, after: int, activation: str) -> None:
        super().__init__()
        self.dense = dense_layer(before, after, activation, norm=activation != "linear")

    def forward(self, x: Tensor) -> Tensor:
        return self.dense(x.flatten(1))[:, :, None, None]


class Mlp(nn.Module):
    """Images (N, 3, H, W), resized to ``size`` px where they are not, to (N, C, 1, 1) after each layer.

    Each layer is linear, BatchNorm, activation; with the activation ``linear`` it is linear alone, so that an
    autoencoder of such layers spans what principal components span.
    """

    def __init__(self, widths: tuple[int, ...], size: int, activation: str = "relu") -> None:
        super().__init__()
        self.widths, self.size, self.activation = widths, size, activation
        sizes = (3 * size * size, *widths)
        pairs = zip(sizes, widths, strict=False)
        self.layers = nn.ModuleList(Layer(a, b, activation) for a, b in pairs)

    def forward_intermediates(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The last layer's output, and every layer's, as timm's networks give them."""
        if x.shape[-2:] != (self.size, self.size):
            side, smaller = (self.size, self.size), x.shape[-1] > self.size
            x = F.interpolate(x, size=side, mode="bilinear", antialias=smaller, align_corners=False)
        x = x.flatten(1)[:, :, None, None]
        maps = []
        for layer in self.layers:
            x = layer(x)
            maps.append(x)
        return maps[-1], maps


def make_mlp(name: str, size: int) -> Mlp:
    """The network that ``mlp:WIDTH-WIDTH…`` or ``mlp:WIDTH-WIDTH…:ACTIVATION`` names, for images of ``size`` px."""
    widths, _, activation = name.removeprefix(PREFIX).partition(":")
    numbers = widths.split("-")
    if not all(n.isascii() and n.isdecimal() and len(n) < 7 and int(n) > 0 for n in numbers) or len(numbers) > 64:
        raise UserError(f"--backbone {name[:80]}: widths are whole numbers joined by -, as mlp:1000-500-250")
    if (activation or "relu") not in ACTIVATIONS:
        raise UserError(f"--backbone {name}: unknown activation {activation!r}: choose from {', '.join(ACTIVATIONS)}")
    return Mlp(tuple(int(n) for n in numbers), size, activation or "relu")
