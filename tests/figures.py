"""What every figure has to be, whoever drew it: whole, not empty, readable on a phone."""

from __future__ import annotations

import io

import numpy as np
from matplotlib.text import Text
from PIL import Image

from qlora_kit.plots.style import KitFigure


def assert_whole(figure: KitFigure, name: str) -> None:
    """Nothing that is drawn is cut off by the figure's edge."""
    figure.png()
    drawn = figure.get_tightbbox()  # inches, of everything that is drawn
    width, height = figure.get_size_inches()
    assert min(drawn.x0, drawn.y0) > -0.02, (name, drawn)
    assert drawn.x1 < width + 0.02 and drawn.y1 < height + 0.02, (name, drawn)


def assert_drawn(figure: KitFigure, name: str) -> np.ndarray:
    """There is something in it. Returns the pixels, uint8, [height, width]."""
    image = np.asarray(Image.open(io.BytesIO(figure.png())).convert("L"))
    assert (image < 200).mean() > 0.002, name
    return image


def assert_readable_on_a_phone(figure: KitFigure, name: str) -> None:
    """At 1,000 pixels at most its smallest letters have ten points or more."""
    assert assert_drawn(figure, name).shape[1] <= 1000, name
    assert min(t.get_fontsize() for t in figure.findobj(Text) if t.get_text().strip()) >= 10, name
