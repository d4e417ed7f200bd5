"""What every figure has to be, whoever drew it: whole, not empty, readable on a phone."""

from __future__ import annotations

import io

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Text
from matplotlib.transforms import Bbox
from PIL import Image

from qlora_kit.plots.style import KitFigure


def assert_whole(figure: KitFigure, name: str) -> None:
    """Nothing that is drawn is cut off by the figure's edge."""
    figure.draw_without_rendering()
    drawn = figure.get_tightbbox()  # inches, of everything that is drawn
    width, height = figure.get_size_inches()
    assert min(drawn.x0, drawn.y0) > -0.02, (name, drawn)
    assert drawn.x1 < width + 0.02 and drawn.y1 < height + 0.02, (name, drawn)


def texts_of(figure: KitFigure) -> list[tuple[str, Bbox]]:
    """Return every text that a figure shows, and the pixels that it takes."""
    figure.draw_without_rendering()
    canvas = figure.canvas
    assert isinstance(canvas, FigureCanvasAgg)
    renderer = canvas.get_renderer()
    # A tick outside an axis's ends is there, but is not drawn.
    beyond = set()
    for axes in figure.findobj(Axes):
        for axis in (axes.xaxis, axes.yaxis):
            low, high = sorted(axis.get_view_interval())
            room = 1e-6 * (high - low)
            for tick in (*axis.get_major_ticks(), *axis.get_minor_ticks()):
                if not low - room <= tick.get_loc() <= high + room or not axis.get_visible():
                    beyond |= {tick.label1, tick.label2}
    return [
        (text.get_text(), text.get_window_extent(renderer))
        for text in figure.findobj(Text)
        if text.get_visible() and text.get_text().strip() and text not in beyond
    ]


def faults_of_texts(figure: KitFigure) -> list[str]:
    """Return which texts are cut by the figure's edge, and which lie on each other."""
    shown = texts_of(figure)
    canvas = figure.bbox
    found = [
        f"{text!r} is cut by the edge"
        for text, box in shown
        if box.x0 < canvas.x0 - 1 or box.y0 < canvas.y0 - 1 or box.x1 > canvas.x1 + 1 or box.y1 > canvas.y1 + 1
    ]
    # A box has room above and below its letters: a fifth of a line.
    letters = [
        Bbox([[box.x0 + 0.5, box.y0 + 0.2 * line], [box.x1 - 0.5, box.y1 - 0.2 * line]])
        for text, box in shown
        for line in [min(box.width, box.height) / (1 + text.count("\n"))]
    ]
    return found + [
        f"{shown[place][0]!r} lies on {shown[other][0]!r}"
        for place, box in enumerate(letters)
        for other in range(place)
        if box.overlaps(letters[other])
    ]


def assert_drawn(figure: KitFigure, name: str) -> np.ndarray:
    """There is something in it. Returns the pixels, uint8, [height, width]."""
    image = np.asarray(Image.open(io.BytesIO(figure.png())).convert("L"))
    assert (image < 200).mean() > 0.002, name
    return image


def assert_readable_on_a_phone(figure: KitFigure, name: str) -> None:
    """At 1,000 pixels at most its smallest letters have ten points or more."""
    assert assert_drawn(figure, name).shape[1] <= 1000, name
    assert min(t.get_fontsize() for t in figure.findobj(Text) if t.get_text().strip()) >= 10, name
