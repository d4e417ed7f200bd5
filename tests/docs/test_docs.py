"""The site that `make docs` builds: everything is in it, and it says which notebooks were not executed."""

from __future__ import annotations

import base64
import html
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from browser import browser
from conftest import ROOT

from qlora_kit.public import EXPORTS

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build it with one notebook that was executed and the others not."""
    folder = tmp_path_factory.mktemp("docs")
    (out := folder / "out").mkdir()
    book = nbformat.read(ROOT / "notebooks" / "02_finetune.ipynb", as_version=4)
    code = next(c for c in book.cells if c.cell_type == "code" and "set-up" not in c.metadata.get("tags", ()))
    picture = (ROOT / "results" / "accuracy.png").read_bytes()
    code.outputs = [
        nbformat.v4.new_output("stream", name="stderr", text="epoch  50%|#####     |\r\nand a word of warning\n"),
        nbformat.v4.new_output("stream", name="stdout", text="the executed notebook's own words"),
        nbformat.v4.new_output("display_data", data={"image/png": base64.b64encode(picture).decode()}),
    ]
    nbformat.write(book, out / "02_finetune.ipynb")
    (out / "run.json").write_text("{}")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder / "site")]
    environment = {**os.environ, "OUT": str(out), "NO_MKDOCS_2_WARNING": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "site"


def words(page: Path) -> str:
    return html.unescape(re.sub(r"<[^>]+>", "", page.read_text(encoding="utf-8")))


def test_every_page_is_there(site: Path):
    pages = {str(path.relative_to(site)) for path in site.rglob("*.html")}
    package = ROOT / "qlora_kit"
    rooms = {path.stem for path in package.glob("[!_]*.py")} | {path.parent.name for path in package.glob("*/*.py")}
    assert {f"api/{name}.html" for name in rooms - {"cli", "public"}} <= pages
    assert {f"notebooks/{path.stem}.html" for path in (ROOT / "notebooks").glob("*.ipynb")} <= pages
    assert {
        "index.html",
        "contributing.html",
        *(f"{path.stem}.html" for path in (ROOT / "docs").glob("*.md")),
        "results.html",
        "command-line.html",
        "api/index.html",
        "api/internals.html",
        "notebooks/index.html",
    } <= pages
    assert (
        not list(site.rglob("hooks*")) and not (site / "ten_lines.json").exists() and not (site / "diagrams").exists()
    )


def test_every_file_of_a_package_is_a_section(site: Path):
    for path in (ROOT / "qlora_kit").glob("*/[!_]*.py"):
        if path.parent.name != "cli" and path.name != "colab.py":
            assert f'<h2 id="{path.stem}' in (site / "api" / f"{path.parent.name}.html").read_text(), path


def test_what_the_package_exports_is_described(site: Path):
    for name, module in EXPORTS.items():
        room = module.partition(".")[0]
        assert f'id="qlora_kit.{module}.{name}"' in (site / "api" / f"{room}.html").read_text(), name
    training = words(site / "api" / "training.html")
    for heading in ("Parameters:", "Returns:", "Raises:"):
        assert heading in training


def test_the_first_page_of_the_api_is_short_and_the_rest_is_among_the_internals(site: Path):
    first, rest = (words(site / "api" / f"{name}.html") for name in ("index", "internals"))
    short = {name for name in EXPORTS if re.search(rf"\bqk\.{name}\b", first)}
    assert len(short) <= 12 and {"text_classification", "finetune", "evaluate", "load_run"} <= short
    assert {name for name in EXPORTS if re.search(rf"\bqk\.{name}\b", rest)} == set(EXPORTS) - short


def test_diagrams_are_drawn_without_a_script(site: Path):
    page = (site / "how_it_works.html").read_text()
    assert page.count('<svg id="diagram-') == 2 and "mermaid.min.js" not in page and "```" not in page


def test_an_executed_notebook_has_its_outputs_and_another_says_that_it_has_none(site: Path):
    executed = site / "notebooks" / "02_finetune.html"
    assert "and a word of warning" in words(executed) and "50%|" not in words(executed)
    assert "the executed notebook's own words" in words(executed) and "Not executed" not in words(executed)
    (picture,) = (site / "notebooks" / "02_finetune").glob("*.png")
    assert picture.name in executed.read_text()
    other = words(site / "notebooks" / "03_evaluate.html")
    assert "Not executed" in other and "make run-notebooks" in other


def test_every_record_has_its_command_and_its_rows(site: Path):
    shown = words(site / "results.html")
    for path in (ROOT / "results").glob("*.json"):
        record = json.loads(path.read_text())
        for command in record["command"].split("; "):
            assert command in shown, path.name
        for row in record["rows"][:40]:
            assert not isinstance(row.get("f1_macro"), float) or f"{row['f1_macro']:.4g}" in shown


def test_the_command_line_is_described(site: Path):
    from qlora_kit.cli.main import COMMANDS

    shown = words(site / "command-line.html")
    for command in COMMANDS:
        assert f"usage: qlora-kit {command.NAME}" in shown


FITTING = [
    "index",
    "contributing",
    "api/index",
    "api/training",
    "results",
    "claims",
    "how_it_works",
    "your_data",
    "serve",
]


@pytest.mark.parametrize("page", [f"{name}.html" for name in FITTING])
def test_a_page_fits_a_phone(site: Path, page: str, tmp_path: Path):
    """In a real browser nothing makes the page wider than it is: what is wide scrolls within itself."""
    with browser(tmp_path) as shown:
        shown.open(f"file://{site / page}", width=390)
        assert shown.evaluate("document.documentElement.scrollWidth") <= 390
        assert shown.evaluate("document.querySelector('h1').innerText")
