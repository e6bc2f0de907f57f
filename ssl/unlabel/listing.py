"""What a folder or a tar archive holds: images by name, size and place, and what had to be left out.

Nothing is unpacked to disk, and nothing outside the folder or the archive is reached by a name.
"""

import contextlib
import io
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import IO, TYPE_CHECKING

from unlabel.errors import UserError

if TYPE_CHECKING:
    import numpy as np

__all__ = ["Entry", "Found", "list_archive", "list_folder", "unpacked"]

_SUFFIX = re.compile(
    r"\.(jpe?g|jpe|jfif|jif|mpo|a?png|gif|bmp|dib|tiff?|webp|p[pgbn]m|pfm|jp2|j2k|jpx|avif|ico|hei[cf]|jxl)"
)
_NO_IMAGES = {"readme", "license", "licence", "copying", "changelog", "makefile", "md5sums", "sha256sums"}
_NO_DATA = {"thumbs.db", "desktop.ini", "__macosx"}


@dataclass(frozen=True, slots=True)
class Entry:
    """One image of a source: `size` bytes at `offset` of a file, or of what a packed archive unpacks to."""

    name: str
    size: int
    path: str = ""
    offset: int = 0
    packed: bool = False
    pixels: "np.ndarray | None" = None  # (H, W) or (H, W, 3) uint8, of a named set

    def load(self, limit: int | None = None) -> bytes:
        """The image's bytes, the first `limit` of them if given. Raises OSError."""
        count = self.size if limit is None else min(self.size, limit)
        if self.pixels is not None:
            return portable_pixmap(self.pixels)[:count]
        if self.packed:
            raise ValueError("a compressed archive is read in sequence, by Source.read")
        with open(self.path, "rb") as file:
            file.seek(self.offset)
            return file.read(count)


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
                reason = "link to nowhere" if child.is_symlink() else "not a regular file"
                found.skipped.append((name, reason))
            elif not os.access(child.path, os.R_OK):
                found.skipped.append((name, "no permission to read it"))
            else:
                found.entries.append(Entry(name, child.stat().st_size, os.path.abspath(child.path)))
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

    with open(path, "rb") as file:
        magic = file.read(3)
    openers = {b"\x1f\x8b": gzip.open, b"BZ": bz2.open, b"\xfd7": lzma.open}
    with openers.get(magic[:2], open)(path, "rb") as stream:
        yield stream  # pyright: ignore[reportReturnType]


def list_archive(path: str) -> Found:
    """The images of a tar archive, in place. What is unsafe or cut off is listed as skipped."""
    import lzma
    import tarfile
    import zlib

    if not os.access(path, os.R_OK):
        raise UserError(f"no permission to read {path}; check its permissions")
    damage = (tarfile.TarError, EOFError, OSError, zlib.error, lzma.LZMAError)
    found = Found()
    entries: dict[str, Entry] = {}  # a later member of the same name replaces the earlier one, as in unpacking
    with unpacked(path) as stream:
        packed = not isinstance(stream, io.BufferedReader)
        member = None
        try:
            tar = tarfile.open(fileobj=stream, mode="r:", encoding="utf-8", errors="surrogateescape")  # noqa: SIM115
        except damage as error:
            raise UserError(f"{path} is not a readable tar archive ({error}); make it again") from None
        try:
            while (member := tar.next()) is not None:
                tar.members.clear()  # pyright: ignore[reportAttributeAccessIssue]  # else it grows without end
                name = member.name.removeprefix("./")
                if reason := _unsafe(member):
                    found.skipped.append((name, reason))
                elif member.isfile() and is_image_name(name, found):
                    if member.size:  # tarfile notices a cut only at the next member
                        stream.seek(member.offset_data + member.size - 1)
                        if not stream.read(1):
                            raise EOFError
                    entries[name] = Entry(name, member.size, os.path.abspath(path), member.offset_data, packed)
            # tarfile also stops quietly at a cut between members or at a damaged header. A whole archive ends
            # in two blocks of zeros, the first of which has just been read.
            whole = stream.tell() == tar.offset + 512 and not any(stream.read(512))
            damaged_at = None if whole else "the end"
        except damage:
            damaged_at = member.name if member is not None else "the start"
        if damaged_at is not None:
            reason = f"archive is truncated or damaged at {damaged_at!r}, after {len(entries):,} images"
            found.skipped.append((os.path.basename(path), reason))
    found.entries = list(entries.values())
    return found


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
