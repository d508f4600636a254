"""What stands behind --model: a T5 (model.py), or a decoder-only model of Llama's layout (llm/)."""
import argparse
import contextlib
from pathlib import Path

import torch
from torch import nn

import llm.llama
import llm.tokenizer
import model as t5
from llm import LadderLM, LlamaConfig, load_llm, quantize_
from methods.qlora import add_qlora
from model import T5, T5Config, weight_files
from run.folder import read_json

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16,
          "nf4": torch.bfloat16}  # in which a backbone computes


def decoder_only(model: str | Path) -> bool:
    """Is this public name, or this folder's config.json, another one than a T5's?"""
    config = Path(model).expanduser() / "config.json"
    with contextlib.suppress(ValueError, OSError):
        return read_json(config).get("model_type", "t5") != "t5"
    return model in llm.llama.NAMES


def config_of(model: str | Path) -> T5Config | LlamaConfig:
    """ValueError: config.json asks for what is not written here."""
    if decoder_only(model):
        return LlamaConfig.from_json(llm.llama.locate(model) / "config.json")
    return T5Config.from_json(t5.locate(model, "config.json"))


def load_tokenizer(model: str | Path):
    """ValueError: the tokenizer does not fit config.json."""
    file, module = ("tokenizer", llm.tokenizer) if decoder_only(model) else ("spiece.model", t5)
    tokenizer, config = module.load_tokenizer(model), config_of(model)
    V, most = config.vocab_size, getattr(config, "max_position_embeddings", 10**9)
    tokenizer.longest = min(tokenizer.longest, most - 20)  # 20 are left for an answer
    if not 0 <= V - tokenizer.vocab_size < 128:  # rows may be spare: T5 has 28
        raise ValueError(f"{model}: the {file} has {tokenizer.vocab_size} words, config.json's "
                         f"vocab_size is {V}: they do not belong together")
    return tokenizer


def files_of(model: str | Path) -> list[Path]:
    """All that a backbone consists of."""
    if decoder_only(model):
        folder = llm.llama.locate(model)
        return [folder / "config.json", llm.tokenizer.file_of(folder), *weight_files(folder)]
    return [t5.locate(model, "config.json"), t5.locate(model, "spiece.model"), *weight_files(model)]


def load_backbone(model: str | Path, device: str, dtype: str, **options) -> T5:
    """model.load_t5, also in 4 bits. Then the weights of a float32 file are mapped from disk and
    quantised one after the other: it never stands in memory. What is no linear map is bfloat16."""
    if dtype != "nf4":
        return t5.load_t5(model, device, DTYPES[dtype], **options)
    backbone = quantize_(t5.load_t5(model, **options))
    for p in backbone.parameters():  # NF4's own scales are buffers, and stay
        p.data = p.data.to(torch.bfloat16)
    return backbone.to(device)


def build_lm(args: argparse.Namespace) -> nn.Module:
    """A decoder-only backbone and what --method trains of it or beside it."""
    lm = load_llm(args.model, args.device, DTYPES[args.dtype], args.dtype == "nf4", args.checkpoint)
    if args.method == "qlora":
        return add_qlora(lm, args.size or 64, dropout=args.dropout or 0.0)
    return LadderLM(lm, args.r, args.keep, args.free, args.end, DTYPES[args.side_dtype],
                    dropout=args.dropout or 0.0)
