from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from pretext.jigsaw import Jigsaw, permutations, tiles
from pretext.task import Batch
from unlabel.backbone import build_backbone
from unlabel.draws import Draws
from unlabel.errors import UserError


def make(size: int = 96, **settings) -> Jigsaw:
    torch.manual_seed(0)
    return Jigsaw(build_backbone("small", size), Jigsaw.Config(**settings))


def batch_of(images: torch.Tensor, epoch: int = 0) -> Batch:
    return Batch(images, Draws(0, [epoch] * len(images), list(range(len(images)))), 0.5)


@pytest.mark.parametrize(("count", "least"), [(24, 8), (72, 8), (73, 7), (100, 7), (504, 7)])
def test_permutations_are_as_far_apart_as_can_be(count: int, least: int):
    perms = permutations(count)
    assert perms.shape == (count, 9)
    assert (np.sort(perms, axis=1) == np.arange(9)).all()
    distance = (perms[:, None] != perms[None]).sum(2)
    assert distance[~np.eye(count, dtype=bool)].min() == least


def test_seventy_two_use_every_place_equally():
    perms = permutations(72)
    for place, tile in itertools.product(range(9), repeat=2):
        assert (perms[:, place] == tile).sum() == 8


def test_of_a_hundred_no_place_tells_the_permutation():
    """Every tile is in every place, and in none of them in more than a third of the permutations."""
    perms = permutations(100)
    for tile in range(9):
        counts = np.bincount((perms == tile).argmax(1), minlength=9)
        assert counts.min() >= 1
        assert counts.max() <= 33


def test_tiles_of_96_pixels_are_28_with_gaps_and_standardised():
    images = torch.rand(3, 3, 96, 96)
    at = torch.randint(0, 5, (3, 9, 2), generator=torch.Generator().manual_seed(0))
    cut = tiles(images, at, 28)
    assert cut.shape == (3, 9, 3, 28, 28)
    assert torch.allclose(cut.mean((3, 4)), torch.zeros(3, 9, 3), atol=1e-5)
    assert torch.allclose(cut.square().mean((3, 4)), torch.ones(3, 9, 3), atol=1e-3)
    # One tile by hand: the middle right one of image 1.
    x, y = at[1, 5].tolist()
    by_hand = images[1, :, 32 + y : 60 + y, 64 + x : 92 + x]
    by_hand = (by_hand - by_hand.mean((1, 2), keepdim=True)) / by_hand.std((1, 2), keepdim=True, correction=0)
    assert torch.allclose(cut[1, 5], by_hand, atol=1e-4)


def test_batch_uses_32_pixel_cells_and_jitters(colour_photos: torch.Tensor):
    task = make()
    images = torch.nn.functional.interpolate(colour_photos[:32], size=(96, 96), mode="bilinear")
    first, answers, order = task.cut(batch_of(images))
    second, others, _ = task.cut(batch_of(images, epoch=1))
    assert first.shape == (32, 9, 3, 28, 28)
    assert not torch.equal(first, second)
    assert not torch.equal(answers, others)
    assert len(set(answers.tolist())) > 15
    assert torch.equal(order, torch.from_numpy(permutations(72))[answers])


@pytest.mark.parametrize("mode", ["permutation", "relative"])
def test_pure_gradients_give_nothing_away(mode: str):
    """Ramps in any direction, of any colour: each tile of an image is the same after standardising."""
    n = 64
    generator = torch.Generator().manual_seed(0)
    line = torch.linspace(0, 1, 96)
    slope = torch.rand(n, 3, 2, 1, 1, generator=generator) * 0.4 - 0.2
    images = 0.5 + slope[:, :, 0] * line.view(1, 1, 1, -1) + slope[:, :, 1] * line.view(1, 1, -1, 1)
    task = make(mode=mode)
    cut, _, _ = task.cut(batch_of(images))
    assert torch.allclose(cut, cut[:, :1].expand_as(cut), atol=2e-2)


@pytest.mark.parametrize("mode", ["permutation", "relative"])
def test_previews_show_the_truth(mode: str, colour_photos: torch.Tensor):
    task = make(32, mode=mode).eval()
    batch = batch_of(colour_photos[:8])
    _, answer, order = task.cut(batch)

    def oracle(shown: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.one_hot(answer, task.answers).float()

    task.logits = oracle  # type: ignore[method-assign]
    shown = task.show(batch)
    assert torch.equal(shown["prediction"], shown["target"])
    assert not torch.equal(shown["input"], shown["target"])
    assert order.shape == (8, 9 if mode == "permutation" else 2)
    assert (order[:, 0] == 4).all() if mode == "relative" else (order.sort(1).values == torch.arange(9)).all()


def test_wrong_settings():
    for settings in ({"mode": "x"}, {"permutations": 10}, {"permutations": 101}, {"width": 0}):
        with pytest.raises(UserError, match="jigsaw"):
            make(32, **settings)
