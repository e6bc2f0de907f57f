"""The benchmark: one table, and results/benchmark.json with every repeat.

    bash scripts/benchmark                                     an hour or more on two cores, and 5 GB of a disk
    bash scripts/benchmark --labelled TRAIN TEST --run RUN     also linear evaluation of a run, on labelled images
    bash scripts/benchmark --parts training packing            some parts only; the others stay as they are in the file
    bash scripts/benchmark --quick                             minutes: fails if a ratio is 10 % below in all rounds

Photos are cut from scikit-learn's two sample photographs, 96 x 96 and 500 x 375. The other libraries run if they are
installed (the extra `bench`).
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

OUT = Path("results/benchmark.json")
ROUNDS = 5
COUNTS = {"96x96": 20_000, "500x375": 2048}  # photos that are cut
FIRST = {"small": 2048, "resnet18": 512}  # images of a first epoch
PARTS = ["training", "packing", "more", "start", "million", "probe"]
# (task, network, photos, images of an epoch and a block, whether the other libraries run): about equal in time.
RACES = [
    ("rotation", "small", "96x96", 768, True),
    ("inpainting", "small", "96x96", 1024, False),
    ("denoising", "small", "96x96", 1024, False),
    ("rotation", "small", "500x375", 384, False),
    ("inpainting", "small", "500x375", 512, False),
    ("denoising", "small", "500x375", 512, False),
    ("inpainting", "resnet18", "96x96", 256, False),
    ("denoising", "resnet18", "96x96", 256, False),
    ("rotation", "resnet18", "96x96", 128, False),
    ("inpainting", "resnet18", "500x375", 256, False),
    ("denoising", "resnet18", "500x375", 256, False),
    ("rotation", "resnet18", "500x375", 128, False),
]
# ratio: (numerator, denominator), each a contender of a race
OVER = {
    "later_over_limit": ("later", "limit"),
    "first_over_plain": ("first", "plain_fp32"),
    "later_over_plain_fp32": ("later", "plain_fp32"),
    "later_over_plain_bf16": ("later", "plain_bf16"),
    "later_over_lightly": ("later", "lightly"),
    "later_over_stable_pretraining": ("later", "stable_pretraining"),
}
AT_LEAST = {
    "later_over_limit": 0.97, "first_over_plain": 1.5, "later_over_plain_fp32": 2.7, "later_over_plain_bf16": 1.25,
    "later_over_lightly": 2.0, "later_over_stable_pretraining": 2.0, "packing_over_pil": 2.0, "probe_over_sgd": 10.0,
}  # fmt: skip
QUICK = ("later_over_limit", "later_over_plain_fp32", "later_over_plain_bf16", "packing_over_pil")


def ratios(speeds: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Median and range over the rounds, each round's figures with one another."""
    found = {}
    for name, (over, under) in OVER.items():
        if not isinstance(speeds.get(under), list) or not speeds[over]:
            continue
        found[name] = spread([a / b for a, b in zip(speeds[over], speeds[under], strict=True)])
    return found


def spread(values: list[float]) -> dict[str, float]:
    return {"median": round(statistics.median(values), 3), "low": round(min(values), 3), "high": round(max(values), 3)}


def name_of(race: Sequence[str]) -> str:
    return "/".join(race)


def training(races: list[tuple], rounds: int, first: bool) -> Iterator[dict[str, Any]]:
    from loops import Setting, best_workers, race

    workers = {}
    for task, network, size, images, peers in races:
        setting = Setting(task, network, part(photos(size), images), images)
        key = (network, size)
        workers[key] = workers.get(key) or best_workers(setting)
        begun = time.perf_counter()
        many = FIRST[network] if first else 0
        fresh = Setting(task, network, part(photos(size), many), many) if first else None
        speeds = race(setting, fresh, rounds, workers[key], peers)
        found = ratios(speeds)
        print(f"\n{task}, {network}, photos of {size} ({time.perf_counter() - begun:.0f} s), images/s:")
        known = {name: v for name, v in speeds.items() if isinstance(v, list) and v}
        print("  " + "  ".join(f"{name} {statistics.median(v):.0f}" for name, v in known.items()))
        for name, why in speeds.items():
            if isinstance(why, str):
                print(f"  {name} skipped: {why}")
        show(found)
        yield {
            "name": name_of((task, network, size)), "images": images, "first_images": many, "workers": workers[key],
            "images_per_second": speeds, "ratios": found,
        }  # fmt: skip


def show(found: dict[str, dict[str, float]]) -> None:
    for name, r in found.items():
        print(f"  {name:<32}{r['median']:7.2f}  [{r['low']:.2f}, {r['high']:.2f}]", flush=True)


def part(folder: Path, images: int) -> Path:
    """The first ``images`` of a folder, as links."""
    out = folder.with_name(f"{folder.name}-{images}")
    if not out.exists():
        for path in sorted(folder.rglob("*.jpg"), key=lambda p: p.name)[:images]:
            link = out / path.relative_to(folder)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.hardlink_to(path)
    return out


@functools.cache
def photos(size: str) -> Path:
    """Enough of them, cut once."""
    from photos import cut_photos

    width, height = map(int, size.split("x"))
    return cut_photos(Path(_temporary().name) / size, COUNTS[size], (width, height))


@functools.cache
def _temporary() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory()


def part_packing() -> dict[str, Any]:
    from once import packing

    speeds = packing(part(photos("500x375"), 1024), 64, ROUNDS)
    over = {
        f"over_{k}": spread([a / b for a, b in zip(speeds["unlabel"], speeds[k], strict=True)])
        for k in ("pil", "pil_processes")
    }
    print("\npacking photos of 500x375 for 64 px:")
    show(over)
    return {"images_per_second": speeds, "ratios": over}


def part_more() -> dict[str, Any]:
    from loops import Setting, same_speed_for_more_images

    few, many = 2048, COUNTS["96x96"]
    each = same_speed_for_more_images(
        Setting("rotation", "small", part(photos("96x96"), few), few), photos("96x96"), ROUNDS
    )
    print(f"\ntime per image with {many:,} images over that with {few:,}:")
    show({"more_over_few": spread(each)})
    return {"images": [few, many], "ratios": spread(each), "each": each}


def part_start() -> dict[str, Any]:
    from once import start

    seconds = start(part(photos("96x96"), 2048), 64, ROUNDS)
    print("\nseconds:", {k: spread(v) for k, v in seconds.items()})
    return {"seconds": seconds}


def part_million() -> dict[str, Any]:
    from once import many_images

    found = many_images((10_000, 1_000_000), ROUNDS)
    print("\nmany images:", json.dumps(found, indent=1))
    return found


def part_probe(run: Path, train: str, test: str) -> dict[str, Any]:
    from once import probe

    result = probe(run, train, test, draws=10, sgd_draws=ROUNDS)
    each = [t / result["unlabel_seconds_per_draw"] for t in result["sgd_seconds_per_draw"]]
    print("\nlinear evaluation:", json.dumps(result, indent=1))
    show({"probe_over_sgd": spread(each)})
    return {**result, "ratios": spread(each)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", default=PARTS, choices=PARTS)
    parser.add_argument("--labelled", nargs=2, metavar=("TRAIN", "TEST"), help="labelled sources for the probe")
    parser.add_argument("--run", type=Path, help="a finished run, for the probe")
    parser.add_argument("--only", default="", help="races whose name holds this, such as rotation/small/96x96")
    parser.add_argument("--quick", action="store_true", help="compare a few ratios with the stored ones")
    args = parser.parse_args()
    from unlabel.runfolder import commit, hardware, versions

    kept = json.loads(OUT.read_text()) if OUT.exists() else {}
    found: dict[str, Any] = {} if args.quick else dict(kept)
    about = {"hardware": hardware(), "versions": versions(), "commit": commit(), "threads": torch.get_num_threads()}
    races = [race for race in RACES if args.only in name_of(race[:3])]
    races = [(*RACES[0][:4], False)] if args.quick else races
    parts = ["training", "packing"] if args.quick else args.parts
    single = {"packing": part_packing, "more": part_more, "start": part_start, "million": part_million}
    if args.labelled and args.run:
        single["probe"] = functools.partial(part_probe, args.run, *args.labelled)
    elif "probe" in parts:
        print("linear evaluation: skipped, needs --labelled TRAIN TEST and --run RUN")
    for name in parts:
        if name == "training":
            rows = {row["name"]: row for row in found.get("training", [])}
            for row in training(races, ROUNDS, not args.quick):
                rows[row["name"]] = {**row, "about": about}
                found["training"] = list(rows.values())
                save(found, args.quick)
        elif name in single:
            found[name] = {"about": about, **single[name]()}
            save(found, args.quick)
    return compare(kept, found) if args.quick else summary(headline(found))


def headline(content: dict[str, Any], which: str = "median") -> dict[str, float]:
    """The named ratios: rotation on the small network, photos of 96 x 96, and the rest; ``which`` of the rounds."""
    found: dict[str, float] = {}
    if "training" in content:
        first = name_of(RACES[0][:3])
        for row in content["training"]:
            found |= {k: r[which] for k, r in row["ratios"].items()} if row["name"] == first else {}
    if "packing" in content:
        found["packing_over_pil"] = content["packing"]["ratios"]["over_pil"][which]
    if "probe" in content:
        found["probe_over_sgd"] = content["probe"]["ratios"][which]
    return found


def save(content: dict[str, Any], quick: bool) -> None:
    if not quick:
        OUT.parent.mkdir(exist_ok=True)
        OUT.write_text(json.dumps(content | {"ratios": headline(content)}, indent=1) + "\n")


def summary(named: dict[str, float]) -> int:
    print(f"\n{'ratio (rotation, small network, 96 x 96)':<44}{'median':>8}{'wanted':>8}")
    for name, value in named.items():
        print(f"{name:<44}{value:8.2f}{AT_LEAST[name]:8.2f}")
    return 0


def compare(kept: dict[str, Any], found: dict[str, Any]) -> int:
    before, now, best, worse = kept.get("ratios", {}), headline(found), headline(found, "high"), []
    if not before.keys() & set(QUICK):
        print(f"nothing to compare with: {OUT} has none of {', '.join(QUICK)}")
    for name in QUICK:
        if name in before:
            low = best[name] < 0.9 * before[name]  # medians alone differ by more from one quiet hour to the next
            worse += [name] if low else []
            mark = "  WORSE by 10 % in each round" if low else ""
            print(f"{name:<32} stored {before[name]:6.2f}  now {now[name]:6.2f}{mark}")
    return int(bool(worse))


if __name__ == "__main__":
    sys.exit(main())
