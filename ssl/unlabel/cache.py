"""Every image of a source as square uint8 pixels, with what is known about it: name, label, hashes, shape."""

import hashlib
import os
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeAlias

import numpy as np

from unlabel.columns import Digests, Names
from unlabel.errors import UserError
from unlabel.listing import UNLISTED
from unlabel.packing import load_or_pack
from unlabel.sources import Source
from unlabel.streaming import Streamed

__all__ = ["ImageCache", "Pixels", "Rows", "TooManyBroken", "cache_side", "evenly_spaced", "load_cache", "printable"]
__all__ += ["write_skipped"]

_TURNING = "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"  # make a terminal show text backwards


class TooManyBroken(UserError):
    """More images are broken than the user allows. `skipped` lists each with its reason."""

    def __init__(self, message: str, skipped: Sequence[tuple[str, str]]) -> None:
        super().__init__(message)
        self.skipped = list(skipped)


class Rows:
    """Chosen rows of an array (N, R, R, 3): indexed like an array, and copies only what is asked for."""

    def __init__(self, base: "np.ndarray | Rows | Streamed", rows: np.ndarray) -> None:
        if isinstance(base, Rows):
            base, rows = base.base, base.rows[rows]
        self.base, self.rows = base, rows
        self.shape, self.dtype = (len(rows), *base.shape[1:]), base.dtype

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, key) -> np.ndarray:
        return self.base[self.rows[key]]

    def prefetch(self, rows: np.ndarray) -> None:
        """Begin to decode what is asked for next, where images are not packed."""
        if isinstance(self.base, Streamed):
            self.base.prefetch(self.rows[rows])

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        return np.asarray(self.base[self.rows], dtype)


Pixels: TypeAlias = "np.ndarray | Rows | Streamed"  # (N, R, R, 3) uint8


@dataclass(frozen=True)
class ImageCache:
    """The images of a source that could be decoded, in the order of the source. All fields have N rows.

    Attributes: `images` (N, R, R, 3) uint8, a read-only memory map, `Streamed`, or `Rows` of one of them; `names`;
    `labels`, None without; `hashes`, SHA-256 of the RGB pixels (of a large JPEG at a half or a quarter of its size, as
    long as its short side keeps 160) and of the shape; `phashes` (N, 2) uint64,
    perceptual hash of the image and of its mirror image; `shapes` (N, 2) int32, width and height in pixels;
    `skipped`, (name, reason) of what is missing; `fingerprint` of the source; `side` R in pixels.
    """

    images: Pixels
    names: Names
    labels: list[str] | None
    hashes: Digests
    phashes: np.ndarray
    shapes: np.ndarray
    skipped: list[tuple[str, str]]
    fingerprint: str
    side: int

    def __len__(self) -> int:
        return len(self.names)

    def subset(self, indices: Iterable[int] | np.ndarray) -> "ImageCache":
        """The images at `indices`, in that order: a view, no pixels are copied.

        Its fingerprint is that of the source and the indices together.
        """
        rows = np.asarray(list(indices) if not isinstance(indices, np.ndarray) else indices)
        if rows.dtype == bool:
            rows = np.flatnonzero(rows)
        rows = rows.astype(np.int64)
        images = Rows(self.images, rows)
        digest = hashlib.sha256(self.fingerprint.encode() + rows.astype("<i8").tobytes()).hexdigest()
        return replace(
            self,
            images=images,
            names=self.names.take(rows),
            labels=None if self.labels is None else [self.labels[i] for i in rows],
            hashes=self.hashes.take(rows),
            phashes=self.phashes[rows],
            shapes=self.shapes[rows],
            fingerprint=digest,
        )


def evenly_spaced(n: int, at_most: int) -> np.ndarray:
    """Up to ``at_most`` of the rows 0 … n - 1, in order: sources are sorted, so the first ones are not a sample."""
    return np.unique(np.linspace(0, n - 1, min(n, at_most)).round().astype(int))


def cache_side(image_size: int, short_side: int | None = None) -> int:
    """Side of the packed images for a network at `image_size`: a quarter more, so that crops can move.

    But no more than the images have (`short_side`, where it is known): enlarging adds nothing, and it blurs digits.
    """
    wanted = round(1.25 * image_size)
    return wanted if short_side is None else max(image_size, min(wanted, short_side))


def load_cache(
    source: Source,
    image_size: int,
    *,
    max_skipped: float = 0.01,
    workers: int | None = None,
    progress: bool = True,
    write: bool = True,
) -> ImageCache:
    """The packed images of `source`: read from the cache, or decoded now and kept there.

    Each image is cropped to its central square and resized to `cache_side` with antialiasing. `write`
    false keeps a new cache in memory only. One that would not fit on the disk is streamed, with a word on it.
    Raises TooManyBroken, after looking at every image, if more than the fraction `max_skipped` cannot be read, and
    UserError if the cache folder cannot be written.
    """
    if not 0 <= max_skipped <= 1:
        raise UserError(f"--max-skipped {max_skipped}: a share of the images, from 0 to 1")
    side = cache_side(image_size, source.short_side())
    index, images = load_or_pack(source, side, workers=workers, progress=progress, write=write)
    skipped = sorted(source.skipped + index.skipped)
    total = len(source) + len(source.skipped)
    if len(skipped) / total > max_skipped or not len(index.rows):
        advice = f", and --max-skipped is {max_skipped:g}; repair or remove them, or allow more"
        advice = advice if len(index.rows) else "; repair them, or give another source"
        some = "; ".join(f"{printable(name)}: {reason}" for name, reason in skipped[:3])
        raise TooManyBroken(
            f"{len(skipped):,} of {total:,} images in {source.spec} cannot be read "
            f"({some}{' …' if len(skipped) > 3 else ''}){advice}",
            skipped,
        )
    for name, reason in source.skipped if progress else ():
        if reason.startswith(UNLISTED):
            print(f"note: {printable(name)}: {reason}; what else it holds is missing, and not counted as skipped")
    whole = len(index.rows) == len(source)
    return ImageCache(
        images=images,
        names=source.names if whole else source.names.take(index.rows),
        labels=source.labels if whole or source.labels is None else [source.labels[i] for i in index.rows],
        hashes=Digests(index.hashes),
        phashes=index.phashes,
        shapes=index.shapes,
        skipped=skipped,
        fingerprint=source.fingerprint,
        side=side,
    )


def write_skipped(path: Path, skipped: Iterable[tuple[str, str]]) -> None:
    """One line per skipped file, sorted: name, tab, reason."""
    lines = sorted(f"{printable(name)}\t{printable(reason)}\n" for name, reason in skipped)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text("".join(lines), encoding="utf-8", newline="\n")
    os.replace(temporary, path)  # also where a link stood: what it points to stays as it is


def printable(text: str) -> str:
    """`text` on one line of valid UTF-8: control characters, and bytes that are no UTF-8, as escapes.

    All else stays as it is, so that names in tables are the files' names. Escaping twice changes nothing more.
    """

    def escape(char: str) -> str:
        if unicodedata.category(char) not in ("Cc", "Cs", "Zl", "Zp") and char not in _TURNING:
            return char
        if "\udc80" <= char <= "\udcff":  # how Python holds a byte that is no UTF-8
            return f"\\x{ord(char) - 0xDC00:02x}"
        return char.encode("unicode_escape").decode()

    return "".join(map(escape, text))
