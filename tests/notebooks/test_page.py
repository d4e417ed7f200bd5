"""The pages of a real run in a real browser: every figure and table shown, no complaint, readable on a phone."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pandas as pd
import pytest
from browser import browser
from conftest import ROOT

from qlora_kit.notebooks.page import with_formulas, write_index, write_notebook_page

PHONE = 390  # CSS pixels


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short run of the first three notebooks."""
    folder = tmp_path_factory.mktemp("run") / "out"
    command = [sys.executable, "-m", "qlora_kit", "run-notebooks", "--preset", "minilm_banking77_smoke"]
    command += ["--out", str(folder), "--notebooks", "01 02 03"]
    command += ["--params", "max_steps=4 resamples=100 perplexity_tokens=0 samples=65536"]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.mark.long
def test_all_of_a_run_is_shown_and_fits_a_phone(out: Path, tmp_path: Path):
    pictures = sorted(out.glob("*/*.png"))
    assert len(pictures) > 15
    assert json.loads((out / "01_quantization.json").read_text())["metrics"]["quantization"]["agrees_with_bitsandbytes"]
    with browser(tmp_path) as shown:
        for width in (1280, PHONE):
            shown.open(f"file://{out / 'index.html'}", width)
            assert shown.evaluate("document.images.length") == len(pictures)
            assert shown.evaluate("[...document.images].filter(i => !i.naturalWidth).length") == 0
            ways = shown.evaluate("[...document.querySelectorAll('figure a')].map(a => a.getAttribute('href'))")
            assert sorted(ways) == [path.relative_to(out).as_posix() for path in pictures]  # each in full size
            assert shown.evaluate("document.documentElement.scrollWidth") <= width
            shown.evaluate("document.querySelectorAll('details').forEach(e => e.open = true)")
            assert shown.evaluate("document.documentElement.scrollWidth") <= width
        seen = shown.evaluate("document.body.innerText")
        score = json.loads((out / "03_evaluate.json").read_text())["metrics"]["test"]["f1_macro"]
        for words in ("01 What are four bits?", "baseline: TF-IDF", f"{score['value']:.4f}", f"{score['low']:.4f}"):
            assert words in seen, words
        # A figure is as wide as the page lets it, and the smallest letters are no smaller than on a printed page.
        assert shown.evaluate("Math.min(...[...document.images].map(i => i.getBoundingClientRect().width))") > 300
        texts = "[...document.querySelectorAll('td, th, dt, dd, p, h2, a, figcaption')]"
        smallest = shown.evaluate(f"Math.min(...{texts}.map(e => parseFloat(getComputedStyle(e).fontSize)))")
        assert smallest >= 12

        for notebook in sorted(out.glob("*.ipynb")):
            shown.open(f"file://{notebook.with_suffix('.html')}", PHONE)
            assert shown.evaluate("document.documentElement.scrollWidth") <= PHONE
            assert shown.evaluate("[...document.images].filter(i => !i.naturalWidth).length") == 0
            outputs = [o for c in nbformat.read(notebook, 4).cells for o in c.get("outputs", ())]
            made = sum("image/png" in output.get("data", {}) for output in outputs)
            assert made and shown.evaluate("document.images.length") >= made, notebook.name
            assert "$$" not in shown.evaluate("document.body.innerText")
        assert shown.complaints == []


def test_formulas_are_read_without_a_script():
    said = with_formulas("so\n\n$$q_i = \\tfrac{1}{2}\\left(Q(1) + 1\\right)$$\n\nwhere $Q(0)$ is, for $5 or $6")
    assert said.startswith("so\n\n![q_i = \\frac{1}{2}") and "](data:image/png;base64," in said
    assert said.endswith("where *Q(0)* is, for $5 or $6")
    assert with_formulas("$$\\begin{cases}1\\end{cases}$$") == "`\\begin{cases}1\\end{cases}`"


def test_diagrams_of_the_notebooks_are_pictures_of_the_sources_in_docs(tmp_path: Path):
    """Colab shows the source of a Mermaid diagram, and no attachment of a cell: a picture has to stand in its text."""
    sources = re.findall(r"```mermaid\n(.*?)```", (ROOT / "docs" / "how_it_works.md").read_text(), flags=re.DOTALL)
    drawn = {f"diagram-{hashlib.sha256(source.encode()).hexdigest()[:12]}" for source in sources}
    found = 0
    for notebook in sorted((ROOT / "notebooks").glob("*.ipynb")):
        book = nbformat.read(notebook, 4)
        for cell in book.cells:
            assert "```mermaid" not in cell.source and not cell.get("attachments"), notebook.name
            if not cell.id.startswith("diagram-"):
                continue
            found += 1
            # npx -p @mermaid-js/mermaid-cli mmdc --theme neutral --scale 1.2 --input DIAGRAM.mmd --output FILE
            assert cell.id in drawn, f"the docs' diagram was changed: draw the one in {notebook.name} anew"
            words, picture = re.fullmatch(r"!\[([^\]]+)\]\(data:image/png;base64,([\w+/=]+)\)", cell.source).groups()
            assert base64.b64decode(picture).startswith(b"\x89PNG") and len(words) > 40
            write_notebook_page(notebook, tmp_path / "page.html")
            assert f'src="data:image/png;base64,{picture}"' in (tmp_path / "page.html").read_text()
    assert found == 1


def test_a_long_table_is_folded_and_what_it_was_made_with_too(tmp_path: Path):
    score = {"value": 0.12345, "low": 0.1, "high": 0.2}
    rows = [{"trial": place} for place in range(31)]
    record = {"metrics": {"test": {"f1_macro": score}}, "few": rows[:30], "many": rows}
    (tmp_path / "03_evaluate.json").write_text(json.dumps(record))
    state = {"preset": "p", "asked": "p", "why": "w", "notebooks": {"03_evaluate": {"state": "finished"}}}
    (tmp_path / "run.json").write_text(json.dumps(state))
    shown = write_index(tmp_path).read_text()
    head = shown.partition("<section>")[0]
    few = "unsure, as there are few test rows"
    assert f"<dd>Macro F1 0.123 (0.100 to 0.200) on the test rows; beside it no baseline; {few}</dd>" in head
    assert "<details><summary>made with</summary>" in head
    assert "<h3>few</h3>" in shown and "<summary>many: 31 rows</summary>" in shown


def test_on_a_phone_a_row_of_texts_is_a_card_with_the_columns_names(tmp_path: Path):
    texts = {"number": 1, "claim": "a sentence of more than forty characters, as said", "reason": "because " * 9}
    record = {"metrics": {}, "told": [texts, {**texts, "reason": ""}], "numbers": [{"a": 1, "b": 2}]}
    (tmp_path / "05_claims.json").write_text(json.dumps(record))
    state = {"preset": "p", "asked": "p", "why": "w", "notebooks": {"05_claims": {"state": "finished"}}}
    (tmp_path / "run.json").write_text(json.dumps(state))
    shown = write_index(tmp_path).read_text()
    assert shown.count('<table class="cards">') == 1 and 'data-name="reason"' in shown
    book = nbformat.v4.new_notebook()
    for long in (True, False):
        frame = pd.DataFrame({"claim": ["<b>"], "because": ["word " * 20 if long else "so"]}, index=["3a"])
        data = {"text/html": frame.to_html(), "text/plain": "t"}
        output = nbformat.v4.new_output("display_data", data=data)
        book.cells.append(nbformat.v4.new_code_cell("x", outputs=[output]))
    nbformat.write(book, tmp_path / "a.ipynb")
    write_notebook_page(tmp_path / "a.ipynb", tmp_path / "a.html")
    read = (tmp_path / "a.html").read_text()
    assert read.count("dataframe cards") == 1 and '<td data-name="claim">&lt;b&gt;</td>' in read
    assert re.search(r'<td data-name="because">word ', read) and "<td>so</td>" in read
    with browser(tmp_path) as opened:
        for file in (tmp_path / "index.html", tmp_path / "a.html"):
            for width, display in ((1280, "table-row"), (PHONE, "block")):
                opened.open(f"file://{file}", width)
                shape = "getComputedStyle(document.querySelector('table.cards tbody tr')).display"
                assert opened.evaluate(shape) == display
                table = "document.querySelector('table.cards')"
                assert opened.evaluate(f"{table}.scrollWidth <= {table}.parentElement.clientWidth")


def test_a_badge_is_its_words_and_a_set_up_cell_is_left_out_unless_it_failed(tmp_path: Path):
    book = nbformat.v4.new_notebook()
    setup = nbformat.v4.new_code_cell("installing = 1", metadata={"tags": ["set-up"]})
    book.cells = [nbformat.v4.new_markdown_cell("# T\n\n[![Open in Colab](https://a.b/c.svg)](https://a.b/d)"), setup]
    nbformat.write(book, tmp_path / "a.ipynb")
    write_notebook_page(tmp_path / "a.ipynb", tmp_path / "a.html")
    read = (tmp_path / "a.html").read_text()
    assert ">Open in Colab</a>" in read and "<img" not in read and "installing" not in read
    setup.outputs = [nbformat.v4.new_output("error", ename="OSError", evalue="no network", traceback=["no network"])]
    nbformat.write(book, tmp_path / "b.ipynb")
    write_notebook_page(tmp_path / "b.ipynb", tmp_path / "b.html")
    assert "installing" in (tmp_path / "b.html").read_text() and "no network" in (tmp_path / "b.html").read_text()
