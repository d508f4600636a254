"""What other environments keep for backward: CUDA, and the one that measured Tables 1 and 3.

On the meta device torch takes paths that keep more than CUDA's kernels, so those are called by
name. The paper's environment is torch 1.10 and the modules of the authors' T5: its conventions keep
more, too. Parameters and loss stay as they are (but with "rung" the gate weighs images, too).
"""
import math
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model import FeedForward, RMSNorm
from side import LadderT5, SideBlock

CONVENTIONS = {
    "softmax": "torch 1.10's softmax keeps its input as well as its output",
    "gradients": "zero_grad leaves zeros: gradients stay allocated all the time",
    "cache": "keys and values stay until the loss, for a generation that never comes",
    "norm": "T5's norm is single operations, which keep x / rms for the weight as well",
    "feed-forward": "dropout comes after ReLU, so one more tensor of width d_ff is kept",
    "mask": "dropout of attention maps keeps its mask",  # as a network without run/kernels.py
    "buckets": "DistributedDataParallel, on one GPU too, has each gradient twice",
    "gelu": "the adapters' GELU is single operations, which keep four tensors, not one",
    "rung": "a rung pads down(h_backbone) with zeros to the length of text and images",
}
OF_TABLE_1 = ("softmax", "gradients", "cache", "norm", "feed-forward", "mask", "gelu")
OF_TABLE_3 = ("softmax", "cache", "norm", "feed-forward", "mask", "buckets", "gelu", "rung")


class FusedNorm(torch.autograd.Function):
    """RMSNorm as CUDA's one kernel, which keeps x (..., D) and 1 / rms (..., 1)."""

    @staticmethod
    def forward(context, x: Tensor, shape: tuple, weight: Tensor, epsilon: float) -> Tensor:
        scale = torch.rsqrt(x.float().square().mean(dim=-1, keepdim=True) + epsilon)
        context.save_for_backward(x, weight, scale)
        return (x * scale * weight).to(x.dtype)

    @staticmethod
    def backward(context, g: Tensor):
        x, weight, scale = context.saved_tensors
        normed, trained = x * scale, context.needs_input_grad[2]
        weight_gradient = (g * normed).flatten(0, -2).sum(dim=0) if trained else None
        g = g * weight
        g = scale * (g - normed * (g * normed).mean(dim=-1, keepdim=True))
        return g.to(x.dtype), None, weight_gradient, None


def attention(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None, dropout_p: float = 0.0,
              is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False):
    """scaled_dot_product_attention by CUDA's kernels: flash if it can, else memory-efficient."""
    if attn_mask is None and q.dtype == torch.bfloat16:
        flash = torch.ops.aten._scaled_dot_product_flash_attention
        return flash(q, k, v, dropout_p, is_causal, scale=scale)[0]
    assert q.size(1) == k.size(1), "only flash lets heads share keys and values"
    S, kernel = k.size(2), torch.ops.aten._scaled_dot_product_efficient_attention
    bias = None if attn_mask is None else attn_mask.to(q.dtype).expand(*q.shape[:3], S)
    if bias is not None and S % 16:  # the kernel wants aligned rows: a padded copy for each layer
        bias = F.pad(bias, (0, -S % 16))[..., :S]
    return kernel(q, k, v, bias, torch.is_grad_enabled(), dropout_p, is_causal, scale=scale)[0]


def rung(self: SideBlock, h_side: Tensor, h_backbone: Tensor, *rest) -> Tensor:
    """h_side (B, S + P, d), images behind the text; h_backbone (B, S, D) -> (B, S + P, d)"""
    mu, P = self.rung.mu, h_side.size(1) - h_backbone.size(1)
    h_down = F.pad(self.rung.down(h_backbone), (0, 0, 0, P))  # (B, S + P, d)
    return self.block(mu * h_down + (1 - mu) * h_side, *rest)


PATCHES = {
    "attention": (F, "scaled_dot_product_attention", attention),
    "fused norm": (F, "rms_norm", FusedNorm.apply),
    "dropout": (F, "dropout", lambda x, p, training, inplace: (
        torch.native_dropout(x, p, True)[0] if training and p > 0 else x)),
    "softmax": (torch, "softmax", lambda x, dim: x.clamp(-math.inf).softmax(dim)),  # clamp keeps x
    "norm": (RMSNorm, "forward", lambda self, x: self.weight * (
        x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + self.epsilon))),
    "feed-forward": (FeedForward, "forward", lambda self, x: (
        self.wo(self.dropout(F.relu(self.wi(x)))))),
    "gelu": (F, "gelu", lambda x, approximate: 0.5 * x * (
        1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))),
    "rung": (SideBlock, "forward", rung),
}


@contextmanager
def environment(conventions: Collection[str] = ()) -> Iterator[None]:
    """Put CUDA's kernels in their place, and what differs in modules under these conventions."""
    with ExitStack() as stack:
        for name in PATCHES.keys() & {"attention", "fused norm", "dropout", *conventions}:
            stack.enter_context(patch.object(*PATCHES[name]))
        yield


def loss_with_caches(net: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
    """Let the decoder fill a cache, as when it generates, that lives until the loss is there."""
    source_ids, source_mask, decoder_ids, labels, *images = batch
    state = net.start(source_ids, source_mask, *images)
    memory, cache = state.memories[0], state.caches[0]
    if isinstance(net, LadderT5):
        hidden = net.backbone.decode(decoder_ids, None, memory, cache, net.decoder.reads)
        h = net.decode_side(hidden, None, state.memories[1], state.caches[1])
    else:
        h = net.decoder.finish(net.decode(decoder_ids, None, memory, cache)[-1])
    return F.cross_entropy(net.logits(h).flatten(0, 1), labels.flatten())
