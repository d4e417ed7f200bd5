"""Figures of cost: speed, memory, parameters."""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from .style import (
    BLACK,
    BLUE,
    GREEN,
    GREY,
    METHOD_NAMES,
    ORANGE,
    PALE,
    PINK,
    RED,
    SKY,
    YELLOW,
    KitFigure,
    bytes_unit,
    new,
    short_device,
    shortened,
    styled,
)

if TYPE_CHECKING:
    from ..models.parts import Part

CONTENDER_NAMES = {
    "recipe": "explained recipe",
    "recipe_fp16_reentrant": "the same in fp16, reentrant",
    "recipe_lean": "the same with less memory",
    "padded_longest": "Trainer, padded to the longest",
    "grouped": "Trainer, grouped by length",
    "compiled": "Trainer, torch.compile",
    "compiled_graphs": "torch.compile with CUDA graphs",
    "compiled_graphs_dynamic": "the same, compiled once",
    "unsloth": "unsloth",
    "ours_eager": "qlora_kit, eager",
    "ours": "qlora_kit",
}


def races(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    """Group rows of results/speed.json by race: contenders that were timed against each other.

    Args:
        rows: Rows of the record. Older rows have no `race`: they raced the rows of the same command, model, precision,
            batch and device.

    Returns:
        The rows of each race, by its name.
    """
    found: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        older = ", ".join(str(row.get(key, "")) for key in ("model", "precision", "batch", "device", "command"))
        found.setdefault(row.get("race") or older, []).append(row)
    return found


@styled
def speed(rows: Sequence[Mapping[str, Any]], limits: Sequence[Mapping[str, Any]] = ()) -> KitFigure:
    """Draw the texts a second of each way of training, and the rate that its kernels alone would allow.

    Args:
        rows: Rows of results/speed.json; rows without a speed have the reason in `problem`.
        limits: The record's `limit`: drawn as a dashed line in the panel that it belongs to.

    Returns:
        A panel for each race (see `races`) and method, grouped by device, each on its own scale; longer is faster. A
        contender without a rival of the same method is drawn in the other method's panel. If the kernels were timed,
        each contender has a second bar: its speed if the GPU never waited for its host.
    """
    panels: list[list[Mapping[str, Any]]] = []
    for raced in races(rows).values():
        methods = Counter(row["method"] for row in raced)
        crowd = [method for method, count in methods.items() if count > 1] or list(methods)[:1]
        alone = [row for row in raced if row["method"] not in crowd]
        for method in crowd:
            panels.append([row for row in raced if row["method"] == method] + (alone if method == crowd[0] else []))
    panels = [panel for panel in panels if len(panel) > 1] or panels
    # Quantized first: it is the figure's main subject.
    firsts = [panel[0] for panel in panels]
    order = [(first["device"], first["model"], first["method"] != "qlora", first["batch"]) for first in firsts]
    panels = [panel for _, panel in sorted(zip(order, panels, strict=True), key=lambda pair: pair[0])]
    heights = [1.9 + sum(0.62 if row.get("device_seconds") else 0.36 for row in panel) for panel in panels]
    figure, axes = new(height=sum(heights), rows=len(panels), squeeze=False, height_ratios=heights)
    for panel, place in zip(panels, axes[:, 0], strict=True):
        _race(place, panel, limits)
    return figure


def _race(axes: Axes, panel: Sequence[Mapping[str, Any]], limits: Sequence[Mapping[str, Any]]) -> None:
    """Draw one panel of `speed`."""
    first = panel[0]
    precision = Counter(row["precision"] for row in panel).most_common(1)[0][0]
    order = list(CONTENDER_NAMES)
    # A row of another method than the panel's comes right after the same contender.
    shown = sorted(
        (row for row in panel if row["contender"] in CONTENDER_NAMES),
        key=lambda row: (order.index(row["contender"]), row["method"] != first["method"]),
    )
    timed = any(row.get("device_seconds") for row in shown)
    baseline = next((row for row in shown if row["contender"] == "recipe"), {})
    rates = {id(row): (row.get("samples_per_second"), _kernel_rate(row)) for row in shown}
    most = max([rate or 0.0 for pair in rates.values() for rate in pair]) or 1.0
    before = (baseline.get("samples_per_second"), _kernel_rate(baseline))
    height = 0.38 if timed else 0.6
    for place, row in enumerate(shown):
        wall, kernels = rates[id(row)]
        problem = row.get("problem") or ""
        colour = BLUE if row["contender"].startswith("ours") else GREY
        if not wall:
            text = problem if problem.startswith("not ready") else "could not run"
            axes.annotate(text, (0, place), (6, 0), textcoords="offset points", va="center", fontsize=11)
            continue
        low, high = row.get("samples_per_second_range") or (wall, wall)
        at = place - (height / 2 if timed else 0)
        axes.barh(at, wall, height=height, color=colour)
        axes.plot([low, high], [at, at], color=BLACK, linewidth=1)
        _told(axes, at, high, wall, before[0] if row is not baseline else None)
        if kernels:
            at = place + height / 2
            axes.barh(at, kernels, height=height, color="white", edgecolor=colour, hatch="////", linewidth=1)
            _told(axes, at, kernels, kernels, before[1] if row is not baseline else None)
    note = "texts a second"
    if timed:
        added = any(row.get("device_seconds") and row.get("device_seconds_means") != "busy" for row in shown)
        note += "; hatched: by its kernels alone"
        note += "\n(kernels side by side counted twice)" if added else ""
    for limit in limits:
        same = all(limit[key] == first[key] for key in ("model", "method", "batch", "device"))
        if same and limit["precision"] == precision:
            bound = limit["samples_per_second"]
            if bound < 2.5 * most:
                axes.axvline(bound, color=ORANGE, linestyle="--", linewidth=1.5)
            note += f"\n(limit of the arithmetic: {bound:,.0f})"
    axes.set_xlabel(note, fontsize=11)
    what = f"{first['model']}, {METHOD_NAMES[first['method']]}, {precision}, batch {first['batch']}"
    axes.set_title(f"{what}\n{_host(first)}", loc="left", fontsize=11)
    axes.set_yticks(range(len(shown)), [_contender(row, first["method"]) for row in shown], fontsize=11)
    axes.set_ylim(len(shown) - 0.4, -0.6)
    axes.margins(x=0.42 if timed else 0.3)
    axes.set_xlim(left=0)
    axes.xaxis.set_major_locator(MaxNLocator(4))
    axes.grid(axis="y", visible=False)


def _kernel_rate(row: Mapping[str, Any]) -> float | None:
    """Return the texts a second that a row's kernel time alone would allow."""
    seconds = row.get("device_seconds")
    return row["batch"] / seconds if seconds else None


def _told(axes: Axes, at: float, end: float, rate: float, before: float | None) -> None:
    """Write a bar's rate beside it, and its ratio to the recipe's rate."""
    times = f" ({rate / before:.3g}x)" if before else ""
    axes.annotate(f"{rate:,.0f}{times}", (end, at), (6, 0), textcoords="offset points", va="center", fontsize=11)


def _contender(row: Mapping[str, Any], method: str) -> str:
    other = "" if row["method"] == method else f", {METHOD_NAMES[row['method']]}"
    return CONTENDER_NAMES[row["contender"]] + other


def _host(row: Mapping[str, Any]) -> str:
    """Return a row's device and, for a GPU, the host CPU that launches its kernels."""
    environment, device = row.get("environment") or {}, short_device(row["device"])
    if device == "CPU":
        return str(row["device"])
    host = environment.get("host") or {}
    cpu = f"{host['cpu']}, {host['cores']} cores" if host else environment.get("cpu")
    if not cpu:
        return device
    threads = host.get("threads") or environment.get("threads")
    host_line = f"host: {cpu}" + (f", {threads} thread{'s' * (threads != 1)}" if threads else "")
    short = host_line.replace("(R)", "").replace("(TM)", "").replace(" Processor", "")
    return f"{device}\n{textwrap.fill(short, 38)}"


# ---- what a model is made of ----


@styled
def anatomy(parts: Sequence[Part]) -> KitFigure:
    """Draw the bytes of each part of a model, beside the bytes of the same numbers in 32 bits.

    Args:
        parts: What `anatomy.anatomy` returned.

    Returns:
        A bar for each part: quantized, frozen unchanged, or trained.
    """
    shown = [part for part in parts if part.name != "base, buffers"]
    figure, axes = new(height=1.5 + 0.55 * len(shown))
    widest = max(max(part.bytes, 4 * part.parameters) for part in shown) / 2**20
    labelled: set[str] = set()

    def bar(place: int, width: float, kind: str, **look: Any) -> None:
        axes.barh(place, width, height=0.62, label=None if kind in labelled else kind, **look)
        labelled.add(kind)

    for place, part in enumerate(shown):
        full, size = 4 * part.parameters / 2**20, part.bytes / 2**20
        if full > size:
            bar(place, full, "the same in 32 bits", color="white", edgecolor=GREY, linestyle="--")
        if part.trained:
            bar(place, size, "trained", color=GREEN)
        elif part.stored_as.endswith("bits"):
            bar(place, size, "frozen, quantized", color=BLUE)
        else:
            bar(place, size, "frozen, as it was", color=GREY)
        bits = f"{part.bits_per_parameter:.2f}".rstrip("0").rstrip(".")
        axes.text(max(full, size) + widest * 0.015, place, f"{size:,.1f} MiB, {bits} bits", va="center", fontsize=11)
    axes.set_yticks(range(len(shown)), [part.name for part in shown])
    axes.invert_yaxis()
    axes.set_xlim(0, widest * 1.42)
    axes.grid(axis="y", visible=False)
    axes.set_xlabel("MiB")
    axes.set_title("What the model's weights take")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return figure


# ---- memory ----

PART_COLOURS = {
    "base, linear layers": BLUE,
    "base, embeddings": SKY,
    "base, other matrices": "#7FBFE8",
    "base, norms and biases": "#B9DDF2",
    "head as it was": PALE,
    "adapters and head": GREEN,
    "gradients": YELLOW,
    "optimizer": ORANGE,
    "batch": BLACK,
    "activations": RED,
    "workspace": PINK,
    "cuBLAS": GREY,
}


@styled
def memory_parts(rows: Sequence[Mapping[str, Any]], limit: float | None = None, title: str = "") -> KitFigure:
    """Draw memory by part: a stacked bar of the plan for each row, and a mark for the measured value.

    Args:
        rows: Each with `label`, `parts` (planned bytes by name) and, if it was measured, `measured` (bytes).
        limit: Bytes that a device has; drawn as a line if it is near the bars.
        title: The figure's title.

    Returns:
        The bars, the first row at the top.
    """
    totals = [sum(row["parts"].values()) for row in rows]
    most = max(*totals, *(row.get("measured") or 0 for row in rows), 1)
    unit, name = bytes_unit(most)
    figure, axes = new(height=2.3 + 0.5 * len(rows))
    named: set[str] = set()
    for place, (row, total) in enumerate(zip(rows, totals, strict=True)):
        left = 0.0
        for part, colour in PART_COLOURS.items():
            size = row["parts"].get(part, 0) / unit
            if not size:
                continue
            shown = row["parts"][part] >= 0.01 * most
            label = part if shown and part not in named else None
            axes.barh(place, size, left=left, height=0.62, color=colour, label=label)
            if label:
                named.add(part)
            left += size
        measured = row.get("measured")
        text = f"{total / unit:,.1f}"
        if measured:
            label = None if "measured" in named else "measured"
            named.add("measured")
            axes.plot([measured / unit] * 2, [place - 0.4, place + 0.4], color=BLACK, linewidth=2.4, label=label)
            text = f"{measured / unit:,.1f} ({total / measured - 1:+z.1%})"
        axes.annotate(
            text,
            (max(total, measured or 0) / unit, place),
            (7, 0),
            textcoords="offset points",
            va="center",
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 1.0},
        )
    if limit is not None and limit < 1.6 * most:
        axes.axvline(limit / unit, color=BLACK, linestyle=(0, (4, 3)), linewidth=1.4)
    axes.set_yticks(range(len(rows)), [shortened(str(row["label"]), 30) for row in rows])
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xlim(0, most / unit * (1.5 if any(row.get("measured") for row in rows) else 1.25))
    axes.xaxis.set_major_locator(MaxNLocator(5, prune="upper"))
    axes.grid(axis="y", visible=False)
    axes.set_xlabel(name)
    axes.set_title(title)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return figure


@styled
def memory_against_time(rows: Sequence[Mapping[str, Any]]) -> KitFigure:
    """Draw memory against the time of a step, and mark the methods that no other beats in both.

    Args:
        rows: Each with `label`, `measured` (bytes) and `step_seconds`; those without are left out.

    Returns:
        A point for each row; the line joins those that no other row beats in both memory and time.
    """
    shown = sorted(
        (row for row in rows if row.get("measured") and row.get("step_seconds")), key=lambda row: row["step_seconds"]
    )
    figure, axes = new(height=1.6 + 4.2 + 0.22 * len(shown))
    if not shown:
        return figure
    unit, name = bytes_unit(max(row["measured"] for row in shown))
    best, least = [], float("inf")
    for row in shown:
        if row["measured"] < least:
            least = row["measured"]
            best.append(row)
    axes.plot(
        [row["step_seconds"] for row in best], [row["measured"] / unit for row in best], color=GREY, linestyle="--",
        linewidth=1.4, label="nothing is better in both",
    )  # fmt: skip
    for number, row in enumerate(shown, start=1):
        colour = GREEN if row in best else BLUE
        axes.plot(row["step_seconds"], row["measured"] / unit, "o", color=colour, markersize=13, alpha=0.9)
        axes.annotate(
            str(number), (row["step_seconds"], row["measured"] / unit), ha="center", va="center", color="white",
            fontsize=9, fontweight="bold",
        )  # fmt: skip
        axes.plot([], [], "o", color=colour, label=f"{number}  {shortened(str(row['label']), 44)}")
    axes.set_title("What memory costs in time")
    axes.set_xlabel("seconds a step")
    axes.set_ylabel(name)
    axes.set_ylim(bottom=0)
    axes.margins(x=0.1)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=1)
    return figure


@styled
def memory_crossing(found: Mapping[str, Any]) -> KitFigure:
    """Draw memory against model size, and mark where each method stops fitting a GPU.

    Args:
        found: What `memory.crossing` returned.

    Returns:
        A line for each method; the dashed line is the GPU's memory.
    """
    figure, axes = new(height=4.8)
    names = {"full": "full fine-tuning", "lora": "LoRA, base in 16 bits"}
    colours = {"none": ORANGE, "int8": GREEN, "nf4": BLUE, "fp4": SKY, "int4": PINK}
    for limit in found["limits"]:
        rows = [
            row
            for row in found["rows"]
            if all(row[key] == limit[key] for key in ("method", "scheme", "double_quantization"))
        ]
        label = names.get(limit["method"], f"QLoRA, base in {limit['scheme']}")
        colour = RED if limit["method"] == "full" else colours[limit["scheme"]]
        size = limit["parameters"]
        reach = f": up to {size / 1e9:.1f} billion" if size else ""
        axes.plot(
            [row["parameters"] / 1e9 for row in rows],
            [row["planned_bytes"] / 2**30 for row in rows],
            "o-",
            color=colour,
            label=label + reach,
        )
        if size:
            axes.plot(
                size / 1e9, found["device_bytes"] / 2**30, "D", color=colour, markersize=9, markeredgecolor="white"
            )
    axes.axhline(found["device_bytes"] / 2**30, color=BLACK, linestyle=(0, (4, 3)), linewidth=1.4)
    axes.set_xscale("log")
    axes.set_yscale("log")
    sizes = sorted({row["parameters"] / 1e9 for row in found["rows"]})
    axes.set_xticks(sizes, [f"{size:.3g}" for size in sizes])
    axes.minorticks_off()
    axes.set_yticks([2, 4, 8, 16, 32, 64, 128, 256, 512], ["2", "4", "8", "16", "32", "64", "128", "256", "512"])
    axes.set_ylim(min(row["planned_bytes"] for row in found["rows"]) / 2**30 * 0.7)
    axes.set_xlabel("billion parameters")
    axes.set_ylabel("GiB")
    axes.set_title(f"Batch {found['batch']}, length {found['length']}; dashed: a {found['device']}")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=1)
    return figure
