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
FEW = {"train": 10, "val": 4, "test": 4}  # scenes: 40, 18, 20 and 50 training rows of the tasks
TABLE_3 = ("vqa", "gqa", "nlvr2", "coco")
slow = pytest.mark.slow
needs_pillow = pytest.mark.skipif(importlib.util.find_spec("PIL") is None, reason="needs Pillow")


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


def weights(out):
    return load_file(out / "trained.safetensors")


def change(file):
    tensors = load_file(file)
    tensors["vision_model.post_layernorm.bias"] += 1e-3
    save_file(tensors, file)


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
def towers(monkeypatch):
    """The towers that runs have loaded; `seen` of each counts the pictures of each call."""
    loaded = []

    def load(*arguments):
        tower = load_clip(*arguments)
        tower.seen = []
        tower.register_forward_pre_hook(lambda _, inputs: tower.seen.append(len(inputs[0])))
        loaded.append(tower)
        return tower

    monkeypatch.setattr(features, "load_clip", load)
    return loaded


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
        argv, tmp_path, monkeypatch, task, method):
    evaluated = spy(monkeypatch, train, "evaluate")
    answered = spy(monkeypatch, type(TASKS[task]), "answer")
    results = train.main(argv("--task", task, "--method", method, "--max-steps", 2))
    assert results == json.loads((tmp_path / "run" / "results.json").read_text())
    assert [results[name] for name in ("task", "method", "data", "steps")] == [
        task, method, "scenes", 2]
    assert results["test"].keys() == results["test_hidden"].keys() == results["val"].keys()
    seen = [batch.images for *_, batch in answered]
    assert seen[0].any() and seen[-2].any() and not seen[-1].any(), "hidden: all CLIP saw is zero"
    assert torch.equal(answered[-2][-1].source_ids, answered[-1][-1].source_ids)
    model, saved = evaluated[0][0], weights(tmp_path / "run")
    total = sum(p.numel() for p in model.parameters())
    count = sum(tensor.numel() for tensor in saved.values())
    assert (results["total_params"], results["trainable_params"]) == (total, count)
    assert any("visual" in name for name in saved) and not any("backbone" in name for name in saved)
    loaded, batch = train.load(tmp_path / "run")[0], answered[0][-1]
    with torch.no_grad():
        expected = model.eval()(*batch[:4], batch.images)
        assert torch.equal(loaded(*batch[:4], batch.images), expected)


@pytest.mark.parametrize("task", ["vqa", pytest.param("nlvr2+coco", marks=slow)])
def test_backbone_and_clip_stay_byte_identical_and_get_no_gradient(argv, t5, monkeypatch, towers,
                                                                   task):
    files, evaluated = [contents(t5), contents(TOWER)], spy(monkeypatch, train, "evaluate")
    train.main(argv("--task", task, "--max-steps", 3))
    backbone = evaluated[-1][0].backbone
    for after, before in ((backbone, load_t5(t5)), (towers[0], load_clip(TOWER))):
        after = dict(after.named_parameters())
        for name, p in before.named_parameters():
            assert torch.equal(p, after[name]), name
            assert after[name].grad is None and not after[name].requires_grad, name
    assert files == [contents(t5), contents(TOWER)]


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


def test_beside_nano_the_side_network_has_settings_of_its_own():
    for task, epochs in (("vqa", 14), ("nlvr2", 6), ("vqa+nlvr2", 14)):  # the most epochs of theirs
        args = filled(task, "lst", "nano", 320)
        assert (args.batch_size, args.epochs, args.lr, args.epsilon, args.beta2,
                args.dropout) == (16, epochs, 5e-4, 1e-8, 0.99, 0.0)
    args = filled("vqa", "full", "nano", 320)
    assert (args.batch_size, args.epochs, args.lr, args.epsilon) == (32, 3, 3e-4, 1e-6)


@pytest.mark.parametrize("task, steps, at", [
    ("vqa+nlvr2", 9, 6), pytest.param("vqa+nlvr2", 9, 9, marks=slow),
    pytest.param("coco", 6, 4, marks=slow)])
def test_a_run_cut_off_goes_on_to_the_same_bits(argv, tmp_path, monkeypatch, towers, task, steps,
                                                at):
    soft(monkeypatch)
    same = ("--task", task, "--max-steps", steps, "--save-steps", 3)  # an epoch has 7 steps, or 4
    train.main(argv(*same, "--out", tmp_path / "straight"))
    cut_off(monkeypatch, argv(*same), at)
    towers.clear()
    train.main(argv(*same, "--resume"))
    assert not any(tower.seen for tower in towers), "CLIP sees a picture again"
    assert what_counts(tmp_path / "run") == what_counts(tmp_path / "straight")


def test_another_clip_is_refused_by_a_resume_and_by_a_load(argv, tmp_path, monkeypatch, capsys):
    tower = shutil.copytree(TOWER, tmp_path / "tower")
    monkeypatch.chdir(tmp_path)
    line = argv("--max-steps", 3, "--save-steps", 1, "--clip", "tower")
    cut_off(monkeypatch, line, 2)
    before = contents(tmp_path / "run")
    refused(capsys, [*line, "--resume", "--task", "gqa"], "task", "vqa", "gqa")
    moved = shutil.copytree(tower, tmp_path / "moved")
    change(moved / "model.safetensors")
    refused(capsys, [*line, "--resume", "--clip", str(moved)], "clip")
    assert contents(tmp_path / "run") == before
    train.main([*line, "--resume"])
    monkeypatch.chdir("/")
    train.load(tmp_path / "run")  # finds its tower from any folder
    with pytest.raises(ValueError, match="moved"):
        train.load(tmp_path / "run", clip=str(moved))


def test_the_same_seed_gives_the_same_bits_and_clip_sees_each_picture_once(argv, tmp_path, towers,
                                                                          monkeypatch):
    soft(monkeypatch)
    for out, more in (("a", ()), ("b", ()), ("c", ("--seed", 1)), ("d", ("--task", "gqa+nlvr2"))):
        train.main(argv("--max-steps", 2, "--out", tmp_path / out, *more))
        assert sum(sum(tower.seen) for tower in towers) == 18, "the tasks share the scenes"
    a, b, c = (logged(tmp_path / out, "loss") for out in "abc")
    assert a == b != c
    a, b = (weights(tmp_path / out) for out in "ab")
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def joint(t5, tmp_path_factory):
    """An epoch of Table 3's four tasks in one run: its folder, results, steps, generations."""
    folder, steps, generated = tmp_path_factory.mktemp("joint"), [], []
    with pytest.MonkeyPatch.context() as patch:
        prepare(patch, folder / "cache")
        drawn, generate, backward = spy(patch, Task, "draw"), LadderT5.generate, train.backward
        answered = spy(patch, Task, "answer")

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
    return SimpleNamespace(out=folder / "run", results=results, steps=steps, generated=generated)


def test_each_step_is_of_one_task_and_an_epoch_takes_every_row_once(joint):
    rows, sizes = {task: [] for task in TABLE_3}, {task: Counter() for task in TABLE_3}
    for task, chosen, _ in joint.steps:
        rows[task] += map(id, chosen)
        sizes[task][len(chosen)] += 1
    assert [len(rows[task]) for task in TABLE_3] == [40, 18, 20, 50]
    assert all(len(set(of_task)) == len(of_task) for of_task in rows.values())
    # Sec. 4: shares of 300, 500, 100 and 250 rows; here of 12, 20, 4 and 10
    assert sizes == {"vqa": {12: 3, 4: 1}, "gqa": {18: 1}, "nlvr2": {4: 5}, "coco": {10: 5}}
    assert [step for *_, step in joint.steps] == list(range(joint.results["steps"]))
    groups = list(itertools.groupby(task for task, *_ in joint.steps))
    assert len(groups) > len(TABLE_3), "the tasks' steps are mixed"


def test_a_joint_run_scores_the_mean_of_its_tasks_and_loads_back_to_it(joint):
    for scores in (joint.results[name] for name in ("val", "test", "test_hidden")):
        assert scores["score"] == pytest.approx(sum(scores[task] for task in TABLE_3) / 4)
    assert set(joint.generated) == {  # captions take 5 beams, NLVR2 generates nothing
        ("vqa", 4, 1, False), ("gqa", 4, 1, False), ("coco", 4, 5, False)}
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


def gradient(model, rows, accumulate=1):
    model.zero_grad()
    args = argparse.Namespace(device="cpu", accumulate=accumulate)
    return train.backward(model, rows, args, Drawn()).item(), model.up.weight.grad.clone()


@pytest.mark.parametrize("passes", [2, 7])
def test_passes_over_weighted_rows_have_the_gradient_of_one(ladder, passes):
    # some passes have no weights, some no rows; a question without an answer adds no loss
    [nothing] = TASKS["vqa"].draw([Question([7, 8, 9, EOS], (), ("4",))], 0, 0)
    assert nothing == data.Row([7, 8, 9, EOS], [EOS], ("4",), 0.0)
    rows = [row(1, 1, 1.0), row(2, 5, 0.3), row(3, 2, 0.9), nothing, row(5, 1, 1.0)]
    whole, parts = gradient(ladder, rows), gradient(ladder, rows, accumulate=passes)
    assert parts[0] == pytest.approx(whole[0], rel=1e-5)
    assert torch.allclose(*whole[1:], *parts[1:], atol=1e-4 * whole[1].abs().max())
    loss, zero = gradient(ladder, [nothing, nothing])
    assert whole[1].any() and loss == 0 and not zero.any()


def test_each_step_draws_an_answer_by_its_weight():
    tokens = {"yes": [5, 1], "two": [6, 1], "red": [7, 1]}
    answers = tuple((tokens[word], weight) for word, weight in
                    (("yes", 0.6), ("two", 0.3), ("red", 1.0)))
    rows = [Question([8], answers, ())] * 50 + [Question([8], (), ())] * 10
    drawn = Counter((*one.target, one.weight) for step in range(10)
                    for one in TASKS["vqa"].draw(rows, 0, step))
    assert drawn[EOS, 0.0] == 100 and {weight for *_, weight in drawn} == {0.0, 0.3, 0.6, 1.0}
    assert drawn[7, 1, 1.0] > 1.3 * drawn[5, 1, 0.6] > 1.3 * 1.4 * drawn[6, 1, 0.3] > 90


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


def picture(path, key="test-0"):
    """A scene's picture in a file."""
    from PIL import Image
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(scenes.draw(scenes.scene_of(key))).save(path)
    return path


@needs_pillow
def test_a_picture_file_is_asked_about_as_in_the_test(joint, tmp_path, monkeypatch, capsys):
    """The same tokens and the same features as the scene has, so the same answer."""
    datasets = {task: TASKS[task].load() for task in TABLE_3}
    model, tokenizer = train.load(joint.out)
    seen = features.clip_features(datasets, str(TOWER), "cpu")
    for name, dataset in datasets.items():
        task, [example] = TASKS[name], dataset.test[:1]
        expected = tasks.collate(task.draw(task.encode([example], tokenizer), 0, 0), seen, "cpu")
        answer = task.answer(model, tokenizer, expected)[0]
        files = [picture(tmp_path / f"{key}.png", key) for key in example.images]
        answered, text = spy(monkeypatch, type(task), "answer"), example.source[len(task.prompt):]
        capsys.readouterr()
        assert train.main(["--out", str(joint.out), "--task", name, "--predict", text,
                           "--image", *map(str, files)]) == {"text": answer}
        assert capsys.readouterr().out == f"{answer}\n"
        batch = answered[0][-1]
        assert torch.equal(batch.source_ids, expected.source_ids)
        torch.testing.assert_close(batch.images, expected.images, rtol=1e-3, atol=2e-2)


@pytest.mark.parametrize("more, words", [
    ("--task vqa --predict what?", ("vqa", "--image FILE")),
    pytest.param("--task vqa --predict what? --image a.png", ("a.png",), marks=needs_pillow),
    ("--task nlvr2 --predict true? --image a.png", ("nlvr2", "2 pictures", "--image FILE FILE")),
    ("--predict what?", ("vqa, gqa, nlvr2, coco", "--task")),
    ("--task easy-vqa --predict what? --image a.png", ("--task",))])
def test_a_question_that_does_not_fit_the_run_is_one_line(joint, capsys, more, words):
    before = contents(joint.out)
    refused(capsys, ["--out", str(joint.out), *more.split()], *words)
    assert contents(joint.out) == before


@pytest.mark.parametrize("more, words", [
    ("--task vqa+sst2", ("pictures",)), ("--task vqa+vqa", ("vqa", "twice")),
    ("--task vqa+nope", ("nope", "no task")), ("--task easy-vqa", ("easy-vqa", "--data")),
    ("--data nowhere", ("nowhere", "v2_OpenEnded")), ("--clip nowhere", ("nowhere", "nano"))])
def test_a_wrong_argument_about_pictures_is_one_line(argv, tmp_path, capsys, more, words):
    refused(capsys, argv(*more.split(" ")), *words)
    assert not (tmp_path / "run").exists()


@needs_pillow
def test_a_run_on_files_stops_at_a_damaged_picture_and_goes_on_once_it_is_mended(
        argv, tmp_path, monkeypatch, capsys, towers):
    monkeypatch.setattr(features, "SHARD", 4)  # pictures 0 to 3, 4 to 7, 8 and 9
    put(tmp_path / "train", "questions.json", [[f"is it {word}?", ("no", "yes")[i % 2], i]
                                               for i in range(10) for word in ("red", "blue")])
    files = [picture(tmp_path / "train" / "images" / f"{i}.png", f"train-{i}") for i in range(10)]
    whole, line = files[9].read_bytes(), argv("--task", "easy-vqa", "--data", tmp_path,
                                              "--max-steps", 2)
    files[9].write_bytes(whole[:len(whole) // 2])
    refused(capsys, line, str(files[9]))
    files[9].unlink()
    refused(capsys, line, "1 of 10 pictures", "9.jpg")
    files[9].write_bytes(whole)
    results = train.main(line)
    assert [tower.seen for tower in towers if tower.seen] == [[4, 4], [2]]
    assert (results["data"], results["steps"]) == ("easy-vqa", 2)


def child(argv, cache):
    """What another process does: the run."""
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
    losses = logged(tmp_path / "two", "loss"), logged(tmp_path / "one", "loss")
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    same = ("val", "test", "test_hidden", "steps", "trainable_percent")
    assert all(two[name] == one[name] for name in same)
