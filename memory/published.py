"""The environment that measured Tables 1 and 3: torch 1.10, and the modules of the authors' T5.

Each convention keeps memory that our code does not keep today. `of_2021` puts those that are a
matter of modules into ours; "mask" is a network without run/kernels.py. Neither the parameters nor
the loss change (but with "rung" the gate weighs images, too).
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

CONVENTIONS = {  # of Table 1
    "mask": "dropout of attention maps keeps its mask",
    "softmax": "torch 1.10's softmax keeps its input as well as its output",
    "norm": "T5's norm is made of single operations, which keep x / rms for the weight as well",
    "feed-forward": "dropout comes after ReLU, so one more tensor of width d_ff is kept",
    "cache": "the decoder's keys and values stay until the loss is there, for a generation that\n"
             "    never comes (under `temp.`)",
    "gradients": "zero_grad leaves zeros: gradients stay allocated through forward and backward",
}
CONVENTIONS_3 = {name: why for name, why in CONVENTIONS.items() if name != "gradients"} | {
    # of Table 3, where a step ends with param.grad = None
    "buckets": "DistributedDataParallel, on one GPU too, has a second place for each gradient",
    "gelu": "the adapters' GELU is made of single operations, which keep four tensors, not one",
    "rung": "a rung pads down(h_backbone) with zeros to the length of text and images",
}


class SoftmaxOf2021(torch.autograd.Function):
    """Keeps its input as well as its output."""

    @staticmethod
    def forward(context, scores: Tensor, dim: int) -> Tensor:
        weights = torch.exp(scores - scores.amax(dim, keepdim=True))
        weights /= weights.sum(dim, keepdim=True)
        context.save_for_backward(scores, weights)
        return weights

    @staticmethod
    def backward(context, g: Tensor) -> tuple[Tensor, None]:
        _, weights = context.saved_tensors
        g = g * weights
        return g - weights * g.sum(-1, keepdim=True), None


def rung(self: SideBlock, h_side: Tensor, h_backbone: Tensor, *rest) -> Tensor:
    """h_side (B, S + P, d), images behind the text; h_backbone (B, S, D) -> (B, S + P, d)"""
    mu, P = self.rung.mu, h_side.size(1) - h_backbone.size(1)
    h_down = F.pad(self.rung.down(h_backbone), (0, 0, 0, P))  # (B, S + P, d)
    return self.block(mu * h_down + (1 - mu) * h_side, *rest)


PATCHES = {
    "softmax": (torch, "softmax", lambda scores, dim: SoftmaxOf2021.apply(scores, dim)),
    "norm": (RMSNorm, "forward", lambda self, x: self.weight * (
        x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + self.epsilon))),
    "feed-forward": (FeedForward, "forward",
                     lambda self, x: self.wo(self.dropout(F.relu(self.wi(x))))),
    "gelu": (F, "gelu", lambda x, approximate: 0.5 * x * (
        1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))),
    "rung": (SideBlock, "forward", rung),
}


@contextmanager
def of_2021(conventions: Collection[str]) -> Iterator[None]:
    with ExitStack() as stack:
        for name in PATCHES.keys() & conventions:
            stack.enter_context(patch.object(*PATCHES[name]))
        yield


def loss_with_caches(net: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
    """Let the decoder fill a cache, as when it generates, that lives until the loss is there."""
    source_ids, source_mask, decoder_ids, labels, *images = batch
    state = net.start(source_ids, source_mask, *images)
    memory, cache = state.memories[0], state.caches[0]
    if isinstance(net, LadderT5):
        hidden = net.backbone.decode(decoder_ids, None, memory, cache, net.decoder.keep)
        h = net.decode_side(hidden, None, state.memories[1], state.caches[1])
    else:
        h = net.decoder.finish(net.decode(decoder_ids, None, memory, cache)[-1])
    return F.cross_entropy(net.logits(h).flatten(0, 1), labels.flatten())
