"""Clusters, played: a SLURM job that is requeued once, its settings, and two nodes in network namespaces."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"
SBATCH = SCRIPTS / "slurm_pretrain.sbatch"
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHON": sys.executable}


def run(*command: str | Path, **more: str) -> subprocess.CompletedProcess[str]:
    # Errors go to the same place: what a failed run has said is in the assertion.
    return subprocess.run(
        list(map(str, command)),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**ENVIRONMENT, **more},
    )


@pytest.mark.parametrize("script", [SBATCH, SCRIPTS / "two_nodes"])
def test_bash_can_read_it(script: Path):
    done = run("bash", "-n", script)
    assert done.returncode == 0, done.stdout


def test_slurm_reads_its_settings_before_the_first_command():
    """sbatch stops looking for #SBATCH at the first line that is neither a comment nor empty."""
    lines = SBATCH.read_text().splitlines()
    first = next(k for k, line in enumerate(lines) if line and not line.startswith("#"))
    settings = [k for k, line in enumerate(lines) if line.startswith("#SBATCH")]
    assert max(settings) < first
    # A comment behind a setting would be part of it.
    assert all(re.fullmatch(r"#SBATCH --[a-z-]+(=\S+)?", lines[k]) for k in settings)
    warning, grace = (
        int(re.search(pattern, SBATCH.read_text())[1])  # type: ignore[index]
        for pattern in (r"--signal=B:USR1@(\d+)", r"TORCH_ELASTIC_SHUTDOWN_TIMEOUT=(\d+)")
    )
    assert grace < warning


@pytest.fixture
def fake_slurm(tmp_path: Path) -> dict[str, str]:
    """A cluster whose ``srun`` saves a checkpoint, sends the script USR1, and ends with exit code $CODE."""
    commands = {
        "srun": 'mkdir -p "$RUN/checkpoints"; [ -z "$SAVES" ] || touch "$RUN/checkpoints/step-000000009.pt"\n'
        '[ -z "$WARNS" ] || { kill -USR1 $PPID; sleep 0.5; }\nexit "$CODE"',
        "scontrol": 'echo "scontrol $*" >> "$ASKED"; echo localhost',
        "scancel": 'echo "scancel $*" >> "$ASKED"',
    }
    (tmp_path / "bin").mkdir()
    for name, text in commands.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    own = {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "RUN": str(tmp_path / "run")}
    own |= {"ASKED": str(tmp_path / "asked"), "SLURM_JOB_ID": "7", "SLURM_NNODES": "1", "SLURM_JOB_NODELIST": "a"}
    return own | {"SAVES": "yes", "WARNS": "yes", "CODE": "143", "SLURM_RESTART_COUNT": "3"}


@pytest.mark.parametrize(
    ("changed", "code", "requeued", "said"),
    [
        ({}, 143, True, "stopped at step 9, 9 more than before: requeued"),
        ({"SAVES": ""}, 143, False, "no step was gained since step 0"),
        ({"MAX_REQUEUES": "3"}, 143, False, "after 3 requeues"),
        ({"CODE": "0"}, 0, False, "finished"),
        ({"CODE": "2"}, 2, False, "failed with exit code 2"),
        ({"WARNS": ""}, 143, False, "failed with exit code 143"),
    ],
)
def test_when_a_job_is_requeued(changed: dict[str, str], code: int, requeued: bool, said: str, fake_slurm):
    own = {**fake_slurm, **changed}
    done = run("bash", SBATCH, "rotation", "--out", own["RUN"], **own)
    assert done.returncode == code, done.stdout
    assert said in done.stdout
    asked = Path(own["ASKED"]).read_text()
    assert ("scontrol requeue 7" in asked) == requeued
    assert ("scancel --signal=TERM 7" in asked) == bool(own["WARNS"])


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds a job's processes in Linux's /proc")
def test_a_requeued_job_ends_byte_for_byte_the_same():
    done = run(sys.executable, SCRIPTS / "slurm_play.py", "--nodes", "1", "--only", "one-requeue", "--epochs", "0.3")
    assert done.returncode == 0, done.stdout
    assert "one-requeue: backbone equal" in done.stdout


@pytest.mark.long
@pytest.mark.skipif(os.name == "nt", reason="needs bash")
def test_two_nodes_equal_one_process():
    done = run("bash", SCRIPTS / "two_nodes")
    if done.returncode == 77:
        pytest.skip(done.stdout.strip())
    assert done.returncode == 0, done.stdout
