"""T5's tokenizer (model.py): SentencePiece, sentinels, and what is refused."""
import importlib.metadata
import io
import os
import random

import pytest
from sentencepiece import SentencePieceTrainer

from model import T5_V1_SPIECE, Tokenizer, load_tokenizer, locate
from run.hub import NotThere, sha256_of

TEXT = ["the film was a joy , and the cast was better than the film .",
        "a dull , slow story that never finds its end .",
        "I can't say that 123 people didn't like it !", "sst2 sentence: nothing is as it seems",
        "premise: it rains hypothesis: it is wet"]


def train_pieces(path, **how):
    file = io.BytesIO()
    SentencePieceTrainer.train(sentence_iterator=iter(TEXT * 3), model_writer=file, vocab_size=90,
                               hard_vocab_limit=False, num_threads=1, minloglevel=2, **how)
    path.write_bytes(file.getvalue())
    return path


T5_IDS = dict(pad_id=0, eos_id=1, unk_id=2, bos_id=-1)


@pytest.fixture(scope="module")
def spiece(tmp_path_factory):
    return train_pieces(tmp_path_factory.mktemp("pieces") / "spiece.model", **T5_IDS)


@pytest.fixture
def tokenizer(spiece):
    return load_tokenizer(spiece.parent)


def test_text_survives_encoding_and_decoding(tokenizer):
    for text in TEXT:
        ids = tokenizer.encode(text)
        assert ids and min(ids) > 2 and max(ids) < tokenizer.vocab_size - 100
        assert tokenizer.decode(ids) == text
        assert tokenizer.decode([0, *ids, 1, 0, 5, 6]) == text, "nothing comes after the end"
    assert tokenizer.encode("") == tokenizer.encode("  \n\t ") == [] and tokenizer.decode([]) == ""
    plain = tokenizer.encode("the film was a joy")
    assert tokenizer.encode(" the\tfilm \n was\u00a0a   joy ") == plain


def test_sentinels_are_the_last_ids_counted_from_the_end(tokenizer):
    last, the, was = tokenizer.vocab_size - 1, tokenizer.encode("the"), tokenizer.encode("was")
    assert tokenizer.encode("<extra_id_0>") == [last]
    assert tokenizer.encode("<extra_id_99>") == [last - 99] == [tokenizer.pieces.vocab_size()]
    text = "the <extra_id_0> was\n<extra_id_1>"
    assert tokenizer.encode(text) == [*the, last, *was, last - 1]
    assert tokenizer.decode([*the, last, *was]) == "the <extra_id_0> was"


@pytest.mark.parametrize("text", ["<extra_id_100>", "<extra_id_05>", "<extra_id_00>", "<pad>",
                                  "<extra_id_\u0663>", "<extra_id_>", "<extra_id_-1>", "</s>"])
def test_text_that_looks_like_a_special_token_is_text(tokenizer, text):
    pieces = tokenizer.pieces.vocab_size()
    assert all(1 < i < pieces for i in tokenizer.encode(f"the {text} film"))


def test_ids_beyond_the_vocabulary_read_as_unknown(tokenizer):
    the, unknown = tokenizer.encode("the"), tokenizer.decode([2])
    for wrong in (tokenizer.vocab_size, 32127, 10**9, -100):
        assert tokenizer.decode([wrong]) == unknown
        assert tokenizer.decode([*the, wrong, *the]) == tokenizer.decode([*the, 2, *the])


def test_a_tokenizer_without_normalization_is_read(tmp_path):
    path = train_pieces(tmp_path / "spiece.model", normalization_rule_name="identity", **T5_IDS)
    assert Tokenizer(path).decode(Tokenizer(path).encode(TEXT[0])) == TEXT[0]


def test_foreign_and_damaged_tokenizers_are_value_errors(spiece, tmp_path):
    with pytest.raises(ValueError, match="is not T5's"):
        Tokenizer(train_pieces(tmp_path / "foreign.model"))  # unknown is 0, the start 1, the end 2
    whole = spiece.read_bytes()
    for content in (b"", b"<html>", b"version https://git-lfs.github.com/spec/v1\n",
                    bytes(range(256)), whole[:1000], whole[: len(whole) // 2]):
        (tmp_path / "spiece.model").write_bytes(content)
        with pytest.raises(ValueError, match="spiece.model"):
            load_tokenizer(tmp_path)


def test_tokens_equal_transformers_live(tokenizer, spiece):
    T5Tokenizer = pytest.importorskip("transformers").T5Tokenizer
    bits = [" ", "  ", "\t", "\n", "\u00a0", "\u3000", "the", "film", ".", "!", "can't", "123",
            "\u00ef", "<", ">", "<extra_id_0>", "<extra_id_7>", "<extra_id_99>", "<extra_id_100>",
            "<extra_id_05>"]
    if importlib.metadata.version("transformers") < "5":
        theirs = T5Tokenizer(str(spiece), legacy=True)
        bits += ["\x1c", "\u200b", "\u2581"]  # version 5 does not take these out by itself
    else:  # it reads spiece.model only with protobuf, but takes a list of pieces
        pieces = tokenizer.pieces
        known = [(pieces.id_to_piece(i), pieces.get_score(i)) for i in range(pieces.vocab_size())]
        theirs = T5Tokenizer(known + [(f"<extra_id_{i}>", 0.0) for i in reversed(range(100))])
    draw = random.Random(0)
    for text in ["".join(draw.choices(bits, k=draw.randint(1, 12))) for _ in range(300)] + TEXT:
        ids = tokenizer.encode(text)
        assert ids == theirs(text, add_special_tokens=False).input_ids, repr(text)
        ours = tokenizer.decode(ids).split()  # an unknown piece is a double question mark here
        assert "".join(ours) == "".join(theirs.decode(ids).split()) or 2 in ids, repr(text)


@pytest.fixture(scope="module")
def real():
    """T5's published spiece.model, from where T5_SPIECE says or from the Hugging Face cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        try:
            path = os.environ.get("T5_SPIECE") or locate("t5-small", "spiece.model")
        except NotThere as error:
            pytest.skip(f"load t5-small once, or let T5_SPIECE name its spiece.model ({error})")
    assert sha256_of(path) == T5_V1_SPIECE, f"{path} is not the published file"
    return Tokenizer(path)


@pytest.mark.parametrize("text, ids, back", [
    ("translate English to German: The house is wonderful.",
     [13959, 1566, 12, 2968, 10, 37, 629, 19, 1627, 5], None),
    (" The\t house\n\nis\u00a0 wonderful.\u3000\u200b", [37, 629, 19, 1627, 5],
     "The house is wonderful."),  # white space is one space, or none
    (" \n", [], ""),
    ("cafe\u0301 \uff21", [11949, 71], "caf\u00e9 A"),  # compatibility composition (NFKC)
    ("a { b", [3, 9, 3, 2, 3, 115], "a  \u2047  b"),  # no brace was in the text it was made from
    ("The <extra_id_0> walks in <extra_id_1> park", [37, 32099, 10681, 16, 32098, 2447], None),
    ("<extra_id_99>", [32000], None),
    ("</s>", [3, 2, 87, 7, 3155], " \u2047 /s>"),  # text, no end
])
def test_the_real_tokenizer_gives_the_published_ids(real, text, ids, back):
    assert real.vocab_size == 32100 and real.encode(text) == ids
    assert real.decode([*ids, 1, 37]) == (text if back is None else back)
