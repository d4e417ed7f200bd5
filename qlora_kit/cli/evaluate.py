"""The command `evaluate`."""

from __future__ import annotations

import argparse
from typing import Any

NAME = "evaluate"
SUMMARY = "test a finished run and write its evaluation.json"
EXAMPLES = """\
examples:
  python -m qlora_kit evaluate runs/minilm_banking77_qlora_seed0
  python -m qlora_kit evaluate runs/tickets --no-baselines    quicker: the baselines are trained for it

Prints each metric with its 95% interval, and writes evaluation.json into the run folder, which has more: every
label's, the confusions, the calibration. A row is printed for each baseline: fine-tuning has to be ahead of them.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments to its parser."""
    parser.add_argument("folder", metavar="RUN", help="a run folder")
    parser.add_argument("--no-baselines", action="store_true", help="leave the baselines out")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")


def run(options: argparse.Namespace) -> int:
    """Run the command; return the exit code."""
    from ..run import load_run

    run = load_run(options.folder)
    from ..data.rows import leak_in_words
    from ..evaluation.report import evaluate

    result = evaluate(run, baselines=not options.no_baselines, progress=not options.quiet)
    metrics = result["metrics"]
    rows = {name: metrics[name] or {} for name in ("test", "test_without_leaked", "validation")}
    rows.update(metrics["baselines"])
    names = ("accuracy", "f1_macro", "f1_weighted", "loss")
    width = max(map(len, rows))
    print(f"{'':{width}}  " + "  ".join(f"{name:>24}" for name in names))
    for row, values in rows.items():
        print(f"{row:{width}}  " + "  ".join(f"{_interval(values.get(name)):>24}" for name in names))
    print(leak_in_words(len(result["data"]["leaked_test_indices"]), result["data"]["rows"]["test"]))
    print(run.path / "evaluation.json")
    return 0


def _interval(metric: Any) -> str:
    if isinstance(metric, dict):
        return f"{metric['value']:.4f} ({metric['low']:.4f}-{metric['high']:.4f})"
    return "" if metric is None else f"{metric:.4f}"
