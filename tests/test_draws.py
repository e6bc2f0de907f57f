from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats

from unlabel.draws import Draws, _counted
from unlabel.order import batch_at, steps_for


@pytest.fixture(params=["by row", "counted as on GPUs"])
def counted(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param != "by row":
        monkeypatch.setattr(Draws, "counted", property(lambda _: True, lambda *_: None), raising=False)


@pytest.mark.usefixtures("counted")
def test_a_row_depends_on_its_image_alone():
    whole = Draws(7, [0, 0, 1, 1], [5, 9, 5, 9]).stream("noise")
    one = Draws(7, [1], [5]).stream("noise")
    for draw in (lambda d: d.uniform(3, 2), lambda d: d.normal(40), lambda d: d.integers(10, 6)):
        assert torch.equal(draw(whole)[2], draw(one)[0])
        assert not torch.equal(draw(whole)[0], draw(whole)[2])  # another epoch
        assert not torch.equal(draw(whole)[0], draw(whole)[1])  # another image
        assert torch.equal(draw(whole), draw(whole))  # no hidden counter


@pytest.mark.usefixtures("counted")
def test_streams_and_seeds_are_independent():
    n = 400
    a = Draws(1, [0] * n, range(n)).stream("a").uniform().numpy()
    for other in (Draws(1, [0] * n, range(n)).stream("b"), Draws(2, [0] * n, range(n)).stream("a")):
        assert abs(np.corrcoef(a, other.uniform().numpy())[0, 1]) < 0.15
    assert abs(np.corrcoef(a[:-1], a[1:])[0, 1]) < 0.15  # neighbouring images


@pytest.mark.usefixtures("counted")
def test_distributions():
    draws = Draws(3, [0] * 500, range(500))
    assert stats.kstest(draws.uniform(8).flatten().numpy(), "uniform").pvalue > 1e-3
    assert stats.kstest(draws.normal(32).flatten().numpy(), "norm").pvalue > 1e-3
    counts = torch.bincount(draws.integers(6, 8).flatten(), minlength=6).numpy()
    assert stats.chisquare(counts).pvalue > 1e-3


@pytest.mark.usefixtures("counted")
def test_slice_is_the_same_rows():
    draws = Draws(3, [0] * 6, range(6)).stream("x")
    assert torch.equal(draws.slice(2, 5).uniform(4), draws.uniform(4)[2:5])


def test_counting_is_splitmix64():
    """The published sequence of seed 1234567 (e.g. the reference values on Rosetta Code)."""
    wanted = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431, 16408922859458223821]
    keys = torch.tensor([1234567, -1])
    assert [int(x) % 2**64 for x in _counted(keys, 5)[0]] == wanted


@pytest.mark.parametrize(("n", "batch"), [(10, 4), (7, 7), (5, 8), (100, 33)])
def test_order_is_the_stream_of_permutations(n: int, batch: int):
    steps = steps_for(3, n, batch)
    epochs, indices = map(np.concatenate, zip(*(batch_at(0, s, batch, n) for s in range(steps)), strict=True))
    assert len(indices) == steps * batch >= 3 * n > (steps - 1) * batch
    for epoch in range(3):
        assert sorted(indices[epochs == epoch].tolist()) == list(range(n))
    assert not np.array_equal(indices[:n], indices[n : 2 * n])  # shuffled anew
    # a pure function of (seed, step)
    assert all(np.array_equal(a, b) for a, b in zip(batch_at(0, 2, batch, n), batch_at(0, 2, batch, n), strict=True))
    assert n < 10 or not np.array_equal(batch_at(0, 0, batch, n)[1], batch_at(1, 0, batch, n)[1])
