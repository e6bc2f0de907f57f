"""The contractive autoencoder: its penalty against autograd's whole Jacobian, finite differences, and its escape."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pretext.contractive import Contractive, TwiceDifferentiable, squared_jacobian
from pretext.task import Batch
from unlabel.backbone import build_backbone
from unlabel.batchnorm import frozen_statistics
from unlabel.draws import Draws
from unlabel.errors import UserError


def make(backbone: str = "small", size: int = 32, **settings) -> Contractive:
    torch.manual_seed(0)
    return Contractive(build_backbone(backbone, size), Contractive.Config(**settings))


def batch_of(images: torch.Tensor) -> Batch:
    return Batch(images, Draws(0, [0] * len(images), list(range(len(images)))), 0.5)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("backbone", ["small", "mlp:24-12:tanh"])
def test_exact_equals_the_whole_jacobian(backbone: str, training: bool, colour_photos: torch.Tensor):
    """Per example, inside a batch, BatchNorm as it is used: running statistics, that the forward pass has moved."""
    task = make(backbone, code=4, projections=0).train(training)
    task.backbone.train(training)
    batch = batch_of(colour_photos[:3])
    task(batch)  # moves the statistics in training mode
    found = task.sensitivity(batch)
    assert task.backbone.training is training
    assert all(
        m.training is training for m in task.backbone.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)
    )
    task.eval()
    task.backbone.eval()
    for k in range(3):
        image = task.backbone.normalise(colour_photos[k : k + 1])
        whole = torch.autograd.functional.jacobian(lambda x: task.encode(x)[0], image)
        assert isinstance(whole, torch.Tensor)
        assert whole.shape == (4, 1, 3, 32, 32)
        assert float(found[k].detach()) == pytest.approx(float(whole.square().sum()) / 4, rel=1e-3)


def test_the_estimate_is_unbiased(colour_photos: torch.Tensor):
    exact = make("mlp:12:tanh", code=4, projections=0).eval()
    estimate = make("mlp:12:tanh", code=4, projections=2000).eval()
    for task in (exact, estimate):
        task.backbone.eval()
    want = exact.sensitivity(batch_of(colour_photos[:16])).mean().detach()
    found = estimate.sensitivity(batch_of(colour_photos[:16])).mean().detach()
    assert float(found) == pytest.approx(float(want), rel=0.01)


def test_the_penaltys_own_gradient_against_finite_differences():
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(3, 1, 2, 3, generator=generator, dtype=torch.float64)
    w = (torch.rand(4, 6, generator=generator, dtype=torch.float64) - 0.5).requires_grad_(True)

    def penalty(weight: torch.Tensor) -> torch.Tensor:
        x = images.clone().requires_grad_(True)
        return squared_jacobian(torch.tanh(x.flatten(1) @ weight.T), x, None, 0).mean()

    (gradient,) = torch.autograd.grad(penalty(w), w)
    step = 1e-6
    for i in range(4):
        for j in range(6):
            shift = torch.zeros_like(w)
            shift[i, j] = step
            slope = (penalty(w.detach() + shift) - penalty(w.detach() - shift)) / (2 * step)
            assert float(gradient[i, j]) == pytest.approx(float(slope.detach()), rel=1e-5, abs=1e-8)
    # Closed form for a tanh layer (Rifai 2011): sum over units of (1 - h²)² times the squared length of its weights.
    h = torch.tanh(images.flatten(1) @ w.detach().T)
    closed = ((1 - h.square()).square() * w.detach().square().sum(1)).sum(1).mean()
    assert float(penalty(w).detach()) == pytest.approx(float(closed), rel=1e-9)


def test_a_smaller_code_is_no_way_out(colour_photos: torch.Tensor):
    task = make(code=8, projections=0).eval()
    task.backbone.eval()
    before = task.sensitivity(batch_of(colour_photos[:2])).detach()
    with torch.no_grad():
        task.code.into.weight.mul_(0.5)
        assert task.code.into.bias is not None
        task.code.into.bias.mul_(0.5)
    assert torch.allclose(task.sensitivity(batch_of(colour_photos[:2])).detach(), before, rtol=0.02)


def test_lbfgs_trains_it():
    """The exact penalty is a function of the weights alone: a line search finds its way down at each iteration, and
    further than the default optimiser with as many evaluations (scripts/contractive_lbfgs.py, fewer digits)."""
    script = runpy.run_path(str(Path(__file__).parents[1] / "scripts" / "contractive_lbfgs.py"))
    run = script["compared"](digits=60, evaluations=200, seed=0, rates=())
    lbfgs, path = run["lbfgs"], np.array(run["lbfgs"]["path"])
    assert len(path) > 100
    assert (np.diff(path) < 0).all()
    assert path[-1] == pytest.approx(lbfgs["loss"], rel=1e-9)
    assert lbfgs["loss"] < 0.8 * min(adamw["loss"] for adamw in run["adamw"]) < 0.8 * path[0]
    assert lbfgs["gradient_norm"] < 0.1 * lbfgs["gradient_norm_at_start"]
    assert lbfgs["sensitivity"] > 1e-3  # not by a code that stands still


def test_the_clipped_line_is_the_hard_sigmoid():
    x = torch.linspace(-5, 5, 41, requires_grad=True)
    with TwiceDifferentiable():
        line = F.hardsigmoid(x)
        (slope,) = torch.autograd.grad(line.sum(), x, create_graph=True)
    assert torch.allclose(line, F.hardsigmoid(x.detach()))
    assert torch.allclose(slope.detach()[14:27], torch.full((13,), 1 / 6))


def test_frozen_statistics_stay_and_come_back():
    backbone = build_backbone("small", 32).train()
    before = {k: v.clone() for k, v in backbone.state_dict().items()}
    with frozen_statistics(backbone):
        backbone(torch.rand(4, 3, 32, 32))
    assert all(torch.equal(v, before[k]) for k, v in backbone.state_dict().items())
    backbone(torch.rand(4, 3, 32, 32))
    assert not all(torch.equal(v, before[k]) for k, v in backbone.state_dict().items())


def test_gradients_are_of_the_statistics_that_were_used():
    """Another task of the same step moves them before the gradient is taken."""
    found = []
    for moved in (False, True):
        torch.manual_seed(0)
        backbone, images = build_backbone("small", 32, seed=0).train(), torch.rand(4, 3, 32, 32)
        with frozen_statistics(backbone):
            out = backbone(images).pooled.square().sum()
        if moved:
            backbone(3 * torch.rand(4, 3, 32, 32))
        out.backward()
        found.append([p.grad for p in backbone.parameters() if p.grad is not None])
    assert len(found[0]) > 10
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_wrong_settings():
    wrong: list[dict[str, Any]] = [{"code": 1}, {"loss": "l1"}, {"penalty": -1.0}, {"projections": -1}]
    for settings in wrong:
        with pytest.raises(UserError, match="contractive"):
            make(**settings)
