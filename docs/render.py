"""Make README.md, results/README.md, pages of docs/ and the pictures of results/ from the records: `make figures`.

    python docs/render.py              # write what has changed
    python docs/render.py README.md    # this text alone, and no picture
    python docs/render.py --check      # write nothing; exit code 1, and where a text is not what the records say

The texts are templates in docs/templates (jinja2). A figure in them is an expression that names its record, its row and
its key:

    {{ row("t4", contender="ours").peak_bytes | mib | number }}

A row that is not there, or more than one, is an error that says what was matched and what is nearest. No figure is
typed: `typed` finds those that are, and `STATED` lists the numbers that are said without having been measured, each
with the reason.
"""

from __future__ import annotations

import argparse
import difflib
import functools
import json
import math
import re
import sys
import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from addressing import ROOT, Records, Row, beside, busy, distinct, fullest, kind, mean, same
from pictures import PICTURES, picture, png, stale_pictures
from typed_figures import typed

from qlora_kit.errors import KitError
from qlora_kit.notebooks import colab

TEMPLATES = ROOT / "docs" / "templates"
INTO = ROOT
"""Where texts are written."""
TEXTS = {
    "README.md": "README.md.j2",
    "results/README.md": "results.md.j2",
    "docs/claims.md": "claims.md.j2",
    "docs/compare.md": "compare.md.j2",
    "docs/how_it_works.md": "how_it_works.md.j2",
}
"""What is rendered into the repository, and from which template."""
PARTS = ("measured.md.j2",)
"""Templates that others include."""
PAGES = {"architectures.md": "architectures.md.j2"}
"""What is rendered for the site alone."""
WIDTH = 120
WORDS = ["no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"]


# --- how a value is written -------------------------------------------------------------------------------------


def short(device: str) -> str:
    """Write a GPU's name as people say it: H100; a processor's in full."""
    from qlora_kit import plots

    return plots.short_device(device) if kind(device) == "GPU" else device


def number(value: Any, digits: int = 0) -> str:
    """Write a number with so many digits after the point, thousands set apart; never `-0`."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise KitError(f"{value!r} is no number that can be shown")
    text = f"{value:,.{digits}f}"
    return text.removeprefix("-") if float(text.replace(",", "")) == 0 else text


def signed(value: Any, digits: int = 0) -> str:
    """Write a number with its sign; nothing has none."""
    text = number(value, digits)
    return text if text.startswith("-") or not text.strip("0.") else f"+{text}"


def percent(value: Any, digits: int = 1) -> str:
    """Write a share in percent."""
    return f"{number(100 * value, digits)}%"


def signed_percent(value: Any, digits: int = 1) -> str:
    """Write a share in percent, with its sign."""
    return f"{signed(100 * value, digits)}%"


def spelled(value: Any) -> str:
    """Write a small whole number as a word; a larger one in digits."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise KitError(f"{value!r} is no whole number")
    return WORDS[value] if 0 <= value < len(WORDS) else number(value)


def least(value: float) -> str:
    """Write a number with the digits that it has, as a setting is written: 0.002."""
    return f"{value:.15g}"


def series(texts: Sequence[str]) -> str:
    """Write texts one after the other: `a, b and c`."""
    *most, last = [str(text) for text in texts]
    return f"{', '.join(most)} and {last}" if most else last


def folded(text: str) -> str:
    """Fold what a program printed to the width of a block of code."""
    return "\n".join(textwrap.fill(line, 88, break_on_hyphens=False) for line in text.splitlines())


def reach(differences: Sequence[Row]) -> float:
    """Return half the width of the widest interval of macro F1 among these differences."""
    return float(max(one["f1_macro"]["high"] - one["f1_macro"]["low"] for one in differences) / 2)


def cell(row: Row) -> str:
    """Write a row of the memory table: MiB measured, and the plan against it."""
    planned, peak = row["planned_bytes"], row["peak_bytes"]
    return f"{number(peak / 2**20)} | {signed_percent(planned / peak - 1) if planned else ''}"


def table(rows: Sequence[Row], *columns: tuple[Any, ...]) -> str:
    """Write a table of rows.

    Args:
        rows: A line each.
        *columns: The heading, the key (with dots for one within another), then the filters, each followed by its
            argument if it takes one: `("kernels, ms", "device_seconds", "ms", "number", 2)`.

    Returns:
        Its Markdown; what a row lacks is left empty.
    """

    def written(row: Row, key: str, steps: Sequence[Any]) -> str:
        value: Any = row
        for part in key.split("."):
            if value is None or (value := value.get(part)) is None:
                return ""
        for at, step in enumerate(steps):
            if isinstance(step, str):
                value = FILTERS[step](value, *(steps[at + 1 : at + 2] if isinstance((*steps, "")[at + 1], int) else ()))
        return str(value).replace("|", "\\|")

    head = ["| " + " | ".join(heading for heading, *_ in columns) + " |", "|" + "---|" * len(columns)]
    lines = ["| " + " | ".join(written(row, key, steps) for _, key, *steps in columns) + " |" for row in rows]
    return "\n".join([*head, *lines])


def place(*paths: str) -> str:
    """Return the first of these paths that is in the repository.

    Raises:
        KitError: None is.
    """
    for path in paths:
        if (ROOT / path).exists():
            return path
    raise KitError(f"none of {', '.join(paths)} is in the repository")


def must(condition: Any, what: str) -> str:
    """Write nothing; refuse to render a sentence that the records no longer bear out.

    Raises:
        KitError: The condition is false.
    """
    if not condition:
        raise KitError(f"a template says that {what}; the records no longer say so: write that sentence anew")
    return ""


_SCALED: dict[str, Callable[[Any], Any]] = {
    "mib": lambda value: value / 2**20,
    "gib": lambda value: value / 2**30,
    "ms": lambda value: 1000 * value,
    "minutes": lambda value: value / 60,
    "millions": lambda value: value / 1e6,
}
FILTERS: dict[str, Callable[..., Any]] = {
    "number": number,
    "signed": signed,
    "percent": percent,
    "signed_percent": signed_percent,
    "spelled": spelled,
    "least": least,
    "series": series,
    "folded": folded,
    "cell": cell,
    "short": short,
    **_SCALED,
}


# --- rendering --------------------------------------------------------------------------------------------------


def render(
    text: str, records: Records, claims_table: Callable[[], str] | None = None, repository: str | None = None
) -> str:
    """Return a template's text with the records' figures in it.

    Args:
        text: The template.
        records: Where figures are read.
        claims_table: Returns the table of claims; None to make it of the records' folder (some 20 seconds).
        repository: `https://github.com/OWNER/NAME`, for badges; None for pyproject.toml's. Where that has none, a text
            says how to come by one.

    Raises:
        KitError: An address that leads to no value or to several, or a sentence that the records do not bear out.
    """
    names = ("record", "row", "rows", "row_if_any", "device", "commit", "environment", "names", "origins")
    own: dict[str, Any] = {name: getattr(records, name) for name in names}
    own["claims_table"] = claims_table or functools.partial(claims_of, records.folder)
    own["repository"] = repository or colab.address(ROOT)
    try:
        return wrapped(_compiled(text).render(own))
    except jinja2.UndefinedError as error:
        raise KitError(f"a template asks for what is not there: {error.message}") from error


@functools.cache
def _compiled(text: str) -> jinja2.Template:
    return _environment().from_string(text)


@functools.cache
def _environment() -> jinja2.Environment:
    from qlora_kit import claims, data, plots
    from qlora_kit.config.preset import preset

    @jinja2.pass_context
    def environments(context: Any, row: Row) -> Row:
        found: Row = context["environment"](row)
        return found

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        undefined=jinja2.StrictUndefined,
        extensions=["jinja2.ext.do"],
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,
    )
    environment.filters |= FILTERS | {"environment": environments}
    environment.tests["busy"] = busy
    called = (must, same, distinct, fullest, mean, reach, beside, place, table, kind, preset, headline, min, max, abs)
    environment.globals |= FILTERS | {function.__name__: function for function in called}
    environment.globals |= {
        "pictures": PICTURES,
        "banking77": functools.cache(data.banking77),
        "unknown_share": data.UNKNOWN_SHARE,
        "contender_names": plots.CONTENDER_NAMES,
        "margin": claims.MARGIN,
        "notebooks": sorted(path.stem for path in (ROOT / "notebooks").glob("*.ipynb")),
        "ten_lines": json.loads((ROOT / "docs" / "ten_lines.json").read_text(encoding="utf-8")),
    }
    return environment


def claims_of(folder: Path) -> str:
    """Return the table of claims as the records alone judge them, so that it is the same on every machine."""
    import dataclasses

    from qlora_kit import claims

    found = claims.read(folder, ROOT / "docs" / "no notebooks")
    return claims.markdown(claims.check(dataclasses.replace(found, runs=(), notebooks={}, device="")))


def headline(command: str) -> str:
    """Return the first sentence of what the script of a command says about itself."""
    import ast

    found = re.search(r"\bbenchmarks/\w+\.py", command)
    if found is None or not (ROOT / found[0]).is_file():
        return ""
    text = ast.get_docstring(ast.parse((ROOT / found[0]).read_text(encoding="utf-8"))) or ""
    return text.split("\n\n")[0].replace("\n", " ").partition(": results/")[0].rstrip(".") + "."


def wrapped(text: str) -> str:
    """Return a Markdown text with its paragraphs filled to the width of a line; tables, headings and code stay."""
    blocks: list[list[str]] = [[]]
    code = False
    for line in text.splitlines():
        if not line.strip() and not code:
            blocks.append([])
            continue
        blocks[-1].append(line)
        code ^= line.startswith("```")
    done = []
    for lines in filter(None, blocks):
        block = "\n".join(lines)
        if lines[0].startswith(("```", "|", "#", "<", "!")):
            done.append(block)
        elif item := re.match(r"- |\d+\. ", block):
            items = re.split(r"\n(?=- |\d+\. )", block)
            done.append("\n".join(_filled(text, " " * len(item[0])) for text in items))
        else:
            done.append(_filled(block))
    return "\n\n".join(done) + "\n"


def _filled(text: str, indent: str = "") -> str:
    return textwrap.fill(
        " ".join(text.split()), WIDTH, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )


@functools.cache
def template(name: str) -> str:
    """Return the source of a template."""
    return (TEMPLATES / name).read_text(encoding="utf-8")


def texts(
    records: Records | None = None,
    claims_table: Callable[[], str] | None = None,
    paths: Sequence[str] = (),
    repository: str | None = None,
) -> dict[str, str]:
    """Return rendered texts by their paths in the repository.

    Args:
        records: See `render`.
        claims_table: See `render`.
        paths: Which; none for all of `TEXTS`.
        repository: See `render`.
    """
    records = records or Records()
    return {path: render(template(TEXTS[path]), records, claims_table, repository) for path in paths or TEXTS}


def page(name: str, records: Records | None = None) -> str:
    """Return a page of the site: one of `PAGES`, or of `TEXTS`."""
    return render(template((PAGES | TEXTS)[name]), records or Records())


def problems(made: Mapping[str, str], records: Records) -> list[str]:
    """Return what is not as the records say, a line each: figures that are typed, texts and pictures that differ."""
    found = [
        f"docs/templates/{name}:{line}: {figure} is typed; a figure is an expression, or stands in STATED with a reason"
        for name in (*TEXTS.values(), *PAGES.values(), *PARTS)
        for line, figure in typed(template(name))
    ]
    found += differences(made)
    return found + [
        f"results/{name}.png does not show what results/{name}.json has" for name in stale_pictures(records)
    ]


# --- the command ------------------------------------------------------------------------------------------------


def differences(made: Mapping[str, str], root: Path | None = None) -> list[str]:
    """Return the lines of a unified diff from the files as they are to what they have to be; none where all is well."""
    lines: list[str] = []
    for path, text in made.items():
        file = (root or INTO) / path
        old = file.read_text(encoding="utf-8") if file.is_file() else ""
        if old != text:
            # With their ends, so that a last line without one is a difference, too.
            sides = (old.splitlines(keepends=True), text.splitlines(keepends=True))
            lines += map(str.rstrip, difflib.unified_diff(*sides, path, f"{path} by the records", n=0))
    return lines


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("texts", nargs="*", metavar="TEXT", help=f"one of {', '.join(TEXTS)}; all, and the pictures")
    parser.add_argument("--check", action="store_true", help="write nothing, and say what is not as the records say")
    options = parser.parse_args(arguments)
    if unknown := [path for path in options.texts if path not in TEXTS]:
        parser.error(f"{unknown[0]!r} is made from no template: allowed are {', '.join(TEXTS)}")
    try:
        records = Records()
        made = texts(records, paths=options.texts)
        if not options.check:
            for path, text in made.items():
                _write(INTO / path, text.encode())
            for name in () if options.texts else PICTURES:
                _write(records.folder / f"{name}.png", png(picture(name, records)))
        found = differences(made) if options.texts else problems(made, records)
    except KitError as error:
        print(error, file=sys.stderr)
        return 2
    pictures = "" if options.texts else f" and {len(PICTURES)} pictures"
    print("\n".join(found) if found else f"{len(made)} texts{pictures} are what the records say")
    return 1 if found else 0


def _write(path: Path, content: bytes) -> None:
    if not path.is_file() or path.read_bytes() != content:
        path.write_bytes(content)
        print(f"written: {path}")


if __name__ == "__main__":
    sys.exit(main())
