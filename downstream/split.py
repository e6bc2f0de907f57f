"""Labelled images into pool and test, and the unlabelled sample: no near-duplicate lies on two sides."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from downstream.table import Images
from unlabel.cache import ImageCache, evenly_spaced, load_cache
from unlabel.config import FewLabels
from unlabel.duplicates import clusters, content_split
from unlabel.errors import UserError
from unlabel.sources import Source, open_source, own_test_split

__all__ = ["Split", "has_labels", "open_labelled", "split_data", "unlabelled_pool"]


@dataclass(frozen=True)
class Split:
    pool: Images
    test: Images
    classes: list[str]
    unlabelled: ImageCache  # a sample of the pretraining images (else of the pool), no test image among them
    pretraining_leaks: frozenset[str]  # content hashes of pretraining images that are near-duplicates of test images
    seen: int | None  # test images of which a near-duplicate is among the pretraining images; None: not known
    seen_by: dict[str, int]  # the same for each of ``others``
    skipped: list[tuple[str, str]]  # (name, reason) of labelled images that could not be read
    about: dict[str, Any]
    warnings: list[str]


def split_data(
    config: FewLabels, image_size: int, pretraining: ImageCache | None, others: Mapping[str, ImageCache] | None = None
) -> Split:
    """Cluster near-duplicates over everything, then split by cluster. No seed takes part.

    ``others``: what further runs were trained on, by name; a warning says which of them saw test images.
    """
    warnings: list[str] = []
    others = others or {}
    train_source, test_source, test_spec = open_labelled(config)
    train = _readable(train_source, image_size, config.max_skipped)
    held = _readable(test_source, image_size, config.max_skipped) if test_source is not None else None
    caches = list({id(c): c for c in (train, held, pretraining, *others.values()) if c is not None}.values())
    ids = dict(zip(map(id, caches), clusters(caches), strict=True))
    train_ids = ids[id(train)]
    classes = sorted(set(train.labels or ()))
    if held is None:
        in_test = content_split(train, train_ids)
        test_cache, test_ids = train.subset(np.flatnonzero(in_test)), train_ids[in_test]
        in_pool = ~in_test
    else:
        test_cache, test_ids = held, ids[id(held)]
        in_pool = ~np.isin(train_ids, test_ids)
        dropped = int((~in_pool).sum())
        if dropped:
            warnings.append(f"{dropped} training images are near-duplicates of test images and were left out")
    _same_classes(classes, test_cache.labels or [], held is None)
    number = {c: k for k, c in enumerate(classes)}

    def images(cache: ImageCache, cluster_ids: np.ndarray) -> Images:
        y = np.array([number[c] for c in cache.labels or ()], np.int64)
        return Images(cache.images, y, list(cache.names), list(cache.hashes), cluster_ids)

    pool_rows = np.flatnonzero(in_pool)
    left = {(train.labels or [])[k] for k in pool_rows}
    for c in classes:
        if c not in left:
            raise UserError(
                f"class {c!r}: each of its --train images is a near-duplicate of a --test image; give other ones"
            )
    pool_cache = train.subset(pool_rows)
    leaks: frozenset[str] = frozenset()
    seen, usable = None, pool_cache
    if pretraining is not None:
        leaking = np.isin(ids[id(pretraining)], test_ids)
        leaks = frozenset(h for h, leak in zip(pretraining.hashes, leaking, strict=True) if leak)
        seen = int(np.isin(test_ids, ids[id(pretraining)]).sum())
        usable = pretraining.subset(~leaking) if not leaking.all() else pool_cache
    seen_by = {name: int(np.isin(test_ids, ids[id(cache)]).sum()) for name, cache in others.items()}
    for name, n in seen_by.items():
        if n:
            warnings.append(f"{n} test images have a near-duplicate among those that {name} was pretrained on")
    about = {
        "train": {"spec": config.train, "images": len(pool_rows), "classes": classes, "skipped": len(train.skipped)},
        "test": {
            "spec": test_spec or f"20 % of {config.train} by content hash",
            "images": len(test_cache),
            "clusters": len(np.unique(test_ids)),
            "skipped": 0 if held is None else len(held.skipped),
        },
    }
    skipped = [*train.skipped, *(held.skipped if held is not None else ())]
    if skipped:
        warnings.append(f"{len(skipped)} labelled images cannot be read and were left out: see skipped.txt")
    pool, test = images(pool_cache, train_ids[pool_rows]), images(test_cache, test_ids)
    return Split(pool, test, classes, _spread(usable), leaks, seen, seen_by, skipped, about, warnings)


def has_labels(config: FewLabels) -> bool:
    """Whether there is anything to take labels from: a CSV, class folders, a named set, or a test set."""
    if config.labels is not None or config.test is not None or own_test_split(config.train) is not None:
        return True
    return len(set(open_source(config.train).labels or ())) > 1


def unlabelled_pool(config: FewLabels, image_size: int, pretraining: ImageCache | None) -> Split:
    """All images of --train, for scores that need no labels: no class, and no test image among them to leave out."""
    cache = load_cache(open_source(config.train), image_size, max_skipped=config.max_skipped)
    nobody, none = cache.subset(np.zeros(0, np.int64)), np.zeros(0, np.int64)
    pool = Images(
        cache.images, np.zeros(len(cache), np.int64), list(cache.names), list(cache.hashes), clusters([cache])[0]
    )
    about = {"train": {"spec": config.train, "images": len(cache), "classes": [], "skipped": len(cache.skipped)}}
    warnings = [f"{config.train} has no labels: only scores that need none"]
    if cache.skipped:
        warnings.append(f"{len(cache.skipped)} images cannot be read and were left out: see skipped.txt")
    test, sample = Images(nobody.images, none, [], [], none), _spread(pretraining or cache)
    return Split(pool, test, [], sample, frozenset(), None, {}, cache.skipped, about, warnings)


def open_labelled(config: FewLabels) -> tuple[Source, Source | None, str | None]:
    """--train and, where it is a source of its own, the test set, both with labels; and what that source is.

    The labels of --labels are for both, but for a test source that has class folders: those count there.
    """
    spec = config.test or own_test_split(config.train)
    test = open_source(spec) if spec else None
    if test is None or config.labels is None:
        train = open_source(config.train, config.labels)
    elif len(set(test.labels or ())) > 1:
        train = open_source(config.train, config.labels, elsewhere=test.names)
    else:
        names = open_source(config.train).names
        train = open_source(config.train, config.labels, elsewhere=test.names)
        test = open_source(spec or "", config.labels, elsewhere=names)
        both = sorted(set(train.names) & set(test.names))
        if both:
            raise UserError(
                f"{both[0]!r} in {config.labels} is the name of a --train and of a --test image: put the test images "
                "into class folders, or give them other names"
            )
    for source in (train, test):
        if source is not None:
            source.require_labels()
    return train, test, spec


def _readable(source: Source, image_size: int, max_skipped: float) -> ImageCache:
    """The labelled images; UserError where of a class none is left."""
    classes, cache = set(source.require_labels()), load_cache(source, image_size, max_skipped=max_skipped)
    if gone := sorted(classes - set(cache.labels or ())):
        raise UserError(f"{source.spec}: no image of class {gone[0]!r} can be read; see unlabel check {source.spec}")
    return cache


def _same_classes(train: Sequence[str], test: Sequence[str], split_off: bool) -> None:
    only_train, only_test = sorted(set(train) - set(test)), sorted(set(test) - set(train))
    if only_train and split_off:
        raise UserError(
            f"class {only_train[0]!r} has too few different images to split off a test set: add some, leave the class "
            "out, or give --test"
        )
    if only_train or only_test:
        missing = [f"{', '.join(c[:5])} only in {where}" for c, where in ((only_train, "--train"), (only_test, "--test")) if c]  # noqa: E501  # fmt: skip
        raise UserError(f"--train and --test have different classes: {'; '.join(missing)}")


def _spread(cache: ImageCache, at_most: int = 8192) -> ImageCache:
    """Evenly spaced images, shuffled."""
    return cache.subset(np.random.default_rng(0).permutation(evenly_spaced(len(cache), at_most)))
