"""scripts/seeds.py: evaluations of one run each become the seeds of arms."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from downstream.stats import paired
from scripts import seeds
from unlabel.errors import UserError


def folder(at: Path, right: dict[str, np.ndarray], images: int = 60) -> Path:
    """What `unlabel evaluate` leaves: (1, draws, images) for each arm, protocol and number of labels."""
    at.mkdir()
    names = np.array([f"{k}.png".encode() for k in range(images)])
    np.savez_compressed(at / "predictions.npz", test_names=names, test_clusters=np.arange(images) // 2, **right)  # type: ignore[arg-type]
    return at


def runs(at: Path, name: str, share: float, task: str) -> list[Path]:
    rng = np.random.default_rng(len(name))
    return [
        folder(
            at / f"{name}-{k}",
            {f"{task}|linear|10": rng.random((1, 4, 60)) < share, "random|linear|10": rng.random((1, 4, 60)) < 0.1},
        )
        for k in range(3)
    ]


def test_the_first_arm_less_each_other(tmp_path: Path):
    arms = {"both": runs(tmp_path, "both", 0.9, "rotation+instance"), "one": runs(tmp_path, "one", 0.5, "rotation")}
    first, other = seeds.compare(arms, "linear")
    right = {
        arm: np.stack([np.load(f / "predictions.npz")[f"{task}|linear|10"][0] for f in arms[arm]])
        for arm, task in (("both", "rotation+instance"), ("one", "rotation"))
    }
    assert first["mean"] == pytest.approx(right["both"].mean())
    assert other["mean"] == pytest.approx(right["one"].mean())
    assert "first_less_this" not in first
    difference = other["first_less_this"]
    assert difference["mean"] == pytest.approx(right["both"].mean() - right["one"].mean())
    wanted = paired(right["both"], right["one"], np.arange(60) // 2)
    assert (difference["ci_low"], difference["ci_high"], difference["n_seeds"]) == (wanted.ci_low, wanted.ci_high, 3)
    better = [
        b.mean() > o.mean() for b, o in zip(right["both"].reshape(12, 60), right["one"].reshape(12, 60), strict=True)
    ]
    assert other["draws_in_which_first_is_better"] == pytest.approx(np.mean(better))
    assert "both less it +" in seeds.show([first, other])


def test_what_cannot_be_joined(tmp_path: Path):
    one, other = (
        runs(tmp_path, "one", 0.5, "rotation"),
        folder(tmp_path / "other", {"vae|linear|10": np.ones((1, 4, 50), bool)}, 50),
    )
    with pytest.raises(UserError, match="other test images"):
        seeds.compare({"one": one, "other": [other]}, "linear")
    with pytest.raises(UserError, match="other test images"):
        seeds.compare({"one": [*one, other]}, "linear")
    with pytest.raises(UserError, match="measured by knn"):
        seeds.compare({"one": one}, "knn")
    two = folder(tmp_path / "two", {f"{task}|linear|10": np.ones((1, 4, 60), bool) for task in ("vae", "rotation")})
    with pytest.raises(UserError, match=r"not \['rotation', 'vae'\]"):
        seeds.compare({"two": [two]}, "linear")
