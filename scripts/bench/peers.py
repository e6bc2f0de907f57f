"""Contenders of the benchmark: rotation prediction in the data loading and the loops of two other libraries.

A peer is given the folder, the network with its head and loss (``model``: images (N, 3, S, S), normalised, to a loss;
the four turns are the model's business) and the optimiser. Reading, augmentation, loader and loop are its own, with the
settings of its own examples, which the docstrings name; where those differ, the faster one. The augmentation is that of
``unlabel pretrain rotation``, from the peer's own parts.

    measure = lightly_epochs(folder, 64, 32, model, partial(torch.optim.AdamW, lr=1e-3), workers=2)
    measure(2_000, 5, lambda seconds, images: print(images / seconds))
"""

from __future__ import annotations

import contextlib
import io
import math
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from pretext.rotation import Rotation

__all__ = ["Measure", "OnBlock", "Unavailable", "lightly_epochs", "stable_pretraining_epochs"]

OnBlock = Callable[[float, int], None]
"""Called after each block with its seconds and images. What it does is in no block's time: others can run in it."""

Measure = Callable[[int, int, OnBlock], None]
"""``measure(images_per_block, blocks, on_block)`` trains; a block is that many images, rounded up to whole steps."""

AREA, JITTER, GREY = Rotation.recipe.crop, Rotation.Config().jitter, Rotation.Config().grey
PREFETCH = 2  # batches that a DataLoader has loaded ahead for each worker, by default


class Unavailable(Exception):
    """The peer cannot be used here. The message is one line that says why."""


@contextlib.contextmanager
def importing(peer: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # a native library that does not load is an OSError, or worse
        reason = " ".join(str(error).split())
        raise Unavailable(f"{peer} cannot be imported ({type(error).__name__}: {reason})") from error


@contextlib.contextmanager
def printing_to(out: TextIO, err: TextIO) -> Iterator[None]:
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        yield


class Blocks:
    """Times blocks of steps in a loop that calls ``step_done`` after each step.

    The time runs from the end of one step to the end of another: all that a step needs is in it, waiting for data
    above all. Between blocks, while ``on_block`` runs, loader processes would work until their queues are full, for
    free and on the others' cores. So they are waited for before ``on_block`` is called, and after it some steps are
    not timed, enough to use up what was queued.
    """

    def __init__(self, images_per_block: int, blocks: int, batch_size: int, workers: int, on_block: OnBlock) -> None:
        self.timed = math.ceil(images_per_block / batch_size)
        self.untimed = PREFETCH * workers + 2  # Lightning's loop holds another batch; the first step is slow
        self.total = blocks * (self.untimed + self.timed)
        self.batch_size, self.workers, self.on_block = batch_size, workers, on_block
        self.done, self.start = 0, 0.0

    def step_done(self) -> None:
        self.done += 1
        step = self.done % (self.untimed + self.timed)
        if step not in (0, self.untimed):
            return
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        if step == self.untimed:
            self.start = time.perf_counter()
        else:
            seconds = time.perf_counter() - self.start
            time.sleep(PREFETCH * self.workers * seconds / self.timed)
            self.on_block(seconds, self.timed * self.batch_size)


def batches(dataset: Any, batch_size: int, workers: int) -> DataLoader:
    """As in both libraries' examples: shuffled, nothing partial, no pinned memory, workers that outlive an epoch."""
    if len(dataset) < batch_size:
        raise ValueError(f"{len(dataset)} images are fewer than a batch of {batch_size}")
    alive = workers > 0
    return DataLoader(dataset, batch_size, shuffle=True, drop_last=True, num_workers=workers, persistent_workers=alive)


def lightly_epochs(
    folder: Path, image_size: int, batch_size: int, model: nn.Module, optimizer: partial[Optimizer], workers: int,
    mixed: bool = False,
) -> Measure:  # fmt: skip
    """``LightlyDataset`` in a plain PyTorch loop, as in lightly's examples/pytorch (simclr.py, mae.py).

    From there: the ``DataLoader``, the order of calls, fp32, the sum of an epoch's losses. From its
    benchmarks/imagenet/vitb16/main.py: persistent workers, and ``mixed`` ("16-mixed", here bf16). The transform is
    lightly's ``SimCLRViewTransform``, without blur and change of hue.

    ``measure`` goes on where it stopped, with the same workers, however often it is called.
    """
    with importing("lightly"):
        from lightly.data import LightlyDataset  # pyright: ignore[reportMissingImports]
        from lightly.transforms.simclr_transform import SimCLRViewTransform  # pyright: ignore[reportMissingImports]

    transform = SimCLRViewTransform(
        image_size, cj_prob=1.0, cj_bright=JITTER, cj_contrast=JITTER, cj_sat=JITTER, cj_hue=0.0, min_scale=AREA[0],
        random_gray_scale=GREY, gaussian_blur=0.0,
    )  # fmt: skip
    loader = batches(LightlyDataset(str(folder), transform=transform), batch_size, workers)
    device = next(model.parameters()).device
    updates = optimizer(model.train().parameters())

    def training() -> Iterator[None]:
        while True:
            total = torch.zeros((), device=device)
            for images, _, _ in loader:
                with torch.autocast(device.type, torch.bfloat16, enabled=mixed):
                    loss = model(images.to(device))
                total += loss.detach()
                loss.backward()
                updates.step()
                updates.zero_grad()
                yield

    steps = training()

    def measure(images_per_block: int, blocks: int, on_block: OnBlock) -> None:
        timer = Blocks(images_per_block, blocks, batch_size, workers, on_block)
        for _ in range(timer.total):
            next(steps)
            timer.step_done()

    return measure


class Images(ImageFolder):
    """The images of a folder at any depth, flat or with a folder for each class, as one class."""

    def find_classes(self, directory: str | Path) -> tuple[list[str], dict[str, int]]:
        return [""], {"": 0}


def loss_of(self: Any, batch: dict[str, Any], stage: str) -> dict[str, Tensor]:
    """The ``forward`` of an ``spt.Module``, which is bound to it."""
    return {"loss": self.pretext(batch["image"])}


def stable_pretraining_epochs(
    folder: Path, image_size: int, batch_size: int, model: nn.Module, optimizer: partial[Optimizer], workers: int,
    mixed: bool = True,
) -> Measure:  # fmt: skip
    """``spt.data``, ``spt.Module`` and ``spt.Manager`` with Lightning's ``Trainer``, as in stable-pretraining's README.

    From there: ``FromTorchDataset``, the transforms, the ``DataLoader``, ``logger=False``,
    ``enable_checkpointing=False`` and ``precision="16-mixed"``, of which Lightning makes bf16 on a CPU (without
    ``mixed``, the ``Trainer``'s own fp32). From its benchmarks/imagenet100: persistent workers. From its
    benchmarks/imagenet10/benchmark_gpu_vs_cpu.py, which measures speed: ``max_steps``, one device, no validation. The
    schedule is ``spt.Module``'s own, a cosine.

    What the library adds by itself stays on, though it takes time: the callbacks that it gives each ``Trainer``
    (progress bar, hardware monitor, …), its log of metrics, a checkpoint after each epoch. They write into a
    temporary folder, and what they print is dropped. Importing it replaces the handlers of Python's root logger, and
    ``measure`` seeds the global random numbers with 0.

    The ``Trainer`` owns the loop: ``measure`` is one run of it, and another call a new run with the same weights.
    """
    out, err, dropped = sys.stdout, sys.stderr, io.StringIO()
    with importing("stable-pretraining"), printing_to(dropped, dropped):
        import lightning as pl  # pyright: ignore[reportMissingImports]
        import stable_pretraining as spt  # pyright: ignore[reportMissingImports]
        from stable_pretraining import Manager, Module, data  # pyright: ignore[reportMissingImports]

    t = data.transforms
    transform = t.Compose(
        t.RGB(),
        t.RandomResizedCrop((image_size, image_size), scale=AREA),
        t.RandomHorizontalFlip(p=0.5),
        t.WrapTorchTransform(v2.ColorJitter(JITTER, JITTER, JITTER)),  # its own ColorJitter fails without hue
        t.RandomGrayscale(p=GREY),
        t.ToImage(**data.static.ImageNet),
    )
    dataset = data.FromTorchDataset(Images(folder), names=["image", "label"], transform=transform)
    loader = batches(dataset, batch_size, workers)
    accelerator = "cpu" if next(model.parameters()).device.type == "cpu" else "auto"

    def measure(images_per_block: int, blocks: int, on_block: OnBlock) -> None:
        def aloud(seconds: float, images: int) -> None:
            with printing_to(out, err):
                on_block(seconds, images)

        timer = Blocks(images_per_block, blocks, batch_size, workers, aloud)

        class Count(pl.Callback):
            def on_train_batch_end(self, *args: Any) -> None:
                timer.step_done()

        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as runs, printing_to(dropped, dropped):
            spt.set(cache_dir=runs)
            trainer = pl.Trainer(
                max_steps=timer.total, precision="16-mixed" if mixed else None, num_sanity_val_steps=0, logger=False,
                enable_checkpointing=False, callbacks=[Count()], devices=1, accelerator=accelerator,
            )  # fmt: skip
            module = Module(pretext=model, forward=loss_of, optim={"optimizer": optimizer})
            Manager(trainer=trainer, module=module, data=data.DataModule(train=loader))()

    return measure
