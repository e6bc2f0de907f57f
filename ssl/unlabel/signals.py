"""A stop that loses nothing: the step is finished, the state is saved, the scheduler is told."""

from __future__ import annotations

import contextlib
import signal
import types
from collections.abc import Iterator

__all__ = ["Stopped", "catch_signals"]


class Stopped(Exception):
    """A signal asked for a stop; the state is saved."""

    def __init__(self, signum: int, step: int) -> None:
        super().__init__(f"stopped by {signal.Signals(signum).name} at step {step}; the same command continues")
        self.code = 128 + signum


@contextlib.contextmanager
def catch_signals() -> Iterator[list[int]]:
    """Collects SIGTERM, SIGINT, SIGUSR1: the step is finished and saved. A second Ctrl-C leaves at once."""
    caught: list[int] = []
    names = [n for n in ("SIGTERM", "SIGINT", "SIGUSR1") if hasattr(signal, n)]

    def note(signum: int, _frame: types.FrameType | None) -> None:
        if caught and signum == signal.SIGINT:
            raise KeyboardInterrupt
        caught.append(signum)

    try:
        old = {n: signal.signal(getattr(signal, n), note) for n in names}
    except ValueError:  # not in the main thread: leave the signals alone
        old = {}
    try:
        yield caught
    finally:
        for name, handler in old.items():
            signal.signal(getattr(signal, name), handler)
