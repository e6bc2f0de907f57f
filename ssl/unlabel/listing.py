"""What a folder or a tar archive holds: images by name, size and place, and what had to be left out.

Nothing is unpacked to disk, and nothing outside the folder or the archive is reached by a name. A path with "://" is an
object in a store (stores.py).
"""

import contextlib
import errno
import io
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import IO, TYPE_CHECKING

from unlabel.errors import UserError
from unlabel.stores import REQUEST, Changed, Remote, State, file_state, is_url, load_range

if TYPE_CHECKING:
    import numpy as np

__all__ = ["MAX_BYTES", "Entry", "Found", "is_image_name", "list_archive", "list_folder", "too_large", "unpacked"]

_SUFFIX = re.compile(
    r"\.(jpe?g|jpe|jfif|jif|mpo|a?png|gif|bmp|dib|tiff?|webp|p[pgbn]m|pfm|jp2|j2k|jpx|avif|ico|hei[cf]|jxl)"
)
_NO_IMAGES = {"readme", "license", "licence", "copying", "changelog", "makefile", "md5sums", "sha256sums"}
_NO_DATA = {"thumbs.db", "desktop.ini", "__macosx"}
MAX_BYTES = 1 << 30  # of a file: more than the pixels of any image that is read; a sparse file costs nothing to make
_MAX_HEADER = 1 << 20  # of a long name or of extended attributes in an archive, which are read into memory


@dataclass(frozen=True, slots=True)
class Entry:
    """One image of a source: `size` bytes at `offset` of a file, or of what a packed archive unpacks to."""

    name: str
    size: int
    path: str = ""
    offset: int = 0
    packed: bool = False
    pixels: "np.ndarray | None" = None  # (H, W) or (H, W, 3) uint8, of a named set
    archive: State | None = None  # of an archive's member: the archive as it was when it was listed

    def load(self, limit: int | None = None) -> bytes:
        """Its bytes, the first `limit` of them if given. Raises OSError: Changed if it is not what was listed."""
        count = self.size if limit is None else min(self.size, limit)
        if self.pixels is not None:
            return portable_pixmap(self.pixels)[:count]
        if self.packed:
            raise ValueError("a compressed archive is read in sequence, by Source.read")
        if is_url(self.path):
            return load_range(self.path, self.size, self.offset, count, self.archive)
        with open(self.path, "rb") as file:
            file.seek(self.offset)
            data = file.read(count)
            now = os.fstat(file.fileno())  # a microsecond; after reading, so that a change meanwhile shows, too
        if now.st_size != self.size if self.archive is None else (now.st_size, now.st_mtime_ns) != self.archive:
            raise Changed(f"{self.path} has changed since it was listed")
        return data


@dataclass
class Found:
    """What a folder or an archive holds."""

    entries: list[Entry] = field(default_factory=list)
    skipped: list[tuple[str, str]] = field(default_factory=list)  # (name, reason): never silently left out
    ignored: int = 0  # files that are no images, by their suffix


def is_image_name(path: str, found: Found) -> bool:
    """By name only. Hidden files do not count at all; other files that are no images are counted."""
    parts = path.split("/")
    if any(part.startswith(".") or part.lower() in _NO_DATA for part in parts):
        return False
    suffix = PurePosixPath(parts[-1]).suffix.lower()
    if _SUFFIX.fullmatch(suffix) or (not suffix and parts[-1].lower() not in _NO_IMAGES):
        return True
    found.ignored += 1
    return False


def list_folder(root: str) -> Found:
    found = Found()
    seen: set[str] = set()
    # Real folders before links, so that an image that can be reached both ways has the name without the link.
    folders, links = [(root, "")], []
    while folders or links:
        if not folders:
            links.sort(reverse=True, key=lambda pair: pair[1])
            folders.append(links.pop())
        folder, prefix = folders.pop()
        if (real := os.path.realpath(folder)) in seen:
            continue
        seen.add(real)
        try:
            children = list(os.scandir(folder))
        except OSError as error:
            if not prefix:
                raise UserError(f"cannot open the folder {root}: {error.strerror}; check the permissions") from None
            found.skipped.append((prefix.rstrip("/"), f"folder cannot be opened: {error.strerror}"))
            continue
        for child in children:
            name = prefix + child.name
            if child.name.startswith(".") or child.name.lower() in _NO_DATA:
                continue
            if _is_folder(child):
                (links if child.is_symlink() else folders).append((child.path, name + "/"))
            elif not is_image_name(name, found):
                continue
            elif not os.path.isfile(child.path):
                nowhere = child.is_symlink() and not os.path.exists(child.path)
                reason = "link to nowhere" if nowhere else "not a regular file"
                found.skipped.append((name, reason))
            elif not os.access(child.path, os.R_OK):
                found.skipped.append((name, "no permission to read it"))
            elif (size := child.stat().st_size) > MAX_BYTES:
                found.skipped.append((name, too_large(size)))
            else:
                found.entries.append(Entry(name, size, os.path.abspath(child.path)))
    return found


def _is_folder(child: os.DirEntry[str]) -> bool:
    try:
        return child.is_dir()
    except OSError:  # a link to itself
        return False


@contextlib.contextmanager
def unpacked(path: str) -> Iterator[IO[bytes]]:
    """The archive's plain bytes, whatever compresses it (told by its first bytes, not by its name)."""
    import bz2
    import gzip
    import lzma

    with io.BufferedReader(Remote(path), REQUEST) if is_url(path) else open(path, "rb") as file:
        magic = file.read(3)
        file.seek(0)
        opener = {b"\x1f\x8b": gzip.open, b"BZ": bz2.open, b"\xfd7": lzma.open}.get(magic[:2])
        with contextlib.nullcontext(file) if opener is None else opener(file, "rb") as stream:
            yield stream  # pyright: ignore[reportReturnType]


def list_archive(path: str, state: State | None = None) -> Found:
    """The images of a tar archive, in place. What is unsafe or cut off is listed as skipped.

    `state` is its `file_state`, where that is known. Raises UserError for what is no archive or cannot be read.
    """
    import lzma
    import tarfile
    import zlib

    if not is_url(path) and not os.access(path, os.R_OK):
        raise UserError(f"no permission to read {path}; check its permissions")
    # tarfile lets through what a size or a number of nonsense leads to.
    damage = (tarfile.TarError, EOFError, OSError, ValueError, OverflowError, MemoryError, RecursionError)
    damage += (zlib.error, lzma.LZMAError)

    class Member(tarfile.TarInfo):
        def _proc_member(self, tarfile_):  # where tarfile begins to believe a header
            kind = self.type in (b"x", b"g", b"X", b"L", b"K")  # read into memory
            if self.size < 0 or (kind and self.size > _MAX_HEADER):
                raise tarfile.ReadError("impossible size in a header")
            return super()._proc_member(tarfile_)  # pyright: ignore[reportAttributeAccessIssue]

    found = Found()
    entries: dict[str, Entry] = {}  # a later member of the same name replaces the earlier one, as in unpacking
    state = state or file_state(path)
    place = path if is_url(path) else os.path.abspath(path)
    with unpacked(path) as stream:
        packed = not isinstance(stream, io.BufferedReader)
        member = None
        try:
            tar = tarfile.open(  # noqa: SIM115
                fileobj=stream, mode="r:", tarinfo=Member, encoding="utf-8", errors="surrogateescape"
            )
        except damage as error:
            raise UserError(f"{path} is not a readable tar archive ({error}); make it again") from None
        try:
            while (member := tar.next()) is not None:
                tar.members.clear()  # pyright: ignore[reportAttributeAccessIssue]  # else it grows without end
                name = member.name.removeprefix("./")
                if reason := _unsafe(member):
                    found.skipped.append((name, reason))
                elif member.size > MAX_BYTES and member.isfile() and is_image_name(name, found):
                    found.skipped.append((name, too_large(member.size)))
                elif member.size <= MAX_BYTES and member.isfile() and is_image_name(name, found):
                    if member.size:  # tarfile notices a cut only at the next member
                        stream.seek(member.offset_data + member.size - 1)
                        if not stream.read(1):
                            raise EOFError
                    entries[name] = Entry(name, member.size, place, member.offset_data, packed, archive=state)
            # tarfile also stops quietly at a cut between members or at a damaged header. A whole archive ends
            # in two blocks of zeros, the first of which has just been read.
            whole = stream.tell() == tar.offset + 512 and not any(stream.read(512))
            damaged_at = None if whole else "the end"
        except damage as error:
            # The disk or the network, not the archive; but an offset that no file can have (EINVAL) is the archive's.
            if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
                raise UserError(f"cannot read {path} ({error.strerror}); try again when it can be read") from None
            damaged_at = member.name if member is not None else "the start"
        if damaged_at is not None:
            reason = f"archive is truncated or damaged at {damaged_at!r}, after {len(entries):,} images"
            found.skipped.append((os.path.basename(path), reason))
    found.entries = list(entries.values())
    return found


def too_large(size: int) -> str:
    return f"too large: {size / 1e9:,.1f} GB"


def _unsafe(member) -> str | None:
    """Why a tar member is left alone, None if it may be read. `member` is a tarfile.TarInfo."""
    if member.name.startswith(("/", "\\")) or re.match(r"[A-Za-z]:[\\/]", member.name):
        return "absolute name"
    if ".." in re.split(r"[\\/]", member.name):
        return "name that leaves the archive"
    if member.issym() or member.islnk():
        return "link inside an archive, not followed"
    if member.issparse() or not (member.isfile() or member.isdir()):
        return "not a regular file"
    return None


def portable_pixmap(pixels: "np.ndarray") -> bytes:
    """PGM or PPM file of (H, W) or (H, W, 3) uint8: pixels with a few bytes in front."""
    kind = "P5" if pixels.ndim == 2 else "P6"
    return f"{kind} {pixels.shape[1]} {pixels.shape[0]} 255\n".encode() + pixels.tobytes()
