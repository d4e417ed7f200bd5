"""Figures of scores: intervals, accuracy over seeds, F1 by label."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.ticker import MaxNLocator

from .style import (
    BLACK,
    BLUE,
    DPI,
    GREEN,
    GREY,
    ORANGE,
    PALE,
    RED,
    SKY,
    WIDTH,
    KitFigure,
    colour_of_method,
    dots_of_seeds,
    head,
    in_lines,
    new,
    shortened,
    styled,
)


@styled
def metric_intervals(
    contenders: Mapping[str, Mapping[str, Any]], metrics: Sequence[str] = ("accuracy", "f1_macro")
) -> KitFigure:
    """Draw contenders' scores with their 95% intervals, the first one highlighted.

    Args:
        contenders: By the name to show, e.g. `{"fine-tuned": metrics["test"], "TF-IDF + SVM": ...}`; each
            has `{"value", "low", "high"}` by metric.
        metrics: The metrics to draw, one panel each.

    Returns:
        Points with intervals. The axis doesn't begin at 0, because positions matter here, not lengths. Where an
        interval of macro F1 lies mostly or wholly below its value, the figure says why: few rows have a label, and a
        resample that lacks some of them scores lower. No correction puts that right: if every resample is below the
        value, the bias-corrected interval has no ends (Efron and Tibshirani, An Introduction to the Bootstrap,
        chapter 14).
    """
    titles = {"accuracy": "Accuracy", "f1_macro": "Macro F1", "f1_weighted": "Weighted F1", "loss": "Loss"}
    height = 0.75 + 0.46 * len(contenders)
    low_f1 = any(map(_below_its_value, (scores["f1_macro"] for scores in contenders.values() if "f1_macro" in scores)))
    told = low_f1 and "f1_macro" in metrics
    figure, grid = new(height=0.2 + height * len(metrics) + 0.6 * told, rows=len(metrics), squeeze=False)
    for axes, metric in zip(grid[:, 0], metrics, strict=True):
        shown = [(name, scores[metric]) for name, scores in contenders.items() if metric in scores]
        for place, (_, score) in enumerate(shown):
            colour = BLUE if place == 0 else GREY
            axes.plot([score["low"], score["high"]], [place, place], color=colour, linewidth=3, solid_capstyle="butt")
            axes.plot(score["value"], place, "o", color=colour, markersize=9)
            axes.annotate(
                f"{score['value']:.3f}",
                (max(score["high"], score["value"]), place),
                (8, 0),
                textcoords="offset points",
                va="center",
                fontsize=12,
                fontweight="bold" if place == 0 else "normal",
            )
        ends = [end for _, score in shown for end in (score["low"], score["value"], score["high"])]
        room = max(max(ends) - min(ends), 0.01)
        axes.set_xlim(min(ends) - 0.08 * room, max(ends) + 0.24 * room)
        axes.set_ylim(len(shown) - 0.4, -0.6)
        axes.set_yticks(range(len(shown)), [in_lines(name, 24) for name, _ in shown])
        axes.grid(axis="y", visible=False)
        axes.xaxis.set_major_locator(MaxNLocator(4))
        axes.set_title(f"{titles.get(metric, metric)}, 95% interval")
    if told:
        figure.supxlabel(
            "Few rows a label: redrawn rows lack some labels and score lower,\n"
            "so that the interval of macro F1 lies low around its dot.",
            fontsize=10.5, x=0.01, ha="left",
        )  # fmt: skip
    return figure


def _below_its_value(score: Mapping[str, float]) -> bool:
    """Return whether a value lies above its interval, or in the upper quarter of it."""
    return score["high"] - score["value"] < (score["value"] - score["low"]) / 3


@styled
def accuracy(contenders: Mapping[str, Sequence[float]], baselines: Mapping[str, float]) -> KitFigure:
    """Draw contenders' test scores, one dot for each seed, against baselines without seeds.

    Args:
        contenders: Macro F1 of each seed, by the name to show. Who is coloured how is said by the method in the name, a
            word of its own: `qlora`, `lora`, `full` or `recipe`.
        baselines: Macro F1 by the name to show; a dashed line each.

    Returns:
        One panel. The axis doesn't begin at 0, because positions matter here, not lengths.
    """
    figure, axes = new(height=2.1 + 0.62 * len(contenders) + 0.2 * len(baselines))
    for place, (name, scores) in enumerate(contenders.items()):
        dots_of_seeds(axes, place, scores, colour_of_method(name))
    everything = [*baselines.values(), *(score for scores in contenders.values() for score in scores)]
    room = max(max(everything) - min(everything), 0.004)
    bottom = len(contenders) - 0.45
    for place, (name, score) in enumerate(sorted(baselines.items(), key=lambda item: item[1])):
        # A line each, with its label on the side that has room.
        right = score < min(everything) + 0.5 * room
        axes.axvline(score, color=BLACK, linestyle="--", linewidth=1.5)
        axes.annotate(
            f"{shortened(name, 30)}  {score:.4f}", (score, bottom + 0.4 * place), (5 if right else -5, 0),
            textcoords="offset points", ha="left" if right else "right", va="center", fontsize=11,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 1},  # over another baseline's line
        )  # fmt: skip
    # As much room on both sides as half a mean's number takes.
    axes.set_xlim(min(everything) - 0.09 * room, max(everything) + 0.09 * room)
    axes.set_ylim(bottom + 0.4 * len(baselines), -0.8)
    axes.set_yticks(range(len(contenders)), [in_lines(name, 24) for name in contenders])
    axes.grid(axis="y", visible=False)
    axes.xaxis.set_major_locator(MaxNLocator(4))
    axes.set_xlabel("test macro F1; the axis does not begin at 0")
    head(figure, "Macro F1: a dot a seed, a bar their mean")
    return figure


@styled
def intervals(
    rows: Sequence[Mapping[str, Any]], reference: float, margin: float | None = None, xlabel: str = "", title: str = ""
) -> KitFigure:
    """Draw numbers with intervals around a reference: differences around 0, ratios around 1.

    Args:
        rows: Each with `label`, `value` and, if it has an interval, `low` and `high`.
        reference: The value for two equal contenders, drawn as a line.
        margin: Half the width of the band around the reference in which contenders still count as equal.
        xlabel: The axis's label.
        title: The figure's title.

    Returns:
        A point for each row, the first at the top.
    """
    labels = [in_lines(str(row["label"]), 60) for row in rows]
    # The label is above its line: beside it, it would leave no room for the axis.
    deep = [0.5 + 0.26 * (1 + label.count("\n")) for label in labels]
    places = [sum(deep[:place]) + high - 0.25 for place, high in enumerate(deep)]
    figure, axes = new(height=1.3 + sum(deep) + 0.3 * bool(title))
    ends = [reference, *(row[key] for row in rows for key in ("value", "low", "high") if row.get(key) is not None)]
    if margin is not None:
        ends += [reference - margin, reference + margin]
        axes.axvspan(reference - margin, reference + margin, color=SKY, alpha=0.18, linewidth=0)
    axes.axvline(reference, color=BLACK, linewidth=1.2, linestyle=(0, (4, 3)))
    room = max(max(ends) - min(ends), 1e-9)
    for row, label, place in zip(rows, labels, places, strict=True):
        if row.get("low") is not None and row.get("high") is not None:
            axes.plot([row["low"], row["high"]], [place, place], color=BLUE, linewidth=3, solid_capstyle="butt")
        axes.plot(row["value"], place, "o", color=BLUE, markersize=9)
        axes.annotate(
            label, (0, place - 0.16), (2, 0), xycoords=("axes fraction", "data"),
            textcoords="offset points", va="bottom", fontsize=11,
            bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.75, "pad": 1.5},
        )  # fmt: skip
    axes.set_xlim(min(ends) - 0.06 * room, max(ends) + 0.06 * room)
    axes.set_ylim(sum(deep) + 0.1, 0)
    axes.set_yticks([])
    axes.grid(axis="y", visible=False)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.set_xlabel(in_lines(xlabel, 58))
    head(figure, title)
    return figure


@styled
def f1_by_label(rows: Sequence[Mapping[str, Any]], worst: int = 20) -> KitFigure:
    """Draw how well each label is recognised: all of them sorted, and the worst by name.

    Args:
        rows: What `evaluation.per_label` returned.
        worst: How many labels to name.

    Returns:
        Above, every label's F1, sorted; below, precision, recall and F1 of the worst ones.
    """
    known = [row for row in rows if row["support"] > 0]
    order = sorted(known, key=lambda row: (row["f1"], row["label"]))
    low = order[:worst]
    heights = [3.0, 1.0 + 0.3 * len(low)]
    figure = KitFigure(figsize=(WIDTH, sum(heights)), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    # Subfigures, so that the long names below don't make the upper panel narrower.
    halves: Any = figure.subfigures(2, 1, height_ratios=heights)
    above, below = halves
    top, bottom = above.subplots(), below.subplots()
    values = np.array([row["f1"] for row in order])
    named = np.arange(len(order)) < len(low)
    top.scatter(np.flatnonzero(~named), values[~named], color=BLUE, s=26)
    top.scatter(np.flatnonzero(named), values[named], color=RED, s=26, label=f"the {len(low)} worst, below")
    top.axhline(values.mean(), color=BLACK, linewidth=1.2, linestyle="--")
    top.annotate(
        f"mean {values.mean():.3f}",
        (0.99, values.mean()),
        (0, -5),
        xycoords=top.get_yaxis_transform(),
        textcoords="offset points",
        ha="right",
        va="top",
        fontsize=11,
    )
    top.set_xticks([])
    top.set_xlabel(f"{len(order)} labels, worst first")
    top.set_ylabel("F1")
    room = max(0.12 * (values.max() - values.min()), 0.01)
    top.set_ylim(values.min() - room, min(values.max() + room, 1.015))
    top.set_title("F1 by label")
    if len(low) < len(order):
        top.legend(loc="lower right")
    for place, row in enumerate(low):
        ends = sorted((row["precision"], row["recall"]))
        bottom.plot(ends, [place, place], color=PALE, linewidth=4, zorder=1)
    for key, mark, colour, title in (
        ("precision", "<", ORANGE, "precision"),
        ("recall", ">", GREEN, "recall"),
        ("f1", "o", RED, "F1"),
    ):
        bottom.scatter(
            [row[key] for row in low], range(len(low)), marker=mark, color=colour, s=44, label=title, zorder=2
        )
    bottom.set_yticks(range(len(low)), [shortened(row["label"], 38) for row in low], fontsize=10)
    bottom.set_ylim(len(low) - 0.4, -0.6)
    bottom.grid(axis="y", visible=False)
    bottom.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
    below.legend(*bottom.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure
