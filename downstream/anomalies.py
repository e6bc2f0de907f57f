"""`unlabel anomalies`: how strange is each image to a network that was trained on normal ones?

| score | what |
| --- | --- |
| the task's name | how badly the task does on the image: - log p of the four turns (after Golan 2018), the logits of |
| | the 72 transformations, or the squared error |
| features | distance to the nearest normal images in the features of the last two stages |
| pixels | the same in raw pixels |
| components | squared error of 40 principal components of the pixels |
| svm | one-class support vector machine on the pixels |

Images are ranked by the first. It is fixed before any label is read; the others stand beside it as controls.
"""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import numpy as np
import torch
from sklearn.decomposition import PCA
from sklearn.metrics import average_precision_score, roc_auc_score
from sklearn.neighbors import NearestNeighbors
from sklearn.svm import OneClassSVM
from tqdm import tqdm

from downstream.features import Block, extract, feature_stats, is_grey, pixels_of, standardised
from downstream.trained import Load, Trained, device_of
from unlabel.apply import safe_cell
from unlabel.backbone import Backbone, load_backbone
from unlabel.cache import ImageCache, evenly_spaced, load_cache, printable
from unlabel.checkpoint import write_atomic
from unlabel.config import AnomaliesConfig
from unlabel.distributed import pick_device
from unlabel.duplicates import known_among
from unlabel.errors import UserError
from unlabel.page import figure, write_page
from unlabel.pictures import sheet, write_png
from unlabel.precision import autocast, pick_precision
from unlabel.report_html import html_table, show
from unlabel.sources import open_source
from unlabel.start import refuse_odd_out

__all__ = ["anomalies", "score_images"]

NEIGHBOURS = 3
COMPONENTS = 40
SIDE = 32  # px that the controls on pixels work at, at most
AT_MOST = 10_000  # normal images that distances are taken to
SVM_AT_MOST = 3000
SHOWN = 16


def score_images(
    task: Trained, backbone: Backbone, normal: ImageCache, test: ImageCache, same: bool = False
) -> dict[str, np.ndarray]:
    """Score name to (N,) scores of the ``test`` images, higher is stranger; that of the task is the first.

    ``backbone``: the exported one, with BatchNorm's statistics of clean images.

    ``same``: the test images are the normal ones themselves, so none is its own neighbour.
    """
    scores, device = {task.name: surprise(task, test)}, device_of(task)
    size = backbone.spec.image_size
    rows = evenly_spaced(len(normal), AT_MOST)
    few, own = normal.subset(rows), np.full(len(test), -1)
    if same:
        own[rows] = np.arange(len(rows))
    known = extract(backbone, few.images, size, device=device, progress="normal features")
    blocks: list[Block] = [(stage, "2x2") for stage in known.stages[-2:]]
    stats = feature_stats(known)
    new = extract(backbone, test.images, size, device=device, progress="test features")
    both = [standardised(f, blocks, stats, np.arange(len(f))) for f in (known, new)]
    scores["features"] = near(both[0], both[1], own)
    small = min(size, SIDE)
    channels = 1 if is_grey(few.images) and is_grey(test.images) else 3
    known_px, new_px = (pixels_of(c, small, channels).reshape(len(c), -1) for c in (few, test))
    scores["pixels"] = near(known_px, new_px, own)
    pca = PCA(min(COMPONENTS, *known_px.shape), svd_solver="randomized", random_state=0).fit(known_px)
    left = new_px - pca.inverse_transform(pca.transform(new_px))
    scores["components"] = np.square(left).sum(1)
    machine = OneClassSVM(nu=0.1).fit(known_px[evenly_spaced(len(known_px), SVM_AT_MOST)])
    scores["svm"] = -machine.decision_function(new_px)
    return scores


@torch.no_grad()
def surprise(task: Trained, cache: ImageCache) -> np.ndarray:
    """(N,): the task's own score, in bf16 where the hardware has it."""
    parts, device = [], device_of(task)
    with tqdm(total=len(cache), desc="score", unit="img") as bar:
        for batch in task.batches(cache.images, cache.hashes):
            with autocast(device, pick_precision("auto", device)):
                parts.append(task.surprise(batch).float().cpu().numpy())
            bar.update(len(parts[-1]))
    return np.concatenate(parts)


def near(known: np.ndarray, new: np.ndarray, own: np.ndarray) -> np.ndarray:
    """(N,): mean distance of the rows of ``new`` to their nearest neighbours among ``known``.

    ``own`` (N,): which row of ``known`` is the image itself and does not count; -1 for none.
    """
    k = min(NEIGHBOURS + 1, len(known))
    distance, index = NearestNeighbors(n_neighbors=k, algorithm="brute").fit(known).kneighbors(new)
    distance = np.where(index == own[:, None], np.inf, distance)
    nearest = np.sort(distance, axis=1)[:, :NEIGHBOURS]
    return np.ma.masked_invalid(nearest).mean(1).filled(0.0)


def judged(scores: dict[str, np.ndarray], strange: np.ndarray) -> dict[str, dict[str, float]]:
    """Score name to area under the ROC curve and average precision; ``strange`` (N,) bool are the anomalies."""
    return {
        name: {
            "auroc": float(roc_auc_score(strange, s)),
            "average_precision": float(average_precision_score(strange, s)),
        }
        for name, s in scores.items()
    }


def anomalies(config: AnomaliesConfig, load: Load) -> Path:
    """Writes anomalies.csv (strangest first), anomalies.png, anomalies.html; and, with --normal, auroc.json."""
    if config.labels and not config.test:
        raise UserError("--labels is for the --test images: give some")
    out = config.out or config.run / "anomalies"
    refuse_odd_out(out, (*config.data, *(config.test or ())))
    device = pick_device(config.device)
    backbone, task = load_backbone(config.run).to(device), load(config.run, None, device)
    size = backbone.spec.image_size
    normal = load_cache(open_source(config.data), size, max_skipped=config.max_skipped)
    test = normal
    if config.test:
        test = load_cache(open_source(config.test, config.labels), size, max_skipped=config.max_skipped)
    strange = _strange(config, test)
    known = known_among(normal, test) if config.test else 0
    if known:
        what = f"{known} --test images are near-duplicates of --data images"
        print(f"note: {what}, and look normal for that reason alone")
    scores = score_images(task, backbone, normal, test, same=not config.test)
    first = next(iter(scores))
    order = np.argsort(-scores[first], kind="stable")
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["name", *scores, *(["anomaly"] if strange is not None else [])])
    for k in order:
        row = [safe_cell(test.names[int(k)]), *(f"{s[k]:.6g}" for s in scores.values())]
        writer.writerow([*row, *([int(strange[k])] if strange is not None else [])])
    write_atomic(out / "anomalies.csv", text.getvalue().encode("utf-8", "replace"))
    ends = order[:SHOWN], order[-SHOWN:]
    picture = write_png(out / "anomalies.png", sheet([np.array(test.images[part]) for part in ends]))
    found = judged(scores, strange) if strange is not None else {}
    if found:
        about = {"normal": list(config.normal), "images": len(test), "anomalies": int(strange.sum()), "in_data": known}  # type: ignore[union-attr]
        write_atomic(out / "auroc.json", (json.dumps({**about, "scores": found}, indent=1) + "\n").encode())
    for name, reason in test.skipped:
        print(f"skipped {printable(name)}: {reason}")
    for name, values in found.items():
        print(f"{name:<14} AUROC {values['auroc']:.3f}  average precision {values['average_precision']:.3f}")
    print(f"{out / 'anomalies.csv'}: {len(test):,} images, strangest first; open {_page(out, picture, found, first)}")
    return out


def _strange(config: AnomaliesConfig, test: ImageCache) -> np.ndarray | None:
    if not config.normal:
        return None
    if not config.test:
        raise UserError("--normal asks how well anomalies are told from normal images: give some of both by --test")
    if test.labels is None:
        raise UserError("--normal names classes, but the --test images have none: class folders, or --labels")
    unknown = sorted(set(config.normal) - set(test.labels))
    if unknown:
        raise UserError(f"--normal {unknown[0]}: the classes of --test are {', '.join(sorted(set(test.labels)))}")
    strange = np.array([label not in config.normal for label in test.labels])
    if not strange.any():
        raise UserError("every --test image is normal: there is nothing to tell apart")
    return strange


def _page(out: Path, picture: Path, found: dict[str, dict[str, float]], first: str) -> Path:
    sections = ["<h1>The strangest images</h1>"]
    sections.append(figure(picture, f"Ranked by {first}: above the strangest, below the least strange."))
    if found:
        rows = [[show(k), show(v["auroc"], 3), show(v["average_precision"], 3)] for k, v in found.items()]
        sections.append(html_table(["score", "AUROC", "average precision"], rows))
    return write_page(out / "anomalies.html", "The strangest images", sections)
