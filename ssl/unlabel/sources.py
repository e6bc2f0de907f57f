"""Where images come from: a folder, tar archives, or a named data set, all read by index.

A source is a list of images in the order of their names, which are relative to the source and use "/", so
that a folder and an archive of the same tree are the same source. Reading goes in the order of storage, once.
"""

import contextlib
import csv
import functools
import glob
import hashlib
import io
import itertools
import operator
import os
import re
import statistics
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from unlabel.columns import Names
from unlabel.errors import UserError
from unlabel.listing import Entries, Found, joined, list_folder, unpacked
from unlabel.named import DATASETS, SPLITS, cache_root, open_named, own_test_split
from unlabel.stores import Changed, file_state, is_url, patiently
from unlabel.tar_index import in_parallel, list_archives, list_url, url_matches

__all__ = ["DATASETS", "Source", "available_formats", "cache_root", "open_source", "own_test_split"]

# What Pillow may try. Formats without a signature (TGA, PCX) would accept noise; EPS would start Ghostscript.
_FORMATS = ["JPEG", "PNG", "GIF", "BMP", "DIB", "TIFF", "WEBP", "PPM", "JPEG2000", "AVIF", "ICO"]
_ARCHIVE = re.compile(r"\.(tar|tgz|tar\.(gz|bz2|xz))$", re.IGNORECASE)
_HEAD_BYTES = 1 << 18  # the header of any common image, even behind a colour profile and a thumbnail
_SAMPLE = 200
_MOST_SHARDS = 100_000  # that a pattern may stand for
_MOST_LABELS = 1 << 28  # bytes of a CSV of labels
_NAME_COLUMNS = ("name", "file", "filename", "file_name", "image", "path", "id")
_NFC = functools.partial(unicodedata.normalize, "NFC")


class Source:
    """Images by index, in the order of their names.

    Attributes: `spec` as the user wrote it; `entries`, where each image lies; `names` relative to the source; `sizes`
    (N,) int64 in bytes; `labels` per image (the first-level folder, or from a CSV), None where an image has none;
    `skipped` (name, reason) of what could not even be listed; `ignored`, the number of files that are not images by
    their suffix; `left_out`, the number of images without a label in the CSV; `packed`, whether some are in a
    compressed archive.
    """

    def __init__(
        self,
        spec: str,
        entries: Entries,
        skipped: Sequence[tuple[str, str]] = (),
        ignored: int = 0,
        csv_labels: dict[str, str] | None = None,
    ) -> None:
        names = entries.names
        order = _in_order(names, entries.sizes)
        if csv_labels is not None:
            order = [i for i in (range(len(names)) if order is None else order) if names[i] in csv_labels]
        rows = slice(None) if order is None else np.array(order, np.int64)  # a slice copies nothing
        self.spec = spec
        ordered = names if order is None else [names[i] for i in order]
        self.names = Names(ordered)
        columns = (column[rows] for column in (entries.sizes, entries.offsets, entries.place))
        self.entries = Entries(entries.places, self.names, *columns)
        self.sizes = self.entries.sizes
        self.packed = any(place.packed for place in entries.places)
        self.skipped = [(n, reason) for n, reason in skipped if csv_labels is None or n in csv_labels]
        self.ignored = ignored
        self.left_out = len(names) - len(self.names)
        self.labels: list[str] | None = None
        outside = [] if csv_labels is not None else [name for name in names if "/" not in name]  # in no class folder
        self._outside = (len(outside), min(outside, default=""))
        if csv_labels is not None:
            self.labels = [csv_labels[name] for name in ordered]
        elif not outside:
            one = dict[str, str]()  # string for all images of a class
            self.labels = [one.setdefault(label := name.split("/", 1)[0], label) for name in ordered]

    def __len__(self) -> int:
        return len(self.sizes)

    def require_labels(self) -> list[str]:
        """The label of every image. Raises UserError if one has none or there are fewer than two classes."""
        advice = "put the images of each class in a folder of its own, or give --labels FILE.csv (name,label)"
        if self.labels is None:
            some = "no image is" if self._outside[0] == len(self) else f"{self._outside[1]!r} is not"
            raise UserError(f"{self.spec}: {some} in a class folder; {advice}")
        if len(classes := set(self.labels)) < 2:
            raise UserError(f"{self.spec} has only one class, {classes.pop()!r}, and two are needed; {advice}")
        return self.labels

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 over the sorted (relative name, size): where the images lie does not matter."""
        digest, lines = hashlib.sha256(), zip(self.names, self.sizes.tolist(), strict=True)
        while block := list(itertools.islice(lines, 4096)):
            text = "".join([f"{name}\0{size}\n" for name, size in block])
            digest.update(text.encode("utf-8", "surrogatepass"))
        return digest.hexdigest()

    def read(
        self, indices: Sequence[int] | None = None, limit: int | None = None
    ) -> Iterator[tuple[int, Callable[[], bytes]]]:
        """Each index once, in the order of storage, with a function that gives its bytes or raises OSError.

        The functions may be called in other threads, so that files are read in parallel. A compressed
        archive is unpacked once, by the iteration itself.
        """
        wanted = np.arange(len(self)) if indices is None else np.asarray(indices, np.int64)
        offsets, place_of = self.entries.offsets, self.entries.place
        order = wanted[np.lexsort((wanted, offsets[wanted], place_of[wanted]))]
        for at in np.split(order, np.flatnonzero(np.diff(place_of[order])) + 1) if len(order) else ():
            place = self.entries.places[place_of[at[0]]]
            if not place.packed:
                for i in map(int, at):
                    yield i, functools.partial(_load, self, i, limit)
                continue
            with unpacked(place.path) as stream:
                if place.archive != file_state(place.path):
                    raise Changed(f"{place.path} has changed since it was listed")
                for i in map(int, at):
                    stream.seek(int(offsets[i]))
                    data = stream.read(int(self.sizes[i]))
                    yield i, functools.partial(bytes, data if limit is None else data[:limit])

    @functools.cached_property
    def _sample(self) -> tuple[int | None, str]:
        """Median short side, and SHA-256 of the first bytes, of up to 200 evenly spaced images; one pass."""
        step = max(1, len(self) / _SAMPLE)
        indices = sorted({int(step * i) for i in range(min(_SAMPLE, len(self)))})
        heads: dict[int, bytes] = {}
        for i, load in self.read(indices, _HEAD_BYTES):
            try:
                heads[i] = patiently(load)
            except PermissionError:
                continue
            except OSError as error:
                if any(is_url(place.path) for place in self.entries.places):  # it would be another source than before
                    what = f"cannot read {self.names[i]!r} in {self.spec} at the moment ({error})"
                    raise UserError(f"{what}: try again when it can be read") from None
        sides = [side for i in indices if (side := _short_side(heads.get(i, b"")))]
        if not sides:
            for _, load in self.read(indices):  # some TIFFs keep their header at the end
                with contextlib.suppress(OSError):
                    sides.append(_short_side(load()))
        digest = hashlib.sha256()
        for i in indices:
            digest.update(hashlib.sha256(heads.get(i, b"")).digest())
        sides = [side for side in sides if side]
        return (int(statistics.median(sides)) if sides else None), digest.hexdigest()

    def short_side(self) -> int | None:
        """Median of the images' short sides in pixels, from the headers of up to 200; None if none can be read."""
        return self._sample[0]

    def usual_size(self) -> int:
        """The image size where none is given, in pixels: ``short_side``, from 32 up to 224."""
        return min(224, max(32, self.short_side() or 32))  # where none can be read, packing them says why

    def content_sample(self) -> str:
        """A digest of the first bytes of some images: tells apart what agrees in all names and sizes."""
        return self._sample[1]


def _load(source: Source, i: int, limit: int | None) -> bytes:
    return source.entries[i].load(limit)


def _in_order(names: Sequence[str], sizes: np.ndarray) -> list[int] | None:
    """Rows by name, and where names coincide by size. None if they are in that order: a folder's mostly are."""
    if all(map(operator.lt, names, itertools.islice(names, 1, None))):
        return None
    order = sorted(range(len(names)), key=names.__getitem__)
    if len(set(names)) < len(names):
        order.sort(key=lambda i: (names[i], sizes[i]))
    return order


def open_source(specs: str | Sequence[str], labels: Path | None = None, elsewhere: Sequence[str] = ()) -> Source:
    """The images of one or several SOURCEs together.

    A spec is a folder, a tar archive (compressed or not), a pattern of archives such as
    shards/{000..009}.tar or shards/*.tar, or the name of a data set; what exists on disk wins over a name.
    `labels` is a CSV of name,label; images that are not in it are left out. `elsewhere` are names of another
    source that the CSV may also hold. Names of several sources may coincide.
    Raises UserError for what does not exist, cannot be read, or holds no image.
    """
    specs = [specs] if isinstance(specs, str) else list(specs)
    if not specs:
        raise UserError("no source given; name a folder of images, a .tar, or a data set")
    parts: list[Found] = []
    for spec in specs:
        part = _list_spec(spec)
        if not len(part.entries):
            more = f"; {part.ignored:,} other files were ignored" if part.ignored else ""
            more += f"; {part.skipped[0][0]!r}: {part.skipped[0][1]}" if part.skipped else ""
            raise UserError(f"there are no images in {spec}{more}; give a folder that holds images, at any depth")
        parts.append(part)
    found = joined(parts)
    csv_labels = None
    if labels is not None:  # what could not be listed is there, too, and may have a label
        more = {name for name, _ in found.skipped}.difference(found.entries.names)
        csv_labels = read_labels(Path(labels), [*found.entries.names, *sorted(more)], elsewhere)
    return Source(" ".join(specs), found.entries, found.skipped, found.ignored, csv_labels)


def _list_spec(spec: str) -> Found:
    if os.path.isdir(spec):
        return list_folder(spec)
    if os.path.isfile(spec):
        if not _is_archive(spec):
            raise UserError(f"{spec} is one file, not a source; give the folder that holds it, or a .tar")
        return list_archives([spec])
    if is_url(spec):
        if re.search(r"[*{]", spec):  # ? begins the query of a web address, and [ stands around an IPv6 address
            return list_archives(_expand(spec))
        return list_archives([spec]) if _is_archive(spec) else list_url(spec)
    name, _, split = spec.partition(":")
    if name in DATASETS:
        if (split or "train") not in SPLITS[name]:
            raise UserError(f"{name} has no split {split!r}; it has {', '.join(SPLITS[name])}")
        return open_named(name, split or "train")
    if not re.search(r"[*?{\[]", spec):
        names = ", ".join(DATASETS)
        raise UserError(f"there is no file, folder or data set {spec!r}; check the path (data sets: {names})")
    return list_archives(_expand(spec))


def _is_archive(path: str) -> bool:
    return bool(_ARCHIVE.search(path.split("?", 1)[0] if is_url(path) else path))


def _expand(pattern: str) -> list[str]:
    """Archive paths or URLs from a pattern with {000..009}, {a,b} and *."""

    def braces(text: str) -> list[str]:
        if not (match := re.search(r"\{([^{}]*)\}", text)):
            return [text]
        if numbers := re.fullmatch(r"(\d+)\.\.(\d+)", match[1]):
            low, high = int(numbers[1]), int(numbers[2])
            if high < low:
                raise UserError(f"{{{match[1]}}} in {pattern} counts down; write the smaller number first")
            if len(numbers[2]) > 9 or high - low >= _MOST_SHARDS:
                raise UserError(f"{{{match[1]}}} in {pattern[:100]} stands for more than {_MOST_SHARDS:,} archives")
            width = len(numbers[1]) if len(numbers[1]) == len(numbers[2]) or numbers[1].startswith("0") else 0
            values = [str(i).zfill(width) for i in range(low, high + 1)]
        else:
            values = match[1].split(",")
        found: list[str] = []
        for value in values:
            found += braces(text[: match.start()] + value + text[match.end() :])
            if len(found) > _MOST_SHARDS:
                raise UserError(f"{pattern[:100]} stands for more than {_MOST_SHARDS:,} archives")
        return found

    def matches(path: str) -> list[str]:
        return [path] if os.path.isfile(path) else sorted(glob.glob(path, recursive=True))

    paths, missing, wanted = [], [], braces(pattern)
    for path, hits in zip(wanted, in_parallel(url_matches if is_url(pattern) else matches, wanted), strict=True):
        paths += hits
        missing += [] if hits else [path]
    if missing:
        raise UserError(f"{len(missing)} of {pattern} not found, the first is {missing[0]}; check the pattern")
    if others := [path for path in paths if not _is_archive(path)]:
        raise UserError(f"{pattern} also stands for {others[0]}, which is no .tar; give the folder instead")
    return list(dict.fromkeys(paths))


def read_labels(path: Path, names: Sequence[str], elsewhere: Sequence[str] = ()) -> dict[str, str]:
    """Relative name -> label. A row gives the relative name, or the file name where that is unique.

    Rows whose name is one of `elsewhere` and not of this source are left out, also where it is a file name here; so
    are rows of a file name that only `elsewhere` has.
    """
    try:
        if path.exists() and (not path.is_file() or path.stat().st_size > _MOST_LABELS):
            raise OSError("no file, or too large")
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the labels in {path} ({error}); give a CSV file in UTF-8") from None
    first = text.split("\n", 1)[0]
    bare_first = re.sub(r'"[^"]*"', "", first)  # a name in quotes may hold any of them
    delimiter = max(",;\t", key=bare_first.count)  # spreadsheets write semicolons where the comma is decimal
    try:  # not by splitlines(), which also knows lines that end inside a name
        rows = list(csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, skipinitialspace=True))
    except csv.Error as error:
        raise UserError(f"cannot read the labels in {path} ({error}); each row is name,label") from None
    rows = [row for row in rows if any(map(str.strip, row))]
    known, bare = Counter(names), Counter(name.rsplit("/", 1)[-1] for name in names)
    full = {name.rsplit("/", 1)[-1]: name for name in names}
    name_of = _NameOf(known, bare, full)
    header = [cell.strip().lower() for cell in rows[0]] if rows else []
    in_label = [k for k, cell in enumerate(header) if cell in ("label", "class", "category", "target")]
    in_name = [k for k, cell in enumerate(header) if cell in _NAME_COLUMNS]
    name_at, label_at = 0, 1
    if (in_label or 0 in in_name) and not any(name_of(cell) in known for cell in rows[0]):
        rows = rows[1:]
        hits = {k: sum(name_of(row[k]) in known for row in rows[:100] if k < len(row)) for k in in_name}
        name_at = max(hits, key=hits.__getitem__, default=0)  # an "id" may stand beside the name
        label_at = in_label[0] if in_label else 2 if name_at == 1 else 1
    labels: dict[str, str] = {}
    unknown: list[str] = []
    theirs = {_NFC(name) for name in elsewhere}
    other = theirs | {name.rsplit("/", 1)[-1] for name in theirs}
    for row in rows:
        if len(row) <= max(name_at, label_at):
            raise UserError(f"{path} has a row without a label column: {str(row)[:100]}; each row is name,label")
        if name_of.plain(row[name_at]) in theirs and not name_of.whole(row[name_at]):
            continue
        name, label = name_of(row[name_at]), row[label_at].strip()
        if not label:
            continue  # not labelled yet
        if max(known[name], bare[name] if name not in known else 0) > 1:
            raise UserError(f"{name!r} in {path} stands for several images; write its folder too")
        if name not in known:
            unknown += [] if _NFC(name) in other else [name]
        elif labels.setdefault(name, label) != label:
            raise UserError(f"{path} gives {name!r} both as {labels[name]!r} and as {label!r}; keep one")
    if unknown:
        some = ", ".join(map(repr, unknown[:3])) + (" …" if len(unknown) > 3 else "")
        raise UserError(f"{len(unknown):,} names in {path} are not in the source: {some}; names are like {names[0]!r}")
    if not labels:
        of = f"no labels of images such as {names[0]!r}, only of the other source's" if other and rows else "no labels"
        raise UserError(f"{path} holds {of}; each row is name,label")
    return labels


class _NameOf:
    """The image that a cell of a CSV stands for, by its name in the source; the cell itself where there is none.

    As it is written, else without spaces around it, with / for \\, or as another system writes its accents (macOS
    stores é as e and an accent).
    """

    def __init__(self, known: Counter[str], bare: Counter[str], full: dict[str, str]) -> None:
        self.known, self.bare, self.full = known, bare, full

    @functools.cached_property
    def composed(self) -> dict[str, str]:
        return {_NFC(short): name for short, name in self.full.items() if self.bare[short] == 1} | {
            _NFC(name): name for name in self.known
        }

    @staticmethod
    def plain(cell: str) -> str:
        return _NFC(cell.strip().replace("\\", "/").removeprefix("./"))

    def whole(self, cell: str) -> bool:
        """Whether it is an image's whole name here."""
        return cell in self.known or self.plain(cell) in self.names

    @functools.cached_property
    def names(self) -> set[str]:
        return {_NFC(name) for name in self.known}

    def __call__(self, cell: str) -> str:
        plain = cell.strip()
        posix = plain.replace("\\", "/").removeprefix("./")
        for text in (cell, plain, posix):
            if text in self.known:
                return text
            if self.bare[text] == 1:
                return self.full[text]
        return posix if self.bare[posix] else self.composed.get(_NFC(posix), posix)


def _short_side(data: bytes) -> int:
    """Short side of an image in pixels from its header, 0 if it cannot be told."""
    import warnings

    from PIL import Image

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return min(Image.open(io.BytesIO(data), formats=available_formats()).size)
    except Exception:  # Pillow's plugins raise nearly anything on a damaged header
        return 0


def available_formats() -> list[str]:
    """Formats that Pillow may try, as far as it was built with them."""
    from PIL import Image

    Image.init()
    return [name for name in _FORMATS if name in Image.OPEN]
