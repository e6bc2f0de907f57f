import errno
import io
import os
import random
import shutil
import signal
import struct
import subprocess
import sys
import tarfile
import time
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from unlabel import packing, stale
from unlabel.cache import TooManyBroken, cache_side, load_cache, printable, write_skipped
from unlabel.decode import BrokenImage, decode
from unlabel.errors import UserError
from unlabel.listing import Entry
from unlabel.sources import open_source

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("UNLABEL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def picture(seed: int = 0, width: int = 60, height: int = 40) -> np.ndarray:
    """Smooth colours (H, W, 3) uint8, so that lossy formats stay close."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (4, 5, 3), dtype=np.uint8))
    return np.asarray(small.resize((width, height), Image.Resampling.BICUBIC))


def saved(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def pixels(data: bytes) -> np.ndarray:
    image = decode(data)
    assert image.mode == "RGB"
    return np.asarray(image).astype(int)


def make_folder(root: Path, count: int, size: tuple[int, int] = (60, 40)) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        Image.fromarray(picture(i, *size)).save(root / f"{i:03d}.png")
    return root


# ---------------------------------------------------------------- decoding


def test_lossless_and_lossy_formats() -> None:
    rgb = picture()
    for kind in ("PNG", "BMP", "TIFF", "PPM"):
        np.testing.assert_array_equal(pixels(saved(Image.fromarray(rgb), kind)), rgb)
    for options in ({}, {"progressive": True}, {"subsampling": 0}):
        assert np.abs(pixels(saved(Image.fromarray(rgb), "JPEG", quality=95, **options)) - rgb).mean() < 3


def test_grey_one_bit_and_palette() -> None:
    grey = picture()[:, :, 0]
    for kind in ("PNG", "JPEG", "TIFF", "PPM"):
        found = pixels(saved(Image.fromarray(grey), kind))
        assert np.abs(found - grey[:, :, None]).mean() < 2, kind
    one_bit = Image.fromarray(grey > 128)
    np.testing.assert_array_equal(pixels(saved(one_bit, "PNG"))[:, :, 1], 255 * (grey > 128))
    palette = Image.fromarray(picture()).quantize(16)
    expected = np.asarray(palette.convert("RGB"))
    for kind in ("PNG", "GIF", "BMP"):
        np.testing.assert_array_equal(pixels(saved(palette, kind)), expected)


def test_transparency_is_laid_on_white() -> None:
    rgb, alpha = picture(), picture(1)[:, :, :1]
    expected = (rgb * (alpha / 255) + 255 - alpha).astype(int)
    rgba = Image.fromarray(np.concatenate([rgb, alpha], 2))
    assert np.abs(pixels(saved(rgba, "PNG")) - expected).max() <= 2
    grey_alpha = Image.merge("LA", [Image.fromarray(rgb[:, :, 0]), Image.fromarray(alpha[:, :, 0])])
    assert np.abs(pixels(saved(grey_alpha, "PNG")) - expected[:, :, :1]).max() <= 2
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([10, 20, 30, 200, 0, 0])
    palette.putpixel((0, 0), 0)
    found = pixels(saved(palette, "PNG", transparency=0))
    assert found[0, 0].tolist() == [255, 255, 255]
    assert found[1, 1].tolist() == [200, 0, 0]
    assert pixels(saved(palette, "GIF", transparency=0))[0, 0].tolist() == [255, 255, 255]
    key = saved(Image.new("RGB", (3, 3), (1, 2, 3)), "PNG", transparency=(1, 2, 3))
    assert (pixels(key) == 255).all()


def test_cmyk_is_not_inverted() -> None:
    for ink, colour in [((255, 0, 0, 0), (0, 255, 255)), ((0, 0, 0, 0), (255, 255, 255)), ((0, 0, 0, 255), (0, 0, 0))]:
        data = saved(Image.new("CMYK", (16, 16), ink), "JPEG", quality=95)
        assert b"Adobe" in data
        assert np.abs(pixels(data) - colour).max() <= 3
        np.testing.assert_array_equal(pixels(saved(Image.new("CMYK", (16, 16), ink), "TIFF"))[0, 0], colour)


def test_sixteen_bit_is_scaled_and_floats_use_their_range() -> None:
    deep = (np.arange(60 * 40).reshape(40, 60) * 27).astype(np.uint16)  # 0..64773
    expected = np.rint(deep / 257).astype(int)
    header = f"P5 {deep.shape[1]} {deep.shape[0]} 65535\n".encode()
    for data in (
        saved(Image.fromarray(deep), "PNG"),
        saved(Image.fromarray(deep), "TIFF"),
        header + deep.astype(">u2").tobytes(),
    ):
        np.testing.assert_array_equal(pixels(data)[:, :, 2], expected)
    dark = np.full((4, 4), 514, np.uint16)
    assert (pixels(saved(Image.fromarray(dark), "PNG")) == 2).all()
    real = np.linspace(-3, 5, 12, dtype=np.float32).reshape(3, 4)
    expected = np.rint((real + 3) / 8 * 255)
    np.testing.assert_array_equal(pixels(saved(Image.fromarray(real), "TIFF"))[:, :, 0], expected)
    assert (pixels(saved(Image.fromarray(np.full((3, 4), 7.5, np.float32)), "TIFF")) == 0).all()


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_exif_orientation_is_applied() -> None:
    upright = np.arange(6, dtype=np.uint8).reshape(2, 3)[:, :, None].repeat(3, 2) * 40
    # How a camera stores the upright picture under each value of the tag.
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright, 1),
        7: upright[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(upright, -1),
    }
    for value, array in stored.items():
        exif = Image.Exif()
        exif[0x0112] = value
        for kind in ("PNG", "TIFF", "WEBP"):
            options = {"lossless": True} if kind == "WEBP" else {}
            data = saved(Image.fromarray(np.ascontiguousarray(array)), kind, exif=exif, **options)
            np.testing.assert_array_equal(pixels(data), upright, err_msg=f"{kind} {value}")
    damaged = saved(Image.fromarray(upright), "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff", quality=100)
    assert pixels(damaged).shape == upright.shape


def test_first_frame_of_an_animation() -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "lime", "blue")]
    for kind in ("GIF", "PNG", "WEBP", "TIFF"):
        options = {"lossless": True} if kind == "WEBP" else {}
        data = saved(frames[0], kind, save_all=True, append_images=frames[1:], **options)
        assert pixels(data)[4, 4].tolist() == [255, 0, 0]


def png_header(width: int, height: int) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")


def broken_files() -> dict[str, tuple[bytes, str]]:
    jpeg = saved(Image.fromarray(picture()), "JPEG")
    png = saved(Image.fromarray(picture()), "PNG")
    middle = len(png) // 2
    return {
        "empty.jpg": (b"", "empty file"),
        "zeros.png": (bytes(5000), "only zero bytes"),
        "text.jpg": (b"not an image at all", "not an image"),
        "page.png": (b"<html><body>404</body></html>", "not an image"),
        "noise.gif": (random.Random(0).randbytes(3000), "not an image"),
        "cut.jpg": (jpeg[: len(jpeg) // 2], "truncated"),
        "cut.png": (png[: len(png) // 2], "truncated"),
        "header.jpg": (jpeg[:20], "header"),
        "flipped.png": (
            png[:middle] + bytes(b ^ 255 for b in png[middle : middle + 40]) + png[middle + 40 :],
            "damaged|truncated",
        ),
        "bomb.png": (png_header(60_000, 60_000), "too large"),
        "large.png": (png_header(10_001, 10_000), "too large: 10001 x 10000"),
        "short.bmp": (saved(Image.fromarray(picture()), "BMP")[:300], "truncated"),
        "postscript.jpg": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n", "not an image"),
        "nan.tif": (saved(Image.fromarray(np.full((4, 4), np.nan, np.float32)), "TIFF"), "not all values"),
    }


@pytest.mark.parametrize("name", broken_files())
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_broken_files_are_refused_with_a_short_reason(name: str) -> None:
    data, reason = broken_files()[name]
    with pytest.raises(BrokenImage, match=reason) as caught:
        decode(data)
    assert 0 < len(str(caught.value)) < 120


# ---------------------------------------------------------------- packing


def test_small_images_are_packed_as_they_are(tmp_path: Path) -> None:
    """Digits of 28 px for a network at 28 stay 28 px, bit for bit; for one at 32 they are enlarged once, no further."""
    assert [cache_side(28, 28), cache_side(28, 30), cache_side(28, 500)] == [28, 30, 35]
    assert [cache_side(32, 28), cache_side(64, 96), cache_side(64, 70), cache_side(64, None)] == [32, 80, 70, 80]
    image = picture(0, 28, 28)
    Image.fromarray(image).save(tmp_path / "a.png")
    cache = load_cache(open_source(str(tmp_path)), 28, progress=False)
    np.testing.assert_array_equal(cache.images[0], image)
    assert load_cache(open_source(str(tmp_path)), 32, progress=False).side == 32


def test_images_are_cropped_to_the_middle_and_resized_with_antialiasing(tmp_path: Path) -> None:
    assert [cache_side(size) for size in (32, 64, 96, 224)] == [40, 80, 120, 280]
    wide, tall = picture(0, 130, 100), picture(1, 100, 150)
    stripes = np.zeros((400, 400, 3), np.uint8)
    stripes[:, ::2] = 255
    (tmp_path / "f").mkdir()
    for name, array in (("a", wide), ("b", tall), ("c", stripes)):
        Image.fromarray(array).save(tmp_path / "f" / f"{name}.png")
    cache = load_cache(open_source(str(tmp_path / "f")), 80, progress=False)
    assert cache.images.shape == (3, 100, 100, 3)
    np.testing.assert_array_equal(cache.images[0], wide[:, 15:115])
    np.testing.assert_array_equal(cache.images[1], tall[25:125])
    inner = cache.images[2][5:-5, 5:-5].astype(int)
    assert np.abs(inner - 127.5).max() < 20  # without antialiasing all stripes would be black or white
    assert cache.shapes.tolist() == [[130, 100], [100, 150], [400, 400]]


def test_second_time_nothing_is_decoded_and_folder_and_archive_share(tmp_path: Path, cache_folder: Path) -> None:
    import tarfile

    folder = make_folder(tmp_path / "f", 7)
    with tarfile.open(tmp_path / "x.tar.gz", "w:gz") as tar:
        for i in (3, 1, 6, 0, 2, 5, 4):
            tar.add(folder / f"{i:03d}.png", f"./{i:03d}.png")
    first = load_cache(open_source(str(folder)), 32, workers=3, progress=False)
    [packed] = [p for p in cache_folder.iterdir() if p.name != "datasets"]
    before = {p.name: p.stat().st_mtime_ns for p in packed.iterdir()}
    again = load_cache(open_source(str(tmp_path / "x.tar.gz")), 32, progress=False)
    assert {p.name: p.stat().st_mtime_ns for p in packed.iterdir()} == before
    assert list(cache_folder.iterdir()) == [packed]
    np.testing.assert_array_equal(first.images[:], again.images[:])
    assert (first.names, first.hashes, first.skipped) == (again.names, again.hashes, again.skipped)
    np.testing.assert_array_equal(first.phashes, again.phashes)
    assert isinstance(first.images, np.memmap)
    with pytest.raises(ValueError, match="read-only"):
        first.images[0] = 0
    memory = load_cache(open_source(str(folder)), 48, progress=False, write=False)
    assert list(cache_folder.iterdir()) == [packed]
    on_disk = load_cache(open_source(str(folder)), 48, progress=False)
    np.testing.assert_array_equal(memory.images[:], on_disk.images[:])


def test_hashes_are_of_the_full_size_pixels(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "f", 2)
    Image.open(folder / "000.png").save(folder / "same.bmp")
    Image.fromarray(picture(0).reshape(60, 40, 3)).save(folder / "reshaped.png")  # same bytes, other shape
    changed = picture(0).copy()
    changed[0, 0, 0] ^= 1
    Image.fromarray(changed).save(folder / "changed.png")
    cache = load_cache(open_source(str(folder)), 32, progress=False)
    hashes = dict(zip(cache.names, cache.hashes, strict=True))
    assert hashes["000.png"] == hashes["same.bmp"]
    assert len(set(hashes.values())) == 4
    other_size = load_cache(open_source(str(folder)), 8, progress=False)
    assert other_size.hashes == cache.hashes
    np.testing.assert_array_equal(other_size.phashes, cache.phashes)


@pytest.mark.parametrize("subsampling", [0, 1, 2])
@pytest.mark.parametrize("turn", [1, 6])
def test_a_large_jpeg_is_decoded_at_a_part_of_its_size(tmp_path: Path, subsampling: int, turn: int) -> None:
    """Its pixels are those of the whole, shrunk; what is hashed does not depend on the size that is asked for."""
    from sklearn.datasets import load_sample_images

    exif, names = Image.Exif(), ("china", "flower")
    exif[0x0112] = turn
    photos = [Image.fromarray(image) for image in load_sample_images().images]
    for name, photo in zip(names, photos, strict=True):
        photo.save(tmp_path / f"{name}.jpg", quality=95, subsampling=subsampling, exif=exif)
        photo.resize((1280, 854), Image.Resampling.BICUBIC).save(
            tmp_path / f"{name}-larger.jpg", quality=95, subsampling=subsampling, exif=exif
        )
    source = open_source(str(tmp_path))
    caches = {size: load_cache(source, size, progress=False, write=False) for size in (32, 64, 140, 224)}
    assert (
        caches[32].shapes.tolist()
        == [[854, 1280] if turn == 6 else [1280, 854], [427, 640] if turn == 6 else [640, 427]] * 2
    )
    for cache in caches.values():
        assert cache.hashes == caches[32].hashes
        np.testing.assert_array_equal(cache.phashes, caches[32].phashes)
        for name, packed in zip(cache.names, np.array(cache.images), strict=True):
            whole = decode((tmp_path / name).read_bytes())
            assert whole.size[0] in (427, 854, 640, 1280)
            short = min(whole.size)
            left, top = ((n - short) // 2 for n in whole.size)
            expected = whole.crop((left, top, left + short, top + short)).resize(
                (cache.side, cache.side), Image.Resampling.BICUBIC
            )
            error = float(np.square(np.asarray(expected, float) - packed).mean())
            assert 10 * np.log10(255**2 / error) > 33  # dB
    assert len(set(caches[32].hashes)) == 4
    near = np.bitwise_count(caches[32].phashes[::2] ^ caches[32].phashes[1::2])
    assert near.max() <= 2  # of 64 bits, between a photo and a larger copy


def test_perceptual_hash_is_of_the_image_and_its_mirror(tmp_path: Path) -> None:
    folder = tmp_path / "f"
    folder.mkdir()
    for i in range(5):
        noise = np.random.default_rng(i).integers(0, 256, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(noise).resize((96, 64)).save(folder / f"{i:03d}.png")
    for path in list(folder.iterdir()):
        Image.open(path).transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(folder / f"m{path.name}")
    cache = load_cache(open_source(str(folder)), 32, progress=False)
    assert len(set(cache.phashes[:5, 0].tolist())) == 5
    assert np.bitwise_count(cache.phashes[:5] ^ cache.phashes[5:, ::-1]).max() <= 1  # of 64 bits
    assert np.bitwise_count(cache.phashes[:5, 0] ^ cache.phashes[:5, 1]).min() > 10


@pytest.mark.parametrize("write", [True, False])
def test_broken_files_leave_no_gap(tmp_path: Path, write: bool) -> None:
    folder = make_folder(tmp_path / "f", 30)
    clean = load_cache(open_source(str(folder)), 32, progress=False)
    for i, (name, (data, _)) in enumerate(broken_files().items()):
        (folder / f"{2 * i:03d}{name}").write_bytes(data)  # between the good ones, and before the first
    (folder / "00.png").write_bytes(b"x")
    (folder / "zzz.png").write_bytes(b"x")
    source = open_source(str(folder))
    with pytest.raises(TooManyBroken, match=r"16 of 46 images .* cannot be read \(.*max-skipped is 0\.01") as caught:
        load_cache(source, 32, progress=False, write=write)
    assert len(caught.value.skipped) == 16
    assert "\n" not in str(caught.value)
    cache = load_cache(source, 32, max_skipped=0.5, progress=False, write=write)
    assert cache.names == clean.names
    assert cache.hashes == clean.hashes
    np.testing.assert_array_equal(cache.images[:], clean.images[:])
    assert [name for name, _ in cache.skipped] == sorted(set(source.names) - set(clean.names))
    assert all(reason for _, reason in cache.skipped)


def test_the_limit_is_a_fraction_that_may_be_reached_but_not_passed(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "f", 99, (8, 8))
    (folder / "bad1.png").write_bytes(b"x")
    assert len(load_cache(open_source(str(folder)), 8, progress=False)) == 99
    (folder / "bad2.png").write_bytes(b"xx")
    with pytest.raises(TooManyBroken, match="2 of 101"):
        load_cache(open_source(str(folder)), 8, progress=False)
    with pytest.raises(TooManyBroken, match="2 of 101"):  # from the cache, too
        load_cache(open_source(str(folder)), 8, progress=False)
    only_broken = tmp_path / "g"
    only_broken.mkdir()
    (only_broken / "a.png").write_bytes(b"x")
    with pytest.raises(UserError, match="1 of 1 images"):
        load_cache(open_source(str(only_broken)), 8, max_skipped=1.0, progress=False)


def test_labels_are_joined_from_the_source(tmp_path: Path) -> None:
    for i, name in enumerate(("cat/a.png", "cat/b.png", "dog/a.png")):
        (tmp_path / "f" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture(i)).save(tmp_path / "f" / name)
    (tmp_path / "f" / "cat" / "aa.png").write_bytes(b"x")
    cache = load_cache(open_source(str(tmp_path / "f")), 32, max_skipped=1, progress=False)
    assert list(zip(cache.names, cache.labels or [], strict=True)) == [
        ("cat/a.png", "cat"),
        ("cat/b.png", "cat"),
        ("dog/a.png", "dog"),
    ]
    (tmp_path / "labels.csv").write_text("cat/a.png,x\ncat/b.png,y\ndog/a.png,x\ncat/aa.png,y\n")
    relabelled = load_cache(
        open_source(str(tmp_path / "f"), tmp_path / "labels.csv"), 32, max_skipped=1, progress=False
    )
    assert relabelled.labels == ["x", "y", "x"]


def test_subset_is_a_view_in_the_order_asked_for(tmp_path: Path) -> None:
    cache = load_cache(open_source(str(make_folder(tmp_path / "f", 6))), 32, progress=False)
    part = cache.subset([4, 0, 5])
    assert len(part) == 3
    assert part.images.shape == (3, 40, 40, 3)
    assert part.names == ["004.png", "000.png", "005.png"]
    np.testing.assert_array_equal(part.images[1], cache.images[0])
    np.testing.assert_array_equal(part.images[np.array([2, 0])], cache.images[[5, 4]])
    np.testing.assert_array_equal(np.asarray(part.images), cache.images[[4, 0, 5]])
    twice = part.subset(np.array([False, True, True]))
    assert twice.names == ["000.png", "005.png"]
    np.testing.assert_array_equal(twice.images[:], cache.images[[0, 5]])
    assert twice.hashes == [cache.hashes[0], cache.hashes[5]]
    assert len({cache.fingerprint, part.fingerprint, twice.fingerprint}) == 3
    assert cache.subset([4, 0, 5]).fingerprint == part.fingerprint


def test_damaged_caches_are_made_again(tmp_path: Path, cache_folder: Path) -> None:
    source = open_source(str(make_folder(tmp_path / "f", 5)))
    good = np.array(load_cache(source, 32, progress=False).images)
    [packed] = cache_folder.iterdir()
    index = packed / "index.bin"
    for damage in (
        lambda: (packed / "images.u8").write_bytes(b"short"),
        lambda: (packed / "images.u8").unlink(),
        lambda: index.unlink(),
        lambda: index.write_bytes(index.read_bytes()[:-10]),
        lambda: index.write_bytes(index.read_bytes().replace(b'"images": 5', b'"images": 4')),
        lambda: index.write_bytes(b""),
    ):
        damage()
        np.testing.assert_array_equal(load_cache(source, 32, progress=False).images[:], good)
        assert list(cache_folder.iterdir()) == [packed]


def test_an_image_that_was_repaired_is_looked_at_again(tmp_path: Path, cache_folder: Path, monkeypatch) -> None:
    """Of the same name and size, as after a download that had kept room for all of it."""
    folder = make_folder(tmp_path / "f", 3)
    [*_, last] = sorted(folder.iterdir())
    good = last.read_bytes()
    last.write_bytes(bytes(len(good)))
    monkeypatch.setattr("unlabel.sources._SAMPLE", 1)  # so that the key does not know of it
    for _ in range(2):
        assert load_cache(open_source(str(folder)), 32, max_skipped=1, progress=False).skipped == [
            (last.name, "only zero bytes")
        ]
    last.write_bytes(good)
    for _ in range(2):
        cache = load_cache(open_source(str(folder)), 32, progress=False)
        assert (len(cache), cache.skipped, len(list(cache_folder.iterdir()))) == (3, [], 2)  # the old one may be in use


@pytest.mark.parametrize("archive", [False, True])
def test_an_image_that_was_changed_is_packed_anew(
    archive: bool, tmp_path: Path, cache_folder: Path, monkeypatch
) -> None:
    """Its name and its size are what they were, as a bitmap's always are."""
    (folder := tmp_path / "f").mkdir()
    for i in range(6):
        Image.fromarray(picture(i)).save(folder / f"{i}.bmp")
    monkeypatch.setattr("unlabel.sources._SAMPLE", 1)  # so that the key does not know of it

    def listed(mtime: float):
        if not archive:
            return open_source(str(folder))
        with tarfile.open(tmp_path / "f.tar", "w") as tar:
            tar.add(folder, arcname=".")
        os.utime(tmp_path / "f.tar", (mtime, mtime))
        return open_source(str(tmp_path / "f.tar"))

    before, decoded, real, now = listed(time.time() - 9), [], packing.pack_one, time.time()
    first = load_cache(before, 32, progress=False)
    monkeypatch.setattr(
        stale, "time", SimpleNamespace(time_ns=lambda: int((now + 1000) * 1e9))
    )  # the times below are of the past
    for module in (packing, stale):
        monkeypatch.setattr(module, "pack_one", lambda *args, **more: decoded.append(1) or real(*args, **more))
    assert load_cache(listed(now - 9), 32, progress=False).hashes == first.hashes
    assert not decoded
    Image.fromarray(picture(99)).save(folder / "4.bmp")
    os.utime(folder / "4.bmp", (now + 50, now + 50))
    changed = listed(now + 50)
    assert changed.fingerprint == before.fingerprint
    second = load_cache(changed, 32, progress=False)
    assert [a == b for a, b in zip(first.hashes, second.hashes, strict=True)] == [True] * 4 + [False, True]
    assert not np.array_equal(second.images[4], first.images[4])
    assert len(list(cache_folder.iterdir())) == 2  # the old one may be in use
    # What is only younger, as after copying, is looked at once, and nothing is packed.
    for i in range(6):
        os.utime(folder / f"{i}.bmp", (now + 99, now + 99))
    copied = listed(now + 99)
    assert load_cache(copied, 32, progress=False).hashes == second.hashes
    decoded.clear()
    Image.fromarray(picture(4)).save(folder / "4.bmp")  # as it was at first
    os.utime(folder / "4.bmp", (now + 200, now + 200))
    for looked in (True, False):
        assert load_cache(listed(now + 200), 32, progress=False).hashes == first.hashes
        assert bool(decoded) is looked
        decoded.clear()
    assert len(list(cache_folder.iterdir())) == 2


@pytest.mark.parametrize(("code", "times", "found"), [(errno.EIO, 2, 3), (errno.EIO, 99, 2), (errno.EMFILE, 99, None)])
def test_a_disk_that_fails_for_a_moment(code: int, times: int, found: int | None, tmp_path: Path, monkeypatch) -> None:
    """Read again; what lasts is a broken image, what does not is no word on the image."""
    source, left, real = open_source(str(make_folder(tmp_path / "f", 3))), [times], Entry.load
    source.content_sample()

    def load(entry: Entry, limit: int | None = None) -> bytes:
        if entry.name == "001.png" and left[0]:
            left[0] -= 1
            raise OSError(code, os.strerror(code))
        return real(entry, limit)

    monkeypatch.setattr("unlabel.stores.WAITS", (0.0, 0.0))
    monkeypatch.setattr(Entry, "load", load)
    if found is None:
        with pytest.raises(UserError, match=r"'001.png' cannot be read at the moment .*the same command"):
            load_cache(source, 32, max_skipped=1, progress=False)
        monkeypatch.undo()
    else:
        cache = load_cache(source, 32, max_skipped=1, progress=False)
        assert (len(cache), [name for name, _ in cache.skipped]) == (found, ["001.png"][: 3 - found])


def test_what_changes_while_images_are_packed_is_packed_anew(tmp_path: Path, monkeypatch) -> None:
    """It had been read by then: a download that had kept room for all of it, say."""
    folder = make_folder(tmp_path / "f", 3)
    [first, *_] = sorted(folder.iterdir())
    good, real, left = first.read_bytes(), packing.pack_one, [3]
    first.write_bytes(bytes(len(good)))
    source = open_source(str(folder))
    source.content_sample()

    def pack_one(*args, **more):
        found = real(*args, **more)
        left[0] -= 1
        if left[0] == 0:  # all three are read
            first.write_bytes(good)
        return found

    monkeypatch.setattr(packing, "pack_one", pack_one)
    assert len(load_cache(source, 32, max_skipped=1, workers=1, progress=False)) == 3


def test_a_file_that_is_dated_in_the_future_hides_no_change(tmp_path: Path, monkeypatch) -> None:
    (folder := tmp_path / "f").mkdir()
    monkeypatch.setattr("unlabel.sources._SAMPLE", 1)  # so that the key does not know of it
    for i in range(3):
        Image.fromarray(picture(i)).save(folder / f"{i}.bmp")
    os.utime(folder / "1.bmp", (2e9, 2e9))  # 2033
    found = [load_cache(open_source(str(folder)), 32, progress=False).hashes for _ in range(2)]
    time.sleep(0.01)
    Image.fromarray(picture(9)).save(folder / "2.bmp")
    found.append(load_cache(open_source(str(folder)), 32, progress=False).hashes)
    assert found[0] == found[1]
    assert [a == b for a, b in zip(found[1], found[2], strict=True)] == [True, True, False]


def test_a_source_that_never_rests_is_no_cache(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(packing, "is_stale", lambda *_: True)
    with pytest.raises(UserError, match="have changed 20 times"):
        load_cache(open_source(str(make_folder(tmp_path / "f", 1))), 32, progress=False)


def test_a_cache_that_cannot_be_read_now_is_left_alone(tmp_path: Path, cache_folder: Path, monkeypatch) -> None:
    source, found, real = open_source(str(make_folder(tmp_path / "f", 3))), [], packing.read_index
    load_cache(source, 32, progress=False)
    [packed] = cache_folder.iterdir()
    kept = (packed / "images.u8").stat().st_ino

    def late(folder: Path):  # another process put it there just after this one had looked
        found.append(folder)
        return real(folder) if len(found) > 1 else None

    with monkeypatch.context() as patch:
        patch.setattr(packing, "read_index", late)
        load_cache(source, 32, progress=False)
    assert ((packed / "images.u8").stat().st_ino, len(found)) == (kept, 2)
    (packed / "index.bin").unlink()
    (packed / "index.bin").mkdir()  # cannot be opened, whoever the tests run as
    with pytest.raises(UserError, match="cannot use the image cache"):
        load_cache(source, 32, progress=False)
    assert (packed / "images.u8").stat().st_ino == kept


def test_equal_names_and_sizes_do_not_share_a_cache(tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 1)):
        (tmp_path / name).mkdir()
        Image.fromarray(picture(seed)).save(tmp_path / name / "x.bmp")
    a, b = (open_source(str(tmp_path / name)) for name in "ab")
    assert a.fingerprint == b.fingerprint
    assert load_cache(a, 32, progress=False).hashes != load_cache(b, 32, progress=False).hashes


def start(folder: Path) -> subprocess.Popen[bytes]:
    code = (
        "from unlabel.cache import load_cache; from unlabel.sources import open_source; import sys;"
        "print(len(load_cache(open_source(sys.argv[1]), 32, workers=1, progress=False)))"
    )
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "ssl")])}
    return subprocess.Popen([sys.executable, "-c", code, str(folder)], env=env, stdout=subprocess.PIPE)


@pytest.mark.parametrize("change", ["deleted", "grown", "shrunk"])
def test_an_image_that_changes_while_it_is_packed_stops_it(change: str, digits_folder: Path, tmp_path: Path):
    """Listed, then changed: what is kept under the listing's fingerprint must be what was listed."""
    copy = tmp_path / "copy"
    shutil.copytree(digits_folder, copy)
    source = open_source(str(copy))
    _ = source.fingerprint, source.content_sample()
    victim = copy / source.names[7]
    data = victim.read_bytes()
    if change == "deleted":
        victim.unlink()
    else:
        victim.write_bytes(data + b"0" if change == "grown" else data[:-1])
    with pytest.raises(UserError, match=r"changed or vanished while the images were read"):
        load_cache(source, 32)
    victim.write_bytes(data)
    assert len(load_cache(open_source(str(copy)), 32)) == len(source)


def test_processes_at_once_and_killed_ones_all_end_well(tmp_path: Path, cache_folder: Path) -> None:
    folder = make_folder(tmp_path / "f", 200, (160, 160))
    killed = start(folder)
    while not list(cache_folder.glob("tmp-*/images.u8")):  # in the middle of packing
        assert killed.poll() is None
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL if os.name != "nt" else signal.SIGTERM)
    killed.communicate()
    assert [p.name[:4] for p in cache_folder.iterdir()] == ["tmp-"]
    for process in [start(folder) for _ in range(2)]:
        assert process.communicate()[0].strip() == b"200"
        assert process.returncode == 0
    source = open_source(str(folder))
    images = load_cache(source, 32, progress=False).images[:]
    np.testing.assert_array_equal(images, load_cache(source, 32, progress=False, write=False).images[:])
    [left] = cache_folder.glob("tmp-*")
    for path in (left, *left.iterdir()):
        os.utime(path, (0, 0))  # what a killed process left goes when it is a day old
    load_cache(source, 40, progress=False)
    assert len(list(cache_folder.iterdir())) == 2


def test_a_cache_folder_that_cannot_be_written_is_the_users_mistake(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("UNLABEL_CACHE", str(tmp_path / "file" / "sub"))
    source = open_source(str(make_folder(tmp_path / "f", 2)))
    with pytest.raises(UserError, match=r"cannot use the image cache in .* set UNLABEL_CACHE"):
        load_cache(source, 32, progress=False)


def test_skipped_txt_is_sorted_and_on_one_line_each(tmp_path: Path) -> None:
    names = ["b/new\nline.jpg", "a\ttab.jpg", os.fsdecode(b"\xff.jpg"), "Grüße 猫.jpg", "back\\slash", "\x1b[31m"]
    write_skipped(tmp_path / "skipped.txt", [(name, "empty\nfile") for name in names])
    lines = (tmp_path / "skipped.txt").read_text("utf-8").split("\n")
    assert lines.pop() == ""
    assert lines == sorted(lines)
    assert "b/new\\nline.jpg\tempty\\nfile" in lines
    assert [line.count("\t") for line in lines] == [1] * len(names)
    assert printable("a\ttab.jpg") == "a\\ttab.jpg"
    assert printable("Grüße 猫.jpg") == "Grüße 猫.jpg"
    for name in ("back\\slash", "1.00\u202fPM.png", "写真\u30001.png", "no\u00a0break", "👩\u200d🔬.png"):
        assert printable(name) == name  # what joins a table to the files
    assert printable("\u202egnp.exe\u2028") == "\\u202egnp.exe\\u2028"
    assert printable(printable("a\nb\udcff")) == printable("a\nb\udcff") == "a\\nb\\xff"
    assert printable("\x1b[31m") == "\\x1b[31m"
    if os.name != "nt":
        assert printable(os.fsdecode(b"\xff.jpg")) == "\\xff.jpg"
