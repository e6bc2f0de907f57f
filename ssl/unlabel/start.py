"""What a run starts from: its images, its own newest checkpoint. Weights that are given: init.py."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from unlabel import checkpoint, distributed
from unlabel.cache import ImageCache, TooManyBroken, cache_side, load_cache, printable, write_skipped
from unlabel.config import PretrainConfig
from unlabel.errors import UserError
from unlabel.runfolder import RunFolder

__all__ = ["content_of", "load_images", "load_weights_of", "newest_state", "refuse_other_content"]
__all__ += ["refuse_addresses", "refuse_foreign", "refuse_odd_out", "refuse_other_defaults", "refuse_other_side"]
__all__ += ["with_excluded"]


def refuse_odd_out(out: Path, specs: Sequence[str | None]) -> None:
    """Where what is written would count as images the next time, or could not be opened again."""
    if not str(out).isascii() and os.fsencode(out).decode("utf-8", "replace") != str(out):
        raise UserError(f"--out {str(out)!r} is not valid UTF-8, which weights' files need: choose another name")
    out = out.resolve()
    for spec in specs:
        if spec and os.path.isdir(spec) and out.is_relative_to(Path(spec).resolve()):
            raise UserError(f"--out {out} lies inside {spec}: its pictures would count as images")


def refuse_foreign(out: Path) -> None:
    """What lies in a folder that is no run's is somebody's, and would be cut or written over."""
    names = ("metrics.jsonl", "backbone.safetensors", "backbone.json")
    if not (out / "config.json").exists() and (there := [name for name in names if (out / name).exists()]):
        raise UserError(f"{out} holds {there[0]}, and no config.json: it is no run's folder; choose another --out")


def refuse_addresses(spec: Sequence[str]) -> None:
    """What a run's config.json names is opened to look at its images; a stranger's must not choose addresses, nor
    search the disk. Shards that are counted off, {000..099}.tar, are files by their names."""
    if strange := [s for s in spec if re.search(r"://|[*?\[]", s) and not os.path.exists(s)]:
        raise UserError(f"config.json names {strange[0][:100]!r}, and addresses and patterns there are not followed")


def newest_state(run: RunFolder, about: dict[str, Any] | None) -> dict[str, Any] | None:
    if about is None and any(run.checkpoints.glob("step-*.pt")):
        raise UserError(f"{run.path} has checkpoints but no config.json: choose another --out")
    return checkpoint.load_newest(run.checkpoints)


def refuse_other_side(about: dict[str, Any], side: int, image_size: int) -> None:
    """A run begun before small images were packed as they are saw other pixels: it cannot be continued exactly."""
    before = about.get("data", {}).get("side", cache_side(image_size))
    if before != side:
        raise UserError(
            f"this run was begun with images packed at {before} px, which are packed at {side} px now: start it anew "
            "in another --out (--init takes over its backbone)"
        )


def refuse_other_defaults(about: dict[str, Any] | None, what: str, key: str, now: Any, unsaid: Any = None) -> None:
    """A run of a version with other defaults would go on as another run. ``unsaid``: those of runs that do not say."""
    before = (about or {"resolved": {key: now}})["resolved"].get(key, now if unsaid is None else unsaid)
    if before != now:
        raise UserError(
            f"this run was begun with other defaults of {what} ({before}, now {now}): continue it with the version "
            "that it was begun with, or start anew in another --out (--init takes over its backbone)"
        )


def content_of(cache: ImageCache) -> str:
    """SHA-256 over what every image decodes to: the fingerprint knows names and sizes only."""
    return hashlib.sha256("\n".join(cache.hashes).encode()).hexdigest()


def refuse_other_content(about: dict[str, Any], content: str) -> None:
    if about.get("data", {}).get("content", content) != content:
        raise UserError(
            "the images have changed since this run was begun: names and sizes are the same, pixels are not (or "
            "another Pillow reads them). Restore them, or choose another --out"
        )


def load_weights_of(state: dict[str, Any], model: Any, optimizers: Sequence[Any]) -> None:
    try:
        model.load_state_dict(state["model"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"the checkpoint is of another version of this task ({str(error).splitlines()[-1].strip()}): start it anew "
            "in another --out (--init takes over its backbone)"
        ) from None


def with_excluded(fingerprint: str, exclude: frozenset[str]) -> str:
    if not exclude:
        return fingerprint
    return hashlib.sha256(json.dumps([fingerprint, sorted(exclude)]).encode()).hexdigest()


def sealed(out: Path) -> bool:
    """Whether a finished run lies where nothing can be written, and nothing need be."""
    return out.is_dir() and not os.access(out, os.W_OK) and "finished" in (RunFolder(out).read() or {})


def how_differ(about: dict[str, Any], fingerprint: str, left_out: frozenset[str]) -> str:
    """In what the data of a run differ from those of this ``fingerprint``, which is without what is left out."""
    if with_excluded(fingerprint, left_out) == about.get("fingerprint"):
        return "the same files, but other test images are left out of them: other --labels, --train or --test"
    return "other names or sizes of files"


def load_images(
    source: Any, image_size: int, config: PretrainConfig, exclude: frozenset[str], content: str | None = None
) -> ImageCache:
    """Rank 0 packs; the others wait and map the same file, or where their node has its own cache, pack there.

    ``content`` of a run that was begun: images that were broken then are still left out, though they may have been
    repaired since.
    """
    options: dict[str, Any] = {"max_skipped": config.max_skipped, "workers": config.workers}
    with distributed.in_turn():
        try:
            cache = load_cache(source, image_size, progress=distributed.is_main(), **options)
        except TooManyBroken as error:
            if distributed.is_main():
                write_skipped(config.out / "skipped.txt", error.skipped)
            raise
    if exclude:
        cache = cache.subset(np.flatnonzero([h not in exclude for h in cache.hashes]))
    if content is not None and content_of(cache) != content:
        before = _skipped_before(config.out)
        known = [printable(name) in before for name in cache.names]
        smaller = replace(cache.subset(~np.array(known, bool)), skipped=sorted(before.items()))
        cache = smaller if content_of(smaller) == content else cache
    if not cache.names:
        raise UserError(f"no usable image in {source.spec}: `unlabel check` says what is there")
    return cache


def _skipped_before(out: Path) -> dict[str, str]:
    """Name and reason of skipped.txt."""
    try:
        lines = (out / "skipped.txt").read_text("utf-8", "replace").split("\n")
    except OSError:
        return {}
    return {name: reason for name, tab, reason in (line.partition("\t") for line in lines) if tab}
