"""The command `predict`."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys

from ..errors import KitError
from ..system.showing import one_line
from .terminal import harmless, off_stdout

NAME = "predict"
SUMMARY = "classify texts with a finished run"
EXAMPLES = """\
examples:
  qlora-kit predict runs/tickets "My card has not arrived yet" "Why was I charged twice?"
  qlora-kit predict runs/tickets --json < texts.txt                 one text a line, one JSON object a line
  qlora-kit predict runs/tickets --reject-below 0.5 < texts.txt

There is one answer for each line, in the lines' order. A blank line among them is refused; those at the end are not
read.
"""
SHORT = 100
"""Texts that are classified before a progress bar would be read."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments to its parser."""
    parser.add_argument("folder", metavar="RUN", help="a run folder")
    parser.add_argument(
        "texts", nargs="*", default=[], metavar="TEXT", help="texts; without any, or for -, lines of standard input"
    )
    parser.add_argument("--top", type=int, default=3, help="how many labels a text (3)")
    parser.add_argument(
        "--reject-below", type=float, metavar="SHARE", help="give no label to a text whose best one is less probable"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object a text")
    parser.add_argument("--quiet", action="store_true", help="no progress bar, which many texts have on a terminal")


def run(options: argparse.Namespace) -> int:
    """Run the command; return the exit code."""
    from ..run import load_run

    if options.top < 1:
        raise KitError(f"--top is {options.top}: allowed is 1 or more")
    if options.reject_below is not None and not 0 <= options.reject_below <= 1:
        raise KitError(f"--reject-below is {options.reject_below}: allowed is 0 to 1")
    file = next((text for text in options.texts if os.path.isfile(text)), None)
    if "-" in options.texts and len(options.texts) > 1:
        raise KitError("- stands for standard input, and texts are given beside it: give - alone, or texts alone")
    if file is not None:  # without this its name would be classified
        raise KitError(f"{file!r} is a file, not a text: write predict RUN < {shlex.quote(file)}, with one text a line")
    run = load_run(options.folder)
    texts = options.texts if options.texts not in ([], ["-"]) else _read_lines()
    bar = "texts" if len(texts) > SHORT and not options.quiet and sys.stderr.isatty() else None
    with off_stdout():
        predictions = run.predict(texts, reject_below=options.reject_below, progress=bar)
    for text, label, best in zip(texts, predictions, predictions.top(options.top), strict=True):
        if options.json:
            print(json.dumps({"text": text, "label": label, "probabilities": dict(best)}, ensure_ascii=False))
        else:
            shares = "   ".join(f"{one_line(name)} {share:.1%}" for name, share in best)
            print(harmless(f"{text}\n    {'' if label is not None else 'rejected: '}{shares}"))
    return 0


def _read_lines() -> list[str]:
    """Return standard input's lines; refuse a blank one, as answers and lines would no longer go together."""
    try:
        lines = [line.rstrip("\r\n") for line in sys.stdin]
    except UnicodeDecodeError as error:
        raise KitError(f"standard input is no UTF-8 text: {error}") from error
    while lines and not lines[-1].strip():
        lines.pop()
    if not lines:
        raise KitError('no text was given: write predict RUN "a text", or pipe texts in, one a line')
    blank = next((number for number, line in enumerate(lines, 1) if not line.strip()), None)
    if blank is not None:
        raise KitError(f"line {blank} of standard input is blank: each line is a text and has its answer; take it out")
    return lines
