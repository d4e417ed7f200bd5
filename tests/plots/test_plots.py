"""Every figure, of real inputs: whole, readable, no text cut or on another, and nothing is left behind."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from figures import assert_drawn, assert_readable_on_a_phone, assert_whole, faults_of_texts, texts_of
from makers import LONG, MAKERS, bad_cut, bad_overlap, half_h200, measured, race, record, runs_of, score
from matplotlib.colors import to_hex
from PIL import Image

from qlora_kit import plots


def texts(figure: plots.KitFigure) -> list[str]:
    return [text for text, _ in texts_of(figure)]


@pytest.mark.filterwarnings("ignore:Glyph", "ignore::FutureWarning")
@pytest.mark.parametrize("name", MAKERS)
def test_a_figure_is_whole_and_no_text_is_cut_or_on_another(name):
    figure = MAKERS[name]()
    assert faults_of_texts(figure) == []
    assert_whole(figure, name)
    if name.startswith(("confusions", "most confused")):  # those are wide on purpose
        assert_drawn(figure, name)
    else:
        assert_readable_on_a_phone(figure, name)


def test_every_function_that_draws_has_a_maker():
    drawing = {name for name, one in vars(plots).items() if hasattr(one, "__wrapped__")}
    source = (Path(__file__).parent / "makers.py").read_text(encoding="utf-8")
    assert len(drawing) > 20 and [name for name in drawing if f"plots.{name}" not in source] == []


def test_the_measure_of_texts_finds_a_cut_one_and_two_on_each_other():
    assert faults_of_texts(bad_overlap()) == ["'and another over it' lies on 'one text'"]
    assert faults_of_texts(bad_cut()) == ["'a text that leaves the figure at its right edge' is cut by the edge"]
    figure, axes = plots.new()
    axes.set_xticks([0, 1, 9], ["long names of ticks"] * 2 + ["out of the axis, never drawn"])
    axes.set_xlim(-4, 4)
    assert faults_of_texts(figure) == ["'long names of ticks' lies on 'long names of ticks'"]


# --- what they show ---------------------------------------------------------------------------------------------


def test_all_77_labels_of_the_matrix_are_named_on_both_sides():
    shown = texts(MAKERS["confusions"]())
    assert sum(sum(text.endswith(f"  {i + 1}") for text in shown) == 2 for i in range(77)) == 77


def test_the_most_frequent_confusions_are_ringed_and_listed():
    matrix = np.array([[9, 0, 1], [4, 9, 0], [0, 2, 9]])
    figure = plots.confusion_matrix(matrix, ["alpha", "beta", "gamma"])
    lines = figure.get_supxlabel().splitlines()
    assert lines[1:] == [
        "1  beta → alpha: 4 of 13",
        "2  gamma → beta: 2 of 11",
        "3  alpha → gamma: 1 of 10",
    ]
    rings = figure.axes[0].lines[0].get_xydata().tolist()
    assert rings == [[0, 1], [1, 2], [2, 0]]  # column, row
    assert plots.confusion_matrix([[1, 0], [0, 2]], "ab").get_supxlabel() == ""


def test_labels_are_text_not_mathematics():
    figure = MAKERS["confusions, hostile"]()
    figure.png()  # "$\\frac{" raises where it is parsed
    assert any("$\\frac{" in text for text in texts(figure))


def test_a_method_has_one_colour():
    figure = plots.accuracy({"minilm qlora, H100": [0.9], "minilm lora, CPU": [0.91], "other": [0.92]}, {})
    colours = [to_hex(line.get_color()) for line in figure.axes[0].lines[::2]]
    assert colours == [plots.BLUE.lower(), plots.ORANGE.lower(), plots.GREEN.lower()]


def test_words_in_a_colour_can_be_read_on_white():
    from qlora_kit.plots.style import ink

    for colour in plots.PALETTE:
        light = [
            c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in matplotlib.colors.to_rgb(ink(colour))
        ]
        assert 1.05 / (0.05 + np.dot((0.2126, 0.7152, 0.0722), light)) >= 4.5
    assert ink(plots.BLACK) == plots.BLACK


def test_an_interval_that_lies_low_is_explained_and_another_is_not():
    low = plots.metric_intervals({"few rows": score(0.8, 0.6, 0.79)})
    assert "Few rows a label" in low.get_supxlabel()
    assert plots.metric_intervals({"many rows": score(0.93)}).get_supxlabel() == ""
    # The number stands right of its dot, where the interval ends before it.
    axes = low.axes[1]
    assert axes.texts[0].xy[0] == 0.8


def test_runs_of_a_method_are_a_median_and_a_band_and_devices_are_apart():
    curves = [
        {"method": "qlora", "device": "NVIDIA H100", "step": [1, 3], "loss": [high, high], "grad_norm": [1, 1]}
        for high in (1.0, 2.0, 6.0)
    ]
    other = {"method": "qlora", "device": "NVIDIA H200", "step": [1, 3], "loss": [4.0, 4.0], "grad_norm": [1, None]}
    top = plots.stability([*curves, other]).axes[0]
    assert [line.get_ydata().tolist() for line in top.lines] == [[2.0, 2.0], [4.0, 4.0]]
    assert [line.get_label() for line in top.lines] == ["QLoRA, 3 runs, H100", "QLoRA, 1 run, H200"]
    band = top.collections[0].get_paths()[0].get_extents()
    assert (band.y0, band.y1) == (1.0, 6.0) and len(top.collections) == 1
    # Runs that logged other steps meet where both have values.
    late = {**curves[0], "step": [2, 4], "loss": [3.0, 5.0]}
    line = plots.stability([curves[0], late]).axes[0].lines[0]
    assert line.get_xydata().tolist() == [[2, 2.0], [3, 2.5]]


def test_speed_keeps_devices_apart_and_labels_each_limit():
    rows = half_h200(record("speed")["rows"])
    figure = plots.speed(rows, record("speed")["limit"])
    assert len(figure.axes) == 1 and figure.axes[0].get_xscale() == "log"
    shown = texts(figure)
    assert any(text.startswith("H100") for text in shown) and any(text.startswith("H200") for text in shown)
    limits = [limit for limit in record("speed")["limit"] if limit["model"] == "minilm"]
    assert all(f"limit {limit['samples_per_second']:,.0f}" in shown for limit in limits)


def test_a_race_with_rows_of_two_devices_is_drawn_as_two():
    rows = [{**row, "race": "one name", "device": "NVIDIA H200"} for row in race()]
    rows[3] = {**rows[3], "device": "NVIDIA H100"}
    shown = texts(plots.speed(rows))
    assert shown.count("H200") == 2 and shown.count("H100") == 1  # two methods, and one alone


def test_rows_of_several_devices_are_named_with_theirs():
    rows = measured("dialogpt-medium")[:2]
    for draw in (plots.memory_parts, plots.memory_against_time):
        assert not any("H100" in text for text in texts(draw(rows)))
        shown = "\n".join(texts(draw([rows[0], {**rows[1], "device": "NVIDIA H200"}])))
        assert "(H100)" in shown and "(H200)" in shown


def test_a_number_does_not_stand_on_the_line_of_the_limit():
    figure = MAKERS["seven billion"]()
    figure.draw_without_rendering()
    axes = figure.axes[0]
    line = next(one for one in axes.lines if str(one.get_label()).startswith("limit")).get_window_extent()
    for text in axes.texts:
        box = text.get_window_extent()
        assert not box.x0 <= line.x0 <= box.x1, text.get_text()


def test_every_point_of_memory_against_time_has_its_name():
    rows = [row for row in measured("dialogpt-medium") if row["step_seconds"]]
    named = [{**row, "label": f"way {place}"} for place, row in enumerate(rows)]
    axes = plots.memory_against_time(named).axes[0]
    assert {f"way {place}" for place in range(len(rows))} <= {text.get_text() for text in axes.texts}


def test_the_error_of_a_block_has_a_panel_of_its_own():
    figure = plots.block_before_after([0.1, -0.2, 0.3], {"nf4": [0.1, -0.25, 0.2], "fp4": [0.0, -0.2, 0.3]})
    heights = [[round(bar.get_height(), 6) for bar in axes.patches] for axes in figure.axes[1::2]]
    assert heights == [[-0.05, 0.0, -0.1], [0.0, -0.1, 0.0]]
    assert len({axes.get_ylim() for axes in figure.axes[1::2]}) == 1


def test_no_figure_fails_where_a_run_says_no_device():
    assert texts(plots.stability([{**one, "device": None} for one in runs_of("embedded:minilm")]))
    assert texts(plots.schemes([{**row, "device": None, "jobs": None} for row in record("schemes")["rows"]]))


def test_long_names_wrap_and_are_cut_at_the_end_only():
    figure = plots.intervals([{"label": LONG[0], "value": 1.0}], 1)
    assert figure.axes[0].texts[0].get_text().replace("\n", " ") == LONG[0]


# --- files and style --------------------------------------------------------------------------------------------


def test_saving_is_whole_and_repeatable(tmp_path):
    figure = MAKERS["padding"]()
    first = plots.save(figure, tmp_path / "new" / "folder", "padding")
    assert first == tmp_path / "new" / "folder" / "padding.png"
    content = first.read_bytes()
    assert plots.save(figure, first.parent, "padding").read_bytes() == content
    assert [p.name for p in first.parent.iterdir()] == ["padding.png"]
    assert figure._repr_png_() == content
    with Image.open(first) as image:
        assert image.size[0] == round(plots.WIDTH * plots.DPI)
    other = matplotlib.figure.Figure()
    other.subplots().plot([1, 2])
    assert plots.save(other, tmp_path, "other").stat().st_size > 1000


def test_your_own_style_and_pyplot_are_left_alone():
    code = (
        "import sys, matplotlib\n"
        "before = dict(matplotlib.rcParams)\n"
        "from qlora_kit import plots\n"
        "bin = {'low': 0, 'high': 1, 'count': 3, 'confidence': 0.5, 'accuracy': 0.4}\n"
        "plots.reliability({'ece': 0.1, 'rows': [bin]}).png()\n"
        "assert dict(matplotlib.rcParams) == before\n"
        "assert 'torch' not in sys.modules\n"
        "from matplotlib import pyplot\n"
        "assert pyplot.get_fignums() == []\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_smoothing_keeps_a_level_and_damps_noise():
    assert plots.smooth([2.0] * 50) == pytest.approx([2.0] * 50)
    noise = np.random.default_rng(0).normal(size=300)
    assert plots.smooth(noise)[100:].std() < 0.4 * noise.std()
    assert plots.smooth([3.0]) == pytest.approx([3.0])
