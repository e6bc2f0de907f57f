"""What is in a source, before anything is spent on it: counts, sizes, classes, broken files, duplicates, leaks."""

from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from unlabel.cache import ImageCache, load_cache, printable
from unlabel.duplicates import clusters
from unlabel.sources import Source, open_source

__all__ = ["check", "render", "run_check"]

_EXAMPLES = 5


def check(source: Source, against: Source | None = None, *, progress: bool = True) -> dict[str, Any]:
    """Look at every image of `source`, and for copies of them in `against`.

    The images are decoded into the cache, at the size that training would take, so that the work is not lost.
    The result holds plain numbers, names and lists. Raises UserError if no image can be read.
    """
    image_size = source.usual_size()
    sources = [source] if against is None else [source, against]
    caches = [load_cache(s, image_size, max_skipped=1.0, progress=progress) for s in sources]
    cache, groups = caches[0], clusters(caches)
    short = np.sort(cache.shapes.min(1))
    exact, near, conflicts = _duplicates(cache, groups[0])
    report: dict[str, Any] = {
        "source": source.spec,
        "fingerprint": source.fingerprint,
        "images": len(cache),
        "bytes": sum(source.sizes),
        "ignored": source.ignored,
        "left_out": source.left_out,
        "short_side": {"min": int(short[0]), "median": int(np.median(short)), "max": int(short[-1])},
        "not_square": int((cache.shapes[:, 0] != cache.shapes[:, 1]).sum()),
        "classes": None if cache.labels is None else dict(sorted(Counter(cache.labels).items())),
        "broken": cache.skipped,
        "exact": exact,
        "near": near,
        "label_conflicts": conflicts,
    }
    if against is not None:
        there = {c: i for i, c in reversed(list(enumerate(groups[1].tolist())))}
        leaks = [(i, there[c]) for i, c in enumerate(groups[0].tolist()) if c in there]
        contents = set(caches[1].hashes)
        report["against"] = {
            "source": against.spec,
            "images": len(caches[1]),
            "leaks": [(cache.names[i], caches[1].names[j]) for i, j in leaks],
            "exact": sum(content in contents for content in cache.hashes),
        }
    return report


def render(report: dict[str, Any]) -> str:
    """The report as lines of text."""
    sides, classes = report["short_side"], report["classes"]
    images = f"{report['images']:,} can be read, {len(report['broken']):,} broken"
    if report["ignored"]:
        images += f"; {report['ignored']:,} other files ignored"
    if report["left_out"]:
        images += f"; {report['left_out']:,} without a label left out"
    size = f"short side {sides['min']:,} to {sides['max']:,} pixels, median {sides['median']:,}"
    if report["not_square"]:
        size += f"; {report['not_square']:,} are not square and will be cropped to their middle"
    rows = [("images", images), ("size", f"{size}; {report['bytes'] / 1e6:,.1f} MB")]
    if classes is None:
        rows.append(("classes", "none: not all images lie in folders (fine for pretraining)"))
    else:
        counts = [f"{printable(name)} {count:,}" for name, count in list(classes.items())[:20]]
        more = " …" if len(classes) > 20 else ""
        rows.append(("classes", f"{len(classes)} by first-level folder or CSV: {', '.join(counts)}{more}"))
    rows += [("broken", f"{printable(name)}: {reason}") for name, reason in report["broken"][:20]]
    if len(report["broken"]) > 20:
        rows.append(("", f"… and {len(report['broken']) - 20:,} more"))
    for kind, text in (("exact", "exact copies"), ("near", "near copies")):
        groups = report[kind]
        total = sum(map(len, groups))
        rows.append((text, f"{len(groups):,} groups, {total:,} images" if groups else "none"))
        rows += [("", " = ".join(map(printable, group[:4]))) for group in groups[:_EXAMPLES]]
    if classes is not None and len(classes) > 1:
        conflicts = report["label_conflicts"]
        rows.append(("contradictions", f"{len(conflicts):,} groups of copies with different labels"))
        rows += [("", " = ".join(map(printable, group[:4]))) for group in conflicts[:_EXAMPLES]]
    if other := report.get("against"):
        leaks = other["leaks"]
        rows.append(("against", f"{other['source']}, {other['images']:,} images"))
        text = f"{len(leaks):,} images are also there, {other['exact']:,} of them pixel by pixel"
        rows.append(("leaks", text if leaks else "none"))
        rows += [("", f"{printable(here)} = {printable(there)}") for here, there in leaks[:_EXAMPLES]]
    return "\n".join([printable(report["source"]), *(f"  {key:<16}{text}" for key, text in rows)])


def run_check(spec: str | Sequence[str], against: str | Sequence[str] | None = None, labels: Path | None = None) -> int:
    """`unlabel check SOURCE [--against SOURCE]`: print the report. Returns the exit code. Raises UserError."""
    source = open_source(spec, labels)
    other = None if against is None else open_source(against)
    print(render(check(source, other)))
    return 0


def _duplicates(cache: ImageCache, groups: np.ndarray) -> tuple[list[list[str]], list[list[str]], list[list[str]]]:
    """Names of exact copies, of near copies, and of copies whose labels differ, each as groups of names."""
    members: dict[int, list[int]] = defaultdict(list)
    for i, group in enumerate(groups.tolist()):
        members[group].append(i)
    exact: list[list[str]] = []
    near: list[list[str]] = []
    conflicts: list[list[str]] = []
    for group in members.values():
        by_content: dict[str, list[str]] = defaultdict(list)
        for i in group:
            by_content[cache.hashes[i]].append(cache.names[i])
        exact += [names for names in by_content.values() if len(names) > 1]
        if len(by_content) > 1:
            near.append([cache.names[i] for i in group])
        if cache.labels is not None and len({cache.labels[i] for i in group}) > 1:
            conflicts.append([cache.names[i] for i in group])
    return exact, near, conflicts
