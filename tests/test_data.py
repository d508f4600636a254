"""GLUE's files, prompts, splits (Sec. 4) and batches, on small files made here."""
import dataclasses
import hashlib
import importlib.util
import os
import re
import shutil
from pathlib import Path

import pytest
import torch

import data
from data import TASKS, Example, Row, batches, collate, in_order
from model import Tokenizer

PARSES = "\tp" * 4
FORMAT = {  # header, a row, what a model reads; {i} numbers the rows, {label} is their label
    "cola": ("", "gj04\t{label}\t*\tS{i} \"sic.", "cola sentence: S{i} \"sic."),
    "sst2": ("sentence\tlabel", "S{i} \t{label}", "sst2 sentence: S{i} "),
    "mrpc": ("\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String", "{label}\t{i}\t7\tA{i}\tB{i}",
             "mrpc sentence1: A{i} sentence2: B{i}"),
    "qqp": ("id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate",
            "{i}\t1\t2\tA{i}?\tB{i}?\t{label}", "qqp question1: A{i}? question2: B{i}?"),
    "mnli": ("index\tpromptID\tpairID\tgenre\tsentence1_binary_parse\tsentence2_binary_parse\t"
             "sentence1_parse\tsentence2_parse\tsentence1\tsentence2\tlabel1\tgold_label",
             f"{{i}}\t1\t1n\tg{PARSES}\tA{{i}}\tB{{i}}\tneutral\t{{label}}",
             "mnli premise: A{i} hypothesis B{i}"),
    "qnli": ("index\tquestion\tsentence\tlabel", "{i}\tA{i}?\tB{i}\t{label}",
             "qnli question: A{i}? sentence: B{i}"),
    "rte": ("index\tsentence1\tsentence2\tlabel", "{i}\tA{i}\tB{i}\t{label}",
            "rte sentence1: A{i} sentence2: B{i}"),
    "stsb": ("index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2\t"
             "score", "{i}\tg\tf\ty\to\ts\ts\tA{i}\tB{i}\t{label}",
             "stsb sentence1: A{i} sentence2: B{i}"),
}
LABELS = {"stsb": ["0.000", "3.750", "5.000"], "mnli": ["entailment", "neutral", "contradiction"],
          **dict.fromkeys(("qnli", "rte"), ["entailment", "not_entailment"])}  # else "0" and "1"
TRAIN, DEV, MISMATCHED = range(200), range(200, 210), range(210, 216)


def row(task, i, label=None):
    labels = LABELS.get(task, ["0", "1"])
    return FORMAT[task][1].format(i=i, label=label or labels[i % len(labels)])


def write(folder, task, file, lines, end="\n", header=None):
    """The file of the task, below folder; lines are numbers of rows or texts. Returns folder."""
    header = FORMAT[task][0] if header is None else header
    lines = [line if isinstance(line, str) else row(task, line) for line in lines]
    home = folder / TASKS[task].title
    home.mkdir(parents=True, exist_ok=True)
    text = "".join(line + end for line in [*[header] * bool(header), *lines])
    (home / file).write_bytes(text.encode())
    return folder


def official(task, folder, train=TRAIN, dev=DEV):
    """The task's official files below folder; returns it."""
    if task == "mrpc":
        write(folder, task, "mrpc_dev_ids.tsv", [f"{i}\t7" for i in dev], header="")
        return write(folder, task, "msr_paraphrase_train.txt", [*train, *dev], end="\r\n")
    for name, rows in zip(TASKS[task].files, (train, dev, MISMATCHED)):
        write(folder, task, name, rows)
    return folder


def read(examples):
    """The sorted numbers of the rows that these examples were."""
    return sorted(int(re.findall(r"[ABS](\d+)", example.source)[0]) for example in examples)


# ------------------------------------------------------------------------- prompts and targets

@pytest.mark.parametrize("task, paper, t5", [
    ("cola", "0 1", "unacceptable acceptable"), ("sst2", "0 1", "negative positive"),
    ("mrpc", "0 1", "not_equivalent equivalent"), ("qqp", "0 1", "not_duplicate duplicate"),
    ("mnli", "0 1 2", "entailment neutral contradiction"),
    ("qnli", "0 1", "entailment not_entailment"), ("rte", "0 1", "entailment not_entailment"),
    ("stsb", "0.0 3.8 5.0", "0.0 3.8 5.0"),
])
def test_every_task_has_the_papers_and_t5s_prompts_and_targets(tmp_path, task, paper, t5):
    official(task, tmp_path)
    for prompts, targets in (("paper", paper.split()), ("t5", t5.split())):
        dataset = TASKS[task].load(str(tmp_path), prompts)
        example = next(e for e in dataset.train + dataset.val if read([e]) == [4])
        source = FORMAT[task][2].format(i=4)
        if (task, prompts) == ("mnli", "t5"):
            source = "mnli hypothesis: B4 premise: A4"
        label = [0.0, 3.75, 5.0][4 % 3] if task == "stsb" else 4 % len(targets)
        assert example == (source, targets[4 % len(targets)], label)
        for target in targets:  # reading an answer is the inverse
            label, shown = TASKS[task].read(f" {target} ", prompts)
            assert label == (float(target) if task == "stsb" else targets.index(target))
            assert shown == (str(label) if task == "stsb" else t5.split()[label])


def test_stsb_is_rounded_to_a_tenth_by_the_paper_and_to_a_fifth_by_t5(tmp_path):
    scores = [row("stsb", 0, score) for score in ("5.000", "0.500", "2.917", "3.100")]
    write(official("stsb", tmp_path), "stsb", "train.tsv", scores)
    for prompts, targets in (("paper", "5.0 0.5 2.9 3.1"), ("t5", "5.0 0.4 3.0 3.2")):
        dataset = TASKS["stsb"].load(str(tmp_path), prompts)
        assert [example.target for example in dataset.train] == targets.split()


def test_a_users_own_text_gets_the_same_prompt():
    assert TASKS["sst2"].ask("so | so", "paper").source == "sst2 sentence: so | so"
    ask = TASKS["mnli"].ask
    source = ask("He ran. | He moved.", "paper").source
    assert source == "mnli premise: He ran. hypothesis He moved."
    assert ask("He ran.\tHe moved.", "t5").source == "mnli hypothesis: He moved. premise: He ran."


def test_an_answer_of_another_kind_is_invalid():
    for task, text, prompts in (("sst2", "positive", "paper"), ("sst2", "1", "t5"), *(
            ("sst2", text, "paper") for text in ("2", "-1", "", "01")), *(
            ("stsb", text, "paper") for text in ("", "nan", "inf", "1e9", "3.8.", "three"))):
        label, shown = TASKS[task].read(text, prompts)
        assert label is None and shown == f"{text!r}, which is no answer of {task}"


def test_a_long_source_is_cut_to_128_with_its_end_token():
    class Words(Tokenizer):
        def __init__(self):
            pass

        def encode(self, text):
            return [len(word) for word in text.split()]

    examples = [Example("a bb", "ccc", 3), Example("word " * 200, "1", 1)]
    rows = TASKS["sst2"].encode(examples, Words())
    assert rows == [Row([1, 2, 1], [3, 1]), Row([4] * 127 + [1], [1, 1])]


# ---------------------------------------------------------------------------------------- rows

def test_quotes_are_data_and_only_a_newline_ends_a_row(tmp_path):
    texts = ['"an opening quote', 'a "quoted" word', "next\x85line\u2028sep\x0b\x1c\rx"]
    write(official("sst2", tmp_path), "sst2", "dev.tsv", [f"{text}\t1" for text in texts])
    dataset = TASKS["sst2"].load(str(tmp_path))
    assert [e.source for e in dataset.test] == [f"sst2 sentence: {text}" for text in texts]


@pytest.mark.parametrize("task, bad, words", [
    ("sst2", ["no label", "another\t7"], "199: 1 of 2 columns, label ''; line 200: .* label '7'"),
    ("stsb", [row("stsb", 0, "5.1"), row("stsb", 1, "nan")], "199: .* '5.1'; line 200: .* 'nan'")])
def test_one_percent_of_malformed_rows_is_skipped_and_counted(tmp_path, task, bad, words):
    official(task, tmp_path, train=[*range(197), *bad])  # 2 of 199
    with pytest.raises(ValueError, match=f"train.tsv: 2 of 199 rows are malformed.*line {words}"):
        TASKS[task].load(str(tmp_path))
    dataset = TASKS[task].load(str(official(task, tmp_path, train=[*range(198), *bad])))
    rows = dataset.train + (dataset.val if task == "sst2" else [])
    assert dataset.skipped == 2 and read(rows) == list(range(198))


def test_rows_without_a_gold_label_are_skipped(tmp_path):
    dataset = TASKS["mnli"].load(str(official("mnli", tmp_path, dev=[1, 2, row("mnli", 3, "-")])))
    assert dataset.skipped == 1 and read(dataset.test) == [1, 2]


@pytest.mark.parametrize("task, files", [
    ("rte", "train.tsv and dev.tsv"), ("mrpc", "msr_paraphrase_train.txt and mrpc_dev_ids.tsv"),
    ("mnli", "train.tsv and dev_matched.tsv and dev_mismatched.tsv")])
def test_a_missing_file_is_named_with_its_place(tmp_path, task, files):
    title, last = TASKS[task].title, TASKS[task].files[-1]
    (official(task, tmp_path) / title / last).unlink()
    for folder, missing in ((str(tmp_path), last), ("sample", "")):
        with pytest.raises(ValueError, match=f"{title}/{missing}.* is missing; .*holds {files}"):
            TASKS[task].load(folder)


# --------------------------------------------------------------------------------------- split

def order(n):
    return torch.randperm(n, generator=torch.Generator().manual_seed(42)).tolist()


def numbers(examples):
    return [read([example])[0] for example in examples]


def test_a_small_task_halves_its_validation_set(tmp_path):
    dataset = TASKS["rte"].load(str(official("rte", tmp_path, range(6), range(277))))
    assert (len(dataset.val), len(dataset.test)) == (138, 139)
    assert numbers(dataset.val + dataset.test) == order(277)
    assert numbers(dataset.train) == list(range(6))  # untouched


@pytest.mark.parametrize("folder, rows, val", [
    ("official", 12_000, 1000), ("official", 200, 20), ("sample", 12_000, 1200)])
def test_a_large_task_validates_on_training_rows(tmp_path, monkeypatch, folder, rows, val):
    official("sst2", tmp_path, range(rows))
    monkeypatch.setattr(data, "SAMPLE", tmp_path if folder == "sample" else None)
    dataset = TASKS["sst2"].load("sample" if folder == "sample" else str(tmp_path))
    assert (len(dataset.train), len(dataset.val), len(dataset.test)) == (rows - val, val, 10)
    assert numbers(dataset.val + dataset.train) == order(rows)
    assert dataset.name == {"official": "glue", "sample": "bundled-sample"}[folder]


def test_mrpc_is_divided_by_glues_list_of_ids_or_already(tmp_path):
    official("mrpc", tmp_path / "ids")
    write(write(tmp_path, "mrpc", "train.tsv", TRAIN), "mrpc", "dev.tsv", DEV)
    for folder in (tmp_path / "ids", tmp_path):
        dataset = TASKS["mrpc"].load(str(folder))
        assert read(dataset.train) == list(TRAIN)
        assert read(dataset.val + dataset.test) == list(DEV)


# ------------------------------------------------------------------- download (run/test_hub.py)

@pytest.fixture
def mirror(tmp_path, monkeypatch):
    """mirror(task): the task's files as published, on a mirror of GLUE; their hashes are right."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("GLUE_BASE_URL", (tmp_path / "mirror" / "glue" / "data").as_uri())

    def publish(task, trusted=True):
        made, hashes = official(task, tmp_path / "made") / TASKS[task].title, {}
        (made / "test.tsv").write_text("not wanted")
        for address in TASKS[task].downloads:
            path = Path(os.path.normpath(tmp_path / "mirror" / "glue" / "data" / address))
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.suffix == ".zip":
                shutil.make_archive(path.with_suffix(""), "zip", made.parent, made.name)
            else:
                shutil.copy(made / path.name, path)
            hashes[address] = hashlib.sha256(path.read_bytes()).hexdigest()
        if trusted:
            task = dataclasses.replace(TASKS[task], downloads=hashes)
            monkeypatch.setitem(TASKS, task.name, task)
        return tmp_path / "mirror"

    return publish


@pytest.mark.parametrize("task", TASKS)
def test_every_task_is_fetched_and_read(mirror, tmp_path, task):
    server = mirror(task)
    dataset = TASKS[task].load()
    parts = [read(part) for part in (dataset.train, dataset.val, dataset.test)]
    if task == "mnli":
        assert parts == [list(TRAIN), list(MISMATCHED), list(DEV)]
    elif task in ("cola", "rte", "mrpc", "stsb"):
        assert parts[0] == list(TRAIN) and sorted(parts[1] + parts[2]) == list(DEV)
    else:
        assert sorted(parts[0] + parts[1]) == list(TRAIN) and parts[2] == list(DEV)
    assert (dataset.name, dataset.skipped, dataset.fallback) == ("glue", 0, None)
    there = {path.name for path in (tmp_path / "home").rglob("*") if path.is_file()}
    assert there == set(TASKS[task].files)
    shutil.rmtree(server)
    assert TASKS[task].load() == dataset  # from the disk


@pytest.mark.parametrize("trouble, words", [
    ("not there", "SST-2.zip could not be downloaded"),
    ("wrong", "SST-2.zip does not have the sha256"),
    ("no room", "No space left")])
def test_the_sample_stands_in_for_an_sst2_that_does_not_come(
        mirror, tmp_path, monkeypatch, trouble, words):
    if trouble != "not there":
        mirror("sst2", trusted=trouble != "wrong")
    if trouble == "no room":
        def full(*args):
            raise OSError(28, "No space left on device")
        monkeypatch.setattr("zipfile.ZipFile.extract", full)
    dataset = TASKS["sst2"].load()
    assert dataset.name == "bundled-sample" and "\n" not in dataset.fallback
    assert re.search(words, dataset.fallback)
    with pytest.raises(ValueError, match="RTE.zip could not be .*put it into DIR/RTE: --data DIR$"):
        TASKS["rte"].load()  # which no sample can stand for


# ------------------------------------------------------------------------------------- batches

def lengths(*sizes):
    return [Row([9] * n, [5, 1]) for n in sizes]


def test_batches_are_a_pure_function_of_seed_and_epoch_and_show_every_row_once():
    rows = lengths(*(i * 7 % 50 + 1 for i in range(1003)))
    before = torch.get_rng_state()
    first = batches(rows, 10, seed=3, epoch=2)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(999)
    assert batches(rows, 10, seed=3, epoch=2) == first
    assert batches(rows, 10, seed=3, epoch=1) != first != batches(rows, 10, seed=2, epoch=2)
    assert sorted(i for batch in first for i in batch) == list(range(1003))
    assert sorted(len(batch) for batch in first) == [3] + [10] * 100


def test_a_batch_has_rows_of_similar_length_in_an_order_that_is_random():
    sizes = [i * 37 % 100 + 1 for i in range(2000)]
    chosen = batches(lengths(*sizes), 10, seed=0, epoch=0)
    spread = [max(n) - min(n) for n in ([sizes[i] for i in batch] for batch in chosen)]
    assert sum(spread) / len(spread) < 10  # about 82 for random batches
    first = [sizes[batch[0]] for batch in chosen]
    assert first != sorted(first)
    assert in_order(lengths(5, 2, 9, 2, 1), 2) == [[4, 1], [3, 0], [2]]  # for evaluation


def test_collate_pads_to_the_longest_and_shifts_the_labels_right():
    batch = collate([Row([7, 8, 1], [5, 1]), Row([9, 1], [5, 6, 1])])
    assert batch.source_ids.tolist() == [[7, 8, 1], [9, 1, 0]]
    assert batch.source_mask.tolist() == [[True, True, True], [True, True, False]]
    assert batch.decoder_ids.tolist() == [[0, 5, 0], [0, 5, 6]]
    assert batch.decoder_mask.tolist() == [[True, True, False], [True, True, True]]
    assert batch.labels.tolist() == [[5, 1, -100], [5, 6, 1]]
    assert batch.weights is None  # texts count alike
    weights = collate([Row([1], [1], weight=0.3), Row([1], [1])]).weights
    assert weights.tolist() == pytest.approx([0.3, 1])


# ---------------------------------------------------- the bundled sample, assets/make/make_sample

def test_the_samples_train_is_what_make_sample_writes(tmp_path):
    home = data.SAMPLE.parent
    spec = importlib.util.spec_from_file_location("make", home / "make" / "make_sample.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.main(["--out", str(tmp_path / "train.tsv")])
    assert (tmp_path / "train.tsv").read_bytes() == (home / "sample/SST-2/train.tsv").read_bytes()


def test_the_sample_is_balanced_and_none_of_its_test_rows_is_trained_on():
    dataset, held = TASKS["sst2"].load("sample"), []
    for examples in (dataset.train + dataset.val, dataset.test):
        held += [{example.source for example in examples}]
        assert len(held[-1]) == len(examples) == 2 * sum(example.label for example in examples)
    assert [len(sources) for sources in held] == [4000, 300] and not held[0] & held[1]
