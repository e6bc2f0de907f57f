"""Which labels an evaluation may use: stratified, seeded draws, the same for every arm."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

from unlabel.errors import UserError


class LabelDraws:
    """Draw d is block d of one permutation of each class of the pool; its k-subset is the block's first k.

    So the draws of k labels are nested inside those of more labels, and two draws share no image while the
    pool lasts. Where a class is too small for that, the blocks are spread evenly around its permutation and
    overlap at their ends only: small subsets stay disjoint for as long as possible.

    Args:
        labels: (P,) class of each image of the pool, integers >= 0.
        block: labels per class in the largest draw that will be asked for ("all" does not count).
        n_draws: number of draws.
        seed: seed of the permutations; one per class, so that another class's size changes nothing.
        class_names: for error messages; the numbers themselves where absent.

    Raises:
        UserError: a class has fewer than `block` images, or a number is not positive.
    """

    def __init__(
        self,
        labels: np.ndarray,
        block: int,
        n_draws: int,
        seed: int = 0,
        class_names: Sequence[str] | None = None,
    ) -> None:
        if block < 1 or n_draws < 1:
            raise UserError("labels per class and draws must be at least 1; ask for 1 or more")
        self.labels = np.asarray(labels)
        self.block, self.n_draws, self.seed = block, n_draws, seed
        self.class_names = class_names
        self._members = {int(c): np.flatnonzero(self.labels == c) for c in np.unique(self.labels)}
        if not self._members:
            raise UserError("the labelled pool is empty; give a --train source with images in class folders")
        for c, members in self._members.items():
            if len(members) < block:
                name = class_names[c] if class_names else str(c)
                raise UserError(
                    f"class {name} has {len(members)} images in the training pool, {block} per class were "
                    f"asked for; ask for at most {min(map(len, self._members.values()))}"
                )

    @property
    def disjoint(self) -> bool:
        """Whether no two draws of the whole block share an image."""
        return self.disjoint_at(self.block)

    def disjoint_at(self, per_class: int | Literal["all"]) -> bool:
        """Whether no two draws of `per_class` labels share an image."""
        if per_class == "all":
            return self.n_draws == 1
        smallest = min(map(len, self._members.values()))
        return self.n_draws == 1 or (self.n_draws <= smallest and per_class <= self._step(smallest))

    def indices(self, draw: int, per_class: int | Literal["all"]) -> np.ndarray:
        """Sorted positions in the pool of draw `draw` with `per_class` labels of each class.

        "all" is every labelled image, the same for every draw.
        """
        if not 0 <= draw < self.n_draws:
            raise IndexError(f"draw {draw} of {self.n_draws}")
        if per_class == "all":
            return np.sort(np.concatenate(list(self._members.values())))
        if not 1 <= per_class <= self.block:
            raise UserError(f"labels per class must be from 1 to {self.block}, the block; got {per_class}")
        return np.sort(np.concatenate([self._class_block(c, draw)[:per_class] for c in self._members]))

    def _step(self, size: int) -> int:
        """How far apart, in a class of `size` images, two neighbouring blocks begin."""
        if self.block * self.n_draws <= size:
            return self.block
        return max(1, size // self.n_draws)

    def _class_block(self, c: int, draw: int) -> np.ndarray:
        members = self._members[c]
        # More draws than images: a fresh permutation for each lap, or draws would repeat.
        lap, start = divmod(draw * self._step(len(members)), len(members))
        order = np.random.default_rng([self.seed, c, lap]).permutation(len(members))
        return members[order[(start + np.arange(self.block)) % len(members)]]
