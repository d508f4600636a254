"""Adapters (arXiv:1902.00751): a bottleneck behind each self-attention and feed-forward."""
import torch.nn.functional as F
from torch import Tensor, nn

from model import CLIPT5, T5, Block, RMSNorm


class Adapter(nn.Module):
    """A linear map or norm, then a bottleneck beside its output (Sec. 2). (B, T, _) -> (B, T, D)"""

    def __init__(self, linear: nn.Linear | RMSNorm, reduction: int):
        super().__init__()
        D = len(linear.weight)
        self.linear = linear
        self.down = nn.Linear(D, max(1, D // reduction))
        self.up = nn.Linear(max(1, D // reduction), D)
        for projection in (self.down, self.up):
            nn.init.normal_(projection.weight, std=0.01)
            nn.init.zeros_(projection.bias)

    def forward(self, x: Tensor) -> Tensor:
        h = self.linear(x)
        inner = F.gelu(self.down(h.to(self.down.weight.dtype)), approximate="tanh")
        return h + self.up(inner).to(h.dtype)


class TrainedNorm(RMSNorm):
    """T5's norm with its weight trained, in float32."""

    def __init__(self, norm: RMSNorm):
        super().__init__(len(norm.weight), norm.epsilon)
        self.weight = nn.Parameter(norm.weight.detach().float())

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.to(self.weight.dtype)).to(x.dtype)


def add_adapters(t5: T5, layers: list[Block], as_authors=False, size=None) -> None:
    """Text: bottlenecks of D / 16, and the norms train; images: of D / 4, and they do not."""
    images = isinstance(t5, CLIPT5)
    reduction = size or (4 if images else 16)
    for block in layers:
        # Paper: "every attention"; its counts and the authors' code leave cross-attention out.
        block.self_attention.o = Adapter(block.self_attention.o, reduction)
        block.feed_forward.wo = Adapter(block.feed_forward.wo, reduction)
        if images and hasattr(block, "cross_attention"):
            # Paper: Table 3's 7.98 % are with these and without the norms.
            block.cross_attention.o = Adapter(block.cross_attention.o, reduction)
        for name, child in list(block.named_children()):
            if isinstance(child, RMSNorm) and not images:
                setattr(block, name, TrainedNorm(child))
    for stack in (t5.encoder, t5.decoder):
        if stack.blocks[-1] in layers and not images:
            stack.final_norm = TrainedNorm(stack.final_norm)
