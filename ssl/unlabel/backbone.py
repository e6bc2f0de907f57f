"""The shared backbone: any timm ConvNet (or a dense network), seen as a list of stages. Build, save, load."""

from __future__ import annotations

import copy
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import timm
import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn

from unlabel.checkpoint import write_atomic
from unlabel.config import BACKBONES, plain
from unlabel.errors import UserError
from unlabel.mlp import Mlp, is_mlp, make_mlp

__all__ = ["Backbone", "Features", "build_backbone", "channels_last", "load_backbone", "parameter_stages"]
__all__ += ["name_of", "save_backbone", "stem_for"]

SMALL_IMAGE = 48  # px; below it `--stem auto` takes the small-image stem
CHANGED_PREFIX = "unlabel_stem."  # marks weights that plain timm would put into a different stem
SIDES = (16, 1024)  # px, of the images that a network is made for
MAX_BYTES = 8 << 30  # a backbone file larger than this is refused before memory is taken


@dataclass(frozen=True)
class Features:
    """``stages``: name ("s8" = stride 8) to (N, C, h, w), shallow to deep. ``last``: (N, C, h, w)."""

    stages: dict[str, Tensor]
    last: Tensor

    @property
    def pooled(self) -> Tensor:
        """(N, C): the spatial mean of ``last``."""
        return self.last.mean((2, 3))


@dataclass(frozen=True)
class Spec:
    """What is needed to build the same network again: the content of backbone.json."""

    name: str  # as timm knows it
    kwargs: dict[str, Any] = field(default_factory=dict)
    stem: str = "timm"  # timm, small, half
    image_size: int = 64
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    flip: bool = True  # the mirror image of an image is another such image; false for digits and text


class Backbone(nn.Module):
    """``backbone(images) -> Features``; images (N, 3, H, W) float in [0, 1], normalised inside.

    ``model`` is the plain timm network without its classifier; only its weights are saved.
    """

    def __init__(self, spec: Spec) -> None:
        super().__init__()
        self.spec = spec
        self.model: Any = make_mlp(spec.name, spec.image_size) if is_mlp(spec.name) else timm_network(spec)
        self.changed: tuple[str, ...] = _change_stem(self.model, spec.stem)
        self.frozen: tuple[str, ...] = ()
        self.register_buffer("mean", torch.tensor(spec.mean).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(spec.std).view(1, -1, 1, 1), persistent=False)
        try:
            self.stage_names, self.stage_channels, self.stage_maps = self._probe_stages()
        except UserError:
            raise
        except Exception as error:  # a transformer, or a stem that cannot be replaced by one convolution
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise UserError(
                f"backbone {spec.name!r} does not work at {spec.image_size} px with the {spec.stem} stem ({reason}): "
                "try --stem timm, larger images, or another backbone of `unlabel list`"
            ) from None

    def _probe_stages(self) -> tuple[tuple[str, ...], tuple[int, ...], tuple[int, ...]]:
        """Names by stride; where two feature maps share a stride, the deeper one is the stage."""
        was_training = self.training
        self.eval()
        with torch.no_grad():
            x = torch.zeros(1, 3, 64, 64)
            last, maps = self.model.forward_intermediates(x)
            side = self.spec.image_size
            if side < 64:
                self.model.forward_intermediates(torch.zeros(1, 3, side, side))
        self.train(was_training)
        if last.ndim != 4:
            raise UserError(f"{self.spec.name!r} is not a ConvNet: its features are not (N, C, H, W)")
        picks: dict[str, int] = {}
        for k, m in enumerate(maps):
            # Layers of a dense network have no stride: their place in it is the name.
            picks[f"l{k + 1}" if isinstance(self.model, Mlp) else f"s{round(64 / m.shape[-1])}"] = k
        self.channels = int(last.shape[1])
        self.stride = round(64 / last.shape[-1])
        return tuple(picks), tuple(int(maps[k].shape[1]) for k in picks.values()), tuple(picks.values())

    def normalise(self, images: Tensor) -> Tensor:
        """Grey (N, 1, H, W) is repeated to three channels; then (x - mean) / std."""
        if images.shape[1] == 1:
            images = images.expand(-1, 3, -1, -1)
        return (images - self.get_buffer("mean")) / self.get_buffer("std")

    def forward(self, images: Tensor) -> Features:
        return self.forward_normalised(self.normalise(images))

    def forward_normalised(self, x: Tensor) -> Features:
        """For tasks that hide or corrupt pixels after normalising."""
        last, maps = self.model.forward_intermediates(x)
        stages = {n: maps[k] for n, k in zip(self.stage_names, self.stage_maps, strict=True)}
        return Features(stages, last)


def parameter_stages(backbone: Backbone) -> dict[str, int]:
    """Name of each weight in ``backbone.model`` to its stage, 0 … the number of stages - 1; the stem is in the first.

    A weight belongs to the shallowest stage that it can change: found by gradient, so that it holds for every family
    of networks. What is behind the last stage belongs to it; what changes nothing is left out.
    """
    probe = copy.deepcopy(backbone).eval()
    names = [n for n, _ in probe.model.named_parameters()]
    for p in probe.parameters():
        p.requires_grad_(True)
    size, device = probe.spec.image_size, next(probe.parameters()).device
    features = probe(torch.rand(1, 3, size, size, device=device))
    first: dict[str, int] = {}
    for depth, stage in enumerate([*features.stages.values(), features.last]):
        grads = torch.autograd.grad(stage.sum(), list(probe.model.parameters()), retain_graph=True, allow_unused=True)
        for name, grad in zip(names, grads, strict=True):
            if grad is not None:
                first.setdefault(name, min(depth, len(features.stages) - 1))
    return first


def timm_network(spec: Spec) -> nn.Module:
    if not re.fullmatch(r"[A-Za-z0-9_.]+", spec.name):  # timm would also load from addresses and folders
        raise UserError(f"{spec.name!r} is not the name of a network; `unlabel list` names a few good ones")
    try:
        model = timm.create_model(spec.name, pretrained=False, num_classes=0, **spec.kwargs)
    except Exception as error:  # timm raises whatever its constructors raise
        message = f"timm cannot build backbone {spec.name!r} ({error}); `unlabel list` names a few good ones"
        raise UserError(message) from None
    if not hasattr(model, "forward_intermediates"):
        raise UserError(f"{spec.name!r} has no forward_intermediates in this timm: take another backbone")
    return model


def _change_stem(model: Any, stem: str) -> tuple[str, ...]:
    """Replace the first convolution (and drop the pool behind it). Returns the state-dict keys that changed.

    ``small`` is for images below 48 px: full resolution into the first stage (ConvNeXt: half).
    ``half`` is the default network's: one 5×5 convolution of stride 2 and no pooling.
    A deep stem, several convolutions in a row, is replaced as a whole.
    """
    if isinstance(model, Mlp):
        return tuple(model.state_dict())  # nothing of it is in plain timm
    if stem == "timm":
        return ()
    if stem not in ("small", "half"):
        raise UserError(f"unknown stem {stem!r}: auto, small, half or timm")
    name, conv = next((n, m) for n, m in model.named_modules() if isinstance(m, nn.Conv2d))
    width: int = conv.out_channels
    chain = model.get_submodule(name.rpartition(".")[0])
    if isinstance(chain, nn.Sequential) and isinstance(chain[-1], nn.Conv2d):
        name, width = name.rpartition(".")[0], int(chain[-1].out_channels)  # type: ignore[arg-type]
    patchify = conv.stride[0] == conv.kernel_size[0] and conv.stride[0] > 1  # ConvNeXt
    kernel, stride = (5, 2) if stem == "half" else (2, 2) if patchify else (3, 1)
    new = type(conv)(
        conv.in_channels,
        width,
        kernel_size=kernel,  # type: ignore[arg-type]
        stride=stride,  # type: ignore[arg-type]
        padding=0 if patchify else kernel // 2,  # type: ignore[arg-type]
        bias=conv.bias is not None,
    )
    parent = model.get_submodule(name.rpartition(".")[0]) if "." in name else model
    setattr(parent, name.rpartition(".")[2], new)
    for pool, module in model.named_modules():
        if isinstance(module, nn.MaxPool2d) and pool.rpartition(".")[0] in ("", "stem"):
            setattr(model.get_submodule(pool.rpartition(".")[0]), pool.rpartition(".")[2], nn.Identity())
            break
    return tuple(f"{name}.{k}" for k in new.state_dict())


M = TypeVar("M", bound=nn.Module)


def channels_last(module: M) -> M:
    """Weights in the memory layout that convolutions are quickest in."""
    return module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def stem_for(name: str, image_size: int, stem: str) -> str:
    """What ``auto`` means for this network at this size; any other stem is itself."""
    if is_mlp(name):
        if stem in ("small", "half"):
            raise UserError(f"--stem {stem}: {name} has no stem to change")
        return "timm"
    if stem != "auto":
        return stem
    own = BACKBONES.get(name)
    return "small" if image_size < SMALL_IMAGE else (own.stem if own else "timm")


def name_of(spec: Spec) -> str:
    """What ``build_backbone`` calls this network, as far as it has a name for it; else timm's name."""
    own = (name for name, o in BACKBONES.items() if o.timm_name == spec.name and plain(o.kwargs) == plain(spec.kwargs))
    return next(own, spec.name)


def build_backbone(name: str, image_size: int, stem: str = "auto", seed: int = 0, flip: bool = True) -> Backbone:
    """A freshly initialised backbone. ``name``: ``small`` (the default, for CPUs), any timm ConvNet, or ``mlp:…``.

    ``flip``: whether it is trained on mirror images, too.
    """
    own = BACKBONES.get(name)
    timm_name, kwargs = (own.timm_name, dict(own.kwargs)) if own else (name, {})
    stem = stem_for(name, image_size, stem)
    if not is_mlp(name) and not re.fullmatch(r"[A-Za-z0-9_.]+", timm_name):
        raise UserError(f"unknown backbone {name!r}; `unlabel list` names a few good ones")
    try:
        cfg = None if is_mlp(name) else timm.get_pretrained_cfg(timm_name)
    except RuntimeError as error:
        raise UserError(f"unknown backbone {name!r} ({error}); `unlabel list` names a few good ones") from None
    mean, std = (cfg.mean, cfg.std) if cfg is not None else (Spec.mean, Spec.std)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Backbone(Spec(timm_name, kwargs, stem, image_size, tuple(mean), tuple(std), flip))


def _exported(backbone: Backbone) -> dict[str, Tensor]:
    state = backbone.model.state_dict()
    return {(CHANGED_PREFIX + k if k in backbone.changed else k): v.contiguous() for k, v in state.items()}


def save_backbone(backbone: Backbone, folder: Path) -> Path:
    """Write backbone.safetensors (weights only: no time, path or commit in it) and backbone.json."""
    spec = backbone.spec
    about = {
        **spec_to_json(spec),
        "changed": list(backbone.changed),
        "stages": dict(zip(backbone.stage_names, backbone.stage_channels, strict=True)),
        "frozen": list(backbone.frozen),
    }
    path = folder / "backbone.safetensors"
    write_atomic(folder / "backbone.json", (json.dumps(about, indent=2) + "\n").encode())
    write_atomic(path, save({k: v.cpu() for k, v in _exported(backbone).items()}))
    return path


def spec_to_json(spec: Spec) -> dict[str, Any]:
    return plain(spec)


def spec_from_json(about: Mapping[str, Any]) -> Spec:
    """Raises TypeError, KeyError or ValueError where it is not a description of a backbone that this library writes."""
    spec = Spec(
        str(about["name"]),
        dict(about.get("kwargs", {})),
        str(about.get("stem", "timm")),
        int(about.get("image_size", 64)),
        tuple(float(v) for v in about.get("mean", Spec.mean)),
        tuple(float(v) for v in about.get("std", Spec.std)),
        bool(about.get("flip", True)),
    )
    if not SIDES[0] <= spec.image_size <= SIDES[1] or spec.stem not in ("timm", "small", "half"):
        raise ValueError(f"no image size of {spec.image_size} px, or no stem {spec.stem!r}")
    if len(spec.mean) != 3 or len(spec.std) != 3 or not all(map(math.isfinite, spec.mean + spec.std)):
        raise ValueError("mean and std are three numbers each")
    if min(spec.std) <= 0:
        raise ValueError("std is above 0")
    for key, value in spec.kwargs.items():
        _refuse_strange(key, value)
    return spec


def _refuse_strange(key: str, value: Any) -> None:
    """timm's arguments can also name files and addresses to load from: ours are numbers and short words."""
    if not re.fullmatch(r"[a-z][a-z0-9_]{0,40}", key) or key.startswith(
        ("pretrained", "checkpoint", "cache", "features")
    ):
        raise ValueError(f"an argument {key!r}")
    values = value if isinstance(value, list | tuple) else [value]
    if len(values) > 64:
        raise ValueError(f"{len(values)} values of {key!r}")
    most = 1000 if key in ("layers", "depths") else 65_536
    for v in values:
        short = isinstance(v, str) and re.fullmatch(r"[A-Za-z0-9_]{0,40}", v)
        if not (v is None or short or (isinstance(v, int | float) and abs(v) <= most)):
            raise ValueError(f"{key} = {str(v)[:40]!r}")


def build_described(spec: Spec, weights: Path) -> Backbone:
    """The network of a description that anybody may have written, if it is no larger than its ``weights`` file.

    It is built without memory first. Raises UserError.
    """
    size = sum(4 * math.prod(shape) for shape in shapes_of(weights).values())
    try:
        with torch.device("meta"):
            empty = make_mlp(spec.name, spec.image_size) if is_mlp(spec.name) else timm_network(spec)
        need = 4 * sum(t.numel() for t in empty.state_dict().values())
    except (NotImplementedError, RuntimeError, UserError):  # it computes with its weights while it is built
        need = 0
    if need > min(MAX_BYTES, 4 * size + (1 << 20)):  # the changed stem may be smaller
        raise UserError(f"{weights} holds {size:,} bytes and {spec.name} needs {need:,}: they do not belong together")
    return Backbone(spec)


def shapes_of(path: Path) -> dict[str, tuple[int, ...]]:
    """Of a safetensors file, which cannot run code, without its numbers. Raises UserError."""
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ValueError(f"larger than {MAX_BYTES >> 30} GiB")
        with safe_open(path, framework="pt") as file:  # which has compared what it claims with its length
            return {k: tuple(file.get_slice(k).get_shape()) for k in file.keys()}  # noqa: SIM118
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: is the run finished?") from None
    except Exception as error:  # safetensors raises its own type for a malformed file
        raise UserError(f"{path} is not a readable safetensors file ({error})") from None


def read_weights(path: Path, want: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Exactly the tensors of ``want``; names and shapes are compared before memory is taken. Raises UserError."""
    compare_weights(want, shapes_of(path))
    with safe_open(path, framework="pt") as file:
        return {k: file.get_tensor(k) for k in want}


def read_spec(folder: Path) -> dict[str, Any]:
    """backbone.json of a run folder, or another .json like it, with a clear error where it is missing or broken."""
    path = folder if folder.suffix == ".json" and not folder.is_dir() else folder / "backbone.json"
    try:
        about = json.loads(path.read_text())
        if not isinstance(about, dict) or not isinstance(about["name"], str):
            raise ValueError("not a backbone description")
        return about
    except FileNotFoundError:
        raise UserError(
            f"no backbone in {path.parent}: is the run finished? (`unlabel pretrain` again continues it)"
        ) from None
    except (ValueError, KeyError, OSError) as error:
        raise UserError(f"{path} cannot be read ({error})") from None


def load_backbone(path: str | Path) -> Backbone:
    """The backbone of a finished run, in eval mode: ``load_backbone("runs/rotation")(images).pooled``.

    Or one that `unlabel export` wrote: FILE.safetensors, with FILE.json beside it.
    """
    path = Path(path)
    weights = path if path.suffix == ".safetensors" and not path.is_dir() else path / "backbone.safetensors"
    about = read_spec(weights.with_suffix(".json"))
    try:
        spec = spec_from_json(about)
    except (TypeError, ValueError, OverflowError) as error:
        raise UserError(f"{weights.with_suffix('.json')} cannot be read ({error})") from None
    backbone = build_described(spec, weights)
    load_weights(backbone, weights)
    return backbone.eval()


def load_weights(backbone: Backbone, path: Path) -> None:
    """Strict."""
    want = {(CHANGED_PREFIX + k if k in backbone.changed else k): v for k, v in backbone.model.state_dict().items()}
    state = read_weights(path, want)
    backbone.model.load_state_dict({k.removeprefix(CHANGED_PREFIX): v for k, v in state.items()}, strict=True)


def compare_weights(want: Mapping[str, Tensor], have: Mapping[str, tuple[int, ...]]) -> None:
    missing, extra = sorted(want.keys() - have.keys()), sorted(have.keys() - want.keys())
    wrong = sorted(k for k in want.keys() & have.keys() if tuple(want[k].shape) != have[k])
    if missing or extra or wrong:
        first = (missing + extra + wrong)[0]
        counts = f"{len(missing)} missing, {len(extra)} unexpected, {len(wrong)} of another shape"
        raise UserError(f"the weights do not fit this backbone: {counts} (first: {first!r})")
