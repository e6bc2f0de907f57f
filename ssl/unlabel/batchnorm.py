"""BatchNorm statistics on the images that the backbone will see, not on those that the pretext task showed it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

import torch
from timm.layers.norm_act import convert_sync_batchnorm
from torch import Tensor, nn

from unlabel import distributed
from unlabel.errors import UserError

__all__ = ["estimate_statistics", "frozen_statistics", "has_batchnorm", "sync_batchnorm", "unmoved_statistics"]


def has_batchnorm(model: nn.Module) -> bool:
    return any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules())


def sync_batchnorm(model: nn.Module, device: torch.device) -> None:
    """Let BatchNorm take its statistics over all processes. Raises UserError on CPUs, where torch cannot."""
    if distributed.world_size() == 1:
        return
    if device.type != "cuda":
        raise UserError(
            "--sync-batchnorm: torch has it for GPUs only; elsewhere statistics are taken in each process, or take a "
            "network without BatchNorm, such as --backbone convnext_atto"
        )
    convert_sync_batchnorm(model)  # in place; timm's also knows layers that hold an activation


@torch.no_grad()
def estimate_statistics(backbone: nn.Module, batches: Iterable[Tensor]) -> int:
    """Replace running statistics by the averages over clean, upright, unmasked batches (N, 3, H, W).

    Statistics gathered on rotated, masked or noisy batches do not fit clean ones. The average is the cumulative
    one over all batches. Returns the number of BatchNorm layers.
    """
    layers = [m for m in backbone.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    if not layers:
        return 0
    was_training, momenta = backbone.training, [m.momentum for m in layers]
    backbone.eval()
    for layer in layers:
        layer.reset_running_stats()
        layer.momentum = None  # cumulative average
        layer.train()
    for images in batches:
        backbone(images if len(images) > 1 else images.repeat(2, 1, 1, 1))  # one image has no variance at 1×1
    for layer, momentum in zip(layers, momenta, strict=True):
        layer.momentum = momentum
    backbone.train(was_training)
    return len(layers)


@contextlib.contextmanager
def frozen_statistics(backbone: nn.Module) -> Iterator[None]:
    """Inside, BatchNorm uses its running statistics and does not move them; everything else stays in its mode.

    It uses copies of them: a gradient needs them later, and torch does not notice when a batch has moved them by then.
    """
    layers = [m for m in backbone.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.training]
    kept = [(layer, layer.running_mean, layer.running_var) for layer in layers]
    for layer, mean, var in kept:
        layer.eval()
        layer.running_mean, layer.running_var = (None if x is None else x.clone() for x in (mean, var))
    try:
        yield
    finally:
        for layer, mean, var in kept:
            layer.train()
            layer.running_mean, layer.running_var = mean, var


@contextlib.contextmanager
def unmoved_statistics(backbone: nn.Module) -> Iterator[None]:
    """Inside, BatchNorm in training mode uses those of the batch, as ever, and its running statistics stay."""
    layers = [m for m in backbone.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]
    for layer in layers:
        layer.track_running_stats = False
    try:
        yield
    finally:
        for layer in layers:
            layer.track_running_stats = True
