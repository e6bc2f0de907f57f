"""Scores of a frozen backbone that need no labels, each by its paper's formula.

| score | better | of |
| --- | --- | --- |
| `effective_rank` | high | how many directions the features vary in, by variance |
| `rankme` | high | the same by singular values, of features that are not centred |
| `alpha_req` | near 1 | how fast the variances of the directions fall |
| `lidar` | high | in how many directions images differ by more than their altered copies do |
| `alignment` | low | how far an image's altered copies are apart |
| `uniformity` | low | how evenly images fill the sphere |
| `rotation_probe`, `jigsaw_probe` | high | what a linear classifier reads out: the turn, the order of four tiles |

The features are the backbone's last ones, pooled: what a linear probe sits on. How many images, how many copies and
where the constants come from: docs/label-free.md.
"""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from scipy.linalg import eigh
from scipy.special import entr
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from torch import Tensor
from tqdm import tqdm

from downstream.features import block_stats
from downstream.finetune import cutout
from unlabel.augment import clean, colour_jitter, random_view
from unlabel.backbone import Backbone
from unlabel.cache import Pixels
from unlabel.draws import Draws
from unlabel.errors import UserError

__all__ = ["alignment", "alpha_req", "covariance_spectrum", "effective_rank", "label_free", "lidar", "passes", "rankme"]
__all__ += ["held_out_log_p", "jigsaw_accuracy", "rotation_accuracy", "uniformity"]

IMAGES = 4096  # of the pool, at most
COPIED = 1024  # of these, the ones that are copied: or twice as many as features, where that is more
COPIES = 10
PROBED = 2048  # the ones that are turned, and cut into tiles
FOLDS = 4
EPSILON = 1e-7  # of RankMe and LiDAR
DELTA = 1e-4  # of LiDAR
RANKS = (4, 100)  # that alpha-ReQ's line is fitted to
ROUNDING = 1e-6  # singular values below this share of the largest one are float32's rounding
PROBE_C = 10.0  # inverse strength of the probes' regularisation, for features of length about 1
TILE = 7 / 8  # side of a tile ÷ half the side of the image

_CLEAN = "pooled last features of clean images"
_COPIED = f"pooled last features of {COPIES} altered copies of each image"
_TURNED = "pooled last features of the four turns of each image"
_TILED = "pooled last features of four tiles of each image"


# ---- The scores, as functions of features


def covariance_spectrum(features: np.ndarray) -> np.ndarray:
    """(min(N, D),) eigenvalues of the covariance of features (N, D), largest first; those of rounding errors are 0."""
    x = np.asarray(features, np.float64)
    if x.ndim != 2 or len(x) < 2:
        raise ValueError(f"features of at least two images, (N, D); got {x.shape}")
    mean = x.mean(axis=0)
    values = np.linalg.svd(x - mean, compute_uv=False)
    largest = np.hypot(values[0], np.sqrt(len(x)) * np.linalg.norm(mean))  # of x itself, or a little more
    values[values <= ROUNDING * largest] = 0.0
    return np.square(values) / (len(x) - 1)


def _smooth_rank(values: np.ndarray, epsilon: float = 0.0) -> float:
    """exp(- sum of p log p), p = values / sum of values + epsilon; 0 where all values are 0."""
    total = values.sum()
    return float(np.exp(entr(values / total + epsilon).sum())) if total > 0 else 0.0


def effective_rank(spectrum: np.ndarray) -> float:
    """Effective rank (Roy & Vetterli 2007, definition 1) of a covariance: exp(- sum of p log p), p = λ / sum of λ.

    ``spectrum``: its eigenvalues λ ≥ 0. From 1, one direction, to D, as much variance in each; 0 where nothing varies.
    """
    return _smooth_rank(np.asarray(spectrum, np.float64))


def rankme(features: np.ndarray) -> float:
    """RankMe (Garrido et al. 2023, equation 1, https://arxiv.org/abs/2210.02885) of features (N, D).

    exp(- sum of p log p), p = σ / sum of σ + 1e-7, of the singular values σ of the matrix itself: it is not centred.
    """
    return _smooth_rank(np.linalg.svd(np.asarray(features, np.float64), compute_uv=False), EPSILON)


def alpha_req(spectrum: np.ndarray) -> float:
    """α-ReQ: α of a power law λ_j ∝ j^-α (Agrawal et al. 2022,
    https://proceedings.neurips.cc/paper_files/paper/2022/hash/70596d70542c51c8d9b4e423f4bf2736-Abstract-Conference.html).

    ``spectrum``: eigenvalues λ of the covariance, largest first. The paper does not say where the line is fitted; as
    in its code (after Stringer et al. 2019): log λ on log j, least squares weighted by 1 / j, ranks j of 4 … 100. Fewer
    where fewer eigenvalues are above 0; NaN where that leaves less than two.
    """
    spectrum = np.asarray(spectrum, np.float64)
    ranks = np.arange(RANKS[0], min(RANKS[1], int((spectrum > 0).sum())) + 1)
    if len(ranks) < 2:
        return math.nan
    # polyfit's weights are those of the residuals, not of their squares.
    return -float(np.polyfit(np.log(ranks), np.log(spectrum[ranks - 1]), 1, w=ranks**-0.5)[0])


def lidar(views: np.ndarray) -> float:
    """LiDAR (Thilak et al. 2024, section 3, https://arxiv.org/abs/2312.04000) of features (n, q, D) of q copies each.

    exp(- sum of p log p), p = λ / sum of λ + 1e-7, of the eigenvalues λ of W^-½ B W^-½: B is the covariance of the
    images' means, W that of copies around the mean of their image, plus δ times the identity. The paper does not say
    how large δ and what is added to p are. Here δ is 1e-4 of the mean variance of a feature, so that features times a
    constant, which are the same to a probe, are the same here. 0 where nothing varies.
    """
    n, q, width = views.shape
    if n < 2 or q < 2:
        raise ValueError(f"at least two copies of at least two images, (n, q, D); got {views.shape}")
    means = views.mean(axis=1, dtype=np.float64)
    between = np.cov(means, rowvar=False, bias=True).reshape(width, width)
    within = np.zeros((width, width))
    for k in range(q):
        apart = views[:, k] - means
        within += apart.T @ apart / (n * q)
    variance = (np.trace(between) + np.trace(within)) / width
    if variance <= (ROUNDING * np.abs(means).max()) ** 2:
        return 0.0
    values = eigh(between, within + DELTA * variance * np.eye(width), eigvals_only=True)
    return _smooth_rank(np.maximum(values, 0.0), EPSILON)


def _unit(x: np.ndarray) -> np.ndarray:
    """Vectors of length 1 along the last axis; a vector of zeros stays one."""
    x = np.asarray(x, np.float64)
    return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


def alignment(views: np.ndarray) -> float:
    """Alignment loss (Wang & Isola 2020, https://arxiv.org/abs/2005.10242) with α = 2, of features (n, q, D).

    Mean of |x - y|² over all pairs x, y of copies of one image, features scaled to length 1. From 0, all copies of
    an image are one, to 2, where they are as far apart as random directions, and beyond.
    """
    n, q, _ = views.shape
    if q < 2:
        raise ValueError(f"at least two copies, (n, q, D); got {views.shape}")
    total = 0.0
    for part in np.array_split(views, math.ceil(n / 256)):
        z = _unit(part)
        # The mean over pairs of squared distances is twice the variance, counted with q - 1.
        total += 2 * np.square(z - z.mean(axis=1, keepdims=True)).sum() / (q - 1)
    return float(total / n)


def uniformity(views: np.ndarray) -> float:
    """Uniformity loss (Wang & Isola 2020, https://arxiv.org/abs/2005.10242) with t = 2, of features (n, q, D).

    log of the mean of exp(-2 |x - y|²) over pairs x, y of different images, features scaled to length 1; as in the
    paper's code the mean of the copies' losses, each over the images' k-th copies. 0: all images are one; of random
    directions in many dimensions about -4.
    """
    n, q, _ = views.shape
    if n < 2:
        raise ValueError(f"at least two images, (n, q, D); got {views.shape}")
    losses = []
    for k in range(q):
        z = _unit(views[:, k])
        length = np.square(z).sum(axis=1)
        kernel = np.exp(-2 * np.maximum(length[:, None] + length - 2 * z @ z.T, 0))
        np.fill_diagonal(kernel, 0)
        losses.append(math.log(kernel.sum() / (n * (n - 1))))
    return float(np.mean(losses))


def held_out_log_p(features: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """(N, K, K) log-probabilities that view k of an image is its view 0 … K - 1, by a linear classifier.

    Logistic regression on standardised features (N, K, D). Each image is judged by one that was fitted on three
    quarters of the others: whole ``groups`` (N,) are held out, four parts in turn. Nothing is chosen.
    """
    n, k, width = features.shape
    _, first, member = np.unique(groups, return_index=True, return_inverse=True)
    parts = min(FOLDS, len(first))
    if parts < 2:
        raise ValueError("images of at least two groups: there is nothing to hold out")
    fold = (np.argsort(np.argsort(first)) % parts)[member]  # groups in the order in which they appear, in turn
    out = np.empty((n, k, k))
    for part in range(parts):
        held = fold == part
        x, rest = (features[rows].reshape(-1, width) for rows in (~held, held))
        stats = block_stats(x)
        model = LogisticRegression(C=PROBE_C, max_iter=300)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # close enough
            model.fit((x - stats.mean) * stats.scale, np.tile(np.arange(k), (~held).sum()))
        out[held] = model.predict_log_proba((rest - stats.mean) * stats.scale).reshape(-1, k, k)
    return out


def rotation_accuracy(log_p: np.ndarray) -> float:
    """Share of views that are named, of log-probabilities (N, K, K). Chance is 1 / K."""
    return float((log_p.argmax(axis=2) == np.arange(log_p.shape[1])).mean())


def jigsaw_accuracy(log_p: np.ndarray) -> float:
    """Share of images whose K tiles are all put in their places, of log-probabilities (N, K, K). Chance is 1 / K!.

    Of all orders the likeliest one, the sum of the tiles' log-probabilities, is named. Which order the tiles were
    shown in makes no difference: each is judged by itself. Of several orders that are as likely, any may be named.
    """
    k = log_p.shape[1]
    orders = np.array(list(itertools.permutations(range(k))))  # the right one is the first
    sums = log_p[:, np.arange(k), orders].sum(axis=2)  # (N, K!)
    best = sums >= sums.max(axis=1, keepdims=True) - 1e-9
    return float((best[:, 0] / best.sum(axis=1)).mean())


# ---- All of them, for a backbone and images


def passes(images: int, width: int) -> int:
    """How many images a backbone of ``width`` features is shown where the pool holds ``images``."""
    n = min(images, IMAGES)
    return n + COPIES * copied(n, width) + (3 + 4) * min(n, PROBED)


def copied(n: int, width: int) -> int:
    """How many of n images are copied: more than there are features, which LiDAR's covariance needs."""
    return min(n, max(COPIED, 2 * width))


def altered(images: Tensor, size: int, draws: Draws, flip: bool) -> Tensor:
    """An altered copy of each image: uint8 (N, R, R, 3) to (N, 3, size, size) in [0, 1].

    A crop of half the area or more, with ``flip`` perhaps mirrored; brightness, contrast and saturation by up to 30 %,
    one in ten grey; noise of up to 0.1; a grey square of three tenths of the side. Something of what each task does.
    """
    views = colour_jitter(random_view(images, size, draws, flip=flip), draws, 0.3, 0.1)
    level = 0.1 * draws.stream("level").uniform(1).view(-1, 1, 1, 1)
    views = (views + level * draws.stream("noise").normal(*views.shape[1:])).clamp(0, 1)
    return cutout(views, draws)


def tiles(images: Tensor, size: int, draws: Draws) -> Tensor:
    """A tile of each quarter of each image, enlarged: uint8 (N, R, R, 3) to (N, 4, 3, size, size) in [0, 1].

    A tile is smaller than its quarter and lies at a random place in it, so that no two have an edge in common.
    """
    cell = images.shape[1] // 2
    side = max(1, round(TILE * cell))
    at = draws.stream("tiles").integers(cell - side + 1, 4, 2)
    corner, along = torch.arange(4, device=images.device), torch.arange(side, device=images.device)
    rows = (corner // 2 * cell + at[:, :, 0])[:, :, None, None] + along[:, None]  # (N, 4, side, 1)
    columns = (corner % 2 * cell + at[:, :, 1])[:, :, None, None] + along
    which = torch.arange(len(images), device=images.device).view(-1, 1, 1, 1)
    return clean(images[which, rows, columns].flatten(0, 1), size).unflatten(0, (-1, 4))


@torch.inference_mode()
def label_free(
    backbone: Backbone, images: Pixels, hashes: Sequence[str], groups: np.ndarray, *,
    flip: bool = True, leave_out: Sequence[str] = (), progress: str | None = None,
) -> list[dict[str, Any]]:  # fmt: skip
    """Every score of a frozen backbone on images (N, R, R, 3) uint8 of which no label is known.

    Args:
        hashes: of the images' content. They say which images are taken, where there are more than 4,096, and how
            each is altered, so that the order of the images makes no difference.
        groups: (N,) near-duplicates have one number; the probes hold out whole groups.
        flip: whether the mirror image of an image is another such image.
        leave_out: scores that mean nothing here: a probe for what the backbone was trained to do.
        progress: names the bar.

    Returns:
        One dictionary per score: ``score`` (its name above), ``value`` (None where it is not defined), ``n_images``,
        ``on`` (which features), and of the probes ``chance``.

    Raises UserError for fewer than two images.
    """
    if len(images) < 2:
        raise UserError("scores without labels want two images or more; give a larger --train source")
    device, size = next(backbone.parameters()).device, backbone.spec.image_size
    rows = np.array(sorted(range(len(hashes)), key=lambda k: hashes[k])[:IMAGES])
    numbers, n = [int(hashes[int(k)][:12], 16) for k in rows], len(rows)
    n_copied, n_probed = copied(n, backbone.channels), min(n, PROBED)
    wanted = {"rotation_probe", "jigsaw_probe"} - set(leave_out)
    total = n + COPIES * n_copied + n_probed * (3 * ("rotation_probe" in wanted) + 4 * ("jigsaw_probe" in wanted))
    was_training = backbone.training
    backbone.eval()
    with tqdm(total=total, desc=progress, unit="img", disable=progress is None) as bar:

        def features(count: int, k: int, views: Callable[[Tensor, list[int]], Tensor]) -> np.ndarray:
            """(count, k, D) of k views (B, k, 3, size, size) of each of the first ``count`` images."""
            parts = []
            for at in range(0, count, max(1, 256 // k)):
                stop = min(count, at + max(1, 256 // k))
                raw = torch.from_numpy(np.array(images[rows[at:stop]])).to(device)
                shown = views(raw, numbers[at:stop]).flatten(0, 1)
                parts.append(backbone(shown).pooled.float().cpu().numpy().reshape(stop - at, k, -1))
                bar.update(len(shown))
            return np.concatenate(parts)

        def copies(raw: Tensor, which: list[int]) -> Tensor:
            draws = (Draws(0, [k] * len(which), which, "label-free", device) for k in range(COPIES))
            return torch.stack([altered(raw, size, d, flip) for d in draws], 1)

        def turns(raw: Tensor, which: list[int]) -> Tensor:
            upright = clean(raw, size)
            return torch.stack([torch.rot90(upright, k, (2, 3)) for k in (1, 2, 3)], 1)

        def cut(raw: Tensor, which: list[int]) -> Tensor:
            return tiles(raw, size, Draws(0, [0] * len(which), which, "label-free", device))

        whole = features(n, 1, lambda raw, which: clean(raw, size)[:, None])[:, 0]
        views = features(n_copied, COPIES, copies)
        turned = features(n_probed, 3, turns) if "rotation_probe" in wanted else None
        tiled = features(n_probed, 4, cut) if "jigsaw_probe" in wanted else None
    backbone.train(was_training)

    found: list[dict[str, Any]] = []

    def add(score: str, value: float | None, n_images: int, on: str, **more: float) -> None:
        value = value if value is not None and math.isfinite(value) else None
        found.append({"score": score, "value": value, "n_images": n_images, "on": on, **more})

    spectrum = covariance_spectrum(whole)
    add("effective_rank", effective_rank(spectrum), n, _CLEAN)
    add("rankme", rankme(whole), n, _CLEAN)
    add("alpha_req", alpha_req(spectrum), n, _CLEAN)
    add("lidar", lidar(views), n_copied, _COPIED)
    add("alignment", alignment(views), n_copied, _COPIED)
    add("uniformity", uniformity(views), n_copied, _COPIED)
    same = groups[rows[:n_probed]]
    judged = len(np.unique(same)) > 1  # else nothing can be held out
    if turned is not None:
        four = np.concatenate([whole[:n_probed, None], turned], axis=1)
        value = rotation_accuracy(held_out_log_p(four, same)) if judged else None
        add("rotation_probe", value, n_probed, _TURNED, chance=1 / 4)
    if tiled is not None:
        value = jigsaw_accuracy(held_out_log_p(tiled, same)) if judged else None
        add("jigsaw_probe", value, n_probed, _TILED, chance=1 / 24)
    return found
