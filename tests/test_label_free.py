"""Scores that need no labels: each against a case worked by hand or another way to compute it, and end to end."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm
from scipy.stats import ortho_group
from sklearn.linear_model import LinearRegression

from downstream import evaluate as ev
from downstream import label_free as lf
from downstream import label_free_table as lft
from downstream.split import split_data
from unlabel.apply import embed
from unlabel.backbone import build_backbone, save_backbone
from unlabel.cache import load_cache
from unlabel.cli import main
from unlabel.config import EvaluateConfig
from unlabel.draws import Draws
from unlabel.report import format_label_free, write_report
from unlabel.report_html import typeset
from unlabel.report_label_free import _STUDY, choice
from unlabel.sources import open_source

ROOT = Path(__file__).parents[1]
SIZE = 16


def some_features(n: int = 300, width: int = 12) -> np.ndarray:
    """(n, width): correlated, of unequal variance, with a mean."""
    rng = np.random.default_rng(0)
    return rng.normal(size=(n, width)) @ rng.normal(size=(width, width)) + rng.normal(size=width)


def some_views(n: int = 60, q: int = 5, width: int = 6) -> np.ndarray:
    """(n, q, width): images apart, copies of one image less so."""
    rng = np.random.default_rng(1)
    return some_features(n, width)[:, None] + 0.3 * rng.normal(size=(n, q, width)) @ rng.normal(size=(width, width))


def entropy_rank(p: list[float]) -> float:
    return math.exp(-sum(v * math.log(v) for v in p))


# ---------------------------------------------------------------- effective rank, RankMe, α-ReQ


def test_spectrum_is_that_of_the_covariance():
    x = some_features()
    expected = np.linalg.eigvalsh(np.cov(x, rowvar=False))[::-1]
    assert np.allclose(lf.covariance_spectrum(x), expected, rtol=1e-9)


@pytest.mark.parametrize(
    ("spectrum", "rank"),
    [([1.0] * 7, 7), ([5.0], 1), ([3.0, 0, 0], 1), ([2.0, 1, 1], 2**1.5), ([4.0, 1.0], 5 / 4**0.8), ([0.0, 0], 0)],
)
def test_effective_rank_by_hand(spectrum: list[float], rank: float):
    """p = 1/2, 1/4, 1/4 has 3/2 bits; p = 4/5, 1/5 has log 5 - 4/5 log 4 nats."""
    assert lf.effective_rank(np.array(spectrum)) == pytest.approx(rank, rel=1e-12)


def test_effective_rank_of_features():
    """All signs of four numbers vary alike in four directions; multiples of one vector in one; constants in none."""
    signs = np.array(list(itertools.product([-1.0, 1.0], repeat=4)))
    assert lf.effective_rank(lf.covariance_spectrum(signs + 100)) == pytest.approx(4)
    line = np.arange(10.0)[:, None] * np.array([1.0, 2, 3]) + 7
    assert lf.effective_rank(lf.covariance_spectrum(line)) == pytest.approx(1)
    constant = np.full((50, 8), 0.1, np.float32) * (1 + 1e-7 * np.random.default_rng(0).normal(size=(50, 8)))
    assert lf.effective_rank(lf.covariance_spectrum(constant.astype(np.float32))) == 0


def test_rankme_by_hand():
    """Singular values 3 and 1, not their squares, and 1e-7 added after the division; the mean is not subtracted."""
    x = np.diag([3.0, 1.0, 0.0])
    assert lf.rankme(x) == pytest.approx(entropy_rank([0.75 + 1e-7, 0.25 + 1e-7, 1e-7]), rel=1e-12)
    assert lf.rankme(x) > entropy_rank([0.75, 0.25]) + 1e-6
    one = np.ones((5, 3))
    assert lf.rankme(one) == pytest.approx(entropy_rank([1 + 1e-7, 1e-7, 1e-7]), rel=1e-12)
    assert lf.effective_rank(lf.covariance_spectrum(one)) == 0


def test_alpha_of_an_exact_power_law_between_rank_4_and_100():
    ranks = np.arange(1, 301.0)
    spectrum = 5 * ranks**-1.37
    assert lf.alpha_req(spectrum) == pytest.approx(1.37, rel=1e-9)
    bent = np.where((ranks < 4) | (ranks > 100), np.where(ranks < 4, 50 * spectrum, spectrum / 50), spectrum)
    assert lf.alpha_req(bent) == pytest.approx(1.37, rel=1e-9)
    for k in (4, 100):
        moved = spectrum.copy()
        moved[k - 1] *= 0.9
        assert abs(lf.alpha_req(moved) - 1.37) > 1e-3 / k


def test_alpha_is_a_weighted_fit():
    """Against scikit-learn's least squares, weighted by 1 / rank."""
    spectrum = np.sort(np.random.default_rng(2).lognormal(0, 2, 150))[::-1]
    ranks = np.arange(4, 101)
    x, y = np.log(ranks)[:, None], np.log(spectrum[3:100])
    expected = -LinearRegression().fit(x, y, sample_weight=1 / ranks).coef_[0]
    assert lf.alpha_req(spectrum) == pytest.approx(expected, rel=1e-9)
    assert abs(lf.alpha_req(spectrum) + LinearRegression().fit(x, y).coef_[0]) > 1e-3


def test_alpha_with_few_directions():
    spectrum = np.array([9.0, 8, 7, 1, (4 / 5) ** 2, 0, 0])
    assert lf.alpha_req(spectrum) == pytest.approx(2, rel=1e-9)
    assert math.isnan(lf.alpha_req(spectrum[:4]))


# ---------------------------------------------------------------- LiDAR, alignment, uniformity


def crossed(spread: tuple[float, float], apart: tuple[float, float]) -> np.ndarray:
    """(4, 4, 2): images at ±spread on each axis, each with copies at ±apart on each axis around it."""

    def ends(a: float, b: float) -> np.ndarray:
        return np.array([(a, 0), (-a, 0), (0, b), (0, -b)], float)

    return ends(*spread)[:, None] + ends(*apart) + 3


def test_lidar_by_hand():
    """B = diag(2, 1/2) and W = diag(1/2, 1/8): quotients of 4 and 4, where the images alone have 4/5 and 1/5."""
    delta = 1e-4 * (2 + 0.5 + 0.5 + 0.125) / 2
    a, b = 2 / (0.5 + delta), 0.5 / (0.125 + delta)
    found = lf.lidar(crossed((2, 1), (1, 0.5)))
    assert found == pytest.approx(entropy_rank([a / (a + b) + 1e-7, b / (a + b) + 1e-7]), rel=1e-9)
    assert found == pytest.approx(2, rel=1e-4)
    assert lf.lidar(crossed((2, 1), (1, 1))) == pytest.approx(entropy_rank([4 / 5, 1 / 5]), rel=1e-3)


def test_lidar_where_copies_do_not_differ():
    """W = diag(1/2, 0): what is divided by is δ, 1e-4 of the mean variance."""
    delta = 1e-4 * (2 + 0.5 + 0.5) / 2
    a, b = 2 / (0.5 + delta), 0.5 / delta
    found = lf.lidar(crossed((2, 1), (1, 0)))
    assert found == pytest.approx(entropy_rank([a / (a + b) + 1e-7, b / (a + b) + 1e-7]), rel=1e-9)
    assert lf.lidar(np.full((4, 3, 2), 0.1)) == 0


def test_lidar_as_the_paper_writes_it():
    views = some_views()
    n, q, width = views.shape
    means = views.mean(1)
    between = sum(np.outer(m - means.mean(0), m - means.mean(0)) for m in means) / n
    within = sum(np.outer(v - m, v - m) for m, copies in zip(means, views, strict=True) for v in copies) / (n * q)
    within = within + 1e-4 * (np.trace(between) + np.trace(within)) / width * np.eye(width)
    root = np.linalg.inv(np.real(sqrtm(within)))
    values = np.linalg.eigvalsh(root @ between @ root)
    assert lf.lidar(views) == pytest.approx(entropy_rank(list(values / values.sum() + 1e-7)), rel=1e-7)


def test_alignment_by_hand():
    pair = np.array([[[2.0, 0], [-3.0, 0]], [[1, 0], [0, 5]]])  # opposite: 4; at right angles: 2
    assert lf.alignment(pair) == pytest.approx(3)
    assert lf.alignment(np.ones((3, 4, 2))) == pytest.approx(0, abs=1e-12)
    views = some_views()
    z = torch.nn.functional.normalize(torch.from_numpy(views), dim=2)
    pairs = itertools.combinations(range(views.shape[1]), 2)
    expected = np.mean([float((z[:, a] - z[:, b]).norm(dim=1).pow(2).mean()) for a, b in pairs])
    assert lf.alignment(views) == pytest.approx(expected, rel=1e-9)


def test_uniformity_by_hand():
    """Opposite points are 2 apart: exp(-2 · 4)."""
    assert lf.uniformity(np.array([[[3.0, 0]], [[-1, 0]]])) == pytest.approx(-8)
    assert lf.uniformity(np.array([[[3.0, 0]], [[0, 1]]])) == pytest.approx(-4)
    assert lf.uniformity(np.ones((5, 2, 3))) == pytest.approx(0, abs=1e-12)
    views = some_views()
    z = torch.nn.functional.normalize(torch.from_numpy(views), dim=2)
    losses = [float(torch.pdist(z[:, k]).pow(2).mul(-2).exp().mean().log()) for k in range(views.shape[1])]
    assert lf.uniformity(views) == pytest.approx(np.mean(losses), rel=1e-9)


@pytest.mark.parametrize("score", ["effective_rank", "rankme", "alpha_req", "lidar", "alignment", "uniformity"])
def test_neither_scale_nor_rotation_nor_order_makes_a_difference(score: str):
    function: Any = getattr(lf, score)
    x = some_views(40, 3, 20) if score in ("lidar", "alignment", "uniformity") else some_features(80, 20)
    if score in ("effective_rank", "alpha_req"):
        function = lambda x: getattr(lf, score)(lf.covariance_spectrum(x))  # noqa: E731
    turn, before = ortho_group.rvs(20, random_state=0), function(x)
    shuffled = x[np.random.default_rng(0).permutation(len(x))]
    for other in (1e-4 * x, 1e4 * x, x @ turn, shuffled):
        assert function(other) == pytest.approx(before, rel=1e-6)
    if score in ("effective_rank", "alpha_req", "lidar"):
        assert function(x + 5) == pytest.approx(before, rel=1e-6)


@pytest.mark.parametrize("shape", [(1, 4, 3), (4, 1, 3)])
def test_too_few_images_or_copies(shape: tuple[int, ...]):
    with pytest.raises(ValueError, match="at least two"):
        lf.lidar(np.zeros(shape))
    with pytest.raises(ValueError, match="at least two"):
        (lf.uniformity if shape[0] == 1 else lf.alignment)(np.zeros(shape))
    with pytest.raises(ValueError, match="at least two"):
        lf.covariance_spectrum(np.zeros((1, 3)))


# ---------------------------------------------------------------- the probes


def test_probe_tells_what_can_be_told_and_not_more():
    rng = np.random.default_rng(3)
    plain = np.eye(4)[None] + 0.1 * rng.normal(size=(40, 4, 4))
    log_p = lf.held_out_log_p(plain, np.arange(40))
    assert np.allclose(np.exp(log_p).sum(2), 1)
    assert lf.rotation_accuracy(log_p) == 1
    assert lf.jigsaw_accuracy(log_p) == 1
    noise = lf.held_out_log_p(rng.normal(size=(400, 4, 4)), np.arange(400))
    assert abs(lf.rotation_accuracy(noise) - 1 / 4) < 0.06
    assert abs(lf.jigsaw_accuracy(noise) - 1 / 24) < 0.04


def test_probe_holds_out_near_duplicates_together():
    """Twins with features of their own: known by heart where a twin was fitted on, else not at all."""
    twins = np.repeat(np.random.default_rng(4).normal(size=(60, 4, 500)), 2, axis=0)
    apart = lf.held_out_log_p(twins, np.arange(120))
    together = lf.held_out_log_p(twins, np.repeat(np.arange(60), 2)[::-1])
    assert lf.rotation_accuracy(apart) > 0.9
    assert lf.rotation_accuracy(together) < 0.4
    with pytest.raises(ValueError, match="nothing to hold out"):
        lf.held_out_log_p(twins, np.zeros(120, int))


def test_jigsaw_accuracy_by_hand():
    """The likeliest order, not each tile's likeliest place: tiles 0 and 1 both look like 0, tile 1 more like 1."""
    p = np.array([[0.6, 0.2, 0.1, 0.1], [0.5, 0.4, 0.05, 0.05], [0.1, 0.1, 0.7, 0.1], [0.1, 0.1, 0.1, 0.7]])
    assert lf.rotation_accuracy(np.log(p)[None]) == 3 / 4
    assert lf.jigsaw_accuracy(np.log(p)[None]) == 1
    assert lf.jigsaw_accuracy(np.log(p[[1, 0, 2, 3]])[None]) == 0
    assert lf.jigsaw_accuracy(np.full((3, 4, 4), math.log(1 / 4))) == pytest.approx(1 / 24)  # told by chance alone


def test_tiles_lie_inside_their_quarters():
    images = torch.zeros(30, 40, 40, 3, dtype=torch.uint8)
    images[:, :20, 20:], images[:, 20:, :20], images[:, 20:, 20:] = 50, 100, 150
    images[:, [0, 19, 20, 39]] += 60  # the quarters' outermost rows
    cut = lf.tiles(images, 17, Draws(0, [0] * 30, list(range(30))))
    assert cut.shape == (30, 4, 3, 17, 17)
    middle = (cut[..., 8, 8] * 255).round()
    assert torch.equal(middle, torch.tensor([0.0, 50, 100, 150]).view(1, 4, 1).expand(30, 4, 3))
    edges = torch.stack([(cut[:, :, :, k] * 255).round() > middle[..., None] for k in (0, -1)]).any(-1).any(-1)
    assert edges.any(1).any(1).all()  # they move …
    assert not edges.all(0).any()  # … but do not reach from edge to edge


def test_altered_copies_belong_to_the_image(digits_folder: Path):
    images = torch.from_numpy(np.array(load_cache(open_source(str(digits_folder)), SIZE, progress=False).images[:6]))

    def copies(rows: list[int], copy: int = 0, flip: bool = True) -> torch.Tensor:
        return lf.altered(images[rows], SIZE, Draws(0, [copy] * len(rows), rows, "label-free"), flip)

    every = copies([0, 1, 2, 3, 4, 5])
    assert every.shape == (6, 3, SIZE, SIZE)
    assert float(every.min()) >= 0
    assert float(every.max()) <= 1
    assert torch.allclose(copies([4, 2]), every[[4, 2]], atol=1e-6)
    assert ((copies([0, 1, 2, 3, 4, 5], 1) - every).abs().mean((1, 2, 3)) > 0.01).all()
    same = [torch.equal(a, b) for a, b in zip(copies([0, 1, 2, 3, 4, 5], flip=False), every, strict=True)]
    assert 0 < sum(same) < 6  # about half of them are mirrored


# ---------------------------------------------------------------- a backbone and images


@pytest.fixture(scope="module")
def digits(digits_folder: Path):
    return load_cache(open_source(str(digits_folder)), SIZE, progress=False)


def scores(found: list[dict[str, Any]]) -> dict[str, float]:
    return {row["score"]: row["value"] for row in found}


def test_all_scores_are_of_the_pooled_last_features(digits):
    backbone = build_backbone("small", SIZE).train()
    found = lf.label_free(backbone, digits.images, digits.hashes, np.arange(320))
    assert backbone.training
    features = embed(backbone, digits.images)
    value = scores(found)
    spectrum = lf.covariance_spectrum(features)
    assert value["effective_rank"] == pytest.approx(lf.effective_rank(spectrum), rel=1e-4)
    assert value["alpha_req"] == pytest.approx(lf.alpha_req(spectrum), rel=1e-3)
    assert value["rankme"] == pytest.approx(lf.rankme(features), rel=1e-4)
    assert list(value) == [*"effective_rank rankme alpha_req lidar alignment uniformity".split(),
                           "rotation_probe", "jigsaw_probe"]  # fmt: skip
    assert all(v is not None and math.isfinite(v) for v in value.values())
    assert value["alignment"] > 0.01  # the copies differ
    assert value["rotation_probe"] > 0.5  # digits have a right way up
    assert value["jigsaw_probe"] > 2 / 24
    assert {row["n_images"] for row in found} == {320}
    assert [row.get("chance") for row in found[-2:]] == [1 / 4, 1 / 24]


def test_order_of_the_images_and_their_number(digits, monkeypatch: pytest.MonkeyPatch):
    """At most so many images, the same whatever their order; and what `passes` says is what is shown."""
    for name, n in (("IMAGES", 60), ("COPIED", 20), ("PROBED", 40)):
        monkeypatch.setattr(lf, name, n)
    backbone, shown = build_backbone("small", SIZE), []
    monkeypatch.setattr(backbone, "channels", 11)
    hook = backbone.register_forward_hook(lambda _, inputs, __: shown.append(len(inputs[0])))
    groups = np.arange(320) // 2
    first = lf.label_free(backbone, digits.images, digits.hashes, groups)
    assert sum(shown) == lf.passes(320, 11) == 60 + 10 * 22 + 7 * 40
    hook.remove()
    assert [row["n_images"] for row in first] == [60] * 3 + [22] * 3 + [40] * 2
    order = np.random.default_rng(5).permutation(320)
    again, renamed = digits.subset(order), np.random.default_rng(6).permutation(160)[groups[order]]
    assert lf.label_free(backbone, again.images, again.hashes, renamed) == first
    without = lf.label_free(backbone, digits.images, digits.hashes, groups, leave_out=["rotation_probe"])
    assert without == [row for row in first if row["score"] != "rotation_probe"]


def test_mirror_images_only_where_they_are_such_images(digits, monkeypatch: pytest.MonkeyPatch):
    asked, real = [], lf.random_view
    monkeypatch.setattr(lf, "random_view", lambda *a, flip, **k: (asked.append(flip), real(*a, flip=flip, **k))[1])
    for flip in (True, False):
        few = digits.subset(np.arange(8))
        lf.label_free(build_backbone("small", SIZE), few.images, few.hashes, np.arange(8), flip=flip)
    assert asked == [True] * 10 + [False] * 10


def test_a_collapsed_network_and_a_single_group(digits):
    backbone = build_backbone("small", SIZE)
    for p in backbone.parameters():
        p.data.zero_()
    few = digits.subset(np.arange(12))
    value = scores(lf.label_free(backbone, few.images, few.hashes, np.zeros(12, int)))
    assert (value["effective_rank"], value["lidar"], value["alignment"]) == (0, 0, 0)
    assert (value["alpha_req"], value["rotation_probe"], value["jigsaw_probe"]) == (None, None, None)
    value = scores(lf.label_free(backbone, few.images, few.hashes, np.arange(12)))
    assert value["rotation_probe"] == pytest.approx(1 / 4)
    assert value["jigsaw_probe"] == pytest.approx(1 / 24)


# ---------------------------------------------------------------- a table, and the command line

FEW = 100


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(lf, "IMAGES", FEW)  # what is tested below is the plumbing


@pytest.mark.usefixtures("few")
def test_neither_labels_nor_test_images_make_a_difference(digits_folder: Path, tmp_path: Path):
    save_backbone(build_backbone("small", SIZE), tmp_path / "run")
    split = split_data(EvaluateConfig(run=tmp_path, train=str(digits_folder)), SIZE, None)
    arms = [ev.Arm("task", "backbone", (0,), (tmp_path / "run",)), ev.Arm("random", "random"), ev.Arm("s", "scratch")]
    found = []
    for k, test in enumerate((split.test, dataclasses.replace(split.test, pixels=np.zeros((0, 20, 20, 3), np.uint8)))):
        y = np.random.default_rng(0).permutation(split.pool.y) if k else split.pool.y
        table = ev.Table(dataclasses.replace(split.pool, y=y), test, split.unlabelled.images, split.classes, (5,), 1,
                         ("knn",), ("small", "auto"), SIZE, torch.device("cpu"), tmp_path / str(k))  # fmt: skip
        found.append(lft.label_free_rows(table, arms, {}))
    assert found[0] == found[1]
    assert {row["arm"] for row in found[0]} == {"task", "random"}
    assert all(row["n_images"] == FEW for row in found[0])


def test_what_a_run_last_logged(tmp_path: Path):
    lines = [
        {"metrics": {"a/accuracy": 0.3, "a/loss": 2.0}, "trivial": {"a/accuracy": 0.25}},
        {"metrics": {"a/accuracy": 0.7, "a/loss": 1.0}, "trivial": {"a/accuracy": 0.25}},
    ]
    text = "\n".join(map(json.dumps, lines)) + '\n{"metrics": {"a/acc'
    (tmp_path / "metrics.jsonl").write_text(text)
    (row,) = lft.pretext_scores(tmp_path, {"a/accuracy": "max"})
    assert (row["metric"], row["value"], row["trivial"], row["better"]) == ("a/accuracy", 0.7, 0.25, "max")
    assert lft.pretext_scores(tmp_path / "gone", {}) == []


@pytest.fixture(scope="module")
def run(digits_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("run") / "rotation"
    command = ["pretrain", "rotation", "--data", str(digits_folder), "--image-size", str(SIZE), "--out", str(out)]
    assert main([*command, "--epochs", "1", "--no-flip"]) == 0
    return out


def evaluated(run: Path, data: Path, out: Path, *flags: str) -> dict[str, Any]:
    assert main(["evaluate", str(run), "--train", str(data), "--out", str(out), *flags]) == 0
    return json.loads((out / "results.json").read_text())


@pytest.mark.usefixtures("few")
def test_evaluate_label_free(run: Path, digits_folder: Path, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch):
    flags = "--protocol knn --labels-per-class 1 --draws 1".split()
    assert "label_free" not in evaluated(run, digits_folder, tmp_path / "plain", *flags, "--no-controls")
    capsys.readouterr()
    results = evaluated(run, digits_folder, tmp_path / "e", *flags, "--label-free")
    printed = capsys.readouterr().out
    assert {r["arm"] for r in results["summary"]} == {"rotation", "random", "pixels", "patches"}
    rows = results["label_free"]
    by_arm = {arm: {r["score"]: r for r in rows if r["arm"] == arm} for arm in ("rotation", "random")}
    assert len(rows) == sum(r["score"] == "pretext" for r in rows) + 7 + 8
    assert "rotation_probe" not in by_arm["rotation"]  # it was trained to do that
    assert by_arm["rotation"].keys() - {"pretext"} == by_arm["random"].keys() - {"rotation_probe"}
    assert all(r["n_images"] == FEW for r in rows if r["score"] != "pretext")
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    own = {r["metric"]: (r["value"], r["trivial"], r["better"]) for r in rows if r["score"] == "pretext"}
    assert own["rotation/accuracy"] == (last["metrics"]["rotation/accuracy"], 0.25, "max")
    assert "alpha-ReQ" in printed
    assert "rotation/accuracy" in printed
    assert "cost: label-free scores" in printed
    page = (tmp_path / "e" / "report.html").read_text()
    assert "Without labels" in page
    assert "Thilak" in page

    def again(*_: Any, **__: Any) -> Any:
        raise AssertionError("computed twice")

    monkeypatch.setattr(lft, "label_free", again)
    assert evaluated(run, digits_folder, tmp_path / "e", *flags, "--label-free")["label_free"] == rows


@pytest.mark.usefixtures("few")
def test_evaluate_label_free_alone(run: Path, digits_folder: Path, tmp_path: Path, capsys):
    """With labels, but no protocol: the scores of the pool. Without labels: of all images that are given."""
    results = evaluated(run, digits_folder, tmp_path / "alone", "--label-free", "--protocol")
    assert results["rows"] == results["summary"] == results["paired"] == []
    assert {r["arm"] for r in results["label_free"]} == {"rotation", "random"}
    assert not (tmp_path / "alone" / "predictions.npz").exists()
    assert "Scores without labels" in (tmp_path / "alone" / "report.html").read_text()
    flags = "--protocol knn --labels-per-class 1 --draws 1 --no-controls --label-free"
    beside = evaluated(run, digits_folder, tmp_path / "beside", *flags.split())
    assert beside["label_free"] == [r for r in results["label_free"] if r["arm"] == "rotation"]
    flat = tmp_path / "flat"
    flat.mkdir()
    for path in digits_folder.rglob("*.png"):
        shutil.copy(path, flat / f"{path.parent.name}{path.name}")
    capsys.readouterr()
    results = evaluated(run, flat, tmp_path / "flat-out", "--label-free", "--no-controls")
    assert "has no labels" in capsys.readouterr().out
    assert {r["arm"] for r in results["label_free"]} == {"rotation"}
    assert results["provenance"]["data"]["train"]["images"] == 320
    assert main(["evaluate", str(run), "--train", str(flat), "--out", str(tmp_path / "no")]) == 2
    assert "in a class folder" in capsys.readouterr().err
    few = tmp_path / "few"
    few.mkdir()
    shutil.copy(next(flat.iterdir()), few / "one.png")
    assert main(["evaluate", str(run), "--train", str(few), "--out", str(tmp_path / "no"), "--label-free"]) == 2
    assert "two images or more" in capsys.readouterr().err


@pytest.mark.usefixtures("few")
def test_compare_always_has_them(digits_folder: Path, tmp_path: Path):
    command = ["compare", "--data", str(digits_folder), "--train", str(digits_folder), "--image-size", str(SIZE)]
    command += (
        "--tasks denoising --epochs 0.1 --seeds 2 --protocol knn --labels-per-class 1 --draws 1 --no-controls".split()
    )
    assert main([*command, "--out", str(tmp_path / "out")]) == 0
    rows = json.loads((tmp_path / "out" / "results.json").read_text())["label_free"]
    seeds = {(r["arm"], r["seed"]) for r in rows if r["score"] == "rotation_probe"}
    assert seeds == {("denoising", 0), ("denoising", 1)}
    assert len({r["value"] for r in rows if r["score"] == "rankme"}) == 2


# ---------------------------------------------------------------- how they are shown


def shown_rows() -> list[dict[str, Any]]:
    evil = '<b>"x"</b>'
    return [
        {"arm": evil, "seed": 0, "score": "rankme", "value": 40.0, "n_images": 4096, "on": "x"},
        {"arm": evil, "seed": 1, "score": "rankme", "value": 50.0, "n_images": 4096, "on": "x"},
        {"arm": evil, "seed": 0, "score": "pretext", "metric": "t/<i>", "value": 0.75, "trivial": 0.25},
        {"arm": "random", "seed": 0, "score": "rankme", "value": None, "n_images": 4096},
        {"arm": "random", "seed": 0, "score": "jigsaw_probe", "value": 0.083, "n_images": 2048},
        {"arm": "random", "seed": 0, "score": "unheard of", "value": 3.0},
        {"arm": "random"},
    ]


def test_table_has_a_line_per_arm_and_means_over_seeds():
    text = format_label_free({"label_free": shown_rows()})
    lines = {line.split()[0]: line.split()[1:] for line in text.splitlines() if line.strip()}
    assert lines["arm"] == ["RankMe", "jigsaw"]
    assert lines['<b>"x"</b>'] == ["45.0", "-"]
    assert lines["random"] == ["-", "8.3"]
    assert "t/<i> 0.75 (0.25)" in text
    assert text.isascii()
    assert format_label_free({}) == format_label_free({"label_free": []}) == ""


@pytest.mark.parametrize(
    ("probes", "said"),
    [
        (
            {"rotation": 0.4, "inpainting": 0.3, "random": 0.2},
            "rotation would be chosen: jigsaw probe 40.0 % (the next",
        ),
        ({"rotation": 0.3, "jigsaw": None, "inpainting": 0.4}, "inpainting would be chosen"),
        ({"denoising": 0.1, "inpainting": 0.2, "random": 0.2}, "none would be chosen"),
        ({"rotation": 0.3, "jigsaw": None, "random": 0.2}, ""),
        ({"inpainting": 0.3, "random": 0.2, "patches": 0.6}, ""),
    ],
)
def test_which_arm_would_be_chosen(probes: dict[str, float | None], said: str, tmp_path: Path):
    rows = [
        {"arm": arm, "seed": seed, "score": score, "value": value}
        for arm, probe in probes.items()
        for seed in (0, 1)
        for score, value in (("rankme", 9.0), ("jigsaw_probe", probe and round(probe + (-0.01, 0.01)[seed], 2)))
    ]
    results = {"schema": 1, "rows": [], "summary": [], "label_free": rows}
    text = choice(results)
    assert text.startswith(f"Without labels, {said}" if said else "")
    assert bool(text) == bool(said)
    assert text in format_label_free(results)
    assert ("Without a jigsaw probe, and so left out: jigsaw." in text) == ("jigsaw" in probes and bool(said))
    (tmp_path / "results.json").write_text(json.dumps(results))
    assert typeset(text) in write_report(tmp_path).read_text()


def test_a_run_was_trained_for_what_it_began_from_too(tmp_path: Path):
    def write(name: str, task: str, **free: str) -> None:
        (tmp_path / name).mkdir(exist_ok=True)
        about = {"settings": {"tasks": [task]}, "resolved": {}, "fingerprint": "f", "free": free}
        (tmp_path / name / "config.json").write_text(json.dumps(about))

    for name, task, init in (("a", "jigsaw", "c"), ("b", "rotation", "a"), ("c", "denoising", "b")):
        write(name, task, init=str(tmp_path / init))
    assert lft.tasks_before(tmp_path / "c") == ["rotation", "jigsaw"]  # and no further: it is a circle
    (tmp_path / "a" / "config.json").write_text("{")
    assert lft.tasks_before(tmp_path / "c") == ["rotation"]
    write("b", "rotation")
    assert lft.tasks_before(tmp_path / "c") == ["rotation"]
    assert lft.tasks_before(tmp_path / "b") == []


def test_how_far_to_trust_the_choice_is_what_the_studies_found():
    studies = [
        json.loads((ROOT / "results" / f"{name}.json").read_text())["judged"]
        for name in ("label_free", "label_free_cifar10")
    ]
    jigsaw = [{count: study[count]["scores"]["jigsaw_probe"] for count in ("10", "50")} for study in studies]
    a, b = (probe["50"] for probe in jigsaw)
    assert f"rho {a['rho_across']:.2f} and {b['rho_across']:.2f})" in _STUDY
    assert f"its pick was {a['regret']:.1f} and {b['regret']:.1f} points below the best run" in _STUDY
    assert "a random one {:.1f} and {:.1f}".format(*(study["50"]["random_pick"] for study in studies)) in _STUDY
    assert [study["50"]["winner"] for study in studies] == ["rotation_probe", None]
    # Within a task an interval above zero, of both at 10 labels per class, of the first only at 50.
    holds = [[probe[count]["tau_interval"][0] > 0 for probe in jigsaw] for count in ("10", "50")]
    assert holds == [[True, True], [True, False]]


def test_page_shows_them_and_how_to_read_each(tmp_path: Path):
    results = {"schema": 1, "rows": [], "summary": [], "label_free": shown_rows()}
    (tmp_path / "results.json").write_text(json.dumps(results))
    page = write_report(tmp_path).read_text()
    assert '<td class="n">45.0</td>' in page
    assert '<td class="n">8.3</td>' in page
    assert "<i>" not in page
    assert '<b>"x"' not in page
    assert "Garrido" in page
    assert "Reed" not in page
    assert "puts all four" in page
    assert "4,096 images" in page
    (tmp_path / "results.json").write_text(json.dumps({**results, "label_free": 7}))
    assert "Without labels" not in write_report(tmp_path).read_text()
