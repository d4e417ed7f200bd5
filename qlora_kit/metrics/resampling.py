"""The bootstrap: draw rows many times, and score many resamples at once.

Rows with the same label and predictions are one cell. A resample is stored as how often each cell was drawn: a few
hundred cells stand for thousands of rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import scipy.sparse

RESAMPLES = 2000
MOST_RESAMPLES = 10_000_000  # for `differences_over_rows_and_seeds`, which stops much earlier on a usual test set
BLOCK = 4096  # resamples scored together
DRAWN = 1_000_000  # row numbers drawn at a time, to bound memory
TAIL = 0.025  # what a 95% interval leaves out at each end


def draws(rows: int, resamples: int, seed: int) -> Iterator[np.ndarray]:
    """Yield drawn row indices `[some, rows]`: `resamples` drawings in total."""
    rng = np.random.default_rng(seed)
    some = max(1, DRAWN // rows)
    for start in range(0, resamples, some):
        yield rng.integers(0, rows, size=(min(some, resamples - start), rows))


def counts_of_cells(cells: np.ndarray, n: int) -> np.ndarray:
    """Count cells in each resample: `[some, rows]` of cell numbers to `[some, n]`."""
    some = cells.shape[0]
    flat = (cells + n * np.arange(some)[:, None]).ravel()
    return np.bincount(flat, minlength=some * n).reshape(some, n)


def interval(value: float, drawn: np.ndarray) -> dict[str, float]:
    """Return a value with its 95% percentile interval over resamples."""
    low, high = np.percentile(drawn, [2.5, 97.5])
    return {"value": value, "low": float(low), "high": float(high)}


def unseen(truth: np.ndarray, tail: float = TAIL) -> dict[str, float]:
    """Say how much of other rows may turn out differently, where all rows that were tested turned out alike.

    A bootstrap draws from the rows that were seen. Where all of them are right, its interval has no width, be there 20
    or 20,000. The exact limit of Clopper and Pearson (The Use of Confidence or Fiducial Limits, Biometrika 26, 1934)
    has: up to a share s of other rows may be wrong, where (1 - s)^rows = `tail`. With `tail=0.05` it is about 3 / rows
    (Hanley and Lippman-Hand, If Nothing Goes Wrong, Is Everything All Right?, JAMA 249, 1983).

    Macro F1 is a mean over labels: one row of a rare label counts as much as many of a frequent one. So each label l
    has a share s(l) of its own, and the largest mean of them is taken for which all rows of the test come out alike
    with a probability of `tail`: the product of (1 - s(l))^rows(l). This takes each label's recall for its F1, which it
    is where a label is predicted as often as it occurs.

    Args:
        truth: True classes `[rows]`.
        tail: The probability that the interval leaves out at this end.

    Returns:
        For `accuracy`, `f1_macro` and `f1_weighted`, the share, between 0 and 1.
    """
    of_rows = 1 - tail ** (1 / len(truth))
    # The smallest mean of 1 - s(l) is at min(1, c * rows(l)): the sum of the s(l) is linear, and the set convex. The k
    # rarest labels are below 1; c follows from k, and the smallest k is right at which the next label reaches 1.
    sizes = np.sort(np.unique(truth, return_counts=True)[1]).astype(np.float64)
    c = np.exp((np.log(tail) - np.cumsum(sizes * np.log(sizes))) / np.cumsum(sizes))
    k = int(np.argmax(c * np.append(sizes[1:], np.inf) >= 1))
    of_labels = 1 - float(np.minimum(1, c[k] * sizes).mean())
    return {"accuracy": of_rows, "f1_macro": of_labels, "f1_weighted": of_rows}


def widened(score: dict[str, float], share: float, lowest: float) -> dict[str, float]:
    """Widen an interval by a share of rows that may turn out differently (see `unseen`), as bad or as good as can be.

    Args:
        score: `value`, `low` and `high`.
        share: The share.
        lowest: The lowest value there is: 0 for a score, -1 for a difference. The highest is 1.
    """
    value = score["value"]
    low, high = value + share * (lowest - value), value + share * (1 - value)
    return {"value": value, "low": min(score["low"], low), "high": max(score["high"], high)}


def scores_of_cells(counts: np.ndarray, truth: np.ndarray, predictions: np.ndarray) -> dict[str, np.ndarray]:
    """Score many resamples at once.

    Args:
        counts: How often each cell was drawn, `[resamples, cells]`.
        truth: Each cell's true class.
        predictions: Each cell's predicted class.

    Returns:
        `accuracy`, `f1_macro`, `f1_weighted`, each `[resamples]`, as scikit-learn computes them: F1 is
        averaged over the classes that occur among the drawn labels or predictions.
    """
    classes = int(max(truth.max(), predictions.max())) + 1
    eye = np.eye(classes)
    weights = counts.astype(np.float64)
    right = truth == predictions
    hits = weights[:, right] @ eye[truth[right]]
    support, predicted = weights @ eye[truth], weights @ eye[predictions]
    both = support + predicted
    f1 = np.divide(2 * hits, both, out=np.zeros_like(both), where=both > 0)
    total = weights.sum(axis=1)
    return {
        "accuracy": hits.sum(axis=1) / total,
        "f1_macro": f1.sum(axis=1) / (both > 0).sum(axis=1),
        "f1_weighted": (f1 * support).sum(axis=1) / total,
    }


def macro_f1_of_cells(truth: np.ndarray, guesses: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """Return a function from counts of cells `[resamples, cells]` to macro F1 `[resamples, runs]`.

    It sums over cells with products of sparse matrices: `scores_of_cells` would take minutes for as many resamples.
    """
    classes, places = int(max(truth.max(), guesses.max())) + 1, np.arange(len(truth))

    def sums(of: np.ndarray, which: np.ndarray) -> Any:
        shape = (classes, len(truth))
        ones = np.ones(int(which.sum()), np.float32)
        return scipy.sparse.csr_matrix((ones, (of[which], places[which])), shape=shape)

    everything = np.ones(len(truth), bool)
    support = sums(truth, everything)
    parts = [(sums(truth, guess == truth), support + sums(guess, everything)) for guess in guesses]

    def score(counts: np.ndarray) -> np.ndarray:
        weights = np.ascontiguousarray(counts.T, dtype=np.float32)
        scores = np.empty((len(counts), len(parts)))
        for place, (hits, both) in enumerate(parts):
            found, all_of_it = hits @ weights, both @ weights
            # A class that does not occur in a resample has no F1, and is left out of the mean.
            f1 = 2 * found / np.maximum(all_of_it, 1)
            scores[:, place] = f1.sum(axis=0, dtype=np.float64) / (all_of_it > 0).sum(axis=0)
        return scores

    return score
