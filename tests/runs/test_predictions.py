"""What a run returns for texts: a sequence of labels, a table, a few lines; and a run that shows itself."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import qlora_kit as qk
from qlora_kit.config.experiment import Experiment
from qlora_kit.config.sections import LoraSpec, ModelSpec, TrackingSpec, TrainingSpec
from qlora_kit.errors import KitError
from qlora_kit.metrics.scores import probabilities
from qlora_kit.metrics.verdict import Report
from qlora_kit.runs.predictor import Predictions

NAMES = ["late", "<b>lost</b>", "red\x1b[31m"]


def predictions(rows: int = 4, **more) -> Predictions:
    logits = np.array([[3, 1, 0], [0, 4, 1], [1, 1, 1.5], [2, 2, 0]] * 10, np.float32)[:rows]
    ids = logits.argmax(axis=1)
    texts = [f"text <i>{number}</i>\n\x1b[2J" for number in range(rows)]
    return Predictions(
        [NAMES[index] for index in ids], ids, probabilities(logits), logits, label_names=NAMES, texts=texts, **more
    )


def test_predictions_are_a_sequence_of_labels():
    found = predictions()
    assert len(found) == 4 and list(found) == found.labels == ["late", "<b>lost</b>", "red\x1b[31m", "late"]
    assert found[0] == "late" and found[-2] == "red\x1b[31m" and found[np.int64(1)] == "<b>lost</b>"
    part = found[1:3]
    assert type(part) is Predictions and part.labels == found.labels[1:3] and part.texts == found.texts[1:3]
    for name in ("label_ids", "probabilities", "logits"):
        assert np.array_equal(getattr(part, name), getattr(found, name)[1:3])
    assert found[::-1].labels == found.labels[::-1] and len(found[9:]) == 0
    with pytest.raises(IndexError, match="there is no prediction 4: there are 4"):
        found[4]
    assert list(reversed(found)) == found.labels[::-1]
    empty = found[4:][::-2]
    assert (list(empty), empty.logits.shape, len(empty.to_frame())) == ([], (0, 3), 0) and "0 texts" in repr(empty)
    assert found[-3:-1].labels == found.labels[-3:-1] and found[::-2].texts == found.texts[::-2]
    assert found[::2].to_frame()["label"].tolist() == found.labels[::2]
    for place in (
        "late",
        1.0,
        None,
        True,
        np.bool_(True),
        [0],
        (0, 1),
        slice("a", "b"),
        slice(0.5),
        slice(None, None, 0),
    ):
        with pytest.raises(KitError, match=r"as predictions\[0\]"):
            found[place]


def test_predictions_make_a_frame():
    frame = predictions().to_frame(top=2)
    assert isinstance(frame, pd.DataFrame)
    assert list(frame.columns) == ["text", "label", "probability", "label_2", "probability_2"]
    shares = predictions().probabilities
    assert frame["probability"].tolist() == shares.max(axis=1).tolist()
    assert frame["probability_2"].tolist() == np.sort(shares, axis=1)[:, -2].tolist()
    # Of two equal probabilities, the first class is the label, as in label_ids.
    assert frame.loc[3, ["label", "label_2"]].tolist() == ["late", "<b>lost</b>"]
    assert list(predictions().to_frame(top=1).columns) == ["text", "label", "probability"]
    assert predictions().to_frame(top=99).equals(predictions().to_frame())
    assert len(predictions().to_frame().columns) == 7
    assert predictions(top_k=1).to_frame().equals(predictions().to_frame(top=1))
    for top in (0, -1, 1.5, True):
        with pytest.raises(KitError, match="whole number of 1 or more as top"):
            predictions().to_frame(top=top)
    assert len(predictions(rows=0).to_frame()) == 0


def test_predictions_without_names_and_texts_make_a_frame_too():
    whole = predictions()
    bare = Predictions(whole.labels, whole.label_ids, whole.probabilities, whole.logits)
    assert bare.to_frame(top=2)["label_2"].tolist() == ["1", "2", "0", "1"]
    assert "text" not in bare.to_frame() and "late, 84.4%" in repr(bare)
    assert ">text</th>" not in bare._repr_html_()


def test_predictions_show_themselves_in_five_lines_that_cannot_act():
    for found in (predictions(), predictions(rows=40), predictions(rows=0)):
        shown, page = repr(found), found._repr_html_()
        assert len(shown.splitlines()) <= 5 and "\x1b" not in shown + page
        assert "<b>" not in page and "<i>" not in page
    assert "Predictions for 40 texts with 3 labels" in repr(predictions(rows=40))
    assert "and 37 more" in repr(predictions(rows=40)) and "and 37 more" in predictions(rows=40)._repr_html_()


@pytest.fixture(scope="module")
def run(tiny, topics, tmp_path_factory: pytest.TempPathFactory):
    experiment = Experiment(
        name="tiny_bert",
        model=ModelSpec(str(tiny("bert"))),
        lora=LoraSpec(r=4, alpha=8, dropout=0.0),
        training=TrainingSpec(epochs=1, batch_size=32, learning_rate=5e-3, threads=1),
        tracking=TrackingSpec(wandb="none"),
    )
    return qk.finetune(experiment, data=topics, out=tmp_path_factory.mktemp("runs"), progress=False)


def test_a_run_rejects_what_it_is_not_sure_of(run, topics):
    texts = topics.test.texts[:20]
    whole = run.predict(texts)
    assert None not in whole.labels and whole.texts == list(texts) and list(whole.label_names) == run.label_names
    best = whole.probabilities.max(axis=1)
    limit = float(np.median(best))
    some = run.predict(texts, reject_below=limit)
    assert [label is None for label in some.labels] == (best < limit).tolist()
    assert [label for label in some.labels if label] == [
        label for label, share in zip(whole.labels, best, strict=True) if share >= limit
    ]
    assert some.label_ids.tolist() == whole.label_ids.tolist()
    frame = some.to_frame()
    assert frame["rejected"].tolist() == (best < limit).tolist() and frame["label"].isna().sum() == (best < limit).sum()
    assert f"{(best < limit).sum()} rejected" in repr(some) and "rejected" not in whole.to_frame()
    assert run.predict(texts, reject_below=0).labels == whole.labels
    assert set(run.predict(texts, reject_below=1).labels) == {None}
    assert "0 rejected as less probable than 0" in repr(run.predict(texts, reject_below=0))
    certain = predictions(reject_below=1.0)
    assert "rejected" in certain.to_frame()


def test_logits_that_are_not_finite_are_refused(run):
    import torch

    opened = qk.load_run(run.path)
    model, _ = opened.load()
    with torch.no_grad():
        next(weight for name, weight in model.named_parameters() if "lora_B" in name)[:] = math.nan
    with pytest.raises(KitError, match="logits of row 0 are not finite: the model has diverged"):
        opened.predict(["a text"], reject_below=0.5)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"reject_below": math.nan}, "a number from 0 to 1 as reject_below, not the float nan"),
        ({"reject_below": 1.01}, "a number from 0 to 1 as reject_below"),
        ({"reject_below": -0.1}, "a number from 0 to 1 as reject_below"),
        ({"reject_below": True}, "a number from 0 to 1 as reject_below"),
        ({"reject_below": "0.5"}, "a number from 0 to 1 as reject_below"),
        ({"top_k": 0}, "a whole number of 1 or more as top_k"),
        ({"top_k": 1.5}, "a whole number of 1 or more as top_k"),
    ],
)
def test_what_is_out_of_range_is_refused(run, more, words):
    with pytest.raises(KitError, match=words):
        run.predict(["a text"], **more)


def test_a_wrong_argument_is_named(run):
    with pytest.raises(KitError, match="predict was given a int as texts"):
        run.predict(5)


def test_a_run_shows_itself_and_ends_in_a_verdict(run, tmp_path: Path):
    copy = Path(shutil.copytree(run.path, tmp_path / "<b>run</b>"))
    opened = qk.load_run(copy)
    score = opened.training["metrics"]["validation"]["f1_macro"]["value"]
    assert opened.verdict.startswith(f"Not tested yet: macro F1 {score:.3f} (")
    assert opened.verdict.endswith(f"on {opened.training['rows']['validation']} validation rows; `evaluate` says "
                                   "whether a plain SVM does as well.")  # fmt: skip
    lines = repr(opened).splitlines()
    assert len(lines) == 5 and lines[0] == f"Run {copy}: tiny_bert" and lines[-1] == opened.verdict
    assert "<b>" not in opened._repr_html_() and "&lt;b&gt;run" in opened._repr_html_()

    report = qk.evaluate(opened, resamples=20, progress=False)
    assert type(report) is Report and opened.evaluation == report and type(opened.evaluation) is Report
    assert json.loads((copy / "evaluation.json").read_text("utf-8")) == report
    assert opened.verdict == report.verdict and "SVM on TF-IDF" in opened.verdict
    assert repr(opened).splitlines()[-1] == report.verdict

    opened.training["random_weights"] = True
    del report["random_weights"]  # as in records of before it was written down
    (copy / "evaluation.json").write_text(json.dumps(report), "utf-8")
    assert opened.verdict.startswith("The base has random weights, so the scores mean nothing")
    (copy / "evaluation.json").unlink()
    assert opened.verdict.startswith("The base has random weights, so the scores mean nothing")


def test_a_run_whose_records_were_damaged_still_shows_itself(run, tmp_path: Path):
    copy = Path(shutil.copytree(run.path, tmp_path / "run"))
    opened = qk.load_run(copy)
    (copy / "evaluation.json").write_text("{")
    assert repr(opened).startswith(f"Run {copy}\n") and "evaluation.json" in repr(opened)
    assert len(repr(opened).splitlines()) == 2 and "evaluation.json" in opened._repr_html_()


def test_data_shows_itself_in_five_lines_that_cannot_act(topics):
    lines = repr(topics).splitlines()
    assert len(lines) == 5
    rows = {name: len(split) for name, split in topics.splits().items()}
    assert lines[0] == "Data memory: 240 texts with 6 labels"
    assert lines[1] == f"  train {rows['train']}, validation {rows['validation']}, test {rows['test']}"
    assert lines[2].endswith("and 3 more") and topics.label_names[0] in lines[2]
    evil = ("<script>alert(1)</script>\n" * 50, "\x1b[2J\u202e", *topics.label_names[2:])
    train = dataclasses.replace(topics.train, texts=("<img src=x>\n\x1b[2J" * 99, *topics.train.texts[1:]))
    data = dataclasses.replace(topics, label_names=evil, train=train)
    assert len(repr(data).splitlines()) == 5 and max(map(len, repr(data).splitlines())) < 250
    assert not {"\x1b", "\u202e"} & {*repr(data), *data._repr_html_()}
    assert "<script" not in data._repr_html_() and "<img" not in data._repr_html_()
    assert repr(topics.train) == f"Split of {rows['train']} texts, the first one '{topics.train.texts[0]}'"
    nothing = dataclasses.replace(topics.test, texts=(), labels=())
    assert repr(nothing) == "Split of 0 texts"
    assert len(repr(dataclasses.replace(topics, test=nothing, train=nothing)).splitlines()) == 3
