"""Images decoded each time they are asked for: what stands in for the packed cache where that would not fit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np

from unlabel.errors import UserError

__all__ = ["Streamed"]


class Streamed:
    """Square images (N, side, side, 3) uint8, indexed like an array; each access decodes, in ``workers`` threads.

    ``make(k)`` gives the pixels of image k as bytes, or a sentence that says why it cannot. ``prefetch`` starts on
    images that will be asked for next.
    """

    def __init__(self, names: Sequence[str], side: int, make: Callable[[int], bytes | str], workers: int) -> None:
        self.names, self.side, self._make = names, side, make
        self.shape, self.dtype = (len(names), side, side, 3), np.dtype(np.uint8)
        self._pool = ThreadPoolExecutor(workers)
        self._begun: dict[int, Future[bytes | str]] = {}

    def __len__(self) -> int:
        return len(self.names)

    def prefetch(self, rows: np.ndarray) -> None:
        """Decode these images in the background. What was begun before and is not among them is let go."""
        before, self._begun = self._begun, {}
        for k in rows.tolist():
            self._begun[k] = before.pop(k, None) or self._begun.get(k) or self._pool.submit(self._make, k)
        for future in before.values():
            future.cancel()

    def __getitem__(self, key: Any) -> np.ndarray:
        rows = np.arange(len(self))[key]
        once, back = np.unique(rows, return_inverse=True)
        out = np.empty((len(once), *self.shape[1:]), np.uint8)
        begun = {k: self._begun.pop(k, None) or self._pool.submit(self._make, k) for k in once.tolist()}
        try:
            for k, place in zip(once.tolist(), out, strict=True):
                pixels = begun.pop(k).result()
                if isinstance(pixels, str):
                    raise UserError(f"{self.names[k]} was readable when the run began and is not now ({pixels})")
                place[:] = np.frombuffer(pixels, np.uint8).reshape(self.shape[1:])
        finally:
            for future in begun.values():  # an error or Ctrl-C: do not decode the rest at exit
                future.cancel()
        return out[back.reshape(np.shape(rows))]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self[:], dtype)
