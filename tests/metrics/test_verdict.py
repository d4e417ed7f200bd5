"""One sentence about a test, and the report that shows itself: what each says, and that it stays a dict."""

from __future__ import annotations

import copy
import json
import pickle
from typing import Any

import pandas as pd
import pytest

from qlora_kit.errors import KitError
from qlora_kit.metrics.verdict import Report, untested, verdict


def score(value: float, half: float = 0.01) -> dict[str, float]:
    return {"value": value, "low": value - half, "high": value + half}


def scores(value: float, half: float = 0.01) -> dict[str, Any]:
    return {name: score(value, half) for name in ("accuracy", "f1_macro", "f1_weighted")}


def evaluation(
    f1: float = 0.895, half: float = 0.011, rows: int = 3080, **leads: tuple[float, float]
) -> dict[str, Any]:
    """Return what `verdict` reads of an evaluation; `leads` are (value, half width) of the run's lead, by baseline."""
    return {
        "schema": 1,
        "preset": "mine",
        "random_weights": False,
        "metrics": {
            "test": scores(f1, half),
            "test_without_leaked": scores(f1, half),
            "validation": scores(f1, half),
            "baselines": {
                name: {**scores(f1 - lead), "ahead": {"accuracy": score(lead, wide), "f1_macro": score(lead, wide)}}
                for name, (lead, wide) in leads.items()
            },
        },
        "per_label": [{"label": name, "support": rows // 2} for name in "ab"],
    }


CLEAR, UNCLEAR = (0.021, 0.01), (0.003, 0.01)
BEHIND = (-0.034, 0.01)
M = "Macro F1 0.895 (0.884 to 0.906)"
SENTENCES = [
    (
        {"tfidf_svm": CLEAR, "embedding_svm": UNCLEAR},
        f"{M}: ahead of the SVM on TF-IDF by 0.021; no clear difference from the SVM on frozen states: the simpler one "
        "may be enough.",
    ),
    (
        {"embedding_svm": CLEAR, "tfidf_svm": CLEAR},
        f"{M}: ahead of the SVM on TF-IDF by 0.021 and the SVM on frozen states by 0.021: fine-tuning gave the better "
        "classifier.",
    ),
    (
        {"tfidf_svm": UNCLEAR, "embedding_svm": UNCLEAR},
        f"{M}: no clear difference from the SVM on TF-IDF or the SVM on frozen states: one of the simpler ones may be "
        "enough.",
    ),
    (
        {"tfidf_svm": CLEAR, "embedding_svm": BEHIND},
        "Behind the SVM on frozen states by 0.034, with macro F1 0.895 (0.884 to 0.906); ahead of the SVM on TF-IDF by "
        "0.021: take the simpler one, or look for better settings.",
    ),
    (
        {"tfidf_svm": BEHIND, "embedding_svm": BEHIND},
        "Behind the SVM on TF-IDF by 0.034 and the SVM on frozen states by 0.034, with macro F1 0.895 (0.884 to "
        "0.906): take one of the simpler ones, or look for better settings.",
    ),
    ({}, f"{M}; no baseline was tested beside it, so whether a plain SVM does as well is not known."),
    ({"nearest\x1b[2J_mean": CLEAR}, f"{M}: ahead of the nearest\\x1b[2J_mean by 0.021: fine-tuning gave the better "
     "classifier."),
]  # fmt: skip


@pytest.mark.parametrize(("leads", "said"), SENTENCES)
def test_a_sentence_compares_with_each_baseline(leads: dict[str, tuple[float, float]], said: str):
    assert verdict(evaluation(**leads)) == said


@pytest.mark.parametrize("gap", [(0.01, 0.01), (-0.01, 0.01), (0.0, 0.0)])
def test_an_interval_that_touches_0_is_neither_ahead_nor_behind(gap: tuple[float, float]):
    # 0.01 - 0.01 is exactly 0 in floats, too.
    assert "no clear difference from the SVM on TF-IDF: the simpler one may be enough." in verdict(
        evaluation(tfidf_svm=gap)
    )


def test_a_lead_too_small_to_print_is_not_printed_as_0():
    assert "ahead of the SVM on TF-IDF by less than 0.001" in verdict(evaluation(tfidf_svm=(0.0004, 0.0003)))
    assert "by 0.001" in verdict(evaluation(tfidf_svm=(0.0005, 0.0003)))


def test_scores_that_mean_nothing_are_called_so():
    random = evaluation(tfidf_svm=CLEAR) | {"random_weights": True}
    assert verdict(random).startswith("The base has random weights, so the scores mean nothing")
    assert "SVM" not in verdict(random)
    leaked = evaluation(tfidf_svm=CLEAR)
    leaked["metrics"]["test_without_leaked"] = None
    assert verdict(leaked).startswith("Every test text was also trained on, so the scores say nothing about new texts")
    assert "SVM" not in verdict(leaked)


def test_a_score_of_few_rows_is_called_unsure():
    said = verdict(evaluation(0.7, half=0.06, rows=80, tfidf_svm=UNCLEAR))
    assert "(0.640 to 0.760; unsure, as there are only 80 test rows): no clear" in said
    assert "unsure" not in verdict(evaluation(0.7, half=0.04, rows=80, tfidf_svm=UNCLEAR))
    # All of a few rows right: the interval has no width, and the score is unsure all the same.
    assert "Macro F1 1.000 (1.000 to 1.000; unsure, as there are only 24 test rows)" in verdict(
        evaluation(1.0, half=0.0, rows=24, tfidf_svm=UNCLEAR)
    )


def test_labels_without_test_rows_are_counted_and_are_not_the_weakest():
    report = Report(evaluation(tfidf_svm=CLEAR))
    assert "no test row" not in report.verdict
    report["per_label"] = [
        {"label": "never", "support": 0, "f1": None},
        {"label": "good", "support": 3000, "f1": 0.9},
        {"label": "taken", "support": 0, "f1": 0.0},
        {"label": "bad", "support": 80, "f1": 0.2},
    ]
    assert f"{M[:-1]}; 2 of 4 labels have no test row): ahead" in report.verdict
    assert [row["label"] for row in report.weakest()] == ["bad", "good"] and len(report.weakest(1)) == 1
    report["per_label"].pop(0)
    assert "1 of 3 labels has no test row" in report.verdict
    for most in (0, True, 1.5):
        with pytest.raises(KitError, match="whole number of 1 or more as most"):
            report.weakest(most)


@pytest.mark.parametrize(("rows", "words"), [(1, "is only 1 validation row"), (30, "are only 30 validation rows")])
def test_a_validation_score_of_few_rows_is_called_unsure(rows: int, words: str):
    training = {"metrics": {"validation": scores(1.0, 0.0)}, "rows": {"validation": rows}, "random_weights": False}
    assert f"(unsure, as there {words}); `evaluate` says" in untested(training)
    assert "unsure" not in untested(training | {"rows": {"validation": 31}})
    wide = {"validation": scores(0.7, 0.051)}
    assert "unsure" in untested(training | {"rows": {"validation": 5000}, "metrics": wide})


BROKEN: dict[str, Any] = {
    "empty": {},
    "of something else": {"a": 1},
    "without a section": {"metrics": {"test": scores(0.9)}},
    "with no scores": {"metrics": {"test": None}, "per_label": []},
    "with a number for a section": {"metrics": 5, "per_label": []},
    "with words for a score": evaluation() | {"metrics": {"test": scores(0.9) | {"f1_macro": "good"}}},
    "with words for numbers": evaluation()
    | {"metrics": {"test": scores(0.9) | {"f1_macro": dict.fromkeys(("value", "low", "high"), "x")}}},
    "with half a lead": evaluation()
    | {"metrics": {"test": scores(0.9), "baselines": {"svm": {**scores(0.8), "ahead": {"f1_macro": {}}}}}},
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_report_that_is_not_whole_is_refused_in_one_line(kind: str):
    with pytest.raises(KitError, match=r"this is no whole report of evaluate, .*: .") as caught:
        _ = Report(BROKEN[kind]).verdict
    assert "\n" not in str(caught.value)
    assert repr(Report(BROKEN[kind]))
    Report(BROKEN[kind])._repr_html_()


@pytest.mark.parametrize("content", [{}, {"metrics": 5}, {"metrics": {"test": {"accuracy": {"value": "x"}}}}])
def test_a_table_and_the_weakest_labels_need_a_whole_report(content: dict[str, Any]):
    for call in (Report(content).to_frame, Report(content).weakest):
        with pytest.raises(KitError, match="this is no whole report of evaluate"):
            call()


def test_leaked_rows_are_told_where_they_move_the_score_out_of_its_interval():
    told = evaluation(tfidf_svm=CLEAR)
    told["metrics"]["test_without_leaked"] = scores(0.85)
    assert f"{M[:-1]}; 0.850 without the test texts that were also trained on): ahead" in verdict(told)
    told["metrics"]["test_without_leaked"] = scores(0.89)
    assert "without" not in verdict(told)


def test_older_records_are_told_as_far_as_they_go():
    old = evaluation(tfidf_svm=CLEAR)
    del old["random_weights"], old["metrics"]["test_without_leaked"]
    assert verdict(old).startswith(f"{M}: ahead of the SVM on TF-IDF")
    del old["metrics"]["baselines"]["tfidf_svm"]["ahead"]
    assert "no baseline was tested" in verdict(old)
    del old["metrics"]["baselines"]
    assert "no baseline was tested" in verdict(old)
    assert list(Report(old).to_frame().index) == ["run"]


def test_a_report_is_a_dict_that_shows_itself():
    content = evaluation(embedding_svm=UNCLEAR, tfidf_svm=CLEAR)
    report = Report(content)
    assert report == content and isinstance(report, dict) and report["preset"] == "mine"
    assert json.loads(json.dumps(report)) == content
    for twin in (pickle.loads(pickle.dumps(report)), copy.deepcopy(report)):
        assert type(twin) is Report and twin == report
    assert report.verdict == verdict(content)
    lines = repr(report).splitlines()
    assert lines == [
        "Test of mine: 3,080 rows, 2 labels",
        "  this run: accuracy 0.895 (0.884 to 0.906), macro F1 0.895 (0.884 to 0.906)",
        "  SVM on TF-IDF: accuracy 0.874 (0.864 to 0.884), macro F1 0.874 (0.864 to 0.884)",
        "  SVM on frozen states: accuracy 0.892 (0.882 to 0.902), macro F1 0.892 (0.882 to 0.902)",
        report.verdict,
    ]
    assert str(report) == repr(report)


def test_a_report_of_many_baselines_stays_at_five_lines():
    report = Report(evaluation(**{f"b{number}": CLEAR for number in range(9)}))
    assert len(repr(report).splitlines()) == 5
    assert len(report.to_frame()) == 10


def test_a_report_makes_a_frame():
    frame = Report(evaluation(embedding_svm=UNCLEAR, tfidf_svm=CLEAR)).to_frame()
    assert isinstance(frame, pd.DataFrame)
    assert list(frame.index) == ["run", "tfidf_svm", "embedding_svm"]
    ends = [f"{name}{end}" for name in ("accuracy", "f1_macro") for end in ("", "_low", "_high")]
    assert list(frame.columns) == ends and set(frame.dtypes) == {frame["accuracy"].dtype}
    assert frame.loc["tfidf_svm"].tolist() == pytest.approx([0.874, 0.864, 0.884] * 2)


def test_names_cannot_act_as_markup_or_reach_the_terminal():
    report = Report(evaluation(tfidf_svm=CLEAR, **{"<script>alert(1)</script>": CLEAR}))
    report["preset"] = "<img src=x onerror=alert(1)>\n\x1b[2J"
    page = report._repr_html_() or ""
    assert "<script" not in page and "<img" not in page and "&lt;script&gt;" in page and "&lt;img" in page
    assert "\x1b" not in repr(report) and len(repr(report).splitlines()) == 5


@pytest.mark.parametrize("content", [{}, {"a": 1}, {"metrics": {"test": None}}, {"metrics": 5, "per_label": []}])
def test_other_dicts_are_shown_as_they_are(content: dict[str, Any]):
    assert repr(Report(content)) == repr(content)
    assert Report(content)._repr_html_() is None
