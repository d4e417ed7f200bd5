"""Names beside the points of a figure, where each has room."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Annotation
from matplotlib.transforms import Bbox

from .style import GREY, any_script, ink

_STEPS = (0, 1, -1, 2, -2, 3, -3, 4, -4, 5, -5, 6, -6, 7, -7, 8, -8, 9, -9, 10, -10)


def beside_points(
    axes: Axes,
    points: Sequence[tuple[float, float]],
    texts: Sequence[str],
    colours: str | Sequence[str],
    *,
    size: float = 10,
    away: float = 8,
) -> None:
    """Write a text beside each point so that it covers no other text and no point, and stays within the axes.

    Call it when all else is drawn: places are sought in the figure as it is laid out. A text that stands further from
    its point is joined to it by a line.

    Args:
        axes: Where the points are.
        points: In the axes' data.
        texts: One for each point.
        colours: One for all texts, or one for each.
        size: The texts' size, points.
        away: From a point to its text, points.
    """
    figure = axes.get_figure(root=True)
    assert figure is not None and isinstance(figure.canvas, FigureCanvasAgg)
    each = [colours] * len(texts) if isinstance(colours, str) else colours
    dot = figure.dpi / 72  # pixels a point
    with any_script():
        figure.draw_without_rendering()
        renderer = figure.canvas.get_renderer()
        frame = axes.get_window_extent(renderer)
        half = 0.75 * away * dot
        places = [axes.transData.transform(point) for point in points]
        taken = [Bbox([[x - half, y - half], [x + half, y + half]]) for x, y in places]
        for place, point, text, colour in zip(places, points, texts, each, strict=True):
            label = axes.annotate(
                text, point, (away, 0), textcoords="offset points", color=ink(colour), fontsize=size, va="center",
                zorder=5, bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.75, "pad": 0.5},
            )  # fmt: skip
            label.set_in_layout(False)  # the layout is settled: the places were found in it
            width, height = label.get_window_extent(renderer).size
            for right, up in _offsets(away, 1.15 * height / dot):
                start = place[0] + right * dot - (width if right < 0 else 0)
                low = place[1] + up * dot - height / 2
                there = Bbox([[start, low], [start + width, low + height]])
                inside = frame.x0 <= there.x0 and there.x1 <= frame.x1 and frame.y0 <= there.y0 and there.y1 <= frame.y1
                if inside and not there.count_overlaps(taken):
                    _move(axes, label, right, up, away)
                    break
            else:  # no room at all: beside its point, whatever is there
                there = label.get_window_extent(renderer)
            taken.append(there)


def _offsets(away: float, line: float) -> Iterator[tuple[float, float]]:
    """Yield places for a text, nearest first: points to the right of its point (left: negative), and points up."""
    for step in _STEPS:
        yield away, step * line
        yield -away, step * line


def _move(axes: Axes, label: Annotation, right: float, up: float, away: float) -> None:
    """Put a label at an offset from its point, with a line if that is not right beside it."""
    label.set_position((right, up))
    label.set_horizontalalignment("right" if right < 0 else "left")
    if abs(up) > 1.5 * away:
        axes.annotate(
            "", label.xy, (right, up), textcoords="offset points", zorder=1,
            arrowprops={"arrowstyle": "-", "color": GREY, "linewidth": 0.8, "shrinkA": 0, "shrinkB": 0},
        ).set_in_layout(False)  # fmt: skip
