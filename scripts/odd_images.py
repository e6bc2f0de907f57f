"""A folder of broken and odd images, each with the picture that must be read or the reason that must be given.

    python scripts/odd_images.py FOLDER

writes `images/` (a tree), `archives/` (tars) and `expected.json`, what a reader must make of each. The same bytes each
time. What this Pillow, file system or user cannot write is named and left out. For tests: `write_corpus(folder)`.
"""

from __future__ import annotations

import argparse
import contextlib
import gzip
import io
import json
import os
import random
import stat
import struct
import sys
import tarfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, features

__all__ = ["Case", "write_corpus"]


@dataclass(frozen=True)
class Case:
    """What a reader must make of one file, or of one member of an archive.

    With `size` it may be read, and then `points` (x, y, (r, g, b)) hold within `tolerance`. With `reason`, a regular
    expression, it may be listed as skipped for that reason. With both, either is right; with neither it does not
    count as an image at all. A `name` of "" stands for the whole `source`, which must be refused for the reason.
    """

    kind: str
    source: str
    name: str
    size: tuple[int, int] | None = None
    points: tuple[tuple[int, int, tuple[int, int, int]], ...] = ()
    tolerance: int = 0
    reason: str = ""


class Corpus:
    """Collects cases while their files are written below `folder`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.cases: list[Case] = []
        self.left_out: list[tuple[str, str]] = []  # (kind, why)

    def add(
        self, kind: str, name: str, data: bytes | None, right: np.ndarray | None = None, tolerance: int = 0,
        reason: str = "", source: str = "images",
    ) -> None:  # fmt: skip
        """`right` is the picture (H, W, 3) that must be read. `data` None: the file is there already."""
        if data is not None:
            path = self.folder / source / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        size, points = None, []
        if right is not None:
            height, width = right.shape[:2]
            size = (width, height)
            places = [(x * width // 4, y * height // 4) for y in (1, 3) for x in (1, 3)] + [(width - 1, height - 1)]
            for x, y in dict.fromkeys(places):
                red, green, blue = map(int, right[y, x])
                points.append((x, y, (red, green, blue)))
        self.cases.append(Case(kind, source, name, size, tuple(points), tolerance, reason))

    @contextlib.contextmanager
    def attempt(self, kind: str) -> Iterator[None]:
        """Around what not every Pillow, file system or user can do."""
        try:
            yield
        except Exception as error:  # Pillow raises nearly anything for a format that it was built without
            self.left_out.append((kind, str(error) or type(error).__name__))


def write_corpus(folder: Path) -> list[Case]:
    """Write everything into `folder`, which must not hold a corpus yet; the cases in the order of writing."""
    corpus = Corpus(Path(folder))
    parts = (_jpeg, _cmyk, _png, _tiff, _other_formats, _animations, _orientations, _shapes)
    for part in (*parts, _truncated, _damaged, _bombs, _not_images, _names, _places, _archives):
        part(corpus)
    text = json.dumps([asdict(case) for case in corpus.cases], indent=1)
    (corpus.folder / "expected.json").write_text(text + "\n")
    for kind, why in corpus.left_out:
        print(f"left out: {kind} ({why})", file=sys.stderr)
    return corpus.cases


# ---------------------------------------------------------------- pictures and encoders


def quadrants() -> np.ndarray:
    """(32, 32, 3): four colours, so that any turn, mirror, inversion or mixed-up channel shows."""
    picture = np.zeros((32, 32, 3), np.uint8)
    picture[:16, :16], picture[:16, 16:] = (220, 40, 30), (40, 180, 60)
    picture[16:, :16], picture[16:, 16:] = (30, 60, 200), (230, 210, 40)
    return picture


def smooth() -> np.ndarray:
    """(32, 32, 3) with detail everywhere, so that no part can be missing unseen, yet near the same in lossy formats."""
    small = np.random.default_rng(0).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(small).resize((32, 32), Image.Resampling.BICUBIC))


def grey(picture: np.ndarray) -> np.ndarray:
    """One channel as three."""
    return picture[:, :, :1].repeat(3, 2)


def saved(image: Image.Image | np.ndarray, kind: str, **options: Any) -> bytes:
    image = Image.fromarray(np.ascontiguousarray(image)) if isinstance(image, np.ndarray) else image
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(rows: list[bytes], width: int, height: int, depth: int, colour: int, extra: bytes = b"", adam7=False) -> bytes:
    """PNG of unfiltered rows of packed samples; `extra` are chunks before the pixels."""
    head = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, int(adam7))
    body = chunk(b"IDAT", zlib.compress(b"".join(b"\0" + row for row in rows)))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + extra + body + chunk(b"IEND", b"")


def png_of(samples: np.ndarray, depth: int, colour: int, extra: bytes = b"") -> bytes:
    """PNG of whole samples (H, W, …), 8 or 16 bits each."""
    rows = [row.astype(">u2" if depth == 16 else "u1").tobytes() for row in samples]
    return png(rows, samples.shape[1], samples.shape[0], depth, colour, extra)


def tiff(tags: dict[int, tuple[int, list[int]]], pixels: bytes, order: str = "<", next_ifd: int = 0) -> bytes:
    """TIFF with `pixels` at byte 8 and its directory behind them. A tag is (3 for 16 bits or 4 for 32, values)."""
    at = 8 + len(pixels) + len(pixels) % 2
    behind, entries = at + 2 + 12 * len(tags) + 4, b""
    values = b""
    for tag, (kind, numbers) in sorted(tags.items()):
        packed = struct.pack(f"{order}{len(numbers)}{'H' if kind == 3 else 'I'}", *numbers)
        place = packed.ljust(4, b"\0") if len(packed) <= 4 else struct.pack(f"{order}I", behind + len(values))
        values += packed if len(packed) > 4 else b""
        entries += struct.pack(f"{order}HHI", tag, kind, len(numbers)) + place
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}I", at)
    directory = struct.pack(f"{order}H", len(tags)) + entries + struct.pack(f"{order}I", next_ifd) + values
    return head + pixels.ljust(at - 8, b"\0") + directory


def grey_tags(width: int, height: int, bits: int, size: int, white_is_zero: bool = False) -> dict:
    """The tags of an uncompressed grey TIFF in one strip of `size` bytes."""
    numbers = {256: width, 257: height, 258: bits, 259: 1, 262: 0 if white_is_zero else 1, 273: 8, 277: 1, 278: height}
    return {tag: (4, [value]) for tag, value in (numbers | {279: size}).items()}


def icon(inner: bytes) -> bytes:
    return struct.pack("<HHH", 0, 1, 1) + struct.pack("<BBBBHHII", 32, 32, 0, 0, 1, 32, len(inner), 22) + inner


def at_marker(data: bytes, marker: int) -> int:
    """Where a JPEG's first segment of this kind begins."""
    at = 2
    while data[at + 1] != marker:
        at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    return at


def headers_only(jpeg: bytes, width: int, height: int) -> bytes:
    """A JPEG whose scan ends as soon as it begins, said to have that size."""
    scan = at_marker(jpeg, 0xDA)
    data = bytearray(jpeg[: scan + 2 + int.from_bytes(jpeg[scan + 2 : scan + 4], "big")] + b"\xff\xd9")
    frame = at_marker(jpeg, 0xC0)
    data[frame + 5 : frame + 9] = struct.pack(">HH", height, width)
    return bytes(data)


# ---------------------------------------------------------------- odd, but to be read


def _jpeg(c: Corpus) -> None:
    q = quadrants()
    plain = saved(q, "JPEG", quality=95, subsampling=0)
    c.add("JPEG", "jpeg/plain.jpg", plain, q, 4)
    c.add("progressive JPEG", "jpeg/progressive.jpg", saved(q, "JPEG", quality=95, progressive=True), q, 4)
    c.add("JPEG with coarse colour", "jpeg/420.jpg", saved(q, "JPEG", quality=95, subsampling=2), q, 4)
    c.add("JPEG with restart markers", "jpeg/restart.jpg", saved(q, "JPEG", quality=95, restart_marker_blocks=1), q, 4)
    c.add("grey JPEG", "jpeg/grey.jpg", saved(q[:, :, 0], "JPEG", quality=95), grey(q), 4)
    with c.attempt("JPEG that stores RGB"):
        c.add("JPEG that stores RGB", "jpeg/rgb.jpg", saved(q, "JPEG", quality=95, keep_rgb=True), q, 4)
    c.add("JPEG with garbage behind it", "jpeg/trailing.jpg", plain + bytes(range(256)) * 40, q, 4)
    exif = Image.Exif()
    exif.get_ifd(0x8769)[0x9286] = "comment"
    thumbnail = saved(np.full((8, 8, 3), 128, np.uint8), "JPEG")
    note = b"\xff\xed" + struct.pack(">H", 2 + len(thumbnail)) + thumbnail
    c.add("JPEG with a grey thumbnail inside", "jpeg/thumbnail.jpg", plain[:2] + note + plain[2:], q, 4)
    c.add("JPEG with a second JPEG behind it", "jpeg/second.jpg", plain + thumbnail, q, 4)
    profile = saved(q, "JPEG", quality=95, subsampling=0, icc_profile=b"this is no colour profile" * 9)
    c.add("JPEG with a bad colour profile", "jpeg/bad_icc.jpg", profile, q, 4)
    c.add(
        "JPEG with damaged EXIF", "jpeg/bad_exif.jpg", saved(q, "JPEG", quality=95, exif=b"Exif\0\0II*\0\xff\xff"), q, 4
    )
    with c.attempt("MPO"):
        other = Image.fromarray(np.full((32, 32, 3), 128, np.uint8))
        pair = saved(q, "MPO", quality=95, subsampling=0, save_all=True, append_images=[other])
        c.add("MPO, two pictures in one", "jpeg/pair.mpo", pair, q, 4)
        c.add("MPO, by the name of a JPEG", "jpeg/pair.jpg", pair, q, 4)
    white = q.copy()
    white[16:] = 255  # a flat lower half is no missing half
    for name, options in {
        "flat": {},
        "flat_progressive": {"progressive": True},
        "flat_420": {"subsampling": 2},
    }.items():
        data = saved(white, "JPEG", **({"quality": 95, "subsampling": 0} | options))
        c.add("JPEG with a white lower half", f"jpeg/{name}.jpg", data, white, 4)
    c.left_out.append(("arithmetic-coded and 12-bit JPEG that can be read", "Pillow cannot write them"))


def _cmyk(c: Corpus) -> None:
    """Ink (c, m, y, k); Adobe's JPEGs, that is all that are found, hold 255 minus that."""
    q = quadrants()
    ink = np.concatenate([255 - q, np.full((32, 32, 1), 60, np.uint8)], 2)
    right = np.rint(q / 255 * (255 - 60)).astype(np.uint8)
    image = Image.fromarray(ink, "CMYK")
    adobe = saved(image, "JPEG", quality=98, subsampling=0)
    c.add("Adobe's inverted CMYK JPEG", "cmyk/adobe.jpg", adobe, right, 6)
    at = at_marker(adobe, 0xEE)
    bare = adobe[:at] + adobe[at + 2 + int.from_bytes(adobe[at + 2 : at + 4], "big") :]
    c.add("CMYK JPEG without Adobe's marker, as browsers show it", "cmyk/bare.jpg", bare, right, 6)
    # YCCK: what is stored is (Y, Cb, Cr) of the first three inks, and 255 - k; Pillow inverts what it is given.
    ycc = np.asarray(Image.fromarray(255 - q).convert("YCbCr"))
    stored = np.concatenate([ycc, np.full((32, 32, 1), 255 - 60, np.uint8)], 2)
    ycck = bytearray(saved(Image.fromarray(255 - stored, "CMYK"), "JPEG", quality=98, subsampling=0))
    ycck[at_marker(bytes(ycck), 0xEE) + 15] = 2  # the transform: YCCK
    c.add("YCCK JPEG", "cmyk/ycck.jpg", bytes(ycck), right, 8)
    c.add("CMYK TIFF, not inverted", "cmyk/plain.tif", saved(image, "TIFF"), right, 2)


def _png(c: Corpus) -> None:
    q, g = quadrants(), quadrants()[:, :, 0]
    c.add("PNG", "png/plain.png", saved(q, "PNG"), q)
    rows = []
    for x, y, dx, dy in (
        (0, 0, 8, 8),
        (4, 0, 8, 8),
        (0, 4, 4, 8),
        (2, 0, 4, 4),
        (0, 2, 2, 4),
        (1, 0, 2, 2),
        (0, 1, 1, 2),
    ):
        rows += [row.tobytes() for row in np.ascontiguousarray(q[y::dy, x::dx])]
    c.add("interlaced PNG", "png/adam7.png", png(rows, 32, 32, 8, 2, adam7=True), q)
    for depth in (1, 2, 4):
        levels = g >> (8 - depth)
        bits = (levels[:, :, None] >> np.arange(depth - 1, -1, -1)) & 1
        data = png([np.packbits(row).tobytes() for row in bits], 32, 32, depth, 0)
        right = grey((levels * (255 // (2**depth - 1)))[:, :, None].astype(np.uint8))
        c.add(f"{depth}-bit grey PNG", f"png/grey{depth}.png", data, right)
    deep = g.astype(np.uint16) * 257
    c.add("16-bit grey PNG", "png/grey16.png", png_of(deep, 16, 0), grey(q))
    dark = np.full((32, 32), 514, np.uint16)
    c.add("16-bit grey PNG that is nearly black", "png/dark16.png", png_of(dark, 16, 0), np.full((32, 32, 3), 2))
    c.add("16-bit colour PNG", "png/rgb16.png", png_of(q.astype(np.uint16) * 257, 16, 2), q, 1)
    on_white = q.copy()
    on_white[16:] = 255
    alpha = np.full((32, 32, 1), 255, np.uint8)
    alpha[16:] = 0
    half = (q.astype(int) + 255 + 1) // 2
    c.add("PNG with alpha", "png/rgba.png", saved(np.concatenate([q, alpha], 2), "PNG"), on_white)
    c.add(
        "PNG that is half transparent", "png/half.png", saved(np.concatenate([q, alpha * 0 + 127], 2), "PNG"), half, 2
    )
    rgba16 = np.concatenate([q, alpha], 2).astype(np.uint16) * 257
    c.add("16-bit PNG with alpha", "png/rgba16.png", png_of(rgba16, 16, 6), on_white, 1)
    la = np.concatenate([q[:, :, :1], alpha], 2)
    c.add("grey PNG with alpha", "png/la.png", png_of(la, 8, 4), grey(on_white))
    c.add("16-bit grey PNG with alpha", "png/la16.png", png_of(la.astype(np.uint16) * 257, 16, 4), grey(on_white), 1)
    colours = np.unique(q.reshape(-1, 3), axis=0)
    index = (q[:, :, None] == colours).all(3).argmax(2)
    palette = chunk(b"PLTE", colours.astype(np.uint8).tobytes())
    c.add("palette PNG", "png/palette.png", png_of(index, 8, 3, palette), q)
    see_through = [0 if (colours[k] == q[-1, -1]).all() else 255 for k in range(4)]
    right = q.copy()
    right[16:, 16:] = 255
    keyed = png_of(index, 8, 3, palette + chunk(b"tRNS", bytes(see_through)))
    c.add("palette PNG with transparency", "png/palette_trns.png", keyed, right)
    bits = np.packbits(((index[:, :, None] >> np.array([1, 0])) & 1).reshape(32, -1), axis=1)
    small = png([row.tobytes() for row in bits], 32, 32, 2, 3, palette + chunk(b"tRNS", bytes(see_through)))
    c.add("2-bit palette PNG with transparency", "png/palette2_trns.png", small, right)
    colour = [int(v) for v in q[-1, -1]]
    key = chunk(b"tRNS", struct.pack(">HHH", *colour))
    c.add("PNG with a transparent colour", "png/rgb_trns.png", png_of(q, 8, 2, key), right)
    key = chunk(b"tRNS", struct.pack(">HHH", *(256 * v + 7 for v in colour)))
    deep_key = png_of(q.astype(np.uint16) * 256 + 7, 16, 2, key)
    c.add("16-bit PNG with a transparent colour", "png/rgb16_trns.png", deep_key, right, 1)
    key = chunk(b"tRNS", struct.pack(">H", 257 * colour[0]))
    c.add("16-bit grey PNG with a transparent grey", "png/grey16_trns.png", png_of(deep, 16, 0, key), grey(right))
    c.add("PNG with a bad colour profile", "png/bad_icc.png", png_of(q, 8, 2, chunk(b"iCCP", b"x\0\0not deflated")), q)
    c.add("PNG with an unknown chunk", "png/unknown.png", png_of(q, 8, 2, chunk(b"quXq", bytes(5000))), q)
    c.add("PNG with garbage behind it", "png/trailing.png", saved(q, "PNG") + bytes(range(256)) * 40, q)
    c.add("PNG without its end chunk", "png/no_iend.png", saved(q, "PNG")[:-12], q, reason="truncated")


def _tiff(c: Corpus) -> None:
    q, g = quadrants(), quadrants()[:, :, 0]
    for compression in ("tiff_lzw", "tiff_adobe_deflate", "packbits"):
        with c.attempt(f"TIFF with {compression}"):
            c.add(f"TIFF, {compression}", f"tiff/{compression}.tif", saved(q, "TIFF", compression=compression), q)
    with c.attempt("TIFF that stores YCbCr as JPEG"):
        data = saved(Image.fromarray(q).convert("YCbCr"), "TIFF", compression="jpeg", quality=95)
        c.add("TIFF that stores YCbCr as JPEG", "tiff/ycbcr.tif", data, q, 6)
    with c.attempt("one-bit fax TIFF"):
        fax = saved(Image.fromarray(g > 128), "TIFF", compression="group4")
        c.add("one-bit fax TIFF", "tiff/group4.tif", fax, grey(255 * (g > 128)[:, :, None]))
    pages = [Image.fromarray(q), Image.new("RGB", (32, 32), (128, 128, 128))]
    c.add("TIFF of two pages", "tiff/pages.tif", saved(pages[0], "TIFF", save_all=True, append_images=pages[1:]), q)
    with c.attempt("BigTIFF"):
        c.add("BigTIFF", "tiff/big.tif", saved(q, "TIFF", big_tiff=True), q)
    deep = g.astype(np.uint16) * 257
    for order, name in (("<", "little"), (">", "big")):
        pixels = deep.astype(f"{order}u2").tobytes()
        data = tiff(grey_tags(32, 32, 16, len(pixels)), pixels, order)
        c.add(f"16-bit {name}-endian TIFF", f"tiff/grey16_{name}.tif", data, grey(q))
    pixels = (65535 - deep).astype("<u2").tobytes()
    data = tiff(grey_tags(32, 32, 16, len(pixels), white_is_zero=True), pixels)
    c.add("16-bit TIFF where 0 is white", "tiff/grey16_white0.tif", data, grey(q))
    data = tiff(grey_tags(32, 32, 8, 1024, white_is_zero=True), (255 - g).tobytes())
    c.add("8-bit TIFF where 0 is white", "tiff/grey8_white0.tif", data, grey(q))
    twelve = np.rint(g / 255 * 4095).astype(np.uint16).reshape(-1, 2)
    packed = np.stack([twelve[:, 0] >> 4, (twelve[:, 0] & 15) << 4 | twelve[:, 1] >> 8, twelve[:, 1] & 255], 1)
    data = tiff(grey_tags(32, 32, 12, 1536), packed.astype(np.uint8).tobytes())
    c.add("12-bit TIFF", "tiff/grey12.tif", data, grey(q), 1)
    tiles = b"".join(g[y : y + 16, x : x + 16].tobytes() for y in (0, 16) for x in (0, 16))
    tags = grey_tags(32, 32, 8, 1024)
    tags = {k: v for k, v in tags.items() if k not in (273, 278, 279)}
    tags |= {322: (4, [16]), 323: (4, [16]), 324: (4, [8, 264, 520, 776]), 325: (4, [256] * 4)}
    c.add("tiled TIFF", "tiff/tiled.tif", tiff(tags, tiles), grey(q))
    real = (g.astype(np.float32) - 100) / 7
    low, high = float(real.min()), float(real.max())
    ranged = np.rint((real - low) / (high - low) * 255).astype(np.uint8)
    c.add("float TIFF, by its own range", "tiff/float.tif", saved(real, "TIFF"), grey(ranged[:, :, None]))
    hole = real.copy()
    hole[3, 3] = np.nan
    c.add("float TIFF with a NaN", "tiff/nan.tif", saved(hole, "TIFF"), reason="not all values are numbers")
    c.add("float TIFF that is flat", "tiff/flat.tif", saved(real * 0 + 7, "TIFF"), np.zeros((32, 32, 3)))
    with c.attempt("LAB TIFF"):
        lab = Image.new("LAB", (32, 32), (136, 208, 195))
        data = saved(lab, "TIFF")  # L* 53, a* 80, b* 67: sRGB red
        c.add("LAB TIFF", "tiff/lab.tif", data, np.full((32, 32, 3), (255, 0, 0)), 12)
    pixels = g.tobytes()
    loop = tiff(grey_tags(32, 32, 8, 1024), pixels, next_ifd=8 + len(pixels))
    c.add("TIFF whose directories form a loop", "tiff/loop.tif", loop, grey(q))
    many = {k: (4, [0]) for k in range(30_000, 65_000)} | grey_tags(32, 32, 8, 1024)
    c.add("TIFF with 35,000 tags", "tiff/many_tags.tif", tiff(many, pixels), grey(q), reason=".")
    endless = bytearray(tiff(grey_tags(32, 32, 8, 1024), pixels))
    endless[8 + 1024 + 2 + 4 : 8 + 1024 + 2 + 8] = b"\xff\xff\xff\x7f"  # the count of the first tag
    c.add(
        "TIFF with a tag of two billion values", "tiff/huge_tag.tif", bytes(endless), reason="header|damaged|truncated"
    )


def _other_formats(c: Corpus) -> None:
    q, g = quadrants(), quadrants()[:, :, 0]
    alpha = np.full((32, 32, 1), 255, np.uint8)
    alpha[16:] = 0
    rgba = np.concatenate([q, alpha], 2)
    on_white = q.copy()
    on_white[16:] = 255
    with c.attempt("WebP"):
        c.add("lossy WebP", "webp/lossy.webp", saved(q, "WEBP", quality=95), q, 12)
        c.add("lossless WebP", "webp/lossless.webp", saved(q, "WEBP", lossless=True), q)
        data = saved(rgba, "WEBP", lossless=True, exact=True)
        c.add("lossless WebP with alpha", "webp/alpha.webp", data, on_white)
    with c.attempt("JPEG 2000"):
        c.add("JPEG 2000", "jp2/plain.jp2", saved(q, "JPEG2000"), q, 2)
        c.add("JPEG 2000 with alpha", "jp2/alpha.jp2", saved(rgba, "JPEG2000"), on_white, 2)
        c.add("JPEG 2000 without its box", "jp2/plain.j2k", saved(q, "JPEG2000", no_jp2=True), q, 2)
        c.add("16-bit JPEG 2000", "jp2/grey16.jp2", saved(g.astype(np.uint16) * 257, "JPEG2000"), grey(q), 1)
    with c.attempt("AVIF"):
        if not features.check("avif"):
            raise OSError("this Pillow has no AVIF")
        c.add("AVIF", "avif/plain.avif", saved(q, "AVIF", quality=95, subsampling="4:4:4"), q, 12)
        c.add("AVIF with alpha", "avif/alpha.avif", saved(rgba, "AVIF", quality=95, subsampling="4:4:4"), on_white, 12)
    c.add("BMP", "bmp/plain.bmp", saved(q, "BMP"), q)
    c.add("1-bit BMP", "bmp/one.bmp", saved(Image.fromarray(g > 128), "BMP"), grey(255 * (g > 128)[:, :, None]))

    def bmp(
        pixels: bytes, height: int, bits: int, compression: int = 0, behind: bytes = b"", colours: int = 0
    ) -> bytes:
        start = 54 + len(behind)
        head = struct.pack("<IiiHHIIiiII", 40, 32, height, 1, bits, compression, len(pixels), 2835, 2835, colours, 0)
        return b"BM" + struct.pack("<IHHI", start + len(pixels), 0, 0, start) + head + behind + pixels

    c.add("BMP from the top down", "bmp/top_down.bmp", bmp(q[:, :, ::-1].tobytes(), -32, 24), q)
    five = (q[::-1].astype(np.uint16) >> 3) @ np.array([1 << 10, 1 << 5, 1], np.uint16)
    right = np.rint((q >> 3) * (255 / 31)).astype(np.uint8)
    c.add("16-bit BMP", "bmp/rgb555.bmp", bmp(five.astype("<u2").tobytes(), 32, 16), right, 8)
    ramp = b"".join(bytes([k, k, k, 0]) for k in range(256))
    runs = b"".join(bytes([16, row[0], 16, row[16], 0, 0]) for row in g[::-1]) + b"\0\1"
    c.add("BMP in runs (RLE8)", "bmp/rle8.bmp", bmp(runs, 32, 8, 1, ramp, 256), grey(q))
    c.add("BMP in runs that end early", "bmp/rle8_short.bmp", bmp(runs[:60], 32, 8, 1, ramp, 256), reason=".")
    with c.attempt("ICO"):
        c.add("ICO", "bmp/icon.ico", saved(rgba, "ICO", sizes=[(32, 32)]), on_white)
        c.add(
            "ICO that holds a BMP",
            "bmp/icon_bmp.ico",
            saved(rgba, "ICO", sizes=[(32, 32)], bitmap_format="bmp"),
            on_white,
        )
    c.add("PPM", "ppm/plain.ppm", saved(q, "PPM"), q)
    deep = b"P5 32 32 65535\n" + (g.astype(">u2") * 257).astype(">u2").tobytes()
    c.add("16-bit PGM", "ppm/grey16.pgm", deep, grey(q))
    c.add(
        "16-bit PPM", "ppm/rgb16.ppm", b"P6 32 32 65535\n" + (q.astype(np.uint16) * 257).astype(">u2").tobytes(), q, 1
    )
    text = "P1\n# a comment\n32 32\n" + "\n".join("".join("01"[int(v < 128)] for v in row) for row in g)
    c.add("PBM in letters", "ppm/letters.pbm", text.encode(), grey(255 * (g >= 128)[:, :, None]))
    text = "P3 32 32 255\n" + " ".join(map(str, q.ravel()))
    c.add("PPM in letters", "ppm/letters.ppm", text.encode(), q)
    c.add("PPM in letters that ends early", "ppm/letters_short.ppm", text[:2000].encode(), reason=".")
    real = g[::-1].astype("<f4")
    ranged = grey(np.rint((g - float(g.min())) * (255 / float(g.max() - g.min())))[:, :, None].astype(np.uint8))
    c.add("PFM, by its own range", "ppm/float.pfm", b"Pf 32 32 -1.0\n" + real.tobytes(), ranged)
    c.add("PFM of NaNs", "ppm/nan.pfm", b"Pf 32 32 -1.0\n" + (real * np.nan).tobytes(), reason="not all values")
    half = (q.astype(int) * 100 // 255).astype(np.uint8)
    c.add("PPM up to 100", "ppm/percent.ppm", b"P6 32 32 100\n" + half.tobytes(), q, 3)


def _animations(c: Corpus) -> None:
    q = quadrants()
    frames = [Image.fromarray(q), Image.new("RGB", (32, 32), (128, 128, 128)), Image.new("RGB", (32, 32), (0, 0, 0))]
    for kind, name, options in [
        ("GIF", "moving.gif", {}), ("PNG", "moving.png", {}), ("WEBP", "moving.webp", {"lossless": True}),
        ("AVIF", "moving.avif", {"quality": 95, "subsampling": "4:4:4"}),
    ]:  # fmt: skip
        with c.attempt(f"animated {kind}"):
            data = saved(frames[0], kind, save_all=True, append_images=frames[1:], duration=100, **options)
            c.add(f"animated {kind}, its first frame", f"animated/{name}", data, q, 12 if kind == "AVIF" else 0)
    still = saved(Image.fromarray(q).quantize(8), "GIF")
    c.add("GIF", "animated/still.gif", still, q)
    clear = Image.fromarray(np.where(np.arange(32)[:, None] < 16, 1, 0).repeat(32, 1).astype(np.uint8), "P")
    clear.putpalette([9, 9, 9, 220, 40, 30])
    right = np.full((32, 32, 3), 255)
    right[:16] = (220, 40, 30)
    c.add("GIF with transparency", "animated/clear.gif", saved(clear, "GIF", transparency=0), right)
    screen = b"GIF89a" + struct.pack("<HHBBB", 32, 32, 0x80, 0, 0) + bytes(6)
    c.add("animated GIF without a frame", "animated/no_frame.gif", screen + b";", reason="truncated|header")
    empty = screen + b"," + struct.pack("<HHHHB", 0, 0, 32, 32, 0) + b"\x02\0;"
    c.add("GIF frame without data", "animated/no_data.gif", empty, reason="truncated|damaged")
    moved = bytearray(still)
    at = still.index(b",", 13 + 3 * 2 ** ((still[10] & 7) + 1))
    moved[at + 1 : at + 5] = struct.pack("<HH", 40_000, 40_000)
    c.add(
        "GIF frame far outside its canvas", "animated/outside.gif", bytes(moved), reason="too large|damaged|truncated"
    )


def _orientations(c: Corpus) -> None:
    upright = np.concatenate([quadrants(), quadrants()[:, :16] // 2], 1)  # 48 x 32
    stored = {
        1: upright, 2: upright[:, ::-1], 3: upright[::-1, ::-1], 4: upright[::-1], 5: upright.transpose(1, 0, 2),
        6: np.rot90(upright, 1), 7: upright[::-1, ::-1].transpose(1, 0, 2), 8: np.rot90(upright, -1),
    }  # fmt: skip
    for value, array in stored.items():
        exif = Image.Exif()
        exif[0x0112] = value
        data = saved(array, "JPEG", exif=exif, quality=95, subsampling=0)
        c.add(f"EXIF orientation {value}, JPEG", f"orientation/{value}.jpg", data, upright, 4)
        c.add(f"EXIF orientation {value}, PNG", f"orientation/{value}.png", saved(array, "PNG", exif=exif), upright)
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = stored[6]
    c.add("EXIF orientation, TIFF", "orientation/6.tif", saved(turned, "TIFF", exif=exif), upright)
    with c.attempt("EXIF orientation, WebP"):
        c.add("EXIF orientation, WebP", "orientation/6.webp", saved(turned, "WEBP", exif=exif, lossless=True), upright)
    with c.attempt("orientation, AVIF"):
        data = saved(turned, "AVIF", exif=exif, quality=95, subsampling="4:4:4")
        c.add("orientation, AVIF", "orientation/6.avif", data, upright, 12)
    exif[0x0112] = 99
    c.add("EXIF orientation that does not exist", "orientation/99.png", saved(upright, "PNG", exif=exif), upright)


def _shapes(c: Corpus) -> None:
    for width, height in ((1, 1), (1, 10_000), (10_000, 1), (3, 2)):
        picture = np.full((height, width, 3), (10, 200, 90), np.uint8)
        c.add(f"{width} x {height}", f"shapes/{width}x{height}.png", saved(picture, "PNG"), picture)
        if width * height < 10:
            c.add(f"{width} x {height} JPEG", f"shapes/{width}x{height}.jpg", saved(picture, "JPEG"), picture, 4)
    flat = np.full((32, 32, 3), 128, np.uint8)
    c.add("a picture that is really grey", "shapes/grey.png", saved(flat, "PNG"), flat)
    c.add("a JPEG that is really grey", "shapes/grey.jpg", saved(flat, "JPEG"), flat, 2)


# ---------------------------------------------------------------- broken


def _truncated(c: Corpus) -> None:
    """Cut at many points. A cut that takes nothing of the picture may be read, if it is read right."""
    s, g = smooth(), smooth()[:, :, 0]
    whole: dict[str, tuple[Callable[[], bytes], np.ndarray, int]] = {
        "jpg": (lambda: saved(s, "JPEG", quality=95, subsampling=0), s, 12),
        "progressive.jpg": (lambda: saved(s, "JPEG", quality=95, subsampling=0, progressive=True), s, 12),
        "png": (lambda: saved(s, "PNG"), s, 0),
        "16.png": (lambda: saved(g.astype(np.uint16) * 257, "PNG"), grey(s), 0),
        "gif": (lambda: saved(Image.fromarray(g), "GIF"), grey(s), 0),
        "bmp": (lambda: saved(s, "BMP"), s, 0),
        "tif": (lambda: saved(s, "TIFF"), s, 0),
        "lzw.tif": (lambda: saved(s, "TIFF", compression="tiff_lzw"), s, 0),
        "webp": (lambda: saved(s, "WEBP", quality=95), s, 24),
        "lossless.webp": (lambda: saved(s, "WEBP", lossless=True), s, 0),
        "jp2": (lambda: saved(s, "JPEG2000"), s, 2),
        "avif": (lambda: saved(s, "AVIF", quality=95, subsampling="4:4:4"), s, 24),
        "ppm": (lambda: saved(s, "PPM"), s, 0),
        "ico": (lambda: saved(s, "ICO", sizes=[(32, 32)]), s, 0),
    }
    for suffix, (make, right, tolerance) in whole.items():
        with c.attempt(f"truncated {suffix}"):
            data = make()
            size = len(data)
            for where, keep in {
                "1": 1, "12": 12, "10%": size // 10, "25%": size // 4, "50%": size // 2, "75%": size * 3 // 4
            }.items():  # fmt: skip
                c.add(f"{suffix} cut at {where}", f"cut/{suffix}/{where}.{suffix}", data[:keep], reason=".")
            for where, keep in {"99%": size * 99 // 100, "last byte": size - 1}.items():
                name = f"cut/{suffix}/{where}.{suffix}"
                c.add(f"{suffix} cut at its {where}", name, data[:keep], right, tolerance, ".")


def _damaged(c: Corpus) -> None:
    """What some readers complete with grey."""
    s, q = smooth(), quadrants()
    jpeg = saved(s, "JPEG", quality=95, subsampling=0)
    progressive = saved(s, "JPEG", quality=95, subsampling=0, progressive=True)
    why = "truncated"
    c.add("JPEG without data, closed", "damaged/no_scan.jpg", headers_only(jpeg, 32, 32), reason=why)
    c.add("huge JPEG header without data", "damaged/huge_header.jpg", headers_only(jpeg, 3000, 3000), reason=why)
    for percent in (60, 75, 90):
        data = jpeg[: len(jpeg) * percent // 100].rstrip(b"\xff") + b"\xff\xd9"
        c.add(f"JPEG cut at {percent} % and closed", f"damaged/closed{percent}.jpg", data, reason=why)
    first = progressive.index(b"\xff\xda")
    data = progressive[: first + 14 + 20].rstrip(b"\xff") + b"\xff\xd9"
    c.add("progressive JPEG cut in its first scan and closed", "damaged/closed_progressive.jpg", data, reason=why)
    tables = at_marker(jpeg, 0xDB)
    c.add("JPEG without its tables", "damaged/no_tables.jpg", jpeg[:tables] + jpeg[at_marker(jpeg, 0xC0) :], reason=".")
    for name, at, value in (("12bit", 4, 12), ("height0", 6, 0), ("lossless", 1, 0xC3)):
        data = bytearray(jpeg)
        data[at_marker(jpeg, 0xC0) + at] = value
        c.add(f"JPEG header said to be {name}", f"damaged/{name}.jpg", bytes(data), reason=".")
    stored = b"".join(b"\0" + row.tobytes() for row in s)
    head = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 32, 32, 8, 2, 0, 0, 0))
    flipped = bytearray(head + chunk(b"IDAT", zlib.compress(stored, 0)) + chunk(b"IEND", b""))
    flipped[len(head) + 1000] ^= 0x55
    c.add("PNG with one byte changed", "damaged/flipped.png", bytes(flipped), reason="damaged")
    short = head + chunk(b"IDAT", zlib.compress(stored[:1500])) + chunk(b"IEND", b"")
    c.add("PNG whose data end early", "damaged/short.png", short, reason=why)
    c.add("PNG without data", "damaged/no_idat.png", head + chunk(b"IEND", b""), reason=".")
    c.add("PNG of a palette without the palette", "damaged/no_palette.png", png_of(s[:, :, 0] & 3, 8, 3), reason=".")
    strip = tiff(grey_tags(32, 32, 8, 100), bytes(100))
    c.add("TIFF whose strip is too short", "damaged/short_strip.tif", strip, reason=".")
    far = grey_tags(32, 32, 8, 1024) | {273: (4, [1 << 30])}
    c.add("TIFF whose pixels lie behind its end", "damaged/far.tif", tiff(far, bytes(1024)), reason=".")
    c.add("two JPEGs' halves", "damaged/halves.jpg", jpeg[: len(jpeg) // 2] + saved(q, "PNG"), reason=".")
    for suffix in ("jpg", "png", "gif", "tif", "webp", "noext"):
        name = f"damaged/empty.{suffix}" if suffix != "noext" else "damaged/empty"
        c.add("no bytes", name, b"", reason="empty file")
    for suffix in ("jpg", "png", "tif"):
        c.add("only zero bytes", f"damaged/zeros.{suffix}", bytes(4096), reason="only zero bytes")


def _bombs(c: Corpus) -> None:
    """A few bytes that ask for more than a gigabyte. None may take it."""
    why = "too large|damaged|truncated|header"
    c.add("PNG of 60,000 x 60,000", "bombs/wide.png", png([bytes(1000)], 60_000, 60_000, 8, 0), reason="too large")
    c.add("PNG of 2^31", "bombs/max.png", png([bytes(1000)], 2**31 - 1, 2**31 - 1, 16, 6), reason=why)
    c.add(
        "PNG just over the limit", "bombs/limit.png", png([bytes(9)], 10_001, 10_000, 1, 0), reason="too large: 10001"
    )
    c.add("PNG of 0 x 0", "bombs/zero.png", png([b""], 0, 0, 8, 0), reason=".")
    zeros = zlib.compress(bytes(80 << 20))
    q = quadrants()
    text = png_of(q, 8, 2, chunk(b"zTXt", b"Comment\0\0" + zeros))
    c.add("PNG with a text that unpacks to 80 MB", "bombs/ztxt.png", text, q, reason=why)
    profile = png_of(q, 8, 2, chunk(b"iCCP", b"p\0\0" + zeros))
    c.add("PNG with a profile that unpacks to 80 MB", "bombs/iccp.png", profile, q, reason=why)
    over = png([b""], 32, 32, 8, 2).replace(chunk(b"IDAT", zlib.compress(b"\0")), chunk(b"IDAT", zeros))
    c.add("PNG whose pixels unpack to 80 MB", "bombs/idat.png", over, np.zeros((32, 32, 3)), reason=".")
    jpeg = saved(q, "JPEG")
    c.add("JPEG of 65,500 x 65,500", "bombs/wide.jpg", headers_only(jpeg, 65_500, 65_500), reason="too large")
    gif = bytearray(saved(Image.fromarray(q).quantize(8), "GIF"))
    gif[6:10] = b"\xff" * 4
    c.add("GIF of 65,535 x 65,535", "bombs/wide.gif", bytes(gif), reason="too large")
    bmp = bytearray(saved(q, "BMP"))
    bmp[18:26] = struct.pack("<ii", 50_000, 50_000)
    c.add("BMP of 50,000 x 50,000", "bombs/wide.bmp", bytes(bmp), reason="too large")
    c.add("PPM of 99,999 x 99,999", "bombs/wide.ppm", b"P6 99999 99999 255\n" + bytes(100), reason="too large")
    tags = grey_tags(60_000, 60_000, 8, 100)
    c.add("TIFF of 60,000 x 60,000", "bombs/wide.tif", tiff(tags, bytes(100)), reason="too large")
    c.add("ICO with a PNG of 60,000 x 60,000", "bombs/icon.ico", icon(png([b""], 60_000, 60_000, 8, 6)), reason=why)
    c.add("ICO with a PNG over the limit", "bombs/icon2.ico", icon(png([b""], 10_001, 10_000, 1, 0)), reason=why)
    side = struct.pack("<I", 16_382)[:3]
    parts = b"VP8X" + struct.pack("<I", 10) + b"\x10\0\0\0" + side + side
    parts += b"VP8L" + struct.pack("<I", 64) + b"\x2f\xfe\xbf\xff\x0f" + bytes(59)
    webp = b"RIFF" + struct.pack("<I", 4 + len(parts)) + b"WEBP" + parts
    c.add("WebP of 16,383 x 16,383", "bombs/wide.webp", webp, reason=why)
    with c.attempt("JPEG 2000 bomb"):
        data = bytearray(saved(q, "JPEG2000"))
        at = data.index(b"ihdr") + 4
        data[at : at + 8] = struct.pack(">II", 60_000, 60_000)
        c.add("JPEG 2000 box of 60,000 x 60,000", "bombs/box.jp2", bytes(data), reason=why)
        data = bytearray(saved(q, "JPEG2000", no_jp2=True))
        data[8:16] = struct.pack(">II", 60_000, 60_000)
        c.add("JPEG 2000 of 60,000 x 60,000", "bombs/wide.j2k", bytes(data), reason=why)
    with c.attempt("AVIF bomb"):
        data = bytearray(saved(q, "AVIF"))
        at = data.index(b"ispe") + 8
        data[at : at + 8] = struct.pack(">II", 60_000, 60_000)
        c.add("AVIF of 60,000 x 60,000", "bombs/wide.avif", bytes(data), reason=why + "|not an image")
    with c.attempt("sparse file of 64 GB"):
        path = c.folder / "images" / "bombs" / "sparse.png"
        with path.open("wb") as file:
            file.write(saved(q, "PNG"))
            file.truncate(64 << 30)
        c.add("file of 64 GB with a hole", "bombs/sparse.png", None, reason="too large")


def _not_images(c: Corpus) -> None:
    q = quadrants()
    texts = {
        "page.jpg": b"<!DOCTYPE html><html><body>404 Not Found</body></html>",
        "text.png": b"not an image at all\n" * 50,
        "drawing.png": b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>',
        "paper.jpg": b"%PDF-1.7\n1 0 obj\n<< /Type /Catalog >>\nendobj\n%%EOF\n",
        "postscript.jpg": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n",
        "photo.heic": b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(range(200)),
        "photo.jxl": b"\xff\x0a" + bytes(range(1, 200)),
        "packed.png": b"PK\x03\x04" + bytes(range(1, 200)),
        "packed.jpg": gzip.compress(saved(q, "PNG"), mtime=0),
        "noise.gif": random.Random(1).randbytes(3000),
        "encoded.jpg": b"data:image/png;base64,iVBORw0KGgo=",
        "no_suffix": b"just a note\n",
        "targa.png": b"\0\0\x02" + bytes(9) + struct.pack("<HHBB", 2, 2, 24, 0) + bytes(12),
    }
    for name, data in texts.items():
        c.add(f"no image: {name}", f"not/{name}", data, reason="not an image|header|damaged|^HEIC")
    c.add("other files", "not/notes.txt", b"notes")
    c.add("other files", "not/README", b"notes")
    c.add("other files", "not/clip.mp4", b"\0\0\0\x18ftypmp42")
    c.add("an archive among images", "not/inside.tar", bytes(10240))


def _names(c: Corpus) -> None:
    q = quadrants()
    data, jpeg = saved(q, "PNG"), saved(q, "JPEG", quality=95, subsampling=0)
    for kind, name in {
        "PNG by the name of a JPEG": "png.jpg",
        "PNG without a suffix": "png",
        "suffix in capitals": "CAPITALS.PNG",
        "suffix in both cases": "Mixed.JpEg",
        "spaces": "  two  spaces .png",
        "a newline": "new\nline.png",
        "a tab and quotes": "tab\t\"quoted\" 'name'.png",
        "a control character": "\x1b[31mred.png",
        "a backslash": "back\\slash.png",
        "a question mark and star": "what?*.png",
        "a percent sign": "100%20.png",
        "a leading dash": "-rf.png",
        "a formula": "=1+1.png",
        "mark-up": "<b>&amp;.png",
        "another script": "Grüße 猫 🐈.png",
        "letters that run from right to left": "\u202egnp.png",
        "a very long name": "n" * 251 + ".png",
        "many dots": "a.b.c.d.png",
    }.items():
        with c.attempt(f"name with {kind}"):
            c.add(f"name: {kind}", f"names/{name}", data, q)
    with c.attempt("name that is no UTF-8"):
        c.add("name that is no UTF-8", "names/" + os.fsdecode(b"caf\xe9 \xff.png"), data, q)
    c.add("JPEG by the name of a PNG", "names/jpeg.png", jpeg, q, 4)
    c.add("JPEG by the name of a TIFF", "names/jpeg.tif", jpeg, q, 4)
    c.add("hidden file", "names/.hidden.png", data)
    c.add("hidden folder", "names/.cache/inside.png", data)
    c.add("what macOS leaves", "names/__MACOSX/._x.png", b"x")
    c.add("what Windows leaves", "names/Thumbs.db", b"x")


def _places(c: Corpus) -> None:
    """Folders, links and what is no file."""
    q = quadrants()
    data, root = saved(q, "PNG"), c.folder / "images" / "places"
    c.add("folder by the name of an image", "places/folder.jpg/inside.png", data, q)
    (root / "empty").mkdir(parents=True)
    c.add("empty folder", "places/empty", None)
    c.add("forty folders deep", "places/" + "d/" * 40 + "deep.png", data, q)
    with c.attempt("links"):
        (root / "self.png").symlink_to("self.png")
        c.add("link to itself", "places/self.png", None, reason="link to nowhere")
        (root / "gone.png").symlink_to("not/there.png")
        c.add("link to nowhere", "places/gone.png", None, reason="link to nowhere")
        (root / "up").symlink_to("..")
        c.add("link to a folder above", "places/up", None)
        (root / "other").symlink_to("folder.jpg")
        c.add("second way to a folder", "places/other/inside.png", None)
        (root / "device.png").symlink_to("/dev/zero")
        c.add("link to a device", "places/device.png", None, reason="not a regular file")
        (root / "link.png").symlink_to("folder.jpg/inside.png")
        c.add("link to an image", "places/link.png", None, q)
    with c.attempt("hard link"):
        os.link(root / "folder.jpg" / "inside.png", root / "hard.png")
        c.add("hard link", "places/hard.png", None, q)
    with c.attempt("FIFO"):
        os.mkfifo(root / "pipe.png")
        c.add("FIFO, at which a reader would wait for ever", "places/pipe.png", None, reason="not a regular file")
    with c.attempt("socket"):
        os.mknod(root / "socket.jpg", stat.S_IFSOCK | 0o600)
        c.add("socket", "places/socket.jpg", None, reason="not a regular file")
    with c.attempt("path longer than the system opens"):
        handle = os.open(root, os.O_RDONLY)
        try:
            for _ in range(20):  # 20 x 250 characters, more than 4,096
                os.mkdir("p" * 250, dir_fd=handle)
                inner = os.open("p" * 250, os.O_RDONLY, dir_fd=handle)
                os.close(handle)
                handle = inner
            with open(os.open("far.png", os.O_WRONLY | os.O_CREAT, dir_fd=handle), "wb") as file:
                file.write(data)
        finally:
            os.close(handle)
        longest = os.pathconf(root, "PC_PATH_MAX") - 1
        depth = (longest - len(os.path.abspath(root))) // 251 + 1  # of the first folder that cannot be opened
        name = "places/" + "/".join(["p" * 250] * depth)
        c.add("path longer than the system opens", name, None, reason="cannot be opened")
    with c.attempt("unreadable file and folder"):
        if os.geteuid() == 0:
            raise PermissionError("root may read everything")
        c.add("unreadable file", "places/locked.png", data, reason="no permission")
        (root / "locked.png").chmod(0)
        (root / "closed").mkdir(mode=0)
        c.add("unreadable folder", "places/closed", None, reason="cannot be opened")


# ---------------------------------------------------------------- archives


def member(tar: tarfile.TarFile, name: str, data: bytes = b"", kind: bytes = tarfile.REGTYPE, link: str = "") -> None:
    info = tarfile.TarInfo(name)
    info.size, info.type, info.linkname = len(data), kind, link
    tar.addfile(info, io.BytesIO(data))


def _archives(c: Corpus) -> None:
    q, s = quadrants(), smooth()
    data, detailed = saved(q, "PNG"), saved(s, "PNG")

    def make(name: str, fill: Callable[[tarfile.TarFile], None]) -> bytes:
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w", encoding="utf-8", errors="surrogateescape") as tar:
            fill(tar)
        content = buffer.getvalue()
        write(name, gzip.compress(content, mtime=0) if name.endswith("gz") else content)
        return content

    def write(name: str, content: bytes) -> None:
        path = c.folder / "archives" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)

    def odd(tar: tarfile.TarFile) -> None:
        member(tar, "good.png", data)
        member(tar, "../up.png", data)
        member(tar, "a/../../up2.png", data)
        member(tar, "/tmp/absolute.png", data)
        member(tar, "C:\\absolute.png", data)
        member(tar, "soft.png", kind=tarfile.SYMTYPE, link="../../etc/passwd")
        member(tar, "hard.png", kind=tarfile.LNKTYPE, link="good.png")
        member(tar, "device.png", kind=tarfile.CHRTYPE)
        member(tar, "disk.png", kind=tarfile.BLKTYPE)
        member(tar, "pipe.png", kind=tarfile.FIFOTYPE)
        member(tar, "folder.png", kind=tarfile.DIRTYPE)
        member(tar, "inner.tar", bytes(10240))
        member(tar, "broken.png", b"x" * 9)
        member(tar, "empty.jpg", b"")
        member(tar, "new\nline.png", data)
        member(tar, os.fsdecode(b"caf\xe9.png"), data)
        member(tar, "l" * 300 + ".png", data)
        member(tar, "./dot.png", data)
        member(tar, "twice.png", detailed)
        member(tar, ".hidden.png", data)
        member(tar, "twice.png", data)  # appended later: replaces the first, as in unpacking

    for name in ("odd.tar", "odd.tar.gz"):
        make(name, odd)
        source = f"archives/{name}"
        for inside in (
            "good.png",
            "new\nline.png",
            os.fsdecode(b"caf\xe9.png"),
            "l" * 300 + ".png",
            "dot.png",
            "twice.png",
        ):
            c.add(f"member of {name}", inside, None, q, source=source)
        for inside in ("inner.tar", ".hidden.png", "folder.png"):
            c.add(f"member of {name} that is no image", inside, None, source=source)
        for kind, inside, why in [
            ("member with ..", "../up.png", "leaves the archive"),
            ("member with .. inside", "a/../../up2.png", "leaves the archive"),
            ("absolute member", "/tmp/absolute.png", "absolute name"),
            ("absolute member of Windows", "C:\\absolute.png", "absolute name"),
            ("symbolic link member", "soft.png", "link"),
            ("hard link member", "hard.png", "link"),
            ("device member", "device.png", "not a regular file"),
            ("block device member", "disk.png", "not a regular file"),
            ("FIFO member", "pipe.png", "not a regular file"),
            ("broken member", "broken.png", "not an image"),
            ("empty member", "empty.jpg", "empty file"),
        ]:
            c.add(kind, inside, None, reason=why, source=source)

    def two(tar: tarfile.TarFile) -> None:
        member(tar, "first.png", data)
        member(tar, "second.png", detailed)

    whole = make("whole.tar", two)
    for inside, right in (("first.png", q), ("second.png", s)):
        c.add("member of a plain tar", inside, None, right, source="archives/whole.tar")
    second = whole.index(b"second.png")
    for kind, name, content in [
        ("tar cut in a member", "cut_member.tar", whole[: second + 512 + 20]),
        ("tar cut in a header", "cut_header.tar", whole[: second + 100]),
        ("tar cut between members", "cut_between.tar", whole[:second]),
        ("tar.gz cut in a member", "cut.tar.gz", gzip.compress(whole, mtime=0)[:-200]),
        ("tar with a damaged header", "damaged.tar", whole[:second] + b"\x07" * 512 + whole[second + 512 :]),
        ("tar with a header of a negative size", "negative.tar", _resized(whole, second, b"\xff" * 12)),
        ("tar with a header of an endless size", "endless.tar", _resized(whole, second, b"\x80" + b"\x7f" * 11)),
        ("tar whose member is larger than the tar", "larger.tar", _resized(whole, second, b"00777777777\0")),
        ("tar with an endless PAX header", "pax.tar", _resized(whole, second, b"\x80" + b"\0" * 5 + b"\x7f" * 6, b"x")),
        ("tar with an endless GNU name", "gnu.tar", _resized(whole, second, b"\x80" + b"\0" * 3 + b"\x7f" * 8, b"L")),
    ]:
        write(name, content)
        c.add(kind, "first.png", None, q, source=f"archives/{name}")
        c.add(kind, name, None, reason="truncated or damaged|too large", source=f"archives/{name}")

    def nested(tar: tarfile.TarFile) -> None:
        member(tar, "a.tar", whole)
        member(tar, "b.tar.gz", gzip.compress(whole, mtime=0))

    make("nested.tar", nested)
    c.add("tar of tars", "", None, reason="no images in .*2 other files", source="archives/nested.tar")
    make("no_members.tar", lambda tar: None)
    for kind, name, content, why in [
        ("tar of no bytes", "empty.tar", b"", "not a readable tar"),
        ("tar that is a page", "page.tar", b"<html>" * 500, "not a readable tar"),
        ("tar that is an image", "image.tar", saved(np.tile(s, (9, 9, 1)), "BMP"), "not a readable tar"),
        ("tar.gz that is not packed tar", "noise.tar.gz", gzip.compress(b"noise" * 999, mtime=0), "not a readable tar"),
        ("tar.gz of a few bytes", "few.tar.gz", b"\x1f\x8b\x08", "not a readable tar"),
        ("tar without members", "no_members.tar", None, "no images"),
        ("tar of zeros", "zeros.tar", bytes(10240), "no images|not a readable tar"),
    ]:
        if content is not None:
            write(name, content)
        c.add(kind, "", None, reason=why, source=f"archives/{name}")


def _resized(tar: bytes, header: int, size: bytes, kind: bytes = b"0") -> bytes:
    """The tar with another size field in the header at that place, and its checksum put right."""
    block = bytearray(tar[header : header + 512])
    block[124:136], block[156:157], block[148:156] = size, kind, b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return tar[:header] + bytes(block) + tar[header + 512 :]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, help="a folder that does not exist yet")
    folder = parser.parse_args().folder
    if folder.exists() and any(folder.iterdir()):
        print(f"{folder} is not empty: name another folder", file=sys.stderr)
        return 2
    cases = write_corpus(folder)
    outcomes = Counter(
        ("read" if c.size else "") + (" or " if c.size and c.reason else "") + ("listed" if c.reason else "")
        or "not counted"
        for c in cases
    )
    print(f"{folder}: {len(cases)} cases of {len({c.kind for c in cases})} kinds; to be " + ", ".join(
        f"{outcome}: {count}" for outcome, count in outcomes.items()
    ))  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
