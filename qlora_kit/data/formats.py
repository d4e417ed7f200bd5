"""File formats that can be read, by file name ending."""

from __future__ import annotations

from pathlib import Path

_PACKED = (".csv", ".tsv", ".jsonl", ".json")  # formats that may be gzipped, as rows.csv.gz
SUFFIXES = (*_PACKED, ".parquet", ".xlsx")
ENDINGS = f"{', '.join(_PACKED)} (each also with .gz), .parquet, .xlsx"
# Names with these endings are files. They are never looked up on the hub, even if the file does not exist.
_OTHER_SUFFIXES = (".txt", ".ndjson", ".xls", ".ods", ".gz", ".zip", ".arrow", ".feather", ".pq")


def format_of(path: Path) -> str | None:
    """Return the ending that decides how a file is read (`.csv` for `rows.csv.gz`), or None if it cannot be read."""
    name = path.name.lower()
    suffix = Path(name.removesuffix(".gz")).suffix
    return suffix if suffix in (_PACKED if name.endswith(".gz") else SUFFIXES) else None
