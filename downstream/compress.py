"""`unlabel compress`: how small can an image be written, and what is lost? A task's code beside principal components.

The error is the squared error of an image in [0, 1], summed over its pixels (the mean of the channels), averaged over
the images (Hinton & Salakhutdinov 2006). The size is counted twice: in numbers, and in bits after the numbers have been
rounded and coded: the length that an entropy coder reaches whose table of each number's frequencies was made from the
pretraining images, - log2 p of each rounded number.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.decomposition import PCA

from downstream.features import is_grey, pixels_of
from downstream.trained import Code, Load, Trained, data_of
from unlabel.cache import ImageCache, evenly_spaced, load_cache, printable
from unlabel.checkpoint import write_atomic
from unlabel.config import CompressConfig
from unlabel.distributed import pick_device
from unlabel.duplicates import known_among
from unlabel.errors import UserError
from unlabel.page import figure, write_page
from unlabel.pictures import sheet, to_uint8, write_png
from unlabel.report_html import html_figure, html_table, show
from unlabel.report_plots import Axis, Line, Panel, Point, Style, nice_axis
from unlabel.runfolder import RunFolder, commit, hardware, versions
from unlabel.sources import open_source
from unlabel.start import refuse_odd_out

__all__ = ["code_length", "compress", "data_of", "squared_error"]

ROOM = 1 << 26  # values of the images that PCA is fitted on, at most
CODED = 10_000  # images that frequencies are counted on, at most
STEPS = (2.0, 1.0, 0.5, 0.25, 0.125, 0.0625)  # of rounding, in the code's standard deviations
SHOWN = 16


@dataclass(frozen=True)
class Rate:
    """One way of writing an image: how many bits per pixel, and the error that is left."""

    step: float
    bits_per_pixel: float
    error: float


def squared_error(painted: np.ndarray, images: np.ndarray) -> float:
    """(N, C, H, W) each: squared error summed over pixels, mean over channels and images."""
    difference = painted.astype(np.float64) - images
    return float(np.square(difference).sum((2, 3)).mean())


def code_length(train: np.ndarray, test: np.ndarray) -> float:
    """Mean bits per row of ``test`` (M, K), whole numbers, by the frequencies of ``train`` (N, K), column by column.

    The table of a column holds the values from its least to its largest in ``train``, each counted once more than it
    was seen; ``test`` must lie within.
    """
    bits = 0.0
    for a, b in zip(train.T, test.T, strict=True):
        counts = np.bincount(a - a.min()) + 1.0
        bits += float(-np.log2(counts[b - a.min()] / counts.sum()).mean())
    return bits


class Principal:
    """Principal components of the pixels, as codes."""

    def __init__(self, images: np.ndarray, most: int) -> None:
        rows = images.reshape(len(images), -1)
        self.most = most = min(most, *rows.shape)
        solver = "covariance_eigh" if rows.shape[1] <= 4096 else "randomized"
        self.pca = PCA(most, svd_solver=solver, random_state=0).fit(rows)
        self.shape = images.shape[1:]

    def to_code(self, images: np.ndarray, size: int) -> np.ndarray:
        return self.pca.transform(images.reshape(len(images), -1))[:, :size]

    def from_code(self, code: np.ndarray) -> np.ndarray:
        """Not clipped to [0, 1], so that it is the optimal linear code's error and no other."""
        return (code @ np.asarray(self.pca.components_)[: code.shape[1]] + self.pca.mean_).reshape(-1, *self.shape)


def rates(train: np.ndarray, test: np.ndarray, paint: Any, images: np.ndarray, pixels: int) -> list[Rate]:
    """Error and size where the codes are rounded to multiples of ``STEPS`` of the spread of those in ``train``."""
    spread = float(np.sqrt(train.var(0).mean()))
    found = []
    for step in STEPS:
        grid = max(spread * step, 1e-12)
        a, b = (np.round(code / grid).astype(np.int64) for code in (train, test))
        b = b.clip(a.min(0), a.max(0))  # what the table does not hold cannot be written
        found.append(Rate(step, code_length(a, b) / pixels, squared_error(paint(b * grid), images)))
    return found


def _channels(painted: np.ndarray, images: np.ndarray) -> np.ndarray:
    return painted.mean(1, keepdims=True) if images.shape[1] == 1 else painted


def compress(config: CompressConfig, load: Load) -> Path:
    """Every run's code beside as many principal components: compression.json, compression.html, examples.png."""
    tasks = _tasks(config, load)
    out = config.out or config.runs[0] / "compression"
    refuse_odd_out(out, (*config.data, *(config.train or ())))
    size = next(iter(tasks.values())).backbone.spec.image_size
    train = load_cache(open_source(config.train or data_of(config.runs[0])), size, max_skipped=config.max_skipped)
    if not config.train:  # a run's own images: without those that `compare` had left out of it, or of another
        gone = frozenset().union(*(RunFolder(run).left_out() for run in config.runs))
        train = train.subset(np.flatnonzero([h not in gone for h in train.hashes]))
    test = load_cache(open_source(config.data), size, max_skipped=config.max_skipped)
    known = known_among(train, test)
    channels = 1 if is_grey(train.images) and is_grey(test.images) else 3
    room = ROOM // (channels * size**2)
    train, test = (c.subset(evenly_spaced(len(c), room)) for c in (train, test))
    if len(train) < 2:
        raise UserError("principal components need two images at least: give more by --train")
    points, painted = measure(tasks, train, test, channels)
    about = {
        "images": len(test),
        "pixels": size * size,
        "channels": channels,
        "fitted_on": len(train),
        "known": known,  # of all images, those with a near-duplicate among all that it was trained on
        "points": points,
        "runs": {run.resolve().name: _about(run) for run in config.runs},
        "hardware": hardware(),
        "versions": versions(),
        "commit": commit(),
    }
    write_atomic(out / "compression.json", (json.dumps(about, indent=1) + "\n").encode())
    pictures = [to_uint8(torch.from_numpy(r).expand(-1, 3, -1, -1)) for r in painted.values()]
    page = _page(out, about, write_png(out / "examples.png", sheet(pictures)), list(painted))
    for name, reason in test.skipped:
        print(f"skipped {printable(name)}: {reason}")
    if known:
        print(f"note: {_known(about)}")
    for p in points:
        bits = "".join(f"  {r['bits_per_pixel']:.3f}: {r['error']:.2f}" for r in p["rates"])
        print(
            f"{p['name']:<24} {p['numbers']:>4} numbers  squared error {p['error']:8.3f}"
            + (f"   bits per pixel{bits}" if bits else "")
        )
    print(f"open {page}")
    return out


def measure(
    tasks: Mapping[str, Trained], train: ImageCache, test: ImageCache, channels: int
) -> tuple[list[dict[str, Any]], dict[str, np.ndarray]]:
    """The points of every run and of principal components; and some images as each of them keeps them, by caption."""
    size = next(iter(tasks.values())).backbone.spec.image_size
    fit, images = pixels_of(train, size, channels), pixels_of(test, size, channels)
    coded, some = evenly_spaced(len(train), CODED), evenly_spaced(len(images), SHOWN)
    codes = {name: Code(task) for name, task in tasks.items()}
    test_codes = {name: code.to_code(test.images, f"{name} code") for name, code in codes.items()}
    pca = Principal(fit, max(c.shape[1] for c in test_codes.values()))
    numbers = sorted({min(c.shape[1], pca.most) for c in test_codes.values()})
    points, shown = [], {"the images": images[some]}
    for name, code in codes.items():
        test_code = test_codes[name]
        paint = lambda c, code=code: _channels(code.from_code(c), images)  # noqa: E731
        painted = paint(test_code)
        rates_ = rates(code.to_code(train.images[coded]), test_code, paint, images, size * size)
        points.append(_point(name, test_code.shape[1], squared_error(painted, images), rates_))
        shown[name] = painted[some]
    for n in sorted({*numbers, *(n for n in (1, 2, 4, 8, 16, 32, 64, 128, 256) if n < max(numbers))}):
        test_code = pca.to_code(images, n)
        painted = pca.from_code(test_code)
        rates_ = []
        if n in numbers:
            rates_ = rates(pca.to_code(fit[coded], n), test_code, pca.from_code, images, size * size)
            shown[f"PCA, {n} numbers"] = painted[some]
        points.append(_point("PCA", n, squared_error(painted, images), rates_))
    return points, shown


def _tasks(config: CompressConfig, load: Load) -> dict[str, Trained]:
    """The runs' tasks by folder name; all make codes of images of one size."""
    if not config.runs:
        raise UserError("name at least one finished run of autoencoder, vae, sparse or contractive")
    device = pick_device(config.device)
    tasks = {run.resolve().name: load(run, None, device) for run in config.runs}
    if len(tasks) < len(config.runs) or "PCA" in tasks:
        raise UserError("runs are known by their folders' names, which must differ, also from PCA: rename one")
    for run, task in zip(config.runs, tasks.values(), strict=True):
        if not (task.can("to_code") and task.can("from_code")):
            raise UserError(f"{run}: {task.name} makes no code; an autoencoder, vae, sparse, contractive does")
    sizes = {task.backbone.spec.image_size for task in tasks.values()}
    if len(sizes) > 1:
        raise UserError(
            f"the runs have images of {' and '.join(map(str, sorted(sizes)))} px: compare those of one size"
        )
    return tasks


def _about(run: Path) -> dict[str, Any]:
    """How the run was trained, for whoever wants to do it again."""
    about = RunFolder(run).read() or {}
    done, asked = about.get("finished", {}), about.get("settings", {})
    minutes = round(done.get("seconds", 0) / 60, 2)
    kept = ("tasks", "backbone", "stem", "image_size", "minutes", "epochs", "batch_size", "lr", "task_settings", "seed")
    found = {k: asked[k] for k in kept if asked.get(k) is not None}
    return {**found, "images_seen": done.get("images_seen"), "minutes_taken": minutes, "commit": about.get("commit")}


def _point(name: str, numbers: int, error: float, found: list[Rate]) -> dict[str, Any]:
    return {"name": name, "numbers": numbers, "error": error, "rates": [vars(r) for r in found]}


def _known(about: dict[str, Any]) -> str:
    what = f"{about['known']:,} --data images are near-duplicates of images that codes and components were fitted to"
    return f"{what}: of new ones, more would be lost"


def _page(out: Path, about: dict[str, Any], examples: Path, rows: list[str]) -> Path:
    points = about["points"]
    names = list(dict.fromkeys(p["name"] for p in points))
    styles = {n: Style("control", "4 4", "square") if n == "PCA" else Style(f"a{k % 7}") for k, n in enumerate(names)}

    def line(name: str, at: list[tuple[float, float]]) -> Line:
        return Line(name, styles[name], [Point(x, y) for x, y in at], joined=len(at) > 1, percent=False)

    by_number = [line(n, [(math.log2(p["numbers"]), p["error"]) for p in points if p["name"] == n]) for n in names]
    by_bits = [line(p["name"], [(r["bits_per_pixel"], r["error"]) for r in p["rates"]]) for p in points if p["rates"]]
    largest = math.log2(max(p["numbers"] for p in points))
    ticks = [(float(k), f"{2**k}") for k in range(int(largest) + 1)]
    doublings = replace(nice_axis(0.0, max(largest, 1.0), "numbers in the code"), ticks=ticks)
    panels = [
        _panel("Squared error per image", by_number, doublings),
        _panel("Squared error against bits", by_bits, nice_axis(0.0, _most(by_bits, "x"), "bits per pixel")),
    ]
    errors = html_table(
        ["", "numbers", "squared error"],
        [[show(p["name"]), show(p["numbers"]), show(p["error"], 2)] for p in points],
        right=frozenset({1, 2}),
    )
    coded = [p for p in points if p["rates"]]
    bits = html_table(
        ["rounded to", *(f"{show(p['name'])}, {p['numbers']} numbers" for p in coded)],
        [
            [f"{step:g} σ", *(f"{p['rates'][k]['bits_per_pixel']:.3f}: {p['rates'][k]['error']:.2f}" for p in coded)]
            for k, step in enumerate(STEPS)
        ],
        caption="bits per pixel: squared error then",
    )
    intro = (
        f"<p>{about['images']:,} images of {about['pixels']:,} pixels. Squared error of an image in [0, 1], summed "
        f"over its pixels{'' if about['channels'] == 1 else ', the mean of three channels'}. Principal components of "
        f"{about['fitted_on']:,} images. Bits: what an entropy coder needs for the rounded code."
        f"{f' {_known(about)}.' if about['known'] else ''}</p>"
    )
    examples_ = figure(examples, f"From top to bottom: {', '.join(rows)}.")
    sections = ["<h1>What a code keeps</h1>", intro, html_figure(panels), examples_, errors, bits]
    return write_page(out / "compression.html", "What a code keeps", sections)


def _panel(title: str, lines: list[Line], x: Axis) -> Panel:
    return Panel(title, lines, x, nice_axis(0.0, _most(lines, "y")))


def _most(lines: list[Line], axis: str) -> float:
    return max(getattr(p, axis) for one in lines for p in one.points)
