"""Several tasks and seeds: a run each, and their table."""
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import data
import train
from run.sweep import summarize, table
from workshop import contents, refused


def test_several_tasks_and_seeds_make_a_table_and_equal_single_runs(argv, tmp_path, capsys):
    out = tmp_path / "run"
    results = train.main(argv("--task", "sst2,cola", "--seeds", "0,3"))
    said = capsys.readouterr().out
    scores = {(run["task"], run["seed"]): run["test"]["score"] for run in results["runs"]}
    assert list(scores) == [("sst2", 0), ("sst2", 3), ("cola", 0), ("cola", 3)]
    task = results["tasks"]["sst2"]
    assert task["scores"] == [scores["sst2", 0], scores["sst2", 3]]
    assert task["mean"] == sum(task["scores"]) / 2
    assert task["deviation"] == pytest.approx(abs(task["scores"][0] - task["scores"][1]) / 2)
    means = [task["mean"] for task in results["tasks"].values()]
    assert results["average"] == pytest.approx(sum(means) / 2)
    drawn = table(results["runs"])
    assert drawn in said and drawn.index("CoLA") < drawn.index("SST-2")
    assert f"{task['mean']:.2f} ± {task['deviation']:.2f}" in drawn
    assert json.loads((out / "results.json").read_text()) == results
    train.main(argv("--task", "sst2", "--seed", "3", "--out", tmp_path / "single"))
    single, among = (load_file(folder / "trained.safetensors")
                     for folder in (tmp_path / "single", out / "sst2-3"))
    assert all(torch.equal(single[name], among[name]) for name in single)


def test_the_table_has_the_papers_order():
    runs = [{"task": task, "seed": seed, "test": {"score": score}, "method": "lst", "model": "nano",
             "trainable_percent": 1.74, "peak_memory_bytes": memory}
            for task, seed, score, memory in (("rte", 0, 50.0, 2**20), ("rte", 1, 60.0, 2**22),
                                              ("vqa+gqa", 0, 70.0, 2**21), ("cola", 0, 10.0, 1))]
    assert summarize(runs)["average"] == pytest.approx((55 + 70 + 10) / 3)
    assert [line.split() for line in table(runs).splitlines()[1:]] == [
        ["CoLA", "10.00", "±", "0.00"], ["RTE", "55.00", "±", "5.00"],
        ["vqa+gqa", "70.00", "±", "0.00"], ["average", "45.00"]]
    assert table(runs).startswith("lst on nano: 1.74 % trained, peak 4 MiB")
    assert max(map(len, table(runs).splitlines())) < 80


def test_a_table_that_cannot_begin_leaves_what_was_there(learned, argv, tmp_path, capsys):
    train.main(argv("--max-steps", 1))
    before = contents(tmp_path / "run")
    more = argv("--seeds", "0,1", "--overwrite")
    refused(capsys, [*more, "--data", str(tmp_path / "nowhere")], "train.tsv is missing")
    only_sst2 = tmp_path / "only"
    shutil.copytree(Path(data.SAMPLE) / "SST-2", only_sst2 / "SST-2")
    refused(capsys, [*more, "--task", "sst2,rte", "--data", str(only_sst2)], "RTE")  # before a run
    refused(capsys, [*more, "--init", str(learned[0]), "--r", "2"], "does not fit")
    assert contents(tmp_path / "run") == before


@pytest.mark.slow
def test_a_table_takes_one_seed_more(argv, capsys):
    first = train.main(argv("--seeds", "0,1", "--max-steps", 1))
    more = train.main(argv("--seeds", "0,1,2", "--max-steps", 1, "--resume"))
    assert more["tasks"]["sst2"]["scores"][:2] == first["tasks"]["sst2"]["scores"]
    assert len(more["runs"]) == 3 and capsys.readouterr().out.count("has ended") == 2
    refused(capsys, argv("--seeds", "0,1", "--max-steps", 1, "--lr", "0.5", "--resume"),
            "lr was 0.003, is 0.5")


@pytest.mark.slow
def test_a_table_and_a_single_run_do_not_go_on_in_each_other(argv, tmp_path, capsys):
    out = tmp_path / "run"
    train.main(argv("--max-steps", 1))
    before = contents(out)
    refused(capsys, argv("--seeds", "0,1", "--max-steps", 1, "--resume"), "a single run")
    assert contents(out) == before
    train.main(argv("--seeds", "0,1", "--max-steps", 1, "--overwrite"))
    assert not (out / "trained.safetensors").exists()
    refused(capsys, argv("--max-steps", 1, "--resume"), "cannot go on")
    refused(capsys, ["--out", str(out), "--predict", "a film"], "trained.safetensors")
