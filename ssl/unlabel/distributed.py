"""Rank, world size, who goes first, a differentiable mean, who is missing. One process is the same code."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from unlabel.augment import works_on
from unlabel.errors import UserError

__all__ = ["RankLost", "any_rank", "barrier", "from_main", "gathered", "gradients_shared", "in_turn", "is_main", "mean"]
__all__ += ["naming_the_missing", "pick_device", "rank", "refuse_several"]
__all__ += ["same_everywhere", "start", "stop", "world_size", "wrapped"]

ALIVE_SECONDS = 5.0  # between two signs of life of a process that others wait for
MOST_MINUTES = 100_000
LOST_SECONDS = 10.0  # that a process waits, once it gave up, for the others to give up too


_generation = ""  # of this start of the processes
_patience = 0.0  # seconds without a sign of life


class RankLost(Exception):
    """Another process did not come: it died, hangs, or cannot be reached. A restart goes on from the checkpoint."""

    code = 75  # EX_TEMPFAIL of sysexits.h


def _environment() -> dict[str, str]:
    """What torchrun says of this process; UserError where it is no numbers."""
    named = {k: os.environ.get(k, default) for k, default in (("WORLD_SIZE", "1"), ("RANK", "0"), ("LOCAL_RANK", "0"))}
    if bad := [k for k, v in named.items() if not (v.isascii() and v.isdecimal())]:
        raise UserError(f"{bad[0]} is {named[bad[0]]!r} in the environment: start several processes with torchrun")
    return named


def start(device: torch.device, minutes: float = 30.0) -> None:
    """Join the process group that torchrun describes; without torchrun, nothing to do.

    ``minutes``: after which a process that waits for another one in a step gives up.
    """
    global _generation, _patience
    _patience = 60 * minutes
    if not 0 < minutes < MOST_MINUTES:
        raise UserError(f"--rank-timeout {minutes:g}: minutes, above 0 and below {MOST_MINUTES:,}")
    named = _environment()
    if int(named["WORLD_SIZE"]) > 1 and "RANK" not in os.environ:
        raise UserError("WORLD_SIZE is set in the environment and RANK is not: start several processes with torchrun")
    if int(named["WORLD_SIZE"]) > 1 and not dist.is_initialized():
        backend = "nccl" if device.type == "cuda" else "gloo"
        try:
            dist.init_process_group(backend, timeout=timedelta(minutes=minutes))
        except (RuntimeError, dist.DistError) as error:
            raise RankLost(f"the processes did not find one another ({str(error).splitlines()[0]})") from None
        except ValueError as error:
            raise UserError(f"{str(error).splitlines()[0]}: start several processes with torchrun") from None
        # torchrun's store outlives its restarts: what was said in it before does not count.
        box = [uuid.uuid4().hex]
        dist.broadcast_object_list(box, src=0, device=device)
        _generation = box[0]
        _store().set(f"host/{rank()}", socket.gethostname())


def refuse_several(what: str) -> None:
    """UserError under torchrun: each process would do and write all of it."""
    if int(_environment()["WORLD_SIZE"]) > 1 and "RANK" in os.environ:
        raise UserError(f"{what} run in one process: leave torchrun to `unlabel pretrain`, compare its runs by --also")


def stop() -> None:
    if dist.is_initialized():
        # torch 2.6 joins Gloo's thread with Python's lock held, which that thread may need to let go of a tensor.
        time.sleep(0.1)
        dist.destroy_process_group()


def pick_device(wanted: str) -> torch.device:
    """``auto``: this process's GPU, else Apple's, else the CPU."""
    local = int(_environment()["LOCAL_RANK"])
    if wanted == "cuda" and not torch.cuda.is_available():
        raise UserError("no CUDA device here: use --device cpu (or auto)")
    apples = torch.backends.mps.is_available()
    if wanted == "mps" and not apples:
        raise UserError("no MPS device here: use --device cpu (or auto)")
    if wanted == "cuda" or (wanted == "auto" and torch.cuda.is_available()):
        if local >= (there := torch.cuda.device_count()):
            raise UserError(f"this is process {local + 1} here, and there are {there} GPUs: start one process for each")
        torch.cuda.set_device(local)
        return torch.device("cuda", local)
    if wanted == "mps" or (wanted == "auto" and apples):
        if works_on("mps"):
            return torch.device("mps")
        if wanted == "mps":
            raise UserError(
                "this version of torch cannot resize images on MPS: install a newer one, or use --device cpu"
            )
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


def _store() -> Any:
    return dist.PrefixStore(  # pyright: ignore[reportPrivateImportUsage]
        f"unlabel/{_generation}", dist.distributed_c10d._get_default_store()
    )


def _wait_for(keys: list[str], turn: str) -> None:
    """Until others are done; RankLost where one of them failed, or nothing was heard of them for ``--rank-timeout``."""
    heard, since = -1, time.monotonic()
    while not _store().check(keys):
        if _store().check([f"{turn}/failed"]):
            raise RankLost("another process failed while it prepared something: it says why")
        if (now := _store().add(f"{turn}/alive", 0)) != heard:
            heard, since = now, time.monotonic()
        if time.monotonic() - since > max(_patience, 3 * ALIVE_SECONDS):
            raise RankLost(_who_is_missing("nothing was heard of it while it prepared something"))
        time.sleep(0.1)


@contextlib.contextmanager
def _heard_of(turn: str) -> Iterator[None]:
    """Inside, the others hear that this process is at work; and if it fails, that it did."""
    store, over = _store(), threading.Event()

    def tell() -> None:
        while not over.wait(ALIVE_SECONDS):
            store.add(f"{turn}/alive", 1)

    thread = threading.Thread(target=tell, daemon=True)
    thread.start()
    try:
        yield
    except BaseException:
        store.set(f"{turn}/failed", str(rank()))
        raise
    finally:
        over.set()
        thread.join()


_turns = 0  # how often ``in_turn`` was entered: the same number on every rank


@contextlib.contextmanager
def in_turn() -> Iterator[None]:
    """Rank 0 first, then the first process of every other node, then the rest: so that work that leaves files is done
    once, or where nodes do not share the folder, once for each node. The others wait, however long it takes, and all
    leave together as far as nodes go.
    """
    global _turns
    if not dist.is_initialized():
        yield
        return
    _turns += 1
    done = f"turn/{_turns}"
    mine = f"{done}/{os.environ.get('GROUP_RANK', '0')}"
    first_here = os.environ.get("LOCAL_RANK", "0") == "0"
    if not is_main():
        _wait_for([done if first_here else mine], done)
    with _heard_of(done):
        yield
    if is_main():
        _store().set(done, "1")
    if first_here:
        _store().set(mine, "1")
    nodes = os.environ.get("GROUP_WORLD_SIZE", "1")
    _wait_for([f"{done}/{k}" for k in range(int(nodes) if nodes.isdecimal() else 1)], done)


def same_everywhere(value: Any, what: str) -> None:
    """UserError where ``value`` differs between ranks: ``what`` says how that can be."""
    if not dist.is_initialized():
        return
    found: list[Any] = [None] * world_size()
    dist.all_gather_object(found, value)
    if any(other != found[0] for other in found):
        listed = ", ".join(f"rank {k}: {v}" for k, v in enumerate(found))
        raise UserError(f"{what} ({listed})")


@contextlib.contextmanager
def naming_the_missing() -> Iterator[None]:
    """Where torch gives up waiting for another process inside, says which one did not come (on CPUs; NCCL's own
    watchdog ends the process and names the collective)."""
    try:
        yield
    except RuntimeError as error:
        text = str(error).lower()
        lost = any(word in text for word in ("timed out", "connection", "gloo", "nccl", "broken pipe", "socket"))
        if not dist.is_initialized() or not lost:
            raise
        raise RankLost(_who_is_missing(str(error).splitlines()[0])) from None


def _who_is_missing(reason: str) -> str:
    """Every process that gives up leaves a word in the store. Whoever leaves none is missing."""
    everybody = range(world_size())
    missing: list[int] = []
    hosts: dict[int, str] = {}
    try:
        store = _store()
        hosts = {k: store.get(f"host/{k}").decode() for k in everybody}
        store.set(f"lost/{rank()}", "1")
        until = time.monotonic() + LOST_SECONDS
        while (missing := [k for k in everybody if not store.check([f"lost/{k}"])]) and time.monotonic() < until:
            time.sleep(0.2)
    except RuntimeError:  # the store was the missing process's
        missing = [0]
    names = ", ".join(f"rank {k} on {hosts.get(k, '?')}" for k in missing) or "none: the network between them failed"
    return (
        f"a process did not come (missing of {world_size()}: {names}; {reason[:200]}); "
        "the same command continues; so does torchrun --max-restarts N, with TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"
    )


class _Sum(torch.autograd.Function):
    """The sum over ranks. Every rank's loss depends on every rank's x: gradients are summed, too."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.clone().contiguous()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return _Sum.forward(ctx, grads[0])


def mean(x: Tensor) -> Tensor:
    """The mean over ranks, differentiable on each of them: for tasks with a batch statistic."""
    return _Sum.apply(x) / world_size() if dist.is_initialized() else x


def gathered(x: Tensor) -> Tensor:
    """The rows (N, …) of all ranks, one rank below the other, differentiable: for tasks that compare images."""
    if not dist.is_initialized():
        return x
    rows = torch.stack([x if r == rank() else torch.zeros_like(x) for r in range(world_size())])
    return _Sum.apply(rows).flatten(0, 1)


def from_main(value: float) -> float:
    """Rank 0's number, on every rank."""
    if not dist.is_initialized():
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def wrapped(model: nn.Module, device: torch.device) -> nn.Module:
    """``model`` in DDP; in one process, itself."""
    if not dist.is_initialized():
        return model
    ids = [device.index] if device.type == "cuda" else None
    # Else DDP lays its buckets out anew after its first step, so that a continued run adds in another order. (Two
    # numbers have one order only.)
    ordered = world_size() > 2
    return nn.parallel.DistributedDataParallel(model, device_ids=ids, find_unused_parameters=ordered)


def gradients_shared(model: nn.Module, last: bool) -> contextlib.AbstractContextManager[Any]:
    """Between processes, gradients are averaged once in a step: with the last of its parts."""
    if last or not isinstance(model, nn.parallel.DistributedDataParallel):
        return contextlib.nullcontext()
    return model.no_sync()


def any_rank(device: torch.device, *flags: bool) -> tuple[bool, ...]:
    """Each is true on every rank as soon as it is true on one."""
    if not dist.is_initialized():
        return flags
    total = torch.tensor(list(map(int, flags)), device=device)
    dist.all_reduce(total)
    return tuple(map(bool, total.tolist()))
