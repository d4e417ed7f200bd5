"""The command `evaluate`."""

from __future__ import annotations

import argparse
import json
from typing import Any

from ..system.showing import one_line
from .terminal import off_stdout

NAME = "evaluate"
SUMMARY = "test a finished run and write its evaluation.json"
EXAMPLES = """\
examples:
  qlora-kit evaluate runs/minilm_banking77_qlora_seed0
  qlora-kit evaluate runs/tickets --json > tickets.json
  qlora-kit evaluate runs/tickets --no-baselines             quicker: the baselines are trained for it

Prints each metric with its 95% interval, and writes evaluation.json into the run folder, which has more: every
label's, the confusions, the calibration. The run's card, README.md, gets the scores unless you have
changed it. A row is printed for each baseline. The last line is the verdict: whether the run is ahead of them.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments to its parser."""
    parser.add_argument("folder", metavar="RUN", help="a run folder")
    parser.add_argument("--no-baselines", action="store_true", help="leave the baselines out")
    parser.add_argument("--json", action="store_true", help="what evaluation.json holds, and the verdict, as JSON")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")


def run(options: argparse.Namespace) -> int:
    """Run the command; return the exit code."""
    from ..run import load_run

    run = load_run(options.folder)
    with off_stdout():
        from ..data.rows import leak_in_words
        from ..evaluation.report import evaluate

        result = evaluate(run, baselines=not options.no_baselines, progress=not options.quiet)
    if options.json:
        print(json.dumps({**result, "verdict": result.verdict}, ensure_ascii=False))
        return 0
    metrics = result["metrics"]
    rows = {name: metrics[name] or {} for name in ("test", "test_without_leaked", "validation") if name in metrics}
    rows.update(metrics["baselines"])
    names = ("accuracy", "f1_macro", "f1_weighted", "loss")
    width = max(map(len, rows))
    print(f"{'':{width}}  " + "  ".join(f"{name:>24}" for name in names))
    for row, values in rows.items():
        print(f"{row:{width}}  " + "  ".join(f"{_interval(values.get(name)):>24}" for name in names))
    print(leak_in_words(len(result["data"]["leaked_test_indices"]), result["data"]["rows"]["test"]))
    weakest = ", ".join(f"{one_line(row['label'])} (F1 {row['f1']:.2f})" for row in result.weakest())
    print(f"weakest labels: {weakest}")
    print(run.path / "evaluation.json")
    print(result.verdict)
    return 0


def _interval(metric: Any) -> str:
    if isinstance(metric, dict):
        return f"{metric['value']:.4f} ({metric['low']:.4f}-{metric['high']:.4f})"
    return "" if metric is None else f"{metric:.4f}"
