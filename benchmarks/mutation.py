"""Change the library's own code one place at a time and see which tests notice: results/mutation.json.

    pip install -c constraints.txt -e ".[dev,mutation]"      # mutmut, into the environment that has the kit: `.venv`
    python benchmarks/mutation.py                            # a seeded sample of each module's mutants
    python benchmarks/mutation.py --modules data --sample 0  # every mutant of the package data
    python benchmarks/mutation.py --show                     # the survivors' changes, after a run

mutmut (https://mutmut.readthedocs.io) makes the mutants and runs the tests that reach each, in a copy of the
repository below `--work`. A mutant that makes a test fail is killed; one that no test reaches counts as surviving. The
tests are those that `make test` runs, of the files that reach a module's code most: `GROUPS`. So a row's score is a
lower bound of what `make test` notices: other files may notice more, and so may tests that start a process of their
own, whose calls mutmut does not see. The same command again, with the same files, goes on with the mutants that are
left; rows of modules that it is not about stay.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import hashlib
import importlib.metadata
import json
import os
import random
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common import ROOT, recording
from common.refusals import told_in_a_line

from qlora_kit.errors import KitError
from qlora_kit.system.environment import environment
from qlora_kit.system.files import sha256
from qlora_kit.system.parsing import read_json

KEY = ("module",)


@dataclasses.dataclass(frozen=True)
class Group:
    """Modules that the same test files cover.

    Args:
        modules: Their paths below qlora_kit, without `.py`; a package means all of its files.
        tests: Paths of the test files below tests/, without `.py`.
    """

    modules: tuple[str, ...]
    tests: tuple[str, ...]


# The modules whose bugs could cause wrong numbers, lost rows or lost runs. Each group has a copy of the repository. Its
# tests run once to find out which test calls which function, and a mutant is tried only with those tests.
GROUPS = {
    "evidence": Group(("checking", "claims"), ("checking/test_checking", "claims/test_claims")),
    "runs": Group(
        ("run", "runs", "metrics", "evaluation", "export", "training"),
        (
            "system/test_records",
            "evaluation/test_evaluation",
            "export/test_export",
            "training/test_training",
            "runs/test_run_folders",
        ),
    ),
    "memory": Group(
        ("memory", "models/inventory", "models/probe"),
        ("memory/test_memory", "models/test_inventory", "models/test_probe"),
    ),
    "data": Group(
        ("data", "system/parsing"),
        ("data/test_data", "data/test_reading", "system/test_parsing", "config/test_experiment"),
    ),
    "bits": Group(
        ("quantization",),
        (
            "quantization/test_quantization",
            "quantization/test_quantization_bitsandbytes",
            "quantization/test_int4",
            "quantization/test_compaction",
        ),
    ),
    "models": Group(
        tuple(
            f"models/{name}"
            for name in ("adapters", "build", "configuration", "forward", "heads", "pretrained", "sources", "weights")
        ),
        ("models/test_models", "promises/test_architectures", "training/test_training"),
    ),
}
MODULES = {module: name for name, group in GROUPS.items() for module in group.modules}
COPIED = ("qlora_kit", "tests", "benchmarks", "notebooks", "results", "README.md", "Makefile", "pyproject.toml", "docs")
RECORD = ROOT / "results" / "mutation.json"
CONFIG = """
[tool.mutmut]
source_paths = ["qlora_kit"]
only_mutate = {modules}
pytest_add_cli_args_test_selection = {tests}
also_copy = {copied}
# torch does not like to be forked once it has computed.
process_isolation = "forkserver"
track_dependencies = false
use_git_change_detection = false
timeout_multiplier = 4.0
timeout_constant = 20.0
"""
# Added to the copy's conftest.py, to fix two things in mutmut. It runs a mutant's tests in no fixed order, and each
# change of the file would build the fixtures of both files again: minutes a mutant. And it notes a fixture's calls
# only for the first test with that fixture: other tests, which check what the fixture returned, would never be tried.
CONFTEST = """

def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: (str(item.path), item.reportinfo()[1] or 0))


if os.environ.get("MUTANT_UNDER_TEST") == "stats":
    from mutmut.state import state

    @pytest.hookimpl(hookwrapper=True)
    def pytest_fixture_setup(fixturedef):
        before, state()._stats = state()._stats, set()
        yield
        fixturedef.called = state()._stats
        state()._stats = before | fixturedef.called

    def pytest_runtest_call(item):
        for fixtures in item._fixtureinfo.name2fixturedefs.values():
            for fixture in fixtures:
                state()._stats |= getattr(fixture, "called", set())
"""
# mutmut's code for a mutant: pytest's exit code, or its own code if no test reaches the mutant.
KILLED, SURVIVED, UNREACHED = (1, 3), 0, 33
TIMED_OUT = (-24, 24, 36, 152, 255)


def files_of(module: str) -> list[str]:
    """Return the paths of a module's files, relative to the repository: one, or all files of a package."""
    package = ROOT / "qlora_kit" / module
    found = sorted(package.glob("*.py")) if package.is_dir() else [package.with_suffix(".py")]
    return [file.relative_to(ROOT).as_posix() for file in found]


def path_of(module: str) -> str:
    """Return a module's name in rows: `qlora_kit/models/probe.py`, or `qlora_kit/data` for a package."""
    (first, *more) = files_of(module)
    return f"qlora_kit/{module}" if more else first


def prepare(work: Path, group: Group) -> None:
    """Copy the repository to `work`, with mutmut's settings for a group; replace an outdated copy."""
    settings = CONFIG.format(
        modules=json.dumps([file for module in group.modules for file in files_of(module)]),
        tests=json.dumps([f"tests/{name}.py" for name in group.tests]),
        copied=json.dumps([name for name in COPIED if name != "pyproject.toml"]),
    )
    stamp, now = work / "made_of.txt", made_of(settings + CONFTEST)
    if stamp.is_file() and stamp.read_text() == now:
        return
    # Results for other code or other tests are not valid for these.
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, work / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, work / name)
    for file in (work / name for module in group.modules for name in files_of(module)):
        file.write_text(undecorated(file.read_text(encoding="utf-8")), encoding="utf-8")
    with (work / "pyproject.toml").open("a", encoding="utf-8") as file:
        file.write(settings)
    with (work / "tests" / "conftest.py").open("a", encoding="utf-8") as file:
        file.write(CONFTEST)
    stamp.write_text(now)


def undecorated(source: str) -> str:
    """Return a module's text with decorators replaced by calls after their functions: `f = takes(...)(f)`.

    mutmut does not change decorated functions, and the kit's public functions are decorated: `finetune`, `evaluate`,
    `plan`. It supports static and class methods, so their decorators stay, and so do those of a property with a setter.
    """
    lines = source.splitlines()
    scopes = [ast.parse(source)]
    scopes += [node for node in scopes[0].body if isinstance(node, ast.ClassDef)]
    found = [node for scope in scopes for node in scope.body if isinstance(node, ast.FunctionDef)]
    setters = {node.name for node in found if any(ast.unparse(d).endswith(".setter") for d in node.decorator_list)}
    for node in sorted(found, key=lambda node: node.lineno, reverse=True):
        calls = [ast.unparse(decorator) for decorator in node.decorator_list]
        set_apart = node.name in setters or any(call in ("staticmethod", "classmethod") for call in calls)
        if not calls or set_apart:
            continue
        made = node.name
        for call in reversed(calls):
            made = f"{call}({made})"
        assert node.end_lineno is not None
        lines.insert(node.end_lineno, f"{' ' * node.col_offset}{node.name} = {made}")
        del lines[node.decorator_list[0].lineno - 1 : node.lineno - 1]
    return "\n".join(lines) + "\n"


def made_of(settings: str) -> str:
    """Return the SHA-256 over the copied files and mutmut's settings."""
    total = hashlib.sha256(settings.encode())
    for name in COPIED:
        path = ROOT / name
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            # This benchmark itself writes the record, module by module.
            if file.is_file() and "__pycache__" not in file.parts and file != RECORD:
                total.update(f"{file.relative_to(ROOT).as_posix()} {sha256(file)}\n".encode())
    return total.hexdigest()


def environment_of_tests() -> dict[str, str]:
    """Return the tests' environment variables: PYTHONPATH must not lead to this repository instead of the copy."""
    paths = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path and Path(path) != ROOT]
    threads = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), **threads}


def check_mutmut() -> None:
    """Refuse to start if mutmut would not be found by processes that tests start.

    The mutated code imports mutmut. Tests that start a process set its PYTHONPATH, so mutmut has to be installed in
    this Python, not in a folder on PYTHONPATH.

    Raises:
        KitError: When it is not installed.
    """
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([sys.executable, "-c", "import mutmut"], cwd=Path(sys.prefix), env=env, capture_output=True)
    if done.returncode:
        raise KitError(
            f"mutmut is not among the packages of {sys.executable} (a PYTHONPATH does not do): "
            'pip install -c constraints.txt -e ".[dev,mutation]"'
        )


def mutmut(work: Path, *arguments: str, quiet: bool = False) -> str:
    """Run mutmut in the copy; return its output if `quiet`."""
    done = subprocess.run(
        [sys.executable, "-m", "mutmut", *arguments],
        cwd=work,
        env=environment_of_tests(),
        text=True,
        stdout=subprocess.PIPE if quiet else None,
        stderr=subprocess.STDOUT if quiet else None,
    )
    return done.stdout or ""


def exit_codes(work: Path, module: str) -> dict[str, int | None]:
    """Return the exit code of each of a module's mutants, by name; None for those not tried."""
    codes: dict[str, int | None] = {}
    for name in files_of(module):
        file = work / "mutants" / f"{name}.meta"
        codes |= read_json(file)["exit_code_by_key"] if file.is_file() else {}
    return codes


def mutate(name: str, modules: Sequence[str], work: Path, sample: int, seed: int, jobs: int) -> list[dict[str, Any]]:
    """Try the mutants of some modules of a group; return their rows."""
    prepare(work, GROUPS[name])
    if not (work / "mutants" / "mutmut-stats.json").is_file():
        print(f"{name}: making the mutants, and finding out which test reaches which", flush=True)
        said = mutmut(work, "run", "--max-children", "1", "none.of.them", quiet=True)
        if not (work / "mutants" / "mutmut-stats.json").is_file():
            raise RuntimeError(f"mutmut's first run of the tests failed:\n{said[-4000:]}")
    chosen = {}
    for module in modules:
        names = sorted(exit_codes(work, module))
        if not names:
            raise RuntimeError(f"mutmut made no mutants of {module}")
        draw = random.Random(f"{seed} {module}")
        chosen[module] = draw.sample(names, min(len(names), sample)) if sample else names
    left = [mutant for module in modules for mutant in chosen[module] if exit_codes(work, module)[mutant] is None]
    if left:
        mutmut(work, "run", "--max-children", str(jobs), *left)
    for module in modules:
        if all(code is None for code in map(exit_codes(work, module).get, chosen[module])):
            raise RuntimeError(f"mutmut tried none of the mutants of {module}: see above")
    return [row(module, exit_codes(work, module), chosen[module]) for module in modules]


def row(module: str, codes: dict[str, int | None], chosen: list[str]) -> dict[str, Any]:
    """Build a module's row."""
    kinds = Counter(
        "killed"
        if codes[name] in KILLED
        else "timed_out"
        if codes[name] in TIMED_OUT
        else {SURVIVED: "survived", UNREACHED: "unreached", None: "not_tried"}.get(codes[name], "other")
        for name in chosen
    )
    tried = len(chosen) - kinds["not_tried"]
    noticed = kinds["killed"] + kinds["timed_out"]
    return {
        "module": path_of(module),
        "mutants": len(codes),
        "tried": tried,
        **{kind: kinds[kind] for kind in ("killed", "timed_out", "survived", "unreached", "other")},
        "score": noticed / tried if tried else None,
        "survivors": sorted(name for name in chosen if codes[name] in (SURVIVED, UNREACHED)),
        "tests": [f"tests/{name}.py" for name in GROUPS[MODULES[module]].tests],
    }


@told_in_a_line
def main() -> int:
    """Run it and write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--modules", nargs="+", choices=MODULES, default=list(MODULES))
    parser.add_argument("--sample", type=int, default=60, help="mutants a module (60); 0 for all")
    parser.add_argument("--seed", type=int, default=0, help="seed of the sample")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="mutants at once")
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "mutation", help="folder of the copies")
    parser.add_argument("--out", type=Path, default=RECORD)
    recording.add_options(parser, append=False)
    parser.add_argument("--show", action="store_true", help="print the changes of the survivors in the record")
    options = parser.parse_args()
    before = read_json(options.out)["rows"] if options.out.is_file() else []
    if options.show:
        known = {path_of(module): group for module, group in MODULES.items()}
        for found in before:
            # A row may be of an older layout, whose copy no longer exists.
            for name in found["survivors"] if found["module"] in known else ():
                print(mutmut(options.work / known[found["module"]], "show", name, quiet=True))
        return 0
    check_mutmut()
    # The tests are measured here as much as the code.
    provenance = recording.begin(options, (*recording.CODE, "tests"))
    here = {**environment(), "mutmut": importlib.metadata.version("mutmut")}
    command = recording.command_line("mutation.py")
    makes = [{"module": path_of(module)} for module in options.modules]
    rows: list[dict[str, Any]] = []
    for name in dict.fromkeys(MODULES[module] for module in options.modules):
        modules = [module for module in options.modules if MODULES[module] == name]
        for found in mutate(name, modules, options.work / name, options.sample, options.seed, options.jobs):
            rows.append(provenance.stamped({**found, "sample": options.sample, "seed": options.seed}, here))
            score = "none tried" if found["score"] is None else f"{found['score']:.1%} noticed"
            print(f"{found['module']}: {found['tried']} of {found['mutants']} mutants tried, {score}", flush=True)
        recording.write(options.out, rows, provenance=provenance, command=command, makes=makes, key=KEY, append=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
