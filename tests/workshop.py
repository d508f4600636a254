"""What several tests share: a tiny random T5, small GLUE folders, and command lines for them."""
import json
import multiprocessing.forkserver
from pathlib import Path

import pytest
import sentencepiece as spm
import torch

import data
import train
from methods import METHODS
from model import T5, T5Config, load_tokenizer, save_t5

ROOT = Path(__file__).parent.parent
WIDTHS = dict(d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4)
LABELS = {"good": 1, "fine": 1, "great": 1, "bad": 0, "poor": 0, "dull": 0}
SENTENCES = [(f"{article} {word} {noun}", label) for article in ("a", "the", "one", "this")
             for word, label in LABELS.items() for noun in ("film", "plot", "cast", "story")]


@pytest.fixture(scope="session")
def children():
    """Fork children from a process that has imported train: in a tenth of a second, not three."""
    multiprocessing.set_forkserver_preload(["train", "pytest", "torch._dynamo"])  # for AdamW
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT))  # where it finds train
        multiprocessing.forkserver.ensure_running()


@pytest.fixture(scope="session")
def backbone(tmp_path_factory):
    """A folder with a tiny random T5, and a tokenizer for SENTENCES and every label."""
    text = [f"{task} sentence: {sentence}" for task in data.TASKS for sentence, _ in SENTENCES]
    labels = [word for task in data.TASKS.values() for word in task.words]
    tags = "sentence1: sentence2: question: question1: question2: premise: hypothesis:"
    text += [*labels, *"0123456789", "0.0 1.5 2.4", tags] * 3
    return fill_backbone(tmp_path_factory.mktemp("backbone"), text, vocab_size=200)


def fill_backbone(folder, text, vocab_size):
    """Learn a tokenizer from the text, and put a tiny random T5 beside it."""
    learn_tokenizer(folder, text, vocab_size)
    torch.manual_seed(0)
    save_t5(T5(T5Config(vocab_size=load_tokenizer(folder).vocab_size + 3, **WIDTHS)), folder)
    return folder


def learn_tokenizer(folder, text, vocab_size):
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(text), model_prefix=folder / "spiece", vocab_size=vocab_size,
        hard_vocab_limit=False, character_coverage=1, pad_id=0, eos_id=1, unk_id=2, bos_id=-1,
        minloglevel=2)


@pytest.fixture(scope="session")
def glue(tmp_path_factory):
    """A folder of GLUE folders: in each, the easy question whether a sentence has a good word."""
    folder = tmp_path_factory.mktemp("glue")
    for task in data.TASKS.values():
        columns = task.header or [*task.fields.values(), task.label]
        header = [] if task.header else ["\t".join(columns)]
        rows = ["\t".join(str(label) if column == task.label else sentence for column in columns)
                for sentence, label in SENTENCES]
        for name in ("train.tsv", "dev.tsv") if task.name == "mrpc" else task.files:
            chosen = rows[1::4] if "dev" in name else rows[::2] * 2
            write(folder / task.title / name, *header, *chosen)
    return folder


@pytest.fixture
def argv(backbone, glue, tmp_path):
    """argv(*more): the command of a run of a few steps into tmp_path/run; `more` comes last."""
    def build(*more):
        ladder = "" if set(more) & {*METHODS, "y-tuning"} else "--r 4 --init magnitude"
        usual = "--task sst2 --batch-size 16 --epochs 1 --max-train-rows 32 --warmup-steps 1"
        where = "--model", backbone, "--data", glue, "--out", tmp_path / "run", "--device", "cpu"
        return [*map(str, where), *usual.split(), *ladder.split(), *map(str, more)]
    return build


@pytest.fixture(scope="session")
def learned(backbone, glue, tmp_path_factory):
    """(folder, results) of an LST run that has learned the easy task."""
    out = tmp_path_factory.mktemp("learned") / "run"
    where = ["--model", str(backbone), "--data", str(glue), "--out", str(out), "--device", "cpu"]
    return out, train.main(["--task", "sst2", *where, *(
        "--r 4 --epochs 10 --max-train-rows 96 --lr 2e-2 --warmup-steps 10 --batch-size 8 "
        "--init fisher --fisher-samples 8").split()])


def write(path, *rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(row + "\n" for row in rows), encoding="utf-8")


def put(folder, name, content, lines=False):
    """folder/name with this as JSON, or as JSON lines, or with these bytes; returns folder."""
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    if not isinstance(content, bytes):
        rows = content if lines else [content]
        content = "".join(json.dumps(row) + "\n" for row in rows).encode()
    (folder / name).write_bytes(content)
    return folder


def spy(patch, owner, name, on_call=lambda number, *arguments: None):
    """The arguments of every call of owner.<name>, as a list that grows. on_call(number from 1,
    *arguments) comes first; what it returns, if anything, is the result."""
    original, calls = getattr(owner, name), []

    def spying(*arguments, **named):
        calls.append(arguments)
        instead = on_call(len(calls), *arguments)
        return original(*arguments, **named) if instead is None else instead

    patch.setattr(owner, name, spying)
    return calls


def interrupt_at(number):
    def on_call(count, *_):
        if count == number:
            raise KeyboardInterrupt
    return on_call


def set_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def without(option, argv):
    """The command line less this option and its value."""
    return [part for before, part in zip([None, *argv], argv) if option not in (before, part)]


def logged(out, key):
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [row[key] for row in rows if key in row]


def contents(folder):
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder): path.read_bytes() for path in files}


def refused(capsys, argv, *words, code=2):
    """main(argv) ends with this code and one line on stderr with these words; gives the line."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        train.main(argv)
    line = capsys.readouterr().err
    assert stop.value.code == code and line.startswith("error: ") and line.count("\n") == 1, line
    assert all(word in line for word in words), line
    return line


def one_line(error, *parts):
    assert "\n" not in str(error.value) and all(part in str(error.value) for part in parts)
