"""Metrics against scikit-learn, intervals that cover, baselines and a whole report on a run that was trained."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import re
import subprocess
import sys
from typing import Any

import evaluate as hf_evaluate
import numpy as np
import pytest
import scipy.optimize
import scipy.stats
from sklearn.metrics import accuracy_score, confusion_matrix, f1_score, log_loss, precision_recall_fscore_support

import qlora_kit as qk
from qlora_kit import evaluation, models, schemas
from qlora_kit.cli import main as cli
from qlora_kit.errors import KitError
from qlora_kit.evaluation.baselines import _embedded, _linear_svm, _tfidf
from qlora_kit.metrics.resampling import draws, unseen
from qlora_kit.notebooks.html import _metrics
from qlora_kit.system.environment import cpu_name
from qlora_kit.system.parsing import SCHEMA


def some_logits(rows=400, classes=7, signal=2.0, seed=0, absent=()):
    rng = np.random.default_rng(seed)
    labels = rng.choice([c for c in range(classes) if c not in absent], size=rows)
    logits = rng.normal(size=(rows, classes)).astype(np.float32)
    logits[np.arange(rows), labels] += signal
    return logits, labels


# ---- metrics ----


@pytest.mark.parametrize("absent", [(), (2, 6)])
def test_values_are_scikit_learns(absent):
    logits, labels = some_logits(absent=absent)
    guess = logits.argmax(axis=1)
    shares = evaluation.probabilities(logits)
    expected = {
        "accuracy": accuracy_score(labels, guess),
        "f1_macro": f1_score(labels, guess, average="macro"),
        "f1_weighted": f1_score(labels, guess, average="weighted"),
        "loss": log_loss(labels, shares, labels=range(7)),
    }
    found = evaluation.metrics(logits, labels, resamples=50)
    assert list(found) == list(evaluation.METRICS)
    for name, value in expected.items():
        assert found[name]["value"] == pytest.approx(value, abs=1e-12), name
        assert found[name]["low"] <= found[name]["high"]
    simple = evaluation.compute_metrics(logits, labels)
    assert simple == pytest.approx({k: v for k, v in expected.items() if k != "loss"}, abs=1e-12)
    assert "loss" not in evaluation.metrics(guess, labels, resamples=5)


def test_every_resample_is_scored_as_scikit_learn_would():
    logits, labels = some_logits(rows=40, classes=9, signal=1.0)  # few rows: classes go missing from resamples
    guess = logits.argmax(axis=1)
    drawn = np.concatenate(list(draws(40, 60, seed=3)))
    scores = {
        "accuracy": [accuracy_score(labels[rows], guess[rows]) for rows in drawn],
        "f1_macro": [f1_score(labels[rows], guess[rows], average="macro") for rows in drawn],
        "f1_weighted": [f1_score(labels[rows], guess[rows], average="weighted") for rows in drawn],
    }
    found = evaluation.metrics(logits, labels, resamples=60, seed=3)
    for name, values in scores.items():
        assert [found[name]["low"], found[name]["high"]] == pytest.approx(np.percentile(values, [2.5, 97.5])), name


def test_intervals_are_seeded_and_as_wide_as_theory_says():
    logits, labels = some_logits(rows=3000, classes=2, signal=1.5)
    first, again, other = (evaluation.metrics(logits, labels, seed=seed) for seed in (0, 0, 1))
    assert first == again != other
    p = first["accuracy"]["value"]
    half = 1.96 * np.sqrt(p * (1 - p) / 3000)
    assert first["accuracy"]["high"] - first["accuracy"]["low"] == pytest.approx(2 * half, rel=0.1)
    losses = evaluation.cross_entropy(logits, labels)
    half = 1.96 * losses.std() / np.sqrt(3000)
    assert first["loss"]["high"] - first["loss"]["low"] == pytest.approx(2 * half, rel=0.1)


def test_lists_are_as_good_as_arrays():
    logits, labels = some_logits(rows=64)
    expected = evaluation.metrics(logits, labels, resamples=20)
    assert expected == evaluation.metrics(logits.tolist(), labels.tolist(), resamples=20)


def test_the_metric_is_an_evaluate_metric_and_needs_no_hub_and_no_home(tmp_path):
    assert isinstance(evaluation.KitMetrics(), hf_evaluate.Metric)
    # Trap 15: evaluate.load fetches a script. Here: no hub, no network at all, and a cache that can't be written.
    blocked = tmp_path / "file-not-folder"
    blocked.write_text("")
    code = (
        "import socket\n"
        "def refuse(*a, **k): raise OSError('no network in this test')\n"
        "socket.socket.connect = refuse; socket.create_connection = refuse\n"
        "from qlora_kit import evaluation\n"
        "print(evaluation.compute_metrics([1, 0, 2, 2], [1, 0, 0, 2]))\n"
    )
    env = {**os.environ, "HF_HOME": str(blocked), "HF_HUB_OFFLINE": "0"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    assert "'accuracy': 0.75" in done.stdout


@pytest.mark.parametrize(
    ("logits", "labels", "message"),
    [
        ([[0.1, 0.2]], [], "at least one row"),
        ([[0.1, 0.2]], [0, 1], "1 predictions for 2 labels"),
        ([[0.1, float("nan")], [0.1, 0.2]], [0, 1], "row 0 are not finite"),
        ([[0.1, 0.2]], [2], "label 2 has no logit"),
    ],
)
def test_what_makes_no_sense_is_refused(logits, labels, message):
    with pytest.raises(KitError, match=message):
        evaluation.metrics(np.array(logits), labels)


@pytest.mark.parametrize(
    ("predictions", "labels", "message"),
    [
        (np.zeros((2, 3, 2)), [0, 1], r"one class a row, not of shape \[2, 3, 2\]"),
        ([0, 1], [[0], [1]], r"labels are one class a row .* not of shape \[2, 1\]"),
        ([0.5, 1], [0, 1], "predicted classes are numbers, .* no whole numbers"),
        ([0, 1], [0, 0.5], "labels are numbers, .* no whole numbers"),
        (["a", "b"], [0, 1], "predicted classes are numbers"),
        ([["a", "b"]], [0], "logits are numbers"),
        ([0, 1, 2], [0, 1], "3 predictions for 2 labels"),
    ],
)
def test_what_are_no_classes_is_refused_and_not_rounded(predictions, labels, message):
    for score in (evaluation.metrics, evaluation.compute_metrics):
        with pytest.raises(KitError, match=message):
            score(predictions, labels)


def test_the_first_row_that_is_not_finite_is_named():
    logits = np.zeros((4, 2))
    logits[2, 1], logits[3, 0] = np.inf, np.nan
    with pytest.raises(KitError, match="the logits of row 2 are not finite"):
        evaluation.probabilities(logits)
    with pytest.raises(KitError, match=r"logits are \[rows, classes\], not of shape \[4\]"):
        evaluation.probabilities(logits[:, 0])


def test_drawing_in_parts_bounds_memory_and_changes_nothing(monkeypatch):
    logits, labels = some_logits(rows=30)
    whole = evaluation.metrics(logits, labels, resamples=10)
    other = evaluation.paired_difference(logits, np.zeros(30, int), labels, resamples=10)
    for most, sizes in ((100, [3, 3, 3, 1]), (30, [1] * 10), (7, [1] * 10), (150, [5, 5])):
        monkeypatch.setattr("qlora_kit.metrics.resampling.DRAWN", most)
        parts = list(draws(30, 10, seed=0))
        assert [len(part) for part in parts] == sizes and {part.shape[1] for part in parts} == {30}
        assert {int(row) for part in parts for row in part.ravel()} == set(range(30))
        assert evaluation.metrics(logits, labels, resamples=10) == whole
        assert evaluation.paired_difference(logits, np.zeros(30, int), labels, resamples=10) == other


def test_large_logits_do_not_overflow():
    found = evaluation.metrics(np.array([[1e4, 0.0], [0.0, 1e4]], dtype=np.float32), [0, 0], resamples=5)
    assert found["loss"]["value"] == pytest.approx(5000)


# ---- paired differences ----


def test_a_pair_is_told_apart_where_single_intervals_overlap():
    rng = np.random.default_rng(0)
    logits, labels = some_logits(rows=2000, classes=5, signal=2.0)
    better = logits.copy()
    better[np.arange(2000), labels] += 0.08  # right wherever the other is, and a little more often
    a, b = evaluation.metrics(better, labels), evaluation.metrics(logits, labels)
    assert a["f1_macro"]["low"] < b["f1_macro"]["high"]
    gap = evaluation.paired_difference(better, logits, labels)
    assert gap["value"] == pytest.approx(a["f1_macro"]["value"] - b["f1_macro"]["value"])
    assert 0 < gap["low"] < gap["value"] < gap["high"]
    flipped = evaluation.paired_difference(logits, better, labels)
    assert flipped == pytest.approx({"value": -gap["value"], "low": -gap["high"], "high": -gap["low"]})
    noise = logits + rng.normal(scale=0.01, size=logits.shape)
    none = evaluation.paired_difference(noise, logits, labels)
    assert none["low"] <= 0 <= none["high"]
    apart = [evaluation.lead_in_words(found) for found in (gap, flipped, none)]
    assert apart == ["ahead", "behind", "not told apart by these test rows"]


@pytest.mark.parametrize(("low", "high"), [(0.0, 0.1), (-0.1, 0.0), (0.0, 0.0)])
def test_an_interval_that_touches_0_tells_nothing_apart(low, high):
    words = evaluation.lead_in_words({"value": (low + high) / 2, "low": low, "high": high})
    assert words == "not told apart by these test rows"


def test_every_baseline_has_a_name_for_figures():
    assert set(evaluation.BASELINE_NAMES) == set(evaluation.BASELINE_C)


@pytest.mark.parametrize("metric", evaluation.METRICS)
def test_seeds_are_averaged_and_rows_drawn_jointly(metric):
    _, labels = some_logits(rows=300)
    seeds = [some_logits(rows=300, seed=0)[0] + some_logits(rows=300, seed=s)[0] * 0.5 for s in (1, 2, 3)]
    other = [some_logits(rows=300, seed=0, signal=1.5)[0]]
    found = evaluation.paired_difference(seeds, other, labels, metric, resamples=40, seed=5)

    def score(logits, rows):
        one = evaluation.metrics(logits[rows], labels[rows], resamples=1)
        return one[metric]["value"]

    every = np.arange(300)
    assert found["value"] == pytest.approx(np.mean([score(s, every) for s in seeds]) - score(other[0], every))
    drawn = [
        np.mean([score(s, rows) for s in seeds]) - score(other[0], rows)
        for rows in np.concatenate(list(draws(300, 40, 5)))
    ]
    assert [found["low"], found["high"]] == pytest.approx(np.percentile(drawn, [2.5, 97.5]))


def test_pairs_take_predictions_lists_and_logits():
    logits, labels = some_logits(rows=50)
    guess = logits.argmax(axis=1)
    zero = evaluation.paired_difference(guess, guess, labels)
    assert evaluation.paired_difference(guess, logits, labels) == zero
    assert evaluation.paired_difference(guess.tolist(), [guess.tolist(), logits], labels) == pytest.approx(zero)
    with pytest.raises(KitError, match="needs logits"):
        evaluation.paired_difference(guess, logits, labels, "loss")
    with pytest.raises(KitError, match=r"'f1'.*Allowed: accuracy, f1_macro"):
        evaluation.paired_difference(guess, logits, labels, "f1")


# ---- intervals where all rows turned out alike ----


def few(classes: int, rows: int) -> np.ndarray:
    return np.arange(rows) % classes


@pytest.mark.parametrize(("rows", "classes"), [(1, 1), (2, 2), (20, 2), (20, 5), (3080, 77)])
def test_a_perfect_or_a_hopeless_score_has_the_exact_limits(rows, classes):
    truth = few(classes, rows)
    exact = scipy.stats.binomtest(rows, rows).proportion_ci(0.95, method="exact").low
    perfect, hopeless = (evaluation.metrics(guess, truth, resamples=20) for guess in (truth, truth + 1))
    assert hopeless["accuracy"] == pytest.approx({"value": 0, "low": 0, "high": 1 - exact})
    for name in ("accuracy", "f1_macro", "f1_weighted"):
        # Labels of equal size: macro F1 has accuracy's limits.
        assert perfect[name] == pytest.approx({"value": 1, "low": exact, "high": 1}), name


def test_one_error_leaves_the_bootstrap_as_it_is():
    truth = few(2, 20)
    guess = truth.copy()
    guess[0] = 1 - guess[0]
    drawn = [np.mean(truth[rows] == guess[rows]) for rows in np.concatenate(list(draws(20, 300, 0)))]
    found = evaluation.metrics(guess, truth, resamples=300)["accuracy"]
    assert [found["low"], found["high"]] == np.percentile(drawn, [2.5, 97.5]).tolist()


@pytest.mark.parametrize("sizes", [(1, 19), (1, 1, 3, 10, 40), (5, 5), (2, 200, 200), (7,)])
def test_a_rare_label_leaves_macro_f1_less_sure(sizes):
    found = unseen(np.repeat(np.arange(len(sizes)), sizes))
    # The largest mean share of wrong rows at which all rows of this test are right in 2.5 of 100 tests, by search.
    best = scipy.optimize.minimize(
        lambda x: -np.mean(1 - np.exp(-x)),
        np.full(len(sizes), 0.05),
        bounds=[(0, 50)] * len(sizes),
        constraints=[{"type": "ineq", "fun": lambda x: -np.log(0.025) - np.dot(sizes, x)}],
    )
    assert found["f1_macro"] == pytest.approx(-best.fun, abs=1e-4)
    assert found["f1_macro"] >= found["accuracy"] - 1e-12


@pytest.mark.parametrize("wrong", [0.01, 0.05, 0.1])
def test_intervals_of_perfect_scores_cover(wrong):
    # Of 20 rows all are right with a chance of (1 - wrong)^20; then the interval has to hold the truth.
    rng, held = np.random.default_rng(0), 0
    truth = np.array([0] * 17 + [1] * 3)
    limits = evaluation.metrics(truth, truth, resamples=2)
    for _ in range(500):
        right = rng.random(20) >= wrong
        held += not right.all() or limits["accuracy"]["low"] <= 1 - wrong
    assert held >= 0.95 * 500
    assert limits["f1_macro"]["low"] < limits["accuracy"]["low"] == pytest.approx(0.025 ** (1 / 20))


@pytest.mark.parametrize("metric", ["accuracy", "f1_macro", "f1_weighted"])
def test_contenders_that_are_right_in_the_same_rows_are_not_known_to_be_equal(metric):
    truth = few(3, 30)
    guess = np.where(np.arange(30) < 12, (truth + 1) % 3, truth)
    share = 1 - 0.025 ** (1 / 30)
    same = {"value": 0, "low": -share, "high": share}
    assert evaluation.paired_difference(guess, guess, truth, metric, resamples=20) == pytest.approx(same)
    assert evaluation.paired_difference([guess, truth], [truth, guess], truth, metric, resamples=20) == pytest.approx(
        same
    )
    # Wrong in the same rows, but not with the same labels: macro F1 may differ a little, and is as unsure.
    other = np.where(np.arange(30) < 12, (truth + 2) % 3, truth)
    found = evaluation.paired_difference(guess, other, truth, metric, resamples=20)
    assert found["low"] <= -share * 0.9 and found["high"] >= share * 0.9
    best = evaluation.paired_difference(truth, (truth + 1) % 3, truth, metric, resamples=20)
    assert best == pytest.approx({"value": 1, "low": 1 - 2 * share, "high": 1})
    assert evaluation.lead_in_words(best) == "ahead"


def test_equal_seeds_are_not_known_to_be_equal_on_other_rows():
    truth = few(3, 30)
    contenders = {"a": {0: truth, 1: truth}, "b": {0: truth, 1: truth}, "c": truth}
    pairs = [("a", "b"), ("a", "c")]
    for found in evaluation.differences_over_rows_and_seeds(contenders, pairs, truth, most=4096):
        share = 1 - 0.0125 ** (1 / 30)  # two intervals are shown
        assert [found["value"], found["low"], found["high"]] == pytest.approx([0, -share, share])


# ---- where it errs ----


def test_the_mean_f1_of_labels_is_macro_f1_whatever_was_not_tested():
    truth, guess = np.array([0, 0, 1, 1, 1]), np.array([0, 3, 1, 1, 0])
    rows = evaluation.per_label(guess, truth, ["a", "b", "c", "d"])
    assert [row["recall"] for row in rows] == [0.5, pytest.approx(2 / 3), None, None]
    assert rows[2] == {"label": "c", "support": 0, "predicted": 0, "precision": None, "recall": None, "f1": None}
    mean = np.mean([row["f1"] for row in rows if row["f1"] is not None])
    assert mean == pytest.approx(evaluation.compute_metrics(guess, truth)["f1_macro"])
    assert mean == pytest.approx(f1_score(truth, guess, average="macro"))


def test_per_label_is_scikit_learns():
    logits, labels = some_logits(absent=(3,))
    names = [f"label {i}" for i in range(7)]
    rows = evaluation.per_label(logits, labels, names)
    precision, recall, f1, support = precision_recall_fscore_support(
        labels, logits.argmax(axis=1), labels=range(7), zero_division=0
    )
    assert [row["label"] for row in rows] == names
    assert [row["predicted"] for row in rows] == np.bincount(logits.argmax(axis=1), minlength=7).tolist()
    for key, values in (("precision", precision), ("recall", recall), ("f1", f1), ("support", support)):
        assert [row[key] or 0 for row in rows] == pytest.approx(list(values))
    assert rows[3]["recall"] is None and rows[3]["f1"] == 0 < rows[3]["predicted"]
    assert json.loads(json.dumps(rows)) == rows
    matrix = evaluation.confusion_matrix(logits, labels, 7)
    assert (matrix == confusion_matrix(labels, logits.argmax(axis=1), labels=range(7))).all()
    with pytest.raises(KitError, match="no name"):
        evaluation.per_label(logits, labels, names[:3])
    with pytest.raises(KitError, match="class -1 has no name: there are 7"):
        evaluation.confusion_matrix(np.where(labels == 2, -1, labels), labels, 7)


def test_confusions_name_pairs_with_their_surest_texts():
    labels = [0, 0, 0, 0, 1, 1, 2]
    logits = np.eye(3)[[1, 1, 2, 0, 0, 1, 2]] * np.array([[1], [3], [2], [1], [1], [1], [1]])
    texts = [f"text {i}" for i in range(7)]
    rows = evaluation.confusions(logits, labels, ["a", "b", "c"], texts)
    assert [(row["true"], row["predicted"], row["count"], row["share"]) for row in rows] == [
        ("a", "b", 2, 0.5), ("a", "c", 1, 0.25), ("b", "a", 1, 0.5)]  # fmt: skip
    assert [example["text"] for example in rows[0]["examples"]] == ["text 1", "text 0"]
    assert 0 < rows[0]["examples"][1]["confidence"] < rows[0]["examples"][0]["confidence"] < 1
    assert len(evaluation.confusions(logits, labels, ["a", "b", "c"], texts, most=1, examples=1)) == 1
    assert evaluation.confusions(np.eye(3)[labels], labels, ["a", "b", "c"], texts) == []
    assert (
        "confidence" not in evaluation.confusions([1, 1, 1, 1, 1, 1, 1], labels, list("abc"), texts)[0]["examples"][0]
    )


def test_calibration_by_hand():
    shares = np.array([[0.95, 0.05], [0.95, 0.05], [0.55, 0.45], [0.45, 0.55]])
    found = evaluation.calibration(np.log(shares), [0, 1, 0, 1])
    # (0.9, 1.0]: two rows, half of them right, 0.95 sure; (0.5, 0.6]: two rows, both right, 0.55 sure.
    assert found["ece"] == pytest.approx(0.5 * 0.45 + 0.5 * 0.45)
    assert [row["count"] for row in found["rows"]] == [0, 0, 0, 0, 0, 2, 0, 0, 0, 2]
    assert found["rows"][9]["accuracy"] == 0.5 and found["rows"][0]["confidence"] is None
    assert (found["accuracy"], found["confidence"]) == (0.75, pytest.approx(0.75))


def test_bins_of_calibration_are_as_many_as_asked_for_and_hold_their_upper_ends():
    shares = np.array([[0.5, 0.5], [0.75, 0.25], [1.0, 0.0], [0.8, 0.2]])
    with np.errstate(divide="ignore"):
        logits = np.maximum(np.log(shares), -1e3)
    rows = evaluation.calibration(logits, [1, 0, 0, 1], bins=4)["rows"]
    assert [(row["low"], row["high"], row["count"]) for row in rows] == [
        (0.0, 0.25, 0), (0.25, 0.5, 1), (0.5, 0.75, 1), (0.75, 1.0, 2),
    ]  # fmt: skip
    assert [row["accuracy"] for row in rows] == [None, 0.0, 1.0, 0.5]
    assert rows[3]["confidence"] == pytest.approx(0.9)
    with pytest.raises(KitError, match="4 predictions for 1 labels"):
        evaluation.calibration(logits, [0])


def test_a_calibrated_classifier_is_found_calibrated():
    rng = np.random.default_rng(0)
    logits = rng.normal(scale=2, size=(20_000, 4))
    labels = np.array([rng.choice(4, p=p) for p in evaluation.probabilities(logits)])
    assert evaluation.calibration(logits, labels)["ece"] < 0.01
    assert evaluation.calibration(logits * 3, labels)["ece"] > 0.1


# ---- baselines and a run's report ----


def test_baselines_learn_and_choose_on_validation(topics):
    def embed(texts):  # the simplest real embedding: counts of letters
        return np.array([[text.lower().count(c) for c in "abcdefghijklmnopqrstuvwxyz"] for text in texts], float)

    found = evaluation.baselines(topics, embed, resamples=200, progress=False)
    assert list(found) == ["tfidf_svm", "embedding_svm"]
    for name, row in found.items():
        assert row["train_rows"] == len(topics.train)
        assert len(row["predictions"]) == len(topics.test)
        assert row["accuracy"]["value"] == np.mean(np.array(row["predictions"]) == topics.test.labels)
        assert row["validation"][f"{row['C']:g}"] == max(row["validation"].values())
        assert set(row["validation"]) == {f"{c:g}" for c in evaluation.BASELINE_C[name]}
    assert found["tfidf_svm"]["accuracy"]["value"] > 0.8 > found["embedding_svm"]["accuracy"]["value"] > 1 / 6
    assert json.loads(json.dumps(found)) == found
    again = evaluation.baselines(topics, resamples=200, progress=False)
    assert list(again) == ["tfidf_svm"]
    assert again["tfidf_svm"]["predictions"] == found["tfidf_svm"]["predictions"]
    with pytest.raises(KitError, match="embed gave 1 rows"):
        evaluation.baselines(topics, lambda texts: np.zeros((1, 2)), progress=False)


def test_a_baseline_is_fitted_on_training_rows_alone(topics):
    def other(split: str) -> qk.TextData:
        rows = getattr(topics, split)
        texts = tuple(f"{text} zzz entirely other words" for text in rows.texts)
        return dataclasses.replace(topics, **{split: dataclasses.replace(rows, texts=texts)})

    train, validation, test = (part.toarray() for part in _tfidf(topics))
    # Neither the words nor their weights know what stands in the other splits.
    after = [part.toarray() for part in _tfidf(other("test"))]
    assert np.array_equal(train, after[0]) and np.array_equal(validation, after[1])
    assert not np.array_equal(test, after[2])
    after = [part.toarray() for part in _tfidf(other("validation"))]
    assert np.array_equal(train, after[0]) and np.array_equal(test, after[2])


def test_a_baseline_chooses_without_a_look_at_the_tests_labels(topics):
    labels = tuple((label + 1) % len(topics.label_names) for label in topics.test.labels)
    other = dataclasses.replace(topics, test=dataclasses.replace(topics.test, labels=labels))
    one, two = (evaluation.baselines(data, resamples=10, progress=False)["tfidf_svm"] for data in (topics, other))
    for key in ("C", "validation", "predictions"):
        assert one[key] == two[key], key
    assert two["accuracy"]["value"] < 0.2 < 0.8 < one["accuracy"]["value"]
    # It is the validation rows' score that is told for each C.
    fitted = _linear_svm(one["C"]).fit(_tfidf(topics)[0], topics.train.labels)
    guess = fitted.predict(_tfidf(topics)[1])
    expected = f1_score(topics.validation.labels, guess, average="macro")
    assert one["validation"][f"{one['C']:g}"] == pytest.approx(expected)


def test_of_equally_good_baselines_the_most_regularized_is_taken(topics):
    place = {
        text: label for split in topics.splits().values() for text, label in zip(split.texts, split.labels, strict=True)
    }
    found = evaluation.baselines(
        topics,
        lambda texts: np.eye(len(topics.label_names))[[place[text] for text in texts]],
        resamples=10,
        progress=False,
    )["embedding_svm"]
    assert set(found["validation"].values()) == {1.0}
    assert found["C"] == min(evaluation.BASELINE_C["embedding_svm"])


def test_the_length_of_an_embedding_tells_a_baseline_nothing(topics):
    def embed(texts):
        return np.array([[text.lower().count(c) for c in "abcdefghijklmnopqrstuvwxyz"] for text in texts], float)

    def stretched(texts):
        lengths = np.random.default_rng(0).uniform(0.01, 100, size=(len(texts), 1))
        return embed(texts) * lengths

    assert np.allclose(np.linalg.norm(np.concatenate(_embedded(topics, stretched)), axis=1), 1)
    one, other = (
        evaluation.baselines(topics, way, resamples=10, progress=False)["embedding_svm"] for way in (embed, stretched)
    )
    assert one["predictions"] == other["predictions"] and one["validation"] == other["validation"]


@pytest.fixture(scope="module")
def run(tiny, topics, tmp_path_factory):
    from qlora_kit.config.experiment import Experiment
    from qlora_kit.config.sections import LoraSpec, ModelSpec, TrackingSpec, TrainingSpec

    experiment = Experiment(
        name="tiny_bert",
        model=ModelSpec(str(tiny("bert"))),
        lora=LoraSpec(r=4, alpha=8, dropout=0.0),
        training=TrainingSpec(epochs=1, batch_size=32, learning_rate=5e-3, threads=1),
        tracking=TrackingSpec(wandb="none"),
    )
    return qk.finetune(experiment, data=topics, out=tmp_path_factory.mktemp("runs"), progress=False)


def test_a_report_comes_from_the_run_folder_alone(run, topics):
    before = {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()}
    code = (
        "import sys, qlora_kit\n"
        "report = qlora_kit.evaluate(sys.argv[1], resamples=100, progress=False)\n"
        "print(report['metrics']['test']['accuracy']['value'])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(run.path)], capture_output=True, text=True, cwd="/", env={
            **os.environ, "PYTHONPATH": os.pathsep.join(sys.path)})  # fmt: skip
    assert done.returncode == 0, done.stderr
    report = json.loads((run.path / "evaluation.json").read_text(encoding="utf-8"))
    assert float(done.stdout.strip().splitlines()[-1]) == report["metrics"]["test"]["accuracy"]["value"]
    after = {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()}
    assert {path.name for path in set(after) - set(before)} == {"evaluation.json"}  # the only file it adds
    # The card tells the test's scores now; everything else is as it was.
    assert [path.name for path, content in before.items() if after[path] != content] == ["README.md"]

    assert report["schema"] == 1
    assert set(report["metrics"]) == {"test", "validation", "baselines"} and topics.leaked_test_indices == ()
    for split in ("test", "validation"):
        assert set(report["metrics"][split]) == set(evaluation.METRICS)
    guess = np.array(report["predictions"]["test"])
    assert report["metrics"]["test"]["accuracy"]["value"] == np.mean(guess == topics.test.labels)
    assert np.trace(report["confusion_matrix"]) == np.sum(guess == topics.test.labels)
    assert [row["label"] for row in report["per_label"]] == list(topics.label_names) == report["labels"]
    for name in ("tfidf_svm", "embedding_svm"):
        row = report["metrics"]["baselines"][name]
        ahead = report["metrics"]["test"]["f1_macro"]["value"] - row["f1_macro"]["value"]
        assert row["ahead"]["f1_macro"]["value"] == pytest.approx(ahead)
        assert len(report["predictions"][name]) == len(topics.test)
    assert report["environment"]["checksums"]["data"] == topics.checksum
    assert report["timing"]["predict_seconds"] > 0


def test_a_forward_pass_has_the_rows_of_trainings_evaluations_unless_told_otherwise(run, topics):
    opened = qk.load_run(run.path)
    opened.experiment = opened.experiment.override({"training.eval_batch_size": 3})
    seen: list[int] = []
    model, _ = opened.load()
    model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    opened.predict(topics.test.texts[:7])
    assert seen == [3, 3, 1]
    seen.clear()
    opened.predict(topics.test.texts[:7], batch_size=5)
    assert seen == [5, 2]
    assert run.evaluation_rows == 64  # a CPU's


def test_each_part_of_a_report_is_about_its_own_rows(run, topics):
    truth = {name: np.array(split.labels) for name, split in topics.splits().items()}
    logits = {name: run.predict(split.texts).logits for name, split in topics.splits().items()}
    # A baseline that is right where accuracy and macro F1 differ most: on the rows of the first label alone.
    guess = np.where(truth["test"] == 0, 0, (truth["test"] + 1) % 6)
    row = {**evaluation.metrics(guess, truth["test"], resamples=10), "predictions": guess.tolist()}
    report = evaluation.evaluate(run, baselines={"tfidf_svm": row}, progress=False)
    for split in ("test", "validation"):
        for name, value in evaluation.compute_metrics(logits[split], truth[split]).items():
            assert report["metrics"][split][name]["value"] == pytest.approx(value), (split, name)
    assert report["metrics"]["test"]["accuracy"]["value"] != report["metrics"]["validation"]["accuracy"]["value"]
    assert report["calibration"]["accuracy"] == pytest.approx(report["metrics"]["test"]["accuracy"]["value"])
    assert report["calibration"]["ece"] == pytest.approx(evaluation.calibration(logits["test"], truth["test"])["ece"])
    for name, ahead in report["metrics"]["baselines"]["tfidf_svm"]["ahead"].items():
        expected = evaluation.paired_difference(logits["test"], guess, truth["test"], name)
        assert ahead == pytest.approx(expected), name
    # Fewer do not settle an interval's ends (Efron and Tibshirani, section 19.3: 1,000 or more for percentiles).
    assert report["resamples"] == evaluation.RESAMPLES >= 1000


def test_a_report_says_what_was_tested_on_what_and_with_what(run, topics, capsys):
    report = evaluation.evaluate(run, resamples=30, progress=True)
    said = capsys.readouterr().err
    for bar in ("test: 100%", "validation: 100%", "embedding: 100%", "baselines: 100%"):
        assert bar in said, bar
    logits = {name: run.predict(split.texts).logits for name, split in topics.splits().items()}
    truth, names = np.array(topics.test.labels), topics.label_names
    assert (report["preset"], report["resamples"], report["schema"]) == ("tiny_bert", 30, SCHEMA)
    assert report["metrics"]["test"] == evaluation.metrics(logits["test"], truth, resamples=30)
    expected = evaluation.metrics(logits["validation"], topics.validation.labels, resamples=30)
    assert report["metrics"]["validation"] == expected
    guess = logits["test"].argmax(axis=1)
    assert report["predictions"]["test"] == guess.tolist()
    assert report["confusion_matrix"] == confusion_matrix(truth, guess, labels=range(6)).tolist()
    assert report["per_label"] == evaluation.per_label(guess, truth, names)
    assert report["confusions"] == evaluation.confusions(logits["test"], truth, names, topics.test.texts)
    assert report["calibration"] == evaluation.calibration(logits["test"], truth)
    # The baselines are fitted on this data, with the states of this run's base.
    embed = functools.partial(models.embed, run.experiment, batch_size=run.evaluation_rows, progress=None)
    for name, row in evaluation.baselines(topics, embed, resamples=30, progress=False).items():
        told = report["metrics"]["baselines"][name]
        assert report["predictions"][name] == row["predictions"] and "predictions" not in told
        assert told.keys() == row.keys() - {"predictions"} | {"ahead"}
        for key in told.keys() - {"ahead", "seconds"}:
            assert told[key] == row[key], (name, key)
        again = evaluation.paired_difference(guess, row["predictions"], truth, "accuracy", resamples=30)
        assert told["ahead"]["accuracy"] == again
    assert report["data"] == {
        "name": topics.spec.name,
        "rows": {name: len(split) for name, split in topics.splits().items()},
        "leaked_test_indices": list(topics.leaked_test_indices),
        "checksum": topics.checksum,
    }
    timing = report["timing"]
    assert timing["samples_per_second"] == pytest.approx(len(truth) / timing["predict_seconds"])
    assert 0 < timing["predict_seconds"] < timing["total_seconds"] < 600
    assert report["environment"]["device"] == cpu_name()
    assert report["environment"]["checksums"] == {
        "data": topics.checksum, "base": run.environment["checksums"]["base"],
    }  # fmt: skip
    assert report == run.evaluation  # what is returned is what was written
    evaluation.evaluate(run, baselines=False, resamples=10, progress=False)
    assert "100%" not in capsys.readouterr().err


def test_a_report_is_the_same_twice(run):
    def timeless(tree):
        if isinstance(tree, dict):
            return {k: timeless(v) for k, v in tree.items() if k not in ("seconds", "timing")}
        return tree

    first = evaluation.evaluate(run, resamples=100, progress=False)
    given = {
        name: {**row, "predictions": first["predictions"][name]} for name, row in first["metrics"]["baselines"].items()
    }
    again = evaluation.evaluate(run, baselines=given, resamples=100, progress=False)
    assert timeless(first) == timeless(again)
    assert evaluation.evaluate(run, baselines=False, resamples=10, progress=False)["metrics"]["baselines"] == {}


def test_other_lengths_than_the_runs_are_refused(run, topics):
    def asking(**fields):
        return dataclasses.replace(topics, spec=dataclasses.replace(topics.spec, **fields))

    assert evaluation.data_of(run, asking(name="rows.csv")).checksum == topics.checksum
    for fields in ({"max_length": 64}, {"too_long": "refuse"}):
        with pytest.raises(KitError, match=rf"data\.{next(iter(fields))} is .* which holds for its predictions too"):
            evaluation.evaluate(run, data=asking(**fields))


def test_other_rows_than_the_runs_are_refused(run):
    with pytest.raises(KitError, match="trained on other rows"):
        evaluation.evaluate(run, data=qk.banking77(limit=77))
    with pytest.raises(KitError, match="no run folder"):
        evaluation.evaluate(run.path.with_name("tiny_bret"))


def test_a_test_that_was_wholly_trained_on_is_told_everywhere(tiny, tmp_path, capsys):
    rows = [{"text": f"{mood} number {i}", "label": mood} for i in range(12) for mood in ("happy", "cross")]
    test = [{**row, "text": f"{row['text'].upper()}?"} for row in rows[:6]]
    words = "6 of 6 test texts (100.0%) also stand in training or validation"
    with pytest.warns(UserWarning, match=re.escape(words)):
        data = qk.text_classification(rows, test=test, validation=0.2)
    experiment = qk.Experiment(name="leak", model=qk.ModelSpec(str(tiny("bert")))).override(
        {"training.max_steps": 1, "training.threads": 1, "tracking.wandb": "none"}
    )
    run = qk.finetune(experiment, data=data, out=tmp_path, progress=False)
    with pytest.warns(UserWarning, match=re.escape(words)):
        assert cli.main(["evaluate", str(run.path), "--no-baselines", "--quiet"]) == 0
    said = capsys.readouterr().out
    assert re.search(r"^test_without_leaked +$", said, re.MULTILINE) and words in said
    report = run.evaluation
    assert report["metrics"]["test_without_leaked"] is None and len(report["data"]["leaked_test_indices"]) == 6
    assert schemas.check([run.path])[1] == []
    assert words in run.write_card().read_text(encoding="utf-8")
    assert "test without leaked texts: none is left" in _metrics(report["metrics"])


def test_leaked_test_rows_are_scored_apart(tiny, tmp_path):
    import pandas

    full = qk.banking77()
    rows = [(t, full.label_names[c]) for t, c in zip(full.train.texts, full.train.labels, strict=True) if c in (0, 1)]
    held, rows = rows[:20], rows[20:]
    held = held + [(text.upper() + "  ", label) for text, label in rows[:5]]
    frame, test = (pandas.DataFrame(part, columns=["text", "label"]) for part in (rows, held))
    data = qk.text_classification(frame, test=test, validation=0.2)
    experiment = qk.Experiment(name="leak", model=qk.ModelSpec(str(tiny("bert")))).override(
        {"training.epochs": 1, "training.threads": 1, "training.max_steps": 2, "tracking.wandb": "none"}
    )
    run = qk.finetune(experiment, data=data, out=tmp_path, progress=False)
    report = qk.evaluate(run, baselines=False, resamples=20, progress=False)
    assert report["data"]["leaked_test_indices"] == [20, 21, 22, 23, 24]
    guess = np.array(report["predictions"]["test"])[:20]
    clean = report["metrics"]["test_without_leaked"]["accuracy"]["value"]
    assert clean == np.mean(guess == np.array(data.test.labels)[:20])


# ---- over rows and seeds together ----


def runs_of(truth: np.ndarray, shares: list[float], seed: int = 0) -> dict[int, np.ndarray]:
    """Return predictions by seed, of each a share wrong."""
    found = {}
    for place, share in enumerate(shares):
        wrong = np.random.default_rng([seed, place]).random(len(truth)) < share
        found[place] = np.where(wrong, (truth + 1) % 5, truth)
    return found


def test_rows_and_seeds_together_are_wider_than_either():
    truth = np.arange(600) % 5
    ours, theirs = runs_of(truth, [0.10, 0.14, 0.12]), runs_of(truth, [0.2], 1)[0]
    contenders = {"ours": ours, "theirs": theirs}
    (found,) = evaluation.differences_over_rows_and_seeds(contenders, [("ours", "theirs")], truth, tolerance=2e-3)
    rows = evaluation.paired_difference(list(ours.values()), theirs, truth)
    scores = [evaluation.compute_metrics(one, truth)["f1_macro"] for one in ours.values()]
    reach = scipy.stats.t.ppf(0.975, 2) * np.std(scores, ddof=1) / np.sqrt(3)
    assert found["value"] == pytest.approx(rows["value"], abs=1e-6)
    assert found["seeds"] == [3, None] and found["shown"] == 1
    half = (found["high"] - found["low"]) / 2
    halves = ((rows["high"] - rows["low"]) / 2, reach)
    assert half > max(halves)
    # Two independent chances add as their squares do; three seeds give the bootstrap few means to draw.
    assert half == pytest.approx(np.hypot(*halves), rel=0.15)


def test_without_seeds_it_is_the_interval_over_rows():
    truth = np.arange(400) % 5
    a, b = (runs_of(truth, [share], place)[0] for place, share in enumerate((0.1, 0.15)))
    (found,) = evaluation.differences_over_rows_and_seeds({"a": a, "b": b}, [("a", "b")], truth, tolerance=1e-3)
    rows = evaluation.paired_difference(a, b, truth, resamples=40_000)
    for end in ("low", "high"):
        assert found[end] == pytest.approx(rows[end], abs=5e-3)
    assert found["seeds"] == [None, None]


def test_seeds_that_both_have_are_paired():
    truth = np.arange(600) % 5
    shares = [0.05, 0.15, 0.3]
    ours, theirs = runs_of(truth, shares), runs_of(truth, shares, 1)
    pair = [("ours", "theirs")]
    paired = evaluation.differences_over_rows_and_seeds({"ours": ours, "theirs": theirs}, pair, truth, tolerance=5e-3)[
        0
    ]
    apart = {10 + seed: one for seed, one in theirs.items()}
    unpaired = evaluation.differences_over_rows_and_seeds({"ours": ours, "theirs": apart}, pair, truth, tolerance=5e-3)[
        0
    ]
    assert unpaired["high"] - unpaired["low"] > 2 * (paired["high"] - paired["low"])
    # Of seeds that only one has, a pair says nothing.
    more = {**theirs, 7: truth}
    again = evaluation.differences_over_rows_and_seeds({"ours": ours, "theirs": more}, pair, truth, tolerance=5e-3)[0]
    assert again["value"] == pytest.approx(paired["value"]) and again["seeds"] == [3, 3]


def test_ends_are_as_certain_as_asked_for_and_corrected_for_how_many_are_shown():
    truth = np.arange(300) % 5
    contenders = {"a": runs_of(truth, [0.1, 0.12, 0.11]), "b": runs_of(truth, [0.2], 1)[0]}

    def interval(**more: Any) -> dict[str, Any]:
        return evaluation.differences_over_rows_and_seeds(contenders, [("a", "b")], truth, **more)[0]

    rough, fine = interval(tolerance=3e-3), interval(tolerance=1e-3)
    assert rough["end_error"] <= 3e-3 and fine["end_error"] <= 1e-3 < rough["end_error"] * 3
    assert fine["resamples"] > rough["resamples"]
    # Another drawing moves an end by no more than a few of its standard errors; the same seed by nothing.
    ends = [interval(tolerance=1e-3, seed=seed)["low"] for seed in range(4)]
    assert np.std(ends) < 3e-3 and ends[0] == fine["low"]
    assert interval(tolerance=0, most=5000)["resamples"] == 5000
    more = interval(tolerance=1e-3, shown=10)
    assert more["low"] < fine["low"] and more["high"] > fine["high"] and more["value"] == fine["value"]


def test_an_interval_over_seeds_that_cannot_be_is_refused():
    truth = np.arange(20) % 5
    contenders = {"a": {0: truth}, "b": truth, "c": truth[:-1]}
    for pairs, more, words in (
        ([("a", "b")], {}, "a has 1 seed, which tells nothing of other seeds"),
        ([("b", "d")], {}, "contender"),
        ([("b", "c")], {}, "19 predictions for 20 labels"),
        ([("b", "b")] * 2, {"shown": 1}, "shown=1"),
    ):
        with pytest.raises(KitError, match=words):
            evaluation.differences_over_rows_and_seeds(contenders, pairs, truth, **more)
