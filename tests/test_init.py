"""Weights that come from elsewhere: a file, timm's by name, as the start of pretraining and as they are."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import huggingface_hub.constants
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from downstream import finetune as ft
from unlabel import checkpoint
from unlabel.backbone import build_backbone, load_backbone
from unlabel.checkpoint import file_sha256
from unlabel.cli import main
from unlabel.config import PretrainConfig
from unlabel.errors import UserError
from unlabel.init import load_start, start_beside, start_of
from unlabel.pretrain import pretrain
from unlabel.report import answer, write_report
from unlabel.report_choice import choice, title

NETWORK = "test_resnet"  # timm's smallest with weights of its own: a deep stem, mean 0.5
NAME = f"{NETWORK}.r160_in1k"
STILL = {"lr": 1e-12, "epochs": 0.05, "weight_decay": 0.0}  # what it starts from is what it ends with


def settings(data: Path, out: Path, **more) -> PretrainConfig:
    given = {"image_size": 32, "epochs": 0.2, "batch_size": 16, "checkpoint_every": 2, "precision": "fp32", **more}
    return PretrainConfig(tasks=("rotation",), data=(str(data),), out=out, **given)


@pytest.fixture(scope="module")
def exported(digits_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `unlabel export` writes of a short rotation run with timm's own stem."""
    folder = tmp_path_factory.mktemp("exported")
    run = pretrain(settings(digits_folder, folder / "run", backbone=NETWORK, stem="timm"))
    assert main(["export", str(run), "--to", str(folder / "given.safetensors")]) == 0
    return folder / "given.safetensors"


@pytest.fixture(scope="module")
def with_classifier(exported: Path) -> Path:
    """The same as timm publishes weights: with a classifier; and without BatchNorm's counters."""
    weights = {k: v for k, v in load_file(exported).items() if not k.endswith("num_batches_tracked")}
    path = exported.with_name("timm.safetensors")
    save_file(weights | {"fc.weight": torch.ones(1000, 96), "fc.bias": torch.ones(1000)}, path)
    return path


@pytest.fixture
def hub(with_classifier: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The hub's cache on a machine without network: it holds the weights of NAME. Returns their file."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    repository = tmp_path / "hub" / f"models--timm--{NAME}"
    snapshot = repository / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    return Path(shutil.copy(with_classifier, snapshot / "model.safetensors"))


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    """Without BatchNorm's statistics, which are estimated anew at the end of a run."""
    found = load_file(folder / "backbone.safetensors")
    return {k: v for k, v in found.items() if "running" not in k and not k.endswith("tracked")}


def assert_same(found: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> None:
    for name, value in found.items():
        assert torch.allclose(value, want[name], atol=1e-6), name


def about(run: Path) -> dict:
    return json.loads((run / "config.json").read_text())


# ---- A file


def test_a_file_is_where_pretraining_starts(exported: Path, digits_folder: Path, tmp_path: Path):
    config = settings(digits_folder, tmp_path / "run", backbone=NETWORK, init=str(exported), **STILL)
    run = pretrain(config)
    assert_same(weights_of(run), load_file(exported))
    held = about(run)
    assert held["settings"]["init"] == file_sha256(exported)
    assert held["free"]["init"] == str(exported)
    # 32 px would have another stem: these weights have timm's.
    assert held["settings"]["stem"] == "timm"
    assert json.loads((run / "backbone.json").read_text())["changed"] == []


def test_a_classifier_is_left_out_by_name(with_classifier: Path, digits_folder: Path, tmp_path: Path, capsys):
    config = settings(digits_folder, tmp_path / "run", backbone=NETWORK, init=str(with_classifier), **STILL)
    assert_same(weights_of(pretrain(config)), load_file(with_classifier))
    assert "its classifier is not needed: fc.bias, fc.weight\n" in capsys.readouterr().out


def test_a_forced_stem_is_left_at_random_and_named(exported: Path, digits_folder: Path, tmp_path: Path, capsys):
    config = settings(digits_folder, tmp_path / "run", backbone=NETWORK, stem="small", init=str(exported), **STILL)
    run = pretrain(config)
    assert "left at random, as the small stem is not timm's: conv1.weight\n" in capsys.readouterr().out
    found = weights_of(run)
    random = build_backbone(NETWORK, 32, "small", seed=0).model.state_dict()
    assert torch.allclose(found.pop("unlabel_stem.conv1.weight"), random["conv1.weight"], atol=1e-6)
    assert_same(found, load_file(exported))


def test_a_forced_stem_of_the_same_name_and_shape_stays_random(tmp_path: Path):
    model = timm.create_model("lcnet_035", num_classes=3)
    save_file(model.state_dict(), tmp_path / "given.safetensors")
    backbone = build_backbone("lcnet_035", 32, "small")
    before = backbone.model.conv_stem.weight.clone()
    assert before.shape == model.get_parameter("conv_stem.weight").shape
    load_start(start_of(tmp_path / "given.safetensors", "lcnet_035", "small"), backbone, None)
    assert torch.equal(backbone.model.conv_stem.weight, before)
    assert torch.equal(backbone.model.conv_head.weight, model.get_parameter("conv_head.weight"))


def test_a_file_with_our_own_stem(digits_folder: Path, tmp_path: Path):
    first = pretrain(settings(digits_folder, tmp_path / "first", epochs=0.1))
    given = Path(shutil.copy(first / "backbone.safetensors", tmp_path / "given.safetensors"))
    second = pretrain(settings(digits_folder, tmp_path / "second", init=str(given), **STILL))
    assert_same(weights_of(second), load_file(given))
    with pytest.raises(UserError, match=r"do not fit .* give the --backbone \(and --stem\)"):
        pretrain(settings(digits_folder, tmp_path / "third", stem="timm", init=str(given), **STILL))


@pytest.mark.parametrize(
    ("init", "more", "words"),
    [
        ("given.safetensors", {"backbone": "resnet10t"}, r"--init .*given\.safetensors: the weights do not fit"),
        ("given.safetensors", {"backbone": "mlp:30"}, "do not fit"),
        ("half.safetensors", {"backbone": NETWORK}, "do not fit this backbone: 1 missing, 0 unexpected"),
        ("more.safetensors", {"backbone": NETWORK}, "0 missing, 1 unexpected"),
        ("cut.safetensors", {"backbone": NETWORK}, "not a readable safetensors file"),
        ("none.safetensors", {"backbone": NETWORK}, "does not exist"),
        ("pickle.pth", {"backbone": NETWORK}, "convert it to safetensors"),
        ("gone.bin", {"backbone": NETWORK}, "convert it to safetensors"),
        ("timm:", {}, "no network has this name"),
        ("timm:../x", {}, "no network has this name"),
        ("timm:small", {}, "timm has no weights of this name"),
        ("timm:darknet17", {}, "timm has no weights of this name"),
        ("timm:resnet18.nope", {}, "Invalid pretrained tag"),
        ("timm:legacy_seresnet18", {}, "pickle"),
        ("timm:test_vit", {}, "is not a ConvNet|does not work"),
        (f"timm:{NETWORK}", {"backbone": "resnet18"}, "is not of --backbone resnet18"),
        (f"timm:{NETWORK}", {"backbone": "small"}, "is not of --backbone small"),
    ],
)
def test_what_does_not_fit_is_one_clear_line(
    init: str, more: dict, words: str, exported: Path, digits_folder: Path, tmp_path: Path
):
    weights = load_file(exported)
    save_file({k: v for k, v in weights.items() if k != "bn1.bias"}, tmp_path / "half.safetensors")
    save_file(weights | {"head.bias": torch.ones(3)}, tmp_path / "more.safetensors")
    (tmp_path / "cut.safetensors").write_bytes(exported.read_bytes()[:5000])
    torch.save(weights, tmp_path / "pickle.pth")
    shutil.copy(exported, tmp_path)
    path = init if init.startswith("timm:") else str(tmp_path / init)
    with pytest.raises(UserError, match=words) as error:
        pretrain(settings(digits_folder, tmp_path / "run", init=path, **more, **STILL))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run" / "config.json").exists()


class Killed(Exception):
    pass


def killed(config: PretrainConfig, monkeypatch: pytest.MonkeyPatch, saves: int) -> None:
    """Run until so many checkpoints are written, then die."""
    done, real = [], checkpoint.save

    def save(*args):
        if len(done) == saves:
            raise Killed
        done.append(real(*args))

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save", save)
        with pytest.raises(Killed):
            pretrain(config)


def test_a_run_goes_on_from_the_same_file_only(exported: Path, digits_folder: Path, tmp_path: Path, monkeypatch):
    given = Path(shutil.copy(exported, tmp_path / "given.safetensors"))
    config = settings(digits_folder, tmp_path / "run", backbone=NETWORK, init=str(given))
    killed(config, monkeypatch, saves=1)
    weights = load_file(given)
    save_file(weights | {"bn1.bias": weights["bn1.bias"] + 1}, given)
    with pytest.raises(UserError, match="init was"):
        pretrain(config)
    given.unlink()  # the checkpoint has all that is needed
    assert pretrain(config) == config.out
    random = dataclasses.replace(config, init=None, out=tmp_path / "random", stem="timm")
    killed(random, monkeypatch, saves=1)
    with pytest.raises(UserError, match="does not exist"):
        pretrain(dataclasses.replace(random, init=str(given)))


# ---- timm's, by name


def test_timms_weights_by_name(hub: Path, digits_folder: Path, tmp_path: Path, capsys):
    out, flags = tmp_path / "run", "--image-size 32 --epochs 0.05 --lr 1e-12 --weight-decay 0 --precision fp32"
    command = ["pretrain", "rotation", "--data", str(digits_folder), "--out", str(out), *flags.split()]
    command += ["--init", f"timm:{NETWORK}"]
    assert main(command) == 0
    assert_same(weights_of(out), load_file(hub))
    spec = load_backbone(out).spec
    assert (spec.name, spec.stem, spec.mean) == (NAME, "timm", (0.5, 0.5, 0.5))
    held = about(out)
    assert held["free"]["init"] == f"timm:{NAME}"
    assert held["settings"]["init"] == f"timm:{NAME} {file_sha256(hub)}"
    assert held["settings"]["backbone"] == NAME
    assert NAME in capsys.readouterr().out
    # As plain timm loads it: the same features.
    model = timm.create_model(spec.name, num_classes=0)
    model.load_state_dict(load_file(out / "backbone.safetensors"))
    hub.unlink()  # a finished run asks for nothing
    assert main(command) == 0
    assert main([*command, "--backbone", NETWORK]) == 0  # its network may be named
    assert main([*command, "--backbone", "resnet18"]) == 2


def test_timms_weights_changed_before_the_first_checkpoint(hub: Path, digits_folder: Path, tmp_path: Path, monkeypatch):
    config = settings(digits_folder, tmp_path / "run", init=f"timm:{NAME}")
    killed(config, monkeypatch, saves=0)
    weights = {k: v.clone() for k, v in load_file(hub).items()}  # not those of a file that is written over
    save_file(weights | {"bn1.bias": weights["bn1.bias"] + 1}, hub)
    with pytest.raises(UserError, match="init was"):
        pretrain(config)
    save_file(weights, hub)
    killed(config, monkeypatch, saves=1)
    hub.unlink()
    assert pretrain(config) == config.out


def test_without_network_one_line(hub: Path, digits_folder: Path, tmp_path: Path, capsys):
    hub.unlink()
    out, flags = tmp_path / "run", ["--image-size", "32", "--epochs", "0.05", "--init", f"timm:{NETWORK}"]
    capsys.readouterr()
    assert main(["pretrain", "rotation", "--data", str(digits_folder), "--out", str(out), *flags]) == 2
    (line,) = (line for line in capsys.readouterr().err.splitlines() if not line.startswith("downloading "))
    assert line.startswith(f"unlabel: cannot download timm:{NAME} (Cannot reach https://")
    assert line.endswith("; check the network, or give --init a .safetensors file")
    assert not (out / "config.json").exists()


def test_the_network_and_the_stem_follow_from_the_name():
    assert start_of(None, None, "auto").backbone == "small"
    assert start_of(f"timm:{NETWORK}", None, "auto") == start_of(f"timm:{NAME}", NETWORK, "timm")
    assert start_of(f"timm:{NETWORK}", None, "half").stem == "half"
    # Only measured, beside a run: of a network of their own.
    assert start_beside(f"timm:{NETWORK}", "small", "half") == start_of(f"timm:{NETWORK}", None, "auto")


# ---- As they are given, beside pretraining


@pytest.fixture(scope="module")
def short_presets(short_presets: pytest.MonkeyPatch):
    short_presets.setattr(ft, "pick_precision", lambda *_: "fp32")


def test_compare_measures_them_as_they_are(
    hub: Path, digits_folder: Path, tmp_path: Path, short_presets, capsys: pytest.CaptureFixture[str]
):
    out, init = tmp_path / "out", f"timm:{NETWORK}"
    flags = "--image-size 16 --tasks rotation --epochs 0.1 --labels-per-class 5 --draws 2 --precision fp32"
    sources = ["--data", str(digits_folder), "--train", str(digits_folder), "--out", str(out)]
    sources += ["--protocol", "finetune", "knn"]
    assert main(["compare", *sources, *flags.split(), "--init", init]) == 0
    results = json.loads((out / "results.json").read_text())
    arm = f"timm:{NAME}"
    found = {(r["arm"], r["protocol"]) for r in results["summary"]}
    assert found >= {(a, p) for a in (arm, "rotation") for p in ("finetune", "knn")} | {("scratch", "finetune")}
    pairs = [(p["arm"], p["versus"], p["protocol"]) for p in results["paired"]]
    assert len(pairs) == len(set(pairs))
    assert {versus for a, versus, _ in pairs if a == arm} <= {"scratch", "random", "patches", "pixels"}
    assert {("rotation", arm, "finetune"), ("rotation", arm, "knn"), (arm, "random", "knn")} <= set(pairs)
    primary = [(p["arm"], p["versus"], p["protocol"]) for p in results["paired"] if p["primary"]]
    assert sorted(primary) == sorted(
        [("rotation", "scratch", "finetune"), ("rotation", arm, "finetune"), (arm, "scratch", "finetune")]
    )
    # Untouched, and the tasks start from them.
    (given,) = (out / "given").iterdir()
    untouched = {k: v for k, v in load_file(given / "backbone.safetensors").items() if not k.endswith("tracked")}
    assert untouched.keys() == {k for k in load_file(hub) if not k.startswith("fc.")}
    assert all(torch.equal(v, load_file(hub)[k]) for k, v in untouched.items())
    assert about(out / "runs" / "rotation-seed0")["settings"]["init"] == f"timm:{NAME} {file_sha256(hub)}"
    origin = results["provenance"]
    assert origin["given"] == {
        "arm": arm,
        "init": f"timm:{NAME}",
        "content": file_sha256(given / "backbone.safetensors"),
    }
    assert origin["runs"]["rotation"][0]["init"] == f"timm:{NAME}"
    assert origin["overlap"]["test_in_pretraining"] is None
    assert any(w.startswith(f"{arm} was trained elsewhere") for w in origin["warnings"])
    page = (out / "report.html").read_text()
    assert f"rotation from timm:{NAME}" in page
    assert "Three comparisons were named" in page
    decided = choice(results)
    assert decided is not None
    assert decided.arms == ["rotation", arm, "scratch"]
    assert answer(results) in capsys.readouterr().out


def test_what_a_run_began_with_may_have_seen_the_test_images(
    exported: Path, digits_folder: Path, tmp_path: Path, capsys
):
    """It was pretrained on other images; of the weights that it began with nothing is known."""
    (tmp_path / "data").mkdir()
    shutil.copytree(digits_folder / "3", tmp_path / "data" / "3")
    labelled = tmp_path / "labelled"
    for name in "012":
        shutil.copytree(digits_folder / name, labelled / name)
    for init, seen in ((None, 0), (exported, None)):
        out = pretrain(
            settings(
                tmp_path / "data", tmp_path / str(seen), epochs=0.1, init=init, backbone="test_resnet", stem="timm"
            )
        )
        flags = "--labels-per-class 5 --draws 2 --protocol knn --no-controls".split()
        assert main(["evaluate", str(out), "--train", str(labelled), *flags]) == 0
        results = json.loads((out / "evaluation" / "results.json").read_text())
        assert results["provenance"]["overlap"] == {"test_in_pretraining": seen}
        page = (out / "evaluation" / "report.html").read_text()
        assert ("No test image was among the pretraining images." in page) == (seen == 0)
        assert ("it began with other weights" in capsys.readouterr().out) == (seen is None)


def test_evaluate_beside_another_run(exported: Path, digits_folder: Path, tmp_path: Path):
    """A file is of the run's network; a run is its own, and what it was trained on is known."""
    run, other = exported.with_name("run"), tmp_path / "other"
    pretrain(settings(digits_folder, other, epochs=0.1, seed=1))
    flags = "--labels-per-class 5 --draws 2 --protocol knn --no-controls".split()
    for init, arm in ((other, "init:other"), (exported, "init:given.safetensors")):
        out = tmp_path / arm.partition(":")[2]
        command = ["evaluate", str(run), "--train", str(digits_folder), "--out", str(out), *flags]
        assert main([*command, "--init", str(init)]) == 0
        results = json.loads((out / "results.json").read_text())
        assert {r["arm"] for r in results["summary"]} == {"rotation", arm}
        (named,) = (p for p in results["paired"] if p["primary"])
        assert (named["arm"], named["versus"], named["protocol"]) == ("rotation", arm, "knn")
        assert "plain supervised training was not measured here" in answer(results)
        warned = [w for w in results["provenance"]["warnings"] if arm in w]
        assert len(warned) == 1
        assert ("near-duplicate" in warned[0]) is (init == other)
    same = next(r["mean"] for r in results["summary"] if r["arm"] == "rotation")
    assert next(r["mean"] for r in results["summary"] if r["arm"] == arm) == same  # the run's own weights, exported


# ---- Which to use


UP, DOWN, OPEN = (0.05, 0.02, 0.08), (-0.05, -0.08, -0.02), (0.01, -0.02, 0.04)
PRETRAIN, TAKE, PLAIN = "pretrain here (rotation)", "take timm:x as it is", "train from scratch"


def three(over_scratch, over_given, given_over_scratch) -> dict:
    """Results of rotation, weights that were given, and scratch."""
    place = {"protocol": "finetune", "labels_per_class": 50, "n_draws": 10, "n_seeds": 1, "unit": "draw"}
    pairs = {("rotation", "scratch"): over_scratch, ("rotation", "timm:x"): over_given}
    pairs["timm:x", "scratch"] = given_over_scratch
    rows = [
        {"arm": a, "versus": b, "difference": d[0], "ci_low": d[1], "ci_high": d[2], "primary": True, **place}
        for (a, b), d in pairs.items()
    ]
    elsewhere = {**rows[1], "labels_per_class": 10, "difference": -0.9, "ci_low": -0.95, "ci_high": -0.85}
    return {"schema": 1, "paired": [{**elsewhere, "primary": False}, *rows], "provenance": {"given": {"arm": "timm:x"}}}


@pytest.mark.parametrize(
    ("differences", "left"),
    [
        ((UP, UP, OPEN), ["rotation"]),
        ((UP, UP, UP), ["rotation"]),
        ((OPEN, DOWN, UP), ["timm:x"]),
        ((UP, DOWN, UP), ["timm:x"]),
        ((DOWN, OPEN, DOWN), ["scratch"]),
        ((UP, OPEN, UP), ["rotation", "timm:x"]),
        ((UP, OPEN, OPEN), ["rotation", "timm:x"]),
        ((OPEN, UP, DOWN), ["rotation", "scratch"]),
        ((OPEN, UP, OPEN), ["rotation", "scratch"]),
        ((OPEN, UP, UP), ["rotation", "scratch"]),  # nothing beats rotation, which does not beat scratch
        ((DOWN, OPEN, OPEN), ["timm:x", "scratch"]),
        ((OPEN, OPEN, OPEN), ["rotation", "timm:x", "scratch"]),
        ((DOWN, UP, UP), ["rotation", "timm:x", "scratch"]),  # in a circle
    ],
)
def test_the_winner_beats_both_others_or_cannot_be_told(differences, left: list[str]):
    results = three(*differences)
    found = choice(results)
    assert found is not None
    assert found.left == left
    names = {"rotation": PRETRAIN, "timm:x": TAKE, "scratch": PLAIN}
    text = answer(results)
    for arm, words in names.items():
        assert (words in text) is (arm in left), (arm, text)
    assert ("cannot be told" in text) is (len(left) > 1)
    assert ("cannot tell" in title(results)) is (len(left) > 1)
    assert names[left[0]].lower() in title(results).lower()


def test_the_answer_in_words():
    assert answer(three((0.143, 0.101, 0.182), (0.021, 0.005, 0.039), UP)) == (
        "With 50 labels per class, pretrain here (rotation): +2.1 [+0.5, +3.9] over timm:x as given and "
        "+14.3 [+10.1, +18.2] over training from scratch; fine-tuned accuracy, in points with 95 % intervals for this "
        "backbone (10 draws of labels)."
    )
    text = answer(three(UP, (-0.003, -0.015, 0.009), UP))
    assert (
        "whether to pretrain here (rotation) or take timm:x as it is: rotation, -0.3 [-1.5, +0.9] from timm:x" in text
    )
    assert "; training from scratch is behind; " in text
    # The other way round: what is stored as rotation - timm:x is told as timm:x - rotation.
    assert "take timm:x as it is: +5.0 [+2.0, +8.0] over rotation and" in answer(three(OPEN, DOWN, UP))


def test_where_no_network_is_trained_the_third_is_random():
    """Both are below random weights: neither is what to use."""
    results = three(DOWN, UP, DOWN)
    for row in results["paired"]:
        row |= {"protocol": "linear", "versus": "random" if row["versus"] == "scratch" else row["versus"]}
    found = choice(results)
    assert found is not None
    assert (found.arms, found.left) == (["rotation", "timm:x", "random"], ["random"])
    assert title(results) == "Use neither (a random backbone will do), with 50 labels per class"
    assert "plain supervised training was not measured here" in answer(results)


def test_without_given_weights_nothing_changes(tmp_path: Path):
    results = three(UP, DOWN, UP)
    del results["provenance"]["given"]
    assert choice(results) is None
    assert answer(results).startswith(
        "With 50 labels per class, rotation pretraining raises fine-tuned accuracy by 5.0"
    )
    (tmp_path / "results.json").write_text(json.dumps(three(UP, DOWN, UP)))
    assert "Take timm:x as it is, with 50 labels per class" in write_report(tmp_path).read_text()
