"""Two real processes (gloo, on the CPU) compute what one computes."""
import argparse
import json
import multiprocessing
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import data
import train
from model import load_t5
from run import processes, report
from side import LadderT5
from workshop import ROOT, logged, set_config

pytestmark = pytest.mark.usefixtures("children")
slow = pytest.mark.slow


def join(rank, port, said, function, arguments):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2",
                      MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    sys.stdout = sys.stderr = open(f"{said}-{rank}", "w")
    function(*arguments)
    sys.stdout.flush()


def together(tmp_path, function, *arguments, code=0):
    """Call it in two processes, as torchrun starts them; what each of them printed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    said, context = tmp_path / "said", multiprocessing.get_context("forkserver")
    children = [context.Process(target=join, args=(rank, port, said, function, arguments))
                for rank in (0, 1)]
    for child in children:
        child.start()
    for child in children:
        child.join(120)
    texts = [Path(f"{said}-{rank}").read_text() for rank in (0, 1)]
    assert [child.exitcode for child in children] == [code, code], texts
    return texts


@pytest.fixture(scope="module")
def quiet(backbone, tmp_path_factory):  # without dropout
    folder = shutil.copytree(backbone, tmp_path_factory.mktemp("quiet") / "backbone")
    set_config(folder, dropout_rate=0.0)
    return folder


def weights(folder):
    return load_file(folder / "trained.safetensors")


# 33 rows in batches of 16: the last has one row, so that processes and passes are left without any
@slow
@pytest.mark.parametrize("more", [
    ("--accumulate", 2), ("--method", "lora", "--lr", "1e-2"),
    ("--init", "fisher", "--fisher-samples", 4, "--checkpoint")], ids=lambda more: more[0])
def test_two_processes_have_the_losses_weights_and_scores_of_one(argv, quiet, tmp_path, more):
    same = ("--model", quiet, "--max-train-rows", 33, "--epochs", 3, *more)
    one = train.main(argv(*same, "--out", tmp_path / "one"))
    first, second = together(tmp_path, train.main, argv(*same, "--out", tmp_path / "two"))
    assert "2 processes" in first and second == "", "only the first process prints"
    two = json.loads((tmp_path / "two" / "results.json").read_text())
    losses = [logged(tmp_path / name, "loss") for name in ("one", "two")]
    assert losses[1] == pytest.approx(losses[0], abs=1e-5)
    assert (two["val"], two["test"]) == (one["val"], one["test"])
    assert two["steps"] == one["steps"] == 9
    ours, theirs = weights(tmp_path / "one"), weights(tmp_path / "two")
    apart = torch.cat([(ours[name] - theirs[name]).abs().flatten() for name in ours])
    # Adam turns the sign of a gradient near 0 into a whole step: single weights may differ
    assert apart.mean() < 1e-3


@pytest.mark.parametrize("passes", [
    pytest.param(2, marks=slow), 5, pytest.param(16, marks=slow)])
def test_accumulated_passes_have_the_losses_of_one(argv, quiet, tmp_path, passes):
    for name, more in (("one", ()), ("many", ("--accumulate", passes))):
        train.main(argv("--model", quiet, "--max-train-rows", 33, *more, "--out", tmp_path / name))
    losses = [logged(tmp_path / name, "loss") for name in ("one", "many")]
    assert losses[1] == pytest.approx(losses[0], abs=1e-5)


def test_the_loss_is_a_mean_over_label_tokens_not_over_passes(quiet):
    """Targets differ in length: the mean of the passes' means would be another number."""
    model, generator = LadderT5(load_t5(quiet), r=4), torch.Generator().manual_seed(0)

    def ids(length):
        return torch.randint(3, 60, (length,), generator=generator).tolist()

    rows, losses, gradients = [data.Row(ids(6), ids(length)) for length in (1, 1, 1, 9)], [], []
    for passes in (1, 2, 4):
        model.zero_grad()
        args = argparse.Namespace(device="cpu", accumulate=passes)
        losses.append(train.backward(model, rows, args).item())
        gradients.append(model.up.weight.grad.clone())
    whole = train.loss_of(model, data.collate(rows)).item() / 12
    assert losses == pytest.approx([whole] * 3, abs=1e-5) and gradients[0].abs().max() > 1e-5
    assert all(torch.allclose(gradient, gradients[0], atol=1e-6) for gradient in gradients)


def inspect(folder):
    processes.start("cpu")
    rank, model = processes.rank(), LadderT5(load_t5(folder), r=4)
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(rank + 1.0)  # the processes differ in every parameter
    processes.wrap(model)
    assert all((p == 1).all() for p in model.parameters()), "not those of the first process"

    ladder, losses = LadderT5(load_t5(folder), r=4).train(), []
    for _ in range(2):
        train.seed_everything(0, 7, rank)
        batch = data.collate([data.Row([3, 4, 5, 6, 7, 1], [5, 6])])
        losses.append(train.loss_of(ladder, batch).item())
    both = processes.gather({rank: losses[0]})
    assert both[0] != both[1], "both processes draw the same dropout"
    assert losses == [both[rank]] * 2

    assert processes.first(lambda: f"of {rank}") == "of 0"
    assert processes.all_reduce(torch.ones(2)).tolist() == [2, 2]


def test_all_begin_with_the_weights_of_the_first_and_draw_their_own_dropout(backbone, tmp_path):
    together(tmp_path, inspect, backbone)


def fail(how):
    def fails():
        processes.start("cpu")
        processes.all_reduce(torch.ones(1))
        if how == "first":
            processes.first(os.stat, "/gone") and print("did not fail")
        if processes.rank() == 0:
            raise ValueError("only the first process\nfinds this")
        processes.all_reduce(torch.ones(1))

    report.exit_cleanly(fails)


@pytest.mark.parametrize("how, lines", [
    ("first", ["error: [Errno 2] No such file or directory: '/gone'"] * 2),
    ("alone", ["error: only the first process finds this", "error: another process has ended"])])
def test_an_error_that_one_process_finds_ends_each_with_one_line(tmp_path, how, lines):
    for rank, text in enumerate(together(tmp_path, fail, how, code=2)):
        assert text.startswith(f"[process {rank}] {lines[rank]}") and text.count("\n") == 1, text


def interrupted(argv):
    if os.environ["RANK"] == "1":  # only the second process is told to stop, in its third step
        original, calls = train.backward, []

        def backward(*arguments):
            calls.append(1)
            if len(calls) == 3:
                os.kill(os.getpid(), signal.SIGTERM)
            return original(*arguments)

        train.backward = backward
    try:
        train.main(argv)
    except SystemExit as stop:
        print("code", stop.code)


@slow
def test_when_one_process_is_told_to_stop_all_stop_and_go_on_to_the_same_end(argv, tmp_path):
    out, straight = tmp_path / "run", tmp_path / "straight"  # with dropout
    shape = argv("--max-train-rows", 33, "--epochs", 2, "--out", out)
    first, second = together(tmp_path, interrupted, shape)
    assert "stopped after 3 of 6 steps" in first and "code 143" in second
    assert (out / "state.safetensors").exists() and logged(out, "step")[-1] == 3
    together(tmp_path, train.main, [*shape, "--resume"])
    together(tmp_path, train.main, [*shape, "--out", str(straight)])
    ours, theirs = weights(out), weights(straight)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert logged(out, "loss") == logged(straight, "loss")


@slow
def test_torchrun_runs_train_and_refuses_in_one_line_per_process(argv, quiet, tmp_path):
    same = argv("--model", quiet, "--max-train-rows", 33, "--out", tmp_path / "two")
    same[same.index("--r")] = "--reduction"  # torchrun takes --r for an option of its own
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone",
                "--nproc-per-node", "2", str(ROOT / "train.py"), *same]
    how = dict(capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    done = subprocess.run(torchrun, **how, timeout=120)
    assert done.returncode == 0 and "2 processes" in done.stdout, done.stderr
    again = subprocess.run(torchrun, **how, timeout=120)  # the folder is not empty
    lines = [line for line in again.stderr.splitlines() if line.startswith("[")]
    assert again.returncode != 0 and "[rank1]: Traceback" not in again.stderr
    for rank in (0, 1):
        assert sum(f"[process {rank}] error: " in line and "is not empty" in line
                   for line in lines) == 1, again.stderr
