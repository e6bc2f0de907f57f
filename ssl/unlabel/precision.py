"""bf16 where the hardware is faster in it: detected, not assumed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from unlabel.errors import UserError

__all__ = ["autocast", "pick_precision"]


def _bf16_is_fast(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type == "cpu":
        try:
            with open("/proc/cpuinfo") as file:
                return _cpu_is_fast(file.read())
        except OSError:
            return False
    return False


def _cpu_is_fast(cpuinfo: str) -> bool:
    """Of Linux's description of the processor, whether bf16 pays on it.

    Emulated it is ten times slower than fp32. AVX512-BF16 without AMX pays on AMD's; on Intel's, which have two units
    for fp32's products and one for bf16's, training is a sixth slower with it.
    """
    return "amx_bf16" in cpuinfo or ("avx512_bf16" in cpuinfo and "AuthenticAMD" in cpuinfo)


def pick_precision(wanted: str, device: torch.device) -> str:
    """``fp32`` or ``bf16``."""
    if wanted == "auto":
        return "bf16" if _bf16_is_fast(device) else "fp32"
    if wanted not in ("fp32", "bf16"):
        raise UserError(f"unknown precision {wanted!r}: auto, fp32 or bf16")
    return wanted


@contextmanager
def autocast(device: torch.device, precision: str) -> Iterator[None]:
    """Mixed precision, for training, too."""
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16"):
        if precision == "bf16" and device.type == "cpu":
            with _TinyMapsInFull():
                yield
        else:
            yield


class _TinyMapsInFull(TorchFunctionMode):
    """A convolution whose kernel hangs over both edges of the map at once is computed in fp32.

    Of such a one (3×3 of stride 2 on a map of one pixel, 7×7 on 2×2), torch 2.14 leaves parts of the weights' gradient
    in bf16 on CPUs as the memory was: any number, infinite ones, too, and another one each time.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.conv2d and torch.is_autocast_enabled("cpu"):
            return _conv2d(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _conv2d(
    input: Tensor,  # noqa: A002  # torch's name
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Tensor:
    dilation = _pair(dilation)
    spans = [(k - 1) * d + 1 for k, d in zip(weight.shape[2:], dilation, strict=True)]
    if isinstance(padding, str):
        before = [span // 2 if padding == "same" else 0 for span in spans]
    else:
        before = _pair(padding)
    if any(p > 0 and side < span - p for side, span, p in zip(input.shape[-2:], spans, before, strict=True)):
        with torch.autocast("cpu", enabled=False):
            return F.conv2d(input.float(), weight, bias, stride, padding, dilation, groups)
    return F.conv2d(input, weight, bias, stride, padding, dilation, groups)


def _pair(value: Any) -> tuple[int, ...]:
    return (value, value) if isinstance(value, int) else tuple(value)
