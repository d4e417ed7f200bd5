"""The first screen of index.html in a browser: its five lines, its contrast, its width; and what the lines say."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browser import Page, browser
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, writes

import qlora_kit as qk
from qlora_kit.notebooks.html import section
from qlora_kit.notebooks.names import size, text_of, unit_of
from qlora_kit.notebooks.page import write_index
from qlora_kit.notebooks.summary import count_claims, five_lines, notebook_lines, warning

# The ratio of the text's luminance to what lies behind it, by WCAG 2.2, of every text that is seen.
CONTRASTS = """
(() => {
  const parts = text => text.match(/[\\d.]+/g).map(Number);
  const bright = ([r, g, b]) => [r, g, b].map(v => v / 255)
    .map(v => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const found = [];
  const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walk.nextNode()) {
    const element = walk.currentNode.parentElement, text = walk.currentNode.textContent.trim();
    if (!text || !element.getClientRects().length) continue;
    let behind = element;
    const clear = one => one && /, 0\\)$|transparent/.test(getComputedStyle(one).backgroundColor);
    while (clear(behind)) behind = behind.parentElement;
    const pair = [getComputedStyle(element).color, getComputedStyle(behind || document.documentElement).backgroundColor]
      .map(parts).map(bright).sort((a, b) => b - a);
    found.push([(pair[0] + 0.05) / (pair[1] + 0.05), text.slice(0, 40)]);
  }
  return found;
})()
"""


def interval(value: float) -> dict[str, float]:
    return {"value": value, "low": value - 0.01, "high": value + 0.01}


def scores(value: float) -> dict[str, Any]:
    return dict.fromkeys(("accuracy", "f1_macro", "f1_weighted"), interval(value))


def memory_row(label: str, measured: int) -> dict[str, Any]:
    row = {"label": label, "method": "qlora", "scheme": "nf4", "changes": {"lora.r": 4}, "batch": 8, "length": 64}
    parts = {"base, linear layers": measured // 2, "activations": measured // 2}
    return {**row, "planned": measured, "measured": measured, "parts": parts, "step_seconds": 0.5}


RECORDS: dict[str, dict[str, Any]] = {
    "01_quantization": {
        "metrics": {
            "quantization": {
                "normal_snr_db": {"nf4": 20.7, "int4": 19.4},
                "bits_per_parameter": {
                    "none": {"linear": 32.0, "bytes": 90 * 2**20}, "nf4": {"linear": 4.127, "bytes": 53 * 2**20},
                },
            }
        }
    },
    "02_finetune": {
        "run": "runs/latest/runs/a_run",
        "metrics": {"validation": scores(0.9)},
        "timing": {"train_seconds": 460.2, "samples_per_second": 100.0},
        "memory": {"peak_bytes": 362 * 2**20, "measure": "torch's allocator", "parts": {"activations": 12345678}},
        "parameters": {"trainable": 693_120, "all": 23_288_064},
    },
    "03_evaluate": {
        "metrics": {
            "test": scores(0.92),
            "baselines": {
                "tfidf_svm": {**scores(0.91), "ahead": {"f1_macro": interval(0.01)}},
                "embedding_svm": {**scores(0.915), "ahead": {"f1_macro": interval(0.005)}},
            },
        },
    },
    "04_memory": {
        "rows": [memory_row("LoRA", 200 * 2**20), memory_row("QLoRA nf4", 150 * 2**20)],
        "times": [
            {"label": "LoRA", "step_seconds_each": [0.5, 0.6]},
            {"label": "QLoRA nf4", "step_seconds_each": [0.59, 0.7]},
        ],
    },
    "05_claims": {
        "claims": [
            {"number": place, "claim": "it is said that so it is, in more than forty letters", "verdict": verdict,
             "reason": "because it was measured so, in more than forty letters"}
            for place, verdict in enumerate(["holds", "holds", "does not hold", "no measurement decides"])
        ],
        "figures": [{"claim": 3, "value": 123456789, "low": None, "high": None, "unit": "bytes"}],
    },
    "06_search": {
        "search": {"trials": [{"number": 0, "f1_macro": 0.8, "parameters": {"lora.r": 8}}, {"f1_macro": None}]},
    },
}  # fmt: skip


def write(out: Path, preset: str = "minilm_banking77_qlora", **records: Any) -> Path:
    """Write a folder OUT with records, titles and figures, and its page."""
    entries = {}
    for name, record in (records or RECORDS).items():
        environment = {"device": "AMD EPYC, 2 cores", "versions": {"torch": "2.13.0"}, "commit": "a" * 40}
        (out / f"{name}.json").write_text(
            json.dumps({"environment": environment, "experiment": {"name": "x"}, **record})
        )
        cells = [new_markdown_cell(f"# Title of {name}\n\nMore."), new_code_cell("1 + 1")]
        (out / f"{name}.ipynb").write_text(writes(new_notebook(cells=cells)))
        for place in (1, 2):
            qk.plots.save(qk.plots.intervals([{"label": "a", "value": 1.0, "low": 0.5, "high": 2.0}], 1),
                          out / name, f"0{place}_figure")  # fmt: skip
        entries[name] = {"state": "finished", "seconds": 61.0, "parameters": {}}
    state = {"schema": 1, "asked": "auto", "preset": preset, "why": "no GPU here", "notebooks": entries,
             "started": "2026-01-02T03:04:05+00:00", "experiment": "e"}  # fmt: skip
    (out / "run.json").write_text(json.dumps(state))
    return write_index(out)


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Page, Path]]:
    folder = tmp_path_factory.mktemp("index")
    (out := folder / "out").mkdir()
    page = write(out, "minilm_banking77_smoke")
    with browser(folder) as opened:
        yield opened, page


def dress(page: Page, scheme: str) -> None:
    page.do("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])


def test_the_first_screen_has_the_five_lines(shown: tuple[Page, Path]):
    page, file = shown
    page.open(f"file://{file}", 1280, 800)
    ends = page.evaluate("[...document.querySelectorAll('.five > div')].map(e => e.getBoundingClientRect().bottom)")
    assert len(ends) == 5 and max(ends) < 800
    names = page.evaluate("[...document.querySelectorAll('.five dt')].map(e => e.innerText)")
    assert names == ["score", "memory", "claims", "time", "use it"]
    lines = page.evaluate("[...document.querySelectorAll('.five dd')].map(e => e.innerText)")
    assert lines[0].startswith("Macro F1 0.920 (0.910 to 0.930)")
    assert "SVM on TF-IDF 0.910 (0.900" in lines[0] and "SVM on frozen states 0.915" in lines[0]
    assert (
        lines[1] == "A step takes 200.0 MiB with LoRA, 150.0 MiB with QLoRA: 25% less (measured; 8 texts of 64 tokens)"
    )
    assert lines[2] == "Of 4 claims about QLoRA 2 hold, 1 do not hold, 1 cannot be measured: which, and why"
    assert page.evaluate("document.querySelector('.five a').href").endswith("/05_claims.html")
    assert lines[3] == "Training 7:40 on AMD EPYC, 2 cores; all notebooks took 6:06"
    assert 'qk.load_run("runs/latest/runs/a_run").predict(["a text"]).labels' in lines[4]
    assert "scores mean nothing" in page.evaluate("document.querySelector('.caution').innerText")


def test_before_more_a_notebook_takes_a_screen_at_most(shown: tuple[Page, Path]):
    page, file = shown
    page.open(f"file://{file}", 1280, 800)
    heights = page.evaluate("[...document.querySelectorAll('section')].map(e => e.getBoundingClientRect().height)")
    assert len(heights) == len(RECORDS) and max(heights) <= 800
    headings = page.evaluate("[...document.querySelectorAll('section h2')].map(e => e.innerText)")
    assert headings[3] == "04 Title of 04_memory"
    assert "A step in turns: LoRA 0.500 to 0.600 s" in page.evaluate("document.body.innerText")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_text_stands_out_from_what_is_behind_it(shown: tuple[Page, Path], scheme: str):
    page, file = shown
    dress(page, scheme)
    for name in ("index.html", "02_finetune.html"):
        page.open(f"file://{file.with_name(name)}", 1280, 800)
        page.evaluate("document.querySelectorAll('details').forEach(e => e.open = true)")
        found = page.evaluate(CONTRASTS)
        assert len(found) > (100 if name == "index.html" else 2)
        assert not [pair for pair in found if pair[0] < 4.5]
    # The measurement sees a text that does not.
    page.evaluate("document.querySelector('h1').style.color = getComputedStyle(document.body).backgroundColor")
    assert min(page.evaluate(CONTRASTS))[0] < 1.1


@pytest.mark.parametrize("opened", [False, True])
def test_nothing_is_wider_than_a_phone(shown: tuple[Page, Path], opened: bool):
    page, file = shown
    page.open(f"file://{file}", 400)
    page.evaluate(f"document.querySelectorAll('details').forEach(e => e.open = {str(opened).lower()})")
    assert page.evaluate("document.documentElement.scrollWidth") <= 400
    # A table may be scrolled in its own box; everything else ends where the page does.
    beyond = """[...document.querySelectorAll('body *')].filter(e => !e.closest('.wide, pre')
      && e.getClientRects().length && e.getBoundingClientRect().right > 401).map(e => e.outerHTML.slice(0, 90))"""
    assert page.evaluate(beyond) == []


def test_there_is_a_unit_at_every_number_of_bytes_and_no_key_as_a_heading(tmp_path: Path):
    seen = re.sub(r"<pre>.*?</pre>|data:[^\"]*|<style>.*?</style>", "", write(tmp_path).read_text(), flags=re.DOTALL)
    for raw in ("12345678", "12,345,678", "123456789", "123,456,789", str(200 * 2**20), f"{200 * 2**20:,}"):
        assert raw not in seen, raw
    assert "117.7 MiB" in seen and "11.8 MiB" in seen
    headings = re.findall(r"<(?:h[123]|th|dt|summary)[^>]*>(.*?)</", seen)
    # Titles name the notebooks here; everything else is in words.
    assert not [one for one in headings if "_" in one and not one.startswith(("0", "minilm_"))]
    assert "From which size" not in seen and "The methods, one by one" in seen


def test_a_line_whose_notebook_has_not_run_says_so(tmp_path: Path):
    state = {"preset": "p", "notebooks": {"01_quantization": {"seconds": 3}}}
    lines = five_lines(state, {"01_quantization": {}})
    for name, number in (("score", "03"), ("memory", "04"), ("claims", "05"), ("use it", "02")):
        assert re.fullmatch(rf"notebook {number} [a-z -]+, and has not run here", lines[name]), name
    assert lines["time"] == "the notebook took 3 s"
    planned = [{**row, "measured": None} for row in RECORDS["04_memory"]["rows"]]
    assert "25% less (planned;" in five_lines(state, {"04_memory": {"rows": planned}})["memory"]


@pytest.mark.parametrize(("low", "high", "said"), [(0.8, 0.95, True), (0.86, 0.94, False), (None, 0.9, False)])
def test_a_score_of_few_rows_is_called_unsure(low: float | None, high: float, said: bool):
    record = {"metrics": {"test": {"f1_macro": {"value": 0.9, "low": low, "high": high}}}}
    line = five_lines({"preset": "p", "notebooks": {}}, {"03_evaluate": record})["score"]
    assert line.startswith("macro F1 0.900") and line.endswith("; unsure, as there are few test rows") == said


def test_a_run_whose_scores_mean_nothing_says_so():
    assert "mean nothing" in warning({"preset": "minilm_banking77_smoke"}, {})
    random = {"02_finetune": {"experiment": {"model": {"random_weights": True}}}}
    assert "the scores do not" in warning({"preset": "mine"}, random)
    assert warning({"preset": "mine"}, {"02_finetune": {"experiment": {"model": {"random_weights": False}}}}) == ""


def test_notebook_00_alone_fills_the_lines_from_the_users_own_data():
    own = RECORDS["02_finetune"] | RECORDS["03_evaluate"]
    own = {**own, "experiment": {"data": {"name": "/home/me/tickets.csv"}}, "run": "runs/latest/runs/tickets"}
    state = {"preset": "minilm_banking77_smoke", "notebooks": {"00_your_data": {"seconds": 126}}}
    lines = five_lines(state, {"00_your_data": own})
    assert lines["score"].startswith("macro F1 0.92") and "on the test rows of tickets.csv; beside it" in lines["score"]
    assert lines["memory"] == "training took 362.0 MiB at most (torch's allocator)"
    assert lines["time"] == "training 7:40; the notebook took 2:06"
    assert 'load_run("runs/latest/runs/tickets")' in lines["use it"]
    said = warning(state, {"00_your_data": own})
    assert "on your data" in said and "minilm_banking77_smoke" in said and "choose minilm_banking77_qlora" in said
    assert "minilm_banking77_qlora" in qk.presets()
    # Beside it Banking77 on the smoke preset: those scores mean nothing.
    both = {"00_your_data": own, **RECORDS}
    assert (
        "mean nothing" in warning(state, both)
        and five_lines(state, both)["score"] == (five_lines(state, RECORDS)["score"])
    )


@pytest.mark.parametrize("name", [*RECORDS, "00_your_data"])
@pytest.mark.parametrize("odd", [None, [], "text", 1, {"a": None}, [1, None]])
def test_a_record_of_any_shape_leaves_the_page_whole(name: str, odd: Any, tmp_path: Path):
    for keys in (("metrics",), ("rows",), ("times",), ("claims",), ("search",), ("memory",), ("parameters",)):
        record = {key: odd for key in keys}
        assert isinstance(notebook_lines(name, record), list)
        assert five_lines({"preset": "p", "notebooks": {}}, {name: record})
        assert section(tmp_path, name, {"state": "finished"}, record).startswith("<section>")
    assert count_claims({"claims": odd}) == ""


def test_numbers_have_their_units():
    assert [size(value) for value in (0, 12, 2048, 5 * 2**20, 3 * 2**30)] == [
        "0 B",
        "12 B",
        "2.0 KiB",
        "5.0 MiB",
        "3.0 GiB",
    ]
    assert unit_of("peak_bytes") == unit_of("planned") == "bytes" and unit_of("train_seconds") == "seconds"
    assert (text_of(0.5, "seconds"), text_of(75, "seconds"), text_of(0.0123, "share")) == ("0.5 s", "1:15", "1.23%")
    assert (text_of(None), text_of(True), text_of(12345), text_of(0.00123)) == ("–", "yes", "12,345", "0.00123")
