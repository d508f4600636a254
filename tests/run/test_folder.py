"""A run that is cut off, at any moment and in any way, goes on to the same weights, scores and log.

Processes are really killed: a toy run at each call that touches the disk, train.py at random.
"""
import itertools
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import train
from run import folder
from run.report import exit_cleanly, versions
from workshop import contents, logged, refused, set_config, without, write

pytestmark = pytest.mark.usefixtures("children")
CONFIG = {"task": "toy", "model": "here", "lr": 0.1, "seed": 0, "keep": [1, 2]}


def toy_model(width=3):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, width), nn.Linear(width, 2), nn.Linear(2, 2, bias=False))
    model[0].requires_grad_(False)
    parameters = folder.trainable(model).values()
    return model, torch.optim.AdamW(parameters, lr=0.1, fused=True)


def toy(out, **changes):
    """Three epochs of four steps, the second the best, saved every two steps, and resumed."""
    model, optimizer = toy_model()
    with folder.lock_run(out):
        run = folder.Run(out, CONFIG | changes, {"command": "toy"}, resume=True)
        if run.results:
            return run.results
        run.load(model, optimizer)
        run.begin()
        for epoch in range(run.epochs, 3):
            while run.step < 4 * (epoch + 1):
                for p in (model[1].weight, model[1].bias):  # the last layer has no gradient
                    p.grad = p.detach().sin() + run.step
                optimizer.step()
                run.step += 1
                run.log({"step": run.step, "sum": model[1].weight.sum().item()})
                if run.step % 2 == 0:
                    run.save(model, optimizer)
            run.end_epoch(model, optimizer, {"score": [50.0, 70.0, 60.0][epoch]})
        folder.load_trained(out, model)
        return run.finish({"test": model[1].weight.sum().item()})


def work(function, argument, said, at=None, largest_file=None):
    """at=(module, function, n, signal): send it at the n-th call; largest_file: of a full disk."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in a script's background
    sys.stdout = sys.stderr = open(said, "a")
    if at:
        module, name, number, sign = at
        original, calls = getattr(sys.modules[module], name), itertools.count(1)

        def called(*arguments):
            if next(calls) == number:
                os.kill(os.getpid(), sign)
            return original(*arguments)

        setattr(sys.modules[module], name, called)
    if largest_file:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
    function(argument)


def start(function, argument, out, **how):
    child = multiprocessing.get_context("forkserver").Process(
        target=work, args=(function, argument, out.with_suffix(".said")), kwargs=how)
    child.start()
    return child


def run(function, argument, out, **how):
    """Its exit code; negative: the signal that killed it; None: it hangs."""
    child = start(function, argument, out, **how)
    child.join(60)
    return child.exitcode


def run_toy(out):
    exit_cleanly(lambda: toy(out))


def said(out):
    return out.with_suffix(".said").read_text()


def what_counts(out):
    """Weights, log and results of a run, times and memory aside."""
    log = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    results = json.loads((out / "results.json").read_text())
    changing = "seconds", "peak_memory_bytes", "command"
    for row, name in itertools.product([*log, results, results.get("cache") or {}], changing):
        row.pop(name, None)
    weights = load_file(out / "trained.safetensors")
    weights = {name: tensor.numpy().tobytes() for name, tensor in weights.items()}
    return weights, log, results, sorted(path.name for path in out.iterdir())


def same(out, straight):
    for ours, theirs in zip(what_counts(out), straight, strict=True):
        assert ours == theirs


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    out = tmp_path_factory.mktemp("straight") / "run"
    toy(out)
    return what_counts(out)


@pytest.fixture
def cut(tmp_path):
    """The folder of a toy run that was killed in its second epoch, when the state was saved."""
    out = tmp_path / "run"
    assert run(run_toy, out, out, at=("os", "replace", 7, signal.SIGKILL)) == -signal.SIGKILL
    return out


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fsync", "replace", "unlink"])
def test_killed_at_each_call_that_touches_the_disk_it_goes_on_to_the_same_end(
        straight, tmp_path, name):
    for number in itertools.count(1):
        out = tmp_path / f"run{number}"
        code = run(run_toy, out, out, at=("os", name, number, signal.SIGKILL))
        if code == 0:
            break
        assert code == -signal.SIGKILL
        folder.check_folder(out, overwrite=False, resume=True)
        toy(out)  # the lock of a killed run is no lock
        same(out, straight)
    assert number > 10, "it was hardly killed"


@pytest.fixture(scope="session")
def trained(backbone, glue, tmp_path_factory):
    """(arguments without --out, what counts of an uninterrupted run, its seconds) of train.py."""
    out = tmp_path_factory.mktemp("straight") / "run"
    argv = ["--model", str(backbone), "--data", str(glue), *(
        "--task sst2 --r 4 --device cpu --lr 1e-2 --warmup-steps 3 --epochs 3 --batch-size 8 "
        "--max-train-rows 40 --save-steps 2 --init fisher --fisher-samples 4 --cache 1").split()]
    run(print, "the first child waits for torch", out)
    began = time.time()
    assert run(train.main, [*argv, "--out", str(out)], out) == 0, said(out)
    return argv, what_counts(out), time.time() - began


@pytest.mark.slow
def test_killed_again_and_again_at_random_moments(trained, tmp_path):
    """A run is killed after a random time, resumed, killed ... until it ends by itself."""
    dice, kills, late = random.Random(0), 0, 0
    for trial in range(10):
        out = tmp_path / f"run{trial}"
        for _ in range(100):
            child = start(train.main, [*trained[0], "--out", str(out), "--resume"], out)
            child.join(dice.uniform(0.1, 1.0) * trained[2])
            child.kill()  # SIGKILL
            child.join()
            if child.exitcode == 0:
                break
            assert child.exitcode == -signal.SIGKILL, said(out)
            kills, late = kills + 1, late + (out / "state.safetensors").exists()
        same(out, trained[1])
    assert kills > 5 and late > 0, (kills, late)


@pytest.mark.parametrize("number", [pytest.param(signal.SIGTERM, marks=pytest.mark.slow),
                                    signal.SIGINT])
def test_told_to_stop_it_saves_the_step_and_goes_on_from_there(trained, tmp_path, number):
    out = tmp_path / "run"
    argv, log = [*without("--save-steps", trained[0]), "--out", str(out)], out / "metrics.jsonl"
    child = start(train.main, [*argv, "--save-steps", "1000"], out)
    while child.is_alive() and not (log.exists() and '"step": 2,' in log.read_text()):
        time.sleep(0.001)
    os.kill(child.pid, number)
    child.join(60)
    assert child.exitcode == 128 + number, said(out)
    assert "--resume" in said(out) and "Traceback" not in said(out)
    steps = len(logged(out, "loss"))
    assert 2 <= steps < 15 and f"stopped after {steps} of 15 steps" in said(out)
    assert run(train.main, [*argv, "--resume"], out) == 0
    assert f"goes on after step {steps} of 15" in said(out)
    same(out, trained[1])


@pytest.mark.slow
def test_told_to_stop_while_it_evaluates_it_stops_when_the_epoch_is_saved(trained, tmp_path):
    out = tmp_path / "run"
    argv = [*trained[0], "--seeds", "0,1", "--out", str(out)]
    at = ("train", "evaluate", 1, signal.SIGTERM)
    assert run(train.main, argv, out, at=at) == 128 + signal.SIGTERM, said(out)
    assert not (out / "sst2-1").exists() and logged(out / "sst2-0", "val")
    assert run(train.main, [*argv, "--resume"], out) == 0
    assert what_counts(out / "sst2-0")[:2] == trained[1][:2]


# ----------------------------------------------------------------------------- what is not resumed

@pytest.fixture(scope="session")
def killed(trained, tmp_path_factory):
    """The folder of a train.py that was killed after its first save."""
    out = tmp_path_factory.mktemp("killed") / "run"
    argv = [*trained[0], "--out", str(out)]
    assert run(train.main, argv, out, at=("os", "replace", 4, signal.SIGKILL)) == -signal.SIGKILL
    assert (out / "state.safetensors").exists()
    return out


@pytest.mark.parametrize("more, words", [
    (("--resume", "--lr", "0.5", "--seed", "3", "--accumulate", "2"),
     ("lr was 0.01, is 0.5", "seed was 0, is 3", "accumulate was 1, is 2", "--overwrite")),
    (("--resume", "--task", "rte"), ("task was sst2, is rte", "data_sha256 was")),
    (("--resume", "--model", "{other}"), ("backbone_sha256 was",)),
    ((), ("not empty", "--resume", "--overwrite")), (("--resume", "--overwrite"), ("--resume",)),
], ids=lambda part: " ".join(part)[:20])
def test_train_goes_on_only_as_it_began(trained, killed, backbone, tmp_path, capsys, more, words):
    other = shutil.copytree(backbone, tmp_path / "other")
    set_config(other, dropout_rate=0.2)
    more, before = [part.format(other=other) for part in more], contents(killed)
    refused(capsys, [*trained[0], "--out", str(killed), *more], *words)
    assert contents(killed) == before


@pytest.mark.slow
def test_a_run_goes_on_after_a_refusal_and_when_its_files_have_moved(
        trained, killed, backbone, glue, tmp_path, capsys):
    out = shutil.copytree(killed, tmp_path / "run")
    argv = [*trained[0], "--out", str(out)]
    refused(capsys, [*argv, "--resume", "--lr", "0.5"], "lr was 0.01, is 0.5")
    moved = [str(shutil.copytree(old, tmp_path / old.name)) for old in (backbone, glue)]
    more = ["--resume", "--model", moved[0], "--data", moved[1]]
    assert run(train.main, [*argv, *more], out) == 0, said(out)
    assert what_counts(out)[0] == trained[1][0]
    assert run(train.main, [*argv, "--overwrite"], out) == 0
    same(out, trained[1])


def test_a_run_that_has_ended_is_left_as_it_is(tmp_path):
    results, before = toy(tmp_path / "run"), contents(tmp_path / "run")
    assert " ".join(map(str, before)) == (
        "config.json metrics.jsonl results.json trained.safetensors")
    write(tmp_path / "run" / "state.safetensors", "killed before it was removed")
    assert toy(tmp_path / "run") == results and contents(tmp_path / "run") == before


@pytest.mark.parametrize("name", ["state.safetensors", "config.json", "results.json"])
def test_a_damaged_file_is_one_line_and_costs_nothing(cut, name):
    if name == "results.json":
        write(cut / name, "{}")
    whole, middle = (cut / name).read_bytes(), (cut / name).stat().st_size // 2
    for damaged in (b"", whole[:middle], whole[:middle] + b"\xff" + whole[middle + 1:]):
        (cut / name).write_bytes(damaged)
        before = contents(cut)
        with pytest.raises(ValueError, match=f"{name} is damaged"):
            toy(cut)
        assert contents(cut) == before


@pytest.mark.parametrize("name", ["state.safetensors", "trained.safetensors"])
def test_every_damaged_byte_is_noticed_and_a_lost_file_is_one_line(cut, name):
    path, dice = cut / name, random.Random(0)
    whole = path.read_bytes()
    damaged = [whole[:end] for end in (0, 7, 9, 100, len(whole) - 1)] + [whole + b"0"]
    for place in [*range(0, 300, 3), *(dice.randrange(len(whole)) for _ in range(100))]:
        byte = whole[place] ^ 1 << dice.randrange(8)
        damaged.append(whole[:place] + bytes([byte]) + whole[place + 1:])
    for content in damaged:
        path.write_bytes(content)
        with pytest.raises(ValueError, match=f"{path} is damaged or was not written by"):
            folder.read_tensors(path)
    if name == "trained.safetensors":  # which the state says is there
        path.unlink()
        with pytest.raises(FileNotFoundError, match=str(path)):
            toy(cut)


def test_killed_and_then_out_of_disk_it_keeps_the_old_state_and_goes_on_from_it(cut, straight):
    state = (cut / "state.safetensors").read_bytes()
    assert run(run_toy, cut, cut, largest_file=len(state) // 2) == 2
    last = said(cut).splitlines()[-1]
    assert last.startswith("error: ") and "state.safetensors" in last and "kept" in last
    assert (cut / "state.safetensors").read_bytes() == state and not list(cut.glob("*.partial"))
    toy(cut)
    same(cut, straight)


def test_a_second_run_in_a_folder_is_refused_and_an_empty_folder_is_removed(tmp_path):
    out = tmp_path / "run"
    with folder.lock_run(out):  # still empty, as during the Fisher pass
        with pytest.raises(ValueError, match="another run works in"):
            toy(out)
        assert out.is_dir()
    assert not out.exists()


def test_overwrite_replaces_a_run_and_touches_nothing_else(argv, tmp_path, capsys):
    out = tmp_path / "run"
    write(out / "thesis.txt", "years of work")
    for more in ((), ("--resume",)):
        refused(capsys, argv(*more), str(out), "not empty", "--resume", "--overwrite")
    write(out / "spiece.model", "")
    refused(capsys, argv("--overwrite"), f"{out} holds a backbone")
    (out / "spiece.model").unlink()
    assert list(contents(out)) == [Path("thesis.txt")]
    for seed in (3, 7):
        assert train.main(argv("--max-steps", 1, "--overwrite", "--seed", seed))["seed"] == seed
        assert json.loads((out / "results.json").read_text())["seed"] == seed
    assert (out / "thesis.txt").read_text() == "years of work\n"
    assert len(logged(out, "loss")) == 1


def test_without_out_each_run_has_its_own_folder(argv, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = [folder.new_folder("sst2-lst").name for _ in range(2)]  # two that start together
    train.main(without("--out", argv("--max-steps", 1)))
    assert [*names, "sst2-lst-2"] == sorted(path.name for path in Path("runs").iterdir())
    assert [path.parent.name for path in Path("runs").glob("*/results.json")] == ["sst2-lst-2"]


def test_weights_that_do_not_fit_are_refused(cut):
    assert folder.read_config(cut) == CONFIG
    with pytest.raises(ValueError, match=r"trained.safetensors does not fit, for example 1.weight"):
        folder.load_trained(cut, toy_model(width=4)[0])
    shutil.copy(cut / "state.safetensors", cut / "trained.safetensors")
    with pytest.raises(ValueError, match="was not written by us"):  # not under this name
        folder.read_config(cut)
    save_file({"x": torch.ones(1)}, cut / "trained.safetensors", metadata={"about": "{}"})
    with pytest.raises(ValueError, match="was not written by us"):  # it has no checksum
        folder.read_config(cut)


def test_results_say_where_they_come_from(learned):
    out, results = learned
    config = json.loads((out / "config.json").read_text())
    for held in (results, config):
        assert held["command"].startswith("python train.py --task sst2")
        assert "--epochs 10" in held["command"] and held["versions"] == versions()
        assert "threads" in held["hardware"]
    assert len(config["data_sha256"]) == len(config["backbone_sha256"]) == 64
    assert results["config"].items() <= config.items()
    assert results["seconds"] > 0 and results["peak_memory_bytes"] > 2**20


def test_damaged_results_or_a_shortened_log_are_noticed_and_nothing_is_lost(
        argv, cut, tmp_path, capsys):
    line = argv("--max-steps", 1, "--out", tmp_path / "other")
    train.main(line)
    (tmp_path / "other" / "results.json").write_text("{}")
    before = contents(tmp_path / "other")
    refused(capsys, [*line, "--resume"], "results.json is damaged")
    assert contents(tmp_path / "other") == before
    (cut / "metrics.jsonl").write_text("")
    with pytest.raises(ValueError, match="metrics.jsonl or state.safetensors is damaged"):
        toy(cut)


def test_weights_without_state_or_results_are_not_thrown_away_by_resume(argv, tmp_path, capsys):
    train.main(argv("--max-steps", 1))
    (tmp_path / "run" / "results.json").unlink()
    before = contents(tmp_path / "run")
    refused(capsys, argv("--max-steps", 1, "--resume"), "nor results.json", "--overwrite")
    assert contents(tmp_path / "run") == before
    (tmp_path / "file").touch()
    refused(capsys, argv("--out", tmp_path / "file"), "file cannot be a folder here")
