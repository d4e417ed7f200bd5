"""Find which labels are confused, and how far a model's probabilities can be trusted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from .inputs import as_labels, as_predictions, check_same_length
from .scores import confusion_matrix, probabilities


def confusions(
    logits: np.ndarray,
    labels: Sequence[int] | np.ndarray,
    names: Sequence[str],
    texts: Sequence[str],
    most: int = 10,
    *,
    examples: int = 3,
) -> list[dict[str, Any]]:
    """List the pairs of labels that are most often confused, with example texts.

    Args:
        logits: `[rows, classes]`, or predicted classes `[rows]` (then examples have no confidence).
        labels: True classes `[rows]`.
        names: Label of each class.
        texts: The texts `[rows]`.
        most: The most pairs to list.
        examples: Number of texts per pair: those with the highest confidence.

    Returns:
        Rows `{"true", "predicted", "count", "share" (of the true label's rows), "examples": [{"text",
        "confidence"}]}`, the most frequent first.
    """
    predictions, truth = as_predictions(logits), as_labels(labels)
    matrix = confusion_matrix(logits, labels, len(names))
    support = matrix.sum(axis=1)
    sure = probabilities(logits).max(axis=1) if np.ndim(logits) == 2 else None
    np.fill_diagonal(matrix, 0)
    order = np.argsort(-matrix, axis=None, kind="stable")[:most]
    rows = []
    for place in order:
        true, guess = divmod(int(place), len(names))
        count = int(matrix[true, guess])
        if count == 0:
            break
        found = np.flatnonzero((truth == true) & (predictions == guess))
        if sure is not None:
            found = found[np.argsort(-sure[found], kind="stable")]
        rows.append(
            {
                "true": names[true],
                "predicted": names[guess],
                "count": count,
                "share": count / int(support[true]),
                "examples": [
                    {"text": texts[i], **({} if sure is None else {"confidence": float(sure[i])})}
                    for i in found[:examples]
                ],
            }
        )
    return rows


def calibration(logits: np.ndarray, labels: Sequence[int] | np.ndarray, bins: int = 10) -> dict[str, Any]:
    """Compare how sure a classifier is with how often it is right.

    Args:
        logits: `[rows, classes]`.
        labels: True classes `[rows]`.
        bins: Bins of equal width between 0 and 1.

    Returns:
        `ece`: the expected calibration error, the mean over rows of their bin's |accuracy - confidence| (Guo
        et al., On Calibration of Modern Neural Networks, arXiv 1706.04599, equation 3); `confidence`: the mean;
        `accuracy`; and `rows`: one per bin, with `low`, `high`, `count`, `confidence`, `accuracy` (None if empty).
    """
    shares, truth = probabilities(logits), as_labels(labels)
    check_same_length(shares, truth)
    sure, right = shares.max(axis=1), shares.argmax(axis=1) == truth
    place = np.clip(np.ceil(sure * bins).astype(int) - 1, 0, bins - 1)  # bins are (low, high], as in the paper
    rows, ece = [], 0.0
    for i in range(bins):
        inside = place == i
        count = int(inside.sum())
        confidence = float(sure[inside].mean()) if count else None
        accuracy = float(right[inside].mean()) if count else None
        if confidence is not None and accuracy is not None:
            ece += count / len(truth) * abs(accuracy - confidence)
        rows.append(
            {"low": i / bins, "high": (i + 1) / bins, "count": count, "confidence": confidence, "accuracy": accuracy}
        )
    return {"ece": ece, "confidence": float(sure.mean()), "accuracy": float(right.mean()), "rows": rows}
