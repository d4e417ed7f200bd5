"""The tables and lines that notebooks show, from small records whose right answer is known."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import qlora_kit as qk
from qlora_kit import memory, quantization
from qlora_kit.notebooks import quantizing, tables
from qlora_kit.quantization import Quantization

MIB = 2**20


def interval(value: float) -> dict[str, float]:
    return {"value": value, "low": value - 0.01, "high": value + 0.01}


def compared(label: str, planned: float, measured: float | None, linear: float = 1.0) -> dict[str, Any]:
    """Return a row of `memory.compare`; sizes in MiB."""
    parts = {"base, linear layers": linear * MIB, "activations": (planned - linear) * MIB}
    whole = None if measured is None else measured * MIB
    return {"label": label, "planned": planned * MIB, "measured": whole, "counted": whole, "parts": parts,
            "measured_parts": parts if measured else {}, "step_seconds": 0.5 if measured else None}  # fmt: skip


ROWS = [compared("LoRA", 100, 101, 40), compared("QLoRA nf4", 70, 70, 10), compared("full", 400, None)]


def test_the_memory_of_methods_side_by_side():
    assert "planned    100.0 MiB   measured    101.0 MiB" in tables.compared(ROWS[0])
    assert tables.compared(ROWS[2]).endswith("measured out of memory")
    table = tables.comparison(ROWS)
    assert table.loc["LoRA", "difference"] == "-0.99%" and table.loc["full", "measured MiB"] == "out of memory"
    assert table.loc["QLoRA nf4", "seconds a step, timed once"] == "0.500"
    said = tables.saved_by_quantization(ROWS)
    assert "from 40.0 to 10.0 MiB" in said and "the whole becomes 30% smaller" in said
    whole = tables.measured_parts(ROWS)
    assert list(whole.columns) == ["LoRA", "QLoRA nf4"]
    assert whole.loc["sum of the parts", "LoRA"] == 100 and whole.loc["measured whole", "LoRA"] == 101


@pytest.mark.parametrize(("counted", "warned"), [(101, False), (90, True)])
def test_parts_that_do_not_add_up_are_warned_of(counted: float, warned: bool):
    rows = [{**ROWS[0], "counted": counted * MIB}, ROWS[1], ROWS[2]]
    gap, lines = tables.parts_against_whole(rows)
    assert gap == pytest.approx(1 - counted / 101) and ("WARNING" in lines) == warned
    assert "worst: LoRA, -0.99%" in lines


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ([0.3, 0.4], "QLoRA is faster than LoRA here: no round of one was as slow as any of the other"),
        ([0.7, 0.8], "QLoRA is slower than LoRA here: no round of one was as fast as any of the other"),
        ([0.4, 0.55], "QLoRA and LoRA are not told apart here: their ranges overlap"),
        ([0.6, 0.7], "QLoRA and LoRA are not told apart here: their ranges overlap"),
    ],
)
def test_a_race_tells_apart_only_what_does_not_overlap(other: list[float], said: str):
    rows = [{"label": label, "step_seconds_each": each, "step_seconds": each[0]}
            for label, each in (("LoRA", [0.5, 0.6]), ("QLoRA", other))]  # fmt: skip
    lines = tables.race(rows).splitlines()
    assert lines[0] == "LoRA         a step, 2 rounds: 0.500 to 0.600 s, median 0.500 s" and lines[-1] == said
    nothing = [rows[0], {"label": "QLoRA", "step_seconds_each": [], "step_seconds": None}]
    assert tables.race(nothing).splitlines()[-1] == "QLoRA        a step, 0 rounds: out of memory"


def test_what_a_plan_leaves_of_a_gpu_and_what_lies_in_pages():
    gpu = SimpleNamespace(name="T4", bytes=1000 * MIB)
    plan = SimpleNamespace(device=gpu, reserved=900 * MIB, paged=0, parts={"optimizer": 3 * MIB}, parameters=(1234, 5))
    large = SimpleNamespace(**{**vars(plan), "reserved": 1200 * MIB, "paged": 50 * MIB})
    lines = tables.room({"small": plan, "large": large}).splitlines()
    assert lines[0].endswith("on a T4 that leaves 100 MiB free")
    assert lines[1].endswith("and 50 MiB in pages beside it; on a T4 that lacks 200 MiB")
    assert tables.room({}) == ""
    table = tables.pages({16: plan, 64: large})
    assert table.loc[16, "trained parameters"] == "1,234" and table.loc[64, "state in pages, MiB"] == "50"


def test_how_far_a_gpu_reaches():
    row = {"method": "qlora", "scheme": "nf4", "checkpointing": True, "length": 64, "batch": 4096, "longest": 512}
    table = tables.reach([row, {**row, "method": "full", "batch": 0, "longest": 0}])
    assert list(table.index) == ["QLoRA nf4", "full fine-tuning"]
    assert list(table.iloc[0]) == ["yes", "4,096+", 512] and list(table.iloc[1])[1:] == ["does not fit"] * 2


METRICS = {
    "test": {"accuracy": interval(0.9), "f1_macro": interval(0.8)},
    "test_without_leaked": None,
    "baselines": {"tfidf_svm": {"f1_macro": interval(0.7), "ahead": {"f1_macro": interval(0.1)}}},
}


def test_scores_beside_the_baselines():
    table = tables.scores(METRICS)
    assert table.loc["fine-tuned", "macro F1"] == "0.8000  (0.7900 to 0.8100)"
    assert (
        table.loc["SVM on TF-IDF", "accuracy"] == ""
        and table.loc["fine-tuned, leaked texts left out", "macro F1"] == ""
    )
    nothing_leaked = {name: found for name, found in METRICS.items() if name != "test_without_leaked"}
    assert list(tables.scores(nothing_leaked).index) == ["fine-tuned", "SVM on TF-IDF"]
    assert tables.leads(METRICS) == "macro F1, fine-tuned minus SVM on TF-IDF: +0.1000  (+0.0900 to +0.1100): ahead"
    assert list(tables.contenders(METRICS)) == ["fine-tuned", "SVM on TF-IDF"]


def test_a_long_sentence_is_broken_at_spaces():
    lines = tables.wrapped("a-long-path/that/has/no/space " * 4, 40).splitlines()
    assert lines == ["a-long-path/that/has/no/space"] * 4


def test_errors_are_shown_with_their_texts():
    row = {"count": 2, "true": "a", "predicted": "b", "examples": [{"text": "so", "confidence": 0.931}]}
    assert tables.errors([row, row], most=1) == "2 of a taken for b\n      93% sure: so"
    assert tables.errors([]) == "No test text was given a wrong label."


def test_a_table_of_claims_has_one_figure_a_line_and_lets_no_markup_in():
    rows = [{"#": "3a", "claim": "<b> & more", "measured": "one: 1 MiB\ntwo: 2 MiB", "device": "T4"}]
    shown = tables.claims(rows, "claim", "measured")._repr_html_()
    assert "<td>one: 1 MiB<br>two: 2 MiB</td>" in shown and "<td>&lt;b&gt; &amp; more</td>" in shown
    assert "T4" not in shown and "<th>3a</th>" in shown and "..." not in shown


def test_what_came_of_a_run(tiny_experiment, topics, tmp_path: Path):
    run = qk.finetune(tiny_experiment(training__max_steps=2), data=topics, out=tmp_path, progress=False)
    lines = tables.outcome(run).splitlines()
    assert lines[0] == f"validation, {len(topics.validation):,} rows" and lines[1].startswith("  accuracy ")
    assert f"of {run.training['parameters']['all']:,} parameters" in lines[-3] and "MiB at most" in lines[-1]
    plan = memory.plan(run.experiment, batch=2, length=16, labels=6)
    assert tables.outcome(run, plan).endswith(f"planned {plan.total / MIB:,.0f} MiB")
    files = tables.run_files(run.path)
    assert " KiB  adapter/adapter_model.safetensors" in files and "experiment.yaml" in files
    assert tables.epochs(run.training).index.name == "epoch"
    facts = tables.data_facts(topics.report())
    assert facts.iloc[0, 0] == ", ".join(str(len(split)) for split in topics.splits().values()) and len(facts) == 5


def test_a_search_is_shown_with_its_best_trial_and_the_presets_own():
    first = {"number": 0, "state": "complete", "f1_macro": 0.7, "epochs": [0.6, 0.7], "parameters": {"lora.r": 8},
             "seconds": 3.2, "error": None}  # fmt: skip
    stopped = {**first, "number": 1, "state": "pruned", "f1_macro": None, "epochs": [0.1]}
    failed = {**stopped, "number": 2, "state": "fail", "error": "the loss is nan"}
    best = {**first, "number": 3, "f1_macro": 0.8, "parameters": {"lora.r": 16}}
    found = [first, stopped, failed, best]
    table = tables.trials(found)
    assert list(table["macro F1"]) == ["0.7000", "stopped early", "the loss is nan", "0.8000"]
    assert list(table["r"]) == [8, 8, 8, 16] and table.loc[0, "macro F1 by epoch"] == "0.6000, 0.7000"
    record = {"rows": {"validation": 67}}
    lines = tables.best_trial(
        SimpleNamespace(best_trial=best, trials=found, record=record, path=Path("s"))
    ).splitlines()
    assert lines[0] == "best: trial 3, macro F1 0.8000 on 67 validation rows" and lines[1] == "  lora.r: 16"
    assert lines[2] == "the preset's settings, trial 0: 0.7000" and lines[-1].endswith("best.yaml")


def test_what_claims_are_judged_by_is_listed():
    records = SimpleNamespace(device="T4", notebooks={"04_memory": {}}, runs=[{"name": "a"}], results={})
    lines = tables.found_records(records, "out", Path("results")).splitlines()
    assert lines[0] == "this machine: T4" and lines[1] == "notebooks' records in out: 04_memory"
    assert lines[2] == "runs on Banking77: a" and lines[3] == "reference records: none in results"


def test_the_columns_of_a_file_are_shown_in_words():
    shown = tables.columns([{"column": "a", "filled": 2, "different": 1, "words": 1.5, "first": "so"}])
    assert list(shown.columns) == ["rows filled", "different values", "words a value", "such as"]


# --- notebook 01 --------------------------------------------------------------------------------------------------


def test_a_model_is_stored_in_each_scheme_and_stays_as_it_was(tiny_experiment):
    model, heads, weights = quantizing.plain_model(tiny_experiment("gpt2"))
    assert {tuple(weight.shape) for name, weight in weights.items() if name.endswith("c_attn")} == {(96, 32)}
    before = {name: weight.clone() for name, weight in weights.items()}
    cases = {"none": Quantization("none"), "nf4": Quantization("nf4"), "int4": Quantization("int4")}
    found, table = quantizing.stored(model, heads, cases)
    assert found["nf4"].bytes < found["none"].bytes and found["none"].bits_per_parameter == 32
    assert list(table.index) == list(cases) and table.loc["nf4", "computed bits a weight"] == "4.127"
    assert all(torch.equal(before[name], weight) for name, weight in weights.items())


def test_price_and_gain_has_every_scheme_twice_and_int8_once():
    points, fixed = quantizing.price_and_gain(lambda scheme, double: 20.0 + double, torch.randn(4, 1024), 64)
    assert len(points) == 2 * len(quantization.CODEBOOKS) + 1 and points[-1]["label"] == "int8"
    assert points[0]["bits"] < points[1]["bits"] and points[1]["hollow"] and points[-1]["bits"] > 8
    assert fixed[4] == pytest.approx(20.22, abs=0.05) and sorted(fixed.values()) == list(fixed.values())


def test_perplexity_that_is_not_measured_says_why():
    assert quantizing.perplexities(["nf4"], 0) == ({}, [], "perplexity_tokens is 0: left out")


def test_recorded_perplexities_are_those_of_the_record():
    reference = qk.records.read_json(qk.claims.find_results() / "quantization.json")
    ratios = quantizing.recorded_ratios(reference)
    assert {row["scheme"] for row in ratios} >= {"nf4", "int4", "fp4"} and all(
        row["low"] <= row["value"] for row in ratios
    )
    lines, table = quantizing.against_int4(reference)
    assert "nf4  against int4: " in lines and len(lines.splitlines()) >= 2
    assert "nf4" in table.columns.get_level_values("scheme")
