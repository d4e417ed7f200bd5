"""Compute speed, memory, quantization errors and mutation scores again from raw values."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from . import packing
from .record import CLOSE_FP32, Record, in_words, mean_with_interval

PADDING = {"unsloth": ("grouped", "longest")}  # padding that a contender's own code can use


def speed(book: Record) -> None:
    """Compute rates and times from the seconds of each repeat, and limits from operations and bytes."""
    for row in book.rows:
        where = book.where(row)
        allowed = PADDING.get(row["contender"])
        if allowed and row["padding"] not in allowed:
            book.say(f"{where}: padding is recorded as {row['padding']}, and {row['contender']}'s is {allowed[0]}")
        if row["samples_per_second"] is None:
            continue
        seconds = row.get("repeats_seconds")
        if not seconds:
            low, high = row["samples_per_second_range"]
            if not low <= row["samples_per_second"] <= high:
                book.say(f"{where}: samples_per_second {row['samples_per_second']} is not within its range")
            book.lacks(row, "rows without the seconds of each repeat")
            continue
        book.same(where, "repeats", row["repeats"], len(seconds))
        rates = [n / s for n, s in zip(row["repeats_samples"], seconds, strict=True)]
        book.same(where, "samples_per_second", row["samples_per_second"], statistics.median(rates))
        book.same(where, "samples_per_second_range", row["samples_per_second_range"], [min(rates), max(rates)])
        step = statistics.median(second / row["steps"] for second in seconds)
        book.same(where, "step_seconds", row["step_seconds"], step)
        tokens = [n / s for n, s in zip(row["repeats_tokens"], seconds, strict=True)]
        book.same(where, "tokens_per_second", row["tokens_per_second"], statistics.median(tokens))
    for line in book.content.get("limit", []):
        where = "limit of " + in_words({name: line[name] for name in ("model", "method", "precision", "batch")})
        least = max(line["flops"] / line["flops_per_second"], line["bytes"] / line["bytes_per_second"])
        book.same(where, "seconds", line["seconds"], least)
        book.same(where, "samples_per_second", line["samples_per_second"], line["batch"] / least)


def inference(book: Record) -> None:
    """Compute latencies and rates from the time of each call."""
    for row in book.rows:
        if row["samples_per_second"] is None:
            continue
        if not row.get("call_nanoseconds"):
            book.lacks(row, "rows without the time of each call")
            continue
        where = book.where(row)
        figures = latencies(packing.unpack(row["call_nanoseconds"]), row["repeats"], row["batch"])
        for key, value in figures.items():
            book.same(where, key, row[key], value)


def latencies(nanoseconds: Any, repeats: int, batch: int) -> dict[str, float]:
    """Return the latencies and the rate in a row of results/inference.json.

    Args:
        nanoseconds: The time of each call, whole numbers `[repeats * calls]`, one repeat after the other.
        repeats: How often all calls were made.
        batch: Texts in each call.

    Returns:
        `latency_seconds_p50` and `latency_seconds_p95` over all calls, and `samples_per_second`, the median over the
        repeats.
    """
    import numpy as np

    seconds = [int(value) / 1e9 for value in nanoseconds]
    calls = len(seconds) // repeats
    turns = [seconds[start : start + calls] for start in range(0, len(seconds), calls)]
    return {
        "latency_seconds_p50": statistics.median(seconds),
        "latency_seconds_p95": float(np.quantile(seconds, 0.95)),
        "samples_per_second": statistics.median(batch * calls / sum(turn) for turn in turns),
    }


def exports(book: Record) -> None:
    """Compute latencies and rates of results/export.json from the time of each call."""
    for row in book.rows:
        if row["samples_per_second"] is None:
            continue
        if not row.get("one_nanoseconds") or not row.get("batch_nanoseconds"):
            book.lacks(row, "rows without the time of each call")
            continue
        for key, value in exported(row).items():
            book.same(book.where(row), key, row[key], value)


def exported(row: Mapping[str, Any]) -> dict[str, float]:
    """Return the latencies of one text and the rate with 64 at once of a row of results/export.json.

    Args:
        row: With the packed `one_nanoseconds` and `batch_nanoseconds`, and `repeats`.
    """
    one = latencies(packing.unpack(row["one_nanoseconds"]), row["repeats"], 1)
    many = latencies(packing.unpack(row["batch_nanoseconds"]), row["repeats"], 64)
    return {**one, "samples_per_second": many["samples_per_second"]}


def int4_step(book: Record) -> None:
    """Compute medians, quartiles and the share of NF4's time from the seconds of each repeat."""
    groups = book.groups("model", "length", "precision", "batch", "device")
    for row in book.rows:
        where = book.where(row)
        seconds = row.get("repeats_seconds")
        if seconds:
            book.same(where, "step_seconds", row["step_seconds"], statistics.median(seconds))
            quartiles = statistics.quantiles(seconds, n=4)[::2] if len(seconds) > 1 else seconds * 2
            book.same(where, "step_seconds_quartiles", row["step_seconds_quartiles"], quartiles)
            book.same(where, "repeats", row["repeats"], len(seconds))
        else:
            book.lacks(row, "rows without the seconds of each repeat")
        key = tuple(row.get(name) for name in ("model", "length", "precision", "batch", "device"))
        nf4 = next((other for other in groups[key] if other["contender"] == "nf4"), None)
        if nf4 is not None:
            book.same(where, "times_nf4", row["times_nf4"], row["step_seconds"] / nf4["step_seconds"])


def t4(book: Record) -> None:
    """Compute the step time, rates and the time of all epochs from the seconds of each repeat."""
    for row in book.rows:
        where = book.where(row)
        seconds = row.get("repeats_seconds")
        if seconds:
            step = statistics.median(seconds) / row["steps_a_repeat"]
            book.same(where, "step_seconds", row["step_seconds"], step)
        else:
            book.lacks(row, "rows without the seconds of each repeat")
        # If all steps were measured, seconds and samples come from the Trainer itself, without evaluations.
        if not row["measured"]:
            book.same(where, "samples_per_second", row["samples_per_second"], row["batch"] / row["step_seconds"])
            if "epochs_steps" in row:
                whole = row["epochs_steps"] * row["step_seconds"]
                book.same(where, "epochs_seconds", row["epochs_seconds"], whole)


def memory(book: Record) -> None:
    """Compare planned and measured memory, and compute the step time."""
    for row in book.rows:
        where = book.where(row)
        known = row["peak_bytes"] is not None
        ratio = row["planned_bytes"] / row["peak_bytes"] - 1 if known else None
        book.same(where, "difference", row["difference"], ratio)
        book.same(where, "fits", row["fits"], known)
        book.same(where, "planned_bytes", row["planned_bytes"], sum(row["planned_parts"].values()))
        each, key = (
            row.get("step_seconds_each"),
            "step_seconds" if "shared_step_seconds" not in row else "shared_step_seconds",
        )
        if each:
            book.same(where, key, row[key], sorted(each)[len(each) // 2])
        elif row[key] is not None:
            book.lacks(row, "rows without the seconds of each step")


def paging(book: Record) -> None:
    """Compute the step time from the seconds of each turn."""
    for row in book.rows:
        each = row["step_seconds_each"]
        book.same(book.where(row), "step_seconds", row["step_seconds"], statistics.median(each) if each else None)


def soak(book: Record) -> None:
    """Compute memory growth from the recorded memory sizes."""
    for row in book.rows:
        where, memory = book.where(row), row["memory"]
        for key, start in (("growth_percent", row["from_step"]), ("second_half_growth_percent", row["steps"] // 2)):
            first = next(entry for entry in memory if entry["step"] >= start)
            grown = {name.removesuffix("_bytes"): 100 * (memory[-1][name] / first[name] - 1)
                     for name in first if name != "step"}  # fmt: skip
            book.same(where, key, row[key], grown)


def waiting(book: Record) -> None:
    """Compute the step times from the steps and seconds of each turn."""
    for row in book.rows:
        where = book.where(row)
        each = [turn["seconds"] / turn["steps"] for turn in row["turns"]]
        book.same(where, "repeats", row["repeats"], len(each))
        book.same(where, "step_seconds", row["step_seconds"], statistics.median(each))
        book.same(where, "step_seconds_range", row["step_seconds_range"], [min(each), max(each)])
        book.same(where, "samples_per_second", row["samples_per_second"], row["batch"] / row["step_seconds"])


def mutation(book: Record) -> None:
    """Count the kinds of mutants, and compute the share that tests noticed."""
    for row in book.rows:
        where = f"module={row['module']}"
        kinds = {name: row[name] for name in ("killed", "timed_out", "survived", "unreached", "other")}
        book.same(where, "tried", row["tried"], sum(kinds.values()))
        noticed = (kinds["killed"] + kinds["timed_out"]) / row["tried"] if row["tried"] else None
        book.same(where, "score", row["score"], noticed)
        book.same(where, "survivors (how many)", len(row["survivors"]), kinds["survived"] + kinds["unreached"])


def quantization(book: Record) -> None:
    """Compute perplexities, distances and errors from the recorded losses, distances and draws."""
    from ..claims.judging import seed_interval
    from ..quantization.loss import lloyd_max, perplexity

    losses = {}
    for row in book.rows:
        if row["subject"] == "perplexity" and not row["double_quantization"]:
            losses[row["weights"], row["text"], row["scheme"]] = _fp64(row["window_losses"])
    for row in book.rows:
        where = book.where(row)
        if row["subject"] == "perplexity":
            own = _fp64(row["window_losses"])
            book.metric(where, "perplexity", row["perplexity"], perplexity(own), CLOSE_FP32)
            for key, scheme in (("ratio", "none"), ("ratio_to_int4", "int4")):
                against = losses.get((row["weights"], row["text"], scheme))
                if against is not None:
                    book.metric(where, key, row[key], perplexity(own, against), CLOSE_FP32)
        elif row["subject"] == "embedding":
            if "distances" in row:
                distances = packing.unpack(row["distances"])
                book.metric(where, "cosine_distance", row["cosine_distance"], mean_with_interval(distances), CLOSE_FP32)
                book.same(where, "texts", row["texts"], len(distances))
            else:
                book.lacks(row, "rows without the distance of each text")
        elif row["subject"] == "normal" and "block_size" in row:
            if "draws" in row:
                book.metric(where, "snr_db", row["snr_db"], seed_interval(row["draws"]["snr_db"]) or {}, CLOSE_FP32)
                book.same(where, "mse", row["mse"], statistics.fmean(row["draws"]["mse"]))
                book.same(where, "max_error", row["max_error"], max(row["draws"]["max"]))
            else:
                book.lacks(row, "rows without the value of each draw")
        if row["subject"] == "normal" and row["scheme"] == "lloyd_max":
            levels = round(2 ** row["bits_per_parameter"])
            if levels > 64 and not book.thorough:  # takes seconds each
                continue
            mse = lloyd_max(levels)[1]
            book.same(where, "mse", row["mse"], mse, CLOSE_FP32)
            book.same(where, "snr_db", row["snr_db"], -10 * math.log10(mse), CLOSE_FP32)


def _fp64(values: Sequence[float]) -> Any:
    import torch

    return torch.tensor(values, dtype=torch.float64)
