"""All randomness of augmentation and tasks: a pure function of (seed, epoch, image index, stream name).

Row i of whatever is drawn belongs to image i of the batch. It depends on nothing else: not on the rank, the
batch, the number of processes, the calls before, or which other tasks run. So two processes equal one, and a
resumed run sees what the undisturbed run would have seen.
"""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Sequence
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

__all__ = ["Draws", "mix", "seed_everything"]


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


def _splitmix(x: np.ndarray) -> np.ndarray:
    """splitmix64's finaliser (Steele et al. 2014) of uint64: neighbouring image indices get unrelated seeds."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _counted(keys: Tensor, count: int) -> Tensor:
    """SplitMix64: the first ``count`` 64-bit numbers of each key's sequence. int64 (N,) to int64 (N, count)."""

    def shifted(x: Tensor, by: int) -> Tensor:  # torch's >> keeps the sign
        return (x >> by) & (1 << 64 - by) - 1

    x = keys[:, None] + torch.arange(1, count + 1, device=keys.device) * (0x9E3779B97F4A7C15 - 2**64)
    x = (x ^ shifted(x, 30)) * (0xBF58476D1CE4E5B9 - 2**64)
    x = (x ^ shifted(x, 27)) * (0x94D049BB133111EB - 2**64)
    return x ^ shifted(x, 31)


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
        # On a GPU a generator for each row would be a kernel for each row: there all rows are counted off at once.
        # MPS has no fast re-seeding either; there the numbers are drawn on the CPU and copied.
        self.counted = self.device.type == "cuda"

    @cached_property
    def _keys(self) -> np.ndarray:
        """(N,) uint64."""
        bases = {e: mix(self.seed, e, self.name) for e in set(self.epochs)}
        own = np.array([bases[e] for e in self.epochs], np.uint64)
        return _splitmix(own ^ _splitmix(np.array(self.indices, np.uint64)))

    def __len__(self) -> int:
        return len(self.indices)

    def stream(self, name: str) -> Draws:
        """An independent set of draws for the same images, e.g. ``batch.draws.stream("noise")``."""
        return Draws(self.seed, self.epochs, self.indices, f"{self.name}/{name}", self.device)

    def _by_row(self, shape: tuple[int, ...], dtype: torch.dtype, draw: str, *args: int) -> Tensor:
        out, generator = torch.empty((len(self), *shape), dtype=dtype), torch.Generator()
        # 32 bits: torch's CPU generator (mt19937) keeps no more of a seed than that.
        for row, key in zip(out, (self._keys >> np.uint64(32)).tolist(), strict=True):
            getattr(row, draw)(*args, generator=generator.manual_seed(key))
        return out.to(self.device)

    def _bits(self, shape: tuple[int, ...]) -> Tensor:
        """(N, \\*shape) int64, 53 random bits, of a counter."""
        keys = torch.from_numpy(self._keys.view(np.int64)).to(self.device, non_blocking=True)
        return (_counted(keys, math.prod(shape)) >> 11 & (1 << 53) - 1).view(len(self), *shape)

    def uniform(self, *shape: int) -> Tensor:
        """(N, \\*shape) float32, uniform in [0, 1)."""
        if self.counted:
            return (self._bits(shape) >> 29).float() * 2.0**-24
        return self._by_row(shape, torch.float32, "uniform_")

    def normal(self, *shape: int) -> Tensor:
        """(N, \\*shape) float32, standard normal."""
        if self.counted:  # Box & Muller 1958
            bits = self._bits(shape)
            radius = ((bits >> 29).float() + 1) * 2.0**-24  # above 0
            angle = (bits & (1 << 29) - 1).float() * (2 * math.pi * 2.0**-29)
            return (-2 * radius.log()).sqrt() * angle.cos()
        return self._by_row(shape, torch.float32, "normal_")

    def integers(self, high: int, *shape: int) -> Tensor:
        """(N, \\*shape) int64, uniform in 0 … high - 1."""
        if self.counted:
            return self._bits(shape) % high
        return self._by_row(shape, torch.int64, "random_", 0, high)

    def slice(self, start: int, stop: int) -> Draws:
        """The draws of images ``start:stop`` of this batch."""
        return Draws(self.seed, self.epochs[start:stop], self.indices[start:stop], self.name, self.device)
