"""One style for all figures: sizes, colours, names of methods."""

from __future__ import annotations

import io
import os
import re
import textwrap
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any, ParamSpec

import matplotlib
import numpy as np
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap, to_hex, to_rgb
from matplotlib.figure import Figure

from ..system.files import saving

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
METHOD_COLOURS = {"qlora": BLUE, "lora": ORANGE, "full": RED, "recipe": GREY}
"""A method has one colour in all figures that compare methods."""
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
    # Users' labels may contain dollar signs: they are text, not mathematics.
    "text.parse_math": False,
}
HEAT = LinearSegmentedColormap.from_list("kit", ["#FFFFFF", "#9ECAE1", BLUE, "#08306B"])
_Args = ParamSpec("_Args")


@contextmanager
def any_script() -> Iterator[None]:
    """Draw without matplotlib's many warnings about a label in a script that the font lacks: boxes stand for it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"Glyph .* missing", category=UserWarning)
        yield


class KitFigure(Figure):
    """A matplotlib figure that notebooks display directly, with or without matplotlib's inline backend."""

    def png(self) -> bytes:
        """Return the figure as PNG, at `DPI` dots an inch."""
        stream = io.BytesIO()
        with matplotlib.rc_context(STYLE), any_script():
            # No software version in the file: equal figures give equal bytes.
            self.savefig(stream, format="png", dpi=DPI, metadata={"Software": None})
        return stream.getvalue()

    def _repr_png_(self) -> bytes:
        return self.png()


def save(figure: Figure, folder: str | Path, name: str) -> Path:
    """Write a figure as `folder/name.png`, completely or not at all.

    Args:
        figure: One of this module's figures, or any matplotlib figure.
        folder: Created if it is missing.
        name: File name without ending.

    Returns:
        The file.
    """
    path = Path(folder) / f"{name}.png"
    aside = path.with_name(f".{path.name}.partial")
    with saving(path):
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
    figure = KitFigure(figsize=(width, height), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, **grid)


def styled(draw: Callable[_Args, KitFigure]) -> Callable[_Args, KitFigure]:
    """Decorate a drawing function so that it uses the kit's style and leaves the user's style unchanged."""

    @wraps(draw)
    def in_style(*args: _Args.args, **kwargs: _Args.kwargs) -> KitFigure:
        with matplotlib.rc_context(STYLE):
            return draw(*args, **kwargs)

    return in_style


def short_device(device: str) -> str:
    """Return a device's short name for figures: e.g. `H100` instead of NVIDIA's full name, `CPU` for any processor."""
    if not device.startswith(("NVIDIA", "Tesla")):
        return "CPU" if device.endswith(("core", "cores")) else device
    return device.removeprefix("NVIDIA ").removeprefix("Tesla ").split(" ")[0]


def ink(colour: str) -> str:
    """Return a colour darkened until words in it can be read on white: a contrast of 4.5 to 1, as WCAG asks."""

    def light(channel: float) -> float:
        return channel / 12.92 if channel <= 0.04045 else ((channel + 0.055) / 1.055) ** 2.4

    mixed = np.array(to_rgb(colour))
    while (
        1.05 / (0.05 + sum(part * light(one) for part, one in zip((0.2126, 0.7152, 0.0722), mixed, strict=True))) < 4.5
    ):
        mixed *= 0.97
    return to_hex((mixed[0], mixed[1], mixed[2]))


def colour_of_method(name: str) -> str:
    """Return the colour of the method that a name has as a word, as `minilm qlora, H100` has; green if it has none."""
    words = re.split(r"[^a-z]+", name.lower())
    return next((colour for method, colour in METHOD_COLOURS.items() if method in words), GREEN)


def labels_of(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return each row's `label`, with its device where rows of several devices stand side by side."""
    devices = [short_device(str(row.get("device") or "")) for row in rows]
    several = len(set(devices)) > 1
    return [
        str(row["label"]) + (f" ({device or 'device unknown'})" if several else "")
        for row, device in zip(rows, devices, strict=True)
    ]


def smooth(values: Sequence[float] | np.ndarray, span: int | None = None) -> np.ndarray:
    """Smooth a curve by a centred moving average, which does not lag behind as an exponential one does.

    Args:
        values: The curve.
        span: How many points are averaged; None takes a twelfth of them. The window narrows near the ends to stay
            centred.

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


def dots_of_seeds(axes: Axes, place: float, scores: Sequence[float], colour: str) -> None:
    """Draw a dot for each seed's score, and a bar with a number for the mean."""
    mean = float(np.mean(scores))
    axes.plot(scores, [place] * len(scores), "o", color=colour, markersize=7, alpha=0.45, markeredgewidth=0)
    axes.plot([mean, mean], [place - 0.3, place + 0.3], color=colour, linewidth=3)
    axes.annotate(f"{mean:.4f}", (mean, place - 0.32), ha="center", va="bottom", fontsize=11)


def spread_out(values: Sequence[float], gap: float) -> list[float]:
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


def vertical(axes: Axes, x: float, colour: str, text: str, height: float, left: bool = False) -> None:
    """Draw a vertical line with a text beside it, at a height from 0 to 1."""
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


def in_percent(value: float) -> str:
    """Return a share as a percentage, with one decimal if it is below a tenth."""
    return f"{value:.1%}" if 0 < value < 0.1 else f"{value:.0%}"


def shortened(text: str, most: int = 34) -> str:
    """Return a text on one line, cut after `most` characters."""
    text = " ".join(str(text).split())
    return text if len(text) <= most else text[: most - 1] + "…"


def in_lines(text: str, width: int, most: int = 2) -> str:
    """Return a text on at most `most` lines of `width` characters; what does not fit is cut."""
    return "\n".join(textwrap.wrap(str(text), width, max_lines=most, placeholder=" …", break_on_hyphens=False))


def tail(text: str, most: int = 48) -> str:
    """Return the end of a text, where the names of layers differ, cut before its last `most` characters."""
    text = " ".join(str(text).split())
    return text if len(text) <= most else "…" + text[1 - most :].lstrip(".")


def head(figure: KitFigure, title: str) -> None:
    """Write a title over the whole width of a figure; one over its axes is cut where their labels are long."""
    if title:
        figure.suptitle(in_lines(title, 54), x=0.01, ha="left", fontsize=13, fontweight="bold")


def bytes_unit(most: float) -> tuple[float, str]:
    """Return the unit for showing up to `most` bytes: its size in bytes and its name."""
    return (2**30, "GiB") if most >= 4 * 2**30 else (2**20, "MiB")
