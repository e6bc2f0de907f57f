"""Labels that a control needs to match an arm: exact cases, the ends of what was measured, coverage."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest

from downstream import summary
from downstream.efficiency import labels_to_match
from unlabel.report import format_efficiency, write_report

ONE_EACH = np.arange(2000)


def hits(share: float, draws: int = 4) -> np.ndarray:
    """(1, draws, 2000), the same images right in each draw."""
    return np.tile(np.arange(2000) < round(2000 * share), (1, draws, 1))


def test_between_two_counts_it_is_the_logarithm_that_is_interpolated():
    control = {10.0: hits(0.6), 100.0: hits(0.8), 1000.0: hits(0.9)}
    assert labels_to_match(hits(0.7), control, ONE_EACH).labels == pytest.approx(10**1.5)
    assert labels_to_match(hits(0.85), control, ONE_EACH).labels == pytest.approx(10**2.5)
    assert labels_to_match(hits(0.8), control, ONE_EACH).labels == pytest.approx(100)
    assert labels_to_match(hits(0.6), control, ONE_EACH).labels == pytest.approx(10)  # a tie is not fewer


def test_the_interval_is_where_the_paired_difference_may_be_zero():
    """The same images in each draw: a binomial proportion, whose interval is known."""
    control = {10.0: hits(0.6), 100.0: hits(0.8)}
    match = labels_to_match(hits(0.7), control, ONE_EACH)
    assert match.low is not None
    assert match.high is not None
    assert match.labels is not None
    # At n = 10^(1 + w) the difference is 0.1 - 0.2 w, over images with values 0, 1 - w and -w.
    for end in (match.low, match.high):
        w = np.log10(end) - 1
        values = np.repeat([0, 1 - w, -w], [1600, 200, 200])
        assert abs(0.1 - 0.2 * w) == pytest.approx(1.961 * values.std(ddof=1) / np.sqrt(2000), rel=0.06)
    assert match.low < match.labels < match.high


@pytest.mark.parametrize(
    ("share", "expected"), [(0.95, (None, None, None)), (0.4, (0.0, 0.0, 0.0)), (0.7995, ("in", "in", None))]
)
def test_nothing_is_claimed_beyond_what_was_measured(share, expected):
    match = labels_to_match(hits(share), {10.0: hits(0.6), 100.0: hits(0.8)}, ONE_EACH)
    for value, wanted in zip((match.labels, match.low, match.high), expected, strict=True):
        assert (value is not None and 10 < value < 100) if wanted == "in" else value == wanted


def test_one_count_tells_only_on_which_side():
    assert labels_to_match(hits(0.7), {10.0: hits(0.6)}, ONE_EACH).low is None
    assert labels_to_match(hits(0.5), {10.0: hits(0.6)}, ONE_EACH).high == 0.0


def test_a_curve_that_dips_is_matched_where_it_first_gets_there_and_left_where_it_last_does():
    control = {10.0: hits(0.6), 20.0: hits(0.71), 40.0: hits(0.66), 80.0: hits(0.9)}
    match = labels_to_match(hits(0.7), control, ONE_EACH)
    assert match.labels is not None
    assert match.low is not None
    assert match.high is not None
    assert match.low < match.labels < 20
    assert 40 < match.high < 80


def test_the_interval_covers_the_truth():
    """Draws, images and both arms random; the truth is 10^1.5 labels. 95 % of 300 sets, within chance."""
    rng, inside = np.random.default_rng(0), 0
    for _ in range(300):
        ease = rng.normal(size=150)  # of the images

        def arm(level: float, ease: np.ndarray = ease) -> np.ndarray:
            z = level + ease + 0.3 * rng.normal(size=(1, 6, 1))
            return z + rng.normal(size=(1, 6, 150)) > 0

        match = labels_to_match(arm(0.6), {10.0: arm(0.2), 100.0: arm(1.0)}, np.arange(150))
        # P(right) = Phi(level / sqrt(2.09)) is near enough to linear between the two.
        low, high = match.low or 0.0, match.high or np.inf
        inside += low <= 10**1.5 <= high and match.low is not None
    assert 0.92 <= inside / 300 <= 0.985


def test_all_labels_stand_beside_each_draw():
    control = {10.0: hits(0.6), 100.0: hits(0.8, draws=1)}
    assert labels_to_match(hits(0.7), control, ONE_EACH).labels == pytest.approx(10**1.5)
    assert labels_to_match(hits(0.7, draws=1), control, ONE_EACH).labels == pytest.approx(10**1.5)


ROW = {"arm": "rotation", "protocol": "finetune", "labels_per_class": 10, "measured": [10.0, 250.0]}


def test_the_report_says_what_lies_beyond(tmp_path):
    results = {
        "schema": 1,
        "label_efficiency": [
            {**ROW, "scratch_labels": 141.2, "ci_low": 88.0, "ci_high": None},
            {**ROW, "labels_per_class": 50, "scratch_labels": None, "ci_low": None, "ci_high": None},
            {**ROW, "arm": "<b>", "scratch_labels": 0.0, "ci_low": 0.0, "ci_high": 12.0},
        ],
    }
    text = format_efficiency(results)
    assert "rotation: 10: 141 [88, > 250], 50: > 250" in text
    assert "<b>: 10: < 10 [< 10, 12]" in text
    assert format_efficiency({}) == ""
    broken = [{"measured": []}, {"labels_per_class": 10.5}, {"arm": 3}, {"ci_low": "x"}, {"measured": [0, 1]}]
    broken.append({"measured": [250, 10]})
    whole = results["label_efficiency"][0]
    assert format_efficiency({"label_efficiency": [{**whole, **b} for b in broken] + [ROW]}) == ""
    (tmp_path / "results.json").write_text(json.dumps(results))
    page = write_report(tmp_path).read_text()
    assert "Labels saved" in page
    assert "<td>&lt; 10 [&lt; 10, 12]</td>" in page
    assert "141 [88, &gt; 250]" in page
    assert "<b>:" not in page
    assert "rotation, 10 labels per class: scratch needs 141" in page


def test_seeds_that_only_one_side_has_are_counted():
    many = np.concatenate([hits(0.5), hits(0.6), hits(0.7)])
    assert labels_to_match(hits(0.7), {10.0: many, 100.0: hits(0.8)}, ONE_EACH).labels == pytest.approx(10**1.5)
    same = {10.0: hits(0.6), 100.0: hits(0.8)}
    wide, narrow = (labels_to_match(hits(0.7), control, ONE_EACH) for control in ({**same, 10.0: many}, same))
    assert wide.low is not None
    assert narrow.low is not None
    assert wide.low < 0.8 * narrow.low
    match = labels_to_match(np.concatenate([hits(0.7)] * 3), {10.0: many, 100.0: np.repeat(hits(0.8), 3, 0)}, ONE_EACH)
    assert match.labels == pytest.approx(10**1.5)
    assert match.low is not None


@pytest.mark.parametrize(("sizes", "measured"), [((300, 30), [10, 20]), ((120, 100), [10, 110])])
def test_all_labels_of_unequal_classes_are_no_number_per_class(sizes, measured):
    counts = (10, 20, "all")
    table = SimpleNamespace(
        protocols=("finetune",), counts=counts, classes=["cat", "dog"],
        pool=SimpleNamespace(y=np.repeat([0, 1], sizes)), test=SimpleNamespace(clusters=ONE_EACH),
        labels=lambda count: sum(sizes) if count == "all" else 2 * count,
    )  # fmt: skip
    correct = {
        (arm, "finetune", count, None): hits(share + 0.1 * counts.index(count))
        for arm, share in (("rotation", 0.7), ("scratch", 0.6))
        for count in counts
    }
    rows = list(summary._efficiency(table, [SimpleNamespace(name="rotation")], correct))  # pyright: ignore
    assert [row["labels_per_class"] for row in rows] == [10, 20, "all"]
    assert all(row["measured"] == measured for row in rows)
