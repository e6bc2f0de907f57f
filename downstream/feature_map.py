"""`unlabel map`: a run's features, or its code, in two dimensions, as a picture of thumbnails."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import numpy as np
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE
from sklearn.neighbors import NearestNeighbors

from downstream.features import pixels_of
from downstream.trained import Code, Load
from unlabel.apply import embed, safe_cell
from unlabel.backbone import load_backbone
from unlabel.cache import ImageCache, evenly_spaced, load_cache
from unlabel.checkpoint import write_atomic
from unlabel.config import MapConfig
from unlabel.distributed import pick_device
from unlabel.errors import UserError
from unlabel.page import figure, write_page
from unlabel.pictures import scatter, write_png
from unlabel.report_html import colour_key, show
from unlabel.sources import open_source
from unlabel.start import refuse_odd_out

__all__ = ["draw_map", "flat", "neighbours_agree"]

NEIGHBOURS = 10
SIDE = 32  # px of the pixels' own map, at most


def flat(features: np.ndarray, method: str) -> np.ndarray:
    """(N, C) to (N, 2): principal components, or t-SNE (van der Maaten & Hinton 2008) of up to 50 of them."""
    if not features.std(0).any():  # all images look alike to this network
        return np.zeros((len(features), 2))
    if features.shape[1] == 1:
        return np.concatenate([features, np.zeros_like(features)], 1)
    if method == "pca":
        return PCA(2, random_state=0).fit_transform(features)
    few = PCA(min(50, *features.shape), random_state=0).fit_transform(features)
    perplexity = min(30.0, max(1.0, (len(features) - 1) / 3))
    return TSNE(2, init="pca", perplexity=perplexity, random_state=0).fit_transform(few)


def neighbours_agree(at: np.ndarray, labels: list[str]) -> float:
    """Share of the points (N, 2) whose class is that of most of their ten nearest others."""
    k = min(NEIGHBOURS, len(at) - 1)
    others = NearestNeighbors(n_neighbors=k).fit(at).kneighbors(return_distance=False)  # without the point itself
    y = np.unique(labels, return_inverse=True)[1]
    votes = np.stack([np.bincount(y[row], minlength=y.max() + 1) for row in others])
    return float((votes.argmax(1) == y).mean())


def draw_map(config: MapConfig, load: Load) -> Path:
    """Writes map.png, map.csv (name, x, y) and map.html."""
    out = config.out or config.run / "map"
    refuse_odd_out(out, config.data)
    device = pick_device(config.device)
    backbone = load_backbone(config.run).to(device)
    source = open_source(config.data, config.labels)
    cache = load_cache(source, backbone.spec.image_size, max_skipped=config.max_skipped)
    if len(cache) < 3 or config.images < 3:
        raise UserError("a map needs three images or more")
    rows = evenly_spaced(len(cache), config.images)
    cache = cache.subset(np.random.default_rng(0).permutation(rows))
    if config.method == "code":
        task = load(config.run, None, device)
        if not task.can("to_code"):
            raise UserError(f"{task.name} makes no code: --method tsne or pca")
        at = Code(task).to_code(cache.images, "code")
        if at.shape[1] != 2:
            raise UserError(f"the code has {at.shape[1]} numbers, not two: --method tsne or pca")
    else:
        at = flat(embed(backbone, cache.images, progress="features"), config.method)
    return write_map(out, at, cache, config.method, backbone.spec.image_size)


def write_map(out: Path, at: np.ndarray, cache: ImageCache, method: str, size: int) -> Path:
    names = sorted(set(cache.labels or ()))
    groups = np.array([names.index(label) for label in cache.labels or ()]) if len(names) > 1 else None
    picture = write_png(out / "map.png", scatter(at, np.array(cache.images), groups))
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["name", "x", "y"])
    for name, (x, y) in zip(cache.names, at, strict=True):
        writer.writerow([safe_cell(name), f"{x:.6g}", f"{y:.6g}"])
    write_atomic(out / "map.csv", text.getvalue().encode("utf-8", "replace"))
    sections = ["<h1>A map of the images</h1>"]
    if groups is not None:
        agree = neighbours_agree(at, cache.labels or [])
        pixels = pixels_of(cache, min(size, SIDE), 3).reshape(len(cache), -1)
        plain = neighbours_agree(flat(pixels, "pca"), cache.labels or [])
        about = (
            f"{100 * agree:.1f} % of the images have the class of most of their ten neighbours on the map; "
            f"on one of two principal components of the pixels {100 * plain:.1f} %"
        )
        print(about)
        sections.append(colour_key(names))
        sections.append(f"<p>{show(about)}.</p>")
    words = {"tsne": "t-SNE of the features", "pca": "two principal components of the features", "code": "the code"}
    about = f"{len(cache):,} images: {words[method]}. Of thumbnails that would overlap one is shown."
    sections.append(figure(picture, about))
    print(f"open {write_page(out / 'map.html', 'A map of the images', sections)}")
    return out
