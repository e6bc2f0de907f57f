"""What every entry of TASKS has to do: a new task is tested by being in the table."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pretext import TASKS, load_task
from pretext.task import Batch
from unlabel import optim
from unlabel.backbone import build_backbone
from unlabel.draws import Draws
from unlabel.previews import save_previews


def make(name: str, model: str = "small", size: int = 32):
    torch.manual_seed(0)
    cls = load_task(name)
    return cls(build_backbone(model, size), cls.Config())


def batch_of(images: torch.Tensor, epoch: int = 0, rows: slice = slice(None)) -> Batch:
    index = list(range(len(images)))[rows]
    return Batch(images[rows], Draws(0, [epoch] * len(index), index), 0.5)


@pytest.mark.parametrize("name", TASKS)
def test_metrics_trivial_and_previews(name: str, colour_photos: torch.Tensor, tmp_path: Path):
    task, batch = make(name), batch_of(colour_photos[:8])
    task.train()
    out = task(batch)
    assert set(out) == {"loss", *task.metrics}
    assert out["loss"].shape == ()
    assert out["loss"].requires_grad
    assert not any(out[k].requires_grad for k in task.metrics)
    assert set(task.trivial(batch)) == set(task.metrics)
    shown = task.show(batch)
    for key in ("input", "target", "prediction"):
        assert shown[key].shape == (8, 3, 32, 32)
    (path,) = save_previews({name: task}, {name: batch}, tmp_path, 3)
    assert Image.open(path).size[0] > 8 * 32
    # Every buffer stays as it is, also in the middle of training: save_previews switches to eval and back.
    task.train()
    task.backbone.train()
    before = {k: v.clone() for m in (task, task.backbone) for k, v in m.state_dict().items()}
    save_previews({name: task}, {name: batch}, tmp_path, 4)
    after = {k: v for m in (task, task.backbone) for k, v in m.state_dict().items()}
    assert all(torch.equal(after[k], before[k]) for k in before)
    assert task.training
    assert task.backbone.training


@pytest.mark.parametrize("name", TASKS)
def test_config_is_frozen_plain_and_documented(name: str):
    cls = load_task(name).Config
    assert dataclasses.is_dataclass(cls)
    config = cls()
    field = dataclasses.fields(cls)[0].name
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(config, field, None)
    assert TASKS[name][1]


@pytest.mark.parametrize("name", TASKS)
def test_loss_is_a_mean_over_images(name: str, colour_photos: torch.Tensor):
    """Two halves average to the whole (batch statistics frozen): so two processes equal one.

    A task that compares images cannot be: what is asked of it in two processes is in test_pretrain.
    """
    task = make(name, "convnext_atto").eval()
    task.backbone.eval()
    whole = task(batch_of(colour_photos[:16]))["loss"]
    halves = [task(batch_of(colour_photos[:16], rows=rows))["loss"] for rows in (slice(0, 8), slice(8, 16))]
    assert torch.allclose(whole, torch.stack(halves).mean(), atol=1e-5) != task.across


@pytest.mark.parametrize("name", TASKS)
def test_a_short_training_beats_trivial(name: str, colour_photos: torch.Tensor):
    """Loss falls on a real batch, and every metric passes what a network that learned nothing scores."""
    task = make(name)
    task.train()
    optimizers = optim.make_optimizers(task.backbone, task.param_groups(), "adamw", 3e-3, 0.01)
    losses, last = [], {}
    for step in range(48):
        out = task(batch_of(colour_photos[:16], epoch=step % 4))
        out["loss"].backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        losses.append(out["loss"].item())
        last = {k: float(out[k]) for k in task.metrics}
    assert np.mean(losses[-5:]) < 0.85 * np.mean(losses[:5])
    trivial = task.trivial(batch_of(colour_photos[:16]))
    for metric, direction in task.metrics.items():
        better = last[metric] > trivial[metric] if direction == "max" else last[metric] < trivial[metric]
        assert better, (metric, last[metric], trivial[metric])


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("model", ["mobilenetv3_small_050", "convnext_atto"])
def test_other_backbones_get_gradients(name: str, model: str):
    task = make(name, model, 64)
    task(batch_of(torch.rand(2, 3, 64, 64)))["loss"].backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in task.backbone.parameters())


@pytest.mark.parametrize("name", TASKS)
def test_what_a_trained_task_is_used_for(name: str, colour_photos: torch.Tensor):
    """Surprise is a function of each image and its draws; codes and repaired images have their shapes."""
    task = make(name).eval()
    task.backbone.eval()
    surprise = task.surprise(batch_of(colour_photos[:6]))
    assert surprise.shape == (6,)
    alone = [task.surprise(batch_of(colour_photos[:6], rows=slice(k, k + 1))) for k in range(6)]
    assert torch.allclose(torch.cat(alone), surprise, rtol=1e-3, atol=1e-6)
    images = colour_photos[:6]
    assert task.can("to_code") == task.can("from_code")
    if task.can("to_code"):
        code = task.to_code(images)
        assert code.shape[0] == 6
        made = task.from_code(code, 32)
        assert made.shape == (6, 3, 32, 32)
        assert 0 <= float(made.min()) <= float(made.max()) <= 1
    if task.can("restore"):
        hidden = torch.zeros(6, 1, 32, 32, dtype=torch.bool)
        hidden[:, :, 8:20, 8:20] = True
        made = task.restore(images, hidden)
        assert made.shape == images.shape
        assert 0 <= float(made.min()) <= float(made.max()) <= 1
