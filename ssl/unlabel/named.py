"""Named data sets, the only ones that are ever downloaded. Read by scikit-learn and torchvision."""

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from unlabel.errors import UserError
from unlabel.listing import Entries, Found, Place, portable_pixmap

if TYPE_CHECKING:
    import numpy as np

__all__ = ["DATASETS", "cache_root", "open_named", "own_test_split"]

DATASETS: dict[str, str] = {
    "digits": "1,797 handwritten digits, 8x8 grey, 10 classes; comes with scikit-learn, no download",
    "mnist": "60,000 handwritten digits, 28x28 grey, 10 classes; also mnist:test (10,000)",
    "fashion-mnist": "60,000 pieces of clothing, 28x28 grey, 10 classes; also fashion-mnist:test (10,000)",
    "cifar10": "50,000 small photos, 32x32, 10 classes; also cifar10:test (10,000)",
    "stl10": "5,000 photos, 96x96, 10 classes; also stl10:test (8,000), stl10:unlabeled (100,000)",
    "pets": "3,680 photos of cats and dogs, 37 breeds (Oxford-IIIT); also pets:test (3,669)",
}
SPLITS: dict[str, tuple[str, ...]] = {
    "digits": ("train",),
    "mnist": ("train", "test"),
    "fashion-mnist": ("train", "test"),
    "cifar10": ("train", "test"),
    "stl10": ("train", "test", "unlabeled"),
    "pets": ("train", "test"),
}


def own_test_split(spec: str) -> str | None:
    """The spec of a named set's own test split ("cifar10:test"), None for all other sources."""
    name, _, split = spec.partition(":")
    if os.path.exists(spec) or name not in DATASETS or split not in ("", "train") or "test" not in SPLITS[name]:
        return None
    return f"{name}:test"


def cache_root() -> Path:
    """$UNLABEL_CACHE, else this program's folder in the user's cache folder. Need not exist yet."""
    try:
        if own := os.environ.get("UNLABEL_CACHE"):
            return Path(own).expanduser()
        if sys.platform == "win32":
            return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local") / "unlabel"
        if sys.platform == "darwin":
            return Path.home() / "Library" / "Caches" / "unlabel"
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "unlabel"
    except RuntimeError:  # a user without a home
        raise UserError("there is no home folder for the image cache: set UNLABEL_CACHE to a folder") from None


def open_named(name: str, split: str) -> Found:
    """A data set that scikit-learn or torchvision provides, as if it were a folder of class folders."""
    if name == "digits":
        from sklearn.datasets import load_digits

        digits = load_digits()
        images = (digits.images * (255 / 16)).round().astype("uint8")  # pyright: ignore[reportAttributeAccessIssue]
        return _from_arrays(images, [str(t) for t in digits.target])  # pyright: ignore[reportAttributeAccessIssue]

    from torchvision import datasets

    folder = cache_root() / "datasets" / name
    train = split == "train"
    make: Callable[[bool], object] = {
        "mnist": lambda download: datasets.MNIST(folder, train=train, download=download),
        "fashion-mnist": lambda download: datasets.FashionMNIST(folder, train=train, download=download),
        "cifar10": lambda download: datasets.CIFAR10(folder, train=train, download=download),
        "stl10": lambda download: datasets.STL10(folder, split=split, download=download),
        "pets": lambda download: datasets.OxfordIIITPet(
            folder, split="trainval" if train else "test", download=download
        ),
    }[name]
    try:
        data = make(False)
    except (RuntimeError, OSError):
        print(f"downloading {name} into {folder}", file=sys.stderr)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            data = make(True)
        except (RuntimeError, OSError) as error:  # URLError is an OSError
            reason = " ".join(str(error).split())
            raise UserError(
                f"cannot download {name} ({reason}); check the network, or give a folder or .tar as the source"
            ) from None
    return _from_torchvision(name, data)


def _from_torchvision(name: str, data) -> Found:
    """`data` is one of torchvision's data sets, each of which keeps its images in its own way."""
    if name == "pets":
        labels = [data.classes[i] for i in data._labels]
        paths = [str(path) for path in data._images]
        names = [f"{label}/{os.path.basename(path)}" for label, path in zip(labels, paths, strict=True)]
        place = Place(paths=list(map(os.path.abspath, paths)))
        return Found(Entries([place], names, [*map(os.path.getsize, paths)], range(len(paths))))
    if name == "stl10":  # (N, 3, H, W); label -1 is none
        images, targets = data.data.transpose(0, 2, 3, 1), data.labels
        return _from_arrays(images, [data.classes[t] if t >= 0 else "" for t in targets])
    if name == "cifar10":
        return _from_arrays(data.data, [data.classes[t] for t in data.targets])
    classes = [str(i) for i in range(10)] if name == "mnist" else [c.replace("/", "-") for c in data.classes]
    return _from_arrays(data.data.numpy(), [classes[t] for t in data.targets.tolist()])


def _from_arrays(images: "np.ndarray", labels: Sequence[str]) -> Found:
    """Entries for (N, H, W) or (N, H, W, 3) uint8, named class/number, or by number alone without a label."""
    size = len(portable_pixmap(images[0]))
    names = [f"{label}/{i:06d}.ppm" if label else f"{i:06d}.ppm" for i, label in enumerate(labels)]
    return Found(Entries([Place(pixels=images)], names, [size] * len(names), range(len(names))))
