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
links. An existing zip of that name is replaced.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments to its parser."""
    parser.add_argument("folder", metavar="FOLDER", help="a folder of results, or a run folder")
    parser.add_argument("--to", metavar="FILE", help="the zip (FOLDER.zip)")


def run(options: argparse.Namespace) -> int:
    """Run the command; return the exit code."""
    from ..export.archive import zip_results

    made = zip_results(options.folder, options.to)
    print(made)
    return 0
