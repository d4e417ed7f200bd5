"""Figures of training: curves, stability, trials of a search."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator, NullLocator

from .style import (
    BLUE,
    GREEN,
    GREY,
    METHOD_COLOURS,
    METHOD_NAMES,
    ORANGE,
    PALE,
    PALETTE,
    RED,
    SKY,
    KitFigure,
    new,
    short_device,
    smooth,
    styled,
)


@styled
def training_curves(training: Mapping[str, Any]) -> KitFigure:
    """Draw a run's curves: loss, validation scores, learning rates, speed.

    Args:
        training: What a run's `training.json` holds (`Run.training`).

    Returns:
        Panels over the optimizer's steps; panels without data are left out.
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


@styled
def stability(curves: Sequence[Mapping[str, Any]]) -> KitFigure:
    """Draw the training loss and the gradient norm of several runs, coloured by method.

    Args:
        curves: Each with `method` (`qlora`, `lora`, `full` or another) and the lists `step`, `loss` and
            `grad_norm`, with None if a step has no value; and, if it is known, `device`.

    Returns:
        Two panels over the optimizer's steps. Of several runs of a method on one device, the median is drawn, and a
        band from the lowest to the highest.
    """
    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for curve in curves:
        groups.setdefault((curve["method"], short_device(curve.get("device") or "")), []).append(curve)
    devices = list(dict.fromkeys(device for _, device in groups))
    figure, (top, bottom) = new(height=5.4 + 0.24 * len(groups), rows=2, sharex=True)
    for (method, device), runs in groups.items():
        label = f"{METHOD_NAMES.get(method, method)}, {len(runs)} run{'s' * (len(runs) > 1)}"
        if len(devices) > 1:
            label += f", {device or 'device unknown'}"
        # Devices differ in their line, methods in their colour.
        dashes: Any = ("-", (0, (5, 2)), (0, (1, 1.5)), (0, (5, 1.5, 1, 1.5)))[devices.index(device) % 4]
        look: dict[str, Any] = {"color": METHOD_COLOURS.get(method, GREEN), "linestyle": dashes, "linewidth": 1.6}
        for axes, key in ((top, "loss"), (bottom, "grad_norm")):
            steps, values = _over_runs(runs, key)
            if not len(steps):
                continue
            # With few points, a line alone is hard to see.
            axes.plot(steps, np.median(values, axis=0), marker="o" if len(steps) < 20 else None, markersize=4,
                      label=label if axes is top else None, **look)  # fmt: skip
            if len(runs) > 1:
                axes.fill_between(steps, values.min(axis=0), values.max(axis=0), color=look["color"], alpha=0.16, lw=0)
    top.set_title("Training loss")
    top.set_ylim(bottom=0)
    bottom.set_title("Gradient norm, before clipping")
    bottom.set_yscale("log")
    bottom.yaxis.set_major_locator(LogLocator(subs=(1.0, 3.0)))
    bottom.yaxis.set_major_formatter(lambda value, _: f"{value:g}")  # the default uses mathtext
    bottom.yaxis.set_minor_locator(NullLocator())
    bottom.set_xlim(left=0)
    bottom.set_xlabel("step" + ("; the median, and from the lowest to the highest run" if len(curves) > 1 else ""))
    figure.legend(*top.get_legend_handles_labels(), loc="outside lower center", ncols=1)
    return figure


def _over_runs(runs: Sequence[Mapping[str, Any]], key: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the steps that all runs reach, int `[steps]`, and each run's value there, `[runs, steps]`."""
    found = []
    for run in runs:
        pairs = [(step, value) for step, value in zip(run["step"], run[key], strict=True) if value is not None]
        if pairs:
            found.append(np.array(pairs, dtype=float).T)
    if not found:
        return np.empty(0), np.empty((0, 0))
    first, last = max(one[0][0] for one in found), min(one[0][-1] for one in found)
    steps = np.unique(np.concatenate([one[0] for one in found]))
    steps = steps[(steps >= first) & (steps <= last)]
    return steps, np.array([np.interp(steps, *one) for one in found])


@styled
def search_trials(record: Mapping[str, Any]) -> KitFigure:
    """Draw a search: validation macro F1 by trial, and by learning rate if that was searched.

    Args:
        record: What a search's `search.json` holds (`Search.record`).

    Returns:
        A point for each trial (a stopped trial's last score); on the left, a line for the best finished trial so far.
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
        between = (1.0,) if high > 100 * low else (1.0, 3.0) if high > 10 * low else (1.0, 2.0, 4.0)
        grid[0, 1].xaxis.set_major_locator(LogLocator(subs=between))
        # As 1e-4; the default uses mathtext.
        grid[0, 1].xaxis.set_major_formatter(lambda rate, _: f"{rate:.0e}".replace("e-0", "e-").replace("e+0", "e"))
        grid[0, 1].xaxis.set_minor_locator(NullLocator())
    if trials:
        handles, labels = grid[0, 0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=len(labels))
    return figure
