"""Muon: momentum whose matrices are made orthogonal before they are added (Jordan et al. 2024,
https://kellerjordan.github.io/posts/muon/), in steps of AdamW's size and with its decay (Liu et al. 2025,
https://arxiv.org/abs/2502.16982). timm has one, too, always in bf16; torch's takes no convolutions.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

__all__ = ["Muon", "orthogonal"]

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # singular values go to 0.7 … 1.2 in five steps, not to 1: that is enough
STEPS = 5


def orthogonal(matrix: Tensor, precision: str = "fp32") -> Tensor:
    """The orthogonal factor of (m, n), about: its singular values become 0.7 to 1.2 (Newton-Schulz, quintic).

    ``precision``: fp32 or bf16, of the products.
    """
    a, b, c = COEFFICIENTS
    x = matrix.to(torch.bfloat16 if precision == "bf16" else torch.float32)
    if tall := x.shape[0] > x.shape[1]:
        x = x.mT
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(STEPS):
        square = x @ x.mT
        x = torch.addmm(x, torch.addmm(square, square, square, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).to(matrix.dtype)


class Muon(torch.optim.Optimizer):
    """For weights of two dimensions or more: (out, in, kernel, kernel) is a matrix of ``out`` rows."""

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        weight_decay: float = 0.0,
        momentum: float = 0.95,
        precision: str = "fp32",
    ) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})
        self.precision = precision

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            lr, momentum = group["lr"], group["momentum"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                if not self.state[p]:
                    self.state[p]["momentum_buffer"] = torch.zeros_like(p)
                average = self.state[p]["momentum_buffer"]
                average.lerp_(p.grad, 1 - momentum)
                ahead = p.grad.lerp(average, momentum)  # Nesterov's
                ahead = ahead.movedim(1, -1)  # as it lies in memory; the order of columns changes nothing
                update = orthogonal(ahead.flatten(1), self.precision)
                # An orthogonal (m, n) has a root mean square of 1 / sqrt(max(m, n)); AdamW's steps have about 0.2.
                size = 0.2 * max(update.shape) ** 0.5
                p.mul_(1 - lr * group["weight_decay"]).add_(update.view(ahead.shape).movedim(-1, 1), alpha=-lr * size)
