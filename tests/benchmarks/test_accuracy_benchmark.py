"""benchmarks/accuracy.py: one budget for all, no test row while tuning, devices apart, and a cut gone on from."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from conftest import ROOT

from qlora_kit import claims, evaluation, schemas
from qlora_kit.checking import packing
from qlora_kit.checking.check import check
from qlora_kit.config.preset import preset
from qlora_kit.system.files import write_json

GPU, CPU = "A GPU", "Some CPU, 2 cores"
SHA = "ab" * 20


@pytest.fixture(scope="module")
def bench() -> Any:
    """Return the benchmark as a module; its folder is on the path only while it is imported."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        module: ModuleType = importlib.import_module("accuracy")
    finally:
        sys.path.remove(str(ROOT / "benchmarks"))
    return module


def options(**changes: Any) -> argparse.Namespace:
    given = {"presets": ["minilm_banking77_qlora"], "seeds": [0, 1], "grid": [], "set": [], "append": False}
    return argparse.Namespace(**{**given, **changes})


def test_every_method_gets_the_same_number_of_settings(bench):
    tried = {name: bench.settings(options(), name) for name in bench.DEFAULT}
    assert {len(rows) for rows in tried.values()} == {len(bench.FACTORS)}
    for name, rows in tried.items():
        own = preset(name).training.learning_rate
        rates = [experiment.training.learning_rate for experiment in rows.values()]
        assert len(set(rates)) == len(rates) and own in rates
        assert {experiment.training.seed for experiment in rows.values()} == {bench.TUNING_SEED}


def test_what_was_chosen_of_other_presets_stays_where_another_command_tunes_more(bench, tmp_path: Path):
    provenance = bench.recording.Provenance(SHA, False)

    def tune(name: str, *scores: float, append: bool = True) -> None:
        rows = [
            {"preset": name, "device": GPU, "learning_rate": 1e-3 * (place + 1), "validation_f1_macro": score,
             "experiment": {}, "environment": {"device": GPU}, "commit": SHA, "seed": 99}
            for place, score in enumerate(scores)
        ]  # fmt: skip
        bench.write_tuning(options(append=append, tuning=str(tmp_path / "tuning.json")), provenance, rows)

    def chosen() -> dict[str, float]:
        lines = json.loads((tmp_path / "tuning.json").read_text())["chosen"]
        return {line["preset"]: line["tried"][bench.RATE] for line in lines}

    tune("one", 0.5, 0.7, 0.6)
    tune("other", 0.9, 0.8)
    assert chosen() == {"one": 2e-3, "other": 1e-3}
    tune("one", 0.5, 0.6, 0.7)
    assert chosen() == {"one": 3e-3, "other": 1e-3}
    tune("one", 0.7, append=False)
    assert chosen() == {"one": 1e-3}


def test_the_chosen_setting_is_what_all_seeds_are_trained_with(bench):
    chosen = {"minilm_banking77_qlora": {bench.RATE: 4e-3}}
    rows = bench.wanted(options(presets=bench.DEFAULT), chosen)
    assert len(rows) == 6
    for name, experiment in rows.items():
        best = 4e-3 if "_qlora_" in name else preset(experiment.name).training.learning_rate
        assert experiment.training.learning_rate == best
    assert list(bench.wanted(options(), {})) == ["minilm_banking77_qlora_seed0", "minilm_banking77_qlora_seed1"]


def test_the_best_on_validation_is_chosen_and_a_diverged_setting_counts_as_tried(bench, tmp_path: Path):
    def row(rate: float, score: float | None) -> dict[str, Any]:
        return {
            "preset": "p", "method": "qlora", "seed": 99, "learning_rate": rate, "experiment": {}, "device": GPU,
            "validation_f1_macro": score, "environment": {"device": GPU, "commit": SHA}, "commit": SHA,
        }  # fmt: skip

    given = options(tuning=str(tmp_path / "results" / "tuning.json"))
    by = bench.recording.Provenance(SHA, False)
    best = bench.write_tuning(given, by, [row(1e-3, 0.8), row(2e-3, 0.9), row(4e-3, None)])
    assert best == {"p": {bench.RATE: 2e-3}}
    written = json.loads(Path(given.tuning).read_text())
    assert len(written["rows"]) == 3
    (chosen,) = written["chosen"]
    assert (chosen["settings"], chosen["at_the_edge"]) == (3, False)
    assert schemas.check([given.tuning]) == ([Path(given.tuning).resolve()], [])
    assert bench.write_tuning(given, by, [row(1e-3, 0.8), row(2e-3, 0.9)]) == best
    assert json.loads(Path(given.tuning).read_text())["chosen"][0]["at_the_edge"] is True
    with pytest.raises(ValueError, match="every learning rate"):
        bench.write_tuning(given, by, [row(1e-3, None)])
    # A test score has no place in it.
    written["rows"][0]["f1_macro"] = 0.9
    Path(given.tuning).write_text(json.dumps(written))
    assert schemas.check([given.tuning])[1]


def test_a_curve_is_thinned_and_keeps_its_gaps(bench):
    losses = [{"step": step, "loss": 1 / (step + 3), **({"grad_norm": 2.0} if step % 2 else {})} for step in range(200)]
    thin = bench.curve(losses)
    assert len(thin["step"]) == len(thin["loss"]) == len(thin["grad_norm"]) <= 60
    assert thin["loss"][0] == 0.3333
    assert None in bench.curve(losses[:50])["grad_norm"]
    assert bench.curve([]) == {"step": [], "loss": [], "grad_norm": []}  # a run shorter than a log


@pytest.fixture(autouse=True)
def rough(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let intervals over rows and seeds be drawn in a moment."""
    monkeypatch.setattr(bench, "TOLERANCE", 0.1)


def a_record(bench: Any, *rows: tuple[str, str, int, float], kept: bool = True) -> dict[str, Any]:
    """Return a record of rows (preset, device, seed, share of wrong predictions) and one baseline."""
    truth = np.arange(40) % 4

    def scored(share: float, seed: int) -> dict[str, Any]:
        wrong = np.random.default_rng(seed).random(40) < share
        predicted = np.where(wrong, (truth + 1) % 4, truth)
        row = evaluation.compute_metrics(predicted, truth)
        return row | (bench.predicted(predicted.tolist(), truth.tolist()) if kept else {})

    found = [
        {"preset": name, "model": "m", "method": name, "seed": seed, "device": device, **scored(share, seed)}
        for name, device, seed, share in rows
    ]
    baseline = scored(0.3, 50)
    intervals = {key: {"value": baseline[key], "low": 0, "high": 1} for key in ("accuracy", "f1_macro")}
    return {
        "rows": found, "labels": {packing.checksum(truth): packing.pack_classes(truth)},
        "baselines": {"embedding_svm": {**baseline, **intervals, "model": "m", "device": CPU}},
    }  # fmt: skip


def test_what_is_computed_from_all_rows_is_of_these_rows(bench):
    seeds = [("qlora", GPU, 0, 0.1), ("qlora", GPU, 1, 0.2), ("lora", GPU, 0, 0.2), ("lora", GPU, 1, 0.1)]
    found = bench.derived(a_record(bench, *seeds, ("qlora", CPU, 0, 0.1)))
    assert [(line["preset"], line["device"], line["seeds"]) for line in found["summary"]] == [
        ("qlora", GPU, [0, 1]), ("lora", GPU, [0, 1]), ("qlora", CPU, [0]),
    ]  # fmt: skip
    assert {row["baseline_device"] for row in found["rows"]} == {CPU}
    told = {(line["of"], line["over"], line["device"], line.get("over_what")) for line in found["differences"]}
    both = "rows and seeds"
    # Devices are never compared; one seed tells nothing of seeds.
    assert told == {
        ("qlora", "lora", GPU, None), ("qlora", "embedding_svm", GPU, None), ("lora", "embedding_svm", GPU, None),
        ("qlora", "embedding_svm", CPU, None), ("qlora", "lora", GPU, both), ("qlora", "embedding_svm", GPU, both),
        ("lora", "embedding_svm", GPU, both),
    }  # fmt: skip
    for line in found["differences"]:
        if "over_what" in line:
            apart = next(
                other for other in found["differences"]
                if (other["of"], other["over"], other["device"]) == (line["of"], line["over"], line["device"])
            )  # fmt: skip
            assert line["shown"] == 3 and line["f1_macro"]["value"] == pytest.approx(
                apart["f1_macro"]["value"], abs=1e-6
            )
            assert line["f1_macro"]["low"] < apart["f1_macro"]["low"]
            assert line["f1_macro"]["high"] > apart["f1_macro"]["high"]
    # Other models are no contenders, and their baseline is another one.
    apart = a_record(bench, *seeds)
    for row in apart["rows"][2:]:
        row["model"] = "another"
    found = bench.derived(apart)
    assert {(line["of"], line["over"]) for line in found["differences"]} == {("qlora", "embedding_svm")}
    assert [row["baseline_device"] for row in found["rows"]] == [CPU, CPU, None, None]


def test_an_older_difference_stays_as_long_as_its_rows_do(bench):
    record = a_record(bench, ("qlora", GPU, 0, 0.1), ("lora", GPU, 0, 0.2), kept=False)
    value = record["rows"][0]["f1_macro"] - record["rows"][1]["f1_macro"]
    line = {"of": "qlora", "over": "lora", "device": GPU, "f1_macro": {"value": value, "low": -1, "high": 1}}
    lines = [line, {**line, "of": "full"}, {**line, "device": CPU}]
    assert bench.derived({**record, "differences": lines})["differences"] == [line]
    record["rows"][0]["f1_macro"] += 0.01  # made again
    assert bench.derived({**record, "differences": lines})["differences"] == []


def test_a_row_of_a_changed_tree_is_made_again(bench, tmp_path: Path):
    experiment = preset("minilm_banking77_qlora")
    given, file = options(runs=str(tmp_path)), tmp_path / "row.json"
    for commit, takes in ((SHA, True), (SHA + "+changes", False), (None, False)):
        write_json(file, {"experiment": experiment.to_dict(), "commit": commit})
        for told, expected in ((False, takes), (True, True)):
            by = bench.recording.Provenance(SHA, told)
            assert (bench.finished(given, by, "row", experiment) is not None) == expected
    other = experiment.override({"training.seed": 5})
    assert bench.finished(given, bench.recording.Provenance(SHA, True), "row", other) is None


@pytest.mark.long
def test_a_tuned_comparison_goes_on_where_it_was_cut_off(tmp_path: Path, tiny_experiment):
    changes = {"data.limit": 100, "training.max_steps": 3, "training.learning_rate": 1e-3}
    experiments = {
        "tiny_banking77_qlora": tiny_experiment().override(changes),
        "tiny_banking77_full": tiny_experiment().override({**changes, "quantization.scheme": "none", "lora": None}),
    }
    for name, experiment in experiments.items():
        (tmp_path / f"{name}.yaml").write_text(experiment.to_yaml().replace("name: tiny_bert", f"name: {name}", 1))
    out = tmp_path / "results"
    command = [
        sys.executable, str(ROOT / "benchmarks" / "accuracy.py"), "--tune", "--jobs", "2", "--no-baseline",
        "--presets", *(str(tmp_path / f"{name}.yaml") for name in experiments), "--seeds", "0", "1",
        "--runs", str(tmp_path / "runs"), "--out", str(out / "accuracy.json"), "--tuning", str(out / "tuning.json"),
        "--from-changes",
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}

    def run(*more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*command, *more], env=environment, capture_output=True, text=True)

    cut = run("--seconds", "0")
    assert cut.returncode == 1 and "12 not begun" in cut.stdout and not out.exists()
    whole = run()
    assert whole.returncode == 0, whole.stderr
    again = run()
    assert again.returncode == 0 and "4 rows, 4 of them there already" in again.stdout
    assert schemas.check([out])[1] == []
    tuning, scored = (json.loads((out / f"{name}.json").read_text()) for name in ("tuning", "accuracy"))
    chosen = {line["preset"]: line["tried"]["training.learning_rate"] for line in tuning["chosen"]}
    assert {row["preset"]: row["learning_rate"] for row in scored["rows"]} == chosen
    assert not any("accuracy" in row for row in tuning["rows"])
    report = check([out / "accuracy.json", out / "tuning.json"])
    assert report.wrong == [] and not any("predictions" in line for line in report.not_shown)
    difference, together = scored["differences"]
    assert together["over_what"] == "rows and seeds"
    pairs = [[row for row in scored["rows"] if row["method"] == method] for method in ("qlora", "full")]
    expected = claims.seed_interval(claims.by_seed(pairs[0], pairs[1], "f1_macro"))
    assert (difference["over_seeds"]["pairs"], difference["over_seeds"]["f1_macro"]) == (2, expected)
    assert all(len(row["curve"]["loss"]) for row in scored["rows"])
