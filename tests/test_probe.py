"""The probe is scikit-learn's logistic regression, on raw features, and chooses inside the labels only."""

import numpy as np
import pytest
from scipy.special import softmax
from sklearn.linear_model import LogisticRegression

from downstream import choosing, probe
from downstream.features import StageFeatures, block_stats, feature_stats, standardised
from downstream.knn import fit_knn
from downstream.label_draws import LabelDraws
from downstream.logistic import logistic_path
from downstream.probe import FIXED_C, fit_head, fit_probe

BOTH = [fit_probe, fit_knn]


def make(n=900, classes=2, width=20, signal=(0.0, 3.0), seed=0):
    """Features of stages a and b; `signal` is how far a class lies from the rest. Raw scales are far from 1."""
    rng = np.random.default_rng(seed)
    y = np.arange(n) % classes
    two = {}
    for stage, strength in zip("ab", signal, strict=True):
        x = rng.normal(size=(n, 4 * width))
        x += strength / np.sqrt(4 * width) * rng.normal(size=(classes, 4 * width))[y]
        two[stage] = (x * rng.uniform(0.1, 10, 4 * width) + rng.normal(0, 5, 4 * width)).astype(np.float32)
    one = {stage: x.reshape(n, 4, width).mean(axis=1) for stage, x in two.items()}
    return StageFeatures(one, two), y


@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("per_class", [1, 4, 300])
def test_equals_scikit_learn(classes, per_class):
    """Fewer labels than features (rotated) and more (not), two classes and three; C and features as chosen."""
    features, y = make(classes=classes)
    stats = feature_stats(features)
    train = LabelDraws(y, per_class, 1).indices(0, per_class)
    result = fit_probe(features, train, y[train], stats, per_class)
    everything = np.arange(len(y))
    z = standardised(features, result.blocks, stats, everything)
    reference = LogisticRegression(C=result.chosen["C"], tol=1e-8, max_iter=5000).fit(z[train], y[train])
    np.testing.assert_allclose(softmax(result.logits(features), axis=1), reference.predict_proba(z), atol=2e-4)
    few = np.array([7, 3])
    assert np.array_equal(result.predict(features, few), reference.predict(z)[few])


@pytest.mark.parametrize(("classes", "width"), [(2, 6), (2, 80), (3, 6), (3, 80)])
def test_many_fits_at_once_equal_scikit_learn_one_by_one(classes, width):
    """Subsets of unequal size, more examples than features and fewer, every C of a path."""
    rng = np.random.default_rng(0)
    y = np.arange(60) % classes
    z = rng.normal(size=(60, width)) * np.exp(-np.arange(width) / 10) + y[:, None] * 0.3
    subsets = rng.random((4, 60)) < 0.7
    grid = (0.5, 8.0, 128.0)
    for c, (coef, intercept) in zip(grid, logistic_path(z, y, grid, subsets, tol=1e-9), strict=True):
        assert coef.shape == (4, classes, width)
        for one, w, b in zip(subsets, coef, intercept, strict=True):
            reference = LogisticRegression(C=c, tol=1e-9, max_iter=10_000).fit(z[one], y[one])
            np.testing.assert_allclose(softmax(z @ w.T + b, axis=1), reference.predict_proba(z), atol=2e-4)


def test_equal_images_are_fitted_as_they_are():
    """Their inner products are no proper triangle; with other images the fit is the same as in all dimensions."""
    features, y = make()
    stats = feature_stats(features)
    train = np.array([0, 0, 1, 1, 2, 3])
    result = fit_probe(features, train, y[train], stats, 3)
    z = standardised(features, result.blocks, stats, np.arange(len(y)))
    reference = LogisticRegression(C=FIXED_C, tol=1e-8, max_iter=5000).fit(z[train], y[train])
    np.testing.assert_allclose(softmax(result.logits(features), axis=1), reference.predict_proba(z), atol=2e-4)


def test_folds_in_several_parts_choose_the_same(monkeypatch):
    features, y = make(classes=3)
    stats, train = feature_stats(features), LabelDraws(y, 30, 1).indices(0, 30)
    judged: dict = {}
    whole = fit_probe(features, train, y[train], stats, 30, judged=judged)
    again = fit_probe(features, train, y[train], stats, 30, stage="b", judged=judged)
    assert again.chosen == fit_probe(features, train, y[train], stats, 30, stage="b").chosen
    monkeypatch.setattr(probe, "WEIGHTS_AT_ONCE", 1)
    parts: dict = {}
    assert fit_probe(features, train, y[train], stats, 30, judged=parts).chosen == whole.chosen
    for blocks, losses in judged.items():
        np.testing.assert_allclose(parts[blocks].mean(axis=1), losses.mean(axis=1), rtol=5e-3)


@pytest.mark.parametrize("classes", [2, 4])
def test_head_on_raw_features_equals_scikit_learn(classes):
    features, y = make(classes=classes)
    x, n = features.one["b"], 60
    stats = block_stats(x)
    weights, bias = fit_head(x[:n], y[:n], stats, c=3.0)
    assert weights.shape == (classes, x.shape[1])
    assert bias.shape == (classes,)
    z = (x - x.mean(axis=0)) / x.std(axis=0) / np.sqrt(x.shape[1])
    reference = LogisticRegression(C=3.0, tol=1e-8, max_iter=5000).fit(z[:n], y[:n])
    np.testing.assert_allclose(softmax(x @ weights.T + bias, axis=1), reference.predict_proba(z), atol=2e-4)


def test_scale_and_offset_of_the_features_do_not_matter():
    features, y = make()
    moved = StageFeatures(
        {k: (v * 3 + 2).astype(np.float32) for k, v in features.one.items()},
        {k: (v * 0.2 - 9).astype(np.float32) for k, v in features.two.items()},
    )
    train = LabelDraws(y, 30, 1).indices(0, 30)
    for fit in BOTH:
        here = fit(features, train, y[train], feature_stats(features), 30)
        there = fit(moved, train, y[train], feature_stats(moved), 30)
        assert here.chosen == there.chosen
        assert (here.predict(features) == there.predict(moved)).mean() > 0.999


@pytest.mark.parametrize(
    ("per_class", "varied"), [(1, set()), (4, set()), (5, {"C"}), (24, {"C"}), (25, {"C", "features"})]
)
def test_what_is_chosen_follows_the_table(per_class, varied):
    features, y = make(signal=(4.0, 0.0))  # all the signal is in a stage that fewer than 25 may not take alone
    draws, stats = LabelDraws(y, per_class, 4), feature_stats(features)
    trains = [draws.indices(d, per_class) for d in range(4)]
    results = [fit_probe(features, train, y[train], stats, per_class) for train in trains]
    if "C" not in varied:
        assert all(r.chosen["C"] == FIXED_C and not r.on_grid_edge for r in results)
    names = {r.chosen["features"] for r in results}
    assert (names != {"a+b 2x2"}) == ("features" in varied)
    assert not names & {"b 1x1", "b 2x2"}, "the stage without signal"


def test_a_stage_alone():
    features, y = make()
    train = LabelDraws(y, 30, 1).indices(0, 30)
    stats = feature_stats(features)
    for fit in BOTH:
        accuracy = {}
        for stage in features.stages:
            result = fit(features, train, y[train], stats, 30, stage=stage)
            assert {s for s, _ in result.blocks} == {stage}
            accuracy[stage] = (result.predict(features) == y).mean()
        assert accuracy["b"] > accuracy["a"] + 0.1


@pytest.mark.parametrize("fit", BOTH)
@pytest.mark.parametrize("per_class", [10, 50])
def test_permuted_test_labels_change_no_choice(fit, per_class):
    """Nor do the test images: whatever stands outside the training rows, the same probe comes out."""
    features, y = make()
    stats = feature_stats(features)
    train = LabelDraws(y, per_class, 1).indices(0, per_class)
    test = np.setdiff1d(np.arange(len(y)), train)
    rng = np.random.default_rng(1)
    shuffled = y.copy()
    shuffled[test] = rng.permutation(y[test])
    noise = {k: v.copy() for k, v in features.two.items()}
    for x in noise.values():
        x[test] = rng.normal(size=x[test].shape)
    here = fit(features, train, y[train], stats, per_class)
    there = fit(StageFeatures(features.one, noise), train, shuffled[train], stats, per_class)
    assert (here.chosen, here.on_grid_edge) == (there.chosen, there.on_grid_edge)
    assert np.array_equal(here.predict(features, test), there.predict(features, test))


@pytest.mark.parametrize("fit", BOTH)
@pytest.mark.parametrize("per_class", [3, 10, 30])
def test_permuted_training_labels_give_chance(fit, per_class):
    features, y = make(n=1600, signal=(0.0, 5.0))
    stats = feature_stats(features)
    draws = LabelDraws(y, per_class, 8)
    right, honest = [], []
    for d in range(8):
        train = draws.indices(d, per_class)
        test = np.setdiff1d(np.arange(len(y)), train)
        permuted = np.random.default_rng(d).permutation(y[train])
        right.append((fit(features, train, permuted, stats, per_class, d).predict(features, test) == y[test]).mean())
        if d < 2:
            result = fit(features, train, y[train], stats, per_class, d)
            honest.append((result.predict(features, test) == y[test]).mean())
    assert abs(np.mean(right) - 0.5) < 4 * np.std(right, ddof=1) / np.sqrt(8) + 0.01
    assert np.mean(honest) > 0.6, "and there was something to find"


def test_all_labels_of_unequal_classes():
    features, y = make(n=3000, classes=3, signal=(0.0, 8.0))
    keep = np.concatenate([np.flatnonzero(y == c)[:n] for c, n in enumerate((900, 40, 5))])
    for fit in BOTH:
        result = fit(features, keep, y[keep], feature_stats(features), "all")
        assert (result.predict(features) == y).mean() > 0.5


def test_choices_on_many_labels_are_made_on_some_of_each_class():
    y = np.repeat([0, 1, 2], [9000, 990, 10])
    keep = choosing.subsample(y, 0)
    assert np.bincount(y[keep]).tolist() == [1800, 198, 10]
    assert np.array_equal(keep, choosing.subsample(y, 0))
    assert all(len(np.unique(y[keep][fit])) == 3 for fit, _ in choosing.splits(y[keep], 10, 0))


@pytest.mark.parametrize("per_class", [2, 5, 7, 30])
def test_folds_are_stratified_and_judge_every_label_as_often(per_class):
    y = np.tile(np.arange(3), per_class)
    folds = choosing.splits(y, per_class, 0)
    times = np.zeros(len(y), int)
    for fit, held_out in folds:
        assert not set(fit) & set(held_out)
        assert len(np.unique(y[fit])) == 3
        times[held_out] += 1
    assert (times == (1 if per_class >= 25 else 3)).all()


@pytest.mark.parametrize("per_class", [7, 30])
def test_near_duplicates_are_held_out_together(per_class):
    y = np.tile(np.arange(3), per_class)
    alone = choosing.splits(y, per_class, 0)
    for pairs in (np.arange(len(y)), 100 + np.arange(len(y))):
        assert all(
            np.array_equal(a[1], b[1]) for a, b in zip(alone, choosing.splits(y, per_class, 0, pairs), strict=True)
        )
    clusters = np.arange(len(y)) // 6 * 3 + y  # of each class, two by two
    folds = choosing.splits(y, per_class, 0, clusters)
    assert len(folds) >= 4
    times = np.zeros(len(y), int)
    for fit, held_out in folds:
        assert not set(clusters[fit]) & set(clusters[held_out])
        assert len(np.unique(y[fit])) == 3
        times[held_out] += 1
    assert (times == (1 if per_class >= 25 else 3)).all()
    assert len(choosing.splits(y, per_class, 0, y)) == len(alone)  # each class one picture: as if they were different


def test_copies_choose_no_setting_that_knows_them_by_heart():
    """Each label three times, with a little noise: k and C are those of different images."""
    features, y = make(signal=(0.0, 1.5))
    rng = np.random.default_rng(1)
    rows = LabelDraws(y, 20, 1).indices(0, 20)
    three = {s: np.repeat(x[rows], 3, 0) for s, x in features.two.items()}
    three = {s: (x + 0.05 * rng.normal(size=x.shape)).astype(np.float32) for s, x in three.items()}
    copies, labels = StageFeatures({s: x[:, :6] for s, x in three.items()}, three), np.repeat(y[rows], 3)
    given = copies, np.arange(60 * len(np.unique(y))), labels, feature_stats(features), 24
    clusters = np.repeat(np.arange(len(rows)), 3)
    by_heart = fit_knn(*given)
    assert (by_heart.chosen["k"], by_heart.on_grid_edge) == (1, False)  # beyond 1 there is nothing
    assert fit_knn(*given, clusters=clusters).chosen["k"] > 1
    assert fit_probe(*given, clusters=clusters).chosen["C"] < fit_probe(*given).chosen["C"]


def test_one_standard_error_rule_by_hand():
    # Means 0.40, 0.34, 0.30, 0.35; the lowest has a standard error of 0.2 / sqrt(4) * sqrt(4 / 3) = 0.115.
    losses = np.array([[0.4] * 4, [0.34] * 4, [0.1, 0.5, 0.1, 0.5], [0.35] * 4])
    assert choosing.one_standard_error(losses) == 0
    losses[0] = 0.42
    assert choosing.one_standard_error(losses) == 1
    losses[1] = 0.42
    assert choosing.one_standard_error(losses) == 2


def test_a_path_ends_where_losses_rise():
    """By hand: two labels, so that the standard error of a pair (a, b) is |a - b| / 2."""
    open_ = [np.inf, np.inf]
    assert not choosing.rising(np.array([[1.0, 1.4], open_, open_]))
    assert not choosing.rising(np.array([[1.0, 1.4], [1.1, 1.5], open_]))  # 0.1 above the lowest, error 0.2
    assert choosing.rising(np.array([[1.0, 1.4], [1.1, 1.5], [1.3, 1.6]]))  # 0.25 above
    assert not choosing.rising(np.array([[1.0, 1.4], [0.6, 1.0], open_]))


@pytest.mark.parametrize("per_class", [10, 30])
def test_what_is_chosen_is_that_of_the_whole_path(per_class, monkeypatch):
    fits = []
    path = probe.logistic_path
    monkeypatch.setattr(probe, "logistic_path", lambda *a, **k: (fits.append(1) or fit for fit in path(*a, **k)))
    found = {}
    for whole in (False, True):
        if whole:
            monkeypatch.setattr(choosing, "rising", lambda losses: False)
        fits.clear()
        found[whole] = []
        for seed in range(4):
            features, y = make(classes=2 + seed % 2, width=6, signal=(0.0, 1.0), seed=seed)
            train = LabelDraws(y, per_class, 1).indices(0, per_class)
            result = fit_probe(features, train, y[train], feature_stats(features), per_class)
            found[whole].append((result.chosen, result.on_grid_edge))
        found[whole].append(len(fits))
    assert found[True][:-1] == found[False][:-1]
    assert found[False][-1] < 0.8 * found[True][-1]


def test_grid_edge_is_reported(monkeypatch):
    features, y = make(signal=(0.0, 0.0))
    draws, stats = LabelDraws(y, 20, 8), feature_stats(features)
    trains = [draws.indices(d, 20) for d in range(8)]
    results = [fit_probe(features, train, y[train], stats, 20) for train in trains]
    strongest, weakest = min(probe.GRID_C), max(probe.GRID_C)
    assert all(r.on_grid_edge == (r.chosen["C"] in (strongest, weakest)) for r in results)
    # Nothing to find: the strongest regularisation, but for a fluke.
    assert sum(r.chosen["C"] == strongest for r in results) >= 7
    features, y = make(signal=(0.0, 9.0))
    monkeypatch.setattr(probe, "GRID_C", (0.001, 0.1))  # both too strong for so clear a signal
    result = fit_probe(features, trains[0], y[trains[0]], feature_stats(features), 20)
    assert (result.chosen["C"], result.on_grid_edge) == (0.1, True)
