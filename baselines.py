"""What Section 4 compares LST with: full fine-tuning, adapters, LoRA, BitFit and prompt-tuning.

    t5 = apply(load_t5("t5-base"), "lora")        # changes t5 and returns it; what trains has requires_grad

    method     what trains                                                   T5-base, V = 32100
    full       everything                                                        222,882,048
    adapters   a bottleneck behind each self-attention and feed-forward            3,625,728    Adapter, TrainedNorm
    lora       a product of two thin matrices beside each q and v                  3,538,944    LoRA
    bitfit     a bias, where T5 has none                                             280,932    BiasedLinear, BiasedNorm, BiasedHeadT5
    prompt     100 vectors in front of the source                                     76,800    PromptT5

Of a CLIP-T5 each also trains the visual embedding, and the modules have the sizes of VL-Adapter (arXiv:2112.06825), which Table 3 takes.
All of them sit inside the backbone, so gradients flow back through it: through everything above the lowest trained parameter (Sec. 3.1).
Added parameters are float32, also beside a bfloat16 backbone.
"""
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model import T5, UNK, Attention, Dropout, RMSNorm

METHODS = ("full", "adapters", "lora", "bitfit", "prompt")
TEXT = {"reduction": 16, "rank": 32, "prompts": 100}  # width of a bottleneck, D / reduction; rank of LoRA; vectors in front of the source
IMAGES = {"reduction": 4, "rank": 150, "prompts": 40}


# ------------------------------------------------------------------------------------------------------------- the modules

class Adapter(nn.Module):
    """A linear map, then a bottleneck beside its output (arXiv:1902.00751, Sec. 2).  (B, T, in) -> (B, T, D)"""

    def __init__(self, linear: nn.Linear, reduction: int):
        super().__init__()
        D = linear.out_features
        self.linear = linear
        self.down = nn.Linear(D, max(1, D // reduction))
        self.up = nn.Linear(max(1, D // reduction), D)
        for projection in (self.down, self.up):
            nn.init.normal_(projection.weight, std=0.01)
            nn.init.zeros_(projection.bias)

    def forward(self, x: Tensor) -> Tensor:
        h = self.linear(x)
        return h + self.up(F.gelu(self.down(h.to(self.down.weight.dtype)), approximate="tanh")).to(h.dtype)


class LoRA(nn.Module):
    """W x + (alpha / rank) B A x with a frozen W (arXiv:2106.09685, Sec. 4.1).  B starts at 0, so nothing changes at first."""

    def __init__(self, linear: nn.Linear, dropout: float, rank: int, alpha: float = 32.0):
        super().__init__()
        self.linear, self.dropout, self.scale = linear, Dropout(dropout), alpha / rank
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


class BiasedLinear(nn.Linear):
    """A linear map with a trained bias that starts at 0 (BitFit, arXiv:2106.10199)."""

    def __init__(self, linear: nn.Linear):
        super().__init__(linear.in_features, linear.out_features, device="meta")  # both parameters are put in below
        self.weight, self.bias = linear.weight, nn.Parameter(torch.zeros(linear.out_features))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias.to(x.dtype))


class BiasedNorm(RMSNorm):
    """T5's norm with a trained bias that starts at 0 (BitFit)."""

    def __init__(self, norm: RMSNorm):
        super().__init__(len(norm.weight), norm.epsilon)
        self.weight, self.bias = norm.weight, nn.Parameter(torch.zeros(len(norm.weight)))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.bias.to(x.dtype)


class TrainedNorm(RMSNorm):
    """T5's norm with its weight trained, in float32."""

    def __init__(self, norm: RMSNorm):
        super().__init__(len(norm.weight), norm.epsilon)
        self.weight = nn.Parameter(norm.weight.detach().float())

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.to(self.weight.dtype)).to(x.dtype)


class BiasedHeadT5(T5):
    """A T5 with `head_bias` (V) on its logits (BitFit); the tied head itself has no module that a bias could sit in."""

    def logits(self, h: Tensor) -> Tensor:
        return super().logits(h) + self.head_bias.to(h.dtype)


class PromptT5(T5):
    """A T5 with trained `prompts` (n, D) in front of the source's word embeddings (arXiv:2104.08691).

    Encoder and decoder attend to them: inside, S is n longer.  Callers and `Decoding` keep the mask of their own S.  The vectors pass
    `prompt_mlp`: nothing with text alone, with images two linear maps that train along (arXiv:2101.00190, Sec. 4.3).
    """

    def embed_source(self, source_ids: Tensor, source_mask: Tensor) -> tuple[Tensor, Tensor]:
        words = self.embed(source_ids)
        prompts = self.prompt_mlp(self.prompts).to(words.dtype).expand(len(words), -1, -1)  # (B, n, D)
        return torch.cat([prompts, words], dim=1), self.longer(source_mask)

    def decoder_layers(self, decoder_ids: Tensor, decoder_mask: Tensor | None, memory: Tensor, source_mask: Tensor, cache: list[dict] | None = None):
        return super().decoder_layers(decoder_ids, decoder_mask, memory, self.longer(source_mask), cache)

    def longer(self, source_mask: Tensor) -> Tensor:
        return F.pad(source_mask, (len(self.prompts), 0), value=True)  # (B, n + S)


# ------------------------------------------------------------------------------------------------------------- the methods

def apply(t5: T5, method: str, as_authors: bool = False, freeze: int = 0) -> T5:
    """Make `t5` a baseline of Section 4, in place.

    as_authors: LoRA with BitFit's biases beside it, prompts that start from noise; the other methods have one reading.
    freeze: this many layers, counted from the bottom, the encoder's first, keep their weights and get no module (Fig. 6).
    ValueError: an unknown method, a freeze that does not fit, a T5 that was changed before.
    """
    blocks = [*t5.encoder.blocks, *t5.decoder.blocks]
    if method not in METHODS:
        raise ValueError(f"method is {method!r}, choose from {', '.join(METHODS)}")
    if type(freeze) is not int or not 0 <= freeze <= len(blocks):
        raise ValueError(f"freeze is {freeze!r}, it must be a whole number from 0 to {len(blocks)}, the backbone's layers")
    if method == "prompt" and freeze:
        raise ValueError(f"freeze is {freeze}, but prompts sit below every layer, so their gradients must pass all of them: leave it out")
    if any(isinstance(module, (Adapter, LoRA, BiasedLinear, BiasedHeadT5, PromptT5)) for module in t5.modules()):
        raise ValueError("this T5 was made a baseline before; load it again")

    trained, sizes = blocks[freeze:], TEXT if t5.visual is None else IMAGES
    t5.requires_grad_(method == "full")
    if method == "full":
        # The embedding lies below layer 0.  With a frozen layer it stays as it is, and so does T5 v1.0's head, which is the same matrix.
        t5.embed.requires_grad_(not freeze)
        for block in blocks[:freeze]:
            block.requires_grad_(False)
        for stack in (t5.encoder, t5.decoder):  # what a stack's layers share goes with its first layer or its last
            stack.pos_bias.requires_grad_(stack.blocks[0] in trained)
            stack.final_norm.requires_grad_(stack.blocks[-1] in trained)
    if method == "adapters":
        for block in trained:
            # Paper: "every attention"; its counts and the authors' code leave cross-attention out, and so does this.
            block.self_attention.o = Adapter(block.self_attention.o, sizes["reduction"])
            block.feed_forward.wo = Adapter(block.feed_forward.wo, sizes["reduction"])
            if t5.visual is None:
                swap(block, RMSNorm, TrainedNorm)
            elif hasattr(block, "cross_attention"):  # Paper: Table 3's 7.98 % are with these and without the norms
                block.cross_attention.o = Adapter(block.cross_attention.o, sizes["reduction"])
        for stack in (t5.encoder, t5.decoder):
            if stack.blocks[-1] in trained and t5.visual is None:
                stack.final_norm = TrainedNorm(stack.final_norm)
    # Paper: the authors' LoRA also trains BitFit's biases (3,819,876, Table 1's 1.71 %); ours is LoRA alone, unless as_authors.
    if method == "bitfit" or (method == "lora" and as_authors):
        for block in trained:
            swap(block, nn.Linear, BiasedLinear)
            swap(block, RMSNorm, BiasedNorm)
        t5.__class__, t5.head_bias = BiasedHeadT5, nn.Parameter(torch.zeros(t5.config.vocab_size))  # the same object, with another `logits`
    if method == "lora":
        for attention in (module for block in trained for module in block.modules() if isinstance(module, Attention)):
            attention.q = LoRA(attention.q, t5.config.dropout_rate, sizes["rank"])
            attention.v = LoRA(attention.v, t5.config.dropout_rate, sizes["rank"])
    if method == "prompt":
        # Paper: prompts from vocabulary rows; the authors copy them before the weights are loaded, which gives N(0, 1) noise (as_authors).
        D, rows = t5.config.d_model, (torch.arange(sizes["prompts"]) + UNK + 1) % t5.config.vocab_size  # the first behind the special ids
        start = torch.randn(sizes["prompts"], D) if as_authors else t5.embed.weight.detach()[rows].float()
        t5.__class__, t5.prompts = PromptT5, nn.Parameter(start)
        t5.prompt_mlp = nn.Identity() if t5.visual is None else nn.Sequential(nn.Linear(D, 800), nn.Tanh(), nn.Linear(800, D))
    if t5.visual is not None:
        t5.visual.requires_grad_(True)  # trained by every method (arXiv:2112.06825, Sec. 3.1)
    if not any(p.requires_grad for p in t5.parameters()):
        raise ValueError(f"freeze is {freeze}, which leaves {method} nothing to train: freeze fewer layers")
    return t5.to(t5.embed.weight.device).train(t5.training)  # the new modules follow


def swap(root: nn.Module, kind: type, wrap) -> None:
    """Put wrap(child) in the place of every child of exactly this kind, at any depth."""
    for module in list(root.modules()):
        for name, child in list(module.named_children()):
            if type(child) is kind:
                setattr(module, name, wrap(child))


def merge(t5: T5) -> T5:
    """Fold LoRA into the weights, in place: plain linear maps again (as_authors: with their biases), and the same logits."""
    if not any(isinstance(module, LoRA) for module in t5.modules()):
        raise ValueError("nothing to merge: this T5 has no LoRA")
    swap(t5, LoRA, LoRA.merged)
    return t5
