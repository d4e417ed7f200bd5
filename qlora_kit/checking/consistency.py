"""Check that a record agrees with itself, even if there is no raw data to compute it again.

Examples of problems: a scheme that differs from the preset, a rate that is not batch size / step time, a value outside
its own interval, a model size that differs between seeds.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import KitError
from ..system.parsing import read_json

Row = Mapping[str, Any]

CLOSE = 1e-6  # relative; rates and times of one row
CLOSE_DB, CLOSE_DB_OF_DRAWS = 1e-4, 0.01
SETTINGS = ("method", "scheme", "double_quantization")
WHOLE_BASE = (
    "base, linear layers",
    "base, embeddings",
    "base, norms and biases",
    "head as it was",
    "adapters and head",
)

# Rows with equal values of the first keys must have equal values of the second. `a.b` is key b inside a.
ALIKE: dict[str, tuple[tuple[tuple[str, ...], tuple[str, ...]], ...]] = {
    "accuracy": ((("preset", "device", "command"), ("model", *SETTINGS, "learning_rate", "jobs")),),
    "tuning": (
        (("preset", "device", "command"), ("model", *SETTINGS, "jobs")),
        (("device", "command"), ("seed",)),
    ),
    "schemes": (
        (("contender",), ("scheme", "double_quantization")),
        (("model", "contender"), ("bits_per_parameter", "whole_model_bits_per_parameter", "whole_model_bytes")),
        (("device", "command"), ("model", "jobs")),
    ),
    "merging": (
        (("way",), ("dtype",)),
        (("device", "command"), ("preset", "model", "learning_rate", "steps", "precision")),
    ),
    "speed": (
        (("contender", "model", "device"), ("padding", "optimizer")),
        (("method",), ("scheme", "double_quantization")),
    ),
    "inference": (
        (("variant", "model"), ("scheme",)),
        (("device", "command"), ("texts", "repeats")),
    ),
    "export": (
        (("model",), ("trained_on", "rows")),
        (("device", "command"), ("texts", "repeats")),
    ),
    "int4_step": ((("contender",), ("scheme", "double_quantization")),),
    "t4": ((("device", "command"), ("precision", "batch", "limit_bytes")),),
    "memory": (
        (("model", "method", "lora_r"), ("trainable_parameters", "parameters")),
        (("device", "group", "model", "method", "scheme", "double_quantization"), ("precision",)),
        (
            ("device", "commit", "model", "method", "scheme", "double_quantization", "precision", "lora_r",
             "prepare_for_kbit_training", "embeddings"),
            tuple(f"parts.{part}" for part in WHOLE_BASE),
        ),
    ),
    "soak": (
        (("device",), ("kind",)),
        (("model", "kind"), ("layers", *SETTINGS, "batch")),
    ),
    "waiting": ((("device", "command"), ("preset", "batch", "repeats")),),
    "mutation": ((("command",), ("sample", "seed")),),
    "architectures": ((("family",), ("model_type",)),),
    "quantization": (
        (("subject", "scheme", "double_quantization", "block_size"), ("bits_per_parameter",)),
        (("model", "layer"), ("parameters", "kurtosis")),
        (("subject", "command"), ("tokens", "window", "texts")),
    ),
}  # fmt: skip
ALIKE["speed_variants"] = ALIKE["speed"]

# The first is never above the second, if a row has both.
RISING = (
    ("peak_bytes", "reserved_bytes"),
    ("reserved_bytes", "limit_bytes"),
    ("latency_seconds_p50", "latency_seconds_p95"),
    ("killed", "tried"),
    ("tried", "mutants"),
)
PAIRS = ("samples_per_second_range", "step_seconds_quartiles", "step_seconds_range")  # lists of two ends
OF_ROWS = ("device", "model", "preset", "contender", "method", "precision")  # keys of other lists that refer to rows
BATCHES = ("speed", "speed_variants")  # records whose steps all have full batches


def problems(path: Path, content: Row, where: Callable[[Row], str]) -> Iterator[str]:
    """Yield a line for each contradiction within a record.

    Args:
        path: The record's file; `tuning.json` in the same folder is read for the chosen learning rates.
        content: The record.
        where: Return the name of a row, for messages.
    """
    rows: Sequence[Row] = content["rows"]
    yield from _alike(path.stem, rows, where)
    for row in rows:
        yield from (f"{where(row)}: {problem}" for problem in _within(path.stem, row))
    devices = {row["device"] for row in rows if "device" in row}
    own = content["environment"]["device"]
    if devices and own not in devices:
        yield f"the record: environment.device is {own!r}, and its rows are of {_list(devices)}"
    yield from _beside(content, rows)
    yield from (f"{place}: {problem}" for place, problem in _ends(content, ""))
    if path.stem in ("accuracy", "tuning", "schemes", "merging"):
        yield from _presets(content, where)
    if path.stem == "accuracy":
        yield from _chosen(path, rows, where)
    if path.stem == "quantization":
        yield from _errors(rows, where)


def _alike(name: str, rows: Sequence[Row], where: Callable[[Row], str]) -> Iterator[str]:
    for keys, alike in ALIKE.get(name, ()):
        groups: dict[str, list[Row]] = {}
        for row in rows:
            if all(key in row for key in keys):
                groups.setdefault(repr([row[key] for key in keys]), []).append(row)
        for key in alike:
            for group in groups.values():
                values = [repr(_value(row, key)) for row in group]
                # A run that did not fit into memory has no parts.
                known = [value for value in values if value != "None" or "." not in key]
                for value, _ in Counter(known).most_common()[1:]:
                    usual, told = Counter(known).most_common(1)[0][0], ", ".join(keys)
                    row = group[values.index(value)]
                    yield f"{where(row)}: {key} is {value}, and {usual} in other rows of the same {told}"


def _value(row: Row, key: str) -> Any:
    value: Any = row
    for part in key.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def _within(name: str, row: Row) -> Iterator[str]:
    """Yield the contradictions within one row."""
    scheme, double = row.get("scheme"), row.get("double_quantization")
    if scheme is not None and row.get("method") in ("lora", "full") and scheme != "none":
        yield f"method is {row['method']}, whose base is not quantized, and scheme is {scheme}"
    if scheme == "none" and row.get("method") in ("qlora", "recipe"):
        yield f"method is {row['method']}, and scheme is none"
    if double is True and scheme in ("none", "int8"):
        yield f"double_quantization is True, and {scheme} has no scales to quantize"
    for low, high in RISING:
        if isinstance(row.get(low), (int, float)) and isinstance(row.get(high), (int, float)) and row[low] > row[high]:
            yield f"{low} is {row[low]:.10g}, above {high}, {row[high]:.10g}"
    for key in PAIRS:
        if row.get(key) and row[key][0] > row[key][1]:
            yield f"{key} is {row[key]}, and its lower end comes first"
    rate, step = row.get("samples_per_second"), row.get("step_seconds")
    alone = name in BATCHES and not row.get("repeats_seconds")  # nothing to compute it again from
    if alone and rate and step and abs(rate * step / row["batch"] - 1) > CLOSE:
        yield f"samples_per_second {rate:.10g} times step_seconds {step:.10g} is not the batch, {row['batch']}"
    if name in BATCHES and (rate is None) != bool(row.get("problem")):
        yield f"samples_per_second is {rate}, and problem is {row.get('problem')!r}"
    curve = row.get("curve")
    if curve:
        lengths = {key: len(values) for key, values in curve.items() if isinstance(values, list)}
        if len(set(lengths.values())) > 1:
            yield f"the lists of its curve are not equally long: {lengths}"
        steps = curve.get("step", [])
        if any(after <= before for before, after in itertools.pairwise(steps)):
            yield "the steps of its curve do not rise"
    if name == "memory":
        yield from _named(row)


def _named(row: Row) -> Iterator[str]:
    """Check that a row of results/memory.json has its name's settings: `MODEL_METHOD_SCHEME_8x128_checkpointing`."""
    scheme = "nf4-single" if (row["scheme"], row["double_quantization"]) == ("nf4", False) else row["scheme"]
    end = ["checkpointing"] if row["checkpointing"] else []
    words = {
        "grid": [row["model"], row["method"], scheme, f"{row['batch']}x{row['length']}", *end],
        "cpu": ["cpu", row["method"], scheme, *end],
        "t4": ["t4", scheme, f"r{row.get('lora_r')}", row["optimizer"]],
        "alike": ["alike", row["method"], row["precision"]],
        "optimizers": ["optimizer", row["optimizer"]],
    }.get(row.get("group", ""))
    if words and "_".join(words) != row["name"]:
        yield f"its name is {row['name']}, and by its settings it is {'_'.join(words)}"


def _beside(content: Row, rows: Sequence[Row]) -> Iterator[str]:
    """Check that a record's other lists refer only to devices, models etc. that its rows have."""
    for section, lines in content.items():
        if section in ("rows", "commands", "diverged") or not isinstance(lines, list):
            continue
        for line in (line for line in lines if isinstance(line, Mapping)):
            for key in OF_ROWS:
                there = {row[key] for row in rows if row.get(key) is not None}
                if key in line and there and line[key] not in there:
                    yield f"{section}: {key} is {line[key]!r}, and the rows are of {_list(there)}"


def _ends(value: Any, place: str) -> Iterator[tuple[str, str]]:
    """Yield intervals that do not contain their own value."""
    if isinstance(value, Mapping):
        known = [value.get(key) for key in ("low", "value", "high")]
        if all(isinstance(one, (int, float)) for one in known) and known != sorted(known, key=float):  # type: ignore[arg-type]
            yield place, f"{known[1]:.10g} is not within its interval, {known[0]:.10g} to {known[2]:.10g}"
        for key, inner in value.items():
            yield from _ends(inner, f"{place}.{key}" if place else str(key))
    elif isinstance(value, list):
        for number, inner in enumerate(value):
            if isinstance(inner, (Mapping, list)):
                yield from _ends(inner, f"{place}[{number}]")


def _presets(content: Row, where: Callable[[Row], str]) -> Iterator[str]:
    """Check that rows have the model and scheme of their preset, if the kit has that preset."""
    from ..config.names import presets
    from ..config.preset import preset

    known = presets()
    # Runs with --set change the preset on purpose.
    if "--set" in content["command"]:
        return
    if content.get("preset") in known:  # the preset of all rows of results/schemes.json
        theirs = preset(content["preset"]).to_dict()["training"]
        for key, value in content.get("training", {}).items():
            if key in theirs and key not in ("seed", "eval_batch_size") and value != theirs[key]:
                yield f"the record: training.{key} is {value!r}, and the preset {content['preset']} has {theirs[key]!r}"
    for row in content["rows"]:
        if row.get("preset") not in known:
            continue
        spec = preset(row["preset"])
        theirs = {
            "model": spec.model.name,
            "scheme": spec.quantization.scheme,
            "double_quantization": spec.quantization.double_quantization and spec.quantization.scheme != "none",
        }
        for key, value in theirs.items():
            if key in row and row[key] != value:
                yield f"{where(row)}: {key} is {row[key]!r}, and the preset has {value!r}"


def _chosen(path: Path, rows: Sequence[Row], where: Callable[[Row], str]) -> Iterator[str]:
    """Check that tuned runs have the learning rate chosen in tuning.json, in the record's folder."""
    file = path.parent / "tuning.json"
    if not file.is_file():
        return
    try:
        tuning = read_json(file)
        commands = {(row["command"], row["device"], row["preset"]) for row in tuning["rows"]}
        chosen = {(line["preset"], line["device"]): line["tried"] for line in tuning["chosen"]}
    except (KitError, KeyError, TypeError):
        return  # reported when tuning.json itself is checked
    for row in rows:
        if (row["command"], row["device"], row["preset"]) in commands:
            rate = chosen.get((row["preset"], row["device"]), {}).get("training.learning_rate")
            if rate is not None and row.get("learning_rate") != rate:
                yield f"{where(row)}: learning_rate is {row.get('learning_rate')}, and tuning.json chose {rate}"


def _errors(rows: Sequence[Row], where: Callable[[Row], str]) -> Iterator[str]:
    """Check errors of weights against their signal-to-noise ratios: the product is the layer's variance."""
    variances: dict[tuple[Any, ...], list[tuple[float, Row]]] = {}
    for row in rows:
        snr = row.get("snr_db")
        if "draws" in row:
            continue
        if isinstance(snr, Mapping):  # of draws: a mean of logarithms is not quite the logarithm of the mean
            if abs(snr["value"] + 10 * math.log10(row["mse"])) > CLOSE_DB_OF_DRAWS:
                yield f"{where(row)}: snr_db {snr['value']:.6g} is not that of mse {row['mse']:.6g}"
        elif snr is not None and "layer" in row:
            variances.setdefault((row["model"], row["layer"]), []).append((snr + 10 * math.log10(row["mse"]), row))
    for found in variances.values():
        middle = statistics.median(value for value, _ in found)
        for value, row in found:
            if abs(value - middle) > CLOSE_DB:
                yield f"{where(row)}: snr_db {row['snr_db']:.6g} is not that of mse {row['mse']:.6g} in this layer"


def _list(names: Iterable[Any]) -> str:
    return ", ".join(sorted(map(str, names)))
