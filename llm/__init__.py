"""Decoder-only language models: a frozen backbone, in 4 bits if wanted, and ladders beside it."""
from llm.ladder import LadderLM
from llm.llama import Llama, LlamaConfig, load_llm
from llm.nf4 import NF4Linear, quantize_
from llm.tokenizer import load_tokenizer

__all__ = ["LadderLM", "Llama", "LlamaConfig", "NF4Linear", "load_llm", "load_tokenizer",
           "quantize_"]
