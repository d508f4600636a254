"""Tasks about pictures: official files, and steps of several tasks; on small files made here."""
import hashlib
import random

import pytest

from vision.tasks import TASKS, Example, multitask
from workshop import one_line, put

COCO = "COCO_train2014_000000000009", "COCO_val2014_000000000042", "COCO_val2014_000000000073"
TEN = ("yes",) * 4 + ("no",) * 3 + ("maybe",) * 2 + ("maybe not",)
VQA_FILES = TASKS["vqa"].files


def easy(folder, images=20):
    return put(folder, "questions.json", [[f"what is shape {i} of {image}?", "circle", image]
                                          for image in range(images) for i in range(image % 3 + 1)])


def vqa_rows(number, image_id, ten=TEN):
    answers = [{"answer": answer, "answer_confidence": "yes", "answer_id": i}
               for i, answer in enumerate(ten, 1)]
    return ({"question_id": number, "image_id": image_id, "question": f"Is it {number}?"},
            {"question_id": number, "image_id": image_id, "question_type": "is it",
             "answer_type": "yes/no", "multiple_choice_answer": ten[0], "answers": answers})


def vqa(folder, train=((1, 9),), val=((2, 42), (3, 73))):
    """train, val: (question id, image id), or rows as `vqa_rows` makes them."""
    for i, year, rows in ((0, "train2014", train), (2, "val2014", val)):
        rows = [vqa_rows(*row) if isinstance(row[0], int) else row for row in rows]
        about = {"info": {}, "data_subtype": year}
        put(folder, VQA_FILES[i], about | {"questions": [row[0] for row in rows]})
        put(folder, VQA_FILES[i + 1], about | {"annotations": [row[1] for row in rows]})
    return folder


def coco_image(key, split, *captions):
    sentences = [{"tokens": caption.split(), "raw": caption, "imgid": 0} for caption in captions]
    return {"filepath": key.split("_")[1], "filename": f"{key}.jpg", "split": split, "imgid": 0,
            "sentences": sentences}


def coco(folder, *images):
    images = images or [coco_image(*pair, "c") for pair in zip(COCO, ("train", "val", "test"))]
    return put(folder, "dataset_coco.json", {"dataset": "coco", "images": list(images)})


def gqa(folder):
    for part, image in (("train", "2375429"), ("val", "2375429"), ("testdev", "n161313")):
        row = {"question": f"Is it {part}?", "answer": "yes", "fullAnswer": "Yes, it is.",
               "imageId": image, "isBalanced": True, "types": {}, "semantic": []}
        put(folder, f"{part}_balanced_questions.json", {"02930152": row})
    return folder


def nlvr2(folder):
    for part in ("train", "dev", "test1"):
        rows = [{"sentence": "Two dogs.", "label": "True", "identifier": f"{part}-896-0-1"},
                {"sentence": "No dog.", "label": "False", "identifier": f"{part}-896-1-0"}]
        put(folder, f"{part}.json", rows, lines=True)
    return folder


# ---------------------------------------------------------------------------------------- readers

def test_easy_vqa_is_split_by_picture(tmp_path):
    dataset = TASKS["easy-vqa"].load(easy(tmp_path, images=50))
    parts = dataset.train, dataset.val, dataset.test
    train, val, test = ({example.images for example in part} for part in parts)
    assert (len(train), len(val), len(test)) == (40, 5, 5)
    assert not (train & val or train & test or val & test)
    again = TASKS["easy-vqa"].load(easy(tmp_path, images=50))
    assert again.val == dataset.val and val != {(str(i),) for i in range(40, 45)}  # the same, drawn
    every = [example for part in parts for example in part]
    assert Example("vqa: what is shape 1 of 4?", {"circle": 1.0}, ("4",)) in every
    assert len(every) == sum(image % 3 + 1 for image in range(50)) and dataset.skipped == 0
    bytes_of = (tmp_path / "questions.json").read_bytes()
    assert dataset.sha256 == hashlib.sha256(bytes_of).hexdigest() and dataset.name == "easy-vqa"


def test_files_may_lie_in_the_tasks_own_folder(tmp_path):
    easy(tmp_path / "easy_vqa")
    gqa(tmp_path / "GQA")
    assert TASKS["easy-vqa"].load(tmp_path).train
    assert TASKS["gqa"].load(str(tmp_path)).folder == tmp_path


def test_vqa_beside_dataset_coco_has_karpathys_split(tmp_path):
    vqa(tmp_path, val=[(2, 42), (3, 73), (4, 74), (5, 42)])
    rest = "COCO_val2014_000000000074"
    coco(tmp_path, coco_image(COCO[0], "train", "a"), coco_image(COCO[1], "val", "b"),
         coco_image(COCO[2], "test", "c"), coco_image(rest, "restval", "d"))
    dataset = TASKS["vqa"].load(tmp_path)
    weights = {"yes": 1.0, "no": 0.9, "maybe": 0.6, "maybe not": 0.3}
    assert dataset.train == [Example("vqa: Is it 1?", weights, (COCO[0],), TEN),
                             Example("vqa: Is it 4?", weights, (rest,), TEN)]
    assert [example.source[-2] for example in dataset.val] == ["2", "5"]
    assert [example.images for example in dataset.test] == [(COCO[2],)]
    files = [tmp_path / name for name in (*VQA_FILES, "dataset_coco.json")]
    every_byte = b"".join(path.read_bytes() for path in files)
    assert dataset.sha256 == hashlib.sha256(every_byte).hexdigest()
    assert dataset.name == "vqa-karpathy"


def test_vqa_without_it_halves_the_pictures_of_val2014(tmp_path):
    dataset = TASKS["vqa"].load(vqa(tmp_path, val=[(i, i // 3) for i in range(2, 62)]))
    val, test = ({example.images for example in part} for part in (dataset.val, dataset.test))
    assert dataset.name == "vqa-halved" and len(dataset.train) == 1
    assert len(val) + len(test) == 21 and not val & test and abs(len(val) - len(test)) == 1
    assert len(dataset.val) + len(dataset.test) == 60


def test_vqas_empty_answer_is_a_reference_but_no_target(tmp_path):
    ten = ["red"] * 9 + [""]
    [example] = TASKS["vqa"].load(vqa(tmp_path, train=[vqa_rows(1, 9, ten)])).train
    assert example.answers == {"red": 1.0} and example.references == tuple(ten)


def test_gqa(tmp_path):
    dataset = TASKS["gqa"].load(gqa(tmp_path))
    assert dataset.train == [Example("gqa: Is it train?", {"yes": 1.0}, ("2375429",))]
    assert dataset.val[0].source == "gqa: Is it val?"
    assert dataset.test == [Example("gqa: Is it testdev?", {"yes": 1.0}, ("n161313",))]


def test_nlvr2(tmp_path):
    dataset = TASKS["nlvr2"].load(nlvr2(tmp_path))
    pairs = [tuple(f"test1-896-{i}-img{side}" for side in (0, 1)) for i in (0, 1)]
    assert dataset.test == [Example("nlvr: Two dogs.", {"true": 1.0}, pairs[0]),
                            Example("nlvr: No dog.", {"false": 1.0}, pairs[1])]
    assert dataset.val[0].images[1] == "dev-896-0-img1"
    assert dataset.train[0].images[0] == "train-896-0-img0"


def test_coco_trains_on_each_caption_and_tests_on_all(tmp_path):
    five = [f" a dog, number {i} " for i in (1, 2, 3, 4, 4)]
    kept = tuple(caption.strip() for caption in five)
    keys = [COCO[0].replace("9", str(i)) for i in range(4)]
    splits = ("train", "restval", "val", "test")
    images = [coco_image(key, split, *five) for key, split in zip(keys, splits)]
    dataset = TASKS["coco"].load(coco(tmp_path, *images))
    assert len(dataset.train) == 10
    assert dataset.train[1] == Example("caption:", {"a dog, number 2": 1.0}, (keys[0],), kept)
    # the same caption twice is two references
    assert dataset.test == [Example("caption:", dict.fromkeys(kept, 1.0), (keys[3],), kept)]


def test_limits_and_shares_are_the_authors():  # Sec. 4: VQA 300 rows, GQA 500, NLVR2 100, COCO 250
    limits = {name: (task.max_source, task.max_target) for name, task in TASKS.items()}
    assert limits == {"vqa": (20, 10), "gqa": (20, None), "nlvr2": (None, None),
                      "coco": (None, 40), "easy-vqa": (20, 10)}
    assert [round(300 * task.share) for task in TASKS.values()] == [300, 500, 100, 250, 300]


# ------------------------------------------------------------------------------- what can be wrong

ROWS = {  # a good row of each task; then what makes it malformed
    "easy-vqa": (["q", "a", 1], [], ["q", "a"], ["q", "a", "1"], ["q", "", 1], ["q", "a", True],
                 ["q", "a", -1], "row", None, {"q": 1}, ["\ud800", "a", 1], [" ", "a", 1], 7),
    "gqa": ({"question": "q", "answer": "a", "imageId": "1"}, {"question": "q", "answer": "a"},
            {"question": "q", "answer": 5, "imageId": "1"},
            {"question": None, "answer": "a", "imageId": "1"}, [], 5),
    "nlvr2": ({"sentence": "s", "label": "True", "identifier": "dev-1-0-0"},
              {"sentence": "s", "identifier": "dev-1-0-1"},
              {"sentence": "s", "identifier": "dev", "label": "True"},
              {"sentence": "s", "identifier": "dev-1-0-1", "label": "maybe"},
              {"identifier": "dev-1-0-1", "label": "True"}, [1], "text", None,
              {"sentence": "s", "identifier": "dev-1-0-1", "label": ["True"]}),
    "coco": (coco_image(COCO[0], "test", "c"), {"filename": "a.jpg", "split": "test"},
             {"filename": "a.jpg", "split": "dev", "sentences": [{"raw": "c"}]},
             {"filename": "a.jpg", "split": "test", "sentences": []},
             {"filename": 1, "split": "test", "sentences": [{"raw": "c"}]},
             {"filename": "a.jpg", "split": "test", "sentences": ["c"]},
             {"filename": "a.jpg", "split": ["test"], "sentences": [{"raw": "c"}]}, 3),
}


def with_row(folder, task, row, count):
    """The task's files, one of which ends with this row after count - 1 good ones."""
    good = ROWS[task][0]
    if task == "easy-vqa":
        return put(folder, "questions.json", [["q", "a", i] for i in range(count - 1)] + [row])
    if task == "gqa":
        rows = dict.fromkeys(range(count - 1), good) | {"x": row}
        return put(gqa(folder), "val_balanced_questions.json", rows)
    if task == "nlvr2":
        return put(nlvr2(folder), "dev.json", [good] * (count - 1) + [row], lines=True)
    both = [coco_image(COCO[0], split, "c") for split in ("train", "val")]
    return coco(folder, *both, *[good] * (count - 3), row)


@pytest.mark.parametrize("task, row", [(task, row) for task in ROWS for row in ROWS[task][1:]])
def test_one_malformed_row_in_a_hundred_is_skipped_and_more_are_an_error(tmp_path, task, row):
    assert TASKS[task].load(with_row(tmp_path, task, row, 100)).skipped == 1
    with pytest.raises(ValueError) as error:
        TASKS[task].load(with_row(tmp_path, task, row, 99))
    one_line(error, str(tmp_path), "1 of 99 rows are malformed", "row 99: ")


@pytest.mark.parametrize("broken", [
    lambda question, annotation: question.update(image_id="42"),
    lambda question, annotation: question.update(image_id=43),  # not in dataset_coco.json
    lambda question, annotation: question.update(question_id=999),
    lambda question, annotation: question.pop("question"),
    lambda question, annotation: annotation["answers"].pop(),
    lambda question, annotation: annotation.update(answers=5),
    lambda question, annotation: annotation["answers"][3].update(answer=None),
    lambda question, annotation: annotation["answers"].__setitem__(0, "yes"),
    lambda question, annotation: annotation.update(question_id="2")])
def test_malformed_vqa_rows(tmp_path, broken):
    rows = vqa_rows(2, 42)
    broken(*rows)
    more = [(i, 73 if i % 2 else 42) for i in range(3, 102)]
    assert TASKS["vqa"].load(vqa(coco(tmp_path), val=[rows, *more])).skipped == 1
    wrong = r"val2014_questions.json: 1 of 3 rows are malformed.*row 1: "
    with pytest.raises(ValueError, match=wrong):
        TASKS["vqa"].load(vqa(tmp_path, val=[rows, (3, 42), (4, 73)]))


def test_annotations_of_another_year_are_noticed(tmp_path):
    vqa(tmp_path)
    (tmp_path / VQA_FILES[3]).write_bytes((tmp_path / VQA_FILES[1]).read_bytes())
    with pytest.raises(ValueError) as error:
        TASKS["vqa"].load(tmp_path)
    one_line(error, "no ten answers to question 2", VQA_FILES[2])


@pytest.mark.parametrize("task, present, missing", [
    ("vqa", (), VQA_FILES[0]), ("vqa", VQA_FILES[:3], VQA_FILES[3]),
    ("gqa", ("train_balanced_questions.json",), "val_balanced_questions.json"),
    ("nlvr2", ("train.json", "dev.json"), "test1.json"), ("coco", (), "dataset_coco.json"),
    ("easy-vqa", (), "questions.json")])
def test_a_missing_file_is_one_line_that_says_what_is_expected_where(tmp_path, task, present,
                                                                    missing):
    for name in present:
        put(tmp_path, name, [])
    with pytest.raises(ValueError) as error:
        TASKS[task].load(tmp_path)
    one_line(error, f"{tmp_path / missing} is missing", f"{task} needs", f"in {tmp_path}")
    with pytest.raises(ValueError, match="nowhere"):
        TASKS[task].load(tmp_path / "nowhere")


def test_easy_vqa_has_no_drawn_scenes():
    with pytest.raises(ValueError, match="easy-vqa needs --data"):
        TASKS["easy-vqa"].load(None)


@pytest.mark.parametrize("content", [
    b"", b"<html>", b'[["q", "a', b"\xff\xfe\x00\xd8", b"[" * 100_000, b"[" + b"9" * 5000 + b"]",
    b"{}", b"[]", b"7", b"null", b'"text"', b'[["q", "a", 1]]'], ids=lambda content: content[:9])
def test_a_file_that_is_something_else_is_one_line(tmp_path, content):
    with pytest.raises(ValueError) as error:
        TASKS["easy-vqa"].load(put(tmp_path, "questions.json", content))
    one_line(error, str(tmp_path))


@pytest.mark.parametrize("task, name", [
    ("vqa", VQA_FILES[0]), ("vqa", VQA_FILES[3]), ("vqa", "dataset_coco.json"),
    ("coco", "dataset_coco.json"), ("gqa", "testdev_balanced_questions.json")])
@pytest.mark.parametrize("content", [[], {"questions": 5, "images": 5}, 7, None], ids=str)
def test_another_shape_of_file_is_one_line(tmp_path, task, name, content):
    put(gqa(vqa(coco(tmp_path))), name, content)
    with pytest.raises(ValueError) as error:
        TASKS[task].load(tmp_path)
    one_line(error, str(tmp_path))


# ------------------------------------------------------------------------------------------ steps

def test_an_epoch_of_several_tasks_has_each_batch_once_in_the_authors_order():
    batches = {"vqa": [[i] for i in range(30)], "gqa": ["a", "b"], "coco": []}
    steps = multitask(batches, epoch=3)
    for task, of_task in batches.items():
        assert [batch for name, batch in steps if name == task] == of_task
    assert steps == multitask(batches, 3) and steps != multitask(batches, 4)
    names = ["vqa"] * 30 + ["gqa"] * 2  # theirs: a list of names, shuffled, then pop()
    random.Random(3).shuffle(names)
    assert [task for task, _ in steps] == [names.pop() for _ in range(32)]


def test_a_question_or_no_question_as_the_task_asks():
    assert TASKS["vqa"].ask("what is it?") == Example("vqa: what is it?", {}, ())
    assert TASKS["coco"].ask("") == Example("caption:", {}, ())
    for task, text, what in (("nlvr2", " ", "empty"), ("coco", "what?", "without being asked")):
        with pytest.raises(ValueError, match=what):
            TASKS[task].ask(text)
