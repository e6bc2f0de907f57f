"""What a run starts from: its images, another run's backbone, its own newest checkpoint."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from unlabel import checkpoint, distributed
from unlabel.backbone import Backbone, load_weights
from unlabel.cache import ImageCache, TooManyBroken, load_cache, write_skipped
from unlabel.config import PretrainConfig
from unlabel.errors import UserError
from unlabel.runfolder import RunFolder

__all__ = ["init_of", "load_images", "newest_state", "refuse_out_inside_data", "start_from", "with_excluded"]


def refuse_out_inside_data(config: PretrainConfig) -> None:
    out = config.out.resolve()
    for spec in config.data:
        if os.path.isdir(spec) and out.is_relative_to(Path(spec).resolve()):
            raise UserError(f"--out {out} lies inside --data {spec}: its previews would count as images")


def newest_state(run: RunFolder, about: dict[str, Any] | None) -> dict[str, Any] | None:
    if about is None and any(run.checkpoints.glob("step-*.pt")):
        raise UserError(f"{run.path} has checkpoints but no config.json: choose another --out")
    return checkpoint.load_newest(run.checkpoints)


def init_of(init: Path | None, about: dict[str, Any] | None) -> str | None:
    """What --init stands for in config.json: its content, wherever it lies. A continued run no longer needs it."""
    if init is None:
        return None
    old = about["settings"].get("init") if about else None
    product = init / "backbone.safetensors"
    if old and (old.startswith("checkpoint of ") or not product.exists()):
        return old
    return checkpoint.file_sha256(product) if product.exists() else f"checkpoint of {init.resolve().name}"


def start_from(backbone: Backbone, run: Path) -> None:
    """Another run's backbone: its product, or where it was stopped before the end, its newest checkpoint."""
    if (run / "backbone.safetensors").exists() or not (run / "checkpoints").is_dir():
        return load_weights(backbone, run / "backbone.safetensors")
    state = checkpoint.load_newest(run / "checkpoints") or {"model": {}}
    weights = {k.removeprefix("backbone."): v for k, v in state["model"].items() if k.startswith("backbone.")}
    try:
        backbone.load_state_dict(weights)
    except RuntimeError as error:
        raise UserError(
            f"the checkpoint in {run} does not fit --backbone ({str(error).splitlines()[-1].strip()})"
        ) from None


def with_excluded(fingerprint: str, exclude: frozenset[str]) -> str:
    if not exclude:
        return fingerprint
    return hashlib.sha256(json.dumps([fingerprint, sorted(exclude)]).encode()).hexdigest()


def load_images(source: Any, image_size: int, config: PretrainConfig, exclude: frozenset[str]) -> ImageCache:
    """Rank 0 packs; the others wait and map the same file."""
    options: dict[str, Any] = {"max_skipped": config.max_skipped, "workers": config.workers}
    if distributed.is_main():
        try:
            cache = load_cache(source, image_size, **options)
        except TooManyBroken as error:
            write_skipped(config.out / "skipped.txt", error.skipped)
            raise
        distributed.barrier()
    else:
        distributed.barrier()
        cache = load_cache(source, image_size, progress=False, **options)
    if exclude:
        cache = cache.subset(np.flatnonzero([h not in exclude for h in cache.hashes]))
    if not cache.names:
        raise UserError(f"no usable image in {source.spec}: `unlabel check` says what is there")
    return cache
