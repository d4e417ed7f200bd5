"""Scores of one set of predictions: accuracy, F1, cross-entropy, with bootstrap intervals."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from typing import Any

import datasets
import evaluate as hf_evaluate
import numpy as np
import scipy.special
import sklearn.metrics

from ..errors import KitError
from .inputs import as_labels, as_logits, as_predictions, check_same_length
from .resampling import RESAMPLES, counts_of_cells, draws, interval, scores_of_cells, unseen, widened

METRICS = ("accuracy", "f1_macro", "f1_weighted", "loss")


class KitMetrics(hf_evaluate.Metric):
    """Accuracy, macro and weighted F1 as one `evaluate.Metric`, computed by scikit-learn.

    `evaluate.load("f1")` fetches a script from the hub when it runs, and fails without the hub. This class does the
    same without the hub and without a cache file.
    """

    def __init__(self, **kwargs: Any) -> None:
        # The base class makes a folder although nothing is written: keep it out of the home, which may be read-only.
        super().__init__(**{"keep_in_memory": True, "cache_dir": tempfile.gettempdir(), **kwargs})

    def _info(self) -> hf_evaluate.MetricInfo:
        return hf_evaluate.MetricInfo(
            description="Accuracy, macro F1 and weighted F1 of a single-label classification.",
            citation="Pedregosa et al.: Scikit-learn: Machine Learning in Python, JMLR 12, 2011",
            inputs_description="predictions and references: a class, as a whole number, each row",
            features=datasets.Features({"predictions": datasets.Value("int64"), "references": datasets.Value("int64")}),
        )

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        macro, weighted = (
            float(sklearn.metrics.f1_score(references, predictions, average=average, zero_division=0))
            for average in ("macro", "weighted")
        )
        accuracy = float(sklearn.metrics.accuracy_score(references, predictions))
        return {"accuracy": accuracy, "f1_macro": macro, "f1_weighted": weighted}


def compute_metrics(logits: np.ndarray, labels: Sequence[int] | np.ndarray) -> dict[str, float]:
    """Score predictions without intervals, as the Trainer does after each epoch.

    Args:
        logits: `[rows, classes]`, or predicted classes `[rows]`.
        labels: True classes `[rows]`.

    Returns:
        `accuracy`, `f1_macro`, `f1_weighted`; F1 over the classes that occur among labels or predictions.
    """
    predictions, truth = as_predictions(logits), as_labels(labels)
    check_same_length(predictions, truth)
    result = KitMetrics().compute(predictions=predictions, references=truth)
    assert result is not None  # None is for helper processes of a distributed metric
    return dict(result)


def metrics(
    logits: np.ndarray, labels: Sequence[int] | np.ndarray, *, resamples: int = RESAMPLES, seed: int = 0
) -> dict[str, dict[str, float]]:
    """Score predictions, with 95% bootstrap intervals.

    Args:
        logits: `[rows, classes]`, or predicted classes `[rows]` (then there is no loss).
        labels: True classes `[rows]`.
        resamples: How often the rows are drawn, with replacement.
        seed: Seed of the drawing.

    Returns:
        `accuracy`, `f1_macro`, `f1_weighted` and `loss` (mean cross-entropy, nats), each `{"value", "low",
        "high"}`: the percentile interval (Efron and Tibshirani, An Introduction to the Bootstrap, chapter 13). With
        only a few rows per class, resampled macro F1 tends to lie below the value, and so does its interval. Where all
        rows are right, or all are wrong, no resample differs from another: then the exact limits are taken (see
        `resampling.unseen`). A loss has no such limits; that of a single row has an interval of no width.

        Both F1 are scikit-learn's: the mean over the labels that occur among the true or the predicted ones. A label
        that does neither is left out, and one that is only predicted counts as 0.
    """
    predictions, truth = as_predictions(logits), as_labels(labels)
    check_same_length(predictions, truth)
    losses = cross_entropy(logits, truth) if np.ndim(logits) == 2 else None
    cells, cell_of_row = np.unique(np.stack([truth, predictions]), axis=1, return_inverse=True)
    drawn: dict[str, list[np.ndarray]] = {name: [] for name in METRICS}
    for rows in draws(len(truth), resamples, seed):
        scores = scores_of_cells(counts_of_cells(cell_of_row.ravel()[rows], cells.shape[1]), cells[0], cells[1])
        for name, drawn_scores in scores.items():
            drawn[name].append(drawn_scores)
        if losses is not None:
            drawn["loss"].append(losses[rows].mean(axis=1))
    once = np.bincount(cell_of_row.ravel(), minlength=cells.shape[1])[None]
    values = {name: float(v[0]) for name, v in scores_of_cells(once, cells[0], cells[1]).items()}
    if losses is not None:
        values["loss"] = float(losses.mean())
    found = {name: interval(value, np.concatenate(drawn[name])) for name, value in values.items()}
    if values["accuracy"] in (0, 1):
        found |= {name: widened(found[name], share, lowest=0) for name, share in unseen(truth).items()}
    return found


def cross_entropy(logits: np.ndarray, labels: Sequence[int] | np.ndarray) -> np.ndarray:
    """Return each row's cross-entropy in nats, float64 `[rows]`, from logits `[rows, classes]`.

    Raises:
        KitError: For a label that has no logit.
    """
    scores, truth = as_logits(logits), as_labels(labels)
    if len(truth) and truth.max() >= scores.shape[1]:
        raise KitError(f"label {truth.max()} has no logit: there are {scores.shape[1]} classes")
    peak = scores.max(axis=1, keepdims=True)
    total = np.log(np.exp(scores - peak).sum(axis=1)) + peak[:, 0]
    losses: np.ndarray = total - scores[np.arange(len(truth)), truth]
    return losses


def probabilities(logits: np.ndarray) -> np.ndarray:
    """Return the softmax of logits `[rows, classes]` in float64."""
    shares: np.ndarray = scipy.special.softmax(as_logits(logits), axis=1)
    return shares


def per_label(logits: np.ndarray, labels: Sequence[int] | np.ndarray, names: Sequence[str]) -> list[dict[str, Any]]:
    """Score each label on its own.

    Args:
        logits: `[rows, classes]`, or predicted classes `[rows]`.
        labels: True classes `[rows]`.
        names: Label of each class.

    Returns:
        One row per label, in the order of `names`: `label`, `support` (rows with this true label), `predicted` (rows
        predicted as it), `precision`, `recall`, `f1`. A label that no row has was not tested: its `recall` is None,
        and if it was never predicted either, so are `precision` and `f1`. The mean of the `f1` that are no None is
        macro F1. Any other score whose divisor is 0 is 0.
    """
    predicted = confusion_matrix(logits, labels, len(names)).sum(axis=0)
    scores = sklearn.metrics.precision_recall_fscore_support(
        as_labels(labels), as_predictions(logits), labels=range(len(names)), zero_division=0
    )
    return [
        {
            "label": name,
            "support": int(support),
            "predicted": int(taken),
            "precision": float(precision) if support or taken else None,
            "recall": float(recall) if support else None,
            "f1": float(f1) if support or taken else None,
        }
        for name, taken, precision, recall, f1, support in zip(names, predicted, *scores, strict=True)
    ]


def confusion_matrix(logits: np.ndarray, labels: Sequence[int] | np.ndarray, classes: int) -> np.ndarray:
    """Count rows by true class (first axis) and predicted class (second): int64 `[classes, classes]`.

    Raises:
        KitError: For a class below 0 or not below `classes`, or more or fewer predictions than labels.
    """
    predictions, truth = as_predictions(logits), as_labels(labels)
    check_same_length(predictions, truth)
    lowest, highest = min(truth.min(), predictions.min()), max(truth.max(), predictions.max())
    if lowest < 0 or highest >= classes:
        raise KitError(f"class {lowest if lowest < 0 else highest} has no name: there are {classes}")
    matrix: np.ndarray = sklearn.metrics.confusion_matrix(truth, predictions, labels=range(classes))
    return matrix
