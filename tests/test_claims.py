"""Every rule is tried both ways, on records changed by hand: no verdict is written anywhere."""

from __future__ import annotations

import copy
import dataclasses
import json
import re
import shlex
from typing import Any

import nbformat
import numpy as np
import pytest
from conftest import ROOT
from figures import assert_readable_on_a_phone, assert_whole
from matplotlib.text import Text

import qlora_kit as qk
from qlora_kit import claims, plots, schemas
from qlora_kit.claims import FAILS, HOLDS, IN_PART, UNMEASURED, VERDICTS, Records

GPU, CPU = "A GPU", "Some CPU, 2 cores"


@pytest.fixture(scope="module")
def computed() -> dict[str, Any]:
    return claims.compute()


def number(n: int) -> claims.Claim:
    return next(claim for claim in claims.CLAIMS if claim.number == n)


def results(name: str, *rows: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {name: {"environment": {"device": GPU}, "rows": list(rows), **more}}


def memory(method: str, peak: float, *, checkpointing: bool = False, device: str = GPU, **more: Any) -> dict[str, Any]:
    scheme = "nf4" if method == "qlora" else "none"
    return {
        "model": "dialogpt-medium", "method": method, "scheme": scheme, "batch": 8, "length": 128, "device": device,
        "double_quantization": True if method == "qlora" else None, "checkpointing": checkpointing, "peak_bytes": peak,
        "optimizer": "adamw_torch", "step_seconds": None, **more,
    }  # fmt: skip


def trained(method: str, seed: int, f1: float, *, device: str = GPU, seconds: float = 10, **more: Any) -> dict:
    return {
        "preset": f"tiny_{method}", "model": "tiny", "method": method, "seed": seed, "f1_macro": f1, "device": device,
        "scheme": "nf4" if method == "qlora" else "none", "double_quantization": method == "qlora",
        "train_seconds": seconds, "jobs": 1, "loss": 0.25, **more,
    }  # fmt: skip


def stored(scheme: str, seed: int, f1: float, double: bool = True, size: float = 1.0, bits: float = 4.127) -> dict:
    return {
        "model": "tiny", "scheme": scheme, "double_quantization": double and scheme != "none", "seed": seed,
        "f1_macro": f1, "bits_per_parameter": 16.0 if scheme == "none" else bits, "whole_model_bytes": size,
        "device": GPU,
    }  # fmt: skip


def noise(scheme: str, snr: float, double: bool = True) -> dict[str, Any]:
    interval = {"value": snr, "low": snr - 0.1, "high": snr + 0.1}
    return {
        "subject": "normal", "scheme": scheme, "double_quantization": double, "block_size": 64,
        "bits_per_parameter": 4.127, "snr_db": interval,
    }  # fmt: skip


def perplexity(ratio: float) -> dict[str, Any]:
    interval = {"value": ratio, "low": ratio - 0.01, "high": ratio + 0.01}
    return {
        "subject": "perplexity", "scheme": "nf4", "double_quantization": False, "weights": "w", "text": "t",
        "ratio_to_int4": interval,
    }  # fmt: skip


def recipe(f1: float) -> dict[str, Any]:
    return results("accuracy", trained("recipe", 0, f1, model="microsoft/DialoGPT-medium"))


def curve(double: bool, seed: int, jump: float) -> dict[str, Any]:
    norms = [1.0 if step % 2 else 1.0 + jump for step in range(20)]
    losses = {"step": list(range(20)), "loss": [1.0] * 20, "grad_norm": norms}
    return trained("qlora", seed, 0.9, double_quantization=double, curve=losses)


def seeds(method: str, *scores: float, **more: Any) -> list[dict[str, Any]]:
    return [trained(method, seed, score, **more) for seed, score in enumerate(scores)]


def changed(base: dict[str, Any], **values: Any) -> dict[str, Any]:
    """Return computed facts with some values changed, by their path with __ between."""
    facts = copy.deepcopy(base)
    for path, value in values.items():
        *keys, last = path.split("__")
        node = facts
        for key in keys:
            node = node[key]
        node[last] = value
    return facts


LEVEL = seeds("qlora", 0.930, 0.932, 0.931) + seeds("full", 0.931, 0.932, 0.930)
STABLE, RESTLESS = [curve(True, s, 0.1 + 0.01 * s) for s in range(3)], [curve(True, s, 2 + s / 9) for s in range(3)]
SINGLE = [curve(False, s, 1 + 0.02 * s) for s in range(3)]
WEIGHTS = {"notebook": "02_finetune", "environment": {"device": CPU}, "experiment": {"quantization": {"scheme": "nf4"}}}


def parts(adapters: float, base: float) -> dict[str, Any]:
    rows = [
        {"name": n, "parameters": 8, "bytes": b} for n, b in (("adapters", adapters), ("base, linear layers", base))
    ]
    return {"02_finetune": {**WEIGHTS, "weights": rows}}


# claim, verdict, what is changed: computed facts, results, notebooks
CASES: list[tuple[int, str, dict[str, Any], dict[str, Any], dict[str, Any]]] = [
    (1, HOLDS, {}, {}, {}),
    (1, IN_PART, {"ways__qlora__all": 359_306_241}, {}, {}),
    (1, FAILS, {"ways__qlora__trainable": 4_325_376, "ways__qlora__all": 359_306_241}, {}, {}),
    (2, HOLDS, {}, results("schemes", stored("none", 0, 0.9, size=100), stored("nf4", 0, 0.9, size=30)), {}),
    (2, IN_PART, {}, results("schemes", stored("none", 0, 0.9, size=100), stored("nf4", 0, 0.9, size=60)), {}),
    (2, FAILS, {}, results("schemes", stored("none", 0, 0.9), stored("nf4", 0, 0.9, bits=5.0)), {}),
    (3, HOLDS, {"ways__lora__trainable": 1}, results("memory", memory("qlora", 50), memory("lora", 100)), {}),
    (3, IN_PART, {}, results("memory", memory("qlora", 50), memory("lora", 100)), {}),
    (3, FAILS, {}, results("memory", memory("qlora", 95), memory("lora", 100)), {}),
    (4, HOLDS, {}, results("accuracy", *seeds("qlora", 0.9, 0.9, seconds=5), *seeds("lora", 0.9, 0.9)), {}),
    (4, FAILS, {}, results("accuracy", *seeds("qlora", 0.9, 0.9, seconds=12), *seeds("lora", 0.9, 0.9)), {}),
    (5, HOLDS, {"ways__lora__reserved": 20 * 2**30}, {}, {}),
    (5, HOLDS, {}, results("memory", memory("lora", 20 * 2**30, checkpointing=True)), {}),
    (5, FAILS, {}, results("memory", memory("lora", 2**30, checkpointing=True)), {}),
    (6, HOLDS, {}, results("quantization", noise("nf4", 20), noise("int4", 19), perplexity(0.9)), {}),
    (6, IN_PART, {}, results("quantization", noise("nf4", 20), noise("int4", 19), perplexity(1.1)), {}),
    (6, FAILS, {}, results("quantization", noise("nf4", 19), noise("int4", 19)), {}),
    (7, HOLDS, {"four_bit_types__bitsandbytes": ["nf4", "int4"]}, {}, {}),
    (7, IN_PART, {}, {}, {}),
    (7, FAILS, {"four_bit_types__kit": ["nf4"]}, {}, {}),
    (8, HOLDS, {}, results("accuracy", *STABLE, *SINGLE), {}),
    (8, FAILS, {}, results("accuracy", *RESTLESS, *SINGLE), {}),
    (8, FAILS, {}, results("schemes", *(stored("nf4", s, 0.9, d) for s in (0, 1) for d in (True, False))), {}),
    (9, HOLDS, {"ways__qlora__paged": 2**30, "ways__full__paged": 2**31}, {}, {}),
    (9, FAILS, {"ways__qlora__paged": 0, "ways__full__paged": 0}, {}, {}),
    (10, HOLDS, {}, results("memory", memory("lora", 50, checkpointing=True), memory("lora", 100)), {}),
    (10, FAILS, {}, results("memory", memory("lora", 99, checkpointing=True), memory("lora", 100)), {}),
    (11, UNMEASURED, {}, {}, {}),
    (11, IN_PART, {}, recipe(0.936), {}),
    (11, FAILS, {}, recipe(0.9), {}),
    (11, HOLDS, {"data__train": 8_000, "recipe__batch_size": 4}, recipe(0.936), {}),
    (12, HOLDS, {}, results("accuracy", trained("qlora", 0, 0.9, loss=4.1)), {}),
    (12, IN_PART, {"data__labels": 5}, results("accuracy", trained("qlora", 0, 0.9)), {}),
    (12, FAILS, {}, results("accuracy", trained("qlora", 0, 0.9)), {}),
    (13, HOLDS, {}, {}, {}),
    (13, IN_PART, {"data__train": 8_002}, {}, {}),
    (13, FAILS, {"data__train": 8_002, "data__labels": 76}, {}, {}),
    (14, HOLDS, {}, {}, parts(4, 16)),
    (14, IN_PART, {}, {}, parts(4, 4)),
    (14, FAILS, {}, {}, parts(32, 4)),
    (15, HOLDS, {}, results("accuracy", *LEVEL), {}),
    (15, IN_PART, {}, results("accuracy", *seeds("qlora", 0.93, 0.95, 0.92), *seeds("full", 0.94, 0.93, 0.93)), {}),
    (15, FAILS, {}, results("accuracy", *seeds("qlora", 0.9, 0.901, 0.9), *seeds("full", 0.93, 0.93, 0.93)), {}),
]  # fmt: skip


def label(case: tuple[Any, ...]) -> str:
    return f"{case[0]}-{case[1].replace(' ', '_')}"


@pytest.mark.parametrize("case", CASES, ids=label)
def test_a_changed_record_changes_the_verdict(case: tuple[Any, ...], computed: dict[str, Any]):
    n, verdict, facts, found, books = case
    finding = number(n).rule(Records(results=found, notebooks=books, computed=changed(computed, **facts)))
    assert finding.verdict == verdict, finding.reason
    if verdict != UNMEASURED:
        assert finding.figures and finding.reason and not finding.command
        assert all(figure.device and figure.source and np.isfinite(figure.value) for figure in finding.figures)


def test_every_claim_is_tried_with_at_least_two_verdicts():
    assert [claim.number for claim in claims.CLAIMS] == list(range(1, 16))
    for claim in claims.CLAIMS:
        tried = {case[1] for case in CASES if case[0] == claim.number} - {UNMEASURED}
        assert len(tried) >= 2, f"claim {claim.number} is tried with {tried}"


def test_without_records_nothing_is_measured_and_the_command_exists():
    for verdict in claims.check(Records()):
        finding = verdict.finding
        assert finding.verdict == UNMEASURED, verdict.claim.number
        assert finding.command in finding.reason
        first, second, *rest = shlex.split(finding.command)
        if first == "make":
            assert re.search(rf"^{second}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
            numbers = next(word for word in rest if word.startswith("NOTEBOOKS=")).partition("=")[2].split()
            assert all(list((ROOT / "notebooks").glob(f"{n}_*.ipynb")) for n in numbers)
        else:
            assert first == "python"
            assert second == "-m" or (ROOT / second).is_file(), second


def test_a_command_that_is_named_is_one_that_runs():
    """Its options are those that the program has."""
    for verdict in claims.check(Records()):
        first, second, *rest = shlex.split(verdict.finding.command)
        options = [word for word in rest if word.startswith("--")]
        if first == "python" and second != "-m":
            source = (ROOT / second).read_text()
            assert all(f'"{option}"' in source for option in options), verdict.finding.command


def timed(ratio: float) -> dict[str, Any]:
    """Return a record of notebook 04 in which QLoRA's step takes `ratio` of LoRA's."""
    training = {"precision": "auto", "optimizer": "adamw_torch", "gradient_checkpointing": False}
    rows = [
        {"method": method, "scheme": scheme, "changes": {}, "batch": 8, "length": 64, "planned": 90, "measured": 100,
         "step_seconds": seconds, "parts": {}}
        for method, scheme, seconds in (("qlora", "nf4", ratio), ("lora", "none", 1.0))
    ]  # fmt: skip
    spec = {"model": {"name": "microsoft/DialoGPT-medium"}, "training": training}
    return {"04_memory": {"environment": {"device": CPU}, "experiment": spec, "rows": rows}}


def test_a_few_steps_timed_once_have_to_differ_by_more():
    verdicts = [number(4).rule(Records(notebooks=timed(ratio))).verdict for ratio in (0.9, 0.7)]
    assert verdicts == [FAILS, HOLDS]
    repeated = [
        {"model": "m", "contender": "ours", "method": method, "scheme": scheme, "precision": "fp32", "batch": 8,
         "padding": "buckets", "step_seconds": seconds, "device": GPU}
        for method, scheme, seconds in (("qlora", "nf4", 0.9), ("lora", "none", 1.0))
    ]  # fmt: skip
    assert number(4).rule(Records(results=results("speed", *repeated))).verdict == HOLDS
    both = Records(results=results("speed", *repeated), notebooks=timed(1.3), device=CPU)
    assert (number(4).rule(both).verdict, number(4).rule(both).figures[0].device) == (FAILS, CPU)
    # Repeated, interleaved steps of the same device go before a few that were timed once.
    same = [row | {"device": CPU} for row in repeated]
    disturbed = Records(results=results("speed", *same), notebooks=timed(1.9), device=CPU)
    assert number(4).rule(disturbed).verdict == HOLDS and len(number(4).rule(disturbed).figures) == 2


# --- devices ----------------------------------------------------------------------------------------------------


def test_rows_of_two_devices_are_never_compared(computed: dict[str, Any]):
    apart = results("accuracy", *seeds("qlora", 0.93, 0.93, 0.93, device=CPU), *seeds("full", 0.93, 0.93, 0.93))
    assert number(15).rule(Records(results=apart)).verdict == UNMEASURED
    assert number(4).rule(Records(results=apart)).verdict == UNMEASURED
    apart = results("memory", memory("qlora", 50, device=CPU), memory("lora", 100))
    assert number(3).rule(Records(results=apart, computed=computed)).verdict == UNMEASURED
    apart = results("memory", memory("lora", 50, device=CPU, checkpointing=True), memory("lora", 100))
    assert number(10).rule(Records(results=apart)).verdict == UNMEASURED


def test_rows_that_differ_in_more_than_the_method_are_never_compared(computed: dict[str, Any]):
    for key, value in (("batch", 16), ("length", 64), ("optimizer", "sgd"), ("model", "llama-7b")):
        unlike = results("memory", memory("qlora", 50, **{key: value}), memory("lora", 100))
        assert number(3).rule(Records(results=unlike, computed=computed)).verdict == UNMEASURED, key


def test_this_machines_records_go_before_others():
    ahead = [*seeds("qlora", 0.93, 0.931, 0.93), *seeds("lora", 0.93, 0.93, 0.93)]
    behind = [
        *seeds("qlora", 0.9, 0.901, 0.9, device=CPU, seconds=5),
        *seeds("lora", 0.93, 0.93, 0.93, device=CPU),
    ]
    found = results("accuracy", *ahead, *behind)
    for device, near, fast in ((GPU, HOLDS, FAILS), (CPU, FAILS, HOLDS)):
        records = Records(results=found, device=device)
        finding = number(15).rule(records)
        assert (finding.verdict, finding.figures[0].device) == (near, device)
        assert device in finding.reason
        assert (number(4).rule(records).verdict, number(4).rule(records).figures[0].device) == (fast, device)


# --- intervals --------------------------------------------------------------------------------------------------


def test_the_interval_over_seeds_is_students():
    # Student's own example (1908, section 9): ten differences of hours of sleep, mean 1.58; t(9) is 2.262.
    sleep = [1.2, 2.4, 1.3, 1.3, 0.0, 1.0, 1.8, 0.8, 4.6, 1.4]
    interval = claims.seed_interval(sleep)
    assert interval is not None
    assert interval["value"] == pytest.approx(1.58)
    assert interval["high"] - 1.58 == pytest.approx(2.262 * np.std(sleep, ddof=1) / 10**0.5, rel=1e-3)
    assert claims.seed_interval([1.0]) is None


def test_seeds_are_paired_by_number_not_by_place():
    first = [{"seed": 2, "x": 5.0}, {"seed": 0, "x": 1.0}]
    second = [{"seed": 0, "x": 0.5}, {"seed": 1, "x": 9.0}, {"seed": 2, "x": 3.0}]
    assert claims.by_seed(first, second, "x") == [0.5, 2.0]


def test_the_margin_decides_what_near_means():
    found = results("accuracy", *seeds("qlora", 0.928, 0.929, 0.927), *seeds("lora", 0.93, 0.93, 0.93))
    verdicts = [number(15).rule(Records(results=found, margin=m)).verdict for m in (0.01, 0.003, 0.0001)]
    assert verdicts == [HOLDS, IN_PART, IN_PART]
    with pytest.raises(qk.KitError, match="margin is 0"):
        claims.read(margin=0)


def test_a_recorded_interval_over_test_rows_counts_too():
    rows = [*seeds("qlora", 0.93, 0.93, 0.93), *seeds("lora", 0.93, 0.93, 0.93)]
    wide = {
        "of": "tiny_qlora",
        "over": "tiny_lora",
        "device": GPU,
        "f1_macro": {"value": 0, "low": -0.02, "high": 0.02},
    }
    assert number(15).rule(Records(results=results("accuracy", *rows))).verdict == HOLDS
    assert number(15).rule(Records(results=results("accuracy", *rows, differences=[wide]))).verdict == IN_PART
    elsewhere = {**wide, "device": CPU}
    assert number(15).rule(Records(results=results("accuracy", *rows, differences=[elsewhere]))).verdict == HOLDS


def test_a_slow_fall_is_not_restless_and_spikes_are():
    fall = {"grad_norm": list(np.geomspace(10, 1, 200))}
    spikes = {"grad_norm": [1.0 if step % 20 else 8.0 for step in range(200)]}
    slow, wild = claims.roughness(fall), claims.roughness(spikes)
    assert slow is not None and wild is not None and wild > 10 * slow
    assert claims.roughness({"grad_norm": [1.0, None, 2.0]}) is None


# --- figures ----------------------------------------------------------------------------------------------------


def test_the_figures_are_whole_and_readable():
    rows = [
        {"label": "a model with a long name: QLoRA minus full fine-tuning, over test rows (H100)" * place, "value": v,
         "low": v - 0.01, "high": v + 0.02}
        for place, v in ((1, 0.0), (2, -0.04))
    ]  # fmt: skip
    shown = claims.curves(Records(results=results("accuracy", *STABLE, *SINGLE, *[curve(True, 9, 1e-9)])))
    shown[0]["grad_norm"][3] = None
    for name, figure in {
        "intervals": plots.intervals(rows, 0, 0.01, "macro F1"),
        "no interval": plots.intervals([{"label": "x", "value": 1.0}], 1, title="A title"),
        "stability": plots.stability([*shown, {**shown[0], "method": "full"}]),
    }.items():
        assert_whole(figure, name)
        assert_readable_on_a_phone(figure, name)
        assert not [text.get_text() for text in figure.findobj(Text) if "mathdefault" in text.get_text()], name


def test_the_legend_counts_the_runs_of_each_method():
    shown = claims.curves(
        Records(results=results("accuracy", *STABLE, trained("full", 0, 0.9, curve=STABLE[0]["curve"])))
    )
    legend = plots.stability(shown).axes[0].get_legend()
    assert [text.get_text() for text in legend.get_texts()] == ["QLoRA, 3 runs", "full fine-tuning, 1 run"]


def test_a_device_is_named_as_a_figure_has_room_for():
    named = ("NVIDIA H100 80GB HBM3", "Tesla T4", "AMD EPYC, 2 cores", "planned for a T4")
    assert [plots.short_device(name) for name in named] == ["H100", "T4", "CPU", "planned for a T4"]


# --- the repository's own records, and a notebook's ---------------------------------------------------------------


def test_the_repositorys_records_are_read_and_judged(tmp_path, computed: dict[str, Any]):
    records = claims.read(out=tmp_path, computed=False)
    assert {"accuracy", "memory", "quantization", "schemes"} <= set(records.results)
    verdicts = claims.check(dataclasses.replace(records, computed=computed))
    assert all(verdict.finding.verdict in VERDICTS for verdict in verdicts)
    rows = claims.table(verdicts)
    assert [row["#"] for row in rows] == list(range(1, 16))
    assert all(row["because"] and (row["measured"] or row["verdict"] == UNMEASURED) for row in rows)
    with pytest.raises(qk.KitError, match="no folder 'nowhere'"):
        claims.read("nowhere", tmp_path, computed=False)


def test_curves_that_stand_beside_each_other_are_of_one_model():
    def made(model: str, method: str) -> dict[str, Any]:
        return {"model": model, "method": method}

    found = [made("small", "qlora"), made("large", "qlora"), made("large", "qlora"), made("small", "full")]
    assert claims.of_one_model(found) == [found[0], found[3]]
    assert claims.of_one_model([]) == []


def test_readme_says_what_the_reference_records_say(tmp_path, computed: dict[str, Any]):
    records = claims.read(ROOT / "results", tmp_path, computed=False)
    # Nobody's machine goes first, and no run of this one counts.
    verdicts = claims.check(dataclasses.replace(records, computed=computed, runs=(), device=""))
    table = claims.markdown(verdicts)
    (said,) = re.findall(r"<!-- claims -->\n((?:\|.*\n)+)", (ROOT / "README.md").read_text(encoding="utf-8"))
    assert said.strip() == table, f"put this into README:\n{table}"


def test_the_record_of_the_claims_is_what_its_schema_says(tmp_path, computed: dict[str, Any]):
    verdicts = claims.check(Records(computed=computed))
    record = qk.records.notebook_record("05_claims", preset="p", **claims.to_record(verdicts))
    path = tmp_path / "05_claims.json"
    path.write_text(json.dumps(record))
    assert schemas.check([path]) == ([path], [])
    record["claims"][3]["verdict"] = "true"
    path.write_text(json.dumps(record))
    assert "'true' is not one of" in schemas.check([path])[1][0]
    del record["claims"][3:]
    path.write_text(json.dumps(record))
    assert schemas.check([path])[1]


def test_a_notebooks_record_and_a_run_are_read(tmp_path, tiny_experiment, topics):
    run = qk.finetune(tiny_experiment(training__max_steps=6), data=topics, out=tmp_path / "runs", progress=False)
    book = {"environment": {"device": CPU}, "metrics": {"quantization": {"normal_snr_db": {"nf4": 20, "int4": 21}}}}
    qk.records.write_json(tmp_path / "01_quantization.json", book)
    records = claims.read(tmp_path, tmp_path, computed=False)
    assert number(6).rule(records).verdict == FAILS
    (curve,) = claims.curves(records)
    assert curve["label"] == run.path.name and curve["method"] == "qlora"
    assert len(curve["step"]) == len(curve["loss"]) == len(curve["grad_norm"]) == 3
    assert claims.roughness(curve) is not None


def test_no_verdict_stands_in_the_notebook():
    book = nbformat.read(ROOT / "notebooks" / "05_claims.ipynb", as_version=4)
    code = "\n".join(cell.source for cell in book.cells if cell.cell_type == "code")
    prose = "\n".join(cell.source for cell in book.cells if cell.cell_type == "markdown")
    for word in (HOLDS, IN_PART, FAILS, UNMEASURED):
        assert not re.search(rf"[\"']{word}[\"']", code)
    assert "claims.check(" in code
    # Prose names no figure that a record could contradict: no share, score or factor.
    prose = prose.replace("95% intervals", "")
    assert not re.findall(r"\b0\.9\d+\b|\d+(?:\.\d+)? ?%|\b\d+(?:\.\d+)? times\b", prose)
