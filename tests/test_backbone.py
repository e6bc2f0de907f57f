from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from packaging.version import Version
from safetensors.torch import load_file, save_file

from unlabel.augment import clean
from unlabel.backbone import Backbone, build_backbone, load_backbone, save_backbone
from unlabel.batchnorm import estimate_statistics
from unlabel.cache import load_cache
from unlabel.config import PretrainConfig
from unlabel.errors import UserError
from unlabel.pretrain import pretrain
from unlabel.sources import open_source

FAMILIES = ["resnet18", "resnetv2_50", "convnext_atto", "regnety_002", "efficientnet_b0", "mobilenetv3_small_050"]


@pytest.mark.parametrize("name", ["small", *FAMILIES])
@pytest.mark.parametrize("size", [32, 64])
def test_families_save_and_load(name: str, size: int, tmp_path: Path):
    if (name, size) == ("resnetv2_50", 32) and Version(timm.__version__) < Version("1.0.31"):
        pytest.skip("before 1.0.31 timm's resnetv2 needs its own stem, which the error of building it says")
    backbone = build_backbone(name, size, seed=1).eval()
    images = torch.rand(2, 3, size, size)
    with torch.no_grad():
        features = backbone(images)
        assert torch.allclose(backbone.model.forward_features(backbone.normalise(images)), features.last, atol=1e-4)
        strides = [int(s.removeprefix("s")) for s in features.stages]
        assert strides == sorted(set(strides))
        for stride, maps in zip(strides, features.stages.values(), strict=True):
            assert maps.shape[-1] == -(-size // stride)
        assert torch.allclose(features.pooled, features.last.mean((2, 3)))
        save_backbone(backbone, tmp_path)
        again = load_backbone(tmp_path)
        assert torch.equal(again(images).pooled, features.pooled)
        about = json.loads((tmp_path / "backbone.json").read_text())
        plain: Any = timm.create_model(about["name"], **about["kwargs"], num_classes=0).eval()
        state = load_file(tmp_path / "backbone.safetensors")
        if about["changed"]:
            with pytest.raises(RuntimeError, match="unlabel_stem"):
                plain.load_state_dict(state, strict=True)
        else:
            plain.load_state_dict(state, strict=True)
            assert torch.allclose(plain.forward_features(backbone.normalise(images)), features.last, atol=1e-6)


def test_small_images_keep_their_resolution():
    with torch.no_grad():
        first = next(iter(build_backbone("resnet18", 32).eval()(torch.rand(1, 3, 32, 32)).stages.values()))
        assert first.shape[-1] == 32  # 7×7 stride 2 and a pool would leave 8
        assert build_backbone("resnet18", 64).changed == ()
        assert build_backbone("resnet18", 32, "timm").changed == ()
        assert build_backbone("resnet18", 64, "small").changed == ("conv1.weight",)


def test_grey_equals_repeated_grey():
    backbone = build_backbone("small", 32).eval()
    grey = torch.rand(2, 1, 32, 32)
    with torch.no_grad():
        assert torch.equal(backbone(grey).pooled, backbone(grey.repeat(1, 3, 1, 1)).pooled)


def test_seed_decides_the_weights():
    a, b, c = (build_backbone("small", 32, seed=s).state_dict() for s in (0, 0, 1))
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert not torch.equal(a["model.conv1.weight"], c["model.conv1.weight"])
    assert not any("mean" in k and "running" not in k for k in a)  # normalisation is not in the state dict


def test_wrong_files_are_refused(tmp_path: Path):
    save_backbone(build_backbone("small", 32), tmp_path)
    path = tmp_path / "backbone.safetensors"
    state = load_file(path)
    del state["bn1.bias"]
    save_file(state, path)
    with pytest.raises(UserError, match=r"1 missing.*bn1.bias"):
        load_backbone(tmp_path)
    path.write_bytes(b"\x80\x04cos\nsystem\n")
    with pytest.raises(UserError, match="not a readable safetensors"):
        load_backbone(tmp_path)
    with pytest.raises(UserError, match="is the run finished"):
        load_backbone(tmp_path / "nothing")
    with pytest.raises(UserError, match="unlabel list"):
        build_backbone("resnet_that_is_not", 32)


def keep(inputs: list[torch.Tensor]):
    def hook(_module: torch.nn.Module, args: Any) -> None:
        inputs.append(args[0])

    return hook


def test_batchnorm_statistics_match_what_clean_images_give():
    """Per-channel mean and variance at every BatchNorm input, within 2 %."""
    torch.manual_seed(0)
    backbone = build_backbone("small", 32)
    images = torch.rand(512, 1, 1, 1) + 0.3 * torch.rand(512, 3, 32, 32)
    backbone.train()(torch.rot90(images, 1, (2, 3)) * 3)  # statistics of something else
    assert estimate_statistics(backbone, images.split(256)) == 12
    assert_statistics_fit(backbone, images)


def test_a_network_that_reads_its_weights_while_it_is_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """As ConvNeXt does in older versions of timm: how large it is cannot be known before memory is taken."""
    create = timm.create_model

    def reading(*args: Any, **kwargs: Any) -> Any:
        float(torch.zeros(1))  # of a tensor without memory: NotImplementedError
        return create(*args, **kwargs)

    monkeypatch.setattr(timm, "create_model", reading)
    backbone = build_backbone("small", 32)
    save_backbone(backbone, tmp_path)
    assert torch.equal(load_backbone(tmp_path).model.conv1.weight, backbone.model.conv1.weight)


@pytest.mark.parametrize("task", ["rotation", "denoising"])
def test_the_statistics_of_an_exported_backbone_are_those_of_clean_images(task, digits_folder: Path, tmp_path: Path):
    """Not those of the turned or noisy views that it was trained on."""
    run = pretrain(PretrainConfig(tasks=(task,), data=(str(digits_folder),), out=tmp_path, image_size=16, epochs=1))
    cache = load_cache(open_source(str(digits_folder)), 16)
    assert_statistics_fit(load_backbone(run), clean(torch.from_numpy(np.array(cache.images[:])), 16))


def assert_statistics_fit(backbone: Backbone, images: torch.Tensor) -> None:
    seen: dict[str, list[torch.Tensor]] = {}
    norms = {n: m for n, m in backbone.named_modules() if isinstance(m, torch.nn.BatchNorm2d)}
    assert len(norms) == 12
    for name, module in norms.items():
        seen[name] = []
        module.register_forward_pre_hook(keep(seen[name]))
    with torch.no_grad():
        for part in images.split(128):
            backbone.eval()(part)
    for name, module in norms.items():
        x = torch.cat(seen[name])
        mean, std = x.mean((0, 2, 3)), x.std((0, 2, 3))
        assert module.running_mean is not None
        assert module.running_var is not None
        assert ((module.running_mean - mean).abs() / std).max() < 0.02, name
        assert (module.running_var / std.square() - 1).abs().max() < 0.02, name
