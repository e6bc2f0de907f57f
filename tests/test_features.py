"""Features of a frozen backbone: nothing of it changes, and an image's features are its own."""

import numpy as np
import pytest
import torch
from torch import nn

from downstream.features import StageFeatures, block_stats, extract, feature_stats, standardised
from unlabel import augment
from unlabel.backbone import build_backbone


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(0).integers(0, 256, (13, 40, 40, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def backbone():
    backbone = build_backbone("resnet18", 32).train()
    for module in backbone.modules():  # statistics that training mode would move and that matter in eval mode
        if isinstance(module, nn.BatchNorm2d) and module.running_mean is not None:
            module.running_mean.normal_(generator=torch.Generator().manual_seed(0))
    return backbone


def test_frozen_means_that_nothing_changes(backbone, images):
    before = {k: v.clone() for k, v in backbone.state_dict().items()}
    extract(backbone, images, 32)
    assert any("running_mean" in k for k in before)
    assert all(torch.equal(v, before[k]) for k, v in backbone.state_dict().items())
    assert backbone.training, "its mode is put back"


def test_batch_size_and_order_do_not_matter(backbone, images):
    whole, small = extract(backbone, images, 32), extract(backbone, images, 32, batch_size=4)
    backward = extract(backbone, images[::-1], 32, batch_size=5)
    for stage in whole.stages:
        for block in whole.blocks(stage):
            np.testing.assert_allclose(whole.block(block), small.block(block), rtol=1e-4, atol=1e-4)
            np.testing.assert_allclose(whole.block(block), backward.block(block)[::-1], rtol=1e-4, atol=1e-4)


def test_pooling_against_plain_means(backbone, images):
    features = extract(backbone, images, 32)
    assert features.stages == backbone.stage_names
    with torch.no_grad():
        out = backbone.eval()(augment.clean(torch.from_numpy(images), 32))
    backbone.train()
    np.testing.assert_allclose(features.one[features.stages[-1]], out.pooled, rtol=1e-4, atol=1e-5)
    for stage, maps in out.stages.items():
        h, w = maps.shape[2] // 2, maps.shape[3] // 2
        quadrants = [maps[:, :, i * h : (i + 1) * h, j * w : (j + 1) * w].mean((2, 3)) for i in (0, 1) for j in (0, 1)]
        expected = torch.stack(quadrants, dim=2).flatten(1)  # (N, C, quadrant) as adaptive pooling lays it out
        np.testing.assert_allclose(features.two[stage], expected, rtol=1e-4, atol=1e-5)
        assert len(features) == len(images)


def test_standardising_uses_the_unlabelled_statistics():
    rng = np.random.default_rng(0)
    unlabelled = StageFeatures({"a": rng.normal(3, 2, (500, 6))}, {"a": rng.normal(-1, 5, (500, 24))})
    unlabelled.one["a"][:, 2] = 7.0
    stats = feature_stats(unlabelled)
    z = standardised(unlabelled, [("a", "1x1"), ("a", "2x2")], stats, np.arange(500))
    np.testing.assert_allclose(z.mean(axis=0), 0, atol=1e-12)
    np.testing.assert_allclose(z[:, :6].std(axis=0) * np.sqrt(6), [1, 1, 0, 1, 1, 1])
    np.testing.assert_allclose(np.square(z[:, 6:]).sum(axis=1).mean(), 1)


def test_a_feature_that_is_all_but_dead_is_not_blown_up():
    x = np.random.default_rng(0).normal(size=(1000, 5))
    x[:, 3] = 0
    x[0, 3] = 1e-3
    scale = block_stats(x).scale
    assert scale[3] < 110 * scale[0]
