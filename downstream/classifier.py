"""A fine-tuned classifier on disk (classifier.safetensors + classifier.json), and `unlabel predict`."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save
from tqdm import tqdm

from downstream.finetune import Classifier, predict_logits
from unlabel.apply import safe_cell
from unlabel.backbone import build_described, read_weights, spec_from_json, spec_to_json
from unlabel.cache import load_cache, printable
from unlabel.checkpoint import write_atomic
from unlabel.config import PredictConfig
from unlabel.distributed import pick_device
from unlabel.errors import UserError
from unlabel.sources import open_source

__all__ = ["load_classifier", "name_classes", "predict", "save_classifier", "stored_key"]


def save_classifier(model: Classifier, classes: list[str], folder: Path, key: str) -> None:
    """``key`` says which fit of the table it is, so that a later table does not take it for its own."""
    state = {f"backbone.{k}": v for k, v in model.backbone.model.state_dict().items()}
    state |= {f"head.{k}": v for k, v in model.head.state_dict().items()}
    about = {"schema": 1, "classes": classes, "backbone": spec_to_json(model.backbone.spec), "cell": key}
    text = (json.dumps(about, indent=2) + "\n").encode("utf-8", "surrogatepass")
    (folder / "classifier.json").unlink(missing_ok=True)  # never one fit's weights under another's description
    write_atomic(folder / "classifier.safetensors", save({k: v.detach().cpu().contiguous() for k, v in state.items()}))
    write_atomic(folder / "classifier.json", text)


def stored_key(folder: Path) -> str | None:
    """The key of the classifier that is there."""
    if not (folder / "classifier.safetensors").exists():
        return None
    try:
        return json.loads((folder / "classifier.json").read_bytes().decode("utf-8", "surrogatepass")).get("cell")
    except (OSError, ValueError, AttributeError, RecursionError):
        return None


def name_classes(folder: Path, classes: list[str]) -> None:
    """Call the classes of the classifier that is there so: those of the same images may have been renamed."""
    path = folder / "classifier.json"
    about = json.loads(path.read_bytes().decode("utf-8", "surrogatepass"))
    if about["classes"] != classes:
        text = json.dumps({**about, "classes": classes}, indent=2) + "\n"
        write_atomic(path, text.encode("utf-8", "surrogatepass"))


def load_classifier(folder: Path) -> tuple[Classifier, list[str]]:
    """The network (eval mode) and the class names. UserError where a file is missing, broken or does not fit."""
    path, weights = folder / "classifier.json", folder / "classifier.safetensors"
    try:
        about = json.loads(path.read_bytes().decode("utf-8", "surrogatepass"))
        classes = [str(c) for c in about["classes"]]
        backbone = build_described(spec_from_json(about["backbone"]), weights)
    except FileNotFoundError:
        message = f"no classifier in {folder}: `unlabel evaluate` or `compare` with --protocol finetune writes one"
        raise UserError(message) from None
    except (ValueError, LookupError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise UserError(f"{path} cannot be read ({error})") from None
    model = Classifier(backbone, len(classes))
    want = {f"backbone.{k}": v for k, v in backbone.model.state_dict().items()}
    want |= {f"head.{k}": v for k, v in model.head.state_dict().items()}
    state = read_weights(weights, want)
    backbone.model.load_state_dict({k[9:]: v for k, v in state.items() if k.startswith("backbone.")})
    model.head.load_state_dict({k[5:]: v for k, v in state.items() if k.startswith("head.")})
    return model.eval(), classes


def predict(config: PredictConfig) -> Path:
    """Classify new images: CSV with name, class and one probability per class."""
    model, classes = load_classifier(config.model)
    device = pick_device(config.device)
    size = model.backbone.spec.image_size
    cache = load_cache(open_source(config.data), size, max_skipped=config.max_skipped)
    model.to(device)
    parts = []
    with tqdm(total=len(cache), unit="img", desc="predict") as bar:
        for at in range(0, len(cache), 1024):
            parts.append(predict_logits(model, np.asarray(cache.images[at : at + 1024])))
            bar.update(len(parts[-1]))
    p = torch.from_numpy(np.concatenate(parts)).softmax(1).numpy()
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["name", "class", *(safe_cell(f"p_{c}") for c in classes)])
    for name, row in zip(cache.names, p, strict=True):
        writer.writerow([safe_cell(name), safe_cell(classes[int(row.argmax())]), *(f"{v:.6f}" for v in row)])
    write_atomic(config.out, text.getvalue().encode("utf-8", "replace"))
    for name, reason in cache.skipped:
        print(f"skipped {printable(name)}: {reason}")
    print(f"{config.out}: {len(cache):,} images, {len(cache.skipped)} skipped")
    return config.out
