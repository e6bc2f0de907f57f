"""THE loop: from images without labels to a backbone. It reads top to bottom and names no task."""

from __future__ import annotations

import contextlib
import signal
import sys
import time
import types
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from unlabel import checkpoint, distributed, optim
from unlabel.backbone import Backbone, build_backbone, channels_last, save_backbone
from unlabel.batches import Batches
from unlabel.batchnorm import estimate_statistics, sync_batchnorm
from unlabel.cache import write_skipped
from unlabel.config import PretrainConfig, plain
from unlabel.draws import mix, seed_everything
from unlabel.errors import UserError
from unlabel.init import begun, fetch, init_of, load_start, start_of
from unlabel.memory import keep_freed_memory
from unlabel.messages import describe, log_line, not_finite
from unlabel.order import phase_at
from unlabel.plan import (
    check_settings,
    clock,
    cost,
    freeze_unused,
    make_plan,
    measured_before,
    phases_of,
    refuse_uneven,
)
from unlabel.precision import autocast
from unlabel.previews import save_previews
from unlabel.runfolder import RunFolder
from unlabel.signals import Stopped, catch_signals
from unlabel.sources import open_source
from unlabel.start import (
    content_of,
    how_differ,
    load_images,
    load_weights_of,
    newest_state,
    refuse_foreign,
    refuse_odd_out,
    refuse_other_content,
    refuse_other_defaults,
    refuse_other_side,
    sealed,
    with_excluded,
)

__all__ = ["Together", "pretrain"]

CHECKPOINT_SECONDS = 300
PREVIEWS = 5  # at 0, 25, 50, 75 and 100 % of the steps


class Together(nn.Module):
    """The backbone and its tasks as one module, so that DDP wraps all of it. Sums the weighted losses."""

    def __init__(self, backbone: Backbone, tasks: Mapping[str, nn.Module], weights: Sequence[float]) -> None:
        super().__init__()
        self.backbone, self.tasks, self.weights = backbone, nn.ModuleDict(tasks), tuple(weights)

    def forward(self, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss () and everything that is logged, keyed ``task/metric``."""
        total, values = torch.zeros((), device=batch.images.device), {}
        for (name, task), weight in zip(self.tasks.items(), self.weights, strict=True):
            out = task(replace(batch, draws=batch.draws.stream(name)))
            total = total + weight * out["loss"]
            values |= {f"{name}/{k}": v.detach() for k, v in out.items()}
        return total, values


def pretrain(config: PretrainConfig, exclude: frozenset[str] = frozenset()) -> Path:
    """Pretrain, and return the run folder. A run that is already there is continued, or verified if finished.

    ``exclude``: content hashes of images that must not be trained on (``compare`` gives the test images).
    Raises UserError for what a person can put right, Stopped after a signal.
    """
    refuse_odd_out(config.out, config.data)
    refuse_foreign(config.out)
    device = distributed.pick_device(config.device)
    if device.type == "cpu":
        keep_freed_memory()
    distributed.start(device, config.rank_timeout)
    with (
        checkpoint.lock(config.out) if distributed.is_main() and not sealed(config.out) else contextlib.nullcontext(),
        distributed.naming_the_missing(),
    ):
        return _pretrain(config, device, exclude)


def _pretrain(config: PretrainConfig, device: torch.device, exclude: frozenset[str]) -> Path:
    from pretext import load_task  # here and not above: pretext imports this package

    # ---- 1. The run folder: is there something to continue?
    say = print if distributed.is_main() else (lambda *_, **__: None)
    classes = {name: load_task(name) for name in config.tasks}
    weights = config.weights or tuple(cls.loss_weight if len(classes) > 1 else 1.0 for cls in classes.values())
    check_settings(config, classes, weights)
    run = RunFolder(config.out)
    about = run.read()
    if config.batch_size is not None:
        refuse_uneven(config.batch_size, config.accumulate, about is not None)
    start = start_of(config.init, config.backbone, config.stem, about and about["settings"])
    config = replace(config, backbone=start.backbone, stem=start.stem)
    has_begun = begun(about, run.checkpoints)
    with distributed.in_turn():  # timm's weights, or a named set, may have to be downloaded
        fetched = None if has_begun else fetch(start)
        source = open_source(config.data)
    fingerprint = with_excluded(source.fingerprint, exclude)
    settings = {**config.fixed(), "init": init_of(start, about, fetched, has_begun)}
    if about is not None:
        run.same_or_refuse(settings, fingerprint, how_differ(about, source.fingerprint, run.left_out()))
        if run.finished():
            say(f"{config.out} is finished and verified: {about['finished']['steps']} steps")
            return config.out
    image_size = config.image_size or source.usual_size()

    # ---- 2. The model: one backbone, and the heads of the tasks; what does not fit is said before a pixel is decoded
    backbone = build_backbone(start.backbone, image_size, start.stem, config.seed, config.flip)
    state = newest_state(run, about)
    if state is None:
        load_start(start, backbone, fetched, say)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(mix(config.seed, "heads"))
        tasks = {n: cls(backbone, cls.Config(**config.task_settings.get(n, {}))) for n, cls in classes.items()}
    own = {n: plain(task.config) for n, task in tasks.items()}
    refuse_other_defaults(about, "settings of the tasks", "tasks", own)
    refuse_other_defaults(about, "--weights", "weights", list(weights), list(config.weights or [1.0] * len(tasks)))
    phases = phases_of(tasks)

    # ---- 3. The data, decoded once into the packed cache; and the plan
    cache = load_images(source, image_size, config, exclude, (about or {}).get("data", {}).get("content"))
    content = content_of(cache)
    if about is not None:
        refuse_other_side(about, cache.side, image_size)
        refuse_other_content(about, content)
    if distributed.is_main():
        write_skipped(run.path / "skipped.txt", cache.skipped)
        if exclude:
            checkpoint.write_atomic(run.excluded, "".join(f"{h}\n" for h in sorted(exclude)).encode())

    at = None if about is None else state["step"] if state else 0
    distributed.same_everywhere(
        (fingerprint[:12], content[:12], at), "the processes do not see the same --data and --out"
    )
    model = channels_last(Together(backbone, tasks, weights).to(device))
    flip = config.flip and all(cls.mirrors for cls in classes.values())
    batch_of = Batches(cache, config, flip, device)
    plan = make_plan(config, image_size, classes, model, batch_of, about)
    batch_of.plan = plan
    backbone.frozen = freeze_unused(model, batch_of, phases)
    resolved = {**vars(plan), "crop": list(plan.crop), "weights": list(weights), "tasks": own}
    if about is None and distributed.is_main():
        data = {"spec": list(config.data), "images": len(cache.names), "skipped": len(cache.skipped)}
        data |= {"side": cache.side, "content": content}
        data["shown_as"] = sorted({cls.sees for cls in classes.values()})
        run.begin(settings, config.free() | start.named(), resolved, fingerprint, data)
    describe(say, config, plan, cache, model, device)

    # ---- 4. Resume, optimisers, DDP
    step, seconds, phase = (state["step"], state["seconds"], state["phase"]) if state else (0, 0.0, 0)

    def begin(phase: int) -> tuple[nn.Module, list[torch.optim.Optimizer]]:
        seed_everything(config.seed, "begin", phase)  # what a task grows is the same in a continued run
        for task in tasks.values():
            task.begin(phase)
        channels_last(model.to(device))
        if config.sync_batchnorm:
            sync_batchnorm(model, device)
        groups = [g for task in tasks.values() for g in task.param_groups()]
        optimizers = optim.make_optimizers(backbone, groups, plan.optimizer, plan.lr, plan.weight_decay, plan.precision)
        return distributed.wrapped(model, device), optimizers

    for passed in range(phase):
        begin(passed)
    wrapped, optimizers = begin(phase)
    if state:
        load_weights_of(state, model, optimizers)
    if about is not None:
        say(f"continues from step {step} of {plan.steps}")
    if distributed.is_main():
        run.cut_metrics(step)
    if config.compile:  # what Backbone calls; off by default: seconds to minutes at each image size, and other bits
        backbone.model.forward_intermediates = torch.compile(backbone.model.forward_intermediates)

    def save(step: int) -> None:
        with torch.no_grad():
            everywhere = {k: distributed.mean(v) for k, v in sums.items()}
        if distributed.is_main():
            if not all(bool(torch.isfinite(p).all()) for p in model.parameters()):
                raise UserError(not_finite(step, {}, run))
            content = {"model": model.state_dict(), "optimizers": [o.state_dict() for o in optimizers]}
            content |= {"step": step, "seconds": seconds + time.monotonic() - started, "phase": phase}
            content |= {"sums": everywhere, "summed": summed}
            checkpoint.save(run.checkpoints, step, content)

    def preview(step: int) -> None:
        batch = batch_of.fixed()
        seed_everything(config.seed, "preview")
        folder = run.previews if distributed.is_main() else None
        save_previews(tasks, {n: replace(batch, draws=batch.draws.stream(n)) for n in tasks}, folder, step)

    # ---- 5. The loop
    every_log = config.log_every or max(1, plan.steps // 200)
    every_save = config.checkpoint_every or max(1, round(len(cache.names) / plan.batch_size))
    preview_at = {round(plan.steps * k / (PREVIEWS - 1)) for k in range(PREVIEWS)}
    started = last_save = last_log = warm = time.monotonic()
    sums: dict[str, Tensor] = {k: v.to(device) for k, v in state["sums"].items()} if state else {}
    summed, timed = (state["summed"], 0) if state else (0, 0)  # steps in the sums; steps since the last log line
    untold = about is None and not measured_before(config, phases)
    if step == 0:
        preview(0)
    bar = tqdm(
        total=plan.steps * plan.batch_size, initial=step * plan.batch_size, unit="img", unit_scale=True,
        desc="+".join(tasks), disable=not distributed.is_main(), mininterval=1.0, dynamic_ncols=True,
    )  # fmt: skip
    with catch_signals() as caught, bar:
        while step < plan.steps:
            now, progress = phase_at(step, plan.steps, phases)
            if now != phase:
                phase = now
                wrapped, optimizers = begin(phase)
            seed_everything(config.seed, step, distributed.rank())
            optim.set_rates(optimizers, optim.rate_at(progress, config.warmup, plan.schedule))
            wrapped.train()
            for part in range(config.accumulate):
                batch = batch_of(step, progress, part)
                with distributed.gradients_shared(wrapped, part == config.accumulate - 1):
                    with autocast(device, plan.precision):
                        loss, values = wrapped(batch)
                    (loss / config.accumulate).backward()
                for k, v in {"loss": loss.detach(), **values}.items():
                    sums[k] = sums.get(k, 0) + v / config.accumulate  # no .item(): it would wait for the device
            trained = [p for o in optimizers for g in o.param_groups for p in g["params"]]
            if config.clip > 0:
                torch.nn.utils.clip_grad_norm_(trained, config.clip)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            step, summed, timed = step + 1, summed + 1, timed + 1
            bar.update(plan.batch_size)
            warm = clock(device) if step == 2 else warm
            if step == 5 and untold and distributed.is_main():
                per_step = (clock(device) - warm) / 3 * optim.size_factor(image_size, plan.progressive)
                bar.write(cost(plan.steps, per_step))
                sys.stdout.flush()  # else it comes at the end where stdout is a pipe

            due = time.monotonic() - last_save > CHECKPOINT_SECONDS or step % every_save == 0 or step == plan.steps
            log_due = step % every_log == 0 or step == plan.steps
            if (log_due or due) and not bool(torch.isfinite(sums["loss"])):
                raise UserError(not_finite(step, sums, run))
            if log_due:
                speed = timed * plan.batch_size / (time.monotonic() - last_log)
                line = log_line(sums, summed, step, plan, len(cache.names), optimizers, speed, batch, tasks)
                if distributed.is_main():
                    run.log(line)
                bar.set_postfix(loss=f"{line['loss']:.3f}", refresh=False)
                sums, summed, timed, last_log = {}, 0, 0, time.monotonic()
            if step in preview_at:
                preview(step)
            stop, due = distributed.any_rank(device, bool(caught), due)
            signum = stop and (caught[0] if caught else signal.SIGTERM)
            if due or signum:
                save(step)
                last_save = time.monotonic()
            if signum:
                distributed.barrier()  # until rank 0 has saved: torchrun kills what outlives the first to leave
                raise Stopped(signum, step)

    # ---- 6. The product: BatchNorm statistics on clean images, then weights only
    seconds += time.monotonic() - started
    seed_everything(config.seed, "finish")
    if config.sync_batchnorm:  # synchronised layers wait for one another here, too
        estimate_statistics(backbone, batch_of.clean())
    with distributed.in_turn():  # rank 0 may take longer than others wait in a barrier
        if distributed.is_main():
            if not config.sync_batchnorm:
                estimate_statistics(backbone, batch_of.clean())
            path = save_backbone(backbone, run.path)
            run.finish(path, {"steps": plan.steps, "images_seen": plan.steps * plan.batch_size, "seconds": seconds})
    distributed.barrier()
    say(f"{run.path / 'backbone.safetensors'}: {plan.steps} steps, {plan.steps * plan.batch_size:,} images seen")
    return run.path


class _CallableModule(types.ModuleType):
    """``unlabel.pretrain`` is both this module and the public function: importing the one must not hide the other."""

    def __call__(self, config: PretrainConfig, exclude: frozenset[str] = frozenset()) -> Path:
        return pretrain(config, exclude)


sys.modules[__name__].__class__ = _CallableModule
