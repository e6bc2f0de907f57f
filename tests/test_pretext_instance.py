"""Instance discrimination: the loss against loops and a closed form, in parts, and what the two views may be."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from pretext.instance import Config, Instance, nt_xent
from pretext.task import Batch
from unlabel.backbone import build_backbone
from unlabel.draws import Draws
from unlabel.errors import UserError

TAU = 0.3


def codes(n: int) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    first, second = (F.normalize(torch.randn(n, 5, dtype=torch.float64), dim=1) for _ in range(2))
    return first, second


def test_the_loss_is_equation_one():
    """Chen et al. 2020: for each of the 2N views, - log of its partner's share among the 2N - 1 others."""
    first, second = codes(4)
    losses, hits = nt_xent(torch.cat([first, second]), first, second, 0, TAU)
    views = [*first, *second]
    for i, view in enumerate(views):
        partner = (i + 4) % 8
        others = {k: math.exp(float(view @ views[k]) / TAU) for k in range(8) if k != i}
        assert float(losses[i]) == pytest.approx(-math.log(others[partner] / sum(others.values())))
        assert bool(hits[i]) == (max(others, key=lambda k: others[k]) == partner)


def test_codes_at_right_angles_have_a_closed_form():
    codes = torch.eye(6)
    losses, hits = nt_xent(torch.cat([codes, codes]), codes, codes, 0, TAU)
    assert hits.all()
    assert losses.tolist() == pytest.approx([math.log(1 + 10 * math.exp(-1 / TAU))] * 12)


def test_mixed_precision_does_not_round_the_cosines():
    first, second = (c.float() for c in codes(8))
    exact = nt_xent(torch.cat([first, second]), first, second, 0, 0.05)[0]
    with torch.autocast("cpu", torch.bfloat16):
        mixed = nt_xent(torch.cat([first, second]), first, second, 0, 0.05)[0]
    assert torch.allclose(mixed, exact, atol=1e-5)


def test_parts_of_a_batch_average_to_the_whole_if_they_see_all_of_it():
    """As processes do. The order of the images changes nothing either."""
    first, second = codes(6)
    whole = nt_xent(torch.cat([first, second]), first, second, 0, TAU)[0]
    parts = [nt_xent(torch.cat([first[k : k + 2], second[k : k + 2]]), first, second, k, TAU)[0] for k in (0, 2, 4)]
    assert torch.allclose(torch.stack(parts).mean(), whole.mean())
    assert torch.allclose(torch.cat([p[:2] for p in parts]), whole[:6])
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    turned = nt_xent(torch.cat([first[order], second[order]]), first[order], second[order], 0, TAU)[0]
    assert torch.allclose(turned[:6], whole[:6][order])


TWO_PROCESSES = """
import torch, torch.distributed as dist, torch.nn.functional as F
from pretext.instance import nt_xent
from unlabel import distributed
dist.init_process_group("gloo")
torch.manual_seed(0)
whole = torch.randn(6, 2, 5, dtype=torch.float64, requires_grad=True)  # six images, two views of each
def loss(rows, all_rows, at):
    codes, everyones = F.normalize(rows, dim=2), F.normalize(all_rows, dim=2)
    ours = codes.transpose(0, 1).flatten(0, 1)
    return nt_xent(ours, everyones[:, 0], everyones[:, 1], at, 0.3)[0].mean()
loss(whole, whole, 0).backward()
mine = whole.detach()[3 * dist.get_rank() :][:3].requires_grad_()
loss(mine, distributed.gathered(mine), 3 * dist.get_rank()).backward()
want = whole.grad[3 * dist.get_rank() :][:3]
assert torch.allclose(mine.grad / 2, want, rtol=1e-9), (mine.grad / 2 - want).abs().max()  # DDP takes the mean
print("equal")
"""


def test_two_processes_have_the_gradient_of_one(tmp_path: Path):
    """Also that part of it that reaches an image through the other process's images."""
    (tmp_path / "two.py").write_text(TWO_PROCESSES)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    ran = subprocess.run([*torchrun, str(tmp_path / "two.py")], capture_output=True, text=True)
    assert ran.stdout.count("equal") == 2, ran.stderr[-2000:]  # the two may print into one line


def batch_of(images: torch.Tensor, epoch: int = 0) -> Batch:
    return Batch(images, Draws(0, [epoch] * len(images), list(range(len(images)))), 0.5)


@pytest.mark.parametrize("flip", [True, False])
def test_views_are_two_and_are_mirrored_only_where_images_may_be(flip: bool):
    """A ramp from left to right stays one in every view unless the view is a mirror image."""
    ramp = torch.linspace(0.2, 0.8, 32).expand(64, 3, 32, 32)
    task = Instance(build_backbone("small", 32, flip=flip), Config(jitter=0, grey=0))
    first, second = task.views(batch_of(ramp))
    assert (first - second).abs().amax((1, 2, 3)).min() > 1e-3
    rising = torch.cat([first, second])[:, 0, :, -1] > torch.cat([first, second])[:, 0, :, 0]
    assert rising.float().mean() == 1 or (flip and 0.35 < rising.float().mean() < 0.65)
    # At least a quarter of the area: half of the side, and so of the ramp.
    span = (first[:, 0, :, -1] - first[:, 0, :, 0]).abs()
    assert 0.27 < span.min() < 0.4
    assert span.max() < 0.61


def test_each_view_is_coloured_on_its_own():
    grey = torch.full((32, 3, 32, 32), 0.5)
    task = Instance(build_backbone("small", 32), Config(area=1.0))
    first, second = task.views(batch_of(grey))
    assert (first - second).abs().amax((1, 2, 3)).median() > 0.02
    assert torch.equal(task.views(batch_of(grey))[0], first)
    assert not torch.equal(task.views(batch_of(grey, epoch=1))[0], first)


@pytest.mark.parametrize("wrong", [{"temperature": 0.0}, {"width": 0}, {"area": 0.0}, {"jitter": 2.0}, {"grey": -0.1}])
def test_wrong_settings_are_refused(wrong: dict[str, float]):
    with pytest.raises(UserError, match=f"--instance.*{next(iter(wrong))}"):
        Instance(build_backbone("small", 32), Config(**wrong))  # type: ignore[arg-type]
