"""--cache: hidden states are kept from epoch to epoch, and nothing else changes."""
import argparse
import resource
import shutil
import signal

import pytest
import torch

import train
from data import Row, collate
from model import T5, T5Config
from run import report
from run.cache import States, kept_states
from run.settings import cache_size
from run.tasks import distinct
from side import LadderT5
from test_folder import run, said, what_counts
from vision.tasks import Question
from workshop import WIDTHS, logged, refused, write

ROWS = [Row([9, 8, 7, 6, 5, 1], [10, 1]), Row([5, 6, 1], [11, 12, 1]), Row([5, 6, 1], [13, 1]),
        Row([5, 6, 1], [13, 1]), Row([7, 1], [10, 1])]  # one is there twice


def ladder(keep=None, dtype=torch.float32):
    torch.manual_seed(0)
    t5 = T5(T5Config(vocab_size=50, num_decoder_layers=3, **WIDTHS)).to(dtype)
    return LadderT5(t5, 4, keep)


def states(net, rows):
    """What the rungs read, 0 on padding."""
    batch, stacks = collate(rows)[:4], (net.encoder, net.decoder)
    return [hidden[level] * mask[..., None]
            for stack, hidden, mask in zip(stacks, net.hidden_states(*batch), batch[1::2])
            for level in (0, *(i + 1 for i in stack.keep))]


def keeping(net, out, rows, answered={}):
    return kept_states(net, States(net, distinct(rows, answered), 1.0, out))


@pytest.mark.parametrize("keep", [None, [1]], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_states_are_what_the_backbone_computes_and_take_what_the_formula_says(
        tmp_path, dtype, keep):
    net = ladder(keep, dtype)
    computed = states(net, ROWS)
    with keeping(net, tmp_path, {"sst2": ROWS}) as kept:
        assert not list(tmp_path.iterdir()), "the file has a name"
        net.backbone.encode = None  # nothing passes the backbone
        torch.testing.assert_close(states(net, ROWS), computed)
        del net.backbone.encode
    torch.testing.assert_close(states(net, ROWS), computed, rtol=0, atol=0)
    sources, targets = 6 + 3 + 2, 2 + 3 + 2 + 2  # tokens; a source with two targets is there once
    numbers = 32 * (len(net.encoder.keep) * sources + len(net.decoder.keep) * targets)
    assert (kept["rows"], kept["bytes"]) == (4, numbers * dtype.itemsize)


def test_whatever_answer_is_drawn_is_there(tmp_path):
    net, answers = ladder(), (([10, 1], 1.0), ([11, 12, 1], 0.6))
    asked = {"vqa": [Question([9, 8, 1], answers, ("a",)), Question([7, 1], (), ("b",)),
                     Question([9, 8, 1], answers[:1], ("c",))]}
    rows = distinct(asked, {})
    assert rows == [Row([7, 1], [1]), Row([9, 8, 1], [10, 1]), Row([9, 8, 1], [11, 12, 1])]
    with keeping(net, tmp_path, asked):
        net.backbone.encode = None
        states(net, rows)


def test_answers_come_from_kept_states_and_are_the_same(tmp_path):
    net, batch = ladder().eval(), collate(ROWS)[:2]
    computed = net.generate(*batch, max_new_tokens=5)
    with keeping(net, tmp_path, {}, answered={"sst2": ROWS}):
        net.backbone.encoder.forward = None  # nothing passes it
        assert torch.equal(net.generate(*batch, max_new_tokens=5), computed)
        del net.backbone.encoder.forward
    with pytest.raises(FloatingPointError), keeping(net, tmp_path, {}, answered={"sst2": ROWS}):
        raise FloatingPointError
    assert not {"hidden_states", "encode"} & {*vars(net), *vars(net.backbone)}


@pytest.mark.slow
def test_the_seeds_of_a_command_share_one_file(argv, monkeypatch):
    began, begin = [], States.__init__
    monkeypatch.setattr(States, "__init__", lambda *a: [began.append(a), begin(*a)] and None)
    free = iter((4_000_000, 8_000_000))  # asked once for each task
    monkeypatch.setattr(report, "free_memory", lambda: next(free))
    results = train.main(argv("--task", "sst2,cola", "--seeds", "0,1", "--epochs", 2))
    assert len(began) == 2  # one for each task
    assert [run["config"]["cache"] for run in results["runs"]] == [0.001, 0.001, 0.002, 0.002]


def test_a_full_disk_is_one_line_and_the_backbone_runs_as_before(tmp_path, capsys):
    net, (soft, hard) = ladder(), resource.getrlimit(resource.RLIMIT_FSIZE)
    computed = states(net, ROWS)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))  # bytes of a file
    try:
        with keeping(net, tmp_path, {"sst2": ROWS}) as kept:
            torch.testing.assert_close(states(net, ROWS), computed, rtol=0, atol=0)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert capsys.readouterr().out.count("no room") == 1
    assert (kept["rows"], kept["bytes"]) == (0, 0)


@pytest.mark.parametrize("more", [(), ("--keep", 1, "--accumulate", 2), ("--dtype", "bf16")],
                         ids=lambda more: " ".join(map(str, more[:2])))
def test_losses_and_scores_are_those_of_a_run_that_keeps_nothing(
        argv, tmp_path, monkeypatch, more):
    monkeypatch.setattr(States, "tokens", 64)
    usual, found = ("--epochs", 2, "--dropout", 0, "--max-train-rows", 96, *more), []
    for size in (0, 0.00001, 1):  # nothing, the shorter rows, all
        results = train.main(argv(*usual, "--cache", size, "--out", tmp_path / str(size)))
        found.append((results["cache"], logged(tmp_path / str(size), "loss"), results["test"]))
    (none, straight, scores), (some, *partly), (everything, *wholly) = found
    assert none is None and 0 < some["rows"] < everything["rows"]
    for losses, test in (partly, wholly):
        assert losses == pytest.approx(straight, abs=1e-2 if "bf16" in more else 1e-5)
        assert test == scores


@pytest.mark.slow
@pytest.mark.parametrize("at", [("run.cache", "collate", 1), ("train", "collate", 3),
                                ("train", "collate", 10)], ids="{0[0]} {0[2]}".format)
def test_killed_while_it_fills_or_later_it_goes_on_to_the_same_end(argv, tmp_path, children, at):
    command = argv("--epochs", 2, "--max-train-rows", 96, "--save-steps", 1, "--cache", 1)
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    assert run(train.main, [*command, "--out", str(straight)], straight) == 0, said(straight)
    command += ["--out", str(killed)]
    assert run(train.main, command, killed, at=(*at, signal.SIGKILL)) == -signal.SIGKILL
    assert run(train.main, [*command, "--resume"], killed) == 0, said(killed)
    assert what_counts(killed) == what_counts(straight)


def test_by_default_it_takes_a_quarter_of_the_free_memory_and_a_resume_as_much(
        tmp_path, monkeypatch):
    monkeypatch.setattr(report, "free_memory", lambda: 8_000_000)

    def size(**changed):
        usual = dict(method="lst", side="ladder", classify=False, task="sst2", cache=None,
                     resume=False, epochs=2, device="cpu")
        return cache_size(argparse.Namespace(**usual | changed), tmp_path, {})

    assert size() == 0.002 and size(cache=3.0, epochs=1) == 3.0
    assert size(side="last") == size(classify=True) == 0
    assert size(epochs=1) == size(device="cuda") == size(method="lora") == size(cache=0.0) == 0
    write(tmp_path / "config.json", '{"cache": 0.5}')
    assert size(resume=True) == 0.5 and size() == 0.002
    monkeypatch.setattr(shutil, "disk_usage", lambda path: argparse.Namespace(free=4_000_000))
    assert size() == 0.001


def test_what_means_nothing_is_refused(argv, capsys):
    refused(capsys, argv("--cache", "1", "--method", "lora"), "--cache", "--method lst")
    refused(capsys, argv("--cache", "1", "--side", "alone"), "--cache", "--side alone")
    for wrong in ("-1", "nan", "inf"):
        refused(capsys, argv("--cache", wrong), "--cache is", "from 0")
