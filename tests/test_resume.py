"""A run that is cut off, at any moment and in any way, goes on to the same weights, scores and log.  Processes are really killed."""

import contextlib
import fcntl
import functools
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
from safetensors.torch import load_file

import checkpoint
import report
import train
from workshop import contents, refused, without

SHAPE = ("--epochs", 3, "--max-train-rows", 40, "--batch-size", 8, "--save-steps", 2, "--init", "fisher", "--fisher-samples", 4)  # 15 steps, 11 saves
pytestmark = pytest.mark.usefixtures("children")


# -------------------------------------------------------------------------------------------------------------- workshop

def work(argv, die_at=None, largest_file=None, stop_in=None):
    """What a child process does: the run; killed at the start of the `number`-th call of os.<name>; with a disk that is soon full;
    asked to stop when train.<stop_in> begins."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored, if the tests run in a script's background
    sys.stdout = sys.stderr = open(Path(argv[argv.index("--out") + 1]).with_suffix(".said"), "a")
    if die_at:
        name, number = die_at
        original, calls = getattr(os, name), 0

        def deadly(*arguments):
            nonlocal calls
            calls += 1
            if calls == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*arguments)

        setattr(os, name, deadly)
    if stop_in:
        asked = getattr(train, stop_in)
        setattr(train, stop_in, lambda *arguments: (os.kill(os.getpid(), signal.SIGTERM), asked(*arguments))[1])
    if largest_file:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
    train.main(argv)


def start(argv, **how):
    child = multiprocessing.get_context("forkserver").Process(target=work, args=(argv,), kwargs=how)
    child.start()
    return child


def run(argv, **how):
    """Its exit code; negative: the signal that killed it."""
    child = start(argv, **how)
    child.join(60)
    assert child.exitcode is not None, "the run hangs"
    return child.exitcode


def said(out):
    return out.with_suffix(".said").read_text()


def what_counts(out):
    """Weights, log and results of a run, times and memory aside."""
    log = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    results = json.loads((out / "results.json").read_text())
    for row in (*log, results):
        for name in ("seconds", "peak_memory_bytes", "command"):
            row.pop(name, None)
    weights = {name: tensor.numpy().tobytes() for name, tensor in load_file(out / "trained.safetensors").items()}
    return weights, log, results, sorted(path.name for path in out.iterdir())


@pytest.fixture(scope="session")
def straight(backbone, glue, tmp_path_factory):
    """(command line without --out, what counts of a run that was never interrupted, seconds that it took)"""
    out = tmp_path_factory.mktemp("straight") / "run"
    argv = ["--task", "sst2", "--model", str(backbone), "--data", str(glue), "--r", "4", "--device", "cpu", "--lr", "1e-2", "--warmup-steps", "3", *map(str, SHAPE)]
    assert run([*argv, "--out", str(out.parent / "warm")]) == 0  # the first child waits for torch
    began = time.time()
    assert run([*argv, "--out", str(out)]) == 0, said(out)
    return argv, what_counts(out), time.time() - began


def same(out, straight):
    for ours, theirs, what in zip(what_counts(out), straight[1], ("weights", "log", "results", "files")):
        assert ours == theirs, f"{what} differ"


# ------------------------------------------------------------------------------------------------------------------ kill

DEATHS = [pytest.param(("fsync", 4), marks=pytest.mark.slow), ("replace", 5)]  # while the first state is written; before the best weights take their place


@pytest.mark.slow
@pytest.mark.parametrize("die_at", DEATHS, ids=lambda die_at: f"{die_at[0]}-{die_at[1]}")
def test_killed_while_it_saves_it_goes_on_to_the_same_end(straight, tmp_path, die_at):
    out = tmp_path / "run"
    argv = [*straight[0], "--out", str(out), "--resume"]
    assert run(argv, die_at=die_at) == -signal.SIGKILL
    assert run(argv) == 0, said(out)
    same(out, straight)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fsync", "replace", "unlink"])
def test_killed_at_each_call_that_touches_the_disk(straight, tmp_path, name):
    for number in range(1, 200):
        out = tmp_path / f"run{number}"
        argv = [*straight[0], "--out", str(out), "--resume"]
        code = run(argv, die_at=(name, number))
        if code == 0:
            break
        assert code == -signal.SIGKILL and run(argv) == 0, said(out)
        same(out, straight)
        shutil.rmtree(out)
    assert number > 3, "it was never killed"
    print(f"{number - 1} kills at os.{name}")


@pytest.mark.slow
def test_killed_again_and_again_at_random_moments(straight, tmp_path):
    """A run is killed after a random time, resumed, killed ... until it ends by itself; many times over."""
    dice, kills, late = random.Random(0), 0, 0
    for trial in range(12):
        out = tmp_path / f"run{trial}"
        argv = [*straight[0], "--out", str(out), "--resume"]
        for _ in range(100):
            child = start(argv)
            child.join(dice.uniform(0.1, 1.0) * straight[2])
            child.kill()  # SIGKILL
            child.join()
            if child.exitcode == 0:
                break
            assert child.exitcode == -signal.SIGKILL, said(out)
            kills, late = kills + 1, late + (out / "state.safetensors").exists()
        same(out, straight)
    assert kills > 5 and late > 0, (kills, late)
    print(f"{kills} kills at random moments, {late} of them after the first save")


@pytest.mark.parametrize("number", [pytest.param(signal.SIGTERM, marks=pytest.mark.slow), signal.SIGINT])
def test_asked_to_stop_it_saves_the_step_and_goes_on_from_there(straight, tmp_path, number):
    out = tmp_path / "run"
    argv = [*without("--save-steps", straight[0]), "--out", str(out)]
    child = start([*argv, "--save-steps", "1000"])
    while child.is_alive() and not ((out / "metrics.jsonl").exists() and '"step": 2,' in (out / "metrics.jsonl").read_text()):
        time.sleep(0.001)
    os.kill(child.pid, number)
    child.join(60)
    assert child.exitcode == 128 + number, said(out)
    assert "--resume" in said(out) and "Traceback" not in said(out)
    steps = sum('"loss"' in line for line in (out / "metrics.jsonl").read_text().splitlines())
    assert 2 <= steps < 15 and f"stopped after {steps} of 15 steps" in said(out)
    assert run([*argv, "--resume"]) == 0
    assert f"goes on after step {steps} of 15" in said(out)
    same(out, straight)


@pytest.mark.slow
def test_asked_to_stop_while_it_evaluates_it_stops_behind_it(straight, tmp_path):
    out = tmp_path / "run"
    argv = [*straight[0], "--seeds", "0,1", "--out", str(out)]
    assert run(argv, stop_in="evaluate") == 128 + signal.SIGTERM, said(out)
    assert not (out / "sst2-1").exists() and '"val"' in (out / "sst2-0" / "metrics.jsonl").read_text()
    assert run([*argv, "--resume"]) == 0
    assert what_counts(out / "sst2-0")[:2] == straight[1][:2]


# ---------------------------------------------------------------------------------------------------- what is not resumed

@pytest.fixture(scope="session")
def killed(straight, tmp_path_factory):
    """killed(number): the folder of a run that was killed at its so-manieth rename."""
    @functools.cache
    def folder(number):
        out = tmp_path_factory.mktemp("killed") / "run"
        assert run([*straight[0], "--out", str(out)], die_at=("replace", number)) == -signal.SIGKILL
        return out

    return folder


@pytest.fixture
def cut(killed, straight, tmp_path):
    """The folder of a run that was killed after its first save, and its command line."""
    out = shutil.copytree(killed(4), tmp_path / "run")
    assert (out / "state.safetensors").exists()
    return out, [*straight[0], "--out", str(out)]


def test_other_arguments_are_refused_with_the_list(cut, capsys):
    out, argv = cut
    before = contents(out)
    refused(capsys, [*argv, "--resume", "--lr", "0.5", "--seed", "3", "--accumulate", "2"], "lr was 0.01, is 0.5", "seed was 0, is 3", "accumulate was 1, is 2", "--overwrite")
    refused(capsys, [*argv, "--resume", "--task", "rte"], "task was sst2, is rte", "data sha256 was")
    assert contents(out) == before


@pytest.mark.slow
def test_a_run_goes_on_behind_what_was_refused(cut, straight, capsys):
    out, argv = cut
    refused(capsys, [*argv, "--resume", "--lr", "0.5"], "lr was 0.01, is 0.5")
    with checkpoint.claim(out):
        refused(capsys, [*argv, "--resume"], "another run works in", str(out))
    assert run([*argv, "--resume"]) == 0  # the first one's end freed it
    same(out, straight)
    assert run([*argv, "--overwrite"]) == 0
    same(out, straight)


def test_another_backbone_is_refused(cut, backbone, tmp_path, capsys):
    out, argv = cut
    other = shutil.copytree(backbone, tmp_path / "other")
    before = contents(out)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"dropout_rate": 0.2}))
    refused(capsys, [*argv, "--resume", "--model", str(other)], "backbone sha256 was")
    assert contents(out) == before


@pytest.mark.slow
def test_the_same_files_at_another_place_are_the_same(cut, backbone, glue, straight, tmp_path):
    out, argv = cut
    moved = [str(shutil.copytree(folder, tmp_path / folder.name)) for folder in (backbone, glue)]
    assert run([*argv, "--resume", "--model", moved[0], "--data", moved[1]]) == 0, said(out)
    assert what_counts(out)[0] == straight[1][0]


def test_a_folder_with_a_run_needs_resume_or_overwrite(cut, capsys):
    out, argv = cut
    before = contents(out)
    refused(capsys, argv, "not empty", "--resume", "--overwrite")
    refused(capsys, [*argv, "--resume", "--overwrite"], "give one of them")
    refused(capsys, [*without("--out", argv), "--resume"], "name its folder")
    assert contents(out) == before


def test_a_folder_without_a_run_is_not_resumed(straight, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("years of work")
    refused(capsys, [*straight[0], "--out", str(tmp_path / "run"), "--resume"], "holds no run")
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["thesis.txt"]


def test_a_run_that_has_ended_is_left_as_it_is(straight, tmp_path, capsys):
    out = tmp_path / "run"
    argv = [*straight[0], "--out", str(out), "--resume"]  # an empty place: it begins
    assert run(argv) == 0
    same(out, straight)
    before = contents(out)
    assert train.main(argv) == json.loads((out / "results.json").read_text()) and "has ended" in capsys.readouterr().out
    assert contents(out) == before


@pytest.mark.parametrize("name", ["state.safetensors", "config.json"])
@pytest.mark.parametrize("damage", ["cut", "flipped", "empty"])
def test_a_damaged_state_is_one_line(cut, capsys, name, damage):
    out, argv = cut
    whole = (out / name).read_bytes()
    middle = len(whole) // 2
    (out / name).write_bytes({"cut": whole[:middle], "flipped": whole[:middle] + bytes([whole[middle] ^ 255]) + whole[middle + 1:], "empty": b""}[damage])
    refused(capsys, [*argv, "--resume"], name, "damaged")


@pytest.mark.parametrize("name", ["metrics.jsonl", "trained.safetensors"])
def test_a_resume_that_lacks_what_was_written_is_one_line(killed, straight, tmp_path, capsys, name):
    out = shutil.copytree(killed(8), tmp_path / "run")
    (out / name).unlink()
    refused(capsys, [*straight[0], "--out", str(out), "--resume"], name, "gone")


def test_a_table_and_a_single_run_do_not_go_on_in_each_other(cut, straight, capsys):
    out, argv = cut
    before = contents(out)
    refused(capsys, [*argv, "--seeds", "0,1", "--resume"], "cannot go on")
    assert contents(out) == before
    assert run([*argv, "--seeds", "0,1", "--max-steps", "1", "--overwrite"]) == 0
    assert not (out / "state.safetensors").exists() and not (out / "trained.safetensors").exists()
    refused(capsys, [*argv, "--resume"], "a table of several runs")
    refused(capsys, ["--out", str(out), "--predict", "a film"], "it holds several: sst2-0, sst2-1")


@pytest.mark.parametrize("every, more", [(3, 100), pytest.param(1, 300, marks=pytest.mark.slow)])
def test_every_flipped_byte_of_a_state_is_noticed(cut, every, more):
    out, _ = cut
    path, dice = out / "state.safetensors", random.Random(0)
    whole = path.read_bytes()
    for place in [*range(8, 300, every), *(dice.randrange(len(whole)) for _ in range(more))]:
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << dice.randrange(8)]) + whole[place + 1:])
        with pytest.raises(ValueError, match="state.safetensors is damaged"):
            checkpoint.read_tensors(path)


# ---------------------------------------------------------------------------------------------------------- disk and lock

def test_a_full_disk_is_one_line_and_the_old_state_is_kept(cut, straight):
    out, argv = cut
    state = (out / "state.safetensors").read_bytes()
    assert run([*argv, "--resume"], largest_file=len(state) // 2) == 2
    last = said(out).splitlines()[-1]
    assert last.startswith("error: ") and "state.safetensors" in last and "kept" in last
    assert (out / "state.safetensors").read_bytes() == state and not list(out.glob("*.partial"))
    assert run([*argv, "--resume"]) == 0
    same(out, straight)


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes to read-only folders")
def test_a_read_only_folder_is_one_line(cut, capsys):
    out, argv = cut
    before = contents(out)
    out.chmod(0o555)
    refused(capsys, [*argv, "--resume"], str(out))
    out.chmod(0o755)
    assert contents(out) == before


def test_two_runs_in_one_folder_the_second_is_refused(cut, capsys):
    out, argv = cut
    with checkpoint.claim(out):
        refused(capsys, [*argv, "--resume"], "another run works in", str(out))
        refused(capsys, [*argv, "--overwrite"], "another run works in", str(out))


def test_a_refused_run_does_not_take_the_folder_of_the_first_away(straight, tmp_path, capsys):
    out = tmp_path / "run"
    with checkpoint.claim(out):  # still empty, as during the Fisher pass
        refused(capsys, [*straight[0], "--out", str(out)], "another run works in")
        assert out.is_dir()
    assert not out.exists(), "nothing was written, so nothing is left"


@pytest.mark.slow
def test_a_lock_of_a_killed_run_is_no_lock(straight, tmp_path):
    child = start([*straight[0], "--out", str(tmp_path / "run")])
    while child.is_alive() and not (tmp_path / "run" / "config.json").exists():
        time.sleep(0.001)
    folder = os.open(tmp_path / "run", os.O_RDONLY)
    with pytest.raises(BlockingIOError):
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    child.kill()
    child.join()
    fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.close(folder)


# ---------------------------------------------------------------------------------------------------------- several runs

def test_several_tasks_and_seeds_make_a_table_and_equal_single_runs(argv, tmp_path, capsys):
    out = tmp_path / "run"
    several = argv("--task", "sst2,cola", "--seeds", "0,3")
    results = train.main(several)
    said = capsys.readouterr().out
    scores = {(run["task"], run["seed"]): run["test"]["score"] for run in results["runs"]}
    assert set(scores) == {("sst2", 0), ("sst2", 3), ("cola", 0), ("cola", 3)}
    task = results["tasks"]["sst2"]
    assert task["scores"] == [scores["sst2", 0], scores["sst2", 3]] and task["mean"] == sum(task["scores"]) / 2
    assert task["deviation"] == pytest.approx(abs(task["scores"][0] - task["scores"][1]) / 2)
    assert results["average"] == pytest.approx((results["tasks"]["sst2"]["mean"] + results["tasks"]["cola"]["mean"]) / 2)
    table = (out / "results.md").read_text()
    assert table in said and table.index("CoLA") < table.index("SST-2") and f"{task['mean']:.2f} ± {task['deviation']:.2f}" in table
    assert json.loads((out / "results.json").read_text()) == results
    train.main(argv("--task", "sst2", "--seed", "3", "--out", tmp_path / "single"))
    alone, among = (load_file(folder / "trained.safetensors") for folder in (tmp_path / "single", out / "sst2-3"))
    assert all(torch.equal(alone[name], among[name]) for name in alone)


@pytest.mark.slow
def test_several_runs_go_on_where_they_were_cut_off(straight, tmp_path, capsys):
    several = [*straight[0], "--seeds", "0,1"]
    assert run([*several, "--out", str(tmp_path / "whole")]) == 0
    out = tmp_path / "run"
    assert run([*several, "--out", str(out)], die_at=("replace", 20)) == -signal.SIGKILL
    assert (out / "sst2-0" / "results.json").exists() and not (out / "sst2-1" / "results.json").exists()
    assert run([*several, "--out", str(out), "--resume"]) == 0, said(out)
    for seed in "01":
        assert what_counts(out / f"sst2-{seed}") == what_counts(tmp_path / "whole" / f"sst2-{seed}")
    assert json.loads((out / "results.json").read_text())["tasks"] == json.loads((tmp_path / "whole" / "results.json").read_text())["tasks"]
    refused(capsys, [*straight[0], "--seeds", "0,1", "--lr", "0.5", "--out", str(out), "--resume"], "lr was 0.01, is 0.5")


def test_a_table_that_cannot_begin_leaves_what_was_there(argv, tmp_path, capsys):
    train.main(argv("--max-steps", 1))
    before = contents(tmp_path / "run")
    refused(capsys, argv("--seeds", "0,1", "--overwrite", "--data", tmp_path / "nowhere"), "train.tsv is missing")
    refused(capsys, argv("--task", "sst2,rte", "--overwrite", "--data", "sample"), "the bundled sample has sst2 only")  # before sst2 has run
    assert contents(tmp_path / "run") == before


def test_a_table_takes_one_seed_more(argv, tmp_path, capsys):
    first = train.main(argv("--seeds", "0,1", "--max-steps", 1))
    more = train.main(argv("--seeds", "0,1,2", "--max-steps", 1, "--resume"))
    assert more["tasks"]["sst2"]["scores"][:2] == first["tasks"]["sst2"]["scores"] and len(more["runs"]) == 3
    assert capsys.readouterr().out.count("has ended") == 2


def test_another_file_in_the_place_of_the_state_is_one_line(cut, killed, capsys):
    out, argv = cut
    shutil.copy(killed(8) / "trained.safetensors", out / "state.safetensors")
    refused(capsys, [*argv, "--resume"], "state.safetensors")


def test_a_damaged_result_costs_no_state(cut, capsys):
    out, argv = cut
    (out / "results.json").write_text("{")
    refused(capsys, [*argv, "--resume"], "results.json is damaged")
    assert (out / "state.safetensors").exists()


@pytest.mark.parametrize("more, words", [
    (("--task", "sst2,sst2"), ("sst2", "twice")), (("--task", "sst2,nope"), ("nope", "choose from")), (("--task", ""), ("choose from",)),
    (("--seeds", "1,1"), ("twice",)), (("--seeds", "1,x"), ("x",)), (("--seeds", ""), ("whole number",)), (("--seeds", "1,2", "--seed", "3"), ("give one",)),
    (("--seeds", "1,2", "--seed", "0"), ("give one",)), (("--seed", "000000000000099999999999"), ("0 to 10^9",)), (("--out", ""), ("--out is empty",)),
    (("--accumulate", "0"), ("accumulate",)), (("--save-steps", "0"), ("save-steps",))])
def test_wrong_lists_are_refused(argv, capsys, tmp_path, more, words):
    refused(capsys, argv(*more), *words)
    assert not (tmp_path / "run").exists()


# ------------------------------------------------------------------------------------------------------------ provenance

def test_results_say_where_they_come_from(argv, tmp_path):
    results = train.main(argv("--max-steps", 1))
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    for held in (results, config):
        assert held["command"].startswith("python train.py --task sst2") and "--max-steps 1" in held["command"]
        assert held["versions"]["torch"] == torch.__version__.partition("+")[0] or held["versions"]["torch"] == torch.__version__
        assert "threads" in held["hardware"]
    assert results["config"]["backbone_sha256"] == config["backbone_sha256"] == checkpoint.sha256_of_backbone(results["model"])
    assert len(config["data_sha256"]) == 64 and config["seconds"] == results["seconds"] > 0
    assert config["peak_memory_bytes"] == results["peak_memory_bytes"] > 2**20


def test_each_run_has_its_own_peak():
    if not report.HIGH_WATER[1].exists():
        pytest.skip("this system does not let a process begin a new peak")
    torch.ones(30 * 2**20)  # 120 MiB, written and freed
    high, _ = report.peak_memory("cpu")
    report.reset_peak("cpu")
    assert report.peak_memory("cpu")[0] < high - 60 * 2**20


def test_a_run_does_not_leave_its_signal_handlers(argv):
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with contextlib.suppress(SystemExit):
        train.main(argv("--max-steps", 1))
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
