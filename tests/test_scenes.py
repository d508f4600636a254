"""The bundled vision data: what is drawn is what the scene says, what is answered is true, and the words alone do not tell it."""
import hashlib
import math
import re
from collections import Counter, defaultdict

import numpy as np
import pytest

import scenes
from metrics import cider_d
from model import UNK, load_tokenizer
from scenes import COLORS, OUTLINES, RADIUS, REACH, SIDE, TILTS, Object, Scene, captions, coverage, describe, draw, examples, scene_of

TASKS = ("vqa", "gqa", "nlvr2", "coco")
MANY = 400                       # scenes that the slower claims are tried on
DRAWN = [scene_of(f"train-{i}") for i in range(MANY)]


@pytest.fixture(scope="module")
def rows():
    """A part of the training rows and all test rows of each task."""
    return {task: {"train": examples(task, "train", MANY), "test": examples(task, "test")} for task in TASKS}


# ------------------------------------------------------------------------------------------------------------- pictures

def masks(scene: Scene) -> list[np.ndarray]:
    """Which pixels each object touches."""
    return [(draw(Scene((o,), scene.background, 100)) != scene.background).any(axis=2) for o in scene.objects]


def test_an_objects_centre_has_its_color():
    for scene in DRAWN:
        picture = draw(scene)
        assert picture.shape == (SIDE, SIDE, 3) and picture.dtype == np.uint8
        for o in scene.objects:
            assert picture[o.y, o.x].tolist() == [value * scene.light // 100 for value in COLORS[o.color]]


def test_objects_keep_apart_and_stay_inside():
    for scene in DRAWN[:200]:
        touched = masks(scene)
        assert (sum(mask.astype(int) for mask in touched) <= 1).all()
        nothing = (draw(scene) == [value * scene.light // 100 for value in scene.background]).all(axis=2)
        assert (nothing == ~np.any(touched, axis=0)).all()
        for o, mask in zip(scene.objects, touched):
            ys, xs = mask.nonzero()
            assert max(abs(ys - o.y).max(), abs(xs - o.x).max()) <= REACH[o.size]
            assert REACH[o.size] <= min(o.x, o.y) and max(o.x, o.y) < SIDE - REACH[o.size]


def test_area_of_each_shape():
    def polygon(corners):
        return abs(sum(x0 * y1 - x1 * y0 for (x0, y0), (x1, y1) in zip(corners, corners[1:] + corners[:1]))) / 2 / 100 ** 2

    star = [(125 * inner * math.sin(math.pi * i / 5), -125 * inner * math.cos(math.pi * i / 5))
            for i in range(10) for inner in [1 if i % 2 == 0 else math.sin(math.pi / 10) / math.sin(3 * math.pi / 10)]]
    areas = {"circle": math.pi, "star": polygon(star), **{name: polygon(OUTLINES[name]) for name in ("square", "triangle", "diamond")}}
    for shape in OUTLINES:
        for size, radius in RADIUS.items():
            for tilt in TILTS:
                assert coverage(shape, size, tilt).sum() / 64 == pytest.approx(areas[shape] * radius ** 2, rel=0.02), (shape, size, tilt)


def test_shapes_stand_upright():
    """Points in radii from the centre, y down: the first lies inside, the second outside."""
    points = {"circle": ((0.65, 0.65), (0.8, 0.8)), "square": ((0.75, 0.75), (0, 1.05)), "triangle": ((0.75, 0.6), (0.6, -0.6)),
              "diamond": ((0, 1.05), (0.65, 0.65)), "star": ((0, -0.95), (0, 0.95))}
    for shape, spots in points.items():
        for tilt, angle in ((-1, -11.42), (0, 0), (1, 11.42)):
            cos, sin = math.cos(math.radians(angle)), math.sin(math.radians(angle))
            seen = [coverage(shape, "big", tilt)[13 + round(10 * (sin * x + cos * y)), 13 + round(10 * (cos * x - sin * y))] for x, y in spots]
            assert seen[0] > 56 and seen[1] < 8, (shape, tilt, seen)


def test_edges_are_smooth():
    for shape in OUTLINES:
        picture = draw(Scene((Object("big", "black", shape, 32, 32, 1),), (230, 230, 230), 100))
        assert len(np.unique(picture[..., 0])) >= 10             # shades


def test_colors_are_easy_to_tell_apart():
    lit = {color: np.array([np.array(value) * light // 100 for light in range(84, 101)]) for color, value in COLORS.items()}
    for one in lit:
        for other in lit:
            if one != other:
                assert abs(lit[one][:, None] - lit[other][None]).max(axis=2).min() >= 40, (one, other)


def test_pictures_are_the_same_everywhere():
    digest = hashlib.sha256(b"".join(draw(scene_of(f"{split}-{i}")).tobytes() for split in scenes.SCENES for i in range(30)))
    assert digest.hexdigest() == "8dc9f740283aaba0c676ca0f1109041ecdd26c84efbf179a8f023e231435d4e1"


def test_rows_are_the_same_everywhere():
    text = repr([tuple(row) for task in TASKS for row in examples(task, "val", 60)])
    assert hashlib.sha256(text.encode()).hexdigest() == "c0ff2cb2b3674c95bafc23529d6e4f7defafbefc6fb538c0836cd9582dfbd9f0"


def test_scenes_have_one_to_five_objects_of_every_sort():
    assert {len(scene.objects) for scene in DRAWN} == {1, 2, 3, 4, 5}
    sorts = Counter((o.size, o.color, o.shape) for scene in DRAWN for o in scene.objects)
    assert len(sorts) == len(RADIUS) * len(COLORS) * len(OUTLINES)
    assert len({o.place for scene in DRAWN for o in scene.objects}) == 9


def test_splits_share_no_scene():
    parts = [[scene_of(f"{split}-{i}").objects for i in range(size)] for split, size in scenes.SCENES.items()]
    assert [len(part) for part in parts] == [4000, 400, 400]
    train, val, test = map(set, parts)
    assert not (train & val or train & test or val & test)


@pytest.mark.parametrize("scene_id", ["dev-1", "train-01", "train--1", "train-", "train-1\n", "17", ""])
def test_a_wrong_id_is_an_error(scene_id):
    with pytest.raises(ValueError, match="train, val, test"):
        scene_of(scene_id)


@pytest.mark.parametrize("task, split", [("sst2", "train"), ("vqa", "dev")])
def test_a_wrong_task_or_split_is_an_error(task, split):
    with pytest.raises(ValueError, match="choose vqa, gqa, nlvr2 or coco, and train, val, test"):
        examples(task, split)


# ---------------------------------------------------------------------------- answers, computed again from the text alone

def fitting(scene: Scene, name: str) -> list[Object]:
    return [o for o in scene.objects if all(word in (o.size, o.color, o.shape, "object") for word in name.split())]


def the(scene: Scene, name: str) -> Object:
    found = fitting(scene, name)
    assert len(found) == 1, (name, scene)
    return found[0]


def number(scene: Scene, name: str) -> int:
    return len(fitting(scene, name))


def where(o: Object) -> tuple[str, str]:
    """Left, middle or right third, and top, middle or bottom third; the centre lies half a pixel into its pixel."""
    return (("left", "middle", "right")[int((o.x + 0.5) / (SIDE / 3))], ("top", "middle", "bottom")[int((o.y + 0.5) / (SIDE / 3))])


def lies(o: Object, relation: str, other: Object) -> bool:
    return {"left": o.x < other.x, "right": o.x > other.x, "above": o.y < other.y, "below": o.y > other.y}[relation.split()[0]]


def position(o: Object) -> str:
    x, y = where(o)
    assert "middle" in (x, y)                                    # asked with one word
    return y if x == "middle" else x


def beyond(scene: Scene, wanted: str, relation: str, name: str) -> str:
    found = [o for o in scene.objects if lies(o, relation, the(scene, name))]
    assert len(found) == 1
    return getattr(found[0], wanted)


def sharing(scene: Scene, wanted: str, shared: str, name: str) -> str:
    one = the(scene, name)
    found = [o for o in scene.objects if o is not one and getattr(o, shared) == getattr(one, shared)]
    assert len(found) == 1
    return getattr(found[0], wanted)


RELATION = "(left of|right of|above|below)"
QUESTIONS = {
    r"how many (.+?)s are (?:there|in the picture)\?": lambda s, name: str(number(s, name)),
    r"is there an? (.+?)(?: in the picture)?\?": lambda s, name: number(s, name) > 0,
    r"are all objects (.+)\?": lambda s, color: all(o.color == color for o in s.objects),
    r"are there more (.+)s than (.+)s\?": lambda s, one, other: number(s, one) > number(s, other),
    rf"is the (\w+) ({'|'.join(COLORS)})\?": lambda s, name, color: the(s, name).color == color,
    rf"what (color|shape) is the object {RELATION} the (.+)\?": beyond,
    r"what (color|shape) is the object with the same (color|shape) as the (.+)\?": sharing,
    r"what (color|shape) is the (\w+|\w+ \w+|\w+ \w+ \w+)\?": lambda s, wanted, name: getattr(the(s, name), wanted),
    r"where is the (.+)\?": lambda s, name: position(the(s, name)),
    r"is the (.+) on the left or on the right\?": lambda s, name: where(the(s, name))[0],
    r"is the (.+) at the top or at the bottom\?": lambda s, name: where(the(s, name))[1],
    r"is the (.+) left or right of the (.+)\?": lambda s, one, other: "left" if lies(the(s, one), "left", the(s, other)) else "right",
    r"is the (.+) above or below the (.+)\?": lambda s, one, other: "above" if lies(the(s, one), "above", the(s, other)) else "below",
    rf"is the (.+) {RELATION} the (.+)\?": lambda s, one, relation, other: lies(the(s, one), relation, the(s, other)),
    r"is the (.+) bigger than the (.+)\?": lambda s, one, other: the(s, one).size == "big" and the(s, other).size == "small",
    r"are the (.+) and the (.+) the same (color|shape)\?": lambda s, one, other, shared: len({getattr(the(s, n), shared) for n in (one, other)}) == 1,
}


def test_every_answer_is_true(rows):
    used = Counter()
    for row in [row for task in ("vqa", "gqa") for part in rows[task].values() for row in part]:
        pattern, found = next((pattern, found) for pattern in QUESTIONS if (found := re.fullmatch(pattern, row.text)))
        answer = QUESTIONS[pattern](scene_of(row.scenes[0]), *found.groups())
        assert row.answer == {True: "yes", False: "no"}.get(answer, answer), row
        used[pattern] += 1
    assert used.keys() == QUESTIONS.keys() and min(used.values()) >= 20


def test_no_name_tells_what_is_asked(rows):
    for row in [row for task in ("vqa", "gqa") for part in rows[task].values() for row in part]:
        words = set(row.text.rstrip("?").split())
        if row.text.endswith("the same color?") or row.template == "what color is the {name}?":
            assert not words & set(COLORS), row
        if row.text.endswith("the same shape?") or row.template == "what shape is the {name}?":
            assert not words & set(OUTLINES), row
        if "bigger" in words:
            assert not words & set(RADIUS), row


def test_what_is_left_of_something_is_clearly_so(rows):
    relations = [row for part in rows["gqa"].values() for row in part if row.kind in ("relation", "choose")]
    for row in relations:
        one, other = re.fullmatch(r"is the (.+?) (?:left|right|above|below)[a-z ]* the (.+)\?", row.text).groups()
        scene = scene_of(row.scenes[0])
        axis = "x" if "left" in row.text or "right" in row.text else "y"
        assert abs(getattr(the(scene, one), axis) - getattr(the(scene, other), axis)) >= 8


WORDS = {word: n for n, word in enumerate(("no", "one", "two", "three", "four", "five"))}
SENTENCES = {
    r"there is an? (.+) in the left picture\.": lambda l, r, x: number(l, x) > 0,
    r"there is an? (.+) in the right picture\.": lambda l, r, x: number(r, x) > 0,
    r"there are (\w+) (.+)s in the left picture\.": lambda l, r, k, x: number(l, x) - WORDS[k] == 0,
    r"there are (\w+) (.+)s in the right picture\.": lambda l, r, k, x: number(r, x) - WORDS[k] == 0,
    r"both pictures have an? (.+)\.": lambda l, r, x: number(l, x) * number(r, x) > 0,
    r"only one of the pictures has an? (.+)\.": lambda l, r, x: [number(l, x), number(r, x)].count(0) == 1,
    r"neither picture has an? (.+)\.": lambda l, r, x: number(l, x) + number(r, x) == 0,
    r"the left picture has more (.+)s than the right one\.": lambda l, r, x: number(l, x) - number(r, x) > 0,
    r"the right picture has more (.+)s than the left one\.": lambda l, r, x: number(r, x) - number(l, x) > 0,
    r"the left picture has an? (.+) and the right one has an? (.+)\.": lambda l, r, x, y: number(l, x) * number(r, y) > 0,
}


def test_every_sentence_is_labelled_rightly(rows):
    used = Counter()
    for row in rows["nlvr2"]["train"] + rows["nlvr2"]["test"]:
        pattern, found = next((pattern, found) for pattern in SENTENCES if (found := re.fullmatch(pattern, row.text)))
        assert row.answer == str(SENTENCES[pattern](*map(scene_of, row.scenes), *found.groups())).lower(), row
        used[pattern] += 1
    assert used.keys() == SENTENCES.keys() and min(used.values()) >= 50


def test_captions_are_true_and_differ():
    placed = rf"an? (small|big) ({'|'.join(COLORS)}) ({'|'.join(OUTLINES)}) (?:at|on|in) the ((?:top|bottom)(?: left| right)?|left|middle|right)"
    for scene in DRAWN:
        own = Counter()
        for o in scene.objects:
            x, y = where(o)
            own[o.size, o.color, o.shape, " ".join(word for word in (y, x) if word != "middle") or "middle"] += 1
        references = captions(scene)[:5]
        assert len(set(references)) == 5
        for caption in references:
            assert not Counter(re.findall(placed, caption)) - own, caption
            words = {word.rstrip("s") for word in caption.replace(",", "").split()} & {*COLORS, *OUTLINES, *RADIUS}
            assert all(number(scene, word) for word in words), caption
        assert Counter(re.findall(placed, describe(scene))) == own
        assert f"a picture of {list(WORDS)[len(scene.objects)]} object" in describe(scene)
        if relation := re.fullmatch(rf"an? (.+) {RELATION} an? (.+)", references[3]):
            one, how, other = relation.groups()
            assert any(lies(p, how, q) for p in fitting(scene, one) for q in fitting(scene, other))
        for count, name in re.findall(r"(two|three|four|five) (\w+ \w+)s", references[0]):
            assert number(scene, name) == WORDS[count]


# -------------------------------------------------------------------------------------------------------------- balance

def pattern_of(text: str) -> str:
    """The text without its attributes: the rest is what a reader knows beforehand."""
    for words, letter in ((COLORS, "C"), (RADIUS, "Z"), ((*OUTLINES, "object"), "N")):
        text = re.sub(rf"\b({'|'.join(words)})(?=s?\b)", letter, text)
    return re.sub(r"\ban? ", "", re.sub(r"(Z )?(C )?N", "X", text))


def guess(train, test, what) -> float:
    """Accuracy on test of the answer that was the most frequent one on train, for the same `what`; of "" where that is new."""
    seen = defaultdict(Counter)
    for row in train:
        seen[what(row)][row.answer] += 1
    return sum(bool(seen[what(row)]) and seen[what(row)].most_common(1)[0][0] == row.answer for row in test) / len(test)


@pytest.mark.parametrize("task, most", [("vqa", 0.45), ("gqa", 0.55)])
def test_the_question_alone_does_not_tell_the_answer(rows, task, most):
    train, test = rows[task]["train"], rows[task]["test"]
    found = {"pattern, same rows": guess(train, train, lambda row: pattern_of(row.text)),
             "pattern, new rows": guess(train, test, lambda row: pattern_of(row.text)),
             "words, new rows": guess(train, test, lambda row: row.text)}
    print(f"\n{task}, majority answer by", *(f"{name}: {100 * score:.1f} %" for name, score in found.items()), sep="\n    ")
    assert max(found.values()) < most


def test_every_answer_of_a_kind_is_as_frequent_as_the_others(rows):
    for task, kinds in (("vqa", ("count", "color", "shape", "yes/no")), ("gqa", ("color", "shape", "relation", "choose", "same"))):
        for kind in kinds:
            answers = Counter(row.answer for row in rows[task]["train"] if row.kind == kind)
            assert max(answers.values()) < 1.6 * min(answers.values()), (kind, answers)
    where_answers = Counter(row.answer for row in rows["vqa"]["train"] if row.text.startswith("where"))
    assert len(where_answers) == 5 and max(where_answers.values()) < 1.6 * min(where_answers.values())


def test_the_sentence_alone_tells_nothing(rows):
    for part in rows["nlvr2"].values():
        count = Counter((row.text, row.answer) for row in part)
        assert all(count[text, "true"] == count[text, "false"] for text, _ in count)
        for true, false in zip(part[::2], part[1::2]):
            assert true.text == false.text and (true.answer, false.answer) == ("true", "false")
            assert [i == j for i, j in zip(true.scenes, false.scenes)].count(True) == 1 and true.scenes[0] != true.scenes[1]


def test_one_of_the_two_pictures_is_not_enough(rows):
    """With the sentence and the tally of one picture, guessing ends at 75 %: half of the twins do not differ in it."""
    def seen(side):
        return lambda row: (row.text, row.scenes[side])
    train = rows["nlvr2"]["train"]
    found = [guess(train, train, seen(side)) for side in (0, 1)]
    print(f"\nnlvr2, majority answer by sentence and left picture, by sentence and right picture: {found}")
    assert max(found) < 0.8


def test_the_rows_of_a_scene_ask_different_things(rows):
    for task in ("vqa", "gqa"):
        kinds = defaultdict(list)
        for row in rows[task]["train"]:
            kinds[row.scenes].append(row.kind)
        assert all(len(set(of_scene)) == len(of_scene) <= 4 for of_scene in kinds.values())
        assert np.mean([len(of_scene) for of_scene in kinds.values()]) > 2.5


# --------------------------------------------------------------------------------------------------------------- tokens

def test_the_bundled_tokenizer_knows_every_word(rows):
    tokenizer = load_tokenizer("nano")
    answers = {row.answer for task in ("vqa", "gqa", "nlvr2") for part in rows[task].values() for row in part}
    texts = {row.text for task in TASKS for part in rows[task].values() for row in part} - {""}
    spoken = {caption for row in rows["coco"]["train"] for caption in row.answer} | {describe(scene) for scene in DRAWN}
    for text in texts | answers | spoken:
        ids = tokenizer.encode(text)
        assert UNK not in ids and tokenizer.decode(ids) == text
    assert all(1 <= len(tokenizer.encode(answer)) <= 3 for answer in answers)
    assert max(len(tokenizer.encode(text)) for text in spoken) <= 60


def test_captions_agree_with_each_other(rows):
    """CIDEr-D of each scene's second reference against the other four, far above that of another scene's caption."""
    references = [row.answer for row in rows["coco"]["test"][:200]]
    others = [[*own[:1], *own[2:]] for own in references]
    own = cider_d([own[1] for own in references], others)
    strange = cider_d([own[1] for own in references[1:] + references[:1]], others)
    print(f"\ncoco, CIDEr-D of a reference {own:.2f}, of another scene's {strange:.2f}")
    assert own > 3 and strange < 1


@pytest.mark.slow
def test_one_caption_for_every_picture_earns_little():
    """CIDEr-D on test, times 100, of the constant caption that is best on validation, out of the 120 first references that training has most often."""
    common = Counter(row.answer[0] for row in examples("coco", "train")).most_common(120)
    val, test = ([row.answer for row in examples("coco", split)] for split in ("val", "test"))
    best = max((caption for caption, _ in common), key=lambda caption: cider_d([caption] * len(val), val))
    score = 100 * cider_d([best] * len(test), test)
    print(f"\ncoco, {best!r} for every picture: CIDEr-D {score:.1f}")
    assert score < 50
