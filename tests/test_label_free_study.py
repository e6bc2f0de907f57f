"""The study of docs/label-free.md: its statistics against references, and its two commands on a small set."""

from __future__ import annotations

import argparse
import json
from collections import Counter
from functools import partial
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from scipy.stats import kendalltau, rankdata

from scripts import label_free_study as study
from unlabel.backbone import build_backbone, save_backbone

TASKS = np.repeat(list("abcdef"), 8)


def test_the_plan_is_48_runs_and_each_part_of_them_is_balanced():
    runs = list(study.runs())
    assert len({r.name for r in runs}) == len({(r.task, r.flags) for r in runs}) == len({r.seed for r in runs}) == 48
    for part in (runs, runs[:12], runs[:24]):  # it may be stopped early
        for task in study.TASKS:
            own = [r for r in part if r.task == task]
            assert len(own) == len(part) // 6
            assert set(Counter(f for r in own for f in r.flags).values()) == {len(own) // 2}
    for task in study.TASKS:
        flags = Counter(f for r in runs if r.task == task for f in r.flags)
        assert len(flags) == 6
        assert set(flags.values()) == {4}


def test_shares_of_the_runs():
    shares = [[r.name for r in list(study.runs())[study.share(f"{k}/3")]] for k in range(3)]
    assert sorted(name for s in shares for name in s) == sorted(r.name for r in study.runs())
    assert [len(s) for s in shares] == [16, 16, 16]
    for wrong in ("1", "2/2", "-1/2", "a/b", "0/0", "1/2/3", ""):
        with pytest.raises(argparse.ArgumentTypeError, match="K/N"):
            study.share(wrong)


def test_within_tasks_looks_at_no_difference_between_tasks():
    rng = np.random.default_rng(0)
    score = rng.normal(size=48)
    offset = np.repeat(rng.normal(0, 100, 6), 8)
    assert study.within(score, np.exp(score) + 1000 * offset, TASKS) == pytest.approx(1)
    assert study.within(score, offset - score, TASKS) == pytest.approx(-1)
    assert abs(study.across(score, score + offset)) < 0.5
    one = score.copy()
    one[TASKS == "a"] = np.nan  # a probe that was not asked of a task
    truth = score.copy()
    truth[TASKS == "a"] *= -1
    assert study.within(one, truth, TASKS) == pytest.approx(1)
    # Kendall's tau-b by hand, two pairs against one: b after a, c before b.
    three = np.array(["x"] * 3)
    assert study.within(np.array([1.0, 2, 3]), np.array([1.0, 3, 2]), three) == pytest.approx(1 / 3)


def test_tau_is_scipys():
    rng = np.random.default_rng(0)
    for _ in range(20):
        x, y = rng.integers(0, 5, 8), rng.integers(0, 5, 8)  # with ties
        assert study.tau_b(x, y) == pytest.approx(kendalltau(x, y)[0])


def test_p_values_are_those_of_chance_without_a_relation_and_small_with_one():
    rng = np.random.default_rng(0)
    truth = rng.normal(size=48)
    assert study.permutation_p(truth, truth, TASKS, 200) == pytest.approx(1 / 201)
    p = [study.permutation_p(rng.normal(size=48), truth, TASKS, 60, seed=k) for k in range(60)]
    assert 0.35 < np.mean(p) < 0.65
    assert np.mean(np.array(p) < 0.1) < 0.25


def test_holm_by_hand():
    assert study.holm({"a": 0.01, "b": 0.04, "c": 0.03}) == pytest.approx({"a": 0.03, "c": 0.06, "b": 0.06})
    assert study.holm({"a": 0.6, "b": 0.9}) == {"a": 1.0, "b": 1.0}


def test_partial_rho_is_the_correlation_of_what_ranks_leave():
    rng = np.random.default_rng(0)
    z = rng.normal(size=48)
    x, y = z + rng.normal(size=48), z + rng.normal(size=48)
    given = np.c_[np.ones(48), rankdata(z)]
    left = [r - given @ np.linalg.lstsq(given, r, rcond=None)[0] for r in (rankdata(x), rankdata(y))]
    assert study.partial_rho(x, y, z) == pytest.approx(np.corrcoef(*left)[0, 1])


def test_regret():
    truth = np.array([0.5, 0.9, 0.7, 0.6])
    assert study.regret(np.array([0, 1, 0, 0.0]), truth) == 0
    assert study.regret(np.array([0, 0, 3, 0.0]), truth) == pytest.approx(0.2)
    assert study.regret(np.array([5, 0, 5, 0.0]), truth) == pytest.approx(0.9 - 0.6)  # by lot
    assert study.regret(np.array([1, np.nan, 2, 0.0]), truth) == pytest.approx(0.2)  # the best has no score


def test_reliability_of_the_truth():
    rng = np.random.default_rng(0)
    truth = rng.normal(size=(48, 1))
    steady, noisy = (study.reliability(truth + s * rng.normal(size=(48, 50)), TASKS) for s in (0.01, 10))
    assert steady["rho"] > 0.99
    assert steady["tau_within"] > 0.95
    assert noisy["rho"] < 0.7
    assert noisy["rho_whole"] == pytest.approx(2 * noisy["rho"] / (1 + noisy["rho"]))


@pytest.fixture
def one_truth(monkeypatch: pytest.MonkeyPatch) -> None:
    """That with 50 labels alone: half of the time."""
    monkeypatch.setattr(study, "COUNTS", (50,))


def made_up(rng: np.random.Generator, follow: str, sign: int) -> list[dict]:
    """Rows in which one score follows the truth, or its negative, and the others do not."""
    rows = []
    for run in study.runs():
        truth = rng.uniform(0.5, 0.9)
        scores = {name: float(rng.normal()) for name in study.SCORES}
        scores[follow] = sign * truth
        if run.task == "rotation":
            del scores["rotation_probe"]
        accuracy = {str(c): (truth + 0.01 * rng.normal(size=10)).tolist() for c in study.COUNTS}
        picked = {str(m): (truth + rng.normal(size=20) / m).tolist() for m in study.PICKS}
        rows.append({"name": run.name, "task": run.task, "way": run.flags[0], "scores": scores,
                     "accuracy": accuracy, "picked": picked,
                     "images_seen": int(rng.integers(1000, 2000)), "final_loss": float(rng.normal())})  # fmt: skip
    return rows


@pytest.mark.usefixtures("one_truth")
@pytest.mark.parametrize(("follow", "sign"), [("rankme", 1), ("uniformity", -1), ("alignment", -1)])
def test_the_score_that_follows_the_truth_wins(follow: str, sign: int):
    """Lower alignment and uniformity are thought better, and more of the others."""
    found = study.judged(made_up(np.random.default_rng(0), follow, sign), resamples=200)["50"]
    table = found["scores"]
    taus = {name: row["tau_within"] for name, row in table.items()}
    assert max(taus, key=taus.__getitem__) == follow
    assert taus[follow] > 0.9
    assert table[follow]["tau_interval"][0] > 0.8
    assert table[follow]["p_holm"] == pytest.approx(len(study.SCORES) / 201)
    assert table[follow]["regret"] < 1 < found["random_pick"]
    assert found["picked_by_labels"]["20"] < found["picked_by_labels"]["2"]
    assert all(row["p_holm"] > 0.05 for name, row in table.items() if name in study.SCORES and name != follow)
    assert found["winner"] == follow
    assert "rho_across" not in table["pretext"]
    assert "p_holm" not in table["random"]


@pytest.mark.usefixtures("one_truth")
def test_no_winner_without_a_relation_or_with_the_wrong_sign():
    wrong = study.judged(made_up(np.random.default_rng(0), "rankme", -1), resamples=200)["50"]
    assert wrong["scores"]["rankme"]["p_holm"] < 0.05
    assert wrong["winner"] is None
    rows = made_up(np.random.default_rng(0), "rankme", 1)
    for row in rows:
        row["scores"]["rankme"] = 1.0  # says the same of every run
    same = study.judged(rows, resamples=50)["50"]
    assert same["scores"]["rankme"]["p"] == 1.0
    assert same["winner"] is None


@pytest.mark.usefixtures("one_truth")
def test_the_pretext_metric_is_compared_with_runs_that_are_set_alike():
    """It follows the truth among those, and not between one way of setting a task and the other."""
    rows = made_up(np.random.default_rng(0), "rankme", 1)
    for row, run in zip(rows, study.runs(), strict=True):
        row["scores"]["pretext"] = np.mean(row["accuracy"]["50"]) * (1 if run.name.split("-")[1][0] == "0" else 100)
    assert study.judged(rows, resamples=20)["50"]["scores"]["pretext"]["tau_within"] == pytest.approx(1)


def test_a_row_turns_every_score_the_way_that_is_thought_better(tmp_path: Path):
    (tmp_path / "metrics.jsonl").write_text('{"loss": 2.0}\n{"loss": 1.5}\n')
    done = {"images_seen": 7, "steps": 1, "seconds": 1, "backbone_sha256": ""}
    data = {"content": "abc", "images": 14}
    about = {"settings": {}, "resolved": {}, "fingerprint": "", "finished": done, "data": data}
    (tmp_path / "config.json").write_text(json.dumps(about))
    run = next(r for r in study.runs() if r.task == "denoising")

    def score(name: str, value: float | None, **more: object) -> dict:
        return {"arm": "denoising", "score": name, "value": value, **more}

    scores = [score("alpha_req", 0.7), score("rankme", 3.0), score("lidar", None)]
    scores += [score("pretext", 0.2, trivial=0.5, better="min"), score("pretext", 9.0, trivial=1.0, better="max")]
    random = [{**score("alpha_req", 1.2), "arm": "random"}, {**score("rankme", 8.0), "arm": "random"}]
    accuracy = [{"arm": a, "protocol": p, "labels_per_class": c, "accuracy": v} for a, p, c, v in (
        ("denoising", "linear", 10, 0.6), ("denoising", "linear", 50, 0.7), ("denoising", "knn", 50, 0.1),
        ("random", "linear", 10, 0.5), ("denoising", "linear", 10, 0.62))]  # fmt: skip
    row = study.row_of(run, tmp_path, {"label_free": scores + random, "rows": accuracy})
    assert row["scores"] == pytest.approx({"alpha_req": -0.3, "rankme": 3.0, "pretext": 0.3})
    assert row["accuracy"] == {"10": [0.6, 0.62], "50": [0.7]}
    assert row["random"]["scores"] == pytest.approx({"alpha_req": -0.2, "rankme": 8.0})
    assert row["random"]["accuracy"] == {"10": [0.5], "50": []}
    assert (row["images_seen"], row["passes"], row["final_loss"], row["images"]) == (7, 0.5, 1.5, "abc")
    alone = study.row_of(run, tmp_path, {"label_free": scores, "rows": accuracy})
    assert "random" not in alone


def test_few_labels_are_judged_by_the_other_half(digits_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Each label is judged once and by a fit that has not seen it; the draws are the same for every run."""
    fits, drawn = [], []

    class Recorded:
        def __init__(self, **_: object) -> None: ...

        def fit(self, x: np.ndarray, y: np.ndarray) -> Recorded:
            fits.append({tuple(row) for row in x})
            self.y = y
            return self

        def predict(self, x: np.ndarray) -> np.ndarray:
            judged = {tuple(row) for row in x}
            assert not judged & fits[-1]
            drawn.append(judged)
            return self.y

    monkeypatch.setattr(study, "LogisticRegression", Recorded)
    monkeypatch.setattr(study, "PICK_DRAWS", 2)
    save_backbone(build_backbone("small", 16), tmp_path)
    found = study.few_labels(tmp_path, str(digits_folder))
    assert {k: len(v) for k, v in found.items()} == {"2": 2, "10": 2, "20": 2}
    for first, second, judged, also in zip(fits[::2], fits[1::2], drawn[::2], drawn[1::2], strict=True):
        assert judged == second
        assert also == first
    again = list(fits)
    study.few_labels(tmp_path, str(digits_folder))
    assert fits[len(again) :] == again


def test_runs_are_pretrained_and_measured_once(digits_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    everything = list(study.runs())
    some = [r for r in everything if r.name in ("rotation-000", "inpainting-111")]
    for name, value in {"runs": lambda: iter(some), "MINUTES": 0.01, "COUNTS": (2, 5), "DRAWS": 2,
                        "PICK_DRAWS": 4}.items():  # fmt: skip
        monkeypatch.setattr(study, name, value)
    source = str(digits_folder)
    test = tmp_path / "test"
    for path in sorted(digits_folder.rglob("*.png"))[::4]:
        link = test / path.relative_to(digits_folder)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.write_bytes(path.read_bytes())
    args = argparse.Namespace(data=source, train=source, test=str(test), out=tmp_path, share=study.share("1/2"),
                              image_size=16, rows=tmp_path / "rows", flags=["--stem", "timm"])  # fmt: skip
    study.run_all(args)
    assert [p.stem for p in (tmp_path / "rows").glob("*.json")] == ["inpainting-111"]
    args.share = study.share("0/2")
    study.run_all(args)
    rows = {p.stem: json.loads(p.read_text()) for p in (tmp_path / "rows").glob("*.json")}
    assert set(rows) == {"rotation-000", "inpainting-111"}
    for row in rows.values():
        assert {k: len(v) for k, v in row["accuracy"].items()} == {"2": 2, "5": 2}
        assert {k: len(v) for k, v in row["picked"].items()} == {"2": 4, "10": 4, "20": 4}
        assert np.mean(row["picked"]["20"]) > 0.5  # four digits
        assert row["images_seen"] > 0
        assert row["images"] == json.loads((tmp_path / row["name"] / "config.json").read_text())["data"]["content"]
    assert "rotation_probe" not in rows["rotation-000"]["scores"]
    assert "rotation_probe" in rows["rotation-000"]["random"]["scores"]
    assert "random" not in rows["inpainting-111"]
    assert set(rows["inpainting-111"]["scores"]) == set(study.SCORES)

    assert json.loads((tmp_path / "rotation-000" / "backbone.json").read_text())["stem"] == "timm"

    args.flags = []
    with pytest.raises(SystemExit, match="other flags"):
        study.run_all(args)
    args.flags = ["--stem", "timm"]

    class Asked(Exception): ...

    def asked(*words: str) -> None:
        raise Asked(words)

    with monkeypatch.context() as here:  # another run of a way that is measured
        here.setattr(study, "runs", lambda: (r for r in everything if r.name == "rotation-011"))
        here.setattr(study, "command", asked)
        with pytest.raises(Asked, match=f"'--epochs', '{rows['rotation-000']['passes']!r}'"):
            study.run_all(args)

    monkeypatch.setattr(study, "command", lambda *_: pytest.fail("what is measured is not run again"))
    args.share = study.share("0/1")
    study.run_all(args)


def test_runs_that_are_set_alike_see_as_many_images():
    all_runs = {r.name: r for r in study.runs()}
    timed = ["--minutes", str(study.MINUTES)]
    # The first of each way comes before all others, so that these twelve have the minutes, and nothing else has.
    known: list[dict] = []
    for k, run in enumerate(all_runs.values()):
        until = study.budget(run, known)
        assert (until == timed) == (k < 12)
        known.append({"task": run.task, "way": run.flags[0], "passes": 0.1 + k if k < 12 else float(until[1])})
    given = {r.name: row["passes"] for r, row in zip(all_runs.values(), known, strict=True)}
    for task in study.TASKS:
        assert given[f"{task}-011"] == given[f"{task}-000"] != given[f"{task}-111"] == given[f"{task}-100"]
    older = [{"task": "rotation", "way": all_runs["rotation-000"].flags[0]}]  # rows of before do not say
    assert study.budget(all_runs["rotation-011"], older) == timed


def test_words_that_judging_does_not_know(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr("sys.argv", ["study", "judge", "--rows", str(tmp_path), "--stem", "half"])
    with pytest.raises(SystemExit):
        study.main()
    assert "unknown: --stem half" in capsys.readouterr().err
    monkeypatch.setattr("sys.argv", ["study", "judge", "--rows", str(tmp_path)])
    with pytest.raises(SystemExit, match="48 of 48 runs"):
        study.main()


@pytest.mark.usefixtures("one_truth")
def test_what_judging_leaves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    rows = made_up(np.random.default_rng(0), "lidar", 1)
    rows[0]["random"] = {"scores": {"lidar": 0.5}, "accuracy": {str(c): [0.25] for c in study.COUNTS}}
    (tmp_path / "rows").mkdir()
    for row in rows[1:]:
        (tmp_path / "rows" / f"{row['name']}.json").write_text(json.dumps(row))
    args = argparse.Namespace(rows=tmp_path / "rows")
    with pytest.raises(SystemExit, match="1 of 48"):
        study.judge(args)
    (tmp_path / "rows" / f"{rows[0]['name']}.json").write_text(json.dumps(rows[0]))
    monkeypatch.setattr(study, "judged", partial(study.judged, resamples=200))
    study.judge(args)
    printed = capsys.readouterr().out
    assert "winner: lidar" in printed
    assert "random weights: 25.0 % (lidar 0.5)" in printed
    assert json.loads((tmp_path / "rows.json").read_text())["judged"]["50"]["winner"] == "lidar"
    root = ElementTree.fromstring((tmp_path / "rows.svg").read_text())
    panels = {p.attrib["aria-label"].split(":")[0]: p for p in root.iter() if p.attrib.get("class") == "panel"}
    assert list(panels) == [f"% right with 50 labels, {name}" for name in study.SCORES if name != "pretext"]
    named = {name: [t.text or "" for t in p.iter() if t.tag.endswith("title")] for name, p in panels.items()}
    assert sorted(named["% right with 50 labels, lidar"]) == sorted([*(r["name"] for r in rows), "random: 25.0 %"])
    assert len(named["% right with 50 labels, rotation_probe"]) == 40  # not asked of rotation
