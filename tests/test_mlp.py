"""The dense backbone: features, files, other sizes; and that a linear autoencoder of it is PCA."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.linalg import subspace_angles
from sklearn.datasets import load_digits
from sklearn.decomposition import PCA

from downstream import finetune as ft
from pretext.autoencoder import Autoencoder
from pretext.task import Batch
from unlabel.backbone import build_backbone, load_backbone, parameter_stages, save_backbone
from unlabel.cli import main
from unlabel.draws import Draws
from unlabel.errors import UserError


def test_stages_are_the_layers(tmp_path: Path):
    backbone = build_backbone("mlp:20-10:linear", 16, seed=3).eval()
    images = torch.rand(5, 3, 16, 16)
    features = backbone(images)
    assert backbone.stage_names == ("l1", "l2")
    assert [tuple(m.shape) for m in features.stages.values()] == [(5, 20, 1, 1), (5, 10, 1, 1)]
    w = {k: v.detach().numpy() for k, v in backbone.model.state_dict().items()}
    x = backbone.normalise(images).numpy().reshape(5, -1)
    for k in range(2):
        x = x @ w[f"layers.{k}.dense.0.weight"].T + w[f"layers.{k}.dense.0.bias"]
    assert np.allclose(features.pooled.detach().numpy(), x, atol=1e-4)
    assert {n.split(".")[1]: s for n, s in parameter_stages(backbone).items()} == {"0": 0, "1": 1}
    save_backbone(backbone, tmp_path)
    assert torch.equal(load_backbone(tmp_path)(images).pooled, features.pooled)
    larger = torch.nn.functional.interpolate(images, (20, 20), mode="nearest")
    assert backbone(larger).pooled.shape == (5, 10)


def test_names_that_are_wrong():
    for name in ("mlp:", "mlp:10-", "mlp:-5", "mlp:0", "mlp:ten", "mlp:10:cosine"):
        with pytest.raises(UserError, match=r"--backbone mlp"):
            build_backbone(name, 16)
    with pytest.raises(UserError, match="no stem"):
        build_backbone("mlp:10", 16, "small")


def test_a_linear_autoencoder_spans_what_pca_spans():
    """Squared error, linear layers, centred digits: largest principal angle between codes and PCA scores below 1°."""
    flat = np.asarray(load_digits(return_X_y=True)[0]) / 16
    pca = PCA(5).fit(flat)
    scores = pca.transform(flat)
    assert pca.explained_variance_[3] / pca.explained_variance_[4] > 1.4  # a clear gap after the fourth
    torch.manual_seed(0)
    task = Autoencoder(build_backbone("mlp:4:linear", 8), Autoencoder.Config(code=4, loss="mse")).double()
    backbone = task.backbone.double()
    images = torch.tensor(flat - flat.mean(0)).view(-1, 1, 8, 8) + backbone.get_buffer("mean")
    batch = Batch(images, Draws(0, [0] * len(images), range(len(images))), 0.0)
    optimizer = torch.optim.LBFGS(
        [*task.parameters(), *backbone.parameters()], max_iter=700, max_eval=6000, history_size=50,
        tolerance_grad=0, tolerance_change=0, line_search_fn="strong_wolfe",
    )  # fmt: skip

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = task(batch)["loss"]
        loss.backward()
        return loss

    optimizer.step(closure)  # type: ignore[arg-type]
    code = task.encode(backbone.normalise(images)).detach().numpy()
    angle, other = (np.rad2deg(subspace_angles(code - code.mean(0), scores[:, k : k + 4]).max()) for k in (0, 1))
    assert angle < 1, angle
    assert other > 45  # not just any four


def test_from_pretraining_to_a_classifier(digits_folder: Path, tmp_path: Path):
    """The ordinary commands, with layers for stages; fine-tuned at the size that a ConvNet would be."""
    data, out = str(digits_folder), str(tmp_path / "run")
    line = ["pretrain", "autoencoder", "--backbone", "mlp:64-32", "--data", data, "--out", out, "--image-size", "16"]
    assert main([*line, "--epochs", "2", "--autoencoder.code", "8"]) == 0
    assert main(["evaluate", out, "--train", data, "--labels-per-class", "5", "--draws", "2"]) == 0
    backbone = load_backbone(out)
    assert backbone.stage_names == ("l1", "l2")
    assert len(ft._groups(ft.Classifier(backbone, 4), ft.Preset("x", 1, 1.0))) == 6  # head and layers, decayed or not
