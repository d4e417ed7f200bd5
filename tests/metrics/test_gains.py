"""The share of a gain that is kept, against scores by hand and against intervals that are known."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import f1_score

from qlora_kit.errors import KitError
from qlora_kit.metrics.differences import differences_over_rows_and_seeds
from qlora_kit.metrics.gains import gains_kept

TRUTH = np.arange(600) % 3


def guessed(wrong: float, seed: int) -> np.ndarray:
    """Return classes of which a share is wrong; which rows are hard is the same for all."""
    hard = np.random.default_rng(7).random(len(TRUTH))
    moved = (hard + np.random.default_rng(seed).normal(0, 0.02, len(TRUTH))) < wrong
    return np.where(moved, (TRUTH + 1) % 3, TRUTH)


def contenders(**wrong: float) -> dict[str, dict[int, np.ndarray]]:
    return {name: {seed: guessed(share, seed + 10 * place) for seed in range(3)}
            for place, (name, share) in enumerate(wrong.items())}  # fmt: skip


def test_a_share_is_the_ratio_of_the_means_differences():
    sides = contenders(full=0.1, none=0.3, some=0.2)
    found = gains_kept(sides, TRUTH, whole="full", nothing="none")
    mean = {
        name: np.mean([f1_score(TRUTH, guess, average="macro") for guess in by_seed.values()])
        for name, by_seed in sides.items()
    }
    assert list(found) == ["some"]
    share = found["some"]
    assert share["value"] == pytest.approx((mean["some"] - mean["none"]) / (mean["full"] - mean["none"]))
    assert share["low"] < share["value"] < share["high"] and share["low"] > 0.3 and share["high"] < 0.75


def test_what_is_the_whole_or_nothing_is_1_or_0_without_doubt():
    sides = contenders(full=0.1, none=0.3)
    sides |= {"same": sides["full"], "lost": sides["none"]}
    found = gains_kept(sides, TRUTH, whole="full", nothing="none")
    assert found["same"] == pytest.approx({"value": 1, "low": 1, "high": 1})
    assert found["lost"] == pytest.approx({"value": 0, "low": 0, "high": 0}, abs=1e-12)


def test_an_interval_is_that_of_the_difference_where_the_gain_is_certain():
    # Without chance in the gain, a share is the difference to nothing, divided by a constant.
    sides = contenders(full=0.0, none=0.3, some=0.28)
    sides["full"] = dict.fromkeys(range(3), TRUTH)
    sides["none"] = dict.fromkeys(range(3), (TRUTH + 1) % 3)
    (share,) = gains_kept(sides, TRUTH, whole="full", nothing="none").values()
    (gap,) = differences_over_rows_and_seeds(sides, [("some", "none")], TRUTH, tolerance=1e-3)
    assert share["value"] == pytest.approx(gap["value"])
    assert (share["low"], share["high"]) == pytest.approx((gap["low"], gap["high"]), abs=4e-3)


def test_seeds_that_differ_widen_an_interval():
    alike = contenders(full=0.1, none=0.3, some=0.2)
    apart = {**alike, "some": {seed: guessed(wrong, seed) for seed, wrong in enumerate((0.14, 0.2, 0.26))}}
    widths = []
    for sides in (alike, apart):
        (share,) = gains_kept(sides, TRUTH, whole="full", nothing="none").values()
        widths.append(share["high"] - share["low"])
    assert widths[1] > 2 * widths[0]


def test_a_share_of_no_gain_is_not_told():
    sides = contenders(full=0.2, none=0.2, some=0.1)
    assert gains_kept(sides, TRUTH, whole="full", nothing="none") == {"some": None}


def test_what_cannot_be_compared_is_refused():
    sides = contenders(full=0.1, none=0.3, some=0.2)
    with pytest.raises(KitError, match="'ful'"):
        gains_kept(sides, TRUTH, whole="ful", nothing="none")
    with pytest.raises(KitError, match=r"some has the seeds \[0\], and full has \[0, 1, 2\]"):
        gains_kept({**sides, "some": {0: sides["some"][0]}}, TRUTH, whole="full", nothing="none")
    with pytest.raises(KitError, match="full has 1 seed"):
        gains_kept({name: {0: by_seed[0]} for name, by_seed in sides.items()}, TRUTH, whole="full", nothing="none")
    with pytest.raises(KitError):
        gains_kept(sides, TRUTH[:-1], whole="full", nothing="none")
