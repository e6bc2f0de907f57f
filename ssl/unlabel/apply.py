"""Use a finished backbone: embed images, export the weights."""

from __future__ import annotations

import csv
import io
import re
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from unlabel.augment import clean
from unlabel.backbone import Backbone, load_backbone, read_spec
from unlabel.cache import load_cache, printable
from unlabel.checkpoint import write_atomic
from unlabel.config import EmbedConfig
from unlabel.distributed import pick_device
from unlabel.errors import UserError
from unlabel.sources import open_source

__all__ = ["embed", "export", "safe_cell", "write_embedding"]


def safe_cell(text: str) -> str:
    """A name as a CSV cell that no spreadsheet takes for a formula: with ' before it, but for plain numbers."""
    text = printable(text)
    first = unicodedata.normalize("NFKC", text).lstrip()[:1]  # spreadsheets also know other widths, and skip spaces
    risky = first in ("=", "+", "-", "@") and not re.fullmatch(r"[+-]\d*\.?\d*", text)
    return "'" + text if risky else text


@torch.inference_mode()
def embed(
    backbone: Backbone, images: np.ndarray | Any, batch_size: int = 256, progress: str | None = None
) -> np.ndarray:
    """Pooled features (N, C) float32 of uint8 images (N, R, R, 3), at the size that the backbone was trained at."""
    device, size, out = next(backbone.parameters()).device, backbone.spec.image_size, []
    backbone.eval()
    with tqdm(total=len(images), desc=progress, unit="img", disable=progress is None) as bar:
        for at in range(0, len(images), batch_size):
            part = torch.from_numpy(np.array(images[at : at + batch_size])).to(device)
            out.append(backbone(clean(part, size)).pooled.float().cpu().numpy())
            bar.update(len(part))
    return np.concatenate(out) if out else np.zeros((0, backbone.channels), np.float32)


def write_embedding(config: EmbedConfig) -> Path:
    """`unlabel embed`: FILE.npz with ``names`` and ``features``, or FILE.csv with one row per image."""
    if config.out.suffix not in (".npz", ".csv"):
        raise UserError(f"--out {config.out}: give a name that ends in .npz or .csv")
    backbone = load_backbone(config.run).to(pick_device(config.device))
    cache = load_cache(open_source(config.data), backbone.spec.image_size, max_skipped=config.max_skipped)
    features = embed(backbone, cache.images, progress="embed")
    names = [printable(n) for n in cache.names]
    if config.out.suffix == ".npz":
        buffer = io.BytesIO()
        np.savez_compressed(buffer, names=np.array(names), features=features)
        write_atomic(config.out, buffer.getvalue())
    else:
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["name", *(f"f{k}" for k in range(features.shape[1]))])
        for name, row in zip(names, features, strict=True):
            writer.writerow([safe_cell(name), *(f"{v:.6g}" for v in row)])
        write_atomic(config.out, text.getvalue().encode("utf-8", "replace"))
    for name, reason in cache.skipped:
        print(f"skipped {printable(name)}: {reason}")
    print(f"{config.out}: {len(names):,} images × {features.shape[1]} features")
    return config.out


class _Pooled(nn.Module):
    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, images: Tensor) -> Tensor:
        return self.backbone(images).pooled


def export(run: Path, to: Path) -> Path:
    """`unlabel export`: timm weights (.safetensors), or a network from images in [0, 1] to pooled features (.onnx)."""
    backbone = load_backbone(run)
    to.parent.mkdir(parents=True, exist_ok=True)
    if to.suffix == ".safetensors":
        if (to.parent / "config.json").exists():
            raise UserError(f"--to {to}: {to.parent} is a run folder; choose another folder")
        if (about := to.with_suffix(".json")).exists():
            read_spec(about)  # an error where it is something else, which must not be overwritten
        write_atomic(to, (run / "backbone.safetensors").read_bytes())
        write_atomic(to.with_suffix(".json"), (run / "backbone.json").read_bytes())
        spec = backbone.spec
        if backbone.changed:
            print(f"{to}: the stem is not timm's, so that plain timm refuses it: unlabel.load_backbone({str(to)!r})")
        else:
            arguments = "".join(f", {k}={v!r}" for k, v in spec.kwargs.items())
            print(f"{to}: for timm.create_model({spec.name!r}{arguments}, num_classes=0)")
        print(f"inputs in [0, 1], then (x - {list(spec.mean)}) / {list(spec.std)}: see {to.with_suffix('.json')}")
        return to
    if to.suffix == ".onnx":
        size = backbone.spec.image_size
        try:
            import onnx  # noqa: F401  # pyright: ignore[reportMissingImports]
            import onnxscript  # noqa: F401  # pyright: ignore[reportMissingImports]
        except ImportError:
            raise UserError("writing .onnx needs two more packages: pip install 'unlabel[onnx]'") from None
        batch = torch.export.Dim("batch")
        program = torch.onnx.export(
            _Pooled(backbone).eval(), (torch.zeros(2, 3, size, size),), dynamo=True,
            input_names=["images"], output_names=["features"], dynamic_shapes={"images": {0: batch}},
        )  # fmt: skip
        assert program is not None
        program.save(str(to))
        print(f"{to}: images (N, 3, {size}, {size}) in [0, 1] to features (N, {backbone.channels})")
        return to
    raise UserError(f"--to {to}: give a name that ends in .safetensors or .onnx")
