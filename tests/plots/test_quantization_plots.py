"""The figures about quantization: all of each is inside its frame, and its labels don't cover each other."""

from __future__ import annotations

import numpy as np
import pytest
from figures import assert_readable_on_a_phone, assert_whole
from matplotlib.text import Text

from qlora_kit import plots

SCHEMES = ("nf4", "fp4", "int4", "e2m1", "e3m0")


def schemes_rows() -> list[dict]:
    contenders = (("none", False), ("int8", False), ("nf4", True), ("nf4", False), ("fp4", True), ("int4", True))
    return [
        {
            "scheme": scheme,
            "double_quantization": double,
            "f1_macro": 0.93 + 0.001 * place + 0.002 * seed,
            "train_seconds": 100.0 + 10 * place,
            "bits_per_parameter": 4.127,
        }
        for place, (scheme, double) in enumerate(contenders)
        for seed in range(3)
    ]


@pytest.fixture(scope="module")
def figures() -> dict[str, plots.KitFigure]:
    rng = np.random.default_rng(0)
    block = rng.normal(size=64)
    points = [
        {"label": s, "scheme": s, "bits": bits, "snr_db": snr, "hollow": bits == 4.5}
        for s, snr in zip(SCHEMES, (20.7, 18.3, 19.4, 19.5, 14.5), strict=True)
        for bits in (4.127, 4.5)
    ]
    return {
        "weights": plots.weight_histogram({"a.long.name.of.a.layer" * 6: block, "b": rng.normal(size=5000)}),
        "block": plots.block_before_after(block, {name: block.round(1) for name in SCHEMES[:3]}),
        "codebooks": plots.codebooks({name: np.linspace(-1, 1, 16).tolist() for name in SCHEMES}),
        "layers": plots.error_by_layer(
            [{"layer": str(k), "scheme": s, "snr_db": 20 + k % 3} for s in SCHEMES for k in range(210)], "a model"
        ),
        "layers, one": plots.error_by_layer([{"layer": "0", "scheme": "nf4", "snr_db": 20.0}]),
        "block sizes": plots.error_by_block_size(
            [
                {"scheme": s, "block_size": 2**k, "snr_db": 20 - k / 4 - place}
                for place, s in enumerate(SCHEMES)
                for k in range(5, 13)
            ],
            20.2,
        ),
        "bits": plots.bits_against_error(
            [*points, {"label": "int8", "scheme": "int8", "bits": 8.03, "snr_db": 42.0}], {3: 14.6, 4: 20.2, 8: 43.9}
        ),
        "outliers": plots.outlier_in_block(
            [{"scheme": s, "outlier": 2**k, "rms": k / 7} for s in SCHEMES[:3] for k in range(1, 8)]
        ),
        "perplexity": plots.perplexity_ratios(
            [
                {"label": f"{s}, scales in fp32", "scheme": s, "value": 1.2, "low": 1.1, "high": 1.3 + place / 10}
                for place, s in enumerate(SCHEMES)
            ],
            "a model, a text",
        ),
        "schemes": plots.schemes(schemes_rows()),
    }


def test_nothing_is_cut_off(figures):
    for name, figure in figures.items():
        assert_whole(figure, name)


def test_readable_at_phone_width(figures):
    for name, figure in figures.items():
        assert_readable_on_a_phone(figure, name)


def test_named_schemes_do_not_cover_each_other(figures):
    for name in ("layers", "block sizes", "bits"):
        figure = figures[name]
        figure.png()
        renderer = figure.canvas.get_renderer()
        boxes = [
            t.get_window_extent(renderer)
            for t in figure.findobj(Text)
            if t.get_text().split(" ")[0] in SCHEMES and t.get_visible()
        ]
        assert len(boxes) == len(SCHEMES)
        for place, box in enumerate(boxes):
            for other in boxes[place + 1 :]:
                inner = (box.y1 - box.y0) * 0.25  # the bounding box has room above and below the letters
                apart = box.y0 + inner > other.y1 - inner or other.y0 + inner > box.y1 - inner
                assert apart or box.x1 < other.x0 or other.x1 < box.x0, name


def test_mean_and_seeds_of_schemes_are_those_of_the_rows(figures):
    shown = {t.get_text() for t in figures["schemes"].findobj(Text)}
    assert {"0.9320", "0.9330", "0.9370"} <= shown
    assert "nf4, scales in fp32" in shown and any("4.13 bits" in text for text in shown)
