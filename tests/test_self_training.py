from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from downstream import cost
from downstream import evaluate as ev
from downstream import finetune as ft
from downstream import self_training as st
from downstream.classifier import load_classifier
from unlabel.backbone import build_backbone
from unlabel.cli import main


def test_names_are_balanced():
    """Each class has its share of the images, each image sums to one, and no image's order of odds is turned round."""
    rng = np.random.default_rng(0)
    log_p = rng.normal(0, 1, (400, 3)) + np.array([2.0, 0.0, -1.0])  # a network that prefers the first class
    log_p -= np.logaddexp.reduce(log_p, axis=1, keepdims=True)
    share = np.array([0.5, 0.3, 0.2])
    p = st.balanced(log_p, share)
    assert np.allclose(p.sum(1), 1)
    assert np.allclose(p.mean(0), share, atol=1e-4)
    # What is fitted is one factor per class: the odds of two classes change by the same factor in each image.
    factor = np.log(p) - log_p
    factor -= factor[:, :1]
    assert np.allclose(factor, factor[0], atol=1e-8)
    assert np.allclose(st.balanced(log_p + rng.normal(size=(400, 1)), share), p)  # unnormalised log-odds will do
    even = np.log(np.tile([[0.9, 0.1], [0.1, 0.9]], (5, 1)))
    assert np.allclose(st.balanced(even, np.array([0.5, 0.5])), np.exp(even))  # nothing to balance


def test_labels_stand_as_they_are_and_their_shares_are_the_names():
    y, log_p = np.array([0, 0, 0, 1]), np.log(np.full((8, 2), 0.5))
    names = st.joined_names(y, log_p)
    assert names.dtype == np.float32
    assert names[:4].tolist() == [[1, 0], [1, 0], [1, 0], [0, 1]]
    assert np.allclose(names[4:], [0.75, 0.25])


def test_two_sources_as_one():
    rng = np.random.default_rng(0)
    first, second = (rng.integers(0, 256, (n, 8, 8, 3), dtype=np.uint8) for n in (3, 5))
    joined = st.Joined(first, second)
    assert len(joined) == 8
    rows = np.array([7, 0, 3, 2, 2])
    assert np.array_equal(joined[rows], np.concatenate([first, second])[rows])
    assert np.array_equal(joined[np.array([4])], second[1:2])
    grey = np.full((2, 12, 12, 3), 90, np.uint8)
    assert np.array_equal(st.Joined(first, grey)[np.array([1, 4])], np.stack([first[1], np.full((8, 8, 3), 90)]))


def shades(n: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    y = np.arange(n) % 2
    images = np.where(y[:, None, None, None] == 1, 170, 80) + rng.integers(-40, 40, (n, 32, 32, 3))
    return images.astype(np.uint8), y


def a_table(tmp_path: Path, protocols: tuple[str, ...]) -> ev.Table:
    """One labelled image of each class, which show nothing, and unlabelled ones, which do."""
    pixels, y = shades(40)
    blank = np.full((2, 32, 32, 3), 125, np.uint8)
    names = [str(k) for k in range(42)]
    pool = ev.Images(blank, np.arange(2), names[:2], names[:2], np.arange(2))
    test = ev.Images(pixels, y, names[2:], names[2:], np.arange(2, 42))
    return ev.Table(pool, test, shades(64, seed=1)[0], ["dark", "light"], (1,), 1, protocols, ("small", "auto"), 32,
                    torch.device("cpu"), tmp_path)  # fmt: skip


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch):
    for name in ("STUDENT", "SCRATCH_STUDENT"):
        preset = dataclasses.replace(getattr(st, name), steps=30, batch_size=16, lr=3e-3)
        monkeypatch.setattr(st, name, preset)
    monkeypatch.setattr(ft, "_SCRATCH_FEW", (dataclasses.replace(ft._SCRATCH_FEW[0], steps=2),))
    monkeypatch.setattr(ft, "SCRATCH_GROWTH", ft.Growth(passes=0, steps=0, at_least=0))
    return monkeypatch


@pytest.mark.parametrize("turned", [False, True])
def test_the_student_learns_the_names_that_it_is_given(tmp_path: Path, short: pytest.MonkeyPatch, turned: bool):
    """The labelled images show nothing, so that what it knows it has from the names; turned round, it is all wrong."""
    table = a_table(tmp_path, ("self-training",))
    y = shades(64, seed=1)[1]
    said = np.log(np.eye(2)[1 - y if turned else y] * 0.8 + 0.1)
    short.setattr(ev.ArmFiller, "_teacher", lambda self, model, about: ev.Teacher(said, about))
    rows, predictions = ev.fill(table, [ev.Arm("scratch", "scratch")], None)
    right = (predictions["scratch", "self-training", 1, None] == table.test.y).mean()
    assert right > 0.95 if not turned else right < 0.05
    assert rows[0]["steps"] == 2 + 30
    assert rows[0]["chosen"]["preset"] == "scratch-student"
    assert rows[0]["chosen"]["unlabelled"] == 64
    assert rows[0]["chosen"]["teacher"]["preset"] == "scratch"


def test_the_teacher_is_the_fine_tuned_network(tmp_path: Path, short: pytest.MonkeyPatch):
    """Fitted once for both protocols; alone, the same student comes of it, and is the classifier to keep."""
    fits = []
    real = ft.finetune
    short.setattr(ft, "finetune", lambda *a, **k: (fits.append(1), real(*a, **k))[1])
    arm, found = ev.Arm("scratch", "scratch"), []
    for name, protocols in (("both", ("finetune", "self-training")), ("alone", ("self-training",))):
        table = a_table(tmp_path / name, protocols)
        _, predictions = ev.fill(table, [arm], "scratch")
        found.append(predictions["scratch", "self-training", 1, None])
        model, _ = load_classifier(table.out)
        kept = ft.predict_logits(model, table.test.pixels).argmax(1)
        assert np.array_equal(kept, predictions["scratch", protocols[0], 1, None][0, 0])
    assert len(fits) == 2
    assert np.array_equal(*found)
    # Stored: nothing is fitted again, and other unlabelled images are another cell, for scratch too.
    table = a_table(tmp_path / "both", ("finetune", "self-training"))
    ev.fill(table, [arm], None)
    assert len(fits) == 2
    ev.fill(dataclasses.replace(table, unlabelled_id="others"), [arm], None)
    assert len(fits) == 3


def test_test_images_change_nothing_that_is_learned(tmp_path: Path, short: pytest.MonkeyPatch):
    found = []
    for k in range(2):
        table = a_table(tmp_path / str(k), ("self-training",))
        other = dataclasses.replace(table.test, pixels=shades(40, seed=5 + k)[0])
        ev.fill(dataclasses.replace(table, test=other), [ev.Arm("scratch", "scratch")], "scratch")
        found.append((table.out / "classifier.safetensors").read_bytes())
    assert found[0] == found[1]


def test_what_it_costs_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Each view by what a step costs at its own size."""
    table, arms = a_table(tmp_path, ("self-training",)), [ev.Arm("scratch", "scratch")]
    first, second = ft.presets_for(1, True)[0], st.SCRATCH_STUDENT
    assert (first.larger, second.larger) == (True, False)
    large, small = first.steps * 2, second.steps * second.batch_size
    monkeypatch.setattr(cost, "_measured", lambda _: (6.0, {False: 60.0, True: 600.0}, 8, 4))
    cost.print_cost(table, arms)
    naming = 2 * len(table.unlabelled)  # and mirrored, a minute each at the larger size
    told = f"fine-tuning passes {large + small:,} images, about {small + 10 * large + naming:.1f} minutes"
    assert told in capsys.readouterr().out
    monkeypatch.undo()
    cost.print_cost(table, arms)
    assert f"fine-tuning passes {large + small:,} images" in capsys.readouterr().out


def test_more_labels_more_steps_and_scratch_no_fewer():
    assert st.student_for(500, False) == st.STUDENT
    assert st.student_for(500, True) == st.SCRATCH_STUDENT
    for labels in (20, 3_000, 20_000):
        tuned, scratch = st.student_for(labels, False), st.student_for(labels, True)
        assert scratch.steps * scratch.batch_size >= tuned.steps * tuned.batch_size
        for student, teacher in ((tuned, ft.presets_for(250, False, None, labels)[0]),
                                 (scratch, ft.presets_for(250, True, None, labels)[0])):  # fmt: skip
            assert student.steps * student.batch_size >= teacher.steps * teacher.batch_size
    assert st.student_for(100, False, top_layers=1).top_layers == 1
    assert st.student_for(100, True, top_layers=1).top_layers is None


def test_soft_labels_are_the_same_as_hard_ones():
    images, y = shades(16)
    start = build_backbone("small", 32).eval()
    preset = ft.Preset("short", 3, 1e-3, batch_size=8)
    a, b = (
        ft.train(start, None, images, labels, 2, preset, 0, torch.device("cpu"), None)
        for labels in (y, np.eye(2, dtype=np.float32)[y])
    )
    assert torch.allclose(a.head.weight, b.head.weight, atol=1e-6)


def test_the_command(digits_folder: Path, tmp_path: Path, short: pytest.MonkeyPatch, short_presets):
    """Its rows and comparisons are beside those of fine-tuning; the answer stays about fine-tuning."""
    source, run = str(digits_folder), tmp_path / "run"
    pretrain = ["pretrain", "rotation", "--data", source, "--image-size", "16", "--epochs", "0.1", "--out", str(run)]
    assert main(pretrain) == 0
    command = ["evaluate", str(run), "--train", source, "--labels-per-class", "5", "--draws", "2", "--protocol"]
    assert main([*command, "finetune", "self-training"]) == 0
    results = json.loads((run / "evaluation" / "results.json").read_text())
    cells = {(r["arm"], r["protocol"]) for r in results["rows"]}
    assert cells == {(a, p) for a in ("rotation", "scratch") for p in ("finetune", "self-training")}
    assert len(results["rows"]) == 8
    paired = {(r["arm"], r["versus"], r["protocol"], r.get("versus_protocol")): r for r in results["paired"]}
    assert {key: r["primary"] for key, r in paired.items()} == {
        ("rotation", "scratch", "finetune", None): True,
        ("rotation", "scratch", "self-training", None): False,
        ("rotation", "rotation", "self-training", "finetune"): False,
        ("scratch", "scratch", "self-training", "finetune"): False,
    }
    means = {(r["arm"], r["protocol"]): r["mean"] for r in results["summary"]}
    gain = paired["rotation", "rotation", "self-training", "finetune"]["difference"]
    assert gain == pytest.approx(means["rotation", "self-training"] - means["rotation", "finetune"])
    page = (run / "evaluation" / "report.html").read_text()
    assert "self-training, against fine-tuning of the same arm (exploratory)" in page
    assert main([*command, "self-training", "--out", str(tmp_path / "alone")]) == 0
    alone = json.loads((tmp_path / "alone" / "results.json").read_text())
    assert [r["primary"] for r in alone["paired"]] == [True]
    known = {(r["arm"], r["draw"]): r["accuracy"] for r in results["rows"] if r["protocol"] == "self-training"}
    assert {(r["arm"], r["draw"]): r["accuracy"] for r in alone["rows"]} == known
