"""What a merge changes: figures of two sets of logits, against counts by hand."""

from __future__ import annotations

import numpy as np
import pytest

from qlora_kit.export.before_and_after import compared, moved_across


def test_the_limit_is_the_one_at_which_most_rows_change_sides():
    before, after = np.array([0.9, 0.7, 0.5, 0.3]), np.array([0.6, 0.8, 0.5, 0.35])
    # A row changes sides for limits above its lower value and up to its higher: 0.8 is in 0.6 to 0.9 and 0.7 to 0.8.
    found = moved_across(before, after)
    assert found == {"share": 0.5, "at": 0.8}
    at = found["at"]
    assert ((before >= at) != (after >= at)).mean() == 0.5
    assert moved_across(before, before) == {"share": 0.0, "at": None}


@pytest.mark.parametrize("seed", range(3))
def test_no_limit_moves_more_rows_than_the_one_that_is_told(seed):
    draw = np.random.default_rng(seed)
    before = np.round(draw.random(200), 2)
    after = np.clip(np.round(before + draw.normal(0, 0.1, 200), 2), 0, 1)
    found = moved_across(before, after)
    limits = np.concatenate([before, after, draw.random(500)])
    shares = [((before >= limit) != (after >= limit)).mean() for limit in limits]
    assert found["share"] == max(shares)


def test_labels_and_probabilities_are_compared_row_by_row():
    before = np.array([[2.0, 0.0], [0.0, 1.0], [3.0, 0.0]])
    after = np.array([[2.0, 0.0], [1.0, 0.0], [3.0, 0.0]])
    found = compared(before, after, [0, 1, 0])
    assert found["rows"] == 3 and found["same_label"] == pytest.approx(2 / 3)
    assert found["before"]["accuracy"]["value"] == 1 and found["difference"]["value"] < 0
    assert found["largest_difference"] == pytest.approx(1 / (1 + np.exp(-1)) - 1 / (1 + np.exp(1)))
    assert found["limit"] == {"share": 0.0, "at": None}
