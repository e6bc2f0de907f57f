"""Files from strangers: no code is run, no address is opened, no memory is taken that the file does not account for."""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import shutil
import struct
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch

from downstream.arms import pretraining_images
from unlabel import checkpoint
from unlabel.backbone import build_backbone, load_backbone, save_backbone
from unlabel.cli import main
from unlabel.config import PretrainConfig
from unlabel.errors import UserError
from unlabel.pretrain import pretrain


class Payload:
    def __init__(self, owned: Path) -> None:
        self.owned = owned

    def __reduce__(self):
        return (os.system, (f"touch {self.owned}",))


def sealed(payload: bytes) -> bytes:
    """As a checkpoint whose checksum is right."""
    return checkpoint._MAGIC + hashlib.sha256(payload).digest() + payload


@pytest.fixture(scope="module")
def finished(digits_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], Path]:
    """A finished run, and the command that made it."""
    out = tmp_path_factory.mktemp("strangers") / "run"
    flags = ["--image-size", "32", "--epochs", "0.1", "--batch-size", "16", "--device", "cpu"]
    command = ["pretrain", "rotation", "--data", str(digits_folder), *flags, "--out", str(out)]
    assert main(command) == 0
    return command, out


@pytest.mark.parametrize("where", ["checkpoint", "backbone", "all"])
def test_a_pickle_that_runs_a_command_in_a_finished_run(where: str, finished, tmp_path: Path, capsys):
    command, original = finished
    out = tmp_path / "run"
    shutil.copytree(original, out)
    hostile = pickle.dumps(Payload(tmp_path / "owned"), protocol=2)
    buffer = io.BytesIO()
    torch.save({"model": Payload(tmp_path / "owned")}, buffer)  # as torch.load is used to it
    newest, older = sorted((out / "checkpoints").glob("*.pt"), reverse=True)[:1] * 2
    if where in ("checkpoint", "all"):
        newest.write_bytes(sealed(buffer.getvalue()))
        older.write_bytes(sealed(buffer.getvalue()))
    if where in ("backbone", "all"):
        (out / "backbone.safetensors").write_bytes(hostile)
    before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    again = [*command[:-1], str(out)]
    assert main(again) == (0 if where == "checkpoint" else 2)  # finished: its checkpoints are not read
    embed = ["embed", str(out), "--data", command[3], "--out", str(tmp_path / "x.npz")]
    assert main(embed) == (0 if where == "checkpoint" else 2)
    restored = ["map", str(out), "--data", command[3], "--method", "code", "--out", str(tmp_path / "map")]
    assert main(restored) == 2
    (out / "config.json").write_text((out / "config.json").read_text().replace('"finished"', '"was"'))
    before[out / "config.json"] = (out / "config.json").read_bytes()
    if where != "backbone":
        assert main(again) == 2
        assert {p: p.read_bytes() for p in out.rglob("*") if p.is_file()} == before
    assert not (tmp_path / "owned").exists()
    assert "Traceback" not in capsys.readouterr().err


def test_a_compressed_checkpoint_is_not_unpacked(tmp_path: Path):
    state = {"model": {"w": torch.zeros(1 << 20)}, "optimizers": [], "step": 1, "seconds": 0.0, "phase": 0}
    checkpoint.save(tmp_path, 1, {**state, "sums": {}, "summed": 0})
    assert checkpoint.load_newest(tmp_path)
    whole = (tmp_path / "step-000000001.pt").read_bytes()
    buffer = io.BytesIO(whole[len(checkpoint._MAGIC) + 32 :])
    packed = io.BytesIO()
    with zipfile.ZipFile(buffer) as plain, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as small:
        for name in plain.namelist():
            small.writestr(name, plain.read(name))
    assert len(packed.getvalue()) < 100_000
    (tmp_path / "step-000000001.pt").write_bytes(sealed(packed.getvalue()))
    with pytest.raises(UserError, match="none of the 1"):
        checkpoint.load_newest(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "hf-hub:somebody/something"}, "not the name of a network"),
        ({"name": "local-dir:/etc"}, "not the name of a network"),
        ({"name": "../../etc/passwd"}, "not the name of a network"),
        ({"kwargs": {"checkpoint_path": "/tmp/x.pth"}}, "cannot be read"),
        ({"kwargs": {"pretrained": True}}, "cannot be read"),
        ({"kwargs": {"pretrained_cfg": {"url": "http://127.0.0.1/x"}}}, "cannot be read"),
        ({"kwargs": {"channels": [10**9] * 4}}, "cannot be read"),
        ({"kwargs": {"layers": [10**6] * 4}}, "cannot be read"),
        ({"kwargs": {"channels": [60000] * 4}}, "do not belong together"),
        ({"name": "mlp:" + "9" * 5000}, "whole numbers"),
        ({"name": "mlp:" + "-".join(["999999"] * 8)}, "do not belong together"),
        ({"image_size": 10**9}, "cannot be read"),
        ({"image_size": float("inf")}, "cannot be read"),
        ({"std": [0, 1, 1]}, "cannot be read"),
        ({"mean": [float("nan")] * 3}, "cannot be read"),
        ({"mean": [0.5]}, "cannot be read"),
        ({"stem": "x"}, "cannot be read"),
    ],
)
def test_descriptions_that_ask_for_too_much(changes, message: str, tmp_path: Path):
    save_backbone(build_backbone("small", 32), tmp_path)
    about = json.loads((tmp_path / "backbone.json").read_text())
    load_backbone(tmp_path)
    (tmp_path / "backbone.json").write_text(json.dumps(about | changes))
    with pytest.raises(UserError, match=message):
        load_backbone(tmp_path)


def test_weights_that_claim_more_than_they_hold(tmp_path: Path):
    save_backbone(build_backbone("small", 32), tmp_path)
    path = tmp_path / "backbone.safetensors"
    whole = path.read_bytes()
    header = json.loads(whole[8 : 8 + struct.unpack("<Q", whole[:8])[0]])
    name = next(k for k in header if k != "__metadata__")
    for shape, end in (([1 << 40], 1 << 42), (header[name]["shape"], 1 << 42)):
        claimed = json.dumps({**header, name: {"dtype": "F32", "shape": shape, "data_offsets": [0, end]}}).encode()
        path.write_bytes(struct.pack("<Q", len(claimed)) + claimed + whole[-1000:])
        with pytest.raises(UserError, match=r"backbone\.safetensors"):
            load_backbone(tmp_path)
    path.write_bytes(struct.pack("<Q", 1 << 60) + b"{}")
    with pytest.raises(UserError, match=r"backbone\.safetensors"):
        load_backbone(tmp_path)


@pytest.mark.parametrize(
    "changes",
    [
        {"resolved": {"steps": "many"}},
        {"resolved": {"image_size": 10**9}},
        {"resolved": {"crop": None}},
        {"resolved": {"batch_size": 0}},
        {"resolved": []},
        {"settings": None},
        {"data": 5},
        {"finished": {"x": 1}},
        {"fingerprint": 3},
        {"settings": {"seed": "abc"}},
        {"settings": {"tasks": [1, 2]}},
        {"settings": {"backbone": ["x"]}},
        {"data": {"spec": [None, 3]}},
        {"finished": {"backbone_sha256": "x", "steps": 1, "images_seen": "a", "seconds": 1.0}},
    ],
)
def test_a_config_that_somebody_has_edited(changes, digits_folder: Path, tmp_path: Path):
    config = PretrainConfig(
        tasks=("denoising",), data=(str(digits_folder),), out=tmp_path, image_size=32, epochs=0.1, batch_size=16
    )
    pretrain(config)
    about = json.loads((tmp_path / "config.json").read_text())
    del about["finished"]
    new = {k: {**about[k], **v} if isinstance(v, dict) and k in about else v for k, v in changes.items()}
    (tmp_path / "config.json").write_text(json.dumps(about | new))
    with pytest.raises(UserError, match="config"):
        pretrain(config)


def test_addresses_in_a_strangers_config_are_not_opened(finished, digits_folder: Path, tmp_path: Path, monkeypatch):
    command, original = finished
    out = tmp_path / "run"
    shutil.copytree(original, out)
    opened: list[str] = []
    monkeypatch.setattr("unlabel.stores.filesystem", lambda url: opened.append(url))
    monkeypatch.setattr("unlabel.tar_index.filesystem", lambda url: opened.append(url))
    about = json.loads((out / "config.json").read_text())
    for spec in ("http://127.0.0.1:9/secret.tar", "simplecache::s3://x/y.tar", "[0-9].tar", "/etc/*.tar"):
        about["data"]["spec"] = [spec]
        (out / "config.json").write_text(json.dumps(about))
        given = ["--train", command[3], "--protocol", "knn", "--labels-per-class", "1", "--draws", "1", "--no-controls"]
        assert main(["evaluate", str(out), *given, "--device", "cpu", "--out", str(tmp_path / "evaluation")]) == 0
        notes = json.loads((tmp_path / "evaluation" / "results.json").read_text())["provenance"]["warnings"]
        assert any("are not followed" in note and note.endswith("those of --train") for note in notes), notes
    assert not opened


def test_shards_that_are_counted_off_are_looked_at_again(finished, tmp_path: Path):
    """A folder's images in shards are the same source."""
    command, original = finished
    out, folder = shutil.copytree(original, tmp_path / "run"), Path(command[3])
    for k, label in enumerate(sorted(p.name for p in folder.iterdir())):
        with tarfile.open(tmp_path / f"part-{k}.tar", "w") as tar:
            tar.add(folder / label, arcname=label)
    about = json.loads((out / "config.json").read_text())
    about["data"]["spec"] = [str(tmp_path / f"part-{{0..{k}}}.tar")]
    (out / "config.json").write_text(json.dumps(about))
    images, note = pretraining_images(out, about, 16)
    assert note is None
    assert images is not None
    assert len(images) == about["data"]["images"]


def test_weights_of_another_run_are_not_evaluated(finished, tmp_path: Path, capsys):
    command, original = finished
    out = tmp_path / "run"
    shutil.copytree(original, out)
    save_backbone(build_backbone("small", 32, seed=5), tmp_path / "other")
    shutil.copy(tmp_path / "other" / "backbone.safetensors", out)
    assert main(["evaluate", str(out), "--train", command[3], "--out", str(tmp_path / "evaluation")]) == 2
    assert "checksum" in capsys.readouterr().err


def test_links_in_a_strangers_folder_are_not_written_through(finished, tmp_path: Path):
    command, _ = finished
    (tmp_path / "precious").write_text("precious")
    (tmp_path / "run").mkdir()
    for name in ("skipped.txt", "metrics.jsonl", "backbone.json", "backbone.safetensors"):
        (tmp_path / "run" / name).symlink_to(tmp_path / "precious")
    for left in ("metrics.jsonl", "backbone.json", "backbone.safetensors", None):  # refused, as long as one is there
        assert main([*command[:-1], str(tmp_path / "run")]) == (0 if left is None else 2)
        assert (tmp_path / "precious").read_text() == "precious"
        (tmp_path / "run" / (left or "skipped.txt")).unlink()


@pytest.mark.skipif(os.name == "nt", reason="needs a shell's pipes")
def test_work_is_not_lost_with_its_output(digits_folder: Path, tmp_path: Path):
    """Nobody reads what is said, or there is no room for it: the run goes on."""
    flags = f"--data {digits_folder} --image-size 32 --epochs 0.1 --batch-size 16 --device cpu"
    for name, where in (("pipe", "| true"), ("full", "> /dev/full"), ("closed", ">&- 2>&-")):
        if name == "full" and not Path("/dev/full").exists():
            continue
        line = (
            f"{{ {sys.executable} -m unlabel pretrain rotation {flags} --out {tmp_path / name}; echo $? >&3; }} {where}"
        )
        done = subprocess.run(
            ["bash", "-c", f"exec 3> {tmp_path / 'code'}; {line}"], env={**os.environ, "PYTHONUNBUFFERED": "1"}
        )
        assert (tmp_path / "code").read_text() == "0\n", name
        assert (tmp_path / name / "backbone.safetensors").exists(), name
        assert done.returncode == 0
