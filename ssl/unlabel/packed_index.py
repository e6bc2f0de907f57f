"""`index.bin`: what a packed cache knows of its images. Its first line is the SHA-256 of the rest."""

import hashlib
import json
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np

__all__ = ["COLUMNS", "Index", "read_index", "write_index"]

COLUMNS = {"rows": ("<i8", ()), "hashes": ("u1", (32,)), "phashes": ("<u8", (2,)), "shapes": ("<i4", (2,))}


class Index(NamedTuple):
    """What is known about the N packed images; rows of the source, so that names and labels come from there.

    `rows` (N,) int64; `hashes` (N, 32) uint8; `phashes` (N, 2) uint64; `shapes` (N, 2) int32; `skipped` (name, reason).
    """

    rows: np.ndarray
    hashes: np.ndarray
    phashes: np.ndarray
    shapes: np.ndarray
    skipped: list[tuple[str, str]]


def read_index(folder: Path) -> Index | None:
    """None if there is none, or it is damaged."""
    try:
        with open(folder / "index.bin", "rb") as file:
            checksum, body = file.readline().strip(), file.read()
    except (FileNotFoundError, NotADirectoryError):  # one that is there and may not be read is nobody's to remove
        return None
    if hashlib.sha256(body).hexdigest().encode() != checksum:
        return None
    at = body.index(b"\n") + 1
    about, columns = json.loads(body[:at]), {}
    for name, (kind, shape) in COLUMNS.items():
        count = about["images"] * int(np.prod(shape, dtype=int))
        columns[name] = np.frombuffer(body, kind, count, at).reshape(-1, *shape)
        at += columns[name].nbytes
    return Index(**columns, skipped=[(name, reason) for name, reason in about["skipped"]])


def write_index(folder: Path, index: Index, begun: int) -> None:
    """``begun``: when the first image was read, in ns; what is changed later is younger than the file."""
    head = json.dumps({"images": len(index.rows), "skipped": index.skipped}).encode() + b"\n"
    columns = [np.ascontiguousarray(getattr(index, name), kind).data for name, (kind, _) in COLUMNS.items()]
    digest = hashlib.sha256(head)
    for column in columns:
        digest.update(column)
    with open(folder / "index.bin", "wb") as file:
        file.write(digest.hexdigest().encode() + b"\n" + head)
        for column in columns:
            file.write(column)
        file.flush()
        os.fsync(file.fileno())
    os.utime(folder / "index.bin", ns=(begun, begun))
