"""Counts with their nouns."""

from __future__ import annotations

import pytest

from qlora_kit.system.showing import counted


@pytest.mark.parametrize(
    ("count", "noun", "words"),
    [
        (0, "row", "0 rows"),
        (1, "row", "1 row"),
        (2, "test row", "2 test rows"),
        (12_345, "text", "12,345 texts"),
        (1.0, "epoch", "1 epoch"),
        (0.5, "epoch", "0.5 epochs"),
    ],
)
def test_a_number_stands_with_its_noun(count: float, noun: str, words: str):
    assert counted(count, noun) == words
