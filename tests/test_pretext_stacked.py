"""The stacked autoencoder: which stage learns when, what is corrupted, what is recovered."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from pretext.stacked import Stacked
from pretext.task import Batch
from pretext.trained import load_trained
from unlabel import optim
from unlabel.backbone import build_backbone
from unlabel.config import PretrainConfig
from unlabel.draws import Draws
from unlabel.errors import UserError
from unlabel.pretrain import Together, pretrain

FAMILIES = ["resnet18", "resnetv2_50", "convnext_atto", "regnety_002", "efficientnet_b0", "mobilenetv3_small_050"]


def make(backbone: str = "small", size: int = 32, **settings) -> Stacked:
    torch.manual_seed(0)
    return Stacked(build_backbone(backbone, size), Stacked.Config(**settings))


def batch_of(images: torch.Tensor, epoch: int = 0) -> Batch:
    return Batch(images, Draws(0, [epoch] * len(images), list(range(len(images)))), 0.5)


@pytest.mark.parametrize("backbone", ["small", "mlp:24-12-6"])
def test_one_stage_at_a_time_then_all(backbone: str, colour_photos: torch.Tensor):
    task = make(backbone)
    model = Together(task.backbone, {"stacked": task}, [1.0])
    assert task.phases == task.stages + 1
    for phase in range(task.phases):
        task.begin(phase)
        before = {k: v.clone() for k, v in model.state_dict().items()}
        (optimizer,) = optim.make_optimizers(task.backbone, task.param_groups(), "adamw", 1e-2, 0.01)
        model.train()
        loss, _ = model(batch_of(colour_photos[:8]))
        loss.backward()
        assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
        optimizer.step()
        moved = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
        weights = {k.removeprefix("backbone.model.") for k in moved if "running" not in k and "num_batches" not in k}
        stages = {task.stage_of[k] for k in weights if k in task.stage_of}
        ups = {int(k.split(".")[3]) for k in weights if k.startswith("tasks.stacked.ups.")}
        everything = set(range(task.stages))
        assert stages == ({phase} if phase < task.stages else everything)
        assert ups == ({phase} if phase < task.stages else everything)
        model.zero_grad()


def test_the_stages_before_are_in_eval_mode(colour_photos: torch.Tensor):
    """Their BatchNorm statistics stay, although the loop puts everything into training mode at each step."""
    task = make()
    model = Together(task.backbone, {"stacked": task}, [1.0])
    task.begin(2)
    before = {k: v.clone() for k, v in task.backbone.model.state_dict().items() if "running" in k}
    for _ in range(2):
        model.train()
        model(batch_of(colour_photos[:8]))
    stage = {
        k: max(s for n, s in task.stage_of.items() if n.rpartition(".")[0] == k.rpartition(".")[0]) for k in before
    }
    for k, v in before.items():
        assert torch.equal(task.backbone.model.state_dict()[k], v) is (stage[k] < 2), k
    task.begin(task.stages)
    model.train()
    assert all(m.training for m in task.backbone.modules())


def test_noise_enters_at_the_stages_own_input(colour_photos: torch.Tensor):
    """What is to be recovered is clean, and the stages before see the clean image."""
    task = make(level=0.5).eval()
    task.backbone.eval()
    clean = task.backbone(colour_photos[:4])
    images = task.backbone.normalise(colour_photos[:4])
    draws = batch_of(colour_photos[:4]).draws
    target, outputs = task.stage_outputs(images, 2, draws)
    names = task.backbone.stage_names
    assert torch.equal(target, clean.stages[names[1]])
    assert torch.equal(outputs[0], clean.stages[names[0]])
    assert not torch.equal(outputs[2], clean.stages[names[2]])
    again = task.backbone(colour_photos[:4])  # the hook is gone
    assert torch.equal(again.last, clean.last)
    target, outputs = task.stage_outputs(images, 0, draws)
    assert torch.equal(target, images)
    assert not torch.equal(outputs[0], clean.stages[names[0]])
    quiet = make(level=0.0).eval()
    quiet.backbone.eval()
    assert torch.equal(quiet.stage_outputs(images, 2, draws)[1][-1], quiet.backbone(colour_photos[:4]).last)


def test_no_channel_gives_a_masked_pixel_away(colour_photos: torch.Tensor):
    """The network gets a grey image grey."""
    task, given = make(level=0.5), []
    conv = next(m for m in task.backbone.modules() if isinstance(m, torch.nn.Conv2d))
    conv.register_forward_pre_hook(lambda _module, args: given.append(args[0]))
    grey = colour_photos[:2].mean(1, keepdim=True).expand(-1, 3, -1, -1)
    for phase in (0, task.stages):
        task.begin(phase)
        task(batch_of(grey))
        gone = given[-1] == 0
        assert 0.4 < float(gone.float().mean()) < 0.6
        assert torch.equal(gone, gone[:, :1].expand_as(gone))
    shown = task.show(batch_of(grey))["input"]
    assert torch.allclose(shown, shown[:, :1].expand_as(shown), atol=0.2)  # where masked, each channel has its own mean


def test_noise_is_as_strong_as_asked_for(colour_photos: torch.Tensor):
    images = colour_photos[:8] + 0.5
    draws = batch_of(images).draws
    gone = make(level=0.3).corrupt(images, draws) == 0
    assert float(gone.float().mean()) == pytest.approx(0.3, abs=0.01)
    assert not torch.equal(gone[:, 0], gone[:, 1])  # of what a stage puts out, value by value
    gone = make(level=0.3).corrupt(images, draws, image=True) == 0
    assert float(gone.float().mean()) == pytest.approx(0.3, abs=0.01)
    assert torch.equal(gone, gone[:, :1].expand_as(gone))
    noise = make(noise="gaussian", level=0.3).corrupt(images, draws) - images
    assert torch.allclose(noise.std((1, 2, 3)) / images.std((1, 2, 3)), torch.tensor(0.3), rtol=0.05)
    assert torch.equal(make(noise="none").corrupt(images, draws), images)


@pytest.mark.parametrize("backbone", ["resnet18", "convnext_atto"])
def test_a_grey_image_has_grey_noise(backbone: str, colour_photos: torch.Tensor):
    """As a person sees it: what the network gets is normalised by another deviation in each channel."""
    task = make(backbone, noise="gaussian", level=0.5)
    std = task.backbone.get_buffer("std")
    assert len(set(std.flatten().tolist())) == 3
    images = colour_photos[:4].clone()
    images[::2] = images[::2].mean(1, keepdim=True)
    normalised = task.backbone.normalise(images)
    noise = task.corrupt(normalised, batch_of(images).draws, image=True) - normalised
    added = noise * std  # in colours of [0, 1], before they are clipped
    assert torch.allclose(added[::2], added[::2, :1].expand(-1, 3, -1, -1), atol=1e-5)
    assert (added[1::2] - added[1::2].roll(1, 1)).abs().mean((2, 3)).min() > 0.05
    assert torch.allclose(noise.std((1, 2, 3)) / normalised.std((1, 2, 3)), torch.tensor(0.5), rtol=0.1)


@pytest.mark.parametrize(("backbone", "positive"), [("small", True), ("resnet18", True), ("convnext_atto", False)])
def test_what_is_recovered_is_signed_as_the_stage_is(backbone: str, positive: bool, colour_photos: torch.Tensor):
    """Between two decoders negative values are cut off where the stage below has none, and there alone."""
    task = make(backbone).eval()
    task.backbone.eval()
    assert len(task.positive) == task.stages
    assert all(task.positive) == positive
    images = task.backbone.normalise(colour_photos[:4])
    _, outputs = task.stage_outputs(images, None, batch_of(colour_photos[:4]).draws)
    sides = [images.shape[-1], *(o.shape[-1] for o in outputs)]
    with torch.no_grad():
        assert bool((outputs[0] >= 0).all()) == positive
        between = task.ups[1](outputs[1], sides[1])
        assert between.min() < 0
        cut = between.relu()
        signed, unsigned = (task.ups[0](maps, sides[0]) for maps in (between, cut))
        found = task.recovered(outputs[1], 1, 0, sides)
    assert not torch.allclose(signed, unsigned, atol=1e-4)
    assert torch.allclose(found, unsigned if positive else signed, atol=1e-6)


@pytest.mark.parametrize("name", FAMILIES)
def test_families_come_apart(name: str):
    """The stage after the cut is computed from what the hook puts in its place, in every family."""
    task = make(name, 64).eval()
    task.backbone.eval()
    images = torch.rand(2, 3, 64, 64)
    clean = [*task.backbone(images).stages.values()]
    for cut in range(1, task.stages):
        target, outputs = task.stage_outputs(task.backbone.normalise(images), cut, batch_of(images).draws)
        assert torch.equal(target, clean[cut - 1])
        assert not torch.equal(outputs[cut], clean[cut])


def test_each_phase_learns_on_a_short_real_run(digits_folder: Path, tmp_path: Path):
    data = (str(digits_folder),)
    config = PretrainConfig(
        ("stacked",), data, tmp_path, image_size=16, epochs=60, log_every=10, batch_size=32, backbone="mlp:128-64"
    )
    lines = [json.loads(line) for line in (pretrain(config) / "metrics.jsonl").read_text().splitlines()]
    errors = [line["metrics"]["stacked/error"] for line in lines]
    third = len(errors) // 3
    for phase in range(3):
        part = errors[phase * third : (phase + 1) * third]
        assert part[-1] < 0.8, (phase, part)
        assert part[-1] < part[0]


def test_each_stage_improves_the_reconstruction():
    """Held-out digits from stage k through all decoders below it: far better after its phase than before. And all
    stages together improve on what the last of them left."""
    flat = np.asarray(load_digits(return_X_y=True)[0], np.float32) / 16
    images = torch.from_numpy(flat).view(-1, 1, 8, 8).expand(-1, 3, -1, -1)
    held, shown = images[1500:], images[:1500]
    task = make("mlp:64-32-16", 8, noise="none")
    model = Together(task.backbone, {"stacked": task}, [1.0])

    def error() -> float:
        """Of the newest stage, as a share of the pixels' variance."""
        model.eval()
        return float(task.surprise(batch_of(held)).mean() / held.var(0, correction=0).mean())

    errors = []
    for phase in range(task.phases):
        task.begin(phase)
        before = error()
        (optimizer,) = optim.make_optimizers(task.backbone, task.param_groups(), "adamw", 3e-3, 0.01)
        for step in range(300):
            model.train()
            rows = torch.randint(len(shown), (64,), generator=torch.Generator().manual_seed(step))
            loss, _ = model(batch_of(shown[rows]))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        errors.append((before, error()))
    for before, after in errors[:-1]:
        assert after < 0.5 * min(before, 1.0), errors
    assert errors[-1][0] == errors[-2][1]
    assert errors[-1][1] < 0.9 * errors[-1][0], errors


def test_without_greedy_all_stages_train_from_the_start(digits_folder: Path, tmp_path: Path):
    task = make("mlp:24-12-6", greedy=False)
    assert task.phases == 1
    task.begin(0)
    assert all(p.requires_grad for p in [*task.parameters(), *task.backbone.parameters()])
    data = (str(digits_folder),)
    config = PretrainConfig(
        ("stacked",), data, tmp_path, image_size=16, epochs=20, log_every=10, batch_size=32, backbone="mlp:64-32",
        task_settings={"stacked": {"greedy": False}},
    )  # fmt: skip
    lines = [json.loads(line) for line in (pretrain(config) / "metrics.jsonl").read_text().splitlines()]
    errors = [line["metrics"]["stacked/error"] for line in lines]
    assert errors[-1] < 0.6 * errors[0]
    trained = load_trained(tmp_path)
    assert isinstance(trained, Stacked)
    assert trained.phase == trained.stages


def test_wrong_settings():
    wrong: list[dict[str, Any]] = [{"noise": "x"}, {"level": -0.1}, {"level": 1.0}, {"greedy": False, "joint": False}]
    for settings in wrong:
        with pytest.raises(UserError, match="stacked"):
            make(**settings)
