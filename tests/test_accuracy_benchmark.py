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

import pytest
from conftest import ROOT

from qlora_kit import claims, schemas
from qlora_kit.experiment import preset

GPU, CPU = "A GPU", "Some CPU, 2 cores"


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
    given = {"presets": ["minilm_banking77_qlora"], "seeds": [0, 1], "grid": [], "set": [], "no_baseline": True}
    return argparse.Namespace(**{**given, **changes})


def test_every_method_gets_the_same_number_of_settings(bench):
    tried = {name: bench.settings(options(), name) for name in bench.DEFAULT}
    assert {len(rows) for rows in tried.values()} == {len(bench.FACTORS)}
    for name, rows in tried.items():
        own = preset(name).training.learning_rate
        rates = [experiment.training.learning_rate for experiment in rows.values()]
        assert len(set(rates)) == len(rates) and own in rates
        assert {experiment.training.seed for experiment in rows.values()} == {bench.TUNING_SEED}


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
            "validation_f1_macro": score, "environment": {"device": GPU},
        }  # fmt: skip

    given = options(tuning=str(tmp_path / "results" / "tuning.json"))
    best = bench.write_tuning(given, [row(1e-3, 0.8), row(2e-3, 0.9), row(4e-3, None)])
    assert best == {"p": {bench.RATE: 2e-3}}
    written = json.loads(Path(given.tuning).read_text())
    assert len(written["rows"]) == 3
    (chosen,) = written["chosen"]
    assert (chosen["settings"], chosen["at_the_edge"]) == (3, False)
    assert schemas.check([given.tuning]) == ([Path(given.tuning).resolve()], [])
    assert bench.write_tuning(given, [row(1e-3, 0.8), row(2e-3, 0.9)]) == best
    assert json.loads(Path(given.tuning).read_text())["chosen"][0]["at_the_edge"] is True
    with pytest.raises(ValueError, match="every learning rate"):
        bench.write_tuning(given, [row(1e-3, None)])
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


def test_rows_made_again_replace_theirs_and_no_others(bench):
    def made(device: str, score: float, over: str) -> dict[str, Any]:
        return {
            "environment": {"device": device}, "command": device, "baselines": None,
            "rows": [{"preset": "q", "device": device, "f1_macro": score}],
            "summary": [{"preset": "q", "device": device, "mean": score}],
            "differences": [{"of": "q", "over": over, "device": device, "f1_macro": score}],
        }  # fmt: skip

    both = bench._appended(made(GPU, 0.5, "l"), made(CPU, 0.6, "l"))
    assert {row["device"] for row in both["rows"]} == {GPU, CPU}
    both["differences"].append({"of": "f", "over": "q", "device": GPU, "f1_macro": 0.1})  # of the q that goes
    again = bench._appended(both, made(GPU, 0.7, "l"))
    for part in ("rows", "summary", "differences"):
        assert len(again[part]) == 2
    assert sorted(line["f1_macro"] for line in again["differences"]) == [0.6, 0.7]


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
    (difference,) = scored["differences"]
    pairs = [[row for row in scored["rows"] if row["method"] == method] for method in ("qlora", "full")]
    expected = claims.seed_interval(claims.by_seed(pairs[0], pairs[1], "f1_macro"))
    assert (difference["over_seeds"]["pairs"], difference["over_seeds"]["f1_macro"]) == (2, expected)
    assert all(len(row["curve"]["loss"]) for row in scored["rows"])
