"""Names and hashes of very many images in little memory: sequences of str whose text is made when it is asked for.

A million Python strings of 25 characters take 82 MB, these 33.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, overload

import numpy as np

__all__ = ["Digests", "Names"]

_BLOCK = 4096  # of them at a time, where all are gone through


class _Column(Sequence[str]):
    """Equal to any sequence of the same strings; a slice or ``take`` is a column again."""

    def text(self, start: int, stop: int) -> list[str]:
        raise NotImplementedError

    def take(self, rows: np.ndarray) -> _Column:
        raise NotImplementedError

    @overload
    def __getitem__(self, key: int) -> str: ...
    @overload
    def __getitem__(self, key: slice) -> _Column: ...
    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, slice):
            return self.take(np.arange(len(self))[key])
        at = range(len(self))[key]  # IndexError, and negative numbers, as in a list
        return self.text(at, at + 1)[0]

    def __iter__(self) -> Iterator[str]:
        for start in range(0, len(self), _BLOCK):
            yield from self.text(start, min(start + _BLOCK, len(self)))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence) or isinstance(other, str):
            return NotImplemented
        return len(self) == len(other) and all(a == b for a, b in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]  # as of a list

    def __repr__(self) -> str:
        return repr(list(self)) if len(self) < 20 else f"<{len(self):,} strings, {self[0]!r} … {self[-1]!r}>"


class Names(_Column):
    """Strings of any length as UTF-8, one after the other. Bytes that are no UTF-8 (in names of files) stay."""

    def __init__(self, names: Iterable[str] = ()) -> None:
        blobs, lengths, names = [], [np.zeros(1, np.int64)], iter(names)
        while block := list(itertools.islice(names, _BLOCK)):
            text = "".join(block)
            blob = text.encode("utf-8", "surrogatepass")
            if len(blob) != len(text):
                block = [name.encode("utf-8", "surrogatepass") for name in block]
            lengths.append(np.fromiter(map(len, block), np.int64, len(block)))
            blobs.append(blob)
        self._blob, self._ends = b"".join(blobs), np.cumsum(np.concatenate(lengths))

    def __len__(self) -> int:
        return len(self._ends) - 1

    def text(self, start: int, stop: int) -> list[str]:
        ends = self._ends[start : stop + 1].tolist()
        return [self._blob[a:b].decode("utf-8", "surrogatepass") for a, b in itertools.pairwise(ends)]

    def take(self, rows: np.ndarray) -> Names:
        lengths, starts = np.diff(self._ends)[rows], self._ends[:-1][rows]
        out = Names()
        out._ends = np.concatenate([[0], np.cumsum(lengths)])
        spans = zip(starts.tolist(), (starts + lengths).tolist(), strict=True)
        out._blob = b"".join([self._blob[a:b] for a, b in spans])
        return out


class Digests(_Column):
    """SHA-256 digests (N, 32) uint8 as hexadecimal strings."""

    def __init__(self, digests: np.ndarray) -> None:
        self.bytes = digests

    def __len__(self) -> int:
        return len(self.bytes)

    def text(self, start: int, stop: int) -> list[str]:
        lines = np.ascontiguousarray(self.bytes[start:stop]).tobytes()
        return lines.hex("\n", 32).split("\n")

    def take(self, rows: np.ndarray) -> Digests:
        return Digests(self.bytes[rows])
