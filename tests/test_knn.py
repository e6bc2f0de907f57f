"""k-NN equals scikit-learn's, chooses k inside the labels, and settles ties by nearness."""

import numpy as np
import pytest
from sklearn.neighbors import KNeighborsClassifier

from downstream import knn
from downstream.features import StageFeatures, feature_stats, standardised
from downstream.knn import fit_knn
from downstream.label_draws import LabelDraws


@pytest.fixture
def blobs():
    rng = np.random.default_rng(0)
    y = np.arange(2600) % 2
    two = {s: rng.normal(size=(2600, 24)) + shift * y[:, None] for s, shift in (("a", 0.0), ("b", 0.35))}
    two = {s: (x * 4 + 1).astype(np.float32) for s, x in two.items()}
    return StageFeatures({s: x[:, :6] for s, x in two.items()}, two), y


@pytest.mark.parametrize("per_class", [1, 3, 12, 60])
def test_equals_scikit_learn(blobs, per_class, monkeypatch):
    features, y = blobs
    stats = feature_stats(features)
    train = LabelDraws(y, per_class, 1).indices(0, per_class)
    monkeypatch.setattr(knn, "GRID_K", (15, 5, 3, 1))  # odd: scikit-learn settles ties otherwise
    result = fit_knn(features, train, y[train], stats, per_class)
    z = standardised(features, result.blocks, stats, np.arange(len(y)))
    reference = KNeighborsClassifier(result.chosen["k"], metric="cosine", algorithm="brute").fit(z[train], y[train])
    assert np.array_equal(result.predict(features), reference.predict(z))
    some = np.array([5, 2, 1999])
    assert np.array_equal(result.predict(features, some), reference.predict(z[some]))


def test_what_is_chosen_follows_the_table(blobs):
    features, y = blobs
    stats = feature_stats(features)
    chosen, results = {}, []
    for per_class in (1, 4, 10, 200):
        train = LabelDraws(y, per_class, 1).indices(0, per_class)
        results.append(fit_knn(features, train, y[train], stats, per_class))
        chosen[per_class] = results[-1].chosen
    assert chosen[1] == chosen[4] == {"k": 1, "features": "a+b 2x2"}
    assert chosen[10]["features"] == "a+b 2x2"
    assert chosen[10]["k"] in (1, 3, 5)  # at most half of the 16 labels that a fold fits on
    assert not any(r.on_grid_edge for r in results[:3])
    assert results[3].on_grid_edge
    assert chosen[200] == {"k": 50, "features": "b 2x2"}  # blurred classes: many neighbours, the better stage


def test_a_tie_goes_to_the_nearer_neighbours_and_a_majority_stands():
    likeness = np.array([[-0.9, 0.8, 0.9, -0.5, -0.6]])
    y = np.array([1, 0, 1, 0, 0])  # nearest first: 1 0 0 0 1
    assert knn._vote(likeness, y, 2, [1, 2, 3, 4, 5])[:, 0].tolist() == [1, 1, 0, 0, 0]
    lone = np.array([[-0.5, 0.95, -0.6]])
    assert knn._vote(lone, np.array([0, 1, 0]), 2, [1, 2, 3])[:, 0].tolist() == [1, 1, 0]


def test_order_of_the_labels_does_not_matter(blobs):
    features, y = blobs
    stats = feature_stats(features)
    train = LabelDraws(y, 4, 1).indices(0, 4)
    other = train[::-1]
    first, second = (fit_knn(features, t, y[t], stats, 4).predict(features) for t in (train, other))
    assert np.array_equal(first, second)
