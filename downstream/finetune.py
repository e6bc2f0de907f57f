"""Fine-tuning with few labels, and `scratch`: the same network, steps and augmentation from random weights.

What is chosen depends on the number of labels (design: the few-label protocol). Every preset was set once on
development data; the number of steps is fixed by the preset, never by watching a score.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from downstream import choosing
from downstream.s4l import Turns
from unlabel.augment import clean, colour_jitter, random_view
from unlabel.backbone import Backbone, channels_last, parameter_stages
from unlabel.cache import Pixels, Rows, cache_side
from unlabel.draws import Draws, mix
from unlabel.errors import UserError
from unlabel.order import batch_at
from unlabel.precision import autocast, pick_precision

__all__ = ["Classifier", "FineTuned", "Preset", "finetune", "predict_logits", "presets_for", "train", "view_size"]


@dataclass(frozen=True)
class Preset:
    """One way to fine-tune. ``layer_decay`` multiplies the learning rate once per stage from the top down."""

    name: str
    steps: int
    lr: float
    layer_decay: float = 1.0
    top_layers: int | None = None  # train only the last N stages (and the head); None: all
    batchnorm: str = "eval"  # eval: keep the pretrained statistics; train: estimate them from the labelled images
    weight_decay: float = 0.05
    batch_size: int = 32
    ema: float = 0.98  # averaged weights are the result
    crop: float = 0.3  # smallest area of a view; of images that are not mirrored, UNMIRRORED_CROP at least
    larger: bool = True  # train on views as large as the images that are classified, not as in pretraining


# Set on development photos of cats and dogs: docs/recipes.md has what else was tried. Pretrained: the head comes from
# the probe, so few steps are enough, and the lower a stage the less it has to move. Backbones that have learned less
# may want to move more: hence the third of the many.
_FEW = (Preset("top", 60, 5e-4, top_layers=1),)
_SOME = (Preset("all", 100, 2e-3, layer_decay=0.35),)
_MANY = (
    Preset("gentle", 150, 1e-3, layer_decay=0.5),
    Preset("all", 150, 2e-3, layer_decay=0.35),
    Preset("free", 150, 2.5e-3, layer_decay=0.75),
)
# From scratch: as many presets, more steps; BatchNorm has to learn its statistics. Views are smaller than the images
# that are classified, because random crops show objects larger; the pretrained backbone loses by that.
_SCRATCH_FEW = (Preset("scratch", 120, 1e-3, batchnorm="train"),)
_SCRATCH_MANY = (
    Preset("scratch-slow", 800, 5e-4, batchnorm="train", larger=False),
    Preset("scratch", 800, 1e-3, batchnorm="train", larger=False),
    Preset("scratch-fast", 800, 2e-3, batchnorm="train", larger=False),
)


# Dense networks (mlp:…): set on 10,000 training images of MNIST. Pretrained, all layers move alike, in larger batches;
# from scratch, half as many steps (from 1,100 labels on) of twice the batch are as good as those of other networks.
_DENSE_MANY = tuple(
    Preset(name, 150, lr, batchnorm="train", weight_decay=0.01, batch_size=128, ema=0.999, larger=False)
    for name, lr in (("dense-slow", 5e-4), ("dense", 1e-3), ("dense-fast", 2e-3))
)
_DENSE_SCRATCH_MANY = tuple(replace(p, batch_size=64, ema=0.999) for p in _SCRATCH_MANY)


# From 48 px on, labelled and new images are seen a quarter larger than in pretraining, at the size they are packed at:
# random crops had shown objects larger than a whole image does (Touvron et al. 2019, https://arxiv.org/abs/1906.06423).
# Smaller images are rarely any larger in their files.
PACKED_FROM = 48


# Digits and text, whose mirror image is another thing, are another thing with most of it cut off, too.
UNMIRRORED_CROP = 0.6


def view_size(image_size: int) -> int:
    """Height = width of the images that a network pretrained at ``image_size`` is fine-tuned on and classifies."""
    return cache_side(image_size) if image_size >= PACKED_FROM else image_size


@dataclass(frozen=True)
class Growth:
    """Steps grow with the labels: ``passes`` over them, up to ``steps`` steps, and ``at_least`` passes beyond."""

    passes: int
    steps: int
    at_least: int

    def steps_for(self, labels: int, batch_size: int) -> int:
        wanted = min(math.ceil(self.passes * labels / batch_size), self.steps)
        return max(wanted, math.ceil(self.at_least * labels / batch_size))


# Bounded from 4,000 labels on: of CIFAR-10's training images, a bound of 2,000 steps cost `scratch` 9 points there, one
# of 1,000 a pretrained network 4. Below 25 labels per class the steps grow with the classes: from scratch as they do
# above, since ten labels of ten digits each wanted three times as many as of two animals; pretrained, only by the
# passes that all get at least.
GROWTH = Growth(passes=26, steps=3250, at_least=8)
SCRATCH_GROWTH = Growth(passes=96, steps=12_000, at_least=16)
DENSE_GROWTH = replace(GROWTH, steps=2_100)  # of larger batches: 10,000 labels are where it was set
DENSE_SCRATCH_GROWTH = replace(SCRATCH_GROWTH, steps=6_000)


def presets_for(
    per_class: int, scratch: bool, top_layers: int | None = None, labels: int = 0, dense: bool = False
) -> tuple[Preset, ...]:
    """The presets of the protocol for this many labels per class: one below 25, three from there on.

    ``labels``: how many images there are to train on, all classes together; their steps grow with it. ``dense``: of a
    network without convolutions.
    """
    if dense and per_class >= choosing.MANY:
        presets, growth = (_DENSE_SCRATCH_MANY, DENSE_SCRATCH_GROWTH) if scratch else (_DENSE_MANY, DENSE_GROWTH)
    elif scratch:
        presets, growth = _SCRATCH_MANY if per_class >= choosing.MANY else _SCRATCH_FEW, SCRATCH_GROWTH
    elif per_class >= choosing.MANY:
        presets, growth = _MANY, GROWTH
    else:
        presets, growth = _SOME if per_class >= choosing.FEW else _FEW, replace(GROWTH, steps=0)
    if top_layers is not None and not scratch:
        presets = tuple(replace(p, top_layers=top_layers, batchnorm="eval") for p in presets)
    return tuple(replace(p, steps=max(p.steps, growth.steps_for(labels, p.batch_size))) for p in presets)


def on_trial(preset: Preset, tried: int, labels: int) -> Preset:
    """The preset as it is tried out on ``tried`` of the ``labels``: as many passes over them."""
    return replace(preset, steps=math.ceil(preset.steps * tried / labels))


class Classifier(nn.Module):
    """Backbone, spatial mean of the last feature map, linear layer: images in [0, 1] to logits (N, K)."""

    def __init__(self, backbone: Backbone, classes: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = nn.Linear(backbone.channels, classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.backbone(images).pooled)


@dataclass(frozen=True)
class FineTuned:
    model: Classifier
    chosen: dict[str, Any]
    on_grid_edge: bool
    steps: int


def _blocks(backbone: Backbone) -> list[list[nn.Parameter]]:
    """Weights of the backbone by stage, top stage first."""
    table = dict(backbone.model.named_parameters())
    groups: list[list[nn.Parameter]] = [[] for _ in backbone.stage_names]
    for name, stage in parameter_stages(backbone).items():
        groups[-1 - stage].append(table[name])
    return groups


def _groups(model: Classifier, preset: Preset) -> list[dict[str, Any]]:
    """Optimiser groups with layer-wise learning rates; what is not trained is frozen."""
    for p in model.backbone.parameters():
        p.requires_grad_(False)
    groups = [{"params": list(model.head.parameters()), "peak": preset.lr}]
    for k, params in enumerate(_blocks(model.backbone)):
        if preset.top_layers is not None and k >= preset.top_layers:
            continue
        for p in params:
            p.requires_grad_(True)
        groups.append({"params": params, "peak": preset.lr * preset.layer_decay ** (k + 1)})
    split = []
    for group in groups:
        for wants_decay in (True, False):
            params = [p for p in group["params"] if (p.ndim > 1) is wants_decay]
            if params:
                decay = preset.weight_decay if wants_decay else 0.0
                split.append({"params": params, "peak": group["peak"], "lr": group["peak"], "weight_decay": decay})
    return split


def train(
    start: Backbone, head: tuple[np.ndarray, np.ndarray] | None, images: Any, y: np.ndarray,
    classes: int, preset: Preset, seed: int, device: torch.device, on_step: Callable[[int], None] | None,
    augment: bool = True, unlabelled: Pixels | None = None,
) -> Classifier:  # fmt: skip
    """``preset.steps`` steps on images (n, R, R, 3) uint8; labels y: (n,) whole numbers, or (n, K) probabilities.

    ``unlabelled`` (N, R, R, 3): each step also names the turns of some of these (S4L). Returns averaged weights.
    """
    torch.manual_seed(mix(seed, "finetune"))
    model = channels_last(Classifier(copy.deepcopy(start), classes).to(device))
    with torch.no_grad():
        if head is not None:
            model.head.weight.copy_(torch.as_tensor(head[0]))
            model.head.bias.copy_(torch.as_tensor(head[1]))
        else:
            model.head.weight.mul_(0.1)
    groups, smallest = _groups(model, preset), preset.crop if start.spec.flip else max(preset.crop, UNMIRRORED_CROP)
    turns = None
    if unlabelled is not None:
        turns = Turns(unlabelled, start.channels, seed, (smallest, 1.0), start.spec.flip).to(device)
        for params, decay in ((turns.classifier.weight, preset.weight_decay), (turns.classifier.bias, 0.0)):
            groups.append({"params": [params], "peak": preset.lr, "lr": preset.lr, "weight_decay": decay})
    trained = [p for group in groups for p in group["params"]]
    optimizer = torch.optim.AdamW(groups)
    average = copy.deepcopy(model)
    precision, own = pick_precision("auto", device), start.spec.image_size
    size = view_size(own) if preset.larger else own
    labels = torch.as_tensor(y, device=device)
    labels = labels if labels.is_floating_point() else labels.long()
    batch_size = min(preset.batch_size, max(2, len(y)))
    for step in range(preset.steps):
        epochs, indices = batch_at(seed, step, batch_size, len(y))
        draws = Draws(seed, epochs.tolist(), indices.tolist(), device=device)
        source = torch.from_numpy(np.array(images[indices])).to(device)
        if augment:
            views = random_view(source, size, draws, area=(smallest, 1.0), ratio=1.25, flip=start.spec.flip)
            views = cutout(colour_jitter(views, draws, 0.2), draws)
        else:
            views = clean(source, size)
        progress = step / preset.steps
        factor = min(1.0, (step + 1) / (0.1 * preset.steps)) * 0.5 * (1 + math.cos(math.pi * progress))
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * factor
        model.train()
        if preset.batchnorm == "eval":
            model.backbone.eval()
        with autocast(device, precision):
            logits = model(views)
            beside = turns.loss(model.backbone, step, size) if turns else 0.0
        loss = F.cross_entropy(logits.float(), labels[indices], label_smoothing=0.1) + beside
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 5.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        blend(average, model, min(preset.ema, (step + 1) / (step + 10)))
        if on_step:
            on_step(len(indices) + (turns.seen if turns else 0))
    return average.eval()


@torch.no_grad()
def blend(average: nn.Module, model: nn.Module, keep: float) -> None:
    """average = keep · average + (1 - keep) · model, for weights and BatchNorm statistics."""
    for a, b in zip(average.state_dict().values(), model.state_dict().values(), strict=True):
        if a.is_floating_point():
            a.lerp_(b, 1 - keep)
        else:
            a.copy_(b)


def cutout(images: Tensor, draws: Draws, share: float = 0.3) -> Tensor:
    """A grey square of ``share`` of the side at a random place of each image (DeVries & Taylor 2017)."""
    n, _, h, w = images.shape
    at = draws.stream("cutout").uniform(2)
    ys = torch.arange(h, device=images.device).view(1, h, 1)
    xs = torch.arange(w, device=images.device).view(1, 1, w)
    cy, cx = (at[:, 0] * h).view(n, 1, 1), (at[:, 1] * w).view(n, 1, 1)
    hole = ((ys - cy).abs() < share * h / 2) & ((xs - cx).abs() < share * w / 2)
    return torch.where(hole[:, None], 0.5, images)


@torch.inference_mode()
def predict_logits(model: Classifier, images: Any, batch_size: int = 256) -> np.ndarray:
    """images (N, R, R, 3) uint8 to (N, K): log-probabilities, averaged over the image and (``flip``) its mirror."""
    device = next(model.parameters()).device
    size, out = view_size(model.backbone.spec.image_size), []
    model.eval()
    for at in range(0, len(images), batch_size):
        x = clean(torch.from_numpy(np.array(images[at : at + batch_size])).to(device), size)
        x = x.contiguous(memory_format=torch.channels_last)
        with autocast(device, pick_precision("auto", device)):
            both = torch.stack([model(v) for v in ([x, x.flip(3)] if model.backbone.spec.flip else [x])])
        out.append(both.float().log_softmax(-1).mean(0).cpu().numpy())
    return np.concatenate(out) if out else np.zeros((0, model.head.out_features), np.float32)


def _holdout(y: np.ndarray, seed: int, clusters: np.ndarray, share: float = 0.2) -> np.ndarray:
    """A stratified mask of the images that are held out to choose a preset; with each, its near-duplicates.

    Unless no image of some class would be left, which are not held out then.
    """
    held = np.zeros(len(y), bool)
    rng = np.random.default_rng(mix(seed, "holdout"))
    for c in np.unique(y):
        members = rng.permutation(np.flatnonzero(y == c))
        wanted = max(1, round(share * len(members)))
        firsts = members[np.sort(np.unique(clusters[members], return_index=True)[1])]  # of each cluster, in this order
        size = np.cumsum([(clusters[members] == clusters[k]).sum() for k in firsts])
        held |= np.isin(clusters, clusters[firsts[: 1 + int(np.searchsorted(size, wanted))]])
    if np.array_equal(np.unique(y[~held]), np.unique(y)):
        return held
    return _holdout(y, seed, np.arange(len(y)), share)


def finetune(
    backbone: Backbone, images: np.ndarray | Rows, y: np.ndarray, classes: int, presets: Sequence[Preset], *,
    head: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray] | None] | None = None, seed: int = 0,
    device: torch.device | str = "cpu", on_step: Callable[[int], None] | None = None, augment: bool = True,
    unlabelled: Pixels | None = None, clusters: np.ndarray | None = None,
) -> FineTuned:  # fmt: skip
    """Fine-tune on images (n, R, R, 3) uint8 with labels y (n,) in 0 … classes - 1.

    ``head(rows)`` gives the starting point (W (K, C), b (K,)) from a probe fitted on those rows only; None (scratch):
    a small random one. With several presets, one stratified 80/20 split chooses by log-loss, and the winner is refit
    on all images with the same number of steps. Of more than choosing.MAX_LABELS labels, so many are split (25 of a
    class at least), and seen as often. Nothing looks at a test image. ``augment`` false: images as they are.
    ``unlabelled``: see ``train``. ``clusters`` (n,): of near-duplicates, which are held out together.
    """
    if len(np.unique(y)) < 2:
        raise UserError("fine-tuning needs images of at least two classes")
    device = torch.device(device)

    def fit(rows: np.ndarray, preset: Preset) -> Classifier:
        start, given = head(rows) if head else None, Rows(images, rows)
        return train(backbone, start, given, y[rows], classes, preset, seed, device, on_step, augment, unlabelled)

    losses: list[float] = []
    trials: list[Preset] = []
    if len(presets) > 1:
        some = choosing.subsample(y, seed)
        out = _holdout(y[some], seed, (np.arange(len(y)) if clusters is None else clusters)[some])
        held, learned = some[out], some[~out]
        trials = [on_trial(preset, len(some), len(y)) for preset in presets]
        for trial in trials:
            log_p = predict_logits(fit(learned, trial), Rows(images, held))
            with np.errstate(invalid="ignore"):  # it may have diverged
                log_p = log_p - np.logaddexp.reduce(log_p, axis=1, keepdims=True)
            losses.append(float(-log_p[np.arange(len(held)), y[held]].mean()))
    best = int(np.argmin(np.nan_to_num(losses, nan=np.inf))) if losses else 0
    preset = presets[best]
    chosen: dict[str, Any] = {"preset": preset.name, "lr": preset.lr, "steps": preset.steps}
    if losses:
        chosen["holdout_log_loss"] = [round(v, 4) if np.isfinite(v) else None for v in losses]
    edge = len(presets) > 1 and best in (0, len(presets) - 1)
    network = fit(np.arange(len(y)), preset)
    if not all(bool(torch.isfinite(p).all()) for p in network.parameters()):
        raise UserError(
            f"fine-tuning ended in weights that are not finite numbers (preset {preset.name}, peak {preset.lr:g}): "
            "this network does not bear the presets; leave the protocol out, or take another --backbone"
        )
    return FineTuned(network, chosen, edge, sum(p.steps for p in [*trials, preset]))
