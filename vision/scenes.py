"""Pictures of coloured shapes and questions about them: the vision tasks' data without --data.

    "train-17" --scene_of--> Scene --draw--> (64, 64, 3) uint8
    examples("vqa", "train") --> [SceneRow("what color is the star?", "red", ("train-17",), ...)]

A scene is made from its id, the same to the byte everywhere: drawing is integer arithmetic.
Answers are balanced within each template, so that the question does not tell them.
"""
import random
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import permutations
from typing import NamedTuple

import numpy as np

SIDE = 64  # pixels
COLORS = {
    "red": (222, 46, 44), "orange": (247, 138, 24), "yellow": (250, 214, 40),
    "green": (44, 162, 76), "blue": (40, 104, 222), "purple": (150, 68, 192), "black": (38, 38, 46)}
OUTLINES = {  # corners in hundredths of the radius, y down; the star is drawn in five strokes
    "circle": (),
    "square": ((-88, -88), (88, -88), (88, 88), (-88, 88)),
    "triangle": ((0, -110), (98, 75), (-98, 75)),
    "diamond": ((0, -125), (90, 0), (0, 125), (-90, 0)),
    "star": ((0, -125), (73, 101), (-119, -39), (119, -39), (-73, 101))}
RADIUS = {"small": 6, "big": 10}  # pixels
REACH = {"small": 8, "big": 13}   # pixels; no corner is further from the centre, however tilted
TILTS = {-1: (99, -20), 0: (101, 0), 1: (99, 20)}  # 101 times cosine and sine: 11 degrees
CENTRES = {size: (range(reach, 19), range(23, 41), range(45, SIDE - reach))
           for size, reach in REACH.items()}  # clear of the thirds' edges
PLACES = ("top left", "top", "top right", "left", "middle", "right",
          "bottom left", "bottom", "bottom right")
RELATIONS = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}
CLEAR = 8  # pixels between two centres, below which neither is left of the other
NUMBERS = ("no", "one", "two", "three", "four", "five")
TASKS = ("vqa", "gqa", "nlvr2", "coco")
SCENES = {"train": 4000, "val": 400, "test": 400}  # splits never share a scene


@dataclass(frozen=True)
class Object:
    size: str
    color: str
    shape: str
    x: int     # pixel of its centre, from the left
    y: int     # and from the top
    tilt: int  # a key of TILTS

    @property
    def place(self) -> str:
        return PLACES[3 * (3 * self.y // SIDE) + 3 * self.x // SIDE]

    def ahead(self, other: "Object", relation: str) -> int:
        """Return by how many pixels it is left of the other (right of, above, below)."""
        right, down = RELATIONS[relation]
        return (self.x - other.x) * right + (self.y - other.y) * down


@dataclass(frozen=True)
class Scene:
    objects: tuple[Object, ...]
    background: tuple[int, int, int]
    light: int  # percent; dims everything


class SceneRow(NamedTuple):
    text: str                # question or sentence; empty for captions
    answer: str | list[str]  # one word, "true" or "false", or the five captions
    scenes: tuple[str, ...]  # ids; two for NLVR2, left and right
    kind: str                # of question: count, color, ...
    template: str


def pick(rng: random.Random, options: Sequence):
    return options[int(len(options) * rng.random())]  # Python's choice() may change, random() not


def scene_of(scene_id: str) -> Scene:
    """Return the scene of an id like "train-17", always the same."""
    rng = random.Random(scene_id)
    grey, light = pick(rng, range(215, 244)), pick(rng, range(84, 101))
    objects, count = [], pick(rng, range(1, 6))
    background = tuple(grey + pick(rng, range(-12, 13)) for _ in range(3))
    colors, shapes = ([pick(rng, list(every)) for _ in range(pick(rng, range(1, 5)))]
                      for every in (COLORS, OUTLINES))  # few, so that some repeat
    while len(objects) < count:
        size = pick(rng, ("small", "small", "big"))
        x, y = (pick(rng, pick(rng, CENTRES[size])) for _ in "xy")
        if all((x - o.x) ** 2 + (y - o.y) ** 2 >= (REACH[size] + REACH[o.size]) ** 2
               for o in objects):
            color, shape, tilt = pick(rng, colors), pick(rng, shapes), pick(rng, list(TILTS))
            objects.append(Object(size, color, shape, x, y, tilt))
        elif pick(rng, range(50)) == 0:
            objects.clear()  # these may leave no room for the rest
    return Scene(tuple(objects), background, light)


@lru_cache(maxsize=None)
def coverage(shape: str, size: str, tilt: int) -> np.ndarray:
    """Count each pixel's 8 x 8 points inside the shape, in the square that it can reach."""
    reach, radius = REACH[size], 16 * RADIUS[size]  # sixteenths of a pixel; points lie at odd ones
    points = (16 * np.arange(-reach, reach + 1)[:, None] + np.arange(-7, 8, 2)).flatten()
    if shape == "circle":
        inside = points ** 2 + points[:, None] ** 2 <= radius ** 2
    else:
        (cos, sin), x, y = TILTS[tilt], 101 * 100 * points, 101 * 100 * points[:, None]
        corners = [(radius * (cos * right - sin * down), radius * (sin * right + cos * down))
                   for right, down in OUTLINES[shape]]
        sides = 0
        for (x0, y0), (x1, y1) in zip(corners, corners[1:] + corners[:1]):
            sides = sides + ((x1 - x0) * (y - y0) - (y1 - y0) * (x - x0) >= 0)
        inside = sides >= len(corners) - (shape == "star")  # a tip lies beyond one of five lines
    return inside.reshape(2 * reach + 1, 8, 2 * reach + 1, 8).sum((1, 3))


def draw(scene: Scene, palette: Mapping[str, tuple[int, int, int]] = COLORS) -> np.ndarray:
    """Return the picture, (64, 64, 3) uint8, with smooth edges."""
    picture = np.full((SIDE, SIDE, 3), scene.background, np.int64)
    for o in scene.objects:
        reach, cover = REACH[o.size], coverage(o.shape, o.size, o.tilt)[..., None]
        window = picture[o.y - reach:o.y + reach + 1, o.x - reach:o.x + reach + 1]
        window[:] = (window * (64 - cover) + np.array(palette[o.color]) * cover + 32) // 64
    return (picture * scene.light // 100).astype(np.uint8)


@lru_cache(maxsize=None)
def names(size: str, color: str, shape: str) -> list[str]:
    """Return an object's names, shortest first: star, object, big star, ..., big red object."""
    return [" ".join([*words, noun]) for words in ((), (size,), (color,), (size, color))
            for noun in (shape, "object")]


def tally(scene: Scene) -> Counter:
    """Count how many objects each name fits."""
    return Counter(name for o in scene.objects for name in names(o.size, o.color, o.shape))


def refer(scene: Scene, rng: random.Random, without: str = "") -> Iterator[tuple[Object, str]]:
    """Yield objects with a name of their own, one of the shortest, not telling `without`."""
    count = tally(scene)
    for o in scene.objects:
        if own := [name for name in names(o.size, o.color, o.shape)
                   if count[name] == 1 and not (without and getattr(o, without) in name)]:
            yield o, pick(rng, [n for n in own if n.count(" ") == own[0].count(" ")])


def ask(kind: str, template: str, answer: str | bool, **words: str) -> SceneRow:
    answer = {True: "yes", False: "no"}.get(answer, answer)
    return SceneRow(template.format(**words), answer, (), kind, template)


def a(name: str) -> str:
    return ("an " if name[0] in "aeiou" else "a ") + name


def vqa(scene: Scene, rng: random.Random) -> Iterator[SceneRow]:
    """Yield every question of VQA's kinds that this scene answers."""
    count, total = tally(scene), len(scene.objects)
    yield ask("count", "how many objects are there?", str(total))
    for size in RADIUS:
        number = str(count[f"{size} object"])
        yield ask("count", "how many {size} objects are in the picture?", number, size=size)
    for shape in OUTLINES:
        yield ask("count", "how many {shape}s are there?", str(count[shape]), shape=shape)
    for color in COLORS:
        number, an = count[f"{color} object"], a(color)
        yield ask("count", "how many {color} objects are there?", str(number), color=color)
        yield ask("yes/no", "is there {a_color} object in the picture?", number > 0, a_color=an)
        if total > 1:
            yield ask("yes/no", "are all objects {color}?", number == total, color=color)
        for shape in OUTLINES:
            true = count[f"{color} {shape}"] > 0
            yield ask("yes/no", "is there {a_color} {shape}?", true, a_color=an, shape=shape)
            if count[shape] == 1:
                yield ask("yes/no", "is the {shape} {color}?", true, shape=shape, color=color)
    for one, other in permutations(OUTLINES, 2):
        if count[one] or count[other]:
            more = count[one] > count[other]
            yield ask("yes/no", "are there more {one}s than {other}s?", more, one=one, other=other)
    for wanted in ("color", "shape"):
        for o, name in refer(scene, rng, without=wanted):
            yield ask(wanted, f"what {wanted} is the {{name}}?", getattr(o, wanted), name=name)
    for o, name in refer(scene, rng):
        y, x = o.place.split()[0], o.place.split()[-1]
        if x == y:
            yield ask("position", "where is the {name}?", x, name=name)
        if x in ("left", "right"):
            yield ask("position", "is the {name} on the left or on the right?", x, name=name)
        if y in ("top", "bottom"):
            yield ask("position", "is the {name} at the top or at the bottom?", y, name=name)


def gqa(scene: Scene, rng: random.Random) -> Iterator[SceneRow]:
    """Yield how one object stands to another. What is nearly level is not asked about."""
    for relation in RELATIONS:
        for (one, a), (other, b) in permutations(refer(scene, rng), 2):
            pixels = one.ahead(other, relation)
            if abs(pixels) >= CLEAR:
                yield ask("relation", f"is the {{a}} {relation} the {{b}}?", pixels > 0, a=a, b=b)
        for one, name in refer(scene, rng):
            ahead = [o for o in scene.objects if o.ahead(one, relation) > 0]
            if len(ahead) == 1 and ahead[0].ahead(one, relation) >= CLEAR:
                template = f"what color is the object {relation} the {{name}}?"
                yield ask("color", template, ahead[0].color, name=name)


SENTENCES = {  # template: is it true of the tallies l and r of the left and the right picture?
    "there is {a_x} in the left picture.": lambda l, r, x, y, k: l[x] > 0,
    "there is {a_x} in the right picture.": lambda l, r, x, y, k: r[x] > 0,
    "there are {k} {x}s in the left picture.": lambda l, r, x, y, k: l[x] == k,
    "there are {k} {x}s in the right picture.": lambda l, r, x, y, k: r[x] == k,
    "both pictures have {a_x}.": lambda l, r, x, y, k: l[x] > 0 and r[x] > 0,
    "only one of the pictures has {a_x}.": lambda l, r, x, y, k: (l[x] > 0) != (r[x] > 0),
    "neither picture has {a_x}.": lambda l, r, x, y, k: l[x] == r[x] == 0,
    "the left picture has more {x}s than the right one.": lambda l, r, x, y, k: l[x] > r[x],
    "the right picture has more {x}s than the left one.": lambda l, r, x, y, k: l[x] < r[x],
    "the left picture has {a_x} and the right one has {a_y}.":
        lambda l, r, x, y, k: l[x] > 0 and r[y] > 0,
}


def nlvr2(ids: list[str], rng: random.Random) -> Iterator[SceneRow]:
    """Yield twins: a sentence about a true pair, then about a false one that shares a picture."""
    tallies = {i: tally(scene_of(i)) for i in ids}
    nouns = [*OUTLINES, *(f"{word} {noun}" for word in (*COLORS, *RADIUS)
                          for noun in (*OUTLINES, "object"))]
    for n in range(len(ids)):
        template, twins, tries = list(SENTENCES)[n % len(SENTENCES)], {}, 0
        while len(twins) < 2:
            if tries % 30 == 0:  # no luck with these
                shared, right, twins = pick(rng, ids), pick(rng, (0, 1)), {}
                x, y, k = pick(rng, nouns), pick(rng, nouns), pick(rng, (2, 3, 4))
            other, tries = pick(rng, ids), tries + 1
            pair = (other, shared) if right else (shared, other)
            if other != shared and x != y:
                twins.setdefault(SENTENCES[template](*[tallies[i] for i in pair], x, y, k), pair)
        text = template.format(x=x, y=y, k=NUMBERS[k], a_x=a(x), a_y=a(y))
        for truth in (True, False):
            yield SceneRow(text, str(truth).lower(), twins[truth], "sentence", template)


def listed(phrases: Sequence[str]) -> str:
    return ", ".join(phrases[:-1]) + " and " * (len(phrases) > 1) + phrases[-1]


def captions(scene: Scene) -> list[str]:
    """Return five references."""
    objects = sorted(scene.objects, key=lambda o: (o.size == "small", PLACES.index(o.place)))
    plain = [f"{o.color} {o.shape}" for o in objects]
    second = next((i for i, name in enumerate(plain) if name != plain[0]), -1)  # of another kind
    alike = [a(name) if n == 1 else f"{NUMBERS[n]} {name}s" for name, n in Counter(plain).items()]
    preposition = {"left": "on", "middle": "in", "right": "on"}
    placed = [f"{a(o.size)} {o.color} {o.shape} {preposition.get(o.place, 'at')} the {o.place}"
              for o in objects]
    colors, first = listed(list(dict.fromkeys(o.color for o in objects))), a(plain[0])
    relation = max(RELATIONS, key=lambda relation: objects[0].ahead(objects[second], relation))
    last = [f"{first} {relation} {a(plain[second])}",
            f"{NUMBERS[len(objects)]} objects in {colors} with {placed[0]}"]
    if len(objects) == 1:
        last = [f"nothing but {first}", f"one object, {placed[0]}"]
    return [listed(alike if len(alike) < 4 else [*alike[:2], "more"]), listed(placed[:2]),
            f"there is {listed(placed[1::-1])}", *last]


def examples(task: str, split: str, scenes: int | None = None) -> list[SceneRow]:
    """Return a task's rows: of each scene up to 4 questions, a sentence twice, or five captions."""
    if task not in TASKS:
        raise ValueError(f"{task} needs --data DIR; {', '.join(TASKS)} have drawn scenes")
    ids = [f"{split}-{i}" for i in range(scenes or SCENES[split])]
    rng = random.Random(f"{task}-{split}")
    if task == "coco":
        return [SceneRow("", captions(scene_of(i)), (i,), "caption", "") for i in ids]
    if task == "nlvr2":
        return list(nlvr2(ids, rng))
    rows, seen = [], Counter()
    for i in ids:
        kinds = {}
        for question in (vqa if task == "vqa" else gqa)(scene_of(i), rng):
            kinds.setdefault(question.kind, []).append(question)
        for kind in sorted(kinds, key=lambda kind: rng.random())[:4]:
            # The rarest answer so far, to its template first: then no answer is a good guess.
            best = min(kinds[kind], key=lambda q: (seen[q.template, q.answer],
                                                   seen[q.text, q.answer], rng.random()))
            seen.update({(best.template, best.answer), (best.text, best.answer)})
            rows.append(best._replace(scenes=(i,)))
    return rows
