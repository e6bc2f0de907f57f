"""Several processes, each a real one: parts of a step, who goes first, what they must share, who is missing."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from timm.layers.norm_act import BatchNormAct2d

from pretext.rotation import residual_block
from unlabel import checkpoint, distributed
from unlabel.augment import works_on
from unlabel.backbone import build_backbone
from unlabel.batchnorm import sync_batchnorm
from unlabel.cli import main
from unlabel.config import PretrainConfig
from unlabel.errors import UserError
from unlabel.pretrain import pretrain

FLAGS = "--backbone convnext_atto --image-size 32 --batch-size 16 --device cpu --precision fp32 --log-every 1".split()


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class Pair:
    """Two processes, as two nodes of one process each would start them."""

    def __init__(self, commands: list[list[str]], caches: list[Path]) -> None:
        shared = {"OMP_NUM_THREADS": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "GROUP_WORLD_SIZE": "2"}
        shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        self.processes = [
            subprocess.Popen(
                [sys.executable, *(["-m", "unlabel"] if command[0] != "-c" else []), *command],
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                env={**os.environ, **shared, "UNLABEL_CACHE": str(cache), "RANK": str(k), "GROUP_RANK": str(k)},
            )
            for k, (command, cache) in enumerate(zip(commands, caches, strict=True))
        ]  # fmt: skip

    def end(self) -> list[tuple[int, str]]:
        """Exit code and output of each."""
        try:
            outs = [p.communicate(timeout=180)[0] for p in self.processes]
        finally:
            for p in self.processes:
                p.kill()
        return [(p.returncode, out) for p, out in zip(self.processes, outs, strict=True)]


@pytest.mark.parametrize("task", ["rotation", "denoising", "contractive"])
def test_parts_of_a_step_equal_the_whole(task: str, digits_folder: Path, tmp_path: Path):
    """Three parts of a step give its gradient; no BatchNorm, whose statistics are each part's."""
    found, logged = {}, {}
    for parts in (1, 3):
        config = PretrainConfig(
            tasks=(task,), data=(str(digits_folder),), out=tmp_path / str(parts), image_size=32, epochs=0.3,
            batch_size=12, backbone="convnext_atto", optimizer="sgd", lr=0.01, precision="fp32", device="cpu",
            accumulate=parts, log_every=1,
        )  # fmt: skip
        out = pretrain(config)
        found[parts] = load_file(out / "backbone.safetensors")
        logged[parts] = [float(line.split('"loss": ')[1].split(",")[0]) for line in (out / "metrics.jsonl").open()]
    start = build_backbone("convnext_atto", 32, seed=0)
    moved = max(float((found[1][k] - v).abs().max()) for k, v in start.model.state_dict().items() if k in found[1])
    apart = max(float((found[1][k] - found[3][k]).abs().max()) for k in found[1])
    assert moved > 1e-3
    assert apart < 0.01 * moved
    assert logged[1] == pytest.approx(logged[3], rel=1e-3)


def test_parts_must_divide_the_step(digits_folder: Path, tmp_path: Path):
    config = PretrainConfig(tasks=("rotation",), data=(str(digits_folder),), out=tmp_path, batch_size=16, accumulate=3)
    with pytest.raises(UserError, match="times --accumulate 3"):
        pretrain(config)


def test_each_node_packs_into_its_own_cache(digits_folder: Path, tmp_path: Path):
    """A cache on each node's own disk, the run folder shared: what clusters have."""
    command = ["pretrain", "rotation", "--data", str(digits_folder), *FLAGS, "--log-every", "9", "--epochs", "0.1"]
    command += ["--checkpoint-every", "1", "--out"]
    caches = [tmp_path / "cache0", tmp_path / "cache1"]
    ended = Pair([[*command, str(tmp_path / "run")]] * 2, caches).end()
    assert [code for code, _ in ended] == [0, 0], ended
    assert (tmp_path / "run" / "backbone.safetensors").exists()
    packed = [sorted(p.name for p in cache.iterdir() if p.is_dir() and (p / "images.u8").exists()) for cache in caches]
    assert packed[0] == packed[1]
    assert len(packed[0]) == 1
    # What is kept for the next line of the log is of both: as one process has it.
    assert main([*command, str(tmp_path / "one")]) == 0
    kept = [checkpoint._read(tmp_path / run / "checkpoints" / "step-000000001.pt")["sums"] for run in ("run", "one")]
    assert float(kept[0]["loss"]) == pytest.approx(float(kept[1]["loss"]), rel=1e-5)


def test_a_node_that_prepares_for_long_is_waited_for_and_one_that_fails_is_not(tmp_path: Path):
    """Longer than the others wait in a step, if need be: they wait outside of one."""
    code = (
        "import time, torch; from unlabel import distributed as d; d.start(torch.device('cpu'), 1.0)\n"
        "with d.in_turn(): time.sleep(2 * d.rank()); left = time.time()\n"
        "print(left if d.rank() else time.time(), flush=True)\n"
        "try:\n    with d.in_turn(): 1 / (1 - d.rank())\n"
        "except d.RankLost as error: print('lost:', error)\n"
        "except ZeroDivisionError: time.sleep(5); print('failed')"  # not by its end that the others know
    )
    (_, first), (_, second) = Pair([["-c", code]] * 2, [tmp_path] * 2).end()
    waited, left = (float(out.strip().splitlines()[0]) for out in (first, second))
    assert waited >= left
    assert "lost: another process failed" in first
    assert "failed" in second


@pytest.mark.parametrize("wanted", ["cpu", "auto"])
def test_an_environment_that_is_no_numbers(wanted: str, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "x")
    with pytest.raises(UserError, match="LOCAL_RANK is 'x' in the environment"):
        distributed.pick_device(wanted)


def test_processes_that_cannot_join_are_told_why(monkeypatch):
    """One line, and not the code that says: try again."""
    for minutes in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(UserError, match="--rank-timeout"):
            distributed.start(torch.device("cpu"), minutes)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    for name, value in (("MASTER_ADDR", None), ("MASTER_PORT", "x")):
        monkeypatch.setenv("MASTER_ADDR", "localhost")
        monkeypatch.setenv("MASTER_PORT", "29500")
        monkeypatch.delenv(name) if value is None else monkeypatch.setenv(name, value)
        with pytest.raises(UserError, match="start several processes with torchrun"):
            distributed.start(torch.device("cpu"))


@pytest.mark.parametrize("fault", ["missing", "wrong"])
def test_apples_device_is_taken_where_it_resizes_as_the_cpu_does(fault: str, monkeypatch):
    assert works_on("cpu")
    real = torch.nn.functional.grid_sample

    def sampled(*args, **kwargs):
        count.append(1)
        if fault == "missing":
            raise RuntimeError("MPS: Unsupported Border padding mode")
        return real(*args, **kwargs) + 0.01 * (len(count) == 2)  # the CPU's first, then the device's

    count: list[int] = []
    monkeypatch.setattr("unlabel.augment.F.grid_sample", sampled)
    assert not works_on("cpu")
    monkeypatch.undo()
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    for works in (True, False):
        monkeypatch.setattr(distributed, "works_on", lambda _, works=works: works)
        assert distributed.pick_device("auto").type == ("mps" if works else "cpu")
    with pytest.raises(UserError, match="install a newer one, or use --device cpu"):
        distributed.pick_device("mps")


def test_more_processes_than_gpus(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "4")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    with pytest.raises(UserError, match="process 5 here, and there are 4 GPUs"):
        distributed.pick_device("auto")


def test_processes_that_do_not_share_the_run_folder_are_told(digits_folder: Path, tmp_path: Path):
    command = ["pretrain", "rotation", "--data", str(digits_folder), *FLAGS, "--epochs", "0.1", "--out"]
    pretrain(
        PretrainConfig(
            tasks=("rotation",), data=(str(digits_folder),), out=tmp_path / "0", image_size=32, batch_size=16,
            backbone="convnext_atto", device="cpu", precision="fp32", epochs=0.1, log_every=1,
        )
    )  # fmt: skip
    (tmp_path / "0" / "backbone.safetensors").unlink()
    about = tmp_path / "0" / "config.json"
    about.write_text(about.read_text().replace('"finished"', '"was finished"'))
    ended = Pair([[*command, str(tmp_path / k)] for k in "01"], [tmp_path / "cache"] * 2).end()
    for code, out in ended:
        assert code == 2
        assert "do not see the same --data and --out" in out


def test_a_process_that_hangs_is_named(digits_folder: Path, tmp_path: Path):
    command = ["pretrain", "rotation", "--data", str(digits_folder), *FLAGS, "--epochs", "40"]
    command += ["--rank-timeout", "0.1", "--checkpoint-every", "3", "--out", str(tmp_path / "run")]
    pair = Pair([command] * 2, [tmp_path / "cache"] * 2)
    first, second = pair.processes
    try:
        deadline = time.monotonic() + 120
        while not list((tmp_path / "run").glob("checkpoints/step-*.pt")) and time.monotonic() < deadline:
            assert first.poll() is None, first.communicate()[0]
            time.sleep(0.05)
        second.send_signal(signal.SIGSTOP)
        out, _ = first.communicate(timeout=60)
    finally:
        for process in pair.processes:
            process.kill()
    assert first.returncode == distributed.RankLost.code
    assert f"missing of 2: rank 1 on {socket.gethostname()}" in out
    assert "Traceback" not in out
    pair.processes[1].communicate()


def test_synchronised_batchnorm(monkeypatch: pytest.MonkeyPatch):
    """torch has it for GPUs only: there, every BatchNorm becomes one, also timm's that hold an activation."""
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    net = build_backbone("small", 32)
    sync_batchnorm(net, cpu)  # one process: nothing to do
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    with pytest.raises(UserError, match="GPUs only"):
        sync_batchnorm(net, cpu)
    names = list(net.state_dict())
    net.model.extra = BatchNormAct2d(8)
    sync_batchnorm(net, gpu)
    left = [m for m in net.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert not left
    assert sum(isinstance(m, torch.nn.SyncBatchNorm) for m in net.modules()) >= 9
    assert [k for k in net.state_dict() if "extra" not in k] == names


def test_the_head_of_a_network_without_batchnorm_has_none():
    for name, want in (("convnext_atto", False), ("small", True)):
        block = residual_block(build_backbone(name, 32))
        assert any(isinstance(m, torch.nn.BatchNorm2d) for m in block.modules()) is want


def test_the_head_of_a_wide_network_is_smaller_than_the_network():
    backbone = build_backbone("resnet50", 64)
    block = residual_block(backbone)
    assert block(torch.rand(2, 2048, 4, 4)).shape == (2, 2048, 2, 2)
    heads, weights = (sum(p.numel() for p in module.parameters()) for module in (block, backbone))
    assert heads < weights / 2
