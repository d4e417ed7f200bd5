"""Every figure of the library, made of real inputs: the records of results/, Banking77, the embedded models, plans.

`MAKERS` has a function for each; the tests of figures go through it. Beside the usual inputs stand those that are hard
to draw: long names, many labels, few rows, one row, scores without a difference.
"""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

import qlora_kit as qk
from qlora_kit import claims, evaluation, plots, quantization
from qlora_kit.config.quantization import Quantization

ROOT = Path(__file__).resolve().parents[2]
HOSTILE = ["$\\frac{", "a very long label " * 12, "🙂 ok", "שלום", "<script>", "%s {x} \\n", "line\nbreak", ""]
LONG = [f"customer asks for help with the transfer of money to another country, kind {i}" for i in range(120)]
MIB = 2**20
MAKERS: dict[str, Callable[[], plots.KitFigure]] = {}


def made(name: str, *arguments: Any) -> Callable[[Callable[..., plots.KitFigure]], Callable[..., plots.KitFigure]]:
    """Register a maker under a name; its arguments are made when it is called, if they are functions."""

    def register(make: Callable[..., plots.KitFigure]) -> Callable[..., plots.KitFigure]:
        MAKERS[name] = lambda: make(*(one() if callable(one) else one for one in arguments))
        return make

    return register


# --- inputs -----------------------------------------------------------------------------------------------------


@functools.cache
def record(name: str) -> dict[str, Any]:
    return json.loads((ROOT / "results" / f"{name}.json").read_text(encoding="utf-8"))


@functools.cache
def banking() -> qk.TextData:
    return qk.banking77()


@functools.cache
def lengths() -> np.ndarray:
    from qlora_kit import models
    from qlora_kit.config.preset import preset

    tokenizer = models.load_tokenizer(preset("minilm_banking77_qlora").model)
    return qk.data.token_lengths(tokenizer, banking().train.texts[:2000])


def predictions(classes: int, rows: int = 800, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Return logits `[rows, classes]` and true classes `[rows]` of a classifier that is right most of the time."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, rows)
    logits = rng.normal(size=(rows, classes))
    logits[np.arange(rows), labels] += 3.5
    return logits, labels


def confusions(classes: int, rows: int) -> np.ndarray:
    return evaluation.confusion_matrix(*predictions(classes, rows), classes)


def training(steps: int, epochs: int, rates=("learning_rate",), best=None, timing=True) -> dict[str, Any]:
    """Return what a run's training.json holds; the curve is that of a recorded run."""
    curve = record("accuracy")["rows"][0]["curve"]["loss"]
    ends = [round(steps * (i + 1) / epochs) for i in range(epochs)]
    return {
        "best_step": best,
        "losses": [
            {
                "step": s,
                "loss": curve[min(s * len(curve) // (steps + 1), len(curve) - 1)],
                **{r: 1e-3 * (1 - s / steps) for r in rates},
            }
            for s in range(1, steps + 1, max(1, steps // 200))
        ],
        "epochs": [
            {
                "step": end,
                "epoch": i + 1.0,
                "validation": {
                    "accuracy": 0.8 + 0.1 * i / epochs,
                    "f1_macro": 0.79 + 0.1 * i / epochs,
                    "loss": 0.8 - 0.3 * i / epochs,
                },
                "timing": {"tokens_per_second": 900.0 + 30 * i if timing else None},
            }
            for i, end in enumerate(ends)
        ],
    }


def score(value: float, low: float | None = None, high: float | None = None) -> dict[str, Any]:
    ends = {"low": value - 0.01 if low is None else low, "high": value + 0.009 if high is None else high}
    return {name: {"value": value, **ends} for name in evaluation.METRICS}


def sizes(names: Any, counts: Any) -> dict[str, Any]:
    return {
        "class_sizes": {n: {"train": int(c), "validation": 1, "test": 2} for n, c in zip(names, counts, strict=True)}
    }


def metrics_of(logits: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
    return evaluation.metrics(logits, labels, resamples=300)


def race(**changed: Any) -> list[dict[str, Any]]:
    field = {"model": "minilm", "precision": "bf16", "batch": 32, "device": "CPU, 2 cores"}
    rates = {"recipe": 20.0, "grouped": 127.0, "unsloth": None, "ours": 221.0}
    return [
        {**field, "method": method, "contender": name, "samples_per_second": rate, "problem": "no module" * 20}
        | changed
        for method in ("qlora", "lora")
        for name, rate in rates.items()
    ]


def on_h200(row: dict[str, Any]) -> dict[str, Any]:
    return {**row, "device": "NVIDIA H200"}


def bad_overlap() -> plots.KitFigure:
    figure, axes = plots.new()
    axes.text(0.5, 0.5, "one text")
    axes.text(0.52, 0.51, "and another over it")
    return figure


def bad_cut() -> plots.KitFigure:
    figure, axes = plots.new()
    axes.text(0.9, 0.5, "a text that leaves the figure at its right edge").set_in_layout(False)
    return figure


def half_h200(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return rows of which the later half was measured on another GPU."""
    return [on_h200(row) if place >= len(rows) / 2 else row for place, row in enumerate(rows)]


# --- data -------------------------------------------------------------------------------------------------------

made("class sizes", lambda: banking().report())(plots.class_sizes)
made("class sizes, hostile", sizes(HOSTILE, range(1, len(HOSTILE) + 1)))(plots.class_sizes)
made("class sizes, long", sizes(LONG, range(120)))(plots.class_sizes)
made("class sizes, 30", sizes(LONG[:30], range(970, 1000)))(plots.class_sizes)
made("class sizes, equal", sizes(LONG, [8] * 120))(plots.class_sizes)
made("class sizes, one each", sizes(LONG[:31], [1] * 31))(plots.class_sizes)
made("class sizes, two", sizes("ab", (5, 5)))(plots.class_sizes)
made("class sizes, one large", sizes(LONG, [20000] + [1] * 119))(plots.class_sizes)
made("lengths", lengths, 128)(plots.token_lengths)
made("lengths, cut", lambda: lengths() * 40, 128)(plots.token_lengths)
made("lengths, nearly all cut", lambda: lengths() * 40, 8)(plots.token_lengths)
made("lengths, limit near the longest", lengths, lambda: int(lengths().max()) - 1)(plots.token_lengths)
made("lengths, equal", [3, 3, 3], 128)(plots.token_lengths)
made("padding", lambda: qk.data.padding_waste(lengths(), 32))(plots.padding)
made("padding, none", lambda: qk.data.padding_waste([5, 5, 5, 5], 2))(plots.padding)

# --- training ---------------------------------------------------------------------------------------------------

made("training", lambda: training(1128, 4, ("learning_rate", "learning_rate_head"), best=1128))(plots.training_curves)
made("training, short", lambda: training(1, 1, (), timing=False))(plots.training_curves)
made("training, many epochs", lambda: training(300, 30))(plots.training_curves)


def runs_of(*models: str) -> list[dict[str, Any]]:
    records = claims.Records(results={"accuracy": record("accuracy")})
    return [curve for curve in claims.curves(records) if curve["model"] in models]


made("stability", lambda: runs_of("embedded:minilm"))(plots.stability)
made("stability, one run", lambda: runs_of("embedded:minilm")[:1])(plots.stability)
made("stability, short runs", lambda: [
    {**curve, **{key: curve[key][:3] for key in ("step", "loss", "grad_norm")}} for curve in runs_of("embedded:minilm")
])(plots.stability)  # fmt: skip
made("stability, gaps", lambda: [
    {**curve, "grad_norm": [None] * len(curve["step"])} if place else curve
    for place, curve in enumerate(runs_of("embedded:minilm"))
])(plots.stability)  # fmt: skip


def trial(number: int, rate: float, state: str, epochs: list[float]) -> dict[str, Any]:
    parameters = {"training.learning_rate": rate, "lora.r": 16}
    found = epochs[-1] if state == "complete" else None
    return {"number": number, "parameters": parameters, "state": state, "f1_macro": found, "epochs": epochs}


made("search", {"trials": [
    trial(n, 10 ** (-4 + n / 10), "pruned" if n % 3 else "complete", [0.8 + n / 200]) for n in range(30)
]})(plots.search_trials)  # fmt: skip
made("search, one trial", {"trials": [trial(0, 1e-3, "complete", [0.5])]})(plots.search_trials)
made("search, near rates", {"trials": [trial(n, 1e-3 * (1 + n), "complete", [0.5 + n / 9]) for n in range(4)]})(
    plots.search_trials
)

# --- scores -----------------------------------------------------------------------------------------------------


def baseline_scores() -> dict[str, Any]:
    found = record("accuracy")["baselines"]
    return {"fine-tuned": score(0.936), **{evaluation.BASELINE_NAMES[name]: found[name] for name in found}}


made("metrics", baseline_scores, ("f1_macro",))(plots.metric_intervals)
made("metrics, two", {"fine-tuned, NF4": score(0.936), "frozen base + SVM": score(0.9286)})(plots.metric_intervals)
made(
    "metrics, few rows", lambda: {name: metrics_of(*predictions(77, 150, seed)) for seed, name in enumerate(LONG[:3])}
)(plots.metric_intervals)
made("metrics, hostile", {name: score(0.5) for name in HOSTILE}, ("accuracy", "loss"))(plots.metric_intervals)
made("metrics, all right", {"fine-tuned": score(1.0, 1.0, 1.0), "other": score(1.0, 1.0, 1.0)})(plots.metric_intervals)


def accuracy_of_record(change: Callable[[list[Any]], list[Any]] = list) -> plots.KitFigure:
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        import accuracy
    finally:
        sys.path.remove(str(ROOT / "benchmarks"))
    found = record("accuracy")
    return accuracy.figure({**found, "rows": change(found["rows"])})


made("accuracy")(accuracy_of_record)
made("accuracy, two GPUs", lambda: half_h200)(accuracy_of_record)
made("accuracy, no baseline", {"QLoRA": [0.9, 0.91], "LoRA": [0.9]}, {})(plots.accuracy)
made("accuracy, far baseline", {"QLoRA, H100": [0.93, 0.931]}, {"TF-IDF + linear SVM": 0.2, "frozen base + SVM": 0.93})(
    plots.accuracy
)
made("accuracy, long", {name: [0.5 + i / 90] for i, name in enumerate(LONG[:9])}, {LONG[9]: 0.5, LONG[10]: 0.505})(
    plots.accuracy
)


def differences() -> list[dict[str, Any]]:
    return [
        {"label": f"{one['of']} minus {one['over']} ({plots.short_device(one['device'])})", **one["f1_macro"]}
        for one in record("accuracy")["differences"]
    ]


made("intervals", differences, 0, 0.01, "macro F1; the band: what counts as level", "Differences")(plots.intervals)
made("intervals, long", [
    {"label": name, "value": 0.01 * i, "low": -0.3, "high": 0.4} for i, name in enumerate(LONG[:8])
], 1, None, "QLoRA's time, as a multiple of LoRA's")(plots.intervals)  # fmt: skip
made("intervals, one without ends", [{"label": "x", "value": 1.0}], 1, None, "", "A title")(plots.intervals)
made("F1", lambda: evaluation.per_label(*predictions(77, 3080), banking().label_names))(plots.f1_by_label)
made("F1, hostile", lambda: evaluation.per_label(*predictions(len(HOSTILE), 200), HOSTILE))(plots.f1_by_label)
made("F1, long", lambda: evaluation.per_label(*predictions(120, 400), LONG))(plots.f1_by_label)
made("F1, perfect", lambda: evaluation.per_label(np.eye(2)[[0, 1, 1]] * 9, [0, 1, 1], "ab"))(plots.f1_by_label)

# --- errors -----------------------------------------------------------------------------------------------------

for _draw, _name in ((plots.confusion_matrix, "confusions"), (plots.most_confused, "most confused")):
    made(_name, lambda: confusions(77, 3080), lambda: banking().label_names)(_draw)
    made(f"{_name}, hostile", lambda: confusions(len(HOSTILE), 200), HOSTILE)(_draw)
    made(f"{_name}, long", lambda: confusions(120, 900), LONG)(_draw)
    made(f"{_name}, 30", lambda: confusions(30, 900), LONG[:30])(_draw)
    made(f"{_name}, large counts", lambda: 1234 * confusions(5, 400), LONG[:5])(_draw)
    made(f"{_name}, perfect", [[1, 0], [0, 2]], "ab")(_draw)
    made(f"{_name}, one error", [[1, 1], [0, 2]], "ab")(_draw)
made("reliability", lambda: evaluation.calibration(*predictions(77, 3080)))(plots.reliability)
made("reliability, perfect", lambda: evaluation.calibration(np.eye(2)[[0, 1, 1]] * 9, [0, 1, 1]))(plots.reliability)
made("reliability, few", lambda: evaluation.calibration(*predictions(3, 6)))(plots.reliability)

# --- cost -------------------------------------------------------------------------------------------------------


def speed_of_record(change: Callable[[list[Any]], list[Any]] = list) -> plots.KitFigure:
    return plots.speed(change(record("speed")["rows"]), record("speed")["limit"])


made("speed")(speed_of_record)
made("speed, two GPUs", lambda: half_h200)(speed_of_record)
made("speed, small", race, [{**race()[0], "samples_per_second": 400.0}])(plots.speed)
made("speed, none ran", race(samples_per_second=None, problem="not ready: no driver"))(plots.speed)


def nf4(**changed: Any) -> Any:
    from qlora_kit.config.preset import preset

    return qk.memory.with_method(preset("minilm_banking77_qlora"), "qlora", "nf4").override(changed)


def anatomy_of(name: str) -> list[Any]:
    from qlora_kit.config.preset import preset

    return qk.anatomy.of_experiment(preset(name), banking().label_names)


made("anatomy", lambda: anatomy_of("minilm_banking77_qlora"))(plots.anatomy)


def shapes(labels: Any = None) -> list[dict[str, Any]]:
    wanted = ((1, 64), (8, 64), (16, 64), (8, 128))
    names = labels or [f"{n} x {width}" for n, width in wanted]
    return [
        {"label": name, "parts": qk.memory.plan(nf4(), batch=n, length=width).parts}
        for name, (n, width) in zip(names, wanted, strict=False)
    ]


def measured(model: str, kind: str = "NVIDIA") -> list[dict[str, Any]]:
    """Return rows of results/memory.json as the notebook has them."""
    found = [
        row
        for row in record("memory")["rows"]
        if row["model"] == model and row["device"].startswith(kind) and row["peak_bytes"]
    ]
    return [
        {"label": f"{row['method']} {row['scheme']}, {row['batch']} x {row['length']}", "parts": row["parts"],
         "measured": row["peak_bytes"], "step_seconds": row["step_seconds"], "device": row["device"]}
        for row in found
    ]  # fmt: skip


def seven_billion() -> tuple[list[dict[str, Any]], float]:
    """Return the recorded plans of a model of 7 B for a T4: one nearly fills it, so that its number meets the line."""
    found = [row for row in record("memory")["rows"] if row["model"] == "llama-7b"]
    rows = [
        {"label": f"{row['method']} {row['scheme']}, rank {row['lora_r']}", "parts": row["planned_parts"]}
        for row in found
    ]
    return rows, qk.memory.find_device("T4").bytes


made("memory by shape", shapes, None, "The same model, four shapes of a batch")(plots.memory_parts)
made("memory by shape, long", lambda: shapes(LONG), None, "A title that is about as long as a figure is wide")(
    plots.memory_parts
)
made("memory, measured", lambda: measured("dialogpt-medium")[:8], None, "Batch 8, length 128")(plots.memory_parts)
made("seven billion", seven_billion)(
    lambda found: plots.memory_parts(*found, title="7 B, batch 1, length 512; dashed: a T4")
)
made("memory against time", lambda: measured("dialogpt-medium"))(plots.memory_against_time)
made("memory against time, seven billion", lambda: measured("llama-7b"))(plots.memory_against_time)
made("memory against time, many", lambda: [
    {**row, "step_seconds": 0.3 + place % 4 / 50} for place, row in enumerate(measured("smollm2-135m")[:14])
])(plots.memory_against_time)  # fmt: skip
made("memory against time, long", lambda: [
    {**row, "label": name} for row, name in zip(measured("dialogpt-medium")[:6], LONG, strict=False)
])(plots.memory_against_time)  # fmt: skip
made("memory against time, equal", [
    {"label": name, "measured": 400 * MIB, "step_seconds": 0.3} for name in LONG[:9]
])(plots.memory_against_time)  # fmt: skip
made("memory against time, none", [{"label": "LoRA", "measured": None, "step_seconds": None}])(
    plots.memory_against_time
)


def crossing() -> dict[str, Any]:
    ways = (("full", "none", True), ("qlora", "nf4", True))
    return qk.memory.crossing(device="T4", length=512, methods=ways, shapes=("llama-1.1b", "llama-3b", "llama-7b"))


made("where each stops fitting", crossing)(plots.memory_crossing)

# --- quantization -----------------------------------------------------------------------------------------------


@functools.cache
def normal() -> torch.Tensor:
    return torch.randn(2**18, generator=torch.Generator().manual_seed(0))


@functools.cache
def layers() -> dict[str, torch.Tensor]:
    from qlora_kit import models
    from qlora_kit.config.preset import preset

    experiment = preset("minilm_banking77_lora")
    model = models.build(experiment, ["a", "b"], device=torch.device("cpu"))
    return {
        name: module.weight.detach().flatten()
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and module.weight.numel() > 10_000 and "lora" not in name
    }


def snr(scheme: str, size: int = 64, double: bool = True, tensor: torch.Tensor | None = None) -> float:
    tensor = normal() if tensor is None else tensor
    result = quantization.quantize(tensor, Quantization("nf4", double, size), levels=scheme)
    return quantization.quantization_error(tensor, result.dequantize())["snr_db"]


def fixed() -> dict[int, float]:
    return {bits: -10 * torch.tensor(quantization.lloyd_max(2**bits)[1]).log10().item() for bits in range(3, 9)}


def two_layers() -> dict[str, Any]:
    names = list(layers())
    return {name: layers()[name].numpy() for name in (names[0], names[-1])}


def block() -> tuple[Any, dict[str, Any]]:
    before = next(iter(layers().values()))[:64]
    schemes = ("nf4", "int4", "fp4")
    after = {name: quantization.roundtrip(before, Quantization(name, False, 64)).numpy() for name in schemes}
    return before.numpy(), after


def bits_points(double: tuple[bool, ...] = (True, False)) -> list[dict[str, Any]]:
    matrix = normal().reshape(-1, 1024)
    eight = quantization.quantization_error(matrix, quantization.roundtrip(matrix, Quantization("int8")))["snr_db"]
    bits = quantization.bits_per_parameter
    points = [
        {"label": name, "scheme": name, "bits": bits(Quantization("nf4", one, 64)), "snr_db": snr(name, double=one),
         "hollow": not one}
        for name in quantization.CODEBOOKS
        for one in double
    ]  # fmt: skip
    int8 = {"label": "int8", "scheme": "int8", "bits": bits(Quantization("int8"), in_features=1024), "snr_db": eight}
    return [*points, int8]


def by_block() -> list[dict[str, Any]]:
    return [
        {"scheme": scheme, "block_size": size, "snr_db": snr(scheme, size)}
        for scheme in quantization.CODEBOOKS
        for size in quantization.BLOCK_SIZES
    ]


def by_layer(model: str) -> list[dict[str, Any]]:
    rows = [row for row in record("quantization")["rows"] if row["subject"] == "layer" and row["model"] == model]
    return list({(row["layer"], row["scheme"]): row for row in rows}.values())


def outliers() -> list[dict[str, Any]]:
    rows = []
    others = normal()[: 64 * 500].reshape(500, 64)
    for outlier in (2, 4, 8, 16, 32, 64, 128):
        spoilt = others.clone()
        spoilt[:, 0] = outlier
        for scheme in ("nf4", "int4", "fp4"):
            error = quantization.roundtrip(spoilt, Quantization(scheme, False, 64)) - spoilt
            rows.append({"scheme": scheme, "outlier": outlier, "rms": error[:, 1:].square().mean().sqrt().item()})
    return rows


def perplexities() -> list[dict[str, Any]]:
    return [
        {"label": row["scheme"] + (", double" if row["double_quantization"] else ""), "scheme": row["scheme"],
         **row["ratio"]}
        for row in record("quantization")["rows"]
        if row["subject"] == "perplexity" and row["weights"] == "as shipped" and "banking77" in row["text"]
        and row["scheme"] != "none"
    ]  # fmt: skip


made("codebooks", lambda: {name: sorted(quantization.codebook(name).tolist()) for name in quantization.CODEBOOKS})(
    plots.codebooks
)
made("codebooks, one", lambda: {"nf4": quantization.codebook("nf4").tolist()})(plots.codebooks)
made("weights", two_layers)(plots.weight_histogram)
made("weights, long", lambda: {name: values.numpy() for name, values in zip(LONG, layers().values(), strict=False)})(
    lambda found: plots.weight_histogram(dict(list(found.items())[:3]))
)
made("one block", block)(lambda found: plots.block_before_after(*found))
made("one block, eight weights", block)(
    lambda found: plots.block_before_after(found[0][:8], {name: after[:8] for name, after in found[1].items()})
)
made("error by layer", lambda: [row for row in by_layer("embedded:minilm")], "minilm")(plots.error_by_layer)
made("error by layer, one", [{"layer": "0", "scheme": "nf4", "snr_db": 20.0}])(plots.error_by_layer)
made("error by layer, equal", [
    {"layer": str(k), "scheme": s, "snr_db": 20 + k % 3} for s in quantization.CODEBOOKS for k in range(210)
], "a model")(plots.error_by_layer)  # fmt: skip
made("error by block size", by_block, lambda: fixed()[4])(plots.error_by_block_size)
made("error by block size, one size", lambda: [row for row in by_block() if row["block_size"] == 64])(
    plots.error_by_block_size
)
made("bits against error", bits_points, fixed)(plots.bits_against_error)
made("bits against error, filled", lambda: bits_points((True,)))(plots.bits_against_error)
made("outliers", outliers)(plots.outlier_in_block)
made("perplexity", perplexities, "SmolLM2-135M, questions of bank customers")(plots.perplexity_ratios)
made("perplexity, long", [
    {"label": name, "scheme": "nf4", "value": 1.2, "low": 1.1, "high": 1.3 + place / 10}
    for place, name in enumerate(LONG[:7])
], "a model, a text")(plots.perplexity_ratios)  # fmt: skip


def schemes_of_record(change: Callable[[list[Any]], list[Any]] = list) -> plots.KitFigure:
    return plots.schemes(change(record("schemes")["rows"]))


made("schemes")(schemes_of_record)
made("schemes, two GPUs", lambda: half_h200)(schemes_of_record)
made("schemes, one row", lambda: lambda rows: rows[2:3])(schemes_of_record)
