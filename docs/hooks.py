"""What `make docs` makes its pages of: README, CONTRIBUTING, docstrings, the commands' help, notebooks, results/.

MkDocs calls the functions named `on_...`. `OUT` in the environment is the folder of the executed notebooks; it is
runs/latest where there is none.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "docs")]

import render  # noqa: E402

from qlora_kit.cli import main as command_line  # noqa: E402
from qlora_kit.notebooks import colab  # noqa: E402
from qlora_kit.public import EXPORTS, MODULES  # noqa: E402

PACKAGE = ROOT / "qlora_kit"
# The command line has a page of its own, what is public a table; colab is a tool for a clone.
_LEFT_OUT = {"__init__", "__main__", "cli", "public", "notebooks.colab"}
# Of the headings of what a file defines: one below its own.
_LEVEL = 3
_MOST_ROWS = 40


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Name the repository and the pages."""
    config.repo_url = colab.address(ROOT)
    config.repo_name = config.repo_url.removeprefix("https://github.com/")
    config.edit_uri = ""
    config.nav = [
        {"Home": "index.md"},
        {"Notebooks": ["notebooks/index.md", *(f"notebooks/{path.stem}.md" for path in _notebooks())]},
        {"Results": "results.md"},
        {"Architectures": "architectures.md"},
        {"Command line": "command-line.md"},
        {"API": ["api/index.md", *(f"api/{name}.md" for name in _rooms())]},
        {"Contributing": "contributing.md"},
    ]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages."""
    for name, content in _pages(config.repo_url or ""):
        files.append(File.generated(config, name, content=content))
    return files


def _pages(repository: str) -> Iterator[tuple[str, str | bytes]]:
    yield "index.md", _linked("README.md", repository)
    yield "contributing.md", _linked("CONTRIBUTING.md", repository)
    yield "command-line.md", _commands()
    yield "api/index.md", _api_index()
    for name in _rooms():
        yield f"api/{name}.md", _api_page(name)
    yield from _notebook_pages()
    yield from _results()
    yield "architectures.md", render.page("architectures.md")


# --- README and CONTRIBUTING ------------------------------------------------------------------------------------


def _linked(name: str, repository: str) -> str:
    """Return a text of the repository with its links made whole: to a page of the site, or to the file on GitHub."""
    pages = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "results/README.md": "results.md"}
    pages |= {f"notebooks/{path.name}": f"notebooks/{path.stem}.md" for path in _notebooks()}
    pages |= {f"qlora_kit/{room}{end}": f"api/{room}.md" for room in _rooms() for end in ("", ".py")}

    def link(found: re.Match[str]) -> str:
        target = found[1]
        # Pictures of results/ are files of the site.
        if re.match(r"(https?:|#|mailto:|results/.*\.png$)", target):
            return found[0]
        return f"]({pages.get(target) or f'{repository}/blob/main/{target}'})"

    return re.sub(r"\]\(([^)\s]+)\)", link, (ROOT / name).read_text(encoding="utf-8"))


# --- the package ------------------------------------------------------------------------------------------------


def _rooms() -> list[str]:
    """Return the modules and packages right below `qlora_kit`; folders of data are neither."""
    found = {path.stem for path in PACKAGE.glob("*.py")} | {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    return sorted(found - _LEFT_OUT)


def _api_page(room: str) -> str:
    """Return a module's page; of a package, a section for each of its files."""
    parts = [f"# qlora_kit.{room}\n\n::: qlora_kit.{room}\n"]
    for path in sorted((PACKAGE / room).glob("[!_]*.py")):
        if f"{room}.{path.stem}" not in _LEFT_OUT:
            options = f"    options:\n      heading_level: {_LEVEL}\n"
            parts.append(f"## {path.stem}\n\n::: qlora_kit.{room}.{path.stem}\n{options}")
    return "\n".join(parts)


def _first_line(room: str) -> str:
    import ast

    file = PACKAGE / room / "__init__.py" if (PACKAGE / room).is_dir() else PACKAGE / f"{room}.py"
    text = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
    return text.split("\n\n")[0].replace("\n", " ")


def _api_index() -> str:
    called = {
        room: "<br>".join(f"`qk.{name}`" for name, path in MODULES.items() if path.partition(".")[0] == room)
        for room in _rooms()
    }
    return "\n".join(
        [
            "# API\n",
            "`import qlora_kit as qk` takes milliseconds: a module, as `qk.memory`, is imported at its first use.\n",
            "| at hand as | from |",
            "|---|---|",
            *(f"| [`qk.{name}`][qlora_kit.{module}.{name}] | {module} |" for name, module in EXPORTS.items()),
            "\n## Modules\n",
            "| module | at hand as | what is in it |",
            "|---|---|---|",
            *(f"| [{room}]({room}.md) | {called[room]} | {_first_line(room)} |" for room in _rooms()),
            "",
        ]
    )


def _commands() -> str:
    os.environ["COLUMNS"] = "100"  # the width of argparse's lines
    parser = command_line.make_parser()
    (commands,) = (action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    parts = ["# Command line\n", f"```text\n{parser.format_help()}```\n"]
    for name, command in commands.choices.items():
        parts.append(f"## {name}\n\n```text\n{command.format_help()}```\n")
    return "\n".join(parts)


# --- the notebooks ----------------------------------------------------------------------------------------------


def _notebooks() -> list[Path]:
    return sorted((ROOT / "notebooks").glob("*.ipynb"))


def _out() -> Path:
    return ROOT / (os.environ.get("OUT") or "runs/latest")


def _notebook_pages() -> Iterator[tuple[str, str | bytes]]:
    import nbformat
    from nbconvert import MarkdownExporter

    from qlora_kit.notebooks.page import with_formulas, without_bars

    rows = []
    for source in _notebooks():
        executed = _out() / source.name
        book = nbformat.read(executed if executed.is_file() else source, as_version=4)
        # The set-up cell is the same in each, and about Colab.
        book.cells = [cell for cell in book.cells if "set-up" not in cell.metadata.get("tags", ())]
        for cell in book.cells:
            if cell.cell_type == "markdown":
                cell.source = with_formulas(cell.source)
            cell.outputs = [output for output in map(without_bars, cell.get("outputs", ())) if output is not None]
        body, resources = MarkdownExporter().from_notebook_node(book, {"output_files_dir": source.stem})
        # What pandas says about its tables' looks, the site's style says.
        body = re.sub(r"<style scoped>.*?</style>", "", body, flags=re.DOTALL)
        title, _, rest = body.partition("\n")
        yield f"notebooks/{source.stem}.md", f"{title}\n\n{_executed(executed)}\n{rest}"
        for name, content in resources["outputs"].items():
            yield f"notebooks/{name}", content
        rows.append(f"| [{source.stem}]({source.stem}.md) | {title.removeprefix('# ')} |")
    table = "\n".join(["| notebook | |", "|---|---|", *rows])
    state = "" if (_out() / "run.json").is_file() else _executed(_out() / "run.json")
    yield "notebooks/index.md", f"# Notebooks\n\n{state}\n\n{table}\n"


def _executed(path: Path) -> str:
    where = os.path.relpath(path.parent, ROOT)
    if path.is_file():
        return f"*As executed into `{where}`.*\n"
    return (
        f'!!! warning "Not executed"\n    There is no executed notebook in `{where}`, so no output is shown here. '
        "`make run-notebooks`, then `make docs`, puts it here.\n"
    )


# --- results/ ---------------------------------------------------------------------------------------------------


def _results() -> Iterator[tuple[str, str | bytes]]:
    """Yield results/README.md with each record's picture and its first rows, and the pictures."""
    opening, *sections = re.split(r"^## ", render.page("results/README.md"), flags=re.MULTILINE)
    parts = [opening.replace("../README.md", "index.md")]
    for section in sections:
        name = section.partition("\n")[0]
        record = json.loads((ROOT / "results" / f"{name}.json").read_text(encoding="utf-8"))
        # A record's rows are of several machines; its own environment is the newest one's.
        made = [row.get("environment") or record["environment"] for row in record["rows"]]
        parts.append(f"## {_without_links(section)}")
        parts.append("\n".join(f"- {line}" for line in dict.fromkeys(map(_machine, made))) + "\n")
        if (ROOT / "results" / f"{name}.png").is_file():
            parts.append(f"![{name}](results/{name}.png)\n")
        parts.append(f'<div class="records" markdown>\n\n{_table(record["rows"])}\n</div>\n')
    yield "results.md", "\n".join(parts)
    for picture in sorted((ROOT / "results").glob("*.png")):
        yield f"results/{picture.name}", picture.read_bytes()


def _machine(environment: Mapping[str, Any]) -> str:
    versions = environment.get("versions", {})
    shown = [f"{name} {versions[name]}" for name in ("torch", "transformers", "peft") if name in versions]
    return ", ".join([str(environment.get("device")), *shown])


def _without_links(text: str) -> str:
    """Return the text without links to files that the site does not have."""
    return re.sub(r"\[([^\]]+)\]\([^)/:]+\.(?:json|png)\)", r"`\1`", text)


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the first rows as a table of what is one value; the records have the rest."""
    more = f"\nThe first {_MOST_ROWS} of {len(rows):,} rows: the record has all.\n" if len(rows) > _MOST_ROWS else ""
    rows = [{key: _shown(value) for key, value in row.items()} for row in rows[:_MOST_ROWS]]
    columns = [key for key in dict.fromkeys(key for row in rows for key in row) if any(row.get(key) for row in rows)]
    head = ["| " + " | ".join(key.replace("_", " ") for key in columns) + " |", "|" + "---|" * len(columns)]
    return (
        "\n".join([*head, *("| " + " | ".join(row.get(key) or "" for key in columns) + " |" for row in rows)])
        + "\n"
        + more
    )


def _shown(value: Any) -> str:
    if isinstance(value, dict) and "value" in value and "low" in value:
        return f"{value['value']:.4g} ({value['low']:.4g} to {value['high']:.4g})"
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1000 else f"{value:,.0f}"
    if isinstance(value, bool) or value is None or isinstance(value, (dict, list)):
        return "yes" if value is True else ""
    return f"{value:,}" if isinstance(value, int) and value >= 10_000 else str(value).replace("|", "\\|")
