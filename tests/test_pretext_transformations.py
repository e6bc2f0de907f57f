"""Which of 72 transformations: each is what it says, none equals another, and the score is over all of them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pretext.task import Batch
from pretext.transformations import KINDS, PLACES, Transformations, moved
from unlabel.backbone import build_backbone
from unlabel.cache import load_cache
from unlabel.config import PretrainConfig
from unlabel.draws import Draws
from unlabel.pretrain import pretrain
from unlabel.sources import open_source


def make(size: int = 32) -> Transformations:
    torch.manual_seed(0)
    return Transformations(build_backbone("small", size), Transformations.Config())


def test_each_kind_is_a_mirroring_and_a_shift(colour_photos: torch.Tensor):
    """Against numpy's reflecting pad and a window, kind by kind; kind 0 leaves the image as it is."""
    image = colour_photos[0].numpy()
    for kind in range(KINDS):
        ours = moved(colour_photos[:1], torch.tensor([kind]))[0].numpy()
        source = image[:, :, ::-1] if kind % 2 else image
        padded = np.pad(source, ((0, 0), (8, 8), (8, 8)), mode="reflect")
        dy, dx = PLACES[kind // 2]
        top, left = 8 - 8 * dy, 8 - 8 * dx
        np.testing.assert_array_equal(ours, padded[:, top : top + 32, left : left + 32])
    assert len(set(PLACES)) == 9


def test_all_72_views_of_a_photo_differ(colour_photos: torch.Tensor):
    views = [
        torch.rot90(moved(colour_photos[:1], torch.tensor([k])), r, (2, 3)) for k in range(KINDS) for r in range(4)
    ]
    assert len({v.numpy().tobytes() for v in views}) == 72


def test_labels_are_those_of_the_views(colour_photos: torch.Tensor):
    task = make()
    views, labels = task._views(Batch(colour_photos[:6], Draws(0, [0] * 6, range(6)), 0.0))
    assert len(set(labels.tolist())) > 12
    for row, (view, label) in enumerate(zip(views, labels.tolist(), strict=True)):
        expected = torch.rot90(moved(colour_photos[row % 6][None], torch.tensor([label // 4])), label % 4, (2, 3))[0]
        assert torch.equal(view, expected)


def test_the_score_is_the_mean_over_all_72(colour_photos: torch.Tensor):
    task = make().eval()
    task.backbone.eval()
    batch = Batch(colour_photos[:3], Draws(0, [0] * 3, range(3)), 0.0)
    expected = torch.zeros(3)
    with torch.no_grad():
        for label in range(72):
            views = torch.rot90(moved(batch.images, torch.full((3,), label // 4)), label % 4, (2, 3))
            logits = task.logits(views)
            expected -= (logits[:, label] - logits.mean(1)) / 72
    assert torch.allclose(task.surprise(batch), expected, atol=1e-4)


@pytest.mark.parametrize("flip", [True, False])
def test_the_loop_shows_it_no_mirror_images(flip: bool, digits_folder, tmp_path, monkeypatch: pytest.MonkeyPatch):
    """Whatever --flip says: a mirrored image would have another answer."""
    seen: list[torch.Tensor] = []
    real = Transformations.forward

    def spy(self: Transformations, batch: Batch):
        seen.append(batch.images.clone())
        return real(self, batch)

    monkeypatch.setattr(Transformations, "forward", spy)
    config = PretrainConfig(
        tasks=("transformations",), data=(str(digits_folder),), out=tmp_path / "run", image_size=32, epochs=0.2,
        batch_size=16, crop=(1.0, 1.0), flip=flip,
    )  # fmt: skip
    pretrain(config)
    cache = load_cache(open_source(str(digits_folder)), 32, progress=False)
    known = {(np.asarray(im).transpose(2, 0, 1)).tobytes() for im in cache.images}
    for images in seen:
        for image in images:
            assert (image * 255).round().byte().numpy().tobytes() in known
