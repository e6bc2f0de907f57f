"""From a source to square pixels: packed into one memory-mapped file, held in memory, or streamed.

A packed cache is a folder, `<fingerprint>-<side>-v<format>-<content sample>/`, of two files: `images.u8`, the pixels
(N, R, R, 3), and `index.bin`, whose first line is the SHA-256 of the rest: a line of JSON, then columns. It is made
under another name and renamed when it is complete: what carries the name is whole, however many processes made it at
once and whenever one was killed. A finished cache is never written to again.

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
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np
from PIL import Image

from unlabel.decode import BrokenImage, decode_reduced, perceptual_hashes
from unlabel.errors import UserError
from unlabel.sources import Source, cache_root
from unlabel.stores import Changed, is_url, patiently
from unlabel.streaming import Streamed

__all__ = ["Index", "load_or_pack"]

_FORMAT = 3  # one more whenever the same file comes to give other pixels, or to be refused
_BLOCK = 1024  # rows copied at a time
_HASHED = 160  # short side in pixels that a large JPEG may be decoded to before it is hashed
_INDEX_BYTES = 128  # of the index, per image, rounded up
_COLUMNS = {"rows": ("<i8", ()), "hashes": ("u1", (32,)), "phashes": ("<u8", (2,)), "shapes": ("<i4", (2,))}
_LASTING = {errno.EACCES, errno.EPERM, errno.EIO, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.EINVAL}
_UNREAD = "cannot be read: "
_VARIANTS = 20
_LOOKED_AT_AGAIN = 1000  # broken images, whenever a cache is opened
_IN_MEMORY = 1 << 30  # bytes of pixels that are rather held in memory than decoded again and again


class Index(NamedTuple):
    """What is known about the N packed images; rows of the source, so that names and labels come from there.

    `rows` (N,) int64; `hashes` (N, 32) uint8; `phashes` (N, 2) uint64; `shapes` (N, 2) int32; `skipped` (name, reason).
    """

    rows: np.ndarray
    hashes: np.ndarray
    phashes: np.ndarray
    shapes: np.ndarray
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
        for variant in range(_VARIANTS):  # a new cache for what was repaired: the old one may be in use
            at = folder.with_name(f"{key}-again{variant}") if variant else folder
            found = _open(at, side) or _make(source, side, at if write else None, workers or _cpus(), progress)
            if not write or not (_put_right(source, found[0], side, at) or _changed(source, found[0], side, at)):
                break
        return found
    except OSError as error:
        raise UserError(
            f"cannot use the image cache in {cache_root()} ({error.strerror or error}); "
            "make room there, or set UNLABEL_CACHE to another folder"
        ) from None


def _put_right(source: Source, index: Index, side: int, folder: Path) -> bool:
    """Whether an image that could not be read when `index` was made can be read now.

    Its file, of the same name and size, may have been repaired since, or the disk had failed for a moment. Up to a
    thousand are looked at, none in a compressed archive or behind a URL.
    """
    if not index.skipped or source.packed or any(is_url(place.path) for place in source.entries.places):
        return False
    made = _made(folder)
    failed = {name for name, reason in index.skipped if reason.startswith(_UNREAD)}

    def worth_a_look(i: int) -> bool:
        with contextlib.suppress(OSError):
            now = os.stat(source.entries[i].path)
            return source.names[i] in failed or max(now.st_mtime_ns, now.st_ctime_ns) >= made
        return False

    broken = np.setdiff1d(np.arange(len(source)), index.rows)[:_LOOKED_AT_AGAIN] if made else np.zeros(0, int)
    broken = [i for i in broken.tolist() if worth_a_look(i)]
    with contextlib.suppress(OSError), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return any(isinstance(_pack_one(load, side, patient=False), _Packed) for _, load in source.read(broken))
    return False


def _changed(source: Source, index: Index, side: int, folder: Path) -> bool:
    """Whether an image is another than the one of the same name and size that `index` was made of.

    Files, or archives, that were changed after it are looked at, up to a thousand images (of a copy, some of all);
    nothing behind a URL. Where nothing differs, the index is marked as young as they are.
    """
    places = source.entries.places
    newest = np.array([p.archive[1] if p.archive and not is_url(p.path) else p.newest for p in places], np.int64)
    made = _made(folder)
    if not made or newest.max(initial=0) <= made:
        return False

    def younger(i: int) -> bool:
        place = places[source.entries.place[i]]
        with contextlib.suppress(OSError):
            return place.archive is not None or os.stat(source.entries[i].path).st_mtime_ns > made
        return False

    there = index.rows[newest[source.entries.place[index.rows]] > made]
    rows = np.array([i for i in there.tolist() if younger(i)], np.int64)
    some = rows[np.linspace(0, len(rows) - 1, min(len(rows), _LOOKED_AT_AGAIN)).round().astype(int)].tolist()
    hash_of = dict(zip(index.rows.tolist(), index.hashes, strict=True))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            for i, load in source.read(some):
                now = _pack_one(load, side, patient=False)
                if isinstance(now, str) or now.hash != hash_of[i].tobytes():
                    return True
        except OSError:  # which the next one who reads it is told
            return False
    with contextlib.suppress(OSError):
        for file in _indices(folder):
            os.utime(file, ns=(int(newest.max()), int(newest.max())))
    return False


def _indices(folder: Path) -> list[Path]:
    return [file for p in (folder, _index_alone(folder)) if (file := p / "index.bin").exists()]


def _made(folder: Path) -> int:
    """When the cache's index was written, in ns; 0 where there is none."""
    return next((file.stat().st_mtime_ns for file in _indices(folder)), 0)


def _index_alone(folder: Path) -> Path:
    """Where the index is kept of images that are streamed."""
    return folder.with_name(f"{folder.name}-index")


class _Packed(NamedTuple):
    pixels: bytes
    hash: bytes
    phashes: tuple[int, int]
    shape: tuple[int, int]


def _cpus() -> int:
    with contextlib.suppress(AttributeError):  # not on macOS and Windows
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _pack_one(load: Callable[[], bytes], side: int, patient: bool = True) -> _Packed | str:
    """The packed image, or why there is none.

    Raises OSError if the file is not the one that was listed, is gone, or cannot be read at the moment.
    """
    try:
        data = patiently(load) if patient else load()
        shape, image = decode_reduced(data, _HASHED)
        # What is hashed does not depend on `side`; the same pixels serve where they are fine enough.
        fine = image if min(image.size) >= min(2 * side, *shape) else decode_reduced(data, 2 * side)[1]
    except BrokenImage as error:
        return str(error)
    except OSError as error:
        if isinstance(error, Changed) or (error.errno not in _LASTING and not isinstance(error, PermissionError)):
            raise
        return f"{_UNREAD}{error.strerror or error}"
    digest = hashlib.sha256(f"{shape[0]}x{shape[1]}".encode())
    digest.update(image.tobytes())
    small = fine.resize((side, side), Image.Resampling.BICUBIC, _square(fine), reducing_gap=3.0)
    return _Packed(small.tobytes(), digest.digest(), perceptual_hashes(image, _square(image)), shape)


def _square(image: Image.Image) -> tuple[int, int, int, int]:
    """The central square: left, top, right, bottom."""
    short = min(image.size)
    left, top = ((n - short) // 2 for n in image.size)
    return left, top, left + short, top + short


def _read_index(folder: Path) -> Index | None:
    """None if there is none, or it is damaged."""
    try:
        with open(folder / "index.bin", "rb") as file:
            checksum, body = file.readline().strip(), file.read()
    except (FileNotFoundError, NotADirectoryError):  # one that is there and may not be read is nobody's to remove
        return None
    if hashlib.sha256(body).hexdigest().encode() != checksum:
        return None
    at = body.index(b"\n") + 1
    about, columns = json.loads(body[:at]), {}
    for name, (kind, shape) in _COLUMNS.items():
        count = about["images"] * int(np.prod(shape, dtype=int))
        columns[name] = np.frombuffer(body, kind, count, at).reshape(-1, *shape)
        at += columns[name].nbytes
    return Index(**columns, skipped=[(name, reason) for name, reason in about["skipped"]])


def _write_index(folder: Path, index: Index) -> None:
    head = json.dumps({"images": len(index.rows), "skipped": index.skipped}).encode() + b"\n"
    columns = [np.ascontiguousarray(getattr(index, name), kind).data for name, (kind, _) in _COLUMNS.items()]
    digest = hashlib.sha256(head)
    for column in columns:
        digest.update(column)
    with open(folder / "index.bin", "wb") as file:
        file.write(digest.hexdigest().encode() + b"\n" + head)
        for column in columns:
            file.write(column)
        file.flush()
        os.fsync(file.fileno())


def _open(folder: Path, side: int) -> tuple[Index, np.ndarray] | None:
    """A finished cache, None if there is none. One that is damaged is moved out of the way."""
    index, data = _read_index(folder), folder / "images.u8"
    there = folder.exists()
    if index is None and there:  # another process may have put it there just now
        index = _read_index(folder)
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

    temporary = folder.with_name(f"tmp-{uuid.uuid4().hex}")
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

    columns = {name: np.zeros((len(source), *shape), kind) for name, (kind, shape) in _COLUMNS.items()}
    columns["rows"] -= 1
    skipped: list[tuple[str, str]] = []
    waiting: deque[tuple[int, Future[_Packed | str]]] = deque()
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
            waiting.append((i, pool.submit(functools.partial(_pack_one, load, side))))
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
