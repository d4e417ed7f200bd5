"""Figures of a data set: classes, lengths, padding."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.ticker import EngFormatter, MaxNLocator

from .style import BLACK, BLUE, ORANGE, RED, KitFigure, in_percent, new, shortened, styled, vertical


@styled
def class_sizes(report: Mapping[str, Any]) -> KitFigure:
    """Draw how many training rows each label has, largest first.

    Args:
        report: What `TextData.report` returned.

    Returns:
        With 30 labels or fewer, a named bar for each; with more, unnamed bars and the names of the three largest and
        smallest.
    """
    sizes = sorted(((v["train"], k) for k, v in report["class_sizes"].items()), key=lambda item: (-item[0], item[1]))
    counts = np.array([count for count, _ in sizes])
    if len(sizes) <= 30:
        figure, axes = new(height=1.2 + 0.32 * len(sizes))
        axes.barh(range(len(sizes)), counts, color=BLUE)
        axes.set_yticks(range(len(sizes)), [shortened(name) for _, name in sizes])
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)
        axes.set_xlabel("training rows")
    else:
        figure, axes = new(height=5.4)
        axes.bar(range(len(sizes)), counts, color=BLUE, width=0.85)
        axes.set_xlim(-1, len(sizes))
        axes.set_ylim(0, counts.max() * 1.9)  # room for the names
        ticks = MaxNLocator(4, integer=True).tick_values(0, counts.max())
        axes.set_yticks([tick for tick in ticks if 0 <= tick <= max(1, 1.1 * counts.max())])
        axes.set_xticks([])
        axes.set_xlabel(f"the {len(sizes)} labels, largest first")
        axes.set_ylabel("training rows")
        axes.axhline(counts.mean(), color=ORANGE, linewidth=1.5, linestyle="--")
        # On the right, where the bars are below their mean.
        axes.annotate(
            f"mean {counts.mean():.0f}", (1, counts.mean()), (-4, 3), xycoords=("axes fraction", "data"),
            textcoords="offset points", ha="right", va="bottom", fontsize=11,
        )  # fmt: skip
        lines = ["largest", *(f"{shortened(name)}  {count}" for count, name in sizes[:3])]
        lines += ["", "smallest", *(f"{shortened(name)}  {count}" for count, name in sizes[-3:])]
        axes.text(0.99, 0.99, "\n".join(lines), transform=axes.transAxes, ha="right", va="top", fontsize=10.5)
    axes.set_title(f"Class sizes: {counts.min()} to {counts.max()} rows")
    return figure


@styled
def token_lengths(lengths: Sequence[int] | np.ndarray, max_length: int) -> KitFigure:
    """Draw the lengths of the training texts in tokens, and how many the limit cuts.

    Args:
        lengths: Tokens of each text, before any cut (`data.token_lengths`).
        max_length: The limit, in tokens.

    Returns:
        A histogram with the 95th percentile and the longest text marked.
    """
    values = np.asarray(lengths)
    longest, p95 = int(values.max()), float(np.percentile(values, 95))
    figure, axes = new(height=3.8)
    step = max(1, int(np.ceil(longest / 60)))
    edges = np.arange(0.5, longest + step + 0.5, step)
    heights, *_ = axes.hist(values, bins=edges, color=BLUE)
    vertical(axes, p95, ORANGE, f"95% have {p95:.0f} or fewer", 0.95, left=p95 > 0.6 * longest)
    over = int((values > max_length).sum())
    none = "" if over else f"\n(limit {max_length}: none cut)"
    vertical(axes, longest, RED, f"longest: {longest}{none}", 0.8, left=True)
    if over:
        vertical(axes, max_length, BLACK, f"limit {max_length}: {over:,} cut", 0.65)
    axes.set_xlim(0, longest * 1.04)
    axes.set_ylim(0, heights.max() * 1.08)
    axes.set_xlabel("tokens, special ones included")
    axes.set_ylabel("training texts")
    axes.set_title(f"Text lengths: {values.mean():.1f} tokens on average")
    return figure


@styled
def padding(waste: Mapping[str, Mapping[str, float]]) -> KitFigure:
    """Draw how many tokens an epoch computes, for each way of making batches.

    Args:
        waste: What `data.padding_waste` returned.

    Returns:
        A bar for each way: real tokens and padding.
    """
    titles = {
        "max_length": "all padded to the limit",
        "longest": "random batches, padded\nto their longest text",
        "grouped": "batches of like length",
        "fixed_shapes": "like length, few shapes\n(for CUDA graphs)",
    }
    figure, axes = new(height=1.4 + 0.75 * len(waste))
    places = np.arange(len(waste))
    real = np.array([row["real"] for row in waste.values()])
    padded = np.array([row["tokens"] for row in waste.values()]) - real
    axes.barh(places, real, color=BLUE, label="text", height=0.6)
    axes.barh(places, padded, left=real, color=ORANGE, label="padding", height=0.6)
    for place, row in zip(places, waste.values(), strict=True):
        axes.text(row["tokens"], place, f"  {in_percent(row['wasted'])} padding", va="center", fontsize=11)
    axes.set_yticks(places, [titles.get(name, name) for name in waste])
    axes.invert_yaxis()
    axes.set_xlim(0, (real + padded).max() * 1.36)
    axes.grid(axis="y", visible=False)
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.set_xlabel("tokens an epoch")
    axes.set_title("What padding costs")
    axes.legend(loc="lower right")
    return figure
