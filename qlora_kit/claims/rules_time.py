"""Rules about the time of a step.

Every rule's docstring says which evidence it prefers and why. A single timing is not a comparison. Training times of
jobs that shared a GPU are never read.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from ..system.environment import is_gpu
from .judging import Figure, Finding, in_words, judge_sides, ratio, span, told_apart, unmeasured
from .limits import EXPLAINED, FEWEST_REPEATS, METHODS, RELEVANT
from .records import MEMORY_ALIKE, Pair, Records, grouped, ordered, pairs, short_model


def speed(records: Records) -> Finding:
    """Judge claim 4: compare QLoRA's time with LoRA's, all else equal, if both were timed more than once.

    Evidence, in this order: a GPU (the claim is about one) before a CPU; DialoGPT-medium before another model; this
    machine before another; the reference record before notebook 04. In a race, kernel time and wall time both count.
    Wall time is the time one waits, on a GPU mostly for the host's kernel launches; kernel time is the GPU's work.
    Training times of jobs that shared a GPU are never read.

    `told_apart` judges each comparison; a single timing is not one. Notebook 04's rounds on this machine decide only
    where the ranges of the two do not overlap: else a second run of the notebook could turn the verdict. They are shown
    beside it, and the reason says why they do not decide. Without any other evidence the claim is undecided then.

    The claim holds if QLoRA is faster in all, in part if in some. If it is faster in none, the claim fails if QLoRA is
    not faster in some, else it is undecided. If other evidence disagrees, the reason says so.
    """
    here = _times_here(records)
    told = [item for item in here if told_apart(item[1]) != "not told apart"]
    overlapping = [figure for _, figure in here if told_apart(figure) == "not told apart"]
    tiers = _tiers(records, [*_raced(records, "LoRA", _qlora_and_lora), *told])
    if tiers:
        finding = _finding_of_times("QLoRA", "LoRA", tiers, records)
    elif overlapping:
        return _finding_of_times("QLoRA", "LoRA", [overlapping], records)
    else:
        command = "make run-notebooks NOTEBOOKS=04"
        return unmeasured("no record has QLoRA and LoRA timed repeatedly on one device", command)
    if overlapping:
        reason = (
            f"{finding.reason}. Notebook 04's rounds on {_devices(overlapping)} decide nothing: the ranges of the two "
            f"overlap (QLoRA is {in_words(overlapping)[1]})"
        )
        finding = dataclasses.replace(finding, reason=reason, beside=(*finding.beside, *overlapping))
    return finding


def half_precision(records: Records) -> Finding:
    """Judge claim 19: compare the kernel times in fp16 and fp32 on a GPU, all else equal.

    Evidence: kernel times of one command of benchmarks/speed.py, because the claim is about computing. Wall times are
    not read: two precisions are two races, and waiting for the host differs between them. A CPU decides nothing: it
    cannot train in fp16, and the claim is about a T4.
    """
    found = [item for item in _raced(records, "fp32", _fp16_and_fp32, "command") if _is_kernels(item[1])]
    tiers = [tier for tier in _tiers(records, found) if is_gpu(tier[0].device)]
    if not tiers:
        command = (
            "python benchmarks/speed.py --models dialogpt-medium --batches 8 --methods qlora --contenders ours_eager "
            "ours --precisions fp32 fp16 --append"
        )
        return unmeasured("nobody has raced fp16 and fp32 on a GPU", command)
    return _finding_of_times("fp16", "fp32", tiers, records)


def paging_time(records: Records) -> Finding:
    """Judge claim 20: compare the step times of an optimizer with pages and the same one without.

    Evidence: results/paging.json, which times both in turns on a GPU, `FEWEST_REPEATS` times or more. Steps in
    results/memory.json were timed only once each: they are shown, but decide nothing.
    """
    found, beside = [], []
    alike = ("model", "method", "scheme", "batch", "length")
    rows = [row for row in records.rows("paging") if len(row.get("step_seconds_each") or ()) >= FEWEST_REPEATS]
    for group in grouped([row for row in rows if is_gpu(row["device"])]).values():
        for first, second in pairs(group, {"paged": True}, {"paged": False}, *alike):
            name = f"{first['model']}, {METHODS.get(first['method'], first['method'])}: a step in pages"
            each = (row["step_seconds_each"] for row in (first, second))
            value = ratio(*((float(np.median(times)), min(times), max(times)) for times in each))
            found.append(Figure(f"{name}, times without", unit="", device=first["device"],
                                source="results/paging.json", **value))  # fmt: skip
    once = [row for row in records.rows("memory") if row.get("step_seconds") and row["method"] == "full"]
    for cells in grouped(
        once, *(key for key in MEMORY_ALIKE if key != "optimizer"), "checkpointing", "scheme"
    ).values():
        for row in cells:
            for other in cells:
                if row["optimizer"] == f"paged_{other['optimizer']}":
                    name = f"{row['model']}, {row['optimizer']}: a step, times that without pages, timed once"
                    value = row["step_seconds"] / other["step_seconds"]
                    beside.append(Figure(name, value, "", row["device"], "results/memory.json"))
    if not found:
        missing = "no record has the same optimizer in pages and outside of them timed repeatedly on a GPU"
        if beside:
            missing += (
                f" (timed once each, a step in pages took {span([one.value for one in beside], '')} times as long)"
            )
        return unmeasured(missing, "python benchmarks/paging.py --append", beside)
    decisive = records.preferred(found)
    verdict, words = in_words(decisive, "the other")
    return Finding(verdict, f"a step with the optimizer's state in pages is {words}", tuple(decisive), tuple(beside))


def _finding_of_times(who: str, other: str, tiers: Sequence[Sequence[Figure]], records: Records) -> Finding:
    """Judge the first tier of times; if a later tier disagrees, the reason says so."""
    first = tiers[0]
    # Older rows have the profiler's sum of kernel times; newer rows have the GPU's busy time and say so.
    devices = {one.device for one in first if _is_kernels(one)}
    summed = any(
        row.get("device_seconds") and row.get("device_seconds_means") != "busy" and row["device"] in devices
        for row in records.rows("speed")
    )
    verdict = judge_sides({"faster": 1, "not faster": -1, "not told apart": 0}[told_apart(one)] for one in first)
    reason = f"on {_devices(first)} {who} is {_told(first, other)}"
    if summed:
        reason += ". These kernels' times are sums, in which kernels that ran side by side count twice"
    for tier in tiers[1:]:
        found, words = in_words(tier, other)
        if found != verdict:
            same = _devices(tier) == _devices(first)
            reason += f". {tier[0].source} disagrees: on {_devices(tier)} {who} is {words}. " + (
                "One device, timed on two occasions: what else ran on it is in both"
                if same
                else "Other devices: on a GPU short steps wait for the host, and there the method hardly shows"
            )
    later = [figure for tier in tiers[1:] for figure in tier]
    return Finding(verdict, reason, tuple(first), tuple(later))


def _told(figures: Sequence[Figure], other: str) -> str:
    """Say what times show, separately for kernels and wall time if there are both."""
    kernels = [one for one in figures if _is_kernels(one)]
    wall = [one for one in figures if one not in kernels]
    if not kernels or not wall:
        return in_words(figures, other)[1]
    return f"by kernels {in_words(kernels, other)[1]}; by wall time {in_words(wall, other)[1]}"


def _is_kernels(figure: Figure) -> bool:
    return f", {_KERNELS}: " in figure.name


def _devices(figures: Iterable[Figure]) -> str:
    return ", ".join(dict.fromkeys(figure.device for figure in figures))


_KERNELS = "kernels"


def _tiers(records: Records, found: Iterable[tuple[bool, Figure]]) -> list[list[Figure]]:
    """Sort times into tiers: a GPU first, then the explained model, this machine, a reference record."""
    tiers: dict[tuple[bool, ...], list[Figure]] = {}
    for explained, figure in found:
        rank = (
            not is_gpu(figure.device), not explained, figure.device != records.device, figure.source[:8] != "results/",
        )  # fmt: skip
        tiers.setdefault(rank, []).append(figure)
    return [tiers[rank] for rank in sorted(tiers)]


def _qlora_and_lora(group: Sequence[Mapping[str, Any]], alike: Sequence[str]) -> list[Pair]:
    qlora = {"method": "qlora", "scheme": "nf4"}
    return pairs(group, qlora, {"method": "lora", "scheme": "none"}, *alike, "precision")


def _fp16_and_fp32(group: Sequence[Mapping[str, Any]], alike: Sequence[str]) -> list[Pair]:
    return pairs(group, {"precision": "fp16"}, {"precision": "fp32"}, *alike, "method", "scheme")


def _raced(records: Records, other: str, pair_up: Any, within: str = "race") -> list[tuple[bool, Figure]]:
    """Return ratios of times of pairs within a race or a command: wall times and kernel times of a step.

    Each comes with whether it is of the explained model.
    """
    found = []
    rows = [{**row, "race": row.get("race") or row.get("command")} for row in records.rows("speed")]
    alike = ("model", "contender", "batch", "padding", "optimizer", within, "device_seconds_means")
    for group in grouped(rows).values():
        for first, second in pair_up(group, alike):
            explained = short_model(first["model"]) == EXPLAINED
            for key, kind in (("device_seconds", _KERNELS), ("step_seconds", "wall time")):
                if first.get(key) and second.get(key):
                    name = f"{first['model']}, {first['contender']}, batch {first['batch']}, {kind}: times {other}'s"
                    sides = ((row[key], *_range_of(row, key)) for row in (first, second))
                    figure = Figure(name, unit="", device=first["device"], source="results/speed.json", **ratio(*sides))
                    place = (kind != _KERNELS, first["model"], first["contender"], first["batch"], figure.value)
                    found.append((place, explained, figure))
    return [(explained, figure) for _, explained, figure in sorted(found, key=lambda item: item[0])]


def _range_of(row: Mapping[str, Any], key: str) -> tuple[float, float]:
    """Return the shortest and longest of a row's repeats; without repeats, a range `RELEVANT` wide around the value.

    For kernel times a row has only the mean.
    """
    seconds = row[key]
    if key == "device_seconds" or not (row.get("samples_per_second_range") and row.get("samples_per_second")):
        return seconds * (1 - RELEVANT / 2), seconds * (1 + RELEVANT / 2)
    low, high = row["samples_per_second_range"]
    return seconds * row["samples_per_second"] / high, seconds * row["samples_per_second"] / low


def _times_here(records: Records) -> list[tuple[bool, Figure]]:
    """Return QLoRA's time divided by LoRA's in notebook 04, whose `times` have every repeat."""
    record, device = records.notebook("04_memory")
    model = short_model(record.get("experiment", {}).get("model", {}).get("name", ""))
    times = [row for row in ordered(record.get("times", [])) if len(row["step_seconds_each"]) >= FEWEST_REPEATS]
    found = []
    lora = {"method": "lora", "scheme": "none"}
    for first, second in pairs(times, {"method": "qlora", "scheme": "nf4"}, lora, "batch", "length"):
        name = f"{model}, batch {first['batch']} x {first['length']}, wall time: times LoRA's"
        each = (row["step_seconds_each"] for row in (first, second))
        value = ratio(*((float(np.median(values)), min(values), max(values)) for values in each))
        found.append((model == EXPLAINED, Figure(name, unit="", device=device, source="04_memory.json", **value)))
    return found
