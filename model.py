"""T5 and CLIP-T5 in one file (arXiv:1910.10683): versions 1.0, 1.1 and Flan, their public weights, and generation.

    source_ids --> embed --> N encoder blocks --> norm --.                  Block (pre-norm, residual):
                                                         | memory             h + self-attention(norm(h))
    decoder_ids -> embed --> N decoder blocks --> norm --+--> head            h + cross-attention(norm(h), memory)   decoder only
                                                                              h + feed-forward(norm(h))

Letters, the same in every file of this project:

    B batch   S source length   T target length   D backbone width (d_model)   d side width (D / r)
    H heads   K head width (d_kv)   V vocabulary   P image positions

Masks are boolean, True = attend.  `bias` is what is added to attention scores: position bias where True, -inf-like where False.
"""
import json
import math
import re
import reprlib
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from sentencepiece import SentencePieceProcessor
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from download import NotThere, hub_file

PAD, EOS, UNK = 0, 1, 2  # PAD also starts the decoder
SENTINELS = 100  # <extra_id_0> ... <extra_id_99>, the last ids of the tokenizer, counted from the end

# name: (repository, revision, sha256 of model.safetensors), from the public file listings
T5_V1_SPIECE = "d60acb128cf7b7f2536e8f38a5b18a05535c9e14c7a355904270e15b0945ea86"
PUBLIC = {
    "t5-small": ("google-t5/t5-small", "df1b051c49625cf57a3d0d8d3863ed4d13564fe4", "bd944e5f1b3ad9b70dd9d00010a517059e19265671076b8b0a4a58d9491842bc"),
    "t5-base": ("google-t5/t5-base", "a9723ea7f1b39c1eae772870f3b547bf6ef7e6c1", "a90903540cc02cbeb7ff9f823f1a80eb778c7e22426a0e620b01c77a5ec8f5b4"),
    "t5-large": ("google-t5/t5-large", "150ebc2c4b72291e770f58e6057481c8d2ed331a", "bb566a699a6939ffa2ac2fa7eb26fd02b13d4d14956186d7af1e46ce19c67d32"),
    "t5-3b": ("google-t5/t5-3b", "bed96aab9ee46012a5046386105ee5fd0ac572f0", "a0e6c24ae12dd1c39e454fede314b20311c9e83e9e785b0141e8586010ef7766"),
    "flan-t5-small": ("google/flan-t5-small", "main", "495fa51e204676f1a857a9fc13c4c89f3f5ba9f480b898cebca02add25e6d749"),
    "flan-t5-base": ("google/flan-t5-base", "main", "1dfb70afdcedceb9f9fae2f9b68e004ad934361fb35b9b2bd50b45ea90790fc8"),
}
brief = reprlib.Repr()  # for errors: what a damaged file holds may be a megabyte long, or nested a thousand deep
brief.maxstring = 90
NANO = Path(__file__).parent / "assets" / "nano"  # the backbone that comes with this repository


# ---------------------------------------------------------------------------------------------------------------- config

RUN_TIME = ("attention", "checkpoint")  # fields that say how to compute; config.json does not hold them


@dataclass(frozen=True)
class T5Config:
    """T5's sizes under their public names; the defaults are t5-small's.  Wrong values are a ValueError."""

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
    tie_word_embeddings: bool = True  # v1.0: the head is the embedding; v1.1 and Flan: its own matrix
    attention: str = "fused"  # "eager": the textbook lines; "fused": torch's scaled_dot_product_attention
    checkpoint: bool = False  # True: backward computes each block again instead of keeping what is inside it

    def __post_init__(self):
        if self.num_decoder_layers is None:
            object.__setattr__(self, "num_decoder_layers", self.num_layers)
        for name in ("vocab_size", "d_model", "d_kv", "d_ff", "num_layers", "num_decoder_layers", "num_heads",
                     "relative_attention_num_buckets", "relative_attention_max_distance"):
            value = getattr(self, name)
            limit = 100 if name.endswith("layers") else 2**20
            if type(value) is not int or not 1 <= value <= limit:
                raise ValueError(f"T5 config: {name} is {brief.repr(value)}, it must be a whole number from 1 to {limit}")
        if self.relative_attention_num_buckets % 4 or self.relative_attention_max_distance <= self.relative_attention_num_buckets // 2:
            raise ValueError("T5 config: relative_attention_num_buckets must be a multiple of 4, and relative_attention_max_distance above half of it")
        for name, low, high in (("dropout_rate", 0, 0.999), ("layer_norm_epsilon", 0, 1)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
                raise ValueError(f"T5 config: {name} is {brief.repr(value)}, it must be a number from {low} to {high}")
        for name, allowed in (("feed_forward_proj", ("relu", "gated-gelu")), ("tie_word_embeddings", (True, False)), ("attention", ("eager", "fused")),
                              ("checkpoint", (True, False))):
            value = getattr(self, name)
            if type(value) is not type(allowed[0]) or value not in allowed:  # 1 == True
                raise ValueError(f"T5 config: {name} is {brief.repr(value)}, choose from {allowed}")

    @classmethod
    def from_json(cls, path: str | Path) -> "T5Config":
        """Read a public config.json; keys that do not describe the architecture are left alone."""
        try:
            raw = json.loads(Path(path).read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:  # also bytes that are no UTF-8, and numbers of thousands of digits
            raise ValueError(f"{path} is not a JSON file ({error}); get config.json again") from None
        if not isinstance(raw, dict) or raw.get("model_type", "t5") not in ("t5", "mt5"):
            raise ValueError(f"{path} does not describe a T5 (model_type {brief.repr(raw.get('model_type') if isinstance(raw, dict) else None)}, must be 't5')")
        missing = [name for name in ("vocab_size", "d_model", "d_kv", "d_ff", "num_layers", "num_heads") if name not in raw]
        if missing:
            raise ValueError(f"{path} lacks {missing[:3]}: not a T5 config.json")
        try:
            return cls(**{field.name: raw[field.name] for field in fields(cls) if field.name in raw and field.name not in RUN_TIME})
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None


# ---------------------------------------------------------------------------------------------------------------- layers

class RMSNorm(nn.Module):
    """Scale to unit mean square (arXiv:1910.07467), no mean and no bias.  (..., D) -> (..., D)"""

    def __init__(self, width: int, epsilon: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.epsilon = epsilon

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.epsilon)


class Dropout(nn.Dropout):
    """Zero each element with probability p, scale the others by 1 / (1 - p).

    On a CPU nn.Dropout spends its time on random numbers; here 64 random bits decide about four elements, p in steps of 2^-16.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0:
            return x
        if x.device.type != "cpu":
            return torch.native_dropout(x, self.p, True)[0]
        bits = torch.empty(x.numel() // 4 + 1, dtype=torch.int64).random_(-2**63, None).view(torch.int16)[: x.numel()].view(x.shape)
        return x * bits.float().ge_(self.p * 2**16 - 2**15).mul_(1 / (1 - self.p)).to(x.dtype)


class DroppedSoftmax(torch.autograd.Function):
    """dropout(softmax(scores)) over the last dimension, without keeping dropout's mask (as in arXiv:2205.14135, App. B).

    With w = softmax(scores), y = dropout(w) and g the gradient of y, the gradient of scores is g y - w sum(g y).
    """

    @staticmethod
    def forward(context, scores: Tensor, dropout: Dropout, dtype: torch.dtype) -> Tensor:
        w = torch.softmax(scores, dim=-1)
        y = dropout(w).to(dtype)
        context.save_for_backward(w, y)
        return y

    @staticmethod
    def backward(context, g: Tensor) -> tuple[Tensor, None, None]:
        w, y = context.saved_tensors
        g = (g * y).to(w.dtype)
        return g.addcmul_(w, g.sum(dim=-1, keepdim=True), value=-1), None, None


class RelativePositionBias(nn.Module):
    """One learned number per head and bucket of distance, shared by all layers of a stack (arXiv:1910.10683, Sec. 2.1).

    Public checkpoints keep the table in the first block.  forward: bias (1, H, T, S) of the last T of S positions.
    """

    def __init__(self, config: T5Config, bidirectional: bool):
        super().__init__()
        self.table = nn.Embedding(config.relative_attention_num_buckets, config.num_heads)
        nn.init.normal_(self.table.weight, std=config.d_model ** -0.5)
        self.bidirectional, self.max_distance = bidirectional, config.relative_attention_max_distance

    def buckets(self, distance: Tensor) -> Tensor:
        """Near distances have a bucket each, far ones share logarithmic buckets, the past and the future half of them each."""
        num, bucket = self.table.num_embeddings, torch.zeros_like(distance)
        if self.bidirectional:
            num //= 2
            bucket = num * (distance > 0)
            distance = distance.abs()
        else:
            distance = (-distance).clamp(min=0)
        exact = num // 2
        log = torch.log(distance.clamp(min=1).float() / exact) / torch.log(torch.tensor(self.max_distance / exact))
        far = (exact + (log * (num - exact)).long()).clamp(max=num - 1)
        return bucket + torch.where(distance < exact, distance, far)

    def forward(self, T: int, S: int) -> Tensor:
        keys = torch.arange(S, device=self.table.weight.device)
        distance = keys[None, :] - keys[S - T :, None]
        return self.table(self.buckets(distance)).permute(2, 0, 1)[None]  # (1, H, T, S)


class Attention(nn.Module):
    """Multi-head attention without biases and, as always in T5, without 1 / sqrt(K).

    x (B, T, D) looks at itself, or at `memory` (B, S, D); bias broadcasts to (B, H, T, S); -> (B, T, D).
    `cache`, a dict, keeps keys and values (B, H, S, K) from one call to the next while generating.
    """

    def __init__(self, config: T5Config):
        super().__init__()
        D, inner = config.d_model, config.num_heads * config.d_kv  # inner differs from D in T5-3B and v1.1-small
        self.num_heads, self.fused, self.dropout = config.num_heads, config.attention == "fused", Dropout(config.dropout_rate)
        self.q = nn.Linear(D, inner, bias=False)
        self.k = nn.Linear(D, inner, bias=False)
        self.v = nn.Linear(D, inner, bias=False)
        self.o = nn.Linear(inner, D, bias=False)
        nn.init.normal_(self.q.weight, std=(D * config.d_kv) ** -0.5)  # makes up for the missing 1 / sqrt(K)
        nn.init.normal_(self.k.weight, std=D ** -0.5)
        nn.init.normal_(self.v.weight, std=D ** -0.5)
        nn.init.normal_(self.o.weight, std=inner ** -0.5)

    def split_heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # (B, H, S, K)

    def forward(self, x: Tensor, bias: Tensor, memory: Tensor | None = None, cache: dict | None = None) -> Tensor:
        q = self.split_heads(self.q(x))
        if cache and memory is not None:  # cross-attention after the first step: the source has not changed
            k, v = cache["k"], cache["v"]
        else:
            source = x if memory is None else memory
            k, v = self.split_heads(self.k(source)), self.split_heads(self.v(source))
            if cache:  # self-attention after the first step: one more position
                k, v = torch.cat([cache["k"], k], dim=2), torch.cat([cache["v"], v], dim=2)
        if cache is not None:
            cache.update(k=k, v=v)
        p = self.dropout.p if self.training else 0.0
        if self.fused and (p == 0 or q.device.type != "cpu"):  # there is no fused kernel with dropout for a CPU
            h = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=p, scale=1.0)
        else:
            scores = q @ k.mT  # (B, H, T, S)
            scores += bias  # in place: no second map
            h = DroppedSoftmax.apply(scores.float(), self.dropout, v.dtype) @ v
        return self.o(h.transpose(1, 2).flatten(2))  # (B, T, D)


class FeedForward(nn.Module):
    """wo relu(wi x), or since v1.1 wo (gelu(wi_0 x) * wi_1 x) (arXiv:2002.05202).  (B, T, D) -> (B, T, D)"""

    def __init__(self, config: T5Config):
        super().__init__()
        D, d_ff = config.d_model, config.d_ff
        self.gated, self.dropout = config.feed_forward_proj == "gated-gelu", Dropout(config.dropout_rate)
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
            h = F.relu(self.dropout(self.wi(x)), inplace=True)  # the same as dropout after relu, and backward needs one tensor less
        return self.wo(h)


class Block(nn.Module):
    """One T5 layer.  h (B, T, D) -> (B, T, D); a decoder's block also looks at `memory` (B, S, D)."""

    def __init__(self, config: T5Config, is_decoder: bool):
        super().__init__()
        self.self_attention_norm = RMSNorm(config.d_model, config.layer_norm_epsilon)
        self.self_attention = Attention(config)
        if is_decoder:
            self.cross_attention_norm = RMSNorm(config.d_model, config.layer_norm_epsilon)
            self.cross_attention = Attention(config)
        self.feed_forward_norm = RMSNorm(config.d_model, config.layer_norm_epsilon)
        self.feed_forward = FeedForward(config)
        self.dropout = Dropout(config.dropout_rate)

    def forward(self, h: Tensor, self_bias: Tensor, memory: Tensor | None = None, cross_bias: Tensor | None = None,
                cache: dict | None = None) -> Tensor:
        self_cache, cross_cache = (cache["self"], cache["cross"]) if cache else (None, None)
        h = h + self.dropout(self.self_attention(self.self_attention_norm(h), self_bias, cache=self_cache))
        if memory is not None:
            h = h + self.dropout(self.cross_attention(self.cross_attention_norm(h), cross_bias, memory, cross_cache))
        return h + self.dropout(self.feed_forward(self.feed_forward_norm(h)))


class Stack(nn.Module):
    """The blocks of an encoder or a decoder with what they share: position bias, final norm, dropout."""

    def __init__(self, config: T5Config, is_decoder: bool):
        super().__init__()
        num_layers = config.num_decoder_layers if is_decoder else config.num_layers
        self.is_decoder, self.checkpoint = is_decoder, config.checkpoint
        self.blocks = nn.ModuleList(Block(config, is_decoder) for _ in range(num_layers))
        self.pos_bias = RelativePositionBias(config, bidirectional=not is_decoder)
        self.final_norm = RMSNorm(config.d_model, config.layer_norm_epsilon)
        self.dropout = Dropout(config.dropout_rate)

    def biases(self, h: Tensor, mask: Tensor | None, memory_mask: Tensor | None, cache: list[dict] | None, P: int = 0) -> tuple[Tensor, Tensor | None]:
        """What all blocks add to their scores: self-attention's bias (B or 1, H, T, S), cross-attention's (B, 1, T, S) or None.

        The last P positions are of images: they have no distance to others (arXiv:2102.02779, Sec. 3.1).
        """
        T = h.size(1)
        S = T + cached_length(cache)
        allowed = torch.ones(T, S, dtype=torch.bool, device=h.device)[None, None]  # (1, 1, T, S)
        if self.is_decoder:
            allowed = allowed.tril(S - T)  # a position sees itself and the past
        if mask is not None:
            assert mask.dtype == torch.bool and mask.shape == (len(h), S), f"the mask must be bool {[len(h), S]}, is {mask.dtype} {list(mask.shape)}"
            if mask.device.type != "cpu" or not mask.all():  # nothing padded: all rows share one bias (a GPU would have to wait for the answer)
                allowed = allowed & mask[:, None, None, :]  # (B, 1, T, S)
        lowest = torch.finfo(h.dtype).min  # not -inf: a row without any True would give NaN
        pos_bias = self.pos_bias(T - P, S - P)
        if P:
            pos_bias = F.pad(pos_bias, (0, P, 0, P))  # (1, H, T, S)
        self_bias = torch.where(allowed, pos_bias, lowest).to(h.dtype)  # (B or 1, H, T, S)
        if memory_mask is None:
            return self_bias, None
        cross_bias = torch.where(memory_mask, 0.0, lowest).to(h.dtype)
        return self_bias, cross_bias[:, None, None, :].expand(-1, -1, T, -1)  # (B, 1, T, S)

    def layers(self, h: Tensor, mask: Tensor | None, memory: Tensor | None = None, memory_mask: Tensor | None = None,
               cache: list[dict] | None = None, P: int = 0) -> Iterator[Tensor]:
        """Hand out the embedded input, then the output of each block (B, T, D), one at a time: the raw residual stream."""
        h = self.dropout(h)
        yield h
        self_bias, cross_bias = self.biases(h, mask, memory_mask, cache, P)
        for i, block in enumerate(self.blocks):
            h = self.run(block, h, self_bias, memory, cross_bias, cache[i] if cache else None)
            yield h

    def run(self, block, *inputs) -> Tensor:
        """Call a block; with config.checkpoint autograd keeps its inputs and nothing of its inside (arXiv:1604.06174)."""
        if self.checkpoint and torch.is_grad_enabled():
            return checkpoint(block, *inputs, use_reentrant=False)
        return block(*inputs)

    def finish(self, h: Tensor) -> Tensor:
        return self.dropout(self.final_norm(h))


# ----------------------------------------------------------------------------------------------------------------- model

class VisualEmbedding(nn.Module):
    """What makes a T5 a CLIP-T5 (arXiv:2112.06825, Sec. 3.1): the grids of a frozen CLIP become positions behind the text.

    A position is the sum of its projected feature, its projected box, which image it belongs to, and its number in the image, for which
    T5's own word embeddings serve, from the last one down (arXiv:2102.02779, Sec. 3.1).
    images (B, N, P, C), N grids of P = g * g cells; words (V, D) -> (B, N * P, D)
    """

    def __init__(self, C: int, config: T5Config, images: int = 2):
        super().__init__()
        D, epsilon = config.d_model, config.layer_norm_epsilon
        self.feature, self.feature_norm = nn.Linear(C, D), RMSNorm(D, epsilon)
        self.box, self.box_norm = nn.Linear(5, D), RMSNorm(D, epsilon)
        self.image_order = nn.Embedding(images, D)

    def boxes(self, P: int) -> Tensor:
        """Corners x1, y1, x2, y2 of the grid's cells in an image of size 1, and their area.  (P, 5)"""
        # Paper: the authors' boxes of a grid are all zero, so the projection is one constant; ours say where a cell is.
        g = math.isqrt(P)
        assert g * g == P, f"the grid must be square, it has {P} cells"
        y, x = torch.meshgrid(torch.arange(g, device=self.box.weight.device) / g, torch.arange(g, device=self.box.weight.device) / g, indexing="ij")
        return torch.stack([x, y, x + 1 / g, y + 1 / g, torch.full_like(x, 1 / P)], dim=-1).flatten(0, 1)  # (P, 5)

    def forward(self, images: Tensor, words: Tensor) -> Tensor:
        N, P = images.shape[1:3]
        assert N <= self.image_order.num_embeddings, f"at most {self.image_order.num_embeddings} images a text, not {N}"
        h = self.feature_norm(self.feature(images)) + self.box_norm(self.box(self.boxes(P)))  # (B, N, P, D)
        h = h + self.image_order.weight[:N, None] + words[-P:].flip(0).to(h.dtype)
        return h.flatten(1, 2)  # (B, N * P, D)


def behind(mask: Tensor, h: Tensor) -> Tensor:
    """The text's mask (B, S), made as long as h (B, S + P, D): images lie behind the text and are never padded."""
    return mask if mask.size(1) == h.size(1) else F.pad(mask, (0, h.size(1) - mask.size(1)), value=True)


class T5(nn.Module):
    """Encoder, decoder and head with random weights; `load_t5` fills in public ones.

    logits = t5(source_ids, source_mask, decoder_ids, decoder_mask)    (B, S), (B, S) bool, (B, T), (B, T) bool -> (B, T, V)

    With a VisualEmbedding as `visual` it is a CLIP-T5, and what has `source_ids` also takes `images` (B, N, P, C).
    """

    def __init__(self, config: T5Config):
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.d_model)
        self.encoder = Stack(config, is_decoder=False)
        self.decoder = Stack(config, is_decoder=True)
        self.head = None if config.tie_word_embeddings else nn.Linear(config.d_model, config.vocab_size, bias=False)
        self.visual: VisualEmbedding | None = None

    def embed_source(self, source_ids: Tensor, source_mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """What the encoder reads before any image, and its mask."""
        return self.embed(source_ids), source_mask

    def encoder_layers(self, source_ids: Tensor, source_mask: Tensor | None, images: Tensor | None = None) -> Iterator[Tensor]:
        """Hand out the embeddings, then each encoder layer's output, (B, S, D) each; with images (B, S + N * P, D), those behind the text."""
        h, mask = self.embed_source(source_ids, source_mask)
        if images is None:
            return self.encoder.layers(h, mask)
        h_visual = self.visual(images, self.embed.weight).to(h.dtype)
        h = torch.cat([h, h_visual], dim=1)  # (B, S + N * P, D)
        return self.encoder.layers(h, behind(mask, h), P=h_visual.size(1))

    def decoder_layers(self, decoder_ids: Tensor, decoder_mask: Tensor | None, memory: Tensor, source_mask: Tensor,
                       cache: list[dict] | None = None) -> Iterator[Tensor]:
        """Hand out the word embeddings, then each decoder layer's output, (B, T, D) each."""
        return self.decoder.layers(self.embed(decoder_ids), decoder_mask, memory, behind(source_mask, memory), cache)

    def encode(self, source_ids: Tensor, source_mask: Tensor, images: Tensor | None = None) -> Tensor:
        for h in self.encoder_layers(source_ids, source_mask, images):
            pass
        return self.encoder.finish(h)

    def decode(self, decoder_ids: Tensor, decoder_mask: Tensor | None, memory: Tensor, source_mask: Tensor,
               cache: list[dict] | None = None) -> Tensor:
        for h in self.decoder_layers(decoder_ids, decoder_mask, memory, source_mask, cache):
            pass
        return self.decoder.finish(h)

    def logits(self, h: Tensor) -> Tensor:
        """The head, (B, T, D) -> (B, T, V).  A tied head scales by D ** -0.5, an untied one does not."""
        if self.head is not None:
            return self.head(h)
        return F.linear(h * self.config.d_model ** -0.5, self.embed.weight)

    def forward(self, source_ids: Tensor, source_mask: Tensor, decoder_ids: Tensor, decoder_mask: Tensor | None = None,
                images: Tensor | None = None) -> Tensor:
        memory = self.encode(source_ids, source_mask, images)
        return self.logits(self.decode(decoder_ids, decoder_mask, memory, source_mask))

    def start(self, source_ids: Tensor, source_mask: Tensor, num_beams: int = 1, images: Tensor | None = None) -> "Decoding":
        memory = self.encode(source_ids, source_mask, images).repeat_interleave(num_beams, dim=0)
        return Decoding((memory,), source_mask.repeat_interleave(num_beams, dim=0), (new_cache(len(self.decoder.blocks)),))

    def step(self, ids: Tensor, state: "Decoding") -> Tensor:
        """Feed one more token to each row, (B, 1) -> logits (B, V)."""
        h = self.decode(ids, None, state.memories[0], state.source_mask, state.caches[0])
        return self.logits(h)[:, -1]

    def generate(self, source_ids: Tensor, source_mask: Tensor, max_new_tokens: int = 20, num_beams: int = 1, images: Tensor | None = None) -> Tensor:
        """Greedy or beam search -> (B, <= max_new_tokens) ids, no start token, PAD after the end."""
        return generate(self, source_ids, source_mask, max_new_tokens, num_beams, images)


# ------------------------------------------------------------------------------------------------------------ generation

@dataclass
class Decoding:
    """Where a generation stands.  T5 has one memory and one cache, a ladder two: the backbone's and the side network's."""

    memories: tuple[Tensor, ...]  # encoder outputs
    source_mask: Tensor
    caches: tuple[list[dict], ...]  # per decoder layer {"self": {k, v}, "cross": {k, v}}

    def reorder(self, rows: Tensor) -> None:
        """Beams move between rows.  Those of one source share its cross-attention, so only self-attention follows them."""
        for layer in (layer for cache in self.caches for layer in cache):
            layer["self"] = {name: tensor[rows] for name, tensor in layer["self"].items()}


def new_cache(num_layers: int) -> list[dict]:
    # Paper: the authors' code also fills such a cache while it trains, which costs memory and serves nobody; here only generation does.
    return [{"self": {}, "cross": {}} for _ in range(num_layers)]


def cached_length(cache: list[dict] | None) -> int:
    return cache[0]["self"]["k"].size(2) if cache and cache[0]["self"] else 0


@torch.no_grad()
def generate(model, source_ids: Tensor, source_mask: Tensor, max_new_tokens: int, num_beams: int, images: Tensor | None = None) -> Tensor:
    """Search with anything that has `start` and `step`: T5 and LadderT5."""
    if max_new_tokens < 1 or num_beams < 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens} and num_beams {num_beams}, both must be at least 1")
    search = greedy_search if num_beams == 1 else beam_search
    return search(model, model.start(source_ids, source_mask, num_beams, images), len(source_ids), max_new_tokens, num_beams)


def greedy_search(model, state: Decoding, B: int, max_new_tokens: int, _: int) -> Tensor:
    last = state.source_mask.new_full((B, 1), PAD, dtype=torch.long)
    done, output = torch.zeros_like(last, dtype=torch.bool), []
    for _ in range(max_new_tokens):
        last = model.step(last, state).argmax(-1, keepdim=True).masked_fill(done, PAD)  # (B, 1)
        output.append(last)
        done |= last == EOS
        if done.all():
            break
    return torch.cat(output, dim=1)  # (B, T)


def beam_search(model, state: Decoding, B: int, max_new_tokens: int, beams: int) -> Tensor:
    """Keep the `beams` best open beginnings and the `beams` best ended texts of every source.

    An ended text scores its log-probability divided by its length (length penalty 1).  A source is settled when its best open
    beginning, scored so, is no better than its worst ended text.  These are the rules of the `transformers` library.
    """
    device, never = state.source_mask.device, -1e9
    first = torch.arange(B, device=device)[:, None] * beams  # the row of each source's first beam
    open_ids = torch.full((B, beams, max_new_tokens + 1), PAD, device=device)
    open_score = torch.tensor([0.0] + [never] * (beams - 1), device=device).repeat(B, 1)  # all beams start equal: use one
    ended_ids, ended_score = open_ids.clone(), torch.full((B, beams), never, device=device)
    settled = torch.zeros(B, 1, dtype=torch.bool, device=device)
    for t in range(1, max_new_tokens + 1):
        logits = model.step(open_ids[:, :, t - 1].reshape(-1, 1), state).float()  # (B * beams, V)
        score = torch.log_softmax(logits, dim=-1).view(B, beams, -1) + open_score[:, :, None]
        score, index = score.flatten(1).topk(2 * beams)  # twice as many: at most `beams` of them end here
        parent, token = index // logits.size(-1), index % logits.size(-1)  # (B, 2 * beams)
        ids = open_ids.gather(1, parent[:, :, None].expand(-1, -1, open_ids.size(2)))
        ids[:, :, t] = token
        ends = (token == EOS) | (t == max_new_tokens)

        open_score, best = score.masked_fill(ends, never).topk(beams)
        open_ids = ids.gather(1, best[:, :, None].expand(-1, -1, ids.size(2)))
        state.reorder((first + parent.gather(1, best)).flatten())

        counts = ends & ~settled
        counts[:, beams:] = False  # only an ending among the best `beams` counts
        pool_score = torch.cat([ended_score, (score / t).masked_fill(~counts, never)], dim=1)
        ended_score, best = pool_score.topk(beams)
        ended_ids = torch.cat([ended_ids, ids], dim=1).gather(1, best[:, :, None].expand(-1, -1, ids.size(2)))
        settled = settled | (open_score[:, :1] / t <= ended_score[:, -1:])
        if settled.all() or ends.all():
            break
    output = ended_ids[:, 0, 1:]  # (B, max_new_tokens)
    return output[:, : int((output != PAD).any(0).nonzero().max()) + 1] if output.any() else output[:, :1]


# ---------------------------------------------------------------------------------------------------------- public files

def locate(model: str | Path, filename: str) -> Path:
    """The file of a backbone: "nano", a public name (downloaded once, checked by sha256), or a folder."""
    if model == "nano":
        return NANO / filename
    if model in PUBLIC and not Path(model).is_dir():
        repo, revision, weights = PUBLIC[model]
        sha256 = {"model.safetensors": weights, "spiece.model": T5_V1_SPIECE if repo.startswith("google-t5/") else None}
        return hub_file(repo, filename, revision, sha256.get(filename))
    if not Path(model).is_dir():
        raise ValueError(f"model {str(model)!r} is neither a folder nor one of: nano, {', '.join(PUBLIC)}")
    return Path(model) / filename


def public_name(name: str) -> str:
    """Our parameter's name in public checkpoints: encoder.blocks.3.self_attention.q.weight
    -> encoder.block.3.layer.0.SelfAttention.q.weight"""
    last = 2 if name.startswith("decoder.") else 1  # the feed-forward comes after the decoder's cross-attention
    for ours, public in (
        ("embed.weight", "shared.weight"),
        ("head.weight", "lm_head.weight"),
        (".blocks.", ".block."),
        ("pos_bias.table", "block.0.layer.0.SelfAttention.relative_attention_bias"),
        ("final_norm", "final_layer_norm"),
        ("self_attention_norm", "layer.0.layer_norm"),
        ("cross_attention_norm", "layer.1.layer_norm"),
        ("feed_forward_norm", f"layer.{last}.layer_norm"),
        ("self_attention", "layer.0.SelfAttention"),
        ("cross_attention", "layer.1.EncDecAttention"),
        ("feed_forward", f"layer.{last}.DenseReluDense"),
    ):
        name = name.replace(ours, public)
    return name


STRAY = {"decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"}  # in v1.0 files, used by nobody
ALIASES = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight")  # copies of shared.weight in some exports


def weight_files(model: str | Path) -> list[Path]:
    """model.safetensors, or the shards that model.safetensors.index.json lists."""
    try:
        path = locate(model, "model.safetensors")
        if path.is_file():
            return [path]
        missing = ValueError(f"{path} is not there; a backbone's folder holds config.json, model.safetensors and spiece.model")
    except NotThere as error:
        missing = error
    try:
        index = locate(model, "model.safetensors.index.json")
        text = index.read_bytes()
    except (NotThere, FileNotFoundError):
        raise missing from None
    try:
        names = sorted(set(json.loads(text)["weight_map"].values()))
        foreign = [name for name in names if not re.fullmatch(r"[\w.-]{1,200}\.safetensors", name, re.ASCII)]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise ValueError(f"{index} is not an index of safetensors shards; get it again") from None
    if foreign or not names:
        raise ValueError(f"{index} names no shards, or files that are not beside it: {brief.repr(foreign)}")
    return [locate(model, name) for name in names]


class Checkpoint:
    """Safetensors files opened lazily: tensors are mapped, not read, until they are used."""

    def __init__(self, paths: Iterable[Path]):
        self.files = {}
        for path in paths:
            opened = self.open(path)
            self.files.update({key: opened for key in opened.keys()})

    @staticmethod
    def open(path: Path):
        try:
            return safe_open(path, framework="pt")
        except FileNotFoundError:
            raise ValueError(f"{path} is not there; a backbone's folder holds config.json, model.safetensors and spiece.model") from None
        except (SafetensorError, OSError) as error:
            with open(path, "rb") as file:
                head = file.read(40)
            kind = ("a git-lfs pointer, not the weights: run `git lfs pull`" if head.startswith(b"version https://git-lfs") else
                    "an HTML page, not the weights: download the file again" if head.lstrip().lower().startswith((b"<!doctype", b"<html")) else
                    f"damaged or no safetensors file ({error!s:.200}): download it again")
            raise ValueError(f"{path} is {kind}") from None

    def shape(self, key: str) -> list[int]:
        return self.files[key].get_slice(key).get_shape()

    def dtype(self, key: str) -> str:
        return self.files[key].get_slice(key).get_dtype()

    def tensor(self, key: str) -> Tensor:
        return self.files[key].get_tensor(key)

    def check(self, model: str | Path, shapes: dict[str, list[int]], dropped: set[str]) -> None:
        """Every key has its shape here or is dropped by name, none is missing, and all are floating-point; else a ValueError names up to three."""
        found = self.files.keys() - dropped
        missing, unexpected = shapes.keys() - found, found - shapes.keys()
        misshapen = [f"{key} {self.shape(key)} not {shape}" for key, shape in shapes.items() if key in found and self.shape(key) != shape]
        if missing or unexpected or misshapen:
            raise ValueError(f"checkpoint of {model} does not fit: missing {brief.repr(sorted(missing)[:3])}, "
                             f"unexpected {brief.repr(sorted(unexpected)[:3])}, misshapen {brief.repr(sorted(misshapen)[:3])}")
        for key in shapes:
            if self.dtype(key) not in ("F64", "F32", "F16", "BF16"):
                raise ValueError(f"checkpoint of {model}: {key} holds {self.dtype(key)}; only floating-point weights can be used")


def load_t5(model: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32, attention: str = "fused",
            checkpoint: bool = False, dropout: float | None = None) -> T5:
    """A T5 with the weights of a folder or of a public name, strictly loaded, in eval mode.  dropout: in place of the config's rate.

    Parameters are built on the meta device and take the mapped tensors of the file, so nothing is held twice.
    ValueError: float16, an unknown name, a damaged file, or keys that do not fit (up to three of each kind are named).
    """
    if dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"T5 in {dtype}: choose float32 or bfloat16; T5 was trained in bfloat16 and its activations overflow float16's 65504")
    path = locate(model, "config.json")
    if not path.is_file():
        raise ValueError(f"{path} is not there; a backbone's folder holds config.json, model.safetensors and spiece.model")
    config = replace(T5Config.from_json(path), attention=attention, checkpoint=checkpoint)
    config = config if dropout is None else replace(config, dropout_rate=dropout)
    weights = Checkpoint(weight_files(model))
    with torch.device("meta"):
        t5 = T5(config)
    own = {public_name(name): (name, list(parameter.shape)) for name, parameter in t5.named_parameters()}
    found = weights.files.keys() - STRAY
    copies = [key for key in ALIASES if key not in own and key in found]
    if "shared.weight" not in found and copies:  # an alias may be the only copy of the embedding
        own[copies[0]] = own.pop("shared.weight")
        copies.remove(copies[0])
    weights.check(model, {key: shape for key, (_, shape) in own.items()}, dropped=STRAY | set(copies))
    embedding = next(key for key, (name, _) in own.items() if name == "embed.weight")
    for copy in copies:
        same = weights.shape(copy) == weights.shape(embedding) and weights.dtype(copy) == weights.dtype(embedding)
        if not same or not torch.equal(weights.tensor(copy), weights.tensor(embedding)):
            raise ValueError(f"checkpoint of {model} does not fit its config.json: {copy} differs from {embedding}, but the config ties them")
    state = {name: weights.tensor(key).to(device=device, dtype=dtype) for key, (name, _) in own.items()}
    t5.load_state_dict(state, strict=True, assign=True)
    return t5.eval()


def save_t5(t5: T5, folder: str | Path, dtype: torch.dtype = torch.float32) -> None:
    """Write config.json and model.safetensors under their public names, so that `load_t5(folder)` and others can read them."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_file({public_name(name): p.detach().to("cpu", dtype).contiguous() for name, p in t5.named_parameters()},
              folder / "model.safetensors", metadata={"format": "pt"})
    config = {name: value for name, value in asdict(t5.config).items() if name not in RUN_TIME}
    config = {"architectures": ["T5ForConditionalGeneration"], "model_type": "t5", **config,
              "pad_token_id": PAD, "eos_token_id": EOS, "decoder_start_token_id": PAD}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


class Tokenizer:
    """SentencePiece with T5's sentinels on top.  Text that looks like an end or padding token is text like any other."""

    def __init__(self, path: str | Path):
        try:
            self.pieces = SentencePieceProcessor(model_file=str(path))
            normalizes = "Ａ" not in self.pieces.normalize("Ａ")
        except (RuntimeError, OSError, UnicodeDecodeError):
            raise ValueError(f"{path} is missing or no SentencePiece model; a backbone's folder holds spiece.model") from None
        if not normalizes:  # a file that was cut behind its pieces still opens, but it normalizes nothing
            raise ValueError(f"{path} was cut off, its normalization is missing: get it again")
        special = (self.pieces.pad_id(), self.pieces.eos_id(), self.pieces.unk_id())
        if special != (PAD, EOS, UNK):
            raise ValueError(f"{path} is not T5's: its pad, end and unknown ids are {special}, must be {(PAD, EOS, UNK)}")
        self.vocab_size = self.pieces.vocab_size() + SENTINELS

    def encode(self, text: str) -> list[int]:
        """Ids without the end token.  <extra_id_0> ... <extra_id_99> become sentinels and take the space around them along."""
        parts = re.split(r"<extra_id_([0-9]|[1-9][0-9])>", text)  # text, number, text, number, ..., text
        ids = self.pieces.encode(parts[0])
        for number, rest in zip(parts[1::2], parts[2::2]):
            ids += [self.vocab_size - 1 - int(number), *self.pieces.encode(rest)]
        return ids

    def decode(self, ids: list[int]) -> str:
        """Text up to the end token.  Ids beyond the vocabulary (the head has spare rows) read as unknown."""
        words, run = [], []
        for i in [int(i) for i in ids] + [EOS]:
            if i == EOS or self.pieces.vocab_size() <= i < self.vocab_size:
                words += [self.pieces.decode(run)] if run else []
                run = []
                if i == EOS:
                    break
                words.append(f"<extra_id_{self.vocab_size - 1 - i}>")
            elif i != PAD:
                run.append(i if 0 < i < self.vocab_size else UNK)
        return " ".join(words)


def load_tokenizer(model: str | Path) -> Tokenizer:
    """The tokenizer of "nano", a public name or a folder."""
    return Tokenizer(locate(model, "spiece.model"))
