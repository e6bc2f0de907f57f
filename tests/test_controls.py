"""The controls do what they say, and the shallow one is a baseline worth beating."""

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from threadpoolctl import threadpool_limits

from downstream.controls import SIDE, Patches, Pixels
from downstream.features import feature_stats
from downstream.knn import fit_knn
from downstream.label_draws import LabelDraws
from downstream.probe import fit_probe


def shrunk(images):
    """(N, 20, 20, 3) uint8 to (N, 3, 16, 16) in [0, 1]."""
    x = torch.from_numpy(images.transpose(0, 3, 1, 2) / np.float32(255))
    return torch.nn.functional.interpolate(x, size=(16, 16), mode="bilinear", antialias=True)


@pytest.fixture(scope="module")
def digits():
    """Real handwritten digits, as the packed cache has them for an image size of 16."""
    images, target = load_digits(return_X_y=True)
    grey = np.kron(images[:1200].reshape(-1, 8, 8) * (255 / 16), np.ones((2, 2)))
    grey = np.pad(grey, ((0, 0), (2, 2), (2, 2)))
    return np.repeat(grey[..., None], 3, axis=3).astype(np.uint8), target[:1200]


@pytest.fixture(scope="module")
def fitted(digits):
    images, _ = digits
    with threadpool_limits(1):
        return Pixels(images[:600], 16), Patches(images[:600], 16, centroids=100)


def test_patches_beat_pixels_and_pixels_beat_chance_on_digits(digits, fitted):
    images, y = digits
    accuracy = {}
    for control in fitted:
        features = control.features(images)
        stats = feature_stats(control.features(images[:600]))
        (name,) = features.stages
        assert name == type(control).__name__.lower()
        draws = LabelDraws(y[600:], 4, 5)
        for fit in (fit_probe, fit_knn):
            right = []
            for d in range(5):
                train = 600 + draws.indices(d, 4)
                test = np.setdiff1d(np.arange(600, 1200), train)
                result = fit(features, train, y[train], stats, 4)
                assert result.chosen["features"] == name
                right.append((result.predict(features, test) == y[test]).mean())
            accuracy[name, fit.__name__] = np.mean(right)
    assert accuracy["pixels", "fit_probe"] > 0.5
    assert accuracy["patches", "fit_probe"] > accuracy["pixels", "fit_probe"] + 0.05
    assert accuracy["patches", "fit_knn"] > accuracy["pixels", "fit_knn"]


def test_triangle_against_a_plain_loop(digits, fitted):
    images, _ = digits
    patches = fitted[1]
    one = patches.features(images[700:701]).two["patches"].reshape(100, 2, 2)
    view = torch.nn.functional.interpolate(
        torch.from_numpy(images[700:701].transpose(0, 3, 1, 2) / np.float32(255)),
        size=(16, 16),
        mode="bilinear",
        antialias=True,
    )[0].numpy()
    mean, whitener = patches._mean.numpy().astype(float), patches._whitener.numpy().astype(float)
    maps = np.zeros((100, 11, 11))
    for i in range(11):
        for j in range(11):
            p = view[:, i : i + 6, j : j + 6].reshape(-1).astype(float)
            p = (p - p.mean()) / np.sqrt(p.var(ddof=1) + 10 / 255**2)
            distance = np.linalg.norm((p - mean) @ whitener - patches._centroids.numpy(), axis=1)
            maps[:, i, j] = np.maximum(0, distance.mean() - distance)
    # 11 is odd: adaptive pooling shares the middle row and column between the quadrants.
    cut = (slice(0, 6), slice(5, 11))
    expected = np.stack([maps[:, a, b].mean(axis=(1, 2)) for a in cut for b in cut], axis=1).reshape(100, 2, 2)
    np.testing.assert_allclose(one, expected, rtol=1e-3, atol=1e-3)


def test_patches_hardly_see_brightness_and_contrast(fitted):
    rng = np.random.default_rng(0)
    images = rng.integers(60, 180, (4, 20, 20, 3), dtype=np.uint8)
    plain, other = (fitted[1].features(x).two["patches"] for x in (images, (images * 0.9 + 20).astype(np.uint8)))
    assert np.abs(plain - other).max() < 0.05 * np.abs(plain).max()


def test_pixels_are_the_principal_components(digits):
    images, _ = digits
    control = Pixels(images[:300], 16, components=5)
    features = control.features(images[:300]).two["pixels"]
    view = torch.nn.functional.interpolate(
        torch.from_numpy(images[:300].transpose(0, 3, 1, 2) / np.float32(255)),
        size=(16, 16),
        mode="bilinear",
        antialias=True,
    )
    rows = view.flatten(1).double().numpy()
    left, values, _ = np.linalg.svd(rows - rows.mean(axis=0), full_matrices=False)
    expected = (left * values)[:, :5]
    signs = np.sign((features * expected).sum(axis=0))
    np.testing.assert_allclose(features * signs, expected, atol=0.02 * values[0] / np.sqrt(300))


def test_chunks_and_a_second_fit_change_nothing(digits, fitted):
    images, _ = digits
    whole = fitted[1].features(images[:140]).two["patches"]
    assert whole.shape == (140, 400)
    np.testing.assert_allclose(fitted[1].features(images[130:140]).two["patches"], whole[130:], rtol=1e-4, atol=1e-5)
    with threadpool_limits(1):
        again = Patches(images[:600], 16, centroids=100)
    assert torch.equal(again._centroids, fitted[1]._centroids)


def test_large_images_are_worked_at_32_px():
    images = np.random.default_rng(0).integers(0, 256, (8, 80, 80, 3), dtype=np.uint8)
    assert Pixels(images, 64).pca.mean_.size == 3 * SIDE**2
