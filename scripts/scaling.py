"""What large sets cost on 1, 8 and 64 devices, from what one device and one core do here.

    python scripts/scaling.py --photos FOLDER                                      this machine's CPU, small network
    python scripts/scaling.py --photos FOLDER --backbone resnet50 --image-size 224 --batch-size 256      a GPU, if any

Measured: seconds per step of the real loop's model and batches (pixels in memory), images packed per second and core,
bytes per image on disk and in the cache, memory and time of the list of images and of an epoch's order. Assumed, as
arguments: how many bytes per second go between devices of one node, and between nodes. Prints a table and writes
results/scaling_BACKBONE_SIZE.json. An all-reduce of G bytes over n devices takes 2 (n - 1) / n · G / bandwidth (ring).
"""

from __future__ import annotations

import argparse
import json
import time
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np

from pretext import load_task
from unlabel.backbone import build_backbone, channels_last
from unlabel.batches import Batches
from unlabel.cache import ImageCache, cache_side, load_cache
from unlabel.columns import Digests, Names
from unlabel.config import PretrainConfig
from unlabel.distributed import pick_device
from unlabel.listing import Entries, Place
from unlabel.order import batch_at
from unlabel.plan import Plan, measure
from unlabel.precision import pick_precision
from unlabel.pretrain import Together
from unlabel.runfolder import commit, hardware, versions
from unlabel.sources import Source, open_source

SETS = {"ImageNet-1k": 1_281_167, "100 million": 100_000_000}
DEVICES = (1, 8, 64)
PER_NODE = 8
LISTED = 200_000  # images of the listing that is weighed


def seconds_per_step(args: argparse.Namespace) -> tuple[float, int, str]:
    """Of ``--task``, gradients' bytes, and on what."""
    device, side = pick_device("auto"), cache_side(args.image_size)
    pixels = np.random.default_rng(0).integers(0, 256, (2 * args.batch_size, side, side, 3), np.uint8)
    n = len(pixels)
    names, hashes = Names(map(str, range(n))), Digests(np.zeros((n, 32), np.uint8))
    hashed, shapes = np.zeros((n, 2), np.uint64), np.zeros((n, 2), np.int32)
    cache = ImageCache(pixels, names, None, hashes, hashed, shapes, [], "", side)
    cls = load_task(args.task)
    backbone = build_backbone(args.backbone, args.image_size)
    model = channels_last(Together(backbone, {args.task: cls(backbone, cls.Config())}, (1.0,)).to(device))
    config = PretrainConfig(tasks=(args.task,), data=("",), out=Path())
    batches = Batches(cache, config, True, device)
    precision = pick_precision("auto", device)
    plan = Plan(
        args.image_size,
        args.batch_size,
        100,
        1e-3,
        0.05,
        cls.recipe.optimizer,
        "cosine",
        cls.recipe.crop,
        False,
        precision,
    )
    per_step = measure(model, plan, batches)
    return per_step, 4 * sum(p.numel() for p in model.parameters()), f"{device.type}, {precision}"


def packing(photos: str, image_size: int) -> dict[str, float]:
    """One thread, cold: nothing is written."""
    source = open_source(photos)
    begun = time.perf_counter()
    cache = load_cache(source, image_size, workers=1, write=False, progress=False)
    return {"images_per_core_second": len(cache) / (time.perf_counter() - begun), "bytes": float(np.mean(source.sizes))}


def listing() -> dict[str, float]:
    """Bytes of memory and microseconds for each image listed, as a source and with what is known of it."""
    tracemalloc.start()
    begun = time.perf_counter()
    names = [f"n{k % 1000:08d}/n{k % 1000:08d}_{k}.JPEG" for k in range(LISTED)]
    place = Place("/data/part-000.tar", archive=(1 << 40, 1))
    source = Source("x", Entries([place], names, [110_000] * LISTED, range(0, 512 * LISTED, 512)))
    del names
    fingerprint = source.fingerprint
    known = np.zeros((LISTED, 32 + 16 + 8), np.uint8)  # hashes and shapes
    took, memory = time.perf_counter() - begun, tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert fingerprint
    assert len(known) == LISTED
    return {"bytes_per_image": memory / LISTED, "microseconds_per_image": took / LISTED * 1e6}


def order(n: int = 10_000_000) -> dict[str, float]:
    begun = time.perf_counter()
    batch_at(0, 0, 256, n)
    return {"nanoseconds_per_image": (time.perf_counter() - begun) / n * 1e9, "bytes_per_image": 8.0}


def rows(measured: dict[str, Any], args: argparse.Namespace) -> list[dict[str, Any]]:
    found = []
    for name, n in SETS.items():
        for devices in DEVICES:
            speed = args.between_nodes if devices > PER_NODE else args.inside_node
            step, gradients = measured["seconds_per_step"], measured["gradient_bytes"]
            reduce = 0.0 if devices == 1 else 2 * (devices - 1) / devices * gradients / (speed * 1e9)
            nodes = max(1, devices // PER_NODE)
            steps = n / (args.batch_size * devices)
            cores = args.cores_per_device * min(devices, PER_NODE)  # of the first node, which packs
            found.append(
                {
                    "set": name, "devices": devices, "step_s": step, "all_reduce_s": reduce,
                    "hours_per_epoch": steps * (step + reduce) / 3600,
                    "read_TB": n * measured["packing"]["bytes"] / 1e12,
                    "cache_TB": n * 3 * cache_side(args.image_size) ** 2 / 1e12,
                    "packing_hours": n / measured["packing"]["images_per_core_second"] / cores / 3600,
                    "read_MB_per_s_and_node": args.batch_size * devices / nodes / step * 3
                    * cache_side(args.image_size) ** 2 / 1e6,
                    "list_GB_per_process": n * measured["listing"]["bytes_per_image"] / 1e9,
                    "order_s_per_epoch": n * measured["order"]["nanoseconds_per_image"] / 1e9,
                }
            )  # fmt: skip
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", required=True, help="a source of typical photos, a few thousand")
    parser.add_argument("--task", default="rotation")
    parser.add_argument("--backbone", default="small")
    parser.add_argument("--image-size", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=32, help="of each device")
    parser.add_argument("--cores-per-device", type=int, default=12)
    parser.add_argument("--inside-node", type=float, default=100.0, help="GB/s between devices of a node: assumed")
    parser.add_argument("--between-nodes", type=float, default=12.5, help="GB/s between nodes: assumed")
    args = parser.parse_args()
    per_step, gradients, where = seconds_per_step(args)
    measured = {
        "seconds_per_step": per_step, "images_per_second": args.batch_size / per_step, "gradient_bytes": gradients,
        "device": where, "packing": packing(args.photos, args.image_size), "listing": listing(), "order": order(),
    }  # fmt: skip
    table = rows(measured, args)
    settings = {k: v for k, v in vars(args).items() if k != "photos"}
    about = {"settings": settings, "measured": measured, "rows": table}
    about |= {"hardware": hardware(), "versions": versions(), "commit": commit()}
    path = Path("results") / f"scaling_{args.backbone}_{args.image_size}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(about, indent=1) + "\n")
    print(json.dumps(measured, indent=1))
    print("  ".join(table[0]))
    for row in table:
        print("  ".join(f"{v:.3g}" if isinstance(v, float) else str(v) for v in row.values()))


if __name__ == "__main__":
    main()
