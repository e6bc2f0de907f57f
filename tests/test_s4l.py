"""S4L: the turns of unlabelled images are named in each step of fine-tuning."""

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from downstream import evaluate as ev
from downstream import finetune as ft
from downstream import s4l
from downstream.cost import print_cost
from unlabel.backbone import build_backbone

PRESET = ft.Preset("short", 40, 3e-3, batch_size=8, batchnorm="train")


def ramps(n: int, seed: int = 0) -> np.ndarray:
    """Bright at the top: (n, 32, 32, 3) that show which way up they are."""
    rng = np.random.default_rng(seed)
    rows = np.linspace(200, 50, 32)[None, :, None, None] + rng.integers(-20, 20, (n, 1, 1, 3))
    return np.broadcast_to(rows, (n, 32, 32, 3)).clip(0, 255).astype(np.uint8)


def losses(monkeypatch: pytest.MonkeyPatch, unlabelled: np.ndarray) -> list[float]:
    """Of the turns, step by step, while a network learns labels that nothing shows."""
    seen: list[float] = []

    class Recorded(s4l.Turns):
        def loss(self, backbone: torch.nn.Module, step: int, size: int) -> torch.Tensor:
            value = super().loss(backbone, step, size)
            seen.append(float(value.detach()))
            return value

    monkeypatch.setattr(ft, "Turns", Recorded)
    labelled, start = np.full((8, 32, 32, 3), 125, np.uint8), build_backbone("small", 32, "half").eval()
    ft.train(start, None, labelled, np.arange(8) % 2, 2, PRESET, 0, torch.device("cpu"), None, unlabelled=unlabelled)
    return seen


def test_the_turns_are_learned_where_images_show_them_and_only_there(monkeypatch: pytest.MonkeyPatch):
    shown = losses(monkeypatch, ramps(64))
    assert len(shown) == PRESET.steps
    assert shown[0] == pytest.approx(math.log(4), abs=0.3)
    assert np.mean(shown[-5:]) < 0.3
    even = losses(monkeypatch, np.full((64, 32, 32, 3), 90, np.uint8))
    assert np.mean(even[-5:]) == pytest.approx(math.log(4), abs=0.05)


def test_every_step_has_its_images_the_same_for_every_network():
    images = ramps(64)
    few, many = (s4l.Turns(images, channels, 3, (0.3, 1.0), flip=True) for channels in (4, 7))
    (a, turns), (b, _), (c, _) = few.views(0, 16), many.views(0, 16), few.views(1, 16)
    assert a.shape == (4 * s4l.UNLABELLED, 3, 16, 16)
    assert torch.equal(a, b)
    assert not torch.equal(a, c)
    upright = a[turns == 0]
    assert torch.allclose(a[turns == 3], torch.rot90(upright, 3, (2, 3)))
    assert torch.allclose(a[turns == 1], torch.rot90(upright, 1, (2, 3)))


def test_turned_images_train_the_network_and_leave_its_statistics():
    """Those that it classifies upright images with, which the labelled ones move."""
    backbone = build_backbone("small", 32, "half").train()
    before = {name: b.clone() for name, b in backbone.named_buffers()}
    loss = s4l.Turns(ramps(32), backbone.channels, 0, (0.3, 1.0), flip=True).loss(backbone, 0, 32)
    loss.backward()
    assert all(torch.equal(b, before[name]) for name, b in backbone.named_buffers())
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in backbone.parameters())
    backbone(torch.rand(4, 3, 32, 32))
    assert not all(torch.equal(b, before[name]) for name, b in backbone.named_buffers())


def a_table(folder: Path, *protocols: str) -> ev.Table:
    names = [str(k) for k in range(12)]
    pool = ev.Images(ramps(4), np.arange(4) % 2, names[:4], names[:4], np.arange(4))
    test = ev.Images(ramps(8, 1), np.arange(8) % 2, names[4:], names[4:], np.arange(4, 12))
    return ev.Table(pool, test, ramps(24, 2), ["a", "b"], (2,), 1, protocols, ("small", "half"), 32,
                    torch.device("cpu"), folder)  # fmt: skip


def test_as_a_protocol(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Beside fine-tuning, from the same labels; other unlabelled images are another fit, for it alone."""
    monkeypatch.setattr(ft, "_SCRATCH_FEW", (dataclasses.replace(PRESET, steps=3),))
    monkeypatch.setattr(ft, "SCRATCH_GROWTH", ft.Growth(passes=0, steps=0, at_least=0))
    fits: list[bool] = []
    real = ft.finetune
    monkeypatch.setattr(ft, "finetune", lambda *a, **k: (fits.append(k["unlabelled"] is not None), real(*a, **k))[1])
    table, arms = a_table(tmp_path, "finetune", "s4l"), [ev.Arm("scratch", "scratch")]
    rows, _ = ev.fill(table, arms, "scratch")
    assert [(r["protocol"], r["chosen"]["preset"]) for r in rows] == [("finetune", "short"), ("s4l", "short")]
    assert fits == [False, True]
    ev.fill(dataclasses.replace(table, unlabelled_id="others"), arms, None)
    assert fits == [False, True, True]
    print_cost(table, arms)
    passes = 3 * 4 + 3 * (4 + 4 * s4l.UNLABELLED)
    assert f"fine-tuning passes {passes:,} images" in capsys.readouterr().out
