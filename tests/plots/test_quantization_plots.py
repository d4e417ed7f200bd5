"""What the figures about quantization show; that they are whole is in test_plots.py."""

from __future__ import annotations

from makers import MAKERS, record
from matplotlib.text import Text

from qlora_kit import plots


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


def test_mean_and_seeds_of_schemes_are_those_of_the_rows():
    shown = {t.get_text() for t in plots.schemes(schemes_rows()).findobj(Text)}
    assert {"0.9320", "0.9330", "0.9370"} <= shown
    assert "nf4, scales in fp32" in shown and any("4.13 bits" in text for text in shown)
    assert any("none: base in\n16 bits" in text for text in shown)


def test_models_and_devices_of_schemes_are_never_in_one_panel():
    rows = [{**row, "model": "embedded:minilm", "device": "NVIDIA H100 80GB HBM3"} for row in schemes_rows()]
    moved = [{**row, "device": "NVIDIA H200"} for row in rows if row["scheme"] == "nf4"]
    figure = plots.schemes([*moved, *(row for row in rows if row["scheme"] != "nf4")])
    assert [axes.get_title(loc="left") for axes in figure.axes[::2]] == ["minilm, H200", "minilm, H100"]
    assert [len(axes.get_yticks()) for axes in figure.axes[::2]] == [2, 4]
    assert len(plots.schemes(record("schemes")["rows"]).axes) == 2


def test_filled_and_hollow_points_are_explained_where_there_are_both():
    def legend(name: str) -> list[str]:
        return [text.get_text() for legend in MAKERS[name]().legends for text in legend.get_texts()]

    assert legend("bits against error") == ["filled: scales quantized as well", "hollow: scales in fp32"]
    assert legend("bits against error, filled") == []


def test_the_unit_of_weights_is_told():
    shown = [text.get_text() for text in plots.weight_histogram({"a": [-1.0, 1.0, 3.0, -3.0]}).findobj(Text)]
    assert any("one standard deviation: 2.24" in text and "largest: 1.3 of them away" in text for text in shown)
