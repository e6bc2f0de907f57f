"""Atomic save, verify, resume. The only place that calls ``torch.load``, and never with code in the file."""

from __future__ import annotations

import errno
import hashlib
import io
import os
import re
import sys
import zipfile
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import torch

from unlabel.errors import UserError

__all__ = ["file_sha256", "load_newest", "lock", "newest", "save", "write_atomic"]

_MAGIC = b"unlabel-checkpoint-1\n"
_KEEP = 2
_CONTENT = {"model": dict, "optimizers": list, "step": int, "seconds": float, "phase": int, "sums": dict, "summed": int}


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_atomic(path: Path, data: bytes) -> None:
    """All of it or nothing, also when the machine loses power: write beside, flush to disk, rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise UserError(f"cannot write {path}: {error.strerror}; what was saved before is untouched") from None


def save(folder: Path, step: int, state: dict[str, Any]) -> Path:
    """Write ``step-XXXXXXXXX.pt`` with a checksum in its head; keep the newest two."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    payload = buffer.getvalue()
    path = folder / f"step-{step:09d}.pt"
    write_atomic(path, _MAGIC + hashlib.sha256(payload).digest() + payload)
    later, kept = [p for p in _all(folder) if p > path], [p for p in _all(folder) if p <= path]
    for old in later + kept[_KEEP:]:  # a later one was damaged: the run would have gone on from it
        old.unlink(missing_ok=True)
    for stale in folder.glob(".*.tmp"):  # left by a process that was killed while writing
        stale.unlink(missing_ok=True)
    return path


def _all(folder: Path) -> list[Path]:
    return sorted(folder.glob("step-*.pt"), reverse=True)


def newest(folder: Path) -> Path | None:
    """The file of the last step, whether or not it verifies; None where there is none."""
    return next(iter(_all(folder)), None)


def _read(path: Path) -> dict[str, Any]:
    head = len(_MAGIC) + 32
    with path.open("rb") as file:
        begin = file.read(head)
        if not begin.startswith(_MAGIC) or len(begin) < head:
            raise ValueError("not a checkpoint, or cut short")
        if hashlib.file_digest(file, "sha256").digest() != begin[len(_MAGIC) :]:  # reads in pieces
            raise ValueError("checksum does not match")
        file.seek(head)
        payload = io.BytesIO(file.read())
    with zipfile.ZipFile(payload) as parts:  # torch stores; what is compressed could unpack to any size
        if any(part.compress_type != zipfile.ZIP_STORED for part in parts.infolist()):
            raise ValueError("compressed")
    payload.seek(0)
    state = torch.load(payload, map_location="cpu", weights_only=True)
    if not isinstance(state, dict) or any(not isinstance(state.get(k), v) for k, v in _CONTENT.items()):
        raise ValueError("not the state of a run")
    return state


def load_newest(folder: Path) -> dict[str, Any] | None:
    """The newest checkpoint that verifies; None where there is none at all.

    A damaged one is named on stderr and the one before is used. If all are damaged: an error.
    """
    paths = _all(folder)
    for path in paths:
        try:
            return _read(path)
        except Exception as error:  # a damaged or hostile file may raise anything
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            print(f"warning: checkpoint {path} is not usable ({reason})", file=sys.stderr)
    if paths:
        raise UserError(
            f"none of the {len(paths)} checkpoints in {folder} is usable: move the folder away to start anew"
        )
    return None


@contextmanager
def lock(folder: Path):
    """One process at a time writes a run folder. The operating system drops the lock when the process dies."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if (place := folder / ".lock").exists() and not place.is_file():
            raise UserError(f"{place} is no file: choose another --out")
        file: IO[bytes] = place.open("ab")
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror}") from None
    try:
        # lockf and not flock: a forked worker would keep flock's lock alive after its parent's death.
        try:
            if os.name == "nt":
                import msvcrt

                msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
            else:
                import fcntl

                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN, errno.EDEADLK):
                raise UserError(f"another run is writing to {folder}: wait for it, or choose another --out") from None
            why = f"files cannot be locked in {folder} ({error.strerror})"
            print(f"warning: {why}: let no other process write there", file=sys.stderr)
        for stale in folder.glob(".*.tmp"):  # left by a process that was killed while writing
            if re.search(r"\.\d+\.tmp$", stale.name):
                stale.unlink(missing_ok=True)
        yield
    finally:
        file.close()
