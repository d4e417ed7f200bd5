"""Which columns of a user's file hold texts and labels: guessed where that is clear, else refused in a line."""

from __future__ import annotations

import csv
import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from qlora_kit.data.columns import Columns, guess_columns, read_columns
from qlora_kit.errors import KitError

ROWS = [
    {"id": number, "question": f"where is my card number {number}", "topic": ("card", "money", "app")[number % 3]}
    for number in range(30)
]


def write(path: Path, rows: list[dict[str, Any]], delimiter: str = ",") -> Path:
    """Write rows as CSV."""
    with open(path, "w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, list(rows[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)
    return path


def of(**columns: list[Any]) -> Columns:
    return Columns("rows.csv", columns)


TEXTS = [row["question"] for row in ROWS]
TOPICS = [row["topic"] for row in ROWS]


@pytest.mark.parametrize("ending", ["csv", "csv;", "csv.gz", "tsv", "jsonl", "json", "columns.json", "parquet", "xlsx"])
def test_the_columns_of_every_format_are_found(ending: str, tmp_path: Path):
    path = tmp_path / f"rows.{ending.strip(';')}"
    if ending.startswith("csv"):
        write(path, ROWS, ";" if ";" in ending else ",")
        if ending == "csv.gz":
            path.write_bytes(gzip.compress(path.read_bytes()))
    elif ending == "tsv":
        write(path, ROWS, "\t")
    elif ending == "jsonl":
        path.write_text("\n".join(map(json.dumps, ROWS)))
    elif ending == "json":
        path.write_text(json.dumps(ROWS))
    elif ending == "columns.json":
        path.write_text(json.dumps({name: [row[name] for row in ROWS] for name in ROWS[0]}))
    elif ending == "parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
    else:
        openpyxl = pytest.importorskip("openpyxl")
        book = openpyxl.Workbook()
        for row in (list(ROWS[0]), *(list(row.values()) for row in ROWS)):
            book.active.append(row)
        book.save(path)
    columns = read_columns(path)
    assert list(columns.cells) == ["id", "question", "topic"] and len(columns) == 30
    guess = guess_columns(columns)
    assert (guess.text, guess.label) == ("question", "topic")
    assert str(guess).startswith("texts: 'question' (the only column with several words")
    first = columns.table()[2]
    assert first == {"column": "topic", "filled": 30, "different": 3, "words": 1.0, "first": "card"}


def test_of_several_columns_that_fit_the_one_with_the_name_is_taken():
    guess = guess_columns(of(subject=[f"re {text}" for text in TEXTS], Message_Body=TEXTS, country=["a", "b"] * 15,
                             the_category=TOPICS))  # fmt: skip
    assert (guess.text, guess.label) == ("Message_Body", "the_category")
    assert "'country' too" in guess.why_label and "its name" in guess.why_text


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ({"question": TEXTS, "country": ["a", "b"] * 15, "product": TOPICS},
         ["labels is unclear", "'country' (2 different of 30", "'product' (3 different", "Name it: label_column"]),
        ({"a": TEXTS, "b": [f"so {text}" for text in TEXTS], "topic": TOPICS},
         ["texts is unclear", "'a'", "Name it: text_column"]),
        ({"label": TOPICS, "category": TOPICS, "text": TEXTS}, ["labels is unclear"]),
        ({"question": TEXTS, "price": [f"{n}.5" for n in [1, 2, 3] * 10]}, ["no column looks like labels", "'price'"]),
        ({"code": [str(n) for n in range(30)], "topic": TOPICS}, ["no column looks like texts"]),
    ],
)  # fmt: skip
def test_what_is_unclear_is_refused_in_a_line(columns: dict[str, list[Any]], words: list[str]):
    with pytest.raises(KitError) as caught:
        guess_columns(of(**columns))
    assert "\n" not in str(caught.value) and str(caught.value).startswith("rows.csv: ")
    for word in words:
        assert word in str(caught.value)


def test_a_named_column_is_taken_as_it_is_and_a_wrong_name_is_refused_with_the_nearest():
    columns = of(question=TEXTS, country=["a", "b"] * 15, product=TOPICS)
    guess = guess_columns(columns, label="product")
    assert (guess.text, guess.label, guess.why_label) == ("question", "product", "as asked for")
    assert guess_columns(of(product=TOPICS, id=list(range(30))), text="id", label="product").text == "id"
    with pytest.raises(KitError, match=r"there is no column 'produkt'\. Did you mean 'product'"):
        guess_columns(columns, label="produkt")
    with pytest.raises(KitError, match="are the same column, 'product'"):
        guess_columns(columns, text="product", label="product")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("only\none\n", "has the one column 'only': two are needed"),
        ("text,label\n", "has no rows"),
        ("text,text\na,b\n", "2 columns called 'text'"),
        ("", "is empty"),
    ],
)
def test_a_file_without_two_columns_is_refused(content: str, words: str, tmp_path: Path):
    path = tmp_path / "rows.csv"
    path.write_text(content)
    with pytest.raises(KitError, match=words):
        read_columns(path)


def test_a_file_that_is_not_there_is_refused_with_the_nearest(tmp_path: Path):
    write(tmp_path / "questions.csv", ROWS)
    with pytest.raises(KitError, match=r"Did you mean '.*questions\.csv'"):
        read_columns(tmp_path / "question.csv")
    with pytest.raises(KitError, match="not for data sets on the hub"):
        read_columns("owner/name")
