"""From a source to square pixels: packed into one memory-mapped file, held in memory, or streamed.

A packed cache is a folder, `<fingerprint>-<side>-v<format>-<content sample>/`, of two files: `images.u8`, the pixels
(N, R, R, 3), and `index.bin`, whose first line is the SHA-256 of the rest: a line of JSON, then columns. It is made
under another name and renamed when it is complete: what carries the name is whole, however many processes made it at
once and whenever one was killed. What a finished cache holds never changes; one whose source has changed (stale.py) is
left to those who use it, and another is made beside it.

Where the pixels would not fit on the disk, only the index is kept (`…-index/`), and images are decoded anew each time.
"""

import contextlib
import errno
import functools
import io
import os
import shutil
import time
import uuid
import warnings
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import IO

import numpy as np

from unlabel.errors import UserError
from unlabel.packed_image import Packed, pack_one
from unlabel.packed_index import COLUMNS, Index, read_index, write_index
from unlabel.sources import Source, cache_root
from unlabel.stale import is_stale
from unlabel.stores import Changed
from unlabel.streaming import Streamed

__all__ = ["load_or_pack"]

_FORMAT = 3  # one more whenever the same file comes to give other pixels, or to be refused
_BLOCK = 1024  # rows copied at a time
_INDEX_BYTES = 128  # of the index, per image, rounded up
_VARIANTS = 20
_IN_MEMORY = 1 << 30  # bytes of pixels that are rather held in memory than decoded again and again


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
        for variant in range(_VARIANTS):  # a new cache for what has changed: the old one may be in use
            at = folder.with_name(f"{key}-again{variant}") if variant else folder
            found = _open(at, side) or _make(source, side, at if write else None, workers or _cpus(), progress)
            if not write or not is_stale(source, found[0], side, [p / "index.bin" for p in (at, _index_alone(at))]):
                return found
        raise UserError(
            f"the images of {source.spec} have changed {_VARIANTS} times, and each time were packed anew: remove "
            f"{folder}* when nothing uses them any more"
        )
    except OSError as error:
        raise UserError(
            f"cannot use the image cache in {cache_root()} ({error.strerror or error}); "
            "make room there, or set UNLABEL_CACHE to another folder"
        ) from None


def _index_alone(folder: Path) -> Path:
    """Where the index is kept of images that are streamed."""
    return folder.with_name(f"{folder.name}-index")


def _cpus() -> int:
    with contextlib.suppress(AttributeError):  # not on macOS and Windows
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _open(folder: Path, side: int) -> tuple[Index, np.ndarray] | None:
    """A finished cache, None if there is none. One that is damaged is moved out of the way."""
    index, data = read_index(folder), folder / "images.u8"
    there = folder.exists()
    if index is None and there:  # another process may have put it there just now
        index = read_index(folder)
    if index is not None:
        shape = (len(index.rows), side, side, 3)
        if data.is_file() and data.stat().st_size == int(np.prod(shape)):
            images = np.memmap(data, np.uint8, "r", shape=shape) if len(index.rows) else np.zeros(shape, np.uint8)
            return index, images
    if there:
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
    if source.packed:
        raise UserError(f"the image cache of {source.spec} {why}, and a compressed archive has no other way: {advice}")
    if progress:
        print(f"the image cache of {source.spec} {why}: images are decoded anew each time, which is slower; {advice}")
    kept = _index_alone(folder)
    index = read_index(kept)
    if index is None:
        _remove(kept)
        begun = time.time_ns()
        index = _decode_into(None, source, side, workers, progress)
        temporary = folder.with_name(f"tmp-{uuid.uuid4().hex}")
        with contextlib.suppress(OSError):  # another process was faster, or not even this much room is left
            temporary.mkdir()
            write_index(temporary, index, begun)
            temporary.rename(kept)
        shutil.rmtree(temporary, ignore_errors=True)
    rows, hashes = index.rows, index.hashes
    warnings.filterwarnings("ignore", module=r"PIL\.")  # about metadata that do not matter here

    def make(k: int) -> bytes | str:
        try:
            packed = pack_one(source.entries[rows[k]].load, side)
        except OSError as error:
            return str(error.strerror or error)
        if isinstance(packed, str):
            return packed
        if packed.hash != hashes[k].tobytes():  # what was found out about near-duplicates no longer holds
            _remove(kept)
            return "its content has changed; the same command looks at all images again"
        return packed.pixels

    return index, Streamed(source.names.take(rows), side, make, workers)


def _pack(source: Source, side: int, folder: Path | None, workers: int, progress: bool) -> tuple[Index, np.ndarray]:
    """Decode all of `source` into `folder`, into memory if that is None."""
    if folder is None:
        memory = io.BytesIO()
        index = _decode_into(memory, source, side, workers, progress)
        images = np.frombuffer(memory.getbuffer(), np.uint8).reshape(-1, side, side, 3)
        images = _compact(images, index.rows)
        images.flags.writeable = False
        return index, images

    temporary, begun = folder.with_name(f"tmp-{uuid.uuid4().hex}"), time.time_ns()
    temporary.mkdir()
    try:
        with open(temporary / "images.u8", "w+b") as file:
            index = _decode_into(file, source, side, workers, progress)
            file.flush()
            if len(index.rows):
                rows = np.memmap(file, np.uint8, "r+", shape=(int(index.rows[-1]) + 1, side, side, 3))
                _compact(rows, index.rows)
                rows.flush()
                del rows
            file.truncate(len(index.rows) * side * side * 3)
            os.fsync(file.fileno())
        write_index(temporary, index, begun)
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

    columns = {name: np.zeros((len(source), *shape), kind) for name, (kind, shape) in COLUMNS.items()}
    columns["rows"] -= 1
    skipped: list[tuple[str, str]] = []
    waiting: deque[tuple[int, Future[Packed | str]]] = deque()
    step = side * side * 3

    def finish() -> None:
        i, future = waiting.popleft()
        try:
            result = future.result()
        except OSError as error:  # what is packed must be what was listed: it is found again by that
            what = "changed or vanished while the images were read"
            what = what if isinstance(error, Changed | FileNotFoundError) else "cannot be read at the moment"
            raise UserError(
                f"{source.names[i]!r} {what} ({error.strerror or error}): the same command looks at them again"
            ) from None
        if isinstance(result, str):
            skipped.append((source.names[i], result))
        else:
            if file is not None:
                file.seek(i * step)
                file.write(result.pixels)
            columns["rows"][i] = i
            columns["hashes"][i] = np.frombuffer(result.hash, np.uint8)
            columns["phashes"][i], columns["shapes"][i] = result.phashes, result.shape
        bar.update()

    with (
        warnings.catch_warnings(),
        ThreadPoolExecutor(workers) as pool,
        tqdm(total=len(source), desc="packing", unit=" images", disable=not progress) as bar,
    ):
        warnings.simplefilter("ignore")  # of Pillow, about metadata that do not matter here
        for i, load in source.read():
            waiting.append((i, pool.submit(functools.partial(pack_one, load, side))))
            if len(waiting) >= 8 * workers:
                finish()
        while waiting:
            finish()
    if skipped:
        there = columns["rows"] >= 0
        columns = {name: column[there] for name, column in columns.items()}
    return Index(**columns, skipped=sorted(skipped))


def _compact(images: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Move `rows` (ascending) to the front, over the gaps that broken images left; returns that part."""
    if len(rows) < len(images):
        for start in range(0, len(rows), _BLOCK):
            block = rows[start : start + _BLOCK]
            images[start : start + len(block)] = images[block]
    return images[: len(rows)]
