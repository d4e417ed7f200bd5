"""Write the pages of a folder of executed notebooks: `index.html` with everything, and each notebook as HTML.

Both need no network: styles and figures are in the page. Whatever comes from records, data or outputs is escaped or
sanitized, and a content security policy forbids scripts, too.
"""

from __future__ import annotations

import base64
import contextlib
import io
import itertools
import json
import re
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from .. import schemas
from ..errors import KitError
from ..system.files import write_text
from ..system.parsing import read_json
from .html import LONG_CELL, escaped, fact_list, section
from .summary import five_lines, warning

_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def write_index(out: str | Path) -> Path:
    """Write `OUT/index.html` from what is in OUT, and the notebooks' own pages if they are missing.

    Args:
        out: The folder, with the runner's `run.json` in it.

    Returns:
        The path of the page.
    """
    out = Path(out)
    state = schemas.read(out / "run.json", "run.json")
    sections: list[str] = []
    records: dict[str, Mapping[str, Any]] = {}
    for name, entry in state["notebooks"].items():
        record: dict[str, Any] = {}
        with contextlib.suppress(KitError):
            read = read_json(out / f"{name}.json")
            record = read if isinstance(read, dict) else {}
        records[name] = record
        if entry["state"] != "running" and (out / f"{name}.ipynb").is_file():
            write_notebook_page(out / f"{name}.ipynb", out / f"{name}.html")
        sections.append(section(out, name, entry, record, _title(out / f"{name}.ipynb")))
    page = out / "index.html"
    write_text(page, _document(f"{state['preset']}: results", _head(state, records) + "\n".join(sections), "style.css"))
    return page


def write_notebook_page(notebook: Path, page: Path) -> None:
    """Write an executed notebook as one HTML page, unless the page is newer than the notebook.

    Args:
        notebook: The executed notebook.
        page: The page to write.
    """
    if page.is_file() and page.stat().st_mtime_ns >= notebook.stat().st_mtime_ns:
        return
    import nbformat
    from nbconvert import HTMLExporter

    try:
        book = nbformat.read(notebook, as_version=4)
        book.cells = [cell for cell in book.cells if not _is_set_up(cell)]
        for cell in book.cells:
            if cell.cell_type == "markdown":
                cell.source = with_formulas(cell.source)
            cell.outputs = [output for output in map(without_bars, cell.get("outputs", ())) if output is not None]
        body = _as_cards(_clean(HTMLExporter(template_name="basic").from_notebook_node(book)[0]))
    except Exception as error:  # A half-written notebook must not keep the page from being made.
        body = f"<p>{escaped(notebook.name)} cannot be read: {escaped(error)}</p>"
    back = '<p><a href="index.html">all notebooks</a></p>'
    # notebook.css adds what nbconvert's HTML needs.
    write_text(page, _document(notebook.stem, back + body, "style.css", "notebook.css"))


def _title(notebook: Path) -> str:
    """Return an executed notebook's title, the first line of its first cell; empty where there is none."""
    with contextlib.suppress(OSError, ValueError, KeyError, IndexError, TypeError, AttributeError):
        source = json.loads(notebook.read_text(encoding="utf-8"))["cells"][0]["source"]
        first = (source if isinstance(source, str) else "".join(source)).partition("\n")[0]
        return first.removeprefix("# ").strip() if first.startswith("# ") else ""
    return ""


def _is_set_up(cell: Any) -> bool:
    """Return whether to leave a cell out: the set-up cell, the same in each notebook, unless it failed."""
    failed = any(output.get("output_type") == "error" for output in cell.get("outputs", ()))
    return "set-up" in cell.metadata.get("tags", ()) and not failed


def with_formulas(markdown: str) -> str:
    """Return Markdown whose LaTeX needs no script: formulas on their own as pictures, inline ones in italics."""
    from matplotlib import mathtext

    def picture(found: re.Match[str]) -> str:
        stream = io.BytesIO()
        formula = " ".join(found[1].split()).replace(r"\tfrac", r"\frac")
        try:
            mathtext.math_to_image(f"${formula}$", stream, dpi=150, format="png")
        except ValueError:  # LaTeX that matplotlib does not know
            return f"`{formula}`"
        return f"![{escaped(formula)}](data:image/png;base64,{base64.b64encode(stream.getvalue()).decode()})"

    markdown = re.sub(r"\$\$(.+?)\$\$", picture, markdown, flags=re.DOTALL)
    return re.sub(r"(?<![\w$\\`])\$([A-Za-z\\][^$\n`]*?)\$(?!\w)", r"*\1*", markdown)


def without_bars(output: Any) -> Any:
    """Return an output without its finished progress bars, or None if nothing else is in it."""
    if output.get("name") == "stderr":
        lines = [line for line in re.split(r"[\r\n]+", output["text"]) if line.strip("\x1b[A ")]
        kept = [line for line in lines if not re.search(r"\d%\|", line)]
        return type(output)({**output, "text": "\n".join(kept) + "\n"}) if kept else None
    return output


# Tags that a notebook's Markdown and tables need; any other is left out of its page.
_TAGS = set(
    re.findall(
        r"\w+",
        """
    a b blockquote br code dd del details div dl dt em figcaption figure h1 h2 h3 h4 h5 h6 hr i img kbd li ol p pre s
    span strong sub summary sup table tbody td tfoot th thead tr ul
""",
    )
)


def _clean(body: str) -> str:
    """Return a notebook's HTML with only harmless tags: its outputs may hold anything."""
    import bleach

    # Remove the content of these too: without their tags it would be shown as text.
    body = re.sub(r"<(style|script)\b.*?</\1\s*>", "", body, flags=re.DOTALL | re.IGNORECASE)
    body = re.sub(r"<img\b[^>]*>", _own_picture, body, flags=re.IGNORECASE)
    return str(bleach.clean(body, tags=_TAGS, attributes=_harmless, protocols={"data", "http", "https"}, strip=True))


def _as_cards(body: str) -> str:
    """Mark pandas' tables with long texts: on a narrow page each row is shown as a card (see style.css)."""

    def named(table: re.Match[str]) -> str:
        head, _, rows = table[0].partition("</thead>")
        names = re.findall(r"<th>(.*?)</th>", head, flags=re.DOTALL)[1:]  # the first is the header of the index
        texts = re.findall(r"<td>(.*?)</td>", rows, flags=re.DOTALL)
        if not names or len(texts) % len(names) or max(map(len, texts), default=0) <= LONG_CELL:
            return table[0]
        cells = itertools.cycle(names)
        rows = re.sub(r"<td>", lambda _: f'<td data-name="{next(cells)}">', rows)
        return f"{head}</thead>{rows}".replace('class="dataframe"', 'class="dataframe cards"', 1)

    return re.sub(r'<table class="dataframe">.*?</table>', named, body, flags=re.DOTALL)


def _own_picture(found: re.Match[str]) -> str:
    """Return an embedded image as it is; for one that would have to be fetched (a badge), only its alt text."""
    words = re.search(r'\balt="([^"]*)"', found[0])
    return found[0] if 'src="data:image/png;base64,' in found[0] else words[1] if words else ""


def _harmless(tag: str, name: str, value: str) -> bool:
    if tag == "img":
        return name == "alt" or (name == "src" and value.startswith("data:image/png;base64,"))
    if tag == "a" and name == "href":
        return value.startswith(("#", "http://", "https://"))
    return name in ("class", "id", "colspan", "rowspan")


def _document(title: str, body: str, *styles: str) -> str:
    """Return a whole page with its styles in it; they are files of this package."""
    style = "\n".join((resources.files(__package__) / name).read_text("utf-8") for name in styles)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escaped(title)}</title>\n<style>\n{style}</style>\n</head>\n"
        f"<body>\n<main>\n{body}\n</main>\n</body>\n</html>\n"
    )


def _head(state: Mapping[str, Any], records: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the top of the page: what ran, five lines on what came of it, and folded what it was made with."""
    lines = five_lines(state, records)
    shown = []
    for name, line in lines.items():
        text = f"<pre>{escaped(line)}</pre>" if "\n" in line else escaped(line[:1].upper() + line[1:])
        if name == "claims" and records.get("05_claims"):
            text += ': <a href="05_claims.html">which, and why</a>'
        shown.append(f"<div><dt>{escaped(name)}</dt><dd>{text}</dd></div>")
    said = warning(state, records)
    caution = f'<p class="caution">{escaped(said)}</p>' if said else ""
    return (
        f"<header><h1>{escaped(state['preset'])}</h1>"
        f'<p class="soft">PRESET={escaped(state.get("asked"))}: {escaped(state.get("why"))}</p>'
        f'{caution}<dl class="five">{"".join(shown)}</dl>'
        f"<details><summary>made with</summary>{fact_list(_made_with(state, records))}</details></header>"
    )


def _made_with(state: Mapping[str, Any], records: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    environment: Mapping[str, Any] = {}
    for record in records.values():
        if isinstance(record.get("environment"), dict) and record["environment"]:
            environment = record["environment"]
    facts: dict[str, Any] = {"started": str(state.get("started")).replace("T", " ").replace("+00:00", " UTC")}
    for key in ("device", "threads", "commit"):
        if environment.get(key) is not None:
            facts[key] = environment[key]
    if isinstance(facts.get("commit"), str):
        facts["commit"] = re.sub(r"^([0-9a-f]{12})[0-9a-f]*", r"\1", facts["commit"]).replace("+", ", with ")
    versions = environment.get("versions")
    if isinstance(versions, dict):
        shown = ("torch", "transformers", "peft", "bitsandbytes")
        facts.update({key: versions[key] for key in shown if key in versions})
    return facts
