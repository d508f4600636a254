"""GLUE's files, prompts, splits (Sec. 4) and batches, on small files made here."""

import dataclasses
import functools
import hashlib
import threading
import zipfile
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch

import data
from data import TASKS, batches, banner, collate, encode, in_order, load, read_answer

PAIR = "index\tsentence1\tsentence2\tlabel"
MNLI = ("index\tpromptID\tpairID\tgenre\tsentence1_binary_parse\tsentence2_binary_parse\tsentence1_parse\tsentence2_parse\t"
        "sentence1\tsentence2")
STSB = "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2\tscore"
MRPC = "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String"


def write(folder, name, *lines, end="\n"):
    """folder/name with these lines; returns folder."""
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes("".join(line + end for line in lines).encode())
    return folder


def sst2(folder, train=20, dev=4):
    write(folder, "SST-2/train.tsv", "sentence\tlabel", *(f"train {i}\t{i % 2}" for i in range(train)))
    return write(folder, "SST-2/dev.tsv", "sentence\tlabel", *(f"dev {i}\t{i % 2}" for i in range(dev)))


def rte(folder, train=6, dev=5):
    write(folder, "RTE/train.tsv", PAIR, *(f"{i}\tA{i}\tB{i}\tentailment" for i in range(train)))
    return write(folder, "RTE/dev.tsv", PAIR, *(f"{i}\tC{i}\tD{i}\tnot_entailment" for i in range(dev)))


def only_row(folder, task, prompts):
    """The first training example of a task whose files are written by `files_of`."""
    return load(task, str(files_of(folder, task)), prompts).train[0]


def files_of(folder, task):
    rows = {  # header, training rows; validation has the same
        "cola": (None, "gj04\t0\t*\tThey drank the pub."),
        "sst2": ("sentence\tlabel", "a fine film \t1"),
        "qqp": ("id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate", "0\t1\t2\tWhy?\tWhy not?\t0"),
        "qnli": ("index\tquestion\tsentence\tlabel", "0\tWho?\tHe did.\tnot_entailment"),
        "rte": (PAIR, "0\tIt rains.\tWet.\tentailment"),
        "stsb": (STSB, "0\tg\tf\ty\to\ts\ts\tOne.\tTwo.\t3.750"),
    }
    if task == "mrpc":
        write(folder, "MRPC/mrpc_dev_ids.tsv", "3\t4", "5\t6")
        return write(folder, "MRPC/msr_paraphrase_train.txt", MRPC, "1\t1\t2\tA b.\tB a.", "0\t3\t4\tC.\tD.", "1\t4\t3\tE.\tF.",
                     "0\t5\t6\tG.\tH.", end="\r\n")
    if task == "mnli":
        row = "0\t1\t1n\tfiction" + "\t()" * 4 + "\tHe ran.\tHe moved."
        write(folder, "MNLI/train.tsv", MNLI + "\tlabel1\tgold_label", *[row + "\tneutral\tneutral"] * 3)
        for name in ("dev_matched.tsv", "dev_mismatched.tsv"):
            write(folder, f"MNLI/{name}", MNLI + "".join(f"\tlabel{i}" for i in range(1, 6)) + "\tgold_label",
                  *[row.replace("He ran.", name) + "\tneutral" * 5 + "\tcontradiction"] * 2, row + "\tneutral" * 5 + "\t-")
        return folder
    header, row = rows[task]
    for name in ("train.tsv", "dev.tsv"):
        write(folder, f"{TASKS[task].folder}/{name}", *([header] if header else []), *[row] * 3)
    return folder


# ------------------------------------------------------------------------------------------------- prompts and targets

@pytest.mark.parametrize("task, paper, t5", [
    ("cola", ("cola sentence: They drank the pub.", "0", 0), ("cola sentence: They drank the pub.", "unacceptable", 0)),
    ("sst2", ("sst2 sentence: a fine film ", "1", 1), ("sst2 sentence: a fine film ", "positive", 1)),
    ("mrpc", ("mrpc sentence1: A b. sentence2: B a.", "1", 1), ("mrpc sentence1: A b. sentence2: B a.", "equivalent", 1)),
    ("qqp", ("qqp question1: Why? question2: Why not?", "0", 0), ("qqp question1: Why? question2: Why not?", "not_duplicate", 0)),
    ("mnli", ("mnli premise: He ran. hypothesis He moved.", "1", 1), ("mnli hypothesis: He moved. premise: He ran.", "neutral", 1)),
    ("qnli", ("qnli question: Who? sentence: He did.", "1", 1), ("qnli question: Who? sentence: He did.", "not_entailment", 1)),
    ("rte", ("rte sentence1: It rains. sentence2: Wet.", "0", 0), ("rte sentence1: It rains. sentence2: Wet.", "entailment", 0)),
    ("stsb", ("stsb sentence1: One. sentence2: Two.", "3.8", 3.75), ("stsb sentence1: One. sentence2: Two.", "3.8", 3.75)),
])
def test_every_task_has_the_paper_and_the_t5_prompt(tmp_path, task, paper, t5):
    assert only_row(tmp_path, task, "paper") == paper
    assert only_row(tmp_path, task, "t5") == t5


@pytest.mark.parametrize("score, paper, t5", [
    ("5.000", "5.0", "5.0"), ("0.500", "0.5", "0.4"), ("2.917", "2.9", "3.0"), ("3.100", "3.1", "3.2")])
def test_stsb_is_rounded_to_a_tenth_by_the_paper_and_to_a_fifth_by_t5(tmp_path, score, paper, t5):
    for name in ("train.tsv", "dev.tsv"):
        write(tmp_path, f"STS-B/{name}", STSB, *[f"0\tg\tf\ty\to\ts\ts\tA\tB\t{score}"] * 2)
    assert [load("stsb", str(tmp_path), prompts).train[0].target for prompts in ("paper", "t5")] == [paper, t5]


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("prompts", ["paper", "t5"])
def test_read_answer_is_the_inverse_of_the_target(tmp_path, task, prompts):
    example = only_row(tmp_path, task, prompts)
    assert read_answer(task, f" {example.target} ", prompts) == (3.8 if task == "stsb" else example.label)


def test_a_users_own_text_gets_the_same_prompt():
    assert data.prompt("sst2", "so | so", "paper") == "sst2 sentence: so | so"
    assert data.prompt("mnli", "He ran. | He moved.", "paper") == "mnli premise: He ran. hypothesis He moved."
    assert data.prompt("mnli", "He ran.\tHe moved.", "t5") == "mnli hypothesis: He moved. premise: He ran."
    with pytest.raises(ValueError, match="rte reads sentence1 and sentence2, 'It rains.' has 1 of 2 parts; write them as 'A | B'"):
        data.prompt("rte", "It rains.", "paper")


def test_an_answer_of_another_kind_is_invalid():
    assert read_answer("sst2", "positive", "paper") is None and read_answer("sst2", "1", "t5") is None
    assert read_answer("sst2", "2", "paper") is None and read_answer("mnli", "2", "paper") == 2
    assert [read_answer("stsb", text, "paper") for text in ("", "nan", "inf", "1e9", "3.8.", "three")] == [None] * 6
    assert read_answer("stsb", "5", "paper") == 5.0


# ---------------------------------------------------------------------------------------------------------------- rows

def test_quotes_are_data(tmp_path):
    sst2(tmp_path)
    write(tmp_path, "SST-2/dev.tsv", "sentence\tlabel", '"an opening quote\t1', 'a "quoted" word\t0')
    assert [e.source for e in load("sst2", str(tmp_path)).test] == ['sst2 sentence: "an opening quote', 'sst2 sentence: a "quoted" word']


def test_only_a_newline_ends_a_row(tmp_path):
    sst2(tmp_path)
    write(tmp_path, "SST-2/dev.tsv", "sentence\tlabel", "next\x85line\u2028sep\x0b\x1c\t1", "b\t0")
    assert [e.source for e in load("sst2", str(tmp_path)).test] == ["sst2 sentence: next\x85line\u2028sep\x0b\x1c", "sst2 sentence: b"]


def test_byte_order_mark_and_windows_line_ends_do_not_matter(tmp_path):
    plain = sst2(tmp_path / "plain")
    (tmp_path / "other" / "SST-2").mkdir(parents=True)
    for name in ("SST-2/train.tsv", "SST-2/dev.tsv"):
        (tmp_path / "other" / name).write_bytes(b"\xef\xbb\xbf" + (plain / name).read_bytes().replace(b"\n", b"\r\n"))
    a, b = load("sst2", str(plain)), load("sst2", str(tmp_path / "other"))
    assert (a.train, a.val, a.test) == (b.train, b.val, b.test) and a.sha256 != b.sha256


def test_bytes_that_are_not_utf8_are_named_by_line(tmp_path):
    (sst2(tmp_path) / "SST-2/dev.tsv").write_bytes(b"sentence\tlabel\nfine\t1\ncaf\xe9\t1\n")
    with pytest.raises(ValueError, match=r"dev.tsv, line 3: byte 0xe9 is not UTF-8"):
        load("sst2", str(tmp_path))


def test_a_wrong_header_is_a_wrong_file(tmp_path):
    write(rte(tmp_path), "RTE/dev.tsv", "sentence\tlabel", "a\t1", "b\t0")
    with pytest.raises(ValueError, match=r"dev.tsv, line 1: .*sentence1, sentence2, label is expected.*'sentence \| label'"):
        load("rte", str(tmp_path))


def test_one_percent_of_malformed_rows_is_skipped_and_counted(tmp_path):
    sst2(tmp_path, train=197)
    with open(tmp_path / "SST-2/train.tsv", "a") as file:
        file.write("no label\nanother\t7\n")  # 2 of 199
    with pytest.raises(ValueError) as caught:
        load("sst2", str(tmp_path))
    assert "train.tsv: 2 of 199 rows" in str(caught.value) and "\n" not in str(caught.value)
    assert "line 199: 1 column instead of 2; line 200: label '7' instead of 0 or 1" in str(caught.value)
    with open(tmp_path / "SST-2/train.tsv", "a") as file:
        file.write("good\t1\n")  # 2 of 200
    dataset = load("sst2", str(tmp_path))
    assert dataset.skipped == 2 and len(dataset.train) + len(dataset.val) == 198


def test_a_score_outside_zero_to_five_is_malformed(tmp_path):
    write(files_of(tmp_path, "stsb"), "STS-B/dev.tsv", STSB,
          *[f"0\tg\tf\ty\to\ts\ts\tA\tB\t{score}" for score in ("1.0", "0", "5.1", "nan")])
    with pytest.raises(ValueError, match="2 of 4 rows.*line 4: label '5.1' instead of a number from 0 to 5; line 5: label 'nan'"):
        load("stsb", str(tmp_path))


def test_rows_without_a_gold_label_are_skipped(tmp_path):
    dataset = load("mnli", str(files_of(tmp_path, "mnli")))
    assert dataset.skipped == 2 and len(dataset.test) == len(dataset.val) == 2


def test_a_missing_file_is_named_with_its_place(tmp_path):
    (rte(tmp_path) / "RTE/dev.tsv").unlink()
    with pytest.raises(ValueError, match=r"RTE/dev.tsv is missing; rte needs RTE/train.tsv and RTE/dev.tsv in"):
        load("rte", str(tmp_path))
    (files_of(tmp_path, "mnli") / "MNLI/dev_mismatched.tsv").unlink()
    with pytest.raises(ValueError, match=r"MNLI/dev_mismatched.tsv is missing"):
        load("mnli", str(tmp_path))


def test_an_empty_file_is_said(tmp_path):
    write(rte(tmp_path), "RTE/train.tsv")
    with pytest.raises(ValueError, match="0 training rows"):
        load("rte", str(tmp_path))


@pytest.mark.parametrize("arguments, choices", [
    (("wnli",), "cola, sst2"), (("rte", None, "mine"), "paper or t5"), (("rte", "sample"), "sst2 only")])
def test_a_wrong_choice_names_the_valid_ones(arguments, choices):
    with pytest.raises(ValueError, match=choices):
        load(*arguments)


# --------------------------------------------------------------------------------------------------------------- split

def test_a_small_task_halves_its_validation_set(tmp_path):
    dataset = load("rte", str(rte(tmp_path, dev=277)))
    assert (len(dataset.train), len(dataset.val), len(dataset.test)) == (6, 138, 139)
    order = torch.randperm(277, generator=torch.Generator().manual_seed(42)).tolist()
    assert [e.source for e in dataset.val + dataset.test] == [f"rte sentence1: C{i} sentence2: D{i}" for i in order]
    assert [e.source for e in dataset.train] == [f"rte sentence1: A{i} sentence2: B{i}" for i in range(6)]  # untouched


def test_a_large_task_takes_a_thousand_training_rows_for_validation(tmp_path):
    dataset = load("sst2", str(sst2(tmp_path, train=12_000)))
    assert (len(dataset.train), len(dataset.val), len(dataset.test)) == (11_000, 1000, 4)
    order = torch.randperm(12_000, generator=torch.Generator().manual_seed(42)).tolist()
    assert [e.source for e in dataset.val + dataset.train] == [f"sst2 sentence: train {i}" for i in order]
    assert dataset.name == "glue" and dataset.fallback is None


def test_mnli_validates_on_mismatched_and_tests_on_matched(tmp_path):
    dataset = load("mnli", str(files_of(tmp_path, "mnli")))
    assert "dev_mismatched.tsv" in dataset.val[0].source and "dev_matched.tsv" in dataset.test[0].source and len(dataset.train) == 3


def test_mrpc_is_divided_by_glues_list_of_ids(tmp_path):
    dataset = load("mrpc", str(files_of(tmp_path, "mrpc")))
    assert [e.source for e in dataset.train] == ["mrpc sentence1: A b. sentence2: B a.", "mrpc sentence1: E. sentence2: F."]
    assert sorted(e.source for e in dataset.val + dataset.test) == ["mrpc sentence1: C. sentence2: D.", "mrpc sentence1: G. sentence2: H."]


def test_mrpc_may_be_divided_already(tmp_path):
    lines = {"train.tsv": ["1\t1\t2\tA\tB", "0\t1\t3\tC\tD"], "dev.tsv": ["1\t4\t5\tE\tF", "0\t6\t7\tG\tH"]}
    for name, rows in lines.items():
        write(tmp_path, f"MRPC/{name}", MRPC, *rows)
    dataset = load("mrpc", str(tmp_path))
    assert (len(dataset.train), len(dataset.val), len(dataset.test)) == (2, 1, 1)


def test_the_sample_gives_a_tenth_of_train_for_validation(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "SAMPLE", sst2(tmp_path, train=12_000))
    dataset = load("sst2", "sample")
    assert (len(dataset.train), len(dataset.val)) == (10_800, 1200)
    assert dataset.name == "bundled-sample" and dataset.fallback is None


def test_small_tasks_have_twenty_epochs_and_large_ones_ten():
    assert {name for name, task in TASKS.items() if task.epochs == 20} == {"cola", "rte", "mrpc", "stsb"}
    assert {task.epochs for task in TASKS.values()} == {10, 20}


# ------------------------------------------------------------------------------------------------------------ download

@pytest.fixture
def mirror(tmp_path, monkeypatch):
    """A local stand-in for GLUE's server (its files are put into .folder), an empty home and a bundled sample."""
    folder = tmp_path / "server" / "glue" / "data"
    folder.mkdir(parents=True)

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(tmp_path / "server")))
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    server.folder = folder
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("GLUE_BASE_URL", f"http://127.0.0.1:{server.server_port}/glue/data")
    monkeypatch.setattr(data, "SAMPLE", sst2(tmp_path / "sample"))
    yield server
    server.shutdown()
    server.server_close()


def trust(monkeypatch, task, *paths):
    """Lets the hashes of these files be the expected ones."""
    hashes = [hashlib.sha256(path.read_bytes()).hexdigest() for path in paths]
    monkeypatch.setitem(TASKS, task, dataclasses.replace(TASKS[task], downloads=dict(zip(TASKS[task].downloads, hashes, strict=True))))


def pack(path, folder, members):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as packed:
        for member in members:
            packed.write(folder / member, member)
        packed.writestr("../outside.txt", "x")
        packed.writestr("SST-2/original/datasetSentences.txt", "x")
    return path


def test_a_download_takes_only_the_expected_members(mirror, tmp_path, monkeypatch):
    archive = pack(mirror.folder / "SST-2.zip", sst2(tmp_path / "made"), ["SST-2/train.tsv", "SST-2/dev.tsv"])
    trust(monkeypatch, "sst2", archive)
    dataset = load("sst2")
    assert dataset.name == "glue" and dataset.fallback is None and len(dataset.test) == 4
    home = tmp_path / "home"
    arrived = sorted(p.relative_to(home).as_posix() for p in home.rglob("*") if p.is_file() and p.name != ".lock")
    assert arrived == [f".cache/ladder-side-tuning/glue/SST-2/{name}.tsv" for name in ("dev", "train")]
    archive.unlink()
    assert load("sst2").name == "glue"  # the second time without network


def test_runs_that_start_together_all_get_the_download(mirror, tmp_path, monkeypatch):
    trust(monkeypatch, "sst2", pack(mirror.folder / "SST-2.zip", sst2(tmp_path / "made"), ["SST-2/train.tsv", "SST-2/dev.tsv"]))
    names = []
    runs = [threading.Thread(target=lambda: names.append(load("sst2").name)) for _ in range(4)]
    for run in runs:
        run.start()
    for run in runs:
        run.join()
    assert names == ["glue"] * 4


def test_mrpc_is_fetched_from_its_two_places(mirror, tmp_path, monkeypatch):
    made = files_of(tmp_path / "made", "mrpc") / "MRPC"
    text = tmp_path / "server/senteval/senteval_data/msr_paraphrase_train.txt"
    text.parent.mkdir(parents=True)
    (made / "msr_paraphrase_train.txt").rename(text)
    ids = (made / "mrpc_dev_ids.tsv").rename(mirror.folder / "mrpc_dev_ids.tsv")
    trust(monkeypatch, "mrpc", text, ids)
    assert len(load("mrpc").train) == 2


def test_sst2_with_a_wrong_hash_falls_back_to_the_sample_and_says_why(mirror, tmp_path):
    pack(mirror.folder / "SST-2.zip", sst2(tmp_path / "made"), ["SST-2/train.tsv", "SST-2/dev.tsv"])
    dataset = load("sst2")
    assert dataset.name == "bundled-sample" and "SST-2.zip has sha256" in dataset.fallback
    assert [p.name for p in (tmp_path / "home").rglob("*") if p.is_file()] == [".lock"]


@pytest.mark.parametrize("broken", ["not there", "not a zip", "member missing", "too big", "malformed"])
def test_any_failure_with_sst2_falls_back_to_the_sample(mirror, tmp_path, monkeypatch, broken):
    archive = mirror.folder / "SST-2.zip"
    if broken == "malformed":
        write(sst2(tmp_path / "made"), "SST-2/dev.tsv", "sentence\tlabel", "a", "b")
    if broken != "not there":
        pack(archive, sst2(tmp_path / "made") if broken != "malformed" else tmp_path / "made",
             ["SST-2/train.tsv", "SST-2/dev.tsv"][:1 if broken == "member missing" else 2])
        if broken == "not a zip":
            archive.write_bytes(b"no zip at all")
        trust(monkeypatch, "sst2", archive)
    if broken == "too big":
        monkeypatch.setattr(data, "UNPACKED_LIMIT", 10)
    dataset = load("sst2")
    assert dataset.name == "bundled-sample" and "\n" not in dataset.fallback
    assert {"not there": "404", "not a zip": "damaged", "member missing": "no SST-2/dev.tsv", "too big": "10 are allowed",
            "malformed": "2 of 2 rows"}[broken] in dataset.fallback


def test_another_task_stops_with_the_place_for_its_files(mirror):
    with pytest.raises(ValueError, match=r"RTE.zip is not there.*put RTE/train.tsv and RTE/dev.tsv into .*glue.*--data DIR") as caught:
        load("rte")
    assert "\n" not in str(caught.value)


def test_a_folder_that_is_given_is_never_replaced_by_the_sample(mirror, tmp_path):
    with pytest.raises(ValueError, match="SST-2/train.tsv is missing"):
        load("sst2", str(tmp_path / "nowhere"))


def test_the_banner_is_a_box_with_the_reason():
    lines = banner("the server at https://example.org/" + "long/" * 40 + " does not answer").split("\n")
    assert {len(line) for line in lines} == {98} and len(lines) > 8 and all(line[0] == line[-1] == "#" for line in lines)
    assert "NOT SST-2" in lines[2] and "does not answer" in "\n".join(lines)


# ------------------------------------------------------------------------------------------------------------- batches

class Words:
    """A tokenizer: a word is its length."""

    def encode(self, text):
        return [len(word) for word in text.split()]


def lengths(*sizes):
    return [data.Row([9] * n, [5, 1]) for n in sizes]


def test_a_long_source_is_cut_to_128_with_the_end_token():
    example = data.Example("word " * 200, "1", 1)
    assert encode([example], Words()) == [data.Row([4] * 127 + [1], [1, 1])]
    assert encode([data.Example("a bb", "ccc", 0)], Words(), max_source=3) == [data.Row([1, 2, 1], [3, 1])]


def test_batches_are_a_pure_function_of_seed_and_epoch():
    encoded = lengths(*(i * 7 % 50 + 1 for i in range(1000)))
    before = torch.get_rng_state()
    first = batches(encoded, 8, seed=3, epoch=2)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(999)
    assert batches(encoded, 8, seed=3, epoch=2) == first
    assert batches(encoded, 8, seed=3, epoch=1) != first != batches(encoded, 8, seed=2, epoch=2)


def test_an_epoch_shows_every_row_once():
    chosen = batches(lengths(*range(1, 104)), 10, seed=0, epoch=0)
    assert sorted(i for batch in chosen for i in batch) == list(range(103))
    assert sorted(len(batch) for batch in chosen) == [3] + [10] * 10


def test_a_batch_has_rows_of_similar_length_in_an_order_that_is_random():
    encoded = lengths(*(i * 37 % 100 + 1 for i in range(2000)))
    chosen = batches(encoded, 10, seed=0, epoch=0)
    spread = [max(n) - min(n) for n in ([len(encoded[i][0]) for i in batch] for batch in chosen)]
    assert sum(spread) / len(spread) < 10  # about 82 for random batches
    first = [len(encoded[batch[0]][0]) for batch in chosen]
    assert first != sorted(first)


def test_evaluation_goes_from_short_to_long():
    assert in_order(lengths(5, 2, 9, 2, 1), 2) == [[4, 1], [3, 0], [2]]


def test_collate_pads_to_the_longest_and_shifts_the_labels_right():
    batch = collate([data.Row([7, 8, 1], [5, 1]), data.Row([9, 1], [5, 6, 1])])
    assert batch.source_ids.tolist() == [[7, 8, 1], [9, 1, 0]]
    assert batch.source_mask.tolist() == [[True, True, True], [True, True, False]]
    assert batch.decoder_ids.tolist() == [[0, 5, 0], [0, 5, 6]]
    assert batch.decoder_mask.tolist() == [[True, True, False], [True, True, True]]
    assert batch.labels.tolist() == [[5, 1, -100], [5, 6, 1]]
    assert [t.dtype for t in batch[:5]] == [torch.long, torch.bool, torch.long, torch.bool, torch.long]
    assert batch.weights is batch.images is None  # texts alone count alike and have no pictures
