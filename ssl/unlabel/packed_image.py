"""One image as it is packed: its central square at the packed size, with its hashes."""

import errno
import hashlib
from collections.abc import Callable
from typing import NamedTuple

from PIL import Image

from unlabel.decode import BrokenImage, decode_reduced, perceptual_hashes
from unlabel.stores import Changed, patiently

__all__ = ["UNREAD", "Packed", "pack_one"]

UNREAD = "cannot be read: "  # what the reason begins with where the file, not the image, was at fault
_HASHED = 160  # short side in pixels that a large JPEG may be decoded to before it is hashed
_LASTING = {errno.EACCES, errno.EPERM, errno.EIO, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.EINVAL}


class Packed(NamedTuple):
    pixels: bytes
    hash: bytes
    phashes: tuple[int, int]
    shape: tuple[int, int]


def pack_one(load: Callable[[], bytes], side: int, patient: bool = True) -> Packed | str:
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
        return f"{UNREAD}{error.strerror or error}"
    digest = hashlib.sha256(f"{shape[0]}x{shape[1]}".encode())
    digest.update(image.tobytes())
    small = fine.resize((side, side), Image.Resampling.BICUBIC, _square(fine), reducing_gap=3.0)
    return Packed(small.tobytes(), digest.digest(), perceptual_hashes(image, _square(image)), shape)


def _square(image: Image.Image) -> tuple[int, int, int, int]:
    """The central square: left, top, right, bottom."""
    short = min(image.size)
    left, top = ((n - short) // 2 for n in image.size)
    return left, top, left + short, top + short
