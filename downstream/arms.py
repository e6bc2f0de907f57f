"""Runs and weights that are given, as arms of a table; and what images they had seen before, as far as it is known."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from downstream import evaluate as ev
from unlabel.backbone import Spec, load_backbone, name_of
from unlabel.cache import ImageCache, load_cache
from unlabel.checkpoint import file_sha256
from unlabel.errors import UserError
from unlabel.init import Start
from unlabel.runfolder import RunFolder
from unlabel.sources import open_source
from unlabel.start import refuse_addresses, with_excluded

__all__ = ["about_given", "arm_name", "finished_runs", "given_arms", "most_seen", "pretraining_images", "seed_of"]
__all__ += ["seen_by", "started_elsewhere", "unlike"]


def arm_name(run: Path, about: dict[str, Any]) -> str:
    tasks = about.get("settings", {}).get("tasks")
    return "+".join(tasks) if tasks else run.resolve().name


def seed_of(about: Mapping[str, Any]) -> int:
    return int(about.get("settings", {}).get("seed", 0))


def finished_runs(
    folders: Sequence[Path], like: Spec, pretraining: ImageCache | None
) -> tuple[list[ev.Arm], dict[str, ImageCache], list[str]]:
    """Arms of runs that are finished elsewhere; the images that they were trained on, where those are others; notes.

    ``like``: the network of the table that they are measured in.
    """
    arms, others, notes = [], {}, []
    for folder in folders:
        spec = load_backbone(folder).spec
        run = RunFolder(folder)
        about = run.read() or {}
        if about:
            run.finished()
        arms.append(ev.Arm(folder.resolve().name, "backbone", (seed_of(about),), (folder,)))
        images, note = pretraining_images(folder, about, like.image_size)
        texts = [note, started_elsewhere(folder), *unlike(spec, like)]
        notes += [f"{folder.name}: {text}" for text in texts if text]
        if images is not None:  # the same images need no second look
            seen = [c for c in (pretraining, *others.values()) if c is not None]
            known = next((c for c in seen if c.hashes == images.hashes), images)
            others[folder.resolve().name] = known
    return arms, others, notes


def unlike(spec: Spec, like: Spec) -> list[str]:
    """Notes on an arm whose difference from the others, whose network is ``like``, is not of its weights alone."""
    notes, same_size = [], spec.image_size == like.image_size
    if not same_size:
        notes.append(
            f"it sees images of {spec.image_size} px, made from those of {like.image_size} px that the others see"
        )
    if _network(spec) != _network(like):
        notes.append(f"it is another network than those that it is compared with, which are {name_of(like)}")
    elif same_size and spec.stem != like.stem:
        notes.append(f"its stem is {spec.stem!r}, that of those that it is compared with {like.stem!r}")
    if spec.flip != like.flip:
        notes.append(f"it is fine-tuned with{'' if spec.flip else 'out'} mirror images, unlike the others")
    return notes


def _network(spec: Spec) -> list[str]:
    return [spec.name.split(".")[0], json.dumps(spec.kwargs, sort_keys=True)]  # tuples are lists in a file


def given_arms(
    start: Start, weights: Path | None, like: Spec, pretraining: ImageCache | None
) -> tuple[list[ev.Arm], dict[str, ImageCache], list[str]]:
    """The weights of --init as they are, as an arm; what they were trained on, where that is known; notes."""
    if weights is None:
        return [], {}, []
    if start.kind != "run":
        note = f"{start.arm} was trained elsewhere, perhaps with labels, perhaps on test images: that is not known here"
        notes = [note, *(f"{start.arm}: {text}" for text in unlike(load_backbone(weights).spec, like))]
        return [ev.Arm(start.arm, "backbone", (0,), (weights,))], {}, notes
    (arm,), others, notes = finished_runs([weights], like, pretraining)
    known = {start.arm: others[arm.name]} if others else {}
    return [dataclasses.replace(arm, name=start.arm)], known, notes


def about_given(start: Start, weights: Path | None) -> dict[str, Any]:
    """For the provenance: which arm are weights as they were given, and which weights these are."""
    if weights is None:
        return {}
    return {"given": {"arm": start.arm, "init": start.init, "content": file_sha256(weights / "backbone.safetensors")}}


def pretraining_images(run: Path, about: dict[str, Any], image_size: int) -> tuple[ImageCache | None, str | None]:
    """What a run was trained on, if it is still where it was; else a note that says so."""
    spec = about.get("data", {}).get("spec")
    try:
        if not spec:
            raise UserError("the run does not name its data")
        refuse_addresses(spec)
        source = open_source(spec)
        gone = RunFolder(run).left_out()
        if with_excluded(source.fingerprint, gone) != about.get("fingerprint"):
            raise UserError(f"{source.spec} has changed since")
        cache = load_cache(source, image_size, max_skipped=1.0)
    except UserError as error:
        return (
            None,
            f"the pretraining images are not at hand, so overlap with the test set was not looked for ({error})",
        )
    return cache.subset(np.flatnonzero([h not in gone for h in cache.hashes])), None


def started_elsewhere(run: Path) -> str | None:
    """A note on a run that began with other weights: what those had seen is not in its folder."""
    about = RunFolder(run).read() or {}
    if about.get("settings", {}).get("init") is None:
        return None
    return f"it began with other weights ({about.get('free', {}).get('init')}), which may have seen test images"


def seen_by(run: Path, count: int | None) -> int | None:
    """How many test images a run has seen, by its own images; None where that is not known."""
    return count or (None if started_elsewhere(run) else count)


def most_seen(counts: Sequence[int | None]) -> int | None:
    known = [n for n in counts if n is not None]
    return max(known, default=0) or (0 if len(known) == len(counts) else None)
