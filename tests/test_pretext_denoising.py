"""Denoising: what the noise does, and that the clean view is what is asked for."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from pretext.denoising import LEVELS, Config, Denoising, corrupt
from pretext.task import Batch
from unlabel.augment import random_view
from unlabel.backbone import build_backbone
from unlabel.draws import Draws
from unlabel.errors import UserError

KINDS = tuple(LEVELS)


def smooth_images(n: int, size: int, seed: int = 0) -> Tensor:
    """Soft blobs of colour: (n, 3, size, size) in [0, 1], with exact black and white among them."""
    coarse = torch.rand(n, 3, 5, 5, generator=torch.Generator().manual_seed(seed)) * 1.4 - 0.2
    return torch.nn.functional.interpolate(coarse, size=(size, size), mode="bicubic").clamp(0, 1)


def draws_for(n: int, seed: int = 7, epoch: int = 0) -> Draws:
    return Draws(seed, [epoch] * n, range(n))


def make_batch(n: int = 4, size: int = 64, epoch: int = 0) -> Batch:
    return Batch(smooth_images(n, size), draws_for(n, epoch=epoch), 0.0)


def make_task(config: Config | None = None, backbone: str = "small", size: int = 64) -> Denoising:
    torch.manual_seed(0)
    return Denoising(build_backbone(backbone, size), config or Config())


def with_noise(kind: str, **settings: object) -> Config:
    return replace(Config(), noise=kind, **settings)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", KINDS)
def test_level_zero_corrupts_nothing_bit_for_bit(kind: str) -> None:
    images = smooth_images(3, 32)
    noisy, touched = corrupt(images, kind, torch.tensor([0.0, 0.5, 0.0]), draws_for(3))
    for k in (0, 2):
        assert np.array_equal(noisy[k].numpy().view(np.uint32), images[k].numpy().view(np.uint32))
        assert not touched[k].any()
    assert touched[1].any()
    assert not torch.equal(noisy[1], images[1])


@pytest.mark.parametrize("kind", KINDS)
def test_noise_is_a_function_of_seed_epoch_and_index(kind: str) -> None:
    task = make_task(with_noise(kind))

    def noise(seed: int, epoch: int, *indices: int) -> Tensor:
        images = torch.full((len(indices), 3, 32, 32), 0.5)
        return task.noisy(Batch(images, Draws(seed, [epoch] * len(indices), indices), 0.0))[0]

    alone = noise(0, 3, 9)[0]
    assert torch.equal(noise(0, 3, 5, 9)[1], alone)  # whatever else is in the batch
    assert torch.equal(noise(0, 3, 9)[0], alone)  # and however often it is asked
    for other in (noise(1, 3, 9)[0], noise(0, 4, 9)[0], noise(0, 3, 8)[0]):
        assert not torch.equal(other, alone)


def test_gaussian_has_the_level_as_standard_deviation_and_is_not_clipped() -> None:
    images = torch.full((2, 3, 128, 128), 0.9)
    level = torch.tensor([0.1, 0.5])
    noisy, touched = corrupt(images, "gaussian", level, draws_for(2))
    noise = (noisy - images).flatten(1)
    torch.testing.assert_close(noise.std(1), level, rtol=0.02, atol=0)
    torch.testing.assert_close(noise.mean(1), torch.zeros(2), atol=0.01, rtol=0)
    assert noisy.max() > 1
    assert touched.all()
    red, green, _ = (noisy - images)[1].flatten(1)
    assert abs(float(torch.corrcoef(torch.stack([red, green]))[0, 1])) < 0.03


@pytest.mark.parametrize("kind", ["gaussian", "speckle"])
def test_grey_images_have_grey_noise(kind: str) -> None:
    """Also beside a coloured one, whose channels have noise of their own."""
    images = smooth_images(2, 64)
    images[0] = images[0].mean(0, keepdim=True)
    noisy, _ = make_task(with_noise(kind, level=(0.5,))).noisy(Batch(images, draws_for(2), 0.0))
    assert torch.equal(noisy[0], noisy[0, :1].expand(3, -1, -1))
    assert float((noisy - images)[0].abs().mean()) > 0.1
    noise = torch.where(images > 0.1, (noisy - images) / (1 if kind == "gaussian" else images), 0)[1]
    for pair in ([0, 1], [1, 2], [0, 2]):
        assert abs(float(torch.corrcoef(noise[pair].flatten(1))[0, 1])) < 0.1


@pytest.mark.parametrize("skips", [True, False])
def test_what_is_to_be_repaired_is_a_picture(skips: bool) -> None:
    """With skips the network gets values of [0, 1], as a file has them; else noise is not clipped."""
    noisy, _ = make_task(Config(skips=skips)).noisy(make_batch())
    inside = bool((noisy >= 0).all() and (noisy <= 1).all())
    assert inside == skips
    assert not torch.equal(noisy, make_batch().images)


def test_speckle_is_proportional_to_the_image() -> None:
    images = torch.cat([torch.full((1, 3, 128, 64), 0.2), torch.full((1, 3, 128, 64), 0.8)], 3)
    noisy, _ = corrupt(images, "speckle", torch.tensor([0.5]), draws_for(1))
    noise = noisy - images
    assert float(noise[..., :64].std()) == pytest.approx(0.1, rel=0.03)
    assert float(noise[..., 64:].std()) == pytest.approx(0.4, rel=0.03)
    dark = corrupt(torch.zeros(1, 3, 8, 8), "speckle", torch.tensor([1.0]), draws_for(1))[0]
    assert (dark == 0).all()


@pytest.mark.parametrize("kind", ["masking", "salt-and-pepper"])
@pytest.mark.parametrize("level", [0.25, 0.6, 1.0])
def test_pixel_noise_is_per_pixel_at_the_stated_share(kind: str, level: float) -> None:
    images = smooth_images(2, 128) * 0.8 + 0.1  # neither black nor white
    noisy, touched = corrupt(images, kind, torch.tensor([level, level]), draws_for(2))
    assert touched.shape == (2, 1, 128, 128)
    assert float(touched.float().mean()) == pytest.approx(level, abs=0.01)
    where = touched.expand_as(images)
    assert torch.equal(noisy[~where], images[~where])
    # Not per channel: a touched pixel has one value in all three.
    assert torch.equal(noisy.amin(1)[touched[:, 0]], noisy.amax(1)[touched[:, 0]])
    fallen = noisy[where]
    assert set(fallen.unique().tolist()) == ({0.0} if kind == "masking" else {0.0, 1.0})
    assert float(fallen.mean()) == pytest.approx(0.0 if kind == "masking" else 0.5, abs=0.02)


@pytest.mark.parametrize("kind", KINDS)
def test_level_is_drawn_per_image_or_fixed(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Tensor] = []

    def spy(images: Tensor, kind: str, level: Tensor, draws: Draws) -> tuple[Tensor, Tensor]:
        seen.append(level)
        return corrupt(images, kind, level, draws)

    monkeypatch.setattr("pretext.denoising.corrupt", spy)
    batch = Batch(torch.full((200, 3, 4, 4), 0.5), draws_for(200), 0.0)
    for level in (None, (0.1, 0.9), (0.4,)):
        make_task(with_noise(kind, level=level)).noisy(batch)
    low, high = LEVELS[kind]
    for level, (a, b) in zip(seen, ((low, high), (0.1, 0.9)), strict=False):
        assert a <= level.min() < a + 0.1 * (b - a)
        assert b - 0.1 * (b - a) < level.max() <= b
    assert (seen[2] == 0.4).all()


@pytest.mark.parametrize("kind", KINDS)
def test_target_is_the_clean_augmented_view(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A network that returns the clean augmented view has no error; one that returns its input has."""
    packed = (smooth_images(3, 80) * 255).byte().permute(0, 2, 3, 1).contiguous()
    draws = draws_for(3)
    view = random_view(packed, 64, draws)
    task = make_task(with_noise(kind))
    before = view.clone()
    batch = Batch(view, draws, 0.0)
    inputs: list[Tensor] = []

    def perfect(noisy: Tensor) -> Tensor:
        inputs.append(noisy)
        return task.backbone.normalise(before).requires_grad_()

    monkeypatch.setattr(task, "predict", perfect)
    out = task(batch)
    assert float(out["loss"].detach()) == 0
    assert float(out["error"]) < 1e-12
    assert torch.equal(task.show(batch)["target"], before)
    assert torch.equal(view, before)  # corrupting makes a copy
    assert not torch.equal(inputs[0], before)
    assert torch.equal(inputs[0], task.noisy(batch)[0])  # forward, show and trivial see the same noise
    assert torch.equal(inputs[0], inputs[1])
    monkeypatch.setattr(task, "predict", task.backbone.normalise)
    assert float(task(batch)["error"]) > 0.001


def test_emphasis_weighs_corrupted_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = make_batch(2, 32)
    guess = smooth_images(2, 32, seed=5)
    losses = {}
    for alpha, beta in ((1.0, 1.0), (1.0, 0.0), (0.0, 1.0), (3.0, 0.5)):
        task = make_task(with_noise("masking", level=(0.3,), alpha=alpha, beta=beta), size=32)
        monkeypatch.setattr(task, "predict", lambda noisy, task=task: task.backbone.normalise(guess))
        losses[alpha, beta] = float(task(batch)["loss"])
        # Independent reference.
        touched = task.noisy(batch)[1][:, 0].numpy()
        error = ((guess - batch.images).numpy() / np.array(task.backbone.spec.std).reshape(1, 3, 1, 1)) ** 2
        weight = np.where(touched, alpha, beta)
        want = np.mean([np.average(e.mean(0), weights=w) for e, w in zip(error, weight, strict=True)])
        assert losses[alpha, beta] == pytest.approx(want, rel=1e-4)
    assert losses[1.0, 0.0] != pytest.approx(losses[0.0, 1.0], rel=1e-3)


def test_nothing_corrupted_and_full_emphasis_is_no_loss() -> None:
    out = make_task(with_noise("masking", level=(0.0,), beta=0.0))(make_batch())
    out["loss"].backward()
    assert float(out["loss"].detach()) == 0


def test_loss_is_a_mean_over_images() -> None:
    task = make_task().eval()
    task.backbone.eval()
    batch = make_batch(4)
    parts = [task(Batch(batch.images[k : k + 2], batch.draws.slice(k, k + 2), 0.0)) for k in (0, 2)]
    for key in ("loss", "error"):
        torch.testing.assert_close(task(batch)[key], (parts[0][key] + parts[1][key]) / 2)


@pytest.mark.parametrize(("level", "better"), [(0.05, "identity"), (0.6, "flat")])
def test_trivial_is_the_better_of_two(level: float, better: str) -> None:
    task = make_task(Config(level=(level,)))
    batch = make_batch()
    images = batch.images.numpy()
    noisy = task.noisy(batch)[0].clamp(0, 1).numpy()
    scores = {
        "identity": float(((noisy - images) ** 2).mean()),
        "flat": float(images.var((2, 3)).mean()),
    }
    assert min(scores, key=lambda k: scores[k]) == better
    assert task.trivial(batch)["error"] == pytest.approx(scores[better], rel=1e-4)


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
    for image in task.eval().show(batch).values():
        assert image.shape == (2, 3, size, size)
        assert image.min() >= 0
        assert image.max() <= 1


def test_smaller_images_than_the_backbone_was_made_for() -> None:
    assert make_task(size=64)(make_batch(2, 40))["loss"].isfinite()


@pytest.mark.parametrize(
    "wrong",
    [
        {"noise": "rain"},
        {"level": (0.5, 0.1)},
        {"level": (-0.1,)},
        {"level": (float("nan"),)},
        {"level": ()},
        {"level": (0.1, 0.2, 0.3)},
        {"noise": "masking", "level": (0.5, 1.5)},
        {"noise": "masking", "alpha": -1.0},
        {"noise": "masking", "alpha": 0.0, "beta": 0.0},
        {"alpha": 2.0},
    ],
)
def test_wrong_settings_are_one_clear_line(wrong: dict) -> None:
    with pytest.raises(UserError) as error:
        make_task(replace(Config(), **wrong))
    assert "\n" not in str(error.value)


def test_learns_to_remove_noise() -> None:
    """A few steps on flat colours: better than the noisy image and than the trivial score."""
    n, size = 16, 16
    left, right = torch.rand(2, n, 3, 1, 1, generator=torch.Generator().manual_seed(0))
    images = torch.cat([left.expand(n, 3, size, size // 2), right.expand(n, 3, size, size // 2)], 3)
    task = make_task(size=size)
    optimizer = torch.optim.AdamW([*task.backbone.parameters(), *task.parameters()], lr=2e-3)
    for epoch in range(60):
        batch = Batch(images, Draws(0, [epoch] * n, range(n)), 0.0)
        optimizer.zero_grad()
        task(batch)["loss"].backward()
        optimizer.step()
    assert float(task(batch)["error"]) < 0.5 * task.trivial(batch)["error"]


# ---------------------------------------------------------------- damage


@pytest.mark.parametrize("kind", ["watermark", "occlusion"])
def test_local_damage_leaves_the_rest_as_it_is(kind: str) -> None:
    images = smooth_images(6, 64)
    damaged, touched = corrupt(images, kind, torch.full((6,), 0.3), draws_for(6))
    share = touched.float().mean((1, 2, 3))
    assert (share > 0.005).all()
    assert (share < 0.6).all()
    same = (damaged == images).all(1, keepdim=True)
    # What is hardly visible at the edge of a letter does not count as touched.
    assert float((damaged - images).abs().masked_select((~touched).expand_as(images)).max()) < 0.03
    if kind == "occlusion":
        assert torch.equal(same.logical_not() | touched, touched)
        assert (share <= 0.3 + 0.05).all()  # at most the level, but for pixels on the edge


def test_a_watermark_is_a_blend() -> None:
    """Twice the opacity: twice the difference, as long as nothing is clipped; black, white and coloured ones occur."""
    images = torch.full((40, 3, 64, 64), 0.5)
    half, full = (corrupt(images, "watermark", torch.full((40,), v), draws_for(40))[0] - 0.5 for v in (0.4, 0.8))
    assert torch.allclose(2 * half, full, atol=1e-5)
    peak = full.flatten(1).abs().amax(1)
    assert ((peak - 0.4).abs() < 0.02).sum() > 10
    assert float(full.max()) > 0.38
    assert float(full.min()) < -0.38


def test_age_fades_stains_and_folds() -> None:
    images = torch.rand(8, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    old = corrupt(images, "document", torch.ones(8), draws_for(8))[0]
    new = corrupt(images, "document", torch.full((8,), 0.3), draws_for(8))[0]
    assert (old.flatten(1).std(1) < images.flatten(1).std(1)).all()  # faded
    assert ((old - images).abs().mean((1, 2, 3)) > (new - images).abs().mean((1, 2, 3))).all()
    assert float(old.min()) >= 0
    assert float(old.max()) <= 1
    red, blue = (old - images).mean((0, 2, 3))[[0, 2]]
    assert red > blue  # yellow


def test_skips_begin_at_the_input_and_beat_it(colour_photos: Tensor) -> None:
    """An untrained network with skips gives back what it got; a few steps later it is nearer to the original."""
    config = with_noise("watermark", skips=True)
    torch.manual_seed(0)
    task = Denoising(build_backbone("small", 32), config)
    batch = Batch(colour_photos[:16], draws_for(16), 0.0)
    noisy, _ = task.noisy(batch)
    restored = task.eval().restore(noisy, None)
    assert float((restored - noisy).abs().mean()) < 0.01
    task.train()
    optimizer = torch.optim.AdamW([*task.parameters(), *task.backbone.parameters()], 3e-3)
    for _ in range(40):
        out = task(batch)
        out["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert float(out["error"]) < 0.7 * task.trivial(batch)["error"]
