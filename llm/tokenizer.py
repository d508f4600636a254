"""Text to ids and back: SentencePiece for Llama-2, TinyLlama and Mistral, byte pairs for SmolLM2.

A prompt is plain text, without a template: `start` comes before its ids, `end` (nothing) behind
them, `space` before a word that continues it. `longest` is how many ids a prompt has at most. What
looks like a special token is text. Decoding stops at the end token.
"""
import json
import re
from collections.abc import Iterator
from functools import lru_cache
from itertools import groupby
from pathlib import Path

from sentencepiece import SentencePieceProcessor

from llm.llama import LlamaConfig, locate


class SentencePieces:
    """The tokenizer.model of Llama-2, TinyLlama and Mistral."""

    start, end, space, longest = [1], [], "", 512  # it has a space before every text

    def __init__(self, path: Path, eos: int):
        try:
            self.pieces = SentencePieceProcessor(model_file=str(path))
            assert (self.pieces.bos_id(), self.pieces.eos_id()) == (1, eos)
        except (RuntimeError, OSError, UnicodeDecodeError, AssertionError):
            raise ValueError(f"{path} is no SentencePiece model with start 1, end {eos}") from None
        self.eos, self.vocab_size = eos, self.pieces.vocab_size()

    def encode(self, text: str) -> list[int]:
        return self.pieces.encode(text)

    def decode(self, ids: list[int]) -> str:
        return self.pieces.decode([i for i in until(self.eos, ids) if i < self.vocab_size])


class BytePairs:
    """SmolLM2's tokenizer.json: GPT-2's byte pairs (arXiv:1508.07909), but each digit by itself."""

    start, end, space, longest = [], [], " ", 512

    def __init__(self, path: Path, eos: int):
        try:
            raw = json.loads(path.read_bytes())
            self.vocab, merges = raw["model"]["vocab"], raw["model"]["merges"]
            digits, pieces = raw["pre_tokenizer"]["pretokenizers"]
            assert (digits["type"], digits["individual_digits"]) == ("Digits", True)
            assert (pieces["type"], pieces["add_prefix_space"]) == ("ByteLevel", False)
            assert raw.get("normalizer") is None
            pairs = [pair.split(" ") if isinstance(pair, str) else pair for pair in merges]
            self.rank = {tuple(pair): rank for rank, pair in enumerate(pairs)}
            self.parts = {i: part for part, i in self.vocab.items()}
        except (OSError, ValueError, LookupError, TypeError, AttributeError, AssertionError):
            raise ValueError(f"{path} is missing, or no tokenizer of SmolLM2's kind") from None
        self.eos, self.vocab_size = eos, len(self.vocab)
        self.merge = lru_cache(2**16)(self.merge)

    def encode(self, text: str) -> list[int]:
        return [self.vocab[part] for word in words(text) for part in self.merge(word)
                if part in self.vocab]  # SmolLM2 has no word for some control signs

    def merge(self, word: str) -> list[str]:
        """Join the pair of neighbours that was learned first, until none of them was learned."""
        parts = [LETTERS[byte] for byte in word.encode()]
        while learned := [pair for pair in zip(parts, parts[1:]) if pair in self.rank]:
            first, joined = min(learned, key=self.rank.get), []
            for part in parts:
                if joined and (joined[-1], part) == first:
                    joined[-1] += part
                else:
                    joined.append(part)
            parts = joined
        return parts

    def decode(self, ids: list[int]) -> str:
        letters = "".join(self.parts.get(i, "") for i in until(self.eos, ids))
        return bytes(map(BYTES.get, letters)).decode(errors="replace")


# GPT-2 has a printable letter for each byte.
LETTERS = {byte: chr(byte) for byte in [*range(33, 127), *range(161, 173), *range(174, 256)]}
LETTERS |= {byte: chr(256 + i) for i, byte in enumerate(sorted({*range(256)} - LETTERS.keys()))}
BYTES = {letter: byte for byte, letter in LETTERS.items()}
# GPT-2's pattern, between numbers. To `re` also _ is a letter, and four control signs are space.
SPACE, SIGN = r"[^\S\x1c-\x1f]", r"(?:[^\w\s]|[_\x1c-\x1f])"
WORD = re.compile(rf"'(?:s|t|re|ve|m|ll|d)| ?[^\W_]+| ?{SIGN}+|{SPACE}+(?![\S\x1c-\x1f])|{SPACE}+")


def words(text: str) -> Iterator[str]:
    """Cut a text into words with a blank before them, endings ('s), digits, signs and spaces."""
    for numbers, part in groupby(text, lambda letter: letter.isnumeric() and not letter.isalpha()):
        yield from part if numbers else WORD.findall("".join(part))


def until(eos: int, ids: list[int]) -> list[int]:
    return ids[: ids.index(eos)] if eos in ids else ids


def file_of(folder: Path) -> Path:
    pieces = folder / "tokenizer.model"
    return pieces if pieces.is_file() else folder / "tokenizer.json"


def load_tokenizer(model: str | Path) -> SentencePieces | BytePairs:
    """The tokenizer of a folder or of a public name."""
    folder = locate(model)
    path, eos = file_of(folder), LlamaConfig.from_json(folder / "config.json").eos_token_id
    return SentencePieces(path, eos) if path.suffix == ".model" else BytePairs(path, eos)
