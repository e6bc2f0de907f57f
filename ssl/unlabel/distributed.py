"""Rank, world size, barrier, is_main, a differentiable mean: nothing else. One process is the same code."""

from __future__ import annotations

import os
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.distributed.nn.functional as dist_fn
from torch import Tensor

from unlabel.errors import UserError

__all__ = [
    "any_rank",
    "barrier",
    "from_main",
    "is_main",
    "mean",
    "pick_device",
    "rank",
    "start",
    "stop",
    "world_size",
]


def start(device: torch.device) -> None:
    """Join the process group that torchrun describes; without torchrun, nothing to do."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
        # Long: the others wait while rank 0 packs the images. A rank that dies is torchrun's to notice.
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(days=1))


def stop() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def pick_device(wanted: str) -> torch.device:
    """``auto``: this process's GPU, else Apple's, else the CPU."""
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if wanted == "cuda" and not torch.cuda.is_available():
        raise UserError("no CUDA device here: use --device cpu (or auto)")
    if wanted == "mps" and not torch.backends.mps.is_available():
        raise UserError("no MPS device here: use --device cpu (or auto)")
    if wanted == "cuda" or (wanted == "auto" and torch.cuda.is_available()):
        torch.cuda.set_device(local)
        return torch.device("cuda", local)
    if wanted == "mps" or (wanted == "auto" and torch.backends.mps.is_available()):
        return torch.device("mps")
    return torch.device("cpu")


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    return rank() == 0


def barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


def mean(x: Tensor) -> Tensor:
    """The mean over ranks, differentiable on each of them: for tasks with a batch statistic."""
    return dist_fn.all_reduce(x) / world_size() if dist.is_initialized() else x


def from_main(value: float) -> float:
    """Rank 0's number, on every rank."""
    if not dist.is_initialized():
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def any_rank(flag: bool, device: torch.device) -> bool:
    """True on every rank as soon as it is true on one."""
    if not dist.is_initialized():
        return flag
    total = torch.tensor(int(flag), device=device)
    dist.all_reduce(total)
    return bool(total.item())
