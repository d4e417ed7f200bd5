"""The command `merge`."""

from __future__ import annotations

import argparse

from ..system.showing import counted
from .terminal import off_stdout

NAME = "merge"
SUMMARY = "merge a run's adapters into its base, for plain transformers"
EXAMPLES = """\
examples:
  qlora-kit merge runs/tickets merged/tickets
  qlora-kit merge runs/tickets merged/tickets --dtype bf16    half the size

The base is read in full precision, and the validation and test rows are scored before and after: the last lines say
what the merge changed. Probabilities change, too: choose a limit for --reject-below again. The folder has the model,
its tokenizer, a card and merge.json.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments to its parser."""
    parser.add_argument("folder", metavar="RUN", help="a run folder")
    parser.add_argument("to", metavar="FOLDER", help="a new folder for the merged model")
    parser.add_argument("--dtype", default="fp32", help="fp32, fp16 or bf16 (fp32)")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")


def run(options: argparse.Namespace) -> int:
    """Run the command; return the exit code."""
    from ..run import load_run

    opened = load_run(options.folder)
    with off_stdout():
        merged = opened.merge(options.to, dtype=options.dtype, progress=not options.quiet)
    for name in ("validation", "test"):
        if (rows := merged[name]) is not None:
            before, after = rows["before"]["f1_macro"]["value"], rows["after"]["f1_macro"]["value"]
            print(
                f"on {counted(rows['rows'], f'{name} row')}: macro F1 {before:.4f} before, {after:.4f} after; the same "
                f"label for {rows['same_label']:.2%} of them; probabilities differ by up to "
                f"{rows['largest_difference']:.3f}"
            )
    print(options.to)
    return 0
