"""One class is normal, the others are not: AUROC for each class in turn, trained on the normal class only.

    python scripts/anomalies.py fashion-mnist --task rotation --minutes 2.5 --image-size 28 --out runs/anomalies

Cost: classes × (minutes + scoring). Result: results/anomalies_NAME_TASK.json and a table: the score of the task, fixed
in advance (transformation-based: Golan & El-Yaniv 2018), beside feature distance and three scores of raw pixels; their
means over the classes, and the differences to the best of the pixels' scores, paired over the classes (t interval).
Finished classes are not done again. ``--classes cat dog`` does these alone and makes no table: two processes of one
thread each, with other classes, are quicker than one of two threads.

Solar cells (PyPI's elpv-dataset, unpacked; Buerhop-Lutz et al. 2018): functional is probability 0, defective is 1, what
lies between is left out; half of the functional cells, by the hash of their content, are trained on, the others tested:

    python scripts/anomalies.py elpv-mono --elpv FOLDER/elpv_dataset/data --image-size 96 --out runs/anomalies
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
from pathlib import Path

import numpy as np
from scipy.stats import t as student

from downstream.anomalies import judged, score_images
from pretext.trained import load_trained
from unlabel.backbone import load_backbone
from unlabel.cache import load_cache
from unlabel.checkpoint import write_atomic
from unlabel.cli import main as command_line
from unlabel.distributed import pick_device
from unlabel.runfolder import commit, hardware, versions
from unlabel.sources import open_source, own_test_split

PIXELS = ("pixels", "components", "svm")


def write_out(spec: str, folder: Path) -> Path:
    """The images of a source as files, so that each class is a folder of its own. Two processes may do it at once."""
    if not folder.exists():
        source, partial = open_source(spec), folder.with_suffix(f".{os.getpid()}")
        for k, load in source.read():
            path = partial / source.names[k]
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(load())
        try:
            partial.rename(folder)
        except OSError:  # the other process was quicker
            if not folder.exists():
                raise
            shutil.rmtree(partial)
    return folder


def solar_cells(data: Path, kind: str, out: Path) -> tuple[Path, Path]:
    """``kind``: mono or poly. Folders with the one class to train on, and with the two to test."""
    for line in (data / "labels.csv").read_text().splitlines():
        name, probability, its_kind = line.split()
        if its_kind != kind or float(probability) not in (0, 1):
            continue
        content = (data / name).read_bytes()
        functional = float(probability) == 0
        trained = functional and int(hashlib.sha256(content).hexdigest(), 16) % 2 == 0
        path = out / ("train" if trained else "test") / ("functional" if functional else "defective") / Path(name).name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return out / "train", out / "test"


def one_class(args: argparse.Namespace, out: Path, name: str, train: Path, test: Path) -> dict[str, dict[str, float]]:
    """Scores with the class ``name`` as the normal one; what is in ``out`` is not done again."""
    stored = out / f"{args.task}-{name}.json"
    settings = [args.minutes, args.image_size, *args.flags]
    known = json.loads(stored.read_text()) if stored.exists() else {}
    if known.get("settings") == settings:
        return known["scores"]
    run = out / "runs" / f"{args.task}-{name}"
    command = ["pretrain", args.task, "--data", str(train / name), "--out", str(run), *args.flags]
    command += ["--image-size", str(args.image_size), "--minutes", str(args.minutes), "--no-flip"]
    if code := command_line(command):
        raise SystemExit(code)
    normal = load_cache(open_source(str(train / name)), args.image_size)
    new = load_cache(open_source(str(test)), args.image_size)
    assert new.labels is not None
    device = pick_device("auto")
    task, backbone = load_trained(run, None, device), load_backbone(run).to(device)
    scores = score_images(task, backbone, normal, new)
    found = judged(scores, np.array([label != name for label in new.labels]))
    stored.write_text(json.dumps({"settings": settings, "scores": found}, indent=1) + "\n")
    return found


def same_sources(stored: Path, sources: str) -> None:
    """What one data set gave must not stand for another's."""
    if not stored.exists():
        write_atomic(stored, sources.encode())  # of two processes that begin at once, neither reads half of it
    if stored.read_text() != sources:
        raise SystemExit(f"{stored.parent} holds the results of other images: choose another --name or --out")


def interval(values: np.ndarray) -> list[float] | None:
    """95 % t interval of the mean."""
    if len(values) < 2:
        return None
    half = student.ppf(0.975, len(values) - 1) * values.std(ddof=1) / np.sqrt(len(values))
    return [float(values.mean() - half), float(values.mean() + half)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("train", help="a named set, or a source with class folders")
    parser.add_argument("--test", help="a source with the same classes (a named set has its own)")
    parser.add_argument("--elpv", type=Path, help="where elpv-dataset's labels.csv is; train: elpv-mono, elpv-poly")
    parser.add_argument("--task", default="rotation")
    parser.add_argument("--minutes", type=float, default=2.5)
    parser.add_argument("--image-size", type=int, default=32)
    parser.add_argument("--name", help="of the data, in the name of the result; a named set's is its own")
    parser.add_argument("--classes", nargs="+", help="these alone, and no table; without it all that are not done yet")
    parser.add_argument("--out", type=Path, default=Path("runs/anomalies"))
    args, args.flags = parser.parse_known_args()
    if not args.name and ("/" in args.train or Path(args.train).exists()):
        parser.error("--name is needed where the images are a file or folder")
    name = args.name or args.train.replace(":", "-")
    out, spec = args.out / name, args.test or own_test_split(args.train)
    same_sources(out / "sources.txt", f"{args.elpv or args.train}\n{spec}\n")
    if args.elpv:
        train, test = solar_cells(args.elpv, args.train.removeprefix("elpv-"), out)
    elif spec is None:
        parser.error("--test is needed")
    else:
        train, test = write_out(args.train, out / "train"), write_out(spec, out / "test")
    classes = sorted(p.name for p in train.iterdir())
    if unknown := set(args.classes or ()) - set(classes):
        parser.error(f"--classes {' '.join(sorted(unknown))}: the classes are {', '.join(classes)}")
    table = {c: one_class(args, out, c, train, test) for c in args.classes or classes}
    if args.classes:
        return
    means = {s: float(np.mean([table[c][s]["auroc"] for c in classes])) for s in table[classes[0]]}
    best = max(PIXELS, key=means.__getitem__)
    differences = {}
    for score in (next(iter(means)), "features"):
        each = np.array([table[c][score]["auroc"] - table[c][best]["auroc"] for c in classes])
        differences[score] = {"mean": float(each.mean()), "interval": interval(each)}
    about = {
        "train": name, "task": args.task, "minutes_per_class": args.minutes, "image_size": args.image_size,
        "flags": args.flags, "classes": table, "mean_auroc": means, "best_of_pixels": best,
        "above_pixels": differences,
        "hardware": hardware(), "versions": versions(), "commit": commit(),
    }  # fmt: skip
    Path("results").mkdir(exist_ok=True)
    path = Path("results") / f"anomalies_{name.replace('-', '_')}_{args.task}.json"
    path.write_text(json.dumps(about, indent=1) + "\n")
    print(f"{'normal class':<14}" + "".join(f"{s:>16}" for s in means))
    for c in classes:
        print(f"{c:<14}" + "".join(f"{table[c][s]['auroc']:>16.3f}" for s in means))
    print(f"{'mean':<14}" + "".join(f"{v:>16.3f}" for v in means.values()))
    for score, found in differences.items():
        line = f"{score} - {best}: {found['mean']:+.3f}"
        if found["interval"]:
            low, high = found["interval"]
            line += f" [{low:+.3f}, {high:+.3f}], paired over {len(classes)} classes"
        print(line)


if __name__ == "__main__":
    main()
