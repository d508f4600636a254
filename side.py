"""Ladder side network (Sec. 3.2) with layer dropping (Sec. 3.4).

    source_ids -> emb ---> block 0 ---> block 1 ---> ... ---> block N-1      frozen, width D
                   | down     | down       | down                | down      a rung per kept layer
                  side -----> gate ------> gate ------> ... ---> gate        side blocks, width d
                               + block 0    + block 1             + block N-1
                                                                    | norm; in the decoder then up
                                                                    v
                                                              frozen LM head --> logits

    paper                                here                   shape
    reduction factor                     r                      int, d = D / r, as 48 = 768 / 16
    gate scalar, gate, temperature       alpha, mu, temperature (1,), (1,), float
    backbone and side activations        h_backbone, h_side     (B, S, D), (B, S, d)
    dropped layers (Sec. 3.4)            those not in keep      0-based indices

Encoder and decoder have a ladder each. The side decoder looks at the side encoder's final states,
the backbone's decoder at the backbone's. Only the side network trains. The letters are model.py's.
"""
from collections.abc import Collection, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from model import (T5, Block, Decoding, Generates, Memory, PositionBias, RMSNorm, T5Config,
                   append_images, cached_length, call, new_cache)


def side_config(config: T5Config, r: int) -> T5Config:
    """Sec. 3.2, "Lightweight architecture": every width divided by r; the heads stay."""
    narrow = dict(d_model=config.d_model // r, d_kv=config.d_kv // r, d_ff=config.d_ff // r)
    assert all(width * r == getattr(config, name) for name, width in narrow.items()), \
        f"r = {r} must divide d_model {config.d_model}, d_kv {config.d_kv} and d_ff {config.d_ff}"
    return replace(config, **narrow)


class Gate(nn.Module):
    """One rung: brings a backbone activation down and gates it into the side network.

    Sec. 3.2, "Gated ladder connections". h_side (B, S, d), h_backbone (B, S, D) -> (B, S, d)
    Other rungs may read the context of the blocks, too; a gate does not.
    """

    def __init__(self, D: int, d: int, temperature: float = 0.1):
        super().__init__()
        self.down = nn.Linear(D, d)
        self.alpha = nn.Parameter(torch.zeros(1))  # zero, so mu = 1/2 at the start
        self.temperature = temperature  # d mu / d alpha <= 2.5: about 0.0075 a step at lr 3e-3

    @property
    def mu(self) -> Tensor:
        return torch.sigmoid(self.alpha / self.temperature)

    def forward(self, h_side: Tensor, h_backbone: Tensor, *context) -> Tensor:
        # Paper: mu weighs the backbone, as printed; in the authors' code it weighs h_side. alpha
        # starts at 0, so only its sign differs.
        mu = self.mu
        return mu * self.down(h_backbone.to(h_side.dtype)) + (1 - mu) * h_side


class SideBlock(nn.Module):
    """A rung and its block: h_side (B, S + P, d), h_backbone (B, S, D) -> (B, S + P, d)"""

    def __init__(self, rung: nn.Module | None, block: nn.Module):
        super().__init__()
        self.rung, self.block = rung, block

    def forward(self, h_side: Tensor, h_backbone: Tensor, cache: dict | None, *context) -> Tensor:
        if self.rung is None:  # a free block, as in xLadder (arXiv:2512.14237; see docs/llm.md)
            return self.block(h_side, cache, *context)
        S = h_backbone.size(1)
        h = self.rung(h_side[:, :S], h_backbone, cache, *context)
        if S < h_side.size(1):  # the P image positions after the text have no rung (Sec. 4)
            # Paper: the authors' code multiplies these by 1 - mu, too; ours go on unchanged.
            h = torch.cat([h, h_side[:, S:]], dim=1)  # (B, S + P, d)
        return self.block(h, cache, *context)


class SideStack(nn.Module):
    """Side blocks beside the kept layers of a backbone, of whose architecture it knows nothing.

    hidden: the backbone's embeddings (B, S, D), then its layers' outputs -> (B, S, d)
    context: what every block takes beside h; cache: a dict for each block while generating.
    """

    def __init__(self, blocks: Sequence[nn.Module], final_norm: nn.Module, D: int, d: int,
                 keep: Sequence[int], rung=Gate, dropout: float = 0.0, checkpoint: bool = False):
        super().__init__()
        self.keep = self.reads = tuple(keep)  # reads: the layers whose output is read
        self.down_emb = nn.Linear(D, d)  # word embeddings enter ungated: there is no h_side yet
        rungs = [rung(D, d) for _ in keep] + [None] * (len(blocks) - len(keep))
        self.blocks = nn.ModuleList(map(SideBlock, rungs, blocks))
        self.final_norm, self.dropout, self.checkpoint = final_norm, nn.Dropout(dropout), checkpoint

    def forward(self, hidden: Sequence, *context, cache: list[dict] | None = None) -> Tensor:
        h_side = self.down_emb(self.dropout(hidden[0].to(self.final_norm.weight)))  # (B, S, d)
        levels = [*self.keep] + [-1] * (len(self.blocks) - len(self.keep))  # -1: a free block's
        # Level i reads the backbone up to i only, so both could run in parallel (Sec. 1).
        for i, block, block_cache in zip(levels, self.blocks, cache or [None] * len(levels)):
            # Sec. 3.4: a dropped layer is not here. Paper: the authors keep its gate, unread.
            h_side = call(block, h_side, hidden[i + 1], block_cache, *context,
                          recompute=self.checkpoint)  # (B, S, d); down keeps hidden[i + 1]
        return self.dropout(self.final_norm(h_side))


def random_start(module: nn.Module) -> None:
    """As the authors without pruning: N(0, 0.01^2), biases 0, norms 1, position bias N(0, 1)."""
    if isinstance(module, nn.Embedding):
        nn.init.normal_(module.weight)
    if isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=0.01)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


class LadderT5(Generates, nn.Module):
    """A frozen T5 and the ladder side network beside it. Same forward and generate as T5.

    r: reduction factor; Sec. 3.2 argues that LST saves most if it is above 2. keep: 0-based
    layers that have a side layer, in encoder and decoder (default: all). rung: made by rung(D, d).
    free: blocks on top of them. `requires_grad` says what trains. Random before prune.py (Sec. 3.3)
    """

    def __init__(self, backbone: T5, r=8, keep: Collection[int] | None = None, rung=Gate, free=0):
        super().__init__()
        self.r, config = r, side_config(backbone.config, r)

        def stack(num_layers: int, is_decoder: bool) -> SideStack:
            layers = sorted(range(num_layers) if keep is None else set(keep))
            blocks = [Block(config, is_decoder) for _ in range(len(layers) + free)]
            norm = RMSNorm(config.d_model, config.layer_norm_epsilon)
            return SideStack(blocks, norm, backbone.config.d_model, config.d_model, layers, rung,
                             config.dropout_rate, config.checkpoint)

        self.encoder = stack(config.num_layers, is_decoder=False)
        self.encoder_bias = PositionBias(config, is_decoder=False)
        self.decoder = stack(config.num_decoder_layers, is_decoder=True)
        self.decoder_bias = PositionBias(config, is_decoder=True)
        self.up = nn.Linear(config.d_model, backbone.config.d_model)
        for side, bias in ((self.encoder, self.encoder_bias), (self.decoder, self.decoder_bias)):
            blocks, rungs = zip(*((layer.block, layer.rung) for layer in side.blocks))
            for module in (*blocks, bias, side.down_emb, *filter(None, rungs)):
                module.apply(random_start)
        self.up.apply(random_start)
        self.visual, backbone.visual = backbone.visual, None  # the backbone reads text only
        self.to(backbone.embed.weight.device)
        self.backbone = backbone.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> "LadderT5":
        super().train(mode)
        self.backbone.eval()  # Paper: the authors' backbone keeps its dropout
        return self

    def forward(self, source_ids: Tensor, source_mask: Tensor, decoder_ids: Tensor,
                decoder_mask: Tensor | None = None, images: Tensor | None = None) -> Tensor:
        encoder, decoder = self.hidden_states(source_ids, source_mask, decoder_ids, decoder_mask)
        memory_side = self.encode_side(encoder, source_mask, images)
        return self.logits(self.decode_side(decoder, decoder_mask, memory_side))

    def hidden_states(self, source_ids: Tensor, source_mask: Tensor, decoder_ids: Tensor,
                      decoder_mask: Tensor | None = None) -> tuple[list, list]:
        """What rungs read: frozen word embeddings, then layers' outputs (B, S, D), (B, T, D)."""
        with torch.no_grad():  # Sec. 3.1: autograd sees nothing of the backbone
            encoder, memory = self.backbone.encode(source_ids, source_mask, keep=self.encoder.reads)
            return encoder, self.backbone.decode(decoder_ids, decoder_mask, memory,
                                                 keep=self.decoder.reads)

    def encode_side(self, hidden: list, mask: Tensor, images: Tensor | None = None) -> Memory:
        """Final states of the side encoder (B, S + P, d), which reads text and images (Sec. 4)."""
        h, P = hidden[0], 0
        if images is not None:
            h_visual = self.visual(images, self.backbone.embed.weight)  # (B, P, D)
            h, mask = append_images(h.to(h_visual.dtype), mask, h_visual)
            P = h_visual.size(1)
        self_bias, _ = self.encoder_bias(h.size(1), mask, P=P)
        return Memory(self.encoder([h, *hidden[1:]], self_bias), mask)

    def decode_side(self, hidden: list, decoder_mask: Tensor | None, memory_side: Memory,
                    cache: list[dict] | None = None) -> Tensor:
        """Final states of the side decoder, whose cross-attention reads the side encoder's."""
        T, past = hidden[0].size(1), cached_length(cache)
        self_bias, cross_bias = self.decoder_bias(T, decoder_mask, memory_side.mask, past)
        return self.decoder(hidden, self_bias, memory_side.h, cross_bias, cache=cache)

    def logits(self, h_side: Tensor) -> Tensor:
        # The head is frozen but not under no_grad: the gradient passes through it to reach `up`.
        return self.backbone.logits(self.up(h_side).to(self.backbone.embed.weight.dtype))

    def start(self, source_ids: Tensor, source_mask: Tensor,
              images: Tensor | None = None) -> Decoding:
        hidden, memory = self.backbone.encode(source_ids, source_mask, keep=self.encoder.reads)
        memory_side = self.encode_side(hidden, source_mask, images)
        caches = [new_cache(len(net.decoder.blocks)) for net in (self.backbone, self)]
        return Decoding([memory, memory_side], caches)

    def step(self, ids: Tensor, state: Decoding) -> Tensor:
        (memory, memory_side), (cache, cache_side) = state.memories, state.caches
        hidden = self.backbone.decode(ids, None, memory, cache, self.decoder.reads)
        return self.logits(self.decode_side(hidden, None, memory_side, cache_side))[:, -1]
