"""The command `completion`."""

from __future__ import annotations

import argparse

from ..errors import KitError, unknown

NAME = "completion"
SUMMARY = "print what a shell needs to complete commands and options"
EXAMPLES = """\
examples:
  qlora-kit completion bash > ~/.local/share/bash-completion/completions/qlora-kit
  qlora-kit completion zsh > ~/.zfunc/_qlora-kit

It needs shtab: pip install 'qlora_kit[completion]'. New shells then complete by Tab; for zsh, ~/.zshrc has to have
fpath+=~/.zfunc before compinit.
"""
SHELLS = ("bash", "zsh")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments to its parser."""
    parser.add_argument("shell", help="bash or zsh")


def run(options: argparse.Namespace) -> int:
    """Run the command; return the exit code."""
    if options.shell not in SHELLS:
        raise unknown("shell to complete in", options.shell, SHELLS)
    try:
        import shtab
    except ImportError as error:
        raise KitError("completion needs the package shtab: pip install 'qlora_kit[completion]'") from error
    print(shtab.complete(options.parser, shell=options.shell))
    return 0
