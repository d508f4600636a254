"""What a run prints fits the terminal, and it ends in one line with the right exit code."""
import io
import os
import signal
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from run import report


def test_on_a_terminal_progress_rewrites_one_line_of_80_columns(monkeypatch):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stdout", terminal)
    progress = report.Progress("step", 8)
    for done in range(1, 9):
        progress.step(done, "epoch 1  loss 0.2756  607 examples/s  peak 697 MiB" + "x" * (done < 8))
    first, *updates = terminal.getvalue().split("\r")
    assert not first and {len(line) for line in updates[:-1]} == {79}
    assert updates[-1].startswith("step 8/8  epoch 1  loss") and updates[-1].count("\n") == 1
    assert "0:00 left" in updates[-1]


def test_elsewhere_progress_is_a_line_for_each_tenth(capsys):
    progress = report.Progress("step", 1000, begin=250)
    for done in range(251, 1001):
        progress.step(done)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in lines] == [f"step {n}/1000" for n in [
        251, *range(300, 1001, 100)]]


def test_scores_are_in_percent_with_what_went_wrong():
    values = {"accuracy": 81.25, "f1": 70.0, "score": 75.625, "invalid": 0, "undefined": 0}
    assert report.scores(values) == "accuracy 81.25, f1 70.00, score 75.62"
    values = {"matthews": 0.0, "score": 0.0, "invalid": 3, "undefined": 1}
    assert report.scores(values) == (
        "matthews 0.00, 3 invalid answers, correlation undefined, taken as 0")


def test_gates_are_drawn_one_line_per_rung(capsys):
    def stack(*keep):
        rungs = nn.ModuleList(nn.Module() for _ in keep)
        for i, rung in zip(keep, rungs):
            rung.mu = torch.tensor([0.5 + i / 10])
        rungs.keep = keep
        return rungs

    values = report.gates(nn.ModuleDict({"encoder": stack(0, 2), "decoder": stack(1)}))
    assert values == {"encoder": pytest.approx([0.5, 0.7]), "decoder": pytest.approx([0.6])}
    _, *lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:3] for line in lines] == [
        ["encoder", "layer", "0"], ["encoder", "layer", "2"], ["decoder", "layer", "1"]]
    assert [line.split()[-1] for line in lines] == ["0.50", "0.70", "0.60"]
    assert [line.count("█") for line in lines] == [15, 21, 18]
    assert all(line.count("█") + line.count("░") == 30 and len(line) < 80 for line in lines)


def test_each_run_has_its_own_peak():
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("this system does not let a process begin a new peak")
    torch.ones(30 * 2**20)  # 120 MiB, written and freed
    high, _ = report.peak_memory("cpu")
    report.reset_peak("cpu")
    assert report.peak_memory("cpu")[0] < high - 60 * 2**20


@pytest.mark.parametrize("error, code, words", [
    (ValueError("no such\nfile"), 2, "error: no such file"),
    (FileNotFoundError(2, "No such file", "a"), 2, "error: [Errno 2] No such file: 'a'"),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried\nto"), 2, "--batch-size"),
    (torch.OutOfMemoryError("CUDA out of memory"), 2, "--accumulate"), (MemoryError(), 2, "memory"),
    (FloatingPointError("step 4 has loss nan"), 1, "error: step 4 has loss nan"),
    (KeyboardInterrupt(), 130, "interrupted"), (KeyboardInterrupt(15), 143, "interrupted"),
], ids=lambda part: type(part).__name__)
def test_what_the_user_can_mend_is_one_line(capsys, error, code, words):
    def run():
        raise error

    with pytest.raises(SystemExit) as stop:
        report.exit_cleanly(run)
    line = capsys.readouterr().err
    assert stop.value.code == code and words in line and line.count("\n") == 1


def test_another_error_keeps_its_traceback():
    def run():
        raise RuntimeError("a fault of ours")

    with pytest.raises(RuntimeError, match="a fault of ours"):
        report.exit_cleanly(run)


def test_the_first_signal_is_collected_and_the_second_interrupts_at_once():
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]

    def run():
        with report.stop_signals() as received:
            os.kill(os.getpid(), signal.SIGTERM)
            assert received == [signal.SIGTERM]
            os.kill(os.getpid(), signal.SIGTERM)
            raise AssertionError("the second did not interrupt")

    with pytest.raises(SystemExit) as stop:
        report.exit_cleanly(run)
    assert stop.value.code == 143
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_a_signal_that_a_background_job_ignores_stays_ignored():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    with report.stop_signals() as received:
        os.kill(os.getpid(), signal.SIGINT)
    assert received == [] and signal.signal(signal.SIGINT, before) is signal.SIG_IGN


def test_a_closed_stdout_stops_nothing(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    report.Progress("step", 2).step(2)
    report.print0("seen by nobody")
