"""Tasks about pictures in train.py: a tiny CLIP-T5 and CLIP, and a few drawn scenes."""
import argparse
import importlib.util
import json
import random
import shutil
import sys
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

import data
import train
from methods import METHODS
from model import EOS, load_t5, load_tokenizer
from run import tasks
from run.options import parse
from run.settings import fill_defaults
from side import LadderT5
from vision import features, scenes
from vision.tasks import TASKS, Question, Task
import vision.tasks
from workshop import ROOT, contents, fill_backbone, interrupt_at, logged, put, refused, spy

sys.path.append(str(ROOT / "tests" / "run"))
from test_folder import what_counts  # noqa: E402
from test_processes import together  # noqa: E402

TOWER = ROOT / "tests" / "fixtures" / "clip-vit"  # 3 x 3 positions of 16 channels
FEW = {"train": 10, "val": 4, "test": 4}  # scenes: 40, 8, 20 and 50 training rows of the tasks
TABLE_3 = ("vqa", "gqa", "nlvr2", "coco")
slow = pytest.mark.slow
needs_pillow = pytest.mark.skipif(importlib.util.find_spec("PIL") is None, reason="needs Pillow")


@pytest.fixture(scope="session")
def t5(tmp_path_factory):
    """A folder with a tiny random T5, and a tokenizer that knows the words about scenes."""
    text = []
    for task in TABLE_3:
        text.append(TASKS[task].prompt + "what is it?")
        for row in scenes.examples(task, "train", 60):
            text += [row.text] if row.text else []
            text += [row.answer] if isinstance(row.answer, str) else row.answer
    return fill_backbone(tmp_path_factory.mktemp("t5"), text, vocab_size=300)


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
    return lambda *more: command(t5, tmp_path / "run", *more)


def cut_off(monkeypatch, argv, number):
    """The run is interrupted while it computes the loss of this step, counting from 1."""
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        spy(patch, train, "loss_of", interrupt_at(number))
        train.main(argv)


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


QUICK = (("vqa", "lst"), ("nlvr2", "lora"), ("coco", "lst"))
EVERY = [pytest.param(task, method, marks=() if (task, method) in QUICK else slow)
         for task in TABLE_3 for method in ("lst", *METHODS)]


@pytest.mark.parametrize("task, method", EVERY)
def test_a_task_trains_is_tested_with_and_without_its_pictures_and_loads_back(
        argv, t5, tmp_path, monkeypatch, task, method):
    files, evaluated = [contents(t5), contents(TOWER)], spy(monkeypatch, train, "evaluate")
    answered = spy(monkeypatch, type(TASKS[task]), "answer")
    results = train.main(argv("--task", task, "--method", method, "--max-steps", 2))
    assert results == json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["test"].keys() == results["test_hidden"].keys() == results["val"].keys()
    seen = [batch.images for *_, batch in answered]
    assert seen[0].any() and seen[-2].any() and not seen[-1].any(), "hidden: all CLIP saw is zero"
    assert torch.equal(answered[-2][-1].source_ids, answered[-1][-1].source_ids)
    model, saved = evaluated[0][0], load_file(tmp_path / "run" / "trained.safetensors")
    if method == "lst":
        after = dict(model.backbone.named_parameters())
        for name, p in load_t5(t5).named_parameters():
            assert torch.equal(p, after[name]) and after[name].grad is None, name
    assert files == [contents(t5), contents(TOWER)]
    total = sum(p.numel() for p in model.parameters())
    count = sum(tensor.numel() for tensor in saved.values())
    assert (results["total_params"], results["trainable_params"]) == (total, count)
    assert any("visual" in name for name in saved) and not any("backbone" in name for name in saved)
    loaded, batch = train.load(tmp_path / "run")[0], answered[0][-1]
    with torch.no_grad():
        expected = model.eval()(*batch[:4], batch.images)
        assert torch.equal(loaded(*batch[:4], batch.images), expected)


@slow
def test_a_table_of_tasks_is_not_cleared_if_it_could_not_be_made_again(argv, tmp_path, capsys):
    line = argv("--task", "vqa,vqa+nlvr2", "--max-steps", 1)
    assert list(train.main(line)["tasks"]) == ["vqa", "vqa+nlvr2"]
    before = contents(tmp_path / "run")
    refused(capsys, [*line, "--overwrite", "--clip", "nowhere"], "nowhere")
    after = contents(tmp_path / "run")
    assert all(after[name] == before[name] for name in before if name.suffix) and len(before) > 8


@pytest.mark.parametrize("method", ["lst", *METHODS])
@pytest.mark.parametrize("task, size, epoch", [
    ("vqa", 300, 5), ("gqa", 500, 3), ("nlvr2", 100, 15), ("coco", 250, 6), ("easy-vqa", 300, 5),
    ("+".join(TABLE_3), 300, 29)])
def test_pictures_have_the_settings_of_table_6(task, size, epoch, method):
    args = parse(["--task", task, "--method", method, "--model", "t5-base"], "")
    args.task = task
    rows = [("source", "target")] * 1500
    fill_defaults(args, {name: SimpleNamespace(train=rows, name="") for name in task.split("+")})
    lr = 3e-3 if method in ("lst", "bitfit", "prompt") else 3e-4
    decay = 0.03 if method == "lst" else 0.01
    assert (args.batch_size, args.lr, args.weight_decay, args.r) == (size, lr, decay, 4)
    assert (args.epochs, args.epsilon, args.beta2, args.max_norm) == (20, 1e-6, 0.999, 5.0)
    assert (args.steps, args.warmup_steps) == (20 * epoch, 2 * epoch)


@pytest.mark.parametrize("task, steps, at", [
    ("vqa+nlvr2", 9, 6), pytest.param("vqa+nlvr2", 9, 9, marks=slow),
    pytest.param("coco", 6, 4, marks=slow)])
def test_a_run_cut_off_goes_on_to_the_same_bits(argv, tmp_path, monkeypatch, task, steps, at):
    soft(monkeypatch)
    # an epoch has 7 steps, or 4
    same = ("--task", task, "--max-steps", steps, "--save-steps", 3, "--cache", 1)
    train.main(argv(*same, "--out", tmp_path / "straight"))
    cut_off(monkeypatch, argv(*same), at)
    shown = spy(monkeypatch, features, "pool")
    train.main(argv(*same, "--resume"))
    assert not shown, "CLIP sees a picture again"
    assert what_counts(tmp_path / "run") == what_counts(tmp_path / "straight")


def test_another_clip_is_refused_by_a_resume_and_by_a_load(argv, tmp_path, monkeypatch, capsys):
    tower = shutil.copytree(TOWER, tmp_path / "tower")
    monkeypatch.chdir(tmp_path)
    line = argv("--max-steps", 3, "--save-steps", 1, "--clip", "tower")
    cut_off(monkeypatch, line, 2)
    before = contents(tmp_path / "run")
    moved = shutil.copytree(tower, tmp_path / "moved")
    tensors = load_file(moved / "model.safetensors")
    tensors["vision_model.post_layernorm.bias"] += 1e-3
    save_file(tensors, moved / "model.safetensors")
    refused(capsys, [*line, "--resume", "--clip", str(moved)], "clip")
    assert contents(tmp_path / "run") == before
    train.main([*line, "--resume"])
    monkeypatch.chdir("/")
    train.load(tmp_path / "run")  # finds its tower from any folder
    with pytest.raises(ValueError, match="moved"):
        train.load(tmp_path / "run", clip=str(moved))


def test_a_seed_gives_the_same_bits_and_clip_sees_each_picture_once(argv, tmp_path, monkeypatch):
    soft(monkeypatch)
    shown = spy(monkeypatch, features, "pool")
    for out, more in (("a", ()), ("b", ()), ("c", ("--seed", 1)), ("d", ("--task", "gqa+nlvr2"))):
        train.main(argv("--max-steps", 2, "--out", tmp_path / out, *more))
        assert sum(len(tokens) for [tokens] in shown) == 18, "the tasks share the scenes"
    a, b, c = (logged(tmp_path / out, "loss") for out in "abc")
    assert a == b != c
    a, b = (load_file(tmp_path / out / "trained.safetensors") for out in "ab")
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def joint(t5, tmp_path_factory):
    """An epoch of Table 3's four tasks in one run: its folder, results, steps, beams."""
    folder, steps = tmp_path_factory.mktemp("joint"), []
    with pytest.MonkeyPatch.context() as patch:
        prepare(patch, folder / "cache")
        drawn, backward = spy(patch, Task, "draw"), train.backward
        answered, generated = spy(patch, Task, "answer"), spy(patch, LadderT5, "generate")

        def stepping(model, rows, *more):
            task, chosen, _, step = drawn[-1]
            assert [row.images for row in chosen] == [row.images for row in rows]
            steps.append((task.name, chosen, step))
            return backward(model, rows, *more)

        patch.setattr(train, "backward", stepping)
        results = train.main(command(t5, folder / "run", "--task", "+".join(TABLE_3),
                                     "--batch-size", 12, "--epochs", 1))
    beams = {(task.name, call[4]) for (task, *_), call in zip(answered, generated, strict=True)}
    return SimpleNamespace(out=folder / "run", results=results, steps=steps, beams=beams)


def test_each_step_is_of_one_task_and_an_epoch_takes_every_row_once(joint):
    rows, sizes = {task: [] for task in TABLE_3}, {task: Counter() for task in TABLE_3}
    for task, chosen, _ in joint.steps:
        rows[task] += map(id, chosen)
        sizes[task][len(chosen)] += 1
    assert [len(rows[task]) for task in TABLE_3] == [40, 8, 20, 50]
    assert all(len(set(of_task)) == len(of_task) for of_task in rows.values())
    # Sec. 4: shares of 300, 500, 100 and 250 rows; here of 12, 20, 4 and 10
    assert sizes == {"vqa": {12: 3, 4: 1}, "gqa": {8: 1}, "nlvr2": {4: 5}, "coco": {10: 5}}
    assert [step for *_, step in joint.steps] == list(range(joint.results["steps"]))


def test_a_joint_run_scores_the_mean_of_its_tasks_and_loads_back_to_it(joint):
    for scores in (joint.results[name] for name in ("val", "test", "test_hidden")):
        assert scores["score"] == pytest.approx(sum(scores[task] for task in TABLE_3) / 4)
    assert joint.beams == {("vqa", 1), ("gqa", 1), ("coco", 5)}  # NLVR2 generates nothing
    datasets = {task: TASKS[task].load() for task in TABLE_3}
    args = argparse.Namespace(**joint.results["config"])
    test = {task: dataset.test for task, dataset in datasets.items()}
    seen = features.clip_features(datasets, str(TOWER), "cpu")
    assert train.evaluate(*train.load(joint.out), args, test, seen) == joint.results["test"]


@pytest.fixture
def ladder(t5):
    torch.manual_seed(0)
    return LadderT5(load_t5(t5, channels=16), r=4).eval()  # no dropout


class Drawn:
    """In the place of Features: for each key other numbers."""

    def lookup(self, rows):
        return torch.stack([torch.randn(1, 9, 16, generator=torch.Generator().manual_seed(int(key)))
                            for [key] in rows])


def row(number, length, weight):
    return data.Row(random.Random(number).choices(range(3, 60), k=6),
                    random.Random(-number).choices(range(3, 60), k=length), (str(number),), weight)


def gradient(model, rows, accumulate=1):
    model.zero_grad()
    args = argparse.Namespace(device="cpu", accumulate=accumulate)
    return train.backward(model, rows, args, Drawn()).item(), model.up.weight.grad.clone()


def test_the_weight_of_a_row_multiplies_the_loss_of_its_tokens_in_any_number_of_passes(ladder):
    [nothing] = TASKS["vqa"].draw([Question([7, 8, 9, EOS], (), ("4",))], 0, 0)  # no answer: 0
    rows, expected = [row(1, 1, 1.0), row(2, 5, 0.3), row(3, 2, 0.9), nothing], 0.0
    for one in rows:
        batch = tasks.collate([one._replace(weight=1.0)], Drawn(), "cpu")
        logits = ladder(*batch[:4], batch.images)[0]
        loss = F.cross_entropy(logits, torch.tensor(one.target), reduction="sum")
        expected += one.weight * loss.item()
    whole = gradient(ladder, rows)
    assert whole[0] == pytest.approx(expected / 9, rel=1e-5) and whole[1].any()
    for passes in (2, 7):  # some have no weights, some no rows
        parts = gradient(ladder, rows, accumulate=passes)
        assert parts[0] == pytest.approx(whole[0], rel=1e-5)
        assert torch.allclose(whole[1], parts[1], atol=1e-4 * whole[1].abs().max())
    loss, zero = gradient(ladder, [nothing, nothing])
    assert loss == 0 and not zero.any()


def test_each_step_draws_an_answer_by_its_weight():
    rows = [Question([8], (([5, 1], 0.6), ([6, 1], 0.3), ([7, 1], 1.0)), ())] * 500
    drawn = Counter((one.target[0], one.weight) for one in TASKS["vqa"].draw(rows, 0, 3))
    assert drawn.keys() == {(5, 0.6), (6, 0.3), (7, 1.0)}
    assert drawn[7, 1.0] > 1.3 * drawn[5, 0.6] > 1.3 * 1.4 * drawn[6, 0.3] > 90
    assert TASKS["vqa"].draw(rows, 0, 3) != TASKS["vqa"].draw(rows, 0, 4)


def test_nlvr2_answers_the_likelier_word_where_another_token_is_likelier_still(ladder, t5):
    rows, tokenizer = [row(i, 1, 1.0) for i in range(16)], load_tokenizer(t5)
    batch = tasks.collate(rows, Drawn(), "cpu")
    start = torch.zeros(16, 1, dtype=torch.long)
    logits = ladder(batch.source_ids, batch.source_mask, start, None, batch.images)[:, 0]
    true, false = (logits[:, tokenizer.encode(word)[0]] for word in ("true", "false"))
    assert (torch.maximum(true, false) < logits.amax(dim=1)).any()
    expected = ["true" if one else "false" for one in true > false]
    assert TASKS["nlvr2"].answer(ladder, tokenizer, batch) == expected


@pytest.mark.parametrize("more", [
    "--method full --lr 3e-3 --max-steps 30",
    pytest.param("--r 1 --batch-size 8 --lr 3e-3 --max-steps 160", marks=slow)])
def test_pictures_that_tell_the_answer_are_better_than_none(argv, monkeypatch, more):
    """Is it a dark or a light picture? Who does not see it guesses."""
    def examples(task, part):
        return [scenes.SceneRow("what is it?", ("blue", "red")[i % 2], (f"{part}-{i}",), "", "")
                for i in range(scenes.SCENES[part])]

    monkeypatch.setattr(scenes, "SCENES", {"train": 480, "val": 4, "test": 10})
    monkeypatch.setattr(scenes, "examples", examples)
    monkeypatch.setattr(scenes, "scene_of", lambda key: int(key.partition("-")[2]))
    monkeypatch.setattr(scenes, "draw", lambda i: np.full((4, 4, 3), 255 * (i % 2), dtype=np.uint8))
    results = train.main(argv(*more.split()))
    assert results["test"]["score"] > 95 and results["test_hidden"]["score"] <= 50


def picture(path, key):
    from PIL import Image
    Image.fromarray(scenes.draw(scenes.scene_of(key))).save(path)
    return path


@needs_pillow
def test_a_picture_file_is_asked_about_as_in_the_test(joint, tmp_path, monkeypatch):
    datasets = {task: TASKS[task].load() for task in TABLE_3}
    model, tokenizer = train.load(joint.out)
    seen = features.clip_features(datasets, str(TOWER), "cpu")
    for name, dataset in datasets.items():
        task, [example] = TASKS[name], dataset.test[:1]
        expected = tasks.collate(task.draw(task.encode([example], tokenizer), 0, 0), seen, "cpu")
        answer = task.answer(model, tokenizer, expected)[0]
        files = [picture(tmp_path / f"{key}.png", key) for key in example.images]
        answered, text = spy(monkeypatch, type(task), "answer"), example.source[len(task.prompt):]
        assert train.main(["--out", str(joint.out), "--task", name, "--predict", text,
                           "--image", *map(str, files)]) == {"text": answer}
        assert torch.equal(answered[0][-1].source_ids, expected.source_ids)
        torch.testing.assert_close(answered[0][-1].images, expected.images, rtol=1e-3, atol=2e-2)


@pytest.mark.parametrize("more, words", [
    ("--task vqa --predict what?", ("vqa", "--image FILE")),
    ("--task nlvr2 --predict true? --image a.png", ("nlvr2", "2 pictures", "--image FILE")),
    ("--predict what?", ("vqa, gqa, nlvr2, coco", "--task")),
    ("--task easy-vqa --predict what? --image a.png", ("--task",))])
def test_a_question_that_does_not_fit_the_run_is_one_line(joint, capsys, more, words):
    before = contents(joint.out)
    refused(capsys, ["--out", str(joint.out), *more.split()], *words)
    assert contents(joint.out) == before


@pytest.mark.parametrize("more, words", [
    ("--task vqa+sst2", ("pictures",)), ("--task easy-vqa", ("easy-vqa", "--data")),
    ("--data nowhere", ("nowhere", "v2_OpenEnded")), ("--clip nowhere", ("nowhere", "nano"))])
def test_a_wrong_argument_about_pictures_is_one_line(argv, tmp_path, capsys, more, words):
    refused(capsys, argv(*more.split(" ")), *words)
    assert not any((tmp_path / "run").glob("*"))


@needs_pillow
def test_a_run_on_files_stops_at_a_damaged_picture_and_goes_on(argv, tmp_path, capsys):
    put(tmp_path / "train", "questions.json", [[f"is it {word}?", ("no", "yes")[i % 2], i]
                                               for i in range(10) for word in ("red", "blue")])
    (tmp_path / "train" / "images").mkdir()
    files = [picture(tmp_path / "train" / "images" / f"{i}.png", f"train-{i}") for i in range(10)]
    line = argv("--task", "easy-vqa", "--data", tmp_path, "--max-steps", 2)
    whole = files[9].read_bytes()
    files[9].write_bytes(whole[:len(whole) // 2])
    refused(capsys, line, str(files[9]))
    files[9].write_bytes(whole)
    results = train.main(line)
    assert (results["data"], results["steps"]) == ("easy-vqa", 2)


def child(argv, cache):
    torch.set_num_threads(1)
    patch = pytest.MonkeyPatch()
    prepare(patch, cache)
    soft(patch)
    train.main(argv)


@slow
@pytest.mark.usefixtures("children")
@pytest.mark.parametrize("more", ["--accumulate 2", "--task vqa+nlvr2", "--method lora"])
def test_two_processes_have_the_losses_and_scores_of_one(argv, t5, tmp_path, monkeypatch, more):
    soft(monkeypatch)  # 40 rows: the last step of an epoch has one
    same = ("--dropout", 0, "--batch-size", 13, "--max-steps", 5, *more.split())
    one = train.main(argv(*same, "--out", tmp_path / "one"))
    together(tmp_path, child, argv(*same, "--out", tmp_path / "two"), tmp_path / "cache2")
    two = json.loads((tmp_path / "two" / "results.json").read_text())
    losses = logged(tmp_path / "one", "loss")
    assert logged(tmp_path / "two", "loss") == pytest.approx(losses, abs=1e-5)
    assert all(two[name] == one[name] for name in ("val", "test", "test_hidden", "steps"))
