"""Prompt-tuning (arXiv:2104.08691): trained vectors in front of the source."""
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model import CLIPT5, T5, UNK, Block


class Prompt(nn.Module):
    """n vectors in front of the word embeddings; encoder and decoder attend to them.

    h (B, S, D), mask (B, S) -> (B, n + S, D), (B, n + S)
    The vectors pass `mlp`: nothing with text, with images two linear maps that train along
    (arXiv:2101.00190, Sec. 4.3).
    """

    def __init__(self, vectors: Tensor, mlp: nn.Module):
        super().__init__()
        self.vectors, self.mlp = nn.Parameter(vectors), mlp

    def forward(self, h: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        prompt = self.mlp(self.vectors).to(h.dtype).expand(len(h), -1, -1)  # (B, n, D)
        return torch.cat([prompt, h], dim=1), F.pad(mask, (len(self.vectors), 0), value=True)


def add_prompt(t5: T5, layers: list[Block], as_authors=False, size=None) -> None:
    """Text: 100 vectors; images: 40."""
    images, D = isinstance(t5, CLIPT5), t5.config.d_model
    n, mlp = size or (40 if images else 100), nn.Identity()
    rows = (torch.arange(n) + UNK + 1) % t5.config.vocab_size  # the first behind the special ids
    # Paper: prompts from vocabulary rows; the authors copy them before the weights are loaded,
    # which gives N(0, 1) noise (as_authors).
    start = torch.randn(n, D) if as_authors else t5.embed.weight.detach()[rows].float()
    if images:
        mlp = nn.Sequential(nn.Linear(D, 800), nn.Tanh(), nn.Linear(800, D))
    t5.prompt = Prompt(start, mlp)
