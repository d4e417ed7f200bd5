"""`python -m qlora_kit check results`: a falsified figure of any kind is named, and what is not shown is told."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ROOT

from qlora_kit import data, evaluation, schemas
from qlora_kit.checking import check as check_records
from qlora_kit.checking import packing
from qlora_kit.checking.record import CLOSE, Report, _same, mean_with_interval
from qlora_kit.checking.rules_cost import latencies
from qlora_kit.cli import main as cli
from qlora_kit.errors import KitError
from qlora_kit.system.files import write_json

sys.path.insert(0, str(ROOT / "benchmarks"))
import accuracy
import schemes
from common import recording

SHA = "ab" * 20
BY = recording.Provenance(SHA, False)
HERE = {"device": "a CPU", "cpu": "a CPU", "threads": 1, "versions": {"python": "3.11"}, "commit": SHA,
        "checksums": {"data": None, "base": None}}  # fmt: skip


def shipped(name: str) -> dict[str, Any]:
    return json.loads((ROOT / "results" / f"{name}.json").read_text())


def some_of(name: str, keep: Callable[[dict[str, Any]], Any], **changes: Any) -> dict[str, Any]:
    """Return a shipped record with some of its rows, and commands that make these."""
    record = shipped(name) | changes
    record["rows"] = [row for row in record["rows"] if keep(row)]
    names = list(record["commands"][0]["makes"][0])
    made: dict[str, list[dict[str, Any]]] = {}
    for row in record["rows"]:
        made.setdefault(row["command"], []).append({key: row.get(key) for key in names})
    record["commands"] = [{"command": c, "makes": recording.products(keys)} for c, keys in made.items()]
    record["command"] = "; ".join(made)
    # The record's own environment is that of some of its rows, and so is what stands beside them.
    record["environment"] = record["rows"][0]["environment"]
    for line in record.get("limit", [])[:]:
        if not any(row["model"] == line["model"] and row["device"] == line["device"] for row in record["rows"]):
            record["limit"].remove(line)
    return record


def recorded(
    tmp_path: Path, name: str, rows: list[dict[str, Any]], key: tuple[str, ...], **more: Any
) -> dict[str, Any]:
    """Return a record as a benchmark writes it."""
    rows = [BY.stamped(row, HERE) for row in rows]
    file, told = tmp_path / f"{name}.json", f"python {name}"
    return recording.write(file, rows, provenance=BY, command=told, makes=rows, key=key, append=False, **more)


# --- small records --------------------------------------------------------------------------------------------------


def guesses(truth: np.ndarray, share: float, seed: int) -> np.ndarray:
    """Return classes of which a share is wrong; which rows are hard is the same for all."""
    rng = np.random.default_rng(seed)
    hard = np.random.default_rng(9).random(len(truth)) < 2 * share
    wrong = hard & (rng.random(len(truth)) < 0.5)
    return np.where(wrong, (truth + rng.integers(1, 4, len(truth))) % 4, truth)


@pytest.fixture(scope="module")
def scored(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Return a record of accuracy: two methods, two seeds, a baseline, all differences."""
    truth = np.arange(80) % 4
    rows = []
    for method, share in (("qlora", 0.1), ("lora", 0.12)):
        for seed in range(2):
            predicted = guesses(truth, share, seed + len(method))
            scores = evaluation.compute_metrics(predicted, truth)
            rows.append(
                {
                    "preset": f"p_{method}", "model": "embedded:minilm", "method": method,
                    "scheme": "nf4" if method == "qlora" else "none", "double_quantization": False, "seed": seed,
                    "learning_rate": 1e-3, "train_seconds": 1.0,
                    "accuracy": scores["accuracy"], "f1_macro": scores["f1_macro"], "device": "a CPU",
                    **accuracy.predicted(predicted.tolist(), truth.tolist()),
                }
            )  # fmt: skip
    predicted = guesses(truth, 0.15, 99)
    baseline = {
        **evaluation.metrics(predicted, truth), "C": 0.3, "validation": {"0.1": 0.5, "0.3": 0.6, "1": 0.6},
        **accuracy.predicted(predicted.tolist(), truth.tolist()), "model": "embedded:minilm", "device": "a CPU",
    }  # fmt: skip
    baselines = {"embedding_svm": baseline}
    labels = {packing.checksum(truth): packing.pack_classes(truth)}
    folder = tmp_path_factory.mktemp("scored")
    record = recorded(folder, "accuracy", rows, accuracy.KEY, labels=labels, baselines=baselines)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(accuracy, "TOLERANCE", 1e-2)
        return accuracy.derived(record)


@pytest.fixture(scope="module")
def compared(scored: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Return a record of schemes: two contenders, two seeds."""
    rows = []
    for row in scored["rows"]:
        contender = "none" if row["method"] == "lora" else "nf4"
        rows.append({**row, "contender": contender, "bits_per_parameter": 4.1, "scheme": contender})
    folder = tmp_path_factory.mktemp("compared")
    return schemes.derived(recorded(folder, "schemes", rows, schemes.KEY, labels=scored["labels"]))


def timed(tmp_path: Path) -> dict[str, Any]:
    """Return records of times, as the benchmarks compute them."""
    nanoseconds = [1_000_000 + 1000 * place for place in range(6)]
    call = {"model": "m", "variant": "4bit", "repeats": 2, "peak_bytes": 1, "device": "a CPU", "batch": 64}
    call |= {"call_nanoseconds": packing.pack(nanoseconds, "u8"), **latencies(nanoseconds, 2, 64)}
    steps = []
    for contender, seconds in (("nf4", [1.0, 2.0, 4.0]), ("int4", [2.0, 3.0, 5.0])):
        steps.append(
            {
                "model": "m", "contender": contender, "scheme": contender, "double_quantization": True, "batch": 1,
                "precision": "fp32", "length": 4, "step_seconds": sorted(seconds)[1], "repeats": 3, "device": "a CPU",
                "step_seconds_quartiles": [min(seconds), max(seconds)], "times_nf4": sorted(seconds)[1] / 2.0,
                "repeats_seconds": seconds,
            }
        )  # fmt: skip
    race = {
        "model": "m", "contender": "unsloth", "method": "qlora", "scheme": "nf4", "precision": "bf16", "batch": 8,
        "padding": "grouped", "samples_per_second": 40.0, "samples_per_second_range": [20.0, 80.0],
        "tokens_per_second": 80.0, "step_seconds": 0.2, "steps": 10, "repeats": 3, "device": "a CPU",
        "repeats_seconds": [1.0, 2.0, 4.0], "repeats_samples": [80, 80, 80], "repeats_tokens": [160, 160, 160],
        "device_seconds": None, "peak_bytes": 1, "start_seconds": 1.0,
    }  # fmt: skip
    t4 = {
        "contender": "recipe", "preset": "p", "precision": "fp16", "batch": 8, "steps": 30, "step_seconds": 0.2,
        "samples_per_second": 40.0, "epochs_seconds": 200.0, "epochs_steps": 1000, "measured": False, "seed": 0,
        "learning_rate": 1e-3, "peak_bytes": 1, "repeats_seconds": [1.0, 2.0, 4.0], "steps_a_repeat": 10,
        "device": "a CPU",
    }  # fmt: skip
    return {
        "inference": recorded(tmp_path, "inference", [call], ("model", "variant", "batch")),
        "int4_step": recorded(tmp_path, "int4_step", steps, ("model", "length", "contender")),
        "speed": recorded(tmp_path, "speed", [race], ("model", "contender", "batch"), limit=[]),
        "t4": recorded(tmp_path, "t4", [t4], ("contender",)),
    }


def quantized() -> dict[str, Any]:
    """Return some rows of the shipped record, and two as the benchmark makes them today."""
    first = "banking77 test questions"
    found = some_of(
        "quantization",
        lambda row: (
            (
                (row["subject"], row.get("weights"), row.get("text")) == ("perplexity", "as shipped", first)
                and row["scheme"] in ("none", "int4", "nf4")
            )
            or row.get("levels") == 8
        ),
    )
    draws = {"snr_db": [20.0, 21.0, 22.5], "mse": [0.1, 0.2, 0.4], "max": [1.0, 3.0, 2.0]}
    distances = np.linspace(0.1, 0.2, 11)
    about = {key: found["rows"][0][key] for key in ("command", "commit", "environment")}
    more = [
        {
            "subject": "normal", "scheme": "nf4", "double_quantization": True, "block_size": 64,
            "bits_per_parameter": 4.127, "mse": float(np.mean(draws["mse"])), "max_error": 3.0, "draws": draws,
            "snr_db": cli_interval(draws["snr_db"]), **about,
        },
        {
            "subject": "embedding", "model": "embedded:minilm", "scheme": "nf4", "double_quantization": True,
            "texts": 11, "cosine_distance": mean_with_interval(distances),
            "distances": packing.pack(distances, "f8"), **about,
        },
    ]  # fmt: skip
    names = list(found["commands"][0]["makes"][0])
    found["commands"][0]["makes"] += [{name: [row.get(name)] for name in names} for row in more]
    return {**found, "rows": found["rows"] + more}


def cli_interval(values: list[float]) -> dict[str, float]:
    from qlora_kit.claims.judging import seed_interval

    return seed_interval(values) or {}


# --- what is falsified ----------------------------------------------------------------------------------------------


def check(tmp_path: Path, name: str, record: dict[str, Any]) -> Report:
    file = tmp_path / "results" / f"{name}.json"
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(record))
    assert schemas.check([file])[1] == []
    return check_records([file])


def falsified(record: dict[str, Any], path: str, change: Callable[[Any], Any]) -> dict[str, Any]:
    """Return a record with one value changed; `path` has keys and places, as `rows.0.f1_macro`."""
    record = copy.deepcopy(record)
    node: Any = record
    *way, last = [int(part) if part.isdigit() else part for part in path.split(".")]
    for part in way:
        node = node[part]
    node[last] = change(node[last])
    return record


def other(value: Any) -> Any:
    """Return another value of the same kind, a digit away."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value + 1
    if isinstance(value, float):
        return value * 1.0001 if value else 0.0001
    return [*value[:-1], other(value[-1])]


def all_caught(tmp_path: Path, name: str, record: dict[str, Any], *paths: str) -> None:
    """Hold that a record is right, and that each change of it is named by its key."""
    assert check(tmp_path, name, record).wrong == []
    for path in paths:
        wrong = check(tmp_path, name, falsified(record, path, other)).wrong
        key = next(part for part in reversed(path.split(".")) if not part.isdigit())
        assert wrong and any(key in line for line in wrong), (path, wrong)
        assert all(line.startswith(str(tmp_path / "results" / f"{name}.json")) for line in wrong)


def test_scores_and_everything_that_is_computed_from_them(tmp_path: Path, scored: dict[str, Any]):
    ends = ("value", "low", "high")
    lines = scored["differences"]
    trained = next(place for place, line in enumerate(lines) if "over_seeds" in line)
    baseline = next(place for place, line in enumerate(lines) if line["over"] == "embedding_svm")
    (together, *more) = [place for place, line in enumerate(lines) if "over_what" in line]
    assert 1 + len(more) == 3 and {lines[place]["shown"] for place in (together, *more)} == {3}
    all_caught(
        tmp_path, "accuracy", scored,
        "rows.0.accuracy", "rows.3.f1_macro", "rows.0.seed", "summary.0.seeds", "summary.1.mean_f1_macro",
        "summary.1.standard_deviation", "baselines.embedding_svm.C", "baselines.embedding_svm.f1_weighted.value",
        "baselines.embedding_svm.f1_macro.low", "baselines.embedding_svm.accuracy.high",
        *(f"differences.{trained}.f1_macro.{end}" for end in ends), f"differences.{baseline}.accuracy.low",
        f"differences.{trained}.over_seeds.f1_macro.high", f"differences.{trained}.over_seeds.pairs",
        *(f"differences.{together}.f1_macro.{end}" for end in (*ends, "seeds")),
    )  # fmt: skip
    # Predictions and labels that are not those of the scores, and sides that the record does not have.
    packed = scored["rows"][1]["predictions"]
    assert any("f1_macro" in line for line in check(tmp_path, "accuracy", falsified(
        scored, "rows.0.predictions", lambda _: packed)).wrong)  # fmt: skip
    (told,) = scored["labels"]
    moved = packing.pack_classes(np.roll(np.arange(80) % 4, 1))
    assert (
        "checksum of labels"
        in check(tmp_path, "accuracy", falsified(scored, f"labels.{told}", lambda _: moved)).wrong[0]
    )
    banking = data.banking77().checksum  # of which these labels are not
    wrong = check(tmp_path, "accuracy", falsified(scored, "rows.0.environment.checksums.data", lambda _: banking)).wrong
    assert wrong and all("labels is recorded as" in line for line in wrong)
    gone = check(tmp_path, "accuracy", falsified(scored, f"differences.{trained}.of", lambda _: "p_none")).wrong
    assert any("has nothing of p_none" in line for line in gone)
    cut = falsified(scored, "rows.0.predictions", lambda text: text[:-8])
    assert any("no packed numbers" in line for line in check(tmp_path, "accuracy", cut).wrong)
    lost = falsified(scored, "summary", lambda lines: lines[1:])
    assert any("summary: p_qlora" in line for line in check(tmp_path, "accuracy", lost).wrong)


def test_without_predictions_what_rows_show_is_compared_all_the_same(tmp_path: Path, scored: dict[str, Any]):
    bare = copy.deepcopy(scored)
    for row in bare["rows"]:
        del row["predictions"], row["labels"]
    bare["differences"] = [line for line in bare["differences"] if "over_what" not in line]
    report = check(tmp_path, "accuracy", bare)
    assert report.wrong == []
    assert "4 rows without their predictions" in report.not_shown[0] and "python accuracy" in report.not_shown[0]
    all_caught(tmp_path, "accuracy", bare, "differences.0.f1_macro.value", "summary.0.mean_f1_macro")
    together = copy.deepcopy(scored)
    del together["rows"][0]["predictions"], together["rows"][0]["labels"]
    assert any("predictions are missing" in line for line in check(tmp_path, "accuracy", together).wrong)


def test_schemes_and_what_was_tried(tmp_path: Path, compared: dict[str, Any]):
    all_caught(
        tmp_path, "schemes", compared, "rows.0.f1_macro", "rows.3.accuracy", "differences.0.seeds",
        *(f"differences.0.f1_macro.{end}" for end in ("value", "low", "high")),
    )  # fmt: skip
    all_caught(
        tmp_path, "tuning", shipped("tuning"), "chosen.0.settings", "chosen.1.validation_f1_macro",
        "chosen.2.at_the_edge",
    )  # fmt: skip
    wrong = falsified(shipped("tuning"), "chosen.0.tried", lambda _: {"training.learning_rate": 0.004})
    assert "tried is recorded as" in check(tmp_path, "tuning", wrong).wrong[0]


def test_times(tmp_path: Path):
    records = timed(tmp_path)
    all_caught(tmp_path, "inference", records["inference"], *(
        f"rows.0.{key}" for key in ("latency_seconds_p50", "latency_seconds_p95", "samples_per_second")
    ))  # fmt: skip
    all_caught(tmp_path, "int4_step", records["int4_step"], *(
        f"rows.1.{key}" for key in ("step_seconds", "step_seconds_quartiles", "times_nf4", "repeats")
    ))  # fmt: skip
    keys = ("samples_per_second", "samples_per_second_range", "tokens_per_second", "step_seconds", "repeats")
    all_caught(tmp_path, "speed", records["speed"], *(f"rows.0.{key}" for key in keys))
    padded = check(tmp_path, "speed", falsified(records["speed"], "rows.0.padding", lambda _: "buckets")).wrong
    assert padded[0].endswith("padding is recorded as buckets, and unsloth's is grouped")
    all_caught(tmp_path, "t4", records["t4"], *(
        f"rows.0.{key}" for key in ("step_seconds", "samples_per_second", "epochs_seconds")
    ))  # fmt: skip
    speed = some_of("speed", lambda row: row["model"] == "minilm")
    all_caught(tmp_path, "speed", speed, "limit.0.seconds", "limit.0.samples_per_second")


def test_times_without_the_seconds_behind_them(tmp_path: Path):
    records = timed(tmp_path)
    for name, what in (
        ("speed", "1 rows without the seconds of each repeat"),
        ("int4_step", "2 rows without the seconds of each repeat"),
        ("t4", "1 rows without the seconds of each repeat"),
        ("inference", "1 rows without the time of each call"),
    ):
        record = copy.deepcopy(records[name])
        for row in record["rows"]:
            row.pop("repeats_seconds", None)
            row.pop("call_nanoseconds", None)
        report = check(tmp_path, name, record)
        assert report.wrong == [] and what in report.not_shown[0], name
        records[name] = record
    # What rows show beside one another is compared all the same.
    all_caught(tmp_path, "int4_step", records["int4_step"], "rows.1.times_nf4")
    all_caught(tmp_path, "t4", records["t4"], "rows.0.samples_per_second", "rows.0.epochs_seconds")
    for ends, wrong in (([39.0, 40.0], 0), ([40.0, 41.0], 0), ([40.5, 41.0], 1), ([20.0, 39.5], 1)):
        speed = falsified(records["speed"], "rows.0.samples_per_second_range", lambda _, ends=ends: ends)
        found = check(tmp_path, "speed", speed).wrong
        assert len(found) == wrong and all("40.0 is not within its range" in line for line in found)


def test_a_step_that_was_timed_once_has_its_time_for_quartiles(tmp_path: Path):
    (row, _) = timed(tmp_path)["int4_step"]["rows"]
    once = {**row, "repeats": 1, "repeats_seconds": [2.0], "step_seconds": 2.0, "step_seconds_quartiles": [2.0, 2.0]}
    record = recorded(tmp_path, "int4_step", [once], ("model", "length", "contender"))
    all_caught(tmp_path, "int4_step", record, "rows.0.step_seconds_quartiles", "rows.0.step_seconds")


def test_steps_that_all_were_measured_are_not_held_against_the_time_of_one(tmp_path: Path):
    record = timed(tmp_path)["t4"]
    record = falsified(record, "rows.0.measured", lambda _: True)
    assert check(tmp_path, "t4", falsified(record, "rows.0.epochs_seconds", other)).wrong == []
    assert check(tmp_path, "t4", falsified(record, "rows.0.step_seconds", other)).wrong


def test_paged_steps_have_the_middle_of_their_times(tmp_path: Path):
    row = {
        "model": "m", "method": "qlora", "optimizer": "paged_adamw_8bit", "paged": True, "batch": 1, "length": 8,
        "device": "a CPU", "step_seconds": 2.0, "step_seconds_each": [1.0, 2.0, 4.0],
    }  # fmt: skip
    record = recorded(tmp_path, "paging", [row], ("model", "paged"))
    all_caught(tmp_path, "paging", record, "rows.0.step_seconds")
    untimed = falsified(
        falsified(record, "rows.0.step_seconds_each", lambda _: []), "rows.0.step_seconds", lambda _: None
    )
    assert check(tmp_path, "paging", untimed).wrong == []


def test_what_is_chosen_is_the_best_of_what_did_not_diverge(tmp_path: Path):
    tuning = shipped("tuning")
    preset = tuning["chosen"][0]["preset"]

    def scores(change: Callable[[dict[str, Any]], Any]) -> dict[str, Any]:
        record = copy.deepcopy(tuning)
        for row in record["rows"]:
            if row["preset"] == preset:
                row["validation_f1_macro"] = change(row)
        return record

    (none,) = check(tmp_path, "tuning", scores(lambda row: None)).wrong
    assert none.endswith(f"chosen for {preset}: no setting was tried that did not diverge")
    chosen = tuning["chosen"][0]["tried"]
    only = scores(lambda row: row["validation_f1_macro"] if row["tried"] == chosen else None)
    assert check(tmp_path, "tuning", only).wrong == []
    better = check(tmp_path, "tuning", scores(lambda row: 0.1 if row["tried"] == chosen else 0.2)).wrong
    assert any(f"chosen for {preset}: tried is recorded as" in line for line in better)
    (left,) = check(tmp_path, "tuning", {**tuning, "chosen": tuning["chosen"][1:]}).wrong
    assert left.endswith(f"nothing is chosen for {preset}")


def test_schemes_without_predictions_are_held_against_the_means_of_their_scores(
    tmp_path: Path, compared: dict[str, Any]
):
    bare = copy.deepcopy(compared)
    for row in bare["rows"]:
        del row["predictions"], row["labels"]
    all_caught(tmp_path, "schemes", bare, "differences.0.f1_macro.value", "differences.0.seeds")
    (line,) = check(tmp_path, "schemes", bare).not_shown
    count = len(bare["differences"])
    assert "4 rows without their predictions" in line and f"{count} intervals without the predictions" in line


def test_all_resamples_are_drawn_again_where_that_is_asked_for(tmp_path: Path, scored: dict[str, Any], monkeypatch):
    """With fewer resamples an end may be a little off; with all of them it may not."""
    monkeypatch.setattr("qlora_kit.checking.rules_scores.RESAMPLES", 1000)
    place = next(place for place, line in enumerate(scored["differences"]) if "over_what" in line)
    assert scored["differences"][place]["f1_macro"]["resamples"] > 1000
    moved = falsified(scored, f"differences.{place}.f1_macro.low", lambda low: low + 1e-5)
    file = tmp_path / "results" / "accuracy.json"
    for record, thorough, wrong in ((scored, False, 0), (scored, True, 0), (moved, False, 0), (moved, True, 1)):
        check(tmp_path, "accuracy", record)
        assert len(check_records([file], thorough=thorough).wrong) == wrong, (thorough, wrong)


def test_the_step_of_a_memory_row_is_the_middle_of_those_that_were_timed(tmp_path: Path):
    names = [row["name"] for row in shipped("memory")["rows"] if row["step_seconds"] is not None][:2]
    memory = some_of("memory", lambda row: row["name"] in names)
    assert len(memory["rows"]) == 2
    assert "2 rows without the seconds of each step" in "".join(check(tmp_path, "memory", memory).not_shown)
    for row in memory["rows"]:
        row |= {"step_seconds_each": [3.0, 1.0, 2.0], "step_seconds": 2.0}
    memory["rows"][1] |= {"shared_step_seconds": 2.0, "step_seconds": None}
    assert "of each step" not in "".join(check(tmp_path, "memory", memory).not_shown)
    all_caught(tmp_path, "memory", memory, "rows.0.step_seconds", "rows.1.shared_step_seconds")


def test_memory_growth_mutants_and_quantization(tmp_path: Path):
    memory = some_of("memory", lambda row: row["group"] in ("t4", "cpu"))
    missing = next(place for place, row in enumerate(memory["rows"]) if row["peak_bytes"] is None)
    all_caught(tmp_path, "memory", memory, "rows.0.difference", f"rows.{missing}.fits", "rows.2.planned_bytes")
    grown = falsified(memory, "rows.0.peak_bytes", other)
    assert "difference" in check(tmp_path, "memory", grown).wrong[0]
    all_caught(
        tmp_path, "soak", shipped("soak"), "rows.0.growth_percent.resident",
        "rows.1.second_half_growth_percent.resident",
    )  # fmt: skip
    all_caught(tmp_path, "mutation", shipped("mutation"), "rows.0.tried", "rows.1.score")
    fewer = falsified(shipped("mutation"), "rows.2.survivors", lambda names: names[1:])
    assert "survivors" in check(tmp_path, "mutation", fewer).wrong[0]
    record = quantized()
    place = {(row["subject"], row["scheme"]): n for n, row in enumerate(record["rows"])}
    ends = ("value", "low", "high")
    all_caught(
        tmp_path, "quantization", record,
        *(f"rows.{place['perplexity', 'nf4']}.{key}.{end}" for key in ("perplexity", "ratio", "ratio_to_int4")
          for end in ends),
        *(f"rows.{place['normal', 'nf4']}.{key}" for key in ("mse", "max_error", *(f"snr_db.{end}" for end in ends))),
        *(f"rows.{place['embedding', 'nf4']}.{key}" for key in ("texts", *(f"cosine_distance.{end}" for end in ends))),
        *(f"rows.{place['normal', 'lloyd_max']}.{key}" for key in ("mse", "snr_db")),
    )  # fmt: skip


# --- rows and their commits -----------------------------------------------------------------------------------------


def swapped(rows: list[dict[str, Any]], key: str) -> list[dict[str, Any]]:
    """Return rows with a key's values swapped between the first and one that differs in it."""
    first, rest = rows[0], rows[1:]
    place = next(place for place, row in enumerate(rest) if row[key] != first[key])
    swapped_, value = {**first, key: rest[place][key]}, first[key]
    return [swapped_, *rest[:place], {**rest[place], key: value}, *rest[place + 1 :]]


@pytest.mark.parametrize(
    ("name", "keep", "keys"),
    [
        ("accuracy", lambda row: "NVIDIA" in row["device"],
         ("model", "method", "scheme", "double_quantization", "learning_rate")),
        ("tuning", lambda row: True, ("scheme", "double_quantization", "method")),
        ("schemes", lambda row: True,
         ("scheme", "double_quantization", "bits_per_parameter", "whole_model_bytes")),
        ("speed", lambda row: row["model"] == "minilm", ("step_seconds", "scheme", "padding")),
        ("memory", lambda row: row["group"] in ("grid", "t4") and row["model"] == "llama-7b" and row["fits"],
         ("method", "scheme", "batch", "checkpointing", "optimizer", "lora_r", "trainable_parameters")),
        ("inference", lambda row: row["device"].startswith("AMD"), ("scheme",)),
        ("quantization", lambda row: row.get("layer", "").endswith("layer.0.attention.self.query"),
         ("mse", "snr_db")),
    ],
)  # fmt: skip
def test_rows_whose_values_were_swapped(tmp_path: Path, name: str, keep: Callable[[Any], Any], keys: tuple[str, ...]):
    """Also where nothing is left to compute them again from: what rows say of themselves and each other must agree."""
    record = some_of(name, keep)
    record = {key: value for key, value in record.items() if key not in ("summary", "differences", "chosen")}
    record |= {"chosen": []} if name == "tuning" else {}

    def wrong(rows: list[dict[str, Any]]) -> set[str]:
        return set(check(tmp_path, name, {**record, "rows": rows}).wrong)

    before = wrong(record["rows"])
    assert all(" is chosen for " in line or "summary: " in line for line in before), before
    for key in keys:
        assert wrong(swapped(record["rows"], key)) - before, key


def test_what_stands_beside_the_rows_is_of_them(tmp_path: Path):
    speed = some_of("speed", lambda row: row["model"] == "minilm")
    for path, said in (
        ("environment.device", "environment.device is 'another', and its rows are of"),
        ("limit.0.device", "limit: device is 'another', and the rows are of"),
        ("limit.0.model", "limit: model is 'another'"),
    ):
        assert said in "\n".join(check(tmp_path, "speed", falsified(speed, path, lambda _: "another")).wrong), path
    schemes_ = shipped("schemes")
    rate = falsified(schemes_, "training.learning_rate", lambda value: 2 * value)
    assert "training.learning_rate is 0.002, and the preset" in "\n".join(check(tmp_path, "schemes", rate).wrong)
    out = falsified(schemes_, "differences.0.f1_macro.low", lambda _: 0.5)
    assert "differences[0].f1_macro: " in "\n".join(check(tmp_path, "schemes", out).wrong)


@pytest.mark.long
def test_a_tuned_run_has_the_learning_rate_that_was_chosen(tmp_path: Path):
    """All rows of a preset changed alike: tuning.json, beside the record, knows better."""
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "tuning.json").write_text(json.dumps(shipped("tuning")))
    record = shipped("accuracy")
    assert check(tmp_path, "accuracy", record).wrong == []
    for row in record["rows"]:
        if row["preset"] == "minilm_banking77_lora":
            row["learning_rate"] = 0.004
    wrong = check(tmp_path, "accuracy", record).wrong
    assert len(wrong) == 5 and all("learning_rate is 0.004, and tuning.json chose 0.002" in line for line in wrong)


def test_a_record_of_no_known_name_is_told_of(tmp_path: Path):
    report = check(tmp_path, "int4_steps", shipped("int4_step"))
    assert "int4_steps.json: its figures, for no benchmark's record has this name; nearest is int4_step" in "\n".join(
        report.not_checked
    )


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "int4_step.json is no JSON"),
        ('{"schema": 99, "rows": [1]}', "was made by a newer version of qlora_kit"),
        ("[]", "is not of type 'object'"),
    ],
)
def test_one_broken_record_keeps_no_other_from_being_checked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, said: str
):
    folder = tmp_path / "results"
    folder.mkdir()
    (folder / "int4_step.json").write_text(text)
    t4 = falsified(shipped("t4"), "rows.1.samples_per_second", other)
    (folder / "t4.json").write_text(json.dumps(t4))
    assert cli.main(["check", str(folder)]) == 1
    out = capsys.readouterr().out
    assert out.count("int4_step.json") == 1 and said in out and "t4.json: " in out
    assert "2 records checked, 2 problems" in out


def test_a_folder_without_records_is_said_to_have_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert cli.main(["check", str(tmp_path)]) == 1
    assert f"nothing to check in {tmp_path}: " in capsys.readouterr().out


def test_rows_that_their_command_does_not_make_or_makes_besides(tmp_path: Path):
    record = shipped("soak")
    assert check(tmp_path, "soak", record).wrong == []
    (missing,) = check(tmp_path, "soak", {**record, "rows": record["rows"][1:]}).wrong
    assert "1 row is missing that `python benchmarks/soak.py --caches off` makes: " in missing and "device=" in missing
    cut = [
        {**entry, "cut_off": "the power failed"} if entry["command"] == record["rows"][0]["command"] else entry
        for entry in record["commands"]
    ]
    ended = {**record, "rows": record["rows"][1:], "commands": cut}
    report = check(tmp_path, "soak", ended)
    assert report.wrong == [] and any(
        "1 row is missing" in line and "the power failed" in line for line in report.not_shown
    )
    (whole,) = check(tmp_path, "soak", {**ended, "rows": record["rows"]}).wrong
    assert "is said to have been cut off, and all its rows are here" in whole
    extra = {**record["rows"][0], "padding": "longest"}
    (found,) = check(tmp_path, "soak", {**record, "rows": [*record["rows"], extra]}).wrong
    assert "padding=longest, caches=off: no command of the record makes this row" in found
    (twice,) = check(tmp_path, "soak", {**record, "rows": [*record["rows"], record["rows"][0]]}).wrong
    assert "2 rows, and `python benchmarks/soak.py --caches off` makes one" in twice
    (command,) = check(tmp_path, "soak", {**record, "command": "python benchmarks/other.py"}).wrong
    assert "command is recorded as python benchmarks/other.py" in command
    untold = {name: value for name, value in record.items() if name != "commands"}
    report = check(tmp_path, "soak", untold)
    assert report.wrong == [] and "4 rows with no command that says which rows it makes" in report.not_shown[0]


def test_rows_without_a_commit_or_of_another_one(tmp_path: Path):
    record = shipped("soak")

    def with_commit(row: dict[str, Any], commit: str | None) -> dict[str, Any]:
        return {**row, "commit": commit, "environment": {**row["environment"], "commit": commit}}

    rows = record["rows"]
    unknown = [with_commit(rows[0], None), with_commit(rows[1], SHA + "+changes"), *rows[2:]]
    report = check(tmp_path, "soak", {**record, "rows": unknown})
    assert report.wrong == []
    assert "1 rows without a commit" in report.not_shown[0] and "1 rows of a changed tree" in report.not_shown[0]
    apart = check(tmp_path, "soak", falsified(record, "rows.0.commit", lambda _: SHA)).wrong
    assert len(apart) == 1 and "environment.commit" in apart[0]
    device = check(tmp_path, "soak", falsified(record, "rows.0.environment.device", lambda _: "a GPU")).wrong
    assert len(device) == 1 and "device is recorded as" in device[0]
    # Where git is there and knows the file, it is asked.
    (outside,) = check(tmp_path, "soak", record).not_checked
    assert outside == f"whether commits are of the main branch, for no git knows {tmp_path / 'results' / 'soak.json'}"

    def git(*words: str) -> str:
        who = ["-c", "user.name=a", "-c", "user.email=a@b"]
        done = subprocess.run(["git", "-C", str(tmp_path), *who, *words], capture_output=True, text=True, check=True)
        return done.stdout.strip()

    git("init", "-q", "-b", "main")
    git("add", "results")
    git("commit", "-q", "-m", "one")
    sha = git("rev-parse", "HEAD")
    known = {**record, "rows": [with_commit(row, sha) for row in rows]}
    report = check(tmp_path, "soak", known)
    assert report.wrong == report.not_checked == []
    git("checkout", "-q", "--orphan", "aside")
    git("commit", "-q", "-m", "not of main")
    aside = git("rev-parse", "HEAD")
    git("checkout", "-q", "-f", "main")
    strange = {**known, "rows": [with_commit(rows[0], aside), *known["rows"][1:]]}
    (wrong,) = check(tmp_path, "soak", strange).wrong
    assert f"commit {aside} is none of the main branch" in wrong
    # A commit that git does not have at all: the code cannot be looked up, which is not shown rather than wrong.
    lost = {**known, "rows": [with_commit(row, SHA) for row in rows[:2]] + known["rows"][2:]}
    report = check(tmp_path, "soak", lost)
    assert report.wrong == []
    assert "2 rows of a commit that this clone does not have" in report.not_shown[0]


@pytest.mark.parametrize(
    ("missing", "named", "more"), [(1, 1, ""), (3, 3, ""), (4, 3, " and 1 more"), (5, 3, " and 2 more")]
)
def test_of_many_missing_rows_three_are_named_and_the_others_counted(
    tmp_path: Path, missing: int, named: int, more: str
):
    (row,) = timed(tmp_path)["t4"]["rows"]
    rows = [{**row, "contender": f"c{place}"} for place in range(6)]
    record = recorded(tmp_path, "t4", rows, ("contender", "batch"))
    (line,) = check(tmp_path, "t4", {**record, "rows": record["rows"][missing:]}).wrong
    count = "1 row is" if missing == 1 else f"{missing} rows are"
    names = "; ".join(f"contender=c{place}" for place in range(named))  # the batch is the same for all
    assert line.endswith(f"t4.json: {count} missing that `python t4` makes: {names}{more}")


def test_a_seed_that_diverged_is_no_missing_row(tmp_path: Path):
    (row,) = timed(tmp_path)["t4"]["rows"]
    record = recorded(tmp_path, "t4", [{**row, "seed": seed} for seed in (0, 1)], ("contender", "seed"))
    for contender, count in (("recipe", 0), ("other", 1)):
        lost = {"rows": record["rows"][:1], "diverged": [{"contender": contender, "seed": 1}]}
        assert len(check(tmp_path, "t4", {**record, **lost}).wrong) == count


def test_what_rows_lack_is_counted_by_kind_with_the_commands_that_make_them_again(tmp_path: Path):
    (row,) = timed(tmp_path)["t4"]["rows"]
    record = recorded(tmp_path, "t4", [{**row, "contender": name} for name in "abc"], ("contender",))
    for place, names in enumerate((("learning_rate",), ("seed", "repeats_seconds"), ())):
        for name in names:
            del record["rows"][place][name]
    report = check(tmp_path, "t4", record)
    assert report.wrong == []
    (line,) = report.not_shown
    file = tmp_path / "results" / "t4.json"
    assert line == (
        f"{file}: 2 rows without seed or learning rate; 1 rows without the seconds of each repeat. "
        "Made again by: python t4"
    )


def test_a_clone_without_its_history_cannot_tell_whose_commits_they_are(tmp_path: Path):
    def git(*words: str) -> str:
        who = ["-c", "user.name=a", "-c", "user.email=a@b"]
        return subprocess.run(["git", *who, *words], capture_output=True, text=True, check=True).stdout.strip()

    whole, shallow = tmp_path / "whole", tmp_path / "shallow"
    git("init", "-q", "-b", "main", str(whole))
    git("-C", str(whole), "commit", "-q", "--allow-empty", "-m", "measured")
    sha = git("-C", str(whole), "rev-parse", "HEAD")
    record = recorded(tmp_path, "t4", timed(tmp_path)["t4"]["rows"], ("contender",))
    for row in record["rows"]:
        row["commit"] = row["environment"]["commit"] = sha
    (whole / "results").mkdir()
    (whole / "results" / "t4.json").write_text(json.dumps(record))
    git("-C", str(whole), "add", ".")
    git("-C", str(whole), "commit", "-q", "-m", "recorded")
    git("clone", "-q", "--depth", "1", f"file://{whole}", str(shallow))
    report = check_records([whole / "results" / "t4.json"])
    assert report.wrong == report.not_checked == []
    report = check_records([shallow / "results" / "t4.json"])
    assert report.wrong == []
    assert report.not_checked == [f"{shallow / 'results' / 't4.json'}: commit {sha[:12]} (the clone is shallow)"]


def test_a_record_that_lacks_anything_is_told_of_and_the_next_one_is_checked(tmp_path: Path):
    folder = tmp_path / "results"
    folder.mkdir()
    soak = shipped("soak")
    del soak["rows"][0]["memory"]
    (folder / "soak.json").write_text(json.dumps(soak))
    (folder / "mutation.json").write_text(json.dumps(falsified(shipped("mutation"), "rows.0.score", other)))
    report = check_records(sorted(folder.glob("*.json"), reverse=True))
    assert len(report.wrong) == 2
    assert "it cannot be computed again (KeyError('memory'))" in report.wrong[0] and "score" in report.wrong[1]


@pytest.mark.parametrize(
    ("recorded", "computed", "same"),
    [
        (1.0, 1.0 + 1e-11, True), (1.0, 1.0 + 1e-8, False), (-1.0, 1.0, False), (0.0, 1e-13, True), (0.0, 1e-11, False),
        (1, 1.0 + 1e-11, True), (1.0 + 1e-11, 1, True), (1, 1.1, False), (10**12, 10**12 + 1, False), (3, 3, True),
        (True, True, True), (True, 1, False), (1.0, True, False), (False, 0, False), (None, None, True),
        (None, 0.0, False), ("a", "a", True), ("a", "b", False), ([1.0, 2.0], [1.0, 2.0 + 1e-11], True),
        ([1.0, 2.0], [1.0], False), ([1.0], [1.0, 2.0], False), ([1.0, 2.0], [2.0, 1.0], False), ([], [], True),
        ({"a": 1.0}, {"a": 1.0 + 1e-11}, True), ({"a": 1.0}, {"b": 1.0}, False), ({"a": 1.0}, {"a": 2.0}, False),
        ({"a": 1.0}, {"a": 1.0, "b": None}, False), ({"a": [{"b": 1.0}]}, {"a": [{"b": 2.0}]}, False),
    ],
)  # fmt: skip
def test_figures_are_the_same_up_to_rounding_and_counts_exactly(recorded: Any, computed: Any, same: bool):
    assert _same(recorded, computed, CLOSE) is same


# --- the command ----------------------------------------------------------------------------------------------------


def test_the_command_says_what_is_wrong_and_what_is_not_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    folder = tmp_path / "results"
    folder.mkdir()
    file = folder / "t4.json"
    monkeypatch.chdir(tmp_path)
    file.write_text(json.dumps(shipped("t4")))
    assert cli.main(["check", "results"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("not shown: results/t4.json: 2 rows without") and "1 record checked, 0 problems" in said
    assert cli.main(["check", "results", "--strict"]) == 1
    file.write_text(json.dumps(timed(tmp_path)["t4"]))
    assert cli.main(["check", "results", "--strict"]) == 0
    file.write_text(json.dumps(falsified(timed(tmp_path)["t4"], "rows.0.step_seconds", other)))
    assert cli.main(["check", "results"]) == 1
    assert "wrong: results/t4.json: contender=recipe: step_seconds is recorded as 0.20002" in capsys.readouterr().out


def test_the_shipped_records_are_right():
    report = check_records(sorted((ROOT / "results").glob("*.json")))
    assert report.wrong == []


def test_rows_of_another_machine_are_merged_and_what_is_computed_from_all_is_computed_again(
    tmp_path: Path, scored: dict[str, Any], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(accuracy, "TOLERANCE", 1e-2)
    into = tmp_path / "results"
    common = {key: scored[key] for key in ("schema", "environment", "labels")}

    def part(file: Path, method: str, device: str, **more: Any) -> None:
        rows = [
            {**row, "device": device, "environment": {**row["environment"], "device": device}, "command": method}
            for row in scored["rows"]
            if row["method"] == method
        ]
        keys = [{name: row[name] for name in accuracy.KEY} for row in rows]
        commands = [{"command": method, "makes": recording.products(keys)}]
        write_json(file, {**common, "command": method, "commands": commands, "rows": rows, **more})

    part(into / "accuracy.json", "qlora", "a CPU", baselines=scored["baselines"])
    part(tmp_path / "made" / "accuracy.json", "lora", "a CPU")
    recording.merge([tmp_path / "made" / "accuracy.json"], into, True)
    whole = json.loads((into / "accuracy.json").read_text())
    assert whole["differences"] == scored["differences"] and whole["summary"] == scored["summary"]
    assert check(tmp_path, "accuracy", whole).wrong == []
    # One GPU's rows in place of another's.
    for device, instead in (("NVIDIA one", None), ("NVIDIA two", "NVIDIA one")):
        part(tmp_path / "made" / "accuracy.json", "lora", device)
        recording.merge([tmp_path / "made" / "accuracy.json"], into, True, instead)
        found = json.loads((into / "accuracy.json").read_text())
        assert {row["device"] for row in found["rows"]} == {"a CPU", device}
        assert {line["device"] for line in found["summary"]} == {"a CPU", device}
        assert check(tmp_path, "accuracy", found).wrong == []


# --- packed numbers -------------------------------------------------------------------------------------------------


def test_packed_numbers_come_back_as_they_were():
    for values, kind in (([0, 76, 255], "u1"), ([300], "u2"), ([2**40], "u8"), ([0.1, -1e300], "f8"), ([], "u1")):
        text = packing.pack(values, kind)
        assert text.startswith(f"{kind}:") and packing.unpack(text).tolist() == values
    assert packing.pack_classes([255])[:2] == "u1" and packing.pack_classes([256])[:2] == "u2"
    for values, kind in (([256], "u1"), ([-1], "u1"), ([0.5], "u8"), ([[1]], "u1"), ([1], "u3")):
        with pytest.raises(KitError):
            packing.pack(values, kind)


def test_a_text_that_is_no_packed_numbers_is_refused():
    good = packing.pack(list(range(100)), "u1")
    bomb = packing.pack(np.zeros(packing.MOST_BYTES + 1, np.uint8), "u1")
    for text in (
        "",
        "u1",
        "x1:abcd",
        good[:-8],
        good.replace("u1:", "u1:%"),
        "f8:" + packing.pack([1], "u1")[3:],
        bomb,
    ):
        with pytest.raises(KitError, match="no packed numbers"):
            packing.unpack(text)
