"""GLUE's scores (Sec. 4), against values computed by hand and once with scipy and scikit-learn."""
import math

import pytest

from run.metrics import accuracy, f1, glue_score, matthews, pearson, spearman


def test_accuracy_counts_an_invalid_prediction_as_wrong():
    assert accuracy([1, 0, None, 2], [1, 1, 0, 2]) == 0.5
    assert accuracy(["a dog", "A dog"], ["a dog", "a dog"]) == 0.5  # GQA compares them as they are


def test_f1_takes_an_invalid_prediction_for_the_wrong_class():
    # with None read as 0 and 1: 2 true positives, 2 false positives, 1 false negative
    assert f1([1, 1, 1, None, None], [1, 1, 0, 1, 0]) == pytest.approx(4 / 7)
    assert f1([0, 0], [0, 0]) == 0


def test_matthews_equals_the_formula_of_the_four_counts():
    predictions, labels = [1, 1, 1, 0, 0, 0, 0, 1], [1, 1, 1, 1, 0, 0, 0, 0]  # TP FN TN FP 3 1 3 1
    assert matthews(predictions, labels) == pytest.approx((3 * 3 - 1 * 1) / math.sqrt(4**4))
    assert matthews([1, None], [1, 0]) == 0  # None is 1 here, so every prediction is 1


def test_pearson_of_four_points():
    assert pearson([1, 2, 3, 4], [1, 3, 2, 4]) == pytest.approx(0.8)
    assert pearson([0.0, 1.0], [5, 3]) == pytest.approx(-1) == pearson([0.0, 1e200], [5, 3])


def test_spearman_averages_tied_ranks():
    # ranks 1, 2.5, 2.5, 4 and 1, 2, 3, 4: deviations' products 4.5, squares 4.5 and 5
    assert spearman([1, 2, 2, 40], [1, 2, 3, 4]) == pytest.approx(4.5 / math.sqrt(4.5 * 5))


@pytest.mark.parametrize("correlation", [pearson, spearman])
def test_an_undefined_correlation_is_zero(correlation):
    assert correlation([0.1, 0.1, 0.1], [1, 2, 3]) == 0
    assert correlation([1.0], [2.0]) == 0
    assert correlation([float("nan"), 1.0], [2.0, 3.0]) == 0


PERCENT = 100 / 3


@pytest.mark.parametrize("tasks, predictions, labels, metrics, invalid", [
    ("cola", [1, 0, 1, 0], [1, 0, 0, 0], {"matthews": 100 / math.sqrt(3)}, 0),
    ("mrpc qqp", [1, 1, None], [1, 0, 1], {"accuracy": PERCENT, "f1": 50}, 1),
    ("sst2 qnli rte mnli", [1, 0, None, None], [1, 0, 0, 1], {"accuracy": 50}, 2),
    ("mnli", [2, None, 0], [2, 2, 1], {"accuracy": PERCENT}, 1),
])
def test_a_tasks_score_is_the_mean_of_its_metrics(tasks, predictions, labels, metrics, invalid):
    expected = {**metrics, "score": sum(metrics.values()) / len(metrics),
                "invalid": invalid, "undefined": 0}
    for task in tasks.split():
        assert glue_score(task, predictions, labels) == pytest.approx(expected)


def test_stsb_takes_an_invalid_answer_for_minus_one():
    result = glue_score("stsb", [None, 2.0, 5.0], [0.0, 1.0, 5.0])
    assert result["pearson"] == pytest.approx(100 * pearson([-1, 2, 5], [0, 1, 5]))
    assert result["pearson"] != 100 * pearson([0, 2, 5], [0, 1, 5])
    assert result["spearman"] == pytest.approx(100) and result["invalid"] == 1
    assert result["score"] == pytest.approx((result["pearson"] + result["spearman"]) / 2)


def test_undefined_correlations_are_reported():
    zeros = {"pearson": 0, "spearman": 0, "score": 0}
    assert glue_score("stsb", [None] * 2, [1.0, 2.0]) == zeros | {"invalid": 2, "undefined": 2}
    assert glue_score("cola", [1, 1, 1], [1, 0, 1])["undefined"] == 1
    assert glue_score("sst2", [1, 1, 1], [1, 0, 1])["undefined"] == 0


def test_what_cannot_be_scored_is_no_score():
    for metric, predictions, labels in ((accuracy, [1], [1, 0]), (pearson, [], [])):
        with pytest.raises(AssertionError, match=f"{len(predictions)}, {len(labels)}"):
            metric(predictions, labels)
    with pytest.raises(AssertionError, match="0 and 1"):
        f1([2, 1], [1, 1])
