"""The autoencoder and the variational one: their losses against closed forms."""

from __future__ import annotations

import hashlib
import math
import runpy
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.distributions import Bernoulli, Normal, kl_divergence

from pretext.autoencoder import Autoencoder
from pretext.code import bernoulli_divergence
from pretext.decoder import Decoder, mean_image_error, mean_of_others
from pretext.task import Batch
from pretext.vae import VAE, divergence
from unlabel.backbone import build_backbone
from unlabel.draws import Draws
from unlabel.errors import UserError


def batch_of(images: torch.Tensor, epoch: int = 0, progress: float = 1.0) -> Batch:
    return Batch(images, Draws(0, [epoch] * len(images), list(range(len(images)))), progress)


def autoencoder(**settings) -> Autoencoder:
    torch.manual_seed(0)
    return Autoencoder(build_backbone("small", 32), Autoencoder.Config(**settings)).eval()


def vae(**settings) -> VAE:
    torch.manual_seed(0)
    return VAE(build_backbone("small", 32), VAE.Config(**settings)).eval()


def test_bernoulli_divergence_against_torch():
    generator = torch.Generator().manual_seed(0)
    images, logits = torch.rand(2, 3, 4, 4, generator=generator), torch.randn(2, 3, 4, 4, generator=generator)
    want = kl_divergence(Bernoulli(probs=images), Bernoulli(logits=logits))
    assert torch.allclose(bernoulli_divergence(logits, images), want, atol=1e-5)
    exact = bernoulli_divergence(images.logit(), images)
    assert exact.abs().max() < 1e-5
    black_and_white = (images > 0.5).float()  # no entropy, and no NaN
    want = torch.nn.functional.softplus(torch.where(black_and_white > 0, -logits, logits))
    assert torch.allclose(bernoulli_divergence(logits, black_and_white), want, atol=1e-5)


@pytest.mark.parametrize("loss", ["bce", "mse"])
def test_everything_goes_through_the_code(loss: str, colour_photos: torch.Tensor):
    """Two images of one code are painted alike, and the code is as small as was asked for."""
    task = autoencoder(code=7, loss=loss)
    features = task.backbone(colour_photos[:4])
    code = task.code.encode(features.last)
    assert code.shape == (4, 7)
    painted = task.code.decode(code, 32)
    assert torch.equal(painted, task.predict(colour_photos[:4]))
    same = task.code.decode(code[:1].expand(4, -1), 32)
    assert torch.allclose(same, painted[:1].expand(4, -1, -1, -1), atol=1e-5)
    out = task(batch_of(colour_photos[:4]))
    by_hand = ((task.paint(painted.detach()) - colour_photos[:4]) ** 2).mean()
    assert float(out["error"]) == pytest.approx(float(by_hand), rel=1e-4)


def test_divergence_against_torch():
    generator = torch.Generator().manual_seed(0)
    mean, log_variance = (torch.randn(5, 8, generator=generator) for _ in range(2))
    want = kl_divergence(Normal(mean, (0.5 * log_variance).exp()), Normal(0.0, 1.0))
    assert torch.allclose(divergence(mean, log_variance), want, atol=1e-5)
    assert float(divergence(torch.zeros(1), torch.zeros(1))) == 0


@pytest.mark.parametrize("likelihood", ["bernoulli", "gaussian"])
def test_the_loss_of_two_images_by_hand(likelihood: str, colour_photos: torch.Tensor):
    """Summed over pixels, summed over the code, then averaged over the two."""
    task = vae(code=3, likelihood=likelihood, deviation=0.2, beta=2.0, warmup=0.5)
    images = colour_photos[:2]
    batch = batch_of(images, progress=0.25)  # half of the warm-up: beta 1
    mean, log_variance = task.encode(images)
    noise = batch.draws.stream("vae").normal(3)
    assert noise.shape == (2, 3)
    painted = torch.sigmoid(task.code.decode(mean + torch.exp(log_variance / 2) * noise, 32))
    x, p = images.detach().double().numpy(), painted.detach().double().numpy()
    m, v = mean.detach().double().numpy(), log_variance.detach().double().exp().numpy()
    total = 0.0
    for k in range(2):
        if likelihood == "bernoulli":
            inside = np.clip(x[k], 1e-12, 1 - 1e-12)
            missed = -(x[k] * np.log(p[k]) + (1 - x[k]) * np.log(1 - p[k])).sum()
            missed += (inside * np.log(inside) + (1 - inside) * np.log(1 - inside)).sum()
        else:
            missed = ((p[k] - x[k]) ** 2 / 0.08 + math.log(0.2 * math.sqrt(2 * math.pi))).sum()
        total += missed + 0.5 * (m[k] ** 2 + v[k] - 1 - np.log(v[k])).sum()
    out = task(batch)
    assert float(out["loss"].detach()) == pytest.approx(total / 2, rel=1e-4)
    assert float(out["bound"]) == pytest.approx(total / 2, rel=1e-4)
    assert task(batch_of(images, progress=0.5))["loss"] > out["loss"]  # beta 2


@pytest.mark.parametrize("likelihood", ["bernoulli", "gaussian"])
def test_a_pixel_of_a_grey_image_counts_once(likelihood: str, colour_photos: torch.Tensor):
    """The bound is that of 32 × 32 numbers, and what is painted is grey."""
    task, grey = vae(code=3, likelihood=likelihood), vae(code=3, likelihood=likelihood, grey=True)
    images = colour_photos[:4].mean(1, keepdim=True).expand(-1, 3, -1, -1)
    missed, kl, mean = grey.parts(batch_of(images))
    code = grey.sample(*grey.encode(images), batch_of(images))
    painted = grey.decode(code, 32)
    assert torch.equal(painted[:, 0], painted[:, 2])
    assert torch.allclose(painted[:, 0], task.code.decode(code, 32).mean(1), atol=1e-6)
    one, three = grey.missed(painted, images), task.missed(painted, images)
    assert torch.equal(one, missed)
    assert torch.allclose(three, 3 * one, rtol=1e-4)
    assert float(grey(batch_of(images))["bound"]) == pytest.approx(
        float((missed + kl.sum(1)).mean().detach()), rel=1e-5
    )
    shown = grey.show(batch_of(images))["prediction"]
    assert torch.equal(shown, grey.from_code(mean, 32))
    assert torch.equal(shown[:, 0], shown[:, 1])


def test_binarised_once_by_the_image_and_a_seed():
    script = runpy.run_path(str(Path(__file__).parents[1] / "scripts" / "vae_elbo.py"))
    shades = np.linspace(0, 255, 256).round().astype(np.uint8).reshape(1, 16, 16, 1)
    images = np.repeat(np.repeat(shades, 3, axis=3), 400, axis=0)
    hashes = [hashlib.sha256(str(k).encode()).hexdigest() for k in range(400)]
    drawn = script["binarised"](images, hashes, 0)
    assert drawn.shape == (400, 16, 16)
    assert set(np.unique(drawn)) == {0, 255}
    assert (drawn[:, 0, 0] == 0).all()
    assert (drawn[:, 15, 15] == 255).all()
    off = drawn.mean(0) / 255 - shades[0, :, :, 0] / 255  # a pixel's share of white: its shade
    assert abs(off).max() < 0.1
    assert off.std() == pytest.approx(math.sqrt(1 / 6 / 400), rel=0.2)  # sqrt(mean of p (1 - p) / 400)
    others = script["binarised"](images[:7], hashes[6::-1], 0)  # in another order, among other images
    assert np.array_equal(others, drawn[6::-1])
    assert not np.array_equal(script["binarised"](images[:7], hashes[:7], 1), drawn[:7])


def test_gradients_flow_through_the_draw(colour_photos: torch.Tensor):
    task = vae(code=3, beta=0.0)
    batch = batch_of(colour_photos[:2])
    task(batch)["loss"].backward()
    weight = task.code.into.weight.grad
    assert weight is not None
    assert weight[:3].abs().sum() > 0  # the means
    assert weight[3:].abs().sum() > 0  # the variances, reached through the draw alone: beta is 0
    fresh = task.sample(*task.encode(colour_photos[:2]), batch_of(colour_photos[:2], epoch=1))
    assert not torch.equal(fresh, task.sample(*task.encode(colour_photos[:2]), batch))


def test_a_collapsed_code_is_dead(colour_photos: torch.Tensor):
    task = vae(code=4)
    with torch.no_grad():
        task.code.into.weight.zero_()
        assert task.code.into.bias is not None
        task.code.into.bias.zero_()
        task.code.into.bias[0] = 1.0  # half a nat in the first number, nothing in the others
    out = task(batch_of(colour_photos[:2]))
    assert float(out["alive"]) == 0.25
    assert float(out["information"]) == pytest.approx(0.5, abs=1e-5)


def test_wrong_settings():
    for settings in ({"code": 0}, {"loss": "l1"}):
        with pytest.raises(UserError, match="autoencoder"):
            autoencoder(**settings)
    for settings in ({"code": 0}, {"likelihood": "x"}, {"deviation": 0.0}, {"beta": -1.0}, {"warmup": 2.0}):
        with pytest.raises(UserError, match="vae"):
            vae(**settings)


def test_the_decoder_goes_all_the_way_where_images_are_small():
    """Up through the sides that halving gives: to 28 px in full, to 64 px but for the last, bilinear doubling."""

    def sides(decoder: Decoder) -> list[int]:
        return [m.size for m in decoder.layers if isinstance(m, torch.nn.Upsample)]  # type: ignore[misc]

    assert sides(Decoder(8, 4, 28)) == [7, 14, 28]
    assert sides(Decoder(8, 3, 40)) == [5, 10, 20, 40]
    assert sides(Decoder(8, 4, 64)) == [8, 16, 32]
    assert sides(Decoder(8, 4, 64, full=True)) == [8, 16, 32, 64]
    for side, size in ((4, 28), (1, 28), (2, 64), (7, 224)):
        assert Decoder(8, side, size)(torch.zeros(1, 8, side, side), size).shape == (1, 3, size, size)


def test_single_pixels_survive_a_decoder_that_goes_all_the_way():
    """How much of its painting can be a checkerboard of single pixels: of a bilinear last doubling, its edges only."""
    board = (torch.arange(32)[:, None] + torch.arange(32)).remainder(2).float() - 0.5
    shares = {}
    for full in (True, False):
        torch.manual_seed(3)
        decoder = Decoder(8, 4, 32, full=full)
        optimizer = torch.optim.Adam(decoder.parameters(), 1e-2)
        features = torch.randn(1, 8, 4, 4)
        for _ in range(80):
            painted = decoder(features, 32)
            painted = painted - painted.mean()
            share = (painted * board).sum().square() / (painted.square().sum() * 3 * board.square().sum())
            optimizer.zero_grad()
            (-share).backward()
            optimizer.step()
        shares[full] = float(share.detach())
    assert shares[False] < 0.001 < 0.8 < shares[True]


def test_more_channels_in_the_decoder():
    few, many = (sum(p.numel() for p in autoencoder(channels=c).code.decoder.parameters()) for c in (16, 32))
    assert many > 2 * few
    with pytest.raises(UserError, match="channels 12"):
        autoencoder(channels=12)


def test_the_mean_of_others_against_a_loop():
    images = torch.rand(5, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    for image, found in zip(range(5), mean_of_others(images), strict=True):
        want = np.mean([images[k].numpy() for k in range(5) if k != image], axis=0)
        np.testing.assert_allclose(found.numpy(), want, atol=1e-6)
    alone = mean_of_others(images[:1])  # there are no others: its mean colour
    want = images[0].numpy().mean((1, 2), keepdims=True)
    np.testing.assert_allclose(alone[0].numpy(), np.broadcast_to(want, (3, 4, 4)), atol=1e-6)


def test_the_trivial_error_knows_nothing_of_the_image():
    """Of a black and a white image, all of it is wrong; of a few images, it is no less than of many."""
    black_and_white = torch.arange(2.0).view(2, 1, 1, 1).expand(2, 3, 4, 4)
    assert mean_image_error(black_and_white) == 1.0
    generator = torch.Generator().manual_seed(0)
    errors = [mean_image_error(torch.rand(4, 3, 8, 8, generator=generator)) for _ in range(400)]
    assert np.mean(errors) == pytest.approx(1 / 12 * 4 / 3, rel=0.01)  # a uniform number's variance, and a third more
    assert mean_image_error(torch.rand(400, 3, 8, 8, generator=generator)) == pytest.approx(1 / 12, rel=0.01)


def test_the_trivial_bound_is_of_the_others():
    """The variational one's, too: of two images each is painted as the other is."""
    task, images = vae(code=3, likelihood="gaussian", deviation=0.2), torch.rand(2, 3, 8, 8)
    error = float((images[0] - images[1]).square().mean())
    trivial = task.trivial(batch_of(images))
    assert trivial["error"] == pytest.approx(error, rel=1e-5)
    assert trivial["bound"] == pytest.approx(192 * (error / 0.08 + math.log(0.2 * math.sqrt(2 * math.pi))), rel=1e-3)
