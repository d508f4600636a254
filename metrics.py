"""The scores of the paper, in numpy. Each metric is f(predictions, labels) -> float, not times 100.

First GLUE, then vision and language: VQA has its own accuracy, GQA and NLVR2 share `accuracy`, captions have CIDEr-D and BLEU.
A prediction of None is an invalid generation, text that is no answer of the task: it counts as wrong (correlations take numbers only).
A correlation that is not defined, because one side is constant or not finite, is 0. `glue_score` reports how often each happened.
"""

import math
import re
from collections import Counter
from collections.abc import Sequence
from functools import reduce
from operator import or_

import numpy as np


def accuracy(predictions: Sequence, labels: Sequence) -> float:
    """Share of predictions that equal their label; labels may be of any type.

    This is also NLVR2's score, and GQA's: its official script compares the two strings as they are, so "A dog" is not "dog".
    """
    _check(predictions, labels)
    return float(np.mean([p is not None and p == l for p, l in zip(predictions, labels)]))


def f1(predictions: Sequence[int | None], labels: Sequence[int]) -> float:
    """F1 of class 1, labels 0 and 1; 0 where neither side has a 1."""
    p, l = _binary(predictions, labels)
    positives = p.sum() + l.sum()  # F1 = 2 TP / (2 TP + FP + FN)
    return float(2 * (p * l).sum() / positives) if positives else 0.0


def matthews(predictions: Sequence[int | None], labels: Sequence[int]) -> float:
    """Matthews correlation of labels 0 and 1, which is Pearson's of the two vectors."""
    return pearson(*_binary(predictions, labels))


def pearson(predictions: Sequence[float], labels: Sequence[float]) -> float:
    """Linear correlation; 0 where it is not defined."""
    if _undefined(predictions, labels):
        return 0.0
    x, y = (np.asarray(values, dtype=np.float64) - np.mean(values, dtype=np.float64) for values in (predictions, labels))
    x, y = x / np.abs(x).max(), y / np.abs(y).max()  # so that no square overflows or vanishes
    return float(np.clip(x @ y / np.sqrt((x @ x) * (y @ y)), -1, 1))


def spearman(predictions: Sequence[float], labels: Sequence[float]) -> float:
    """Pearson's correlation of the ranks; tied values share the mean of their ranks."""
    return 0.0 if _undefined(predictions, labels) else pearson(_ranks(predictions), _ranks(labels))


CORRELATIONS = (matthews, pearson, spearman)
GLUE_METRICS = {  # Sec. 4; the score of a task is the mean of its metrics
    "cola": (matthews,), "sst2": (accuracy,), "mrpc": (accuracy, f1), "qqp": (accuracy, f1),
    "mnli": (accuracy,), "qnli": (accuracy,), "rte": (accuracy,), "stsb": (pearson, spearman),
}


def glue_score(task_name: str, predictions: Sequence, labels: Sequence) -> dict[str, float | int]:
    """The task's metrics by name and their mean as "score", all in percent.

    "invalid" counts the None among the predictions (in STS-B's correlations a None is -1.0), "undefined" the correlations set to 0.
    """
    if task_name not in GLUE_METRICS:
        raise ValueError(f"no GLUE task {task_name!r}; choose one of {', '.join(GLUE_METRICS)}")
    invalid = sum(p is None for p in predictions)
    filled = [-1.0 if p is None else p for p in predictions] if task_name == "stsb" else _filled(predictions, labels)
    result = {metric.__name__: 100 * metric(filled, labels) for metric in GLUE_METRICS[task_name]}
    undefined = sum(metric in CORRELATIONS and _undefined(filled, labels) for metric in GLUE_METRICS[task_name])
    return {**result, "score": float(np.mean(list(result.values()))), "invalid": invalid, "undefined": undefined}


def _check(predictions: Sequence, labels: Sequence) -> None:
    if len(predictions) != len(labels) or len(labels) == 0:
        raise ValueError(f"a score needs labels, and one prediction for each; got {len(labels)} and {len(predictions)}")


def _filled(predictions: Sequence[int | None], labels: Sequence[int]) -> list[int]:
    """None becomes a wrong class: the other one of two."""
    return [1 - l if p is None else p for p, l in zip(predictions, labels)]


def _binary(predictions: Sequence[int | None], labels: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    _check(predictions, labels)
    p, l = np.asarray(_filled(predictions, labels)), np.asarray(labels)
    if not np.isin([p, l], (0, 1)).all():
        raise ValueError("F1 and Matthews are for the labels 0 and 1 (None for an invalid prediction); got others")
    return p, l


def _undefined(predictions: Sequence[float], labels: Sequence[float]) -> bool:
    _check(predictions, labels)
    return not (0 < np.ptp(predictions) < np.inf and 0 < np.ptp(labels) < np.inf)  # constant, or not finite


def _ranks(values: Sequence[float]) -> np.ndarray:
    _, group, counts = np.unique(np.asarray(values), return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[group]  # ranks from 1; a group of n ends at the cumulative sum


# ---- VQA v2 ---------------------------------------------------------------------------------------------------------------------

ARTICLES = ("a", "an", "the")
NUMBERS = {"none": "0", **{word: str(n) for n, word in enumerate("zero one two three four five six seven eight nine ten".split())}}
PUNCTUATION = ";/[]\"{}()=+\\_-><@`,?!"  # neither ' nor : nor the period, which has a rule of its own
CONTRACTED = {  # ending: the words that take it
    "n't": "ai are ca could did does do had has have is might must need ought sha should was were wo would",
    "'ve": "could might must not should they we what where who would you",
    "'d": "he how it someone something there they where who you",
    "'s": "he how somebody someone that there what when where who why",
    "'ll": "how it somebody someone something they what who why you",
    "'re": "there they what why you",
    "n't've": "could had might should would",
    "'d've": "he it she somebody someone something there they we who y'all you",
    "": "ma'am o'clock 'twas y'all y'all'll 'ow's'at",
}
CONTRACTIONS = {  # each form that lacks exactly one apostrophe -> the full form; "somebody'd" is a slip of the official table
    word[:i] + word[i + 1:]: word
    for ending, stems in CONTRACTED.items() for word in (stem + ending for stem in stems.split())
    for i, letter in enumerate(word) if letter == "'"
} | {"somebody'd": "somebodyd"}


def vqa_accuracy(answer: str, ten_answers: list[str]) -> float:
    """Accuracy of one answer, 0 to 1: min(1, matches / 3), averaged over the ten ways to leave one annotator out.

    Antol et al. (arXiv 1505.00468, Sec. 3), with the comparison of the official code: the answer is always normalised completely,
    the ten only lose their punctuation, and only where they differ. So "the dog" or "two" among the ten is matched by no answer.
    """
    if len(ten_answers) != 10:
        raise ValueError(f"VQA accuracy compares an answer with those of ten annotators; got {len(ten_answers)}")
    answer = normalize_answer(answer)
    if len(set(ten_answers)) > 1:
        ten_answers = [_drop_punctuation(given) for given in ten_answers]
    matches = [given == answer for given in ten_answers]
    return sum(min(1, (sum(matches) - match) / 3) for match in matches) / 10


def vqa_soft_labels(counts: dict[str, int]) -> dict[str, float]:
    """How many of the ten gave each answer -> its weight in training, min(1, 0.3 n): the accuracy that the answer would earn."""
    return {answer: min(10, 3 * n) / 10 for answer, n in counts.items()}


def normalize_answer(answer: str) -> str:
    """The spelling that answers are compared in: 'There are two red-ish U.S. cars!' -> 'there are 2 red ish us cars'."""
    words = _drop_punctuation(answer.replace("\n", " ").replace("\t", " ").strip()).lower().split()
    words = [NUMBERS.get(word, word) for word in words]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def _drop_punctuation(text: str) -> str:
    """A mark that touches a space anywhere in the text is deleted everywhere, another becomes a space: 'red/blue' -> 'red blue'.

    A comma between two digits has every mark deleted: '1,000' -> '1000'. Last go the periods that no digit follows: '3.5' stays.
    """
    digits, spaced = re.search(r"\d,\d", text), text
    for mark in PUNCTUATION:
        glue = digits or f"{mark} " in text or f" {mark}" in text
        spaced = spaced.replace(mark, "" if glue else " ")
    return re.sub(r"\.(?!\d)", "", spaced, count=32)  # the official code passes the flag re.UNICODE, 32, as the count


# ---- COCO captions --------------------------------------------------------------------------------------------------------------

CLITIC = r"(?:n't|'(?:[sdm]|ll|re|ve))\b"
TOKEN = re.compile(rf"""
      {CLITIC}                                     # n't of isn't, 's of man's
    | \w\. (?:\w\.)+ (?!\w)                        # p.m.
    | \w+ (?: (?:[-'./]|(?<=\d)[,:](?=\d)) \w+ )*  # t-shirt, o'clock, 1,000, 10:30
    | [^\w\s.,:;?!'"`-]                            # & $ (
    """, re.VERBOSE)


def tokenize_caption(text: str) -> list[str]:
    """Words in lower case without punctuation: "A man's t-shirt, isn't it?" -> a man 's t-shirt is n't it.

    Approximates the Penn Treebank tokenizer of the COCO evaluation (Java; arXiv 1504.00325, Sec. 3). That one knows abbreviations
    (keeps the period of "mr."), splits "cannot" and "gonna", and keeps runs of marks such as "!!" as words; here they are dropped.
    """
    return TOKEN.findall(re.sub(rf"(?<=\w)(?={CLITIC})", " ", text.lower().replace("’", "'")))


def cider_d(hypotheses: list[str], references: list[list[str]]) -> float:
    """CIDEr-D of one caption per image against the references of its image, averaged over images; 10 is the most.

    Vedantam et al. (arXiv 1411.5726, Eq. 1 to 3, and D's clipping and length penalty with sigma = 6 from the part on gameability).
    Document frequencies come from these references, so the score depends on the whole set, and one image alone scores 0.
    """
    hypotheses, references = _count_captions(hypotheses, references)
    images_with = Counter()  # the document frequency of each n-gram
    for captions in references:
        images_with.update({gram for caption in captions for grams in caption for gram in grams})

    def tf_idf(grams: Counter) -> dict:
        return {gram: n * math.log(len(references) / max(1, images_with[gram])) for gram, n in grams.items()}

    def cosine(x: dict, y: dict) -> float:  # clipped: repeating a word of the reference earns nothing
        product = sum(min(weight, y.get(gram, 0)) * y.get(gram, 0) for gram, weight in x.items())
        return product / (math.hypot(*x.values()) * math.hypot(*y.values())) if product else 0.0

    def similarity(hypothesis: list[Counter], reference: list[Counter]) -> float:
        longer = hypothesis[0].total() - reference[0].total()
        cosines = [cosine(tf_idf(x), tf_idf(y)) for x, y in zip(hypothesis, reference)]
        return 10 * math.exp(-longer ** 2 / (2 * 6 ** 2)) * sum(cosines) / 4

    scores = [[similarity(hypothesis, reference) for reference in captions] for hypothesis, captions in zip(hypotheses, references)]
    return float(np.mean([np.mean(of_image) for of_image in scores]))


def bleu(hypotheses: list[str], references: list[list[str]]) -> list[float]:
    """[BLEU-1, ..., BLEU-4] of the corpus, each 0 to 1 (Papineni et al. 2002, Sec. 2.3), for captions as in `cider_d`.

    As in the COCO evaluation, an image's reference length is the closest one (the shorter of two), and two tiny constants avoid 0 / 0,
    which leaves a BLEU-4 without any match slightly above 0.
    """
    hypotheses, references = _count_captions(hypotheses, references)
    matched, total, closest = np.zeros(4), np.zeros(4), 0
    for hypothesis, captions in zip(hypotheses, references):
        most = [reduce(or_, grams) for grams in zip(*captions)]  # how often an n-gram occurs in the reference that has it most
        matched += [(x & y).total() for x, y in zip(hypothesis, most)]
        total += [x.total() for x in hypothesis]
        lengths = [caption[0].total() for caption in captions]
        closest += min(lengths, key=lambda length: (abs(length - hypothesis[0].total()), length))
    precisions = (matched + 1e-15) / (total + 1e-9)
    brevity = min(1.0, math.exp(1 - (closest + 1e-9) / (total[0] + 1e-15)))
    return (brevity * np.cumprod(precisions) ** (1 / np.arange(1, 5))).tolist()


def _count_captions(hypotheses: list[str], references: list[list[str]]) -> tuple[list[list[Counter]], list[list[list[Counter]]]]:
    """Each caption becomes four Counters, of its 1-, 2-, 3- and 4-grams."""
    if len(hypotheses) != len(references) or len(hypotheses) == 0:
        raise ValueError(f"captions need images, and one hypothesis for each; got {len(references)} and {len(hypotheses)}")
    for image, captions in enumerate(references):
        if isinstance(captions, str) or len(captions) == 0:
            raise ValueError(f"captions need a list of at least one reference for each image; got {captions!r} for image {image}")

    def count(caption: str) -> list[Counter]:
        words = tokenize_caption(caption)
        return [Counter(zip(*(words[i:] for i in range(n)))) for n in (1, 2, 3, 4)]

    return [count(h) for h in hypotheses], [[count(reference) for reference in captions] for captions in references]
