"""What a folder or a tar archive holds: images by name, size and place, and what had to be left out.

Nothing is unpacked to disk, and nothing outside the folder or the archive is reached by a name. A path with "://" is an
object in a store (stores.py).
"""

import contextlib
import errno
import functools
import io
import itertools
import os
import re
import stat
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import IO, TYPE_CHECKING, Any

from unlabel.errors import UserError
from unlabel.stores import REQUEST, Changed, Remote, State, file_state, is_url, load_range

if TYPE_CHECKING:
    import numpy as np

__all__ = [
    "MAX_BYTES",
    "UNLISTED",
    "Entries",
    "Entry",
    "Found",
    "Place",
    "is_image_name",
    "joined",
    "list_archive",
    "list_folder",
]
__all__ += ["too_large", "unpacked"]

_SUFFIX = re.compile(
    r"\.(jpe?g|jpe|jfif|jif|mpo|a?png|gif|bmp|dib|tiff?|webp|p[pgbn]m|pfm|jp2|j2k|jpx|avif|ico|hei[cf]|jxl)"
)
_NO_IMAGES = {"readme", "license", "licence", "copying", "changelog", "makefile", "md5sums", "sha256sums"}
_NO_DATA = {"thumbs.db", "desktop.ini", "__macosx"}
UNLISTED = (
    "folder cannot be opened",
    "archive is truncated or damaged",
)  # begin the reason where more than one is missing
MAX_BYTES = 1 << 30  # of a file: more than the pixels of any image that is read; a sparse file costs nothing to make
_KIND, _PLAIN = 0o170444, stat.S_IFREG | 0o444  # a file that all may read
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


@dataclass(frozen=True, slots=True, eq=False)
class Place:
    """Where the images of a listing lie: below a folder, in an archive (which then has a state), or in an array."""

    path: str = ""
    packed: bool = False
    archive: State | None = None
    pixels: "np.ndarray | None" = None  # (N, H, W) or (N, H, W, 3) uint8; an image's offset is its row
    paths: Sequence[str] | None = None  # of files that are not called as in the source; an offset is a row
    newest: int = 0  # ns: when the last of its files was changed, where that is known

    def entry(self, name: str, size: int, offset: int) -> Entry:
        if self.pixels is not None:
            return Entry(name, size, pixels=self.pixels[offset])
        if self.archive is None:
            return Entry(name, size, self.file(name, offset))
        return Entry(name, size, self.path, offset, self.packed, archive=self.archive)

    def file(self, name: str, offset: int) -> str:
        """The path of an image that is a file of its own."""
        return f"{self.path}/{name}" if self.paths is None else self.paths[offset]


class Entries(Sequence[Entry]):
    """The images of a listing or a source in columns: a million `Entry` would take 400 MB.

    `names` (N); `sizes` in bytes, `offsets` and `place`, a row of `places`: (N,) integers.
    """

    def __init__(
        self, places: list[Place], names: Sequence[str], sizes: Any, offsets: Any = None, place: Any = None
    ) -> None:
        import numpy as np

        self.places, self.names, self.sizes = places, names, np.asarray(sizes, np.int64)
        self.offsets = np.zeros(len(names), np.int64) if offsets is None else np.asarray(offsets, np.int64)
        self.place = np.zeros(len(names), np.int32) if place is None else np.asarray(place, np.int32)
        if not len(names) == len(self.sizes) == len(self.offsets) == len(self.place):
            raise ValueError(f"{len(names)} names, {len(self.sizes)} sizes, {len(self.offsets)} offsets")

    @classmethod
    def joined(cls, parts: "Sequence[Entries]") -> "Entries":
        """One after the other."""
        import numpy as np

        if len(parts) == 1:
            return parts[0]
        firsts = itertools.accumulate((len(part.places) for part in parts), initial=0)
        return cls(
            [place for part in parts for place in part.places],
            [name for part in parts for name in part.names],
            np.concatenate([part.sizes for part in parts]),
            np.concatenate([part.offsets for part in parts]),
            np.concatenate([part.place + first for part, first in zip(parts, firsts, strict=False)]),
        )

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, k: Any) -> Any:
        if isinstance(k, slice):
            return [self[i] for i in range(len(self))[k]]
        return self.places[self.place[k]].entry(self.names[int(k)], int(self.sizes[k]), int(self.offsets[k]))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence):
            return NotImplemented
        return len(self) == len(other) and all(a == b for a, b in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]  # as of a list


@dataclass
class Found:
    """What a folder or an archive holds."""

    entries: Entries = field(default_factory=lambda: Entries([], [], []))
    skipped: list[tuple[str, str]] = field(default_factory=list)  # (name, reason): never silently left out
    ignored: int = 0  # files that are no images, by their suffix


def joined(parts: Sequence[Found]) -> Found:
    """What several places hold, one after the other."""
    return Found(
        Entries.joined([part.entries for part in parts]),
        [line for part in parts for line in part.skipped],
        sum(part.ignored for part in parts),
    )


def is_image_name(path: str, found: Found) -> bool:
    """By name only. Hidden files do not count at all; other files that are no images are counted."""
    *folders, name = path.split("/")
    if _left_alone(name) or any(map(_left_alone, folders)):
        return False
    dot = name.rfind(".")
    if _is_image_suffix(name[dot:]) if 0 < dot < len(name) - 1 else name.lower() not in _NO_IMAGES:
        return True
    found.ignored += 1
    return False


def _left_alone(name: str) -> bool:
    return name.startswith(".") or name.lower() in _NO_DATA


@functools.lru_cache(1024)
def _is_image_suffix(suffix: str) -> bool:
    return bool(_SUFFIX.fullmatch(suffix.lower()))


def list_folder(root: str) -> Found:
    found, seen = Found(), set[str]()
    names, sizes, newest = list[str](), array("q"), 0
    suffixes = set[str]()  # of images, as they are written here
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
        inner: list[tuple[str, str]] = []
        here, bytes_of = list[str](), list[int]()  # no DirEntry is kept, which would keep all that was asked of it
        try:
            with os.scandir(folder) as children:
                for child in children:
                    name = child.name
                    suffix = name[name.rfind(".") :]
                    if suffix in suffixes and name[0] != ".":  # as most are: one question to the file system each
                        try:  # not contextlib.suppress, which would cost a tenth of it all
                            state = child.stat()
                            if state.st_mode & _KIND == _PLAIN and (size := state.st_size) <= MAX_BYTES:
                                here.append(prefix + name)
                                bytes_of.append(size)
                                newest = max(newest, state.st_mtime_ns)
                                continue
                        except OSError:
                            pass
                    if _left_alone(name):
                        continue
                    if _is_folder(child):
                        (links if child.is_symlink() else inner).append((child.path, f"{prefix}{name}/"))
                    elif is_image_name(name, found):
                        if isinstance(state := _state_or_why_not(child), os.stat_result):
                            suffixes |= {suffix} if suffix[0] == "." else set()
                            here.append(prefix + name)
                            bytes_of.append(state.st_size)
                            newest = max(newest, state.st_mtime_ns)
                        else:
                            found.skipped.append((prefix + name, state))
        except OSError as error:
            if not prefix:
                raise UserError(f"cannot open the folder {root}: {error.strerror}; check the permissions") from None
            found.skipped.append((prefix.rstrip("/"), f"{UNLISTED[0]}: {error.strerror}"))
        order = sorted(range(len(here)), key=here.__getitem__)
        names += map(here.__getitem__, order)
        sizes.extend(map(bytes_of.__getitem__, order))
        folders += sorted(inner, reverse=True)  # so that the names come nearly in order: sorting them all is quick
    found.entries = Entries([Place(os.path.abspath(root), newest=newest)], names, sizes)
    return found


def _is_folder(child: os.DirEntry[str]) -> bool:
    try:
        return child.is_dir()
    except OSError:  # a link to itself
        return False


def _state_or_why_not(child: os.DirEntry[str]) -> os.stat_result | str:
    """Of a file that can be read; else the reason why it cannot."""
    try:
        state = child.stat()
    except OSError:
        return "link to nowhere" if child.is_symlink() and not os.path.exists(child.path) else "not a regular file"
    if not stat.S_ISREG(state.st_mode):
        return "not a regular file"
    if state.st_mode & 0o444 != 0o444 and not os.access(child.path, os.R_OK):
        return "no permission to read it"
    return state if state.st_size <= MAX_BYTES else too_large(state.st_size)


@contextlib.contextmanager
def unpacked(path: str) -> Iterator[IO[bytes]]:
    """The archive's plain bytes, whatever compresses it (told by its first bytes, not by its name)."""
    import bz2
    import gzip
    import lzma

    with io.BufferedReader(Remote(path), REQUEST) if is_url(path) else open(path, "rb") as file:
        begin = file.read(10)  # of a plain archive: its first name, which may be BZ/1.jpg
        file.seek(0)
        kinds = {rb"\x1f\x8b": gzip.open, rb"BZh[1-9](1AY&SY|\x17rE8P\x90)": bz2.open, rb"\xfd7zXZ\x00": lzma.open}
        opener = next((kinds[magic] for magic in kinds if re.match(magic, begin)), None)
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
    members: dict[str, tuple[int, int]] = {}  # a later one of the same name replaces the earlier one, as in unpacking
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
                if reason := _unsafe_name(member.name):
                    found.skipped.append((name, reason))
                elif member.isdir() or not is_image_name(name, found):
                    continue
                elif reason := _no_file(member):
                    found.skipped.append((name, reason))
                else:
                    if member.size:  # tarfile notices a cut only at the next member
                        stream.seek(member.offset_data + member.size - 1)
                        if not stream.read(1):
                            raise EOFError
                    members[name] = (member.size, member.offset_data)
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
            reason = f"{UNLISTED[1]} at {damaged_at!r}, after {len(members):,} images"
            found.skipped.append((os.path.basename(path), reason))
    sizes, offsets = [size for size, _ in members.values()], [offset for _, offset in members.values()]
    found.entries = Entries([Place(place, packed, state)], list(members), sizes, offsets)
    return found


def too_large(size: int) -> str:
    return f"too large: {size / 1e9:,.1f} GB"


def _unsafe_name(name: str) -> str | None:
    """Why a tar member of this name is left alone, None if it may be read."""
    if name.startswith(("/", "\\")) or re.match(r"[A-Za-z]:[\\/]", name):
        return "absolute name"
    return "name that leaves the archive" if ".." in re.split(r"[\\/]", name) else None


def _no_file(member) -> str | None:
    """Why a tar member, which is called like an image, is none. `member` is a tarfile.TarInfo."""
    if member.issym() or member.islnk():
        return "link inside an archive, not followed"
    if member.issparse() or not member.isfile():
        return "not a regular file"
    return too_large(member.size) if member.size > MAX_BYTES else None


def portable_pixmap(pixels: "np.ndarray") -> bytes:
    """PGM or PPM file of (H, W) or (H, W, 3) uint8: pixels with a few bytes in front."""
    kind = "P5" if pixels.ndim == 2 else "P6"
    return f"{kind} {pixels.shape[1]} {pixels.shape[0]} 255\n".encode() + pixels.tobytes()
