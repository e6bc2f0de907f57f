"""Parameter groups, optimisers and the learning rate as a pure function of progress."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from unlabel.muon import Muon

__all__ = ["UNTUNED", "make_optimizers", "rate_at", "rates_of", "set_rates", "size_at", "size_factor"]

# Peak learning rate and weight decay where nobody gave any. SGD's decay is a gradient, multiplied by the rate; that of
# AdamW and Muon is taken from the weights beside it: the same number means something else.
UNTUNED = {"sgd": (0.1, 5e-4), "adamw": (1e-3, 0.05), "muon": (1e-3, 0.05)}

# Share of the steps, share of the image size: the small sizes give many more passes for the same minutes.
_PROGRESSIVE = ((0.60, 0.625), (0.85, 0.75), (1.0, 1.0))


def size_at(progress: float, image_size: int, progressive: bool) -> int:
    """Side of the training images at ``progress`` (0..1), a multiple of 8; 64 px: 40, 48, then 64."""
    if not progressive or image_size < 48:
        return image_size
    share = next(s for until, s in _PROGRESSIVE if progress < until or until == 1.0)
    return image_size if share == 1 else max(32, round(image_size * share / 8) * 8)


def sizes(image_size: int, progressive: bool) -> list[tuple[float, int]]:
    """(share of the steps, image side) of each stretch of training."""
    if not progressive or image_size < 48:
        return [(1.0, image_size)]
    starts = [0.0, *(until for until, _ in _PROGRESSIVE[:-1])]
    ends = [until for until, _ in _PROGRESSIVE]
    return [(b - a, size_at((a + b) / 2, image_size, True)) for a, b in zip(starts, ends, strict=True)]


def size_factor(image_size: int, progressive: bool) -> float:
    """Pixels of all of training ÷ what they would be if it stayed at its first size."""
    stretches = sizes(image_size, progressive)
    return sum(share * size**2 for share, size in stretches) / stretches[0][1] ** 2


def rate_at(progress: float, warmup: float, schedule: str) -> float:
    """Factor on the peak learning rate: linear warm-up from 4 %, then a half cosine to 0, or three drops by 5."""
    if warmup > 0 and progress < warmup:
        return 0.04 + 0.96 * progress / warmup
    after = (progress - warmup) / max(1e-12, 1 - warmup)
    if schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * min(1.0, after)))
    return 0.2 ** sum(after >= at for at in (0.3, 0.6, 0.8))


def rates_of(optimizer: str, known_for: str, lr: float, weight_decay: float) -> tuple[float, float]:
    """``lr`` and ``weight_decay``, which suit ``known_for``, or those of UNTUNED if ``optimizer`` is another kind."""
    alike = (optimizer == "sgd") == (known_for == "sgd")  # what suits AdamW suits Muon, and the other way round
    return (lr, weight_decay) if alike else UNTUNED[optimizer]


def _split(params: Iterable[nn.Parameter]) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    kept = [p for p in params if p.requires_grad]
    return [p for p in kept if p.ndim > 1], [p for p in kept if p.ndim <= 1]


def make_optimizers(
    backbone: nn.Module,
    task_groups: list[dict[str, Any]],
    optimizer: str,
    lr: float,
    weight_decay: float,
    precision: str = "fp32",
) -> list[torch.optim.Optimizer]:
    """One optimiser per kind asked for. Vectors (biases, norm layers) get no weight decay.

    ``muon`` is for the backbone's matrices: its vectors, and the tasks' heads, which it does not pay for, have AdamW.
    ``precision``, fp32 or bf16, is that of Muon's products. A group with an ``optimizer`` of its own, of another kind
    than the run's, has rates of that kind (UNTUNED) under its ``lr_scale``.
    """
    groups = [{"params": list(backbone.parameters())}, *task_groups]
    by_kind: dict[str, list[dict[str, Any]]] = {}
    for group in groups:
        options = {k: v for k, v in group.items() if k not in ("params", "optimizer", "lr_scale", "weight_decay")}
        base, decay = rates_of(group.get("optimizer", optimizer), optimizer, lr, weight_decay)
        decay = group.get("weight_decay", decay)
        for params, wd in zip(_split(group["params"]), (decay, 0.0), strict=True):
            if params:
                kind = group.get("optimizer", optimizer)
                if kind == "muon" and (group is not groups[0] or params[0].ndim < 2):
                    kind = "adamw"
                peak = float(base * group.get("lr_scale", 1.0))  # numpy's kind cannot be in a checkpoint
                entry = {"params": params, "lr": peak, "peak": peak, "weight_decay": wd, **options}
                by_kind.setdefault(kind, []).append(entry)
    made: list[torch.optim.Optimizer] = []
    fused = next(backbone.parameters()).device.type in ("cpu", "cuda")  # all of an update in one pass over the memory
    for kind, entries in by_kind.items():
        if kind == "sgd":
            made.append(torch.optim.SGD(entries, lr=lr, momentum=0.9, nesterov=True, fused=fused))
        elif kind == "adamw":
            made.append(torch.optim.AdamW(entries, lr=lr, fused=fused))
        elif kind == "muon":
            made.append(Muon(entries, lr=lr, precision=precision))
        else:
            raise ValueError(f"unknown optimizer {kind!r}: sgd, adamw or muon")
    return made


def set_rates(optimizers: list[torch.optim.Optimizer], factor: float) -> None:
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * factor
