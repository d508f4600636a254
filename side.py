"""Ladder side network (Sec. 3.2) with layer dropping (Sec. 3.4).

    source_ids -> emb ---> block 0 ---> block 1 ---> ... ---> block N-1          frozen backbone, width D
                   | down     | down       | down                | down          rungs: N + 1 in each stack
                  side -----> gate ------> gate ------> ... ---> gate            a block of width d after each gate
                               + block 0    + block 1             + block N-1
                                                                    | norm; in the decoder then up
                                                                    v
                                                              frozen LM head --> logits

    paper                                here                   shape
    reduction factor                     r                      int, d = D / r
    gate scalar, gate, temperature       alpha, mu, temperature (1,), (1,), float
    backbone and side activations        h_backbone, h_side     (B, S, D), (B, S, d)
    dropped layers (Sec. 3.4)            those not in keep      0-based indices

Encoder and decoder have a ladder each.  The side decoder looks at the side encoder's final states, the backbone's decoder at the
backbone's.  Only the side network trains; the letters B S T D d H K V are model.py's.
"""
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from model import T5, Decoding, Stack, T5Config, behind, generate, new_cache


def side_config(config: T5Config, r: int) -> T5Config:
    """The backbone's shape with every width divided by r; the number of heads stays (Sec. 3.2, "Lightweight architecture")."""
    if r < 1 or config.d_model % r or config.d_kv % r or config.d_ff % r:
        good = [n for n in range(1, config.d_kv + 1) if not (config.d_model % n or config.d_kv % n or config.d_ff % n)]
        raise ValueError(f"r is {r}, but it must divide d_model {config.d_model}, d_kv {config.d_kv} and d_ff {config.d_ff}: choose from {good}")
    return replace(config, d_model=config.d_model // r, d_kv=config.d_kv // r, d_ff=config.d_ff // r)


def without_grad(climb: Iterator[Tensor]) -> Iterator[Tensor]:
    """Take each step of the backbone under no_grad, so that autograd keeps nothing of its inside (Sec. 3.1).

    What it hands out is kept where a rung needs it: `down` keeps its input for the gradient of its own weight.

    The `with` stands around one step: around the whole generator it would leak to whoever consumes it.
    """
    while True:
        with torch.no_grad():
            h_backbone = next(climb, None)
        if h_backbone is None:
            return
        yield h_backbone


class Ladder(nn.Module):
    """One rung: brings a backbone activation down and gates it into the side network.

    Sec. 3.2, "Gated ladder connections".  h_side (B, S, d), h_backbone (B, S, D) -> (B, S, d)
    """

    def __init__(self, D: int, d: int, temperature: float = 0.1):
        super().__init__()
        self.down = nn.Linear(D, d)
        self.alpha = nn.Parameter(torch.zeros(1))  # zero, so mu = 1/2 at the start
        self.temperature = temperature

    @property
    def mu(self) -> Tensor:
        return torch.sigmoid(self.alpha / self.temperature)

    def forward(self, h_side: Tensor, h_backbone: Tensor) -> Tensor:
        # Paper: mu weighs the backbone, as printed; the authors' code lets it weigh h_side.  alpha starts at 0, so only its sign differs.
        mu = self.mu
        return mu * self.down(h_backbone.to(h_side.dtype)) + (1 - mu) * h_side


class SideStack(Stack):
    """A T5 stack of width d with a rung before each block; block j stands beside the backbone's layer keep[j]."""

    def __init__(self, config: T5Config, D: int, keep: Sequence[int], is_decoder: bool):
        super().__init__(replace(config, num_layers=len(keep), num_decoder_layers=len(keep)), is_decoder)
        self.keep = tuple(keep)
        self.down_emb = nn.Linear(D, config.d_model)  # the first rung has no gate: there is no h_side yet
        self.ladders = nn.ModuleList(Ladder(D, config.d_model) for _ in keep)

    def climb(self, backbone: Iterator[Tensor], mask: Tensor | None, memory: Tensor | None = None, memory_mask: Tensor | None = None,
              cache: list[dict] | None = None, h_visual: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Climb beside the backbone: take its embeddings, then one layer's output at a time.

        backbone yields (B, S, D); mask (B, S); the decoder's memory (B, S, d) and its mask -> h_side (B, S, d), last h_backbone (B, S, D)
        With embedded images h_visual (B, P, D) the side network reads both, [text ; images], S + P long (Sec. 4, "Vision-and-language").
        """
        h_backbone = next(backbone)
        h_side, P = h_backbone.to(self.down_emb.weight.dtype), 0
        if h_visual is not None:
            h_side, P = torch.cat([h_side, h_visual], dim=1), h_visual.size(1)  # (B, S + P, D)
            mask = behind(mask, h_side)
        h_side = self.down_emb(self.dropout(h_side))  # (B, S + P, d)
        self_bias, cross_bias = self.biases(h_side, mask, memory_mask, cache, P)
        for i, h_backbone in enumerate(backbone):
            if i in self.keep:  # Sec. 3.4.  Paper: the authors keep the gates of dropped layers as parameters that nothing reads; we have none.
                j = self.keep.index(i)
                h_side = self.run(self.rung, j, h_side, h_backbone, self_bias, memory, cross_bias, cache[j] if cache else None)
        return self.finish(h_side), h_backbone

    def rung(self, j: int, h_side: Tensor, h_backbone: Tensor, *rest) -> Tensor:
        """Rung j and the block behind it, (B, S, d) and (B, S, D) -> (B, S, d); checkpointing keeps these two inputs alone."""
        if (S := h_backbone.size(1)) == h_side.size(1):
            return self.blocks[j](self.ladders[j](h_side, h_backbone), *rest)
        # Paper: the authors' code scales the images' states by the gate; the paper adds to the text alone, and so does this.
        text = self.ladders[j](h_side[:, :S], h_backbone)
        return self.blocks[j](torch.cat([text, h_side[:, S:]], dim=1), *rest)


def check_keep(keep: Sequence[int] | None, config: T5Config) -> tuple[Sequence[int], Sequence[int]]:
    """The kept layers of encoder and decoder: all of each by default, else the same list for both."""
    if keep is None:
        return range(config.num_layers), range(config.num_decoder_layers)
    common = min(config.num_layers, config.num_decoder_layers)
    if not keep or len(set(keep)) < len(keep) or not set(keep) <= set(range(common)) or any(type(i) is not int for i in keep):
        raise ValueError(f"keep is {list(keep)}, but it must name at least one of the backbone's layers 0 to {common - 1}, each once")
    return sorted(keep), sorted(keep)


class LadderT5(nn.Module):
    """A frozen T5 and the ladder side network beside it.  Same forward and generate as T5.

    r: reduction factor; keep: 0-based backbone layers that have a side layer, in encoder and decoder (default: all of them).
    Trainable is what has `requires_grad`.  Starts at random; prune.py (Sec. 3.3) gives it weights of the backbone.
    Of a CLIP-T5 it takes over the visual embedding: the backbone reads text alone, so the embedding's gradient comes through the side network.
    """

    def __init__(self, backbone: T5, r: int = 8, keep: Sequence[int] | None = None):
        super().__init__()
        D, config = backbone.config.d_model, side_config(backbone.config, r)
        keep_encoder, keep_decoder = check_keep(keep, backbone.config)
        self.r = r
        self.encoder = SideStack(config, D, keep_encoder, is_decoder=False)
        self.decoder = SideStack(config, D, keep_decoder, is_decoder=True)
        self.up = nn.Linear(config.d_model, D)
        for module in self.modules():  # the authors' start without pruning: N(0, 0.01^2), bias 0, norms 1, position bias N(0, 1)
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.01 if isinstance(module, nn.Linear) else 1.0)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        self.visual, backbone.visual = backbone.visual, None
        self.to(backbone.embed.weight.device)
        self.backbone = backbone.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> "LadderT5":
        # Paper: the authors' backbone keeps its dropout while the side network trains; ours is deterministic, as it is when it answers.
        super().train(mode)
        self.backbone.eval()
        return self

    def encode(self, source_ids: Tensor, source_mask: Tensor, images: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Final encoder states of the backbone (B, S, D) and of the side network (B, S, d), which has those of the images behind the text's."""
        climb = without_grad(self.backbone.encoder_layers(source_ids, source_mask))
        h_visual = None if images is None else self.visual(images, self.backbone.embed.weight)
        memory_side, h_backbone = self.encoder.climb(climb, source_mask, h_visual=h_visual)
        with torch.no_grad():
            return self.backbone.encoder.finish(h_backbone), memory_side

    def decode(self, decoder_ids: Tensor, decoder_mask: Tensor | None, memories: tuple[Tensor, Tensor], source_mask: Tensor,
               caches: tuple = (None, None)) -> Tensor:
        """Logits (B, T, V): each decoder looks at the memory of its own encoder; the head is the backbone's, frozen."""
        climb = without_grad(self.backbone.decoder_layers(decoder_ids, decoder_mask, memories[0], source_mask, caches[0]))
        h_side, _ = self.decoder.climb(climb, decoder_mask, memories[1], behind(source_mask, memories[1]), caches[1])
        return self.backbone.logits(self.up(h_side).to(memories[0].dtype))

    def forward(self, source_ids: Tensor, source_mask: Tensor, decoder_ids: Tensor, decoder_mask: Tensor | None = None,
                images: Tensor | None = None) -> Tensor:
        return self.decode(decoder_ids, decoder_mask, self.encode(source_ids, source_mask, images), source_mask)

    def start(self, source_ids: Tensor, source_mask: Tensor, num_beams: int = 1, images: Tensor | None = None) -> Decoding:
        memories = tuple(memory.repeat_interleave(num_beams, dim=0) for memory in self.encode(source_ids, source_mask, images))
        caches = new_cache(len(self.backbone.decoder.blocks)), new_cache(len(self.decoder.blocks))
        return Decoding(memories, source_mask.repeat_interleave(num_beams, dim=0), caches)

    def step(self, ids: Tensor, state: Decoding) -> Tensor:
        """Feed one more token to each row, (B, 1) -> logits (B, V)."""
        return self.decode(ids, None, state.memories, state.source_mask, state.caches)[:, -1]

    def generate(self, source_ids: Tensor, source_mask: Tensor, max_new_tokens: int = 20, num_beams: int = 1, images: Tensor | None = None) -> Tensor:
        """Greedy or beam search -> (B, <= max_new_tokens) ids, no start token, PAD after the end."""
        return generate(self, source_ids, source_mask, max_new_tokens, num_beams, images)

    def shut_gates(self) -> "LadderT5":
        """mu = 0 on every rung, for good: the side network without its ladders (what Fig. 8 calls network compression)."""
        for ladder in [*self.encoder.ladders, *self.decoder.ladders]:
            nn.init.constant_(ladder.alpha, -torch.inf)
            ladder.requires_grad_(False)
        return self
