from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pretext.rotation import Rotation, pairwise_accuracy, residual_block
from pretext.task import Batch
from unlabel.augment import four_rotations, random_view
from unlabel.backbone import build_backbone
from unlabel.draws import Draws


def batch_of(images: torch.Tensor, epoch: int = 0) -> Batch:
    n = len(images)
    return Batch(images, Draws(0, [epoch] * n, range(n)), 0.5)


def test_four_views_are_rot90_of_one_augmented_image_bit_for_bit():
    task = Rotation(build_backbone("small", 64), Rotation.Config())
    images = torch.rand(3, 3, 64, 64)
    views, labels = task._views(batch_of(images))
    upright = views[:3]
    assert not torch.equal(upright, images)  # the colours vary …
    for k in range(4):
        assert torch.equal(views[3 * k : 3 * k + 3], torch.rot90(upright, k, (2, 3)))  # … alike for the four
        assert labels[3 * k : 3 * k + 3].tolist() == [k] * 3
    # independent of torch.rot90: a quarter turn by transposing and flipping
    assert torch.equal(views[3:6], upright.transpose(2, 3).flip(2))


def test_crops_have_no_padding_and_no_vertical_flip():
    """Pixel values encode their row and column: a crop must keep rows in order and stay inside the image."""
    side = 80
    rows = torch.arange(side, dtype=torch.uint8).view(1, side, 1, 1).expand(64, side, side, 1)
    columns = rows.transpose(1, 2)
    image = torch.cat([rows, columns, torch.full_like(rows, 200)], 3).contiguous()
    out = random_view(image, 64, Draws(0, [0] * 64, range(64))) * 255
    assert (out[:, 2] - 200).abs().max() < 1e-3  # any padding would show
    assert (out[:, 0].diff(dim=1) > 0).all()  # never upside down
    left_right = (out[:, 1].diff(dim=2) > 0).flatten(1).float().mean(1)
    assert set(left_right.tolist()) == {0.0, 1.0}  # both orientations occur, whole
    area = (out[:, 0, -1, 0] - out[:, 0, 0, 0]) / (side - 1) * (out[:, 1, 0, -1] - out[:, 1, 0, 0]).abs() / (side - 1)
    assert area.min() > 0.4
    assert area.max() <= 1.0


def train(images: torch.Tensor, steps: int, batch: int = 12) -> float:
    """A short training on uint8 images (N, R, R, 3); the accuracy of the last quarter of the steps."""
    torch.manual_seed(0)
    backbone = build_backbone("small", 32)
    task = Rotation(backbone, Rotation.Config())
    weights = [*backbone.parameters(), *task.parameters()]
    optimizer = torch.optim.AdamW(weights, 2e-3)
    hits = []
    for step in range(steps):
        index = torch.arange(step * batch, (step + 1) * batch) % len(images)
        draws = Draws(0, [step] * batch, index.tolist())
        out = task(Batch(random_view(images[index], 32, draws), draws, 0.0))
        out["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
        hits.append(out["accuracy"].item())
    return float(np.mean(hits[-steps // 4 :]))


@pytest.mark.parametrize("kind", ["constant", "vignette", "jpeg grid"])
def test_a_set_without_content_scores_chance(kind: str):
    rng = np.random.default_rng(0)
    base = rng.integers(60, 200, (64, 1, 1, 3)).astype(np.float32)
    if kind == "constant":
        images = np.broadcast_to(base, (64, 40, 40, 3))
    elif kind == "vignette":
        at = np.linspace(-1, 1, 40)
        images = base * (1 - 0.4 * (at[:, None] ** 2 + at[None, :] ** 2))[None, :, :, None]
    else:
        images = base + 6 * ((np.arange(40) % 8 == 0)[:, None] | (np.arange(40) % 8 == 0)[None, :])[None, :, :, None]
    accuracy = train(torch.from_numpy(np.ascontiguousarray(images).clip(0, 255).astype(np.uint8)), 24)
    assert abs(accuracy - 0.25) < 0.09  # 6 steps × 48 views: standard error 0.026


def test_a_set_with_content_is_learned():
    """The counterpart: the same short training does find a direction that is there."""
    shade = np.linspace(0, 255, 40)[None, :, None, None]
    images = np.broadcast_to(shade, (64, 40, 40, 3)).astype(np.uint8)
    assert train(torch.from_numpy(np.ascontiguousarray(images)), 24) > 0.7


def test_accuracies_and_loss_against_hand_computed():
    logits = torch.tensor([[3.0, 0, 1, 0], [0, 0, 2, 1], [0, 1, 5, 0], [1, 0, 0, 2]])
    labels = torch.tensor([0, 1, 2, 3])
    half, quarter = pairwise_accuracy(logits, labels)
    # half: 0 against 2 is right; 1 against 3 is wrong (0 < 1); 2 is right; 3 is right
    assert half == 0.75
    axes = torch.stack([logits[:, [0, 2]].exp().sum(1), logits[:, [1, 3]].exp().sum(1)], 1)
    assert quarter == (axes.argmax(1) == labels % 2).float().mean()
    task = Rotation(build_backbone("small", 32), Rotation.Config(jitter=0, grey=0)).eval()
    task.backbone.eval()
    batch = batch_of(torch.rand(5, 3, 32, 32))
    views, turns = four_rotations(batch.images)
    assert torch.allclose(task(batch)["loss"], F.cross_entropy(task.logits(views), turns), atol=1e-6)


def test_the_head_is_not_exported():
    task = Rotation(build_backbone("small", 64), Rotation.Config())
    own = {id(p) for p in task.parameters()}
    assert own
    assert own.isdisjoint(id(p) for p in task.backbone.parameters())


def test_a_wide_block_without_batchnorm_takes_any_channels():
    """A quarter of 1,040 channels is 260, which is no multiple of 8: four groups then, and not eight."""
    backbone = nn.Identity()
    backbone.channels = 1040  # type: ignore[assignment]
    block = residual_block(backbone)  # type: ignore[arg-type]
    assert block(torch.rand(2, 1040, 8, 8)).shape == (2, 1040, 4, 4)
    norms = {(m.num_groups, m.num_channels) for m in block.modules() if isinstance(m, nn.GroupNorm)}
    assert norms == {(8, 1040), (4, 260)}
