"""What the loop tells: lines of metrics.jsonl, the first lines on the screen, why a loss stopped it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from unlabel import distributed
from unlabel.cache import ImageCache
from unlabel.config import PretrainConfig
from unlabel.plan import Plan
from unlabel.runfolder import RunFolder

__all__ = ["describe", "log_line", "not_finite"]


def log_line(
    sums: dict[str, Tensor], n: int, step: int, plan: Plan, images: int,
    optimizers: list[torch.optim.Optimizer], speed: float, batch: Any, tasks: Mapping[str, Any],
) -> dict[str, Any]:  # fmt: skip
    everywhere = distributed.mean(torch.stack([v.float() for v in sums.values()])) / n
    means = dict(zip(sums, everywhere.tolist(), strict=True))
    with torch.no_grad():
        trivial = {
            f"{name}/{k}": float(v)
            for name, task in tasks.items()
            for k, v in task.trivial(replace(batch, draws=batch.draws.stream(name))).items()
        }
    return {
        "step": step,
        "epoch": round(step * plan.batch_size / images, 4),
        "loss": means.pop("loss"),
        "metrics": means,
        "trivial": trivial,
        "lr": optimizers[0].param_groups[0]["lr"],
        "images_per_second": round(speed, 1),
    }


def not_finite(step: int, values: dict[str, Tensor], run: RunFolder) -> str:
    bad = [k for k, v in values.items() if not bool(torch.isfinite(v).all())]
    what = ", ".join(bad) or "a weight"
    last = max((p.name for p in run.checkpoints.glob("step-*.pt")), default="none")
    start = f" (--init {run.path} starts from that checkpoint)" if last != "none" else ""
    return (
        f"{what} is not finite near step {step} (last good checkpoint: {last}): try a lower --lr or --precision fp32, "
        f"in another --out{start}"
    )


def describe(say: Any, config: PretrainConfig, plan: Plan, cache: ImageCache, model: Any, device: torch.device) -> None:
    weights = sum(p.numel() for p in model.backbone.parameters())
    skipped = f", {len(cache.skipped)} skipped (skipped.txt)" if cache.skipped else ""
    say(
        f"data: {len(cache.names):,} images{skipped}; {plan.image_size} px; "
        f"backbone {config.backbone}, {weights / 1e6:.1f} M weights"
    )
    say(
        f"{plan.optimizer}, peak lr {plan.lr:g}, weight decay {plan.weight_decay:g}, batch {plan.batch_size}, "
        f"{plan.precision} on {device}, {distributed.world_size()} process(es)"
    )
    if model.backbone.frozen:
        say(f"without gradient, frozen: {', '.join(model.backbone.frozen)}")
