"""LoRA (arXiv:2106.09685): a product of two thin matrices beside each q and v."""
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from methods.bitfit import add_biases
from model import CLIPT5, T5, Attention, Block


class LoRA(nn.Module):
    """W x + (alpha / rank) B A x with a frozen W (Sec. 4.1).  B starts at 0: no change at first."""

    def __init__(self, linear: nn.Linear, dropout: float, rank: int, alpha: float = 32.0):
        super().__init__()
        self.linear, self.dropout, self.scale = linear, nn.Dropout(dropout), alpha / rank
        self.A = nn.Parameter(torch.empty(rank, linear.in_features))
        self.B = nn.Parameter(torch.zeros(linear.out_features, rank))
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        h = F.linear(self.dropout(x.to(self.A.dtype)), self.A)  # (B, T, rank)
        return self.linear(x) + (self.scale * F.linear(h, self.B)).to(x.dtype)

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        self.linear.weight += self.scale * self.B @ self.A
        return self.linear


def add_lora(t5: T5, layers: list[Block], as_authors=False, size=None) -> None:
    """Text: rank 32; images: rank 150. On q and v of each attention, cross-attention too."""
    # Paper: the authors also train what has "bias" in its name: BitFit's biases and both tables of
    # position bias (3,820,644, Table 1's 1.71 %); ours is LoRA only, unless as_authors.
    if as_authors:
        add_biases(t5, layers)
        if t5.encoder.blocks[0] in layers:  # frozen layers would share the tables
            for stack in (t5.encoder, t5.decoder):
                stack.pos_bias.float().requires_grad_(True)
    rank, dropout = size or (150 if isinstance(t5, CLIPT5) else 32), t5.config.dropout_rate
    for block in layers:
        for attention in block.children():
            if isinstance(attention, Attention):
                attention.q = LoRA(attention.q, dropout, rank)
                attention.v = LoRA(attention.v, dropout, rank)


def merge(t5: T5) -> T5:
    """Fold LoRA into the weights, in place: plain linear maps again, and the same logits."""
    for module in list(t5.modules()):
        if isinstance(module, Attention) and isinstance(module.q, LoRA):
            module.q, module.v = module.q.merged(), module.v.merged()
    return t5
