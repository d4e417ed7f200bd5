"""The command `run-notebooks`."""

from __future__ import annotations

import argparse

NAME = "run-notebooks"
SUMMARY = "run the notebooks into one folder with one page of results"
EXAMPLES = """\
examples:
  qlora-kit run-notebooks
  qlora-kit run-notebooks --notebooks "02 03" --preset minilm_banking77_smoke --out runs/smoke
  qlora-kit run-notebooks --params "epochs=2 03_evaluate.resamples=500"

A value for one notebook is written 03_evaluate.name=value; without a notebook it goes to every one that has the
name. Unknown names are refused before anything runs. The same command again goes on with a run that was cut off;
a finished OUT is renamed to OUT-DATE first.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments to its parser."""
    parser.add_argument("--preset", default="auto", help="a preset or an experiment's YAML file (auto)")
    parser.add_argument("--out", default="runs/latest", help="the folder OUT (runs/latest)")
    parser.add_argument("--notebooks", default="", help='names or numbers, as "02 03" (all)')
    parser.add_argument(
        "--params", action="append", default=[], metavar="NAME=VALUE", help="parameters, several in one text if wished"
    )


def run(options: argparse.Namespace) -> int:
    """Run the command; return the exit code."""
    from ..notebooks.parameters import split_params
    from ..notebooks.run_all import run_notebooks

    run_notebooks(options.preset, options.out, options.notebooks, split_params(options.params))
    return 0
