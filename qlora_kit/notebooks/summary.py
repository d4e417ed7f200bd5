"""What the page says first: five lines on the whole run, and a few on each notebook."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..config.names import presets
from ..metrics.differences import with_interval
from ..metrics.verdict import BASELINE_NAMES, unsure
from ..system.showing import counted, one_line
from .names import size, text_of
from .screen import duration

NO_MEANING = (
    "A smoke run: it shows that everything works, on a few hundred rows and a short training. Its scores mean nothing."
)
SHORT = (
    "A smoke run on your data: the preset {preset} is for seeing that everything works. It reads a few hundred rows "
    "and trains briefly, so these scores say little about what your data allows. For that, choose {instead}."
)
RANDOM = "The base has random weights: memory and time mean something, the scores do not."
# What claims says of a claim, in the order in which they are counted.
_VERDICTS = {
    "holds": "hold",
    "holds in part": "hold in part",
    "does not hold": "do not hold",
    "not told apart here": "not told apart",
    "not measured here": "not measured",
    "no measurement decides": "cannot be measured",
}


def warning(state: Mapping[str, Any], records: Mapping[str, Mapping[str, Any]]) -> str:
    """Return why the scores of a run of notebooks mean nothing, or little; empty if they mean something.

    Args:
        state: What `run.json` holds.
        records: The notebooks' records by name.
    """
    if str(state["preset"]).endswith("_smoke"):
        own = _get(records.get("00_your_data"), "experiment", "data", "name")
        others = [name for name in records if name != "00_your_data" and records[name]]
        if isinstance(own, str) and own != "banking77" and not others:
            preset = str(state["preset"])
            longer = f"{preset.removesuffix('_smoke')}_qlora"
            return SHORT.format(preset=preset, instead=longer if longer in presets() else "one that trains longer")
        return NO_MEANING
    return RANDOM if any(_get(record, "experiment", "model", "random_weights") for record in records.values()) else ""


def five_lines(state: Mapping[str, Any], records: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """Return the five lines on top of the page, in their order: what each is about, and the line.

    Args:
        state: What `run.json` holds.
        records: The notebooks' records by name.

    Returns:
        `score`, `memory`, `claims`, `time`, and `use it` (code; the others are sentences). A line whose notebook has
        not run says so. The user's own data (notebook 00) is told of where notebooks 02 and 03 have not run.
    """
    tested, trained = (_first(records, name, "00_your_data") for name in ("03_evaluate", "02_finetune"))
    return {
        "score": _score(tested) or "notebook 03 measures it, and has not run here",
        "memory": _memory(records.get("04_memory", {}))
        or _peak(trained)
        or "notebook 04 measures it, and has not run here",
        "claims": count_claims(records.get("05_claims", {})) or "notebook 05 judges them, and has not run here",
        "time": _time(state, trained, records),
        "use it": _code(trained) or "notebook 02 fine-tunes, and has not run here",
    }


def notebook_lines(name: str, record: Mapping[str, Any]) -> list[str]:
    """Return one to three sentences on what a notebook found; none for a notebook that is not the kit's.

    Args:
        name: The notebook, e.g. `04_memory`.
        record: What it wrote.
    """
    if name == "00_your_data":
        return [str(record[key]) for key in ("source", "verdict") if isinstance(record.get(key), str)]
    if name == "01_quantization":
        return _quantization(_get(record, "metrics", "quantization") or {})
    if name == "02_finetune":
        return _training(record)
    if name == "04_memory":
        return [line for line in (_memory(record), _race(record.get("times"))) if line]
    if name == "05_claims":
        return [line for line in (count_claims(record),) if line]
    return _search(record.get("search")) if name == "06_search" else []


def count_claims(record: Mapping[str, Any]) -> str:
    """Return how many of the claims hold, hold in part, and so on, as notebook 05's record has them."""
    claims = record.get("claims")
    if not isinstance(claims, list):
        return ""
    found = [row.get("verdict") for row in claims if isinstance(row, Mapping)]
    each = [f"{found.count(verdict)} {words}" for verdict, words in _VERDICTS.items() if verdict in found]
    return f"of {counted(len(found), 'claim')} about QLoRA {', '.join(each)}" if each else ""


def _get(record: Any, *keys: str) -> Any:
    """Return what lies deep in a record, or None: a record may be anything."""
    for key in keys:
        record = record.get(key) if isinstance(record, Mapping) else None
    return record


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def _with_interval(score: Any) -> str:
    value, low, high = (_number(_get(score, key)) for key in ("value", "low", "high"))
    if value is None:
        return ""
    if low is None or high is None:
        return f"{value:.3f}"
    return with_interval({"value": value, "low": low, "high": high}, digits=3)


def _score(record: Mapping[str, Any]) -> str:
    ours = _with_interval(_get(record, "metrics", "test", "f1_macro"))
    if not ours:
        return ""
    beside = [
        f"{words} {found}"
        for key, words in BASELINE_NAMES.items()
        if (found := _with_interval(_get(record, "metrics", "baselines", key, "f1_macro")))
    ]
    name = _get(record, "experiment", "data", "name")
    of = "" if not isinstance(name, str) or name == "banking77" else f" of {one_line(Path(name).name)}"
    line = f"macro F1 {ours} on the test rows{of}; beside it {', '.join(beside) or 'no baseline'}"
    ends = [_number(_get(record, "metrics", "test", "f1_macro", key)) for key in ("low", "high")]
    few = "" if None in ends else unsure({"low": ends[0] or 0.0, "high": ends[1] or 0.0})
    return f"{line}; {few}" if few else line


def _peak(record: Mapping[str, Any]) -> str:
    peak, how = _number(_get(record, "memory", "peak_bytes")), _get(record, "memory", "measure")
    return f"training took {size(peak)} at most" + (f" ({how})" if isinstance(how, str) else "") if peak else ""


def _first(records: Mapping[str, Mapping[str, Any]], *names: str) -> Mapping[str, Any]:
    """Return the first of these records that holds anything."""
    return next((records[name] for name in names if records.get(name)), {})


def _memory(record: Mapping[str, Any]) -> str:
    rows = record.get("rows")
    by_label = {row.get("label"): row for row in rows if isinstance(row, Mapping)} if isinstance(rows, list) else {}
    lora, qlora = by_label.get("LoRA"), by_label.get("QLoRA nf4")
    for key in ("measured", "planned"):
        before, after = _number(_get(lora, key)), _number(_get(qlora, key))
        if before and after:
            shape = f"{qlora.get('batch')} texts of {qlora.get('length')} tokens" if qlora else ""
            less = f"{1 - after / before:.0%} less" if after <= before else f"{after / before - 1:.0%} more"
            return f"a step takes {size(before)} with LoRA, {size(after)} with QLoRA: {less} ({key}; {shape})"
    return ""


def _time(state: Mapping[str, Any], record: Mapping[str, Any], records: Mapping[str, Mapping[str, Any]]) -> str:
    seconds = [_number(entry.get("seconds")) for entry in state["notebooks"].values()]
    ran = "the notebook" if len(seconds) == 1 else "all notebooks"
    whole = f"{ran} took {duration(sum(each or 0 for each in seconds))}"
    trained = _number(_get(record, "timing", "train_seconds"))
    devices = [_get(record, "environment", "device") for record in records.values()]
    device = next((f" on {each}" for each in devices if isinstance(each, str)), "")
    return f"training {text_of(trained, 'seconds')}{device}; {whole}" if trained is not None else f"{whole}{device}"


def _code(record: Mapping[str, Any]) -> str:
    run = _get(record, "run")
    if not isinstance(run, str):
        return ""
    folder = json.dumps(Path(run).as_posix(), ensure_ascii=False)
    return f'import qlora_kit as qk\nqk.load_run({folder}).predict(["a text"]).labels'


def _quantization(found: Mapping[str, Any]) -> list[str]:
    loss, lines = found.get("normal_snr_db"), []
    if isinstance(loss, Mapping):
        ranked = sorted(((value, name) for name, value in loss.items() if _number(value) is not None), reverse=True)
        lines.append("signal to noise on normal weights, more is better: "
                     + ", ".join(f"{name} {value:.1f} dB" for value, name in ranked))  # fmt: skip
    bits = _number(_get(found, "bits_per_parameter", "nf4", "linear"))
    bytes_of = [_number(_get(found, "bits_per_parameter", name, "bytes")) for name in ("none", "nf4")]
    if bits is not None and None not in bytes_of:
        before, after = (size(each or 0) for each in bytes_of)
        lines.append(f"in nf4 a linear layer takes {bits:.3f} bits a weight, and the whole model {after} of {before}")
    return lines


def _training(record: Mapping[str, Any]) -> list[str]:
    lines = []
    score = _with_interval(_get(record, "metrics", "validation", "f1_macro"))
    if score:
        lines.append(f"macro F1 {score} on the validation rows")
    trained, everything = (_number(_get(record, "parameters", key)) for key in ("trainable", "all"))
    if trained and everything:
        lines.append(f"{trained:,.0f} of {everything:,.0f} parameters trained ({trained / everything:.2%})")
    peak, how = _number(_get(record, "memory", "peak_bytes")), _get(record, "memory", "measure")
    seconds = _number(_get(record, "timing", "train_seconds"))
    if peak and seconds is not None:
        lines.append(f"training took {text_of(seconds, 'seconds')} and {size(peak)} of memory"
                     + (f" ({how})" if isinstance(how, str) else ""))  # fmt: skip
    return lines


def _race(times: Any) -> str:
    rows = [row for row in times if isinstance(row, Mapping)] if isinstance(times, list) else []
    each = {row.get("label"): row.get("step_seconds_each") for row in rows}
    known = {label: found for label, found in each.items() if isinstance(found, list) and found}
    if len(known) < 2:
        return ""
    shown = [f"{label} {min(found):.3f} to {max(found):.3f} s" for label, found in known.items()]
    (_, first), *others = known.items()
    overlap = any(min(found) <= max(first) and min(first) <= max(found) for _, found in others)
    return f"a step in turns: {', '.join(shown)}" + (": not told apart, the ranges overlap" if overlap else "")


def _search(search: Any) -> list[str]:
    trials: Sequence[Any] = _get(search, "trials") or ()
    scored = [trial for trial in trials if _number(_get(trial, "f1_macro")) is not None]
    if not scored:
        return []
    best = max(scored, key=lambda trial: float(trial["f1_macro"]))
    parameters = best.get("parameters") or {}
    given = ", ".join(f"{name.rpartition('.')[2].replace('_', ' ')} {text_of(value)}" for name, value in
                      parameters.items())  # fmt: skip
    return [
        f"best of {counted(len(trials), 'trial')}: macro F1 {best['f1_macro']:.4f} on the validation rows, with {given}"
    ]
