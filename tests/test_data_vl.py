"""Vision and language: official files, and steps of several tasks; on small files made here."""

import hashlib
import random

import pytest

import data_vl
from data_vl import Example, load, multitask
from workshop import one_line, put

COCO = "COCO_train2014_000000000009", "COCO_val2014_000000000042", "COCO_val2014_000000000073"


def easy(folder, images=20, more=()):
    rows = [[f"what is shape {i} of {image}?", "circle", image] for image in range(images) for i in range(image % 3 + 1)]
    return put(folder, "questions.json", rows + list(more))


def vqa_rows(number, image_id, ten=None):
    ten = ten or ["yes"] * 4 + ["no"] * 3 + ["maybe"] * 2 + ["maybe not"]
    return ({"question_id": number, "image_id": image_id, "question": f"Is it {number}?"},
            {"question_id": number, "image_id": image_id, "question_type": "is it", "answer_type": "yes/no", "multiple_choice_answer": ten[0],
             "answers": [{"answer": answer, "answer_confidence": "yes", "answer_id": i} for i, answer in enumerate(ten, 1)]})


def vqa_files(folder, train, val):
    """train, val: lists of (question id, image id) or of rows as `vqa_rows` makes."""
    for year, rows in (("train2014", train), ("val2014", val)):
        rows = [vqa_rows(*row) if isinstance(row[0], int) else row for row in rows]
        put(folder, f"v2_OpenEnded_mscoco_{year}_questions.json", {"info": {}, "data_subtype": year, "questions": [row[0] for row in rows]})
        put(folder, f"v2_mscoco_{year}_annotations.json", {"info": {}, "data_subtype": year, "annotations": [row[1] for row in rows]})
    return folder


def coco_image(key, split, *captions):
    return {"filepath": key.split("_")[1], "filename": f"{key}.jpg", "split": split, "cocoid": int(key[-12:]), "imgid": 0, "sentids": [1],
            "sentences": [{"tokens": caption.split(), "raw": caption, "imgid": 0, "sentid": 1} for caption in captions]}


def coco(folder, *images):
    return put(folder, "dataset_coco.json", {"dataset": "coco", "images": list(images)})


def karpathy_lists(folder, rows):
    for part in ("train", "val", "test"):
        put(folder, f"karpathy_{part}.json", rows)
    return folder


def gqa(folder, name="{}_balanced_questions.json", rows=None, parts=("train", "val", "testdev")):
    for part in parts:
        row = {"question": f"Is it {part}?", "answer": "yes", "fullAnswer": "Yes, it is.", "imageId": "n161313" if part == "testdev" else "2375429",
               "isBalanced": True, "groups": {"global": None, "local": "1"}, "types": {}, "semantic": []}
        put(folder, name.format(part), rows or {"02930152": row})
    return folder


def nlvr2(folder, rows=None):
    for part, name in (("train", "train"), ("dev", "dev"), ("test1", "test1")):
        put(folder, f"{name}.json", rows or [{"sentence": "There are two dogs.", "label": "True", "identifier": f"{part}-896-0-1", "synset": "dog"},
                                               {"sentence": "No dog.", "label": "False", "identifier": f"{part}-896-1-0"}], lines=True)
    return folder


# --------------------------------------------------------------------------------------------------------------- readers

def test_easy_vqa(tmp_path):
    dataset = load("easy-vqa", easy(tmp_path))
    every = [*dataset.train, *dataset.val, *dataset.test]
    assert dataset.train[0]._replace(source="", images=()) == Example("", {"circle": 1.0}, ())
    assert Example("vqa: what is shape 1 of 4?", {"circle": 1.0}, ("4",)) in every
    assert len(every) == sum(image % 3 + 1 for image in range(20)) and dataset.skipped == 0
    assert dataset.sha256 == hashlib.sha256((tmp_path / "questions.json").read_bytes()).hexdigest() and dataset.name == "easy-vqa"


def test_no_picture_of_easy_vqa_is_in_two_parts(tmp_path):
    dataset = load("easy-vqa", easy(tmp_path, images=50))
    train, val, test = ({example.images for example in part} for part in (dataset.train, dataset.val, dataset.test))
    assert (len(train), len(val), len(test)) == (40, 5, 5) and not (train & val or train & test or val & test)
    again = load("easy-vqa", easy(tmp_path, images=50))
    assert again.val == dataset.val and val != {(str(i),) for i in range(40, 45)}  # the same, and drawn


def test_files_may_lie_in_the_tasks_own_folder(tmp_path):
    easy(tmp_path / "easy_vqa")
    gqa(tmp_path / "GQA")
    assert load("easy-vqa", tmp_path).train and load("gqa", str(tmp_path)).folder == tmp_path


def test_vqa_beside_dataset_coco_has_karpathys_split(tmp_path):
    vqa_files(tmp_path, [(1, 9)], [(2, 42), (3, 73), (4, 74), (5, 42)])
    coco(tmp_path, coco_image(COCO[0], "train", "a"), coco_image(COCO[1], "val", "b"), coco_image(COCO[2], "test", "c"),
         coco_image("COCO_val2014_000000000074", "restval", "d"))
    dataset = load("vqa", tmp_path)
    ten = ("yes",) * 4 + ("no",) * 3 + ("maybe",) * 2 + ("maybe not",)
    weights = {"yes": 1.0, "no": 0.9, "maybe": 0.6, "maybe not": 0.3}
    assert dataset.train == [Example("vqa: Is it 1?", weights, (COCO[0],), ten), Example("vqa: Is it 4?", weights, ("COCO_val2014_000000000074",), ten)]
    assert [example.source[-2] for example in dataset.val] == ["2", "5"] and [example.images for example in dataset.test] == [(COCO[2],)]
    assert dataset.name == "vqa-karpathy"
    files = [tmp_path / name for name in (*data_vl.VQA_FILES, "dataset_coco.json")]
    assert dataset.sha256 == hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()


def test_vqa_alone_halves_the_pictures_of_val2014(tmp_path):
    dataset = load("vqa", vqa_files(tmp_path, [(1, 9)], [(i, i // 3) for i in range(2, 62)]))
    val, test = ({example.images for example in part} for part in (dataset.val, dataset.test))
    assert dataset.name == "vqa-halved" and len(dataset.train) == 1 and len(val) + len(test) == 21 and not val & test and abs(len(val) - len(test)) == 1
    assert len(dataset.val) + len(dataset.test) == 60


def test_vqas_empty_answer_is_a_reference_but_no_target(tmp_path):
    dataset = load("vqa", vqa_files(tmp_path, [vqa_rows(1, 9, ["red"] * 9 + [""])], [(2, 42), (3, 73)]))
    assert dataset.train[0].answers == {"red": 1.0} and dataset.train[0].references == ("red",) * 9 + ("",)


def test_vqa_lists_of_the_authors(tmp_path):
    rows = [{"question_id": 1, "sent": "Is it red?", "img_id": COCO[0], "label": {"yes": 1, "no": 0.3, "never": 0}, "answer_type": "yes/no"},
            {"question_id": 7, "sent": "What is it?", "img_id": COCO[1], "label": {}}]
    dataset = load("vqa", karpathy_lists(tmp_path, rows))
    assert dataset.test == [Example("vqa: Is it red?", {"yes": 1.0, "no": 0.3}, (COCO[0],)), Example("vqa: What is it?", {}, (COCO[1],))]
    assert dataset.name == "vqa-lists"
    put(tmp_path, "v2_mscoco_train2014_annotations.json", {"annotations": [vqa_rows(1, 9, ["yes"] * 10)[1]]})
    dataset = load("vqa", tmp_path)
    assert [example.references for example in dataset.train] == [("yes",) * 10, ()]


def test_gqa(tmp_path):
    dataset = load("gqa", gqa(tmp_path))
    assert dataset.train == [Example("gqa: Is it train?", {"yes": 1.0}, ("2375429",))]
    assert dataset.val[0].source == "gqa: Is it val?" and dataset.test == [Example("gqa: Is it testdev?", {"yes": 1.0}, ("n161313",))]


def test_gqa_lists_of_the_authors(tmp_path):
    gqa(tmp_path, "{}.json", [{"img_id": "2375429", "label": {"pipe": 1.0}, "question_id": "07333408", "sent": "What is it?"}], ("train", "valid", "testdev"))
    assert load("gqa", tmp_path).val == [Example("gqa: What is it?", {"pipe": 1.0}, ("2375429",))]


def test_nlvr2(tmp_path):
    dataset = load("nlvr2", nlvr2(tmp_path))
    assert dataset.test == [Example("nlvr: There are two dogs.", {"true": 1.0}, ("test1-896-0-img0", "test1-896-0-img1")),
                            Example("nlvr: No dog.", {"false": 1.0}, ("test1-896-1-img0", "test1-896-1-img1"))]
    assert dataset.val[0].images[1] == "dev-896-0-img1" and dataset.train[0].images[0] == "train-896-0-img0"


def test_nlvr2_lists_of_the_authors(tmp_path):
    for name in ("train", "valid", "test"):
        put(tmp_path, f"{name}.json", [{"uid": "u", "sent": "A dog.", "img0": "dev-1-0-img0", "img1": "dev-1-0-img1", "label": label} for label in (1, 0)])
    assert [example.answers for example in load("nlvr2", tmp_path).val] == [{"true": 1.0}, {"false": 1.0}]


def test_coco_trains_on_each_caption_and_tests_on_all(tmp_path):
    five = [f" a dog, number {i} " for i in (1, 2, 3, 4, 4)]
    kept = tuple(caption.strip() for caption in five)
    dataset = load("coco", coco(tmp_path, *(coco_image(COCO[0].replace("9", str(i)), split, *five) for i, split in enumerate(("train", "restval", "val", "test")))))
    assert len(dataset.train) == 10 and dataset.train[1] == Example("caption:", {"a dog, number 2": 1.0}, ("COCO_train2014_000000000000",), kept)
    assert dataset.test == [Example("caption:", dict.fromkeys(kept, 1.0), ("COCO_train2014_000000000003",), kept)]  # the same one twice is two references


def test_limits_are_the_authors():
    assert {name: (task.max_source, task.max_target) for name, task in data_vl.TASKS.items()} == {
        "vqa": (20, 10), "gqa": (20, None), "nlvr2": (None, None), "coco": (None, 40), "easy-vqa": (20, 10)}


# ----------------------------------------------------------------------------------------------------- what can be wrong

BAD_ROWS = {
    "easy-vqa": ([], ["q", "a"], ["q", "a", "1"], ["q", "", 1], ["q", "a", True], ["q", "a", -1], "row", None, {"q": 1}, ["\ud800", "a", 1], [" ", "a", 1], 7),
    "vqa": ({"sent": "q", "img_id": "i"}, {"sent": "q", "img_id": "i", "label": {"yes": 2}}, {"sent": "q", "img_id": "i", "label": {"yes": float("nan")}},
            {"sent": "q", "img_id": 9, "label": {}}, {"sent": "", "img_id": "i", "label": {}}, {"sent": "q", "img_id": "i", "label": {"yes": "1"}}, [], None,
            {"sent": "q", "img_id": "i", "label": {" ": 1}}, {"sent": "q", "img_id": "i", "label": {"yes": True}}),
    "gqa": ({"question": "q", "answer": "a"}, {"question": "q", "answer": 5, "imageId": "1"}, {"question": None, "answer": "a", "imageId": "1"}, [], 5),
    "nlvr2": ({"sentence": "s", "identifier": "dev-1-0-1"}, {"sentence": "s", "identifier": "dev", "label": "True"},
              {"sentence": "s", "identifier": "dev-1-0-1", "label": "maybe"}, {"identifier": "dev-1-0-1", "label": "True"}, [1], "text", None,
              {"sentence": "s", "identifier": "dev-1-0-1", "label": ["True"]}),
    "coco": ({"filename": "a.jpg", "split": "test"}, {"filename": "a.jpg", "split": "dev", "sentences": [{"raw": "c"}]},
             {"filename": "a.jpg", "split": "test", "sentences": []}, {"filename": 1, "split": "test", "sentences": [{"raw": "c"}]},
             {"filename": "a.jpg", "split": "test", "sentences": ["c"]}, {"filename": "a.jpg", "split": ["test"], "sentences": [{"raw": "c"}]}, 3),
}


def with_row(folder, task, row, good):
    """The task's files with `good` rows that are right, and this one in one of them."""
    if task == "easy-vqa":
        return put(folder, "questions.json", [["q", "a", i] for i in range(good)] + [row])
    if task == "vqa":
        karpathy_lists(folder, [{"sent": "q", "img_id": "i", "label": {"yes": 1}}])
        return put(folder, "karpathy_val.json", [{"sent": "q", "img_id": "i", "label": {"yes": 1}, "question_id": i} for i in range(good)] + [row])
    if task == "gqa":
        return put(gqa(folder), "val_balanced_questions.json", {i: {"question": "q", "answer": "a", "imageId": "1"} for i in range(good)} | {"x": row})
    if task == "nlvr2":
        return put(nlvr2(folder), "dev.json", [{"sentence": "s", "label": "True", "identifier": f"dev-{i}-0-0"} for i in range(good)] + [row], lines=True)
    return coco(folder, *(coco_image(COCO[0], split, "c") for split in ("train", "val")), *[coco_image(COCO[0], "test", "c")] * (good - 2), row)


@pytest.mark.parametrize("task, row", [(task, row) for task, rows in BAD_ROWS.items() for row in rows])
def test_a_malformed_row_in_a_hundred_is_skipped_and_more_are_an_error(tmp_path, task, row):
    dataset = load(task, with_row(tmp_path, task, row, good=99))
    assert dataset.skipped == 1
    with pytest.raises(ValueError) as error:
        load(task, with_row(tmp_path, task, row, good=98))
    one_line(error, str(tmp_path), "1 of 99 rows are malformed, at most 1 % may be", "row 99: ", "official file")


@pytest.mark.parametrize("broken", [
    lambda question, annotation: question.update(image_id="42"), lambda question, annotation: question.update(question_id=999),
    lambda question, annotation: question.pop("question"), lambda question, annotation: annotation["answers"].pop(),
    lambda question, annotation: annotation.update(answers=5), lambda question, annotation: annotation["answers"][3].update(answer=None),
    lambda question, annotation: annotation["answers"].__setitem__(0, "yes"), lambda question, annotation: annotation.update(question_id="2"),
    lambda question, annotation: question.update(image_id=43)])  # not in dataset_coco.json
def test_malformed_vqa_rows(tmp_path, broken):
    rows = vqa_rows(2, 42)
    broken(*rows)
    coco(tmp_path, *(coco_image(key, split, "c") for key, split in zip(COCO, ("train", "val", "test"))))
    assert load("vqa", vqa_files(tmp_path, [(1, 9)], [rows, *((i, 73 if i % 2 else 42) for i in range(3, 102))])).skipped == 1
    with pytest.raises(ValueError, match=r"val2014_questions.json: 1 of 3 rows are malformed.*row 1: "):
        load("vqa", vqa_files(tmp_path, [(1, 9)], [rows, (3, 42), (4, 73)]))


def test_annotations_of_another_year_are_noticed(tmp_path):
    vqa_files(tmp_path, [(1, 9)], [(2, 42), (3, 73)])
    (tmp_path / data_vl.VQA_FILES[3]).write_bytes((tmp_path / data_vl.VQA_FILES[1]).read_bytes())
    with pytest.raises(ValueError) as error:
        load("vqa", tmp_path)
    one_line(error, "question 2 has no ten answers in v2_mscoco_val2014_annotations.json")


@pytest.mark.parametrize("task, present, missing", [
    ("vqa", (), "karpathy_train.json"), ("vqa", ("karpathy_train.json", "karpathy_test.json"), "karpathy_val.json"),
    ("vqa", data_vl.VQA_FILES[:3], data_vl.VQA_FILES[3]), ("gqa", ("train_balanced_questions.json",), "val_balanced_questions.json"),
    ("nlvr2", ("train.json", "dev.json"), "test1.json"), ("coco", (), "dataset_coco.json"), ("easy-vqa", (), "questions.json")])
def test_a_missing_file_is_one_line_that_says_what_is_expected_where(tmp_path, task, present, missing):
    for name in present:
        put(tmp_path, name, [])
    with pytest.raises(ValueError) as error:
        load(task, tmp_path)
    one_line(error, f"{tmp_path / missing} is missing", f"{task} needs", f"in {tmp_path}")
    with pytest.raises(ValueError, match="nowhere"):
        load(task, tmp_path / "nowhere")


@pytest.mark.parametrize("content, what", [
    (b"", "damaged or no JSON"), (b"<html>", "damaged or no JSON"), (b'[["q", "a', "damaged or no JSON"), (b"\xff\xfe\x00\xd8", "damaged or no JSON"),
    (b"[" * 100_000, "damaged or no JSON"), (b"{}", "should hold a list"), (b"[]", "no training rows"), (b'[["q", "a", 1]]', "no validation rows"),
    (b"[" + b"9" * 5000 + b"]", "damaged or no JSON")])
def test_a_file_that_is_something_else_is_one_line(tmp_path, content, what):
    with pytest.raises(ValueError) as error:
        load("easy-vqa", put(tmp_path, "questions.json", content))
    one_line(error, str(tmp_path), what)


@pytest.mark.parametrize("task, name", [("vqa", data_vl.VQA_FILES[0]), ("vqa", data_vl.VQA_FILES[3]), ("vqa", "dataset_coco.json"),
                                        ("gqa", "testdev_balanced_questions.json")])
@pytest.mark.parametrize("content", [[], {"questions": 5}, 7, None])
def test_another_shape_of_file_is_one_line(tmp_path, task, name, content):
    vqa_files(tmp_path, [(1, 9)], [(2, 42), (3, 73)])
    gqa(tmp_path)
    if content == {"questions": 5} and task == "gqa":
        content = [content]
    with pytest.raises(ValueError) as error:
        load(task, put(tmp_path, name, content))
    one_line(error, name, "should hold", "official file")


def test_an_unknown_task_names_the_tasks():
    with pytest.raises(ValueError, match="choose one of vqa, gqa, nlvr2, coco, easy-vqa"):
        load("clevr", "x")


# ----------------------------------------------------------------------------------------------------------------- steps

def test_an_epoch_of_several_tasks_has_each_batch_once():
    batches = {"vqa": [[i] for i in range(30)], "gqa": ["a", "b"], "coco": []}
    steps = multitask(batches, epoch=3)
    assert [batch for task, batch in steps if task == "vqa"] == batches["vqa"] and [batch for task, batch in steps if task == "gqa"] == ["a", "b"]
    assert len(steps) == 32 and steps == multitask(batches, 3) and steps != multitask(batches, 4)
    assert steps[:2] != [("vqa", [0]), ("vqa", [1])] or steps[-2:] != [("gqa", "a"), ("gqa", "b")]  # mixed


def test_the_order_of_tasks_is_the_authors():
    """Theirs: a list of task names, random.Random(epoch).shuffle, then pop()."""
    names = ["vqa"] * 5 + ["gqa"] * 3 + ["nlvr2"] * 2
    random.Random(7).shuffle(names)
    expected = [names.pop() for _ in range(10)]
    assert [task for task, _ in multitask({"vqa": range(5), "gqa": range(3), "nlvr2": range(2)}, 7)] == expected
