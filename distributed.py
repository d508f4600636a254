"""More than one process, as `torchrun --nproc-per-node N train.py ...` starts them; in a process alone, each function here does nothing.

Every process holds the whole frozen backbone and takes its share of each batch.  torch's DistributedDataParallel adds up the gradients
of what trains; the backbone has none, and is neither sent nor compared.
"""
import contextlib
import os

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


def start(device: str) -> str:
    """Join the processes that torchrun has started; this one's device.  ValueError: more processes than GPUs."""
    if not {"RANK", "WORLD_SIZE", "LOCAL_RANK"} <= os.environ.keys():
        return device
    if device.startswith("cuda:"):
        raise ValueError(f"--device {device} with torchrun: give --device cuda, and each process takes a GPU of its own")
    if device == "cuda":
        if (local := int(os.environ["LOCAL_RANK"])) >= torch.cuda.device_count():
            raise ValueError(f"--nproc-per-node asks for more processes than the {torch.cuda.device_count()} GPUs here")
        torch.cuda.set_device(local)
        device = f"cuda:{local}"
    if not dist.is_initialized():
        dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    return device


def rank() -> int:
    """0 in the process that writes and speaks."""
    return dist.get_rank() if dist.is_initialized() else 0


def processes() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def wrap(model: nn.Module) -> nn.Module:
    """The model, whose backward adds up the gradients of all processes.  What is frozen is left out, so only what trains is ever sent."""
    if not dist.is_initialized():
        return model
    # torch has no public way to leave parameters out; without this it would send the whole backbone once
    frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, frozen)
    return DistributedDataParallel(model, forward_sync_buffers=False)


def sent_later(model: nn.Module) -> contextlib.AbstractContextManager:
    """Around a backward that is not the last of its step: the gradient stays here for now."""
    return model.no_sync() if isinstance(model, DistributedDataParallel) else contextlib.nullcontext()


def total(value: Tensor) -> Tensor:
    """The sum over all processes, in all of them."""
    if dist.is_initialized():
        dist.all_reduce(value)
    return value


def gather(mine: dict) -> dict:
    """All processes' dicts as one, in all of them."""
    if not dist.is_initialized():
        return mine
    parts = [None] * processes()
    dist.all_gather_object(parts, mine)
    return {key: value for part in parts for key, value in part.items()}


def agree(value):
    """What the process of rank 0 has as `value`, in all of them: for what only one of them should decide."""
    if dist.is_initialized():
        dist.broadcast_object_list(values := [value])
        value = values[0]
    return value


def wait() -> None:
    """Until every process has come here."""
    if dist.is_initialized():
        dist.barrier()
