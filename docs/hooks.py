"""What `make docs` makes its pages of: README, docstrings, the command line's help, executed notebooks, results/.

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
sys.path.insert(0, str(ROOT))

from qlora_kit import __main__ as command_line  # noqa: E402
from qlora_kit import colab  # noqa: E402

# Modules of tools for this clone, and what only the command line needs.
_LEFT_OUT = {"__init__", "__main__", "colab"}
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
        {"Command line": "command-line.md"},
        {"API": ["api/index.md", *(f"api/{name}.md" for name in _modules())]},
    ]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages."""
    for name, content in _pages(config.repo_url or ""):
        files.append(File.generated(config, name, content=content))
    return files


def _pages(repository: str) -> Iterator[tuple[str, str | bytes]]:
    yield "index.md", _home(repository)
    yield "command-line.md", _commands()
    yield "api/index.md", _api_index()
    for name in _modules():
        yield f"api/{name}.md", f"# qlora_kit.{name}\n\n::: qlora_kit.{name}\n"
    yield from _notebook_pages()
    yield from _results()


# --- README -----------------------------------------------------------------------------------------------------


def _home(repository: str) -> str:
    """Return README with its links into the repository made whole; pictures of results/ are pages' own files."""

    def link(found: re.Match[str]) -> str:
        target = found[1]
        if re.match(r"(https?:|#|mailto:|results/.*\.png$)", target):
            return found[0]
        for start, page in (("notebooks/", "notebooks/{}.md"), ("qlora_kit/", "api/{}.md")):
            stem = Path(target).stem
            known = {path.stem for path in _notebooks()} if start == "notebooks/" else set(_modules())
            if target.startswith(start) and target.count("/") == 1 and stem in known:
                return f"]({page.format(stem)})"
        return f"]({repository}/blob/main/{target})"

    return re.sub(r"\]\(([^)\s]+)\)", link, (ROOT / "README.md").read_text(encoding="utf-8"))


# --- the package ------------------------------------------------------------------------------------------------


def _modules() -> list[str]:
    found = sorted(path.stem for path in (ROOT / "qlora_kit").glob("*.py"))
    return [name for name in found if name not in _LEFT_OUT and not name.startswith("_")]


def _first_line(module: str) -> str:
    import ast

    text = (ROOT / "qlora_kit" / f"{module}.py").read_text(encoding="utf-8")
    return (ast.get_docstring(ast.parse(text)) or "").split("\n\n")[0].replace("\n", " ")


def _api_index() -> str:
    import qlora_kit

    rows = [f"| [{name}]({name}.md) | {_first_line(name)} |" for name in _modules()]
    exported = [
        f"| [`qk.{name}`][qlora_kit.{module}.{name}] | {module} |" for name, module in qlora_kit._EXPORTS.items()
    ]
    return "\n".join(
        [
            "# API\n",
            "`import qlora_kit as qk` takes milliseconds: a module, as `qk.memory`, is imported at its first use.\n",
            "| at hand as | from |",
            "|---|---|",
            *exported,
            "\n## Modules\n",
            "| module | what is in it |",
            "|---|---|",
            *rows,
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

    from qlora_kit.page import with_formulas, without_bars

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
    parts = [
        "# Results\n",
        "Each record of `results/`, with its figure: what was measured, where, and the command that does it again.\n",
    ]
    for path in sorted((ROOT / "results").glob("*.json")):
        record = json.loads(path.read_text(encoding="utf-8"))
        parts.append(f"## {path.stem}\n\n```bash\n{record.get('command', '')}\n```\n")
        environment = record.get("environment", {})
        versions = environment.get("versions", {})
        shown = ", ".join(f"{name} {versions[name]}" for name in ("torch", "transformers", "peft") if name in versions)
        parts.append(f"On {environment.get('device')}, {shown}.\n")
        picture = path.with_suffix(".png")
        if picture.is_file():
            parts.append(f"![{path.stem}](results/{picture.name})\n")
        parts.append(f'<div class="records" markdown>\n\n{_table(record["rows"])}\n</div>\n')
    yield "results.md", "\n".join(parts)
    for picture in sorted((ROOT / "results").glob("*.png")):
        yield f"results/{picture.name}", picture.read_bytes()


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
