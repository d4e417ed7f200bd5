"""Rules about the quality of results: quantization errors, stability, scores, and claims that are metaphors.

Every rule's docstring says which evidence it prefers and why.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from .curves import curves, diverged, roughness, spikes
from .judging import (
    ARITHMETIC,
    FAILS,
    HOLDS,
    NO_MEASUREMENT,
    UNDECIDED,
    Figure,
    Finding,
    by_seed,
    judge,
    judge_sides,
    number,
    seed_interval,
    side,
    unmeasured,
)
from .limits import COLLAPSED, EXPLAINED, FEWEST_SEEDS, METHODS
from .records import BYTES, Records, grouped, memory_rows, of_methods, only, short_model

_SCHEMES = "python benchmarks/schemes.py --seeds 0 1 2 --device cuda --jobs 9 --append"
_QUANTIZATION = "results/quantization.json"


# --- which four bits --------------------------------------------------------------------------------------------


def schemes(records: Records) -> Finding:
    """Judge claim 6 literally: compare the errors of NF4 and int4 on normally distributed numbers.

    Evidence: results/quantization.json at blocks of 64 with double quantization, with intervals over draws; if it is
    missing, notebook 01's figures of this machine, which have no intervals. Real weights and tasks are another question
    (6b): the sentence does not speak of them.
    """
    figures: list[Figure] = []
    sides = []
    rows = only(records.rows("quantization"), subject="normal", block_size=64, double_quantization=True)
    for (device,), group in grouped(rows).items():
        found = {scheme: [row["snr_db"] for row in only(group, scheme=scheme)] for scheme in ("nf4", "int4")}
        if all(found.values()):
            ends = {name: _hull(intervals) for name, intervals in found.items()}
            figures += [
                Figure(f"normal weights, {name}", unit="dB", device=device, source=_QUANTIZATION, **interval)
                for name, interval in ends.items()
            ]
            apart = ends["nf4"]["low"] - ends["int4"]["high"], ends["nf4"]["high"] - ends["int4"]["low"]
            sides.append((device, side(*apart)))
    record, device = records.notebook("01_quantization")
    here = record.get("metrics", {}).get("quantization", {}).get("normal_snr_db", {})
    if not sides and {"nf4", "int4"} <= set(here):
        figures += [
            Figure(f"normal weights, {scheme}", here[scheme], "dB", device, "01_quantization.json")
            for scheme in ("nf4", "int4")
        ]
        sides = [(device, 1 if here["nf4"] > here["int4"] else -1)]
    if not sides:
        return unmeasured("no record compares NF4 with int4 on normal weights", "python benchmarks/quantization.py")
    decisive = records.preferred(sides, lambda item: item[0])
    figures = [figure for figure in figures if figure.device in {device for device, _ in decisive}]
    reason = "signal over error on normal weights, more is better: " + ", ".join(
        f"{figure.name.rpartition(', ')[2]} {number(figure.value, '')} dB" for figure in figures
    )
    return Finding(judge_sides(one for _, one in decisive), reason, tuple(figures))


def _hull(intervals: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Return one interval for several measurements: the median value, the outermost ends."""
    return {
        "value": statistics.median(one["value"] for one in intervals),
        "low": min(one["low"] for one in intervals),
        "high": max(one["high"] for one in intervals),
    }


def schemes_in_use(records: Records) -> Finding:
    """Judge claim 6's other half: whether NF4 is better than int4 in use, in a model and a task.

    Evidence: the perplexity of a language model quantized with each scheme, divided by int4's (for each model, text and
    state of the weights; better if the interval is below 1), and macro F1 after fine-tuning on each (better if
    Student's interval over paired seeds is above 0). The claim holds if NF4 is ahead in all, in part if in some. If it
    is ahead in none, it fails if int4 is ahead in one, else it is undecided. The reason says how large a difference so
    few seeds can show.
    """
    figures: list[Figure] = []
    words: list[str] = []
    sides: list[int] = []
    texts = only(records.rows("quantization"), subject="perplexity", scheme="nf4", double_quantization=False)
    texts = records.preferred(texts)
    ratios = []
    for (device, _, weights, text), cells in grouped(texts, "model", "weights", "text").items():
        of_int4 = _hull([row["ratio_to_int4"] for row in cells])
        ratios.append(-side(of_int4["low"], of_int4["high"], 1.0))
        name = f"weights {weights}, {text}: times int4's"
        figures.append(Figure(name, unit="", device=device, source=_QUANTIZATION, **of_int4))
    if ratios:
        words.append(f"by perplexity NF4 is ahead in {ratios.count(1)} of {len(ratios)} comparisons")
        sides += ratios
    for device, model, pairs in _paired_schemes(records, [("nf4", True), ("int4", True)]):
        interval = seed_interval(pairs)
        assert interval is not None
        name = f"{short_model(model)}, nf4 over int4, fine-tuned, {len(pairs)} seeds"
        source = "results/schemes.json"
        figures.append(Figure(name, unit="macro F1", device=device, source=source, **interval))
        sides.append(side(interval["low"], interval["high"]))
        words.append(
            f"fine-tuned ({short_model(model)}) int4 was ahead of NF4 in {sum(one < 0 for one in pairs)} of "
            f"{len(pairs)} seeds (NF4 minus int4: {number(interval['value'], 'macro F1')} macro F1 on average)"
        )
        if sides[-1] == 0:
            reach = (interval["high"] - interval["low"]) / 2
            words[-1] += f", but {len(pairs)} seeds that spread so tell apart {reach:.4f} or more, and no less"
    if not sides:
        command = "python benchmarks/quantization.py"
        return unmeasured("no record compares NF4 with int4 in a model or a task", command)
    return Finding(judge_sides(sides), "; ".join(words), tuple(figures))


def _paired_schemes(records: Records, contenders: Sequence[tuple[str, bool]]) -> list[tuple[str, str, list[float]]]:
    """Return the first contender's macro F1 minus the second's by seed, for each model and preferred device.

    Args:
        records: See `read`.
        contenders: Two, each a scheme and whether its scales are quantized too.
    """
    found = []
    for (device, model), group in grouped(records.rows("schemes"), "model").items():
        first, second = (only(group, scheme=scheme, double_quantization=double) for scheme, double in contenders)
        pairs = by_seed(first, second, "f1_macro")
        if len(pairs) >= FEWEST_SEEDS:
            found.append((device, str(model), pairs))
    return records.preferred(found, lambda item: item[0])


def int4(records: Records) -> Finding:
    """Judge claim 7: whether bitsandbytes has int4 among its types, and whether the kit has.

    Evidence: bitsandbytes itself, called with each type (`quantize_4bit`); no documentation is better evidence.
    """
    types = records.computed.get("four_bit_types")
    if not types:
        return unmeasured("bitsandbytes was not asked", "make run-notebooks NOTEBOOKS=05")
    there = {who: "int4" in names for who, names in types.items()}
    figures = tuple(
        Figure(f"4-bit types of {who} ({', '.join(names)})", len(names), "", ARITHMETIC, "the library itself")
        for who, names in types.items()
    )
    reason = "; ".join(f"{who} has {', '.join(names) or 'none'}" for who, names in types.items())
    return Finding(judge(there.values()), reason, figures)


def compressed(records: Records) -> Finding:
    """Judge claim 14: the bits a number in the adapters and in the base's linear layers of a QLoRA model.

    Evidence: DialoGPT-medium's measured parts (results/memory.json), else the plan of its step, else the model that
    notebook 02 trained here. All models give the same answer, so the explained one comes first. Compressed means fewer
    than 16 bits. The claim holds if only the adapters are compressed, in part if adapters and base are; else it fails.
    """
    found: list[tuple[float, float, str, str]] = []
    wanted = ("base, linear layers", "adapters and head")
    measured = [
        (
            8 * first["parts"]["adapters and head"] / first["trainable_parameters"],
            8 * first["parts"]["base, linear layers"] * BYTES[second["precision"]]
            / second["parts"]["base, linear layers"],
            first["device"],
            first["source"],
        )
        for first, second in of_methods(only(memory_rows(records), model=EXPLAINED))
        if first.get("trainable_parameters") and second["precision"] in BYTES
        and all(row.get("parts", {}).get(part, 0) > 0 for row in (first, second) for part in wanted)
    ]  # fmt: skip
    # One figure for all shapes: they differ only by a few bytes of the allocator.
    found += sorted(set(records.preferred(measured, lambda item: item[2])))[:1]
    ways = records.computed.get("ways", {})
    if {"qlora", "lora"} <= set(ways):
        qlora, lora = ways["qlora"], ways["lora"]
        numbers = lora["parts"]["base, linear layers"] / BYTES[lora["precision"]]
        base = 8 * qlora["parts"]["base, linear layers"] / numbers
        adapters = 8 * qlora["parts"]["adapters and head"] / qlora["trainable"]
        found.append((adapters, base, "planned for a T4", "the memory plan"))
    record, device = records.notebook("02_finetune")
    bits = {part["name"]: 8 * part["bytes"] / part["parameters"] for part in record.get("weights", [])}
    quantized = record.get("experiment", {}).get("quantization", {}).get("scheme") in ("nf4", "fp4", "int4")
    if quantized and {"adapters", "base, linear layers"} <= set(bits):
        found.append((bits["adapters"], bits["base, linear layers"], device, "02_finetune.json"))
    if not found:
        return unmeasured("no record has a model's parts", "make run-notebooks NOTEBOOKS=02")
    decided, *others = [
        tuple(
            Figure(name, value, "bits a number", device, source)
            for name, value in (("adapters", adapters), ("base, linear layers", base))
        )
        for adapters, base, device, source in found
    ]
    adapters, base, _, _ = found[0]
    reason = f"the adapters take {adapters:.3g} bits a number, the base's linear layers {base:.3g}"
    beside = tuple(figure for pair in others for figure in pair)
    return Finding(judge([adapters < 16, adapters < 16 <= base]), reason, decided, beside)


# --- stability --------------------------------------------------------------------------------------------------


def stability(records: Records) -> Finding:
    """Judge claim 8: whether training is more stable with double quantization than without, seed by seed.

    Evidence: three meanings of stability, each read from the curves of runs with and without, all else equal: the
    roughness of gradient norms (see `roughness`), spikes of the loss, and seeds that diverge. Student's interval over
    `FEWEST_SEEDS` pairs or more says for each: better, worse or undecided. Scores and errors of weights are not
    stability: they are shown, but decide nothing. So without curves the claim is not measured.
    """
    beside = []
    for device, model, pairs in _paired_schemes(records, [("nf4", True), ("nf4", False)]):
        interval = seed_interval(pairs)
        assert interval is not None
        name = f"{short_model(model)}, macro F1 with, minus without, {len(pairs)} seeds"
        beside.append(Figure(name, unit="macro F1", device=device, source="results/schemes.json", **interval))
    for row in only(records.rows("quantization"), subject="normal", scheme="nf4", block_size=64):
        words = "with" if row.get("double_quantization") else "without"
        beside.append(Figure(f"normal weights, {words}", unit="dB", device=row["device"], source=_QUANTIZATION,
                             **row["snr_db"]))  # fmt: skip
        bits = f"bits a weight, {words}"
        beside.append(Figure(bits, row["bits_per_parameter"], "", row["device"], _QUANTIZATION))
    nf4 = [curve for curve in curves(records) if curve["scheme"] == "nf4"]
    gone = [row for row in records.rows("schemes", "diverged") if row["scheme"] == "nf4"]
    figures, sides, words = _calmer(records, nf4, gone, lambda row: row["double_quantization"] is True)
    if not sides:
        missing = f"no record has curves of {FEWEST_SEEDS} seeds with double quantization and without"
        return unmeasured(missing, _SCHEMES, beside)
    reason = f"with double quantization, over {words}"
    return Finding(judge_sides_apart(sides), reason, tuple(figures), tuple(beside))


def numerics(records: Records) -> Finding:
    """Judge claim 21: whether training on an NF4 base is more stable than on an unquantized one, seed by seed.

    Evidence: as for claim 8, with NF4 (double quantization) against a base in 16 or 32 bits, with equal adapters and
    settings: results/schemes.json or accuracy.json. The numbers of learning rates in a tuning at which training failed
    are shown for both, but decide nothing.
    """
    found = [
        curve for curve in curves(records)
        if curve["method"] in ("qlora", "lora")
        and (curve["scheme"] == "none" or (curve["scheme"] == "nf4" and curve["double_quantization"]))
    ]  # fmt: skip
    gone = [row for row in records.rows("schemes", "diverged") if row["scheme"] in ("nf4", "none")]
    figures, sides, words = _calmer(records, found, gone, lambda row: row["scheme"] == "nf4")
    beside = []
    for (device, model), group in grouped(records.rows("tuning"), "model").items():
        rates = [
            {str(row["tried"].get("training.learning_rate")) for row in only(group, method=method)
             if row.get("validation_f1_macro") is None or row["validation_f1_macro"] < COLLAPSED}
            for method in ("qlora", "lora")
        ]  # fmt: skip
        if only(group, method="qlora") and only(group, method="lora"):
            for method, collapsed in zip(("qlora", "lora"), rates, strict=True):
                tried = len({str(row["tried"].get("training.learning_rate")) for row in only(group, method=method)})
                name = f"{short_model(str(model))}, {METHODS[method]}: learning rates that came to nothing, of {tried}"
                beside.append(Figure(name, len(collapsed), "", device, "results/tuning.json"))
    if not sides:
        missing = f"no record has curves of {FEWEST_SEEDS} seeds on NF4 and on an unquantized base"
        return unmeasured(missing, _SCHEMES, beside)
    return Finding(judge_sides_apart(sides), f"on NF4, over {words}", tuple(figures), tuple(beside))


def judge_sides_apart(sides: Mapping[str, int]) -> str:
    """Judge several meanings of one word; undecided meanings are ignored.

    Args:
        sides: By meaning: 1 better, -1 worse, 0 undecided.

    Returns:
        `HOLDS` if better in some and worse in none; `IN_PART` if better in some and worse in others; `FAILS` if only
        worse; else `UNDECIDED`.
    """
    known = [one for one in sides.values() if one]
    return judge_sides(known) if known else UNDECIDED


def _calmer(
    records: Records,
    found: Sequence[Mapping[str, Any]],
    gone: Sequence[Mapping[str, Any]],
    first: Callable[[Mapping[str, Any]], bool],
) -> tuple[list[Figure], dict[str, int], str]:
    """Compare the curves for which `first` is true with the others, seed by seed, all else equal.

    Returns:
        Figures; by measure, better (1), worse (-1) or undecided (0); and the result in words.
    """
    measures = {
        "gradient norms": "restlessness of gradient norms",
        "spikes": "spikes of the loss",
        "divergence": "seeds that diverged",
    }
    rows = [
        {**curve, "gradient norms": roughness(curve), "spikes": spikes(curve), "divergence": int(diverged(curve))}
        for curve in found
    ]
    # A seed that diverged completely has no curve.
    lost = {(row["device"], row["model"], row["seed"], first(row)) for row in gone}
    compared: list[tuple[str, str, Figure, int]] = []
    for (device, model, source, _), group in grouped(rows, "model", "source", "settings").items():
        sides = [[row for row in group if first(row) == wanted] for wanted in (True, False)]
        for kind, words in measures.items():
            differences = by_seed(sides[0], sides[1], kind)
            if kind == "divergence" and source == "results/schemes.json":
                seeds = [{row["seed"] for row in one} for one in sides]
                for wanted, other in ((True, 1), (False, 0)):
                    differences += [
                        1.0 if wanted else -1.0
                        for (where, of, seed, is_first) in sorted(lost, key=str)
                        if (where, of, is_first) == (device, model, wanted) and seed in seeds[other]
                    ]
            interval = seed_interval(differences)
            if interval is not None and len(differences) >= FEWEST_SEEDS:
                name = f"{short_model(model)}, {words}: with minus without, {len(differences)} seeds"
                figure = Figure(name, unit="", device=device, source=source, **interval)
                compared.append((device, kind, figure, len(differences)))
    compared = records.preferred(compared, lambda item: item[0])
    judged: dict[str, list[int]] = {}
    for _, kind, figure, _ in compared:
        judged.setdefault(kind, []).append(-side(figure.low or 0.0, figure.high or 0.0))
    sides_of = {kind: _one_side(ones) for kind, ones in judged.items()}
    told = {1: "better", -1: "worse", 0: "not told apart"}
    nothing = {"spikes": "no spike of the loss", "divergence": "no seed diverged"}
    told_of = [
        nothing[kind] if kind in nothing and not any(row[kind] for row in rows) and not lost else f"{kind} {told[one]}"
        for kind, one in sides_of.items()
    ]
    most = max((count for *_, count in compared), default=0)
    return [figure for _, _, figure, _ in compared], sides_of, f"{most} seeds: {', '.join(told_of)}"


def _one_side(sides: Iterable[int]) -> int:
    """Return the common side of several comparisons, or 0 if they contradict each other or are all undecided."""
    known = {one for one in sides if one}
    return known.pop() if len(known) == 1 else 0


# --- formulas and pictures --------------------------------------------------------------------------------------


def factor(records: Records) -> Finding:
    """Judge claim 17: whether an adapter adds B·A·x, or a multiple of it.

    Evidence: a PEFT layer with the recipe's r and alpha, run on random numbers: what it adds, divided by B·A·x.
    """
    known = records.computed.get("factor")
    if not known:
        return unmeasured("no layer was tried", "make run-notebooks NOTEBOOKS=05")
    figures = (
        Figure("what a layer adds, times B·A·x", known["times"], "", ARITHMETIC, "PEFT's layer"),
        Figure("alpha / r", known["alpha"] / known["r"], "", ARITHMETIC, "the recipe"),
    )
    fine = abs(known["times"] - 1) < 1e-3
    reason = f"with r = {known['r']} and alpha = {known['alpha']:g} a layer adds {known['times']:.4g} times B·A·x" + (
        "" if fine else f": the factor alpha / r, {known['alpha'] / known['r']:.4g}, is missing in the formula"
    )
    return Finding(HOLDS if fine else FAILS, reason, figures)


def special_index(records: Records) -> Finding:
    """Judge claim 22, which does not say what the index is for, by its two possible meanings.

    Evidence: bitsandbytes' codes (a 4-bit weight is an index into a table of levels), and the model's own tokens
    (whether padding has its own token, other than the end of a text). The claim holds if both are true, in part if one
    is.
    """
    codes, padding = records.computed.get("codes"), records.computed.get("padding")
    if not codes or not padding:
        return unmeasured("neither the codes nor the tokens were looked at", "make run-notebooks NOTEBOOKS=05")
    own = padding["pad"] is not None and padding["pad"] != padding["end"]
    figures = [Figure("levels that a code can name", codes["levels"], "", ARITHMETIC, "the library itself")]
    if padding["end"] is not None:
        figures.append(Figure("number of the token that ends a text", padding["end"], "", ARITHMETIC, _CONFIG))
    reason = (
        "it is not said of what. Of a stored weight: "
        + (
            f"yes, 4 bits are the number of one of {codes['levels']} levels, times the scale of its block"
            if codes["exact"]
            else "no, what is read back is no level times a scale"
        )
        + ". Of padding: "
        + (
            "yes, it has a token of its own"
            if own
            else "no, DialoGPT-medium has no token for it, and the kit takes the one that ends a text"
        )
    )
    return Finding(judge([codes["exact"], own]), reason, tuple(figures))


_CONFIG = "the model's configuration"


def picture(records: Records) -> Finding:
    """Return `NO_MEASUREMENT` for claim 23: it is a metaphor and names nothing that could be measured."""
    return Finding(
        NO_MEASUREMENT,
        "a picture, not a statement: it names no quantity, so no measurement can be for or against it. What it stands "
        "for is judged elsewhere: what is stored how (2, 14), what is trained (16), what it saves (3)",
    )
