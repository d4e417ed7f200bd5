"""The command `export`."""

from __future__ import annotations

import argparse

from ..errors import KitError
from .terminal import off_stdout

NAME = "export"
SUMMARY = "write a run for ONNX Runtime, compared row by row, or for plain PEFT"
EXAMPLES = """\
examples:
  qlora-kit export runs/tickets served/tickets                                    weights in 4 bits, as trained
  qlora-kit export runs/tickets served/small --embeddings int8 --least-equal 0.999    smaller; a label may differ
  qlora-kit export runs/tickets served/fast --weights int8 --least-equal 0.97     fastest; some labels differ
  qlora-kit export runs/tickets adapters --runtime peft                           adapters and head, for plain PEFT

The folder needs nothing of qlora_kit: its README.md has the lines that use it. For onnx, every test row is classified
by both; where fewer get the same label than --least-equal allows, nothing is written. Writing it needs: pip install
"qlora_kit[export]"; using it, onnxruntime, tokenizers and numpy.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments to its parser."""
    parser.add_argument("folder", metavar="RUN", help="a run folder")
    parser.add_argument("to", metavar="FOLDER", help="a new folder for the classifier")
    parser.add_argument("--runtime", default="onnx", help="what opens it: onnx or peft (onnx)")
    parser.add_argument(
        "--weights", default="as_trained", metavar="WAY", help="as_trained, fp32 (equal labels) or int8 (as_trained)"
    )
    parser.add_argument("--embeddings", default="fp32", metavar="WAY", help="the table of words: fp32 or int8 (fp32)")
    parser.add_argument(
        "--least-equal", type=float, default=1.0, metavar="SHARE", help="share of rows with the run's label (1)"
    )
    parser.add_argument("--quiet", action="store_true", help="no progress bar")


def run(options: argparse.Namespace) -> int:
    """Run the command; return the exit code."""
    from ..run import load_run

    if not 0 <= options.least_equal <= 1:
        raise KitError(f"--least-equal is {options.least_equal}: allowed is 0 to 1")
    opened = load_run(options.folder)
    with off_stdout():
        made = opened.export(
            options.runtime,
            options.to,
            weights=options.weights,
            embeddings=options.embeddings,
            least_equal=options.least_equal,
            progress=not options.quiet,
        )
    if options.runtime == "peft":
        print("adapters, head and labels; the base is fetched by its name. README.md there has the lines that open it")
        print(options.to)
        return 0
    print(
        f"{made['equal_rows']:,} of {made['rows']:,} {made['split']} rows get the run's label; "
        f"{made['bytes'] / 1e6:.1f} MB; one text takes {1e3 * made['latency_seconds_p50']:.1f} ms, and with 64 at once "
        f"{made['samples_per_second']:,.0f} are classified a second"
    )
    print(options.to)
    return 0
