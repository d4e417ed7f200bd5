"""Tables in memory: lists, dicts, data frames, Arrow tables, datasets."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from ..errors import KitError, unknown
from .formats import ENDINGS
from .splitting import as_seen


class Rows(NamedTuple):
    """A table's two columns, checked cell by cell.

    Args:
        source: The table's name in messages: a file's path, or e.g. `train`.
        texts: One text per row.
        labels: One label per row, without surrounding spaces.
        places: Each row's position, for messages: `rows.csv, line 17`.
    """

    source: str
    texts: list[str]
    labels: list[str]
    places: Sequence[str]


class Places(Sequence[str]):
    """The position of each row (`rows.csv, line 17`), built only when asked for."""

    def __init__(self, source: str, kind: str, numbers: Sequence[int]) -> None:
        self.source, self.kind, self.numbers = source, kind, numbers

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: Any) -> Any:
        return f"{self.source}, {self.kind} {self.numbers[index]}"


def numbered(source: str, rows: Sequence[Any]) -> Places:
    """Return the positions of rows that are counted from 1: `source, row 1`."""
    return Places(source, "row", range(1, len(rows) + 1))


# ---- Python objects ----


def is_table(thing: Any) -> bool:
    """Return whether something is a `datasets.Dataset`, a pandas DataFrame or a table with an Arrow interface."""
    return _is_dataset(thing) or _is_frame(thing) or _is_arrow(thing)


def is_dict_of_tables(thing: Any) -> bool:
    """Return whether something holds tables (or lists of dicts) by name, as a `datasets.DatasetDict` does."""
    return (
        isinstance(thing, Mapping)
        and len(thing) > 0
        and all(is_table(table) or _is_records(table) for table in thing.values())
    )


def read_table(thing: Any, text: str, label: str, source: str) -> Rows:
    """Read the two columns of a Python object that holds rows.

    Args:
        thing: A `datasets.Dataset`, a pandas DataFrame, an Arrow table (pyarrow's, or another that speaks Arrow's
            stream interface), a list of dicts, or a dict of columns.
        text: The column of the texts.
        label: The column of the labels.
        source: Its name in messages.

    Returns:
        The rows. Numbers of a `datasets.ClassLabel` become names, even if only an Arrow schema has the names.

    Raises:
        KitError: For an unsupported object, a missing column or a bad cell (with its row).
    """
    refuse_same(text, label)
    columns = _columns(thing, (text, label), source)
    if columns is None:
        raise not_rows(thing, source)
    texts, labels = columns
    return checked_rows(source, texts, labels, numbered(source, texts), text, label)


def not_rows(thing: Any, source: str) -> KitError:
    """Return the error for something that has no rows of text and label."""
    what = f"a {type(thing).__name__}"
    if isinstance(thing, list | tuple | dict) and not thing:
        what += " without rows"
    elif isinstance(thing, list | tuple) and all(isinstance(item, str) for item in thing):
        what += " of texts without labels"
    return KitError(
        f"{source} is {what}. Allowed: the path of a file that ends in {ENDINGS}, a list of such paths, a list of "
        "dicts, a dict of columns, a datasets.Dataset or DatasetDict, a pandas DataFrame, an Arrow table, or a hub "
        "data set as owner/name, as in text_classification('rows.csv', text='question', label='topic')."
    )


def _is_dataset(thing: Any) -> bool:
    return hasattr(thing, "column_names") and hasattr(thing, "features") and not isinstance(thing, Mapping)


def _is_frame(thing: Any) -> bool:
    return type(thing).__module__.partition(".")[0] == "pandas" and hasattr(thing, "columns")


def _is_arrow(thing: Any) -> bool:
    streams = hasattr(thing, "__arrow_c_stream__") or hasattr(thing, "__arrow_c_array__")
    return streams and (hasattr(thing, "column_names") or hasattr(thing, "columns"))  # a single column has neither


def _is_records(thing: Any) -> bool:
    return isinstance(thing, list | tuple) and len(thing) > 0 and isinstance(thing[0], Mapping)


def is_columns(thing: Any) -> bool:
    """Return whether something is a dict of columns."""
    return isinstance(thing, Mapping) and len(thing) > 0 and all(map(_is_column, thing.values()))


def _is_column(thing: Any) -> bool:
    if isinstance(thing, list | tuple):
        return True
    return hasattr(thing, "tolist") and np.ndim(thing) == 1


def _columns(thing: Any, names: Sequence[str], source: str) -> list[list[Any]] | None:
    """Return columns of a table as lists, or None if it is not a table."""
    if _is_dataset(thing):
        refuse_columns(list(thing.column_names or []), names, source)
        if not hasattr(thing, "with_format") or not hasattr(thing, "__len__"):
            raise KitError(f"{source}: a streamed data set has no length: load it without streaming")
        plain = thing.with_format(None)
        return [_named(list(plain[name]), thing.features[name]) for name in names]
    if _is_frame(thing):
        refuse_columns(list(thing.columns), names, source)
        return [thing[name].tolist() for name in names]
    if _is_arrow(thing):
        import pyarrow

        try:
            table = pyarrow.table(thing)
        except (pyarrow.ArrowException, TypeError, ValueError) as error:
            raise KitError(f"{source} cannot be read as an Arrow table ({first_line(error)})") from error
        refuse_columns(table.column_names, names, source)
        features = _features(table.schema, source)
        return [_named(table.column(name).to_pylist(), features.get(name)) for name in names]
    if _is_records(thing):
        return of_records(thing, names, source, numbered(source, thing))
    if is_columns(thing):
        refuse_columns(list(thing), names, source)
        found = [list(c) if isinstance(c, list | tuple) else c.tolist() for c in (thing[name] for name in names)]
        if len({len(column) for column in found}) > 1:
            raise KitError(f"{source}: columns of {' and '.join(str(len(column)) for column in found)} rows")
        return found
    return None


def of_records(records: Sequence[Any], names: Sequence[str], source: str, places: Sequence[str]) -> list[list[Any]]:
    """Return columns of a list of dicts."""
    for record, place in zip(records, places, strict=True):
        if not isinstance(record, Mapping):
            raise KitError(f"{place}: {record!r:.60} ({type(record).__name__}) where a row is an object with names")
    known = list(dict.fromkeys(name for record in records for name in record))
    refuse_columns(known, names, source)
    for record, place in zip(records, places, strict=True):
        for name in names:
            if name not in record:
                raise KitError(f"{place}: {unknown('column', name, record)}")
    return [[record[name] for record in records] for name in names]


def _features(schema: Any, source: str) -> Mapping[str, Any]:
    """Return the features that `datasets` has written into an Arrow schema; they have the names of classes."""
    if b"huggingface" not in (schema.metadata or {}):
        return {}
    import datasets

    try:
        return datasets.Features.from_arrow_schema(schema)
    except Exception as error:  # JSON of any shape
        raise KitError(f"{source}: the features in its schema are damaged ({first_line(error)})") from error


def _named(values: list[Any], feature: Any) -> list[Any]:
    """Replace the numbers of a ClassLabel by names; -1 becomes None."""
    names = getattr(feature, "names", None)
    if names is None:
        return values
    return [names[v] if isinstance(v, int) and 0 <= v < len(names) else None for v in values]


def refuse_columns(columns: Sequence[Any], names: Sequence[str], source: str) -> None:
    """Refuse a table if one of the columns is missing or occurs twice."""
    for name in names:
        if name not in columns:
            raise KitError(f"{source}: {unknown('column', name, columns)}")
        if columns.count(name) > 1:
            raise KitError(f"{source}: there are {columns.count(name)} columns called {name!r}")


def refuse_same(text: str, label: str) -> None:
    """Refuse one column for both texts and labels."""
    if text == label:
        raise KitError(f"data.text and data.label are the same column, {text!r}")


# ---- texts without labels ----


def texts_of(thing: Any, text: str | None = None, *, call: str = "predict") -> list[str]:
    """Return the texts in something, in their order, or refuse what is not clearly a list of texts.

    Args:
        thing: A list, tuple, generator, pandas Series, NumPy array of one dimension, Arrow array or column of a
            `datasets.Dataset`; or, with `text`, a table: what `read_table` takes.
        text: The column's name, if `thing` is a table.
        call: The function's name, for messages.

    Returns:
        Plain Python strings.

    Raises:
        KitError: For a single string, bytes, a dict, a set or another object; a table without `text`; and an item
            that is not text, has no visible character or is not valid Unicode.
    """
    kind = type(thing).__name__
    if text is not None:
        columns = _columns(thing, [text], f"the {kind}")
        if columns is None:
            raise KitError(f"{call} was given text={text!r}, which names a column, and a {kind}, which has none")
        items = columns[0]
    else:
        items = _items(thing, kind, call)
    return [_text(item, place) for place, item in enumerate(items)]


def _items(thing: Any, kind: str, call: str) -> list[Any]:
    if isinstance(thing, str):
        raise KitError(f"{call} takes a list of texts: write {call}([text])")
    if is_dict_of_tables(thing):
        raise KitError(f"{call} was given a {kind} of tables: write {call}(tables['test'], text='column')")
    if is_table(thing) or _is_records(thing) or is_columns(thing):
        what = f"{kind} of dicts" if _is_records(thing) else kind
        raise KitError(f"{call} was given a {what}, which has columns: write {call}(…, text='column')")
    if isinstance(thing, set | frozenset):
        raise KitError(f"{call} was given a {kind}, which has no order: write {call}(sorted(texts))")
    if not isinstance(thing, Iterable) or isinstance(thing, Mapping | bytes | bytearray | memoryview):
        inside = next((name for name in ("texts", "train") if hasattr(thing, name)), None)
        more = f"; its texts are its .{'texts' if inside == 'texts' else 'test.texts'}" if inside else ""
        raise KitError(
            f"{call} was given a {kind} as texts: allowed is a list of texts, as in {call}(['a text']){more}"
        )
    to_list = getattr(thing, "tolist", None) or getattr(thing, "to_pylist", None)  # pandas and NumPy; Arrow
    found = list(thing) if to_list is None else to_list()
    if not isinstance(found, list):
        raise KitError(f"{call} was given a {kind} without a dimension: write {call}([text])")
    return found


def _text(item: Any, place: int) -> str:
    if not isinstance(item, str) or not as_seen(item).strip():
        shown = " ".join(f"{item!r:.60}".split())
        raise KitError(f"text {place} is {shown}: allowed are texts with at least one visible character")
    if not _encodable(item):
        raise KitError(f"text {place} ({ascii(item)[:60]}) is no valid Unicode: it was read with a wrong encoding")
    return str(item)


# ---- cells ----


def checked_texts(source: str, texts: Sequence[Any], places: Sequence[str], text: str) -> list[str]:
    """Check every cell of a column of texts; the error names the first bad row and counts the others.

    Args:
        source: The table's name in messages.
        texts: The cells.
        places: Each row's position, for messages.
        text: The column's name.

    Returns:
        Plain Python strings.

    Raises:
        KitError: For a table without rows, and for a cell that is missing, empty, no text or no valid Unicode.
    """
    if not texts:
        raise KitError(f"{source} has no rows")
    rows = range(len(texts))
    _refuse([i for i in rows if _missing(texts[i])], places, f"no text in column {text!r}")
    bad = [i for i in rows if not isinstance(texts[i], str)]
    if bad:
        kind = type(texts[bad[0]]).__name__
        _refuse(bad, places, f"column {text!r} holds {texts[bad[0]]!r:.60} ({kind}), which is no text")
    _refuse([i for i in rows if not as_seen(texts[i]).strip()], places, f"the text in column {text!r} is empty")
    _refuse([i for i in rows if "\0" in texts[i]], places, f"the text in column {text!r} holds a NUL character")
    _refuse([i for i in rows if not _encodable(texts[i])], places, f"the text in column {text!r} is no valid Unicode")
    return [str(item) for item in texts]


def _refuse(bad: Sequence[int], places: Sequence[str], problem: str) -> None:
    """Refuse the rows at `bad`, if there are any: the first one by its place."""
    if bad:
        more = f" ({len(bad) - 1} more such row{'s' if len(bad) > 2 else ''})" if len(bad) > 1 else ""
        raise KitError(f"{places[bad[0]]}: {problem}{more}")


def checked_rows(
    source: str, texts: list[Any], labels: list[Any], places: Sequence[str], text: str, label: str
) -> Rows:
    """Check every cell; the error names the first bad row and counts the others."""
    checked = checked_texts(source, texts, places, text)
    rows = range(len(texts))
    missing = [i for i in rows if _missing(labels[i]) or (isinstance(labels[i], str) and not labels[i])]
    _refuse(missing, places, f"no label in column {label!r}")
    kinds = Counter(_kind(value) for value in labels)
    bad = [i for i in rows if _kind(labels[i]) is None]
    if bad:
        value = labels[bad[0]]
        _refuse(bad, places, f"label {value!r:.60} ({type(value).__name__}); labels are text or whole numbers")
    if len(kinds) > 1:
        usual = kinds.most_common(1)[0][0]
        bad = [i for i in rows if _kind(labels[i]) != usual]
        _refuse(bad, places, f"label {labels[bad[0]]!r:.60} where most labels are {usual}: make them one type")
    names = [value.strip() if isinstance(value, str) else str(value) for value in labels]
    _refuse([i for i in rows if not as_seen(names[i]).strip()], places, f"the label in column {label!r} is empty")
    _refuse(
        [i for i in rows if "\0" in names[i] or not _encodable(names[i])],
        places,
        f"label {label!r} is no valid Unicode",
    )
    return Rows(source, checked, [str(name) for name in names], places)


def _kind(label: Any) -> str | None:
    if isinstance(label, bool | np.bool_):
        return "true or false"
    if isinstance(label, int | np.integer):
        return "whole numbers"
    return "text" if isinstance(label, str) else None


def _missing(value: Any) -> bool:
    # pandas' NA and NaT are recognised by class name, so that pandas need not be imported.
    return (
        value is None or type(value).__name__ in ("NAType", "NaTType") or (isinstance(value, float) and value != value)
    )


def _encodable(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


# ---- small things ----


def short(text: str, most: int = 40) -> str:
    """Return a text as messages quote it, cut after `most` characters."""
    return repr(text if len(text) <= most else text[:most] + "…")


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or its type's name."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
