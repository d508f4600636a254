"""Writes assets/sample/SST-2/train.tsv: made-up movie reviews, to train without a network.

    python assets/make/make_sample.py

sample/grammar.txt spells them; sample/SST-2/dev.tsv was written by hand and is not touched. A line
of the grammar is `name = one | other | ...`, and <name> stands for any alternative of that name. A
sentence has a label, and so has every part of it: `adj+` holds the praise and `adj-` the blame, and
<adj> takes the one that fits the label. <~adj> takes the other one, which is how negation and
contrast are written: "far from <~adj>" praises with a word of blame.
"""
import argparse
import random
import re
from functools import lru_cache
from pathlib import Path

SAMPLE = Path(__file__).resolve().parent.parent / "sample"
SEED, ROWS = 2206, 4000
SHORTEST = 5  # words; shorter than this, a review is hardly our own


def parse(text: str) -> dict[str, list[str]]:
    grammar = {}
    for line in text.splitlines():
        if line and not line.startswith("#"):
            name, alternatives = line.split(" = ")
            grammar.setdefault(name, []).extend(alternatives.split(" | "))
    return grammar


GRAMMAR = parse((SAMPLE / "grammar.txt").read_text())
SLOT = re.compile(r"<(~?)(\w+)>")


def alternatives(name: str, label: int) -> list[str]:
    return GRAMMAR.get(name) or GRAMMAR[name + "-+"[label]]


def spell(name: str, label: int, rng: random.Random) -> str:
    """One random phrase of `name` that speaks for `label`."""
    def fill(slot: re.Match) -> str:
        return spell(slot[2], 1 - label if slot[1] else label, rng)
    options = alternatives(name, label)
    number = int(len(options) * rng.random())  # one draw whatever the length, or twins would part
    return SLOT.sub(fill, options[number])


def a_or_an(sentence: str) -> str:
    """The grammar always says "a"."""
    return re.sub(r"\ba (?=hon|(?!one|uniq|use)[aeiou])", "an ", sentence)


def repeats_itself(sentence: str) -> bool:
    words = [word for word in sentence.split() if len(word) > 4]
    return len(words) > len(set(words))


def can_produce(sentence: str) -> bool:
    """Whether the grammar spells this sentence under either label.

    Follows every alternative from left to right.
    """
    @lru_cache(maxsize=None)
    def ends(name: str, label: int, start: int) -> frozenset[int]:
        """Where a phrase of `name` can end in `text` if it starts at `start`."""
        found = set()
        for alternative in alternatives(name, label):
            at, after = {start}, 0
            for slot in SLOT.finditer(alternative):
                at = skip(alternative[after:slot.start()], at)
                at = {end for i in at for end in ends(slot[2], 1 - label if slot[1] else label, i)}
                after = slot.end()
            found |= skip(alternative[after:], at)
        return frozenset(found)

    def skip(words: str, at: set[int]) -> set[int]:
        return {i + len(words) for i in at if text.startswith(words, i)}

    text = re.sub(r"\ban ", "a ", sentence)
    spelt = any(len(text) in ends("sentence", label, 0) for label in (0, 1))
    return a_or_an(text) == sentence and spelt


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=SAMPLE / "SST-2" / "train.tsv")
    args = parser.parse_args(argv)

    # Rows come in twins: one draw, spelt as blame and as praise, so that neither "the" nor "but"
    # nor the subject tells the label.
    rng, rows = random.Random(SEED), {}
    while len(rows) < ROWS:
        seed = rng.getrandbits(32)
        twins = [a_or_an(spell("sentence", label, random.Random(seed))) for label in (0, 1)]
        if all(len(twin.split()) >= SHORTEST and not repeats_itself(twin) and twin not in rows
               for twin in twins):
            rows.update(zip(twins, (0, 1)))
    rows = dict(rng.sample(list(rows.items()), ROWS))  # shuffled: twins need not share a batch
    lines = ["sentence\tlabel", *(f"{sentence}\t{label}" for sentence, label in rows.items())]
    text = "\n".join(lines) + "\n"
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_bytes(text.encode())
    return rows


if __name__ == "__main__":
    main()
