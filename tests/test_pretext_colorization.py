from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from pretext.colorization import BINS, Colorization, ab_bins, from_lab, rebalancing, soft_encoding, to_lab
from pretext.task import Batch
from unlabel.backbone import build_backbone
from unlabel.config import PretrainConfig
from unlabel.draws import Draws
from unlabel.errors import UserError
from unlabel.pretrain import pretrain
from unlabel.report_origin import cost


def batch_of(images: torch.Tensor, epoch: int = 0) -> Batch:
    return Batch(images, Draws(0, [epoch] * len(images), list(range(len(images)))), 0.5)


def make(**settings) -> Colorization:
    torch.manual_seed(0)
    return Colorization(build_backbone("small", 32), Colorization.Config(**settings))


@pytest.mark.parametrize(
    ("rgb", "lab"),
    [  # sRGB under D65, from Lindbloom's calculator
        ((1, 0, 0), (53.24, 80.09, 67.20)),
        ((0, 1, 0), (87.74, -86.18, 83.18)),
        ((0, 0, 1), (32.30, 79.20, -107.86)),
        ((1, 1, 1), (100, 0, 0)),
        ((0, 0, 0), (0, 0, 0)),
        ((128 / 255,) * 3, (53.59, 0, 0)),
        ((1, 1, 0), (97.14, -21.55, 94.48)),
    ],
)
def test_lab_of_known_colours(rgb, lab):
    found = to_lab(torch.tensor(rgb, dtype=torch.float32).view(3, 1, 1)).flatten()
    assert torch.allclose(found, torch.tensor(lab, dtype=torch.float32), atol=0.1)


def test_lab_and_back(colour_photos: torch.Tensor):
    assert torch.allclose(from_lab(to_lab(colour_photos)), colour_photos, atol=2e-3)


def test_bins_are_313_points_of_the_grid_around_every_colour():
    bins = ab_bins()
    assert bins.shape == (BINS, 2)
    assert len({tuple(b) for b in bins.tolist()}) == BINS
    assert (bins % 10 == 0).all()
    rgb = torch.rand(20_000, 3, generator=torch.Generator().manual_seed(0)).T.reshape(3, -1, 1)
    ab = to_lab(rgb)[1:, :, 0].T
    # Half the diagonal of a cell: each colour's nearest grid point is there.
    assert torch.cdist(ab, bins).amin(1).max() <= 10 / 2**0.5 + 1e-3


def test_soft_encoding_against_a_loop():
    bins = ab_bins()
    ab = torch.tensor([[3.0, -2.0], [0.0, 0.0], [44.0, 37.0]])
    index, share = soft_encoding(ab, bins)
    assert share.sum(1).tolist() == pytest.approx([1, 1, 1])
    for point, rows, shares in zip(ab.double().numpy(), index.numpy(), share.numpy(), strict=True):
        distance = np.sqrt(((bins.double().numpy() - point) ** 2).sum(1))
        assert sorted(distance[rows]) == pytest.approx(sorted(distance)[:5])
        weight = np.exp(-(distance[rows] ** 2) / 50)
        assert shares == pytest.approx(weight / weight.sum(), abs=1e-5)
    assert bins[index[1, 0]].tolist() == [0, 0]
    assert bins[index[2, 0]].tolist() == [40, 40]


@pytest.mark.parametrize("share", [0.0, 0.5, 0.9])
def test_rebalancing_has_mean_one_and_prefers_the_rare(share: float):
    p = torch.rand(BINS, generator=torch.Generator().manual_seed(1)) ** 4
    p /= p.sum()
    w = rebalancing(p, share)
    assert float((p * w).sum()) == pytest.approx(1, abs=1e-5)
    order = p.argsort()
    assert (w[order].diff() <= 1e-6).all()
    assert (share == 0) == bool(torch.allclose(w, torch.ones(BINS)))


def test_the_backbone_sees_no_colour(colour_photos: torch.Tensor):
    """Two images of one lightness and different colours give one prediction, bit for bit."""
    task = make().eval()
    lightness, ab = task.split(colour_photos[:4])
    scores = task.scores(lightness, ab.shape[-1])
    seen = []
    task.backbone.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    task(batch_of(colour_photos[:4]))
    assert torch.equal(seen[0][:, 0], seen[0][:, 1])
    assert torch.equal(seen[0][:, 0], seen[0][:, 2])
    assert scores.shape == (4, BINS, 8, 8)  # a quarter of the side
    assert Colorization.sees == "grey"


def test_frequencies_follow_the_images_and_only_in_training(colour_photos: torch.Tensor):
    task = make()
    batch = batch_of(colour_photos[:8])
    task.eval()
    task(batch)
    assert float(task.get_buffer("steps")) == 0
    task.train()
    for _ in range(3):
        task(batch)
    index, share = task._encode(task.split(batch.images)[1])
    want = torch.zeros(BINS).index_add_(0, index.flatten(), share.flatten()) / len(index)
    assert torch.allclose(task.get_buffer("frequency"), want, atol=1e-6)
    # The mean weight over the pixels that were counted is one.
    assert float(task._weight(index, share).mean()) == pytest.approx(1, abs=1e-4)


def test_trivial_is_the_best_constant(colour_photos: torch.Tensor):
    """No constant distribution has a lower loss, and none of these colours a lower error, than the trivial score."""
    for loss in ("classes", "regression"):
        task = make(loss=loss).eval()
        batch = batch_of(colour_photos[:8])
        trivial = task.trivial(batch)
        assert set(trivial) == set(task.metrics)
        generator = torch.Generator().manual_seed(2)
        last = task.decoder.layers[-1]
        assert isinstance(last, torch.nn.Conv2d)
        torch.nn.init.zeros_(last.weight)
        assert last.bias is not None
        for _ in range(5):
            with torch.no_grad():
                last.bias.copy_(torch.randn(last.bias.shape, generator=generator))
            out = task(batch)
            assert float(out["ab_error"]) > trivial["ab_error"]
            if loss == "classes":
                assert float(out["colour_loss"]) > trivial["colour_loss"]


def test_wrong_settings():
    with pytest.raises(UserError, match="classes or regression"):
        make(loss="l1")
    with pytest.raises(UserError, match="rebalance"):
        make(rebalance=1.0)


def test_run_folder_and_report_say_that_it_was_shown_grey(digits_folder: Path, tmp_path: Path):
    config = PretrainConfig(
        tasks=("colorization",), data=(str(digits_folder),), out=tmp_path, image_size=32, epochs=0.05, batch_size=8
    )
    about = json.loads((pretrain(config) / "config.json").read_text())
    assert about["data"]["shown_as"] == ["grey"]
    entry = {"image_size": 32, "shown_as": ["grey"]}
    page = cost({"provenance": {"runs": {"colorization": [entry]}}})
    assert "32 px, grey" in page
    assert "Downstream every network is shown RGB." in page
    assert "grey" not in cost({"provenance": {"runs": {"rotation": [{**entry, "shown_as": ["RGB"]}]}}})
