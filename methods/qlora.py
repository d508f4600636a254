"""QLoRA (arXiv:2305.14314): LoRA beside every linear map of a backbone in 4 bits."""
import torch.nn.functional as F
from torch import Tensor, nn

from llm.nf4 import NF4Linear, quantize_, replace
from methods.lora import LoRA


class QLoRA(LoRA):
    """LoRA in the dtype of its input, which backward keeps; A and B are float32."""

    def forward(self, x: Tensor) -> Tensor:
        h = F.linear(self.dropout(x), self.A.to(x.dtype))  # (B, T, rank)
        return self.linear(x) + self.scale * F.linear(h, self.B.to(x.dtype))


def add_qlora(net: nn.Module, rank: int = 64, alpha: float = 16.0, dropout: float = 0.0
              ) -> nn.Module:
    """Store the blocks' linear maps in NF4 and put LoRA beside each, in place (App. B.2)."""
    # Paper: dropout 0.1; here none, as in the ladder that it is compared with.
    quantize_(net.requires_grad_(False))
    return replace(net, NF4Linear, lambda linear:
                   QLoRA(linear, dropout, rank, alpha).to(linear.codes.device))
