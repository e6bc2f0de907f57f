from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from unlabel.check import check, render, run_check
from unlabel.errors import UserError
from unlabel.sources import open_source


@pytest.fixture(autouse=True)
def cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UNLABEL_CACHE", str(tmp_path / "cache"))


def scene(seed: int, width: int = 64, height: int = 48) -> Image.Image:
    small = Image.fromarray(np.random.default_rng(seed).integers(0, 256, (12, 12, 3), dtype=np.uint8))
    return small.resize((width, height), Image.Resampling.BICUBIC)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "photos"
    for name, image in {
        "cat/a.png": scene(0),
        "cat/b.png": scene(1, 80, 80),
        "cat/a copy.png": scene(0),
        "dog/c.png": scene(2, 200, 100),
        "dog/b mirrored.png": scene(1, 80, 80).transpose(Image.Transpose.FLIP_LEFT_RIGHT),
        "dog/d.png": scene(3),
    }.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        image.save(root / name)
    (root / "dog" / "bad\x1b.png").write_bytes(b"")
    (root / "dog" / "notes.txt").write_text("x")
    return root


def test_the_report_counts_everything(folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    scene(3).save(other / "leak.png")
    scene(2, 200, 100).transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(other / "mirrored.png")
    scene(9).save(other / "new.png")
    report = check(open_source(str(folder)), open_source(str(other)), progress=False)
    assert report["images"] == 6
    assert report["ignored"] == 1
    assert report["classes"] == {"cat": 3, "dog": 3}
    assert report["short_side"] == {"min": 48, "median": 64, "max": 100}
    assert report["not_square"] == 4
    assert report["broken"] == [("dog/bad\x1b.png", "empty file")]
    assert report["exact"] == [["cat/a copy.png", "cat/a.png"]]
    assert report["near"] == [["cat/b.png", "dog/b mirrored.png"]]
    assert report["label_conflicts"] == [["cat/b.png", "dog/b mirrored.png"]]
    assert report["against"]["leaks"] == [("dog/c.png", "mirrored.png"), ("dog/d.png", "leak.png")]
    assert report["against"]["exact"] == 1

    text = render(report)
    for part in (
        "6 can be read, 1 broken; 1 other files ignored",
        "short side 48 to 100 pixels, median 64; 4 are not square",
        "cat 3, dog 3",
        "dog/bad\\x1b.png: empty file",
        "cat/a copy.png = cat/a.png",
        "1 groups of copies with different labels",
        "2 images are also there, 1 of them pixel by pixel",
        "dog/d.png = leak.png",
    ):
        assert part in text
    assert "\x1b" not in text


def test_an_unlabelled_source_without_flaws(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for i in range(3):
        scene(i).save(tmp_path / f"{i}.png")
    assert run_check(str(tmp_path)) == 0
    out = capsys.readouterr().out
    assert "3 can be read, 0 broken" in out
    assert "fine for pretraining" in out
    assert "contradictions" not in out
    assert "against" not in out


def test_nothing_to_look_at_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"x")
    (tmp_path / "b.heic").write_bytes(b"\0\0\0\x18ftypheic" + bytes(range(40)))
    with pytest.raises(UserError, match=r"2 of 2 images .*a.png: not an image; b.heic: HEIC or JPEG XL, .* JPEG"):
        run_check(str(tmp_path))


def test_where_nothing_can_be_read_no_limit_would_help(tmp_path: Path) -> None:
    (tmp_path / "f").mkdir()
    for name in ("a.png", "b.png"):
        (tmp_path / "f" / name).write_bytes(b"")
    with pytest.raises(UserError, match=r"2 of 2 images .*\); repair them, or give another source$"):
        check(open_source(str(tmp_path / "f")), progress=False)
