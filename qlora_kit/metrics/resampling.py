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
