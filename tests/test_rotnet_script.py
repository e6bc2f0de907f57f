"""scripts/rotnet.py: the parts of the published recipe that are written anew there."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

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
    for arm, right in (("reference", "1100"), ("rotation", "1110")):
        row = {"arm": arm, "right": right, "held_out": 0, "epochs": 2.0, "judge_epochs": 1.0, "minutes": 1.5}
        (tmp_path / f"{arm}.json").write_text(json.dumps(row))
    rotnet.table(tmp_path)
    out = capsys.readouterr().out
    half = 1.96 * 100 * np.std([0, 0, 1, 0], ddof=1) / 2
    assert f"75.00 %  1 seed(s), 1.5 minutes  +25.00 [{25 - half:+.2f}, {25 + half:+.2f}]" in out
    assert "test images, 2 epochs" in out
