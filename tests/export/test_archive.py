"""What a zip of results tells of the user's rows: nothing, unless they ask; and what is left opens and predicts."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import pytest

import qlora_kit as qk
from qlora_kit.system.files import write_json


@pytest.fixture
def results(topics, tiny_experiment, tmp_path) -> Path:
    """Return a folder with a tested run on the user's rows, a notebook that shows them, and a page."""
    run = qk.finetune(
        tiny_experiment("bert", training__max_steps=4), data=topics, out=tmp_path / "runs", progress=False
    )
    qk.evaluate(run, data=topics, baselines=False, resamples=10, progress=False)
    out = tmp_path / "runs"
    text = next(pair["examples"][0]["text"] for pair in run.evaluation["confusions"])
    notebook(out / "03_evaluate.ipynb", text)
    write_json(out / "03_evaluate.json", {"experiment": run.experiment.to_dict()})
    (out / "index.html").write_text(f"<p>{text}</p>")
    (out / "predictions.csv").write_text(f"text\n{text}\n")
    return out


def notebook(file: Path, text: str) -> None:
    cells = [
        {"cell_type": "markdown", "metadata": {}, "source": "# A title"},
        {"cell_type": "code", "metadata": {}, "source": "show()", "execution_count": 1,
         "outputs": [{"output_type": "stream", "name": "stdout", "text": text}]},
    ]  # fmt: skip
    write_json(file, {"cells": cells, "metadata": {}, "nbformat": 4, "nbformat_minor": 5})


def quoting(made: Path, topics: qk.TextData) -> list[str]:
    """Return the files of a zip in which a text of the data stands."""
    texts = [text for split in topics.splits().values() for text in split.texts]
    with zipfile.ZipFile(made) as archive:
        contents = {name: archive.read(name) for name in archive.namelist()}
    return [
        name
        for name, content in contents.items()
        if any(text.encode() in content or json.dumps(text)[1:-1].encode() in content for text in texts)
    ]


def test_texts_of_the_users_rows_are_left_out_and_the_run_opens_and_predicts(results, topics, tmp_path, caplog):
    made = qk.zip_results(results)
    assert quoting(made, topics) == []
    (told,) = [record.getMessage() for record in caplog.records if "left out" in record.getMessage()]
    assert told == (
        f"What may quote your texts is left out of {made}, in these files or with them: 03_evaluate.ipynb, index.html, "
        "predictions.csv, evaluation.json. texts=True includes it."
    )
    with zipfile.ZipFile(made) as archive:
        archive.extractall(tmp_path / "elsewhere")
    there = tmp_path / "elsewhere" / "runs"
    assert {item.name for item in there.iterdir()} == {"03_evaluate.ipynb", "03_evaluate.json", "tiny_bert_seed0"}
    first, second = json.loads((there / "03_evaluate.ipynb").read_text())["cells"]
    assert first["source"] == "# A title" and second["source"] == "show()" and second["outputs"] == []

    here, moved = (qk.load_run(folder / "tiny_bert_seed0") for folder in (results, there))
    assert (moved.predict(topics.test.texts).logits == here.predict(topics.test.texts).logits).all()
    assert moved.evaluation["metrics"] == here.evaluation["metrics"]
    assert [pair["count"] for pair in moved.evaluation["confusions"]] == [
        pair["count"] for pair in here.evaluation["confusions"]
    ]
    # What is here has not changed.
    assert any(pair["examples"] for pair in here.evaluation["confusions"])


def test_texts_are_included_where_the_user_asks(results, topics, caplog):
    assert len(quoting(qk.zip_results(results, texts=True), topics)) == 4
    assert "left out" not in caplog.text


def test_what_is_about_banking77_alone_is_zipped_whole(topics, tmp_path, caplog):
    text = topics.test.texts[0]
    notebook(tmp_path / "out" / "03_evaluate.ipynb", text)
    write_json(tmp_path / "out" / "03_evaluate.json", {"experiment": qk.preset("minilm_banking77_smoke").to_dict()})
    # A record that is about no experiment.
    notebook(tmp_path / "out" / "05_claims.ipynb", text)
    write_json(tmp_path / "out" / "05_claims.json", {"experiment": {}})
    (tmp_path / "out" / "index.html").write_text(f"<p>{text}</p>")
    assert len(quoting(qk.zip_results(tmp_path / "out"), topics)) == 3 and caplog.text == ""
    # A notebook that has failed: nobody knows whose rows it has shown, nor those of the page.
    notebook(tmp_path / "out" / "00_your_data.ipynb", text)
    made = qk.zip_results(tmp_path / "out")
    assert quoting(made, topics) == ["out/03_evaluate.ipynb", "out/05_claims.ipynb"]
    assert "out/00_your_data.ipynb" in zipfile.ZipFile(made).namelist()


@pytest.mark.parametrize("damaged", ["{", "[]", '{"confusions": 3}'])
def test_what_cannot_be_read_is_not_passed_on(damaged, results):
    (file,) = results.rglob("evaluation.json")
    file.write_text(damaged)
    assert not [name for name in zipfile.ZipFile(qk.zip_results(results)).namelist() if "evaluation" in name]
    file.with_name("experiment.yaml").write_text("name: [")
    assert "runs/index.html" not in zipfile.ZipFile(qk.zip_results(results)).namelist()


def test_of_private_runs_only_what_the_kit_writes_goes_into_a_zip(topics, tiny_experiment, tmp_path):
    out = tmp_path / "out"
    run = qk.finetune(tiny_experiment("bert", training__max_steps=1), data=topics, out=out, progress=False)
    whole = qk.zip_results(run.path, texts=True)  # beside the run, where the next zip finds it
    for place in (out / "notes.txt", run.path / "mine.json", run.path / "more.log"):
        place.write_text(json.dumps({"text": topics.train.texts[0]}))
    names = set(zipfile.ZipFile(qk.zip_results(out)).namelist())
    assert whole.parent == out
    assert not {Path(name).name for name in names} & {"notes.txt", "mine.json", "more.log", whole.name}
    assert {"training.json", "adapter_model.safetensors", "tokenizer.json", "README.md"} <= {
        Path(n).name for n in names
    }
