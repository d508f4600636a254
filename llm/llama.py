"""Decoder-only models of Llama's layout (arXiv:2302.13971): also Mistral, SmolLM2 and Qwen2.

    ids --> embed --> N layers --> norm --> head             Block (pre-norm, residual):
                                                             h + self-attention(norm(h))
                                                             h + feed-forward(norm(h))

Letters as in model.py; T new positions of S in all; H query heads share the keys and values of G.
"""
from collections.abc import Collection, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llm.nf4 import quantize_
from model import (Decoding, Generates, Memory, RMSNorm, cached_length, call, new_cache,
                   read_weights, weight_files)
from run.folder import read_json
from run.hub import hub_file

SUPPORTED = {"model_type": ["llama", "mistral", "qwen2"], "rope_type": ["default"],
             "rope_scaling": [None], "attention_bias": [False], "hidden_act": ["silu"],
             "partial_rotary_factor": [1.0]}


@dataclass(frozen=True)
class LlamaConfig:
    """Sizes of a model under their public names."""

    vocab_size: int
    hidden_size: int  # D
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int  # H
    num_key_value_heads: int  # G (arXiv:2305.13245)
    head_dim: int  # K
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    max_position_embeddings: int = 2048
    tie_word_embeddings: bool = False
    eos_token_id: int = 2
    qkv_bias: bool = False  # Qwen2
    checkpoint: bool = False  # True: backward computes each block again (arXiv:1604.06174)

    @classmethod
    def from_json(cls, path: Path, checkpoint: bool = False) -> "LlamaConfig":
        """Read a public config.json. ValueError: it asks for what is not written here."""
        raw = read_json(path)
        raw |= raw.get("rope_parameters") or {}  # so new files have it
        raw = {name: value for name, value in raw.items() if value is not None}
        for name, values in SUPPORTED.items():
            if raw.get(name, values[0]) not in values:
                raise ValueError(f"{path}: {name} {raw[name]!s:.60} is not written here, "
                                 f"only {' '.join(map(str, values))}")
        try:
            H, most = raw["num_attention_heads"], raw.get("max_position_embeddings", 2048)
            if raw.get("use_sliding_window", True):  # up to its length it has no effect
                most = min(most, raw.get("sliding_window", most))
            raw = {"num_key_value_heads": H, "head_dim": raw["hidden_size"] // H, **raw,
                   "max_position_embeddings": most, "checkpoint": checkpoint,
                   "qkv_bias": raw.get("model_type") == "qwen2"}
            return cls(**{f.name: raw[f.name] for f in fields(cls) if f.name in raw})
        except (KeyError, TypeError, ZeroDivisionError) as error:
            raise ValueError(f"{path} lacks a size, or has a wrong one: {error}") from None


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn pairs of numbers, one in each half of a head, by angles (arXiv:2104.09864)."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)  # (B, H, T, K)


class Attention(nn.Module):
    """Grouped-query attention. x (B, T, D) -> (B, T, D); cache keeps k and v (B, G, S, K)."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        D, self.K, bias = config.hidden_size, config.head_dim, config.qkv_bias
        inner, shared = config.num_attention_heads * self.K, config.num_key_value_heads * self.K
        self.q_proj = nn.Linear(D, inner, bias)
        self.k_proj, self.v_proj = nn.Linear(D, shared, bias), nn.Linear(D, shared, bias)
        self.o_proj = nn.Linear(inner, D, bias=False)

    def forward(self, x: Tensor, cache: dict | None, cos, sin, allowed) -> Tensor:
        q, k, v = (project(x).unflatten(-1, (-1, self.K)).transpose(1, 2)  # (B, H or G, T, K)
                   for project in (self.q_proj, self.k_proj, self.v_proj))
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if cache:  # after the prompt: one more position
            k, v = torch.cat([cache["k"], k], dim=2), torch.cat([cache["v"], v], dim=2)
        if cache is not None:
            cache.update(k=k, v=v)
        causal, wide = allowed is None and q.size(2) > 1, q.dtype == torch.float32
        if k.size(1) < q.size(1) and not q.is_cpu and (wide or allowed is not None):
            # CUDA's fused kernel for shared k and v wants 16 bits and no mask; the others repeat
            k, v = (x.repeat_interleave(q.size(1) // x.size(1), dim=1) for x in (k, v))
        h = F.scaled_dot_product_attention(q, k, v, allowed, is_causal=causal, enable_gqa=True)
        return self.o_proj(h.transpose(1, 2).flatten(2))  # (B, T, D)


class FeedForward(nn.Module):
    """SwiGLU (arXiv:2002.05202): down (silu(gate x) * up x). Keeps (B, T, D)."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        D, inner = config.hidden_size, config.intermediate_size
        self.gate_proj, self.up_proj = (nn.Linear(D, inner, bias=False) for _ in range(2))
        self.down_proj = nn.Linear(inner, D, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """One layer, h (B, T, D) -> (B, T, D)."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = FeedForward(config)

    def forward(self, h: Tensor, cache: dict | None, *context) -> Tensor:
        h = h + self.self_attn(self.input_layernorm(h), cache and cache["self"], *context)
        return h + self.mlp(self.post_attention_layernorm(h))


def context(config: LlamaConfig, mask: Tensor, T: int, dtype: torch.dtype) -> tuple:
    """What every block takes beside h, for the last T positions of mask (B, S).

    cos, sin (B, 1, T, K / 2); where to look (B, 1, T, S), or None for all that is not later.
    """
    S, K = mask.size(1), config.head_dim
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)[:, None, S - T :, None]  # without padding
    angles = positions * config.rope_theta ** (-torch.arange(0, K, 2, device=mask.device) / K)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    if T in (1, S) and (mask.is_meta or mask.all()):
        return cos, sin, None
    allowed = torch.ones(T, S, dtype=torch.bool, device=mask.device).tril(S - T)
    itself = allowed.triu(S - T)  # padding sees itself: a softmax over nothing would give NaN
    return cos, sin, allowed & mask[:, None, None, :] | itself


class CausalLM(Generates, nn.Module):
    """What Llama and LadderLM have in common; each has `states`, `logits`, `depths` of caches."""

    pad = eos = property(lambda self: self.config.eos_token_id)

    def forward(self, source_ids: Tensor, source_mask: Tensor, decoder_ids: Tensor | None = None,
                decoder_mask: Tensor | None = None, images: None = None) -> Tensor:
        """Logits of a text, (B, S, V); or, called as a T5 is, of what follows it, (B, T, V).

        decoder_ids have a T5's start token, which falls away: the text's last token predicts the
        first one that follows, without padding between them.
        """
        if decoder_ids is None:
            return self.logits(self.states(source_ids, source_mask, source_ids.size(1)))
        if decoder_mask is None:
            decoder_mask = torch.ones_like(decoder_ids, dtype=torch.bool)
        ids, mask = move_right(source_ids, source_mask)
        ids = torch.cat([ids, decoder_ids[:, 1:]], dim=1)  # (B, S + T - 1)
        mask = torch.cat([mask, decoder_mask[:, 1:]], dim=1)
        return self.logits(self.states(ids, mask, decoder_ids.size(1)))  # of T positions only

    def start(self, source_ids: Tensor, source_mask: Tensor, images: None = None) -> Decoding:
        text = Memory(*move_right(source_ids, source_mask))
        return Decoding([text], [new_cache(depth) for depth in self.depths])

    def step(self, ids: Tensor, state: Decoding) -> Tensor:
        """Feed the text, in place of a start token; then one more token (B, 1). -> logits (B, V)"""
        (text, mask), past = state.memories[0], cached_length(state.caches[0])
        ids = ids if past else text
        mask = F.pad(mask, (0, past + ids.size(1) - text.size(1)), value=True)
        return self.logits(self.states(ids, mask, 1, state.caches))[:, 0]


def move_right(ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    order = mask.int().argsort(dim=1, stable=True)  # padding first
    return ids.gather(1, order), mask.gather(1, order)


class Llama(CausalLM):
    """The backbone with random weights; `load_llm` fills in public ones."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.config, D, V = config, config.hidden_size, config.vocab_size
        self.embed = nn.Embedding(V, D)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(D, config.rms_norm_eps)
        self.lm_head = None if config.tie_word_embeddings else nn.Linear(D, V, bias=False)
        self.depths = [config.num_hidden_layers]

    def hidden_states(self, ids: Tensor, mask: Tensor, cache: list[dict] | None = None,
                      keep: Collection[int] = ()) -> list[Tensor | None]:
        """The embedded ids, then every layer's output, (B, T, D) each, before the last norm.

        mask (B, S) is also about those in the cache. None: `keep` does not name the 0-based layer,
        and it is not the last.
        """
        h, most = self.embed(ids), self.config.max_position_embeddings
        if mask.size(1) > most:
            raise ValueError(f"{mask.size(1)} tokens: this model reads {most}, shorten the text")
        hidden, around = [h], context(self.config, mask, ids.size(1), h.dtype)
        for i, layer in enumerate(self.layers):
            inputs = h, cache[i] if cache else None, *around
            h = call(layer, *inputs, recompute=self.config.checkpoint)
            hidden.append(h if i in keep else None)
        hidden[-1] = h
        return hidden

    def states(self, ids: Tensor, mask: Tensor, T: int, caches: Sequence = (None,)) -> Tensor:
        """What the head reads at the last T positions, (B, T, D)."""
        return self.norm(self.hidden_states(ids, mask, caches[0])[-1][:, -T:])

    def logits(self, h: Tensor) -> Tensor:
        return F.linear(h, (self.lm_head or self.embed).weight)  # (B, T, V)


PUBLIC = read_json(Path(__file__).with_name("public.json"))  # name: repository, revision, hashes
NAMES = PUBLIC | {public["repo"]: public for public in PUBLIC.values()}


def locate(model: str | Path) -> Path:
    """A folder as it is; of a public name the hub cache's, where each file is downloaded once."""
    folder = Path(model).expanduser()
    if model in NAMES and not folder.is_dir():
        public = NAMES[model]
        for file, sha256 in public["sha256"].items():
            folder = hub_file(public["repo"], file, public["revision"], sha256).parent
    if not folder.is_dir():
        raise ValueError(f"model {str(model)!r} is neither a folder nor {', '.join(PUBLIC)}")
    return folder


def load_llm(model: str | Path, device: str | torch.device = "cpu", dtype=torch.float32,
             nf4: bool = False, checkpoint: bool = False) -> Llama:
    """A model with the weights of a folder or of a public name, strictly loaded, in eval mode.

    nf4: its layers in four bits (llm/nf4.py). ValueError: an unknown name, files that do not fit.
    """
    folder = locate(model)
    with torch.device("meta"):
        llama = Llama(LlamaConfig.from_json(folder / "config.json", checkpoint))
    weights = {name.removeprefix("model.").replace("embed_tokens", "embed"): weight for name, weight
               in read_weights(weight_files(folder)).items() if not name.endswith("inv_freq")}
    if llama.lm_head is None:
        weights.pop("lm_head.weight", None)  # a copy of the embedding
    try:
        llama.load_state_dict(weights, strict=True, assign=True)
    except RuntimeError as error:
        line = " ".join(str(error).split())[:400]
        raise ValueError(f"the weights of {model} do not fit its config.json: {line}") from None
    # So far they are mapped from the disk. One layer is read and quantised after the other: a 7B
    # never stands in memory at full precision.
    for part in filter(None, (llama.embed, *llama.layers, llama.norm, llama.lm_head)):
        part.to(device, dtype)
        if nf4 and isinstance(part, Block):
            quantize_(part)
    return llama.requires_grad_(False).eval()
