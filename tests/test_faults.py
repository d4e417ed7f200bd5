"""Bad data, a full disk, no memory, two at once, losses that are no numbers: one message, and nothing half made."""

from __future__ import annotations

import csv
import io
import re
import warnings
from collections import Counter

import pandas
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import qlora_kit as qk
from qlora_kit.errors import KitError

# ---- bad data: a good table, and one fault at a known place ----

LABELS = ("card", "cash", "カード", "نقد", "x,y", 'q"q')
SPACES = ("", " ", "\t", "\u00a0", "\u3000\u2003")
WORDS = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=12).filter(str.strip)
ODD = st.sampled_from(
    ["🙂👩‍👩‍👧‍👦", "שלום עולם", "مرحبا", "two\nlines", 'say "hi", twice', "=1+1", "e\u0301", "word " * 20_000]
)
PLAIN = st.text("abc xyz", min_size=1, max_size=12).filter(str.strip)


def tables(texts):
    """Tables in which each of two or more labels has six rows or more, so that there is enough to hold out."""
    return st.integers(2, 4).flatmap(
        lambda classes: st.lists(texts, min_size=6 * classes, max_size=7 * classes).map(
            lambda found: [(text, LABELS[i % classes]) for i, text in enumerate(found)]
        )
    )


def lines(rows, header=("text", "label")) -> list[bytes]:
    """Each row as a CSV file has it, the header first; a row may span lines."""
    found = []
    for row in (header, *rows):
        stream = io.StringIO()
        csv.writer(stream, lineterminator="\n").writerow(row)
        found.append(stream.getvalue().encode())
    return found


def with_cell(row: bytes, new: bytes) -> bytes:
    """Put `new` before a row's text, within its quotes where it has any."""
    return row[:1] + new + row[1:] if row.startswith(b'"') else new + row


# What is done to a row, and the word that the message has besides the row's line.
ROW_FAULTS = {
    "no text": (lambda row, text, label, space: lines([(space, label)])[1], "empty"),
    "no label": (lambda row, text, label, space: lines([(text, space)])[1], "label"),
    "too few columns": (lambda row, text, label, space: lines([(text,)])[1], "1 columns where the header has 2"),
    "too many columns": (lambda row, text, label, space: lines([(text, label, label)])[1], "3 columns where"),
    "NUL": (lambda row, text, label, space: with_cell(row, b"\0"), "NUL"),
    "latin-1": (lambda row, text, label, space: with_cell(row, "caf\xe9 ".encode("latin-1")), "0xe9 is not UTF-8"),
    "a lone surrogate": (lambda row, text, label, space: with_cell(row, b"\xed\xa0\x80"), "0xed is not UTF-8"),
    "cut within a character": (lambda row, text, label, space: with_cell(row, "é".encode()[:1]), "0xc3 is not UTF-8"),
}
FILE_FAULTS = {
    "UTF-16": (lambda raw: raw.decode().encode("utf-16"), "UTF-16"),
    "UTF-16 without a mark": (lambda raw: raw.decode().encode("utf-16-le"), "NUL|not UTF-8"),
    "UTF-32": (lambda raw: raw.decode().encode("utf-32"), "UTF-16"),
    "no text column": (lambda raw: raw.replace(b"text,label", b"txt,label", 1), "'txt'|txt, label"),
    "no label column": (lambda raw: raw.replace(b"text,label", b"text,kind", 1), "text, kind"),
    "two text columns": (lambda raw: b"text,label,text\n" + b"a,b,c\n", "2 columns called 'text'"),
    "header alone": (lambda raw: b"text,label\n", "no rows"),
    "nothing": (lambda raw: b"", "is empty"),
    "blank": (lambda raw: b" \n\t\n", "is empty"),
    "one label": (lambda raw: b"text,label\n" + b"a,b\n" * 20, "two or more"),
}
HARMLESS = {
    "as it is": lambda raw: raw,
    "BOM": lambda raw: b"\xef\xbb\xbf" + raw,
    "no last line break": lambda raw: raw.removesuffix(b"\n"),
    "blank lines at the end": lambda raw: raw + b"\n\n",
}
generated = settings(
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.data_too_large, HealthCheck.too_slow],
)


def refused(path, tmp_path, says: str, **fields) -> str:
    """Train on a file that has to be refused; return what is said. Nothing may be made."""
    experiment = qk.preset("minilm_banking77_qlora").override(
        {"data.name": str(path), "data.test": 0.2, "data.validation": 0.2, **fields}
    )
    with pytest.raises(KitError) as caught:
        qk.finetune(experiment, out=tmp_path / "runs", progress=False)
    assert not (tmp_path / "runs").exists(), "a run folder is left"
    assert re.search(says, str(caught.value)), (says, str(caught.value))
    return str(caught.value)


def write_parquet(path, rows) -> None:
    texts, labels = (list(column) for column in zip(*rows, strict=True))
    pyarrow.parquet.write_table(pyarrow.table({"text": texts, "label": labels}), path)


def read_right(source, rows) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        data = qk.text_classification(source, test=0.2, validation=0.2)
    got = Counter(
        (text, data.label_names[label])
        for split in data.splits().values()
        for text, label in zip(split.texts, split.labels, strict=True)
    )
    assert got == Counter(rows)


@settings(generated, max_examples=60)
@given(st.data())
def test_odd_files_are_read_right(tmp_path, draw):
    rows = draw.draw(tables(WORDS | ODD))
    change = HARMLESS[draw.draw(st.sampled_from(sorted(HARMLESS)))]
    path = tmp_path / "rows.csv"
    path.write_bytes(change(b"".join(lines(rows))))
    read_right(path, rows)
    write_parquet(tmp_path / "rows.parquet", rows)
    read_right(tmp_path / "rows.parquet", rows)


@settings(generated, max_examples=160)
@given(st.data())
def test_a_bad_row_is_refused_by_its_line(tmp_path, draw):
    fault, says = ROW_FAULTS[draw.draw(st.sampled_from(sorted(ROW_FAULTS)))]
    rows = draw.draw(tables(WORDS | ODD))
    at = draw.draw(st.integers(0, len(rows) - 1))
    written = lines(rows)
    line = 1 + b"".join(written[: at + 1]).count(b"\n")
    written[at + 1] = fault(written[at + 1], *rows[at], draw.draw(st.sampled_from(SPACES)))
    (tmp_path / "rows.csv").write_bytes(b"".join(written))
    said = refused(tmp_path / "rows.csv", tmp_path, says)
    assert f"rows.csv, line {line}:" in said


@settings(generated, max_examples=40)
@given(st.data())
def test_an_unclosed_quote_is_refused_by_its_line(tmp_path, draw):
    rows = draw.draw(tables(PLAIN))
    rows = [(text, ("card", "cash")[i % 2]) for i, (text, _) in enumerate(rows)]
    at = draw.draw(st.integers(0, len(rows) - 1))
    written = lines(rows)
    written[at + 1] = b'"' + written[at + 1]
    (tmp_path / "rows.csv").write_bytes(b"".join(written))
    assert f"rows.csv, line {at + 2}:" in refused(tmp_path / "rows.csv", tmp_path, "double quote")


@settings(generated, max_examples=40)
@given(st.sampled_from(sorted(FILE_FAULTS)), tables(PLAIN))
def test_a_bad_file_is_refused_by_its_name(tmp_path, name, rows):
    fault, says = FILE_FAULTS[name]
    (tmp_path / "rows.csv").write_bytes(fault(b"".join(lines(rows))))
    assert "rows.csv" in refused(tmp_path / "rows.csv", tmp_path, says)


@settings(generated, max_examples=40)
@given(st.data())
def test_bad_values_of_a_parquet_file_are_refused_by_their_row(tmp_path, draw):
    rows = draw.draw(tables(PLAIN))
    texts, labels = [list(column) for column in zip(*rows, strict=True)]
    at = draw.draw(st.integers(0, len(rows) - 1))
    column, value = draw.draw(
        st.sampled_from([(texts, None), (texts, " "), (texts, "a\0"), (labels, None), (labels, "")])
    )
    column[at] = value
    write_parquet(tmp_path / "rows.parquet", list(zip(texts, labels, strict=True)))
    assert f"rows.parquet, row {at + 1}:" in refused(tmp_path / "rows.parquet", tmp_path, "text|label")


@settings(generated, max_examples=40)
@given(st.data())
def test_labels_of_mixed_types_are_refused_by_their_row(draw):
    rows = draw.draw(tables(PLAIN))
    other = draw.draw(st.sampled_from([1, True, 2.5, b"card", ["card"], float("inf")]))
    at = draw.draw(st.integers(0, len(rows) - 1))
    frame = pandas.DataFrame({"text": [text for text, _ in rows], "label": [label for _, label in rows]}, dtype=object)
    frame.at[at, "label"] = other
    with pytest.raises(KitError, match=rf"row {at + 1}: label "):
        qk.text_classification(frame, test=0.2, validation=0.2)


@settings(generated, max_examples=40)
@given(st.data())
def test_a_label_that_training_lacks_is_refused_by_its_line(tmp_path, draw):
    rows = draw.draw(tables(PLAIN))
    at = draw.draw(st.integers(0, len(rows) - 1))
    test = [*rows[:at], (rows[at][0], "cards"), *rows[at + 1 :]]
    (tmp_path / "train.csv").write_bytes(b"".join(lines(rows)))
    (tmp_path / "test.csv").write_bytes(b"".join(lines(test)))
    said = refused(
        tmp_path / "train.csv", tmp_path, "'cards' is none of the", **{"data.test": str(tmp_path / "test.csv")}
    )
    assert f"test.csv, line {at + 2}:" in said


@settings(generated, max_examples=40)
@given(st.integers(2, 12), st.integers(0, 12))
def test_one_row_per_label_is_trained_on_or_refused(tmp_path, single, more):
    rows = [(f"text {i}", f"label {i}") for i in range(single)] + [(f"more {i}", "label 0") for i in range(more)]
    path = tmp_path / "rows.csv"
    path.write_bytes(b"".join(lines(rows)))
    # A fifth is held out for testing and a fifth of the rest for validation; each label keeps a row to train on.
    test = -(-len(rows) // 5)
    if len(rows) - test - -(-(len(rows) - test) // 5) < single:
        assert "rows.csv" in refused(path, tmp_path, "too few to hold out")
    else:
        read_right(path, rows)


def test_a_file_cut_off_at_any_byte_is_a_whole_beginning_or_refused(tmp_path):
    rows = [(f"text {i}, with\na line", ("card", "cash", "top up")[i % 3]) for i in range(18)]
    whole, path = b"".join(lines(rows)), tmp_path / "rows.csv"
    right = 0
    for at in range(len(whole)):
        path.write_bytes(whole[:at])
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                data = qk.text_classification(path, test=0.2, validation=0.2)
        except KitError as error:
            assert "rows.csv" in str(error)
            continue
        right += 1
        read = sum(len(split) for split in data.splits().values())
        read_right(path, rows[:read])
    assert right > 20  # ends of rows, with and without the line break
    write_parquet(path.with_suffix(".parquet"), rows)
    whole, path = path.with_suffix(".parquet").read_bytes(), path.with_suffix(".parquet")
    for at in range(len(whole)):
        path.write_bytes(whole[:at])
        with pytest.raises(KitError, match=r"rows\.parquet"):
            qk.text_classification(path, test=0.2, validation=0.2)
