"""Learn from images without labels, and measure honestly what that bought.

    import unlabel
    backbone = unlabel.load_backbone("runs/rotation")
    features = backbone(images).pooled          # images (N, 3, H, W) in [0, 1]

The public names are imported when they are first used, so that ``import unlabel`` is quick.
"""

from __future__ import annotations

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

# Read by torch at its first large allocation: huge pages for tensors, measured at +10 to +20 % on CPUs.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

if TYPE_CHECKING:
    from pretext import TASKS
    from unlabel.apply import embed
    from unlabel.backbone import load_backbone
    from unlabel.pretrain import pretrain

__all__ = ["TASKS", "__version__", "embed", "load_backbone", "pretrain"]
__version__ = "0.1.0"

_WHERE = {
    "pretrain": "unlabel.pretrain",
    "load_backbone": "unlabel.backbone",
    "embed": "unlabel.apply",
    "TASKS": "pretext",
}


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'unlabel' has no attribute {name!r}")
    value = getattr(import_module(_WHERE[name]), name)
    globals()[name] = value
    return value
