"""Few-label cats vs dogs, 64 px: the table at the top of README.md, from the photos to the figures.

    python scripts/cats_vs_dogs.py run --photos FOLDER      (labelled.tar.gz with cat/ and dog/, unlabelled.tar.gz)

Cost: on two cores with bf16 about four hours, of which two are pretraining (60 minutes of rotation, 20 of each task),
a quarter of an hour probes, the rest fine-tuning (an estimate: it was run in its parts, never as one).

Result (docs/results.md has all of it, with intervals): with 50 labels per class, fine-tuned, 84.9 % of the test photos
are right after an hour of rotation on cores with bf16, after 20 minutes of rotation, inpainting and denoising 80.6,
58.2 and 58.2 %, and 61.2 % from scratch; a linear probe of the hour 78.5 %, of random weights 56.3 %.

Splits once, by cluster of near-duplicates and by content hash, never by seed: test 2,500 and development 1,500
photos per class, the rest is the pool. Pretraining sees unlabelled + pool + development, without labels. Then the
ordinary commands, each printed before it runs; stopped at any moment, the same line goes on. The steps alone:

    python scripts/cats_vs_dogs.py split --photos FOLDER
    python scripts/cats_vs_dogs.py rotation RUN             rotation accuracy of a run on the test photos
    python scripts/cats_vs_dogs.py publish RESULTS.json     into results/, with its figure (--name: its name)
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
import tarfile
from pathlib import Path

import numpy as np
import torch

from pretext.rotation import Rotation, pairwise_accuracy
from unlabel import checkpoint
from unlabel.augment import clean, four_rotations
from unlabel.backbone import load_backbone
from unlabel.cache import ImageCache, load_cache
from unlabel.cli import main as command_line
from unlabel.duplicates import clusters
from unlabel.report import accuracy_svg, answer, format_table
from unlabel.sources import open_source

IMAGE_SIZE = 64
SIZE = ["--image-size", str(IMAGE_SIZE)]
PER_CLASS = {"test": 2500, "development": 1500}
TABLES = {"probe": "--protocol linear knn --draws 10", "finetune": "--protocol finetune --draws 3"}


def assign(labelled: ImageCache, ids: np.ndarray) -> dict[str, list[int]]:
    """Part -> rows of the labelled photos. Whole clusters, in the order of their smallest content hash."""
    assert labelled.labels is not None
    members: dict[int, list[int]] = {}
    for row, cluster in enumerate(ids.tolist()):
        members.setdefault(cluster, []).append(row)
    parts: dict[str, list[int]] = {"test": [], "development": [], "pool": []}
    room = {(part, c): n for part, n in PER_CLASS.items() for c in set(labelled.labels)}
    for rows in sorted(members.values(), key=lambda rows: min(labelled.hashes[r] for r in rows)):
        need = {c: sum(labelled.labels[r] == c for r in rows) for c in {labelled.labels[r] for r in rows}}
        part = next((p for p in PER_CLASS if all(room[p, c] >= n for c, n in need.items())), "pool")
        for c, n in need.items():
            if part != "pool":
                room[part, c] -= n
        parts[part].extend(rows)
    return parts


def split(photos: Path, out: Path) -> None:
    for name in ("labelled", "unlabelled"):
        folder = out / "photos" / name
        if not folder.exists():
            with tarfile.open(photos / f"{name}.tar.gz") as tar:
                tar.extractall(folder.with_suffix(".partial"), filter="data")
            os.replace(folder.with_suffix(".partial"), folder)
    labelled = load_cache(open_source(str(out / "photos" / "labelled")), IMAGE_SIZE)
    unlabelled = load_cache(open_source(str(out / "photos" / "unlabelled")), IMAGE_SIZE)
    ids, other = clusters([labelled, unlabelled])
    parts = assign(labelled, ids)
    tested = set(ids[parts["test"]].tolist())
    usable = [r for r in range(len(unlabelled)) if int(other[r]) not in tested]
    names = labelled.names
    links = {f"{part}/{names[r]}": f"labelled/{names[r]}" for part, rows in parts.items() for r in rows}
    pretrain = [r for part in ("pool", "development") for r in parts[part]]
    links |= {f"pretrain/labelled/{Path(names[r]).name}": f"labelled/{names[r]}" for r in pretrain}
    links |= {f"pretrain/unlabelled/{unlabelled.names[r]}": f"unlabelled/{unlabelled.names[r]}" for r in usable}
    for name, target in links.items():
        link = out / "split" / name
        link.parent.mkdir(parents=True, exist_ok=True)
        if not link.exists():
            os.link(out / "photos" / target, link)
    counts = {part: len(rows) for part, rows in parts.items()}
    counts |= {"pretrain": len(pretrain) + len(usable), "unlabelled_dropped": len(unlabelled) - len(usable)}
    counts |= {"clusters_labelled": len(set(ids.tolist())), "photos": len(labelled) + len(unlabelled)}
    (out / "split.json").write_text(json.dumps(counts, indent=2) + "\n")
    print(counts)


@torch.no_grad()
def rotation_accuracy(run: Path, out: Path) -> None:
    """Four-way, 0°/180° given the axis, and 0/180 against 90/270: the photos were squeezed, which tells the axis."""
    backbone = load_backbone(run)
    about = json.loads((run / "config.json").read_text())
    task = Rotation(backbone, Rotation.Config(**about["settings"]["task_settings"].get("rotation", {}))).eval()
    state = checkpoint.load_newest(run / "checkpoints")
    assert state is not None
    # As training left it: the exported backbone's BatchNorm is for upright images alone.
    for module, prefix in ((task, "tasks.rotation."), (backbone, "backbone.")):
        module.load_state_dict({k.removeprefix(prefix): v for k, v in state["model"].items() if k.startswith(prefix)})
    test = load_cache(open_source(str(out / "split" / "test")), IMAGE_SIZE)
    logits, labels = [], []
    for at in range(0, len(test), 250):
        views, turns = four_rotations(clean(torch.from_numpy(np.array(test.images[at : at + 250])), IMAGE_SIZE))
        logits.append(task.logits(views))
        labels.append(turns)
    scores, truth = torch.cat(logits), torch.cat(labels)
    half, quarter = pairwise_accuracy(scores, truth)
    hit = (scores.argmax(1) == truth).float().mean()
    found = {"photos": len(test), "four_way": float(hit), "half_turn": float(half), "axis": float(quarter)}
    (Path("results") / f"cats_vs_dogs_{run.name}_rotation_accuracy.json").write_text(json.dumps(found, indent=1) + "\n")
    print(found)


def publish(path: Path, name: str | None) -> None:
    """Copy a results.json into results/ and draw its figure there; both are called ``name``, else like its folder."""
    # Where the runs lay on the machine that made them is nobody's business.
    results = json.loads(path.read_text().replace(f"{path.resolve().parents[1]}/", "runs/cvd/"))
    base = f"results/cats_vs_dogs_{name or path.parent.name}"
    Path("results").mkdir(exist_ok=True)
    Path(f"{base}.svg").write_text(accuracy_svg(results), "utf-8")
    Path(f"{base}.json").write_text(json.dumps(results, indent=1) + "\n")
    print(format_table(results))
    print(answer(results))


def run(photos: Path, out: Path) -> None:
    """Everything: split, pretrain, probe, fine-tune, publish."""
    split(photos, out)
    parts, hour, table = out / "split", out / "rotation-60min", out / "table"
    pretrain = ["pretrain", "rotation", "--data", f"{parts}/pretrain", *SIZE, "--minutes", "60"]
    compare = ["compare", "--data", f"{parts}/pretrain", "--train", f"{parts}/pool", "--test", f"{parts}/test"]
    compare += [*SIZE, "--minutes", "20", "--also", str(hour), "--labels-per-class", "10", "50", "250"]
    command([*pretrain, "--out", str(hour)])
    for name, how in TABLES.items():
        command([*compare, *how.split(), "--out", str(table)])
        publish(table / "results.json", name)
    rotation_accuracy(hour, out)


def command(arguments: list[str]) -> None:
    print("unlabel", shlex.join(arguments), flush=True)
    if code := command_line(arguments):
        sys.exit(code)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=["run", "split", "rotation", "publish"])
    parser.add_argument("path", type=Path, nargs="?")
    parser.add_argument("--photos", type=Path)
    parser.add_argument("--out", type=Path, default=Path("runs/cvd"))
    parser.add_argument("--name", help="publish: what results/cats_vs_dogs_NAME is called")
    args = parser.parse_args()
    if args.step in ("run", "split"):
        if args.photos is None:
            parser.error(f"{args.step} needs --photos FOLDER")
        (run if args.step == "run" else split)(args.photos, args.out)
    elif args.path is None:
        parser.error(f"{args.step} needs a path")
    elif args.step == "rotation":
        rotation_accuracy(args.path, args.out)
    else:
        publish(args.path, args.name)


if __name__ == "__main__":
    main()
