"""The figure of speed: contenders that trained the same model, on one scale."""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator
from matplotlib.transforms import blended_transform_factory

from .style import BLACK, BLUE, GREY, METHOD_NAMES, ORANGE, KitFigure, head, ink, new, short_device, styled

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
_LINE = 0.22  # inches for a line of text


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


class _Group:
    """Contenders of one model, method, precision and device, at one or more batch sizes."""

    def __init__(self, device: str, model: str, method: str, precision: str) -> None:
        self.device, self.model, self.method, self.precision = device, model, method, precision
        self.rows: dict[tuple[str, str], list[tuple[Mapping[str, Any], Mapping[str, Any]]]] = {}
        """By contender and method: each row, with the recipe's row of its race (empty if there is none)."""

    def add(self, raced: Sequence[Mapping[str, Any]]) -> None:
        recipe = next((row for row in raced if (row["contender"], row["method"]) == ("recipe", self.method)), {})
        for row in raced:
            self.rows.setdefault((row["contender"], row["method"]), []).append((row, recipe))

    def every(self) -> list[Mapping[str, Any]]:
        return [row for shown in self.rows.values() for row, _ in shown]

    def in_order(self) -> list[tuple[str, str]]:
        """Return contenders as `CONTENDER_NAMES` has them; one of another method follows the same of this."""
        order = list(CONTENDER_NAMES)
        return sorted(self.rows, key=lambda key: (order.index(key[0]), key[1] != self.method))

    def title(self) -> list[str]:
        batches = sorted({row["batch"] for row in self.every()})
        sizes = ", ".join(map(str, batches[:-1])) + (" and " if len(batches) > 1 else "") + str(batches[-1])
        hosts = list(dict.fromkeys(_host(row) for row in self.every()))
        told = [host if place == 0 else host.removeprefix("host: ") for place, host in enumerate(filter(None, hosts))]
        device = "; ".join([short_device(self.device), *told])
        if short_device(self.device) == "CPU":
            device = self.device
        first = f"{self.model}, {METHOD_NAMES.get(self.method, self.method)}, {self.precision}, batch {sizes}"
        return [first, *textwrap.wrap(device, 82)]


def _groups(rows: Sequence[Mapping[str, Any]]) -> list[_Group]:
    """Return what is drawn together: quantized first, because it is the figure's main subject."""
    found: dict[tuple[str, str, str, str], _Group] = {}
    panels: list[tuple[str, list[Mapping[str, Any]]]] = []
    known = [row for row in rows if row["contender"] in CONTENDER_NAMES]
    apart: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for name, raced in races(known).items():
        for row in raced:
            apart.setdefault((name, row["device"]), []).append(row)
    for raced in apart.values():
        methods = Counter(row["method"] for row in raced)
        crowd = [method for method, count in methods.items() if count > 1] or list(methods)[:1]
        # A contender without a rival of its own method stays beside those that it raced.
        alone = [row for row in raced if row["method"] not in crowd]
        for method in crowd:
            mine = [row for row in raced if row["method"] == method]
            panels.append((method, mine + (alone if method == crowd[0] else [])))
    for method, raced in panels:
        precision = Counter(row["precision"] for row in raced).most_common(1)[0][0]
        key = (raced[0]["device"], raced[0]["model"], method, precision)
        found.setdefault(key, _Group(*key)).add(raced)
    order = sorted(found, key=lambda key: (key[0], key[1], key[2] != "qlora", key[2], key[3]))
    return [found[key] for key in order]


@styled
def speed(rows: Sequence[Mapping[str, Any]], limits: Sequence[Mapping[str, Any]] = ()) -> KitFigure:
    """Draw the texts a second of each way of training, and the rate that its kernels alone would allow.

    Args:
        rows: Rows of results/speed.json; rows without a speed have the reason in `problem`.
        limits: The record's `limit`: drawn as a dashed line through the group that it belongs to, with its number.

    Returns:
        One chart on a log scale, further right is faster. A group has one model, method, precision and device, never
        two devices. A contender has a dot for each batch size, larger for larger batches, and the number of the
        largest. If the kernels were timed, a hollow dot below is its speed if the GPU never waited for its host.
    """
    groups = _groups(rows)
    timed = any(row.get("device_seconds") for group in groups for row in group.every())
    batches = sorted({row["batch"] for group in groups for row in group.every()})
    tall = sum(_height(group, limits) for group in groups)
    figure, axes = new(height=tall + 2.0 + 0.24 * (timed + bool(limits)))
    head(figure, "Training speed; further right is faster")
    top = 0.0
    labels: list[tuple[float, str]] = []
    for group in groups:
        _draw_group(axes, group, limits, top, labels, [5 + 2.5 * place for place in range(len(batches))], batches)
        top += _height(group, limits)
    axes.set_yticks([place for place, _ in labels], [name for _, name in labels], fontsize=10.5)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.set_ylim(top, 0)
    _log_scale(axes, groups, limits)
    notes = ["texts a second, log scale"]
    if _has_recipe(groups):
        notes.append("in brackets: times the recipe's rate")
    if len(batches) > 1:
        notes.append("larger dot: larger batch; number: the largest")
    if any(
        row.get("device_seconds") and row.get("device_seconds_means") != "busy" for g in groups for row in g.every()
    ):
        notes.append("kernels side by side are counted twice")
    axes.set_xlabel("\n".join(notes), fontsize=10.5)
    handles = [Line2D([], [], marker="o", color=GREY, linestyle="", markersize=8, label="as it trained")]
    if timed:
        handles.append(_hollow([], [], GREY, 8, label="by its kernels alone"))
    if limits:
        handles.append(Line2D([], [], color=ORANGE, linestyle="--", label="limit of the arithmetic"))
    figure.legend(handles=handles, loc="outside lower center", ncols=1)
    return figure


def _hollow(x: Any, y: Any, colour: str, size: float, label: str = "") -> Line2D:
    look: dict[str, Any] = {"marker": "o", "linestyle": "", "markerfacecolor": "white", "markeredgewidth": 1.6}
    return Line2D(x, y, color=colour, markersize=size, label=label, **look)


def _rate(row: Mapping[str, Any], kernels: bool) -> float | None:
    """Return a row's texts a second: as it trained, or as its kernel time alone would allow."""
    if not kernels:
        return row.get("samples_per_second") or None
    seconds = row.get("device_seconds")
    return row["batch"] / seconds if seconds else None


def _has_recipe(groups: Sequence[_Group]) -> bool:
    return any(
        recipe for group in groups for shown in group.rows.values() for row, recipe in shown if row is not recipe
    )


def _of_group(group: _Group, limits: Sequence[Mapping[str, Any]]) -> list[float]:
    batches = {row["batch"] for row in group.every()}
    return [
        limit["samples_per_second"]
        for limit in limits
        if (limit["model"], limit["method"], limit["precision"], limit["device"])
        == (group.model, group.method, group.precision, group.device)
        and limit["batch"] in batches
    ]


def _row_height(group: _Group) -> float:
    return 0.46 if any(row.get("device_seconds") for row in group.every()) else 0.29


def _height(group: _Group, limits: Sequence[Mapping[str, Any]]) -> float:
    """Return a group's height in inches; the axis counts in them, too."""
    lines = len(group.title()) + bool(_of_group(group, limits))
    return 0.3 + _LINE * lines + _row_height(group) * len(group.rows)


def _draw_group(
    axes: Axes,
    group: _Group,
    limits: Sequence[Mapping[str, Any]],
    top: float,
    labels: list[tuple[float, str]],
    sizes: Sequence[float],
    batches: Sequence[int],
) -> None:
    """Draw one group below `top`, and add its contenders' names and places to `labels`."""
    at = top + 0.24
    over_all = blended_transform_factory(axes.get_figure(root=True).transFigure, axes.transData)  # type: ignore[union-attr]
    for number, line in enumerate(group.title()):
        axes.text(
            0.012, at, line, transform=over_all, va="center", fontsize=10.5, fontweight="normal" if number else "bold",
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 1},  # over the grid
        ).set_in_layout(False)  # fmt: skip
        at += _LINE
    bounds = _of_group(group, limits)
    if bounds:
        ends = dict.fromkeys(f"{bound:,.0f}" for bound in (min(bounds), max(bounds)))
        axes.annotate(
            f"limit {' to '.join(ends)}", (max(bounds), at), (3, 0), textcoords="offset points", ha="right",
            va="center", fontsize=10, color=ink(ORANGE),
        )  # fmt: skip
        at += _LINE
    pitch = _row_height(group)
    first = at - 0.1
    for key in group.in_order():
        middle = first + pitch / 2
        other = "" if key[1] == group.method else f", {METHOD_NAMES.get(key[1], key[1])}"
        labels.append((middle, CONTENDER_NAMES[key[0]] + other))
        _draw_row(axes, group.rows[key], middle, pitch, sizes, batches)
        first += pitch
    for bound in bounds:
        axes.plot([bound, bound], [at - 0.1, first], color=ORANGE, linestyle="--", linewidth=1.4, zorder=1)
    axes.axhline(first + 0.06, color="#E6E6E6", linewidth=0.8)


def _draw_row(
    axes: Axes,
    shown: Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]],
    middle: float,
    pitch: float,
    sizes: Sequence[float],
    batches: Sequence[int],
) -> None:
    """Draw a contender: a dot for each batch as it trained and, below, by its kernels."""
    colour = BLUE if shown[0][0]["contender"].startswith("ours") else GREY
    timed = any(_rate(row, kernels=True) for row, _ in shown)
    if not any(_rate(row, kernels=False) for row, _ in shown):
        problem = shown[0][0].get("problem") or ""
        text = problem if problem.startswith("not ready") else "could not run"
        axes.annotate(
            textwrap.shorten(text, 44, placeholder=" …"), (0, middle), (6, 0), xycoords=("axes fraction", "data"),
            textcoords="offset points", va="center", fontsize=10,
        )  # fmt: skip
        return
    for kernels in (False, True) if timed else (False,):
        place = middle + (0 if not timed else 0.085 if kernels else -0.085)
        rates = [(row, recipe, rate) for row, recipe in shown if (rate := _rate(row, kernels))]
        for row, _, rate in rates:
            size = sizes[batches.index(row["batch"])]
            if kernels:
                axes.add_line(_hollow([rate], [place], colour, size - 1))
                continue
            low, high = row.get("samples_per_second_range") or (rate, rate)
            axes.plot([low, high], [place, place], color=BLACK, linewidth=1, zorder=2)
            axes.plot([rate], [place], "o", color=colour, markersize=size, zorder=3)
        if rates:
            row, recipe, rate = max(rates, key=lambda one: one[0]["batch"])
            before = _rate(recipe, kernels) if recipe and recipe is not row else None
            right = max((one.get("samples_per_second_range") or (0, 0))[1] if not kernels else 0 for one, _, _ in rates)
            axes.annotate(
                f"{rate:,.0f}" + (f" ({rate / before:.3g}x)" if before else ""),
                (max(right, *(one[2] for one in rates), rate), place), (8, 0), textcoords="offset points", va="center",
                fontsize=10, zorder=4, bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5},
            )  # fmt: skip


def _log_scale(axes: Axes, groups: Sequence[_Group], limits: Sequence[Mapping[str, Any]]) -> None:
    """Set the axis so that every dot, range and limit is in it, with room for the numbers at the right."""
    found = [
        float(value)
        for group in groups
        for row in group.every()
        for value in (_rate(row, False), _rate(row, True), *(row.get("samples_per_second_range") or ()))
        if value
    ] or [1.0, 10.0]
    most = max(found)
    bounds = [bound for group in groups for bound in _of_group(group, limits)]
    axes.set_xscale("log")
    low = 0.7 * min(found)
    # A number takes some three tenths of the axis.
    axes.set_xlim(low, max([most * (most / low) ** 0.45, *(1.15 * bound for bound in bounds)]))
    axes.xaxis.set_major_locator(LogLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}" if value >= 1 else f"{value:g}"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.grid(axis="y", visible=False)


def _host(row: Mapping[str, Any]) -> str:
    """Return the CPU of a GPU's host, which launches its kernels; nothing where it is not known."""
    environment = row.get("environment") or {}
    if short_device(row["device"]) == "CPU":
        return ""
    host = environment.get("host") or {}
    cpu = f"{host['cpu']}, {host['cores']} cores" if host else environment.get("cpu")
    if not cpu:
        return ""
    threads = host.get("threads") or environment.get("threads")
    line = f"host: {cpu}" + (f", {threads} thread{'s' * (threads != 1)}" if threads else "")
    return line.replace("(R)", "").replace("(TM)", "").replace(" Processor", "")
