"""The command `rerun`."""

from __future__ import annotations

import argparse
import json

from .terminal import off_stdout

NAME = "rerun"
SUMMARY = "run a record again and tell each difference"
EXAMPLES = """\
examples:
  qlora-kit rerun runs/minilm_banking77_qlora_seed0
  qlora-kit rerun runs/latest/02_finetune.json --out runs/again
  qlora-kit rerun runs/tickets --json

RECORD is a finished run folder, a file in it, or the record of a notebook that trained or tested. The experiment runs
again into OUT; then each difference is told: device, threads, versions, commit, data, base weights, and every result
(times and memory aside), to the last bit or by how much. Exit code 0: the same results; 1: others; 2: no such record.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments to its parser."""
    parser.add_argument("record", metavar="RECORD", help="a run folder, a file in it, or 02_finetune.json")
    parser.add_argument("--out", default="runs/reruns", help="folder of the new run folder (runs/reruns)")
    parser.add_argument("--json", action="store_true", help="the comparison as JSON")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")


def run(options: argparse.Namespace) -> int:
    """Run the command; return the exit code."""
    with off_stdout():
        from ..rerun import run_again

        comparison = run_again(options.record, options.out, progress=not options.quiet)
    print(json.dumps(comparison.to_dict(), ensure_ascii=False) if options.json else comparison)
    return 0 if comparison.same else 1
