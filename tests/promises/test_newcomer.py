"""A newcomer's own rows and another model: README's ten lines with every architecture that it names."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import transformers
from conftest import ARCHITECTURES

import qlora_kit as qk
from qlora_kit import models
from qlora_kit.cli import main as cli


@pytest.fixture(scope="module")
def questions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file as somebody has it: other columns than the kit's, one more that nobody needs, 3 topics."""
    full = qk.banking77()
    file = tmp_path_factory.mktemp("own") / "questions.csv"
    with open(file, "w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerow(["id", "question", "topic"])
        for topic in full.label_names[:3]:
            texts = [t for t, label in zip(full.train.texts, full.train.labels, strict=True)
                     if full.label_names[label] == topic][:30]  # fmt: skip
            writer.writerows([number, text, topic] for number, text in enumerate(texts))
    return file


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_own_rows_and_another_model_from_training_to_prediction(tiny, questions: Path, tmp_path: Path, name: str):
    data = qk.text_classification(questions, text="question", label="topic", test=0.2, validation=0.2)
    changes = {"model.name": str(tiny(name)), "lora.target_modules": "all-linear", "training.max_steps": 4}
    experiment = qk.preset("minilm_banking77_qlora").override({**changes, "training.threads": 1})

    run = qk.finetune(experiment, data=data, out=tmp_path, progress=False)
    report = qk.evaluate(run, baselines=False, resamples=50, progress=False)

    assert run.training["parameters"]["trainable"] < run.training["parameters"]["all"]
    score = report["metrics"]["test"]["f1_macro"]
    assert 0 <= score["low"] <= score["value"] <= score["high"] <= 1
    texts = ["My card has not arrived", "I want to top up by transfer, and how long will that take?"]
    here = run.predict(texts)
    assert set(here.labels) <= set(data.label_names)
    again = qk.load_run(run.path).predict(texts)
    assert here.labels == again.labels
    assert (here.logits == again.logits).all()
    assert [file for file in run.path.rglob("*") if file.suffix in (".bin", ".pt", ".pkl", ".pth")] == []


def test_an_encoder_decoder_is_refused_in_one_line_that_says_what_to_take(
    questions: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    folder = tmp_path / "t5"
    config = transformers.T5Config(d_model=32, d_ff=64, num_layers=1, num_heads=2, d_kv=16, vocab_size=100)
    config.save_pretrained(folder)
    models.load_tokenizer(qk.ModelSpec("embedded:minilm")).save_pretrained(folder)
    arguments = ["finetune", "minilm_banking77_qlora", "--set", f"model.name={folder}", "--data", str(questions)]
    arguments += ["--text", "question", "--label", "topic", "--test", "0.2", "--out", str(tmp_path / "runs"), "--quiet"]
    assert cli.main(arguments) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "t5" in said and "encoder" in said and "decoder" in said
    assert not list((tmp_path / "runs").iterdir())
