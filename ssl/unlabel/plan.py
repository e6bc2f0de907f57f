"""From settings to a plan: defaults from the machine, the data and the first task; durations become steps, once."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from unlabel import distributed, optim
from unlabel.backbone import SIDES
from unlabel.config import PretrainConfig
from unlabel.errors import UserError
from unlabel.order import steps_for
from unlabel.precision import autocast, pick_precision

if TYPE_CHECKING:
    from unlabel.batches import Batches

__all__ = ["EPOCHS", "Plan", "check_settings", "clock", "cost", "freeze_unused", "make_plan", "measure"]
__all__ += ["measured_before", "phases_of", "refuse_uneven"]

MOST_OF = (65_536, 64)  # any number of a task; blocks
MOST_STEPS, MOST_IMAGES, MOST_RATE = 10**12, 1 << 20, 1e6  # in a run; in a step; peak of the learning rate
EPOCHS = 20.0  # where neither --epochs nor --minutes is given
MEASURE_STEPS, MEASURE_SECONDS = 12, 5.0


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
    """Raises UserError for numbers that make no sense, before anything is spent."""
    if not all(math.isfinite(w) and w >= 0 for w in weights) or not any(weights):
        raise UserError(f"--weights {' '.join(f'{w:g}' for w in weights)}: from 0, and not all of them 0")
    if not 0 <= config.seed < 1 << 63:
        raise UserError(f"--seed {config.seed}: a whole number from 0, below 2**63")
    for task, own in config.task_settings.items():
        for key, value in own.items():
            for v in value if isinstance(value, list | tuple) else [value]:
                if isinstance(v, int | float) and not abs(v) <= MOST_OF[key == "blocks"]:  # also false for NaN
                    raise UserError(f"--{task}.{key.replace('_', '-')} {v}: at most {MOST_OF[key == 'blocks']:,}")
    if len(classes) != len(config.tasks):
        raise UserError(f"a task is named twice: {' '.join(config.tasks)}")
    if len(weights) != len(classes):
        raise UserError(f"{len(weights)} --weights for {len(classes)} tasks: give one per task")
    phases_of(classes)
    if config.compile and (those := [name for name, cls in classes.items() if not cls.compiles]):
        raise UserError(f"--compile does not work with {those[0]}, which takes second derivatives: leave it out")
    if config.epochs is not None and config.minutes is not None:
        raise UserError("give --epochs or --minutes, not both")
    positive = ("epochs", "minutes", "lr", "batch_size", "log_every", "checkpoint_every", "workers", "accumulate")
    positive += ("rank_timeout",)
    for name in (*positive, "weight_decay", "clip", "warmup"):
        value = getattr(config, name)
        low = value is not None and (value < 0 or (value == 0 and name in positive))
        if low or (value is not None and not math.isfinite(value)):
            least = "above" if name in positive else "from"
            raise UserError(f"--{name.replace('_', '-')} {value}: give a number {least} 0")
    if (config.lr or 0) > MOST_RATE or (config.batch_size or 0) > MOST_IMAGES:
        raise UserError(f"--lr is at most {MOST_RATE:g}, --batch-size at most {MOST_IMAGES:,}")
    if config.warmup >= 1:
        raise UserError(f"--warmup {config.warmup}: a share of the steps, below 1")
    if config.crop is not None and not 0 < config.crop[0] <= config.crop[1] <= 1:
        raise UserError(f"--crop {config.crop}: give two shares of the area in rising order, above 0 and up to 1")
    if config.image_size is not None and not SIDES[0] <= config.image_size <= SIDES[1]:
        raise UserError(f"--image-size must lie between {SIDES[0]} and {SIDES[1]}, not {config.image_size}")


def refuse_uneven(batch_size: int, accumulate: int, begun: bool) -> None:
    """UserError where not every process would get as many images as the others."""
    if batch_size % ((world := distributed.world_size()) * accumulate):
        times = f" times --accumulate {accumulate}" if accumulate > 1 else ""
        advice = "this run was begun with it, so take another number of those" if begun else "set --batch-size"
        raise UserError(f"batch size {batch_size} is not a multiple of the {world} processes{times}: {advice}")


def make_plan(
    config: PretrainConfig, image_size: int, classes: dict[str, Any], model: Any, batch_of: Batches,
    about: dict[str, Any] | None,
) -> Plan:  # fmt: skip
    """Defaults from the first task's recipe; durations become steps, once."""
    recipe = next(iter(classes.values())).recipe
    world, device = distributed.world_size(), batch_of.device
    progressive = (
        config.progressive if config.progressive is not None else all(c.recipe.progressive for c in classes.values())
    )
    n = len(batch_of.cache.names)
    # Not more than there are images, but two at least: BatchNorm needs a variance.
    shares = world * config.accumulate
    fitting = max(2 * shares, min(recipe.batch_size, n) // shares * shares)
    optimizer = config.optimizer or recipe.optimizer
    lr, decay = optim.rates_of(optimizer, recipe.optimizer, recipe.lr, recipe.weight_decay)
    plan = Plan(
        image_size, config.batch_size or fitting, 0,
        config.lr or lr, decay if config.weight_decay is None else config.weight_decay,
        optimizer, config.schedule or recipe.schedule, config.crop or recipe.crop,
        progressive, pick_precision(config.precision, device),
    )  # fmt: skip
    if about is not None:  # a continued run keeps what was resolved then, whatever this machine's speed
        plan = _resolved_before(about["resolved"], plan)
    refuse_uneven(plan.batch_size, config.accumulate, about is not None)
    batch_of.plan = plan
    _refuse_one_image(model, batch_of)
    if about is not None:
        return plan
    epochs = config.epochs if config.epochs is not None else EPOCHS
    if plan.batch_size > max(1024, 64 * n):
        raise UserError(
            f"a batch of {plan.batch_size:,} shows each of the {n:,} images dozens of times: set --batch-size"
        )
    if epochs * n / plan.batch_size > MOST_STEPS or (config.minutes or 0) > MOST_STEPS:
        raise UserError("--epochs or --minutes: more than anybody can wait for")
    steps = steps_for(epochs, n, plan.batch_size)
    if measured_before(config, phases_of(model.tasks)):
        per_step = measure(model, plan, batch_of)
        if config.minutes is not None:
            steps = max(1, int(config.minutes * 60 / per_step))
        if distributed.is_main():
            print(cost(steps, per_step), flush=True)
    return replace(plan, steps=steps)


def _resolved_before(resolved: dict[str, Any], now: Plan) -> Plan:
    """The plan in config.json, with this machine's precision."""
    kinds = {"int": int, "float": (int, float), "str": str, "bool": bool, "tuple[float, float]": list}
    for key, kind in Plan.__annotations__.items():
        value = resolved.get(key)
        if not isinstance(value, kinds[kind]) or (isinstance(value, bool) and kind != "bool"):
            raise UserError(f"config.json is not whole: its resolved {key} is {value!r}: choose another --out")
    known = {key: resolved[key] for key in Plan.__annotations__}
    plan = Plan(**{**known, "crop": tuple(known["crop"]), "precision": now.precision})
    if not (SIDES[0] <= plan.image_size <= SIDES[1] and plan.batch_size > 0 and plan.steps > 0 and len(plan.crop) == 2):
        raise UserError("config.json is not whole: its resolved settings make no sense: choose another --out")
    return plan


def phases_of(tasks: Mapping[str, Any]) -> int:
    """The phases of a run of these tasks, or of their classes."""
    phases = max(task.phases for task in tasks.values())
    if phases > 1 and len(tasks) > 1:
        raise UserError("a task in several phases cannot be summed with other tasks")
    return phases


def measured_before(config: PretrainConfig, phases: int) -> bool:
    """Whether a step is timed before the run and not in it: where minutes become steps, or phases differ in cost."""
    return config.minutes is not None or phases > 1


def cost(steps: int, per_step: float) -> str:
    """``per_step``: seconds."""
    return f"cost: {steps} steps of {per_step:.2f} s, about {steps * per_step / 60:.1f} minutes"


def clock(device: torch.device) -> float:
    """Seconds, when all that was asked of the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.monotonic()


def measure(model: nn.Module, plan: Plan, batch_of: Batches) -> float:
    """Seconds per step, averaged over the phases and the sizes of training. The model itself is not touched.

    Per size the median of up to MEASURE_STEPS, four or more, in MEASURE_SECONDS, but for the first two, which
    warm up.
    """
    twin: Any = copy.deepcopy(model)
    phases = phases_of(twin.tasks)
    return sum(_measure_phase(twin, phase, plan, batch_of) for phase in range(phases)) / phases


def _measure_phase(twin: Any, phase: int, plan: Plan, batch_of: Batches) -> float:
    for task in twin.tasks.values():
        task.begin(phase)
    twin.to(batch_of.device).train()
    groups = [g for task in twin.tasks.values() for g in task.param_groups()]
    optimizers = optim.make_optimizers(
        twin.backbone, groups, plan.optimizer, plan.lr, plan.weight_decay, plan.precision
    )
    total, steps = 0.0, 10_000
    batch_of.plan = replace(plan, steps=steps)
    at = 0.0
    for share, _ in optim.sizes(plan.image_size, plan.progressive):
        times: list[float] = []
        # All ranks do the same number of steps: a task may compute something together.
        while distributed.any_rank(
            batch_of.device, len(times) < 4 or (len(times) < MEASURE_STEPS and sum(times) < MEASURE_SECONDS)
        )[0]:
            k, begun = len(times), clock(batch_of.device)
            batch = batch_of(int((at + share / 2) * steps) + k, progress=0.5)
            with autocast(batch_of.device, plan.precision):
                loss, _ = twin(batch)
            loss.backward()
            part = clock(batch_of.device) - begun
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            times.append(clock(batch_of.device) - begun + (batch_of.parts - 1) * part)
        total += share * float(np.median(times[2:]))
        at += share
    return distributed.from_main(total)


def _refuse_one_image(model: Any, batch_of: Batches) -> None:
    """UserError where a step has a single image and BatchNorm would have a single value to take a variance of."""
    shares = distributed.world_size() * batch_of.parts
    if min(batch_of.plan.batch_size // shares, len(batch_of.cache.names)) > 1:
        return
    twin = copy.deepcopy(model).train()
    for task in twin.tasks.values():
        task.begin(0)
    try:
        with torch.no_grad():
            twin.to(batch_of.device)(batch_of.fixed(1))
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        raise UserError("one image at a time is too few for BatchNorm: more images, or a larger --batch-size") from None


def freeze_unused(model: Any, batch_of: Batches, phases: int) -> tuple[str, ...]:
    """Weights of the backbone that no task reaches in any phase get no gradient: freeze them, return their names."""
    twin = copy.deepcopy(model).train()
    used: set[str] = set()
    for phase in range(phases):
        for task in twin.tasks.values():
            task.begin(phase)
        twin.to(batch_of.device)(batch_of.fixed(4))[0].backward()
        used |= {n for n, p in twin.backbone.model.named_parameters() if p.grad is not None}
    names = tuple(n for n, _ in model.backbone.model.named_parameters() if n not in used)
    for name in names:
        model.backbone.model.get_parameter(name).requires_grad_(False)
    return names
