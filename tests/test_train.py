"""train.py as its users meet it: main(argv) with a tiny random T5 on small GLUE folders."""
import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import data
import methods
import prune
import train
from model import SENTINELS, T5, T5Config, load_t5, save_t5
from run import report
from run.folder import trainable
from run.tasks import some
from side import LadderT5
from workshop import ROOT, WIDTHS, contents, interrupt_at, logged, refused, spy, without

slow = pytest.mark.slow
BATCH = (torch.tensor([[5, 6, 7, 1]]), torch.ones(1, 4, dtype=torch.bool), torch.tensor([[0, 9]]))


def trained(out):
    return load_file(out / "trained.safetensors")


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# ---------------------------------------------------------------------------------------- results

def test_main_returns_what_results_json_holds(learned, backbone):
    out, results = learned
    keys = "task model method data seed trainable_params total_params trainable_percent steps " \
           "seconds peak_memory_bytes val test best_epoch gates config command versions hardware"
    assert set(keys.split()) <= results.keys()
    assert results == json.loads((out / "results.json").read_text())
    assert [results[key] for key in "task method data seed steps".split()] == [
        "sst2", "lst", "glue", 0, 10 * 11]
    assert results["peak_memory_bytes"] > 10**7 and results["seconds"] > 0
    # scores are in percent, and so is what trains, of the backbone
    assert 75 <= results["val"]["score"] <= 100 and 75 <= results["test"]["score"] <= 100
    assert results["test"]["score"] == results["test"]["accuracy"]
    total = sum(p.numel() for p in load_t5(backbone).parameters())
    assert results["trainable_params"] == sum(tensor.numel() for tensor in trained(out).values())
    assert results["total_params"] == total
    assert results["trainable_percent"] == pytest.approx(100 * results["trainable_params"] / total)


def test_training_lowers_the_loss(learned, argv, tmp_path):
    train.main(argv("--method", "full", "--epochs", 12, "--lr", "3e-3"))
    for out in (learned[0], tmp_path / "run"):
        losses = logged(out, "loss")
        assert sum(losses[-3:]) < 0.4 * sum(losses[:3])


PAPERS = {"lst": 3e-3, "full": 3e-4, "adapters": 3e-4, "lora": 3e-4, "bitfit": 3e-4, "prompt": 3e-1}


@pytest.mark.parametrize("method", PAPERS)
def test_each_method_has_the_papers_learning_rate_and_saves_what_trains(argv, tmp_path, backbone,
                                                                        method):
    results, t5 = train.main(argv("--method", method, "--max-steps", 1)), load_t5(backbone)
    before, total = dict(t5.named_parameters()), sum(p.numel() for p in t5.parameters())
    net = LadderT5(t5, r=4) if method == "lst" else methods.apply(t5, method)
    saved = trained(tmp_path / "run")
    assert saved.keys() == trainable(net).keys() and results["config"]["lr"] == PAPERS[method]
    assert results["trainable_params"] == sum(p.numel() for p in trainable(net).values())
    assert results["total_params"] == total
    assert results["trainable_percent"] == pytest.approx(100 * results["trainable_params"] / total)
    if method == "full":
        assert results["trainable_percent"] == 100 and saved.keys() == before.keys()
        assert not any(torch.equal(saved[name], before[name]) for name in before
                       if "pos_bias" not in name)


@pytest.mark.parametrize("task, prompts", [("stsb", "paper"), ("mnli", "t5"), *(
    pytest.param(task, prompts, marks=slow) for task in data.TASKS for prompts in ("paper", "t5")
    if (task, prompts) not in (("stsb", "paper"), ("mnli", "t5")))])
def test_every_task_trains_and_answers(argv, tmp_path, capsys, task, prompts):
    results = train.main(argv("--task", task, "--prompts", prompts, "--max-steps", 1,
                              "--batch-size", 96))
    assert results["task"] == task and "score" in results["test"]
    capsys.readouterr()
    text = " | ".join(["a good film"] * len(data.TASKS[task].fields))
    train.main(["--out", str(tmp_path / "run"), "--predict", text])
    assert capsys.readouterr().out.count("\n") == 1


@slow
def test_the_bundled_backbone_trains_with_hardly_an_option(glue, tmp_path):
    results = train.main(["--task", "sst2", "--data", str(glue), "--out", str(tmp_path / "run"),
                          "--max-steps", "2", "--fisher-samples", "4"])
    assert results["model"] == "nano" and results["steps"] == 2
    train.load(tmp_path / "run")


def test_what_is_printed_fits_80_columns(argv, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(report, "hardware", lambda _: "2 threads of Intel(R) Xeon(R) Processor")
    train.main(argv("--max-steps", 3))
    lines = capsys.readouterr().out.splitlines()
    lines = [line for line in lines if str(tmp_path.parent) not in line]
    assert len(lines) > 8 and max(map(len, lines)) <= 80, max(lines, key=len)


# ------------------------------------------------------------------------------ Sec. 3.1: frozen

def test_the_backbone_stays_byte_identical_and_is_not_saved(argv, monkeypatch, backbone, tmp_path):
    evaluated = spy(monkeypatch, train, "evaluate")
    train.main(argv("--lr", "1e-2"))
    for name, p in load_t5(backbone).named_parameters():
        after = evaluated[-1][0].backbone.get_parameter(name)
        assert torch.equal(p, after) and after.grad is None, name
    names = {name for name, _ in LadderT5(load_t5(backbone), r=4).named_parameters()}
    assert trained(tmp_path / "run").keys() == {n for n in names if not n.startswith("backbone.")}


# -------------------------------------------------------------------------------------- load back

def test_a_run_loads_back_to_its_score(learned, glue):
    out, results = learned
    model, tokenizer = train.load(out)
    args, test = argparse.Namespace(**results["config"]), data.TASKS["sst2"].load(str(glue)).test
    assert not model.training
    assert train.evaluate(model, tokenizer, args, {"sst2": test}) == results["test"]


SIDES = [f"--side {side} --r 4" for side in methods.SIDES]


@pytest.mark.parametrize("more", [
    *(f"--method {method}" for method in (*methods.METHODS, "y-tuning")), "--classify", *SIDES,
    *(pytest.param(more, marks=slow) for more in (
        "--method lora --as-authors", "--method prompt --as-authors", "--method full --freeze 3",
        "--method y-tuning --dtype bf16", "--classify --checkpoint", "--init distill",
        "--method bitfit --freeze 1", "--dtype bf16", "--keep 1", "--checkpoint",
        *(f"{side} --keep 1 --dtype bf16 --checkpoint" for side in SIDES),
        "--method adapters --size 4", "--method lora --size 2", "--method prompt --size 7",
        "--method adapters --dtype bf16", "--method lora --checkpoint", "--prompts t5"))])
def test_each_kind_of_run_loads_back_to_its_logits(argv, tmp_path, monkeypatch, more):
    evaluated = spy(monkeypatch, train, "evaluate")
    train.main(argv("--lr", "1e-2", *more.split()))
    model, _ = train.load(tmp_path / "run")
    assert torch.equal(model(*BATCH), evaluated[-1][0].eval()(*BATCH))


# ------------------------------------------------------------------------------------------- loop

@pytest.mark.parametrize("more", [
    "--init fisher --fisher-samples 4", "--method adapters --lr 1e-30 --max-steps 1",
    "--method lora --lr 1e-30 --max-steps 1",  # a step too small to change a weight
    pytest.param("--method prompt --as-authors --lr 1e-30 --max-steps 1", marks=slow)])
def test_the_same_seed_gives_the_same_losses_and_weights(argv, tmp_path, more):
    losses, weights = [], []
    for out, seed in (("a", 0), ("b", 0), ("c", 1)):
        train.main(argv(*more.split(), "--seed", seed, "--out", tmp_path / out))
        losses.append(logged(tmp_path / out, "loss"))
        weights.append(trained(tmp_path / out))
    assert losses[0] == losses[1] != losses[2]
    assert equal(weights[0], weights[1]) and not equal(weights[0], weights[2])


@pytest.mark.parametrize("method", ["lst", pytest.param("full", marks=slow)])
def test_checkpointing_changes_no_loss(argv, tmp_path, method):
    for out, more in (("plain", ()), ("checkpointed", ("--checkpoint",))):
        train.main(argv("--method", method, "--out", tmp_path / out, *more))
    losses = logged(tmp_path / "plain", "loss")
    assert logged(tmp_path / "checkpointed", "loss") == pytest.approx(losses)


def test_the_learning_rate_warms_up_and_decays_linearly(argv, tmp_path):
    rates = [train.learning_rate(step, peak=6.0, warmup=4, total=10) for step in range(10)]
    assert rates == [1.5, 3.0, 4.5, 6.0, 6.0, 5.0, 4.0, 3.0, 2.0, 1.0]
    assert [train.learning_rate(step, 6.0, 0, 3) for step in range(3)] == [6.0, 4.0, 2.0]
    # a short run never reaches the peak
    assert [train.learning_rate(step, 6.0, 6, 3) for step in range(3)] == [1.0, 2.0, 3.0]
    train.main(argv("--epochs", 3, "--lr", 0.006, "--warmup-steps", 2))
    assert logged(tmp_path / "run", "lr") == pytest.approx(
        [0.003, 0.006, 0.006, 0.0045, 0.003, 0.0015])


def test_max_steps_stops_early_and_still_evaluates(argv, tmp_path):
    results = train.main(argv("--epochs", 5, "--max-steps", 3))
    assert results["steps"] == 3 and len(logged(tmp_path / "run", "loss")) == 3
    assert len(logged(tmp_path / "run", "val")) == 2
    assert "score" in results["val"] and "score" in results["test"]


def test_an_epoch_takes_every_row_once_and_each_step_starts_without_gradients(argv, monkeypatch):
    sizes, left = [], []

    def look(count, model, batch):
        sizes.append(len(batch.labels))
        left.extend(p for p in model.parameters() if p.grad is not None)

    spy(monkeypatch, train, "loss_of", look)
    train.main(argv("--max-train-rows", 37))
    assert sorted(sizes) == [5, 16, 16] and not left


@pytest.mark.parametrize("scores, best", [([50.0, 70.0, 60.0], 2), ([0.0, 0.0], 1)])
def test_the_first_best_epoch_is_kept_and_tested(argv, monkeypatch, scores, best):
    seen, scores = [], [*scores, 33.0]

    def score(count, model, *_):
        seen.append([p.clone() for p in model.parameters() if p.requires_grad])
        value = scores[count - 1]
        return {"accuracy": value, "score": value, "invalid": 0, "undefined": 0}

    spy(monkeypatch, train, "evaluate", score)
    results = train.main(argv("--epochs", len(scores) - 1))
    assert results["best_epoch"] == best
    assert (results["val"]["score"], results["test"]["score"]) == (scores[best - 1], 33)
    same = [all(torch.equal(p, q) for p, q in zip(epoch, seen[-1])) for epoch in seen[:-1]]
    assert same == [epoch == best for epoch in range(1, len(scores))]


def test_dropout_is_on_in_training_and_off_where_the_model_answers(argv, monkeypatch):
    modes, steps = [], []
    spy(monkeypatch, LadderT5, "generate", lambda count, model, *_: modes.append(model.training))
    spy(monkeypatch, train, "loss_of", lambda count, model, batch: steps.append(model.training))
    train.main(argv("--epochs", 2))
    assert modes and not any(modes) and all(steps) and len(steps) == 4


# -------------------------------------------------------------------------- what goes wrong midway

def test_a_nan_loss_stops_the_run_and_leaves_the_last_good_files(argv, tmp_path, monkeypatch,
                                                                capsys):
    good, out = {}, tmp_path / "run"

    def spoil(count, model, batch):
        if count == 4:  # 2 steps an epoch
            good.update(contents(out))
            return torch.tensor(float("nan"), requires_grad=True)

    spy(monkeypatch, train, "loss_of", spoil)
    refused(capsys, argv("--epochs", 3, "--lr", 0.006, "--warmup-steps", 2), "nan", "step 4",
            "learning rate 4.50e-03", "--lr", code=1)
    now = contents(out)
    assert now[Path("trained.safetensors")] == good[Path("trained.safetensors")]
    assert Path("results.json") not in now and not list(out.glob("*.partial"))
    train.load(out)


def test_a_gradient_that_is_not_finite_stops_the_run(argv, tmp_path, monkeypatch, capsys):
    def spoil(count, model, batch):  # a finite loss with the gradient inf * 0
        weight = next(p for p in model.parameters() if p.requires_grad)
        return 1 + (weight.sum() * 0).sqrt()

    spy(monkeypatch, train, "loss_of", spoil)
    refused(capsys, argv("--max-steps", 1), "step 1", code=1)
    assert not (tmp_path / "run" / "trained.safetensors").exists()


def test_constant_answers_get_a_warning(argv, monkeypatch, capsys):
    for answers, warned in ((lambda i: "1", True), (lambda i: str(i % 2), False)):
        monkeypatch.setattr(data.Task, "answer", lambda self, model, tokenizer, batch: [
            answers(i) for i in range(len(batch.labels))])
        train.main(argv("--max-steps", 1, "--overwrite"))
        assert ("warning: every answer is '1'" in capsys.readouterr().out) == warned


@pytest.mark.parametrize("name, number, steps, kept", [
    ("loss_of", 2, 1, "no weights were kept"), ("loss_of", 4, 3, "epoch 1"),
    ("evaluate", 4, 6, "is kept in")])  # the fourth time is the test
def test_ctrl_c_ends_with_one_line_and_says_what_is_kept(argv, tmp_path, monkeypatch, capsys, name,
                                                         number, steps, kept):
    spy(monkeypatch, train, name, interrupt_at(number))
    with pytest.raises(SystemExit) as stop:
        train.main(argv("--epochs", 3))
    said, out = capsys.readouterr(), tmp_path / "run"
    assert stop.value.code == 130 and said.err == "interrupted\n"
    assert f"stopped after {steps} of 6 steps" in said.out and kept in said.out
    assert f"--resume --out {out}" in said.out
    assert len(logged(out, "loss")) == steps
    if steps > 1:
        assert f"is kept in {out}" in said.out
        train.load(out)
    else:
        assert sorted(path.name for path in contents(out)) == ["config.json", "metrics.jsonl"]


def test_ctrl_c_during_the_fisher_pass_leaves_everything_as_it_was(argv, tmp_path, monkeypatch,
                                                                   capsys):
    train.main(argv("--max-steps", 1))
    before = contents(tmp_path / "run")

    def stop_fisher(count, progress, *_):
        if "Fisher" in progress.title:
            raise KeyboardInterrupt

    spy(monkeypatch, report.Progress, "step", stop_fisher)
    for more in (("--overwrite",), ("--out", tmp_path / "new")):
        with pytest.raises(SystemExit) as stop:
            train.main(argv("--init", "fisher", *more))
        assert stop.value.code == 130
    assert contents(tmp_path / "run") == before and not (tmp_path / "new").exists()


def test_ctrl_c_in_an_overwriting_run_leaves_the_old_weights_or_none(argv, tmp_path, monkeypatch,
                                                                     capsys):
    train.main(argv("--max-steps", 1))
    path = tmp_path / "run" / "trained.safetensors"
    old = path.read_bytes()
    spy(monkeypatch, train, "loss_of", interrupt_at(1))
    with pytest.raises(SystemExit):
        train.main(argv("--seed", 1, "--overwrite"))
    said = capsys.readouterr().out
    assert not path.exists() or (path.read_bytes() == old and "no weights were kept" not in said)


@slow
def test_a_real_ctrl_c_ends_without_a_traceback(argv, tmp_path):
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "train.py"), *argv("--epochs", 10**6)], text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))  # ignored in a background
    for line in process.stdout:
        if line.startswith("epoch 2:"):
            break
    process.send_signal(signal.SIGINT)
    said, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and errors == "interrupted\n" and "is kept in" in said
    train.load(tmp_path / "run")


# ------------------------------------------------------------------------------------- the ladder

@pytest.mark.parametrize("mode", ["published", "aligned"])
def test_init_starts_from_the_pruned_backbone(argv, tmp_path, backbone, mode):
    train.main(argv("--init", "magnitude", "--prune", mode, "--lr", "1e-30", "--max-steps", 1))
    ladder = LadderT5(load_t5(backbone), r=4)
    prune.init_side(ladder, prune.magnitude(ladder.backbone), mode)
    start = trained(tmp_path / "run")
    assert all(torch.equal(p, start[name]) for name, p in ladder.named_parameters()
               if ".block." in name and name in start)


def test_the_fisher_pass_takes_random_training_rows_once_each(backbone, glue, monkeypatch):
    tokenizer, asked = train.load_tokenizer(str(backbone)), []
    rows = data.TASKS["sst2"].encode(data.TASKS["sst2"].load(str(glue)).train, tokenizer)
    for count, seed in ((40, 0), (40, 0), (40, 1), (10**6, 0)):
        batches = list(some({"sst2": rows}, count, seed, "cpu"))
        asked.append(sorted(ids[mask].tolist() for batch in batches
                            for ids, mask in zip(batch.source_ids, batch.source_mask)))
        assert max(len(batch.labels) for batch in batches) == 32
    assert asked[0] == asked[1] != asked[2] and len(asked[0]) == len(asked[2]) == 40
    assert asked[3] == sorted(row.source for row in rows)


@slow
def test_the_three_inits_start_differently(argv, tmp_path):
    starts = []
    for init in ("random", "magnitude", "fisher --fisher-samples 8"):
        out = tmp_path / init.split()[0]
        train.main(argv("--init", *init.split(), "--lr", "1e-30", "--max-steps", 1, "--out", out))
        starts.append(trained(out)["encoder.blocks.0.block.feed_forward.wi.weight"])
    assert not any(torch.equal(starts[a], starts[b]) for a, b in ((0, 1), (1, 2), (2, 0)))


def test_keep_gives_a_rung_to_the_kept_layers_only(argv, capsys):
    results = train.main(argv("--keep", "1", "--max-steps", 1))
    assert [len(results["gates"][stack]) for stack in ("encoder", "decoder")] == [1, 1]
    said = capsys.readouterr().out
    assert "encoder layer  1" in said and "layer  0" not in said


# ------------------------------------------------------------------------------------- the folder

def test_runs_that_start_together_do_not_share_a_folder(argv, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    another = without("--out", argv("--max-steps", 1))

    def start_another(count, *_):  # while ours loads its data
        if count == 1:
            train.main(another)

    spy(monkeypatch, train, "initialize", start_another)
    train.main(another)
    folders = sorted((tmp_path / "runs").iterdir())
    assert [(folder / "results.json").is_file() for folder in folders] == [True, True]


@pytest.mark.parametrize("out", ["a file", "a file/run", "/dev/null/run"])
def test_an_out_that_cannot_be_a_folder_is_refused_before_the_fisher_pass(argv, tmp_path, capsys,
                                                                         monkeypatch, out):
    (tmp_path / "a file").write_text("text\n")
    spy(monkeypatch, train, "initialize", lambda *_: pytest.fail("minutes of work for no folder"))
    refused(capsys, argv("--out", tmp_path / out), str(tmp_path / out))
    assert (tmp_path / "a file").read_text() == "text\n"


# ----------------------------------------------------------------------------------- the fallback

@pytest.fixture
def offline(monkeypatch, tmp_path):
    """Nothing listens on port 9, and the cache is empty."""
    monkeypatch.setenv("GLUE_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(data, "CACHE", str(tmp_path / "cache"))


@slow
def test_without_a_network_sst2_trains_on_the_bundled_sample_and_says_so(argv, offline, tmp_path,
                                                                        capsys):
    results = train.main(without("--data", argv("--max-steps", 1, "--batch-size", 100)))
    said = capsys.readouterr().out
    assert "THIS IS NOT SST-2" in said and "127.0.0.1:9" in said
    assert results["data"] == "bundled-sample" and "127.0.0.1:9" in results["fallback"]
    held = json.loads((tmp_path / "run" / "results.json").read_text())
    assert held["data"] == "bundled-sample"


def test_other_tasks_say_where_to_put_which_file(argv, offline, tmp_path, capsys):
    refused(capsys, without("--data", argv("--task", "rte")), "127.0.0.1:9", "--data DIR", "RTE")
    refused(capsys, argv("--task", "rte", "--data", "sample"), "--data sample is for sst2")
    assert not (tmp_path / "run").exists()


# -------------------------------------------------------------------------------- the wrong files

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 242043056\n"
FOREIGN = {"missing": None, "empty": b"", "git-lfs": LFS, "html": b"<!DOCTYPE html><html>\n",
           "zeros": b"\x00" * 64, "list": b"[1]"}


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "spiece.model"])
def test_a_foreign_or_cut_file_in_the_backbone_is_refused(argv, backbone, tmp_path, capsys, name):
    copy = shutil.copytree(backbone, tmp_path / "copy")
    whole = (copy / name).read_bytes()
    cuts = [whole[:cut] for cut in (1, 8, 9, 100, len(whole) // 3, len(whole) // 2, len(whole) - 3)]
    for content in (*FOREIGN.values(), *cuts):
        (copy / name).unlink(missing_ok=True)
        if content is not None:
            (copy / name).write_bytes(content)
        refused(capsys, argv("--model", copy), name)
    assert not (tmp_path / "run").exists()


def test_a_tokenizer_that_does_not_fit_its_model_is_refused(argv, backbone, tmp_path, capsys):
    copy = shutil.copytree(backbone, tmp_path / "copy")
    save_t5(T5(T5Config(vocab_size=SENTINELS, **WIDTHS)), copy)
    refused(capsys, argv("--model", copy), "spiece.model", "vocab_size")


@pytest.mark.parametrize("lines, words", [
    ([], ("train.tsv has 0 rows",)), (["sentence\tlabel"], ("0 rows",)),
    (["sentence\tlabel", "one\t1"], ("1 rows",)), (["text\tclass", "a\t0"], ("line 1", "sentence")),
    (["sentence\tlabel", *["fine\t1"] * 9, "no label"], ("line 11", "1 of 2 columns")),
    (["sentence\tlabel", "a\t0", "b\t7"], ("line 3", "'7'")), (["<!DOCTYPE html>"], ("line 1",)),
    (["sentence\tlabel", "caf\udce9\t1"], ("line 2", "UTF-8"))],
    ids=["empty", "header only", "one row", "columns", "no label", "label 7", "html", "latin-1"])
def test_a_malformed_file_is_refused_with_its_line(argv, glue, tmp_path, capsys, lines, words):
    folder = shutil.copytree(glue, tmp_path / "glue")
    text = "".join(line + "\n" for line in lines)
    (folder / "SST-2" / "train.tsv").write_bytes(text.encode("utf-8", "surrogateescape"))
    refused(capsys, argv("--data", folder), *words)
    assert not (tmp_path / "run").exists()
