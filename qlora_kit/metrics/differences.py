"""Compare two classifiers: differences over the same rows, and over rows and seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import scipy.stats

from ..errors import KitError, unknown
from .inputs import as_labels, as_predictions, check_same_length
from .resampling import (
    BLOCK,
    MOST_RESAMPLES,
    RESAMPLES,
    counts_of_cells,
    draws,
    interval,
    macro_f1_of_cells,
    scores_of_cells,
    unseen,
    widened,
)
from .scores import METRICS, cross_entropy


def paired_difference(
    a: Any,
    b: Any,
    labels: Sequence[int] | np.ndarray,
    metric: str = "f1_macro",
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> dict[str, float]:
    """Compare two contenders on the same test rows: mean of `a` minus mean of `b`.

    Each resample draws rows once and scores every prediction on them, so that rows that are hard for both cancel out.
    Seeds are averaged, not resampled: the interval is about other test rows, for these runs.

    Args:
        a: Predicted classes `[rows]` or logits `[rows, classes]`; or a list of these, one per seed.
        b: The same for the other contender; the number of seeds may differ.
        labels: True classes `[rows]`.
        metric: One of `METRICS`; `loss` needs logits.
        resamples: How often the rows are drawn.
        seed: Seed of the drawing.

    Returns:
        `{"value", "low", "high"}`: a 95% percentile interval. It excludes 0 if the test rows tell the contenders apart.
        Where one is ahead by the same in every row (by 0 if both are right in the same rows), resamples hardly differ:
        then the interval is at least as wide as what other rows may hold (see `resampling.unseen`). A loss has no
        limits, so the interval of two equal ones has no width.

    Raises:
        KitError: For an unknown metric, more or fewer predictions than labels, or a loss without logits.
    """
    if metric not in METRICS:
        raise unknown("metric", metric, METRICS)
    truth = as_labels(labels)
    sides = [_contender(side) for side in (a, b)]
    for prediction in (p for side in sides for p in side):
        check_same_length(prediction, truth)
    if metric == "loss":
        if any(np.ndim(p) != 2 for side in sides for p in side):
            raise KitError("a paired difference of the loss needs logits, not predicted classes")
        means = [np.mean([cross_entropy(p, truth) for p in side], axis=0) for side in sides]
        gap = means[0] - means[1]
        drawn = np.concatenate([gap[rows].mean(axis=1) for rows in draws(len(truth), resamples, seed)])
        return interval(float(gap.mean()), drawn)
    guesses = [[as_predictions(p) for p in side] for side in sides]
    stack = np.stack([truth, *guesses[0], *guesses[1]])
    # Rows with the same label and the same predictions are one cell; a few hundred cells stand for all rows.
    cells, cell_of_row = np.unique(stack, axis=1, return_inverse=True)
    cell_of_row = cell_of_row.ravel()
    sizes = [len(side) for side in guesses]

    def difference(counts: np.ndarray) -> np.ndarray:
        scores = [scores_of_cells(counts, cells[0], cells[1 + i])[metric] for i in range(sum(sizes))]
        gap: np.ndarray = np.mean(scores[: sizes[0]], axis=0) - np.mean(scores[sizes[0] :], axis=0)
        return gap

    drawn = np.concatenate(
        [difference(counts_of_cells(cell_of_row[rows], cells.shape[1])) for rows in draws(len(truth), resamples, seed)]
    )
    found = interval(float(difference(np.bincount(cell_of_row, minlength=cells.shape[1])[None])[0]), drawn)
    right = cells[1:] == cells[0]
    if _same_in_all_rows(right[: sizes[0]], right[sizes[0] :]):
        found = widened(found, unseen(truth)[metric], lowest=-1)
    return found


def differences_over_rows_and_seeds(
    contenders: Mapping[str, Any],
    pairs: Sequence[tuple[str, str]],
    labels: Sequence[int] | np.ndarray,
    *,
    shown: int | None = None,
    tolerance: float = 1e-5,
    most: int = MOST_RESAMPLES,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Compare contenders' macro F1, with intervals over both other test rows and other seeds.

    `paired_difference` says how a difference of these runs would vary on other rows. Student's interval says how it
    would vary with other seeds on these rows. "A is better than B" needs both. Each resample here draws rows, the same
    for all contenders, and seeds: the same for both of a pair if both have them, so that what a seed's runs have in
    common cancels out (after Sellam et al., The MultiBERTs, arXiv 2106.16163, section 3). The changes from the drawn
    rows and from the drawn seeds are added. The change from seeds is taken from the scores on the original rows: on
    drawn rows, each seed's score would contain the chance in the rows a second time. A bootstrap of n values gives too
    narrow an interval if n is small, as it is for seeds. So their part is widened by √(n / (n - 1)) · t(n - 1) / z
    (Hesterberg, What Teachers Should Know about the Bootstrap, arXiv 1411.5279: the expanded percentile interval):
    without chance in the rows, the interval would be about as wide as Student's.

    Intervals are corrected for how many are shown (Bonferroni): each is at 1 - 0.05 / `shown`, so that with 95% all of
    them contain the true value. Resamples are drawn until the ends are as exact as `tolerance`. The standard error of
    an end is half the distance between the two quantiles that are one standard deviation of a binomial count away from
    it. A pair that differs by the same in every row is treated as in `paired_difference`.

    Args:
        contenders: By name, predicted classes `[rows]` by seed; for one without seeds, only the classes `[rows]`.
        pairs: Pairs of names, first and second: the difference is first minus second.
        labels: True classes `[rows]`.
        shown: How many intervals are shown together; the number of pairs by default.
        tolerance: Drawing stops when no end's standard error is larger than this.
        most: Drawing stops after this many resamples in any case.
        seed: Seed of the drawing.

    Returns:
        For each pair `{"value", "low", "high", "resamples", "end_error" (the larger of both ends' standard errors),
        "shown", "seeds" (number of seeds of first and second; None for one without)}`.

    Raises:
        KitError: For an unknown name, a contender with one seed, which says nothing about other seeds, or more or fewer
            predictions than labels.
    """
    truth = as_labels(labels)
    shown = len(pairs) if shown is None else shown
    if shown < len(pairs):
        raise KitError(f"{len(pairs)} intervals are asked for, so no fewer are shown: shown={shown}")
    runs = _runs(contenders, pairs)
    guesses = [as_predictions(contenders[name] if one is None else contenders[name][one]) for name, one in runs]
    for guess in guesses:
        check_same_length(guess, truth)
    places = {run: place for place, run in enumerate(runs)}
    # Rows with the same label and the same predictions are one cell; a few hundred cells stand for thousands of rows.
    cells, counts = np.unique(np.stack([truth, *guesses]), axis=1, return_counts=True)
    score = macro_f1_of_cells(cells[0], cells[1:])
    values = score(counts[None])[0]
    compared = [_Compared(pair, contenders, places, values, 1 - 0.05 / shown) for pair in pairs]
    drawn: list[list[np.ndarray]] = [[] for _ in pairs]
    done = block = look = 0
    while True:
        # Each block has its own seed, so that fewer resamples are the first part of more.
        rng = np.random.default_rng([seed, block])
        scores = score(rng.multinomial(len(truth), counts / len(truth), size=min(BLOCK, most - done)))
        done, block = done + len(scores), block + 1
        for gaps, pair in zip(drawn, compared, strict=True):
            gaps.append(pair.gaps(scores, rng).astype(np.float32))
        # Draw a quarter more before the ends are checked again: each check sorts all resamples.
        if done < min(look, most):
            continue
        look = done * 5 // 4
        ends = [_ends(np.concatenate(gaps), pair.level) for gaps, pair in zip(drawn, compared, strict=True)]
        if done >= most or all(error <= tolerance for _, _, error in ends):
            break
    found = [pair.result(end, done, shown) for pair, end in zip(compared, ends, strict=True)]
    right = cells[1:] == cells[0]
    for line, pair in zip(found, compared, strict=True):
        if _same_in_all_rows(*(right[columns] for columns in pair.columns)):
            line |= widened(line, unseen(truth, (1 - pair.level) / 2)["f1_macro"], lowest=-1)
    return found


def _runs(contenders: Mapping[str, Any], pairs: Sequence[tuple[str, str]]) -> list[tuple[str, int | None]]:
    """Return the compared runs: each contender's name with each of its seeds, or with None if it has none."""
    names = list(dict.fromkeys(name for pair in pairs for name in pair))
    for name in names:
        if name not in contenders:
            raise unknown("contender", name, contenders)
    runs: list[tuple[str, int | None]] = []
    for name in names:
        given = contenders[name]
        seeds = sorted(given) if isinstance(given, Mapping) else [None]
        if isinstance(given, Mapping) and len(seeds) < 2:
            raise KitError(f"{name} has {len(seeds)} seed, which tells nothing of other seeds: train it with more")
        runs += [(name, one) for one in seeds]
    return runs


class _Compared:
    """A pair of contenders: the columns of their scores, and the effects of their seeds."""

    def __init__(
        self,
        pair: tuple[str, str],
        contenders: Mapping[str, Any],
        places: Mapping[tuple[str, int | None], int],
        values: np.ndarray,
        level: float,
    ) -> None:
        self.level = level
        seeds = [sorted(side) if isinstance(side := contenders[name], Mapping) else [None] for name in pair]
        common = [one for one in seeds[0] if one in seeds[1]]
        paired = len(common) > 1
        if paired:
            seeds = [common, common]
        self.columns = [[places[name, one] for one in side] for name, side in zip(pair, seeds, strict=True)]
        self.seeds = [None if side == [None] else len(side) for side in seeds]
        first, second = (values[columns] for columns in self.columns)
        self.value = float(first.mean() - second.mean())
        effects = [first - second] if paired else [first, -second]
        self.effects = [effect - effect.mean() for effect in effects if len(effect) > 1]

    def result(self, ends: tuple[float, float, float], resamples: int, shown: int) -> dict[str, Any]:
        """Return the difference with its interval; see `differences_over_rows_and_seeds`."""
        low, high, error = ends
        return {
            "value": self.value,
            "low": low,
            "high": high,
            "resamples": resamples,
            "end_error": error,
            "shown": shown,
            "seeds": self.seeds,
        }

    def gaps(self, scores: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Return the differences `[resamples]`, with drawn seeds, of scores on drawn rows `[resamples, runs]`."""
        first, second = (scores[:, columns].mean(axis=1) for columns in self.columns)
        gaps: np.ndarray = first - second
        high = (1 + self.level) / 2
        for effect in self.effects:
            n = len(effect)
            wider = np.sqrt(n / (n - 1)) * scipy.stats.t.ppf(high, n - 1) / scipy.stats.norm.ppf(high)
            gaps += wider * (rng.multinomial(n, [1 / n] * n, size=len(gaps)) @ effect) / n
        return gaps


def _ends(drawn: np.ndarray, level: float) -> tuple[float, float, float]:
    """Return an interval's ends and the larger of their standard errors, which are about the drawing alone."""
    tail = (1 - level) / 2
    step = np.sqrt(tail * (1 - tail) / len(drawn))
    near = [max(tail - step, 0), tail, tail + step]
    low, high = np.quantile(drawn, near), np.quantile(drawn, [1 - place for place in reversed(near)])
    return float(low[1]), float(high[1]), float(max(low[2] - low[0], high[2] - high[0]) / 2)


def _same_in_all_rows(ours: np.ndarray, theirs: np.ndarray) -> bool:
    """Return whether one side is right more often than the other by the same share of its runs in every row.

    Args:
        ours: Whether one side's runs are right, bool `[runs, rows or cells]`.
        theirs: The same of the other.
    """
    gaps = ours.sum(axis=0) * len(theirs) - theirs.sum(axis=0) * len(ours)  # whole numbers, so that equal is equal
    return bool((gaps == gaps[0]).all())


def with_interval(score: Mapping[str, float], digits: int = 4, sign: str = "") -> str:
    """Write a score or a difference with its interval: `0.9347 (0.9250 to 0.9431)`.

    Args:
        score: `value`, `low` and `high`.
        digits: Digits after the point.
        sign: `+` writes the sign of positive numbers, too.
    """
    value, low, high = (f"{score[key]:{sign}.{digits}f}" for key in ("value", "low", "high"))
    return f"{value} ({low} to {high})"


def lead_in_words(difference: Mapping[str, float]) -> str:
    """Say whether a difference shows the first contender ahead of the second; higher scores are better.

    Args:
        difference: `value`, `low` and `high`, from `paired_difference` of any metric but the loss.

    Returns:
        `ahead`, `behind`, or, if the interval contains 0, `not told apart by these test rows`.
    """
    if difference["low"] > 0:
        return "ahead"
    return "behind" if difference["high"] < 0 else "not told apart by these test rows"


def _contender(side: Any) -> list[np.ndarray]:
    """Return a contender's predictions as a list: an array is one; a list of arrays or lists is several."""
    if isinstance(side, np.ndarray) or not np.ndim(side[0]):
        return [np.asarray(side)]
    return [np.asarray(one) for one in side]
