"""Few-label cats vs dogs.

Splits once, by cluster of near-duplicates and by content hash, never by seed: test 2,500 and development 1,500
photos per class, the rest is the pool. Pretraining sees unlabelled + pool + development, without labels.

    python scripts/cats_vs_dogs.py split --photos FOLDER --out runs/cats-vs-dogs
        FOLDER holds labelled.tar.gz (cat/, dog/) and unlabelled.tar.gz
"""

from __future__ import annotations

import argparse
import json
import os
import tarfile
from pathlib import Path

import numpy as np

from unlabel.cache import ImageCache, load_cache
from unlabel.duplicates import clusters
from unlabel.sources import open_source

IMAGE_SIZE = 64
PER_CLASS = {"test": 2500, "development": 1500}


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=["split"])
    parser.add_argument("--photos", type=Path)
    parser.add_argument("--out", type=Path, default=Path("runs/cats-vs-dogs"))
    args = parser.parse_args()
    split(args.photos, args.out)


if __name__ == "__main__":
    main()
