"""The command line: the same calls as the library's, in a terminal.

Exit code 0; 2 for bad input, with one line on standard error that says what to do; 1 for a failure; 130, 143 and 129
after Ctrl-C, SIGTERM and SIGHUP.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import re
import signal
import sys
import threading
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn

from ..errors import KitError, NotebookFailed, Terminated, TrainingError, in_terminal, plain_warnings, unknown
from ..system.versions import VERSION
from . import (
    check,
    compare,
    completion,
    demo,
    evaluate,
    export,
    finetune,
    merge,
    plan,
    predict,
    presets,
    push,
    rerun,
    run_notebooks,
    search,
)
from . import zip as zip_command
from .command import Command
from .experiment import in_options
from .terminal import say

COMMANDS: tuple[Command, ...] = (
    *(presets, plan, finetune, evaluate, predict, demo, compare, search, merge, export, zip_command, push),
    *(rerun, run_notebooks, check, completion),
)
"""All commands, in the order in which the help lists them."""

EXAMPLES = """\
examples, from nothing to a prediction:
  qlora-kit presets                                          what there is to run
  qlora-kit finetune minilm_banking77_qlora                  train; ends with a verdict and the next command
  qlora-kit evaluate runs/minilm_banking77_qlora_seed0
  qlora-kit predict runs/minilm_banking77_qlora_seed0 "My card has not arrived yet"

your own texts, with a column of texts and one of labels:
  qlora-kit finetune minilm_banking77_qlora --name tickets \\
      --data tickets.csv --text message --label team --test 0.2

better settings, by their score on validation rows alone:
  qlora-kit search minilm_banking77_qlora --trials 20

everything at once, with figures and one page of results:
  qlora-kit run-notebooks --preset minilm_banking77_smoke --out runs/smoke

before it trains, what it will take; and whether an old run comes out the same here:
  qlora-kit plan minilm_banking77_qlora --device T4
  qlora-kit rerun runs/minilm_banking77_qlora_seed0

`qlora-kit COMMAND --help` shows more of each.
Exit code: 0; 2 for bad input, with one line that says what to do; 1 for a failure; 130 after Ctrl-C, 143 after SIGTERM,
129 after SIGHUP (a terminal that was closed).
"""
STOPPED = "stopped; the same command again goes on where it can"


class _Parser(argparse.ArgumentParser):
    """A parser whose error messages take one line and name what was probably meant."""

    def error(self, message: str) -> NoReturn:
        found = re.match("argument COMMAND: invalid choice: '(.+?)'", message)
        if found:
            raise unknown("command", found[1], [command.NAME for command in COMMANDS])
        raise KitError(f"{message} (see {self.prog} --help)")


class _CommandParser(_Parser):
    """A command's parser: options may stand anywhere between a command's texts and files."""

    _mixed = False

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse with `parse_known_intermixed_args`, which calls this method again."""
        if self._mixed:
            return super().parse_known_args(args, namespace)
        self._mixed = True
        try:
            return self.parse_known_intermixed_args(args, namespace)
        finally:
            self._mixed = False


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: The words after `qlora-kit`; None for those of this process.

    Returns:
        The exit code.
    """
    if not sys.warnoptions:
        # Hide libraries' notes to programmers: they would stand between the lines of a table.
        warnings.simplefilter("ignore", FutureWarning)
    for stream in (sys.stdout, sys.stderr):
        # A letter that a terminal cannot show is printed as its code, so that the command does not fail.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    options = argparse.Namespace()
    try:
        with _told_to_end(), in_terminal(), plain_warnings():
            parser = make_parser()
            options = parser.parse_args(arguments)
            if options.command is None:
                parser.print_help()
                return 0
            code: int = options.run(options)
            sys.stdout.flush()
            return code
    except KitError as error:
        return say(in_options(" ".join(str(error).split()), options), 2)
    except (KeyboardInterrupt, Terminated) as error:
        return say(STOPPED, 128 + (error.number if isinstance(error, Terminated) else signal.SIGINT))
    except BrokenPipeError:
        # The reader of the output (head, less) has stopped reading, so there is nobody left to tell.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        if error.filename is None:
            raise
        # A file that may not be read, a name that is too long: the system's own message says it.
        return say(f"{str(error.filename)[:200]}: {error.strerror}", 2)
    except RecursionError:
        return say("the input is nested too deep, or within itself", 2)
    except (NotebookFailed, TrainingError) as error:
        return say(str(error), 1)


@contextlib.contextmanager
def _told_to_end() -> Iterator[None]:
    """Raise `Terminated` on SIGTERM and SIGHUP, which would end the process at once and leave temporary files."""

    def raise_it(number: int, frame: object) -> NoReturn:
        raise Terminated(number)

    numbers = []
    if threading.current_thread() is threading.main_thread():
        found = (getattr(signal, name, None) for name in ("SIGTERM", "SIGHUP"))
        # Leave a signal alone that is already handled or ignored (nohup).
        numbers = [number for number in found if number and signal.getsignal(number) is signal.SIG_DFL]
    for number in numbers:
        signal.signal(number, raise_it)
    try:
        yield
    finally:
        for number in numbers:
            signal.signal(number, signal.SIG_DFL)


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of all commands, with their help."""
    parser = _Parser(
        prog="qlora-kit",
        description="4-bit fine-tuning: an experiment goes in, a run folder comes out.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=VERSION)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", parser_class=_CommandParser)
    for command in COMMANDS:
        added = commands.add_parser(
            command.NAME,
            help=command.SUMMARY,
            description=command.SUMMARY[0].upper() + command.SUMMARY[1:] + ".",
            epilog=command.EXAMPLES,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        command.add_arguments(added)
        added.set_defaults(run=command.run, parser=parser, own_parser=added)
    return parser
