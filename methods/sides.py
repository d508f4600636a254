"""The paper's other side networks (Fig. 8, Table 4); their methods take what LadderT5's take.

    alone      network compression: no shortcuts, and the backbone's layers never run
    last       Side-tuning (arXiv:1912.13503): one shortcut, a gate before the head
    cross      cross-attention in place of the gates
    adapters   adapter blocks of the backbone's width in place of Transformer blocks
"""
from functools import partial

import torch
from torch import Tensor, nn

from methods.adapters import Adapter
from model import T5, Attention, Decoding, RMSNorm, T5Config, new_cache
from side import Gate, LadderT5, SideBlock, random_start, side_config


class PlainGate(Gate):
    """A gate between two streams of one width: nothing is brought down."""

    def __init__(self):
        super().__init__(1, 1)
        self.down = nn.Identity()


class WithoutRungs(LadderT5):
    """With one seed it starts as the ladder does: the rungs are drawn, too, before they go."""

    def __init__(self, backbone: T5, r=8, keep=None):
        super().__init__(backbone, r, keep)
        for stack in (self.encoder, self.decoder):
            stack.blocks = nn.ModuleList(SideBlock(None, layer.block) for layer in stack.blocks)
            stack.reads = ()


class Alone(WithoutRungs):
    """Network compression: word embeddings and head are all that it has of the backbone."""

    def embeddings(self, ids: Tensor) -> list[Tensor | None]:
        """What stands for the backbone's hidden states."""
        config = self.backbone.config
        most = max(config.num_layers, config.num_decoder_layers)
        return [self.backbone.embed(ids), *[None] * most]

    def hidden_states(self, source_ids, source_mask, decoder_ids, decoder_mask=None):
        return self.embeddings(source_ids), self.embeddings(decoder_ids)

    def start(self, source_ids, source_mask, images=None):
        memory_side = self.encode_side(self.embeddings(source_ids), source_mask, images)
        return Decoding([memory_side], [new_cache(len(self.decoder.blocks))])

    def step(self, ids, state):
        hidden, (memory_side,), (cache,) = self.embeddings(ids), state.memories, state.caches
        return self.logits(self.decode_side(hidden, None, memory_side, cache))[:, -1]


class SideTuning(WithoutRungs):
    """mu z + (1 - mu) up(h_side) goes to the head; z is the backbone's final state (B, T, D)."""

    def __init__(self, backbone: T5, r=8, keep=None):
        super().__init__(backbone, r, keep)
        self.output = PlainGate().to(backbone.embed.weight.device)

    def decode_side(self, hidden, *rest):
        return super().decode_side(hidden, *rest), self.backbone.decoder.finish(hidden[-1])

    def logits(self, states):
        h_side, z = states
        return self.backbone.logits(self.output(self.up(h_side), z).to(z.dtype))


class CrossAttention(nn.Module):
    """A rung that attends. h_side (B, S, d) asks; h_backbone (B, S, D), brought down, answers."""
    # Paper: in the authors' code it stands behind self-attention, and in the first layer without
    # position bias; ours stands where every rung does, before its block, with the bias everywhere.

    def __init__(self, D: int, d: int, config: T5Config):
        super().__init__()
        self.down, self.norm = nn.Linear(D, d), RMSNorm(d, config.layer_norm_epsilon)
        self.attention, self.dropout = Attention(config), nn.Dropout(config.dropout_rate)

    def forward(self, h_side: Tensor, h_backbone: Tensor, cache, bias, *context) -> Tensor:
        z = self.down(h_backbone.to(h_side.dtype))
        if cache is not None:  # while generating, z has one more position in every step
            z = torch.cat([cache["rung"]["z"], z], dim=1) if "rung" in cache else z
            cache["rung"] = {"z": z}
        return h_side + self.dropout(self.attention(self.norm(h_side), bias, memory=z))


class CrossLadder(LadderT5):
    def __init__(self, backbone: T5, r=8, keep=None):
        rung = partial(CrossAttention, config=side_config(backbone.config, r))
        super().__init__(backbone, r, keep, rung)

    def start_rungs(self) -> None:
        """Start each rung's attention as the self-attention of its block, once that is pruned."""
        for layer in (*self.encoder.blocks, *self.decoder.blocks):
            rung, block = layer.rung, layer.block
            rung.norm.load_state_dict(block.self_attention_norm.state_dict())
            rung.attention.load_state_dict(block.self_attention.state_dict())


class AdapterBlock(nn.Module):
    """Adapter, in the decoder cross-attention, gate, adapter. (B, T, D) -> (B, T, D)

    One matrix brings queries and memory (B, S, D) down to D / r; what comes up replaces h_side.
    """

    def __init__(self, wide: T5Config, r: int, is_decoder: bool):
        super().__init__()
        D, d, epsilon = wide.d_model, wide.d_model // r, wide.layer_norm_epsilon
        self.first, self.second = (Adapter(RMSNorm(D, epsilon), r) for _ in range(2))
        self.rung, self.dropout = PlainGate(), nn.Dropout(wide.dropout_rate)
        if is_decoder:
            self.down, self.norm, self.up = nn.Linear(D, d), RMSNorm(d, epsilon), nn.Linear(d, D)
            self.cross_attention = Attention(side_config(wide, r))

    def forward(self, h_side, h_backbone, cache, self_bias, memory=None, cross_bias=None):
        h = h_side + self.dropout(self.first(h_side))
        if memory is not None:
            q, memory, cross_cache = self.down(h), self.down(memory), cache and cache["cross"]
            x = self.cross_attention(self.norm(q), cross_bias, memory, cross_cache)
            h = self.up(q + self.dropout(x))
        h = self.rung(h, h_backbone)
        return h + self.dropout(self.second(h))


class AdapterLadder(LadderT5):
    # Paper: the other rows of Table 4 have r = 8, this one's 2.07 % and 6.5 GB are those of r = 16.
    def __init__(self, backbone: T5, r=16, keep=None):
        super().__init__(backbone, r, keep)
        wide, device = backbone.config, backbone.embed.weight.device
        for stack in (self.encoder, self.decoder):
            blocks = [AdapterBlock(wide, r, stack is self.decoder) for _ in stack.keep]
            stack.blocks = nn.ModuleList(blocks).apply(random_start).to(device)
            stack.final_norm = RMSNorm(wide.d_model, wide.layer_norm_epsilon).to(device)
            stack.down_emb = nn.Identity()
        self.up = nn.Identity()
        for bias in (self.encoder_bias, self.decoder_bias):
            bias.requires_grad_(False)  # only their masks matter: there is no self-attention


SIDES = {"ladder": LadderT5, "alone": Alone, "last": SideTuning, "cross": CrossLadder,
         "adapters": AdapterLadder}
