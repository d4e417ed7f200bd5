"""How much of a gain is left: of what an adapter adds, what a merged model keeps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import scipy.stats

from ..errors import KitError, unknown
from .inputs import as_labels, as_predictions, check_same_length
from .resampling import BLOCK, interval, macro_f1_of_cells

LEVEL = 0.95


def gains_kept(
    contenders: Mapping[str, Mapping[int, Sequence[int] | np.ndarray]],
    labels: Sequence[int] | np.ndarray,
    *,
    whole: str,
    nothing: str,
    resamples: int = 20_000,
    seed: int = 0,
) -> dict[str, dict[str, float] | None]:
    """Return the share of a gain in macro F1 that each contender keeps, with an interval over rows and seeds.

    The share is (contender - nothing) / (whole - nothing), each a mean over the seeds: 1 where a contender is as good
    as `whole`, 0 where it is no better than `nothing`; it may lie outside of both. Each resample draws rows and seeds,
    the same for all contenders, as `differences_over_rows_and_seeds` does, and takes the ratio of the two drawn
    differences: an interval of the first difference alone would leave out that the second is an estimate, too.

    Args:
        contenders: By name, predicted classes `[rows]` by seed. All have the same seeds, two or more.
        labels: True classes `[rows]`.
        whole: The contender that has all of the gain.
        nothing: The contender that has none of it.
        resamples: How often rows and seeds are drawn.
        seed: Seed of the drawing.

    Returns:
        By the name of every contender but these two, `{"value", "low", "high"}` with the 95% percentile interval; None
        where the gain itself is not told apart from nothing, for a share of it would say nothing.

    Raises:
        KitError: For an unknown name, contenders of different seeds or of fewer than two, or more or fewer predictions
            than labels.
    """
    for name in (whole, nothing):
        if name not in contenders:
            raise unknown("contender", name, contenders)
    seeds = sorted(contenders[whole])
    if len(seeds) < 2:
        raise KitError(f"{whole} has {len(seeds)} seed, which tells nothing of other seeds: train it with more")
    for name, by_seed in contenders.items():
        if sorted(by_seed) != seeds:
            raise KitError(
                f"{name} has the seeds {sorted(by_seed)}, and {whole} has {seeds}: they are compared by seed"
            )
    truth = as_labels(labels)
    guesses = [as_predictions(by_seed[one]) for by_seed in contenders.values() for one in seeds]
    for guess in guesses:
        check_same_length(guess, truth)
    cells, counts = np.unique(np.stack([truth, *guesses]), axis=1, return_counts=True)
    score = macro_f1_of_cells(cells[0], cells[1:])
    n = len(seeds)
    told = dict(zip(contenders, score(counts[None])[0].reshape(-1, n), strict=True))
    # As in `differences_over_rows_and_seeds`: a bootstrap of few seeds is too narrow by this.
    high = (1 + LEVEL) / 2
    wider = np.sqrt(n / (n - 1)) * scipy.stats.t.ppf(high, n - 1) / scipy.stats.norm.ppf(high)
    drawn: dict[str, list[np.ndarray]] = {name: [] for name in contenders if name != nothing}
    for block, done in enumerate(range(0, resamples, BLOCK)):
        rng = np.random.default_rng([seed, block])
        some = min(BLOCK, resamples - done)
        scores = score(rng.multinomial(len(truth), counts / len(truth), size=some))
        means = dict(zip(contenders, scores.reshape(some, -1, n).mean(axis=2).T, strict=True))
        of_seeds = rng.multinomial(n, [1 / n] * n, size=some) / n
        for name, gaps in drawn.items():
            effect = told[name] - told[nothing]
            gaps.append(means[name] - means[nothing] + wider * (of_seeds @ (effect - effect.mean())))
    gained = np.concatenate(drawn[whole])
    if np.quantile(gained, 1 - high) <= 0:
        return {name: None for name in drawn if name != whole}
    gain = float((told[whole] - told[nothing]).mean())
    return {
        name: interval(float((told[name] - told[nothing]).mean()) / gain, np.concatenate(gaps) / gained)
        for name, gaps in drawn.items()
        if name != whole
    }
