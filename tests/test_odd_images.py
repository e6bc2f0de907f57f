"""The corpus of broken and odd images: each is read right, or listed with its reason, and none crashes a command."""

from __future__ import annotations

import gzip
import io
import json
import os
import random
import re
import subprocess
import sys
import tarfile
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from downstream.classifier import load_classifier, stored_key
from scripts import fuzz, odd_images
from unlabel.cache import load_cache, printable
from unlabel.decode import BrokenImage, decode, decode_reduced
from unlabel.errors import UserError
from unlabel.report import write_report
from unlabel.sources import open_source

ROOT = Path(__file__).parents[1]
SIDE = 32  # of most pictures, so that they are packed as they are


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Any]]:
    folder = tmp_path_factory.mktemp("odd")
    return folder, odd_images.write_corpus(folder)


class Read:
    """What became of a source: its pictures, and what was listed with which reason."""

    def __init__(self, spec: str) -> None:
        self.refused = ""
        try:
            source = open_source(spec)
            self.cache = load_cache(source, SIDE, max_skipped=1.0, workers=2, progress=False)
        except UserError as error:
            self.refused = str(error)
            return
        self.rows = {name: row for row, name in enumerate(self.cache.names)}
        self.skipped = dict(self.cache.skipped)
        self.loaders = {source.names[i]: load for i, load in source.read()}

    def wrong(self, case: Any) -> str:
        """What is wrong about a case, "" if nothing is."""
        if not case.name or self.refused:
            return "" if case.reason and re.search(case.reason, self.refused) else f"refused: {self.refused!r}"
        if case.name in self.rows:
            return self._wrong_picture(case)
        reason = self.skipped.get(case.name)
        if reason is None:
            return "lost without a word" if case.size or case.reason else ""
        if not case.reason or not re.search(case.reason, reason):
            return f"listed: {reason}"
        return "" if 0 < len(reason) < 120 and "\n" not in reason else f"not a short reason: {reason!r}"

    def _wrong_picture(self, case: Any) -> str:
        width, height = self.cache.shapes[self.rows[case.name]].tolist()
        if case.size is None or (width, height) != tuple(case.size):
            return f"read as {width} x {height}"
        if (width, height) == (SIDE, SIDE):
            assert self.cache.side == SIDE
            pixels = self.cache.images[self.rows[case.name]].astype(int)
        else:
            pixels = np.asarray(decode(self.loaders[case.name]())).astype(int)
        for x, y, colour in case.points:
            if np.abs(pixels[y, x] - colour).max() > case.tolerance:
                return f"{pixels[y, x].tolist()} at {x}, {y}, not {list(colour)}"
        return ""


def wrong(folder: Path, cases: list[Any]) -> list[str]:
    read = {source: Read(str(folder / source)) for source in dict.fromkeys(case.source for case in cases)}
    return [f"{c.kind} ({c.source}, {c.name!r}): {w}" for c in cases if (w := read[c.source].wrong(c))]


def test_every_odd_image_is_read_right_or_listed_with_its_reason(corpus: tuple[Path, list[Any]]) -> None:
    folder, cases = corpus
    images = [case for case in cases if case.source == "images"]
    assert len({case.kind for case in images}) >= 300  # so that a part that is left out shows
    assert wrong(folder, images) == []


def test_every_odd_archive_is_read_as_far_as_it_goes(corpus: tuple[Path, list[Any]]) -> None:
    folder, cases = corpus
    archives = [case for case in cases if case.source != "images"]
    assert len({case.source for case in archives}) >= 18
    assert wrong(folder, archives) == []


def test_nothing_counts_that_the_corpus_does_not_name(corpus: tuple[Path, list[Any]]) -> None:
    folder, cases = corpus
    named = {case.name for case in cases if case.source == "images" and (case.size or case.reason)}
    source = open_source(str(folder / "images"))
    assert {*source.names, *(name for name, _ in source.skipped)} == named


def test_check_names_each_that_is_skipped(corpus: tuple[Path, list[Any]], tmp_path: Path) -> None:
    """The command line, on the whole tree, and on the folders whose skipped files it lists in full."""
    folder, cases = corpus
    images = [case for case in cases if case.source == "images"]
    env = os.environ | {"UNLABEL_CACHE": str(tmp_path / "cache")}
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "ssl")])

    def check(*spec: str) -> str:
        command = [sys.executable, "-m", "unlabel", "check", str(folder.joinpath(*spec))]
        done = subprocess.run(command, env=env, capture_output=True, text=True, errors="replace", timeout=60)
        assert done.returncode == 0, done.stderr[-2000:]
        assert "Traceback" not in done.stderr
        return done.stdout

    listed = [case for case in images if case.reason and not case.size]
    found = re.search(r"([\d,]+) can be read, ([\d,]+) broken", check("images"))
    assert found is not None
    read, broken = (int(n.replace(",", "")) for n in found.groups())
    assert read + broken == sum(bool(case.size or case.reason) for case in images)
    assert broken >= len(listed)
    for part in ("places", "animated", "tiff", "ppm"):
        names = [case.name.removeprefix(f"{part}/") for case in listed if case.name.startswith(f"{part}/")]
        text = check("images", part)
        assert names
        assert [name for name in names if f"{printable(name)}: " not in text] == []
    text = check("archives", "odd.tar.gz")
    assert [
        c.name for c in cases if c.source == "archives/odd.tar.gz" and c.reason and f"{printable(c.name)}: " not in text
    ] == []


@pytest.mark.parametrize(("size", "blocks"), [((61, 45), 0), ((64, 64), 2), ((9, 9), 0), ((640, 480), 0)])
def test_a_whole_jpeg_is_never_taken_for_one_that_is_completed(size: tuple[int, int], blocks: int) -> None:
    """Also where it ends in one colour; and one that is completed is found wherever its data end."""
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))
    picture.paste((250, 250, 250), (0, size[1] // 2, *size))
    for options in ({}, {"progressive": True}, {"optimize": True}, {"subsampling": 0}, {"subsampling": 1}):
        for mode in ("RGB", "L", "CMYK"):
            data = io.BytesIO()
            picture.convert(mode).save(data, "JPEG", quality=90, restart_marker_blocks=blocks, **options)
            assert decode(data.getvalue()).size == size
            shape, reduced = decode_reduced(data.getvalue(), 100)
            assert (shape, reduced.size) == (size, tuple(-(-n // (4 if min(size) >= 400 else 1)) for n in size))
            if "progressive" not in options and not blocks:
                whole = data.getvalue()
                for share in (0.4, 0.7):
                    start = whole.index(b"\xff\xda") + 14
                    cut = whole[: start + int((len(whole) - start) * share)].rstrip(b"\xff") + b"\xff\xd9"
                    for at_least in (None, 100, 200):
                        with pytest.raises(BrokenImage, match="truncated"):
                            decode_reduced(cut, at_least)


@pytest.mark.parametrize("subsampling", [0, 1, 2])
def test_a_jpeg_that_lacks_its_last_bytes_is_found_at_a_part_of_its_size_too(subsampling: int) -> None:
    """Only its last blocks are made up, and those are a few pixels of an image that is decoded so."""
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (480, 640, 3), dtype=np.uint8))
    data = io.BytesIO()
    picture.save(data, "JPEG", quality=90, subsampling=subsampling)
    whole, found = data.getvalue(), 0
    for lacking in range(3, 360, 9):
        cut = whole[: -2 - lacking].rstrip(b"\xff") + b"\xff\xd9"
        is_cut = []
        for at_least in (None, 100, 200):
            try:
                decode_reduced(cut, at_least)
                is_cut.append(False)
            except BrokenImage:
                is_cut.append(True)
        assert all(is_cut) or not is_cut[0], lacking
        found += is_cut[0]
    assert found > 10


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="measured by Linux alone")
def test_a_large_image_of_numbers_takes_bounded_memory() -> None:
    """100 million pixels of 16 bits: 200 MB, and as RGB 400 MB; in numbers of eight bytes it would be far more."""
    code = """
import struct, zlib
from pathlib import Path
from unlabel.decode import decode
pack = zlib.compressobj(1)
body = b"".join(pack.compress(bytes(20001)) for _ in range(10000)) + pack.flush()
def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
head = chunk(b"IHDR", struct.pack(">IIBBBBB", 10000, 10000, 16, 0, 0, 0, 0))
image = decode(b"\\x89PNG\\r\\n\\x1a\\n" + head + chunk(b"IDAT", body) + chunk(b"IEND", b""))
assert image.size == (10000, 10000) and image.getpixel((5, 5)) == (0, 0, 0)
print(next(line.split()[1] for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")))
"""
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "ssl")])}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 1_100_000  # kB


def test_a_file_larger_than_any_image_is_not_read_into_memory(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    with open(tmp_path / "b.png", "wb") as file:
        file.truncate(2 << 30)
    assert open_source(str(tmp_path)).skipped == [("b.png", "too large: 2.1 GB")]


@pytest.mark.parametrize(
    "results",
    [
        "[" * 100_000,
        '{"summary": [{"arm": ["a"], "mean": 0.5}]}',
        json.dumps({"provenance": {"runs": {"a": [{"path": "9" * 400}]}}}),
    ],
    ids=["deep", "list for a name", "long path"],
)
def test_a_report_of_what_a_stranger_wrote_is_made_or_refused_in_one_line(tmp_path: Path, results: str) -> None:
    (tmp_path / "results.json").write_text(results)
    message = "results.json"
    try:
        assert write_report(tmp_path).is_file()
    except UserError as error:
        message = str(error)
    assert "results.json" in message
    assert "\n" not in message


@pytest.mark.filterwarnings("ignore")
def test_mutated_files_are_read_or_refused(corpus: tuple[Path, list[Any]], tmp_path: Path) -> None:
    """A few of what scripts/fuzz.py does, in this process."""
    for group in (fuzz.image_readers, fuzz.archive_readers):
        for name, reader in group(corpus[0]).items():
            for k in range(12):
                folder = tmp_path / f"{name}-{k}"
                folder.mkdir()
                what = reader.make(folder, random.Random(f"{name}/{k}"))
                try:
                    reader.read(folder)
                except (UserError, *reader.refusals):
                    pass
                except Exception as error:
                    pytest.fail(f"{name} {k} {what}: {error!r}")


def test_what_the_fuzz_script_changes_is_read_unchanged(corpus: tuple[Path, list[Any]], tmp_path: Path) -> None:
    """Of what would be refused as it is, no change would be tested."""
    read = 0
    for group in fuzz.GROUPS:
        for reader in group(corpus[0]).values():
            for sample in reader.samples:
                (folder := tmp_path / str(read)).mkdir()
                reader.write(folder, sample)
                reader.read(folder)
                read += 1
    assert read > 20


def test_the_fuzz_script_survives_a_hang_a_crash_and_hunger(corpus: tuple[Path, list[Any]], tmp_path: Path) -> None:
    """A reading process that dies or hangs is a failure of its file, and the next file is read."""
    traps = """
def sleep(folder): time.sleep(60)
def fault(folder): os.kill(os.getpid(), 11)
def hungry(folder): bytes(5 << 30)
"""
    wrapper = tmp_path / "fuzz.py"
    wrapper.write_text(
        (ROOT / "scripts" / "fuzz.py").read_text().replace("parents[1]", f"parents[1] and Path({str(ROOT)!r})")
        .replace("        reader.read(folder)", "        (sleep, fault, hungry, reader.read)[min(i, 3)](folder)")
        .replace("def rss(", f"{traps}\n\ndef rss(")
    )  # fmt: skip
    fuzz.__file__, fuzz.SECONDS = str(wrapper), 1.0
    out = tmp_path / "out"
    out.mkdir()
    done = fuzz.watch("image: ppm", 0, 6, 0, corpus[0], out, float("inf"))
    assert [one["outcome"] for one in done[:3]] == ["failed"] * 3
    assert "longer than 1 s" in done[0]["error"]
    assert "died (-11)" in done[1]["error"]
    assert "MemoryError" in done[2]["error"]
    assert [one["i"] for one in done] == list(range(6))
    assert {one["outcome"] for one in done[3:]} <= {"read", "refused"}
    assert len(list(out.iterdir())) == 3


@pytest.mark.parametrize(
    "about",
    [
        "[" * 100_000,
        "[]",
        '{"classes": ["a"], "backbone": []}',
        '{"classes": ["a"], "backbone": {"name": "x", "image_size": 1e999}}',
    ],
    ids=["deep", "list", "list for a backbone", "infinite"],
)
def test_a_classifier_that_a_stranger_described_is_refused(tmp_path: Path, about: str) -> None:
    (tmp_path / "classifier.json").write_text(about)
    (tmp_path / "classifier.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match=r"classifier\.json cannot be read"):
        load_classifier(tmp_path)
    stored_key(tmp_path)


def test_a_packed_archive_cannot_take_memory_for_a_name(tmp_path: Path) -> None:
    """A name of 64 MB takes a few kilobytes in a .tar.gz."""
    header = tarfile.TarInfo("././@LongLink")
    header.type, header.size = tarfile.GNUTYPE_LONGNAME, 64 << 20
    good = tarfile.TarInfo("good.png")
    good.size = 3
    member = good.tobuf() + b"abc".ljust(512, b"\0")
    with gzip.open(tmp_path / "x.tar.gz", "wb", compresslevel=1) as file:
        file.write(member + header.tobuf(tarfile.GNU_FORMAT) + bytes(64 << 20) + member + bytes(10240))
    tracemalloc.start()
    source = open_source(str(tmp_path / "x.tar.gz"))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert source.names == ["good.png"]
    assert "truncated or damaged at 'good.png'" in source.skipped[0][1]
    assert peak < 8 << 20
