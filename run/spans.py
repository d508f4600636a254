"""T5's own task: to say what is hidden behind sentinels (arXiv:1910.10683, Sec. 3.1.4)."""
import random
from itertools import islice


def parts(total: int, count: int, rng: random.Random) -> list[int]:
    """The lengths of so many random parts, none of them empty."""
    cuts = sorted(rng.sample(range(1, total), count - 1))
    return [end - begin for begin, end in zip([0, *cuts], [*cuts, total])]


def corrupt_spans(ids: list[int], sentinel: int, rng: random.Random) -> tuple[list, list]:
    """Source and target: of at least two tokens 15 % are hidden, in spans of 3 on average.

    A sentinel, counted down from the first, stands for a span in the source and leads it in the
    target. ids end with </s>, which is never hidden; so do source and target.
    """
    ids, end = ids[:-1], ids[-1:]
    hidden = min(max(1, round(0.15 * len(ids))), len(ids) - 1)
    spans = max(1, round(hidden / 3))
    seen_parts, hidden_parts = parts(len(ids) - hidden, spans, rng), parts(hidden, spans, rng)
    source, target, rest = [], [], iter(ids)
    for i in range(spans):
        source += [*islice(rest, seen_parts[i]), sentinel - i]
        target += [sentinel - i, *islice(rest, hidden_parts[i])]
    return source + end, target + end
