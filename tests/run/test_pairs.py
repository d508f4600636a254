"""--task text: one's own pairs of texts, from files of two kinds to answers."""
import json
import math
import signal
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import train
from data import Example
from run import processes, tasks
from run.options import runs_of
from run.pairs import Pairs
from test_folder import run, same, what_counts
from test_options import filled
from test_processes import together
from workshop import interrupt_at, logged, put, refused, spy, write

WORDS = "film plot cast story good fine great bad poor dull".split()
TURNED = [(f"{a} {b}", f"{b} {a}") for a in WORDS for b in WORDS]
OWN, TRAIN, DEV = tasks.OWN, [row for row in TURNED if row not in TURNED[::4]], TURNED[::4]
LEARNS = ("--method", "full", "--lr", "1e-2", "--epochs", 25)
LETTERS = SimpleNamespace(start=[], end=[1], space="", eos=1,
                          encode=lambda text: [ord(letter) for letter in text],
                          decode=lambda ids: "".join(map(chr, ids)).replace("{", "?"))


def tsv(folder, train=TRAIN, dev=DEV):
    for name, rows in (("train.tsv", train), ("dev.tsv", dev)):
        write(folder / name, *map("\t".join, rows))
    return folder


def jsonl(folder, train=TRAIN, dev=DEV):
    for name, rows in (("train.jsonl", train), ("dev.jsonl", dev)):
        put(folder, name, [{"id": 7, "completion": b, "prompt": a} for a, b in rows], lines=True)
    return folder


@pytest.fixture
def own(argv, tmp_path):
    """own(*more): the command of a run on TURNED; `more` comes last."""
    folder = tsv(tmp_path / "own")
    return lambda *more: argv("--task", "text", "--data", folder, "--max-train-rows", 75, *more)


def texts(examples):
    return [example[:2] for example in examples]


# ------------------------------------------------------------------------------------------- data

def test_both_kinds_of_files_hold_the_same_rows_and_a_tenth_of_train_validates(tmp_path):
    ours, theirs = OWN.load(tsv(tmp_path / "a")), OWN.load(jsonl(tmp_path / "b"))
    assert (ours.train, ours.val, ours.test) == (theirs.train, theirs.val, theirs.test)
    assert (len(ours.train), len(ours.val), texts(ours.test)) == (68, 7, DEV)
    assert sorted(texts(ours.train + ours.val)) == sorted(TRAIN)
    assert texts(ours.val) != TRAIN[:7], "the split is not random"
    assert ours.sha256 != theirs.sha256 and ours.val == OWN.load(tmp_path / "a").val


def test_a_quote_is_a_character_a_blank_line_no_row_and_json_holds_every_text(tmp_path):
    write(tmp_path / "train.tsv", '"a\t b" ', "", *["c\td"] * 2, "")
    write(tmp_path / "dev.tsv", "\ufeffé\t電\r")
    found = OWN.load(tmp_path)
    assert ('"a', ' b" ', 0) in found.train + found.val and texts(found.test) == [("é", "電")]
    folder = jsonl(tmp_path / "json", dev=[("a\tb\n", "\u2028c")])
    put(folder, "train.jsonl", b'{"prompt":\t"a",\t"completion": "b"}\r\n' * 3)
    found = OWN.load(folder)
    assert texts(found.test) == [("a\tb\n", "\u2028c")] and texts(found.train) == [("a", "b")] * 2


def test_one_bad_row_in_a_hundred_is_skipped_and_counted(tmp_path):
    found = OWN.load(tsv(tmp_path, [*TURNED, ("alone",)]))
    assert (found.skipped, len(found.train + found.val)) == (1, 100)


def test_lengths_are_counted_with_the_end_token():
    task = Pairs("text", "", (), {}, "", "", 3, {}, max_length=26)
    pairs = [("s" * 25, "t" * 3), ("s" * 26, "t" * 24), ("s", "{"), ("s", "{}"), ("s", "t" * 99)]
    examples = [Example(*pair, 0) for pair in pairs]
    dataset = SimpleNamespace(train=examples[:2], val=[], test=examples[2:])
    assert task.lengths(dataset, LETTERS) == {
        "max_new_tokens": 25, "cut_texts": 2, "altered_targets": 3}
    rows = task.encode(examples, LETTERS)
    assert [len(row.source) for row in rows[:2]] == [26, 26] and rows[-1].target == [116] * 25 + [1]
    dataset.train = [examples[-1]]  # is cut itself
    assert task.lengths(dataset, LETTERS)["max_new_tokens"] == 26
    dataset.train = [examples[2]]
    assert task.lengths(dataset, LETTERS)["max_new_tokens"] == 20


def test_the_defaults_fit_a_small_set_of_data():
    args = filled("--task text --data x", 1800, "own-data")
    assert (args.epochs, args.batch_size, args.steps, args.warmup_steps) == (3, 32, 171, 17)
    assert (args.max_length, args.lr) == (512, 3e-3) and filled("--task sst2").max_length is None


# ------------------------------------------------------------------------------------------- runs

def test_a_run_leaves_every_answer_its_loss_and_what_predicts_them(own, tmp_path, capsys):
    results, out = train.main(own(*LEARNS)), tmp_path / "run"
    rows = [json.loads(line) for line in (out / "answers.jsonl").read_text().splitlines()]
    assert [(row["source"], row["target"]) for row in rows] == DEV
    assert rows[:20] == results["answers"] == json.loads(
        (out / "results.json").read_text())["answers"]
    exact = sum(row["target"] == row["answer"] for row in rows) / len(rows)
    assert results["test"]["score"] == results["test"]["exact_match"] == 100 * exact > 0

    for row in rows[1:3]:
        capsys.readouterr()
        found = train.main(["--out", str(out), "--predict", row["source"]])
        assert found["text"] == row["answer"] and capsys.readouterr().out == row["answer"] + "\n"

    (model, tokenizer), losses = train.load(out), []  # of each label token, row by row
    for row in OWN.encode([Example(*pair, 0) for pair in DEV], tokenizer):
        source, target = torch.tensor([row.source]), torch.tensor(row.target)
        logits = model(source, source > 0, torch.tensor([[0, *row.target[:-1]]]))[0]
        losses += F.cross_entropy(logits, target, reduction="none").tolist()
    assert results["test"]["loss"] == pytest.approx(math.fsum(losses) / len(losses), rel=1e-5)
    assert results["val"]["loss"] == min(val["loss"] for val in logged(out, "val"))


def test_cut_texts_are_counted_and_reported(own, monkeypatch, capsys):
    batches = spy(monkeypatch, train, "loss_of")
    results, said = train.main(own("--max-length", 3, "--max-steps", 1)), capsys.readouterr().out
    sizes = [ids.size(1) for _, batch in batches for ids in (batch.source_ids, batch.labels)]
    assert len(batches) == 1 + 1 + 2 and set(sizes) == {3}, "a step, validation, test"
    count = results["config"]["cut_texts"]
    assert count > 0 and f"\n{count} texts are cut to 3 tokens\n" in said


def test_space_around_an_answer_does_not_count():
    examples = [Example("", target, 0) for target in ("a b", " c", "d", "E")]
    assert OWN.score([" a b\n", "c", "d d", "e"], examples, "paper") == {
        "exact_match": 50.0, "score": 50.0, "invalid": 0, "undefined": 0}


def test_the_epoch_with_the_least_loss_is_kept_whatever_its_score(own, monkeypatch):
    values = iter([(50.0, 3.0), (0.0, 2.0), (90.0, 2.5), (1.0, 1.0)])  # the last is the test
    spy(monkeypatch, train, "evaluate", lambda *_: dict(
        zip(("score", "loss"), next(values)), invalid=0, undefined=0))
    monkeypatch.setattr("run.settings.first_answers", lambda out: [])
    results = train.main(own("--epochs", 3))
    assert (results["best_epoch"], results["val"]["loss"]) == (2, 2.0)


@pytest.mark.slow
@pytest.mark.parametrize("more", [("--cache", 0), ("--cache", 1), ("--accumulate", 3)], ids=str)
def test_kept_states_and_passes_change_rounding_only(own, tmp_path, more):
    both = [train.main(own("--dropout", 0, "--epochs", 2, "--out", tmp_path / name, *options))
            for name, options in (("plain", ("--cache", 0)), ("other", more))]
    losses = [logged(tmp_path / name, "loss") for name in ("plain", "other")]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert both[1]["val"] == pytest.approx(both[0]["val"], rel=1e-5)


def evaluate_again(out, results, test):
    processes.start("cpu")
    args = SimpleNamespace(**results["config"])
    print(json.dumps(train.evaluate(*train.load(out), args, {"text": test}, out=out)))


@pytest.mark.slow
def test_two_processes_have_the_loss_and_the_answers_of_one(own, tmp_path, children):
    results, out = train.main(own(*LEARNS)), tmp_path / "run"
    answers = (out / "answers.jsonl").read_bytes()
    (out / "answers.jsonl").unlink()
    test = OWN.load(tmp_path / "own").test
    for said in together(tmp_path, evaluate_again, out, results, test):
        assert json.loads(said) == pytest.approx(results["test"], rel=1e-6)
    assert (out / "answers.jsonl").read_bytes() == answers


@pytest.mark.slow
@pytest.mark.parametrize("number", [7, 13])
def test_a_killed_run_goes_on_to_the_same_answers(own, tmp_path, children, number):
    """Killed in its second epoch, or when all answers are written and the results are not."""
    line = own("--epochs", 2, "--save-steps", 2, "--cache", 1)
    straight, killed = ([*line, "--out", str(tmp_path / name)] for name in ("straight", "killed"))
    assert run(train.main, straight, tmp_path / "straight") == 0
    out, line = tmp_path / "killed", [*killed, "--resume"]
    code = run(train.main, line, out, at=("os", "replace", number, signal.SIGKILL))
    assert code == -signal.SIGKILL and (out / "answers.jsonl").exists() == (number == 13)
    assert not (out / "results.json").exists() and run(train.main, line, out) == 0
    same(out, what_counts(tmp_path / "straight"))


def test_an_overwriting_run_removes_the_old_answers(own, tmp_path, monkeypatch, capsys):
    train.main(own("--max-steps", 1))
    spy(monkeypatch, train, "loss_of", interrupt_at(1))
    with pytest.raises(SystemExit):
        train.main(own("--overwrite"))
    assert not (tmp_path / "run" / "answers.jsonl").exists()


def test_two_seeds_have_a_line_in_the_table(own, capsys):
    results = train.main(own("--seeds", "0,1", "--max-steps", 1))
    assert results["tasks"]["text"]["seeds"] == [0, 1]
    assert "\n  own data " in capsys.readouterr().out


# -------------------------------------------------------------------------------------- bad input

@pytest.mark.parametrize("name, row, words", [
    ("train.tsv", "a\tb\tc", ("3 of the 2 columns",)),
    ("dev.tsv", "alone", ("1 of the 2 columns",)),
    ("dev.tsv", "a\t", ("an empty text",)), ("dev.tsv", " \tb", ("an empty text",)),
    ("dev.tsv", "caf\udce9\ta", ("not UTF-8",)), ("dev.jsonl", '{"prompt": "a"', ("no JSON",)),
    ("dev.jsonl", "[" * 10**5, ("no JSON",)),
    ("train.jsonl", '{"prompt": "a", "target": "b"}', ("1 of the 2 texts prompt and completion",)),
    ("dev.jsonl", '{"prompt": 1, "completion": null}', ("0 of the 2 texts",)),
    ("dev.jsonl", '["prompt", "completion"]', ("0 of the 2 texts",)),
    ("dev.jsonl", '{"prompt": "a", "completion": " "}', ("an empty text",)),
    ("dev.jsonl", r'{"prompt": "a", "completion": "\ud800"}', ("surrogates not allowed",)),
], ids=lambda value: str(value)[:30])
def test_a_malformed_row_is_refused_with_its_line(own, tmp_path, capsys, name, row, words):
    folder = (tsv if name.endswith("tsv") else jsonl)(tmp_path / "bad")
    lines = (folder / name).read_bytes().splitlines()
    lines[2] = row.encode("utf-8", "surrogateescape")
    put(folder, name, b"\n".join(lines))
    refused(capsys, own("--data", folder), str(folder / name), "line 3", *words)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("change, words", [
    (lambda folder: (folder / "dev.tsv").unlink(), "it holds train.tsv"),
    (lambda folder: jsonl(folder), "not both kinds; train.tsv and dev.tsv and train.jsonl"),
    (lambda folder: (folder / "dev.tsv").rename(folder / "dev.jsonl"), "dev.jsonl; not both"),
    (lambda folder: [path.unlink() for path in folder.iterdir()], "none of them"),
    (lambda folder: tsv(folder, train=TRAIN[:2]), "2 rows in train.tsv; 3"),
    (lambda folder: tsv(folder, dev=[]), "0 in dev.tsv; 1"),
])
def test_a_folder_without_what_a_run_needs_is_refused(own, tmp_path, capsys, change, words):
    change(tmp_path / "own")
    refused(capsys, own(), str(tmp_path / "own"), *words.split("; "))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("more, words", [
    ("--task text", "--task text needs --data DIR; train.jsonl and dev.jsonl"),
    ("--task text --data sample", "--data sample is for sst2"),
    ("--task text --data x --classify", "text; lack"),
    ("--task text --data x --method y-tuning", "text; lack"),
    ("--task text+vqa --data x", "text+vqa; pictures"),
    ("--task text --data x --prompts t5", "--prompts; means nothing; GLUE"),
    ("--task text --data x --clip nano", "--clip; means nothing; pictures"),
    ("--task sst2 --max-length 9", "--max-length; means nothing; --task text"),
    ("--task text --data x --max-length 0", "--max-length; '0'")])
def test_options_that_do_not_go_with_ones_own_data_are_refused(tmp_path, capsys, more, words):
    refused(capsys, ["--out", str(tmp_path / "run"), *more.split()], *words.split("; "))
    assert not (tmp_path / "run").exists()


def test_glue_is_without_ones_own_data():
    assert "text" not in runs_of("glue") and runs_of("text,rte") == ["text", "rte"]
