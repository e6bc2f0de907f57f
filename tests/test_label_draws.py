"""Draws of labels are stratified, seeded, nested inside and disjoint between."""

import numpy as np
import pytest

from downstream.label_draws import LabelDraws
from unlabel.errors import UserError


@pytest.fixture
def labels():
    return np.random.default_rng(0).permutation(np.repeat([0, 1, 2], [100, 60, 75]))


def test_draws_are_stratified_nested_and_disjoint(labels):
    draws = LabelDraws(labels, block=12, n_draws=5)
    assert draws.disjoint
    seen: set[int] = set()
    for d in range(5):
        small, large = draws.indices(d, 3), draws.indices(d, 12)
        assert np.bincount(labels[small]).tolist() == [3, 3, 3]
        assert np.bincount(labels[large]).tolist() == [12, 12, 12]
        assert set(small) <= set(large)
        assert not seen & set(large)
        seen |= set(large)


def test_draws_are_seeded_and_a_class_does_not_depend_on_the_others(labels):
    first = LabelDraws(labels, 12, 5).indices(2, 12)
    assert np.array_equal(first, LabelDraws(labels, 12, 5).indices(2, 12))
    assert not np.array_equal(first, LabelDraws(labels, 12, 5, seed=1).indices(2, 12))
    keep = np.flatnonzero(labels != 2)
    fewer = keep[LabelDraws(labels[keep], 12, 5).indices(2, 12)]
    assert np.array_equal(fewer, first[labels[first] != 2])


def test_every_image_is_as_likely_as_every_other():
    labels = np.zeros(20, int)
    counts = sum(np.bincount(LabelDraws(labels, 4, 2, seed=s).indices(1, 4), minlength=20) for s in range(2000))
    assert np.abs(counts - 400).max() < 5 * np.sqrt(400)


@pytest.mark.parametrize("n_draws", [5, 10, 30])
def test_a_pool_too_small_is_flagged_and_small_draws_stay_disjoint(n_draws):
    labels = np.repeat([0, 1], 20)
    draws = LabelDraws(labels, block=10, n_draws=n_draws)
    assert not draws.disjoint
    for k in range(1, 11):
        sets = [set(draws.indices(d, k)) for d in range(n_draws)]
        assert all(len(s) == 2 * k for s in sets)
        disjoint = sum(map(len, sets)) == len(set.union(*sets))
        assert draws.disjoint_at(k) == disjoint
    assert len({tuple(draws.indices(d, 10)) for d in range(n_draws)}) == n_draws, "no draw twice"


def test_all_is_the_whole_pool(labels):
    draws = LabelDraws(labels, 5, 3)
    assert np.array_equal(draws.indices(1, "all"), np.arange(len(labels)))
    assert not draws.disjoint_at("all")


def test_too_many_labels_name_the_class_and_its_count(labels):
    with pytest.raises(UserError, match=r"dog has 60 images .* at most 60"):
        LabelDraws(labels, 61, 1, class_names=["cat", "dog", "eel"])
    with pytest.raises(UserError, match="from 1 to 5"):
        LabelDraws(labels, 5, 1).indices(0, 6)
    with pytest.raises(UserError, match="empty"):
        LabelDraws(np.zeros(0, int), 1, 1)
