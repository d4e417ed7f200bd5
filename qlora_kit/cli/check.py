"""The command `check`."""

from __future__ import annotations

import argparse
from pathlib import Path

NAME = "check"
SUMMARY = "check run folders and records: nothing changed, nothing missing"
EXAMPLES = """\
examples:
  qlora-kit check runs/latest                                every run folder and record below it
  qlora-kit check results                                    the reference records, computed again
  qlora-kit check results/accuracy.json --strict

Of a run folder: its files are those in its manifest.json. Of any record: it is what its schema in qlora_kit/schemas
says. Of a record of results/: its figures are computed again from the predictions and times in it, its rows are those
that its commands make, and their commits are of the main branch. What a record does not show (a row without a commit,
figures without what they were computed from) is listed with the command that makes it again.

Exit code 0: nothing is wrong; 1: each wrong thing has a line that says what it is; also where there is no record at
all, and with --strict where a record does not show something.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments to its parser."""
    parser.add_argument("paths", nargs="+", metavar="PATH", help="records, run folders, or folders with them")
    parser.add_argument(
        "--strict",
        action="store_true",
        help="what a record does not show is an error, and all resamples are drawn again (minutes)",
    )


def run(options: argparse.Namespace) -> int:
    """Run the command; return the exit code."""
    from .. import schemas
    from ..checking.check import check
    from ..claims.records import find_results
    from ..system.showing import counted

    paths = [Path(path) for path in options.paths]
    if not paths[0].exists() and options.paths == ["results"]:
        paths = [find_results()]  # those in an installed package
    checked, problems = schemas.check(paths)
    # Do not check the figures of a file that cannot be read or has the wrong shape: it is already reported.
    broken = [file for file in checked if any(problem.startswith((f"{file}:", f"{file} ")) for problem in problems)]
    results = [file for file in checked if schemas.is_of_results(file) and file not in broken]
    report = check(results, thorough=options.strict)
    wrong = problems + report.wrong
    here = f"{Path.cwd()}/"
    told = {"wrong": wrong, "not shown": report.not_shown, "not checked": report.not_checked}
    for kind, line in ((kind, line) for kind, lines in told.items() for line in lines):
        print(f"{kind}: {line.replace(here, '')}")
    if not checked:
        named = ", ".join(map(str, paths))
        print(f"nothing to check in {named}: no run folder, no notebook's record, no record in a folder named results")
    found = f"{counted(len(checked), 'record')} checked, {counted(len(wrong), 'problem')}"
    print(f"{found}, {len(report.not_shown)} not shown")
    return 1 if wrong or not checked or (options.strict and report.not_shown) else 0
