"""From files and Python objects to rows and texts: every format, the same faults in each, and what is no texts."""

from __future__ import annotations

import csv
import gzip
import importlib.util
import json
import os
import subprocess
import sys
import warnings
from collections import Counter
from pathlib import Path

import datasets
import numpy as np
import pandas
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import qlora_kit as qk
from qlora_kit.data.reading import _seems_quoted
from qlora_kit.data.tables import texts_of
from qlora_kit.errors import KitError

ROWS = [(f"{adjective} {noun}", label) for adjective in ("red", "big", "old", "new", "odd")
        for noun, label in (("cat", "animal"), ("dog", "animal"), ("oak", "plant"), ("fern", "plant"))]  # fmt: skip
COLUMNS = {"text": [text for text, _ in ROWS], "label": [label for _, label in ROWS]}
ROOT = Path(__file__).resolve().parents[2]
EXCEL = importlib.util.find_spec("openpyxl") is not None


def read(source, **fields) -> qk.TextData:
    return qk.text_classification(source, test=0.2, validation=0.2, **fields)


def write(path: Path, rows, header=("text", "label")) -> Path:
    """Write rows in the format of the path's ending, by the libraries that people have such files from."""
    frame = pandas.DataFrame(rows, columns=list(header))
    ending = path.name.removesuffix(".gz").rpartition(".")[2]
    if ending == "csv":
        frame.to_csv(path, index=False)
    elif ending == "tsv":
        lines = ["\t".join(row) for row in (header, *rows)]
        raw = "".join(f"{line}\n" for line in lines).encode()
        path.write_bytes(gzip.compress(raw) if path.suffix == ".gz" else raw)
    elif ending == "jsonl":
        frame.to_json(path, orient="records", lines=True, force_ascii=False)
    elif ending == "json":
        frame.to_json(path, orient="records", force_ascii=False)
    elif ending == "parquet":
        frame.to_parquet(path, index=False)
    else:
        frame.to_excel(path, index=False)
    return path


TEXT_FORMATS = ("csv", "tsv", "jsonl", "json")
FORMATS = (*TEXT_FORMATS, *(f"{name}.gz" for name in TEXT_FORMATS), "parquet")


def rows_of(data: qk.TextData) -> Counter:
    return Counter(
        (text, data.label_names[label])
        for split in data.splits().values()
        for text, label in zip(split.texts, split.labels, strict=True)
    )


# ---- every format gives the same data ----


@pytest.fixture(scope="module")
def expected() -> str:
    return read(pandas.DataFrame(COLUMNS)).checksum


@pytest.mark.parametrize(
    "ending",
    [*FORMATS, pytest.param("xlsx", marks=pytest.mark.skipif(not EXCEL, reason="openpyxl is not installed"))],
)
def test_every_format_gives_the_same_data(tmp_path, ending, expected):
    data = read(write(tmp_path / f"rows.{ending}", ROWS))
    assert data.checksum == expected
    assert qk.data.load(data.spec) == data  # from its spec alone, as a YAML file names it


@pytest.mark.parametrize(
    "source",
    [
        [{"text": text, "label": label} for text, label in ROWS],
        tuple({"label": label, "text": text, "more": 1} for text, label in ROWS),
        COLUMNS,
        {"text": np.array(COLUMNS["text"]), "label": pandas.Series(COLUMNS["label"])},
        pyarrow.table(COLUMNS),
        pyarrow.table({**COLUMNS, "label": pyarrow.array(COLUMNS["label"]).dictionary_encode()}),
        pyarrow.RecordBatch.from_pydict(COLUMNS),
        {"train": pandas.DataFrame(COLUMNS)},
        {"train": pyarrow.table(COLUMNS)},
    ],
    ids=["dicts", "tuple of dicts", "columns", "arrays", "arrow", "dictionary", "batch", "frames", "tables"],
)
def test_every_kind_of_object_gives_the_same_data(source, expected):
    assert read(source).checksum == expected


def test_what_the_kit_writes_it_reads(tmp_path, expected):
    folder = read(pandas.DataFrame(COLUMNS)).save(tmp_path / "data")
    parts = [folder / f"{name}.jsonl" for name in ("train", "validation", "test")]
    assert rows_of(read(parts)) == Counter(ROWS)


def test_several_files_are_one_data_set(tmp_path, monkeypatch, expected):
    monkeypatch.chdir(tmp_path)
    write(Path("part-1.csv"), ROWS[:10])
    write(Path("part-2.jsonl.gz"), ROWS[10:])
    assert read(["part-1.csv", Path("part-2.jsonl.gz")]).checksum == expected
    data = read("part-*")
    assert data.checksum == expected and qk.data.load(data.spec) == data
    write(Path("part-3.csv"), [*ROWS[:3], (" ", "plant")])
    with pytest.raises(KitError, match=r"part-3\.csv, line 5: the text in column 'text' is empty"):
        read("part-*")
    write(Path("part-3.csv"), [("a pond", "plants")])
    with pytest.raises(KitError, match=r"part-3\.csv, line 2: label 'plants' is none of the 2.*'plant'"):
        qk.text_classification("part-1.csv", test=["part-2.jsonl.gz", "part-3.csv"], validation=0.2)
    with pytest.raises(KitError, match=r"no file 'parts-\*\.csv'"):
        read("parts-*.csv")
    with pytest.raises(KitError, match="list of texts without labels"):
        read(["one text", "another text"])
    Path("a[1].csv").write_bytes(Path("part-1.csv").read_bytes())  # a name, not a pattern, where there is such a file
    assert rows_of(read("a[1].csv")) == Counter(ROWS[:10])


def test_names_of_classes_come_through_parquet_and_arrow(tmp_path):
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["plant", "animal"])}
    )
    numbers = [int(label == "animal") for label in COLUMNS["label"]]
    table = datasets.Dataset.from_dict({"text": COLUMNS["text"], "label": numbers}, features=features)
    table.to_parquet(tmp_path / "rows.parquet")
    whole = read(table)
    assert whole.label_names == ("animal", "plant")
    assert read(tmp_path / "rows.parquet").checksum == whole.checksum
    assert read(table.with_format("arrow")[:]).checksum == whole.checksum
    arrow = table.with_format("arrow")[:]
    damaged = arrow.replace_schema_metadata({b"huggingface": b'{"info": {"features": [1]}}'})
    with pytest.raises(KitError, match="features in its schema are damaged"):
        read(damaged)


def test_excel_needs_its_package_and_says_so(tmp_path, monkeypatch):
    (tmp_path / "rows.xlsx").write_bytes(b"PK")
    monkeypatch.setitem(sys.modules, "openpyxl", None)
    with pytest.raises(KitError, match="needs the package openpyxl: pip install openpyxl"):
        read(tmp_path / "rows.xlsx")


@pytest.mark.skipif(not EXCEL, reason="openpyxl is not installed")
def test_the_one_sheet_with_both_columns_is_read(tmp_path):
    path = tmp_path / "rows.xlsx"
    frame = pandas.DataFrame(COLUMNS)
    with pandas.ExcelWriter(path) as book:
        pandas.DataFrame({"note": ["made in May"]}).to_excel(book, sheet_name="notes", index=False)
        frame.to_excel(book, sheet_name="rows", index=False, startrow=2, startcol=1)
    assert rows_of(read(path)) == Counter(ROWS)
    with pandas.ExcelWriter(path, mode="a") as book:
        frame.to_excel(book, sheet_name="old", index=False)
    with pytest.raises(KitError, match="2 sheets have both columns"):
        read(path)
    frame = frame.astype(object)
    frame.loc[3, "text"] = 5
    frame.to_excel(path, index=False)
    with pytest.raises(KitError, match=r"rows\.xlsx, row 5: column 'text' holds 5"):
        read(path)
    frame.to_excel(path, index=False, header=["texts", "label"])
    with pytest.raises(KitError, match=r"'text'.*'texts'"):
        read(path)
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(KitError, match="cannot be read as Excel"):
        read(path)


# ---- quotes in TSV ----


def test_a_quote_in_a_tsv_file_is_a_character(tmp_path):
    rows = [(f'a {size}" screen', "screen") for size in range(5, 25)]
    rows += [(text, "mark") for text in ('"', 'say "hi"', '"hi', '"hi"', '""', "it's")]
    assert rows_of(read(write(tmp_path / "rows.tsv", rows))) == Counter(rows)
    assert rows_of(read(write(tmp_path / "rows.tsv.gz", rows))) == Counter(rows)


def test_a_tsv_file_written_with_quotes_is_refused_and_read_as_csv(tmp_path):
    rows = [*ROWS, ('a 5" screen', "plant"), ("two\nlines", "animal"), ("a\ttab", "animal")]
    frame = pandas.DataFrame(rows, columns=["text", "label"])
    for chosen, line in ((frame[:21], 22), (frame.drop(index=20)[:21], 22), (frame.drop(index=[20, 21]), 22)):
        chosen.to_csv(tmp_path / "rows.tsv", sep="\t", index=False)
        with pytest.raises(
            KitError, match=rf"rows\.tsv, line {line}: the cell seems to be quoted.*name the file \.csv"
        ):
            read(tmp_path / "rows.tsv")
    frame.to_csv(tmp_path / "rows.tsv", sep="\t", index=False, quoting=csv.QUOTE_ALL)
    with pytest.raises(KitError, match=r"line 1: the cell seems to be quoted"):
        read(tmp_path / "rows.tsv")
    (tmp_path / "rows.tsv").rename(tmp_path / "rows.csv")
    assert rows_of(read(tmp_path / "rows.csv")) == Counter(rows)


# ---- what is no regular file ----


def test_what_is_no_regular_file_is_said_to_be_none(tmp_path):
    write(tmp_path / "row.csv", ROWS)
    os.mkfifo(tmp_path / "rows.csv")
    for path in (tmp_path / "rows.csv", "/dev/null"):
        with pytest.raises(KitError, match="is no regular file"):
            read(path)
    (tmp_path / "gone.csv").symlink_to(tmp_path / "nowhere.csv")
    for name in (str(tmp_path / "gone.csv"), "a\0b.csv", "~nobody-of-this-name/a.csv", "x" * 5000 + ".csv", "", " "):
        with pytest.raises(KitError) as caught:
            read(name)
        assert "\n" not in str(caught.value)


# ---- the same faults in every format ----

LABELS = ("card", "cash", "カード", 'q"q')
TEXTS = st.text(st.characters(exclude_categories=["Cs", "Cc", "Zl", "Zp"]), min_size=1, max_size=12).filter(str.strip)
TABLES = st.integers(2, 4).flatmap(
    lambda classes: st.lists(TEXTS, min_size=6 * classes, max_size=7 * classes).map(
        lambda found: [(text, LABELS[i % classes]) for i, text in enumerate(found)]
    )
)
generated = settings(
    deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)


def put(path: Path, raw: bytes) -> Path:
    path.write_bytes(gzip.compress(raw) if path.suffix == ".gz" else raw)
    return path


def refused(source) -> str:
    with pytest.raises(KitError) as caught, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        read(source)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def right_or_refused(source, rows) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            data = read(source)
        except KitError as error:
            assert "\n" not in str(error) and "rows." in str(error)
        else:
            assert not rows_of(data) - Counter(rows)


@settings(generated, max_examples=40)
@given(st.data())
def test_any_rows_come_back_from_every_format(tmp_path, draw):
    rows = draw.draw(TABLES)
    ending = draw.draw(st.sampled_from(["jsonl", "json", "tsv", "jsonl.gz", "tsv.gz"]))
    if ending.startswith("tsv") and any(_seems_quoted(cell) for row in rows for cell in row):
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert rows_of(read(write(tmp_path / f"rows.{ending}", rows))) == Counter(rows)


CELL_FAULTS = {
    "empty": ({"text": " "}, "the text in column 'text' is empty"),
    "null": ({"text": None}, "no text in column 'text'"),
    "number": ({"text": 5}, "holds 5 "),
    "list": ({"text": ["a"]}, "which is no text"),
    "nul": ({"text": "a\0"}, "NUL"),
    "surrogate": ({"text": "a\ud800"}, "no valid Unicode"),
    "no label": ({"label": ""}, "no label"),
    "null label": ({"label": None}, "no label"),
    "other type": ({"label": 3}, "make them one type"),
    "float": ({"label": 1.5}, "labels are text or whole numbers"),
    "nan": ({"label": float("nan")}, "no label"),
    "a name less": ("text", "no column 'text'"),
    "no object": (["a", "b"], "where a row is an object"),
    "a name twice": ('{"text": "a", "text": "b", "label": "card"}', "'text' stands twice"),
    "cut off": ('{"text": "a", "label', "no valid JSON"),
    "too deep": ("[" * 3000 + "]" * 3000, "JSON"),
    "a huge number": ('{"text": ' + "9" * 5000 + "}", "JSON"),
    "two in a line": ('{"text": "a", "label": "card"} {"text": "b", "label": "card"}', "no valid JSON"),
}


@pytest.mark.parametrize("name", CELL_FAULTS)
@settings(generated, max_examples=6)
@given(draw=st.data())
def test_a_bad_row_is_refused_by_its_place_in_every_format(tmp_path, name, draw):
    rows = [{"text": text, "label": label} for text, label in draw.draw(TABLES)]
    fault, says = CELL_FAULTS[name]
    at = draw.draw(st.integers(0, len(rows) - 1))
    broken: list = list(rows)
    if isinstance(fault, dict):
        broken[at] = {**rows[at], **fault}
    elif fault == "text":
        del (first := dict(rows[at]))["text"]
        broken[at] = first
    else:
        broken[at] = fault
    written = [item if isinstance(item, str) else json.dumps(item) for item in broken]
    path = put(tmp_path / draw.draw(st.sampled_from(["rows.jsonl", "rows.jsonl.gz"])), "\n".join(written).encode())
    said = refused(path)
    assert f"{path.name}, line {at + 1}: " in said and says in said
    if not isinstance(fault, str) or fault == "text":
        said = refused(put(tmp_path / "rows.json", f"[{','.join(written)}]".encode()))
        assert f"rows.json, row {at + 1}: " in said and says in said
        if isinstance(broken[0], dict):
            said = refused(broken)
            assert f"train, row {at + 1}: " in said and says in said


@settings(generated, max_examples=60)
@given(st.data())
def test_a_file_cut_off_or_damaged_is_right_or_refused_in_every_format(tmp_path, draw):
    endings = ["jsonl", "tsv", "json", "jsonl.gz", "csv.gz", "parquet", *(["xlsx"] if EXCEL else [])]
    path = tmp_path / f"rows.{draw.draw(st.sampled_from(endings))}"
    whole = write(path, ROWS).read_bytes()
    # A share of the file, not a place in it: what holds the time of its writing is not always equally long.
    at = draw.draw(st.integers(0, 9999)) * len(whole) // 10_000
    path.write_bytes(whole[:at])
    if path.name == "rows.tsv":
        right_or_refused(path, ROWS + [(text, label[:n]) for text, label in ROWS for n in range(1, 6)])
    else:
        right_or_refused(path, ROWS)
    if path.suffix in (".gz", ".xlsx"):  # what is packed has checksums, so that damage shows
        damaged = bytearray(whole)
        damaged[at] ^= draw.draw(st.integers(1, 255))
        path.write_bytes(damaged)
        right_or_refused(path, ROWS)


@settings(generated, max_examples=100)
@given(st.binary(max_size=120), st.sampled_from(["jsonl", "json", "tsv", "jsonl.gz", "parquet", "xlsx"]), st.booleans())
def test_any_bytes_are_right_or_refused_in_every_format(tmp_path, noise, ending, packed):
    path = tmp_path / f"rows.{ending}"
    path.write_bytes(gzip.compress(noise) if packed and ending.endswith("gz") else noise)
    assert "rows." in refused(path)


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | st.floats() | st.text(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["text", "label", "x"]), inner, max_size=3)
    ),
    max_leaves=8,
)


@settings(generated, max_examples=100)
@given(JSON_VALUES)
def test_any_object_is_refused_as_rows_and_as_texts_in_one_line(tmp_path, thing):
    assert refused(thing)
    put(tmp_path / "rows.json", json.dumps(thing).encode())
    assert "rows.json" in refused(tmp_path / "rows.json")
    try:
        texts = texts_of(thing)
    except KitError as error:
        assert "\n" not in str(error)
    else:
        assert isinstance(thing, list) and texts == thing and all(isinstance(text, str) for text in texts)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("[]", r"holds '\[\]': allowed is a list of objects"),
        ("{}", "allowed is a list of objects"),
        ('{"text": {"0": "a"}, "label": {"0": "b"}}', "allowed is a list of objects"),
        ('{"text": ["a", "b"], "label": ["c"]}', "columns of 2 and 1 rows"),
        ('["a", "b"]', r"row 1: 'a' \(str\) where a row is an object"),
        ('{"text": "a", "label": "b"}\n{"text": "c", "label": "d"}', r"go into a \.jsonl file"),
        ("NaN", "allowed is a list of objects"),
    ],
)
def test_json_of_another_shape_is_told_what_is_allowed(tmp_path, content, says):
    (tmp_path / "rows.json").write_text(content)
    with pytest.raises(KitError, match=rf"rows\.json.* {says}"):
        read(tmp_path / "rows.json")


# ---- texts ----

TABLE = pandas.DataFrame({"question": ["a", "b"], "label": [1, 2]})


@pytest.mark.parametrize(
    "things",
    [
        ["a", "b"],
        ("a", "b"),
        (letter for letter in "ab"),
        {"x": "a", "y": "b"}.values(),
        TABLE.question,
        TABLE.question.astype("category"),
        pandas.Index(["a", "b"]),
        np.array(["a", "b"]),
        np.array(["a", "b"], dtype=object),
        pyarrow.array(["a", "b"]),
        pyarrow.chunked_array([["a"], ["b"]]),
        datasets.Dataset.from_pandas(TABLE)["question"],
    ],
    ids=lambda thing: type(thing).__name__,
)
def test_sequences_of_texts_are_texts(things):
    found = texts_of(things)
    assert found == ["a", "b"] and {type(text) for text in found} == {str}


@pytest.mark.parametrize(
    "table",
    [TABLE, datasets.Dataset.from_pandas(TABLE), pyarrow.table(TABLE), TABLE.to_dict("records"), TABLE.to_dict("list")],
    ids=["frame", "dataset", "arrow", "dicts", "columns"],
)
def test_a_tables_texts_are_named(table):
    assert texts_of(table, "question") == ["a", "b"]
    with pytest.raises(KitError, match=r"has columns: write predict\(…, text='column'\)"):
        texts_of(table)
    with pytest.raises(KitError, match=r"no column 'questions'. Did you mean 'question'"):
        texts_of(table, "questions")
    with pytest.raises(KitError, match="text 0 is 1: allowed are texts"):
        texts_of(table, "label")


@pytest.mark.parametrize(
    ("thing", "says"),
    [
        ("one text", r"write predict\(\[text\]\)"),
        (np.str_("one text"), r"write predict\(\[text\]\)"),
        (np.array("one text"), r"write predict\(\[text\]\)"),
        (b"bytes", "was given a bytes"),
        (bytearray(b"ab"), "was given a bytearray"),
        (None, "was given a NoneType as texts: allowed is a list of texts"),
        (3, "was given a int as texts"),
        ({"a": 1}, "was given a dict"),
        ({"text": "one"}, "was given a dict"),
        ({"a", "b"}, r"no order: write predict\(sorted"),
        (frozenset("ab"), r"no order: write predict\(sorted"),
        (datasets.DatasetDict({"test": datasets.Dataset.from_pandas(TABLE)}), r"write predict\(tables\['test'\]"),
        (qk.data.Split(("a",), (0,)), r"its texts are its \.texts"),
        (Path("texts.txt"), "was given a PosixPath"),
        ([["a", "b"]], r"text 0 is \['a', 'b'\]"),
        (np.array([["a", "b"]]), r"text 0 is \['a', 'b'\]"),
        (["a", b"b"], "text 1 is b'b'"),
        (["a", None], "text 1 is None"),
        (["a", float("nan")], "text 1 is nan"),
        (["a", " \n"], "visible character"),
        (["a", "caf\udce9"], r"text 1 \('caf\\udce9'\) is no valid Unicode"),
        ("a text", "takes a list"),
    ],
    ids=lambda value: None if isinstance(value, str) else type(value).__name__,
)
def test_what_is_no_texts_is_refused_with_the_call_that_is_meant(thing, says):
    with pytest.raises(KitError, match=says) as caught:
        texts_of(thing)
    assert "\n" not in str(caught.value)


def test_every_function_that_takes_texts_refuses_what_is_none():
    tokenizer = qk.models.load_tokenizer(qk.ModelSpec("embedded:minilm"))
    for things in ("one text", {"a": 1}, {"a", "b"}, TABLE, b"ab", ["a", "caf\udce9"], [3], None):
        with pytest.raises(KitError):
            qk.data.tokenize(tokenizer, things, 16)
        with pytest.raises(KitError):
            qk.data.token_lengths(tokenizer, things)
    with pytest.raises(KitError, match="forward_texts was given a DataFrame, which has columns"):
        qk.models.embed(qk.preset("minilm_banking77_smoke"), TABLE, progress=None)


def test_bytes_that_are_no_utf8_end_in_one_line_in_any_locale(tmp_path, tiny, topics):
    experiment = qk.Experiment(name="bytes", model=qk.ModelSpec(str(tiny("bert")))).override(
        {"training.max_steps": 1, "training.threads": 1, "tracking.wandb": "none"}
    )
    run = qk.finetune(experiment, data=topics, out=tmp_path, progress=False)
    env = {**os.environ, "PYTHONPATH": str(ROOT), "LC_ALL": "C"}
    command = [sys.executable, "-m", "qlora_kit", "predict", str(run.path)]
    for arguments, stdin in (([b"caf\xe9"], b""), ([], b"good\ncaf\xe9\n")):
        done = subprocess.run([*command, *arguments], input=stdin, capture_output=True, env=env)
        assert done.returncode == 2 and done.stdout == b"", done.stderr
        assert done.stderr.startswith(b"qlora_kit: ") and done.stderr.count(b"\n") == 1
        assert b"no valid Unicode" in done.stderr or b"no UTF-8" in done.stderr
