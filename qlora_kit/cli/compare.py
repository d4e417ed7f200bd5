"""The command `compare`."""

from __future__ import annotations

import argparse
import json

from ..errors import KitError
from ..system.showing import counted
from .terminal import harmless, off_stdout

NAME = "compare"
SUMMARY = "compare tested runs on the same test rows"
EXAMPLES = """\
examples:
  qlora-kit compare runs/one runs/other
  qlora-kit compare runs/seed0 runs/seed1 runs/seed2 --json

Prints each run's scores with 95% intervals; of each run after the first, the difference to the first on the same rows,
also with its interval; what makes the comparison unsure, such as few test rows; and the settings that differ. Runs that
were tested on other rows are refused.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments to its parser."""
    parser.add_argument("folders", nargs="+", metavar="RUN", help="two or more run folders, tested by evaluate")
    parser.add_argument("--json", action="store_true", help="as JSON")


def run(options: argparse.Namespace) -> int:
    """Run the command; return the exit code."""
    if len(options.folders) < 2:
        raise KitError("compare takes two or more run folders: write compare RUN RUN")
    with off_stdout():
        from ..evaluation.comparing import COMPARED, compare_runs
        from ..metrics.differences import lead_in_words, with_interval

        found = compare_runs(options.folders)
    if options.json:
        print(json.dumps(found, ensure_ascii=False))
        return 0
    rows = [(row["run"], [with_interval(row[name]) for name in COMPARED]) for row in found["runs"]]
    rows += [
        (f"{row['run']} minus {row['minus']}", [with_interval(row[name], sign="+") for name in COMPARED])
        for row in found["differences"]
    ]
    width = max(len(name) for name, _ in rows)
    heading = f"on {counted(found['rows'], 'test row')}"
    print(f"{heading:{width}}  " + "  ".join(f"{name:>26}" for name in COMPARED))
    for name, values in rows:
        print(harmless(f"{name:{width}}  " + "  ".join(f"{value:>26}" for value in values)))
    for row in found["differences"]:
        lead = lead_in_words(row["f1_macro"])
        words = {"ahead": "is ahead of", "behind": "is behind"}.get(lead, "shows no clear difference from")
        print(harmless(f"{row['run']} {words} {row['minus']} in macro F1"))
    for note in found["notes"]:
        print(harmless(note))
    print("settings that differ:" if found["settings"] else "no setting differs")
    for name, values in found["settings"].items():
        print(harmless(f"  {name}: {', '.join(map(str, values))}"))
    return 0
