"""Stacked autoencoder: greedy layer-wise pretraining (Bengio et al. 2007; denoising: Vincent et al. 2010, JMLR 11).

One phase for each stage of the backbone: the stage learns to recover what it gets, from what it makes of a corrupted
copy of it; the stages before it are frozen and in eval mode. In a last phase all of them are trained together,
through all decoders, to recover the image. What it pretrains can start a supervised network.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretext.decoder import denormalise, is_grey, plain_error, resize
from pretext.task import Batch, PretextTask, Recipe
from unlabel.backbone import Backbone, parameter_stages
from unlabel.draws import Draws
from unlabel.errors import UserError
from unlabel.mlp import Mlp

__all__ = ["Stacked"]


@dataclass(frozen=True)
class Config:
    noise: Literal["masking", "gaussian", "none"] = "masking"
    """What corrupts the input of the stage in training: values are set to 0 (of the image: whole pixels), something is
    added to each value by itself, or nothing is done."""
    level: float = 0.3
    """Share of the values (pixels); or standard deviation, as a share of that of the input itself."""
    greedy: bool = True
    """A phase for each stage, one after the other; without, all stages are trained together from the start."""
    joint: bool = True
    """A last phase in which all stages are trained together."""


class Up(nn.Module):
    """One stage's output (N, C, h, w) back to its input (N, C', h', w'), by nearest neighbours and one convolution."""

    def __init__(self, channels: int, before: int, side: int) -> None:
        super().__init__()
        kernel = 3 if side > 1 else 1
        self.layer = nn.Conv2d(channels, before, kernel, padding=kernel // 2)

    def forward(self, maps: Tensor, side: int) -> Tensor:
        return self.layer(maps if maps.shape[-1] == side else F.interpolate(maps, size=(side, side)))


class ToImage(nn.Module):
    """The first dense layer's output (N, C, 1, 1) to an image (N, 3, side, side)."""

    def __init__(self, channels: int, side: int) -> None:
        super().__init__()
        self.side = side
        self.layer = nn.Linear(channels, 3 * side**2)

    def forward(self, maps: Tensor, side: int) -> Tensor:
        return resize(self.layer(maps.flatten(1)).view(len(maps), 3, self.side, self.side), side)


class Stacked(PretextTask):
    """``error``: squared error of what is recovered, as a share of the target's variance within its channels over the
    batch (1: the mean). The target is the phase's: the input of its stage; the image in the first and the last one."""

    Config = Config
    metrics = {"error": "min"}  # noqa: RUF012
    recipe = Recipe(optimizer="adamw", lr=1e-3, weight_decay=0.01, batch_size=128)
    phases = 2  # at least: one for each stage, and one for all
    config: Config

    def __init__(self, backbone: Backbone, config: Config) -> None:
        super().__init__(backbone, config)
        if config.noise not in ("masking", "gaussian", "none"):
            raise UserError(f"unknown --stacked.noise {config.noise!r}: masking, gaussian or none")
        if not config.level >= 0 or (config.noise == "masking" and config.level >= 1):
            raise UserError(f"--stacked.level {config.level}: from 0; of masking below 1")
        if not (config.greedy or config.joint):
            raise UserError("--stacked.no-greedy --stacked.no-joint: that leaves nothing to train")
        self.stage_of = parameter_stages(backbone)
        self.cuts, sides, self.positive = _cuts(backbone)
        self.stages = len(backbone.stage_names)
        self.phases = self.stages * bool(config.greedy) + bool(config.joint)
        self.phase, self.settled = 0, []
        channels = [*backbone.stage_channels[:-1], backbone.channels]
        first = ToImage if isinstance(backbone.model, Mlp) else partial(Up, before=3)
        ups = [first(channels[0], side=backbone.spec.image_size)]
        ups += [Up(channels[k], channels[k - 1], sides[k - 1]) for k in range(1, self.stages)]
        self.ups = nn.ModuleList(ups)

    def begin(self, phase: int) -> None:
        phase = phase if self.config.greedy else self.stages
        self.phase = phase  # of its own stage's number, or, of all together, the number of stages
        for name, parameter in self.backbone.model.named_parameters():
            here = phase == self.stages or self.stage_of.get(name) == phase
            parameter.requires_grad_(here and name not in self.backbone.frozen)
        for k, up in enumerate(self.ups):
            up.requires_grad_(phase in (k, self.stages))
        self.settled = self._settled() if phase < self.stages else []

    def _settled(self) -> list[str]:
        """The modules of the backbone all of whose weights belong to stages before this phase's."""
        last: dict[str, int] = {}  # module -> the deepest stage that it holds weights of
        for weight, stage in self.stage_of.items():
            parts = weight.split(".")[:-1]
            for k in range(1, len(parts) + 1):
                name = ".".join(parts[:k])
                last[name] = max(stage, last.get(name, 0))
        return [name for name, stage in last.items() if stage < self.phase]

    def train(self, mode: bool = True) -> Stacked:
        """The stages before the one that learns stay in eval mode (the loop sets the backbone's mode first)."""
        super().train(mode)
        if mode:
            for name in self.settled:
                self.backbone.model.get_submodule(name).eval()
        return self

    def corrupt(self, clean: Tensor, draws: Draws, image: bool = False) -> Tensor:
        """(N, C, h, w): image i's by row i of ``draws``. Values of a dense layer have h = w = 1.

        Of an ``image``, a pixel is masked in all channels or in none, and if the image is grey, so is its noise: else
        the other channels would give it away.
        """
        if self.config.noise == "none" or self.config.level == 0:
            return clean
        if self.config.noise == "masking":
            masks = 1 if image else clean.shape[1]
            return torch.where(draws.uniform(masks, *clean.shape[2:]) < self.config.level, 0.0, clean)
        spread = clean.std((1, 2, 3), keepdim=True) if clean[0].numel() > 1 else clean.abs()
        noise = draws.normal(*clean.shape[1:]).to(clean.dtype)
        if image:
            std = self.backbone.get_buffer("std")
            grey = is_grey(denormalise(self.backbone, clean))
            noise = torch.where(grey, noise[:, :1] * std.mean() / std, noise)
        return clean + self.config.level * spread * noise

    def stage_outputs(self, normalised: Tensor, cut: int | None, draws: Draws) -> tuple[Tensor, list[Tensor]]:
        """The clean input of stage ``cut`` (None: of none) and every stage's output from a corrupted copy of it."""
        taken = [normalised]
        if not cut:
            given = self.corrupt(normalised, draws, image=True) if cut == 0 else normalised
            features = self.backbone.forward_normalised(given)
        else:

            def replaced(_module: nn.Module, _args: Any, output: Tensor) -> Tensor:
                taken.append(output.detach())
                return self.corrupt(output.detach(), draws)

            handle = self.backbone.model.get_submodule(self.cuts[cut - 1]).register_forward_hook(replaced)
            try:
                features = self.backbone.forward_normalised(normalised)
            finally:
                handle.remove()
        return taken[-1], [*list(features.stages.values())[:-1], features.last]

    def recovered(self, maps: Tensor, stage: int, down_to: int, sides: list[int]) -> Tensor:
        """``maps``, the output of ``stage``, back through its decoder and those below it, to ``down_to``'s input."""
        for k in range(stage, down_to - 1, -1):
            maps = self.ups[k](maps, sides[k])
            if k > down_to and self.positive[k - 1]:
                maps = maps.relu()  # as what that stage puts out is
        return maps.float()

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        images = self.backbone.normalise(batch.images).contiguous(memory_format=torch.channels_last)
        joint, draws = self.phase == self.stages, batch.draws.stream("stacked")
        target, outputs = self.stage_outputs(images, 0 if joint else self.phase, draws)
        sides = [images.shape[-1], *(o.shape[-1] for o in outputs)]
        stage, down_to = (self.stages - 1, 0) if joint else (self.phase, self.phase)
        recovered, target = self.recovered(outputs[stage], stage, down_to, sides), target.float()
        loss = plain_error(recovered, target)
        variance = target.var((0, 2, 3), correction=0).mean().clamp(min=1e-12)
        return {"loss": loss, "error": loss.detach() / variance}

    def trivial(self, batch: Batch) -> dict[str, float]:
        """The mean of each channel."""
        return {"error": 1.0}

    @torch.no_grad()
    def show(self, batch: Batch) -> dict[str, Tensor]:
        """The image from the newest stage, through all decoders below it."""
        images, stage = self.backbone.normalise(batch.images), min(self.phase, self.stages - 1)
        noisy = images
        if self.phase in (0, self.stages):
            noisy = self.corrupt(images, batch.draws.stream("stacked"), image=True)
        _, outputs = self.stage_outputs(noisy, None, batch.draws)
        sides = [images.shape[-1], *(o.shape[-1] for o in outputs)]
        painted = self.recovered(outputs[stage], stage, 0, sides)
        shown = (denormalise(self.backbone, x) for x in (noisy, painted))
        return {"input": next(shown), "target": batch.images, "prediction": next(shown)}


def _cuts(backbone: Backbone) -> tuple[list[str], list[int], list[bool]]:
    """For each stage but the last, the module that hands its output on; and of each stage's output, the side, and
    whether no value is negative (noise is shown)."""
    size, device = backbone.spec.image_size, backbone.get_buffer("mean").device
    given: dict[int, str] = {}
    kept: list[Any] = []  # so that no other tensor gets the same id

    def remember(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            kept.append(output)
            given[id(output)] = name  # of modules that hand on one tensor, the outermost is the last to be called

        return hook

    modules = [(n, m) for n, m in backbone.model.named_modules() if n]
    handles = [m.register_forward_hook(remember(n)) for n, m in modules]
    was_training = backbone.training
    backbone.eval()
    try:
        with torch.no_grad():
            shown = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(0)).to(device)
            _, maps = backbone.model.forward_intermediates(shown)
    finally:
        backbone.train(was_training)
        for handle in handles:
            handle.remove()
    stages = [maps[k] for k in backbone.stage_maps]
    lost = [n for n, m in zip(backbone.stage_names[:-1], stages, strict=False) if id(m) not in given]
    if lost:
        raise UserError(f"stacked cannot take {backbone.spec.name} apart after stage {lost[0]}: another --backbone")
    positive = [bool((m >= 0).all()) for m in stages]
    return [given[id(m)] for m in stages[:-1]], [int(m.shape[-1]) for m in stages], positive
