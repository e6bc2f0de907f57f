"""What a trained task is used for: compress, anomalies, map, sample, restore. On real digits and real short runs."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.decomposition import PCA

from downstream import anomalies as an
from downstream import compress as co
from downstream.compress import code_length, squared_error
from downstream.feature_map import flat, neighbours_agree
from downstream.features import is_grey, pixels_of
from downstream.gallery import surest
from downstream.restore import _repaired
from pretext.denoising import Denoising
from pretext.task import Batch
from pretext.trained import load_trained
from unlabel.augment import clean
from unlabel.backbone import load_backbone
from unlabel.cache import evenly_spaced, load_cache
from unlabel.cli import main
from unlabel.colours import COLOURS
from unlabel.draws import Draws
from unlabel.pictures import scatter, sheet
from unlabel.quality import ssim
from unlabel.sources import open_source

SIZE = 16


@pytest.fixture(scope="module")
def runs(digits_folder: Path, tmp_path_factory: pytest.TempPathFactory):
    """A short run of each task that is asked for, made once."""
    root = tmp_path_factory.mktemp("runs")

    def run(task: str, *flags: str, name: str = "", data: Path = digits_folder) -> Path:
        out = root / (name or task)
        command = ["pretrain", task, "--data", str(data), "--image-size", str(SIZE), "--out", str(out), "--no-flip"]
        assert main([*command, "--epochs", "3", "--precision", "fp32", *flags]) == 0
        return out

    return run


# ---------------------------------------------------------------- a trained task


def test_a_trained_task_does_what_it_did_at_the_end_of_training(runs, digits_folder: Path):
    """The loss of the loaded task is what its last previews came from: the same picture, pixel by pixel."""
    run = runs("denoising")
    task = load_trained(run)
    cache = load_cache(open_source(str(digits_folder)), SIZE, progress=False)
    rows = evenly_spaced(len(cache), 8)  # the previews' images, with the draws of those images
    draws = Draws(0, [0] * 8, rows.tolist()).stream("denoising")
    shown = task.show(Batch(clean(torch.from_numpy(np.array(cache.images[rows])), SIZE), draws, 1.0))["prediction"]
    last = np.asarray(Image.open(sorted((run / "previews").glob("*.png"))[-1]).convert("RGB"))
    side = 96 + 2  # previews are enlarged to 96 px, with 2 px between them
    for k in range(8):
        row = last[2 * side + 2 + 3 : 2 * side + 2 + 96 : 6, 2 + k * side + 3 : 2 + k * side + 96 : 6]
        expected = (shown[k] * 255).round().byte().permute(1, 2, 0).numpy()
        assert np.abs(row.astype(int) - expected.astype(int)).max() <= 1


def test_what_is_not_there_is_said(runs, tmp_path: Path, capsys):
    run = runs("denoising")
    for command, words in [
        (["compress", str(run), "--data", "digits"], "makes no code"),
        (["compress", "--data", "digits"], "name at least one finished run"),
        (["sample", str(run)], "no distribution"),
        (["map", str(run), "--data", "digits", "--method", "code"], "makes no code"),
        (
            ["restore", str(run), "--data", "digits", "--task", "rotation", "--out", str(tmp_path)],
            "was not trained with",
        ),
        (["anomalies", str(run), "--data", "digits", "--test", "digits", "--normal", "cat"], "--normal cat"),
        (["anomalies", str(tmp_path), "--data", "digits"], "no backbone"),
        (["anomalies", str(run), "--data", "digits", "--normal", "3"], "give some of both by --test"),
        (["anomalies", str(run), "--data", "digits", "--labels", "l.csv"], "--labels is for the --test images"),
    ]:
        assert main(command) == 2
        assert words in capsys.readouterr().err


# ---------------------------------------------------------------- compress


def test_squared_error_is_summed_over_pixels():
    """Two images of 2x2 pixels, by hand: one is off by 0.5 in one pixel, the other by 1 in all four."""
    images = np.zeros((2, 1, 2, 2))
    painted = images.copy()
    painted[0, 0, 0, 1], painted[1] = 0.5, 1
    assert squared_error(painted, images) == pytest.approx((0.25 + 4) / 2)
    three = [np.repeat(x, 3, 1) for x in (painted, images)]
    assert squared_error(*three) == pytest.approx((0.25 + 4) / 2)


def test_code_length_is_the_entropy_of_what_is_expected():
    """Fair coins cost a bit each, a certainty nothing; what was not seen but lies between costs most."""
    rng = np.random.default_rng(0)
    train, test = rng.integers(0, 2, (100_000, 3)), rng.integers(0, 2, (50_000, 3))
    assert code_length(train, test) == pytest.approx(3, abs=0.01)
    certain = np.zeros((100_000, 1), int)
    assert code_length(certain, certain[:10]) == pytest.approx(0, abs=1e-3)
    gap = np.concatenate([certain, certain + 9])
    assert code_length(gap, certain[:10] + 7) == pytest.approx(np.log2(200_010), abs=0.01)
    skewed = (rng.random((100_000, 1)) < 0.1).astype(int)
    h = -(0.1 * np.log2(0.1) + 0.9 * np.log2(0.9))
    assert code_length(skewed, skewed) == pytest.approx(h, abs=0.01)


def test_compress_writes_what_scikit_learn_says(runs, digits_folder: Path, tmp_path: Path, capsys):
    run = runs("autoencoder", "--autoencoder.code", "8", "--autoencoder.loss", "mse")
    assert main(["compress", str(run), "--data", str(digits_folder), "--out", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "compression.json").read_text())
    cache = load_cache(open_source(str(digits_folder)), SIZE, progress=False)
    rows = pixels_of(cache, SIZE, 1).reshape(len(cache), -1).astype(np.float64)
    assert is_grey(cache.images)
    assert found["channels"] == 1
    for point in found["points"]:
        if point["name"] == "PCA":
            pca = PCA(point["numbers"]).fit(rows)
            left = np.square(rows - pca.inverse_transform(pca.transform(rows))).sum(1).mean()
            assert point["error"] == pytest.approx(left, rel=1e-3)
    own = next(p for p in found["points"] if p["name"] == "autoencoder")
    task = load_trained(run)
    images = clean(torch.from_numpy(np.array(cache.images)), SIZE)
    painted = task.from_code(task.to_code(images), SIZE).mean(1)
    assert own["numbers"] == 8
    assert own["error"] == pytest.approx(float((painted - images[:, 0]).square().sum((1, 2)).mean()), rel=1e-3)
    # Finer rounding: more bits, less error, towards the error without rounding.
    bits, errors = zip(*((r["bits_per_pixel"], r["error"]) for r in own["rates"]), strict=True)
    assert list(bits) == sorted(bits)
    assert errors[0] > errors[-1]
    assert errors[-1] == pytest.approx(own["error"], rel=0.02)
    printed, page = capsys.readouterr().out, (tmp_path / "compression.html").read_text()
    assert "PCA" in printed
    assert page.count("<svg") >= 2
    assert found["known"] == len(cache)  # it was trained on these very images
    assert f"note: {len(cache):,} --data images are near-duplicates" in printed
    assert f"{len(cache):,} --data images are near-duplicates" in page


def test_compress_leaves_out_what_the_runs_did(runs, digits_folder: Path, tmp_path: Path, monkeypatch):
    """Components are fitted to what all runs saw, which lacks what `compare` tests on; or to --train, all of it."""
    fitted: list[list[str]] = []
    real = co.measure

    def watched(tasks, train, test, channels):
        fitted.append(sorted(train.hashes))
        return real(tasks, train, test, channels)

    monkeypatch.setattr(co, "measure", watched)
    cache = load_cache(open_source(str(digits_folder)), SIZE, progress=False)
    one, other = tmp_path / "one", tmp_path / "other"
    gone = {one: set(cache.hashes[::5]), other: set(cache.hashes[1:90])}
    for run, hashes in gone.items():
        shutil.copytree(runs("autoencoder", "--autoencoder.code", "8", "--autoencoder.loss", "mse"), run)
        (run / "excluded.txt").write_text("".join(f"{h}\n" for h in sorted(hashes)))
    command = ["compress", str(one), str(other), "--data", str(digits_folder), "--out", str(tmp_path / "out")]
    for flags in ([], ["--train", str(digits_folder)]):
        assert main([*command, *flags]) == 0
        found = json.loads((tmp_path / "out" / "compression.json").read_text())
        assert found["fitted_on"] == len(fitted[-1])
    assert fitted == [sorted(set(cache.hashes) - gone[one] - gone[other]), sorted(cache.hashes)]


# ---------------------------------------------------------------- anomalies


def test_near_against_a_loop():
    """The image itself does not count, wherever it is; an exact copy of it does."""
    rng = np.random.default_rng(0)
    known, new = rng.normal(size=(20, 5)), rng.normal(size=(7, 5))
    known[3] = known[2]
    expected = [np.sort(np.linalg.norm(known - x, axis=1))[:3].mean() for x in new]
    np.testing.assert_allclose(an.near(known, new, np.full(7, -1)), expected, rtol=1e-6)
    both, own = np.concatenate([new, known]), np.concatenate([np.full(7, -1), np.arange(20)])
    others = [np.sort(np.linalg.norm(np.delete(known, k, 0) - known[k], axis=1))[:3].mean() for k in range(20)]
    np.testing.assert_allclose(an.near(known, both, own), [*expected, *others], rtol=1e-6, atol=1e-12)
    assert an.near(known[:1], new, np.full(7, -1)).shape == (7,)


def test_other_digits_are_strange(runs, digits_folder: Path, tmp_path: Path, capsys):
    """A network that saw zeros only: ones to threes are strange to it, and the ranking says so."""
    zeros = tmp_path / "zeros"
    zeros.mkdir()
    for path in sorted((digits_folder / "0").glob("*.png"))[:60]:
        (zeros / path.name).write_bytes(path.read_bytes())
    run = runs("autoencoder", "--autoencoder.code", "4", "--epochs", "20", name="zeros", data=zeros)
    out = tmp_path / "out"
    command = ["anomalies", str(run), "--data", str(zeros), "--test", str(digits_folder), "--normal", "0"]
    assert main([*command, "--out", str(out)]) == 0
    found = json.loads((out / "auroc.json").read_text())
    assert found["anomalies"] == 240
    assert list(found["scores"]) == ["autoencoder", "features", "pixels", "components", "svm"]
    assert found["scores"]["autoencoder"]["auroc"] > 0.8
    assert found["scores"]["pixels"]["auroc"] > 0.9
    rows = list(csv.DictReader((out / "anomalies.csv").open()))
    values = [float(r["autoencoder"]) for r in rows]
    assert values == sorted(values, reverse=True)
    # The area under the curve, from its definition: the share of pairs in the right order.
    strange = [float(r["autoencoder"]) for r in rows if r["anomaly"] == "1"]
    usual = [float(r["autoencoder"]) for r in rows if r["anomaly"] == "0"]
    share = np.mean([(a > b) + 0.5 * (a == b) for a in strange for b in usual])
    assert found["scores"]["autoencoder"]["auroc"] == pytest.approx(share, abs=1e-4)
    said = capsys.readouterr().out
    assert "AUROC" in said
    assert found["in_data"] >= 60
    assert f"note: {found['in_data']} --test images are near-duplicates of --data images" in said
    assert (out / "anomalies.html").exists()


def test_surprise_does_not_depend_on_the_batch(runs, digits_folder: Path):
    cache = load_cache(open_source(str(digits_folder)), SIZE, progress=False)
    for task in (load_trained(runs("rotation")), load_trained(runs("autoencoder", name="ae"))):
        few, many = an.surprise(task, cache.subset(range(5))), an.surprise(task, cache)
        np.testing.assert_allclose(few, many[:5], rtol=1e-4, atol=1e-6)
        assert many.std() > 0


def test_rotation_is_surprised_by_what_it_cannot_turn_back(runs, digits_folder: Path):
    """The score is the mean over the turns of - log p, by hand; a blank image says nothing: log 4 at least."""
    task = load_trained(runs("rotation"))
    cache = load_cache(open_source(str(digits_folder)), SIZE, progress=False)
    batch = next(task.batches(cache.images[:3]))
    expected = []
    with torch.no_grad():
        for image in batch.images:
            turned = torch.stack([torch.rot90(image, k, (1, 2)) for k in range(4)])
            log_p = task.logits(turned).log_softmax(1)  # type: ignore[operator]
            expected.append(-float(log_p.diagonal().mean()))
    np.testing.assert_allclose(task.surprise(batch).numpy(), expected, rtol=1e-4)
    blank = type(batch)(torch.full_like(batch.images, 0.5), batch.draws, 1.0)
    assert float(task.surprise(blank).min()) >= np.log(4) - 1e-4


# ---------------------------------------------------------------- map


def test_pca_of_the_map_is_scikit_learns_and_neighbours_agree():
    rng = np.random.default_rng(0)
    features = np.concatenate([rng.normal(0, 1, (40, 6)), rng.normal(20, 1, (40, 6))])
    labels = ["a"] * 40 + ["b"] * 40
    for method in ("pca", "tsne"):
        at = flat(features, method)
        assert at.shape == (80, 2)
        assert neighbours_agree(at, labels) == 1.0
    # A point has no vote on itself: of the others, most are always of the other class here.
    assert neighbours_agree(np.arange(8.0).reshape(4, 2), ["a", "b", "a", "b"]) == 0
    mixed = [labels[k] for k in rng.permutation(80)]
    assert 0.2 < neighbours_agree(flat(features, "pca"), mixed) < 0.8


def test_a_map_shows_each_image_where_it_is():
    images = np.stack([np.full((8, 8, 3), v, np.uint8) for v in (10, 200)])
    picture = scatter(np.array([[0.0, 0.0], [1.0, 1.0]]), images, np.array([0, 1]), side=200)
    assert (picture[-20, 20] == 10).all()  # low x, low y: bottom left
    assert (picture[20, -20] == 200).all()
    assert tuple(picture[-1, 0]) == tuple(COLOURS[0])
    assert tuple(picture[0, -1]) == tuple(COLOURS[1])
    assert (picture[0, 0] == 255).all()


def test_map_command(runs, digits_folder: Path, tmp_path: Path, capsys):
    run = runs("autoencoder", "--autoencoder.code", "2", name="two")
    for method in ("tsne", "pca", "code"):
        out = tmp_path / method
        command = ["map", str(run), "--data", str(digits_folder), "--images", "100", "--method", method]
        assert main([*command, "--out", str(out)]) == 0
        rows = list(csv.DictReader((out / "map.csv").open()))
        assert len(rows) == 100
        assert "principal components of the pixels" in capsys.readouterr().out
        assert Image.open(out / "map.png").size == (1000, 1000)
    task, cache = load_trained(run), load_cache(open_source(str(digits_folder)), SIZE, progress=False)
    k = cache.names.index(rows[0]["name"])
    code = task.to_code(clean(torch.from_numpy(np.array(cache.images[k : k + 1])), SIZE))[0]
    assert [float(rows[0]["x"]), float(rows[0]["y"])] == pytest.approx(code.tolist(), rel=1e-3, abs=1e-4)


# ---------------------------------------------------------------- sample


def test_sample_is_of_the_prior_and_walks_end_at_images(runs, digits_folder: Path, tmp_path: Path):
    run = runs("vae", "--vae.code", "8")
    for seed, name in ((0, "a"), (0, "b"), (1, "c")):
        assert main(["sample", str(run), "--out", str(tmp_path / name), "--seed", str(seed)]) == 0
    a, b, c = ((tmp_path / n / "samples.png").read_bytes() for n in "abc")
    assert a == b != c
    walk = np.asarray(Image.open(tmp_path / "a" / "walk.png"))
    cache = load_cache(open_source(str(digits_folder)), SIZE, progress=False)
    images = (clean(torch.from_numpy(np.array(cache.images)), SIZE) * 255).round().byte().permute(0, 2, 3, 1).numpy()
    for left in (0, 9 * 66):  # the first and the last of a row: 16 px enlarged four times, 2 px between
        end = walk[2:64:4, left + 2 : left + 64 : 4]
        assert any(np.array_equal(end, image) for image in images)


# ---------------------------------------------------------------- restore


def test_ssim_against_its_definition():
    """One 11x11 window, by the formula with explicit sums; equal images score 1, contrary ones less than 0."""
    rng = np.random.default_rng(0)
    a, b = (rng.random((11, 11)) for _ in range(2))
    at = np.arange(11) - 5
    w = np.exp(-(at[:, None] ** 2 + at[None] ** 2) / (2 * 1.5**2))
    w /= w.sum()
    ma, mb = (w * a).sum(), (w * b).sum()
    va, vb, cov = (w * (a - ma) ** 2).sum(), (w * (b - mb) ** 2).sum(), (w * (a - ma) * (b - mb)).sum()
    expected = (2 * ma * mb + 1e-4) * (2 * cov + 9e-4) / ((ma**2 + mb**2 + 1e-4) * (va + vb + 9e-4))
    ta, tb = (torch.from_numpy(x)[None, None] for x in (a, b))
    assert float(ssim(ta, tb)) == pytest.approx(expected, rel=1e-6)
    many = torch.rand(2, 3, 24, 24, dtype=torch.float64)
    assert torch.allclose(ssim(many, many), torch.ones(2, dtype=torch.float64))
    assert float(ssim(many, 1 - many).max()) < 0


@pytest.mark.parametrize("task", ["denoising", "inpainting", "superresolution", "colorization"])
def test_restore_what_was_damaged(task: str, runs, digits_folder: Path, tmp_path: Path, capsys):
    """The scores are those of the files: PSNR anew, by numpy, from what was written."""
    run = runs(task)
    assert main(["restore", str(run), "--data", str(digits_folder), "--out", str(tmp_path), "--damage"]) == 0
    about = json.loads((tmp_path / "restored.json").read_text())
    assert about["images"] == 320
    assert "PSNR" in capsys.readouterr().out
    cache = load_cache(open_source(str(digits_folder)), SIZE, progress=False)
    images = clean(torch.from_numpy(np.array(cache.images)), SIZE).permute(0, 2, 3, 1).numpy()
    scores = []
    for name, image in zip(cache.names, images, strict=True):
        restored = np.asarray(Image.open((tmp_path / "restored" / name).with_suffix(".png"))) / 255
        scores.append(-10 * np.log10(np.square(restored - image).mean()))
    assert about["psnr_after"] == pytest.approx(np.mean(scores), abs=0.1)
    assert 0 < about["ssim_after"] < 1
    if task == "superresolution":
        assert about["psnr_after"] > about["psnr_before"]


def test_restored_is_the_noisy_picture_that_is_shown(runs, digits_folder: Path):
    """Noise leaves [0, 1] and a picture cannot: what is repaired is the picture, as from a file."""
    task = load_trained(runs("denoising"))
    assert isinstance(task, Denoising)
    cache = load_cache(open_source(str(digits_folder)), SIZE, progress=False)
    batch = next(task.batches(cache.images[:8], cache.hashes[:8]))
    noisy, shown = task.noisy(batch)[0], task.show(batch)
    before, after = _repaired(task, batch, None, True)
    assert float(noisy.min()) < 0
    assert float(noisy.max()) > 1
    assert torch.equal(before, noisy.clamp(0, 1))
    assert torch.equal(before, shown["input"])
    assert torch.equal(after, task.restore(before, None))
    assert not torch.allclose(after, shown["prediction"], atol=1e-3)  # which is of the noise as it was


def test_what_is_visible_stays_and_masks_belong_by_name(runs, digits_folder: Path, tmp_path: Path):
    """Inpainting by masks, of which each class has its own: outside of the hole the restored image is the image."""
    masks, run, out = tmp_path / "masks", runs("inpainting"), tmp_path / "out"
    for path in digits_folder.rglob("*.png"):
        hole = np.zeros((32, 32), np.uint8)
        top = 4 * int(path.parent.name)
        hole[top : top + 8, 8:24] = 255
        (masks / path.parent.name).mkdir(parents=True, exist_ok=True)
        Image.fromarray(hole).save((masks / path.parent.name / path.name).with_suffix(".bmp"))
    Image.fromarray(np.full((32, 32), 255, np.uint8)).save(masks / "0" / "00 of no image.bmp")  # the first by its name
    command = ["restore", str(run), "--data", str(digits_folder), "--hidden", str(masks), "--clean", str(digits_folder)]
    assert main([*command, "--out", str(out)]) == 0
    cache = load_cache(open_source(str(digits_folder)), SIZE, progress=False)
    pixels = (clean(torch.from_numpy(np.array(cache.images)), SIZE) * 255).round().byte()
    for name, image in zip(cache.names[::16], pixels.permute(0, 2, 3, 1).numpy()[::16], strict=True):
        restored = np.asarray(Image.open((out / "restored" / name).with_suffix(".png")))
        outside, top = np.ones((SIZE, SIZE), bool), 2 * int(name[0])
        outside[max(0, top - 1) : top + 5, 3:13] = False  # the mask is antialiased: its edge belongs to it
        assert np.array_equal(restored[outside], image[outside])
        assert not np.array_equal(restored[~outside], image[~outside])
    about = json.loads((out / "restored.json").read_text())
    assert about["psnr_after"] != about["psnr_before"]


def test_a_scratch_thinner_than_a_pixel_is_hidden(runs, digits_folder: Path, tmp_path: Path, capsys):
    """A line of two pixels of 256 is less than a pixel of 16, and still a hole; a mask of zeros and ones is not."""
    photos, masks = tmp_path / "photos", tmp_path / "masks"
    photos.mkdir()
    masks.mkdir()
    image = Image.open(next(digits_folder.rglob("*.png"))).resize((256, 256))
    image.save(photos / "a.png")
    line = np.zeros((256, 256), np.uint8)
    line[130:132, 40:200] = 255
    run, command = runs("inpainting"), ["--data", str(photos), "--hidden", str(masks), "--out", str(tmp_path / "out")]
    Image.fromarray(line).save(masks / "a.png")
    assert main(["restore", str(run), *command]) == 0
    restored = np.asarray(Image.open(tmp_path / "out" / "restored" / "a.png")).astype(int)
    cache = load_cache(open_source(str(photos)), SIZE, progress=False)
    before = (clean(torch.from_numpy(np.array(cache.images)), SIZE)[0] * 255).round().permute(1, 2, 0).numpy()
    assert 8 in set(np.argwhere(np.abs(restored - before).max(2) > 0)[:, 0]) <= {7, 8, 9}
    Image.fromarray(line // 255).save(masks / "a.png")
    assert main(["restore", str(run), *command[:-1], str(tmp_path / "nothing")]) == 2
    assert "hides anything" in capsys.readouterr().err
    assert not (tmp_path / "nothing").exists()


def test_restore_refuses_what_does_not_fit(runs, digits_folder: Path, tmp_path: Path, capsys):
    (tmp_path / "few").mkdir()
    first = next(digits_folder.rglob("*.png"))
    (tmp_path / "few" / first.name).write_bytes(first.read_bytes())
    run, data = runs("inpainting"), ["--data", str(digits_folder), "--out", str(tmp_path / "out")]
    for flags, words in [
        ([], "must know what is hidden"),
        (["--hidden", str(tmp_path / "few")], "has no image for"),
        (["--damage", "--clean", str(tmp_path / "few")], "no --clean"),
        (["--damage", "--out", str(digits_folder)], "would write into"),
    ]:
        assert main(["restore", str(run), *data, *flags]) == 2
        assert words in capsys.readouterr().err
    assert main(["restore", str(runs("rotation")), *data]) == 2
    assert "repairs nothing" in capsys.readouterr().err
    assert main(["restore", str(runs("denoising")), *data, "--hidden", str(tmp_path / "few")]) == 2
    assert "--hidden is for inpainting" in capsys.readouterr().err


def test_no_image_is_written_over_another(runs, digits_folder: Path, tmp_path: Path, capsys):
    first, twice = next(digits_folder.rglob("*.png")), tmp_path / "twice" / "2024.05"
    twice.mkdir(parents=True)
    for name in ("IMG1.png", "IMG2.png"):
        (twice / name).write_bytes(first.read_bytes())
    command = ["restore", str(runs("denoising")), "--data", str(tmp_path / "twice"), "--out", str(tmp_path / "two")]
    assert main(command) == 0
    names = {p.name for p in (tmp_path / "two" / "restored" / "2024.05").iterdir()}
    assert names == {"IMG1.png", "IMG2.png"}
    Image.open(first).save(twice / "IMG1.bmp")
    assert main(command) == 2
    assert "differ in their suffix at most" in capsys.readouterr().err


# ---------------------------------------------------------------- pictures; mirror images


def test_a_sheet_has_each_image_at_its_place():
    rows = [np.stack([np.full((4, 4, 3), 10 * r + c, np.uint8) for c in range(3)]) for r in range(2)]
    picture = sheet(rows, least=8)
    assert picture.shape == (2 * 8 + 2, 3 * 8 + 4, 3)
    for r in range(2):
        for c in range(3):
            assert (picture[r * 10 : r * 10 + 8, c * 10 : c * 10 + 8] == 10 * r + c).all()


def test_no_flip_is_kept_with_the_backbone(runs):
    run = runs("autoencoder", name="ae")
    assert load_backbone(run).spec.flip is False
    assert json.loads((run / "backbone.json").read_text())["flip"] is False


def test_surest_hits_and_misses():
    """By probability, not by the raw logit: adding a constant to an image's logits changes nothing."""
    p = np.array([[0.9, 0.1], [0.4, 0.6], [0.2, 0.8], [0.51, 0.49], [0.05, 0.95]])
    y = np.array([0, 1, 0, 0, 0])
    log_p = np.log(p) + np.array([0, 100, 0, -50, 7])[:, None]
    found = surest(log_p, y)
    assert found["hits"].tolist() == [0, 1, 3]
    assert found["misses"].tolist() == [4, 2]


def test_no_picture_is_written_among_the_images(runs, digits_folder: Path, tmp_path: Path, capsys):
    """They would be images the next time."""
    data = ["--data", str(digits_folder)]
    given = {"map": data, "anomalies": [*data, "--test", str(digits_folder)], "compress": data, "sample": data}
    for command, flags in given.items():
        run = runs("vae", name="among") if command in ("sample", "compress") else runs("denoising")
        assert main([command, str(run), *flags, "--out", str(digits_folder / "out")]) == 2
        assert "lies inside" in capsys.readouterr().err
    assert not (digits_folder / "out").exists()
