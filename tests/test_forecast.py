"""Forecasts of accuracy: the formula by hand, its ends, and what the report makes of it."""

from __future__ import annotations

import json
import math

import pytest

from downstream import forecast as fc
from unlabel.report import format_forecasts, write_report


# Of two classes: errors 0.5, 0.32 and so on are 1, 0.64 … of guessing; their roots 1, 0.8 …
def test_the_fall_per_doubling_goes_on(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(fc, "WEIGHTS", {2: (0.0, 1.0), 4: (0.05, 2.0)})
    monkeypatch.setattr(fc, "VARIANCE", {2: (0.0, 0.0, 0.0), 4: (0.0, 0.0, 0.0)})
    found = fc.forecast(0.68, 0.5, (20, 5), 2, 1000)  # 0.2 in two doublings
    for times, root in ((2, 0.7), (4, 0.55)):
        assert (found[times].mean, found[times].low, found[times].high) == pytest.approx((1 - root**2 / 2,) * 3)
    assert fc.forecast(0.68, 0.5, (20, 10), 2, 1000)[2].mean == pytest.approx(1 - 0.6**2 / 2)  # in one
    ten = fc.forecast(1 - 0.9 * 0.64, 1 - 0.9, (20, 5), 10, 1000)
    assert ten[2].mean == pytest.approx(1 - 0.9 * 0.7**2)


def test_the_interval_holds_four_of_five_of_a_normal_variable(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(fc, "WEIGHTS", {2: (0.1, 0.0)})
    monkeypatch.setattr(fc, "VARIANCE", {2: (0.01, 0.3, 2.0)})
    found = fc.forecast(0.68, 0.5, (20, 5), 2, 500)[2]
    sigma = math.sqrt(0.01 + 0.3 / 40 + 2.0 * 0.68 / 500)
    for value, z in ((found.mean, 0.0), (found.low, -1.2816), (found.high, 1.2816)):
        assert value == pytest.approx(1 - (0.7 - z * sigma) ** 2 / 2, abs=1e-4)


def test_what_was_fitted_behaves():
    """More labels are worth more and are known less; a steeper rise goes on rising; all of it stays within 0 and 1."""
    found = fc.forecast(0.6, 0.5, (20, 5), 2, 1000)
    assert 0.6 < found[2].mean < found[4].mean < 1
    assert found[2].high - found[2].low < found[4].high - found[4].low
    assert fc.forecast(0.6, 0.58, (20, 5), 2, 1000)[4].mean < found[4].mean
    few = fc.forecast(0.6, 0.5, (20, 5), 2, 20)
    assert few[2].high - few[2].low > found[2].high - found[2].low
    assert fc.forecast(1.0, 1.0, (4, 1), 2, 50)[2].low < 1  # fifty right of fifty are not all
    for accuracy, earlier in ((1.0, 1.0), (0.0, 0.0), (0.5, 0.9), (0.9, 0.1)):
        for f in fc.forecast(accuracy, earlier, (4, 1), 2, 50).values():
            assert 0 <= f.low <= f.mean <= f.high <= 1


def test_the_report_says_it(tmp_path):
    row = {
        "arm": "rotation",
        "protocol": "linear",
        "from": 50,
        "mean": 0.772,
        "low": 0.749,
        "high": 0.794,
        "level": 0.8,
    }
    results = {
        "schema": 1,
        "summary": [{"arm": "rotation", "protocol": "linear", "labels_per_class": 50, "mean": 0.743}],
        "forecast": [{**row, "labels_per_class": 100}, {**row, "labels_per_class": 200, "mean": 0.8}],
    }
    assert "rotation: 100: 77.2 [74.9, 79.4], 200: 80.0 [74.9, 79.4]" in format_forecasts(results)
    assert format_forecasts({}) == ""
    assert format_forecasts({"forecast": [{**row, "labels_per_class": "x"}, {**row, "arm": 3}, {"arm": "a"}]}) == ""
    (tmp_path / "results.json").write_text(json.dumps(results))
    page = write_report(tmp_path).read_text()
    for text in ("More labels?", "50 (measured)", "<td>74.3</td>", "77.2 [74.9, 79.4]"):
        assert text in page
