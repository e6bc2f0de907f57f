"""Images that do not fit on the disk are decoded on demand, and nothing else changes."""

from __future__ import annotations

import shutil
import tarfile
import threading
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from unlabel.cache import ImageCache, Rows, load_cache
from unlabel.checkpoint import file_sha256
from unlabel.cli import main
from unlabel.errors import UserError
from unlabel.sources import open_source
from unlabel.streaming import Streamed


class Usage(NamedTuple):
    total: int
    used: int
    free: int


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A cache folder of its own with no room for pixels."""
    monkeypatch.setenv("UNLABEL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**9, 10**9 - 1000, 1000))
    monkeypatch.setattr("unlabel.packing._IN_MEMORY", 0)


def streamed(folder: Path) -> ImageCache:
    cache = load_cache(open_source(str(folder)), 16)
    assert isinstance(cache.images, Streamed)
    return cache


def test_the_same_images_as_the_packed_cache(digits_folder: Path, full_disk, tmp_path: Path, monkeypatch, capsys):
    copy = tmp_path / "digits"
    shutil.copytree(digits_folder, copy)
    (copy / "0" / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    found = streamed(copy)
    assert "decoded anew each time" in capsys.readouterr().out
    assert not list((tmp_path / "cache").rglob("images.u8"))
    monkeypatch.undo()
    packed = load_cache(open_source(str(copy)), 16, progress=False)
    assert (found.names, found.hashes, found.skipped) == (packed.names, packed.hashes, packed.skipped)
    assert len(found.skipped) == 1
    assert np.array_equal(np.asarray(found.images), packed.images)
    for key in (7, slice(3, 40, 5), np.array([5, 2, 2]), np.array([], np.int64)):
        assert np.array_equal(found.images[key], packed.images[key])
    half = found.subset(np.arange(len(found)) % 2 == 1)
    assert isinstance(half.images, Rows)
    half.images.prefetch(np.array([4, 1]))
    assert np.array_equal(half.images[np.array([1, 4])], packed.images[np.array([3, 9])])


def test_training_gives_the_same_bytes(digits_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    hashes = []
    for name in ("packed", "streamed"):
        monkeypatch.setenv("UNLABEL_CACHE", str(tmp_path / f"cache-{name}"))
        if name == "streamed":
            monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**9, 10**9 - 1000, 1000))
            monkeypatch.setattr("unlabel.packing._IN_MEMORY", 0)
        out = tmp_path / name
        assert main(["pretrain", "rotation", "--data", str(digits_folder), "--image-size", "16", "--epochs", "0.5",
                     "--out", str(out)]) == 0  # fmt: skip
        hashes.append(file_sha256(out / "backbone.safetensors"))
    assert [len(list(tmp_path.glob(f"cache-{n}/*/images.u8"))) for n in ("packed", "streamed")] == [1, 0]
    assert hashes[0] == hashes[1]


def test_the_index_is_kept(digits_folder: Path, full_disk, monkeypatch: pytest.MonkeyPatch):
    first = streamed(digits_folder)
    monkeypatch.setattr("unlabel.packing._decode_into", None)  # looking at every image again would call it
    assert streamed(digits_folder).hashes == first.hashes


def test_an_image_that_vanishes_or_changes_is_named(digits_folder: Path, full_disk, tmp_path: Path):
    copy = tmp_path / "digits"
    shutil.copytree(digits_folder, copy)
    cache = streamed(copy)
    (copy / cache.names[3]).unlink()
    with pytest.raises(UserError, match=cache.names[3]):
        cache.images[np.array([3])]
    shutil.copy(copy / cache.names[8], copy / cache.names[9])
    with pytest.raises(UserError, match="has changed"):
        cache.images[9:10]
    assert np.array_equal(cache.images[np.array([8])], cache.images[8:9])


def test_small_caches_are_held_in_memory(digits_folder: Path, full_disk, tmp_path: Path, monkeypatch):
    monkeypatch.setattr("unlabel.packing._IN_MEMORY", 1 << 30)
    cache = load_cache(open_source(str(digits_folder)), 16, progress=False)
    assert isinstance(cache.images, np.ndarray)
    assert not list((tmp_path / "cache").rglob("images.u8"))


def test_each_image_is_decoded_once_per_access_and_cancelled_work_is_not_done():
    done: list[int] = []

    def make(k: int) -> bytes:
        done.append(k)
        return bytes([k]) * 3

    images = Streamed([str(k) for k in range(40)], 1, make, workers=1)
    assert images[np.array([5, 2, 5, 5])][:, 0, 0, 0].tolist() == [5, 2, 5, 5]
    assert sorted(done) == [2, 5]
    images.prefetch(np.array([1, 1, 7]))
    assert images[np.array([7, 1])][:, 0, 0, 0].tolist() == [7, 1]
    assert sorted(done) == [1, 2, 5, 7]


def test_a_compressed_archive_says_what_to_do(digits_folder: Path, full_disk, tmp_path: Path):
    with tarfile.open(tmp_path / "digits.tar.gz", "w:gz") as tar:
        tar.add(digits_folder, "digits")
    with pytest.raises(UserError, match=r"compressed archive.*UNLABEL_CACHE"):
        load_cache(open_source(str(tmp_path / "digits.tar.gz")), 16, progress=False)


def test_after_an_error_the_rest_is_not_decoded():
    """Else the interpreter would work through the whole queue before it ends."""
    done: list[int] = []
    failed = threading.Event()

    def make(k: int) -> bytes | str:
        done.append(k)
        if k == 0:
            return "it is gone"
        failed.wait(10)
        return b"abc"

    images = Streamed([str(k) for k in range(50)], 1, make, workers=1)
    with pytest.raises(UserError, match="it is gone"):
        images[:]
    images.prefetch(np.arange(20, 30))
    images.prefetch(np.arange(0))  # what was begun is let go
    failed.set()
    images._pool.shutdown()
    assert done in ([0], [0, 1])
