"""train.py as its users meet it: main(argv) with a T5 of some ten thousand random weights, on small GLUE folders made here."""

import argparse
import io
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import sentencepiece as spm
import torch
from safetensors.torch import load_file, save_file

import baselines
import checkpoint
import data
import prune
import tasks
import report
import train
from model import NANO, SENTINELS, T5, T5Config, load_t5, save_t5
from side import LadderT5
from workshop import SENTENCES, WIDTHS, contents, logged, refused, without, write

ROOT = Path(train.__file__).parent
needs_nano = pytest.mark.skipif(not (NANO / "model.safetensors").is_file(), reason="assets/nano is not there")
needs_sample = pytest.mark.skipif(not (data.SAMPLE / "SST-2" / "train.tsv").is_file(), reason="assets/sample is not there")
LEARN = ("--epochs", 16, "--max-train-rows", 96, "--lr", "1e-2", "--warmup-steps", 10, "--batch-size", 8, "--init", "fisher", "--fisher-samples", 8)


@pytest.fixture(scope="session")
def learned(backbone, glue, tmp_path_factory):
    """(folder, results) of an LST run that has learned the easy task."""
    out = tmp_path_factory.mktemp("learned") / "run"
    results = train.main(["--task", "sst2", "--model", str(backbone), "--data", str(glue), "--out", str(out), "--r", "4", "--device", "cpu",
                          *map(str, LEARN)])
    return out, results


def calls(monkeypatch, name, on_call):
    """train.<name> runs on_call(number, *arguments) first, counting from 1; what that returns, if anything, is the result."""
    original, count = getattr(train, name), 0

    def counted(*arguments):
        nonlocal count
        count += 1
        instead = on_call(count, *arguments)
        return original(*arguments) if instead is None else instead

    monkeypatch.setattr(train, name, counted)


def interrupt_at(number):
    def on_call(count, *_):
        if count == number:
            raise KeyboardInterrupt
    return on_call


def stop_with_130(capsys, argv):
    """main(argv) ends as after Ctrl-C; gives what it printed on stdout."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        train.main(argv)
    said = capsys.readouterr()
    assert stop.value.code == 130 and said.err == "interrupted\n"
    return said.out


# --------------------------------------------------------------------------------------------------------------- results

def test_main_returns_what_results_json_holds(learned):
    out, results = learned
    keys = "task model method data seed trainable_params total_params trainable_percent steps seconds peak_memory_bytes val test"
    assert not set(keys.split()) - results.keys()
    assert results == json.loads((out / "results.json").read_text())
    assert (results["task"], results["method"], results["data"], results["seed"], results["steps"]) == ("sst2", "lst", "glue", 0, 16 * 11)
    assert results["peak_memory_bytes"] > 10**7 and results["seconds"] > 0


def test_a_score_is_in_percent(learned):
    _, results = learned
    assert 75 <= results["val"]["score"] <= 100 and 75 <= results["test"]["score"] <= 100
    assert results["test"]["score"] == results["test"]["accuracy"]


def test_trainable_percent_is_trainable_over_backbone(learned, backbone):
    out, results = learned
    assert results["trainable_params"] == sum(tensor.numel() for tensor in load_file(out / "trained.safetensors").values())
    assert results["total_params"] == sum(p.numel() for p in load_t5(backbone).parameters())
    assert results["trainable_percent"] == pytest.approx(100 * results["trainable_params"] / results["total_params"])


def test_training_lowers_the_loss(learned, argv, tmp_path):
    train.main(argv("--method", "full", "--epochs", 12, "--lr", "3e-3"))
    for out in (learned[0], tmp_path / "run"):
        losses = logged(out, "loss")
        assert sum(losses[-3:]) < 0.4 * sum(losses[:3])


def test_full_fine_tuning_trains_every_parameter(argv, tmp_path, backbone):
    results = train.main(argv("--method", "full", "--max-steps", 1))
    before, after = dict(load_t5(backbone).named_parameters()), load_file(tmp_path / "run" / "trained.safetensors")
    assert results["trainable_percent"] == 100 and after.keys() == before.keys()
    assert not any(torch.equal(after[name], before[name]) for name in before if "pos_bias" not in name)


@pytest.mark.parametrize("method", baselines.METHODS[1:])
def test_a_baseline_saves_what_trains_and_counts_it_against_the_backbone_alone(argv, tmp_path, backbone, method):
    results, t5 = train.main(argv("--method", method, "--max-steps", 1)), load_t5(backbone)
    total, added = sum(p.numel() for p in t5.parameters()), checkpoint.trainable(baselines.apply(t5, method))
    saved = load_file(tmp_path / "run" / "trained.safetensors")
    assert saved.keys() == added.keys() and results["trainable_params"] == sum(p.numel() for p in added.values())
    assert results["total_params"] == total and results["trainable_percent"] == pytest.approx(100 * results["trainable_params"] / total)


@pytest.mark.parametrize("method, lr", [("lst", 3e-3), ("full", 3e-4), ("adapters", 3e-4), ("lora", 3e-4), ("bitfit", 3e-4), ("prompt", 3e-1)])
def test_each_method_has_the_learning_rate_of_the_paper(argv, method, lr):
    assert train.main(argv("--method", method, "--max-steps", 1))["config"]["lr"] == lr


@pytest.mark.parametrize("task", data.TASKS)
@pytest.mark.parametrize("prompts", ["paper", pytest.param("t5", marks=pytest.mark.slow)])
def test_every_task_trains_and_answers(argv, tmp_path, capsys, task, prompts):
    results = train.main(argv("--task", task, "--prompts", prompts, "--max-steps", 1, "--batch-size", 96))
    assert results["task"] == task and "score" in results["test"]
    capsys.readouterr()
    train.main(["--out", str(tmp_path / "run"), "--predict", " | ".join(["a good film"] * len(data.TASKS[task].fields))])
    assert capsys.readouterr().out.count("\n") == 1


@needs_nano
def test_the_bundled_backbone_trains(glue, tmp_path):
    results = train.main(["--task", "sst2", "--data", str(glue), "--out", str(tmp_path / "run"), "--max-steps", "2", "--fisher-samples", "4"])
    assert results["model"] == "nano" and results["steps"] == 2
    train.load(tmp_path / "run")


# ------------------------------------------------------------------------------------------------------ Sec. 3.1: frozen

def test_the_backbone_stays_byte_identical(argv, monkeypatch, backbone):
    models = []
    calls(monkeypatch, "evaluate", lambda count, model, *_: models.append(model))
    train.main(argv("--lr", "1e-2"))
    for name, p in load_t5(backbone).named_parameters():
        after = models[-1].backbone.get_parameter(name)
        assert torch.equal(p, after) and after.grad is None, name


def test_only_the_side_network_is_saved(learned, backbone):
    out, _ = learned
    side = {name for name, _ in LadderT5(load_t5(backbone), r=4).named_parameters() if not name.startswith("backbone.")}
    assert load_file(out / "trained.safetensors").keys() == side


# ------------------------------------------------------------------------------------------------- load back and predict

def test_a_run_loads_back_to_its_score(learned, glue):
    out, results = learned
    model, tokenizer = train.load(out)
    assert not model.training
    assert train.evaluate(model, tokenizer, argparse.Namespace(**results["config"]), {"sst2": data.load("sst2", str(glue)).test}) == results["test"]


@pytest.mark.parametrize("more", [*(("--method", method) for method in baselines.METHODS), ("--method", "lora", "--as-authors"),
                                  ("--method", "prompt", "--as-authors"), ("--method", "full", "--freeze", 3), ("--method", "bitfit", "--freeze", 1),
                                  ("--dtype", "bf16"), ("--gates", "shut"), ("--keep", "1"), *(pytest.param(more, marks=pytest.mark.slow) for more in (
                                      ("--method", "adapters", "--dtype", "bf16"), ("--method", "lora", "--checkpoint"), ("--checkpoint",), ("--prompts", "t5")))])
def test_each_kind_of_run_loads_back_to_its_logits(argv, tmp_path, monkeypatch, more):
    models = []
    calls(monkeypatch, "evaluate", lambda count, model, *_: models.append(model))
    train.main(argv("--lr", "1e-2", *more))
    model, _ = train.load(tmp_path / "run")
    batch = torch.tensor([[5, 6, 7, 1]]), torch.ones(1, 4, dtype=torch.bool), torch.tensor([[0, 9]])
    assert torch.equal(model(*batch), models[-1].eval()(*batch))


def test_predict_needs_only_the_folder(learned, capsys):
    out, _ = learned
    for text, answer in (("the great plot", "positive"), ("the dull plot", "negative")):
        capsys.readouterr()
        assert train.main(["--out", str(out), "--predict", text])["label"] == ("negative", "positive").index(answer)
        assert capsys.readouterr().out == f"{answer}\n"


def test_a_pair_is_predicted_from_two_parts(argv, tmp_path, capsys):
    train.main(argv("--task", "rte", "--max-steps", 1))
    predict = ["--out", str(tmp_path / "run"), "--predict"]
    capsys.readouterr()
    train.main([*predict, "a good film | a bad film"])
    assert capsys.readouterr().out.count("\n") == 1
    refused(capsys, [*predict, "a good film"], "sentence1 and sentence2", "A | B")
    refused(capsys, [*predict, "a | b | c"], "3 of 2 parts")


@pytest.mark.parametrize("text", ["", " ", "\x00\x07\x1b[31m\x7f", "\n\n\t", "<extra_id_0> <extra_id_99>", "</s><pad>", "電影 🎬", "word " * 5000])
def test_any_text_gets_one_line(learned, capsys, text):
    out, _ = learned
    capsys.readouterr()
    train.main(["--out", str(out), "--predict", text])
    assert capsys.readouterr().out.count("\n") == 1


def test_a_text_that_is_no_utf8_is_refused(learned, capsys):
    refused(capsys, ["--out", str(learned[0]), "--predict", "caf\udce9"])


def moved(argv, backbone, tmp_path):
    """A run on a copy of the backbone, which a test may then change: (the copy, the run)."""
    copy = shutil.copytree(backbone, tmp_path / "copy")
    train.main(argv("--model", copy, "--max-steps", 1))
    return copy, tmp_path / "run"


def test_a_changed_backbone_is_refused(argv, backbone, tmp_path, capsys):
    copy, out = moved(argv, backbone, tmp_path)
    torch.manual_seed(1)
    save_t5(T5(T5Config.from_json(copy / "config.json")), copy)
    with pytest.raises(ValueError, match="not the one of"):
        train.load(out)
    refused(capsys, ["--out", str(out), "--predict", "a film"], str(copy), "sha256")


def test_a_changed_tokenizer_is_refused(argv, backbone, tmp_path):
    copy, out = moved(argv, backbone, tmp_path)
    spm.SentencePieceTrainer.train(sentence_iterator=iter([text for text, _ in SENTENCES] * 3), model_prefix=str(copy / "spiece"), vocab_size=50,
                                   hard_vocab_limit=False, pad_id=0, eos_id=1, unk_id=2, bos_id=-1, minloglevel=2)
    with pytest.raises(ValueError):
        train.load(out)


def test_a_changed_config_of_the_backbone_is_refused(argv, backbone, tmp_path):
    copy, out = moved(argv, backbone, tmp_path)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"layer_norm_epsilon": 0.9}))  # fits the weights and means another model
    with pytest.raises(ValueError):
        train.load(out)


def test_a_backbone_that_is_gone_is_refused(argv, backbone, tmp_path, capsys):
    copy, out = moved(argv, backbone, tmp_path)
    (copy / "model.safetensors").unlink()
    refused(capsys, ["--out", str(out), "--predict", "a film"], f"{copy}/model.safetensors")
    shutil.rmtree(copy)
    refused(capsys, ["--out", str(out), "--predict", "a film"], str(copy))


def test_a_damaged_run_is_refused(learned, tmp_path, capsys):
    whole = (learned[0] / "trained.safetensors").read_bytes()
    path = tmp_path / "trained.safetensors"
    for cut in (0, 1, 7, 8, 9, 100, 2000, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:cut])
        refused(capsys, ["--out", str(tmp_path), "--predict", "a film"], str(path))
    for foreign in (b"version https://git-lfs.github.com/spec/v1\n", b"<!DOCTYPE html><html>", whole + b"0"):
        path.write_bytes(foreign)
        refused(capsys, ["--out", str(tmp_path), "--predict", "a film"], str(path))


def test_a_header_with_a_wrong_byte_never_ends_in_a_traceback(learned, tmp_path, capsys):
    whole = bytearray((learned[0] / "trained.safetensors").read_bytes())
    shutil.copytree(learned[0], tmp_path / "run")
    for position in [*range(0, 60), *range(60, int.from_bytes(whole[:8], "little"), 211)]:
        damaged = bytearray(whole)
        damaged[position] ^= 0x15
        (tmp_path / "run" / "trained.safetensors").write_bytes(damaged)
        try:
            train.main(["--out", str(tmp_path / "run"), "--predict", "a film"])
        except SystemExit as stop:
            assert stop.code == 2
    assert all(line.startswith("error: ") for line in capsys.readouterr().err.splitlines())


@pytest.mark.parametrize("change", [
    {"task": None}, {"task": "foo"}, {"task": []}, {"model": None}, {"model": 5}, {"model": "gone"}, {"method": None}, {"method": "foo"}, {"method": 1},
    {"r": None}, {"r": "4"}, {"r": 0}, {"r": 3}, {"keep": 5}, {"keep": ["a"]}, {"keep": [7]}, {"dtype": None}, {"dtype": 1}, {"dtype": []},
    {"gates": None}, {"gates": 3}, {"prompts": None}, {"prompts": 3}, {"prompts": "foo"}, {"backbone_sha256": None}, {"backbone_sha256": 5},
    {"freeze": "1"}, {"as_authors": 1}, {"checkpoint": "no"}, {"method": "lora"},
], ids=str)
def test_a_run_with_a_wrong_config_inside_is_refused(learned, tmp_path, capsys, change):
    """None: the key is missing."""
    config = {name: value for name, value in (learned[1]["config"] | change).items() if value is not None or name not in change}
    save_file(load_file(learned[0] / "trained.safetensors"), tmp_path / "trained.safetensors", metadata={"config": json.dumps(config)})
    refused(capsys, ["--out", str(tmp_path), "--predict", "a film"])


def test_a_run_from_before_the_baselines_still_loads(learned, tmp_path):
    config = {name: value for name, value in learned[1]["config"].items() if name not in ("as_authors", "freeze", "checkpoint")}
    save_file(load_file(learned[0] / "trained.safetensors"), tmp_path / "trained.safetensors", metadata={"config": json.dumps(config)})
    train.load(tmp_path)


@pytest.mark.parametrize("metadata", [None, {}, {"config": ""}, {"config": "[]"}, {"config": "{}"}, {"config": "5"}, {"config": "null"},
                                      {"config": "[" * 10**5}], ids=lambda metadata: str(metadata)[:20])
def test_weights_without_a_config_are_refused(learned, tmp_path, capsys, metadata):
    save_file(load_file(learned[0] / "trained.safetensors"), tmp_path / "trained.safetensors", metadata=metadata)
    refused(capsys, ["--out", str(tmp_path), "--predict", "a film"], "trained.safetensors")


def test_weights_of_another_shape_are_refused(learned, tmp_path, capsys):
    for r in (1, 2):
        save_file(load_file(learned[0] / "trained.safetensors"), tmp_path / "trained.safetensors",
                  metadata={"config": json.dumps(learned[1]["config"] | {"r": r})})
        refused(capsys, ["--out", str(tmp_path), "--predict", "a film"], "misshapen")


# ------------------------------------------------------------------------------------------------- the same seed, the loop

def test_the_same_seed_gives_the_same_losses_and_weights(argv, tmp_path):
    losses, weights = [], []
    for out, seed in (("a", 0), ("b", 0), ("c", 1)):
        train.main(argv("--out", tmp_path / out, "--seed", seed, "--init", "fisher", "--fisher-samples", 4))
        losses.append(logged(tmp_path / out, "loss"))
        weights.append(load_file(tmp_path / out / "trained.safetensors"))
    assert losses[0] == losses[1] != losses[2]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert not all(torch.equal(weights[0][name], weights[2][name]) for name in weights[0])


@pytest.mark.parametrize("more", [("adapters",), ("lora",), ("prompt", "--as-authors")])
def test_the_same_seed_gives_a_baseline_the_same_start(argv, tmp_path, more):
    starts = []
    for out, seed in (("a", 0), ("b", 0), ("c", 1)):
        train.main(argv("--method", *more, "--out", tmp_path / out, "--seed", seed, "--lr", "1e-30", "--max-steps", 1))
        starts.append(load_file(tmp_path / out / "trained.safetensors"))
    same = [all(torch.equal(starts[0][name], start[name]) for name in start) for start in starts]
    assert same == [True, True, False]


def test_checkpointing_changes_no_loss(argv, tmp_path):
    losses = []
    for method in ("lst", "full"):
        for more in ((), ("--checkpoint",)):
            train.main(argv("--method", method, "--out", tmp_path / f"{method}{len(more)}", *more))
            losses.append(logged(tmp_path / f"{method}{len(more)}", "loss"))
    assert losses[0] == pytest.approx(losses[1]) and losses[2] == pytest.approx(losses[3])


def test_the_learning_rate_warms_up_and_decays_linearly():
    rates = [train.learning_rate(step, peak=6.0, warmup=4, total=10) for step in range(10)]
    assert rates == [1.5, 3.0, 4.5, 6.0, 6.0, 5.0, 4.0, 3.0, 2.0, 1.0]
    assert [train.learning_rate(step, 6.0, 0, 3) for step in range(3)] == [6.0, 4.0, 2.0]
    assert [train.learning_rate(step, 6.0, 6, 3) for step in range(3)] == [1.0, 2.0, 3.0]  # a short run never reaches the peak


def test_the_steps_follow_the_schedule(argv, tmp_path):
    train.main(argv("--epochs", 3, "--lr", 0.006, "--warmup-steps", 2))
    assert logged(tmp_path / "run", "lr") == pytest.approx([0.003, 0.006, 0.006, 0.0045, 0.003, 0.0015])


def test_max_steps_stops_early_and_still_evaluates(argv, tmp_path):
    results = train.main(argv("--epochs", 5, "--max-steps", 3))
    assert results["steps"] == 3 and len(logged(tmp_path / "run", "loss")) == 3 and len(logged(tmp_path / "run", "val")) == 2
    assert "score" in results["val"] and "score" in results["test"]


def test_an_epoch_uses_every_row_once(argv, monkeypatch):
    sizes = []
    calls(monkeypatch, "loss_of", lambda count, model, batch: sizes.append(len(batch.labels)))
    train.main(argv("--max-train-rows", 37))
    assert sorted(sizes) == [5, 16, 16]


def test_each_step_starts_without_gradients(argv, monkeypatch):
    left = []
    calls(monkeypatch, "loss_of", lambda count, model, batch: left.extend(p for p in model.parameters() if p.grad is not None))
    train.main(argv())
    assert not left


def test_the_best_epoch_is_kept_and_tested(argv, monkeypatch):
    seen, scores = [], [50.0, 70.0, 60.0, 33.0]

    def score(count, model, *_):
        seen.append([p.clone() for p in model.parameters() if p.requires_grad])
        return {"accuracy": scores[count - 1], "score": scores[count - 1], "invalid": 0, "undefined": 0}

    calls(monkeypatch, "evaluate", score)
    results = train.main(argv("--epochs", 3))
    assert (results["best_epoch"], results["val"]["score"], results["test"]["score"]) == (2, 70, 33)
    assert all(torch.equal(p, q) for p, q in zip(seen[1], seen[3]))
    assert not all(torch.equal(p, q) for p, q in zip(seen[2], seen[3]))


def test_a_later_epoch_of_the_same_score_is_not_better(argv, monkeypatch):
    calls(monkeypatch, "evaluate", lambda *_: {"accuracy": 0.0, "score": 0.0, "invalid": 0, "undefined": 0})
    assert train.main(argv("--epochs", 2))["best_epoch"] == 1


def test_validation_is_scored_without_dropout(argv, monkeypatch):
    modes = []
    original = LadderT5.generate
    monkeypatch.setattr(LadderT5, "generate", lambda self, *more: modes.append(self.training) or original(self, *more))
    train.main(argv())
    assert modes and not any(modes)


# --------------------------------------------------------------------------------------------------- what goes wrong midway

def test_a_nan_loss_stops_the_run_and_leaves_the_last_good_files(argv, tmp_path, monkeypatch, capsys):
    good = {}

    def spoil(count, model, batch):
        if count == 4:  # 2 steps an epoch
            good.update(contents(tmp_path / "run"))
            return torch.tensor(float("nan"), requires_grad=True)

    calls(monkeypatch, "loss_of", spoil)
    refused(capsys, argv("--epochs", 3, "--lr", 0.006, "--warmup-steps", 2), "nan", "step 4", "learning rate 4.50e-03", "--lr", code=1)
    now = contents(tmp_path / "run")
    assert now[Path("trained.safetensors")] == good[Path("trained.safetensors")] and Path("results.json") not in now
    assert not any(path.name.endswith(".partial") for path in now)
    train.load(tmp_path / "run")


def test_a_gradient_that_is_not_finite_stops_the_run(argv, tmp_path, monkeypatch, capsys):
    def spoil(count, model, batch):  # a finite loss with the gradient inf * 0
        weight = next(p for p in model.parameters() if p.requires_grad)
        return 1 + (weight.sum() * 0).sqrt()

    calls(monkeypatch, "loss_of", spoil)
    refused(capsys, argv("--max-steps", 1), "step 1", code=1)
    assert not (tmp_path / "run" / "trained.safetensors").exists()


def test_constant_answers_get_a_warning(argv, monkeypatch, capsys):
    monkeypatch.setattr(tasks, "answer", lambda model, tokenizer, batch, task: ["1"] * len(batch.labels))
    train.main(argv("--max-steps", 1))
    assert capsys.readouterr().out.count("warning: every answer is '1'") >= 1
    monkeypatch.setattr(tasks, "answer", lambda model, tokenizer, batch, task: [str(i % 2) for i in range(len(batch.labels))])
    train.main(argv("--max-steps", 1, "--overwrite"))
    assert "warning" not in capsys.readouterr().out


def test_ctrl_c_before_the_first_epoch_ends_cleanly(argv, tmp_path, monkeypatch, capsys):
    calls(monkeypatch, "loss_of", interrupt_at(2))
    said = stop_with_130(capsys, argv("--epochs", 3))
    assert "stopped after 1 of 6 steps" in said and "no weights were kept" in said
    assert sorted(path.name for path in contents(tmp_path / "run")) == ["config.json", "metrics.jsonl"]
    json.loads((tmp_path / "run" / "config.json").read_text())
    assert len(logged(tmp_path / "run", "loss")) == 1


def test_ctrl_c_after_an_epoch_says_which_is_kept(argv, tmp_path, monkeypatch, capsys):
    calls(monkeypatch, "loss_of", interrupt_at(4))
    said = stop_with_130(capsys, argv("--epochs", 3))
    assert "stopped after 3 of 6 steps" in said and "epoch 1" in said and f"is kept in {tmp_path / 'run'}" in said
    train.load(tmp_path / "run")


def test_ctrl_c_while_the_test_is_scored_says_what_is_kept(argv, tmp_path, monkeypatch, capsys):
    calls(monkeypatch, "evaluate", interrupt_at(2))
    said = stop_with_130(capsys, argv())
    train.load(tmp_path / "run")
    assert f"is kept in {tmp_path / 'run'}" in said


def test_ctrl_c_during_the_fisher_pass_leaves_everything_as_it_was(argv, tmp_path, monkeypatch, capsys):
    train.main(argv("--max-steps", 1))
    before, original = contents(tmp_path / "run"), report.Progress.step

    def step(self, done, detail=""):
        if "Fisher" in self.title and done == 3:
            raise KeyboardInterrupt
        original(self, done, detail)

    monkeypatch.setattr(report.Progress, "step", step)
    stop_with_130(capsys, argv("--init", "fisher", "--overwrite"))
    assert contents(tmp_path / "run") == before
    stop_with_130(capsys, argv("--init", "fisher", "--out", tmp_path / "new"))
    assert not (tmp_path / "new").exists() or not contents(tmp_path / "new")


@pytest.mark.parametrize("error, words", [
    (RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory: you tried\nto allocate 1 bytes"), "--batch-size"),
    (torch.OutOfMemoryError("CUDA out of memory"), "--batch-size"), (OSError("no such\nfile"), "no such file")])
def test_what_the_user_can_mend_is_one_line(argv, monkeypatch, capsys, error, words):
    def fail(*arguments):
        raise error

    monkeypatch.setattr(train, "loss_of", fail)
    refused(capsys, argv("--max-steps", 1), words)


def test_ctrl_c_in_an_overwriting_run_leaves_the_old_weights_or_none(argv, tmp_path, monkeypatch, capsys):
    train.main(argv("--max-steps", 1))
    old = (tmp_path / "run" / "trained.safetensors").read_bytes()
    calls(monkeypatch, "loss_of", interrupt_at(1))
    said = stop_with_130(capsys, argv("--seed", 1, "--overwrite"))
    path = tmp_path / "run" / "trained.safetensors"
    assert not path.exists() or (path.read_bytes() == old and "no weights were kept" not in said)


@pytest.mark.slow
def test_a_real_ctrl_c_ends_without_a_traceback(argv, tmp_path):
    process = subprocess.Popen([sys.executable, str(ROOT / "train.py"), *argv("--epochs", 10**6)], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               text=True, env={**os.environ, "PYTHONUNBUFFERED": "1"}, start_new_session=True,
                               preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))  # ignored, if the tests run in a script's background
    for line in process.stdout:
        if line.startswith("epoch 2:"):
            break
    process.send_signal(signal.SIGINT)
    said, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and errors == "interrupted\n" and "is kept in" in said
    train.load(tmp_path / "run")


def test_a_terminal_without_block_characters_does_not_cost_the_results(argv, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    train.main(argv("--max-steps", 1))
    assert (tmp_path / "run" / "results.json").is_file()


def test_weights_that_cannot_be_written_are_one_line(argv, tmp_path, capsys):
    (tmp_path / "run" / "trained.safetensors.partial").mkdir(parents=True)
    refused(capsys, argv("--max-steps", 1, "--overwrite"), "trained.safetensors")


# ------------------------------------------------------------------------------------------------------------- the ladder

def test_shut_gates_leave_no_rung_to_train_and_no_way_to_the_layers(argv, tmp_path):
    batch = torch.tensor([[5, 6, 7, 1]]), torch.ones(1, 4, dtype=torch.bool), torch.tensor([[0, 9]])
    same = {}
    for gates in ("shut", "learned"):
        train.main(argv("--gates", gates, "--lr", "1e-2", "--out", tmp_path / gates))
        assert any("ladders" in name for name in load_file(tmp_path / gates / "trained.safetensors")) == (gates == "learned")
        model, _ = train.load(tmp_path / gates)
        before = model(*batch)
        for name, p in model.backbone.named_parameters():
            if "embed" not in name:  # embeddings and the head, which is the same matrix, stay
                torch.nn.init.normal_(p)
        same[gates] = torch.equal(before, model(*batch))
    assert same == {"shut": True, "learned": False}


@pytest.mark.parametrize("mode", ["published", "aligned"])
def test_init_starts_from_the_pruned_backbone(argv, tmp_path, backbone, mode):
    train.main(argv("--init", "magnitude", "--prune", mode, "--lr", "1e-30", "--max-steps", 1))  # a step too small to change a weight
    ladder = LadderT5(load_t5(backbone), r=4)
    prune.init_side(ladder, prune.magnitude(ladder.backbone), mode)
    start = load_file(tmp_path / "run" / "trained.safetensors")
    assert all(torch.equal(p, start[name]) for name, p in ladder.named_parameters() if ".blocks." in name and name in start)


@pytest.mark.slow
def test_the_three_inits_start_differently(argv, tmp_path):
    starts = {}
    for init in ("random", "magnitude", "fisher"):
        train.main(argv("--init", init, "--lr", "1e-30", "--max-steps", 1, "--out", tmp_path / init, "--fisher-samples", 8))
        starts[init] = load_file(tmp_path / init / "trained.safetensors")["encoder.blocks.0.feed_forward.wi.weight"]
    assert not any(torch.equal(starts[a], starts[b]) for a, b in (("random", "magnitude"), ("magnitude", "fisher"), ("fisher", "random")))


def test_a_run_starts_from_what_another_has_learned(learned, argv, tmp_path, capsys):
    train.main(argv("--task", "rte", "--init", learned[0], "--lr", "1e-30", "--max-steps", 1))
    before, after = (load_file(out / "trained.safetensors") for out in (learned[0], tmp_path / "run"))
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert f"as sst2 has left it in {learned[0]}" in capsys.readouterr().out


def test_once_it_has_begun_a_run_does_without_its_start(learned, argv, tmp_path):
    start = shutil.copytree(learned[0], tmp_path / "start")
    same = argv("--task", "rte", "--init", start, "--max-steps", 1)
    results = train.main(same)
    shutil.rmtree(start)
    assert train.main([*same, "--resume"]) == results
    train.load(tmp_path / "run")


def test_a_start_that_does_not_fit_is_refused_and_nothing_is_written(learned, argv, backbone, tmp_path, capsys):
    start = ("--init", str(learned[0]))
    refused(capsys, argv(*start, "--r", 2), str(learned[0]), "--r 4", "ask for the same")
    refused(capsys, argv(*start, "--keep", 1), "--keep (all layers)")
    refused(capsys, argv(*start, "--method", "lora"), "--init")
    for wrong in ("", "fischer", str(learned[0] / "config.json")):
        refused(capsys, argv("--init", wrong), repr(wrong), "fisher, magnitude, random", "folder of a run")
    refused(capsys, argv("--init", str(tmp_path)), "not the folder of a run")
    half = shutil.copytree(learned[0], tmp_path / "half")
    (half / "results.json").unlink()
    refused(capsys, argv("--init", str(half)), "has not ended")
    copy = shutil.copytree(backbone, tmp_path / "copy")
    torch.manual_seed(1)
    save_t5(T5(T5Config.from_json(copy / "config.json")), copy)
    refused(capsys, argv(*start, "--model", copy), "not the one of", "sha256")
    assert not (tmp_path / "run").exists()


def test_a_start_that_does_not_fit_leaves_an_old_table_alone(learned, argv, tmp_path, capsys):
    train.main(argv("--seeds", "0,1", "--max-steps", 1))
    before = (tmp_path / "run" / "results.json").read_bytes()
    refused(capsys, argv("--seeds", "0,1", "--init", str(learned[0]), "--r", 2, "--overwrite"), "ask for the same")
    assert (tmp_path / "run" / "results.json").read_bytes() == before


def test_keep_gives_a_rung_to_the_kept_layers_only(argv, capsys):
    results = train.main(argv("--keep", "1", "--max-steps", 1))
    assert [len(results["gates"][stack]) for stack in ("encoder", "decoder")] == [1, 1]
    said = capsys.readouterr().out
    assert "encoder layer  1" in said and "layer  0" not in said


def test_gates_are_drawn_one_line_for_each_rung(backbone):
    ladder = LadderT5(load_t5(backbone), r=4)
    torch.nn.init.constant_(ladder.decoder.ladders[1].alpha, 0.1)  # sigmoid(0.1 / 0.1) = 0.73
    title, *lines = report.gates(ladder).splitlines()
    assert [line.split()[:3] for line in lines] == [[stack, "layer", i] for stack in ("encoder", "decoder") for i in "01"]
    assert [line.split()[-1] for line in lines] == ["0.50", "0.50", "0.50", "0.73"]
    assert [line.count("█") for line in lines] == [15, 15, 15, 22] and all(line.count("█") + line.count("░") == 30 for line in lines)


# ------------------------------------------------------------------------------------------------------------- the folder

def test_a_folder_that_is_not_empty_is_refused_unchanged(argv, tmp_path, capsys):
    write(tmp_path / "run" / "thesis.txt", "years of work")
    refused(capsys, argv(), str(tmp_path / "run"), "not empty", "--overwrite")
    assert list(contents(tmp_path / "run")) == [Path("thesis.txt")]


def test_overwrite_replaces_a_run_and_touches_nothing_else(argv, tmp_path):
    train.main(argv("--max-steps", 1))
    write(tmp_path / "run" / "thesis.txt", "years of work")
    assert train.main(argv("--max-steps", 1, "--overwrite", "--seed", 7))["seed"] == 7
    assert json.loads((tmp_path / "run" / "results.json").read_text())["seed"] == 7
    assert (tmp_path / "run" / "thesis.txt").read_text() == "years of work\n"


def test_an_empty_folder_needs_no_overwrite(argv, tmp_path):
    (tmp_path / "run").mkdir()
    train.main(argv("--max-steps", 1))


def test_without_out_each_run_has_its_own_folder(argv, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        train.main(without("--out", argv("--max-steps", 1)))
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["sst2-lst-0", "sst2-lst-1"]
    assert all((path / "results.json").is_file() for path in (tmp_path / "runs").iterdir())


def test_runs_that_start_together_do_not_share_a_folder(argv, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    another = without("--out", argv("--max-steps", 1))

    def start_another(count, *_):  # while ours loads its data
        if count == 1:
            train.main(another)

    calls(monkeypatch, "initialize", start_another)
    train.main(another)
    assert [(path / "results.json").is_file() for path in sorted((tmp_path / "runs").iterdir())] == [True, True]


@pytest.mark.parametrize("out", ["a file", "a file/run"])
def test_an_out_that_cannot_be_a_folder_is_refused(argv, tmp_path, capsys, out):
    write(tmp_path / "a file", "text")
    refused(capsys, argv("--out", tmp_path / out), "a file")
    assert (tmp_path / "a file").read_text() == "text\n"


def test_an_unwritable_out_is_refused_before_the_fisher_pass(argv, monkeypatch, capsys):
    calls(monkeypatch, "initialize", lambda *_: pytest.fail("minutes of work for a folder that cannot be made"))
    refused(capsys, argv("--out", "/dev/null/run"), "/dev/null/run")


# ----------------------------------------------------------------------------------------------------------- the fallback

@pytest.fixture
def offline(monkeypatch, tmp_path):
    """Nothing listens on port 9, and the cache is empty."""
    monkeypatch.setenv("GLUE_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(data, "CACHE", str(tmp_path / "cache"))


@needs_sample
def test_without_a_network_sst2_trains_on_the_bundled_sample_and_says_so(argv, offline, tmp_path, capsys):
    results = train.main(without("--data", argv("--max-steps", 1, "--batch-size", 100)))
    said = capsys.readouterr().out
    assert "THIS IS NOT SST-2" in said and "127.0.0.1:9" in said
    assert results["data"] == "bundled-sample" and "127.0.0.1:9" in results["fallback"]
    assert json.loads((tmp_path / "run" / "results.json").read_text())["data"] == "bundled-sample"


def test_without_a_network_other_tasks_say_where_to_put_which_file(argv, offline, tmp_path, capsys):
    refused(capsys, without("--data", argv("--task", "rte")), "RTE/train.tsv and RTE/dev.tsv", str(tmp_path / "cache"), "--data DIR")
    assert not (tmp_path / "run").exists()


def test_the_sample_has_no_other_task(argv, tmp_path, capsys):
    refused(capsys, argv("--task", "rte", "--data", "sample"), "rte", "RTE/train.tsv")


# -------------------------------------------------------------------------------------------------------------- bad input

HUGE = str(10**30)


@pytest.mark.parametrize("more, words", [
    (("--task", "foo"), ("foo", "sst2")), (("--method", "foo"), ("foo", "lst")), (("--model", "foo"), ("foo", "nano", "t5-small", "folder")),
    (("--r", "3"), ("3", "[1, 2, 4, 8]")), (("--r", "16"), ("16", "[1, 2, 4, 8]")), (("--r", "0"), ("'0'",)), (("--r", "-4"), ("-4",)), (("--r", "2.5"), ("2.5",)),
    (("--keep", "2"), ("[2]", "0 to 1")), (("--keep", "1,1"), ("[1, 1]", "once")), (("--keep", ""), ("''", "1,3,5")), (("--keep", "a"), ("'a'", "1,3,5")),
    (("--keep", "-1"), ("-1",)), (("--keep", "0,,1"), ("0,,1",)), (("--keep", HUGE), (HUGE,)),
    (("--dtype", "fp16"), ("float16", "bfloat16")), (("--dtype", "foo"), ("foo", "bf16")), (("--dtype", "bf16", "--method", "full"), ("bf16", "fp32")),
    (("--method", "full", "--keep", "1"), ("--keep", "full")),
    (("--method", "lora", "--r", "4", "--gates", "shut"), ("--r, --gates", "lora")),
    (("--method", "bitfit", "--init", "random"), ("--init",)), (("--method", "prompt", "--fisher-samples", "8"), ("--fisher-samples",)),
    (("--method", "adapters", "--prune", "aligned"), ("--prune",)), (("--freeze", "1"), ("--freeze", "lst")), (("--freeze", "-1"), ("-1",)),
    (("--method", "lora", "--freeze", "5"), ("5", "0 to 4")), (("--method", "lora", "--freeze", "4"), ("4", "nothing to train")),
    (("--method", "prompt", "--freeze", "1"), ("freeze is 1", "prompts")),
    *((("--method", method, "--as-authors"), (method, "lora and prompt")) for method in ("lst", "full", "adapters", "bitfit")),
    (("--device", "foo"), ("foo", "cpu")), (("--device", ""), ("''", "cpu")), (("--device", "meta"), ("meta", "cpu")), (("--device", "cuda:99"), ("cuda:99", "cpu")),
    (("--lr", "-1"), ("-1", "above 0")), (("--lr", "0"), ("0",)), (("--lr", "nan"), ("nan",)), (("--lr", "1e400"), ("inf",)), (("--lr", "foo"), ("foo",)),
    (("--warmup-steps", "-1"), ("-1",)), (("--warmup-steps", "1.5"), ("1.5",)), (("--seed", "foo"), ("foo",)), (("--seed", "1.5"), ("1.5",)),
    (("--max-train-rows", "0"), ("'0'",)), (("--max-steps", "0"), ("'0'",)), (("--epochs", "0"), ("'0'",)), (("--batch-size", "-1"), ("-1",)),
    (("--fisher-samples", "0"), ("'0'",)), (("--init", "foo"), ("foo", "fisher")), (("--prune", "foo"), ("foo", "aligned")),
    (("--gates", "foo"), ("foo", "shut")), (("--prompts", "foo"), ("foo", "t5")), (("--data", "foo"), ("foo", "SST-2/train.tsv")), (("--foo",), ("--foo",)),
], ids=lambda part: " ".join(part) if part and part[0].startswith("--") else "")
def test_a_wrong_argument_is_refused_in_one_line(argv, tmp_path, capsys, more, words):
    refused(capsys, argv(*more), *words)
    assert not (tmp_path / "run").exists()


def test_a_command_line_that_lacks_something_is_refused(tmp_path, capsys):
    refused(capsys, [], "--task", "sst2")
    refused(capsys, ["--predict", "a film"], "--out")
    refused(capsys, ["--predict", "a film", "--out", str(tmp_path)], "trained.safetensors")


@pytest.mark.parametrize("option, value", [
    ("--seed", -1), ("--seed", 2**63), ("--seed", 2**64), ("--seed", HUGE), ("--seed", f"-{HUGE}"), ("--lr", "1e-300"), ("--lr", "1e30"), ("--warmup-steps", HUGE),
    ("--warmup-steps", 10**400), ("--epochs", HUGE), ("--epochs", 10**400), ("--batch-size", HUGE), ("--batch-size", 10**400), ("--max-steps", HUGE),
    ("--max-train-rows", HUGE), ("--fisher-samples", HUGE)], ids=lambda value: str(value)[:12])
def test_an_absurd_number_is_used_or_refused_in_one_line(argv, capsys, option, value):
    more = () if option == "--max-steps" else ("--max-steps", 1)
    try:
        assert train.main(argv("--init", "fisher", *more, option, value))["steps"] >= 1
    except SystemExit as stop:
        line = capsys.readouterr().err
        assert stop.code in (1, 2) and line.startswith("error: ") and line.count("\n") == 1 and option in line, line


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 242043056\n"
HTML = b"<!DOCTYPE html><html><body>Please log in</body></html>\n"


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "spiece.model"])
@pytest.mark.parametrize("content", [None, b"", LFS, HTML, b"\x00" * 64, b"[1]"], ids=["missing", "empty", "git-lfs", "html", "zeros", "list"])
def test_a_foreign_file_in_the_backbone_is_refused(argv, backbone, tmp_path, capsys, name, content):
    copy = shutil.copytree(backbone, tmp_path / "copy")
    (copy / name).unlink()
    if content is not None:
        (copy / name).write_bytes(content)
    refused(capsys, argv("--model", copy), name)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "spiece.model"])
def test_a_cut_file_of_the_backbone_is_refused(argv, backbone, tmp_path, capsys, name):
    copy = shutil.copytree(backbone, tmp_path / "copy")
    whole = (copy / name).read_bytes()
    for cut in (1, 8, 9, 100, len(whole) // 3, len(whole) // 2, len(whole) - 3):
        (copy / name).write_bytes(whole[:cut])
        refused(capsys, argv("--model", copy), name)


def test_a_tokenizer_cut_between_two_pieces_is_refused(argv, backbone, tmp_path, capsys):
    copy = shutil.copytree(backbone, tmp_path / "copy")
    whole, end = (copy / "spiece.model").read_bytes(), 0
    for _ in range(30):
        end += 2 + whole[end + 1]  # tag, length, piece
    (copy / "spiece.model").write_bytes(whole[:end])
    refused(capsys, argv("--model", copy), "spiece.model")


def test_a_checkpoint_of_other_sizes_is_refused(argv, backbone, tmp_path, capsys):
    copy = shutil.copytree(backbone, tmp_path / "copy")
    config = json.loads((copy / "config.json").read_text())
    for change, word in (({"num_layers": 3}, "missing"), ({"num_layers": 1}, "unexpected"), ({"d_ff": 65}, "misshapen"), ({"vocab_size": 100}, "misshapen"),
                         ({"d_model": "32"}, "d_model"), ({"num_heads": 0}, "num_heads"), ({"d_kv": 10**9}, "d_kv"), ({"model_type": "bert"}, "bert")):
        (copy / "config.json").write_text(json.dumps(config | change))
        refused(capsys, argv("--model", copy), word)


def test_a_tokenizer_with_more_pieces_than_the_model_is_refused(argv, backbone, tmp_path, capsys):
    copy = shutil.copytree(backbone, tmp_path / "copy")
    save_t5(T5(T5Config(vocab_size=SENTINELS, **WIDTHS)), copy)
    refused(capsys, argv("--model", copy), "spiece.model", "vocab_size")


@pytest.mark.parametrize("lines, words", [
    ([], ("0 training rows",)), (["sentence\tlabel"], ("0 training rows",)), (["sentence\tlabel", "one\t1"], ("1 training rows",)),
    (["sentence\tlabel", *["fine\t1"] * 9, "no label"], ("line 11", "1 column instead of 2")), (["sentence\tlabel", "a\t0", "b\t7"], ("line 3", "'7'", "0 or 1")),
    (["text\tclass", "a\t0"], ("line 1", "sentence, label")), (["<!DOCTYPE html>", "<html>"], ("line 1",)), (["sentence\tlabel", "caf\udce9\t1"], ("line 2", "UTF-8"))],
    ids=["empty", "header only", "one row", "no label", "label 7", "other columns", "html", "latin-1"])
def test_a_malformed_file_is_refused_with_its_line(argv, glue, tmp_path, capsys, lines, words):
    folder = shutil.copytree(glue, tmp_path / "glue")
    (folder / "SST-2" / "train.tsv").write_bytes("".join(line + "\n" for line in lines).encode("utf-8", "surrogateescape"))
    refused(capsys, argv("--data", folder), *words)
    assert not (tmp_path / "run").exists()


def test_help_is_no_error(capsys):
    with pytest.raises(SystemExit) as stop:
        train.main(["--help"])
    assert stop.value.code == 0 and "--task" in capsys.readouterr().out
