"""From a source to square pixels: packed into one memory-mapped file, held in memory, or streamed.

A packed cache is a folder, `<fingerprint>-<side>-v<format>-<content sample>/`, of two files: `images.u8`, the pixels
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
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np
from PIL import Image

from unlabel.decode import BrokenImage, decode, perceptual_hashes
from unlabel.errors import UserError
from unlabel.sources import Source, cache_root
from unlabel.stores import Changed
from unlabel.streaming import Streamed

__all__ = ["Index", "load_or_pack"]

_FORMAT = 2  # one more whenever the same file comes to give other pixels, or to be refused
_BLOCK = 1024  # rows copied at a time
_INDEX_BYTES = 512  # of the index, per image
_IN_MEMORY = 1 << 30  # bytes of pixels that are rather held in memory than decoded again and again


class Index(NamedTuple):
    """What is known about the packed images; rows of the source, so that names and labels come from there."""

    rows: list[int]
    hashes: list[str]
    phashes: list[tuple[int, int]]
    shapes: list[tuple[int, int]]
    skipped: list[tuple[str, str]]


def load_or_pack(
    source: Source, side: int, *, workers: int | None, progress: bool, write: bool
) -> tuple[Index, np.ndarray | Streamed]:
    """What is known about the images of `source` that can be read, and their pixels (N, side, side, 3) uint8.

    From the cache, or decoded now and kept there (`write` false: in memory only). Raises UserError if the cache
    folder cannot be written.
    """
    key = f"{source.fingerprint[:24]}-{side}-v{_FORMAT}-{source.content_sample()[:8]}"
    folder = cache_root() / key
    try:
        found = _open(folder, side)
        return found or _make(source, side, folder if write else None, workers or _cpus(), progress)
    except OSError as error:
        raise UserError(
            f"cannot write the image cache in {cache_root()} ({error.strerror or error}); "
            "make room there, or set UNLABEL_CACHE to another folder"
        ) from None


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
    """The packed image, or why there is none. Raises OSError if the file is not the one that was listed, or is gone."""
    try:
        image = decode(load())
    except BrokenImage as error:
        return str(error)
    except (Changed, FileNotFoundError):
        raise
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


def _read_index(folder: Path) -> Index | None:
    """None if there is none, or it is damaged."""
    try:
        checksum, _, body = (folder / "index.json").read_bytes().partition(b"\n")
    except OSError:
        return None
    if hashlib.sha256(body).hexdigest().encode() != checksum:
        return None
    index = Index(**json.loads(body))
    return index._replace(skipped=[(name, reason) for name, reason in index.skipped])


def _write_index(folder: Path, index: Index) -> None:
    body = json.dumps(index._asdict()).encode()
    with open(folder / "index.json", "wb") as file:
        file.write(hashlib.sha256(body).hexdigest().encode() + b"\n" + body)
        file.flush()
        os.fsync(file.fileno())


def _open(folder: Path, side: int) -> tuple[Index, np.ndarray] | None:
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
) -> tuple[Index, np.ndarray | Streamed]:
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
) -> tuple[Index, np.ndarray | Streamed]:
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
        try:
            packed = _pack_one(source.entries[rows[k]].load, side)
        except OSError as error:
            return str(error.strerror or error)
        if isinstance(packed, str):
            return packed
        if packed.hash != hashes[k]:  # what was found out about near-duplicates no longer holds
            _remove(kept)
            return "its content has changed; the same command looks at all images again"
        return packed.pixels

    return index, Streamed([source.names[i] for i in rows], side, make, workers)


def _pack(source: Source, side: int, folder: Path | None, workers: int, progress: bool) -> tuple[Index, np.ndarray]:
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


def _decode_into(file: IO[bytes] | None, source: Source, side: int, workers: int, progress: bool) -> Index:
    """Decode in threads (Pillow releases the interpreter lock); image i of the source goes to row i of `file`."""
    from tqdm import tqdm

    packed: dict[int, _Packed] = {}
    skipped: list[tuple[str, str]] = []
    waiting: deque[tuple[int, Future[_Packed | str]]] = deque()
    step = side * side * 3

    def finish() -> None:
        i, future = waiting.popleft()
        try:
            result = future.result()
        except OSError as error:  # what is packed must be what was listed: it is found again by that
            raise UserError(
                f"{source.names[i]!r} changed or vanished while the images were read ({error.strerror or error}): "
                "the same command looks at them again"
            ) from None
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
    return Index(
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
