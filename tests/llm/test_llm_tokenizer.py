"""Tokenizers: equal to what made the stored ids, and to `tokenizers` where it is installed."""
import json
import random
import shutil
from pathlib import Path

import pytest
import sentencepiece as spm

from llm import load_tokenizer
from llm.tokenizer import BytePairs, words
from tests.workshop import one_line

FIXTURES = Path(__file__).parent.parent / "fixtures" / "llm"
STORED = json.loads((FIXTURES / "texts.json").read_text(encoding="utf-8"))
ODD = ("aZ0 9\n\t'sltré¡²ⅧⅨ٣三中½§_-.,🙂👍🏽𝟗𝔸"
       "\u00a0\u2003\u200d\ufeff\u0301\x00\x1c\x85\u2028")


@pytest.fixture(scope="module")
def pairs():
    return BytePairs(FIXTURES / "tokenizer.json", eos=0)


@pytest.mark.parametrize("row", STORED, ids=lambda row: row["text"][:9])
def test_byte_pairs_equal_the_stored_ids_and_lose_nothing(pairs, row):
    assert pairs.encode(row["text"]) == row["ids"]
    assert pairs.decode(row["ids"]) == row["text"]


def fuzzed(count):
    draw = random.Random(0)
    for _ in range(count):
        yield "".join(draw.choices(ODD, k=draw.randint(0, 20)))
        yield "".join(chr(draw.randrange(0x20, 0x3000)) for _ in range(8))


def plain_tokenizer(path):
    tokenizers = pytest.importorskip("tokenizers")
    whole = tokenizers.Tokenizer.from_file(str(path))
    plain = tokenizers.Tokenizer(whole.model)  # knows no special token: they are text
    plain.pre_tokenizer = whole.pre_tokenizer
    return plain


def test_byte_pairs_equal_tokenizers_on_fuzzed_texts(pairs):
    plain = plain_tokenizer(FIXTURES / "tokenizer.json")
    for text in fuzzed(3000):
        assert pairs.encode(text) == plain.encode(text).ids, ascii(text)
        assert pairs.decode(pairs.encode(text)) == text


def test_bytes_without_a_word_are_left_out_as_by_tokenizers(tmp_path):
    raw = json.loads((FIXTURES / "tokenizer.json").read_text())
    del raw["model"]["vocab"]["ĝ"]  # the byte 1d, which SmolLM2 lacks
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(raw))
    lacking = BytePairs(path, 0)
    assert lacking.decode(lacking.encode("fine\x1dfilm")) == "finefilm"


def test_digits_stand_alone_and_words_take_a_space_along():
    assert [*words("It's 12  apples\n!")] == ["It", "'s", " ", "1", "2", " ", " apples", "\n", "!"]


@pytest.fixture
def llama_like(tmp_path):
    """A folder with a SentencePiece tokenizer made as Llama's was: bytes for what is unknown."""
    sentences = ["the film is good", "a dull plot", "the cast is fine"] * 9
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences), model_prefix=tmp_path / "tokenizer", vocab_size=300,
        model_type="bpe", byte_fallback=True, normalization_rule_name="identity", pad_id=-1,
        remove_extra_whitespaces=False, split_digits=True, hard_vocab_limit=False, minloglevel=2)
    shutil.copy(FIXTURES / "gqa" / "config.json", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    vocab_size = spm.SentencePieceProcessor(str(tmp_path / "tokenizer.model")).vocab_size()
    (tmp_path / "config.json").write_text(
        json.dumps(config | {"vocab_size": vocab_size, "eos_token_id": 2}))
    return tmp_path


@pytest.mark.parametrize("text", ["the film", " two  spaces\n", "naïve 中文 🙂", "</s> <s>", ""])
def test_sentence_pieces_lose_nothing_and_special_tokens_are_text(llama_like, text):
    tokenizer = load_tokenizer(llama_like)
    ids = tokenizer.encode(text)
    assert not {1, 2} & set(ids) and tokenizer.decode([*ids, 2, 5, 5]) == text
    assert tokenizer.start == [1] and tokenizer.eos == 2


def test_a_word_continues_a_prompt_as_in_one_text(llama_like, pairs):
    for tokenizer in (load_tokenizer(llama_like), pairs):
        prompt, word = tokenizer.encode("the film is"), tokenizer.encode(tokenizer.space + "good")
        assert prompt + word == tokenizer.encode("the film is good")


def test_other_tokenizers_are_refused_in_one_line(llama_like, tmp_path):
    whole, path = (FIXTURES / "tokenizer.json").read_text(), tmp_path / "tokenizer.json"
    raw = json.loads(whole)
    raw["pre_tokenizer"]["pretokenizers"][0] = {"type": "Split"}
    cased = json.loads(whole) | {"normalizer": {"type": "Lowercase"}}
    numbers = json.loads(whole)
    numbers["model"]["merges"] = [1, 2]
    for content in (*map(json.dumps, (raw, cased, numbers)), "[]", "{"):
        path.write_text(content)
        with pytest.raises(ValueError, match="no tokenizer of SmolLM2's kind") as error:
            BytePairs(path, 0)
        one_line(error)
    for content in (b"x", (Path(__file__).parents[2] / "assets/nano/spiece.model").read_bytes()):
        (llama_like / "tokenizer.model").write_bytes(content)
        with pytest.raises(ValueError, match="is no SentencePiece model with") as error:
            load_tokenizer(llama_like)
        one_line(error)
