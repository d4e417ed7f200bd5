"""Whole tables read from files: every column, for answers that go beside what was given."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import KitError
from .formats import ENDINGS, format_of
from .reading import (
    DELIMITERS,
    cells_of_any_length,
    csv_rows,
    decoded,
    header_cell,
    json_of,
    raw_bytes,
    sheets_of,
)
from .tables import Places, first_line, is_columns, numbered


class Whole(NamedTuple):
    """A table with all its columns.

    Args:
        columns: Their names, each once.
        rows: For each row a cell for each column: text, or what the file has (a number, a date, None).
        places: Each row's position, for messages: `rows.csv, line 17`.
        marked: Whether the file begins with a byte order mark, as those that Excel writes and reads.
    """

    columns: list[str]
    rows: list[list[Any]]
    places: Sequence[str]
    marked: bool = False


def read_whole(path: Path, expected: str | None = None) -> Whole:
    """Read every column of a file.

    Args:
        path: A CSV, TSV, JSON, JSON Lines, Parquet or Excel file, by its ending; of an Excel file, its only sheet with
            cells, or the only one that has the expected column.
        expected: A column that it probably has. A CSV file's delimiter is the one with which it has this column, or
            else the one with which it has most columns.

    Returns:
        The table. Its cells are not checked: `tables.checked_texts` does it for the column of the texts.

    Raises:
        KitError: For an unknown ending, a damaged file, rows of different lengths, names that occur twice, and a file
            without rows.
    """
    ending = format_of(path)
    if ending is None:
        raise KitError(f"{path}: files end in {ENDINGS}; this one has {path.suffix or 'no ending'!r}")
    if ending == ".parquet":
        table = _parquet(path)
    elif ending == ".xlsx":
        table = _excel(path, expected)
    else:
        raw = raw_bytes(path)
        content = decoded(raw, str(path))
        if ending in (".csv", ".tsv"):
            table = _csv(content, str(path), expected, ending == ".tsv")
        else:
            table = _json_lines(content, str(path)) if ending == ".jsonl" else _json(content, str(path))
        table = table._replace(marked=raw.startswith(b"\xef\xbb\xbf"))
    twice = next((name for name in table.columns if table.columns.count(name) > 1), None)
    if twice is not None:
        raise KitError(f"{path}: there are {table.columns.count(twice)} columns called {twice!r}")
    if not table.rows:
        raise KitError(f"{path} has no rows")
    return table


def _csv(content: str, source: str, expected: str | None, tsv: bool) -> Whole:
    found: list[tuple[dict[str, Any], int, list[str]]] = []
    for delimiter in sorted(DELIMITERS, key=lambda one: tsv and one != "\t"):
        quoting = csv.QUOTE_NONE if tsv and delimiter == "\t" else csv.QUOTE_MINIMAL
        dialect: dict[str, Any] = {"delimiter": delimiter, "quoting": quoting, "strict": True}
        with cells_of_any_length(content):
            reader = csv.reader(io.StringIO(content, newline=""), **dialect)
            try:
                columns = next((cells for cells in reader if cells), [])
            except csv.Error:
                continue
            found.append((dialect, reader.line_num, [name.strip() for name in columns]))
    if not found:
        raise KitError(f"{source}, line 1: a double quote is opened and never rightly closed")
    # The first of the best: `max` keeps the order of the delimiters.
    dialect, lines, columns = max(found, key=lambda one: (expected in one[2], len(one[2])))
    rows = list(csv_rows(content, source, dialect, lines, columns))
    return Whole(columns, [cells for _, cells in rows], Places(source, "line", [number for number, _ in rows]))


def _json_lines(content: str, source: str) -> Whole:
    # Not splitlines: a text may contain U+2028, which JSON does not escape.
    lines = [(number, line) for number, line in enumerate(content.split("\n"), 1) if line.strip()]
    places = Places(source, "line", [number for number, _ in lines])
    return _of_records([json_of(line, place) for (_, line), place in zip(lines, places, strict=True)], places)


def _json(content: str, source: str) -> Whole:
    found = json_of(content, source)
    if isinstance(found, list) and found:
        return _of_records(found, numbered(source, found))
    if not is_columns(found):
        raise KitError(f"{source}: allowed is a list of objects, or one object with a list for each column")
    if len({len(column) for column in found.values()}) > 1:
        raise KitError(f"{source}: its columns have different lengths")
    rows = [list(cells) for cells in zip(*found.values(), strict=True)]
    return Whole(list(found), rows, numbered(source, rows))


def _of_records(records: Sequence[Any], places: Sequence[str]) -> Whole:
    for record, place in zip(records, places, strict=True):
        if not isinstance(record, Mapping):
            raise KitError(f"{place}: {record!r:.60} ({type(record).__name__}) where a row is an object with names")
    columns = list(dict.fromkeys(name for record in records for name in record))
    return Whole(columns, [[record.get(name) for name in columns] for record in records], places)


def _parquet(path: Path) -> Whole:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(path).read()
        rows = [list(cells) for cells in zip(*(column.to_pylist() for column in table.columns), strict=True)]
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise KitError(f"{path} cannot be read as Parquet: it is damaged or cut off ({first_line(error)})") from error
    return Whole(list(table.column_names), rows, numbered(str(path), rows))


def _excel(path: Path, expected: str | None) -> Whole:
    sheets = {title: rows for title, rows in sheets_of(path).items() if rows}
    if not sheets:
        raise KitError(f"{path} is empty")
    if len(sheets) > 1:
        fitting = {
            title: rows for title, rows in sheets.items() if expected in [header_cell(cell) for cell in rows[0][1]]
        }
        if len(fitting) != 1:
            raise KitError(f"{path} has {len(sheets)} sheets ({', '.join(map(repr, sheets))}): keep one")
        sheets = fitting
    ((_, header), *rows) = next(iter(sheets.values()))
    columns = [header_cell(cell) for cell in header]
    while columns and not columns[-1]:
        columns.pop()
    # A row of a sheet ends at its last cell that is not empty.
    cells = [[row[i] if i < len(row) else None for i in range(len(columns))] for _, row in rows]
    return Whole(columns, cells, Places(str(path), "row", [number for number, _ in rows]), marked=True)


def as_text(cell: Any) -> str:
    """Return a cell as a CSV file has it: text as it is, nothing for what is missing, lists and dicts as JSON."""
    if cell is None or cell != cell:  # NaN alone differs from itself
        return ""
    if isinstance(cell, list | dict):
        return json.dumps(cell, ensure_ascii=False, default=str)
    return str(cell)
