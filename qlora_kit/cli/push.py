"""The command `push`."""

from __future__ import annotations

import argparse

from .terminal import off_stdout

NAME = "push"
SUMMARY = "upload a run to the Hugging Face hub, private unless you say otherwise"
EXAMPLES = """\
examples:
  qlora-kit push runs/tickets me/tickets                     adapters, tokenizer, card and records
  qlora-kit push runs/tickets me/tickets --merged            the whole model instead
  qlora-kit push runs/tickets me/tickets --public

With --merged the adapters are added to the base in full precision: labels and probabilities differ a little from the
run's. The card that is uploaded says by how much, on the validation and test rows.

The login is that of `hf auth login`, or HF_TOKEN. Neither rows of your data nor names of your folders are uploaded.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments to its parser."""
    parser.add_argument("folder", metavar="RUN", help="a run folder")
    parser.add_argument("repo", metavar="OWNER/NAME", help="the repository; it is made if it does not exist")
    parser.add_argument("--public", action="store_true", help="let everybody see it")
    parser.add_argument("--merged", action="store_true", help="the merged model instead of the adapters")


def run(options: argparse.Namespace) -> int:
    """Run the command; return the exit code."""
    from ..run import load_run

    opened = load_run(options.folder)
    with off_stdout():
        address = opened.push_to_hub(options.repo, private=not options.public, merged=options.merged)
    print(address)
    return 0
