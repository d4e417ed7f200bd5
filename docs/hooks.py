"""What `make docs` makes its pages of: README, docs/*.md, docstrings, the commands' help, notebooks, results/.

MkDocs calls the functions named `on_...`. `OUT` in the environment is the folder of the executed notebooks; it is
runs/latest where there is none.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import posixpath
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "docs")]

import diagrams  # noqa: E402
import render  # noqa: E402

from qlora_kit.cli import main as command_line  # noqa: E402
from qlora_kit.notebooks import colab  # noqa: E402
from qlora_kit.public import EXPORTS, MODULES  # noqa: E402

PACKAGE = ROOT / "qlora_kit"
# The command line has a page of its own, what is public a table; colab is a tool for a clone.
_LEFT_OUT = {"__init__", "__main__", "cli", "public", "notebooks.colab"}
# What most people need, in the order in which they meet it.
_FIRST = (
    *("text_classification", "banking77", "preset", "Experiment", "finetune", "evaluate", "load_run", "Run"),
    *("search", "zip_results", "download_results", "KitError"),
)
# Of the headings of what a file defines: one below its own.
_LEVEL = 3
_MOST_ROWS = 40


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Name the repository and the pages."""
    config.repo_url = colab.address(ROOT)
    config.repo_name = (config.repo_url or "").removeprefix("https://github.com/") or None
    config.edit_uri = ""
    config.nav = [
        {"Home": "index.md"},
        {"Notebooks": ["notebooks/index.md", *(f"notebooks/{path.stem}.md" for path in _notebooks())]},
        {"Guides": ["your_data.md", "read_a_report.md", "serve.md", "run_notebooks.md"]},
        {"How it works": ["how_it_works.md", "compare.md"]},
        {"Results": ["results.md", "claims.md", "architectures.md"]},
        {"Command line": "command-line.md"},
        {"API": ["api/index.md", {"Internals": ["api/internals.md", *(f"api/{name}.md" for name in _rooms())]}]},
        {"Contributing": "contributing.md"},
    ]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages."""
    for name, content in _pages(config.repo_url or ""):
        files.append(File.generated(config, name, content=content))
    return files


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Make the links of docs/*.md whole, and draw the diagrams of every page."""
    if page.file.generated_by is None:
        markdown = _linked(markdown, "docs", config.repo_url or "")
    return diagrams.inline(markdown)


def _pages(repository: str) -> Iterator[tuple[str, str | bytes]]:
    for name, page in (("README.md", "index.md"), ("CONTRIBUTING.md", "contributing.md")):
        yield page, _linked((ROOT / name).read_text(encoding="utf-8"), "", repository)
    yield "command-line.md", _commands()
    yield "api/index.md", _api_index()
    yield "api/internals.md", _internals()
    for name in _rooms():
        yield f"api/{name}.md", _api_page(name)
    yield from _notebook_pages()
    yield from _results(repository)
    yield "architectures.md", render.page("architectures.md")


# --- texts of the repository ------------------------------------------------------------------------------------


def _linked(text: str, folder: str, repository: str) -> str:
    """Return a text of the repository with its links made whole: to a page of the site, or to the file on GitHub.

    Args:
        text: Markdown.
        folder: The folder in the repository that its links start from.
        repository: The address on GitHub; where there is none, the words of a link to a file stay without it.
    """
    pages = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "results/README.md": "results.md"}
    pages |= {f"docs/{path.name}": path.name for path in (ROOT / "docs").glob("*.md")}
    pages |= {f"notebooks/{path.name}": f"notebooks/{path.stem}.md" for path in _notebooks()}
    pages |= {f"qlora_kit/{room}{end}": f"api/{room}.md" for room in _rooms() for end in ("", ".py")}

    def link(found: re.Match[str]) -> str:
        words, target = found[1], found[2]
        if re.match(r"(https?:|#|mailto:)", target):
            return found[0]
        path, mark, anchor = target.partition("#")
        path = posixpath.normpath(posixpath.join(folder, path))
        # Pictures of results/ are files of the site.
        if re.fullmatch(r"results/\w+\.png", path):
            return f"[{words}]({path})"
        if path in pages:
            return f"[{words}]({pages[path]}{mark}{anchor})"
        return f"[{words}]({repository}/blob/main/{path})" if repository else words

    # Code stays as it is.
    parts = re.split(r"(^```.*?^```$)", text, flags=re.DOTALL | re.MULTILINE)
    return "".join(
        part if part.startswith("```") else re.sub(r"\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)\s]+)\)", link, part)
        for part in parts
    )


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


def _file(module: str) -> Path:
    path = PACKAGE.joinpath(*module.split("."))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def _first_sentence(tree: Any) -> str:
    return (ast.get_docstring(tree) or "").split("\n\n")[0].replace("\n", " ")


def _said(name: str) -> str:
    """Return the first sentence of what a public name says about itself."""
    tree = ast.parse(_file(EXPORTS[name]).read_text(encoding="utf-8"))
    (node,) = (node for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name == name)
    return _first_sentence(node)


def _names(names: Sequence[str]) -> list[str]:
    lines = [f"| [`qk.{name}`][qlora_kit.{EXPORTS[name]}.{name}] | {_said(name)} |" for name in names]
    return ["| name | what it does |", "|---|---|", *lines]


def _api_index() -> str:
    return "\n".join(
        [
            "# API\n",
            "What most people need. `import qlora_kit as qk` takes milliseconds; what is heavy is imported when it is "
            "first used.\n",
            *_names(_FIRST),
            "\n[Internals](internals.md) has the other public names, and all modules.\n",
        ]
    )


def _internals() -> str:
    called = {
        room: "<br>".join(f"`qk.{name}`" for name, path in MODULES.items() if path.partition(".")[0] == room)
        for room in _rooms()
    }
    lines = [
        f"| [{room}]({room}.md) | {called[room]} | {_first_sentence(ast.parse(_file(room).read_text('utf-8')))} |"
        for room in _rooms()
    ]
    return "\n".join(
        [
            "# Internals\n",
            "Other public names, then the modules. Whatever is not public may change without notice.\n",
            *_names([name for name in EXPORTS if name not in _FIRST]),
            "\n## Modules\n",
            "| module | at hand as | what is in it |",
            "|---|---|---|",
            *lines,
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


def _results(repository: str) -> Iterator[tuple[str, str | bytes]]:
    """Yield results/README.md with each record's picture and its first rows, and the pictures."""
    opening, *sections = re.split(r"^## ", render.page("results/README.md"), flags=re.MULTILINE)
    parts = [_linked(opening, "results", repository)]
    for section in sections:
        name = section.partition("\n")[0]
        parts.append(_linked(f"## {section}", "results", repository))
        file = ROOT / "results" / f"{name}.json"
        if not file.is_file():  # a section about several records
            continue
        record = json.loads(file.read_text(encoding="utf-8"))
        # A record's rows are of several machines; its own environment is the newest one's.
        made = [row.get("environment") or record["environment"] for row in record["rows"]]
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
