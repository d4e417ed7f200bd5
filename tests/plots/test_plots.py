"""Figures of real data: all of each is inside its frame, whatever the labels are, and nothing is left behind."""

from __future__ import annotations

import subprocess
import sys

import matplotlib
import numpy as np
import pytest
from figures import assert_drawn, assert_readable_on_a_phone, assert_whole
from matplotlib.text import Text
from PIL import Image

import qlora_kit as qk
from qlora_kit import data as kit
from qlora_kit import evaluation, plots

HOSTILE = ["$\\frac{", "a very long label " * 12, "🙂 ok", "שלום", "<script>", "%s {x} \\n", "line\nbreak", ""]


def predictions(classes: int, rows: int = 800, seed: int = 0):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, rows)
    logits = rng.normal(size=(rows, classes))
    logits[np.arange(rows), labels] += 3.5
    return logits, labels


def record(steps: int, epochs: int, rates=("learning_rate",), best=None, timing=True) -> dict:
    ends = [round(steps * (i + 1) / epochs) for i in range(epochs)]
    rng = np.random.default_rng(0)
    return {
        "best_step": best,
        "losses": [
            {
                "step": s,
                "loss": 4 * np.exp(-3 * s / steps) + rng.random() * 0.4,
                **{r: 1e-3 * (1 - s / steps) for r in rates},
            }
            for s in range(1, steps + 1, max(1, steps // 200))
        ],
        "epochs": [
            {
                "step": end,
                "epoch": i + 1.0,
                "validation": {"accuracy": 0.8 + 0.02 * i, "f1_macro": 0.79 + 0.02 * i, "loss": 0.8 - 0.05 * i},
                "timing": {"tokens_per_second": 900.0 + 30 * i if timing else None},
            }
            for i, end in enumerate(ends)
        ],
    }


def race() -> list[dict]:
    field = {"model": "minilm", "precision": "bf16", "batch": 32, "device": "CPU, 2 cores"}
    rates = {"recipe": 20.0, "grouped": 127.0, "unsloth": None, "ours": 221.0}
    return [
        {**field, "method": method, "contender": name, "samples_per_second": rate, "problem": "no module" * 20}
        for method in ("qlora", "lora")
        for name, rate in rates.items()
    ]


def score(value: float) -> dict:
    return {name: {"value": value, "low": value - 0.01, "high": value + 0.009} for name in evaluation.METRICS}


def sizes(names, counts) -> dict:
    return {
        "class_sizes": {n: {"train": int(c), "validation": 1, "test": 2} for n, c in zip(names, counts, strict=True)}
    }


@pytest.fixture(scope="module")
def figures() -> dict[str, plots.KitFigure]:
    banking = qk.banking77()
    names = banking.label_names
    logits, labels = predictions(77, 3080)
    matrix = evaluation.confusion_matrix(logits, labels, 77)
    few_logits, few_labels = predictions(len(HOSTILE), 200)
    few_matrix = evaluation.confusion_matrix(few_logits, few_labels, len(HOSTILE))
    two_logits, two_labels = np.eye(2)[[0, 1, 1]] * 9, [0, 1, 1]
    lengths = np.minimum(np.random.default_rng(0).geometric(0.06, 3000) + 3, 98)
    return {
        "class sizes": plots.class_sizes(banking.report()),
        "class sizes, few": plots.class_sizes(sizes(HOSTILE, range(1, len(HOSTILE) + 1))),
        "class sizes, two": plots.class_sizes(sizes("ab", (5, 5))),
        "lengths": plots.token_lengths(lengths, 128),
        "lengths, cut": plots.token_lengths(lengths * 40, 128),
        "lengths, equal": plots.token_lengths([3, 3, 3], 128),
        "padding": plots.padding(kit.padding_waste(lengths, 32)),
        "training": plots.training_curves(record(1128, 4, ("learning_rate", "learning_rate_head"), best=1128)),
        "training, short": plots.training_curves(record(1, 1, (), timing=False)),
        "training, many epochs": plots.training_curves(record(300, 30)),
        "metrics": plots.metric_intervals({"fine-tuned, NF4": score(0.936), "frozen base + SVM": score(0.9286)}),
        "metrics, hostile": plots.metric_intervals({name: score(0.5) for name in HOSTILE}, ("accuracy", "loss")),
        "F1": plots.f1_by_label(evaluation.per_label(logits, labels, names)),
        "F1, few": plots.f1_by_label(evaluation.per_label(few_logits, few_labels, HOSTILE)),
        "F1, perfect": plots.f1_by_label(evaluation.per_label(two_logits, two_labels, "ab")),
        "confusions": plots.confusion_matrix(matrix, names),
        "confusions, few": plots.confusion_matrix(few_matrix, HOSTILE),
        "confusions, perfect": plots.confusion_matrix([[1, 0], [0, 2]], "ab"),
        "most confused": plots.most_confused(matrix, names),
        "most confused, few": plots.most_confused(few_matrix, HOSTILE),
        "most confused, perfect": plots.most_confused([[1, 0], [0, 2]], "ab"),
        "speed": plots.speed(race(), [{**race()[0], "samples_per_second": 400.0}]),
        "reliability": plots.reliability(evaluation.calibration(logits, labels)),
        "reliability, perfect": plots.reliability(evaluation.calibration(two_logits, two_labels)),
    }


@pytest.mark.filterwarnings("ignore:Glyph")
def test_nothing_is_cut_off(figures):
    for name, figure in figures.items():
        assert_whole(figure, name)


def test_every_figure_has_something_in_it_and_is_readable_at_phone_width(figures):
    for name, figure in figures.items():
        if name.startswith(("confusions", "most confused")):  # those are wide on purpose
            assert_drawn(figure, name)
        else:
            assert_readable_on_a_phone(figure, name)


def test_all_77_labels_of_the_matrix_are_named(figures):
    shown = {t.get_text() for t in figures["confusions"].findobj(Text)}
    assert sum(any(text.endswith(f" {i + 1}") for text in shown) for i in range(77)) == 77


def test_labels_are_text_not_mathematics(figures):
    figures["confusions, few"].png()  # "$\\frac{" raises where it is parsed
    shown = [t.get_text() for t in figures["confusions, few"].findobj(Text)]
    assert any("$\\frac{" in text for text in shown)


def test_saving_is_whole_and_repeatable(figures, tmp_path):
    first = plots.save(figures["padding"], tmp_path / "new" / "folder", "padding")
    assert first == tmp_path / "new" / "folder" / "padding.png"
    content = first.read_bytes()
    assert plots.save(figures["padding"], first.parent, "padding").read_bytes() == content
    assert [p.name for p in first.parent.iterdir()] == ["padding.png"]
    assert figures["padding"]._repr_png_() == content
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
