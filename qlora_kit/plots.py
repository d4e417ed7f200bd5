"""Every figure of the kit, in one style: from plain data to a matplotlib figure.

The palette is Okabe and Ito's, which colour-blind readers can tell apart; type is large enough to be read when a
figure is shrunk to a phone's width. Figures don't go through pyplot, so none is left open, and a notebook shows
one when it is the last line of a cell, once.
"""

from __future__ import annotations

import io
import os
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec

import matplotlib
import numpy as np
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap, PowerNorm
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator, NullLocator, PercentFormatter

from . import records

if TYPE_CHECKING:
    from .anatomy import Part

DPI = 150
WIDTH = 6.5  # inches
METHOD_NAMES = {"qlora": "QLoRA", "lora": "LoRA", "full": "full fine-tuning"}
BLUE, ORANGE, GREEN, PINK, SKY, RED, YELLOW, BLACK = (
    "#0072B2",
    "#E69F00",
    "#009E73",
    "#CC79A7",
    "#56B4E9",
    "#D55E00",
    "#F0E442",
    "#222222",
)
GREY, PALE = "#8A8A8A", "#DDDDDD"
PALETTE = (BLUE, ORANGE, GREEN, PINK, SKY, RED, BLACK)
STYLE: Any = {
    "font.size": 12,
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "axes.titlesize": 13,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelsize": 12,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": GREY,
    "axes.labelcolor": BLACK,
    "axes.prop_cycle": cycler(color=PALETTE),
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#E6E6E6",
    "grid.linewidth": 0.8,
    "xtick.color": BLACK,
    "ytick.color": BLACK,
    "xtick.labelsize": 11,
    "ytick.labelsize": 11,
    "legend.fontsize": 11,
    "legend.frameon": False,
    "lines.linewidth": 2.0,
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
    # A label of the user's may hold dollar signs; it is text, not mathematics.
    "text.parse_math": False,
}
_HEAT = LinearSegmentedColormap.from_list("kit", ["#FFFFFF", "#9ECAE1", BLUE, "#08306B"])
_Args = ParamSpec("_Args")


class KitFigure(Figure):
    """A matplotlib figure that notebooks show by itself, with or without matplotlib's inline backend."""

    def png(self) -> bytes:
        """Return the figure as PNG, at `DPI` dots an inch."""
        stream = io.BytesIO()
        with matplotlib.rc_context(STYLE), warnings.catch_warnings():
            # A label in a script that the font lacks is drawn as boxes; that is no reason for a page of warnings.
            warnings.filterwarnings("ignore", message=r"Glyph .* missing", category=UserWarning)
            # No software version in the file: equal figures give equal bytes.
            self.savefig(stream, format="png", dpi=DPI, metadata={"Software": None})
        return stream.getvalue()

    def _repr_png_(self) -> bytes:
        return self.png()


def save(figure: Figure, folder: str | Path, name: str) -> Path:
    """Write a figure as `folder/name.png`, whole or not at all.

    Args:
        figure: One of this module's figures, or any matplotlib figure.
        folder: Made if it is not there.
        name: File name without ending.

    Returns:
        The file.
    """
    path = Path(folder) / f"{name}.png"
    aside = path.with_name(f".{path.name}.partial")
    with records.saving(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            if isinstance(figure, KitFigure):
                aside.write_bytes(figure.png())
            else:
                figure.savefig(aside, format="png", dpi=DPI, bbox_inches="tight")
            os.replace(aside, path)
        finally:
            aside.unlink(missing_ok=True)
    return path


def new(
    width: float = WIDTH, height: float = 4.0, rows: int = 1, columns: int = 1, **grid: Any
) -> tuple[KitFigure, Any]:
    """Start a figure in the kit's style; call it in a function decorated with `styled`.

    Args:
        width: Inches.
        height: Inches.
        rows: Rows of panels.
        columns: Columns of panels.
        **grid: Passed to `Figure.subplots`, e.g. `sharex=True`, `height_ratios=[2, 1]`.

    Returns:
        The figure, and its axes as `Figure.subplots` gives them.
    """
    figure = KitFigure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, **grid)


def styled(draw: Callable[_Args, KitFigure]) -> Callable[_Args, KitFigure]:
    """Decorate a function that draws a figure, so that it draws in the kit's style and leaves yours alone."""

    @wraps(draw)
    def in_style(*args: _Args.args, **kwargs: _Args.kwargs) -> KitFigure:
        with matplotlib.rc_context(STYLE):
            return draw(*args, **kwargs)

    return in_style


def short_device(device: str) -> str:
    """Return a device's name as a figure has room for it: `H100` for NVIDIA's full name, `CPU` for any processor."""
    if not device.startswith(("NVIDIA", "Tesla")):
        return "CPU" if device.endswith(("core", "cores")) else device
    return device.removeprefix("NVIDIA ").removeprefix("Tesla ").split(" ")[0]


# ---- data ----


@styled
def class_sizes(report: Mapping[str, Any]) -> KitFigure:
    """Draw how many training rows each label has, largest first.

    Args:
        report: What `TextData.report` returned.

    Returns:
        With 30 labels or fewer a named bar each; with more, unnamed bars and the three smallest and largest
        named.
    """
    sizes = sorted(((v["train"], k) for k, v in report["class_sizes"].items()), key=lambda item: (-item[0], item[1]))
    counts = np.array([count for count, _ in sizes])
    if len(sizes) <= 30:
        figure, axes = new(height=1.2 + 0.32 * len(sizes))
        axes.barh(range(len(sizes)), counts, color=BLUE)
        axes.set_yticks(range(len(sizes)), [_cut(name) for _, name in sizes])
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)
        axes.set_xlabel("training rows")
    else:
        figure, axes = new(height=5.0)
        axes.bar(range(len(sizes)), counts, color=BLUE, width=0.85)
        axes.set_xlim(-1, len(sizes))
        axes.set_ylim(0, counts.max() * 1.6)
        axes.yaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.set_xticks([])
        axes.set_xlabel(f"the {len(sizes)} labels, largest first")
        axes.set_ylabel("training rows")
        axes.axhline(counts.mean(), color=ORANGE, linewidth=1.5, linestyle="--")
        axes.text(-0.5, counts.mean(), f" mean {counts.mean():.0f}", color="white", va="bottom", fontsize=11)
        lines = ["largest", *(f"{_cut(name)}  {count}" for count, name in sizes[:3])]
        lines += ["", "smallest", *(f"{_cut(name)}  {count}" for count, name in sizes[-3:])]
        axes.text(0.99, 0.99, "\n".join(lines), transform=axes.transAxes, ha="right", va="top", fontsize=10.5)
    axes.set_title(f"Class sizes: {counts.min()} to {counts.max()} rows")
    return figure


@styled
def token_lengths(lengths: Sequence[int] | np.ndarray, max_length: int) -> KitFigure:
    """Draw the lengths of the training texts in tokens, and what the limit cuts.

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
    _vertical(axes, p95, ORANGE, f"95% have {p95:.0f} or fewer", 0.95, left=p95 > 0.6 * longest)
    over = int((values > max_length).sum())
    none = "" if over else f"\n(limit {max_length}: none cut)"
    _vertical(axes, longest, RED, f"longest: {longest}{none}", 0.8, left=True)
    if over:
        _vertical(axes, max_length, BLACK, f"limit {max_length}: {over:,} cut", 0.65)
    axes.set_xlim(0, longest * 1.04)
    axes.set_ylim(0, heights.max() * 1.08)
    axes.set_xlabel("tokens, special ones included")
    axes.set_ylabel("training texts")
    axes.set_title(f"Text lengths: {values.mean():.1f} tokens on average")
    return figure


@styled
def padding(waste: Mapping[str, Mapping[str, float]]) -> KitFigure:
    """Draw how many tokens an epoch computes, by how batches are made.

    Args:
        waste: What `data.padding_waste` returned.

    Returns:
        A bar each way: real tokens and padding.
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
        axes.text(row["tokens"], place, f"  {_share(row['wasted'])} padding", va="center", fontsize=11)
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


# ---- training ----


@styled
def training_curves(training: Mapping[str, Any]) -> KitFigure:
    """Draw how a run went: loss, validation scores, learning rates, speed.

    Args:
        training: What a run's `training.json` holds (`Run.training`).

    Returns:
        Panels over the optimizer's steps; what the record lacks is left out.
    """
    losses = [row for row in training["losses"] if row.get("loss") is not None]
    epochs = list(training["epochs"])
    rates = sorted({key for row in losses for key in row if key.startswith("learning_rate")})
    speeds = [
        (row["step"], row["timing"]["tokens_per_second"])
        for row in epochs
        if row.get("timing", {}).get("tokens_per_second")
    ]
    panels: list[Callable[[Axes], None]] = [lambda axes: _loss_panel(axes, losses, epochs)]
    if epochs:
        panels.append(lambda axes: _validation_panel(axes, epochs, training.get("best_step")))
    if rates:
        panels.append(lambda axes: _rate_panel(axes, losses, rates))
    if speeds:
        panels.append(lambda axes: _speed_panel(axes, speeds))
    heights = [1.5, 1.5, 1.0, 0.8][: len(panels)]
    figure, grid = new(
        height=0.6 + 1.95 * sum(heights), rows=len(panels), sharex=True, squeeze=False, height_ratios=heights
    )
    for axes, draw in zip(grid[:, 0], panels, strict=True):
        draw(axes)
        for row in epochs[:-1] if len(epochs) <= 12 else []:
            axes.axvline(row["step"], color=PALE, linewidth=1, zorder=0)
    grid[-1, 0].set_xlabel("step" + (" (grey lines: epochs)" if 1 < len(epochs) <= 12 else ""))
    grid[-1, 0].xaxis.set_major_locator(MaxNLocator(6, integer=True))
    last = max([row["step"] for row in losses + epochs], default=1)
    grid[-1, 0].set_xlim(0, last * 1.02)
    return figure


def _loss_panel(axes: Axes, losses: Sequence[Mapping[str, Any]], epochs: Sequence[Mapping[str, Any]]) -> None:
    steps, values = [row["step"] for row in losses], np.array([row["loss"] for row in losses], dtype=float)
    axes.plot(steps, values, color=SKY, linewidth=1, alpha=0.7)
    axes.plot(steps, smooth(values), color=BLUE, label="training, smoothed")
    held = [(row["step"], row["validation"]["loss"]) for row in epochs if row["validation"].get("loss") is not None]
    if held:
        axes.plot(*zip(*held, strict=True), color=ORANGE, marker="o", label="validation")
    axes.set_ylim(bottom=0)
    axes.set_title("Loss")
    axes.set_ylabel("cross-entropy")
    axes.legend(loc="upper right")


def _validation_panel(axes: Axes, epochs: Sequence[Mapping[str, Any]], best: int | None) -> None:
    steps = [row["step"] for row in epochs]
    for key, title, colour, mark in (("accuracy", "accuracy", GREEN, "s"), ("f1_macro", "macro F1", BLUE, "o")):
        axes.plot(steps, [row["validation"][key] for row in epochs], color=colour, marker=mark, label=title)
    chosen = next((row for row in epochs if row["step"] == best), None)
    if chosen is not None:
        value = chosen["validation"]["f1_macro"]
        axes.plot(
            chosen["step"],
            value,
            marker="o",
            markersize=14,
            markerfacecolor="none",
            markeredgecolor=RED,
            markeredgewidth=2,
            linestyle="none",
            label=f"kept: {value:.4f}",
        )
    axes.set_title("Validation")
    axes.set_ylabel("score")
    axes.margins(y=0.2)
    axes.legend(loc="lower right")


def _rate_panel(axes: Axes, losses: Sequence[Mapping[str, Any]], rates: Sequence[str]) -> None:
    for i, key in enumerate(rates):
        points = [(row["step"], row[key]) for row in losses if row.get(key) is not None]
        title = key.removeprefix("learning_rate").strip("_/ ") or "adapters"
        axes.plot(*zip(*points, strict=True), color=PALETTE[i], label=title)
    axes.set_title("Learning rate")
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_locator(MaxNLocator(4))
    axes.ticklabel_format(axis="y", style="sci", scilimits=(-2, 2), useMathText=False)
    if len(rates) > 1:
        axes.legend(loc="upper right")


def _speed_panel(axes: Axes, speeds: Sequence[tuple[int, float]]) -> None:
    steps, values = zip(*speeds, strict=True)
    starts = [0, *steps[:-1]]
    widths = np.subtract(steps, starts)
    axes.bar(starts, values, width=widths * 0.96, align="edge", color=SKY)
    axes.set_title("Speed by epoch (padding not counted)")
    axes.set_ylabel("tokens/s")
    axes.yaxis.set_major_formatter(EngFormatter(sep=""))
    axes.yaxis.set_major_locator(MaxNLocator(3))


def smooth(values: Sequence[float] | np.ndarray, span: int | None = None) -> np.ndarray:
    """Smooth a curve by a centred moving average, which unlike an exponential one does not lag behind.

    Args:
        values: The curve.
        span: How many points are averaged; None takes a twelfth of them. Near an end the window narrows, so
            that it stays centred.

    Returns:
        As many values.
    """
    series = np.asarray(values, dtype=float)
    half = (span or max(1, len(series) // 12)) // 2
    total = np.concatenate([[0.0], np.cumsum(series)])
    places = np.arange(len(series))
    reach = np.minimum(half, np.minimum(places, len(series) - 1 - places))
    means: np.ndarray = (total[places + reach + 1] - total[places - reach]) / (2 * reach + 1)
    return means


# ---- evaluation ----


@styled
def metric_intervals(
    contenders: Mapping[str, Mapping[str, Any]], metrics: Sequence[str] = ("accuracy", "f1_macro")
) -> KitFigure:
    """Draw contenders' scores with their 95% intervals, the first one standing out.

    Args:
        contenders: By the name to show, e.g. `{"fine-tuned": metrics["test"], "TF-IDF + SVM": ...}`; each
            has `{"value", "low", "high"}` by metric.
        metrics: Which metrics, a panel each.

    Returns:
        Points with intervals. The axis doesn't begin at 0: length means nothing here, position does.
    """
    titles = {"accuracy": "Accuracy", "f1_macro": "Macro F1", "f1_weighted": "Weighted F1", "loss": "Loss"}
    height = 0.75 + 0.42 * len(contenders)
    figure, grid = new(height=0.2 + height * len(metrics), rows=len(metrics), squeeze=False)
    for axes, metric in zip(grid[:, 0], metrics, strict=True):
        shown = [(name, scores[metric]) for name, scores in contenders.items() if metric in scores]
        for place, (_, score) in enumerate(shown):
            colour = BLUE if place == 0 else GREY
            axes.plot([score["low"], score["high"]], [place, place], color=colour, linewidth=3, solid_capstyle="butt")
            axes.plot(score["value"], place, "o", color=colour, markersize=9)
            axes.annotate(
                f"{score['value']:.3f}",
                (score["high"], place),
                (8, 0),
                textcoords="offset points",
                va="center",
                fontsize=12,
                fontweight="bold" if place == 0 else "normal",
            )
        low, high = min(score["low"] for _, score in shown), max(score["high"] for _, score in shown)
        room = max(high - low, 1e-3)
        axes.set_xlim(low - 0.08 * room, high + 0.24 * room)
        axes.set_ylim(len(shown) - 0.4, -0.6)
        axes.set_yticks(range(len(shown)), [_cut(name, 30) for name, _ in shown])
        axes.grid(axis="y", visible=False)
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.set_title(f"{titles.get(metric, metric)}, 95% interval")
    return figure


@styled
def accuracy(contenders: Mapping[str, Sequence[float]], baselines: Mapping[str, float]) -> KitFigure:
    """Draw contenders' test scores, a dot a seed, against baselines that have no seed.

    Args:
        contenders: Macro F1 of each seed, by the name to show.
        baselines: Macro F1 by the name to show; a dashed line each.

    Returns:
        One panel. The axis doesn't begin at 0: length means nothing here, position does.
    """
    figure, axes = new(height=1.7 + 0.62 * len(contenders) + 0.2 * len(baselines))
    for place, (_, scores) in enumerate(contenders.items()):
        _seeds(axes, place, scores, BLUE if place == 0 else GREY)
    everything = [*baselines.values(), *(score for scores in contenders.values() for score in scores)]
    room = max(max(everything) - min(everything), 1e-3)
    bottom = len(contenders) - 0.45
    for place, (name, score) in enumerate(sorted(baselines.items(), key=lambda item: item[1])):
        # A line each, and a label on the side of it where there is room.
        right = score < min(everything) + 0.5 * room
        axes.axvline(score, color=ORANGE, linestyle="--", linewidth=1.5)
        axes.annotate(
            f"{_cut(name, 30)}  {score:.4f}", (score, bottom + 0.4 * place), (5 if right else -5, 0),
            textcoords="offset points", ha="left" if right else "right", va="center", fontsize=11, color=ORANGE,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 1},  # over another baseline's line
        )  # fmt: skip
    axes.set_xlim(min(everything) - 0.05 * room, max(everything) + 0.1 * room)
    axes.set_ylim(bottom + 0.4 * len(baselines), -0.8)
    axes.set_yticks(range(len(contenders)), [_cut(name, 30) for name in contenders])
    axes.grid(axis="y", visible=False)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.set_xlabel("test macro F1, a dot a seed, a bar their mean")
    return figure


def _seeds(axes: Axes, place: int, scores: Sequence[float], colour: str) -> None:
    """Draw a dot for each seed's score and a bar with a number for their mean."""
    mean = float(np.mean(scores))
    axes.plot(scores, [place] * len(scores), "o", color=colour, markersize=7, alpha=0.45, markeredgewidth=0)
    axes.plot([mean, mean], [place - 0.3, place + 0.3], color=colour, linewidth=3)
    axes.annotate(f"{mean:.4f}", (mean, place - 0.32), ha="center", va="bottom", fontsize=11)


@styled
def intervals(
    rows: Sequence[Mapping[str, Any]], reference: float, margin: float | None = None, xlabel: str = "", title: str = ""
) -> KitFigure:
    """Draw numbers with their intervals about a reference: differences about 0, ratios about 1.

    Args:
        rows: Each with `label`, `value` and, where it has an interval, `low` and `high`.
        reference: Drawn as a line: where two contenders are level.
        margin: Drawn as a band about the reference: what counts as level all the same.
        xlabel: Of the axis.
        title: Of the figure.

    Returns:
        A point a row, the first at the top.
    """
    figure, axes = new(height=1.5 + 0.72 * len(rows))
    ends = [reference, *(row[key] for row in rows for key in ("value", "low", "high") if row.get(key) is not None)]
    if margin is not None:
        ends += [reference - margin, reference + margin]
        axes.axvspan(reference - margin, reference + margin, color=SKY, alpha=0.18, linewidth=0)
    axes.axvline(reference, color=BLACK, linewidth=1.2, linestyle=(0, (4, 3)))
    room = max(max(ends) - min(ends), 1e-9)
    for place, row in enumerate(rows):
        if row.get("low") is not None and row.get("high") is not None:
            axes.plot([row["low"], row["high"]], [place, place], color=BLUE, linewidth=3, solid_capstyle="butt")
        axes.plot(row["value"], place, "o", color=BLUE, markersize=9)
        # The label above its line: beside it, the axis would be left with no room.
        axes.annotate(
            _cut(str(row["label"]), 62), (0, place - 0.3), (2, 0), xycoords=("axes fraction", "data"),
            textcoords="offset points", va="center", fontsize=11,
            bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.75, "pad": 1.5},
        )  # fmt: skip
    axes.set_xlim(min(ends) - 0.06 * room, max(ends) + 0.06 * room)
    axes.set_ylim(len(rows) - 0.5, -0.75)
    axes.set_yticks([])
    axes.grid(axis="y", visible=False)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.set_xlabel(xlabel)
    axes.set_title(title)
    return figure


@styled
def stability(curves: Sequence[Mapping[str, Any]]) -> KitFigure:
    """Draw the training loss and the gradient norm of several runs, coloured by method.

    Args:
        curves: Each with `method` (`qlora`, `lora`, `full` or another) and the lists `step`, `loss` and
            `grad_norm`, with None where a step has none.

    Returns:
        Two panels over the optimizer's steps.
    """
    colours = {"qlora": BLUE, "lora": ORANGE, "full": RED}
    counts = Counter(curve["method"] for curve in curves)
    figure, (top, bottom) = new(height=5.4, rows=2, sharex=True)
    for curve in curves:
        method = curve["method"]
        runs = counts.pop(method, 0)  # the legend has one line for each method
        label = f"{METHOD_NAMES.get(method, method)}, {runs} run{'s' * (runs > 1)}" if runs else None
        for axes, key in ((top, "loss"), (bottom, "grad_norm")):
            values = np.array([np.nan if value is None else value for value in curve[key]], dtype=float)
            # A line of a few points is hardly one.
            axes.plot(curve["step"], values, color=colours.get(method, GREY), linewidth=1.1, alpha=0.7,
                      marker="o" if len(values) < 20 else None, label=label if axes is top else None)  # fmt: skip
    top.set_title("Training loss")
    top.set_ylim(bottom=0)
    top.legend(loc="upper right")
    bottom.set_title("Gradient norm, before clipping")
    bottom.set_yscale("log")
    bottom.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    bottom.yaxis.set_major_formatter(lambda value, _: f"{value:g}")  # the default is mathematics
    bottom.yaxis.set_minor_locator(NullLocator())
    bottom.set_xlim(left=0)
    bottom.set_xlabel("step")
    return figure


@styled
def search_trials(record: Mapping[str, Any]) -> KitFigure:
    """Draw a search: validation macro F1 by trial, and by learning rate where that was searched.

    Args:
        record: What a search's `search.json` holds (`Search.record`).

    Returns:
        Points, a stopped trial's at what it had reached; on the left, a line for the best of the finished ones so far.
    """
    trials = [trial for trial in record["trials"] if trial["epochs"]]
    rates = [trial for trial in trials if trial["parameters"].get("training.learning_rate")]
    figure, grid = new(height=4.2, columns=2 if rates else 1, sharey=True, squeeze=False)
    kinds = (("complete", BLUE, "o", "finished"), ("pruned", GREY, "x", "stopped early"))
    places: list[tuple[str, Callable[[Mapping[str, Any]], float]]] = [("trial", lambda trial: trial["number"])]
    if rates:
        places.append(("learning rate", lambda trial: trial["parameters"]["training.learning_rate"]))
    for axes, (label, place) in zip(grid[0], places, strict=True):
        for state, colour, marker, name in kinds:
            chosen = [trial for trial in (rates if label != "trial" else trials) if trial["state"] == state]
            values = [trial["epochs"][-1] if trial["f1_macro"] is None else trial["f1_macro"] for trial in chosen]
            if chosen:
                axes.scatter([place(trial) for trial in chosen], values, 55, colour, marker, label=name, zorder=3)
        axes.set_xlabel(label)
    done = [trial for trial in trials if trial["state"] == "complete"]
    if done:
        best = np.maximum.accumulate([trial["f1_macro"] for trial in done])
        numbers = [trial["number"] for trial in done]
        grid[0, 0].step(numbers, best, where="post", color=ORANGE, label="best so far")
    grid[0, 0].set_ylabel("macro F1 on validation")
    grid[0, 0].xaxis.set_major_locator(MaxNLocator(6, integer=True))
    if rates:
        grid[0, 1].set_xscale("log")
        low, high = (pick(map(places[1][1], rates)) for pick in (min, max))
        grid[0, 1].xaxis.set_major_locator(LogLocator(subs=(1.0, 3.0) if high > 10 * low else (1.0, 2.0, 4.0)))
        grid[0, 1].xaxis.set_major_formatter(lambda rate, _: f"{rate:g}")  # the default is mathematics
        grid[0, 1].xaxis.set_minor_locator(NullLocator())
    if trials:
        handles, labels = grid[0, 0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=len(labels))
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
    figure = KitFigure(figsize=(WIDTH, sum(heights)), layout="constrained")
    FigureCanvasAgg(figure)
    # Subfigures, so that the names below don't narrow what is above.
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
    bottom.set_yticks(range(len(low)), [_cut(row["label"], 38) for row in low], fontsize=10)
    bottom.set_ylim(len(low) - 0.4, -0.6)
    bottom.grid(axis="y", visible=False)
    bottom.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
    below.legend(*bottom.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure


@styled
def confusion_matrix(matrix: Sequence[Sequence[int]] | np.ndarray, names: Sequence[str]) -> KitFigure:
    """Draw the whole confusion matrix; the diagonal is left pale, so that the errors show.

    Args:
        matrix: Rows counted by true (first axis) and predicted label.
        names: The labels.

    Returns:
        Errors as shares of the true label's rows. With more than 30 labels the columns have the rows' numbers.
    """
    counts = np.asarray(matrix, dtype=float)
    size = len(names)
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    right = float(np.trace(counts) / max(counts.sum(), 1))
    errors = np.where(np.eye(size, dtype=bool), np.nan, shares)
    many = size > 30
    # The aspect is left free, so that long labels are never cut off; the figure's size makes cells about square.
    side = 0.118 * size if many else 1.2 + 0.32 * size
    figure, axes = new(width=max(WIDTH, side + 2.9), height=side + (1.9 if many else 3.6))
    cmap = _HEAT.with_extremes(bad="#F3F3F3")
    top = max(float(np.nanmax(errors)) if size > 1 else 0.0, 0.05)
    image = axes.imshow(errors, cmap=cmap, norm=PowerNorm(0.6, 0, top), interpolation="nearest", aspect="auto")
    font = 7 if many else 10
    labels = [f"{_cut(name, 40)}  {i + 1}" if many else _cut(name, 28) for i, name in enumerate(names)]
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
    axes.set_title(f"Confusions: {_share(1 - right)} of {int(counts.sum()):,} rows are wrong")
    bar = figure.colorbar(image, ax=axes, location="bottom", shrink=0.6, aspect=40, pad=0.02)
    bar.ax.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    bar.set_label("share of the true label's rows", fontsize=10)
    bar.ax.tick_params(labelsize=10)
    bar.outline.set_visible(False)
    return figure


@styled
def most_confused(matrix: Sequence[Sequence[int]] | np.ndarray, names: Sequence[str], most: int = 12) -> KitFigure:
    """Draw the part of the confusion matrix where most errors are, with its counts.

    Args:
        matrix: As for `confusion_matrix`.
        names: The labels.
        most: At most how many labels; those of the most frequent confusions.

    Returns:
        A small matrix with numbers; rows add up to less than the label's support where errors lie outside it.
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
    axes.imshow(shown, cmap=_HEAT.with_extremes(bad="#EEEEEE"), vmin=0, vmax=max(wrong.max(), 1), aspect="auto")
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
    labels = [_cut(names[i], 30) for i in chosen]
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
    """Order labels so that those confused with one another stand together."""
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
    """Draw how far a classifier's confidence can be taken at its word.

    Args:
        calibration: What `evaluation.calibration` returned.

    Returns:
        Above, accuracy against confidence by bin, with the gap to the diagonal; below, how many rows each bin
        has.
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


# ---- quantization ----

SCHEME_COLOURS = {
    "none": BLACK,
    "int8": GREY,
    "nf4": BLUE,
    "fp4": ORANGE,
    "int4": GREEN,
    "e2m1": PINK,
    "e3m0": SKY,
}


def _spread(values: Sequence[float], gap: float) -> list[float]:
    """Move values apart until neighbours are `gap` apart, as little as possible."""
    order = np.argsort(values)
    places = np.asarray(values, dtype=float)[order]
    for _ in range(200):
        for low in range(len(places) - 1):
            short = gap - (places[low + 1] - places[low])
            if short > 0:
                places[low] -= short / 2
                places[low + 1] += short / 2
    result = np.empty_like(places)
    result[order] = places
    return [float(place) for place in result]


def _density(x: np.ndarray) -> np.ndarray:
    return np.exp(-(x**2) / 2) / np.sqrt(2 * np.pi)


@styled
def codebooks(levels: Mapping[str, Sequence[float]], reach: float = 2.4) -> KitFigure:
    """Draw where each codebook has its levels, below the bell curve that weights come from.

    Args:
        levels: By name, in [-1, 1].
        reach: Standard deviations that 1 stands for: the usual largest of a block of 64 normal weights.

    Returns:
        The density above, a row of ticks for each codebook below.
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
    """Draw how a layer's weights are spread, with the bell curve of the same width over it.

    Args:
        weights: A layer's weights, flat, by the layer's name; a panel each.

    Returns:
        Densities over the weight in standard deviations.
    """
    figure, grid = new(height=0.7 + 1.9 * len(weights), rows=len(weights), sharex=True, squeeze=False)
    x = np.linspace(-4.5, 4.5, 300)
    for axes, (name, values) in zip(grid[:, 0], weights.items(), strict=True):
        flat = np.asarray(values, dtype=float).ravel()
        scaled = (flat - flat.mean()) / flat.std()
        axes.hist(scaled, bins=np.linspace(-4.5, 4.5, 121), density=True, color=SKY)
        axes.plot(x, _density(x), color=BLACK, linewidth=1.6)
        axes.set_title(_cut(name, 56), fontsize=12)
        reach = np.abs(scaled).max()
        axes.annotate(
            f"{len(flat):,} weights,\nthe largest {reach:.0f} away", (1, 0.95), xycoords="axes fraction",
            ha="right", va="top", fontsize=11,
        )  # fmt: skip
        axes.set_yticks([])
        axes.grid(visible=False)
    grid[-1, 0].set_xlabel("weight, in standard deviations; the line is the normal distribution")
    return figure


@styled
def block_before_after(
    weights: Sequence[float] | np.ndarray, restored: Mapping[str, Sequence[float] | np.ndarray]
) -> KitFigure:
    """Draw one block's weights before and after quantization, a panel for each scheme.

    Args:
        weights: The block, [n].
        restored: What each scheme makes of it, [n], by name.

    Returns:
        Dots on the levels; a stem from each weight to its level is the error.
    """
    before = np.asarray(weights, dtype=float)
    order = np.argsort(before)
    figure, grid = new(height=0.6 + 1.75 * len(restored), rows=len(restored), sharex=True, squeeze=False)
    place = np.arange(len(before))
    for axes, (name, after) in zip(grid[:, 0], restored.items(), strict=True):
        values = np.asarray(after, dtype=float)[order]
        colour = SCHEME_COLOURS.get(name, BLUE)
        axes.hlines(np.unique(values), -1, len(before), color=PALE, linewidth=1.2, zorder=0)
        axes.plot(place, before[order], "-", color=GREY, linewidth=1.2)
        axes.vlines(place, before[order], values, color=RED, linewidth=2.2)
        axes.plot(place, values, "o", color=colour, markersize=3.5)
        error = np.sqrt(np.mean((before[order] - values) ** 2))
        axes.set_title(f"{name}: {len(np.unique(values))} levels in use, typical error {error:.3g}", fontsize=12)
        axes.grid(visible=False)
        axes.set_ylabel("weight")
    grid[-1, 0].set_xlim(-1, len(before))
    grid[-1, 0].set_xlabel("weights, smallest to largest")
    return figure


@styled
def error_by_layer(rows: Sequence[Mapping[str, Any]], title: str = "") -> KitFigure:
    """Draw the signal-to-noise ratio of every linear layer under each scheme.

    Args:
        rows: Each with `layer`, `scheme`, `snr_db`, layers in the model's order.
        title: Whose layers they are.

    Returns:
        A line of dots for each scheme, with its median named at the right.
    """
    by_scheme = {
        scheme: [row["snr_db"] for row in rows if row["scheme"] == scheme]
        for scheme in dict.fromkeys(row["scheme"] for row in rows)
    }
    figure, axes = new(height=3.6)
    last = max(len(values) for values in by_scheme.values())
    every = [value for values in by_scheme.values() for value in values]
    middles = [float(np.median(values)) for values in by_scheme.values()]
    heights = _spread(middles, (max(every) - min(every)) / 13)
    for (scheme, values), middle, height in zip(by_scheme.items(), middles, heights, strict=True):
        colour = SCHEME_COLOURS.get(scheme, BLUE)
        axes.plot(range(1, len(values) + 1), values, ".", color=colour, markersize=6)
        axes.text(1.03 * last, height, f"{scheme} {middle:.1f}", va="center", color=colour, fontweight="bold")
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
        limit_db: Signal to noise of the best sixteen fixed levels (Lloyd-Max).

    Returns:
        A line for each scheme.
    """
    figure, axes = new(height=3.8)
    lines = {
        scheme: sorted((row["block_size"], row["snr_db"]) for row in rows if row["scheme"] == scheme)
        for scheme in dict.fromkeys(row["scheme"] for row in rows)
    }
    every = [row["snr_db"] for row in rows]
    heights = _spread([points[0][1] for points in lines.values()], (max(every) - min(every)) / 13)
    for (scheme, points), height in zip(lines.items(), heights, strict=True):
        colour = SCHEME_COLOURS.get(scheme, BLUE)
        axes.plot(*zip(*points, strict=True), "o-", color=colour, markersize=5)
        axes.text(0.88 * points[0][0], height, scheme, ha="right", va="center", color=colour, fontweight="bold")
    if limit_db is not None:
        axes.axhline(limit_db, color=BLACK, linewidth=1.4, linestyle=(0, (4, 3)))
        axes.annotate(
            "best 16 fixed levels", (1, limit_db), (0, 4), xycoords=("axes fraction", "data"),
            textcoords="offset points", ha="right", fontsize=11,
        )  # fmt: skip
    sizes = sorted({row["block_size"] for row in rows})
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
    """Draw what each scheme pays in bits and gets in signal to noise, with the limits of both.

    Args:
        points: Each with `label`, `scheme`, `bits`, `snr_db`; `hollow` for scales in fp32.
        lloyd_max: Signal to noise of the best fixed levels by bits a weight.

    Returns:
        A point for each scheme, all of them above and those of about four bits below; Shannon's limit for
        normal values, 6.02 dB a bit, as a line, and the best fixed levels as another.
    """
    figure, panels = new(height=7.4, rows=2, height_ratios=[1, 1.25])
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
    heights = _spread([point["snr_db"] for point in named], 0.85)
    for point, height in zip(named, heights, strict=True):
        panels[1].annotate(
            f"{point['label']}  {point['snr_db']:.1f}", (point["bits"], height), (12, 0), textcoords="offset points",
            va="center", color=SCHEME_COLOURS.get(point["scheme"], BLUE), fontweight="bold",
        )  # fmt: skip
    for point in (point for point in outermost.values() if point["bits"] >= 5.2):
        panels[0].annotate(
            f"{point['label']}  {point['snr_db']:.1f}", (point["bits"], point["snr_db"]), (0, -14),
            textcoords="offset points", ha="center", va="center",
            color=SCHEME_COLOURS.get(point["scheme"], BLUE), fontweight="bold",
        )  # fmt: skip
    panels[1].set_xlabel("bits stored for each weight")
    return figure


@styled
def outlier_in_block(rows: Sequence[Mapping[str, Any]]) -> KitFigure:
    """Draw what one large weight does to the others of its block.

    Args:
        rows: Each with `scheme`, `outlier` (times the standard deviation), `rms` (of the other weights' error, in
            standard deviations).

    Returns:
        A line for each scheme, and the error of writing 0 for every weight.
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
    """Draw by how much each scheme makes a language model worse at predicting text.

    Args:
        rows: Each with `label`, `scheme`, `value`, `low`, `high`: perplexity over the unquantized model's.
        title: Which model and text.

    Returns:
        Points with 95% intervals, the best at the top.
    """
    shown = sorted(rows, key=lambda row: row["value"])
    figure, axes = new(height=1.2 + 0.4 * len(shown))
    for place, row in enumerate(shown):
        colour = SCHEME_COLOURS.get(row["scheme"], BLUE)
        axes.plot([row["low"], row["high"]], [place, place], color=colour, linewidth=3, solid_capstyle="butt")
        axes.plot(row["value"], place, "o", color=colour, markersize=8)
        axes.annotate(f"{row['value']:.3f}", (row["high"], place), (8, 0), textcoords="offset points", va="center")
    axes.axvline(1, color=BLACK, linewidth=1.4, linestyle=(0, (4, 3)))
    highest = max(row["high"] for row in shown)
    axes.set_xlim(min(1.0, *(row["low"] for row in shown)) - 0.02 * (highest - 1), highest + 0.2 * (highest - 1))
    axes.set_ylim(len(shown) - 0.4, -0.6)
    axes.set_yticks(range(len(shown)), [row["label"] for row in shown])
    axes.grid(axis="y", visible=False)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.set_xlabel("perplexity, times that of the unquantized model (95%)")
    axes.set_title(title)
    return figure


@styled
def schemes(rows: Sequence[Mapping[str, Any]]) -> KitFigure:
    """Draw what fine-tuning reaches on a base stored in each scheme, and what that costs.

    Args:
        rows: Rows of results/schemes.json.

    Returns:
        Each seed's test macro F1 and their mean; bits a weight; training time.
    """

    def label(row: Mapping[str, Any]) -> str:
        single = row["scheme"] in ("nf4", "fp4", "int4") and not row["double_quantization"]
        return row["scheme"] + (", scales in fp32" if single else "")

    names = list(dict.fromkeys(label(row) for row in rows))
    figure, (left, right) = new(height=1.3 + 0.55 * len(names), columns=2, sharey=True, width_ratios=[1.7, 1])
    slowest = max(row["train_seconds"] for row in rows)
    for place, name in enumerate(names):
        mine = [row for row in rows if label(row) == name]
        colour = SCHEME_COLOURS.get(mine[0]["scheme"], BLUE)
        scores = [row["f1_macro"] for row in mine]
        _seeds(left, place, scores, colour)
        seconds = float(np.mean([row["train_seconds"] for row in mine]))
        right.barh(place, seconds, color=colour, height=0.55)
        bits = np.mean([row["bits_per_parameter"] for row in mine])
        right.annotate(
            f"{seconds:.0f} s, {bits:.3g} bits", (seconds, place), (5, 0), textcoords="offset points", va="center",
            fontsize=11, annotation_clip=False,
        )  # fmt: skip
    left.margins(x=0.12)
    left.set_ylim(len(names) - 0.4, -0.75)
    left.set_yticks(range(len(names)), names)
    left.grid(axis="y", visible=False)
    left.xaxis.set_major_locator(MaxNLocator(4))
    left.set_xlabel("test macro F1, a dot a seed")
    right.grid(visible=False)
    right.set_xlim(0, 2.6 * slowest)
    right.xaxis.set_major_locator(MaxNLocator(2))
    together = max(row.get("jobs", 1) for row in rows)
    right.set_xlabel("training time, s" + (f"\n({together} runs share the device)" if together > 1 else ""))
    return figure


CONTENDER_NAMES = {
    "recipe": "explained recipe",
    "recipe_lean": "the same with less memory",
    "padded_longest": "Trainer, padded to the longest",
    "grouped": "Trainer, grouped by length",
    "compiled": "Trainer, torch.compile",
    "compiled_graphs": "Trainer, torch.compile to graphs",
    "unsloth": "unsloth",
    "ours_eager": "qlora_kit, eager",
    "ours": "qlora_kit",
}


@styled
def speed(rows: Sequence[Mapping[str, Any]], limits: Sequence[Mapping[str, Any]] = ()) -> KitFigure:
    """Draw how many texts a second each way of training reaches.

    Args:
        rows: Rows of results/speed.json; of those without a figure the record says what stopped them.
        limits: Its `limit`: drawn as a dashed line where it belongs to a panel.

    Returns:
        A panel for each model, method, precision and batch of a race (the rows of one command), those of a device
        together, each on its own scale; longer is faster. Who raced with nobody of the same method is not drawn.
    """
    count = Counter(map(_field, rows))
    # Quantized first: that is what the figure is about.
    fields = sorted(
        [field for field, contenders in count.items() if contenders > 1] or count,
        key=lambda field: (*field[:3], field[3] != "qlora", *field[4:]),
    )
    heights = [1.3 + 0.36 * count[field] for field in fields]
    figure, panels = new(height=sum(heights), rows=len(fields), squeeze=False, height_ratios=heights)
    for field, axes in zip(fields, panels[:, 0], strict=True):
        _race(axes, field, rows, limits)
    return figure


def _field(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return (*(row[key] for key in ("device", "model", "precision", "method", "batch")), row.get("command", ""))


def _race(
    axes: Any, field: tuple[Any, ...], rows: Sequence[Mapping[str, Any]], limits: Sequence[Mapping[str, Any]]
) -> None:
    """Draw one panel of `speed`."""
    device, model, precision, method, batch, _ = field
    mine = {row["contender"]: row for row in rows if _field(row) == field}
    names = [name for name in CONTENDER_NAMES if name in mine]
    most = max([row["samples_per_second"] or 0.0 for row in mine.values()]) or 1.0
    for place, name in enumerate(names):
        row = mine[name]
        rate = row.get("samples_per_second")
        problem = row.get("problem") or ""
        text = problem if problem.startswith("not ready") else "could not run"
        low, high = row.get("samples_per_second_range") or (0.0, 0.0)
        if rate:
            text = f"{rate:,.0f}"
            axes.barh(place, rate, height=0.6, color=BLUE if name.startswith("ours") else GREY)
            axes.plot([low, high], [place, place], color=BLACK, linewidth=1)
        axes.annotate(text, (high, place), (6, 0), textcoords="offset points", va="center")
    axes.set_xlabel("texts a second")
    for limit in (limit for limit in limits if _field(limit)[:-1] == field[:-1]):
        bound = limit["samples_per_second"]
        if bound < 2.5 * most:
            axes.axvline(bound, color=ORANGE, linestyle="--", linewidth=1.5)
        axes.set_xlabel(f"texts a second (limit of the arithmetic: {bound:,.0f})")
    what = f"{METHOD_NAMES[method]}, {precision}, batch {batch}"
    axes.set_title(f"{model}, {short_device(device)}:\n{what}", loc="left", fontsize=11)
    axes.set_yticks(range(len(names)), [CONTENDER_NAMES[name] for name in names])
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.margins(x=0.17)
    axes.set_xlim(left=0)
    axes.grid(axis="y", visible=False)


# ---- what a model is made of ----


@styled
def anatomy(parts: Sequence[Part]) -> KitFigure:
    """Draw what each part of a model takes, beside what the same numbers would take in 32 bits.

    Args:
        parts: What `anatomy.anatomy` returned.

    Returns:
        A bar a part: quantized, frozen as it is, or trained.
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


# ---- small things ----


# ---- memory ----

PART_COLOURS = {
    "base, linear layers": BLUE,
    "base, embeddings": SKY,
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


def _bytes_unit(most: float) -> tuple[float, str]:
    return (2**30, "GiB") if most >= 4 * 2**30 else (2**20, "MiB")


@styled
def memory_parts(rows: Sequence[Mapping[str, Any]], limit: float | None = None, title: str = "") -> KitFigure:
    """Draw where memory goes: a stacked bar a row, and what was measured beside what was planned.

    Args:
        rows: Each with `label`, `parts` (bytes by name, planned) and, where it was measured, `measured` (bytes).
        limit: Bytes that a device has, drawn as a line where it is near.
        title: Of the figure.

    Returns:
        The bars, the first row at the top.
    """
    totals = [sum(row["parts"].values()) for row in rows]
    most = max(*totals, *(row.get("measured") or 0 for row in rows), 1)
    unit, name = _bytes_unit(most)
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
            text = f"{measured / unit:,.1f} ({total / measured - 1:+.1%})"
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
    axes.set_yticks(range(len(rows)), [_cut(str(row["label"]), 30) for row in rows])
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
    """Draw memory against the time of a step, and which methods nothing beats in both.

    Args:
        rows: Each with `label`, `measured` (bytes) and `step_seconds`; those without are left out.

    Returns:
        A point a row; the line joins those that no other row beats in memory and time at once.
    """
    shown = sorted(
        (row for row in rows if row.get("measured") and row.get("step_seconds")), key=lambda row: row["step_seconds"]
    )
    figure, axes = new(height=1.6 + 4.2 + 0.22 * len(shown))
    if not shown:
        return figure
    unit, name = _bytes_unit(max(row["measured"] for row in shown))
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
        axes.plot([], [], "o", color=colour, label=f"{number}  {_cut(str(row['label']), 44)}")
    axes.set_title("What memory costs in time")
    axes.set_xlabel("seconds a step")
    axes.set_ylabel(name)
    axes.set_ylim(bottom=0)
    axes.margins(x=0.1)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=1)
    return figure


@styled
def memory_crossing(found: Mapping[str, Any]) -> KitFigure:
    """Draw memory against the size of the model, and where each method stops fitting a GPU.

    Args:
        found: What `memory.crossing` returned.

    Returns:
        A line a method; the dashed line is what the GPU has.
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


def _vertical(axes: Axes, x: float, colour: str, text: str, height: float, left: bool = False) -> None:
    axes.axvline(x, color=colour, linewidth=1.6)
    axes.annotate(
        text,
        (x, height),
        (-6 if left else 6, 0),
        xycoords=("data", "axes fraction"),
        textcoords="offset points",
        ha="right" if left else "left",
        va="center",
        fontsize=11,
        bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.75, "pad": 1.5},
    )


def _share(value: float) -> str:
    return f"{value:.1%}" if 0 < value < 0.1 else f"{value:.0%}"


def _cut(text: str, most: int = 34) -> str:
    text = " ".join(str(text).split())
    return text if len(text) <= most else text[: most - 1] + "…"
