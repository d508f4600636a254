"""Count the bytes of a training step without running it (Sec. 3.1).

On torch's meta device tensors have a shape and no content: a whole step of a T5-3B takes a second
and no memory. `training_step` follows every storage from birth to death, and tells what is alive at
the peak: weights, gradients, AdamW's moments ("optimizer"), saved activations (alive between
forward and backward; formula.py predicts them) and temporaries. Not counted: the CUDA context
(about 0.5 GB), what kernels need inside, and fragmentation.
"""
import weakref
from collections.abc import Callable, Collection, Iterable
from types import SimpleNamespace

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from memory.environment import environment, loss_with_caches
from run import kernels

GB = 2**20 * 1000  # the paper's "GB" is 1000 MiB
Batch = tuple[Tensor, ...]


def make_batch(B: int, S: int, T: int, V: int, images: tuple[int, int, int] | None = None) -> Batch:
    """Source ids (B, S), mask, decoder ids (B, T), labels; images (N, P, C): also (B, N, P, C)."""
    ids, mask = torch.randint(2, V, (B, S)), torch.ones(B, S, dtype=torch.bool)
    decoder_ids, labels = (torch.full((B, T), i) for i in (0, 1))
    return ids, mask, decoder_ids, labels, *([torch.randn(B, *images)] if images else [])


def loss_of(net: nn.Module, batch: Batch) -> Tensor:
    source_ids, source_mask, decoder_ids, labels, *images = batch
    logits = net(source_ids, source_mask, decoder_ids, None, *images)
    return kernels.cross_entropy(logits.flatten(0, 1), labels.flatten()).mean()


def bytes_of(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def storage_of(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata  # its data_ptr is 0 on the meta device


class Live(TorchDispatchMode):
    """See every operation: which storages it makes, and when they die.

    alive, at_peak: storages with their bytes, rounded up to `block` as by CUDA's allocator; `known`
    tensors have 0. flops: operations of matrix products; multiply and add are two.
    """

    def __init__(self, known: Iterable[Tensor], block: int = 512):
        super().__init__()
        self.block, self.flops, self.total, self.most, self.at_peak = block, 0, 0, 0, []
        self.alive = {storage_of(tensor): SimpleNamespace(bytes=0) for tensor in known}

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        output = operation(*args, **(kwargs or {}))
        for tensor in tree_leaves(output):
            if isinstance(tensor, Tensor) and storage_of(tensor) not in self.alive:
                storage = tensor.untyped_storage()
                size = -(-storage.nbytes() // self.block) * self.block
                self.alive[storage._cdata] = SimpleNamespace(bytes=size, kind="temporary")
                self.total += size
                weakref.finalize(storage, self.forget, storage._cdata)
        if self.total > self.most:
            self.most, self.at_peak = self.total, list(self.alive.values())
        if count := flop_registry.get(operation.overloadpacket):
            self.flops += count(*args, **(kwargs or {}), out_val=output)
        return output

    def forget(self, storage: int) -> None:
        self.total -= self.alive.pop(storage).bytes


def training_step(net: nn.Module, batch: Batch, conventions: Collection[str] = ()) -> dict:
    """Return the bytes at the peak of any step but the first, by kind, under these conventions.

    AdamW's float32 moments exist, gradients do not yet; fused AdamW makes no temporaries.
    saved_by_forward: all saved activations after the forward pass; the peak may lie elsewhere.
    """
    trained, images = [p for p in net.train().parameters() if p.requires_grad], bytes_of(batch[4:])
    for p in trained:
        p.grad = torch.zeros_like(p) if "gradients" in conventions else None
    weights = [*net.parameters(), *net.buffers()]  # NF4 weights are buffers
    known = [*weights, *batch, *(p.grad for p in trained if p.grad is not None)]
    forward = loss_with_caches if "cache" in conventions else loss_of
    with environment(conventions), Live(known) as live:
        loss = forward(net, batch)
        saved = list(live.alive.values())
        for storage in saved:
            storage.kind = "saved_activations"
        loss.backward()
        for p in trained:
            live.alive[storage_of(p.grad)].kind = "gradients"
    kinds = {"weights": bytes_of(weights),
             "gradients": bytes_of(trained) * bool({"gradients", "buckets"} & {*conventions}),
             "optimizer": 8 * sum(p.numel() for p in trained), "temporary": 0,
             "saved_activations": images}  # for the gradient of the visual embedding's projection
    for storage in live.at_peak:
        kinds[storage.kind] += storage.bytes
    saved_by_forward = images + sum(storage.bytes for storage in saved)
    return kinds | {"peak": sum(kinds.values()), "saved_by_forward": saved_by_forward,
                    "flops": live.flops}


def inference(net: nn.Module, batch: Batch) -> int:
    """Return the bytes at the peak of encoding and of generating as many tokens as labels."""
    source_ids, source_mask, decoder_ids, _, *images = batch
    weights = [*net.eval().parameters(), *net.buffers()]
    with torch.no_grad(), environment(), Live([*weights, *batch]) as live:
        state = net.start(source_ids, source_mask, *images)
        for _ in range(decoder_ids.size(1)):
            net.step(decoder_ids[:, :1], state)
    return bytes_of([*weights, *images]) + live.most


def saved_bytes(run: Callable[[], Tensor], left_out: Iterable[Tensor]) -> int:
    """Return the bytes that autograd's own hooks see saved in `run`, but for `left_out`."""
    left_out, saved = {storage_of(tensor) for tensor in left_out}, {}

    def save(tensor: Tensor) -> Tensor:
        saved[storage_of(tensor)] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor), environment():
        _graph = run()  # held to the end: no storage is freed, and its place counted twice
    return sum(size for storage, size in saved.items() if storage not in left_out)
