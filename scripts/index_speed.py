"""What the kept index of a set of tar shards is worth, and what other libraries do with the same images.

    python scripts/index_speed.py SOURCE               about a minute for 10,000 small images; SOURCE as for unlabel
    python scripts/index_speed.py SOURCE --others      also wids, webdataset, mosaicml-streaming, litdata, as installed
    python scripts/index_speed.py --members 200000     listing alone, of so many members that are made up

The first images of SOURCE become ten shards in a temporary folder. Times are seconds of one pass, with the shards in
memory; "1 ms" is a file system that answers each read after so long, as one behind a network does.
"""

from __future__ import annotations

import argparse
import io
import os
import random
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from unlabel import listing, tar_index
from unlabel.errors import UserError
from unlabel.sources import Source, open_source

SHARDS, BATCH = 10, 100
DELAY = 0.001


class SlowFile(io.FileIO):
    """A file whose every read takes a millisecond longer."""

    def readinto(self, buffer: Any) -> int:
        time.sleep(DELAY)
        return super().readinto(buffer) or 0


def slow_open(path: str, mode: str = "rb") -> io.BufferedReader:
    return io.BufferedReader(SlowFile(path, mode))


def timed(what: str, work: Callable[[], Any], count: int = 0) -> Any:
    began = time.perf_counter()
    result = work()
    seconds = time.perf_counter() - began
    print(f"{what:<58}{seconds:9.3f} s" + (f"{count / seconds:12,.0f} images/s" if count else ""), flush=True)
    return result


def make_shards(source: Source, count: int, folder: Path) -> list[str]:
    """The first `count` images, dealt out to the shards in turn, with names that wids and webdataset can group."""
    paths = [str(folder / f"part-{i:03d}.tar") for i in range(SHARDS)]
    tars = [tarfile.open(path, "w") for path in paths]  # noqa: SIM115
    indices = random.Random(0).sample(range(len(source)), min(count, len(source)))
    for k, (i, load) in enumerate(source.read(indices)):
        data = load()
        member = tarfile.TarInfo(f"{source.names[i].split('/')[0]}/{k:06d}.jpg")
        member.size = len(data)
        tars[k % SHARDS].addfile(member, io.BytesIO(data))
    for tar in tars:
        tar.close()
    return paths


def make_members(count: int, folder: Path) -> list[str]:
    paths = [str(folder / f"part-{i:03d}.tar") for i in range(SHARDS)]
    for path in paths:
        with tarfile.open(path, "w") as tar:
            for _ in range(count // SHARDS):
                name = random.randbytes(8).hex()
                member = tarfile.TarInfo(f"n{name[:8]}/n{name}.JPEG")
                member.size = 1
                tar.addfile(member, io.BytesIO(b"x"))
    return paths


def listing_alone(paths: list[str], folder: Path) -> None:
    timed("open_source: the first time, listing kept", lambda: open_source(str(folder / "part-*.tar")))
    timed("list_archives: from the kept listing", lambda: tar_index.list_archives(paths))
    source = timed("open_source: from the kept listing", lambda: open_source(str(folder / "part-*.tar")))
    print_size(len(source))


def print_size(images: int) -> None:
    size = sum(p.stat().st_size for p in (tar_index.cache_root() / "listings").iterdir())
    print(f"listings on disk: {size / images:.1f} bytes an image")


def own(paths: list[str], folder: Path) -> None:
    pattern = str(folder / "part-{000..009}.tar")
    listed = timed("list: one after the other", lambda: [listing.list_archive(p) for p in paths])
    with ThreadPoolExecutor(SHARDS) as pool:
        timed("list: threads", lambda: list(pool.map(listing.list_archive, paths)))
    with ProcessPoolExecutor(2) as pool:
        list(pool.map(abs, range(2)))  # started before the clock
        timed("list: 2 processes, already started", lambda: list(pool.map(listing.list_archive, paths)))
    setattr(listing, "open", slow_open)  # noqa: B010
    timed("list, 1 ms: one after the other", lambda: [listing.list_archive(p) for p in paths])
    with ThreadPoolExecutor(SHARDS) as pool:
        timed("list, 1 ms: threads", lambda: list(pool.map(listing.list_archive, paths)))
    delattr(listing, "open")
    first = timed("open_source: the first time, listing kept", lambda: open_source(pattern))
    again = timed("open_source: from the kept listing", lambda: open_source(pattern))
    assert first.entries == again.entries
    assert len(again) == sum(len(f.entries) for f in listed)
    print_size(len(again))
    order = random.Random(1).sample(range(len(again)), len(again))
    timed("read in random order, 1 thread", lambda: [len(again.entries[i].load()) for i in order], len(order))
    with ThreadPoolExecutor(4) as pool:
        timed(
            "read in random order, 4 threads",
            lambda: list(pool.map(lambda i: again.entries[i].load(), order)),
            len(order),
        )


def resumes(make: Callable[[], Any], key: Callable[[Any], Any]) -> str:
    """Whether a loader that is given the state of another after 7 batches goes on as that one does."""
    loader = make()
    batches = iter(loader)
    for _ in range(7):
        next(batches)
    state = loader.state_dict()
    expected = [key(batch) for batch in batches]
    del batches, loader
    second = make()
    second.load_state_dict(state)
    found = [key(batch) for batch in second]
    return "exact" if found == expected else f"NOT exact: {len(found)} batches for {len(expected)}"


def wids(paths: list[str], folder: Path) -> None:
    from wids import ShardListDataset  # pyright: ignore[reportMissingImports]

    def count(path: str) -> int:
        with tarfile.open(path) as tar:
            return len(tar.getmembers())

    shards = timed("wids: count samples (widsindex)", lambda: [{"url": p, "nsamples": count(p)} for p in paths])
    data = timed("wids: start", lambda: ShardListDataset(shards, transformations=[], lru_size=SHARDS))
    order = random.Random(1).sample(range(len(data)), len(data))
    timed("wids: first image of each shard", lambda: [data[k * (len(data) // SHARDS)] for k in range(SHARDS)])
    timed("wids: random order", lambda: [len(data[i][".jpg"].read()) for i in order], len(order))
    few = ShardListDataset(shards, transformations=[], lru_size=SHARDS // 2)
    part = order[: len(order) // 20]
    timed("wids: random order, half the shards open at once", lambda: [few[i] for i in part], len(part))


def webdataset(paths: list[str], folder: Path) -> None:
    import webdataset as wds  # pyright: ignore[reportMissingImports]

    def read() -> int:
        data = wds.WebDataset(paths, shardshuffle=SHARDS, seed=0).shuffle(1000)
        return sum(len(sample["jpg"]) > 0 for sample in data)

    count = timed("webdataset: one pass, in its order (no random access)", read)
    print(f"webdataset: {count:,} images; its pipeline has no state_dict: {not hasattr(wds.WebDataset, 'state_dict')}")


def images(paths: list[str]) -> Iterator[dict[str, Any]]:
    for k, path in enumerate(paths):
        with tarfile.open(path) as tar:
            for member in tar:
                yield {"name": f"{k}/{member.name}", "image": tar.extractfile(member).read()}  # pyright: ignore[reportOptionalMemberAccess]


def streaming(paths: list[str], folder: Path) -> None:
    from streaming import MDSWriter, StreamingDataLoader, StreamingDataset  # pyright: ignore[reportMissingImports]

    out = str(folder / "mds")

    def write() -> None:
        with MDSWriter(out=out, columns={"name": "str", "image": "bytes"}) as writer:
            for sample in images(paths):
                writer.write(sample)

    timed("mosaicml-streaming: write a copy in its format", write)
    data = timed(
        "mosaicml-streaming: start",
        lambda: StreamingDataset(local=out, batch_size=BATCH, shuffle=True, num_canonical_nodes=1),
    )
    order = random.Random(1).sample(range(len(data)), len(data))
    timed("mosaicml-streaming: random order", lambda: [len(data[i]["image"]) for i in order], len(order))

    def make() -> Any:
        fresh = StreamingDataset(local=out, batch_size=BATCH, shuffle=True, num_canonical_nodes=1)
        return StreamingDataLoader(fresh, batch_size=BATCH, collate_fn=as_columns)

    print("mosaicml-streaming: resume in the middle of an epoch:", resumes(make, lambda batch: batch["name"]))


def litdata(paths: list[str], folder: Path) -> None:
    from litdata import StreamingDataLoader, StreamingDataset, optimize  # pyright: ignore[reportMissingImports]

    out = str(folder / "litdata")
    samples = list(images(paths))
    timed(
        "litdata: write a copy in its format",
        lambda: optimize(identity, samples, out, num_workers=1, chunk_bytes="16MB", verbose=False),
    )
    data = timed("litdata: start", lambda: StreamingDataset(out, shuffle=True, seed=0))
    order = random.Random(1).sample(range(len(data)), len(data) // 10)
    timed("litdata: random order", lambda: [len(data[i]["image"]) for i in order], len(order))

    def make() -> Any:
        fresh = StreamingDataset(out, shuffle=True, seed=0)
        return StreamingDataLoader(fresh, batch_size=BATCH, collate_fn=as_columns)

    print("litdata: resume in the middle of an epoch:", resumes(make, lambda batch: batch["name"]))


def identity(sample: dict[str, Any]) -> dict[str, Any]:
    return sample


def as_columns(batch: list[dict[str, Any]]) -> dict[str, list[str]]:
    return {"name": [s["name"] for s in batch]}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", nargs="*")
    parser.add_argument("--members", type=int, default=0)
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--others", action="store_true")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        os.environ["UNLABEL_CACHE"] = str(folder / "cache")
        if args.members:
            listing_alone(make_members(args.members, folder), folder)
            return 0
        paths = make_shards(open_source(args.source), args.images, folder)
        print(f"{SHARDS} shards of {sum(map(os.path.getsize, paths)) / SHARDS / 1e6:.1f} MB")
        own(paths, folder)
        for library in (wids, webdataset, streaming, litdata) if args.others else ():
            try:
                library(paths, folder)
            except ImportError as error:
                print(f"{library.__name__}: {error}")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        raise SystemExit(f"index_speed.py: {error}") from None
