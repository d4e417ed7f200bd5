"""Check labels, predicted classes and logits, and return them as arrays."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..errors import KitError, described


def as_labels(labels: Any) -> np.ndarray:
    """Return true classes as int64 `[rows]`."""
    truth = _numbers("labels", labels, np.int64)
    if truth.ndim != 1 or not len(truth):
        raise KitError(f"labels are one class a row and at least one row, not of shape {list(truth.shape)}")
    return truth


def as_predictions(thing: Any) -> np.ndarray:
    """Return predicted classes from logits `[rows, classes]` or from classes `[rows]`."""
    if np.ndim(thing) == 2:
        return as_logits(thing).argmax(axis=1)
    classes = _numbers("predicted classes", thing, np.int64)
    if classes.ndim != 1:
        raise KitError(f"predictions are [rows, classes] or one class a row, not of shape {list(classes.shape)}")
    return classes


def as_logits(logits: Any) -> np.ndarray:
    """Return logits as float64 `[rows, classes]`; refuse values that are not finite."""
    scores = _numbers("logits", logits, np.float64)
    if scores.ndim != 2:
        raise KitError(f"logits are [rows, classes], not of shape {list(scores.shape)}")
    if not np.isfinite(scores).all():
        row = int(np.flatnonzero(~np.isfinite(scores).all(axis=1))[0])
        raise KitError(f"the logits of row {row} are not finite: the model has diverged, or its weights are damaged")
    return scores


def check_same_length(predictions: np.ndarray, truth: np.ndarray) -> None:
    """Refuse predictions with more or fewer rows than there are labels."""
    if len(predictions) != len(truth):
        raise KitError(f"{len(predictions)} predictions for {len(truth)} labels")


def _numbers(what: str, thing: Any, dtype: Any) -> np.ndarray:
    """Return an array of numbers; refuse numbers of another kind, such as 0.5 for a class, and never round."""
    try:
        given = np.asarray(thing)
        array: np.ndarray = given.astype(dtype)
        if np.issubdtype(dtype, np.integer) and not (array == given).all():
            raise ValueError("they are no whole numbers")
    except (TypeError, ValueError, OverflowError) as error:
        raise KitError(f"{what} are numbers, not {described(thing)}: {' '.join(str(error).split())}") from error
    return array
