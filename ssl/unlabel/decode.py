"""Bytes to RGB pixels, right for every kind of image, or a short reason why not."""

import functools
import io
import re

import numpy as np
from PIL import ExifTags, Image, ImageChops

from unlabel.sources import available_formats

__all__ = ["MAX_PIXELS", "BrokenImage", "decode", "decode_reduced", "perceptual_hashes"]

MAX_PIXELS = 100_000_000  # a few kilobytes can unpack to more than the memory
_MAGIC = re.compile(
    rb"\xff\xd8\xff|\x89PNG|GIF8|BM|II[*+]\x00|MM\x00[*+]|RIFF....WEBP|P[1-6f]\s|\x00\x00\x01\x00"
    rb"|....(jP  |ftypavi[fs])|\xff\x4f\xff\x51",
    re.DOTALL,
)
_UNREAD = re.compile(rb"....ftyp(hei|hev|mif1|msf1)|\xff\x0a|....JXL ", re.DOTALL)
_MIRRORED = np.array([[1] * 8, [1, -1] * 4])[:, None]  # signs of the horizontal frequencies, and of their mirror's
_BLOCK = 1 << 22  # pixels of an image of numbers that are worked on at once
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
    maximum. Raises BrokenImage rather than give pixels that are made up, such as the flat colour that completes a
    JPEG whose data end early.
    """
    return decode_reduced(data, None)[1]


def decode_reduced(data: bytes, at_least: int | None) -> tuple[tuple[int, int], Image.Image]:
    """Width and height of the image in `data`, and itself as `decode` gives it, a large JPEG smaller than it is.

    At a half or a quarter of its size, as long as its short side keeps `at_least` pixels: only the lower cosines of
    each block are summed up, which is quicker, and as smooth as shrinking the whole.
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
        deep = bool(image.tile) and image.tile[0][3] == "RGB;16B"
        shape, jpeg = image.size, image.format in ("JPEG", "MPO")
        reduced = next((n for n in (4, 2) if min(shape) // n >= at_least), 1) if jpeg and at_least else 1
        if reduced > 1:
            image.draft(None, (shape[0] // reduced, shape[1] // reduced))  # pyright: ignore[reportArgumentType]
        image.load()
        if jpeg and _is_cut(image, data, reduced):
            raise BrokenImage("truncated")
        if deep and isinstance(key := image.info.get("transparency"), tuple):
            image.info["transparency"] = tuple(value >> 8 for value in key)  # as the pixels were
        rgb = _to_rgb(image)
    except BrokenImage:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise BrokenImage("too large: more pixels than a photo can have") from None
    except Image.UnidentifiedImageError:
        if _UNREAD.match(data):
            raise BrokenImage("HEIC or JPEG XL, which are not read: save it as JPEG or PNG") from None
        known = _MAGIC.match(data)
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
    turned = rgb.transpose(_TURNS[orientation]) if orientation in _TURNS else rgb
    width, height = shape
    return ((height, width) if orientation in _TURNS and orientation >= 5 else (width, height)), turned


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
    bits = np.packbits(_MIRRORED * coefficients > 0).tobytes()
    return int.from_bytes(bits[:8], "big"), int.from_bytes(bits[8:], "big")


@functools.cache
def _formats() -> list[str]:
    return available_formats()


@functools.cache
def _cosines() -> np.ndarray:
    """First 8 rows (8, 32) of the DCT-II of length 32."""
    return np.cos(np.pi / 32 * np.outer(np.arange(8), np.arange(32) + 0.5))


def _is_cut(image: Image.Image, data: bytes, reduced: int) -> bool:
    """Whether a JPEG has an end marker before its picture is whole.

    libjpeg completes such a picture without an error, with the last colour or with grey.
    """
    at, frame = 2, 0
    while data[at : at + 1] == b"\xff" and data[at + 1] != 0xDA:
        if data[at + 1] == 0xFF:  # filling
            at += 1
            continue
        if 0xC0 <= data[at + 1] <= 0xCF and data[at + 1] not in (0xC4, 0xC8, 0xCC):
            frame = at
        at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    if not frame or data[at : at + 2] != b"\xff\xda":
        return False
    components, sequential, count = data[frame + 9], data[frame + 1] in (0xC0, 0xC1), data[at + 4]
    # Nearly all are one scan of everything; of those nearly none ends in one colour, and no more need be asked.
    alone = sequential and count == components and data[at + 5 + 2 * count : at + 8 + 2 * count] == b"\x00\x3f\x00"
    factors = [divmod(data[frame + 11 + 3 * k], 16) for k in range(components)]
    # Colour that is enlarged to the size of the grey mixes with the block before; reduced alike in width and height,
    # it need not be enlarged when the whole is reduced.
    mixed = reduced == 1 or any(w * factors[0][1] != h * factors[0][0] for w, h in factors)
    if alone and not _ends_flat(image, 8 // reduced, int(mixed)):
        return False
    end = data.find(b"\xff\xd9", at)
    if end < 0:
        return False
    if not alone and _lacks_scans(data, at, end, components):
        return True
    # A whole picture does not depend on what follows its last bit, and one that is completed does. To decode twice
    # more, be it at an eighth of the size, is worth it only where the picture ends in one colour. (Arithmetic coding
    # may leave out its last bits, and is not looked at.)
    if not sequential or not (alone or _ends_flat(image, 8 // reduced, int(mixed))):
        return False
    first, second = (_eighth(data[:end] + more + b"\xff\xd9") for more in (b"", bytes(range(7, 247, 3))))
    return ImageChops.difference(first, second).getbbox() is not None


def _lacks_scans(data: bytes, at: int, end: int, components: int) -> bool:
    """Whether a component has no scan, or one of the scans that would complete a coefficient is missing."""
    lacking: dict[tuple[int, int], int] = {}  # (component, coefficient) -> bits that are still to come
    while 0 <= at < end:
        count = data[at + 4]
        first, last, bits = data[at + 5 + 2 * count : at + 8 + 2 * count]
        for k in range(count):
            lacking |= dict.fromkeys(((data[at + 5 + 2 * k], i) for i in range(first, last + 1)), bits & 15)
        at = data.find(b"\xff\xda", at + 2, end)
    return any(lacking.values()) or sum(i == 0 for _, i in lacking) < components or all(i == 0 for _, i in lacking)


def _ends_flat(image: Image.Image, block: int, margin: int) -> bool:
    """Whether the last `block` x `block` pixels, but for the first `margin` rows and columns, are of one colour."""
    left, top = ((n - 1) // block * block + min(margin, (n - 1) % block) for n in image.size)
    return image.crop((left, top, *image.size)).getcolors(1) is not None


def _eighth(data: bytes) -> Image.Image:
    from PIL.JpegImagePlugin import JpegImageFile

    with JpegImageFile(io.BytesIO(data)) as image:
        image.draft(image.mode, (max(1, image.width // 8), max(1, image.height // 8)))
        image.load()
        return image.copy()


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
    values = np.asarray(image)
    low, high = float(values.min()), float(values.max())
    if not np.isfinite([low, high]).all():  # a NaN anywhere makes both one
        raise BrokenImage("not all values are numbers")
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        low, high = 0.0, 65535.0
    tags = getattr(image, "tag_v2", {})
    if tags.get(ExifTags.Base.BitsPerSample) == (12,):
        low, high = 0.0, 4095.0
    if tags.get(ExifTags.Base.PhotometricInterpretation) == 0:  # 0 is white
        low, high = high, low
    key = image.info.get("transparency") if image.format == "PNG" else None
    out, rows = np.empty(values.shape, np.uint8), max(1, _BLOCK // values.shape[1])
    for top in range(0, len(values), rows):  # in parts: eight bytes each of a hundred million would be much
        part = values[top : top + rows]
        scaled = (part.astype(np.float64) - low) * (255 / (high - low or 1))
        out[top : top + rows] = np.rint(scaled).clip(0, 255)
        if isinstance(key, int):
            out[top : top + rows][part == key] = 255
    return Image.fromarray(out).convert("RGB")
