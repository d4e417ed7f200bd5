"""Turn a notebook's record into a section of the page: numbers, tables, settings, figures."""

from __future__ import annotations

import base64
import html
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from ..system.showing import counted
from .names import figure_row, text_of, unit_of, words
from .screen import duration
from .summary import notebook_lines

_MOST_ROWS = 100
# A longer table is collapsed: otherwise what follows would be far below.
_OPEN_ROWS = 30
_LONG = ' class="long"'
LONG_CELL = 40  # a longer cell (in characters) makes its column one of texts
_COLUMNS = ("accuracy", "f1_macro", "f1_weighted", "loss")
# Sections of a record that have their own place on the page, or repeat the notebook's heading.
_KNOWN = {"schema", "notebook", "preset", "experiment", "metrics", "memory", "timing", "parameters", "environment"}
# The figure that is shown before `more`, a wide one: a tall one would be small there. Of other notebooks the first one.
_FIRST_FIGURE = {
    "00_your_data": "02_scores",
    "01_quantization": "04_error_by_block_size",
    "02_finetune": "04_what_is_stored_how",
    "04_memory": "01_plan_by_shape",
}


def escaped(value: object) -> str:
    """Return a value as text that is safe in HTML, between quotes too."""
    return html.escape(str(value), quote=True)


def as_number(value: Any) -> float:
    """Return a record's value if it is a number, else 0."""
    return float(value) if isinstance(value, (int, float)) else 0.0


def section(out: Path, name: str, entry: Mapping[str, Any], record: Mapping[str, Any], title: str = "") -> str:
    """Return a notebook's section of the page: what it found, and behind `more` all its numbers and figures.

    Args:
        out: The folder OUT.
        name: The notebook, e.g. `02_finetune`.
        entry: What `run.json` says about it.
        record: What the notebook itself wrote; empty if it wrote nothing.
        title: Its title; by default its name.
    """
    number, _, rest = name.partition("_")
    heading = f"{number} {title or rest.replace('_', ' ')}"
    parts = [f'<div class="head"><h2>{escaped(heading)}</h2>', _state(entry)]
    links = [
        f'<a href="{escaped(name)}{ending}">{shown}</a>'
        for ending, shown in ((".html", "read it"), (".ipynb", "notebook"), (".json", "record"))
        if (out / f"{name}{ending}").is_file()
    ]
    parts.append(f"<span>{' · '.join(links)}</span></div>")
    given = {key: value for key, value in entry.get("parameters", {}).items() if key not in ("preset", "out")}
    if given:
        shown = ", ".join(f"{key}={value}" for key, value in given.items())
        parts.append(f'<p class="soft">with {escaped(shown)}</p>')
    if entry.get("error"):
        parts.append(f'<pre class="error">{escaped(entry["error"])}</pre>')
    found = record.get("metrics")
    metrics: Mapping[str, Any] = found if isinstance(found, dict) else {}
    lines = notebook_lines(name, record)
    parts += [f"<p>{escaped(line[:1].upper() + line[1:])}.</p>".replace("..</p>", ".</p>") for line in lines]
    scored = _metrics(metrics)
    if not lines:
        parts.append(scored)
        scored = ""
    figures = _figures(out / name)
    chosen = _FIRST_FIGURE.get(name, "")
    first = chosen if chosen in figures else next(iter(figures), "")
    # Beside a table of scores, one figure more would be more than a screen.
    if first and lines:
        parts.append(f'<div class="first">{figures.pop(first)}</div>')
    more = scored + _numbers(metrics, record)
    more += f'<div class="figures">{"".join(figures.values())}</div>' if figures else ""
    for key, said in (("experiment", "The experiment"), ("environment", "Made with")):
        if record.get(key):
            more += f"<details><summary>{said}</summary><pre>{_json(record[key])}</pre></details>"
    if more:
        count = f", {counted(len(figures), 'figure')}" if figures else ""
        parts.append(f'<details class="more"><summary>more: all numbers{count}</summary>{more}</details>')
    return f"<section>{''.join(parts)}</section>"


def _numbers(metrics: Mapping[str, Any], record: Mapping[str, Any]) -> str:
    """Return all that a record holds beside the table of scores."""
    # Metrics that do not fit into that table, from other notebooks.
    scored = {key for key, value in metrics.items() if any(True for _ in _metric_rows({key: value}))}
    parts = [_value(key, value) for key, value in metrics.items() if key not in scored]
    facts: dict[str, Any] = {}
    for key in ("timing", "memory", "parameters"):
        if isinstance(record.get(key), dict):
            facts.update(record[key])
    extra = {key: value for key, value in record.items() if key not in _KNOWN}
    facts.update({key: value for key, value in extra.items() if not isinstance(value, (dict, list))})
    parts.append(fact_list({key: value for key, value in facts.items() if not isinstance(value, (dict, list))}))
    nested = {key: value for key, value in facts.items() if isinstance(value, (dict, list))}
    parts += [_value(key, value) for key, value in nested.items()]
    parts += [_value(key, value) for key, value in extra.items() if isinstance(value, (dict, list))]
    return "".join(parts)


def _state(entry: Mapping[str, Any]) -> str:
    said = str(entry.get("state"))
    if isinstance(entry.get("seconds"), (int, float)):
        said += f" after {duration(entry['seconds'])}"
    return f'<span class="state {escaped(entry.get("state"))}">{escaped(said)}</span>'


# --- records as tables --------------------------------------------------------------------------------------------


def _is_metric(value: Any) -> bool:
    if isinstance(value, dict):
        return "value" in value
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _metric_rows(metrics: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield the rows of the table of metrics: a name and its scores. Baselines come after the fine-tuned model."""
    for name, values in metrics.items():
        if name == "test_without_leaked" and values is None:
            yield f"{words(name)}: none is left", {}
        if not isinstance(values, dict):
            continue
        if any(key in _COLUMNS and _is_metric(value) for key, value in values.items()):
            who = words(name)
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
    head = "".join(f'<th class="n">{escaped(words(key))}</th>' for key in columns)
    body = []
    for place, (name, values) in enumerate(rows):
        cells = "".join(f'<td class="n">{_metric(values.get(key))}</td>' for key in columns)
        first = ' class="first"' if place == 0 else ""
        body.append(f"<tr{first}><td>{escaped(name)}</td>{cells}</tr>")
    table = _wide(f"<th></th>{head}", "".join(body))
    ranges = any(isinstance(value, dict) and "low" in value for _, values in rows for value in values.values())
    return table + ('<p class="soft">In smaller type: 95% intervals.</p>' if ranges else "")


def _wide(head: str, body: str, kind: str = "") -> str:
    return f'<div class="wide"><table{kind}><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _metric(value: Any) -> str:
    if isinstance(value, dict):
        shown = _scalar("", value.get("value"))
        if value.get("low") is None or value.get("high") is None:
            return shown
        return f'{shown}<span class="range">{_scalar("", value["low"])} to {_scalar("", value["high"])}</span>'
    return _scalar("", value)


def _scalar(key: str, value: Any) -> str:
    """Return one value as text for the page, in the unit of its key."""
    return escaped(text_of(value, unit_of(key)))


def _value(key: str, value: Any) -> str:
    """Return a section of a record: a mapping as facts, a list of rows as a table, other lists collapsed."""
    if isinstance(value, dict) and value:
        flat = {name: item for name, item in value.items() if not isinstance(item, (dict, list))}
        numbers = {name: item for name, item in value.items() if _is_numbers(item)}
        deep = {name: item for name, item in value.items() if name not in flat and name not in numbers}
        inner = (
            fact_list(flat, unit_of(key))
            + _columns(numbers)
            + "".join(_value(name, item) for name, item in deep.items())
        )
        return f"<h3>{escaped(words(key))}</h3>{inner}" if flat or numbers else inner
    if isinstance(value, list) and value and all(isinstance(row, dict) for row in value):
        if len(value) > _OPEN_ROWS:
            title = f"{escaped(words(key))}: {counted(len(value), 'row')}"
            return f"<details><summary>{title}</summary>{_table(value)}</details>"
        return f"<h3>{escaped(words(key))}</h3>{_table(value)}"
    if value in (None, {}, [], ""):
        return ""
    if isinstance(value, list):
        return f"<details><summary>{escaped(words(key))}</summary><pre>{_json(value)}</pre></details>"
    return f"<h3>{escaped(words(key))}</h3><p>{_scalar(key, value)}</p>"


def _is_numbers(value: Any) -> bool:
    return isinstance(value, dict) and bool(value) and "value" not in value and all(map(_is_metric, value.values()))


def _columns(columns: Mapping[str, Mapping[str, Any]]) -> str:
    """Return mappings of names to numbers as one table: a column per mapping, a row per name."""
    names = dict.fromkeys(name for column in columns.values() for name in column)
    rows = [{"": name, **{key: column.get(name) for key, column in columns.items()}} for name in names]
    return _table(rows) if rows else ""


def fact_list(values: Mapping[str, Any], unit: str = "") -> str:
    """Return single values as an HTML list of names and values, without those that are None.

    Args:
        values: By name.
        unit: The unit of all of them, if they have one, as `names.unit_of` gives it; else each has that of its name.
    """
    shown = [(key, value) for key, value in values.items() if value is not None]
    items = "".join(
        f"<div{_LONG if len(str(value)) > 36 else ''}>"
        f"<dt>{escaped(key if unit else words(key))}</dt>"
        f"<dd>{escaped(text_of(value, unit)) if unit else _scalar(key, value)}</dd></div>"
        for key, value in shown
    )
    return f'<dl class="facts">{items}</dl>' if items else ""


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    rows = [figure_row(row) for row in rows]
    columns = list(dict.fromkeys(key for row in rows for key in row))
    numeric = {key for key in columns if all(row.get(key) is None or _is_metric(row[key]) for row in rows)}
    nested = {key for key in columns if any(isinstance(row.get(key), dict) for row in rows)}
    long = {key for key in columns if key not in nested and any(len(str(row.get(key, ""))) > LONG_CELL for row in rows)}
    mark = {key: ' class="n"' if key in numeric else ' class="t"' if key in long else "" for key in columns}
    # On a phone, columns of texts do not fit side by side: there a row is a card with one line per column.
    cards = len(long) > 1
    name = {key: f' data-name="{escaped(words(key))}"' if cards else "" for key in columns}
    head = "".join(f"<th{mark[key]}>{escaped(words(key))}</th>" for key in columns)
    body = "".join(
        "<tr>" + "".join(f"<td{mark[key]}{name[key]}>{_cell(key, row.get(key))}</td>" for key in columns) + "</tr>"
        for row in rows[:_MOST_ROWS]
    )
    more = f'<p class="soft">and {len(rows) - _MOST_ROWS:,} more in the record</p>' if len(rows) > _MOST_ROWS else ""
    return _wide(head, body, ' class="cards"' if cards else "") + more


def _cell(key: str, value: Any) -> str:
    if isinstance(value, dict):
        if "value" in value:
            return _metric(value)
        if not value:
            return _scalar(key, None)
        unit = unit_of(key)
        inside = "<br>".join(f"{escaped(name)}: {escaped(_inner(item, unit))}" for name, item in value.items())
        return f"<details><summary>{len(value)} values</summary>{inside}</details>"
    if isinstance(value, list):
        unit = unit_of(key)
        return "<br>".join(escaped(_inner(item, unit)) for item in value)
    return _scalar(key, value)


def _inner(value: Any, unit: str) -> str:
    """Return an item of a cell: with its unit, or as JSON where it has items itself."""
    return json.dumps(value, ensure_ascii=False) if isinstance(value, (dict, list)) else text_of(value, unit)


def _json(value: Any) -> str:
    return escaped(json.dumps(value, indent=1, ensure_ascii=False))


def _figures(folder: Path) -> dict[str, str]:
    """Return a notebook's figures as HTML by the names of their files, in their order; each leads to its file."""
    shown = {}
    for path in sorted(folder.glob("*.png")):
        if path.is_file() and not path.is_symlink():
            picture = base64.b64encode(path.read_bytes()).decode("ascii")
            said = words(re.sub(r"^\d+_", "", path.stem))
            shown[path.stem] = (
                f'<figure><a href="{quote(f"{folder.name}/{path.name}")}" title="in full size">'
                f'<img src="data:image/png;base64,{picture}" alt="{escaped(said)}"></a>'
                f"<figcaption>{escaped(said)}</figcaption></figure>"
            )
    return shown
