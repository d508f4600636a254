"""The encoder only (Table 2): a ladder with a classification head, and Y-tuning.

Both score classes: logits (B, 1, C). answers (C, T): the token ids of each class's text.
"""
# Paper: the frozen encoder is BART-large's; ours is T5's. Its last token is the source's </s>.
import torch
from torch import Tensor, nn

from model import T5, Block, RMSNorm
from side import LadderT5, random_start


class Classifier(nn.Module):
    @torch.no_grad()
    def generate(self, source_ids: Tensor, source_mask: Tensor, max_new_tokens: int = 20) -> Tensor:
        """The text of the best class (B, T)."""
        return self.answers[self(source_ids, source_mask)[:, 0].argmax(dim=-1)]


class EncoderLadder(Classifier, LadderT5):
    """The side encoder's last state goes up, and through the head that BART has."""

    def __init__(self, backbone: T5, answers: Tensor, r: int = 8):
        super().__init__(backbone, r)
        del self.decoder, self.decoder_bias
        D, device = backbone.config.d_model, backbone.embed.weight.device
        self.head = nn.Sequential(nn.Linear(D, D), nn.Tanh(), nn.Linear(D, len(answers)))
        self.head.apply(random_start).to(device)
        self.register_buffer("answers", answers.to(device), persistent=False)

    def forward(self, source_ids: Tensor, source_mask: Tensor, *decoder) -> Tensor:
        with torch.no_grad():
            hidden, _ = self.backbone.encode(source_ids, source_mask, keep=self.encoder.keep)
        h_side, last = self.encode_side(hidden, source_mask).h, source_mask.sum(dim=1) - 1
        return self.head(self.up(h_side[torch.arange(len(last)), last]))[:, None]


class YTuning(Classifier):
    """Y-tuning (arXiv:2202.09817): a block in which label vectors look at frozen features."""
    # Paper: their loss is a hinge. Ours is the ladder's cross-entropy, so that the two compare.

    def __init__(self, backbone: T5, answers: Tensor):
        super().__init__()
        config, self.backbone = backbone.config, backbone.requires_grad_(False)
        self.labels = nn.Parameter(torch.randn(1 + len(answers), config.d_model))
        self.block = Block(config, is_decoder=True)
        self.norm = RMSNorm(config.d_model, config.layer_norm_epsilon)
        self.register_buffer("answers", answers, persistent=False)
        self.to(backbone.embed.weight.device)

    def train(self, mode: bool = True) -> "YTuning":
        super().train(mode)
        self.backbone.eval()  # as beside a ladder
        return self

    def forward(self, source_ids: Tensor, source_mask: Tensor, *decoder) -> Tensor:
        with torch.no_grad():
            _, memory = self.backbone.encode(source_ids, source_mask)
            bias, cross_bias = self.backbone.decoder.pos_bias(len(self.labels), None, memory.mask)
        features, D = memory.h.to(self.labels.dtype), self.labels.size(1)
        h = self.labels.expand(len(features), -1, -1)  # (B, 1 + C, D)
        h = self.norm(self.block(h, None, torch.zeros_like(bias), features, cross_bias))
        return h[:, :1] @ h[:, 1:].mT * D ** -0.5  # the task's vector asks every class
