"""Figures of errors: confusions, calibration."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.colors import PowerNorm
from matplotlib.ticker import MaxNLocator, PercentFormatter

from .style import BLACK, BLUE, GREEN, GREY, HEAT, RED, SKY, WIDTH, KitFigure, in_percent, new, shortened, styled


@styled
def confusion_matrix(matrix: Sequence[Sequence[int]] | np.ndarray, names: Sequence[str]) -> KitFigure:
    """Draw the whole confusion matrix, with a pale diagonal so that the errors stand out.

    Args:
        matrix: Counts of rows by true (first axis) and predicted label.
        names: The labels.

    Returns:
        Errors as shares of the true label's rows. With more than 30 labels, the columns are labelled by number.
    """
    counts = np.asarray(matrix, dtype=float)
    size = len(names)
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    right = float(np.trace(counts) / max(counts.sum(), 1))
    errors = np.where(np.eye(size, dtype=bool), np.nan, shares)
    many = size > 30
    # The aspect ratio is free, so that long labels are never cut off; the figure's size makes cells about square.
    side = 0.118 * size if many else 1.2 + 0.32 * size
    figure, axes = new(width=max(WIDTH, side + 2.9), height=side + (1.9 if many else 3.6))
    cmap = HEAT.with_extremes(bad="#F3F3F3")
    top = max(float(np.nanmax(errors)) if size > 1 else 0.0, 0.05)
    image = axes.imshow(errors, cmap=cmap, norm=PowerNorm(0.6, 0, top), interpolation="nearest", aspect="auto")
    font = 7 if many else 10
    labels = [f"{shortened(name, 40)}  {i + 1}" if many else shortened(name, 28) for i, name in enumerate(names)]
    axes.set_yticks(range(size), labels, fontsize=font)
    axes.set_xticks(
        range(size), [str(i + 1) for i in range(size)] if many else labels, rotation=90, fontsize=5.5 if many else font
    )
    axes.set_xticks(np.arange(-0.5, size), minor=True)
    axes.set_yticks(np.arange(-0.5, size), minor=True)
    axes.grid(visible=False, which="major")
    axes.grid(visible=True, which="minor", color="#F0F0F0", linewidth=0.4)
    axes.tick_params(which="both", length=0)
    axes.set_xlabel("predicted" + (" (numbers as on the left)" if many else ""))
    axes.set_ylabel("true")
    axes.set_title(f"Confusions: {in_percent(1 - right)} of {int(counts.sum()):,} rows are wrong")
    bar = figure.colorbar(image, ax=axes, location="bottom", shrink=0.6, aspect=40, pad=0.02)
    bar.ax.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    bar.set_label("share of the true label's rows", fontsize=10)
    bar.ax.tick_params(labelsize=10)
    bar.outline.set_visible(False)
    return figure


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
                    color="white" if dark else GREY if row == column else BLACK,
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
    figure, (top, bottom) = new(width=5.6, height=6.4, rows=2, sharex=True, height_ratios=[3, 1])
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
    top.text(
        0.03,
        0.96,
        "above the dashed line:\nmore often right than it says",
        transform=top.transAxes,
        va="top",
        fontsize=11,
        color=GREEN,
    )
    top.text(
        0.97,
        0.05,
        "below: surer than it should be" + ("\nhollow: fewer than 20 rows" if few else ""),
        transform=top.transAxes,
        ha="right",
        fontsize=11,
        color=RED,
    )
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
    bottom.yaxis.set_major_locator(MaxNLocator(3))
    return figure
