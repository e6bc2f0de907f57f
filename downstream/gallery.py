"""Pictures for the report: the test images on a map of the features, and the classifier's surest hits and misses."""

from __future__ import annotations

from typing import Any

import numpy as np

from downstream import evaluate as ev
from downstream.classifier import load_classifier, stored_key
from downstream.feature_map import flat
from downstream.finetune import predict_logits
from unlabel.apply import embed
from unlabel.backbone import load_backbone
from unlabel.cache import Rows, evenly_spaced
from unlabel.pictures import scatter, sheet, write_png

__all__ = ["draw_gallery", "surest"]

MAPPED, JUDGED, SHOWN = 1000, 5000, 12


def draw_gallery(table: ev.Table, arm: ev.Arm) -> dict[str, Any]:
    """Writes pictures/map.png, and with a classifier pictures/hits.png and misses.png; returns what is on them."""
    folder, test = table.out / "pictures", table.test
    for old in ("map", "hits", "misses"):
        (folder / f"{old}.png").unlink(missing_ok=True)
    rows = evenly_spaced(len(test), MAPPED)
    backbone = load_backbone(arm.runs[0]).to(table.device)
    images = np.array(Rows(test.pixels, rows))
    about: dict[str, Any] = {"arm": arm.name}
    if len(rows) >= 10:
        at = flat(embed(backbone, images), "tsne")
        write_png(folder / "map.png", scatter(at, images, test.y[rows]))
        about["map"] = {"images": len(rows), "classes": table.classes}
    # Otherwise what lies there, if anything, is another table's; fine-tuning keeps this arm's, or had it already.
    if table.product not in arm.protocols(table.protocols) or stored_key(table.out) is None:
        return about
    model, classes = load_classifier(table.out)
    rows = evenly_spaced(len(test), JUDGED)
    log_p = predict_logits(model.to(table.device), Rows(test.pixels, rows))
    for name, picks in surest(log_p, test.y[rows]).items():
        if not len(picks):
            continue
        shown = np.array(Rows(test.pixels, rows[picks]))
        write_png(folder / f"{name}.png", sheet([shown]))
        p = np.exp(log_p[picks] - np.logaddexp.reduce(log_p[picks], axis=1, keepdims=True))
        about[name] = [
            {
                "name": test.names[rows[k]],
                "is": classes[test.y[rows[k]]],
                "said": classes[row.argmax()],
                "p": float(row.max()),
            }
            for k, row in zip(picks, p, strict=True)
        ]
    return about


def surest(log_p: np.ndarray, y: np.ndarray) -> dict[str, np.ndarray]:
    """Rows of (N, K) log-probabilities: up to twelve right and twelve wrong ones, the surest first."""
    said = log_p.argmax(1)
    margin = log_p.max(1) - np.logaddexp.reduce(log_p, axis=1)
    order = np.argsort(-margin, kind="stable")
    right = said[order] == y[order]
    return {"hits": order[right][:SHOWN], "misses": order[~right][:SHOWN]}
