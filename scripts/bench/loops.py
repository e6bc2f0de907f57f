"""Contenders of the benchmark: training as fast as it can be, by ``unlabel pretrain``, and as a person would write it.

All train the same modules, the pretext task with its head on the same backbone, on the same images with the same batch
size. They run in turns, block by block, so that a machine that is slower for a while is so for all of them.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from peers import Blocks, Measure, Unavailable, batches, lightly_epochs, stable_pretraining_epochs
from photos import packed_in
from torch import Tensor, nn
from torchvision import transforms
from torchvision.datasets import ImageFolder

from pretext import load_task
from pretext.task import Batch
from unlabel import optim
from unlabel.backbone import build_backbone, channels_last
from unlabel.batches import Batches
from unlabel.cache import ImageCache, load_cache
from unlabel.config import PretrainConfig
from unlabel.draws import Draws
from unlabel.memory import keep_freed_memory
from unlabel.plan import Plan
from unlabel.precision import autocast, pick_precision
from unlabel.pretrain import Together, pretrain
from unlabel.runfolder import RunFolder
from unlabel.sources import open_source

__all__ = ["Setting", "best_workers", "blocks_of_steps", "limit", "race", "same_speed_for_more_images", "unlabel_run"]

CPU = torch.device("cpu")
EPOCH = 20_000  # images: how often the loop saves a checkpoint, as it would with so many
PLANNED = 200  # epochs of a run that is stopped after a few: it draws previews and logs as often as a run does


@dataclass(frozen=True)
class Setting:
    """What is trained on what. ``images`` (of ``folder``, all of them) are an epoch, and a contender's block."""

    task: str
    network: str
    folder: Path
    images: int
    size: int = 64
    device: torch.device = CPU
    batch: int | None = None  # the task's own

    @property
    def batch_size(self) -> int:
        return self.batch or load_task(self.task).recipe.batch_size

    def model(self) -> Together:
        torch.manual_seed(0)
        backbone = build_backbone(self.network, self.size)
        cls = load_task(self.task)
        return Together(backbone, {self.task: cls(backbone, cls.Config())}, (1.0,)).train()

    def batches(self, cache: ImageCache) -> Batches:
        """The library's own, for a loop of our own."""
        recipe = load_task(self.task).recipe
        made = Batches(cache, PretrainConfig((self.task,), (str(self.folder),), Path()), True, self.device)
        made.plan = Plan(
            self.size, self.batch_size, 10_000, recipe.lr, recipe.weight_decay, recipe.optimizer, recipe.schedule,
            recipe.crop, False, pick_precision("auto", self.device),
        )  # fmt: skip
        return made

    def own_step(self) -> Callable[[Batch], None]:
        """Forward, backward, update, in the best precision and layout of this machine."""
        recipe, precision = load_task(self.task).recipe, pick_precision("auto", self.device)
        model = channels_last(self.model().to(self.device))
        groups = [g for task in model.tasks.values() for g in task.param_groups()]  # type: ignore[operator]
        optimizers = optim.make_optimizers(
            model.backbone, groups, recipe.optimizer, recipe.lr, recipe.weight_decay, precision
        )

        def step(batch: Batch) -> None:
            with autocast(self.device, precision):
                loss, _ = model(batch)
            loss.backward()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)

        return step


class Views(nn.Module):
    """The task as a network of (N, 3, S, S): with a head, a loss, and images that a peer has made."""

    def __init__(self, model: Together) -> None:
        super().__init__()
        self.model, self.seen = model, 0

    def forward(self, images: Tensor) -> Tensor:
        self.seen += 1
        return self.model(Batch(images, Draws(0, [self.seen] * len(images), range(len(images))), 0.5))[0]


def limit(setting: Setting, workers: int) -> Measure:
    """Steps on one batch that is already in memory."""
    keep_freed_memory()
    cache = load_cache(open_source(str(setting.folder)), setting.size, progress=False, write=False)
    step, batch = setting.own_step(), setting.batches(cache)(0, 0.5)
    return partial(blocks_of_steps, step, iter(lambda: batch, None), setting.batch_size, 0)


def plain(setting: Setting, workers: int, by_hand: bool) -> Measure:
    """``ImageFolder``, ``DataLoader``, torchvision's transforms, a loop in fp32; ``by_hand``: bf16, channels-last."""
    area = load_task(setting.task).recipe.crop
    transform = transforms.Compose(
        [
            transforms.RandomResizedCrop(setting.size, scale=area, ratio=(1.0, 1.0)),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
        ]
    )
    loader = batches(ImageFolder(str(setting.folder), transform), setting.batch_size, workers)
    model = Views(setting.model())
    model = channels_last(model) if by_hand else model
    updates = torch.optim.AdamW(model.parameters(), lr=1e-3)

    def forever() -> Iterator[Tensor]:
        while True:
            for images, _ in loader:
                yield images.to(memory_format=torch.channels_last) if by_hand else images

    def step(images: Tensor) -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=by_hand):
            loss = model(images)
        updates.zero_grad()
        loss.backward()
        updates.step()

    return partial(blocks_of_steps, step, forever(), setting.batch_size, workers)


def blocks_of_steps(
    step: Callable, feed: Iterator, batch_size: int, workers: int, images: int, blocks: int, on_block
) -> None:
    timer = Blocks(images, blocks, batch_size, workers, on_block)
    for _ in range(timer.total):
        step(next(feed))
        timer.step_done()


def lightly(setting: Setting, workers: int) -> Measure:
    model, adamw = Views(setting.model()), partial[torch.optim.Optimizer](torch.optim.AdamW, lr=1e-3)
    return lightly_epochs(setting.folder, setting.size, setting.batch_size, model, adamw, workers)


def stable_pretraining(setting: Setting, workers: int) -> Measure:
    model, adamw = Views(setting.model()), partial[torch.optim.Optimizer](torch.optim.AdamW, lr=1e-3)
    return stable_pretraining_epochs(setting.folder, setting.size, setting.batch_size, model, adamw, workers)


class Enough(Exception):
    """The run has gone as far as it is measured."""


def unlabel_run(setting: Setting, epochs: int, on_epoch: Callable[[float, int], None]) -> None:
    """What the command runs, from an empty cache, for its first ``epochs``: ``on_epoch`` gets the seconds of each.

    The first begins where the command does after its imports, and packs the images. Between the epochs others may run:
    that is not timed.
    """
    epoch = setting.images // setting.batch_size
    with tempfile.TemporaryDirectory() as temporary, packed_in(f"{temporary}/cache"):
        config = PretrainConfig(
            (setting.task,), (str(setting.folder),), Path(temporary) / "run", backbone=setting.network,
            image_size=setting.size, epochs=PLANNED, log_every=epoch, progressive=False, batch_size=setting.batch_size,
            device="cpu" if setting.device.type == "cpu" else "cuda",
            checkpoint_every=max(1, EPOCH // setting.batch_size),
        )  # fmt: skip
        log, begun, left = RunFolder.log, time.perf_counter(), epochs

        def logged(self: RunFolder, line: dict) -> None:
            nonlocal begun, left
            log(self, line)
            on_epoch(time.perf_counter() - begun, epoch * setting.batch_size)
            left -= 1
            if not left:
                raise Enough
            begun = time.perf_counter()

        RunFolder.log = logged
        try:
            quiet = contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO())
            with contextlib.suppress(Enough), quiet[0], quiet[1]:
                begun = time.perf_counter()
                pretrain(config)
        finally:
            RunFolder.log = log


CONTENDERS: dict[str, Callable[[Setting, int], Measure]] = {
    "limit": limit,
    "plain_fp32": partial(plain, by_hand=False),
    "plain_bf16": partial(plain, by_hand=True),
    "lightly": lightly,
    "stable_pretraining": stable_pretraining,
}


def contend(name: str, setting: Setting, workers: int, blocks: int) -> None:
    """A contender in a process of its own: for each line of the input one block, whose seconds and images it prints."""
    answers = sys.stdout

    def on_block(seconds: float, images: int) -> None:
        print(json.dumps([seconds, images]), file=answers, flush=True)
        sys.stdin.readline()

    sys.stdin.readline()
    if name == "unlabel":
        return unlabel_run(setting, blocks, on_block)
    try:
        measure = CONTENDERS[name](setting, workers)
    except Unavailable as reason:
        print(json.dumps(str(reason)), file=answers, flush=True)
    else:
        measure(setting.images, blocks, on_block)


class Contender:
    """``contend`` from outside."""

    def __init__(self, name: str, setting: Setting, workers: int, blocks: int) -> None:
        about = [setting.task, setting.network, str(setting.folder), str(setting.images), str(workers), str(blocks)]
        command = [sys.executable, str(Path(__file__)), name, *about]
        self.folder = tempfile.TemporaryDirectory()
        self.errors = Path(self.folder.name) / "errors"  # a pipe that nobody reads would fill up and stop it
        with open(self.errors, "w") as errors:
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True,
                env={**os.environ, "TMPDIR": self.folder.name},
            )  # fmt: skip

    def block(self) -> tuple[float, int] | str:
        """Seconds and images of the next block, or why there is none."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        if line := self.process.stdout.readline():
            return json.loads(line)
        raise RuntimeError(self.errors.read_text()[-3000:])

    def __enter__(self) -> Contender:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()
        self.folder.cleanup()


def race(
    setting: Setting, first: Setting | None, rounds: int, workers: dict[str, int], peers: bool
) -> dict[str, list[float] | str]:
    """Images per second of every contender in each round; for a peer that cannot be had, why not.

    ``first``: what a run of one epoch is started on in each round, if the speed of first epochs is wanted.
    """
    names = ["limit", "plain_fp32", "plain_bf16", *(["lightly", "stable_pretraining"] if peers else [])]
    wanted = workers | {"lightly": workers["plain_fp32"], "stable_pretraining": workers["plain_bf16"]}
    found: dict[str, list[float] | str] = {}
    with contextlib.ExitStack() as stack:
        own = stack.enter_context(Contender("unlabel", setting, 0, rounds + 1))
        others = {n: stack.enter_context(Contender(n, setting, wanted.get(n, 0), rounds)) for n in names}
        if isinstance(why := own.block(), str):  # its own first epoch
            raise RuntimeError(why)
        speeds: dict[str, list[float]] = {name: [] for name in ("first", "later", *names)}
        for _ in range(rounds):
            with contextlib.ExitStack() as this_round:
                fresh = {} if first is None else {"first": this_round.enter_context(Contender("unlabel", first, 0, 1))}
                for name, contender in {**fresh, "later": own, **others}.items():
                    block = contender.block() if name not in found else ""
                    if isinstance(block, str):
                        found.setdefault(name, block)
                    else:
                        speeds[name].append(block[1] / block[0])
    return {**{n: [round(v, 2) for v in values] for n, values in speeds.items()}, **found}


def _once(measure: Measure, images: int) -> tuple[float, int]:
    block: list[tuple[float, int]] = []
    measure(images, 1, lambda seconds, count: block.append((seconds, count)))
    return block[0]


def best_workers(setting: Setting) -> dict[str, int]:
    """Loader processes with which the loop that a person would write is fastest: as many as cores, fewer, or none."""
    best = {}
    for name, by_hand in (("plain_fp32", False), ("plain_bf16", True)):
        speed = {}
        for workers in {0, 1, os.cpu_count() or 1}:
            seconds, images = _once(plain(setting, workers, by_hand), setting.images // 4)
            speed[workers] = images / seconds
        best[name] = max(speed, key=speed.__getitem__)
    return best


def same_speed_for_more_images(setting: Setting, more: Path, rounds: int, steps: int = 24) -> list[float]:
    """Time per image with the images of ``more``, over that with the images of ``setting``: one ratio per round."""
    step, ratios = setting.own_step(), []
    with tempfile.TemporaryDirectory() as temporary, packed_in(temporary):
        feeds = [
            setting.batches(load_cache(open_source(str(f)), setting.size, progress=False))
            for f in (setting.folder, more)
        ]
        for k in range(rounds + 1):
            seconds = []
            for feed in feeds:
                begun = time.perf_counter()
                for s in range(k * steps, (k + 1) * steps):
                    step(feed(s, 0.5))
                seconds.append(time.perf_counter() - begun)
            ratios += [seconds[1] / seconds[0]] if k else []  # the first is a warm-up
    return ratios


if __name__ == "__main__":
    name, task, network, folder, images, workers, blocks = sys.argv[1:]
    contend(name, Setting(task, network, Path(folder), int(images)), int(workers), int(blocks))
