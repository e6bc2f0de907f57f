"""Which score would choose the best run without labels? The study of docs/label-free.md, which holds its plan.

    STUDY="python scripts/label_free_study.py run --data runs/cvd/split/pretrain --train runs/cvd/split/pool \
        --test runs/cvd/split/development --out runs/study"
    export OMP_NUM_THREADS=1; $STUDY --share 0/2 & $STUDY --share 1/2; wait     # on two cores, half of the runs each
    python scripts/label_free_study.py judge                            # results/label_free.json and .svg, a table

The same on CIFAR-10, whose two folders have a folder for each class (words that `run` does not know go to `unlabel
pretrain`):

    python scripts/label_free_study.py run --data cifar10/train --train cifar10/train --test cifar10/test \
        --image-size 32 --stem half --out runs/study-cifar10 --rows results/label_free_cifar10
    python scripts/label_free_study.py judge --rows results/label_free_cifar10

Cost: 48 × 5 minutes of pretraining and 48 × 3 to 5 of measuring, on one core with bf16 each. What is measured of a run
lies in results/label_free/ and is not done again, so that it can be run over several days, or by several machines: the
first run of a task in each of its two ways has the minutes, the others see as many images as that one.
The photos are split by `scripts/cats_vs_dogs.py split`; the truth is asked of the development photos, and no test photo
is read by it.
"""

from __future__ import annotations

import argparse
import json
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import spearmanr
from sklearn.linear_model import LogisticRegression

from unlabel.apply import embed
from unlabel.backbone import load_backbone
from unlabel.cache import load_cache
from unlabel.checkpoint import write_atomic
from unlabel.cli import main as command_line
from unlabel.page import css
from unlabel.report_charts import figure
from unlabel.report_plots import Line, Panel, Point, nice_axis, styles
from unlabel.runfolder import RunFolder, commit, hardware, versions
from unlabel.sources import open_source

MINUTES = 5  # on one core: two such runs side by side see more images than one after the other on two
# Two ways of setting each task; with two learning rates and two sizes of the crop that makes eight.
TASKS = {
    "rotation": ("--rotation.blocks 0", "--rotation.blocks 1"),
    "jigsaw": ("--jigsaw.mode relative", "--jigsaw.mode permutation"),
    "colorization": ("--colorization.loss regression", "--colorization.loss classes"),
    "superresolution": ("--superresolution.scale 2", "--superresolution.scale 4"),
    "inpainting": ("--inpainting.mask center", "--inpainting.mask region"),
    "denoising": ("--denoising.noise gaussian", "--denoising.noise masking"),
}
RATES = ("--lr 5e-4", "--lr 2e-3")
CROPS = ("--crop 0.2 1", "--crop 0.8 1")
# Way, learning rate, crop: each setting is followed by its opposite.
SETTINGS = [(0, 0, 0), (1, 1, 1), (0, 1, 1), (1, 0, 0), (1, 0, 1), (0, 1, 0), (1, 1, 0), (0, 0, 1)]
# Which way each score is thought to be better. The probes are not asked of runs that were trained for them.
SCORES = {
    "effective_rank": 1, "rankme": 1, "alpha_req": 0, "lidar": 1, "alignment": -1, "uniformity": -1,
    "rotation_probe": 1, "jigsaw_probe": 1, "pretext": 1,
}  # fmt: skip
SHOWN = {
    "alpha_req": "minus the distance to 1",
    "alignment": "minus the alignment",
    "uniformity": "minus the uniformity",
}
WITHIN_WAYS = ("pretext", "final_loss")  # numbers of another kind where the task is set another way
RANDOM_BESIDE = "rotation-000"  # random weights are measured with this run
NULLS = ("images_seen", "final_loss", "random")
COUNTS = (10, 50)  # labels per class of the truth; the last is the primary one
DRAWS = 50
PICKS, PICK_DRAWS = (2, 10, 20), 200  # labels per class that a run may be picked by
RESAMPLES = 10_000


@dataclass(frozen=True)
class Run:
    name: str
    task: str
    flags: tuple[str, ...]
    seed: int


def runs() -> Iterator[Run]:
    """All 48, in an order in which any first part of them is as balanced as can be."""
    for k, bits in enumerate(SETTINGS):
        for t, (task, ways) in enumerate(TASKS.items()):
            flags = (ways[bits[0]], RATES[bits[1]], CROPS[bits[2]])
            yield Run(f"{task}-{''.join(map(str, bits))}", task, flags, 8 * t + k)


def share(text: str) -> slice:
    """``K/N``: every N-th of the runs from the K-th on."""
    first, _, of = text.partition("/")
    if not (first.isdecimal() and of.isdecimal() and int(first) < int(of)):
        raise argparse.ArgumentTypeError(f"{text!r}: K/N, two whole numbers, K below N")
    return slice(int(first), None, int(of))


def run_all(args: argparse.Namespace) -> None:
    """Each run is pretrained, then measured."""
    args.rows.mkdir(parents=True, exist_ok=True)
    way = {"image_size": args.image_size, "also": args.flags}
    if any(way_of(json.loads(p.read_text())) != way for p in args.rows.glob("*.json")):
        raise SystemExit(f"{args.rows} holds runs of another image size or with other flags: choose another --rows")
    for run in list(runs())[args.share]:
        if not (args.rows / f"{run.name}.json").exists():
            folder = args.out / run.name
            measured = [json.loads(p.read_text()) for p in sorted(args.rows.glob("*.json"))]
            command(*pretraining(run, folder, args, budget(run, measured)))
            row = measure(run, folder, args.train, args.test) | way
            row |= {"hardware": hardware(), "commit": commit()}
            write_atomic(args.rows / f"{run.name}.json", (json.dumps(row, indent=1) + "\n").encode())


def way_of(row: dict[str, Any]) -> dict[str, Any]:
    """What all rows have in common."""
    return {"image_size": row.get("image_size", 48), "also": row.get("also", [])}  # the first did not say


def command(*words: str) -> None:
    print(f"\n$ unlabel {shlex.join(words)}", flush=True)
    if code := command_line([*words]):
        raise SystemExit(code)


def budget(run: Run, measured: list[dict[str, Any]]) -> list[str]:
    """As many images as the runs before it of the same task and way have seen, on whatever machine; without one,
    minutes."""
    alike = [row for row in measured if (row["task"], row["way"]) == (run.task, run.flags[0]) and "passes" in row]
    return ["--epochs", repr(alike[0]["passes"])] if alike else ["--minutes", str(MINUTES)]


def pretraining(run: Run, folder: Path, args: argparse.Namespace, until: list[str]) -> list[str]:
    """The words of its command."""
    own = [word for flag in run.flags for word in flag.split()]
    words = ["pretrain", run.task, *args.flags, "--data", args.data, "--out", str(folder)]
    words += ["--image-size", str(args.image_size), *until, "--seed", str(run.seed)]
    return [*words, *own]  # the last of two of a kind counts: the plan's


def measure(run: Run, folder: Path, train: str, test: str) -> dict[str, Any]:
    """The scores, the truth, and what few labels would say."""
    out = folder / "evaluation"
    command(
        "evaluate", str(folder), "--train", train, "--test", test, "--out", str(out), "--protocol", "linear",
        "--draws", str(DRAWS), "--labels-per-class", *map(str, COUNTS), "--label-free",
        *([] if run.name == RANDOM_BESIDE else ["--no-controls"]),
    )  # fmt: skip
    return row_of(run, folder, json.loads((out / "results.json").read_text())) | {"picked": few_labels(folder, train)}


def scores_of(results: dict[str, Any], arm: str) -> dict[str, float]:
    """An arm's label-free scores, α-ReQ as minus its distance to 1, a task's first metric as its gain over trivial."""
    rows = [r for r in results["label_free"] if r["arm"] == arm]
    found = {r["score"]: r for r in reversed(rows)}
    values = {name: found[name]["value"] for name in SCORES if name in found and found[name]["value"] is not None}
    if "alpha_req" in values:
        values["alpha_req"] = -abs(values["alpha_req"] - 1)
    if own := found.get("pretext"):
        values["pretext"] = (own["value"] - own["trivial"]) * (-1 if own["better"] == "min" else 1)
    return values


def accuracies(results: dict[str, Any], arm: str) -> dict[str, list[float]]:
    """Labels per class to the linear probe's accuracy in each draw."""
    rows = [r for r in results["rows"] if (r["arm"], r["protocol"]) == (arm, "linear")]
    return {str(count): [r["accuracy"] for r in rows if r["labels_per_class"] == count] for count in COUNTS}


def row_of(run: Run, folder: Path, results: dict[str, Any]) -> dict[str, Any]:
    """What is known of a run; with one of them, also of random weights."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    random = {"scores": scores_of(results, "random"), "accuracy": accuracies(results, "random")}
    about = RunFolder(folder).read() or {}
    return {
        "name": run.name, "task": run.task, "way": run.flags[0], "flags": list(run.flags),
        "scores": scores_of(results, run.task), "accuracy": accuracies(results, run.task),
        "images_seen": about["finished"]["images_seen"], "final_loss": lines[-1]["loss"],
        "passes": about["finished"]["images_seen"] / about["data"]["images"],
        "images": about["data"]["content"],  # a hash of those that it was pretrained on
        **({"random": random} if random["scores"] else {}),
    }  # fmt: skip


def few_labels(folder: Path, train: str) -> dict[str, list[float]]:
    """For each number of labels per class: the share of them that is right in each draw, in two halves, each judged by
    a logistic regression on the other. Draws are the same for every run."""
    backbone = load_backbone(folder)
    cache = load_cache(open_source(train), backbone.spec.image_size)
    labels = np.array(cache.labels)
    classes = np.unique(labels)
    drawn = np.stack(
        [np.stack([np.random.default_rng([d, k]).permutation(np.flatnonzero(labels == c))[: max(PICKS)]
                   for k, c in enumerate(classes)]) for d in range(PICK_DRAWS)]
    )  # (draws, classes, labels)  # fmt: skip
    used, at = np.unique(drawn, return_inverse=True)
    features = embed(backbone, np.array(cache.images[used]))
    features = (features - features.mean(0)) / (features.std(0) + 1e-6)
    at = at.reshape(drawn.shape)
    found: dict[str, list[float]] = {}
    for m in PICKS:
        right = []
        for rows in at[:, :, :m]:
            halves = [(rows[:, k::2].ravel(), np.repeat(classes, m // 2)) for k in range(2)]
            for (fit, y), (judged, truth) in (halves, halves[::-1]):
                model = LogisticRegression(C=1.0 / features.shape[1], max_iter=200).fit(features[fit], y)
                right.append(float((model.predict(features[judged]) == truth).mean()))
        found[str(m)] = np.array(right).reshape(-1, 2).mean(1).tolist()
    return found


# ---- Judging


def tau_b(x: np.ndarray, y: np.ndarray) -> float:
    """Kendall's tau-b, as scipy's, of which a million calls would take minutes."""
    a, b = np.sign(x[:, None] - x), np.sign(y[:, None] - y)
    return float((a * b).sum() / np.sqrt((a * a).sum() * (b * b).sum()))


def within(score: np.ndarray, truth: np.ndarray, tasks: np.ndarray) -> float:
    """Kendall's tau-b of the runs of a task, mean over the tasks; runs without the score are left out."""
    each = []
    for task in np.unique(tasks):
        own = (tasks == task) & np.isfinite(score)
        if own.sum() > 2 and len(set(score[own])) > 1:
            each.append(tau_b(score[own], truth[own]))
    return float(np.mean(each)) if each else float("nan")


def across(score: np.ndarray, truth: np.ndarray) -> float:
    """Spearman's rho over all runs that have the score."""
    has = np.isfinite(score)
    if len(set(score[has])) < 2:
        return float("nan")
    found: Any = spearmanr(score[has], truth[has])
    return float(found.statistic)


def partial_rho(score: np.ndarray, truth: np.ndarray, given: np.ndarray) -> float:
    """Spearman's rho of what is left of both when the ranks of ``given`` are known."""
    xy, xz, yz = (
        across(score, truth),
        across(score, given),
        across(truth[np.isfinite(score)], given[np.isfinite(score)]),
    )
    return float((xy - xz * yz) / np.sqrt((1 - xz**2) * (1 - yz**2)))


def permutation_p(score: np.ndarray, truth: np.ndarray, tasks: np.ndarray, resamples: int, seed: int = 0) -> float:
    """Two-sided, of ``within``: the truth is shuffled among the runs of each task."""
    rng, seen = np.random.default_rng(seed), abs(within(score, truth, tasks))
    if not np.isfinite(seen):
        return 1.0
    groups = [np.flatnonzero((tasks == t) & np.isfinite(score)) for t in np.unique(tasks)]
    beyond = 0
    for _ in range(resamples):
        shuffled = truth.copy()
        for rows in groups:
            shuffled[rows] = truth[rng.permutation(rows)]
        beyond += abs(within(score, shuffled, tasks)) >= seen - 1e-12
    return (1 + beyond) / (1 + resamples)


def holm(p: dict[str, float]) -> dict[str, float]:
    """Adjusted p-values (Holm 1979)."""
    out, largest = {}, 0.0
    for k, name in enumerate(sorted(p, key=p.__getitem__)):
        largest = max(largest, min(1.0, (len(p) - k) * p[name]))
        out[name] = largest
    return out


def regret(score: np.ndarray, truth: np.ndarray) -> float:
    """How much better the best run is than the one that the score puts first; ties are drawn by lot, in the mean."""
    has = np.isfinite(score)
    first = score == score[has].max()
    return float(truth.max() - truth[first].mean())


def reliability(draws: np.ndarray, tasks: np.ndarray) -> dict[str, float]:
    """Of the truth (runs, draws): how its two halves agree, and what that makes of the whole (Spearman & Brown).

    Both are judged on the same photos, so that this is an upper bound.
    """
    a, b = draws[:, ::2].mean(1), draws[:, 1::2].mean(1)
    rho = across(a, b)
    return {"tau_within": within(a, b, tasks), "rho": rho, "rho_whole": 2 * rho / (1 + rho)}


def resampled(tasks: np.ndarray, resamples: int, seed: int = 0) -> Iterator[np.ndarray]:
    """Rows of the runs, drawn anew within each task."""
    rng = np.random.default_rng(seed)
    groups = [np.flatnonzero(tasks == t) for t in np.unique(tasks)]
    for _ in range(resamples):
        yield np.concatenate([rng.choice(rows, len(rows)) for rows in groups])


def interval(values: list[float]) -> list[float]:
    known = np.array(values)[np.isfinite(values)]
    return [float(v) for v in np.percentile(known, [2.5, 97.5])] if len(known) else [float("nan")] * 2


def judged(rows: list[dict[str, Any]], resamples: int = RESAMPLES) -> dict[str, Any]:
    """All that the plan names, for the truth with each number of labels."""
    tasks = np.array([r["task"] for r in rows])
    ways = np.array([f"{r['task']} {r['way']}" for r in rows])
    seen = np.array([r["images_seen"] for r in rows], float)
    scores = {
        name: np.array([r["scores"].get(name, np.nan) for r in rows]) * (sign or 1) for name, sign in SCORES.items()
    }
    nulls = {
        "images_seen": seen,
        "final_loss": -np.array([r["final_loss"] for r in rows]),
        "random": np.random.default_rng(0).normal(size=len(rows)),
    }
    found: dict[str, Any] = {}
    for count in COUNTS:
        draws = np.array([r["accuracy"][str(count)] for r in rows])
        truth = draws.mean(1)
        table: dict[str, Any] = {}
        for name, score in {**scores, **nulls}.items():
            groups = ways if name in WITHIN_WAYS else tasks
            again = list(resampled(groups, min(resamples, 2000)))
            row: dict[str, Any] = {
                "tau_within": within(score, truth, groups),
                "tau_interval": interval([within(score[k], truth[k], groups[k]) for k in again]),
                "p": permutation_p(score, truth, groups, resamples),
            }
            if name not in WITHIN_WAYS:
                row["rho_across"] = across(score, truth)
                row["rho_interval"] = interval([across(score[k], truth[k]) for k in again])
                row["regret"] = 100 * regret(score, truth)
                if name not in NULLS:
                    row["rho_given_images_seen"] = partial_rho(score, truth, seen)
            row["regret_within"] = 100 * float(
                np.mean([regret(score[groups == g], truth[groups == g]) for g in np.unique(groups[np.isfinite(score)])])
            )
            table[name] = row
        for name, p in holm({n: table[n]["p"] for n in SCORES}).items():
            table[name]["p_holm"] = p
        sure = {n: table[n]["tau_within"] for n in SCORES if table[n]["p_holm"] < 0.05 and table[n]["tau_within"] > 0}
        picks = {m: np.array([r["picked"][str(m)] for r in rows]) for m in PICKS}
        found[str(count)] = {
            "scores": table,
            "winner": max(sure, key=sure.__getitem__) if sure else None,
            "reliability": reliability(draws, tasks),
            "random_pick": 100 * float(truth.max() - truth.mean()),
            "picked_by_labels": {
                str(m): 100 * float(np.mean([regret(a[:, d], truth) for d in range(a.shape[1])]))
                for m, a in picks.items()
            },
            "truth": dict(zip([r["name"] for r in rows], truth.tolist(), strict=True)),
        }
    return found


def picture(rows: list[dict[str, Any]], count: int) -> str:
    """SVG: for each score that all tasks share a chart of the truth against it, random weights beside the runs."""
    tasks, random = list(TASKS), [r["random"] for r in rows if "random" in r]
    style, panels = styles([*tasks, "random"]), []
    for name in (name for name in SCORES if name not in WITHIN_WAYS):
        shown = {t: [r for r in rows if r["task"] == t and name in r["scores"]] for t in tasks} | {
            "random": [r for r in random if name in r["scores"]]
        }
        points = {
            t: [
                Point(
                    r["scores"][name] * (SCORES[name] or 1),
                    float(np.mean(r["accuracy"][str(count)])),
                    tip=r.get("name", ""),
                )
                for r in of
            ]
            for t, of in shown.items()
        }
        every = [p for of in points.values() for p in of]
        if every:
            x = nice_axis(min(p.x for p in every), max(p.x for p in every), SHOWN.get(name, name))
            y = nice_axis(min(p.y for p in every), max(p.y for p in every), percent=True)
            lines = [Line(t, style[t], of, joined=False) for t, of in points.items() if of]
            panels.append(Panel(f"% right with {count} labels, {name}", lines, x, y))
    return figure(panels, css(), 3)


def judge(args: argparse.Namespace) -> None:
    rows = [json.loads(p.read_text()) for p in sorted(args.rows.glob("*.json"))]
    missing = sorted({r.name for r in runs()} - {r["name"] for r in rows})
    if missing:
        raise SystemExit(f"{len(missing)} of 48 runs are not measured yet: {', '.join(missing[:6])} …")
    found = judged(rows)
    about = {"judged": found, "versions": versions(), "commit": commit()}
    args.rows.with_suffix(".json").write_text(json.dumps(about, indent=1) + "\n")
    args.rows.with_suffix(".svg").write_text(picture(rows, COUNTS[-1]), "utf-8")
    for count, part in found.items():
        print(f"\n{shown(part, count, [r['random'] for r in rows if 'random' in r])}")


def shown(part: dict[str, Any], count: str, random: list[dict[str, Any]]) -> str:
    """What was judged of the truth with ``count`` labels per class, as text."""
    agree, lines = part["reliability"], [f"truth: linear probe, {count} labels per class"]
    lines.append(f"two halves of its draws: tau {agree['tau_within']:.2f} within tasks, rho {agree['rho']:.2f} across")
    lines += ["", f"{'':<16}{'tau within tasks':<22}{'p':>9}{'rho':>7}{'given seen':>12}{'regret':>8}{'within':>8}"]
    for name, r in part["scores"].items():
        low, high = r["tau_interval"]
        tau = f"{r['tau_within']:+.2f} [{low:+.2f}, {high:+.2f}]"
        p = f"{r['p_holm']:.4f}" if "p_holm" in r else f"({r['p']:.4f})"
        rho, given = (f"{r[key]:+.2f}" if key in r else "" for key in ("rho_across", "rho_given_images_seen"))
        lost = f"{r['regret']:.1f}" if "regret" in r else ""
        lines.append(f"{name:<16}{tau:<22}{p:>9}{rho:>7}{given:>12}{lost:>8}{r['regret_within']:>8.1f}")
    labels = ", ".join(f"{lost:.1f} by {m}" for m, lost in part["picked_by_labels"].items())
    lines += ["", f"regret, in points: {part['random_pick']:.1f} of a random pick; {labels} labels per class"]
    for other in random:
        own = ", ".join(f"{name} {value:.3g}" for name, value in other["scores"].items())
        lines.append(f"random weights: {100 * np.mean(other['accuracy'][count]):.1f} % ({own})")
    return "\n".join([*lines, f"winner: {part['winner']}"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = parser.add_subparsers(required=True)
    run = parts.add_parser("run")
    for name in ("--data", "--train", "--test"):
        run.add_argument(name, required=True)
    run.add_argument("--out", type=Path, default=Path("runs/study"))
    run.add_argument("--image-size", type=int, default=48)
    run.add_argument(
        "--share", type=share, default="0/1", metavar="K/N", help="every N-th run from the K-th on; K from 0"
    )
    run.set_defaults(part=run_all)
    judging = parts.add_parser("judge")
    judging.set_defaults(part=judge)
    for part in (run, judging):
        part.add_argument("--rows", type=Path, default=Path("results/label_free"), help="where what is measured lies")
    args, args.flags = parser.parse_known_args()
    if args.flags and args.part is judge:
        parser.error(f"unknown: {' '.join(args.flags)}")
    args.part(args)


if __name__ == "__main__":
    main()
