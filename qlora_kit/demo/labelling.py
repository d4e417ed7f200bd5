"""A file of texts comes back with labels, as a CSV file."""

from __future__ import annotations

import csv
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from ..data.tables import checked_texts
from ..data.whole import Whole, as_text
from ..errors import unknown
from ..runs.predictor import TOP
from .model import CHUNK, SharedRun

# What spreadsheets take for the beginning of a formula, also in the wide forms that East Asian keyboards give.
_FORMULA = ("=", "+", "-", "@", "＝", "＋", "－", "＠")
_NUMBER = re.compile(r"[-+]?[\d.,]*\d(?:[eE][-+]?\d+)?%?")


class Labelled(NamedTuple):
    """A table with labels.

    Args:
        columns: The file's own columns, then the label, its probability, whether it was rejected (where a limit was
            asked for), and the labels after it.
        rows: Cells as text; those that a spreadsheet would run stand behind a `'`.
        defused: How many cells got such a `'`.
        rejected: How many rows got no label.
        text_at: Place of the column of texts.
        label_at: Place of the column of labels; the one after it has the probabilities.
    """

    columns: list[str]
    rows: list[list[str]]
    defused: int
    rejected: int
    text_at: int
    label_at: int


def likely_column(table: Whole, expected: str) -> str:
    """Return the column that probably has the texts: the expected one, or the one with most words.

    Args:
        table: The table.
        expected: The column's name in training.
    """
    if expected in table.columns:
        return expected
    words = [sum(len(as_text(row[place]).split()) for row in table.rows[:100]) for place in range(len(table.columns))]
    return table.columns[words.index(max(words))]


def labelled(
    shared: SharedRun,
    table: Whole,
    column: str,
    *,
    source: str,
    reject_below: float | None = None,
    step: Callable[[int, int], None] = lambda done, rows: None,
) -> Labelled:
    """Classify the texts of a table and put the results beside its own columns.

    Args:
        shared: The run.
        table: The table.
        column: The column of the texts.
        source: The table's name in messages.
        reject_below: The probability under which a label is not given; None gives all.
        step: Is told after each chunk how many rows are done, and of how many.

    Returns:
        The table with `label`, `probability`, `label_2`, `probability_2` and so on; where one of these names is taken,
        each of them begins with `predicted_`.

    Raises:
        KitError: For an unknown column, and a cell that holds no text, with its place.
    """
    if column not in table.columns:
        raise unknown("column", column, table.columns)
    at = table.columns.index(column)
    texts = checked_texts(source, [row[at] for row in table.rows], table.places, column)
    added: list[str] = []
    results: list[list[str]] = []
    rejected = 0
    for start in range(0, len(texts), CHUNK):
        found = shared.predict(texts[start : start + CHUNK], reject_below)
        frame = found.to_frame(TOP).drop(columns="text")
        added = [str(name) for name in frame.columns]
        results += [[_cell(cell) for cell in row] for row in frame.itertuples(index=False)]
        rejected += sum(label is None for label in found.labels)
        step(len(results), len(texts))
        shared.give_way()
    while set(added) & set(table.columns):
        added = [f"predicted_{name}" for name in added]
    plain = [[*table.columns, *added]]
    plain += [[*map(as_text, row), *more] for row, more in zip(table.rows, results, strict=True)]
    columns, *rows = [[harmless_cell(cell) for cell in row] for row in plain]
    pairs = zip(plain, [columns, *rows], strict=True)
    defused = sum(given != written for old, new in pairs for given, written in zip(old, new, strict=True))
    return Labelled(columns, rows, defused, rejected, at, len(table.columns))


def _cell(value: Any) -> str:
    return f"{value:.6f}" if isinstance(value, float) else as_text(value)


def harmless_cell(cell: str) -> str:
    """Return a cell that a spreadsheet shows and does not run.

    Args:
        cell: Any text. One that begins like a formula and is no number gets a `'` before it, which spreadsheets take
            for "this is text".
    """
    begins = cell.lstrip().startswith(_FORMULA) or cell.startswith(("\t", "\r"))
    return f"'{cell}" if begins and not _NUMBER.fullmatch(cell.strip()) else cell


def write_csv(table: Labelled, path: Path, *, marked: bool) -> None:
    """Write a table as CSV in UTF-8.

    Args:
        table: The table.
        path: A new file.
        marked: Whether it begins with a byte order mark, which Excel needs to read UTF-8.
    """
    with open(path, "x", encoding="utf-8-sig" if marked else "utf-8", newline="") as stream:
        csv.writer(stream).writerows([table.columns, *table.rows])
