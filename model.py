"""T5 and CLIP-T5 in one file (arXiv:1910.10683): versions 1.0, 1.1 and Flan, and their weights.

    source_ids --> embed --> N encoder blocks --> norm --.        Block (pre-norm, residual):
                                                         | memory   h + self-attention(norm(h))
    decoder_ids -> embed --> N decoder blocks --> norm --+--> head  h + cross-attention(norm(h), .)
                                                                    h + feed-forward(norm(h))

Letters, the same in every file of this project:

    B batch   S source length   T target length   D backbone width (d_model)   d side width (D / r)
    H heads   K head width (d_kv)   V vocabulary   P image positions

Masks are boolean, True = attend. `bias` is added to attention scores: the position bias (0 in
cross-attention) where True, the lowest number where False.
"""
import contextlib
import json
import math
import re
from collections.abc import Collection
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from sentencepiece import SentencePieceProcessor
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from run.beam import beam_search
from run.hub import NotThere, hub_file

PAD, EOS, UNK = 0, 1, 2  # PAD also starts the decoder


# ---------------------------------------------------------------------------------- part 1: sizes

RUN_TIME = ("attention", "checkpoint")  # how to compute; no config.json has these fields
CHOICES = {"feed_forward_proj": ("relu", "gated-gelu"), "tie_word_embeddings": (True, False),
           "scale_decoder_outputs": (True, False), "attention": ("eager", "fused"),
           "checkpoint": (True, False)}


@dataclass(frozen=True)
class T5Config:
    """T5's sizes under their public names; the defaults are t5-small's. ValueError: a wrong one."""

    vocab_size: int = 32128
    d_model: int = 512
    d_kv: int = 64
    d_ff: int = 2048
    num_layers: int = 6
    num_decoder_layers: int | None = None  # None: as many as the encoder
    num_heads: int = 8
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    dropout_rate: float = 0.1
    layer_norm_epsilon: float = 1e-6
    feed_forward_proj: str = "relu"  # v1.0: "relu"; v1.1 and Flan: "gated-gelu"
    tie_word_embeddings: bool = True  # v1.0: the head is the embedding; v1.1, Flan: its own matrix
    scale_decoder_outputs: bool | None = None  # by D ** -0.5 before the head; None: if tied
    attention: str = "fused"  # "eager": the textbook lines; "fused": torch's kernel
    checkpoint: bool = False  # True: backward computes each block again (arXiv:1604.06174)

    def __post_init__(self):
        if self.num_decoder_layers is None:
            object.__setattr__(self, "num_decoder_layers", self.num_layers)
        if self.scale_decoder_outputs is None:
            object.__setattr__(self, "scale_decoder_outputs", self.tie_word_embeddings)
        for field in fields(self):
            value, most = getattr(self, field.name), 100 if "layers" in field.name else 2**20
            if field.name in CHOICES:
                right = value in CHOICES[field.name]
            elif field.type is float:
                right = type(value) in (int, float) and 0 <= value < 1
            else:
                right = type(value) is int and 1 <= value <= most
            if not right:
                raise ValueError(f"T5 config: {field.name} cannot be {value!r:.90}")
        if self.relative_attention_max_distance <= self.relative_attention_num_buckets // 2:
            raise ValueError("T5 config: relative_attention_max_distance is below half the buckets")

    @classmethod
    def from_json(cls, path: str | Path) -> "T5Config":
        """Read a public config.json; keys that do not describe the architecture are left out."""
        try:
            raw = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise ValueError(f"{path} is missing or no JSON ({error!s:.99}); {CONTENTS}") from None
        if not isinstance(raw, dict) or raw.get("model_type", "t5") != "t5" or "d_model" not in raw:
            raise ValueError(f"{path} does not describe a T5 (model_type 't5')")
        names = {field.name for field in fields(cls)} - set(RUN_TIME)
        return cls(**{name: raw[name] for name in names & raw.keys()})


# --------------------------------------------------------------------------------- part 1: layers

class RMSNorm(nn.Module):
    """Scale to unit mean square (arXiv:1910.07467), no mean and no bias. (..., D) -> (..., D)"""

    def __init__(self, width: int, epsilon: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.epsilon = epsilon

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.epsilon)


class PositionBias(nn.Module):
    """What all blocks of a stack add to their attention scores: position bias and masks.

    One learned number per head and bucket of distance, shared by all layers (arXiv:1910.10683,
    Sec. 2.1); public files keep the table in the first block.
    """

    def __init__(self, config: T5Config, is_decoder: bool):
        super().__init__()
        self.table = nn.Embedding(config.relative_attention_num_buckets, config.num_heads)
        nn.init.normal_(self.table.weight, std=config.d_model ** -0.5)
        self.is_decoder = is_decoder
        self.max_distance = config.relative_attention_max_distance

    def buckets(self, distance: Tensor) -> Tensor:
        """Near distances have a bucket each; far ones share buckets of logarithmic width."""
        num, bucket = self.table.num_embeddings, torch.zeros_like(distance)
        if self.is_decoder:
            distance = (-distance).clamp(min=0)
        else:  # half of the buckets for the past, half for the future
            num //= 2
            bucket = num * (distance > 0)
            distance = distance.abs()
        exact = num // 2
        log = torch.log(distance.clamp(min=1).float() / exact)
        log = log / torch.log(torch.tensor(self.max_distance / exact))
        far = (exact + (log * (num - exact)).long()).clamp(max=num - 1)
        return bucket + torch.where(distance < exact, distance, far)

    def positions(self, T: int, S: int) -> Tensor:
        """The bias (1, H, T, S) of the last T of S positions towards all of them."""
        keys = torch.arange(S, device=self.table.weight.device)
        buckets = self.buckets(keys[None, :] - keys[S - T :, None])
        return self.table(buckets).permute(2, 0, 1).contiguous()[None]  # rows, as CUDA wants them

    def forward(self, T: int, mask: Tensor | None = None, memory_mask: Tensor | None = None,
                past: int = 0, P: int = 0) -> tuple[Tensor, Tensor | None]:
        """Biases of T new positions behind `past` ones, for self- and for cross-attention.

        mask (B, past + T), memory_mask (B, S) -> (B or 1, H, T, past + T), (B, 1, T, S) or None
        The last P positions are images, without distances to others (arXiv:2102.02779, Sec. 3.1).
        """
        S, weight = past + T, self.table.weight
        allowed = torch.ones(T, S, dtype=torch.bool, device=weight.device)[None, None]
        if self.is_decoder:
            allowed = allowed.tril(S - T)  # a position sees itself and the past
        if mask is not None:
            assert mask.dtype == torch.bool and mask.size(1) == S, f"{mask.shape}, not (B, {S})"
            if mask.device.type != "cpu" or not mask.all():  # else all rows share one bias
                allowed = allowed & mask[:, None, None, :]  # (B, 1, T, S)
        lowest = torch.finfo(weight.dtype).min  # not -inf: a row without any True would give NaN
        pos_bias = self.positions(T - P, S - P)
        if P:
            pos_bias = F.pad(pos_bias, (0, P, 0, P))  # (1, H, T, S)
        self_bias = torch.where(allowed, pos_bias, lowest)  # (B or 1, H, T, S)
        if memory_mask is None:
            return self_bias, None
        cross_bias = torch.zeros_like(memory_mask, dtype=weight.dtype)
        cross_bias = cross_bias.masked_fill(~memory_mask, lowest)
        return self_bias, cross_bias[:, None, None, :].expand(-1, -1, T, -1)  # (B, 1, T, S)


class Attention(nn.Module):
    """Multi-head attention without biases and, as always in T5, without 1 / sqrt(K).

    x (B, T, D) looks at itself or at memory (B, S, D) -> (B, T, D); bias broadcasts to (B, H, T, S)
    cache: a dict that keeps keys and values (B, H, S, K) while generating.
    """

    def __init__(self, config: T5Config):
        super().__init__()
        D, inner = config.d_model, config.num_heads * config.d_kv  # differ in T5-3B and v1.1-small
        self.num_heads, self.fused = config.num_heads, config.attention == "fused"
        self.dropout = nn.Dropout(config.dropout_rate)
        self.q, self.k, self.v = (nn.Linear(D, inner, bias=False) for _ in range(3))
        self.o = nn.Linear(inner, D, bias=False)
        nn.init.normal_(self.q.weight, std=(D * config.d_kv) ** -0.5)  # for the missing 1 / sqrt(K)
        nn.init.normal_(self.k.weight, std=D ** -0.5)
        nn.init.normal_(self.v.weight, std=D ** -0.5)
        nn.init.normal_(self.o.weight, std=inner ** -0.5)

    def split_heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # (B, H, S, K)

    def weights(self, scores: Tensor) -> Tensor:
        return self.dropout(torch.softmax(scores, dim=-1))  # (B, H, T, S)

    def forward(self, x: Tensor, bias: Tensor, memory: Tensor | None = None,
                cache: dict | None = None) -> Tensor:
        q = self.split_heads(self.q(x))
        if cache and memory is not None:  # cross-attention after the first step: as it was
            k, v = cache["k"], cache["v"]
        else:
            source = x if memory is None else memory
            k, v = self.split_heads(self.k(source)), self.split_heads(self.v(source))
            if cache:  # self-attention after the first step: one more position
                k, v = torch.cat([cache["k"], k], dim=2), torch.cat([cache["v"], v], dim=2)
        if cache is not None:
            cache.update(k=k, v=v)
        p = self.dropout.p if self.training else 0.0
        if self.fused and (p == 0 or q.device.type != "cpu"):  # CPUs have no kernel with dropout
            h = F.scaled_dot_product_attention(q, k, v, bias.to(q.dtype), p, scale=1.0)
        else:
            scores = q @ k.mT  # (B, H, T, S)
            scores += bias  # in place: no second score tensor
            h = self.weights(scores) @ v
        return self.o(h.transpose(1, 2).flatten(2))  # (B, T, D)


class FeedForward(nn.Module):
    """wo relu(wi x); since v1.1 wo (gelu(wi_0 x) * wi_1 x) (arXiv:2002.05202). Keeps (B, T, D)."""

    def __init__(self, config: T5Config):
        super().__init__()
        D, d_ff = config.d_model, config.d_ff
        self.gated = config.feed_forward_proj == "gated-gelu"
        self.dropout = nn.Dropout(config.dropout_rate)
        if self.gated:
            self.wi_0 = nn.Linear(D, d_ff, bias=False)
            self.wi_1 = nn.Linear(D, d_ff, bias=False)
        else:
            self.wi = nn.Linear(D, d_ff, bias=False)
        self.wo = nn.Linear(d_ff, D, bias=False)
        for linear in self.children():
            if isinstance(linear, nn.Linear):
                nn.init.normal_(linear.weight, std=linear.in_features ** -0.5)

    def forward(self, x: Tensor) -> Tensor:
        if self.gated:
            h = self.dropout(F.gelu(self.wi_0(x), approximate="tanh") * self.wi_1(x))
        else:
            # Paper: T5 drops after ReLU. Before it is the same, and backward needs one tensor less.
            h = F.relu(self.dropout(self.wi(x)), inplace=True)
        return self.wo(h)


class Block(nn.Module):
    """One T5 layer. h (B, T, D) -> (B, T, D); a decoder's also looks at `memory` (B, S, D)."""

    def __init__(self, config: T5Config, is_decoder: bool):
        super().__init__()
        self.self_attention_norm = RMSNorm(config.d_model, config.layer_norm_epsilon)
        self.self_attention = Attention(config)
        if is_decoder:
            self.cross_attention_norm = RMSNorm(config.d_model, config.layer_norm_epsilon)
            self.cross_attention = Attention(config)
        self.feed_forward_norm = RMSNorm(config.d_model, config.layer_norm_epsilon)
        self.feed_forward = FeedForward(config)
        self.dropout = nn.Dropout(config.dropout_rate)

    def forward(self, h: Tensor, cache: dict | None, self_bias: Tensor,
                memory: Tensor | None = None, cross_bias: Tensor | None = None) -> Tensor:
        self_cache, cross_cache = (cache["self"], cache["cross"]) if cache else (None, None)
        x = self.self_attention_norm(h)
        h = h + self.dropout(self.self_attention(x, self_bias, cache=self_cache))
        if memory is not None:
            x = self.cross_attention_norm(h)
            h = h + self.dropout(self.cross_attention(x, cross_bias, memory, cross_cache))
        return h + self.dropout(self.feed_forward(self.feed_forward_norm(h)))


def call(block: nn.Module, *inputs, recompute: bool) -> Tensor:
    """block(*inputs). To recompute, autograd keeps the inputs and nothing of the block's inside."""
    if recompute and torch.is_grad_enabled():
        return checkpoint(block, *inputs, use_reentrant=False)
    return block(*inputs)


class Memory(NamedTuple):
    """An encoder's output, which the decoder's cross-attention reads."""

    h: Tensor     # (B, S, D); a side encoder's is (B, S + P, d)
    mask: Tensor  # (B, S)


class Stack(nn.Module):
    """The blocks of an encoder or a decoder with what they share: position bias, final norm."""

    def __init__(self, config: T5Config, is_decoder: bool):
        super().__init__()
        num_layers = config.num_decoder_layers if is_decoder else config.num_layers
        self.checkpoint = config.checkpoint
        self.blocks = nn.ModuleList(Block(config, is_decoder) for _ in range(num_layers))
        self.pos_bias = PositionBias(config, is_decoder)
        self.final_norm = RMSNorm(config.d_model, config.layer_norm_epsilon)
        self.dropout = nn.Dropout(config.dropout_rate)

    def forward(self, h: Tensor, mask: Tensor | None, memory: Memory | None = None,
                cache: list[dict] | None = None, P: int = 0,
                keep: Collection[int] = ()) -> list[Tensor | None]:
        """Hidden states, (B, T, D) each: the embedded input, then every block's output.

        They are the raw residual stream; `finish` takes the last one. A state that nobody reads,
        because `keep` does not name its 0-based layer and it is not the last, is None.
        """
        memory, memory_mask = memory or (None, None)
        self_bias, cross_bias = self.pos_bias(h.size(1), mask, memory_mask, cached_length(cache), P)
        hidden = [h := self.dropout(h)]
        for i, block in enumerate(self.blocks):
            inputs = h, cache[i] if cache else None, self_bias, memory, cross_bias
            h = call(block, *inputs, recompute=self.checkpoint)
            hidden.append(h if i in keep else None)
        hidden[-1] = h
        return hidden

    def finish(self, h: Tensor) -> Tensor:
        return self.dropout(self.final_norm(h))


# ---------------------------------------------------------------------- part 1: model, generation

class Generates:
    """Generation for whatever has `start` and `step`: T5, LadderT5 and llm/'s models."""

    pad, eos = PAD, EOS

    @torch.no_grad()
    def generate(self, source_ids: Tensor, source_mask: Tensor, max_new_tokens: int = 20,
                 num_beams: int = 1, images: Tensor | None = None) -> Tensor:
        """Greedy or beam search -> (B, <= max_new_tokens) ids; no start token, `pad` at the end."""
        state, B = self.start(source_ids, source_mask, images), len(source_ids)
        if num_beams > 1:
            state.repeat(num_beams)
            return beam_search(lambda ids: self.step(ids, state), state.reorder, B, num_beams,
                               max_new_tokens, source_ids.device, self.pad, self.eos)
        last = source_ids.new_full((B, 1), self.pad)
        done, output = torch.zeros_like(last, dtype=torch.bool), []
        for _ in range(max_new_tokens):
            last = self.step(last, state).argmax(dim=-1, keepdim=True)  # (B, 1)
            output.append(last := last.masked_fill(done, self.pad))
            done |= last == self.eos
            if done.all():
                break
        return torch.cat(output, dim=1)  # (B, T)


class T5(Generates, nn.Module):
    """Encoder, decoder and head with random weights; `load_t5` fills in public ones.

    t5(source_ids (B, S), source_mask (B, S), decoder_ids (B, T)) -> logits (B, T, V)
    """

    def __init__(self, config: T5Config):
        super().__init__()
        self.config, V, D = config, config.vocab_size, config.d_model
        self.embed = nn.Embedding(V, D)
        self.encoder = Stack(config, is_decoder=False)
        self.decoder = Stack(config, is_decoder=True)
        self.head = None if config.tie_word_embeddings else nn.Linear(D, V, bias=False)
        self.visual: nn.Module | None = None  # only a CLIPT5 has one
        self.prompt: nn.Module | None = None  # methods/prompt.py: puts vectors before the words
        self.head_bias: nn.Parameter | None = None  # methods/bitfit.py: (V)

    def embed_source(self, source_ids: Tensor, source_mask: Tensor | None,
                     images: Tensor | None = None) -> tuple[Tensor, Tensor | None, int]:
        """What the encoder reads (B, S, D), its mask (B, S), and how much of S is images."""
        assert images is None, "only a CLIPT5 reads images"
        h = self.embed(source_ids)
        return (h, source_mask, 0) if self.prompt is None else (*self.prompt(h, source_mask), 0)

    def encode(self, source_ids: Tensor, source_mask: Tensor, images: Tensor | None = None,
               keep: Collection[int] = ()) -> tuple[list, Memory]:
        """The encoder's hidden states (see Stack), and what the decoder reads of it."""
        h, mask, P = self.embed_source(source_ids, source_mask, images)
        hidden = self.encoder(h, mask, P=P, keep=keep)
        return hidden, Memory(self.encoder.finish(hidden[-1]), mask)

    def decode(self, decoder_ids: Tensor, decoder_mask: Tensor | None, memory: Memory,
               cache: list[dict] | None = None, keep: Collection[int] = ()) -> list:
        """The decoder's hidden states (see Stack)."""
        return self.decoder(self.embed(decoder_ids), decoder_mask, memory, cache, keep=keep)

    def logits(self, h: Tensor) -> Tensor:
        """The head, after the final norm: (B, T, D) -> (B, T, V). v1.0 scales by D ** -0.5."""
        if self.config.scale_decoder_outputs:
            h = h * self.config.d_model ** -0.5
        logits = F.linear(h, self.embed.weight if self.head is None else self.head.weight)
        return logits if self.head_bias is None else logits + self.head_bias.to(h.dtype)

    def forward(self, source_ids: Tensor, source_mask: Tensor, decoder_ids: Tensor,
                decoder_mask: Tensor | None = None, images: Tensor | None = None) -> Tensor:
        memory = self.encode(source_ids, source_mask, images)[1]  # hidden states are freed
        hidden = self.decode(decoder_ids, decoder_mask, memory)
        return self.logits(self.decoder.finish(hidden[-1]))

    def start(self, source_ids: Tensor, source_mask: Tensor,
              images: Tensor | None = None) -> "Decoding":
        _, memory = self.encode(source_ids, source_mask, images)
        return Decoding([memory], [new_cache(len(self.decoder.blocks))])

    def step(self, ids: Tensor, state: "Decoding") -> Tensor:
        """Feed one more token to each row, (B, 1) -> logits (B, V)."""
        hidden = self.decode(ids, None, state.memories[0], state.caches[0])
        return self.logits(self.decoder.finish(hidden[-1]))[:, -1]


@dataclass
class Decoding:
    """Where a generation stands. T5 has one memory and cache, a ladder two: backbone and side."""

    memories: list[Memory]
    caches: list[list[dict]]  # per decoder layer {"self": {k, v}, "cross": {k, v}}

    def repeat(self, num_beams: int) -> None:
        self.memories = [Memory(*(tensor.repeat_interleave(num_beams, dim=0) for tensor in memory))
                         for memory in self.memories]

    def reorder(self, rows: Tensor) -> None:
        """Beams move between rows. Those of one source share its cross-attention."""
        for layer in (layer for cache in self.caches for layer in cache):
            for name in layer.keys() - {"cross"}:
                layer[name] = {key: tensor[rows] for key, tensor in layer[name].items()}


def new_cache(num_layers: int) -> list[dict]:
    # Paper: the authors' code fills one in training, too, which costs memory and serves nobody.
    return [{"self": {}, "cross": {}} for _ in range(num_layers)]


def cached_length(cache: list[dict] | None) -> int:
    return cache[0]["self"]["k"].size(2) if cache and cache[0]["self"] else 0


# --------------------------------------------------------------------------- part 1: public files

NANO = Path(__file__).parent / "assets" / "nano"  # the backbone that comes with this repository
CONTENTS = "a backbone's folder holds config.json, model.safetensors and spiece.model"
T5_V1_SPIECE = "d60acb128cf7b7f2536e8f38a5b18a05535c9e14c7a355904270e15b0945ea86"
PUBLIC = {  # name: (repository, revision, sha256 of model.safetensors), from the public listings
    "t5-small": ("google-t5/t5-small", "df1b051c49625cf57a3d0d8d3863ed4d13564fe4",
                 "bd944e5f1b3ad9b70dd9d00010a517059e19265671076b8b0a4a58d9491842bc"),
    "t5-base": ("google-t5/t5-base", "a9723ea7f1b39c1eae772870f3b547bf6ef7e6c1",
                "a90903540cc02cbeb7ff9f823f1a80eb778c7e22426a0e620b01c77a5ec8f5b4"),
    "t5-large": ("google-t5/t5-large", "150ebc2c4b72291e770f58e6057481c8d2ed331a",
                 "bb566a699a6939ffa2ac2fa7eb26fd02b13d4d14956186d7af1e46ce19c67d32"),
    "t5-3b": ("google-t5/t5-3b", "bed96aab9ee46012a5046386105ee5fd0ac572f0",
              "a0e6c24ae12dd1c39e454fede314b20311c9e83e9e785b0141e8586010ef7766"),
    "flan-t5-small": ("google/flan-t5-small", "main",
                      "495fa51e204676f1a857a9fc13c4c89f3f5ba9f480b898cebca02add25e6d749"),
    "flan-t5-base": ("google/flan-t5-base", "main",
                     "1dfb70afdcedceb9f9fae2f9b68e004ad934361fb35b9b2bd50b45ea90790fc8"),
}
NAMES = {  # a public parameter: ours, both without ".weight"; None: not used
    "shared": "embed",
    "lm_head": "head",
    "{}.embed_tokens": None,  # a copy of `shared`
    "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias": None,  # in v1.0 files
    "{}.block.0.layer.0.SelfAttention.relative_attention_bias": "{}.pos_bias.table",
    "{}.block.{}.layer.0.layer_norm": "{}.blocks.{}.self_attention_norm",
    "{}.block.{}.layer.0.SelfAttention.{}": "{}.blocks.{}.self_attention.{}",
    "encoder.block.{}.layer.1.layer_norm": "encoder.blocks.{}.feed_forward_norm",
    "encoder.block.{}.layer.1.DenseReluDense.{}": "encoder.blocks.{}.feed_forward.{}",
    "decoder.block.{}.layer.1.layer_norm": "decoder.blocks.{}.cross_attention_norm",
    "decoder.block.{}.layer.1.EncDecAttention.{}": "decoder.blocks.{}.cross_attention.{}",
    "decoder.block.{}.layer.2.layer_norm": "decoder.blocks.{}.feed_forward_norm",
    "decoder.block.{}.layer.2.DenseReluDense.{}": "decoder.blocks.{}.feed_forward.{}",
    "{}.final_layer_norm": "{}.final_norm",
}


def rename(name: str, names: dict[str, str | None]) -> str | None:
    """The other name of a parameter by such a table; {} is a stack, a layer or a matrix."""
    for pattern, other in names.items():
        match = re.fullmatch(re.escape(f"{pattern}.weight").replace(r"\{\}", r"(\w+)"), name)
        if match:
            return other and f"{other.format(*match.groups())}.weight"
    return name


def locate(model: str | Path, filename: str) -> Path:
    """A backbone's file: of "nano", of a public name (downloaded once, checked), or of a folder."""
    folder = NANO if model == "nano" else Path(model).expanduser()
    if folder.is_dir():
        return folder / filename
    for name, (repo, revision, weights) in PUBLIC.items():
        if model in (name, repo):
            spiece = T5_V1_SPIECE if repo.startswith("google-t5/") else None
            sha256 = {"model.safetensors": weights, "spiece.model": spiece}.get(filename)
            return hub_file(repo, filename, revision, sha256)
    raise ValueError(f"model {str(model)!r} is neither a folder nor nano, {', '.join(PUBLIC)}")


def weight_files(model: str | Path) -> list[Path]:
    """model.safetensors, or the shards that model.safetensors.index.json lists."""
    with contextlib.suppress(NotThere):
        path = locate(model, "model.safetensors")
        if path.is_file():
            return [path]
    index = locate(model, "model.safetensors.index.json")
    try:
        shards = set(json.loads(index.read_bytes())["weight_map"].values())
        assert shards and all(re.fullmatch(r"\w[\w.-]{,99}", name) for name in shards)
    except FileNotFoundError:
        raise ValueError(f"{model} has no model.safetensors; {CONTENTS}") from None
    except (ValueError, KeyError, TypeError, AttributeError, AssertionError, RecursionError):
        raise ValueError(f"{index} is not an index of safetensors shards; get it again") from None
    return [locate(model, name) for name in sorted(shards)]


def read_weights(paths: list[Path]) -> dict[str, Tensor]:
    """All tensors of these files under their public names, mapped from the disk."""
    weights = {}
    for path in paths:
        try:
            weights |= load_file(path)
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path} is missing or no safetensors file ({error!s:.99}): "
                             "download it again, or run `git lfs pull`") from None
    return weights


def load_t5(model: str | Path, device: str | torch.device = "cpu",
            dtype: torch.dtype = torch.float32, attention: str = "fused", checkpoint: bool = False,
            dropout: float | None = None, channels: int | None = None) -> "T5 | CLIPT5":
    """A T5 with the weights of a folder or of a public name, strictly loaded, in eval mode.

    dropout: in place of the config's rate. channels: C of CLIP's grids; then it is a CLIPT5, whose
    visual embedding starts at random. ValueError: float16, an unknown name, files that do not fit.
    """
    if dtype == torch.float16:
        raise ValueError("float16: T5's activations overflow it; choose float32 or bfloat16")
    config = T5Config.from_json(locate(model, "config.json"))
    weights = read_weights(weight_files(model))
    for copy in ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight"):
        if "shared.weight" not in weights and copy in weights:  # a copy may be the only one
            weights["shared.weight"] = weights[copy]
    # What transformers 5 saves says that v1.1 is tied, too; the head in the file knows better.
    head, tied = weights.get("lm_head.weight"), config.tie_word_embeddings
    if tied and head is not None and torch.equal(head, weights["shared.weight"]):
        del weights["lm_head.weight"]
    config = replace(config, tie_word_embeddings=tied and "lm_head.weight" not in weights,
                     attention=attention, checkpoint=checkpoint,
                     dropout_rate=config.dropout_rate if dropout is None else dropout)
    with torch.device("meta"), patch("torch.nn.init.normal_"):  # no random numbers: the file's come
        t5 = T5(config) if channels is None else CLIPT5(config, channels)
    state = {rename(name, NAMES): tensor.to(device, dtype) for name, tensor in weights.items()}
    state.pop(None, None)
    if channels is not None:
        visual = VisualEmbedding(channels, config).to(device)
        state |= {f"visual.{name}": tensor for name, tensor in visual.state_dict().items()}
    try:
        t5.load_state_dict(state, strict=True, assign=True)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:400]
        raise ValueError(f"the weights of {model} do not fit its config.json: {reason}") from None
    return t5.eval()


def save_t5(t5: T5, folder: str | Path, dtype: torch.dtype = torch.float32) -> None:
    """Write config.json and model.safetensors under their public names, for load_t5 and others."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    public = {ours: theirs for theirs, ours in NAMES.items() if ours}
    weights = {rename(name, public): p.detach().to("cpu", dtype).contiguous()
               for name, p in t5.named_parameters()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = {name: value for name, value in asdict(t5.config).items() if name not in RUN_TIME}
    config |= {"architectures": ["T5ForConditionalGeneration"], "model_type": "t5",
               "pad_token_id": PAD, "eos_token_id": EOS, "decoder_start_token_id": PAD}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


# ------------------------------------------------------------------------------ part 1: tokenizer

SENTINELS = 100  # <extra_id_0> ... <extra_id_99>, the last ids, counted from the end


class Tokenizer:
    """SentencePiece with T5's sentinels on top. Text that looks like an end token is text."""

    start, end, space, eos, longest = [], [EOS], "", EOS, 128  # of a source; a Llama has others

    def __init__(self, path: str | Path):
        try:
            self.pieces = SentencePieceProcessor(model_file=str(path))
        except (RuntimeError, OSError, UnicodeDecodeError):
            raise ValueError(f"{path} is missing or no SentencePiece model; {CONTENTS}") from None
        special = (self.pieces.pad_id(), self.pieces.eos_id(), self.pieces.unk_id())
        if special != (PAD, EOS, UNK):
            raise ValueError(f"{path} is not T5's: its pad, end and unknown are {special}")
        self.vocab_size = self.pieces.vocab_size() + SENTINELS

    def encode(self, text: str) -> list[int]:
        """Ids without the end token. Sentinels take the space around them along."""
        parts = re.split(r"<extra_id_([0-9]|[1-9][0-9])>", text)  # text, number, text, number, ...
        ids = self.pieces.encode(parts[0])
        for number, rest in zip(parts[1::2], parts[2::2]):
            ids += [self.vocab_size - 1 - int(number), *self.pieces.encode(rest)]
        return ids

    def decode(self, ids: list[int]) -> str:
        """Text up to the end token. Ids beyond the vocabulary (spare rows) are unknown."""
        words, text_ids = [], []
        for i in [int(i) for i in ids] + [EOS]:
            if i == EOS or self.pieces.vocab_size() <= i < self.vocab_size:  # the end, a sentinel
                words += [self.pieces.decode(text_ids)] if text_ids else []
                text_ids = []
                if i == EOS:
                    break
                words.append(f"<extra_id_{self.vocab_size - 1 - i}>")
            elif i != PAD:
                text_ids.append(i if 0 < i < self.vocab_size else UNK)
        return " ".join(words)


def load_tokenizer(model: str | Path) -> Tokenizer:
    """The tokenizer of "nano", a public name or a folder."""
    return Tokenizer(locate(model, "spiece.model"))


# -------------------------------------------------------------------------------- part 2: CLIP-T5

class VisualEmbedding(nn.Module):
    """The grids of a frozen CLIP at T5's width (arXiv:2112.06825, arXiv:2102.02779, Sec. 3.1).

    A cell is the sum of its projected feature, its projected box, which image it belongs to, and
    its number there, for which T5's own word embeddings serve, from the last one down.
    images (B, N, G, C), N grids of G = g * g cells; words (V, D) -> (B, P, D) with P = N * G
    """

    def __init__(self, C: int, config: T5Config, images: int = 2):
        super().__init__()
        D, epsilon = config.d_model, config.layer_norm_epsilon
        self.feature, self.feature_norm = nn.Linear(C, D), RMSNorm(D, epsilon)
        self.box, self.box_norm = nn.Linear(5, D), RMSNorm(D, epsilon)
        self.image_order = nn.Embedding(images, D)

    def boxes(self, G: int) -> Tensor:
        """Corners x1, y1, x2, y2 of the cells in an image of size 1, and their area. (G, 5)"""
        # Paper: the authors' boxes are all zero, which projects to a constant; ours tell the place.
        g = math.isqrt(G)
        assert g * g == G, f"the grid must be square, it has {G} cells"
        edge = torch.arange(g, device=self.box.weight.device) / g
        y, x = torch.meshgrid(edge, edge, indexing="ij")
        corners = [x, y, x + 1 / g, y + 1 / g, torch.full_like(x, 1 / G)]
        return torch.stack(corners, dim=-1).flatten(0, 1)  # (G, 5)

    def forward(self, images: Tensor, words: Tensor) -> Tensor:
        N, G = images.shape[1:3]
        h = self.feature_norm(self.feature(images)) + self.box_norm(self.box(self.boxes(G)))
        h = h + self.image_order.weight[:N, None] + words[-G:].flip(0).to(h.dtype)  # (B, N, G, D)
        return h.flatten(1, 2)  # (B, P, D)


def append_images(h: Tensor, mask: Tensor, h_visual: Tensor) -> tuple[Tensor, Tensor]:
    """Images go behind the text and are never padded: -> (B, S + P, D), (B, S + P)."""
    h = torch.cat([h, h_visual.to(h.dtype)], dim=1)
    return h, F.pad(mask, (0, h_visual.size(1)), value=True)


class CLIPT5(T5):
    """A T5 whose encoder reads the cells of images behind the text (Sec. 4, arXiv:2112.06825).

    channels: C of CLIP's grids. What takes `source_ids` also takes `images` (B, N, G, C).
    """

    def __init__(self, config: T5Config, channels: int):
        super().__init__(config)
        self.visual = VisualEmbedding(channels, config)

    def embed_source(self, source_ids: Tensor, source_mask: Tensor | None,
                     images: Tensor | None = None) -> tuple[Tensor, Tensor | None, int]:
        h, mask, _ = super().embed_source(source_ids, source_mask)
        if images is None:
            return h, mask, 0
        h_visual = self.visual(images, self.embed.weight)
        return *append_images(h, mask, h_visual), h_visual.size(1)
