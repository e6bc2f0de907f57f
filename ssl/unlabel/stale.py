"""Whether a packed cache still holds what its source holds: files may change and keep their names and sizes."""

import contextlib
import os
import time
import warnings
from pathlib import Path

import numpy as np

from unlabel.packed_image import UNREAD, Packed, pack_one
from unlabel.packed_index import Index
from unlabel.sources import Source
from unlabel.stores import is_url

__all__ = ["is_stale"]

_MOST = 1000  # images that are looked at again when a cache is opened, of the broken and of the younger ones


def is_stale(source: Source, index: Index, side: int, files: list[Path]) -> bool:
    """Whether an image can be read now and could not before, or is another than the one that was packed.

    `files` is where `index` is kept. Their time tells what is younger; where nothing differs, they are marked as
    young as what was looked at (not younger than now), so that it is looked at once. Nothing behind a URL is.
    """
    files = [file for file in files if file.exists()]
    if not files:
        return False
    made = files[0].stat().st_mtime_ns
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Pillow, about metadata that do not matter here
        return _is_repaired(source, index, side, made) or _is_changed(source, index, side, made, files)


def _is_repaired(source: Source, index: Index, side: int, made: int) -> bool:
    """Of an image that could not be read: its file was repaired since, or the disk had failed for a moment."""
    if not index.skipped or source.packed or any(is_url(place.path) for place in source.entries.places):
        return False
    failed = {name for name, reason in index.skipped if reason.startswith(UNREAD)}

    def worth_a_look(i: int) -> bool:
        with contextlib.suppress(OSError):
            now = os.stat(source.entries[i].path)
            return source.names[i] in failed or max(now.st_mtime_ns, now.st_ctime_ns) >= made
        return False

    broken = np.setdiff1d(np.arange(len(source)), index.rows)[:_MOST].tolist()
    with contextlib.suppress(OSError):
        again = source.read([i for i in broken if worth_a_look(i)])
        return any(isinstance(pack_one(load, side, patient=False), Packed) for _, load in again)
    return False


def _is_changed(source: Source, index: Index, side: int, made: int, files: list[Path]) -> bool:
    """Of files, or archives, that were changed after `made`; of very many, as after copying, of some of all."""
    entries, places, now_ns = source.entries, source.entries.places, time.time_ns()
    newest = np.array([p.archive[1] if p.archive and not is_url(p.path) else p.newest for p in places], np.int64)
    if newest.max(initial=0) <= made:
        return False

    def is_younger(i: int) -> bool:
        place = places[entries.place[i]]
        with contextlib.suppress(OSError):
            return (
                place.archive is not None or os.stat(place.file(source.names[i], entries.offsets[i])).st_mtime_ns > made
            )
        return False

    packed = np.flatnonzero(newest[entries.place[index.rows]] > made)
    packed = np.array([k for k in packed.tolist() if is_younger(index.rows[k])], np.int64)
    some = packed[np.linspace(0, len(packed) - 1, min(len(packed), _MOST)).round().astype(int)]
    hash_of = {int(index.rows[k]): index.hashes[k].tobytes() for k in some}
    try:
        for i, load in source.read(list(hash_of)):
            now = pack_one(load, side, patient=False)
            if isinstance(now, str) or now.hash != hash_of[i]:
                return True
    except OSError:  # which the next one who reads it is told
        return False
    looked_at = min(int(newest.max()), now_ns)  # a file that is dated in the future is looked at until then
    with contextlib.suppress(OSError):
        for file in files:
            os.utime(file, ns=(looked_at, looked_at))
    return False
