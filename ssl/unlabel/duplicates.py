"""Near-duplicates: which images are the same picture, and a split that never separates them.

Two images belong together if their pixels are equal, or if they pass three tests, each for the image or for its
mirror image: the perceptual hashes differ in at most 4 of 64 bits, the pictures as 32x32 grey correlate above
0.95, and so does, above 0.9, their fine structure (each pixel minus the mean of its 3x3 neighbourhood).

The limits were set by looking. On 32,485 photos of cats and dogs, 245 pairs differ in at most 4 bits, and all
are copies of one picture (other size, other compression); of the next 800, up to 11 bits, all but a handful are
other moments or other animals. The fine structure is for simple pictures, where coarse agreement means little:
of 10,000 handwritten digits, a thousand different pairs pass the first two tests, and eleven all three. A
picture of one colour agrees only with its exact copies. Crops and shifts of a picture are not found.
"""

from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np

from unlabel.cache import ImageCache

__all__ = ["clusters", "content_split"]

_BITS = 4
_PIECES = (0, 13, 26, 39, 52, 64)  # 4 differing bits leave at least one of 5 pieces untouched
_COARSE, _FINE = 0.95, 0.9
_THUMB = 32
_BLOCK = 1 << 21  # candidate pairs held at once
_CONFIRM = 4096  # pairs whose pixels are compared at once
_THUMBS = 256  # images of which thumbnails are made at once


def clusters(caches: Sequence[ImageCache]) -> list[np.ndarray]:
    """Cluster of every image, (N,) int64 per cache; equal numbers, also between caches, mean the same picture."""
    hashes = [h for cache in caches for h in cache.hashes]
    parent = np.arange(len(hashes))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = int(parent[i])
        return i

    def join(i: int, j: int) -> None:
        low, high = sorted((root(i), root(j)))
        parent[high] = low

    first: dict[str, int] = {}
    for i, content in enumerate(hashes):
        join(first.setdefault(content, i), i)
    unique = np.fromiter(first.values(), np.int64, len(first))
    for mirrored in (False, True):
        for pairs in _near_pairs(caches, unique, mirrored):
            while len(pairs):  # of what belongs together already, nothing need be looked at: n equal frames, n pairs
                pairs = pairs[np.not_equal(*_roots(parent)[pairs.T])]
                some, pairs = pairs[:_CONFIRM], pairs[_CONFIRM:]
                for i, j in some[_agree(caches, some, mirrored)].tolist() if len(some) else ():
                    join(i, j)
    roots = np.array([root(i) for i in range(len(hashes))], np.int64)
    numbers = np.unique(roots, return_inverse=True)[1].astype(np.int64)
    return np.split(numbers, np.cumsum([len(cache) for cache in caches])[:-1])


def known_among(known: ImageCache, new: ImageCache) -> int:
    """How many of the ``new`` images have a near-duplicate among the ``known`` ones."""
    there, here = clusters([known, new])
    return int(np.isin(here, there).sum())


def content_split(cache: ImageCache, clusters: np.ndarray, fraction: float = 0.2) -> np.ndarray:
    """Test set (N,) bool: about `fraction` of each class, whole clusters, chosen by the hash of their content.

    No seed and no order: the same images are always split in the same way. A cluster counts as the class of its
    member with the smallest hash. Each class of two or more clusters has some on both sides.
    """
    members: dict[int, list[int]] = {}
    for i, cluster in enumerate(clusters.tolist()):
        members.setdefault(cluster, []).append(i)
    classes: dict[str, list[tuple[str, list[int]]]] = {}
    for group in members.values():
        content, i = min((cache.hashes[i], i) for i in group)
        label = "" if cache.labels is None else cache.labels[i]
        classes.setdefault(label, []).append((content, group))
    test = np.zeros(len(cache), bool)
    for groups in classes.values():
        total = sum(len(group) for _, group in groups)
        candidates = sorted(groups)[:-1]  # the last one stays for training
        room = max(1, round(fraction * total))
        fitting = []
        for _, group in candidates:
            if len(group) <= room:
                fitting += group
                room -= len(group)
        if not fitting and candidates:  # every cluster is larger than the share
            fitting = min((len(group), content, group) for content, group in candidates)[2]
        test[fitting] = True
    return test


def _roots(parent: np.ndarray) -> np.ndarray:
    """Of each of a forest's nodes, all at once."""
    above = parent[parent]
    while not np.array_equal(above, parent):
        parent, above = above, above[above]
    return above


def _near_pairs(caches: Sequence[ImageCache], among: np.ndarray, mirrored: bool) -> Iterator[np.ndarray]:
    """Blocks (M, 2) of pairs of the images `among` with near hashes; images are counted through all caches."""
    phashes = np.concatenate([cache.phashes for cache in caches])[among]
    for pairs in _near_hashes(phashes[:, 0], phashes[:, 1 if mirrored else 0]):
        yield among[pairs]


def _near_hashes(first: np.ndarray, second: np.ndarray) -> Iterator[np.ndarray]:
    """Blocks (M, 2) of pairs i < j where first[i] and second[j] differ in few bits, each once; both (N,) uint64.

    Only pairs that agree in one of the pieces are looked at, instead of all N^2.
    """
    before: list[np.uint64] = []  # the pieces that a pair would have been found by already
    for low, high in pairwise(_PIECES):
        mask = np.uint64((1 << (high - low)) - 1)
        a, b = (first >> np.uint64(low)) & mask, (second >> np.uint64(low)) & mask
        order = np.argsort(b, kind="stable")
        start = np.searchsorted(b, a, "left", sorter=order)
        count = np.searchsorted(b, a, "right", sorter=order) - start
        ends = np.cumsum(count)
        row = 0
        while row < len(a):
            done = ends[row - 1] if row else 0
            stop = max(row + 1, int(np.searchsorted(ends, done + _BLOCK, "right")))
            c = count[row:stop]
            i = np.repeat(np.arange(row, stop), c)
            within = np.arange(len(i)) - np.repeat(np.cumsum(c) - c, c)
            j = order[np.repeat(start[row:stop], c) + within]
            differ = first[i] ^ second[j]
            near = (i < j) & (np.bitwise_count(differ) <= _BITS)
            for piece in before:
                near &= differ & piece != 0
            yield np.stack([i[near], j[near]], 1)
            row = stop
        before.append(mask << np.uint64(low))


def _agree(caches: Sequence[ImageCache], pairs: np.ndarray, mirrored: bool) -> np.ndarray:
    """Which of the pairs (M, 2) correlate, coarsely and in their fine structure: (M,) bool."""
    which, place = np.unique(pairs, return_inverse=True)
    place = place.reshape(pairs.shape)
    small = _thumbnails(caches, which)
    a, b = small[place[:, 0]], small[place[:, 1]]
    if mirrored:
        b = b[:, :, ::-1]
    return (_correlation(a, b) > _COARSE) & (_correlation(_fine(a), _fine(b)) > _FINE)


def _thumbnails(caches: Sequence[ImageCache], which: np.ndarray) -> np.ndarray:
    """Grey images (M, S, S) float32 of those counted `which`, ascending, by averaging; S at most 32."""
    size = min(_THUMB, *(cache.side for cache in caches))
    parts = []
    start = 0
    for cache in caches:
        rows = which[(which >= start) & (which < start + len(cache))] - start
        start += len(cache)
        # Overlap of each thumbnail pixel with each pixel, (S, R): rows sum to one.
        edges = np.linspace(0, cache.side, size + 1)
        pixel = np.arange(cache.side)
        overlap = np.minimum(edges[1:, None], pixel + 1) - np.maximum(edges[:-1, None], pixel)
        weights = (np.clip(overlap, 0, None) * size / cache.side).astype(np.float32)
        for at in range(0, len(rows), _THUMBS):
            part = np.asarray(cache.images[rows[at : at + _THUMBS]], np.float32)
            parts.append(weights @ (part @ np.array([0.299, 0.587, 0.114], np.float32)) @ weights.T)
    return np.concatenate(parts)


def _fine(images: np.ndarray) -> np.ndarray:
    """Each inner pixel minus the mean of its 3x3 neighbourhood: (M, S, S) -> (M, S - 2, S - 2)."""
    size = images.shape[1] - 2
    shifts = [images[:, y : y + size, x : x + size] for y in range(3) for x in range(3)]
    return shifts[4] - np.mean(shifts, axis=0)


def _correlation(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Pearson's correlation of each pair of images (M, S, S), 0 for images of one colour: (M,)."""
    a = a - a.mean((1, 2), keepdims=True)
    b = b - b.mean((1, 2), keepdims=True)
    size = np.sqrt((a * a).sum((1, 2)) * (b * b).sum((1, 2)))
    return np.where(size > 1e-3, (a * b).sum((1, 2)) / np.maximum(size, 1e-3), 0.0)
