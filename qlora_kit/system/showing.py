"""Show objects in a few lines, in a terminal and in Jupyter; labels and texts in them may be anything."""

from __future__ import annotations

import html
import re
from collections.abc import Sequence

MOST_SHOWN = 100
"""The most characters of a name, label or text that a line shows."""


_CELL = 'style="text-align:left;padding:2px 12px 2px 0"'


def harmless(text: str) -> str:
    """Return text with terminal control characters (such as escape sequences in a label) spelled out."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", lambda found: ascii(found[0])[1:-1], text)


def one_line(text: str, most: int = MOST_SHOWN) -> str:
    """Return a text on one line: white space joined, control characters spelled out, cut off after `most` characters.

    Args:
        text: A text, label or name.
        most: The most characters that are shown of it.
    """
    line = harmless(" ".join(text.split()))
    return line if len(line) <= most else f"{line[: most - 1]}…"


def counted(count: float, noun: str) -> str:
    """Return a number with its noun: `1 row`, `2 rows`, `1,000 test rows`, `0.5 epochs`.

    Args:
        count: How many.
        noun: For one, as `test row`; others have an s at its end.
    """
    number = f"{count:,}" if isinstance(count, int) else f"{count:g}"
    return f"{number} {noun}{'' if count == 1 else 's'}"


def lines_as_html(lines: Sequence[str], *, titled: bool = True) -> str:
    """Return lines as HTML, everything escaped. A long path breaks where the page ends.

    Args:
        lines: Plain text.
        titled: Whether the first line is bold.
    """
    first, *rest = (html.escape(line) for line in lines)
    shown = [f"<strong>{first}</strong>" if titled else first, *rest]
    return f'<div style="overflow-wrap:anywhere">{"<br>".join(shown)}</div>'


def table_as_html(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table as HTML, everything escaped. Jupyter would align texts on the right.

    Args:
        columns: Headings.
        rows: For each row, a cell for each column.
    """

    def row(cells: Sequence[str], tag: str) -> str:
        return f"<tr>{''.join(f'<{tag} {_CELL}>{html.escape(cell)}</{tag}>' for cell in cells)}</tr>"

    return f"<table>{row(columns, 'th')}{''.join(row(cells, 'td') for cells in rows)}</table>"
