"""Whole tables: every column and row of every format, and bad files refused with their place."""

import gzip
import json
import re
from pathlib import Path

import pytest

import qlora_kit as qk
from qlora_kit.data.whole import as_text, read_whole

ROWS = [{"id": 7, "question": 'a, "b"\nc', "note": None}, {"id": 8, "question": "d", "note": "e"}]


def csv_of(delimiter: str) -> str:
    return (
        delimiter.join(("id", "question", "note"))
        + "\n"
        + "\n".join([delimiter.join(("7", '"a, ""b""\nc"', "")), delimiter.join(("8", "d", "e"))])
    )


@pytest.mark.parametrize(
    "name", ["r.csv", "r.csv.gz", "semicolons.csv", "r.jsonl", "r.json", "c.json", "r.parquet", "r.xlsx"]
)
def test_every_format_gives_all_columns_and_rows(tmp_path: Path, name: str):
    import pandas as pd

    path = tmp_path / name
    frame = pd.DataFrame(ROWS)
    if name.endswith(".parquet"):
        frame.to_parquet(path)
    elif name.endswith(".xlsx"):
        frame.to_excel(path, index=False)
    else:
        text = {
            "r.jsonl": "\n".join(json.dumps(row) for row in ROWS),
            "r.json": json.dumps(ROWS),
            "c.json": json.dumps({key: [row[key] for row in ROWS] for key in ROWS[0]}),
        }.get(name) or csv_of(";" if name.startswith("semi") else ",")
        path.write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    table = read_whole(path)
    assert table.columns == ["id", "question", "note"]
    assert [[as_text(cell) for cell in row] for row in table.rows] == [["7", 'a, "b"\nc', ""], ["8", "d", "e"]]
    last = {"csv": "line 4", "gz": "line 4", "jsonl": "line 2", "xlsx": "row 3"}.get(name.rpartition(".")[2], "row 2")
    assert table.places[1] == f"{path}, {last}"


def test_the_expected_column_decides_on_the_delimiter(tmp_path: Path):
    (tmp_path / "r.csv").write_text("text|a,b,c\nHello|1,2,3\n")
    assert read_whole(tmp_path / "r.csv").columns == ["text|a", "b", "c"]
    assert read_whole(tmp_path / "r.csv", "text").rows == [["Hello", "1,2,3"]]


def test_a_byte_order_mark_is_noted_and_belongs_to_no_name(tmp_path: Path):
    (tmp_path / "r.csv").write_bytes("﻿text\nä\n".encode())
    table = read_whole(tmp_path / "r.csv")
    assert table.marked and table.columns == ["text"]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("r.csv", b"a,b\n1,2\n1,2,3\n", "line 3: 3 columns where the header has 2"),
        ("r.csv", b"a,b\n1,\"2\n", "line 2: a double quote is opened"),
        ("r.csv", b"a,b\n1,\xff\n", "line 2: byte 0xff is not UTF-8"),
        ("r.csv", b"a,a\n1,2\n", "there are 2 columns called 'a'"),
        ("r.csv", b"a,b\n", "has no rows"),
        ("r.csv", b"", "is empty"),
        ("r.json", b"[1]", "row 1: 1 (int) where a row is an object with names"),
        ("r.json", b'{"a": [1], "b": [1, 2]}', "its columns have different lengths"),
        ("r.json", b"7", "allowed is a list of objects"),
        ("r.parquet", b"PAR1", "damaged or cut off"),
        ("r.xlsx", b"PK", "damaged or cut off"),
        ("r.pdf", b"x", "files end in .csv"),
    ],
)  # fmt: skip
def test_a_bad_file_is_refused_in_a_line(tmp_path: Path, name: str, content: bytes, said: str):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(qk.KitError, match=re.escape(said)) as error:
        read_whole(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_of_several_sheets_the_one_with_the_expected_column_is_read(tmp_path: Path):
    import pandas as pd

    with pd.ExcelWriter(tmp_path / "r.xlsx") as book:
        pd.DataFrame({"a": [1]}).to_excel(book, sheet_name="one", index=False)
        pd.DataFrame({"text": ["b"]}).to_excel(book, sheet_name="two", index=False)
    assert read_whole(tmp_path / "r.xlsx", "text").rows == [["b"]]
    with pytest.raises(qk.KitError, match="has 2 sheets"):
        read_whole(tmp_path / "r.xlsx", "body")
