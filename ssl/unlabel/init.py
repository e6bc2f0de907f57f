"""What --init names: another run's folder, a file of plain timm weights, or ``timm:NAME``, which timm downloads."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import safe_open
from torch import Tensor

from unlabel import checkpoint
from unlabel.backbone import (
    CHANGED_PREFIX,
    Backbone,
    build_backbone,
    compare_weights,
    load_weights,
    save_backbone,
    shapes_of,
    timm_network,
)
from unlabel.errors import UserError
from unlabel.mlp import is_mlp

__all__ = ["Start", "begun", "fetch", "init_of", "load_start", "start_beside", "start_of", "write_given"]

TIMM = "timm:"
_DEFAULT = "small"
_HUB_FILE = "model.safetensors"  # what timm's weights are called there
_SHA256_AT_END = re.compile(r" [0-9a-f]{64}$")


@dataclass(frozen=True)
class Start:
    """Where pretraining starts from. ``init`` None: random weights. ``stem`` may still be auto."""

    init: str | None
    backbone: str
    stem: str

    @property
    def kind(self) -> str | None:
        """run, file, timm, or None."""
        if self.init is None:
            return None
        return "timm" if self.init.startswith(TIMM) else "file" if _is_file(Path(self.init)) else "run"

    def named(self) -> dict[str, str]:
        """What config.json says of it beside its content."""
        return {} if self.init is None else {"init": self.init}

    @property
    def arm(self) -> str:
        """What the weights are called where they are measured as they are given: never like a task or a folder."""
        assert self.init is not None
        return self.init if self.kind == "timm" else f"init:{Path(self.init).resolve().name}"


def start_of(
    init: str | os.PathLike[str] | None, backbone: str | None, stem: str, before: Mapping[str, Any] | None = None
) -> Start:
    """--init, --backbone and --stem together; no weight is read yet, but for their names in a file.

    Weights from elsewhere are those of timm's own stem: with them, ``auto`` means that stem. ``before``: the settings
    in the config.json of the run that is continued, for which a file may be gone. Raises UserError.
    """
    if init is None:
        return Start(None, backbone or _DEFAULT, stem)
    text = os.fspath(init)
    if text.startswith(TIMM):
        name = _full_name(text)
        if backbone is not None and name != backbone and not name.startswith(f"{backbone}."):
            raise UserError(f"--init {text} is not of --backbone {backbone}: leave --backbone out, or name the same")
        return Start(TIMM + name, name, "timm" if stem == "auto" else stem)
    path = Path(text)
    if _is_file(path):
        if before is not None and not path.exists():
            own = before.get("stem") == "auto"
        else:
            own = _has_own_stem(_shapes(path))
        stem = "timm" if stem == "auto" and not own else stem
    return Start(text, backbone or _DEFAULT, stem)


def start_beside(init: str | None, backbone: str, stem: str) -> Start:
    """--init of weights that are only measured, beside a run of this network: those of a file are of it, too."""
    if init is None or init.startswith(TIMM):
        return start_of(init, None, "auto")
    start = start_of(init, backbone, "auto")
    return replace(start, stem=stem) if start.stem == "auto" else start


def _is_file(path: Path) -> bool:
    """UserError for a file of another kind."""
    if path.is_dir():
        return False
    if path.suffix == ".safetensors":
        return True
    if path.is_file() or path.suffix in (".pth", ".pt", ".bin", ".ckpt", ".pkl", ".tar"):
        raise UserError(
            f"--init {path}: convert it to safetensors (other files of weights can hold code, so they are not read)"
        )
    return False


def _full_name(text: str) -> str:
    """``timm:resnet18`` to ``resnet18.a1_in1k``: a network and which of its weights."""
    name = text.removeprefix(TIMM)
    help_ = "timm.list_pretrained() names what there is, such as timm:resnet18.a1_in1k"
    if not re.fullmatch(r"[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)?", name):
        raise UserError(f"--init {text}: no network has this name; {help_}")
    try:
        cfg = timm.get_pretrained_cfg(name)
    except RuntimeError as error:
        raise UserError(f"--init {text}: {error} {help_}") from None
    if cfg is None or not cfg.has_weights:
        raise UserError(f"--init {text}: timm has no weights of this name; {help_}")
    if not cfg.hf_hub_id:
        raise UserError(f"--init {text}: timm has these weights as a pickle only, which is not read; {help_}")
    network = name.partition(".")[0]
    return f"{network}.{cfg.tag}" if cfg.tag else network


def begun(about: dict[str, Any] | None, checkpoints: Path) -> bool:
    """Whether a run no longer needs what it starts from."""
    return about is not None and (bool(about.get("finished")) or any(checkpoints.glob("step-*.pt")))


def fetch(start: Start) -> Path | None:
    """The file of timm's weights for ``timm:NAME``, in the hub's cache on this machine; downloaded if it is not there.

    None where --init names something else. Raises UserError.
    """
    if start.kind != "timm":
        return None
    build_backbone(start.backbone, 64, "timm")  # an error for what is no ConvNet, before anything is downloaded
    cfg = timm.get_pretrained_cfg(start.backbone)
    try:
        return _from_hub(str(cfg.hf_hub_id if cfg is not None else None))
    except Exception as error:  # the hub's own, and its client's
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"cannot download {start.init} ({reason}); check the network, or give --init a .safetensors file"
        ) from None


def _from_hub(repository: str) -> Path:
    """timm downloads from there, too, but would also take a pickle, and ask the network for what it has."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url, try_to_load_from_cache
    from huggingface_hub.utils import logging

    known = try_to_load_from_cache(repository, _HUB_FILE)
    if isinstance(known, str):
        return Path(known)
    print(f"downloading {repository} from the Hugging Face hub", file=sys.stderr, flush=True)
    level = logging.get_verbosity()
    logging.set_verbosity_error()  # it would tell of each of its attempts
    try:
        get_hf_file_metadata(hf_hub_url(repository, _HUB_FILE))  # fails at once; the next tries for half a minute
        return Path(hf_hub_download(repository, _HUB_FILE))
    finally:
        logging.set_verbosity(level)


def init_of(start: Start, about: dict[str, Any] | None, fetched: Path | None, has_begun: bool) -> str | None:
    """What --init stands for in config.json: its content, wherever it lies. A begun run no longer needs it.

    ``fetched``: what ``fetch`` gave, if it was asked. ``has_begun``: what ``begun`` says. A run that was unfinished
    when this one started from it may have gone on since.
    """
    old = about["settings"].get("init") if about else None
    if start.init is None:
        return None
    if start.kind == "timm":
        if fetched is not None:
            return f"{start.init} {checkpoint.file_sha256(fetched)}"
        return old if old and old.startswith(f"{start.init} ") else start.init
    path = Path(start.init)
    if start.kind == "file":
        if old and not path.exists():
            return old
        _shapes(path)  # an error where it is not there
        return checkpoint.file_sha256(path)
    product, stopped = path / "backbone.safetensors", f"checkpoint of {path.resolve().name}"
    if has_begun and old:
        same_run, was_product = _SHA256_AT_END.sub("", old) == stopped, not old.startswith("checkpoint of ")
        if same_run or (was_product and not product.exists()):
            return old
    if product.exists():
        return checkpoint.file_sha256(product)
    newest = checkpoint.newest(path / "checkpoints")
    if newest is None:
        raise UserError(f"--init {product} does not exist")
    content = f" {checkpoint.file_sha256(newest)}"
    return old if old and old.endswith(content) else stopped + content


def load_start(start: Start, backbone: Backbone, fetched: Path | None, say: Callable[[str], Any] = print) -> None:
    """Put what --init names into ``backbone``; say what is left out. Raises UserError where it does not fit."""
    if start.init is None:
        return
    path, stopped = Path(start.init), None
    if start.kind == "run":
        path, stopped = path / "backbone.safetensors", _stopped_weights(path)
    have = _shapes(path) if stopped is None and fetched is None else {}  # an error where it is not there
    try:
        if stopped is not None:
            compare_weights(backbone.state_dict(), {k: tuple(v.shape) for k, v in stopped.items()})
            backbone.load_state_dict(stopped)
        elif fetched is not None:
            weights = _by_timm(start, fetched)
            _load_plain(backbone, {k: tuple(v.shape) for k, v in weights.items()}, weights.__getitem__, say)
        elif start.kind == "run" or _has_own_stem(have) or is_mlp(backbone.spec.name):
            load_weights(backbone, path)
        else:
            with safe_open(path, framework="pt") as file:
                _load_plain(backbone, have, file.get_tensor, say)
    except UserError as error:
        raise UserError(f"--init {start.init}: {error}; give the --backbone (and --stem) that they are of") from None


def _by_timm(start: Start, file: Path) -> dict[str, Tensor]:
    """What timm makes of its file, which may hold other names and a classifier. Raises UserError."""
    try:
        with torch.random.fork_rng(devices=[]):
            overlay = {"file": str(file)}
            model = timm.create_model(start.backbone, pretrained=True, num_classes=0, pretrained_cfg_overlay=overlay)
    except Exception as error:  # whatever timm and safetensors raise
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"timm cannot read {file} ({reason})") from None
    return dict(model.state_dict())


def _stopped_weights(run: Path) -> dict[str, Tensor] | None:
    """Those in the newest checkpoint of a run that was stopped before its end; None where there is none."""
    if (run / "backbone.safetensors").exists() or (state := checkpoint.load_newest(run / "checkpoints")) is None:
        return None
    return {k.removeprefix("backbone."): v for k, v in state["model"].items() if k.startswith("backbone.")}


def _load_plain(
    backbone: Backbone, have: Mapping[str, tuple[int, ...]], get: Callable[[str], Tensor], say: Callable[[str], Any]
) -> None:
    """Weights under timm's names, with or without a classifier. What a changed stem replaced stays as it is.

    ``have``: names and shapes; ``get`` reads one, when all of them are known to fit.
    """
    own = backbone.model.state_dict()
    want = timm_network(backbone.spec).state_dict() if backbone.changed else own
    names = _classifier(backbone)
    heads = [k for k in have if k not in want and any(k == n or k.startswith(f"{n}.") for n in names)]
    counters = {k for k in want if k.endswith("num_batches_tracked")} - have.keys()  # some writers leave them out
    compare_weights(
        {k: v for k, v in want.items() if k not in counters}, {k: v for k, v in have.items() if k not in heads}
    )
    taken = [k for k in want if k in own and k not in backbone.changed and k not in counters]
    backbone.model.load_state_dict(own | {k: get(k) for k in taken}, strict=True)
    if heads:
        say(f"--init: its classifier is not needed: {_listed(heads)}")
    if backbone.changed:
        say(f"--init: left at random, as the {backbone.spec.stem} stem is not timm's: {_listed(backbone.changed)}")


def _listed(names: Iterable[str]) -> str:
    return ", ".join(sorted(names))


def _classifier(backbone: Backbone) -> tuple[str, ...]:
    """What timm calls the classifier of this network: fc, head.fc, …"""
    name = (getattr(backbone.model, "pretrained_cfg", None) or {}).get("classifier") or ()
    return (name,) if isinstance(name, str) else tuple(name)


def _shapes(path: Path) -> dict[str, tuple[int, ...]]:
    if not path.is_file():
        raise UserError(f"--init {path} does not exist")
    return shapes_of(path)


def _has_own_stem(names: Iterable[str]) -> bool:
    return any(k.startswith(CHANGED_PREFIX) for k in names)


def write_given(start: Start, image_size: int, flip: bool, where: Path) -> Path | None:
    """The weights of --init, untouched, as a folder in ``where`` that ``load_backbone`` reads; a run is one already.

    None without --init.
    """
    if start.init is None or start.kind == "run":
        return None if start.init is None else Path(start.init)
    backbone = build_backbone(start.backbone, image_size, start.stem, flip=flip)
    load_start(start, backbone, fetch(start))
    folder = where / re.sub(r"[^A-Za-z0-9_.-]+", "-", start.arm)
    save_backbone(backbone, folder)
    return folder
