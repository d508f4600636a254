"""Scores of the vision tasks (Sec. 4): VQA's accuracy, and CIDEr-D and BLEU of captions."""
import math
import re
from collections import Counter
from functools import reduce
from operator import or_

import numpy as np

ARTICLES = ("a", "an", "the")
NUMBERS = "zero one two three four five six seven eight nine ten".split()
DIGITS = {word: str(n) for n, word in enumerate(NUMBERS)} | {"none": "0"}
PUNCTUATION = ";/[]\"{}()=+\\_-><@`,?!"  # neither ' nor : nor the period, which has its own rule
CONTRACTED = {  # ending: the words that take it
    "n't": "ai are ca could did does do had has have is might must need ought sha should was were "
           "wo would",
    "'ve": "could might must not should they we what where who would you",
    "'d": "he how it someone something there they where who you",
    "'s": "he how somebody someone that there what when where who why",
    "'ll": "how it somebody someone something they what who why you",
    "'re": "there they what why you",
    "n't've": "could had might should would",
    "'d've": "he it she somebody someone something there they we who y'all you",
    "": "ma'am o'clock 'twas y'all y'all'll 'ow's'at",
}
CONTRACTIONS = {  # each form that lacks exactly one apostrophe -> the full form
    word[:i] + word[i + 1:]: word
    for ending, stems in CONTRACTED.items() for word in (stem + ending for stem in stems.split())
    for i, letter in enumerate(word) if letter == "'"
} | {"somebody'd": "somebodyd"}  # a slip in the official table


def vqa_accuracy(answer: str, ten_answers: list[str]) -> float:
    """Return an answer's accuracy, 0 to 1: min(1, matches / 3), averaged over leaving one out
    (arXiv 1505.00468, Sec. 3), as the official code was before March 2021 and as VL-T5 has it: the
    ten lose only their punctuation, and only where they differ."""
    answer = normalize_answer(answer)
    if len(set(ten_answers)) > 1:
        ten_answers = [_drop_punctuation(given) for given in ten_answers]
    matches = [given == answer for given in ten_answers]
    return sum(min(1, (sum(matches) - match) / 3) for match in matches) / 10


def normalize_answer(answer: str) -> str:
    """'There are two red-ish U.S. cars!' -> 'there are 2 red ish us cars'."""
    words = _drop_punctuation(answer.replace("\n", " ").replace("\t", " ").strip()).lower().split()
    words = [DIGITS.get(word, word) for word in words]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def _drop_punctuation(text: str) -> str:
    """Delete marks that touch a space anywhere in the text, make others a space; not in '1,000'."""
    digits, spaced = re.search(r"\d,\d", text), text
    for mark in PUNCTUATION:
        glue = digits or f"{mark} " in text or f" {mark}" in text
        spaced = spaced.replace(mark, "" if glue else " ")
    return re.sub(r"\.(?!\d)", "", spaced, count=32)  # the official code passes re.UNICODE as count


MARKS = dict.fromkeys("“”‘‛«»‹›‒–—―…‥‽‼⁇⁈⁉", " ") | {  # they part words, as " and -- do
    "£": "#", "€": "$", "¢": " cents ", "¼": " 1/4 ", "½": " 1/2 ", "¾": " 3/4 ", "\xad": ""}
CLITIC = r"(?:n['’]t|['’](?:[sdm]|ll|re|ve))\b"
TOKEN = re.compile(rf"""
      {CLITIC}                                         # n't of isn't, 's of man's
    | \w\. (?:\w\.)+ (?!\w)                            # p.m.
    | \w+ (?: (?:[-‐‑'’./]|(?<=\d)[,:](?=\d)) \w+ )*   # t-shirt, o'clock, 1,000, 10:30
    | [!?]{{2,}}                                       # what?!
    | [^\w\s.,:;?!'’"`‐‑〈-〟\u200b-\u200f\ufe00-\ufeff\U00010000-\U0010FFFF-]  # & $ ( but no emoji
    """, re.VERBOSE)


def tokenize_caption(text: str) -> list[str]:
    """Return lower-case words: "A man's t-shirt, isn't it?" -> a man 's t-shirt is n't it. The COCO
    evaluation's Java tokenizer also keeps the period of "mr.", and splits "cannot"."""
    text = text.lower().translate(str.maketrans(MARKS))
    return TOKEN.findall(re.sub(CLITIC, lambda found: " " + found[0].replace("’", "'"), text))


def ngrams(caption: str) -> list[Counter]:
    """Count the caption's 1-, 2-, 3- and 4-grams."""
    words = tokenize_caption(caption)
    return [Counter(zip(*(words[i:] for i in range(n)))) for n in (1, 2, 3, 4)]


def cider_d(hypotheses: list[str], references: list[list[str]]) -> float:
    """Return CIDEr-D, 0 to 10, of one caption per image, mean over images (arXiv 1411.5726)."""
    hypotheses = [ngrams(caption) for caption in hypotheses]
    references = [[ngrams(caption) for caption in captions] for captions in references]
    images_with = Counter()  # each n-gram's document frequency: one image scores 0
    for captions in references:
        images_with.update({gram for caption in captions for grams in caption for gram in grams})

    def tf_idf(grams: Counter) -> dict:
        return {gram: n * math.log(len(references) / max(1, images_with[gram]))
                for gram, n in grams.items()}

    def cosine(x: dict, y: dict) -> float:  # D: repeating a reference's word earns nothing
        product = sum(min(weight, y.get(gram, 0)) * y.get(gram, 0) for gram, weight in x.items())
        return product / (math.hypot(*x.values()) * math.hypot(*y.values())) if product else 0.0

    def similarity(hypothesis: list[Counter], reference: list[Counter]) -> float:
        longer = hypothesis[0].total() - reference[0].total()  # D: costs, with sigma = 6
        cosines = [cosine(tf_idf(x), tf_idf(y)) for x, y in zip(hypothesis, reference)]
        return 10 * math.exp(-longer ** 2 / (2 * 6 ** 2)) * sum(cosines) / 4

    return float(np.mean([np.mean([similarity(hypothesis, reference) for reference in captions])
                          for hypothesis, captions in zip(hypotheses, references, strict=True)]))


def bleu(hypotheses: list[str], references: list[list[str]]) -> list[float]:
    """Return [BLEU-1, ..., BLEU-4] of the corpus, each 0 to 1 (Papineni et al. 2002, Sec. 2.3)."""
    matched, total, closest = np.zeros(4), np.zeros(4), 0
    for hypothesis, captions in zip(map(ngrams, hypotheses), references, strict=True):
        captions = [ngrams(caption) for caption in captions]
        most = [reduce(or_, grams) for grams in zip(*captions)]  # each n-gram's largest count
        matched += [(x & y).total() for x, y in zip(hypothesis, most)]
        total += [x.total() for x in hypothesis]
        length, lengths = hypothesis[0].total(), [caption[0].total() for caption in captions]
        closest += min(lengths, key=lambda reference: (abs(reference - length), reference))
    # As in the COCO evaluation, tiny constants avoid 0 / 0.
    precisions = (matched + 1e-15) / (total + 1e-9)
    brevity = min(1.0, math.exp(1 - (closest + 1e-9) / (total[0] + 1e-15)))
    return (brevity * np.cumprod(precisions) ** (1 / np.arange(1, 5))).tolist()
