from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch

from downstream import choosing
from downstream import finetune as ft
from downstream.classifier import load_classifier, save_classifier
from downstream.table import Arm, Images, Table
from unlabel.backbone import build_backbone, save_backbone
from unlabel.draws import Draws
from unlabel.errors import UserError


def two_shades(n: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Dark and light noisy images (n, 40, 40, 3): a task that a few steps can learn."""
    rng = np.random.default_rng(seed)
    y = np.arange(n) % 2
    images = np.where(y[:, None, None, None] == 1, 170, 80) + rng.integers(-40, 40, (n, 40, 40, 3))
    return images.astype(np.uint8), y


def test_protocol_table():
    for count, n in ((1, 1), (4, 1), (5, 1), (24, 1), (25, 3), (250, 3)):
        tuned, scratch = ft.presets_for(count, False), ft.presets_for(count, True)
        assert len(tuned) == n == len(scratch)
        assert min(p.steps for p in scratch) >= max(p.steps for p in tuned)
        assert all(p.batchnorm == "eval" for p in tuned)
        assert all(p.batchnorm == "train" and p.top_layers is None for p in scratch)
    assert ft.presets_for(1, False)[0].top_layers == 1
    assert ft.presets_for(10, False)[0].top_layers is None
    assert all(p.top_layers == 2 for p in ft.presets_for(50, False, top_layers=2))


def test_dense_networks_have_their_own_presets_where_labels_are_many(tmp_path: Path):
    tuned, scratch = (ft.presets_for(1000, s, 1, 10_000, dense=True) for s in (False, True))
    assert [p.lr for p in tuned] == [p.lr for p in scratch] == [5e-4, 1e-3, 2e-3]
    assert all(p.layer_decay == 1 for p in (*tuned, *scratch))
    assert {p.batchnorm for p in ft.presets_for(1000, False, None, 10_000, dense=True)} == {"train"}
    assert {p.batchnorm for p in tuned} == {"eval"}  # what is frozen keeps its statistics, too
    assert [{p.top_layers for p in presets} for presets in (tuned, scratch)] == [{1}, {None}]
    passes = [{p.steps * p.batch_size // 10_000 for p in presets} for presets in (tuned, scratch)]
    assert passes == [{26}, {38}]
    assert {p.steps * p.batch_size for p in scratch} == {12_000 * 32}  # as other networks
    assert ft.presets_for(1000, False, None, 15_000, dense=True)[0].steps == 2_100
    for from_scratch in (False, True):
        shipped = ft.presets_for(10, from_scratch, labels=10_000)
        assert ft.presets_for(10, from_scratch, labels=10_000, dense=True) == shipped
    none = Images(np.zeros((0, 8, 8, 3), np.uint8), np.zeros(0, int), [], [], np.zeros(0, int))
    for backbone, first in (("mlp:8", "dense-slow"), ("small", "gentle")):
        table = Table(
            none, none, None, ["a", "b"], (50,), 1, ("finetune",), (backbone, "auto"), 8, torch.device("cpu"), Path()
        )
        assert table.presets(50, Arm("of the table", "backbone"))[0].name == first
        save_backbone(build_backbone("mlp:8" if backbone == "small" else "small", 32), tmp_path)
        assert table.presets(50, Arm("another", "backbone", (0,), (tmp_path,)))[0].name != first


def test_steps_grow_with_the_labels():
    """Passes over the labels while there are few of them; then a bounded number of steps; then passes again."""

    def steps(scratch: bool, labels: int) -> set[int]:
        return {p.steps for p in ft.presets_for(250, scratch, labels=labels)}

    assert ft.presets_for(50, False, labels=100) == ft.presets_for(50, False)
    assert steps(False, 500) == {407}
    assert steps(True, 500) == {1500}
    assert steps(False, 4_000) == steps(False, 12_000) == {3250}
    assert steps(True, 4_000) == steps(True, 24_000) == {12_000}
    assert steps(False, 32_000) == {8 * 1000}
    assert steps(True, 32_000) == {16 * 1000}
    assert [ft.presets_for(10, scratch, labels=20)[0].steps for scratch in (False, True)] == [100, 120]
    assert [ft.presets_for(10, scratch, labels=100)[0].steps for scratch in (False, True)] == [100, 300]
    assert [ft.presets_for(10, scratch, labels=1_000)[0].steps for scratch in (False, True)] == [250, 3000]
    for labels in (1, 20, 100, 500, 1_000, 3_000, 10_000, 60_000):
        assert min(steps(True, labels)) >= max(steps(False, labels))


def test_blocks_are_the_stages_from_the_top():
    backbone = build_backbone("small", 32)
    groups = ft._blocks(backbone)
    name_of = {id(p): n for n, p in backbone.model.named_parameters()}
    names = [{name_of[id(p)].split(".")[0] for p in group} for group in groups]
    assert names == [{"layer4"}, {"layer3"}, {"layer2"}, {"layer1", "conv1", "bn1"}]
    assert sum(len(g) for g in groups) == len(name_of)


def test_the_presets_crop_decides_what_is_seen():
    """Of images that have no mirror image, six tenths at least."""
    images, y = two_shades(16)

    def head(crop: float, flip: bool) -> torch.Tensor:
        backbone = build_backbone("small", 32, flip=flip).eval()
        return ft.finetune(backbone, images, y, 2, [ft.Preset("x", 2, 1e-2, crop=crop)]).model.head.weight

    assert not torch.equal(head(0.6, True), head(0.3, True))
    assert torch.equal(head(0.6, False), head(0.3, False))
    assert not torch.equal(head(0.8, False), head(0.3, False))


def test_frozen_below_the_top_and_batchnorm_stays(monkeypatch: pytest.MonkeyPatch):
    images, y = two_shades(16)
    backbone = build_backbone("small", 32).eval()
    before = copy.deepcopy(backbone.model.state_dict())
    preset = ft.Preset("top", 5, 1e-2, top_layers=1)
    tuned = ft.finetune(backbone, images, y, 2, [preset])
    after = tuned.model.backbone.model.state_dict()
    moved = {k.split(".")[0] for k in before if not torch.equal(before[k], after[k])}
    assert moved == {"layer4"}
    assert not any("running" in k and not torch.equal(before[k], after[k]) for k in before)
    assert all(torch.equal(before[k], v) for k, v in backbone.model.state_dict().items())  # the original is whole


def test_learns_starts_from_the_head_and_is_deterministic():
    images, y = two_shades(32)
    backbone = build_backbone("small", 32).eval()
    preset = ft.Preset("all", 25, 2e-3)
    seen: list[int] = []
    a = ft.finetune(backbone, images, y, 2, [preset], on_step=seen.append)
    b = ft.finetune(backbone, images, y, 2, [preset])
    assert len(seen) == 25
    logits = ft.predict_logits(a.model, images)
    assert np.array_equal(logits, ft.predict_logits(b.model, images))
    assert (logits.argmax(1) == y).mean() > 0.95
    head = (np.stack([np.full(256, -1.0), np.full(256, 1.0)]), np.array([3.0, -3.0]))
    still = ft.finetune(backbone, images, y, 2, [ft.Preset("still", 1, 0.0)], head=lambda rows: head)
    assert torch.allclose(still.model.head.weight, torch.tensor(head[0], dtype=torch.float32))


@pytest.mark.parametrize(("most", "learned", "steps"), [(2000, 48, 24), (40, 40, 5 + 10 + 5)])
def test_the_choice_uses_held_out_labels_and_refits_on_all(most: int, learned: int, steps: int, monkeypatch):
    """Of many labels it uses some (25 of a class at least), and each as often as in the end."""
    monkeypatch.setattr(choosing, "MAX_LABELS", most)
    images, y = two_shades(60)
    backbone = build_backbone("small", 32).eval()
    presets = [ft.Preset("broken", 6, 0.0), ft.Preset("works", 12, 2e-3), ft.Preset("also broken", 6, 0.0)]
    rows_seen: list[int] = []

    def head(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        rows_seen.append(len(rows))
        return np.zeros((2, 256)), np.zeros(2)

    tuned = ft.finetune(backbone, images, y, 2, presets, head=head)
    assert tuned.chosen["preset"] == "works"
    assert not tuned.on_grid_edge
    assert len(tuned.chosen["holdout_log_loss"]) == 3
    assert rows_seen == [learned, learned, learned, 60]
    assert tuned.steps == steps + 12
    held = ft._holdout(y, 0, np.arange(len(y)))
    assert np.bincount(y[held]).tolist() == [6, 6]


def test_a_preset_that_diverges_is_not_chosen():
    images, y = two_shades(60)
    backbone = build_backbone("small", 32).eval()
    presets = [ft.Preset("diverges", 3, 1e30), ft.Preset("works", 12, 2e-3), ft.Preset("slow", 3, 1e-5)]
    tuned = ft.finetune(backbone, images, y, 2, presets)
    assert tuned.chosen["preset"] == "works"
    nothing, best, other = tuned.chosen["holdout_log_loss"]
    assert nothing is None
    assert best < other
    assert np.isfinite(ft.predict_logits(tuned.model, images)).all()
    with pytest.raises(UserError, match=r"not finite numbers \(preset diverges, peak 1e\+30\)"):
        ft.finetune(backbone, images, y, 2, presets[:1])


def test_predictions_average_the_mirror_and_ignore_batches():
    images, _ = two_shades(10)
    model = ft.Classifier(build_backbone("small", 32), 3).eval()
    logits = ft.predict_logits(model, images)
    assert np.allclose(logits, ft.predict_logits(model, images[:, :, ::-1]), atol=1e-5)
    assert np.allclose(logits[:3], ft.predict_logits(model, images[:3], batch_size=2), atol=1e-5)


def test_without_flips_no_mirror_image_is_ever_seen(monkeypatch):
    """Neither in fine-tuning nor in predicting, where the backbone was told that a mirror image is another thing."""
    images, y = two_shades(10)
    images = images.copy()
    images[:, :, :16] = 0  # dark on the left: mirrored, it would be on the right
    seen: list[torch.Tensor] = []
    real = ft.Classifier.forward
    monkeypatch.setattr(ft.Classifier, "forward", lambda self, x: (seen.append(x.detach()), real(self, x))[1])
    for flip, mirrored in ((True, True), (False, False)):
        seen.clear()
        backbone = build_backbone("small", 32, flip=flip)
        tuned = ft.finetune(backbone, images, y, 2, [ft.Preset("short", 4, 1e-3, crop=1.0)])
        ft.predict_logits(tuned.model, images)
        views = torch.cat(seen)
        assert bool((views[..., 28:].mean((1, 2, 3)) < views[..., :4].mean((1, 2, 3)) - 0.05).any()) == mirrored


@pytest.mark.parametrize(("pretrained_at", "tuned_at"), [(32, 32), (47, 47), (48, 60), (64, 80)])
def test_images_are_a_quarter_larger_than_in_pretraining(pretrained_at: int, tuned_at: int, monkeypatch):
    images, y = two_shades(10)
    seen: list[tuple[int, ...]] = []
    forward = ft.Classifier.forward

    def watched(self: ft.Classifier, x: torch.Tensor) -> torch.Tensor:
        seen.append(tuple(x.shape[2:]))
        return forward(self, x)

    monkeypatch.setattr(ft.Classifier, "forward", watched)
    backbone = build_backbone("small", pretrained_at).eval()
    tuned = ft.finetune(backbone, images, y, 2, [ft.Preset("short", 2, 1e-3)])
    assert seen == [(tuned_at, tuned_at)] * 2
    ft.predict_logits(tuned.model, images)
    assert seen == [(tuned_at, tuned_at)] * 4
    ft.finetune(backbone, images, y, 2, [ft.Preset("short", 1, 1e-3, larger=False)])
    assert seen[4:] == [(pretrained_at, pretrained_at)]


def test_cutout_hides_one_square():
    images = torch.rand(6, 3, 40, 40) * 0.4
    out = ft.cutout(images, Draws(0, [0] * 6, range(6)), share=0.3)
    hidden = (out != images).all(1).flatten(1).sum(1)
    assert (hidden > 0).all()
    assert hidden.max() <= 13 * 13
    assert torch.equal(out[out != images], torch.full_like(out[out != images], 0.5))


def test_classifier_round_trip_and_errors(tmp_path):
    images, _ = two_shades(4)
    model = ft.Classifier(build_backbone("small", 32), 2).eval()
    save_classifier(model, ["=cmd", "däg"], tmp_path, "key")
    again, classes = load_classifier(tmp_path)
    assert classes == ["=cmd", "däg"]
    assert np.array_equal(ft.predict_logits(model, images), ft.predict_logits(again, images))
    (tmp_path / "classifier.safetensors").write_bytes(b"not weights")
    with pytest.raises(UserError, match="not a readable"):
        load_classifier(tmp_path)
    with pytest.raises(UserError, match="no classifier"):
        load_classifier(tmp_path / "nowhere")
    with pytest.raises(UserError, match="two classes"):
        ft.finetune(model.backbone, images, np.zeros(4, int), 2, [ft.Preset("x", 1, 1e-3)])
