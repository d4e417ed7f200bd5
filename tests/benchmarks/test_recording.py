"""benchmarks/recording.py: whose code made a row, which rows a command makes, and what a merge keeps."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT

from qlora_kit import schemas
from qlora_kit.errors import KitError

sys.path.insert(0, str(ROOT / "benchmarks"))
from common import recording
from common.recording import Provenance

SHA, OTHER = "ab" * 20, "cd" * 20
CLEAN = Provenance(SHA, False)
KEY = ("device", "model", "batch")


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a repository with one commit, of the kit and this one file of benchmarks/."""
    root = tmp_path_factory.mktemp("clone")
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "qlora_kit", root / "qlora_kit", ignore=ignored)
    shutil.copytree(ROOT / "benchmarks" / "common", root / "benchmarks" / "common", ignore=ignored)
    shutil.copy(ROOT / "benchmarks" / "recording.py", root / "benchmarks")
    # As small as a benchmark can be: it refuses, or says which commit it would record.
    (root / "benchmarks" / "small.py").write_text(
        "import argparse, sys\nfrom common import recording\n"
        "parser = argparse.ArgumentParser()\nrecording.add_options(parser)\n"
        "try:\n    print(recording.begin(parser.parse_args()).commit)\n"
        "except recording.KitError as error:\n    sys.exit(str(error))\n"
    )
    (root / ".gitignore").write_text("/runs/\n__pycache__/\n")
    for command in (["init", "-q"], ["add", "-A"], ["commit", "-q", "-m", "all"]):
        who = ["-c", "user.name=a", "-c", "user.email=a@b"]
        subprocess.run(["git", *who, *command], cwd=root, check=True)
    return root


def run(root: Path, script: str, *arguments: str, **told: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("QLORA_KIT_")}
    environment |= {"PYTHONPATH": str(root), "PYTHONDONTWRITEBYTECODE": "1", **told}
    command = [sys.executable, str(root / "benchmarks" / script), *arguments]
    return subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)


def test_a_benchmark_records_the_commit_of_a_clean_tree_alone(clone: Path):
    sha = subprocess.run(["git", "rev-parse", "HEAD"], cwd=clone, capture_output=True, text=True).stdout.strip()
    (clone / "results").mkdir(exist_ok=True)
    (clone / "results" / "new.json").write_text("{}")  # what a benchmark writes is no change of the code
    assert run(clone, "small.py").stdout.strip() == sha
    for changed in ("qlora_kit/run.py", "benchmarks/new.py", "pyproject.toml"):
        file = clone / changed
        before = file.read_text() if file.is_file() else None
        file.write_text((before or "") + "# changed\n")
        refused = run(clone, "small.py")
        assert refused.returncode == 1 and refused.stderr.count("\n") == 1
        assert changed in refused.stderr and "commit the changes first" in refused.stderr
        assert run(clone, "small.py", "--from-changes").stdout.strip() == f"{sha}+changes"
        file.unlink() if before is None else file.write_text(before)
    assert run(clone, "small.py").stdout.strip() == sha
    wrong = run(clone, "small.py", QLORA_KIT_COMMIT=SHA)
    assert wrong.returncode == 1 and "unset QLORA_KIT_COMMIT" in wrong.stderr


def test_where_there_is_no_git_the_commit_travels_with_the_code_and_its_checksum(clone: Path, tmp_path: Path):
    said = run(clone, "recording.py").stdout.split()
    told = dict(word.split("=") for word in said[1:])
    assert said[0] == "export" and set(told) == {"QLORA_KIT_COMMIT", "QLORA_KIT_TREE"}
    copy = tmp_path / "copy"
    shutil.copytree(clone, copy, ignore=shutil.ignore_patterns(".git", "__pycache__"))
    untold = run(copy, "small.py")
    assert untold.returncode == 1 and "python benchmarks/recording.py" in untold.stderr
    assert run(copy, "small.py", "--from-changes").stdout.strip() == "None"
    unchecked = run(copy, "small.py", QLORA_KIT_COMMIT=told["QLORA_KIT_COMMIT"])
    assert unchecked.returncode == 1 and "does not show that this is that commit's code" in unchecked.stderr
    assert run(copy, "small.py", **told).stdout.strip() == told["QLORA_KIT_COMMIT"]
    (copy / "qlora_kit" / "flat.py").write_text("changed")
    other = run(copy, "small.py", **told)
    assert other.returncode == 1 and "are not those that QLORA_KIT_TREE was made of" in other.stderr
    changed = run(copy, "small.py", "--from-changes", **told).stdout.strip()
    assert changed == told["QLORA_KIT_COMMIT"] + "+changes"


def test_the_kit_that_is_measured_is_the_one_beside_the_benchmarks(clone: Path):
    elsewhere = run(clone, "small.py", PYTHONPATH=str(ROOT))
    # A benchmark puts its own kit first, whatever PYTHONPATH says; one that was imported before is refused.
    assert elsewhere.returncode == 0
    early = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import qlora_kit; sys.path.insert(0, 'benchmarks'); "
    early += "from common import recording; print(recording._why_not(recording.CODE))"
    done = subprocess.run([sys.executable, "-c", early], cwd=clone, capture_output=True, text=True)
    assert f"set PYTHONPATH={clone}" in done.stdout


def test_a_command_is_told_without_where_and_for_how_long():
    given = ["--batch", "8", "--out", "a b", "--seconds=30", "--from-changes", "--append", "--note", "two words"]
    told = recording.command_line("speed.py", given)
    assert told == "python benchmarks/speed.py --batch 8 --append --note 'two words'"


def test_products_stand_for_their_rows_and_no_others():
    keys = [{"a": a, "b": b} for a in (1, 2, 3) for b in ("x", "y") if (a, b) != (2, "y")]
    products = recording.products(keys)
    assert len(products) == 2
    found = recording.expand(products)
    assert sorted(map(str, found)) == sorted(map(str, keys)) and len(found) == 5
    assert recording.products([]) == [] and recording.expand([]) == []


def row(model: str, batch: int, *, by: Provenance = CLEAN, device: str = "a CPU", **more: Any) -> dict[str, Any]:
    return by.stamped({"model": model, "batch": batch, "device": device, **more}, {"device": device, "commit": None})


def write(path: Path, command: str, rows: list[dict[str, Any]], *missing: dict[str, Any], append: bool = True) -> Any:
    makes = [*rows, *missing]
    return recording.write(
        path, rows, provenance=CLEAN, command=command, makes=makes, key=KEY, append=append
    )  # fmt: skip


def makes_of(record: dict[str, Any]) -> dict[str, list[tuple[Any, ...]]]:
    found: dict[str, list[tuple[Any, ...]]] = {}
    for entry in record["commands"]:
        found.setdefault(entry["command"], []).extend(tuple(made.values()) for made in recording.expand(entry["makes"]))
    return {command: sorted(keys) for command, keys in found.items()}


def test_rows_of_other_commands_stay_and_what_is_made_anew_changes_hands(tmp_path: Path):
    out = tmp_path / "results" / "any.json"
    write(out, "one", [row("a", 1, n=1), row("a", 2, n=2)])
    second = write(out, "two", [row("a", 2, n=3), row("b", 2, n=4)])
    assert {(r["model"], r["batch"], r["n"], r["command"]) for r in second["rows"]} == {
        ("a", 1, 1, "one"), ("a", 2, 3, "two"), ("b", 2, 4, "two"),
    }  # fmt: skip
    assert makes_of(second) == {"one": [("a CPU", "a", 1)], "two": [("a CPU", "a", 2), ("a CPU", "b", 2)]}
    assert second["command"] == "one; two"
    assert {r["commit"] for r in second["rows"]} == {SHA} == {r["environment"]["commit"] for r in second["rows"]}
    assert schemas.check([out])[1] == []
    # The same command goes on: what it has not made yet stays expected.
    part = write(out, "two", [row("a", 2, n=5)], row("b", 2), row("c", 2))
    assert makes_of(part)["two"] == [("a CPU", "a", 2), ("a CPU", "b", 2), ("a CPU", "c", 2)]
    assert [r["n"] for r in part["rows"] if r["command"] == "two"] == [4, 5]
    again = write(out, "three", [row("a", 1)], append=False)
    assert len(again["rows"]) == 1 and list(makes_of(again)) == ["three"]


def test_what_cannot_be_recorded_is_refused(tmp_path: Path):
    out = tmp_path / "any.json"
    with pytest.raises(KitError, match="stamped adds them"):
        write(out, "one", [{"model": "a", "batch": 1, "device": "a CPU"}])
    with pytest.raises(KitError, match=r"made by abab.*\+changes: make it again"):
        write(out, "one", [row("a", 1, by=Provenance(SHA + "+changes", True))])
    with pytest.raises(KitError, match="says nothing of a row with device=a CPU, model=a, batch=2"):
        recording.write(
            out, [row("a", 2)], provenance=CLEAN, command="one", makes=[row("a", 1)], key=KEY, append=False
        )  # fmt: skip
    assert not out.exists()
    assert CLEAN.takes(row("a", 1)) and not CLEAN.takes({"commit": SHA + "+changes"}) and not CLEAN.takes({})
    assert Provenance(None, True).takes({})


def test_an_older_record_is_gone_on_with(tmp_path: Path):
    out = tmp_path / "any.json"
    old = {"schema": 1, "environment": {"device": "a CPU", "commit": OTHER}, "command": "old"}
    out.write_text(json.dumps({**old, "rows": [{"model": "z", "batch": 1, "device": "a CPU"}], "note": "kept"}))
    record = write(out, "new", [row("a", 1)])
    assert [(r["command"], r["commit"]) for r in record["rows"]] == [("old", OTHER), ("new", SHA)]
    assert record["note"] == "kept" and set(makes_of(record)) == {"old", "new"}


def test_rows_made_elsewhere_are_merged_with_the_same_checks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    head = recording.git("rev-parse", "HEAD")
    if head is None:
        pytest.skip("the code is in no clone")
    by = Provenance(head, False)
    into, file = tmp_path / "results", tmp_path / "made" / "soak.json"

    def record(path: Path, command: str, *rows: dict[str, Any], **more: Any) -> None:
        recording.write(
            path, rows, provenance=Provenance(None, True), command=command, makes=rows, key=KEY, append=False, **more
        )  # fmt: skip

    limit = {"model": "a", "method": "m", "precision": "p", "batch": 1, "device": "a GPU"}
    record(into / "soak.json", "here", row("a", 1, by=by), limit=[{**limit, "device": "a CPU", "n": 1}])
    record(file, "there", row("a", 1, by=by, device="a GPU"), limit=[{**limit, "n": 2}])
    recording.merge([file], into, False)
    both = json.loads((into / "soak.json").read_text())
    assert [r["device"] for r in both["rows"]] == ["a CPU", "a GPU"]
    assert [line["n"] for line in both["limit"]] == [1, 2]
    recording.merge([file], into, False)  # once more changes nothing
    assert json.loads((into / "soak.json").read_text())["rows"] == both["rows"]
    for sha, why in ((OTHER, "no commit before HEAD"), (head + "+changes", "measure it with the code of a commit")):
        record(file, "there", row("a", 1, by=Provenance(sha, True), device="a GPU"))
        with pytest.raises(KitError, match=why):
            recording.merge([file], into, False)
    file.write_text(json.dumps({"schema": 1, "environment": {}, "command": "x", "rows": []}))
    with pytest.raises(KitError, match="commands is missing"):
        recording.merge([file], into, False)
    assert json.loads((into / "soak.json").read_text())["rows"] == both["rows"]


def test_the_options_are_the_same_everywhere():
    parser = argparse.ArgumentParser()
    recording.add_options(parser)
    assert vars(parser.parse_args([])) == {"from_changes": False, "append": False}
    # Whoever writes a record says which code it is of.
    for file in sorted((ROOT / "benchmarks").glob("*.py")):
        text = file.read_text()
        if '"--out"' in text:
            assert "recording.begin(" in text and "recording.add_options(" in text, file.name
