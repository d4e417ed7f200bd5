"""What the keys of records are called on the page, and in which unit their numbers are."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from .screen import duration

NAMES = {
    # scores
    "f1_macro": "macro F1",
    "f1_weighted": "weighted F1",
    "test": "fine-tuned, test",
    "test_without_leaked": "fine-tuned, test without leaked texts",
    "validation": "fine-tuned, validation",
    "tfidf_svm": "baseline: TF-IDF + linear SVM",
    "embedding_svm": "baseline: frozen embeddings + linear SVM",
    # time and memory
    "train_seconds": "training",
    "total_seconds": "in all",
    "evaluation_seconds": "evaluation",
    "step_seconds": "a step",
    "samples_per_second": "texts a second",
    "tokens_per_second": "tokens a second",
    "resumed_from_step": "went on from step",
    "peak_bytes": "peak memory",
    "reserved_bytes": "memory reserved",
    "planned_bytes": "memory planned",
    "measure": "memory measured as",
    "parts_against_whole": "parts and whole, at most apart",
    "trainable": "trained parameters",
    "all": "all parameters",
    # 00_your_data
    "source": "where it comes from",
    "run": "run folder",
    # 01_quantization
    "quantization": "Sixteen numbers, and what they lose",
    "lloyd_max_snr_db": "best sixteen fixed numbers, dB",
    "double_quantization_error_growth": "error added by double quantization",
    "block_size": "weights that share a scale",
    "samples": "random weights drawn",
    "perplexity_measured_here": "perplexity measured here",
    "agrees_with_bitsandbytes": "same bits as bitsandbytes",
    "normal_snr_db": "signal to noise on normal weights, dB",
    "normal_mse": "squared error on normal weights",
    "perplexity_ratio": "perplexity, times that without quantization",
    "layers": "The model's own layers",
    "count": "layers",
    "nf4_ahead_of_int4": "layers in which NF4 is ahead of int4",
    "median_snr_db": "signal to noise in the middle layer, dB",
    "bits_per_parameter": "What the model takes",
    "linear": "linear layers, bits a weight",
    "whole": "whole model, bits a weight",
    "bytes": "size",
    # 02_finetune
    "weights": "What is stored how",
    "stored_as": "stored as",
    # 04_memory
    "rows": "The methods, one by one",
    "label": "method",
    "method": "kind",
    "planned": "planned",
    "counted": "sum of the parts",
    "measured_parts": "measured, by part",
    "parts": "planned, by part",
    "times": "LoRA and QLoRA in turns",
    "step_seconds_each": "a step in each round",
    "steps": "steps a round",
    "crossing": "From which size on a method does not fit",
    "limits": "The largest models that fit",
    "reach": "How far the GPU reaches",
    "device_bytes": "memory of the device",
    "double_quantization": "scales in 8 bits",
    "length": "length, tokens",
    "longest": "longest text, tokens",
    "batch": "batch, texts",
    # 05_claims
    "claims": "The claims",
    "figures": "The figures behind them",
    "margin": "counts as level, macro F1",
    "says": "who says it",
    "command": "to measure it",
    "decided": "it decided",
    # 06_search
    "search": "The search",
    "space": "What may be tried",
    "trials": "The trials",
    "metric": "chosen by",
}
"""Words for the keys whose own name says too little. The others are shown as they are, with spaces."""

UNITS = {
    **dict.fromkeys(
        ("bytes", "planned", "measured", "counted", "reserved", "paged", "parts", "measured_parts"), "bytes"
    ),
    **dict.fromkeys(("step_seconds_each", "seconds"), "seconds"),
    **dict.fromkeys(("parts_against_whole", "double_quantization_error_growth"), "share"),
}
"""Units of the keys that do not end with theirs."""

NONE = "–"


def words(name: str) -> str:
    """Return a record's key in words."""
    if name in NAMES:
        return NAMES[name]
    said = re.sub(r"_(bytes|seconds)$", "", str(name)).replace("_", " ")
    for plain, written in (("snr db", "SNR, dB"), ("mse", "MSE"), ("lloyd max", "Lloyd-Max")):
        said = re.sub(rf"\b{plain}\b", written, said)
    return said


def unit_of(key: str) -> str:
    """Return the unit of a key's numbers: `bytes`, `seconds`, `share`, or nothing."""
    ending = key.rpartition("_")[2]
    return UNITS.get(key, ending if ending in ("bytes", "seconds") else "")


def size(value: float) -> str:
    """Return bytes in the unit in which they are easiest to read: `412 B`, `3.4 MiB`, `12.7 GiB`."""
    for unit, least in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if abs(value) >= least:
            return f"{value / least:,.1f} {unit}"
    return f"{value:,.0f} B"


def text_of(value: Any, unit: str = "") -> str:
    """Return one value as text with its unit.

    Args:
        value: A number, text, flag, or None.
        unit: What `unit_of` returned for its key.
    """
    if value is None:
        return NONE
    if isinstance(value, bool):
        return "yes" if value else "no"
    if not isinstance(value, (int, float)):
        return str(value)
    if unit == "bytes":
        return size(value)
    if unit == "seconds":
        return duration(value) if value >= 10 else f"{value:.3g} s"
    if unit == "share":
        return f"{value:.2%}"
    if isinstance(value, int):
        return f"{value:,}" if abs(value) >= 10_000 else str(value)
    if abs(value) < 0.01:
        return f"{value:.3g}"
    return f"{value:.4f}" if abs(value) < 10 else f"{value:,.1f}" if abs(value) < 1e6 else f"{value:,.0f}"


def figure_row(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return a row of a claim's figures with its number as text: `value`, `low`, `high` and `unit` become one."""
    if not {"value", "unit", "low", "high"} <= set(row) or not isinstance(row["value"], (int, float)):
        return dict(row)
    from ..claims.judging import number, span

    text = number(row["value"], row["unit"])
    if row["low"] is not None and row["high"] is not None:
        text += f" ({span((row['low'], row['high']), row['unit'])})"
    if row["unit"] not in ("", "bytes", "share", "seconds", "macro F1"):
        text += f" {row['unit']}"
    shown = {}
    for key, value in row.items():
        if key not in ("low", "high", "unit"):
            shown[key] = text if key == "value" else value
    return shown
