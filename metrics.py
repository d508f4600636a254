"""The scores of the paper, in numpy. Each metric is f(predictions, labels) -> float, not times 100.

A prediction of None is an invalid generation, text that is no answer of the task: it counts as wrong (correlations take numbers only).
A correlation that is not defined, because one side is constant or not finite, is 0. `glue_score` reports how often each happened.
"""

from collections.abc import Sequence

import numpy as np


def accuracy(predictions: Sequence, labels: Sequence) -> float:
    """Share of predictions that equal their label; labels may be of any type."""
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
