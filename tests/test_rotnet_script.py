"""scripts/rotnet.py: the parts of the published recipe that are written anew there."""

from __future__ import annotations

import argparse
import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from downstream.stats import paired
from scripts import rotnet

PIXELS = np.random.default_rng(0).integers(0, 256, (130, 32, 32, 3), np.uint8)


def test_shifts_and_mirror_images():
    out = rotnet.shifted(torch.from_numpy(PIXELS[:40]), torch.Generator().manual_seed(0)).numpy()
    found = []
    for before, after in zip(PIXELS, out, strict=False):
        padded = np.pad(before, ((4, 4), (4, 4), (0, 0)))
        at = [
            (y, x, flip)
            for y in range(9) for x in range(9) for flip in (1, -1)
            if np.array_equal(padded[y : y + 32, x : x + 32][:, ::flip], after)
        ]  # fmt: skip
        found += at
    assert len(found) == 40  # each is one shift of its own image
    for column, least in zip(zip(*found, strict=True), (6, 6, 2), strict=True):
        assert len(set(column)) >= least


def test_batches_are_passes():
    steps = list(rotnet.batches(300, 1.5, torch.Generator().manual_seed(0)))
    assert [progress for _, progress in steps] == pytest.approx([0, 1 / 3, 2 / 3])
    first, second, third = (rows.tolist() for rows, _ in steps)
    assert len({*first, *second}) == 256
    assert sorted(third) != sorted(first)


def test_three_drops_by_five(monkeypatch: pytest.MonkeyPatch):
    class Recording(torch.optim.SGD):
        def step(self, closure=None):
            rates.append(self.param_groups[0]["lr"])
            assert self.param_groups[0]["weight_decay"] == 5e-4
            assert self.param_groups[0]["nesterov"]

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(1))

        def forward(self, pixels: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
            return self.weight.sum()

    rates: list[float] = []
    monkeypatch.setattr(torch.optim, "SGD", Recording)
    rotnet.train(Model(), (PIXELS, np.zeros(130, int)), 10, rotnet.DROPS[0], 0)
    assert rates == pytest.approx([0.1] * 3 + [0.02] * 3 + [0.004] * 2 + [0.0008] * 2)


def test_the_judge_leaves_the_blocks_as_they_are():
    torch.manual_seed(0)
    blocks = torch.nn.Sequential(*rotnet.NIN().blocks[:2])
    judge = rotnet.Judge(blocks, rotnet.normalised, 3)
    before = {k: v.clone() for k, v in judge.state_dict().items()}
    rotnet.train(judge, (PIXELS, np.arange(130) % 3), 1, rotnet.DROPS[1], 0)
    changed = {k.split(".")[0] for k, v in judge.state_dict().items() if not torch.equal(v, before[k])}
    assert changed == {"classifier"}
    assert [tuple(p.shape) for p in judge.classifier.parameters() if p.ndim == 2] == [(60, 12288), (60, 60), (3, 60)]


def test_the_table_pairs_images(tmp_path: Path, capsys: pytest.CaptureFixture):
    rng = np.random.default_rng(0)
    right = {arm: rng.random((3, 50)) < share for arm, share in (("reference", 0.5), ("rotation", 0.7))}
    for arm, seeds in right.items():
        for seed, each in enumerate(seeds):
            bits = "".join(map(str, each.astype(int)))
            row = {"arm": arm, "right": bits, "seed": seed, "held_out": 0, "epochs": 2.0, "judge_epochs": 1.0}
            (tmp_path / f"{arm}-{seed}.json").write_text(json.dumps(row | {"minutes": 1.5}))
    rotnet.table(tmp_path)
    wanted = paired(right["rotation"][:, None], right["reference"][:, None], np.arange(50))
    ends = [f"{100 * v:+.2f}" for v in (wanted.mean, wanted.ci_low, wanted.ci_high)]
    out = capsys.readouterr().out
    assert "test images, 2 passes" in out
    assert f"{100 * right['rotation'].mean():.2f} %, 3 seed(s), 1.5 minutes  {ends[0]} [{ends[1]}, {ends[2]}]" in out
    assert "(seeds and images)" in out
    (tmp_path / "rotation-2.json").unlink()
    rotnet.table(tmp_path)
    two = 100 * (right["rotation"][:2].mean() - right["reference"][:2].mean())  # of the seeds that both have
    assert f" {two:+.2f} [" in (out := capsys.readouterr().out)
    assert "(images only)" in out


def test_held_out_images_give_no_labels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, digits_folder: Path):
    seen = {}

    def measure(arm, known, sets, args):
        seen.update(known=known, sets=sets)
        return {"accuracy": 1.0}

    monkeypatch.setattr(rotnet, "measure", measure)
    words = ["rotnet.py", str(digits_folder), "--hold-out", "40", "--arms", "rotation", "--out", str(tmp_path)]
    monkeypatch.setattr("sys.argv", words)
    rotnet.main()
    (kept, kept_classes), (held, held_classes) = seen["sets"]
    known = {im.tobytes() for im in seen["known"][0]}
    assert len(held) == len(held_classes) == 40
    assert len(kept) == len(kept_classes) == len(seen["known"][0]) - 40
    assert {im.tobytes() for im in kept} | {im.tobytes() for im in held} == known
    assert not {im.tobytes() for im in kept} & {im.tobytes() for im in held}
    assert [p.name for p in tmp_path.iterdir()] == ["rotation-100-50-0-held40.json"]
    monkeypatch.setattr("sys.argv", [*words[:2], str(tmp_path / "none"), *words[4:]])
    with pytest.raises(SystemExit, match=r"rotnet\.py: .*none"):
        rotnet.main()


def test_an_arm_gets_as_many_views_as_the_reference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    told: list[str] = []
    monkeypatch.setattr(rotnet, "command_line", lambda words: told.extend(words) or 1)
    args = argparse.Namespace(train="photos", epochs=60.0, seed=3, device="cpu")
    with pytest.raises(SystemExit):
        rotnet.ours("rotation+instance", 10, args, torch.device("cpu"))
    assert told[:3] == ["pretrain", "rotation", "instance"]
    known = dict(pairwise(told))
    assert (known["--epochs"], known["--seed"], known["--device"], known["--data"]) == ("40.0", "3", "cpu", "photos")
