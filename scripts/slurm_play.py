"""Plays SLURM's part for scripts/slurm_pretrain.sbatch: signals, time limits, requeues, two nodes on one machine.

    python scripts/slurm_play.py                    all scenarios, about five minutes on two cores; results/slurm.json
    python scripts/slurm_play.py --only requeue     one scenario, and nothing written; --seed 1: other moments
    python scripts/slurm_play.py --nodes 1          one node: no second process

The sbatch script runs in bash as SLURM would run it, with SLURM's variables, and with `srun`, `scontrol` and `scancel`
of a folder that comes first in PATH. A node is a torchrun on this machine with a cache folder of its own. Scenarios:

    undisturbed   never near its time limit: what the others are compared with, byte for byte
    requeue       SIGUSR1 to the batch shell before the time limit, twice, at random moments; requeued each time
    limit         no warning: SIGKILL to everything at the time limit; submitted again by hand
    error         a setting that does not exist: exit code 2, not requeued
    worker        the last worker is killed by SIGKILL: torchrun goes on by itself
    main-worker   the one that writes the checkpoints is
    no-step       warned before a step was saved: not requeued
    one-requeue   requeue, with one; only where it is asked for

Moments are seconds after the first checkpoint of an attempt, so that none falls into the start. Exit code 1 where a
step that was saved is lost, a requeue is missing or too many, or a backbone differs. Linux only (/proc).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SBATCH = ROOT / "scripts" / "slurm_pretrain.sbatch"
SETTINGS = "--data digits --image-size 16 --batch-size 32 --checkpoint-every 4 --log-every 4 --device cpu".split()
MARK = "SLURM_PLAY"  # in the environment of all that belongs to a job: its folder
FAKES = ("srun", "scontrol", "scancel")
WARNING_SECONDS = 120.0  # between SIGUSR1 and the time limit


# ---- The commands of SLURM, as far as the script uses them


def variable(pid: int, name: str) -> str:
    """One of the environment that the process was started with; '' where it, or the process, is missing."""
    with contextlib.suppress(OSError):
        variables = Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace").split("\0")
        return next((v.partition("=")[2] for v in variables if v.startswith(f"{name}=")), "")
    return ""


def processes(job: Path, only: str = MARK) -> list[int]:
    """The job's processes, or those with the variable ``only`` in their environment, whatever session they are in."""
    pids = [int(folder.name) for folder in Path("/proc").glob("[0-9]*")]
    return [pid for pid in pids if pid != os.getpid() and variable(pid, MARK) == str(job) and variable(pid, only)]


def send(pids: list[int], signum: int) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signum)


def srun(job: Path, arguments: list[str]) -> int:
    """Starts the command once per node and waits for all. Returns the highest exit code, as the real one does."""
    while arguments[0].startswith("--"):
        arguments = arguments[1:]
    tasks = []

    def terminated(*_) -> None:
        print("srun: forcing job termination", file=sys.stderr, flush=True)  # as the real one: not what you want
        send(processes(job, only="SLURM_STEP_ID"), signal.SIGKILL)

    signal.signal(signal.SIGTERM, terminated)
    for node in range(int(os.environ["SLURM_NNODES"])):
        own = {"SLURM_STEP_ID": "0", "SLURM_NODEID": str(node), "UNLABEL_CACHE": str(job / f"disk-of-node-{node}")}
        tasks.append(subprocess.Popen(arguments, env={**os.environ, **own}))
    (job / "tasks").write_text(" ".join(str(task.pid) for task in tasks))
    codes = [task.wait() for task in tasks]
    return max(code if code >= 0 else 128 - code for code in codes)


def scontrol(job: Path, arguments: list[str]) -> int:
    if arguments[:2] == ["show", "hostnames"]:
        print("\n".join(arguments[2].split(",")))
        return 0
    if arguments == ["requeue", os.environ["SLURM_JOB_ID"]]:
        with (job / "requeues").open("a") as file:
            file.write("requeue\n")
        return 0
    print(f"scontrol: {shlex.join(arguments)}: not played", file=sys.stderr)
    return 1


def scancel(job: Path, arguments: list[str]) -> int:
    """Signals the steps' processes, not the batch shell: all of them, or the tasks alone ($SLURM_PLAY_REACH)."""
    name, number = arguments
    assert number == os.environ["SLURM_JOB_ID"]
    tasks = [int(pid) for pid in (job / "tasks").read_text().split()]
    everything = processes(job, only="SLURM_STEP_ID")
    send(everything if os.environ["SLURM_PLAY_REACH"] == "all" else tasks, signal.Signals[f"SIG{name.split('=')[1]}"])
    return 0


# ---- The scheduler


@dataclass
class Attempt:
    """One start of a job, a row of the table."""

    attempt: int
    seconds: float
    signal: str
    exit_code: int
    continued_from: list[int]
    stopped_at: int
    requeued: bool


@dataclass
class Scenario:
    name: str
    attempts: list[Attempt] = field(default_factory=list)
    finished: bool = False
    equal: bool | None = None
    sha256: str | None = None
    wrong: list[str] = field(default_factory=list)


class Cluster:
    """One job at a time on ``nodes`` nodes, all of them this machine."""

    def __init__(self, folder: Path, nodes: int, epochs: float, moments: random.Random) -> None:
        self.folder, self.nodes, self.epochs, self.moments = folder, nodes, epochs, moments
        self.commands = folder / "bin"
        self.commands.mkdir(parents=True)
        for name in FAKES:
            file = self.commands / name
            file.write_text(f'#!/bin/sh\nexec {sys.executable} -I {shlex.quote(__file__)} --play {name} "$@"\n')
            file.chmod(0o755)

    def out(self, name: str) -> Path:
        return self.folder / name / "run"

    def newest(self, name: str) -> int:
        steps = [int(p.stem.removeprefix("step-")) for p in (self.out(name) / "checkpoints").glob("step-*.pt")]
        return max(steps, default=0)

    def attempt(self, name: str, number: int, restarts: int, disturb: str, more: tuple[str, ...] = ()) -> Attempt:
        """Run the script once.

        ``disturb``: '', 'USR1', 'USR1 at once' (before a step), 'KILL' (all), 'KILL first' or 'KILL last' (worker).
        """
        job, before = self.folder / name, self.newest(name)
        job.mkdir(exist_ok=True)
        with socket.socket() as probe:  # the script takes port 20000 + job number
            for job_id in self.moments.sample(range(10000), 100):
                with contextlib.suppress(OSError):
                    probe.bind(("", 20000 + job_id))
                    break
        environment = {
            **{k: v for k, v in os.environ.items() if not k.startswith("SLURM_")},
            "PATH": os.pathsep.join([str(self.commands), str(Path(sys.executable).parent), os.environ["PATH"]]),
            "OMP_NUM_THREADS": "1",
            MARK: str(job),
            "SLURM_PLAY_REACH": self.moments.choice(["all", "tasks"]),
            "SLURM_JOB_ID": str(job_id),
            "SLURM_NNODES": str(self.nodes),
            "SLURM_JOB_NODELIST": ",".join(["localhost"] * self.nodes),
            "SLURM_RESTART_COUNT": str(restarts),
        }
        command = ["bash", str(SBATCH), "rotation", *SETTINGS, "--epochs", str(self.epochs), *more, "--out"]
        log, asked = job / f"attempt-{number}.log", job / "requeues"
        asked.unlink(missing_ok=True)
        begun, what = time.monotonic(), ""
        with log.open("w") as file:
            shell = subprocess.Popen(
                [*command, str(self.out(name))], stdout=file, stderr=subprocess.STDOUT, env=environment, cwd=ROOT
            )
            try:
                what = self._disturb(name, job, shell, disturb, before, begun)
                shell.wait(WARNING_SECONDS)
            except subprocess.TimeoutExpired:
                what += ", KILL at the time limit"
            finally:  # SLURM leaves nothing of a job running
                send(processes(job), signal.SIGKILL)
                code = shell.wait()
        text = log.read_text()
        return Attempt(
            attempt=number,
            seconds=round(time.monotonic() - begun, 1),
            signal=what,
            exit_code=code if code >= 0 else 128 - code,
            continued_from=[int(step) for step in re.findall(r"continues from step (\d+)", text)],
            stopped_at=self.newest(name),
            requeued=asked.exists(),
        )

    def _disturb(self, name: str, job: Path, shell: subprocess.Popen, disturb: str, before: int, begun: float) -> str:
        """Wait for the moment and do what is to be done; returns what was done."""
        if not disturb:
            return ""
        deadline = begun + 120
        early = disturb == "USR1 at once"
        while shell.poll() is None and time.monotonic() < deadline:
            if (early and processes(job, only="RANK")) or (not early and self.newest(name) > before):
                break
            time.sleep(0.02)
        time.sleep(0 if early else self.moments.uniform(0.2, 1.5))
        after = f"after {time.monotonic() - begun:.1f} s"
        if disturb in ("KILL first", "KILL last"):
            ranks = {variable(pid, "RANK"): pid for pid in processes(job, only="RANK")}
            rank = (min if disturb == "KILL first" else max)(ranks, key=int)
            send([ranks[rank]], signal.SIGKILL)
            return f"KILL to rank {rank} {after}"
        if disturb == "KILL":
            send(processes(job), signal.SIGKILL)
            return f"KILL to all {after}"
        shell.send_signal(signal.SIGUSR1)
        return f"USR1 {after}"


# ---- The scenarios


def play(cluster: Cluster, name: str) -> Scenario:
    plans = {
        "undisturbed": [""],
        "requeue": ["USR1", "USR1", ""],
        "limit": ["KILL", ""],
        "error": [""],
        "worker": ["KILL last"],
        "main-worker": ["KILL first"],
        "one-requeue": ["USR1", ""],
        "no-step": ["USR1 at once"],
    }
    more = ("--nonesuch", "1") if name == "error" else ()
    scenario, requeues = Scenario(name), 0
    for number, disturb in enumerate(plans[name], 1):
        before = cluster.newest(name)
        row = cluster.attempt(name, number, requeues, disturb, more)
        scenario.attempts.append(row)
        show(name, row)
        requeues += row.requeued
        warned = disturb == "USR1"
        expected = {"error": 2, "no-step": 143}.get(name, {"USR1": 143, "KILL": 137}.get(disturb, 0))
        saved = before > 0 or disturb.startswith("KILL ")
        if row.exit_code != expected:
            scenario.wrong.append(f"attempt {number}: exit code {row.exit_code} and not {expected}")
        if row.requeued != warned:
            scenario.wrong.append(f"attempt {number}: {'requeued' if row.requeued else 'not requeued'}")
        if bool(row.continued_from) != saved or (before and row.continued_from[:1] != [before]):
            scenario.wrong.append(f"attempt {number}: continued from {row.continued_from}, saved was step {before}")
        if warned:  # nothing at all may be lost: what was saved last is the step that the run stopped at
            log = (cluster.folder / name / f"attempt-{number}.log").read_text()
            said = {int(step) for step in re.findall(r"stopped by SIGTERM at step (\d+)", log)}
            if said != {row.stopped_at}:
                scenario.wrong.append(f"attempt {number}: stopped at {sorted(said)}, saved was {row.stopped_at}")
        if row.exit_code != expected or (number < len(plans[name]) and not (row.requeued or disturb == "KILL")):
            break
    backbone = cluster.out(name) / "backbone.safetensors"
    scenario.finished = backbone.exists()
    if scenario.finished != (name not in ("error", "no-step")):
        scenario.wrong.append("finished" if scenario.finished else "not finished")
    if scenario.finished:
        from unlabel.checkpoint import file_sha256

        scenario.sha256 = file_sha256(backbone)
    for line in scenario.wrong:
        print(f"{name}: WRONG: {line}", flush=True)
    return scenario


HEAD = ("scenario", "attempt", "seconds", "signal", "exit code", "continued from", "stopped at", "requeued")
WIDTHS = (12, 8, 8, 26, 10, 15, 11, 8)


def show(name: str, row: Attempt) -> None:
    steps = ", ".join(map(str, row.continued_from)) or "-"
    cells = (name, row.attempt, row.seconds, row.signal or "-", row.exit_code, steps, row.stopped_at)
    line((*cells, "yes" if row.requeued else "no"))


def line(cells: tuple) -> None:
    print(" ".join(f"{cell!s:<{width}}" for cell, width in zip(cells, WIDTHS, strict=True)).rstrip(), flush=True)


def main() -> None:
    if sys.argv[1:2] == ["--play"]:
        name, arguments = sys.argv[2], sys.argv[3:]
        sys.exit({"srun": srun, "scontrol": scontrol, "scancel": scancel}[name](Path(os.environ[MARK]), arguments))

    names = ["requeue", "limit", "error", "worker", "main-worker", "no-step"]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=[*names, "one-requeue"], default=names)
    parser.add_argument("--nodes", type=int, default=2)
    parser.add_argument("--epochs", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="keep the logs and runs here (default: nothing)")
    args = parser.parse_args()
    if not Path("/proc/self/environ").exists():
        parser.error("needs Linux's /proc")
    if args.keep and args.keep.exists():
        parser.error(f"{args.keep} exists")

    folder = Path(tempfile.mkdtemp()) if args.keep is None else args.keep.resolve()
    begun, scenarios = time.monotonic(), []
    try:
        cluster = Cluster(folder, args.nodes, args.epochs, random.Random(args.seed))
        line(HEAD)
        for name in ["undisturbed", *args.only]:
            scenario = play(cluster, name)
            scenarios.append(scenario)
            if name != "undisturbed" and scenario.finished:
                scenario.equal = scenario.sha256 == scenarios[0].sha256
                print(f"{name}: backbone {'equal' if scenario.equal else 'DIFFERENT'}", flush=True)
            if scenario.wrong and args.keep is None:
                print((folder / name / f"attempt-{len(scenario.attempts)}.log").read_text()[-4000:], file=sys.stderr)
    finally:
        if args.keep is None:
            shutil.rmtree(folder, ignore_errors=True)
    right = all(not s.wrong and s.equal is not False for s in scenarios)
    print(f"{time.monotonic() - begun:.0f} s: {'all as it should be' if right else 'NOT as it should be'}")
    if args.only == names:
        from unlabel.runfolder import hardware, versions

        about = {"nodes": args.nodes, "seed": args.seed, "settings": [*SETTINGS, "--epochs", str(args.epochs)]}
        about |= {"torch": versions()["torch"], "hardware": hardware(), "scenarios": [asdict(s) for s in scenarios]}
        (ROOT / "results" / "slurm.json").write_text(json.dumps(about, indent=1) + "\n")
    sys.exit(0 if right else 1)


if __name__ == "__main__":
    main()
