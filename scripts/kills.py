"""Six SIGKILLs at random moments, then the same command: the backbone must be the undisturbed run's, byte for byte.

    python scripts/kills.py                                  five minutes or more for each task, on two cores
    python scripts/kills.py --data FOLDER --seed 1           other images, other moments
    python scripts/kills.py --only rotation+denoising        one row again, or one more

For each task and for all of them summed that can be. Each kill comes between the end of the start (imports, images)
and a seventh of the training later, so that all six find the run alive; one that comes before the first checkpoint
starts from nothing again. `continued_from` lists the steps that the runs went on from. Prints a line per run and writes
results/kills.json.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from pretext import TASKS, load_task
from unlabel.checkpoint import file_sha256
from unlabel.runfolder import hardware

KILLS = 6
FLAGS = "--image-size 32 --batch-size 32 --epochs 3 --checkpoint-every 3 --device cpu".split()


def command(tasks: list[str], data: str, out: Path) -> list[str]:
    return [sys.executable, "-m", "unlabel", "pretrain", *tasks, "--data", data, *FLAGS, "--out", str(out)]


def timed(run: list[str]) -> float:
    begun = time.monotonic()
    subprocess.run(run, check=True, capture_output=True)
    return time.monotonic() - begun


def disturbed(run: list[str], window: tuple[float, float], moments: random.Random) -> tuple[int, list[int]]:
    """Kill ``run`` six times, each within ``window`` (seconds after it was started), then let it end.

    Returns how many kills found it alive, and the steps that it continued from.
    """
    found, killed = "", 0
    for last in [False] * KILLS + [True]:
        process = subprocess.Popen(run, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if not last:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(moments.uniform(*window))
            killed += process.poll() is None
            process.kill()
        out, _ = process.communicate()
        found += out
        if last and process.returncode != 0:
            sys.exit(out[-2000:])
    return killed, [int(step) for step in re.findall(r"continues from step (\d+)", found)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="digits")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", metavar="TASK+TASK")
    args = parser.parse_args()
    rows, moments = [], random.Random(args.seed)
    out = Path("results/kills.json")
    out.parent.mkdir(exist_ok=True)
    wanted = [*([name] for name in TASKS), [name for name in TASKS if load_task(name).phases == 1]]
    if args.only:
        wanted = [args.only.split("+")]
        if not out.exists():
            parser.error(f"there is no {out} yet that these rows could be put into: leave --only out")
        before = json.loads(out.read_text())
        if (before["data"], before["seed"]) != (Path(args.data).name, args.seed):
            parser.error(f"{out} holds rows of --data {before['data']} --seed {before['seed']}")
        rows = [row for row in before["rows"] if row["tasks"] not in wanted]
    for tasks in wanted:
        with tempfile.TemporaryDirectory() as folder:
            whole, died = Path(folder) / "whole", Path(folder) / "died"
            training = timed(command(tasks, args.data, whole))  # all of it, with the start
            start = timed(command(tasks, args.data, whole))  # finished: it starts, verifies, ends
            window = start, start + (training - start) / (KILLS + 1)
            killed, at = disturbed(command(tasks, args.data, died), window, moments)
            a, b = (file_sha256(run / "backbone.safetensors") for run in (whole, died))
        rows.append({"tasks": tasks, "kills": killed, "continued_from": at, "equal": a == b, "sha256": a})
        content = {"data": Path(args.data).name, "seed": args.seed, "hardware": hardware(), "rows": rows}
        out.write_text(json.dumps(content, indent=1) + "\n")
        verdict = "equal" if a == b else "DIFFERENT"
        print(f"{'+'.join(tasks):<32} {killed} kills, continued from steps {at}: {verdict}", flush=True)
    sys.exit(0 if all(row["equal"] for row in rows) else 1)


if __name__ == "__main__":
    main()
