"""Tasks about pictures in train.py: a tiny CLIP-T5 and CLIP, and a few drawn scenes."""
import argparse
import importlib.util
import itertools
import json
import shutil
import sys
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import sentencepiece as spm
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

import data
import train
from methods import METHODS
from model import EOS, T5, T5Config, load_t5, load_tokenizer, save_t5
from run import tasks
from run.options import parse
from run.settings import fill_defaults
from side import LadderT5
from vision import features, scenes
from vision.clip import load_clip
from vision.tasks import TASKS, Question, Task
import vision.tasks
from workshop import ROOT, WIDTHS, contents, logged, put, refused

sys.path.append(str(ROOT / "tests" / "run"))
from test_folder import what_counts  # noqa: E402
from test_processes import together  # noqa: E402

TOWER = ROOT / "tests" / "fixtures" / "clip-vit"  # 3 x 3 positions of 16 channels
OTHER = TOWER.with_name("clip-vit-open")
FEW = {"train": 10, "val": 4, "test": 4}  # scenes: 40, 18, 20 and 50 training rows of the tasks
TABLE_3 = ("vqa", "gqa", "nlvr2", "coco")
slow = pytest.mark.slow
needs_pillow = pytest.mark.skipif(importlib.util.find_spec("PIL") is None, reason="needs Pillow")


# --------------------------------------------------------------------------------------- workshop

@pytest.fixture(scope="session")
def t5(tmp_path_factory):
    """A folder with a tiny random T5, and a tokenizer that knows the words about scenes."""
    folder, text = tmp_path_factory.mktemp("t5"), []
    for task in TABLE_3:
        text.append(TASKS[task].prompt + "what is it?")
        for row in scenes.examples(task, "train", 60):
            text += [row.text] if row.text else []
            text += [row.answer] if isinstance(row.answer, str) else row.answer
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(text), model_prefix=str(folder / "spiece"), vocab_size=300,
        hard_vocab_limit=False, character_coverage=1.0, pad_id=0, eos_id=1, unk_id=2, bos_id=-1,
        minloglevel=2)
    torch.manual_seed(0)
    save_t5(T5(T5Config(vocab_size=load_tokenizer(folder).vocab_size + 3, **WIDTHS)), folder)
    return folder


def prepare(patch, cache):
    patch.setattr(scenes, "SCENES", FEW)
    patch.setattr(features, "CACHE", cache)
    patch.setattr(vision.tasks, "MAX_NEW_TOKENS", 4)  # who has not learned does not end an answer


@pytest.fixture(autouse=True)
def few(monkeypatch, tmp_path):
    prepare(monkeypatch, tmp_path / "cache")


def command(t5, out, *more):
    ladder = () if set(more) & set(METHODS) else ("--fisher-samples", "4")
    return ["--task", "vqa", "--model", str(t5), "--clip", str(TOWER), "--out", str(out), *ladder,
            "--batch-size", "16", "--lr", "1e-2", "--warmup-steps", "1", "--device", "cpu",
            *map(str, more)]


@pytest.fixture
def argv(t5, tmp_path):
    """argv(*more): the command of a run into tmp_path/run; `more` comes last."""
    return lambda *more: command(t5, tmp_path / "run", *more)


def spy(patch, owner, name):
    """The arguments of every call of owner.<name>, as a list that grows."""
    original, calls = getattr(owner, name), []

    def spying(*arguments, **named):
        calls.append(arguments)
        return original(*arguments, **named)

    patch.setattr(owner, name, spying)
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
    """How many pictures each call of CLIP is about, and the towers."""
    calls = SimpleNamespace(counts=[], towers=[])

    def load(*arguments):
        tower = load_clip(*arguments)
        tower.register_forward_pre_hook(lambda _, inputs: calls.counts.append(len(inputs[0])))
        calls.towers.append(tower)
        return tower

    monkeypatch.setattr(features, "load_clip", load)
    return calls


def soft(patch):
    """VQA's training questions have three answers of different weights, each fifth has none."""
    original = Task.from_scenes

    def from_scenes(task):
        dataset = original(task)
        for i, example in enumerate(dataset.train if task.name == "vqa" else ()):
            answers = {} if i % 5 == 0 else {"yes": 0.6, "two": 0.3} | example.answers
            dataset.train[i] = example._replace(answers=answers)
        return dataset

    patch.setattr(Task, "from_scenes", from_scenes)


def load(names):
    return {name: TASKS[name].load(None) for name in names.split("+")}


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def change(file):
    tensors = load_file(file)
    tensors["vision_model.post_layernorm.bias"] += 1e-3
    save_file(tensors, file)


def weights(out):
    return load_file(out / "trained.safetensors")


# -------------------------------------------------------------------------- every task and method

QUICK = (("vqa", "lst"), ("nlvr2", "lora"), ("coco", "lst"))
EVERY = [pytest.param(task, method, marks=() if (task, method) in QUICK else slow)
         for task in TABLE_3 for method in ("lst", *METHODS)]


@pytest.mark.parametrize("task, method", EVERY)
def test_a_task_trains_and_is_tested_with_and_without_its_pictures(argv, t5, tmp_path, monkeypatch,
                                                                   capsys, task, method):
    evaluated = spy(monkeypatch, train, "evaluate")
    results = train.main(argv("--task", task, "--method", method, "--max-steps", 2))
    assert results == json.loads((tmp_path / "run" / "results.json").read_text())
    assert [results[name] for name in ("task", "method", "data", "steps")] == [
        task, method, "scenes", 2]
    assert results["test"].keys() == results["test_hidden"].keys() == results["val"].keys()
    assert 0 <= results["test"]["score"] <= 1000
    assert "with the pictures hidden" in capsys.readouterr().out
    model, saved = evaluated[0][0], weights(tmp_path / "run")
    total = sum(p.numel() for p in model.parameters())
    count = sum(tensor.numel() for tensor in saved.values())
    assert (results["total_params"], results["trainable_params"]) == (total, count)
    assert results["trainable_percent"] == pytest.approx(100 * count / total)  # as in Table 3
    assert any("visual" in name for name in saved) and not any("backbone" in name for name in saved)
    backbone = sum(p.numel() for p in load_t5(t5).parameters())
    assert total == backbone + count if method == "lst" else total >= backbone


@pytest.mark.parametrize("task", ["vqa", *(pytest.param(task, marks=slow)
                                           for task in ("nlvr2", "vqa+coco"))])
def test_backbone_and_clip_stay_byte_identical_and_get_no_gradient(argv, t5, monkeypatch, shown,
                                                                   task):
    files, evaluated = [contents(t5), contents(TOWER)], spy(monkeypatch, train, "evaluate")
    train.main(argv("--task", task, "--max-steps", 3))
    backbone = evaluated[-1][0].backbone
    for after, before in ((backbone, load_t5(t5)), (shown.towers[0], load_clip(TOWER))):
        after = dict(after.named_parameters())
        for name, p in before.named_parameters():
            assert torch.equal(p, after[name]), name
            assert after[name].grad is None and not after[name].requires_grad, name
    assert files == [contents(t5), contents(TOWER)]


def test_hidden_pictures_mean_that_all_clip_saw_is_zero(argv, monkeypatch):
    trained, answered = spy(monkeypatch, train, "loss_of"), spy(monkeypatch, Task, "answer")
    train.main(argv("--max-steps", 1))
    seen = [batch.images for *_, batch in answered]  # validation, test, test with hidden pictures
    assert [bool(images.any()) for images in seen] == [True, True, False]
    assert trained[0][1].images.any()
    assert torch.equal(answered[1][-1].source_ids, answered[2][-1].source_ids)


@slow
def test_the_bundled_backbone_and_tower_train_with_no_other_flag(tmp_path):
    results = train.main(["--task", "nlvr2", "--out", str(tmp_path / "run"), "--max-steps", "1",
                          "--fisher-samples", "4", "--device", "cpu"])
    config = results["config"]
    assert (results["model"], config["clip"], config["r"]) == ("nano", "nano", 4)
    assert "score" in results["test_hidden"]


@slow
def test_a_table_of_tasks_is_not_cleared_if_it_could_not_be_made_again(argv, tmp_path, capsys):
    line = argv("--task", "vqa,vqa+nlvr2", "--max-steps", 1)
    assert list(train.main(line)["tasks"]) == ["vqa", "vqa+nlvr2"]
    before = contents(tmp_path / "run")
    refused(capsys, [*line, "--overwrite", "--clip", "nowhere"], "nowhere")
    after = contents(tmp_path / "run")
    assert all(after[name] == before[name] for name in before if name.suffix) and len(before) > 8


def filled(task, method, model="t5-base", rows=1500):
    args = parse(["--task", task, "--method", method, "--model", model], "")
    args.task = task
    fill_defaults(args, {name: [None] * rows for name in task.split("+")}, sample=False)
    return args


@pytest.mark.parametrize("method", ["lst", *METHODS])
@pytest.mark.parametrize("task, size, epoch", [
    ("vqa", 300, 5), ("gqa", 500, 3), ("nlvr2", 100, 15), ("coco", 250, 6), ("easy-vqa", 300, 5),
    ("+".join(TABLE_3), 300, 29)])
def test_pictures_have_the_settings_of_table_6(task, size, epoch, method):
    args, lr = filled(task, method), 3e-3 if method in ("lst", "bitfit", "prompt") else 3e-4
    decay = 0.03 if method == "lst" else 0.01
    assert (args.batch_size, args.lr, args.weight_decay, args.r) == (size, lr, decay, 4)
    assert (args.epochs, args.epsilon, args.beta2, args.max_norm) == (20, 1e-6, 0.999, 5.0)
    assert (args.steps, args.warmup_steps) == (20 * epoch, 2 * epoch)


@pytest.mark.parametrize("task, method, expected", [
    ("vqa", "lst", (16, 14, 5e-4, 1e-8, 0.99, 0.0)),
    ("nlvr2", "lst", (16, 6, 5e-4, 1e-8, 0.99, 0.0)),
    ("vqa+nlvr2", "lst", (16, 14, 5e-4, 1e-8, 0.99, 0.0)),  # the most epochs of theirs
    ("vqa", "full", (32, 3, 3e-4, 1e-6, 0.999, 0.0))])
def test_beside_nano_the_side_network_has_settings_with_which_it_looks(task, method, expected):
    args = filled(task, method, "nano", 320)
    assert (args.batch_size, args.epochs, args.lr, args.epsilon, args.beta2,
            args.dropout) == expected


# ---------------------------------------------------------------------------- cut off and resumed

@pytest.mark.parametrize("task, steps, at", [
    ("vqa", 5, 5), ("vqa+nlvr2", 9, 6), pytest.param("vqa+nlvr2", 9, 9, marks=slow),
    pytest.param("coco", 6, 4, marks=slow)])
def test_a_run_cut_off_goes_on_to_the_same_bits(argv, tmp_path, monkeypatch, capsys, shown, task,
                                                steps, at):
    soft(monkeypatch)
    same = ("--task", task, "--max-steps", steps, "--save-steps", 3)  # 3, 7, 4 steps an epoch
    train.main(argv(*same, "--out", tmp_path / "straight"))
    cut_off(monkeypatch, argv(*same), at)
    shown.counts.clear()
    train.main(argv(*same, "--resume"))
    step = (at - 1) // 3 * 3 if at < 9 else 7
    assert f"goes on after step {step} of {steps}" in capsys.readouterr().out and not shown.counts
    assert what_counts(tmp_path / "run") == what_counts(tmp_path / "straight")


def test_a_resume_with_another_clip_is_refused_before_it_has_seen_a_picture(argv, tmp_path, shown,
                                                                           monkeypatch, capsys):
    tower = shutil.copytree(TOWER, tmp_path / "tower")
    line = argv("--max-steps", 3, "--save-steps", 1, "--clip", tower)
    cut_off(monkeypatch, line, 2)
    before = contents(tmp_path / "run")
    shown.counts.clear()
    refused(capsys, [*line, "--resume", "--clip", str(OTHER)], "clip")
    refused(capsys, [*line, "--resume", "--task", "gqa"], "task", "vqa", "gqa")
    change(tower / "model.safetensors")
    refused(capsys, [*line, "--resume"], "clip_sha256")
    assert contents(tmp_path / "run") == before and not shown.counts


def test_the_same_seed_gives_the_same_bits_and_clip_sees_each_picture_once(argv, tmp_path, shown,
                                                                          monkeypatch):
    soft(monkeypatch)
    losses = []
    for out, seed in (("a", 0), ("b", 0), ("c", 1)):
        train.main(argv("--max-steps", 2, "--seed", seed, "--out", tmp_path / out))
        losses.append(logged(tmp_path / out, "loss"))
        assert sum(shown.counts) == 18, "CLIP sees a picture again"
    assert losses[0] == losses[1] != losses[2]
    a, b, c = (weights(tmp_path / out) for out in "abc")
    assert equal(a, b) and not equal(a, c)
    train.main(argv("--task", "gqa+nlvr2", "--max-steps", 1))
    assert sum(shown.counts) == 18, "the tasks share the scenes"


# ------------------------------------------------------------------------------ one step, one task

@pytest.fixture(scope="module")
def joint(t5, tmp_path_factory):
    """An epoch of Table 3's four tasks in one run: its folder, results, steps, answers."""
    folder, steps, generated = tmp_path_factory.mktemp("joint"), [], []
    with pytest.MonkeyPatch.context() as patch:
        prepare(patch, folder / "cache")
        drawn, generate, backward = spy(patch, Task, "draw"), LadderT5.generate, train.backward
        answered, told = spy(patch, Task, "answer"), spy(patch, vision.tasks.NLVR2, "answer")

        def stepping(model, rows, *more):
            task, chosen, _, step = drawn[-1]
            assert [row.images for row in chosen] == [row.images for row in rows]
            steps.append((task.name, chosen, step))
            return backward(model, rows, *more)

        def generating(self, source_ids, source_mask, most, beams, images):
            generated.append((answered[-1][0].name, most, beams, self.training))
            return generate(self, source_ids, source_mask, most, beams, images)

        patch.setattr(train, "backward", stepping)
        patch.setattr(LadderT5, "generate", generating)
        results = train.main(command(t5, folder / "run", "--task", "+".join(TABLE_3),
                                     "--batch-size", 12, "--epochs", 1))
    names = {task.name for task, *_ in answered + told}
    return SimpleNamespace(out=folder / "run", results=results, steps=steps, generated=generated,
                           answered=names)


def test_each_step_is_of_one_task_and_an_epoch_takes_every_row_once(joint):
    rows, sizes = {task: [] for task in TABLE_3}, {task: Counter() for task in TABLE_3}
    for task, chosen, _ in joint.steps:
        rows[task] += map(id, chosen)
        sizes[task][len(chosen)] += 1
    assert [len(rows[task]) for task in TABLE_3] == [40, 18, 20, 50]
    assert all(len(set(of_task)) == len(of_task) for of_task in rows.values())
    # Sec. 4: shares of 300, 500, 100 and 250 rows; here of 12, 20, 4 and 10
    assert sizes == {"vqa": {12: 3, 4: 1}, "gqa": {18: 1}, "nlvr2": {4: 5}, "coco": {10: 5}}
    assert [tasks.batch_size(task, 300, joint=False) for task in TABLE_3] == [300] * 4
    assert tasks.batch_size("nlvr2", 1, joint=True) == 1
    assert [step for *_, step in joint.steps] == list(range(joint.results["steps"]))
    assert len(logged(joint.out, "loss")) == len(joint.steps)
    groups = list(itertools.groupby(task for task, *_ in joint.steps))
    assert len(groups) > len(TABLE_3), "the tasks' steps are mixed"


def test_the_score_of_a_joint_run_is_the_mean_of_its_tasks(joint):
    for scores in (joint.results[name] for name in ("val", "test", "test_hidden")):
        assert scores["score"] == pytest.approx(sum(scores[task] for task in TABLE_3) / 4)
    different = {"vqa": {"score": 10.0, "invalid": 1, "undefined": 0},
                 "coco": {"score": 40.0, "cider": 40.0, "invalid": 0, "undefined": 2}}
    assert tasks.average(different) == {
        "vqa": 10.0, "coco": 40.0, "score": 25.0, "invalid": 1, "undefined": 2}


def test_captions_use_5_beams_vqa_and_gqa_none_and_nlvr2_generates_nothing(joint):
    assert set(joint.generated) == {
        ("vqa", 4, 1, False), ("gqa", 4, 1, False), ("coco", 4, 5, False)}
    assert joint.answered == set(TABLE_3)


# --------------------------------------------------------------------------------------- the loss

@pytest.fixture
def ladder(t5):
    torch.manual_seed(0)
    return LadderT5(load_t5(t5, channels=16), r=4).eval()  # no dropout


class Drawn:
    """In the place of Features: for each key other numbers."""

    def lookup(self, rows):
        def seen(key):
            return torch.randn(9, 16, generator=torch.Generator().manual_seed(int(key)))
        return torch.stack([torch.stack([seen(key) for key in row]) for row in rows])


def row(number, length, weight):
    dice = torch.Generator().manual_seed(number)
    source = torch.randint(3, 60, (6,), generator=dice).tolist()
    target = torch.randint(3, 60, (length,), generator=dice).tolist()
    return data.Row(source, target, (str(number),), weight)


def collated(*rows):
    return tasks.collate(list(rows), Drawn(), "cpu")


def gradient(model, rows, accumulate=1):
    model.zero_grad()
    args = argparse.Namespace(device="cpu", accumulate=accumulate)
    loss = train.backward(model, rows, args, Drawn())
    return loss.item(), model.up.weight.grad.clone(), model.visual.feature.weight.grad.clone()


def test_the_weight_of_a_row_multiplies_the_loss_of_its_tokens(ladder):
    rows, expected = [row(1, 1, 1.0), row(2, 5, 0.3), row(3, 2, 0.9)], 0.0
    for one in rows:
        batch = collated(one._replace(weight=1.0))
        assert batch.weights is None
        logits = ladder(*batch[:4], batch.images)[0]
        loss = F.cross_entropy(logits, torch.tensor(one.target), reduction="sum")
        expected += one.weight * loss.item()
    assert train.loss_of(ladder, collated(*rows)).item() == pytest.approx(expected, rel=1e-5)
    assert gradient(ladder, rows)[0] == pytest.approx(expected / 8, rel=1e-5)


@pytest.mark.parametrize("passes", [2, 3, 7])
def test_passes_over_weighted_rows_have_the_gradient_of_one(ladder, passes):
    # some passes have no weights, some no rows
    rows = [row(1, 1, 1.0), row(2, 5, 0.3), row(3, 2, 0.9), row(4, 3, 0.0), row(5, 1, 1.0)]
    whole, parts = gradient(ladder, rows), gradient(ladder, rows, accumulate=passes)
    assert parts[0] == pytest.approx(whole[0], rel=1e-5)
    for one, other in zip(whole[1:], parts[1:]):
        assert torch.allclose(one, other, atol=1e-4 * one.abs().max()) and one.any()


def test_a_question_without_an_answer_adds_no_loss_and_no_gradient(ladder):
    rows = [row(1, 1, 1.0), row(2, 5, 0.3)]
    [nothing] = TASKS["vqa"].draw([Question([7, 8, 9, EOS], (), ("3",))], 0, 0)
    assert nothing == data.Row([7, 8, 9, EOS], [EOS], ("3",), 0.0)
    for one, other in zip(gradient(ladder, rows), gradient(ladder, [*rows, nothing])):
        # the means are over 6 and 7 label tokens
        assert torch.allclose(torch.as_tensor(one) * 6, torch.as_tensor(other) * 7, atol=1e-6)
    loss, *gradients = gradient(ladder, [nothing, nothing])
    assert loss == 0 and not any(one.any() for one in gradients)


def test_each_step_draws_an_answer_by_its_weight():
    tokens = {"yes": [5, 1], "two": [6, 1], "red": [7, 1]}
    answers = tuple((tokens[word], weight) for word, weight in
                    (("yes", 0.6), ("two", 0.3), ("red", 1.0)))
    rows = [Question([8], answers, ())] * 50 + [Question([8], (), ())] * 10
    drawn = Counter((*one.target, one.weight) for step in range(10)
                    for one in TASKS["vqa"].draw(rows, 0, step))
    assert drawn[EOS, 0.0] == 100 and {weight for *_, weight in drawn} == {0.0, 0.3, 0.6, 1.0}
    assert drawn[7, 1, 1.0] > 1.3 * drawn[5, 1, 0.6] > 1.3 * 1.4 * drawn[6, 1, 0.3] > 90
    again = [TASKS["vqa"].draw(rows, 0, step) for step in (3, 3, 4)]
    assert again[0] == again[1] != again[2]


# ------------------------------------------------------------------------------------- the answers

def test_nlvr2_answers_the_likelier_word_where_another_token_is_likelier_still(ladder, t5):
    tokenizer, batch = load_tokenizer(t5), collated(*(row(i, 1, 1.0) for i in range(16)))
    start = torch.zeros(16, 1, dtype=torch.long)
    logits = ladder(batch.source_ids, batch.source_mask, start, None, batch.images)[:, 0]
    true, false = (logits[:, tokenizer.encode(word)[0]] for word in ("true", "false"))
    assert (torch.maximum(true, false) < logits.amax(dim=1)).any()
    expected = ["true" if one else "false" for one in true > false]
    assert TASKS["nlvr2"].answer(ladder, tokenizer, batch) == expected


@pytest.mark.parametrize("more", [
    pytest.param("--method full --lr 3e-3 --max-steps 30", id="full"),
    pytest.param("--r 1 --batch-size 8 --lr 3e-3 --max-steps 160", marks=slow, id="lst")])
def test_pictures_that_tell_the_answer_are_better_than_none(argv, monkeypatch, more):
    """Is it a dark or a light picture? Who does not see it guesses."""
    def examples(task, part):
        rows = range(scenes.SCENES[part])
        return [scenes.SceneRow("what is it?", ("blue", "red")[i % 2], (f"{part}-{i}",), "", "")
                for i in rows]

    monkeypatch.setattr(scenes, "SCENES", {"train": 480, "val": 4, "test": 10})
    monkeypatch.setattr(scenes, "examples", examples)
    monkeypatch.setattr(scenes, "scene_of", lambda key: int(key.partition("-")[2]))
    monkeypatch.setattr(scenes, "draw", lambda i: np.full((4, 4, 3), 255 * (i % 2), dtype=np.uint8))
    results = train.main(argv(*more.split()))
    assert results["test"]["score"] > 95 and results["test_hidden"]["score"] <= 50


# -------------------------------------------------------------------------- load back and predict

def test_a_run_on_pictures_loads_back_to_its_scores(joint):
    model, tokenizer = train.load(joint.out)
    datasets = load("+".join(TABLE_3))
    args = argparse.Namespace(**joint.results["config"])
    test = {task: dataset.test for task, dataset in datasets.items()}
    seen = features.clip_features(datasets, str(TOWER), "cpu")
    assert train.evaluate(model, tokenizer, args, test, seen) == joint.results["test"]


@slow
@pytest.mark.parametrize("more", [
    *(f"--method {method}" for method in METHODS),
    *(f"--method {method} --dtype bf16" for method in METHODS if method != "full"),
    "--dtype bf16", "--checkpoint", "--method full --checkpoint", "--gates shut", "--keep 1",
    "--prune aligned", "--accumulate 7", "--method lora --as-authors",
    "--method prompt --as-authors", "--method full --freeze 3"])
def test_each_kind_of_run_on_pictures_loads_back_to_its_logits(argv, tmp_path, monkeypatch, more):
    evaluated = spy(monkeypatch, train, "evaluate")
    train.main(argv("--max-steps", 2, *more.split()))
    model, batch = train.load(tmp_path / "run")[0], collated(row(1, 1, 1.0), row(2, 3, 1.0))
    with torch.no_grad():
        expected = evaluated[-1][0].eval()(*batch[:4], batch.images)
        assert torch.equal(model(*batch[:4], batch.images), expected)


def test_a_run_finds_its_clip_from_any_folder_and_takes_no_other(argv, tmp_path, monkeypatch):
    tower = shutil.copytree(TOWER, tmp_path / "tower")
    monkeypatch.chdir(tmp_path)
    train.main(argv("--max-steps", 1, "--clip", "tower"))
    monkeypatch.chdir("/")
    train.load(tmp_path / "run")
    moved = shutil.copytree(tower, tmp_path / "moved")
    change(tower / "model.safetensors")
    with pytest.raises(ValueError, match="tower"):
        train.load(tmp_path / "run")
    train.load(tmp_path / "run", clip=str(moved))


def picture(path, key="test-0"):
    """A scene's picture in a file."""
    from PIL import Image
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(scenes.draw(scenes.scene_of(key))).save(path)
    return path


def predict(joint, task, text, *files):
    images = ["--image", *map(str, files)] if files else []
    return ["--out", str(joint.out), "--task", task, "--predict", text, *images]


@needs_pillow
def test_a_picture_file_is_asked_about_as_in_the_test(joint, tmp_path, monkeypatch, capsys):
    """The same tokens and the same features as the scene has, so the same answer."""
    datasets, (model, tokenizer) = load("+".join(TABLE_3)), train.load(joint.out)
    seen = features.clip_features(datasets, str(TOWER), "cpu")
    for name, dataset in datasets.items():
        task, [example] = TASKS[name], dataset.test[:1]
        expected = tasks.collate(task.draw(task.encode([example], tokenizer), 0, 0), seen, "cpu")
        answer = task.answer(model, tokenizer, expected)[0]
        files = [picture(tmp_path / f"{key}.png", key) for key in example.images]
        answered, text = spy(monkeypatch, type(task), "answer"), example.source[len(task.prompt):]
        capsys.readouterr()
        assert train.main(predict(joint, name, text, *files)) == {"text": answer}
        assert capsys.readouterr().out == f"{answer}\n"
        batch = answered[0][-1]
        assert torch.equal(batch.source_ids, expected.source_ids)
        torch.testing.assert_close(batch.images, expected.images, rtol=1e-3, atol=2e-2)


@pytest.mark.parametrize("more, words", [
    ("--task vqa --predict what?", ("vqa", "--image FILE")),
    ("--task vqa --predict what? --image a.png b.png", ("vqa", "--image FILE")),
    pytest.param("--task vqa --predict what? --image a.png", ("a.png",), marks=needs_pillow),
    ("--task coco --predict what?", ("coco", "--image FILE")),
    ("--task nlvr2 --predict true? --image a.png", ("nlvr2", "2 pictures", "--image FILE FILE")),
    ("--task coco --predict what? --image a.png", ("without being asked",)),
    ("--predict what?", ("vqa, gqa, nlvr2, coco", "--task")),
    *((f"--task {task} --predict what? --image a.png", ("--task",))
      for task in ("vqa+gqa", "vqa,gqa", "easy-vqa"))])
def test_a_question_that_does_not_fit_the_run_is_one_line(joint, capsys, more, words):
    before = contents(joint.out)
    refused(capsys, ["--out", str(joint.out), *more.split()], *words)
    assert contents(joint.out) == before


@pytest.mark.parametrize("more, words", [
    ("--task vqa+sst2", ("pictures",)), ("--task vqa+gqa,gqa+vqa", ("twice",)),
    ("--task vqa+vqa", ("vqa", "twice")),
    ("--task vqa+nope", ("nope", "no task")), ("--task vqa+", ("no task",)),
    ("--task easy-vqa", ("easy-vqa", "--data")), ("--data sample", ("sample",)),
    ("--data nowhere", ("nowhere", "v2_OpenEnded")), ("--r 3", ("3", "[1, 2, 4, 8]")),
    ("--clip ", ("--clip", "empty")), ("--clip nowhere", ("nowhere", "nano"))])
def test_a_wrong_argument_about_pictures_is_one_line(argv, tmp_path, capsys, more, words):
    refused(capsys, argv(*more.split(" ")), *words)
    assert not (tmp_path / "run").exists()


# -------------------------------------------------------------------------------------- real files

@needs_pillow
def test_a_damaged_picture_ends_the_run_and_replaced_it_goes_on_from_the_features_there(
        argv, tmp_path, monkeypatch, capsys, shown):
    monkeypatch.setattr(features, "SHARD", 4)  # 0 to 3, 4 to 7, 8 and 9
    rows = [[f"is it {word}?", ("no", "yes")[i % 2], i] for i in range(10)
            for word in ("red", "blue")]
    for part in ("train", "test"):  # side by side, as they come: train is read
        put(tmp_path / part, "questions.json", rows)
        files = [picture(tmp_path / part / "images" / f"{i}.png", f"{part}-{i}")
                 for i in range(10)]
    bad = tmp_path / "train" / "images" / "9.png"
    whole, line = bad.read_bytes(), argv("--task", "easy-vqa", "--data", tmp_path, "--max-steps", 2)
    bad.write_bytes(whole[:len(whole) // 2])
    refused(capsys, line, str(bad))
    assert shown.counts == [4, 4]
    bad.unlink()
    refused(capsys, line, "1 of 10 pictures", "9.jpg")
    bad.write_bytes(whole)
    results = train.main(line)
    assert shown.counts == [4, 4, 2] and (results["data"], results["steps"]) == ("easy-vqa", 2)
    assert train.main([*line, "--overwrite"])["test"] == results["test"]
    assert shown.counts == [4, 4, 2]
    asked = ["--out", str(tmp_path / "run"), "--predict", "is it red?", "--image", str(files[0])]
    capsys.readouterr()
    assert train.main(asked)["text"] == capsys.readouterr().out[:-1]
    seen = [features.clip_features({"": TASKS["easy-vqa"].load(folder)}, str(TOWER), "cpu").lookup(
        [(str(i),) for i in range(10)]) for folder in (tmp_path, tmp_path / "test", tmp_path)]
    assert torch.equal(seen[0], seen[2]) and not torch.equal(seen[0], seen[1])  # same names


# -------------------------------------------------------------------------------------- processes

def child(argv, cache):
    """What another process does: the run."""
    torch.set_num_threads(1)
    patch = pytest.MonkeyPatch()
    prepare(patch, cache)
    soft(patch)
    train.main(argv)


@slow
@pytest.mark.usefixtures("children")
@pytest.mark.parametrize("more", ["", "--accumulate 2", "--task vqa+nlvr2", "--method lora"])
def test_two_processes_have_the_losses_and_scores_of_one(argv, t5, tmp_path, monkeypatch, more):
    soft(monkeypatch)  # 40 rows: the last step of an epoch has one
    same = ("--dropout", 0, "--batch-size", 13, "--max-steps", 5, *more.split())
    one = train.main(argv(*same, "--out", tmp_path / "one"))
    together(tmp_path, child, argv(*same, "--out", tmp_path / "two"), tmp_path / "cache2")
    two = json.loads((tmp_path / "two" / "results.json").read_text())
    losses = logged(tmp_path / "two", "loss"), logged(tmp_path / "one", "loss")
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    same = ("val", "test", "test_hidden", "steps", "trainable_percent")
    assert all(two[name] == one[name] for name in same)
