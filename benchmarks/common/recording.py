"""Write records of results/: each row has the commit that made it, its environment and its command.

A benchmark calls four functions:

    recording.add_options(parser)                         # --from-changes and --append
    provenance = recording.begin(options)                 # before anything is measured; refuses a changed tree
    row = provenance.stamped(row, environment)            # the row with its environment and its commit
    recording.write(path, rows, provenance=provenance, command=recording.command_line("x.py"),
                    makes=keys, key=("model", "device"), append=options.append)

`begin` refuses if files in `CODE` differ from the commit, or if the commit is unknown. With `--from-changes` it records
anyway, and each row's commit then ends in `+changes`. On a machine without git, set QLORA_KIT_COMMIT to the commit and
QLORA_KIT_TREE to a checksum of the files; the benchmark there computes the checksum again.

A record's `commands` lists the rows that each command makes, so that `python -m qlora_kit check results` finds missing
rows and rows that no command makes. It is known before anything is measured. `makes` is a list of products: every
combination of one value from each key's list is a row.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import importlib
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from qlora_kit.checking.record import expand
from qlora_kit.errors import KitError
from qlora_kit.system.files import sha256, write_json
from qlora_kit.system.parsing import SCHEMA, read_json

from . import ROOT

# The files that a measurement depends on. results/ and runs/ are not among them: benchmarks write them.
CODE = (
    "qlora_kit",
    "benchmarks",
    "pyproject.toml",
    "constraints.txt",
    "constraints-oldest.txt",
    "requirements-embedded.txt",
    "requirements-mpnet.txt",
    "requirements-smollm2.txt",
)
SHA = re.compile(r"[0-9a-f]{40,64}")
CHANGES = "+changes"
# Options that do not change what is measured, only places, time limits and what is done later. They are left out of the
# recorded command.
PLACES = ("--out", "--runs", "--work", "--seconds", "--tuning")
FLAGS = ("--from-changes", "--again", "--rows-only")
# Other lists of a record, with the keys that identify their lines. A merge keeps old lines that are not replaced.
SECTIONS: dict[str, tuple[str, ...]] = {
    "limit": ("model", "method", "precision", "batch", "device"),
    "chosen": ("preset", "device"),
    "diverged": ("device", "contender", "seed"),
}


# --- which code ---------------------------------------------------------------------------------------------------


def git(*arguments: str) -> str | None:
    """Return git's output in the repository, or None if git fails or is missing."""
    try:
        done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def in_git() -> bool:
    """Return whether the code is a git clone, not a copy inside another repository."""
    return git("ls-files", "--error-unmatch", "--", "benchmarks/recording.py") is not None


def changed_files(code: Sequence[str] = CODE) -> list[str]:
    """Return the files that differ from the commit or are not in it."""
    said = git("status", "--porcelain", "--untracked-files=all", "--", *code)
    return [line[2:].strip() for line in (said or "").splitlines()]


def tree() -> str:
    """Return the SHA-256 over the names and contents of all files in `CODE`."""
    found = []
    for name in CODE:
        path = ROOT / name
        inside = sorted(path.rglob("*")) if path.is_dir() else [path]
        found += [file for file in inside if file.is_file() and not _left_out(file.relative_to(ROOT))]
    total = hashlib.sha256()
    for file in found:
        total.update(f"{file.relative_to(ROOT).as_posix()} {sha256(file)}\n".encode())
    return total.hexdigest()


def _left_out(path: Path) -> bool:
    # Files left by Python and by tools: not committed, and not part of the code.
    return any(part == "__pycache__" or part.startswith(".") for part in path.parts) or path.suffix == ".pyc"


def commit(code: Sequence[str] = CODE) -> str | None:
    """Return the commit of the running code, with `+changes` if files differ from it; None if unknown."""
    if in_git():
        sha = git("rev-parse", "HEAD")
        return sha if sha is None or not changed_files(code) else sha + CHANGES
    told = os.environ.get("QLORA_KIT_COMMIT", "")
    if not SHA.fullmatch(told):
        return None
    return told if os.environ.get("QLORA_KIT_TREE") == tree() else told + CHANGES


def is_clean(commit: str | None) -> bool:
    """Return whether a commit is a full SHA of a tree without changes."""
    return commit is not None and SHA.fullmatch(commit) is not None


def same_code(one: str | None, other: str | None, code: Sequence[str] = CODE) -> bool:
    """Return whether two commits have the same files in `code`; changes elsewhere, e.g. of texts, do not matter."""
    if not (is_clean(one) and is_clean(other)):
        return False
    return one == other or git("diff", "--quiet", str(one), str(other), "--", *code) is not None


def exports() -> str:
    """Return the shell line that sets the commit on a machine without git; see `begin`.

    Raises:
        KitError: When the code is not that of a commit.
    """
    if problem := _why_not(CODE):
        raise KitError(problem)
    return f"export QLORA_KIT_COMMIT={commit()} QLORA_KIT_TREE={tree()}"


def stamped(row: Mapping[str, Any], environment: Mapping[str, Any]) -> dict[str, Any]:
    """Return a row with its environment and commit; call it in the process that measures.

    Args:
        row: The row.
        environment: From `system.environment.environment`, or a run's. If other code trained the run, the row gets that
            code's commit.
    """
    here, there = commit(), environment.get("commit")
    same = (here or "").removesuffix(CHANGES) == (there or "").removesuffix(CHANGES)
    made_by = here if same else there
    return {**row, "commit": made_by, "environment": {**environment, "commit": made_by}}


def _why_not(code: Sequence[str]) -> str | None:
    """Return why the code's commit is not certain, in one line that says what to do; None if it is."""
    import qlora_kit

    measured = Path(qlora_kit.__file__).resolve().parent
    if measured != ROOT / "qlora_kit":
        return f"the qlora_kit that would be measured is {measured}: set PYTHONPATH={ROOT}"
    if in_git():
        told, sha = os.environ.get("QLORA_KIT_COMMIT"), git("rev-parse", "HEAD")
        if told and told != sha:
            return f"QLORA_KIT_COMMIT says {told}, and git says {sha}: unset QLORA_KIT_COMMIT"
        changed = changed_files(code)
        if not changed:
            return None
        more = f" and {len(changed) - 1} more" if len(changed) > 1 else ""
        return f"{changed[0]}{more} is not as the commit has it: commit the changes first"
    how = "in the clone run `python benchmarks/recording.py`, and export here what it prints"
    if not SHA.fullmatch(os.environ.get("QLORA_KIT_COMMIT", "")):
        return f"git does not know this code, and QLORA_KIT_COMMIT does not name its commit in full: {how}"
    if not os.environ.get("QLORA_KIT_TREE"):
        return f"QLORA_KIT_COMMIT alone does not show that this is that commit's code: {how}"
    if os.environ["QLORA_KIT_TREE"] != tree():
        return f"the files here are not those that QLORA_KIT_TREE was made of: copy the code again; {how}"
    return None


# --- what a benchmark calls ---------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Provenance:
    """The code that measures.

    Args:
        commit: Its full commit, with `+changes` if files differ from it; None if unknown.
        from_changes: Whether rows of changed or unknown code are allowed.
        began: Start of measuring, by `time.monotonic`.
    """

    commit: str | None
    from_changes: bool
    began: float = dataclasses.field(default_factory=time.monotonic, compare=False)

    def stamped(self, row: Mapping[str, Any], environment: Mapping[str, Any]) -> dict[str, Any]:
        """Return a row with its environment and the commit."""
        return {**row, "commit": self.commit, "environment": {**environment, "commit": self.commit}}

    def takes(self, row: Mapping[str, Any]) -> bool:
        """Return whether an earlier call's row was made by the current code; with `from_changes`, any is accepted."""
        return self.from_changes or same_code(row.get("commit"), self.commit)


def add_options(parser: argparse.ArgumentParser, *, append: bool = True) -> None:
    """Add `--from-changes`, and `--append` for a benchmark that otherwise drops the rows of other commands."""
    parser.add_argument(
        "--from-changes", action="store_true", help="record from a changed tree; each row then says SHA+changes"
    )
    if append:
        parser.add_argument(
            "--append", action="store_true", help="keep the rows of --out that this command does not make"
        )


def begin(options: argparse.Namespace, code: Sequence[str] = CODE) -> Provenance:
    """Return the provenance of the code; call it before anything is measured.

    Raises:
        KitError: When the code differs from its commit, or the commit is unknown, without `--from-changes`.
    """
    problem = _why_not(code)
    if problem is not None and not options.from_changes:
        raise KitError(
            f"nothing is measured: {problem}. (--from-changes records all the same, and says so in each row)"
        )
    return Provenance(commit(code), options.from_changes)


def command_line(script: str, arguments: Sequence[str] | None = None) -> str:
    """Return the command that makes the rows, without the options in `PLACES` and `FLAGS`.

    Args:
        script: Name of the benchmark's file.
        arguments: Its arguments; this process's by default.
    """
    kept, words = [], iter(sys.argv[1:] if arguments is None else arguments)
    for word in words:
        if word in PLACES:
            next(words, None)
        elif word not in FLAGS and not word.startswith(tuple(f"{name}=" for name in PLACES)):
            kept.append(word)
    return shlex.join(["python", f"benchmarks/{script}", *kept])


def done(path: str | Path, command: str, provenance: Provenance) -> list[dict[str, Any]]:
    """Return a record's rows that this command has already made with the current code."""
    if not Path(path).is_file():
        return []
    rows = read_json(path)["rows"]
    return [row for row in rows if row.get("command") == command and provenance.takes(row)]


def write(
    path: str | Path,
    rows: Sequence[Mapping[str, Any]],
    *,
    provenance: Provenance,
    command: str,
    makes: Iterable[Mapping[str, Any]],
    key: Sequence[str],
    append: bool,
    **sections: Any,
) -> dict[str, Any]:
    """Write a record; with `append`, keep its rows of other commands.

    Args:
        path: The record.
        rows: The rows made so far, each from `Provenance.stamped`. They get their `command`.
        provenance: What `begin` returned.
        command: The command that makes them, from `command_line`.
        makes: For each row of the complete command, the names in `key` with their values.
        key: The names that identify a row. An older row with the same values is replaced.
        append: Keep the rows of `path` that `rows` do not replace.
        **sections: Other sections of the record, by name. Those in `SECTIONS` keep older lines with other keys.

    Returns:
        The record as written.

    Raises:
        KitError: For a row without a commit, or one that is not in `makes`.
    """
    expected = [tuple(made[name] for name in key) for made in makes]
    made = [dict(row) for row in rows]
    for row in made:
        if not ("commit" in row and "environment" in row):
            raise KitError(f"a row of {path} has no commit and environment: Provenance.stamped adds them")
        if not (provenance.from_changes or is_clean(row["commit"])):
            raise KitError(f"a row of {path} was made by {row['commit'] or 'code of no known commit'}: make it again")
        if tuple(row.get(name) for name in key) not in expected:
            told = ", ".join(f"{name}={row.get(name)}" for name in key)
            raise KitError(f"{path}: the command says nothing of a row with {told}")
        row["command"] = command
    entry = {
        "command": command,
        "makes": products(dict(zip(key, values, strict=True)) for values in expected),
        "seconds": round(time.monotonic() - provenance.began, 1),
    }
    path = Path(path)
    before = with_commands(read_json(path), key) if append and path.is_file() else None
    new = {
        "schema": SCHEMA,
        "environment": made[0]["environment"] if made else (before or {}).get("environment", {}),
        "commands": [entry],
        "rows": made,
        **sections,
    }
    result = merged(before, new, key)
    write_json(path, result)
    return result


def merged(before: dict[str, Any] | None, new: Mapping[str, Any], key: Sequence[str]) -> dict[str, Any]:
    """Merge two records; rows of `new` replace older ones with the same values of `key`."""

    def place(row: Mapping[str, Any]) -> str:
        return repr([row.get(name) for name in key])

    # A diverged seed has no row, but replaces an older row too.
    again = {place(row) for row in (*new["rows"], *new.get("diverged", []))}
    rows, commands, lines = list(new["rows"]), list(new["commands"]), {}
    if before is not None:
        rows = [row for row in before["rows"] if place(row) not in again] + rows
        mine: dict[str, set[str]] = {}
        for entry in commands:
            mine.setdefault(entry["command"], set()).update(map(place, expand(entry["makes"])))
        kept = []
        for entry in before["commands"]:
            # The older command no longer makes rows that are replaced, nor rows that the same command would make again.
            gone = again | mine.get(entry["command"], set())
            left = [made for made in expand(entry["makes"]) if place(made) not in gone]
            if left:
                kept.append({**entry, "makes": products(left)})
        commands = kept + commands
        for name, names in SECTIONS.items():
            if name in before:
                fresh = {repr([line.get(n) for n in names]) for line in new.get(name, [])}
                if name == "diverged":
                    fresh |= {repr([row.get(n) for n in names]) for row in new["rows"]}
                old = [line for line in before[name] if repr([line.get(n) for n in names]) not in fresh]
                lines[name] = [*old, *new.get(name, [])]
        if "labels" in before and "labels" in new:
            lines["labels"] = {**before["labels"], **new["labels"]}
    own = ("schema", "environment", "command", "commands", "rows")
    rest = {name: value for name, value in {**(before or {}), **new}.items() if name not in own}
    return {
        "schema": new["schema"],
        "environment": new["environment"],
        "command": "; ".join(dict.fromkeys(entry["command"] for entry in commands)),
        "commands": commands,
        "rows": rows,
        **rest,
        **lines,
    }


def with_commands(record: dict[str, Any], key: Sequence[str]) -> dict[str, Any]:
    """Bring an older record to today's form: each row gets its environment, commit and command.

    Rows that the older commands should have made but did not are unknown here; add them by hand.
    """
    rows = []
    for row in record["rows"]:
        environment = row.get("environment", record["environment"])
        own = {"commit": environment.get("commit"), "environment": environment, "command": record["command"]}
        rows.append({**own, **row})
    if "commands" in record:
        return {**record, "rows": rows}
    by_command: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        by_command.setdefault(row["command"], []).append({name: row.get(name) for name in key})
    commands = [{"command": command, "makes": products(made)} for command, made in by_command.items()]
    return {**record, "rows": rows, "commands": commands}


def products(keys: Iterable[Mapping[str, Any]]) -> list[dict[str, list[Any]]]:
    """Combine keys of rows into few products of lists: `[{"model": ["a", "b"], "batch": [8, 32]}]` is four rows."""
    found: list[dict[str, list[Any]]] = [{name: [value] for name, value in key.items()} for key in keys]
    for name in reversed(list(found[0]) if found else []):
        groups: dict[str, dict[str, list[Any]]] = {}
        for product in found:
            rest = repr([(other, values) for other, values in product.items() if other != name])
            if rest in groups:
                groups[rest][name] += [value for value in product[name] if value not in groups[rest][name]]
            else:
                groups[rest] = {other: list(values) for other, values in product.items()}
        found = list(groups.values())
    return found


# --- rows of another machine --------------------------------------------------------------------------------------


def without(record: dict[str, Any], device: str, new: Mapping[str, Any], key: Sequence[str]) -> dict[str, Any]:
    """Return a record without a device's rows that those of another one stand for, and without what refers to them.

    Args:
        record: The older record.
        device: The older device.
        new: The record with the rows that stand for them: equal in all names of `key` but the device.
        key: The names that identify a row.
    """

    def place(row: Mapping[str, Any], names: Iterable[str]) -> str:
        return repr([row.get(name) for name in names if name != "device"])

    again = {place(row, key) for row in new["rows"]}
    commands = []
    for entry in record["commands"]:
        makes = [
            made for made in expand(entry["makes"]) if made.get("device") != device or place(made, key) not in again
        ]
        if makes:
            commands.append({**entry, "makes": products(makes)})
    lists = {}
    for name, items in record.items():
        if not isinstance(items, list) or name == "commands":
            continue
        names = key if name == "rows" else SECTIONS.get(name)
        stands = again if name == "rows" else {place(line, names or ()) for line in new.get(name, [])}
        lists[name] = [
            item
            for item in items
            if not (
                isinstance(item, dict)
                and item.get("device") == device
                # What has no names of its own is computed again from the rows.
                and (names is None or place(item, names) in stands)
            )
        ]
    return {**record, **lists, "commands": commands}


def merge(files: Sequence[Path], into: Path, from_changes: bool, instead_of: str | None = None) -> None:
    """Merge records that were made elsewhere into those of a folder.

    Args:
        files: The records.
        into: The folder.
        from_changes: Also take rows of a changed tree or another history.
        instead_of: A device that is replaced: its rows that a new one stands for are dropped (see `without`).

    Raises:
        KitError: For a file that is not a record of today's form, or rows whose commit is not in this history.
    """
    from qlora_kit import schemas

    for file in files:
        new = read_json(file)
        problem = next(iter(schemas.problems(new, schemas.of_results(file.stem))), None)
        if problem or not new.get("commands"):
            raise KitError(f"{file} is no record that a benchmark of today wrote: {problem or 'commands is missing'}")
        for row in new["rows"]:
            sha = row.get("commit")
            if not from_changes and not is_clean(sha):
                raise KitError(f"{file} has a row of {sha or 'no known commit'}: measure it with the code of a commit")
            if not from_changes and in_git() and git("merge-base", "--is-ancestor", sha, "HEAD") is None:
                raise KitError(f"{file} has a row of {sha}, which is no commit before HEAD: merge that branch first")
        key = list(new["commands"][0]["makes"][0])
        target = into / file.name
        before = with_commands(read_json(target), key) if target.is_file() else None
        if before is not None and instead_of is not None:
            before = without(before, instead_of, new, key)
        result = merged(before, new, key)
        derived = getattr(_benchmark_of(file.stem), "derived", None)
        # Values that a benchmark computes from all rows are computed again.
        write_json(target, derived(result) if derived else result)
        print(f"{target}: {len(new['rows'])} rows of {file}, {len(result['rows'])} in all")


def _benchmark_of(record: str) -> Any:
    name = {"tuning": "accuracy", "speed_variants": "speed"}.get(record, record)
    return importlib.import_module(name) if (ROOT / "benchmarks" / f"{name}.py").is_file() else None
