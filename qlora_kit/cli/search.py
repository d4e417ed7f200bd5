"""The command `search`."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

from ..errors import KitError
from ..system.showing import counted
from .experiment import add_experiment, read_experiment
from .terminal import harmless, off_stdout, say

NAME = "search"
SUMMARY = "search for better settings, on validation rows alone"
EXAMPLES = """\
examples:
  qlora-kit search minilm_banking77_qlora                    20 trials on all rows: hours on a CPU
  qlora-kit search minilm_banking77_qlora --trials 10 --set data.limit=1000 --set training.epochs=2
  qlora-kit search minilm_banking77_qlora --space training.learning_rate=1e-4:1e-2:log --space lora.r=4,8,16
  qlora-kit search minilm_banking77_qlora --storage drive/study.db
  qlora-kit finetune runs/minilm_banking77_qlora_search/best.yaml --name searched --set data.limit=null

LOW:HIGH is a range (with :log on a logarithmic scale), A,B,C are choices. Each trial trains a model anew; the first one
is the experiment as it is. Validation rows decide. Test rows are not looked at: they are for the run that you train
with best.yaml, whose path is the last line. The same command again goes on with a search that was cut off, and with a
larger --trials it goes on with one that was not.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments to its parser."""
    add_experiment(parser)
    parser.add_argument(
        "--space",
        action="append",
        default=[],
        metavar="FIELD=VALUES",
        help="what to search: a range LOW:HIGH[:log] or choices A,B,C (learning rate and LoRA's rank)",
    )
    parser.add_argument("--trials", type=int, default=20, help="trials to have in the end (20)")
    parser.add_argument("--storage", metavar="FILE", help="Optuna's SQLite file (study.db in the search's folder)")
    parser.add_argument("--no-pruning", action="store_true", help="train every trial to its end")
    parser.add_argument("--out", default="runs", help="folder of the search's folder (runs)")
    parser.add_argument("--name", help="name of the search's folder (the experiment's name and _search)")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")


def run(options: argparse.Namespace) -> int:
    """Run the command; return the exit code."""
    spec = read_experiment(options)
    with off_stdout():
        from ..searching.search import search
        from ..searching.space import parse_space

    found = search(
        spec,
        parse_space(options.space) or None,
        trials=options.trials,
        out=options.out,
        name=options.name,
        storage=options.storage,
        prune=not options.no_pruning,
        progress=not options.quiet,
    )
    for trial in found.trials:
        print(harmless(f"trial {trial['number']:3}  {_reached(trial)}  {_settings(trial)}"))
    try:
        best = found.best_trial
    except KitError as error:
        return say(str(error), 1)
    rows = found.record["rows"]["validation"]
    print(f"best: trial {best['number']}, macro F1 {best['f1_macro']:.4f} on {counted(rows, 'validation row')}")
    print(found.path / "best.yaml")
    return 0


def _reached(trial: Mapping[str, Any]) -> str:
    if trial["state"] == "complete":
        return f"macro F1 {trial['f1_macro']:.4f}"
    return f"could not go on ({trial['error']})" if trial["error"] else f"stopped after epoch {len(trial['epochs'])}"


def _settings(trial: Mapping[str, Any]) -> str:
    values = trial["parameters"].items()
    return "  ".join(f"{name}={value:g}" if isinstance(value, float) else f"{name}={value}" for name, value in values)
