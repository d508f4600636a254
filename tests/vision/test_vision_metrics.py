"""VQA's and the captions' scores equal what the official code gave."""
import math

import pytest

from vision.metrics import (
    CONTRACTIONS, bleu, cider_d, normalize_answer, tokenize_caption, vqa_accuracy)

# (answer, the ten answers, accuracy), computed by VQAEval of salesforce-lavis 1.0.2, a copy of the
# official evaluation code before March 2021
VQA_CASES = [
    ("Two cats!", ["2 cats"] * 3 + ["cats"] * 7, 0.9),
    ("dont know", ["don't know"] * 2 + ["unknown"] * 8, 0.6),
    ("no\tone", ["no 1"] + ["nobody"] * 9, 0.3),
    ("1,000, or so", ["1000 or so"] * 4 + ["many"] * 6, 1.0),
    ("p.m. ", ["p.m."] * 3 + ["am"] * 7, 0.9),
    ("red/blue", ["red-blue"] * 3 + ["red and blue"] * 7, 0.9),
    ("red, blue-green", ["red bluegreen"] * 2 + ["red blue green"] * 8, 1.0),
    ("The cat", ["the cat"] * 10, 0.0),  # no article is dropped from the ten; 1.0 since 2021
    ("two", ["two"] * 9 + ["2"], 0.3),  # nor a number word changed
    ("yes", ["yes."] * 9 + ["no"], 1.0),
    ("yes", ["yes."] * 10, 0.0),  # all equal: they stay as they are
    ("cat , dog", ["cat , dog"] * 8 + ["cat dog"] * 2, 0.6),  # the comma leaves two spaces
    ("Im", ["im"] * 3 + ["i'm"] * 7, 0.9),  # the official table spells Im, which is never reached
    ("somebody'd", ["somebodyd"] * 3 + ["nobody"] * 7, 0.9),
    ("x" + "." * 33, ["x" + "." * 33] * 3 + ["x"] * 7, 0.9),  # only 32 periods go
]


@pytest.mark.parametrize("answer, ten_answers, expected", VQA_CASES)
def test_vqa_accuracy_equals_the_official_code_before_2021(answer, ten_answers, expected):
    assert vqa_accuracy(answer, ten_answers) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("n, expected", [(0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (10, 1)])
def test_vqa_accuracy_leaves_each_annotator_out(n, expected):
    # n = 3: the three leave 2 / 3 each, the other seven leave 1 each, so (3 * 2 / 3 + 7) / 10
    accuracy = vqa_accuracy("cat", ["cat"] * n + ["dog"] * (10 - n))
    assert accuracy == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("answer, expected", {
    "Yes.": "yes", "1,000": "1000", "U.S.A.": "usa", "3.5": "3.5", ".5": ".5", "10:30": "10:30",
    "p.m.": "pm", "none": "0", "Ten": "10", "red/blue": "red blue", "no-one": "no 1",
    "the  Cat!": "cat", " a\nman ": "man", "an A": "", "1,000 red/blue": "1000 redblue",
    "couldnt": "couldn't", "couldnt've": "couldn't've", "couldntve": "couldntve", "ill": "ill",
    "yall'd've": "y'all'd've", "man's": "man's", "$5 & 50%": "$5 & 50%",
    # a slash that touches a space anywhere, in the text as it came, goes everywhere
    "red/ blue/green": "red bluegreen", "red /blue/green": "red bluegreen",
    "red\n/blue/green": "red bluegreen", "red\t/blue/green": "red bluegreen",
    " /blue/green": "blue green", "red/-blue-green": "red blue green"}.items())
def test_an_answer_is_normalised_as_in_the_official_code(answer, expected):
    assert normalize_answer(answer) == expected
    assert len(CONTRACTIONS) == 114  # of 120, 4 have a capital that no answer has, 2 change nothing


HYPOTHESES = [
    "A man's dog runs along the beach.", "Two people are riding horses",
    "a plate of food and a cup of coffee on a table", "A red bus on the street & a bicycle"]
REFERENCES = [
    ["A brown dog is running on the beach.", "The dog runs along the beach near the water",
     "A man's dog doesn't stop at the sea."],
    ["Two people riding horses on a trail.", "A couple of riders; two horses.",
     "Two people are riding brown horses"],
    ["A plate of eggs next to a cup of coffee.", "Breakfast on a table: coffee, eggs and toast"],
    ["A red double-decker bus drives down the street.", "A bus and a bicycle on a wet street",
     "The red bus (No. 15) on the street!"],
]
CAPTIONS = {  # all as the Java tokenizer of pycocoevalcap 1.2, which writes -lrb- for (
    "A man's dog isn't here, can't you see?": "a man 's dog is n't here ca n't you see",
    "It’s 10:30 a.m. in the U.S.A. today.": "it 's 10:30 a.m. in the u.s.a. today",
    "Two t-shirts (red & white), $3.50 or 50% of 1,000":
        "two t-shirts ( red & white ) $ 3.50 or 50 % of 1,000",
    "the dogs' bowls -- it's mid-day; 5-year-old O'Brien":
        "the dogs bowls it 's mid-day 5-year-old o'brien",
    'a "STOP" sign \'hello\' and/or cat,dog ok:yes 5ft. what?!':
        "a stop sign hello and/or cat dog ok yes 5ft what ?!",
    "a “STOP” sign ‘hello’ «so» 5–6 dogs—wait … the dogs’ bowls, isn’t it":
        "a stop sign hello so 5 6 dogs wait the dogs bowls is n't it",
    "5 o’clock, t‑shirt • 20°C ½ cup, £5 €5 50¢ ¿no? 😀":
        "5 o’clock t‑shirt • 20 ° c 1/2 cup # 5 $ 5 50 cents ¿ no",
    "¡Hola! “it’s” „low“ ‘90’s’… a full，width。mark！and？（so）［on］：「dog」 【new】 ‼ a❤️ 👩‍🍳":
        "¡ hola it 's „ low 90 's a full ， width 。 mark ！ and ？ （ so ） ［ on ］ ： dog new a ❤",
}


def test_captions_score_as_in_the_coco_evaluation():
    # computed by pycocoevalcap 1.2, its Java tokenizer included
    assert cider_d(HYPOTHESES, REFERENCES) == pytest.approx(2.8336725678422514, abs=1e-12)
    assert bleu(HYPOTHESES, REFERENCES) == pytest.approx([
        0.9117647058555364, 0.8360739248411454, 0.6858551731516028, 0.5203686747111457])


@pytest.mark.parametrize("caption", CAPTIONS)
def test_a_caption_is_split_like_the_penn_treebank_beyond_ascii_too(caption):
    assert tokenize_caption(caption) == CAPTIONS[caption].split()


def test_cider_d_is_the_clipped_cosine_times_ten():
    # two images, so each n-gram has idf log 2 and the cosines are those of the counts:
    # 1, 1 (bigram), 0, 0 and 1/2, 0, 0, 0
    ten = cider_d(["red cat", "red dog"], [["red cat"], ["blue dog"]])
    assert ten == pytest.approx(10 * (2 / 4 + 0.5 / 4) / 2)
    # repeated words are clipped (2 * 1 over sqrt(8) * sqrt(2); 1 over sqrt(5)), and two more words
    # cost exp(-2^2 / 72)
    repeated = (1 / 2 + 1 / math.sqrt(5)) / 4 * math.exp(-4 / 72)
    clipped = cider_d(["red cat red cat", ""], [["red cat"], ["blue dog"]])
    assert clipped == pytest.approx(10 * repeated / 2)


@pytest.mark.parametrize("hypotheses, references, expected", [
    (["a dog", "a"], [["a cat"], ["a bird", "a tree"]], 0), (["a dog"], [["a dog"]], 0),
    (["a cat sits there", "two dogs run fast"], [["a cat sits there"], ["two dogs run fast"]], 10)],
    ids=["words of every image", "one image", "perfect"])
def test_cider_d_goes_from_0_for_what_every_image_has_to_10(hypotheses, references, expected):
    assert cider_d(hypotheses, references) == pytest.approx(expected)


@pytest.mark.parametrize("hypotheses, references, expected", [
    (["red red red red"], [["red dog on red", "a red dog"]], [2 / 4]),  # at most as in a reference
    (["a cat"], [["a cat sits here"]], [math.exp(1 - 4 / 2)] * 2),
    (["a cat sits"], [["a cat sits here", "a cat"]], [1] * 3),  # 2 and 4 are as close: the shorter
    (["a cat sits"], [["a", "a cat sits here"]], [math.exp(1 - 4 / 3)]),
    (["a cat", "dog runs"], [["a cat", "a cat sits here"], ["dog runs off"]],
     [math.exp(1 - 5 / 4)])])
def test_bleu_counts_and_is_as_brief_as_the_closest_reference(hypotheses, references, expected):
    assert bleu(hypotheses, references)[:len(expected)] == pytest.approx(expected)
