"""What happens to a run when things go wrong: real processes, real signals, real full disks.

    python scripts/chaos.py                          every row, about half an hour on one core
    python scripts/chaos.py --only kills --seed 1    one row, other moments

Every row compares with the same run left alone: `backbone.safetensors` must be the same, byte for byte. Writes
results/chaos.json, and the table in docs/reliability.md. Rows that need root (small disks, another user) say so where
it is missing.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import pickle
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from sklearn.datasets import load_digits

from unlabel.checkpoint import file_sha256
from unlabel.runfolder import commit, hardware, versions

RESULT, PAGE = Path("results/chaos.json"), Path("docs/reliability.md")
BEGIN, END = "<!-- written by scripts/chaos.py -->", "<!-- end -->"
FLAGS = "--image-size 32 --batch-size 16 --checkpoint-every 3 --log-every 5 --device cpu".split()
KILLS = {"packing": 4, "writing": 6, "anywhere": 20}
WAIT = 300.0  # seconds after which something that should have happened has not


@dataclass(frozen=True)
class Row:
    name: str
    tried: str
    came: str
    good: bool | None  # None: not tried here


class Play:
    """A place to play in: data, a cache of its own, commands that are disturbed."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.seed, self.random = folder, seed, random.Random(seed)
        self.data = folder / "data"
        digits = load_digits().images  # pyright: ignore[reportAttributeAccessIssue]
        self.data.mkdir()
        for k, digit in enumerate(digits[:600]):
            image = Image.fromarray((digit * (255 / 16)).astype("uint8")).resize((32, 32), Image.Resampling.BICUBIC)
            image.save(self.data / f"{k:04d}.png")
        self.wholes: dict[tuple[str, ...], str] = {}

    def command(self, out: Path, *more: str, epochs: float = 2, data: Path | None = None) -> list[str]:
        given = ["--data", str(data or self.data), "--epochs", str(epochs), *FLAGS, "--out", str(out)]
        return ["pretrain", "rotation", *given, *more]

    def start(
        self, command: list[str], processes: int = 1, cache: str = "cache", before: tuple[str, ...] = ()
    ) -> subprocess.Popen[str]:
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        launcher = [*torchrun, "--max-restarts", "2", "-m", "unlabel"] if processes > 1 else ["-m", "unlabel"]
        own = {"UNLABEL_CACHE": str(self.folder / cache), "OMP_NUM_THREADS": "1"}
        own["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"  # restarted processes must not find the addresses of dead ones
        return subprocess.Popen(
            [*before, sys.executable, *launcher, *command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            env={**os.environ, **own},
        )  # fmt: skip

    def run(self, command: list[str], processes: int = 1, **more: Any) -> tuple[int, str]:
        process = self.start(command, processes, **more)
        out, _ = process.communicate(timeout=WAIT)
        return process.returncode, out

    def whole(self, *more: str, epochs: float = 2, processes: int = 1) -> str:
        """SHA-256 of the backbone of the same run left alone."""
        key = (*more, str(epochs), str(processes))
        if key not in self.wholes:
            out = self.folder / f"whole-{len(self.wholes)}"
            code, text = self.run(self.command(out, *more, epochs=epochs), processes)
            if code:
                sys.exit(text)
            self.wholes[key] = file_sha256(out / "backbone.safetensors")
        return self.wholes[key]

    def stopped(self, name: str, *more: str, epochs: float = 2) -> Path:
        """A run that was killed somewhere behind its second checkpoint."""
        out = self.folder / name
        process = self.start(self.command(out, *more, epochs=epochs))
        until(lambda: len(steps(out)) == 2, process)
        time.sleep(self.random.uniform(0, 0.3))
        process.kill()
        process.communicate()
        return out


def steps(out: Path) -> list[Path]:
    """Its checkpoints, newest first."""
    return sorted((out / "checkpoints").glob("step-*.pt"), reverse=True)


def until(happened: Callable[[], object], process: subprocess.Popen[str], pause: float = 0.02) -> bool:
    """Wait; False if the process ended before."""
    deadline = time.monotonic() + WAIT
    while not happened():
        if process.poll() is not None:
            return False
        if time.monotonic() > deadline:
            process.kill()
            raise TimeoutError("what was waited for did not happen")
        if pause:
            time.sleep(pause)
    return True


def continued(text: str) -> list[int]:
    return [int(step) for step in re.findall(r"continues from step (\d+)", text)]


def content(folder: Path) -> dict[str, str]:
    """Every file to its hash, but for the lock and files that are half written."""
    files = (p for p in sorted(folder.rglob("*")) if p.is_file() and not p.name.startswith("."))
    return {str(p.relative_to(folder)): file_sha256(p) for p in files}


def ends_like(play: Play, out: Path, *more: str, epochs: float = 2, processes: int = 1) -> tuple[bool, str]:
    """Run to the end; whether the result is that of the run left alone."""
    code, text = play.run(play.command(out, *more, epochs=epochs), processes)
    same = code == 0 and file_sha256(out / "backbone.safetensors") == play.whole(
        *more, epochs=epochs, processes=processes
    )
    return same, text


# ---- The rows


def kills(play: Play) -> Iterator[Row]:
    """SIGKILL while packing, while a checkpoint is being written, and anywhere."""
    epochs, out, cache = 8, play.folder / "kills", play.folder / "cache-kills"
    command = play.command(out, epochs=epochs)
    counts = dict.fromkeys(KILLS, 0)
    begun = time.monotonic()
    play.whole(epochs=epochs)
    training = time.monotonic() - begun
    found = ""

    def kill(process: subprocess.Popen[str]) -> None:
        nonlocal found
        process.kill()
        found += process.communicate()[0]

    def halves() -> list[Path]:
        return [*(out / "checkpoints").glob(".step-*.tmp")]

    for _ in range(10 * KILLS["packing"]):
        if counts["packing"] == KILLS["packing"]:
            break
        process = play.start(command, cache=cache.name)
        if until(lambda: any(cache.glob("tmp-*/images.u8")), process, 0):
            time.sleep(play.random.uniform(0, 0.1))
            kill(process)
            counts["packing"] += not any(cache.glob("*/index.bin"))
            for left in cache.glob("tmp-*"):
                shutil.rmtree(left)
    while sum(counts.values()) < sum(KILLS.values()):
        process = play.start(command, cache=cache.name)
        if counts["writing"] < KILLS["writing"] and play.random.random() < 0.5:
            for left in halves():
                left.unlink()
            after = play.random.randrange(1, 4)  # of the checkpoints of this start
            seen: set[str] = set()

            def writing(after: int = after, seen: set[str] = seen) -> bool:
                seen.update(p.name for p in halves())
                return len(seen) >= after and bool(halves())

            if not until(writing, process, 0):
                break
            kill(process)
            counts["writing"] += bool(halves())  # it is still there: the kill came before it was renamed
        else:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(play.random.uniform(0.5, 10 + training / 20))
            if process.poll() is not None:
                break
            kill(process)
            counts["anywhere"] += 1
    same, text = ends_like(play, out, epochs=epochs)
    at = continued(found + text)
    tried = (
        f"SIGKILL {counts['packing']} times while packing, {counts['writing']} while a checkpoint was being written, "
    )
    tried += f"{counts['anywhere']} at any moment from the start of Python on"
    verdict = f"same bytes, continued {len(at)} times" if same else f"DIFFERENT ({text[-300:]})"
    yield Row("kills", tried, verdict, same and counts == KILLS)


def signals(play: Play) -> Iterator[Row]:
    for name in ("SIGTERM", "SIGINT", "SIGUSR1"):
        number = int(getattr(signal, name))
        out = play.folder / name
        process = play.start(play.command(out))
        until(lambda out=out: steps(out), process)
        process.send_signal(number)
        text, _ = process.communicate(timeout=WAIT)
        stopped = re.search(rf"stopped by {name} at step (\d+); the same command continues", text)
        code = process.returncode
        same, text = ends_like(play, out)
        exact = bool(stopped) and continued(text) == [int(stopped[1])] if stopped else False
        came = f"exit code {code}; the step is finished and saved; continued there; " + (
            "same bytes" if same else "LOST"
        )
        yield Row("signals", name, came, same and exact and code == 128 + number)


def second_interrupt(play: Play) -> Iterator[Row]:
    """The second SIGINT comes while the step is being finished that the first one let go on: steps are long here."""
    slow = ["--batch-size", "1200", "--checkpoint-every", "2"]
    out = play.folder / "twice"
    process = play.start(play.command(out, *slow, epochs=8))
    until(lambda: steps(out), process)
    newest = int(steps(out)[0].stem.split("-")[1])
    time.sleep(play.random.uniform(0.2, 1.0))
    for _ in range(2):
        process.send_signal(signal.SIGINT)
        time.sleep(0.1)
    text, _ = process.communicate(timeout=WAIT)
    code = process.returncode
    same, then = ends_like(play, out, *slow, epochs=8)
    good = same and code == 130 and "interrupted" in text and continued(then) == [newest]
    came = f"exit code {code} at once; continued from {continued(then)}, the step that was saved before; "
    yield Row("second interrupt", "Ctrl-C twice", came + ("same bytes" if same else "LOST"), good)


def a_rank_dies(play: Play) -> Iterator[Row]:
    def rank_of(pid: int) -> str | None:
        with contextlib.suppress(OSError):
            variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            return next((v.decode()[5:] for v in variables if v.startswith(b"RANK=")), None)
        return None

    for what in (signal.SIGKILL, signal.SIGSTOP):
        out = play.folder / f"rank-{what.name}"
        timeout = "3" if what == signal.SIGKILL else "0.5"
        process = play.start(play.command(out, "--rank-timeout", timeout), 2)
        until(lambda out=out: steps(out), process)
        children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
        victim = next(int(pid) for pid in children if rank_of(int(pid)) == "1")
        os.kill(victim, what)
        text, _ = process.communicate(timeout=WAIT)
        same = process.returncode == 0 and file_sha256(out / "backbone.safetensors") == play.whole(
            "--rank-timeout", timeout, processes=2
        )
        named = what == signal.SIGKILL or "missing of 2: rank 1 on" in text
        at = continued(text)
        came = f"torchrun starts both again, from step {at[0] if at else '?'}; " + ("same bytes" if same else "LOST")
        if what == signal.SIGSTOP:
            came = "the other process names it after --rank-timeout; " + came
        tried = "is killed" if what == signal.SIGKILL else "hangs (SIGSTOP)"
        yield Row("a rank dies", f"one of two processes {tried}", came, bool(same and named and at))


def other_processes(play: Play) -> Iterator[Row]:
    """Without BatchNorm, so to tolerance: one process, then two, then one."""
    from safetensors.torch import load_file

    plain = ["--backbone", "convnext_atto", "--precision", "fp32", "--optimizer", "sgd", "--lr", "0.02"]
    play.whole(*plain, epochs=1)
    whole = load_file(play.folder / f"whole-{len(play.wholes) - 1}" / "backbone.safetensors")
    out, at = play.folder / "other-processes", []
    for processes in (1, 2):
        process = play.start(play.command(out, *plain, epochs=1), processes)
        known = set(steps(out))
        until(lambda known=known: len(set(steps(out)) - known) > 1, process)
        process.send_signal(signal.SIGTERM)
        at += continued(process.communicate(timeout=WAIT)[0])
    code, text = play.run(play.command(out, *plain, epochs=1))
    found = load_file(out / "backbone.safetensors") if code == 0 else {k: v * 0 for k, v in whole.items()}
    apart = max(float((whole[k] - found[k]).abs().max()) for k in whole)
    came = f"continued from steps {at + continued(text)}; weights differ by at most {apart:.1e}"
    yield Row("other number of processes", "one process, then two, then one", came, apart < 1e-3)


def damaged_checkpoints(play: Play) -> Iterator[Row]:
    class Payload:
        def __reduce__(self):
            return (os.system, (f"touch {play.folder / 'owned'}",))

    def truncate(data: bytes) -> bytes:
        return data[: play.random.randrange(1, len(data))]

    def flip(data: bytes) -> bytes:
        at = play.random.randrange(len(data))
        return data[:at] + bytes([data[at] ^ (1 << play.random.randrange(8))]) + data[at + 1 :]

    def hostile(_: bytes) -> bytes:
        payload = pickle.dumps(Payload(), protocol=2)
        return b"unlabel-checkpoint-1\n" + hashlib.sha256(payload).digest() + payload

    ways: dict[str, Callable[[bytes], bytes]] = {
        "truncated": truncate, "one bit flipped": flip, "emptied": lambda _: b"",
        "replaced by a pickle that runs a command": hostile,
    }  # fmt: skip
    for k, (what, damage) in enumerate(ways.items()):
        out = play.stopped(f"damaged-{k}")
        newest, older = steps(out)
        newest.write_bytes(damage(newest.read_bytes()))
        same, text = ends_like(play, out)
        named = newest.name in text and continued(text) == [int(older.stem.split("-")[1])]
        came = "named; the one before is used; " + ("same bytes" if same else "LOST")
        yield Row("damaged checkpoint", f"the newest checkpoint {what}", came, same and named)
    out = play.stopped("all-damaged")
    for path in steps(out):
        path.write_bytes(hostile(b""))
    before = content(out)
    code, text = play.run(play.command(out))
    good = code == 2 and content(out) == before and not (play.folder / "owned").exists()
    yield Row("damaged checkpoint", "all of them hostile", f"exit code {code}, nothing run, nothing overwritten", good)
    finished = play.folder / "finished"
    play.run(play.command(finished))
    for path in [*steps(finished), finished / "backbone.safetensors"]:
        path.write_bytes(hostile(b""))
    before = content(finished)
    code, text = play.run(play.command(finished))
    good = code == 2 and content(finished) == before and not (play.folder / "owned").exists()
    yield Row(
        "damaged checkpoint", "the same in a finished run", f"exit code {code}, nothing run, nothing overwritten", good
    )


@contextlib.contextmanager
def small_disk(at: Path, megabytes: int) -> Iterator[Path]:
    at.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(at)], check=True)
    try:
        yield at
    finally:
        subprocess.run(["umount", "-l", str(at)], check=True)


def disks(play: Play) -> Iterator[Row]:
    if os.geteuid() != 0:
        yield Row("disks", "full, read-only, of another user", "not tried: needs root", None)
        return
    size = steps(play.stopped("for-its-size"))[0].stat().st_size >> 20
    with small_disk(play.folder / "disk", int(2.6 * size)) as disk:
        out = disk / "run"
        code, text = play.run(play.command(out))
        kept = len(steps(out))
        good = code == 2 and str(out) in text and kept >= 1 and "Traceback" not in text
        subprocess.run(["mount", "-o", f"remount,size={20 * size}m", str(disk)], check=True)
        same, _ = ends_like(play, out)
        came = f"exit code {code}, the path is named, {kept} good checkpoints kept; with room made: "
        yield Row(
            "disks",
            "the disk fills up while a checkpoint is written",
            came + ("same bytes" if same else "LOST"),
            good and same,
        )
        # ---- read-only
        part = disk / "part"
        process = play.start(play.command(part))
        until(lambda: steps(part), process)
        process.kill()
        process.communicate()
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        before = content(part)
        code, text = play.run(play.command(part))
        good = code == 2 and str(part) in text and content(part) == before
        subprocess.run(["mount", "-o", "remount,rw", str(disk)], check=True)
        same, _ = ends_like(play, part)
        came = f"exit code {code}, the path is named, nothing changed; writable again: "
        yield Row("disks", "--out is read-only", came + ("same bytes" if same else "LOST"), good and same)
    # ---- another user's folder; root may write everywhere, but for root without that capability
    theirs = play.folder / "theirs"
    theirs.mkdir(mode=0o755)
    os.chown(theirs, 65534, 65534)
    tried = "no permission to write --out"
    if not shutil.which("setpriv"):
        yield Row("disks", tried, "not tried: needs setpriv", None)
        return
    without = ("setpriv", "--bounding-set=-dac_override,-dac_read_search", "--")
    code, text = play.run(play.command(theirs / "run"), before=without)
    good = code == 2 and str(theirs) in text and "Traceback" not in text
    yield Row("disks", tried, f"exit code {code}, the path is named", good)


def not_finite(play: Play) -> Iterator[Row]:
    out = play.folder / "diverges"
    code, text = play.run(
        play.command(out, "--optimizer", "sgd", "--lr", "1e6", "--clip", "0", "--checkpoint-every", "1")
    )
    line = next((x for x in text.splitlines() if "finite" in x), "")
    words = ("rotation", "near step", "last good checkpoint: step-", "--lr")
    good = code == 2 and all(w in line for w in words) and not (out / "backbone.safetensors").exists()
    yield Row(
        "loss not finite",
        "a learning rate of a million",
        f"exit code {code}: {line.removeprefix('unlabel: ').replace(str(out), '--out')}",
        good,
    )


def two_runs(play: Play) -> Iterator[Row]:
    out = play.folder / "two-runs"
    first = play.start(play.command(out))
    until(lambda: steps(out), first)
    code, text = play.run(play.command(out))
    alive = first.poll() is None
    first.kill()
    first.communicate()
    same, _ = ends_like(play, out)
    good = code == 2 and "another run is writing" in text and alive and same
    came = f"the second is refused (exit code {code}); once the first is killed, the lock is free; " + (
        "same bytes" if same else "LOST"
    )
    yield Row("two runs in one --out", "the same command twice at once", came, good)


def changed_data(play: Play) -> Iterator[Row]:
    def other_pixels(path: Path) -> None:
        """The same size in bytes, another picture."""
        data, image = path.read_bytes(), Image.open(path).copy()
        for k in range(256):
            image.putpixel((k % 32, k // 32), (image.getpixel((k % 32, k // 32)) + 128) % 256)  # type: ignore[operator]
            image.save(path)
            if (short := len(data) - path.stat().st_size) >= 0:
                path.write_bytes(path.read_bytes() + bytes(short))  # behind the end of a PNG nothing counts
                return

    ways: dict[str, Callable[[Path], object]] = {
        "a file is deleted": Path.unlink,
        "a file is replaced by a larger one": lambda p: p.write_bytes(p.read_bytes() + b"0"),
        "a file is replaced by another picture of the same size": other_pixels,
    }  # fmt: skip
    for k, (what, change) in enumerate(ways.items()):
        data, out = play.folder / f"data-{k}", play.folder / f"changed-{k}"
        shutil.copytree(play.data, data)
        command = play.command(out, data=data)
        process = play.start(command, cache=f"cache-{k}")
        until(lambda out=out: steps(out), process)
        victim = data / f"{play.random.randrange(600):04d}.png"
        kept = victim.read_bytes()
        change(victim)
        text, _ = process.communicate(timeout=WAIT)  # it trains on what it has packed
        same = process.returncode == 0 and file_sha256(out / "backbone.safetensors") == play.whole()
        # The same in a run that is killed and continued without its packed images.
        (out / "backbone.safetensors").unlink()
        about = json.loads((out / "config.json").read_text())
        del about["finished"]
        (out / "config.json").write_text(json.dumps(about))
        steps(out)[0].unlink()
        shutil.rmtree(play.folder / f"cache-{k}")
        before = content(out)
        code, text = play.run(command, cache=f"cache-{k}")
        good = same and code == 2 and {k: v for k, v in content(out).items() if k != "skipped.txt"} == {
            k: v for k, v in before.items() if k != "skipped.txt"}  # fmt: skip
        victim.write_bytes(kept)
        code_then, _ = play.run(command, cache=f"cache-{k}")
        good = good and code_then == 0 and file_sha256(out / "backbone.safetensors") == play.whole()
        came = "the running job ends as if nothing were; continued without its packed images: refused "
        came += f"(exit code {code}); restored: same bytes"
        yield Row("data changes", what, came if good else f"WRONG: {text[-300:]}", good)


ROWS: dict[str, Callable[[Play], Iterator[Row]]] = {
    "kills": kills, "signals": signals, "second-interrupt": second_interrupt, "a-rank-dies": a_rank_dies,
    "other-processes": other_processes, "damaged-checkpoints": damaged_checkpoints, "disks": disks,
    "not-finite": not_finite, "two-runs": two_runs, "changed-data": changed_data,
}  # fmt: skip


def table(found: dict[str, list[dict]]) -> str:
    lines = ["| tried | what came of it | |", "| --- | --- | --- |"]
    for rows in found.values():
        for row in rows:
            verdict = {True: "kept", False: "**LOST**", None: "not tried"}[row["good"]]
            lines.append(f"| {row['tried']} | {row['came'].replace('|', '/')} | {verdict} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=ROWS, nargs="*")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    about = json.loads(RESULT.read_text()) if RESULT.exists() else {}
    known = about.get("rows", {})
    for name in args.only or ROWS:
        with tempfile.TemporaryDirectory() as folder:
            begun = time.monotonic()
            known[name] = [asdict(row) for row in ROWS[name](Play(Path(folder), args.seed))]
        for row in known[name]:
            row |= {"seed": args.seed, "commit": commit()}
            verdict = {True: "kept", False: "LOST", None: "not tried"}[row["good"]]
            print(f"{verdict:<10} {row['tried']}: {row['came']}", flush=True)
        print(f"           ({name}: {time.monotonic() - begun:.0f} s)", flush=True)
        rows = {k: known[k] for k in ROWS if k in known}
        RESULT.parent.mkdir(exist_ok=True)
        RESULT.write_text(
            json.dumps({"hardware": hardware(), "versions": versions(), "rows": rows}, indent=1, ensure_ascii=False)
            + "\n"
        )
        page = PAGE.read_text() if PAGE.exists() else f"{BEGIN}\n{END}\n"
        head, rest = page.split(BEGIN)
        PAGE.write_text(f"{head}{BEGIN}\n\n{table(rows)}\n\n{END}{rest.split(END)[1]}")
    sys.exit(any(row["good"] is False for rows in known.values() for row in rows))


if __name__ == "__main__":
    main()
