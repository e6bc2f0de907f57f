"""The command line. Everything heavy is imported inside the command that needs it, after the arguments are known."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import os
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any

import tyro

from pretext import TASKS, load_task
from unlabel import config as C
from unlabel.errors import UserError

__all__ = ["main"]


def pretrain(config: C.PretrainConfig) -> None:
    from unlabel import distributed
    from unlabel.pretrain import pretrain

    try:
        pretrain(config)
    finally:
        distributed.stop()


def evaluate(config: C.EvaluateConfig) -> None:
    from unlabel.compare import evaluate

    evaluate(config)


def compare(config: C.CompareConfig) -> None:
    from unlabel.compare import compare

    compare(config)


def report(config: C.ReportConfig) -> None:
    from unlabel.report import write_report

    print(f"open {write_report(config.folder)}")


def embed(config: C.EmbedConfig) -> None:
    from unlabel.apply import write_embedding

    write_embedding(config)


def export(config: C.ExportConfig) -> None:
    from unlabel.apply import export

    export(config.run, config.to)


def predict(config: C.PredictConfig) -> None:
    from downstream.classifier import predict

    predict(config)


def restore(config: C.RestoreConfig) -> None:
    from downstream.restore import restore
    from pretext.trained import load_trained

    restore(config, load_trained)


def compress(config: C.CompressConfig) -> None:
    from downstream.compress import compress
    from pretext.trained import load_trained

    compress(config, load_trained)


def anomalies(config: C.AnomaliesConfig) -> None:
    from downstream.anomalies import anomalies
    from pretext.trained import load_trained

    anomalies(config, load_trained)


def draw_map(config: C.MapConfig) -> None:
    from downstream.feature_map import draw_map
    from pretext.trained import load_trained

    draw_map(config, load_trained)


def sample(config: C.SampleConfig) -> None:
    from downstream.sample import sample
    from pretext.trained import load_trained

    sample(config, load_trained)


def check(config: C.CheckConfig) -> int:
    from unlabel.check import run_check

    return run_check(config.source, config.against, config.labels)


def listing(config: C.ListConfig) -> None:
    from unlabel.named import DATASETS

    tables = {
        "tasks": {name: line for name, (_, line) in TASKS.items()},
        "datasets": dict(DATASETS),
        "backbones": dict(C.SUGGESTED_BACKBONES),
    }
    if config.json:
        print(json.dumps(tables, indent=2))
        return
    for title, rows in tables.items():
        print(title)
        for name, line in rows.items():
            print(f"  {name:<22} {line}")


# name -> (settings, what to do)
COMMANDS: dict[str, tuple[type[Any], Callable[[Any], int | None]]] = {
    "pretrain": (C.PretrainConfig, pretrain),
    "evaluate": (C.EvaluateConfig, evaluate),
    "compare": (C.CompareConfig, compare),
    "report": (C.ReportConfig, report),
    "embed": (C.EmbedConfig, embed),
    "export": (C.ExportConfig, export),
    "predict": (C.PredictConfig, predict),
    "restore": (C.RestoreConfig, restore),
    "compress": (C.CompressConfig, compress),
    "anomalies": (C.AnomaliesConfig, anomalies),
    "map": (C.MapConfig, draw_map),
    "sample": (C.SampleConfig, sample),
    "check": (C.CheckConfig, check),
    "list": (C.ListConfig, listing),
}


def _usage() -> str:
    rows = "\n".join(f"  {name:<10} {(cls.__doc__ or '').splitlines()[0]}" for name, (cls, _) in COMMANDS.items())
    return (
        "unlabel: pretrain a ConvNet on images without labels, and measure honestly what that bought\n\n"
        f"usage: unlabel COMMAND …\n\n{rows}\n\n`unlabel COMMAND --help` shows a command's settings."
    )


def split_task_flags(args: Sequence[str]) -> tuple[list[str], dict[str, list[str]]]:
    """Take ``--TASK.setting V …`` out of the arguments: (the rest, task to its own flags)."""
    rest: list[str] = []
    own: dict[str, list[str]] = {}
    bucket = rest
    for arg in args:
        match = re.match(r"--([a-z0-9-]+)\.(.+)", arg)
        if match:
            bucket = own.setdefault(match[1], [])
            bucket.append(f"--{match[2]}")
            continue
        if arg.startswith("--"):
            bucket = rest
        bucket.append(arg)
    return rest, own


def _parse(cls: type[Any], args: Sequence[str], prog: str, **more: Any) -> Any:
    """What tyro makes of ``args``; of its errors, which fill a box of many lines, the first words as a UserError."""
    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed):
            return tyro.cli(cls, args=args, prog=prog, **more)
    except SystemExit as stop:
        if not stop.code:  # --help
            raise
    text = re.sub(r"\x1b\[[0-9;]*m", "", printed.getvalue())
    # A title, then parts between lines; drawn with other characters where the terminal may not have these.
    inside = re.sub("[│╭╮╰╯]", " ", "\n".join(line for line in text.splitlines() if not line.startswith(("╭", "╰"))))
    parts = [" ".join(part.split()) for part in re.split("─{3,}|-{5,}", inside) if part.strip()]
    parts = parts[1:] if "╭" not in text else parts
    what = parts[0].split("Got errors:")[0].strip().rstrip(".")
    meant = next((p for p in parts[1:] if p.startswith("Perhaps you meant:")), "")
    meant = f"; perhaps you meant {m[0]}" if (m := re.search(r"--[a-z0-9-]+", meant)) else ""
    raise UserError(f"{what}{meant}; see {prog} --help")


def parse_task_flags(own: dict[str, list[str]], tasks: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Task to those settings that differ from the task's defaults. Imports the tasks that have flags, no others."""
    for name in own:
        if name not in TASKS:
            raise UserError(f"--{name}.…: unknown pretext task {name!r}: choose from {', '.join(TASKS)}")
        if name not in tasks:
            raise UserError(f"--{name}.… is set, but {name} is not among the tasks of this command")
    settings = {}
    for name, flags in own.items():
        cls = load_task(name).Config
        chosen = _parse(cls, flags, f"unlabel pretrain {name}", description=f"settings of {name}")
        default = cls()
        fields = [f.name for f in dataclasses.fields(cls)]
        settings[name] = {k: getattr(chosen, k) for k in fields if getattr(chosen, k) != getattr(default, k)}
    return settings


def tasks_of(config: Any) -> list[str]:
    """All task names that a command names, each checked before anything heavy is imported."""
    names = [part for arm in getattr(config, "tasks", ()) for part in arm.split("+")]
    if hasattr(config, "tasks") and not names:
        raise UserError(f"name at least one pretext task: {', '.join(TASKS)}")
    for name in names:
        if name not in TASKS:
            raise UserError(f"unknown pretext task {name!r}: choose from {', '.join(TASKS)} (see `unlabel list`)")
    return names


def run(argv: Sequence[str]) -> int:
    if not argv or argv[0] in ("-h", "--help"):
        print(_usage())
        return 0
    if argv[0] == "--version":
        from unlabel import __version__

        print(__version__)
        return 0
    if argv[0] not in COMMANDS:
        raise UserError(f"unknown command {argv[0]!r}: choose from {', '.join(COMMANDS)} (see `unlabel --help`)")
    cls, function = COMMANDS[argv[0]]
    rest, own = split_task_flags(argv[1:])
    named = [a for a in rest if a in TASKS]
    if named and any(a in ("-h", "--help") for a in rest):
        _help(cls, argv[0], rest, named)
        return 0
    config = _parse(cls, rest, f"unlabel {argv[0]}")
    tasks = tasks_of(config)
    if own:
        if not tasks:
            raise UserError(f"unlabel {argv[0]} has no settings of tasks: --{next(iter(own))}.… does not belong here")
        config = dataclasses.replace(config, task_settings=parse_task_flags(own, tasks))
    return function(config) or 0


def _help(cls: type[Any], command: str, rest: Sequence[str], tasks: Sequence[str]) -> None:
    """The command's settings, then those of each task that was named."""
    for prog, kind in [
        (f"unlabel {command}", cls),
        *((f"unlabel {command} {t} --{t}.", load_task(t).Config) for t in tasks),
    ]:
        try:
            tyro.cli(kind, args=["--help"], prog=prog)
        except SystemExit:
            continue


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code: 2 for what a person can put right, 128 + n after signal n."""
    sys.stdout, sys.stderr = said = (Output(sys.stdout), Output(sys.stderr))
    try:
        return _main(list(sys.argv[1:] if argv is None else argv))
    finally:
        sys.stdout, sys.stderr = (output.stream for output in said)  # type: ignore[assignment]


class Output:
    """Standard output or error, for which no work is lost: where nobody reads it, what is said goes nowhere."""

    def __init__(self, stream: Any) -> None:
        self.stream = stream or open(os.devnull, "w")  # None: closed by whoever started this  # noqa: SIM115

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        try:
            self.stream.write(text)
        except UnicodeEncodeError as error:
            self.stream.write(text.encode(error.encoding, "replace").decode(error.encoding))
        except OSError:
            self._to_nowhere()
        return len(text)

    def flush(self) -> None:
        try:
            self.stream.flush()
        except OSError:
            self._to_nowhere()

    def _to_nowhere(self) -> None:
        """A closed pipe, a full disk: also what Python still holds for it, when it ends."""
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())


def _main(argv: list[str]) -> int:
    try:
        if "" in argv:
            raise UserError("an argument is empty: is a variable not set?")
        return run(argv)
    except UserError as error:
        print(f"unlabel: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("unlabel: interrupted", file=sys.stderr)
        return 130
    except OSError as error:  # a full disk, a folder that may not be written, a file that is a folder
        print(f"unlabel: {error.filename or ''}: {error.strerror or error}", file=sys.stderr)
        return 2
    except Exception as error:
        if isinstance(error, MemoryError) or re.search("can't allocate memory|out of memory", str(error)):
            print("unlabel: not enough memory: smaller images, batches or networks need less", file=sys.stderr)
            return 2
        # They live beside torch's loop: recognised by name, so that errors here stay quick.
        code = getattr(error, "code", None)
        if type(error).__name__ not in ("Stopped", "RankLost") or not isinstance(code, int):
            raise
        print(f"unlabel: {error}", file=sys.stderr)
        return code
