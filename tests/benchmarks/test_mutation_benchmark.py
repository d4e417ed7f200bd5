"""benchmarks/mutation.py: which modules and tests it is about, what it counts, and what it does not go on with."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from conftest import ROOT

from qlora_kit.errors import KitError

sys.path.insert(0, str(ROOT / "benchmarks"))
import mutation


def test_modules_and_tests_are_files_of_this_repository_and_each_module_is_in_one_group():
    modules = [module for group in mutation.GROUPS.values() for module in group.modules]
    files = [file for module in modules for file in mutation.files_of(module)]
    assert len(files) == len(set(files)) and len(modules) == len(mutation.MODULES)
    assert all((ROOT / file).is_file() for file in files)
    for group in mutation.GROUPS.values():
        assert all((ROOT / "tests" / f"{name}.py").is_file() for name in group.tests)
    # What a number, a verdict or a run hangs on.
    packages = {"checking", "claims", "data", "evaluation", "memory", "metrics", "quantization", "runs", "training"}
    assert packages <= {*modules}
    assert mutation.path_of("data") == "qlora_kit/data"
    assert mutation.path_of("system/parsing") == "qlora_kit/system/parsing.py"


def test_a_package_s_mutants_are_those_of_all_its_files(tmp_path):
    for name, codes in (("rows", {"a": 1}), ("reading", {"b": 0})):
        meta = tmp_path / "mutants" / "qlora_kit" / "data" / f"{name}.py.meta"
        meta.parent.mkdir(parents=True, exist_ok=True)
        meta.write_text(json.dumps({"exit_code_by_key": codes}))
    assert mutation.exit_codes(tmp_path, "data") == {"a": 1, "b": 0}
    assert mutation.exit_codes(tmp_path, "run") == {}


def test_a_row_counts_what_was_noticed_of_what_was_tried():
    codes = {"a": 1, "b": 3, "c": 0, "d": 33, "e": None, "f": 36, "g": -24, "h": 2, "i": 0}
    row = mutation.row("models/probe", codes, list("abcdefgh"))
    assert row == {
        "module": "qlora_kit/models/probe.py", "mutants": 9, "tried": 7, "killed": 2, "timed_out": 2, "survived": 1,
        "unreached": 1, "other": 1, "score": 4 / 7, "survivors": ["c", "d"],
        "tests": ["tests/memory/test_memory.py", "tests/models/test_inventory.py", "tests/models/test_probe.py"],
    }  # fmt: skip
    assert mutation.row("data", {"a": None}, ["a"])["score"] is None


@pytest.fixture
def copied(tmp_path, monkeypatch):
    """Return a small repository that is copied instead of this one."""
    root = tmp_path / "repository"
    for name in ("qlora_kit/a.py", "tests/conftest.py", "results/mutation.json", "pyproject.toml"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"# {name}\n")
    monkeypatch.setattr(mutation, "ROOT", root)
    monkeypatch.setattr(mutation, "COPIED", ("qlora_kit", "tests", "results", "pyproject.toml"))
    monkeypatch.setattr(mutation, "RECORD", root / "results" / "mutation.json")
    return root


def test_verdicts_of_other_code_or_other_tests_are_dropped_and_those_of_the_same_kept(copied, tmp_path):
    work, group = tmp_path / "work", mutation.Group(("a",), ("test_a",))
    verdict = work / "mutants" / "verdict"

    def prepared(group: mutation.Group = group) -> bool:
        """Whether a verdict that was there before is there still."""
        verdict.parent.mkdir(parents=True, exist_ok=True)
        verdict.touch()
        mutation.prepare(work, group)
        return verdict.exists()

    assert not prepared()
    assert (work / "pyproject.toml").read_text().startswith("# pyproject.toml\n\n[tool.mutmut]\n")
    assert 'only_mutate = ["qlora_kit/a.py"]' in (work / "pyproject.toml").read_text()
    assert (work / "tests" / "conftest.py").read_text() == "# tests/conftest.py\n" + mutation.CONFTEST
    assert prepared()
    (copied / "results" / "mutation.json").write_text("a row more")  # the benchmark's own, after each group
    assert prepared()
    for name in ("qlora_kit/a.py", "tests/conftest.py", "tests/test_a.py"):
        (copied / name).write_text("changed")
        assert not prepared() and prepared(), name
        assert (work / name).read_text().startswith("changed")
    (copied / "tests" / "test_a.py").unlink()
    assert not prepared() and not (work / "tests" / "test_a.py").exists()
    assert not prepared(mutation.Group(("a",), ("test_b",)))


DECORATED = """
import functools
from dataclasses import dataclass, field

def doubled(times=2):
    def decorate(call):
        return functools.wraps(call)(lambda *given: times * call(*given))
    return decorate

@doubled(
    times=3,
)
@doubled()
def add(a, b):
    # a comment
    return a + b

@dataclass
class Box:
    side: int = 2
    kept: list = field(default_factory=list)

    @property
    def size(self):
        return self.side ** 2

    @size.setter
    def size(self, value):
        self.side = value

    @functools.cached_property
    def once(self):
        self.kept.append(1)
        return len(self.kept)

    @staticmethod
    def make(side):
        return Box(side)

    @doubled()
    def area(self):
        def inner():
            return self.side
        return inner()
"""


def test_functions_without_their_decorators_do_what_they_did():
    """mutmut passes over what has a decorator: none is left but those that it knows, and a property with a setter."""
    after = mutation.undecorated(DECORATED)
    for text in (DECORATED, after):
        space: dict = {}
        exec(text, space)
        box = space["Box"].make(5)
        assert (space["add"](1, 2), space["add"].__name__) == (18, "add")
        assert (box.once, box.once, box.area(), box.kept, space["Box"]()) == (1, 1, 10, [1], space["Box"](2, []))
    left = [line.strip() for line in after.splitlines() if line.strip().startswith("@")]
    assert left == ["@dataclass", "@property", "@size.setter", "@staticmethod"]
    assert mutation.undecorated(after) == after
    # The kit's own: what it is called by can be changed.
    run = mutation.undecorated((ROOT / "qlora_kit" / "run.py").read_text(encoding="utf-8"))
    assert "\nload_run = takes(folder=RUN_FOLDER)(load_run)\n" in run and "\n@takes" not in run


def test_without_mutmut_nothing_begins_and_a_folder_in_pythonpath_is_not_enough(tmp_path, monkeypatch):
    (tmp_path / "mutmut").mkdir()
    (tmp_path / "mutmut" / "__init__.py").touch()
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    found = subprocess.run([sys.executable, "-I", "-c", "import mutmut"], capture_output=True).returncode == 0
    if found:
        mutation.check_mutmut()
    else:
        with pytest.raises(KitError, match=r"mutmut is not among the packages of .*\.\[dev,mutation\]"):
            mutation.check_mutmut()


TESTS = """
import pytest

def called():
    import os
    if os.environ.get("MUTANT_UNDER_TEST") == "stats":
        from mutmut.state import state
        state()._stats.add("called")

@pytest.fixture(scope="module")
def made():
    print("MADE")
    called()

def test_b(made): pass

def test_a(made): pass

def test_other(): pass
"""


def test_tests_of_a_mutant_run_file_by_file(tmp_path):
    (tmp_path / "conftest.py").write_text("import os\n\nimport pytest\n" + mutation.CONFTEST)
    for name in ("test_one.py", "test_two.py"):
        (tmp_path / name).write_text(TESTS)
    asked = ("test_two.py::test_a", "test_one.py::test_a", "test_two.py::test_b", "test_one.py::test_b")
    command = [sys.executable, "-m", "pytest", "-v", "-s", "-p", "no:cacheprovider", "-p", "no:xdist", *asked]
    said = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True).stdout
    lines = [line.partition(" ")[0] for line in said.splitlines() if line.startswith("test_")]
    assert lines == ["test_one.py::test_b", "test_one.py::test_a", "test_two.py::test_b", "test_two.py::test_a"]
    assert said.count("MADE") == 2  # once a file


def test_what_a_fixture_calls_is_noted_for_every_test_that_uses_it(tmp_path):
    pytest.importorskip("mutmut")
    (tmp_path / "conftest.py").write_text(
        "import os\n\nimport pytest\n" + mutation.CONFTEST + "\ndef pytest_runtest_teardown(item):\n"
        "    print('NOTED', item.name, *state()._stats)\n"
        "    state()._stats.clear()\n"
    )
    (tmp_path / "test_one.py").write_text(TESTS)
    command = [sys.executable, "-m", "pytest", "-s", "-p", "no:cacheprovider", "-p", "no:xdist", "test_one.py"]
    env = {**mutation.environment_of_tests(), "MUTANT_UNDER_TEST": "stats"}
    said = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=env).stdout
    noted = [line.partition("NOTED ")[2].strip() for line in said.splitlines() if "NOTED" in line]
    assert noted == ["test_b called", "test_a called", "test_other"]
