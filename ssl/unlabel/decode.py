"""Bytes to RGB pixels, right for every kind of image, or a short reason why not."""

import functools
import io
import re

import numpy as np
from PIL import ExifTags, Image

from unlabel.sources import available_formats

__all__ = ["MAX_PIXELS", "BrokenImage", "decode", "perceptual_hashes"]

MAX_PIXELS = 100_000_000  # a few kilobytes can unpack to more than the memory
_MAGIC = (b"\xff\xd8", b"\x89PNG", b"GIF8", b"BM", b"II*\0", b"MM\0*", b"RIFF", b"P5", b"P6")
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class BrokenImage(ValueError):
    """The image cannot be decoded; the message is a short reason."""


def decode(data: bytes) -> Image.Image:
    """The image in `data` as RGB, upright by its EXIF orientation, on white where it is transparent.

    Of an animation the first frame; 16-bit grey by its high byte, rounded; floats from their minimum to their
    maximum. Raises BrokenImage rather than give pixels that are made up.
    """
    if not data:
        raise BrokenImage("empty file")
    if not any(data):
        raise BrokenImage("only zero bytes")
    try:
        image = Image.open(io.BytesIO(data), formats=_formats())
        if image.width * image.height > MAX_PIXELS:
            raise BrokenImage(f"too large: {image.width} x {image.height} pixels")
        if image.width * image.height == 0:
            raise BrokenImage("no pixels")
        image.load()
        rgb = _to_rgb(image)
    except BrokenImage:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise BrokenImage("too large: more pixels than a photo can have") from None
    except Image.UnidentifiedImageError:
        known = data.startswith(_MAGIC)
        raise BrokenImage("truncated or damaged header" if known else "not an image") from None
    except Exception as error:  # Pillow's plugins raise nearly anything on damaged data
        if "truncated" in str(error).lower() or isinstance(error, EOFError):
            raise BrokenImage("truncated") from None
        detail = re.sub(r"<.*?>|\s+", " ", str(error))[:80].strip()
        raise BrokenImage(f"damaged ({detail or type(error).__name__})") from None
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # damaged metadata of a good picture
        orientation = None
    return rgb.transpose(_TURNS[orientation]) if orientation in _TURNS else rgb


def perceptual_hashes(image: Image.Image, square: tuple[int, int, int, int]) -> tuple[int, int]:
    """64-bit hash of the region `square` and of its mirror image.

    The signs of the lowest 8x8 cosine coefficients of the region as 32x32 grey (Zauner 2010, "Implementation and
    benchmarking of perceptual image hash functions", with signs for the comparison to the median). A mirror
    turns the sign of each odd horizontal frequency.
    """
    # Shrink first: grey of a large photo costs as much as decoding it.
    small = image.resize((32, 32), Image.Resampling.BOX, square, reducing_gap=2.0).convert("L")
    basis = _cosines()
    coefficients = basis @ (np.asarray(small, np.float64) - 127.5) @ basis.T
    mirrored = coefficients * np.where(np.arange(8) % 2, -1, 1)
    first, second = (int.from_bytes(np.packbits(c > 0).tobytes(), "big") for c in (coefficients, mirrored))
    return first, second


@functools.cache
def _formats() -> list[str]:
    return available_formats()


@functools.cache
def _cosines() -> np.ndarray:
    """First 8 rows (8, 32) of the DCT-II of length 32."""
    return np.cos(np.pi / 32 * np.outer(np.arange(8), np.arange(32) + 0.5))


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F" or image.mode.startswith("I"):
        return _from_numbers(image)
    if image.mode == "La":  # premultiplied grey converts only this way
        image = image.convert("LA")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


def _from_numbers(image: Image.Image) -> Image.Image:
    """16-bit by 65535 = 255 * 257; other integers and floats, which have no given range, by their own."""
    values = np.asarray(image).astype(np.float64)
    if not np.isfinite(values).all():
        raise BrokenImage("not all values are numbers")
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        values = values / 257
    else:
        low, high = values.min(), values.max()
        values = (values - low) * (255 / (high - low or 1))
    return Image.fromarray(np.rint(values).astype(np.uint8)).convert("RGB")
