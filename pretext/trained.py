"""A trained task, head and all: from a run folder, for what a task can be used for beside pretraining."""

from __future__ import annotations

from pathlib import Path

import torch

from pretext import load_task
from pretext.task import PretextTask
from unlabel import checkpoint
from unlabel.backbone import load_backbone
from unlabel.errors import UserError
from unlabel.runfolder import RunFolder

__all__ = ["load_trained"]


def load_trained(run: Path, name: str | None = None, device: torch.device | str = "cpu") -> PretextTask:
    """The task ``name`` (default: the first) of a finished run with its backbone, in eval mode, as training left them.

    The exported backbone differs in its BatchNorm statistics, which are for clean, upright images alone. Raises
    UserError where the run is not finished or its checkpoints are gone.
    """
    backbone = load_backbone(run)
    about = RunFolder(run).read() or {}
    settings = about.get("settings", {})
    names = settings.get("tasks")
    if not names:
        raise UserError(f"{run / 'config.json'} names no task: is {run} a run's folder?")
    name = name or str(names[0])
    if name not in names:
        raise UserError(f"{run} was not trained with {name}: its tasks are {', '.join(names)}")
    state = checkpoint.load_newest(run / "checkpoints")
    if state is None:
        raise UserError(
            f"{run} has no checkpoint any more, and only those hold what a task has learned beside the backbone"
        )
    cls = load_task(name)
    own = about.get("resolved", {}).get("tasks", settings.get("task_settings", {})).get(name, {})
    try:
        config = cls.Config(**{k: tuple(v) if isinstance(v, list) else v for k, v in own.items()})
    except TypeError as error:
        raise UserError(f"{run / 'config.json'} has a setting that {name} does not know ({error})") from None
    task = cls(backbone, config)
    task.name = name
    for phase in range(int(state["phase"]) + 1):
        task.begin(phase)
    parts = {"backbone": backbone, f"tasks.{name}": task}
    try:
        for prefix, module in parts.items():
            weights = {k.removeprefix(f"{prefix}."): v for k, v in state["model"].items() if k.startswith(f"{prefix}.")}
            module.load_state_dict(weights)
    except RuntimeError as error:
        raise UserError(f"the checkpoint in {run} does not fit ({str(error).splitlines()[-1].strip()})") from None
    backbone.to(device).eval()
    return task.to(device).eval()
