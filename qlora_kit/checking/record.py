"""A record while it is checked: its problems, and the origin of its rows."""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
import subprocess
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from . import consistency

SHA = re.compile(r"[0-9a-f]{40,64}")
CLOSE = 1e-9  # relative tolerance; a larger difference is not rounding
CLOSE_FP32 = 1e-5  # the same for figures computed in 32 bits
MOST_LISTED = 3
NAMES = ("preset", "name", "model", "contender", "method", "scheme", "batch", "length", "seed", "device")
TIPS = ("HEAD", "main")  # a row's commit has to be an ancestor of one of these
TRAINED = ("accuracy", "tuning", "schemes", "soak", "t4", "merging")
Row = Mapping[str, Any]


@dataclasses.dataclass
class Report:
    """The problems found in records.

    Args:
        wrong: A line for each wrong figure, row or commit.
        not_shown: A line for each record with figures that cannot be computed again: how many rows, and the command.
        not_checked: What could not be checked here, and why.
    """

    wrong: list[str] = dataclasses.field(default_factory=list)
    not_shown: list[str] = dataclasses.field(default_factory=list)
    not_checked: list[str] = dataclasses.field(default_factory=list)


class Record:
    """A record while it is checked: its rows and their problems.

    Args:
        path: Its file.
        content: Its content.
        thorough: Draw all resamples again; see `check`.
        report: The problems are added to it.
    """

    def __init__(self, path: Path, content: dict[str, Any], thorough: bool, report: Report) -> None:
        self.path, self.content, self.thorough, self.report = path, content, thorough, report
        self.name = path.stem
        self.rows: list[Row] = content["rows"]
        self.in_git = True
        self._lacking: Counter[tuple[str, str]] = Counter()

    def check(self) -> None:
        """Check commands, provenance and agreement with other rows."""
        self._commands()
        self._provenance()
        for problem in consistency.problems(self.path, self.content, self.where):
            self.say(problem)

    def close(self) -> None:
        """Report in one line what rows do not show, how many rows, and the command that makes them again."""
        counts: Counter[str] = Counter()
        for (what, _), count in self._lacking.items():
            counts[what] += count
        commands = dict.fromkeys(one for _, command in self._lacking for one in command.split("; "))
        if counts:
            told = "; ".join(f"{count} {what}" for what, count in counts.items())
            self.report.not_shown.append(f"{self.path}: {told}. Made again by: {'; '.join(commands)}")

    # --- reporting ---

    def say(self, what: str) -> None:
        """Report that something is wrong."""
        self.report.wrong.append(f"{self.path}: {what}")

    def same(self, where: str, key: str, recorded: Any, computed: Any, close: float = CLOSE) -> None:
        """Report a figure that differs from the value computed again."""
        if not _same(recorded, computed, close):
            self.say(f"{where}: {key} is recorded as {_told(recorded)}, and computed again it is {_told(computed)}")

    def metric(
        self, where: str, key: str, recorded: Mapping[str, Any], computed: Mapping[str, Any], close: float = CLOSE
    ) -> None:
        """Compare a figure and both ends of its interval."""
        for end in ("value", "low", "high"):
            self.same(where, f"{key}.{end}", recorded[end], computed[end], close)

    def lacks(self, row: Row, what: str) -> None:
        """Note that a row does not show something."""
        self._lacking[what, row.get("command", self.content["command"])] += 1

    def groups(self, *names: str) -> dict[tuple[Any, ...], list[Row]]:
        """Group the rows by their values of some keys."""
        found: dict[tuple[Any, ...], list[Row]] = {}
        for row in self.rows:
            found.setdefault(tuple(row.get(name) for name in names), []).append(row)
        return found

    def where(self, row: Row) -> str:
        """Return a row's name: the keys that distinguish it, with their values."""
        made = (list(product) for entry in self.content.get("commands", []) for product in entry["makes"])
        names = next(made, None) or NAMES
        return in_words({name: row[name] for name in names if row.get(name) is not None})

    # --- checks for every record ---

    def _commands(self) -> None:
        entries = self.content.get("commands")
        if not entries:
            for row in self.rows:
                self.lacks(row, "rows with no command that says which rows it makes")
            return
        told = "; ".join(dict.fromkeys(entry["command"] for entry in entries))
        self.same("the record", "command", self.content["command"], told)
        left = {id(row): row for row in self.rows}
        for entry in entries:
            missing = []
            made = expand(entry["makes"])
            if not made:
                continue
            # Keys with the same value in all rows are left out, unless there is only one row.
            telling = [name for name in made[0] if len(made) == 1 or any(key[name] != made[0][name] for key in made)]
            found: dict[str, list[Row]] = {}
            for row in self.rows:
                if row.get("command") == entry["command"]:
                    found.setdefault(repr([row.get(name) for name in made[0]]), []).append(row)
            # A seed that diverged has no row; it is in the list `diverged`.
            lost = {repr([line.get(name) for name in made[0]]) for line in self.content.get("diverged", [])}
            for key in made:
                if repr(list(key.values())) in lost:
                    continue
                mine = found.get(repr(list(key.values())), [])
                for row in mine:
                    left.pop(id(row), None)
                if not mine:
                    missing.append(in_words({name: key[name] for name in telling}))
                if len(mine) > 1:
                    self.say(f"{in_words(key)}: {len(mine)} rows, and `{entry['command']}` makes one")
            if missing:
                more = f" and {len(missing) - MOST_LISTED} more" if len(missing) > MOST_LISTED else ""
                count = f"{len(missing)} row{'s are' if len(missing) > 1 else ' is'} missing"
                words = f"{count} that `{entry['command']}` makes: {'; '.join(missing[:MOST_LISTED])}{more}"
                # If a command is known to have been cut off, missing rows are not an error.
                if cut_off := entry.get("cut_off"):
                    self.report.not_shown.append(f"{self.path}: {words} ({cut_off})")
                else:
                    self.say(words)
            elif entry.get("cut_off"):
                self.say(f"`{entry['command']}` is said to have been cut off, and all its rows are here")
        for row in left.values():
            self.say(f"{self.where(row)}: no command of the record makes this row")

    def _provenance(self) -> None:
        clean: dict[str, Row] = {}
        for row in self.rows:
            environment = row.get("environment")
            if environment is None:
                self.lacks(row, "rows without an environment of their own")
            commit = row.get("commit", (environment or self.content["environment"]).get("commit"))
            if environment is not None and "commit" in row and environment.get("commit") != commit:
                self.same(self.where(row), "environment.commit", environment.get("commit"), commit)
            if environment is not None and row.get("device") not in (None, environment["device"]):
                self.same(self.where(row), "device", row["device"], environment["device"])
            if commit is None:
                self.lacks(row, "rows without a commit")
            elif SHA.fullmatch(commit):
                clean.setdefault(commit, row)
            elif SHA.fullmatch(commit.removesuffix("+changes")):
                self.lacks(row, "rows of a changed tree")
            else:
                self.say(f"{self.where(row)}: commit is {commit!r}, and none in full")
            if self.name in TRAINED and not ("seed" in row and ("learning_rate" in row or "tried" in row)):
                self.lacks(row, "rows without seed or learning rate")
        problem = _git(self.path, "ls-files", "--error-unmatch", "--", self.path.name)
        if problem.returncode:
            self.in_git = False
            return
        shallow = _git(self.path, "rev-parse", "--is-shallow-repository").stdout.strip() == "true"
        for commit, row in clean.items():
            if not any(not _git(self.path, "merge-base", "--is-ancestor", commit, tip).returncode for tip in TIPS):
                if shallow:
                    self.report.not_checked.append(f"{self.path}: commit {commit[:12]} (the clone is shallow)")
                elif _git(self.path, "cat-file", "-e", f"{commit}^{{commit}}").returncode:
                    # Rebased or squashed before it came to main: nobody can look the code up, and nothing is refuted.
                    for one in self.rows:
                        if one.get("commit", (one.get("environment") or {}).get("commit")) == commit:
                            self.lacks(one, "rows of a commit that this clone does not have")
                else:
                    self.say(f"{self.where(row)}: commit {commit} is none of the main branch")


def expand(makes: Iterable[Mapping[str, Sequence[Any]]]) -> list[dict[str, Any]]:
    """Return the keys and values that distinguish each row of a command.

    Args:
        makes: The `makes` of a record's `commands`: each maps names to lists of values.

    Returns:
        A dict for each row: one value from each name's list, in every combination.
    """
    return [
        dict(zip(product, values, strict=True)) for product in makes for values in itertools.product(*product.values())
    ]


def in_words(key: Mapping[str, Any]) -> str:
    """Return names and values as text for a message: `model=minilm, batch=8`."""
    return ", ".join(f"{name}={value}" for name, value in key.items() if value is not None)


def _same(recorded: Any, computed: Any, close: float) -> bool:
    if isinstance(recorded, Mapping) and isinstance(computed, Mapping):
        return recorded.keys() == computed.keys() and all(_same(recorded[k], computed[k], close) for k in recorded)
    if isinstance(recorded, list) and isinstance(computed, list):
        return len(recorded) == len(computed) and all(map(lambda a, b: _same(a, b, close), recorded, computed))
    numbers = (int, float)
    if isinstance(recorded, bool) or isinstance(computed, bool):
        return recorded is computed
    if isinstance(recorded, numbers) and isinstance(computed, numbers) and float in (type(recorded), type(computed)):
        return math.isclose(recorded, computed, rel_tol=close, abs_tol=1e-12)
    return bool(recorded == computed)


def _told(value: Any) -> str:
    return f"{value:.10g}" if isinstance(value, float) else str(value)


def _git(path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = ["git", "-C", str(path.resolve().parent), *arguments]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.SubprocessError):
        return subprocess.CompletedProcess(command, 127, "", "")


def mean_with_interval(values: Any, resamples: int = 2000) -> dict[str, float]:
    """Return a mean with its 95% percentile interval over resampled values.

    Args:
        values: Numbers `[n]`.
        resamples: How many resamples of n values are drawn.
    """
    import numpy as np

    drawn = np.random.default_rng(0).integers(len(values), size=(resamples, len(values)))
    low, high = np.quantile(values[drawn].mean(axis=1), [0.025, 0.975])
    return {"value": float(values.mean()), "low": float(low), "high": float(high)}
