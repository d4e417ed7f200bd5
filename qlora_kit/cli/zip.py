"""The command `zip`."""

from __future__ import annotations

import argparse

NAME = "zip"
SUMMARY = "put a folder's results into one zip file"
EXAMPLES = """\
examples:
  qlora-kit zip runs/latest
  qlora-kit zip runs/tickets --to tickets.zip

FOLDER is one of notebooks, records and run folders, or one run folder. Left out: checkpoints, the rows of your data,
links, and texts of your rows wherever else they stand (--texts keeps those). An existing zip of that name is replaced.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments to its parser."""
    parser.add_argument("folder", metavar="FOLDER", help="a folder of results, or a run folder")
    parser.add_argument("--to", metavar="FILE", help="the zip (FOLDER.zip)")
    parser.add_argument(
        "--texts", action="store_true", help="with example texts of your rows, and pages that show them"
    )


def run(options: argparse.Namespace) -> int:
    """Run the command; return the exit code."""
    from ..export.archive import zip_results

    made = zip_results(options.folder, options.to, texts=options.texts)
    print(made)
    return 0
