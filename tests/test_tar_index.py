"""Archives are listed once, in parallel, and what changed is noticed; sources behind a URL are what folders are."""

from __future__ import annotations

import http.server
import io
import os
import random
import re
import shutil
import subprocess
import sys
import tarfile
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from unlabel import listing, stores, tar_index
from unlabel.cache import load_cache
from unlabel.errors import UserError
from unlabel.listing import list_archive
from unlabel.sources import Source, open_source
from unlabel.stores import Changed
from unlabel.streaming import Streamed

ROOT = Path(__file__).resolve().parents[1]
NAMES = [f"{kind}/{i:02d}.png" for kind in ("cat", "dog") for i in range(12)] + ["dog/Grüße 猫 %41.png"]
TREE = {name: random.Random(name).randbytes(300 + 7 * i) for i, name in enumerate(NAMES)}


@pytest.fixture(autouse=True)
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where listings are kept, also those of the small archives of the tests."""
    monkeypatch.setenv("UNLABEL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(tar_index, "_SMALL", 0)
    return tmp_path / "cache" / "listings"


def add(tar: tarfile.TarFile, name: str, data: bytes = b"", **attributes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    for key, value in attributes.items():
        setattr(member, key, value)
    tar.addfile(member, io.BytesIO(data))


def make_tar(path: Path, tree: dict[str, bytes] = TREE) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:gz" if path.suffix == ".gz" else "w") as tar:
        for name, data in tree.items():
            add(tar, name, data)
    return path


def make_shards(folder: Path, suffix: str = ".tar", count: int = 5) -> list[str]:
    parts = [dict(list(TREE.items())[k::count]) for k in range(count)]
    return [str(make_tar(folder / f"part-{k:03d}{suffix}", part)) for k, part in enumerate(parts)]


def make_folder(root: Path) -> Path:
    for name, data in TREE.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return root


def contents(source: Source) -> dict[str, bytes]:
    return {source.names[i]: load() for i, load in source.read()}


def no_listing(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args, **kwargs):
        raise AssertionError("an archive was listed again")

    monkeypatch.setattr(tarfile, "open", fail)


def odd_archives(folder: Path) -> list[Path]:
    """A link, names that leave the archive, a name twice, what is no image, odd names; cut, damaged, empty."""
    plain = folder / "odd.tar"
    with tarfile.open(plain, "w", format=tarfile.PAX_FORMAT) as tar:
        add(tar, "./cat/a.png", b"first")
        add(tar, "../out.png", b"x")
        add(tar, "/absolute.png", b"x")
        add(tar, "cat/link.png", type=tarfile.SYMTYPE, linkname="a.png")
        add(tar, "cat/new\nline.png", b"newline")
        add(tar, os.fsdecode(b"cat/\xff\xfe.png"), b"no UTF-8")
        add(tar, "cat/empty.png")
        add(tar, "notes.txt", b"text")
        add(tar, ".hidden/x.png", b"x")
        add(tar, "cat/a.png", b"second, which replaces the first")
        for name, data in TREE.items():
            add(tar, name, data)
    data = plain.read_bytes()
    with tarfile.open(plain) as tar:
        last = tar.getmembers()[-1].offset
    others = {
        "cut.tar": data[: len(data) // 2],
        "between.tar": data[:last],
        "damaged.tar": data[:last] + b"\x07" * 512 + data[last + 512 :],
        "odd.tar": data,
    }
    for name, some in others.items():
        (folder / name).write_bytes(some)
    compressed = make_tar(folder / "whole.tar.gz")
    cut = folder / "cut.tar.gz"
    cut.write_bytes(compressed.read_bytes()[: compressed.stat().st_size * 2 // 3])
    none = folder / "none.tar"
    with tarfile.open(none, "w") as tar:
        add(tar, "a.txt", b"x")
    return [folder / name for name in others] + [compressed, cut, none]


def test_a_kept_listing_is_what_listing_finds_and_opens_no_archive(
    tmp_path: Path, kept: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    archives = odd_archives(tmp_path)
    fresh = [list_archive(str(path)) for path in archives]
    assert [tar_index.list_archives([str(path)]) for path in archives] == fresh
    assert len(list(kept.iterdir())) == len(archives)
    no_listing(monkeypatch)
    again = [tar_index.list_archives([str(path)]) for path in archives]
    assert again == fresh
    assert all(type(pair) is tuple for found in again for pair in found.skipped)
    assert sum(len(found.skipped) for found in fresh) >= 12
    monkeypatch.chdir(tmp_path)
    assert tar_index.list_archives(["odd.tar"]) == fresh[3]  # a relative path is the same archive
    assert not list(kept.glob("tmp-*"))


@pytest.mark.skipif(os.name == "nt", reason="links need a privilege on Windows")
def test_an_archive_under_another_name_keeps_that_name(tmp_path: Path) -> None:
    odd_archives(tmp_path)
    (tmp_path / "other.tar").symlink_to(tmp_path / "cut.tar")
    for name in ("cut.tar", "other.tar", "cut.tar", "other.tar"):
        found = tar_index.list_archives([str(tmp_path / name)])
        assert found == list_archive(str(tmp_path / name))
        assert found.skipped[-1][0] == name


def test_a_change_of_the_archive_is_a_new_listing(tmp_path: Path, kept: Path) -> None:
    path = make_tar(tmp_path / "x.tar")
    state = os.stat(path)
    assert open_source(str(path)).names == sorted(TREE)
    renamed = {name.replace("cat", "cow"): data for name, data in TREE.items()}
    make_tar(path, renamed)
    assert os.stat(path).st_size == state.st_size
    os.utime(path, ns=(0, state.st_mtime_ns + 1))
    assert open_source(str(path)).names == sorted(renamed)
    grown = renamed | {"new.png": b"x" * 5000}
    make_tar(path, grown)
    os.utime(path, ns=(0, state.st_mtime_ns + 1))
    assert open_source(str(path)).names == sorted(grown)
    assert len(list(kept.iterdir())) == 1  # those of the past are gone


def test_a_damaged_listing_is_made_again(tmp_path: Path, kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = str(make_tar(tmp_path / "x.tar"))
    fresh = tar_index.list_archives([path])
    [file] = kept.iterdir()
    good = file.read_bytes()
    flipped = bytearray(good)
    flipped[-20] ^= 1
    for damaged in (b"", good[:40], good[:-1], bytes(flipped), good[65:], b"x" * 64 + good[64:]):
        file.write_bytes(damaged)
        assert tar_index.list_archives([path]) == fresh
        assert file.read_bytes() == good
    monkeypatch.setattr(tar_index, "_FORMAT", tar_index._FORMAT + 1)
    assert tar_index.list_archives([path]) == fresh
    assert file.read_bytes() != good


def test_an_archive_that_is_being_written_is_not_kept(
    tmp_path: Path, kept: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make_tar(tmp_path / "x.tar")

    def while_it_grows(archive: str, state: stores.State) -> listing.Found:
        found = list_archive(archive, state)
        with path.open("ab") as file:
            file.write(b"more")
        return found

    monkeypatch.setattr(tar_index, "list_archive", while_it_grows)
    source = open_source(str(path))
    assert not kept.exists()
    with pytest.raises(Changed):
        source.entries[0].load()


def test_small_archives_are_not_kept(tmp_path: Path, kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setenv("UNLABEL_CACHE", str(tmp_path / "cache"))
    open_source(str(make_tar(tmp_path / "small.tar")))
    assert not kept.exists()
    open_source(str(make_tar(tmp_path / "large.tar", {"a.png": bytes(1 << 20)})))
    assert len(list(kept.iterdir())) == 1


def test_without_a_cache_folder_the_listing_is_only_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("UNLABEL_CACHE", str(tmp_path / "file" / "sub"))
    path = str(make_tar(tmp_path / "x.tar"))
    assert tar_index.list_archives([path]) == tar_index.list_archives([path]) == list_archive(path)


def test_a_listing_is_replaced_at_once_or_not_at_all(tmp_path: Path, kept: Path, monkeypatch) -> None:
    path = make_tar(tmp_path / "x.tar")
    open_source(str(path))
    [file] = kept.iterdir()
    before = file.read_bytes()
    make_tar(path, TREE | {"new.png": b"x" * 5000})

    def failing(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", failing)
    assert len(open_source(str(path))) == len(TREE) + 1
    assert {p: p.read_bytes() for p in kept.iterdir()} == {file: before}


def test_processes_at_once_keep_whole_listings(tmp_path: Path, kept: Path) -> None:
    make_shards(tmp_path, count=12)
    pattern = str(tmp_path / "part-*.tar")
    code = (
        "import sys, shutil; from unlabel import tar_index; from unlabel.sources import open_source\n"
        "tar_index._SMALL = 0\n"
        "for _ in range(15):\n"
        "    print(open_source(sys.argv[1]).fingerprint); shutil.rmtree(sys.argv[2], ignore_errors=True)\n"
    )
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "ssl")])}
    started = [
        subprocess.Popen([sys.executable, "-c", code, pattern, str(kept)], env=env, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    prints = [process.communicate()[0].split() for process in started]
    assert [process.returncode for process in started] == [0, 0]
    expected = open_source(str(make_folder(tmp_path / "folder"))).fingerprint
    assert prints == [[expected] * 15] * 2


@pytest.mark.parametrize("suffix", [".tar", ".tar.gz"])
def test_shards_at_once_are_one_source_whoever_is_first(
    tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = make_shards(tmp_path, suffix)
    with open(paths[1], "r+b") as file:
        file.truncate(os.path.getsize(paths[1]) // 3)
    pattern = str(tmp_path / f"part-{{000..004}}{suffix}")
    done = {path: threading.Event() for path in paths}

    def last_first(path: str, state: stores.State) -> listing.Found:
        """Only when the shards behind this one are done: all of them are being listed at once, or it takes too long."""
        assert all(done[after].wait(20) for after in paths[paths.index(path) + 1 :])
        found = list_archive(path, state)
        done[path].set()
        return found

    monkeypatch.setattr(tar_index, "list_archive", last_first)
    parallel = open_source(pattern)
    for event in done.values():
        event.clear()
    shutil.rmtree(tmp_path / "cache")
    one_by_one = [list_archive(path) for path in paths]
    assert tar_index.list_archives(paths).entries == [entry for found in one_by_one for entry in found.entries]
    monkeypatch.setattr(tar_index, "list_archive", list_archive)
    monkeypatch.setattr(tar_index, "_AT_ONCE", 1)
    shutil.rmtree(tmp_path / "cache")
    alone = open_source(pattern)
    assert parallel.entries == alone.entries
    assert (parallel.fingerprint, parallel.skipped) == (alone.fingerprint, alone.skipped)
    assert parallel.content_sample() == alone.content_sample()
    assert len(parallel.skipped) == 1
    assert contents(parallel) == {name: TREE[name] for name in parallel.names}


def test_of_several_bad_shards_the_first_is_named(tmp_path: Path) -> None:
    paths = make_shards(tmp_path)
    for path in (paths[3], paths[1]):
        Path(path).write_bytes(b"no tar" * 200)
    for _ in range(5):
        with pytest.raises(UserError, match=r"part-001\.tar is not a readable tar"):
            open_source(str(tmp_path / "part-*.tar"))


def test_a_file_that_changed_since_it_was_listed_is_not_read(tmp_path: Path) -> None:
    path = make_tar(tmp_path / "x.tar")
    for again in range(2):  # from a fresh listing and from a kept one
        source = open_source(str(path))
        assert contents(source) == TREE
        stat = os.stat(path)
        os.utime(path, ns=(0, stat.st_mtime_ns + 1 + again))
        for entry in source.entries:
            with pytest.raises(OSError, match="has changed since it was listed"):
                entry.load()
        os.utime(path, ns=(0, stat.st_mtime_ns))
        with path.open("ab") as file:
            file.write(b"\0")
        os.utime(path, ns=(0, stat.st_mtime_ns))
        with pytest.raises(Changed):
            source.entries[0].load(10)
    folder = open_source(str(make_folder(tmp_path / "folder")))
    assert contents(folder) == TREE
    for size in (0, 299, 301):
        (tmp_path / "folder" / NAMES[0]).write_bytes(bytes(size))
        for limit in (None, 100):
            with pytest.raises(Changed):
                folder.entries[0].load(limit)
    (tmp_path / "folder" / NAMES[0]).write_bytes(TREE[NAMES[0]][::-1])
    assert folder.entries[0].load() == TREE[NAMES[0]][::-1]


def test_a_compressed_archive_that_changed_since_it_was_listed_is_not_read(tmp_path: Path) -> None:
    source = open_source(str(make_tar(tmp_path / "x.tar.gz")))
    assert len(contents(source)) == len(source)
    make_tar(tmp_path / "x.tar.gz", dict(reversed(TREE.items())))
    os.utime(tmp_path / "x.tar.gz", (1, 1))
    with pytest.raises(Changed, match="since it was listed"):
        contents(source)


def test_a_disk_that_fails_is_not_a_damaged_archive(tmp_path: Path, kept: Path, monkeypatch) -> None:
    """Else a shard would be kept as cut off where the network had failed."""
    path = str(make_tar(tmp_path / "x.tar"))

    def failing(self, *args):
        raise OSError(5, "Input/output error")

    real = tarfile.TarFile.__init__

    def opened(self, *args, **kwargs):
        real(self, *args, **kwargs)
        self.next = lambda: failing(self)

    monkeypatch.setattr(tarfile.TarFile, "__init__", opened)
    with pytest.raises(UserError, match=r"cannot read .*x\.tar \(Input/output error\)"):
        open_source(path)
    assert not kept.exists()


def test_shards_that_do_not_fit_are_streamed_from_their_listing(
    tmp_path: Path, digits_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = sorted(p for p in digits_folder.rglob("*.png"))
    tree = {p.relative_to(digits_folder).as_posix(): p.read_bytes() for p in files}
    for k in range(3):
        make_tar(tmp_path / f"part-{k}.tar", dict(list(tree.items())[k::3]))
    packed = load_cache(open_source(str(digits_folder)), 16, progress=False, write=False)
    monkeypatch.setattr("unlabel.packing._lack_of_room", lambda *args: "is too large")
    monkeypatch.setattr("unlabel.packing._IN_MEMORY", 0)
    (tmp_path / "cache").mkdir()
    pattern = str(tmp_path / "part-{0..2}.tar")
    load_cache(open_source(pattern), 16, progress=False)
    no_listing(monkeypatch)  # as when a run is continued
    found = load_cache(open_source(pattern), 16, progress=False)
    assert isinstance(found.images, Streamed)
    assert (found.names, found.hashes, found.fingerprint) == (packed.names, packed.hashes, packed.fingerprint)
    rows = np.random.default_rng(0).permutation(len(found))
    assert np.array_equal(found.images[rows], packed.images[rows])
    os.utime(tmp_path / "part-1.tar", (0, 0))
    with pytest.raises(UserError, match=r"readable when the run began .*part-1\.tar has changed since it was listed"):
        found.images[:6]


# Behind a URL


@pytest.fixture
def store():
    """fsspec's file system in memory, empty before and after."""
    fsspec = pytest.importorskip("fsspec")
    fs = fsspec.filesystem("memory")
    fs.store.clear()
    yield fs
    fs.store.clear()


def put(store, folder: Path, at: str) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            store.pipe_file(f"{at}/{path.relative_to(folder).as_posix()}", path.read_bytes())


def test_urls_are_the_sources_that_folders_are(tmp_path: Path, store, monkeypatch: pytest.MonkeyPatch) -> None:
    local = open_source(str(make_folder(tmp_path / "photos")))
    make_shards(tmp_path / "shards")
    make_tar(tmp_path / "shards" / "all.tar.gz")
    put(store, tmp_path / "photos", "/bucket/photos")
    put(store, tmp_path / "shards", "/bucket/shards")
    store.pipe_file("/bucket/photos2/other.png", b"beside")
    specs = ["photos", "photos/", "shards/part-{000..004}.tar", "shards/part-*.tar", "shards/part-{000,001}.tar"]
    specs += ["shards/all.tar.gz"]
    folder = open_source((tmp_path / "photos").as_uri())
    assert (folder.fingerprint, contents(folder)) == (local.fingerprint, TREE)
    assert local.fingerprint == open_source(f"file://{tmp_path}/shards/part-*.tar").fingerprint
    for again in range(2):
        for spec in specs:
            source = open_source(f"memory://bucket/{spec}")
            if "," in spec:
                assert len(source) == 10
                assert contents(source) == {name: TREE[name] for name in source.names}
                continue
            assert (source.names, source.labels) == (local.names, local.labels)
            assert source.sizes.tolist() == local.sizes.tolist()
            assert source.fingerprint == local.fingerprint
            assert source.content_sample() == local.content_sample()
            assert contents(source) == TREE
            if "gz" not in spec:
                assert source.entries[3].load(10) == TREE[source.names[3]][:10]
        if not again:
            no_listing(monkeypatch)


def test_only_the_headers_of_large_images_are_read(store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = make_tar(tmp_path / "x.tar", {f"{i}.png": bytes(200_000) for i in range(20)})
    store.pipe_file("/bucket/x.tar", path.read_bytes())
    monkeypatch.setattr(listing, "REQUEST", 4096)
    asked: list[int] = []
    whole = store.cat_file

    def counted(self, key: str, *, start=None, end=None):  # s3fs has another argument before these
        data = whole(key, start, end)
        asked.append(len(data))
        return data

    monkeypatch.setattr(type(store), "cat_file", counted)
    source = open_source("memory://bucket/x.tar")
    assert len(source) == 20
    assert 20 <= len(asked) <= 50
    assert sum(asked) < 50 * 4096
    assert source.entries[0].load() == bytes(200_000)


def test_objects_that_are_replaced_are_noticed(store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stores, "_CONFIRM_AFTER", 0.0)
    path = make_tar(tmp_path / "x.tar")
    store.pipe_file("/bucket/x.tar", path.read_bytes())
    source = open_source("memory://bucket/x.tar")
    assert contents(source) == TREE
    store.pipe_file("/bucket/x.tar", path.read_bytes())  # the same bytes at another time
    with pytest.raises(Changed):
        source.entries[0].load()
    assert contents(open_source("memory://bucket/x.tar")) == TREE
    store.pipe_file("/bucket/x.tar", path.read_bytes()[:1000])
    monkeypatch.setattr(stores, "_CONFIRM_AFTER", 60.0)
    stores._confirmed["memory://bucket/x.tar"] = time.monotonic()
    with pytest.raises(Changed):  # too short, which shows without asking
        source.entries[-1].load()
    store.rm("/bucket/x.tar")
    with pytest.raises(OSError, match=r".*"):
        source.entries[0].load()
    put(store, make_folder(tmp_path / "f"), "/bucket/f")
    folder = open_source("memory://bucket/f")
    store.pipe_file(f"/bucket/f/{NAMES[0]}", b"longer" * 100)
    with pytest.raises(Changed):
        folder.entries[0].load()


def test_a_store_that_tells_no_version_is_listed_each_time(store, tmp_path: Path, kept: Path, monkeypatch) -> None:
    store.pipe_file("/bucket/x.tar", make_tar(tmp_path / "x.tar").read_bytes())
    monkeypatch.setattr(stores, "_VERSION", set())
    assert contents(open_source("memory://bucket/x.tar")) == TREE
    assert not kept.exists()


def test_training_images_are_packed_from_a_url(store, digits_folder: Path) -> None:
    put(store, digits_folder, "/bucket/digits")
    local = load_cache(open_source(str(digits_folder)), 16, progress=False, write=False)
    remote = load_cache(open_source("memory://bucket/digits/"), 16, progress=False, write=False)
    assert (remote.hashes, remote.labels, remote.fingerprint) == (local.hashes, local.labels, local.fingerprint)


def test_a_store_that_does_not_answer_for_a_moment(store, digits_folder: Path, monkeypatch) -> None:
    put(store, digits_folder / "0", "/bucket/digits")
    source, whole, left = open_source("memory://bucket/digits/"), store.cat_file, [0]

    def busy(self, key: str, *, start=None, end=None):
        left[0] -= 1
        if left[0] >= 0:
            raise RuntimeError("503 slow down")
        return whole(key, start, end)

    monkeypatch.setattr(type(store), "cat_file", busy)
    monkeypatch.setattr(stores, "WAITS", (0.0, 0.0))
    left[0] = 4
    with pytest.raises(UserError, match=r"at the moment .*503"):  # while it is looked at, for its key
        load_cache(source, 16, progress=False, write=False)
    left[0] = 2
    assert source.content_sample()
    for times, found in ((2, 80), (10**6, None)):
        left[0] = times
        if found:
            assert len(load_cache(source, 16, progress=False, write=False)) == found
        else:
            with pytest.raises(UserError, match=r"at the moment .*503"):
                load_cache(source, 16, progress=False, write=False)


def test_mistakes_with_urls_are_one_line_that_says_what_to_do(store, tmp_path: Path) -> None:
    make_shards(tmp_path)
    put(store, tmp_path, "/bucket")
    store.pipe_file("/bucket/photo.jpg", b"x")
    for spec, message in [
        ("memory://bucket/none.tar", "there is nothing at memory://bucket/none.tar"),
        ("memory://bucket/nothing/", "no images in memory://bucket/nothing/"),
        ("memory://bucket/part-{003..006}.tar", r"2 of .* not found, the first is memory://bucket/part-005\.tar"),
        ("memory://bucket/x-*.tar", "not found"),
        ("memory://bucket/p*", r"stands for memory://.*photo\.jpg, which is no \.tar"),
        ("memory://bucket/photo.jpg", "is one file, not a source"),
        ("nonesuch://bucket/x.tar", r"cannot open nonesuch://bucket/x\.tar .*check what stands before"),
    ]:
        with pytest.raises(UserError, match=message) as caught:
            open_source(spec)
        assert "\n" not in str(caught.value)


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("fsspec")
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(UserError, match=r"cannot open s3://bucket/x\.tar .*s3fs.*; install that library"):
        open_source("s3://bucket/x.tar")
    monkeypatch.setitem(sys.modules, "fsspec", None)
    monkeypatch.setitem(sys.modules, "fsspec.core", None)
    with pytest.raises(UserError, match=r"fsspec.*; install that library"):
        open_source("memory://bucket/x.tar")


def test_fsspec_is_imported_for_urls_only(tmp_path: Path) -> None:
    code = (
        "import sys; from unlabel.sources import open_source; len(open_source(sys.argv[1]).fingerprint);"
        "print([m for m in ('fsspec', 'aiohttp', 'torch') if m in sys.modules])"
    )
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "ssl")])}
    path = make_tar(tmp_path / "x.tar", {"a.png": bytes(2 << 20)})
    for _ in range(2):
        done = subprocess.run([sys.executable, "-c", code, str(path)], env=env, capture_output=True, text=True)
        assert done.stdout.strip() == "[]", done.stderr


class Handler(http.server.SimpleHTTPRequestHandler):
    """Files and pages of links, with ranges unless `ranges` is false."""

    ranges = True
    log: list[str]

    def do_GET(self) -> None:
        path = self.translate_path(self.path)
        self.log.append(self.headers.get("Range", ""))
        match = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", "")) if self.ranges else None
        if match is None or not os.path.isfile(path):
            return super().do_GET()
        data = Path(path).read_bytes()
        part = data[int(match[1]) : int(match[2]) + 1]
        self.send_response(206)
        self.send_header("Content-Length", str(len(part)))
        self.send_header("Content-Range", f"bytes {match[1]}-{int(match[1]) + len(part) - 1}/{len(data)}")
        self.end_headers()
        self.wfile.write(part)

    def log_message(self, *args) -> None:
        pass


@pytest.fixture
def server(tmp_path: Path):
    """A server of `tmp_path / "www"` on this machine: its address, and its handler."""
    pytest.importorskip("aiohttp")
    (tmp_path / "www").mkdir()

    class Here(Handler):
        log: list[str] = []  # noqa: RUF012

        def __init__(self, *args, **kwargs) -> None:
            super().__init__(*args, directory=str(tmp_path / "www"), **kwargs)

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Here) as running:
        thread = threading.Thread(target=running.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{running.server_address[1]}", Here
        running.shutdown()
        thread.join()


def test_a_real_server(server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    address, handler = server
    make_shards(tmp_path / "www")
    make_tar(tmp_path / "www" / "all.tar.gz")
    local = open_source(str(make_folder(tmp_path / "www" / "photos")))
    for spec in ("part-{000..004}.tar", "all.tar.gz", "photos/"):
        source = open_source(f"{address}/{spec}")
        assert (source.fingerprint, source.labels) == (local.fingerprint, local.labels)
        assert contents(source) == TREE
    assert contents(open_source(f"{address}/photos")) == TREE
    assert any(handler.log)
    with pytest.raises(UserError, match=r"1 of .* not found"):
        open_source(f"{address}/part-{{004..005}}.tar")
    with pytest.raises(UserError, match="there is nothing at"):
        open_source(f"{address}/none.tar")

    source = open_source(f"{address}/part-000.tar?signed=1")
    entry = source.entries[0]
    data = entry.load()
    handler.ranges = False  # all of the archive is not this image
    with pytest.raises(Changed):
        entry.load()
    handler.ranges = True
    assert entry.load() == data
    os.utime(tmp_path / "www" / "part-000.tar", (0, 0))
    stores._confirmed.clear()
    with pytest.raises(Changed):
        entry.load()
    again = open_source(f"{address}/part-000.tar?signed=1").entries[0]
    assert again.load() == data

    monkeypatch.setattr(listing, "REQUEST", 4096)
    handler.ranges = False
    with pytest.raises(UserError, match="does not answer requests for a range"):
        open_source(f"{address}/part-001.tar?again")
    folder = open_source(f"{address}/photos/")
    assert contents(folder) == TREE
    assert folder.entries[0].load(10) == TREE[NAMES[0]][:10]


def test_a_server_that_is_not_there(tmp_path: Path) -> None:
    pytest.importorskip("aiohttp")
    with pytest.raises(UserError, match=r"cannot reach http://127\.0\.0\.1:9/x\.tar .*check the address, the network"):
        open_source("http://127.0.0.1:9/x.tar")
    with pytest.raises(UserError, match=r"cannot reach http://127\.0\.0\.1:9/x-0\.tar"):
        open_source("http://127.0.0.1:9/x-{0..1}.tar")
