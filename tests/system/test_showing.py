"""Counts with their nouns; lines and tables as HTML."""

from __future__ import annotations

import pytest

from qlora_kit.system.showing import counted, lines_as_html, table_as_html


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


def test_lines_and_tables_are_escaped_and_a_long_path_breaks():
    page = lines_as_html(["Run <a>", "line"])
    assert page == '<div style="overflow-wrap:anywhere"><strong>Run &lt;a&gt;</strong><br>line</div>'
    assert "<strong>" not in lines_as_html(["a sentence"], titled=False)
    table = table_as_html(["text"], [["<b>"]])
    assert "&lt;b&gt;" in table and "<b>" not in table and table.count("text-align:left") == 2
