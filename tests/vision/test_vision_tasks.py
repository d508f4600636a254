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
    return coco(folder, coco_image(COCO[0], "train", "c"), *(
        coco_image(f"COCO_val2014_{i:012d}", ("val", "test")[i % 2], "c") for i in range(150)))


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


def test_easy_vqa_is_split_by_picture(tmp_path):
    dataset = TASKS["easy-vqa"].load(easy(tmp_path, images=50))
    parts = dataset.train, dataset.val, dataset.test
    train, val, test = ({example.images for example in part} for part in parts)
    assert (len(train), len(val), len(test)) == (40, 5, 5)
    assert not (train & val or train & test or val & test)
    assert val != {(str(i),) for i in range(40, 45)}, "drawn"
    every = [example for part in parts for example in part]
    assert Example("vqa: what is shape 1 of 4?", {"circle": 1.0}, ("4",)) in every
    assert len(every) == sum(image % 3 + 1 for image in range(50)) and dataset.skipped == 0
    bytes_of = (tmp_path / "questions.json").read_bytes()
    assert dataset.sha256 == hashlib.sha256(bytes_of).hexdigest() and dataset.name == "easy-vqa"


def test_vqa_has_karpathys_split(tmp_path):
    ten = ["red"] * 9 + [""]  # an empty answer is a reference, but no target
    vqa(tmp_path / "vqa", train=[vqa_rows(1, 9), vqa_rows(6, 9, ten)],
        val=[(2, 42), (3, 73), (4, 74), (5, 42)])
    (tmp_path / "vqa" / VQA_FILES[4]).unlink()
    rest = "COCO_val2014_000000000074"
    coco(tmp_path / "COCO", coco_image(COCO[0], "train", "a"), coco_image(COCO[1], "val", "b"),
         coco_image(COCO[2], "test", "c"), coco_image(rest, "restval", "d"))
    dataset = TASKS["vqa"].load(tmp_path)
    weights = {"yes": 1.0, "no": 0.9, "maybe": 0.6, "maybe not": 0.3}
    assert dataset.train == [Example("vqa: Is it 1?", weights, (COCO[0],), TEN),
                             Example("vqa: Is it 6?", {"red": 1.0}, (COCO[0],), tuple(ten)),
                             Example("vqa: Is it 4?", weights, (rest,), TEN)]
    assert [example.source[-2] for example in dataset.val] == ["2", "5"]
    assert [example.images for example in dataset.test] == [(COCO[2],)]
    files = [*map((tmp_path / "vqa").joinpath, VQA_FILES[:4]), tmp_path / "COCO" / VQA_FILES[4]]
    every_byte = b"".join(path.read_bytes() for path in files)
    assert dataset.sha256 == hashlib.sha256(every_byte).hexdigest()
    assert (dataset.name, dataset.folder) == ("vqa", tmp_path)


def test_gqa_and_nlvr2_in_their_own_folders(tmp_path):
    gqa(tmp_path / "GQA")
    nlvr2(tmp_path / "nlvr")
    dataset = TASKS["gqa"].load(str(tmp_path))
    assert dataset.train == [Example("gqa: Is it train?", {"yes": 1.0}, ("2375429",))]
    assert dataset.val[0].source == "gqa: Is it val?" and dataset.folder == tmp_path
    assert dataset.test == [Example("gqa: Is it testdev?", {"yes": 1.0}, ("n161313",))]
    dataset = TASKS["nlvr2"].load(str(tmp_path))
    pairs = [tuple(f"test1-896-{i}-img{side}" for side in (0, 1)) for i in (0, 1)]
    assert dataset.test == [Example("nlvr: Two dogs.", {"true": 1.0}, pairs[0]),
                            Example("nlvr: No dog.", {"false": 1.0}, pairs[1])]
    assert dataset.val[0].images[1] == "dev-896-0-img1"


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


ROWS = {  # a good row of each task; then what makes it malformed
    "easy-vqa": (["q", "a", 1], [], ["q", "a", "1"], ["q", "", 1], None, ["\ud800", "a", 1], 7),
    "gqa": ({"question": "q", "answer": "a", "imageId": "1"}, {"question": "q", "answer": "a"},
            {"question": None, "answer": "a", "imageId": "1"}, 5),
    "nlvr2": ({"sentence": "s", "label": "True", "identifier": "dev-1-0-0"},
              {"sentence": "s", "identifier": "dev", "label": "True"},
              {"sentence": "s", "identifier": "dev-1-0-1", "label": "maybe"}, "text", None),
    "coco": (coco_image(COCO[0], "test", "c"), {"filename": "a.jpg", "split": "test"},
             coco_image(COCO[0], "dev", "c"), coco_image(COCO[0], "test"), 3),
    "vqa": (vqa_rows(2, 42), ({**vqa_rows(2, 42)[0], "image_id": "42"}, vqa_rows(2, 42)[1]),
            ({**vqa_rows(2, 42)[0], "question_id": 999}, vqa_rows(2, 42)[1]),
            (vqa_rows(2, 42)[0], {"question_id": 2, "answers": 5}),
            (vqa_rows(2, 42)[0], {"question_id": 2, "answers": [{"answer": None}] * 10})),
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
    if task == "vqa":
        return vqa(folder, val=[*((i, i) for i in range(3, count + 2)), row])
    both = [coco_image(COCO[0], split, "c") for split in ("train", "val")]
    return coco(folder, *both, *[good] * (count - 3), row)


@pytest.mark.parametrize("task, row", [(task, row) for task in ROWS for row in ROWS[task][1:]])
def test_one_malformed_row_in_a_hundred_is_skipped_and_more_are_an_error(tmp_path, task, row):
    assert TASKS[task].load(with_row(tmp_path, task, row, 100)).skipped == 1
    with pytest.raises(ValueError) as error:
        TASKS[task].load(with_row(tmp_path, task, row, 99))
    one_line(error, str(tmp_path), "1 of 99 rows are malformed", "row 99: ")


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("content", [None, b"", b"<html>", b"[" * 100_000, [], 7, {"images": 5}],
                         ids=lambda content: str(content)[:9])
def test_a_file_that_is_missing_or_something_else_is_one_line(tmp_path, task, content):
    easy(gqa(nlvr2(vqa(coco(tmp_path)))))
    path = tmp_path / TASKS[task].files[-1]
    if content is None:
        path.unlink()
    else:
        put(tmp_path, path.name, content)
    with pytest.raises(ValueError) as error:
        TASKS[task].load(tmp_path)
    one_line(error, str(tmp_path), path.name if content is None else "")


def test_an_epoch_of_several_tasks_has_each_batch_once_in_the_authors_order():
    batches = {"vqa": [[i] for i in range(30)], "gqa": ["a", "b"], "coco": []}
    steps = multitask(batches, epoch=3)
    for task, of_task in batches.items():
        assert [batch for name, batch in steps if name == task] == of_task
    assert steps == multitask(batches, 3) and steps != multitask(batches, 4)
    names = ["vqa"] * 30 + ["gqa"] * 2  # theirs: a list of names, shuffled, then pop()
    random.Random(3).shuffle(names)
    assert [task for task, _ in steps] == [names.pop() for _ in range(32)]
