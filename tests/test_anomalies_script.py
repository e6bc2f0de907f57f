"""scripts/anomalies.py on two digits: one class after the other, by several processes, and no data set for another."""

from __future__ import annotations

import json
import sys
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import ttest_1samp

from scripts import anomalies as script


def test_classes_by_themselves_then_the_table(digits_folder: Path, tmp_path: Path, monkeypatch, capsys):
    for part, offset in {"train": 0, "test": 1}.items():
        for digit in "01":
            (tmp_path / part / digit).mkdir(parents=True)
            for path in sorted((digits_folder / digit).glob("*.png"))[offset:80:2]:
                (tmp_path / part / digit / path.name).write_bytes(path.read_bytes())
    monkeypatch.chdir(tmp_path)
    line = "anomalies.py train --test test --name two --minutes 0.005 --image-size 32 --stem half --out out".split()

    def run(*flags: str) -> None:
        monkeypatch.setattr(sys, "argv", [*line, *flags])
        script.main()

    with pytest.raises(SystemExit):
        run("--classes", "0", "7")
    assert "--classes 7: the classes are 0, 1" in capsys.readouterr().err
    run("--classes", "1")
    done = tmp_path / "out" / "two"
    assert [p.name for p in done.glob("*.json")] == ["rotation-1.json"]
    assert not (tmp_path / "results").exists()
    run()
    found = json.loads((tmp_path / "results" / "anomalies_two_rotation.json").read_text())
    assert set(found["classes"]) == {"0", "1"}
    assert found["classes"]["1"] == json.loads((done / "rotation-1.json").read_text())["scores"]
    best = found["best_of_pixels"]
    for score in ("rotation", "features"):
        each = [c[score]["auroc"] - c[best]["auroc"] for c in found["classes"].values()]
        assert found["above_pixels"][score]["mean"] == pytest.approx(np.mean(each))
        expected = ttest_1samp(each, 0).confidence_interval()
        assert found["above_pixels"][score]["interval"] == pytest.approx([expected.low, expected.high])
    # A nought and a one are far from each other in pixels; an AUROC the wrong way round would be below one half.
    assert found["mean_auroc"]["pixels"] > 0.9

    monkeypatch.setattr(script, "command_line", lambda _: pytest.fail("what is done is not done again"))
    run()
    line[line.index("test")] = "train"
    with pytest.raises(SystemExit, match="holds the results of other images"):
        run()


def test_another_process_may_have_written_the_images_meanwhile(digits_folder: Path, tmp_path: Path, monkeypatch):
    folder, real = tmp_path / "train", script.open_source

    def slow(spec: str):
        monkeypatch.setattr(script, "open_source", real)
        with monkeypatch.context() as other:
            other.setattr(script.os, "getpid", lambda: 0)
            script.write_out(spec, folder)
        return real(spec)

    monkeypatch.setattr(script, "open_source", slow)
    assert script.write_out(str(digits_folder), folder) == folder
    assert len(list(folder.rglob("*.png"))) == len(list(digits_folder.rglob("*.png")))
    assert [p.name for p in tmp_path.iterdir()] == ["train"]


def refused(stored: Path) -> bool:
    try:
        script.same_sources(stored, "train test")
    except SystemExit:
        return True
    return False


def test_two_processes_that_begin_at_once(tmp_path: Path):
    stored = [tmp_path / str(k) / "sources.txt" for k in range(300)]
    with get_context("fork").Pool(3) as pool:
        assert not any(pool.map(refused, [path for path in stored for _ in range(3)], chunksize=1))
    assert {path.read_text() for path in stored} == {"train test"}
