"""Compare a run with its merged model on the same rows: scores, labels, and how far probabilities move."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..metrics.differences import paired_difference
from ..metrics.scores import metrics, probabilities


def compared(before: np.ndarray, after: np.ndarray, labels: Sequence[int] | np.ndarray) -> dict[str, Any]:
    """Compare a run's logits on some rows with its merged model's.

    Args:
        before: The run's logits `[rows, classes]`.
        after: The merged model's `[rows, classes]`.
        labels: True classes `[rows]`.

    Returns:
        `rows`; `before` and `after` (the scores of both, with 95% intervals); `difference` (of macro F1, after minus
        before, on the same rows, with its interval); `same_label` (share of the rows); `largest_difference` (of any
        label's probability on any row, 0 to 1); `limit` (see `moved_across`).
    """
    truth = np.asarray(labels)
    shares = [probabilities(side) for side in (before, after)]
    return {
        "rows": len(truth),
        "before": metrics(before, truth),
        "after": metrics(after, truth),
        "difference": paired_difference(after, before, truth),
        "same_label": float((before.argmax(axis=1) == after.argmax(axis=1)).mean()),
        "largest_difference": float(np.abs(shares[0] - shares[1]).max()),
        "limit": moved_across(shares[0].max(axis=1), shares[1].max(axis=1)),
    }


def moved_across(before: np.ndarray, after: np.ndarray) -> dict[str, float | None]:
    """Return for which limit of `reject_below` most rows change sides, and how many.

    A limit that was chosen on a run rejects other rows of its merged model. Whatever the limit is, no more than this
    share of the rows is rejected on one side only.

    Args:
        before: The most probable label's probability by the run, `[rows]`.
        after: The same by the merged model.

    Returns:
        `share` of the rows, 0 to 1, and the limit `at` which it is reached; None where no row changes sides.
    """
    low, high = np.sort(np.minimum(before, after)), np.sort(np.maximum(before, after))
    # A row is rejected on one side only where low < limit <= high; the count is largest at one of the upper ends.
    counts = np.searchsorted(low, high, side="left") - np.searchsorted(high, high, side="left")
    most = int(counts.argmax())
    share = float(counts[most] / len(high))
    return {"share": share, "at": float(high[most]) if share else None}
