"""Pretext tasks, by name. Importing this package is quick: a task's module is imported when it is asked for."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from unlabel.errors import UserError

if TYPE_CHECKING:
    from pretext.task import PretextTask

__all__ = ["TASKS", "load_task"]

# name -> ("module:Class", one line of text)
TASKS: dict[str, tuple[str, str]] = {
    "rotation": (
        "pretext.rotation:Rotation",
        "by which of 0, 90, 180, 270 degrees was the image turned? (Gidaris 2018)",
    ),
    "transformations": (
        "pretext.transformations:Transformations",
        "which of 72 mirrorings, shifts and turns was it? (Golan & El-Yaniv 2018): for finding anomalies",
    ),
    "inpainting": ("pretext.inpainting:Inpainting", "fill in a missing part: context encoder (Pathak 2016)"),
    "denoising": (
        "pretext.denoising:Denoising",
        "recover the clean image from a noisy one (Vincent 2008, 2010)",
    ),
    "autoencoder": ("pretext.autoencoder:Autoencoder", "the image through a small code (Hinton 2006)"),
    "vae": ("pretext.vae:VAE", "the image through a random code of known distribution (Kingma & Welling 2014)"),
    "sparse": ("pretext.sparse:Sparse", "the image as a sum of few of many learned parts (Olshausen 1996, Ng 2011)"),
    "contractive": ("pretext.contractive:Contractive", "a code that hardly moves with the image (Rifai 2011)"),
    "stacked": ("pretext.stacked:Stacked", "stage by stage, then all together (Bengio 2007, Vincent 2010)"),
    "colorization": ("pretext.colorization:Colorization", "predict the colours of a grey image (Zhang 2016)"),
    "superresolution": ("pretext.superresolution:SuperResolution", "recover the image from its reduction (Kim 2016)"),
    "instance": (
        "pretext.instance:Instance",
        "which image is this another view of? (Chen 2020): for a sum with rotation (Feng 2019)",
    ),
    "jigsaw": ("pretext.jigsaw:Jigsaw", "which tile belongs where? (Doersch 2015, Noroozi & Favaro 2016)"),
}


def load_task(name: str) -> type[PretextTask]:
    """The class of a task; an unknown name is an error that lists the known ones."""
    if name not in TASKS:
        raise UserError(f"unknown pretext task {name!r}: choose from {', '.join(TASKS)} (see `unlabel list`)")
    module, _, attribute = TASKS[name][0].partition(":")
    return getattr(import_module(module), attribute)
