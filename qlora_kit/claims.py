"""What an explanation of QLoRA says, sentence by sentence, and what was measured about each.

A claim is a sentence and a rule. The rule reads records (results/, the notebooks' records, run folders, and what can
be computed from a model's shape and the data alone) and returns figures, a verdict and the reason for it. No verdict
is written anywhere: change a record and it changes.

Rows are compared only with rows of the same record made on the same device. Where several devices have what a rule
needs, this machine's records decide; the figures say where each was measured.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import textwrap
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .errors import KitError
from .records import environment as describe
from .records import load_run, plain, read_json

HOLDS, IN_PART, FAILS, UNMEASURED = "holds", "holds in part", "does not hold", "not measured here"
VERDICTS = (HOLDS, IN_PART, FAILS, UNMEASURED)

MARGIN = 0.01
"""Macro F1 within which two methods count as level: about two standard errors of one score on 3,080 rows."""
FEWEST_SEEDS = 3
"""Pairs of seeds below which an interval over seeds says nothing (with two it is 18 standard errors wide)."""
RELEVANT = 0.05
"""A share of memory or of a step's time below which a difference is not worth a sentence, or is noise."""
SIGNIFICANT = 0.1
"""The saving of memory from which on `significantly lower` is granted: a tenth."""
ROUGH = 0.25
"""By how much the time of a few steps, taken once, may be off."""
HALF = 0.5
"""The share to which the model's weights have to fall for `cuts the memory of the weights`."""

_RESULTS = ("accuracy", "tuning", "schemes", "memory", "quantization", "speed", "inference")
_NOTEBOOKS = ("01_quantization", "02_finetune", "03_evaluate", "04_memory")
_METHODS = {"qlora": "QLoRA", "lora": "LoRA", "full": "full fine-tuning"}
_UNITS = ("", "bytes", "share", "seconds", "macro F1")  # those that a number is shown in, not with
_REPOSITORY = Path(__file__).resolve().parents[1]
_MEMORY_ALIKE = (
    "source", "device", "model", "precision", "optimizer", "batch", "length", "graphs", "lora_r", "lean", "embeddings",
    "prepare_for_kbit_training", "limit_bytes",
)  # fmt: skip
_PLANNED_WEIGHTS = ("base, linear layers", "base, embeddings", "base, norms and biases", "head as it was")


@dataclasses.dataclass(frozen=True)
class Figure:
    """One number that a verdict rests on.

    Args:
        name: What it is.
        value: The number; bytes and seconds where the unit says so.
        unit: `bytes`, `seconds`, `share` (shown in percent), `macro F1` (a difference of it), any other word, or
            empty for a bare number.
        device: Where it was measured; `arithmetic` or `planned for a T4` where nothing was.
        source: The record that it is from.
        low: Lower end of its 95% interval, where it has one.
        high: Upper end.
    """

    name: str
    value: float
    unit: str
    device: str
    source: str
    low: float | None = None
    high: float | None = None

    def __str__(self) -> str:
        text = f"{self.name}: {_number(self.value, self.unit)}"
        if self.low is not None and self.high is not None:
            text += f" ({_range((self.low, self.high), self.unit)})"
        return text + (f" {self.unit}" if self.unit not in _UNITS else "")


@dataclasses.dataclass(frozen=True)
class Finding:
    """What a rule returns.

    Args:
        verdict: One of `VERDICTS`.
        reason: One or two sentences with the figures that decided.
        figures: Those that decided first, then what else was measured.
        command: What measures it, on a machine that can; empty where nothing is missing.
    """

    verdict: str
    reason: str
    figures: tuple[Figure, ...] = ()
    command: str = ""


@dataclasses.dataclass(frozen=True)
class Claim:
    """A sentence and how to judge it.

    Args:
        number: Its number.
        group: What it is about: `size`, `memory`, `speed`, `schemes`, `stability`, `accuracy` or `bookkeeping`.
        text: The claim's wording.
        why: Why it is worth checking.
        rule: From records to a finding.
    """

    number: int
    group: str
    text: str
    why: str
    rule: Callable[[Records], Finding]


@dataclasses.dataclass(frozen=True)
class Verdict:
    """A claim, and what a rule found."""

    claim: Claim
    finding: Finding

    @property
    def devices(self) -> tuple[str, ...]:
        """Where its figures are from, each once."""
        return tuple(dict.fromkeys(figure.device for figure in self.finding.figures))


@dataclasses.dataclass(frozen=True)
class Records:
    """What rules read.

    Args:
        results: Files of results/ by their stem.
        notebooks: Records of notebooks by the notebook's name.
        runs: Run folders: each with `name`, `experiment`, `training`, `evaluation` (or None), `environment`.
        computed: What `compute` returned; empty for nothing.
        device: This machine's, whose records are preferred.
        margin: Macro F1 within which two methods count as level.
    """

    results: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    notebooks: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    runs: Sequence[Mapping[str, Any]] = ()
    computed: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    device: str = ""
    margin: float = MARGIN

    def rows(self, name: str) -> list[dict[str, Any]]:
        """Return the rows of results/NAME.json, each with a `device`; none where the file is not there."""
        result = self.results.get(name, {})
        device = result.get("environment", {}).get("device", "")
        return [{"device": device, **row} for row in result.get("rows", [])]

    def notebook(self, name: str) -> tuple[Mapping[str, Any], str]:
        """Return a notebook's record and its device; an empty record where there is none."""
        record = self.notebooks.get(name, {})
        return record, record.get("environment", {}).get("device", "")


def read(
    results: str | Path = "", out: str | Path = "runs/latest", *, margin: float = MARGIN, computed: bool = True
) -> Records:
    """Read every record that is there.

    Args:
        results: Folder of the reference records; empty for the repository's, where the code runs from a clone
            (an installed package has none).
        out: The folder OUT, with notebooks' records and `runs/`; where it has no finished run, those below `runs`.
        margin: Macro F1 within which two methods count as level.
        computed: Whether to compute what needs no measurement (see `compute`; it takes some seconds).

    Returns:
        The records. What is missing is left out.

    Raises:
        KitError: When a folder that was named is missing, a record is no JSON, or the margin is not above 0.
    """
    from . import models

    if not margin > 0:
        raise KitError(f"margin is {margin}: allowed is a difference of macro F1 above 0, as 0.01")
    folder = find_results(results)
    found = {}
    for name in _RESULTS if folder is not None else ():
        if folder is not None and (folder / f"{name}.json").is_file():
            found[name] = read_json(folder / f"{name}.json")
    books = {name: read_json(file) for name in _NOTEBOOKS if (file := Path(out) / f"{name}.json").is_file()}
    cuda = models.cuda_available()
    return Records(
        results=found,
        notebooks=books,
        runs=_runs(Path(out) / "runs") or _runs(Path("runs")),
        computed=compute() if computed else {},
        device=describe("cuda" if cuda else None)["device"],
        margin=margin,
    )


def find_results(results: str | Path = "") -> Path | None:
    """Return the folder of the reference records, or None for an installed package, which comes without.

    Raises:
        KitError: When a folder is named that does not exist.
    """
    if results:
        if not Path(results).is_dir():
            raise KitError(f"there is no folder {str(results)!r}: name one with records, as results/ of a clone")
        return Path(results)
    own = _REPOSITORY / "results"
    return own if own.is_dir() and (_REPOSITORY / "pyproject.toml").is_file() else None


def _runs(root: Path) -> list[dict[str, Any]]:
    found = []
    for file in sorted(root.glob("**/training.json")):
        with contextlib.suppress(KitError):
            run = load_run(file.parent)
            found.append(
                {
                    "name": run.path.name,
                    "experiment": run.experiment.to_dict(),
                    "training": run.training,
                    "evaluation": run.evaluation,
                    "environment": run.environment,
                }
            )
    return found


def compute() -> dict[str, Any]:
    """Work out what needs no measurement: from the shape of DialoGPT-medium, the data and bitsandbytes itself.

    Returns:
        `data` (`rows`, `train`, `labels`), `recipe` (`batch_size`, `epochs`), `ways` (the memory plan of `qlora`,
        `lora` and `full` at the explained recipe's batch on a T4: bytes and numbers of parameters), `head` (its
        parameters), `four_bit_types` (by `bitsandbytes` and the `kit`).
    """
    import bitsandbytes as bnb
    import torch

    from . import data, memory, models, quantization
    from .experiment import preset

    rows = data.banking77()
    recipe = preset("dialogpt-medium_banking77_recipe")
    shape = recipe.override({"model.name": "shape:dialogpt-medium", "model.random_weights": True})
    ways = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # transformers' own, about names that older ones need
        for method, scheme in (("qlora", "nf4"), ("lora", "none"), ("full", "none")):
            spec = memory.with_method(shape, method, scheme)
            if method != "qlora":
                spec = spec.override({"training.prepare_for_kbit_training": False})
            plan = memory.plan(spec, device="T4", labels=len(rows.label_names))
            ways[method] = {
                "trainable": plan.parameters[0],
                "all": plan.parameters[1],
                "device": plan.device.name,
                "device_bytes": plan.device.bytes,
                **{key: getattr(plan, key) for key in ("batch", "length", "total", "reserved", "paged", "parts")},
                "optimizer": spec.training.optimizer,
                "precision": plan.precision,
            }
    types = []
    for name in quantization.FOUR_BIT:
        with contextlib.suppress(ValueError):
            bnb.functional.quantize_4bit(torch.ones(64, 64), quant_type=name)
            types.append(name)
    config: Any = models.load_config(shape.model)
    return {
        "data": {
            "rows": len(rows.train) + len(rows.validation),
            "train": len(rows.train),
            "labels": len(rows.label_names),
        },
        "recipe": {"batch_size": recipe.training.batch_size, "epochs": recipe.training.epochs},
        "ways": ways,
        "head": config.hidden_size * len(rows.label_names),
        "four_bit_types": {"bitsandbytes": types, "kit": list(quantization.FOUR_BIT)},
    }


def seed_interval(differences: Sequence[float] | np.ndarray) -> dict[str, float] | None:
    """Return the mean of paired differences with Student's 95% interval: the spread of other seeds.

    Args:
        differences: One a seed, first contender minus second.

    Returns:
        `{"value", "low", "high"}`, or None for fewer than two: mean ± t(n - 1) · s / √n (Student 1908).
    """
    import scipy.stats

    values = np.asarray(differences, dtype=float)
    if len(values) < 2:
        return None
    mean, error = float(values.mean()), float(values.std(ddof=1) / math.sqrt(len(values)))
    reach = float(scipy.stats.t.ppf(0.975, len(values) - 1)) * error
    return {"value": mean, "low": mean - reach, "high": mean + reach}


def by_seed(first: Iterable[Mapping[str, Any]], second: Iterable[Mapping[str, Any]], key: str) -> list[float]:
    """Return first minus second of `key` for each seed that both have, in the order of the seeds."""
    other = {row["seed"]: row[key] for row in second}
    return [row[key] - other[row["seed"]] for row in sorted(first, key=lambda r: r["seed"]) if row["seed"] in other]


def of_one_model(found: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return the rows of one model, that which most methods trained: beside another model's they tell no method's.

    Args:
        found: Each with `model` and `method`: as `curves` returns them, or rows of results/accuracy.json.
    """
    methods: dict[str, set[str]] = {}
    for row in found:
        methods.setdefault(row["model"], set()).add(row["method"])
    chosen = max(methods, key=lambda model: len(methods[model]), default=None)
    return [row for row in found if row["model"] == chosen]


def roughness(curve: Mapping[str, Sequence[float | None]]) -> float | None:
    """Return how restless a run's gradient norms are: the mean of |ln(next / this)| from one log to the next.

    A run with spikes has large steps; a slow rise or fall over the whole run hardly counts.

    Args:
        curve: With `grad_norm`, in the order of the steps; None where a step had none.

    Returns:
        The mean, or None where there are fewer than three norms.
    """
    norms = np.array([norm for norm in curve["grad_norm"] if norm], dtype=float)
    return float(np.abs(np.diff(np.log(norms))).mean()) if len(norms) > 2 else None


def curves(records: Records) -> list[dict[str, Any]]:
    """Return the loss and gradient norms of every run that a record or a run folder has.

    Returns:
        Each with `label`, `method`, `model`, `scheme`, `double_quantization`, `seed`, `device`, `source`, and the
        lists `step`, `loss` and `grad_norm`.
    """
    found = []
    for row in records.rows("accuracy"):
        if row.get("curve", {}).get("step"):
            found.append(
                {
                    **{key: row[key] for key in ("method", "model", "scheme", "double_quantization", "seed", "device")},
                    "label": f"{row['method']}, seed {row['seed']}",
                    "source": "results/accuracy.json",
                    "settings": (row["preset"], row.get("learning_rate")),
                    **row["curve"],
                }
            )
    for run in records.runs:
        spec, losses = run["experiment"], run["training"]["losses"]
        if not losses:
            continue  # shorter than a log
        scheme, lora = spec["quantization"]["scheme"], spec["lora"]
        method = "full" if lora is None else "lora" if scheme == "none" else "qlora"
        found.append(
            {
                "method": method,
                "model": spec["model"]["name"],
                "scheme": scheme,
                "double_quantization": spec["quantization"]["double_quantization"],
                "seed": spec["training"]["seed"],
                "device": run["environment"]["device"],
                "label": run["name"],
                "source": "runs",
                "settings": repr([spec["data"], lora, {**spec["training"], "seed": None}]),
                **{key: [row.get(key) for row in losses] for key in ("step", "loss", "grad_norm")},
            }
        )
    return found


# --- what rules are made of -------------------------------------------------------------------------------------


def _judge(parts: Sequence[bool]) -> str:
    """Every part of a claim true: it holds; some: in part; none: it does not."""
    return HOLDS if all(parts) else IN_PART if any(parts) else FAILS


def _unmeasured(missing: str, command: str, figures: Sequence[Figure] = ()) -> Finding:
    return Finding(UNMEASURED, f"{missing}. To measure it: {command}", tuple(figures), command)


def _grouped(rows: Iterable[Mapping[str, Any]], records: Records, *keys: str) -> list[list[Mapping[str, Any]]]:
    """Split rows into groups that may be compared (one device, and equal `keys`), this machine's groups first."""
    groups: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["device"], *(row.get(key) for key in keys)), []).append(row)
    return sorted(groups.values(), key=lambda group: group[0]["device"] != records.device)


def _only(rows: Iterable[Mapping[str, Any]], **wanted: Any) -> list[Mapping[str, Any]]:
    return [row for row in rows if all(row.get(key) == value for key, value in wanted.items())]


def _memory_rows(records: Records) -> list[dict[str, Any]]:
    """Return the rows of results/memory.json and of notebook 04 that have a measured peak, in one shape."""
    rows = [{"source": "results/memory.json", **row} for row in records.rows("memory")]
    record, device = records.notebook("04_memory")
    spec = record.get("experiment", {})
    for row in record.get("rows", []):
        changes = row.get("changes", {})
        training = {**spec["training"], **{k.partition(".")[2]: v for k, v in changes.items() if k[:9] == "training."}}
        rows.append(
            {
                "source": "04_memory.json",
                "device": device,
                # As results/memory.json has it: shape:dialogpt-medium and microsoft/DialoGPT-medium are one.
                "model": spec["model"]["name"].rpartition(":")[2].rpartition("/")[2].lower(),
                "method": row["method"],
                "scheme": row["scheme"],
                "double_quantization": changes.get("quantization.double_quantization", row["scheme"] != "none" or None),
                "embeddings": changes.get("quantization.embeddings", "none"),
                "precision": training["precision"],
                "optimizer": training["optimizer"],
                "checkpointing": training["gradient_checkpointing"],
                "batch": row["batch"],
                "length": row["length"],
                "planned_bytes": row["planned"],
                "peak_bytes": row["measured"],
                "paged_bytes": row.get("paged"),
                "step_seconds": row["step_seconds"],
                "parts": row["parts"],
            }
        )
    return [row for row in rows if row.get("peak_bytes")]


def _pairs(
    rows: Iterable[Mapping[str, Any]], first: Mapping[str, Any], second: Mapping[str, Any], *alike: str
) -> list[tuple[Mapping[str, Any], Mapping[str, Any]]]:
    """Pair rows that match `first` with those that match `second` and are equal in everything of `alike`."""
    others = {tuple(row.get(key) for key in alike): row for row in reversed(_only(rows, **second))}
    found = [(row, others.get(tuple(row.get(key) for key in alike))) for row in _only(rows, **first)]
    return [(row, other) for row, other in found if other is not None]


def _methods(rows: Iterable[Mapping[str, Any]]) -> list[tuple[Mapping[str, Any], Mapping[str, Any]]]:
    """Pair QLoRA (NF4, double quantization) with LoRA at the same shape, in the same record, on the same device."""
    qlora = {"method": "qlora", "scheme": "nf4", "double_quantization": True}
    return _pairs(rows, qlora, {"method": "lora"}, *_MEMORY_ALIKE, "checkpointing")


def _range(values: Sequence[float], unit: str = "share") -> str:
    low, high = _number(min(values), unit), _number(max(values), unit)
    return low if low == high else f"{low} to {high}"


def _number(value: float, unit: str) -> str:
    if unit == "bytes":
        return f"{value / 2**30:,.2f} GiB" if abs(value) >= 2**31 else f"{value / 2**20:,.1f} MiB"
    if unit == "share":
        return f"{value:.2%}" if abs(value) < RELEVANT else f"{value:.1%}"
    if unit == "seconds":
        return f"{value * 1000:.1f} ms" if abs(value) < 1 else f"{value:,.1f} s"
    if unit == "macro F1":
        return f"{value:+.4f}"
    return f"{value:,.0f}" if abs(value) >= 1000 or float(value).is_integer() else f"{value:.4g}"


# --- the rules --------------------------------------------------------------------------------------------------

TRAINABLE, ALL, SHARE = 4_404_224, 359_306_240, 1.2258
STEP_OF_BEST, RATE, SECONDS, TEST_F1 = 7_200, 20.4, 1_568, 0.9350
TEST_LOSS, TRAIN_ROWS, LABELS = 4.155, 9_002, 77
NF4_BITS, NF4_BITS_OFF = 4.127, 0.05
_PLAN = "python -m qlora_kit plan dialogpt-medium_banking77_recipe --device T4"
_ARITHMETIC = "arithmetic"


def counts(records: Records) -> Finding:
    """Judge claim 1: each of the three numbers, with the model built from its shape. All, some or none agree."""
    way = records.computed.get("ways", {}).get("qlora")
    if not way:
        return _unmeasured("the model's shape was not built", _PLAN)
    trainable, everything, head = way["trainable"], way["all"], records.computed["head"]
    share = 100 * trainable / everything
    parts = {"base": everything - trainable - head, "adapters": trainable - head, "head": head, "head as it was": head}
    shown = (("trainable", trainable), ("all", everything), *parts.items())
    figures = [Figure(name, value, "", _ARITHMETIC, "the model's shape") for name, value in shown]
    figures.insert(2, Figure("trainable of all", share / 100, "share", _ARITHMETIC, "the model's shape"))
    agree = [trainable == TRAINABLE, everything == ALL, round(share, 4) == SHARE]
    reason = f"{trainable:,} of {everything:,}, {share:.4f}%: " + " + ".join(f"{v:,} ({k})" for k, v in parts.items())
    return Finding(_judge(agree), reason, tuple(figures))


def weights(records: Records) -> Finding:
    """Judge claim 2: bits a weight in the linear layers, and bytes of all weights, with NF4 and without.

    The first part is true where the linear layers come within `NF4_BITS_OFF` of the paper's 4.127 bits (QLoRA,
    section 3) and of fewer than before; the second where the whole model's weights fall to `HALF` or less.
    """
    found: list[tuple[str, str, dict[str, float]]] = []
    record, device = records.notebook("01_quantization")
    bits = record.get("metrics", {}).get("quantization", {}).get("bits_per_parameter", {})
    if {"none", "nf4"} <= set(bits):
        values = {"before": bits["none"]["linear"], "after": bits["nf4"]["linear"]}
        found.append((device, "01_quantization.json", values | {"share": bits["nf4"]["bytes"] / bits["none"]["bytes"]}))
    for group in _grouped(records.rows("schemes"), records, "model"):
        plain_rows, quantized = _only(group, scheme="none"), _only(group, scheme="nf4", double_quantization=True)
        if plain_rows and quantized:
            first, second = plain_rows[0], quantized[0]
            values = {"before": first["bits_per_parameter"], "after": second["bits_per_parameter"]}
            share = second["whole_model_bytes"] / first["whole_model_bytes"]
            found.append((group[0]["device"], "results/schemes.json", values | {"share": share}))
    if not found:
        return _unmeasured("no record has the stored weights", "make run-notebooks NOTEBOOKS=01")
    found.sort(key=lambda item: item[0] != records.device)
    figures = []
    for device, source, values in found:
        for key, name, unit in (
            ("before", "linear layers without", "bits a weight"),
            ("after", "linear layers in NF4", "bits a weight"),
            ("share", "whole model in NF4, of before", "share"),
        ):
            figures.append(Figure(name, values[key], unit, device, source))
    values = found[0][2]
    linear = values["after"] < values["before"] and abs(values["after"] - NF4_BITS) < NF4_BITS_OFF
    reason = (
        f"linear layers go from {values['before']:.4g} to {values['after']:.4g} bits a weight (the paper: {NF4_BITS}); "
        f"all weights together go to {values['share']:.0%}, for embeddings and norms are not quantized"
    )
    return Finding(_judge([linear, values["share"] <= HALF]), reason, tuple(figures))


def footprint(records: Records) -> Finding:
    """Judge claim 3, which gives a saving and a cause.

    The saving is there where every measured pair of QLoRA and LoRA, alike in all else, differs by `SIGNIFICANT` or
    more. The cause can be the trainable share only where QLoRA's share is another than LoRA's.
    """
    ways = records.computed.get("ways", {})
    groups = [pairs for g in _grouped(_memory_rows(records), records, "source") if (pairs := _methods(g))]
    if not groups or not {"qlora", "lora"} <= set(ways):
        return _unmeasured("no record has QLoRA and LoRA at one shape", "python benchmarks/memory.py --groups cpu")
    figures, savings = [], []
    for pairs in groups:
        saved = [1 - first["peak_bytes"] / second["peak_bytes"] for first, second in pairs]
        savings.append(saved)
        for (first, _), value in zip(pairs, saved, strict=True):
            name = (
                f"{first['model']}, batch {first['batch']} x {first['length']}{_checkpointed(first)}: less than LoRA by"
            )
            figures.append(Figure(name, value, "share", first["device"], first["source"]))
    shares = {name: ways[name]["trainable"] / ways[name]["all"] for name in ("qlora", "lora")}
    figures += [
        Figure(f"trainable, {name}", share, "share", _ARITHMETIC, "the model's shape") for name, share in shares.items()
    ]
    same = shares["qlora"] == shares["lora"]
    reason = (
        f"QLoRA's peak is {_range(savings[0])} below LoRA's on {groups[0][0][0]['device']}; the trainable share is "
        + ("the same in both, so it is not what saves" if same else "another")
    )
    return Finding(_judge([min(savings[0]) >= SIGNIFICANT, not same]), reason, tuple(figures))


def _checkpointed(row: Mapping[str, Any]) -> str:
    return ", checkpointing" if row.get("checkpointing") else ""


def speed(records: Records) -> Finding:
    """Judge claim 4: QLoRA's time over LoRA's, alike in all else.

    Faster means a ratio below 1 - `RELEVANT`, or, where seeds give an interval, an interval below 1. Faster in every
    comparison of the device: it holds; in some: in part. Notebook 04 times a few steps once, which whatever else runs
    on the machine disturbs: it is asked where nothing else has times of the device, and then for 1 - `ROUGH`.
    """
    found: list[Figure] = []
    for group in _grouped(records.rows("speed"), records):
        alike = ("model", "contender", "precision", "batch", "padding", "command")  # of one race
        for first, second in _pairs(group, {"method": "qlora", "scheme": "nf4"}, {"method": "lora"}, *alike):
            if first["step_seconds"] and second["step_seconds"]:
                name = f"{first['model']}, {first['contender']}, batch {first['batch']}: a step, times LoRA's"
                ratio = first["step_seconds"] / second["step_seconds"]
                found.append(Figure(name, ratio, "", first["device"], "results/speed.json"))
    for group in _grouped(records.rows("accuracy"), records, "model", "jobs"):
        sides = [{r["seed"]: r["train_seconds"] for r in _only(group, method=m)} for m in ("qlora", "lora")]
        seeds = sorted(set(sides[0]) & set(sides[1]))
        interval = seed_interval([sides[0][seed] / sides[1][seed] for seed in seeds])
        if interval:
            name = f"{group[0]['model'].rpartition(':')[2]}, {len(seeds)} seeds: training, times LoRA's"
            found.append(Figure(name, unit="", device=group[0]["device"], source="results/accuracy.json", **interval))
    timed = [row for row in _memory_rows(records) if row.get("step_seconds")]
    for first, second in _methods(timed):
        name = (
            f"{first['model']}, batch {first['batch']} x {first['length']}{_checkpointed(first)}: a step, times LoRA's"
        )
        ratio = first["step_seconds"] / second["step_seconds"]
        found.append(Figure(name, ratio, "", first["device"], first["source"]))
    if not found:
        return _unmeasured("no record has QLoRA and LoRA timed on one device", "python benchmarks/speed.py")
    found.sort(key=lambda figure: figure.device != records.device)
    first_device = [figure for figure in found if figure.device == found[0].device]
    first_device = [figure for figure in first_device if figure.source != "04_memory.json"] or first_device
    off = {figure: ROUGH if figure.source == "04_memory.json" else RELEVANT for figure in first_device}
    faster = [(f.value < 1 - off[f]) if f.high is None else f.high < 1 for f in first_device]
    reason = f"on {found[0].device} QLoRA takes {_range([f.value for f in first_device], '')} times LoRA's time"
    return Finding(_judge(faster), reason, tuple(found))


def fits_t4(records: Records) -> Finding:
    """Judge claim 5: whether LoRA's memory is more than a T4 has, at DialoGPT-medium's size and the recipe's batch.

    Measured bytes (of any GPU: they do not depend on it beyond cuBLAS's workspace) go before the plan's. It holds
    where LoRA does not fit.
    """
    ways = records.computed.get("ways", {})
    if "lora" not in ways:
        return _unmeasured("nothing was planned for a T4", _PLAN)
    has, shape = ways["lora"]["device_bytes"], {key: ways["lora"][key] for key in ("batch", "length")}
    figures, peak = [], {}
    at_shape = _only(_memory_rows(records), model="dialogpt-medium", checkpointing=True, limit_bytes=None, **shape)
    for method in ("lora", "qlora", "full"):
        scheme = "nf4" if method == "qlora" else "none"
        measured = next(iter(_only(at_shape, method=method, scheme=scheme)), None)
        if measured:
            peak[method] = measured["peak_bytes"]
            figures.append(Figure(_METHODS[method], peak[method], "bytes", measured["device"], measured["source"]))
        else:
            peak[method] = ways[method]["reserved"]
            figures.append(Figure(_METHODS[method], peak[method], "bytes", "planned for a T4", "the memory plan"))
    figures.append(Figure("a T4 has", has, "bytes", "T4", "its specification, less the CUDA context"))
    reason = f"LoRA takes {_number(peak['lora'], 'bytes')} of a T4's {_number(has, 'bytes')} at this model's size"
    crossing = records.notebooks.get("04_memory", {}).get("crossing", {})
    if crossing.get("device") == "T4":
        for limit in crossing["limits"]:
            if limit["parameters"]:
                name = f"{_METHODS[limit['method']]} stops fitting at, parameters"
                figures.append(Figure(name, limit["parameters"], "", "planned for a T4", "04_memory.json"))
                if limit["method"] == "lora":
                    reason += f"; it stops fitting at {limit['parameters'] / 1e9:.1f} billion parameters"
    return Finding(_judge([peak["lora"] > has]), reason, tuple(figures))


def schemes(records: Records) -> Finding:
    """Judge claim 6 by three measures of NF4 against int4, each within one record.

    The error on normal weights (signal to noise at blocks of 64: intervals apart), perplexity as a share of int4's
    (interval below 1; each text and state of the weights counts), and macro F1 after fine-tuning (interval over
    paired seeds above 0). NF4 is ahead in every comparison that was made: it holds; in some: in part.
    """
    figures: list[Figure] = []
    ahead: dict[str, list[bool]] = {}
    source = "results/quantization.json"
    rows = records.rows("quantization")
    normal = {
        row["scheme"]: row
        for row in _only(rows, subject="normal", block_size=64, double_quantization=True)
        if row["scheme"] in ("nf4", "int4")
    }
    record, device = records.notebook("01_quantization")
    here = record.get("metrics", {}).get("quantization", {}).get("normal_snr_db", {})
    if len(normal) == 2:
        for scheme, row in normal.items():
            figures.append(Figure(f"normal weights, {scheme}", unit="dB", device=row["device"], source=source,
                                  **row["snr_db"]))  # fmt: skip
        ahead["comparisons of the error on normal weights"] = [
            normal["nf4"]["snr_db"]["low"] > normal["int4"]["snr_db"]["high"]
        ]
    elif {"nf4", "int4"} <= set(here):
        for scheme in ("nf4", "int4"):
            figures.append(Figure(f"normal weights, {scheme}", here[scheme], "dB", device, "01_quantization.json"))
        ahead["comparisons of the error on normal weights"] = [here["nf4"] > here["int4"]]
    texts = _only(rows, subject="perplexity", scheme="nf4", double_quantization=False)
    for row in texts:
        name = f"perplexity, of int4's ({row['weights']}, {row['text']})"
        figures.append(Figure(name, unit="", device=row["device"], source=source, **row["ratio_to_int4"]))
    if texts:
        ahead["of perplexity"] = [row["ratio_to_int4"]["high"] < 1 for row in texts]
    for group in _grouped(records.rows("schemes"), records, "model")[:1]:
        first, second = (_only(group, scheme=scheme, double_quantization=True) for scheme in ("nf4", "int4"))
        pairs = by_seed(first, second, "f1_macro")
        interval = seed_interval(pairs)
        if interval:
            name = f"nf4 over int4, fine-tuned, {len(pairs)} seeds"
            figures.append(Figure(name, unit="macro F1", device=group[0]["device"], source="results/schemes.json",
                                  **interval))  # fmt: skip
            ahead["after fine-tuning"] = [interval["low"] > 0]
    if not ahead:
        return _unmeasured("no record compares NF4 with int4", "python benchmarks/quantization.py")
    every = [one for better in ahead.values() for one in better]
    words = [f"{sum(better)} of {len(better)} {where}" for where, better in ahead.items()]
    return Finding(_judge(every), f"NF4 is ahead in {', '.join(words)}", tuple(figures))


def int4(records: Records) -> Finding:
    """Judge claim 7: int4 among bitsandbytes' own types (as `quantize_4bit` takes them), and among the kit's."""
    types = records.computed.get("four_bit_types")
    if not types:
        return _unmeasured("bitsandbytes was not asked", "make run-notebooks NOTEBOOKS=05")
    there = {who: "int4" in names for who, names in types.items()}
    figures = tuple(
        Figure(f"4-bit types of {who} ({', '.join(names)})", len(names), "", _ARITHMETIC, "the library itself")
        for who, names in types.items()
    )
    reason = "; ".join(f"{who} has {', '.join(names) or 'none'}" for who, names in types.items())
    return Finding(_judge(list(there.values())), reason, figures)


def stability(records: Records) -> Finding:
    """Judge claim 8: what stability could mean, with double quantization against without, in pairs of seeds.

    Macro F1 (better where the interval over seeds is above 0), and the restlessness of gradient norms (see
    `roughness`; better where the interval of the difference is below 0). What it does to the weights' error and bits
    stands beside, but is no stability.
    """
    figures: list[Figure] = []
    better: dict[str, bool] = {}
    for group in _grouped(records.rows("schemes"), records, "model")[:1]:
        first, second = (_only(group, scheme="nf4", double_quantization=double) for double in (True, False))
        pairs = by_seed(first, second, "f1_macro")
        interval = seed_interval(pairs)
        if interval:
            name = f"macro F1 with, minus without, {len(pairs)} seeds"
            figures.append(Figure(name, unit="macro F1", device=group[0]["device"], source="results/schemes.json",
                                  **interval))  # fmt: skip
            better["macro F1"] = interval["low"] > 0
    rough = [{**curve, "rough": roughness(curve)} for curve in curves(records) if curve["scheme"] == "nf4"]
    rough = [curve for curve in rough if curve["rough"] is not None]
    for group in _grouped(rough, records, "model", "method", "source", "settings"):
        first, second = (_only(group, double_quantization=double) for double in (True, False))
        pairs = by_seed(first, second, "rough")
        interval = seed_interval(pairs)
        if interval and "gradient norms" not in better:
            name = f"restlessness of gradient norms with, minus without, {len(pairs)} seeds"
            figures.append(Figure(name, unit="", device=group[0]["device"], source=group[0]["source"], **interval))
            better["gradient norms"] = interval["high"] < 0
    for row in _only(records.rows("quantization"), subject="normal", scheme="nf4", block_size=64):
        words = "with" if row["double_quantization"] else "without"
        source = "results/quantization.json"
        figures.append(Figure(f"normal weights, {words}", unit="dB", device=row["device"], source=source,
                              **row["snr_db"]))  # fmt: skip
        figures.append(Figure(f"bits a weight, {words}", row["bits_per_parameter"], "", row["device"], source))
    if not better:
        return _unmeasured("no record has the same seeds with and without", "python benchmarks/schemes.py", figures)
    found = ", ".join(f"{what} {'better' if is_better else 'not better'}" for what, is_better in better.items())
    return Finding(_judge(list(better.values())), f"with double quantization: {found}", tuple(figures))


def paged(records: Records) -> Finding:
    """Judge claim 9: what share of a step's memory lies in pages that could leave the GPU, planned for a T4.

    Worth having from `RELEVANT` on. Two parts: for the recipe's adapters, and for every weight trained.
    """
    ways = records.computed.get("ways", {})
    if not {"qlora", "full"} <= set(ways):
        return _unmeasured("nothing was planned", _PLAN)
    shares, figures = {}, []
    for method, words in (("qlora", "adapters"), ("full", "every weight")):
        way = ways[method]
        shares[words] = way["paged"] / (way["paged"] + way["total"])
        where = f"planned for a {way['device']}"
        figures.append(Figure(f"in pages, {words} trained ({way['optimizer']})", way["paged"], "bytes", where,
                              "the memory plan"))  # fmt: skip
        figures.append(Figure(f"of all memory, {words} trained", shares[words], "share", where, "the memory plan"))
    measured = [row for row in records.rows("memory") if row.get("paged_bytes") and row["method"] == "full"]
    for row in measured:
        name = f"{row['model']}, every weight trained ({row['optimizer']}), in pages"
        figures.append(Figure(name, row["paged_bytes"], "bytes", row["device"], "results/memory.json"))
    reason = "of a step's memory, pages that could leave the GPU are " + ", ".join(
        f"{share:.1%} with {words} trained" for words, share in shares.items()
    )
    reason += "; what moving them costs is not measured"
    return Finding(_judge([share >= RELEVANT for share in shares.values()]), reason, tuple(figures))


def checkpointing(records: Records) -> Finding:
    """Judge claim 10: the measured peak with checkpointing against without, alike in all else, on one device.

    Lower by `RELEVANT` or more in every pair: it holds; in some: in part.
    """
    alike = (*_MEMORY_ALIKE, "method", "scheme", "double_quantization")
    groups = []
    for group in _grouped(_memory_rows(records), records, "source"):
        pairs = _pairs(group, {"checkpointing": True}, {"checkpointing": False}, *alike)
        if pairs:
            groups.append(pairs)
    if not groups:
        return _unmeasured("no record has it on and off at one shape", "python benchmarks/memory.py --groups cpu")
    figures = []
    for pairs in groups:
        for first, second in pairs:
            name = f"{first['model']}, {first['method']} {first['scheme']}, {first['batch']} x {first['length']}"
            name += ", scales in fp32" if first["scheme"] == "nf4" and first["double_quantization"] is False else ""
            saved = 1 - first["peak_bytes"] / second["peak_bytes"]
            figures.append(Figure(f"{name}: less by", saved, "share", first["device"], first["source"]))
            if first.get("step_seconds") and second.get("step_seconds"):
                longer = first["step_seconds"] / second["step_seconds"]
                figures.append(Figure(f"{name}: a step takes, times", longer, "", first["device"], first["source"]))
    saved = [1 - first["peak_bytes"] / second["peak_bytes"] for first, second in groups[0]]
    lower = [share >= RELEVANT for share in saved]
    reason = f"the peak is {_range(saved)} lower on {groups[0][0][0]['device']}"
    if not all(lower):
        kept = {
            "full fine-tuning" if a["method"] == "full" else f"{a['method']} {a['scheme']}"
            for (a, _), low in zip(groups[0], lower, strict=True)
            if not low
        }
        reason += (
            f"; nothing is saved with {', '.join(sorted(kept))}, where activations are not what the peak is made of"
        )
    return Finding(_judge(lower), reason, tuple(figures))


def scores(records: Records) -> Finding:
    """Judge claim 11, which has a step, a rate and a score.

    The step has to exist among those of 4 epochs at batch 8; rows a second times seconds has to come within
    `RELEVANT` of the rows of 4 epochs; and the recipe's test macro F1 on real weights has to be within the margin of
    the one reported. Without a run on real weights it is not measured, whatever the arithmetic says.
    """
    known, recipe = records.computed.get("data"), records.computed.get("recipe")
    command = "python benchmarks/accuracy.py --presets dialogpt-medium_banking77_recipe"
    if not known or not recipe:
        return _unmeasured("the steps were not counted", command)
    steps = math.ceil(known["train"] / recipe["batch_size"]) * recipe["epochs"]
    rows, seen = known["train"] * recipe["epochs"], RATE * SECONDS
    arithmetic = {
        f"step {STEP_OF_BEST:,} of {steps:,.0f}": steps >= STEP_OF_BEST,
        f"{seen:,.0f} rows seen of {rows:,.0f}": abs(seen / rows - 1) < RELEVANT,
    }
    source = "the data and the recipe"
    figures = [
        Figure("steps", steps, "", _ARITHMETIC, source),
        Figure("rows in all epochs", rows, "", _ARITHMETIC, source),
        Figure("rows that the rate and the time give", seen, "", _ARITHMETIC, "the claim itself"),
        Figure("rows an epoch that these give", seen / recipe["epochs"], "", _ARITHMETIC, "the claim itself"),
    ]
    words = ", ".join(f"{what} ({'possible' if fine else 'impossible'})" for what, fine in arithmetic.items())
    name = "dialogpt-medium_banking77_recipe"
    found = [
        {"f1_macro": run["evaluation"]["metrics"]["test"]["f1_macro"]["value"], "device": run["environment"]["device"],
         "source": f"runs/{run['name']}"}
        for run in records.runs
        if run["experiment"]["name"] == name and run["evaluation"] and not run["experiment"]["model"]["random_weights"]
    ]  # fmt: skip
    found += [
        {"source": "results/accuracy.json", **row}
        for row in _only(records.rows("accuracy"), model="microsoft/DialoGPT-medium", method="recipe")
    ]
    groups = _grouped(found, records, "source")
    if not groups:
        return _unmeasured(f"{words}; no run on the real weights is recorded", command, figures)
    score = float(np.mean([row["f1_macro"] for row in groups[0]]))
    figures.append(Figure("test macro F1", score, "", groups[0][0]["device"], groups[0][0]["source"]))
    reason = f"test macro F1 {score:.4f} against {TEST_F1:.4f}; {words}"
    return Finding(_judge([abs(score - TEST_F1) <= records.margin, *arithmetic.values()]), reason, tuple(figures))


def loss(records: Records) -> Finding:
    """Judge claim 12: whether 4.155 is what a trained model's test loss looks like, or one that has learned nothing.

    It holds where a measured test loss is within a tenth of it; in part where it is near neither that nor chance
    (ln of the number of labels, what a guess among all costs); else it does not.
    """
    labels = records.computed.get("data", {}).get("labels")
    command = 'make run-notebooks NOTEBOOKS="02 03"'
    if not labels:
        return _unmeasured("the labels were not counted", command)
    found = [
        Figure("test loss", run["evaluation"]["metrics"]["test"]["loss"]["value"], "",
               run["environment"]["device"], f"runs/{run['name']}")
        for run in records.runs
        if run["evaluation"] and not run["experiment"]["model"]["random_weights"]
        and run["experiment"]["data"]["name"] == "banking77"
    ]  # fmt: skip
    found += [
        Figure(f"test loss, {row['method']}, seed {row['seed']}", row["loss"], "", row["device"],
               "results/accuracy.json")
        for row in records.rows("accuracy") if row.get("loss") is not None
    ]  # fmt: skip
    chance = Figure(f"chance, ln {labels}", math.log(labels), "", _ARITHMETIC, "the data")
    if not found:
        return _unmeasured("no test loss of a trained model is recorded", command, [chance])
    found.sort(key=lambda figure: figure.device != records.device)
    near = any(abs(figure.value / TEST_LOSS - 1) < SIGNIFICANT for figure in found)
    at_chance = abs(TEST_LOSS / chance.value - 1) < SIGNIFICANT
    reason = (
        f"{TEST_LOSS} is {abs(TEST_LOSS / chance.value - 1):.0%} off the {chance.value:.3f} of a guess among {labels}; "
        f"trained models' test loss is {_range([figure.value for figure in found], '')}"
    )
    return Finding(_judge([near, near or not at_chance]), reason, (chance, *found))


def rows(records: Records) -> Finding:
    """Judge claim 13: training rows and labels, counted in the data that the kit ships."""
    known = records.computed.get("data")
    if not known:
        return _unmeasured("the data was not counted", "make run-notebooks NOTEBOOKS=02")
    figures = tuple(Figure(name, known[name], "", _ARITHMETIC, "the data") for name in ("train", "labels", "rows"))
    reason = f"{known['train']:,} of {known['rows']:,} rows to train on, {known['labels']} labels"
    return Finding(_judge([known["train"] == TRAIN_ROWS, known["labels"] == LABELS]), reason, figures)


def compressed(records: Records) -> Finding:
    """Judge claim 14: bits a number of the adapters and of the base's linear layers, in a QLoRA model.

    Compressed means fewer than 16 bits. Adapters alone: it holds; adapters and base: in part; else it does not.
    """
    found: list[tuple[float, float, str, str]] = []
    record, device = records.notebook("02_finetune")
    parts = {part["name"]: 8 * part["bytes"] / part["parameters"] for part in record.get("weights", [])}
    quantized = record.get("experiment", {}).get("quantization", {}).get("scheme") in ("nf4", "fp4", "int4")
    if quantized and {"adapters", "base, linear layers"} <= set(parts):
        found.append((parts["adapters"], parts["base, linear layers"], device, "02_finetune.json"))
    ways = records.computed.get("ways", {})
    if {"qlora", "lora"} <= set(ways):
        qlora, lora = ways["qlora"], ways["lora"]
        per = {"fp32": 4, "fp16": 2, "bf16": 2}[lora["precision"]]
        numbers = lora["parts"]["base, linear layers"] / per
        base = 8 * qlora["parts"]["base, linear layers"] / numbers
        adapters = 8 * qlora["parts"]["adapters and head"] / qlora["trainable"]
        found.append((adapters, base, "planned for a T4", "the memory plan"))
    if not found:
        return _unmeasured("no record has a model's parts", "make run-notebooks NOTEBOOKS=02")
    figures = [
        Figure(name, value, "bits a number", device, source)
        for adapters, base, device, source in found
        for name, value in (("adapters", adapters), ("base, linear layers", base))
    ]
    adapters, base, _, _ = found[0]
    reason = f"the adapters take {adapters:.3g} bits a number, the base's linear layers {base:.3g}"
    return Finding(_judge([adapters < 16, adapters < 16 <= base]), reason, tuple(figures))


def near(records: Records) -> Finding:
    """Judge claim 15: macro F1 of QLoRA minus LoRA and minus full fine-tuning, on one device, same seeds, same rows.

    Two intervals each: Student's over the seeds, and the record's bootstrap over test rows. Equivalence, not a
    missing difference, is what the claim says, so it holds where every interval lies within ± the margin; it does
    not where one lies below -margin altogether; else in part. Fewer than `FEWEST_SEEDS` pairs measure nothing.
    """
    figures: list[Figure] = []
    decided: list[Figure] = []
    command = "python benchmarks/accuracy.py --tune --seeds 0 1 2 3 4"
    source = "results/accuracy.json"
    recorded = records.results.get("accuracy", {}).get("differences", [])
    seeds = 0
    for group in _grouped(records.rows("accuracy"), records, "model"):
        here: list[Figure] = []
        device = group[0]["device"]
        quantized = _only(group, method="qlora", scheme="nf4")
        for other in ("lora", "full"):
            against = _only(group, method=other)
            pairs = by_seed(quantized, against, "f1_macro")
            interval = seed_interval(pairs)
            if interval is None or len(pairs) < FEWEST_SEEDS:
                continue
            seeds = seeds if decided else len(pairs)
            words = f"{group[0]['model'].rpartition(':')[2]}: QLoRA minus {_METHODS[other]}"
            here.append(Figure(f"{words}, over {len(pairs)} seeds", unit="macro F1", device=device, source=source,
                               **interval))  # fmt: skip
            for row in recorded:
                named = (row["of"], row["over"]) == (quantized[0]["preset"], against[0]["preset"])
                if named and row["device"] == device:
                    here.append(Figure(f"{words}, over test rows", unit="macro F1", device=device, source=source,
                                       **row["f1_macro"]))  # fmt: skip
        figures += here
        decided = decided or here
    if not decided:
        return _unmeasured(f"no device has {FEWEST_SEEDS} seeds of QLoRA and of what it is compared with", command)
    ends = [(figure.low or 0.0, figure.high or 0.0) for figure in decided]
    within = all(-records.margin <= low and high <= records.margin for low, high in ends)
    below = any(high < -records.margin for _, high in ends)
    reason = (
        f"{seeds} seeds on {decided[0].device}: QLoRA minus what it is compared with is "
        f"{_range([figure.value for figure in decided], 'macro F1')}; "
        f"the intervals reach from {min(low for low, _ in ends):+.4f} to {max(high for _, high in ends):+.4f}, "
        f"the margin is ±{records.margin:g}"
    )
    tried = records.results.get("tuning", {}).get("chosen", [])
    if tried:
        reason += f"; {_range([row['settings'] for row in tried], '')} settings of each were tried on validation"
    return Finding(_judge([within, not below]), reason, tuple(figures))


CLAIMS = (
    Claim(
        1, "size",
        "4,404,224 of 359,306,240 parameters are trained (1.2258%), with r=16, alpha=32 on c_attn and c_proj.",
        "The two numbers say which layers have adapters and whether the head is trained.", counts,
    ),
    Claim(
        2, "memory", "NF4 with double quantization cuts the memory of the weights.",
        "Only linear layers are quantized: how much of the model are they?", weights,
    ),
    Claim(
        3, "memory", "The memory footprint is significantly lower (about 1.23% trainable parameters).",
        "It gives a saving and a cause, and LoRA has the same trainable share.", footprint,
    ),
    Claim(
        4, "speed", "QLoRA trains faster than LoRA.",
        "Weights in 4 bits have to be unpacked at every use.", speed,
    ),
    Claim(
        5, "memory", "Standard LoRA might not fit a T4.",
        "If it fits, memory is no reason for QLoRA at this size; from which size on is it?", fits_t4,
    ),
    Claim(
        6, "schemes", "NF4 is better than int4 for normally distributed weights.",
        "Better by which ruler: the weights' error, perplexity, or the task?", schemes,
    ),
    Claim(
        7, "schemes", "int4 is an option beside NF4.",
        "Who sets it in bitsandbytes' configuration should get it, or an error.", int4,
    ),
    Claim(
        8, "stability", "Double quantization improves stability.",
        "It rounds the scales once more, which can only add error.", stability,
    ),
    Claim(
        9, "memory", "Paged optimizers handle large models.",
        "They page optimizer state, and adapters have little of it.", paged,
    ),
    Claim(
        10, "memory", "Gradient checkpointing reduces memory.",
        "It gives up activations, which are not always what the peak is made of.", checkpointing,
    ),
    Claim(
        11, "accuracy",
        "Validation F1 is about 0.91 at step 7,200; test accuracy 0.9351 and F1 0.9350 after 4 epochs in 1,568 s on a "
        "T4 (20.4 samples/s, batch 8).",
        "A step, a rate and a score should come from one run.", scores,
    ),
    Claim(
        12, "accuracy", "The test loss is 4.155.",
        "A classifier that is right nine times in ten cannot be as surprised as one that guesses.", loss,
    ),
    Claim(
        13, "bookkeeping", "There are 9,002 training samples and 77 labels.",
        "Every count of steps follows from it.", rows,
    ),
    Claim(
        14, "schemes", "The sticky notes (the adapters) are what is compressed.",
        "Which part is stored in 4 bits is what QLoRA is.", compressed,
    ),
    Claim(
        15, "accuracy", "Quantization keeps near full-precision performance.",
        "It is the reason to use QLoRA at all, and needs more than one seed.", near,
    ),
)  # fmt: skip


def check(records: Records) -> list[Verdict]:
    """Judge every claim.

    Args:
        records: See `read`.

    Returns:
        A verdict a claim, in the order of `CLAIMS`.
    """
    return [Verdict(claim, claim.rule(records)) for claim in CLAIMS]


def table(verdicts: Sequence[Verdict], most: int = 3) -> list[dict[str, Any]]:
    """Return verdicts as the rows of a table that people read.

    Args:
        verdicts: What `check` returned, or some of it.
        most: How many figures to show of each; the record has all.

    Returns:
        Rows with `#`, `claim`, `measured`, `device`, `verdict`, `because`.
    """
    return [
        {
            "#": verdict.claim.number,
            "claim": verdict.claim.text,
            "measured": "; ".join(map(str, verdict.finding.figures[:most])),
            "device": ", ".join(verdict.devices[:most]),
            "verdict": verdict.finding.verdict,
            "because": verdict.finding.reason,
        }
        for verdict in verdicts
    ]


def markdown(verdicts: Sequence[Verdict]) -> str:
    """Return verdicts as a table in Markdown: the claim, the verdict, and the records that decided."""
    from . import plots

    rows = ["| | it is said that | verdict | decided by |", "|---|---|---|---|"]
    for verdict in verdicts:
        decided = dict.fromkeys(
            figure.source if figure.device == _ARITHMETIC else f"{figure.source} ({plots.short_device(figure.device)})"
            for figure in verdict.finding.figures[:3]
        )
        rows.append(
            f"| {verdict.claim.number} | {verdict.claim.text} | {verdict.finding.verdict} | {', '.join(decided)} |"
        )
    return "\n".join(rows)


def lines(verdicts: Sequence[Verdict], *groups: str) -> str:
    """Return the verdicts of some groups as text: what is said, what was found, and why."""
    chosen = [verdict for verdict in verdicts if verdict.claim.group in groups]
    return "\n\n".join(
        "\n".join(
            textwrap.fill(text, 100, initial_indent=first, subsequent_indent="    ")
            for text, first in (
                (verdict.claim.text, f"{verdict.claim.number:2}. "),
                (f"{verdict.finding.verdict.upper()}: {verdict.finding.reason}", "    "),
            )
        )
        for verdict in chosen
    )


def to_record(verdicts: Sequence[Verdict]) -> dict[str, list[dict[str, Any]]]:
    """Return verdicts as the sections `claims` and `figures` of a notebook's record: rows of two tables."""
    claims = [
        {
            "number": verdict.claim.number,
            "claim": verdict.claim.text,
            "verdict": verdict.finding.verdict,
            "reason": verdict.finding.reason,
            "devices": list(verdict.devices),
            "command": verdict.finding.command or None,
        }
        for verdict in verdicts
    ]
    figures = [
        {"claim": verdict.claim.number, **plain(figure)} for verdict in verdicts for figure in verdict.finding.figures
    ]
    return {"claims": claims, "figures": figures}


def plans(records: Records) -> Iterator[dict[str, Any]]:
    """Yield the rows of `plots.memory_parts` that show QLoRA, LoRA and full fine-tuning at one shape.

    Measured rows of one record and device where there are some; else the computed plans for a T4.
    """
    alike = [key for key in _MEMORY_ALIKE if key not in ("device", "lora_r", "optimizer")]
    for group in _grouped(_memory_rows(records), records, *alike, "checkpointing"):
        ways = {row["method"]: row for row in reversed(group) if row["method"] != "qlora" or row["scheme"] == "nf4"}
        if len(set(ways) & set(_METHODS)) > 1:
            for method in (name for name in _METHODS if name in ways):
                row = ways[method]
                label = f"{_METHODS[method]}, {row['batch']} x {row['length']}"
                yield {"label": label, "parts": row["parts"], "measured": row["peak_bytes"], "device": row["device"]}
            return
    for method, way in records.computed.get("ways", {}).items():
        label = f"{_METHODS[method]}, {way['batch']} x {way['length']}"
        yield {"label": label, "parts": way["parts"], "device": f"planned for a {way['device']}"}
