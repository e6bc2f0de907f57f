"""The schedule as a pure function, parameter groups, clipping: against closed forms."""

from __future__ import annotations

import json
import math
from functools import partial
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import nn

from unlabel.backbone import channels_last
from unlabel.config import PretrainConfig
from unlabel.muon import Muon, orthogonal
from unlabel.optim import UNTUNED, make_optimizers, rate_at, rates_of, set_rates, size_at, size_factor, sizes
from unlabel.precision import _cpu_is_fast, autocast
from unlabel.pretrain import pretrain


def test_the_rate_warms_up_and_falls():
    assert rate_at(0.0, 0.1, "cosine") == pytest.approx(0.04)
    assert rate_at(0.05, 0.1, "cosine") == pytest.approx(0.52)
    assert rate_at(0.1, 0.1, "cosine") == pytest.approx(1.0)
    for progress in (0.2, 0.5, 0.9, 1.0):
        expected = 0.5 * (1 + math.cos(math.pi * (progress - 0.1) / 0.9))
        assert rate_at(progress, 0.1, "cosine") == pytest.approx(expected)
    # Gidaris et al. 2018: the rate drops by five at 30, 60 and 80 % of the way.
    drops = [rate_at(progress, 0.0, "step") for progress in (0.0, 0.29, 0.31, 0.59, 0.61, 0.79, 0.81)]
    assert drops == pytest.approx([1, 1, 0.2, 0.2, 0.04, 0.04, 0.008])


def test_sizes_rise_to_the_full_one():
    seen = [size_at(progress / 100, 64, True) for progress in range(101)]
    assert (seen[0], seen[60], seen[-1]) == (40, 48, 64)
    assert seen == sorted(seen)
    assert {size_at(progress / 100, 64, False) for progress in range(101)} == {64}
    assert size_at(0.0, 32, True) == 32
    assert sum(share for share, _ in sizes(64, True)) == pytest.approx(1)
    assert [size for _, size in sizes(64, True)] == sorted(set(seen))
    # What a step costs on average, in steps of the first size: 60 % at 40 px, 25 % at 48, 15 % at 64.
    assert size_factor(64, True) == pytest.approx((0.6 * 40**2 + 0.25 * 48**2 + 0.15 * 64**2) / 40**2)
    assert size_factor(64, False) == 1


def test_groups_keep_their_own_rate_and_vectors_do_not_decay():
    backbone, head = torch.nn.Conv2d(3, 4, 3), torch.nn.Linear(4, 2)
    groups = [{"params": list(head.parameters()), "lr_scale": 0.1}]
    (optimizer,) = make_optimizers(backbone, groups, "adamw", 2e-3, 0.05)
    set_rates([optimizer], 0.5)
    found = {id(p): (g["lr"], g["weight_decay"]) for g in optimizer.param_groups for p in g["params"]}
    assert found[id(backbone.weight)] == pytest.approx((1e-3, 0.05))
    assert found[id(head.weight)] == pytest.approx((1e-4, 0.05))
    for layer in (backbone, head):
        assert layer.bias is not None
        assert found[id(layer.bias)][1] == 0


@pytest.mark.parametrize("shape", [(24, 150), (150, 24), (32, 32)])
def test_muon_keeps_directions_and_levels_their_sizes(shape: tuple[int, int]):
    """Singular vectors stay, singular values come to 0.7 … 1.2: against torch's decomposition."""
    torch.manual_seed(0)
    u, _, v = torch.linalg.svd(torch.randn(shape), full_matrices=False)
    sizes = torch.linspace(0.2, 3, min(shape))
    matrix = u @ torch.diag(sizes) @ v
    found = u.T @ orthogonal(matrix) @ v.T
    assert found.diagonal().min() > 0.6
    assert found.diagonal().max() < 1.3
    assert (found - torch.diag(found.diagonal())).abs().max() < 0.05
    # Neither the size nor the order of columns matters.
    order = torch.randperm(shape[1])
    assert torch.allclose(orthogonal(7 * matrix), orthogonal(matrix), atol=0.03)
    assert torch.allclose(orthogonal(matrix[:, order]), orthogonal(matrix)[:, order], atol=0.03)


def test_muon_equals_timms(monkeypatch: pytest.MonkeyPatch):
    timms = pytest.importorskip("timm.optim.muon", reason="older versions of timm have no Muon")
    # Both in fp32: bf16 rounds differently with each layout.
    in_fp32 = partial(timms.zeropower_via_newtonschulz, dtype=torch.float32)
    monkeypatch.setattr(timms, "zeropower_via_newtonschulz", in_fp32)
    torch.manual_seed(0)
    ours = [torch.nn.Parameter(torch.randn(16, 8, 3, 3)), torch.nn.Parameter(torch.randn(40, 12))]
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    ours[0].data = ours[0].data.to(memory_format=torch.channels_last)
    before = [p.detach().clone() for p in ours]
    mine = Muon(ours, lr=0.02, weight_decay=0.1)
    other = timms.Muon(theirs, lr=0.02, weight_decay=0.1, nesterov=True, ns_coefficients="original")
    for _ in range(4):
        for a, b in zip(ours, theirs, strict=True):
            b.grad = torch.randn(b.shape)
            a.grad = b.grad.clone()
        mine.step()
        other.step()
    for a, b, was in zip(ours, theirs, before, strict=True):
        moved = (b - was).detach()
        assert (a - b).norm() < 1e-4 * moved.norm()
        assert moved.norm() > 0.1


def test_muon_is_for_the_backbones_matrices():
    backbone, head = torch.nn.Conv2d(3, 4, 3), torch.nn.Linear(4, 2)
    groups = [{"params": list(head.parameters()), "lr_scale": 0.1}]
    made = make_optimizers(backbone, groups, "muon", 2e-3, 0.05)
    found = {type(o): {id(p): g["lr"] for g in o.param_groups for p in g["params"]} for o in made}
    assert found[Muon] == {id(backbone.weight): pytest.approx(2e-3)}
    assert found[torch.optim.AdamW] == {
        id(backbone.bias): pytest.approx(2e-3), id(head.weight): pytest.approx(2e-4), id(head.bias): pytest.approx(2e-4)
    }  # fmt: skip


def test_rates_are_of_the_kind_of_optimizer_that_they_were_found_for():
    assert rates_of("adamw", "adamw", 2e-3, 0.01) == rates_of("muon", "adamw", 2e-3, 0.01) == (2e-3, 0.01)
    assert rates_of("sgd", "sgd", 0.3, 1e-4) == (0.3, 1e-4)
    assert rates_of("sgd", "adamw", 2e-3, 0.01) == UNTUNED["sgd"] == (0.1, 5e-4)
    assert rates_of("muon", "sgd", 0.3, 1e-4) == UNTUNED["muon"]
    # SGD adds its decay to the gradient, so that at equal rates the share of a weight that is lost in a step is equal.
    for kind, (rate, decay) in UNTUNED.items():
        layer = torch.nn.Linear(1, 1, bias=False)
        (optimizer,) = make_optimizers(layer, [], kind, rate, decay)
        before = layer.weight.item()
        layer.weight.grad = torch.zeros_like(layer.weight)
        optimizer.step()
        lost = 1 - layer.weight.item() / before
        assert lost == pytest.approx(rate * decay * (1.9 if kind == "sgd" else 1), rel=1e-2)  # Nesterov: 1 + momentum


def test_a_head_with_its_own_kind_of_optimizer_has_rates_of_that_kind():
    backbone, head = torch.nn.Conv2d(3, 4, 3), torch.nn.Linear(4, 2, bias=False)
    groups = [{"params": [head.weight], "lr_scale": 0.1, "optimizer": "adamw"}]
    for kind, rate, decay, want in (("sgd", 0.1, 5e-4, (1e-4, 0.05)), ("muon", 2e-3, 0.01, (2e-4, 0.01))):
        made = make_optimizers(backbone, groups, kind, rate, decay)
        found = {
            id(p): (type(o), g["peak"], g["weight_decay"]) for o in made for g in o.param_groups for p in g["params"]
        }
        assert found[id(head.weight)] == (torch.optim.AdamW, *map(pytest.approx, want))
        assert found[id(backbone.weight)][1:] == pytest.approx((rate, decay))


@pytest.mark.parametrize(
    ("more", "want"),
    [
        ({}, ("adamw", 3e-3, 0.05)),
        ({"optimizer": "muon"}, ("muon", 3e-3, 0.05)),
        ({"optimizer": "sgd"}, ("sgd", 0.1, 5e-4)),
        ({"optimizer": "sgd", "lr": 0.02}, ("sgd", 0.02, 5e-4)),
        ({"optimizer": "sgd", "weight_decay": 0.0}, ("sgd", 0.1, 0.0)),
    ],
)
def test_another_optimizer_does_not_have_the_recipes_rates(
    more: dict[str, Any], want: tuple[str, float, float], digits_folder: Path, tmp_path: Path
):
    config = PretrainConfig(
        tasks=("rotation",), data=(str(digits_folder),), out=tmp_path, image_size=16, epochs=0.01, **more
    )
    resolved = json.loads((pretrain(config) / "config.json").read_text())["resolved"]
    assert (resolved["optimizer"], resolved["lr"], resolved["weight_decay"]) == want


def test_the_logged_rate_is_the_schedules_and_clipping_changes_the_run(digits_folder: Path, tmp_path: Path):
    runs = {}
    cases: list[tuple[str, float, Literal["cosine", "step"]]]
    cases = [("plain", 0.0, "cosine"), ("clipped", 1e-3, "cosine"), ("steps", 0.0, "step")]
    for name, clip, schedule in cases:
        config = PretrainConfig(
            tasks=("rotation",), data=(str(digits_folder),), out=tmp_path / name, image_size=16, epochs=0.5,
            optimizer="sgd", lr=0.05, clip=clip, schedule=schedule, log_every=1,
        )  # fmt: skip
        pretrain(config)
        runs[name] = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
    total = len(runs["plain"])
    for name, schedule in (("plain", "cosine"), ("steps", "step")):
        expected = [0.05 * rate_at(k / total, 0.1, schedule) for k in range(total)]
        assert [line["lr"] for line in runs[name]] == pytest.approx(expected, rel=1e-6)
    # Gradients of almost no length: the network stays where it began, at chance.
    assert abs(runs["clipped"][-1]["loss"] - runs["clipped"][0]["loss"]) < 0.2
    assert runs["plain"][-1]["loss"] != runs["clipped"][-1]["loss"]


def test_bf16_in_the_loop(digits_folder: Path, tmp_path: Path):
    config = PretrainConfig(
        tasks=("rotation",), data=(str(digits_folder),), out=tmp_path, image_size=16, epochs=0.05, batch_size=8,
        stem="half", precision="bf16",
    )  # fmt: skip
    run = pretrain(config)
    assert json.loads((run / "config.json").read_text())["resolved"]["precision"] == "bf16"
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert all(math.isfinite(line["loss"]) for line in lines)


@pytest.mark.parametrize(
    ("vendor", "flags", "fast"),
    [
        ("AuthenticAMD", "avx2 avx512f avx512_bf16 avx512_vnni", True),
        ("AuthenticAMD", "avx2 avx512f avx512_vnni", False),
        ("GenuineIntel", "avx512f avx512_bf16 avx512_fp16", False),
        ("GenuineIntel", "avx512f avx512_bf16 amx_bf16 amx_tile", True),
    ],
)
def test_on_which_processors_bf16_pays(vendor: str, flags: str, fast: bool):
    assert _cpu_is_fast(f"processor\t: 0\nvendor_id\t: {vendor}\nflags\t\t: fpu {flags}\n") is fast


@pytest.mark.parametrize(("kernel", "stride", "side"), [(3, 2, 1), (5, 1, 1), (7, 1, 2), (7, 1, 16)])
def test_bf16_gradients_of_maps_smaller_than_the_kernel(kernel: int, stride: int, side: int):
    torch.manual_seed(0)
    layer = channels_last(nn.Conv2d(32, 32, kernel, stride, kernel // 2))
    x = torch.randn(8, 32, side, side).contiguous(memory_format=torch.channels_last)
    exact = torch.autograd.grad(layer(x).square().mean(), layer.weight)[0]
    for _ in range(8):
        torch.full((4 * layer.weight.numel(),), math.nan)  # what is freed here is what a careless gradient would hold
        with autocast(torch.device("cpu"), "bf16"):
            y = layer(x)
        assert (y.dtype == torch.bfloat16) == (side > kernel)
        found = torch.autograd.grad(y.float().square().mean(), layer.weight)[0]
        assert (found - exact).norm() < 0.02 * exact.norm()
