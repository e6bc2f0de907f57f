"""All randomness of augmentation and tasks: a pure function of (seed, epoch, image index, stream name).

Row i of whatever is drawn belongs to image i of the batch. It depends on nothing else: not on the rank, the
batch, the number of processes, the calls before, or which other tasks run. So two processes equal one, and a
resumed run sees what the undisturbed run would have seen.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

__all__ = ["Draws", "mix", "seed_everything"]

_MASK = (1 << 64) - 1


def mix(*parts: int | str) -> int:
    """A well-mixed 64-bit key from integers and names; the same on every platform and Python version."""
    text = "\x1f".join(str(p) for p in parts).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")


def seed_everything(*parts: int | str) -> None:
    """Seed the global generators of torch, numpy and Python, for whatever draws from them and not from Draws."""
    key = mix(*parts)
    torch.manual_seed(key)
    np.random.seed(key % 2**32)
    random.seed(key)


def _splitmix(x: int) -> int:
    """splitmix64's finaliser (Steele et al. 2014): neighbouring image indices get unrelated seeds."""
    x = (x + 0x9E3779B97F4A7C15) & _MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)


class Draws:
    """Random numbers for a batch of N images, one independent stream per image.

    Drawing twice from the same stream gives the same numbers (there is no hidden counter): give each purpose
    its own ``stream(name)``.
    """

    def __init__(
        self,
        seed: int,
        epochs: Sequence[int],
        indices: Sequence[int],
        name: str = "",
        device: torch.device | str = "cpu",
    ) -> None:
        if len(epochs) != len(indices):
            raise ValueError(f"{len(epochs)} epochs for {len(indices)} images")
        self.seed, self.epochs, self.indices, self.name = seed, tuple(epochs), tuple(indices), name
        self.device = torch.device(device)
        bases = {e: mix(seed, e, name) for e in set(self.epochs)}
        # 32 bits: torch's CPU generator (mt19937) keeps no more of a seed than that.
        pairs = zip(self.epochs, self.indices, strict=True)
        self._keys = [_splitmix(bases[e] ^ _splitmix(int(i))) >> 32 for e, i in pairs]
        # MPS has no fast re-seeding; there the numbers are drawn on the CPU and copied.
        self._generator = torch.Generator("cuda" if self.device.type == "cuda" else "cpu")

    def __len__(self) -> int:
        return len(self.indices)

    def stream(self, name: str) -> Draws:
        """An independent set of draws for the same images, e.g. ``batch.draws.stream("noise")``."""
        return Draws(self.seed, self.epochs, self.indices, f"{self.name}/{name}", self.device)

    def _rows(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.empty((len(self), *shape), dtype=dtype, device=self._generator.device)

    def uniform(self, *shape: int) -> Tensor:
        """(N, \\*shape) float32, uniform in [0, 1)."""
        out = self._rows(shape, torch.float32)
        for row, key in zip(out, self._keys, strict=True):
            row.uniform_(generator=self._generator.manual_seed(key))
        return out.to(self.device)

    def normal(self, *shape: int) -> Tensor:
        """(N, \\*shape) float32, standard normal."""
        out = self._rows(shape, torch.float32)
        for row, key in zip(out, self._keys, strict=True):
            row.normal_(generator=self._generator.manual_seed(key))
        return out.to(self.device)

    def integers(self, high: int, *shape: int) -> Tensor:
        """(N, \\*shape) int64, uniform in 0 … high - 1."""
        out = self._rows(shape, torch.int64)
        for row, key in zip(out, self._keys, strict=True):
            row.random_(0, high, generator=self._generator.manual_seed(key))
        return out.to(self.device)

    def slice(self, start: int, stop: int) -> Draws:
        """The draws of images ``start:stop`` of this batch."""
        return Draws(self.seed, self.epochs[start:stop], self.indices[start:stop], self.name, self.device)
