"""Figures of cost: what a model is made of, memory. Speed has a file of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from matplotlib.ticker import MaxNLocator

from .labels import beside_points
from .style import (
    BLACK,
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    PALE,
    PINK,
    RED,
    SKY,
    YELLOW,
    KitFigure,
    bytes_unit,
    head,
    in_lines,
    labels_of,
    new,
    styled,
)

if TYPE_CHECKING:
    from ..models.parts import Part

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
    axes.set_xlim(0, widest * 1.48)
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
        rows: Each with `label`, `parts` (planned bytes by name) and, if it was measured, `measured` (bytes). If they
            have a `device` and it is not the same for all, each is named with its own.
        limit: Bytes that a device has; a dashed line, named in the legend, if it is near the bars.
        title: The figure's title.

    Returns:
        The bars, the first row at the top.
    """
    totals = [sum(row["parts"].values()) for row in rows]
    most = max(*totals, *(row.get("measured") or 0 for row in rows), 1)
    unit, name = bytes_unit(most)
    figure, axes = new(height=2.4 + 0.5 * len(rows))
    named: set[str] = set()
    reach = most / unit * (1.5 if any(row.get("measured") for row in rows) else 1.25)
    near = limit is not None and limit < 1.6 * most
    if limit is not None and near:
        reach = max(reach, 1.2 * limit / unit)
        axes.axvline(
            limit / unit, color=BLACK, linestyle=(0, (4, 3)), linewidth=1.4, label=f"limit: {limit / unit:,.1f} {name}"
        )
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
        digits = 2 if unit > 2**20 and most < 10 * unit else 1
        text = f"{total / unit:,.{digits}f}"
        if measured:
            label = None if "measured" in named else "measured"
            named.add("measured")
            axes.plot([measured / unit] * 2, [place - 0.4, place + 0.4], color=BLACK, linewidth=2.4, label=label)
            text = f"{measured / unit:,.{digits}f} ({total / measured - 1:+z.1%})"
        end = max(total, measured or 0) / unit
        # A number that would stand on the limit's line goes to its other side, by what its letters take.
        if limit is not None and near and end <= limit / unit <= end + (0.03 + 0.015 * len(text)) * reach:
            end = limit / unit
        axes.annotate(
            text,
            (end, place),
            (7, 0),
            textcoords="offset points",
            va="center",
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 1.0},
        )
    axes.set_yticks(range(len(rows)), [in_lines(label, 26) for label in labels_of(rows)])
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xlim(0, reach)
    axes.xaxis.set_major_locator(MaxNLocator(5, prune="upper"))
    axes.grid(axis="y", visible=False)
    axes.set_xlabel(name)
    head(figure, title)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return figure


@styled
def memory_against_time(rows: Sequence[Mapping[str, Any]]) -> KitFigure:
    """Draw memory against the time of a step, and mark the methods that no other beats in both.

    Args:
        rows: Each with `label`, `measured` (bytes) and `step_seconds`; those without are left out. `device` is as for
            `memory_parts`.

    Returns:
        A named point for each row; the line joins those that no other row beats in both memory and time.
    """
    shown = sorted(
        (row for row in rows if row.get("measured") and row.get("step_seconds")), key=lambda row: row["step_seconds"]
    )
    figure, axes = new(height=4.6 + 0.14 * len(shown))
    head(figure, "What memory costs in time")
    if not shown:
        axes.text(0.5, 0.5, "no row has both memory and time", ha="center", transform=axes.transAxes)
        return figure
    unit, name = bytes_unit(max(row["measured"] for row in shown))
    best, least = [], float("inf")
    for row in shown:
        if row["measured"] < least:
            least = row["measured"]
            best.append(row)
    points = [(row["step_seconds"], row["measured"] / unit) for row in shown]
    colours = [GREEN if any(row is one for one in best) else BLUE for row in shown]
    axes.plot(
        [row["step_seconds"] for row in best], [row["measured"] / unit for row in best], color=GREEN, linestyle="--",
        marker="o", markersize=9, linewidth=1.4, label="nothing is better in both",
    )  # fmt: skip
    axes.scatter(*zip(*points, strict=True), s=80, c=colours, zorder=3)
    axes.set_xlabel("seconds a step")
    axes.set_ylabel(name)
    axes.set_ylim(0, 1.12 * max(high for _, high in points))
    axes.xaxis.set_major_locator(MaxNLocator(5))
    across = [seconds for seconds, _ in points]
    room = max(max(across) - min(across), 0.1 * max(across))
    # Names have room on both sides of their points.
    axes.set_xlim(min(across) - 0.3 * room, max(across) + 0.3 * room)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=1)
    beside_points(axes, points, [in_lines(label, 34, 1) for label in labels_of(shown)], colours)
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
    head(figure, f"Batch {found['batch']}, length {found['length']}; dashed: a {found['device']}")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=1)
    return figure
