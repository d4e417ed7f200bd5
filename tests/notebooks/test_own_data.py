"""Notebook 00 on a user's file, on none, and on an unclear one; and the helpers that it calls."""

from __future__ import annotations

import csv
import html
import io
import json
import re
import sys
import types
from pathlib import Path
from typing import Any

import nbformat
import pytest
from conftest import ROOT

import qlora_kit as qk
from qlora_kit import notebooks, schemas
from qlora_kit.errors import KitError, NotebookFailed
from qlora_kit.metrics.verdict import verdict
from qlora_kit.notebooks import own_data
from qlora_kit.system import host

PRESET = "minilm_banking77_smoke"


def user_file(path: Path, *, product: bool = False, rows: int = 40) -> Path:
    """Write a user's CSV: other column names, four topics, one text that stands twice with different labels."""
    full = qk.banking77()
    names = full.label_names[:4]
    found = [(t, full.label_names[i]) for t, i in zip(full.train.texts, full.train.labels, strict=True)]
    found = [row for name in names for row in [row for row in found if row[1] == name][:rows]]
    with open(path, "w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream, delimiter=";")
        writer.writerow(["number", "customer wrote", "team", *(["product"] if product else [])])
        for number, (text, label) in enumerate(found):
            writer.writerow([number, text, label, *([("card", "app")[number % 2]] if product else [])])
    return path


def run(out: Path, **params: Any) -> str:
    """Run notebook 00; return what it printed."""
    stream = io.StringIO()
    notebooks.run_notebooks(PRESET, out, "00", params, stream=stream)
    return stream.getvalue()


def test_it_runs_on_a_file_of_ones_own_with_a_model_from_a_folder(tiny, tmp_path: Path):
    file, out = user_file(tmp_path / "mails.csv"), tmp_path / "out"
    asked = ["my card has not come yet"]
    said = run(out, own_file=str(file), model=str(tiny("bert")), epochs=1, texts=asked)
    # A long path takes a line of its own.
    assert f"{file}, as asked for" in " ".join(said.split()) and "160 rows" in said
    assert "texts: 'customer wrote' (the only column with several words" in said
    assert "labels: 'team' (the only column with few short values" in said
    record = schemas.read(out / "00_your_data.json", "record.json")
    assert record["verdict"] == verdict(qk.load_run(record["run"]).evaluation)
    assert record["experiment"]["data"] | {"text": "customer wrote", "label": "team"} == record["experiment"]["data"]
    assert set(record["metrics"]["baselines"]) == {"tfidf_svm", "embedding_svm"}
    # No row of the user's is in the record, and nothing is sent anywhere.
    texts = [row["customer wrote"] for row in csv.DictReader(file.open(encoding="utf-8"), delimiter=";")]
    held = (out / "00_your_data.json").read_text(encoding="utf-8")
    assert not [text for text in texts if text in held]
    assert record["experiment"]["tracking"]["wandb"] == "none" and not list(tmp_path.rglob("wandb"))
    # The verdict is the last thing but for the download, and the texts were answered.
    book = nbformat.read(out / "00_your_data.ipynb", 4)
    printed = ["".join(o.get("text", "") for o in cell.get("outputs", ())) for cell in book.cells]
    assert " ".join(printed[-2].split()) == record["verdict"]
    assert any(asked[0] in str(output) and "probability_2" in str(output)
               for cell in book.cells for output in cell.get("outputs", ()))  # fmt: skip
    assert record["verdict"] in html.unescape((out / "index.html").read_text(encoding="utf-8"))


@pytest.mark.long
def test_without_a_file_it_runs_on_a_sample_and_says_so(tmp_path: Path):
    said = run(tmp_path / "out")
    assert "No file was named, so this runs on a small sample of Banking77" in " ".join(said.split())
    record = schemas.read(tmp_path / "out" / "00_your_data.json", "record.json")
    assert "small sample of Banking77" in record["source"]
    assert len(json.loads((Path(record["run"]) / "training.json").read_text())["labels"]) == own_data.SAMPLE_LABELS


def test_an_unclear_column_of_labels_is_refused_in_a_line(tmp_path: Path):
    file = user_file(tmp_path / "mails.csv", product=True)
    with pytest.raises(NotebookFailed) as caught:
        run(tmp_path / "out", own_file=str(file))
    said = str(caught.value)
    assert re.match(
        r"00_your_data, cell \d+/\d+: .*mails\.csv: which column holds the labels is unclear: 'team' \(4", said
    )
    assert said.endswith("Name it: label_column") and "\n" not in said
    assert not list((tmp_path / "out").glob("runs/*"))


# --- its helpers --------------------------------------------------------------------------------------------------


def test_the_sample_is_small_and_its_columns_are_found(tmp_path: Path):
    path, why = own_data.own_file("", out=tmp_path)
    assert path == tmp_path / "00_your_data" / "sample.csv" and "Set own_file to use your own rows" in why
    rows = list(csv.DictReader(path.open(encoding="utf-8")))
    labels = [row["topic"] for row in rows]
    assert len(set(labels)) == own_data.SAMPLE_LABELS
    assert {labels.count(label) for label in labels} == {own_data.SAMPLE_ROWS}
    full = qk.banking77()
    told = dict(zip(full.train.texts, full.train.labels, strict=True))
    assert all(full.label_names[told[row["question"]]] == row["topic"] for row in rows)


def test_a_file_is_named_or_uploaded_not_both(tmp_path: Path):
    assert own_data.own_file("mine.csv", out=tmp_path) == (Path("mine.csv"), "The file mine.csv, as asked for")
    with pytest.raises(KitError, match="name a file or upload one"):
        own_data.own_file("mine.csv", out=tmp_path, upload=True)
    with pytest.raises(KitError, match="upload = True is for Colab: here, give the file's path as own_file"):
        own_data.own_file("", out=tmp_path, upload=True)


@pytest.mark.parametrize("chosen", [{"mails.csv": b"a,b\n"}, {}])
def test_in_colab_a_file_is_uploaded(chosen: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    files = types.ModuleType("google.colab.files")
    files.upload = lambda: chosen  # type: ignore[attr-defined]  # what Colab's returns: the content by the file's name
    for name in ("google.colab", "google.colab.files"):
        monkeypatch.setitem(sys.modules, name, files)
    monkeypatch.delenv("KAGGLE_KERNEL_RUN_TYPE", raising=False)
    assert host.host() is host.COLAB
    path, why = own_data.own_file("", out=tmp_path, upload=True)
    if chosen:
        assert (path, why) == (Path("mails.csv"), "The file mails.csv, uploaded")
    else:
        assert path.name == "sample.csv" and why.startswith("Nothing was uploaded")


def test_a_model_brings_the_settings_of_its_preset_or_the_kits_own(tiny):
    own, why = own_data.own_experiment(PRESET, rows=100)
    assert (own.name, own.data.limit, own.tracking.wandb) == (PRESET, 100, "none")
    assert own_data.own_experiment(PRESET)[0].data.limit == qk.preset(PRESET).data.limit
    known, why = own_data.own_experiment(PRESET, model="embedded:smollm2-135m", seed=3, epochs=1)
    same = qk.preset("smollm2-135m_banking77_qlora")
    assert known.lora == same.lora and known.training.learning_rate == same.training.learning_rate
    assert (known.training.seed, known.training.epochs) == (3, 1) and "has settings for it" in why
    folder = str(tiny("gpt2"))
    other, why = own_data.own_experiment(PRESET, model=folder, epochs=2)
    assert other.model.name == folder and other.training.epochs == 2 and "the kit's defaults" in why
    assert other.name == "gpt2_banking77_qlora" and other.quantization.scheme == "nf4" and other.data.limit is None
    with pytest.raises(KitError, match=r"Did you mean 'embedded:minilm'"):
        own_data.own_experiment(PRESET, model="embedded:minlm")


def test_rows_of_a_test_file_are_not_held_out(tmp_path: Path):
    file, test = user_file(tmp_path / "mails.csv"), user_file(tmp_path / "test.csv", rows=5)
    experiment = qk.preset(PRESET)
    held = own_data.own_rows(file, "customer wrote", "team", experiment)
    assert len(held.test) == pytest.approx(160 * own_data.TEST_SHARE, abs=2)
    with pytest.warns(UserWarning, match="also stand in training"):
        named = own_data.own_rows(file, "customer wrote", "team", experiment, test_file=str(test))
    assert len(named.test) == 20


def test_what_makes_a_score_worth_less_is_said_with_examples():
    rows = [{"text": f"where is my card {n}", "label": ("a", "b")[n % 2]} for n in range(40)]
    clean = qk.text_classification(rows, test=0.2)
    assert own_data.troubles(clean.report()).startswith("No test text stands in the training rows")
    rows += [{"text": "where is my card 0", "label": "b"}, {"text": "a rare one", "label": "c"}]
    rows += [{"text": f"and this {n}", "label": "A"} for n in range(8)]
    with pytest.warns(UserWarning):
        bad = qk.text_classification(rows, test=[{"text": "Where is my card 1", "label": "b"}] * 2, validation=0.1)
    lines = own_data.troubles(bad.report()).splitlines()
    assert lines[0].startswith("2 of 2 test texts") and "such as 'Where is my card 1'" in lines[0]
    assert "1 text has two different labels, such as 'where is my card 0 (a, b)'" in lines
    assert "labels that look alike: 'A', 'a'. Are they one?" in lines
    assert any(line.startswith("1 label has fewer than 8 rows") and "c (1)" in line for line in lines)


def test_in_colab_the_parameters_are_a_form():
    book = nbformat.read(ROOT / "notebooks" / "00_your_data.ipynb", 4)
    (cell,) = [cell for cell in book.cells if "parameters" in cell.metadata.get("tags", ())]
    first, *lines = cell.source.splitlines()
    assert first.startswith("# @title ") and all("# @param" in line for line in lines)
    assert next(iter(notebooks.list_notebooks())) == "00_your_data"
