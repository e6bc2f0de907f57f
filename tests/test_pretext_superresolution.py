from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from pretext.superresolution import SuperResolution, enlarge, reduce
from pretext.task import Batch
from unlabel.backbone import build_backbone
from unlabel.draws import Draws
from unlabel.errors import UserError
from unlabel.quality import psnr


def make(**settings) -> SuperResolution:
    torch.manual_seed(0)
    return SuperResolution(build_backbone("small", 32), SuperResolution.Config(**settings))


def batch_of(images: torch.Tensor) -> Batch:
    return Batch(images, Draws(0, [0] * len(images), list(range(len(images)))), 0.5)


def test_psnr_by_hand():
    images = torch.zeros(2, 3, 4, 4)
    guess = images.clone()
    guess[0] += 0.1
    guess[1, 0, 0, 0] = 0.5
    want = [20.0, -10 * math.log10(0.25 / 48)]
    assert psnr(guess, images).tolist() == pytest.approx(want, abs=1e-4)


def test_an_untrained_head_is_bicubic(colour_photos: torch.Tensor):
    for scale in (2, 4):
        task, batch = make(scale=scale).eval(), batch_of(colour_photos[:8])
        assert float(task(batch)["psnr_rgb"]) == pytest.approx(task.trivial(batch)["psnr_rgb"], abs=0.05)
        small = F.interpolate(batch.images, scale_factor=1 / scale, mode="bicubic", antialias=True).clamp(0, 1)
        assert torch.equal(reduce(batch.images, scale), small)
        assert small.shape[-1] == 32 // scale


def test_what_is_cut_away_has_no_influence(colour_photos: torch.Tensor):
    """Detail that the reduction loses changes nothing that the network sees."""
    task = make().eval()
    images = colour_photos[:4]
    other = enlarge(reduce(images, 4), 32)
    change = images - other
    again = images - 1e-3 * (
        change - enlarge(F.interpolate(change, scale_factor=0.25, mode="bicubic", antialias=True), 32)
    )
    assert torch.allclose(task.blurred(batch_of(images)), task.blurred(batch_of(again)), atol=2e-3)
    seen = []
    task.backbone.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    task(batch_of(images))
    assert torch.equal(seen[0], other)


def test_every_stage_learns(colour_photos: torch.Tensor):
    task = make()
    torch.nn.init.normal_(task.pyramid.paint[-1].weight, std=0.1)  # type: ignore[arg-type]
    task(batch_of(colour_photos[:4]))["loss"].backward()
    assert all(p.grad is not None for p in task.backbone.parameters())


def test_wrong_settings():
    for settings in ({"scale": 3}, {"width": 12}, {"width": 0}):
        with pytest.raises(UserError, match="superresolution"):
            make(**settings)
    with pytest.raises(UserError, match="dense layers keep no places"):
        SuperResolution(build_backbone("mlp:24-12", 32), SuperResolution.Config())
