"""scripts/greedy.py: what is held out where, and its error against the layers, one by one."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from downstream.features import pixels_of
from scripts import greedy
from unlabel import checkpoint
from unlabel.cache import ImageCache, load_cache
from unlabel.errors import UserError
from unlabel.sources import open_source


def test_rates_are_chosen_on_images_that_are_held_out(
    digits_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    for name, value in {"WIDTHS": "8-4", "RATES": (1e-3, 3e-2), "SEEDS": 1}.items():
        monkeypatch.setattr(greedy, name, value)
    images = load_cache(open_source(str(digits_folder)), greedy.SIZE)
    apart, test = images.subset(np.arange(len(images)) % 6 == 5), images.subset(np.arange(50))
    args = argparse.Namespace(train=str(digits_folder), activation="relu", minutes=0.002, out=tmp_path)
    found = greedy.one_way(args, "joint", images, test)
    for rate, asked in zip(greedy.RATES, found["rates"], strict=True):
        run = tmp_path / f"joint-{rate:g}"
        assert set((run / "excluded.txt").read_text().split()) == set(apart.hashes)
        assert asked["error"] == pytest.approx(_by_hand(run, apart), rel=1e-3)
    last, run = found["runs"][0], tmp_path / "joint-seed0"
    assert not (run / "excluded.txt").exists()
    assert last["lr"] == min(found["rates"], key=lambda r: r["error"])["lr"]
    assert last["error"] == pytest.approx(_by_hand(run, test), rel=1e-3)
    assert greedy.one_way(args, "joint", images, test) == found  # and nothing is trained twice
    args.minutes = 0.02
    with pytest.raises(UserError, match="minutes"):
        greedy.one_way(args, "joint", images, test)


def _by_hand(run: Path, asked: ImageCache) -> float:
    """Two dense layers and back, out of the checkpoint's arrays."""
    state = checkpoint.load_newest(run / "checkpoints")
    assert state is not None
    w = {k: np.asarray(v.double()) for k, v in state["model"].items() if torch.is_floating_point(v)}
    about = json.loads((run / "backbone.json").read_text())
    images = pixels_of(asked, greedy.SIZE, 3)
    mean, std = (np.array(about[k])[:, None, None] for k in ("mean", "std"))
    x = ((images - mean) / std).reshape(len(images), -1)
    for k in range(2):
        at = f"backbone.model.layers.{k}.dense"
        x = x @ w[f"{at}.0.weight"].T
        x = (x - w[f"{at}.1.running_mean"]) / np.sqrt(w[f"{at}.1.running_var"] + 1e-5)
        x = np.maximum(x * w[f"{at}.1.weight"] + w[f"{at}.1.bias"], 0)
    ups = "tasks.stacked.ups"
    x = np.maximum(x @ w[f"{ups}.1.layer.weight"][:, :, 0, 0].T + w[f"{ups}.1.layer.bias"], 0)
    x = (x @ w[f"{ups}.0.layer.weight"].T + w[f"{ups}.0.layer.bias"]).reshape(images.shape)
    painted = (x * std + mean).clip(0, 1)
    return float(((painted - images) ** 2).sum((2, 3)).mean())
