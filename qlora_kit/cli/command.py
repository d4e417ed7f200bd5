"""The interface of a command: a module of this package, listed in `COMMANDS` of `main`."""

from __future__ import annotations

import argparse
from typing import Protocol


class Command(Protocol):
    """A module that is one command of `qlora-kit`."""

    NAME: str
    """Its name on the command line."""
    SUMMARY: str
    """What it does, in one line."""
    EXAMPLES: str
    """The end of its help: commands that can be copied."""

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Add the command's arguments to its parser."""

    def run(self, options: argparse.Namespace) -> int:
        """Run the command; return the exit code. Import what it needs in here, so that `--help` stays quick."""
