"""The loop on real files: resume, refusal, finish, two processes, broken files."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import io
import json
import os
import pickle
import random
import re
import shutil
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from pretext import TASKS
from pretext.denoising import Denoising
from pretext.inpainting import Config, Inpainting
from pretext.trained import load_trained
from unlabel import checkpoint, optim
from unlabel.backbone import build_backbone, load_backbone, save_backbone
from unlabel.cache import load_cache
from unlabel.cli import main
from unlabel.config import PretrainConfig
from unlabel.errors import UserError
from unlabel.pretrain import pretrain
from unlabel.runfolder import RunFolder
from unlabel.sources import open_source

REPOSITORY = Path(__file__).resolve().parents[1]


def settings(data: Path, out: Path, *tasks: str, **more) -> PretrainConfig:
    given = {"image_size": 32, "epochs": 0.5, "batch_size": 16, "checkpoint_every": 3, "log_every": 2, **more}
    return PretrainConfig(tasks=tasks, data=(str(data),), out=out, **given)


class Killed(Exception):
    pass


def killed_at(monkeypatch: pytest.MonkeyPatch, config: PretrainConfig, saves: int) -> None:
    """Run until the checkpoint has been written ``saves`` times, and two steps more, then die without a word."""
    count = {"saves": 0, "steps": 0}
    real_save, real_rates = checkpoint.save, optim.set_rates

    def save(*args):
        count["saves"] += 1
        return real_save(*args)

    def rates(*args):
        count["steps"] += count["saves"] >= saves
        if count["steps"] > 2:
            raise Killed
        real_rates(*args)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save", save)
        patch.setattr(optim, "set_rates", rates)
        with pytest.raises(Killed):
            pretrain(config)


@pytest.mark.parametrize("tasks", [*((t,) for t in TASKS), ("rotation", "denoising")])
def test_a_run_that_died_in_the_middle_of_an_epoch_ends_byte_for_byte_the_same(
    tasks: tuple[str, ...], digits_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    more = {"optimizer": "muon"} if len(tasks) > 1 else {}  # with AdamW beside it; each task alone has its own
    whole = pretrain(settings(digits_folder, tmp_path / "whole", *tasks, **more))
    config = settings(digits_folder, tmp_path / "died", *tasks, **more)
    killed_at(monkeypatch, config, saves=1)
    assert not (config.out / "backbone.safetensors").exists()
    killed_at(monkeypatch, config, saves=1)
    died = pretrain(config)
    assert (died / "backbone.safetensors").read_bytes() == (whole / "backbone.safetensors").read_bytes()
    lines = {}
    for run in (whole, died):
        lines[run] = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        for line in lines[run]:
            del line["images_per_second"]
    assert [line["step"] for line in lines[died]] == [2, 4, 6, 8, 10]  # cut back and written once
    assert lines[died] == lines[whole]  # also the line whose steps lay on both sides of a death
    assert len(list((died / "checkpoints").glob("step-*.pt"))) == 2


def test_the_discriminators_optimiser_is_continued_too(digits_folder: Path, tmp_path: Path, monkeypatch):
    own = {"task_settings": {"inpainting": {"adversarial": 0.1}}}
    whole = pretrain(settings(digits_folder, tmp_path / "whole", "inpainting", **own))
    config = settings(digits_folder, tmp_path / "died", "inpainting", **own)
    killed_at(monkeypatch, config, saves=1)
    died = pretrain(config)
    one, other = (checkpoint.load_newest(run / "checkpoints") or {} for run in (whole, died))
    assert any("discriminator" in k for k in one["model"])
    assert all(torch.equal(one["model"][k], other["model"][k]) for k in one["model"])
    first, second = (state["optimizers"][0]["state"] for state in (one, other))
    assert all(torch.equal(first[k]["exp_avg"], second[k]["exp_avg"]) for k in first)
    backbone = build_backbone("small", 32)
    task = Inpainting(backbone, Config(adversarial=0.1))
    assert len(first) == len([*backbone.parameters(), *task.parameters()])


def test_a_run_from_before_a_setting_existed_goes_on_with_its_default(digits_folder: Path, tmp_path: Path, monkeypatch):
    config = settings(digits_folder, tmp_path / "run", "denoising")
    killed_at(monkeypatch, config, saves=1)
    about = json.loads((config.out / "config.json").read_text())
    assert about["settings"].pop("flip") is True
    (config.out / "config.json").write_text(json.dumps(about))
    with pytest.raises(UserError, match="flip was True, now False"):
        pretrain(dataclasses.replace(config, flip=False))
    assert (pretrain(config) / "backbone.safetensors").exists()


def test_a_run_on_other_pixels_or_of_another_version_is_refused(digits_folder: Path, tmp_path: Path, monkeypatch):
    """Before, small images were enlarged by a quarter in the cache: such a run cannot be continued exactly."""
    config = settings(digits_folder, tmp_path / "run", "denoising")
    killed_at(monkeypatch, config, saves=1)
    about = json.loads((config.out / "config.json").read_text())
    assert about["data"].pop("side") == 32
    (config.out / "config.json").write_text(json.dumps(about))
    with pytest.raises(UserError, match="packed at 40 px, which are packed at 32"):
        pretrain(config)
    about["data"]["side"] = 32
    (config.out / "config.json").write_text(json.dumps(about))
    real = Denoising.__init__

    def renamed(self, backbone, config):
        real(self, backbone, config)
        self.other = self.decoder
        del self.decoder

    monkeypatch.setattr(Denoising, "__init__", renamed)
    monkeypatch.setattr(Denoising, "predict", lambda self, x: self.other(self.backbone(x).last, x.shape[-1]))
    with pytest.raises(UserError, match="another version of this task"):
        pretrain(config)


def test_another_picture_of_the_same_name_and_size_is_refused(digits_folder: Path, tmp_path: Path, monkeypatch):
    """The fingerprint cannot see it; what the images decode to can, once they are packed anew."""
    data = tmp_path / "data"
    shutil.copytree(digits_folder, data)
    one, other = sorted(data.rglob("*.png"))[:2]
    for path in (one, other):  # what stands behind the end of a PNG does not count
        path.write_bytes(path.read_bytes().ljust(2000, b"0"))
    monkeypatch.setenv("UNLABEL_CACHE", str(tmp_path / "cache"))
    config = settings(data, tmp_path / "run", "denoising")
    killed_at(monkeypatch, config, saves=1)
    shutil.rmtree(tmp_path / "cache")
    kept = one.read_bytes()
    one.write_bytes(other.read_bytes())
    with pytest.raises(UserError, match="pixels are not"):
        pretrain(config)
    one.write_bytes(kept)
    pretrain(config)


def test_a_run_that_left_other_test_images_out_says_so(digits_folder: Path, tmp_path: Path):
    """No file has changed, and what was labelled has."""
    config = settings(digits_folder, tmp_path / "run", "rotation", epochs=0.1)
    first, second, *_ = load_cache(open_source(str(digits_folder)), 32).hashes
    pretrain(config, exclude=frozenset([first]))
    with pytest.raises(UserError, match="the same files, but other test images are left out"):
        pretrain(config, exclude=frozenset([first, second]))
    (tmp_path / "other").mkdir()
    shutil.copytree(digits_folder / "0", tmp_path / "other" / "0")
    with pytest.raises(UserError, match="other names or sizes of files"):
        pretrain(dataclasses.replace(config, data=(str(tmp_path / "other"),)), exclude=frozenset([first]))


def test_a_finished_run_may_lie_where_nothing_can_be_written(digits_folder: Path, tmp_path: Path, monkeypatch, capsys):
    config = settings(digits_folder, tmp_path / "run", "rotation", epochs=0.1)
    pretrain(config)
    (config.out / ".lock").unlink()
    (config.out / ".lock").mkdir()  # cannot be opened; the tests may run as a user who can write anywhere
    with pytest.raises(UserError, match="is no file"):
        pretrain(config)
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert pretrain(config) == config.out
    assert "finished and verified" in capsys.readouterr().out


def test_a_run_keeps_the_images_that_it_was_begun_with(digits_folder: Path, tmp_path: Path, monkeypatch):
    """One was broken then and is repaired: the run goes on without it, the next one has it."""
    monkeypatch.setenv("UNLABEL_CACHE", str(tmp_path / "cache"))
    data = tmp_path / "data"
    shutil.copytree(digits_folder, data)
    broken = sorted(data.rglob("*.png"))[1]  # among those that the name of a cache knows
    good = broken.read_bytes()
    broken.write_bytes(bytes(len(good)))
    config = settings(data, tmp_path / "run", "denoising")
    killed_at(monkeypatch, config, saves=1)
    broken.write_bytes(good)
    after = pretrain(dataclasses.replace(config, out=tmp_path / "after", epochs=0.1))
    killed_at(monkeypatch, config, saves=1)
    assert [(RunFolder(run).read() or {})["data"]["images"] for run in (pretrain(config), after)] == [319, 320]
    assert len((config.out / "skipped.txt").read_text().splitlines()) == 1


def test_run_folder_and_exported_weights(digits_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out = pretrain(settings(digits_folder, tmp_path / "run", "rotation", "inpainting", weights=(1.0, 0.3)))
    ((steps, seconds, minutes),) = re.findall(
        r"cost: (\d+) steps of ([\d.]+) s, about ([\d.]+) min", capsys.readouterr().out
    )
    assert (int(steps), float(minutes)) == (10, pytest.approx(10 * float(seconds) / 60, abs=0.06))
    names = {p.name for p in out.iterdir() if not p.name.startswith(".")}
    expected = {"config.json", "metrics.jsonl", "previews", "checkpoints", "backbone.safetensors", "backbone.json"}
    assert names == expected | {"skipped.txt"}
    about = json.loads((out / "config.json").read_text())
    assert about["settings"]["weights"] == [1.0, 0.3]
    assert about["resolved"]["steps"] == 10
    assert {"versions", "hardware", "commit", "fingerprint", "finished"} <= about.keys()
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        for metric in ("rotation/accuracy", "inpainting/error"):
            assert metric in line["metrics"]
            assert metric in line["trivial"]
        task_losses = line["metrics"]["rotation/loss"] + 0.3 * line["metrics"]["inpainting/loss"]
        assert line["loss"] == pytest.approx(task_losses, abs=1e-4)
    assert {p.name.split("-")[0] for p in (out / "previews").iterdir()} == {"rotation", "inpainting"}
    state = load_file(out / "backbone.safetensors")
    assert not any("classifier" in k or "decoder" in k or "tasks" in k for k in state)
    assert load_backbone(out)(torch.rand(1, 3, 32, 32)).pooled.shape == (1, 256)
    # Again: verified, nothing done. Other settings or data: refused, with what differs.
    before = (out / "backbone.safetensors").stat().st_mtime_ns
    pretrain(settings(digits_folder / ".." / digits_folder.name, out, "rotation", "inpainting", weights=(1.0, 0.3)))
    assert "finished and verified" in capsys.readouterr().out
    assert (out / "backbone.safetensors").stat().st_mtime_ns == before
    with pytest.raises(UserError, match=r"batch_size was 16, now 8"):
        pretrain(settings(digits_folder, out, "rotation", "inpainting", weights=(1.0, 0.3), batch_size=8))
    for more, message in (
        ({"max_skipped": 0.5}, "max_skipped was 0.01, now 0.5"),
        ({"compile": True}, "compile was False"),
    ):
        with pytest.raises(UserError, match=message):
            pretrain(settings(digits_folder, out, "rotation", "inpainting", weights=(1.0, 0.3), **more))
    with pytest.raises(UserError, match="data"):
        pretrain(settings(digits_folder / "1", out, "rotation", "inpainting", weights=(1.0, 0.3)))
    (out / "backbone.safetensors").write_bytes(b"changed")
    with pytest.raises(UserError, match="checksum"):
        pretrain(settings(digits_folder, out, "rotation", "inpainting", weights=(1.0, 0.3)))


def test_damaged_checkpoints(digits_folder: Path, tmp_path: Path, monkeypatch, capsys):
    config = settings(digits_folder, tmp_path / "run", "denoising")
    whole = pretrain(settings(digits_folder, tmp_path / "whole", "denoising"))
    killed_at(monkeypatch, config, saves=2)
    newest, older = sorted(RunFolder(config.out).checkpoints.glob("*.pt"), reverse=True)
    data = bytearray(newest.read_bytes())
    data[len(data) // 2] ^= 1
    newest.write_bytes(data)
    pretrain(config)  # the one before is used, and the damaged one is named
    captured = capsys.readouterr()
    assert newest.name in captured.err
    assert f"continues from step {int(older.stem.split('-')[1])}" in captured.out
    assert (config.out / "backbone.safetensors").read_bytes() == (whole / "backbone.safetensors").read_bytes()
    other = settings(digits_folder, tmp_path / "all-bad", "denoising")
    killed_at(monkeypatch, other, saves=2)
    for path in RunFolder(other.out).checkpoints.glob("*.pt"):
        path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(UserError, match="none of the 2 checkpoints"):
        pretrain(other)


def test_a_damaged_checkpoint_takes_no_place(tmp_path: Path):
    state = {"model": {}, "optimizers": [], "step": 0, "seconds": 0.0, "phase": 0, "sums": {}, "summed": 0}
    for step in (100, 200):
        checkpoint.save(tmp_path, step, state)
    (tmp_path / "step-000000200.pt").write_bytes(b"damaged")
    for step in (110, 120):  # from 100 on
        checkpoint.save(tmp_path, step, state)
        assert [p.stem[-3:] for p in sorted(tmp_path.glob("*.pt"))] == [str(step - 10), str(step)]


def test_a_hostile_checkpoint_runs_no_code(tmp_path: Path):
    class Payload:
        def __reduce__(self):
            return (os.system, (f"touch {tmp_path / 'owned'}",))

    payload = pickle.dumps(Payload(), protocol=2)  # what torch.load is used to
    path = tmp_path / "step-000000001.pt"
    path.write_bytes(checkpoint._MAGIC + hashlib.sha256(payload).digest() + payload)
    with pytest.raises(UserError, match="none of the 1 checkpoints"):
        checkpoint.load_newest(tmp_path)
    assert not (tmp_path / "owned").exists()


def test_one_writer_at_a_time(tmp_path: Path):
    code = "import sys, time; from pathlib import Path; from unlabel.checkpoint import lock\n"
    code += "with lock(Path(sys.argv[1])): print('held', flush=True); time.sleep(60)"
    holder = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(UserError, match="another run is writing"), checkpoint.lock(tmp_path):
            pass
        holder.kill()
        holder.wait()
        with checkpoint.lock(tmp_path):  # a dead process keeps nothing
            pass
    finally:
        holder.kill()


def test_a_file_system_without_locks(tmp_path: Path, monkeypatch, capsys):
    fcntl = pytest.importorskip("fcntl")

    def lockf(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "lockf", lockf)
    with checkpoint.lock(tmp_path):
        assert "cannot be locked" in capsys.readouterr().err


def test_processes_that_do_not_divide_the_batch_of_a_run_that_was_begun(digits_folder: Path, tmp_path, monkeypatch):
    config = settings(digits_folder, tmp_path / "run", "rotation", batch_size=None, checkpoint_every=1)
    killed_at(monkeypatch, config, saves=1)
    monkeypatch.setattr("unlabel.distributed.world_size", lambda: 3)
    with pytest.raises(UserError, match=r"batch size 32 .* 3 processes: this run was begun with it"):
        pretrain(config)


@pytest.mark.skipif(sys.platform != "linux", reason="file names are UTF-8 elsewhere")
def test_a_name_that_is_not_utf8(digits_folder: Path, tmp_path: Path, capsys):
    odd = os.fsdecode(bytes(tmp_path) + b"/r\xe9")
    assert main(["pretrain", "rotation", "--data", str(digits_folder), "--out", odd]) == 2
    assert "not valid UTF-8" in capsys.readouterr().err
    shutil.copytree(digits_folder / "0", odd, dirs_exist_ok=True)  # but images may lie there
    config = settings(Path(odd), tmp_path / "run", "denoising", epochs=0.1)
    assert load_trained(pretrain(config)).name == "denoising"


def test_settings_that_a_person_can_get_wrong(digits_folder: Path, tmp_path: Path):
    cases = [
        ({"weights": (1.0,)}, ("rotation", "denoising"), "one per task"),
        ({"epochs": 1.0, "minutes": 1.0}, ("rotation",), "not both"),
        ({"lr": -1.0}, ("rotation",), "above 0"),
        ({"crop": (0.0, 1.0)}, ("rotation",), "rising order"),
        ({"warmup": float("nan")}, ("rotation",), "--warmup nan"),
        ({"backbone": "vit_tiny_patch16_224"}, ("rotation",), "another backbone"),
        ({"backbone": "nonesuch"}, ("rotation",), "unlabel list"),
        ({"init": Path("nowhere")}, ("rotation",), "does not exist"),
        ({"seed": 1 << 64}, ("rotation",), "--seed"),
        ({"seed": -1}, ("rotation",), "--seed"),
        ({"epochs": 1e308}, ("rotation",), "anybody can wait"),
        ({"epochs": None, "minutes": 1e308}, ("rotation",), "anybody can wait"),
        ({"batch_size": 1 << 63}, ("rotation",), "--batch-size"),
        ({"batch_size": 1 << 20}, ("rotation",), "dozens of times"),
        ({"lr": 1e308}, ("rotation",), "--lr"),
        ({"weights": (0.0, 0.0)}, ("rotation", "denoising"), "not all of them 0"),
        ({"weights": (float("nan"), 1.0)}, ("rotation", "denoising"), "--weights nan"),
        ({"max_skipped": float("nan")}, ("rotation",), "--max-skipped"),
        ({"task_settings": {"rotation": {"jitter": float("nan")}}}, ("rotation",), r"--rotation\.jitter nan"),
        ({"task_settings": {"rotation": {"jitter": -1.0}}}, ("rotation",), "from 0 to 1"),
        ({"task_settings": {"rotation": {"blocks": 10**6}}}, ("rotation",), r"--rotation\.blocks"),
        ({"task_settings": {"stacked": {"level": -0.5}}}, ("stacked",), r"--stacked\.level"),
        ({"backbone": "mlp:20", "batch_size": 1}, ("autoencoder",), "one image at a time"),
        ({"backbone": "mlp:20-10", "batch_size": 1}, ("stacked",), "one image at a time"),
        ({"backbone": "mlp:20", "batch_size": 4, "accumulate": 4}, ("autoencoder",), "one image at a time"),
        ({}, ("rotate",), "unknown pretext task"),
    ]
    for k, (more, tasks, message) in enumerate(cases):
        with pytest.raises(UserError, match=message):
            pretrain(settings(digits_folder, tmp_path / str(k), *tasks, **more))


class Greedy(Denoising):
    """Two phases: the first trains what lies below stride 4, the second grows a layer and trains the rest."""

    phases = 2

    def begin(self, phase: int) -> None:
        if phase == 0:
            self.first = torch.nn.Conv2d(3, 3, 1)
        if phase == 1:
            self.grown = torch.nn.Conv2d(3, 3, 1)
        for name, p in self.backbone.model.named_parameters():
            p.requires_grad_(("layer3" in name or "layer4" in name) == (phase == 1))

    def predict(self, noisy):
        # Dropout draws from torch's global generator: the loop has to seed it anew at every step.
        out = torch.nn.functional.dropout(self.first(super().predict(noisy)), 0.1, self.training)
        return self.grown(out) if hasattr(self, "grown") else out


@pytest.mark.parametrize("saves", [1, 2])
def test_a_task_that_grows_is_continued_exactly(saves: int, digits_folder: Path, tmp_path: Path, monkeypatch):
    """Deaths before and after the second phase begins, at steps 5 and 7 of 10; checkpoints at 3, 5 (its eve) and 6."""
    monkeypatch.setitem(TASKS, "greedy", (f"{__name__}:Greedy", "for this test"))
    monkeypatch.setattr("pretext.load_task", lambda name: Greedy)
    more = {"checkpoint_every": 5 if saves == 1 else 3}
    whole = pretrain(settings(digits_folder, tmp_path / "whole", "greedy", **more))
    config = settings(digits_folder, tmp_path / "died", "greedy", **more)
    killed_at(monkeypatch, config, saves=saves)
    died = pretrain(config)
    a, b = (load_file(run / "backbone.safetensors") for run in (whole, died))
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert json.loads((whole / "backbone.json").read_text())["frozen"] == []
    start = build_backbone("small", 32, seed=0).model.state_dict()
    for name in ("layer1.0.conv1.weight", "layer4.0.conv1.weight"):
        assert not torch.allclose(a[name], start[name], atol=1e-5)


def test_a_run_that_diverges_stops_and_saves_nothing_of_it(digits_folder: Path, tmp_path: Path):
    """The first step's loss is still finite, its weights are not: they must not become a checkpoint."""
    more = {"optimizer": "sgd", "lr": 1e6, "weight_decay": 1e38, "clip": 0.0, "warmup": 0.0, "checkpoint_every": 1}
    with pytest.raises(UserError, match="finite"):
        pretrain(settings(digits_folder, tmp_path, "rotation", **more))
    assert not list((tmp_path / "checkpoints").glob("*.pt"))
    assert not (tmp_path / "backbone.safetensors").exists()


def test_out_inside_data_is_refused(digits_folder: Path, tmp_path: Path):
    with pytest.raises(UserError, match="lies inside"):
        pretrain(settings(digits_folder, digits_folder / "runs" / "a", "rotation"))


def test_a_folder_that_is_no_runs_is_left_as_it_is(digits_folder: Path, tmp_path: Path):
    """Whatever is refused, and whatever is in the way."""
    for name, text in (("metrics.jsonl", '{"mine": 1}'), ("backbone.safetensors", "mine")):
        (folder := tmp_path / name.replace(".", "-")).mkdir()
        (folder / name).write_text(text)
        (folder / ".draft.tmp").write_text("mine, too")
        with pytest.raises(UserError, match="no run's folder"):
            pretrain(settings(digits_folder, folder, "rotation"))
        assert {p.name: p.read_text() for p in folder.iterdir()} == {name: text, ".draft.tmp": "mine, too"}
        (folder / name).unlink()
        (folder / ".config.json.123.tmp").write_text("of a process that was killed")
        with checkpoint.lock(folder):
            assert {p.name for p in folder.iterdir()} == {".draft.tmp", ".lock"}


def test_tasks_have_weights_of_their_own_in_a_sum(digits_folder: Path, tmp_path: Path, monkeypatch):
    """Nats per image would be all that counts; alone, and where the user says so, they are what they are."""
    for tasks, weights, expected in (
        (("rotation", "vae"), None, [1.0, 1e-4]),
        (("rotation", "vae"), (1.0, 1.0), [1.0, 1.0]),
        (("vae",), None, [1.0]),
    ):
        out = pretrain(
            settings(digits_folder, tmp_path / f"{len(tasks)}-{weights}", *tasks, weights=weights, epochs=0.1)
        )
        assert json.loads((out / "config.json").read_text())["resolved"]["weights"] == expected
        line = json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])
        each = [line["metrics"][f"{task}/loss"] for task in tasks]
        assert line["loss"] == pytest.approx(sum(w * x for w, x in zip(expected, each, strict=True)), rel=1e-4)
        if len(tasks) > 1:
            assert each[1] > 100 > each[0]
    config = settings(digits_folder, tmp_path / "run", "rotation", "vae")
    killed_at(monkeypatch, config, saves=1)
    about = json.loads((config.out / "config.json").read_text())
    del about["resolved"]["weights"]  # begun by an earlier version, whose weights were all 1
    (config.out / "config.json").write_text(json.dumps(about))
    with pytest.raises(UserError, match=r"other defaults of --weights \(\[1.0, 1.0\], now \[1.0, 0.0001\]\)"):
        pretrain(config)
    config = settings(digits_folder, tmp_path / "given", "rotation", "vae", weights=(1.0, 0.3))
    killed_at(monkeypatch, config, saves=1)
    about = json.loads((config.out / "config.json").read_text())
    del about["resolved"]["weights"]
    (config.out / "config.json").write_text(json.dumps(about))
    pretrain(config)  # it had said which


def test_a_checkpoint_of_other_optimisers_is_told(digits_folder: Path, tmp_path: Path, monkeypatch):
    config = settings(digits_folder, tmp_path / "run", "rotation")
    killed_at(monkeypatch, config, saves=1)
    monkeypatch.setattr(optim, "make_optimizers", lambda *_: [])
    with pytest.raises(UserError, match="of another version of this task"):
        pretrain(config)


def test_a_log_that_cannot_be_written_is_named(tmp_path: Path):
    run = RunFolder(tmp_path)
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(UserError, match=r"cannot write .*metrics.jsonl: Is a directory"):
        run.log({"step": 1})


def test_every_setting_of_a_task_is_kept(digits_folder: Path, tmp_path: Path, monkeypatch):
    """Also those that were not given: with another version's defaults it would go on as another run."""
    config = settings(digits_folder, tmp_path / "run", "rotation", task_settings={"rotation": {"grey": 0.5}})
    killed_at(monkeypatch, config, saves=1)
    about = json.loads((config.out / "config.json").read_text())
    assert about["resolved"]["tasks"] == {"rotation": {"blocks": 1, "jitter": 0.3, "grey": 0.5}}
    about["resolved"]["tasks"]["rotation"]["blocks"] = 2
    (config.out / "config.json").write_text(json.dumps(about))
    with pytest.raises(UserError, match="other defaults"):
        pretrain(config)
    del about["resolved"]["tasks"]  # begun by an earlier version
    (config.out / "config.json").write_text(json.dumps(about))
    pretrain(config)
    about = json.loads((config.out / "config.json").read_text())
    own = {"blocks": 1, "jitter": 0.7, "grey": 0.5}
    (config.out / "config.json").write_text(
        json.dumps({**about, "resolved": {**about["resolved"], "tasks": {"rotation": own}}})
    )
    assert load_trained(config.out).config.jitter == 0.7
    (config.out / "config.json").write_text(json.dumps({**about, "resolved": {**about["resolved"], "tasks": [1]}}))
    with pytest.raises(UserError, match="not a run's config"):
        load_trained(config.out)


def test_init_may_lie_elsewhere_when_the_run_is_continued(digits_folder: Path, tmp_path: Path, monkeypatch):
    first = pretrain(settings(digits_folder, tmp_path / "first", "rotation", epochs=0.1))
    config = settings(digits_folder, tmp_path / "second", "rotation", init=first)
    killed_at(monkeypatch, config, saves=1)
    other = pretrain(settings(digits_folder, tmp_path / "other", "rotation", epochs=0.1, seed=5))
    with pytest.raises(UserError, match="init was"):
        pretrain(dataclasses.replace(config, init=other))
    first.rename(tmp_path / "moved")
    pretrain(dataclasses.replace(config, init=tmp_path / "moved"))


def test_init_starts_from_another_backbone(digits_folder: Path, tmp_path: Path):
    first = pretrain(settings(digits_folder, tmp_path / "first", "rotation"))
    still = settings(digits_folder, tmp_path / "still", "rotation", init=first, lr=1e-12)
    second = pretrain(dataclasses.replace(still, epochs=0.1))
    a, b = (load_file(p / "backbone.safetensors") for p in (first, second))
    assert torch.allclose(a["layer1.0.conv1.weight"], b["layer1.0.conv1.weight"], atol=1e-6)


def test_init_takes_an_unfinished_run_too(digits_folder: Path, tmp_path: Path, monkeypatch):
    config = settings(digits_folder, tmp_path / "died", "rotation")
    killed_at(monkeypatch, config, saves=1)
    state = checkpoint.load_newest(config.out / "checkpoints")
    assert state is not None
    still = settings(digits_folder, tmp_path / "on", "rotation", init=config.out, lr=1e-12, epochs=0.1)
    found = load_file(pretrain(still) / "backbone.safetensors")
    want = state["model"]["backbone.model.layer1.0.conv1.weight"]
    assert torch.allclose(found["layer1.0.conv1.weight"], want, atol=1e-6)
    newest = checkpoint.newest(config.out / "checkpoints")
    assert newest is not None
    about = json.loads((still.out / "config.json").read_text())
    assert about["settings"]["init"] == f"checkpoint of died {checkpoint.file_sha256(newest)}"
    other = settings(digits_folder, tmp_path / "other", "rotation", init=config.out, backbone="convnext_atto")
    with pytest.raises(UserError, match=r"--init .*died: .* do not fit .* give the --backbone"):
        pretrain(other)


def test_a_run_that_began_from_an_unfinished_one_goes_on_from_that_one_only(
    digits_folder: Path, tmp_path: Path, monkeypatch
):
    source = settings(digits_folder, tmp_path / "source", "rotation")
    killed_at(monkeypatch, source, saves=1)
    fresh, begun = (settings(digits_folder, tmp_path / n, "rotation", init=source.out) for n in ("fresh", "begun"))
    killed_at(monkeypatch, fresh, saves=0)
    killed_at(monkeypatch, begun, saves=1)
    moved, other = (shutil.copytree(source.out, tmp_path / name) for name in ("moved", "other"))
    newest = checkpoint.newest(other / "checkpoints")
    assert newest is not None
    newest.write_bytes(newest.read_bytes() + b"x")
    with pytest.raises(UserError, match="init was 'checkpoint of source"):
        pretrain(dataclasses.replace(begun, init=other))
    pretrain(source)  # it has other weights now: only `begun`, which has a checkpoint of its own, can go on from it
    with pytest.raises(UserError, match="init was 'checkpoint of source"):
        pretrain(fresh)
    killed_at(monkeypatch, dataclasses.replace(fresh, init=moved), saves=1)  # what it was to begin from
    assert pretrain(fresh) == fresh.out
    assert pretrain(begun) == begun.out
    late = dataclasses.replace(begun, out=tmp_path / "late", init=moved)
    killed_at(monkeypatch, late, saves=0)
    shutil.rmtree(moved)
    with pytest.raises(UserError, match=r"--init .*backbone\.safetensors does not exist"):
        pretrain(late)


@pytest.mark.parametrize(
    ("task", "more", "message"),
    [
        ("rotation", {"task_settings": {"rotation": {"jitter": 2.0}}}, "jitter"),
        ("rotation", {"accumulate": 3}, "not a multiple of the 1 processes times --accumulate 3"),
        ("rotation", {"init": "RUN"}, "do not fit this backbone"),
        ("contractive", {"compile": True}, "--compile does not work with contractive"),
    ],
)
def test_what_is_wrong_is_said_before_a_pixel_is_decoded(
    task: str, more: dict, message: str, digits_folder: Path, tmp_path: Path, monkeypatch
):
    save_backbone(build_backbone("resnet10t", 32), tmp_path / "other")
    monkeypatch.setenv("UNLABEL_CACHE", str(tmp_path / "cache"))
    more = {k: tmp_path / "other" if v == "RUN" else v for k, v in more.items()}
    with pytest.raises(UserError, match=message):
        pretrain(settings(digits_folder, tmp_path / "run", task, **more))
    assert not [p for p in (tmp_path / "cache").rglob("*") if p.is_file()]
    assert not (tmp_path / "run" / "config.json").exists()


def test_minutes_become_steps_and_are_kept(digits_folder: Path, tmp_path: Path, monkeypatch, capsys):
    config = settings(digits_folder, tmp_path / "run", "denoising", epochs=None, minutes=0.05)
    killed_at(monkeypatch, config, saves=1)
    steps = json.loads((config.out / "config.json").read_text())["resolved"]["steps"]
    assert steps >= 4
    assert re.findall(r"cost: (\d+) steps", capsys.readouterr().out) == [str(steps)]
    pretrain(config)
    assert json.loads((config.out / "config.json").read_text())["finished"]["steps"] == steps


def test_sigkill_and_sigterm(digits_folder: Path, tmp_path: Path):
    """Real processes and real signals: killed, then politely stopped, then finished; equal to the undisturbed run."""
    flags = ["--image-size", "32", "--epochs", "1", "--batch-size", "16", "--checkpoint-every", "2", "--device", "cpu"]
    command = ["pretrain", "rotation", "--data", str(digits_folder), *flags, "--out"]
    disturbed = [*command, str(tmp_path / "disturbed")]
    checkpoints = tmp_path / "disturbed" / "checkpoints"
    for signum, code in ((signal.SIGKILL, -9), (signal.SIGTERM, 143)):
        known = set(checkpoints.glob("*.pt"))
        process = subprocess.Popen(
            [sys.executable, "-m", "unlabel", *disturbed], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
        )
        deadline = time.monotonic() + 120
        while set(checkpoints.glob("*.pt")) <= known and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        process.send_signal(signum)
        _, errors = process.communicate(timeout=120)
        assert process.returncode == code, errors
    assert "the same command continues" in errors
    assert main(disturbed) == 0
    assert main([*command, str(tmp_path / "whole")]) == 0
    a, b = ((tmp_path / k / "backbone.safetensors").read_bytes() for k in ("disturbed", "whole"))
    assert a == b


@pytest.mark.skipif(os.name == "nt", reason="on Windows the second Ctrl-C waits for the call to end")
def test_a_second_interrupt_leaves_in_the_middle_of_a_long_call():
    """Python's own handlers would wait for the call, and take two signals meanwhile for one."""
    code = "import torch; from unlabel.signals import catch_signals\nwith catch_signals():\n"
    code += "    print('ready', flush=True); torch.linalg.eig(torch.rand(3000, 3000)); print('over', flush=True)"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    for _ in range(2):
        time.sleep(0.3)
        process.send_signal(signal.SIGINT)
    out, errors = process.communicate(timeout=120)
    assert process.returncode == 130
    assert out == ""
    assert errors.strip() == "unlabel: interrupted"


@pytest.mark.skipif(os.name == "nt", reason="there is no fork")
def test_the_loop_ends_where_a_process_was_forked_in_it():
    """As by a DataLoader. The child holds what the parent has closed."""
    code = "import os, time; from unlabel.signals import catch_signals\nwith catch_signals():\n"
    code += "    child = os.fork()\n    child or time.sleep(600)\nprint('over', flush=True); os.kill(child, 9)"
    done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, timeout=60)
    assert (done.stdout, done.returncode) == ("over\n", 0)


@pytest.mark.parametrize("tasks", [tuple(t for t in TASKS if t != "stacked"), ("stacked",)])
def test_two_processes_equal_one_and_continue_its_run(tasks, digits_folder: Path, tmp_path: Path, monkeypatch):
    """Same global batch, order and draws: after 12 steps the weights agree. LayerNorm, so no batch statistics.

    So they do where one process died and two went on (tried with the quicker of the two).
    """
    flags = "--backbone convnext_atto --image-size 32 --epochs 0.3 --batch-size 8 --device cpu --precision fp32".split()
    flags += "--optimizer sgd --lr 0.02".split()
    outs = ["two"]
    if "rotation" in tasks:
        flags += "--sparse.penalty kl --inpainting.adversarial 0.1".split()
    else:
        own = {
            "backbone": "convnext_atto",
            "epochs": 0.3,
            "device": "cpu",
            "optimizer": "sgd",
            "lr": 0.02,
            "precision": "fp32",
        }
        killed_at(monkeypatch, settings(digits_folder, tmp_path / "both", *tasks, batch_size=8, **own), saves=1)
        outs.append("both")
    command = ["pretrain", *tasks, "--data", str(digits_folder), *flags, "--out"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "unlabel"]
    environment, said = {**os.environ, "OMP_NUM_THREADS": "1"}, {}
    for out in outs:
        ran = subprocess.run(
            [*torchrun, *command, str(tmp_path / out)], capture_output=True, text=True, env=environment
        )
        assert ran.returncode == 0, ran.stderr[-2000:]
        said[out] = ran.stdout
    assert "both" not in said or "continues from step 3 of 12" in said["both"]
    assert main([*command, str(tmp_path / "one")]) == 0
    save_backbone(build_backbone("convnext_atto", 32, seed=0), tmp_path / "start")
    a, start = (load_file(tmp_path / k / "backbone.safetensors") for k in ("one", "start"))
    moved = max(float((a[k] - start[k]).abs().max()) for k in a)
    assert moved > 1e-3
    for out in outs:
        b = load_file(tmp_path / out / "backbone.safetensors")
        apart = max(float((a[k] - b[k]).abs().max()) for k in a)
        assert apart < 0.02 * moved, (out, apart, moved)


def test_weights_that_no_task_reaches_are_frozen_and_named(digits_folder: Path, tmp_path: Path, capsys):
    """MobileNetV3 has a convolution behind its last feature map, which rotation does not use."""
    out = pretrain(settings(digits_folder, tmp_path / "run", "rotation", backbone="mobilenetv3_small_050", epochs=0.1))
    frozen = json.loads((out / "backbone.json").read_text())["frozen"]
    assert frozen
    assert all(name.startswith("conv_head") for name in frozen)
    assert frozen[0] in capsys.readouterr().out
    save_backbone(build_backbone("mobilenetv3_small_050", 32, seed=0), tmp_path / "start")
    after, before = (load_file(folder / "backbone.safetensors") for folder in (out, tmp_path / "start"))
    assert all(torch.equal(after[name], before[name]) for name in frozen)
    assert not torch.equal(after["blocks.0.0.conv_dw.weight"], before["blocks.0.0.conv_dw.weight"])


def test_one_percent_of_broken_files(digits_folder: Path, tmp_path: Path):
    """1,000 files, 10 of them broken in ten ways: the run finishes and lists each; one more is too many."""
    data = tmp_path / "data"
    data.mkdir()
    good = [path.read_bytes() for path in sorted(digits_folder.rglob("*.png"))]
    for k in range(990):
        (data / f"{k:03d}.png").write_bytes(good[k % len(good)])
    png, middle = good[0], len(good[0]) // 2
    photo = io.BytesIO()
    Image.open(io.BytesIO(png)).convert("RGB").save(photo, "JPEG")
    jpeg = photo.getvalue()
    broken = {
        "a\nb.png": b"\x89PNG\r\n",
        "bomb.png": png[:16] + struct.pack(">II", 60_000, 60_000) + png[24:],
        "cut.jpg": jpeg[: len(jpeg) // 2],
        "cut.png": png[:60],
        "empty.png": b"",
        "flipped.png": png[:middle] + bytes(b ^ 255 for b in png[middle : middle + 8]) + png[middle + 8 :],
        "header.jpg": jpeg[:20],
        "noise.gif": random.Random(0).randbytes(3000),
        "text.jpg": b"hello",
        "zeros.png": bytes(5000),
    }
    for name, content in broken.items():
        (data / name).write_bytes(content)
    out = pretrain(settings(data, tmp_path / "run", "rotation", epochs=0.05))
    lines = (out / "skipped.txt").read_text().splitlines()
    assert lines == sorted(lines)
    assert [line.split("\t")[0] for line in lines] == [name.replace("\n", "\\n") for name in broken]
    assert all(line.split("\t")[1] for line in lines)
    assert json.loads((out / "config.json").read_text())["data"]["images"] == 990
    (data / "one more.jpg").write_bytes(b"hello")
    with pytest.raises(UserError, match="max-skipped"):
        pretrain(settings(data, tmp_path / "strict", "rotation"))
    assert len((tmp_path / "strict" / "skipped.txt").read_text().splitlines()) == 11
