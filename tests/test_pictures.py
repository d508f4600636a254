"""Tasks about pictures in train.py: a CLIP-T5 and a CLIP of some ten thousand random weights, and a few drawn scenes."""

import argparse
import contextlib
import importlib.util
import itertools
import json
import multiprocessing
import os
import shutil
import signal
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import sentencepiece as spm
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

import baselines
import data
import data_vl
import images
import options
import scenes
import tasks
import train
from clip import NANO_CLIP, load_clip
from model import EOS, NANO, T5, UNK, T5Config, VisualEmbedding, load_t5, load_tokenizer, save_t5
from side import LadderT5
from test_distributed import together
from test_resume import what_counts
from workshop import WIDTHS, contents, logged, put, refused

TOWER = Path(__file__).parent / "fixtures" / "clip-vit"      # 3 x 3 positions of 16 channels
FEW = {"train": 10, "val": 4, "test": 4}                     # scenes: 40, 18, 20 and 50 training rows of the four tasks
MOST = tasks.MAX_NEW_TOKENS
TABLE_3 = ("vqa", "gqa", "nlvr2", "coco")
needs_nano = pytest.mark.skipif(not (NANO.is_dir() and NANO_CLIP.is_dir()), reason="assets/nano or assets/nano_clip is not there")
needs_pillow = pytest.mark.skipif(importlib.util.find_spec("PIL") is None, reason="needs Pillow: pip install -r requirements-vl.txt")


# -------------------------------------------------------------------------------------------------------------- workshop

@pytest.fixture(scope="session")
def t5(tmp_path_factory):
    """A folder with a tiny random T5 and a tokenizer that knows the words about drawn scenes."""
    folder = tmp_path_factory.mktemp("t5")
    rows = [row for task in TABLE_3 for row in scenes.examples(task, "train", 60)]
    text = [data_vl.TASKS[task].prompt + "what is it?" for task in TABLE_3]
    text += [part for row in rows for part in (row.text, *([row.answer] if isinstance(row.answer, str) else row.answer)) if part]
    spm.SentencePieceTrainer.train(sentence_iterator=iter(text), model_prefix=str(folder / "spiece"), vocab_size=300, hard_vocab_limit=False,
                                   character_coverage=1.0, pad_id=0, eos_id=1, unk_id=2, bos_id=-1, minloglevel=2)
    tokenizer = load_tokenizer(folder)
    assert all(UNK not in tokenizer.encode(part) for part in text) and tokenizer.encode("true")[0] != tokenizer.encode("false")[0]
    torch.manual_seed(0)
    save_t5(T5(T5Config(vocab_size=tokenizer.vocab_size + 3, **WIDTHS)), folder)
    return folder


@pytest.fixture(autouse=True)
def few(monkeypatch, tmp_path):
    monkeypatch.setattr(scenes, "SCENES", FEW)
    monkeypatch.setattr(images, "CACHE", tmp_path / "cache")
    monkeypatch.setattr(tasks, "MAX_NEW_TOKENS", 4)          # who has not learned does not end an answer


def command(t5, out, *more):
    ladder = () if set(more) & set(baselines.METHODS) else ("--fisher-samples", "4")
    return ["--task", "vqa", "--model", str(t5), "--clip", str(TOWER), "--out", str(out), *ladder, "--batch-size", "16", "--lr", "1e-2",
            "--warmup-steps", "1", "--device", "cpu", *map(str, more)]


@pytest.fixture
def argv(t5, tmp_path):
    """argv(*more): a command line of a run into tmp_path/run; what `more` repeats, it replaces."""
    return lambda *more: command(t5, tmp_path / "run", *more)


def spy(monkeypatch, owner, name):
    """The arguments of every call of owner.<name>, as a list that grows."""
    original, calls = getattr(owner, name), []

    def spying(*arguments, **named):
        calls.append(arguments)
        return original(*arguments, **named)

    monkeypatch.setattr(owner, name, spying)
    return calls


def cut_off(monkeypatch, argv, number):
    """The run is interrupted while it computes the loss of this step, counting from 1."""
    with monkeypatch.context() as patch:
        original, count = train.loss_of, itertools.count(1)

        def loss_of(*arguments):
            if next(count) == number:
                raise KeyboardInterrupt
            return original(*arguments)

        patch.setattr(train, "loss_of", loss_of)
        with pytest.raises(SystemExit) as stop:
            train.main(argv)
    assert stop.value.code == 130


@pytest.fixture
def shown(monkeypatch):
    """How many pictures each call of CLIP was about, and the towers that were loaded for it."""
    said = SimpleNamespace(counts=[], towers=[])

    def load(*arguments, **named):
        said.towers.append(load_clip(*arguments, **named))
        said.towers[-1].register_forward_pre_hook(lambda _, inputs: said.counts.append(len(inputs[0])))
        return said.towers[-1]

    monkeypatch.setattr(tasks, "load_clip", load)
    return said


def soft(monkeypatch):
    """VQA's training questions have three answers of different weights, each fifth none, as in the authors' lists."""
    original = data_vl.of_scenes

    def of_scenes(task):
        dataset = original(task)
        if task.name == "vqa":
            for i, example in enumerate(dataset.train):
                dataset.train[i] = example._replace(answers={} if i % 5 == 0 else {"yes": 0.6, "two": 0.3} | example.answers)
        return dataset

    monkeypatch.setattr(data_vl, "of_scenes", of_scenes)


def keys(names):
    datasets = tasks.load(names, None, "paper").values()
    return {key for dataset in datasets for part in (dataset.train, dataset.val, dataset.test) for example in part for key in example.images}


def weights(out):
    return load_file(out / "trained.safetensors")


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# ------------------------------------------------------------------------------------------------- every task and method

EVERY = [pytest.param(task, method, marks=() if (task, method) in (("vqa", "lst"), ("nlvr2", "lora"), ("coco", "lst")) else pytest.mark.slow)
         for task in TABLE_3 for method in ("lst", *baselines.METHODS)]


@pytest.mark.parametrize("task, method", EVERY)
def test_a_task_trains_and_is_tested_with_and_without_its_pictures(argv, t5, tmp_path, monkeypatch, capsys, task, method):
    evaluated = spy(monkeypatch, train, "evaluate")
    results = train.main(argv("--task", task, "--method", method, "--max-steps", 2))
    assert results == json.loads((tmp_path / "run" / "results.json").read_text())
    assert (results["task"], results["method"], results["data"], results["steps"]) == (task, method, "scenes", 2)
    assert results["test"].keys() == results["test_hidden"].keys() == results["val"].keys() and 0 <= results["test"]["score"] <= 1000
    assert "with the pictures hidden" in capsys.readouterr().out

    model, saved = evaluated[0][0], weights(tmp_path / "run")
    total, count = sum(p.numel() for p in model.parameters()), sum(tensor.numel() for tensor in saved.values())
    assert (results["total_params"], results["trainable_params"]) == (total, count), "Table 3's share is of all parameters, those added among them"
    assert results["trainable_percent"] == pytest.approx(100 * count / total)
    assert any("visual" in name for name in saved) and not any("backbone" in name for name in saved)
    backbone = sum(p.numel() for p in load_t5(t5).parameters())
    assert total == backbone + count if method == "lst" else total >= backbone


@pytest.mark.parametrize("task", ["vqa", pytest.param("nlvr2", marks=pytest.mark.slow), pytest.param("vqa+coco", marks=pytest.mark.slow)])
def test_the_backbone_and_clip_stay_byte_identical_and_get_no_gradient(argv, t5, monkeypatch, shown, task):
    files, evaluated = [contents(t5), contents(TOWER)], spy(monkeypatch, train, "evaluate")
    train.main(argv("--task", task, "--max-steps", 3))
    backbone = evaluated[-1][0].backbone
    for after, before in ((backbone, load_t5(t5)), (shown.towers[0], load_clip(TOWER))):
        after = dict(after.named_parameters())
        for name, p in before.named_parameters():
            assert torch.equal(p, after[name]) and after[name].grad is None and not after[name].requires_grad, name
    assert files == [contents(t5), contents(TOWER)]


def test_without_pictures_means_that_all_clip_saw_is_zero(argv, monkeypatch):
    trained, answered = spy(monkeypatch, train, "loss_of"), spy(monkeypatch, tasks, "answer")
    results = train.main(argv("--max-steps", 1))
    seen = [batch.images for _, _, batch, _ in answered]  # validation, test, the test again with hidden pictures
    assert len(seen) == 3 and [bool(part.any()) for part in seen] == [True, True, False] and trained[0][1].images.any()
    assert torch.equal(answered[1][2].source_ids, answered[2][2].source_ids)
    blind = train.main(argv("--max-steps", 1, "--blank", "--overwrite"))
    assert not trained[1][1].images.any() and not any(batch.images.any() for _, _, batch, _ in answered[3:])
    assert blind["test"] == blind["test_hidden"] and blind["config"]["blank"] and not results["config"]["blank"]


@pytest.mark.slow
@needs_nano
def test_the_bundled_backbone_and_tower_train_with_no_other_flag(tmp_path):
    results = train.main(["--task", "nlvr2", "--out", str(tmp_path / "run"), "--max-steps", "1", "--fisher-samples", "4", "--device", "cpu"])
    assert (results["model"], results["config"]["clip"], results["config"]["r"]) == ("nano", "nano", 4)
    assert "score" in results["test_hidden"]


def test_a_table_of_tasks_about_pictures(argv, tmp_path):
    results = train.main(argv("--task", "vqa,vqa+nlvr2", "--max-steps", 1))
    assert list(results["tasks"]) == ["vqa", "vqa+nlvr2"] and len(results["runs"]) == 2
    assert sorted(path.name for path in (tmp_path / "run").iterdir() if path.is_dir()) == ["vqa+nlvr2-0", "vqa-0"]
    assert "vqa+nlvr2" in (tmp_path / "run" / "results.md").read_text()


@pytest.mark.parametrize("method, lr, decay", [("lst", 3e-3, 0.03), ("full", 3e-4, 0.01), ("adapters", 3e-4, 0.01), ("lora", 3e-4, 0.01),
                                               ("bitfit", 3e-3, 0.01), ("prompt", 3e-3, 0.01)])
@pytest.mark.parametrize("task, size", [("vqa", 300), ("gqa", 500), ("nlvr2", 100), ("coco", 250), ("easy-vqa", 300), ("+".join(TABLE_3), 300)])
def test_pictures_have_the_settings_of_table_6(task, size, method, lr, decay):
    args = options.parse(["--task", task, "--method", method, "--model", "t5-base"], "")
    args.task = task
    rows = {name: [None] * 1500 for name in task.split("+")}
    options.settle(args, rows, sample=False)
    assert (args.batch_size, args.lr, args.weight_decay, args.r) == (size, lr, decay, 4)
    assert (args.epochs, args.epsilon, args.beta2, args.max_norm, args.seeds) == (20, 1e-6, 0.999, 5.0, [0])
    steps = sum(1500 // {"vqa": 300, "gqa": 500, "nlvr2": 100, "coco": 250, "easy-vqa": 300}[name] for name in rows)
    assert args.steps == 20 * steps and args.warmup_steps == args.steps // 10


@pytest.mark.parametrize("method, expected", [("lst", (16, 14, 5e-4, 1e-8, 0.99, 0.0)), ("full", (32, 3, 3e-4, 1e-6, 0.999, 0.0))])
def test_beside_nano_the_side_network_has_settings_with_which_it_looks(method, expected):
    args = options.parse(["--task", "vqa", "--method", method], "")
    args.task = "vqa"
    options.settle(args, {"vqa": [None] * 320}, sample=False)
    assert (args.batch_size, args.epochs, args.lr, args.epsilon, args.beta2, args.dropout) == expected


@pytest.mark.parametrize("task, epochs", [("nlvr2", 6), ("vqa+nlvr2", 14)])
def test_tasks_in_one_take_the_most_epochs_of_theirs(task, epochs):
    args = options.parse(["--task", task], "")
    args.task = task
    options.settle(args, {name: [None] * 320 for name in task.split("+")}, sample=False)
    assert args.epochs == epochs


@pytest.mark.slow
def test_nlvr2_starts_from_the_side_network_of_vqa(argv, tmp_path, capsys):
    train.main(argv("--max-steps", 1, "--out", tmp_path / "vqa"))
    train.main(argv("--task", "nlvr2", "--init", tmp_path / "vqa", "--lr", "1e-30", "--max-steps", 1))
    before, after = (load_file(tmp_path / run / "trained.safetensors") for run in ("vqa", "run"))
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    refused(capsys, argv("--task", "nlvr2", "--init", tmp_path / "vqa", "--r", 2, "--overwrite"), "--r 4")


# ---------------------------------------------------------------------------------------------------- cut off and resumed

@pytest.mark.parametrize("task, steps, at", [("vqa", 5, 5), ("vqa+nlvr2", 9, 6), pytest.param("vqa+nlvr2", 9, 9, marks=pytest.mark.slow),
                                             pytest.param("coco", 6, 4, marks=pytest.mark.slow)])
def test_a_run_cut_off_goes_on_to_the_same_bits(argv, tmp_path, monkeypatch, capsys, shown, task, steps, at):
    soft(monkeypatch)
    same = ("--task", task, "--max-steps", steps, "--save-steps", 3)  # 3, 7 and 4 steps an epoch
    train.main(argv(*same, "--out", tmp_path / "straight"))
    cut_off(monkeypatch, argv(*same), at)
    assert (tmp_path / "run" / "state.safetensors").exists()
    shown.counts.clear()
    train.main(argv(*same, "--resume"))
    assert f"goes on after step {(at - 1) // 3 * 3 if at < 9 else 7} of {steps}" in capsys.readouterr().out and not shown.counts
    for ours, theirs, what in zip(what_counts(tmp_path / "run"), what_counts(tmp_path / "straight"), ("weights", "log", "results", "files")):
        assert ours == theirs, f"{what} differ"


def test_a_resume_with_another_clip_or_hidden_pictures_is_refused(argv, tmp_path, monkeypatch, capsys):
    tower = shutil.copytree(TOWER, tmp_path / "tower")
    line = argv("--max-steps", 3, "--save-steps", 1, "--clip", tower)
    cut_off(monkeypatch, line, 2)
    before = contents(tmp_path / "run")
    refused(capsys, [*line, "--resume", "--blank"], "blank was False, is True")
    refused(capsys, [*line, "--resume", "--clip", str(TOWER.with_name("clip-vit-open"))], "clip sha256 was")
    refused(capsys, [*line, "--resume", "--task", "gqa"], "task was vqa, is gqa")
    save_file({name: tensor + 1e-3 for name, tensor in load_file(tower / "model.safetensors").items()}, tower / "model.safetensors")
    refused(capsys, [*line, "--resume"], "clip sha256 was")
    assert contents(tmp_path / "run") == before


def test_a_resume_is_refused_before_another_clip_has_seen_all_pictures(argv, monkeypatch, capsys, shown):
    line = argv("--max-steps", 3, "--save-steps", 1)
    cut_off(monkeypatch, line, 2)
    shown.counts.clear()
    refused(capsys, [*line, "--resume", "--clip", str(TOWER.with_name("clip-vit-open"))], "clip")
    assert not shown.counts


def test_the_same_clip_at_another_place_is_the_same(argv, tmp_path, monkeypatch):
    line = argv("--max-steps", 3, "--save-steps", 1)
    cut_off(monkeypatch, line, 2)
    assert train.main([*line, "--resume", "--clip", str(shutil.copytree(TOWER, tmp_path / "moved"))])["steps"] == 3


def test_a_run_on_pictures_that_has_ended_is_left_as_it_is(argv, tmp_path, capsys):
    results = train.main(argv("--max-steps", 1))
    before = contents(tmp_path / "run")
    assert train.main(argv("--max-steps", 1, "--resume")) == results and "has ended" in capsys.readouterr().out
    assert contents(tmp_path / "run") == before


def test_the_same_seed_gives_the_same_bits_and_clip_sees_each_picture_once(argv, tmp_path, monkeypatch, shown):
    soft(monkeypatch)
    losses, trained = [], []
    for out, seed in (("a", 0), ("b", 0), ("c", 1)):
        train.main(argv("--max-steps", 2, "--seed", seed, "--out", tmp_path / out))
        losses.append(logged(tmp_path / out, "loss"))
        trained.append(weights(tmp_path / out))
        assert sum(shown.counts) == len(keys("vqa")) == 18, "CLIP sees a picture again"
    assert losses[0] == losses[1] != losses[2] and equal(trained[0], trained[1]) and not equal(trained[0], trained[2])
    train.main(argv("--task", "gqa+nlvr2", "--max-steps", 1, "--overwrite"))
    assert sum(shown.counts) == 18, "the tasks share the scenes"


def test_features_come_from_the_disk_as_clip_gave_them(argv, monkeypatch):
    stepped, trained, tower = spy(monkeypatch, train, "backward"), spy(monkeypatch, train, "loss_of"), load_clip(TOWER)
    train.main(argv("--task", "nlvr2", "--max-steps", 1))
    rows, batch = stepped[0][1], trained[0][1]
    pictures = [torch.from_numpy(scenes.draw(scenes.scene_of(key))) for row in rows for key in row.images]
    seen = tower(images.preprocess(pictures, 12)).unflatten(0, (len(rows), 2))  # (B, 2, 9, 16)
    torch.testing.assert_close(batch.images, seen, rtol=1e-3, atol=1e-2)


# ------------------------------------------------------------------------------------------------------ one step, one task

@pytest.fixture(scope="module")
def joint(t5, tmp_path_factory):
    """An epoch of Table 3's four tasks in one run: its folder, results, steps as (task, rows), and how it answered."""
    folder, steps, generated = tmp_path_factory.mktemp("joint"), [], []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scenes, "SCENES", FEW)
        patch.setattr(images, "CACHE", folder / "cache")
        patch.setattr(tasks, "MAX_NEW_TOKENS", 4)
        drawn, generate = spy(patch, tasks, "draw"), LadderT5.generate
        answered, backward = spy(patch, tasks, "answer"), train.backward

        def stepping(model, rows, *more):
            task, chosen, _, step = drawn[-1]
            assert [row.images for row in chosen] == [row.images for row in rows]
            steps.append((task, chosen, step))
            return backward(model, rows, *more)

        def generating(self, source_ids, source_mask, most, beams, *more):
            generated.append((answered[-1][-1], most, beams, self.training))
            return generate(self, source_ids, source_mask, most, beams, *more)

        patch.setattr(train, "backward", stepping)
        patch.setattr(LadderT5, "generate", generating)
        results = train.main(command(t5, folder / "run", "--task", "+".join(TABLE_3), "--batch-size", 12, "--epochs", 1))
    return SimpleNamespace(out=folder / "run", results=results, steps=steps, generated=generated, answered=[task for *_, task in answered])


def test_each_step_is_of_one_task_and_an_epoch_takes_every_row_once(joint):
    rows = {task: [id(row) for name, chosen, _ in joint.steps if name == task for row in chosen] for task in TABLE_3}
    assert {task: len(of_task) for task, of_task in rows.items()} == {"vqa": 40, "gqa": 18, "nlvr2": 20, "coco": 50}
    assert all(len(set(of_task)) == len(of_task) for of_task in rows.values())
    assert [step for *_, step in joint.steps] == list(range(joint.results["steps"])) and len(logged(joint.out, "loss")) == len(joint.steps)
    order = [task for task, *_ in joint.steps]
    assert order != sorted(order) and len(list(itertools.groupby(order))) > len(TABLE_3), "the tasks' steps are mixed"


def test_a_step_of_each_task_has_its_share_of_rows(joint):  # Sec. 4: VQA 300, GQA 500, NLVR2 100, COCO 250
    sizes = {task: Counter(len(chosen) for name, chosen, _ in joint.steps if name == task) for task in TABLE_3}
    assert sizes == {"vqa": {12: 3, 4: 1}, "gqa": {18: 1}, "nlvr2": {4: 5}, "coco": {10: 5}}  # of 12, 20, 4, 10
    assert [tasks.batch_size(task, 300, joint=True) for task in TABLE_3] == [300, 500, 100, 250]
    assert [tasks.batch_size(task, 300, joint=False) for task in TABLE_3] == [300] * 4 and tasks.batch_size("nlvr2", 1, joint=True) == 1


def test_the_order_of_tasks_is_another_in_each_epoch():
    rows = {task: [data_vl.Question([5, 1], (([6, 1], 1.0),), ())] * 40 for task in ("vqa", "nlvr2")}
    epochs = [[task for task, _ in tasks.batches(rows, 8, 0, epoch)] for epoch in (0, 1, 0)]
    assert epochs[0] == epochs[2] != epochs[1] and Counter(epochs[0]) == Counter(epochs[1]) == {"vqa": 5, "nlvr2": 14}
    assert len(epochs[0]) == tasks.epoch_steps(rows, 8)


def test_the_score_of_a_joint_run_is_the_mean_of_its_tasks(joint):
    for scores in (joint.results["val"], joint.results["test"], joint.results["test_hidden"]):
        assert scores["score"] == pytest.approx(sum(scores[task] for task in TABLE_3) / 4)
    different = {"vqa": {"score": 10.0, "invalid": 1, "undefined": 0}, "coco": {"score": 40.0, "cider": 40.0, "invalid": 0, "undefined": 2}}
    assert tasks.together(different) == {"vqa": 10.0, "coco": 40.0, "score": 25.0, "invalid": 1, "undefined": 2}


def test_captions_use_5_beams_vqa_and_gqa_none_and_nlvr2_generates_nothing(joint):
    assert set(joint.generated) == {("vqa", 4, 1, False), ("gqa", 4, 1, False), ("coco", 4, 5, False)} and MOST == 20
    assert set(joint.answered) == set(TABLE_3)


# --------------------------------------------------------------------------------------------------------------- the loss

@pytest.fixture
def ladder(t5):
    backbone = load_t5(t5)
    torch.manual_seed(0)
    backbone.visual = VisualEmbedding(16, backbone.config)
    return LadderT5(backbone, r=4).eval()  # no dropout


class Drawn:
    """In the place of images.Features: for each key other numbers."""

    def lookup(self, rows):
        return torch.stack([torch.stack([torch.randn(9, 16, generator=torch.Generator().manual_seed(int(key))) for key in row]) for row in rows])


def row(number, length, weight):
    dice = torch.Generator().manual_seed(number)
    source, target = (torch.randint(3, 60, (size,), generator=dice).tolist() for size in (6, length))
    return data.Row(source, target, (str(number),), weight)


def gradient(model, rows, accumulate=1):
    model.zero_grad()
    loss = train.backward(model, rows, argparse.Namespace(device="cpu", accumulate=accumulate), Drawn())
    return loss.item(), model.up.weight.grad.clone(), model.visual.feature.weight.grad.clone()


def test_the_weight_of_a_row_multiplies_the_loss_of_its_tokens(ladder):
    rows = [row(1, 1, 1.0), row(2, 5, 0.3), row(3, 2, 0.9)]
    expected = 0.0
    for one in rows:
        batch = tasks.collate([one._replace(weight=1.0)], Drawn())
        assert batch.weights is None
        logits = ladder(batch.source_ids, batch.source_mask, batch.decoder_ids, batch.decoder_mask, batch.images)[0]
        expected += one.weight * F.cross_entropy(logits, torch.tensor(one.target), reduction="sum").item()
    assert train.loss_of(ladder, tasks.collate(rows, Drawn())).item() == pytest.approx(expected, rel=1e-5)
    assert gradient(ladder, rows)[0] == pytest.approx(expected / 8, rel=1e-5)


@pytest.mark.parametrize("passes", [2, 3, 7])
def test_passes_over_weighted_rows_have_the_gradient_of_one(ladder, passes):
    rows = [row(1, 1, 1.0), row(2, 5, 0.3), row(3, 2, 0.9), row(4, 3, 0.0), row(5, 1, 1.0)]  # some passes have no weights, some no rows
    whole, parts = gradient(ladder, rows), gradient(ladder, rows, accumulate=passes)
    assert parts[0] == pytest.approx(whole[0], rel=1e-5)
    assert all(torch.allclose(one, other, atol=1e-4 * one.abs().max()) and one.any() for one, other in zip(whole[1:], parts[1:]))


def test_a_question_without_an_answer_adds_no_loss_and_no_gradient(ladder):
    rows = [row(1, 1, 1.0), row(2, 5, 0.3)]
    [nothing] = data_vl.draw([data_vl.Question([7, 8, 9, EOS], (), ("3",))], 0, 0)
    assert nothing == data.Row([7, 8, 9, EOS], [EOS], ("3",), 0.0)
    without, beside = gradient(ladder, rows), gradient(ladder, [*rows, nothing])
    for one, other in zip(without, beside):
        assert torch.allclose(torch.as_tensor(one) * 6, torch.as_tensor(other) * 7, atol=1e-6)  # the means are over 6 and 7 label tokens
    alone = gradient(ladder, [nothing, nothing])
    assert alone[0] == 0 and not alone[1].any() and not alone[2].any()


def test_a_step_of_questions_without_answers_trains_on(argv, tmp_path, monkeypatch):
    monkeypatch.setattr(data_vl, "draw", lambda questions, seed, step: [data.Row(source, [EOS], keys, 0.0) for source, _, keys in questions])
    train.main(argv("--max-steps", 2, "--init", "random"))
    assert logged(tmp_path / "run", "loss") == [0, 0]


def test_each_step_draws_an_answer_by_its_weight(argv, monkeypatch):
    soft(monkeypatch)
    drawn, tokenizer = Counter(), load_tokenizer(argv()[3])

    def backward(model, rows, *_):
        drawn.update((tuple(one.target), one.weight) for one in rows)
        return torch.zeros(())

    monkeypatch.setattr(train, "backward", backward)
    monkeypatch.setattr(train, "evaluate", lambda *_: {"accuracy": 0.0, "score": 0.0, "invalid": 0, "undefined": 0})
    train.main(argv("--epochs", 10, "--init", "random"))
    yes, two = ((*tokenizer.encode(word), EOS) for word in ("yes", "two"))
    assert drawn[(EOS,), 0.0] == 80 and {weight for _, weight in drawn} == {0.0, 0.3, 0.6, 1.0}
    assert drawn[yes, 0.6] > 1.4 * drawn[two, 0.3] > 50


# ------------------------------------------------------------------------------------------------------------- the answers

@pytest.mark.parametrize("true, false, expected", [(1.0, 2.0, "false"), (2.0, 1.0, "true"), (-5.0, -6.0, "true")])
def test_nlvr2_answers_true_or_false_where_another_token_is_likelier(t5, true, false, expected):
    tokenizer = load_tokenizer(t5)
    logits = torch.full((2, tokenizer.vocab_size), 3.0)
    logits[:, tokenizer.encode("true")[0]], logits[:, tokenizer.encode("false")[0]] = true, false
    model = SimpleNamespace(start=lambda *_, images: images, step=lambda last, state: logits)
    assert tasks.answer(model, tokenizer, tasks.collate([row(1, 1, 1.0), row(2, 1, 1.0)], Drawn()), "nlvr2") == [expected] * 2


def test_nlvr2_compares_the_logits_behind_the_start_token(ladder, t5):
    tokenizer = load_tokenizer(t5)
    batch = tasks.collate([row(i, 1, 1.0) for i in range(16)], Drawn())
    logits = ladder(batch.source_ids, batch.source_mask, torch.zeros(16, 1, dtype=torch.long), None, batch.images)[:, 0]
    true = logits[:, tokenizer.encode("true")[0]] > logits[:, tokenizer.encode("false")[0]]
    assert tasks.answer(ladder, tokenizer, batch, "nlvr2") == ["true" if one else "false" for one in true]


@pytest.mark.parametrize("more", [
    ("--method", "full", "--lr", "3e-3", "--max-steps", 30),
    pytest.param(("--method", "lst", "--r", 1, "--batch-size", 8, "--lr", "3e-3", "--max-steps", 160), marks=pytest.mark.slow)], ids=["full", "lst"])
def test_pictures_that_tell_the_answer_are_better_than_none(argv, tmp_path, monkeypatch, more):
    """Is it a dark or a light picture?  Who does not see it guesses."""
    def examples(task, part):
        return [scenes.Row("what color is it?", ("blue", "red")[i % 2], (f"{part}-{i}",), "", "") for i in range(scenes.SCENES[part])]

    monkeypatch.setattr(scenes, "SCENES", {"train": 480, "val": 4, "test": 10})
    monkeypatch.setattr(scenes, "examples", examples)
    monkeypatch.setattr(scenes, "scene_of", lambda key: int(key.partition("-")[2]))
    monkeypatch.setattr(scenes, "draw", lambda i: np.full((4, 4, 3), 255 * (i % 2), dtype=np.uint8))
    seeing = train.main(argv(*more, "--out", tmp_path / "seeing"))
    blind = train.main(argv(*more, "--out", tmp_path / "blind", "--blank"))
    assert seeing["test"]["score"] > 95 and seeing["test_hidden"]["score"] <= 50 and blind["test"]["score"] <= 50


# ------------------------------------------------------------------------------------------------- load back and predict

def test_a_run_on_pictures_loads_back_to_its_scores(joint):
    model, tokenizer = train.load(joint.out)
    datasets = tasks.load("+".join(TABLE_3), None, "paper")
    args, test = argparse.Namespace(**joint.results["config"]), {task: dataset.test for task, dataset in datasets.items()}
    assert train.evaluate(model, tokenizer, args, test, tasks.look(datasets, str(TOWER), "cpu")) == joint.results["test"]


@pytest.mark.slow
@pytest.mark.parametrize("more", [
    *(("--method", method) for method in baselines.METHODS), *(("--method", method, "--dtype", "bf16") for method in baselines.METHODS[1:]),
    ("--dtype", "bf16"), ("--checkpoint",), ("--method", "full", "--checkpoint"), ("--gates", "shut"), ("--keep", "1"), ("--prune", "aligned"),
    ("--accumulate", 7), ("--method", "lora", "--as-authors"), ("--method", "prompt", "--as-authors"), ("--method", "full", "--freeze", 3)], ids=str)
def test_each_kind_of_run_on_pictures_loads_back_to_its_logits(argv, tmp_path, monkeypatch, more):
    evaluated = spy(monkeypatch, train, "evaluate")
    train.main(argv("--max-steps", 2, *more))
    model, batch = train.load(tmp_path / "run")[0], tasks.collate([row(1, 1, 1.0), row(2, 3, 1.0)], Drawn())
    with torch.no_grad():
        assert torch.equal(model(*batch[:4], batch.images), evaluated[-1][0].eval()(*batch[:4], batch.images))


@pytest.fixture
def asked(argv, tmp_path, monkeypatch):
    """A run with a tower named by a relative path, and where that lies."""
    tower = shutil.copytree(TOWER, tmp_path / "tower")
    monkeypatch.chdir(tmp_path)
    train.main(argv("--max-steps", 1, "--clip", "tower"))
    return tmp_path / "run", tower


def test_a_run_finds_its_clip_from_any_folder(asked, monkeypatch):
    monkeypatch.chdir("/")
    train.load(asked[0])


def test_a_run_is_not_asked_with_another_clip(asked):
    run, tower = asked
    save_file({name: tensor + 1e-3 for name, tensor in load_file(tower / "model.safetensors").items()}, tower / "model.safetensors")
    with pytest.raises(ValueError, match="tower"):
        train.load(run)


@pytest.mark.parametrize("change", [{"clip": "gone"}, {"clip": None}, {"clip": 5}, {"clip": []}, {"blank": "no"}, {"blank": 0},
                                    {"clip_sha256": None}], ids=str)
def test_a_run_with_a_wrong_word_about_pictures_inside_is_refused(joint, tmp_path, monkeypatch, capsys, change):
    """None: the key is missing."""
    config = {name: value for name, value in (joint.results["config"] | change).items() if value is not None or name not in change}
    save_file(weights(joint.out), tmp_path / "trained.safetensors", metadata={"config": json.dumps(config)})
    monkeypatch.setattr(images, "read_image", lambda path: torch.zeros(4, 4, 3, dtype=torch.uint8))
    refused(capsys, ["--out", str(tmp_path), "--task", "vqa", "--predict", "what is it?", "--image", "a.png"])


def picture(path, key="test-0", size=None, mode="RGB", **how):
    """A scene's picture in a file."""
    from PIL import Image
    image = Image.fromarray(scenes.draw(scenes.scene_of(key)))
    path.parent.mkdir(parents=True, exist_ok=True)
    (image.resize(size) if size else image).convert(mode).save(path, **how)
    return str(path)


def predict(joint, task, text, *files):
    return ["--out", str(joint.out), "--task", task, "--predict", text, *(["--image", *map(str, files)] if files else [])]


@needs_pillow
def test_a_picture_file_is_asked_about_as_in_the_test(joint, tmp_path, monkeypatch, capsys):
    """The same tokens and the same features as the scene has, so the same answer."""
    datasets = tasks.load("+".join(TABLE_3), None, "paper")
    features, (model, tokenizer) = tasks.look(datasets, str(TOWER), "cpu"), train.load(joint.out)
    answered = spy(monkeypatch, tasks, "answer")
    for task, dataset in datasets.items():
        [example] = dataset.test[:1]
        rows = tasks.draw(task, tasks.encode(task, [example], tokenizer), 0, 0)
        expected = tasks.collate(rows, features)
        answer = tasks.answer(model, tokenizer, expected, task)[0]
        files = [picture(tmp_path / f"{key}.png", key) for key in example.images]
        capsys.readouterr()
        assert train.main(predict(joint, task, example.source.removeprefix(data_vl.TASKS[task].prompt), *files)) == {"text": answer}
        assert capsys.readouterr().out == f"{answer}\n"
        batch = answered[-1][2]
        assert torch.equal(batch.source_ids, expected.source_ids)
        torch.testing.assert_close(batch.images, expected.images, rtol=1e-3, atol=2e-2)


@needs_pillow
@pytest.mark.parametrize("name, how", [("cmyk.jpg", {"mode": "CMYK"}), ("grey.png", {"mode": "L"}), ("one.png", {"size": (1, 1)}),
                                       ("rgba.png", {"mode": "RGBA"})])
def test_every_kind_of_picture_is_answered(joint, tmp_path, capsys, name, how):
    train.main(predict(joint, "vqa", "what is it?", picture(tmp_path / name, **how)))
    assert capsys.readouterr().out.count("\n") == 1


@needs_pillow
def test_a_run_without_pictures_is_asked_without_them(argv, tmp_path, monkeypatch):
    train.main(argv("--max-steps", 1, "--blank"))
    answered = spy(monkeypatch, tasks, "answer")
    train.main(["--out", str(tmp_path / "run"), "--predict", "what is it?", "--image", picture(tmp_path / "a.png")])
    assert not answered[-1][2].images.any()


@needs_pillow
def test_what_is_no_picture_is_one_line_that_names_the_file(joint, tmp_path, monkeypatch, capsys):
    from PIL import Image
    monkeypatch.setattr(images, "MAX_PIXELS", 5000)
    good, before = picture(tmp_path / "good.png"), contents(joint.out)
    whole = Path(good).read_bytes()
    put(tmp_path, "cut.png", whole[:len(whole) // 2])
    put(tmp_path, "text.png", b"no picture")
    put(tmp_path, "empty.png", b"")
    (tmp_path / "folder.png").mkdir()
    picture(tmp_path / "large.png", size=(100, 51))
    picture(tmp_path / "moving.gif", save_all=True, append_images=[Image.new("RGB", (64, 64), "red")])
    for name in ("cut.png", "text.png", "empty.png", "folder.png", "large.png", "moving.gif", "missing.png"):
        refused(capsys, predict(joint, "vqa", "what is it?", tmp_path / name), str(tmp_path / name))
        refused(capsys, predict(joint, "nlvr2", "there is a star.", good, tmp_path / name), str(tmp_path / name))
    refused(capsys, predict(joint, "vqa", "what is it?", ""), "cannot be read")
    assert contents(joint.out) == before


def test_the_wrong_number_of_pictures_is_one_line(joint, tmp_path, capsys):
    before = contents(joint.out)
    for task, files, words in (("vqa", 0, ("vqa", "--image FILE")), ("vqa", 2, ("a picture",)), ("coco", 0, ("coco",)),
                               ("nlvr2", 1, ("nlvr2", "two pictures", "--image FILE FILE")), ("nlvr2", 3, ("two",)), ("nlvr2", 0, ("two",))):
        refused(capsys, predict(joint, task, "a star.", *[tmp_path / "a.png"] * files), *words)
    assert contents(joint.out) == before


def test_a_joint_run_is_asked_about_one_of_its_tasks(joint, tmp_path, capsys):
    line = ["--out", str(joint.out), "--predict", "what is it?"]
    refused(capsys, line, "vqa, gqa, nlvr2, coco", "--task")
    refused(capsys, [*line, "--image", "a.png"], "--task says which")
    for task in ("vqa+gqa", "vqa,gqa", "sst2", "easy-vqa"):
        refused(capsys, [*line, "--task", task], "--task")


def test_a_run_on_texts_has_no_picture(backbone, glue, tmp_path, capsys):
    line = ["--task", "sst2", "--model", str(backbone), "--data", str(glue), "--out", str(tmp_path / "run"), "--max-steps", "1", "--init", "random",
            "--device", "cpu"]
    for more in (("--blank",), ("--clip", str(TOWER)), ("--image", "a.png")):
        refused(capsys, [*line, *more], more[0])
    assert not (tmp_path / "run").exists()
    train.main(line)
    refused(capsys, ["--out", str(tmp_path / "run"), "--predict", "a good film", "--image", "a.png"], "sst2", "leave --image out")


@pytest.mark.parametrize("more, words", [
    (("--task", "vqa,sst2"), ("with and without pictures",)), (("--task", "vqa+sst2"), ("vqa+sst2", "pictures")),
    (("--task", "sst2+vqa"), ("sst2+vqa", "pictures")), (("--task", "vqa+vqa"), ("vqa", "twice")), (("--task", "vqa,vqa"), ("twice",)),
    (("--task", "vqa+nope"), ("nope", "no task")), (("--task", "vqa+"), ("no task",)), (("--task", "easy-vqa"), ("easy-vqa", "--data")),
    (("--task", "vqa+gqa,gqa+vqa"), ("twice",)), (("--clip", ""), ("--clip", "empty")), (("--prompts", "t5"), ("--prompts",)), (("--data", "sample"), ("sample",)),
    (("--image", "a.png"), ("--image", "--predict")), (("--clip", "nowhere"), ("nowhere", "nano")),
    (("--data", "nowhere"), ("nowhere", "karpathy_train.json")), (("--r", "3"), ("3", "[1, 2, 4, 8]"))],
    ids=lambda part: " ".join(part) if part[0].startswith("--") else "")
def test_a_wrong_argument_about_pictures_is_one_line(argv, tmp_path, capsys, more, words):
    refused(capsys, argv(*more), *words)
    assert not (tmp_path / "run").exists()


def test_a_table_that_could_not_be_made_again_is_not_cleared(argv, tmp_path, capsys):
    train.main(argv("--seeds", "0,1", "--max-steps", 1))
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*.*") if path.is_file()}
    refused(capsys, argv("--seeds", "0,1", "--max-steps", 1, "--overwrite", "--clip", "nowhere"), "nowhere")
    assert {path: path.read_bytes() for path in before} == before and len(before) > 8


def test_asking_takes_no_option_of_the_run_and_captions_take_no_text(joint, capsys):
    line = ["--out", str(joint.out), "--image", "a.png"]
    for more in (["--blank"], ["--clip", "nowhere"]):
        refused(capsys, [*line, "--task", "vqa", "--predict", "what is it?", *more], more[0])
    refused(capsys, [*line, "--task", "coco", "--predict", "what is it?"], "without being asked")
    refused(capsys, [*line, "--task", "vqa", "--predict", " "], "empty")


def test_a_folder_that_is_no_clip_is_one_line(argv, t5, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    for folder in (tmp_path / "empty", t5):
        refused(capsys, argv("--clip", folder), str(folder))
    cut = shutil.copytree(TOWER, tmp_path / "cut")
    (cut / "model.safetensors").write_bytes((TOWER / "model.safetensors").read_bytes()[:9999])
    refused(capsys, argv("--clip", cut), str(cut))
    assert not (tmp_path / "run").exists()


# -------------------------------------------------------------------------------------------------------------- real files

@needs_pillow
def test_a_damaged_picture_ends_the_run_and_replaced_it_goes_on_from_the_features_there(argv, tmp_path, monkeypatch, capsys, shown):
    monkeypatch.setattr(images, "SHARD", 4)  # 0 to 3, 4 to 7, 8 and 9
    folder = put(tmp_path / "easy", "questions.json", [[f"is it {word}?", ("no", "yes")[i % 2], i] for i in range(10) for word in ("red", "blue")])
    files = [Path(picture(folder / "images" / f"{i}.png", f"train-{i}")) for i in range(10)]
    whole = files[9].read_bytes()
    line = argv("--task", "easy-vqa", "--data", folder, "--max-steps", 2)
    files[9].write_bytes(whole[:len(whole) // 2])
    refused(capsys, line, str(files[9]))
    assert shown.counts == [4, 4] and not (tmp_path / "run").exists()
    files[9].unlink()
    refused(capsys, line, "1 of 10 pictures", "9.jpg")
    files[9].write_bytes(whole)
    results = train.main(line)
    assert shown.counts == [4, 4, 2] and results["data"] == "easy-vqa" and results["steps"] == 2
    assert train.main([*line, "--overwrite"])["test"] == results["test"] and shown.counts == [4, 4, 2]
    capsys.readouterr()
    assert train.main(["--out", str(tmp_path / "run"), "--predict", "is it red?", "--image", str(files[0])])["text"] == capsys.readouterr().out[:-1]


@needs_pillow
def test_easy_vqas_train_and_test_folders_lie_side_by_side(tmp_path):
    """As they come; both have pictures 0, 1, 2, ..., and the questions that are read are those of train."""
    for part in ("train", "test"):
        put(tmp_path / part, "questions.json", [["is it red?", ("no", "yes")[i % 2], i] for i in range(10)])
        for i in range(10):
            picture(tmp_path / part / "images" / f"{i}.png", f"{part}-{i}")
    tasks.look({"easy-vqa": data_vl.load("easy-vqa", tmp_path)}, str(TOWER), "cpu")


@needs_pillow
def test_pictures_of_two_folders_do_not_share_features(tmp_path, shown):
    for name, first in (("one", 0), ("two", 10)):
        folder = put(tmp_path / name / "easy", "questions.json", [["is it red?", ("no", "yes")[i % 2], i] for i in range(10)])
        for i in range(10):
            picture(folder / "images" / f"{i}.png", f"train-{first + i}")
    datasets = {name: {"easy-vqa": data_vl.load("easy-vqa", tmp_path / name / "easy")} for name in ("one", "two")}
    one, two, again = (tasks.look(datasets[name], str(TOWER), "cpu").lookup([(str(i),) for i in range(10)]) for name in ("one", "two", "one"))
    assert shown.counts == [10, 10] and torch.equal(one, again) and not torch.equal(one, two)


# ------------------------------------------------------------------------------------------------------------- processes

def child(argv, cache, die_at=None):
    """What another process does: the run, on few scenes, with files of 8 pictures' features; killed at its so-manieth rename."""
    torch.set_num_threads(1)
    scenes.SCENES, images.CACHE, images.SHARD = FEW, cache, 8
    soft(pytest.MonkeyPatch())
    replace, calls = os.replace, itertools.count(1)

    def deadly(*arguments):
        if next(calls) == die_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return replace(*arguments)

    os.replace = deadly
    with open(cache.with_suffix(".said"), "a") as said, contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        train.main(argv)


def run(*arguments):
    process = multiprocessing.get_context("forkserver").Process(target=child, args=arguments)
    process.start()
    process.join(60)
    assert process.exitcode is not None, "the run hangs"
    return process.exitcode


@pytest.mark.slow
@pytest.mark.usefixtures("children")
def test_killed_at_each_rename_it_goes_on_to_the_same_end(argv, tmp_path):
    same = ("--task", "vqa+nlvr2", "--max-steps", 9, "--save-steps", 3)
    assert run(argv(*same, "--out", tmp_path / "straight"), tmp_path / "cache") == 0
    shards = []
    for number in (1, 2, 3, *range(4, 100, 3)):
        line, cache = argv(*same, "--out", tmp_path / f"run{number}", "--resume"), tmp_path / f"cache{number}"
        code = run(line, cache, number)
        if code == 0:
            break
        shards.append(len(list(cache.rglob("shard-*.safetensors"))))
        assert code == -signal.SIGKILL and run(line, cache) == 0
        assert what_counts(tmp_path / f"run{number}") == what_counts(tmp_path / "straight"), number
    assert shards[:4] == [0, 1, 2, 3] and len(shards) > 6, "three renames for the features of 18 pictures, the others for the run"


@pytest.mark.slow
@pytest.mark.usefixtures("children")
@pytest.mark.parametrize("more", [(), ("--accumulate", 2), ("--task", "vqa+nlvr2"), ("--method", "lora")], ids=str)
def test_two_processes_have_the_losses_and_scores_of_one(argv, t5, tmp_path, monkeypatch, more):
    quiet = shutil.copytree(t5, tmp_path / "quiet")  # no dropout
    (quiet / "config.json").write_text(json.dumps(json.loads((t5 / "config.json").read_text()) | {"dropout_rate": 0.0}))
    soft(monkeypatch)
    same = ("--model", quiet, "--batch-size", 13, "--max-steps", 5, *more)  # 40 rows: the last step of an epoch has one
    one = train.main(argv(*same, "--out", tmp_path / "one"))
    together(tmp_path, child, argv(*same, "--out", tmp_path / "two"), tmp_path / "cache2")
    two = json.loads((tmp_path / "two" / "results.json").read_text())
    assert logged(tmp_path / "two", "loss") == pytest.approx(logged(tmp_path / "one", "loss"), abs=1e-5)
    assert all(two[name] == one[name] for name in ("val", "test", "test_hidden", "steps", "trainable_percent"))
