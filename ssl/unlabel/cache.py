"""The packed cache: every image of a source decoded once, as square uint8 pixels in one memory-mapped file.

A cache is a folder, `<fingerprint>-<side>-v<format>-<content sample>/`, of two files: `images.u8`, the pixels
(N, R, R, 3), and `index.json`, whose first line is the SHA-256 of the rest. It is made under another name and
renamed when it is complete: what carries the name is whole, however many processes made it at once and
whenever one was killed. A finished cache is never written to again.

Where the pixels would not fit on the disk, only the index is kept (`…-index/`), and images are decoded anew each time.
"""

import contextlib
import errno
import functools
import hashlib
import io
import json
import os
import shutil
import time
import uuid
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np
from PIL import Image

from unlabel.decode import BrokenImage, decode, perceptual_hashes
from unlabel.errors import UserError
from unlabel.sources import Source, cache_root
from unlabel.streaming import Streamed

__all__ = ["ImageCache", "Rows", "TooManyBroken", "cache_side", "load_cache", "printable", "write_skipped"]

_FORMAT = 1
_BLOCK = 1024  # rows copied at a time
_INDEX_BYTES = 512  # of the index, per image
_IN_MEMORY = 1 << 30  # bytes of pixels that are rather held in memory than decoded again and again


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


@dataclass(frozen=True)
class ImageCache:
    """The images of a source that could be decoded, in the order of the source. All fields have N rows.

    Attributes: `images` (N, R, R, 3) uint8, a read-only memory map, `Streamed`, or `Rows` of one of them; `names`;
    `labels`, None without; `hashes`, SHA-256 of the full-size RGB pixels and their shape; `phashes` (N, 2) uint64,
    perceptual hash of the image and of its mirror image; `shapes` (N, 2) int32, width and height in pixels;
    `skipped`, (name, reason) of what is missing; `fingerprint` of the source; `side` R in pixels.
    """

    images: np.ndarray | Rows | Streamed
    names: list[str]
    labels: list[str] | None
    hashes: list[str]
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
            names=[self.names[i] for i in rows],
            labels=None if self.labels is None else [self.labels[i] for i in rows],
            hashes=[self.hashes[i] for i in rows],
            phashes=self.phashes[rows],
            shapes=self.shapes[rows],
            fingerprint=digest,
        )


def cache_side(image_size: int) -> int:
    """Side of the packed images for a network at `image_size`: a quarter more, so that crops can move."""
    return round(1.25 * image_size)


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

    Each image is cropped to its central square and resized to `cache_side(image_size)` with antialiasing. `write`
    false keeps a new cache in memory only. One that would not fit on the disk is streamed, with a word on it.
    Raises TooManyBroken, after looking at every image, if more than the fraction `max_skipped` cannot be read, and
    UserError if the cache folder cannot be written.
    """
    side = cache_side(image_size)
    key = f"{source.fingerprint[:24]}-{side}-v{_FORMAT}-{source.content_sample()[:8]}"
    folder = cache_root() / key
    try:
        found = _open(folder, side)
        if found is None:
            found = _make(source, side, folder if write else None, workers or _cpus(), progress)
    except OSError as error:
        raise UserError(
            f"cannot write the image cache in {cache_root()} ({error.strerror or error}); "
            "make room there, or set UNLABEL_CACHE to another folder"
        ) from None
    index, images = found
    skipped = sorted(source.skipped + index.skipped)
    total = len(source) + len(source.skipped)
    if len(skipped) / total > max_skipped or not index.rows:
        some = "; ".join(f"{printable(name)}: {reason}" for name, reason in skipped[:3])
        raise TooManyBroken(
            f"{len(skipped):,} of {total:,} images in {source.spec} cannot be read "
            f"({some}{' …' if len(skipped) > 3 else ''}), and --max-skipped is {max_skipped:g}; "
            "repair or remove them, or allow more",
            skipped,
        )
    return ImageCache(
        images=images,
        names=[source.names[i] for i in index.rows],
        labels=None if source.labels is None else [source.labels[i] for i in index.rows],
        hashes=index.hashes,
        phashes=np.array(index.phashes, np.uint64).reshape(-1, 2),
        shapes=np.array(index.shapes, np.int32).reshape(-1, 2),
        skipped=skipped,
        fingerprint=source.fingerprint,
        side=side,
    )


def write_skipped(path: Path, skipped: Iterable[tuple[str, str]]) -> None:
    """One line per skipped file, sorted: name, tab, reason."""
    lines = sorted(f"{printable(name)}\t{printable(reason)}\n" for name, reason in skipped)
    path.write_text("".join(lines), encoding="utf-8", newline="\n")


def printable(text: str) -> str:
    """`text` on one line of valid UTF-8: control characters, and bytes that are no UTF-8, as escapes."""

    def escape(char: str) -> str:
        if char.isprintable() and char != "\\":
            return char
        if "\udc80" <= char <= "\udcff":  # how Python holds a byte that is no UTF-8
            return f"\\x{ord(char) - 0xDC00:02x}"
        return char.encode("unicode_escape").decode()

    return "".join(map(escape, text))


class _Index(NamedTuple):
    """What is known about the packed images; rows of the source, so that names and labels come from there."""

    rows: list[int]
    hashes: list[str]
    phashes: list[tuple[int, int]]
    shapes: list[tuple[int, int]]
    skipped: list[tuple[str, str]]


class _Packed(NamedTuple):
    pixels: bytes
    hash: str
    phashes: tuple[int, int]
    shape: tuple[int, int]


def _cpus() -> int:
    with contextlib.suppress(AttributeError):  # not on macOS and Windows
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _pack_one(load: Callable[[], bytes], side: int) -> _Packed | str:
    """The packed image, or why there is none."""
    try:
        image = decode(load())
    except BrokenImage as error:
        return str(error)
    except OSError as error:
        return f"cannot be read: {error.strerror or error}"
    width, height = image.size
    digest = hashlib.sha256(f"{width}x{height}".encode())
    digest.update(image.tobytes())
    short = min(width, height)
    left, top = (width - short) // 2, (height - short) // 2
    square = (left, top, left + short, top + short)
    small = image.resize((side, side), Image.Resampling.BICUBIC, square, reducing_gap=3.0)
    return _Packed(small.tobytes(), digest.hexdigest(), perceptual_hashes(image, square), (width, height))


def _read_index(folder: Path) -> _Index | None:
    """None if there is none, or it is damaged."""
    try:
        checksum, _, body = (folder / "index.json").read_bytes().partition(b"\n")
    except OSError:
        return None
    if hashlib.sha256(body).hexdigest().encode() != checksum:
        return None
    index = _Index(**json.loads(body))
    return index._replace(skipped=[(name, reason) for name, reason in index.skipped])


def _write_index(folder: Path, index: _Index) -> None:
    body = json.dumps(index._asdict()).encode()
    with open(folder / "index.json", "wb") as file:
        file.write(hashlib.sha256(body).hexdigest().encode() + b"\n" + body)
        file.flush()
        os.fsync(file.fileno())


def _open(folder: Path, side: int) -> tuple[_Index, np.ndarray] | None:
    """A finished cache, None if there is none. One that is damaged is moved out of the way."""
    index, data = _read_index(folder), folder / "images.u8"
    if index is not None:
        shape = (len(index.rows), side, side, 3)
        if data.is_file() and data.stat().st_size == int(np.prod(shape)):
            images = np.memmap(data, np.uint8, "r", shape=shape) if index.rows else np.zeros(shape, np.uint8)
            return index, images
    if folder.exists():
        _remove(folder)
    return None


def _remove(folder: Path) -> None:
    """Out of the way at once, by renaming; deleted as far as the system lets us."""
    with contextlib.suppress(OSError):
        folder = folder.rename(folder.with_name(f"tmp-{uuid.uuid4().hex}"))
    shutil.rmtree(folder, ignore_errors=True)


def _make(
    source: Source, side: int, folder: Path | None, workers: int, progress: bool
) -> tuple[_Index, np.ndarray | Streamed]:
    """Packed on disk, or without where there is too little room."""
    why = _lack_of_room(source, side, folder.parent) if folder is not None else ""
    if folder is None or not why:
        try:
            return _pack(source, side, folder, workers, progress)
        except OSError as error:
            if folder is None or error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            why = f"does not fit in {folder.parent} ({error.strerror})"  # a quota, or somebody else was faster
    return _without_room(source, side, folder, workers, progress, why)


def _lack_of_room(source: Source, side: int, folder: Path) -> str:
    """Why the packed images would not fit on the disk of `folder`; empty if they do."""
    folder.mkdir(parents=True, exist_ok=True)
    for left in folder.glob("tmp-*"):  # of a process that was killed; a live one writes all the time
        with contextlib.suppress(OSError):
            if time.time() - max(p.stat().st_mtime for p in (left, *left.iterdir())) > 24 * 3600:
                shutil.rmtree(left, ignore_errors=True)
    need, free = len(source) * (side * side * 3 + _INDEX_BYTES), shutil.disk_usage(folder).free
    return f"needs {need / 1e9:.1f} GB and {folder} has {free / 1e9:.1f}" if need > free else ""


def _without_room(
    source: Source, side: int, folder: Path, workers: int, progress: bool, why: str
) -> tuple[_Index, np.ndarray | Streamed]:
    """In memory where that is small; else the index alone is kept, in a folder of its own, and images are streamed."""
    if len(source) * side * side * 3 <= _IN_MEMORY:
        return _pack(source, side, None, workers, progress)
    advice = "make room there, set UNLABEL_CACHE to another folder, or use a smaller --image-size"
    if any(entry.packed for entry in source.entries):
        raise UserError(f"the image cache of {source.spec} {why}, and a compressed archive has no other way: {advice}")
    if progress:
        print(f"the image cache of {source.spec} {why}: images are decoded anew each time, which is slower; {advice}")
    kept = folder.with_name(f"{folder.name}-index")
    index = _read_index(kept)
    if index is None:
        _remove(kept)
        index = _decode_into(None, source, side, workers, progress)
        temporary = folder.with_name(f"tmp-{uuid.uuid4().hex}")
        with contextlib.suppress(OSError):  # another process was faster, or not even this much room is left
            temporary.mkdir()
            _write_index(temporary, index)
            temporary.rename(kept)
        shutil.rmtree(temporary, ignore_errors=True)
    rows, hashes = index.rows, index.hashes
    warnings.filterwarnings("ignore", module=r"PIL\.")  # about metadata that do not matter here

    def make(k: int) -> bytes | str:
        packed = _pack_one(source.entries[rows[k]].load, side)
        if isinstance(packed, str):
            return packed
        if packed.hash != hashes[k]:  # what was found out about near-duplicates no longer holds
            _remove(kept)
            return "its content has changed; the same command looks at all images again"
        return packed.pixels

    return index, Streamed([source.names[i] for i in rows], side, make, workers)


def _pack(source: Source, side: int, folder: Path | None, workers: int, progress: bool) -> tuple[_Index, np.ndarray]:
    """Decode all of `source` into `folder`, into memory if that is None."""
    if folder is None:
        memory = io.BytesIO()
        index = _decode_into(memory, source, side, workers, progress)
        images = np.frombuffer(memory.getbuffer(), np.uint8).reshape(-1, side, side, 3)
        images = _compact(images, index.rows)
        images.flags.writeable = False
        return index, images

    temporary = folder.with_name(f"tmp-{uuid.uuid4().hex}")
    temporary.mkdir()
    try:
        with open(temporary / "images.u8", "w+b") as file:
            index = _decode_into(file, source, side, workers, progress)
            file.flush()
            if index.rows:
                rows = np.memmap(file, np.uint8, "r+", shape=(index.rows[-1] + 1, side, side, 3))
                _compact(rows, index.rows)
                rows.flush()
                del rows
            file.truncate(len(index.rows) * side * side * 3)
            os.fsync(file.fileno())
        _write_index(temporary, index)
        with contextlib.suppress(OSError):  # another process was faster: its cache is as good
            temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    found = _open(folder, side)
    if found is None:
        raise OSError(f"{folder} vanished")
    return found


def _decode_into(file: IO[bytes] | None, source: Source, side: int, workers: int, progress: bool) -> _Index:
    """Decode in threads (Pillow releases the interpreter lock); image i of the source goes to row i of `file`."""
    from tqdm import tqdm

    packed: dict[int, _Packed] = {}
    skipped: list[tuple[str, str]] = []
    waiting: deque[tuple[int, Future[_Packed | str]]] = deque()
    step = side * side * 3

    def finish() -> None:
        i, future = waiting.popleft()
        result = future.result()
        if isinstance(result, str):
            skipped.append((source.names[i], result))
        else:
            if file is not None:
                file.seek(i * step)
                file.write(result.pixels)
            packed[i] = result._replace(pixels=b"")
        bar.update()

    with (
        warnings.catch_warnings(),
        ThreadPoolExecutor(workers) as pool,
        tqdm(total=len(source), desc="packing", unit=" images", disable=not progress) as bar,
    ):
        warnings.simplefilter("ignore")  # of Pillow, about metadata that do not matter here
        for i, load in source.read():
            waiting.append((i, pool.submit(functools.partial(_pack_one, load, side))))
            if len(waiting) >= 8 * workers:
                finish()
        while waiting:
            finish()
    rows = sorted(packed)
    return _Index(
        rows,
        [packed[i].hash for i in rows],
        [packed[i].phashes for i in rows],
        [packed[i].shape for i in rows],
        sorted(skipped),
    )


def _compact(images: np.ndarray, rows: Sequence[int]) -> np.ndarray:
    """Move `rows` (ascending) to the front, over the gaps that broken images left; returns that part."""
    if len(rows) < len(images):
        for start in range(0, len(rows), _BLOCK):
            block = np.asarray(rows[start : start + _BLOCK])
            images[start : start + len(block)] = images[block]
    return images[: len(rows)]
