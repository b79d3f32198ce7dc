"""The processes that torchrun starts for one run: how they find each other, and agree."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, redirect_stdout
from typing import Any

import torch
from torch import distributed as dist
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from .errors import JobFailed, one_line


@contextmanager
def joined_processes(device: str) -> Iterator[int]:
    """Join the other processes that torchrun started, if it did; give the rank of this one. Only rank 0 prints.

    Raises:
        ValueError: If torchrun was told to restart what it cannot.
        JobFailed: If another process has ended.

    """
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        yield 0
        return
    keys = "TORCHELASTIC_USE_AGENT_STORE", "TORCHELASTIC_MAX_RESTARTS", "GROUP_WORLD_SIZE"
    agent_store, restarts, hosts = (os.environ[key] for key in keys)
    if agent_store == "True" and restarts != "0" and hosts != "1":  # each host counts its own restarts
        raise ValueError(
            "torchrun --max-restarts on several hosts: TORCH_DISABLE_SHARE_RDZV_TCP_STORE is not set; allowed: 1. "
            "Without it restarted processes may find addresses of dead ones and wait for them"
        )
    if device == "cuda":
        if int(os.environ["LOCAL_WORLD_SIZE"]) > torch.cuda.device_count():
            raise ValueError(
                f"torchrun --nproc-per-node: found {os.environ['LOCAL_WORLD_SIZE']}; allowed: at most the "
                f"{torch.cuda.device_count()} GPUs of this machine"
            )
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    try:
        store, rank, size = next(rendezvous("env://"))
        if agent_store == "True":  # it outlives a restart, with the addresses of the dead
            store = PrefixStore(os.environ["TORCHELASTIC_RESTART_COUNT"], store)
        kind = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"  # gloo for objects: NCCL would spin while one works alone
        dist.init_process_group(kind, store=store, rank=rank, world_size=size)
        with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere) if dist.get_rank() else nullcontext():
            yield dist.get_rank()
    except RuntimeError as error:
        if not (isinstance(error, dist.DistError) or "gloo" in str(error)):
            raise
        raise JobFailed(f"another process of this run has ended, and says why if it could: {one_line(error)}") from error
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def from_first(value: Any) -> Any:
    """Give every process the value of the first one."""
    values = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(values)
    return values[0]


def of_all(facts: dict[str, Any]) -> dict[str, Any]:
    """Make sure that the processes of a run compute alike; join the names of their hardware.

    Raises:
        ValueError: Naming what differs.

    """
    if not dist.is_initialized():
        return facts
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, facts)
    for key in ("torch", "code_sha256", "precision", "compiled", "training_sha256"):
        if len(found := sorted({str(each[key]) for each in everyone})) > 1:
            raise ValueError(f"torchrun: found processes whose {key} is {' and '.join(found)}; allowed: one for all")
    return facts | {
        key: " and ".join(sorted({each[key] for each in everyone})) for key in ("processor", "instructions", "device")
    }
