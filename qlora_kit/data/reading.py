"""Tables read from files: CSV, TSV, JSON, JSON Lines, Parquet, Excel, also compressed.

For all formats, each cell is checked in one place (`tables`), and messages name the file and the line or row. Ambiguous
files are refused: a table without a named column, a TSV file with quotes.
"""

from __future__ import annotations

import contextlib
import csv
import glob
import gzip
import io
import json
import os
import re
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import KitError, either, nearest, unknown
from .formats import _OTHER_SUFFIXES, ENDINGS, SUFFIXES, format_of
from .tables import (
    Places,
    Rows,
    checked_rows,
    first_line,
    is_columns,
    numbered,
    of_records,
    read_table,
    refuse_columns,
    refuse_same,
    short,
)

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
DELIMITERS = (",", ";", "\t", "|")


def existing_files(name: str) -> list[Path] | None:
    """Find the files for a path or pattern.

    Args:
        name: A path, or a shell pattern (`parts/*.csv`), whose files are sorted by name.

    Returns:
        The files, or None if there is none and the name can only be a data set on the hub.

    Raises:
        KitError: The file does not exist, is a folder or not a regular file, or its ending is not supported.
    """
    try:
        path = Path(name).expanduser()
        found = [path] if path.exists() else [Path(item) for item in sorted(glob.glob(str(path), recursive=True))]
        inside = sorted(p.name for p in path.iterdir() if format_of(p))[:5] if path.is_dir() else None
        near_folder = path.parent != Path() and path.parent.is_dir()
    except (OSError, RuntimeError, ValueError) as error:
        why = getattr(error, "strerror", None) or first_line(error)
        raise KitError(f"the file {short(name, 200)} cannot be read: {why}") from error
    if inside is not None:
        raise KitError(f"{name} is a folder: name the file in it" + (f", e.g. {path / inside[0]}" if inside else ""))
    for file in found:
        if not file.is_file():
            raise KitError(f"{file} is no regular file: name a file that can be read more than once")
        if format_of(file) is None:
            raise KitError(f"{file}: files end in {ENDINGS}; this one has {file.suffix or 'no ending'!r}")
    if found:
        return found
    # If the parent folder exists, the name is more likely a mistyped path than a hub data set.
    pathlike = (
        path.suffix.lower() in (*SUFFIXES, *_OTHER_SUFFIXES)
        or path.is_absolute()
        or name.startswith(("./", "../", "~"))
        or near_folder
    )
    if not pathlike and _HUB_NAME.fullmatch(name):
        return None
    guess = _nearest_file(path)
    raise KitError(
        f"there is no file {name!r}."
        + (f" Did you mean {guess!r}?" if guess else "")
        + f" Allowed: banking77, a file that ends in {ENDINGS}, or a hub data set as owner/name."
    )


def is_hub_name(name: str) -> bool:
    """Return whether a data set of that name would be looked up on the hub: it is no file, folder or path."""
    try:
        return existing_files(name) is None
    except KitError:
        return False


def _nearest_file(path: Path) -> str | None:
    """Return the existing data file most similar to `path`: in its folder (or the current one) or one level below."""
    folder = path.parent if path.parent.is_dir() else Path()
    try:
        found = [p for pattern in ("*", "*/*") for p in folder.glob(pattern) if p.is_file() and format_of(p)][:1000]
    except OSError:
        return None
    by_path = nearest(str(path), [str(p) for p in found])
    if by_path is not None:
        return by_path
    by_name = nearest(path.name, [p.name for p in found])
    return next((str(p) for p in found if p.name == by_name), None)


# ---- files ----


def read_files(paths: Sequence[Path], text: str, label: str) -> Rows:
    """Read the two columns of one or more files, one after the other.

    In a CSV file, a quote opens a quoted cell. In a TSV file with tabs between cells, it is an ordinary character; a
    cell that looks quoted (`"5"" screen"`) is refused because it is ambiguous.

    Args:
        paths: Files that end in one of `SUFFIXES`; text formats may be gzipped.
        text: The column of the texts.
        label: The column of the labels.

    Returns:
        The rows of all files, in the order of the paths.

    Raises:
        KitError: For a bad file or cell, with the file and the line or row.
    """
    parts = [_read_file(path, text, label) for path in paths]
    if len(parts) == 1:
        return parts[0]
    return Rows(
        f"{paths[0]} and {len(paths) - 1} more",
        [item for part in parts for item in part.texts],
        [item for part in parts for item in part.labels],
        [item for part in parts for item in part.places],
    )


def _read_file(path: Path, text: str, label: str) -> Rows:
    refuse_same(text, label)
    ending = format_of(path)
    if ending == ".parquet":
        return _read_parquet(path, text, label)
    if ending == ".xlsx":
        return _read_excel(path, text, label)
    raw = raw_bytes(path)
    if ending in (".csv", ".tsv"):
        return parse_csv(raw, str(path), text, label, tsv=ending == ".tsv")
    return (_parse_json_lines if ending == ".jsonl" else _parse_json)(raw, str(path), text, label)


def raw_bytes(path: Path) -> bytes:
    """Return a file's bytes, unpacked if its name ends in `.gz`; refuse one that cannot be read or unpacked."""
    try:
        raw = path.read_bytes()
        return gzip.decompress(raw) if path.name.lower().endswith(".gz") else raw
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise KitError(f"{path} cannot be unpacked: it is damaged or cut off ({first_line(error)})") from error
    except OSError as error:
        raise KitError(f"{path} cannot be read: {error.strerror}") from error


def decoded(raw: bytes, source: str) -> str:
    """Decode a text file: UTF-8, with or without a byte order mark."""
    for mark, encoding in ((b"\xff\xfe", "UTF-16"), (b"\xfe\xff", "UTF-16")):
        if raw.startswith(mark):
            raise KitError(f"{source} is encoded as {encoding}: save it as UTF-8")
    raw = raw.removeprefix(b"\xef\xbb\xbf")
    if not raw.strip():
        raise KitError(f"{source} is empty")
    try:
        content = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line = _line_at(raw, error.start)
        raise KitError(
            f"{source}, line {line}: byte 0x{raw[error.start]:02x} is not UTF-8: save the file as UTF-8"
        ) from error
    if "\0" in content:
        line = _line_at(raw, raw.index(b"\0"))
        raise KitError(f"{source}, line {line}: a NUL character; the file is damaged, or encoded as UTF-16 or 32")
    return content


def parse_csv(raw: bytes, source: str, text: str, label: str, *, tsv: bool = False) -> Rows:
    """Read the two columns of a CSV or TSV file's bytes.

    Args:
        raw: The file's bytes, UTF-8.
        source: Its name in messages.
        text: The column of the texts.
        label: The column of the labels.
        tsv: Whether it is a TSV file, where a quote is an ordinary character.

    Raises:
        KitError: For a bad file or cell, with the line, counted from 1 as in an editor.
    """
    content = decoded(raw, source)
    dialect, header_lines, columns = _csv_header(content, source, text, label, tsv)
    text_at, label_at = columns.index(text), columns.index(label)
    texts, labels, numbers = [], [], []
    for number, cells in csv_rows(content, source, dialect, header_lines, columns):
        texts.append(cells[text_at])
        labels.append(cells[label_at].strip())
        numbers.append(number)
    rows = checked_rows(source, texts, labels, Places(source, "line", numbers), text, label)
    _refuse_cut_off(raw, rows)
    return rows


@contextlib.contextmanager
def cells_of_any_length(content: str) -> Iterator[None]:
    """Let the csv module read cells as long as the file within a block."""
    previous_limit = csv.field_size_limit(max(csv.field_size_limit(), len(content) + 1))
    try:
        yield
    finally:
        csv.field_size_limit(previous_limit)


def csv_rows(
    content: str, source: str, dialect: Mapping[str, Any], header_lines: int, columns: Sequence[str]
) -> Iterator[tuple[int, list[str]]]:
    """Yield the rows below the header of a CSV or TSV file, each with the number of the line where it starts.

    Args:
        content: The whole file.
        source: Its name in messages.
        dialect: Options of `csv.reader`.
        header_lines: The header's last line, counted from 1.
        columns: The header's names.

    Yields:
        The line, counted from 1 as in an editor, and as many cells as there are columns.

    Raises:
        KitError: For a row with more or fewer cells, or with a quote that is not rightly closed.
    """
    plain_quotes = dialect["quoting"] == csv.QUOTE_NONE
    start = 1
    with cells_of_any_length(content):
        reader = csv.reader(io.StringIO(content, newline=""), **dialect)
        try:
            for cells in reader:
                number, start = start, reader.line_num + 1
                if number <= header_lines or not cells:
                    continue
                if plain_quotes and any(map(_seems_quoted, cells)):
                    raise _quoted_tsv(source, number)
                if len(cells) != len(columns):
                    if plain_quotes and any(cell.startswith('"') for cell in cells):
                        raise _quoted_tsv(source, number)
                    needs = "stand in double quotes" if not plain_quotes else "be taken out of it"
                    raise KitError(
                        f"{source}, line {number}: {len(cells)} columns where the header has {len(columns)}; a "
                        f"text with a {dialect['delimiter']!r}, a quote or a line break in it must {needs}"
                    )
                yield number, cells
        except csv.Error as error:
            raise KitError(
                f"{source}, line {start}: a double quote is opened and never rightly closed ({error}); "
                'a quote within a quoted text is written twice: ""'
            ) from error


def _csv_header(content: str, source: str, text: str, label: str, tsv: bool) -> tuple[dict[str, Any], int, list[str]]:
    """Find the CSV dialect whose header has both columns; return its options, the header's last line, the columns."""
    seen: list[list[str]] = []
    first = "\t" if tsv else ","
    for delimiter in (first, *(d for d in DELIMITERS if d != first)):
        quoting = csv.QUOTE_NONE if tsv and delimiter == "\t" else csv.QUOTE_MINIMAL
        dialect = {"delimiter": delimiter, "quoting": quoting, "strict": True}
        reader = csv.reader(io.StringIO(content, newline=""), **dialect)  # type: ignore[arg-type]
        try:
            columns = next((cells for cells in reader if cells), [])
        except csv.Error:
            continue
        columns = [name.strip() for name in columns]
        if text in columns and label in columns:
            for name in (text, label):
                if columns.count(name) > 1:
                    raise KitError(f"{source}: the header has {columns.count(name)} columns called {name!r}")
            return dialect, reader.line_num, columns
        if quoting == csv.QUOTE_NONE and {f'"{text}"', f'"{label}"'} <= set(columns):
            raise _quoted_tsv(source, 1)
        seen.append(columns)
    if not seen:
        raise KitError(f"{source}, line 1: a double quote is opened and never rightly closed")
    columns = max(seen, key=len)
    missing = text if text not in columns else label
    shown = [short(name) for name in columns[:20]]
    error = unknown("column", missing, [name.strip("'") for name in shown])
    options = either("text= and label=", "--text and --label")
    raise KitError(f"{source}: {error} The first line names the columns; choose them with {options}.")


def _seems_quoted(cell: str) -> bool:
    """Return whether a cell looks like a CSV writer's output for a text with a quote in it: `"5"" screen"`."""
    return (
        len(cell) > 3 and cell[0] == cell[-1] == '"' and '""' in cell[1:-1] and '"' not in cell[1:-1].replace('""', "")
    )


def _quoted_tsv(source: str, line: int) -> KitError:
    return KitError(
        f"{source}, line {line}: the cell seems to be quoted as in a CSV file, and in TSV a quote is a character: name "
        "the file .csv (tabs may part its cells), or write it with csv.QUOTE_NONE"
    )


def _refuse_cut_off(raw: bytes, rows: Rows) -> None:
    """Refuse a last row whose label was cut off: `card_arri` would become a class of its own."""
    last = rows.labels[-1]
    if raw.endswith((b"\n", b"\r")) or rows.labels.count(last) > 1:
        return
    whole = next((label for label in rows.labels if label != last and label.startswith(last)), None)
    if whole is not None:
        raise KitError(
            f"{rows.places[-1]}: the file ends without a line break in label {last!r}, which "
            f"begins like {whole!r}: it seems to be cut off there. If it is whole, end it with a line break."
        )


def _parse_json_lines(raw: bytes, source: str, text: str, label: str) -> Rows:
    records, numbers = [], []
    # Not splitlines: a text may contain U+2028, which JSON does not escape.
    for number, line in enumerate(decoded(raw, source).split("\n"), 1):
        if line.strip():
            records.append(json_of(line, f"{source}, line {number}"))
            numbers.append(number)
    return _rows_of_records(records, text, label, source, Places(source, "line", numbers))


def _parse_json(raw: bytes, source: str, text: str, label: str) -> Rows:
    content = json_of(decoded(raw, source), source)
    if isinstance(content, list) and content:
        return _rows_of_records(content, text, label, source, numbered(source, content))
    if not is_columns(content):
        raise KitError(
            f"{source} holds {short(json.dumps(content))}: allowed is a list of objects, each with {text!r} and "
            f"{label!r}, or one object with two such lists. Objects of a line each go into a .jsonl file"
        )
    return read_table(content, text, label, source)


def _rows_of_records(records: Sequence[Any], text: str, label: str, source: str, places: Sequence[str]) -> Rows:
    texts, labels = of_records(records, (text, label), source, places)
    return checked_rows(source, texts, labels, places, text, label)


def json_of(content: str, where: str) -> Any:
    """Parse JSON; refuse a name that occurs twice in one object (Python would take the last)."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            name = Counter(name for name, _ in pairs).most_common(1)[0][0]
            raise KitError(f"{where}: the name {name!r} stands twice in one object")
        return found

    try:
        return json.loads(content, object_pairs_hook=once)
    except json.JSONDecodeError as error:
        more = " Objects of a line each go into a .jsonl file." if error.msg == "Extra data" else ""
        raise KitError(f"{where}: no valid JSON, or cut off ({error}).{more}") from error
    except (ValueError, RecursionError) as error:
        if isinstance(error, KitError):
            raise
        raise KitError(f"{where}: no JSON that can be read ({first_line(error)})") from error


def _read_parquet(path: Path, text: str, label: str) -> Rows:
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
        refuse_columns(file.schema_arrow.names, (text, label), str(path))
        return read_table(file.read(columns=[text, label]), text, label, str(path))
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise KitError(f"{path} cannot be read as Parquet: it is damaged or cut off ({first_line(error)})") from error


def sheets_of(path: Path) -> dict[str, list[tuple[int, tuple[Any, ...]]]]:
    """Return the rows of an Excel file's sheets that have a cell, by the sheet's title, each with its number.

    Args:
        path: The file.

    Raises:
        KitError: When openpyxl is not installed, or the file is damaged.
    """
    try:
        import openpyxl
    except ImportError as error:
        raise KitError(f"{path}: reading .xlsx needs the package openpyxl: pip install openpyxl") from error
    sheets: dict[str, list[tuple[int, tuple[Any, ...]]]] = {}
    try:
        book = openpyxl.load_workbook(path, read_only=True, data_only=True)
        for sheet in book.worksheets:
            sheet.reset_dimensions()  # the size noted in the file can be wrong
            rows = enumerate(sheet.iter_rows(values_only=True), 1)
            sheets[sheet.title] = [(number, row) for number, row in rows if any(cell is not None for cell in row)]
        book.close()
    except Exception as error:  # a zip of XML files: its errors have no common base class
        raise KitError(f"{path} cannot be read as Excel: it is damaged or cut off ({first_line(error)})") from error
    return sheets


def _read_excel(path: Path, text: str, label: str) -> Rows:
    """Read the one sheet that has both columns; its first non-empty row is the header."""
    sheets = sheets_of(path)
    headers = {title: [header_cell(cell) for cell in rows[0][1]] for title, rows in sheets.items() if rows}
    if not headers:
        raise KitError(f"{path} is empty")
    fitting = [title for title, columns in headers.items() if {text, label} <= set(columns)]
    if len(fitting) > 1:
        raise KitError(f"{path}: {len(fitting)} sheets have both columns ({', '.join(map(repr, fitting))}): keep one")
    title = fitting[0] if fitting else next(iter(headers))
    refuse_columns(headers[title], (text, label), str(path))
    places = Places(str(path), "row", [number for number, _ in sheets[title][1:]])
    at = [headers[title].index(name) for name in (text, label)]
    # A row of a sheet ends at its last cell that is not empty.
    texts, labels = ([row[i] if i < len(row) else None for _, row in sheets[title][1:]] for i in at)
    return checked_rows(str(path), texts, labels, places, text, label)


def header_cell(cell: Any) -> str:
    """Return a column's name from the cell of an Excel file's header."""
    return "" if cell is None else str(cell).strip()


def are_files(thing: Any) -> bool:
    """Return whether something is a list of file names."""
    return (
        isinstance(thing, list | tuple)
        and len(thing) > 0
        and all(isinstance(item, str | os.PathLike) for item in thing)
        and all(Path(item).suffix.lower() in (*SUFFIXES, *_OTHER_SUFFIXES) for item in thing)
    )


def _line_at(raw: bytes, position: int) -> int:
    """Return the line of a byte, counted from 1 as in an editor (CRLF, LF and CR each end a line)."""
    return raw[:position].replace(b"\r\n", b"\n").replace(b"\r", b"\n").count(b"\n") + 1
