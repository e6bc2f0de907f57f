"""bf16 where the hardware has it: detected, not assumed."""

from __future__ import annotations

import torch

from unlabel.errors import UserError

__all__ = ["autocast", "pick_precision"]


def _bf16_is_fast(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type == "cpu":
        # Emulated bf16 is ten times slower than fp32: ask for the instructions, not for "supported".
        try:
            with open("/proc/cpuinfo") as file:
                flags = file.read()
        except OSError:
            return False
        return "avx512_bf16" in flags or "amx_bf16" in flags
    return False


def pick_precision(wanted: str, device: torch.device) -> str:
    """``fp32`` or ``bf16``."""
    if wanted == "auto":
        return "bf16" if _bf16_is_fast(device) else "fp32"
    if wanted not in ("fp32", "bf16"):
        raise UserError(f"unknown precision {wanted!r}: auto, fp32 or bf16")
    return wanted


def autocast(device: torch.device, precision: str) -> torch.autocast:
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16")
