"""The rest of the benchmark: packing, linear evaluation, starting, and a million listed images."""

from __future__ import annotations

import io
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from photos import many_files, packed_in
from PIL import Image
from torch import nn

from unlabel.augment import clean, random_view
from unlabel.backbone import channels_last, load_backbone
from unlabel.cache import cache_side, load_cache
from unlabel.draws import Draws
from unlabel.precision import autocast, pick_precision
from unlabel.sources import open_source

__all__ = ["many_images", "packing", "probe", "start"]

ROOT = Path(__file__).parents[2]


def packing(folder: Path, size: int, repeats: int) -> dict[str, Any]:
    """Images per second of packing, and of PIL: decode, crop to the square, shrink; in one process, and one per core.

    The library also does what it needs to know its images: it finds broken files, hashes, compares with mirrors.
    """
    side = cache_side(size)
    data = [path.read_bytes() for path in sorted(folder.rglob("*.jpg"))]
    found: dict[str, list[float]] = {"unlabel": [], "pil": [], "pil_processes": []}
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(_shrink, data[:8], [side] * 8))  # started before the clock
        for _ in range(repeats):
            with tempfile.TemporaryDirectory() as cache, packed_in(cache):
                source, begun = open_source(str(folder)), time.perf_counter()
                load_cache(source, size, progress=False)
                found["unlabel"].append(len(data) / (time.perf_counter() - begun))
            begun = time.perf_counter()
            for one in data:
                _shrink(one, side)
            found["pil"].append(len(data) / (time.perf_counter() - begun))
            begun = time.perf_counter()
            list(pool.map(_shrink, data, [side] * len(data), chunksize=32))
            found["pil_processes"].append(len(data) / (time.perf_counter() - begun))
    return {name: [round(v, 1) for v in values] for name, values in found.items()}


def _shrink(data: bytes, side: int) -> bytes:
    image = Image.open(io.BytesIO(data)).convert("RGB")
    short = min(image.size)
    left, top = (image.width - short) // 2, (image.height - short) // 2
    square = image.crop((left, top, left + short, top + short))
    return square.resize((side, side), Image.Resampling.BICUBIC).tobytes()


def probe(run: Path, train: str, test: str, draws: int, sgd_draws: int) -> dict[str, Any]:
    """Linear evaluation by the command, and by the usual probe: seconds, and mean accuracy for each count of labels.

    The usual probe: 100 epochs of SGD on one linear layer behind the frozen network, the labelled images augmented
    anew in each epoch (lr 0.1 for 256 images, momentum 0.9, cosine, no weight decay). It is given images that are
    decoded already, bf16, and one look at the test images for each count, at the end. The command's seconds include
    its start.
    """
    counts = (10, 50, 250)
    with tempfile.TemporaryDirectory() as out:
        command = [sys.executable, "-m", "unlabel", "evaluate", str(run), "--train", train, "--test", test]
        command += ["--protocol", "linear", "--no-controls", "--draws", str(draws), "--out", out]
        begun = time.perf_counter()
        subprocess.run([*command, "--labels-per-class", *map(str, counts)], check=True, capture_output=True, cwd=ROOT)
        seconds = time.perf_counter() - begun
        results = json.loads((Path(out) / "results.json").read_text())
        split = json.loads((Path(out) / "splits.json").read_text())
    own: dict[int, list[float]] = {c: [] for c in counts}
    for row in results["rows"]:
        own[row["labels_per_class"]].append(row["accuracy"])

    backbone = channels_last(load_backbone(run))
    size = backbone.spec.image_size
    caches = {
        name: load_cache(open_source(spec), size, progress=False) for name, spec in (("train", train), ("test", test))
    }
    classes = split["classes"]
    pool = _rows(caches["train"], split["pool"]["hashes"])
    tested = _rows(caches["test"], split["test"]["hashes"])
    pixels = np.array(caches["train"].images[pool])
    y = torch.tensor([classes.index(label) for label in split["pool"]["labels"]])
    usual: dict[int, list[float]] = {c: [] for c in counts}
    took = []
    test_y = torch.tensor([classes.index(label) for label in split["test"]["labels"]])
    test_images = [np.array(caches["test"].images[tested[k : k + 512]]) for k in range(0, len(tested), 512)]
    for draw in range(sgd_draws):
        begun = time.perf_counter()
        for count in counts:
            rows = split["draws"][str(count)][draw]
            layer = _sgd(backbone, pixels[rows], y[rows], len(classes), size)
            with torch.inference_mode(), _fast():
                right = [layer(backbone(clean(torch.from_numpy(p), size)).pooled).argmax(1) for p in test_images]
            usual[count].append(float((torch.cat(right) == test_y).float().mean()))
        took.append(time.perf_counter() - begun)
    return {
        "images": len(pool) + len(tested),
        "unlabel_seconds_per_draw": round(seconds / draws, 3),
        "sgd_seconds_per_draw": [round(t, 3) for t in took],
        "unlabel_accuracy": {c: round(statistics.mean(v[:sgd_draws]), 4) for c, v in own.items()},
        "sgd_accuracy": {c: round(statistics.mean(v), 4) for c, v in usual.items()},
        "draws": {"unlabel": draws, "sgd": sgd_draws},
    }


def _rows(cache: Any, hashes: list[str]) -> np.ndarray:
    at = {h: i for i, h in enumerate(cache.hashes)}
    return np.array([at[h] for h in hashes])


def _fast() -> AbstractContextManager[None]:
    device = torch.device("cpu")
    return autocast(device, pick_precision("auto", device))


def _sgd(
    backbone: nn.Module, pixels: np.ndarray, y: torch.Tensor, classes: int, size: int, epochs: int = 100
) -> nn.Module:
    torch.manual_seed(0)
    batch = min(256, len(y))
    layer = nn.Linear(backbone.channels, classes)  # type: ignore[arg-type]
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1 * batch / 256, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    for epoch in range(epochs):
        order = torch.randperm(len(y))
        for rows in order.split(batch):
            views = random_view(
                torch.from_numpy(pixels[rows.numpy()]), size, Draws(0, [epoch] * len(rows), rows.tolist())
            )
            with _fast():
                with torch.no_grad():
                    features = backbone(views).pooled
                loss = nn.functional.cross_entropy(layer(features), y[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        schedule.step()
    return layer


def start(folder: Path, size: int, repeats: int) -> dict[str, list[float]]:
    """Seconds of ``--help``, and from the command to the end of its first step: images not yet packed, and packed."""
    found: dict[str, list[float]] = {"help": [], "first_step_cold": [], "first_step_warm": []}
    for _ in range(repeats):
        begun = time.perf_counter()
        subprocess.run([sys.executable, "-m", "unlabel", "--help"], check=True, capture_output=True, cwd=ROOT)
        found["help"].append(round(time.perf_counter() - begun, 3))
        with tempfile.TemporaryDirectory() as out:
            for name in ("first_step_cold", "first_step_warm"):
                found[name].append(first_step(folder, Path(out) / name, size, Path(out) / "cache")["seconds"])
    return found


def first_step(folder: Path, run: Path, size: int, cache: Path) -> dict[str, float]:
    """Seconds from the command to its first line in metrics.jsonl, and the most memory that it took until then."""
    command = [sys.executable, "-m", "unlabel", "pretrain", "rotation", "--data", str(folder), "--out", str(run)]
    command += ["--image-size", str(size), "--epochs", "1000", "--log-every", "1"]
    begun, metrics, peak = time.perf_counter(), run / "metrics.jsonl", 0.0
    env = {**os.environ, "UNLABEL_CACHE": str(cache)}
    errors = run.with_name(f"{run.name}.errors")
    with open(errors, "w") as file:
        process = subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.DEVNULL, stderr=file)
    try:
        while not (metrics.exists() and metrics.stat().st_size):
            if process.poll() is not None:
                raise RuntimeError(f"{' '.join(command)}: {errors.read_text()[-2000:]}")
            time.sleep(0.005)
        seconds = time.perf_counter() - begun
        status = Path(f"/proc/{process.pid}/status")
        lines = status.read_text().splitlines() if status.exists() else []
        peak = next((int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM")), float("nan"))
    finally:
        process.kill()
        process.wait()
    return {"seconds": round(seconds, 3), "peak_mb": round(peak, 1)}


def many_images(counts: tuple[int, ...], repeats: int) -> dict[str, Any]:
    """With ``counts`` images: listing them again, the first step of a second run, and the most memory it takes."""
    found: dict[str, Any] = {}
    listing = "import sys, time, numpy; from unlabel.sources import open_source; t = time.perf_counter(); "
    listing += "s = open_source(sys.argv[1]); s.fingerprint; print(time.perf_counter() - t)"
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "ssl")])}
    for count in counts:
        with tempfile.TemporaryDirectory() as temporary:
            out = Path(temporary)
            folder = many_files(out / "images", count)
            first_step(folder, out / "first", 32, out / "cache")
            again = [first_step(folder, out / f"run{k}", 32, out / "cache") for k in range(repeats)]
            listed = [
                float(subprocess.check_output([sys.executable, "-c", listing, str(folder)], env=env, text=True))
                for _ in range(repeats)
            ]
            found[str(count)] = {
                "listed_again_seconds": [round(t, 3) for t in listed],
                "first_step_seconds": [run["seconds"] for run in again],
                "peak_mb": [run["peak_mb"] for run in again],
            }
    return found
