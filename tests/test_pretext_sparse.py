"""The sparse autoencoder: its penalties against closed forms, and the ways to escape them."""

from __future__ import annotations

import pytest
import torch
from torch.distributions import Bernoulli, kl_divergence

from pretext.sparse import Sparse, bernoulli_kl, sparseness
from pretext.task import Batch
from unlabel import optim
from unlabel.backbone import build_backbone
from unlabel.draws import Draws
from unlabel.errors import UserError


def make(**settings) -> Sparse:
    torch.manual_seed(0)
    return Sparse(build_backbone("small", 32), Sparse.Config(**settings)).eval()


def batch_of(images: torch.Tensor) -> Batch:
    return Batch(images, Draws(0, [0] * len(images), list(range(len(images)))), 0.5)


def test_kl_against_torch():
    mean = torch.linspace(0.01, 0.99, 25)
    want = kl_divergence(Bernoulli(torch.tensor(0.05)), Bernoulli(mean))
    assert torch.allclose(bernoulli_kl(0.05, mean), want, atol=1e-6)
    assert float(bernoulli_kl(0.05, torch.tensor(0.05))) == pytest.approx(0, abs=1e-7)
    assert torch.isfinite(bernoulli_kl(0.05, torch.tensor([0.0, 1.0]))).all()


def test_sparseness_by_hand():
    one, all_alike = torch.eye(4)[:2], torch.full((2, 4), 3.0)
    assert torch.allclose(sparseness(one, 1), torch.ones(2))
    assert torch.allclose(sparseness(all_alike, 1), torch.zeros(2), atol=1e-6)
    assert sparseness(torch.zeros(2, 4), 1).tolist() == [0, 0]
    # (1 - (3/4)² / (5/4)) / (3/4)
    assert float(sparseness(torch.tensor([2.0, 1.0, 0.0, 0.0]), 0)) == pytest.approx((1 - 0.5625 / 1.25) / 0.75)
    some = torch.rand(5, 7)
    assert torch.allclose(sparseness(some, 0), sparseness(10 * some, 0))


def test_the_penalty_in_the_loss(colour_photos: torch.Tensor):
    for penalty in ("l1", "kl"):
        code = make(penalty=penalty).encode(colour_photos[:6]).detach()
        assert (code >= 0).all()
        without, with_it = (make(penalty=penalty, weight=w)(batch_of(colour_photos[:6]))["loss"] for w in (0.0, 2.0))
        if penalty == "l1":
            want = code.sum(1).mean() / (3 * 32 * 32)
        else:
            want = kl_divergence(Bernoulli(torch.tensor(0.05)), Bernoulli(code.mean(0))).mean()
        assert float((with_it - without).detach()) == pytest.approx(2 * float(want), rel=1e-3)


def test_a_smaller_code_with_larger_parts_is_no_way_out(colour_photos: torch.Tensor):
    """Parts ten times as large paint the same: only a larger code could make up for a smaller one."""
    task = make(units=16)
    code = task.encode(colour_photos[:4])
    painted = task.parts(code, 32)
    with torch.no_grad():
        task.parts.weight.mul_(10)
    assert torch.allclose(task.parts(code, 32), painted, atol=1e-4)
    assert not torch.allclose(task.parts(code / 10, 32), painted, atol=1e-2)
    lengths = torch.stack([(task.parts(one[None], 32) - task.parts(0 * one[None], 32)).norm() for one in torch.eye(16)])
    assert torch.allclose(lengths, torch.ones(16), atol=1e-4)


def trained(colour_photos: torch.Tensor, steps: int, **settings) -> tuple[Sparse, dict[str, torch.Tensor]]:
    task = make(**settings).train()
    (optimizer,) = optim.make_optimizers(task.backbone, task.param_groups(), "adamw", 3e-3, 0.0)
    out: dict[str, torch.Tensor] = {}
    for _ in range(steps):
        out = task(batch_of(colour_photos[:32]))
        out["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
    return task, out


def test_the_mean_activation_reaches_its_target(colour_photos: torch.Tensor):
    task, _ = trained(colour_photos, 60, penalty="kl", weight=10.0, target=0.2, units=32)
    mean = task.encode(colour_photos[:32]).detach().mean(0)
    assert (mean - 0.2).abs().max() < 0.05
    assert float(task.encode(colour_photos[:32]).detach().std(0).mean()) > 0.02  # and not by a constant code


def test_more_weight_gives_a_smaller_code(colour_photos: torch.Tensor):
    (loose, without), (tight, with_it) = (trained(colour_photos, 30, units=32, weight=w) for w in (0.0, 1.0))
    code, smaller = (t.encode(colour_photos[:32]).detach().sum() for t in (loose, tight))
    assert smaller < 0.9 * code
    assert with_it["error"] > without["error"]
    assert without["error"] < loose.trivial(batch_of(colour_photos[:32]))["error"]


def test_wrong_settings():
    for settings in ({"units": 1}, {"penalty": "l2"}, {"weight": -1.0}, {"target": 0.0}, {"target": 1.0}):
        with pytest.raises(UserError, match="sparse"):
            make(**settings)
