"""The benchmark: one table, and results/benchmark.json with every repeat.

    bash scripts/benchmark                                     training, packing, starting: half an hour on two cores
    bash scripts/benchmark --labelled TRAIN TEST --run RUN     also linear evaluation of a run, on labelled images
    bash scripts/benchmark --parts training packing            some parts only; the others stay as they are in the file
    bash scripts/benchmark --quick                             three minutes: fails if a ratio is 10 % below the file's

Photos are cut from scikit-learn's two sample photographs, 96 x 96 and 500 x 375. The other libraries run if they are
installed (the extra `bench`).
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

OUT = Path("results/benchmark.json")
ROUNDS = 5
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
    """Median and range over the rounds, each round's figures with one another; the first epoch is one figure."""
    found = {}
    for name, (over, under) in OVER.items():
        if not isinstance(speeds.get(under), list):
            continue
        below = speeds[under]
        above = speeds[over] * len(below) if over == "first" else speeds[over]
        each = [a / b for a, b in zip(above, below, strict=True)]
        found[name] = spread(each)
    return found


def spread(values: list[float]) -> dict[str, float]:
    return {"median": round(statistics.median(values), 3), "low": round(min(values), 3), "high": round(max(values), 3)}


def name_of(row: dict[str, Any]) -> str:
    return "/".join(row[key] for key in ("task", "network", "photos"))


def training(folders: dict[str, Path], races: list[tuple], rounds: int) -> Iterator[dict[str, Any]]:
    from loops import Setting, best_workers, race

    workers = {}
    for task, network, photos, images, peers in races:
        setting = Setting(task, network, part(folders[photos], images), images)
        key = (network, photos)
        workers[key] = workers.get(key) or best_workers(setting)
        begun = time.perf_counter()
        speeds = race(setting, rounds, workers[key], peers)
        found = ratios(speeds)
        print(f"\n{task}, {network}, photos of {photos} ({time.perf_counter() - begun:.0f} s), images/s:")
        print("  " + "  ".join(f"{n} {statistics.median(v):.0f}" for n, v in speeds.items() if isinstance(v, list)))
        for name, why in speeds.items():
            if isinstance(why, str):
                print(f"  {name} skipped: {why}")
        show(found)
        yield {
            "task": task, "network": network, "photos": photos, "images": images, "workers": workers[key],
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


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", default=["training", "packing", "more", "start", "million", "probe"])
    parser.add_argument("--labelled", nargs=2, metavar=("TRAIN", "TEST"), help="labelled sources for the probe")
    parser.add_argument("--run", type=Path, help="a finished run, for the probe")
    parser.add_argument("--only", default="", help="races whose name holds this, such as rotation/small/96x96")
    parser.add_argument("--quick", action="store_true", help="compare a few ratios with the stored ones")
    args = parser.parse_args()
    from loops import Setting, same_speed_for_more_images
    from once import many_images, packing, probe, start
    from photos import cut_photos

    from unlabel.runfolder import commit, hardware, versions

    kept = json.loads(OUT.read_text()) if OUT.exists() else {}
    kept = kept if "ratios" in kept else {}
    found: dict[str, Any] = {}
    races = [race for race in RACES if args.only in "/".join(race[:3])]
    races = [(*RACES[0][:4], False)] if args.quick else races
    parts = ["training", "packing"] if args.quick else args.parts
    with tempfile.TemporaryDirectory() as temporary:
        photos = Path(temporary)
        folders = {
            "96x96": cut_photos(photos / "96x96", 20_000 if "more" in parts else 2048, (96, 96)),
            "500x375": cut_photos(photos / "500x375", 1024, (500, 375)),
        }
        about = {"hardware": hardware(), "versions": versions(), "commit": commit(), "threads": torch.get_num_threads()}
        if "training" in parts:
            rows = {name_of(row): row for row in kept.get("training", {}).get("rows", [])} if not args.quick else {}
            for row in training(folders, races, ROUNDS):
                rows[name_of(row)] = {**row, "about": about}
                found["training"] = {"rounds": ROUNDS, "rows": list(rows.values())}
                save(kept | found, args.quick)
        if "packing" in parts:
            speeds = packing(folders["500x375"], 64, ROUNDS)
            over = {f"over_{k}": spread([a / b for a, b in zip(speeds["unlabel"], speeds[k], strict=True)])
                    for k in ("pil", "pil_processes")}  # fmt: skip
            found["packing"] = {"about": about, "images_per_second": speeds, "ratios": over}
            print("\npacking photos of 500x375 for 64 px:")
            show(over)
            save(kept | found, args.quick)
        if "more" in parts:
            setting = Setting("rotation", "small", part(folders["96x96"], 2048), 2048)
            each = same_speed_for_more_images(setting, folders["96x96"], ROUNDS)
            found["more"] = {"about": about, "images": [2048, 20_000], "ratios": spread(each), "each": each}
            print("\ntime per image with 20,000 images over that with 2,048:")
            show({"more_over_few": spread(each)})
            save(kept | found, args.quick)
        if "start" in parts:
            found["start"] = {"about": about, "seconds": start(part(folders["96x96"], 2048), 64, ROUNDS)}
            print("\nseconds:", {k: spread(v) for k, v in found["start"]["seconds"].items()})
            save(kept | found, args.quick)
    if "million" in parts:
        found["million"] = {"about": about, **many_images((10_000, 1_000_000), ROUNDS)}
        print("\nmany images:", json.dumps({k: v for k, v in found["million"].items() if k != "about"}, indent=1))
        save(kept | found, args.quick)
    if "probe" in parts and args.labelled and args.run:
        result = probe(args.run, *args.labelled, draws=10, sgd_draws=ROUNDS)
        each = [t / result["unlabel_seconds_per_draw"] for t in result["sgd_seconds_per_draw"]]
        found["probe"] = {"about": about, **result, "ratios": spread(each)}
        print("\nlinear evaluation:", json.dumps(result, indent=1))
        show({"probe_over_sgd": spread(each)})
        save(kept | found, args.quick)
    elif "probe" in parts:
        print("\nlinear evaluation: skipped, needs --labelled TRAIN TEST and --run RUN")
    return compare(kept, found) if args.quick else summary(json.loads(OUT.read_text()))


def headline(content: dict[str, Any]) -> dict[str, float]:
    """The named ratios: rotation on the small network, photos of 96 x 96, and the other parts."""
    found: dict[str, float] = {}
    if "training" in content:
        rows = {name_of(row): row for row in content["training"]["rows"]}
        main = rows.get("/".join(RACES[0][:3]), {"ratios": {}})
        found |= {name: r["median"] for name, r in main["ratios"].items()}
    if "packing" in content:
        found["packing_over_pil"] = content["packing"]["ratios"]["over_pil"]["median"]
    if "probe" in content:
        found["probe_over_sgd"] = content["probe"]["ratios"]["median"]
    return found


def save(content: dict[str, Any], quick: bool) -> None:
    if not quick:
        OUT.parent.mkdir(exist_ok=True)
        OUT.write_text(json.dumps({"ratios": {}} | content | {"ratios": headline(content)}, indent=1) + "\n")


def summary(content: dict[str, Any]) -> int:
    print(f"\n{'ratio (rotation, small network, 96 x 96)':<44}{'median':>8}{'wanted':>8}")
    for name, value in content["ratios"].items():
        print(f"{name:<44}{value:8.2f}{AT_LEAST[name]:8.2f}")
    return 0


def compare(kept: dict[str, Any], found: dict[str, Any]) -> int:
    before, now, worse = kept.get("ratios", {}), headline(found), []
    for name in QUICK:
        if name in before:
            low = now[name] < 0.9 * before[name]
            worse += [name] if low else []
            print(f"{name:<32} stored {before[name]:6.2f}  now {now[name]:6.2f}{'  WORSE by over 10 %' if low else ''}")
    return int(bool(worse))


if __name__ == "__main__":
    sys.exit(main())
