"""Intervals: closed forms, invariances, and whether a nominal 95 % covers 95 %."""

import numpy as np
import pytest
from scipy.stats import beta, norm, t

from downstream import stats
from downstream.stats import alike, paired, summarise, verdict
from unlabel.errors import UserError


def crossed(rng, draws, clusters, share, mean, seeds=1, seed_share=0.0, own_share=0.0):
    """Right or wrong from a probit model with random effects; the true accuracy is norm.cdf(mean).

    share: variance shares of draws, clusters and their interaction; seed_share: of seeds;
    own_share: of seed x draw and of seed x cluster.
    """
    member = np.repeat(np.arange(clusters), rng.integers(1, 4, clusters))
    normal = rng.standard_normal
    a, b, c = np.sqrt(share)
    cells = b * normal((1, 1, clusters)) + c * normal((1, draws, clusters))
    cells = cells + np.sqrt(own_share) * normal((seeds, 1, clusters))
    latent = mean + a * normal((1, draws, 1)) + np.sqrt(seed_share) * normal((seeds, 1, 1)) + cells[:, :, member]
    latent = latent + np.sqrt(own_share) * normal((seeds, draws, 1))
    rest = 1 - sum(share) - seed_share - 2 * own_share
    return latent + np.sqrt(rest) * normal((seeds, draws, len(member))) > 0, member


SHARES = [(0.03, 0.5, 0.1), (0.003, 0.5, 0.1), (0.1, 0.2, 0.1), (0.0005, 0.3, 0.3)]


@pytest.mark.parametrize("draws", [3, 5, 10, 20])
def test_nominal_95_percent_covers_93_to_97(draws):
    rng = np.random.default_rng(draws)
    hits = []
    for trial in range(1600):
        mean = norm.ppf((0.6, 0.75, 0.9)[trial % 3])
        correct, member = crossed(rng, draws, 100, SHARES[trial % 4], mean)
        e = summarise(correct, member, n_resamples=300)
        hits.append(e.ci_low <= norm.cdf(mean) <= e.ci_high)
    assert 0.93 <= np.mean(hits) <= 0.97


def test_paired_difference_covers_93_to_97():
    """Two arms that share draws and images; the truth is the difference of their true accuracies."""
    rng = np.random.default_rng(0)
    hits = []
    for trial in range(1200):
        draws = (5, 10)[trial % 2]
        both, member = crossed(rng, draws, 100, (0.01, 0.3, 0.1), 0.0, seeds=2, own_share=0.05)
        # `crossed` with mean 0 thresholds at 0; arms of different accuracy come from flipping some answers.
        worse = both[1] & (rng.random(both[1].shape) < 0.9)
        e = paired(both[0], worse, member, n_resamples=300)
        hits.append(e.ci_low <= 0.5 - 0.45 <= e.ci_high)
    assert 0.93 <= np.mean(hits) <= 0.97


@pytest.mark.parametrize("seeds", [3, 5])
def test_interval_over_seeds_covers_93_to_97(seeds):
    rng = np.random.default_rng(seeds)
    hits = []
    for trial in range(1200):
        share = SHARES[trial % 4]
        correct, member = crossed(rng, 10, 100, share, 0.7, seeds, seed_share=0.003, own_share=0.01)
        e = summarise(correct, member)
        hits.append(e.ci_low <= norm.cdf(0.7) <= e.ci_high)
    assert e.unit == "seed"
    assert 0.93 <= np.mean(hits) <= 0.97


def test_one_draw_is_the_t_interval_of_the_test_images():
    correct = np.random.default_rng(0).random((1, 400)) < 0.7
    e = summarise(correct, np.arange(400))
    assert e.mean == correct.mean()
    assert e.ci_high - e.ci_low == pytest.approx(2 * t.ppf(0.975, 399) * correct.std(ddof=1) / 20)
    assert e.unit == "draw"
    assert "test images only" in e.note


def test_three_equal_draws_of_other_images_know_no_draw_effect():
    """No draw effect and no interaction: the draws add nothing, the interval is that of one draw."""
    one = np.random.default_rng(0).random((1, 400)) < 0.7
    e, single = summarise(np.repeat(one, 3, axis=0), np.arange(400)), summarise(one, np.arange(400))
    assert (e.ci_low, e.ci_high) == pytest.approx((single.ci_low, single.ci_high), abs=1e-3)


def test_draws_that_differ_alone_give_the_t_interval_of_their_means():
    """Every image alike within a draw: only the draws are a sample."""
    correct = np.zeros((4, 1000), bool)
    for row, right in zip(correct, (600, 650, 700, 750), strict=True):
        row[:right] = True
    clusters = np.arange(1000) % 50  # each cluster holds the same share of right answers in a draw
    e = summarise(correct, clusters)
    means = correct.mean(axis=1)
    assert e.ci_high - e.ci_low == pytest.approx(2 * t.ppf(0.975, 3) * means.std(ddof=1) / 2, rel=1e-3)


def test_seeds_that_differ_alone_give_the_t_interval_of_their_means():
    correct = np.zeros((3, 2, 1000), bool)
    for block, right in zip(correct, (600, 650, 750), strict=True):
        block[:, :right] = True
    e = summarise(correct, np.arange(1000) % 50)
    means = correct.mean(axis=(1, 2))
    half = t.ppf(0.975, 2) * means.std(ddof=1) / np.sqrt(3)
    assert (e.ci_low, e.ci_high) == pytest.approx((means.mean() - half, min(means.mean() + half, 1)), rel=1e-3)


def test_copies_of_an_image_in_its_cluster_add_no_certainty():
    rng = np.random.default_rng(0)
    correct = rng.random((5, 200)) < np.where(rng.random(200) < 0.7, 0.95, 0.1)
    names = np.array([f"cluster {i:03d}" for i in range(200)])
    once = summarise(correct, names)
    thrice = summarise(np.repeat(correct, 3, axis=1), np.repeat(names, 3))
    assert (once.ci_low, once.ci_high) == pytest.approx((thrice.ci_low, thrice.ci_high), abs=1e-6)
    apart = summarise(np.repeat(correct, 3, axis=1), np.arange(600))
    assert apart.ci_high - apart.ci_low < 0.9 * (once.ci_high - once.ci_low)


def test_paired_mirrors_and_is_narrower_than_two_intervals():
    rng = np.random.default_rng(0)
    both, member = crossed(rng, 8, 300, (0.03, 0.6, 0.1), 0.5, seeds=2, own_share=0.02)
    ab, ba = paired(both[0], both[1], member), paired(both[1], both[0], member)
    assert (ab.mean, ab.ci_low, ab.ci_high) == pytest.approx((-ba.mean, -ba.ci_high, -ba.ci_low), abs=1e-6)
    assert ab.mean == pytest.approx(summarise(both[0], member).mean - summarise(both[1], member).mean)
    own = summarise(both[0], member)
    assert ab.ci_high - ab.ci_low < 0.7 * (own.ci_high - own.ci_low)


def test_a_single_seed_beside_three_mirrors():
    """Whichever side has the seeds, their spread is in the interval: nearly the t interval over them, if all else is
    small."""
    shares = np.array([0.62, 0.72, 0.72])
    one = np.tile(np.arange(500) < 375, (1, 5, 1))
    three = np.tile(np.arange(500) < 500 * shares[:, None, None], (1, 5, 1))
    ab, ba = (paired(*alike(*pair), np.arange(500)) for pair in ((one, three), (three, one)))
    assert (ab.mean, ab.ci_low, ab.ci_high) == pytest.approx((-ba.mean, -ba.ci_high, -ba.ci_low), abs=1e-9)
    assert (ab.unit, ab.n_seeds) == ("seed", 3)
    assert ab.ci_high - ab.mean == pytest.approx(t.ppf(0.975, 2) * shares.std(ddof=1) / np.sqrt(3), rel=0.1)


def test_interval_contains_the_mean_and_stays_between_0_and_1():
    rng = np.random.default_rng(0)
    for p in (0.5, 0.97, 1.0):
        e = summarise(rng.random((3, 60)) < p, np.arange(60))
        assert 0 <= e.ci_low <= e.mean <= e.ci_high <= 1


def test_same_numbers_twice():
    correct = np.random.default_rng(0).random((5, 200)) < 0.7
    assert summarise(correct, np.arange(200)) == summarise(correct, np.arange(200))


def test_two_seeds_are_averaged_and_say_so():
    correct = np.random.default_rng(0).random((2, 5, 200)) < 0.7
    e = summarise(correct, np.arange(200))
    assert (e.n_seeds, e.n_draws, e.unit) == (2, 5, "draw")
    assert "these 2 backbones" in e.note


@pytest.mark.parametrize(("n", "draws"), [(300, 1), (1000, 1), (1000, 10)])
def test_three_images_of_a_thousand_are_no_difference(n, draws):
    """All that differ are on one side, so that no resample crosses zero; the exact sign test says p = 0.25."""
    a, b = np.zeros((draws, n)), np.zeros((draws, n))
    a[:, :3] = 1
    for one, other in ((a, b), (b, a)):
        e = paired(one, other, np.arange(n))
        assert e.ci_low < 0 < e.ci_high
    a[:, :40] = 1
    assert paired(a, b, np.arange(n)).ci_low > 0


def test_one_draw_is_never_called_more():
    e = summarise(np.random.default_rng(0).random((3, 1, 300)) < 0.7, np.arange(300))
    assert (e.unit, "draws of labels" in e.note, "this one draw" in e.note) == ("seed", False, True)


def test_verdict():
    assert verdict(0.01, 0.05) == "helps"
    assert verdict(-0.05, -0.01) == "does not help"
    assert verdict(-0.01, 0.05) == verdict(0.0, 0.05) == verdict(0.0, 0.0) == "cannot tell with these labels"


def test_one_cluster_is_no_sample():
    with pytest.raises(UserError, match="two clusters"):
        summarise(np.ones((3, 10), bool), np.zeros(10))


def test_results_that_do_not_vary_have_an_interval_all_the_same():
    """20 test images, all right: exact 95 % bound of Clopper and Pearson: 0.025^(1/20)."""
    right = np.ones((4, 20), bool)
    e = summarise(right, np.arange(20))
    assert (e.mean, e.ci_high) == (1.0, 1.0)
    assert e.ci_low == pytest.approx(0.025 ** (1 / 20))
    assert "do not vary" in e.note
    same = paired(right, right, np.arange(20))
    assert verdict(same.ci_low, same.ci_high) == "cannot tell with these labels"
    assert same.ci_high == pytest.approx(1 - 0.025 ** (1 / 20))


def test_one_wrong_answer_is_not_surer_than_none():
    """Ten draws of 20 images, one of the 200 answers wrong: the exact bound of Clopper and Pearson, at least."""
    right = np.ones((10, 20), bool)
    none = summarise(right, np.arange(20))
    right[3, 7] = False
    one = summarise(right, np.arange(20))
    assert one.mean == pytest.approx(0.995)
    assert one.ci_low <= beta.ppf(0.025, 19.9, 1.1) + 1e-9
    assert one.ci_high >= beta.ppf(0.975, 20.9, 0.1)
    assert one.ci_high - one.ci_low >= 0.8 * (none.ci_high - none.ci_low)
    wrong = summarise(~right, np.arange(20))
    assert (wrong.ci_low, wrong.ci_high) == pytest.approx((1 - one.ci_high, 1 - one.ci_low), abs=1e-6)


def test_near_100_percent_covers_at_least_93():
    """Two images in a hundred are always wrong, the others seldom."""
    rng = np.random.default_rng(0)
    hits = []
    for _ in range(400):
        always = rng.random(100) < 0.02
        e = summarise(~(always | (rng.random((10, 100)) < 0.005)), np.arange(100), n_resamples=200)
        hits.append(e.ci_low <= 0.98 * 0.995 <= e.ci_high)
    assert np.mean(hits) >= 0.93


def test_where_many_are_wrong_the_exact_bound_does_not_count(monkeypatch):
    """It knows one draw only, and would be far too wide where the draws differ."""
    correct = np.random.default_rng(0).random((10, 400)) >= 0.3
    e = summarise(correct, np.arange(400))
    exact = beta.ppf([0.025, 0.975], [280, 281], [121, 120])
    assert e.ci_high - e.ci_low < 0.5 * (exact[1] - exact[0])
    monkeypatch.setattr(stats, "RARE", 0)
    assert summarise(correct, np.arange(400)) == e
