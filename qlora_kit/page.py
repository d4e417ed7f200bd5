"""The pages of a folder of executed notebooks: `index.html` with everything on it, and each notebook as HTML.

Both are read without a network: style and figures are in the page. Whatever comes from records, data or outputs is
escaped or sanitized, and a content policy forbids scripts on top of it.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import html
import io
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from .errors import KitError
from .records import read_json, write_text

_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
_MOST_ROWS = 100
# A longer table is folded away: what comes after it would be far below.
_OPEN_ROWS = 30
# Pictures of the notebooks' Mermaid diagrams, for pages that run no script, named by `diagram_file`. One is made by
# npx -p @mermaid-js/mermaid-cli mmdc --theme neutral --scale 2 --input DIAGRAM.mmd --output FILE
_DIAGRAMS = resources.files("qlora_kit") / "diagrams"
_LONG = ' class="long"'
_NAMES = {
    "accuracy": "accuracy",
    "f1_macro": "macro F1",
    "f1_weighted": "weighted F1",
    "loss": "loss",
    "test": "fine-tuned, test",
    "test_without_leaked": "fine-tuned, test without leaked texts",
    "validation": "fine-tuned, validation",
    "tfidf_svm": "baseline: TF-IDF + linear SVM",
    "embedding_svm": "baseline: frozen embeddings + linear SVM",
}
# Facts whose names say too little once they stand beside others.
_LONGER = {
    "train_seconds": "training_seconds",
    "total_seconds": "in_all_seconds",
    "peak_bytes": "peak_memory_bytes",
    "reserved_bytes": "reserved_memory_bytes",
    "planned_bytes": "planned_memory_bytes",
    "measure": "memory_measured",
    "trainable": "trained_parameters",
    "all": "all_parameters",
}
_COLUMNS = ("accuracy", "f1_macro", "f1_weighted", "loss")
# Sections of a record that have a place of their own on the page, or say what the notebook's heading says.
_KNOWN = {"schema", "notebook", "preset", "experiment", "metrics", "memory", "timing", "parameters", "environment"}

_STYLE = """
:root { color-scheme: light dark; --ink: #1d2330; --soft: #5c6577; --page: #fbfbf9; --card: #ffffff; --rule: #e3e4e0;
  --accent: #0b6bb0; --good: #1a7f4b; --bad: #b3261e; --wait: #8a6100; --code: #f3f4f1; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e8ee; --soft: #9aa3b5; --page: #14171d; --card: #1c2028;
  --rule: #303643; --accent: #74b9f0; --good: #6fd39b; --bad: #ff9c92; --wait: #e5bd62; --code: #232833; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); line-height: 1.55;
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 28px 18px 64px; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .3rem; overflow-wrap: anywhere; }
h2 { font-size: 1.25rem; margin: 0; } h3 { font-size: 1rem; margin: 1.4rem 0 .5rem; }
a { color: var(--accent); } .soft { color: var(--soft); } p { margin: .4rem 0; }
section { background: var(--card); border: 1px solid var(--rule); border-radius: 12px; padding: 18px 20px;
  margin: 20px 0; }
.head { display: flex; flex-wrap: wrap; gap: 4px 14px; align-items: baseline; }
.state { font-size: .85rem; font-weight: 600; } .finished { color: var(--good); } .failed { color: var(--bad); }
.running { color: var(--wait); }
.wide { overflow-x: auto; margin: .4rem 0; }
table { border-collapse: collapse; width: 100%; font-size: .92rem; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: 6px 14px 6px 0; border-bottom: 1px solid var(--rule); vertical-align: top; }
th { color: var(--soft); font-weight: 600; } td.n, th.n { text-align: right; white-space: nowrap; }
td.t { min-width: 15em; } td details { margin: 0; white-space: nowrap; }
td .range { display: block; color: var(--soft); font-size: .82em; }
tr.first td { font-weight: 600; } tr.first td.t { min-width: 15em; } td details { margin: 0; white-space: nowrap; }
td .range { font-weight: 400; }
.figures { columns: 420px 2; column-gap: 16px; margin-top: 16px; }
figure { margin: 0 0 16px; break-inside: avoid; }
figure img { width: 100%; height: auto; display: block; background: #fff; border-radius: 8px;
  border: 1px solid var(--rule); } figcaption { color: var(--soft); font-size: .85rem; padding-top: 4px; }
.facts { display: grid; gap: 12px; grid-template-columns: repeat(auto-fill, minmax(150px, 1fr)); margin: 14px 0; }
.facts div { border-left: 3px solid var(--rule); padding-left: 10px; overflow-wrap: anywhere; }
.facts .long { grid-column: 1 / -1; }
.facts dt { color: var(--soft); font-size: .82rem; } .facts dd { margin: 0; font-weight: 600; } dl { margin: 0; }
details { margin: .6rem 0; } summary { cursor: pointer; color: var(--accent); }
pre { background: var(--code); border-radius: 8px; padding: 12px; overflow-x: auto; margin: .5rem 0;
  font-size: .85rem; line-height: 1.45; } pre.error { border-left: 4px solid var(--bad); }
@media (max-width: 600px) { main { padding: 16px 8px 48px; } section { padding: 14px 12px; }
  h1 { font-size: 1.35rem; } table { font-size: .85rem; }
  th, td { padding-right: 9px; } td:first-child { min-width: 8.5em; } .facts { gap: 8px; } }
code, pre { font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
"""

# What nbconvert's fragment needs beyond the style above.
_NOTEBOOK_STYLE = """
.cell { margin: 14px 0; min-width: 0; } .prompt { display: none; } .rendered_html table { width: auto; }
.rendered_html h1 { font-size: 1.7rem; } .rendered_html h2 { font-size: 1.3rem; margin-top: 2rem; }
.rendered_html h1, .rendered_html h2, .rendered_html h3 { line-height: 1.25; margin-bottom: .4rem; }
.anchor-link { display: none; } .output_area { overflow-x: auto; } .output_area img, .rendered_html img { height: auto;
  max-width: min(100%, 720px); background: #fff; border-radius: 8px; }
.output_text pre { background: none; padding: 0 0 0 12px;
  border-left: 3px solid var(--rule); border-radius: 0; } .output_error pre { border-left-color: var(--bad); }
.output_stderr pre { color: var(--soft); } blockquote { margin: .6rem 0; padding-left: 14px;
  border-left: 3px solid var(--rule); color: var(--soft); } .rendered_html code { background: var(--code);
  padding: 1px 4px; border-radius: 4px; } .rendered_html pre code { padding: 0; }
.highlight .k, .highlight .kn, .highlight .kc, .highlight .ow { color: #8250df; }
.highlight .c1 { color: var(--soft); }
.highlight .s1, .highlight .s2, .highlight .sa { color: var(--good); }
.highlight .mi, .highlight .mf { color: #b35900; }
@media (prefers-color-scheme: dark) { .highlight .k, .highlight .kn, .highlight .kc, .highlight .ow { color: #c8a1ff; }
  .highlight .mi, .highlight .mf { color: #f0b27a; } }
"""


def write_index(out: str | Path) -> Path:
    """Write `OUT/index.html` from what is in OUT, and the notebooks' own pages where they are missing.

    Args:
        out: The folder, with the runner's `run.json` in it.

    Returns:
        The path of the page.
    """
    out = Path(out)
    state = read_json(out / "run.json")
    sections, records = [], []
    for name, entry in state["notebooks"].items():
        record: dict[str, Any] = {}
        with contextlib.suppress(KitError):
            read = read_json(out / f"{name}.json")
            record = read if isinstance(read, dict) else {}
        records.append(record)
        if entry["state"] != "running" and (out / f"{name}.ipynb").is_file():
            write_notebook_page(out / f"{name}.ipynb", out / f"{name}.html")
        sections.append(_section(out, name, entry, record))
    page = out / "index.html"
    write_text(page, _document(f"{state['preset']}: results", _head(state, records) + "\n".join(sections)))
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
                cell.source = with_diagrams(with_formulas(cell.source))
            cell.outputs = [output for output in map(without_bars, cell.get("outputs", ())) if output is not None]
        body = _clean(HTMLExporter(template_name="basic").from_notebook_node(book)[0])
    except Exception as error:  # A notebook cut off while it was being written must not hide what came before.
        body = f"<p>{_text(notebook.name)} cannot be read: {_text(error)}</p>"
    back = '<p><a href="index.html">all notebooks</a></p>'
    write_text(page, _document(notebook.stem, back + body, _NOTEBOOK_STYLE))


def _is_set_up(cell: Any) -> bool:
    """Whether it is the set-up cell, the same in each notebook and about Colab; one that failed is to be seen."""
    failed = any(output.get("output_type") == "error" for output in cell.get("outputs", ()))
    return "set-up" in cell.metadata.get("tags", ()) and not failed


def with_formulas(markdown: str) -> str:
    """Return Markdown whose LaTeX needs no script to be read: formulas on their own as pictures, others in italics."""
    from matplotlib import mathtext

    def picture(found: re.Match[str]) -> str:
        stream = io.BytesIO()
        formula = " ".join(found[1].split()).replace(r"\tfrac", r"\frac")
        try:
            mathtext.math_to_image(f"${formula}$", stream, dpi=150, format="png")
        except ValueError:  # more LaTeX than matplotlib knows
            return f"`{formula}`"
        return f"![{_text(formula)}](data:image/png;base64,{base64.b64encode(stream.getvalue()).decode()})"

    markdown = re.sub(r"\$\$(.+?)\$\$", picture, markdown, flags=re.DOTALL)
    return re.sub(r"(?<![\w$\\`])\$([A-Za-z\\][^$\n`]*?)\$(?!\w)", r"*\1*", markdown)


def with_diagrams(markdown: str) -> str:
    """Return Markdown whose Mermaid diagrams need no script to be seen: pictures, where the package has them."""

    def picture(found: re.Match[str]) -> str:
        file = _DIAGRAMS / diagram_file(found[1])
        if not file.is_file():
            return found[0]
        return f"![diagram](data:image/png;base64,{base64.b64encode(file.read_bytes()).decode()})"

    return re.sub(r"```mermaid\n(.*?)```", picture, markdown, flags=re.DOTALL)


def diagram_file(diagram: str) -> str:
    """Return the name of the file with a Mermaid diagram's picture: a changed diagram has another."""
    return f"{hashlib.sha256(diagram.encode()).hexdigest()[:12]}.png"


def without_bars(output: Any) -> Any:
    """Return an output without the progress bars in it, or None where nothing else is; they are over."""
    if output.get("name") == "stderr":
        lines = [line for line in re.split(r"[\r\n]+", output["text"]) if line.strip("\x1b[A ")]
        kept = [line for line in lines if not re.search(r"\d%\|", line)]
        return type(output)({**output, "text": "\n".join(kept) + "\n"}) if kept else None
    return output


# What a notebook's markdown and tables need; anything else is left out of its page.
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
    """Return a notebook's HTML with harmless tags alone: its outputs may hold anything."""
    import bleach

    # What stands within these is no text, and would be shown as such once the tags are gone.
    body = re.sub(r"<(style|script)\b.*?</\1\s*>", "", body, flags=re.DOTALL | re.IGNORECASE)
    body = re.sub(r"<img\b[^>]*>", _own_picture, body, flags=re.IGNORECASE)
    return str(bleach.clean(body, tags=_TAGS, attributes=_harmless, protocols={"data", "http", "https"}, strip=True))


def _own_picture(found: re.Match[str]) -> str:
    """Return an image that is in the page, and of one that would have to be fetched (a badge) its words."""
    words = re.search(r'\balt="([^"]*)"', found[0])
    return found[0] if 'src="data:image/png;base64,' in found[0] else words[1] if words else ""


def _harmless(tag: str, name: str, value: str) -> bool:
    if tag == "img":
        return name == "alt" or (name == "src" and value.startswith("data:image/png;base64,"))
    if tag == "a" and name == "href":
        return value.startswith(("#", "http://", "https://"))
    return name in ("class", "id", "colspan", "rowspan")


def _document(title: str, body: str, more_style: str = "") -> str:
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{_text(title)}</title>\n<style>{_STYLE}{more_style}</style>\n</head>\n"
        f"<body>\n<main>\n{body}\n</main>\n</body>\n</html>\n"
    )


def _text(value: object) -> str:
    return html.escape(str(value), quote=True)


def _head(state: Mapping[str, Any], records: Sequence[Mapping[str, Any]]) -> str:
    environment: Mapping[str, Any] = {}
    for record in records:
        if isinstance(record.get("environment"), dict) and record["environment"]:
            environment = record["environment"]
    seconds = sum(_number(entry.get("seconds")) for entry in state["notebooks"].values())
    started = str(state.get("started")).replace("T", " ").replace("+00:00", " UTC")
    facts: dict[str, Any] = {}
    for record in records:
        with contextlib.suppress(KeyError, TypeError):
            facts["macro F1 on the test rows"] = float(record["metrics"]["test"]["f1_macro"]["value"])
    facts |= {"started": started, "in_all_seconds": seconds}
    for key in ("device", "threads", "commit"):
        if environment.get(key) is not None:
            facts[key] = environment[key]
    if isinstance(facts.get("commit"), str):
        facts["commit"] = re.sub(r"^([0-9a-f]{12})[0-9a-f]*", r"\1", facts["commit"]).replace("+", ", with ")
    versions = environment.get("versions")
    if isinstance(versions, dict):
        shown = ("torch", "transformers", "peft", "bitsandbytes")
        facts.update({key: versions[key] for key in shown if key in versions})
    return (
        f"<header><h1>{_text(state['preset'])}</h1>"
        f'<p class="soft">PRESET={_text(state.get("asked"))}: {_text(state.get("why"))}</p>{_facts(facts)}</header>'
    )


def _number(value: Any) -> float:
    return float(value) if isinstance(value, (int, float)) else 0.0


def _section(out: Path, name: str, entry: Mapping[str, Any], record: Mapping[str, Any]) -> str:
    parts = [f'<div class="head"><h2>{_text(name)}</h2>', _state(entry)]
    links = [
        f'<a href="{_text(name)}{ending}">{words}</a>'
        for ending, words in ((".html", "read it"), (".ipynb", "notebook"), (".json", "record"))
        if (out / f"{name}{ending}").is_file()
    ]
    parts.append(f"<span>{' · '.join(links)}</span></div>")
    given = {key: value for key, value in entry.get("parameters", {}).items() if key not in ("preset", "out")}
    if given:
        shown = ", ".join(f"{key}={value}" for key, value in given.items())
        parts.append(f'<p class="soft">with {_text(shown)}</p>')
    if entry.get("error"):
        parts.append(f'<pre class="error">{_text(entry["error"])}</pre>')
    found = record.get("metrics")
    metrics: Mapping[str, Any] = found if isinstance(found, dict) else {}
    parts.append(_metrics(metrics))
    # What other notebooks measure has no table of its own.
    scored = {key for key, value in metrics.items() if any(True for _ in _metric_rows({key: value}))}
    parts += [_value(key, value) for key, value in metrics.items() if key not in scored]
    facts: dict[str, Any] = {}
    for key in ("timing", "memory", "parameters"):
        if isinstance(record.get(key), dict):
            facts.update({_LONGER.get(name, name): value for name, value in record[key].items()})
    more = {key: value for key, value in record.items() if key not in _KNOWN}
    facts.update({key: value for key, value in more.items() if not isinstance(value, (dict, list))})
    parts.append(_facts({key: value for key, value in facts.items() if not isinstance(value, (dict, list))}))
    for key, value in more.items():
        if isinstance(value, (dict, list)):
            parts.append(_value(key, value))
    parts.append(_figures(out / name))
    for key, words in (("experiment", "The experiment"), ("environment", "Made with")):
        if record.get(key):
            parts.append(f"<details><summary>{words}</summary><pre>{_json(record[key])}</pre></details>")
    return f"<section>{''.join(parts)}</section>"


def _state(entry: Mapping[str, Any]) -> str:
    from .notebooks import spoken

    words = str(entry.get("state"))
    if isinstance(entry.get("seconds"), (int, float)):
        words += f" after {spoken(entry['seconds'])}"
    return f'<span class="state {_text(entry.get("state"))}">{_text(words)}</span>'


# --- records as tables --------------------------------------------------------------------------------------------


def _is_metric(value: Any) -> bool:
    if isinstance(value, dict):
        return "value" in value
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _metric_rows(metrics: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield the rows of the table of metrics: who, and what was reached; the baselines after the fine-tuned model."""
    for name, values in metrics.items():
        if not isinstance(values, dict):
            continue
        if any(key in _COLUMNS and _is_metric(value) for key, value in values.items()):
            who = _NAMES.get(name, _words(name))
            yield who, values
            if isinstance(values.get("ahead"), dict):
                yield f"fine-tuned minus {who.removeprefix('baseline: ')}", values["ahead"]
        else:
            yield from _metric_rows(values)


def _metrics(metrics: Mapping[str, Any]) -> str:
    rows = list(_metric_rows(metrics))
    if not rows:
        return ""
    columns = [key for key in _COLUMNS if any(key in values for _, values in rows)]
    head = "".join(f'<th class="n">{_text(_NAMES.get(key, _words(key)))}</th>' for key in columns)
    body = []
    for place, (name, values) in enumerate(rows):
        cells = "".join(f'<td class="n">{_metric(values.get(key))}</td>' for key in columns)
        first = ' class="first"' if place == 0 else ""
        body.append(f"<tr{first}><td>{_text(name)}</td>{cells}</tr>")
    table = _wide(f"<th></th>{head}", "".join(body))
    ranges = any(isinstance(value, dict) and "low" in value for _, values in rows for value in values.values())
    return table + ('<p class="soft">In smaller type: 95% intervals.</p>' if ranges else "")


def _wide(head: str, body: str) -> str:
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _metric(value: Any) -> str:
    if isinstance(value, dict):
        shown = _scalar("", value.get("value"))
        if value.get("low") is None or value.get("high") is None:
            return shown
        return f'{shown}<span class="range">{_scalar("", value["low"])} to {_scalar("", value["high"])}</span>'
    return _scalar("", value)


def _words(name: str) -> str:
    words = re.sub(r"_(bytes|seconds)$", "", str(name)).replace("_", " ")
    for plain, written in (("snr db", "SNR, dB"), ("mse", "MSE"), ("lloyd max", "Lloyd-Max")):
        words = re.sub(rf"\b{plain}\b", written, words)
    return words


def _scalar(key: str, value: Any) -> str:
    """Return one value as text for the page, in units that its name tells."""
    from .notebooks import spoken

    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (int, float)):
        if key.endswith("bytes"):
            return f"{value / 2**20:,.1f} MiB"
        if key.endswith("seconds"):
            return spoken(value) if value >= 10 else f"{value:.3g} s"
        if isinstance(value, int):
            return f"{value:,}" if abs(value) >= 10_000 else str(value)
        if abs(value) < 0.01:
            return f"{value:.3g}"
        return f"{value:.4f}" if abs(value) < 10 else f"{value:,.1f}"
    return _text(value)


def _value(key: str, value: Any) -> str:
    """Return a section of a record: a mapping as facts, a list of rows as a table, the rest folded away."""
    if isinstance(value, dict) and value:
        flat = {name: item for name, item in value.items() if not isinstance(item, (dict, list))}
        numbers = {name: item for name, item in value.items() if _is_numbers(item)}
        deep = {name: item for name, item in value.items() if name not in flat and name not in numbers}
        inner = _facts(flat) + _columns(numbers) + "".join(_value(name, item) for name, item in deep.items())
        return f"<h3>{_text(_words(key))}</h3>{inner}" if flat or numbers else inner
    if isinstance(value, list) and value and all(isinstance(row, dict) for row in value):
        if len(value) > _OPEN_ROWS:
            return f"<details><summary>{_text(_words(key))}: {len(value)} rows</summary>{_table(value)}</details>"
        return f"<h3>{_text(_words(key))}</h3>{_table(value)}"
    if value in (None, {}, [], ""):
        return ""
    if isinstance(value, list):
        return f"<details><summary>{_text(_words(key))}</summary><pre>{_json(value)}</pre></details>"
    return f"<h3>{_text(_words(key))}</h3><p>{_scalar(key, value)}</p>"


def _is_numbers(value: Any) -> bool:
    return isinstance(value, dict) and bool(value) and "value" not in value and all(map(_is_metric, value.values()))


def _columns(columns: Mapping[str, Mapping[str, Any]]) -> str:
    """Return mappings of names to numbers as one table: a column each, a row a name."""
    names = dict.fromkeys(name for column in columns.values() for name in column)
    rows = [{"": name, **{key: column.get(name) for key, column in columns.items()}} for name in names]
    return _table(rows) if rows else ""


def _facts(values: Mapping[str, Any]) -> str:
    shown = [(key, value) for key, value in values.items() if value is not None]
    items = "".join(
        f"<div{_LONG if len(str(value)) > 36 else ''}><dt>{_text(_words(key))}</dt><dd>{_scalar(key, value)}</dd></div>"
        for key, value in shown
    )
    return f'<dl class="facts">{items}</dl>' if items else ""


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    columns = list(dict.fromkeys(key for row in rows for key in row))
    numeric = {key for key in columns if all(row.get(key) is None or _is_metric(row[key]) for row in rows)}
    nested = {key for key in columns if any(isinstance(row.get(key), dict) for row in rows)}
    long = {key for key in columns if key not in nested and any(len(str(row.get(key, ""))) > 40 for row in rows)}
    mark = {key: ' class="n"' if key in numeric else ' class="t"' if key in long else "" for key in columns}
    head = "".join(f"<th{mark[key]}>{_text(_words(key))}</th>" for key in columns)
    body = "".join(
        "<tr>" + "".join(f"<td{mark[key]}>{_cell(key, row.get(key))}</td>" for key in columns) + "</tr>"
        for row in rows[:_MOST_ROWS]
    )
    more = f'<p class="soft">and {len(rows) - _MOST_ROWS:,} more in the record</p>' if len(rows) > _MOST_ROWS else ""
    return _wide(head, body) + more


def _cell(key: str, value: Any) -> str:
    if isinstance(value, dict):
        if "value" in value:
            return _metric(value)
        if not value:
            return _scalar(key, None)
        return f"<details><summary>{len(value)} values</summary><pre>{_json(value)}</pre></details>"
    if isinstance(value, list):
        return "<br>".join(_text(item) for item in value)
    return _scalar(key, value)


def _json(value: Any) -> str:
    return _text(json.dumps(value, indent=1, ensure_ascii=False))


def _figures(folder: Path) -> str:
    shown = []
    for path in sorted(folder.glob("*.png")):
        if path.is_file() and not path.is_symlink():
            picture = base64.b64encode(path.read_bytes()).decode("ascii")
            words = _words(re.sub(r"^\d+_", "", path.stem))
            shown.append(
                f'<figure><img src="data:image/png;base64,{picture}" alt="{_text(words)}">'
                f"<figcaption>{_text(words)}</figcaption></figure>"
            )
    return f'<div class="figures">{"".join(shown)}</div>' if shown else ""
