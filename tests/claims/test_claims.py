"""Every rule is tried both ways, on records changed by hand: no verdict is written anywhere."""

from __future__ import annotations

import copy
import dataclasses
import json
import random
import re
import shlex
from pathlib import Path
from typing import Any

import nbformat
import numpy as np
import pytest
from conftest import ROOT
from figures import assert_readable_on_a_phone, assert_whole
from matplotlib.text import Text

import qlora_kit as qk
from qlora_kit import claims, plots, schemas
from qlora_kit.claims import arithmetic
from qlora_kit.claims.judging import FAILS, HOLDS, IN_PART, NO_MEASUREMENT, UNDECIDED, UNMEASURED, VERDICTS
from qlora_kit.claims.records import Records
from qlora_kit.runs.record import notebook_record
from qlora_kit.system.files import write_json

# A name that stands before the GPU's in every order of names.
GPU, CPU = "NVIDIA H100 80GB HBM3", "A CPU, 2 cores"
LIMIT = 15 * 2**30
NAMES = [claim.name for claim in claims.CLAIMS]


@pytest.fixture(scope="module")
def computed() -> dict[str, Any]:
    return claims.compute()


def claim(name: str) -> claims.Claim:
    return next(claim for claim in claims.CLAIMS if claim.name == name)


def results(name: str, *rows: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {name: {"environment": {"device": GPU}, "rows": list(rows), **more}}


def memory(method: str, peak: float, *, checkpointing: bool = True, device: str = GPU, **more: Any) -> dict[str, Any]:
    """Return a row at the explained step."""
    quantized = method in ("qlora", "recipe")
    return {
        "model": "dialogpt-medium", "method": method, "scheme": "nf4" if quantized else "none", "precision": "bf16",
        "double_quantization": True if quantized else None, "checkpointing": checkpointing, "batch": 8, "length": 128,
        "optimizer": "paged_adamw_8bit", "peak_bytes": peak, "step_seconds": None, "device": device, "graphs": False,
        "parts": {}, "planned_bytes": peak, **more,
    }  # fmt: skip


def stored(method: str, linear: float, rest: float = 10.0, **more: Any) -> dict[str, Any]:
    """Return a row whose base takes so much: 100 numbers in linear layers, `rest` bytes for embeddings."""
    parts = {"base, linear layers": linear, "base, embeddings": rest, "adapters and head": 40.0}
    return memory(method, 1000, parts=parts, trainable_parameters=10, **more)


def tight(optimizer: str, fits: bool, rank: int = 64, **more: Any) -> dict[str, Any]:
    """Return a row of 7 B in 15 GiB."""
    return memory("lora", 14e9 if fits else 0, model="llama-7b", batch=1, length=512, limit_bytes=LIMIT, fits=fits,
                  lora_r=rank, optimizer=optimizer, paged_bytes=1e9 if fits else 0, **more)  # fmt: skip


def trained(method: str, seed: int, f1: float, *, device: str = GPU, **more: Any) -> dict[str, Any]:
    return {
        "preset": f"tiny_{method}", "model": "tiny", "method": method, "seed": seed, "f1_macro": f1, "device": device,
        "scheme": "nf4" if method == "qlora" else "none", "double_quantization": method == "qlora", "accuracy": f1,
        "train_seconds": 10, "jobs": 1, "loss": 0.25, **more,
    }  # fmt: skip


def scheme(name: str, seed: int, f1: float, double: bool = True, **more: Any) -> dict[str, Any]:
    return {
        "model": "tiny", "scheme": name, "double_quantization": double and name != "none", "seed": seed, "f1_macro": f1,
        "bits_per_parameter": 4.127, "whole_model_bytes": 100.0, "accuracy": f1, "train_seconds": 1, "device": GPU,
        **more,
    }  # fmt: skip


def noise(name: str, snr: float, double: bool = True) -> dict[str, Any]:
    interval = {"value": snr, "low": snr - 0.1, "high": snr + 0.1}
    return {
        "subject": "normal", "scheme": name, "double_quantization": double, "block_size": 64,
        "bits_per_parameter": 4.127, "snr_db": interval,
    }  # fmt: skip


def perplexity(ratio: float, text: str = "t", reach: float = 0.01) -> dict[str, Any]:
    interval = {"value": ratio, "low": ratio - reach, "high": ratio + reach}
    return {
        "subject": "perplexity", "scheme": "nf4", "double_quantization": False, "weights": "w", "text": text,
        "ratio_to_int4": interval,
    }  # fmt: skip


def recipe(f1: float, validation: float = 0.91) -> dict[str, Any]:
    row = trained("recipe", 0, f1, model="microsoft/DialoGPT-medium", validation_f1_macro=validation)
    return results("accuracy", row)


def losses(jump: float, spike: float = 0.0, last: float = 0.1) -> dict[str, Any]:
    norms = [1.0 if step % 2 else 1.0 + jump for step in range(20)]
    return {"step": list(range(20)), "loss": [1.0] * 10 + [1.0 + spike] + [0.2] * 8 + [last], "grad_norm": norms}


def curves(name: str, double: bool, base: float, seeds: int = 3, **more: Any) -> list[dict[str, Any]]:
    """Return rows of results/schemes.json whose gradient norms are so restless, a seed each."""
    return [scheme(name, s, 0.9, double, curve=losses(base + s / 90, **more)) for s in range(seeds)]


def seeds(method: str, *scores: float, **more: Any) -> list[dict[str, Any]]:
    return [trained(method, seed, score, **more) for seed, score in enumerate(scores)]


def joint(of: str, over: str, value: float, reach: float, **more: Any) -> dict[str, Any]:
    interval = {"value": value, "low": value - reach, "high": value + reach}
    return {"of": f"tiny_{of}", "over": f"tiny_{over}", "device": GPU, "over_what": "rows and seeds", "shown": 4,
            "f1_macro": interval, **more}  # fmt: skip


def raced(ratio: float, spread: float = 0.01, kernels: float | None = None, **more: Any) -> list[dict[str, Any]]:
    """Return rows of one race in which QLoRA's step takes `ratio` of LoRA's, and each round is that near."""
    return [
        {"model": "dialogpt-medium", "contender": "ours", "method": method, "scheme": name, "precision": "bf16",
         "batch": 8, "padding": "buckets", "step_seconds": seconds, "samples_per_second": 8 / seconds, "device": GPU,
         "samples_per_second_range": [8 / seconds / (1 + spread), 8 / seconds * (1 + spread)], "optimizer": "adamw",
         "device_seconds": busy, "command": "one race", **more}
        for method, name, seconds, busy in (
            ("qlora", "nf4", ratio, kernels), ("lora", "none", 1.0, 1.0 if kernels else None)
        )
    ]  # fmt: skip


def precisions(ratio: float, spread: float = 0.01, **more: Any) -> list[dict[str, Any]]:
    """Return rows of one command, whose two precisions are two races."""
    fast, slow = raced(ratio, spread, **more)
    slow |= {"precision": "fp32", "method": "qlora", "scheme": "nf4", "race": "in fp32"}
    return [fast | {"precision": "fp16", "race": "in fp16"}, slow]


def paging(ratio: float, repeats: int = 5, **more: Any) -> list[dict[str, Any]]:
    return [
        {"model": "small", "method": "full", "scheme": "none", "optimizer": name, "paged": paged, "batch": 8,
         "length": 128, "step_seconds_each": [seconds + turn / 1000 for turn in range(repeats)], "device": GPU, **more}
        for name, paged, seconds in (("paged_adamw_8bit", True, ratio), ("adamw_8bit", False, 1.0))
    ]  # fmt: skip


def tried(method: str, rate: float, f1: float | None) -> dict[str, Any]:
    return {"preset": f"tiny_{method}", "model": "tiny", "method": method, "seed": 99, "validation_f1_macro": f1,
            "tried": {"training.learning_rate": rate}, "device": GPU}  # fmt: skip


def parts(adapters: float, base: float) -> dict[str, Any]:
    found = (("adapters", adapters), ("base, linear layers", base))
    rows = [{"name": name, "parameters": 8, "bytes": taken} for name, taken in found]
    spec = {"quantization": {"scheme": "nf4"}}
    return {"02_finetune": {"environment": {"device": CPU}, "experiment": spec, "weights": rows}}


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


LEVEL = [*seeds("qlora", 0.930, 0.932, 0.931), *seeds("lora", 0.931, 0.931, 0.931)]
NEAR, FAR, OPEN = (joint("qlora", "lora", *ends) for ends in ((0, 0.003), (-0.02, 0.003), (0, 0.02)))
BOTH = results("memory", memory("qlora", 50), memory("lora", 100))
INT4_BETTER = [*(scheme("nf4", s, 0.93 + s / 1e4) for s in range(3)), *(scheme("int4", s, 0.95) for s in range(3))]
NF4_BETTER = [*(scheme("nf4", s, 0.95 + s / 1e4) for s in range(3)), *(scheme("int4", s, 0.93) for s in range(3))]
NO_WAYS = {"ways": {}}

# claim, verdict, what is changed: computed facts, results, notebooks
CASES: list[tuple[str, str, dict[str, Any], dict[str, Any], dict[str, Any]]] = [
    ("1", HOLDS, {}, {}, {}),
    ("1", IN_PART, {"ways__qlora__all": 359_306_241}, {}, {}),
    ("1", FAILS, {"ways__qlora__trainable": 4_325_376, "ways__qlora__all": 359_306_241}, {}, {}),
    ("2", HOLDS, {}, results("memory", stored("qlora", 51.6), stored("lora", 200)), {}),
    ("2", IN_PART, {}, results("memory", stored("qlora", 51.6, 900), stored("lora", 200, 900)), {}),
    ("2", IN_PART, {}, results("memory", stored("qlora", 60), stored("lora", 200)), {}),
    ("2", FAILS, {}, results("memory", stored("qlora", 190), stored("lora", 200)), {}),
    ("3a", HOLDS, {}, BOTH, {}),
    ("3a", FAILS, {}, results("memory", memory("qlora", 95), memory("lora", 100)), {}),
    ("3b", HOLDS, {"ways__lora__trainable": 1}, BOTH, {}),
    ("3b", FAILS, {}, BOTH, {}),
    ("4", HOLDS, {}, results("speed", *raced(0.9, kernels=0.8)), {}),
    ("4", IN_PART, {}, results("speed", *raced(0.9, kernels=1.2)), {}),
    ("4", FAILS, {}, results("speed", *raced(1.02, 0.1, kernels=1.2)), {}),
    ("4", UNDECIDED, {}, results("speed", *raced(1.02, 0.1, kernels=1.01)), {}),
    ("5", HOLDS, {"ways__lora__reserved": 20 * 2**30}, {}, {}),
    ("5", HOLDS, {}, results("memory", memory("lora", 20 * 2**30)), {}),
    ("5", FAILS, {}, results("memory", memory("lora", 2**30)), {}),
    ("6a", HOLDS, {}, results("quantization", noise("nf4", 20), noise("int4", 19)), {}),
    ("6a", UNDECIDED, {}, results("quantization", noise("nf4", 19.1), noise("int4", 19)), {}),
    ("6a", FAILS, {}, results("quantization", noise("nf4", 18), noise("int4", 19)), {}),
    ("6b", HOLDS, {}, results("quantization", perplexity(0.9)) | results("schemes", *NF4_BETTER), {}),
    ("6b", IN_PART, {}, results("quantization", perplexity(0.9), perplexity(1, "u")), {}),
    ("6b", FAILS, {}, results("quantization", perplexity(1.1)) | results("schemes", *INT4_BETTER), {}),
    ("6b", UNDECIDED, {}, results("quantization", perplexity(1.0)), {}),
    ("7", HOLDS, {"four_bit_types__bitsandbytes": ["nf4", "int4"]}, {}, {}),
    ("7", IN_PART, {}, {}, {}),
    ("7", FAILS, {"four_bit_types__kit": ["nf4"]}, {}, {}),
    ("8", HOLDS, {}, results("schemes", *curves("nf4", True, 0.1), *curves("nf4", False, 1)), {}),
    ("8", FAILS, {}, results("schemes", *curves("nf4", True, 2), *curves("nf4", False, 1)), {}),
    ("8", FAILS, {}, results("schemes", *curves("nf4", True, 1, last=1.5), *curves("nf4", False, 1)), {}),
    ("8", IN_PART, {}, results("schemes", *curves("nf4", True, 0.1, spike=1), *curves("nf4", False, 1)), {}),
    ("8", UNDECIDED, {}, results("schemes", *curves("nf4", True, 1), *curves("nf4", False, 1)), {}),
    ("8", UNMEASURED, {}, results("schemes", *(scheme("nf4", s, 0.9, d) for s in range(3) for d in (True, False))), {}),
    ("9", HOLDS, {}, results("memory", tight("adamw_torch", False), tight("paged_adamw_32bit", True)), {}),
    ("9", FAILS, {}, results("memory", tight("adamw_torch", False), tight("paged_adamw_32bit", False)), {}),
    ("9", IN_PART, {}, results("memory", tight("adamw_torch", False), tight("paged_adamw_32bit", True),
                               tight("adamw_torch", False, 99), tight("paged_adamw_32bit", False, 99)), {}),
    ("9", UNMEASURED, {}, results("memory", tight("adamw_torch", True), tight("paged_adamw_32bit", True)), {}),
    ("10", HOLDS, {}, results("memory", memory("qlora", 50), memory("qlora", 100, checkpointing=False)), {}),
    ("10", FAILS, {}, results("memory", memory("qlora", 99), memory("qlora", 100, checkpointing=False)), {}),
    ("11a", UNMEASURED, {}, {}, {}),
    ("11a", IN_PART, {}, recipe(0.9), {}),
    ("11a", FAILS, {}, recipe(0.9, 0.8), {}),
    ("11a", HOLDS, {"recipe__batch_size": 4}, recipe(0.9), {}),
    ("11b", UNMEASURED, {}, {}, {}),
    ("11b", IN_PART, {}, recipe(0.936), {}),
    ("11b", FAILS, {}, recipe(0.9), {}),
    ("11b", HOLDS, {"data__train": 8_000}, recipe(0.936), {}),
    ("12", HOLDS, {}, results("accuracy", trained("qlora", 0, 0.9, loss=4.1)), {}),
    ("12", IN_PART, {"data__labels": 5}, results("accuracy", trained("qlora", 0, 0.9)), {}),
    ("12", FAILS, {}, results("accuracy", trained("qlora", 0, 0.9)), {}),
    ("13", HOLDS, {}, {}, {}),
    ("13", IN_PART, {"data__train": 8_002}, {}, {}),
    ("13", FAILS, {"data__train": 8_002, "data__labels": 76}, {}, {}),
    ("14", HOLDS, NO_WAYS, {}, parts(4, 16)),
    ("14", IN_PART, NO_WAYS, {}, parts(4, 4)),
    ("14", FAILS, NO_WAYS, {}, parts(32, 4)),
    ("14", FAILS, {}, results("memory", stored("qlora", 51.6), stored("lora", 200)), parts(4, 16)),
    ("15", HOLDS, {}, results("accuracy", *LEVEL, differences=[NEAR]), {}),
    ("15", FAILS, {}, results("accuracy", *LEVEL, differences=[FAR]), {}),
    ("15", UNDECIDED, {}, results("accuracy", *LEVEL, differences=[OPEN]), {}),
    ("15", UNDECIDED, {}, results("accuracy", *LEVEL), {}),
    ("15", IN_PART, {}, results("accuracy", *LEVEL, *seeds("full", 0.931, 0.931, 0.931),
                                differences=[NEAR, joint("qlora", "full", -0.02, 0.003)]), {}),
    ("16", HOLDS, {"trained__head": 0}, {}, {}),
    ("16", IN_PART, {}, {}, {}),
    ("16", FAILS, {"trained__A": 0}, {}, {}),
    ("17", HOLDS, {"factor__times": 1.0}, {}, {}),
    ("17", FAILS, {}, {}, {}),
    ("18", HOLDS, {}, results("accuracy", *LEVEL, differences=[FAR]), {}),
    ("18", UNDECIDED, {}, results("accuracy", *LEVEL, differences=[OPEN]), {}),
    ("18", FAILS, {}, results("accuracy", *LEVEL, differences=[joint("qlora", "lora", 0.02, 0.003)]), {}),
    ("19", HOLDS, {}, results("speed", *precisions(0.5, kernels=0.5)), {}),
    ("19", FAILS, {}, results("speed", *precisions(1.5, kernels=1.5)), {}),
    ("19", UNDECIDED, {}, results("speed", *precisions(0.5, kernels=1)), {}),
    ("19", UNMEASURED, {}, results("speed", *precisions(0.5)), {}),
    ("19", UNMEASURED, {}, results("speed", *precisions(0.5, kernels=0.5, device=CPU)), {}),
    ("20", HOLDS, {}, results("paging", *paging(0.9)), {}),
    ("20", FAILS, {}, results("paging", *paging(1.2)), {}),
    ("20", UNDECIDED, {}, results("paging", *paging(1.001)), {}),
    ("20", UNMEASURED, {}, results("paging", *paging(0.9, 4)), {}),
    ("20", UNMEASURED, {}, results("paging", *paging(0.9, device=CPU)), {}),
    ("21", HOLDS, {}, results("schemes", *curves("nf4", True, 0.1), *curves("none", False, 1)), {}),
    ("21", FAILS, {}, results("schemes", *curves("nf4", True, 2), *curves("none", False, 1)), {}),
    ("21", UNDECIDED, {}, results("schemes", *curves("nf4", True, 1), *curves("none", False, 1)), {}),
    ("22", HOLDS, {"padding__pad": 7}, {}, {}),
    ("22", IN_PART, {}, {}, {}),
    ("22", FAILS, {"codes__exact": False}, {}, {}),
    ("23", NO_MEASUREMENT, {}, {}, {}),
]  # fmt: skip


def label(case: tuple[Any, ...]) -> str:
    return f"{case[0]}-{case[1].replace(' ', '_')}"


@pytest.mark.parametrize("case", CASES, ids=label)
def test_a_changed_record_changes_the_verdict(case: tuple[Any, ...], computed: dict[str, Any]):
    name, verdict, facts, found, books = case
    finding = claim(name).rule(Records(results=found, notebooks=books, computed=changed(computed, **facts)))
    assert finding.verdict == verdict, finding.reason
    assert bool(finding.command) == (verdict == UNMEASURED) and finding.reason
    assert bool(finding.figures) == (verdict not in (UNMEASURED, NO_MEASUREMENT))
    for figure in (*finding.figures, *finding.beside):
        assert figure.device and figure.source and np.isfinite(figure.value)


def test_every_claim_is_tried_with_at_least_two_verdicts():
    assert [claim.number for claim in claims.CLAIMS] == sorted(claim.number for claim in claims.CLAIMS)
    assert {claim.number for claim in claims.CLAIMS} == set(range(1, 24)) and len(set(NAMES)) == len(NAMES)
    for name in NAMES:
        verdicts = {case[1] for case in CASES if case[0] == name} - {UNMEASURED}
        # A picture has no evidence that could change what is said of it.
        assert len(verdicts) >= (1 if name == "23" else 2), f"claim {name} is tried with {verdicts}"


# --- rows that are not about a claim ----------------------------------------------------------------------------


def shuffled(records: Records, seed: int) -> Records:
    """Return records with every list of rows in another order."""
    drawn = random.Random(seed)

    def turn(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: turn(item) for key, item in value.items()}
        if isinstance(value, list):
            items = [turn(item) for item in value]
            if items and all(isinstance(item, dict) for item in items):
                drawn.shuffle(items)
            return items
        return value

    return dataclasses.replace(records, results=turn(records.results), notebooks=turn(records.notebooks))


def findings_of(records: Records) -> dict[str, claims.Finding]:
    return {one.claim.name: one.finding for one in claims.check(records)}


def verdicts_of(records: Records) -> dict[str, str]:
    return {name: finding.verdict for name, finding in findings_of(records).items()}


def doubled(records: Records) -> Records:
    """Return records in which every row stands twice."""
    found = copy.deepcopy(dict(records.results))
    for record in found.values():
        for name in ("rows", "differences"):
            if name in record:
                record[name] = [row for row in record[name] for _ in (0, 1)]
    return dataclasses.replace(records, results=found)


# Rows that would turn each verdict, were they about the claim: another model, another shape, another device's kind.
UNRELATED: list[tuple[str, list[dict[str, Any]]]] = [
    ("memory", [
        memory("qlora", 99, model="gpt-x"), memory("lora", 100, model="gpt-x"),
        memory("qlora", 99, model="gpt-x", checkpointing=False),
        memory("qlora", 99, length=64), memory("lora", 100, length=64),
        memory("qlora", 100, length=64, checkpointing=False),
        memory("lora", 20 * 2**30, batch=64), memory("lora", 20 * 2**30, model="gpt-x"),
        # The explained step, with what the kit can do to it.
        *(memory(method, peak, checkpointing=kept, **how)
          for how in ({"graphs": True}, {"lean": True}, {"embeddings": "nf4"}, {"cublas_workspace": ":8"})
          for method, peak, kept in (("qlora", 99, True), ("qlora", 100, False), ("lora", 100, True))),
        memory("qlora", 120, device=CPU), memory("lora", 100, device=CPU),
        memory("qlora", 120, device=CPU, checkpointing=False),
        stored("qlora", 199, 900, model="gpt-x"), stored("lora", 200, 900, model="gpt-x"),
        memory("full", 100, limit_bytes=LIMIT, fits=True, optimizer="adamw_torch", model="gpt-x"),
        memory("full", 100, limit_bytes=LIMIT, fits=True, optimizer="paged_adamw_32bit", model="gpt-x"),
    ]),
    ("speed", [
        *raced(0.5, kernels=0.5, model="smollm2-135m", command="another race"), *raced(0.5, device=CPU),
        # Of two races: each alone has nothing to be compared with.
        raced(0.5, contender="grouped", command="one")[0], raced(0.5, contender="grouped", command="two")[1],
        *raced(0.5, contender="compiled", padding="a")[:1],
    ]),
    ("accuracy", [
        trained("qlora", 0, 0.5, model="another", preset="another_qlora"), trained("full", 0, 0.99, device=CPU),
        trained("qlora", 7, 0.1, preset="tiny_qlora", model="another"), trained("recipe", 0, 0.2, model="another"),
        *seeds("qlora", 0.9, 0.901, 0.9, device=CPU), *seeds("lora", 0.95, 0.95, 0.95, device=CPU),
    ]),
    ("schemes", [
        scheme("nf4", 90, 0.1, model="another"), scheme("fp4", 0, 0.99), scheme("fp4", 1, 0.99), scheme("int8", 0, 0.1),
        *[row | {"device": CPU} for row in INT4_BETTER], *[row | {"device": CPU} for row in curves("nf4", True, 9)],
        *[row | {"device": CPU} for row in curves("nf4", False, 1)],
    ]),
    ("quantization", [
        noise("fp4", 99), noise("nf4", 1, double=False) | {"block_size": 32}, noise("int4", 99) | {"block_size": 128},
        perplexity(1.3) | {"scheme": "fp4"}, perplexity(1.3) | {"double_quantization": True},
    ]),
    ("paging", [*paging(0.5, device=CPU), *paging(0.5, 4, model="other"), paging(0.5, batch=64)[0]]),
    ("tuning", [tried("qlora", 1.0, 0.0), tried("lora", 1.0, 0.9)]),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=label)
def test_no_other_row_changes_a_verdict(case: tuple[Any, ...], computed: dict[str, Any]):
    """Not their order, not a row that stands twice, not rows of other models, shapes, races, seeds and devices."""
    name, verdict, facts, found, books = case
    records = Records(results=found, notebooks=books, computed=changed(computed, **facts))
    more = copy.deepcopy(dict(found))
    for record, rows in UNRELATED:
        if record in found and not (name == "12" and record == "accuracy"):
            more[record]["rows"] = [*rows, *more[record]["rows"]]
    others = [doubled(records), shuffled(records, 0)]
    if verdict != UNMEASURED:  # where nothing is measured, another device's rows may be the first
        others.append(shuffled(dataclasses.replace(records, results=more), 1))
    for other in others:
        finding = claim(name).rule(other)
        assert finding.verdict == verdict, finding.reason


def test_one_odd_run_does_not_make_a_test_loss(computed: dict[str, Any]):
    rows = [trained("qlora", seed, 0.9) for seed in range(3)] + [trained("qlora", 9, 0.01, loss=4.2)]
    finding = claim("12").rule(Records(results=results("accuracy", *rows), computed=computed))
    assert finding.verdict == FAILS
    # The explained model's own loss goes before all others'.
    own = trained("recipe", 0, 0.9, model="microsoft/DialoGPT-medium", loss=4.15)
    found = results("accuracy", *rows, own)
    assert claim("12").rule(Records(results=found, computed=computed)).verdict == HOLDS


@pytest.fixture(scope="module")
def reference(tmp_path_factory, computed: dict[str, Any]) -> Records:
    """Return the repository's records, with nobody's machine first and no run of this one."""
    records = claims.read(ROOT / "results", tmp_path_factory.mktemp("out"), computed=False)
    return dataclasses.replace(records, computed=computed, runs=(), device="")


def test_the_order_of_rows_in_the_records_never_matters(reference: Records):
    """Neither verdicts nor words nor the figures and their order."""
    expected = findings_of(reference)
    for seed in range(3):
        assert findings_of(shuffled(reference, seed)) == expected
    assert findings_of(doubled(reference)) == expected


def test_rows_of_other_models_change_no_verdict_of_the_repository(reference: Records):
    """Every row once more as another model's, with all its figures turned over."""
    found = copy.deepcopy(dict(reference.results))
    for name, key in (("memory", "peak_bytes"), ("speed", "step_seconds"), ("speed", "device_seconds")):
        rows = []
        for row in found[name]["rows"]:
            if row.get(key) and not row.get("limit_bytes"):
                rows.append({**row, "model": "another", key: 1 / row[key]})
        found[name]["rows"] = rows + found[name]["rows"]
    assert verdicts_of(dataclasses.replace(reference, results=found)) == verdicts_of(reference)


def test_each_deciding_row_of_the_repository_can_turn_its_verdict(reference: Records):
    """What the README shows hangs on these rows: turned over in the record, the verdict is another."""

    def verdict(name: str, record: str, change: Any, section: str = "rows") -> tuple[str, str]:
        found = copy.deepcopy(dict(reference.results))
        touched = [change(row) for row in found[record][section]]
        assert any(touched)
        turned = dataclasses.replace(reference, results=found)
        return claim(name).rule(reference).verdict, claim(name).rule(turned).verdict

    def at_step(row: dict[str, Any], method: str) -> bool:
        return all(row[key] == value for key, value in (("model", "dialogpt-medium"), ("batch", 8), ("length", 128),
                   ("checkpointing", True), ("method", method), ("precision", "bf16")))  # fmt: skip

    def peak(method: str, to: float) -> Any:
        return lambda row: at_step(row, method) and not row.update(peak_bytes=to)

    def linear(row: dict[str, Any]) -> bool:
        return (
            row["model"] == "dialogpt-medium"
            and row["scheme"] == "nf4"
            and not row["parts"].update({"base, linear layers": 600 * 2**20})
        )

    def kernels(row: dict[str, Any]) -> bool:
        if row["method"] != "qlora" or row["model"] != "dialogpt-medium" or not row["device_seconds"]:
            return False
        row.update(device_seconds=row["device_seconds"] / 2)
        return True

    assert verdict("2", "memory", linear) == (HOLDS, FAILS)
    assert verdict("3a", "memory", peak("qlora", 900 * 2**20)) == (HOLDS, FAILS)
    assert verdict("4", "speed", kernels) == (FAILS, IN_PART)
    assert verdict("5", "memory", peak("lora", 2**34)) == (FAILS, HOLDS)
    assert verdict("9", "memory", lambda row: row["limit_bytes"] and not row.update(fits=False)) == (HOLDS, FAILS)
    assert verdict("10", "memory", peak("qlora", 2**33)) == (HOLDS, FAILS)
    above = {"value": 1.2, "low": 1.1, "high": 1.3}
    assert verdict("6b", "quantization", lambda row: row["subject"] == "perplexity"
                   and not row.update(ratio_to_int4=above)) == (IN_PART, FAILS)  # fmt: skip
    assert verdict("6a", "quantization", lambda row: row["subject"] == "normal" and row["scheme"] == "int4"
                   and not row.update(snr_db={"value": 30, "low": 29, "high": 31})) == (HOLDS, FAILS)  # fmt: skip
    both = {"over_what": "rows and seeds", "shown": 4, "f1_macro": {"value": 0, "low": -0.004, "high": 0.004}}
    assert verdict("15", "accuracy", lambda row: row["of"].endswith("_qlora")
                   and not row.update(both), "differences") == (UNDECIDED, HOLDS)  # fmt: skip
    behind = {**both, "f1_macro": {"value": -0.02, "low": -0.03, "high": -0.01}}
    for name, turned in (("15", FAILS), ("18", HOLDS)):
        assert verdict(name, "accuracy", lambda row: row["of"].endswith("_qlora")
                       and not row.update(behind), "differences") == (UNDECIDED, turned)  # fmt: skip
    assert verdict("12", "accuracy", lambda row: not row.update(loss=4.2)) == (FAILS, HOLDS)
    restless = {"grad_norm": [1.0, 9.0] * 10, "loss": [4.0] + [1.0] * 19, "step": list(range(20))}
    assert verdict("21", "accuracy", lambda row: row["method"] == "lora"
                   and not row.update(curve=restless)) == (FAILS, HOLDS)  # fmt: skip
    assert verdict("8", "schemes", lambda row: row["contender"] == "nf4"
                   and not row.update(curve=restless)) == (UNDECIDED, FAILS)  # fmt: skip


def test_the_repositorys_verdicts_are_decided_by_the_explained_setting(reference: Records):
    found = {one.claim.name: one.finding for one in claims.check(reference)}
    saved = found["3a"].figures
    assert len(saved) == 1 and "dialogpt-medium, batch 8 x 128, checkpointing" in saved[0].name
    assert saved[0].value == pytest.approx(0.432, abs=0.001) and len(found["3a"].beside) > 10
    for name in ("2", "10"):
        assert all("dialogpt-medium" in figure.name for figure in found[name].figures), name
    assert all(figure.source == "results/speed.json" and figure.device == GPU for figure in found["4"].figures)
    assert {"kernels" in figure.name for figure in found["4"].figures} == {True, False}
    assert "all in" not in found["5"].reason and "both in bf16" in found["5"].reason
    assert "int4 was ahead of NF4 in 3 of 3 seeds" in found["6b"].reason and "tell apart 0.00" in found["6b"].reason
    assert found["8"].verdict == UNDECIDED and "3 seeds" in found["8"].reason and found["8"].beside
    assert "llama-7b" in found["9"].reason and "15 GiB" in found["9"].reason


# --- without records --------------------------------------------------------------------------------------------


def test_without_records_nothing_is_measured_and_the_command_exists():
    for verdict in claims.check(Records()):
        finding = verdict.finding
        if verdict.claim.name == "23":
            continue
        assert finding.verdict == UNMEASURED, verdict.claim.name
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
        first, second, *rest = [*shlex.split(verdict.finding.command), "", ""]
        options = [word for word in rest if word.startswith("--")]
        if first == "python" and second != "-m":
            source = (ROOT / second).read_text() + (ROOT / "benchmarks" / "common" / "recording.py").read_text()
            assert all(f'"{option}"' in source for option in options), verdict.finding.command


# --- times ------------------------------------------------------------------------------------------------------


def timed(*qlora: float, lora: tuple[float, ...] = (0.98, 1.0, 1.01, 1.0, 0.99), device: str = CPU) -> dict[str, Any]:
    """Return a record of notebook 04 with QLoRA's and LoRA's step in each round."""
    times = [
        {"method": method, "scheme": name, "batch": 8, "length": 64, "step_seconds_each": list(each)}
        for method, name, each in (("qlora", "nf4", qlora), ("lora", "none", lora))
    ]
    spec = {"model": {"name": "microsoft/DialoGPT-medium"}}
    return {"04_memory": {"environment": {"device": device}, "experiment": spec, "rows": [], "times": times}}


def test_time_has_a_verdict_only_where_the_ranges_of_repeats_do_not_overlap():
    def verdict(**records: Any) -> str:
        return claim("4").rule(Records(**records)).verdict

    assert verdict(notebooks=timed(0.7, 0.71, 0.72, 0.7, 0.71)) == HOLDS
    assert verdict(notebooks=timed(1.2, 1.3, 1.25, 1.2, 1.21)) == FAILS
    # One round in which something else ran.
    assert verdict(notebooks=timed(0.7, 0.71, 0.72, 0.7, 1.1)) == UNDECIDED
    assert verdict(notebooks=timed(0.7, 0.71, 0.72, 0.7, 0.71, lora=(1.0, 1.0, 0.715, 1.0, 1.0))) == UNDECIDED
    # Three steps timed once, as the notebook had them, are no comparison.
    assert verdict(notebooks=timed(0.5, lora=(1.0,))) == UNMEASURED
    assert verdict(notebooks=timed(0.5, 0.5, 0.5, 0.5, lora=(1.0,) * 4)) == UNMEASURED
    rows = [memory("qlora", 50) | {"step_seconds": 0.5}, memory("lora", 100) | {"step_seconds": 1.0}]
    assert verdict(results=results("memory", *rows)) == UNMEASURED
    # Nor are the training times of jobs that shared a card, however many.
    shared = [row | {"train_seconds": 1.0, "jobs": 9} for row in seeds("qlora", *[0.9] * 5)] + seeds("lora", *[0.9] * 5)
    assert verdict(results=results("accuracy", *shared)) == UNMEASURED
    assert verdict(results=results("speed", *raced(0.9))) == HOLDS
    assert verdict(results=results("speed", *raced(0.9, spread=0.2))) == UNDECIDED
    assert verdict(results=results("speed", *raced(0.9), *raced(1.2, batch=32))) == IN_PART
    assert verdict(results=results("speed", *raced(1.02, spread=0.1), *raced(1.2, batch=32))) == FAILS
    # A row that keeps its median alone counts as 2.5% to either side.
    alone = [{**row, "samples_per_second_range": None} for row in (*raced(0.9), *raced(0.96, batch=32))]
    assert verdict(results=results("speed", *alone[:2])) == HOLDS
    assert verdict(results=results("speed", *alone[2:])) == UNDECIDED
    # So does one whose rate is not known, whatever its range.
    assert verdict(results=results("speed", *({**row, "samples_per_second": None} for row in raced(0.9)))) == HOLDS


def test_a_gpu_goes_first_and_where_others_disagree_all_are_told():
    slower, faster = timed(1.2, 1.3, 1.25, 1.2, 1.21), timed(0.7, 0.71, 0.72, 0.7, 0.71)
    found = claim("4").rule(Records(results=results("speed", *raced(0.9)), notebooks=slower, device=CPU))
    assert found.verdict == HOLDS and [figure.device for figure in found.figures] == [GPU]
    assert [figure.device for figure in found.beside] == [CPU]
    assert f"on {GPU} QLoRA is faster (0.9 times LoRA's time)" in found.reason
    assert f"04_memory.json disagrees: on {CPU} QLoRA is not faster (1.21 times LoRA's time)" in found.reason
    assert "Other devices" in found.reason and "wait for the host" in found.reason
    # Of one device, the reference decides.
    same = results("speed", *raced(0.9, device=CPU))
    found = claim("4").rule(Records(results=same, notebooks=slower, device=CPU))
    assert found.verdict == HOLDS and "04_memory.json disagrees" in found.reason and "One device" in found.reason
    found = claim("4").rule(Records(results=same, notebooks=faster, device=CPU))
    assert found.verdict == HOLDS and "disagrees" not in found.reason and len(found.beside) == 1
    # A GPU of one's own goes before another.
    own = timed(1.2, 1.3, 1.25, 1.2, 1.21, device="Tesla T4")
    found = claim("4").rule(Records(results=results("speed", *raced(0.9)), notebooks=own, device="Tesla T4"))
    assert found.verdict == FAILS and found.figures[0].device == "Tesla T4"


def test_rounds_here_whose_ranges_overlap_do_not_turn_the_verdict():
    # On the explained model and a GPU of one's own, notebook 04 goes before every reference.
    overlapping = timed(0.7, 0.71, 0.72, 0.7, 1.1, device="Tesla T4")
    for ratio, expected in ((0.9, HOLDS), (1.2, FAILS)):
        reference = results("speed", *raced(ratio))
        alone = claim("4").rule(Records(results=reference, device="Tesla T4"))
        found = claim("4").rule(Records(results=reference, notebooks=overlapping, device="Tesla T4"))
        assert found.verdict == alone.verdict == expected and found.figures == alone.figures
        assert found.reason.startswith(alone.reason + ". Notebook 04's rounds on Tesla T4 decide nothing")
        assert "the ranges of the two overlap (QLoRA is not told apart (0.6931 to 1.122 times" in found.reason
        assert [figure.source for figure in found.beside] == ["04_memory.json"]
    # Where they do not overlap, they decide, and a line says where the reference differs and why.
    apart = timed(0.7, 0.71, 0.72, 0.7, 0.71, device="Tesla T4")
    found = claim("4").rule(Records(results=results("speed", *raced(1.2)), notebooks=apart, device="Tesla T4"))
    assert found.verdict == HOLDS and "results/speed.json disagrees" in found.reason and "Other devices" in found.reason


def test_a_run_on_a_users_own_rows_is_no_evidence(tiny_experiment, topics, tmp_path: Path):
    experiment = tiny_experiment(training__max_steps=1)
    run = qk.finetune(experiment, data=topics, out=tmp_path / "runs", progress=False)
    assert claims._runs(tmp_path / "runs") == []
    file = run.path / "experiment.yaml"
    assert "name: memory" in file.read_text()


def test_kernels_that_were_summed_are_said_to_be():
    for more, said in (({}, True), ({"device_seconds_means": "busy"}, False)):
        rows = raced(1.2, kernels=1.2, **more)
        reason = claim("4").rule(Records(results=results("speed", *rows))).reason
        assert ("count twice" in reason) == said
    # Two kinds of kernels' time are not compared.
    mixed = [raced(1.2, kernels=1.2)[0], raced(1.2, kernels=1.2, device_seconds_means="busy")[1]]
    assert claim("4").rule(Records(results=results("speed", *mixed))).verdict == UNMEASURED


def test_the_words_about_time_never_contradict_their_figures():
    drawn = np.random.default_rng(0)
    for _ in range(3_000):
        ratios = []
        for _ in range(drawn.integers(1, 5)):
            low, value, high = sorted(1 + drawn.choice([1, -1]) * 10.0 ** drawn.uniform(-12, -0.2, 3))
            if drawn.random() < 0.3:
                low, high = min(low, 2 - high), max(high, 2 - low)
            ratios.append(claims.Figure("a ratio", value, "", CPU, "a record", low, high))
        verdict, words = claims.in_words(ratios)
        said = re.findall(
            r"(not faster|faster|not told apart)(?: in (\d) of (\d) comparisons)? \((\S+?)(?: to (\S+))? times",
            words,
        )
        counts = {side: int(count or len(ratios)) for side, count, *_ in said}
        assert sum(counts.values()) == len(ratios) and words.count(" times LoRA's time)") == len(said)
        for side, _, total, first, last in said:
            assert not total or int(total) == len(ratios)
            low, high = float(first), float(last or first)
            assert high < 1 if side == "faster" else low >= 1 if side == "not faster" else low < 1 <= high, words
        for one in ratios:
            assert claims.told_apart(one) in counts
        allowed = {
            HOLDS: set(counts) == {"faster"},
            IN_PART: "faster" in counts and len(counts) > 1,
            FAILS: "not faster" in counts and "faster" not in counts,
            UNDECIDED: set(counts) == {"not told apart"},
        }
        assert allowed[verdict] and sum(allowed.values()) == 1, words


# --- devices ----------------------------------------------------------------------------------------------------


def test_rows_of_two_devices_are_never_compared(computed: dict[str, Any]):
    apart = results("accuracy", *seeds("qlora", 0.93, 0.93, 0.93, device=CPU), *seeds("full", 0.93, 0.93, 0.93))
    assert claim("15").rule(Records(results=apart)).verdict == UNMEASURED
    apart = results("memory", memory("qlora", 50, device=CPU), memory("lora", 100))
    assert claim("3a").rule(Records(results=apart, computed=computed)).verdict == UNMEASURED
    apart = results("memory", memory("qlora", 50, device=CPU), memory("qlora", 100, checkpointing=False))
    assert claim("10").rule(Records(results=apart)).verdict == UNMEASURED
    apart = results("speed", *(row | {"device": device} for row, device in zip(raced(0.9), (CPU, GPU), strict=True)))
    assert claim("4").rule(Records(results=apart)).verdict == UNMEASURED


def test_rows_that_differ_in_more_than_the_method_are_never_compared(computed: dict[str, Any]):
    for key, value in (("batch", 16), ("length", 64), ("optimizer", "sgd"), ("model", "llama-7b"), ("lean", True),
                       ("precision", "fp32"), ("cublas_workspace", ":8")):  # fmt: skip
        unlike = results("memory", memory("qlora", 50, **{key: value}), memory("lora", 100))
        assert claim("3a").rule(Records(results=unlike, computed=computed)).verdict == UNMEASURED, key


def test_this_machines_records_go_before_others_and_a_gpus_before_a_cpus():
    here, there = [joint("qlora", "lora", 0, 0.003, device=device) for device in (GPU, CPU)]
    there["f1_macro"] = FAR["f1_macro"]
    rows = [*LEVEL, *[row | {"device": CPU} for row in LEVEL]]
    for device, expected in ((GPU, HOLDS), (CPU, FAILS), ("another", HOLDS)):
        records = Records(results=results("accuracy", *rows, differences=[there, here]), device=device)
        finding = claim("15").rule(records)
        assert finding.verdict == expected and {one.device for one in finding.figures} == {
            CPU if device == CPU else GPU
        }


def test_two_gpus_decide_together():
    other = "Tesla T4"
    rows = [memory("qlora", 50), memory("lora", 100)]
    more = [row | {"device": other, "peak_bytes": peak} for row, peak in zip(rows, (99, 100), strict=True)]
    for found in ([*rows, *more], [*more, *rows]):
        finding = claim("3a").rule(Records(results=results("memory", *found)))
        assert finding.verdict == FAILS and {one.device for one in finding.figures} == {GPU, other}


# --- intervals --------------------------------------------------------------------------------------------------


def test_the_interval_over_seeds_is_students():
    # Student's own example (1908, section 9): ten differences of hours of sleep, mean 1.58; t(9) is 2.262.
    sleep = [1.2, 2.4, 1.3, 1.3, 0.0, 1.0, 1.8, 0.8, 4.6, 1.4]
    interval = claims.seed_interval(sleep)
    assert interval is not None
    assert interval["value"] == pytest.approx(1.58)
    assert interval["high"] - 1.58 == pytest.approx(2.262 * np.std(sleep, ddof=1) / 10**0.5, rel=1e-3)
    assert claims.seed_interval([1.0]) is None


def test_seeds_are_paired_by_number_not_by_place_and_count_once():
    first = [{"seed": 2, "x": 5.0}, {"seed": 0, "x": 1.0}]
    second = [{"seed": 0, "x": 0.5}, {"seed": 1, "x": 9.0}, {"seed": 2, "x": 3.0}, {"seed": 0, "x": None}]
    assert claims.by_seed(first, second, "x") == [0.5, 2.0]
    assert claims.by_seed([*first, *first], [*second, *second], "x") == [0.5, 2.0]


def test_the_margin_decides_what_near_means():
    found = results("accuracy", *LEVEL, differences=[NEAR])
    verdicts = [claim("15").rule(Records(results=found, margin=m)).verdict for m in (0.01, 0.003, 0.0029)]
    assert verdicts == [HOLDS, HOLDS, UNDECIDED]
    with pytest.raises(qk.KitError, match="margin is 0"):
        claims.read(margin=0)


def test_the_margin_is_never_wider_than_what_fine_tuning_gains_over_the_svm():
    for svm, expected in ((0.920, HOLDS), (0.929, UNDECIDED)):
        baselines = {"embedding_svm": {"f1_macro": {"value": svm, "low": svm, "high": svm}}}
        found = results("accuracy", *LEVEL, differences=[NEAR], baselines=baselines)
        finding = claim("15").rule(Records(results=found, margin=0.01))
        assert finding.verdict == expected and "the gain over an SVM is" in finding.reason
    assert claims.MARGIN < 0.0059


def test_an_interval_over_rows_and_seeds_goes_before_either_alone():
    rows = seeds("qlora", 0.93, 0.931, 0.93) + seeds("lora", 0.93, 0.93, 0.931)
    alone = {
        "of": "tiny_qlora",
        "over": "tiny_lora",
        "device": GPU,
        "f1_macro": {"value": 0, "low": -0.001, "high": 0.001},
    }
    finding = claim("15").rule(Records(results=results("accuracy", *rows, differences=[alone])))
    # Each alone is within the margin, and yet they do not show that the two are level.
    assert finding.verdict == UNDECIDED and "too narrow" in finding.reason
    finding = claim("15").rule(Records(results=results("accuracy", *rows, differences=[alone, NEAR])))
    assert finding.verdict == HOLDS and len(finding.figures) == 1 and "rows and seeds" in finding.figures[0].name
    # Whichever of the two is named first.
    turned = joint("lora", "qlora", 0.02, 0.003)
    finding = claim("15").rule(Records(results=results("accuracy", *rows, differences=[turned])))
    assert finding.verdict == FAILS and finding.figures[0].value == -0.02
    elsewhere = {**FAR, "device": CPU}
    finding = claim("15").rule(Records(results=results("accuracy", *rows, differences=[elsewhere])))
    assert finding.verdict == UNDECIDED


def test_every_model_that_was_measured_counts_for_near():
    second = [row | {"model": "other", "preset": row["preset"].replace("tiny", "other")} for row in LEVEL]
    far = {**FAR, "of": "other_qlora", "over": "other_lora"}
    near = {**NEAR, "of": "other_qlora", "over": "other_lora"}
    for lines, expected in (([NEAR, near], HOLDS), ([NEAR, far], IN_PART), ([NEAR], IN_PART)):
        found = results("accuracy", *LEVEL, *second, differences=lines)
        assert claim("15").rule(Records(results=found)).verdict == expected


# --- curves -----------------------------------------------------------------------------------------------------


def test_a_slow_fall_is_not_restless_and_spikes_are():
    fall = {"grad_norm": list(np.geomspace(10, 1, 200))}
    wild = {"grad_norm": [1.0 if step % 20 else 8.0 for step in range(200)]}
    slow, restless = claims.roughness(fall), claims.roughness(wild)
    assert slow is not None and restless is not None and restless > 10 * slow
    assert claims.roughness({"grad_norm": [1.0, None, 2.0]}) is None


def test_a_spike_is_a_jump_above_what_was_before():
    assert claims.spikes({"loss": [4, 3, 2, 1, 1, 1, 1.3, 1, 1]}) == 0
    assert claims.spikes({"loss": [4, 3, 2, 1, 1, 1, 2.9, 1, None, 1, 1, 1]}) == 0
    assert claims.spikes({"loss": [4, 1, 1, 1, 1, 1, 2, 1, 1]}) == 1
    assert claims.spikes({"loss": [4]}) == 0


def test_a_run_diverges_whose_loss_ends_where_it_began():
    assert claims.diverged({"loss": [4, 2, 4.1]}) and claims.diverged({"loss": [4, None]})
    assert not claims.diverged({"loss": [4, 2, 3.9]})


def test_a_seed_of_which_nothing_was_left_counts_as_diverged():
    rows = curves("nf4", True, 1)
    one = {"model": "tiny", "scheme": "nf4", "double_quantization": False, "device": GPU, "message": "loss is nan"}
    lost = [{**one, "seed": seed} for seed in range(3)]
    assert claim("8").rule(Records(results=results("schemes", *rows))).verdict == UNMEASURED
    finding = claim("8").rule(Records(results=results("schemes", *rows, diverged=lost)))
    assert finding.verdict == HOLDS and "divergence better" in finding.reason


def test_a_run_of_ones_own_hides_no_recorded_seeds():
    """One run here is no comparison; what was compared elsewhere still decides."""
    spec = {
        "quantization": {"scheme": "nf4", "double_quantization": True}, "lora": {}, "data": {},
        "model": {"name": "tiny"}, "training": {"seed": 0},
    }  # fmt: skip
    norms = losses(5)
    steps = [{key: norms[key][place] for key in norms} for place in range(20)]
    run = {"name": "mine", "experiment": spec, "training": {"losses": steps}, "environment": {"device": CPU}}
    found = results("schemes", *curves("nf4", True, 0.1), *curves("nf4", False, 1), scheme("int4", 0, 0.1, device=CPU))
    found |= results("quantization", perplexity(0.9))
    records = Records(results=found, runs=[run], device=CPU)
    assert len(claims.curves(records)) == 7 and claim("8").rule(records).verdict == HOLDS


def test_a_score_beside_says_nothing_about_stability():
    rows = [scheme("nf4", s, 0.95 if double else 0.9, double) for s in range(5) for double in (True, False)]
    finding = claim("8").rule(Records(results=results("schemes", *rows)))
    assert finding.verdict == UNMEASURED and not finding.figures and finding.beside


def test_learning_rates_at_which_training_came_to_nothing_stand_beside():
    rows = [tried("qlora", 0.1, None), tried("qlora", 0.2, 0.01), tried("qlora", 0.3, 0.9), tried("lora", 0.1, 0.9)]
    found = results("tuning", *rows) | results("schemes", *curves("nf4", True, 1), *curves("none", False, 1))
    finding = claim("21").rule(Records(results=found))
    assert finding.verdict == UNDECIDED
    assert [figure.value for figure in finding.beside if "came to nothing" in figure.name] == [2, 0]


def test_curves_that_stand_beside_each_other_are_of_one_model():
    def made(model: str, method: str) -> dict[str, Any]:
        return {"model": model, "method": method}

    found = [made("small", "qlora"), made("large", "qlora"), made("large", "qlora"), made("small", "full")]
    assert claims.of_one_model(found) == [found[0], found[3]]
    assert claims.of_one_model([]) == []


# --- how things are written -------------------------------------------------------------------------------------


@pytest.mark.parametrize("unit", ["macro F1", "share", "seconds", "bytes", ""])
def test_nothing_is_shown_as_less_or_more_than_nothing(unit: str):
    for value in (-1e-9, -0.0, 0.0, 1e-9):
        text = str(claims.Figure("x", value, unit, GPU, "r", value, value))
        assert not re.search(r"[-+]0(\.0+)?\b(?!\.)(?!e)", text), text
    assert "-0.0001" in str(claims.Figure("x", -0.0001, "macro F1", GPU, "r"))
    assert "+0.0001" in str(claims.Figure("x", 0.0001, "macro F1", GPU, "r"))


def test_the_later_reports_figures_are_marked_as_its_own(computed: dict[str, Any]):
    verdicts = claims.check(Records(computed=computed))
    for word in ("0.9351", "1,568 s", "4 epochs", "4.62e-4", "389 warm-up", "0.0905"):
        says = {one.claim.says for one in verdicts if word in one.claim.text}
        assert says == {claims.REPORT}, word
    assert claim("11a").says == claims.EXPLANATION and claim("6b").says == claims.IMPLIED
    settings = {row["setting"]: row for row in claims.settings()}
    assert all(row["equal"] for row in settings.values()), settings
    reported = {name for name, row in settings.items() if row["says"] == claims.REPORT}
    data = computed["data"]
    words = " ".join(reason for _, reason in claims.MISSING)
    for number in (data["train"], data["rows"], data["rows"] - data["train"], round(0.8 * data["rows"])):
        assert f"{number:,}" in words, number
    assert {"training.learning_rate", "training.weight_decay", "training.warmup_steps", "training.epochs"} <= reported
    attributed = claims.attributed(verdicts)
    assert {"what": claim("11b").text, "where": "claim 11b"} in attributed
    epochs = {"what": "training.epochs: 4", "where": "preset dialogpt-medium_banking77_recipe"}
    assert epochs in attributed and len(attributed) == 1 + len(reported)
    where = {row["where"] for row in attributed}
    assert where == {"claim 11b", "preset dialogpt-medium_banking77_recipe"}
    assert "the run's later report" in claims.markdown(verdicts)
    assert "(the run's later report)" in claims.lines(verdicts, "accuracy")


def test_what_decided_is_what_the_table_names(reference: Records):
    for verdict, row in zip(
        claims.check(reference), claims.markdown(claims.check(reference)).splitlines()[2:], strict=True
    ):
        sources = {figure.source for figure in verdict.finding.figures}
        named = row.split(" | ")[4].removesuffix(" |")
        assert {part.partition(" (")[0] for part in named.split(", ") if part} <= sources | {
            "less the CUDA context"
        } | {source.partition(",")[0] for source in sources}
        assert bool(named.strip(" |")) == bool(sources)


def test_the_figures_are_whole_and_readable():
    rows = [
        {"label": "a model with a long name: QLoRA minus full fine-tuning, over test rows (H100)" * place, "value": v,
         "low": v - 0.01, "high": v + 0.02}
        for place, v in ((1, 0.0), (2, -0.04))
    ]  # fmt: skip
    shown = claims.curves(Records(results=results("schemes", *curves("nf4", True, 0.1), *curves("none", False, 1e-9))))
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
    rows = [
        *(trained("qlora", s, 0.9, curve=losses(0.1)) for s in range(3)),
        trained("full", 0, 0.9, curve=losses(0.1)),
    ]
    legend = plots.stability(claims.curves(Records(results=results("accuracy", *rows)))).legends[0]
    assert sorted(text.get_text() for text in legend.get_texts()) == ["QLoRA, 3 runs", "full fine-tuning, 1 run"]


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
    assert [row["#"] for row in rows] == NAMES
    assert all(row["because"] and (row["measured"] or row["verdict"] in (UNMEASURED, NO_MEASUREMENT)) for row in rows)
    with pytest.raises(qk.KitError, match="no folder 'nowhere'"):
        claims.read("nowhere", tmp_path, computed=False)


def test_the_docs_say_what_the_reference_records_say(reference: Records):
    table = claims.markdown(claims.check(reference))
    page = (ROOT / "docs" / "claims.md").read_text(encoding="utf-8")
    (said,) = re.findall(r"<!-- claims -->\n((?:\|.*\n)+)", page)
    assert said.strip() == table, "make figures"


def test_the_record_of_the_claims_is_what_its_schema_says(tmp_path, reference: Records):
    verdicts = claims.check(reference)
    record = notebook_record("05_claims", preset="p", **claims.to_record(verdicts))
    path = tmp_path / "05_claims.json"
    path.write_text(json.dumps(record))
    assert schemas.check([path]) == ([path], [])
    assert {True, False} == {figure["decided"] for figure in record["figures"]}
    record["claims"][3]["verdict"] = "true"
    path.write_text(json.dumps(record))
    assert "'true' is not one of" in schemas.check([path])[1][0]
    del record["claims"][3:]
    path.write_text(json.dumps(record))
    assert schemas.check([path])[1]


def test_what_needs_no_measurement_is_what_the_shape_and_the_data_say(computed: dict[str, Any]):
    """Counted by hand: DialoGPT-medium has 24 layers, 1,024 wide; the recipe has rank 16 on three matrices of each."""
    down, up = 16 * (1024 + 1024 + 4096), 16 * (3 * 1024 + 1024 + 1024)
    assert computed["trained"] == {"A": 24 * down, "B": 24 * up, "head": 77 * 1024, "other": 0}
    assert computed["head"] == 77 * 1024 and computed["data"] == {"rows": 10_003, "train": 9_002, "labels": 77}
    assert computed["recipe"] == {"batch_size": 8, "epochs": 4}
    r, alpha, times = (computed["factor"][key] for key in ("r", "alpha", "times"))
    assert times == pytest.approx(alpha / r, rel=1e-5)
    # GPT-2 has no token for padding; its last one ends a text.
    assert computed["padding"] == {"pad": None, "end": 50_256}
    assert computed["codes"] == {"levels": 16, "exact": True}
    kinds = computed["four_bit_types"]
    assert {"nf4", "fp4"} <= set(kinds["bitsandbytes"]) <= set(kinds["kit"]) and "int4" in kinds["kit"]
    assert "int4" not in kinds["bitsandbytes"]
    ways = computed["ways"]
    assert list(ways) == ["qlora", "lora", "full"]
    for way in ways.values():
        assert (way["batch"], way["length"], way["device"], way["precision"]) == (8, 128, "T4", "fp16")
        assert way["device_bytes"] == memory_of_a_t4() and way["total"] == sum(way["parts"].values()) <= way["reserved"]
    adapters = sum(computed["trained"].values())
    assert ways["qlora"]["trainable"] == ways["lora"]["trainable"] == adapters
    # DialoGPT-medium's own, and the head.
    assert ways["full"]["trainable"] == ways["full"]["all"] == 354_823_168 + 77 * 1024 == ways["lora"]["all"] - adapters
    linear = [way["parts"]["base, linear layers"] for way in ways.values()]
    assert linear[0] < 0.3 * linear[1] < 0.3 * linear[2]  # 4.127 of 16 bits, and of 32


def memory_of_a_t4() -> int:
    from qlora_kit import memory

    return memory.DEVICES["T4"].bytes


@pytest.mark.parametrize(("r", "alpha"), [(4, 2), (8, 8), (2, 32)])
def test_the_factor_of_adapters_is_found_by_running_them(r: int, alpha: float):
    import torch

    state = torch.random.get_rng_state()
    assert arithmetic._factor(r, alpha) == pytest.approx(alpha / r, rel=1e-5)
    assert torch.equal(torch.random.get_rng_state(), state)  # nobody else's seed is touched


def found_by_hand(verdict: str = HOLDS, **more: Any) -> claims.Verdict:
    about = claims.Claim(3, "memory", "It is small.", "Because.", lambda records: None, part="b", says=claims.REPORT)
    figures = (
        claims.Figure("peak", 3 * 2**30, "bytes", GPU, "results/memory.json", 2.5 * 2**30, 3.5 * 2**30),
        claims.Figure("share", 0.25, "share", CPU, "results/memory.json"),
        claims.Figure("sum", 7, "layers", "arithmetic", "the shape"),
        claims.Figure("last", 0.5, "seconds", GPU, "results/speed.json"),
    )
    aside = (claims.Figure("aside", 0.001, "macro F1", GPU, "results/accuracy.json"),)
    return claims.Verdict(about, claims.Finding(verdict, "A reason.", figures, aside, **more))


def test_a_verdict_is_a_row_of_each_table():
    verdict = found_by_hand(command="make results-gpu")
    assert verdict.devices == (GPU, CPU, "arithmetic")
    (row,) = claims.table([verdict])
    assert row == {
        "#": "3b", "claim": "It is small.", "says": claims.REPORT, "verdict": HOLDS, "because": "A reason.",
        "measured": "peak: 3.00 GiB (2.50 GiB to 3.50 GiB); share: 25.0%; sum: 7 layers",
        "device": f"{GPU}, {CPU}, arithmetic",
    }  # fmt: skip
    (short,) = claims.table([verdict], most=1)
    assert (short["measured"], short["device"]) == ("peak: 3.00 GiB (2.50 GiB to 3.50 GiB)", GPU)
    last = claims.markdown([verdict]).splitlines()[-1]
    decided = "results/memory.json (H100), results/memory.json (CPU), the shape, results/speed.json (H100)"
    assert last == f"| 3b | It is small. | {claims.REPORT} | {HOLDS} | {decided} |"
    assert claims.lines([verdict], "memory", "size") == (
        f"3b.  It is small. ({claims.REPORT})\n     {HOLDS.upper()}: A reason."
    )
    assert claims.lines([verdict, verdict], "memory").split("\n\n") == [claims.lines([verdict], "memory")] * 2
    assert claims.lines([verdict], "size") == ""
    wide = dataclasses.replace(verdict, finding=dataclasses.replace(verdict.finding, reason="word " * 60))
    wrapped = claims.lines([wide], "memory").splitlines()
    assert all(len(line) <= 100 for line in wrapped) and all(line.startswith("     ") for line in wrapped[1:])


def test_a_verdict_in_a_record_has_all_that_decided_and_all_that_did_not():
    record = claims.to_record([found_by_hand(), found_by_hand(FAILS, command="make results-gpu")])
    assert [one["command"] for one in record["claims"]] == [None, "make results-gpu"]
    assert record["claims"][0] == {
        "number": 3, "part": "b", "claim": "It is small.", "says": claims.REPORT, "verdict": HOLDS,
        "reason": "A reason.", "devices": [GPU, CPU, "arithmetic"], "command": None,
    }  # fmt: skip
    assert [(one["name"], one["decided"]) for one in record["figures"]] == [
        ("peak", True), ("share", True), ("sum", True), ("last", True), ("aside", False),
    ] * 2  # fmt: skip
    assert record["figures"][0] == {
        "claim": 3, "part": "b", "decided": True, "name": "peak", "value": 3 * 2**30, "unit": "bytes", "device": GPU,
        "source": "results/memory.json", "low": 2.5 * 2**30, "high": 3.5 * 2**30,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (2**31, "bytes", "2.00 GiB"),
        (2**31 - 2**20, "bytes", "2,047.0 MiB"),
        (-(2**31), "bytes", "-2.00 GiB"),
        (0.0499, "share", "4.99%"),
        (0.05, "share", "5.0%"),
        (-0.2, "share", "-20.0%"),
        (0.9994, "seconds", "999.4 ms"),
        (1.0, "seconds", "1.0 s"),
        (1234.56, "seconds", "1,234.6 s"),
        (0.01, "macro F1", "+0.0100"),
        (-0.00004, "macro F1", "0.0000"),
        (1000.4, "layers", "1,000"),
        (999.6, "", "999.6"),
        (12.0, "", "12"),
        (0.123456, "", "0.1235"),
    ],
)
def test_numbers_in_their_units(value: float, unit: str, text: str):
    assert claims.judging.number(value, unit) == text


def test_ranges_of_numbers_and_of_ratios():
    assert claims.judging.span([0.3, 0.1, 0.2]) == "10.0% to 30.0%"
    assert claims.judging.span([0.10001, 0.1]) == "10.0%"
    assert claims.judging.span([1.0, 2.0], "seconds") == "1.0 s to 2.0 s"
    found = claims.judging.ratio((2.0, 1.5, 3.0), (4.0, 3.5, 5.0))
    assert found == {"value": 0.5, "low": 1.5 / 5, "high": 3 / 3.5}
    assert [claims.judging.side(*ends) for ends in ((0.1, 1), (0.0, 1), (-1, 0.0), (-1, -0.1))] == [1, 0, 0, -1]
    assert [claims.judging.side(*ends, 0.5) for ends in ((0.6, 1), (0.5, 1), (0, 0.5), (0, 0.4))] == [1, 0, 0, -1]


def test_the_plans_of_the_explained_step_and_of_this_machine_go_first():
    """Rows of one record and device, with more than one method; the explained step's before all others."""

    def drawn(*rows: dict[str, Any], **more: Any) -> list[tuple[str, float, str]]:
        found = claims.plans(Records(results=results("memory", *rows), **more))
        return [(row["label"], row["measured"], row["device"]) for row in found]

    explained = [memory("lora", 20), memory("qlora", 10)]
    at_16 = [{**row, "batch": 16, "device": CPU} for row in explained]
    assert drawn(*at_16, *explained) == [("QLoRA, 8 x 128", 10, GPU), ("LoRA, 8 x 128", 20, GPU)]
    assert drawn(*at_16) == [("QLoRA, 16 x 128", 10, CPU), ("LoRA, 16 x 128", 20, CPU)]
    # Of several others: this machine's, then those with checkpointing, then those with most methods.
    there = [{**row, "device": GPU, "peak_bytes": 7} for row in at_16]
    assert [device for _, _, device in drawn(*there, *at_16, device=CPU)] == [CPU] * 2
    assert [device for _, _, device in drawn(*at_16, *there, device=GPU)] == [GPU] * 2
    without = [{**row, "checkpointing": False, "peak_bytes": 99} for row in at_16]
    assert [peak for _, peak, _ in drawn(*without, *at_16)] == [10, 20]
    full = [*without, {**memory("full", 30), "batch": 16, "device": CPU, "checkpointing": False}]
    other = [{**row, "length": 64, "peak_bytes": 5} for row in without]
    assert [peak for _, peak, _ in drawn(*other, *full)] == [99, 99, 30]
    # A method alone is compared with nothing; other schemes, and scales in 32 bits, are other methods.
    assert drawn(explained[0]) == drawn(explained[0], memory("qlora", 9, scheme="int8")) == []
    assert drawn(explained[0], memory("qlora", 9, double_quantization=False)) == []
    assert drawn(explained[0], {**explained[1], "device": CPU}) == []


def test_the_plans_that_are_drawn_are_of_the_explained_step(reference: Records):
    shown = list(claims.plans(reference))
    assert [row["label"] for row in shown] == [
        "QLoRA, 8 x 128", "LoRA, 8 x 128", "full fine-tuning, 8 x 128"
    ]  # fmt: skip
    assert shown[0]["measured"] < shown[1]["measured"] and {row["device"] for row in shown} == {GPU}
    assert list(claims.plans(shuffled(reference, 5))) == shown
    assert {row["device"] for row in claims.plans(Records(computed=reference.computed))} == {"planned for a T4"}


def test_a_notebooks_record_and_a_run_are_read(tmp_path, tiny_experiment):
    experiment = tiny_experiment(training__max_steps=6, data__limit=154)
    run = qk.finetune(experiment, out=tmp_path / "runs", progress=False)
    metrics = {"quantization": {"normal_snr_db": {"nf4": 20, "int4": 21}}}
    book = notebook_record("01_quantization", preset="p", metrics=metrics)
    write_json(tmp_path / "01_quantization.json", book)
    records = claims.read(tmp_path, tmp_path, computed=False)
    assert claim("6a").rule(records).verdict == FAILS
    (curve,) = claims.curves(records)
    assert curve["label"] == run.path.name and curve["method"] == "qlora"
    assert len(curve["step"]) == len(curve["loss"]) == len(curve["grad_norm"]) == 3
    assert claims.roughness(curve) is not None


def test_no_verdict_stands_in_the_notebook():
    book = nbformat.read(ROOT / "notebooks" / "05_claims.ipynb", as_version=4)
    code = "\n".join(cell.source for cell in book.cells if cell.cell_type == "code")
    prose = "\n".join(cell.source for cell in book.cells if cell.cell_type == "markdown")
    for word in VERDICTS:
        assert not re.search(rf"[\"']{word}[\"']", code)
    assert "claims.check(" in code
    # Prose names no figure that a record could contradict: no share, score or factor.
    prose = prose.replace("95% intervals", "")
    assert not re.findall(r"\b0\.9\d+\b|\d+(?:\.\d+)? ?%|\b\d+(?:\.\d+)? times\b", prose)
