"""What the page shows, as HTML. Labels, texts, file names and messages go through `shown`, whatever is in them."""

from __future__ import annotations

import html
from collections.abc import Sequence

from ..run import Run
from ..runs.predictor import Predictions
from ..system.devices import default_device
from ..system.showing import harmless, one_line
from .labelling import Labelled
from .model import Near, TrainingTexts

TOP = 5
"""Labels, and training texts, that are shown for a text."""
MOST_LABELS = 500
"""The most labels that the page lists."""
SHOWN_ROWS = 10
"""Rows of a labelled file that are shown; the file to download has all."""

CSS = """
.gradio-container main { max-width: 60rem; margin-inline: auto !important; }
.qk { overflow-wrap: anywhere; line-height: 1.5; }
.qk h1 { font-size: 1.5rem; font-weight: 600; margin: 0 0 .25rem; }
.qk h2 { font-size: 1rem; font-weight: 600; margin: 1.25rem 0 .5rem; }
.qk p { margin: .25rem 0; }
.qk .quiet, .qk summary { color: var(--body-text-color-subdued); }
.qk summary { cursor: pointer; }
.qk .label { font-size: 1.35rem; font-weight: 600; margin: .5rem 0; }
.qk .note { border-left: 3px solid var(--border-color-primary); padding-left: .75rem; }
.qk .problem { border-left: 3px solid #d97706; padding-left: .75rem; }
.qk dl { display: grid; grid-template-columns: minmax(0, 1fr) 4rem; gap: .15rem .75rem; margin: 0; }
.qk dt, .qk dd { margin: 0; }
.qk dd { text-align: right; font-variant-numeric: tabular-nums; }
.qk dl .bar { grid-column: 1 / -1; height: 6px; border-radius: 3px; background: var(--border-color-primary); }
.qk dl .bar { margin-bottom: .4rem; overflow: hidden; }
.qk dl .bar span { display: block; height: 100%; background: var(--color-accent); }
.qk ol { list-style: none; margin: 0; padding: 0; }
.qk li { border-top: 1px solid var(--border-color-primary); padding: .4rem 0; margin: 0; }
.qk ul.labels { columns: 16rem; list-style: none; margin: .5rem 0 0; padding: 0; max-height: 20rem; overflow-y: auto; }
.qk ul.labels li { border: 0; padding: 0; break-inside: avoid; }
.qk table { width: 100%; border-collapse: collapse; table-layout: fixed; margin: .75rem 0; }
.qk table, .qk thead, .qk tbody, .qk tr, .qk th, .qk td { border: 0 !important; }
.qk th, .qk td { text-align: left; vertical-align: top; padding: .35rem .75rem .35rem 0 !important; }
.qk tbody tr { border-top: 1px solid var(--border-color-primary) !important; }
.qk th:last-child, .qk td:last-child { width: 6.5rem; text-align: right; padding-right: 0 !important; }
"""


def shown(text: str) -> str:
    """Return text as HTML that shows it letter by letter.

    Args:
        text: Anything. Braces, dollars and backticks are escaped as well: Gradio fills them as templates.
    """
    escaped = html.escape(harmless(text))
    for letter in "{}$`\\":
        escaped = escaped.replace(letter, f"&#{ord(letter)};")
    return escaped


def _name(name: str) -> str:
    """Return a label or another name on one line, which may break after an underscore."""
    return shown(one_line(name)).replace("_", "_<wbr>")


def _page(*parts: str) -> str:
    return f'<div class="qk">{"".join(parts)}</div>'


def problem(message: str) -> str:
    """Return a message about what was wrong, on one line.

    Args:
        message: Plain text.
    """
    return _page(f'<p class="problem" role="alert">{shown(" ".join(message.split()))}</p>')


def head(run: Run, host: str | None) -> str:
    """Return the head of the page: the run, its verdict, its labels, and where texts go.

    Args:
        run: The run.
        host: The address under which others reach the page; None where nobody else does.
    """
    spec, names = run.experiment, run.label_names
    base = "" if spec.quantization.scheme == "none" else f" in {spec.quantization.label}"
    where = (
        "This page runs on this machine. The texts that you enter do not leave it."
        if host is None
        else f"This page listens on {host}: whoever reaches it can use it, and what they enter goes there."
    )
    listed = "".join(f"<li>{_name(name)}</li>" for name in names[:MOST_LABELS])
    more = f"<li>and {len(names) - MOST_LABELS:,} more</li>" if len(names) > MOST_LABELS else ""
    return _page(
        f"<h1>{_name(spec.name)}</h1>",
        f'<p class="quiet">{shown(one_line(spec.model.name))}{shown(base)}, on {shown(default_device().type)}</p>',
        f"<p>{shown(run.verdict)}</p>",
        f"<p><strong>{shown(where)}</strong></p>",
        f'<details><summary>{len(names):,} labels</summary><ul class="labels">{listed}{more}</ul></details>',
    )


def answer(found: Predictions, near: Sequence[Near], training: TrainingTexts) -> str:
    """Return the labels of one text with their probabilities, and the training texts nearest to it.

    Args:
        found: The run's predictions for the text alone.
        near: The nearest training texts.
        training: All of them, or why there are none.
    """
    best = found.top(TOP)[0]
    if found.labels[0] is None:
        limit = found.reject_below or 0.0
        first = (
            '<p class="label">No label</p>'
            f"<p>The most probable one has {best[0][1]:.1%}, which is under the limit of {limit:.0%}.</p>"
        )
    else:
        first = f'<p class="label">{_name(best[0][0])}</p>'
    bars = "".join(
        f"<dt>{_name(name)}</dt><dd>{share:.1%}</dd>"
        f'<div class="bar" aria-hidden="true"><span style="width:{share:.1%}"></span></div>'
        for name, share in best
    )
    return _page(f'{first}<dl class="shares">{bars}</dl>', "<h2>Nearest training texts</h2>", _near(near, training))


def _near(near: Sequence[Near], training: TrainingTexts) -> str:
    if training.problem:
        return f'<p class="note">They cannot be shown: {shown(training.problem)}</p>'
    if not near:
        return '<p class="note">None of them is read yet: ask again in a moment.</p>'
    rows = "".join(
        f'<li>{shown(one_line(item.text, 300))}<br><span class="quiet">{_name(item.label)}, '
        f"similarity {item.cosine:.2f}</span></li>"
        for item in near
    )
    of = f"{training.of:,}" if training.done == training.of else f"{training.done:,} of the {training.of:,}"
    reading = " The others are still being read." if training.done < len(training.texts) else ""
    return (
        f'<ol class="near">{rows}</ol><p class="quiet">Of {of} texts that it was trained on, by the cosine of the '
        f"trained model's states.{reading}</p>"
    )


def file_answer(table: Labelled, name: str) -> str:
    """Return what was done with a file: how many rows, and the first of them.

    Args:
        table: The table with labels.
        name: The name of the file to download.
    """
    lines = [f"{len(table.rows):,} rows have labels: {name} has them all."]
    if table.rejected:
        lines.append(f"{table.rejected:,} of them got none, as the best one was under the limit.")
    if table.defused:
        lines.append(
            f"{table.defused:,} cells begin like a formula. They got a ' before them, so that no spreadsheet runs them."
        )
    at, label = table.text_at, table.label_at
    rows = "".join(
        f"<tr><td>{shown(one_line(row[at], 120))}</td><td>{_name(row[label] or '(none)')}</td>"
        f"<td>{float(row[label + 1]):.1%}</td></tr>"
        for row in table.rows[:SHOWN_ROWS]
    )
    left = len(table.rows) - SHOWN_ROWS
    return _page(
        *(f"<p>{shown(line)}</p>" for line in lines),
        f"<table><thead><tr><th>Text</th><th>Label</th><th>Probability</th></tr></thead><tbody>{rows}</tbody></table>",
        f'<p class="quiet">and {left:,} more rows</p>' if left > 0 else "",
    )
