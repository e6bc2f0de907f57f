import io
import os
import struct
import tarfile
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from unlabel.cache import load_cache
from unlabel.errors import UserError
from unlabel.sources import DATASETS, Source, open_source, own_test_split


def image_bytes(seed: int, size: tuple[int, int] = (12, 9), kind: str = "PNG") -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


TREE = {
    "cat/a.png": image_bytes(0),
    "cat/deep/er/b.jpg": image_bytes(1, kind="JPEG"),
    "dog/c.png": image_bytes(2, (20, 30)),
    "dog/no_suffix": image_bytes(3),
    "dog/Grüße 猫.png": image_bytes(4),
}


def make_folder(root: Path, tree: dict[str, bytes] = TREE) -> Path:
    for name, data in tree.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return root


def make_tar(path: Path, tree: dict[str, bytes] = TREE, prefix: str = "") -> Path:
    mode = {".gz": "w:gz", ".tgz": "w:gz", ".xz": "w:xz", ".bz2": "w:bz2"}.get(path.suffix, "w")
    with tarfile.open(path, mode) as tar:  # pyright: ignore[reportArgumentType, reportCallIssue]
        for name, data in tree.items():
            add(tar, prefix + name, data)
    return path


def add(tar: tarfile.TarFile, name: str, data: bytes = b"", **attributes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    for key, value in attributes.items():
        setattr(member, key, value)
    tar.addfile(member, io.BytesIO(data))


def contents(source: Source) -> dict[str, bytes]:
    return {source.names[i]: load() for i, load in source.read()}


@pytest.fixture(autouse=True)
def cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UNLABEL_CACHE", str(tmp_path / "cache"))


def test_what_only_looks_like_an_image_among_images(tmp_path: Path) -> None:
    """Also once the suffix is known: a folder, a pipe, a link to a file and one to nowhere."""
    images = [f"{k:02d}.png" for k in range(40)]
    for name in images:
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "folder.png" / "inner.png").write_bytes(b"xy")
    (tmp_path / "linked.png").symlink_to(tmp_path / "00.png")
    (tmp_path / "nowhere.png").symlink_to(tmp_path / "gone")
    os.mkfifo(tmp_path / "pipe.png")
    source = open_source(str(tmp_path))
    assert source.names == [*images, "folder.png/inner.png", "linked.png"]
    assert sorted(source.skipped) == [("nowhere.png", "link to nowhere"), ("pipe.png", "not a regular file")]


def test_images_of_one_name_are_ordered_by_size(tmp_path: Path) -> None:
    for folder, size in (("a", 3), ("b", 2), ("c", 1)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "same.png").write_bytes(bytes(size))
    for order in ("abc", "cab"):
        source = open_source([str(tmp_path / folder) for folder in order])
        assert source.sizes.tolist() == [1, 2, 3]
        assert [Path(entry.path).parent.name for entry in source.entries] == ["c", "b", "a"]


def test_a_plain_archive_whose_first_name_begins_as_bzip2_does(tmp_path: Path) -> None:
    for folder in ("BZ", "BZh9"):
        tree = {f"{folder}/{k}.jpg": data for k, data in enumerate(TREE.values())}
        for name in ("plain.tar", "packed.tar.bz2"):
            assert contents(open_source(str(make_tar(tmp_path / f"{folder}-{name}", tree)))) == tree


def test_folder_and_archives_of_one_tree_are_one_source(tmp_path: Path) -> None:
    sources = [str(make_folder(tmp_path / "folder"))]
    backwards = dict(reversed(TREE.items()))
    sources.append(str(make_tar(tmp_path / "x.tar", backwards)))
    sources.append(str(make_tar(tmp_path / "x.tar.gz", backwards, prefix="./")))
    sources.append(str(make_tar(tmp_path / "x.tgz")))
    make_tar(tmp_path / "s-000.tar", dict(list(TREE.items())[:2]))
    make_tar(tmp_path / "s-001.tar", dict(list(TREE.items())[2:]))
    sources += [str(tmp_path / pattern) for pattern in ("s-{000..001}.tar", "s-*.tar", "s-{001,000}.tar")]
    (tmp_path / "gz.tar").write_bytes((tmp_path / "x.tar.gz").read_bytes())  # compressed, whatever its name
    sources.append(str(tmp_path / "gz.tar"))

    opened = [open_source(spec) for spec in sources]
    for source in opened:
        assert contents(source) == TREE
        assert source.names == sorted(TREE)
        assert source.sizes.tolist() == [len(TREE[name]) for name in sorted(TREE)]
        assert source.labels == ["cat", "cat", "dog", "dog", "dog"]
        assert source.fingerprint == opened[0].fingerprint
        assert source.content_sample() == opened[0].content_sample()
        assert source.short_side() == 9
        assert source.skipped == []
        some = dict(source.read([3, 0]))
        assert {i: load() for i, load in some.items()} == {i: TREE[source.names[i]] for i in (0, 3)}


def test_fingerprint_changes_with_a_name_or_a_size_but_not_with_the_place(tmp_path: Path) -> None:
    base = open_source(str(make_folder(tmp_path / "a")))
    assert open_source(str(make_folder(tmp_path / "else" / "where"))).fingerprint == base.fingerprint
    renamed = {name.replace("a.png", "z.png"): data for name, data in TREE.items()}
    assert open_source(str(make_folder(tmp_path / "b", renamed))).fingerprint != base.fingerprint
    grown = TREE | {"cat/a.png": TREE["cat/a.png"] + b"0"}
    assert open_source(str(make_folder(tmp_path / "c", grown))).fingerprint != base.fingerprint


def test_content_sample_tells_apart_what_agrees_in_names_and_sizes(tmp_path: Path) -> None:
    def bmp(seed: int) -> dict[str, bytes]:
        return {"1.bmp": image_bytes(seed, kind="BMP")}

    a = open_source(str(make_folder(tmp_path / "a", bmp(0))))
    b = open_source(str(make_folder(tmp_path / "b", bmp(1))))
    assert a.fingerprint == b.fingerprint
    assert a.content_sample() != b.content_sample()


def test_what_is_no_image_is_left_out_and_counted(tmp_path: Path) -> None:
    others = dict.fromkeys(["notes.txt", "labels.csv", "cat/data.json", "cat/README", "x.JPG.bak"], b"text")
    hidden = dict.fromkeys([".DS_Store", "cat/._a.png", "Thumbs.db", ".git/x.png", "__MACOSX/cat/a.png"], b"x")
    tree = TREE | others | hidden | {"BIG.JPG": image_bytes(5, kind="JPEG")}
    for spec in (make_folder(tmp_path / "f", tree), make_tar(tmp_path / "x.tar", tree)):
        source = open_source(str(spec))
        assert source.names == sorted([*TREE, "BIG.JPG"])
        assert source.ignored == len(others)
        assert source.labels is None  # BIG.JPG lies in no class folder
        with pytest.raises(UserError, match=r"'BIG\.JPG' is not in a class folder"):
            source.require_labels()


@pytest.mark.skipif(os.name == "nt", reason="links need a privilege on Windows")
def test_directory_links_are_followed_once(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "root")
    outside = make_folder(tmp_path / "outside", {"x.png": image_bytes(8), "sub/y.png": image_bytes(9)})
    (root / "a_first").symlink_to(root / "cat")  # sorts before the real folder, whose name must win
    (root / "dog" / "up").symlink_to(root)
    (root / "loop").symlink_to(root / "loop")
    (root / "bird").symlink_to(outside)
    (root / "bird2").symlink_to(outside)
    (outside / "sub" / "back").symlink_to(root)
    (root / "dog" / "link.png").symlink_to(root / "cat" / "a.png")
    (root / "dog" / "gone.png").symlink_to(root / "nothing.png")
    os.mkfifo(root / "pipe.png")
    source = open_source(str(root))
    assert source.names == sorted([*TREE, "bird/x.png", "bird/sub/y.png", "dog/link.png"])
    assert contents(source)["dog/link.png"] == TREE["cat/a.png"]
    assert ("dog/gone.png", "link to nowhere") in source.skipped
    assert ("pipe.png", "not a regular file") in source.skipped


@pytest.mark.skipif(os.name == "nt", reason="Windows names are text")
def test_odd_names_are_listed_and_read(tmp_path: Path) -> None:
    names = [b"cat/new\nline.png", b"cat/tab\t.png", b"cat/\xff\xfe.png", b"dog/\x1b[31m.png"]
    tree = {os.fsdecode(name): image_bytes(i) for i, name in enumerate(names)}
    folder = make_folder(tmp_path / "f", tree)
    tar = tmp_path / "x.tar"
    with tarfile.open(tar, "w") as archive:
        archive.add(folder, arcname=".")
    a, b = open_source(str(folder)), open_source(str(tar))
    assert contents(a) == contents(b) == tree
    assert a.fingerprint == b.fingerprint


@pytest.mark.parametrize("suffix", [".tar", ".tar.gz"])
def test_unsafe_members_are_listed_and_never_reached(tmp_path: Path, suffix: str) -> None:
    (tmp_path / "secret.png").write_bytes(image_bytes(7))
    path = tmp_path / f"x{suffix}"
    with tarfile.open(path, "w:gz" if suffix == ".tar.gz" else "w") as tar:
        add(tar, "cat/good.png", image_bytes(0))
        add(tar, "../secret.png", image_bytes(1))
        add(tar, "cat/../../secret.png", image_bytes(1))
        add(tar, str(tmp_path / "secret.png"), image_bytes(1))
        add(tar, "C:\\secret.png", image_bytes(1))
        add(tar, "cat/soft.png", type=tarfile.SYMTYPE, linkname="../../secret.png")
        add(tar, "cat/hard.png", type=tarfile.LNKTYPE, linkname="cat/good.png")
        add(tar, "cat/device.png", type=tarfile.CHRTYPE)
        add(tar, "cat/pipe.png", type=tarfile.FIFOTYPE)
        add(tar, "dog/good.png", image_bytes(2))
        add(tar, "cat/good.png", image_bytes(3))  # appended later: replaces the first, as in unpacking
    source = open_source(str(path))
    assert contents(source) == {"cat/good.png": image_bytes(3), "dog/good.png": image_bytes(2)}
    reasons = dict(source.skipped)
    assert len(reasons) == 8
    assert {name for name, reason in reasons.items() if reason.startswith("link")} == {"cat/soft.png", "cat/hard.png"}
    assert sum(reason == "name that leaves the archive" for reason in reasons.values()) == 2
    assert sum(reason == "absolute name" for reason in reasons.values()) == 2
    assert sorted(p.name for p in tmp_path.iterdir()) == ["secret.png", f"x{suffix}"]


@pytest.mark.parametrize("suffix", [".tar", ".tar.gz", ".tar.xz"])
def test_what_is_whole_in_a_truncated_archive_is_read(tmp_path: Path, suffix: str, capsys) -> None:
    tree = {f"cat/{i:02d}.png": image_bytes(i, (40, 40)) for i in range(40)}
    whole = make_tar(tmp_path / f"whole{suffix}", tree)
    data = whole.read_bytes()
    assert open_source(str(whole)).skipped == []
    previous = len(tree) + 1
    for share in (0.9, 0.7, 0.5):
        cut = tmp_path / f"cut{suffix}"
        cut.write_bytes(data[: int(len(data) * share)])
        source = open_source(str(cut))
        found = contents(source)
        assert found == {name: tree[name] for name in found}
        assert 0.4 * len(tree) * share < len(found) < previous
        previous = len(found) + 1
        [(name, reason)] = source.skipped
        assert name == f"cut{suffix}"
        assert "truncated" in reason
        load_cache(source, 32, max_skipped=1, write=False)
        assert "what else it holds is missing, and not counted as skipped" in capsys.readouterr().out


def test_an_archive_cut_between_members_or_damaged_inside_says_so(tmp_path: Path) -> None:
    tree = {f"{i}.png": image_bytes(i) for i in range(3)}
    data = make_tar(tmp_path / "x.tar", tree).read_bytes()
    with tarfile.open(tmp_path / "x.tar") as tar:
        third = tar.getmembers()[2].offset
    for damaged in (data[:third], data[:third] + b"\x07" * 512 + data[third + 512 :]):
        (tmp_path / "y.tar").write_bytes(damaged)
        source = open_source(str(tmp_path / "y.tar"))
        assert source.names == ["0.png", "1.png"]
        assert "truncated or damaged at 'the end', after 2 images" in source.skipped[0][1]


def test_labels_from_a_csv(tmp_path: Path) -> None:
    folder = str(make_folder(tmp_path / "f"))
    csv = tmp_path / "labels.csv"

    def labelled(text: str, encoding: str = "utf-8") -> dict[str, str]:
        csv.write_text(text, encoding=encoding)
        source = open_source(folder, csv)
        return dict(zip(source.names, source.require_labels(), strict=True))

    expected = {"cat/a.png": "good", "dog/c.png": "bad", "dog/Grüße 猫.png": "good"}
    rows = "cat/a.png,good\nc.png,bad\n./dog\\Grüße 猫.png, good \n"
    assert labelled(rows) == expected
    assert labelled("name,label\n" + rows) == expected
    assert labelled("Filename;Label\r\n" + rows.replace(",", ";"), "utf-8-sig") == expected
    assert labelled("label,name\ngood,a.png\nbad,c.png\n") == {"cat/a.png": "good", "dog/c.png": "bad"}
    assert labelled(rows + "dog/no_suffix,\n\n") == expected  # not labelled yet
    assert open_source(folder, csv).left_out == 2

    for text, message in [
        ("a.png,x\nnope.png,y\nnor.png,y\n", r"2 names in .* are not in the source: 'nope.png', 'nor.png'"),
        ("a.png,x\ncat/a.png,y\n", r"'cat/a.png' both as 'x' and as 'y'"),
        ("a.png\n", "without a label column"),
        ("", "holds no labels"),
        ("id,filename\n1,a.png\n", "without a label column"),
        ("a.png,x\nc.png,x\n", "only one class, 'x'"),
    ]:
        with pytest.raises(UserError, match=message):
            labelled(text)
    assert labelled("a.png,target\nc.png,distractor\n") == {"cat/a.png": "target", "dog/c.png": "distractor"}
    assert labelled("id,filename,label\n7,a.png,x\n8,c.png,y\n") == {"cat/a.png": "x", "dog/c.png": "y"}
    assert labelled("id,image,breed\n7,a.png,x\n8,c.png,y\n") == {"cat/a.png": "x", "dog/c.png": "y"}
    assert labelled('a.png, "x"\nc.png, "y"\n') == {"cat/a.png": "x", "dog/c.png": "y"}
    composed = "dog/Grüße 猫.png"
    assert labelled(unicodedata.normalize("NFD", f"{composed},x\n") + "a.png,y\n") == {composed: "x", "cat/a.png": "y"}
    odd = [" a.png", "b;c;d.png"] + ([] if os.name == "nt" else ["e\\f.png"])
    make_folder(tmp_path / "g", {name: image_bytes(7) for name in [*odd, "g.png"]})
    csv.write_text("".join(f'"{name}",x\n' for name in odd[::-1]) + "g.png,y\n")
    source = open_source(str(tmp_path / "g"), csv)
    assert dict(zip(source.names, source.require_labels(), strict=True)) == dict.fromkeys(odd, "x") | {"g.png": "y"}

    make_folder(tmp_path / "f", {"dog/a.png": image_bytes(6)})
    with pytest.raises(UserError, match="stands for several images"):
        labelled("a.png,x\n")
    assert labelled("cat/a.png,x\ndog/a.png,y\n") == {"cat/a.png": "x", "dog/a.png": "y"}


def test_a_row_belongs_to_the_source_whose_whole_name_it_is(tmp_path: Path) -> None:
    """And not to an image in a folder of the other source that is called so."""
    train = str(make_folder(tmp_path / "train", {f"2023/IMG_{i}.png": image_bytes(i) for i in (1, 2, 9)}))
    test = str(make_folder(tmp_path / "test", {f"IMG_{i}.png": image_bytes(10 + i) for i in (1, 3)}))
    (csv := tmp_path / "labels.csv").write_text("2023/IMG_9.png,cat\nIMG_2.png,dog\nIMG_1.png,dog\n./IMG_3.png,cat\n")

    def labelled(one: str, other: str) -> dict[str, str]:
        source = open_source(one, csv, elsewhere=open_source(other).names)
        return dict(zip(source.names, source.require_labels(), strict=True))

    assert labelled(train, test) == {"2023/IMG_9.png": "cat", "2023/IMG_2.png": "dog"}
    assert labelled(test, train) == {"IMG_1.png": "dog", "IMG_3.png": "cat"}
    csv.write_text("2023/IMG_1.png,cat\n2023/IMG_2.png,dog\n")
    assert labelled(train, test) == {"2023/IMG_1.png": "cat", "2023/IMG_2.png": "dog"}
    with pytest.raises(UserError, match=r"no labels of images such as 'IMG_1.png', only of the other source's"):
        labelled(test, train)


def test_a_labelled_image_that_cannot_be_opened_is_there(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "f", {f"{i}.png": image_bytes(i) for i in range(3)})
    (folder / "2.png").unlink()
    (folder / "2.png").symlink_to(tmp_path / "gone.png")
    (csv := tmp_path / "labels.csv").write_text("0.png,a\n1.png,b\n2.png,b\n")
    source = open_source(str(folder), csv)
    assert (source.names, source.skipped) == (["0.png", "1.png"], [("2.png", "link to nowhere")])


def test_links_in_an_archive_that_are_no_images_are_as_in_a_folder(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        add(tar, "0.png", image_bytes(0))
        for name in ("notes.txt", ".current", "link.png"):
            add(tar, name, type=tarfile.SYMTYPE, linkname="0.png")
    source = open_source(str(tmp_path / "x.tar"))
    assert ([name for name, _ in source.skipped], source.ignored) == (["link.png"], 1)


def test_what_is_not_labelled_may_be_broken(tmp_path: Path) -> None:
    """One link among the unlabelled is no hundredth of sixty labels."""
    archive = make_tar(tmp_path / "x.tar", {f"{i}.png": image_bytes(i) for i in range(20)})
    with tarfile.open(archive, "a") as tar:
        link = tarfile.TarInfo("link.png")
        link.type, link.linkname = tarfile.SYMTYPE, "0.png"
        tar.addfile(link)
    (tmp_path / "labels.csv").write_text("0.png,a\n1.png,b\n")
    assert [name for name, _ in open_source(str(archive)).skipped] == ["link.png"]
    assert open_source(str(archive), tmp_path / "labels.csv").skipped == []


def test_several_sources_are_one_and_their_order_does_not_matter(tmp_path: Path) -> None:
    a = str(make_folder(tmp_path / "a"))
    b = str(make_tar(tmp_path / "b.tar.gz", {"cat/z.png": image_bytes(8), "0.png": image_bytes(9)}))
    ab, ba = open_source([a, b]), open_source([b, a])
    assert len(ab) == len(TREE) + 2
    assert (ab.names, ab.fingerprint) == (ba.names, ba.fingerprint)
    assert contents(ab) == contents(ba) == TREE | {"cat/z.png": image_bytes(8), "0.png": image_bytes(9)}


def test_digits_is_embedded_and_a_path_wins_over_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sklearn.datasets import load_digits

    source = open_source("digits")
    digits = load_digits()
    targets = digits.target  # pyright: ignore[reportAttributeAccessIssue]
    assert len(source) == 1797
    assert source.short_side() == 8
    assert source.require_labels() == [str(t) for t in sorted(targets)]
    pixels = {int(source.names[i][2:8]): load() for i, load in source.read()}
    image = np.asarray(Image.open(io.BytesIO(pixels[100])))
    expected = digits.images[100] * 255 / 16  # pyright: ignore[reportAttributeAccessIssue]
    assert np.abs(image - expected).max() <= 0.5

    monkeypatch.chdir(tmp_path)
    make_folder(tmp_path / "digits")
    assert open_source("digits").names == sorted(TREE)
    assert own_test_split("digits") is None
    assert own_test_split("mnist") == "mnist:test"
    assert own_test_split("mnist:train") == "mnist:test"
    assert own_test_split("mnist:test") is None
    make_folder(tmp_path / "mnist")
    assert own_test_split("mnist") is None


def test_named_sets_are_read_from_where_they_were_downloaded(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    images, targets = rng.integers(0, 256, (4, 28, 28), dtype=np.uint8), np.array([7, 0, 9, 0], np.uint8)
    for name, inner, label in (("mnist", "MNIST", "7"), ("fashion-mnist", "FashionMNIST", "Sneaker")):
        for split in ("train", "t10k"):
            raw = tmp_path / "cache" / "datasets" / name / inner / "raw"
            raw.mkdir(parents=True, exist_ok=True)
            shape = struct.pack(">IIII", 0x803, 4, 28, 28)
            (raw / f"{split}-images-idx3-ubyte").write_bytes(shape + images.tobytes())
            (raw / f"{split}-labels-idx1-ubyte").write_bytes(struct.pack(">II", 0x801, 4) + targets.tobytes())
        for spec in (name, f"{name}:train", f"{name}:test"):
            source = open_source(spec)
            assert len(source) == 4
            data = contents(source)[f"{label}/000000.ppm"]
            np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(data))), images[0])


def test_no_network_is_said_plainly(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for variable in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(variable, "http://127.0.0.1:9")
    for variable in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(variable, raising=False)
    for spec in ("mnist", "cifar10:test", "pets", "stl10:unlabeled"):
        with pytest.raises(UserError, match=r"cannot download .* check the network, or give a folder") as caught:
            open_source(spec)
        assert "\n" not in str(caught.value)
    assert "downloading mnist into" in capsys.readouterr().err


def test_every_named_set_has_a_line_of_text() -> None:
    assert list(DATASETS) == ["digits", "mnist", "fashion-mnist", "cifar10", "stl10", "pets"]
    assert all(text and "\n" not in text for text in DATASETS.values())


def test_mistakes_are_one_line_that_says_what_to_do(tmp_path: Path) -> None:
    make_folder(tmp_path / "empty" / "sub", {"notes.txt": b"x"})
    (tmp_path / "bad.tar").write_bytes(b"this is no tar" * 100)
    (tmp_path / "zero.tar").write_bytes(b"")
    make_tar(tmp_path / "none.tar", {"a.txt": b"x"})
    make_tar(tmp_path / "s-0.tar")
    (tmp_path / "photo.jpg").write_bytes(image_bytes(0))
    (tmp_path / "photos.zip").write_bytes(b"PK")
    for spec, message in [
        ("nothing/here", "no file, folder or data set 'nothing/here'"),
        ("digits:test", "digits has no split 'test'"),
        (str(tmp_path / "empty"), "no images in .*; 1 other files were ignored"),
        (str(tmp_path / "bad.tar"), "not a readable tar archive"),
        (str(tmp_path / "zero.tar"), "not a readable tar archive"),
        (str(tmp_path / "none.tar"), "no images in"),
        (str(tmp_path / "photo.jpg"), "is one file, not a source"),
        (str(tmp_path / "photos.zip"), "is one file, not a source"),
        (str(tmp_path / "s-{0..2}.tar"), r"2 of .* not found, the first is .*s-1\.tar"),
        (str(tmp_path / "t-*.tar"), "not found"),
        (str(tmp_path / "photo*"), r"stands for .*photo\.jpg, which is no \.tar"),
    ]:
        with pytest.raises(UserError, match=message) as caught:
            open_source(spec)
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="only one class, 'cat'"):
        open_source(str(make_folder(tmp_path / "one", {"cat/a.png": image_bytes(0)}))).require_labels()
    with pytest.raises(UserError, match="no image is in a class folder"):
        open_source(str(make_folder(tmp_path / "flat", {"a.png": image_bytes(0)}))).require_labels()


def test_listing_the_data_sets_loads_nothing_heavy(tmp_path: Path) -> None:
    import subprocess
    import sys

    code = (
        "import sys, unlabel.named as s; assert s.DATASETS; "
        "print([m for m in ('torch', 'torchvision', 'sklearn', 'PIL', 'numpy') if m in sys.modules])"
    )
    root = Path(__file__).parents[1]
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(root), str(root / "ssl")])}
    done = subprocess.run([sys.executable, "-c", code], env=env, cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr
