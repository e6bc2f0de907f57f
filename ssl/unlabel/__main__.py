"""``python -m unlabel`` is the command line, and what torchrun starts."""

import os
import signal
import sys
import types


def _leave(_signum: int, _frame: types.FrameType | None) -> None:
    os.write(2, b"unlabel: interrupted\n")
    os._exit(128 + signal.SIGINT)


if __name__ == "__main__":
    default = signal.signal(signal.SIGINT, _leave)  # libraries that are being imported swallow what they do not know
    from unlabel.cli import main

    signal.signal(signal.SIGINT, default)
    sys.exit(main())
