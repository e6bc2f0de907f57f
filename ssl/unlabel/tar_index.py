"""Archives listed in parallel, each listing kept on disk for the next time; and folders and patterns behind a URL.

An archive has no table of contents: finding its members means a jump from header to header through all of it, or
decompressing it. What was found is kept in `listings/` of the cache folder, one file for each archive, whose first
line is the SHA-256 of the rest: columns in JSON, compressed. A listing holds for the size and the time of
modification (in a store: the version) that it was made at; when these differ, or it is damaged, it is made again.

Threads, not processes: on a shared file system or in a store, listing waits for answers nearly all the time, and
threads wait as well as processes do, need no start-up, and share what they found. Decompression runs outside the
interpreter lock, too. Only plain archives that are already in memory would be listed faster by processes, once.
"""

import contextlib
import hashlib
import json
import os
import re
import urllib.parse
import uuid
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from unlabel.errors import UserError
from unlabel.listing import MAX_BYTES, Entries, Found, Place, is_image_name, joined, list_archive, too_large
from unlabel.named import cache_root
from unlabel.stores import Missing, State, file_state, filesystem, is_url, reaching

__all__ = ["in_parallel", "list_archives", "list_url", "url_matches"]

_FORMAT = 1  # one more whenever list_archive comes to find something else in the same archive
_SMALL = 1 << 20  # bytes of an archive that is listed about as fast as a listing is read: not kept
_AT_ONCE = 16

R = TypeVar("R")


def in_parallel(function: Callable[[str], R], items: Sequence[str]) -> list[R]:
    """`function` of each of the items, in their order; the first of them that raises, raises."""
    if len(items) < 2:
        return [function(item) for item in items]
    with ThreadPoolExecutor(min(_AT_ONCE, len(items))) as pool:
        return list(pool.map(function, items))


def list_archives(paths: Sequence[str]) -> Found:
    """What the archives hold, one after the other: as `list_archive` finds it, or found before."""
    return joined(in_parallel(_list_kept, paths))


def _list_kept(path: str) -> Found:
    try:
        state = file_state(path)
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror}); check that it is there and its permissions") from None
    known = bool(state[1])  # a store that tells no version cannot be asked whether it is still the same
    if state[0] < _SMALL or not known or not (is_url(path) or os.access(path, os.R_OK)):
        return list_archive(path, state)
    file = _place(path)
    if (found := _read(file, path, state)) is None:
        found = list_archive(path, state)
        with contextlib.suppress(OSError, UserError):
            if file_state(path) == state:  # else it is being written, and what was found holds for nothing
                _write(file, found, state)
    return found


def _place(path: str) -> Path:
    """Where the listing of an archive is kept. Its own name counts beside its real place, as skipped files have it."""
    real = path if is_url(path) else os.path.realpath(path)
    digest = hashlib.sha256(f"{real}\0{os.path.basename(path)}".encode("utf-8", "surrogateescape"))
    return cache_root() / "listings" / f"{digest.hexdigest()[:32]}.json.z"


def _write(file: Path, found: Found, state: State) -> None:
    """All of it or nothing, also where other processes do the same. The checksum tells if power was lost meanwhile."""
    columns = {
        "format": _FORMAT,
        "state": state,
        "names": found.entries.names,
        "sizes": found.entries.sizes.tolist(),
        "offsets": found.entries.offsets.tolist(),
        "packed": found.entries.places[0].packed,
        "skipped": found.skipped,
        "ignored": found.ignored,
    }
    body = zlib.compress(json.dumps(columns, separators=(",", ":")).encode(), 1)
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f"tmp-{uuid.uuid4().hex}")
    try:
        temporary.write_bytes(hashlib.sha256(body).hexdigest().encode() + b"\n" + body)
        os.replace(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)


def _read(file: Path, path: str, state: State) -> Found | None:
    """None if there is no listing, it is damaged, or the archive is another by now."""
    try:
        checksum, _, body = file.read_bytes().partition(b"\n")
        if hashlib.sha256(body).hexdigest().encode() != checksum:
            return None
        kept = json.loads(zlib.decompress(body))
        if kept["format"] != _FORMAT or tuple(kept["state"]) != state:
            return None
        place = Place(path if is_url(path) else os.path.abspath(path), kept["packed"], state)
        entries = Entries([place], kept["names"], kept["sizes"], kept["offsets"])
        return Found(entries, [(name, reason) for name, reason in kept["skipped"]], kept["ignored"])
    except (OSError, ValueError, KeyError, TypeError, zlib.error):
        return None


def url_matches(url: str) -> list[str]:
    """The objects that a URL with * stands for, sorted; without one the object itself. Empty if there is none."""
    fs, key = filesystem(url)
    chain = re.match(r"(\w+::)*", url)  # of file systems in front, such as simplecache::
    try:
        with reaching(url):
            if "*" not in url:
                return [url] if fs.info(key)["type"] == "file" else []
            return [(chain[0] if chain else "") + fs.unstrip_protocol(match) for match in sorted(fs.glob(key))]
    except Missing:
        return []


def list_url(url: str) -> Found:
    """The images of a folder in a store, at any depth."""
    fs, key = filesystem(url)
    root = key.rstrip("/")
    with reaching(url):
        files = fs.find(key, detail=True)
        if files.keys() == {root}:
            raise UserError(f"{url} is one file, not a source; give the folder that holds it, or a .tar")
        sizes = {path: info.get("size") for path, info in files.items()}
        unknown = [path for path, size in sizes.items() if size is None]  # a page of links tells none
        sizes |= dict(zip(unknown, in_parallel(lambda path: fs.info(path).get("size"), unknown), strict=True))
    found, names, paths = Found(), list[str](), list[str]()
    for path in sorted(files):
        inner = path.removeprefix(root).lstrip("/")
        # The path of a web address is quoted, and a name is not.
        name = urllib.parse.unquote(inner, errors="surrogateescape") if url.startswith("http") else inner
        if not is_image_name(name, found):
            continue
        if ".." in name.split("/"):
            found.skipped.append((name, "name that leaves the folder"))
        elif sizes[path] is None:
            found.skipped.append((name, "its size is not known"))
        elif int(sizes[path]) > MAX_BYTES:
            found.skipped.append((name, too_large(int(sizes[path]))))
        else:
            names.append(name)
            paths.append(path)
    base = url.rstrip("/")
    quoted = [f"{base}/{path.removeprefix(root).lstrip('/')}" for path in paths] if url.startswith("http") else None
    place = Place(base, paths=quoted)
    rows = range(len(paths)) if quoted else None
    found.entries = Entries([place], names, [int(sizes[p]) for p in paths], rows)
    return found
