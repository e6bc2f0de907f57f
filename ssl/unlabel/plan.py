"""From settings to a plan: defaults from the machine, the data and the first task; durations become steps, once."""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from unlabel import distributed, optim
from unlabel.config import PretrainConfig
from unlabel.errors import UserError
from unlabel.order import steps_for
from unlabel.precision import autocast, pick_precision

if TYPE_CHECKING:
    from unlabel.batches import Batches

__all__ = ["Plan", "check_settings", "freeze_unused", "make_plan", "measure"]

MEASURE_SECONDS = 5.0


@dataclass(frozen=True)
class Plan:
    """Every setting after defaults: from the machine, the data and the first task's recipe."""

    image_size: int
    batch_size: int
    steps: int
    lr: float
    weight_decay: float
    optimizer: str
    schedule: str
    crop: tuple[float, float]
    progressive: bool
    precision: str


def check_settings(config: PretrainConfig, classes: dict[str, Any], weights: Sequence[float]) -> None:
    if len(classes) != len(config.tasks):
        raise UserError(f"a task is named twice: {' '.join(config.tasks)}")
    if len(weights) != len(classes):
        raise UserError(f"{len(weights)} --weights for {len(classes)} tasks: give one per task")
    if len(classes) > 1 and any(cls.phases > 1 for cls in classes.values()):
        raise UserError("a task in several phases cannot be summed with other tasks")
    if config.epochs is not None and config.minutes is not None:
        raise UserError("give --epochs or --minutes, not both")
    positive = {
        "epochs": config.epochs,
        "minutes": config.minutes,
        "lr": config.lr,
        "batch-size": config.batch_size,
    }
    for name, value in positive.items():
        if value is not None and not value > 0:
            raise UserError(f"--{name} must be above zero, not {value}")
    if config.image_size is not None and not 16 <= config.image_size <= 1024:
        raise UserError(f"--image-size must lie between 16 and 1024, not {config.image_size}")


def make_plan(
    config: PretrainConfig, image_size: int, classes: dict[str, Any], model: nn.Module, batch_of: Batches,
    about: dict[str, Any] | None,
) -> Plan:  # fmt: skip
    """Defaults from the first task's recipe; durations become steps, once."""
    recipe = next(iter(classes.values())).recipe
    world, device = distributed.world_size(), batch_of.device
    progressive = (
        config.progressive if config.progressive is not None else all(c.recipe.progressive for c in classes.values())
    )
    n = len(batch_of.cache.names)
    plan = Plan(
        image_size, min(config.batch_size or recipe.batch_size, max(world, n)), 0,
        config.lr or recipe.lr, recipe.weight_decay if config.weight_decay is None else config.weight_decay,
        config.optimizer or recipe.optimizer, config.schedule or recipe.schedule, config.crop or recipe.crop,
        progressive, pick_precision(config.precision, device),
    )  # fmt: skip
    if plan.batch_size % world:
        raise UserError(f"batch size {plan.batch_size} is not a multiple of the {world} processes")
    if about is not None:  # a continued run keeps its steps, whatever this machine's speed
        return replace(plan, steps=about["resolved"]["steps"])
    epochs = config.epochs if config.epochs is not None else 20.0
    steps = steps_for(epochs, n, plan.batch_size)
    per_step = measure(model, plan, batch_of)
    if config.minutes is not None:
        steps = max(1, int(config.minutes * 60 / per_step))
    if distributed.is_main():
        print(f"cost: {steps} steps of {per_step:.2f} s, about {steps * per_step / 60:.1f} minutes")
    return replace(plan, steps=steps)


def measure(model: nn.Module, plan: Plan, batch_of: Batches) -> float:
    """Seconds per step, averaged over the sizes that training goes through. The model itself is not touched.

    Per size the median of up to ten steps in MEASURE_SECONDS, after two that warm up.
    """
    twin = copy.deepcopy(model).train()
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.0, momentum=0.9)
    total, steps = 0.0, 10_000
    batch_of.plan = replace(plan, steps=steps)
    at = 0.0
    for share, _ in optim.sizes(plan.image_size, plan.progressive):
        times: list[float] = []
        while len(times) < 5 or (len(times) < 12 and sum(times) < MEASURE_SECONDS):
            k, begun = len(times), time.perf_counter()
            batch = batch_of(int((at + share / 2) * steps) + k, progress=0.5)
            with autocast(batch_of.device, plan.precision):
                loss, _ = twin(batch)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if batch_of.device.type == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - begun)
        total += share * float(np.median(times[2:]))
        at += share
    return distributed.from_main(total)


def freeze_unused(model: Any, batch_of: Batches) -> tuple[str, ...]:
    """Weights of the backbone that no task reaches get no gradient: freeze them, and return their names."""
    twin = copy.deepcopy(model).train()
    batch = batch_of.fixed(4)
    twin(batch)[0].backward()
    names = tuple(n for n, p in twin.backbone.model.named_parameters() if p.grad is None)
    for name in names:
        model.backbone.model.get_parameter(name).requires_grad_(False)
    return names
