"""The run folder: config.json, metrics.jsonl, the question whether a run may be continued or is finished."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from dataclasses import MISSING, fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from unlabel.checkpoint import file_sha256, write_atomic
from unlabel.config import PretrainConfig, plain
from unlabel.distributed import world_size
from unlabel.errors import UserError

__all__ = ["RunFolder", "hardware", "versions"]

_LARGEST = 64 << 20  # bytes of a config.json


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in ("unlabel", "torch", "torchvision", "timm", "scikit-learn", "numpy", "pillow"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "unknown"
    return found


def hardware() -> dict[str, Any]:
    import torch

    cpu = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next(x.split(":", 1)[1].strip() for x in lines if x.startswith("model name"))
    except (OSError, StopIteration):
        pass
    try:
        memory = round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (ValueError, OSError, AttributeError):
        memory = None
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {"cpu": cpu, "threads": torch.get_num_threads(), "gpu": gpu, "memory_gb": memory}


def commit() -> str | None:
    """Of the checkout that this code runs from."""
    here = Path(__file__).resolve()

    def git(*words: str) -> str:
        return subprocess.run(
            ["git", "-C", str(here.parent), *words], capture_output=True, text=True, timeout=5, check=True
        ).stdout.strip()

    try:  # installed below somebody's repository, this file is none of its
        return git("ls-files", "--error-unmatch", here.name) and git("rev-parse", "HEAD")
    except (OSError, subprocess.SubprocessError):
        return None


def _refuse_nonsense(about: Any) -> None:
    """ValueError or TypeError where config.json is not what a run writes: edited, or a stranger's."""
    kinds = {"settings": dict, "resolved": dict, "fingerprint": str}
    if not isinstance(about, dict) or any(not isinstance(about.get(k), v) for k, v in kinds.items()):
        raise ValueError("settings are missing")
    asked, data, done = about["settings"], about.get("data", {}), about.get("finished") or {}
    if not isinstance(data, dict) or not isinstance(done, dict):
        raise ValueError("data and finished are tables")
    words = [asked.get("tasks", []), data.get("spec", []), data.get("shown_as", [])]
    if not all(isinstance(w, list) and all(isinstance(v, str) for v in w) for w in words):
        raise ValueError("tasks and data are lists of names")
    own = [t.get(k, {}) for t, k in ((asked, "task_settings"), (about["resolved"], "tasks"))]
    if not all(isinstance(o, dict) and all(isinstance(v, dict) for v in o.values()) for o in own):
        raise ValueError("tasks have settings by name")
    if not isinstance(asked.get("backbone", ""), str) or not isinstance(asked.get("seed", 0), int):
        raise ValueError("backbone is a name, seed a whole number")
    if done and not isinstance(done["backbone_sha256"], str):
        raise ValueError("finished has no checksum")
    numbers = [done[k] for k in ("steps", "images_seen", "seconds")] if done else []
    if not all(isinstance(v, int | float) and 0 <= v < 1e15 for v in numbers):
        raise ValueError("finished holds no numbers")


class RunFolder:
    """Paths and small files of one run; the checkpoints themselves are unlabel.checkpoint's."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = path / "checkpoints"
        self.metrics = path / "metrics.jsonl"
        self.previews = path / "previews"
        self.excluded = path / "excluded.txt"  # content hashes of images left out; only where there are some
        self.about: dict[str, Any] = {}

    def read(self) -> dict[str, Any] | None:
        """config.json, or None where the run has not begun."""
        file = self.path / "config.json"
        try:
            if file.exists() and (not file.is_file() or file.stat().st_size > _LARGEST):
                raise ValueError("no file, or too large")
            self.about = json.loads(file.read_text("utf-8", "surrogateescape"))  # as it is written
            _refuse_nonsense(self.about)
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError, OSError, RecursionError) as error:
            raise UserError(f"{file} is not a run's config ({error}): give another folder") from None
        return self.about

    def left_out(self) -> frozenset[str]:
        """Content hashes of the images that must not be trained on."""
        return frozenset(self.excluded.read_text(errors="replace").split()) if self.excluded.exists() else frozenset()

    def same_or_refuse(
        self, settings: dict[str, Any], fingerprint: str, differs: str = "other names or sizes of files"
    ) -> None:
        """A run is continued only with the settings and the data that it was begun with.

        ``differs``: in what the data do, where their fingerprint is another one.
        """
        # A setting that did not exist when the run was begun had, in effect, today's default.
        defaults = {f.name: plain(f.default) for f in fields(PretrainConfig) if f.default is not MISSING}
        old = {k: v for k, v in defaults.items() if k in settings} | self.about["settings"]
        differing = [
            f"{k} was {old.get(k)!r}, now {settings.get(k)!r}"
            for k in sorted(old.keys() | settings.keys())
            if old.get(k) != settings.get(k)
        ]
        if self.about["fingerprint"] != fingerprint:
            differing.append(f"data ({differs})")
        if differing:
            raise UserError(
                f"{self.path} holds a run with other settings: {'; '.join(differing)}. Choose another --out"
            )

    def begin(
        self, settings: dict[str, Any], free: dict[str, Any], resolved: dict[str, Any], fingerprint: str,
        data: dict[str, Any],
    ) -> None:  # fmt: skip
        """``free``: the settings that may differ when the run is continued."""
        self.about = {
            "settings": settings,
            "free": free,
            "processes": world_size(),
            "resolved": resolved,
            "fingerprint": fingerprint,
            "data": data,
            "versions": versions(),
            "hardware": hardware(),
            "commit": commit(),
        }
        self.write()

    def write(self) -> None:
        text = json.dumps(self.about, indent=2, ensure_ascii=False) + "\n"
        write_atomic(self.path / "config.json", text.encode("utf-8", "surrogateescape"))

    def cut_metrics(self, step: int) -> None:
        """Drop lines beyond the checkpoint: those steps are run again. A line cut short by a kill goes too."""
        if not self.metrics.exists():
            return
        kept = []
        for line in self.metrics.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                if json.loads(line)["step"] <= step:
                    kept.append(line)
            except (ValueError, KeyError, TypeError, RecursionError):
                continue
        write_atomic(self.metrics, "".join(x + "\n" for x in kept).encode())

    def log(self, line: dict[str, Any]) -> None:
        try:
            with self.metrics.open("a") as file:
                file.write(json.dumps(line) + "\n")
        except OSError as error:
            raise UserError(f"cannot write {self.metrics}: {error.strerror or error}") from None

    def finish(self, backbone: Path, result: dict[str, Any]) -> None:
        self.about["finished"] = {**result, "backbone_sha256": file_sha256(backbone)}
        self.write()

    def finished(self) -> bool:
        """True if the run is done and its product is what was written; an error where the product was changed."""
        done = self.about.get("finished")
        if not done:
            return False
        backbone = self.path / "backbone.safetensors"
        if not backbone.exists():
            raise UserError(
                f"{self.path} is finished but backbone.safetensors is gone: restore it or choose another --out"
            )
        if file_sha256(backbone) != done["backbone_sha256"]:
            raise UserError(f"{backbone} is not the file that this run wrote (checksum differs)")
        if not (self.path / "backbone.json").exists():
            raise UserError(f"{self.path} is finished but backbone.json is gone: restore it or choose another --out")
        return True
