"""BitFit (arXiv:2106.10199): only biases train. T5 has none, so each is added and starts at 0."""
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model import T5, Block, RMSNorm


class BiasedLinear(nn.Linear):
    """A linear map with a trained bias."""

    def __init__(self, linear: nn.Linear):
        super().__init__(linear.in_features, linear.out_features, device="meta")
        self.weight, self.bias = linear.weight, nn.Parameter(torch.zeros(linear.out_features))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias.to(x.dtype))


class BiasedNorm(RMSNorm):
    """T5's norm with a trained bias."""

    def __init__(self, norm: RMSNorm):
        super().__init__(len(norm.weight), norm.epsilon)
        self.weight, self.bias = norm.weight, nn.Parameter(torch.zeros(len(norm.weight)))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.bias.to(x.dtype)


def add_biases(t5: T5, layers: list[Block], as_authors=False, size=None) -> None:
    """To every linear map and norm of these layers, and to the logits; final norms have none."""
    for module in [module for block in layers for module in block.modules()]:
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear):
                setattr(module, name, BiasedLinear(child))
            if isinstance(child, RMSNorm):
                setattr(module, name, BiasedNorm(child))
    t5.head_bias = nn.Parameter(torch.zeros(t5.config.vocab_size))
