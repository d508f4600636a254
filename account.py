"""Count the bytes of a training step without running it (Sec. 3.1).

On torch's meta device tensors have a shape and no content: a T5-3B takes no memory, and a whole step, forward and backward, passes in
a second.  `training_step` follows every tensor that such a step makes, from birth to death, and says what is alive at the peak:

    weights + optimizer + gradients + saved activations + temporary = peak

Saved activations are what is alive between forward and backward.  `layer_formula` predicts those bytes tensor by tensor, each with the
reason why backward needs it; the tests hold formula and count together to the byte.

Not in an account: the CUDA context (about half a gigabyte), what kernels need inside, and fragmentation.  Letters as in model.py,
F is d_ff and I the attention's inner width, H * K.
"""
import math
import weakref
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from itertools import accumulate
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

import model
from model import T5Config
from side import SideStack

Batch = tuple[Tensor, ...]


def make_batch(B: int, S: int, T: int, vocab_size: int, images: tuple[int, int, int] | None = None) -> Batch:
    """Source ids (B, S), mask, decoder ids (B, T), labels (B, T), and for images = (N, P, C) also these, (B, N, P, C): nothing padded."""
    text = torch.randint(2, vocab_size, (B, S)), torch.ones(B, S, dtype=torch.bool), torch.zeros(B, T, dtype=torch.long), torch.ones(B, T, dtype=torch.long)
    return text if images is None else (*text, torch.randn(B, *images))


def loss_of(net: nn.Module, batch: Batch) -> Tensor:
    source_ids, source_mask, decoder_ids, labels, *images = batch
    return F.cross_entropy(net(source_ids, source_mask, decoder_ids, None, *images).flatten(0, 1).float(), labels.flatten())


def bytes_of(parameters) -> int:
    return sum(p.numel() * p.element_size() for p in parameters)


# ------------------------------------------------------------------------------------------------------------- the count

class Live(TorchDispatchMode):
    """Sees every operation, and writes down when a storage is born and when it dies.

    A storage is counted once, however many tensors look at it; bytes are rounded up as CUDA's allocator does, to `block`.
    """

    def __init__(self, known: Iterator[Tensor], block: int = 512):
        super().__init__()
        self.block, self.diary, self.alive = block, [], {}  # diary: (number, bytes or -bytes); alive: storage -> (number, bytes)
        self.known = {tensor.untyped_storage()._cdata for tensor in known}

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        output = operation(*args, **(kwargs or {}))
        for tensor in tree_leaves(output):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if storage.nbytes() and storage._cdata not in self.alive and storage._cdata not in self.known:
                    size = -(-storage.nbytes() // self.block) * self.block
                    self.alive[storage._cdata] = len(self.diary), size
                    self.diary.append((len(self.diary), size))
                    weakref.finalize(storage, self.bury, storage._cdata)
        return output

    def bury(self, storage: int) -> None:
        number, size = self.alive.pop(storage)
        self.diary.append((number, -size))

    def numbers(self, tensors) -> set[int]:
        found = (self.alive.get(tensor.untyped_storage()._cdata) for tensor in tensors)
        return {entry[0] for entry in found if entry}

    def at_peak(self) -> dict[int, int]:
        """{number: bytes} of what was alive when most was."""
        totals = [0, *accumulate(size for _, size in self.diary)]
        until = self.diary[: totals.index(max(totals))]
        dead = {number for number, size in until if size < 0}
        return {number: size for number, size in until if number not in dead}


class FusedNorm(torch.autograd.Function):
    """What `rms_norm` keeps on CUDA, where it is one kernel: x (..., D) and 1 / rms (..., 1).  On the meta device torch takes it apart."""

    @staticmethod
    def forward(context, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        scale = torch.rsqrt(x.float().square().mean(dim=-1, keepdim=True) + epsilon)
        context.save_for_backward(x, weight, scale)
        return (x * scale * weight).to(x.dtype)

    @staticmethod
    def backward(context, g: Tensor):
        x, weight, scale = context.saved_tensors
        normed = x * scale
        weight_gradient = (g * normed).flatten(0, -2).sum(dim=0) if context.needs_input_grad[1] else None
        g = g * weight
        return (scale * (g - normed * (g * normed).mean(dim=-1, keepdim=True))).to(x.dtype), weight_gradient, None


def rms_norm(x: Tensor, shape, weight: Tensor, epsilon: float) -> Tensor:
    return FusedNorm.apply(x, weight, epsilon)


def efficient_attention(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor, dropout_p: float, scale: float) -> Tensor:
    """What `scaled_dot_product_attention` runs on CUDA, by name: on the meta device torch would take the textbook path."""
    bias = attn_mask.to(q.dtype).expand(*q.shape[:3], k.size(2))
    if bias.size(-1) % 16:  # the kernel wants aligned rows, so torch makes a padded copy for each layer
        bias = F.pad(bias, (0, -bias.size(-1) % 16))[..., : bias.size(-1)]
    return torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, bias, torch.is_grad_enabled(), dropout_p, scale=scale)[0]


@contextmanager
def kernels_of_cuda() -> Iterator[None]:
    with patch.object(F, "scaled_dot_product_attention", efficient_attention), patch.object(F, "rms_norm", rms_norm):
        yield


def training_step(net: nn.Module, batch: Batch, conventions: Collection[str] = ()) -> dict:
    """Bytes at the peak of a step like all but the first: AdamW's moments exist, gradients do not (fused AdamW makes no temporaries).

    saved_by_forward: all saved activations, at the end of forward; the peak may lie elsewhere.
    """
    trained = [p for p in net.parameters() if p.requires_grad]
    kinds = {"weights": bytes_of(net.parameters()), "gradients": 0, "optimizer": 8 * sum(p.numel() for p in trained)}
    images = bytes_of(batch[4:])  # stay for the gradient of the visual embedding's projection
    kinds |= {"saved_activations": images, "temporary": 0}
    net.train()
    if "buckets" in conventions:
        kinds["gradients"] = bytes_of(trained)
    if "gradients" in conventions:
        kinds["gradients"] = bytes_of(trained)
        for p in trained:
            p.grad = torch.zeros_like(p)
    known = [*net.parameters(), *batch, *(p.grad for p in trained if p.grad is not None)]
    try:
        with kernels_of_cuda(), of_2021(conventions), Live(known) as live:
            value = (loss_with_caches if "cache" in conventions else loss_of)(net, batch)
            saved = {number: size for number, size in live.alive.values()}
            value.backward()
            gradients = live.numbers(p.grad for p in trained if p.grad is not None)
    finally:
        for p in trained:
            p.grad = None
    for number, size in live.at_peak().items():
        kinds["saved_activations" if number in saved else "gradients" if number in gradients else "temporary"] += size
    return kinds | {"peak": sum(kinds.values()), "saved_by_forward": images + sum(saved.values())}


def flops(net: nn.Module, batch: Batch) -> int:
    """Floating-point operations of matrix products in a step, forward and backward (a multiplication and an addition are two)."""
    net.train()
    with kernels_of_cuda(), FlopCounterMode(display=False) as counter:
        loss_of(net, batch).backward()
    for p in net.parameters():
        p.grad = None
    return counter.get_total_flops()


def inference(net: nn.Module, batch: Batch) -> int:
    """Bytes at the peak of encoding a batch and generating as many tokens as it has labels, with a cache."""
    net.eval()
    source_ids, source_mask, decoder_ids, _, *images = batch
    with torch.no_grad(), kernels_of_cuda(), Live([*net.parameters(), *batch]) as live:
        state = net.start(source_ids, source_mask, 1, *images)
        for _ in range(decoder_ids.size(1)):
            net.step(decoder_ids[:, :1], state)
    return bytes_of([*net.parameters(), *images]) + sum(live.at_peak().values())


def saved_bytes(run: Callable[[], Tensor], left_out=()) -> int:
    """Bytes that autograd holds when `run` has returned, as its own hooks see them; storages of `left_out` do not count."""
    left_out = {tensor.untyped_storage()._cdata for tensor in left_out}
    saved = {}

    def see(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in left_out:
            saved[storage._cdata] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(see, lambda tensor: tensor), kernels_of_cuda():
        output = run()  # holds the graph, so that no storage is freed and its place counted twice
    del output
    return sum(saved.values())


# ----------------------------------------------------------------------------------------------------------- the formula

Row = tuple[str, tuple[int, ...], int, str]  # what, its shape, bytes of an element, why backward needs it


def layer_formula(config: T5Config, B: int, S: int, D: int | None = None) -> list[Row]:
    """What one encoder layer keeps for backward while all of it trains, tensor by tensor.

    With D, the backbone's width, `config` is a side network's (`side_config`) and the layer has its rung in front.
    """
    d, H, inner, d_ff = config.d_model, config.num_heads, config.num_heads * config.d_kv, config.d_ff
    rung = [] if D is None else [
        ("h_backbone", (B, S, D), 4, "gradient of down's weight: the one tensor of full width"),
        ("down(h_backbone)", (B, S, d), 4, "gradient of mu"),
        ("h_side", (B, S, d), 4, "gradient of 1 - mu"),
        ("mu, 1 - mu", (2,), 4, "gradients of the two streams")]

    def norm(of: str, reader: str) -> list[Row]:
        return [(of, (B, S, d), 4, "RMSNorm: gradients of its input and its weight"), ("1 / rms", (B, S, 1), 4, "the same"),
                (f"norm({of})", (B, S, d), 4, f"gradient of {reader}")]

    def dropped(of: str) -> Row:
        return f"dropout mask, {of}", (B, S, d), 1, "which elements were dropped"

    if config.attention == "eager":
        attention = [
            ("q", (B, H, S, config.d_kv), 4, "gradient of k"), ("k", (B, H, config.d_kv, S), 4, "gradient of q"),
            ("v", (B, H, S, config.d_kv), 4, "gradient of the map"), ("softmax map", (B, H, S, S), 4, "gradient of softmax"),
            ("dropped map", (B, H, S, S), 4, "gradient of softmax and of v: no mask is needed"), ("context", (B, S, inner), 4, "gradient of o's weight")]
    else:
        attention = [(name, (B, S, inner), 4, "the kernel computes the map again from q and k") for name in ("q", "k", "v")] + [
            ("bias", (B, H, S, -(-S // 16) * 16), 4, "the same; one for all layers of a stack where S is a multiple of 16"),
            ("log of softmax's sum", (B, H, -(-S // 32) * 32), 4, "the same"), ("random state", (2,), 8, "the same map is dropped again"),
            ("context", (B, S, inner), 4, "gradient of o's weight, and of softmax")]
    return [*rung, *norm("h", "q, k and v's weights"), *attention, dropped("o"), *norm("h'", "wi's weight"),
            ("dropout mask, wi", (B, S, d_ff), 1, "which elements were dropped"), ("relu", (B, S, d_ff), 4, "gradient of ReLU and of wo's weight: one tensor for both"),
            dropped("wo")]


def formula_bytes(rows: list[Row]) -> int:
    return sum(math.prod(shape) * size for _, shape, size, _ in rows)


# ------------------------------------------------------------------------ the environment of Tables 1 and 3 (torch 1.10)

class SoftmaxOf2021(torch.autograd.Function):
    """Keeps its input as well as its output."""

    @staticmethod
    def forward(context, scores: Tensor, dim: int) -> Tensor:
        weights = torch.exp(scores - scores.amax(dim, keepdim=True))
        weights /= weights.sum(dim, keepdim=True)
        context.save_for_backward(scores, weights)
        return weights

    @staticmethod
    def backward(context, gradient: Tensor):
        _, weights = context.saved_tensors
        gradient = gradient * weights
        return gradient - weights * gradient.sum(-1, keepdim=True), None


def norm_of_2021(self: model.RMSNorm, x: Tensor) -> Tensor:
    return self.weight * (x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + self.epsilon))


def feed_forward_of_2021(self: model.FeedForward, x: Tensor) -> Tensor:
    return self.wo(self.dropout(F.relu(self.wi(x))))


def rung_of_2021(self: SideStack, j: int, h_side: Tensor, h_backbone: Tensor, *rest) -> Tensor:
    """h_side (B, S + P, d), images behind the text; h_backbone (B, S, D) -> (B, S + P, d)"""
    mu, P = self.ladders[j].mu, h_side.size(1) - h_backbone.size(1)
    h_down = F.pad(self.ladders[j].down(h_backbone), (0, 0, 0, P))  # (B, S + P, d)
    return self.blocks[j](mu * h_down + (1 - mu) * h_side, *rest)


def loss_with_caches(net: nn.Module, batch: Batch) -> Tensor:
    """The forward pass with keys and values of every decoder layer kept until the loss is there."""
    source_ids, source_mask, decoder_ids, labels, *images = batch
    state = net.start(source_ids, source_mask, 1, *images)
    memories, caches = (state.memories[0], state.caches[0]) if len(state.caches) == 1 else (state.memories, state.caches)
    logits = net.decode(decoder_ids, None, memories, state.source_mask, caches)
    logits = logits if len(state.caches) == 2 else net.logits(logits)
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten())


CONVENTIONS = {  # of the environment that measured Table 1
    "mask": "dropout of attention maps keeps its mask",
    "softmax": "torch 1.10's softmax keeps its input as well as its output",
    "norm": "T5's norm is made of single operations, which keep x / rms for the weight as well",
    "feed-forward": "dropout comes after ReLU, so one more tensor of width d_ff is kept",
    "cache": "training keeps keys and values of all decoder layers until the loss is there, for a generation that never comes (under `temp.`)",
    "gradients": "zero_grad leaves zeros: gradients stay allocated through forward and backward",
}
CONVENTIONS_3 = {name: words for name, words in CONVENTIONS.items() if name != "gradients"} | {  # of Table 3: a step ends with param.grad = None
    "buckets": "DistributedDataParallel, on one GPU too, has a second place for each gradient in its buckets (under `gradients`)",
    "gelu": "the adapters' GELU is made of single operations, which keep four tensors and not one",
    "rung": "a rung pads down(h_backbone) with zeros to the length of text and images, and its gate weighs the images too",
}


@contextmanager
def of_2021(conventions: Collection[str]) -> Iterator[None]:
    """Our modules with those of CONVENTIONS and CONVENTIONS_3 that are a matter of modules."""
    with ExitStack() as stack:
        if "mask" in conventions:
            softmax = SoftmaxOf2021.apply if "softmax" in conventions else torch.softmax
            stack.enter_context(patch.object(model.DroppedSoftmax, "apply", lambda scores, dropout, dtype: dropout(softmax(scores, -1)).to(dtype)))
        if "norm" in conventions:
            stack.enter_context(patch.object(model.RMSNorm, "forward", norm_of_2021))
        if "feed-forward" in conventions:
            stack.enter_context(patch.object(model.FeedForward, "forward", feed_forward_of_2021))
        if "gelu" in conventions:
            stack.enter_context(patch.object(F, "gelu", lambda x, approximate: 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))))
        if "rung" in conventions:
            stack.enter_context(patch.object(SideStack, "rung", rung_of_2021))
        yield
