"""Every setting of every command, as frozen dataclasses. Free of torch, so that ``--help`` is quick."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

__all__ = ["BACKBONES", "CompareConfig", "EvaluateConfig", "OwnBackbone", "PretrainConfig"]

Device = Literal["auto", "cpu", "cuda", "mps"]
Protocol = Literal["linear", "knn", "finetune", "self-training", "s4l"]
Stem = Literal["auto", "small", "half", "timm"]


@dataclass(frozen=True)
class OwnBackbone:
    timm_name: str
    kwargs: dict[str, Any]
    stem: str
    line: str


BACKBONES: dict[str, OwnBackbone] = {
    "small": OwnBackbone(
        "resnet18",
        # A deep stem of width 16 hands 32 channels on (timm's plain one always 64); "half" makes it one convolution.
        # Residual branches start at full strength: from zero, short runs learn less (rotation: 48 % against 52 %).
        {
            "layers": (1, 1, 1, 1),
            "channels": (32, 64, 128, 256),
            "stem_type": "deep",
            "stem_width": 16,
            "zero_init_last": False,
        },
        "half",
        "the default, for CPUs: four stages of one basic block, 1.2 M weights",
    ),
}

# A few good ones from timm, for `unlabel list`; any timm ConvNet works.
SUGGESTED_BACKBONES: dict[str, str] = {
    "small": BACKBONES["small"].line,
    "resnet18": "11 M weights; the smallest standard ResNet",
    "resnet50": "24 M weights; the field's yardstick, for a GPU",
    "resnetv2_50": "24 M weights; pre-activation ResNet",
    "convnext_atto": "3.4 M weights; LayerNorm, so no BatchNorm statistics to worry about",
    "regnety_002": "2.8 M weights; quick",
    "efficientnet_b0": "4.0 M weights; few operations, slow on CPUs for its size",
    "mobilenetv3_small_100": "1.5 M weights; for phones",
    "mlp:1000-500-250": "dense layers of these widths on flattened pixels; mlp:30:linear and others: without ReLU",
}


@dataclass(frozen=True)
class PretrainConfig:
    """Pretrain a backbone on images without labels. The same command again continues where it stopped."""

    tasks: Annotated[tuple[str, ...], tyro.conf.Positional]
    """One or more pretext tasks (`unlabel list`); several train one backbone together."""
    data: tuple[str, ...]
    """Images: folder, .tar, .tar.gz, shards{000..009}.tar, or a name such as cifar10. Labels are not needed."""
    out: Path
    """The run folder."""
    weights: tuple[float, ...] | None = None
    """One loss weight per task (default: 1 each; for vae beside others, whose loss is in nats, 0.0001)."""
    backbone: str | None = None
    """`small` (the default), the name of a timm ConvNet, or a dense network: `mlp:1000-500-250`."""
    stem: Stem = "auto"
    """auto: a small-image stem below 48 px (with plain weights of --init: timm's); half: three times as fast."""
    image_size: int | None = None
    """Pixels (default: the data's median short side, clamped to 32-224)."""
    epochs: float | None = None
    """Passes over the images (default 20, if --minutes is not given)."""
    minutes: float | None = None
    """Time for training: the speed is measured once and turned into steps."""
    batch_size: int | None = None
    """Images per step over all processes (default: the first task's)."""
    accumulate: int = 1
    """Parts that each process splits its share of a step into: the same batch in less memory."""
    lr: float | None = None
    """Peak learning rate (default: the first task's; with sgd 0.1)."""
    weight_decay: float | None = None
    """Not on biases and norm layers (default: the first task's; with sgd 0.0005)."""
    optimizer: Literal["sgd", "adamw", "muon"] | None = None
    """For the backbone (default: the first task's)."""
    schedule: Literal["cosine", "step"] | None = None
    """Learning rate after the warm-up (default: the first task's)."""
    warmup: float = 0.1
    """Share of the steps in which the learning rate rises."""
    clip: float = 1.0
    """Largest gradient norm; 0 turns clipping off."""
    crop: tuple[float, float] | None = None
    """Smallest and largest area of the random crop (default: the first task's)."""
    flip: bool = True
    """Random left-right flips; --no-flip for digits, text and whatever else its mirror image is not."""
    progressive: bool | None = None
    """Train on smaller images first; more passes in the same time (default: where every task's recipe has it)."""
    seed: int = 0
    """Initial weights, order and augmentation."""
    device: Device = "auto"
    """Where to train."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """auto: bf16 where the hardware is faster in it."""
    compile: bool = False
    """torch.compile the backbone: pays on GPUs for long runs."""
    sync_batchnorm: bool = False
    """BatchNorm's statistics over all processes; on GPUs only."""
    rank_timeout: float = 30.0
    """Minutes after which a process that waits for another one gives up, and names it."""
    init: str | None = None
    """Start from a run's folder, FILE.safetensors (timm weights of --backbone), or timm:NAME (downloaded)."""
    max_skipped: float = 0.01
    """Largest tolerated share of unreadable files."""
    workers: int | None = None
    """Threads that decode images (default: one per core)."""
    log_every: int | None = None
    """Steps between lines of metrics.jsonl (default: about 200 lines)."""
    checkpoint_every: int | None = None
    """Steps between checkpoints (default: an epoch or five minutes, whichever is first)."""
    task_settings: Annotated[dict[str, dict[str, Any]], tyro.conf.Suppress] = field(default_factory=dict)
    """Filled from --TASK.setting flags; task name to its Config's fields that differ from the defaults."""

    # What may differ when a run is continued; the data is compared by fingerprint, not by how it is spelled.
    MAY_DIFFER = frozenset(
        {"data", "out", "device", "workers", "log_every", "checkpoint_every", "accumulate", "rank_timeout"}
    )

    def fixed(self) -> dict[str, Any]:
        """The settings that a continued run must share, as plain JSON values."""
        return {k: v for k, v in self._values().items() if k not in self.MAY_DIFFER}

    def free(self) -> dict[str, Any]:
        """The other settings."""
        return {k: v for k, v in self._values().items() if k in self.MAY_DIFFER}

    def _values(self) -> dict[str, Any]:
        return {f.name: plain(getattr(self, f.name)) for f in dataclasses.fields(self)}


@dataclass(frozen=True)
class FewLabels:
    """What evaluate and compare share."""

    train: str
    """Labelled images: first-level folders are the classes, or use --labels."""
    test: str | None = None
    """Labelled test images (default: the named set's own test split, else 20 % by content hash)."""
    labels: Path | None = None
    """CSV of name,label for images that are not in class folders."""
    protocol: tuple[Protocol, ...] = ("linear", "knn", "finetune")
    """What to measure. `self-training`: fine-tuning, then again with the unlabelled images as it names them (the
    classes taken to be equally common). `s4l`: fine-tuning while the turns of unlabelled images are named, too."""
    labels_per_class: tuple[str, ...] | None = None
    """Label counts; `all` takes every label (default: of 1 10 50 those that there are)."""
    draws: int = 10
    """Independent draws of labels; the same for every arm."""
    controls: bool = True
    """Random backbone, pixels, patches, and supervised training from scratch beside the tasks."""
    augment: bool = True
    """Crops, mirror images, colours and holes while fine-tuning; --no-augment shows labelled images as they are."""
    top_layers: int | None = None
    """Fine-tune only the last N stages (default: the protocol's presets)."""
    device: Device = "auto"
    """Where to compute."""
    max_skipped: float = 0.01
    """Largest tolerated share of unreadable files."""


@dataclass(frozen=True)
class EvaluateConfig(FewLabels):
    """Measure what a run's backbone is worth with few labels."""

    run: Annotated[Path, tyro.conf.Positional] = field(default=tyro.MISSING)
    """A finished run folder."""
    out: Path | None = None
    """Where results.json goes (default: RUN/evaluation)."""
    init: str | None = None
    """Weights to measure as they are given, beside the run: another run's folder, FILE.safetensors, or timm:NAME."""
    label_free: bool = False
    """Also scores that need no labels; alone where --train has none, or after --protocol without a value."""


@dataclass(frozen=True)
class CompareConfig(FewLabels):
    """The main job: pretrain with each task, evaluate all of them beside the controls, write report.html."""

    data: tuple[str, ...] = field(default=tyro.MISSING)
    """Images without labels, for pretraining."""
    out: Path = field(default=tyro.MISSING)
    """Results, report and run folders."""
    tasks: tuple[str, ...] = ("rotation", "inpainting", "denoising")
    """One arm each; `rotation+inpainting` is one arm of two tasks."""
    also: tuple[Path, ...] = ()
    """Finished run folders that become further arms, named after their folder."""
    seeds: int = 1
    """Pretraining seeds per arm; from three on, intervals are over seeds."""
    backbone: str | None = None
    """`small` (the default), the name of a timm ConvNet, or a dense network: `mlp:1000-500-250`."""
    stem: Stem = "auto"
    """auto: a small-image stem below 48 px (with plain weights of --init: timm's); half: three times as fast."""
    init: str | None = None
    """Start from a run's folder, FILE.safetensors or timm:NAME; those weights as they are become an arm, too."""
    image_size: int | None = None
    """Pixels (default: the data's median short side, clamped to 32-224)."""
    epochs: float | None = None
    """Passes of pretraining per arm (default 20, if --minutes is not given)."""
    minutes: float | None = None
    """Minutes of pretraining per arm."""
    batch_size: int | None = None
    """Images per pretraining step (default: each task's)."""
    flip: bool = True
    """Random left-right flips, in pretraining and of labelled images; --no-flip for digits and text."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """auto: bf16 where the hardware is faster in it."""
    seed: int = 0
    """The first pretraining seed."""
    task_settings: Annotated[dict[str, dict[str, Any]], tyro.conf.Suppress] = field(default_factory=dict)
    """Filled from --TASK.setting flags."""


@dataclass(frozen=True)
class ReportConfig:
    """Write report.html again from a folder's results.json."""

    folder: Annotated[Path, tyro.conf.Positional]
    """A folder that evaluate or compare wrote."""


@dataclass(frozen=True, kw_only=True)
class OnImages:
    """What the commands share that show images to something trained."""

    device: Device = "auto"
    """Where to compute."""
    max_skipped: float = 0.01
    """Largest tolerated share of unreadable files."""


@dataclass(frozen=True)
class EmbedConfig(OnImages):
    """Write the pooled features of images to a file."""

    run: Annotated[Path, tyro.conf.Positional]
    """A finished run folder."""
    data: tuple[str, ...]
    """Images."""
    out: Path
    """FILE.npz (arrays `names` and `features`) or FILE.csv."""


@dataclass(frozen=True)
class ExportConfig:
    """Write a run's backbone for use elsewhere."""

    run: Annotated[Path, tyro.conf.Positional]
    """A finished run folder."""
    to: Path
    """FILE.safetensors (timm weights) or FILE.onnx (images in [0, 1] to pooled features)."""


@dataclass(frozen=True)
class PredictConfig(OnImages):
    """Classify new images with a fine-tuned classifier."""

    model: Annotated[Path, tyro.conf.Positional]
    """A folder with classifier.safetensors, written by evaluate or compare."""
    data: tuple[str, ...]
    """Images."""
    out: Path
    """FILE.csv: name, class, and a column of probabilities per class."""


@dataclass(frozen=True)
class RestoreConfig(OnImages):
    """Repair images with a trained task: denoise, paint what is hidden, colour, enlarge."""

    run: Annotated[Path, tyro.conf.Positional]
    """A finished run of denoising, inpainting, colorization or superresolution."""
    data: tuple[str, ...]
    """Images: damaged ones, or whole ones with --damage."""
    out: Path
    """Folder for the repaired images, before-after.png and restored.json."""
    damage: bool = False
    """First damage the images as the task does in training; what they were is then the original."""
    clean: str | None = None
    """The originals, under the same names: PSNR and SSIM are measured against them."""
    hidden: str | None = None
    """Masks under the same names, bright where the image is hidden (inpainting)."""
    task: str | None = None
    """Which of the run's tasks (default: the first)."""


@dataclass(frozen=True)
class CompressConfig(OnImages):
    """What a code of so many numbers keeps of an image, beside as many principal components."""

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Finished runs of autoencoder, vae, sparse or contractive."""
    data: tuple[str, ...]
    """Images to compress, best others than those of pretraining."""
    train: tuple[str, ...] | None = None
    """What principal components and frequencies are taken from (default: the first run's own images, but those that
    `compare` left out of any run)."""
    out: Path | None = None
    """Where compression.html goes (default: RUN/compression)."""


@dataclass(frozen=True)
class AnomaliesConfig(OnImages):
    """Rank images by how strange they are to a run that was trained on normal ones."""

    run: Annotated[Path, tyro.conf.Positional]
    """A finished run."""
    data: tuple[str, ...]
    """Normal images: what the run was trained on, or others like them."""
    test: tuple[str, ...] | None = None
    """Images to rank (default: those of --data)."""
    normal: tuple[str, ...] = ()
    """Which classes of --test are normal; all others are anomalies. Asks for AUROC and average precision."""
    labels: Path | None = None
    """CSV of name,label for --test images that are not in class folders."""
    out: Path | None = None
    """Where anomalies.csv and anomalies.html go (default: RUN/anomalies)."""


@dataclass(frozen=True)
class MapConfig(OnImages):
    """A run's features in two dimensions, as a picture of thumbnails."""

    run: Annotated[Path, tyro.conf.Positional]
    """A finished run."""
    data: tuple[str, ...]
    """Images; first-level folders, if there are any, give the colours."""
    labels: Path | None = None
    """CSV of name,label for images that are not in class folders."""
    method: Literal["tsne", "pca", "code"] = "tsne"
    """How features become two numbers; `code`: the run's own code of two numbers."""
    images: int = 2000
    """At most so many, evenly spaced."""
    out: Path | None = None
    """Where map.png and map.csv go (default: RUN/map)."""


@dataclass(frozen=True)
class SampleConfig:
    """Images that a variational autoencoder makes up, and walks from one image to another."""

    run: Annotated[Path, tyro.conf.Positional]
    """A finished run of vae."""
    data: tuple[str, ...] | None = None
    """Images to walk between (default: the run's own)."""
    out: Path | None = None
    """Where samples.png and walk.png go (default: RUN/samples)."""
    seed: int = 0
    """Of the codes."""
    device: Device = "auto"
    """Where to compute."""


@dataclass(frozen=True)
class CheckConfig:
    """Say what is in a source before anything is spent on it."""

    source: Annotated[str, tyro.conf.Positional]
    """Images, with or without class folders."""
    against: str | None = None
    """Another source: images that are in both are leaks."""
    labels: Path | None = None
    """CSV of name,label for images that are not in class folders."""


@dataclass(frozen=True)
class ListConfig:
    """Tasks, data sets and a few good backbones."""

    json: bool = False
    """Machine-readable."""


def plain(value: Any) -> Any:
    """Tuples to lists, paths to text: what JSON gives back after a round trip."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    if isinstance(value, Path):
        return value.as_posix()
    return value
