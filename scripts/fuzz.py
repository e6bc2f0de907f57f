"""Mutated files over every reader of data from strangers: each is read or refused with a reason; no crash, no hang.

    python scripts/fuzz.py                              10,000 files, all readers
    python scripts/fuzz.py --files 100000 --seed 1      more, others
    python scripts/fuzz.py --seconds 300                as many of them as that time allows
    python scripts/fuzz.py --only "image: png" --first 1234 --files 1      one of them again

A reader may succeed, or refuse with UserError (`decode`: BrokenImage). Anything else, more than 10 s or more than 2 GB
is a failure: recorded with reader, seed, number and mutation, its files kept in --out. The readers run in a process of
their own, so that a segmentation fault or a hang costs that process only. What is mutated is a whole sample: bits
flipped, bytes cut, inserted, doubled, zeroed, heads of other files, length fields; of JSON also single values, and of
what carries a checksum also the content below a right checksum. Writes results/fuzz.json; exit code 1 on a failure.
Needs a Unix.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import gzip
import hashlib
import importlib.util
import io
import json
import os
import random
import resource
import select
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SECONDS = 10.0  # that one file may take
MEMORY = 2 << 30  # bytes that one file may take, beside what the process has when it starts
CHUNK = 1000  # files for one process


# ---------------------------------------------------------------- mutations


def mutate(data: bytes, heads: list[bytes], rng: random.Random) -> tuple[bytes, str]:
    """One to four changes of any kind, and their names."""
    found = bytearray(data)
    names = []
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        at = rng.randrange(len(found) + 1) if rng.random() < 0.5 else rng.randrange(min(len(found), 200) + 1)
        length = min(rng.choice((1, 2, 4, 8, 16, 64, 300)), max(1, len(found) - at))
        kind = rng.choice(("flip", "byte", "cut", "drop", "insert", "double", "zero", "head", "length", "swap"))
        if kind == "flip":
            for _ in range(rng.choice((1, 1, 3, 30))):
                if found:
                    found[rng.randrange(len(found))] ^= 1 << rng.randrange(8)
        elif kind == "byte" and at < len(found):
            found[at] = rng.choice((0, 1, 127, 128, 255, 32, 48, 57, rng.randrange(256)))
        elif kind == "cut":
            del found[at:]
        elif kind == "drop":
            del found[at : at + length]
        elif kind == "insert":
            found[at:at] = rng.randbytes(length)
        elif kind == "double":
            found[at:at] = found[at : at + length] * rng.choice((1, 1, 3, 50))
        elif kind == "zero":
            found[at : at + length] = bytes(length)
        elif kind == "head":
            head = rng.choice(heads)[: rng.choice((4, 16, 64, 200))]
            found[: len(head)] = head
        elif kind == "length":
            size = rng.choice((2, 4, 4, 8))
            value = rng.choice(
                (0, 1, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, len(data), rng.getrandbits(24))
            )
            found[at : at + size] = (value % 256**size).to_bytes(size, rng.choice(("big", "little")))
        elif kind == "swap":
            other = rng.randrange(len(found) + 1)
            a, b = found[at : at + length], found[other : other + length]
            found[at : at + len(b)], found[other : other + len(a)] = b, a
        names.append(f"{kind}@{at}+{length}")
    return bytes(found), " ".join(names)


_VALUES: list[Any] = [
    None,
    True,
    False,
    0,
    -1,
    1,
    0.5,
    1e308,
    -1e-300,
    10**30,
    float("nan"),
    float("inf"),
    "",
    "x",
    "é\udce9",
]
_VALUES += ["../../x", "<b>&", "9" * 400, [], [[]], {}, {"": {}}, [1, 2, 3], ["a"], [None], {"a": None}, "\0", "2" * 20]


def mutate_json(text: bytes, rng: random.Random) -> tuple[bytes, str]:
    """Valid JSON with one to three values, at any depth, gone, doubled, or of another kind."""
    value = json.loads(text)
    names = []
    for _ in range(rng.choice((1, 1, 2, 3))):
        places: list[tuple[Any, Any]] = []
        todo = [value]
        while todo:
            node = todo.pop()
            keys = list(node) if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ()
            places += [(node, key) for key in keys]
            todo += [node[key] for key in keys]
        if not places:
            break
        node, key = rng.choice(places)
        what = rng.random()
        if what < 0.15:
            del node[key]
            names.append(f"del {key!r}")
        elif what < 0.25 and isinstance(node, dict):
            node[str(rng.choice(_VALUES))] = node.pop(key)
            names.append(f"rename {key!r}")
        else:
            node[key] = rng.choice(_VALUES)
            names.append(f"{key!r} = {node[key]!r}")
    if rng.random() < 0.03:
        value = rng.choice(_VALUES)
        names = [f"all = {value!r}"]
    if rng.random() < 0.01:
        return b"[" * 100_000, "deep"
    return json.dumps(value).encode("utf-8", "surrogatepass"), ", ".join(names)


# ---------------------------------------------------------------- readers


@dataclass
class Reader:
    """`samples` are sets of files. One of `targets` in a set is mutated, and `read` gets the folder of the set."""

    read: Callable[[Path], object]
    samples: list[dict[str, bytes]]
    targets: tuple[str, ...]
    share: float  # of all files
    signed: Callable[[bytes], bytes] | None = None  # a right checksum around mutated content
    unsigned: Callable[[bytes], bytes] = bytes
    refusals: tuple[type[Exception], ...] = ()
    heads: list[bytes] = field(default_factory=list)

    def make(self, folder: Path, rng: random.Random) -> str:
        """Write a mutated sample into `folder`; what was changed."""
        sample = rng.choice(self.samples)
        target = rng.choice([name for name in self.targets if name in sample])
        data = sample[target]
        if target.endswith(".json") and rng.random() < 0.6:
            changed, what = mutate_json(data, rng)
        elif target.endswith(".jsonl") and rng.random() < 0.6:
            lines = data.splitlines()
            k = rng.randrange(len(lines))
            lines[k], what = mutate_json(lines[k], rng)
            changed = b"\n".join(lines) + b"\n"
        elif self.signed is not None and rng.random() < 0.7:
            changed, what = mutate(self.unsigned(data), self.heads, rng)
            changed, what = self.signed(changed), f"signed: {what}"
        else:
            changed, what = mutate(data, self.heads, rng)
        self.write(folder, sample | {target: changed})
        return f"{target}: {what}"

    def write(self, folder: Path, files: dict[str, bytes]) -> None:
        for name, content in files.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)


def load_script(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def make_corpus(folder: Path) -> None:
    """The odd images, once for all processes."""
    load_script("odd_images").write_corpus(folder)


def image_readers(corpus: Path) -> dict[str, Reader]:
    from unlabel.decode import BrokenImage, decode
    from unlabel.sources import _short_side

    def read(folder: Path) -> None:
        data = (folder / "image").read_bytes()
        _short_side(data)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            decode(data)

    groups: dict[str, list[dict[str, bytes]]] = {}
    for case in json.loads((corpus / "expected.json").read_text()):
        group, _, rest = case["name"].partition("/")
        if case["source"] == "images" and case["size"] and not case["reason"] and rest and max(case["size"]) < 100:
            if group in ("names", "places", "shapes", "bombs"):
                continue
            groups.setdefault(group, []).append({"image": (corpus / "images" / case["name"]).read_bytes()})
    heads = [sample["image"] for samples in groups.values() for sample in samples]
    return {
        f"image: {group}": Reader(read, samples, ("image",), 0.55 / len(groups), refusals=(BrokenImage,), heads=heads)
        for group, samples in sorted(groups.items())
    }


def archive_readers(corpus: Path) -> dict[str, Reader]:
    import tarfile

    from unlabel.sources import open_source

    def read(name: str) -> Callable[[Path], None]:
        def inner(folder: Path) -> None:
            for _, load in open_source(str(folder / name)).read():
                with contextlib.suppress(OSError):
                    load()

        return inner

    plain = [(corpus / "archives" / name).read_bytes() for name in ("odd.tar", "whole.tar")]
    for kind in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w", format=kind) as tar:
            for k in range(3):
                info = tarfile.TarInfo(f"{'long' * (40 if kind != tarfile.USTAR_FORMAT else 5)}/{k}.png")
                info.size = 700
                info.pax_headers = {"comment": "x" * 30, "mtime": "1.5"} if kind == tarfile.PAX_FORMAT else {}
                tar.addfile(info, io.BytesIO(bytes(range(70)) * 10))
        plain.append(buffer.getvalue())
    packed = [gzip.compress(data, 1, mtime=0) for data in plain]
    return {
        "tar": Reader(read("x.tar"), [{"x.tar": data} for data in plain], ("x.tar",), 0.1, heads=plain),
        "tar.gz": Reader(
            read("x.tar.gz"), [{"x.tar.gz": data} for data in packed], ("x.tar.gz",), 0.06, heads=packed,
            signed=lambda data: gzip.compress(data, 1, mtime=0), unsigned=gzip.decompress,
        ),
    }  # fmt: skip


def text_readers(corpus: Path) -> dict[str, Reader]:
    """What is read without torch: labels, reports, run folders."""
    from unlabel.report import accuracy_svg, format_table, write_report
    from unlabel.runfolder import RunFolder
    from unlabel.sources import read_labels

    names = ["a quoted, name", "cat/a.png", "dog/b.png", "cat/Grüße 猫.png", *(f"{k}.png" for k in range(20))]
    rows = "".join(f"{name},{'ab'[k % 2]}\n" for k, name in enumerate(names[1:]))
    tables = [rows, "name,label\n" + rows, "label;filename\r\n" + "".join(f"{k % 3};{k}.png\r\n" for k in range(20)),
              '"a quoted, name",x\n' + rows, rows.replace(",", "\t")]  # fmt: skip

    results, config, metrics = sample_results(), sample_config(), sample_metrics()

    def report(folder: Path) -> None:
        write_report(folder)
        found = json.loads((folder / "results.json").read_bytes())
        format_table(found)  # what write_report accepts, these must
        accuracy_svg(found)

    def run_config(folder: Path) -> None:
        run = RunFolder(folder)
        about = run.read()
        if about is not None:
            run.same_or_refuse(json.loads(config)["settings"], "abc")

    def run_finished(folder: Path) -> None:
        run = RunFolder(folder)
        if run.read() is not None:
            run.finished()

    def cut_metrics(folder: Path) -> None:
        RunFolder(folder).cut_metrics(150)

    whole = {"results.json": results, "runs/a-seed0/config.json": config, "runs/a-seed0/metrics.jsonl": metrics}
    own = {"config.json": config, "backbone.safetensors": b"x", "backbone.json": b"{}"}
    return {
        "labels CSV": Reader(
            lambda folder: read_labels(folder / "labels.csv", names), [{"labels.csv": t.encode()} for t in tables],
            ("labels.csv",), 0.05, heads=[b"\xef\xbb\xbf", b"\xff\xfe", b'"', b"name,label\n"],
        ),
        "results.json in the report": Reader(report, [whole], ("results.json",), 0.06, heads=[results]),
        "metrics.jsonl in the report": Reader(report, [whole], ("runs/a-seed0/metrics.jsonl",), 0.03, heads=[metrics]),
        "config.json in the report": Reader(report, [whole], ("runs/a-seed0/config.json",), 0.02, heads=[config]),
        "config.json of a run": Reader(run_config, [own], ("config.json",), 0.02, heads=[config]),
        "config.json of a finished run": Reader(run_finished, [own], ("config.json",), 0.02, heads=[config]),
        "metrics.jsonl of a run": Reader(
            cut_metrics, [{"metrics.jsonl": metrics}], ("metrics.jsonl",), 0.02, heads=[metrics]
        ),
    }  # fmt: skip


def weight_readers(corpus: Path) -> dict[str, Reader]:
    """What is read with torch: backbones, classifiers, checkpoints."""
    import torch

    from downstream.classifier import load_classifier, save_classifier
    from downstream.finetune import Classifier
    from unlabel import checkpoint
    from unlabel.backbone import build_backbone, load_backbone, save_backbone

    torch.set_num_threads(1)
    samples: dict[str, list[dict[str, bytes]]] = {"backbone": [], "classifier": [], "checkpoint": []}
    for name in ("small", "mlp:20-10"):
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place)
            backbone = build_backbone(name, 32)
            save_backbone(backbone, folder)
            torch.manual_seed(0)
            save_classifier(Classifier(backbone, 2), ["cat", "dog"], folder, "key")
            tuned = torch.optim.AdamW([torch.ones(30, requires_grad=True)])
            state = {"model": {"w": torch.ones(30)}, "optimizers": [tuned.state_dict()], "step": 3, "seconds": 1.5}
            state |= {"phase": 0, "sums": {"loss": torch.ones(())}, "summed": 2}
            checkpoint.save(folder / "checkpoints", 3, state)
            files = {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
        for kind, found in samples.items():
            found.append({k: v for k, v in files.items() if k.startswith(kind)})

    path = "checkpoints/step-000000003.pt"
    whole = zipfile.ZipFile(io.BytesIO(samples["checkpoint"][0][path][len(checkpoint._MAGIC) + 32 :]))
    pickled = next(name for name in whole.namelist() if name.endswith("data.pkl"))

    def signed(pickle: bytes) -> bytes:
        """A checkpoint around a mutated pickle, with every checksum right."""
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w") as packed:
            for name in whole.namelist():
                packed.writestr(name, pickle if name == pickled else whole.read(name))
        payload = buffer.getvalue()
        return checkpoint._MAGIC + hashlib.sha256(payload).digest() + payload

    def load_checkpoint(folder: Path) -> None:
        with contextlib.redirect_stderr(io.StringIO()):
            state = checkpoint.load_newest(folder / "checkpoints")
        if not isinstance(state, dict):
            raise TypeError(f"a checkpoint that is {type(state).__name__}")

    def reader(kind: str, read: Callable[[Path], object], *targets: str, share: float, **more: Any) -> Reader:
        return Reader(read, samples[kind], targets, share, heads=[s[targets[0]] for s in samples[kind]], **more)

    return {
        "backbone.json": reader("backbone", load_backbone, "backbone.json", share=0.02),
        "backbone.safetensors": reader("backbone", load_backbone, "backbone.safetensors", share=0.01),
        "classifier.json": reader("classifier", load_classifier, "classifier.json", share=0.02),
        "classifier.safetensors": reader("classifier", load_classifier, "classifier.safetensors", share=0.01),
        "checkpoint": reader("checkpoint", load_checkpoint, path, share=0.03, signed=signed,
                             unsigned=lambda data: whole.read(pickled)),
    }  # fmt: skip


GROUPS = (image_readers, archive_readers, text_readers, weight_readers)


def sample_results() -> bytes:
    key = {"protocol": "linear", "labels_per_class": 10}
    counts = {"n_draws": 3, "n_seeds": 1, "unit": "draw"}
    summary = [{**key, "arm": arm, "labels_per_class": n, "mean": 0.7, "ci_low": 0.6, "ci_high": 0.8, **counts}
               for arm in ("a", "random") for n in (10, 50, "all")]  # fmt: skip
    rows = [{**key, "arm": "a", "draw": d, "seed": 0, "accuracy": 0.7, "steps": 9, "seconds": 1.5,
             "on_grid_edge": d == 0, "chosen": {"C": 0.1, "stages": ["s8"], "crop": {"low": 0.5}}}
            for d in range(3)]  # fmt: skip
    paired = [{**key, "arm": "a", "versus": "random", "difference": 0.1, "ci_low": 0.05, "ci_high": 0.2,
               "verdict": "helps", "primary": True}]  # fmt: skip
    stages = [{**key, "arm": "a", "stage": s, "mean": 0.6, "ci_low": 0.5, "ci_high": 0.7} for s in ("s4", "s8")]
    run = {"path": "runs/a-seed0", "images_seen": 9, "minutes": 1.0, "images_per_second": 9.5, "seed": 0,
           "backbone": "small", "image_size": 64, "tasks": ["a"], "shown_as": ["grey"]}  # fmt: skip
    train = {"spec": ["x", "y"], "images": 9, "skipped": 0, "clusters": 3, "classes": ["cat", "dog"]}
    provenance = {"runs": {"a": [run]}, "data": {"train": train, "test": train}, "versions": {"torch": "2"},
                  "hardware": {"cpu": "x", "threads": 2, "gpu": None, "memory_gb": 15.6}, "settings": {"draws": 3},
                  "created": "2025-05-04T12:00:00+00:00", "warnings": ["few"],
                  "overlap": {"test_in_pretraining": 2}}  # fmt: skip
    pictures = {"arm": "a", "map": {"images": 9, "classes": ["cat"]}, "hits": [{"said": "cat", "p": 0.9}], "misses": []}
    value = {
        "schema": 1,
        "summary": summary,
        "rows": rows,
        "paired": paired,
        "stages": stages,
        "provenance": provenance,
    }
    return json.dumps(value | {"pictures": pictures}).encode()


def sample_config() -> bytes:
    settings = {"tasks": ["rotation"], "weights": None, "backbone": "small", "crop": [0.3, 1.0], "seed": 0}
    value = {"settings": settings, "free": {"data": ["x"]}, "processes": 1, "resolved": {"steps": 9, "lr": 1e-3},
             "fingerprint": "abc", "data": {"spec": ["x"], "images": 9}, "versions": {}, "hardware": {"threads": 2},
             "commit": None,
             "finished": {"steps": 9, "images_seen": 9, "seconds": 1.0,
                          "backbone_sha256": hashlib.sha256(b"x").hexdigest()}}  # fmt: skip
    return json.dumps(value, indent=2).encode()


def sample_metrics() -> bytes:
    lines = [{"step": k, "epoch": k / 10, "loss": 1 / (k + 1), "lr": 1e-3, "images_per_second": 100.5,
              "metrics": {"rotation/accuracy": 0.5}, "trivial": {"rotation/accuracy": 0.25}}
             for k in range(10, 300, 10)]  # fmt: skip
    return "".join(json.dumps(line) + "\n" for line in lines).encode()


# ---------------------------------------------------------------- the process that reads


def rss(anew: bool = False) -> int:
    """The most memory that this process has had at once, in bytes; on Linux since it was last measured `anew`."""
    with contextlib.suppress(OSError, StopIteration):
        if anew:
            Path("/proc/self/clear_refs").write_text("5")
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line.split()[1] for line in lines if line.startswith("VmHWM"))) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def work(name: str, first: int, last: int, seed: int, corpus: Path, out: Path) -> None:
    """Read files `first` … `last` - 1; a line of JSON before and one after each."""
    faulthandler.enable()
    from unlabel.errors import UserError

    reader = next(found[name] for group in GROUPS if name in (found := group(corpus)))
    allowed = (UserError, *reader.refusals)
    for sample in reader.samples:  # what is refused unchanged would test nothing
        with tempfile.TemporaryDirectory(dir=corpus) as place:
            reader.write(Path(place), sample)
            reader.read(Path(place))
    with contextlib.suppress(ValueError, OSError):  # a reader that asks for far more gets a MemoryError
        held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (held + 2 * MEMORY, resource.RLIM_INFINITY))
    for i in range(first, last):
        folder = Path(tempfile.mkdtemp(dir=corpus))
        what = reader.make(folder, random.Random(f"{seed}/{name}/{i}"))
        say(i=i, mutation=what, folder=str(folder))
        started = rss(anew=True)
        begun, error, outcome = time.monotonic(), "", "read"
        try:
            reader.read(folder)
        except allowed as refusal:
            outcome = "refused"
            if isinstance(refusal, UserError) and "\n" in str(refusal):
                outcome, error = "failed", f"a message of several lines: {refusal}"
        except BaseException as problem:
            import traceback

            outcome, error = "failed", "".join(traceback.format_exception(problem))[-3000:]
        taken, seconds = rss() - started, time.monotonic() - begun
        if taken > MEMORY:
            outcome, error = "failed", error or f"took {taken / 1e9:.1f} GB"
        if outcome == "failed":
            shutil.copytree(folder, out / f"{name.replace(': ', '-').replace(' ', '-')}-{seed}-{i}", dirs_exist_ok=True)
        shutil.rmtree(folder, ignore_errors=True)
        say(i=i, outcome=outcome, error=error, seconds=seconds, memory=max(0, taken))


def say(**line: Any) -> None:
    print(json.dumps(line), flush=True)


# ---------------------------------------------------------------- the process that watches


def watch(name: str, first: int, last: int, seed: int, corpus: Path, out: Path, until: float) -> list[dict[str, Any]]:
    """Results of files `first` … `last` - 1, however often the reading process dies."""
    done: list[dict[str, Any]] = []
    while first < last and time.monotonic() < until:
        place = [str(corpus), str(out)]
        command = [sys.executable, __file__, "--work", name, *map(str, (first, min(last, first + CHUNK), seed)), *place]
        env = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "ssl")]), "OMP_NUM_THREADS": "1"}
        env |= {"UNLABEL_CACHE": str(corpus / "cache")}
        with tempfile.TemporaryFile("w+", errors="replace") as errors:
            process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, env=env)
            first = _follow(process, first, done, until)
            process.kill()
            code = process.wait()
            current = done[-1] if done and done[-1].get("outcome") is None else None
            if current is not None:
                errors.seek(0)
                tail = errors.read()[-2000:]
                hung = current.pop("hung", False)
                error = f"longer than {SECONDS:g} s" if hung else f"the process died ({code}): {tail}"
                current |= {"outcome": "failed", "error": error, "seconds": SECONDS if hung else 0.0, "memory": 0}
                target = out / f"{name.replace(': ', '-').replace(' ', '-')}-{seed}-{current['i']}"
                with contextlib.suppress(OSError):
                    shutil.copytree(current["folder"], target, dirs_exist_ok=True)
                first = current["i"] + 1
            elif code not in (0, -9) and time.monotonic() < until:
                errors.seek(0)
                sys.exit(f"{name}: the reading process cannot start: {errors.read()[-3000:]}")
    return done


def _follow(process: subprocess.Popen[bytes], first: int, done: list[dict[str, Any]], until: float) -> int:
    """Collect lines until the process ends, hangs, or time is over; the number of the next file."""
    stream, waiting, patience = process.stdout, b"", 120.0  # the start: imports, samples
    assert stream is not None
    while time.monotonic() < until or (done and done[-1].get("outcome") is None):
        ready, _, _ = select.select([stream], [], [], patience)
        if not ready:
            if done and done[-1].get("outcome") is None:
                done[-1]["hung"] = True
            return first
        part = os.read(stream.fileno(), 1 << 16)
        if not part:
            return first
        *lines, waiting = (waiting + part).split(b"\n")
        for line in map(json.loads, lines):
            patience = SECONDS
            if "mutation" in line:
                done.append(line)
            else:
                done[-1] |= line
                first = line["i"] + 1
    return first


def main() -> int:
    if sys.argv[1:2] == ["--work"]:
        name, first, last, seed, corpus, out = sys.argv[2:]
        work(name, int(first), int(last), int(seed), Path(corpus), Path(out))
        return 0
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--files", type=int, default=10_000, help="over all readers")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop after that, with what has been read")
    parser.add_argument("--only", default="", help="readers whose name begins so")
    parser.add_argument("--first", type=int, default=0, help="the number of the first file of each reader")
    parser.add_argument("--out", type=Path, default=Path("runs/fuzz"), help="where files that failed a reader are kept")
    parser.add_argument("--results", type=Path, default=Path("results/fuzz.json"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    from PIL import __version__ as pillow
    from torch import __version__ as torch

    print(f"Pillow {pillow}, torch {torch}, Python {sys.version.split()[0]}, seed {args.seed}")
    begun, rows, failures = time.monotonic(), [], []
    with tempfile.TemporaryDirectory() as place:
        corpus = Path(place) / "corpus"
        make_corpus(corpus)
        readers = {name: reader.share for group in GROUPS for name, reader in group(corpus).items()}
        readers = {name: share for name, share in readers.items() if name.startswith(args.only)}
        if not readers:
            sys.exit(f"no reader begins with {args.only!r}")
        total = sum(readers.values())
        for k, (name, share) in enumerate(readers.items()):
            count = max(1, -int(-args.files * share // total))
            left = (begun + args.seconds - time.monotonic()) / (len(readers) - k)  # a fair part for each reader
            last = args.first + count
            done = watch(name, args.first, last, args.seed, corpus, args.out.resolve(), time.monotonic() + left)
            done = [one for one in done if one.get("outcome")]
            kinds = [one["outcome"] for one in done]
            row = {"reader": name, "files": len(done)}
            row |= {kind: kinds.count(kind) for kind in ("read", "refused", "failed")}
            row["slowest_s"] = round(max((one["seconds"] for one in done), default=0.0), 2)
            row["peak_mb"] = round(max((one["memory"] for one in done), default=0) / 1e6)
            rows.append(row)
            failures += [{"reader": name, "seed": args.seed, **{k: one[k] for k in ("i", "mutation", "error")}}
                         for one in done if one["outcome"] == "failed"]  # fmt: skip
            print(line_of(row), flush=True)
    table = {key: sum(row[key] for row in rows) for key in ("files", "read", "refused", "failed")}
    table |= {key: max(row[key] for row in rows) for key in ("slowest_s", "peak_mb")}
    minutes = round((time.monotonic() - begun) / 60, 1)
    print(line_of({"reader": "all", **table}))
    print(f"{minutes} minutes; bounds: {SECONDS:g} s and {MEMORY / 1e9:.1f} GB a file")
    for failure in failures:
        command = f'--seed {args.seed} --only "{failure["reader"]}" --first {failure["i"]} --files 1'
        print(f"FAILED {command}  # {failure['mutation'][:200]}\n{failure['error']}")
    about = {"seed": args.seed, "pillow": pillow, "torch": str(torch), "python": sys.version.split()[0]}
    about |= {"minutes": minutes, "bounds": {"seconds": SECONDS, "bytes": MEMORY}, "all": table}
    args.results.parent.mkdir(parents=True, exist_ok=True)
    short = [failure | {"error": failure["error"].strip().splitlines()[-1]} for failure in failures]
    args.results.write_text(json.dumps(about | {"readers": rows, "failures": short}, indent=1) + "\n")
    return 1 if failures else 0


def line_of(row: dict[str, Any]) -> str:
    if not getattr(line_of, "headed", False):
        line_of.headed = True
        print(f"{'reader':<32}{'files':>8}{'read':>8}{'refused':>9}{'failed':>8}{'slowest s':>11}{'peak MB':>9}")
    return (
        f"{row['reader']:<32}{row['files']:>8,}{row['read']:>8,}{row['refused']:>9,}{row['failed']:>8,}"
        f"{row['slowest_s']:>11.2f}{row['peak_mb']:>9,}"
    )


if __name__ == "__main__":
    sys.exit(main())
