"""Inpainting: what is hidden stays hidden, and the loss counts what it says it counts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from scipy import ndimage
from torch import Tensor

from pretext.decoder import Decoder, weighted_error
from pretext.inpainting import ChannelWise, Config, Inpainting, band_around, draw_hidden
from pretext.task import Batch
from unlabel.backbone import build_backbone
from unlabel.draws import Draws
from unlabel.errors import UserError

KINDS = ("center", "blocks", "region", "half")


def smooth_images(n: int, size: int, seed: int = 0) -> Tensor:
    """Soft blobs of colour: (n, 3, size, size) in [0, 1]."""
    coarse = torch.rand(n, 3, 5, 5, generator=torch.Generator().manual_seed(seed))
    images = torch.nn.functional.interpolate(coarse, size=(size, size), mode="bicubic").clamp(0, 1)
    return images


def make_batch(n: int = 4, size: int = 64, epoch: int = 0) -> Batch:
    return Batch(smooth_images(n, size), Draws(7, [epoch] * n, range(n)), 0.0)


def make_task(config: Config | None = None, backbone: str = "small", size: int = 64) -> Inpainting:
    torch.manual_seed(0)
    return Inpainting(build_backbone(backbone, size), config or Config())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [32, 45, 64])
def test_hidden_share(kind: str, size: int) -> None:
    hidden = draw_hidden(kind, 0.25, size, Draws(0, [0] * 40, range(40)))
    assert hidden.shape == (40, 1, size, size)
    assert hidden.dtype == torch.bool
    share = hidden.float().mean((1, 2, 3))
    if kind == "blocks":  # they overlap: at most a quarter
        assert (share > 0.04).all()
        assert (share < 0.27).all()
    elif kind == "region":
        assert (hidden.sum((1, 2, 3)) == round(0.25 * size**2)).all()
    else:
        torch.testing.assert_close(share, torch.full((40,), 0.5 if kind == "half" else 0.25), atol=0.02, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("share", [1e-6, 1 - 1e-6])
def test_something_is_hidden_and_something_visible(kind: str, share: float) -> None:
    hidden = draw_hidden(kind, share, 16, Draws(0, [0] * 8, range(8))).flatten(1)
    assert hidden.any(1).all()
    assert not hidden.all(1).any()


@pytest.mark.parametrize("kind", ["blocks", "region", "half"])
def test_mask_is_a_function_of_seed_epoch_and_index(kind: str) -> None:
    def draw(seed: int, epoch: int, *indices: int) -> Tensor:
        return draw_hidden(kind, 0.25, 32, Draws(seed, [epoch] * len(indices), indices))

    assert torch.equal(draw(0, 0, 5, 9)[1], draw(0, 0, 9)[0])
    many = range(20)
    assert not torch.equal(draw(0, 0, *many), draw(0, 1, *many))
    assert not torch.equal(draw(0, 0, *many), draw(1, 0, *many))
    assert len({m.numpy().tobytes() for m in draw(0, 0, *many)}) >= (4 if kind == "half" else 20)


def test_half_hides_each_side() -> None:
    hidden = draw_hidden("half", 0.25, 8, Draws(0, [0] * 40, range(40)))[:, 0]
    half = torch.arange(8) < 4
    sides = [half[:, None].expand(8, 8), half[None].expand(8, 8)]
    sides += [~s for s in sides]
    counts = [sum(torch.equal(m, s) for m in hidden) for s in sides]
    assert sum(counts) == 40
    assert min(counts) >= 3


def test_region_hides_smooth_shapes_everywhere_alike() -> None:
    hidden = draw_hidden("region", 0.25, 32, Draws(0, [0] * 2000, range(2000)))[:, 0].numpy()
    often = hidden.mean(0)
    # Binomial standard error is 0.01; borders, corners and centre are no different.
    assert np.abs(often - 0.25).max() < 0.05
    label: Any = ndimage.label  # typed as an int by its stubs
    pieces = [label(m)[1] for m in hidden[:100]]
    assert np.mean(pieces) < 8


def test_region_does_not_depend_on_autocast() -> None:
    draws = Draws(0, [0] * 4, range(4))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = draw_hidden("region", 0.25, 64, draws)
    assert torch.equal(inside, draw_hidden("region", 0.25, 64, draws))


@pytest.mark.parametrize("width", [0, 1, 4])
def test_band_is_scipys_dilation_without_the_hole(width: int) -> None:
    hidden = draw_hidden("region", 0.25, 40, Draws(0, [0, 0], [0, 1]))
    square = np.ones((2 * width + 1, 2 * width + 1), bool)
    want = np.stack([ndimage.binary_dilation(m, square) & ~m for m in hidden[:, 0].numpy()])
    assert np.array_equal(band_around(hidden, width)[:, 0].numpy(), want)


@pytest.mark.parametrize(("size", "width"), [(32, 2), (64, 4), (128, 8)])
def test_band_is_four_pixels_at_64(size: int, width: int) -> None:
    task = make_task()
    hidden = torch.zeros(1, 1, size, size, dtype=torch.bool)
    hidden[..., size // 2, size // 2] = True
    weight = task.weight(hidden)
    assert weight[0, 0, size // 2, size // 2] == 1
    assert (weight == 10).sum() == (2 * width + 1) ** 2 - 1
    assert (weight[~hidden] % 10 == 0).all()


def test_hidden_pixels_leave_the_prediction_bit_identical() -> None:
    task = make_task()
    batch = make_batch()
    hidden = task.hidden(batch)
    other = torch.where(hidden, 1 - batch.images, batch.images)
    assert not torch.equal(other, batch.images)
    for mode in (True, False):  # BatchNorm of the batch, and stored
        task.train(mode)
        task.backbone.train(mode)
        assert torch.equal(task.predict(batch.images, hidden), task.predict(other, hidden))
    broken = torch.where(hidden, float("nan"), batch.images)
    assert torch.equal(task.predict(batch.images, hidden), task.predict(broken, hidden))


def test_visible_pixels_do_change_the_prediction() -> None:
    task = make_task()
    batch = make_batch()
    hidden = task.hidden(batch)
    other = torch.where(hidden, batch.images, 1 - batch.images)
    assert (task.predict(batch.images, hidden) - task.predict(other, hidden)).abs().max() > 0.01


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_outside_hole_and_band_is_exactly_zero(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    task = make_task(Config(mask=kind))  # type: ignore[arg-type]
    batch = make_batch()
    painted: list[Tensor] = []

    def keep(images: Tensor, hidden: Tensor, real=task.predict) -> Tensor:
        painted.append(real(images, hidden))
        painted[0].retain_grad()
        return painted[0]

    monkeypatch.setattr(task, "predict", keep)
    task(batch)["loss"].backward()
    hidden = task.hidden(batch)
    near = torch.from_numpy(ndimage.binary_dilation(hidden.numpy(), np.ones((1, 1, 9, 9), bool)))
    gradient = painted[0].grad
    assert gradient is not None
    assert (gradient[~near.expand_as(gradient)] == 0).all()
    assert (gradient[hidden.expand_as(gradient)] != 0).float().mean() > 0.99
    # The same error counts ten times in the band; each image's terms are a mean of its own.
    target = task.backbone.normalise(batch.images)
    slope = (gradient / (painted[0] - target)).detach()
    for row, inside, ring in zip(slope, hidden[:, 0], (near & ~hidden)[:, 0], strict=True):
        assert float(row[:, ring].median() / row[:, inside].median()) == pytest.approx(10, rel=1e-3)


@pytest.mark.parametrize("overlap", [0.0, 4.0])
def test_same_constant_error_gives_the_same_loss(overlap: float) -> None:
    task = make_task(Config(overlap=overlap))
    target = smooth_images(2, 64)
    losses = []
    for share in (0.1, 0.5):
        hidden = draw_hidden("region", share, 64, Draws(0, [0, 0], [0, 1]))
        assert float(hidden.float().mean()) == pytest.approx(share, abs=1e-3)
        losses.append(float(weighted_error(target + 0.3, target, task.weight(hidden))))
    assert losses == pytest.approx([0.09, 0.09], rel=1e-5)


def test_loss_is_a_mean_over_images_each_normalised_on_its_own() -> None:
    task = make_task().eval()
    task.backbone.eval()
    batch = make_batch(4)
    whole = task(batch)
    parts = []
    for k in (0, 2):
        parts.append(task(Batch(batch.images[k : k + 2], batch.draws.slice(k, k + 2), 0.0)))
    for key in ("loss", "error"):
        halves = (parts[0][key] + parts[1][key]) / 2
        torch.testing.assert_close(whole[key], halves)


def test_weighted_error_against_numpy() -> None:
    generator = np.random.default_rng(0)
    p, t, w = (generator.random(s) for s in ((3, 3, 5, 5), (3, 3, 5, 5), (3, 1, 5, 5)))
    w[2] = 0  # nothing weighted: counts as no error, not as nan
    error = ((p - t) ** 2).mean(1)
    want = np.mean([np.average(e, weights=v[0]) if v.any() else 0.0 for e, v in zip(error, w, strict=True)])
    got = weighted_error(*(torch.from_numpy(a).float() for a in (p, t, w)))
    assert float(got) == pytest.approx(want, rel=1e-5)


def test_channel_wise_layer() -> None:
    torch.manual_seed(0)
    layer = ChannelWise(6, 4)
    assert sum(p.numel() for p in layer.parameters()) == 6 * 16**2
    x = torch.randn(3, 6, 4, 4, requires_grad=True)
    y = layer(x)
    # Independent reference: one matrix per channel, in numpy.
    want = np.einsum("nci,cij->ncj", x.detach().flatten(2).numpy(), layer.weight.detach().numpy())
    np.testing.assert_allclose(y.detach().flatten(2).numpy(), want, rtol=1e-4, atol=1e-5)
    y[:, 2].square().sum().backward()
    assert x.grad is not None
    assert layer.weight.grad is not None
    others = [0, 1, 3, 4, 5]
    assert (x.grad[:, others] == 0).all()
    assert (layer.weight.grad[others] == 0).all()
    assert (x.grad[:, 2] != 0).all()  # every position reaches every position


def test_channel_wise_size_comes_from_the_backbone() -> None:
    task = make_task()
    assert task.middle.weight.shape == (256, 16, 16)
    assert task.backbone.training  # the trial forward left mode and buffers alone
    assert all(int(v) == 0 for k, v in task.backbone.state_dict().items() if k.endswith("num_batches_tracked"))


def test_decoder_makes_no_checkerboard() -> None:
    """Constant features must give a constant image, away from the border where zero padding is seen."""
    torch.manual_seed(0)
    image = Decoder(32, 16, 128)(torch.ones(1, 32, 16, 16), 128)[0, :, 48:80, 48:80]
    assert image.std((1, 2)).max() < 1e-4 * image.abs().max()


@pytest.mark.parametrize(
    ("backbone", "size"),
    [
        *[("small", size) for size in (32, 64, 96, 224)],
        *[("convnext_atto", size) for size in (32, 64)],
        *[("mobilenetv3_small_050", size) for size in (64, 100)],
    ],
)
def test_backbones_and_sizes(backbone: str, size: int) -> None:
    task = make_task(backbone=backbone, size=size)
    batch = make_batch(2, size)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=size == 32):
        out = task(batch)
    assert out["loss"].dtype == torch.float32
    assert out["loss"].shape == ()
    assert not out["error"].requires_grad
    out["loss"].backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in task.parameters())
    assert {k for k in out if k != "loss"} == set(task.metrics) == set(task.trivial(batch))
    shown = task.eval().show(batch)
    for image in shown.values():
        assert image.shape == (2, 3, size, size)
        assert image.min() >= 0
        assert image.max() <= 1


def test_smaller_images_than_the_backbone_was_made_for() -> None:
    """Training on smaller images first (as rotation does) works with the fixed-size layer."""
    out = make_task(size=64)(make_batch(2, 40))
    out["loss"].backward()
    assert out["loss"].isfinite()


def test_show_pastes_the_prediction_and_hides_the_rest() -> None:
    task = make_task().eval()
    task.backbone.eval()
    batch = make_batch()
    shown = task.show(batch)
    hidden = task.hidden(batch).expand_as(batch.images)
    assert torch.equal(shown["prediction"][~hidden], batch.images[~hidden])
    assert torch.equal(shown["input"][~hidden], batch.images[~hidden])
    assert torch.equal(shown["target"], batch.images)
    mean = torch.tensor(task.backbone.spec.mean).view(1, 3, 1, 1).expand_as(batch.images)
    assert torch.equal(shown["input"][hidden], mean[hidden])
    # The metric is what the picture shows.
    error = (shown["prediction"] - batch.images).square().sum((1, 2, 3)) / hidden.sum((1, 2, 3))
    torch.testing.assert_close(task(batch)["error"], error.mean())


def test_trivial_paints_the_mean_of_what_is_visible() -> None:
    task = make_task()
    batch = make_batch()
    hidden = task.hidden(batch)[:, 0].numpy()
    errors = []
    for image, m in zip(batch.images.numpy(), hidden, strict=True):
        colour = image[:, ~m].mean(1, keepdims=True)
        errors.append(((image[:, m] - colour) ** 2).mean())
    assert task.trivial(batch)["error"] == pytest.approx(np.mean(errors), rel=1e-4)


@pytest.mark.parametrize(
    "wrong", [{"mask": "star"}, {"share": 0.0}, {"share": 1.0}, {"overlap": -1.0}, {"overlap_weight": -1.0}]
)
def test_wrong_settings_are_one_clear_line(wrong: dict) -> None:
    with pytest.raises(UserError) as error:
        make_task(replace(Config(), **wrong))
    assert "\n" not in str(error.value)


def test_learns_to_continue_simple_images() -> None:
    """A few steps on colour gradients: better than the trivial score."""
    n, size = 16, 16
    generator = torch.Generator().manual_seed(0)
    ends = torch.rand(2, n, 3, 1, 1, generator=generator)
    ramp = torch.linspace(0, 1, size).view(1, 1, 1, size)
    images = (ends[0] + (ends[1] - ends[0]) * ramp).expand(n, 3, size, size).contiguous()
    task = make_task(Config(mask="half"), size=size)
    weights = [*task.backbone.parameters(), *task.parameters()]
    optimizer = torch.optim.AdamW(weights, lr=2e-3)
    for epoch in range(60):
        batch = Batch(images, Draws(0, [epoch] * n, range(n)), 0.0)
        optimizer.zero_grad()
        task(batch)["loss"].backward()
        optimizer.step()
    assert float(task(batch)["error"]) < 0.5 * task.trivial(batch)["error"]


# ---------------------------------------------------------------- the adversarial loss


def adversarial(size: int = 32, share: float = 0.1) -> Inpainting:
    return make_task(Config(adversarial=share), size=size)


def test_the_two_losses_against_their_definition() -> None:
    """- log D for the painter; - log D(there) - log(1 - D(painted)) for the discriminator (equation 2)."""
    task = adversarial()
    assert task.discriminator is not None
    painted, there = torch.randn(5, 3, 32, 32), torch.randn(5, 3, 32, 32)
    deception, judgement, told = task.play(painted, there)
    with torch.no_grad():
        false, true = (task.discriminator(x).sigmoid().double() for x in (painted, there))
    assert float(deception.detach()) == pytest.approx(float(-false.log().mean()), rel=1e-4)
    assert float(judgement.detach()) == pytest.approx(float(-(true.log() + (1 - false).log()).mean()), rel=1e-4)
    assert float(told) == pytest.approx(
        (float((false < 0.5).double().mean()) + float((true > 0.5).double().mean())) / 2
    )


def test_neither_moves_the_other() -> None:
    task = adversarial()
    assert task.discriminator is not None
    for which in (0, 1):
        painted = torch.randn(3, 3, 32, 32, requires_grad=True)
        task.zero_grad()
        task.play(painted, torch.randn(3, 3, 32, 32))[which].backward()
        moved = any(p.grad is not None and bool(p.grad.any()) for p in task.discriminator.parameters())
        assert moved == (which == 1)
        assert (painted.grad is not None and bool(painted.grad.any())) == (which == 0)


def test_the_discriminator_sees_the_hidden_part_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    task, seen = adversarial(), []
    real = task.play

    def spy(painted: Tensor, there: Tensor):
        seen.extend([painted.detach(), there.detach()])
        return real(painted, there)

    monkeypatch.setattr(task, "play", spy)
    batch = make_batch(4, 32)
    task(batch)
    hidden = task.hidden(batch)
    for images in seen:
        assert not images.masked_select(~hidden).any()
        assert images.masked_select(hidden).all()


def test_without_it_nothing_changes_and_with_it_there_are_two_groups() -> None:
    plain, both = make_task(size=32), adversarial()
    assert len(plain.param_groups()) == 1
    assert set(plain(make_batch(2, 32))) == {"loss", "error"}
    own, judge = both.param_groups()
    assert both.discriminator is not None
    assert {id(p) for p in judge["params"]} == {id(p) for p in both.discriminator.parameters()}
    assert len(own["params"]) + len(judge["params"]) == len(list(both.parameters()))
    assert judge["lr_scale"] == 0.1
    assert set(both.trivial(make_batch(2, 32))) == {"error", "told"} == set(both.metrics)
    with pytest.raises(UserError, match="adversarial"):
        make_task(Config(adversarial=1.0))


def test_it_really_trains(colour_photos: Tensor) -> None:
    """The discriminator learns to tell what was painted from what was there; then the painter learns to deceive it."""
    batch = Batch(colour_photos[:32], Draws(0, [0] * 32, range(32)), 0.0)
    task = adversarial().train()
    (group,) = [g for g in task.param_groups() if "betas" in g]
    judge = torch.optim.Adam(group["params"], 2e-3, betas=group["betas"])
    painter = torch.optim.Adam([*task.param_groups()[0]["params"], *task.backbone.parameters()], 2e-3)
    hidden, told = task.hidden(batch), []
    there = task.backbone.normalise(batch.images).masked_fill(~hidden, 0)
    for step in range(80):
        painted = task.predict(batch.images, hidden).masked_fill(~hidden, 0)
        deception, judgement, share = task.play(painted, there)
        (judgement if step < 40 else deception).backward()
        (judge if step < 40 else painter).step()
        for optimizer in (judge, painter):
            optimizer.zero_grad()
        told.append(float(share))
    assert told[39] > 0.9
    assert told[79] < 0.7
