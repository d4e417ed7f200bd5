"""The columns of a user's file, and which of them hold the texts and the labels.

A guess is made only where one column fits and no other does; it comes with its reason. Everything else is refused, with
the columns that are in question.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import KitError, unknown
from ..system.arguments import TEXT, a_path, takes
from .formats import format_of
from .reading import DELIMITERS, decoded, existing_files, json_of, raw_bytes
from .tables import first_line, is_columns, short

TEXT_NAMES = (
    "text", "texts", "question", "sentence", "message", "query", "utterance", "review", "comment", "body", "content",
    "tweet", "document", "description",
)  # fmt: skip
"""Words in a column's name that say that it holds the texts."""
LABEL_NAMES = (
    "label", "labels", "category", "class", "intent", "topic", "target", "sentiment", "tag", "type",
)  # fmt: skip
"""Words in a column's name that say that it holds the labels."""

_MOST_WORDS = 6  # of a label, on average
_NUMBER = re.compile(r"[-+]?\d+")
_FRACTION = re.compile(r"[-+]?\d*[.,]\d+(?:[eE][-+]?\d+)?")


@dataclasses.dataclass(frozen=True)
class Columns:
    """All columns of a file.

    Args:
        source: The file, as messages name it.
        cells: The values of each column by its name, in the order of the file's rows; None where a row has none.
    """

    source: str
    cells: Mapping[str, Sequence[Any]]

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(next(iter(self.cells.values()), ()))

    def table(self) -> list[dict[str, Any]]:
        """Return a row for each column: `column`, `filled`, `different`, `words` (mean of a value), `first`."""
        return [
            {
                "column": look.name,
                "filled": look.filled,
                "different": look.different,
                "words": round(look.words, 1),
                "first": short(look.first, 60).strip("'\""),
            }
            for look in _looks(self)
        ]


@dataclasses.dataclass(frozen=True)
class Guess:
    """The columns of texts and labels, each with the reason why it is this one.

    Args:
        text: Name of the column of texts.
        label: Name of the column of labels.
        why_text: Why it is taken for the texts.
        why_label: Why it is taken for the labels.
    """

    text: str
    label: str
    why_text: str
    why_label: str

    def __str__(self) -> str:
        return f"texts: {self.text!r} ({self.why_text})\nlabels: {self.label!r} ({self.why_label})"


@dataclasses.dataclass(frozen=True)
class _Look:
    """What a column looks like: how many cells are filled, how many differ, words a cell, its first value."""

    name: str
    filled: int
    different: int
    words: float
    first: str
    fractions: bool
    numbers: bool

    @property
    def texts(self) -> bool:
        """Whether these can be the texts: several words each, and most of them different."""
        return not self.numbers and not self.fractions and self.words >= 2 and self.different * 2 > self.filled

    @property
    def labels(self) -> bool:
        """Whether these can be the labels: few short values that come again."""
        few = self.different >= 2 and self.different * 2 <= self.filled
        return few and self.words <= _MOST_WORDS and not self.fractions

    def __str__(self) -> str:
        return f"{self.name!r} ({self.different:,} different of {self.filled:,}, {self.words:.1f} words each)"


# ---- reading ----


@takes(name=a_path("rows.csv"))
def read_columns(name: str | Path) -> Columns:
    """Read all columns of a file, to show them and to guess which hold texts and labels.

    Cells are not checked here: `text_classification` does that when it reads the two columns.

    Args:
        name: A file that ends in one of `formats.SUFFIXES`, or a pattern, whose first file is read.

    Returns:
        The columns.

    Raises:
        KitError: When there is no such file, it cannot be read, or has fewer than two columns or no rows.
    """
    found = existing_files(str(name))
    if found is None:
        raise KitError(f"there is no file {str(name)!r}: columns are guessed for files, not for data sets on the hub")
    path = found[0]
    ending = format_of(path)
    if ending == ".parquet":
        cells = _of_parquet(path)
    elif ending == ".xlsx":
        cells = _of_excel(path)
    else:
        content = decoded(raw_bytes(path), str(path))
        if ending in (".csv", ".tsv"):
            cells = _of_csv(content, str(path), tsv=ending == ".tsv")
        else:
            cells = _of_json(content, str(path), lines=ending == ".jsonl")
    columns = Columns(str(path), cells)
    if len(cells) < 2:
        raise KitError(f"{path} has {'the one column ' + short(next(iter(cells))) if cells else 'no columns'}: two are "
                       "needed, one of texts and one of labels; the first line names them")  # fmt: skip
    if not len(columns):
        raise KitError(f"{path} has no rows")
    return columns


def _of_csv(content: str, source: str, *, tsv: bool) -> dict[str, list[Any]]:
    """Read CSV by the delimiter that gives the header most columns; rows of another width are left to the reader."""
    best: list[list[str]] = []
    previous_limit = csv.field_size_limit(max(csv.field_size_limit(), len(content) + 1))
    try:
        first = "\t" if tsv else ","
        for delimiter in (first, *(d for d in DELIMITERS if d != first)):
            stream = io.StringIO(content, newline="")
            # In a TSV file a quote is a character, as for the reader of rows.
            quoting = csv.QUOTE_NONE if tsv and delimiter == "\t" else csv.QUOTE_MINIMAL
            try:
                rows = [row for row in csv.reader(stream, delimiter=delimiter, quoting=quoting) if row]  # type: ignore[arg-type]
            except csv.Error:
                continue
            if rows and (not best or len(rows[0]) > len(best[0])):
                best = rows
    finally:
        csv.field_size_limit(previous_limit)
    if not best:
        raise KitError(f"{source} cannot be read as a table: save it as CSV in UTF-8")
    header = [name.strip() for name in best[0]]
    twice = next((name for name in header if header.count(name) > 1), None)
    if twice is not None:
        raise KitError(f"{source}: the header has {header.count(twice)} columns called {twice!r}")
    rows = [row for row in best[1:] if len(row) == len(header)]
    return {name: [row[place] for row in rows] for place, name in enumerate(header)}


def _of_json(content: str, source: str, *, lines: bool) -> dict[str, list[Any]]:
    if lines:
        numbered = enumerate(content.split("\n"), 1)
        found: Any = [json_of(line, f"{source}, line {number}") for number, line in numbered if line.strip()]
    else:
        found = json_of(content, source)
    if is_columns(found):
        return {str(name): list(values) for name, values in found.items()}
    if not isinstance(found, list) or not all(isinstance(row, Mapping) for row in found):
        raise KitError(f"{source}: allowed is a list of objects, or one object with a list for each column")
    return _of_rows(found)


def _of_rows(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    names = dict.fromkeys(str(name) for row in rows for name in row)
    return {name: [row.get(name) for row in rows] for name in names}


def _of_parquet(path: Path) -> dict[str, list[Any]]:
    import pyarrow
    import pyarrow.parquet

    try:
        return {str(name): list(cells) for name, cells in pyarrow.parquet.read_table(path).to_pydict().items()}
    except (pyarrow.ArrowException, OSError) as error:
        raise KitError(f"{path} cannot be read as Parquet: it is damaged or cut off ({first_line(error)})") from error


def _of_excel(path: Path) -> dict[str, list[Any]]:
    """Read the first sheet that has rows."""
    try:
        import openpyxl
    except ImportError as error:
        raise KitError(f"{path}: reading .xlsx needs the package openpyxl: pip install openpyxl") from error
    try:
        book = openpyxl.load_workbook(path, read_only=True, data_only=True)
        sheets = [[row for row in sheet.iter_rows(values_only=True) if any(row)] for sheet in book.worksheets]
        book.close()
    except Exception as error:  # a zip of XML files: its errors have no common base class
        raise KitError(f"{path} cannot be read as Excel: it is damaged or cut off ({first_line(error)})") from error
    rows = next((rows for rows in sheets if rows), [])
    names = ["" if name is None else str(name).strip() for name in rows[0]] if rows else []
    return _of_rows([dict(zip(names, row, strict=False)) for row in rows[1:]])


# ---- guessing ----


@takes(text=TEXT, label=TEXT)
def guess_columns(columns: Columns, *, text: str = "", label: str = "") -> Guess:
    """Say which column holds the texts and which the labels.

    A column of texts has several words a cell, most cells different. A column of labels has few short values that come
    again. Where several columns fit, the one whose name says so is taken, if it is one.

    Args:
        columns: What `read_columns` returned.
        text: The column of texts, if it is known.
        label: The column of labels, if it is known.

    Returns:
        Both, with reasons.

    Raises:
        KitError: When a named column is not there, or no column or several fit.
    """
    for name in (text, label):
        if name and name not in columns.cells:
            raise KitError(f"{columns.source}: {unknown('column', name, list(columns.cells))}")
    if text and text == label:
        raise KitError(f"{columns.source}: the texts and the labels are the same column, {text!r}")
    looks = _looks(columns)
    asked = "as asked for"
    if not text:
        text, why_text = _chosen(
            columns.source, [look for look in looks if look.name != label], lambda look: look.texts, TEXT_NAMES,
            "texts", "several words a row, most rows different", "text_column",
        )  # fmt: skip
    else:
        why_text = asked
    if not label:
        label, why_label = _chosen(
            columns.source, [look for look in looks if look.name != text], lambda look: look.labels, LABEL_NAMES,
            "labels", "few short values that come again", "label_column",
        )  # fmt: skip
    else:
        why_label = asked
    return Guess(text, label, why_text, why_label)


def _chosen(
    source: str,
    looks: Sequence[_Look],
    fits: Callable[[_Look], bool],
    names: Sequence[str],
    what: str,
    kind: str,
    parameter: str,
) -> tuple[str, str]:
    """Return the one column that fits, and why; refuse none and several."""
    fitting = [look for look in looks if fits(look)]
    if len(fitting) == 1:
        return fitting[0].name, f"the only column with {kind}"
    named = [look for look in fitting if set(names) & set(re.split(r"[\W_]+", look.name.casefold()))]
    if len(named) == 1:
        others = " and ".join(repr(look.name) for look in fitting if look is not named[0])
        return named[0].name, f"{kind}, as {others} too, but its name says that it is the one"
    shown = ", ".join(map(str, (fitting or looks)[:8]))
    if fitting:
        raise KitError(f"{source}: which column holds the {what} is unclear: {shown}. Name it: {parameter}")
    raise KitError(f"{source}: no column looks like {what} ({kind}): {shown}. Name it: {parameter}")


def _looks(columns: Columns) -> list[_Look]:
    found = []
    for name, cells in columns.cells.items():
        values = [str(cell).strip() for cell in cells if cell is not None and str(cell).strip()]
        found.append(
            _Look(
                name=name,
                filled=len(values),
                different=len(set(values)),
                words=sum(len(value.split()) for value in values) / max(len(values), 1),
                first=values[0] if values else "",
                fractions=bool(values) and any(_FRACTION.fullmatch(value) for value in values),
                numbers=bool(values) and all(_NUMBER.fullmatch(value) for value in values),
            )
        )
    return found
