"""Files on the disk or in an object store: what a change would change, and objects read by ranges, through fsspec.

fsspec comes with torch, and is imported for a path with "://" only; the library of the store itself may be missing.
"""

import contextlib
import io
import os
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

from unlabel.errors import UserError

__all__ = ["REQUEST", "Changed", "Missing", "Remote", "State", "file_state", "filesystem", "is_url", "load_range"]
__all__ += ["reaching"]

# Bytes of one request while headers are read: at some 20 ms and 100 MB/s a request, fewer do not make it faster.
REQUEST = 1 << 20
WAITS = (0.1, 0.5, 2.0)  # seconds before something is read once more
_CONFIRM_AFTER = 60.0  # seconds until an object in a store is asked again whether it is still the one that was listed
# What stores say about the version of an object, in their several spellings.
_VERSION = {"etag", "generation", "versionid", "md5hash", "content-md5", "digest", "blob_id", "mtime", "created"}
_VERSION |= {"lastmodified", "last-modified", "last_modified", "updated"}

State: TypeAlias = tuple[int, int | str]  # of a file: its size, and when it was modified in ns; in a store, its version


class Changed(OSError):
    """A file is no longer the one that was listed, so that what lies at an offset may be anything."""


class Missing(UserError):
    """There is nothing at a URL."""


def is_url(path: str) -> bool:
    return "://" in path


def filesystem(url: str) -> tuple[Any, str]:
    """fsspec's file system for `url`, and the path in it. Raises UserError, also where a library is missing."""
    try:
        from fsspec.core import url_to_fs

        return url_to_fs(url)
    except ImportError as error:
        raise UserError(f"cannot open {url} ({error}); install that library and try again") from None
    except ValueError as error:
        raise UserError(f"cannot open {url} ({error}); check what stands before ://") from None


@contextlib.contextmanager
def reaching(url: str) -> Iterator[None]:
    """Whatever a store's library raises, as a UserError: Missing where there is nothing."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # each library has errors of its own
        # fsspec calls all that goes wrong with a web address "not found", and keeps the cause.
        cause = error.__cause__ or error if isinstance(error, FileNotFoundError) else error
        if isinstance(cause, FileNotFoundError) or (cause is not error and "404" in str(cause)):
            raise Missing(f"there is nothing at {url}; check the address") from None
        reason = " ".join(f"{type(cause).__name__}: {cause}".split())
        raise UserError(f"cannot reach {url} ({reason}); check the address, the network and your credentials") from None


def file_state(path: str) -> State:
    """What a change of the file would change. Raises OSError, for a URL UserError."""
    if not is_url(path):
        stat = os.stat(path)
        return stat.st_size, stat.st_mtime_ns
    fs, key = filesystem(path)
    with reaching(path):
        info = fs.info(key)
    version = sorted((name, str(value)) for name, value in info.items() if name.lower() in _VERSION and value)
    return int(info.get("size") or 0), " ".join(f"{name}={value}" for name, value in version)


class Remote(io.RawIOBase):
    """An object in a store as a file, each read one request for a range."""

    def __init__(self, url: str) -> None:
        self.url, self.size, self.at = url, file_state(url)[0], 0
        self.fs, self.key = filesystem(url)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self.at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self.at, os.SEEK_END: self.size}[whence]
        return self.at

    def readinto(self, buffer: Any) -> int:
        count = max(0, min(len(buffer), self.size - self.at))
        if not count:
            return 0
        with reaching(self.url):
            data = self.fs.cat_file(self.key, start=self.at, end=self.at + count)
        if len(data) != count:
            raise UserError(
                f"{self.url} gave {len(data):,} bytes where {count:,} were asked for: it has just changed, or its "
                "server does not answer requests for a range; copy it to this machine"
            )
        buffer[:count] = data
        self.at += count
        return count


def patiently(load: Callable[[], bytes]) -> bytes:
    """What it gives; a store that does not answer, or a disk that fails, may do better a moment later."""
    for seconds in WAITS:
        try:
            return load()
        except OSError as error:
            if isinstance(error, Changed | FileNotFoundError | PermissionError):
                raise
            time.sleep(seconds)
    return load()


_confirmed: dict[str, float] = {}  # when an object in a store was last known to be the one that was listed


def load_range(url: str, size: int, offset: int, count: int, archive: State | None) -> bytes:
    """`count` bytes at `offset` of an object of `size` bytes, or of a member of such an `archive`. Raises OSError.

    That it is still the one that was listed is asked now and then.

    Asking each time would double the number of requests. An object is replaced as a whole, so that what is read in
    between is mostly no image at all, and images that are decoded anew are compared with their hashes.
    """
    part = archive is not None or count < size
    try:
        fs, key = filesystem(url)
        where = {"start": offset, "end": offset + count} if part else {}
        data = fs.cat_file(key, **where)  # by name: the order differs between stores
        if archive is not None and time.monotonic() - _confirmed.get(url, -1e9) > _CONFIRM_AFTER:
            fs.invalidate_cache()
            if file_state(url) != archive:
                data = b""
            else:
                _confirmed[url] = time.monotonic()
    except (FileNotFoundError, PermissionError, Changed):
        raise
    except Exception as error:  # each library has errors of its own, and numbers that mean something else
        raise OSError(" ".join(f"{type(error).__name__}: {error}".split())) from None
    if part and archive is None and len(data) == size:
        data = data[:count]  # a server that does not answer requests for a range
    if len(data) != count:
        raise Changed(f"{url} has changed since it was listed")
    return data
