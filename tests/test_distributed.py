"""torchrun: two real processes (gloo, on the CPU) compute what one computes, and the backbone never travels."""

import json
import multiprocessing
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import data
import distributed
import train
from model import load_t5
from side import LadderT5
from workshop import logged

ROOT = Path(train.__file__).parent
pytestmark = pytest.mark.usefixtures("children")


# -------------------------------------------------------------------------------------------------------------- workshop

def join(rank, port, said, function, arguments):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    sys.stdout = sys.stderr = open(f"{said}-{rank}", "w")
    function(*arguments)
    sys.stdout.flush()


def together(tmp_path, function, *arguments):
    """function(*arguments) in two processes, as torchrun starts them; what each of them printed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    said = tmp_path / "said"
    children = [multiprocessing.get_context("forkserver").Process(target=join, args=(rank, port, said, function, arguments)) for rank in (0, 1)]
    for child in children:
        child.start()
    for child in children:
        child.join(120)
    texts = [Path(f"{said}-{rank}").read_text() for rank in (0, 1)]
    assert [child.exitcode for child in children] == [0, 0], texts
    return texts


@pytest.fixture(scope="module")
def quiet(backbone, tmp_path_factory):
    """The backbone without dropout."""
    folder = shutil.copytree(backbone, tmp_path_factory.mktemp("quiet") / "backbone")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"dropout_rate": 0.0}))
    return folder


def run(argv):  # train.main returns results that a process need not send home
    train.main(argv)


# ----------------------------------------------------------------------------------------------------------------- losses

# 33 rows in batches of 16: the last batch has one row, so that processes and passes are left without any
@pytest.mark.slow
@pytest.mark.parametrize("more", [("--accumulate", 2), pytest.param(("--method", "lora", "--lr", "1e-2"), marks=pytest.mark.slow),
                                  pytest.param(("--init", "fisher", "--fisher-samples", 4, "--checkpoint"), marks=pytest.mark.slow)],
                         ids=lambda more: "".join(map(str, more)))
def test_two_processes_have_the_losses_weights_and_scores_of_one(argv, quiet, tmp_path, more):
    same = ("--model", quiet, "--max-train-rows", 33, "--epochs", 3, *more)
    one = train.main(argv(*same, "--out", tmp_path / "one"))
    first, second = together(tmp_path, run, argv(*same, "--out", tmp_path / "two"))
    assert "2 processes" in first and second == "", "only the first process speaks"
    two = json.loads((tmp_path / "two" / "results.json").read_text())
    assert logged(tmp_path / "two", "loss") == pytest.approx(logged(tmp_path / "one", "loss"), abs=1e-5)
    assert two["val"] == one["val"] and two["test"] == one["test"] and two["steps"] == one["steps"] == 9
    weights = [load_file(tmp_path / name / "trained.safetensors") for name in ("one", "two")]
    apart = torch.cat([(weights[0][name] - weights[1][name]).abs().flatten() for name in weights[0]])
    assert apart.mean() < 1e-3, "Adam turns the sign of a gradient near 0 into a whole step, so single weights may differ"
    assert sorted(path.name for path in (tmp_path / "two").iterdir()) == sorted(path.name for path in (tmp_path / "one").iterdir())


@pytest.mark.parametrize("passes", [pytest.param(2, marks=pytest.mark.slow), 5, pytest.param(16, marks=pytest.mark.slow), 40])
def test_accumulated_passes_have_the_losses_of_one(argv, quiet, tmp_path, passes):
    same = ("--model", quiet, "--max-train-rows", 33, "--epochs", 2)
    for name, more in (("one", ()), ("many", ("--accumulate", passes))):
        train.main(argv(*same, *more, "--out", tmp_path / name))
    assert logged(tmp_path / "many", "loss") == pytest.approx(logged(tmp_path / "one", "loss"), abs=1e-5)


def test_the_loss_is_a_mean_over_label_tokens_not_over_passes(quiet):
    """Rows with targets of different lengths: the mean of the passes' means would be another number."""
    model, generator = LadderT5(load_t5(quiet), r=4), torch.Generator().manual_seed(0)
    rows = [data.Row(torch.randint(3, 60, (6,), generator=generator).tolist(), torch.randint(3, 60, (length,), generator=generator).tolist()) for length in (1, 1, 1, 9)]
    losses, gradients = [], []
    for passes in (1, 2, 4):
        model.zero_grad()
        losses.append(train.backward(model, rows, train.argparse.Namespace(device="cpu", accumulate=passes)).item())
        gradients.append(model.up.weight.grad.clone())
    assert losses == pytest.approx([train.loss_of(model, data.collate(rows)).item() / 12] * 3, abs=1e-5)
    assert all(torch.allclose(gradient, gradients[0], atol=1e-6) for gradient in gradients) and gradients[0].abs().max() > 1e-5


# --------------------------------------------------------------------------------------------------------------- processes

def inspect(folder, text):
    distributed.start("cpu")
    rank, model = distributed.rank(), LadderT5(load_t5(folder), r=4)
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(rank + 1.0)  # the processes differ in every parameter
    replica = distributed.wrap(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert all((p == rank + 1).all() for p in model.backbone.parameters()), "the backbone was sent"
    assert all((p == 1).all() for p in trained), "what trains is not that of the first process"
    assert not replica.find_unused_parameters

    ladder = LadderT5(load_t5(folder), r=4).train()
    batch = data.collate([data.Row(text, [5, 6])])
    train.seed_everything(0, 7, rank)
    losses = distributed.gather({rank: train.loss_of(ladder, batch).item()})
    assert losses[0] != losses[1], "both processes draw the same dropout"
    train.seed_everything(0, 7, rank)
    assert train.loss_of(ladder, batch).item() == losses[rank]

    assert distributed.agree(f"of {rank}") == "of 0" and distributed.total(torch.ones(2)).tolist() == [2, 2]


def test_the_backbone_is_never_sent_and_each_process_draws_its_own_dropout(backbone, tmp_path):
    together(tmp_path, inspect, backbone, [3, 4, 5, 6, 7, 1])


def told(argv):
    original = train.seed_everything
    train.seed_everything = lambda *numbers: (print("seeds", *numbers), original(*numbers))
    train.main(argv)


@pytest.mark.slow
def test_each_step_of_each_process_has_its_own_seed(argv, backbone, tmp_path):
    texts = together(tmp_path, told, argv("--max-steps", 2, "--seed", 5))
    drawn = [[line for line in text.splitlines() if line.startswith("seeds")] for text in texts]
    assert drawn == [["seeds 5", "seeds 5 0 0", "seeds 5 1 0"], ["seeds 5", "seeds 5 0 1", "seeds 5 1 1"]]


def interrupted(argv):
    if os.environ["RANK"] == "1":  # only the second process is asked to stop, in its third step
        original, calls = train.backward, []

        def backward(*arguments):
            calls.append(1)
            if len(calls) == 3:
                os.kill(os.getpid(), train.report.signal.SIGTERM)
            return original(*arguments)

        train.backward = backward
    try:
        train.main(argv)
    except SystemExit as stop:
        print("code", stop.code)


@pytest.fixture
def stopped(argv, tmp_path):
    """The command line of a run, with dropout, of which one process was asked to stop."""
    shape = argv("--max-train-rows", 33, "--epochs", 2, "--out", tmp_path / "run")
    first, second = together(tmp_path, interrupted, shape)
    assert "stopped after 3 of 6 steps" in first and "code 143" in second
    return shape


@pytest.mark.slow
def test_one_process_asked_to_stop_stops_all(stopped, tmp_path):
    assert (tmp_path / "run" / "state.safetensors").exists() and logged(tmp_path / "run", "step")[-1] == 3


@pytest.mark.slow
def test_stopped_processes_go_on_to_the_same_end(stopped, tmp_path):
    shape = stopped
    together(tmp_path, run, [*shape, "--resume"])
    together(tmp_path, run, [*shape, "--out", str(tmp_path / "straight")])
    weights = [load_file(tmp_path / name / "trained.safetensors") for name in ("run", "straight")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert logged(tmp_path / "run", "loss") == logged(tmp_path / "straight", "loss")


@pytest.mark.slow
def test_torchrun_runs_train(argv, quiet, tmp_path):
    same = argv("--model", quiet, "--max-train-rows", 33, "--out", tmp_path / "two")
    same[same.index("--r")] = "--reduction"  # torchrun takes --r for an option of its own
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", str(ROOT / "train.py"), *same],
                          capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=120)
    assert done.returncode == 0 and "2 processes" in done.stdout, done.stderr
    train.main([*same, "--out", str(tmp_path / "one")])
    assert logged(tmp_path / "two", "loss") == pytest.approx(logged(tmp_path / "one", "loss"), abs=1e-5)
    refused = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", str(ROOT / "train.py"), *same],
                             capture_output=True, text=True, timeout=120)
    assert refused.returncode != 0 and "is not empty" in refused.stderr
