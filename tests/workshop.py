"""What several tests share: a T5 of some ten thousand random weights, small GLUE folders, and command lines for them."""

import json
import multiprocessing
import multiprocessing.forkserver
from pathlib import Path

import pytest
import sentencepiece as spm
import torch

import baselines
import data
import train
from model import T5, UNK, T5Config, load_tokenizer, save_t5

WIDTHS = dict(d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4)
LABELS = {"good": 1, "fine": 1, "great": 1, "bad": 0, "poor": 0, "dull": 0}
SENTENCES = [(f"{article} {word} {noun}", label) for article in ("a", "the", "one", "this") for word, label in LABELS.items()
             for noun in ("film", "plot", "cast", "story")]


@pytest.fixture(scope="session")
def children():
    """Children are forked from a process that has imported train and computed nothing: in a tenth of a second instead of three."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["train"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(train.__file__).parent))  # where it finds train
        multiprocessing.forkserver.ensure_running()


@pytest.fixture(scope="session")
def backbone(tmp_path_factory):
    """A folder with a tiny random T5 and a tokenizer that knows the words of SENTENCES and every label."""
    folder = tmp_path_factory.mktemp("backbone")
    labels = [word for task in data.TASKS.values() for word in task.words]
    text = [f"{task} sentence: {sentence}" for task in data.TASKS for sentence, _ in SENTENCES]
    text += [*labels, *"0123456789", "0.0 1.5 2.4", "sentence1: sentence2: question: question1: question2: premise: hypothesis:"] * 3
    spm.SentencePieceTrainer.train(sentence_iterator=iter(text), model_prefix=str(folder / "spiece"), vocab_size=200, hard_vocab_limit=False,
                                   character_coverage=1.0, pad_id=0, eos_id=1, unk_id=2, bos_id=-1, minloglevel=2)
    tokenizer = load_tokenizer(folder)
    assert all(UNK not in tokenizer.encode(word) for word in [*labels, *"012"])
    torch.manual_seed(0)
    save_t5(T5(T5Config(vocab_size=tokenizer.vocab_size + 3, **WIDTHS)), folder)
    return folder


def write(path, *rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(row + "\n" for row in rows), encoding="utf-8")


@pytest.fixture(scope="session")
def glue(tmp_path_factory):
    """A folder of GLUE folders: in each, the easy question whether a sentence has a good word."""
    folder = tmp_path_factory.mktemp("glue")
    for task in data.TASKS.values():
        def row(sentence, label):
            cells = {column: sentence for column in task.fields.values()}
            cells[task.label] = task.words[label] if task.labels_are_words else str(label * 4.5 if task.name == "stsb" else label)
            return "\t".join([cells.get(column, "-") for column in task.header or cells])
        header = [] if task.header else ["\t".join([*task.fields.values(), task.label])]
        if task.name == "mrpc":
            header, rows = ["\t".join(["#1 ID", "#2 ID", header[0]])], [f"{i}\t{i}\t{row(*example)}" for i, example in enumerate(SENTENCES)]
        else:
            rows = [row(*example) for example in SENTENCES]
        names = ("train.tsv", "dev.tsv") if task.name == "mrpc" else task.files
        write(folder / task.folder / names[0], *header, *rows[::2], *rows[::2])
        for name in names[1:]:
            write(folder / task.folder / name, *header, *rows[1::4])
    return folder


@pytest.fixture
def argv(backbone, glue, tmp_path):
    """argv(*more): a command line of a run of a few steps into tmp_path/run; what `more` repeats, it replaces."""
    def build(*more):
        ladder = () if set(more) & set(baselines.METHODS) else ("--r", "4", "--init", "magnitude")
        return ["--task", "sst2", "--model", str(backbone), "--data", str(glue), "--out", str(tmp_path / "run"), *ladder,
                "--batch-size", "16", "--epochs", "1", "--max-train-rows", "32", "--warmup-steps", "1", "--device", "cpu", *map(str, more)]
    return build


def without(option, argv):
    """The command line less this option and its value."""
    return [part for before, part in zip([None, *argv], argv) if option not in (before, part)]


def logged(out, key):
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [row[key] for row in rows if key in row]


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def refused(capsys, argv, *words, code=2):
    """main(argv) ends with this exit code and one line on stderr that holds these words; gives the line."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        train.main(argv)
    line = capsys.readouterr().err
    assert stop.value.code == code and line.startswith("error: ") and line.count("\n") == 1, line
    assert all(word in line for word in words), line
    return line


def put(folder, name, content, lines=False):
    """folder/name with this as JSON, or as JSON lines, or with these bytes; returns folder."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    if not isinstance(content, bytes):
        content = "".join(json.dumps(row) + "\n" for row in content).encode() if lines else json.dumps(content).encode()
    path.write_bytes(content)
    return folder


def one_line(error, *parts):
    assert "\n" not in str(error.value) and all(part in str(error.value) for part in parts), str(error.value)
