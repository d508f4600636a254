"""GLUE's scores in numpy (Sec. 4): f(predictions, labels) -> float, not times 100.

A prediction of None, text that is no answer of the task, is wrong. Undefined correlations are 0.
"""
import numpy as np


def accuracy(predictions: list, labels: list) -> float:
    """Return the share of predictions that equal their label. Labels may be of any type."""
    assert len(predictions) == len(labels) > 0, (len(predictions), len(labels))
    return float(np.mean([p is not None and p == l for p, l in zip(predictions, labels)]))


def f1(predictions: list[int | None], labels: list[int]) -> float:
    """Return F1 of class 1 for the labels 0 and 1; 0 where neither side has a 1."""
    p, l = _binary(predictions, labels)
    return float(2 * (p * l).sum() / max(1, p.sum() + l.sum()))  # 2 TP / (2 TP + FP + FN)


def matthews(predictions: list[int | None], labels: list[int]) -> float:
    """Return the Matthews correlation of the labels 0 and 1: Pearson's of the two vectors."""
    return pearson(*_binary(predictions, labels))


def pearson(predictions: list[float], labels: list[float]) -> float:
    if _undefined(predictions, labels):
        return 0.0
    x, y = (np.asarray(v) / np.abs(v).max() for v in (predictions, labels))  # no square overflows
    return float(np.corrcoef(x, y)[0, 1])


def spearman(predictions: list[float], labels: list[float]) -> float:
    """Return Pearson's correlation of the ranks. Tied values share the mean of their ranks."""
    undefined = _undefined(predictions, labels)
    return 0.0 if undefined else pearson(_ranks(predictions), _ranks(labels))


def _ranks(values: list[float]) -> np.ndarray:
    _, group, counts = np.unique(np.asarray(values), return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[group]  # from 1; a group ends at the running sum


GLUE_METRICS = {  # the score of a task is the mean of its metrics
    "cola": (matthews,), "sst2": (accuracy,), "mrpc": (accuracy, f1), "qqp": (accuracy, f1),
    "mnli": (accuracy,), "qnli": (accuracy,), "rte": (accuracy,), "stsb": (pearson, spearman),
}


def glue_score(task: str, predictions: list, labels: list) -> dict[str, float | int]:
    """Return the task's metrics by name and their mean as "score", all in percent.

    "invalid" counts the predictions of None (-1 for STS-B), "undefined" the correlations set to 0.
    """
    wrong = [-1.0 if task == "stsb" else 1 - label for label in labels]
    filled = [w if p is None else p for p, w in zip(predictions, wrong)]
    result = {metric.__name__: 100 * metric(filled, labels) for metric in GLUE_METRICS[task]}
    count = len({"matthews", "pearson", "spearman"} & result.keys())
    return {**result, "score": float(np.mean(list(result.values()))),
            "invalid": predictions.count(None), "undefined": count * _undefined(filled, labels)}


def _undefined(predictions: list[float], labels: list[float]) -> bool:
    assert len(predictions) == len(labels) > 0, (len(predictions), len(labels))
    return not (0 < np.ptp(predictions) < np.inf and 0 < np.ptp(labels) < np.inf)


def _binary(predictions: list, labels: list) -> tuple[np.ndarray, np.ndarray]:
    p = np.asarray([1 - l if p is None else p for p, l in zip(predictions, labels, strict=True)])
    assert np.isin([p, labels], (0, 1)).all(), "F1 and Matthews correlation: labels 0 and 1 only"
    return p, np.asarray(labels)
