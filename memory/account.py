"""Count the bytes of a training step without running it (Sec. 3.1).

On torch's meta device tensors have a shape and no content: a T5-3B takes no memory, and a whole
step, forward and backward, passes in a second. `training_step` follows every storage from birth to
death, and tells what is alive at the peak: weights, gradients, AdamW's moments ("optimizer"), saved
activations (alive between forward and backward; formula.py predicts them) and temporaries. Not
counted: the CUDA context (about 0.5 GB), what kernels need inside, and fragmentation.
"""
import weakref
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from itertools import accumulate
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from memory.published import loss_with_caches, of_2021

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
    return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())


def bytes_of(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def storage_of(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata  # its data_ptr is 0 on the meta device


class Live(TorchDispatchMode):
    """See every operation, and note when a storage is born and when it dies.

    Bytes are rounded up to `block`, as CUDA's allocator does; `known` tensors do not count.
    """

    def __init__(self, known: Iterable[Tensor], block: int = 512):
        super().__init__()
        self.block, self.diary = block, []  # (number, bytes) at birth, (number, -bytes) at death
        self.alive = {storage_of(tensor): (-1, 0) for tensor in known}  # (number, bytes)

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        output = operation(*args, **(kwargs or {}))
        for tensor in tree_leaves(output):
            if isinstance(tensor, Tensor) and storage_of(tensor) not in self.alive:
                storage, number = tensor.untyped_storage(), len(self.diary)
                size = -(-storage.nbytes() // self.block) * self.block
                self.alive[storage._cdata] = number, size
                self.diary.append((number, size))
                weakref.finalize(storage, self.bury, storage._cdata)
        return output

    def bury(self, storage: int) -> None:
        number, size = self.alive.pop(storage)
        self.diary.append((number, -size))

    def at_peak(self) -> dict[int, int]:
        """{number: bytes} of what was alive when most was."""
        totals = list(accumulate((size for _, size in self.diary), initial=0))
        until = self.diary[: totals.index(max(totals))]
        dead = {number for number, size in until if size < 0}
        return {number: size for number, size in until if number not in dead}


def training_step(net: nn.Module, batch: Batch, conventions: Collection[str] = ()) -> dict:
    """Return the bytes at the peak of any step but the first, by kind, under these conventions.

    AdamW's moments exist, gradients do not yet; fused AdamW makes no temporaries.
    saved_by_forward: all saved activations after the forward pass; the peak may lie elsewhere.
    """
    trained, images = [p for p in net.train().parameters() if p.requires_grad], bytes_of(batch[4:])
    if "gradients" in conventions:
        for p in trained:
            p.grad = torch.zeros_like(p)
    forward = loss_with_caches if "cache" in conventions else loss_of
    known = [*net.parameters(), *batch, *(p.grad for p in trained if p.grad is not None)]
    try:
        with kernels_of_cuda(), of_2021(conventions), Live(known) as live:
            loss = forward(net, batch)
            saved = dict(live.alive.values())
            loss.backward()
            gradients = [p.grad for p in trained if p.grad is not None]
            gradients = {live.alive[storage_of(gradient)][0] for gradient in gradients}
    finally:
        net.zero_grad(set_to_none=True)
    allocated = "gradients" in conventions or "buckets" in conventions
    kinds = {"weights": bytes_of(net.parameters()), "gradients": bytes_of(trained) * allocated,
             "optimizer": 8 * sum(p.numel() for p in trained),
             "saved_activations": images,  # for the gradient of the visual embedding's projection
             "temporary": 0}
    for number, size in live.at_peak().items():
        kind = "gradients" if number in gradients else "temporary"
        kinds["saved_activations" if number in saved else kind] += size
    saved_by_forward = images + sum(saved.values())
    return kinds | {"peak": sum(kinds.values()), "saved_by_forward": saved_by_forward}


def inference(net: nn.Module, batch: Batch) -> int:
    """Return the bytes at the peak of encoding and of generating as many tokens as labels."""
    net.eval()
    source_ids, source_mask, decoder_ids, _, *images = batch
    with torch.no_grad(), kernels_of_cuda(), Live([*net.parameters(), *batch]) as live:
        state = net.start(source_ids, source_mask, *images)
        for _ in range(decoder_ids.size(1)):
            net.step(decoder_ids[:, :1], state)
    return bytes_of([*net.parameters(), *images]) + sum(live.at_peak().values())


def flops(net: nn.Module, batch: Batch) -> int:
    """Return the operations of a step's matrix products; multiply and add are two."""
    with kernels_of_cuda(), FlopCounterMode(display=False) as counter:
        loss_of(net.train(), batch).backward()
    net.zero_grad(set_to_none=True)
    return counter.get_total_flops()


def saved_bytes(run: Callable[[], Tensor], left_out: Iterable[Tensor] = ()) -> int:
    """Return the bytes that autograd's own hooks see saved in `run`, but for `left_out`."""
    left_out, saved = {storage_of(tensor) for tensor in left_out}, {}

    def save(tensor: Tensor) -> Tensor:
        saved[storage_of(tensor)] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor), kernels_of_cuda():
        output = run()  # holds the graph, so that no storage is freed and its place counted twice
    del output
    return sum(size for storage, size in saved.items() if storage not in left_out)


class FusedNorm(torch.autograd.Function):
    """RMSNorm as CUDA's one kernel, which keeps x (..., D) and 1 / rms (..., 1)."""

    @staticmethod
    def forward(context, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        scale = torch.rsqrt(x.float().square().mean(dim=-1, keepdim=True) + epsilon)
        context.save_for_backward(x, weight, scale)
        return (x * scale * weight).to(x.dtype)

    @staticmethod
    def backward(context, g: Tensor):
        x, weight, scale = context.saved_tensors
        normed, trained = x * scale, context.needs_input_grad[1]
        weight_gradient = (g * normed).flatten(0, -2).sum(dim=0) if trained else None
        g = g * weight
        g = scale * (g - normed * (g * normed).mean(dim=-1, keepdim=True))
        return g.to(x.dtype), weight_gradient, None


def attention(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor, dropout_p: float,
              scale: float) -> Tensor:
    """scaled_dot_product_attention by CUDA's memory-efficient kernel."""
    S, kernel = k.size(2), torch.ops.aten._scaled_dot_product_efficient_attention
    bias = attn_mask.to(q.dtype).expand(*q.shape[:3], S)
    if S % 16:  # the kernel wants aligned rows, so torch makes a padded copy for each layer
        bias = F.pad(bias, (0, -S % 16))[..., :S]
    return kernel(q, k, v, bias, torch.is_grad_enabled(), dropout_p, scale=scale)[0]


@contextmanager
def kernels_of_cuda() -> Iterator[None]:
    """On the meta device torch takes other paths, which keep more: call CUDA's kernels by name."""
    kernels = {
        "scaled_dot_product_attention": attention,
        "rms_norm": lambda x, shape, weight, epsilon: FusedNorm.apply(x, weight, epsilon),
        "dropout": lambda x, p, training, _: torch.native_dropout(x, p, True)[0] if training else x}
    with patch.multiple(F, **kernels):
        yield
