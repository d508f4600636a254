"""The bundled sample of movie reviews: train.tsv is generated, dev.tsv is written by hand and out of the generator's reach."""
import importlib.util
import re
from pathlib import Path

import pytest

ASSETS = Path(__file__).parent.parent / "assets"
SST2 = ASSETS / "sample" / "SST-2"

spec = importlib.util.spec_from_file_location("make_sample", ASSETS / "make_sample.py")
make_sample = importlib.util.module_from_spec(spec)
spec.loader.exec_module(make_sample)


def read(path: Path) -> list[tuple[str, str]]:
    header, *lines = path.read_bytes().decode().removesuffix("\n").split("\n")
    assert header == "sentence\tlabel"
    return [tuple(line.split("\t")) for line in lines]


TRAIN, DEV = read(SST2 / "train.tsv"), read(SST2 / "dev.tsv")


def test_train_is_what_make_sample_writes(tmp_path):
    make_sample.main(["--out", str(tmp_path / "train.tsv")])
    assert (tmp_path / "train.tsv").read_bytes() == (SST2 / "train.tsv").read_bytes()


def test_there_are_enough_rows():
    assert len(TRAIN) >= 2000
    assert len(DEV) == 300


def test_no_row_comes_twice():
    for rows in (TRAIN, DEV):
        assert len({sentence for sentence, label in rows}) == len(rows)


def test_half_of_the_rows_are_positive():
    for rows in (TRAIN, DEV):
        labels = [label for sentence, label in rows]
        assert labels.count("1") == labels.count("0") == len(rows) / 2


def test_sentences_are_tokenised_like_sst2():
    for sentence, label in TRAIN + DEV:
        assert sentence == " ".join(sentence.lower().split())           # lower case, single spaces, none at the ends
        assert sentence.isascii()
        assert not re.search(r"\S[,.;:!?]|\S'|\wn't|[<>]", sentence.replace(" n't", "")), sentence  # "dull ,", "it 's", "does n't"


def test_dev_rows_have_4_to_30_words():
    assert all(4 <= len(sentence.split()) <= 30 for sentence, label in DEV)


@pytest.mark.slow
def test_generator_can_produce_every_train_row():
    assert all(make_sample.can_produce(sentence) for sentence, label in TRAIN[:500])


@pytest.mark.slow
def test_generator_can_produce_no_dev_row():
    for sentence, label in DEV:
        assert not make_sample.can_produce(sentence), sentence
        assert not make_sample.can_produce(sentence.removesuffix(" .")), sentence


def test_no_dev_row_is_in_train():
    assert not {sentence for sentence, label in DEV} & {sentence for sentence, label in TRAIN}
