"""Jigsaw puzzles (Noroozi & Favaro 2016, https://arxiv.org/abs/1603.09246) and relative position (Doersch et al. 2015,
https://arxiv.org/abs/1505.05192): which part of the image belongs where?

The image is cut into 3×3 cells; from each, a smaller tile is taken at a random place, so that neighbouring tiles seldom
have an edge in common (one pair in 16 at 64 px, one in four at 32 px), and each tile is standardised by its own mean
and deviation, so that brightness, colour cast and gradients across the image give nothing away. The backbone sees one
tile at a time; only the head sees them together.
"""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretext.decoder import resize
from pretext.task import Batch, PretextTask, Recipe
from unlabel.backbone import Backbone
from unlabel.errors import UserError

__all__ = ["Jigsaw", "permutations", "tiles"]

TILE = 28 / 32  # side of a tile ÷ side of its cell
NEIGHBOURS = (0, 1, 2, 3, 5, 6, 7, 8)  # cells around the middle one, number 4, row by row


@dataclass(frozen=True)
class Config:
    mode: Literal["permutation", "relative"] = "permutation"
    """Which permutation put the nine tiles in this order; or where a tile lies, seen from the middle one."""
    permutations: int = 72
    """24 to 100 answers. Up to 72, any two differ in 8 of 9 places, which is the most that there can be; else in 7."""
    width: int = 128
    """Numbers per tile that the head compares."""


@functools.lru_cache
def permutations(count: int) -> np.ndarray:
    """(count, 9) int64: permutations of nine tiles at the largest possible least Hamming distance.

    Up to 72: the affine maps x → a·x + b of the field of nine elements, two of which agree in at most one point.
    Up to 504: the maps x → (a·x + b) / (c·x + d) of the projective line over the field of eight, which agree in at
    most two. Both are as large as such sets can be (Frankl & Deza 1977, https://doi.org/10.1016/0097-3165(77)90009-7).
    """
    if count <= 72:
        return np.array(_affine_nine()[:count])
    maps = _projective_eight()  # evenly spaced: the first 56 send one tile to one place, which one look would tell
    return np.array([maps[k * len(maps) // count] for k in range(count)])


def _affine_nine() -> list[list[int]]:
    """x + y·i with i² = -1, numbered 3·x + y, over the integers modulo 3."""

    def times_plus(a: int, x: int, b: int) -> int:
        (ar, ai), (xr, xi), (br, bi) = divmod(a, 3), divmod(x, 3), divmod(b, 3)
        return (ar * xr - ai * xi + br) % 3 * 3 + (ar * xi + ai * xr + bi) % 3

    # a outside: every nine in a row put each tile in each place once.
    return [[times_plus(a, x, b) for x in range(9)] for a in range(1, 9) for b in range(9)]


def _projective_eight() -> list[list[int]]:
    """Polynomials over the integers modulo 2, bits of 0 … 7, modulo x³ + x + 1; 8 is infinity."""

    def times(a: int, b: int) -> int:
        product = (a if b & 1 else 0) ^ (a << 1 if b & 2 else 0) ^ (a << 2 if b & 4 else 0)
        for shift in (1, 0):
            product ^= (0b1011 << shift) if product >> (3 + shift) & 1 else 0
        return product

    inverse = {a: b for a in range(1, 8) for b in range(1, 8) if times(a, b) == 1}

    def image(a: int, b: int, c: int, d: int, x: int) -> int:
        top, bottom = (a, c) if x == 8 else (times(a, x) ^ b, times(c, x) ^ d)
        return 8 if bottom == 0 else times(top, inverse[bottom])

    maps = dict.fromkeys(
        tuple(image(a, b, c, d, x) for x in range(9))
        for a, b, c, d in itertools.product(range(8), repeat=4)
        if times(a, d) != times(b, c)
    )
    return [list(m) for m in maps]


def tiles(images: Tensor, at: Tensor, tile: int) -> Tensor:
    """(N, C, S, S) to (N, 9, C, tile, tile), each tile of mean 0 and deviation 1 in each channel.

    ``at`` (N, 9, 2) int64: how far right and down of its cell's corner each tile begins.
    """
    n, channels, size, _ = images.shape
    cell = size // 3
    corner = torch.arange(9, device=images.device)
    offsets = torch.arange(tile, device=images.device)
    rows = (corner // 3 * cell + at[:, :, 1])[:, :, None] + offsets  # (N, 9, tile)
    columns = (corner % 3 * cell + at[:, :, 0])[:, :, None] + offsets
    flat = (rows[:, :, :, None] * size + columns[:, :, None, :]).reshape(n, 1, -1).expand(-1, channels, -1)
    cut = images.flatten(2).gather(2, flat).view(n, channels, 9, tile, tile).transpose(1, 2)
    centred = cut - cut.mean((3, 4), keepdim=True)
    return centred / centred.square().mean((3, 4), keepdim=True).sqrt().clamp(min=0.02)


class Jigsaw(PretextTask):
    """``accuracy``: share of images whose permutation, or relative position, is named."""

    Config = Config
    metrics = {"accuracy": "max"}  # noqa: RUF012
    recipe = Recipe(optimizer="adamw", lr=2e-3, weight_decay=0.05, batch_size=64)
    config: Config

    def __init__(self, backbone: Backbone, config: Config) -> None:
        super().__init__(backbone, config)
        if config.mode not in ("permutation", "relative"):
            raise UserError(f"unknown --jigsaw.mode {config.mode!r}: permutation or relative")
        if config.mode == "permutation" and not 24 <= config.permutations <= 100:
            raise UserError(f"--jigsaw.permutations {config.permutations}: from 24 to 100")
        if config.width < 1:
            raise UserError(f"--jigsaw.width {config.width}: a number above zero")
        self.answers = config.permutations if config.mode == "permutation" else len(NEIGHBOURS)
        seen = 9 if config.mode == "permutation" else 2
        if config.mode == "permutation":
            self.register_buffer("orders", torch.from_numpy(permutations(config.permutations)), persistent=False)
        self.each = nn.Sequential(nn.Linear(backbone.channels, config.width), nn.ReLU())
        self.together = nn.Sequential(
            nn.Linear(seen * config.width, 4 * config.width), nn.ReLU(), nn.Linear(4 * config.width, self.answers)
        )

    def cut(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Tiles in order (N, 9, 3, t, t), the answers (N,), and the order (N, 9) in which tiles are shown."""
        draws, cell = batch.draws.stream("jigsaw"), batch.images.shape[-1] // 3
        tile = max(1, round(TILE * cell))
        at = draws.stream("place").integers(cell - tile + 1, 9, 2)
        answer = draws.stream("answer").integers(self.answers)
        if self.config.mode == "permutation":
            order = self.get_buffer("orders")[answer]
        else:
            around = torch.tensor(NEIGHBOURS, device=answer.device)[answer]
            order = torch.stack([torch.full_like(around, 4), around], 1)
        return tiles(batch.images, at, tile), answer, order

    def logits(self, shown: Tensor) -> Tensor:
        """(N, 9 or 2, 3, t, t) to (N, answers)."""
        n, k = shown.shape[:2]
        # Enlarged where a tile is smaller than the network's stride: it would shrink to nothing.
        flat = resize(shown.flatten(0, 1), max(shown.shape[-1], self.backbone.stride))
        flat = flat.contiguous(memory_format=torch.channels_last)
        codes = self.each(self.backbone.forward_normalised(flat).pooled)
        return self.together(codes.view(n, k * self.config.width))

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        cut, answer, order = self.cut(batch)
        logits = self.logits(_take(cut, order)).float()
        return {
            "loss": F.cross_entropy(logits, answer),
            "accuracy": (logits.detach().argmax(1) == answer).float().mean(),
        }

    @torch.no_grad()
    def surprise(self, batch: Batch) -> Tensor:
        """- log p of the right answer."""
        cut, answer, order = self.cut(batch)
        return F.cross_entropy(self.logits(_take(cut, order)).float(), answer, reduction="none")

    def trivial(self, batch: Batch) -> dict[str, float]:
        return {"accuracy": 1 / self.answers}

    @torch.no_grad()
    def show(self, batch: Batch) -> dict[str, Tensor]:
        """The shuffled tiles; in their places; put back by what was predicted. Relative: the two tiles alone."""
        cut, _, order = self.cut(batch)
        guess = self.logits(_take(cut, order)).argmax(1)
        if self.config.mode == "permutation":
            back = _take(_take(cut, order), self.get_buffer("orders")[guess].argsort(1))
            sheets = {"input": _take(cut, order), "target": cut, "prediction": back}
        else:
            around = torch.tensor(NEIGHBOURS, device=guess.device)
            sheets = {"input": _only(cut, order[:, :1], order), "target": _only(cut, order, order)}
            sheets["prediction"] = _only(cut, torch.cat([order[:, :1], around[guess][:, None]], 1), order)
        return {k: _sheet(v, batch.images.shape[-1]) for k, v in sheets.items()}


def _take(cut: Tensor, order: Tensor) -> Tensor:
    """(N, 9, …) and (N, k) to (N, k, …): the tiles in that order."""
    return cut[torch.arange(len(cut), device=cut.device)[:, None], order]


def _only(cut: Tensor, where: Tensor, which: Tensor) -> Tensor:
    """Tiles ``which`` (N, k) at cells ``where`` (N, j ≤ k), the other cells empty."""
    out, each = torch.zeros_like(cut), torch.arange(len(cut), device=cut.device)[:, None]
    out[each, where] = _take(cut, which)[:, : where.shape[1]]
    return out


def _sheet(cut: Tensor, size: int) -> Tensor:
    """(N, 9, 3, t, t) standardised to (N, 3, size, size) in [0, 1], with gaps between the tiles."""
    padded = F.pad((cut / 5 + 0.5).clamp(0, 1), (1, 1, 1, 1), value=1.0)
    n, _, channels, side, _ = padded.shape
    grid = padded.view(n, 3, 3, channels, side, side).permute(0, 3, 1, 4, 2, 5)
    return F.interpolate(grid.reshape(n, channels, 3 * side, 3 * side), size=(size, size), mode="nearest")
