"""scripts/seeds.py: evaluations of one run each become the seeds of arms."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from downstream.stats import paired
from scripts import seeds
from unlabel.errors import UserError


def folder(at: Path, right: dict[str, np.ndarray], images: int = 60) -> Path:
    """What `unlabel evaluate` leaves: (1, draws, images) for each arm, protocol and number of labels."""
    at.mkdir()
    (at / "splits.json").write_text(f'{{"images": {images}}}')
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
    one, ones = runs(tmp_path, "one", 0.5, "rotation"), np.ones((1, 4, 60), bool)

    def refused(why: str, *folders: Path, protocol: str = "linear") -> None:
        with pytest.raises(UserError, match=why):
            seeds.compare({"one": one[: len(folders)], "other": [*folders]}, protocol)

    refused("other images", folder(tmp_path / "images", {"vae|linear|10": np.ones((1, 4, 50), bool)}, 50))
    refused("other numbers of labels", folder(tmp_path / "counts", {"vae|linear|20": ones}))
    refused("several seeds", folder(tmp_path / "several", {"vae|linear|10": np.ones((3, 4, 60), bool)}))
    refused(
        r"not \['rotation', 'vae'\]", folder(tmp_path / "two", {f"{t}|linear|10": ones for t in ("vae", "rotation")})
    )
    refused("measured by knn", *one[:2], protocol="knn")
    with pytest.raises(UserError, match="as many folders"):
        seeds.compare({"one": one, "other": one[:2]}, "linear")


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    both, one = (",".join(map(str, runs(tmp_path, n, s, t))) for n, s, t in (("b", 0.9, "vae"), ("o", 0.5, "rotation")))
    monkeypatch.setattr("sys.argv", ["seeds.py", f"b={both}", f"o={one}", "--out", str(tmp_path / "out.json")])
    seeds.main()
    assert "over pretraining seeds" in capsys.readouterr().out
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert [(r["arm"], r["labels_per_class"], len(r["folders"])) for r in rows] == [("b", 10, 3), ("o", 10, 3)]
    for words, why in (([f"b={both}", f"b={one}"], "twice"), ([f"b={tmp_path / 'none'}"], "none")):
        monkeypatch.setattr("sys.argv", ["seeds.py", *words])
        with pytest.raises(SystemExit, match=f"seeds.py: .*{why}"):
            seeds.main()
