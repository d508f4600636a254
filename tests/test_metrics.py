"""Scores of Sec. 4, against values computed by hand (and, when they were written, against scipy and scikit-learn).

The vision-and-language scores are compared with the official code: with numbers that it gave once, and live where it is installed.
"""

import contextlib
import importlib.util
import io
import math
import random

import pytest

from metrics import (accuracy, bleu, cider_d, CONTRACTIONS, f1, glue_score, matthews, normalize_answer, pearson, spearman, tokenize_caption,
                     vqa_accuracy, vqa_soft_labels)


def test_accuracy_counts_an_invalid_prediction_as_wrong():
    assert accuracy([1, 0, None, 2], [1, 1, 0, 2]) == 0.5


def test_f1_takes_an_invalid_prediction_for_the_wrong_class():
    # with None read as 0 and 1: 2 true positives, 2 false positives, 1 false negative
    assert f1([1, 1, 1, None, None], [1, 1, 0, 1, 0]) == pytest.approx(4 / 7)
    assert f1([0, 0], [0, 0]) == 0


def test_matthews_equals_the_formula_of_the_four_counts():
    predictions, labels = [1, 1, 1, 0, 0, 0, 0, 1], [1, 1, 1, 1, 0, 0, 0, 0]  # TP 3, FN 1, TN 3, FP 1
    assert matthews(predictions, labels) == pytest.approx((3 * 3 - 1 * 1) / math.sqrt(4 * 4 * 4 * 4))
    assert matthews([1, None], [1, 0]) == 0  # None is 1 here, so every prediction is 1


def test_pearson_of_four_points():
    assert pearson([1, 2, 3, 4], [1, 3, 2, 4]) == pytest.approx(0.8)
    assert pearson([0.0, 1.0], [5, 3]) == pytest.approx(-1)


def test_spearman_averages_tied_ranks():
    # ranks 1, 2.5, 2.5, 4 and 1, 2, 3, 4: deviations' products 4.5, squares 4.5 and 5
    assert spearman([1, 2, 2, 40], [1, 2, 3, 4]) == pytest.approx(4.5 / math.sqrt(4.5 * 5))


@pytest.mark.parametrize("correlation", [pearson, spearman])
def test_an_undefined_correlation_is_zero(correlation):
    assert correlation([0.1, 0.1, 0.1], [1, 2, 3]) == 0
    assert correlation([1.0], [2.0]) == 0
    assert correlation([float("nan"), 1.0], [2.0, 3.0]) == 0


def test_glue_score_of_cola_is_matthews_in_percent():
    assert glue_score("cola", [1, 0, 1, 0], [1, 0, 0, 0]) == pytest.approx(
        {"matthews": 100 / math.sqrt(3), "score": 100 / math.sqrt(3), "invalid": 0, "undefined": 0})


def test_glue_score_of_mrpc_and_qqp_is_the_mean_of_accuracy_and_f1():
    for task in ("mrpc", "qqp"):
        assert glue_score(task, [1, 1, None], [1, 0, 1]) == pytest.approx(
            {"accuracy": 100 / 3, "f1": 50, "score": 250 / 6, "invalid": 1, "undefined": 0})


def test_glue_score_of_the_others_is_accuracy():
    for task in ("sst2", "qnli", "rte", "mnli"):
        assert glue_score(task, [1, 0, None, None], [1, 0, 0, 1]) == {"accuracy": 50, "score": 50, "invalid": 2, "undefined": 0}
    assert glue_score("mnli", [2, None, 0], [2, 2, 1])["accuracy"] == pytest.approx(100 / 3)


def test_glue_score_of_stsb_takes_an_invalid_answer_for_minus_one():
    result = glue_score("stsb", [None, 2.0, 5.0], [0.0, 1.0, 5.0])
    assert result["pearson"] == pytest.approx(100 * pearson([-1, 2, 5], [0, 1, 5])) != 100 * pearson([0, 2, 5], [0, 1, 5])
    assert result["spearman"] == pytest.approx(100) and result["invalid"] == 1
    assert result["score"] == pytest.approx((result["pearson"] + result["spearman"]) / 2)


def test_undefined_correlations_are_reported():
    assert glue_score("stsb", [None, None], [1.0, 2.0]) == {"pearson": 0, "spearman": 0, "score": 0, "invalid": 2, "undefined": 2}
    assert glue_score("cola", [1, 1, 1], [1, 0, 1])["undefined"] == 1
    assert glue_score("sst2", [1, 1, 1], [1, 0, 1])["undefined"] == 0


def test_what_cannot_be_scored_is_said():
    with pytest.raises(ValueError, match="2 and 1"):
        accuracy([1], [1, 0])
    with pytest.raises(ValueError, match="got 0 and 0"):
        pearson([], [])
    with pytest.raises(ValueError, match="0 and 1"):
        f1([2, 1], [1, 1])
    with pytest.raises(ValueError, match="cola, sst2"):
        glue_score("wnli", [1], [1])


# ---- VQA ------------------------------------------------------------------------------------------------------------------------

# (answer, the ten answers, accuracy); computed by VQAEval of salesforce-lavis 1.0.2, a copy of the official evaluation code
VQA_CASES = [
    ("Two cats!", ["2 cats"] * 3 + ["cats"] * 7, 0.9),
    ("dont know", ["don't know"] * 2 + ["unknown"] * 8, 0.6),
    ("no\tone", ["no 1"] + ["nobody"] * 9, 0.3),
    ("1,000, or so", ["1000 or so"] * 4 + ["many"] * 6, 1.0),
    ("p.m. ", ["p.m."] * 3 + ["am"] * 7, 0.9),
    ("red/blue", ["red-blue"] * 3 + ["red and blue"] * 7, 0.9),
    ("red, blue-green", ["red bluegreen"] * 2 + ["red blue green"] * 8, 1.0),
    ("The cat", ["the cat"] * 10, 0.0),  # no article is dropped from the ten
    ("two", ["two"] * 9 + ["2"], 0.3),  # nor a number word changed
    ("yes", ["yes."] * 9 + ["no"], 1.0),
    ("yes", ["yes."] * 10, 0.0),  # all equal: they stay as they are
    ("cat , dog", ["cat , dog"] * 8 + ["cat dog"] * 2, 0.6),  # the comma leaves two spaces in the ten
    ("Im", ["im"] * 3 + ["i'm"] * 7, 0.9),  # the official table spells Im, after everything is lower case
    ("somebody'd", ["somebodyd"] * 3 + ["nobody"] * 7, 0.9),
    ("x" + "." * 33, ["x" + "." * 33] * 3 + ["x"] * 7, 0.9),  # only 32 periods go
]


@pytest.mark.parametrize("answer, ten_answers, expected", VQA_CASES)
def test_vqa_accuracy_equals_the_official_code(answer, ten_answers, expected):
    assert vqa_accuracy(answer, ten_answers) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("matches, expected", [(0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (10, 1)])
def test_vqa_accuracy_leaves_each_annotator_out(matches, expected):
    # 3 matches: the three who gave the answer leave 2 / 3 each, the other seven leave 1 each, so (3 * 2 / 3 + 7) / 10
    assert vqa_accuracy("cat", ["cat"] * matches + ["dog"] * (10 - matches)) == pytest.approx(expected, abs=1e-12)
    assert vqa_soft_labels({"cat": matches}) == {"cat": pytest.approx(expected, abs=1e-12)}


def test_an_answer_is_normalised_as_in_the_official_code():
    for answer, expected in {
        "Yes.": "yes", "1,000": "1000", "U.S.A.": "usa", "3.5": "3.5", ".5": ".5", "10:30": "10:30", "p.m.": "pm", "none": "0", "Ten": "10",
        "red/blue": "red blue", "no-one": "no 1", "the  Cat!": "cat", " a\nman ": "man", "an A": "",
        "1,000 red/blue": "1000 redblue", "couldnt": "couldn't", "couldnt've": "couldn't've", "couldntve": "couldntve", "ill": "ill",
        "yall'd've": "y'all'd've", "man's": "man's", "$5 & 50%": "$5 & 50%",
        # a slash that touches a space anywhere, in the text as it came, goes everywhere
        "red/ blue/green": "red bluegreen", "red /blue/green": "red bluegreen", "red\n/blue/green": "red bluegreen",
        "red\t/blue/green": "red bluegreen", " /blue/green": "blue green", "red/-blue-green": "red blue green",
    }.items():
        assert normalize_answer(answer) == expected
    assert len(CONTRACTIONS) == 114  # of the 120 official entries 4 have a capital and are never reached, 2 change nothing


def official_vqa():
    """The class VQAEval of the file in lavis, which needs no other part of that package."""
    package = importlib.util.find_spec("lavis")
    if package is None:
        pytest.skip("lavis is not installed")
    spec = importlib.util.spec_from_file_location("vqa_eval", f"{package.submodule_search_locations[0]}/common/vqa_tools/vqa_eval.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.VQAEval


class Answers:
    """As much of the dataset class as VQAEval reads."""

    def __init__(self, qa):
        self.qa, self.getQuesIds = qa, lambda: list(qa)


@pytest.mark.filterwarnings("ignore")  # the official file has escapes that Python is about to refuse
def test_vqa_accuracy_equals_the_official_code_on_random_answers():
    VQAEval = official_vqa()
    table = {short: full for short, full in VQAEval().contractions.items() if short != full and short == short.lower()}
    assert CONTRACTIONS == table

    rng = random.Random(0)
    tricky = "the a An none one Two 1,000 3.5 5. U.S. 10:30 red/blue no-one cat CAT dog's \n \t".split(" ")
    words = [*VQAEval().contractions, *VQAEval().punct, *tricky]

    def phrase():
        return rng.choice(["", " ", " ", ", ", "-"]).join(rng.choices(words, k=rng.randint(1, 4)))
    cases = []
    for _ in range(2000):
        answer = phrase()
        given = rng.sample([answer, normalize_answer(answer), answer.lower(), answer + ".", phrase()], k=rng.randint(1, 3))
        cases.append((answer, rng.choices(given, k=10)))

    truth = {i: {"answers": [{"answer": a, "answer_id": k} for k, a in enumerate(ten)], "question_type": "", "answer_type": ""}
             for i, (_, ten) in enumerate(cases)}
    official = VQAEval(Answers(truth), Answers({i: {"answer": answer} for i, (answer, _) in enumerate(cases)}), n=12)
    with contextlib.redirect_stdout(io.StringIO()):
        official.evaluate()
    scores = [vqa_accuracy(answer, ten) for answer, ten in cases]
    assert len({round(score, 1) for score in scores}) == 5  # every score that ten answers can give
    assert scores == pytest.approx([official.evalQA[i] / 100 for i in range(len(cases))], abs=1e-12)


# ---- captions -------------------------------------------------------------------------------------------------------------------

HYPOTHESES = ["A man's dog runs along the beach.", "Two people are riding horses", "a plate of food and a cup of coffee on a table",
              "A red bus on the street & a bicycle"]
REFERENCES = [
    ["A brown dog is running on the beach.", "The dog runs along the beach near the water", "A man's dog doesn't stop at the sea."],
    ["Two people riding horses on a trail.", "A couple of riders; two horses.", "Two people are riding brown horses"],
    ["A plate of eggs next to a cup of coffee.", "Breakfast on a table: coffee, eggs and toast"],
    ["A red double-decker bus drives down the street.", "A bus and a bicycle on a wet street", "The red bus (No. 15) on the street!"],
]


def test_captions_score_as_in_the_coco_evaluation():
    # computed by pycocoevalcap 1.2, its Java tokenizer included
    assert cider_d(HYPOTHESES, REFERENCES) == pytest.approx(2.8336725678422514, abs=1e-12)
    assert bleu(HYPOTHESES, REFERENCES) == pytest.approx([0.9117647058555364, 0.8360739248411454, 0.6858551731516028, 0.5203686747111457])


def test_captions_score_as_in_the_coco_evaluation_on_random_captions():
    Cider = pytest.importorskip("pycocoevalcap.cider.cider").Cider
    Bleu = pytest.importorskip("pycocoevalcap.bleu.bleu").Bleu
    rng = random.Random(0)
    words = "a a the man's dog doesn't t-shirt & red 3.5 horse, on in riding".split()

    def caption(shortest):
        return " ".join(rng.choices(words, k=rng.randint(shortest, 12)))

    for images in [1, 2, 3, 5, 10, 20] * 5:
        references = [[caption(1) for _ in range(rng.randint(1, 5))] for _ in range(images)]
        hypotheses = [rng.choice([caption(0), rng.choice(captions)]) for captions in references]
        truth = {i: [" ".join(tokenize_caption(c)) for c in captions] for i, captions in enumerate(references)}
        given = {i: [" ".join(tokenize_caption(c))] for i, c in enumerate(hypotheses)}
        assert cider_d(hypotheses, references) == pytest.approx(Cider().compute_score(truth, given)[0], abs=1e-12)
        assert bleu(hypotheses, references) == pytest.approx(Bleu(4).compute_score(truth, given, verbose=0)[0], abs=1e-12)


def test_cider_d_is_the_clipped_cosine_times_ten():
    # two images, so each n-gram has idf log 2 and the cosines are those of the counts: 1, 1 (bigram), 0, 0 and 1/2, 0, 0, 0
    assert cider_d(["red cat", "red dog"], [["red cat"], ["blue dog"]]) == pytest.approx(10 * (2 / 4 + 0.5 / 4) / 2)
    # repeated words are clipped (2 * 1 over sqrt(8) * sqrt(2); 1 over sqrt(5)), and two more words cost exp(-2^2 / 72)
    repeated = (1 / 2 + 1 / math.sqrt(5)) / 4 * math.exp(-4 / 72)
    assert cider_d(["red cat red cat", ""], [["red cat"], ["blue dog"]]) == pytest.approx(10 * repeated / 2)


def test_cider_d_gives_nothing_for_words_that_every_image_has():
    assert cider_d(["a dog", "a"], [["a cat"], ["a bird", "a tree"]]) == 0
    assert cider_d(["a dog"], [["a dog"]]) == 0  # one image: every word is in every image


def test_cider_d_of_a_perfect_caption_is_ten():
    assert cider_d(["a cat sits there", "two dogs run fast"], [["a cat sits there"], ["two dogs run fast"]]) == pytest.approx(10)


def test_bleu_counts_a_word_as_often_as_a_reference_has_it():
    assert bleu(["red red red red"], [["red dog on red", "a red dog"]])[0] == pytest.approx(2 / 4)


def test_bleu_compares_with_the_closest_reference_length():
    assert bleu(["a cat"], [["a cat sits here"]])[:2] == pytest.approx([math.exp(1 - 4 / 2)] * 2)
    assert bleu(["a cat sits"], [["a cat sits here", "a cat"]])[:3] == pytest.approx([1] * 3)  # 2 and 4 words are as close: the shorter
    assert bleu(["a cat sits"], [["a", "a cat sits here"]])[0] == pytest.approx(math.exp(1 - 4 / 3))
    assert bleu(["a cat", "dog runs"], [["a cat", "a cat sits here"], ["dog runs off"]])[0] == pytest.approx(math.exp(1 - 5 / 4))


def test_a_caption_is_split_like_the_penn_treebank():
    for caption, words in {  # all as the Java tokenizer of pycocoevalcap 1.2, which writes -lrb- for (
        "A man's dog isn't here, can't you see?": "a man 's dog is n't here ca n't you see",
        "It’s 10:30 a.m. in the U.S.A. today.": "it 's 10:30 a.m. in the u.s.a. today",
        "Two t-shirts (red & white), $3.50 or 50% of 1,000": "two t-shirts ( red & white ) $ 3.50 or 50 % of 1,000",
        "the dogs' bowls -- it's mid-day; 5-year-old O'Brien": "the dogs bowls it 's mid-day 5-year-old o'brien",
        'a "STOP" sign \'hello\' and/or cat,dog ok:yes 5ft.': "a stop sign hello and/or cat dog ok yes 5ft",
    }.items():
        assert tokenize_caption(caption) == words.split()


def test_what_has_no_vision_and_language_score_is_said():
    with pytest.raises(ValueError, match="ten annotators; got 3"):
        vqa_accuracy("yes", ["yes", "no", "yes"])
    for score in (cider_d, bleu):
        with pytest.raises(ValueError, match="got 1 and 2"):
            score(["a cat", "a dog"], [["a cat"]])
        with pytest.raises(ValueError, match="got 0 and 0"):
            score([], [])
        with pytest.raises(ValueError, match=r"got \[\] for image 1"):
            score(["a cat", "a dog"], [["a cat"], []])
        with pytest.raises(ValueError, match="'a cat' for image 0"):
            score(["a cat"], ["a cat"])
