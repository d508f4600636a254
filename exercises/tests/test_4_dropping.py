"""Assignment 4: the climb over kept layers only, and what dropping saves (Sec. 3.4)."""
from random import sample

import side
import torch
from compare import equal, kept_bytes, same
from torch import nn

B, S, D, d, N = 2, 5, 12, 4, 6


class Layer(nn.Linear):
    """2 (h_side + W h_backbone): autograd keeps h_backbone for W. Notes what comes beside them."""

    def forward(self, h_side, h_backbone, *context):
        self.context = context
        return 2 * (h_side + super().forward(h_backbone))


def ladder(count):
    """A stack that keeps so many layers, and what it may read: None where nobody does."""
    keep = sorted(sample(range(1, N), count))
    stack = side.SideStack([None for _ in keep], nn.LayerNorm(d), D, d, keep)
    stack.blocks = nn.ModuleList(Layer(D, d) for _ in keep)
    return stack, [torch.randn(B, S, D) if i - 1 in (-1, *keep) else None for i in range(N + 1)]


def test_each_kept_layer_reads_its_own_state():
    stack, hidden = ladder(3)
    h = 8 * stack.down_emb(hidden[0])
    for layer, i, power in zip(stack.blocks, stack.keep, (8, 4, 2)):
        h = h + power * nn.Linear.forward(layer, hidden[i + 1])
    found = stack(hidden)
    same(f"a stack that keeps layers {stack.keep}", found, stack.final_norm(h))
    found.sum().backward()
    dead = [name for name, p in stack.named_parameters() if p.grad is None]
    equal("parameters without a gradient", dead, [])


def test_every_block_gets_its_cache_and_the_context():
    stack, hidden = ladder(3)
    for cache in (None, ["cache 0", "cache 1", "cache 2"]):
        stack(hidden, "bias", "memory", cache=cache)
        for layer, own in zip(stack.blocks, cache or 3 * [None]):
            equal("what comes beside the states", layer.context, (own, "bias", "memory"))


def test_each_layer_dropped_saves_its_state():
    ladders = map(ladder, range(N))
    kept = [kept_bytes(lambda: stack(hidden), stack.parameters()) for stack, hidden in ladders]
    more = [after - before for before, after in zip(kept, kept[1:])]
    equal("bytes that each layer more keeps", more, (N - 1) * [4 * B * S * D])
