"""The command `predict`."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys

from ..errors import KitError
from .terminal import harmless

NAME = "predict"
SUMMARY = "classify texts with a finished run"
EXAMPLES = """\
examples:
  python -m qlora_kit predict runs/tickets "My card has not arrived yet" "Why was I charged twice?"
  python -m qlora_kit predict runs/tickets --json < texts.txt        one text a line, one JSON object a line
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments to its parser."""
    parser.add_argument("folder", metavar="RUN", help="a run folder")
    parser.add_argument(
        "texts", nargs="*", default=[], metavar="TEXT", help="texts; without any, or for -, lines of standard input"
    )
    parser.add_argument("--top", type=int, default=3, help="how many labels a text (3)")
    parser.add_argument("--json", action="store_true", help="one JSON object a text")


def run(options: argparse.Namespace) -> int:
    """Run the command; return the exit code."""
    from ..run import load_run

    if options.top < 1:
        raise KitError(f"--top is {options.top}: allowed is 1 or more")
    file = next((text for text in options.texts if os.path.isfile(text)), None)
    if file is not None:  # without this its name would be classified
        raise KitError(f"{file!r} is a file, not a text: write predict RUN < {shlex.quote(file)}, with one text a line")
    run = load_run(options.folder)
    texts = [] if options.texts == ["-"] else options.texts
    if not texts:
        try:
            texts = [line.rstrip("\r\n") for line in sys.stdin if line.strip()]
        except UnicodeDecodeError as error:
            raise KitError(f"standard input is no UTF-8 text: {error}") from error
    if not texts:
        raise KitError('no text was given: write predict RUN "a text", or pipe texts in, one a line')
    predictions = run.predict(texts)
    names = run.label_names
    for text, row in zip(texts, predictions.probabilities, strict=True):
        best = [(names[index], float(row[index])) for index in row.argsort()[::-1][: options.top]]
        if options.json:
            print(json.dumps({"text": text, "label": best[0][0], "probabilities": dict(best)}, ensure_ascii=False))
        else:
            print(harmless(f"{text}\n    " + "   ".join(f"{label} {share:.1%}" for label, share in best)))
    return 0
