"""Rules about the cost of training: parameters and memory.

Every rule's docstring says which evidence it prefers and why. A claim about the explained recipe is decided by the
recipe's own model and training step, if they were measured. Figures of other models are shown, but decide nothing.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping
from typing import Any

from .judging import ARITHMETIC, FAILS, HOLDS, Figure, Finding, judge, number, span, unmeasured
from .limits import EXPLAINED, EXPLAINED_STEP, HALF, METHODS, RELEVANT, SIGNIFICANT
from .records import BYTES, MEMORY_ALIKE, Pair, Records, grouped, memory_rows, of_methods, only, pairs, short_model

TRAINABLE, ALL, SHARE = 4_404_224, 359_306_240, 1.2258
NF4_BITS, NF4_BITS_OFF = 4.127, 0.05
_PLAN = "python -m qlora_kit plan dialogpt-medium_banking77_recipe --device T4"
_SHAPE = "the model's shape"
_GRID = "python benchmarks/memory.py --groups grid"
_BASE = ("base, linear layers", "base, embeddings", "base, other matrices", "base, norms and biases", "head as it was")
_T4 = 15 * 2**30  # the memory limit that benchmarks/memory.py sets in the group `t4`


# --- parameters -------------------------------------------------------------------------------------------------


def counts(records: Records) -> Finding:
    """Judge claim 1: compare its three numbers with the model. It holds if all agree, in part if some do.

    Evidence: the model itself, built from its shape without weights. No measurement could say more.
    """
    way = records.computed.get("ways", {}).get("qlora")
    if not way:
        return unmeasured("the model's shape was not built", _PLAN)
    trainable, everything, head = way["trainable"], way["all"], records.computed["head"]
    share = 100 * trainable / everything
    parts = {"base": everything - trainable - head, "adapters": trainable - head, "head": head, "head as it was": head}
    shown = (("trainable", trainable), ("all", everything), *parts.items())
    figures = [Figure(name, value, "", ARITHMETIC, _SHAPE) for name, value in shown]
    figures.insert(2, Figure("trainable of all", share / 100, "share", ARITHMETIC, _SHAPE))
    agree = [trainable == TRAINABLE, everything == ALL, round(share, 4) == SHARE]
    reason = f"{trainable:,} of {everything:,}, {share:.4f}%: " + " + ".join(f"{v:,} ({k})" for k, v in parts.items())
    return Finding(judge(agree), reason, tuple(figures))


def updated(records: Records) -> Finding:
    """Judge claim 16 in two parts: A and B are trained, and nothing else is.

    Evidence: the parameters with `requires_grad` in the recipe's model, built as for training, but without weights.
    """
    trained = records.computed.get("trained")
    if not trained:
        return unmeasured("the model's shape was not built", "make run-notebooks NOTEBOOKS=05")
    figures = tuple(
        Figure(f"trained parameters, {name}", value, "", ARITHMETIC, _SHAPE) for name, value in trained.items()
    )
    both = trained["A"] > 0 and trained["B"] > 0
    others = {name: value for name, value in trained.items() if name not in ("A", "B") and value}
    reason = f"trained are {trained['A']:,} numbers of A and {trained['B']:,} of B"
    if others:
        reason += ", and so is " + ", ".join(
            f"the classifier's head ({value:,})" if name == "head" else f"something else ({value:,})"
            for name, value in others.items()
        )
    else:
        reason += ", and nothing else"
    return Finding(judge([both, not others]), reason, figures)


# --- memory -----------------------------------------------------------------------------------------------------


def weights(records: Records) -> Finding:
    """Judge claim 2: bits a weight in DialoGPT-medium's linear layers, and bytes of its whole base.

    Evidence: DialoGPT-medium's own rows of results/memory.json, where QLoRA and LoRA differ only in storage, at the
    explained step if it was measured. Other models have another share of embeddings, which are not quantized: the
    figures of MiniLM from notebook 01 and results/schemes.json are shown, but decide nothing.

    The first part is true if the linear layers take fewer bits than before and come within `NF4_BITS_OFF` of the
    paper's 4.127 bits (QLoRA, section 3); the second if the whole base falls to `HALF` or less.
    """
    rows = [
        row for row in only(memory_rows(records), model=EXPLAINED)
        if row.get("parts", {}).get("base, linear layers", 0) > 0 and row["precision"] in BYTES
    ]  # fmt: skip
    found = of_methods(rows)
    decisive = records.preferred(_at_step(found) or found, _device)
    beside = _other_weights(records)
    if not decisive:
        return unmeasured("no record has DialoGPT-medium's weights in NF4 and in 16 bits", _GRID, beside)
    figures, parts, words = [], [], []
    for first, second in decisive:
        numbers = second["parts"]["base, linear layers"] / BYTES[second["precision"]]
        before, after = (8 * row["parts"]["base, linear layers"] / numbers for row in (second, first))
        whole = [sum(row["parts"].get(part, 0) for part in _BASE) for row in (first, second)]
        share = whole[0] / whole[1]
        for name, value, unit in (
            ("linear layers in NF4", after, "bits a weight"),
            ("whole base in NF4, of before", share, "share"),
            ("linear layers before", before, "bits a weight"),
        ):
            figures.append(Figure(f"{EXPLAINED}, {name}", value, unit, first["device"], first["source"]))
        parts += [after < before and abs(after - NF4_BITS) < NF4_BITS_OFF, share <= HALF]
        words.append(
            f"DialoGPT-medium's linear layers go from {before:.4g} to {after:.4g} bits a weight (the paper: "
            f"{NF4_BITS}), its whole base to {share:.0%} ({span(whole[:1], 'bytes')} of {span(whole[1:], 'bytes')})"
        )
    reason = "; ".join(dict.fromkeys(words)) + ". Embeddings and norms are not quantized"
    recipe = [row for row in only(rows, method="recipe", **EXPLAINED_STEP) if row.get("prepare_for_kbit_training")]
    whole_of_recipe = {sum(row["parts"].get(part, 0) for part in _BASE) for row in recipe}
    if whole_of_recipe:
        size = span(whole_of_recipe, "bytes")
        reason += f"; the recipe's prepare_model_for_kbit_training makes them fp32, and its base {size}"
    return Finding(judge(parts), reason, tuple(figures), tuple(beside))


def _other_weights(records: Records) -> list[Figure]:
    """Return the figures of other models' weights: from notebook 01, and MiniLM's in results/schemes.json."""
    found = []
    record, device = records.notebook("01_quantization")
    bits = record.get("metrics", {}).get("quantization", {}).get("bits_per_parameter", {})
    if {"none", "nf4"} <= set(bits):
        share = bits["nf4"]["bytes"] / bits["none"]["bytes"]
        found.append(Figure("notebook 01's model in NF4, of before", share, "share", device, "01_quantization.json"))
    for (device, model), group in grouped(records.rows("schemes"), "model").items():
        sides = [only(group, scheme="none"), only(group, scheme="nf4", double_quantization=True)]
        sizes = [[row["whole_model_bytes"] for row in side if row.get("whole_model_bytes")] for side in sides]
        if all(sizes):
            share = statistics.median(sizes[1]) / statistics.median(sizes[0])
            name = f"{short_model(str(model))} in NF4, of before"
            found.append(Figure(name, share, "share", device, "results/schemes.json"))
    return found


def _at_step(found: Iterable[Pair]) -> list[Pair]:
    """Return the pairs at the explained recipe's own step: its batch, length, checkpointing and optimizer.

    In fp16 if that was measured, else in bf16: both have two bytes a number.
    """
    wanted = {**EXPLAINED_STEP, "optimizer": "paged_adamw_8bit"}
    here = [pair for pair in found if _as_explained(pair[0]) and _has(pair[0], wanted)]
    for precision in ("fp16", "bf16"):
        chosen = [pair for pair in here if pair[0].get("precision") == precision]
        if chosen:
            return chosen
    return []


def _as_explained(row: Mapping[str, Any]) -> bool:
    """Return whether a step is run as the explanation runs it: without the kit's own savings."""
    return not (
        row.get("graphs") or row.get("lean") or row.get("cublas_workspace") or row.get("limit_bytes")
    ) and row.get("embeddings") in (None, "none")


def _has(row: Mapping[str, Any], wanted: Mapping[str, Any]) -> bool:
    return all(row.get(key) == value for key, value in wanted.items())


def _device(pair: Pair) -> str:
    return str(pair[0]["device"])


def _saved(pair: Pair) -> float:
    return float(1 - pair[0]["peak_bytes"] / pair[1]["peak_bytes"])


def footprint(records: Records) -> Finding:
    """Judge claim 3's saving: how far QLoRA's measured peak is below LoRA's.

    Evidence: the explanation's own setting, DialoGPT-medium at batch 8 of 128 tokens with checkpointing and
    paged_adamw_8bit, where QLoRA and LoRA differ only in how the base is stored. The claim is about that run, so one
    other shape of seventeen cannot refute it; the other savings are shown too. It holds for a saving of `SIGNIFICANT`
    or more.
    """
    everything = of_methods(memory_rows(records))
    here = _at_step(everything)
    decisive = records.preferred(here, _device)
    others = [pair for pair in everything if pair not in here]
    beside = [_saving(pair) for pair in everything if pair not in decisive]
    if not decisive:
        missing = "no record has QLoRA and LoRA at the explained step (DialoGPT-medium, 8 x 128, checkpointing)"
        return unmeasured(missing, _GRID, beside)
    saved = [_saved(pair) for pair in decisive]
    first, second = decisive[0]
    reason = (
        f"in the explanation's own setting (DialoGPT-medium, 8 x 128, checkpointing, paged_adamw_8bit) QLoRA's peak is "
        f"{span(saved)} below LoRA's: {number(first['peak_bytes'], 'bytes')} against "
        f"{number(second['peak_bytes'], 'bytes')}, alike in all but storage"
    )
    if first.get("precision") == "bf16":
        reason += "; measured in bf16, which has as many bytes as the recipe's fp16"
    if others:
        reason += (
            f". Over the {len(others)} other shapes and models it is {span([_saved(pair) for pair in others])}: "
            "activations are the same in both"
        )
    return Finding(judge([min(saved) >= SIGNIFICANT]), reason, tuple(map(_saving, decisive)), tuple(beside))


def _saving(pair: Pair) -> Figure:
    row = pair[0]
    mode = ", checkpointing" if row.get("checkpointing") else ""
    name = f"{row['model']}, batch {row['batch']} x {row['length']}{mode}: less than LoRA by"
    return Figure(name, _saved(pair), "share", row["device"], row["source"])


def cause(records: Records) -> Finding:
    """Judge claim 3's cause: whether the trainable share can be the cause of the saving.

    Evidence: QLoRA's and LoRA's trainable share, counted in the same model. If it is equal in both, it cannot be the
    cause of a difference. If the explained step was measured, the saving in the frozen linear layers is shown too.
    """
    ways = records.computed.get("ways", {})
    if not {"qlora", "lora"} <= set(ways):
        return unmeasured("the trainable parameters were not counted", _PLAN)
    shares = {name: ways[name]["trainable"] / ways[name]["all"] for name in ("qlora", "lora")}
    figures = [
        Figure(f"trainable, {METHODS[name]}", share, "share", ARITHMETIC, _SHAPE) for name, share in shares.items()
    ]
    same, beside = shares["qlora"] == shares["lora"], []
    reason = f"the trainable share is {shares['qlora']:.4%} with QLoRA and {shares['lora']:.4%} with LoRA: " + (
        "the same in both, so it is not what saves" if same else "another in each"
    )
    for first, second in records.preferred(_at_step(of_methods(memory_rows(records))), _device):
        parts = [row.get("parts", {}).get("base, linear layers") for row in (first, second)]
        if None not in parts:
            for name, less in (
                ("less in the base's linear layers", parts[1] - parts[0]),
                ("less at the peak", second["peak_bytes"] - first["peak_bytes"]),
            ):
                beside.append(Figure(name, less, "bytes", first["device"], first["source"]))
            reason += (
                f"; the frozen linear layers take {number(parts[1] - parts[0], 'bytes')} less, the peak "
                f"{number(second['peak_bytes'] - first['peak_bytes'], 'bytes')}"
            )
    return Finding(FAILS if same else HOLDS, reason, tuple(figures), tuple(beside))


def fits_t4(records: Records) -> Finding:
    """Judge claim 5: whether LoRA's memory is more than a T4 has, at DialoGPT-medium's size and the recipe's step.

    Evidence: measured bytes if there are any, else the plan's. They may come from any GPU: only cuBLAS's workspace
    depends on it. All methods have one precision: a T4's fp16 if LoRA was measured in it, else bf16, which has as many
    bytes. The allocator's reserved bytes count if they are known, because they have to fit. The claim holds if LoRA
    does not fit. The size from which LoRA does not fit is shown too: as planned by notebook 04, and as tried with 7 B.
    """
    ways = records.computed.get("ways", {})
    if "lora" not in ways:
        return unmeasured("nothing was planned for a T4", _PLAN)
    has = ways["lora"]["device_bytes"]
    at_step = [row for row in only(memory_rows(records), **EXPLAINED_STEP) if _as_explained(row)]
    measured = {row["precision"] for row in only(at_step, method="lora", scheme="none") if row.get("precision")}
    precision = next((name for name in ("fp16", "bf16") if name in measured), "")
    figures, beside, need = [], [], {}
    for method in ("lora", "qlora", "full"):
        alike: dict[str, Any] = {"method": method, "scheme": "nf4" if method == "qlora" else "none"}
        if method == "qlora":
            alike["double_quantization"] = True
        rows = records.preferred(only(at_step, precision=precision, **alike) if precision else [])
        if rows:
            row = max(rows, key=_reserved)
            need[method], device, source = _reserved(row), row["device"], row["source"]
        else:
            need[method], device, source = ways[method]["reserved"], "planned for a T4", "the memory plan"
        figures.append(Figure(METHODS[method], need[method], "bytes", device, source))
    figures.append(Figure("a T4 has, less its CUDA context", has, "bytes", "T4", "the GPU's specification"))
    reason = f"LoRA takes {number(need['lora'], 'bytes')} of a T4's {number(has, 'bytes')} at this model's size" + (
        f", QLoRA {number(need['qlora'], 'bytes')}; both in {precision}" if precision else "; planned, not measured"
    )
    crossing = records.notebooks.get("04_memory", {}).get("crossing", {})
    if crossing.get("device") == "T4":
        for limit in sorted(crossing["limits"], key=lambda limit: str(limit["method"])):
            if limit["parameters"]:
                name = f"{METHODS[limit['method']]} stops fitting at, parameters"
                beside.append(Figure(name, limit["parameters"], "", "planned for a T4", "04_memory.json"))
                if limit["method"] == "lora":
                    reason += f"; it stops fitting at {limit['parameters'] / 1e9:.1f} billion parameters"
    tried = [row for row in records.rows("memory") if row.get("limit_bytes") == _T4 and row["method"] == "lora"]
    failed = [row for row in tried if row.get("fits") is False]
    if failed:
        reason += f"; in 15 GiB, {len(failed)} of {len(tried)} LoRA runs of {_names(tried)} did not fit"
    return Finding(judge([need["lora"] > has]), reason, tuple(figures), tuple(beside))


def _reserved(row: Mapping[str, Any]) -> float:
    return float(max(row["peak_bytes"], row.get("reserved_bytes") or 0))


def _names(rows: Iterable[Mapping[str, Any]]) -> str:
    return ", ".join(sorted({str(row["model"]) for row in rows}))


def paged(records: Records) -> Finding:
    """Judge claim 9: whether a large model that does not fit into memory trains with a paged optimizer.

    Evidence: real steps of 7 B in the 15 GiB that a T4 leaves (results/memory.json, group `t4`), the same training with
    a paged optimizer and with one that is not. Pages are of use only there: a training that fits without pages says
    nothing for or against them. The claim holds if every training that does not fit without pages fits with them. The
    explained recipe's bytes in pages are shown too.
    """
    # An 8-bit optimizer has a quarter of the state, so it is not compared with a 32-bit one.
    limited = [
        {**row, "state": "8bit" if "8bit" in row["optimizer"] else "32bit"}
        for row in records.rows("memory")
        if row.get("limit_bytes") and "fits" in row
    ]
    alike = ("model", "method", "scheme", "double_quantization", "precision", "checkpointing", "batch", "length",
             "lora_r", "limit_bytes", "embeddings", "lean", "state")  # fmt: skip
    decided: list[tuple[bool, Mapping[str, Any], Mapping[str, Any]]] = []
    for cells in grouped(limited, *alike).values():
        sides = {kind: [row for row in cells if _is_paged(row) == kind] for kind in (True, False)}
        if sides[True] and sides[False] and not any(row["fits"] for row in sides[False]):
            decided.append((all(row["fits"] for row in sides[True]), sides[True][0], sides[False][0]))
    decided = records.preferred(decided, lambda item: item[1]["device"])
    figures = []
    for better, first, _ in decided:
        name = f"{first['model']}, {first['method']}, rank {first.get('lora_r')}, in {_limit(first)}"
        found = f"{name}: trainings that fit only with pages"
        figures.append(Figure(found, int(better), "", first["device"], "results/memory.json"))
        for what, key in (("at the peak", "peak_bytes"), ("in pages", "paged_bytes")):
            if first.get(key):
                figures.append(Figure(f"{name}: {what}", first[key], "bytes", first["device"], "results/memory.json"))
    ways = records.computed.get("ways", {})
    beside = [
        Figure(f"{EXPLAINED}, {METHODS[method]} ({way['optimizer']}): in pages", way["paged"], "bytes",
               f"planned for a {way['device']}", "the memory plan")
        for method, way in sorted(ways.items()) if method in ("full", "qlora")
    ]  # fmt: skip
    if not decided:
        missing = "no record has a large model that does not fit without pages, tried with them"
        return unmeasured(missing, "python benchmarks/memory.py --groups t4", beside)
    words = [
        f"{_method(first)} of {first['model']}, rank {first.get('lora_r')}, in {_limit(first)}: without pages "
        f"({second['optimizer']}) it does not fit, with them ({first['optimizer']}) "
        + ("it trains" if better else "it does not either")
        for better, first, second in decided
    ]
    reason = "; ".join(words)
    room = [row for row in only(limited, method="qlora", fits=True) if row.get("peak_bytes") and _is_paged(row)]
    spare = [row for row in room if row["peak_bytes"] + (row.get("paged_bytes") or 0) < row["limit_bytes"]]
    if spare:
        reason += (
            f". QLoRA of {_names(spare)} needs no pages there: its peak and its state together are below the limit"
        )
    if ways.get("qlora"):
        reason += f". The explained recipe has {number(ways['qlora']['paged'], 'bytes')} in pages"
    return Finding(judge([better for better, _, _ in decided]), reason, tuple(figures), tuple(beside))


def _is_paged(row: Mapping[str, Any]) -> bool:
    return str(row["optimizer"]).startswith("paged_")


def _limit(row: Mapping[str, Any]) -> str:
    return f"{row['limit_bytes'] / 2**30:g} GiB"


def _method(row: Mapping[str, Any]) -> str:
    return METHODS.get(row["method"], str(row["method"]))


def checkpointing(records: Records) -> Finding:
    """Judge claim 10: compare the measured peaks with and without checkpointing, all else equal.

    Evidence: DialoGPT-medium in QLoRA as the explanation trains it (NF4, double quantization, batch 8 of 128 tokens).
    The claim is about that run; LoRA, full fine-tuning and other models are shown, but decide nothing. It holds for a
    saving of `RELEVANT` or more.
    """
    alike = (*MEMORY_ALIKE, "method", "scheme", "double_quantization")
    everything = pairs(memory_rows(records), {"checkpointing": True}, {"checkpointing": False}, *alike)
    wanted = {"model": EXPLAINED, "batch": 8, "length": 128, "method": "qlora", "scheme": "nf4",
              "double_quantization": True}  # fmt: skip
    here = [pair for pair in everything if _as_explained(pair[0]) and _has(pair[0], wanted)]
    decisive = records.preferred(here, _device)
    figures: list[Figure] = []
    beside: list[Figure] = []
    for pair in (*decisive, *(pair for pair in everything if pair not in decisive)):
        first, second = pair
        told = figures if pair in decisive else beside
        name = f"{first['model']}, {first['method']} {first['scheme']}, {first['batch']} x {first['length']}"
        name += ", scales in fp32" if first["scheme"] == "nf4" and first["double_quantization"] is False else ""
        told.append(Figure(f"{name}: less by", _saved(pair), "share", first["device"], first["source"]))
        if first.get("step_seconds") and second.get("step_seconds"):
            longer = first["step_seconds"] / second["step_seconds"]
            beside.append(Figure(f"{name}: a step takes, times", longer, "", first["device"], first["source"]))
    if not decisive:
        missing = "no record has QLoRA of DialoGPT-medium at 8 x 128 with and without checkpointing"
        return unmeasured(missing, _GRID, beside)
    saved = [_saved(pair) for pair in decisive]
    first, second = decisive[0]
    reason = (
        f"QLoRA of DialoGPT-medium, 8 x 128: the peak is {span(saved)} lower, {number(first['peak_bytes'], 'bytes')} "
        f"against {number(second['peak_bytes'], 'bytes')}"
    )
    nothing = [pair for pair in everything if pair not in decisive and _saved(pair) < RELEVANT]
    if nothing:
        named = sorted({f"{_method(first)} of {first['model']}" for first, _ in nothing})
        reason += f". Nothing is saved in {', '.join(named)}, where activations are not what the peak is made of"
    return Finding(judge([min(saved) >= RELEVANT]), reason, tuple(figures), tuple(beside))
