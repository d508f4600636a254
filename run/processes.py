"""Several processes, as torchrun starts them; in a single one each function here does nothing.

Each holds the frozen backbone and takes a share of every batch. DistributedDataParallel averages
the gradients of what trains.
"""
import contextlib
import os
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


def start(device: str) -> str:
    """Join the processes that torchrun has started, and return this one's device."""
    local = os.environ.get("LOCAL_RANK")
    if local and device.startswith("cuda"):
        device = f"cuda:{local}"
        torch.cuda.set_device(device)
    if local:
        dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    return device


def rank() -> int:
    """0 in the process that writes and prints."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def wrap(model: nn.Module) -> nn.Module:
    """The model with the first process's weights, whose backward averages over all processes."""
    if not dist.is_initialized():
        return model
    return DistributedDataParallel(model, forward_sync_buffers=False)  # NF4 weights are buffers


def no_sync(model: nn.Module) -> contextlib.AbstractContextManager:
    """Around a backward that is not the last of its step: gradients stay in their process."""
    return model.no_sync() if dist.is_initialized() else contextlib.nullcontext()


def all_reduce(value: Tensor) -> Tensor:
    """The sum over all processes."""
    if dist.is_initialized():
        dist.all_reduce(value)
    return value


def gather(mine: dict) -> dict:
    """The dicts of all processes merged into one."""
    parts = [mine] * world_size()
    if dist.is_initialized():
        dist.all_gather_object(parts, mine)
    return {key: value for part in parts for key, value in part.items()}


def first(function: Callable, *arguments):
    """Call a function on rank 0 only. Every process gets its result or error. Do not nest."""
    try:
        result = function(*arguments) if rank() == 0 else None
    except (ValueError, OSError) as error:
        result = error
    result = gather({rank(): result})[0]
    if isinstance(result, Exception):
        raise result
    return result
