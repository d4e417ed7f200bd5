"""Figures of quantization: codebooks, weights, errors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

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
    KitFigure,
    dots_of_seeds,
    head,
    in_lines,
    ink,
    new,
    short_device,
    spread_out,
    styled,
    tail,
)

SCHEME_COLOURS = {
    "none": BLACK,
    "int8": GREY,
    "nf4": BLUE,
    "fp4": ORANGE,
    "int4": GREEN,
    "e2m1": PINK,
    "e3m0": SKY,
}


def _density(x: np.ndarray) -> np.ndarray:
    return np.exp(-(x**2) / 2) / np.sqrt(2 * np.pi)


@styled
def codebooks(levels: Mapping[str, Sequence[float]], reach: float = 2.4) -> KitFigure:
    """Draw the levels of each codebook below the normal distribution of the weights.

    Args:
        levels: Each codebook's levels, in [-1, 1], by name.
        reach: Standard deviations at level 1: the typical largest of a block of 64 normal weights.

    Returns:
        The density above, and below a row of ticks for each codebook.
    """
    figure, (top, bottom) = new(
        height=2.3 + 0.55 * len(levels), rows=2, sharex=True, height_ratios=[1.7, 0.55 * len(levels)]
    )
    x = np.linspace(-1.12, 1.12, 400)
    top.fill_between(x, _density(x * reach), color=PALE)
    top.set_ylim(0)
    top.set_yticks([])
    top.set_ylabel("how many\nweights")
    top.grid(visible=False)
    for place, (name, values) in enumerate(levels.items()):
        colour = SCHEME_COLOURS.get(name, BLACK)
        inside = [value for value in values if abs(value) <= 1.001]
        bottom.vlines(inside, place - 0.34, place + 0.34, color=colour, linewidth=2.4)
    bottom.set_ylim(len(levels) - 0.4, -0.6)
    bottom.set_yticks(range(len(levels)), list(levels))
    bottom.grid(axis="y", visible=False)
    bottom.set_xlabel("weight / largest weight of its block")
    return figure


@styled
def weight_histogram(weights: Mapping[str, Sequence[float] | np.ndarray]) -> KitFigure:
    """Draw the distribution of layers' weights, with a normal distribution of the same width.

    Args:
        weights: Each layer's flat weights, by the layer's name; one panel each.

    Returns:
        Densities over the weight in standard deviations; each panel says what one is in the layer's own numbers.
    """
    figure, grid = new(height=0.9 + 1.9 * len(weights), rows=len(weights), sharex=True, squeeze=False)
    x = np.linspace(-4.5, 4.5, 300)
    for axes, (name, values) in zip(grid[:, 0], weights.items(), strict=True):
        flat = np.asarray(values, dtype=float).ravel()
        scaled = (flat - flat.mean()) / flat.std()
        heights, *_ = axes.hist(scaled, bins=np.linspace(-4.5, 4.5, 121), density=True, color=SKY)
        axes.plot(x, _density(x), color=BLACK, linewidth=1.6)
        axes.set_title(tail(name, 54), fontsize=12)
        reach = np.abs(scaled).max()
        axes.annotate(
            f"{len(flat):,} weights\none standard deviation: {flat.std():.3g}\nlargest: {reach:.1f} of them away",
            (0.995, 0.97), xycoords="axes fraction", ha="right", va="top", fontsize=10.5,
        )  # fmt: skip
        axes.set_ylim(0, 1.3 * max(heights.max(), 0.4))
        axes.set_yticks([])
        axes.set_ylabel("share")
        axes.grid(visible=False)
    grid[-1, 0].set_xlabel("weight, in standard deviations from its layer's mean\n(black: the normal distribution)")
    return figure


@styled
def block_before_after(
    weights: Sequence[float] | np.ndarray, restored: Mapping[str, Sequence[float] | np.ndarray]
) -> KitFigure:
    """Draw one block's weights before and after quantization, with a panel for each scheme.

    Args:
        weights: The block, [n].
        restored: The block after quantization by each scheme, [n], by name.

    Returns:
        For each scheme, above, the weights as a line and their levels as dots; below, the error of each weight, level
        minus weight, on one scale for all schemes.
    """
    before = np.asarray(weights, dtype=float)
    order = np.argsort(before)
    errors = {name: (np.asarray(after, dtype=float) - before)[order] for name, after in restored.items()}
    figure, grid = new(
        height=0.9 + 2.45 * len(restored), rows=2 * len(restored), sharex=True, squeeze=False,
        height_ratios=[1.5, 0.8] * len(restored),
    )  # fmt: skip
    place = np.arange(len(before))
    most = 1.1 * max(np.abs(error).max() for error in errors.values()) or 1.0
    for axes, under, (name, error) in zip(grid[::2, 0], grid[1::2, 0], errors.items(), strict=True):
        values = before[order] + error
        colour = SCHEME_COLOURS.get(name, BLUE)
        axes.hlines(np.unique(values), -1, len(before), color=PALE, linewidth=1.2, zorder=0)
        axes.plot(place, before[order], "-", color=GREY, linewidth=1.4, label="weights")
        axes.plot(place, values, "o", color=colour, markersize=3.5, label=name)
        typical = np.sqrt(np.mean(error**2))
        axes.set_title(f"{name}: {len(np.unique(values))} levels in use, typical error {typical:.3g}", fontsize=12)
        axes.set_ylabel("weight")
        axes.yaxis.set_major_locator(MaxNLocator(3))
        under.bar(place, error, width=0.85, color=RED)
        under.axhline(0, color=GREY, linewidth=0.8)
        under.set_ylim(-most, most)
        under.yaxis.set_major_locator(MaxNLocator(3))
        under.set_ylabel("error", color=ink(RED))
        for one in (axes, under):
            one.grid(visible=False)
    grid[-1, 0].set_xlim(-1, len(before))
    grid[-1, 0].set_xlabel("weights, smallest to largest; grey: before, dots: after")
    return figure


@styled
def error_by_layer(rows: Sequence[Mapping[str, Any]], title: str = "") -> KitFigure:
    """Draw the signal-to-noise ratio of every linear layer under each scheme.

    Args:
        rows: Each with `layer`, `scheme`, `snr_db`, layers in the model's order.
        title: The figure's title, e.g. the model.

    Returns:
        A row of dots for each scheme, with its median at the right.
    """
    by_scheme = {
        scheme: [row["snr_db"] for row in rows if row["scheme"] == scheme]
        for scheme in dict.fromkeys(row["scheme"] for row in rows)
    }
    figure, axes = new(height=3.6)
    last = max(len(values) for values in by_scheme.values())
    every = [value for values in by_scheme.values() for value in values]
    middles = [float(np.median(values)) for values in by_scheme.values()]
    heights = spread_out(middles, (max(every) - min(every)) / 13)
    for (scheme, values), middle, height in zip(by_scheme.items(), middles, heights, strict=True):
        colour = SCHEME_COLOURS.get(scheme, BLUE)
        axes.plot(range(1, len(values) + 1), values, ".", color=colour, markersize=6)
        axes.text(1.03 * last, height, f"{scheme} {middle:.1f}", va="center", color=ink(colour), fontweight="bold")
    axes.set_xlim(0, last * 1.3)
    axes.set_xticks([tick for tick in MaxNLocator(6, integer=True).tick_values(0, last) if 0 < tick <= last])
    axes.set_xlabel("linear layer, first to last")
    axes.set_ylabel("signal to noise, dB")
    axes.set_title(title)
    return figure


@styled
def error_by_block_size(rows: Sequence[Mapping[str, Any]], limit_db: float | None = None) -> KitFigure:
    """Draw how error grows with the block size.

    Args:
        rows: Each with `scheme`, `block_size`, `snr_db`.
        limit_db: Signal-to-noise ratio of the best sixteen fixed levels (Lloyd-Max).

    Returns:
        A line for each scheme.
    """
    figure, axes = new(height=3.8)
    lines = {
        scheme: sorted((row["block_size"], row["snr_db"]) for row in rows if row["scheme"] == scheme)
        for scheme in dict.fromkeys(row["scheme"] for row in rows)
    }
    every = [row["snr_db"] for row in rows]
    heights = spread_out([points[0][1] for points in lines.values()], (max(every) - min(every)) / 13)
    for (scheme, points), height in zip(lines.items(), heights, strict=True):
        colour = SCHEME_COLOURS.get(scheme, BLUE)
        axes.plot(*zip(*points, strict=True), "o-", color=colour, markersize=5)
        axes.text(0.88 * points[0][0], height, scheme, ha="right", va="center", color=ink(colour), fontweight="bold")
    sizes = sorted({row["block_size"] for row in rows})
    if limit_db is not None:
        # From the first size on: left of it stand the schemes' names.
        axes.plot([sizes[0], 1.2 * sizes[-1]], [limit_db] * 2, color=BLACK, linewidth=1.4, linestyle=(0, (4, 3)))
        axes.annotate(
            "best 16 fixed levels", (1, limit_db), (0, 4), xycoords=("axes fraction", "data"),
            textcoords="offset points", ha="right", fontsize=11,
        )  # fmt: skip
    axes.set_xscale("log", base=2)
    axes.set_xticks(sizes, [str(size) for size in sizes])
    axes.minorticks_off()
    axes.set_xlim(0.5 * sizes[0], 1.2 * sizes[-1])
    axes.set_xlabel("weights that share a scale")
    axes.set_ylabel("signal to noise, dB")
    return figure


@styled
def bits_against_error(
    points: Sequence[Mapping[str, Any]], lloyd_max: Mapping[float, float] | None = None
) -> KitFigure:
    """Draw each scheme's signal-to-noise ratio against its bits a weight, with the theoretical limits.

    Args:
        points: Each with `label`, `scheme`, `bits`, `snr_db`; `hollow` for scales in fp32.
        lloyd_max: Signal-to-noise ratio of the best fixed levels, by bits a weight.

    Returns:
        A point for each scheme: all of them above, those of about four bits below. One line is Shannon's limit for
        normal values (6.02 dB a bit), another the best fixed levels. A legend says what filled and hollow mean.
    """
    figure, panels = new(height=8.0, rows=2, height_ratios=[1, 1.25])
    near = [point for point in points if point["bits"] < 5.2]
    ranges = (
        ((2.8, 8.6), (12, 1.08 * max(point["snr_db"] for point in points))),
        ((3.9, 5.1), (min(point["snr_db"] for point in near) - 1, 29)),
    )
    for axes, (across, up), shown in zip(panels, ranges, (points, near), strict=True):
        bits = np.array(across)
        axes.plot(bits, 20 * np.log10(2) * bits, color=GREY, linewidth=1.6, label="Shannon's limit")
        if lloyd_max:
            line = sorted(lloyd_max.items())
            axes.plot(*zip(*line, strict=True), "--", color=BLACK, linewidth=1.4, label="best fixed levels")
        for point in shown:
            colour = SCHEME_COLOURS.get(point["scheme"], BLUE)
            axes.plot(
                point["bits"], point["snr_db"], "o", color=colour, markersize=8,
                markerfacecolor="white" if point.get("hollow") else colour, markeredgewidth=2,
            )  # fmt: skip
        axes.set_xlim(*across)
        axes.set_ylim(*up)
        axes.set_ylabel("signal to noise, dB")
    panels[0].legend(loc="upper left")
    outermost = {point["scheme"]: point for point in sorted(points, key=lambda point: point["bits"])}
    named = [point for point in outermost.values() if point["bits"] < 5.2]
    heights = spread_out([point["snr_db"] for point in named], 0.85)
    for point, height in zip(named, heights, strict=True):
        panels[1].annotate(
            f"{point['label']}  {point['snr_db']:.1f}", (point["bits"], height), (12, 0), textcoords="offset points",
            va="center", color=ink(SCHEME_COLOURS.get(point["scheme"], BLUE)), fontweight="bold",
        )  # fmt: skip
    for point in (point for point in outermost.values() if point["bits"] >= 5.2):
        panels[0].annotate(
            f"{point['label']}  {point['snr_db']:.1f}", (point["bits"], point["snr_db"]), (0, -14),
            textcoords="offset points", ha="center", va="center",
            color=ink(SCHEME_COLOURS.get(point["scheme"], BLUE)), fontweight="bold",
        )  # fmt: skip
    panels[1].set_xlabel("bits stored for each weight")
    if any(point.get("hollow") for point in points):
        look: dict[str, Any] = {"marker": "o", "linestyle": "", "color": BLACK, "markersize": 8, "markeredgewidth": 2}
        figure.legend(
            handles=[
                Line2D([], [], label="filled: scales quantized as well", **look),
                Line2D([], [], label="hollow: scales in fp32", **look, markerfacecolor="white"),
            ],
            loc="outside lower center", ncols=2,
        )  # fmt: skip
    return figure


@styled
def outlier_in_block(rows: Sequence[Mapping[str, Any]]) -> KitFigure:
    """Draw how one large weight raises the error of the others in its block.

    Args:
        rows: Each with `scheme`, `outlier` (in standard deviations), `rms` (the other weights' error, in standard
            deviations).

    Returns:
        A line for each scheme, and the error of storing 0 for every weight.
    """
    figure, axes = new(height=3.6)
    for scheme in dict.fromkeys(row["scheme"] for row in rows):
        points = sorted((row["outlier"], row["rms"]) for row in rows if row["scheme"] == scheme)
        axes.plot(*zip(*points, strict=True), "o-", color=SCHEME_COLOURS.get(scheme, BLUE), label=scheme, markersize=5)
    axes.axhline(1, color=BLACK, linewidth=1.4, linestyle=(0, (4, 3)))
    axes.annotate(
        "as bad as storing zeros", (0, 1), (4, -5), xycoords=("axes fraction", "data"), textcoords="offset points",
        va="top", fontsize=11,
    )  # fmt: skip
    axes.set_xscale("log", base=2)
    outliers = sorted({row["outlier"] for row in rows})
    axes.set_xticks(outliers, [f"{outlier:g}" for outlier in outliers])
    axes.minorticks_off()
    axes.set_xlabel("the outlier, in standard deviations of the others")
    axes.set_ylabel("error of the others")
    axes.legend()
    return figure


@styled
def perplexity_ratios(rows: Sequence[Mapping[str, Any]], title: str = "") -> KitFigure:
    """Draw how much each scheme raises a language model's perplexity.

    Args:
        rows: Each with `label`, `scheme`, `value`, `low`, `high`: perplexity divided by the unquantized model's.
        title: The figure's title: model and text.

    Returns:
        Points with 95% intervals, the best at the top.
    """
    shown = sorted(rows, key=lambda row: row["value"])
    figure, axes = new(height=1.7 + 0.44 * len(shown))
    for place, row in enumerate(shown):
        colour = SCHEME_COLOURS.get(row["scheme"], BLUE)
        axes.plot([row["low"], row["high"]], [place, place], color=colour, linewidth=3, solid_capstyle="butt")
        axes.plot(row["value"], place, "o", color=colour, markersize=8)
        axes.annotate(f"{row['value']:.3f}", (row["high"], place), (8, 0), textcoords="offset points", va="center")
    axes.axvline(1, color=BLACK, linewidth=1.4, linestyle=(0, (4, 3)))
    highest = max(row["high"] for row in shown)
    axes.set_xlim(min(1.0, *(row["low"] for row in shown)) - 0.02 * (highest - 1), highest + 0.2 * (highest - 1))
    axes.set_ylim(len(shown) - 0.4, -0.6)
    axes.set_yticks(range(len(shown)), [in_lines(row["label"], 24) for row in shown])
    axes.grid(axis="y", visible=False)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.set_xlabel("perplexity, times the unquantized model's\n(95% intervals)")
    head(figure, title)
    return figure


@styled
def schemes(rows: Sequence[Mapping[str, Any]]) -> KitFigure:
    """Draw the scores of fine-tuning on a base stored in each scheme, and the cost.

    Args:
        rows: Rows of results/schemes.json.

    Returns:
        Each seed's test macro F1 and their mean; bits a weight; training time. Rows of different models or devices
        are in different panels, each with its name and its own scale of time.
    """
    panels: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for row in rows:
        panels.setdefault((str(row.get("model") or ""), str(row.get("device") or "")), []).append(row)
    heights = [1.0 + 0.55 * len({_scheme(row) for row in mine}) for mine in panels.values()]
    figure, grid = new(
        height=0.8 + sum(heights), rows=len(panels), columns=2, sharey="row", squeeze=False, width_ratios=[1.5, 1],
        height_ratios=heights,
    )  # fmt: skip
    names = list(dict.fromkeys(map(_scheme, rows)))  # in one order in all panels
    every = [row["f1_macro"] for row in rows]
    room = max(max(every) - min(every), 0.001)
    for (left, right), ((model, device), mine) in zip(grid, panels.items(), strict=True):
        _schemes_panel(left, right, mine, [name for name in names if name in map(_scheme, mine)])
        # One scale of scores for all panels; time is each device's own.
        left.set_xlim(min(every) - 0.18 * room, max(every) + 0.18 * room)
        where = ", ".join(filter(None, (model.removeprefix("embedded:"), short_device(device))))
        left.set_title(where, fontsize=12)
    grid[-1, 0].set_xlabel("test macro F1,\na dot a seed, a bar their mean")
    together = max(row.get("jobs") or 1 for row in rows)
    grid[-1, 1].set_xlabel("training time, s" + (f"\n({together} runs at once)" if together > 1 else "\n"))
    head(figure, "Macro F1 on a base stored in each scheme")
    return figure


def _scheme(row: Mapping[str, Any]) -> str:
    """Return how a row's base is stored, as the figure names it."""
    if row["scheme"] == "none":
        return "none: base in\n16 bits, as it was"
    single = row["scheme"] in ("nf4", "fp4", "int4") and not row["double_quantization"]
    return row["scheme"] + (", scales in fp32" if single else "")


def _schemes_panel(left: Axes, right: Axes, rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> None:
    """Draw one device's rows of `schemes`, by the names that they have, in this order."""
    slowest = max(row["train_seconds"] for row in rows)
    for place, name in enumerate(names):
        mine = [row for row in rows if _scheme(row) == name]
        colour = SCHEME_COLOURS.get(mine[0]["scheme"], BLUE)
        dots_of_seeds(left, place, [row["f1_macro"] for row in mine], colour)
        seconds = float(np.mean([row["train_seconds"] for row in mine]))
        right.barh(place, seconds, color=colour, height=0.55)
        bits = np.mean([row["bits_per_parameter"] for row in mine])
        right.annotate(
            f"{seconds:.0f} s, {bits:.3g} bits", (seconds, place), (5, 0), textcoords="offset points", va="center",
            fontsize=10.5,
        )  # fmt: skip
    left.set_ylim(len(names) - 0.4, -0.75)
    left.set_yticks(range(len(names)), names)
    left.grid(axis="y", visible=False)
    left.xaxis.set_major_locator(MaxNLocator(3))
    right.grid(visible=False)
    right.set_xlim(0, 2.9 * slowest)
    right.xaxis.set_major_locator(MaxNLocator(2))
