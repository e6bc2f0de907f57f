"""``python -m unlabel`` is the command line, and what torchrun starts."""

import sys

from unlabel.cli import main

sys.exit(main())
