"""The few-label table end to end on real digits, and the protocol's promises."""

from __future__ import annotations

import csv
import dataclasses
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from downstream import evaluate as ev
from downstream import finetune as ft
from downstream import label_free as lf
from downstream.arms import finished_runs
from downstream.classifier import load_classifier
from downstream.split import split_data
from unlabel import compare
from unlabel.augment import clean
from unlabel.backbone import Backbone, build_backbone, load_backbone, save_backbone
from unlabel.cache import load_cache
from unlabel.checkpoint import file_sha256
from unlabel.cli import main
from unlabel.compare import label_counts
from unlabel.config import EvaluateConfig
from unlabel.errors import UserError
from unlabel.sources import open_source


@pytest.fixture(scope="module")
def short_presets(short_presets: pytest.MonkeyPatch):
    short_presets.setattr(lf, "IMAGES", 40)


@pytest.fixture(scope="module")
def compared(digits_folder: Path, tmp_path_factory: pytest.TempPathFactory, short_presets) -> Path:
    out = tmp_path_factory.mktemp("compare") / "out"
    assert main(compare_command(digits_folder, out)) == 0
    return out


def compare_command(data: Path, out: Path) -> list[str]:
    flags = "--image-size 16 --tasks rotation denoising --epochs 0.3 --labels-per-class 1 5 25 --draws 2"
    sources = ["--data", str(data), "--train", str(data), "--out", str(out)]
    return ["compare", *sources, *flags.split(), "--denoising.noise", "masking"]


def test_results_follow_the_schema(compared: Path):
    results = json.loads((compared / "results.json").read_text())
    assert results["schema"] == 1
    arms = {"rotation", "denoising", "random", "pixels", "patches", "scratch"}
    where = {"linear": arms - {"scratch"}, "knn": arms - {"scratch"}, "finetune": {"rotation", "denoising", "scratch"}}
    cells = [(r["arm"], r["protocol"], r["labels_per_class"]) for r in results["summary"]]
    assert len(cells) == len(set(cells))
    assert set(cells) == {(a, p, c) for p, found in where.items() for a in found for c in (1, 5, 25)}
    for row in results["rows"]:
        assert {
            "arm",
            "protocol",
            "labels_per_class",
            "draw",
            "seed",
            "accuracy",
            "chosen",
            "on_grid_edge",
        } <= row.keys()
        assert {"steps", "seconds"} <= row.keys()
    assert len(results["rows"]) == 2 * len(cells)
    for line in results["summary"]:
        mine = [
            r["accuracy"]
            for r in results["rows"]
            if all(r[k] == line[k] for k in ("arm", "protocol", "labels_per_class"))
        ]
        assert line["mean"] == pytest.approx(np.mean(mine))
        assert line["ci_low"] <= line["mean"] <= line["ci_high"]
        assert (line["n_draws"], line["n_seeds"], line["unit"]) == (2, 1, "draw")
    stages = {(r["arm"], r["stage"]) for r in results["stages"]}
    assert stages == {(a, s) for a in ("rotation", "denoising", "random") for s in ("s1", "s2", "s4", "s8")}
    saved = {(r["arm"], r["protocol"], r["labels_per_class"], *r["measured"]) for r in results["label_efficiency"]}
    assert saved == {(a, "finetune", c, 1.0, 25.0) for a in ("rotation", "denoising") for c in (1, 5, 25)}
    expected = {(a, "linear", 25, n) for a in ("rotation", "denoising") for n in (50, 100)}
    assert {(r["arm"], r["protocol"], r["from"], r["labels_per_class"]) for r in results["forecast"]} == expected
    assert all(r["low"] <= r["mean"] <= r["high"] for r in results["forecast"])
    page = (compared / "report.html").read_text()
    assert "Labels saved" in page
    assert "More labels?" in page
    primary = [p for p in results["paired"] if p["primary"]]
    assert [(p["arm"], p["versus"], p["protocol"], p["labels_per_class"]) for p in primary] == [
        ("rotation", "scratch", "finetune", 5)
    ]
    assert results["provenance"]["overlap"] == {"test_in_pretraining": 0}
    left_out = results["provenance"]["left_out_of_pretraining"]
    splits = json.loads((compared / "splits.json").read_text())
    tested = set(splits["test"]["hashes"])
    assert left_out == len(tested) > 0  # the data is its own training source
    run = compared / "runs" / "rotation-seed0"
    assert set((run / "excluded.txt").read_text().split()) == tested
    assert json.loads((run / "config.json").read_text())["data"]["images"] == 320 - left_out
    assert json.loads((compared / "runs/denoising-seed0/config.json").read_text())["settings"]["task_settings"] == {
        "denoising": {"noise": "masking"}
    }


def test_the_report_shows_the_images(compared: Path):
    """A map of the features, the surest hits and misses of the stored classifier, as predict would name them."""
    pictures = json.loads((compared / "results.json").read_text())["pictures"]
    assert pictures["arm"] == "rotation"
    assert pictures["map"]["classes"] == ["0", "1", "2", "3"]
    assert (compared / "pictures" / "map.png").exists()
    page = (compared / "report.html").read_text()
    model, classes = load_classifier(compared)
    splits = json.loads((compared / "splits.json").read_text())["test"]
    for key, words in (("hits", "surest and right"), ("misses", "surest and wrong")):
        rows = pictures.get(key, [])
        assert (words in page) == bool(rows)
        assert [r["p"] for r in rows] == sorted((r["p"] for r in rows), reverse=True)
        for row in rows:
            assert (row["is"] == row["said"]) == (key == "hits")
            assert splits["labels"][splits["names"].index(row["name"])] == row["is"]
            assert row["said"] in classes
    assert pictures.get("hits") or pictures.get("misses")
    assert model.backbone.spec.image_size == 16


def test_without_augmentation_labelled_images_are_seen_as_they_are(digits_folder: Path, tmp_path: Path, monkeypatch):
    seen: list[torch.Tensor] = []
    real = ft.Classifier.forward
    monkeypatch.setattr(ft.Classifier, "forward", lambda self, x: (seen.append(x.detach()), real(self, x))[1])
    images = load_cache(open_source(str(digits_folder)), 32, progress=False)
    pixels, y = np.array(images.images[::8]), np.array([int(v) for v in images.labels or ()])[::8]
    for augment in (True, False):
        seen.clear()
        preset = ft.Preset("short", 3, 1e-3, batch_size=8)
        ft.finetune(build_backbone("small", 32), pixels, y, 4, [preset], augment=augment)
        known = {x.tobytes() for x in (pixels.transpose(0, 3, 1, 2))}
        views = [(v * 255).round().byte().numpy().tobytes() for batch in seen for v in batch]
        assert all(v in known for v in views) == (not augment)


def test_predictions_and_splits_let_others_test_again(compared: Path):
    results = json.loads((compared / "results.json").read_text())
    split = json.loads((compared / "splits.json").read_text())
    with np.load(compared / "predictions.npz") as stored:
        hits = stored["rotation|linear|5"]
        assert hits.shape == (1, 2, len(split["test"]["names"]))
        rows = [
            r for r in results["rows"] if (r["arm"], r["protocol"], r["labels_per_class"]) == ("rotation", "linear", 5)
        ]
        assert hits.mean(2)[0] == pytest.approx([r["accuracy"] for r in rows])
    assert not set(split["test"]["clusters"]) & set(split["pool"]["clusters"])
    assert not set(split["test"]["hashes"]) & set(split["pool"]["hashes"])
    share = len(split["test"]["names"]) / (len(split["test"]["names"]) + len(split["pool"]["names"]))
    assert 0.15 < share < 0.25
    five, one = split["draws"]["5"], split["draws"]["1"]
    assert all(set(a) <= set(b) for a, b in zip(one, five, strict=True))
    assert not set(five[0]) & set(five[1])


def test_again_does_nothing_twice(compared: Path, digits_folder: Path, capsys: pytest.CaptureFixture[str]):
    cells = {p: p.stat().st_mtime_ns for p in (compared / "cells").iterdir()}
    before = json.loads((compared / "results.json").read_text())
    assert main(compare_command(digits_folder, compared)) == 0
    assert "finished and verified" in capsys.readouterr().out
    assert {p: p.stat().st_mtime_ns for p in (compared / "cells").iterdir()} == cells
    after = json.loads((compared / "results.json").read_text())
    assert {k: v for k, v in before.items() if k != "provenance"} == {
        k: v for k, v in after.items() if k != "provenance"
    }


def test_evaluate_predict_embed_export_report(compared: Path, digits_folder: Path, tmp_path: Path):
    run = compared / "runs" / "rotation-seed0"
    rows = [(p.relative_to(digits_folder).as_posix(), "even" if int(p.parent.name) % 2 == 0 else "odd")
            for p in sorted(digits_folder.rglob("*.png"))]  # fmt: skip
    table = tmp_path / "labels.csv"
    with table.open("w", newline="") as file:
        csv.writer(file).writerows([("name", "label"), *rows])
    flags = ["--labels", str(table), *"--protocol linear --labels-per-class 5 all --draws 2 --no-controls".split()]
    assert main(["evaluate", str(run), "--train", str(digits_folder), *flags, "--out", str(tmp_path / "e")]) == 0
    results = json.loads((tmp_path / "e" / "results.json").read_text())
    assert [(r["arm"], r["labels_per_class"], r["n_draws"]) for r in results["summary"]] == [
        ("rotation", 5, 2), ("rotation", "all", 1)
    ]  # fmt: skip
    assert results["provenance"]["data"]["train"]["classes"] == ["even", "odd"]
    assert main(["predict", str(compared), "--data", str(digits_folder), "--out", str(tmp_path / "p.csv")]) == 0
    with (tmp_path / "p.csv").open() as file:
        predicted = list(csv.reader(file))
    assert predicted[0] == ["name", "class", "p_0", "p_1", "p_2", "p_3"]
    assert len(predicted) == 321
    assert sum(map(float, predicted[1][2:])) == pytest.approx(1, abs=1e-4)
    assert main(["embed", str(run), "--data", str(digits_folder), "--out", str(tmp_path / "f.npz")]) == 0
    assert main(["embed", str(run), "--data", str(digits_folder), "--out", str(tmp_path / "f.csv")]) == 0
    with np.load(tmp_path / "f.npz") as stored, (tmp_path / "f.csv").open() as file:
        lines = list(csv.reader(file))
        assert stored["features"].shape == (320, 256)
        assert [r[0] for r in lines[1:]] == stored["names"].tolist()
        assert np.allclose(np.array([r[1:] for r in lines[1:]], float), stored["features"], rtol=1e-4, atol=1e-5)
    assert main(["export", str(run), "--to", str(tmp_path / "b.safetensors")]) == 0
    assert (tmp_path / "b.safetensors").read_bytes() == (run / "backbone.safetensors").read_bytes()
    own, exported = load_backbone(run).state_dict(), load_backbone(tmp_path / "b.safetensors").state_dict()
    assert all(torch.equal(own[k], exported[k]) for k in own)
    (tmp_path / "c.json").write_text('{"of": "somebody"}')
    assert main(["export", str(run), "--to", str(tmp_path / "c.safetensors")]) == 2
    assert (tmp_path / "c.json").read_text() == '{"of": "somebody"}'
    (compared / "report.html").unlink()
    assert main(["report", str(compared)]) == 0
    assert "rotation" in (compared / "report.html").read_text()


def table_of(digits_folder: Path, run: Path, out: Path, y_test=None, y_pool=None) -> tuple[ev.Table, ev.Arm]:
    split = split_data(EvaluateConfig(run=run, train=str(digits_folder)), 16, None)
    test = split.test if y_test is None else dataclasses.replace(split.test, y=y_test(split.test.y))
    pool = split.pool if y_pool is None else dataclasses.replace(split.pool, y=y_pool(split.pool.y))
    table = ev.Table(pool, test, split.unlabelled.images, split.classes, (5, 25), 2, ("linear", "knn", "finetune"),
                     ("small", "auto"), 16, torch.device("cpu"), out)  # fmt: skip
    return table, ev.Arm("rotation", "backbone", (0,), (run,))


def test_permuted_test_labels_change_no_choice(compared: Path, digits_folder: Path, tmp_path: Path, short_presets):
    run = compared / "runs" / "rotation-seed0"
    found = []
    for k, shuffle in enumerate((None, np.random.default_rng(0).permutation)):
        table, arm = table_of(digits_folder, run, tmp_path / str(k), y_test=shuffle)
        rows, predictions = ev.fill(table, [arm], None)
        found.append(([{**r, "seconds": 0} for r in rows], predictions))
    (rows_a, predictions_a), (rows_b, predictions_b) = found
    assert rows_a == rows_b
    assert all(np.array_equal(predictions_a[k], predictions_b[k]) for k in predictions_a)


def test_permuted_training_labels_give_chance(compared: Path, digits_folder: Path, tmp_path: Path):
    rng = np.random.default_rng(1)
    accuracies = []
    for k, shuffle in enumerate((lambda y: y, rng.permutation)):
        run = compared / "runs" / "rotation-seed0"
        table, arm = table_of(digits_folder, run, tmp_path / str(k), y_pool=shuffle)
        table = dataclasses.replace(table, protocols=("linear", "knn"), counts=(25,))
        _, predictions = ev.fill(table, [arm], None)
        hits = [p == table.test.y for (_, _, _, stage), p in predictions.items() if stage is None]
        accuracies.append(np.mean(hits))
    assert accuracies[0] > 0.8
    assert abs(accuracies[1] - 0.25) < 0.12  # four classes, 64 test images, 2 draws, 2 protocols


def test_permuted_training_labels_give_chance_when_fine_tuned(compared: Path, digits_folder: Path, tmp_path: Path):
    rng, accuracies = np.random.default_rng(1), []
    for k, shuffle in enumerate((lambda y: y, rng.permutation)):
        table, arm = table_of(digits_folder, compared / "runs" / "rotation-seed0", tmp_path / str(k), y_pool=shuffle)
        table = dataclasses.replace(table, protocols=("finetune",), counts=(25,))
        _, predictions = ev.fill(table, [arm, ev.Arm("scratch", "scratch")], None)
        accuracies.append([np.mean(p == table.test.y) for p in predictions.values()])
    assert accuracies[0][0] > 0.8
    assert np.abs(np.array(accuracies[1]) - 0.25).max() < 0.15  # four classes, 64 test images, 2 draws


def test_evaluate_reports_overlap_and_broken_labelled_images(digits_folder: Path, tmp_path: Path, capsys):
    """A run that has seen every image: the table says so, on the screen and in the file."""
    data = tmp_path / "data"
    shutil.copytree(digits_folder, data)
    (data / "0" / "broken.png").write_bytes(b"no image")
    run = tmp_path / "run"
    assert (
        main(["pretrain", "rotation", "--data", str(data), "--image-size", "16", "--epochs", "0.1", "--out", str(run)])
        == 0
    )
    command = ["evaluate", str(run), "--train", str(data), "--protocol", "knn", "--labels-per-class", "5"]
    evaluate = [*command, "--draws", "1", "--no-controls"]
    assert main(evaluate) == 0
    printed = capsys.readouterr().out
    out = run / "evaluation"
    results = json.loads((out / "results.json").read_text())
    n = len(json.loads((out / "splits.json").read_text())["test"]["hashes"])
    assert results["provenance"]["overlap"] == {"test_in_pretraining": n}
    assert f"{n} test images have a near-duplicate" in printed
    assert "1 labelled images cannot be read" in printed
    assert (out / "skipped.txt").read_text().startswith("0/broken.png\t")
    assert re.search(r"cost: features of [\d,]+ images, about [\d.]+ minutes, then 1 fits", printed)
    assert "No test image was among" not in (out / "report.html").read_text()
    # The same for a run that `compare` is given, beside one of its own that sees no test image.
    command = ["compare", "--data", str(data), "--train", str(data), "--image-size", "16", "--tasks", "denoising"]
    command += ["--epochs", "0.1", "--also", str(run), "--protocol", "knn", "--labels-per-class", "5", "--draws", "1"]
    assert main([*command, "--no-controls", "--out", str(tmp_path / "compare")]) == 0
    provenance = json.loads((tmp_path / "compare" / "results.json").read_text())["provenance"]
    assert provenance["overlap"] == {"test_in_pretraining": n}
    assert provenance["left_out_of_pretraining"] == n
    (data / "0" / "broken.png").unlink()
    assert main(evaluate) == 0
    assert (out / "skipped.txt").read_text() == ""  # not of before the repair


def test_three_seeds_are_the_unit_of_the_interval(digits_folder: Path, tmp_path: Path):
    out = tmp_path / "out"
    command = [
        "compare",
        "--data",
        str(digits_folder),
        "--train",
        str(digits_folder),
        "--out",
        str(out),
        "--seeds",
        "3",
    ]
    command += ["--tasks", "rotation+denoising", "--image-size", "16", "--epochs", "0.1", "--draws", "2"]
    assert main([*command, "--labels-per-class", "5", "--protocol", "knn", "--no-controls"]) == 0
    results = json.loads((out / "results.json").read_text())
    lines = {line["arm"]: line for line in results["summary"]}
    assert set(lines) == {"rotation+denoising"}
    task = lines["rotation+denoising"]
    assert (task["unit"], task["n_seeds"], task["n_draws"]) == ("seed", 3, 2)
    hashes = {file_sha256(out / "runs" / f"rotation+denoising-seed{k}" / "backbone.safetensors") for k in range(3)}
    assert len(hashes) == 3
    assert len([r for r in results["rows"] if r["arm"] == "rotation+denoising"]) == 6


def test_the_stem_is_the_tasks_and_the_controls(digits_folder: Path, tmp_path: Path, monkeypatch):
    asked, tables = [], []
    monkeypatch.setattr(compare, "pretrain", lambda config, exclude: asked.append(config))
    monkeypatch.setattr(compare, "_fill_and_report", lambda table, *rest: tables.append(table) or tmp_path)
    command = ["compare", "--data", str(digits_folder), "--train", str(digits_folder), "--out", str(tmp_path / "out")]
    assert main([*command, "--image-size", "16", "--tasks", "rotation", "denoising", "--stem", "half"]) == 0
    assert [c.stem for c in asked] == ["half", "half"]
    assert [t.backbone for t in tables] == [("small", "half")]


def test_given_test_set_loses_its_duplicates_from_the_pool(digits_folder: Path, tmp_path: Path):
    cache = load_cache(open_source(str(digits_folder)), 32)
    for k in range(0, 320, 8):
        source, target = digits_folder / cache.names[k], tmp_path / "test" / cache.names[k]
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(source.read_bytes())
    config = EvaluateConfig(run=tmp_path, train=str(digits_folder), test=str(tmp_path / "test"))
    split = split_data(config, 32, cache)
    assert len(split.test) == 40
    assert len(split.pool) <= 280
    assert not set(split.test.clusters) & set(split.pool.clusters)
    assert len(split.pretraining_leaks) >= 40
    assert "near-duplicates" in split.warnings[0]


def test_errors_of_the_command_line(compared: Path, digits_folder: Path, tmp_path: Path, capsys):
    data, run, out = str(digits_folder), str(compared / "runs/rotation-seed0"), str(tmp_path / "o")
    (tmp_path / "empty").mkdir()
    other = tmp_path / "other"
    for name in ("0", "zebra"):
        (other / name).mkdir(parents=True)
        for p in sorted((digits_folder / "0").iterdir())[:3]:
            (other / name / p.name).write_bytes(p.read_bytes())
    cases = [
        (["pretrain", "nonesuch", "--data", data, "--out", out], "unknown pretext task"),
        (["pretrain", "--data", data, "--out", out], "at least one pretext task"),
        (["pretrain", "rotation", "--data", str(tmp_path / "empty"), "--out", out], "no "),
        (["pretrain", "rotation", "--data", str(tmp_path / "gone"), "--out", out], "gone"),
        (["pretrain", "rotation", "--data", data, "--out", out, "--denoising.noise", "x"], "not among the tasks"),
        (["frobnicate"], "unknown command"),
        (["pretrain", "rotation", "--data", data, "--out", ""], "an argument is empty"),
        (["check", "{0..9999999999}.tar"], "more than 100,000 archives"),
        (["check", "{0..99999}{0..99999}.tar"], "more than 100,000 archives"),
        # Said before any image is looked at: the folder does not exist either.
        *(
            (["evaluate", run, "--train", str(tmp_path / "gone"), *flags.split(), "--out", out], message)
            for flags, message in [
                ("--labels-per-class ²", "whole numbers"),
                ("--labels-per-class 0", "whole numbers"),
                ("--labels-per-class five", "whole numbers"),
                ("--labels-per-class", "want a value"),
                ("--protocol", "want a value"),
                ("--draws 1000000000", "--draws"),
                ("--top-layers 0", "--top-layers"),
            ]
        ),
        (["evaluate", run, "--train", data, "--out", f"{data}/evaluation"], "lies inside"),
        (["compare", "--data", data, "--train", data, "--out", data], "lies inside"),
        (["export", run, "--to", f"{run}/x.safetensors"], "is a run folder"),
        (["pretrain", "rotation", "--data", data], "Missing from unlabel pretrain: --out"),
        (["pretrain", "rotation", "--data", data, "--out", out, "--image-sise", "3"], "perhaps you meant --image-size"),
        (["pretrain", "rotation", "--data", data, "--out", out, "--device", "gpu"], "invalid choice 'gpu'"),
        (["pretrain", "rotation", "--data", data, "--out", out, "--image-size", "big"], "--image-size"),
        (["pretrain", "rotation", "--data", data, "--out", out, "--rotation.jiter", "1"], "perhaps you meant --jitter"),
        (["pretrain", "rotation", "--data", data, "--out", out, "--backbone", "hf-hub:x/y"], "unknown backbone"),
        (["evaluate", run, "--train", data, "--labels-per-class", "500", "--out", out], "at most"),
        (["evaluate", run, "--train", str(digits_folder / "1"), "--out", out], "class"),
        (["evaluate", run, "--train", data, "--test", str(other), "--out", out], "zebra"),
        (["evaluate", str(tmp_path), "--train", data, "--out", out], "is the run finished"),
        (["predict", run, "--data", data, "--out", out], "no classifier"),
        (["embed", run, "--data", data, "--out", str(tmp_path / "f.txt")], ".npz or .csv"),
        (["export", run, "--to", str(tmp_path / "f.bin")], ".safetensors or .onnx"),
        (["report", str(tmp_path)], "no results.json"),
    ]
    for argv, message in cases:
        assert main(argv) == 2, argv
        errors = capsys.readouterr().err
        last = errors.strip().splitlines()[-1]
        assert last.startswith("unlabel: "), argv
        assert "│" not in errors, argv
        assert message in last, (argv, last)
        assert "Traceback" not in errors


def test_compare_with_nothing_but_test_images_to_pretrain_on(digits_folder: Path, tmp_path: Path, capsys):
    for label in "0123":
        (tmp_path / "test" / label).mkdir(parents=True)
        (tmp_path / "train" / label).mkdir(parents=True)
        for k, path in enumerate(sorted((digits_folder / label).iterdir())):
            shutil.copy(path, tmp_path / ("test" if k % 4 == 0 else "train") / label)
    command = compare_command(tmp_path / "test", tmp_path / "out")
    command[command.index("--train") + 1] = str(tmp_path / "train")
    assert main([*command, "--test", str(tmp_path / "test")]) == 2
    assert "every image of --data is a test image" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["evaluate", "compare"])
def test_several_processes_do_not_evaluate(
    command: str, compared: Path, digits_folder: Path, tmp_path: Path, monkeypatch, capsys
):
    for name, value in {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    words = compare_command(digits_folder, tmp_path)
    if command == "evaluate":
        words = ["evaluate", str(compared / "runs" / "rotation-seed0"), "--train", str(digits_folder)]
    assert main(words) == 2
    assert "evaluate and compare run in one process" in capsys.readouterr().err


def test_statistics_and_controls_see_no_test_image(digits_folder: Path, tmp_path: Path):
    cache = load_cache(open_source(str(digits_folder)), 32)
    config = EvaluateConfig(run=tmp_path, train=str(digits_folder))
    for pretraining in (cache, None):
        split = split_data(config, 32, pretraining)
        assert not set(split.unlabelled.hashes) & set(split.test.hashes)
        assert len(set(split.unlabelled.labels or ())) == 4  # a sample, not the first class
        assert split.seen == (len(split.test) if pretraining else None)


@pytest.mark.parametrize(
    ("draws", "labels", "notes"),
    [
        (10, ("1",), []),
        (2, ("25",), ["2 draws of labels"]),
        (10, ("1", "25"), ["too small for draws of 25 labels"]),
        (1, ("5",), ["leave out the luck of that draw"]),
        (10, ("1", "all"), ["leave out the luck of that draw"]),
    ],
)
def test_few_draws_and_shared_labels_are_said(draws, labels, notes, digits_folder: Path, tmp_path: Path, capsys):
    """Some 64 images per class: two draws of 25 share none, ten do."""
    config = EvaluateConfig(run=tmp_path, train=str(digits_folder), labels_per_class=labels, draws=draws)
    split = split_data(config, 16, None)
    compare._table(config, split, ("small", "auto"), 16, tmp_path / "out")
    assert len(split.warnings) == len(notes)
    assert all(note in warning for note, warning in zip(notes, split.warnings, strict=True))
    printed = capsys.readouterr().out
    assert all(f"note: {warning}\n" in printed for warning in split.warnings)


def test_features_that_are_no_numbers_are_named(compared: Path, digits_folder: Path, tmp_path: Path, monkeypatch):
    table, arm = table_of(digits_folder, compared / "runs" / "rotation-seed0", tmp_path / "a")
    healthy = ev.extract

    def damaged(*args, **kwargs):
        features = healthy(*args, **kwargs)
        features.two["s8"][0, 0] = np.nan
        return features

    monkeypatch.setattr(ev, "extract", damaged)
    with pytest.raises(UserError, match="features of rotation are not all finite"):
        ev.fill(dataclasses.replace(table, protocols=("linear",)), [arm], None)


def test_a_stored_cell_is_used_only_for_the_same_labels(compared: Path, digits_folder: Path, tmp_path: Path):
    """Which images draw 1 holds depends on the largest label count of the table."""
    table, arm = table_of(digits_folder, compared / "runs" / "rotation-seed0", tmp_path / "a")
    table = dataclasses.replace(table, protocols=("knn",), counts=(5,))
    ev.fill(table, [arm], None)
    wider = dataclasses.replace(table, counts=(5, 25))
    assert not np.array_equal(table.draws.indices(1, 5), wider.draws.indices(1, 5))
    _, found = ev.fill(wider, [arm], None)
    _, fresh = ev.fill(dataclasses.replace(wider, out=tmp_path / "b"), [arm], None)
    assert all(np.array_equal(found[k], fresh[k]) for k in fresh)
    cells = set((tmp_path / "a" / "cells").iterdir())
    ev.fill(dataclasses.replace(wider, unlabelled_id="others"), [arm], None)
    assert len(set((tmp_path / "a" / "cells").iterdir()) - cells) == 4


def test_classes_that_are_renamed_have_their_new_names_everywhere(
    compared: Path, digits_folder: Path, tmp_path: Path, short_presets
):
    run, out = compared / "runs" / "rotation-seed0", tmp_path / "e"
    for names in ("wxyz", "cats"):  # in the order of the digits, so that every fit is that of before
        for old, new in zip("0123", sorted(names), strict=True):
            (tmp_path / names).mkdir(exist_ok=True)
            shutil.copytree(digits_folder / old, tmp_path / names / new)
        command = ["evaluate", str(run), "--train", str(tmp_path / names), "--out", str(out), "--no-controls"]
        assert main([*command, *"--protocol finetune --labels-per-class 1 --draws 1".split()]) == 0
        assert load_classifier(out)[1] == sorted(names)
    assert len(list((out / "cells").iterdir())) == 1


def test_a_class_of_which_nothing_can_be_read(compared: Path, digits_folder: Path, tmp_path: Path, capsys):
    data = tmp_path / "data"
    shutil.copytree(digits_folder, data)
    (data / "4").mkdir()
    (data / "4" / "broken.png").write_bytes(b"no image")
    assert main(["evaluate", str(compared / "runs" / "rotation-seed0"), "--train", str(data)]) == 2
    assert "no image of class '4' can be read" in capsys.readouterr().err


def test_near_duplicates_among_the_labels_make_another_cell(compared: Path, digits_folder: Path, tmp_path: Path):
    table, arm = table_of(digits_folder, compared / "runs" / "rotation-seed0", tmp_path)
    alone, rows = np.arange(len(table.pool)), table.draws.indices(0, 25)
    clusterings = [alone, alone.copy(), alone.copy()]  # none alike; two of the labelled images; two others of them
    clusterings[1][rows[1]] = rows[0]
    clusterings[2][rows[3]] = rows[2]
    keys = []
    for pool in (dataclasses.replace(table.pool, clusters=c) for c in clusterings):
        other = dataclasses.replace(table, pool=pool)
        filler = ev.ArmFiller(arm, 0, other, ev.Store(other))
        keys.append([filler._key(p, 25, 0) for p in ("linear", "knn", "finetune")])
    assert all(len({str(key) for key in own}) == 3 for own in zip(*keys, strict=True))
    renamed = dataclasses.replace(table, pool=dataclasses.replace(table.pool, clusters=1000 - clusterings[2]))
    filler = ev.ArmFiller(arm, 0, renamed, ev.Store(renamed))
    assert [filler._key(p, 25, 0) for p in ("linear", "knn", "finetune")] == keys[2]


def test_runs_of_another_size_or_network_are_named(tmp_path: Path):
    run = tmp_path / "run"
    save_backbone(build_backbone("small", 32), run)
    known = len(finished_runs([run], build_backbone("small", 32).spec, None)[2])
    for network, said in (
        (build_backbone("small", 64), "images of 32 px"),
        (build_backbone("resnet18", 32), "another network than those that it is compared with, which are resnet18"),
        (
            build_backbone("small", 32, stem="half"),
            "its stem is 'small', that of those that it is compared with 'half'",
        ),
        (build_backbone("small", 32, flip=False), "it is fine-tuned with mirror images, unlike"),
    ):
        _, _, notes = finished_runs([run], network.spec, None)
        assert len(notes) == known + 1
        assert any(said in note for note in notes), notes


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--train", "nowhere"], "nowhere"),
        (["--test", "nowhere"], "nowhere"),
        (["--also", "nowhere"], "nowhere"),
        (["--train", "FLAT"], "is in a class folder"),
        (["--also", "RUN", "OTHER"], "two arms are called 'rotation-seed0'"),
    ],
)
def test_compare_says_what_is_wrong_before_images_are_decoded(
    flags: list[str], said: str, compared: Path, digits_folder: Path, tmp_path: Path, monkeypatch, capsys
):
    monkeypatch.setattr("unlabel.compare.load_cache", None)
    run = compared / "runs" / "rotation-seed0"
    (tmp_path / "nested").mkdir()
    shutil.copytree(run, other := tmp_path / "nested" / run.name)
    known = {"FLAT": str(digits_folder / "1"), "RUN": str(run), "OTHER": str(other)}
    command = compare_command(digits_folder, tmp_path / "out")
    assert main([*command, *(known.get(flag, flag) for flag in flags)]) == 2
    assert said in capsys.readouterr().err


def test_a_backbone_without_its_run_is_beside_its_own_network(
    compared: Path, digits_folder: Path, tmp_path: Path, capsys
):
    """The two files of a product say which that is; one that has no name of ours is noted."""
    runs = [compared / "runs" / "rotation-seed0", tmp_path / "alone", tmp_path / "odd"]
    runs[1].mkdir()
    for name in ("backbone.safetensors", "backbone.json"):
        shutil.copy(runs[0] / name, runs[1])
    spec = build_backbone("small", 16).spec
    save_backbone(Backbone(dataclasses.replace(spec, kwargs={**spec.kwargs, "channels": (16, 32, 64, 128)})), runs[2])
    found, flags, fits = [], "--protocol linear --labels-per-class 5 --draws 1".split(), r"minutes, then (\d+) fits"
    for k, run in enumerate(runs):
        out = tmp_path / f"out{k}"
        assert main(["evaluate", str(run), "--train", str(digits_folder), "--out", str(out), *flags]) == 0
        found.append(json.loads((out / "results.json").read_text()))
        told = re.search(fits, capsys.readouterr().out)
        assert told is not None
        assert int(told[1]) == len(list((out / "cells").glob("*.json"))) > 10  # with each stage's
    random = [[r["accuracy"] for r in results["rows"] if r["arm"] == "random"] for results in found]
    assert random[0] == random[1] != random[2]
    noted = [any("another network" in w for w in results["provenance"]["warnings"]) for results in found]
    assert noted == [False, False, True]
    assert main(["evaluate", str(runs[1] / "backbone.safetensors"), "--train", str(digits_folder)]) == 2
    assert "give the run's folder" in capsys.readouterr().err


def test_fine_tuning_starts_with_statistics_of_the_size_it_sees(digits_folder: Path, tmp_path: Path):
    """BatchNorm's of 60 px where the backbone was pretrained at 48; the probes' network stays as it was."""
    save_backbone(build_backbone("small", 48), tmp_path / "run")
    split = split_data(EvaluateConfig(run=tmp_path / "run", train=str(digits_folder)), 48, None)
    table = ev.Table(split.pool, split.test, split.unlabelled.images, split.classes, (5,), 1, ("finetune",),
                     ("small", "auto"), 48, torch.device("cpu"), tmp_path)  # fmt: skip
    arm = ev.Arm("task", "backbone", (0,), (tmp_path / "run",))
    filler = ev.ArmFiller(arm, 0, table, ev.Store(table))
    model, before = filler._start.model, filler.network.model
    seen = clean(torch.from_numpy(np.array(table.unlabelled)), 60)
    with torch.no_grad():
        found = model.get_submodule("conv1")(filler._start.normalise(seen))
    mean, std = found.mean((0, 2, 3)), found.std((0, 2, 3))
    assert ((model.get_buffer("bn1.running_mean") - mean).abs() / std).max() < 0.02
    assert torch.equal(before.get_buffer("bn1.running_mean"), torch.zeros(len(mean)))
    with torch.no_grad():
        pooled = filler._start.eval()(seen[:20]).pooled.numpy()
    assert np.allclose(filler._head_inputs(np.array(table.unlabelled)[:20]), pooled, atol=1e-5)


def test_losses_serve_the_stages_of_a_draw_and_no_other_draw(
    compared: Path, digits_folder: Path, tmp_path, monkeypatch
):
    table, arm = table_of(digits_folder, compared / "runs" / "rotation-seed0", tmp_path / "a")
    table = dataclasses.replace(table, protocols=("linear",), counts=(25,))
    real, seen = ev.fit_probe, []

    def recorded(*args, judged, **kwargs):
        before = set(judged)
        model = real(*args, judged=judged, **kwargs)
        seen.append((args[4:6], before, set(judged)))
        return model

    monkeypatch.setattr(ev, "fit_probe", recorded)
    ev.fill(table, [arm], None)
    for draw in range(2):
        (first, after), *stages = [(before, after) for which, before, after in seen if which == (25, draw)]
        assert first == set() < after
        assert len(stages) == 4
        assert all(before >= after for before, _ in stages)


def test_a_cell_belongs_to_the_size_that_it_was_fine_tuned_at(digits_folder: Path, tmp_path: Path, monkeypatch):
    table, _ = table_of(digits_folder, tmp_path, tmp_path / "a")
    table = dataclasses.replace(table, protocols=("finetune",), counts=(5,))
    fits = []

    def fit(self, protocol, count, draw, *_):
        fits.append(draw)
        return np.zeros(len(table.test), np.int64), {}

    monkeypatch.setattr(ev.ArmFiller, "_fit", fit)
    for packed_from in (48, 48, 16):
        monkeypatch.setattr(ft, "PACKED_FROM", packed_from)
        ev.fill(table, [ev.Arm("scratch", "scratch")], None)
    assert fits == [0, 1, 0, 1]


def test_controls_share_cells_whatever_the_stem_was_called(digits_folder: Path, tmp_path: Path):
    """`evaluate` takes the stem from the run, where it has its real name; `compare` from the flag, where it is auto."""
    table, _ = table_of(digits_folder, tmp_path, tmp_path / "a")
    scratch = ev.Arm("scratch", "scratch")

    def named(stem: str) -> list[object]:
        return ev.identity(scratch, 0, dataclasses.replace(table, backbone=("small", stem)))

    assert named("auto") == named("small") != named("timm")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--denoising.level", "-1"], "level"),
        (["--denoising.alpha", "-1"], "alpha"),
        (["--tasks", "inpainting", "inpainting+denoising", "--denoising.level", "-1"], "level"),
        (["--top-layers", "0"], "top-layers"),
        (["--rotation.blocks", "1"], "not among the tasks"),
        (["--epochs", "0"], "epochs"),
        (["--epochs", "1", "--minutes", "1"], "not both"),
    ],
)
def test_compare_refuses_wrong_settings_before_it_spends(
    flags: list[str], message: str, digits_folder: Path, tmp_path: Path, capsys
):
    """The third task's mistake must not come to light when the first two are trained."""
    out = tmp_path / "out"
    command = ["compare", "--data", str(digits_folder), "--train", str(digits_folder), "--out", str(out)]
    command += ["--image-size", "16", "--labels-per-class", "1", "--draws", "1"]
    command += [] if "--epochs" in flags else ["--epochs", "0.3"]
    command += [] if "--tasks" in flags else ["--tasks", "inpainting", "denoising"]
    assert main([*command, *flags]) == 2
    assert message in capsys.readouterr().err
    assert not list(out.glob("runs/*/metrics.jsonl"))


def test_publish_copies_table_and_figure_without_the_machines_paths(compared: Path, tmp_path: Path):
    script = Path(__file__).resolve().parents[1] / "scripts" / "cats_vs_dogs.py"
    command = [sys.executable, str(script), "publish", str(compared / "results.json"), "--name", "a-name"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert sorted(p.name for p in (tmp_path / "results").iterdir()) == [
        f"cats_vs_dogs_a-name.{s}" for s in ("json", "svg")
    ]
    text = (tmp_path / "results" / "cats_vs_dogs_a-name.json").read_text()
    assert json.loads(text)["rows"] == json.loads((compared / "results.json").read_text())["rows"]
    assert str(compared.parent) not in text
    assert "rotation" in done.stdout


def test_labels_file_beside_a_test_source(digits_folder: Path, tmp_path: Path):
    """Class folders of the test source count; a flat one takes its labels from the same file; no name for both."""
    lines = []
    for split, rows in (("train", slice(0, 8)), ("test", slice(8, 12))):
        for label in ("0", "1"):
            for path in sorted((digits_folder / label).iterdir())[rows]:
                for target in (tmp_path / split / path.name, tmp_path / "folders" / split / label / path.name):
                    target.parent.mkdir(parents=True, exist_ok=True)
                    target.write_bytes(path.read_bytes())
                lines.append((split, f"{path.name},{label}"))

    def split_with(test: Path, *kept: str, train: Path = tmp_path / "train"):
        text = "name,label\n" + "\n".join(line for split, line in lines if split in kept)
        (tmp_path / "labels.csv").write_text(text + "\n")
        config = EvaluateConfig(run=tmp_path, train=str(train), test=str(test), labels=tmp_path / "labels.csv")
        return split_data(config, 32, None)

    for found in (
        split_with(tmp_path / "folders" / "test", "train"),
        split_with(tmp_path / "test", "train", "test"),
    ):
        assert (len(found.pool), len(found.test)) == (16, 8)
        assert found.classes == ["0", "1"]
        by_name = dict(line.split(",") for _, line in lines)
        assert [found.classes[k] for k in found.test.y] == [by_name[Path(n).name] for n in found.test.names]
    with pytest.raises(UserError, match="not in the source"):
        split_with(tmp_path / "test", "train", "test", train=tmp_path / "folders" / "test")
    with pytest.raises(UserError, match="of a --train and of a --test image"):
        split_with(tmp_path / "train", "train")


def test_a_class_whose_training_images_are_all_in_the_test_set(digits_folder: Path, tmp_path: Path):
    for label, rows in (("0", slice(0, 4)), ("1", slice(0, 4))):
        for path in sorted((digits_folder / label).iterdir())[rows]:
            for folder, name in (("train", label), ("test", label)):
                target = tmp_path / folder / name / path.name
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(path.read_bytes())
    extra = sorted((digits_folder / "0").iterdir())[-1]
    (tmp_path / "train" / "0" / extra.name).write_bytes(extra.read_bytes())
    config = EvaluateConfig(run=tmp_path, train=str(tmp_path / "train"), test=str(tmp_path / "test"))
    with pytest.raises(UserError, match="class '1': each of its --train images is a near-duplicate"):
        split_data(config, 32, None)


def test_arms_have_names_of_their_own(compared: Path, digits_folder: Path, tmp_path: Path, capsys):
    command = [*compare_command(digits_folder, tmp_path / "out"), "--also", str(compared / "runs" / "rotation-seed0")]
    assert main([*command, str(compared / "runs" / "rotation-seed0")]) == 2
    assert "two arms are called 'rotation-seed0'" in capsys.readouterr().err
    assert main([*compare_command(digits_folder, tmp_path / "out"), "--also", str(tmp_path / "gone")]) == 2


@pytest.mark.parametrize("name", ["scratch", "random"])
def test_no_arm_is_called_as_a_control_is(name: str, compared: Path, digits_folder: Path, tmp_path: Path, capsys):
    """Nor where there are no controls: a report would take it for one."""
    shutil.copytree(compared / "runs" / "rotation-seed0", tmp_path / name)
    command = [*compare_command(digits_folder, tmp_path / "out"), "--also", str(tmp_path / name)]
    for flags in ([], ["--no-controls"]):
        assert main([*command, *flags]) == 2
        assert f"an arm is called {name!r}, as a control is" in capsys.readouterr().err
    assert not list((tmp_path / "out").glob("runs/*/metrics.jsonl"))


def test_label_counts_default_to_what_there_is():
    config = EvaluateConfig(run=Path(), train="x")
    assert label_counts(config, np.arange(40) % 2) == (1, 10)
    assert label_counts(config, np.arange(400) % 2) == (1, 10, 50)
    chosen = dataclasses.replace(config, labels_per_class=("all", "20", "3", "3"))
    assert label_counts(chosen, np.arange(400) % 2) == (3, 20, "all")
