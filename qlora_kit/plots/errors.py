"""Figures of errors: confusions, calibration."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator, PercentFormatter

from ..system.showing import counted
from .labels import beside_points
from .style import (
    BLACK,
    BLUE,
    GREEN,
    GREY,
    HEAT,
    ORANGE,
    RED,
    SKY,
    WIDTH,
    KitFigure,
    in_lines,
    in_percent,
    ink,
    new,
    shortened,
    styled,
)


@styled
def confusion_matrix(matrix: Sequence[Sequence[int]] | np.ndarray, names: Sequence[str]) -> KitFigure:
    """Draw the whole confusion matrix, with a pale diagonal so that the errors stand out.

    Args:
        matrix: Counts of rows by true (first axis) and predicted label.
        names: The labels.

    Returns:
        Errors as shares of the true label's rows. The most frequent confusions are ringed, and listed below by name and
        with their counts. With more than 30 labels, each has a number beside its name, the same on both sides.
    """
    counts = np.asarray(matrix, dtype=float)
    size = len(names)
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    right = float(np.trace(counts) / max(counts.sum(), 1))
    errors = np.where(np.eye(size, dtype=bool), np.nan, shares)
    many = size > 30
    # The aspect ratio is free, so that long labels are never cut off; the figure's size makes cells about square.
    side = 0.125 * size if many else 1.2 + 0.32 * size
    figure, axes = new(width=max(WIDTH, side + 2.9), height=side + (5.9 if many else 5.0))
    # A page shows a wide figure smaller: what is not a label grows with it.
    scale = max(1.0, figure.get_figwidth() / WIDTH)
    cmap = HEAT.with_extremes(bad="#F3F3F3")
    top = max(float(np.nanmax(errors)) if size > 1 else 0.0, 0.05)
    image = axes.imshow(errors, cmap=cmap, norm=PowerNorm(0.6, 0, top), interpolation="nearest", aspect="auto")
    labels = [f"{shortened(name, 40)}  {i + 1}" if many else shortened(name, 28) for i, name in enumerate(names)]
    axes.set_yticks(range(size), labels, fontsize=7 if many else 10)
    axes.set_xticks(range(size), labels, rotation=90, fontsize=6.5 if many else 10)
    axes.set_xticks(np.arange(-0.5, size), minor=True)
    axes.set_yticks(np.arange(-0.5, size), minor=True)
    axes.grid(visible=False, which="major")
    axes.grid(visible=True, which="minor", color="#F0F0F0", linewidth=0.4)
    axes.tick_params(which="both", length=0)
    axes.set_xlabel("predicted", fontsize=12 * scale)
    axes.set_ylabel("true", fontsize=12 * scale)
    figure.suptitle(
        f"Confusions: {in_percent(1 - right)} of {counted(int(counts.sum()), 'row')} are wrong",
        fontsize=13 * scale, fontweight="bold", ha="left", x=0.01,
    )  # fmt: skip
    bar = figure.colorbar(image, ax=axes, location="bottom", shrink=0.6, aspect=40, pad=0.02)
    bar.ax.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    bar.ax.xaxis.set_major_locator(MaxNLocator(5))
    bar.set_label("share of the true label's rows", fontsize=10 * scale)
    bar.ax.tick_params(labelsize=10 * scale)
    bar.outline.set_visible(False)
    _name_the_most_frequent(figure, axes, counts.astype(int), names, scale)
    return figure


def _name_the_most_frequent(
    figure: KitFigure, axes: Axes, counts: np.ndarray, names: Sequence[str], scale: float, most: int = 5
) -> None:
    """Put a ring and a number around the cells with the most errors, and list them below by name."""
    wrong = counts - np.diag(counts.diagonal())
    order = np.argsort(-wrong, axis=None, kind="stable")[:most]
    cells = [divmod(int(place), len(names)) for place in order if wrong.flat[place]]
    if not cells:
        return
    axes.plot(
        [column for _, column in cells], [row for row, _ in cells], "o", markersize=16 if len(names) <= 30 else 11,
        markerfacecolor="none", markeredgecolor=ORANGE, markeredgewidth=2.2, clip_on=False,
    )  # fmt: skip
    lines = [
        f"{number}  {shortened(names[row], 25)} → {shortened(names[column], 25)}: "
        f"{wrong[row, column]:,} of {counts[row].sum():,}"
        for number, (row, column) in enumerate(cells, start=1)
    ]
    figure.supxlabel(
        "The most frequent, ringed (true → predicted)\n" + "\n".join(in_lines(line, 68) for line in lines),
        fontsize=10 * scale, ha="left", x=0.01,
    )  # fmt: skip
    beside_points(
        axes, [(column, row) for row, column in cells], [str(number) for number in range(1, len(cells) + 1)],
        ORANGE, size=10 * scale, away=9,
    )  # fmt: skip


@styled
def most_confused(matrix: Sequence[Sequence[int]] | np.ndarray, names: Sequence[str], most: int = 12) -> KitFigure:
    """Draw the part of the confusion matrix with the most errors, with its counts.

    Args:
        matrix: As for `confusion_matrix`.
        names: The labels.
        most: The largest number of labels; those of the most frequent confusions are chosen.

    Returns:
        A small matrix with counts; a row adds up to less than the label's support if it has errors outside the matrix.
    """
    counts = np.asarray(matrix, dtype=int)
    errors = counts - np.diag(counts.diagonal())
    chosen: list[int] = []
    for place in np.argsort(-errors, axis=None, kind="stable"):
        true, guess = divmod(int(place), len(names))
        new_ones = {true, guess} - set(chosen)
        if errors[true, guess] == 0 or len(chosen) + len(new_ones) > most:
            break
        chosen += sorted(new_ones)
    if not chosen:
        chosen = list(range(min(most, len(names))))
    chosen = _neighbours(errors[np.ix_(chosen, chosen)], chosen)
    part = counts[np.ix_(chosen, chosen)]
    wrong = errors[np.ix_(chosen, chosen)]
    size = len(chosen)
    figure, axes = new(width=3.6 + 0.42 * size, height=3.3 + 0.42 * size)
    shown = np.where(np.eye(size, dtype=bool), np.nan, wrong.astype(float))
    axes.imshow(shown, cmap=HEAT.with_extremes(bad="#EEEEEE"), vmin=0, vmax=max(wrong.max(), 1), aspect="auto")
    for row in range(size):
        for column in range(size):
            if part[row, column]:
                dark = row != column and wrong[row, column] > 0.5 * wrong.max()
                axes.text(
                    column,
                    row,
                    str(part[row, column]),
                    ha="center",
                    va="center",
                    fontsize=11,
                    color="white" if dark else ink(GREY) if row == column else BLACK,
                )
    labels = [shortened(names[i], 30) for i in chosen]
    axes.set_yticks(range(size), labels, fontsize=10)
    axes.set_xticks(range(size), labels, rotation=90, fontsize=10)
    axes.grid(visible=False)
    axes.tick_params(length=0)
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    inside, everything = int(wrong.sum()), int(errors.sum())
    figure.suptitle(
        f"The most confused labels: {inside} of all {everything} errors" if everything else "No errors",
        fontsize=13,
        fontweight="bold",
        ha="left",
        x=0.02,
    )
    return figure


def _neighbours(errors: np.ndarray, chosen: Sequence[int]) -> list[int]:
    """Order labels so that labels confused with each other are neighbours."""
    both = errors + errors.T
    left = list(range(len(chosen)))
    order: list[int] = []
    while left:
        seed = max(left, key=lambda i: both[i].sum() if not order else both[order[-1], i])
        if order and both[order[-1], seed] == 0:
            seed = max(left, key=lambda i: both[i].sum())
        order.append(seed)
        left.remove(seed)
    return [chosen[i] for i in order]


@styled
def reliability(calibration: Mapping[str, Any]) -> KitFigure:
    """Draw a reliability diagram: how well a classifier's confidence matches its accuracy.

    Args:
        calibration: What `evaluation.calibration` returned.

    Returns:
        Above, accuracy against confidence by bin, with the gap to the diagonal; below, the number of rows in each
        bin.
    """
    rows = [row for row in calibration["rows"] if row["count"]]
    figure, (top, bottom) = new(width=5.6, height=7.2, rows=2, sharex=True, height_ratios=[3, 1])
    top.plot([0, 1], [0, 1], color=GREY, linestyle="--", linewidth=1.2)
    for row in rows:
        colour = RED if row["confidence"] > row["accuracy"] else GREEN
        top.plot(
            [row["confidence"]] * 2,
            [row["accuracy"], row["confidence"]],
            color=colour,
            alpha=0.45,
            linewidth=6,
            solid_capstyle="butt",
        )
    top.plot([row["confidence"] for row in rows], [row["accuracy"] for row in rows], color=BLUE, zorder=3)
    few = [row for row in rows if row["count"] < 20]
    for group, fill in ((few, "white"), ([row for row in rows if row["count"] >= 20], BLUE)):
        top.plot(
            [row["confidence"] for row in group],
            [row["accuracy"] for row in group],
            "o",
            color=BLUE,
            markerfacecolor=fill,
            markersize=8,
            zorder=4,
        )
    top.set_xlim(0, 1.02)
    top.set_ylim(0, 1.04)
    top.set_ylabel("accuracy")
    top.set_title(f"Calibration: expected error {calibration['ece']:.3f}")
    every = calibration["rows"]
    bottom.bar(
        [row["low"] for row in every],
        [row["count"] for row in every],
        width=[(row["high"] - row["low"]) * 0.94 for row in every],
        align="edge",
        color=SKY,
    )
    bottom.set_ylabel("rows")
    bottom.set_xlabel("confidence: probability of the predicted label")
    bottom.yaxis.set_major_locator(MaxNLocator(3, integer=True))
    # Below the panels: inside, the words would lie on the curve of a classifier that is far from the diagonal.
    handles: list[Any] = [
        Patch(color=GREEN, alpha=0.45, label="more often right than it says"),
        Patch(color=RED, alpha=0.45, label="surer than it should be"),
    ]
    if few:
        hollow: dict[str, Any] = {"color": BLUE, "markerfacecolor": "white", "markersize": 8}
        handles.append(Line2D([], [], marker="o", linestyle="", label="hollow: fewer than 20 rows", **hollow))
    figure.legend(handles=handles, loc="outside lower center", ncols=1)
    return figure
