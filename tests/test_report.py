"""The report: what it says, that strangers' names cannot break it, and that nothing missing stops it."""

from __future__ import annotations

import copy
import json
import math
import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from unlabel import report_plots as plots
from unlabel.errors import UserError
from unlabel.report import accuracy_svg, answer, format_table, write_report
from unlabel.report_charts import Run, run_panels
from unlabel.report_origin import reading
from unlabel.report_results import head
from unlabel.report_text import title

LABELS = (10, 50, 250)
EVIL = '<script>alert("x")</script>'
# mean accuracy at the three label counts
LEVELS = {
    ("rotation", "linear"): (0.638, 0.719, 0.762),
    ("rotation", "knn"): (0.601, 0.664, 0.701),
    ("rotation", "finetune"): (0.652, 0.744, 0.842),
    ("inpainting", "linear"): (0.530, 0.571, 0.622),
    ("inpainting", "knn"): (0.521, 0.549, 0.580),
    ("inpainting", "finetune"): (0.540, 0.633, 0.739),
    ("denoising", "linear"): (0.545, 0.580, 0.641),
    ("denoising", "knn"): (0.519, 0.541, 0.566),
    ("denoising", "finetune"): (0.548, 0.601, 0.698),
    ("rotation-60min", "linear"): (0.741, 0.827, 0.860),
    ("rotation-60min", "knn"): (0.693, 0.757, 0.801),
    ("rotation-60min", "finetune"): (0.752, 0.856, 0.894),
    ("random", "linear"): (0.517, 0.560, 0.613),
    ("random", "knn"): (0.512, 0.531, 0.552),
    ("pixels", "linear"): (0.511, 0.538, 0.566),
    ("pixels", "knn"): (0.508, 0.524, 0.540),
    ("patches", "linear"): (0.541, 0.592, 0.667),
    ("patches", "knn"): (0.522, 0.548, 0.571),
    ("scratch", "finetune"): (0.541, 0.595, 0.696),
}
METRICS = {  # metric: (first, last, trivial)
    "rotation": {"rotation/accuracy": (0.25, 0.81, 0.25)},
    "rotation-60min": {"rotation/accuracy": (0.25, 0.88, 0.25)},
    "inpainting": {"inpainting/mse": (0.074, 0.031, 0.071)},
    "denoising": {"denoising/mse": (0.031, 0.0042, 0.018), "denoising/psnr_gain": (-1.2, 5.1, 0.0)},
}


def fake_results() -> dict[str, Any]:
    """Results as `compare` writes them, at a realistic size."""
    rng = np.random.default_rng(0)
    rows, summary, stages, paired = [], [], [], []
    for (arm, protocol), means in LEVELS.items():
        for labels, mean in zip(LABELS, means, strict=True):
            key = {"arm": arm, "protocol": protocol, "labels_per_class": labels}
            half = 0.045 / math.sqrt(labels / 10)
            count = {"n_draws": 10, "n_seeds": 1, "unit": "draw"}
            summary.append({**key, "mean": mean, "ci_low": mean - half, "ci_high": mean + half, **count})
            for draw in range(10):
                if protocol == "finetune":
                    chosen: dict[str, Any] = {"preset": "all", "lr": float(rng.choice([1e-3, 3e-3]))}
                else:
                    chosen = {"C": float(rng.choice([0.01, 0.1])), "stages": ["s16"], "pool": 2}
                result = {"draw": draw, "seed": 0, "accuracy": mean, "steps": 400, "seconds": 3.1}
                edge = arm == "rotation" and protocol == "linear" and draw < 2
                rows.append({**key, **result, "chosen": chosen, "on_grid_edge": edge})
            if protocol == "linear" and arm not in ("pixels", "patches"):
                for stage, drop in (("s2", 0.10), ("s4", 0.06), ("s8", 0.0), ("s16", 0.02)):
                    value = 0.5 + (mean - 0.5) * (1 - 5 * drop)
                    interval = {"mean": value, "ci_low": value - half, "ci_high": value + half}
                    stages.append({**key, "stage": stage, **interval, **count})
            versus = {"finetune": ["scratch"], "linear": ["random", "patches"], "knn": ["random"]}[protocol]
            for other in versus:
                if arm in ("random", "pixels", "patches", "scratch"):
                    continue
                gap = mean - LEVELS[other, protocol][LABELS.index(labels)]
                low, high = gap - 0.8 * half, gap + 0.8 * half
                word = "helps" if low > 0 else "does not help" if high < 0 else "cannot tell with these labels"
                primary = (arm, protocol, labels) == ("rotation", "finetune", 50)
                interval = {"difference": gap, "ci_low": low, "ci_high": high}
                paired.append({**key, "versus": other, **interval, "verdict": word, "primary": primary})
    runs = {
        arm: [
            {
                "path": f"runs/{arm}-seed0",
                "images_seen": 128_000 * (3 if "60" in arm else 1),
                "minutes": 60.0 if "60" in arm else 20.0,
                "images_per_second": 107.3,
                "seed": 0,
                "backbone": "small",
                "image_size": 64,
                "tasks": [arm.partition("-")[0]],
            }
        ]
        for arm in METRICS
    }
    provenance = {
        "runs": runs,
        "hardware": {"cpu": "Some CPU @ 2.5 GHz", "threads": 2, "gpu": None, "memory_gb": 15.6},
        "versions": {"python": "3.11.2", "torch": "2.14.1", "unlabel": "0.1.0"},
        "data": {
            "pretrain": {"spec": ["photos/unlabelled", "photos/pool"], "images": 20_000, "skipped": 3},
            "train": {"spec": "photos/pool", "images": 9_500, "skipped": 0, "classes": ["cat", "dog"]},
            "test": {"spec": "photos/test", "images": 5_000, "skipped": 0, "clusters": 4_961},
        },
        "settings": {
            "tasks": ["rotation", "inpainting", "denoising"],
            "labels_per_class": list(LABELS),
            "draws": 10,
        },
        "created": "2025-05-04T12:00:00+00:00",
        "overlap": {"test_in_pretraining": 0},
        "warnings": [],
    }
    return {
        "schema": 1,
        "rows": rows,
        "summary": summary,
        "stages": stages,
        "paired": paired,
        "provenance": provenance,
    }


def write_folder(folder: Path, results: dict[str, Any]) -> Path:
    """A results folder with run folders, noisy curves and previews."""
    rng = np.random.default_rng(1)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(json.dumps(results), encoding="utf-8")
    for arm, metrics in METRICS.items():
        run = folder / "runs" / f"{arm}-seed0"
        (run / "previews").mkdir(parents=True)
        (run / "config.json").write_text(json.dumps({"tasks": [arm], "lr": 0.1, "out": EVIL}), encoding="utf-8")
        lines = []
        for i in range(200):
            share = 1 - math.exp(-i / 50)
            noise = rng.normal(0, 0.03)
            values = {k: a + (b - a) * (share + noise) for k, (a, b, _) in metrics.items()}
            line = {"step": 20 * i, "epoch": 0.032 * i, "loss": 1.4 - 0.8 * (share + noise), "lr": 0.1}
            line |= {"images_per_second": 107.0, "metrics": values}
            if i % 20 == 0:
                line["trivial"] = {k: t for k, (_, _, t) in metrics.items()}
            lines.append(json.dumps(line))
        (run / "metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 4000, "lo', encoding="utf-8")
        ramp = np.linspace(0, 255, 512, dtype=np.uint8)
        for step in (900, 4000):
            level = np.full((192, 512), step // 20, np.uint8)
            picture = np.stack([np.tile(ramp, (192, 1)), level, np.tile(ramp[::-1], (192, 1))], axis=-1)
            Image.fromarray(picture).save(run / "previews" / f"{arm.partition('-')[0]}-{step}.png")
    return folder


@pytest.fixture
def results() -> dict[str, Any]:
    return fake_results()


class _Page(HTMLParser):
    """Checks nesting and collects what a browser would see."""

    VOID = frozenset({"meta", "img", "br", "link", "input"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open[-1:] == [tag], f"</{tag}> closes {self.open[-3:]}"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.text += data


def page(folder: Path) -> _Page:
    text = write_report(folder).read_text(encoding="utf-8")
    parsed = _Page(text)
    assert parsed.open == []
    assert "nan" not in text.lower().split()
    assert "None" not in text
    return parsed


def headings(parsed: _Page) -> int:
    return sum(tag == "h2" for tag, _ in parsed.tags)


def test_page_holds_every_section(tmp_path: Path, results: dict[str, Any]) -> None:
    parsed = page(write_folder(tmp_path, results))
    assert headings(parsed) == 8
    # Three protocols, three label counts per stage, and loss and metrics of four runs.
    panels = sum(tag == "svg" and attrs.get("class") == "panel" for tag, attrs in parsed.tags)
    assert panels == 3 + 3 + 2 + 2 + 2 + 3
    dashed = sum(tag == "path" and attrs.get("class") == "trivial" for tag, attrs in parsed.tags)
    assert dashed == 3 + 5  # chance under each protocol, and every metric's trivial score
    pictures = [attrs for tag, attrs in parsed.tags if tag == "img"]
    assert len(pictures) == 4
    assert "at step 4,000" in parsed.text
    assert "step 900" not in parsed.text
    for text in (
        "71.9 [69.9, 73.9]",
        "cat, dog",
        "rotation, linear probe: 6 of 30",
        "4,961",
    ):
        assert text in parsed.text.replace("\u00a0", " ")
    assert (tmp_path / "report.html").stat().st_size < 3_000_000


def test_page_needs_no_network_and_runs_nothing(tmp_path: Path, results: dict[str, Any]) -> None:
    parsed = page(write_folder(tmp_path, results))
    for tag, attrs in parsed.tags:
        assert tag not in ("script", "link", "iframe", "object", "embed", "base", "form")
        for name, value in attrs.items():
            assert not name.startswith("on")
            if name in ("src", "href", "xlink:href", "srcset", "action", "data"):
                assert tag == "img"
                assert (value or "").startswith("data:image/")
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "@import" not in text
    assert "url(" not in text
    assert "http" not in text.replace("http-equiv", "").replace("http://www.w3.org/2000/svg", "")


def poison(value: Any) -> Any:
    """Every text a stranger could have chosen becomes markup; numbers and the words of the schema stay."""
    fixed = {"linear", "knn", "finetune", "all", "draw", "seed"}
    if isinstance(value, dict):
        return {k: poison(v) for k, v in value.items()}
    if isinstance(value, list):
        return [poison(v) for v in value]
    return EVIL + value if isinstance(value, str) and value not in fixed else value


def test_names_from_strangers_stay_text(tmp_path: Path, results: dict[str, Any]) -> None:
    results["provenance"]["warnings"] = ["careful"]
    paths = results["provenance"].pop("runs")
    evil = poison(results)
    evil["schema"] = 1
    evil["provenance"]["runs"] = {EVIL: paths["rotation"]}
    evil["provenance"]["versions"] = {EVIL: EVIL}
    write_folder(tmp_path, evil)
    line = {"step": 1, "epoch": 0.1, "loss": 1.0, "metrics": {EVIL: 0.5}, "trivial": {EVIL: 0.2}}
    (tmp_path / "runs" / "rotation-seed0" / "metrics.jsonl").write_text(json.dumps(line), encoding="utf-8")
    parsed = page(tmp_path)
    assert all(tag != "script" for tag, _ in parsed.tags)
    assert "<script" not in (tmp_path / "report.html").read_text(encoding="utf-8")
    assert parsed.text.count(EVIL) > 100
    assert "<script" not in accuracy_svg(evil)
    ElementTree.fromstring(accuracy_svg(evil))


SPARSE: dict[str, Any] = {
    "nothing": lambda r: r.clear(),
    "no rows": lambda r: r.pop("rows"),
    "no summary": lambda r: r.pop("summary"),
    "no paired": lambda r: r.pop("paired"),
    "no stages": lambda r: r.pop("stages"),
    "no provenance": lambda r: r.pop("provenance"),
    "null provenance": lambda r: r.update(provenance=None),
    "empty lists": lambda r: r.update(rows=[], summary=[], stages=[], paired=[]),
    "no intervals": lambda r: [row.update(ci_low=None, ci_high=None) for row in r["summary"] + r["paired"]],
    "not a number": lambda r: [row.update(mean=math.nan) for row in r["summary"][:9]],
    "no number at all": lambda r: [row.update(mean=math.nan, ci_low=math.nan) for row in r["summary"]],
    "one label count": lambda r: r.update(summary=[s for s in r["summary"] if s["labels_per_class"] == 10]),
    "one arm": lambda r: r.update(summary=r["summary"][:1], paired=r["paired"][:1]),
    "all labels": lambda r: r["summary"].append({**r["summary"][0], "labels_per_class": "all"}),
    "only all labels": lambda r: [row.update(labels_per_class="all") for row in r["summary"]],
    "equal accuracies": lambda r: [row.update(mean=1.0, ci_low=1.0, ci_high=1.0) for row in r["summary"]],
    "zero differences": lambda r: [row.update(difference=0.0, ci_low=0.0, ci_high=0.0) for row in r["paired"]],
    "rows without columns": lambda r: r.update(rows=[{}], summary=[{}], stages=[{}], paired=[{}]),
    "lean rows": lambda r: r.update(paired=[{"arm": "a", "difference": 0.1}], summary=[{"arm": "a", "mean": 0.5}]),
    "runs that are not there": lambda r: r["provenance"].update(runs={"a": [{"path": "gone"}, {}, None], "b": None}),
    "many classes": lambda r: r["provenance"]["data"]["train"].update(classes=[f"class {i}" for i in range(1000)]),
    "unknown protocol": lambda r: [row.update(protocol="centroid") for row in r["summary"] + r["paired"]],
    "labels of other kinds": lambda r: [row.update(labels_per_class=None) for row in r["summary"] + r["paired"]],
    "lone surrogate": lambda r: r["provenance"].update(warnings=["name \udcff"]),
}  # fmt: skip


@pytest.mark.parametrize("case", SPARSE)
@pytest.mark.parametrize("with_runs", [True, False])
def test_nothing_missing_stops_it(tmp_path: Path, results: dict[str, Any], case: str, with_runs: bool) -> None:
    SPARSE[case](results)
    if with_runs:
        write_folder(tmp_path, results)
    else:
        (tmp_path / "results.json").write_text(json.dumps(results), encoding="utf-8")
    page(tmp_path)
    assert answer(results).endswith(".")
    assert format_table(results)
    figure = accuracy_svg(results)
    if figure:
        ElementTree.fromstring(figure)


def test_sections_without_data_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text('{"schema": 1}', encoding="utf-8")
    assert headings(page(tmp_path)) == 1  # provenance: the files beside the page


def test_many_rows_stay_small(tmp_path: Path, results: dict[str, Any]) -> None:
    for key in ("rows", "summary", "stages", "paired"):
        more = []
        for i in range(12):
            more += [{**copy.deepcopy(row), "arm": f"{row['arm']} {i}", "primary": False} for row in results[key]]
        results[key] += more
    page(write_folder(tmp_path, results))
    assert (tmp_path / "report.html").stat().st_size < 3_000_000


def test_large_previews_are_made_smaller(tmp_path: Path, results: dict[str, Any]) -> None:
    write_folder(tmp_path, results)
    noise = np.random.default_rng(0).integers(0, 256, (900, 2400, 3), dtype=np.uint8)
    previews = tmp_path / "runs" / "rotation-seed0" / "previews"
    Image.fromarray(noise).save(previews / "rotation-000005000.png")
    (previews / "rotation-000006000.png.tmp").write_bytes(b"half")
    (previews / "broken-000001000.png").write_bytes(b"\x89PNG\r\n\x1a\nnot a picture")
    parsed = page(tmp_path)
    sources = [attrs["src"] or "" for tag, attrs in parsed.tags if tag == "img"]
    assert sum(source.startswith("data:image/jpeg") for source in sources) == 1
    assert max(map(len, sources)) < 1_500_000


@pytest.mark.parametrize("text", ["", "{", "[]", '{"schema": 2}'])
def test_unusable_results_are_a_plain_error(tmp_path: Path, text: str) -> None:
    with pytest.raises(UserError, match=r"results\.json"):
        write_report(tmp_path)
    (tmp_path / "results.json").write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=r"results\.json"):
        write_report(tmp_path)
    assert not (tmp_path / "report.html").exists()


def only(difference: float, low: float, high: float, **columns: Any) -> dict[str, Any]:
    """Results with one comparison."""
    row = {"arm": "rotation", "versus": "scratch", "protocol": "finetune", "labels_per_class": 50}
    row |= {"difference": difference, "ci_low": low, "ci_high": high, "primary": True} | columns
    count = {"n_draws": 10, "n_seeds": 1, "unit": "draw"}
    summary = [{**{k: row[k] for k in ("arm", "protocol", "labels_per_class")}, "mean": 0.7, **count}]
    return {"summary": summary, "paired": [row], "provenance": {"data": {"test": {"images": 5000}}}}


def test_answer_when_it_helps() -> None:
    assert answer(only(0.162, 0.131, 0.19)) == (
        "With 50 labels per class, rotation pretraining raises fine-tuned accuracy by 16.2 points over training from "
        "scratch, 95 % interval 13.1 to 19.0, for this backbone (10 draws of labels, 5,000 test images)."
    )  # fmt: skip


def test_answer_when_it_lowers() -> None:
    text = answer(only(-0.031, -0.05, -0.012, versus="random", protocol="linear", labels_per_class=1))
    assert text.startswith(
        "With 1 label per class, rotation pretraining does not help: it lowers linear-probe accuracy"
    )
    assert "by 3.1 points against a random backbone, 95 % interval 1.2 to 5.0, for this backbone" in text


def test_answer_when_it_cannot_be_told() -> None:
    text = answer(only(0.008, -0.01, 0.026, labels_per_class="all"))
    assert text.startswith("With all labels, it cannot be told whether rotation pretraining helps: fine-tuned accuracy")
    assert "differs by +0.8 points from training from scratch, 95 % interval -1.0 to +2.6" in text


def test_answer_says_what_the_interval_is_over() -> None:
    results = only(0.1, 0.05, 0.15)
    results["summary"][0] |= {"n_seeds": 3, "unit": "seed"}
    assert answer(results).endswith(
        "over repeated pretraining (3 pretraining seeds, 10 draws of labels, 5,000 test images)."
    )


def test_answer_says_whose_seeds_they_are() -> None:
    results = only(0.1, 0.05, 0.15)
    results["summary"][0] |= {"n_seeds": 1, "unit": "draw"}
    results["paired"][0] |= {"n_seeds": 3, "n_draws": 10, "unit": "seed"}
    assert answer(results).endswith("for this backbone (3 seeds of scratch, 10 draws of labels, 5,000 test images).")


@pytest.mark.parametrize("more", [{"versus": "inpainting"}, {"versus": "rotation", "versus_protocol": "finetune"}])
def test_two_pretrained_arms_say_nothing_of_pretraining(more: dict[str, str]) -> None:
    assert title(only(0.1, 0.05, 0.15)).startswith("rotation pretraining helps")
    results = only(0.1, 0.05, 0.15, primary=False, **more)
    assert title(results) == "What the labels bought"
    assert "there is no control to compare it with" in answer(results)


@pytest.mark.parametrize(
    ("draws", "said"), [((10, 10), "other draws of labels"), ((10, 1), "one draw only"), ((1, 1), "not the luck")]
)
def test_how_to_read_one_draw(draws: tuple[int, int], said: str) -> None:
    results = {"summary": [{"arm": "rotation", "protocol": "knn", "n_draws": n, "unit": "draw"} for n in draws]}
    text = reading(results)
    assert said in text
    assert ("covers other draws of labels" in text) == (draws[0] == 10)
    assert ("luck" in text.partition("Two bands")[0]) == (1 in draws)


@pytest.mark.parametrize(("units", "said"), [(("seed", "seed"), False), (("seed", "draw"), True)])
def test_how_to_read_one_seed_beside_three(units: tuple[str, str], said: bool) -> None:
    """Not every interval on the page is over seeds where an arm has one only."""
    row = {"arm": "rotation", "protocol": "knn", "n_draws": 10}
    text = reading({"summary": [{**row, "unit": unit} for unit in units]})
    assert "pretraining again from another seed" in text
    assert ("where an arm has three seeds or more" in text) == said
    assert "for the backbone that was trained here" not in text


@pytest.mark.parametrize("lines", [1, 2])
def test_a_loss_is_not_per_cent(lines: int) -> None:
    """A run with a single line shows it as a point, with its value beside it."""
    logged = [{"epoch": 0.1 * k, "loss": 1.386, "metrics": {"rotation/accuracy": 0.25}} for k in range(lines)]
    panels = run_panels([Run("rotation-seed0", "rotation", Path(), {}, logged)], plots.Style("a0"))
    assert [panel.title for panel in panels] == ["loss", "rotation/accuracy"]
    drawn = [plots.draw(panel) for panel in panels]
    assert "%" not in "".join(drawn)
    assert ("<title>rotation-seed0: 1.386</title>" in drawn[0]) == (lines == 1)
    assert ("<title>rotation-seed0: 0.25</title>" in drawn[1]) == (lines == 1)


def test_labels_per_class_from_strangers_stay_text() -> None:
    text = head(only(0.1, 0.05, 0.15, labels_per_class=EVIL))
    assert "% right on the test images" in text
    assert "<script" not in text
    assert _Page(text).text.count(EVIL) == 3  # in the headline, the answer, and the accuracies


def test_answer_picks_the_named_comparison(results: dict[str, Any]) -> None:
    assert "With 50 labels per class, rotation pretraining raises fine-tuned accuracy by 14.9" in answer(results)
    named = next(row for row in results["paired"] if row["arm"] == "inpainting" and row["protocol"] == "knn")
    for row in results["paired"]:
        row["primary"] = row is named
    assert "With 10 labels per class" in answer(results)
    assert "inpainting" in answer(results)
    for row in results["paired"]:
        row["primary"] = False
    assert "With 50 labels per class, rotation pretraining raises fine-tuned accuracy by 14.9" in answer(results)
    results["paired"] = [row for row in results["paired"] if row["protocol"] != "finetune"]
    assert "rotation pretraining raises linear-probe accuracy by 15.9 points over a random backbone" in answer(results)
    results["paired"] = []
    assert "rotation reaches a linear-probe accuracy of 71.9 [69.9, 73.9] %" in answer(results)


def test_sign_of_the_answer_follows_the_interval() -> None:
    """Mirroring a difference turns the verdict round and keeps the numbers."""
    helps, lowers = answer(only(0.031, 0.012, 0.05)), answer(only(-0.031, -0.05, -0.012))
    assert re.findall(r"\d+\.\d", helps) == re.findall(r"\d+\.\d", lowers) == ["3.1", "1.2", "5.0"]
    assert "raises" in helps
    assert "lowers" in lowers


@pytest.mark.parametrize("width", [72, 80, 110, 200])
def test_table_holds_every_cell_once_and_fits(results: dict[str, Any], width: int) -> None:
    text = format_table(results, width)
    assert text.isascii()
    assert all(len(line) <= width for line in text.splitlines())
    cells = re.findall(r"\d+\.\d \[\d+\.\d, \d+\.\d\]", text)
    expected = [
        f"{100 * r['mean']:.1f} [{100 * r['ci_low']:.1f}, {100 * r['ci_high']:.1f}]" for r in results["summary"]
    ]
    assert sorted(cells) == sorted(expected)


def test_table_cells_stand_under_their_label_count(results: dict[str, Any]) -> None:
    """Read the text back by the columns of its head and find the numbers that went in."""
    blocks = format_table(results).split("\n\n")[1:-1]
    read = {}
    for block, protocol in zip(blocks, ("linear", "knn", "finetune"), strict=True):
        _, _, head, *lines = block.splitlines()
        ends = {int(m.group()): m.end() for m in re.finditer(r"\d+", head)}
        for line in lines:
            for labels, end in ends.items():
                value = re.search(r"(\d+\.\d) \[[^]]*\]$", line[:end])
                assert value is not None
                read[line.split()[0], protocol, labels] = float(value.group(1))
    rows = results["summary"]
    assert read == {(r["arm"], r["protocol"], r["labels_per_class"]): round(100 * r["mean"], 1) for r in rows}


def test_figure_shows_the_numbers(results: dict[str, Any]) -> None:
    """A stand-alone SVG in which equal steps of accuracy are equal heights, and labels are logarithmic."""
    root = ElementTree.fromstring(accuracy_svg(results))
    name = "{http://www.w3.org/2000/svg}"
    panels = [e for e in root.iter(f"{name}svg") if e.get("class") == "panel"]
    assert len(panels) == 3
    spots = {}
    for group in panels[0].iter(f"{name}g"):
        tip = group.find(f"{name}title")
        line = group.find(f"{name}polyline")
        if line is not None:
            points = [tuple(map(float, p.split(","))) for p in (line.get("points") or "").split()]
        if tip is not None and tip.text:
            spots.setdefault(tip.text.split(":")[0], points)  # pyright: ignore[reportPossiblyUnboundVariable]
    means = np.array([LEVELS[arm, "linear"] for arm in spots])
    xs, ys = np.array(list(spots.values())).transpose(2, 0, 1)
    slope, offset = np.polyfit(means.ravel(), ys.ravel(), 1)
    assert slope < 0
    assert np.abs(slope * means + offset - ys).max() < 0.1
    scale = np.diff(xs[0]) / np.diff(np.log(LABELS))
    assert scale[0] == pytest.approx(scale[1], abs=0.1)


def test_every_arm_keeps_one_look(tmp_path: Path, results: dict[str, Any]) -> None:
    """The legend names each arm once per figure, with the same colour in every figure."""
    page(write_folder(tmp_path, results))
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    legends = re.findall(r'<ul class="legend">(.*?)</ul>', text)
    looks = [dict(re.findall(r'class="swatch (\w+)".*?</svg>([^<]+)</li>', part)) for part in legends]
    names = [[v for _, v in re.findall(r'class="swatch (\w+)".*?</svg>([^<]+)</li>', part)] for part in legends]
    assert len(legends) == 2
    assert all(len(n) == len(set(n)) for n in names)
    assert set(looks[0].items()) >= {item for item in looks[1].items() if item[0] != "control"}


def test_report_is_free_of_torch() -> None:
    heavy = "('torch', 'timm', 'matplotlib', 'sklearn')"
    code = f"import sys, unlabel.report; print([name for name in {heavy} if name in sys.modules])"
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env)
    assert done.stdout.strip() == "[]"
