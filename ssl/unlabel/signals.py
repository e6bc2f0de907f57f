"""A stop that loses nothing: the step is finished, the state is saved, the scheduler is told."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
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
        with _second_interrupt_leaves() if old and os.name != "nt" else contextlib.nullcontext():
            yield caught
    finally:
        for name, handler in old.items():
            signal.signal(getattr(signal, name), handler)


@contextlib.contextmanager
def _second_interrupt_leaves() -> Iterator[None]:
    """Python calls its handlers between two of its own instructions only: a second Ctrl-C inside a long call of torch
    would wait for it, and be one with the first. The numbers of all signals are also written to a pipe, at once."""
    ours, theirs = os.pipe()
    os.set_blocking(theirs, False)
    before = signal.set_wakeup_fd(theirs, warn_on_full_buffer=False)

    def watch() -> None:
        interrupts = 0
        while 0 not in (numbers := os.read(ours, 64)):
            interrupts += numbers.count(signal.SIGINT)
            if interrupts > 1:
                os.write(2, b"\nunlabel: interrupted\n")
                os._exit(128 + signal.SIGINT)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        os.set_blocking(theirs, True)
        os.write(theirs, bytes(1))  # no signal's number; closing it is not enough where a process was forked meanwhile
        thread.join()
        os.close(theirs)
        os.close(ours)
