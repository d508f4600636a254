"""Pictures of coloured shapes and what is asked about them: the bundled data of the vision tasks, for when no real files are given.

    "train-17" --scene_of--> Scene --draw--> (64, 64, 3) uint8
    examples("vqa", "train") --> [Row("what color is the star?", "red", ("train-17",), ...), ...]

A scene is made from its id alone, so no picture is stored, and it is the same to the byte everywhere: drawing is integer arithmetic
and `pick` the one source of chance. All words are the bundled tokenizer's. Answers are balanced within each template, so that who
reads only the question guesses; NLVR2's sentences come as twins, one true and one false (`nlvr2`).
"""

import random
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import permutations
from typing import NamedTuple

import numpy as np

SIDE = 64                                                    # pixels
COLORS = {"red": (222, 46, 44), "orange": (247, 138, 24), "yellow": (250, 214, 40), "green": (44, 162, 76),
          "blue": (40, 104, 222), "purple": (150, 68, 192), "black": (38, 38, 46)}
OUTLINES = {"circle": (),                                    # corners in hundredths of the radius; y points down
            "square": ((-88, -88), (88, -88), (88, 88), (-88, 88)),
            "triangle": ((0, -110), (98, 75), (-98, 75)),
            "diamond": ((0, -125), (90, 0), (0, 125), (-90, 0)),
            "star": ((0, -125), (73, 101), (-119, -39), (119, -39), (-73, 101))}  # without lifting the pen
RADIUS = {"small": 6, "big": 10}                             # pixels
REACH = {"small": 8, "big": 13}                              # pixels; no corner is further from the centre, however tilted
TILTS = {-1: (99, -20), 0: (101, 0), 1: (99, 20)}            # 101 times cosine and sine, 11 degrees: 99 ** 2 + 20 ** 2 == 101 ** 2
THIRDS = range(0, 19), range(23, 41), range(45, SIDE)        # centres stay clear of the lines between left, middle and right
CENTRES = {size: [[i for i in third if reach <= i < SIDE - reach] for third in THIRDS] for size, reach in REACH.items()}
PLACES = ("top left", "top", "top right"), ("left", "middle", "right"), ("bottom left", "bottom", "bottom right")
RELATIONS = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}
CLEAR = 8                                                    # pixels between two centres before one is called left of the other
NUMBERS = ("no", "one", "two", "three", "four", "five")
SCENES = {"train": 4000, "val": 400, "test": 400}            # splits never share a scene


@dataclass(frozen=True)
class Object:
    size: str
    color: str
    shape: str
    x: int                       # pixel of its centre, from the left
    y: int                       # and from the top
    tilt: int                    # a key of TILTS

    @property
    def place(self) -> str:
        return PLACES[third(self.y)][third(self.x)]

    def ahead(self, other: "Object", relation: str) -> int:
        """By how many pixels it is left of, right of, above or below the other; negative: the other way round."""
        right, down = RELATIONS[relation]
        return (self.x - other.x) * right + (self.y - other.y) * down


@dataclass(frozen=True)
class Scene:
    objects: tuple[Object, ...]
    background: tuple[int, int, int]
    light: int                   # percent; dims everything


class Row(NamedTuple):
    text: str                    # question or sentence; empty for captions
    answer: str | list[str]      # one word, "true" or "false", or the five captions
    scenes: tuple[str, ...]      # ids; two for NLVR2, left and right
    kind: str                    # of question: count, color, ...
    template: str


def pick(rng: random.Random, options: Sequence):
    return options[int(len(options) * rng.random())]         # Python promises the same random() for ever, but not the same choice()


def third(position: int) -> int:
    return 3 * position // SIDE


# -------------------------------------------------------------------------------------------------------------- scenes

def scene_of(scene_id: str) -> Scene:
    """The scene of an id like "train-17", always the same."""
    if not re.fullmatch(rf"({'|'.join(SCENES)})-(0|[1-9][0-9]*)", scene_id):
        raise ValueError(f"no scene {scene_id!r}; an id is one of {', '.join(SCENES)}, a dash and a number")
    rng = random.Random(scene_id)
    grey, light, count = pick(rng, range(215, 244)), pick(rng, range(84, 101)), pick(rng, range(1, 6))
    background = tuple(grey + pick(rng, range(-12, 13)) for _ in range(3))
    colors, shapes = ([pick(rng, list(every)) for _ in range(pick(rng, range(1, 5)))] for every in (COLORS, OUTLINES))  # few: some repeat
    objects = []
    while len(objects) < count:
        size = pick(rng, ("small", "small", "big"))
        x, y = (pick(rng, pick(rng, CENTRES[size])) for _ in "xy")
        if all((x - o.x) ** 2 + (y - o.y) ** 2 >= (REACH[size] + REACH[o.size]) ** 2 for o in objects):
            objects.append(Object(size, pick(rng, colors), pick(rng, shapes), x, y, pick(rng, list(TILTS))))
        elif pick(rng, range(50)) == 0:
            objects.clear()                                  # what stands there may leave no room for the rest
    return Scene(tuple(objects), background, light)


@lru_cache(maxsize=None)
def coverage(shape: str, size: str, tilt: int) -> np.ndarray:
    """How many of each pixel's 8 x 8 points lie inside the shape, for the square of pixels that it can reach."""
    reach, radius = REACH[size], 16 * RADIUS[size]           # in sixteenths of a pixel, where the points' coordinates are odd
    points = (16 * np.arange(-reach, reach + 1, dtype=np.int64)[:, None] + np.arange(-7, 8, 2)).flatten()
    if shape == "circle":
        inside = points ** 2 + points[:, None] ** 2 <= radius ** 2
    else:
        cos, sin = TILTS[tilt]
        x, y = 101 * 100 * points, 101 * 100 * points[:, None]
        corners = [(radius * (cos * a - sin * b), radius * (sin * a + cos * b)) for a, b in OUTLINES[shape]]
        edges = zip(corners, corners[1:] + corners[:1])
        right_of = sum(((x1 - x0) * (y - y0) - (y1 - y0) * (x - x0) >= 0).astype(int) for (x0, y0), (x1, y1) in edges)
        inside = right_of >= len(corners) - (shape == "star")  # each tip of the star lies beyond one of its five lines
    return inside.reshape(2 * reach + 1, 8, 2 * reach + 1, 8).sum((1, 3))


def draw(scene: Scene, palette: Mapping[str, tuple[int, int, int]] = COLORS) -> np.ndarray:
    """The picture, (64, 64, 3) uint8, with smooth edges; the palette tells what a color's name looks like."""
    picture = np.empty((SIDE, SIDE, 3), np.int64)
    picture[:] = scene.background
    for o in scene.objects:
        reach, cover = REACH[o.size], coverage(o.shape, o.size, o.tilt)[..., None]
        window = picture[o.y - reach:o.y + reach + 1, o.x - reach:o.x + reach + 1]
        window[:] = (window * (64 - cover) + np.array(palette[o.color]) * cover + 32) // 64
    return (picture * scene.light // 100).astype(np.uint8)


# ----------------------------------------------------------------------------------------------- names, questions (VQA, GQA)

@lru_cache(maxsize=None)
def names(size: str, color: str, shape: str) -> list[str]:
    """All that an object can be called, shortest first: star, object, big star, ..., big red object."""
    return [" ".join([*words, noun]) for words in ((), (size,), (color,), (size, color)) for noun in (shape, "object")]


def tally(scene: Scene) -> Counter:
    """How many objects each name fits."""
    return Counter(name for o in scene.objects for name in names(o.size, o.color, o.shape))


def refer(scene: Scene, rng: random.Random, without: str = "") -> list[tuple[Object, str]]:
    """Objects with a name that fits no other: one of the shortest that do not tell the attribute `without`."""
    count, known = tally(scene), []
    for o in scene.objects:
        own = [name for name in names(o.size, o.color, o.shape) if count[name] == 1 and not (without and getattr(o, without) in name)]
        if own:
            known.append((o, pick(rng, [name for name in own if name.count(" ") == own[0].count(" ")])))
    return known


def ask(kind: str, template: str, answer: str | bool, **words: str) -> Row:
    return Row(template.format(**words), {True: "yes", False: "no"}.get(answer, answer), (), kind, template)


def a(name: str) -> str:
    return ("an " if name[0] in "aeiou" else "a ") + name


def vqa(scene: Scene, rng: random.Random) -> Iterator[Row]:
    """Every question of VQA's kinds that this scene answers."""
    count, total = tally(scene), len(scene.objects)
    yield ask("count", "how many objects are there?", str(total))
    for size in RADIUS:
        yield ask("count", "how many {size} objects are in the picture?", str(count[f"{size} object"]), size=size)
    for shape in OUTLINES:
        yield ask("count", "how many {shape}s are there?", str(count[shape]), shape=shape)
    for color in COLORS:
        of_color = count[f"{color} object"]
        yield ask("count", "how many {color} objects are there?", str(of_color), color=color)
        yield ask("yes/no", "is there {a_color} object in the picture?", of_color > 0, a_color=a(color))
        if total > 1:
            yield ask("yes/no", "are all objects {color}?", of_color == total, color=color)
        for shape in OUTLINES:
            yield ask("yes/no", "is there {a_color} {shape}?", count[f"{color} {shape}"] > 0, a_color=a(color), shape=shape)
            if count[shape] == 1:
                yield ask("yes/no", "is the {shape} {color}?", count[f"{color} {shape}"] == 1, shape=shape, color=color)
    for one, other in permutations(OUTLINES, 2):
        if count[one] or count[other]:
            yield ask("yes/no", "are there more {one}s than {other}s?", count[one] > count[other], one=one, other=other)
    for wanted in ("color", "shape"):
        for o, name in refer(scene, rng, without=wanted):
            yield ask(wanted, f"what {wanted} is the {{name}}?", getattr(o, wanted), name=name)
    for o, name in refer(scene, rng):
        if " " not in o.place:
            yield ask("position", "where is the {name}?", o.place, name=name)
        if third(o.x) != 1:
            yield ask("position", "is the {name} on the left or on the right?", ("left", "", "right")[third(o.x)], name=name)
        if third(o.y) != 1:
            yield ask("position", "is the {name} at the top or at the bottom?", ("top", "", "bottom")[third(o.y)], name=name)


def gqa(scene: Scene, rng: random.Random) -> Iterator[Row]:
    """How one object stands to another. What is nearly level is not asked about."""
    for (one, name), (other, other_name) in permutations(refer(scene, rng), 2):
        for relation in RELATIONS:
            if abs(one.ahead(other, relation)) >= CLEAR:
                yield ask("relation", f"is the {{a}} {relation} the {{b}}?", one.ahead(other, relation) > 0, a=name, b=other_name)
        for either, relation in (("left or right of", "left of"), ("above or below", "above")):
            if abs(one.ahead(other, relation)) >= CLEAR:
                answer = either.split()[0 if one.ahead(other, relation) > 0 else 2]
                yield ask("choose", f"is the {{a}} {either} the {{b}}?", answer, a=name, b=other_name)
    for (one, name), (other, other_name) in permutations(refer(scene, rng, without="size"), 2):
        yield ask("same", "is the {a} bigger than the {b}?", RADIUS[one.size] > RADIUS[other.size], a=name, b=other_name)
    for shared in ("color", "shape"):
        for (one, name), (other, other_name) in permutations(refer(scene, rng, without=shared), 2):
            same = getattr(one, shared) == getattr(other, shared)
            yield ask("same", f"are the {{a}} and the {{b}} the same {shared}?", same, a=name, b=other_name)
    for wanted, shared in (("color", "shape"), ("shape", "color")):
        for one, name in refer(scene, rng):
            others = [o for o in scene.objects if o != one]
            for relation in RELATIONS:
                there = [o for o in others if o.ahead(one, relation) > 0]
                if len(there) == 1 and there[0].ahead(one, relation) >= CLEAR:
                    yield ask(wanted, f"what {wanted} is the object {relation} the {{b}}?", getattr(there[0], wanted), b=name)
            alike = [o for o in others if getattr(o, shared) == getattr(one, shared)]
            if len(alike) == 1:
                yield ask(wanted, f"what {wanted} is the object with the same {shared} as the {{b}}?", getattr(alike[0], wanted), b=name)


# ---------------------------------------------------------------------------------------------------- sentences (NLVR2)

SENTENCES = {  # template -> whether it is true of the tallies of the left and the right picture
    "there is {a_x} in the left picture.": lambda left, right, x, y, k: left[x] > 0,
    "there is {a_x} in the right picture.": lambda left, right, x, y, k: right[x] > 0,
    "there are {k} {x}s in the left picture.": lambda left, right, x, y, k: left[x] == k,
    "there are {k} {x}s in the right picture.": lambda left, right, x, y, k: right[x] == k,
    "both pictures have {a_x}.": lambda left, right, x, y, k: left[x] > 0 and right[x] > 0,
    "only one of the pictures has {a_x}.": lambda left, right, x, y, k: (left[x] > 0) != (right[x] > 0),
    "neither picture has {a_x}.": lambda left, right, x, y, k: left[x] == right[x] == 0,
    "the left picture has more {x}s than the right one.": lambda left, right, x, y, k: left[x] > right[x],
    "the right picture has more {x}s than the left one.": lambda left, right, x, y, k: left[x] < right[x],
    "the left picture has {a_x} and the right one has {a_y}.": lambda left, right, x, y, k: left[x] > 0 and right[y] > 0,
}


def nlvr2(ids: list[str], rng: random.Random) -> Iterator[Row]:
    """Twins: a sentence with a pair that makes it true, then with one that makes it false. They share one picture, left or right."""
    tallies = {i: tally(scene_of(i)) for i in ids}
    nouns = [*OUTLINES, *(f"{word} {noun}" for word in (*COLORS, *RADIUS) for noun in (*OUTLINES, "object"))]
    for n in range(len(ids)):
        template, twins, tries = list(SENTENCES)[n % len(SENTENCES)], {}, 0
        while len(twins) < 2:
            if tries % 30 == 0:                              # no luck with these
                shared, side, twins = pick(rng, ids), pick(rng, (0, 1)), {}
                x, y, k = pick(rng, nouns), pick(rng, nouns), pick(rng, (2, 3, 4))
            other, tries = pick(rng, ids), tries + 1
            pair = (other, shared) if side else (shared, other)
            if other != shared and x != y:
                twins.setdefault(SENTENCES[template](*[tallies[i] for i in pair], x, y, k), pair)
        text = template.format(x=x, y=y, k=NUMBERS[k], a_x=a(x), a_y=a(y))
        yield from (Row(text, str(truth).lower(), twins[truth], "sentence", template) for truth in (True, False))


# ------------------------------------------------------------------------------------------------------ captions (COCO)

def listed(phrases: Sequence[str]) -> str:
    return " and ".join([", ".join(phrases[:-1]), phrases[-1]]) if len(phrases) > 1 else phrases[0]


def captions(scene: Scene) -> list[str]:
    """Five references, each of which leaves something out, as people do, and a sixth that tells all."""
    objects = sorted(scene.objects, key=lambda o: (o.size == "small", third(o.y), third(o.x)))  # as one would name them
    plain = [f"{o.color} {o.shape}" for o in objects]
    second = next((i for i, name in enumerate(plain) if name != plain[0]), -1)                  # rather one of another kind
    alike = [a(name) if n == 1 else f"{NUMBERS[n]} {name}s" for name, n in Counter(plain).items()]
    preposition = {"left": "on", "middle": "in", "right": "on"}
    placed = [f"{a(f'{o.size} {o.color} {o.shape}')} {preposition.get(o.place, 'at')} the {o.place}" for o in objects]
    colors = listed(list(dict.fromkeys(o.color for o in objects)))
    number = f"{NUMBERS[len(objects)]} object{'s' * (len(objects) > 1)}"
    relation = max(RELATIONS, key=lambda relation: objects[0].ahead(objects[second], relation))
    return [listed(alike if len(alike) < 4 else [*alike[:2], "more"]),
            listed(placed[:2]),
            f"there is {listed(placed[1::-1])}",
            f"{a(plain[0])} {relation} {a(plain[second])}" if len(objects) > 1 else f"nothing but {a(plain[0])}",
            f"{number} in {colors} with {placed[0]}" if len(objects) > 1 else f"one object, {placed[0]}",
            f"a picture of {number}: {listed(placed)}"]


def describe(scene: Scene) -> str:
    """One caption that tells all, for contrastive training."""
    return captions(scene)[5]


# ---------------------------------------------------------------------------------------------------------------- rows

def examples(task: str, split: str, scenes: int | None = None, per_scene: int = 4) -> list[Row]:
    """The rows of a task. About each scene: up to `per_scene` questions of different kinds, a sentence twice, or five captions."""
    if task not in ("vqa", "gqa", "nlvr2", "coco") or split not in SCENES:
        raise ValueError(f"no {task!r} of {split!r}; choose vqa, gqa, nlvr2 or coco, and {', '.join(SCENES)}")
    ids, rng = [f"{split}-{i}" for i in range(SCENES[split] if scenes is None else scenes)], random.Random(f"{task}-{split}")
    if task == "coco":
        return [Row("", captions(scene_of(i))[:5], (i,), "caption", "") for i in ids]
    if task == "nlvr2":
        return list(nlvr2(ids, rng))
    rows, seen = [], Counter()
    for i in ids:
        kinds = {}
        for question in (vqa if task == "vqa" else gqa)(scene_of(i), rng):
            kinds.setdefault(question.kind, []).append(question)
        for kind in sorted(kinds, key=lambda kind: rng.random())[:per_scene]:
            # The answer that has been rarest so far, to its template first of all: then no answer is a good guess.
            best = min(kinds[kind], key=lambda q: (seen[q.template, q.answer], seen[q.text, q.answer], rng.random()))
            seen.update({(best.template, best.answer), (best.text, best.answer)})
            rows.append(best._replace(scenes=(i,)))
    return rows
